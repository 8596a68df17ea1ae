package e2e

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/gorilla/websocket"
	"github.com/open-telemetry/opamp-go/protobufs"
	"github.com/stretchr/testify/require"
)

// fasterSweeps has offences punished, and silence noticed, within a few seconds.
func fasterSweeps(c config) {
	c.gateway("agents::keep_alive", map[string]any{"interval": "1s", "timeout": "3s"})
}

// What is no agent is refused without a question to the server.
func TestNoAgents(t *testing.T) {
	t.Parallel()
	server := startServer(t, serverOptions{})
	gateway := startGateway(t, server.url())
	server.wantLinks(t, upstream(3)...)
	upgrade := func(extra ...string) string {
		return "GET /v1/opamp HTTP/1.1\r\nHost: " + gateway.address + "\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n" +
			"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n" + strings.Join(extra, "\r\n") + "\r\n\r\n"
	}
	for _, test := range []struct {
		name, request string
		status        int
	}{
		{"GET", "GET /v1/opamp HTTP/1.1\r\nHost: x\r\n\r\n", http.StatusUpgradeRequired},
		{"POST", "POST /v1/opamp HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}", http.StatusUnsupportedMediaType},
		{"POST of nothing", "POST /v1/opamp HTTP/1.1\r\nHost: x\r\nContent-Type: application/x-protobuf\r\nContent-Length: 0\r\n\r\n", http.StatusBadRequest},
		{"PUT", "PUT /v1/opamp HTTP/1.1\r\nHost: x\r\nContent-Type: application/x-protobuf\r\nContent-Length: 2\r\n\r\n\x10\x01", http.StatusMethodNotAllowed},
		{"POST that asks for an upgrade", strings.Replace(upgrade(), "GET", "POST", 1), http.StatusUnsupportedMediaType},
		{"WebSocket of old", strings.Replace(upgrade(), "Version: 13", "Version: 8", 1), http.StatusBadRequest},
		{"foreign origin", upgrade("Origin: https://evil.example"), http.StatusForbidden},
		{"header of 40 KiB", upgrade("X-Large: " + strings.Repeat("x", 40<<10)), http.StatusRequestHeaderFieldsTooLarge},
		{"no HTTP", "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", http.StatusBadRequest},
	} {
		t.Run(test.name, func(t *testing.T) {
			conn, err := net.Dial("tcp", gateway.address)
			require.NoError(t, err)
			defer conn.Close()
			require.NoError(t, conn.SetDeadline(time.Now().Add(ceiling)))
			_, err = io.WriteString(conn, test.request)
			require.NoError(t, err)
			resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
			require.NoError(t, err)
			resp.Body.Close()
			require.Equal(t, test.status, resp.StatusCode)
		})
	}
	require.Empty(t, server.asked())

	t.Run("header of 12 KiB, any path", func(t *testing.T) {
		connectRaw(t, "ws://"+gateway.address+"/some/where/else", http.Header{"X-Large": {strings.Repeat("x", 12<<10)}})
		require.Len(t, server.asked(), 1)
	})
}

