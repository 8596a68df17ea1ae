package opampgateway

import (
	"cmp"
	"context"
	"errors"
	"maps"
	"net"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"time"
	"unique"

	"github.com/gorilla/websocket"
	"go.uber.org/zap"

	"github.com/opampgateway/opampgateway/internal/connect"
	"github.com/opampgateway/opampgateway/internal/door"
	"github.com/opampgateway/opampgateway/internal/ending"
	"github.com/opampgateway/opampgateway/internal/memory"
	"github.com/opampgateway/opampgateway/internal/monotonic"
	"github.com/opampgateway/opampgateway/internal/outbox"
	"github.com/opampgateway/opampgateway/internal/peer"
	"github.com/opampgateway/opampgateway/internal/polling"
	"github.com/opampgateway/opampgateway/internal/socket"
	"github.com/opampgateway/opampgateway/internal/status"
	"github.com/opampgateway/opampgateway/internal/telemetry"
	"github.com/opampgateway/opampgateway/internal/wire"
)

const (
	// maxBadInRow is how many unreadable messages in a row an agent may send.
	maxBadInRow = 10

	// muteLimit is how long an agent may be connected before it says something.
	muteLimit = time.Minute

	// fullStateAgain is how long after an agent came to a new link it is asked once more for
	// its full state: a server may notice the end of the old link late, and then forget the
	// agent again. Up to half as much is added, at random.
	fullStateAgain = 60 * time.Second

	// challengeTimeout is how long an agent has to give a sign of life when another, with other
	// credentials, speaks under its instance UID; and denialTime how long it is not asked again.
	challengeTimeout, denialTime = 5 * time.Second, 30 * time.Second

	// When memory is used up, an agent for which less waits than this is left in peace.
	worthShedding = 8 << 10

	// stallMoment is how long an agent may take nothing that waits for it before it counts as not reading.
	stallMoment = 100 * time.Millisecond

	// answerTime is how long requests have to be answered that are under way when the gateway stops.
	answerTime = 250 * time.Millisecond

	// shedPause gives those that were closed the time to give back what they hold.
	shedPause = 10 * time.Millisecond

	// heldUpLimit is how long a reader may go on waiting to hand on what its agent said last, when
	// the agent's connection has ended.
	heldUpLimit = 3 * time.Second
)

// entry is what waits in an outbox: of a link, with the claim of the agent it came from, or of an agent.
type entry = outbox.Entry[*claim]

// downstreamServer is where agents connect. It lets them in, if the server agrees, and owns
// their connections.
type downstreamServer struct {
	// Set once.
	cfg    *currentConfig
	log    *zap.Logger
	events *zap.Logger // log for what may happen to many agents at once: only the first of each kind
	names  *zap.Logger // the same for what names those who cause it
	tel    *telemetry.Telemetry
	router *router
	pool   *upstreamPool
	memory *memory.Budget
	ctx    context.Context // ends when the gateway has nothing more to do
	rules  *door.Rules     // by prepare, as what follows
	door   *door.Door
	http   *http.Server
	polled *sessions // of agents over plain HTTP

	admitting     context.Context // until stop: what requests are answered in
	stopAdmitting context.CancelFunc

	serving  sync.WaitGroup // the HTTP server
	requests sync.WaitGroup // upgrade requests being answered
	readers  sync.WaitGroup // one per agent
	others   sync.WaitGroup // goodbyes that wait to be said, and who makes room when memory is used up

	// mu guards the agents connected, closing and drains. It is never taken for a frame.
	mu      sync.Mutex
	agents  map[*agentConn]struct{}
	closing bool
	drains  bool          // nobody new is let in any more, but for those that are being answered
	life    *life         // of the component that there is; nil between two
	entered chan struct{} // closed, and renewed, when there is a life again, or closing

	failed atomic.Pointer[error] // why nobody is taken from the door any more
}

