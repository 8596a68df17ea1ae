package opampgateway

import (
	"cmp"
	"context"
	"crypto/tls"
	"encoding/base64"
	"errors"
	"fmt"
	stdlog "log"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/gorilla/websocket"
	"go.opentelemetry.io/collector/component"
	"go.uber.org/zap"

	"github.com/opampgateway/opampgateway/internal/connect"
	"github.com/opampgateway/opampgateway/internal/memory"
	"github.com/opampgateway/opampgateway/internal/outbox"
	"github.com/opampgateway/opampgateway/internal/socket"
	"github.com/opampgateway/opampgateway/internal/telemetry"
	"github.com/opampgateway/opampgateway/internal/wire"
)

const (
	// handshakeTimeout bounds the writing of an answer to an upgrade request.
	handshakeTimeout = 30 * time.Second

	// maxHandshakes bounds the agents waiting to be let in: a full gateway's worth, since all
	// of them come at once after a reload.
	maxHandshakes = 20_000

	// answerCeiling is when an upgrade request is answered at the latest: opamp-go agents
	// give it 45 s. It leaves the write of the answer some time of its own.
	answerCeiling = admissionCeiling + 5*time.Second

	// maxBadInRow is how many unreadable messages in a row an agent may send.
	maxBadInRow = 10

	// offenceDelay is how long an offending connection is kept at least, and half of how long
	// at most, but for the interval of the sweep.
	offenceDelay = 5 * time.Second

	// fullStateAgain is how long after an agent came to a new link it is asked once more for
	// its full state: a server may notice the end of the old link late, and then forget the
	// agent again. Up to half as much is added, at random.
	fullStateAgain = 60 * time.Second

	// While others wait for memory, an agent whose turn it is has to send this much between two
	// sweeps: 200 KiB/s.
	leastProgress = 1 << 20

	// When memory is used up, an agent for which less waits than this is left in peace.
	worthShedding = 8 << 10

	// An agent that has taken nothing for this long while something waits is not reading.
	stallMoment = 100 * time.Millisecond

	// manyMoves is how many agents have to come or go until it is worth the work to give back the memory
	// that this took.
	manyMoves = 1000

	// shedPause gives those that were closed the time to give back what they hold.
	shedPause = 10 * time.Millisecond

	// heldUpLimit is how long a reader may go on waiting to hand on what its agent said last, when
	// the agent's connection has ended.
	heldUpLimit = 3 * time.Second
)

// entry is what waits in an outbox: of a link, with the agent it came from, or of an agent.
type entry = outbox.Entry[*agentConn]

// downstreamServer is where agents connect. It lets them in, if the server agrees, and owns
// their connections.
type downstreamServer struct {
	// Set once.
	cfg      *Config
	log      *zap.Logger
	events   *zap.Logger // log for what may happen to many agents at once: only the first of each kind
	tel      *telemetry.Telemetry
	router   *router
	pool     *upstreamPool
	memory   *memory.Budget
	ctx      context.Context // ends when the gateway has nothing more to do
	upgrader websocket.Upgrader
	http     *http.Server // by prepare
	tls      *tls.Config  // by prepare; nil for plain connections

	serving   sync.WaitGroup // the HTTP server
	requests  sync.WaitGroup // upgrade requests being answered
	readers   sync.WaitGroup // one per agent
	farewells sync.WaitGroup // goodbyes that wait to be said
	shedding  sync.WaitGroup // who makes room when memory is used up

	waiting atomic.Int64 // upgrade requests being answered
	moves   atomic.Int64 // agents that have come or gone since memory was last given back

	// mu guards the agents connected, and closing. It is never taken for a frame.
	mu      sync.Mutex
	agents  map[*agentConn]struct{}
	closing bool
}

