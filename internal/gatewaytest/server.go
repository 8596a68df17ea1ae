package gatewaytest

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"maps"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/gorilla/websocket"
	"github.com/open-telemetry/opamp-go/protobufs"
	"google.golang.org/protobuf/proto"
)

// patience is how long something wanted may take. In fake time it costs nothing.
const patience = 10 * time.Second

// Server is an OpAMP server that does what its test tells it. Left alone it takes every link,
// accepts every agent it is asked about, and answers nothing else.
type Server struct {
	t      testing.TB
	listen func() (net.Listener, error)

	// Written before the server starts, and by Stop and Start.
	http *http.Server
	runs sync.WaitGroup // of http and of the links' readers

	mu           sync.Mutex
	changed      chan struct{} // closed and renewed whenever something below changes
	onUpgrade    func(*http.Request) *Refusal
	onConnect    func(*Question)
	onMessage    func(*Received)
	capabilities []string
	upgrades     []Upgrade
	links        []*Link
	questions    []*Question
	received     []*Received
	taken        map[string]int // by uid: how many of its messages NextFrame has returned
	order        int            // of what came
	asked        int            // how many questions NextQuestion has returned
}

// Upgrade is one request for a link, granted or not.
type Upgrade struct {
	At     time.Time
	Header http.Header
	Path   string
}

// Refusal is an answer to an upgrade request that does not grant it.
type Refusal struct {
	Status int
	Header http.Header
}

// Question is a connect: some gateway asks about an agent.
type Question struct {
	Link    *Link
	At      time.Time
	Order   int // among all that came, on whichever link
	Frame   []byte
	Message *protobufs.AgentToServer

	RequestUID    string      `json:"request_uid"`
	RemoteAddress string      `json:"remote_address"`
	Headers       http.Header `json:"headers"`
}

// Received is one message that came from an agent.
type Received struct {
	Link  *Link
	At    time.Time
	Order int // among all that came, on whichever link
	Frame []byte
	// Message is the frame decoded, nil if that cannot be done.
	Message *protobufs.AgentToServer
}

// UID is whose message it is.
func (r *Received) UID() []byte { return r.Message.GetInstanceUid() }

// NewServer returns a server that listens on what listen returns, once it is started, and is
// stopped when the test ends.
func NewServer(t testing.TB, listen func() (net.Listener, error)) *Server {
	t.Helper()
	s := &Server{t: t, listen: listen, changed: make(chan struct{}), taken: map[string]int{}}
	t.Cleanup(s.Stop)
	return s
}

// Start has the server listen.
func (s *Server) Start() {
	s.t.Helper()
	listener, err := s.listen()
	if err != nil {
		s.t.Fatalf("server: %v", err)
	}
	server := &http.Server{Handler: s, ErrorLog: log.New(io.Discard, "", 0)} // what goes wrong with it is the test's own doing
	s.http = server
	s.runs.Go(func() { _ = server.Serve(listener) })
}

// Stop ends the server as if its process was killed: no link hears a word.
func (s *Server) Stop() {
	if s.http == nil {
		return
	}
	_ = s.http.Close()
	for _, l := range s.Links() {
		_ = l.ws.NetConn().Close()
		l.ReadOn()
	}
	s.runs.Wait()
}

// OnUpgrade has f answer requests for links from here on; nil from f grants one.
func (s *Server) OnUpgrade(f func(*http.Request) *Refusal) { s.set(func() { s.onUpgrade = f }) }

// OnConnect has f answer, by the methods of Question, now or later or never. It is called by
// the reader of the link.
func (s *Server) OnConnect(f func(*Question)) { s.set(func() { s.onConnect = f }) }

// OnMessage has f called for each other message, by the reader of its link.
func (s *Server) OnMessage(f func(*Received)) { s.set(func() { s.onMessage = f }) }

// State has the server state these custom capabilities in the first message that it sends on
// each link from here on, with Send. Otherwise it states none.
func (s *Server) State(capabilities ...string) {
	if capabilities == nil {
		capabilities = []string{}
	}
	s.set(func() { s.capabilities = capabilities })
}

