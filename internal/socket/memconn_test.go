package socket

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/gorilla/websocket"
	"github.com/stretchr/testify/require"
)

// memConn is one end of a connection in memory. As with the kernel's, a write returns as soon as
// the buffer has taken it, whether or not anybody reads.
type memConn struct{ in, out *stream }

// stream is one direction of it.
type stream struct {
	mu       sync.Mutex
	changed  sync.Cond // any of the below
	buffer   []byte
	capacity int
	budget   int  // how many bytes are taken until the connection breaks; -1 for any
	piece    int  // how much one read returns at most
	discards bool // whatever is written
	writes   int  // calls to Write
	ended    bool
	deadline [2]time.Time // to read, to write
	timers   [2]*time.Timer
	closed   [2]bool
}

const reading, writing = 0, 1

var errBroken = errors.New("connection broke")

// memPipe returns two ends, with a buffer of capacity bytes in each direction.
func memPipe(capacity int) (one, other *memConn) {
	there, back := newStream(capacity), newStream(capacity)
	return &memConn{in: back, out: there}, &memConn{in: there, out: back}
}

func newStream(capacity int) *stream {
	s := &stream{capacity: capacity, budget: -1, piece: 1 << 30}
	s.changed.L = &s.mu
	return s
}

func (s *stream) readyLocked(side int) error {
	switch deadline := s.deadline[side]; {
	case s.closed[side]:
		return net.ErrClosed
	case !deadline.IsZero() && !time.Now().Before(deadline):
		return os.ErrDeadlineExceeded
	}
	return nil
}

func (s *stream) read(take func() []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for {
		if err := s.readyLocked(reading); err != nil {
			return 0, err
		}
		if len(s.buffer) > 0 {
			b := take()
			n := copy(b[:min(len(b), s.piece)], s.buffer)
			s.buffer = s.buffer[n:]
			s.changed.Broadcast()
			return n, nil
		}
		if s.ended || s.closed[writing] {
			return 0, io.EOF
		}
		s.changed.Wait()
	}
}

func (s *stream) write(b []byte, wait bool) (n int, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.writes++
	if s.discards {
		return len(b), nil
	}
	for {
		if err := s.readyLocked(writing); err != nil {
			return n, err
		}
		if s.ended || s.closed[reading] {
			return n, errBroken
		}
		room := min(s.capacity-len(s.buffer), len(b)-n)
		if s.budget >= 0 {
			if room = min(room, s.budget); room == 0 && n < len(b) && s.budget == 0 {
				s.ended = true
				s.changed.Broadcast()
				return n, errBroken
			}
			s.budget -= room
		}
		s.buffer = append(s.buffer, b[n:n+room]...)
		n += room
		s.changed.Broadcast()
		if n == len(b) {
			return n, nil
		}
		if room == 0 && !wait {
			return n, nil
		}
		if room == 0 {
			s.changed.Wait()
		}
	}
}

func (s *stream) setDeadline(side int, deadline time.Time) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed[side] {
		return net.ErrClosed
	}
	if s.discards { // and never waits
		return nil
	}
	s.deadline[side] = deadline
	if timer := s.timers[side]; timer != nil {
		timer.Stop()
	}
	if !deadline.IsZero() {
		s.timers[side] = time.AfterFunc(time.Until(deadline), func() {
			s.mu.Lock()
			defer s.mu.Unlock()
			s.changed.Broadcast()
		})
	}
	s.changed.Broadcast()
	return nil
}

func (s *stream) close(side int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed[side] = true
	if timer := s.timers[side]; timer != nil {
		timer.Stop()
	}
	s.changed.Broadcast()
}

// breakAfter has the connection break when so many more bytes have been written to it.
func (c *memConn) breakAfter(n int) {
	c.out.mu.Lock()
	defer c.out.mu.Unlock()
	c.out.budget = n
}

