package main

import (
	"context"
	"encoding/json"
	"net/http"
	"sync"

	"github.com/open-telemetry/opamp-go/protobufs"
	"github.com/open-telemetry/opamp-go/server"
	"github.com/open-telemetry/opamp-go/server/types"

	clienttypes "github.com/open-telemetry/opamp-go/client/types"
)

// This file is all that an OpAMP server on opamp-go needs to work with the gateway:
//
//   - it lists the capability com.bindplane.opamp-gateway;
//   - it answers each connect message with a connectResult, by the same check that it
//     applies to agents connecting directly;
//   - it names the agent in everything it sends, and sends to an agent over the
//     connection on which that agent spoke last.

const (
	gatewayCapability  = "com.bindplane.opamp-gateway"
	connectType        = "connect"
	connectResultType  = "connectResult"
	connectionIDHeader = "X-Opamp-Gateway-Connection-Id" // names a link of a gateway
)

// connectRequest is the gateway's question about an agent that wants to connect.
type connectRequest struct {
	RequestUID    string              `json:"request_uid"`
	RemoteAddress string              `json:"remote_address"`
	Headers       map[string][]string `json:"headers"`
}

// connectResult is the server's answer to it.
type connectResult struct {
	RequestUID      string            `json:"request_uid"`
	Accept          bool              `json:"accept"`
	HTTPStatusCode  int               `json:"http_status_code"`
	ResponseHeaders map[string]string `json:"response_headers"`
}

type opampServer struct {
	lib    server.OpAMPServer
	fleet  *fleet
	key    string
	pushes sync.WaitGroup
}

func startServer(f *fleet, key string, logger clienttypes.Logger) (*opampServer, error) {
	s := &opampServer{lib: server.New(logger), fleet: f, key: key}
	err := s.lib.Start(server.StartSettings{
		ListenEndpoint: "127.0.0.1:0",
		Settings: server.Settings{
			Callbacks:          types.Callbacks{OnConnecting: s.connecting},
			CustomCapabilities: []string{gatewayCapability},
		},
	})
	if err != nil {
		return nil, err
	}
	return s, nil
}

func (s *opampServer) endpoint() string {
	return "ws://" + s.lib.Addr().String() + "/v1/opamp"
}

// connecting is called for every upgrade request: a link of the gateway, or an agent
// that connects directly.
func (s *opampServer) connecting(r *http.Request) types.ConnectionResponse {
	if result := s.judge(r.Header); !result.Accept {
		return types.ConnectionResponse{HTTPStatusCode: result.HTTPStatusCode, HTTPResponseHeader: result.ResponseHeaders}
	}
	l := &link{name: "direct"}
	if name := r.Header.Get(connectionIDHeader); name != "" {
		l.name, l.gateway = name, true
	}
	return types.ConnectionResponse{
		Accept: true,
		ConnectionCallbacks: types.ConnectionCallbacks{
			OnConnected: func(_ context.Context, conn types.Connection) { s.fleet.linkUp(l, conn) },
			OnMessage: func(_ context.Context, _ types.Connection, m *protobufs.AgentToServer) *protobufs.ServerToAgent {
				return s.message(l, m)
			},
			OnConnectionClose: func(types.Connection) { s.fleet.linkDown(l) },
		},
	}
}

// message is called for the messages of one link, one after another.
func (s *opampServer) message(l *link, m *protobufs.AgentToServer) *protobufs.ServerToAgent {
	if c := m.GetCustomMessage(); c.GetCapability() == gatewayCapability && c.GetType() == connectType {
		return s.connect(c)
	}
	if len(m.GetInstanceUid()) == 0 {
		return newAnswer(nil)
	}
	return s.fleet.receive(l, m)
}

// connect answers the gateway's question. A question that cannot be read has no
// request_uid to answer to.
func (s *opampServer) connect(c *protobufs.CustomMessage) *protobufs.ServerToAgent {
	answer := newAnswer(nil)
	var request connectRequest
	if err := json.Unmarshal(c.GetData(), &request); err != nil {
		s.fleet.serverEvent("cannot read a question of the gateway: %v", err)
		return answer
	}
	headers := http.Header{}
	for name, values := range request.Headers {
		for _, v := range values {
			headers.Add(name, v)
		}
	}
	result := s.judge(headers)
	result.RequestUID = request.RequestUID
	data, err := json.Marshal(result)
	if err != nil {
		panic("a connectResult cannot be marshalled: " + err.Error()) // strings, a bool and an int
	}
	answer.CustomMessage = &protobufs.CustomMessage{Capability: gatewayCapability, Type: connectResultType, Data: data}

	if result.Accept {
		s.fleet.serverEvent("the gateway asks about an agent from %s: accepted", request.RemoteAddress)
	} else {
		s.fleet.serverEvent("the gateway asks about an agent from %s: refused with %d", request.RemoteAddress, result.HTTPStatusCode)
	}
	return answer
}

// judge decides on a request to connect, from its headers.
func (s *opampServer) judge(headers http.Header) connectResult {
	if headers.Get("Authorization") == authorization(s.key) {
		return connectResult{Accept: true, HTTPStatusCode: http.StatusOK, ResponseHeaders: map[string]string{}}
	}
	return connectResult{
		HTTPStatusCode:  http.StatusUnauthorized,
		ResponseHeaders: map[string]string{"WWW-Authenticate": "Secret-Key"},
	}
}

func authorization(key string) string { return "Secret-Key " + key }

// pushNext pushes the next configuration. opamp-go writes without a deadline, so this
// does not wait for the writes; they end at the latest when the connections do.
func (s *opampServer) pushNext() {
	pushes := s.fleet.offerNext()
	s.pushes.Go(func() { s.send(pushes) })
}

func (s *opampServer) send(pushes []push) {
	for _, p := range pushes {
		if err := p.conn.Send(context.Background(), p.message); err != nil {
			s.fleet.serverEvent("cannot push to %s: %v", shortUID(formatUID(string(p.message.InstanceUid))), err)
		}
	}
}

// stop ends the server. opamp-go's Stop leaves WebSockets open, so it closes them itself.
func (s *opampServer) stop(ctx context.Context) error {
	err := s.lib.Stop(ctx)
	for _, conn := range s.fleet.connections() {
		_ = conn.Disconnect() // it only has to be closed
	}
	s.pushes.Wait()
	return err
}
