package opampgateway

import (
	"bufio"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"maps"
	"math"
	"math/rand/v2"
	"net"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/open-telemetry/opamp-go/protobufs"
	"go.opentelemetry.io/collector/config/configretry"
	"go.uber.org/zap"
	"golang.org/x/net/http/httpguts"
	"google.golang.org/protobuf/proto"

	"github.com/opampgateway/opampgateway/internal/connect"
	"github.com/opampgateway/opampgateway/internal/ending"
	"github.com/opampgateway/opampgateway/internal/memory"
	"github.com/opampgateway/opampgateway/internal/monotonic"
	"github.com/opampgateway/opampgateway/internal/outbox"
	"github.com/opampgateway/opampgateway/internal/posting"
	"github.com/opampgateway/opampgateway/internal/socket"
	"github.com/opampgateway/opampgateway/internal/telemetry"
	"github.com/opampgateway/opampgateway/internal/wire"
)

// A server over plain HTTP has one link, on which all agents are at home as on any other. Its outbox writes to no
// socket, but to a queue of posts, from which a few workers post each message with the headers of the agent that it came
// from. So the rest of the gateway knows links only; what is here is how such a link is dialed, what answers
// mean, and that agents with nothing to say are polled for.

const (
	// postTimeout bounds one post, answer included. An agent whose posts hang holds up others for no longer than this.
	postTimeout = 30 * time.Second
	// lastPosts bounds what is still posted on a link that is about to end.
	lastPosts = 2 * time.Second

	// A link has ended when nothing but failures has come for downAfter; one on which nothing else ever has, for
	// provingTime.
	downAfter, provingTime = 10 * time.Second, time.Second
	// maxBlamed is how often a message may fail at the server while others do not.
	maxBlamed = 8

	// pollInterval is how long an agent may be silent before something is posted for it, if the server has not offered
	// it another interval, from minPoll to maxPoll; an agent that keeps to such an interval itself is left pollSlack for it.
	pollInterval, minPoll, maxPoll = 30 * time.Second, time.Second, time.Hour
	pollSlack                      = 5 * time.Second

	// refusalTime is how long a refusal is remembered, and up to twice as long. maxRefusals and maxRefusalBytes
	// bound all of them; refusalMemory is what one takes beside its headers.
	refusalTime                  = 30 * time.Second
	maxRefusals, maxRefusalBytes = 4096, 1 << 20
	refusalMemory                = 256
)

var (
	errServerTurnsDown = errors.New("the server does not take this message")
	errServerFails     = errors.New("the server fails at this message, again and again")
)

// overHTTP reports whether the scheme of an endpoint is that of a server over plain HTTP.
func overHTTP(scheme string) bool { return scheme == "http" || scheme == "https" }

// poster is who takes one message at a time: an agent, however many instance UIDs it uses, or one of those behind a gateway.
type poster struct {
	agent  *agentConn
	behind *claim // nil unless agent is a gateway
}

func (c *claim) poster() poster {
	if c.agent.gateway {
		return poster{c.agent, c}
	}
	return poster{agent: c.agent}
}

// post is one message on its way to a server over plain HTTP.
type post = posting.Post[poster, *claim]

// posts is what a link to a server over plain HTTP has instead of a WebSocket.
type posts struct {
	*posting.Queue[poster, *claim]

	// Set once.
	client *posting.Client
	lend   http.Header   // with what server.auth adds, added where an agent's request has none of that name; nil for nothing
	many   int           // how many messages are posted at a time
	ready  chan struct{} // closed when the link is made
	ctx    context.Context
	cancel context.CancelFunc
	work   sync.WaitGroup

	// Shared.
	received atomic.Uint64         // bytes of answers
	failure  atomic.Pointer[error] // why the link has ended
	hurry    atomic.Pointer[time.Timer]

	// mu guards what follows.
	mu       sync.Mutex
	answered uint64 // posts to which the server had an answer
	last     int64  // when it had one, of the monotonic clock
	failing  int64  // since when it has had none, of those; 0 if it has
}

