package opampgateway

import (
	"cmp"
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"maps"
	"math/rand/v2"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"github.com/opampgateway/opampgateway/internal/connect"
	"github.com/opampgateway/opampgateway/internal/door"
	"github.com/opampgateway/opampgateway/internal/ending"
	"github.com/opampgateway/opampgateway/internal/fair"
	"github.com/opampgateway/opampgateway/internal/monotonic"
	"github.com/opampgateway/opampgateway/internal/polling"
	"github.com/opampgateway/opampgateway/internal/posting"
	"github.com/opampgateway/opampgateway/internal/questions"
	"github.com/opampgateway/opampgateway/internal/telemetry"
	"github.com/opampgateway/opampgateway/internal/wire"
)

// An agent over plain HTTP has a connection as any other agent has, but that its messages come and go with its polls.
// The poll is translated here; what is behind knows of no HTTP.

const (
	// admissionLife is how long the server's word about an agent holds that polls.
	admissionLife = 15 * time.Minute

	// takeTime is how long a poll waits at least until the gateway takes its message.
	takeTime = 2 * time.Second

	// uploadPause is how long the rest of a body may take to come where the listener sets no limit.
	uploadPause = 30 * time.Second

	// lingerTime is how long the rest of a body is thrown away that is of no use.
	lingerTime = 500 * time.Millisecond

	// maxMissed is how many agents are remembered that have missed their polls. Up to twice.
	maxMissed = 4096

	// instanceUIDHeader is where an agent over plain HTTP may say who polls, before its message does.
	instanceUIDHeader = "Opamp-Instance-Uid"

	// fieldAgentDescription of AgentToServer is what an agent says that begins anew.
	fieldAgentDescription = 3
)

// sessionKey is who polls: what came with the same credentials under the same UID. Different agents may have the same
// credentials, and one the UID of another, by mistake or not. With the same key, but other headers, the server decides
// anew: what it knows an agent by may stand in any of them.
type sessionKey struct {
	credentials credentials
	uid         wire.UID
}

// polls is what the connection of an agent over plain HTTP has beside its session, which takes its socket's place.
type polls struct {
	*polling.Session[*claim]

	// Set once.
	server  *downstreamServer
	address netip.Prefix // which holds its place at the door

	admitted atomic.Int64 // when the server has last let it in, of the monotonic clock

	// Guarded by sessions.mu.
	key   sessionKey
	shown credentials // with which the server has last let it in, see shownBy
	over  bool        // it has ended
}

// due returns how long the agent has until its next poll.
func (p *polls) due() time.Duration { return p.Due(p.server.cfg.Load().Agents.PollInterval) }

// overdue reports whether the agent has missed three polls. It is remembered, since it may just poll less often.
func (p *polls) overdue() bool {
	since, overdue := p.Overdue(p.server.cfg.Load().Agents.PollInterval)
	if overdue {
		p.server.polled.remember(p, since)
	}
	return overdue
}

// stale reports whether the server is to be asked again about an agent that shows that now.
func (p *polls) stale(shown credentials) bool {
	return p.server.cfg.Load().Server.AgentAdmission != AdmissionAccept && !p.server.pool.target.Load().http &&
		(monotonic.Since(p.admitted.Load()) >= admissionLife || !p.server.polled.shows(p, shown))
}

// end gives back what a session has taken.
func (p *polls) end() {
	p.server.polled.remove(p)
	p.server.door.Leave(p.address)
}

// sessions finds the sessions of agents over plain HTTP.
type sessions struct {
	mu        sync.Mutex
	agents    map[sessionKey]*agentConn
	standings map[credentials]*standing // by what is shown
	// Those who have missed their polls, and when they polled last; and those before.
	missed, missedBefore map[sessionKey]int64
}

// standing is how what is shown stands with the server, as long as there are sessions with it.
type standing struct {
	admitted int64 // when an agent was last let in with it
	sessions int
	any      *agentConn // one of them
}