func newDownstreamServer(ctx context.Context, cfg *Config, log *zap.Logger, tel *telemetry.Telemetry, r *router, p *upstreamPool, budget *memory.Budget) *downstreamServer {
	return &downstreamServer{
		cfg: cfg, log: log, events: sampled(log), tel: tel, router: r, pool: p, memory: budget, ctx: ctx,
		agents: map[*agentConn]struct{}{},
		upgrader: websocket.Upgrader{
			HandshakeTimeout: handshakeTimeout,
			// gorilla only shakes hands; these keep it from making buffers that nobody uses.
			ReadBufferSize:  1,
			WriteBufferPool: &sync.Pool{},
			Error: func(w http.ResponseWriter, _ *http.Request, status int, reason error) {
				http.Error(w, reason.Error(), status)
			},
		},
	}
}

// prepare does what can fail before agents can be served: certificates, authentication,
// middleware.
func (s *downstreamServer) prepare(ctx context.Context, host component.Host, set component.TelemetrySettings) error {
	if s.cfg.Listener.TLS.HasValue() {
		config, err := s.cfg.Listener.TLS.Get().LoadTLSConfig(ctx)
		if err != nil {
			return fmt.Errorf("listener::tls: %w", err)
		}
		config.NextProtos = []string{"http/1.1"} // an upgrade fails on HTTP/2
		s.tls = config
	}
	server, err := s.cfg.Listener.ToServer(ctx, host.GetExtensions(), set, s)
	if err != nil {
		return fmt.Errorf("listener: %w", err)
	}
	server.MaxHeaderBytes = s.cfg.Agents.MaxRequestHeaderSize
	server.BaseContext = func(net.Listener) context.Context { return s.ctx }
	server.ErrorLog = stdlog.New(failedHandshakes{s.events}, "", 0)
	s.http = server
	return nil
}

// serve takes agents from listener, which it owns from here on. failed is called if the
// listener breaks down later.
func (s *downstreamServer) serve(listener net.Listener, failed func(error)) {
	listener = socket.Listen(listener)
	if s.tls != nil {
		listener = tls.NewListener(listener, s.tls)
	}
	s.serving.Go(func() {
		if err := s.http.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
			failed(fmt.Errorf("listener: %w", err))
		}
	})
	s.shedding.Go(s.makeRoom)
}

// failedHandshakes logs what the HTTP server has to say: mostly that a TLS handshake failed.
type failedHandshakes struct{ events *zap.Logger }

func (f failedHandshakes) Write(line []byte) (int, error) {
	f.events.Warn("connection failed before it was an agent's", zap.String("reason", strings.TrimSpace(string(line))))
	return len(line), nil
}

// ServeHTTP answers one agent's upgrade request:
//
//  1. What is no upgrade request, or comes from a web page elsewhere, is refused.
//  2. The agent is attached to a link, so that many at once are spread evenly.
//  3. The server is asked; its refusal is passed on.
//  4. The connection is upgraded, and its reader started. From here on the link's end is
//     not the agent's.
func (s *downstreamServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	if s.closing {
		s.mu.Unlock()
		http.Error(w, "the gateway is shutting down", http.StatusServiceUnavailable)
		return
	}
	s.requests.Add(1)
	s.mu.Unlock()
	defer s.requests.Done()

	s.tel.Admission(s.admit(w, r))
}

func (s *downstreamServer) admit(w http.ResponseWriter, r *http.Request) telemetry.Outcome {
	if !s.checkRequest(w, r) {
		return telemetry.OutcomeBadRequest
	}
	defer s.waiting.Add(-1)
	if s.waiting.Add(1) > maxHandshakes {
		refuseForNow(w, "too many agents are waiting to connect")
		return telemetry.OutcomeTooMany
	}
	// The listener's write timeout counts from the request; the server may take longer.
	_ = http.NewResponseController(w).SetWriteDeadline(time.Now().Add(answerCeiling))
	ctx, cancel := context.WithTimeout(r.Context(), s.cfg.Server.AdmissionTimeout)
	defer cancel()

	a, err := s.newAgent(r)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return telemetry.OutcomeBadRequest
	}
	verdict, err := s.pool.admit(ctx, a)
	if err != nil {
		s.pool.detach(a, nil)
		return s.turnAway(w, r, err)
	}
	if !verdict.Accept {
		s.pool.detach(a, nil)
		verdict.CopyRefusalHeaders(w.Header())
		status := verdict.RefusalStatus()
		s.log.Debug("server refused agent", zap.String("remote_address", a.remote), zap.Int("status", status))
		http.Error(w, "refused by the OpAMP server: "+http.StatusText(status), status)
		return telemetry.OutcomeRefused
	}
	ws, err := s.upgrader.Upgrade(w, r, nil)
	if err != nil {
		s.pool.detach(a, nil)
		s.log.Debug("agent left before it was let in", zap.String("remote_address", a.remote), zap.Error(err))
		return telemetry.OutcomeAbandoned
	}
	a.start(ws.NetConn())
	return telemetry.OutcomeAccepted
}

