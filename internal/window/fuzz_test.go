package window

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// FuzzWindow has any sequence of calls, in an order of time, and compares what is acknowledged with a book of
// all that was sent. Whatever came before, a closed window opens: soon when pings are answered, and when they
// are not, after a time that is bounded.
func FuzzWindow(f *testing.F) {
	f.Add([]byte{4, 0, 1, 9, 2, 0, 3, 0, 4, 0, 5, 1})
	f.Add([]byte{4, 0, 1, 255, 1, 255, 1, 255, 4, 0, 2, 200, 2, 200, 5, 0, 6, 3})
	f.Add([]byte{2, 200, 4, 0, 1, 1, 2, 255, 4, 0, 2, 255, 0, 1, 2, 255, 4, 0, 2, 255, 2, 255, 5, 0})
	f.Fuzz(func(t *testing.T, calls []byte) {
		now := at(0)
		w := New(now)
		var messages, bytes, read uint64
		before := map[uint64]sent{} // each ping
		last := uint64(0)
		ping := func() {
			last = w.Ping(now)
			before[last] = sent{messages, bytes}
		}
		pong := func(number uint64, waiting bool) {
			acknowledged, took, ok := w.Pong(number, now, waiting)
			require.GreaterOrEqual(t, took, time.Duration(0))
			require.GreaterOrEqual(t, acknowledged, read)
			if ok {
				require.Equal(t, before[number].messages, acknowledged)
				_, _, twice := w.Pong(number, now, waiting)
				require.False(t, twice)
				m, b := w.Unacknowledged()
				require.Equal(t, messages-before[number].messages, uint64(m))
				require.Equal(t, bytes-before[number].bytes, uint64(b))
				require.True(t, w.Answers())
			}
			read = acknowledged
		}
		for ; len(calls) > 1; calls = calls[2:] {
			n := int(calls[1])
			switch calls[0] % 8 {
			case 0: // questions pass a closed window
				w.Sent(n)
				messages, bytes = messages+1, bytes+uint64(n)
			case 1:
				for range n {
					if w.Open() {
						w.Sent(n << 8)
						messages, bytes = messages+1, bytes+uint64(n<<8)
					}
				}
			case 2:
				now += int64(time.Duration(n*n*n) * 10 * time.Microsecond) // up to 166 s
			case 3:
				if next := w.Next(); next != never {
					now = max(now, next)
				}
			case 4:
				if w.PingDue(now) {
					ping()
				}
			case 5:
				pong(last, n%2 == 0)
			case 6:
				pong(last-uint64(n%20), n%2 == 0)
			case 7: // a burst, as fast as it may
				for w.Open() && n > 0 {
					w.Sent(100)
					messages, bytes, n = messages+1, bytes+100, n-1
					if w.PingDue(now) {
						ping()
					}
				}
			}
			if !w.PingDue(now) {
				require.Greater(t, w.Next(), now)
			}
			m, b := w.Unacknowledged()
			require.GreaterOrEqual(t, m, 0)
			require.GreaterOrEqual(t, b, 0)
			require.GreaterOrEqual(t, w.size.messages, uint64(floorMessages))
			require.GreaterOrEqual(t, w.size.bytes, uint64(floorBytes))
			require.LessOrEqual(t, w.size.messages, uint64(ceilMessagesLong))
			require.LessOrEqual(t, w.size.bytes, uint64(ceilBytes))
		}

		answered := *w
		start := now
		for !answered.Open() {
			require.LessOrEqual(t, now, start+emptyFor+2*pingLost, "answered, and closed")
			if answered.PingDue(now) {
				number := answered.Ping(now)
				now += int64(time.Millisecond)
				answered.Pong(number, now, true)
			} else if !answered.Open() { // looking may have opened it
				require.Greater(t, answered.Next(), now)
				require.NotEqual(t, never, answered.Next())
				now = answered.Next()
			}
		}
		now = start
		for !w.Open() {
			require.LessOrEqual(t, now, start+stoppedAnswering+neverAnswered, "not answered, and closed")
			if w.PingDue(now) {
				w.Ping(now)
			} else if !w.Open() {
				require.Greater(t, w.Next(), now)
				require.NotEqual(t, never, w.Next())
				now = w.Next()
			}
		}
	})
}
