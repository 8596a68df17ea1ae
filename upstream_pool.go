package opampgateway

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"runtime"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cenkalti/backoff/v7"
	"github.com/google/uuid"
	"github.com/gorilla/websocket"
	"github.com/open-telemetry/opamp-go/protobufs"
	"go.opentelemetry.io/collector/component"
	"go.uber.org/zap"
	"google.golang.org/protobuf/proto"

	"github.com/opampgateway/opampgateway/internal/connect"
	"github.com/opampgateway/opampgateway/internal/outbox"
	"github.com/opampgateway/opampgateway/internal/socket"
	"github.com/opampgateway/opampgateway/internal/telemetry"
	"github.com/opampgateway/opampgateway/internal/wire"
)

const (
	// linkOutboxSize bounds what waits for one link, in bytes; one larger message fits too.
	linkOutboxSize = 8 << 20

	// linkReadBuffer is gorilla's read buffer for a link, which many agents' frames share.
	linkReadBuffer = 64 << 10

	// dialTimeout bounds one attempt to dial a link, handshakes included.
	dialTimeout = 30 * time.Second

	// maxRetryAfter bounds what a server's Retry-After can ask of a link.
	maxRetryAfter = 10 * time.Minute

	// linkWait is how long a new agent waits for a link while there is none: a quick restart
	// of the server costs nobody the half minute of a 503.
	linkWait = 10 * time.Second

	// patience is how long agents that lost their link wait for its slot to dial again, and
	// for further links after the first is back, before they settle elsewhere.
	patience = time.Second

	// steadyAfter is the life after which a link has proved that dialing is worth it.
	steadyAfter = time.Minute

	// askWindow and introduceWindow bound the questions in flight on one link: about new
	// agents, and about agents that came from a lost link. Two windows, so that those who
	// were in already never wait behind those who are not.
	askWindow       = 128
	introduceWindow = 64

	// answerTimeout is how long an introduction waits for its answer before it is tried again.
	answerTimeout = 20 * time.Second

	// introduceAgain is how long an agent that the server would not take just now waits, if
	// the server does not say.
	introduceAgain = 5 * time.Second

	// maxRelayedQuestions bounds the questions of other gateways in flight on one link.
	maxRelayedQuestions = 20_000
)

var (
	errNoLink    = errors.New("no link to the server")
	errCannotAsk = errors.New("server does not know the gateway capability")
	errLinkLost  = errors.New("link ended")
	errLetGo     = errors.New("agent is let go")
	errNotNow    = errors.New("server cannot take the agent just now")
	errRefused   = errors.New("server refused the agent")
	// errAgentEnded means that the agent's connection has ended by itself.
	errAgentEnded = errors.New("agent's connection has ended")
)

// upstreamPool keeps a fixed number of links to the server, and the agents attached to them.
type upstreamPool struct {
	// Set once.
	cfg     *Config
	log     *zap.Logger
	tel     *telemetry.Telemetry
	router  *router
	headers http.Header
	tls     *tls.Config
	netDial func(ctx context.Context, network, address string) (net.Conn, error)
	status  func(err error)    // told when there is no link, and with nil when the first is back; under mu, so in order
	ctx     context.Context    // ends when the gateway has nothing more to do
	stop    context.CancelFunc // ends dialing; what lives goes on
	dialing context.Context    // until stop
	slots   sync.WaitGroup
	homing  sync.WaitGroup // agents on their way to a new link

	// mu guards which links are live and who is attached to them. It is taken when
	// connections come and go, never for a frame.
	mu      sync.Mutex
	live    []*link       // by slot; nil while there is none
	count   int           // of live links
	since   time.Time     // when count last became more than 0
	changed chan struct{} // closed and renewed whenever a link comes up or goes down
	back    chan struct{} // closed and renewed whenever count becomes more than 0
	stated  []*capabilities
}

// capabilities are a server's custom capabilities. Equal ones are the same object, so that
// agents that come to another link are told again only of other ones.
type capabilities struct{ names []string }