// checkRequest refuses what can never become an agent's connection, before anybody is asked.
func (s *downstreamServer) checkRequest(w http.ResponseWriter, r *http.Request) bool {
	switch origin := r.Header.Get("Origin"); {
	case !websocket.IsWebSocketUpgrade(r) || r.Method != http.MethodGet:
		w.Header().Set("Upgrade", "websocket")
		w.Header().Set("Connection", "Upgrade")
		http.Error(w, "this is an OpAMP gateway: agents connect to it by WebSocket, plain HTTP is not offered", http.StatusUpgradeRequired)
		return false
	case r.Header.Get("Sec-Websocket-Version") != "13":
		w.Header().Set("Sec-Websocket-Version", "13")
		http.Error(w, "WebSocket version 13 is needed", http.StatusBadRequest)
		return false
	case !validKey(r.Header.Get("Sec-Websocket-Key")):
		http.Error(w, "Sec-WebSocket-Key is missing or malformed", http.StatusBadRequest)
		return false
	case origin != "" && !sameOrigin(origin, r.Host):
		http.Error(w, "requests from web pages of another origin are not served", http.StatusForbidden)
		return false
	}
	return true
}

// turnAway answers an agent about whom the server could not be asked. Agents wait as long as
// Retry-After says on 503 and 429 only.
func (s *downstreamServer) turnAway(w http.ResponseWriter, r *http.Request, err error) telemetry.Outcome {
	switch {
	case r.Context().Err() != nil:
		return telemetry.OutcomeAbandoned
	case errors.Is(err, errCannotAsk):
		refuseForNow(w, "the OpAMP server cannot be asked about agents")
		return telemetry.OutcomeCannotAsk
	case errors.Is(err, errNoLink):
		refuseForNow(w, "there is no connection to the OpAMP server")
		return telemetry.OutcomeNoLink
	default:
		refuseForNow(w, "the OpAMP server did not answer in time")
		return telemetry.OutcomeNoAnswer
	}
}

func refuseForNow(w http.ResponseWriter, reason string) {
	// 30 s is the least that the specification recommends; the jitter spreads a fleet.
	w.Header().Set("Retry-After", strconv.Itoa(30+rand.IntN(31)))
	http.Error(w, reason, http.StatusServiceUnavailable)
}

// stop lets all agents go; it returns when their last words are with the links, or when ctx
// is done, after which the pool's end ends the rest.
func (s *downstreamServer) stop(ctx context.Context) {
	s.mu.Lock()
	s.closing = true
	agents := slices.Collect(maps.Keys(s.agents))
	s.mu.Unlock()
	_ = s.http.Close() // the listener's error concerns nobody any more
	for _, a := range agents {
		a.muted.Store(true)
		a.close(websocket.CloseServiceRestart, "gateway is shutting down")
	}
	s.pool.dismissHomeless(agents)
	done := make(chan struct{})
	s.farewells.Go(func() {
		defer close(done)
		s.requests.Wait() // Close has ended them; one may just be letting its agent in
		s.readers.Wait()
	})
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
		a.Close()
	}
}

// wait returns when every goroutine of the server is gone.
func (s *downstreamServer) wait() {
	s.serving.Wait()
	s.requests.Wait()
	s.readers.Wait()
	s.farewells.Wait()
	s.shedding.Wait()
}

func (s *downstreamServer) count() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.agents)
}

