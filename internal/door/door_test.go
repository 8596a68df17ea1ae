package door

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gorilla/websocket"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"github.com/opampgateway/opampgateway/internal/gatewaytest"
	"github.com/opampgateway/opampgateway/internal/socket"
	"github.com/opampgateway/opampgateway/internal/telemetry"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// house is what is behind a door: an HTTP server that lets in whom Check finds good.
type house struct {
	t       *testing.T
	door    *Door
	server  *http.Server
	dial    func() (net.Conn, error)
	settle  func() // waits for the goroutines of connections, for which the HTTP server does not wait
	logs    *observer.ObservedLogs
	letIn   chan net.Conn                 // all of them
	failed  chan error                    // of Upgrade
	begun   atomic.Int64                  // requests that Check has found good
	mayGoOn atomic.Pointer[chan struct{}] // if not nil, they wait until it is closed
	waiting atomic.Pointer[stranger]      // the last of those
	hungUp  atomic.Int64                  // who did not wait for that
	tls     atomic.Pointer[tls.ConnectionState]

	mu     sync.Mutex
	turned map[telemetry.Outcome]int
}

var usual = Limits{Headers: 100, HeaderSize: 16 << 10, Connections: 10_000, Strangers: 10_000, Timeout: 30 * time.Second}

// build has a house on l.
func build(t *testing.T, l net.Listener, secure *tls.Config, limits Limits, change ...func(*http.Server)) *house {
	t.Helper()
	core, logs := observer.New(zap.DebugLevel)
	var h *house
	h = &house{
		t: t, logs: logs, letIn: make(chan net.Conn, 10_000), failed: make(chan error, 100), turned: map[telemetry.Outcome]int{},
		dial: func() (net.Conn, error) { return net.Dial(l.Addr().Network(), l.Addr().String()) },
		settle: func() {
			require.Eventually(t, func() bool {
				h.goodbye()
				return h.door.Open() == 0
			}, 10*time.Second, time.Millisecond)
		},
	}
	h.door = New(l, secure, limits, zap.New(core), func(o telemetry.Outcome) {
		h.mu.Lock()
		defer h.mu.Unlock()
		h.turned[o]++
	})
	h.server = &http.Server{Handler: http.HandlerFunc(h.answer), ReadHeaderTimeout: time.Hour, WriteTimeout: time.Minute, MaxHeaderBytes: 1}
	for _, f := range change {
		f(h.server)
	}
	h.door.Prepare(h.server)
	served := make(chan struct{})
	go func() {
		defer close(served)
		_ = h.server.Serve(h.door)
	}()
	t.Cleanup(func() {
		h.server.Close()
		<-served
		h.settle()
		require.Zero(t, h.door.Open())
		require.Zero(t, h.door.strangers.Taken())
		require.Zero(t, h.door.slack.Taken())
	})
	return h
}

func buildOnLoopback(t *testing.T, secure *tls.Config, limits Limits, change ...func(*http.Server)) *house {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	return build(t, l, secure, limits, change...)
}

// buildInMemory is for the inside of a bubble.
func buildInMemory(t *testing.T, secure *tls.Config, limits Limits, change ...func(*http.Server)) *house {
	t.Helper()
	network := gatewaytest.NewNetwork()
	l, err := network.Listen("gateway")
	require.NoError(t, err)
	h := build(t, l, secure, limits, change...)
	h.dial = func() (net.Conn, error) { return network.Dial(context.Background(), "tcp", "gateway") }
	h.settle = func() {
		synctest.Wait()
		h.goodbye()
	}
	return h
}

// hold has requests wait until the function that it returns is called.
func (h *house) hold() (goOn func()) {
	c := make(chan struct{})
	h.mayGoOn.Store(&c)
	return func() { close(c) }
}

// goodbye ends the connections of those that nobody has taken from letIn.
func (h *house) goodbye() {
	for len(h.letIn) > 0 {
		(<-h.letIn).Close()
	}
}

func (h *house) answer(w http.ResponseWriter, r *http.Request) {
	if refusal := NewRules(nil).Check(r); refusal != nil {
		h.turn(refusal.Outcome)
		refusal.Answer(w, r)
		return
	}
	mayGoOn := h.mayGoOn.Load()
	if mayGoOn != nil {
		h.waiting.Store(strangerOf(r))
	}
	h.begun.Add(1)
	if mayGoOn != nil {
		select {
		case <-*mayGoOn:
		case <-r.Context().Done():
			h.hungUp.Add(1)
			return
		}
	}
	h.tls.Store(r.TLS)
	conn, err := Upgrade(w, r)
	if err != nil {
		h.failed <- err
		return
	}
	h.letIn <- conn
}

func (h *house) turn(o telemetry.Outcome) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.turned[o]++
}

func (h *house) wantTurned(o telemetry.Outcome, n int) {
	h.t.Helper()
	require.Eventually(h.t, func() bool {
		h.mu.Lock()
		defer h.mu.Unlock()
		return h.turned[o] >= n
	}, 10*time.Second, time.Millisecond)
	h.mu.Lock()
	defer h.mu.Unlock()
	require.Equal(h.t, map[telemetry.Outcome]int{o: n}, h.turned)
}

// wantLog waits until level says text, and returns its fields.
func (h *house) wantLog(level zapcore.Level, text string) map[string]any {
	h.t.Helper()
	var found map[string]any
	require.Eventually(h.t, func() bool {
		for _, entry := range h.logs.All() {
			if entry.Level == level && strings.Contains(entry.Message, text) {
				found = entry.ContextMap()
			}
		}
		return found != nil
	}, 10*time.Second, time.Millisecond, text)
	return found
}

// visitor is a peer of the door.
type visitor struct {
	net.Conn
	t  *testing.T
	in *bufio.Reader
}

func (h *house) knock() *visitor {
	h.t.Helper()
	conn, err := h.dial()
	require.NoError(h.t, err)
	h.t.Cleanup(func() { conn.Close() })
	return &visitor{conn, h.t, bufio.NewReader(conn)}
}

func (h *house) knockTLS(config *tls.Config) *visitor {
	h.t.Helper()
	v := h.knock()
	v.Conn = tls.Client(v.Conn, config)
	v.in = bufio.NewReader(v.Conn)
	return v
}

func (v *visitor) say(text string) *visitor {
	v.t.Helper()
	_, err := io.WriteString(v, text)
	require.NoError(v.t, err)
	return v
}