func newDownstreamServer(ctx context.Context, cfg *currentConfig, log *zap.Logger, tel *telemetry.Telemetry, r *router, p *upstreamPool, budget *memory.Budget) *downstreamServer {
	s := &downstreamServer{
		cfg: cfg, log: log, events: sampled(log), names: sampledTo(log, 50), tel: tel, router: r, pool: p, memory: budget, ctx: ctx,
		agents: map[*agentConn]struct{}{}, entered: make(chan struct{}), polled: newSessions(),
	}
	s.admitting, s.stopAdmitting = context.WithCancel(ctx)
	return s
}

// serve takes agents from the door. failed is called if that breaks down later.
func (s *downstreamServer) serve(failed func(error)) {
	s.serving.Go(func() {
		if err := s.http.Serve(s.door); !errors.Is(err, http.ErrServerClosed) && s.admitting.Err() == nil {
			err = listenerError(err)
			s.failed.Store(&err)
			failed(err)
		}
	})
	s.others.Go(s.makeRoom)
}

// stop lets all agents go; it returns when their last words are with the links, or when ctx
// is done, after which the pool's end ends the rest.
func (s *downstreamServer) stop(ctx context.Context) {
	s.mu.Lock()
	s.closing = true
	s.life = nil
	s.enteredLocked()
	agents := slices.Collect(maps.Keys(s.agents))
	s.mu.Unlock()
	_ = s.door.Close() // the error concerns nobody any more
	s.stopAdmitting()
	for _, a := range agents {
		a.dismiss(ending.Shutdown)
	}
	s.pool.dismissHomeless(agents)
	answered, done := make(chan struct{}), make(chan struct{})
	s.others.Go(func() {
		defer close(done)
		s.requests.Wait() // one may just be letting its agent in
		close(answered)
		s.readers.Wait()
	})
	select {
	case <-answered:
	case <-time.After(answerTime):
	case <-ctx.Done():
	}
	_ = s.http.Close() // strangers that have not asked for anything yet, and whom a middleware holds up
	select {
	case <-done:
	case <-ctx.Done():
	}
}

// cutOff ends the connections of agents that could not be let go in time.
func (s *downstreamServer) cutOff() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for a := range s.agents {
		a.Socket.Close()
	}
}

// wait returns when every goroutine of the server is gone.
func (s *downstreamServer) wait() {
	s.serving.Wait()
	s.requests.Wait()
	s.readers.Wait()
	s.others.Wait()
}

func (s *downstreamServer) count() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.agents)
}

// sweep looks after all agents: it pings the quiet, closes the silent and those that
// offended a while ago, and asks those that changed links for their state once more.
func (s *downstreamServer) sweep(limits peer.Limits) {
	s.mu.Lock()
	agents := slices.Collect(maps.Keys(s.agents))
	s.mu.Unlock()
	for _, a := range agents {
		a.sweep(limits)
	}
	s.memory.Trim()
}

// makeRoom closes agents that make no progress while others need the memory that they take,
// until the gateway has nothing more to do. No link's reader waits for that.
func (s *downstreamServer) makeRoom() {
	var judge <-chan time.Time // while somebody waits, or there is too much
	for s.ctx.Err() == nil {
		select {
		case <-s.memory.Exceeded():
			s.shed()
			_ = sleep(s.ctx, shedPause)
			if judge == nil {
				judge = time.After(memory.LaggardsInterval)
			}
		case <-judge:
			judge = nil
			s.shed()
			s.closeLaggards() // and once more when nobody waits, which forgets all that was noted of them
			if s.memory.Pressed() || s.memory.Excess() > 0 {
				judge = time.After(memory.LaggardsInterval)
			}
		case <-s.ctx.Done():
		}
	}
}

// closeLaggards closes agents that take memory for which others wait, and do not go on.
func (s *downstreamServer) closeLaggards() {
	for _, h := range s.memory.Laggards() {
		switch h := h.(type) {
		case *agentConn:
			if h.cut(ending.MemoryFull) {
				s.events.Warn("memory for messages is used up, see max_buffered_size; closing the connection of an agent that sends a message too slowly, or not on", h.logged()...)
			}
		case *polling.Upload:
			h.Cut() // who reads it says so
		}
	}
}