// sweep looks after all agents: it pings the quiet, closes the silent and those that
// offended a while ago, and asks those that changed links for their state once more.
func (s *downstreamServer) sweep(now time.Time, keepAlive sweepLimits) {
	s.mu.Lock()
	agents := slices.Collect(maps.Keys(s.agents))
	s.mu.Unlock()
	for _, a := range agents {
		a.sweep(now, keepAlive)
	}
	s.memory.Trim()
	s.giveBack()
}

// giveBack collects what many agents, coming or going at once, have left behind. The collector would
// keep it until its heap has doubled, which idle agents do not bring about.
func (s *downstreamServer) giveBack() {
	if s.waiting.Load() == 0 && s.moves.Load() >= manyMoves {
		s.moves.Store(0)
		debug.FreeOSMemory()
	}
}

// makeRoom lets agents go when memory is used up, until the gateway has nothing more to do. No
// link's reader waits for that.
func (s *downstreamServer) makeRoom() {
	for {
		select {
		case <-s.memory.Exceeded():
			s.shed()
			if s.memory.Collect(); sleep(s.ctx, shedPause) != nil {
				return
			}
		case <-s.ctx.Done():
			return
		}
	}
}

// shed closes those agents for which most waits, at once, so that what they are not reading
// makes room for others: first those that have not read anything for a moment.
func (s *downstreamServer) shed() {
	type load struct {
		agent   *agentConn
		memory  int
		stalled bool
	}
	s.mu.Lock()
	loads := make([]load, 0, len(s.agents))
	for a := range s.agents {
		if n := a.outbox.Memory(); n >= worthShedding {
			loads = append(loads, load{a, n, a.sock.Stalled() > stallMoment})
		}
	}
	s.mu.Unlock()
	slices.SortFunc(loads, func(a, b load) int {
		if a.stalled != b.stalled {
			if a.stalled {
				return -1
			}
			return 1
		}
		return cmp.Compare(b.memory, a.memory)
	})
	toFree := 0
	if s.memory.Excess() > 0 {
		toFree = s.memory.ToFree()
	}
	for _, l := range loads {
		if toFree <= 0 {
			return
		}
		toFree -= l.memory // of those already closed, too: it is about to be free
		if l.agent.shed.Swap(true) {
			continue
		}
		s.tel.Fault(telemetry.ReasonMemoryFull)
		s.events.Warn("memory for messages is used up, see max_buffered_size; closing the connection of the agent that most waits for",
			zap.String("remote_address", l.agent.remote), zap.Int("bytes", l.memory))
		l.agent.Close()
	}
}

// agentConn is the connection of one agent, or of another gateway with many behind it.
type agentConn struct {
	// Set once, before the reader starts.
	server   *downstreamServer
	remote   string
	question connect.Question // asks the server about it; nil if the server is not asked
	sock     *socket.Socket
	outbox   *outbox.Outbox[*agentConn]
	gateway  bool // it announced itself as another gateway

	// Owned by the reader.
	uid    wire.UID      // of its last message
	bad    int32         // unreadable messages in a row
	hold   *hold         // of uid; nil when it has to be claimed
	memory memory.Reader // what it holds

	// Shared.
	link      atomic.Pointer[link]         // where its messages go; ended, or nil, while it has none
	told      atomic.Pointer[capabilities] // what a gateway has heard, see hold.told
	offence   atomic.Pointer[offence]
	paused    atomic.Pointer[context.CancelFunc] // set while the reader waits for others than its agent: ends that
	closing   atomic.Int64                       // when the connection was closed from our side, Unix nanoseconds; 0 for not
	shed      atomic.Bool                        // closed to make room
	muted     atomic.Bool                        // no goodbye is said for it
	fullState atomic.Int64                       // when it is asked for its state once more, Unix seconds; 0 for not

	// Guarded by router.mu: one hold for each agent that speaks here.
	held []*hold

	// Guarded by upstreamPool.mu.
	attached *link         // in whose agents it is
	homeless chan struct{} // while its reader waits for a link: closed when there is one, or never will be
	exiled   bool          // there never will be
	ended    bool          // the connection has ended
	gone     []*hold       // when it has: whom to say goodbye for
}