func (s *Server) set(f func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f()
	close(s.changed)
	s.changed = make(chan struct{})
}

// ServeHTTP takes a link.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	var onUpgrade func(*http.Request) *Refusal
	s.set(func() {
		onUpgrade = s.onUpgrade
		s.upgrades = append(s.upgrades, Upgrade{At: time.Now(), Header: r.Header.Clone(), Path: r.URL.Path})
	})
	if onUpgrade != nil {
		if refusal := onUpgrade(r); refusal != nil {
			maps.Copy(w.Header(), refusal.Header)
			w.WriteHeader(refusal.Status)
			return
		}
	}
	ws, err := (&websocket.Upgrader{}).Upgrade(w, r, nil)
	if err != nil {
		return
	}
	l := &Link{
		Name: r.Header.Get(ConnectionIDHeader), Header: r.Header.Clone(), Since: time.Now(),
		server: s, ws: ws, writing: make(chan struct{}, 1), ended: make(chan struct{}),
	}
	s.runs.Go(l.read)
	s.set(func() { s.links = append(s.links, l) })
}

// Upgrades returns all requests for links.
func (s *Server) Upgrades() []Upgrade {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.upgrades)
}

// Links returns the links that are open, in the order in which they came.
func (s *Server) Links() []*Link {
	s.mu.Lock()
	defer s.mu.Unlock()
	var open []*Link
	for _, l := range s.links {
		if l.Open() {
			open = append(open, l)
		}
	}
	return open
}

// Visits returns the WebSockets of those that are no gateway's links, open or not, in the order in which they came.
func (s *Server) Visits() []*Link {
	s.mu.Lock()
	defer s.mu.Unlock()
	var visits []*Link
	for _, l := range s.links {
		if l.Name == "" {
			visits = append(visits, l)
		}
	}
	return visits
}

// WantLinks returns the links, sorted by name, once there are exactly n.
func (s *Server) WantLinks(n int) []*Link {
	s.t.Helper()
	var links []*Link
	s.await(fmt.Sprintf("%d links", n), func() bool {
		links = s.Links()
		return len(links) == n
	})
	slices.SortFunc(links, func(a, b *Link) int { return strings.Compare(a.Name, b.Name) })
	return links
}

// Questions returns all questions so far.
func (s *Server) Questions() []*Question {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.questions)
}

// WantQuestion returns the next question that it has not returned before.
func (s *Server) WantQuestion() *Question {
	s.t.Helper()
	var q *Question
	s.await("question", func() bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.asked >= len(s.questions) {
			return false
		}
		q = s.questions[s.asked]
		s.asked++
		return true
	})
	return q
}

// Received returns all messages of the agent with this uid so far.
func (s *Server) Received(uid []byte) []*Received {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.receivedLocked(uid)
}

func (s *Server) receivedLocked(uid []byte) []*Received {
	var received []*Received
	for _, r := range s.received {
		if bytes.Equal(r.UID(), uid) {
			received = append(received, r)
		}
	}
	return received
}

// Next returns the next message of the agent with this uid that it has not returned before.
func (s *Server) Next(uid []byte) *Received {
	s.t.Helper()
	var next *Received
	s.await(fmt.Sprintf("message of %q", uid), func() bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		received := s.receivedLocked(uid)
		if s.taken[string(uid)] >= len(received) {
			return false
		}
		next = received[s.taken[string(uid)]]
		s.taken[string(uid)]++
		return true
	})
	return next
}

// WantFrame checks that the next message of the agent with this uid is this frame, byte for
// byte, and returns on which link it came.
func (s *Server) WantFrame(uid, frame []byte) *Link {
	s.t.Helper()
	next := s.Next(uid)
	wantEqual(s.t, "server", next.Frame, frame)
	return next.Link
}

