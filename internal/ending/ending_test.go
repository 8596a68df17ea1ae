package ending_test

import (
	"context"
	"testing"
	"testing/synctest"
	"time"
	"unicode/utf8"

	"github.com/stretchr/testify/require"

	"github.com/opampgateway/opampgateway/internal/ending"
	"github.com/opampgateway/opampgateway/internal/telemetry"
)

func TestOffender(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var s ending.State
		start := time.Now()
		_, offends := s.Due()
		require.False(t, offends)
		require.True(t, s.Offend(ending.TooLarge))
		require.False(t, s.Offend(ending.ForeignConnect), "once is enough")
		require.False(t, s.Closing())

		waited := make(chan time.Duration, 1)
		go func() { s.AwaitClosing(t.Context()); waited <- time.Since(start) }()
		cause, offends := s.Due()
		require.Nil(t, cause, "not yet")
		require.True(t, offends)
		for cause == nil {
			time.Sleep(100 * time.Millisecond)
			cause, _ = s.Due()
		}
		require.Same(t, ending.TooLarge, cause)
		require.GreaterOrEqual(t, time.Since(start), 5*time.Second)
		require.LessOrEqual(t, time.Since(start), 10*time.Second)

		cause, isNew := s.Close(ending.Shutdown)
		require.True(t, isNew)
		require.Same(t, ending.TooLarge, cause, "what it did first")
		require.Equal(t, time.Since(start), <-waited, "its reader goes on when it is closed")
		_, offends = s.Due()
		require.False(t, offends)
		require.Same(t, ending.TooLarge, s.End())
	})
}

func TestClosedOnce(t *testing.T) {
	var s ending.State
	_, isNew := s.Close(ending.Slow)
	require.True(t, isNew)
	_, isNew = s.Close(ending.Silent)
	require.False(t, isNew)
	require.False(t, s.Offend(ending.TooLarge), "what is ending already stays as it is")
	s.AwaitClosing(t.Context()) // does not wait
	require.False(t, s.Discards())
	s.Discard()
	require.True(t, s.Discards())
	require.False(t, s.Ended())
	require.Same(t, ending.Slow, s.End())
	require.True(t, s.Ended())
	s.Discard()
	require.True(t, s.Ended(), "it moves one way only")
	_, isNew = s.Close(ending.Silent)
	require.False(t, isNew)
}

func TestEndOfItsOwn(t *testing.T) {
	var s ending.State
	require.Nil(t, s.End())
	require.True(t, s.Closing())
}

func TestOffenderWaitsNoLongerThanTheGateway(t *testing.T) {
	var s ending.State
	s.Offend(ending.BadMessages)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	s.AwaitClosing(ctx)
}

// A reader that waits for others is given up only a while after its connection was closed.
func TestPaused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var s ending.State
		require.False(t, s.Paused(time.Second))
		ctx, over := s.Pause(t.Context())
		time.Sleep(time.Hour)
		require.True(t, s.Paused(time.Second))
		require.NoError(t, ctx.Err())
		s.Close(ending.Silent)
		require.True(t, s.Paused(time.Second))
		require.NoError(t, ctx.Err(), "its last words may still go")
		time.Sleep(time.Second + time.Millisecond)
		require.True(t, s.Paused(time.Second))
		require.Error(t, ctx.Err())
		over()
		require.False(t, s.Paused(time.Second))
	})
}

func TestCauses(t *testing.T) {
	known := map[telemetry.Reason]bool{}
	for _, r := range telemetry.Reasons {
		known[r.Reason] = true
	}
	for _, c := range ending.Causes {
		require.True(t, c.Code == 0 || c.Code == 1001 || c.Code == 1002 || c.Code >= 1007 && c.Code <= 1013, c.Text)
		require.LessOrEqual(t, len(c.Text), 123, "what fits into a close frame")
		require.True(t, utf8.ValidString(c.Text))
		require.Equal(t, c.Reason != "", known[c.Reason], c.Text)
		require.False(t, c.Counts && c.Reason == "", c.Text)
	}
}
