package e2e

import (
	"fmt"
	"strconv"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/gorilla/websocket"
	"github.com/open-telemetry/opamp-go/protobufs"
	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/proto"
)

// configOf is a message that tells an effective configuration of so many bytes, and nothing else.
func configOf(size int) *protobufs.AgentToServer {
	return &protobufs.AgentToServer{EffectiveConfig: &protobufs.EffectiveConfig{ConfigMap: &protobufs.AgentConfigMap{
		ConfigMap: map[string]*protobufs.AgentConfigFile{"": {Body: make([]byte, size)}},
	}}}
}

// frameSize is that of one of the first messages of an agent.
func frameSize(m *protobufs.AgentToServer) int {
	m = proto.Clone(m).(*protobufs.AgentToServer)
	m.InstanceUid, m.SequenceNum, m.Capabilities = make([]byte, 16), 1, 1
	return 1 + proto.Size(m)
}

// wantNamed waits until the gateway has found out at whose message the server ends links, with so
// many links lost at most, and has told the agent. It returns the line in the log that says so.
func wantNamed(t *testing.T, server *FleetServer, gateway *Gateway, metrics string, a *FleetAgent, first, most int) (line string) {
	t.Helper()
	eventually(t, func() string {
		server.wantLost(t, first, most)
		if faults(t, metrics, "server_ends_link") == 0 {
			return "no agent is named at whose message the server ends links"
		}
		return ""
	})
	line = gateway.wantLog(t, "warn", a.uid.String())
	a.wantTold(t, 1)
	return line
}

// wantUnnamed checks that the log names nobody of the fleet.
func (g *Gateway) wantUnnamed(t *testing.T, f *Fleet) {
	t.Helper()
	for _, a := range f.agents {
		require.Empty(t, g.log.with(a.uid.String()), "lines that name a bystander")
	}
}

// One agent's message is such that the server ends the link at it, and the agent says it again whenever
// it is asked for its full state. It costs so many links, then it is over; the agent is told, and others
// lose nothing.
func TestPoison(t *testing.T) {
	t.Parallel()
	const (
		tooLarge, harmless = 2 << 20, 10 << 10 // bytes
		limit              = 1 << 20           // of a server that closes with 1009
	)
	for _, test := range []struct {
		name string
		most int              // links lost
		end  func(*FleetLink) // nil: the size alone does it
		says string           // what the log has to tell of what the server said
		any  bool             // the server ends the link at whatever the agent says, and not at one message
	}{
		{name: "1009", most: 2, says: "1009"},
		{name: "1002", most: 2, end: closeWith(websocket.CloseProtocolError), says: "1002"},
		{name: "1003", most: 2, end: closeWith(websocket.CloseUnsupportedData), says: "1003"},
		{name: "1007", most: 2, end: closeWith(websocket.CloseInvalidFramePayloadData), says: "1007"},
		{name: "1008", most: 2, end: closeWith(websocket.ClosePolicyViolation), says: "1008"},
		{name: "crash, finish", most: 3, end: finish},
		{name: "crash, reset", most: 3, end: resetLink},
		{name: "unwanted, 1000", most: 3, end: closeWith(websocket.CloseNormalClosure), says: "1000", any: true},
		{name: "unwanted, no code", most: 3, end: closeWith(websocket.CloseNoStatusReceived), any: true},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			var unwanted atomic.Pointer[uuid.UUID]
			opts := fleetServerOptions{echoes: true}
			poison := configOf(tooLarge)
			if test.end == nil {
				opts.readLimit = limit
			} else {
				poison = configOf(harmless)
				opts.heeds = func(uid uuid.UUID, m *protobufs.AgentToServer, _ int) (does response) {
					if u := unwanted.Load(); u != nil && *u == uid && (test.any || m.GetEffectiveConfig() != nil) {
						does.end = test.end
					}
					return does
				}
			}
			server := startFleetServer(t, opts)
			metrics, showMetrics := withMetrics(t)
			gateway := startGateway(t, server.url(), showMetrics)
			gateway.wantLinks(t, 3)
			others := timedFleet(t, 30, server, gateway)
			stopTalk := others.talk(t, 300*time.Millisecond)
			first := server.opened()

			begun := time.Now()
			poisoning := startFleetOf(t, 1, gateway.url(), 1, fleetOptions{state: poison})
			alice := poisoning.agents[0]
			unwanted.Store(&alice.uid)
			poisoning.talk(t, 500*time.Millisecond)
			line := wantNamed(t, server, gateway, metrics, alice, first, test.most)
			t.Logf("over %s after it began, with %d links lost", time.Since(begun).Round(time.Millisecond), server.opened()-first)
			require.Contains(t, line, test.says, "what the server said")
			if !test.any {
				require.Contains(t, line, strconv.Itoa(frameSize(poison)), "the size of the message")
			}
			told := len(alice.wasTold())
			alice.wantTold(t, told+3) // for a while, whatever she says
			throughout(t, 3*time.Second, func() string {
				server.wantLost(t, first, test.most)
				return ""
			})
			require.Len(t, gateway.log.with("warn", alice.uid.String()), 1, "lines that name the agent")
			if test.says != "" {
				for _, lost := range gateway.log.with("lost connection to the server") {
					require.Contains(t, lost, test.says, "why the link was lost")
				}
			}

			if test.end == nil { // the gateway knows now how much the server takes
				lost := server.opened()
				bob := startFleet(t, 1, gateway.url(), 1)
				bob.wantConnected(t, ceiling, 1)
				server.wantKnown(t, bob.agents, ceiling)
				bob.agents[0].say(configOf(3 << 20))
				bob.agents[0].wantTold(t, 1)
				require.Equal(t, lost, server.opened(), "links that there were")
				cathy := startFleet(t, 1, gateway.url(), 1)
				cathy.wantConnected(t, ceiling, 1)
				server.wantKnown(t, cathy.agents, ceiling)
				cathy.agents[0].say(configOf(512 << 10))
				server.wantHeard(t, cathy.agents, ceiling)
				require.Equal(t, lost, server.opened(), "links that there were")
				cathy.wantBlameless(t)
			}

			stopTalk()
			repeated, missing := server.wantRepaired(t, others)
			t.Logf("of %d messages of %d bystanders %d were repeated, %d were lost with a link and made good; %s", others.said(), len(others.agents), repeated, missing, others.waits(begun))
			others.wantBlameless(t)
			gateway.wantUnnamed(t, others)
		})
	}
}

