package opampgateway

import (
	"bufio"
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
	"github.com/opampgateway/opampgateway/internal/memory"
	"github.com/opampgateway/opampgateway/internal/outbox"
	"github.com/opampgateway/opampgateway/internal/socket"
	"github.com/opampgateway/opampgateway/internal/telemetry"
	"github.com/opampgateway/opampgateway/internal/wire"
)

const (
	// linkOutboxSize bounds what waits for one link, in bytes; one larger message fits too.
	linkOutboxSize = 8 << 20

	// linkWriteTimeout is how long a write to the server may go without progress. Keep-alive is
	// mostly sooner.
	linkWriteTimeout = 30 * time.Second

	// linkReadBuffer is what is read at once from a link, which many agents' frames share.
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

	// maxStated is how many lists of capabilities are remembered; more than one is rare.
	maxStated = 16

	// maxRelayedQuestions bounds the questions of other gateways in flight on one link.
	maxRelayedQuestions = 20_000
)

var (
	errNoLink    = errors.New("no link to the server")
	errCannotAsk = errors.New("server does not know the gateway capability")
	errLinkLost  = errors.New("link ended")
	errUntold    = errors.New("nothing told yet")
	errLetGo     = errors.New("agent is let go")
	errNotNow    = errors.New("server cannot take the agent just now")
	errRefused   = errors.New("server refused the agent")
	// errAgentEnded means that the agent's connection has ended by itself.
	errAgentEnded = errors.New("agent's connection has ended")
)

// upstreamPool keeps a fixed number of links to the server, and the agents attached to them.
type upstreamPool struct {
	// Set once.
	cfg      *Config
	log      *zap.Logger
	tel      *telemetry.Telemetry
	router   *router
	memory   *memory.Budget
	endpoint *url.URL
	headers  http.Header
	tls      *tls.Config
	netDial  func(ctx context.Context, network, address string) (net.Conn, error)
	status   func(err error)    // told why there is no link, and with nil that there is one
	ctx      context.Context    // ends when the gateway has nothing more to do
	stop     context.CancelFunc // ends dialing; what lives goes on
	dialing  context.Context    // until stop
	slots    sync.WaitGroup
	homing   sync.WaitGroup // agents on their way to a new link

	// mu guards which links are live and who is attached to them. It is taken when
	// connections come and go, never for a frame.
	mu      sync.Mutex
	live    []*link       // by slot; nil while there is none
	count   int           // of live links
	since   time.Time     // when count last became more than 0
	changed chan struct{} // closed and renewed whenever a link comes up or goes down
	back    chan struct{} // closed and renewed whenever count becomes more than 0
	failure error         // why there is no link; kept while there is one
	report  chan struct{} // holds a token when there is something to tell
	stated  []*capabilities
}

// capabilities are a server's custom capabilities. Equal ones are the same object, so that
// agents that come to another link are told again only of other ones.
type capabilities struct{ names []string }