// wantAnswer reads one answer, and returns it with its text.
func (v *visitor) wantAnswer(status int) (*http.Response, string) {
	v.t.Helper()
	require.NoError(v.t, v.SetReadDeadline(time.Now().Add(time.Minute)))
	resp, err := http.ReadResponse(v.in, nil)
	require.NoError(v.t, err)
	text := ""
	if status != http.StatusSwitchingProtocols {
		b, err := io.ReadAll(resp.Body)
		require.NoError(v.t, err)
		text = string(b)
	}
	resp.Body.Close()
	require.NoError(v.t, v.SetReadDeadline(time.Time{}))
	require.Equal(v.t, status, resp.StatusCode, text)
	return resp, text
}

// wantRefused wants an answer that is the last.
func (v *visitor) wantRefused(status int) (*http.Response, string) {
	v.t.Helper()
	resp, text := v.wantAnswer(status)
	require.True(v.t, resp.Close)
	v.wantClosed()
	return resp, text
}

// wantClosed wants an end, after everything that was said.
func (v *visitor) wantClosed() {
	v.t.Helper()
	require.NoError(v.t, v.SetReadDeadline(time.Now().Add(time.Minute)))
	rest, err := io.ReadAll(v.in)
	require.NoError(v.t, err)
	require.Empty(v.t, rest)
}

// upgrade is a good request, with so many headers more.
func upgrade(headers ...string) string {
	return "GET /v1/opamp HTTP/1.1\r\n" + strings.Join(append(upgradeHeaders(), headers...), "\r\n") + "\r\n\r\n"
}

func upgradeHeaders() []string {
	return []string{
		"Host: gateway", "Connection: Upgrade", "Upgrade: websocket",
		"Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
	}
}

// certificates are one for the door, and the configuration of those that trust it.
func certificates(t testing.TB) (secure, trusting *tls.Config) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "gateway"}, DNSNames: []string{"gateway"},
		NotBefore: time.Unix(0, 0), NotAfter: time.Date(2100, 1, 1, 0, 0, 0, 0, time.UTC), // it may be 2000 in a bubble
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	require.NoError(t, err)
	cert, err := x509.ParseCertificate(der)
	require.NoError(t, err)
	pool := x509.NewCertPool()
	pool.AddCert(cert)
	pair := tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
	return &tls.Config{Certificates: []tls.Certificate{pair}, ClientCAs: pool},
		&tls.Config{Certificates: []tls.Certificate{pair}, RootCAs: pool, ServerName: "gateway"}
}

func TestLetIn(t *testing.T) {
	secure, trusting := certificates(t)
	talk := func(t *testing.T, h *house, v *visitor) net.Conn {
		t.Helper()
		resp, _ := v.say(upgrade()).wantAnswer(http.StatusSwitchingProtocols)
		require.Equal(t, "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=", resp.Header.Get("Sec-Websocket-Accept")) // RFC 6455, section 1.3
		require.Equal(t, "websocket", resp.Header.Get("Upgrade"))
		require.Equal(t, "Upgrade", resp.Header.Get("Connection"))
		conn := <-h.letIn
		require.Equal(t, 1, h.door.Open())
		require.Zero(t, h.door.strangers.Taken())
		for _, pair := range [][2]net.Conn{{v, conn}, {conn, v}} {
			_, err := pair[0].Write([]byte("hello"))
			require.NoError(t, err)
			b := make([]byte, 5)
			_, err = io.ReadFull(pair[1], b)
			require.NoError(t, err)
			require.Equal(t, "hello", string(b))
		}
		require.NotPanics(t, func() {
			socket.New(conn, socket.InputOf(conn), false, 1, time.Minute, nil).Close()
		})
		require.Error(t, conn.Close(), "it is closed already")
		require.Zero(t, h.door.Open(), "counted once")
		return conn
	}
	t.Run("plain", func(t *testing.T) {
		h := buildOnLoopback(t, nil, usual)
		require.IsType(t, &socket.Conn{}, talk(t, h, h.knock()))
		require.Nil(t, h.tls.Load())
	})
	t.Run("TLS", func(t *testing.T) {
		h := buildOnLoopback(t, secure, usual)
		talk(t, h, h.knockTLS(trusting))
		require.True(t, h.tls.Load().HandshakeComplete, "the request knows of TLS")
	})
	t.Run("mutual TLS, whose authorities are read for each client", func(t *testing.T) {
		each := secure.Clone()
		each.ClientAuth = tls.RequireAndVerifyClientCert
		h := buildOnLoopback(t, &tls.Config{GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) { return each, nil }}, usual)
		offer := trusting.Clone()
		offer.NextProtos = []string{"h2", "http/1.1"}
		talk(t, h, h.knockTLS(offer))
		require.Len(t, h.tls.Load().PeerCertificates, 1)
		require.Equal(t, "http/1.1", h.tls.Load().NegotiatedProtocol)
	})
	t.Run("in pieces", func(t *testing.T) {
		h := buildInBubble(t, func(t *testing.T, h *house) {
			v := h.knock()
			for _, b := range []byte(upgrade("X-Long: " + strings.Repeat("x", 5000))) {
				v.say(string(b))
				synctest.Wait()
			}
			v.wantAnswer(http.StatusSwitchingProtocols)
		})
		_ = h
	})
	t.Run("tokens among others, in any case", func(t *testing.T) {
		h := buildOnLoopback(t, nil, usual)
		request := strings.NewReplacer("Connection: Upgrade", "Connection: keep-alive, UPGRADE", "Upgrade: websocket", "Upgrade: WebSocket").Replace(upgrade())
		h.knock().say(request).wantAnswer(http.StatusSwitchingProtocols)
	})
	t.Run("what gorilla's client says", func(t *testing.T) {
		h := buildOnLoopback(t, nil, usual)
		ws, _, err := websocket.DefaultDialer.Dial("ws://"+h.door.Addr().String(), nil)
		require.NoError(t, err)
		ws.Close()
	})
}

// buildInBubble runs a story in fake time, over a network in memory.
func buildInBubble(t *testing.T, story func(*testing.T, *house)) *house {
	t.Helper()
	var h *house
	synctest.Test(t, func(t *testing.T) {
		h = buildInMemory(t, nil, usual)
		story(t, h)
	})
	return h
}

