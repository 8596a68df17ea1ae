// Package gatewaytest has what the gateway's tests put around it: a network in memory, an
// OpAMP server that follows a script, and agents.
//
// All of it works in the fake time of a testing/synctest bubble: nothing blocks but on
// channels, condition variables and timers made there. The server and the agents work over
// real sockets as well.
package gatewaytest

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"
)

// BufferSize is how many bytes a connection holds in each direction, between what one end
// has written and the other has read: what kernels do, only less, so that it matters.
const BufferSize = 64 << 10

// Network connects those who dial an address with the one who listens there.
type Network struct {
	mu        sync.Mutex
	listeners map[string]*Listener
	silent    map[string]bool // addresses where a dial gets no answer
	ports     int             // given to those who dialed
	bandwidth int             // bytes a second in each direction of connections made from here on; 0 for no limit
}

// NewNetwork returns a network with nobody on it.
func NewNetwork() *Network {
	return &Network{listeners: map[string]*Listener{}, silent: map[string]bool{}}
}

// Listen takes address, which has to be free.
func (n *Network) Listen(address string) (*Listener, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.listeners[address] != nil {
		return nil, &net.OpError{Op: "listen", Net: "tcp", Err: syscall.EADDRINUSE}
	}
	l := &Listener{network: n, address: address, backlog: make(chan *Conn, 1<<14), closed: make(chan struct{})}
	n.listeners[address] = l
	return l, nil
}

// Dial connects to whoever listens at address. All who dial so are on one host, mostly.
func (n *Network) Dial(ctx context.Context, _, address string) (net.Conn, error) {
	return n.dial(ctx, nil, address)
}

// DialFrom returns a Dial for those on the host of this address.
func (n *Network) DialFrom(ip string) func(ctx context.Context, network, address string) (net.Conn, error) {
	host := net.ParseIP(ip)
	if host == nil {
		panic("no IP address: " + ip)
	}
	return func(ctx context.Context, _, address string) (net.Conn, error) { return n.dial(ctx, host, address) }
}

func (n *Network) dial(ctx context.Context, from net.IP, address string) (net.Conn, error) {
	n.mu.Lock()
	silent := n.silent[address]
	if !silent {
		defer n.mu.Unlock()
		return n.connectLocked(from, address)
	}
	n.mu.Unlock()
	<-ctx.Done()
	return nil, ctx.Err()
}

func (n *Network) connectLocked(from net.IP, address string) (net.Conn, error) {
	if l := n.listeners[address]; l != nil {
		n.ports++
		if from == nil {
			from = net.IPv4(10, 0, byte(n.ports>>15), 1)
		}
		local := &net.TCPAddr{IP: from, Port: 1<<15 + n.ports%(1<<15)}
		near, far := pair(local, address, n.bandwidth)
		select {
		case l.backlog <- far:
			return near, nil
		default: // full
		}
	}
	return nil, &net.OpError{Op: "dial", Net: "tcp", Err: syscall.ECONNREFUSED}
}

// Silence has those who dial address wait for an answer that never comes, or ends that.
func (n *Network) Silence(address string, silent bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.silent[address] = silent
}

// Throttle limits connections made from here on to so many bytes a second in each direction.
func (n *Network) Throttle(bytesPerSecond int) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.bandwidth = bytesPerSecond
}

// Listener is where one address is listened at.
type Listener struct {
	network *Network
	address string
	backlog chan *Conn
	closed  chan struct{}
	once    sync.Once
}

// Accept returns the next connection that was dialed.
func (l *Listener) Accept() (net.Conn, error) {
	select {
	case <-l.closed: // even if some wait
		return nil, &net.OpError{Op: "accept", Net: "tcp", Err: net.ErrClosed}
	default:
	}
	select {
	case c := <-l.backlog:
		return c, nil
	case <-l.closed:
		return nil, &net.OpError{Op: "accept", Net: "tcp", Err: net.ErrClosed}
	}
}