// offence is something for which a connection is read no further and closed by a later sweep:
// an agent closed at once would come back thousands of times a second.
type offence struct {
	code     int
	text     string
	due      time.Time // when it is closed
	released chan struct{}
	once     sync.Once
}

func (s *downstreamServer) newAgent(r *http.Request) (*agentConn, error) {
	a := &agentConn{server: s, remote: r.RemoteAddr, gateway: r.Header.Get(connectionIDHeader) != ""}
	if s.cfg.Server.AgentAdmission == AdmissionAsk {
		question, err := connect.NewQuestion(r.RemoteAddr, r.Header)
		if err != nil {
			return nil, err
		}
		a.question = question
	}
	return a, nil
}

// start turns a into a connected agent, which can be found and written to, and reads from it.
func (a *agentConn) start(conn net.Conn) {
	s := a.server
	a.memory = s.memory.NewReader()
	// A queue full of small messages may take some more than their bytes.
	queueSize := s.cfg.Agents.MaxQueueSize
	a.outbox = outbox.New(a, queueSize+queueSize/16, &s.memory.Down)
	// gorilla has seen to it that nothing was read beyond the request.
	a.sock = socket.New(conn, socket.InputOf(conn), false, s.cfg.MaxMessageSize, s.cfg.Agents.WriteTimeout, a, a.pong)
	s.mu.Lock()
	s.agents[a] = struct{}{}
	closing := s.closing
	s.readers.Add(1)
	s.mu.Unlock()
	if closing {
		a.muted.Store(true)
		a.close(websocket.CloseServiceRestart, "gateway is shutting down")
	}
	s.moves.Add(1)
	s.pool.settleNew(a)
	go a.read()
}

// read is the reader: it relays what the agent says, until the connection ends, and then
// cleans up.
func (a *agentConn) read() {
	defer a.server.readers.Done()
	err := a.relayAll()
	if off := a.offence.Load(); off != nil {
		select {
		case <-off.released:
			a.discard()
		case <-a.server.ctx.Done():
		}
	} else if errors.Is(err, errLetGo) {
		a.discard()
	}
	a.end(err)
}

func (a *agentConn) relayAll() error {
	for {
		frame, err := a.sock.Read()
		switch {
		case err == nil:
			err = a.relay(frame)
		case errors.Is(err, socket.ErrTooLarge):
			a.offend(telemetry.ReasonTooLarge, websocket.CloseMessageTooBig, "message above max_message_size")
			return err
		case errors.Is(err, socket.ErrText):
			err = a.reject(telemetry.ReasonBadFrame, &wire.Fields{}, "text message; OpAMP messages are binary")
		case errors.Is(err, socket.ErrProtocol):
			a.offend(telemetry.ReasonBadFrame, websocket.CloseProtocolError, err.Error())
		}
		if err != nil {
			return err
		}
	}
}

// relay takes one frame from the agent to the outbox of its link. It returns an error when
// nothing more is to be read.
func (a *agentConn) relay(frame []byte) error {
	taken := clock()
	f, err := wire.ScanAgentToServer(frame)
	if err != nil {
		return a.reject(telemetry.ReasonBadFrame, &f, err.Error())
	}
	if f.CustomMessage != nil {
		if kind, data := connect.Message(f.CustomMessage); kind != connect.Other {
			return a.relayConnect(frame, &f, kind, data, taken)
		}
	}
	// The normal case: the same UID as before, and nobody else has claimed it.
	if a.hold == nil || !a.uid.Is(f.UID) || a.hold.route.current.Load() != a.hold {
		if err := a.claim(&f); err != nil {
			if errors.Is(err, errTooManyUIDs) {
				a.offend(telemetry.ReasonTooManyUIDs, websocket.ClosePolicyViolation, "too many instance UIDs on one connection")
				return err
			}
			return a.reject(telemetry.ReasonBadUID, &f, err.Error())
		}
	}
	a.bad = 0
	if err := a.send(entry{Frame: frame, Kind: outbox.Message, Sender: a, Taken: taken}); err != nil {
		a.server.tel.Fault(telemetry.ReasonFrameLost)
		return err
	}
	if a.hold.format.Departs(&f) {
		a.server.router.depart(a.hold)
		a.hold = nil // should it speak again, it is back
	}
	return nil
}

