package e2e

import (
	"context"
	"io"
	"net"
	"net/http"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/open-telemetry/opamp-go/protobufs"
	"github.com/open-telemetry/opamp-go/server"
	"github.com/open-telemetry/opamp-go/server/types"
	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/proto"
)

// postedServer is a server that is reached over plain HTTP only. It asks each agent for its state that it does not know,
// has it report often, and refuses those with a wrong key.
type postedServer struct {
	t       *testing.T
	address string

	mu     sync.Mutex
	agents map[uuid.UUID]*postedAgent
	open   map[uuid.UUID]bool
	other  []string // what was not as the specification has it
	end    func()   // of the server on its own
}

func newPostedServer(t *testing.T) *postedServer {
	t.Helper()
	return &postedServer{t: t, address: freeAddress(t), agents: map[uuid.UUID]*postedAgent{}, open: map[uuid.UUID]bool{}}
}

func (s *postedServer) url() string { return "http://" + s.address + "/v1/opamp" }

// postedAgent is what the server knows of one agent.
type postedAgent struct {
	Known

	keys map[string]bool // that came with its messages
	push []*protobufs.ServerToAgent
}

// message takes a message, and returns the answer.
func (s *postedServer) message(headers http.Header, m *protobufs.AgentToServer) *protobufs.ServerToAgent {
	s.mu.Lock()
	defer s.mu.Unlock()
	uid, _ := uuid.FromBytes(m.GetInstanceUid())
	answer := &protobufs.ServerToAgent{InstanceUid: m.GetInstanceUid()}
	a := s.agents[uid]
	lost := a == nil || a.Sequence+1 != m.GetSequenceNum()
	if a == nil {
		a = &postedAgent{keys: map[string]bool{}}
		s.agents[uid] = a
		answer.ConnectionSettings = heartbeatOffer(time.Second)
	}
	if lost && m.GetAgentDescription() == nil {
		answer.Flags = uint64(protobufs.ServerToAgentFlags_ServerToAgentFlags_ReportFullState)
	}
	a.heard(&serverLink{headers: headers}, nil, m)
	if said := m.GetCustomMessage(); said.GetCapability() == chat {
		a.Chats = append(a.Chats, string(said.GetData()))
	}
	a.keys[headers.Get("Authorization")] = true
	if len(a.push) > 0 && answer.Flags == 0 {
		pushed := a.push[0]
		a.push = a.push[1:]
		pushed.InstanceUid = m.GetInstanceUid()
		return pushed
	}
	return answer
}

const wrongKey = "Secret-Key wrong"

// onLibrary is the server on opamp-go's library.
func (s *postedServer) onLibrary() {
	lib := server.New(nil)
	require.NoError(s.t, lib.Start(server.StartSettings{ListenEndpoint: s.address, Settings: server.Settings{Callbacks: types.Callbacks{
		OnConnecting: func(r *http.Request) types.ConnectionResponse {
			if r.Header.Get("Authorization") == wrongKey {
				return types.ConnectionResponse{HTTPStatusCode: http.StatusUnauthorized, HTTPResponseHeader: map[string]string{"WWW-Authenticate": "Secret-Key"}}
			}
			headers := r.Header.Clone()
			return types.ConnectionResponse{Accept: true, ConnectionCallbacks: types.ConnectionCallbacks{
				OnMessage: func(_ context.Context, _ types.Connection, m *protobufs.AgentToServer) *protobufs.ServerToAgent {
					return s.message(headers, m)
				},
			}}
		},
	}}}))
	s.t.Cleanup(func() { _ = lib.Stop(context.Background()) })
}

// onItsOwn is the server from the specification alone, and strict.
func (s *postedServer) onItsOwn() {
	var listener net.Listener
	eventually(s.t, func() string { // as with Server.start
		var err error
		if listener, err = net.Listen("tcp", s.address); err != nil {
			return "start the server: " + err.Error()
		}
		return ""
	})
	lib := &http.Server{Handler: http.HandlerFunc(s.serve)}
	go func() { _ = lib.Serve(listener) }()
	s.end = func() { _ = lib.Close() }
	s.t.Cleanup(s.end)
}

// restartOnItsOwn ends the server that is on its own, with all that it knows, and starts another.
func (s *postedServer) restartOnItsOwn() {
	s.end()
	s.mu.Lock()
	clear(s.agents)
	clear(s.open)
	s.mu.Unlock()
	s.onItsOwn()
}

// wantAsSpecified checks that all that has come was as the specification has it.
func (s *postedServer) wantAsSpecified(t *testing.T, _ *Gateway) {
	t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	require.Empty(t, s.other, "not as the specification has it")
}

// known returns what the server knows of an agent now; its zero value if that is nothing.
func (s *postedServer) known(uid uuid.UUID) Known {
	s.mu.Lock()
	defer s.mu.Unlock()
	if a := s.agents[uid]; a != nil {
		return a.Known
	}
	return Known{}
}

