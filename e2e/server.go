package e2e

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/open-telemetry/opamp-go/protobufs"
	"github.com/open-telemetry/opamp-go/server"
	"github.com/open-telemetry/opamp-go/server/types"
	"github.com/stretchr/testify/require"
)

const (
	gatewayCapability  = "com.bindplane.opamp-gateway"
	connectionIDHeader = "X-Opamp-Gateway-Connection-Id"

	// chat is a custom capability of server and agents: the server answers with what it heard.
	chat = "io.opampgateway.e2e.chat"
)

// Server is an OpAMP server on opamp-go's library. It knows the gateway capability, answers
// chat, and asks an agent that it does not know for its full state.
type Server struct {
	address string
	opts    serverOptions

	// mu guards all below.
	mu        sync.Mutex
	lib       server.OpAMPServer
	life      int                              // counts starts and stops
	links     map[types.Connection]*serverLink // that are open
	agents    map[uuid.UUID]*Known
	questions []question
}

type serverOptions struct {
	// ordinary is a server that does not know the gateway capability.
	ordinary bool
	// capabilities are its custom capabilities, besides that.
	capabilities []string
	// judge decides on an agent from the headers of its upgrade request; nil lets all in.
	judge func(http.Header) verdict
	// heartbeat is the interval offered to each agent that is new; 0 for no offer.
	heartbeat time.Duration
	tls       *tls.Config
}

// verdict is the server's answer about an agent. Its zero value lets the agent in.
type verdict struct {
	refusal int // HTTP status
	headers map[string]string
	silent  bool // the question is never answered
}

// serverLink is one WebSocket to the server.
type serverLink struct {
	name    string // as the gateway announced it
	headers http.Header
	tls     *tls.ConnectionState // nil without TLS
}

// Known is what the server knows of one agent.
type Known struct {
	Connected       bool // on a connection that is open, and without a goodbye
	Goodbye         bool // it, or the gateway for it, said agent_disconnect
	Link            string
	Messages        int
	Sequence        uint64 // of what it said last
	Heartbeats      int    // messages with nothing new in them
	Description     *protobufs.AgentDescription
	Descriptions    int // how often it has said who it is
	Health          *protobufs.ComponentHealth
	EffectiveConfig *protobufs.EffectiveConfig
	ConfigStatus    *protobufs.RemoteConfigStatus
	Chats           []string

	conn types.Connection // where it spoke last
}

// question is a connect, as the gateway sent it.
type question struct {
	RequestUID    string      `json:"request_uid"`
	RemoteAddress string      `json:"remote_address"`
	Headers       http.Header `json:"headers"`
}

func startServer(t *testing.T, opts serverOptions) *Server {
	t.Helper()
	s := &Server{address: freeAddress(t), opts: opts}
	s.start(t)
	t.Cleanup(func() { s.stop(t) })
	return s
}

