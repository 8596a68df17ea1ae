package e2e

import (
	"fmt"
	"testing"
	"time"

	"github.com/gorilla/websocket"
	"github.com/open-telemetry/opamp-go/protobufs"
	"github.com/stretchr/testify/require"

	"github.com/opampgateway/opampgateway/e2e/fault"
)

// through opens a line to an address, for the duration of a test.
func through(t *testing.T, target string) *fault.Line {
	t.Helper()
	line, err := fault.Open(target)
	require.NoError(t, err)
	t.Cleanup(line.Close)
	return line
}

// oneLink has all agents share a link, so that what the server hears of them has an order.
func oneLink(c config) { c.gateway("server::connections", 1) }

// wantAgents waits until n agents are connected to the gateway.
func wantAgents(t *testing.T, metrics string, n int) {
	t.Helper()
	wantSamples(t, metrics, map[string]float64{`otelcol_opampgateway_connections{direction="downstream"}`: float64(n)})
}

// The connection of an agent ends, in whatever way: the server hears of it at once, and once.
func TestGoodbye(t *testing.T) {
	t.Parallel()
	server := startServer(t, serverOptions{})
	metrics := freeAddress(t)
	gateway := startGateway(t, server.url(), oneLink, func(c config) { c.metrics(t, metrics) })
	gateway.wantLinks(t, 1)
	line := through(t, gateway.address)
	witness := connectRaw(t, gateway.url(), nil)

	leave := map[string]func(alice *rawAgent){
		"reset": func(*rawAgent) { line.Conns()[0].Reset() },
		"FIN":   func(*rawAgent) { line.Conns()[0].Finish() },
		"closed": func(alice *rawAgent) {
			alice.sendFrame(t, websocket.CloseMessage, websocket.FormatCloseMessage(websocket.CloseNormalClosure, ""))
		},
		"goodbye": func(alice *rawAgent) {
			alice.send(t, &protobufs.AgentToServer{AgentDisconnect: &protobufs.AgentDisconnect{}})
			server.wantAgent(t, alice.uid, "has said goodbye", func(k Known) bool { return k.Goodbye })
			line.Conns()[0].Reset()
		},
	}
	for name, leave := range leave {
		t.Run(name, func(t *testing.T) {
			alice := connectRaw(t, "ws://"+line.Address(), nil)
			alice.send(t, &protobufs.AgentToServer{SequenceNum: 1})
			server.wantAgent(t, alice.uid, "is connected", func(k Known) bool { return k.Connected })
			start := time.Now()
			leave(alice)
			server.wantAgent(t, alice.uid, "has left", func(k Known) bool { return k.Goodbye })
			t.Logf("known to the server after %s", time.Since(start).Round(time.Millisecond))
			require.Less(t, time.Since(start), promptly)

			wantAgents(t, metrics, 1)
			witness.send(t, &protobufs.AgentToServer{CustomMessage: chatMessage(name)}) // comes after whatever else is said
			witness.wantMessage(t, "of its own", func(m *protobufs.ServerToAgent) bool { return string(m.GetCustomMessage().GetData()) == name })
			require.Equal(t, 2, server.known(alice.uid).Messages, "messages of the agent, with its goodbye")
			alice.ws.Close()
			eventually(t, func() string {
				if open := len(line.Conns()); open > 0 {
					return fmt.Sprintf("%d connections to the gateway are open", open)
				}
				return ""
			})
		})
	}
}

// Those who do not want it are not told.
func TestNoGoodbye(t *testing.T) {
	t.Parallel()
	server := startServer(t, serverOptions{})
	metrics := freeAddress(t)
	gateway := startGateway(t, server.url(), oneLink, func(c config) {
		c.metrics(t, metrics)
		c.gateway("agents::send_disconnect", false)
	})
	gateway.wantLinks(t, 1)
	line := through(t, gateway.address)
	witness := connectRaw(t, gateway.url(), nil)
	for i, end := range []func(*fault.Conn){(*fault.Conn).Reset, (*fault.Conn).Finish} {
		alice := connectRaw(t, "ws://"+line.Address(), nil)
		alice.send(t, &protobufs.AgentToServer{SequenceNum: 1})
		server.wantAgent(t, alice.uid, "is connected", func(k Known) bool { return k.Connected })
		end(line.Conns()[0])
		wantAgents(t, metrics, 1)
		text := fmt.Sprint("after ", i)
		witness.send(t, &protobufs.AgentToServer{CustomMessage: chatMessage(text)})
		witness.wantMessage(t, "of its own", func(m *protobufs.ServerToAgent) bool { return string(m.GetCustomMessage().GetData()) == text })
		require.Equal(t, 1, server.known(alice.uid).Messages, "messages of the agent")
	}
}