// shed closes agents, each once, until what the server said takes no more memory than it may:
// those that have read nothing for longest first, and of those that do read, the one for which
// most waits.
func (s *downstreamServer) shed() {
	toFree := s.memory.ToFree()
	if toFree <= 0 {
		return
	}
	type load struct {
		agent   *agentConn
		memory  int
		stalled time.Duration
	}
	s.mu.Lock()
	loads := make([]load, 0, len(s.agents))
	for a := range s.agents {
		if n := a.Outbox.Memory(); n >= worthShedding {
			stalled := a.Socket.Stalled()
			if stalled < stallMoment {
				stalled = 0
			}
			loads = append(loads, load{a, n, stalled})
		}
	}
	s.mu.Unlock()
	slices.SortFunc(loads, func(a, b load) int {
		return cmp.Or(cmp.Compare(b.stalled, a.stalled), cmp.Compare(b.memory, a.memory))
	})
	for _, l := range loads {
		if toFree <= 0 {
			return
		}
		toFree -= int64(l.memory) // of those already closed, too: it is about to be free
		if l.agent.cut(ending.MemoryFull) {
			s.events.Warn("memory for messages is used up, see max_buffered_size; closing the connection of an agent that does not read what the server sends",
				l.agent.logged(zap.Int("bytes", l.memory), zap.Duration("without_progress", l.stalled))...)
		}
	}
}

// agentSocket is what carries an agent's messages: its WebSocket, or the polls of an agent over plain HTTP.
type agentSocket interface {
	peer.Socket[*claim]
	Read() ([]byte, error)
	Release()
	Received() uint64
	Await() <-chan struct{}
	PingSent()
	Unanswered() bool
	Excuse()
	Stalled() time.Duration
}

// agentConn is the connection of one agent, or of another gateway with many behind it.
type agentConn struct {
	peer.Peer[*claim, *outbox.Outbox[*claim], agentSocket]

	// Set once, before the reader starts.
	server      *downstreamServer
	remote      string           // its address
	question    connect.Question // asks the server about it; nil if the server is not asked
	credentials credentials      // that it came with
	decided     *target          // at whose server it was let in last; by who finds a home for it, one after the other
	gateway     bool             // another gateway, which may ask about its agents
	came        int64            // when it has connected, of the monotonic clock
	userAgent   unique.Handle[string]
	agentID     string // the header, as userAgent no longer than is shown
	polls       *polls // of an agent over plain HTTP; nil of all others

	// Owned by the reader.
	uid    wire.UID       // of its last message
	asks   bool           // for another UID, in its last message
	bad    int32          // unreadable messages in a row
	claim  *claim         // to uid; nil when it has to be made
	memory *memory.Reader // of the message being read
	flood  *flood         // nil unless it had to wait lately

	// Shared.
	link      atomic.Pointer[link]         // where its messages go; ended, or nil, while it has none
	told      atomic.Pointer[capabilities] // what a gateway has heard, see claim.told
	ending    ending.State
	mute      atomic.Int64 // since when it has said nothing, of the monotonic clock; 0 when it has
	fullState atomic.Int64 // when it is asked for its state once more, of the monotonic clock; 0 for not
	many      atomic.Int32 // how many agents it speaks for, of a gateway
	faults    atomic.Int32 // how many were counted because of it
	fault     atomic.Int32 // the last of these: its place in telemetry.Reasons

	// For the status page, by the reader.
	speaking atomic.Pointer[claim] // of its last message; may have ended
	heard    atomic.Int64          // when that came, of the monotonic clock, give or take heardWithin; 0 for never
	messages atomic.Uint64         // that came

	// Where its messages wait on its link; see outbox.Line.
	line outbox.Line[*claim]

	// Guarded by router.mu.
	claims claims
	kept   int // bytes counted for the connection as long as it lives

	// Guarded by upstreamPool.mu.
	first    wire.UID      // of its first message; its reader, and who has its messages, may read that without the lock
	attached *link         // in whose agents it is
	homeless chan struct{} // while its reader waits for a link: closed when there is one, or never will be
	gone     []*claim      // when it has ended without a home: whom to say goodbye for
}

