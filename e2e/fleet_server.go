package e2e

import (
	"crypto/tls"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/gorilla/websocket"
	"github.com/open-telemetry/opamp-go/protobufs"
	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/proto"
)

// FleetServer is an OpAMP server of bare WebSockets, for more agents than a library's server
// would carry here, and for what a library does not do: answer late, forget agents late,
// read no further. It keeps a record of who said what on which link, over all its lives.
type FleetServer struct {
	address string
	opts    fleetServerOptions
	work    sync.WaitGroup // readers and answerers of links, and those who forget

	// mu guards all below.
	mu       sync.Mutex
	http     *http.Server  // nil while it is away
	gone     chan struct{} // closed when it goes away
	dials    []linkDial
	links    []*FleetLink // of all times
	records  map[uuid.UUID]*record
	connects int           // how many there were
	pushes   uint64        // the number of the last push
	resume   chan struct{} // closed when it reads again; nil while it does
	release  chan struct{} // closed when it answers again; nil while it does
	wrong    []string      // what the gateway said that it must not
}

type fleetServerOptions struct {
	// answerAfter is how long it takes to answer a question.
	answerAfter time.Duration
	// forgetAfter is how long after the end of a link it marks all agents as gone that ever
	// spoke there, wherever they have spoken since; 0 for never.
	forgetAfter time.Duration
	// takeLink answers a link's upgrade request, of which nth is how many of that name came
	// before; nil takes all.
	takeLink func(name string, nth int) linkAnswer
	// heeds says what it does about a message of an agent, of so many bytes. It is called by the
	// reader of the message's link, and may take its time; nil answers all.
	heeds func(uid uuid.UUID, m *protobufs.AgentToServer, size int) response
	// readLimit is the largest message that it takes, in bytes; 0 is any. At a larger one it
	// closes the link with 1009 and reads no further.
	readLimit int64
	// endsAsked says how it ends a link at a question about an agent; nil answers all questions.
	endsAsked func(uid uuid.UUID) func(*FleetLink)
	// tls has it take links over TLS only; nil is plain text.
	tls *tls.Config
	// readsAhead is how many messages of a link it reads, and pings after them it answers, before it heeds
	// them, one after the other; 0 for none.
	readsAhead int
	// frameLimit is the largest WebSocket frame that it, or a proxy before it, takes; 0 is any.
	frameLimit int
	// pongWithin is how long it waits for the answer to a ping before it ends the link; 0 is for ever,
	// without a ping.
	pongWithin time.Duration
	// answersPing says whether it answers the nth ping of a link; nil answers all.
	answersPing func(nth int) bool
	// echoes has its answers tell what they answer: a number, and what was in a custom message.
	echoes bool
}

// linkAnswer is what happens to a link. Its zero value is a link that is taken.
type linkAnswer struct {
	refusal    int // HTTP status
	retryAfter string
	drop       bool // taken, and closed at once
}

// linkDial is one upgrade request of a link.
type linkDial struct {
	name string
	at   time.Time
}

// FleetLink is one WebSocket to a FleetServer.
type FleetLink struct {
	server  *FleetServer
	name    string
	ws      *websocket.Conn
	answers chan answer   // far more than there should ever be questions in flight
	ended   chan struct{} // closed by its reader

	// writing is held while a message is written.
	writing sync.Mutex

	// Guarded by the server's mu.
	open       bool
	stated     bool              // the server's custom capabilities, in its first message
	introduced map[uuid.UUID]int // by their connect here, the how manieth of all
	spoke      map[uuid.UUID]bool
	asking     int // questions in flight
	mostAsking int
	pings      int   // that it has heard
	end        error // of its reader; nil while it reads
}

// answer is what a question is answered.
type answer struct {
	due   time.Time
	frame []byte
}

// record is what a server knows of one agent, and has heard of it.
type record struct {
	link  *FleetLink // where it spoke last; nil while the server does not know it
	state bool       // the server has its full state
	said  []said
	heard uint64 // the highest number
	asked int    // questions about it
}