func newUpstreamPool(ctx context.Context, cfg *Config, build component.BuildInfo, log *zap.Logger, tel *telemetry.Telemetry, r *router, budget *memory.Budget, status func(error)) (*upstreamPool, error) {
	tlsConfig, err := cfg.Server.TLS.LoadTLSConfig(ctx)
	if err != nil {
		return nil, fmt.Errorf("server::tls: %w", err)
	}
	endpoint, err := url.Parse(cfg.Server.Endpoint)
	if err != nil {
		return nil, errors.New("server::endpoint: is not a URL") // Validate says more
	}
	headers := http.Header{}
	headers.Set("User-Agent", fmt.Sprintf("opampgateway %s/%s (%s/%s)", build.Command, build.Version, runtime.GOOS, runtime.GOARCH))
	for name, value := range cfg.Server.Headers.Iter {
		headers.Set(name, string(value))
	}
	p := &upstreamPool{
		cfg: cfg, log: log.With(zap.String("server", serverName(endpoint))), tel: tel, router: r, memory: budget,
		endpoint: endpoint, headers: headers, tls: tlsConfig, netDial: (&net.Dialer{}).DialContext, status: status,
		live: make([]*link, cfg.Server.Connections), changed: make(chan struct{}), back: make(chan struct{}),
		report: make(chan struct{}, 1), failure: errNoLink,
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
	p.slots.Go(p.tellStatus)
}

// tellStatus tells the collector whether there is a link, until dialing ends. Nobody waits for
// it, whatever others do when they are told.
func (p *upstreamPool) tellStatus() {
	told := errUntold
	overdue := time.After(linkWait) // even if no attempt has failed until then
	for {
		select {
		case <-p.report:
		case <-overdue:
		case <-p.dialing.Done():
			return
		}
		p.mu.Lock()
		now := p.failure
		if p.count > 0 {
			now = nil
		}
		p.mu.Unlock()
		if now != told { //nolint:errorlint // whether it is the one that was told, not what kind it is
			told = now
			p.status(now)
		}
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
	logged := "" // the reason of the last failure logged
	for dialAtOnce := true; p.dialing.Err() == nil; {
		back := p.serverBack()
		l, retryAfter, err := p.dial(slot)
		if err != nil {
			if p.dialing.Err() != nil {
				return
			}
			delay := max(delays.NextBackOff(), retryAfter)
			if reason := failureReason(err); reason != logged { // once per change, not per attempt
				logged = reason
				log.Warn("cannot connect to the server, will keep trying", zap.Error(err), zap.Duration("retry_in", delay))
				p.mu.Lock()
				p.reportLocked(fmt.Errorf("%w: %w", errNoLink, err))
				p.mu.Unlock()
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
		logged = ""
		up := time.Now()
		if !p.linkUp(l) {
			l.outbox.Abort()
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
			dialAtOnce = true
			delays.Reset()
		}
		p.tel.Fault(telemetry.ReasonLinkLost)
		log.Warn("lost connection to the server, connecting again", zap.Error(err), zap.Duration("after", time.Since(up).Round(time.Millisecond)))
		if !dialAtOnce {
			_ = sleep(p.dialing, delays.NextBackOff())
		}
		dialAtOnce = false
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
func (p *upstreamPool) dial(slot int) (l *link, retryAfter time.Duration, err error) {
	ctx, cancel := context.WithTimeout(p.dialing, dialTimeout)
	defer cancel()
	headers := p.headers.Clone()
	headers.Set(connectionIDHeader, p.linkName(slot))
	dialer := socket.Dialer{NetDial: p.netDial, TLS: p.tls, ReadBufferSize: linkReadBuffer}
	conn, in, answer, err := dialer.Dial(ctx, p.endpoint, headers) //nolint:bodyclose // it is in memory
	switch {
	case err != nil && answer != nil:
		err = fmt.Errorf("server answered %s", answer.Status)
		if answer.StatusCode == http.StatusUnauthorized || answer.StatusCode == http.StatusForbidden {
			err = fmt.Errorf("%w: it does not take the gateway's own credentials, see server::headers", err)
		}
		return nil, parseRetryAfter(answer.Header.Get("Retry-After")), err
	case err != nil:
		return nil, 0, err
	}
	return newLink(p, slot, conn, in), 0, nil
}

// reportLocked has the status told if it has changed, with the reason if there is no link.
func (p *upstreamPool) reportLocked(failure error) {
	p.failure = failure
	select {
	case p.report <- struct{}{}:
	default:
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
		p.reportLocked(errNoLink)
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
	if p.count--; p.count == 0 {
		p.reportLocked(errNoLink)
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
		l, err := p.attach(ctx, a, nil, time.Time{})
		if err != nil {
			return connect.Result{}, err
		}
		if a.question == nil {
			return connect.Result{Accept: true}, nil
		}
		result, err := l.ask(ctx, a.question, l.asking, 0)
		if !errors.Is(err, errLinkLost) {
			return result, err
		}
	}
}

// attach counts a among the agents of the live link that has the fewest, waiting for one
// while there is none: not for long, if the agent is new. An agent that lost a link is patient:
// for a moment it waits for the same slot, and when all were lost, until more than the first
// are back.
func (p *upstreamPool) attach(ctx context.Context, a *agentConn, from *link, lost time.Time) (*link, error) {
	var tooLong <-chan time.Time
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
		if from == nil && tooLong == nil {
			tooLong = time.After(linkWait)
		}
		select {
		case <-changed:
		case <-patient:
		case <-tooLong:
			return nil, errNoLink
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
// agent without one leaves whom to say goodbye for to whoever is finding it a new one.
func (p *upstreamPool) detach(a *agentConn, gone []*hold) (home *link) {
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
func (p *upstreamPool) awaitHome(ctx context.Context, a *agentConn, ended *link) error {
	p.mu.Lock()
	if a.homeless == nil && a.link.Load() == ended && !a.exiled {
		a.homeless = make(chan struct{})
	}
	homeless := a.homeless
	p.mu.Unlock()
	if homeless != nil {
		select {
		case <-homeless:
		case <-ctx.Done():
			return ctx.Err()
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

// dismissHomeless ends the wait of those whose reader waits for a link while there is none.
func (p *upstreamPool) dismissHomeless(agents []*agentConn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, a := range agents {
		if a.homeless != nil && p.count == 0 {
			p.exileLocked(a)
		}
	}
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
	p.hold(pending)
	defer func() { p.letLoose(pending) }()
	for {
		l, err := p.attach(ctx, a, from, lost)
		if errors.Is(err, errAgentEnded) {
			return
		}
		if err != nil {
			p.letGo(a, telemetry.ReasonGraceOver, websocket.CloseTryAgainLater, "no connection to the server")
			return
		}
		delay, err := p.introduce(ctx, a, l)
		switch {
		case errors.Is(err, errLinkLost):
			from, lost = l, time.Now()
			continue
		case errors.Is(err, errRefused):
			a.muted.Store(true) // it is not the server's any more
			p.letGo(a, telemetry.ReasonAgentRefused, websocket.ClosePolicyViolation, "refused by the server")
			return
		case err != nil:
			_ = sleep(ctx, delay)
			continue
		}
		for len(pending) > 0 && l.outbox.Put(ctx, pending[0]) == nil {
			p.letLoose(pending[:1])
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
		select { // so l has ended, or a's time is over
		case <-l.ended:
			p.hold(l.unwritten[a])
			pending = append(l.unwritten[a], pending...) // what l did not write comes first
			from, lost = l, time.Now()
		case <-ctx.Done():
		}
	}
}

// hold counts the memory of entries that are in no outbox, until letLoose.
func (p *upstreamPool) hold(entries []entry) {
	for i := range entries {
		p.memory.Up.Take(entries[i].Memory())
	}
}

func (p *upstreamPool) letLoose(entries []entry) {
	for i := range entries {
		p.memory.Up.Give(entries[i].Memory())
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
	result, err := l.ask(ctx, a.question, l.introducing, answerTimeout)
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
func (p *upstreamPool) sayGoodbye(l *link, a *agentConn, gone []*hold) {
	if l == nil || a.muted.Load() || !p.cfg.Agents.SendDisconnect {
		return
	}
	for _, h := range gone {
		uid := h.route.uid
		back := func() bool { return p.router.has(uid) }
		if l.outbox.Put(p.ctx, entry{Frame: h.format.Goodbye(uid), Kind: outbox.Message, Stale: back}) != nil {
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
			p.tel.Fault(telemetry.ReasonLinkSilent)
			p.log.Warn("no sign of life from the server; closing the connection", zap.String("link", p.linkName(l.slot)))
			l.sock.Close()
		case quiet >= limits.ping:
			_ = l.outbox.Try(entry{Kind: outbox.Ping})
		}
		l.forgetOldQuestions(now)
	}
}

// finish ends dialing and closes the links. What waits is written, until drained is done; then
// the server has until ctx is done to read it and to answer the close frame.
func (p *upstreamPool) finish(ctx, drained context.Context) {
	p.stop()
	links := p.links()
	defer context.AfterFunc(ctx, func() {
		for _, l := range links {
			l.sock.Close()
		}
	})()
	for _, l := range links {
		l.outbox.Drain(drained)
		l.outbox.Close(websocket.FormatCloseMessage(websocket.CloseGoingAway, "gateway is shutting down"))
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
	deaf        chan struct{}                // closed when the server turns out not to understand questions

	// Owned by the reader.
	complaints int  // errors that name nobody
	toldNoUID  bool // that the server names nobody was logged

	// mu guards the questions. Askers and relayed questions are forgotten with the link.
	mu       sync.Mutex
	asked    map[string]chan<- connect.Result // by request_uid; buffered, and sent to once
	relayed  map[string]relayedQuestion       // by request_uid
	hasAsked bool                             // we have asked a question
	answered bool                             // the server has answered one, or never will
}

// relayedQuestion is a question asked by another gateway below.
type relayedQuestion struct {
	gateway *agentConn
	expires time.Time
}

func newLink(p *upstreamPool, slot int, conn net.Conn, in *bufio.Reader) *link {
	l := &link{
		pool: p, slot: slot,
		ended:     make(chan struct{}),
		asking:    make(chan struct{}, askWindow),
		unwritten: map[*agentConn][]entry{}, agents: map[*agentConn]struct{}{},
		introducing: make(chan struct{}, introduceWindow),
		asked:       map[string]chan<- connect.Result{}, relayed: map[string]relayedQuestion{},
		deaf: make(chan struct{}),
	}
	l.outbox = outbox.NewForLink(l, linkOutboxSize, &p.memory.Up)
	l.sock = socket.New(conn, in, true, p.cfg.MaxMessageSize, linkWriteTimeout, l, func(payload []byte) {
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
			l.pool.tel.Fault(telemetry.ReasonServerTooLarge)
		case errors.Is(err, socket.ErrText):
			l.pool.tel.Fault(telemetry.ReasonServerBadFrame)
		default:
			var closed *websocket.CloseError
			if errors.As(err, &closed) && closed.Code != websocket.CloseAbnormalClosure {
				l.outbox.Reply(closeReply(closed.Code))
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
		l.pool.tel.Fault(telemetry.ReasonServerBadFrame)
		return
	}
	if f.CustomMessage != nil {
		if kind, data := connect.Message(f.CustomMessage); kind == connect.ConnectResult {
			l.answer(frame, &f, data, taken)
			return
		}
	}
	if len(f.UID) == 0 {
		l.takeUnaddressed(frame, &f)
		return
	}
	h := l.pool.router.find(f.UID)
	if h == nil {
		l.pool.tel.Fault(telemetry.ReasonServerUnknownUID)
		l.sock.Drop(frame)
		return
	}
	l.noteCapabilities(frame, &f)
	untold := l.untoldCapabilities(h, &f) // a new UID inherits what the agent has heard
	if f.Has(wire.FieldAgentIdentification) {
		l.rename(frame, h)
	}
	if !h.agent.deliver(frame, taken) {
		l.sock.Drop(frame)
		return
	}
	if untold != nil {
		h.agent.sendOwn(untold)
	}
}

// rename heeds an agent_identification: the agent is to be found under its new UID at once.
func (l *link) rename(frame []byte, h *hold) {
	message, err := decode(frame)
	if err != nil {
		return // the agent will say so
	}
	uid, err := wire.ParseUID(message.GetAgentIdentification().GetNewInstanceUid())
	if err != nil {
		return
	}
	if err := l.pool.router.rename(h, uid); err != nil {
		l.pool.tel.Fault(telemetry.ReasonTooManyUIDs)
	}
}

// noteCapabilities remembers the server's custom capabilities, which it states once per
// WebSocket, in whatever it says first. A server that was asked, says this, and neither
// answers nor knows the capability will never answer.
func (l *link) noteCapabilities(frame []byte, f *wire.Fields) {
	if l.caps.Load() != nil || !f.Has(wire.FieldCustomCapabilities) {
		return
	}
	message, err := decode(frame)
	if err != nil {
		return
	}
	names := message.GetCustomCapabilities().GetCapabilities()
	l.caps.Store(l.pool.intern(names))
	if !slices.Contains(names, connect.Capability) {
		l.giveUpAsking()
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
	p.stated = append(p.stated[max(0, len(p.stated)+1-maxStated):], caps)
	return caps
}

// untoldCapabilities returns a frame that tells the agent of h of the server's custom
// capabilities, to follow f, the first frame that goes there; nil if the agent has heard them.
func (l *link) untoldCapabilities(h *hold, f *wire.Fields) []byte {
	caps := l.caps.Load()
	if caps == nil || h.agent.gateway || h.told.Load() == caps {
		return nil
	}
	told := h.told.Swap(caps)
	if f.Has(wire.FieldCustomCapabilities) || (told == nil && len(caps.names) == 0) || h.format.Legacy {
		return nil
	}
	return h.format.CustomCapabilities(h.route.uid, caps.names)
}

// takeUnaddressed takes a frame that says not whom it is for. On a link shared by many agents
// nobody can tell.
func (l *link) takeUnaddressed(frame []byte, f *wire.Fields) {
	if f.Empty() {
		return // only keeps the connection alive
	}
	message, err := decode(frame)
	if err != nil {
		l.pool.tel.Fault(telemetry.ReasonServerBadFrame)
		return
	}
	l.noteCapabilities(frame, f)
	failure := message.GetErrorResponse()
	switch {
	case failure.GetType() == protobufs.ServerErrorResponseType_ServerErrorResponseType_Unavailable && failure != nil:
		delay := min(time.Duration(failure.GetRetryInfo().GetRetryAfterNanoseconds()), maxRetryAfter)
		l.pausedUntil.Store(time.Now().Add(max(delay, time.Second)).UnixNano())
	case failure != nil:
		// Once may be an accident; twice, the server takes questions for bad requests.
		if l.complaints++; l.complaints == 2 {
			l.giveUpAsking()
		}
	case f.Has(wire.FieldCustomCapabilities): // noted
	default:
		l.pool.tel.Fault(telemetry.ReasonServerNoUID)
		if !l.toldNoUID {
			l.toldNoUID = true
			l.pool.log.Warn("server sends messages without instance_uid; nobody can tell which agent they are for, so they are dropped",
				zap.String("link", l.pool.linkName(l.slot)))
		}
	}
}

// giveUpAsking notes that the server does not understand questions, and wakes all who wait
// for an answer. It does nothing if no question was asked, or one was answered.
func (l *link) giveUpAsking() {
	l.mu.Lock()
	giveUp := l.hasAsked && !l.answered
	l.answered = l.answered || giveUp // nothing else is to be expected
	l.mu.Unlock()
	if !giveUp {
		return
	}
	close(l.deaf)
	l.pool.log.Warn("server does not know the capability "+connect.Capability+", so it cannot be asked which agents may connect, and none is let in; "+
		"use a server that knows it, or set server::agent_admission: accept and protect the listener with listener::auth or mutual TLS",
		zap.String("link", l.pool.linkName(l.slot)))
}

// ask asks the server whether an agent may connect, within the given time, if there is one, once it
// is its turn: window bounds the questions in flight. The error is errLinkLost, errCannotAsk, or that of
// ctx, which is context.DeadlineExceeded when there was no answer in time.
func (l *link) ask(ctx context.Context, question connect.Question, window chan struct{}, within time.Duration) (connect.Result, error) {
	if err := l.awaitTurn(ctx, window); err != nil {
		return connect.Result{}, err
	}
	defer func() { <-window }()
	if within > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, within)
		defer cancel()
	}
	requestUID := uuid.NewString()
	frame, err := question.Frame(requestUID)
	if err != nil {
		return connect.Result{}, err
	}
	answer := make(chan connect.Result, 1)
	l.mu.Lock()
	l.asked[requestUID] = answer
	l.hasAsked = true
	l.mu.Unlock()
	defer func() {
		l.mu.Lock()
		delete(l.asked, requestUID)
		l.mu.Unlock()
	}()
	nobodyWaits := func() bool { return ctx.Err() != nil }
	err = l.outbox.Put(ctx, entry{Frame: frame, Kind: outbox.Message, Stale: nobodyWaits})
	if err != nil && !errors.Is(err, outbox.ErrClosed) { // closed: its reader is about to find out
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

// awaitTurn waits for a token of window, and until the server takes questions. The caller
// gives the token back, unless there is an error.
func (l *link) awaitTurn(ctx context.Context, window chan struct{}) error {
	select {
	case window <- struct{}{}:
	case <-l.ended:
		return errLinkLost
	case <-l.deaf:
		return errCannotAsk
	case <-ctx.Done():
		return ctx.Err()
	}
	err := l.awaitPause(ctx)
	if err != nil {
		<-window
	}
	return err
}

// awaitPause waits as long as the server does not want to be asked.
func (l *link) awaitPause(ctx context.Context) error {
	for {
		var over <-chan time.Time
		if pause := time.Until(time.Unix(0, l.pausedUntil.Load())); pause > 0 {
			over = time.After(pause)
		}
		select {
		case <-l.ended:
			return errLinkLost
		case <-l.deaf:
			return errCannotAsk
		default:
			if over == nil {
				return nil
			}
		}
		select {
		case <-over: // it may have been prolonged
		case <-l.ended:
		case <-l.deaf:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// answer takes a connectResult to whoever asked: one of ours, or a gateway below.
func (l *link) answer(frame []byte, f *wire.Fields, data []byte, taken int64) {
	requestUID, result, err := connect.ParseResult(data)
	if err != nil {
		l.pool.tel.Fault(telemetry.ReasonServerBadFrame)
		return
	}
	l.mu.Lock()
	l.answered = true
	asker := l.asked[requestUID]
	delete(l.asked, requestUID)
	below, relayed := l.relayed[requestUID]
	delete(l.relayed, requestUID)
	l.mu.Unlock()
	l.noteCapabilities(frame, f)
	switch {
	case asker != nil:
		asker <- result
	case relayed:
		a := below.gateway
		a.deliver(frame, taken)
		// After the answer, which shows that questions are answered even if the server does not
		// list the capability, and before anything that the agent it lets in could be told.
		if caps := l.caps.Load(); caps != nil && a.told.Swap(caps) != caps && !f.Has(wire.FieldCustomCapabilities) {
			a.sendOwn(wire.Format{Header: true}.CustomCapabilities(wire.UID{}, caps.names))
		}
	default:
		l.pool.tel.Fault(telemetry.ReasonServerStray)
	}
}

// expectFor notes that the gateway below asked under requestUID, so that it gets the answer.
// It reports false when too many such questions are open.
func (l *link) expectFor(requestUID string, gateway *agentConn) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.relayed) >= maxRelayedQuestions {
		return false
	}
	l.relayed[requestUID] = relayedQuestion{gateway, time.Now().Add(l.pool.cfg.Server.AdmissionTimeout)}
	return true
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

// Piece returns memory for a large message, and never waits; the socket calls it.
func (l *link) Piece(size, _ int) ([]byte, error) { return l.pool.memory.Down.Piece(size), nil }

// Return takes back what Piece gave; the socket calls it.
func (l *link) Return(piece []byte) { l.pool.memory.Down.Return(piece) }

// Release counts memory no longer that is an agent's now; the socket calls it.
func (l *link) Release(n int) { l.pool.memory.Down.Give(n) }

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

// failureReason is what stays the same when an attempt fails again in the same way: the text
// of a network error holds a port that does not.
func failureReason(err error) string {
	if dns, ok := errors.AsType[*net.DNSError](err); ok {
		return "lookup " + dns.Name
	}
	if op, ok := errors.AsType[*net.OpError](err); ok {
		return op.Op + ": " + op.Err.Error()
	}
	return err.Error()
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
func serverName(endpoint *url.URL) string {
	return endpoint.Scheme + "://" + endpoint.Host + endpoint.Path
}
