package swaplog_test

import (
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"github.com/opampgateway/opampgateway/internal/swaplog"
)

// observed returns a logger of one component, and what it writes.
func observed(component string, level zapcore.Level) (*zap.Logger, *observer.ObservedLogs) {
	core, logs := observer.New(level)
	return zap.New(core).With(zap.String("component", component)), logs
}

// Loggers made before a swap speak as those of the new component: with its fields and their own, at its level.
func TestSwap(t *testing.T) {
	first, early := observed("first", zap.DebugLevel)
	second, late := observed("second", zap.InfoLevel)
	target, log := swaplog.New(first)
	link := log.With(zap.String("server", "localhost")).With(zap.Int("link", 2))
	other := log.With(zap.String("server", "elsewhere"))

	link.Debug("before")
	require.Equal(t, map[string]any{"component": "first", "server": "localhost", "link": int64(2)}, early.TakeAll()[0].ContextMap())

	target.Swap(second)
	link.Debug("not at this level")
	link.Info("after", zap.Bool("up", true))
	other.Info("after")
	log.Info("after")
	require.Empty(t, early.All(), "nothing goes to the first any more")
	said := late.TakeAll()
	require.Len(t, said, 3)
	require.Equal(t, map[string]any{"component": "second", "server": "localhost", "link": int64(2), "up": true}, said[0].ContextMap())
	require.Equal(t, map[string]any{"component": "second", "server": "elsewhere"}, said[1].ContextMap())
	require.Equal(t, map[string]any{"component": "second"}, said[2].ContextMap())
	require.NoError(t, log.Sync())
}

// Sampling on either side holds: that of the gateway over a swap, that of a component for itself.
func TestSampling(t *testing.T) {
	first, early := observed("first", zap.DebugLevel)
	second, late := observed("second", zap.DebugLevel)
	few := func(n int) zap.Option {
		return zap.WrapCore(func(core zapcore.Core) zapcore.Core { return zapcore.NewSamplerWithOptions(core, time.Hour, n, 0) })
	}
	target, log := swaplog.New(first)
	events := log.WithOptions(few(3)).With(zap.Int("link", 1))
	events.Info("flood")
	events.Info("flood")
	target.Swap(second.WithOptions(few(5)))
	for range 10 {
		events.Info("flood")
		log.With(zap.Int("link", 2)).Info("another flood")
	}
	require.Equal(t, 2, early.Len())
	require.Equal(t, 1, late.FilterMessage("flood").Len())
	require.Equal(t, 5, late.FilterMessage("another flood").Len())
}

func TestManyAtOnce(t *testing.T) {
	first, early := observed("first", zap.DebugLevel)
	second, late := observed("second", zap.DebugLevel)
	target, log := swaplog.New(first)
	var speaking sync.WaitGroup
	for range 4 {
		mine := log.With(zap.String("server", "localhost"))
		speaking.Go(func() {
			for i := range 200 {
				mine.Info("line")
				if i%50 == 0 {
					target.Swap(second)
				}
			}
		})
	}
	speaking.Wait()
	require.Equal(t, 800, early.Len()+late.Len())
	require.Greater(t, late.Len(), 700)
}

// What is not written costs nothing.
func TestDisabledLevelDoesNotAllocate(t *testing.T) {
	first, _ := observed("first", zap.ErrorLevel)
	_, log := swaplog.New(first)
	log = log.With(zap.String("server", "localhost"))
	require.Zero(t, testing.AllocsPerRun(100, func() { log.Debug("line") }))
}
