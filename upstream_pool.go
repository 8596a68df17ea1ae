package opampgateway

import (
	"bufio"
	"context"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cenkalti/backoff/v7"
	"github.com/gorilla/websocket"
	"github.com/open-telemetry/opamp-go/protobufs"
	"go.opentelemetry.io/collector/component"
	"go.opentelemetry.io/collector/config/configretry"
	"go.opentelemetry.io/collector/extension"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"google.golang.org/protobuf/proto"

	"github.com/opampgateway/opampgateway/internal/clientauth"
	"github.com/opampgateway/opampgateway/internal/connect"
	"github.com/opampgateway/opampgateway/internal/ending"
	"github.com/opampgateway/opampgateway/internal/memory"
	"github.com/opampgateway/opampgateway/internal/monotonic"
	"github.com/opampgateway/opampgateway/internal/outbox"
	"github.com/opampgateway/opampgateway/internal/peer"
	"github.com/opampgateway/opampgateway/internal/questions"
	"github.com/opampgateway/opampgateway/internal/socket"
	"github.com/opampgateway/opampgateway/internal/status"
	"github.com/opampgateway/opampgateway/internal/suspicion"
	"github.com/opampgateway/opampgateway/internal/telemetry"
	"github.com/opampgateway/opampgateway/internal/wire"
)

const (
	// linkWriteTimeout is how long a write to the server may go without progress. Keep-alive is
	// mostly sooner.
	linkWriteTimeout = 30 * time.Second

	// linkReadBuffer is what is read at once from a link, which many agents' frames share.
	linkReadBuffer = 64 << 10
	// dialReadBuffer is the same for the server's answer to the upgrade request.
	dialReadBuffer = 4 << 10

	// dialTimeout bounds one attempt to dial a link, handshakes included.
	dialTimeout = 30 * time.Second

	// maxRetryAfter bounds what a server's Retry-After can ask of a link.
	maxRetryAfter = 10 * time.Minute

	// linkWait is how long a new agent waits for a link while there is none: a quick restart
	// of the server costs nobody the half minute of a 503. Some clients give a connection no
	// more than 10 s, and would never see it.
	linkWait = 8 * time.Second

	// patience is how long agents that lost their link wait for its slot to dial again, and
	// for further links after the first is back, before they settle elsewhere.
	patience = time.Second

	// apartWait is how long newcomers wait for the link where they are, while links end at them.
	apartWait = linkWait / 2
	// nowhere is no slot.
	nowhere = -1

	// steadyAfter is the life after which a link has proved that dialing is worth it.
	steadyAfter = time.Minute

	// maxStated is how many lists of capabilities are remembered; more than one is rare.
	maxStated = 16
)

var (
	errNoLink = errors.New("no link to the server")
	errUntold = errors.New("nothing told yet")
	errLetGo  = errors.New("agent is let go")
	// errAgentEnded means that the agent's connection has ended by itself.
	errAgentEnded = errors.New("agent's connection has ended")
)

// upstreamPool keeps a fixed number of links to the server, and the agents attached to them.
type upstreamPool struct {
	// Set once.
	cfg           *currentConfig
	log           *zap.Logger
	events        *zap.Logger // log for what may happen again and again: only the first of each kind
	names         *zap.Logger // the same for what names a link, or an agent: whoever ends links should not fill the log
	tel           *telemetry.Telemetry
	router        *router
	memory        *memory.Budget
	requestPrefix [16]byte           // of the request_uid of our questions
	netDial       dialFunc           // nil but in tests
	status        func(err error)    // told why there is no link, and with nil that there is one
	ctx           context.Context    // ends when the gateway has nothing more to do
	stop          context.CancelFunc // ends dialing; what lives goes on
	dialing       context.Context    // until stop
	slots         sync.WaitGroup
	homing        sync.WaitGroup // agents on their way to a new link, and goodbyes that wait to be said
	verifier      *verifier
	suspicion     *suspicion.Book // whose messages the server may have ended links for
	offered       offered         // endpoints, to agents
	refusals      refusals        // of a server over plain HTTP
	seen          *seen           // what the status page shows of what is over

	// changing is held by whoever makes another target that of the pool; mu is taken inside it.
	changing sync.Mutex
	seats    []chan struct{} // by slot: what keeps a link there holds the only place in it; guarded by changing

	// Shared.
	target atomic.Pointer[target] // changed by change and replace only
	blind  atomic.Bool            // the server does not answer pings, as the link has shown that ended last
	asked  atomic.Uint64          // questions of ours
	untold atomic.Bool            // who is told of the status has changed

	// mu guards which links are live and who is attached to them. It is taken when
	// connections come and go, never for a frame.
	mu      sync.Mutex
	live    []*link       // by slot; nil while there is none
	count   int           // of live links that are not leaving
	since   time.Time     // when count last became more than 0
	changed chan struct{} // closed and renewed whenever a link comes up or goes down
	back    chan struct{} // closed and renewed whenever count becomes more than 0
	failure error         // why there is no link; kept while there is one
	report  chan struct{} // holds a token when there is something to tell
	stated  []*capabilities
	apart   int         // the slot where newcomers are while links end at them
	states  []slotState // by slot, as long as live
}