func newUpstreamPool(ctx context.Context, cfg *Config, build component.BuildInfo, log *zap.Logger, tel *telemetry.Telemetry, r *router, status func(error)) (*upstreamPool, error) {
	tlsConfig, err := cfg.Server.TLS.LoadTLSConfig(ctx)
	if err != nil {
		return nil, fmt.Errorf("server::tls: %w", err)
	}
	headers := http.Header{}
	headers.Set("User-Agent", fmt.Sprintf("opampgateway %s/%s (%s/%s)", build.Command, build.Version, runtime.GOOS, runtime.GOARCH))
	for name, value := range cfg.Server.Headers.Iter {
		headers.Set(name, string(value))
	}
	p := &upstreamPool{
		cfg: cfg, log: log.With(zap.String("server", serverName(cfg.Server.Endpoint))), tel: tel, router: r,
		headers: headers, tls: tlsConfig, netDial: (&net.Dialer{}).DialContext, status: status,
		live: make([]*link, cfg.Server.Connections), changed: make(chan struct{}), back: make(chan struct{}),
	}
	return p, nil
}

// start fills the slots, until ctx ends.
func (p *upstreamPool) start(ctx context.Context) {
	p.ctx = ctx
	p.dialing, p.stop = context.WithCancel(ctx)
	for slot := range p.live {
		p.slots.Go(func() { p.keep(slot) })
	}
}

// keep fills one slot: it dials, serves the link while it lives, and dials again. A link that
// was lost is dialed at once, but one that does not live for long only with ever more delay.
func (p *upstreamPool) keep(slot int) {
	retry := p.cfg.Server.Retry
	delays := &backoff.ExponentialBackOff{
		InitialInterval: retry.InitialInterval, RandomizationFactor: retry.RandomizationFactor,
		Multiplier: retry.Multiplier, MaxInterval: retry.MaxInterval,
	}
	delays.Reset()
	log := p.log.With(zap.String("link", p.linkName(slot)))
	told := "" // the last failure that was logged
	for fresh := true; p.dialing.Err() == nil; {
		back := p.serverBack()
		ws, retryAfter, err := p.dial(slot)
		if err != nil {
			if p.dialing.Err() != nil {
				return
			}
			delay := max(delays.NextBackOff(), retryAfter)
			if err.Error() != told { // once per change, not per attempt
				told = err.Error()
				log.Warn("cannot connect to the server, will keep trying", zap.Error(err), zap.Duration("retry_in", delay))
				p.reportFailure(err)
			}
			if retryAfter > 0 {
				back = nil // the server wants to be left alone
			}
			select {
			case <-time.After(delay):
			case <-back: // with this link the agents of all will be spread evenly
			case <-p.dialing.Done():
			}
			continue
		}
		told = ""
		up := time.Now()
		l := newLink(p, slot, ws)
		if !p.linkUp(l) {
			ws.Close()
			return
		}
		log.Info("connected to the server")
		err = l.read()
		p.linkDown(l)
		switch {
		case p.dialing.Err() != nil:
			log.Info("disconnected from the server")
			return
		case time.Since(up) >= steadyAfter:
			fresh = true
			delays.Reset()
		}
		p.tel.Fault(telemetry.LinkLost)
		log.Warn("lost connection to the server, connecting again", zap.Error(err), zap.Duration("after", time.Since(up).Round(time.Millisecond)))
		if !fresh {
			_ = sleep(p.dialing, delays.NextBackOff())
		}
		fresh = false
	}
}

// linkName is how the link of a slot announces itself to the server.
func (p *upstreamPool) linkName(slot int) string {
	name := "upstream-" + strconv.Itoa(slot)
	if id := p.cfg.Server.AgentID; id != "" {
		name = id + "/" + name
	}
	return name
}

// dial connects one link. An error comes with how long the server asks to be left alone.
func (p *upstreamPool) dial(slot int) (ws *websocket.Conn, retryAfter time.Duration, err error) {
	ctx, cancel := context.WithTimeout(p.dialing, dialTimeout)
	defer cancel()
	// gorilla heeds the context's deadline while it shakes hands, but not its end.
	stop := func() bool { return true }
	dialer := websocket.Dialer{
		Proxy: http.ProxyFromEnvironment,
		NetDialContext: func(_ context.Context, network, address string) (net.Conn, error) {
			conn, err := p.netDial(ctx, network, address)
			if err == nil {
				stop = context.AfterFunc(ctx, func() { conn.Close() })
			}
			return conn, err
		},
		TLSClientConfig: p.tls,
		ReadBufferSize:  linkReadBuffer,
		WriteBufferPool: &sync.Pool{}, // we write past gorilla
	}
	headers := p.headers.Clone()
	headers.Set(connectionIDHeader, p.linkName(slot))
	ws, resp, err := dialer.DialContext(ctx, p.cfg.Server.Endpoint, headers)
	switch {
	case err != nil && resp != nil:
		err = fmt.Errorf("server answered %s", resp.Status)
		if resp.StatusCode == http.StatusUnauthorized || resp.StatusCode == http.StatusForbidden {
			err = fmt.Errorf("%w: it does not take the gateway's own credentials, see server::headers", err)
		}
		return nil, parseRetryAfter(resp.Header.Get("Retry-After")), err
	case err != nil:
		return nil, 0, err
	case !stop():
		ws.Close()
		return nil, 0, ctx.Err()
	}
	return ws, 0, nil
}

