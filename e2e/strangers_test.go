package e2e

import (
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/gorilla/websocket"
	"github.com/stretchr/testify/require"
)

// withTLS has a gateway listen with TLS.
func withTLS(id *Identity) func(config) {
	return func(c config) {
		c.gateway("listener::tls", map[string]any{"cert_file": id.certFile, "key_file": id.keyFile})
	}
}

// silentOnBadKeys lets the right key in, and leaves questions about others unanswered.
func silentOnBadKeys(headers http.Header) verdict {
	return verdict{silent: headers.Get("Authorization") != "Secret-Key right"}
}

// An agent's upgrade has no body, and whatever else has one is a poll by its content type. A request that has, or announces,
// another is answered and closed at once; nobody waits for the body.
func TestRequestsWithBody(t *testing.T) {
	t.Parallel()
	server := startServer(t, serverOptions{})
	gateway := startGateway(t, server.url())
	gateway.wantLinks(t, 3)
	const noPoll, bad = http.StatusUnsupportedMediaType, http.StatusBadRequest
	for _, test := range []struct {
		name, request string
		status        int
	}{
		{"POST", "POST /v1/opamp HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n\x10\x01", noPoll},
		{"POST whose body never comes", "POST /v1/opamp HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n", noPoll},
		{"POST in chunks that never come", "POST /v1/opamp HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n", noPoll},
		{"compressed", "POST /v1/opamp HTTP/1.1\r\nHost: x\r\nContent-Encoding: gzip\r\nContent-Length: 100\r\n\r\n\x1f", noPoll},
		{"that has to be asked for", "POST /v1/opamp HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 100\r\n\r\n", noPoll},
		{"upgrade with one that never comes", upgradeRequest("Content-Length: 1"), bad},
		{"upgrade with chunks", upgradeRequest("Transfer-Encoding: chunked"), bad},
	} {
		t.Run(test.name, func(t *testing.T) {
			resp, ended := knock(t, dialPlain(t, gateway.address, nil), test.request)
			require.Equal(t, test.status, resp.StatusCode)
			require.Less(t, ended, promptly, "until the connection was closed")
		})
	}
	require.Empty(t, server.asked())
}

// A hundred compressed bodies of 20 MiB are sent but for their last byte. None is held.
func TestMemoryOfBodies(t *testing.T) {
	server := startServer(t, serverOptions{})
	gateway := startGateway(t, server.url())
	gateway.wantLinks(t, 3)
	before := gateway.usage(t)
	others := startBystanders(t, gateway, 3)
	const size = 20 << 20
	piece := make([]byte, 1<<20)
	var sending sync.WaitGroup
	for range 100 {
		conn := dialPlain(t, gateway.address, nil)
		sending.Go(func() { // ends with the body, or the connection
			_, err := fmt.Fprintf(conn, "POST /v1/opamp HTTP/1.1\r\nHost: x\r\nContent-Encoding: snappy\r\nContent-Length: %d\r\n\r\n", size+1)
			for range size / len(piece) {
				if err != nil {
					return
				}
				_, err = conn.Write(piece)
			}
		})
	}
	sending.Wait()
	others.wantServed(t, promptly)
	wantLittleMore(t, gateway, before)
}