// claim makes this connection the way to the agent that sent f.
func (a *agentConn) claim(f *wire.Fields) error {
	uid, err := wire.ParseUID(f.UID)
	if err != nil {
		return err
	}
	h, rival, err := a.server.router.claim(a, uid, wire.FormatOf(f, uid))
	if err != nil {
		return err
	}
	if rival != nil {
		a.server.tel.Fault(telemetry.ReasonUIDConflict)
		if rival.fresh {
			a.server.events.Info("instance UID is in use on two connections: an agent has reconnected, or was cloned; the one that spoke last gets the replies",
				zap.Stringer("agent", uid), zap.String("remote_address", a.remote), zap.String("other_address", rival.agent.remote))
		}
	}
	a.uid, a.hold = uid, h
	return nil
}

// relayConnect passes on another gateway's question about one of its own agents. From any
// other connection it would let an agent that was let in try out credentials.
func (a *agentConn) relayConnect(frame []byte, f *wire.Fields, kind connect.Kind, data []byte, taken int64) error {
	if !a.gateway || kind != connect.Connect || len(f.UID) > 0 {
		a.offend(telemetry.ReasonForeignConnect, websocket.ClosePolicyViolation, "only a gateway may ask about agents")
		return errForeignConnect
	}
	requestUID, err := connect.RequestUID(data)
	if err != nil {
		return a.reject(telemetry.ReasonBadFrame, f, err.Error())
	}
	a.bad = 0
	if l := a.link.Load(); l != nil && !l.expectFor(requestUID, a) {
		a.server.tel.Fault(telemetry.ReasonFrameLost) // the gateway below asks again
		return nil
	}
	if err := a.send(entry{Frame: frame, Kind: outbox.Message, Sender: a, Taken: taken}); err != nil {
		a.server.tel.Fault(telemetry.ReasonFrameLost)
		return err
	}
	return nil
}

var errForeignConnect = errors.New("connect from what is no gateway, or with an instance UID")

// send puts e in the outbox of the agent's link, waiting its turn when that is full, and
// waiting for a link when there is none.
func (a *agentConn) send(e entry) error {
	for {
		l := a.link.Load()
		if l != nil {
			err := l.outbox.Try(e)
			if errors.Is(err, outbox.ErrFull) {
				ctx, over := a.pause()
				err = l.outbox.Put(ctx, e)
				over()
			}
			if !errors.Is(err, outbox.ErrClosed) {
				return err
			}
		}
		ctx, over := a.pause()
		err := a.server.pool.awaitHome(ctx, a, l)
		over()
		if err != nil {
			return err
		}
	}
}

// pause is for the reader to wait, in the context returned, for others than its agent; over is to
// be called afterwards. Meanwhile the agent's silence proves nothing.
func (a *agentConn) pause() (ctx context.Context, over func()) {
	ctx, cancel := context.WithCancel(a.server.ctx)
	a.paused.Store(&cancel)
	return ctx, func() {
		a.paused.Store(nil)
		cancel()
	}
}

// Piece returns memory for a large message, and waits for it when there is none; the socket calls it.
func (a *agentConn) Piece(size, message int) ([]byte, error) {
	return a.memory.Piece(size, message, func() (context.Context, func()) {
		a.server.tel.Fault(telemetry.ReasonMemoryFull)
		a.server.events.Warn("memory for messages is used up, see max_buffered_size; agents with large messages wait",
			zap.String("remote_address", a.remote))
		return a.pause()
	})
}

// Return takes back what Piece gave; the socket calls it.
func (a *agentConn) Return(piece []byte) { a.memory.Return(piece) }

// Release counts memory no longer that is the link's now; the socket calls it.
func (a *agentConn) Release(n int) { a.memory.Release(n) }

