package e2e

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/gorilla/websocket"
	"github.com/open-telemetry/opamp-go/protobufs"
	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/proto"
)

// littleMore is how much memory any number of offenders may cost the gateway.
const littleMore = 64 << 20

// wantLittleMore checks the gateway's memory against what it had before.
func wantLittleMore(t *testing.T, gateway *Gateway, before usage) {
	t.Helper()
	now := gateway.usage(t)
	t.Logf("memory before: %s; after: %s", before, now)
	require.Less(t, (now.peak-before.memory)>>20, littleMore>>20, "MiB of memory more than before")
}

// Agents ping the gateway a hundred thousand times, and hear the answers or do not.
func TestPingFlood(t *testing.T) {
	t.Parallel()
	server := startServer(t, serverOptions{})
	gateway := startGateway(t, server.url(), oneLink)
	gateway.wantLinks(t, 1)
	before := gateway.usage(t)
	others := startBystanders(t, gateway, 3)
	for _, test := range []struct {
		name    string
		connect func() *rawAgent
	}{
		{"that reads", func() *rawAgent { return connectRaw(t, gateway.url(), nil) }},
		{"that does not", func() *rawAgent { return connectDeaf(t, gateway.url(), nil) }},
	} {
		t.Run(test.name, func(t *testing.T) {
			mallory := test.connect()
			start := time.Now()
			ping := []byte("\x89\xfd\x00\x00\x00\x00" + strings.Repeat("x", 125)) // masked with zeros
			pings := []byte(strings.Repeat(string(ping), 1000))
			require.NoError(t, mallory.ws.NetConn().SetWriteDeadline(time.Now().Add(2*ceiling)))
			for range 100 {
				_, err := mallory.ws.NetConn().Write(pings)
				require.NoError(t, err)
			}
			mallory.send(t, &protobufs.AgentToServer{SequenceNum: 1})
			server.wantAgent(t, mallory.uid, "is still heard", func(k Known) bool { return k.Connected })
			t.Logf("100,000 pings were read within %s", time.Since(start).Round(time.Millisecond))
		})
	}
	others.wantServed(t, promptly)
	wantLittleMore(t, gateway, before)
}

// Two hundred connections send their request a byte a second, and another two hundred their
// TLS handshake. The listener closes them after a minute.
func TestSlowloris(t *testing.T) {
	t.Parallel()
	authority := newAuthority(t, "inside")
	identity := authority.issue(t, "gateway")
	server := startServer(t, serverOptions{})
	plain := startGateway(t, server.url())
	secure := startGateway(t, server.url(), func(c config) {
		c.gateway("listener::tls", map[string]any{"cert_file": identity.certFile, "key_file": identity.keyFile})
	})
	plain.wantLinks(t, 3)
	secure.wantLinks(t, 3)
	before := map[*Gateway]usage{plain: plain.usage(t), secure: secure.usage(t)}
	others := startBystanders(t, plain, 3)

	request := "GET /v1/opamp HTTP/1.1\r\nHost: " + plain.address + "\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nX-Slow: " + strings.Repeat("x", 1000)
	hello := "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + strings.Repeat("x", 400) // the beginning of a ClientHello
	start := time.Now()
	var slow sync.WaitGroup
	defer slow.Wait()
	ended := make(chan time.Duration, 400)
	for gateway, text := range map[*Gateway]string{plain: request, secure: hello} {
		for range 200 {
			conn, err := net.Dial("tcp", gateway.address)
			require.NoError(t, err)
			t.Cleanup(func() { conn.Close() })
			slow.Go(func() { // ends when the connection does, or with the text
				tick := time.NewTicker(time.Second)
				defer tick.Stop()
				for i := range text {
					if _, err := io.WriteString(conn, text[i:i+1]); err != nil {
						return
					}
					<-tick.C
				}
			})
			slow.Go(func() {
				_ = conn.SetReadDeadline(start.Add(2 * time.Minute))
				_, err := io.Copy(io.Discard, conn)
				conn.Close()
				if !errors.Is(err, os.ErrDeadlineExceeded) {
					ended <- time.Since(start)
				}
			})
		}
	}
	ws, _, err := dialRaw(secure.url(), nil, authority.mutual(nil))
	require.NoError(t, err, "an agent that comes meanwhile")
	ws.Close()
	slowest := time.Duration(0)
	for n := range 400 {
		select {
		case after := <-ended:
			slowest = max(slowest, after)
		case <-time.After(2 * time.Minute):
			t.Fatalf("%d of 400 slow connections were closed", n)
		}
	}
	t.Logf("the last of 400 slow connections was closed after %s", slowest.Round(time.Second))
	require.Less(t, slowest, 90*time.Second)
	others.wantServed(t, promptly)
	for gateway, before := range before {
		wantLittleMore(t, gateway, before)
	}
	for _, q := range server.asked() {
		require.Empty(t, q.Headers.Get("X-Slow"))
	}
}

// Fifty requests come with 4 MiB of headers each: they are refused, not read.
func TestHugeHeaders(t *testing.T) {
	t.Parallel()
	server := startServer(t, serverOptions{})
	gateway := startGateway(t, server.url())
	gateway.wantLinks(t, 3)
	before := gateway.usage(t)
	others := startBystanders(t, gateway, 3)
	header := strings.Repeat("X-Large: "+strings.Repeat("x", 1000)+"\r\n", 4<<10)
	var requests sync.WaitGroup
	defer requests.Wait()
	answers := make(chan string, 50)
	for range cap(answers) {
		conn, err := net.Dial("tcp", gateway.address)
		require.NoError(t, err)
		require.NoError(t, conn.SetDeadline(time.Now().Add(ceiling)))
		requests.Go(func() { // ends with the header, or the connection
			_, _ = io.WriteString(conn, "GET /v1/opamp HTTP/1.1\r\nHost: x\r\n"+header)
		})
		requests.Go(func() {
			defer conn.Close()
			resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
			if err != nil {
				answers <- err.Error()
				return
			}
			resp.Body.Close()
			answers <- resp.Status
		})
	}
	for range cap(answers) {
		require.Equal(t, "431 Request Header Fields Too Large", <-answers)
	}
	others.wantServed(t, promptly)
	wantLittleMore(t, gateway, before)
}