func TestHeadLimits(t *testing.T) {
	filler := func(lines, size int) []string { // together with upgradeHeaders
		headers := upgradeHeaders()
		for i := len(headers); i < lines; i++ {
			headers = append(headers, fmt.Sprintf("X-%d: y", i))
		}
		if missing := size - len(strings.Join(headers, "\r\n")+"\r\n"); missing > 0 {
			headers[lines-1] += strings.Repeat("y", missing)
		}
		return headers
	}
	request := func(line int, headers []string) string {
		return "GET /" + strings.Repeat("x", line-len("GET / HTTP/1.1\r\n")) + " HTTP/1.1\r\n" + strings.Join(headers, "\r\n") + "\r\n\r\n"
	}
	for _, test := range []struct {
		name    string
		request string
		status  int
		says    string
	}{
		{"100 headers", request(20, filler(100, 0)), 101, ""},
		{"101 headers", request(20, filler(101, 0)), 431, "agents::max_request_headers"},
		{"16 KiB", request(20, filler(100, 16384)), 101, ""},
		{"16 KiB in one header", request(20, filler(6, 16384)), 101, ""},
		{"16 KiB and a byte", request(20, filler(100, 16385)), 431, "agents::max_request_header_size"},
		{"16 KiB and a byte in one header", request(20, filler(6, 16385)), 431, "agents::max_request_header_size"},
		{"all that there may be", request(8192, filler(100, 16384)), 101, ""},
		{"request line of 8 KiB and a byte", request(8193, filler(5, 0)), 414, "request line"},
		{"5,600 tiny headers", request(20, filler(5600, 0)), 431, "agents::max_request_headers"},
		{"endless header", strings.TrimSuffix(request(20, filler(6, 200<<10)), "\r\n\r\n"), 431, "agents::max_request_header_size"},
		{"endless request line", "GET /" + strings.Repeat("x", 100<<10), 414, "request line"},
	} {
		t.Run(test.name, func(t *testing.T) {
			h := buildOnLoopback(t, nil, usual)
			v := h.knock().say(test.request)
			if test.status == 101 {
				v.wantAnswer(101)
				return
			}
			_, text := v.wantRefused(test.status)
			require.Contains(t, text, test.says)
			h.wantTurned(telemetry.OutcomeBadRequest, 1)
			require.EqualValues(t, test.status, h.wantLog(zap.InfoLevel, "refused")["http.response.status_code"])
			require.Zero(t, h.begun.Load())
		})
		t.Run(test.name+", byte by byte", func(t *testing.T) {
			head := head{maxLines: 100, maxSize: 16384}
			v := verdictUnfinished
			for i := 0; i < len(test.request) && v == verdictUnfinished; i++ {
				_, v = head.look([]byte(test.request[i : i+1]))
			}
			require.Equal(t, test.status == 101, v == verdictDone)
			require.Equal(t, test.status == 414, v == verdictLongRequestLine)
		})
	}
}

func TestEarlyData(t *testing.T) {
	secure, trusting := certificates(t)
	for name, config := range map[string]*tls.Config{"plain": nil, "TLS": secure} {
		knock := func(h *house) *visitor {
			if config != nil {
				return h.knockTLS(trusting)
			}
			return h.knock()
		}
		t.Run(name+", with the request", func(t *testing.T) {
			h := buildOnLoopback(t, config, usual)
			_, text := knock(h).say(upgrade() + "\x82\x80mask").wantRefused(http.StatusBadRequest)
			require.Contains(t, text, "before it was answered")
			require.Zero(t, h.begun.Load(), "refused before anybody is asked")
			h.wantTurned(telemetry.OutcomeBadRequest, 1)
		})
		t.Run(name+", none of it in the buffer of the request", func(t *testing.T) {
			h := buildOnLoopback(t, config, usual)
			v := knock(h).say(upgrade("X: "+strings.Repeat("x", 4096-len(upgrade("X: ")))) + strings.Repeat("\x82", 10_000))
			resp, err := http.ReadResponse(v.in, nil)
			require.NoError(t, err)
			resp.Body.Close()
			if resp.StatusCode == http.StatusSwitchingProtocols { // nobody had seen it: so it is not early, nor lost
				conn := <-h.letIn
				defer conn.Close()
				_, err := io.ReadFull(conn, make([]byte, 10_000))
				require.NoError(t, err)
			}
		})
		t.Run(name+", while the server is asked", func(t *testing.T) {
			h := buildOnLoopback(t, config, usual)
			goOn := h.hold()
			v := knock(h).say(upgrade())
			require.Eventually(t, func() bool { return h.begun.Load() == 1 }, 10*time.Second, time.Millisecond)
			v.say(strings.Repeat("\x82", 100_000))
			require.Eventually(t, func() bool { return h.waiting.Load().early.Load() }, 10*time.Second, time.Millisecond)
			goOn()
			v.wantRefused(http.StatusBadRequest)
			require.ErrorIs(t, <-h.failed, ErrEarlyData)
		})
	}
}