// reject counts a message that is not relayed and, where the agent is known, says why. After
// too many in a row the connection offends.
func (a *agentConn) reject(reason telemetry.Reason, f *wire.Fields, text string) error {
	a.server.tel.Fault(reason)
	a.bad++
	if uid, err := wire.ParseUID(f.UID); err == nil {
		a.sendOwn(wire.FormatOf(f, uid).BadRequest(uid, "opampgateway: "+text))
	} else if a.hold != nil {
		a.sendOwn(a.hold.format.BadRequest(a.uid, "opampgateway: "+text))
	}
	if a.bad >= maxBadInRow {
		a.offend("", websocket.CloseInvalidFramePayloadData, "too many unreadable messages")
		return errTooManyBad
	}
	return nil
}

var errTooManyBad = errors.New("too many unreadable messages in a row")

// offend has a later sweep close the connection. The reader reads no further.
func (a *agentConn) offend(reason telemetry.Reason, code int, text string) {
	if reason != "" {
		a.server.tel.Fault(reason)
	}
	a.server.events.Info("agent's connection will be closed", zap.String("reason", text),
		zap.Stringer("agent", a.uid), zap.String("remote_address", a.remote))
	a.offence.Store(&offence{code: code, text: text, due: time.Now().Add(offenceDelay + rand.N(offenceDelay)), released: make(chan struct{})})
}

// discard reads on until the agent has heard that it is closed, or for a moment: to close a
// socket with data unread would take back what was last written to it.
func (a *agentConn) discard() {
	for {
		if _, err := a.sock.Read(); err != nil && !socket.Skippable(err) {
			return
		}
	}
}

// deliver takes one frame from the server to the agent's outbox. It only tries, since a link's
// reader waits for nobody: an agent too slow to take it is let go, since a lost offer would
// leave it silently out of date, while a reconnecting agent is brought up to date. It reports
// whether the frame is the outbox's now.
func (a *agentConn) deliver(frame []byte, taken int64) bool {
	err := a.outbox.Try(entry{Frame: frame, Kind: outbox.Message, Taken: taken})
	if errors.Is(err, outbox.ErrFull) {
		a.server.tel.Fault(telemetry.ReasonAgentSlow)
		a.server.events.Info("agent reads too slowly; closing its connection", zap.String("remote_address", a.remote))
		a.close(websocket.CloseTryAgainLater, "agent reads too slowly")
	}
	return err == nil
}

// sendOwn tries to send a frame of the gateway's own; it is no loss if it does not fit.
func (a *agentConn) sendOwn(frame []byte) {
	_ = a.outbox.Try(entry{Frame: frame, Kind: outbox.Message})
}

// pong answers the agent's ping, unless too much waits already.
func (a *agentConn) pong(payload []byte) {
	_ = a.outbox.Try(entry{Frame: payload, Kind: outbox.Pong})
}

// askFullState asks every agent on this connection for its full state.
func (a *agentConn) askFullState() {
	for _, h := range a.server.router.reached(a) {
		a.sendOwn(h.format.ReportFullState(h.route.uid))
	}
}

// TryBatch writes to the agent's socket what it takes at once; the outbox calls it.
func (a *agentConn) TryBatch(batch []entry) (int, error) {
	n, err := socket.TryBatch(a.sock, batch)
	countRelayed(&a.server.tel.Down, batch[:n])
	return n, err
}

// WriteBatch writes to the agent's socket; the outbox calls it.
func (a *agentConn) WriteBatch(batch []entry) (int, error) {
	n, err := socket.WriteBatch(a.sock, batch)
	countRelayed(&a.server.tel.Down, batch[:n])
	if err != nil && errors.Is(err, socket.ErrStalled) {
		a.server.tel.Fault(telemetry.ReasonAgentSlow)
	}
	return n, err
}

// Hurry bounds what the connection may still take; the outbox calls it.
func (a *agentConn) Hurry() { a.sock.Hurry() }

// Close ends the connection; the outbox calls it.
func (a *agentConn) Close() {
	a.closing.CompareAndSwap(0, time.Now().UnixNano())
	a.sock.Close()
}

// close lets the agent go: what waits for it, and a close frame, are written if that takes
// but a moment. It never waits.
func (a *agentConn) close(code int, text string) {
	a.closing.CompareAndSwap(0, time.Now().UnixNano())
	a.outbox.Close(websocket.FormatCloseMessage(code, text))
	if off := a.offence.Load(); off != nil {
		off.once.Do(func() { close(off.released) })
	}
}

