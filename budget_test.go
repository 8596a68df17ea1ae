package opampgateway

import (
	"fmt"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/open-telemetry/opamp-go/protobufs"
	"github.com/stretchr/testify/require"
	"go.uber.org/zap"

	"github.com/opampgateway/opampgateway/internal/gatewaytest"
	"github.com/opampgateway/opampgateway/internal/telemetry"
)

// These tests are about max_buffered_size: what anybody sends is in it, and whoever takes most of it
// does not take it from others.

// TestManyLinksShareTheBudget has more links than there would be memory for if each could fill its outbox.
func TestManyLinksShareTheBudget(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		require.NoError(t, s.cfg.Validate())
		agents := s.crowd(64)
		for _, l := range s.server.WantLinks(16) {
			l.StopReading()
		}
		const n, size = 350, 3 << 10 // 67 MiB in all
		for _, a := range agents {
			go func() {
				for sequence := range n {
					a.Send(gatewaytest.Report(a.UID, sequence, size))
				}
			}()
		}
		synctest.Wait()
		held := s.memory.Up.Held() + s.memory.Reading()
		require.LessOrEqual(t, held, int64(s.cfg.MaxBufferedSize))
		require.Greater(t, held, int64(2<<20), "nothing waits")
		for _, l := range s.server.Links() {
			l.ReadOn()
		}
		synctest.Wait()
		for _, a := range agents {
			require.Len(t, s.server.Received(a.UID), 1+n)
		}
		s.wantFaults(nil)
	}, connections(16), func(cfg *Config) { cfg.MaxMessageSize, cfg.MaxBufferedSize = 1<<20, 48<<20 })
}

// TestStuckSenders has agents stop in the middle of messages, and one dawdle: others get theirs through
// within a second, and the large ones soon.
func TestStuckSenders(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		const size = 900_000
		bob, cathy, dave := s.introduce("bob"), s.introduce("cathy"), s.introduce("dave")
		for i := range 20 {
			a := s.introduce(fmt.Sprint("stuck ", i))
			frame := frameOf(gatewaytest.Report(a.UID, 1, size))
			go a.SendRaw(frame[:size-1000])
		}
		dawdler := s.introduce("dawdler")
		go func() {
			for _, b := range frameOf(gatewaytest.Report(dawdler.UID, 1, size)) {
				if ended, _, _ := dawdler.Ended(); ended {
					return
				}
				dawdler.SendRaw([]byte{b})
				time.Sleep(10 * time.Millisecond)
			}
		}()
		synctest.Wait()
		large := gatewaytest.Report(dave.UID, 1, size)
		go dave.Send(large)
		within := func(limit time.Duration, f func()) {
			t.Helper()
			begin := time.Now()
			f()
			require.LessOrEqual(t, time.Since(begin), limit)
		}
		begin := time.Now()
		for i := range 10 {
			within(time.Second, func() { s.server.WantFrame(bob.UID, bob.Say(i)) })
			report := gatewaytest.Report(cathy.UID, i, 100<<10)
			within(time.Second, func() { cathy.Send(report); s.server.WantFrame(cathy.UID, report) })
			within(time.Second, func() { s.introduce(fmt.Sprint("newcomer ", i)) })
			time.Sleep(100 * time.Millisecond)
		}
		for len(s.server.Received(dave.UID)) < 2 {
			require.LessOrEqual(t, time.Since(begin), 30*time.Second, "one after the other has to go first")
			time.Sleep(100 * time.Millisecond)
		}
		s.server.WantFrame(dave.UID, large)
		dave.WantConnected()
		require.NotEmpty(t, s.logged(zap.WarnLevel, "sends a message too slowly, or not on"))
		require.LessOrEqual(t, s.memory.Reading()+s.memory.Up.Held(), int64(s.cfg.MaxBufferedSize))
	}, connections(1), tight)
}

// TestPatienceWithSlowSenders leaves an agent alone that is slow while nobody needs the memory.
func TestPatienceWithSlowSenders(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		alice := s.introduce("alice")
		report := frameOf(gatewaytest.Report(alice.UID, 1, 500_000))
		alice.SendRaw(report[:250_000])
		time.Sleep(25 * time.Second) // no longer, or a pong would get in between
		alice.SendRaw(report[250_000:])
		s.server.WantFrame(alice.UID, gatewaytest.Report(alice.UID, 1, 500_000))
		s.wantFaults(nil)
	}, connections(1), tight)
}

// stalled has an agent introduced that reads no more, and for which this much waits.
func (s *stage) stalled(name string, link *gatewaytest.Link, size int) *gatewaytest.Agent {
	s.t.Helper()
	a := s.introduce(name)
	a.StopReading()
	link.Push(gatewaytest.Offer(a.UID, "small", 10)) // which its reader is waiting for already
	link.Push(gatewaytest.Offer(a.UID, "large", size))
	synctest.Wait()
	return a
}