func (s *postedServer) serve(w http.ResponseWriter, r *http.Request) {
	if r.Method == http.MethodHead {
		w.WriteHeader(http.StatusMethodNotAllowed)
		return
	}
	if r.Header.Get("Authorization") == wrongKey {
		w.Header().Set("WWW-Authenticate", "Secret-Key")
		w.WriteHeader(http.StatusUnauthorized)
		return
	}
	body, err := io.ReadAll(r.Body)
	var m protobufs.AgentToServer
	var uid uuid.UUID
	if err == nil {
		err = proto.Unmarshal(body, &m)
	}
	if err == nil {
		uid, err = uuid.FromBytes(m.GetInstanceUid())
	}
	header, headerErr := uuid.Parse(r.Header.Get("OpAMP-Instance-UID"))
	s.mu.Lock()
	if err != nil || headerErr != nil || header != uid || s.open[uid] || r.Method != http.MethodPost || r.URL.Path != "/v1/opamp" ||
		r.Header.Get("Content-Type") != "application/x-protobuf" || r.Header.Get("Upgrade") != "" || r.Header.Get("Sec-Websocket-Key") != "" {
		s.other = append(s.other, r.Method+" "+r.URL.Path)
	}
	s.open[uid] = true
	s.mu.Unlock()
	body, _ = proto.Marshal(s.message(r.Header, &m))
	s.mu.Lock()
	s.open[uid] = false
	s.mu.Unlock()
	w.Header().Set("Content-Type", "application/x-protobuf")
	_, _ = w.Write(body)
}

func (s *postedServer) wantAgent(t *testing.T, uid uuid.UUID, what string, is func(a *postedAgent) bool) {
	t.Helper()
	eventually(t, func() string {
		s.mu.Lock()
		defer s.mu.Unlock()
		a := s.agents[uid]
		if a == nil {
			return "server does not know the agent that " + what
		}
		if !is(a) {
			return "agent does not do this yet: " + what
		}
		return ""
	})
}

func (s *postedServer) push(uid uuid.UUID, m *protobufs.ServerToAgent) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.agents[uid].push = append(s.agents[uid].push, m)
}

// Agents on WebSockets come to a server that is reached over plain HTTP only, on a library or from the specification alone: what
// they say arrives with their own key, and they hear, are given another name, leave and come back as with any server.
func TestServerOverHTTP(t *testing.T) {
	for name, start := range map[string]func(*postedServer){"opamp-go": (*postedServer).onLibrary, "strict": (*postedServer).onItsOwn} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newPostedServer(t)
			start(s)
			gateway := startGateway(t, s.url(), func(c config) {
				c.gateway("server::headers::Authorization", "Secret-Key gateway")
			})
			describes := func(a *postedAgent) bool { return a.Description != nil && a.Health.GetHealthy() }

			t.Run("opamp-go", func(t *testing.T) {
				header := http.Header{"Authorization": {"Secret-Key alice"}}
				alice := startAgent(t, "alice", gateway.url(), agentOptions{headers: header})
				s.wantAgent(t, alice.id(), "describes itself", describes)
				s.push(alice.id(), &protobufs.ServerToAgent{CustomMessage: chatMessage("hello")})
				alice.wantHeard(t, "hello")
				alice.say(t, "hello yourself")
				s.wantAgent(t, alice.id(), "answers", func(a *postedAgent) bool { return len(a.Chats) == 1 })
				s.wantAgent(t, alice.id(), "shows its own key only", func(a *postedAgent) bool { return len(a.keys) == 1 && a.keys["Secret-Key alice"] })

				before, next := alice.id(), uuid.Must(uuid.NewV7())
				s.push(before, &protobufs.ServerToAgent{AgentIdentification: &protobufs.AgentIdentification{NewInstanceUid: next[:]}})
				s.wantAgent(t, next, "uses its new name", describes)
				alice.wantConnects(t, 1)
				alice.stop()
				s.wantAgent(t, next, "has said goodbye", func(a *postedAgent) bool { return a.Goodbye })
				again := startAgent(t, "alice again", gateway.url(), agentOptions{headers: header, uid: next})
				s.wantAgent(t, next, "is back", func(a *postedAgent) bool { return !a.Goodbye })
				again.wantConnects(t, 1)
			})
			t.Run("refused", func(t *testing.T) {
				mallory := startAgent(t, "mallory", gateway.url(), agentOptions{headers: http.Header{"Authorization": {wrongKey}}})
				mallory.wantFailures(t, 1)
				gateway.wantLog(t, "server refused an agent", `"http.response.status_code": 401`)
				s.mu.Lock()
				defer s.mu.Unlock()
				require.NotContains(t, s.agents, mallory.id())
			})
			s.wantAsSpecified(t, gateway)
		})
	}
}