func (a *agentConn) sweep(now time.Time, limits sweepLimits) {
	if off := a.offence.Load(); off != nil {
		if now.After(off.due) {
			a.close(off.code, off.text)
		}
		return
	}
	if cancel := a.paused.Load(); cancel != nil {
		a.sock.Excuse()
		// Nobody reads, so only writing tells that the agent is gone. Not a ping: an agent that cannot
		// get rid of its answer ends the connection. A pong wants none (RFC 6455, section 5.5.3).
		_ = a.outbox.Try(entry{Kind: outbox.Pong})
		if closing := a.closing.Load(); closing != 0 && now.Sub(time.Unix(0, closing)) > heldUpLimit {
			(*cancel)()
		}
	} else if a.memory.Overdue(a.sock.Received(), leastProgress) {
		a.server.tel.Fault(telemetry.ReasonMemoryFull)
		a.server.events.Warn("memory for messages is used up, see max_buffered_size; closing the connection of an agent that sends a large one too slowly",
			zap.String("remote_address", a.remote))
		a.close(websocket.CloseTryAgainLater, "sends too slowly")
	}
	switch quiet := a.sock.Sweep(); {
	case quiet >= limits.close && !a.muted.Swap(true): // it may be elsewhere already
		a.server.tel.Fault(telemetry.ReasonAgentSilent)
		a.server.events.Info("no sign of life from agent; closing its connection", zap.String("remote_address", a.remote))
		a.close(websocket.CloseGoingAway, "no sign of life")
	case quiet >= limits.ping:
		_ = a.outbox.Try(entry{Kind: outbox.Ping})
	}
	if due := a.fullState.Load(); due != 0 && now.Unix() >= due {
		a.fullState.Store(0)
		a.askFullState()
	}
}

// end is the one place where an agent's connection is cleaned up, by its reader. The server is
// told of the agents that left without a goodbye: what it would have seen had they been
// connected to it.
func (a *agentConn) end(err error) {
	s := a.server
	var closed *websocket.CloseError
	if errors.As(err, &closed) && closed.Code != websocket.CloseAbnormalClosure {
		a.outbox.Reply(closeReply(closed.Code))
		a.outbox.Drain(s.ctx) // for a moment at most
	}
	for _, e := range a.outbox.Abort() {
		s.memory.Recycle(e.Frame)
	}
	a.sock.Release()
	s.mu.Lock()
	delete(s.agents, a)
	s.mu.Unlock()
	s.moves.Add(1)
	gone := s.router.release(a)
	home := s.pool.detach(a, gone)
	s.log.Debug("agent's connection ended", zap.Stringer("agent", a.uid), zap.String("remote_address", a.remote), zap.Error(err))
	if !a.gateway {
		s.pool.sayGoodbye(home, a, gone)
	} else if len(gone) > 0 {
		// The agents behind a gateway most likely come back by another way.
		s.farewells.Go(func() {
			if sleep(s.ctx, s.cfg.Server.GracePeriod) == nil {
				s.pool.sayGoodbye(s.pool.anyLink(), a, gone)
			}
		})
	}
}

// maxUIDs is how many UIDs the connection may hold.
func (a *agentConn) maxUIDs() int {
	if a.gateway {
		return maxGatewayUIDs
	}
	return maxUIDs
}

// closeReply is the payload of the close frame that answers one with code (RFC 6455, section 5.5.1).
func closeReply(code int) []byte {
	if code == websocket.CloseNoStatusReceived {
		return nil
	}
	return websocket.FormatCloseMessage(code, "")
}

// validKey reports whether key is 16 bytes in base64 (RFC 6455, section 4.2.1).
func validKey(key string) bool {
	nonce, err := base64.StdEncoding.DecodeString(key)
	return err == nil && len(nonce) == 16
}

// sameOrigin reports whether a page of origin was served by host itself.
func sameOrigin(origin, host string) bool {
	u, err := url.Parse(origin)
	return err == nil && strings.EqualFold(u.Host, host)
}
