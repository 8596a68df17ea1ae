package socket

import (
	"crypto/tls"
	"net"
	"sync"
)

// maxRest bounds what is kept of one connection, in bytes: what TLS makes of a batch, and some for
// what it says by itself. A peer that asks for new keys and reads nothing gets no further.
const maxRest = 2 * tlsChunkSize

// Conn is a network connection, below TLS if there is any, to which can be written without
// waiting. Until New takes it over it is what it is made of.
type Conn struct {
	net.Conn
	try  trier  // nil where every write may wait
	wait waiter // nil where who waits to read needs a buffer

	// mu guards what follows. TLS may write on behalf of its reader, too.
	mu    sync.Mutex
	keeps bool   // Write never waits
	rest  []byte // what there was no room for
}

// trier writes as much of b as there is room for now; 0 if there is none.
type trier interface {
	TryWrite(b []byte) (n int, err error)
}

// gatherer is a trier for what is in several places.
type gatherer interface {
	TryGather(pieces [][]byte) (n int, err error)
}

// Wrap returns conn as a Conn.
func Wrap(conn net.Conn) *Conn {
	try, wait := rawOf(conn)
	if try == nil { // tests' connections in memory
		try, _ = conn.(trier)
		wait, _ = conn.(waiter)
	}
	return &Conn{Conn: conn, try: try, wait: wait}
}

// Listen has the connections of l wrapped.
func Listen(l net.Listener) net.Listener { return listener{l} }

type listener struct{ net.Listener }

func (l listener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return Wrap(conn), nil
}

// Write keeps what there is no room for, for drain to write, once the connection is a Socket's.
func (c *Conn) Write(b []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.keeps {
		return c.Conn.Write(b)
	}
	n := 0
	if len(c.rest) == 0 {
		var err error
		if n, err = c.tryWrite(b); err != nil {
			return n, err
		}
	}
	if len(c.rest)+len(b)-n > maxRest {
		return n, ErrStalled
	}
	c.rest = append(c.rest, b[n:]...)
	return len(b), nil
}

// tryWrite writes what there is room for now.
func (c *Conn) tryWrite(b []byte) (int, error) {
	if c.try == nil {
		return 0, nil
	}
	return c.try.TryWrite(b)
}

// gatherer returns nil where what is written at once has to be in one place.
func (c *Conn) gatherer() gatherer {
	g, _ := c.try.(gatherer)
	return g
}

// keep has Write never wait from now on.
func (c *Conn) keep() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.keeps = true
}

// full reports whether something is kept.
func (c *Conn) full() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.rest) > 0
}

// drain writes what is kept with write, which may wait.
func (c *Conn) drain(write func([]byte) error) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.rest) == 0 {
		return nil
	}
	if err := write(c.rest); err != nil {
		return err
	}
	c.rest = nil
	return nil
}

// resumes reports whether a write that timed out can be taken up again: not on TLS, which is
// below when the server is reached through a proxy with TLS of its own.
func (c *Conn) resumes() bool {
	_, secured := c.Conn.(*tls.Conn)
	return !secured
}