// The bounds of a request's header are exact, to the header and to the byte; so is that of what
// it becomes when the server is asked.
func TestRequestHeaderLimits(t *testing.T) {
	t.Parallel()
	server := startServer(t, serverOptions{})
	gateway := startGateway(t, server.url())
	gateway.wantLinks(t, 3)
	// headers is a request with so many headers, and sized one whose headers are so long, with their line ends.
	headers := func(n int) string {
		lines := make([]string, n-5) // five make it an upgrade
		for i := range lines {
			lines[i] = fmt.Sprintf("X-%d: x", i)
		}
		return upgradeRequest(lines...)
	}
	sized := func(size int) string {
		have := len(upgradeRequest("X: ")) - len("GET /v1/opamp HTTP/1.1\r\n") - len("\r\n")
		return upgradeRequest("X: " + strings.Repeat("x", size-have))
	}
	const large = http.StatusRequestHeaderFieldsTooLarge
	passed := 0
	for _, test := range []struct {
		name, request string
		status        int
	}{
		{"100 headers", headers(100), http.StatusSwitchingProtocols},
		{"101 headers", headers(101), large},
		{"5,000 headers", headers(5000), large},
		{"16 KiB", sized(16 << 10), http.StatusSwitchingProtocols},
		{"a byte more", sized(16<<10 + 1), large},
	} {
		t.Run(test.name, func(t *testing.T) {
			resp, ended := knock(t, dialPlain(t, gateway.address, nil), test.request)
			require.Equal(t, test.status, resp.StatusCode)
			require.Less(t, ended, promptly)
		})
		if test.status == http.StatusSwitchingProtocols {
			passed++
		}
	}
	require.Len(t, server.asked(), passed, "questions")

	t.Run("question", func(t *testing.T) {
		generous := startGateway(t, server.url(), func(c config) { c.gateway("agents::max_request_header_size", 64<<10) })
		generous.wantLinks(t, 3)
		questions := len(server.asked())
		// Each of these bytes is no text by itself, and takes three in JSON, or more.
		resp, _ := knock(t, dialPlain(t, generous.address, nil), upgradeRequest("X: "+strings.Repeat("\xff", 30_000)))
		require.Equal(t, large, resp.StatusCode)
		require.Len(t, server.asked(), questions)
		resp, _ = knock(t, dialPlain(t, generous.address, nil), upgradeRequest("X: "+strings.Repeat("x", 30_000)))
		require.Equal(t, http.StatusSwitchingProtocols, resp.StatusCode)
		require.Len(t, server.asked(), questions+1)
	})
}

// What an agent sends before it has its answer is refused, and leaves nothing behind.
func TestEarlyData(t *testing.T) {
	t.Parallel()
	authority := newAuthority(t, "inside")
	for name, client := range map[string]*tls.Config{"plain": nil, "TLS": authority.mutual(nil)} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			server := startServer(t, serverOptions{})
			metrics := freeAddress(t)
			gateway := startGateway(t, server.url(), func(c config) {
				c.metrics(t, metrics)
				if client != nil {
					withTLS(authority.issue(t, "gateway"))(c)
				}
			})
			gateway.wantLinks(t, 3)
			before := gateway.usage(t)
			uid := uuid.New()
			frame := heartbeat(uid, 1)
			early := fmt.Sprintf("\x82%c\x00\x00\x00\x00%s", 0x80+len(frame), frame) // masked with zeros
			for range 100 {
				resp, ended := knock(t, dialPlain(t, gateway.address, client), upgradeRequest()+early)
				require.Equal(t, http.StatusBadRequest, resp.StatusCode)
				require.Less(t, ended, promptly)
			}
			wantAgents(t, metrics, 0)
			require.Zero(t, server.known(uid).Messages)
			require.Empty(t, gateway.log.with("panic"))
			wantLittleMore(t, gateway, before)

			// Nobody is left who would count when agents are spread over the links.
			for range 6 {
				ws, resp, err := dialRaw(gateway.url(), nil, client)
				require.NoError(t, err, status(resp))
				a := newRaw(t, ws)
				a.listen()
				a.exchange(t, "hello")
			}
			for link, n := range server.load() {
				require.Equal(t, 2, n, "agents on %s", link)
			}
		})
	}
}