func TestCheck(t *testing.T) {
	with := func(change ...string) http.Header { // pairs
		header := http.Header{}
		for _, line := range upgradeHeaders()[1:] {
			name, value, _ := strings.Cut(line, ": ")
			header.Set(name, value)
		}
		for i := 0; i < len(change); i += 2 {
			if header.Del(change[i]); change[i+1] != "" {
				header.Set(change[i], change[i+1])
			}
		}
		return header
	}
	post := func(change ...string) http.Request {
		header := http.Header{"Content-Type": {"application/x-protobuf"}}
		for i := 0; i < len(change); i += 2 {
			header.Set(change[i], change[i+1])
		}
		return http.Request{Method: http.MethodPost, Header: header, ContentLength: 1}
	}
	twice := with()
	twice.Add("Sec-Websocket-Key", "dGhlIHNhbXBsZSBub25jZQ==")
	rules := NewRules([]string{"https://Console.example", "http://*.example:8080"})
	for _, test := range []struct {
		name    string
		request http.Request
		rules   *Rules
		status  int // 0 if it is good
		text    string
	}{
		{"good", http.Request{Header: with()}, rules, 0, ""},
		{"body", http.Request{Header: with(), ContentLength: 1}, rules, 400, "body"},
		{"body of unknown length", http.Request{Header: with(), ContentLength: -1, TransferEncoding: []string{"chunked"}}, rules, 400, "body"},
		{"body and everything else wrong", http.Request{Header: http.Header{"Origin": {"x"}}, ContentLength: 1}, rules, 400, "body"},
		{"PUT", http.Request{Method: http.MethodPut, Header: with(), ContentLength: 1}, rules, 405, "by WebSocket, or POST"},
		{"OPTIONS", http.Request{Method: http.MethodOptions, Header: with()}, rules, 405, "by WebSocket, or POST"},
		{"poll", post(), rules, 0, ""},
		{"poll of unknown length", http.Request{Method: http.MethodPost, Header: post().Header, ContentLength: -1, TransferEncoding: []string{"chunked"}}, rules, 0, ""},
		{"poll with a parameter", post("Content-Type", "Application/X-Protobuf; charset=x"), rules, 0, ""},
		{"poll in gzip", post("Content-Encoding", "GZIP"), rules, 0, ""},
		{"poll as it is", post("Content-Encoding", "identity"), rules, 0, ""},
		{"poll from a page that may", post("Origin", "https://console.example"), rules, 0, ""},
		{"poll from a page that may not", post("Origin", "https://evil.example"), rules, 403, "allowed_origins"},
		{"POST of nothing that is OpAMP", http.Request{Method: http.MethodPost, Header: with(), ContentLength: 1}, rules, 415, "application/x-protobuf"},
		{"POST of JSON", post("Content-Type", "application/json"), rules, 415, "application/x-protobuf"},
		{"poll in another encoding", post("Content-Encoding", "zstd"), rules, 415, "gzip"},
		{"poll in two encodings", post("Content-Encoding", "gzip, gzip"), rules, 415, "gzip"},
		{"empty poll", http.Request{Method: http.MethodPost, Header: post().Header}, rules, 400, "empty"},
		{"HEAD", http.Request{Method: http.MethodHead, Header: with()}, rules, 426, "by WebSocket"},
		{"no upgrade", http.Request{Header: with("Upgrade", "")}, rules, 426, "by WebSocket"},
		{"another upgrade", http.Request{Header: with("Upgrade", "h2c")}, rules, 426, "by WebSocket"},
		{"upgrade of nothing", http.Request{Header: with("Connection", "keep-alive")}, rules, 426, "by WebSocket"},
		{"no upgrade, old version", http.Request{Header: with("Upgrade", "", "Sec-Websocket-Version", "8")}, rules, 426, "by WebSocket"},
		{"lists", http.Request{Header: with("Connection", "keep-alive , upgrade", "Upgrade", "h2c,WEBSOCKET")}, rules, 0, ""},
		{"HTTP/1.0", http.Request{ProtoMajor: 1, Header: with()}, rules, 426, "by WebSocket"},
		{"old version", http.Request{Header: with("Sec-Websocket-Version", "8")}, rules, 400, "version 13"},
		{"old version and key", http.Request{Header: with("Sec-Websocket-Version", "8", "Sec-Websocket-Key", "")}, rules, 400, "version 13"},
		{"no key", http.Request{Header: with("Sec-Websocket-Key", "")}, rules, 400, "Key"},
		{"short key", http.Request{Header: with("Sec-Websocket-Key", "dGhlIHNhbXBsZSBub25j")}, rules, 400, "Key"},
		{"long key", http.Request{Header: with("Sec-Websocket-Key", "dGhlIHNhbXBsZSBub25jZSEh")}, rules, 400, "Key"},
		{"key that is none", http.Request{Header: with("Sec-Websocket-Key", "!!!!!!!!!!!!!!!!!!!!!!==")}, rules, 400, "Key"},
		{"two keys", http.Request{Header: twice}, rules, 400, "Key"},
		{"bad key and origin", http.Request{Header: with("Sec-Websocket-Key", "x", "Origin", "http://evil.example")}, rules, 400, "Key"},
		{"foreign origin", http.Request{Header: with("Origin", "http://evil.example")}, rules, 403, "listener::cors::allowed_origins"},
		{"origin of the host", http.Request{Host: "rebound.example", Header: with("Origin", "http://rebound.example")}, rules, 403, "listener::cors::allowed_origins"},
		{"null origin", http.Request{Header: with("Origin", "null")}, rules, 403, "listener::cors::allowed_origins"},
		{"any origin where none is allowed", http.Request{Header: with("Origin", "https://console.example")}, NewRules(nil), 403, "listener::cors::allowed_origins"},
		{"allowed origin", http.Request{Header: with("Origin", "https://console.EXAMPLE")}, rules, 0, ""},
		{"allowed origin by another scheme", http.Request{Header: with("Origin", "http://console.example")}, rules, 403, "allowed_origins"},
		{"origin of a pattern", http.Request{Header: with("Origin", "http://a.b.example:8080")}, rules, 0, ""},
		{"origin that is shorter than its pattern", http.Request{Header: with("Origin", "http://.example:808")}, rules, 403, "allowed_origins"},
		{"one good and one bad origin", http.Request{Header: func() http.Header {
			h := with("Origin", "https://console.example")
			h.Add("Origin", "http://evil.example")
			return h
		}()}, rules, 403, "allowed_origins"},
		{"any origin", http.Request{Header: with("Origin", "null")}, NewRules([]string{"https://console.example", "*"}), 0, ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			r := &test.request
			if r.Method == "" {
				r.Method = http.MethodGet
			}
			if r.ProtoMajor == 0 {
				r.ProtoMajor, r.ProtoMinor = 1, 1
			}
			refusal := test.rules.Check(r)
			if test.status == 0 {
				require.Nil(t, refusal)
				return
			}
			require.NotNil(t, refusal)
			require.Equal(t, test.status, refusal.Status)
			require.Contains(t, refusal.Text, test.text)
			require.Equal(t, telemetry.OutcomeBadRequest, refusal.Outcome)
			switch {
			case test.status == 426:
				require.Equal(t, http.Header{"Upgrade": {"websocket"}, "Connection": {"Upgrade"}}, refusal.Header)
			case test.text == "version 13":
				require.Equal(t, http.Header{"Sec-Websocket-Version": {"13"}}, refusal.Header)
			}
		})
	}
}

// TestBody has requests announce a body that never comes, or comes without end.
func TestBody(t *testing.T) {
	for request, status := range map[string]int{
		"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n":                                  http.StatusUnsupportedMediaType,
		"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 20971520\r\nContent-Encoding: snappy\r\n\r\n": http.StatusUnsupportedMediaType,
		"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n":                           http.StatusUnsupportedMediaType,
		"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\nExpect: 100-continue\r\n\r\n":          http.StatusUnsupportedMediaType,
		"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n\x10\x01":                            http.StatusUnsupportedMediaType,
		"PUT / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n\x10\x01":                             http.StatusMethodNotAllowed,
		strings.TrimSuffix(upgrade(), "\r\n") + "Content-Length: 1\r\n\r\n":                          http.StatusBadRequest,
	} {
		buildInBubble(t, func(t *testing.T, h *house) {
			begin := time.Now()
			_, text := h.knock().say(request).wantRefused(status)
			require.Contains(t, text, "POST")
			synctest.Wait()
			require.LessOrEqual(t, time.Since(begin), lingerTimeout)
			require.Zero(t, h.door.strangers.Taken()-h.door.Open())
		})
	}
	// The answer is heard by who goes on sending.
	h := buildOnLoopback(t, nil, usual)
	v := h.knock().say("POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n" + strings.Repeat("x", 100_000))
	v.wantRefused(http.StatusUnsupportedMediaType)
}

