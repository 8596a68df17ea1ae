// Package monotonic is time as it is kept in atomics: nanoseconds of this process's own clock,
// which runs on when that of the host is set.
package monotonic

import "time"

// started is when the clock began.
var started = time.Now()

// Now returns the nanoseconds since the clock began; never 0, which may stand for none.
func Now() int64 { return int64(time.Since(started)) | 1 }

// Time returns when the clock shows t, for a deadline. It keeps its monotonic reading.
func Time(t int64) time.Time { return time.Now().Add(time.Duration(t - Now())) }

// Since returns how long ago the clock showed t.
func Since(t int64) time.Duration { return time.Duration(Now() - t) }