// reportFailure tells why there is no link, unless there is one.
func (p *upstreamPool) reportFailure(err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.count == 0 {
		p.status(fmt.Errorf("%w: %w", errNoLink, err))
	}
}

// linkUp takes l among the live; it reports false when the gateway is already stopping.
func (p *upstreamPool) linkUp(l *link) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.dialing.Err() != nil {
		return false
	}
	p.live[l.slot] = l
	if p.count++; p.count == 1 {
		p.since = time.Now()
		close(p.back)
		p.back = make(chan struct{})
		p.status(nil)
	}
	p.signalLocked()
	return true
}

// linkDown ends l, whose socket has ended, and sends its agents to look for another:
//
//  1. The socket is closed and its writer waited for, so that the server sees the end before
//     it sees the agents again.
//  2. What was not written is sorted by agent, for rehome to fetch.
//  3. Agents waiting to be let in are woken; they ask again elsewhere.
//  4. Each agent that was at home here gets a goroutine that finds it a new one. Gateways
//     are closed instead: they introduce their own agents again.
func (p *upstreamPool) linkDown(l *link) {
	for _, e := range l.outbox.Abort() {
		if e.Sender != nil && e.Kind == outbox.Message {
			l.unwritten[e.Sender] = append(l.unwritten[e.Sender], e)
		}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	close(l.ended)
	p.live[l.slot] = nil
	if p.count--; p.count == 0 && p.dialing.Err() == nil {
		p.status(errNoLink)
	}
	p.signalLocked()
	if p.dialing.Err() != nil {
		return // the agents are being let go
	}
	for a := range l.agents {
		switch {
		case a.link.Load() != l: // on its way in; it notices by itself
		case a.gateway:
			p.exileLocked(a)
			a.close(websocket.CloseServiceRestart, "connection to the server was lost")
		default:
			p.homing.Go(func() { p.rehome(a, l) })
		}
	}
}

// serverBack returns what is closed when, after a time without any link, the first is back.
func (p *upstreamPool) serverBack() <-chan struct{} {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.back
}

func (p *upstreamPool) signalLocked() {
	close(p.changed)
	p.changed = make(chan struct{})
}

// admit attaches a new agent to a link and asks the server about it.
func (p *upstreamPool) admit(ctx context.Context, a *agentConn) (connect.Result, error) {
	for {
		wait, cancel := context.WithTimeoutCause(ctx, linkWait, errNoLink)
		l, err := p.attach(wait, a, nil, time.Time{})
		cancel()
		if err != nil {
			return connect.Result{}, err
		}
		if a.question == nil {
			return connect.Result{Accept: true}, nil
		}
		result, err := l.ask(ctx, a.question, l.asking)
		if !errors.Is(err, errLinkLost) {
			return result, err
		}
	}
}

// attach counts a among the agents of the live link that has the fewest, waiting for one
// while there is none. An agent that lost a link is patient: for a moment it waits for the
// same slot, and when all were lost, until more than the first are back.
func (p *upstreamPool) attach(ctx context.Context, a *agentConn, from *link, lost time.Time) (*link, error) {
	for {
		p.mu.Lock()
		if a.ended {
			p.mu.Unlock()
			return nil, errAgentEnded
		}
		if ctx.Err() != nil { // even if there is a link
			p.mu.Unlock()
			return nil, context.Cause(ctx)
		}
		var best *link
		var wait time.Duration
		if from != nil {
			best = p.live[from.slot]
			wait = max(patience-time.Since(lost), patience-time.Since(p.since))
		}
		if best == nil && wait <= 0 {
			best = p.leastLoadedLocked()
		}
		if best != nil {
			p.detachLocked(a)
			best.agents[a] = struct{}{}
			a.attached = best
			p.mu.Unlock()
			return best, nil
		}
		changed, count := p.changed, p.count
		p.mu.Unlock()

		var patient <-chan time.Time
		if count > 0 {
			patient = time.After(wait)
		}
		select {
		case <-changed:
		case <-patient:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

func (p *upstreamPool) leastLoadedLocked() *link {
	var best *link
	for _, l := range p.live {
		if l != nil && (best == nil || len(l.agents) < len(best.agents)) {
			best = l
		}
	}
	return best
}

// settle makes l the home of a: from now on a's reader sends there. It reports false when l
// has ended, or a has.
func (p *upstreamPool) settle(a *agentConn, l *link) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.live[l.slot] != l || a.ended {
		return false
	}
	a.link.Store(l)
	p.wakeLocked(a)
	return true
}

// settleNew is settle for an agent that was just let in.
func (p *upstreamPool) settleNew(a *agentConn) {
	p.mu.Lock()
	l := a.attached
	p.mu.Unlock()
	if !p.settle(a, l) {
		p.homing.Go(func() { p.rehome(a, l) })
	}
}

// detach forgets a, whose connection has ended, and returns the link it was at home on. An
// agent without one leaves the UIDs to say goodbye for to whoever is finding it a new one.
func (p *upstreamPool) detach(a *agentConn, gone ...wire.UID) (home *link) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if l := a.attached; l != nil && a.link.Load() == l && p.live[l.slot] == l {
		home = l
	}
	p.detachLocked(a)
	a.ended, a.gone = true, gone
	return home
}

func (p *upstreamPool) detachLocked(a *agentConn) {
	if a.attached != nil {
		delete(a.attached.agents, a)
		a.attached = nil
	}
}

// awaitHome has a's reader wait until a has another home than ended.
func (p *upstreamPool) awaitHome(a *agentConn, ended *link) error {
	p.mu.Lock()
	if a.homeless == nil && a.link.Load() == ended && !a.exiled {
		a.homeless = make(chan struct{})
	}
	homeless := a.homeless
	p.mu.Unlock()
	if homeless != nil {
		select {
		case <-homeless:
		case <-p.ctx.Done():
			return p.ctx.Err()
		}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if a.exiled {
		return errLetGo
	}
	return nil
}

func (p *upstreamPool) wakeLocked(a *agentConn) {
	if a.homeless != nil {
		close(a.homeless)
		a.homeless = nil
	}
}

// exileLocked tells a's reader that there will be no home again.
func (p *upstreamPool) exileLocked(a *agentConn) {
	a.exiled = true
	p.wakeLocked(a)
}

// rehome brings a, which has lost the link from, to a new one, while a's reader waits:
//
//  1. It attaches a to a link, for which it waits as long as the grace period.
//  2. It introduces a to the server, which may refuse it for good, or just now.
//  3. It sends what a had said and was not written, in order.
//  4. It lets a's reader go on, and asks the agent for its full state, for what the lost link
//     may have taken with it.
func (p *upstreamPool) rehome(a *agentConn, from *link) {
	grace := p.cfg.Server.GracePeriod
	// Those who wait in vain do not all leave at once.
	ctx, cancel := context.WithTimeout(p.ctx, grace+rand.N(grace/2+1))
	defer cancel()
	pending, lost := from.unwritten[a], time.Now()
	for {
		l, err := p.attach(ctx, a, from, lost)
		if errors.Is(err, errAgentEnded) {
			return
		}
		if err != nil {
			p.letGo(a, telemetry.GraceOver, websocket.CloseTryAgainLater, "no connection to the server")
			return
		}
		delay, err := p.introduce(ctx, a, l)
		switch {
		case errors.Is(err, errLinkLost):
			from, lost = l, time.Now()
			continue
		case errors.Is(err, errRefused):
			a.muted.Store(true) // it is not the server's any more
			p.letGo(a, telemetry.AgentRefused, websocket.ClosePolicyViolation, "refused by the server")
			return
		case err != nil:
			_ = sleep(ctx, delay)
			continue
		}
		for len(pending) > 0 && l.outbox.Put(ctx, pending[0]) == nil {
			pending = pending[1:]
		}
		if len(pending) == 0 && p.settle(a, l) {
			a.askFullState()
			a.fullState.Store(time.Now().Add(fullStateAgain + rand.N(fullStateAgain/2)).Unix())
			return
		}
		if p.leftWhileHoming(a, l) {
			return
		}
		select {
		case <-l.ended: // what it did not write comes first
			pending = append(l.unwritten[a], pending...)
			from, lost = l, time.Now()
		case <-ctx.Done():
		}
	}
}

// leftWhileHoming reports whether a's connection has ended by itself. The server has been told
// of the agent on l, and is now told of its end.
func (p *upstreamPool) leftWhileHoming(a *agentConn, l *link) bool {
	p.mu.Lock()
	ended, gone := a.ended, a.gone
	if ended {
		p.detachLocked(a)
	}
	p.mu.Unlock()
	if ended {
		p.sayGoodbye(l, a, gone)
	}
	return ended
}

// introduce tells the server about an agent that came from a lost link. An error other than
// errLinkLost and errRefused comes with how long to wait before the next try.
func (p *upstreamPool) introduce(ctx context.Context, a *agentConn, l *link) (delay time.Duration, err error) {
	if a.question == nil {
		return 0, nil
	}
	ctx, cancel := context.WithTimeout(ctx, answerTimeout)
	defer cancel()
	result, err := l.ask(ctx, a.question, l.introducing)
	switch status := result.RefusalStatus(); {
	case errors.Is(err, errCannotAsk):
		return introduceAgain, err
	case err != nil:
		return 0, err
	case result.Accept:
		return 0, nil
	case status == http.StatusTooManyRequests || status == http.StatusServiceUnavailable:
		return max(introduceAgain, parseRetryAfter(result.Headers["Retry-After"])), errNotNow
	default:
		return 0, errRefused
	}
}

// letGo closes an agent that has no home, unless its connection has ended anyway.
func (p *upstreamPool) letGo(a *agentConn, reason telemetry.Reason, code int, text string) {
	if p.ctx.Err() != nil {
		return
	}
	p.tel.Fault(reason)
	p.log.Debug("letting agent go", zap.String("reason", text), zap.String("remote_address", a.remote))
	p.mu.Lock()
	p.exileLocked(a)
	p.mu.Unlock()
	a.close(code, text)
}

// sayGoodbye tells the server on l that agents of a have left, unless they turn up again first.
func (p *upstreamPool) sayGoodbye(l *link, a *agentConn, gone []wire.UID) {
	format := a.format.Load()
	if l == nil || format == nil || a.muted.Load() || !p.cfg.Agents.SendDisconnect {
		return
	}
	for _, uid := range gone {
		back := func() bool { return p.router.has(uid) }
		if l.outbox.Put(p.ctx, entry{Frame: format.Goodbye(uid), Kind: outbox.Message, Stale: back}) != nil {
			return // the link's end says it
		}
	}
}

// anyLink returns the link with the fewest agents, nil if none is live.
func (p *upstreamPool) anyLink() *link {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.leastLoadedLocked()
}

func (p *upstreamPool) links() []*link {
	p.mu.Lock()
	defer p.mu.Unlock()
	links := make([]*link, 0, len(p.live))
	for _, l := range p.live {
		if l != nil {
			links = append(links, l)
		}
	}
	return links
}

// sweep pings quiet links and ends silent ones; their slots dial again.
func (p *upstreamPool) sweep(now time.Time, limits sweepLimits) {
	for _, l := range p.links() {
		switch quiet := l.sock.Sweep(); {
		case quiet >= limits.close:
			p.tel.Fault(telemetry.LinkSilent)
			p.log.Warn("no sign of life from the server; closing the connection", zap.String("link", p.linkName(l.slot)))
			l.sock.Close()
		case quiet >= limits.ping:
			_ = l.outbox.Try(entry{Kind: outbox.Ping})
		}
		l.forgetOldQuestions(now)
	}
}

// finish ends dialing and closes the links, once what waits has been written or ctx is done.
func (p *upstreamPool) finish(ctx context.Context) {
	p.stop()
	for _, l := range p.links() {
		l.outbox.Drain(ctx)
		// The server's answer, or a moment, ends the reader. Until then what we wrote is read.
		l.outbox.Close(websocket.FormatCloseMessage(websocket.CloseNormalClosure, ""))
	}
	p.slots.Wait()
}

// link is one WebSocket to the server.
type link struct {
	// Set once.
	pool   *upstreamPool
	slot   int
	sock   *socket.Socket
	outbox *outbox.Outbox[*agentConn]
	ended  chan struct{} // closed when it is not live any more
	// asking and introducing hold one token per question in flight.
	asking, introducing chan struct{}
	// unwritten is what of each agent was not written; to be read once ended is closed.
	unwritten map[*agentConn][]entry

	// Guarded by upstreamPool.mu.
	agents map[*agentConn]struct{}

	// Shared.
	caps        atomic.Pointer[capabilities] // as stated on this link; nil until then
	pausedUntil atomic.Int64                 // no questions until then, Unix nanoseconds
	toldNoUID   atomic.Bool                  // that the server names nobody was logged

	// mu guards the questions. Askers and relayed questions are forgotten with the link.
	mu        sync.Mutex
	asked     map[string]chan<- connect.Result // by request_uid; buffered, and sent to once
	relayed   map[string]relayedQuestion       // by request_uid
	answered  bool                             // the server has answered a question
	deaf      chan struct{}                    // closed when the server turned out not to understand questions
	deafKnown bool
}

// relayedQuestion is a question asked by another gateway below.
type relayedQuestion struct {
	gateway *agentConn
	expires time.Time
}

func newLink(p *upstreamPool, slot int, ws *websocket.Conn) *link {
	l := &link{
		pool: p, slot: slot,
		ended:     make(chan struct{}),
		asking:    make(chan struct{}, askWindow),
		unwritten: map[*agentConn][]entry{}, agents: map[*agentConn]struct{}{},
		introducing: make(chan struct{}, introduceWindow),
		asked:       map[string]chan<- connect.Result{}, relayed: map[string]relayedQuestion{},
		deaf: make(chan struct{}),
	}
	l.outbox = outbox.New(l, linkOutboxSize)
	l.sock = socket.New(ws, true, p.cfg.MaxMessageSize, writeTimeout, func(payload []byte) {
		_ = l.outbox.Try(entry{Frame: payload, Kind: outbox.Pong})
	})
	return l
}

// read is the link's reader: it takes each frame to whom it is for, and waits for nobody. It
// returns when the connection has ended.
func (l *link) read() error {
	for {
		frame, err := l.sock.Read()
		switch {
		case err == nil:
			l.relay(frame)
		case errors.Is(err, socket.ErrTooLarge):
			l.pool.tel.Fault(telemetry.ServerTooLarge)
		case errors.Is(err, socket.ErrText):
			l.pool.tel.Fault(telemetry.ServerBadFrame)
		default:
			var closed *websocket.CloseError
			if errors.As(err, &closed) && closed.Code != websocket.CloseAbnormalClosure {
				l.outbox.Close(closeReply(closed.Code))
				l.outbox.Drain(l.pool.ctx) // for a moment at most
			}
			return err
		}
	}
}

// relay takes one frame from the server to the agent it names.
func (l *link) relay(frame []byte) {
	taken := clock()
	f, err := wire.ScanServerToAgent(frame)
	if err != nil {
		l.pool.tel.Fault(telemetry.ServerBadFrame)
		return
	}
	if f.CustomMessage != nil {
		if kind, data := connect.Message(f.CustomMessage); kind == connect.ConnectResult {
			l.noteCapabilities(frame, &f)
			l.answer(frame, &f, data, taken)
			return
		}
	}
	if f.UID == nil {
		l.takeUnaddressed(frame, &f)
		return
	}
	a, way := l.pool.router.find(f.UID)
	if a == nil {
		l.pool.tel.Fault(telemetry.ServerUnknownUID)
		return
	}
	l.noteCapabilities(frame, &f)
	untold := l.untoldCapabilities(a, way, &f) // a new UID inherits what the agent has heard
	if f.Has(wire.FieldAgentIdentification) {
		l.rename(frame, way)
	}
	a.deliver(frame, taken)
	if untold != nil {
		a.sendOwn(untold)
	}
}

// rename heeds an agent_identification: the agent is to be found under its new UID at once.
func (l *link) rename(frame []byte, way *route) {
	message, err := decode(frame)
	if err != nil {
		return // the agent will say so
	}
	uid, err := wire.ParseUID(message.GetAgentIdentification().GetNewInstanceUid())
	if err != nil {
		return
	}
	if err := l.pool.router.rename(way, uid); err != nil {
		l.pool.tel.Fault(telemetry.TooManyUIDs)
	}
}

// noteCapabilities remembers the server's custom capabilities, which it states once per
// WebSocket, in whatever it says first.
func (l *link) noteCapabilities(frame []byte, f *wire.Fields) {
	if l.caps.Load() != nil || !f.Has(wire.FieldCustomCapabilities) {
		return
	}
	if message, err := decode(frame); err == nil {
		l.caps.Store(l.pool.intern(message.GetCustomCapabilities().GetCapabilities()))
	}
}

// intern returns the one object for these capabilities.
func (p *upstreamPool) intern(names []string) *capabilities {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, known := range p.stated {
		if slices.Equal(known.names, names) {
			return known
		}
	}
	caps := &capabilities{names: names}
	p.stated = append(p.stated, caps)
	return caps
}

// untoldCapabilities returns a frame that tells the agent behind way of the server's custom
// capabilities, to follow f, the first frame that goes there; nil if the agent has heard them.
func (l *link) untoldCapabilities(a *agentConn, way *route, f *wire.Fields) []byte {
	caps := l.caps.Load()
	if caps == nil || a.gateway || way.told.Load() == caps {
		return nil
	}
	told := way.told.Swap(caps)
	format := a.format.Load()
	if f.Has(wire.FieldCustomCapabilities) || (told == nil && len(caps.names) == 0) || format == nil || format.Legacy {
		return nil
	}
	return format.CustomCapabilities(way.uid, caps.names)
}

// takeUnaddressed takes a frame that says not whom it is for. On a link shared by many agents
// nobody can tell.
func (l *link) takeUnaddressed(frame []byte, f *wire.Fields) {
	if f.Empty() {
		return // only keeps the connection alive
	}
	message, err := decode(frame)
	if err != nil {
		l.pool.tel.Fault(telemetry.ServerBadFrame)
		return
	}
	l.noteCapabilities(frame, f)
	failure := message.GetErrorResponse()
	switch {
	case failure.GetType() == protobufs.ServerErrorResponseType_ServerErrorResponseType_Unavailable && failure != nil:
		delay := min(time.Duration(failure.GetRetryInfo().GetRetryAfterNanoseconds()), maxRetryAfter)
		l.pausedUntil.Store(time.Now().Add(max(delay, time.Second)).UnixNano())
	case f.Has(wire.FieldCustomCapabilities) || failure != nil:
		// An ordinary answer to a question.
		if !slices.Contains(message.GetCustomCapabilities().GetCapabilities(), connect.Capability) {
			l.giveUpAsking()
		}
	default:
		l.pool.tel.Fault(telemetry.ServerNoUID)
		if !l.toldNoUID.Swap(true) {
			l.pool.log.Warn("server sends messages without instance_uid; nobody can tell which agent they are for, so they are dropped",
				zap.String("link", l.pool.linkName(l.slot)))
		}
	}
}

// giveUpAsking notes that the server does not understand questions, and wakes all who wait
// for an answer. Servers that have answered one do.
func (l *link) giveUpAsking() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.answered || l.deafKnown || len(l.asked) == 0 {
		return
	}
	l.deafKnown = true
	close(l.deaf)
	l.pool.log.Error("server does not know the capability "+connect.Capability+", so it cannot be asked which agents may connect, and none is let in; "+
		"use a server that knows it, or set server::agent_admission: accept and protect the listener with listener::auth or mutual TLS",
		zap.String("link", l.pool.linkName(l.slot)))
}

// ask asks the server whether an agent may connect. window bounds the questions in flight. The
// error is errLinkLost, errCannotAsk, or that of ctx.
func (l *link) ask(ctx context.Context, question connect.Question, window chan struct{}) (connect.Result, error) {
	select {
	case <-l.deaf: // even if the window is open
		return connect.Result{}, errCannotAsk
	default:
	}
	select {
	case window <- struct{}{}:
		defer func() { <-window }()
	case <-l.ended:
		return connect.Result{}, errLinkLost
	case <-l.deaf:
		return connect.Result{}, errCannotAsk
	case <-ctx.Done():
		return connect.Result{}, ctx.Err()
	}
	if pause := time.Until(time.Unix(0, l.pausedUntil.Load())); pause > 0 {
		if err := sleep(ctx, pause); err != nil {
			return connect.Result{}, err
		}
	}
	requestUID := uuid.NewString()
	frame, err := question.Frame(requestUID)
	if err != nil {
		return connect.Result{}, err
	}
	answer := make(chan connect.Result, 1)
	l.mu.Lock()
	l.asked[requestUID] = answer
	l.mu.Unlock()
	defer func() {
		l.mu.Lock()
		delete(l.asked, requestUID)
		l.mu.Unlock()
	}()
	nobodyWaits := func() bool { return ctx.Err() != nil }
	err = l.outbox.Put(ctx, entry{Frame: frame, Kind: outbox.Message, Stale: nobodyWaits})
	switch {
	case errors.Is(err, outbox.ErrClosed):
		<-l.ended // its reader is about to find out
		return connect.Result{}, errLinkLost
	case err != nil:
		return connect.Result{}, err
	}
	select {
	case result := <-answer:
		return result, nil
	case <-l.ended:
		return connect.Result{}, errLinkLost
	case <-l.deaf:
		return connect.Result{}, errCannotAsk
	case <-ctx.Done():
		return connect.Result{}, ctx.Err()
	}
}

// answer takes a connectResult to whoever asked: one of ours, or a gateway below.
func (l *link) answer(frame []byte, f *wire.Fields, data []byte, taken int64) {
	requestUID, err := connect.RequestUID(data)
	if err != nil {
		l.pool.tel.Fault(telemetry.ServerBadFrame)
		return
	}
	l.mu.Lock()
	l.answered = true
	asker := l.asked[requestUID]
	delete(l.asked, requestUID)
	below, relayed := l.relayed[requestUID]
	delete(l.relayed, requestUID)
	l.mu.Unlock()
	switch {
	case asker != nil:
		asker <- connect.ParseResult(data)
	case relayed:
		a := below.gateway
		if caps := l.caps.Load(); caps != nil && a.told.Swap(caps) != caps && !f.Has(wire.FieldCustomCapabilities) {
			a.sendOwn(wire.Format{Header: true}.CustomCapabilities(wire.UID{}, caps.names))
		}
		a.deliver(frame, taken)
	default:
		l.pool.tel.Fault(telemetry.ServerStray)
	}
}

// expectFor notes that the gateway below asked under requestUID, so that it gets the answer.
func (l *link) expectFor(requestUID string, gateway *agentConn) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.relayed) < maxRelayedQuestions {
		l.relayed[requestUID] = relayedQuestion{gateway, time.Now().Add(l.pool.cfg.Server.AdmissionTimeout)}
	}
}