// One address fires requests that the server never answers, and hangs up after a while. Those from
// another address are let in all the time. Not parallel, since it is a matter of time.
func TestHungUpRequests(t *testing.T) {
	server := startServer(t, serverOptions{judge: silentOnBadKeys})
	gateway := startGateway(t, server.url())
	gateway.wantLinks(t, 3)
	mallory := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 2)}}
	request := upgradeRequest("Authorization: Secret-Key guess")
	const requests = 1500
	needsFiles(t, requests)
	var conns []net.Conn
	hangUp := func() {
		for _, conn := range conns {
			conn.Close()
		}
	}
	defer hangUp()
	for range requests {
		conn, err := mallory.Dial("tcp", gateway.address)
		if err != nil {
			t.Skip("there is one loopback address only: ", err)
		}
		conns = append(conns, conn)
		_, _ = io.WriteString(conn, request)
	}
	wantStill(t, 500*time.Millisecond, "the number of questions", func() uint64 { return uint64(len(server.asked())) })
	const newcomers, limit = 15, 2 * time.Second
	come := func(when string) {
		for range newcomers {
			start := time.Now()
			ws, resp, err := dialRaw(gateway.url(), key("right"), nil)
			require.NoError(t, err, "an honest newcomer %s: %s", when, status(resp))
			ws.Close()
			require.Less(t, time.Since(start), limit, "until an honest newcomer was let in %s", when)
		}
	}
	come("while requests wait")
	hangUp()
	come("after they were hung up")
	t.Logf("the server was asked about %d requests of those hung up", len(server.asked())-2*newcomers)
}

// There may be so many connections and no more. Who is turned away is told when to come again.
func TestMaxConnections(t *testing.T) {
	t.Parallel()
	server := startServer(t, serverOptions{})
	const most = 5
	gateway := startGateway(t, server.url(), func(c config) { c.gateway("agents::max_connections", most) })
	gateway.wantLinks(t, 3)
	agents := make([]*rawAgent, most)
	for i := range agents {
		agents[i] = connectRaw(t, gateway.url(), nil)
		agents[i].exchange(t, "hello")
	}
	for range 3 {
		_, resp, err := dialRaw(gateway.url(), nil, nil)
		wantStatus(t, http.StatusServiceUnavailable, resp, err)
		after, err := strconv.Atoi(resp.Header.Get("Retry-After"))
		require.NoError(t, err)
		require.GreaterOrEqual(t, after, 30)
	}
	for _, a := range agents {
		a.exchange(t, "still here")
	}
	require.Len(t, server.asked(), most)
	agents[0].ws.Close()
	eventually(t, func() string {
		ws, resp, _ := dialRaw(gateway.url(), nil, nil)
		if ws == nil {
			return "the place of one who left is not given to another: " + status(resp)
		}
		ws.Close()
		return ""
	})
}

// Somebody was let in, answers pings, and never says a word.
func TestMuteAgent(t *testing.T) {
	needsLong(t)
	t.Parallel()
	server := startServer(t, serverOptions{})
	gateway := startGateway(t, server.url(), fasterSweeps)
	start := time.Now()
	mute := connectRaw(t, gateway.url(), nil)
	speaks := connectRaw(t, gateway.url(), nil)
	speaks.exchange(t, "one word")
	within(t, 100*time.Second, func() string {
		if mute.ended() == nil {
			return "an agent that says nothing is still connected"
		}
		return ""
	})
	require.Greater(t, time.Since(start), 59*time.Second)
	speaks.wantOpen(t)
}

// Web pages do not get in, not even those that come under the gateway's own name, unless they
// are told to.
func TestOrigins(t *testing.T) {
	t.Parallel()
	server := startServer(t, serverOptions{})
	gateway := startGateway(t, server.url())
	open := startGateway(t, server.url(), func(c config) {
		c.gateway("listener::cors", map[string]any{"allowed_origins": []string{"https://console.example", "https://*.inside.example"}})
	})
	gateway.wantLinks(t, 3)
	open.wantLinks(t, 3)
	for _, test := range []struct {
		gateway *Gateway
		origin  string
		status  int
	}{
		{gateway, "https://evil.example", http.StatusForbidden},
		{gateway, "http://" + gateway.address, http.StatusForbidden},
		{open, "https://console.example", http.StatusSwitchingProtocols},
		{open, "https://one.inside.example", http.StatusSwitchingProtocols},
		{open, "https://evil.example", http.StatusForbidden},
		{open, "http://" + open.address, http.StatusForbidden},
	} {
		ws, resp, err := dialRaw(test.gateway.url(), http.Header{"Origin": {test.origin}}, nil)
		if ws != nil {
			ws.Close()
		}
		require.NotNil(t, resp, "%s: %v", test.origin, err)
		require.Equal(t, test.status, resp.StatusCode, test.origin)
	}
	require.Len(t, server.asked(), 2)
}