// target is the server as one configuration has it, at one of its endpoints, and how links to it present themselves. A
// reload with another server makes another target, and so does going to another endpoint.
type target struct {
	// Set once.
	endpoint  *url.URL
	name      string // comes first in those of the links
	headers   http.Header
	elsewhere http.Header                               // for hosts to which the server redirects
	tls       *atomic.Pointer[tls.Config]               // of all endpoints; changed when certificates are read again
	auth      *atomic.Pointer[clientauth.Authenticator] // of all endpoints; changed by a reload, which has extensions of its own; may hold nil
	proxy     *url.URL                                  // nil leaves it to the environment
	pace      *pace                                     // of dialing
	turns     []int                                     // by slot, and of the probe: of its next attempt, see socket.DialInTurn; each is the slot's own
	asking    *questions.Server                         // whether it can be asked
	slots     int                                       // how many links there are
	sites     []*site                                   // all endpoints, the first one first
	http      bool                                      // it is reached over plain HTTP: see posts.go
	at        int                                       // the place of endpoint in sites
	verified  *atomic.Bool                              // that agents are verified is what was logged last; the endpoint's own

	// By change, before anybody dials.
	dialing context.Context    // until leave, or the pool's stop
	leave   context.CancelFunc // ends dialing; what lives goes on
}

// newTarget does what can fail about the server: it loads certificates, and finds the authenticator among the host's
// extensions.
func newTarget(ctx context.Context, cfg *Config, set extension.Settings, host component.Host) (*target, error) {
	tlsConfig, err := cfg.Server.TLS.LoadTLSConfig(ctx)
	if err != nil {
		return nil, fmt.Errorf("server::tls: %w", err)
	}
	sites, err := sitesOf(&cfg.Server)
	if err != nil {
		return nil, err
	}
	proxy, err := parseProxy(cfg.Server.ProxyURL)
	if err != nil {
		return nil, fmt.Errorf("server::proxy_url: %w", err)
	}
	authenticator, err := newAuthenticator(ctx, &cfg.Server, host)
	if err != nil {
		return nil, fmt.Errorf("server::auth: %w", err)
	}
	elsewhere := http.Header{"User-Agent": {userAgent(set.BuildInfo)}}
	headers := elsewhere.Clone()
	cfg.Server.Headers.addTo(headers)
	t := &target{
		endpoint: sites[0].endpoint, name: gatewayName(cfg, set.TelemetrySettings), headers: headers, elsewhere: elsewhere,
		pace: newPace(cfg.Server.Connections), turns: firstTurns(cfg.Server.Connections + 1), asking: sites[0].asking,
		slots: cfg.Server.Connections, sites: sites, verified: &sites[0].verified, tls: &atomic.Pointer[tls.Config]{},
		auth: &atomic.Pointer[clientauth.Authenticator]{}, proxy: proxy, http: overHTTP(sites[0].endpoint.Scheme),
	}
	if t.http {
		t.slots = 1
	}
	if cfg.Server.AgentAdmission == AdmissionAuto {
		for _, s := range sites {
			s.asking.Spare() // agents get in without a question
		}
	}
	t.tls.Store(tlsConfig)
	t.auth.Store(authenticator)
	return t, nil
}

// linkName is how the link of a slot announces itself to the server.
func (t *target) linkName(slot int) string {
	if slot == t.slots {
		return t.name + "/probe"
	}
	return t.name + "/upstream-" + strconv.Itoa(slot)
}