// said is one message of an agent.
type said struct {
	at         time.Time
	link       *FleetLink
	number     uint64
	state      bool // it said who it is
	introduced int  // by a connect that came before on the same link, the how manieth of all; 0 for not
	size       int
	sum        uint32        // of the custom message's data
	stood      time.Duration // between its reading and its taking
}

func startFleetServer(t *testing.T, opts fleetServerOptions) *FleetServer {
	t.Helper()
	s := &FleetServer{address: freeAddress(t), opts: opts, records: map[uuid.UUID]*record{}}
	s.start(t)
	t.Cleanup(func() {
		s.stop()
		require.Empty(t, s.wrong, "what the gateway said that it must not")
	})
	return s
}

func (s *FleetServer) url() string {
	scheme := "ws"
	if s.opts.tls != nil {
		scheme = "wss"
	}
	return scheme + "://" + s.address + "/v1/opamp"
}

// start starts a server that knows nobody.
func (s *FleetServer) start(t *testing.T) {
	t.Helper()
	var listener net.Listener
	eventually(t, func() string { // the port may be held for a moment by a process that is just being started
		var err error
		if listener, err = net.Listen("tcp", s.address); err != nil {
			return "start the server: " + err.Error()
		}
		return ""
	})
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.opts.frameLimit > 0 {
		listener = &frameLimitListener{listener, s.opts.frameLimit}
	}
	if s.opts.tls != nil {
		listener = tls.NewListener(listener, s.opts.tls)
	}
	s.http = &http.Server{Handler: s, ReadHeaderTimeout: ceiling}
	s.gone = make(chan struct{})
	for _, k := range s.records {
		k.link, k.state = nil, false
	}
	server := s.http
	s.work.Go(func() { _ = server.Serve(listener) }) // until stop closes it
}

// stop ends the server with all its connections, as when its process dies.
func (s *FleetServer) stop() {
	s.mu.Lock()
	if s.http == nil {
		s.mu.Unlock()
		return
	}
	server := s.http
	s.http = nil
	close(s.gone)
	for _, l := range s.links {
		l.ws.Close()
	}
	s.mu.Unlock()
	server.Close()
	s.work.Wait()
}

// ServeHTTP takes a link. It is its reader.
func (s *FleetServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	name := linkName(r.Header)
	s.mu.Lock()
	nth := 0
	for _, d := range s.dials {
		if d.name == name {
			nth++
		}
	}
	s.dials = append(s.dials, linkDial{name, time.Now()})
	s.mu.Unlock()
	var verdict linkAnswer
	if s.opts.takeLink != nil {
		verdict = s.opts.takeLink(name, nth)
	}
	if verdict.refusal != 0 {
		if verdict.retryAfter != "" {
			w.Header().Set("Retry-After", verdict.retryAfter)
		}
		w.WriteHeader(verdict.refusal)
		return
	}
	ws, err := (&websocket.Upgrader{ReadBufferSize: 64 << 10}).Upgrade(w, r, nil)
	if err != nil {
		return
	}
	defer ws.Close()
	if verdict.drop {
		return
	}
	l := &FleetLink{
		server: s, name: name, ws: ws, answers: make(chan answer, 1000), ended: make(chan struct{}),
		open: true, introduced: map[uuid.UUID]int{}, spoke: map[uuid.UUID]bool{},
	}
	s.mu.Lock()
	if s.http == nil {
		s.mu.Unlock()
		return
	}
	gone := s.gone
	s.links = append(s.links, l)
	s.work.Add(1)
	s.mu.Unlock()
	defer s.work.Done()
	s.work.Go(l.answerAll)
	l.heedPings()
	end := l.readAll(gone)
	close(l.ended)
	s.mu.Lock()
	l.open, l.end = false, end
	s.mu.Unlock()
	if s.opts.forgetAfter > 0 {
		s.work.Go(func() { s.forget(l, gone) })
	}
}

