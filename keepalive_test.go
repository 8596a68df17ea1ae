package opampgateway

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/gorilla/websocket"
	"github.com/stretchr/testify/require"
	"go.uber.org/zap"

	"github.com/opampgateway/opampgateway/internal/gatewaytest"
	"github.com/opampgateway/opampgateway/internal/telemetry"
)

// TestSilentLink notices that nothing comes from the server any more.
func TestSilentLink(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		alice := s.introduce("alice")
		link := s.linkOf(alice)
		for wait := range 6 { // whenever in the sweep's interval
			time.Sleep(time.Duration(wait) * time.Second)
			begin, before := time.Now(), len(s.server.Questions())
			link.BlackHole()
			time.Sleep(9 * time.Second)
			require.Len(t, s.server.Questions(), before, "too early to give it up")
			alice.Say(1) // lost, or still in the gateway
			time.Sleep(16 * time.Second)
			synctest.Wait()
			require.Len(t, s.server.Questions(), before+1)
			require.LessOrEqual(t, s.server.Questions()[before].At.Sub(begin), 25*time.Second)
			alice.WantFullStateRequest()
			time.Sleep(2 * time.Minute) // until alice was asked once more
			alice.WantFullStateRequest()
			link = s.linkOf(alice)
			s.wantFault(telemetry.ReasonLinkSilent, wait+1)
		}
		require.NotEmpty(t, s.logged(zap.WarnLevel, "no sign of life from the server"))
		alice.WantConnected()
	})
}

// TestServerDoesNotRead has a server that takes nothing any more.
func TestServerDoesNotRead(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		alice, bob := s.introduce("alice"), s.introduce("bob")
		link := s.server.WantLinks(1)[0]
		link.StopReading()
		go func() {
			for sequence := range 300 {
				alice.Send(gatewaytest.Report(alice.UID, sequence, 100_000))
			}
		}()
		synctest.Wait()
		l := s.pool.links()[0]
		require.LessOrEqual(t, len(s.server.Received(alice.UID)), 5)
		s.pool.mu.Lock()
		require.Len(t, l.agents, 2)
		s.pool.mu.Unlock()
		time.Sleep(15 * time.Second)
		s.wantFaults(nil)
		time.Sleep(10 * time.Second)
		s.wantFault(telemetry.ReasonLinkSilent, 1)
		link.ReadOn()
		link.WantEnd()
		bob.WantFullStateRequest()
		s.server.WantLinks(1)
		s.server.WantFrame(bob.UID, bob.Say(1))
		time.Sleep(10 * time.Second)
		synctest.Wait()
		received := s.server.Received(alice.UID)
		require.EqualValues(t, 299, received[len(received)-1].Message.SequenceNum)
		alice.WantConnected()
	}, connections(1))
}

// TestSilentAgent notices that nothing comes from an agent any more.
func TestSilentAgent(t *testing.T) {
	for _, test := range []struct {
		name               string
		change             func(*Config)
		earliest, atLatest time.Duration
	}{
		{"by default", func(*Config) {}, 55 * time.Second, 75 * time.Second},
		{"sooner", func(cfg *Config) {
			cfg.Agents.KeepAlive = KeepAliveConfig{Interval: 2 * time.Second, Timeout: 6 * time.Second}
		}, 4 * time.Second, 12 * time.Second},
	} {
		t.Run(test.name, func(t *testing.T) {
			play(t, func(t *testing.T, s *stage) {
				alice, bob := s.introduce("alice"), s.introduce("bob")
				time.Sleep(7 * time.Second)
				begin := time.Now()
				alice.BlackHole()
				for {
					synctest.Wait()
					if s.running.server.count() == 1 {
						break
					}
					time.Sleep(100 * time.Millisecond)
				}
				require.GreaterOrEqual(t, time.Since(begin), test.earliest)
				require.LessOrEqual(t, time.Since(begin), test.atLatest)
				s.wantFaults(map[telemetry.Reason]int{telemetry.ReasonAgentSilent: 1})
				s.server.WantNothing(alice.UID) // it may be elsewhere already
				s.server.WantLinks(3)[0].Push(gatewaytest.Offer(alice.UID, "x", 10))
				s.wantFault(telemetry.ReasonServerUnknownUID, 1)
				bob.WantConnected()
			}, test.change)
		})
	}
}

// TestQuietAgent keeps an agent that says nothing, but is there; not one that has never said anything.
func TestQuietAgent(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		alice := s.introduce("alice")
		mute, gateway := s.connect("mute"), s.connect("gateway", gatewaytest.ConnectionIDHeader, "upstream-0")
		begin := time.Now()
		time.Sleep(time.Minute - time.Second)
		mute.WantConnected()
		_, err := mute.WantEnd(agentSweepInterval + time.Second)
		require.True(t, websocket.IsCloseError(err, websocket.ClosePolicyViolation), err)
		time.Sleep(time.Hour - time.Since(begin))
		alice.WantConnected()
		gateway.WantConnected() // which may have no agents
		alice.WantNothing()
		s.wantReachable(alice)
		s.wantFaults(map[telemetry.Reason]int{telemetry.ReasonAgentMute: 1})
		require.Empty(t, s.logged(zap.WarnLevel, ""))
	})
}

// TestSlowLine keeps an agent that takes long to say, or to hear, something large.
func TestSlowLine(t *testing.T) {
	const size, bytesPerSecond = 2 << 20, 8 << 10 // for more than four minutes
	play(t, func(t *testing.T, s *stage) {
		s.net.Throttle(bytesPerSecond)
		alice, bob := s.introduce("alice"), s.introduce("bob")
		s.net.Throttle(0)
		report, offer := gatewaytest.Report(alice.UID, 1, size), gatewaytest.Offer(bob.UID, "x", size)
		link := s.linkOf(bob)
		begin := time.Now()
		go alice.Send(report)
		link.Push(offer)
		time.Sleep(4 * time.Minute)
		synctest.Wait()
		s.server.WantNothing(alice.UID)
		bob.WantNothing()
		time.Sleep(time.Minute)
		s.server.WantFrame(alice.UID, report)
		bob.WantFrame(offer)
		require.Greater(t, time.Since(begin), 4*time.Minute)
		s.wantFaults(nil)
	})
}

// TestPausedAgent keeps an agent that cannot be heard because we do not listen.
func TestPausedAgent(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		alice := s.introduce("alice")
		s.server.Stop()
		synctest.Wait()
		alice.Say(1) // waits for a link, and whatever comes after it waits, too
		time.Sleep(8 * time.Minute)
		alice.WantConnected()
		s.server.Start()
		s.server.WantFrame(alice.UID, gatewaytest.Status(alice.UID, 1))
		s.wantFaults(map[telemetry.Reason]int{telemetry.ReasonLinkLost: 3})
	}, func(cfg *Config) { cfg.Server.GracePeriod = 10 * time.Minute })
}