func newUpstreamPool(cfg *currentConfig, log *zap.Logger, tel *telemetry.Telemetry, r *router, budget *memory.Budget, status func(error)) *upstreamPool {
	p := &upstreamPool{
		cfg: cfg, tel: tel, router: r, memory: budget, suspicion: suspicion.NewBook(), seen: &seen{}, status: status,
		changed: make(chan struct{}), back: make(chan struct{}), report: make(chan struct{}, 1), failure: errNoLink,
	}
	p.verifier = newVerifier(p)
	_, _ = rand.Read(p.requestPrefix[:])                // it never fails
	p.requestPrefix[6] = 0x80 | p.requestPrefix[6]&0x0f // version 8
	p.log = log.With(zap.Inline(zapcore.ObjectMarshalerFunc(func(e zapcore.ObjectEncoder) error {
		endpoint := p.target.Load().endpoint
		telemetry.Peer("server", socket.HostPort(endpoint)).AddTo(e)
		e.AddString("url.full", socket.Place(endpoint))
		return nil
	})))
	p.events, p.names = sampled(p.log), sampledTo(p.log, 50)
	return p
}

// start fills the slots with links to t, until ctx ends.
func (p *upstreamPool) start(ctx context.Context, t *target) {
	p.ctx = ctx
	p.dialing, p.stop = context.WithCancel(ctx)
	p.change(t)
	p.slots.Go(p.tellStatus)
	p.slots.Go(p.follow)
}

// change has the slots hold links to t. Those that there are end as the server is used to: what waits is written,
// and a close frame; their agents then find links to t as after a lost one. A slot dials when its old link has ended,
// so that the server sees an agent's end before it sees the agent again.
func (p *upstreamPool) change(t *target) {
	p.changing.Lock()
	defer p.changing.Unlock()
	p.replaceLocked(t, func(*link) bool { return true }, "gateway has another configuration")
}

// replace is change if before is the target still, which it reports, where only those links end that leave. The others
// go on until they are lost, or leave later; then their slots dial for t.
func (p *upstreamPool) replace(before, t *target, leaves func(*link) bool) bool {
	p.changing.Lock()
	defer p.changing.Unlock()
	if p.target.Load() != before {
		return false
	}
	p.replaceLocked(t, leaves, elsewhereText)
	return true
}

func (p *upstreamPool) replaceLocked(t *target, leaves func(*link) bool, why string) {
	before := p.target.Load()
	t.dialing, t.leave = context.WithCancel(p.dialing)
	p.mu.Lock()
	p.target.Store(t)
	if before != nil {
		before.leave()
	}
	var leaving []*link
	for _, l := range p.live {
		if l != nil && leaves(l) && p.leaveLocked(l) {
			leaving = append(leaving, l)
		}
	}
	for len(p.live) < t.slots {
		p.live = append(p.live, nil)
		p.states = append(p.states, slotState{since: monotonic.Now()})
	}
	p.blind.Store(false)
	p.mu.Unlock()
	p.suspicion.Forget()
	p.refusals.forget()
	for _, l := range leaving {
		l.Outbox.Close(websocket.FormatCloseMessage(websocket.CloseGoingAway, why))
	}
	for slot := range t.slots {
		if slot == len(p.seats) {
			p.seats = append(p.seats, make(chan struct{}, 1))
		}
		seat := p.seats[slot]
		p.slots.Go(func() {
			select {
			case seat <- struct{}{}:
				p.keep(t, slot)
				<-seat
			case <-t.dialing.Done(): // for a third target
			}
		})
	}
}

// leaveLocked notes that l ends since its slot is to have another; it reports false if that was known.
func (p *upstreamPool) leaveLocked(l *link) bool {
	if l.leaving {
		return false
	}
	l.leaving = true
	l.givenUp.Store(true) // so nobody is suspected for its end
	p.count--
	return true
}

// tellAgain has the status told once more, to whom it was not told yet; with other links than before, when the first
// is up, or could not be dialed, or neither for too long.
func (p *upstreamPool) tellAgain(sameLinks bool) {
	p.untold.Store(true)
	if !sameLinks {
		time.AfterFunc(linkWait, p.tell)
		return
	}
	p.tell()
}

// tell has tellStatus look whether there is something to tell.
func (p *upstreamPool) tell() {
	select {
	case p.report <- struct{}{}:
	default:
	}
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
		if p.untold.Swap(false) {
			told = errUntold
		}
		p.mu.Lock()
		now := p.failure
		if p.count > 0 {
			now = nil
		}
		p.mu.Unlock()
		if isNews(now, told) {
			told = now
			p.status(now)
		}
	}
}

