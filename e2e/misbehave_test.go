package e2e

import (
	"net/http"
	"sync"
	"testing"
	"time"

	"github.com/gorilla/websocket"
	"github.com/open-telemetry/opamp-go/protobufs"
	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/proto"
)

// foreignConnect is a question that only a gateway may ask, with the uid of an agent or none.
func foreignConnect(t *testing.T, uid []byte) []byte {
	t.Helper()
	frame, err := proto.MarshalOptions{}.MarshalAppend([]byte{0}, &protobufs.AgentToServer{
		InstanceUid: uid,
		CustomMessage: &protobufs.CustomMessage{
			Capability: gatewayCapability, Type: "connect", Data: []byte(`{"request_uid":"1","headers":{"Authorization":["guess"]}}`),
		},
	})
	require.NoError(t, err)
	return frame
}

// An agent misbehaves as soon as it is let in, and comes back as soon as it is thrown out. It
// costs the server one question every few seconds: offenders are closed 5 to 15 s after.
func TestMisbehavingAgents(t *testing.T) {
	t.Parallel()
	server := startServer(t, serverOptions{})
	gateway := startGateway(t, server.url(), func(c config) { c.gateway("max_message_size", 64<<10) })
	gateway.wantLinks(t, 3)
	others := startBystanders(t, gateway, 3)

	send := func(kind int, frame []byte) func(*websocket.Conn) {
		return func(ws *websocket.Conn) {
			for range 10 {
				_ = ws.WriteMessage(kind, frame) // whether it is heard is seen by the questions
			}
		}
	}
	write := func(bytes string) func(*websocket.Conn) {
		return func(ws *websocket.Conn) { _, _ = ws.NetConn().Write([]byte(bytes)) }
	}
	const sweeps, shortest = 4, 5 * time.Second // shortest is the least time an offender is kept
	over := time.Now().Add(sweeps * shortest)
	var misbehaving sync.WaitGroup
	defer misbehaving.Wait()
	for name, misbehave := range map[string]func(*websocket.Conn){
		"text":                        send(websocket.TextMessage, []byte("hello")),
		"garbage":                     send(websocket.BinaryMessage, []byte("\x00\xff\xff")),
		"no uid":                      send(websocket.BinaryMessage, []byte("\x00\x10\x01")),
		"too large":                   send(websocket.BinaryMessage, make([]byte, 65<<10)),
		"question of a gateway":       send(websocket.BinaryMessage, foreignConnect(t, nil)),
		"bits that are not allowed":   write("\xf2\x80\x00\x00\x00\x00"),
		"frame without a mask":        write("\x82\x05hello"),
		"unknown opcode":              write("\x83\x80\x00\x00\x00\x00"),
		"continuation of nothing":     write("\x80\x80\x00\x00\x00\x00"),
		"ping of 126 bytes":           write("\x89\xfe\x00\x7e\x00\x00\x00\x00" + string(make([]byte, 126))),
		"close frame with a bad code": write("\x88\x82\x00\x00\x00\x00\x00\x01"),
	} {
		misbehaving.Go(func() {
			headers := http.Header{"Agent-Hostname": {name}}
			for time.Now().Before(over) {
				ws, _, err := dialRaw(gateway.url(), headers, nil)
				if err != nil {
					continue
				}
				misbehave(ws)
				_ = ws.SetReadDeadline(over)
				for err == nil { // until it is thrown out
					_, _, err = ws.ReadMessage()
				}
				ws.Close()
			}
		})
	}
	misbehaving.Wait()
	asked := map[string]int{}
	for _, q := range server.asked() {
		require.NotContains(t, q.Headers.Get("Authorization"), "guess")
		if name := q.Headers.Get("Agent-Hostname"); name != "" {
			asked[name]++
		}
	}
	t.Logf("questions in %s: %v", sweeps*shortest, asked)
	require.Len(t, asked, 11)
	for name, n := range asked {
		// The first at once.
		if n > sweeps+1 {
			t.Errorf("the server was asked %d times about who sends: %s", n, name)
		}
	}
	others.wantServed(t, promptly)
}
