// Package door is the listener at which strangers knock: whoever has connected, and was not let in
// yet. It bounds what they can take, before any of it reaches the HTTP server behind it:
//
//   - so many connections in all, and so many of strangers, which their addresses share fairly;
//   - so many header lines, of so many bytes, and so much time from connecting to the end of the
//     request's head, TLS included. The head is kept in memory of its own size until it is complete,
//     and only then given to the HTTP server, all of it;
//   - one request, of which nothing is read behind its head. Whatever is no 101 is the last that is said
//     on the connection.
//
// A connection that is upgraded is a stranger no more: Upgrade returns what is below, without any of
// this. One whose request LetIn lets in may send its body, and other requests after it, if Keep says so.
// The package knows nothing of agents.
package door

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"math"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"github.com/opampgateway/opampgateway/internal/fair"
	"github.com/opampgateway/opampgateway/internal/forwarded"
	"github.com/opampgateway/opampgateway/internal/socket"
	"github.com/opampgateway/opampgateway/internal/telemetry"
)

// Limits are what strangers may take.
type Limits struct {
	// Headers is how many header lines a request may have.
	Headers int
	// HeaderSize is how many bytes these lines may have in all, their ends included.
	HeaderSize int
	// Connections is how many may be open at once, those that were let in included.
	Connections int
	// Strangers is how many of them may not be let in yet. Addresses share them fairly.
	Strangers int
	// Timeout is how long after it has connected a stranger's request has to be there.
	Timeout time.Duration
	// Proxies may say from where a stranger comes. Until they have, he counts as nobody's: a whole fleet may come by them.
	Proxies forwarded.Proxies
}

// flightSize is what a peer may send, in bytes, until TLS has something to say to it in turn, as long as
// they shake hands: the hello of most has less than 2 KiB, a chain of certificates a few more.
const flightSize = 16 << 10

// mostHeaderSize is above any HeaderSize. It is for the HTTP server, which sees nothing of a stranger's that the door
// does not take, and whom it keeps out of its memory once they are let in.
const mostHeaderSize = 128 << 10

// idleTimeout is how long a connection is kept between two requests where the listener sets no limit.
const idleTimeout = time.Minute

// slack is how many connections above the limits are answered that there are too many. What comes
// on top of that is closed without a word.
func (l Limits) slack() int { return max(64, l.Connections/16) }

// Door is a net.Listener for an http.Server that Prepare has prepared.
type Door struct {
	// Set once.
	patience   time.Duration // with the head of a request, by limits and by the server
	log        *zap.Logger
	turnedAway func(telemetry.Outcome)

	// What may change while it is open.
	listener atomic.Pointer[net.Listener]
	vacancy  atomic.Pointer[vacancy]    // while nobody is to come in
	secure   atomic.Pointer[tls.Config] // nil where there is no TLS
	limits   atomic.Pointer[Limits]

	open      atomic.Int64    // connections, and guests
	guests    *fair.ByAddress // those who have a place without a connection
	strangers *fair.ByAddress // their places
	slack     *fair.ByAddress // the places of those that are too many
}

// New returns a door in front of l, with TLS if secure is not nil. What the door says of strangers
// goes to log, which has to bear a flood of them. Those whom the HTTP server never sees are told to
// turnedAway, from any goroutine.
func New(l net.Listener, secure *tls.Config, limits Limits, log *zap.Logger, turnedAway func(telemetry.Outcome)) *Door {
	d := &Door{
		patience: limits.Timeout, log: log, turnedAway: turnedAway,
		strangers: fair.NewByAddress(limits.Strangers, 1), slack: fair.NewByAddress(limits.slack(), 1),
		guests: fair.NewByAddress(math.MaxInt32, 1),
	}
	d.listener.Store(&l)
	d.Change(secure, limits)
	return d
}

// Change has those who come from now on shake hands with secure, and take what limits allow. Whether there is TLS
// stays as it is, and so do Strangers and Timeout.
func (d *Door) Change(secure *tls.Config, limits Limits) {
	d.secure.Store(withoutHTTP2(secure))
	d.limits.Store(&limits)
}

// Move takes the door to l, and gives the address back that it was at. It leaves connections alone.
func (d *Door) Move(l net.Listener) {
	before := d.listener.Swap(&l)
	_ = (*before).Close() // an error concerns nobody any more
	d.wake()
}

