package opampgateway

import (
	"cmp"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	stdlog "log"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unique"

	"go.opentelemetry.io/collector/component"
	"go.opentelemetry.io/collector/config/confighttp"
	"go.uber.org/zap"

	"github.com/opampgateway/opampgateway/internal/connect"
	"github.com/opampgateway/opampgateway/internal/door"
	"github.com/opampgateway/opampgateway/internal/ending"
	"github.com/opampgateway/opampgateway/internal/fair"
	"github.com/opampgateway/opampgateway/internal/outbox"
	"github.com/opampgateway/opampgateway/internal/questions"
	"github.com/opampgateway/opampgateway/internal/status"
	"github.com/opampgateway/opampgateway/internal/telemetry"
	"github.com/opampgateway/opampgateway/internal/wire"
)

const (
	// maxStrangers bounds the connections that are not let in yet: twice a full gateway's worth, since
	// all of its agents come at once after a reload, and one address gets half of the places.
	maxStrangers = 40_000

	// answerCeiling is when an upgrade request is answered at the latest: opamp-go agents
	// give it 45 s. It leaves the write of the answer some time of its own.
	answerCeiling = admissionCeiling + 5*time.Second

	// requestMemory is what a question takes, in bytes, beside what was sent for it.
	requestMemory = 128

	// leaveTime bounds how long a reload waits for authentication and middlewares of requests that have come before it.
	leaveTime = time.Second

	// lifeWait is how long a newcomer waits that has come between two components. Some clients give a connection no
	// more than 10 s.
	lifeWait = 8 * time.Second

	// requestTimeout is how long a request may take to arrive where the listener sets no limit.
	requestTimeout = 30 * time.Second
)

// life is what requests of newcomers pass that is of one component: its extensions have their say there. The rest of
// the HTTP server is the same for all components that share a gateway, since the listener's configuration is.
type life struct {
	server *http.Server // as confighttp has made it: with authentication, middlewares …, around admit
	secure *tls.Config  // nil where there is no TLS
	limits door.Limits
	inner  http.Handler
	before sync.WaitGroup // requests that have not passed authentication and middlewares yet
}

// newLife does what can fail before agents can be served: certificates, authentication, middleware.
func (s *downstreamServer) newLife(ctx context.Context, cfg *Config, host component.Host, set component.TelemetrySettings) (*life, error) {
	listener, agents := cfg.Listener, &cfg.Agents // ToServer changes its own
	l := &life{limits: door.Limits{
		Headers: agents.MaxRequestHeaders, HeaderSize: agents.MaxRequestHeaderSize,
		Connections: cmp.Or(agents.MaxConnections, door.DefaultConnections()), Strangers: maxStrangers,
		Timeout: cmp.Or(listener.ReadHeaderTimeout, requestTimeout),
	}}
	var err error
	if l.limits.Proxies, err = agents.proxies(); err != nil {
		return nil, fmt.Errorf("agents::%w", err)
	}
	if listener.TLS.HasValue() {
		if l.secure, err = listener.TLS.Get().LoadTLSConfig(ctx); err != nil {
			return nil, fmt.Errorf("listener::tls: %w", err)
		}
	}
	if l.server, err = listener.ToServer(ctx, host.GetExtensions(), set, http.HandlerFunc(s.admit)); err != nil {
		return nil, listenerError(err)
	}
	l.inner = l.server.Handler
	if !hasHandlers(&listener) {
		l.inner = http.HandlerFunc(s.admit)
	}
	return l, nil
}