// start starts a server that knows nobody yet.
func (s *Server) start(t *testing.T) {
	t.Helper()
	s.mu.Lock()
	s.links, s.agents, s.questions = map[types.Connection]*serverLink{}, map[uuid.UUID]*Known{}, nil
	s.mu.Unlock()
	capabilities := s.opts.capabilities
	if !s.opts.ordinary {
		capabilities = append([]string{gatewayCapability}, capabilities...)
	}
	settings := server.StartSettings{
		ListenEndpoint: s.address,
		TLSConfig:      s.opts.tls,
		Settings:       server.Settings{Callbacks: types.Callbacks{OnConnecting: s.connecting}, CustomCapabilities: capabilities},
	}
	// After a stop the port may still be held for a moment, by a process that was just being started.
	eventually(t, func() string {
		lib := server.New(nil)
		if err := lib.Start(settings); err != nil {
			return "start the server: " + err.Error()
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		s.lib = lib
		return ""
	})
}

// stop ends the server with all its connections, as when its process dies.
func (s *Server) stop(t *testing.T) {
	t.Helper()
	s.mu.Lock()
	lib := s.lib
	s.lib = nil
	s.life++ // who is about to be let in is closed at once
	s.mu.Unlock()
	if lib == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if err := lib.Stop(ctx); err != nil {
		t.Errorf("stop the server: %v", err)
	}
	s.mu.Lock()
	conns := slices.Collect(maps.Keys(s.links))
	s.mu.Unlock()
	for _, conn := range conns {
		_ = conn.Connection().Close() // it may have ended by itself
	}
}

func (s *Server) url() string {
	if s.opts.tls != nil {
		return "wss://" + s.address + "/v1/opamp"
	}
	return "ws://" + s.address + "/v1/opamp"
}

func (s *Server) connecting(r *http.Request) types.ConnectionResponse {
	l := &serverLink{name: linkName(r.Header), headers: r.Header.Clone(), tls: r.TLS}
	if l.name == "" { // an agent that came directly
		if v := s.judge(r.Header); v.refusal != 0 {
			return types.ConnectionResponse{HTTPStatusCode: v.refusal, HTTPResponseHeader: v.headers}
		}
	}
	s.mu.Lock()
	life := s.life
	s.mu.Unlock()
	return types.ConnectionResponse{Accept: true, ConnectionCallbacks: types.ConnectionCallbacks{
		OnConnected: func(_ context.Context, conn types.Connection) {
			s.mu.Lock()
			defer s.mu.Unlock()
			if s.life != life {
				_ = conn.Connection().Close() // it may have ended by itself
				return
			}
			s.links[conn] = l
		},
		OnMessage: func(_ context.Context, conn types.Connection, m *protobufs.AgentToServer) *protobufs.ServerToAgent {
			return s.message(l, conn, m)
		},
		OnConnectionClose: func(conn types.Connection) {
			s.mu.Lock()
			defer s.mu.Unlock()
			delete(s.links, conn)
			for _, known := range s.agents {
				if known.conn == conn {
					known.Connected = false
				}
			}
		},
	}}
}

// linkName is how a link announced itself, as tests write it: without the name that most gateways have.
func linkName(headers http.Header) string {
	return strings.TrimPrefix(headers.Get(connectionIDHeader), gatewayName+"/")
}

func (s *Server) judge(headers http.Header) verdict {
	if s.opts.judge == nil {
		return verdict{}
	}
	return s.opts.judge(headers)
}

// message is called for the messages of one link, one after another.
func (s *Server) message(l *serverLink, conn types.Connection, m *protobufs.AgentToServer) *protobufs.ServerToAgent {
	if custom := m.GetCustomMessage(); custom.GetCapability() == gatewayCapability && !s.opts.ordinary {
		return s.answer(custom)
	}
	uid, err := uuid.FromBytes(m.GetInstanceUid())
	if err != nil {
		return &protobufs.ServerToAgent{}
	}
	reply := &protobufs.ServerToAgent{}
	s.mu.Lock()
	defer s.mu.Unlock()
	known := s.agents[uid]
	if known == nil {
		known = &Known{}
		s.agents[uid] = known
		if s.opts.heartbeat > 0 {
			reply.ConnectionSettings = heartbeatOffer(s.opts.heartbeat)
		}
	}
	known.heard(l, conn, m)
	if known.Description == nil {
		reply.Flags = uint64(protobufs.ServerToAgentFlags_ServerToAgentFlags_ReportFullState)
	}
	if custom := m.GetCustomMessage(); custom.GetCapability() == chat {
		known.Chats = append(known.Chats, string(custom.GetData()))
		reply.CustomMessage = custom
	}
	return reply
}

func heartbeatOffer(interval time.Duration) *protobufs.ConnectionSettingsOffers {
	return &protobufs.ConnectionSettingsOffers{
		Hash: []byte(interval.String()), Opamp: &protobufs.OpAMPConnectionSettings{HeartbeatIntervalSeconds: uint64(interval / time.Second)},
	}
}

// heard takes note of what the agent said. The server's lock is held.
func (k *Known) heard(l *serverLink, conn types.Connection, m *protobufs.AgentToServer) {
	k.Messages++
	k.Sequence = m.GetSequenceNum()
	k.Goodbye = m.GetAgentDisconnect() != nil
	k.Connected = !k.Goodbye
	k.Link, k.conn = l.name, conn
	news := m.GetCustomMessage() != nil || k.Goodbye
	if v := m.GetAgentDescription(); v != nil {
		k.Description, news = v, true
		k.Descriptions++
	}
	if v := m.GetHealth(); v != nil {
		k.Health, news = v, true
	}
	if v := m.GetEffectiveConfig(); v != nil {
		k.EffectiveConfig, news = v, true
	}
	if v := m.GetRemoteConfigStatus(); v != nil {
		k.ConfigStatus, news = v, true
	}
	if !news {
		k.Heartbeats++
	}
}

// answer answers the gateway's question about an agent.
func (s *Server) answer(asked *protobufs.CustomMessage) *protobufs.ServerToAgent {
	var q question
	if err := json.Unmarshal(asked.GetData(), &q); err != nil {
		return &protobufs.ServerToAgent{}
	}
	s.mu.Lock()
	s.questions = append(s.questions, q)
	s.mu.Unlock()
	v := s.judge(q.Headers)
	if v.silent {
		return nil
	}
	data, err := json.Marshal(map[string]any{
		"request_uid": q.RequestUID, "accept": v.refusal == 0, "http_status_code": v.refusal, "response_headers": v.headers,
	})
	if err != nil {
		panic("a connectResult cannot be marshalled: " + err.Error()) // strings, a bool and an int
	}
	return &protobufs.ServerToAgent{CustomMessage: &protobufs.CustomMessage{
		Capability: gatewayCapability, Type: "connectResult", Data: data,
	}}
}

// known returns what the server knows of an agent now; its zero value if that is nothing.
func (s *Server) known(uid uuid.UUID) Known {
	s.mu.Lock()
	defer s.mu.Unlock()
	if known := s.agents[uid]; known != nil {
		copied := *known
		copied.Chats = slices.Clone(known.Chats)
		return copied
	}
	return Known{}
}

// asked returns the questions of the gateway so far.
func (s *Server) asked() []question {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.questions)
}

