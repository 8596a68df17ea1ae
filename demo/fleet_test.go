package main

import (
	"context"
	"errors"
	"net"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/open-telemetry/opamp-go/protobufs"
)

// Alice takes remote configurations, bob takes none.
const (
	alice = "alice-----------"
	bob   = "bob-------------"
)

// A story is a fleet with what it told, at a time that stands still until moved.
type story struct {
	*fleet
	t      *testing.T
	clock  time.Time
	events []string
}

func newStory(t *testing.T) *story {
	t.Helper()
	s := &story{t: t, clock: time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)}
	s.fleet = newFleet(func() time.Time { return s.clock }, func(e event) { s.events = append(s.events, e.text) })
	return s
}

func (s *story) gatewayLink(name string) *link {
	l := &link{name: name, gateway: true}
	s.linkUp(l, &fakeConn{})
	return l
}

func (s *story) wantEvent(text string) {
	s.t.Helper()
	if !slices.ContainsFunc(s.events, func(e string) bool { return strings.Contains(e, text) }) {
		s.t.Errorf("no event about %q, only:\n%s", text, strings.Join(s.events, "\n"))
	}
	s.events = nil
}

func (s *story) wantAgent(name string, want agentView) {
	s.t.Helper()
	for _, got := range s.view().agents {
		if got.name == name {
			want.uid, want.name, want.lastSeen = got.uid, got.name, got.lastSeen
			if got != want {
				s.t.Errorf("%s is\n%+v, want\n%+v", name, got, want)
			}
			return
		}
	}
	s.t.Errorf("there is no %s", name)
}

func wantFullStateAsked(t *testing.T, answer *protobufs.ServerToAgent, want bool) {
	t.Helper()
	asked := answer.GetFlags()&uint64(protobufs.ServerToAgentFlags_ServerToAgentFlags_ReportFullState) != 0
	if asked != want {
		t.Errorf("full state asked: %v, want %v", asked, want)
	}
}

type fakeConn struct{ sent []*protobufs.ServerToAgent }

func (c *fakeConn) Connection() net.Conn { return nil }
func (c *fakeConn) Disconnect() error    { return nil }
func (c *fakeConn) Send(_ context.Context, m *protobufs.ServerToAgent) error {
	c.sent = append(c.sent, m)
	return nil
}

// fullReport is an agent's first message.
func fullReport(uid string, sequence uint64) *protobufs.AgentToServer {
	name, _, _ := strings.Cut(uid, "-")
	m := &protobufs.AgentToServer{
		InstanceUid: []byte(uid),
		SequenceNum: sequence,
		AgentDescription: &protobufs.AgentDescription{IdentifyingAttributes: []*protobufs.KeyValue{{
			Key: "service.name", Value: &protobufs.AnyValue{Value: &protobufs.AnyValue_StringValue{StringValue: name}},
		}}},
		Capabilities: uint64(protobufs.AgentCapabilities_AgentCapabilities_ReportsStatus),
		Health:       &protobufs.ComponentHealth{Healthy: true},
	}
	if uid == alice {
		m.Capabilities |= uint64(protobufs.AgentCapabilities_AgentCapabilities_AcceptsRemoteConfig)
	}
	return m
}

func heartbeatOf(uid string, sequence uint64) *protobufs.AgentToServer {
	return &protobufs.AgentToServer{InstanceUid: []byte(uid), SequenceNum: sequence}
}

func acknowledgement(uid string, sequence uint64, o *protobufs.AgentRemoteConfig) *protobufs.AgentToServer {
	m := heartbeatOf(uid, sequence)
	m.EffectiveConfig = &protobufs.EffectiveConfig{ConfigMap: o.GetConfig()}
	m.RemoteConfigStatus = &protobufs.RemoteConfigStatus{
		LastRemoteConfigHash: o.GetConfigHash(),
		Status:               protobufs.RemoteConfigStatuses_RemoteConfigStatuses_APPLIED,
	}
	return m
}