// prepare does what can fail before agents can be served. The listener is the server's from here on, unless there is
// an error.
func (s *downstreamServer) prepare(ctx context.Context, host component.Host, set component.TelemetrySettings, listener net.Listener) error {
	cfg := s.cfg.Load()
	first, err := s.newLife(ctx, cfg, host, set)
	if err != nil {
		return err
	}
	var origins []string
	if cors := cfg.Listener.CORS; cors.HasValue() {
		origins = cors.Get().AllowedOrigins
	}
	s.rules = door.NewRules(origins)
	s.door = door.New(listener, first.secure, first.limits, s.events, s.tel.Admission)
	s.life, s.http = first, first.server
	s.http.Handler = s
	s.http.ErrorLog = stdlog.New(httpErrors{s.events}, "", 0)
	s.http.BaseContext = func(net.Listener) context.Context { return s.admitting }
	s.door.Prepare(s.http)
	if cfg.Listener.Auth.HasValue() || len(cfg.Listener.Middlewares) > 0 {
		known := s.http.ConnContext
		s.http.ConnContext = func(ctx context.Context, conn net.Conn) context.Context {
			return context.WithValue(known(ctx, conn), passageKey{}, new(passage))
		}
	}
	s.log.Info("listening for agents", zap.Stringer("address", listener.Addr()), zap.Bool("tls", first.secure != nil),
		zap.String("agent_admission", string(cfg.Server.AgentAdmission)))
	return nil
}

// leave has newcomers wait until there is another component, and waits for those with which the extensions of this one
// are still concerned, since these are about to end.
func (s *downstreamServer) leave() {
	s.mu.Lock()
	before := s.life
	s.life = nil
	s.mu.Unlock()
	done := make(chan struct{})
	s.others.Go(func() {
		defer close(done)
		before.before.Wait()
	})
	select {
	case <-done:
	case <-time.After(leaveTime):
	}
}

// enterLife has the newcomers be let in that have waited since leave, and all others.
func (s *downstreamServer) enterLife(next *life) {
	s.door.Change(next.secure, next.limits)
	s.mu.Lock()
	s.life = next
	s.enteredLocked()
	agents := slices.Collect(maps.Keys(s.agents))
	s.mu.Unlock()
	if s.cfg.Load().Agents.AllowGateways {
		return
	}
	for _, a := range agents {
		if a.gateway {
			a.dismiss(ending.Shutdown)
		}
	}
}

// enteredLocked wakes those that wait in enter.
func (s *downstreamServer) enteredLocked() {
	close(s.entered)
	s.entered = make(chan struct{})
}

// begin counts r among those that are being answered, unless the gateway is stopping. While it drains, agents over plain HTTP
// that were not let go yet go on polling.
func (s *downstreamServer) begin(r *http.Request) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closing || s.drains && !door.HasPolled(r) {
		return false
	}
	s.requests.Add(1)
	return true
}

