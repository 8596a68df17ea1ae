// Package fault does to TCP connections what networks do to them.
//
// A Line stands between those who dial it and a target on loopback. Unless told
// otherwise it carries bytes both ways, and an end as it came: a FIN as a FIN, a reset as
// a reset.
package fault

import (
	"errors"
	"io"
	"net"
	"os"
	"slices"
	"sync"
	"time"
)

// piece is how much is carried at once, in bytes; what a held connection has in flight.
const piece = 64 << 10

// Line carries connections to one target.
type Line struct {
	listener net.Listener
	carriers sync.WaitGroup

	tap func(*Conn) (up, down func([]byte)) // nil for none

	// mu guards all below.
	mu     sync.Mutex
	target string
	conns  []*Conn // open, in the order in which they came
	refuse bool
	dark   bool
	slow   int
	closed bool
}

// Open returns a line to target, an address on loopback. It listens on a port of its own.
func Open(target string) (*Line, error) { return OpenTapped(target, nil) }

// OpenTapped is Open for a line whose connections are listened in on: tap is called with each. Of what
// it returns, up is called with all that comes from who dialed, before anything is done with that, and
// even if nothing is done with it any more; down with what comes from the target, before that goes on.
// Either may end the connection, or be nil.
func OpenTapped(target string, tap func(*Conn) (up, down func([]byte))) (*Line, error) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	l := &Line{target: target, listener: listener, tap: tap}
	l.carriers.Go(l.accept)
	return l, nil
}

// Address is where the line is dialed, host and port.
func (l *Line) Address() string { return l.listener.Addr().String() }

// Close ends the line and all its connections, and waits for its goroutines.
func (l *Line) Close() {
	l.mu.Lock()
	l.closed = true
	l.mu.Unlock()
	l.listener.Close()
	l.mu.Lock()
	conns := slices.Clone(l.conns)
	l.mu.Unlock()
	for _, c := range conns {
		c.Reset()
		c.near.Close() // it may be reading what comes behind a FIN
	}
	l.carriers.Wait()
}

// Conns returns the open connections, in the order in which they came.
func (l *Line) Conns() []*Conn {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.DeleteFunc(slices.Clone(l.conns), (*Conn).hasEnded)
}

// Redirect has new connections lead to another target; those that are open go on.
func (l *Line) Redirect(target string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.target = target
}

// Refuse has new connections reset at once, until it is taken back.
func (l *Line) Refuse(refuse bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.refuse = refuse
}

// Darken has new connections lead into a black hole, until it is taken back; those that are
// open go on.
func (l *Line) Darken(dark bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.dark = dark
}

// Slow has new connections carry so many bytes a second each way; 0 is as fast as it goes.
func (l *Line) Slow(bytesPerSecond int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.slow = bytesPerSecond
}

// accept ends with the listener.
func (l *Line) accept() {
	for {
		near, err := l.listener.Accept()
		if err != nil {
			return
		}
		l.mu.Lock()
		target, refuse, dark, slow := l.target, l.refuse || l.closed, l.dark, l.slow
		l.mu.Unlock()
		if refuse {
			reset(near)
			continue
		}
		far, err := net.Dial("tcp", target)
		if err != nil {
			reset(near)
			continue
		}
		c := &Conn{line: l, near: near, far: far, held: dark, slow: slow}
		c.changed.L = &c.mu
		if l.tap != nil {
			c.tap, c.tapDown = l.tap(c)
		}
		if tcp, ok := near.(*net.TCPConn); ok && c.tap != nil {
			_ = tcp.SetReadBuffer(16 * piece) // a kernel may take 32 MiB else, of which nothing is known yet
		}
		l.mu.Lock()
		l.conns = append(l.conns, c)
		closed := l.closed
		l.mu.Unlock()
		if closed {
			c.Reset()
		}
		l.carriers.Go(c.carryBoth)
	}
}

// Conn is one connection through a line.
type Conn struct {
	line      *Line
	near, far net.Conn     // of who dialed, and to the target
	tap       func([]byte) // of what comes from who dialed; nil for none
	tapDown   func([]byte) // of what comes from the target; nil for none
	slow      int          // bytes a second; 0 for no limit

	// mu guards all below.
	mu        sync.Mutex
	changed   sync.Cond
	held      bool
	swallowed bool
	ended     bool
	readOut   bool // nothing more comes from who dialed
	end       End
}

// End is how a connection ended.
type End struct {
	By Ender
	At time.Time // when the line knew
	// Cut is when the connection was taken from who dialed without reading what came before: what
	// that had written since the last read nobody knows. Zero if all was read.
	Cut time.Time
}

// Ender is who ended a connection.
type Ender string

// Who ends connections.
const (
	Nobody Ender = ""
	Fault  Ender = "fault"
	Dialer Ender = "who dialed"
	Target Ender = "target"
)

// From is the address of who dialed.
func (c *Conn) From() string { return c.near.RemoteAddr().String() }

// Source is the address from which the target sees the connection come.
func (c *Conn) Source() string { return c.far.LocalAddr().String() }

// End returns how the connection ended; By is Nobody while it has not, nor is in a black hole.
func (c *Conn) End() End {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.end
}

func (c *Conn) hasEnded() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.ended
}

// Hold has nothing move any more, in either direction, without an end that anybody could see:
// a black hole. Release undoes it.
func (c *Conn) Hold() { c.hold(true) }

// Release has a held connection carry again what was said meanwhile.
func (c *Conn) Release() { c.hold(false) }

func (c *Conn) hold(held bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.held = held
	c.changed.Broadcast()
}