// start turns a into a connected agent, which can be found and written to, and reads from conn.
func (a *agentConn) start(conn net.Conn) {
	cfg := a.server.cfg.Load()
	a.startOn(peer.WebSocket[*claim]{Socket: socket.New(conn, socket.InputOf(conn), false, cfg.MaxMessageSize, cfg.Agents.WriteTimeout, a)})
}

// startOn is start for whatever carries its messages.
func (a *agentConn) startOn(carrier agentSocket) {
	s := a.server
	a.memory = s.memory.NewReader(a)
	a.came = monotonic.Now()
	a.mute.Store(a.came)
	a.line.Shared = a.gateway
	// A queue full of small messages may take some more than their bytes.
	cfg := s.cfg.Load()
	queueSize := cfg.Agents.MaxQueueSize
	a.Relayed = &s.tel.Down
	a.Outbox = outbox.New(a, queueSize+queueSize/16, &s.memory.Down)
	a.Socket = carrier
	s.mu.Lock()
	s.agents[a] = struct{}{}
	closing := s.closing
	s.readers.Add(1)
	s.mu.Unlock()
	// A reload may have changed what holds for gateways while this one was being let in; see enterLife.
	if closing || a.gateway && !s.cfg.Load().Agents.AllowGateways {
		a.dismiss(ending.Shutdown)
	}
	s.pool.settleNew(a)
	go a.read()
}

// read is the reader: it relays what the agent says, until the connection ends, and then
// cleans up.
func (a *agentConn) read() {
	defer a.server.readers.Done()
	err := a.relayAll()
	a.ending.AwaitClosing(a.server.ctx)
	if a.ending.Closing() {
		a.discard()
	}
	a.end(err)
}

func (a *agentConn) relayAll() error {
	for {
		frame, err := a.Socket.Read()
		switch {
		case err == nil:
			err = a.relay(frame)
		case errors.Is(err, socket.ErrTooLarge):
			err = a.skip(err)
		case errors.Is(err, socket.ErrText):
			err = a.reject(telemetry.ReasonBadFrame, &wire.Fields{}, "text message; OpAMP messages are binary")
		case errors.Is(err, socket.ErrProtocol):
			a.offend(ending.NoWebSocket, zap.Error(err))
		}
		if err != nil {
			return err
		}
	}
}

// relay takes one frame from the agent to the outbox of its link. It returns an error when
// nothing more is to be read.
func (a *agentConn) relay(frame []byte) error {
	taken := monotonic.Now()
	f, err := wire.ScanAgentToServer(frame)
	if err != nil {
		return a.reject(telemetry.ReasonBadFrame, &f, err.Error())
	}
	if f.CustomMessage != nil {
		if kind, data := connect.Message(f.CustomMessage); kind != connect.Other {
			return a.relayQuestion(frame, &f, kind, data)
		}
	}
	// The normal case: the same UID as before, and nobody else has claimed it. It is not asked to be replaced.
	if a.claim == nil || !a.uid.Is(f.UID) || a.claim.route.current.Load() != a.claim || f.Flags != 0 {
		if reason, err := a.speakAs(&f); err != nil {
			if reason == telemetry.ReasonBadUID {
				return a.reject(reason, &f, err.Error())
			}
			a.turnDown(reason, &f, err.Error())
			return nil
		}
	}
	a.bad = 0
	a.hears(taken)
	a.claim.speaks(f.Sequence)
	switch err := a.send(entry{Frame: frame, Kind: outbox.Message, Sender: a.claim, Taken: taken}); {
	case errors.Is(err, errSuspect), errors.Is(err, errServerLimit):
		a.server.router.unask(a.claim)
		a.turnDown(reasonOf(err), &f, err.Error())
		return nil
	case err != nil:
		a.server.tel.Fault(telemetry.ReasonFrameLost)
		return err
	}
	if a.claim.format.Departs(&f) {
		a.server.router.depart(a.claim)
		a.claim = nil // should it speak again, it is back
	}
	return nil
}

