package main

import (
	"errors"
	"math/rand/v2"
	"net"
	"net/http"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/google/uuid"
	"github.com/gorilla/websocket"
	"github.com/open-telemetry/opamp-go/protobufs"
	"google.golang.org/protobuf/proto"
)

const (
	// Back-off as in opamp-go's client, but with an end that a short run can wait for.
	firstDelay, lastDelay = 500 * time.Millisecond, 5 * time.Second

	// talkEvery is the mean time between two times that an agent speaks.
	talkEvery = 700 * time.Millisecond
)

// agent is one agent, or a clone of one, as opamp-go's client would be.
type agent struct {
	*actor
	book    *ledger
	gateway *gateway
	address string // where it connects: the gateway, or a line to it
	quit    chan struct{}
	quitNow sync.Once
	done    chan struct{}
	poller  *poller // nil for one on a WebSocket

	// Owned by the agent's goroutine.
	uid uuid.UUID

	// mu guards all below.
	mu      sync.Mutex
	conn    *agentSocket // nil while it has none
	pause   time.Duration
	stalled time.Time // until when it reads nothing
	quiet   bool      // it says nothing on its own account any more
	much    []int     // what it has to say at once: the size of each message, in bytes
	away    bool      // it does not come back
}

// agentSocket is one connection of an agent.
type agentSocket struct {
	ws    *websocket.Conn
	epoch *epoch
	ended chan struct{}      // closed when its reader has ended
	asked chan struct{}      // holds something when the server wants the full state
	named chan uuid.UUID     // holds something when the agent was given another UID
	say   chan chan<- uint32 // has the agent say something at once, and tell its number, 0 if it could not
	leave chan struct{}      // has it say goodbye
}

func startAgent(book *ledger, of *actor, g *gateway, address string) *agent {
	uids := of.member.uids
	a := &agent{actor: of, book: book, gateway: g, address: address, uid: uids[len(uids)-1], quit: make(chan struct{}), done: make(chan struct{})}
	if of.member.polls {
		a.poller = newPoller(a)
		go a.poller.live()
		return a
	}
	go a.live()
	return a
}

// live connects, and connects again, until the agent goes for good.
func (a *agent) live() {
	defer close(a.done)
	delay := firstDelay
	for !a.isAway() {
		retry, err := a.connect()
		if err == nil {
			delay = firstDelay
			retry = a.takePause()
		} else {
			retry = max(min(retry, lastDelay), delay)
			delay = min(delay*3/2, lastDelay)
		}
		if retry > 0 {
			select {
			case <-time.After(retry):
			case <-a.quit:
			}
		}
	}
}

// connect has one connection from its beginning to its end. An error comes with how long the
// gateway asks to be left alone.
func (a *agent) connect() (time.Duration, error) {
	e := a.book.open(a.actor, a.gateway)
	dialer := websocket.Dialer{HandshakeTimeout: 45 * time.Second, WriteBufferSize: 4 << 10}
	ws, resp, err := dialer.Dial("ws://"+a.address+"/v1/opamp", http.Header{
		actorHeader:     {e.name()},
		"Authorization": {"Secret-Key soak"},
	})
	if err != nil {
		a.book.close(e, "not let in: "+err.Error(), true, false)
		if resp == nil {
			a.book.count("attempts of agents to connect that found nobody")
			return 0, err
		}
		a.book.count("attempts of agents to connect that were answered " + resp.Status)
		if resp.StatusCode != http.StatusServiceUnavailable {
			a.book.find("refused", e, time.Now(), "%s: %s", e, resp.Status)
		}
		after, _ := strconv.Atoi(resp.Header.Get("Retry-After"))
		return time.Duration(after) * time.Second, err
	}
	s := &agentSocket{
		ws: ws, epoch: e, ended: make(chan struct{}), asked: make(chan struct{}, 1), named: make(chan uuid.UUID, 1),
		say: make(chan chan<- uint32), leave: make(chan struct{}, 1),
	}
	a.book.letIn(e)
	a.mu.Lock()
	a.conn = s
	away := a.away
	a.mu.Unlock()
	if away {
		a.reset(s, "left while it connected")
	}
	go a.read(s)
	a.talk(s)
	ws.NetConn().Close()
	<-s.ended
	a.mu.Lock()
	a.conn = nil
	a.mu.Unlock()
	return 0, nil
}