// Swallow is a black hole for good, until Reset: all that is said is read, and goes nowhere.
func (c *Conn) Swallow() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.swallowed = true
	c.noteLocked(Fault)
	c.changed.Broadcast()
}

// Sink is a black hole for good that nobody reads, so that its buffers fill. EndSunk is its end.
func (c *Conn) Sink() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.held = true
	c.noteLocked(Fault)
}

// EndSunk reads what who dialed has said into the black hole, until it gives up, and then is Reset. A
// kernel that could not get rid of its bytes tries again only after seconds.
func (c *Conn) EndSunk() {
	const within = 60 * time.Second
	deadline := time.Now().Add(within)
	c.mu.Lock()
	c.swallowed = true
	c.changed.Broadcast()
	for !c.readOut && !c.ended && time.Now().Before(deadline) {
		c.mu.Unlock()
		time.Sleep(10 * time.Millisecond)
		c.mu.Lock()
	}
	c.mu.Unlock()
	c.Reset()
}

// Reset ends the connection on both sides with a RST; what was in flight is lost.
func (c *Conn) Reset() { c.reset(Fault) }

func (c *Conn) reset(by Ender) {
	if c.isFirst(by) {
		reset(c.far)
		reset(c.near)
		c.cut()
	}
}

// finishWithin is how long who dialed has to close its side of a connection that was finished.
const finishWithin = 10 * time.Second

// Finish ends the connection on both sides with a FIN. What who dialed says before it closes its
// side, too, is read, and goes nowhere.
func (c *Conn) Finish() { c.finish(Fault) }

func (c *Conn) finish(by Ender) {
	if c.isFirst(by) {
		c.far.Close()
		_ = c.near.SetReadDeadline(time.Now().Add(finishWithin)) // it may have ended by itself
		closeWrite(c.near)
	}
}

// isFirst notes the end of the connection, and reports whether that is the first.
func (c *Conn) isFirst(by Ender) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	first := !c.ended
	c.ended = true
	c.noteLocked(by)
	c.changed.Broadcast()
	return first
}

// noteLocked notes who has ended the connection, if nobody has before.
func (c *Conn) noteLocked(by Ender) {
	if c.end.By == Nobody {
		c.end = End{By: by, At: time.Now()}
	}
}

func (c *Conn) note(by Ender) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.noteLocked(by)
}

// cut notes that the connection was taken from who dialed.
func (c *Conn) cut() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.readOut {
		c.end.Cut = time.Now()
	}
}

// noteRead notes that who dialed has ended its side, and all that it said before was read.
func (c *Conn) noteRead() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.readOut = true
}

// carryBoth ends when both directions have, and with a reset of either.
func (c *Conn) carryBoth() {
	var up sync.WaitGroup
	up.Go(func() { c.carry(c.far, c.near, Dialer, Target, c.tap) })
	c.carry(c.near, c.far, Target, Dialer, c.tapDown)
	up.Wait()
	c.awaitEnd()
	c.far.Close()
	c.near.Close()
	l := c.line
	l.mu.Lock()
	defer l.mu.Unlock()
	l.conns = slices.DeleteFunc(l.conns, func(other *Conn) bool { return other == c })
}

// carry takes what is read from one side to the other, and then the end.
func (c *Conn) carry(to, from net.Conn, reader, writer Ender, tap func([]byte)) {
	buf := make([]byte, piece)
	if c.slow > 0 {
		buf = buf[:max(1, min(piece, c.slow/20))]
	}
	for {
		n, err := from.Read(buf)
		if tap != nil && n > 0 {
			tap(buf[:n])
		}
		if reader == Dialer && err != nil && !errors.Is(err, net.ErrClosed) && !errors.Is(err, os.ErrDeadlineExceeded) {
			c.noteRead()
		}
		if !c.mayMove() { // it is read for the tap alone
			if err == nil {
				continue
			}
			if errors.Is(err, os.ErrDeadlineExceeded) { // of Finish
				reset(from)
				c.cut()
			}
			return
		}
		if n > 0 {
			if c.slow > 0 {
				time.Sleep(time.Duration(n) * time.Second / time.Duration(c.slow))
			}
			if _, err := to.Write(buf[:n]); err != nil {
				switch {
				case c.tap == nil:
					c.broke(writer)
				case writer == Dialer: // what it said before is still on its way
					_, _ = io.Copy(io.Discard, from)
					return
				default: // what it said before goes on first, a close frame perhaps; its reader knows the end
				}
				continue
			}
		}
		switch {
		case errors.Is(err, io.EOF):
			c.note(reader)
			closeWrite(to)
			return
		case err != nil:
			c.broke(reader)
			return
		}
	}
}

// broke ends the connection when one side has. Where somebody listens in, all that was said is read.
func (c *Conn) broke(by Ender) {
	if c.tap == nil {
		c.reset(by)
	} else {
		c.finish(by)
	}
}

// mayMove waits while the connection is held, and reports whether what was read goes on.
func (c *Conn) mayMove() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	for c.held && !c.ended && !c.swallowed {
		c.changed.Wait()
	}
	return !c.ended && !c.swallowed
}

// awaitEnd waits for the end of a connection that is in a black hole: nobody is to see before that
// the other side has gone.
func (c *Conn) awaitEnd() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for c.swallowed && !c.ended {
		c.changed.Wait()
	}
	c.ended = true
}

// closeWrite sends a FIN.
func closeWrite(conn net.Conn) {
	if half, ok := conn.(interface{ CloseWrite() error }); ok {
		_ = half.CloseWrite() // it may have ended by itself
	}
}

// reset closes conn with a RST.
func reset(conn net.Conn) {
	if tcp, ok := conn.(*net.TCPConn); ok {
		_ = tcp.SetLinger(0)
	}
	conn.Close()
}
