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
func Open(target string) (*Line, error) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	l := &Line{target: target, listener: listener}
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
	for _, c := range l.Conns() {
		c.Reset()
	}
	l.carriers.Wait()
}

// Conns returns the open connections, in the order in which they came.
func (l *Line) Conns() []*Conn {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.conns)
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
	near, far net.Conn // of who dialed, and to the target
	slow      int      // bytes a second; 0 for no limit

	// mu guards all below.
	mu      sync.Mutex
	changed sync.Cond
	held    bool
	ended   bool
}

// From is the address of who dialed.
func (c *Conn) From() string { return c.near.RemoteAddr().String() }

// Source is the address from which the target sees the connection come.
func (c *Conn) Source() string { return c.far.LocalAddr().String() }

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

// Reset ends the connection on both sides with a RST; what was in flight is lost.
func (c *Conn) Reset() { c.end(reset) }

// Finish ends the connection on both sides with a FIN.
func (c *Conn) Finish() { c.end(func(conn net.Conn) { conn.Close() }) }

func (c *Conn) end(how func(net.Conn)) {
	c.mu.Lock()
	ended := c.ended
	c.ended = true
	c.changed.Broadcast()
	c.mu.Unlock()
	if !ended {
		how(c.near)
		how(c.far)
	}
}

// carryBoth ends when both directions have, and with a reset of either.
func (c *Conn) carryBoth() {
	var up sync.WaitGroup
	up.Go(func() { c.carry(c.far, c.near) })
	c.carry(c.near, c.far)
	up.Wait()
	c.Finish()
	l := c.line
	l.mu.Lock()
	defer l.mu.Unlock()
	l.conns = slices.DeleteFunc(l.conns, func(other *Conn) bool { return other == c })
}

// carry takes what is read from one side to the other, and then the end.
func (c *Conn) carry(to, from net.Conn) {
	buf := make([]byte, piece)
	if c.slow > 0 {
		buf = buf[:max(1, min(piece, c.slow/20))]
	}
	for {
		n, err := from.Read(buf)
		if !c.mayMove() {
			return
		}
		if n > 0 {
			if c.slow > 0 {
				time.Sleep(time.Duration(n) * time.Second / time.Duration(c.slow))
			}
			if _, err := to.Write(buf[:n]); err != nil {
				c.Reset()
				return
			}
		}
		switch {
		case errors.Is(err, io.EOF):
			if half, ok := to.(interface{ CloseWrite() error }); ok {
				_ = half.CloseWrite() // it may have ended by itself
			}
			return
		case err != nil:
			c.Reset()
			return
		}
	}
}

// mayMove waits while the connection is held, and reports whether it still lives.
func (c *Conn) mayMove() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	for c.held && !c.ended {
		c.changed.Wait()
	}
	return !c.ended
}

// reset closes conn with a RST.
func reset(conn net.Conn) {
	if tcp, ok := conn.(*net.TCPConn); ok {
		_ = tcp.SetLinger(0)
	}
	conn.Close()
}