// speakAs makes this connection the way to the agent that sent f. An error comes with its reason.
func (a *agentConn) speakAs(f *wire.Fields) (telemetry.Reason, error) {
	uid, err := wire.ParseUID(f.UID)
	if err != nil {
		return telemetry.ReasonBadUID, err
	}
	s, format := a.server, wire.FormatOf(f, uid)
	a.asks = format.RequestsUID(f)
	c, other, err := s.router.claim(a, uid, format)
	for err == nil && other != nil && !other.same {
		leaves := a.asks && other.asks && a.awaitNamed(other.claim)
		if !leaves && a.challenge(other.claim) {
			return telemetry.ReasonUIDTaken, errUIDTaken
		}
		c, other, err = s.router.takeOver(a, uid, format, other)
	}
	switch {
	case errors.Is(err, errNoMemory):
		return telemetry.ReasonMemoryFull, err
	case err != nil:
		return telemetry.ReasonTooManyUIDs, err
	case other != nil && !other.gone && (!a.asks || !other.asks): // each of those that ask will have another
		a.blame(telemetry.ReasonUIDConflict)
		if other.fresh {
			s.pool.seen.offends(a, uid, status.Offender{
				Kind: status.OffenceUIDConflict, Other: other.agent.remote,
				Text: "in use on two connections with the same credentials; the one that spoke last gets the replies",
			})
			s.events.Warn("instance UID is in use on two connections with the same credentials: an agent has reconnected, or was cloned; the one that spoke last gets the replies",
				zap.Stringer("agent", uid), telemetry.Peer("client", a.remote), telemetry.Peer("other", other.agent.remote))
		}
	}
	if a.first == (wire.UID{}) {
		s.pool.meet(a, uid)
	}
	a.uid, a.claim = uid, c
	a.speaking.Store(c)
	a.speaks()
	if other != nil && other.gone {
		a.bringAlong(other.claim)
	}
	return "", nil
}

// bringAlong has what waits of the agent on the connection from which it has gone, wait on this one: it is not to reach
// the server behind what the agent says here. What waits on one that goes on stays there: that may be a clone's.
func (a *agentConn) bringAlong(before *claim) {
	l := before.agent.link.Load()
	if l == nil {
		return
	}
	p, waiting := a.server.pool, l.Outbox.Withdraw(&before.agent.line, before)
	p.countIn(waiting)
	for i, e := range waiting {
		p.countOut(waiting[i : i+1])
		if e.Stale != nil { // a goodbye of ours, but it is there
			continue
		}
		e.Sender = a.claim
		switch err := a.send(e); {
		case err == nil:
			continue
		case errors.Is(err, errSuspect), errors.Is(err, errServerLimit):
			p.turnDown(a.claim, reasonOf(err), err)
		default:
			a.server.tel.Fault(telemetry.ReasonFrameLost)
		}
		a.server.memory.Recycle(e.Frame)
	}
}

// speaks notes that the agent has said something.
func (a *agentConn) speaks() {
	if a.mute.Load() != 0 {
		a.mute.Store(0)
	}
}

var errUIDTaken = errors.New("this instance UID is in use by another agent, which came with other credentials")

// challenge reports whether the agent of c is there: it has given a sign of life lately, or gives one
// when it is asked. However many speak under its UID, it is not asked again and again.
func (a *agentConn) challenge(c *claim) bool {
	if answered := c.answered.Load(); answered != 0 && monotonic.Since(answered) < denialTime {
		return true
	}
	if !a.ask(c) {
		return false
	}
	c.answered.Store(monotonic.Now())
	a.server.pool.seen.offends(a, c.route.uid, status.Offender{
		Kind: status.OffenceUIDTaken, Other: c.agent.remote,
		Text: "speaks under the instance UID of another agent, with other credentials; its messages are not relayed",
	})
	a.server.events.Warn("agent speaks under the instance UID of another one, with other credentials, while that is connected; its messages are not relayed",
		zap.Stringer("agent", c.route.uid), telemetry.Peer("client", a.remote), telemetry.Peer("other", c.agent.remote))
	return true
}