// Close gives the address back; those who wait to be accepted are reset.
func (l *Listener) Close() error {
	l.once.Do(func() {
		l.network.mu.Lock()
		defer l.network.mu.Unlock()
		delete(l.network.listeners, l.address)
		close(l.closed)
		for {
			select {
			case c := <-l.backlog:
				c.Reset()
			default:
				return
			}
		}
	})
	return nil
}

// Addr returns the address listened at.
func (l *Listener) Addr() net.Addr { return address(l.address) }

type address string

func (address) Network() string  { return "tcp" }
func (a address) String() string { return string(a) }

// Conn is one end of a connection. It behaves as TCP does, as far as it goes: what is written
// waits in a bounded buffer; closing with something unread resets the connection, and so
// does writing to an end that is closed; a reset takes back what was not yet read.
type Conn struct {
	local, remote net.Addr
	in, out       *pipe
}

func pair(dialer net.Addr, listener string, bandwidth int) (near, far *Conn) {
	up, down := newPipe(bandwidth), newPipe(bandwidth)
	near = &Conn{local: dialer, remote: address(listener), in: down, out: up}
	far = &Conn{local: address(listener), remote: dialer, in: up, out: down}
	return near, far
}

// Pipe returns the two ends of a connection.
func Pipe() (near, far *Conn) { return pair(address("near"), "far", 0) }

// Read is that of net.Conn.
func (c *Conn) Read(b []byte) (int, error) {
	n, err := c.in.read(b)
	if err != nil && err != io.EOF { //nolint:errorlint // net.Conn has it bare
		err = &net.OpError{Op: "read", Net: "tcp", Source: c.local, Addr: c.remote, Err: err}
	}
	return n, err
}

// Write is that of net.Conn.
func (c *Conn) Write(b []byte) (int, error) { return c.write(b, true) }

// TryWrite writes as much as there is room for.
func (c *Conn) TryWrite(b []byte) (int, error) { return c.write(b, false) }

func (c *Conn) write(b []byte, wait bool) (int, error) {
	n, err := c.out.write(b, wait)
	if errors.Is(err, errDeaf) {
		c.in.reset(false)
		c.out.reset(false)
		n, err = len(b), nil // the kernel had taken it before it heard
	}
	if err != nil {
		err = &net.OpError{Op: "write", Net: "tcp", Source: c.local, Addr: c.remote, Err: err}
	}
	return n, err
}

// Close ends the connection: the other end reads what was written, then EOF. If something is
// left unread at this end, it is reset instead.
func (c *Conn) Close() error {
	unread, closed := c.in.closeReader()
	if closed {
		return &net.OpError{Op: "close", Net: "tcp", Source: c.local, Addr: c.remote, Err: net.ErrClosed}
	}
	c.out.closeWriter()
	if unread {
		c.in.reset(false)
		c.out.reset(false)
	}
	return nil
}

// CloseWrite ends this direction of the connection: the other end reads what was written, then EOF.
func (c *Conn) CloseWrite() error {
	c.out.closeWriter()
	return nil
}

// Reset ends the connection at both ends at once; what was not yet read is lost.
func (c *Conn) Reset() {
	c.out.reset(true) // first: whoever reads here may close the connection at once, which would look like an end to the peer
	c.in.reset(true)
}

// BlackHole has whatever is sent from now on, at either end, arrive nowhere, its end included.
func (c *Conn) BlackHole() {
	c.in.blackHole()
	c.out.blackHole()
}

// LocalAddr is that of net.Conn.
func (c *Conn) LocalAddr() net.Addr { return c.local }

// RemoteAddr is that of net.Conn.
func (c *Conn) RemoteAddr() net.Addr { return c.remote }

// SetDeadline is that of net.Conn.
func (c *Conn) SetDeadline(t time.Time) error {
	return errors.Join(c.SetReadDeadline(t), c.SetWriteDeadline(t))
}

// SetReadDeadline is that of net.Conn.
func (c *Conn) SetReadDeadline(t time.Time) error { return c.in.setDeadline(&c.in.reader, t) }

// SetWriteDeadline is that of net.Conn.
func (c *Conn) SetWriteDeadline(t time.Time) error { return c.out.setDeadline(&c.out.writer, t) }