// serverFrame is a message of the server under whatever uid.
func serverFrame(t *testing.T, uid []byte, text string) []byte {
	t.Helper()
	frame, err := proto.MarshalOptions{}.MarshalAppend([]byte{0}, &protobufs.ServerToAgent{InstanceUid: uid, CustomMessage: chatMessage(text)})
	require.NoError(t, err)
	return frame
}

// The server sends what no server should. It costs counters; links and agents stay.
func TestBadServer(t *testing.T) {
	t.Parallel()
	server := startBareServer(t)
	metrics := freeAddress(t)
	const largest = 1 << 20
	gateway := startGateway(t, server.url(), func(c config) {
		c.metrics(t, metrics)
		c.gateway("max_message_size", largest)
	})
	gateway.wantLinks(t, 3)
	links := server.all()
	require.Len(t, links, 3)
	alice := connectRaw(t, gateway.url(), nil)
	alice.exchange(t, "I am alice")
	home := server.home(t, alice.uid)
	others := startBystanders(t, gateway, 6)
	before := gateway.usage(t)

	unknown := uuid.New()
	for _, test := range []struct {
		name   string
		kind   int
		frame  []byte
		times  int
		reason string
	}{
		{"text", websocket.TextMessage, serverFrame(t, alice.uid[:], "text"), 20, "server_bad_frame"},
		{"garbage", websocket.BinaryMessage, []byte("\x00\xff\xff\xff\xff garbage"), 20, "server_bad_frame"},
		{"another header", websocket.BinaryMessage, []byte("\x80\x01\x10\x01"), 20, "server_bad_frame"},
		{"truncated", websocket.BinaryMessage, serverFrame(t, alice.uid[:], "truncated")[:30], 20, "server_bad_frame"},
		{"truncated in the uid", websocket.BinaryMessage, serverFrame(t, alice.uid[:], "")[:12], 20, "server_bad_frame"},
		{"empty", websocket.BinaryMessage, nil, 20, "server_bad_frame"},
		{"empty message", websocket.BinaryMessage, []byte{0}, 20, ""}, // it only keeps the connection alive
		{"no uid", websocket.BinaryMessage, serverFrame(t, nil, "to whom?"), 20, "server_no_uid"},
		{"uid of 5 bytes", websocket.BinaryMessage, serverFrame(t, alice.uid[:5], "to whom?"), 20, "server_unknown_uid"},
		{"uid of 17 bytes", websocket.BinaryMessage, serverFrame(t, append(alice.uid[:], 1), "to whom?"), 20, "server_unknown_uid"},
		{"too large", websocket.BinaryMessage, serverFrame(t, alice.uid[:], strings.Repeat("x", largest)), 20, "server_too_large"},
		{"far too large", websocket.BinaryMessage, serverFrame(t, alice.uid[:], strings.Repeat("x", 100<<20)), 1, "server_too_large"},
		{"answer to nobody", websocket.BinaryMessage, connectResult(t, `{"request_uid":"none","accept":true}`), 20, "server_stray"},
		{"answer of garbage", websocket.BinaryMessage, connectResult(t, `{"request_uid":`), 20, "server_bad_frame"},
		{"unknown uid", websocket.BinaryMessage, serverFrame(t, unknown[:], "anybody?"), 100_000, "server_unknown_uid"},
		{"ping", websocket.PingMessage, []byte(strings.Repeat("x", 125)), 100_000, ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			expected := samples(t, metrics)
			for name := range expected {
				if !strings.HasPrefix(name, "otelcol_opampgateway_faults") {
					delete(expected, name)
				}
			}
			if test.reason != "" {
				expected[fmt.Sprintf("otelcol_opampgateway_faults{reason=%q}", test.reason)] += float64(test.times)
			}
			start := time.Now()
			for range test.times {
				require.NoError(t, home.pushFrame(test.kind, test.frame))
			}
			require.NoError(t, home.pushFrame(websocket.BinaryMessage, serverFrame(t, alice.uid[:], test.name)))
			alice.wantChat(t, test.name) // what comes after it is relayed
			if test.times > 1000 {
				t.Logf("%d were read within %s", test.times, time.Since(start).Round(time.Millisecond))
			}
			wantSamples(t, metrics, expected)
		})
	}
	alice.exchange(t, "still here")
	others.wantServed(t, promptly)
	require.Equal(t, links, server.all(), "links ever connected")
	for _, l := range links {
		l.wantOpen(t)
	}
	require.Zero(t, faults(t, metrics, "link_lost"))
	require.Len(t, gateway.log.with("server sends messages without instance_uid"), 1, "lines in the log about that")
	warnings := slices.DeleteFunc(gateway.ofGateway("warn"), func(line string) bool { return strings.Contains(line, "skipped") }) // too large
	require.Len(t, warnings, 1, "warnings in the log")
	wantLittleMore(t, gateway, before)
}

// connectResult is an answer of the server's with whatever data.
func connectResult(t *testing.T, data string) []byte {
	t.Helper()
	frame, err := proto.MarshalOptions{}.MarshalAppend([]byte{0}, &protobufs.ServerToAgent{CustomMessage: &protobufs.CustomMessage{
		Capability: gatewayCapability, Type: "connectResult", Data: []byte(data),
	}})
	require.NoError(t, err)
	return frame
}
