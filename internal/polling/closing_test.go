package polling

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
)

// TestClosingTakesNothing takes nothing more of an agent whose session is about to end, though its reader still reads: what
// it says then might be thrown away, and the agent be told that it was taken.
func TestClosingTakesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for range 20 { // by chance it may be refused anyway
			s := NewSession[int](0)
			read := reading(s)
			polled := make(chan error)
			go func() {
				_, err := s.Poll(t.Context(), NewMessage([]byte("first"), nil), time.Second, time.Minute)
				polled <- err
			}()
			synctest.Wait()
			s.Hurry()
			_, err := s.Poll(t.Context(), NewMessage([]byte("late"), nil), time.Second, time.Minute)
			require.ErrorIs(t, err, ErrEnded)
			require.NoError(t, <-polled)
			require.Equal(t, []string{"first"}, read())
		}
	})
}