// errDeaf means that the end which would read has been closed.
var errDeaf = errors.New("reader has closed")

// pipe is one direction of a connection.
type pipe struct {
	bandwidth int // bytes a second; 0 for no limit

	mu      sync.Mutex
	changed sync.Cond
	buf     []byte
	lost    bool // what is written arrives nowhere
	reader  end
	writer  end
	ready   time.Time // when the line has carried what was written, if its bandwidth is limited
}

// end is what one end of a connection knows of one direction.
type end struct {
	closed  bool // by itself
	reset   bool
	expired bool // its deadline
	timer   *time.Timer
}

func newPipe(bandwidth int) *pipe {
	p := &pipe{bandwidth: bandwidth}
	p.changed.L = &p.mu
	return p
}

func (p *pipe) read(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for {
		switch {
		case p.reader.closed:
			return 0, net.ErrClosed
		case p.reader.reset:
			return 0, syscall.ECONNRESET
		case p.reader.expired:
			return 0, os.ErrDeadlineExceeded
		case len(b) == 0:
			return 0, nil
		case p.lost:
		case len(p.buf) > 0:
			n := copy(b, p.buf)
			p.buf = p.buf[n:]
			if len(p.buf) == 0 {
				p.buf = nil
			}
			p.changed.Broadcast()
			return n, nil
		case p.writer.closed:
			return 0, io.EOF
		}
		p.changed.Wait()
	}
}

func (p *pipe) write(b []byte, wait bool) (n int, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for {
		switch {
		case p.writer.closed:
			return n, net.ErrClosed
		case p.writer.reset:
			return n, syscall.ECONNRESET
		case p.writer.expired:
			return n, os.ErrDeadlineExceeded
		case p.reader.closed && !p.lost:
			return n, errDeaf
		case len(b) == 0:
			return n, nil
		case p.busy():
		case len(p.buf) < BufferSize:
			m := min(BufferSize-len(p.buf), len(b))
			p.buf = append(p.buf, b[:m]...)
			b, n = b[m:], n+m
			if p.bandwidth > 0 {
				p.ready = time.Now().Add(time.Duration(m) * time.Second / time.Duration(p.bandwidth))
			}
			p.changed.Broadcast()
			continue
		}
		if !wait {
			return n, nil
		}
		p.changed.Wait()
	}
}

// busy reports whether the line still carries what was written before, and has the writer woken when not.
func (p *pipe) busy() bool {
	wait := time.Until(p.ready)
	if p.bandwidth == 0 || wait <= 0 {
		return false
	}
	time.AfterFunc(wait, p.wake)
	return true
}

func (p *pipe) wake() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.changed.Broadcast()
}

func (p *pipe) closeReader() (unread, already bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	unread, already = len(p.buf) > 0 && !p.lost && !p.reader.reset, p.reader.closed
	p.reader.closed = true
	if p.reader.timer != nil {
		p.reader.timer.Stop()
	}
	p.changed.Broadcast()
	return unread, already
}

func (p *pipe) closeWriter() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.writer.closed = true
	if p.writer.timer != nil {
		p.writer.timer.Stop()
	}
	p.changed.Broadcast()
}

// reset ends this direction at both ends. A black hole does not let a reset through, unless
// it is by force.
func (p *pipe) reset(force bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.lost && !force {
		return
	}
	p.buf = nil
	p.reader.reset, p.writer.reset = true, true
	p.changed.Broadcast()
}

func (p *pipe) blackHole() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.lost = true
}

func (p *pipe) setDeadline(e *end, t time.Time) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if e.closed {
		return net.ErrClosed
	}
	if e.timer != nil {
		e.timer.Stop()
		e.timer = nil
	}
	wait := time.Until(t)
	e.expired = !t.IsZero() && wait <= 0
	if !t.IsZero() && wait > 0 {
		var timer *time.Timer
		timer = time.AfterFunc(wait, func() {
			p.mu.Lock()
			defer p.mu.Unlock()
			if e.timer == timer {
				e.expired = true
				p.changed.Broadcast()
			}
		})
		e.timer = timer
	}
	p.changed.Broadcast()
	return nil
}
