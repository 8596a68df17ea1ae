package opampgateway

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/gorilla/websocket"
	"github.com/stretchr/testify/require"

	"github.com/opampgateway/opampgateway/internal/gatewaytest"
	"github.com/opampgateway/opampgateway/internal/status"
)

// An operator sees who is suspected of having links ended, where that agent is, and when it is over.
func TestShownSuspects(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		const poison = 1000
		s.server.OnMessage(func(r *gatewaytest.Received) {
			if len(r.Frame) > poison {
				r.Link.Close(websocket.CloseInvalidFramePayloadData)
			}
		})
		alice := s.introduce("alice", "Agent-ID", "a-1", "User-Agent", "agent/1")
		s.introduce("bob")
		require.Equal(t, []status.Suspect{}, s.shown().Suspects, "an empty list, not null")

		began := time.Now()
		alice.Send(gatewaytest.Report(alice.UID, 1, 2*poison))
		synctest.Wait()
		require.Len(t, s.shown().Suspects, 1)
		suspect := s.shown().Suspects[0]
		require.Equal(t, status.SuspicionOnTrial, suspect.State)
		require.Equal(t, writtenUID(alice), suspect.UID)
		require.Equal(t, alice.LocalAddr(), suspect.Address)
		require.Equal(t, "a-1", suspect.AgentID)
		require.Equal(t, "agent/1", suspect.UserAgent)
		require.WithinDuration(t, began, suspect.Since, time.Second)
		require.WithinDuration(t, suspect.Since.Add(time.Minute), suspect.Until, time.Second)

		time.Sleep(5 * time.Second) // alice has another link
		alice.Send(gatewaytest.Report(alice.UID, 2, 2*poison))
		time.Sleep(time.Second)
		suspect = s.shown().Suspects[0]
		require.Equal(t, status.SuspicionTurnedDown, suspect.State)
		require.WithinDuration(t, suspect.Since.Add(10*time.Minute), suspect.Until, time.Second)

		alice.Close(websocket.CloseNormalClosure)
		_, _ = alice.WantEnd(time.Second)
		suspect = s.shown().Suspects[0]
		require.Equal(t, writtenUID(alice), suspect.UID, "it is turned down when it comes back, too")
		require.Empty(t, suspect.Address)
		time.Sleep(21 * time.Minute)
		require.Empty(t, s.shown().Suspects)
	}, withPage)
}