// WantGoodbye checks that the next message of the agent with this uid is its last.
func (s *Server) WantGoodbye(uid []byte) *Received {
	s.t.Helper()
	next := s.Next(uid)
	if next.Message.GetAgentDisconnect() == nil {
		s.t.Fatalf("server: got %v from %q, want a goodbye", next.Message, uid)
	}
	return next
}

// WantNothing checks that there is no message of the agent with this uid that Next has not returned.
func (s *Server) WantNothing(uid []byte) {
	s.t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, r := range s.receivedLocked(uid)[s.taken[string(uid)]:] {
		s.t.Errorf("server: got %v from %q, want nothing", r.Message, uid)
	}
}

func (s *Server) await(what string, done func() bool) {
	s.t.Helper()
	await(s.t, "server: no "+what, done, func() <-chan struct{} {
		s.mu.Lock()
		defer s.mu.Unlock()
		return s.changed
	})
}

// await returns when done; changed returns what is closed when that is worth asking again.
func await(t testing.TB, failure string, done func() bool, changed func() <-chan struct{}) {
	t.Helper()
	timeout := time.NewTimer(patience)
	defer timeout.Stop()
	for {
		again := changed()
		if done() {
			return
		}
		select {
		case <-again:
		case <-timeout.C:
			t.Fatalf("%s within %s", failure, patience)
		}
	}
}

func wantEqual(t testing.TB, who string, got, want []byte) {
	t.Helper()
	if bytes.Equal(got, want) {
		return
	}
	if len(got)+len(want) > 1000 {
		t.Fatalf("%s: got another frame of %d bytes, want one of %d", who, len(got), len(want))
	}
	t.Fatalf("%s: got frame %q\nwant %q", who, got, want)
}

// Link is the server's end of a gateway's WebSocket.
type Link struct {
	// Name is what the gateway calls it.
	Name string
	// Header is that of its upgrade request.
	Header http.Header
	// Since is when it came.
	Since time.Time

	server  *Server
	ws      *websocket.Conn
	writing chan struct{} // a lock, but one that fake time can see
	stated  bool          // the custom capabilities; guarded by writing
	ended   chan struct{} // closed when its reader has ended
	err     error         // why, to be read then

	mu      sync.Mutex
	stopped chan struct{} // while its reader pauses: closed when it may go on
}

func (l *Link) read() {
	defer l.server.set(func() { close(l.ended) })
	defer l.ws.Close()
	for {
		l.mu.Lock()
		stopped := l.stopped
		l.mu.Unlock()
		if stopped != nil {
			<-stopped
		}
		_, frame, err := l.ws.ReadMessage()
		if err != nil {
			l.err = err
			return
		}
		l.take(frame)
	}
}

func (l *Link) take(frame []byte) {
	s := l.server
	message, err := AgentToServer(frame)
	if err != nil {
		message = nil
	}
	if m := message.GetCustomMessage(); m.GetCapability() == GatewayCapability && m.GetType() == ConnectType {
		q := &Question{Link: l, At: time.Now(), Frame: frame, Message: message}
		if err := json.Unmarshal(m.GetData(), q); err != nil {
			s.t.Errorf("server: unreadable connect: %v", err)
		}
		onConnect := (*Question).Accept
		s.set(func() {
			s.order++
			q.Order = s.order
			s.questions = append(s.questions, q)
			if s.onConnect != nil {
				onConnect = s.onConnect
			}
		})
		onConnect(q)
		return
	}
	r := &Received{Link: l, At: time.Now(), Frame: frame, Message: message}
	var onMessage func(*Received)
	s.set(func() {
		s.order++
		r.Order = s.order
		s.received = append(s.received, r)
		onMessage = s.onMessage
	})
	if onMessage != nil {
		onMessage(r)
	}
}

// Send sends a message, as a server built on opamp-go does: with its custom capabilities in
// the first one on the link.
func (l *Link) Send(message *protobufs.ServerToAgent) {
	l.write(func() []byte {
		l.server.mu.Lock()
		capabilities := l.server.capabilities
		l.server.mu.Unlock()
		if !l.stated && capabilities != nil {
			message = proto.Clone(message).(*protobufs.ServerToAgent)
			message.CustomCapabilities = &protobufs.CustomCapabilities{Capabilities: capabilities}
			l.stated = true
		}
		return Frame(message)
	})
}