// TestSheddingChoosesWhoDoesNotRead rather than who has most waiting, and reads.
func TestSheddingChoosesWhoDoesNotRead(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		link := s.server.WantLinks(1)[0]
		s.net.Throttle(100 << 10)
		reader := s.introduce("reader")
		s.net.Throttle(0)
		const n, size = 6, 500_000
		for i := range n { // half a minute of its line
			link.Push(gatewaytest.Offer(reader.UID, fmt.Sprint(i), size))
		}
		for i := 0; s.counted("faults", string(telemetry.ReasonMemoryFull)) < 3; i++ {
			require.Less(t, i, 50, "nobody is let go")
			s.stalled(fmt.Sprint("stalled ", i), link, 300_000)
			time.Sleep(2 * stallMoment)
		}
		reader.WantConnected()
		for i := range n {
			for len(reader.Inbox()) == 0 {
				reader.WantConnected()
				time.Sleep(time.Second)
			}
			reader.WantFrame(gatewaytest.Offer(reader.UID, fmt.Sprint(i), size))
		}
	}, connections(1), tight)
}

// TestSheddingChoosesWhoHasNotReadForLongest among those who do not read.
func TestSheddingChoosesWhoHasNotReadForLongest(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		link := s.server.WantLinks(1)[0]
		first := s.stalled("first", link, 100_000) // and has least
		time.Sleep(3 * time.Second)                // when it read last is known to a second
		var others []*gatewaytest.Agent
		for i := 0; s.counted("faults", string(telemetry.ReasonMemoryFull)) == 0; i++ {
			require.Less(t, i, 50, "nobody is let go")
			time.Sleep(2 * stallMoment)
			others = append(others, s.stalled(fmt.Sprint("other ", i), link, 600_000))
		}
		first.ReadOn()
		_, err := first.WantEnd(time.Second)
		require.Error(t, err)
		others[len(others)-1].ReadOn()
		synctest.Wait()
		others[len(others)-1].WantConnected()
	}, connections(1), tight)
}

// TestSheddingStops when enough is free, and closes each agent once.
func TestSheddingStops(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		link := s.server.WantLinks(1)[0]
		agents := 0
		for ; s.counted("faults", string(telemetry.ReasonMemoryFull)) == 0; agents++ {
			require.Less(t, agents, 100, "nobody is let go")
			s.stalled(fmt.Sprint("stalled ", agents), link, 300_000)
			time.Sleep(2 * stallMoment)
		}
		require.Greater(t, agents, 5)
		closed := int(s.counted("faults", string(telemetry.ReasonMemoryFull)))
		require.LessOrEqual(t, closed, 4, "an eighth of what may be in use is freed, and what was too much")
		time.Sleep(3 * time.Second)
		s.wantFault(telemetry.ReasonMemoryFull, closed)
		s.wantConnections(agents - closed)
		require.Len(t, s.logged(zap.WarnLevel, "does not read what the server sends"), closed)
	}, connections(1), tight)
}

// TestSheddingClosesOnce an agent that is being closed already: what waits for it is about to be free, so
// nobody else has to go either.
func TestSheddingClosesOnce(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		link := s.server.WantLinks(1)[0]
		var others []*gatewaytest.Agent
		for i := range 15 {
			others = append(others, s.introduce(fmt.Sprint("other ", i)))
			others[i].StopReading()
			link.Push(gatewaytest.Offer(others[i].UID, "small", 10)) // which its reader is waiting for already
		}
		alice := s.stalled("alice", link, 300_000)
		time.Sleep(2 * stallMoment)
		for i := 0; s.counted("faults", string(telemetry.ReasonAgentSlow)) == 0; i++ {
			link.Push(gatewaytest.Offer(alice.UID, fmt.Sprint(i), 300_000))
		}
		s.wantFault(telemetry.ReasonMemoryFull, 0)
		exceeded := false
		for i := 0; i < len(others) && !exceeded; i++ {
			link.Push(gatewaytest.Offer(others[i].UID, "large", 300_000))
			synctest.Wait()
			exceeded = s.memory.Excess() > 0
		}
		require.True(t, exceeded, "there is enough for all")
		time.Sleep(5 * shedPause)
		s.wantFault(telemetry.ReasonMemoryFull, 0)
		require.Empty(t, s.logged(zap.WarnLevel, "does not read what the server sends"))
		time.Sleep(5 * time.Second)
		s.wantConnections(len(others))
	}, connections(1), tight)
}