func TestAgentsComeAndGo(t *testing.T) {
	s := newStory(t)
	first, second := s.gatewayLink("upstream-0"), s.gatewayLink("upstream-1")
	s.wantEvent("link upstream-1 is up")

	answer := s.receive(first, fullReport(alice, 0))
	wantFullStateAsked(t, answer, false)
	if string(answer.GetInstanceUid()) != alice {
		t.Errorf("the answer is for %q, want alice", answer.GetInstanceUid())
	}
	s.wantEvent("alice is connected over upstream-0")
	s.wantAgent("alice", agentView{connected: true, described: true, link: "upstream-0", health: "healthy", healthy: true, accepts: true, config: "none yet"})

	s.receive(second, fullReport(bob, 0))
	s.wantAgent("bob", agentView{connected: true, described: true, link: "upstream-1", health: "healthy", healthy: true, config: "takes none"})

	t.Run("a heartbeat changes nothing but the time", func(t *testing.T) {
		s.clock = s.clock.Add(time.Minute)
		wantFullStateAsked(t, s.receive(first, heartbeatOf(alice, 1)), false)
		if got := s.view().agents[0].lastSeen; !got.Equal(s.clock) {
			t.Errorf("alice was last seen at %v, want %v", got, s.clock)
		}
	})
	t.Run("who missed a message is asked for everything", func(t *testing.T) {
		wantFullStateAsked(t, s.receive(first, heartbeatOf(alice, 3)), true)
		wantFullStateAsked(t, s.receive(first, fullReport(alice, 4)), false)
	})
	t.Run("an unknown agent that says nothing of itself is asked for everything", func(t *testing.T) {
		wantFullStateAsked(t, s.receive(first, heartbeatOf("cathy-----------", 7)), true)
	})
	t.Run("an agent moves to another link", func(t *testing.T) {
		s.receive(second, heartbeatOf(alice, 5))
		s.wantEvent("alice moved from upstream-0 to upstream-1")
		want := []linkView{{"upstream-0", 1}, {"upstream-1", 2}} // cathy; alice and bob
		if got := s.view().links; !slices.Equal(got, want) {
			t.Errorf("the links are %v, want %v", got, want)
		}
		s.linkDown(first)
		s.wantAgent("alice", agentView{connected: true, described: true, link: "upstream-1", health: "healthy", healthy: true, accepts: true, config: "none yet"})
	})
	t.Run("with its link an agent is gone", func(t *testing.T) {
		s.linkDown(second)
		s.wantEvent("bob is gone")
		s.wantAgent("bob", agentView{described: true, health: "gone", config: "takes none"})
		if n := s.view().connected(); n != 0 {
			t.Errorf("%d are connected, want none", n)
		}
	})
	t.Run("a goodbye is no gap", func(t *testing.T) {
		third := s.gatewayLink("upstream-0")
		s.receive(third, heartbeatOf(alice, 6))
		goodbye := heartbeatOf(alice, 0) // as the gateway says it for an agent that vanished
		goodbye.AgentDisconnect = &protobufs.AgentDisconnect{}
		wantFullStateAsked(t, s.receive(third, goodbye), false)
		s.wantEvent("alice said goodbye")
		s.wantAgent("alice", agentView{described: true, health: "gone", accepts: true, config: "none yet"})
	})
}

func TestRemoteConfiguration(t *testing.T) {
	s := newStory(t)
	l := s.gatewayLink("upstream-0")
	s.receive(l, fullReport(alice, 0))
	s.receive(l, fullReport(bob, 0))

	pushes := s.offerNext()
	if len(pushes) != 1 || string(pushes[0].message.GetInstanceUid()) != alice {
		t.Fatalf("pushed to %v, want alice only", pushes)
	}
	offered := pushes[0].message.GetRemoteConfig()

	s.clock = s.clock.Add(30 * time.Millisecond)
	onlyStatus := acknowledgement(alice, 1, offered)
	onlyStatus.EffectiveConfig = nil
	s.receive(l, onlyStatus)
	if o := s.view().offer; o.acked != 0 {
		t.Error("a status without the effective configuration counts as acknowledgement")
	}

	s.clock = s.clock.Add(4 * time.Millisecond)
	s.receive(l, acknowledgement(alice, 2, offered))
	if got, want := s.view().offer.String(), "acknowledged by 1 of 1 agent after 34ms"; !strings.Contains(got, want) {
		t.Errorf("the offer is %q, want %q", got, want)
	}

	t.Run("who comes back with it gets no other", func(t *testing.T) {
		s.linkDown(l)
		l = s.gatewayLink("upstream-0")
		if c := s.receive(l, heartbeatOf(alice, 3)).GetRemoteConfig(); c != nil {
			t.Errorf("alice was offered %v again", c)
		}
	})
	t.Run("who was away for a push gets it on coming back", func(t *testing.T) {
		s.linkDown(l)
		if pushes := s.offerNext(); len(pushes) != 0 {
			t.Fatalf("pushed to %v, who is not there", pushes)
		}
		l = s.gatewayLink("upstream-0")
		offered := s.receive(l, heartbeatOf(alice, 4)).GetRemoteConfig()
		if offered == nil {
			t.Fatal("alice was not offered the new configuration")
		}
		if c := s.receive(l, heartbeatOf(alice, 5)).GetRemoteConfig(); c != nil {
			t.Error("alice was offered the same twice")
		}
		s.receive(l, acknowledgement(alice, 6, offered))
		if o := s.view().offer; o.revision != 2 || o.acked != 1 {
			t.Errorf("the offer is %v, want revision 2 acknowledged by 1", o)
		}
	})
}

func TestWaitFor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStory(t)
		reason := errors.New("the user left")
		ctx, cancel := context.WithCancelCause(t.Context())
		result := make(chan error)
		twoLinks := func(v fleetView) bool { return len(v.links) == 2 }

		go func() { result <- s.waitFor(ctx, twoLinks) }()
		s.gatewayLink("upstream-0")
		synctest.Wait()
		s.gatewayLink("upstream-1")
		if err := <-result; err != nil {
			t.Errorf("waiting for two links: %v", err)
		}

		go func() { result <- s.waitFor(ctx, func(fleetView) bool { return false }) }()
		cancel(reason)
		if err := <-result; !errors.Is(err, reason) {
			t.Errorf("waiting ended with %v, want %v", err, reason)
		}
	})
}

func TestFormatUID(t *testing.T) {
	for uid, want := range map[string]string{
		"\x01\x98\x00\x00\x00\x00\x70\x00\x80\x00\x00\x00\x00\x00\x00\x01": "01980000-0000-7000-8000-000000000001",
		"01H5MG7N9N36J28WEC8A8X5B17":                                       `"01H5MG7N9N36J28WEC8A8X5B17"`,
		"\x1b[2J":                                                          `"\x1b[2J"`, // nobody paints our terminal
	} {
		if got := formatUID(uid); got != want {
			t.Errorf("formatUID(%q) = %s, want %s", uid, got, want)
		}
	}
}