func newSessions() *sessions {
	return &sessions{agents: map[sessionKey]*agentConn{}, standings: map[credentials]*standing{}, missed: map[sessionKey]int64{}}
}

// trust reports whether an agent was let in lately that has shown just that.
func (s *sessions) trust(shown credentials) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	known := s.standings[shown]
	return known != nil && monotonic.Since(known.admitted) < admissionLife
}

// admitted notes that the server has let the agent in again, which has shown that.
func (s *sessions) admitted(a *agentConn, shown credentials) {
	p := a.polls
	p.admitted.Store(monotonic.Now())
	s.mu.Lock()
	defer s.mu.Unlock()
	if p.over {
		return
	}
	s.unstandLocked(p)
	p.shown = shown
	s.standLocked(a)
}

// shows reports whether the agent was last let in with what is shown now.
func (s *sessions) shows(p *polls, shown credentials) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return p.shown == shown
}

// standLocked has the standing of what an agent shows be one of its session as well.
func (s *sessions) standLocked(a *agentConn) {
	known := s.standings[a.polls.shown]
	if known == nil {
		known = &standing{}
		s.standings[a.polls.shown] = known
	}
	known.sessions++
	known.any, known.admitted = a, max(known.admitted, a.polls.admitted.Load())
}

// unstandLocked takes standLocked back.
func (s *sessions) unstandLocked(p *polls) {
	known := s.standings[p.shown]
	if known.any != nil && known.any.polls == p {
		known.any = nil // whichever other there is will be asked about for itself
	}
	if known.sessions--; known.sessions == 0 {
		delete(s.standings, p.shown)
	}
}

// find returns who polls with these credentials under uid; nil if there is no session, or it is about to end.
func (s *sessions) find(c credentials, uid wire.UID) *agentConn {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.findLocked(sessionKey{c, uid})
}

func (s *sessions) findLocked(key sessionKey) *agentConn {
	if a := s.agents[key]; a != nil && !a.polls.Closing() {
		return a
	}
	return nil
}

// likely returns who polls most likely, of whom nothing is known but the credentials, what he shows, and a word of his own;
// nil if there is nobody.
func (s *sessions) likely(c, shown credentials, uid string) *agentConn {
	named, err := parseHeaderUID(uid)
	s.mu.Lock()
	defer s.mu.Unlock()
	if err == nil {
		if a := s.findLocked(sessionKey{c, named}); a != nil {
			return a
		}
	}
	if known := s.standings[shown]; known != nil && known.sessions == 1 && known.any != nil && !known.any.polls.Closing() {
		return known.any
	}
	return nil
}

// parseHeaderUID reads a UUID as it stands in a header.
func parseHeaderUID(text string) (wire.UID, error) {
	b, err := hex.DecodeString(strings.ReplaceAll(text, "-", ""))
	if err != nil {
		return wire.UID{}, err
	}
	return wire.ParseUID(b)
}

// renamed returns the session of c under uid from now on, if the server has given its agent that name.
func (s *sessions) renamed(c *claim, uid wire.UID, with credentials) *agentConn {
	if c == nil || c.agent.polls == nil {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	p, key := c.agent.polls, sessionKey{with, uid}
	if p.key.credentials != with || s.agents[p.key] != c.agent || s.agents[key] != nil || p.Closing() {
		return nil
	}
	delete(s.agents, p.key)
	p.key, s.agents[key] = key, c.agent
	return c.agent
}

// add adds a, unless its agent has a session already, which is returned then.
func (s *sessions) add(a *agentConn) *agentConn {
	s.mu.Lock()
	defer s.mu.Unlock()
	p := a.polls
	if before := s.findLocked(p.key); before != nil {
		return before
	}
	s.agents[p.key] = a
	s.standLocked(a)
	return nil
}

// remove forgets a session that has ended.
func (s *sessions) remove(p *polls) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if a := s.agents[p.key]; a != nil && a.polls == p {
		delete(s.agents, p.key)
	}
	s.unstandLocked(p)
	p.over = true
}