// vacancy is a time without an address.
type vacancy struct {
	listener *net.Listener // from before
	over     chan struct{} // closed at the end
}

// Vacate gives the address back, and leaves connections alone. Accept waits for Move, or Close.
func (d *Door) Vacate() {
	l := d.listener.Load()
	d.vacancy.Store(&vacancy{listener: l, over: make(chan struct{})})
	_ = (*l).Close() // an error concerns nobody any more
}

// Vacant reports whether the address was given back, and there is no other.
func (d *Door) Vacant() bool { return d.vacancy.Load() != nil }

// wake ends a vacancy.
func (d *Door) wake() {
	if r := d.vacancy.Swap(nil); r != nil {
		close(r.over)
	}
}

// withoutHTTP2 returns config as it is needed here: an upgrade fails on HTTP/2. A configuration
// which is made for each client, as when the authorities for its certificate are read anew, is
// none of ours yet.
func withoutHTTP2(config *tls.Config) *tls.Config {
	if config == nil {
		return nil
	}
	config = config.Clone()
	config.NextProtos = []string{"http/1.1"}
	if each := config.GetConfigForClient; each != nil {
		config.GetConfigForClient = func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
			c, err := each(hello)
			if c != nil {
				c = c.Clone()
				c.NextProtos = config.NextProtos
			}
			return c, err
		}
	}
	return config
}

// Prepare has server serve what comes through the door; it is called before either is served. The
// door's limits take the place of the server's own for a request's head, but for its shorter timeout.
func (d *Door) Prepare(server *http.Server) {
	server.ConnContext = func(ctx context.Context, conn net.Conn) context.Context {
		if s, ok := conn.(interface{ self() *stranger }); ok {
			ctx = context.WithValue(ctx, contextKey{}, s.self())
		}
		return ctx
	}
	if timeout := cmp.Or(server.ReadHeaderTimeout, server.ReadTimeout); timeout > 0 {
		d.patience = min(d.patience, timeout)
	}
	server.ReadHeaderTimeout = d.patience // of further requests
	server.IdleTimeout = cmp.Or(server.IdleTimeout, server.ReadTimeout, idleTimeout)
	server.MaxHeaderBytes = maxRequestLine + mostHeaderSize
	// Otherwise the server takes "Upgrade" out of the Connection header of a 426.
	server.SetKeepAlivesEnabled(true)
	next := server.Handler
	server.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		// The door ends the connection anyway; this says so, and keeps the server from waiting for a body.
		w.Header()["Connection"] = closeToken
		if s := strangerOf(r); s != nil {
			s.hearForwarded(r)
		}
		next.ServeHTTP(w, r)
	})
}

// closeToken is shared: to add to it makes a copy.
var closeToken = []string{"close"}

type contextKey struct{}

// strangerOf returns who sent a request; nil if it did not come through a door.
func strangerOf(r *http.Request) *stranger {
	s, _ := r.Context().Value(contextKey{}).(*stranger)
	return s
}

// Accept returns the next stranger.
func (d *Door) Accept() (net.Conn, error) {
	for {
		l := d.listener.Load()
		conn, err := (*l).Accept()
		if err != nil && l != d.listener.Load() {
			continue // it has moved
		}
		if r := d.vacancy.Load(); err != nil && r != nil && r.listener == l {
			<-r.over
			continue
		}
		if err != nil {
			return nil, err
		}
		switch s := d.meet(conn); {
		case s == nil: // too many
		case s.secure != nil:
			return secured{s}, nil
		default:
			return s, nil
		}
	}
}

// Close interrupts Accept, and gives the address back. It leaves connections alone.
func (d *Door) Close() error {
	err := (*d.listener.Load()).Close()
	d.wake()
	return err
}

// Addr returns the address listened at.
func (d *Door) Addr() net.Addr { return (*d.listener.Load()).Addr() }

// Enter gives a place to somebody from this address who comes and goes, as an agent that polls, and reports whether
// there is one. Guests of one address leave places to others, as strangers do.
func (d *Door) Enter(address netip.Prefix) bool {
	free := d.limits.Load().Connections - int(d.open.Add(1))
	if free < 0 || d.guests.Held(address) > strangersPerFree*free || !d.guests.Take(address, 1) {
		d.open.Add(-1)
		return false
	}
	return true
}

// Leave gives back what Enter gave.
func (d *Door) Leave(address netip.Prefix) {
	d.guests.Give(address, 1)
	d.open.Add(-1)
}

