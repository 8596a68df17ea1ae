package opampgateway

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"github.com/opampgateway/opampgateway/internal/connect"
	"github.com/opampgateway/opampgateway/internal/fair"
	"github.com/opampgateway/opampgateway/internal/questions"
	"github.com/opampgateway/opampgateway/internal/socket"
	"github.com/opampgateway/opampgateway/internal/telemetry"
)

// silentFor is how long a server that has never answered a question has for one before agents are verified instead.
// Some clients give a connection no more than 10 s.
const silentFor = 5 * time.Second

// verifier has the server decide on agents without a question: by its answer to a WebSocket handshake with the agent's
// own headers. That connection ends with the handshake.
type verifier struct {
	pool   *upstreamPool
	book   *questions.Book[*asker] // those that are verified, and those that wait for their turn
	work   sync.WaitGroup          // one for each that is verified
	dialed atomic.Uint32           // so that all addresses of the server's name have their turn
}

func newVerifier(p *upstreamPool) *verifier {
	return &verifier{pool: p, book: questions.NewPlaces[*asker](p.cfg.Load().Server.VerifyConnections)}
}

// noVerdictError is why the server has decided nothing about an agent.
type noVerdictError struct {
	err        error
	retryAfter string // as the server says, if it does
}

func (e *noVerdictError) Error() string { return "verify agent: " + e.err.Error() }

// Unwrap returns what went wrong.
func (e *noVerdictError) Unwrap() error { return e.err }

// verifies reports whether agents are verified now at the server of t, instead of asked about.
func (p *upstreamPool) verifies(t *target) bool {
	switch p.cfg.Load().Server.AgentAdmission {
	case AdmissionVerify:
		return true
	case AdmissionAuto:
		return t.asking.IsDeaf()
	default:
		return false
	}
}

// sameServer reports whether an agent that was let in at one target was let in by the server of the other.
func (t *target) sameServer(other *target) bool {
	return other != nil && t.endpoint.String() == other.endpoint.String()
}

// ask verifies a at the server of t, once it is its turn, and waits for the outcome as long as ctx does. An error is
// one of package questions, a *noVerdictError, or that of ctx.
func (v *verifier) ask(ctx context.Context, a *agentConn, t *target, within time.Duration) (connect.Result, error) {
	now := time.Now()
	q := &question{
		UID: v.pool.requestUID(), From: fair.AddressOf(a.remote), Expires: now.Add(within),
		Asker: &asker{about: a.question, answer: make(chan verdict, 1), target: t, waits: ctx},
	}
	send, err := v.book.Ask(q, now)
	v.start(send)
	if err != nil {
		return connect.Result{}, err
	}
	select {
	case answer := <-q.Asker.answer:
		return answer.result, answer.err
	case <-ctx.Done():
		v.book.Abandon(q) // its place is free when the dialing has ended
		return connect.Result{}, ctx.Err()
	}
}

// start verifies those whose turn it is. Their number is bounded by the book.
func (v *verifier) start(send []*question) {
	for _, q := range send {
		v.work.Go(func() {
			ctx, cancel := context.WithDeadline(q.Asker.waits, q.Expires)
			result, err := v.verify(ctx, q.Asker)
			cancel()
			open, _, next := v.book.Answer(q.UID, time.Now())
			v.start(next)
			if open != nil { // somebody waits
				v.conclude(open, verdict{result, err})
			}
		})
	}
}

// verify asks the server for a WebSocket with an agent's own headers.
func (v *verifier) verify(ctx context.Context, about *asker) (connect.Result, error) {
	if err := ctx.Err(); err != nil {
		return connect.Result{}, err
	}
	headers, err := about.about.AgentHeaders()
	if err != nil {
		return connect.Result{}, &noVerdictError{err: err}
	}
	t, netDial := about.target, v.pool.netDial
	if netDial == nil {
		netDial = socket.DialInTurn(int(v.dialed.Add(1) >> 1)) // never negative, however small an int is
	}
	dialer := socket.Dialer{NetDial: netDial, Proxy: t.proxy, TLS: withoutCertificate(t.tls.Load()), ReadBufferSize: dialReadBuffer, EndpointOnly: true}
	conn, _, _, err := dialer.Dial(ctx, t.endpoint, headers)
	switch {
	case errors.Is(err, context.DeadlineExceeded):
		return connect.Result{}, context.DeadlineExceeded // as whoever waits finds out at the same moment
	case err != nil:
		return verdictOf(err)
	}
	socket.Leave(conn)
	return connect.Result{Accept: true}, nil
}

// withoutCertificate returns how TLS begins for an agent: the certificate of the gateway is none of the agent's, and a server
// might let everybody in who comes with it.
func withoutCertificate(config *tls.Config) *tls.Config {
	if config == nil {
		return nil
	}
	config = config.Clone()
	config.Certificates, config.GetClientCertificate = nil, nil
	return config
}

// verdictOf returns what the server has decided about an agent by not granting its request. That a proxy, or a server
// behind a balancer, cannot be reached, or does not speak OpAMP here, says nothing about the agent.
func verdictOf(err error) (connect.Result, error) {
	answer, answered := errors.AsType[*socket.HandshakeError](err)
	switch {
	case errors.Is(err, socket.ErrRedirect):
		err = fmt.Errorf("%w; see server::endpoint", err)
	case !answered || answer.Proxy != "":
	case answer.StatusCode/100 == 4, answer.StatusCode == http.StatusServiceUnavailable:
		result := connect.Refusal(answer.StatusCode, answer.Header)
		if answer.StatusCode == http.StatusServiceUnavailable && answer.RetryAfter == "" {
			result.Headers["Retry-After"] = retryAfter() // agents would be back at once
		}
		return result, nil
	case answer.StatusCode/100 == 5:
		return connect.Result{}, &noVerdictError{err, answer.RetryAfter}
	}
	return connect.Result{}, &noVerdictError{err: err}
}

