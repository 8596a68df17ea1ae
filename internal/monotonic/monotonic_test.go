package monotonic_test

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/opampgateway/opampgateway/internal/monotonic"
)

func TestClock(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		start := monotonic.Now()
		require.NotZero(t, start)
		in := monotonic.Time(start + int64(time.Minute))
		require.WithinDuration(t, time.Now().Add(time.Minute), in, 10)
		time.Sleep(time.Hour)
		require.InDelta(t, time.Hour, monotonic.Since(start), 10)
	})
}