// TestOneRequest has any answer be the last, whatever the handler says, and without anybody waiting.
func TestOneRequest(t *testing.T) {
	buildInBubble(t, func(t *testing.T, h *house) {
		_, _ = h.knock().say("GET / HTTP/1.1\r\nHost: x\r\n\r\nGET / HTTP/1.1\r\nHost: x\r\n\r\n").wantRefused(http.StatusUpgradeRequired)
		answer, err := io.ReadAll(h.knock().say("HEAD / HTTP/1.1\r\nHost: x\r\n\r\n").in)
		require.NoError(t, err)
		require.Regexp(t, "(?s)^HTTP/1.1 426 Upgrade Required\r\n.*\r\n\r\n$", string(answer), "it has no text")
		for _, header := range []string{"Connection: Upgrade", "Connection: close", "Upgrade: websocket"} {
			require.Contains(t, string(answer), "\r\n"+header+"\r\n")
		}
		h.wantTurned(telemetry.OutcomeBadRequest, 2)
	})
	for name, handler := range map[string]http.HandlerFunc{
		"text": func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "no", http.StatusForbidden) },
		"keep-alive": func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Connection", "keep-alive")
			w.WriteHeader(http.StatusForbidden)
		},
		"upgrade": func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Connection", "Upgrade")
			w.WriteHeader(http.StatusForbidden)
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				h := buildInMemory(t, nil, usual, func(s *http.Server) {
					s.Handler = handler
					s.SetKeepAlivesEnabled(false) // which would have it take out "Upgrade"
				})
				v := h.knock().say(upgrade())
				resp, _ := v.wantAnswer(http.StatusForbidden)
				require.Equal(t, name == "upgrade", resp.Header.Get("Connection") == "Upgrade")
				require.Equal(t, name == "text", resp.Close)
				synctest.Wait()
				require.Zero(t, h.door.Open(), "nobody waits for another request")
				v.wantClosed()
			})
		})
	}
}

// TestAnswerIsWhole has handlers answer before the server has begun to watch for a hang-up.
func TestAnswerIsWhole(t *testing.T) {
	text := strings.Repeat("no\n", 10_000)
	h := buildOnLoopback(t, nil, usual, func(s *http.Server) {
		s.Handler = http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(http.StatusForbidden)
			for _, line := range strings.SplitAfter(text, "\n") {
				_, _ = io.WriteString(w, line)
			}
		})
	})
	for range 200 {
		_, got := h.knock().say(upgrade()).wantRefused(http.StatusForbidden)
		require.Len(t, got, len(text))
	}
}

func TestTooManyConnections(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		limits := usual
		limits.Connections = 10
		h := buildInMemory(t, nil, limits)
		for range 10 {
			h.knock().say(upgrade()).wantAnswer(http.StatusSwitchingProtocols)
			synctest.Wait() // who has read that may be faster than the door, for which it is a stranger still
		}
		require.Equal(t, 10, h.door.Open())
		resp, text := h.knock().say(upgrade()).wantRefused(http.StatusServiceUnavailable)
		require.Contains(t, text, "agents::max_connections")
		require.Regexp(t, "^([345][0-9]|60)$", resp.Header.Get("Retry-After"))
		h.wantTurned(telemetry.OutcomeTooMany, 1)
		h.wantLog(zap.WarnLevel, "agents::max_connections")

		// Those that are too many have their own bound.
		for range 32 {
			h.knock() // and say nothing; each from an address of its own, or one would get only half
		}
		synctest.Wait()
		require.Equal(t, 42, h.door.Open())
		h.knock().wantClosed()
		h.wantTurned(telemetry.OutcomeTooMany, 2)
		require.Equal(t, 42, h.door.Open())

		// An agent that leaves makes room for another.
		time.Sleep(time.Minute)
		synctest.Wait()
		require.Equal(t, 10, h.door.Open())
		(<-h.letIn).Close()
		h.knock().say(upgrade()).wantAnswer(http.StatusSwitchingProtocols)
	})
}

// TestTooManyStrangers has one address take all that it can get.
func TestTooManyStrangers(t *testing.T) {
	limits := usual
	limits.Strangers = 20
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	h := build(t, l, nil, limits)
	goOn := h.hold()
	var waiting []*visitor
	for range 10 { // mallory's
		waiting = append(waiting, h.knock().say(upgrade()))
	}
	require.Eventually(t, func() bool { return h.begun.Load() == 10 }, 10*time.Second, time.Millisecond)
	_, text := h.knock().say(upgrade()).wantRefused(http.StatusServiceUnavailable)
	require.Equal(t, tooManyStrangers+"\n", text)
	h.wantTurned(telemetry.OutcomeTooMany, 1)

	h.dial = func() (net.Conn, error) { // loopback is a whole network
		return (&net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 2)}}).Dial("tcp", l.Addr().String())
	}
	alice, err := h.dial()
	if err == nil { // not everywhere
		defer alice.Close()
		v := &visitor{alice, t, bufio.NewReader(alice)}
		waiting = append(waiting, v.say(upgrade()))
		require.Eventually(t, func() bool { return h.begun.Load() == 11 }, 10*time.Second, time.Millisecond)
	}
	goOn()
	for _, v := range waiting {
		v.wantAnswer(http.StatusSwitchingProtocols)
	}
}

// TestStrangersLeaveConnectionsToOthers has one address take all the connections that it can get.
func TestStrangersLeaveConnectionsToOthers(t *testing.T) {
	limits := usual
	limits.Connections, limits.Strangers = 90, 1000
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	h := build(t, l, nil, limits)
	goOn := h.hold()
	var waiting []*visitor
	for range 80 { // mallory's
		waiting = append(waiting, h.knock().say(upgrade()))
	}
	require.Eventually(t, func() bool { return h.begun.Load() == 80 }, 10*time.Second, time.Millisecond)
	h.knock().say(upgrade()).wantRefused(http.StatusServiceUnavailable)

	alice, err := (&net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 2)}}).Dial("tcp", l.Addr().String())
	if err == nil { // not everywhere
		defer alice.Close()
		v := &visitor{alice, t, bufio.NewReader(alice)}
		waiting = append(waiting, v.say(upgrade()))
		require.Eventually(t, func() bool { return h.begun.Load() == 81 }, 10*time.Second, time.Millisecond)
	}
	goOn()
	for _, v := range waiting {
		v.wantAnswer(http.StatusSwitchingProtocols)
	}
}

// TestPlaces has connections come and go in every way at once.
func TestPlaces(t *testing.T) {
	limits := usual
	limits.Connections, limits.Strangers = 40, 30
	h := buildOnLoopback(t, nil, limits)
	var visitors sync.WaitGroup
	for i := range 200 {
		visitors.Go(func() {
			conn, err := h.dial()
			if err != nil {
				return
			}
			defer conn.Close()
			switch i % 5 {
			case 0:
			case 1:
				_, _ = io.WriteString(conn, "GET /")
				_ = conn.(*net.TCPConn).SetLinger(0)
			case 2:
				_, _ = io.WriteString(conn, upgrade())
			case 3:
				_, _ = io.WriteString(conn, upgrade()+"early")
			case 4:
				_, _ = io.WriteString(conn, upgrade())
				_, _ = conn.Read(make([]byte, 1))
			}
		})
	}
	for range 50 {
		select {
		case conn := <-h.letIn:
			visitors.Go(func() { conn.Close() })
			conn.Close()
		default:
			runtime.Gosched()
		}
	}
	visitors.Wait()
	// build's cleanup sees that nothing is left, nor less than that
}