// isNews reports whether now, why there is no link, is to be told after told. While there is none, another reason is
// not: health checks count from what was told last.
func isNews(now, told error) bool {
	same := func(a, b error) bool { return a == b } //nolint:errorlint // whether it is the very one, not what kind it is
	switch {
	case same(told, errUntold):
		return true
	case same(told, errNoLink): // a reason was not known yet
		return !same(now, errNoLink)
	default:
		return (now == nil) != (told == nil)
	}
}

// keep fills one slot with links to t: it dials, serves the link while it lives, and dials again. A link that
// was lost is dialed at once, but one that does not live for long only with ever more delay.
func (p *upstreamPool) keep(t *target, slot int) {
	retry := p.cfg.Load().Server.Retry
	delays := newDelays(retry)
	log := p.names.With(zap.String("link", t.linkName(slot)))
	logged := &t.sites[t.at].logged[slot]
	for dialAtOnce := true; t.dialing.Err() == nil; {
		back := p.serverBack()
		l, retryAfter, err := p.dial(t, slot)
		if now := p.cfg.Load().Server.Retry; now != retry { // by a reload
			retry, delays = now, newDelays(now)
		}
		if err != nil {
			if t.dialing.Err() != nil {
				return
			}
			delay := max(delays.NextBackOff(), retryAfter)
			p.noteFailure(slot, err)
			if reason := failureReason(err); reason != *logged { // once per change, not per attempt
				*logged = reason
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
			case <-t.dialing.Done():
			}
			continue
		}
		*logged = ""
		up := time.Now()
		if !p.linkUp(l) {
			l.abandon()
			return
		}
		log.Info("connected to the server", l.redirected)
		err = l.read()
		caught := p.linkDown(l, err)
		p.seen.linkEnded(l, time.Since(up), err)
		switch {
		case t.dialing.Err() != nil:
			log.Info("disconnected from the server")
			return
		case caught, time.Since(up) >= steadyAfter:
			dialAtOnce = true
			delays.Reset()
		}
		p.tel.Fault(telemetry.ReasonLinkLost)
		p.noteFailure(slot, err)
		log.Warn("lost connection to the server, connecting again", zap.Error(err), zap.Duration("after", time.Since(up).Round(time.Millisecond)))
		if !dialAtOnce {
			_ = sleep(t.dialing, delays.NextBackOff())
		}
		dialAtOnce = false
	}
}

// newDelays returns the delays between attempts to dial.
func newDelays(retry configretry.BackOffConfig) *backoff.ExponentialBackOff {
	delays := &backoff.ExponentialBackOff{
		InitialInterval: retry.InitialInterval, RandomizationFactor: retry.RandomizationFactor,
		Multiplier: retry.Multiplier, MaxInterval: retry.MaxInterval,
	}
	delays.Reset()
	return delays
}

// linkName is how the link of a slot announces itself to the server now.
func (p *upstreamPool) linkName(slot int) string { return p.target.Load().linkName(slot) }

// dial connects one link, once it is its turn. An error comes with how long the server asks to be left alone.
func (p *upstreamPool) dial(t *target, slot int) (l *link, retryAfter time.Duration, err error) {
	if err := sleep(t.dialing, t.pace.next()); err != nil {
		return nil, 0, err
	}
	ctx, cancel := context.WithTimeout(t.dialing, dialTimeout)
	defer cancel()
	headers, elsewhere := t.headers.Clone(), t.elsewhere.Clone()
	headers.Set(connectionIDHeader, t.linkName(slot))
	elsewhere.Set(connectionIDHeader, t.linkName(slot))
	if headers, err = t.authenticate(ctx, headers); err != nil {
		return nil, 0, err
	}
	netDial := p.netDial
	if netDial == nil {
		netDial = socket.DialInTurn(t.turns[slot])
		t.turns[slot]++
	}
	if t.http {
		return p.dialPosts(ctx, t, headers, netDial)
	}
	dialer := socket.Dialer{NetDial: netDial, Proxy: t.proxy, TLS: t.tls.Load(), ReadBufferSize: dialReadBuffer, Elsewhere: elsewhere}
	conn, in, place, err := dialer.Dial(ctx, t.endpoint, headers)
	if err != nil {
		return nil, askedToWait(err), p.explainDial(err)
	}
	l = newLink(p, t, slot, nil, conn, in)
	l.redirected = redirectedTo(place)
	return l, 0, nil
}

// reportLocked has the status told if it has changed, with the reason if there is no link.
func (p *upstreamPool) reportLocked(failure error) {
	p.failure = failure
	p.tell()
}

