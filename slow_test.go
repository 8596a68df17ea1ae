package opampgateway

import (
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/opampgateway/opampgateway/internal/gatewaytest"
	"github.com/opampgateway/opampgateway/internal/telemetry"
)

// TestSlowAgent has an agent read no more while the server pushes and pushes.
func TestSlowAgent(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		alice, bob := s.introduce("alice"), s.introduce("bob")
		link := s.server.WantLinks(1)[0]
		alice.StopReading()
		begin := time.Now()
		for i := range 60 {
			link.Push(gatewaytest.Offer(alice.UID, fmt.Sprint(i), 100_000)) // never waits
			link.Push(gatewaytest.Offer(bob.UID, fmt.Sprint(i), 100))
			bob.WantFrame(gatewaytest.Offer(bob.UID, fmt.Sprint(i), 100))
		}
		require.Zero(t, time.Since(begin), "somebody waited for alice")
		s.wantFault(telemetry.ReasonAgentSlow, 1)
		time.Sleep(3 * time.Second)
		s.wantConnections(1)
		s.server.WantGoodbye(alice.UID)
		s.connect("cathy")
		s.server.WantFrame(bob.UID, bob.Say(1))
		bob.WantConnected()
	}, connections(1))

	t.Run("that reads again in time hears why", func(t *testing.T) {
		play(t, func(t *testing.T, s *stage) {
			alice := s.introduce("alice")
			link := s.server.WantLinks(1)[0]
			alice.StopReading()
			for i := range 60 {
				link.Push(gatewaytest.Offer(alice.UID, fmt.Sprint(i), 100_000))
			}
			synctest.Wait()
			alice.ReadOn()
			alice.WantClosed(1013)
			for i := range len(alice.Inbox()) { // what fit arrives, without a gap
				alice.WantFrame(gatewaytest.Offer(alice.UID, fmt.Sprint(i), 100_000))
			}
			s.wantFault(telemetry.ReasonAgentSlow, 1)
		}, connections(1))
	})

	t.Run("that makes progress, with the shortest time to write", func(t *testing.T) {
		play(t, func(t *testing.T, s *stage) {
			s.net.Throttle(20 << 10)
			alice := s.introduce("alice")
			offer := gatewaytest.Offer(alice.UID, "x", 500_000)
			s.server.WantLinks(1)[0].Push(offer)
			for len(alice.Inbox()) == 0 {
				alice.WantConnected()
				time.Sleep(time.Second)
			}
			alice.WantFrame(offer)
			s.wantFaults(nil)
		}, connections(1), func(cfg *Config) { cfg.Agents.WriteTimeout = time.Second })
	})

	t.Run("that offends after it was closed", func(t *testing.T) {
		play(t, func(t *testing.T, s *stage) {
			alice := s.introduce("alice")
			link := s.server.WantLinks(1)[0]
			alice.StopReading()
			for i := range 60 {
				link.Push(gatewaytest.Offer(alice.UID, fmt.Sprint(i), 100_000))
			}
			s.wantFault(telemetry.ReasonAgentSlow, 1)
			for range maxBadInRow {
				alice.Send([]byte("garbage"))
			}
			time.Sleep(3 * time.Second) // no longer than if it had not
			s.wantConnections(0)
		}, connections(1))
	})

	t.Run("that pauses for a moment loses nothing", func(t *testing.T) {
		play(t, func(t *testing.T, s *stage) {
			alice := s.introduce("alice")
			link := s.server.WantLinks(1)[0]
			alice.StopReading()
			const size = 64 << 10
			for i := range 4 << 20 / size {
				link.Push(gatewaytest.Offer(alice.UID, fmt.Sprint(i), size))
			}
			time.Sleep(3 * time.Second)
			alice.ReadOn()
			for i := range 4 << 20 / size {
				alice.WantFrame(gatewaytest.Offer(alice.UID, fmt.Sprint(i), size))
			}
			s.wantFaults(nil)
		}, connections(1))
	})

	t.Run("whose connection takes nothing", func(t *testing.T) {
		play(t, func(t *testing.T, s *stage) {
			alice := s.introduce("alice")
			link := s.server.WantLinks(1)[0]
			alice.StopReading()
			for range 3 {
				link.Push(gatewaytest.Offer(alice.UID, "x", gatewaytest.BufferSize))
			}
			time.Sleep(29 * time.Second)
			s.wantConnections(1)
			time.Sleep(7 * time.Second) // what moved first may have done so at any time in the first part
			s.wantConnections(0)
			s.wantFault(telemetry.ReasonAgentSlow, 1)
			require.NotZero(t, s.counted("faults", string(telemetry.ReasonServerFrameLost)), "what was not written")
			s.server.WantGoodbye(alice.UID)
		}, connections(1), func(cfg *Config) {
			cfg.Agents.KeepAlive = KeepAliveConfig{Interval: 10 * time.Minute, Timeout: 20 * time.Minute}
		})
	})
}

// TestFullLink has agents say more than the server reads: they wait, and nothing is lost.
func TestFullLink(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		agents := s.crowd(20)
		link := s.server.WantLinks(1)[0]
		link.StopReading()
		const n, size = 20, 100_000 // 40 MB in all, of which the gateway holds 8
		for _, a := range agents {
			go func() {
				for sequence := 1; sequence <= n; sequence++ {
					a.Send(gatewaytest.Report(a.UID, sequence, size))
				}
			}()
		}
		synctest.Wait()
		require.Less(t, s.counted("messages", "upstream"), int64(40))
		time.Sleep(10 * time.Second)
		link.ReadOn()
		for _, a := range agents {
			for sequence := 1; sequence <= n; sequence++ {
				s.server.WantFrame(a.UID, gatewaytest.Report(a.UID, sequence, size))
			}
		}
		s.wantFaults(nil)
	}, connections(1))
}