// dialPosts finds out whether a server over plain HTTP is there. Nothing is posted for that.
func (p *upstreamPool) dialPosts(ctx context.Context, t *target, headers http.Header, netDial dialFunc) (*link, time.Duration, error) {
	cfg := p.cfg.Load()
	client := posting.NewClient(posting.Options{
		Endpoint: t.endpoint, UserAgent: t.elsewhere.Get("User-Agent"), Dial: netDial, TLS: t.tls.Load(), Proxy: t.proxy,
		Connections: cfg.Server.Connections, Limit: cfg.MaxMessageSize, Account: &p.memory.Down,
	})
	streams, answer, err := client.Probe(ctx, headers)
	if err != nil {
		client.Close()
		if answer != nil {
			return nil, parseRetryAfter(answer.RetryAfter()), err
		}
		return nil, 0, err
	}
	q := &posts{
		Queue:  posting.NewQueue[poster, *claim](memory.LinkShare(int64(cfg.MaxBufferedSize), 1), &p.memory.Up),
		client: client, many: streams * cfg.Server.Connections, ready: make(chan struct{}),
	}
	if cfg.Server.AgentAdmission == AdmissionAccept {
		q.lend = posting.OwnHeaders(t.headers)
		q.lend.Del("User-Agent")
	}
	q.ctx, q.cancel = context.WithCancel(p.ctx)
	near, _ := net.Pipe() // nobody is at its other end: it is there to be closed
	conn := socket.Wrap(near)
	l := newLink(p, t, 0, q, conn, bufio.NewReaderSize(near, 16))
	l.givenUp.Store(true) // no agent ends such a link
	close(q.ready)
	return l, 0, nil
}

// readPosts is link.read of a link to a server over plain HTTP: it has workers post what there is, and returns when the
// link has ended and they have left.
func (l *link) readPosts() error {
	q := l.posts
	for range q.many {
		q.work.Go(l.post)
	}
	_, err := l.Socket.Read() // nobody says anything there; it ends when the socket does
	q.Close()
	q.cancel()
	q.work.Wait()
	q.client.Close()
	if timer := q.hurry.Load(); timer != nil {
		timer.Stop()
	}
	if failure := q.failure.Load(); failure != nil {
		return *failure
	}
	return err
}

// drop ends a link on which nothing was posted, and that nobody reads.
func (q *posts) drop() {
	q.Close()
	q.cancel()
	q.client.Close()
}

// fail ends the link.
func (l *link) fail(err error) {
	l.posts.failure.CompareAndSwap(nil, &err)
	l.Socket.Close()
}

// hurryPosts ends the link in a moment.
func (l *link) hurryPosts() {
	if timer := time.AfterFunc(lastPosts, l.Socket.Close); !l.posts.hurry.CompareAndSwap(nil, timer) {
		timer.Stop()
	}
}

// postBatch takes what the link's outbox writes. It waits while too much waits to be posted; who has said that is held up
// before it comes here, see agentConn.send.
func (l *link) postBatch(batch []entry) (int, error) {
	q := l.posts
	<-q.ready
	for i := range batch {
		switch e := &batch[i]; {
		case e.Kind == outbox.Ping: // what is in the queue is as good as read: it bounds itself
			_, _ = l.Outbox.Pong(e.Frame)
		case e.Kind == outbox.Close:
			q.Finish()
		case e.Kind != outbox.Message, e.Sender == nil, e.Stale != nil && e.Stale():
		default:
			e.Sender.notePost(e.Frame)
			if err := q.Put(e.Sender.poster(), *e); err != nil {
				return i, err
			}
		}
	}
	return len(batch), nil
}

// awaitPosts has the agent's reader wait while too much of c waits to be posted.
func (a *agentConn) awaitPosts(q *posts, c *claim) error {
	if !q.Full(c.poster()) {
		return nil
	}
	began := monotonic.Now()
	ctx, over := a.pause()
	defer over()
	err := q.Await(ctx, c.poster())
	a.noteWait(began)
	if errors.Is(err, outbox.ErrClosed) {
		return nil // the link's outbox says so, too
	}
	return err
}

// post is a worker: it posts one message after the other, until the link ends, or has nothing more to do.
func (l *link) post() {
	defer l.Socket.Close()
	for p := l.posts.Next(); p != nil; p = l.posts.Next() {
		l.postOne(p)
	}
}