// ask asks the agent of c for a sign of life, and reports whether it has given one in time. One that
// we do not read just now is given the benefit of the doubt. Of an agent behind a gateway, a pong
// of that says nothing: it is asked for its state.
func (a *agentConn) ask(c *claim) bool {
	other := c.agent
	if other.Paused() {
		return true
	}
	var sign <-chan struct{}
	within := challengeTimeout
	switch {
	case other.polls != nil: // it cannot be asked, but is to poll
		sign, within = other.Socket.Await(), max(within, other.polls.due())
	case other.gateway:
		var isNew bool
		if sign, isNew = c.await(); isNew {
			other.sendOwn(c.format.ReportFullState(c.route.uid))
		}
	default:
		sign = other.Socket.Await()
		_ = other.Outbox.Try(entry{Kind: outbox.Ping})
	}
	ctx, over := a.pause()
	defer over()
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	select {
	case <-sign:
		return !other.ending.Ended()
	case <-ctx.Done():
		return a.server.ctx.Err() != nil
	}
}

// send puts e in the outbox of the agent's link, waiting while too much of the agent's waits there, and
// waiting for a link when there is none. An error may be one of judge.
func (a *agentConn) send(e entry) error {
	for {
		l := a.link.Load()
		if l != nil {
			if err := l.pool.judge(&e); err != nil {
				return err
			}
			if l.posts != nil {
				if err := a.awaitPosts(l.posts, e.Sender); err != nil {
					return err
				}
			}
			err := l.Outbox.Try(e, &a.line, a.weight())
			if errors.Is(err, outbox.ErrFull) {
				began := monotonic.Now()
				ctx, over := a.pause()
				err = l.Outbox.Put(ctx, e, &a.line, a.weight())
				over()
				a.noteWait(began)
			}
			if !errors.Is(err, outbox.ErrClosed) {
				return err
			}
		}
		if err := a.awaitHome(l); err != nil {
			return err
		}
	}
}

// awaitHome has the reader wait until the agent has another link than the one that ended.
func (a *agentConn) awaitHome(ended *link) error {
	ctx, over := a.pause()
	defer over()
	return a.server.pool.awaitHome(ctx, a, ended)
}

// pause is for the reader to wait, in the context returned, for others than its agent; over is to
// be called afterwards.
func (a *agentConn) pause() (ctx context.Context, over func()) { return a.ending.Pause(a.server.ctx) }

// Piece returns memory for a message, and waits for it when there is none; the socket calls it.
func (a *agentConn) Piece(size, message int) ([]byte, error) {
	return a.memory.Piece(size, message, func() (context.Context, func()) {
		a.blame(telemetry.ReasonMemoryFull)
		a.server.events.Warn("memory for messages is used up, see max_buffered_size; agents with large messages wait", a.logged()...)
		return a.pause()
	})
}

// Shrink puts what is in a piece into a smaller one; the socket calls it.
func (a *agentConn) Shrink(piece []byte, n int) []byte { return a.memory.Shrink(piece, n) }

// Return takes back what Piece gave; the socket calls it.
func (a *agentConn) Return(piece []byte) { a.memory.Return(piece) }

// Release counts memory no longer that is the link's now; the socket calls it.
func (a *agentConn) Release(n int) { a.memory.Release(n) }

// Received returns how many bytes of messages have come; the memory's budget calls it.
func (a *agentConn) Received() uint64 { return a.Socket.Received() }

// Paused reports whether the reader waits for others than its agent; the memory's budget calls it.
func (a *agentConn) Paused() bool { return a.ending.Paused(heldUpLimit) }

// reject turns down a message that cannot be read. After too many in a row the connection offends.
func (a *agentConn) reject(reason telemetry.Reason, f *wire.Fields, text string) error {
	a.turnDown(reason, f, text)
	if a.bad++; a.bad >= maxBadInRow {
		a.offend(ending.BadMessages)
		return errOffended
	}
	return nil
}