// read takes what the server says, until the connection ends.
func (a *agent) read(s *agentSocket) {
	defer close(s.ended)
	for {
		_, frame, err := s.ws.ReadMessage()
		if err != nil {
			a.book.close(s.epoch, err.Error(), false, false)
			return
		}
		var m protobufs.ServerToAgent
		if len(frame) == 0 || frame[0] != 0 || proto.Unmarshal(frame[1:], &m) != nil {
			a.book.find("corrupted", s.epoch, time.Now(), "%s cannot read a frame of %d bytes", s.epoch, len(frame))
			continue
		}
		a.book.take(s.epoch, &m)
		if id, err := uuid.FromBytes(m.GetAgentIdentification().GetNewInstanceUid()); err == nil {
			s.named <- id
		}
		if m.GetFlags()&uint64(protobufs.ServerToAgentFlags_ServerToAgentFlags_ReportFullState) != 0 {
			s.tellState()
		}
		a.mu.Lock()
		stalled := a.stalled
		a.mu.Unlock()
		time.Sleep(time.Until(stalled))
	}
}

// talk says what the agent has to say, until the connection ends.
func (a *agent) talk(s *agentSocket) {
	next := time.NewTimer(0) // a connection starts with a partial status, whoever is to be quiet
	defer next.Stop()
	for first := true; ; {
		var err error
		select {
		case <-s.ended:
			return
		case <-s.leave:
			a.part(s)
			return
		case a.uid = <-s.named:
		case <-s.asked:
			_, err = a.speak(s, &protobufs.AgentToServer{AgentDescription: a.description()})
		case number := <-s.say:
			var n uint32
			n, err = a.speak(s, &protobufs.AgentToServer{})
			number <- n
		case <-next.C:
			if a.book.isFlooding(a.actor) {
				next.Reset(0)
				for n := 0; n < 20 && err == nil; n++ {
					_, err = a.speak(s, &protobufs.AgentToServer{})
				}
				break
			}
			next.Reset(rand.N(2 * talkEvery))
			for range 1 + max(0, rand.IntN(8)-5) { // agents pipeline
				if err == nil && (first || !a.isQuiet()) {
					_, err = a.speak(s, &protobufs.AgentToServer{})
				}
				first = false
			}
			for _, size := range a.takeMuch() {
				if err == nil {
					_, err = a.speakAtLength(s, &protobufs.AgentToServer{}, size)
				}
			}
		}
		if err != nil {
			<-s.ended // it knows why
			return
		}
	}
}

func (a *agent) speak(s *agentSocket, m *protobufs.AgentToServer) (uint32, error) {
	return a.speakAtLength(s, m, someSize(rand.IntN))
}

func (a *agent) speakAtLength(s *agentSocket, m *protobufs.AgentToServer, size int) (uint32, error) {
	said := a.book.say(s.epoch, size, m.GetAgentDescription() != nil)
	m.InstanceUid = a.uid[:]
	m.SequenceNum = uint64(said.number)
	m.Capabilities = uint64(protobufs.AgentCapabilities_AgentCapabilities_ReportsStatus)
	m.CustomMessage = &protobufs.CustomMessage{Capability: capability, Type: "up", Data: said.payload()}
	frame, err := proto.MarshalOptions{}.MarshalAppend([]byte{0}, m)
	if err != nil {
		return 0, err
	}
	err = s.ws.WriteMessage(websocket.BinaryMessage, frame)
	if errors.Is(err, websocket.ErrCloseSent) {
		a.book.unsay(s.epoch) // nothing was written
	}
	if err != nil {
		return 0, err
	}
	return said.number, nil
}