// conclude tells who asked what came of it.
func (v *verifier) conclude(q *question, found verdict) {
	a := q.Asker.gateway
	if a == nil {
		q.Asker.answer <- found
		return
	}
	v.pool.memory.Requests.Give(q.From, q.Asker.taken)
	if found.err != nil {
		v.logNoVerdict(a, found.err)
		without, _ := errors.AsType[*noVerdictError](found.err)
		a.sendOwn(connect.TurnAway(q.UID, without.whenAgain()))
		return
	}
	a.sendOwn(found.result.Frame(q.UID))
	if l := a.link.Load(); l != nil {
		l.tellCapabilities(a) // as behind the server's own answer
	}
}

// whenAgain is when the agent may come again, in seconds or as a date; of no error, too.
func (e *noVerdictError) whenAgain() string {
	if e == nil {
		return retryAfter()
	}
	return cmp.Or(e.retryAfter, retryAfter())
}

func (v *verifier) logNoVerdict(a *agentConn, err error) {
	if v.pool.ctx.Err() != nil {
		return
	}
	v.pool.events.Warn("server gave no verdict on an agent that was to be verified; it is turned away", a.logged(zap.Error(err))...)
}

// relay takes on a question of the gateway below. It does not wait.
func (v *verifier) relay(q *question, t *target, data connect.Question) error {
	q.Asker.about, q.Asker.target, q.Asker.waits = data, t, v.pool.ctx
	send, err := v.book.Ask(q, time.Now())
	v.start(send)
	return err
}

// sweep gives up on those whose time is over.
func (v *verifier) sweep() {
	expired, send := v.book.Sweep(time.Now())
	v.start(send)
	for _, q := range expired {
		v.conclude(q, verdict{err: context.DeadlineExceeded})
	}
}

// resize has as many be verified at a time as is configured now.
func (v *verifier) resize() {
	v.start(v.book.Resize(v.pool.cfg.Load().Server.VerifyConnections, time.Now()))
}

// tryAsking asks about a, which is verified meanwhile, when it is time to try whether a server can be asked that could not
// be. Nobody waits for the answer: what it is about the agent does not count, but that there is one.
func (l *link) tryAsking(a *agentConn) {
	now := time.Now()
	if l.pool.cfg.Load().Server.AgentAdmission != AdmissionAuto || l.target.asking.Deaf(now) {
		return
	}
	send, _ := l.book.Ask(&question{ // an error: another newcomer does it
		UID: l.pool.requestUID(), From: fair.AddressOf(a.remote), Expires: now.Add(answerTimeout),
		Asker: &asker{about: a.question, answer: make(chan verdict, 1)},
	}, now)
	l.put(send)
}

// decide has the server decide on a, as it is configured: it is asked on l, or a is verified, or neither. An error is one of ask, or of verifier.ask.
func (l *link) decide(ctx context.Context, a *agentConn, class questions.Class, within time.Duration) (connect.Result, error) {
	p := l.pool
	if p.cfg.Load().Server.AgentAdmission == AdmissionAccept {
		return connect.Result{Accept: true}, nil // what is known of it is from when the server was one over plain HTTP
	}
	for !p.verifies(l.target) {
		result, err := l.ask(ctx, a, class, within)
		if !errors.Is(err, questions.ErrCannotAsk) || p.cfg.Load().Server.AgentAdmission != AdmissionAuto {
			return result, err
		}
	}
	if class == questions.ClassNewcomer {
		l.tryAsking(a)
	}
	if class == questions.ClassIntroduction && l.target.sameServer(a.decided) {
		return connect.Result{Accept: true}, nil // it has decided, and nothing has changed for the agent
	}
	return p.verifier.ask(ctx, a, l.target, within)
}

// unanswered is told that q has had no answer for long: where agents can be verified instead, a server that has never
// answered one is given up as one to be asked.
func (l *link) unanswered(q *question) {
	if l.book.Silent(q, time.Now()) {
		l.pool.giveUpAsking(l.target)
	}
}

// tellHowDecided logs how the server decides on agents from now on, where that is found out.
func (p *upstreamPool) tellHowDecided(t *target, verified bool) {
	if p.cfg.Load().Server.AgentAdmission != AdmissionAuto || t.verified.Swap(verified) == verified {
		return
	}
	if verified {
		p.log.Info("server cannot be asked which agents may connect: it does not know the capability " + connect.Capability +
			", does not answer, or ends the connection when it is asked; from now on each agent is verified instead, with its own headers at server::endpoint")
		return
	}
	p.log.Info("server answers questions about agents; from now on it is asked instead of verifying each agent")
}

// admissionInWords says for the status page how the server decides on agents.
func (p *upstreamPool) admissionInWords(t *target) string {
	admission := p.cfg.Load().Server.AgentAdmission
	switch {
	case admission != AdmissionAuto:
		return string(admission)
	case p.verifies(t):
		return "auto: verify"
	default:
		return "auto: ask"
	}
}

// unverified answers an agent about which the server has decided nothing.
func (s *downstreamServer) unverified(w http.ResponseWriter, a *agentConn, why *noVerdictError) telemetry.Outcome {
	s.pool.verifier.logNoVerdict(a, why)
	w.Header().Set("Retry-After", why.whenAgain())
	http.Error(w, "the OpAMP server cannot be reached to verify the agent", http.StatusServiceUnavailable)
	return telemetry.OutcomeCannotVerify
}