// postOne posts a message once, and does what the answer asks for.
func (l *link) postOne(p *post) {
	q, c := l.posts, p.Entry.Sender
	if p.Entry.Stale != nil && p.Entry.Stale() {
		q.Done(p)
		return
	}
	began := monotonic.Now()
	ctx, cancel := context.WithTimeout(q.ctx, postTimeout)
	defer cancel()
	message, lead := p.Entry.Frame, 0
	if message[0] == 0 {
		message = message[1:]
	}
	if c.format.Header {
		lead = 1
	}
	headers, err := l.headersOf(ctx, c.agent)
	var answer *posting.Answer
	if err == nil {
		answer, err = q.client.Post(ctx, headers, message, headerUID(c.route.uid), lead)
	}
	if answer != nil {
		defer answer.Release()
	}
	switch {
	case q.ctx.Err() != nil && err != nil: // the link has ended
		q.Again(p, 0)
	case errors.Is(err, posting.ErrTooLarge):
		q.hasAnswered()
		l.noteTooLarge("message above max_message_size", c.route.uid.Bytes(), int64(l.pool.cfg.Load().MaxMessageSize))
		q.Done(p)
	case err != nil && posting.IsDial(err), errors.Is(err, posting.ErrRedirect):
		l.fail(err)
		q.Again(p, 0)
	case err != nil:
		l.postFailed(p, began, err)
	case answer.OK():
		q.hasAnswered()
		if !p.Poll {
			l.Handed([]entry{p.Entry})
		}
		l.takeAnswer(p, answer)
		q.Done(p)
	default:
		l.takeStatus(p, began, answer)
	}
}

// headersOf returns the headers of an agent's posts: its own, and what is lent to it.
func (l *link) headersOf(ctx context.Context, a *agentConn) (http.Header, error) {
	headers := posting.OwnHeaders(a.question.Headers())
	headers.Del(connectionIDHeader) // a link has a name, a post has none
	if l.posts.lend == nil {
		return headers, nil
	}
	lent, err := l.target.authenticate(ctx, l.posts.lend)
	if err != nil {
		return nil, err
	}
	for name, values := range lent {
		if headers[name] == nil {
			headers[name] = slices.Clone(values)
		}
	}
	return headers, nil
}

// headerUID is how an agent over plain HTTP names itself in a header.
func headerUID(uid wire.UID) string {
	switch {
	case !uid.IsText():
		return uid.String()
	case httpguts.ValidHeaderFieldValue(string(uid.Bytes())):
		return string(uid.Bytes())
	}
	return ""
}

// takeAnswer takes the answer to a message to the agent that it came from, whatever UID it bears.
func (l *link) takeAnswer(p *post, answer *posting.Answer) {
	taken, c, frame := monotonic.Now(), p.Entry.Sender, answer.Message
	l.messages.Add(1)
	l.posts.received.Add(uint64(len(frame)))
	f, err := wire.ScanServerToAgent(frame)
	if err != nil && !errors.Is(err, wire.ErrEmpty) {
		l.pool.tel.Fault(telemetry.ReasonServerBadFrame)
		return
	}
	if p.Poll && f.Bare() {
		return // nobody has asked
	}
	if c.agent.ending.Ended() {
		if !l.pool.router.takeFarewell(c.route.uid.Bytes()) {
			l.pool.tel.Fault(telemetry.ReasonServerUnknownUID)
		}
		return
	}
	if len(f.UID) == 0 {
		frame = wire.WithUID(frame, c.route.uid)
	}
	if f.Has(wire.FieldAgentIdentification) {
		if uid := newUID(frame); uid != (wire.UID{}) {
			l.pool.router.unask(c) // whoever else asks under its UID is answered by a post of its own
			l.rename(c, uid)
		}
	}
	if f.Has(wire.FieldConnectionSettings) {
		c.noteOffer(frame)
		frame = l.heedOffer(frame, c)
	}
	c.agent.deliver(frame, taken)
}

// takeStatus does what a status other than OK asks for.
func (l *link) takeStatus(p *post, began int64, answer *posting.Answer) {
	q, c := l.posts, p.Entry.Sender
	code, wait := answer.StatusCode, parseRetryAfter(answer.RetryAfter())
	switch {
	case code == http.StatusTooManyRequests, code == http.StatusServiceUnavailable && wait > 0:
		q.hasAnswered()
		if wait = max(wait, time.Second); answer.RetryAfter() == "" {
			wait = introduceAgain
		}
		if q.Throttle(p, wait) {
			l.pool.events.Warn("server asks more than one agent to wait, so nothing is posted until then", zap.Duration("for", wait))
		}
	case code >= 500, code == http.StatusRequestTimeout, code == http.StatusTooEarly:
		l.postFailed(p, began, errors.New("server answered "+answer.Status()))
	case code == http.StatusBadRequest, code == http.StatusRequestEntityTooLarge,
		code == http.StatusUnsupportedMediaType, code == http.StatusUnprocessableEntity:
		q.hasAnswered()
		if p.Entry.Stale == nil && !p.Poll {
			l.pool.turnDown(c, telemetry.ReasonServerTurnsDown, fmt.Errorf("%w: it answered %s", errServerTurnsDown, answer.Status()))
		}
		q.Done(p)
	default:
		q.hasAnswered()
		l.refused(p, answer)
	}
}