// An agent says once what the server does not take, and it is so large that it is never written
// whole: it is not the first thing that is said on each link from then on.
func TestUnwrittenPoison(t *testing.T) {
	t.Parallel()
	const size, limit, most = 24 << 20, 1 << 20, 2
	server := startFleetServer(t, fleetServerOptions{echoes: true, readLimit: limit})
	metrics, showMetrics := withMetrics(t)
	gateway := startGateway(t, server.url(), showMetrics)
	gateway.wantLinks(t, 3)
	others := timedFleet(t, 30, server, gateway)
	stopTalk := others.talk(t, 300*time.Millisecond)
	poisoning := settledFleet(t, 1, server, gateway)
	first := server.opened()
	alice := poisoning.agents[0]
	alice.say(configOf(size))
	wantNamed(t, server, gateway, metrics, alice, first, most)
	throughout(t, 5*time.Second, func() string {
		server.wantLost(t, first, most)
		return ""
	})
	tooLarge := 0
	for _, end := range server.endings() {
		if end.Error() == websocket.ErrReadLimit.Error() {
			tooLarge++
		}
	}
	t.Logf("the server has seen the message %d times", tooLarge)
	require.LessOrEqual(t, tooLarge, most)
	stopTalk()
	server.wantRepaired(t, others)
	others.wantBlameless(t)
	gateway.wantUnnamed(t, others)
}