// forget marks the agents of a link as gone, late.
func (s *FleetServer) forget(l *FleetLink, gone <-chan struct{}) {
	select {
	case <-time.After(s.opts.forgetAfter):
	case <-gone:
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for uid := range l.spoke {
		k := s.records[uid]
		k.link, k.state = nil, false
	}
}

// readAll ends with the link, and returns why that ended.
func (l *FleetLink) readAll(gone <-chan struct{}) error {
	take := l.take
	if n := l.server.opts.readsAhead; n > 0 {
		queue := make(chan *readFrame, n)
		defer close(queue)
		l.server.work.Go(func() { l.workOff(queue, gone) })
		take = func(f readFrame) error {
			queue <- &f // the worker takes all there are
			return nil
		}
	}
	for {
		l.server.mu.Lock()
		resume := l.server.resume
		l.server.mu.Unlock()
		if resume != nil {
			select {
			case <-resume:
			case <-gone:
				return errors.New("the server is gone")
			}
		}
		_, frame, err := l.ws.ReadMessage()
		if err != nil {
			return err
		}
		if err := take(readFrame{frame, time.Now()}); err != nil {
			return err
		}
	}
}

// readFrame is one that has been read.
type readFrame struct {
	bytes []byte
	at    time.Time
}

// workOff takes what was read ahead, also after the link's end. It ends when all is taken.
func (l *FleetLink) workOff(queue <-chan *readFrame, gone <-chan struct{}) {
	over := false
	for f := range queue {
		select {
		case <-gone:
			over = true
		default:
		}
		if !over && l.take(*f) != nil {
			over = true
			l.ws.Close()
		}
	}
}

// take takes what was read. An error is why the link has to end.
func (l *FleetLink) take(f readFrame) error {
	var m protobufs.AgentToServer
	err := proto.Unmarshal(f.bytes[1:], &m) // behind the header
	switch {
	case err != nil:
	case m.GetCustomMessage().GetCapability() == gatewayCapability:
		err = l.question(m.GetCustomMessage().GetData())
	default:
		var does response
		if heeds := l.server.opts.heeds; heeds != nil {
			uid, _ := uuid.FromBytes(m.GetInstanceUid()) // whether it is one is seen below
			does = heeds(uid, &m, len(f.bytes))
		}
		if does.end != nil {
			does.end(l)
			return errEndedAtMessage
		}
		err = l.message(&m, f, does.silent)
	}
	if err != nil && !errors.Is(err, errEndedAtMessage) {
		l.server.mu.Lock()
		l.server.wrong = append(l.server.wrong, fmt.Sprintf("%v: %v", err, &m))
		l.server.mu.Unlock()
	}
	return err
}

// question takes a question, for its answer to be given later.
func (l *FleetLink) question(data []byte) error {
	var q question
	if err := json.Unmarshal(data, &q); err != nil {
		return err
	}
	uid, err := uuid.Parse(q.Headers.Get("Agent-ID"))
	isGateway := q.Headers.Get(connectionIDHeader) != "" // which is behind another, and has no uid
	if err != nil && !isGateway {
		return err
	}
	s := l.server
	if s.opts.endsAsked != nil {
		if end := s.opts.endsAsked(uid); end != nil {
			end(l)
			return errEndedAtMessage
		}
	}
	s.mu.Lock()
	l.asking++
	l.mostAsking = max(l.mostAsking, l.asking)
	s.connects++
	if !isGateway {
		s.recordLocked(uid).asked++
		l.introduced[uid] = s.connects
	}
	s.mu.Unlock()
	result, err := json.Marshal(map[string]any{"request_uid": q.RequestUID, "accept": true, "http_status_code": 0, "response_headers": nil})
	if err != nil {
		panic("a connectResult cannot be marshalled: " + err.Error()) // a string, a bool and an int
	}
	frame := l.frame(&protobufs.ServerToAgent{
		CustomMessage: &protobufs.CustomMessage{Capability: gatewayCapability, Type: "connectResult", Data: result},
	})
	select {
	case l.answers <- answer{time.Now().Add(s.opts.answerAfter), frame}:
		return nil
	default:
		return errors.New("far too many questions at once")
	}
}

// answerAll ends with the link.
func (l *FleetLink) answerAll() {
	s := l.server
	for {
		var next answer
		select {
		case next = <-l.answers:
		case <-l.ended:
			return
		}
		select {
		case <-time.After(time.Until(next.due)):
		case <-l.ended:
			return
		}
		s.mu.Lock()
		release := s.release
		s.mu.Unlock()
		if release != nil {
			select {
			case <-release:
			case <-l.ended:
				return
			}
		}
		s.mu.Lock()
		l.asking-- // before the answer is out, since the next question may follow at once
		s.mu.Unlock()
		l.send(next.frame)
	}
}

// message takes note of what an agent said, and replies unless it is to be silent, but to a
// goodbye and, if it does not echo, to chat.
func (l *FleetLink) message(m *protobufs.AgentToServer, f readFrame, silent bool) error {
	uid, err := uuid.FromBytes(m.GetInstanceUid())
	if err != nil {
		return err
	}
	s := l.server
	s.mu.Lock()
	k := s.recordLocked(uid)
	l.spoke[uid] = true
	k.link = l
	k.state = k.state || m.GetAgentDescription() != nil
	what := said{
		at: time.Now(), link: l, number: m.GetSequenceNum(), state: m.GetAgentDescription() != nil, introduced: l.introduced[uid],
		size: len(f.bytes), sum: crc32.ChecksumIEEE(m.GetCustomMessage().GetData()), stood: time.Since(f.at),
	}
	if m.GetAgentDisconnect() != nil {
		k.link, k.state = nil, false
	} else {
		k.said = append(k.said, what)
		k.heard = max(k.heard, what.number)
	}
	reply := &protobufs.ServerToAgent{InstanceUid: uid[:]}
	if !k.state {
		reply.Flags = uint64(protobufs.ServerToAgentFlags_ServerToAgentFlags_ReportFullState)
	}
	s.mu.Unlock()
	if s.opts.echoes {
		reply.CustomMessage = &protobufs.CustomMessage{Capability: chat, Type: echo, Data: slices.Concat(
			binary.BigEndian.AppendUint64(nil, m.GetSequenceNum()), m.GetCustomMessage().GetData(),
		)}
	}
	if !silent && m.GetAgentDisconnect() == nil && (m.GetCustomMessage() == nil || s.opts.echoes) {
		l.send(l.frame(reply))
	}
	return nil
}

func (s *FleetServer) recordLocked(uid uuid.UUID) *record {
	k := s.records[uid]
	if k == nil {
		k = &record{}
		s.records[uid] = k
	}
	return k
}

// frame makes a frame for the link. The first on each states the custom capabilities.
func (l *FleetLink) frame(m *protobufs.ServerToAgent) []byte {
	l.server.mu.Lock()
	if !l.stated {
		l.stated = true
		m.CustomCapabilities = &protobufs.CustomCapabilities{Capabilities: []string{gatewayCapability}}
	}
	l.server.mu.Unlock()
	frame, err := proto.MarshalOptions{}.MarshalAppend([]byte{0}, m)
	if err != nil {
		panic("a server's message cannot be marshalled: " + err.Error()) // it is made here
	}
	return frame
}

// send writes a frame. A link that does not take it is ended, unless the server has closed it
// and only reads to its end.
func (l *FleetLink) send(frame []byte) {
	l.writing.Lock()
	defer l.writing.Unlock()
	_ = l.ws.SetWriteDeadline(time.Now().Add(ceiling)) // an error shows in the write
	if err := l.ws.WriteMessage(websocket.BinaryMessage, frame); err != nil && !errors.Is(err, websocket.ErrCloseSent) {
		l.ws.Close()
	}
}

// push sends an agent a numbered message where it spoke last, unless that was on except. It
// returns where that was; nil if the server does not know.
func (s *FleetServer) push(uid uuid.UUID, number uint64, except *FleetLink) *FleetLink {
	s.mu.Lock()
	var l *FleetLink
	if k := s.records[uid]; k != nil && k.link != nil && k.link.open {
		l = k.link
	}
	s.mu.Unlock()
	if l != nil && l != except {
		l.send(l.frame(&protobufs.ServerToAgent{
			InstanceUid: uid[:], CustomMessage: &protobufs.CustomMessage{Capability: chat, Type: "says", Data: binary.BigEndian.AppendUint64(nil, number)},
		}))
	}
	return l
}

// wantReachable has the server push to each agent, where it spoke last, until all have heard a
// push that was sent after this call. It returns how long that took.
func (s *FleetServer) wantReachable(t *testing.T, agents []*FleetAgent, limit time.Duration) time.Duration {
	t.Helper()
	start := time.Now()
	s.mu.Lock()
	from := s.pushes + 1
	s.mu.Unlock()
	pushed := map[*FleetAgent]*FleetLink{} // where each was pushed to
	missing := slices.Clone(agents)
	within(t, limit, func() string {
		missing = slices.DeleteFunc(missing, func(a *FleetAgent) bool { return a.lastHeard() >= from })
		if len(missing) == 0 {
			return ""
		}
		s.mu.Lock()
		s.pushes++
		number := s.pushes
		s.mu.Unlock()
		unknown := 0
		for _, a := range missing {
			pushed[a] = s.push(a.uid, number, pushed[a])
			if pushed[a] == nil {
				unknown++
			}
		}
		return fmt.Sprintf("%d agents of %d are not reachable, %d of them unknown to the server, the first is %s", len(missing), len(agents), unknown, missing[0].uid)
	})
	return time.Since(start)
}

// wantReachableAnew waits until the server has read all links to their ends but three, and all
// agents are reachable when each has said something more: what it reads last of an agent may
// have come on a link that had ended before.
func (s *FleetServer) wantReachableAnew(t *testing.T, f *Fleet) {
	t.Helper()
	eventually(t, func() string {
		if n := len(s.open()); n != 3 {
			return fmt.Sprintf("%d links are open", n)
		}
		return ""
	})
	f.sayAll(1, 0)
	s.wantReachable(t, f.agents, ceiling)
}

// record returns what the server knows of an agent.
func (s *FleetServer) record(a *FleetAgent) record {
	s.mu.Lock()
	defer s.mu.Unlock()
	if k := s.records[a.uid]; k != nil {
		copied := *k
		copied.said = slices.Clone(k.said)
		return copied
	}
	return record{}
}

// wantKnown waits until the server knows the full state of every agent.
func (s *FleetServer) wantKnown(t *testing.T, agents []*FleetAgent, limit time.Duration) {
	t.Helper()
	within(t, limit, func() string {
		s.mu.Lock()
		defer s.mu.Unlock()
		n := 0
		for _, a := range agents {
			if k := s.records[a.uid]; k != nil && k.link != nil && k.state {
				n++
			}
		}
		if n < len(agents) {
			return fmt.Sprintf("the server knows the full state of %d agents of %d", n, len(agents))
		}
		return ""
	})
}

// wantHeard waits until the server has heard the last message of every agent. Nobody must be
// talking any more.
func (s *FleetServer) wantHeard(t *testing.T, agents []*FleetAgent, limit time.Duration) {
	t.Helper()
	within(t, limit, func() string {
		for _, a := range agents {
			number := a.number.Load()
			s.mu.Lock()
			k := s.records[a.uid]
			heard := k != nil && k.heard >= number
			s.mu.Unlock()
			if !heard {
				return fmt.Sprintf("the server has not heard message %d of agent %s: %s", number, a.uid, s.story(a))
			}
		}
		return ""
	})
}

// wantHistory checks what the server has heard of agents: on each link only after the agent's
// connect there, and in order without a gap. When an agent comes to another link, the last
// messages may be repeated, and those before the first there be missing; it returns how many.
// The server reads several links in no order, so it is that of the connects that counts.
func (s *FleetServer) wantHistory(t *testing.T, agents []*FleetAgent) (repeated, missing uint64) {
	t.Helper()
	for _, a := range agents {
		var last said
		history := s.record(a).said
		slices.SortStableFunc(history, func(a, b said) int { return a.introduced - b.introduced })
		for _, now := range history {
			switch {
			case now.introduced == 0:
				t.Fatalf("message %d of agent %s came on a link without its connect: %s", now.number, a.uid, s.story(a))
			case now.number == last.number+1:
			case now.link == last.link:
				t.Fatalf("message %d of agent %s follows %d on one link: %s", now.number, a.uid, last.number, s.story(a))
			case now.number <= last.number:
				repeated += last.number + 1 - now.number
			default:
				missing += now.number - last.number - 1
			}
			last = now
		}
	}
	return repeated, missing
}

// wantState waits until the server has got the full state of agents since then, on other links
// than lost.
func (s *FleetServer) wantState(t *testing.T, agents []*FleetAgent, since time.Time, lost *FleetLink) {
	t.Helper()
	isState := func(m said) bool { return m.state && m.at.After(since) && m.link != lost }
	eventually(t, func() string {
		for _, a := range agents {
			s.mu.Lock()
			has := slices.ContainsFunc(s.records[a.uid].said, isState)
			s.mu.Unlock()
			if !has {
				return fmt.Sprintf("the server has not got the full state of agent %s again: %s", a.uid, s.story(a))
			}
		}
		return ""
	})
}

// story tells in short what the server has heard of an agent.
func (s *FleetServer) story(a *FleetAgent) string {
	var story strings.Builder
	var before said
	for _, now := range s.record(a).said {
		if now.link != before.link || now.number != before.number+1 {
			fmt.Fprintf(&story, "%d; on %s %p from %d to ", before.number, now.link.name, now.link, now.number)
		}
		before = now
	}
	fmt.Fprint(&story, before.number)
	return story.String()
}

// open returns the links that are, in the order of their names.
func (s *FleetServer) open() []*FleetLink {
	s.mu.Lock()
	defer s.mu.Unlock()
	var links []*FleetLink
	for _, l := range s.links {
		if l.open {
			links = append(links, l)
		}
	}
	slices.SortStableFunc(links, func(a, b *FleetLink) int { return strings.Compare(a.name, b.name) })
	return links
}

// at returns those agents that spoke last on a link.
func (s *FleetServer) at(l *FleetLink, agents []*FleetAgent) (at []*FleetAgent) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, a := range agents {
		if k := s.records[a.uid]; k != nil && k.link == l {
			at = append(at, a)
		}
	}
	return at
}