// Push sends a frame as it is. It waits while the gateway does not read.
func (l *Link) Push(frame []byte) { l.write(func() []byte { return frame }) }

func (l *Link) write(frame func() []byte) {
	l.writing <- struct{}{}
	defer func() { <-l.writing }()
	_ = l.ws.WriteMessage(websocket.BinaryMessage, frame()) // an error ends the reader, too
}

// PushText sends a text message.
func (l *Link) PushText(text string) {
	l.writing <- struct{}{}
	defer func() { <-l.writing }()
	_ = l.ws.WriteMessage(websocket.TextMessage, []byte(text))
}

// PushRaw sends bytes that gorilla would not: they go to the connection as they are.
func (l *Link) PushRaw(b []byte) {
	l.writing <- struct{}{}
	defer func() { <-l.writing }()
	_, _ = l.ws.NetConn().Write(b)
}

// Open reports whether the link has not ended.
func (l *Link) Open() bool {
	select {
	case <-l.ended:
		return false
	default:
		return true
	}
}

// WantEnd waits until the link has ended.
func (l *Link) WantEnd() {
	l.server.t.Helper()
	select {
	case <-l.ended:
	case <-time.After(patience):
		l.server.t.Fatalf("server: %s has not ended within %s", l.Name, patience)
	}
}

// WantClosed checks that the link ends with a close frame of this code.
func (l *Link) WantClosed(code int) {
	l.server.t.Helper()
	l.WantEnd()
	if !websocket.IsCloseError(l.err, code) {
		l.server.t.Fatalf("server: %s ended with %v, want close code %d", l.Name, l.err, code)
	}
}

// Close says goodbye with a close frame and hangs up.
func (l *Link) Close(code int) {
	l.writing <- struct{}{}
	defer func() { <-l.writing }()
	_ = l.ws.WriteControl(websocket.CloseMessage, websocket.FormatCloseMessage(code, ""), time.Now().Add(time.Second))
}

// HangUp closes the connection without a word.
func (l *Link) HangUp() { _ = l.ws.NetConn().Close() }

// Reset breaks the connection.
func (l *Link) Reset() { l.ws.NetConn().(*Conn).Reset() }

// BlackHole has nothing more pass, in either direction, and nobody know.
func (l *Link) BlackHole() { l.ws.NetConn().(*Conn).BlackHole() }

// StopReading has the server read no more from the link, once it has read one more message.
func (l *Link) StopReading() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.stopped == nil {
		l.stopped = make(chan struct{})
	}
}

// ReadOn ends what StopReading began.
func (l *Link) ReadOn() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.stopped != nil {
		close(l.stopped)
		l.stopped = nil
	}
}

// Accept lets the agent in.
func (q *Question) Accept() { q.Answer(Verdict{Accept: true, Status: http.StatusOK}) }

// Refuse does not; headers are given as name, value, name, value …
func (q *Question) Refuse(status int, headers ...string) {
	verdict := Verdict{Status: status, Headers: map[string]string{}}
	for pair := range slices.Chunk(headers, 2) {
		verdict.Headers[pair[0]] = pair[1]
	}
	q.Answer(verdict)
}

// Answer sends the verdict on the link on which the question came.
func (q *Question) Answer(verdict Verdict) { q.Link.Send(ConnectResult(q.RequestUID, verdict)) }

// Silence answers nothing.
func (q *Question) Silence() {}

// Who returns the value of the header by which the agents of these tests name themselves.
func (q *Question) Who() string { return q.Headers.Get(NameHeader) }

// closeCode returns the code of the close frame that ended a connection, 0 if none did.
func closeCode(err error) int {
	if closed, ok := errors.AsType[*websocket.CloseError](err); ok {
		return closed.Code
	}
	return 0
}