// Two agents at once say what the server does not take: both are named, and nobody else.
func TestTwoPoisons(t *testing.T) {
	t.Parallel()
	const most = 4
	server := startFleetServer(t, fleetServerOptions{echoes: true, heeds: func(_ uuid.UUID, m *protobufs.AgentToServer, _ int) (does response) {
		if m.GetEffectiveConfig() != nil {
			does.end = closeWith(websocket.CloseInvalidFramePayloadData)
		}
		return does
	}})
	metrics, showMetrics := withMetrics(t)
	gateway := startGateway(t, server.url(), showMetrics, oneLink)
	gateway.wantLinks(t, 1)
	others := timedFleet(t, 30, server, gateway)
	stopTalk := others.talk(t, 300*time.Millisecond)
	first := server.opened()
	poisoning := startFleetOf(t, 2, gateway.url(), 2, fleetOptions{state: configOf(1000)})
	for _, a := range poisoning.agents {
		eventually(t, func() string {
			server.wantLost(t, first, most)
			if len(a.wasTold()) == 0 {
				return "an agent is not told what the server thinks of its message"
			}
			return ""
		})
		gateway.wantLog(t, "warn", a.uid.String(), "1007")
	}
	require.Equal(t, 2, faults(t, metrics, "server_ends_link"))
	stopTalk()
	server.wantRepaired(t, others)
	server.wantLost(t, first, most)
	others.wantBlameless(t)
	gateway.wantUnnamed(t, others)
}

// Something on the way ends one link after the other, as load balancers do that give connections a
// time to live. It costs each agent one full report each time, and nobody is suspected.
func TestLinksThatEndOften(t *testing.T) {
	t.Parallel()
	const losses, every = 9, 1500 * time.Millisecond
	server, line, gateway := behindLine(t, fleetServerOptions{echoes: true})
	fleet := timedFleet(t, 30, server, gateway)
	stopTalk := fleet.talk(t, 150*time.Millisecond)
	for i := range losses {
		throughout(t, every, func() string { return "" })
		var lost *FleetLink
		eventually(t, func() string {
			open := server.open()
			if len(open) < 3 {
				return fmt.Sprintf("%d links are open", len(open))
			}
			lost = open[i%3]
			return ""
		})
		how := drops[1+i%2] // not by a reset: after that the server may forget the agents late
		how.drop(t, lineOf(t, line, lost), lost)
	}
	stopTalk()
	repeated, missing := server.wantRepaired(t, fleet)
	asked, moved := 0, 0
	for _, a := range fleet.agents {
		a.mu.Lock()
		asked += a.asked
		a.mu.Unlock()
		moved += server.record(a).asked - 1
	}
	t.Logf("%d links lost, %d requests for the full state of %d agents; %d messages of %d were repeated, %d made good", losses, asked, len(fleet.agents), repeated, fleet.said(), missing)
	require.Equal(t, moved, asked, "requests for the full state, and introductions on other links")
	require.Greater(t, asked, losses*len(fleet.agents)/3/2, "each loss concerned a third of the agents")
	eventually(t, func() string {
		if n := server.opened(); n != 3+losses {
			return fmt.Sprintf("there were %d links, want %d", n, 3+losses)
		}
		return ""
	})
	fleet.wantBlameless(t)
	gateway.wantUnnamed(t, fleet)
	require.Empty(t, gateway.log.with("server_ends_link"))
}

// Only when a link was reset is the server likely to notice late, and to forget agents that have
// spoken elsewhere since: they are asked for their full state once more, after a minute or more. That
// is how long this takes. Agents of other links are asked once.
func TestFullStateIsToldOnce(t *testing.T) {
	t.Parallel()
	server, line, gateway := behindLine(t, fleetServerOptions{echoes: true})
	fleet := timedFleet(t, 30, server, gateway)
	for i, lost := range server.open() { // each is 10 agents'
		concerned := server.at(lost, fleet.agents)
		require.Len(t, concerned, 10)
		dropped := time.Now()
		drops[i].drop(t, lineOf(t, line, lost), lost)
		server.wantState(t, concerned, dropped, lost)
	}
	asked := func(n int) (agents []*FleetAgent) {
		for _, a := range fleet.agents {
			a.mu.Lock()
			if a.asked == n {
				agents = append(agents, a)
			}
			a.mu.Unlock()
		}
		return agents
	}
	require.Len(t, asked(1), 30)
	within(t, 2*time.Minute, func() string {
		if n := len(asked(2)); n < 10 {
			return fmt.Sprintf("%d agents of the link that was reset have been asked once more", n)
		}
		return ""
	})
	// Were the others to be asked again, most would have been before the last of those ten: each after a random time.
	throughout(t, 5*time.Second, func() string {
		if n := len(asked(1)); n != 20 {
			return fmt.Sprintf("%d agents have been asked once, want 20: those of links that were ended in order", n)
		}
		return ""
	})
	fleet.wantBlameless(t)
}
