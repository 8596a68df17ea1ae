package e2e

import (
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// longWay carries connections to a target as a long way does: whatever is said arrives, in order, a
// while later. How much is on its way at the same time is bounded by nothing but its window.
type longWay struct {
	listener net.Listener
	target   string
	oneWay   atomic.Int64 // nanoseconds
	carriers sync.WaitGroup

	// mu guards all below.
	mu    sync.Mutex
	conns []net.Conn // of both sides; nil at the end
	over  bool
}

// wayWindow is how many pieces of 64 KiB at most are on their way, in one direction.
const wayWindow = 256

// inTransit is what is on its way.
type inTransit struct {
	bytes []byte
	due   time.Time
}

func openLongWay(t *testing.T, target string, oneWay time.Duration) *longWay {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	w := &longWay{listener: listener, target: target}
	w.oneWay.Store(int64(oneWay))
	w.carriers.Go(w.accept)
	t.Cleanup(func() {
		listener.Close()
		w.mu.Lock()
		w.over = true
		for _, conn := range w.conns {
			conn.Close()
		}
		w.mu.Unlock()
		w.carriers.Wait()
	})
	return w
}

func (w *longWay) url() string { return "ws://" + w.listener.Addr().String() + "/v1/opamp" }

// accept ends with the listener.
func (w *longWay) accept() {
	for {
		near, err := w.listener.Accept()
		if err != nil {
			return
		}
		far, err := net.Dial("tcp", w.target)
		if err != nil {
			near.Close()
			continue
		}
		w.mu.Lock()
		over := w.over
		w.conns = append(w.conns, near, far)
		w.mu.Unlock()
		if over {
			near.Close()
			far.Close()
			return
		}
		w.carry(far, near)
		w.carry(near, far)
	}
}

// carry takes what is read from one side to the other until either ends.
func (w *longWay) carry(to, from net.Conn) {
	way := make(chan inTransit, wayWindow)
	w.carriers.Go(func() { // until from ends, or is closed by the one below
		defer close(way)
		for {
			buf := make([]byte, 64<<10)
			n, err := from.Read(buf)
			if n > 0 {
				way <- inTransit{buf[:n], time.Now().Add(time.Duration(w.oneWay.Load()))}
			}
			if err != nil {
				return
			}
		}
	})
	w.carriers.Go(func() { // until the one above ends
		var err error
		for piece := range way {
			if err == nil {
				time.Sleep(time.Until(piece.due))
				_, err = to.Write(piece.bytes) // the other way, what was said before the end is still on its way
			}
		}
		to.Close()
	})
}