// remember notes when an agent has polled last that has missed its polls.
func (s *sessions) remember(p *polls, since int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.missed) >= maxMissed {
		s.missedBefore, s.missed = s.missed, map[sessionKey]int64{}
	}
	s.missed[p.key] = since
}

// absence returns for how long an agent did not poll that has missed its polls; 0 if it is not remembered.
func (s *sessions) absence(key sessionKey) time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	since := cmp.Or(s.missed[key], s.missedBefore[key])
	delete(s.missed, key)
	delete(s.missedBefore, key)
	if since == 0 {
		return 0
	}
	return monotonic.Since(since)
}

// ofRequest are headers that one request has of those in between, or of whoever traces it. They say nothing of the agent.
var ofRequest = []string{
	"B3", "Baggage", "Cache-Control", "Date", "Forwarded", "Pragma", "Traceparent", "Tracestate", "Via", "X-Amzn-Trace-Id",
	"X-B3-Parentspanid", "X-B3-Sampled", "X-B3-Spanid", "X-B3-Traceid", "X-Cloud-Trace-Context", "X-Correlation-Id",
	"X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Port", "X-Forwarded-Proto", "X-Forwarded-Server", "X-Real-Ip", "X-Request-Id",
}

// hashOwn begins a hash of the headers of a request that may tell its agent from another: all that are its own, since the server
// may know agents by any.
func hashOwn(headers http.Header) hash.Hash {
	own := posting.OwnHeaders(headers)
	for _, name := range ofRequest {
		delete(own, name)
	}
	hash := sha256.New()
	for _, name := range slices.Sorted(maps.Keys(own)) {
		fmt.Fprintf(hash, "%d %s %d\n", len(name), name, len(own[name]))
		for _, value := range own[name] {
			fmt.Fprintf(hash, "%d %s\n", len(value), value)
		}
	}
	return hash
}

// shownBy returns what an agent over plain HTTP shows to the server in its request.
func shownBy(headers http.Header, certificate *x509.Certificate) credentials {
	hash := hashOwn(headers)
	if certificate != nil {
		hash.Write(certificate.Raw)
	}
	return credentials(hash.Sum(nil))
}

// postKey finds, in the context of a request, the poll that it is.
type postKey struct{}

// withoutBody returns r as it passes authentication and middlewares: these would read of the body, or unpack it, before
// its sender may send one.
func withoutBody(r *http.Request) *http.Request {
	bare := r.WithContext(context.WithValue(r.Context(), postKey{}, r))
	bare.Body, bare.ContentLength, bare.TransferEncoding = http.NoBody, 0, nil
	bare.Header = r.Header.Clone()
	delete(bare.Header, "Content-Encoding")
	return bare
}

// postOf returns a poll as it came.
func postOf(r *http.Request) (*http.Request, bool) {
	post, ok := r.Context().Value(postKey{}).(*http.Request)
	return post, ok
}

// answerPoll answers the poll of an agent over plain HTTP:
//
//  1. Who comes with credentials that the server has not let in lately is asked about. A refusal is the answer.
//  2. The body is read. It says which agent polls.
//  3. One that has no session is asked about, unless that was just done, and gets one; one that was asked about too long
//     ago is so again.
//  4. The message is handed on, and what the server says is the answer; if it says nothing in time, an empty message.
func (s *downstreamServer) answerPoll(w http.ResponseWriter, r *http.Request) {
	certificate := verifiedCertificate(r)
	v := &visit{
		server: s, w: w, r: r, answer: http.NewResponseController(w),
		credentials: credentialsOf(r.Header, certificate), shown: shownBy(r.Header, certificate),
	}
	defer func() {
		if v.newcomer != nil {
			s.forget(v.newcomer)
		}
	}()
	if outcome := v.serve(); outcome != "" {
		s.tel.Admission(outcome)
	}
	if !v.read { // net/http reads on for a while, so that the agent hears the answer
		_ = v.answer.SetReadDeadline(time.Now().Add(lingerTime))
	}
}