// mostAsking returns how many questions were in flight at most on one link.
func (s *FleetServer) mostAsking() (most int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, l := range s.links {
		most = max(most, l.mostAsking)
	}
	return most
}

// asked returns how many questions there were.
func (s *FleetServer) asked() (n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, k := range s.records {
		n += k.asked
	}
	return n
}

// dialed returns when a link's upgrade was asked for.
func (s *FleetServer) dialed(name string) (at []time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, d := range s.dials {
		if d.name == name {
			at = append(at, d.at)
		}
	}
	return at
}

// stopReading has the server read no further, on any link; startReading undoes it.
func (s *FleetServer) stopReading() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.resume = make(chan struct{})
}

func (s *FleetServer) startReading() {
	s.mu.Lock()
	defer s.mu.Unlock()
	close(s.resume)
	s.resume = nil
}

// stopAnswering has the server answer no questions; startAnswering has it answer those, too.
func (s *FleetServer) stopAnswering() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.release = make(chan struct{})
}

func (s *FleetServer) startAnswering() {
	s.mu.Lock()
	defer s.mu.Unlock()
	close(s.release)
	s.release = nil
}

// sayClose has the server send a close frame, and read on until the link has ended.
func (l *FleetLink) sayClose(t *testing.T) {
	t.Helper()
	err := l.ws.WriteControl(websocket.CloseMessage, websocket.FormatCloseMessage(websocket.CloseGoingAway, "bye"), time.Now().Add(ceiling))
	if err != nil && !errors.Is(err, websocket.ErrCloseSent) {
		t.Errorf("close %s: %v", l.name, err)
	}
}

// ping sends a ping.
func (l *FleetLink) ping() {
	_ = l.ws.WriteControl(websocket.PingMessage, nil, time.Now().Add(time.Second)) // the link may have ended
}