// Agents that do not keep to the protocol are let go, late; neither other agents nor the links
// to the server notice.
func TestBadFrames(t *testing.T) {
	t.Parallel()
	server := startServer(t, serverOptions{})
	metrics := freeAddress(t)
	gateway := startGateway(t, server.url(), fasterSweeps, func(c config) {
		c.gateway("max_message_size", 64<<10)
		c.metrics(t, metrics)
	})
	gateway.wantLinks(t, 3)
	others := startAgents(t, 3, gateway.url(), agentOptions{}) // one on each link
	for _, a := range others {
		server.wantAgent(t, a.id(), "is connected", isConnected)
	}
	stop := make(chan struct{})
	defer close(stop)
	for _, a := range others {
		go a.chatUntil(stop) // ends with the test
	}

	connected := func(t *testing.T) *rawAgent {
		t.Helper()
		a := connectRaw(t, gateway.url(), nil)
		a.send(t, &protobufs.AgentToServer{SequenceNum: 1})
		server.wantAgent(t, a.uid, "is connected", func(k Known) bool { return k.Connected })
		return a
	}

	const notFramed = -1 // the kind of what is written as it is
	bad := []struct {
		name   string
		kind   int
		frame  []byte
		times  int
		code   int
		reason string
	}{
		{"garbage", websocket.BinaryMessage, []byte("\x00\xff\xff\xff\xff garbage"), 10, websocket.CloseInvalidFramePayloadData, "bad_frame"},
		{"text", websocket.TextMessage, []byte("hello"), 10, websocket.CloseInvalidFramePayloadData, "bad_frame"},
		{"another header", websocket.BinaryMessage, []byte("\x80\x01\x10\x01"), 10, websocket.CloseInvalidFramePayloadData, "bad_frame"},
		{"truncated", websocket.BinaryMessage, heartbeat(uuid.New(), 1)[:12], 10, websocket.CloseInvalidFramePayloadData, "bad_frame"},
		{"empty", websocket.BinaryMessage, nil, 10, websocket.CloseInvalidFramePayloadData, "bad_frame"},
		{"header only", websocket.BinaryMessage, []byte("\x00"), 10, websocket.CloseInvalidFramePayloadData, "bad_uid"},
		{"no uid", websocket.BinaryMessage, []byte("\x00\x10\x01"), 10, websocket.CloseInvalidFramePayloadData, "bad_uid"},
		{"uid of 5 bytes", websocket.BinaryMessage, []byte("\x00\x0a\x05alice"), 10, websocket.CloseInvalidFramePayloadData, "bad_uid"},
		{"uid of 17 bytes", websocket.BinaryMessage, []byte("\x00\x0a\x11alice and her dog"), 10, websocket.CloseInvalidFramePayloadData, "bad_uid"},
		{"question of a gateway", websocket.BinaryMessage, foreignConnect(t, nil), 1, websocket.ClosePolicyViolation, "foreign_connect"},
		{"question about an agent with a uid", websocket.BinaryMessage, foreignConnect(t, make([]byte, 16)), 1, websocket.ClosePolicyViolation, "foreign_connect"},
		{"too large", websocket.BinaryMessage, make([]byte, 65<<10), 1, websocket.CloseMessageTooBig, "too_large"},
		{"no WebSocket frames at all", notFramed, []byte(strings.Repeat("\xff", 1000)), 1, websocket.CloseProtocolError, "bad_frame"},
	}
	offenders := make([]*rawAgent, len(bad))
	for i := range offenders {
		offenders[i] = connected(t)
	}
	start := time.Now()
	for i, test := range bad {
		t.Run(test.name, func(t *testing.T) {
			mallory := offenders[i]
			before := faults(t, metrics, test.reason)
			for range test.times {
				if test.kind == notFramed {
					_, err := mallory.ws.NetConn().Write(test.frame)
					require.NoError(t, err)
				} else {
					mallory.sendFrame(t, test.kind, test.frame)
				}
			}
			if test.times > 1 {
				mallory.wantMessage(t, "that says what is wrong", func(m *protobufs.ServerToAgent) bool {
					return m.GetErrorResponse().GetType() == protobufs.ServerErrorResponseType_ServerErrorResponseType_BadRequest
				})
			}
			wantSamples(t, metrics, map[string]float64{
				fmt.Sprintf("otelcol_opampgateway_faults{reason=%q}", test.reason): float64(before + test.times),
			})
		})
	}
	for i, test := range bad {
		t.Run(test.name+" has an end", func(t *testing.T) {
			offenders[i].wantClosed(t, test.code)
			server.wantAgent(t, offenders[i].uid, "is gone", func(k Known) bool { return k.Goodbye })
		})
	}
	require.Greater(t, time.Since(start), 5*time.Second, "closed late, or they would be back thousands of times a second")
	for _, q := range server.asked() {
		require.NotContains(t, q.Headers.Get("Authorization"), "guess")
	}

	t.Run("a few bad ones are forgiven", func(t *testing.T) {
		bob := connected(t)
		for range 9 {
			bob.sendFrame(t, websocket.BinaryMessage, []byte("\x00\xff"))
		}
		bob.send(t, &protobufs.AgentToServer{SequenceNum: 2})
		for range 9 {
			bob.sendFrame(t, websocket.BinaryMessage, []byte("\x00\xff"))
		}
		bob.send(t, &protobufs.AgentToServer{SequenceNum: 3})
		server.wantAgent(t, bob.uid, "is still heard", func(k Known) bool { return k.Messages == 3 })
		bob.wantOpen(t)
	})

	// They went on talking all the while.
	for _, a := range others {
		before := len(a.everHeard())
		within(t, 5*time.Second, func() string {
			if n := len(a.everHeard()); n <= before {
				return fmt.Sprintf("%s has heard nothing more: %d answers", a.name, n)
			}
			return ""
		})
		a.wantConnects(t, 1)
	}
	require.Zero(t, samples(t, metrics)[`otelcol_opampgateway_faults{reason="link_lost"}`])
}

// An agent that vanished without a word is noticed; one that is only quiet is left in peace.
func TestSilentAgent(t *testing.T) {
	t.Parallel()
	server := startServer(t, serverOptions{})
	gateway := startGateway(t, server.url(), fasterSweeps)
	quiet := connectRaw(t, gateway.url(), nil) // its library answers pings
	quiet.send(t, &protobufs.AgentToServer{SequenceNum: 1})
	server.wantAgent(t, quiet.uid, "is connected", func(k Known) bool { return k.Connected })

	for range 2 { // the second time, quiet has been quiet for much longer than any silence is borne
		dead, _, err := dialRaw(gateway.url(), nil, nil) // nobody reads, so nobody answers
		require.NoError(t, err)
		t.Cleanup(func() { dead.Close() })
		gateway.wantLog(t, "info", "no sign of life", clientAt(dead.LocalAddr().String()))
	}
	quiet.wantOpen(t)
	require.False(t, server.known(quiet.uid).Goodbye)
	server.tell(t, quiet.uid, "still there?")
	quiet.wantMessage(t, "from the server", func(m *protobufs.ServerToAgent) bool {
		return string(m.GetCustomMessage().GetData()) == "still there?"
	})
}