// A gateway on a unix socket was killed, and its socket is left. The next one takes it over, but
// none takes it from one that lives.
func TestUnixSocketLeft(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "s")
	server := startServer(t, serverOptions{})
	c := gatewayConfig(server.url(), path)
	c.gateway("listener::transport", "unix")
	killed := launchGateway(t, "killed", c)
	killed.wantReady(t, 1)
	killed.Signal(t, syscall.SIGKILL)
	killed.wantExit(t)
	require.FileExists(t, path)

	launchGateway(t, "next", c).wantReady(t, 1)
	dialer := websocket.Dialer{NetDial: func(string, string) (net.Conn, error) { return net.Dial("unix", path) }}
	connect := func() {
		ws, resp, err := dialer.Dial("ws://localhost/v1/opamp", nil)
		require.NoError(t, err, status(resp))
		a := newRaw(t, ws)
		a.listen()
		a.exchange(t, "hello")
	}
	connect()
	second := launchGateway(t, "second", c)
	code, _ := second.wantExit(t)
	require.NotZero(t, code, "a second gateway on the same socket")
	connect()
}

// Where only FIPS 140's algorithms are allowed, WebSocket's handshake works all the same: its
// SHA-1 keeps no secret.
func TestFIPS(t *testing.T) {
	t.Parallel()
	authority := newAuthority(t, "inside")
	for name, client := range map[string]*tls.Config{"plain": nil, "TLS": authority.mutual(nil)} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			server := startServer(t, serverOptions{})
			c := gatewayConfig(server.url(), freeAddress(t))
			if client != nil {
				withTLS(authority.issue(t, "gateway"))(c)
			}
			gateway := launchGatewayIn(t, []string{"GODEBUG=fips140=only"}, "gateway", c)
			gateway.wantReady(t, 1)
			gateway.wantLinks(t, 3)
			ws, resp, err := dialRaw(gateway.url(), nil, client)
			require.NoError(t, err, status(resp))
			a := newRaw(t, ws)
			a.listen()
			a.exchange(t, "hello")
			require.Empty(t, gateway.log.with("panic"))
		})
	}
}