// enter returns what a request has to pass; it waits while there is nothing. An error says why there is nothing for
// too long.
func (s *downstreamServer) enter(ctx context.Context, through *passage) (*life, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, lifeWait, errReload)
	defer cancel()
	for {
		s.mu.Lock()
		switch {
		case s.closing:
			s.mu.Unlock()
			return nil, errClosing
		case s.life != nil:
			l := s.life
			if through != nil {
				l.before.Add(1)
				through.life.Store(l)
			}
			s.mu.Unlock()
			return l, nil
		}
		entered := s.entered
		s.mu.Unlock()
		select {
		case <-entered:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

var (
	errClosing = errors.New("the gateway is shutting down")
	errReload  = errors.New("the gateway is being reloaded")
)

// hasHandlers reports whether the listener's configuration puts something between a request without
// a body and us. Otherwise there is only the instrumentation of its HTTP server, which says what our
// own metrics say, and would take a fifth of what it costs to let an agent in.
func hasHandlers(cfg *confighttp.ServerConfig) bool {
	return cfg.Auth.HasValue() || len(cfg.Middlewares) > 0 || cfg.CORS.HasValue() || cfg.IncludeMetadata || cfg.ResponseHeaders != nil
}

// passageKey finds, in the context of a request, how far it has come with the listener's authentication and
// middlewares; there is nothing to find where there are none.
type passageKey struct{}

// passage is how far the request of a connection has come that is being answered with authentication and middlewares.
type passage struct {
	life   atomic.Pointer[life] // whose
	passed atomic.Bool
}

// over notes that they have let it pass, or have refused it.
func (p *passage) over() {
	if l := p.life.Swap(nil); l != nil {
		l.before.Done()
	}
}

func listenerError(err error) error { return fmt.Errorf("listener: %w", err) }

// httpErrors logs what the HTTP server has to say.
type httpErrors struct{ events *zap.Logger }

func (e httpErrors) Write(line []byte) (int, error) {
	e.events.Warn("connection failed before it was an agent's", zap.String("reason", strings.TrimSpace(string(line))))
	return len(line), nil
}

// ServeHTTP answers one agent's upgrade request, or its poll, see answerPoll:
//
//  1. What can never become an agent's connection is refused, before anybody reads more of it.
//  2. The listener's authentication and middlewares have their say.
//  3. The agent is attached to a link, so that many at once are spread evenly.
//  4. The server is asked; its refusal is passed on.
//  5. The connection is upgraded, and its reader started. From here on the link's end is
//     not the agent's.
func (s *downstreamServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if !s.begin(r) {
		s.tel.Admission(telemetry.OutcomeReload)
		refuseForReload(w, errClosing)
		return
	}
	defer s.requests.Done()
	through, _ := r.Context().Value(passageKey{}).(*passage)
	life, err := s.enter(r.Context(), through)
	if err != nil {
		s.tel.Admission(telemetry.OutcomeReload)
		refuseForReload(w, err)
		return
	}
	if through != nil {
		through.passed.Store(false) // as an earlier request on this connection may have
		defer through.over()
	}
	defer s.recoverPanic(r)

	if refusal := s.rules.Check(r); refusal != nil {
		s.tel.Admission(refusal.Outcome)
		s.logRefusal("request refused: "+refusal.Text, r, refusal.Status)
		refusal.Answer(w, r)
		return
	}
	if door.IsPoll(r) {
		r = withoutBody(r)
	}
	life.inner.ServeHTTP(w, r)
	if through != nil && !through.passed.Load() {
		s.tel.Admission(telemetry.OutcomeUnauthorized)
		s.logRefusal("request refused by listener::auth or a middleware", r, 0)
	}
}

// recoverPanic keeps a fault of ours, or of an extension, to the request in which it shows.
func (s *downstreamServer) recoverPanic(r *http.Request) {
	fault := recover()
	if fault == nil {
		return
	}
	if fault != http.ErrAbortHandler { //nolint:errorlint // it is thrown as it is
		s.tel.Fault(telemetry.ReasonPanic)
		s.log.Error("answering a request failed by a fault of this program; please report it",
			telemetry.Peer("client", r.RemoteAddr), zap.Any("panic", fault), zap.ByteString("stack", debug.Stack()))
	}
	panic(http.ErrAbortHandler) // ends the connection
}

// logRefusal logs that somebody was not let in: who, and why.
func (s *downstreamServer) logRefusal(message string, r *http.Request, status int) {
	fields := []zap.Field{
		telemetry.Peer("client", r.RemoteAddr),
		zap.String("user_agent.original", cut(r.UserAgent())), zap.String("agent_id", cut(r.Header.Get("Agent-ID"))),
	}
	if status != 0 {
		fields = append(fields, zap.Int("http.response.status_code", status))
	}
	s.events.Info(message, fields...)
}

// cut bounds what a stranger can have logged.
func cut(text string) string { return text[:min(len(text), 128)] }

// admit is what is left to do of ServeHTTP behind the listener's authentication and middlewares.
func (s *downstreamServer) admit(w http.ResponseWriter, r *http.Request) {
	if through, ok := r.Context().Value(passageKey{}).(*passage); ok {
		through.passed.Store(true)
		through.over()
	}
	if p, ok := postOf(r); ok {
		s.answerPoll(w, p)
		return
	}
	s.tel.Admission(s.tryAdmit(w, r))
}

func (s *downstreamServer) tryAdmit(w http.ResponseWriter, r *http.Request) telemetry.Outcome {
	a, outcome := s.letIn(w, r)
	if a == nil {
		return outcome
	}
	started := false
	defer func() {
		if !started { // a middleware may even panic
			s.forget(a)
		}
	}()
	conn, err := door.Upgrade(w, r)
	if err != nil {
		return s.notUpgraded(r, err)
	}
	started = true
	a.start(conn)
	return telemetry.OutcomeAccepted
}

// forget undoes letIn for an agent that was not started.
func (s *downstreamServer) forget(a *agentConn) {
	s.memory.Kept.Give(a.kept)
	s.pool.detach(a, nil)
}

// letIn attaches who sent r to a link, and has the server decide. Without an agent the request was answered, and
// outcome says how.
func (s *downstreamServer) letIn(w http.ResponseWriter, r *http.Request) (_ *agentConn, outcome telemetry.Outcome) {
	a := &agentConn{server: s, remote: r.RemoteAddr, gateway: r.Header.Get(connectionIDHeader) != ""}
	cfg := s.cfg.Load()
	if a.gateway && !cfg.Agents.AllowGateways {
		s.events.Warn("a gateway wants to connect, but gateways are not let in: set agents::allow_gateways to let it ask the server about its agents",
			a.logged(zap.String("user_agent.original", cut(r.UserAgent())))...)
		http.Error(w, "this gateway lets no other gateways in: see its setting agents::allow_gateways", http.StatusForbidden)
		return nil, telemetry.OutcomeNoGateways
	}
	a.userAgent, a.agentID = unique.Make(status.Cut(r.UserAgent())), status.Cut(r.Header.Get("Agent-ID"))
	address := fair.AddressOf(r.RemoteAddr)
	certificate := verifiedCertificate(r)
	a.credentials = credentialsOf(r.Header, certificate)
	overHTTP := s.pool.target.Load().http
	if cfg.Server.AgentAdmission != AdmissionAccept || overHTTP {
		question, err := connect.NewQuestion(r.RemoteAddr, r.Header, certificate)
		if err != nil {
			http.Error(w, err.Error(), http.StatusRequestHeaderFieldsTooLarge)
			return nil, telemetry.OutcomeBadRequest
		}
		a.question = question
	}
	if overHTTP {
		if verdict, ok := s.pool.refusals.find(a.question); ok {
			s.refuse(w, r, &verdict)
			return nil, telemetry.OutcomeRefused
		}
	}
	taken := requestMemory + 2*len(a.question) // the headers, and what is made of them
	if !s.memory.Requests.Take(address, taken) {
		s.events.Warn("memory for requests is used up, see max_buffered_size", a.logged()...)
		refuseForNow(w, "too many agents are waiting to connect")
		return nil, telemetry.OutcomeTooMany
	}
	defer s.memory.Requests.Give(address, taken)
	// The listener's write timeout counts from the request; the server may take longer.
	_ = http.NewResponseController(w).SetWriteDeadline(time.Now().Add(answerCeiling))
	ctx, cancel := context.WithTimeout(r.Context(), cfg.Server.AdmissionTimeout)
	defer cancel()

	accepted := false
	defer func() {
		if !accepted {
			s.forget(a)
		}
	}()
	verdict, err := s.pool.admit(ctx, a)
	if err != nil {
		if without, ok := errors.AsType[*noVerdictError](err); ok && r.Context().Err() == nil && ctx.Err() == nil {
			return nil, s.unverified(w, a, without)
		}
		return nil, s.turnAway(w, r, err)
	}
	if !verdict.Accept {
		s.refuse(w, r, &verdict)
		return nil, telemetry.OutcomeRefused
	}
	a.kept = len(a.question)
	if !s.memory.Kept.Take(0, a.kept) {
		a.kept = 0
		s.events.Warn("memory for what is kept of agents is used up, see max_buffered_size; no more are let in", a.logged()...)
		refuseForNow(w, "too many agents are connected")
		return nil, telemetry.OutcomeTooMany
	}
	accepted = true
	return a, telemetry.OutcomeAccepted
}

// refuse passes the server's refusal on.
func (s *downstreamServer) refuse(w http.ResponseWriter, r *http.Request, verdict *connect.Result) {
	verdict.CopyRefusalHeaders(w.Header())
	status := verdict.RefusalStatus()
	s.logRefusal("server refused agent", r, status)
	http.Error(w, "refused by the OpAMP server: "+http.StatusText(status), status)
}

// notUpgraded says why an agent that was let in could not be.
func (s *downstreamServer) notUpgraded(r *http.Request, err error) telemetry.Outcome {
	if errors.Is(err, door.ErrCannotUpgrade) {
		s.events.Error("no agent can connect: a middleware of listener::middlewares, or of the collector, keeps connections from being upgraded", zap.Error(err))
		return telemetry.OutcomeCannotUpgrade
	}
	if errors.Is(err, door.ErrEarlyData) {
		s.logRefusal("request refused: data sent before it was answered", r, http.StatusBadRequest)
		return telemetry.OutcomeBadRequest
	}
	s.log.Debug("agent left before it was let in", telemetry.Peer("client", r.RemoteAddr), zap.Error(err))
	return telemetry.OutcomeAbandoned
}

// turnAway answers an agent about whom the server could not be asked. Agents wait as long as
// Retry-After says on 503 and 429 only.
func (s *downstreamServer) turnAway(w http.ResponseWriter, r *http.Request, err error) telemetry.Outcome {
	outcome, text := telemetry.OutcomeNoAnswer, "the OpAMP server did not answer in time"
	switch {
	case s.admitting.Err() != nil:
		refuseForReload(w, errClosing)
		return telemetry.OutcomeReload
	case r.Context().Err() != nil:
		return telemetry.OutcomeAbandoned
	case errors.Is(err, questions.ErrCannotAsk):
		outcome, text = telemetry.OutcomeCannotAsk, "the OpAMP server cannot be asked about agents"
	case errors.Is(err, questions.ErrFull):
		outcome, text = telemetry.OutcomeTooMany, "too many agents are waiting to connect"
	case errors.Is(err, errNoLink):
		outcome, text = telemetry.OutcomeNoLink, "there is no connection to the OpAMP server"
	}
	s.logRefusal("agent turned away: "+text, r, http.StatusServiceUnavailable)
	refuseForNow(w, text)
	return outcome
}

func refuseForNow(w http.ResponseWriter, reason string) {
	w.Header().Set("Retry-After", retryAfter())
	http.Error(w, reason, http.StatusServiceUnavailable)
}

// refuseForReload answers who has come while there was no component, or is being let go with one: it may come back at
// once, but not with all others.
func refuseForReload(w http.ResponseWriter, reason error) {
	w.Header().Set("Retry-After", strconv.Itoa(2+rand.IntN(4)))
	answer := http.NewResponseController(w)
	_ = answer.SetWriteDeadline(time.Now().Add(answerTime)) // the listener's write timeout counts from the request
	http.Error(w, reason.Error(), http.StatusServiceUnavailable)
	_ = answer.Flush() // before the connection is ended
}

// retryAfter is when an agent may come again, in seconds: 30 is the least that the specification
// recommends; the jitter spreads a fleet.
func retryAfter() string { return strconv.Itoa(30 + rand.IntN(31)) }

// verifiedCertificate returns the client certificate that the TLS handshake has verified, nil if none was.
func verifiedCertificate(r *http.Request) *x509.Certificate {
	if r.TLS == nil || len(r.TLS.VerifiedChains) == 0 {
		return nil
	}
	return r.TLS.VerifiedChains[0][0]
}

// credentials tell whether two connections came with the same ones.
type credentials [16]byte

// credentialsOf returns the credentials of a request: what agents show to a server about themselves.
func credentialsOf(headers http.Header, certificate *x509.Certificate) credentials {
	hash := sha256.New()
	for _, name := range []string{"Authorization", "Agent-Id"} {
		for _, value := range headers[name] {
			fmt.Fprintf(hash, "%d %s", len(value), value)
		}
		hash.Write([]byte{0})
	}
	if certificate != nil {
		hash.Write(certificate.Raw)
	}
	return credentials(hash.Sum(nil))
}

// question is one of ours, or of a gateway below, on its way to the server and back.
type question = questions.Question[*asker]

// asker is who waits for the server's word about an agent.
type asker struct {
	// Of ours.
	about  connect.Question
	answer chan verdict // buffered, and sent to once

	// Of a relayed question.
	gateway *agentConn // that asked
	frame   []byte     // as it came, until it is sent
	taken   int        // of the memory for requests

	// Of who is verified.
	target *target
	waits  context.Context // as long as somebody waits
}

// verdict is the server's word, or why there is none.
type verdict struct {
	result connect.Result
	err    error
}

// maxAsked is how often the server is asked about one newcomer, if each time the link ends: it may be because of the
// question. askAgain is how long the last time is put off, at random: until those are let in that asked at the same moment.
const maxAsked, askAgain = 3, 4 * time.Second

// admit attaches a new agent to a link and asks the server about it; on another link if that one ends.
func (p *upstreamPool) admit(ctx context.Context, a *agentConn) (connect.Result, error) {
	for asked := 1; ; {
		l, err := p.attach(ctx, a, nil, time.Time{})
		if err != nil {
			return connect.Result{}, err
		}
		if a.question == nil || l.posts != nil { // its messages are answered by whether it may say them
			return connect.Result{Accept: true}, nil
		}
		result, err := l.decide(ctx, a, questions.ClassNewcomer, p.cfg.Load().Server.AdmissionTimeout)
		a.decided = l.target
		switch {
		case !errors.Is(err, questions.ErrEnded):
			return result, err
		case l.givenUp.Load(): // not the server's doing
			continue
		case !l.target.asking.Answered(): // the book finds out whether the server can be asked
		case asked >= maxAsked:
			return connect.Result{}, errNoLink
		case asked == maxAsked-1:
			_ = sleep(ctx, time.Second+rand.N(askAgain)) // and not at once: links that end together end for another reason
		}
		asked++
	}
}

// ask asks the server about a, once it is its turn, and waits for the answer as long as ctx does;
// the question is open for the time within. The error is one of package questions, or that of ctx, which is
// context.DeadlineExceeded when there was no answer in time.
func (l *link) ask(ctx context.Context, a *agentConn, class questions.Class, within time.Duration) (connect.Result, error) {
	now := time.Now()
	q := &question{
		UID: l.pool.requestUID(), From: fair.AddressOf(a.remote), Class: class, Expires: now.Add(within),
		Asker: &asker{about: a.question, answer: make(chan verdict, 1)},
	}
	send, err := l.book.Ask(q, now)
	l.put(send)
	if err != nil {
		return connect.Result{}, err
	}
	var silence <-chan time.Time
	if l.pool.cfg.Load().Server.AgentAdmission == AdmissionAuto && !l.target.asking.Answered() {
		silence = time.After(silentFor)
	}
	for {
		select {
		case v := <-q.Asker.answer:
			return v.result, v.err
		case <-silence:
			l.unanswered(q)
			silence = time.After(silentFor) // it may not have been sent yet
		case <-ctx.Done():
			l.book.Abandon(q)
			return connect.Result{}, ctx.Err()
		}
	}
}

// requestUID returns a UUID of our own making (RFC 9562, section 5.8), which no other gateway's
// question bears: those above know ours by it, too.
func (p *upstreamPool) requestUID() string {
	b := p.requestPrefix
	binary.BigEndian.PutUint64(b[8:], 1<<63|p.asked.Add(1))
	uid, _ := wire.ParseUID(b[:]) // it has 16 bytes
	return uid.String()
}

// put sends questions whose turn it is. Their number is bounded by the book, so it never waits.
func (l *link) put(send []*question) {
	for _, q := range send {
		frame := q.Asker.frame
		if q.Asker.gateway == nil {
			frame = q.Asker.about.Frame(q.UID)
		}
		q.Asker.frame = nil
		hasLeft := func() bool { return l.book.Withdraw(q) }
		_ = l.Outbox.Push(entry{Frame: frame, Kind: outbox.Message, Stale: hasLeft}) // closed: its reader is about to find out
	}
}

// conclude tells those who asked that there will be no answer, and why.
func (l *link) conclude(open []*question, err error) {
	for _, q := range open {
		if q.Asker.gateway != nil {
			l.pool.memory.Requests.Give(q.From, q.Asker.taken)
			if errors.Is(err, questions.ErrCannotAsk) {
				q.Asker.gateway.sendOwn(connect.TurnAway(q.UID, retryAfter()))
			}
			continue
		}
		q.Asker.answer <- verdict{err: err}
	}
}

// answer takes a connectResult to whoever asked: one of ours, or a gateway below.
func (l *link) answer(frame []byte, f *wire.Fields, data []byte, taken int64) {
	requestUID, result, err := connect.ParseResult(data)
	if err != nil {
		l.pool.tel.Fault(telemetry.ReasonServerBadFrame)
		return
	}
	first := !l.target.asking.Answered()
	q, stray, send := l.book.Answer(requestUID, time.Now())
	l.put(send)
	l.pool.tellHowDecided(l.target, false)
	if first { // all others have waited for that
		for _, l := range l.pool.links() {
			l.put(l.book.Send(time.Now()))
		}
	}
	l.noteCapabilities(frame, f)
	switch {
	case stray:
		l.pool.tel.Fault(telemetry.ReasonServerStray)
	case q == nil: // its asker has left
	case q.Asker.gateway == nil:
		q.Asker.answer <- verdict{result: result}
	default:
		a := q.Asker.gateway
		l.pool.memory.Requests.Give(q.From, q.Asker.taken)
		a.deliver(frame, taken)
		// After the answer, which shows that questions are answered even if the server does not
		// list the capability, and before anything that the agent it lets in could be told.
		if f.Has(wire.FieldCustomCapabilities) {
			a.told.Store(l.caps.Load())
		}
		l.tellCapabilities(a)
	}
}

// relayQuestion passes on another gateway's question about one of its own agents. From any
// other connection it would let an agent that was let in try out credentials; and where nobody
// is asked, nobody vouches for the gateway.
func (a *agentConn) relayQuestion(frame []byte, f *wire.Fields, kind connect.Kind, data []byte) error {
	s := a.server
	if !a.gateway || s.cfg.Load().Server.AgentAdmission == AdmissionAccept || s.pool.target.Load().http || kind != connect.Connect || len(f.UID) > 0 {
		a.offend(ending.ForeignConnect)
		return errOffended
	}
	requestUID, err := connect.RequestUID(data)
	if err != nil {
		return a.reject(telemetry.ReasonBadConnect, f, err.Error())
	}
	q := &question{UID: requestUID, From: fair.AddressOf(a.remote), Asker: &asker{gateway: a, frame: frame, taken: requestMemory + len(frame)}}
	if len(frame) > connect.MaxQuestion || !s.memory.Requests.Take(q.From, q.Asker.taken) {
		s.tel.Fault(telemetry.ReasonBadConnect)
		a.sendOwn(connect.TurnAway(requestUID, retryAfter()))
		return nil
	}
	for {
		l := a.link.Load()
		err := questions.ErrEnded
		now := time.Now()
		q.Expires = now.Add(s.cfg.Load().Server.AdmissionTimeout)
		switch {
		case l == nil:
		case s.pool.verifies(l.target):
			err = s.pool.verifier.relay(q, l.target, data)
		default:
			var send []*question
			send, err = l.book.Ask(q, now)
			l.put(send)
		}
		switch {
		case err == nil:
			a.bad = 0
			return nil
		case errors.Is(err, questions.ErrEnded):
			if err = a.awaitHome(l); err == nil {
				continue
			}
		case errors.Is(err, questions.ErrTwice):
			err = a.reject(telemetry.ReasonBadConnect, f, err.Error())
		default:
			a.sendOwn(connect.TurnAway(requestUID, retryAfter()))
			err = nil
		}
		s.memory.Requests.Give(q.From, q.Asker.taken)
		return err
	}
}

// misunderstood notes that the server does not understand questions.
func (l *link) misunderstood() {
	if l.book.Misunderstood(time.Now()) {
		l.pool.giveUpAsking(l.target)
	}
}

// giveUpAsking tells all who wait that the server cannot be asked, so that they are verified if they may be, and the
// operator.
func (p *upstreamPool) giveUpAsking(t *target) {
	if p.verifies(t) {
		p.tellHowDecided(t, true)
	} else {
		p.warnCannotAsk()
	}
	for _, l := range p.links() {
		l.conclude(l.book.GiveUp(), questions.ErrCannotAsk)
	}
}

func (p *upstreamPool) warnCannotAsk() {
	p.log.Warn("server cannot be asked which agents may connect, so none is let in: it does not know the capability " + connect.Capability +
		", or ends the connection when it is asked; use a server that knows it, or set server::agent_admission: auto, or accept " +
		"and protect the listener with listener::auth or mutual TLS; it is asked again every 10 minutes")
}
