package opampgateway

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/opampgateway/opampgateway/internal/gatewaytest"
)

// TestWhatWaitedOfAnAgentThatCameAgain has an agent come again on another connection while what it said on the one
// before waits for a link that has come to a halt: all of it reaches the server before what the agent says now.
func TestWhatWaitedOfAnAgentThatCameAgain(t *testing.T) {
	const size, n = 2000, 30 // more than the network holds, and no more than may wait
	for name, test := range map[string]struct {
		leave    func(*gatewaytest.Agent)
		goodbyes int
	}{
		"its connection has ended": {leave: (*gatewaytest.Agent).Reset},
		"it has said goodbye":      {leave: (*gatewaytest.Agent).SayGoodbye, goodbyes: 1},
		"its goodbye waits, too":   {leave: func(a *gatewaytest.Agent) { a.Send(gatewaytest.Goodbye(a.UID)) }, goodbyes: 1},
	} {
		t.Run(name, func(t *testing.T) {
			play(t, func(t *testing.T, s *stage) {
				before := s.introduce("alice")
				halted := s.linkOf(before)
				elsewhere := s.introduce("bob")
				s.introduce("cathy") // so that alice comes to the other link the next time
				elsewhere.SayGoodbye()
				halted.StopReading()
				for sequence := 1; sequence <= n; sequence++ {
					before.Send(gatewaytest.Report(before.UID, sequence, size))
				}
				synctest.Wait()
				test.leave(before)
				synctest.Wait()

				again := s.connect("alice")
				again.Send(gatewaytest.Report(again.UID, 1000, size))
				synctest.Wait()
				halted.ReadOn()
				time.Sleep(time.Second)
				synctest.Wait()
				taken, waited, last, goodbyes := 0, 0, uint64(0), 0
				for _, r := range s.server.Received(again.UID)[1:] { // without the introduction
					switch {
					case r.Link == halted: // with what the network held
						taken++
					case r.Message.AgentDisconnect != nil:
						require.Less(t, last, uint64(1000), "not behind what it said when it was back")
						goodbyes++
					default:
						waited++
						require.Greater(t, r.Message.SequenceNum, last)
						last = r.Message.SequenceNum
					}
				}
				require.EqualValues(t, 1000, last)
				require.Equal(t, n+2, taken+waited, "each once")
				require.Greater(t, waited, 5)
				require.Equal(t, test.goodbyes, goodbyes)
				s.wantFaults(nil)
			}, connections(2))
		})
	}
}
