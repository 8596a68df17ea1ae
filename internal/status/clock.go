package status

import (
	"time"

	"github.com/opampgateway/opampgateway/internal/monotonic"
)

// Clock tells the time of the host's calendar for one of the monotonic clock, as both are when the Clock is made. If
// the host's is set, all that is told later moves with it, and what passed between two things stays right.
type Clock struct {
	now       time.Time
	monotonic int64
}

// NewClock returns the Clock of now.
func NewClock() Clock { return Clock{time.Now().Round(0).UTC(), monotonic.Now()} }

// Now returns when the Clock was made.
func (c Clock) Now() time.Time { return c.now.Truncate(time.Millisecond) }

// Time returns when t was.
func (c Clock) Time(t int64) time.Time {
	return c.now.Add(time.Duration(t - c.monotonic)).Round(time.Millisecond)
}

// At is Time for a time.Time that has a reading of the monotonic clock.
func (c Clock) At(t time.Time) time.Time { return c.Time(monotonic.Now() + int64(time.Until(t))) }

// Maybe is Time for what may never have been: then t is 0.
func (c Clock) Maybe(t int64) *time.Time {
	if t == 0 {
		return nil
	}
	at := c.Time(t)
	return &at
}