// refused ends the connection of an agent whose message the server has refused for its credentials, or for whatever else
// will be the same next time. The refusal is that of its next requests.
func (l *link) refused(p *post, answer *posting.Answer) {
	c := p.Entry.Sender
	a := c.agent
	l.pool.tel.Faults(telemetry.ReasonFrameLost, l.posts.Drop(p))
	if p.Entry.Stale != nil || a.ending.Closing() {
		return // it has left
	}
	text := "server refused an agent, over plain HTTP: its connection is closed"
	switch {
	case answer.Withheld:
		text += "; a redirect has led to another host, which is told no agent's headers"
	case answer.StatusCode == http.StatusNotFound, answer.StatusCode == http.StatusMethodNotAllowed:
		text += "; the path of server::endpoint may be wrong"
	}
	l.pool.names.Warn(text, a.logged(zap.Stringer("agent", c.route.uid), zap.Int("http.response.status_code", answer.StatusCode))...)
	if a.gateway { // of which it is one agent of many
		l.pool.turnDown(c, telemetry.ReasonAgentRefused, errRefused)
		return
	}
	l.pool.refusals.note(a.question, connect.Refusal(answer.StatusCode, answer.Header))
	l.pool.giveUpOn(a, ending.Refused)
}

// postFailed has a message be posted again that has failed, unless it alone fails; or ends the link when all do.
func (l *link) postFailed(p *post, began int64, err error) {
	q := l.posts
	down, answered := q.hasFailed(began)
	if down {
		l.fail(err)
		q.Again(p, 0)
		return
	}
	if p.Tries++; answered != p.Epoch {
		p.Epoch = answered
		p.Blamed++
	}
	c := p.Entry.Sender
	if p.Blamed < maxBlamed {
		l.pool.events.Warn("server fails at a message of an agent; it is posted again", c.agent.logged(zap.Stringer("agent", c.route.uid), zap.Error(err))...)
		q.Again(p, postAgain(l.pool.cfg.Load().Server.Retry, p.Tries))
		return
	}
	l.pool.names.Warn("server fails at a message of an agent again and again, and not at others; the message is dropped",
		c.agent.logged(zap.Stringer("agent", c.route.uid), zap.Int("bytes", len(p.Entry.Frame)), zap.Error(err))...)
	if p.Entry.Stale == nil && !p.Poll {
		l.pool.turnDown(c, telemetry.ReasonServerTurnsDown, errServerFails)
	}
	q.Done(p)
}

// postAgain returns how long a message waits that has failed so often.
func postAgain(retry configretry.BackOffConfig, tries int) time.Duration {
	delay := float64(retry.InitialInterval) * math.Pow(retry.Multiplier, float64(min(tries, 64)-1))
	delay = min(delay, float64(retry.MaxInterval))
	return time.Duration(delay * (1 - retry.RandomizationFactor*rand.Float64()))
}

// hasAnswered notes that the server had an answer.
func (q *posts) hasAnswered() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.answered++
	q.last, q.failing = monotonic.Now(), 0
}

// hasFailed notes that a post has failed, and reports whether all do, and how many have not.
func (q *posts) hasFailed(began int64) (down bool, answered uint64) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.failing == 0 {
		q.failing = max(began, q.last)
	}
	limit := downAfter
	if q.answered == 0 {
		limit = provingTime
	}
	return time.Duration(monotonic.Now()-q.failing) >= limit, q.answered
}

// polled is what is to be known of an agent to poll for it.
type polled struct {
	mu           sync.Mutex
	sequence     uint64 // of the last message
	capabilities uint64
	at           int64 // when that was, of the monotonic clock
	own          bool  // it was the agent's own
	every        time.Duration
}

func (c *claim) polled() *polled {
	if s := c.polls.Load(); s != nil {
		return s
	}
	c.polls.CompareAndSwap(nil, &polled{every: pollInterval})
	return c.polls.Load()
}

// notePost notes what the agent says.
func (c *claim) notePost(frame []byte) {
	f, err := wire.ScanAgentToServer(frame)
	if err != nil {
		return
	}
	s := c.polled()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.sequence, s.at, s.own = f.Sequence, monotonic.Now(), true
	if capabilities := wire.Capabilities(frame); capabilities != 0 {
		s.capabilities = capabilities
	}
}

