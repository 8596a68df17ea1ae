package window

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// at is a time of the test's own clock.
func at(d time.Duration) int64 { return int64(time.Hour + d) }

func TestFirstPingGoesBeforeAnythingElse(t *testing.T) {
	w := New(at(0))
	require.True(t, w.PingDue(at(0)))
	require.LessOrEqual(t, w.Next(), at(0))
	require.False(t, w.Answers())
	number := w.Ping(at(0))
	require.False(t, w.PingDue(at(time.Second)), "the first is on its way, and nothing was sent")

	read, took, ok := w.Pong(number, at(5*time.Millisecond), false)
	require.True(t, ok)
	require.Zero(t, read)
	require.Equal(t, 5*time.Millisecond, took)
	require.True(t, w.Answers())
	require.Equal(t, never, w.Next(), "an idle link is not pinged")

	_, _, ok = w.Pong(number, at(6*time.Millisecond), false)
	require.False(t, ok, "twice")
	_, _, ok = w.Pong(number+1, at(6*time.Millisecond), false)
	require.False(t, ok, "never sent")
}
