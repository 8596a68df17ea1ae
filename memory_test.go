package opampgateway

import (
	"encoding/binary"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/zap"

	"github.com/opampgateway/opampgateway/internal/gatewaytest"
	"github.com/opampgateway/opampgateway/internal/telemetry"
)

// tight is the least memory with which three links can carry messages of at most 1 MiB.
func tight(cfg *Config) {
	cfg.MaxBufferedSize, cfg.MaxMessageSize = 8<<20, 1<<20
}

// frameOf is a WebSocket frame with a message of an agent, masked with zeros.
func frameOf(message []byte) []byte {
	return append(append(binary.BigEndian.AppendUint64([]byte{0x82, 0xff}, uint64(len(message))), 0, 0, 0, 0), message...)
}

// TestStalledAgents has agents read no more while the server pushes more to them than there
// is memory for: those with most waiting have to go, and nobody else notices.
func TestStalledAgents(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		link := s.server.WantLinks(1)[0]
		bob := s.introduce("bob")
		var stalled []*gatewaytest.Agent
		for i := range 30 {
			a := s.introduce(fmt.Sprint("stalled", i))
			a.StopReading()
			link.Push(gatewaytest.Offer(a.UID, "small", 10)) // which its reader is waiting for already
			stalled = append(stalled, a)
		}
		for i, a := range stalled {
			begin := time.Now()
			link.Push(gatewaytest.Offer(a.UID, "large", 400_000)) // 12 MB in all
			link.Push(gatewaytest.Offer(bob.UID, fmt.Sprint(i), 400_000))
			bob.WantFrame(gatewaytest.Offer(bob.UID, fmt.Sprint(i), 400_000))
			require.LessOrEqual(t, s.memory.Down.Held(), int64(6<<20+1<<20), "and what is just being read")
			require.Zero(t, time.Since(begin), "somebody waited for them")
			time.Sleep(2 * stallMoment)
		}
		synctest.Wait()
		require.LessOrEqual(t, s.memory.Down.Held(), int64(6<<20))
		closed := int(s.counted("faults", string(telemetry.ReasonMemoryFull)))
		require.Greater(t, closed, 5)
		require.Less(t, closed, 25)
		s.wantConnections(31 - closed)
		require.NotEmpty(t, s.logged(zap.WarnLevel, "memory for messages is used up"))
		s.connect("cathy")
		s.server.WantFrame(bob.UID, bob.Say(1))
		bob.WantConnected()
	}, connections(1), tight)
}

// TestHalfMessages has agents stop in the middle of large messages, which take more memory than
// there is: others get theirs through, small and large.
func TestHalfMessages(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		const size = 900_000
		bob, cathy := s.introduce("bob"), s.introduce("cathy")
		for i := range 50 {
			a := s.introduce(fmt.Sprint("half", i))
			frame := frameOf(gatewaytest.Report(a.UID, 1, size))
			go a.SendRaw(frame[:len(frame)/2])
		}
		synctest.Wait()
		require.LessOrEqual(t, s.memory.Reading(), int64(6<<20))
		for i := 1; i < 10; i++ {
			s.server.WantFrame(bob.UID, bob.Say(i))
			report := gatewaytest.Report(cathy.UID, i, 20<<10)
			cathy.Send(report)
			s.server.WantFrame(cathy.UID, report)
		}
		require.NotEmpty(t, s.logged(zap.WarnLevel, "memory for messages is used up"))

		// One after the other gets its turn, makes nothing of it, and has to go.
		report := gatewaytest.Report(bob.UID, 10, size)
		go bob.Send(report)
		time.Sleep(10 * time.Minute)
		s.server.WantFrame(bob.UID, report)
		bob.WantConnected()
		cathy.WantConnected()
	}, connections(1), tight)
}

// TestManyLarge has many agents send large messages at once, for which there is no memory at once.
func TestManyLarge(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		const size = 900_000
		agents := s.crowd(30)
		for _, a := range agents {
			go a.Send(gatewaytest.Report(a.UID, 1, size))
		}
		synctest.Wait()
		for _, a := range agents {
			s.server.WantFrame(a.UID, gatewaytest.Report(a.UID, 1, size))
			a.WantConnected()
		}
	}, tight)
}

// TestLinkLostWithFullMemory has the server take nothing and then break off, while agents' messages
// take all the memory there is.
func TestLinkLostWithFullMemory(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		agents := s.crowd(30)
		for _, link := range s.server.WantLinks(3) {
			link.StopReading()
		}
		for _, a := range agents {
			go func() {
				for sequence := 1; sequence <= 4; sequence++ {
					a.Send(gatewaytest.Report(a.UID, sequence, 500_000))
				}
			}()
		}
		synctest.Wait()
		require.LessOrEqual(t, s.memory.Reading()+s.memory.Up.Held(), int64(s.cfg.MaxBufferedSize))
		for _, link := range s.server.Links() {
			link.Reset()
		}
		s.server.WantLinks(3)
		for _, a := range agents {
			for {
				if received := s.server.Next(a.UID); received.Message.SequenceNum == 4 {
					break
				}
			}
			a.WantConnected()
		}
	}, tight)
}

// TestDeadAgentThatWaits has an agent vanish while what it said last waits for the server to read.
func TestDeadAgentThatWaits(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		alice := s.introduce("alice")
		link := s.server.WantLinks(1)[0]
		link.StopReading()
		go func() {
			for sequence := range 200 {
				alice.SendRaw(frameOf(gatewaytest.Report(alice.UID, sequence, 100_000)))
			}
		}()
		synctest.Wait()
		s.wantConnections(1)
		alice.Reset()
		time.Sleep(20 * time.Second)
		s.wantConnections(0)
		s.wantFault(telemetry.ReasonFrameLost, 1)
		link.ReadOn()
	}, connections(1), func(cfg *Config) {
		cfg.Server.KeepAlive = KeepAliveConfig{Interval: time.Minute, Timeout: 2 * time.Minute}
	})
}
