// Package swaplog has loggers that outlive what they write to. What lives longer than the component that has
// started it speaks through whatever component there is now.
package swaplog

import (
	"slices"
	"sync/atomic"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

// Target is where loggers write; it can be changed at any time, from any goroutine.
type Target struct {
	core atomic.Pointer[zapcore.Core]
}

// New returns a target that writes what log does, and a logger that writes there. With what is made from that
// logger, it stays the target's for good; its options, as for stack traces, stay those of log.
func New(log *zap.Logger) (*Target, *zap.Logger) {
	t := &Target{}
	t.Swap(log)
	return t, log.WithOptions(zap.WrapCore(func(zapcore.Core) zapcore.Core { return core{target: t} }))
}

// Swap has all loggers of the target write where log does from now on.
func (t *Target) Swap(log *zap.Logger) {
	now := log.Core()
	t.core.Store(&now)
}

// core is one logger's: it adds the fields that With has given it. It keeps no other core, so that nothing of
// what was swapped out is held; the price is paid by lines that are really written.
type core struct {
	target *Target
	added  [][]zapcore.Field // by each With, in order
}

func (c core) now() zapcore.Core { return *c.target.core.Load() }

// Enabled is that of zapcore.LevelEnabler.
func (c core) Enabled(level zapcore.Level) bool { return c.now().Enabled(level) }

// With returns a core that adds these fields, too.
func (c core) With(fields []zapcore.Field) zapcore.Core {
	return core{c.target, append(slices.Clip(c.added), fields)}
}

// full returns the core that is written to now, with the fields added.
func (c core) full() zapcore.Core {
	now := c.now()
	for _, fields := range c.added {
		now = now.With(fields)
	}
	return now
}

// Check has the core that is written to now decide, which may drop what comes too often. It is that core which
// writes then, even if another one has come in between.
func (c core) Check(entry zapcore.Entry, checked *zapcore.CheckedEntry) *zapcore.CheckedEntry {
	if !c.Enabled(entry.Level) {
		return checked
	}
	return c.full().Check(entry, checked)
}

// Write is that of zapcore.Core, for who has not called Check.
func (c core) Write(entry zapcore.Entry, fields []zapcore.Field) error {
	return c.full().Write(entry, fields)
}

// Sync is that of zapcore.Core.
func (c core) Sync() error { return c.now().Sync() }