// inPieces has what was written to the connection arrive in pieces of n bytes.
func (c *memConn) inPieces(n int) {
	c.out.mu.Lock()
	defer c.out.mu.Unlock()
	c.out.piece = n
}

// writes returns how often the connection was written to.
func (c *memConn) writes() int {
	c.out.mu.Lock()
	defer c.out.mu.Unlock()
	return c.out.writes
}

// unread returns how many of the bytes written to the connection were not read.
func (c *memConn) unread() int {
	c.out.mu.Lock()
	defer c.out.mu.Unlock()
	return len(c.out.buffer)
}

// take reads n bytes of what the other end has written, past everything else.
func (c *memConn) take(tb testing.TB, n int) {
	tb.Helper()
	_, err := io.CopyN(io.Discard, c, int64(n))
	require.NoError(tb, err)
}

func (c *memConn) Read(b []byte) (int, error) { return c.in.read(func() []byte { return b }) }

func (c *memConn) readWhenReady(in *lazyInput) error {
	n, err := c.in.read(in.take)
	in.end += n
	return err
}

func (c *memConn) Write(b []byte) (int, error) { return c.out.write(b, true) }

func (c *memConn) TryWrite(b []byte) (int, error) { return c.out.write(b, false) }

// TryGather takes what is in several places as what is in one.
func (c *memConn) TryGather(some [][]byte) (int, error) {
	return c.out.write(bytes.Join(some, nil), false)
}

func (c *memConn) Close() error {
	c.in.close(reading)
	c.out.close(writing)
	return nil
}

func (c *memConn) SetReadDeadline(t time.Time) error  { return c.in.setDeadline(reading, t) }
func (c *memConn) SetWriteDeadline(t time.Time) error { return c.out.setDeadline(writing, t) }
func (c *memConn) SetDeadline(t time.Time) error {
	if err := c.SetReadDeadline(t); err != nil {
		return err
	}
	return c.SetWriteDeadline(t)
}

func (c *memConn) LocalAddr() net.Addr  { return memAddr{} }
func (c *memConn) RemoteAddr() net.Addr { return memAddr{} }

type memAddr struct{}

func (memAddr) Network() string { return "memory" }
func (memAddr) String() string  { return "memory" }

// tcpPair returns the two ends of a connection of the kernel's.
func tcpPair(tb testing.TB) (near, far *net.TCPConn) {
	tb.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(tb, err)
	defer l.Close()
	one, err := net.Dial("tcp", l.Addr().String())
	require.NoError(tb, err)
	other, err := l.Accept()
	require.NoError(tb, err)
	tb.Cleanup(func() {
		one.Close()
		other.Close()
	})
	return one.(*net.TCPConn), other.(*net.TCPConn)
}

// handshake makes a WebSocket of two ends of a connection.
func handshake(tb testing.TB, client, server net.Conn) (clientEnd, serverEnd *websocket.Conn) {
	tb.Helper()
	upgraded := make(chan error, 1)
	go func() {
		in := bufio.NewReader(server)
		request, err := http.ReadRequest(in)
		if err == nil {
			upgrader := websocket.Upgrader{WriteBufferPool: &sync.Pool{}}
			serverEnd, err = upgrader.Upgrade(&hijacked{conn: server, in: in}, request, nil)
		}
		upgraded <- err
	}()
	dialer := websocket.Dialer{
		NetDial:         func(string, string) (net.Conn, error) { return client, nil },
		WriteBufferPool: &sync.Pool{},
	}
	clientEnd, _, err := dialer.DialContext(tb.Context(), "ws://memory/", nil)
	require.NoError(tb, err)
	require.NoError(tb, <-upgraded)
	return clientEnd, serverEnd
}

// hijacked is a response of which nothing is used but the connection below.
type hijacked struct {
	http.ResponseWriter
	conn net.Conn
	in   *bufio.Reader
}

func (h *hijacked) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	return h.conn, bufio.NewReadWriter(h.in, bufio.NewWriter(h.conn)), nil
}