// Strangers hold as many connections as they can, and send whatever they like, but for a key
// that the server would let in. It costs little, all of it ends, and others notice little. Not
// parallel, since it is a matter of memory.
func TestMemoryOfStrangers(t *testing.T) {
	n, while := 300, 5*time.Second
	if long() {
		n, while = 1000, time.Minute
	}
	needsFiles(t, 2*n)
	authority := newAuthority(t, "inside")
	noise := strings.Repeat("x", 4<<20)
	many := strings.Repeat("X: x\r\n", 99)
	hello := "\x16\x03\x01\x40\x00\x01\x00\x3f\xfc\x03\x03"
	for _, over := range []string{"TCP", "TLS"} {
		t.Run("over "+over, func(t *testing.T) {
			server := startServer(t, serverOptions{judge: func(headers http.Header) verdict {
				return verdict{silent: headers.Get("Authorization") == "Secret-Key guess"}
			}})
			var edits []func(config)
			var client *tls.Config
			if over == "TLS" {
				edits = append(edits, withTLS(authority.issue(t, "gateway")))
				client = authority.mutual(nil)
			}
			gateway := startGateway(t, server.url(), edits...)
			gateway.wantLinks(t, 3)
			bystander := func() *rawAgent {
				ws, resp, err := dialRaw(gateway.url(), nil, client)
				require.NoError(t, err, status(resp))
				a := newRaw(t, ws)
				a.listen()
				return a
			}
			alice := bystander()
			alice.exchange(t, "hello")
			before := gateway.usage(t)

			// What is sent at once, and what a second later, again and again.
			kinds := []struct{ first, drip string }{
				{"", ""},
				{"GET /" + noise[:8000], "x"},
				{"GET / HTTP/1.1\r\nHost: x\r\nX: " + noise[:16000], "x"},
				{"GET / HTTP/1.1\r\nHost: x\r\n" + many, ""},
				{"GET / HTTP/1.1\r\nHost: x\r\n" + many, many},
				{"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "GET / HTTP/1.1\r\nHost: x\r\n\r\n"},
				{"POST / HTTP/1.1\r\nHost: x\r\nContent-Encoding: snappy\r\nContent-Length: 100000000\r\n\r\n" + noise, noise},
				{"POST / HTTP/1.1\r\nHost: x\r\nContent-Encoding: zstd\r\nTransfer-Encoding: chunked\r\n\r\n400000\r\n" + noise, "\r\n400000\r\n" + noise},
				{"POST / HTTP/1.1\r\nHost: x\r\nContent-Type: application/x-protobuf\r\nAuthorization: Secret-Key guess\r\nContent-Encoding: gzip\r\nContent-Length: 60000000\r\n\r\n" + noise, noise},
				{upgradeRequest("Authorization: Secret-Key guess", "X: "+noise[:16000]), ""},
				{upgradeRequest("Authorization: Secret-Key guess", "X: "+strings.Repeat("\xff", 16000)), noise},
			}
			mallory := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 2)}} // shares no place with others
			var strangers sync.WaitGroup
			var conns []net.Conn
			var open atomic.Int64
			start := time.Now()
			over := make(chan struct{})
			defer strangers.Wait()
			defer func() {
				close(over)
				for _, conn := range conns {
					conn.Close()
				}
			}()
			for i := range n {
				kind := kinds[i%len(kinds)]
				tcp, err := mallory.Dial("tcp", gateway.address)
				if err != nil {
					t.Skip("there is one loopback address only: ", err)
				}
				conns = append(conns, tcp)
				open.Add(1)
				conn := tcp
				switch {
				case client != nil && i%20 == 0: // its handshake never ends
					kind.first, kind.drip = hello, "x"
				case client != nil:
					conn = secured(tcp, client)
				}
				strangers.Go(func() { // ends with the attack, or the connection
					_, err := io.WriteString(conn, kind.first)
					tick := time.NewTicker(time.Second)
					defer tick.Stop()
					for err == nil {
						select {
						case <-over:
							return
						case <-tick.C:
							_, err = io.WriteString(conn, kind.drip)
						}
					}
				})
				strangers.Go(func() { // ends with the connection: who is told to go stays
					buffer := make([]byte, 4096)
					for {
						if _, err := conn.Read(buffer); err != nil {
							open.Add(-1)
							return
						}
					}
				})
			}
			slowest := time.Duration(0)
			for time.Since(start) < while {
				begin := time.Now()
				alice.exchange(t, fmt.Sprint("at ", begin.Sub(start)))
				slowest = max(slowest, time.Since(begin))
				require.Less(t, (gateway.usage(t).peak-before.memory)>>20, littleMore>>20, "MiB of memory more than before")
				newcomer := time.Now()
				bystander().ws.Close()
				slowest = max(slowest, time.Since(newcomer))
			}
			t.Logf("meanwhile those who were let in, or came, waited for %s at most", slowest.Round(time.Millisecond))
			require.Less(t, slowest, promptly)
			if long() {
				within(t, 75*time.Second-time.Since(start), func() string {
					if n := open.Load(); n > 0 {
						return fmt.Sprintf("%d connections of strangers are open", n)
					}
					return ""
				})
			}
			wantLittleMore(t, gateway, before)
		})
	}
}