// Open returns how many connections and guests there are now, strangers included.
func (d *Door) Open() int { return int(d.open.Load()) }

// meet gives conn a place; nil if there is none.
func (d *Door) meet(conn net.Conn) *stranger {
	limits := d.limits.Load()
	s := &stranger{
		door: d, address: fair.Address(conn.RemoteAddr()), pool: d.strangers, due: time.Now().Add(d.patience),
		head: head{maxLines: limits.Headers, maxSize: limits.HeaderSize},
	}
	take := d.strangers.Take
	if limits.Proxies.Trust(conn.RemoteAddr()) {
		s.proxies, take = &limits.Proxies, d.strangers.TakeFree
	}
	// Strangers of one address leave places to others, though a balancer may hide a whole fleet behind it.
	free := limits.Connections - int(d.open.Add(1))
	if free < 0 || s.proxies == nil && d.strangers.Held(s.address) > strangersPerFree*free {
		s.excess = tooManyConnections
	} else if !take(s.address, 1) {
		s.excess = tooManyStrangers
	}
	if s.excess != "" {
		d.log.Warn(s.excess+"; new ones are turned away", clientAddress(conn))
		s.pool = d.slack
		if !d.slack.Take(s.address, 1) {
			conn.Close()
			d.open.Add(-1)
			d.turnedAway(telemetry.OutcomeTooMany)
			return nil
		}
	}
	s.place = &place{Conn: conn, door: d, stranger: s}
	s.below = socket.Wrap(conn)
	s.below.Conn = s.place
	s.conn = s.below
	if secure := d.secure.Load(); secure != nil {
		s.secure = tls.Server(s.below, secure)
		s.conn = s.secure
	}
	return s
}

// strangersPerFree is how many strangers of one address there may be for each connection that is still
// free: alone it gets eight of nine.
const strangersPerFree = 8

const (
	tooManyConnections = "as many connections are open as agents::max_connections allows"
	tooManyStrangers   = "too many connections wait to be let in"
)

// place is what a connection takes of its door. It is below everything else, and all that is left of
// the door when the connection has been let in.
type place struct {
	net.Conn
	door   *Door
	closed atomic.Bool

	// mu guards whose the place is: what the stranger holds, too.
	mu       sync.Mutex
	stranger *stranger // nil when it is none any more

	// Owned by who reads.
	heard bool // something has come

	// Shared: whoever closes the connection may write TLS's last word.
	shaking atomic.Bool  // TLS shakes hands
	flight  atomic.Int64 // bytes of what the peer has sent for that since it was answered
}

// errLongFlight means that a peer sends too much while TLS shakes hands.
var errLongFlight = errors.New("peer's handshake message is too long")

// Read notes that something has come. TLS keeps a message of its handshake until all of it is there, and
// takes 64 KiB for a hello, and 256 KiB for certificates.
func (p *place) Read(b []byte) (int, error) {
	shaking := p.shaking.Load()
	if shaking {
		flight := int(p.flight.Load())
		if flight >= flightSize {
			return 0, errLongFlight
		}
		b = b[:min(len(b), flightSize-flight)]
	}
	n, err := p.Conn.Read(b)
	if shaking {
		p.flight.Add(int64(n))
	}
	if n > 0 && !p.heard {
		p.heard = true
	}
	return n, err
}

// Write notes that the peer is answered.
func (p *place) Write(b []byte) (int, error) {
	if p.shaking.Load() {
		p.flight.Store(0)
	}
	return p.Conn.Write(b)
}

// Close gives the place back.
func (p *place) Close() error {
	err := p.Conn.Close()
	if !p.closed.Swap(true) {
		p.door.open.Add(-1)
	}
	p.letIn()
	return err
}

// letIn gives back what the connection took as a stranger.
func (p *place) letIn() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if s := p.stranger; s != nil && s.pool != nil {
		s.pool.Give(s.address, 1)
	}
	p.stranger = nil
}

// CloseWrite says that nothing more will be written.
func (p *place) CloseWrite() error {
	c, ok := p.Conn.(interface{ CloseWrite() error })
	if !ok {
		return errors.ErrUnsupported
	}
	return c.CloseWrite()
}

func clientAddress(conn net.Conn) zap.Field {
	if addr := conn.RemoteAddr(); addr != nil {
		return telemetry.Peer("client", addr.String())
	}
	return zap.Skip()
}
