package window

import "testing"

// BenchmarkMessage is what the window costs each message of a link that is not held up.
func BenchmarkMessage(b *testing.B) {
	w := New(0)
	w.Pong(w.Ping(0), 100_000, false)
	var now int64
	b.ReportAllocs()
	for b.Loop() {
		now += 1000
		if w.Open() {
			w.Sent(100)
		}
		if w.PingDue(now) {
			w.Pong(w.Ping(now), now+100_000, true)
		}
	}
}