// TestLargeCapabilities takes no more of a server's list of capabilities than can be told to all.
func TestLargeCapabilities(t *testing.T) {
	list := func(size int) []string {
		var names []string
		for i := range size / 100 {
			names = append(names, fmt.Sprintf("%096d", i)) // and two bytes before each
		}
		return names
	}
	for name, test := range map[string]struct {
		names []string
		told  bool
	}{
		"of 60 KiB":  {list(60 << 10), true},
		"of 70 KiB":  {list(70 << 10), false},
		"of 900 KiB": {list(900 << 10), false},
	} {
		t.Run(name, func(t *testing.T) {
			play(t, func(t *testing.T, s *stage) {
				alice, bob := s.introduce("alice"), s.introduce("bob")
				link := s.server.WantLinks(1)[0]
				stating := &protobufs.ServerToAgent{InstanceUid: bob.UID, CustomCapabilities: &protobufs.CustomCapabilities{Capabilities: test.names}}
				link.Send(stating)
				bob.WantMessage(stating) // what is for him is his
				link.Send(reply(alice.UID))
				alice.WantMessage(reply(alice.UID))
				if test.told {
					alice.WantCapabilities(test.names...)
					s.wantFaults(nil)
					return
				}
				synctest.Wait()
				alice.WantNothing()
				s.wantFaults(map[telemetry.Reason]int{telemetry.ReasonServerTooLarge: 1})
				require.Len(t, s.logged(zap.WarnLevel, "capabilities"), 1)
			}, connections(1), tight)
		})
	}

	t.Run("told to 300 agents that do not read", func(t *testing.T) {
		play(t, func(t *testing.T, s *stage) {
			link := s.server.WantLinks(1)[0]
			link.Push(gatewaytest.Frame(&protobufs.ServerToAgent{CustomCapabilities: &protobufs.CustomCapabilities{Capabilities: list(60 << 10)}}))
			for i := range 300 {
				a := s.introduce(fmt.Sprint("agent ", i))
				a.StopReading()
				link.Send(reply(a.UID))
			}
			synctest.Wait()
			require.LessOrEqual(t, s.memory.Down.Held(), int64(s.cfg.MaxBufferedSize))
		}, connections(1), tight)
	})
}

// TestWaitingRequestsAreInTheBudget turns away those who come from where many wait with large requests;
// not those from elsewhere.
func TestWaitingRequestsAreInTheBudget(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		s.server.OnConnect(func(q *gatewaytest.Question) {
			if !strings.HasPrefix(q.Who(), "waits") {
				q.Accept()
			}
		})
		s.comeFrom("192.0.2.66")
		var knocks []<-chan answer
		for i := range 200 {
			knocks = append(knocks, s.knock(fmt.Sprint("waits ", i), "X-Large", strings.Repeat("y", 15<<10)))
		}
		synctest.Wait()
		away := int(s.counted("admissions", string(telemetry.OutcomeTooMany)))
		require.Greater(t, away, 50)
		require.Less(t, away, 190)
		require.GreaterOrEqual(t, s.memory.Requests.Held(), int64(200-away)*15<<10)
		require.LessOrEqual(t, s.memory.Requests.Held(), int64(s.cfg.MaxBufferedSize/8))
		require.NotEmpty(t, s.logged(zap.WarnLevel, "memory for requests is used up"))
		for i := range 10 {
			s.comeFrom(fmt.Sprintf("192.0.2.%d", i))
			begin := time.Now()
			s.introduce(fmt.Sprint("honest ", i), "X-Large", strings.Repeat("y", 10<<10))
			require.LessOrEqual(t, time.Since(begin), 20*time.Millisecond)
		}
		for _, knock := range knocks {
			require.Equal(t, http.StatusServiceUnavailable, (<-knock).StatusCode)
		}
		require.Zero(t, s.memory.Requests.Held())
	}, connections(1), tight)
}

// TestUIDsOfGatewaysAreInTheBudget takes no more instance UIDs of a gateway than there is memory for, and
// leaves some for others.
func TestUIDsOfGatewaysAreInTheBudget(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		gateway := s.below("gateway", 0)
		for i := range 30_000 {
			gateway.Send(gatewaytest.Status(gatewaytest.UID(fmt.Sprint("agent ", i)), 1))
		}
		synctest.Wait()
		require.Greater(t, s.counted("faults", string(telemetry.ReasonMemoryFull)), int64(1000))
		require.LessOrEqual(t, s.memory.Kept.Held(), int64(s.cfg.MaxBufferedSize/4))
		gateway.WantConnected()
		first := gatewaytest.UID("agent 0")
		s.server.Next(first)
		gateway.Send(gatewaytest.Status(first, 2))
		s.server.WantFrame(first, gatewaytest.Status(first, 2))
		s.introduce("alice")
	}, connections(1), tight)
}