// noteOffer notes how often the server would like to hear of the agent.
func (c *claim) noteOffer(frame []byte) {
	var offers protobufs.ConnectionSettingsOffers
	if proto.Unmarshal(wire.Embedded(frame, wire.FieldConnectionSettings), &offers) != nil {
		return
	}
	seconds := offers.GetOpamp().GetHeartbeatIntervalSeconds()
	if seconds == 0 {
		return
	}
	s := c.polled()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.every = max(minPoll, min(time.Duration(min(seconds, 1<<30))*time.Second, maxPoll))
}

// poll posts something for an agent that has been silent for long. An agent that is about to speak itself is not
// forestalled, since the server would find one sequence_num twice.
func (c *claim) poll(q *posts) {
	s := c.polls.Load()
	if s == nil {
		return // it has said nothing yet
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	due := s.every
	if s.own {
		due += pollSlack
	}
	if s.at == 0 || monotonic.Since(s.at) < due {
		return
	}
	frame := c.format.Poll(c.route.uid, s.sequence+1, s.capabilities)
	if q.Poll(c.poster(), entry{Frame: frame, Kind: outbox.Message, Sender: c}) {
		s.sequence++
		s.at, s.own = monotonic.Now(), false
	}
}

// poll polls for the agents of a link to a server over plain HTTP.
func (p *upstreamPool) poll(l *link) {
	p.mu.Lock()
	agents := slices.Collect(maps.Keys(l.agents))
	p.mu.Unlock()
	for _, a := range agents {
		if a.link.Load() != l || a.polls != nil { // or it polls itself
			continue
		}
		for _, c := range p.router.present(a) {
			c.poll(l.posts)
		}
	}
}

// present returns the claims of a to agents that are there, under the names that they use.
func (r *router) present(a *agentConn) []*claim {
	r.mu.RLock()
	defer r.mu.RUnlock()
	claims := make([]*claim, 0, len(a.claims.all))
	for _, c := range a.claims.all {
		if c.route.current.Load() == c && !c.departed && !c.given && !c.renamed {
			claims = append(claims, c)
		}
	}
	return claims
}

// refusals remembers what a server over plain HTTP has answered to agents that it refused, since it is the answer to their
// next requests: one that is let in and then closed comes back at once. The zero value remembers nothing.
type refusals struct {
	mu    sync.Mutex
	bytes int
	known map[[sha256.Size]byte]refusal // by what the agent has told of itself
}

type refusal struct {
	verdict connect.Result
	size    int
	until   time.Time
}

// note remembers a refusal, unless too many are remembered.
func (r *refusals) note(q connect.Question, verdict connect.Result) {
	key, now := identify(q), time.Now()
	size := refusalMemory
	for name, value := range verdict.Headers {
		size += len(name) + len(value)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.known == nil {
		r.known = map[[sha256.Size]byte]refusal{}
	}
	r.forgetLocked(key)
	if len(r.known) >= maxRefusals || r.bytes+size > maxRefusalBytes {
		for key, old := range r.known {
			if !old.until.After(now) {
				r.forgetLocked(key)
			}
		}
	}
	if len(r.known) < maxRefusals && r.bytes+size <= maxRefusalBytes {
		r.known[key] = refusal{verdict: verdict, size: size, until: now.Add(refusalTime + rand.N(refusalTime))}
		r.bytes += size
	}
}

func (r *refusals) forgetLocked(key [sha256.Size]byte) {
	r.bytes -= r.known[key].size
	delete(r.known, key)
}

// find returns the refusal of who tells this of itself, if one is remembered.
func (r *refusals) find(q connect.Question) (verdict connect.Result, ok bool) {
	r.mu.Lock()
	some := len(r.known) > 0
	r.mu.Unlock()
	if !some { // as nearly always
		return connect.Result{}, false
	}
	key := identify(q)
	r.mu.Lock()
	defer r.mu.Unlock()
	known, ok := r.known[key]
	if ok && !known.until.After(time.Now()) {
		r.forgetLocked(key)
		ok = false
	}
	return known.verdict, ok
}

// forget forgets all, since there is another server.
func (r *refusals) forget() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.known, r.bytes = nil, 0
}

// identify tells those apart that the server sees with different headers.
func identify(q connect.Question) [sha256.Size]byte {
	return [sha256.Size]byte(hashOwn(q.Headers()).Sum(nil))
}
