package opampgateway

import (
	"context"
	"time"

	"github.com/opampgateway/opampgateway/internal/peer"
)

// sweep looks after all connections of one side until ctx ends, with look. No connection has a
// timer of its own.
func sweep(ctx context.Context, k KeepAliveConfig, interval time.Duration, look func(limits peer.Limits)) {
	// A ping needs time to be answered between two sweeps.
	interval = min(interval, k.Interval, k.Timeout-k.Interval)
	sweeps := func(d time.Duration) int { return int((d + interval - 1) / interval) }
	limits := peer.Limits{Ping: sweeps(k.Interval), Close: sweeps(k.Timeout)}
	for sleep(ctx, interval) == nil {
		look(limits)
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