// TestDeadlines has strangers take their time.
func TestDeadlines(t *testing.T) {
	secure, trusting := certificates(t)
	for _, test := range []struct {
		name   string
		secure *tls.Config
		says   string // at once
		drips  string // a byte of it at a time, over and over
		status int    // 0 for no answer
	}{
		{"silent", nil, "", "", 0},
		{"silent on TLS", secure, "", "", 0},
		{"half a head", nil, "GET / HTTP/1.1\r\nHost: x\r\nX-A: ", "", 408},
		{"dripping head", nil, "GET / HTTP/1.1\r\nHost: x\r\nX-A: ", "x", 408},
		{"dripping request line", nil, "", "GET /", 408},
		{"dripping headers", nil, "GET / HTTP/1.1\r\n", "X: y\r\n", 408},
		{"half a ClientHello", secure, "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", "", 0},
		{"dripping ClientHello", secure, "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", "\x00", 0},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				h := buildInMemory(t, test.secure, usual)
				v := h.knock().say(test.says)
				begin := time.Now()
				var dripping sync.WaitGroup
				dripping.Go(func() {
					for i := 0; test.drips != ""; i++ {
						time.Sleep(700 * time.Millisecond) // none at the end, or the answer is lost
						if _, err := v.Write([]byte{test.drips[i%len(test.drips)]}); err != nil {
							return
						}
					}
				})
				if test.status != 0 {
					v.wantAnswer(test.status)
				} else {
					v.wantClosed()
				}
				require.Equal(t, usual.Timeout, time.Since(begin))
				v.Close()
				dripping.Wait()
				synctest.Wait()
				require.Zero(t, h.door.Open())
				if test.name == "silent" || test.name == "silent on TLS" {
					require.Empty(t, h.turned)
					require.Empty(t, h.logs.FilterLevelExact(zap.InfoLevel).All())
					require.Empty(t, h.logs.FilterLevelExact(zap.WarnLevel).All())
				} else {
					h.wantTurned(telemetry.OutcomeBadRequest, 1)
				}
			})
		})
	}
	t.Run("a server with less time", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			h := buildInMemory(t, nil, usual, func(s *http.Server) { s.ReadHeaderTimeout = 5 * time.Second })
			begin := time.Now()
			h.knock().say("GET /").wantAnswer(http.StatusRequestTimeout)
			require.Equal(t, 5*time.Second, time.Since(begin))
		})
	})
	for name, config := range map[string]*tls.Config{"plain": nil, "TLS": secure} {
		t.Run("who was let in has all the time of the world, "+name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				h := buildInMemory(t, config, usual)
				goOn := h.hold()
				v := h.knock()
				if config != nil {
					v.Conn = tls.Client(v.Conn, trusting)
					v.in = bufio.NewReader(v.Conn)
				}
				v.say(upgrade())
				time.Sleep(5 * usual.Timeout) // it takes the server that long to say yes
				require.Zero(t, h.hungUp.Load())
				goOn()
				v.wantAnswer(http.StatusSwitchingProtocols)
				conn := <-h.letIn
				time.Sleep(5 * usual.Timeout)
				_, err := conn.Write([]byte("x"))
				require.NoError(t, err)
				_, err = v.in.ReadByte()
				require.NoError(t, err)
				go func() {
					time.Sleep(5 * usual.Timeout)
					_, _ = v.Write([]byte("x"))
				}()
				_, err = conn.Read(make([]byte, 1))
				require.NoError(t, err)
				conn.Close()
			})
		})
		t.Run("who hangs up is not waited for, "+name, func(t *testing.T) {
			h := buildOnLoopback(t, config, usual)
			defer h.hold()()
			v := h.knock()
			if config != nil {
				v.Conn = tls.Client(v.Conn, trusting)
			}
			v.say(upgrade())
			require.Eventually(t, func() bool { return h.begun.Load() == 1 }, 10*time.Second, time.Millisecond)
			v.Close()
			require.Eventually(t, func() bool { return h.hungUp.Load() == 1 && h.door.Open() == 0 }, 10*time.Second, time.Millisecond)
		})
	}
}

// TLS keeps a message of its handshake until all of it is there: 64 KiB of everybody who never ends one.
func TestLongHandshake(t *testing.T) {
	secure, trusting := certificates(t)
	t.Run("hello without end", func(t *testing.T) {
		h := buildOnLoopback(t, secure, usual)
		part := strings.Repeat("x", 16<<10)
		h.knock().say("\x16\x03\x01\x40\x00" + "\x01\x00\xff\xfc" + part[4:] + "\x16\x03\x01\x40\x00" + part).wantAlert()
		require.Contains(t, h.wantLog(zap.WarnLevel, "TLS handshake failed")["error"], "too long")
		h.wantTurned(telemetry.OutcomeBadRequest, 1)
	})
	t.Run("long hello", func(t *testing.T) {
		h := buildOnLoopback(t, secure, usual)
		offer := trusting.Clone()
		offer.NextProtos = append(slices.Repeat([]string{strings.Repeat("x", 200)}, 60), "http/1.1")
		h.knockTLS(offer).say(upgrade()).wantAnswer(http.StatusSwitchingProtocols)
	})
	t.Run("certificates without end", func(t *testing.T) {
		mutual := secure.Clone()
		mutual.ClientAuth = tls.RequireAndVerifyClientCert
		h := buildOnLoopback(t, mutual, usual)
		offer := trusting.Clone()
		chain := offer.Certificates[0]
		chain.Certificate = slices.Repeat(chain.Certificate, 32<<10/len(chain.Certificate[0]))
		offer.Certificates = []tls.Certificate{chain}
		_ = h.knockTLS(offer).Conn.(*tls.Conn).Handshake() // its end of TLS 1.3 has all it needs before
		require.Contains(t, h.wantLog(zap.WarnLevel, "TLS handshake failed")["error"], "too long")
	})
	t.Run("long chain of certificates", func(t *testing.T) {
		mutual := secure.Clone()
		mutual.ClientAuth = tls.RequireAndVerifyClientCert
		h := buildOnLoopback(t, mutual, usual)
		offer := trusting.Clone()
		chain := offer.Certificates[0]
		chain.Certificate = slices.Repeat(chain.Certificate, 12<<10/len(chain.Certificate[0]))
		offer.Certificates = []tls.Certificate{chain}
		h.knockTLS(offer).say(upgrade()).wantAnswer(http.StatusSwitchingProtocols)
	})
}