// linkUp takes l among the live; it reports false when the gateway is already stopping, or has another server.
func (p *upstreamPool) linkUp(l *link) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if l.target.dialing.Err() != nil {
		return false
	}
	p.live[l.slot] = l
	p.states[l.slot].since = monotonic.Now()
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
//  2. It is found out whether the link ended because of an agent's message. That is not sent again.
//  3. What was not written is sorted by agent, for rehome to fetch. Of an agent that will not
//     have another link, it is lost.
//  4. Agents waiting to be let in are woken; they ask again elsewhere.
//  5. Each agent that was at home here gets a goroutine that finds it a new one. Gateways
//     are closed instead: they introduce their own agents again.
//
// It reports whether the server has ended the link just when it was at a message on trial: it is there.
func (p *upstreamPool) linkDown(l *link, err error) (caught bool) {
	unwritten := l.Outbox.Abort()
	l.late = endsLate(err)
	if l.posts != nil {
		unwritten = append(l.posts.Rest(), unwritten...)
		l.late = false // it was in the middle of nothing
	}
	kept := p.suspicion.NewcomersEnd()
	caught = p.findCulprit(l, err)
	for _, e := range unwritten {
		if c := e.Sender; c != nil && e.Stale == nil { // neither a question nor a goodbye
			l.unwritten[c.agent] = append(l.unwritten[c.agent], e)
		}
	}
	p.mu.Lock()
	stopping := p.dialing.Err() != nil
	for a, entries := range l.unwritten {
		if _, here := l.agents[a]; !here || a.gateway || stopping {
			p.lose(entries)
			delete(l.unwritten, a)
		}
	}
	close(l.ended)
	if !kept {
		p.apart = l.slot // that they have ended already
	}
	p.live[l.slot] = nil
	p.states[l.slot].since = monotonic.Now()
	if !l.leaving { // otherwise it says nothing of the server that there is now
		p.blind.Store(l.Outbox.Blind())
		if p.count--; p.count == 0 {
			p.reportLocked(errNoLink)
		}
	}
	p.signalLocked()
	for a := range l.agents {
		switch {
		case stopping: // they are being let go
		case a.link.Load() != l: // on its way in; it notices by itself
		case a.gateway:
			a.dismiss(ending.LinkLost)
			p.exileLocked(a)
		default:
			p.homing.Go(func() { p.rehome(a, l) })
		}
	}
	p.mu.Unlock()
	open, cannotBeAsked := l.book.End(!stopping && !l.givenUp.Load(), time.Now())
	l.conclude(open, questions.ErrEnded)
	if cannotBeAsked {
		p.giveUpAsking(l.target)
	}
	return caught
}