func (a *agent) description() *protobufs.AgentDescription {
	return &protobufs.AgentDescription{IdentifyingAttributes: []*protobufs.KeyValue{{
		Key: "service.name", Value: &protobufs.AnyValue{Value: &protobufs.AnyValue_StringValue{StringValue: "soak"}},
	}}}
}

// part says goodbye and waits for the gateway to close.
func (a *agent) part(s *agentSocket) {
	if _, err := a.speak(s, &protobufs.AgentToServer{AgentDisconnect: &protobufs.AgentDisconnect{}}); err != nil {
		return
	}
	a.book.close(s.epoch, "said goodbye", true, true)
	_ = s.ws.WriteControl(websocket.CloseMessage, websocket.FormatCloseMessage(websocket.CloseNormalClosure, ""), time.Now().Add(5*time.Second))
	select {
	case <-s.ended:
	case <-time.After(10 * time.Second):
		a.book.count("goodbyes that were not answered within 10 s")
	}
}

// isConnected reports whether the agent has a connection, or polls.
func (a *agent) isConnected() bool {
	if a.poller != nil {
		return a.poller.isConnected()
	}
	return a.socket() != nil
}

// socket returns the agent's connection; nil if it has none, as one over plain HTTP.
func (a *agent) socket() *agentSocket {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.conn
}

// kill ends the connection as when the agent's machine loses power and another answers for it:
// by a reset. The agent comes back after pause.
func (a *agent) kill(pause time.Duration) bool {
	s := a.socket()
	if s == nil {
		return false
	}
	a.mu.Lock()
	a.pause = pause
	a.mu.Unlock()
	a.reset(s, "killed")
	return true
}

func (a *agent) reset(s *agentSocket, why string) {
	a.book.close(s.epoch, why, true, false)
	if tcp, ok := s.ws.NetConn().(*net.TCPConn); ok {
		_ = tcp.SetLinger(0)
	}
	s.ws.NetConn().Close()
}

// goodbye has the agent leave politely, and come back after pause.
func (a *agent) goodbye(pause time.Duration) bool {
	s := a.socket()
	if s == nil {
		return false
	}
	a.mu.Lock()
	a.pause = pause
	a.mu.Unlock()
	select {
	case s.leave <- struct{}{}:
		return true
	default:
		return false
	}
}

// goAway has the agent not come back once its connection has ended.
func (a *agent) goAway() {
	a.mu.Lock()
	a.away = true
	a.mu.Unlock()
	a.quitNow.Do(func() { close(a.quit) })
}

// stall has the agent read nothing for a while.
func (a *agent) stall(d time.Duration) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.stalled = time.Now().Add(d)
}

// hush has the agent say nothing more on its own account.
func (a *agent) hush() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.quiet = true
}

var errNotSaid = errors.New("not connected")

// sayNow has the agent say something now; it returns on which connection, and the number.
func (a *agent) sayNow(within time.Duration) (*epoch, uint32, error) {
	if a.poller != nil {
		return a.poller.sayNow(within)
	}
	s := a.socket()
	if s == nil {
		return nil, 0, errNotSaid
	}
	number := make(chan uint32, 1)
	select {
	case s.say <- number:
		if n := <-number; n > 0 {
			return s.epoch, n, nil
		}
	case <-s.ended:
	case <-time.After(within):
	}
	return nil, 0, errNotSaid
}

func (a *agent) isAway() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.away
}

func (a *agent) isQuiet() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.quiet
}

// talkMuch has the agent say so many messages of that size at once.
func (a *agent) talkMuch(messages, size int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.much = slices.Repeat([]int{size}, messages)
}

func (a *agent) takeMuch() []int {
	a.mu.Lock()
	defer a.mu.Unlock()
	much := a.much
	a.much = nil
	return much
}

// tellState has the agent tell its full state.
func (s *agentSocket) tellState() {
	select {
	case s.asked <- struct{}{}:
	default:
	}
}

func (a *agent) takePause() time.Duration {
	a.mu.Lock()
	defer a.mu.Unlock()
	pause := a.pause
	a.pause = 0
	return pause
}