// wantAlert wants an end, before which the door may say why in TLS's own way.
func (v *visitor) wantAlert() {
	v.t.Helper()
	require.NoError(v.t, v.SetReadDeadline(time.Now().Add(time.Minute)))
	_, err := io.Copy(io.Discard, v.in)
	require.NoError(v.t, err)
}

func TestWhatIsLogged(t *testing.T) {
	secure, trusting := certificates(t)
	t.Run("plain HTTP to TLS", func(t *testing.T) {
		h := buildOnLoopback(t, secure, usual)
		v := h.knock().say(upgrade())
		begin := time.Now()
		_, text := v.wantRefused(http.StatusBadRequest)
		require.Contains(t, text, "wss://")
		require.Less(t, time.Since(begin), lingerTimeout, "the end is told at once")
		fields := h.wantLog(zap.WarnLevel, "a peer talks plain HTTP to this listener, which has TLS: give the agent a wss:// endpoint")
		require.Equal(t, v.LocalAddr().String(), fmt.Sprintf("%v:%v", fields["client.address"], fields["client.port"]))
		h.wantTurned(telemetry.OutcomeBadRequest, 1)
	})
	t.Run("TLS to plain", func(t *testing.T) {
		h := buildOnLoopback(t, nil, usual)
		v := h.knock().say("\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03")
		v.wantRefused(http.StatusBadRequest)
		fields := h.wantLog(zap.WarnLevel, "a peer talks TLS to this listener, which has none")
		require.Equal(t, v.LocalAddr().String(), fmt.Sprintf("%v:%v", fields["client.address"], fields["client.port"]))
		h.wantTurned(telemetry.OutcomeBadRequest, 1)
	})
	t.Run("HTTP/2", func(t *testing.T) {
		h := buildOnLoopback(t, nil, usual)
		h.knock().say("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00").wantRefused(http.StatusHTTPVersionNotSupported)
		h.wantLog(zap.WarnLevel, "HTTP/2 (OTLP?)")
		h.wantTurned(telemetry.OutcomeBadRequest, 1)
	})
	t.Run("a client that does not trust us", func(t *testing.T) {
		h := buildOnLoopback(t, secure, usual)
		v := h.knockTLS(&tls.Config{ServerName: "gateway", RootCAs: x509.NewCertPool()})
		require.Error(t, v.Conn.(*tls.Conn).Handshake())
		require.Contains(t, h.wantLog(zap.WarnLevel, "TLS handshake failed")["error"], "certificate")
		h.wantTurned(telemetry.OutcomeBadRequest, 1)
	})
	t.Run("a client without a certificate hears why", func(t *testing.T) {
		mutual := secure.Clone()
		mutual.ClientAuth = tls.RequireAndVerifyClientCert
		h := buildOnLoopback(t, mutual, usual)
		v := h.knockTLS(&tls.Config{ServerName: "gateway", RootCAs: trusting.RootCAs}).say(upgrade())
		_, err := v.in.ReadByte()
		require.ErrorContains(t, err, "certificate required")
		h.wantLog(zap.WarnLevel, "TLS handshake failed")
	})
	t.Run("a client of HTTP/2 alone", func(t *testing.T) {
		h := buildOnLoopback(t, secure, usual)
		offer := trusting.Clone()
		offer.NextProtos = []string{"h2"}
		require.Error(t, h.knockTLS(offer).Conn.(*tls.Conn).Handshake())
		require.Contains(t, h.wantLog(zap.WarnLevel, "TLS handshake failed")["error"], "h2")
	})
	for name, config := range map[string]*tls.Config{"plain": nil, "TLS": secure} {
		t.Run("probes of a listener, "+name, func(t *testing.T) {
			h := buildOnLoopback(t, config, usual)
			for i := range 4 {
				v := h.knock()
				if i%2 == 1 {
					require.NoError(t, v.Conn.(*net.TCPConn).SetLinger(0))
				}
				if config != nil && i >= 2 {
					v.say("\x16\x03\x01")
				}
				v.Close()
			}
			require.Eventually(t, func() bool {
				return h.logs.FilterLevelExact(zap.DebugLevel).Len() == 4 && h.door.Open() == 0
			}, 10*time.Second, time.Millisecond)
			require.Equal(t, 4, h.logs.Len(), "nothing above debug: %v", h.logs.All())
			require.Empty(t, h.turned)
		})
	}
}

// TestStrictFIPS starts the test again in a process that may not use SHA-1.
func TestStrictFIPS(t *testing.T) {
	if os.Getenv("DOOR_TEST_FIPS") != "" {
		require.Equal(t, "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=", string(appendAcceptKey(nil, "dGhlIHNhbXBsZSBub25jZQ==")))
		return
	}
	strict := exec.Command(os.Args[0], "-test.run=^TestStrictFIPS$", "-test.v")
	strict.Env = append(os.Environ(), "GODEBUG=fips140=only", "DOOR_TEST_FIPS=1")
	output, err := strict.CombinedOutput()
	require.NoError(t, err, "%s", output)
	require.Contains(t, string(output), "PASS: TestStrictFIPS")
}

func TestCannotUpgrade(t *testing.T) {
	h := buildOnLoopback(t, nil, usual, func(s *http.Server) {
		s.Handler = http.TimeoutHandler(s.Handler, time.Minute, "") // hides the connection
	})
	_, text := h.knock().say(upgrade()).wantRefused(http.StatusInternalServerError)
	require.Contains(t, text, "WebSocket impossible")
	require.ErrorIs(t, <-h.failed, ErrCannotUpgrade)
	_, text = h.knock().say("GET / HTTP/1.1\r\nHost: x\r\n\r\n").wantRefused(http.StatusUpgradeRequired)
	require.Contains(t, text, "by WebSocket")
}

// TestNothingIsKept sees the HTTP server's buffers go while the connection stays.
func TestNothingIsKept(t *testing.T) {
	secure, trusting := certificates(t)
	for name, config := range map[string]*tls.Config{"plain": nil, "TLS": secure} {
		t.Run(name, func(t *testing.T) {
			var kept atomic.Int64
			h := buildOnLoopback(t, config, usual, func(s *http.Server) {
				answer := s.Handler
				s.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					answer.ServeHTTP(watched{w, strangerOf(r), &kept}, r)
				})
			})
			v := h.knock()
			if config != nil {
				v.Conn = tls.Client(v.Conn, trusting)
				v.in = bufio.NewReader(v.Conn)
			}
			v.say(upgrade("X: " + strings.Repeat("x", 10_000))).wantAnswer(http.StatusSwitchingProtocols)
			conn := <-h.letIn
			require.Eventually(t, func() bool {
				runtime.GC()
				return kept.Load() == 0
			}, 10*time.Second, time.Millisecond)
			_, err := conn.Write([]byte("still here"))
			require.NoError(t, err)
			conn.Close()
		})
	}
}

