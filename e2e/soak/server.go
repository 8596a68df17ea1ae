package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/google/uuid"
	"github.com/gorilla/websocket"
	"github.com/open-telemetry/opamp-go/protobufs"
	"google.golang.org/protobuf/proto"
)

const (
	gatewayCapability  = "com.bindplane.opamp-gateway"
	connectionIDHeader = "X-Opamp-Gateway-Connection-Id"
	// actorHeader is on an agent's upgrade request: which of its connections this is.
	actorHeader = "X-Soak-Actor"
)

// server is the OpAMP server. Like real ones it handles the messages of one connection one
// after another, and writes without a deadline.
type server struct {
	address string
	book    *ledger

	// mu guards all below.
	mu      sync.Mutex
	http    *http.Server
	serving sync.WaitGroup
	up      bool
	starts  int
	conns   map[*serverConn]struct{}
	places  map[*member]*place
	known   map[*member]*epoch // on which connection an agent said who it is
	quiet   bool               // it says nothing on its own account any more

	// Set once. excuse tells whether a gateway has ended its link because something was done to it;
	// wayFrom, with ledger.mu held, which link comes from an address.
	excuse  func(*serverConn) bool
	wayFrom func(address string) *way
}

// place is where an agent spoke last.
type place struct {
	segment *segment
	uid     uuid.UUID
}

// serverConn is one WebSocket to the server: a link of a gateway.
type serverConn struct {
	server *server
	ws     *websocket.Conn
	way    *way
	name   string
	number int
	opened time.Time

	// writing is held while a message for an agent is numbered and written.
	writing sync.Mutex

	ended time.Time // guarded by ledger.mu
}

func (c *serverConn) String() string { return fmt.Sprintf("link %s (%d, %s)", c.name, c.number, c.way) }

func newServer(book *ledger, address string) *server {
	return &server{address: address, book: book, conns: map[*serverConn]struct{}{}, places: map[*member]*place{}}
}