// lose counts agents' messages that will not be delivered.
func (p *upstreamPool) lose(entries []entry) {
	p.tel.Faults(telemetry.ReasonFrameLost, len(entries))
	for i := range entries {
		p.memory.Recycle(entries[i].Frame)
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

// attach counts a among the agents of the live link that has the fewest, waiting for one
// while there is none: not for long, if the agent is new. An agent that lost a link is patient:
// for a moment it waits for the same slot, and when all were lost, until more than the first
// are back. While links end at newcomers, these are kept apart.
func (p *upstreamPool) attach(ctx context.Context, a *agentConn, from *link, lost time.Time) (*link, error) {
	var tooLong <-chan time.Time
	began := time.Now()
	for {
		p.mu.Lock()
		if a.ending.Ended() {
			p.mu.Unlock()
			return nil, errAgentEnded
		}
		if ctx.Err() != nil { // even if there is a link
			p.mu.Unlock()
			return nil, context.Cause(ctx)
		}
		var best *link
		var wait time.Duration
		switch apart, newcomer := p.keptApartLocked(a, from); {
		case apart && newcomer:
			best = p.stayingLocked(p.apart)
			wait = apartWait - time.Since(began)
		case apart:
			best = p.leastLoadedLocked(p.apart)
		case from != nil:
			wait = max(patience-time.Since(lost), patience-time.Since(p.since))
			if slots := p.target.Load().slots; slots == from.target.slots {
				best = p.stayingLocked(from.slot)
			} else if p.count == slots {
				wait = 0 // a reload has changed how many there are, and all are back
			}
		}
		if best == nil && wait <= 0 {
			best = p.leastLoadedLocked(nowhere)
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

// keptApartLocked reports whether links end at newcomers, so that these are to be on one of them, and all others
// elsewhere; and whether a is one of the former.
func (p *upstreamPool) keptApartLocked(a *agentConn, from *link) (apart, newcomer bool) {
	if p.target.Load().slots == 1 || !p.suspicion.NewcomersEnd() {
		return false, false
	}
	return true, !a.gateway && (from == nil || p.suspicion.New(a.says()))
}

// stayingLocked returns the live link of a slot; nil if there is none, or it is about to end.
func (p *upstreamPool) stayingLocked(slot int) *link {
	if l := p.live[slot]; l != nil && !l.leaving {
		return l
	}
	return nil
}

// leastLoadedLocked returns the live link with the fewest agents, apart from that of one slot, or of nowhere.
func (p *upstreamPool) leastLoadedLocked(except int) *link {
	var best *link
	for slot := range p.live {
		if l := p.stayingLocked(slot); l != nil && slot != except && (best == nil || len(l.agents) < len(best.agents)) {
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
	if p.live[l.slot] != l || a.ending.Ended() {
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

// meet notes under which UID a is known to suspicion: that of its first message.
func (p *upstreamPool) meet(a *agentConn, uid wire.UID) {
	p.mu.Lock()
	defer p.mu.Unlock()
	a.first = uid
}

// detach forgets a, whose connection has ended. It returns the link it was at home on, and for whom
// to say goodbye there. An agent without a home leaves that to whoever is finding it a new one.
func (p *upstreamPool) detach(a *agentConn, gone []*claim) (home *link, farewell []*claim) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if l := a.attached; l != nil && a.link.Load() == l && p.live[l.slot] == l {
		home = l
	}
	p.detachLocked(a)
	if cause := a.ending.End(); cause != nil && !cause.Told || cause == nil && a.Socket != nil && a.Socket.Unanswered() {
		gone = nil
	}
	a.gone = gone
	return home, gone
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
	if a.homeless == nil && a.link.Load() == ended && !a.ending.Discards() {
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
	if a.ending.Discards() {
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
	a.ending.Discard()
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

// anyLink returns the link with the fewest agents, nil if none is live.
func (p *upstreamPool) anyLink() *link {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.leastLoadedLocked(nowhere)
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

// unacknowledged returns how many messages are on their way to the server.
func (p *upstreamPool) unacknowledged() (n int) {
	for _, l := range p.links() {
		n += l.Outbox.OnItsWay()
	}
	return n
}

// sweep pings quiet links and ends silent ones; their slots dial again. Questions whose time is
// over are forgotten.
func (p *upstreamPool) sweep(limits peer.Limits) {
	for _, l := range p.links() {
		if l.posts != nil {
			p.poll(l)
			continue
		}
		switch l.Sweep(limits) {
		case peer.Silent:
			p.tel.Fault(telemetry.ReasonLinkSilent)
			p.log.Warn("no sign of life from the server; closing the connection", zap.String("link", p.linkName(l.slot)))
			l.givenUp.Store(true)
			l.Socket.Close()
		case peer.Quiet:
			l.Outbox.Ping()
		case peer.Alive:
		}
		expired, send := l.book.Sweep(time.Now())
		l.put(send)
		l.conclude(expired, context.DeadlineExceeded)
	}
	p.verifier.sweep()
	p.release()
	p.router.forgetFarewells()
}

// finish ends dialing and closes the links. What waits is written, until drained is done; then
// the server has until ctx is done to read it and to answer the close frame.
func (p *upstreamPool) finish(ctx, drained context.Context) {
	p.stop()
	links := p.links()
	defer context.AfterFunc(ctx, func() {
		for _, l := range links {
			l.Socket.Close()
		}
	})()
	for _, l := range links {
		l.Outbox.Drain(drained)
		if l.posts != nil {
			l.posts.Drain(drained)
		}
		l.Outbox.Close(websocket.FormatCloseMessage(websocket.CloseGoingAway, "gateway is shutting down"))
	}
	p.slots.Wait()
}

// link is one WebSocket to the server.
type link struct {
	peer.Peer[*claim, *outbox.Link[*claim], peer.WebSocket[*claim]]

	// Set once.
	pool       *upstreamPool
	target     *target
	slot       int
	posts      *posts        // nil unless the server is reached over plain HTTP
	redirected zap.Field     // where the server has sent us
	ended      chan struct{} // closed when it is not live any more
	book       *questions.Book[*asker]
	// To be read once ended is closed.
	unwritten map[*agentConn][]entry // what of each agent was not written
	late      bool                   // the server may notice the end late

	// Guarded by upstreamPool.mu.
	agents  map[*agentConn]struct{}
	leaving bool // it ends, since there is another target

	// Shared.
	caps    atomic.Pointer[capabilities] // as stated on this link; nil until then
	givenUp atomic.Bool                  // ended by us, for its silence or for another target

	// For the status page.
	meter    status.Meter
	ping     atomic.Int64  // how long the server took to answer the last, in nanoseconds; 0 for none
	messages atomic.Uint64 // that came, by the reader

	// Owned by the reader.
	complaints int  // errors that name nobody
	toldNoUID  bool // that the server names nobody was logged
}

// newLink returns a link over conn. With q, nothing is read or written there, but posted.
func newLink(p *upstreamPool, t *target, slot int, q *posts, conn net.Conn, in *bufio.Reader) *link {
	l, cfg := &link{
		pool: p, target: t, slot: slot, posts: q, redirected: zap.Skip(), book: questions.NewBook[*asker](t.asking), ended: make(chan struct{}),
		unwritten: map[*agentConn][]entry{}, agents: map[*agentConn]struct{}{},
	}, p.cfg.Load()
	l.Relayed = &p.tel.Up
	l.Socket.Socket = socket.New(conn, socket.LinkInput(conn, in, linkReadBuffer), true, cfg.MaxMessageSize, linkWriteTimeout, l)
	share := memory.LinkShare(int64(cfg.MaxBufferedSize), t.slots)
	l.Outbox = outbox.NewLink(l, share, &p.memory.Up, p.blind.Load())
	return l
}

// abandon ends a link that is in no slot, and that nobody reads.
func (l *link) abandon() {
	l.Outbox.Abort()
	if l.posts != nil {
		l.posts.drop()
	}
}

// read is the link's reader: it takes each frame to whom it is for, and waits for nobody. It
// returns when the connection has ended.
func (l *link) read() error {
	if l.posts != nil {
		return l.readPosts()
	}
	for {
		frame, err := l.Socket.Read()
		switch {
		case err == nil:
			l.relay(frame)
		case errors.Is(err, socket.ErrTooLarge):
			if large, ok := errors.AsType[*socket.TooLargeError](err); ok {
				l.noteTooLarge("message above max_message_size", wire.HeadUID(large.Head), large.Size)
			}
		case errors.Is(err, socket.ErrText):
			l.pool.tel.Fault(telemetry.ReasonServerBadFrame)
		default:
			l.Answer(l.pool.ctx, err)
			return err
		}
	}
}

// relay takes one frame from the server to the agent it names.
func (l *link) relay(frame []byte) {
	taken := monotonic.Now()
	l.messages.Add(1)
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
	c := l.pool.router.find(f.UID)
	if c == nil {
		if !l.pool.router.takeFarewell(f.UID) { // otherwise it is the answer to a goodbye
			l.pool.tel.Fault(telemetry.ReasonServerUnknownUID)
		}
		l.Socket.Drop(frame)
		return
	}
	named := wire.UID{}
	if f.Has(wire.FieldAgentIdentification) {
		if named = newUID(frame); named != (wire.UID{}) {
			c = l.pool.router.toName(c, named, l)
		}
	}
	l.noteCapabilities(frame, &f)
	untold := l.untoldCapabilities(c, &f) // a new UID inherits what the agent has heard
	if named != (wire.UID{}) {
		l.rename(c, named)
	}
	if f.Has(wire.FieldConnectionSettings) {
		if heeded := l.heedOffer(frame, c); &heeded[0] != &frame[0] {
			l.Socket.Drop(frame) // and with it what f points into
			frame = heeded
		}
	}
	if !c.agent.deliver(frame, taken) {
		l.Socket.Drop(frame)
		return
	}
	if untold != nil {
		c.agent.sendOwn(untold)
	}
}

// noteTooLarge counts and logs something of the server's that is not taken for its size.
func (l *link) noteTooLarge(what string, uid []byte, size int64) {
	l.pool.tel.Fault(telemetry.ReasonServerTooLarge)
	agent, _ := wire.ParseUID(uid)
	l.pool.events.Warn("server sent a "+what+", which is skipped", zap.String("link", l.pool.linkName(l.slot)),
		zap.Stringer("agent", agent), zap.Int64("bytes", size))
}

// newUID returns the instance UID that the server gives an agent in a frame with an agent_identification; the zero one
// if there is none that could be used, of which the agent will say so.
func newUID(frame []byte) (uid wire.UID) {
	var identification protobufs.AgentIdentification
	if proto.Unmarshal(wire.Embedded(frame, wire.FieldAgentIdentification), &identification) == nil {
		uid, _ = wire.ParseUID(identification.GetNewInstanceUid())
	}
	return uid
}

// rename has the agent of c be found under its new UID at once.
func (l *link) rename(c *claim, uid wire.UID) {
	if err := l.pool.router.rename(c, uid); err != nil {
		l.pool.tel.Fault(telemetry.ReasonTooManyUIDs)
	}
}

// takeUnaddressed takes a frame that says not whom it is for. On a link shared by many agents
// nobody can tell.
func (l *link) takeUnaddressed(frame []byte, f *wire.Fields) {
	if f.Empty() {
		return // only keeps the connection alive
	}
	l.noteCapabilities(frame, f)
	var failure *protobufs.ServerErrorResponse
	if f.Has(wire.FieldErrorResponse) {
		failure = &protobufs.ServerErrorResponse{}
		if proto.Unmarshal(wire.Embedded(frame, wire.FieldErrorResponse), failure) != nil {
			l.pool.tel.Fault(telemetry.ReasonServerBadFrame)
			return
		}
	}
	switch {
	case failure != nil && failure.GetType() == protobufs.ServerErrorResponseType_ServerErrorResponseType_Unavailable:
		delay := min(time.Duration(failure.GetRetryInfo().GetRetryAfterNanoseconds()), maxRetryAfter)
		l.book.Pause(time.Now().Add(max(delay, time.Second)))
	case failure != nil:
		// Once may be an accident; twice, the server takes questions for bad requests.
		if l.complaints++; l.complaints == 2 {
			l.misunderstood()
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

// Pinged answers the server's ping, unless too many wait to be answered; the socket calls it.
func (l *link) Pinged(payload []byte) { _ = l.Outbox.Control(outbox.Pong, payload) }

// Ponged takes the server's answer to a ping; the socket calls it.
func (l *link) Ponged(payload []byte) {
	ack, expected := l.Outbox.Pong(payload)
	if !expected {
		return
	}
	l.pool.tel.RoundTrip(ack.RoundTrip)
	l.ping.Store(max(1, int64(ack.RoundTrip)))
	if ack.Largest > 0 && !l.givenUp.Load() { // the server may be another by now
		l.pool.suspicion.Acknowledged(ack.Largest)
	}
	for _, s := range ack.Tried {
		l.pool.suspicion.Taken(s.Sender.says(s.Size))
	}
}

// Piece returns memory for a large message, and never waits; the socket calls it.
func (l *link) Piece(size, _ int) ([]byte, error) { return l.pool.memory.Down.Piece(size), nil }

// Shrink puts what is in a piece into a smaller one; the socket calls it.
func (l *link) Shrink(piece []byte, n int) []byte { return l.pool.memory.Down.Shrink(piece, n) }

// Return takes back what Piece gave; the socket calls it.
func (l *link) Return(piece []byte) { l.pool.memory.Down.Return(piece) }

// Release counts memory no longer that is an agent's now; the socket calls it.
func (l *link) Release(n int) { l.pool.memory.Down.Give(n) }

// WriteBatch writes to the link's socket; the outbox calls it.
func (l *link) WriteBatch(batch []entry) (int, error) {
	if l.posts != nil {
		return l.postBatch(batch)
	}
	n, err := l.Peer.WriteBatch(batch)
	if err != nil && errors.Is(err, socket.ErrStalled) {
		l.givenUp.Store(true)
		l.Close()
	}
	return n, err
}

// Hurry bounds what the link may still take; the outbox calls it.
func (l *link) Hurry() {
	if l.posts != nil {
		l.hurryPosts()
		return
	}
	l.Peer.Hurry()
}

// received returns the bytes of messages that came.
func (l *link) received() uint64 {
	if l.posts != nil {
		return l.posts.received.Load()
	}
	return l.Socket.Received()
}

// failureReason is what stays the same when an attempt fails again in the same way: the text
// of a network error holds a port that does not.
func failureReason(err error) string {
	if redirected, ok := errors.AsType[*socket.RedirectedError](err); ok {
		return redirected.To + ": " + failureReason(redirected.Err)
	}
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
	if seconds, err := strconv.ParseInt(value, 10, 64); err == nil {
		return min(max(0, time.Duration(min(seconds, 1<<30))*time.Second), maxRetryAfter)
	}
	if at, err := http.ParseTime(value); err == nil {
		return min(max(0, time.Until(at)), maxRetryAfter)
	}
	return 0
}