// forgetOldQuestions forgets what gateways below have stopped waiting for.
func (l *link) forgetOldQuestions(now time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for requestUID, question := range l.relayed {
		if now.After(question.expires) {
			delete(l.relayed, requestUID)
		}
	}
}

// WriteBatch writes to the link's socket; the outbox calls it.
func (l *link) WriteBatch(batch []entry) (int, error) {
	n, err := socket.WriteBatch(l.sock, batch)
	countRelayed(&l.pool.tel.Up, batch[:n])
	return n, err
}

// Hurry bounds what the connection may still take; the outbox calls it.
func (l *link) Hurry() { l.sock.Hurry() }

// Close ends the connection; the outbox calls it.
func (l *link) Close() { l.sock.Close() }

// decode reads a server's frame in full; only the few that concern the hop are.
func decode(frame []byte) (*protobufs.ServerToAgent, error) {
	if frame[0] == 0 {
		frame = frame[1:]
	}
	var message protobufs.ServerToAgent
	if err := proto.Unmarshal(frame, &message); err != nil {
		return nil, err
	}
	return &message, nil
}

// parseRetryAfter reads a Retry-After header: seconds, or a date; 0 if there is none.
func parseRetryAfter(value string) time.Duration {
	if value == "" {
		return 0
	}
	if seconds, err := strconv.Atoi(value); err == nil {
		return min(max(0, time.Duration(min(seconds, 1<<30))*time.Second), maxRetryAfter)
	}
	if at, err := http.ParseTime(value); err == nil {
		return min(max(0, time.Until(at)), maxRetryAfter)
	}
	return 0
}

// serverName is the endpoint as it may be logged: a query may hold a token.
func serverName(endpoint string) string {
	u, err := url.Parse(endpoint)
	if err != nil {
		return ""
	}
	return u.Scheme + "://" + u.Host + u.Path
}