// visit is one poll while it is answered.
type visit struct {
	server      *downstreamServer
	w           http.ResponseWriter
	r           *http.Request
	answer      *http.ResponseController
	credentials credentials
	shown       credentials
	newcomer    *agentConn // whom the server was just asked about; it has no session yet
	asked       *agentConn // with a session, whom the server was just asked about again
	read        bool       // all of the body
}

// serve returns how an admission has ended; nothing if there was none.
func (v *visit) serve() (outcome telemetry.Outcome) {
	s := v.server
	// The listener's write timeout counts from the request; the server may take longer.
	_ = v.answer.SetWriteDeadline(time.Now().Add(answerCeiling))
	if v.r.Header.Get(connectionIDHeader) != "" {
		http.Error(v.w, "a gateway has to connect by WebSocket", http.StatusBadRequest)
		return telemetry.OutcomeBadRequest
	}
	if outcome = v.mayUpload(); outcome != "" {
		return outcome
	}
	door.LetIn(v.r)
	upload, outcome := v.upload()
	if upload == nil {
		return outcome
	}
	f, uid, refusal := v.scan(upload.Bytes())
	if refusal != "" {
		upload.Close()
		return v.fail(refusal, http.StatusBadRequest)
	}
	a, outcome := v.session(f, uid)
	if a == nil {
		upload.Close()
		return outcome
	}
	format := wire.FormatOf(&wire.Fields{Header: !uid.IsText()}, uid)
	leaves := format.Departs(f)
	s.exchange(v, a, upload.Message(format.Header), uid)
	if leaves {
		a.Close()
	}
	return outcome
}

// mayUpload finds out whether a body may be sent.
func (v *visit) mayUpload() (outcome telemetry.Outcome) {
	s := v.server
	if s.cfg.Load().Server.AgentAdmission == AdmissionAccept || s.polled.trust(v.shown) {
		return ""
	}
	if a := s.polled.likely(v.credentials, v.shown, v.r.Header.Get(instanceUIDHeader)); a != nil {
		return v.askAgain(a)
	}
	return v.letIn()
}

// letIn has the server decide on a newcomer. It returns nothing if that is let in; otherwise the poll was answered.
func (v *visit) letIn() (outcome telemetry.Outcome) {
	if v.server.draining() {
		refuseForReload(v.w, errClosing)
		return telemetry.OutcomeReload
	}
	v.newcomer, outcome = v.server.letIn(v.w, v.r)
	if v.newcomer == nil {
		return outcome
	}
	return ""
}