// watched counts what of the HTTP server is left: its buffers, and the stranger.
type watched struct {
	http.ResponseWriter
	stranger *stranger
	kept     *atomic.Int64
}

func (w watched) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	conn, rw, err := w.ResponseWriter.(http.Hijacker).Hijack()
	w.kept.Add(3)
	forget := func(kept *atomic.Int64) { kept.Add(-1) }
	runtime.AddCleanup(rw.Reader, forget, w.kept)
	runtime.AddCleanup(rw.Writer, forget, w.kept)
	runtime.AddCleanup(w.stranger, forget, w.kept)
	return conn, rw, err
}

// TestAtRest measures what strangers take that stop in the middle of a head.
func TestAtRest(t *testing.T) {
	if testing.Short() {
		t.Skip("makes 2,000 connections")
	}
	secure, trusting := certificates(t)
	const strangers = 1000
	tiny := "GET / HTTP/1.1\r\n" + strings.Repeat("X: y\r\n", 99) + "X: y"
	large := "GET / HTTP/1.1\r\nX: " + strings.Repeat("x", 16<<10-10)
	for _, test := range []struct {
		name   string
		says   string
		config *tls.Config
		limit  int // KiB for each
	}{
		{"100 headers", tiny, nil, 32},
		{"16 KiB in one header", large, nil, 48},
		{"100 headers on TLS", tiny, secure, 26},
		{"16 KiB in one header on TLS", large, secure, 64},
	} {
		t.Run(test.name, func(t *testing.T) {
			l, err := net.Listen("tcp", "127.0.0.1:0")
			require.NoError(t, err)
			var said, heard atomic.Int64
			limits := usual
			limits.Timeout = time.Hour
			h := build(t, counting{l, &heard}, test.config, limits)
			before := inUse()
			visitors := make([]*visitor, strangers)
			for i := range visitors {
				visitors[i] = h.knock()
				conn := visitors[i].Conn
				visitors[i].Conn = counted{conn, &said, new(atomic.Int64)}
				if test.config != nil {
					visitors[i].Conn = tls.Client(visitors[i].Conn, trusting)
				}
				visitors[i].say(test.says)
				*visitors[i] = visitor{Conn: conn} // it is not to be measured
			}
			require.Eventually(t, func() bool { return heard.Load() == said.Load() }, 10*time.Second, time.Millisecond)
			require.Equal(t, strangers, h.door.Open())
			after := inUse()
			t.Logf("%.1f KiB for each stranger", float64(after-before)/strangers/1024)
			for _, v := range visitors {
				v.Close()
			}
			require.Eventually(t, func() bool { return h.door.Open() == 0 }, 10*time.Second, time.Millisecond)
			require.Less(t, after-before, strangers*test.limit<<10)
		})
	}
}

// counting is a listener whose connections count what is read.
type counting struct {
	net.Listener
	heard *atomic.Int64
}

func (l counting) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	return counted{conn, new(atomic.Int64), l.heard}, err
}

// counted counts what is written to a connection, and read.
type counted struct {
	net.Conn
	said, heard *atomic.Int64
}

func (c counted) Write(b []byte) (int, error) {
	n, err := c.Conn.Write(b)
	c.said.Add(int64(n))
	return n, err
}

func (c counted) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	c.heard.Add(int64(n))
	return n, err
}

// inUse returns the bytes of memory that heap and stacks take.
func inUse() int {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int(m.HeapInuse + m.StackInuse)
}

func TestCloseInterruptsAccept(t *testing.T) {
	h := buildOnLoopback(t, nil, usual)
	h.knock().say(upgrade()).wantAnswer(http.StatusSwitchingProtocols)
	agent := <-h.letIn
	defer agent.Close()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	door := New(l, nil, usual, zap.NewNop(), func(telemetry.Outcome) {})
	ended := make(chan error, 1)
	go func() {
		_, err := door.Accept()
		ended <- err
	}()
	require.NoError(t, door.Close())
	require.ErrorIs(t, <-ended, net.ErrClosed)

	h.door.Vacate()
	require.Error(t, h.door.Close(), "which it is already")
	_, err = agent.Write([]byte("x"))
	require.NoError(t, err, "connections are left alone")
	require.Equal(t, 1, h.door.Open())
}

func TestDefaultConnections(t *testing.T) {
	for files, want := range map[uint64]int{100: 50, 256: 128, 1024: 768, 4096: 3584, 1 << 20: 875_000, 1 << 63: 875_000} {
		require.Equal(t, want, connectionsFor(files), files)
	}
	require.Positive(t, DefaultConnections())
}

// TestMove takes a door elsewhere while strangers stand before it.
func TestMove(t *testing.T) {
	h := buildOnLoopback(t, nil, usual)
	goOn := h.hold()
	v := h.knock().say(upgrade())
	require.Eventually(t, func() bool { return h.begun.Load() == 1 }, 10*time.Second, time.Millisecond)
	before := h.door.Addr()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	h.door.Move(l)
	require.Equal(t, l.Addr(), h.door.Addr())
	_, err = net.Dial("tcp", before.String())
	require.Error(t, err, "the address is free")
	goOn()
	v.wantAnswer(http.StatusSwitchingProtocols)
	h.dial = func() (net.Conn, error) { return net.Dial("tcp", l.Addr().String()) }
	h.knock().say(upgrade()).wantAnswer(http.StatusSwitchingProtocols)

	h.door.Vacate()
	require.True(t, h.door.Vacant())
	again, err := net.Listen("tcp", l.Addr().String())
	require.NoError(t, err, "the address is free")
	h.door.Move(again)
	require.False(t, h.door.Vacant())
	h.knock().say(upgrade()).wantAnswer(http.StatusSwitchingProtocols)

	fewer := usual
	fewer.Headers = 1
	h.door.Change(nil, fewer)
	h.knock().say(upgrade()).wantRefused(http.StatusRequestHeaderFieldsTooLarge)
}

// TestChangeOfCertificate has those who come from then on see another one.
func TestChangeOfCertificate(t *testing.T) {
	first, trusting := certificates(t)
	second, _ := certificates(t)
	h := buildOnLoopback(t, first, usual)
	h.knockTLS(trusting).say(upgrade()).wantAnswer(http.StatusSwitchingProtocols)
	h.door.Change(second, usual)
	v := h.knockTLS(trusting)
	require.Error(t, v.Conn.(*tls.Conn).Handshake(), "it is of another authority")
}
