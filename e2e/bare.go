package e2e

import (
	"encoding/json"
	"net"
	"net/http"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/gorilla/websocket"
	"github.com/open-telemetry/opamp-go/protobufs"
	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/proto"
)

// bareServer is a server of bare WebSockets, for what a library does not do: it sends whatever
// it is told to, and stops reading or answering. Otherwise it lets all agents in and answers
// each message with what is in it to chat about.
type bareServer struct {
	address string
	asked   func(*bareLink) // what is done at a question instead of answering it; set before the first
	readers sync.WaitGroup
	reading chan struct{} // full while nothing is to be read

	// mu guards all below.
	mu     sync.Mutex
	silent bool                    // no question is answered
	links  []*bareLink             // ever opened
	heard  int                     // questions
	homes  map[uuid.UUID]*bareLink // where each agent spoke last
}

// bareLink is one link to it.
type bareLink struct {
	ws      *websocket.Conn
	writing sync.Mutex
	ended   chan struct{} // closed when nothing more can be read
}

func startBareServer(t *testing.T) *bareServer {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	s := &bareServer{address: listener.Addr().String(), reading: make(chan struct{}, 1), homes: map[uuid.UUID]*bareLink{}}
	web := &http.Server{Handler: http.HandlerFunc(s.take), ReadHeaderTimeout: ceiling}
	s.readers.Go(func() { _ = web.Serve(listener) }) // until it is closed
	t.Cleanup(func() {
		web.Close()
		for _, l := range s.all() {
			l.ws.Close()
		}
		s.readers.Wait()
	})
	return s
}

func (s *bareServer) url() string { return "ws://" + s.address + "/v1/opamp" }

// take upgrades a link and reads from it, until it ends.
func (s *bareServer) take(w http.ResponseWriter, r *http.Request) {
	upgrader := websocket.Upgrader{}
	ws, err := upgrader.Upgrade(w, r, nil)
	if err != nil {
		return // the gateway has been told
	}
	l := &bareLink{ws: ws, ended: make(chan struct{})}
	s.mu.Lock()
	s.links = append(s.links, l)
	s.mu.Unlock()
	s.readers.Go(func() { s.read(l) })
}

func (s *bareServer) read(l *bareLink) {
	defer close(l.ended)
	for {
		s.reading <- struct{}{}
		<-s.reading
		_, frame, err := l.ws.ReadMessage()
		if err != nil {
			return
		}
		var m protobufs.AgentToServer
		if len(frame) == 0 || proto.Unmarshal(frame[1:], &m) != nil {
			continue
		}
		if reply := s.message(l, &m); reply != nil {
			_ = l.push(reply) // if it fails, so does the next read
		}
	}
}

func (s *bareServer) message(l *bareLink, m *protobufs.AgentToServer) *protobufs.ServerToAgent {
	s.mu.Lock()
	defer s.mu.Unlock()
	custom := m.GetCustomMessage()
	if custom.GetCapability() == gatewayCapability {
		s.heard++
		if s.asked != nil {
			s.readers.Go(func() { s.asked(l) })
			return nil
		}
		var q question
		if s.silent || json.Unmarshal(custom.GetData(), &q) != nil {
			return nil
		}
		data, err := json.Marshal(map[string]any{"request_uid": q.RequestUID, "accept": true})
		if err != nil {
			return nil
		}
		return &protobufs.ServerToAgent{CustomMessage: &protobufs.CustomMessage{
			Capability: gatewayCapability, Type: "connectResult", Data: data,
		}}
	}
	uid, err := uuid.FromBytes(m.GetInstanceUid())
	if err != nil {
		return nil
	}
	s.homes[uid] = l
	return &protobufs.ServerToAgent{InstanceUid: uid[:], CustomMessage: custom}
}

// fallSilent has the server answer no more questions.
func (s *bareServer) fallSilent() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.silent = true
}

// stopReading has the server read nothing more, but for one message on each link, until the
// returned function is called.
func (s *bareServer) stopReading() (goOn func()) {
	s.reading <- struct{}{}
	return func() { <-s.reading }
}

func (s *bareServer) all() []*bareLink {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.links)
}

// questions returns how often the server was asked.
func (s *bareServer) questions() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.heard
}

// home waits until the agent has said something, and returns the link on which it did.
func (s *bareServer) home(t *testing.T, uid uuid.UUID) (home *bareLink) {
	t.Helper()
	eventually(t, func() string {
		s.mu.Lock()
		defer s.mu.Unlock()
		if home = s.homes[uid]; home == nil {
			return "the server has not heard of " + uid.String()
		}
		return ""
	})
	return home
}

// push sends a message.
func (l *bareLink) push(m *protobufs.ServerToAgent) error {
	frame, err := proto.MarshalOptions{}.MarshalAppend([]byte{0}, m)
	if err != nil {
		return err
	}
	return l.pushFrame(websocket.BinaryMessage, frame)
}

// pushFrame sends whatever it is given.
func (l *bareLink) pushFrame(kind int, frame []byte) error {
	l.writing.Lock()
	defer l.writing.Unlock()
	if err := l.ws.SetWriteDeadline(time.Now().Add(ceiling)); err != nil {
		return err
	}
	return l.ws.WriteMessage(kind, frame)
}

// wantOpen checks that the link lasts.
func (l *bareLink) wantOpen(t *testing.T) {
	t.Helper()
	select {
	case <-l.ended:
		t.Error("the link has ended")
	default:
	}
}