// linkNames returns the names of the open links, sorted.
func (s *Server) linkNames() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	names := []string{}
	for _, l := range s.links {
		names = append(names, l.name)
	}
	slices.Sort(names)
	return names
}

// linkHeaders returns the request headers of an open link.
func (s *Server) linkHeaders(name string) http.Header {
	if l := s.link(name); l != nil {
		return l.headers
	}
	return nil
}

// link returns an open link; nil if there is none of that name.
func (s *Server) link(name string) *serverLink {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, l := range s.links {
		if l.name == name {
			return l
		}
	}
	return nil
}

// cut breaks a link.
func (s *Server) cut(t *testing.T, name string) {
	t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	for conn, l := range s.links {
		if l.name == name {
			require.NoError(t, conn.Connection().Close())
		}
	}
}

// load returns how many connected agents speak on each link.
func (s *Server) load() map[string]int {
	s.mu.Lock()
	defer s.mu.Unlock()
	load := map[string]int{}
	for _, known := range s.agents {
		if known.Connected {
			load[known.Link]++
		}
	}
	return load
}

// send pushes a message to an agent, where it spoke last.
func (s *Server) send(t *testing.T, uid uuid.UUID, m *protobufs.ServerToAgent) {
	t.Helper()
	s.sendBy(t, uid, uid, m)
}

// sendBy pushes a message to the agent to, on the connection on which via spoke last.
func (s *Server) sendBy(t *testing.T, via, to uuid.UUID, m *protobufs.ServerToAgent) {
	t.Helper()
	conn := s.known(via).conn
	require.NotNil(t, conn, "the server has never heard of %s", via)
	m.InstanceUid = to[:]
	require.NoError(t, conn.Send(context.Background(), m))
}

// tell pushes a chat message to an agent.
func (s *Server) tell(t *testing.T, uid uuid.UUID, text string) {
	t.Helper()
	s.send(t, uid, &protobufs.ServerToAgent{CustomMessage: chatMessage(text)})
}

func chatMessage(text string) *protobufs.CustomMessage {
	return &protobufs.CustomMessage{Capability: chat, Type: "says", Data: []byte(text)}
}

// wantLinks waits until exactly these links are open.
func (s *Server) wantLinks(t *testing.T, names ...string) {
	t.Helper()
	eventually(t, func() string {
		if got := s.linkNames(); !slices.Equal(got, names) {
			return fmt.Sprintf("the server's links are %v, want %v", got, names)
		}
		return ""
	})
}

// wantAgent waits until the server knows of an agent what is wanted.
func (s *Server) wantAgent(t *testing.T, uid uuid.UUID, what string, is func(Known) bool) Known {
	t.Helper()
	var known Known
	eventually(t, func() string {
		if known = s.known(uid); is(known) {
			return ""
		}
		return fmt.Sprintf("the server does not see that agent %s %s: %+v", uid, what, known)
	})
	return known
}

func isConnected(k Known) bool { return k.Connected && k.Description != nil }

// upstream names the links of one gateway.
func upstream(n int) []string {
	var names []string
	for i := range n {
		names = append(names, fmt.Sprintf("upstream-%d", i))
	}
	return names
}