var errOffended = errors.New("connection is read no further")

// turnDown counts a message that is not relayed, and says why, with whatever UID came.
func (a *agentConn) turnDown(reason telemetry.Reason, f *wire.Fields, text string) {
	a.speaks() // if nothing good
	a.blame(reason)
	a.server.events.Info("agent's message is not relayed: "+text, a.logged()...)
	format := wire.Format{Header: f.Header}
	uid := f.UID
	if a.claim != nil {
		format = a.claim.format
		if len(uid) == 0 {
			uid = a.uid.Bytes()
		}
	} else if parsed, err := wire.ParseUID(uid); err == nil {
		format = wire.FormatOf(f, parsed)
	}
	a.sendOwn(format.BadRequest(uid, "opampgateway: "+text))
}

// skip reads past a message above the limit. Of a gateway, which many share, nothing more is
// taken amiss.
func (a *agentConn) skip(err error) error {
	large, ok := errors.AsType[*socket.TooLargeError](err)
	if !ok {
		return err
	}
	if !a.gateway {
		a.offend(ending.TooLarge, zap.Int64("bytes", large.Size))
		return errOffended
	}
	a.turnDown(telemetry.ReasonTooLarge, &wire.Fields{UID: wire.HeadUID(large.Head), Header: true}, ending.TooLarge.Text)
	return nil
}

// offend has a later sweep close the connection. The reader reads no further.
func (a *agentConn) offend(cause *ending.Cause, details ...zap.Field) {
	if a.ending.Offend(cause) {
		a.count(cause)
		a.server.events.Info("agent's connection will be closed: "+cause.Text, a.logged(details...)...)
	}
}

func (a *agentConn) count(cause *ending.Cause) {
	if cause.Counts {
		a.blame(cause.Reason)
	}
}

// logged is what a log line says about an agent.
func (a *agentConn) logged(more ...zap.Field) []zap.Field {
	return append(more, telemetry.Peer("client", a.remote))
}

// discard reads past what the agent still says, until it has heard that it is closed, or for a
// moment: to close a socket with data unread would take back what was last written to it.
func (a *agentConn) discard() {
	for {
		switch _, err := a.Socket.Read(); {
		case err == nil:
			a.server.tel.Fault(telemetry.ReasonFrameLost)
		case !socket.Skippable(err):
			return
		}
	}
}

// deliver takes one frame from the server to the agent's outbox. It only tries, since a link's
// reader waits for nobody: an agent too slow to take it is let go, since a lost offer would
// leave it silently out of date, while a reconnecting agent is brought up to date. It reports
// whether the frame is the outbox's now.
func (a *agentConn) deliver(frame []byte, taken int64) bool {
	err := a.Outbox.Try(entry{Frame: frame, Kind: outbox.Message, Taken: taken})
	if err == nil {
		return true
	}
	a.blame(telemetry.ReasonServerFrameLost)
	if errors.Is(err, outbox.ErrFull) {
		a.dismiss(ending.Slow)
	}
	return false
}

// sendOwn tries to send a frame of the gateway's own; it is no loss if it does not fit.
func (a *agentConn) sendOwn(frame []byte) {
	_ = a.Outbox.Try(entry{Frame: frame, Kind: outbox.Message})
}

// Pinged answers the agent's ping, unless too much waits already; the socket calls it.
func (a *agentConn) Pinged(payload []byte) {
	_ = a.Outbox.Try(entry{Frame: payload, Kind: outbox.Pong})
}

// Ponged does nothing: any sign of life is as good; the socket calls it.
func (a *agentConn) Ponged([]byte) {}

// askFullState asks every agent on this connection for its full state.
func (a *agentConn) askFullState() {
	for _, c := range a.server.router.reached(a) {
		a.sendOwn(c.format.ReportFullState(c.route.uid))
	}
}