// upload reads the body; without one, the poll was answered.
func (v *visit) upload() (*polling.Upload, telemetry.Outcome) {
	s, cfg := v.server, v.server.cfg.Load()
	address, packed := fair.AddressOf(v.r.RemoteAddr), strings.EqualFold(v.r.Header.Get("Content-Encoding"), "gzip")
	taken := requestMemory
	if packed {
		taken += polling.UnpackMemory
	}
	if !s.memory.Requests.Take(address, taken) {
		refuseForNow(v.w, "too many agents are sending messages")
		return nil, telemetry.OutcomeTooMany
	}
	defer s.memory.Requests.Give(address, taken)

	upload := polling.NewUpload(v.r.Context(), s.memory)
	body := &bodyReader{body: v.r.Body, upload: upload, pause: cmp.Or(cfg.Listener.ReadTimeout, uploadPause), answer: v.answer}
	stop := context.AfterFunc(upload.Context(), body.interrupt)
	from, length := io.Reader(body), v.r.ContentLength
	if packed {
		unpacked := polling.Unpack(body)
		defer unpacked.Close()
		from = unpacked
		if length <= int64(cfg.MaxMessageSize) {
			length = -1
		}
	}
	err := upload.Read(from, length, cfg.MaxMessageSize, func() {
		s.tel.Fault(telemetry.ReasonMemoryFull)
		s.events.Warn("memory for messages is used up, see max_buffered_size; agents with large messages wait", telemetry.Peer("client", v.r.RemoteAddr))
	})
	stop()
	if err == nil {
		v.read = true
		_ = v.answer.SetReadDeadline(time.Time{}) // an error comes again with the answer
		return upload, ""
	}
	defer upload.Close()
	switch {
	case upload.WasCut():
		s.tel.Fault(telemetry.ReasonMemoryFull)
		s.events.Warn("memory for messages is used up, see max_buffered_size; a message that comes too slowly is not taken", telemetry.Peer("client", v.r.RemoteAddr))
		refuseForNow(v.w, "memory for messages is used up, and this one came too slowly")
		return nil, telemetry.OutcomeTooMany
	case s.admitting.Err() != nil:
		refuseForReload(v.w, errClosing)
		return nil, telemetry.OutcomeReload
	case errors.Is(err, polling.ErrTooLarge):
		s.tel.Fault(telemetry.ReasonTooLarge)
		return nil, v.fail("the message is above max_message_size", http.StatusRequestEntityTooLarge)
	case errors.Is(err, os.ErrDeadlineExceeded):
		return nil, v.fail("the body did not arrive in time", http.StatusRequestTimeout)
	case v.r.Context().Err() != nil: // the agent has left
		return nil, telemetry.OutcomeAbandoned
	case packed:
		s.tel.Fault(telemetry.ReasonBadFrame)
		return nil, v.fail("the body is not gzip, or not all of it", http.StatusBadRequest)
	default:
		return nil, v.fail("the body cannot be read", http.StatusBadRequest)
	}
}

// bodyReader reads a body with time for each part of it.
type bodyReader struct {
	body   io.Reader
	upload *polling.Upload
	pause  time.Duration
	answer *http.ResponseController
}

// Read is that of io.Reader.
func (b *bodyReader) Read(p []byte) (int, error) {
	_ = b.answer.SetReadDeadline(time.Now().Add(b.pause)) // an error comes again when it is read
	if err := b.upload.Context().Err(); err != nil {
		return 0, err
	}
	return b.body.Read(p)
}

// interrupt ends a Read.
func (b *bodyReader) interrupt() { _ = b.answer.SetReadDeadline(time.Unix(1, 0)) }

// fail refuses a poll.
func (v *visit) fail(text string, status int) telemetry.Outcome {
	v.server.logRefusal("request refused: "+text, v.r, status)
	http.Error(v.w, text, status)
	return telemetry.OutcomeBadRequest
}

// scan finds out who polls. A refusal says why that cannot be found out.
func (v *visit) scan(message []byte) (_ *wire.Fields, uid wire.UID, refusal string) {
	f, err := wire.ScanAgentToServer(message)
	switch {
	case err == nil && f.Header:
		err = errHeader
		fallthrough
	case err != nil:
		v.server.tel.Fault(telemetry.ReasonBadFrame)
		return nil, uid, "the body is no AgentToServer message: " + err.Error()
	}
	if uid, err = wire.ParseUID(f.UID); err != nil {
		v.server.tel.Fault(telemetry.ReasonBadUID)
		return nil, uid, err.Error()
	}
	return &f, uid, ""
}

var errHeader = errors.New("it begins with the header that a message has on a WebSocket")

