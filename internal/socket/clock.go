package socket

import "time"

// started is when the process's own clock began, which runs on when that of the host is set.
var started = time.Now()

// clock returns the time by it, in nanoseconds; never 0, which means none.
func clock() int64 { return int64(time.Since(started)) | 1 }

// deadline returns a time of that clock as others want it. It keeps its monotonic reading.
func deadline(at int64) time.Time { return time.Now().Add(time.Duration(at - clock())) }
