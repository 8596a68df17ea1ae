package opampgateway

import (
	"context"
	"time"

	"github.com/opampgateway/opampgateway/internal/peer"
)

// sweep looks after all connections of one side until ctx ends, with look. No connection has a
// timer of its own. How often depends on keepAlive, which may change.
func sweep(ctx context.Context, keepAlive func() KeepAliveConfig, most time.Duration, look func(limits peer.Limits)) {
	for {
		k := keepAlive()
		// A ping needs time to be answered between two sweeps.
		interval := min(most, k.Interval, k.Timeout-k.Interval)
		if sleep(ctx, interval) != nil {
			return
		}
		sweeps := func(d time.Duration) int { return int((d + interval - 1) / interval) }
		look(peer.Limits{Ping: sweeps(k.Interval), Close: sweeps(k.Timeout)})
	}
}

// sleep waits for d; it returns the error of ctx if that ends first.
func sleep(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