// session returns the connection of the agent that polls, after the server was asked about it if that was due. Without
// one, the poll was answered.
func (v *visit) session(f *wire.Fields, uid wire.UID) (*agentConn, telemetry.Outcome) {
	s := v.server
	key := v.credentials
	a := s.polled.find(key, uid)
	if a == nil {
		a = s.polled.renamed(s.router.findGiven(uid), uid, key)
	}
	if s.pool.target.Load().http && (a == nil || !s.polled.shows(a.polls, v.shown)) {
		// Nobody is asked: its messages are posted with what it has come with. So what comes with something else has a
		// session of its own.
		if other := s.polled.find(v.shown, uid); a != nil || other != nil {
			key, a = v.shown, other
		}
	}
	if a != nil {
		if v.newcomer != nil { // whom the server has just let in, though not on the link where it is
			s.polled.admitted(a, v.shown)
		} else if a != v.asked && a.polls.stale(v.shown) {
			if outcome := v.askAgain(a); outcome != "" {
				return nil, outcome
			}
		}
		return a, ""
	}
	if v.newcomer == nil {
		if outcome := v.letIn(); outcome != "" {
			return nil, outcome
		}
	}
	return v.begin(f, sessionKey{key, uid})
}

// begin gives a newcomer a session.
func (v *visit) begin(f *wire.Fields, key sessionKey) (*agentConn, telemetry.Outcome) {
	uid := key.uid
	s, address := v.server, fair.AddressOf(v.r.RemoteAddr)
	if !s.door.Enter(address) {
		s.events.Warn("as many agents are connected as agents::max_connections allows; new ones are turned away", telemetry.Peer("client", v.r.RemoteAddr))
		refuseForNow(v.w, "too many agents are connected")
		return nil, telemetry.OutcomeTooMany
	}
	a := v.newcomer
	a.polls = &polls{Session: polling.NewSession[*claim](s.polled.absence(key)), server: s, address: address, key: key, shown: v.shown}
	a.polls.admitted.Store(monotonic.Now())
	if before := s.polled.add(a); before != nil { // it has polled twice at once
		s.door.Leave(address)
		return before, ""
	}
	v.newcomer = nil
	a.startOn(a.polls)
	if format := (wire.Format{Header: true}); !uid.IsText() && !f.Has(fieldAgentDescription) {
		// It does not know that it is new here: it was let go, or connected to another gateway, or this was restarted.
		// What it was to be told there is lost, and the server may have forgotten it.
		a.sendOwn(format.ReportFullState(uid))
	}
	return a, telemetry.OutcomeAccepted
}

// askAgain asks the server about an agent that was let in a while ago, on the link where it is. It returns nothing if the
// agent may go on; otherwise the poll was answered.
func (v *visit) askAgain(a *agentConn) telemetry.Outcome {
	s := v.server
	v.asked = a
	l, same := a.link.Load(), s.polled.shows(a.polls, v.shown)
	switch {
	case a.question == nil, l != nil && l.posts != nil: // it is asked for by its messages, if at all
		return ""
	case l == nil && same: // it is about to be introduced again
		return ""
	case l == nil:
		return s.turnAway(v.w, v.r, errNoLink)
	}
	question, err := connect.NewQuestion(v.r.RemoteAddr, v.r.Header, verifiedCertificate(v.r))
	if err != nil {
		http.Error(v.w, err.Error(), http.StatusRequestHeaderFieldsTooLarge)
		return telemetry.OutcomeBadRequest
	}
	address, taken := fair.AddressOf(v.r.RemoteAddr), requestMemory+2*len(question)
	if !s.memory.Requests.Take(address, taken) {
		refuseForNow(v.w, "too many agents are waiting to connect")
		return telemetry.OutcomeTooMany
	}
	defer s.memory.Requests.Give(address, taken)
	timeout := min(answerTimeout, s.cfg.Load().Server.AdmissionTimeout)
	ctx, cancel := context.WithTimeout(v.r.Context(), timeout)
	defer cancel()
	// As it comes now, and not as it came first.
	verdict, err := l.decide(ctx, &agentConn{server: s, remote: v.r.RemoteAddr, question: question}, questions.ClassNewcomer, timeout)
	without, unverified := errors.AsType[*noVerdictError](err)
	switch status := verdict.RefusalStatus(); {
	case err != nil && same && monotonic.Since(a.polls.admitted.Load()) < admissionLife+s.cfg.Load().Server.GracePeriod && v.r.Context().Err() == nil:
		return "" // its word holds for a while when it cannot be asked
	case unverified && v.r.Context().Err() == nil && ctx.Err() == nil:
		return s.unverified(v.w, a, without)
	case err != nil:
		return s.turnAway(v.w, v.r, err)
	case verdict.Accept:
		s.polled.admitted(a, v.shown)
		return ""
	case status == http.StatusTooManyRequests || status == http.StatusServiceUnavailable: // just now
	case !same: // it says nothing of what was let in
	default:
		a.dismiss(ending.Refused)
	}
	s.refuse(v.w, v.r, &verdict)
	return telemetry.OutcomeRefused
}