// WriteBatch writes to the agent's socket; the outbox calls it.
func (a *agentConn) WriteBatch(batch []entry) (int, error) {
	n, err := a.Peer.WriteBatch(batch)
	if err != nil && errors.Is(err, socket.ErrStalled) {
		a.cut(ending.Slow)
	}
	return n, err
}

// Close ends the connection after a write has failed; the outbox calls it.
func (a *agentConn) Close() {
	a.ending.Close(nil)
	a.Socket.Close()
}

// dismiss lets the agent go: what waits for it, and a close frame if the cause has one, are written if
// that takes but a moment. It never waits.
func (a *agentConn) dismiss(cause *ending.Cause) {
	cause, isNew := a.ending.Close(cause)
	if !isNew {
		return
	}
	if !cause.Late { // otherwise that was done when it offended
		a.count(cause)
		if cause != ending.Shutdown {
			a.server.events.Info("closing agent's connection: "+cause.Text, a.logged()...)
		}
	}
	if cause.Code == 0 {
		a.Outbox.End()
		return
	}
	a.Outbox.Close(websocket.FormatCloseMessage(cause.Code, cause.Text))
}

// cut is dismiss for an agent that would not read it. It reports whether it was not closed before.
func (a *agentConn) cut(cause *ending.Cause) bool {
	cause, isNew := a.ending.Close(cause)
	if isNew {
		a.count(cause)
		a.Socket.Close()
	}
	return isNew
}

func (a *agentConn) sweep(limits peer.Limits) {
	if cause, offends := a.ending.Due(); offends {
		if cause != nil {
			a.dismiss(cause)
		}
		return
	}
	if a.Paused() {
		a.Socket.Excuse()
		// Nobody reads, so only writing tells that the agent is gone. Not a ping: an agent that cannot
		// get rid of its answer ends the connection. A pong wants none (RFC 6455, section 5.5.3).
		_ = a.Outbox.Try(entry{Kind: outbox.Pong})
	}
	if a.polls != nil && a.polls.overdue() {
		a.dismiss(ending.PollsMissed)
	}
	switch a.Sweep(limits) {
	case peer.Silent:
		a.dismiss(ending.Silent)
	case peer.Quiet:
		a.Socket.PingSent()
		_ = a.Outbox.Try(entry{Kind: outbox.Ping})
	case peer.Alive:
	}
	if since := a.mute.Load(); since != 0 && !a.gateway && monotonic.Since(since) >= muteLimit {
		a.dismiss(ending.Mute)
	}
	if due := a.fullState.Load(); due != 0 && monotonic.Now() >= due {
		a.fullState.Store(0)
		a.askFullState()
	}
}

// end is the one place where an agent's connection is cleaned up, by its reader. The server is
// told of the agents that left without a goodbye: what it would have seen had they been
// connected to it. An end while a ping is unanswered is silence: the agent may be elsewhere already.
func (a *agentConn) end(err error) {
	s := a.server
	a.Answer(s.ctx, err)
	lost := 0
	for _, e := range a.Outbox.Abort() {
		if e.Taken != 0 {
			lost++
		}
		s.memory.Recycle(e.Frame)
	}
	s.tel.Faults(telemetry.ReasonServerFrameLost, lost)
	a.Socket.Release()
	a.memory.Close()
	s.mu.Lock()
	delete(s.agents, a)
	s.mu.Unlock()
	if a.polls != nil {
		a.polls.end()
	}
	var waiting []*claim
	if l := a.link.Load(); l != nil {
		waiting = l.Outbox.Waiting(&a.line)
	}
	gone := s.router.release(a, waiting)
	home, gone := s.pool.detach(a, gone)
	s.log.Debug("agent's connection ended", a.logged(zap.Stringer("agent", a.uid), zap.Error(err))...)
	s.pool.seen.agentEnded(a, err)
	s.pool.sayGoodbye(home, gone)
}

// maxUIDs is how many UIDs the connection may claim.
func (a *agentConn) maxUIDs() int {
	if a.gateway {
		return maxGatewayUIDs
	}
	return a.server.cfg.Load().Agents.MaxInstanceUIDs
}