// start starts a server that knows nobody.
func (s *server) start() error {
	var listener net.Listener
	var err error
	for range 100 { // the port may be held for a moment yet
		if listener, err = net.Listen("tcp", s.address); err == nil {
			break
		}
		time.Sleep(50 * time.Millisecond)
	}
	if err != nil {
		return fmt.Errorf("start the server: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.up = true
	s.starts++
	s.places, s.known = map[*member]*place{}, map[*member]*epoch{}
	s.http = &http.Server{Handler: http.HandlerFunc(s.serve), ReadHeaderTimeout: 10 * time.Second}
	s.serving.Go(func() { _ = s.http.Serve(listener) }) // it ends by Close
	return nil
}

// stop ends the server as when its process dies.
func (s *server) stop() {
	s.mu.Lock()
	s.up = false
	conns := s.conns
	s.conns = map[*serverConn]struct{}{}
	s.mu.Unlock()
	s.http.Close()
	for c := range conns {
		c.ws.NetConn().Close()
	}
	s.serving.Wait()
}

func (s *server) serve(w http.ResponseWriter, r *http.Request) {
	upgrader := websocket.Upgrader{ReadBufferSize: 64 << 10, WriteBufferSize: 64 << 10}
	ws, err := upgrader.Upgrade(w, r, nil)
	if err != nil {
		return
	}
	c := &serverConn{server: s, ws: ws, name: r.Header.Get(connectionIDHeader), opened: time.Now()}
	s.mu.Lock()
	if !s.up {
		s.mu.Unlock()
		ws.NetConn().Close()
		return
	}
	s.conns[c] = struct{}{}
	s.book.mu.Lock()
	c.way = s.wayFrom(ws.RemoteAddr().String())
	s.book.counts["links to the server"]++
	c.number = s.book.counts["links to the server"]
	s.book.mu.Unlock()
	s.serving.Add(2)
	s.mu.Unlock()
	ended := make(chan struct{})
	go func() {
		defer s.serving.Done()
		s.pushFrom(c, ended)
	}()
	go func() {
		defer s.serving.Done()
		defer close(ended)
		c.read()
	}()
}

// read handles what comes on the connection until that ends.
func (c *serverConn) read() {
	s := c.server
	var err error
	for {
		var frame []byte
		if frame, err = c.receive(); err != nil {
			break
		}
		var m protobufs.AgentToServer
		if len(frame) == 0 || frame[0] != 0 || proto.Unmarshal(frame[1:], &m) != nil {
			s.book.find("corrupted", nil, time.Now(), "the server cannot read a frame of %d bytes on %s", len(frame), c)
			continue
		}
		if custom := m.GetCustomMessage(); custom.GetCapability() == gatewayCapability {
			err = c.answer(custom)
		} else {
			err = c.message(&m)
		}
		if err != nil {
			break
		}
	}
	c.ws.NetConn().Close()
	s.mu.Lock()
	defer s.mu.Unlock()
	_, open := s.conns[c]
	s.book.mu.Lock()
	c.ended, c.way.stopped = time.Now(), !open
	hit := c.way.hit != ""
	s.book.mu.Unlock()
	for m, at := range s.places {
		if at.segment.conn != c {
			continue
		}
		delete(s.places, m)
		if m.number%2 == 0 { // some servers forget with the link, some do not
			delete(s.known, m)
		}
	}
	delete(s.conns, c)
	if open && !hit && !s.excuse(c) {
		s.book.find("link lost without reason", nil, time.Now(), "%s, after %s: %v", c, time.Since(c.opened).Round(time.Millisecond), err)
	}
}

// maxMessage is the size of the largest message that the server takes, in bytes.
const maxMessage = 1 << 20

// receive returns the next message. The server ends the connection at one that is too large.
func (c *serverConn) receive() ([]byte, error) {
	_, r, err := c.ws.NextReader()
	if err != nil {
		return nil, err
	}
	frame, err := io.ReadAll(io.LimitReader(r, maxMessage+1))
	if err != nil || len(frame) <= maxMessage {
		return frame, err
	}
	_, data := customMessage(frame)
	if said, wrong := startOfStamp(data); wrong == nil {
		if p, _ := c.server.book.doings(said); p != nil {
			return nil, c.endAt(p)
		}
	}
	rest, err := io.ReadAll(r) // it does not end the connection any more, or nobody has said this
	return append(frame, rest...), err
}

var errPoison = errors.New("the server ends the connection at what an agent said")

// endAt ends the connection as the server does at a poison: like most, it reads no further.
func (c *serverConn) endAt(p *poison) error {
	c.server.book.endsAt(p, c)
	if p.kind.code != 0 {
		_ = c.ws.WriteControl(websocket.CloseMessage, websocket.FormatCloseMessage(p.kind.code, "not this"), time.Now().Add(5*time.Second))
	}
	return errPoison
}

// answer lets every agent in.
func (c *serverConn) answer(asked *protobufs.CustomMessage) error {
	var question struct {
		RequestUID string      `json:"request_uid"`
		Headers    http.Header `json:"headers"`
	}
	if json.Unmarshal(asked.GetData(), &question) != nil {
		c.server.book.find("corrupted", nil, time.Now(), "a connect on %s: %q", c, asked.GetData())
		return nil //nolint:nilerr // it is found; the server goes on
	}
	if name := question.Headers.Get(actorHeader); name != "" {
		e := c.server.book.epochNamed(name)
		if e == nil {
			c.server.book.find("corrupted", nil, time.Now(), "a connect on %s names agent %q", c, name)
			return nil
		}
		c.server.book.asked(e, c)
	}
	data, err := json.Marshal(map[string]any{"request_uid": question.RequestUID, "accept": true})
	if err != nil {
		return err
	}
	return c.send(&protobufs.ServerToAgent{
		CustomMessage:      &protobufs.CustomMessage{Capability: gatewayCapability, Type: "connectResult", Data: data},
		CustomCapabilities: &protobufs.CustomCapabilities{Capabilities: []string{gatewayCapability, capability}},
	})
}

// message answers an agent's message, and asks who does not say who it is.
func (c *serverConn) message(m *protobufs.AgentToServer) error {
	s := c.server
	uid, wrong := uuid.FromBytes(m.GetInstanceUid())
	if wrong != nil {
		s.book.find("corrupted", nil, time.Now(), "on %s: an instance UID: %v", c, wrong)
		return nil
	}
	if m.GetCustomMessage() == nil && m.GetAgentDisconnect() != nil {
		s.goodbye(c, uid)
		return nil
	}
	if m.GetCustomMessage() == nil && m.GetCapabilities() != 0 { // a heartbeat, of an agent that polls
		return c.send(&protobufs.ServerToAgent{InstanceUid: uid[:]})
	}
	said, wrong := readStamp(m.GetCustomMessage().GetData())
	if wrong != nil {
		s.book.find("corrupted", nil, time.Now(), "on %s: %v", c, wrong)
		return nil
	}
	poison, flood := s.book.doings(said)
	if poison != nil {
		return c.endAt(poison)
	}
	if flood != nil {
		time.Sleep(takesAMoment)
	}
	seg := s.book.arrived(c, said, uid, m.GetAgentDescription() != nil)
	if seg == nil {
		return nil
	}
	member := seg.epoch.actor.member
	if m.GetAgentDisconnect() != nil {
		s.mu.Lock()
		if at := s.places[member]; at != nil && at.segment.epoch == seg.epoch {
			delete(s.places, member)
		}
		s.mu.Unlock()
		return nil
	}
	s.mu.Lock()
	s.places[member] = &place{seg, uid}
	if m.GetAgentDescription() != nil {
		s.known[member] = seg.epoch
	}
	reply := &protobufs.ServerToAgent{}
	stranger := s.known[member] != seg.epoch
	if stranger { // whoever connects anew does not say by itself
		reply.Flags = uint64(protobufs.ServerToAgentFlags_ServerToAgentFlags_ReportFullState)
	}
	s.mu.Unlock()
	if flood != nil && !flood.answered && !stranger {
		return nil
	}
	if member.polls && !stranger && rand.IntN(4) > 0 { // it hears one message for each that it says, pushes among them
		return c.send(&protobufs.ServerToAgent{InstanceUid: uid[:]})
	}
	return c.tell(seg, uid, reply, someSize(rand.IntN))
}

// goodbye is what a gateway says for an agent that has left.
func (s *server) goodbye(c *serverConn, uid uuid.UUID) {
	s.book.count("goodbyes that a gateway said for an agent")
	s.mu.Lock()
	defer s.mu.Unlock()
	for m, at := range s.places {
		if at.uid == uid && at.segment.conn == c {
			delete(s.places, m)
		}
	}
}

// tell sends an agent a message with a stamp.
func (c *serverConn) tell(seg *segment, uid uuid.UUID, m *protobufs.ServerToAgent, size int) error {
	m.InstanceUid = uid[:]
	c.writing.Lock()
	defer c.writing.Unlock()
	said := c.server.book.tell(seg, size, uid)
	m.CustomMessage = &protobufs.CustomMessage{Capability: capability, Type: "down", Data: said.payload()}
	return c.write(m)
}

func (c *serverConn) send(m *protobufs.ServerToAgent) error {
	c.writing.Lock()
	defer c.writing.Unlock()
	return c.write(m)
}

func (c *serverConn) write(m *protobufs.ServerToAgent) error {
	frame, err := proto.MarshalOptions{}.MarshalAppend([]byte{0}, m)
	if err != nil {
		return err
	}
	return c.ws.WriteMessage(websocket.BinaryMessage, frame)
}

// pushFrom pushes to agents on c, a few at random, until that ends.
func (s *server) pushFrom(c *serverConn, ended <-chan struct{}) {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-ended:
			return
		case <-tick.C:
		}
		s.mu.Lock()
		quiet, n := s.quiet, 0
		var chosen []*member
		for m, at := range s.places { // in no order
			if n++; n > 4 {
				break
			}
			if at.segment.conn == c && !quiet && (!m.polls || rand.IntN(8) == 0) {
				chosen = append(chosen, m)
			}
		}
		s.mu.Unlock()
		for _, m := range chosen {
			s.push(m, c, &protobufs.ServerToAgent{}, someSize(rand.IntN))
		}
	}
}

// push sends an agent a message of the server's own account, where it spoke last: on c only
// unless that is nil. It reports whether it was sent.
func (s *server) push(m *member, c *serverConn, message *protobufs.ServerToAgent, size int) bool {
	s.mu.Lock()
	at := s.places[m]
	if at == nil || (c != nil && at.segment.conn != c) {
		s.mu.Unlock()
		return false
	}
	seg, uid := at.segment, at.uid
	s.mu.Unlock()
	return seg.conn.tell(seg, uid, message, size) == nil
}

// someSize draws a size for a payload: mostly small, some large.
func someSize(intN func(int) int) int {
	switch n := intN(2000); {
	case n == 0:
		return 100<<10 + intN(300<<10)
	case n < 100:
		return 1<<10 + intN(30<<10)
	default:
		return intN(200)
	}
}

// hush has the server say nothing more on its own account.
func (s *server) hush() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.quiet = true
}