// exchange hands on what an agent says, and answers its poll.
func (s *downstreamServer) exchange(v *visit, a *agentConn, m *polling.Message, uid wire.UID) {
	wait := s.cfg.Load().Agents.PollWait
	answer, err := a.polls.Poll(v.r.Context(), m, max(takeTime, wait), wait)
	if err != nil {
		m.Done()
		v.notTaken(err)
		return
	}
	written := false
	if answer != nil {
		defer func() { answer.Written(written) }()
	}
	if v.r.Context().Err() != nil && s.admitting.Err() == nil {
		return // the agent has left; what there is to say waits for its next poll
	}
	body := wire.Format{}.Nothing(uid)
	if answer != nil {
		body = answer.Body()
	} else if a.ending.Closing() && a.question != nil {
		if verdict, ok := s.pool.refusals.find(a.question); ok { // by a server over plain HTTP, to what the agent has just said
			s.refuse(v.w, v.r, &verdict)
			return
		}
	}
	err = v.write(body)
	if written = err == nil; !written {
		s.log.Debug("answer to a poll could not be written", a.logged(zap.Error(err))...)
	}
}

// notTaken answers a poll whose message was not taken: the agent is to send it again.
func (v *visit) notTaken(err error) {
	switch {
	case v.server.admitting.Err() != nil:
		refuseForReload(v.w, errClosing)
	case v.r.Context().Err() != nil: // the agent has left
	case errors.Is(err, polling.ErrEnded):
		refuseForReload(v.w, err)
	default:
		v.w.Header().Set("Retry-After", strconv.Itoa(2+rand.IntN(4)))
		http.Error(v.w, err.Error(), http.StatusServiceUnavailable)
	}
}

// write answers the poll with a message. An error means that the agent may not have it.
func (v *visit) write(body []byte) error {
	to := &progress{v: v, within: v.server.cfg.Load().Agents.WriteTimeout}
	begin := func(packed bool) {
		h := v.w.Header()
		h.Set("Content-Type", "application/x-protobuf")
		if packed {
			h.Set("Content-Encoding", "gzip")
		} else {
			h.Set("Content-Length", strconv.Itoa(len(body)))
		}
		door.Keep(v.w, v.r)
	}
	var err error
	if polling.TakesGzip(v.r.Header) {
		err = polling.WritePacked(to, body, begin)
	} else {
		begin(false)
		err = polling.Write(to, body)
	}
	if err != nil {
		return err
	}
	if err = to.flush(); errors.Is(err, http.ErrNotSupported) { // by a middleware, which says nothing of the agent
		return nil
	}
	return err
}

// progress has each write make progress within a time.
type progress struct {
	v      *visit
	within time.Duration
}

// Write is that of io.Writer.
func (p *progress) Write(b []byte) (int, error) {
	_ = p.v.answer.SetWriteDeadline(time.Now().Add(p.within)) // an error comes again when it is written
	return p.v.w.Write(b)
}

func (p *progress) flush() error {
	_ = p.v.answer.SetWriteDeadline(time.Now().Add(p.within))
	return p.v.answer.Flush()
}
