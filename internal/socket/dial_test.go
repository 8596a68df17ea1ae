package socket

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/fips140"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"strings"
	"testing"
	"testing/synctest"
	"time"
	"unicode/utf8"

	"github.com/gorilla/websocket"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/opampgateway/opampgateway/internal/outbox"
)

func parseURL(tb testing.TB, text string) *url.URL {
	tb.Helper()
	u, err := url.Parse(text)
	require.NoError(tb, err)
	return u
}

// scripted returns a Dialer whose server reads a request, answers with this, and then reads on to the
// end; with hangUp it ends itself.
func scripted(tb testing.TB, answer string, hangUp bool) *Dialer {
	tb.Helper()
	near, far := memPipe(1 << 20)
	tb.Cleanup(func() {
		near.Close()
		far.Close()
	})
	go func() {
		buffer := make([]byte, 64<<10)
		_, _ = far.Read(buffer)
		_, _ = far.Write([]byte(answer))
		if hangUp {
			far.out.close(writing)
		}
	}()
	return &Dialer{
		NetDial:        func(context.Context, string, string) (net.Conn, error) { return near, nil },
		ReadBufferSize: 4 << 10,
	}
}

// dialed is what came of a dial that was refused.
func dialed(tb testing.TB, d *Dialer, endpoint string, headers http.Header) error {
	tb.Helper()
	ctx, cancel := context.WithTimeout(tb.Context(), 5*time.Second)
	defer cancel()
	conn, in, _, err := d.Dial(ctx, parseURL(tb, endpoint), headers)
	require.Error(tb, err)
	require.Nil(tb, conn)
	require.Nil(tb, in)
	return err
}

// What a server says together with its answer is not lost, whatever its pieces.
func TestWhatFollowsTheAnswerIsRead(t *testing.T) {
	certificate := selfSigned(t)
	for _, scheme := range []string{"ws", "wss"} {
		for _, piece := range []int{1, 7, 1 << 20} {
			t.Run(fmt.Sprint(scheme, piece), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					near, far := memPipe(1 << 20)
					far.inPieces(piece)
					go func() {
						var conn net.Conn = far
						if scheme == "wss" {
							conn = tls.Server(far, &tls.Config{Certificates: []tls.Certificate{certificate}})
						}
						request, err := http.ReadRequest(bufio.NewReader(conn))
						if err != nil {
							return
						}
						answer := "HTTP/1.1 101 Switching Protocols\r\nupgrade: WebSocket\r\nConnection: keep-alive, Upgrade\r\n" +
							"Sec-WebSocket-Accept: " + acceptKey(request.Header.Get("Sec-WebSocket-Key")) + "\r\n\r\n"
						early := appendHeader([]byte(answer), 0x2, 5, false, [4]byte{})
						early = appendHeader(append(early, "early"...), 0x2, 10_000, false, [4]byte{})
						_, _ = conn.Write(append(early, payload(1, 10_000)...))
					}()
					d := &Dialer{
						NetDial:        func(context.Context, string, string) (net.Conn, error) { return near, nil },
						TLS:            &tls.Config{InsecureSkipVerify: true},
						ReadBufferSize: 4 << 10,
					}
					ctx, cancel := context.WithTimeout(t.Context(), time.Second)
					conn, in, _, err := d.Dial(ctx, parseURL(t, scheme+"://server/v1/opamp?key=secret"), http.Header{"Authorization": {"x"}})
					require.NoError(t, err)
					cancel() // it was for the handshake
					synctest.Wait()
					s := New(conn, in, true, unlimited, writeTimeout, &counted{})
					message, err := s.Read()
					require.NoError(t, err)
					assert.Equal(t, "early", string(message))
					message, err = s.Read()
					require.NoError(t, err)
					assert.True(t, bytes.Equal(payload(1, 10_000), message))
					_, err = WriteBatch(s, []entry{{Kind: outbox.Message, Frame: []byte("hello")}})
					require.NoError(t, err)
					s.Close()
					far.Close()
				})
			})
		}
	}
}

// acceptKey is what a server answers to a key, as gorilla has it.
func acceptKey(key string) string {
	response := httptest.NewRecorder()
	near, far := net.Pipe()
	defer near.Close()
	go func() {
		answer, err := http.ReadResponse(bufio.NewReader(near), nil)
		if err == nil {
			response.Header().Set("Accept", answer.Header.Get("Sec-Websocket-Accept"))
		}
		far.Close()
	}()
	request := httptest.NewRequest(http.MethodGet, "/", nil)
	request.Header = http.Header{
		"Connection": {"Upgrade"}, "Upgrade": {"websocket"}, "Sec-Websocket-Version": {"13"}, "Sec-Websocket-Key": {key},
	}
	_, _ = (&websocket.Upgrader{}).Upgrade(&hijacked{conn: far, in: bufio.NewReader(far)}, request, nil)
	_, _ = io.Copy(io.Discard, far) // until it is read
	return response.Header().Get("Accept")
}

func TestARefusalOfTheServerIsTold(t *testing.T) {
	for name, test := range map[string]struct {
		answer, want string
		check        HandshakeError
	}{
		"a reason": {
			"HTTP/1.1 401 Unauthorized\r\nContent-Length: 28\r\n\r\nkey is unknown\nand much more",
			"server answered 401 Unauthorized: key is unknown",
			HandshakeError{Status: "401 Unauthorized", StatusCode: 401, Reason: "key is unknown"},
		},
		"when to come back": {
			"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 120\r\nContent-Length: 0\r\n\r\n",
			"server answered 503 Service Unavailable",
			HandshakeError{Status: "503 Service Unavailable", StatusCode: 503, RetryAfter: "120"},
		},
		"a choice of places": {
			"HTTP/1.1 300 Multiple Choices\r\nLocation: https://user:hidden@other.example/v1/opamp?key=hidden#hidden\r\nContent-Length: 0\r\n\r\n",
			"server answered 300 Multiple Choices to https://other.example/v1/opamp",
			HandshakeError{Status: "300 Multiple Choices", StatusCode: 300, Location: "https://other.example/v1/opamp"},
		},
		"elsewhere, but nowhere": {
			"HTTP/1.1 302 Found\r\nContent-Length: 0\r\n\r\n",
			"server answered 302 Found",
			HandshakeError{Status: "302 Found", StatusCode: 302},
		},
		"a location that is none": {
			"HTTP/1.1 301 Moved Permanently\r\nLocation: http://user:hidden@[\r\nContent-Length: 0\r\n\r\n",
			"server answered 301 Moved Permanently",
			HandshakeError{Status: "301 Moved Permanently", StatusCode: 301},
		},
		"no words":       {"HTTP/1.1 403\r\nContent-Length: 0\r\n\r\n", "server answered 403 Forbidden", HandshakeError{Status: "403 Forbidden", StatusCode: 403}},
		"own words":      {"HTTP/1.1 444 go away\r\nContent-Length: 0\r\n\r\n", "server answered 444 go away", HandshakeError{Status: "444 go away", StatusCode: 444}},
		"no WebSocket":   {"HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\n\n\n hi \n", "server answered 200 OK: hi", HandshakeError{Status: "200 OK", StatusCode: 200, Reason: "hi"}},
		"another switch": {"HTTP/1.1 101 Switching Protocols\r\nUpgrade: h2c\r\n\r\n", "server answered 101 Switching Protocols, and not as a WebSocket", HandshakeError{Status: "101 Switching Protocols", StatusCode: 101}},
		"goes on":        {"HTTP/1.1 100 Continue\r\n\r\n", "server answered 100 Continue", HandshakeError{Status: "100 Continue", StatusCode: 100}},
		"a page": {
			"HTTP/1.1 400 Bad Request\r\nContent-Type: text/html\r\n\r\n<html>\r\n<head><title>400 The plain HTTP request was sent to HTTPS port</title></head>\r\n<body>\r\n",
			"server answered 400 Bad Request: 400 The plain HTTP request was sent to HTTPS port (it seems to want wss://)",
			HandshakeError{Status: "400 Bad Request", StatusCode: 400, Reason: "400 The plain HTTP request was sent to HTTPS port (it seems to want wss://)"},
		},
		"nothing to print": {
			"HTTP/1.1 403 \x1b[31mred\x00\xff\r\n\r\n\x1b]0;title\x07 a\tb\xff\u202e\u2028c\r\n",
			"server answered 403 [31mred \ufffd: ]0;title a b\ufffd c",
			HandshakeError{Status: "403 [31mred \ufffd", StatusCode: 403, Reason: "]0;title a b\ufffd c"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			err := dialed(t, scripted(t, test.answer, true), "ws://server/", nil)
			require.EqualError(t, err, test.want)
			var answered *HandshakeError
			require.ErrorAs(t, err, &answered)
			assert.NotNil(t, answered.Header)
			answered.Header = nil // tested where it is used
			assert.Equal(t, test.check, *answered)
		})
	}
	err := dialed(t, scripted(t, "HTTP/1.1 403 Forbidden\r\n\r\n"+strings.Repeat("ö", 10_000), true), "ws://server/", nil)
	assert.LessOrEqual(t, len(err.Error()), len("server answered 403 Forbidden: ")+200)
	assert.True(t, utf8.ValidString(err.Error()))
	assert.True(t, strings.HasSuffix(err.Error(), "ö…"), err)
}

// A server, or what somebody has put in its place, may say anything for ever.
func TestAnAnswerIsNotReadWithoutEnd(t *testing.T) {
	much := strings.Repeat("x", 100<<10)
	for name, test := range map[string]struct{ answer, want string }{
		"endless line":     {"HTTP/1.1 101 " + much, "above 64 KiB"},
		"endless header":   {"HTTP/1.1 101 Switching Protocols\r\nX: " + much, "above 64 KiB"},
		"endless headers":  {"HTTP/1.1 101 Switching Protocols\r\n" + strings.Repeat("X: y\r\n", 30_000), "above 64 KiB"},
		"endless chunk":    {"HTTP/1.1 403 Forbidden\r\nTransfer-Encoding: chunked\r\n\r\n1;" + much, "403 Forbidden"},
		"endless body":     {"HTTP/1.1 403 Forbidden\r\n\r\n" + much, "403 Forbidden: x"},
		"endless 1xx":      {strings.Repeat("HTTP/1.1 103 Early Hints\r\n\r\n", 10_000), "103 Early Hints"},
		"endless nonsense": {much, "above 64 KiB"},
		"nothing":          {"", "hung up"},
		"half a line":      {"HTTP/1.", "hung up"},
		"half a header":    {"HTTP/1.1 101 Switching Protocols\r\nUpgr", "hung up"},
		"another protocol": {"SSH-2.0-OpenSSH_9.6\r\n\x00\x01", `not answered in HTTP/1.1: "SSH-2.0-OpenSSH_9.6"`},
		"HTTP/2":           {"\x00\x00\x12\x04\x00\x00\x00\x00\x00\r\n", "not answered in HTTP/1.1"},
		"a bad header":     {"HTTP/1.1 101 Switching Protocols\r\nX Y\x00: z\r\n\r\n", "not answered in HTTP/1.1"},
		"a bad length":     {"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n", "not answered in HTTP/1.1"},
		"TLS":              {"\x15\x03\x01\x00\x02\x02\x46", "speaks TLS: it seems to want wss://"},
	} {
		t.Run(name, func(t *testing.T) {
			err := dialed(t, scripted(t, test.answer, true), "ws://server/", nil)
			require.ErrorContains(t, err, test.want)
			assert.Less(t, len(err.Error()), 300)

			d := scripted(t, test.answer, true)
			_, err = d.dialThrough(t.Context(), parseURL(t, "http://proxy:3128"), "server:80")
			require.Error(t, err)
			assert.Less(t, len(err.Error()), 300)
			assert.Contains(t, err.Error(), "proxy http://proxy:3128")
			if !strings.Contains(test.answer, "101 ") && !strings.Contains(test.answer, "200 ") {
				assert.Contains(t, err.Error(), strings.ReplaceAll(test.want, "wss://", "https://"))
			}
		})
	}
}

// A server that says nothing, or too little, costs the time that there is.
func TestASilentServerIsGivenUp(t *testing.T) {
	for name, answer := range map[string]string{"says nothing": "", "stops in the middle": "HTTP/1.1 101 Sw"} {
		for _, endpoint := range []string{"ws://server/", "wss://server/"} {
			t.Run(name, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					start := time.Now()
					err := dialed(t, scripted(t, answer, false), endpoint, nil)
					if answer != "" && endpoint == "wss://server/" {
						require.ErrorContains(t, err, "does not speak TLS")
						return
					}
					require.ErrorIs(t, err, context.DeadlineExceeded)
					assert.Equal(t, 5*time.Second, time.Since(start))
				})
			})
		}
	}
}

func TestTheTwoKindsOfURLAreToldApart(t *testing.T) {
	plain := httptest.NewServer(http.NotFoundHandler())
	defer plain.Close()
	secure := httptest.NewTLSServer(http.NotFoundHandler())
	defer secure.Close()
	secure.Config.ErrorLog = nil
	d := &Dialer{NetDial: (&net.Dialer{}).DialContext, ReadBufferSize: 4 << 10}

	err := dialed(t, d, "wss://"+plain.Listener.Addr().String(), nil)
	require.EqualError(t, err, "server does not speak TLS: it seems to want ws:// instead of wss://")
	err = dialed(t, d, "ws://"+secure.Listener.Addr().String(), nil)
	require.EqualError(t, err, "server answered 400 Bad Request: Client sent an HTTP request to an HTTPS server. (it seems to want wss://)")
	err = dialed(t, d, "wss://"+secure.Listener.Addr().String(), nil)
	var unknown x509.UnknownAuthorityError
	require.ErrorAs(t, err, &unknown)

	_, err = d.dialThrough(t.Context(), parseURL(t, "https://"+plain.Listener.Addr().String()), "server:80")
	require.ErrorContains(t, err, "does not speak TLS: it seems to want http:// instead of https://")
}

// Errors are logged, and told to whoever asks for the status.
func TestNoErrorTellsASecret(t *testing.T) {
	const endpoint = "ws://server:4320/v1/opamp?token=hidden-token&%6bey=hidden%20key"
	headers := http.Header{
		"Authorization": {"Secret-Key hidden-authorization-of-the-gateway"}, "X-Api-Key": {"hidden-api-key"}, "User-Agent": {"gateway/1.0"},
	}
	wantNothing := func(t *testing.T, err error) {
		t.Helper()
		require.Error(t, err)
		for e := err; e != nil; e = errors.Unwrap(e) {
			assert.NotContains(t, e.Error(), "hidden")
		}
		assert.NotContains(t, fmt.Sprintf("%+v %#v", err, err), "hidden")
	}
	everything := "token=hidden-token hidden%20key hidden+key hidden key Secret-Key hidden-authorization-of-the-gateway hidden-api-key hidden-password"
	for _, secret := range []string{
		everything, "token=hidden-token&%6bey=hidden%20key", "hidden-token", "hidden key", "hidden+key", "hidden-authorization-of-the-gateway",
		"hidden-api-key",
	} {
		for _, answer := range []string{
			"HTTP/1.1 404 " + secret + "\r\n\r\n",
			"HTTP/1.1 404 Not Found\r\n\r\ncannot GET " + secret + "\r\n",
			"HTTP/1.1 404 Not Found\r\n\r\n" + strings.Repeat("x", 190) + secret,
			"HTTP/1.1 307 Temporary Redirect\r\nLocation: https://user:" + url.QueryEscape(secret) + "@other/?" + url.QueryEscape(secret) + "\r\n\r\n",
			"HTTP/1.1 307 Temporary Redirect\r\nLocation: /" + secret + "\r\n\r\n",
			secret,
		} {
			wantNothing(t, dialed(t, scripted(t, answer, true), endpoint, headers))
		}
	}
	err := dialed(t, scripted(t, "HTTP/1.1 401 Unauthorized\r\n\r\nSecret-Key is unknown", true), endpoint, headers)
	require.EqualError(t, err, "server answered 401 Unauthorized: Secret-Key is unknown", "what is no secret is told")
	err = dialed(t, scripted(t, "HTTP/1.1 401 Unauthorized\r\n\r\nno such key: hidden-authorization-of-the-gateway!", true), endpoint, headers)
	require.EqualError(t, err, "server answered 401 Unauthorized: no such key:…")
	wantNothing(t, dialed(t, scripted(t, "HTTP/1.1 404 Not Found\r\n\r\nnot found: /?hidden-token", true), "ws://server/?hidden-token", nil))
	wantNothing(t, dialed(t, scripted(t, "", true), "ws://user:hidden-password@server/", nil))

	through := func(proxy, answer string) error {
		_, err := scripted(t, answer, true).dialThrough(t.Context(), parseURL(t, proxy), "server:80")
		return err
	}
	proxies := []string{"http://hidden-user:hidden-password@proxy:3128/?hidden", "http://hidden-user:hidden%2dpassword@proxy"}
	for _, proxy := range proxies {
		for _, answer := range []string{
			"", "x", "hidden-password", "HTTP/1.1 407 Proxy Authentication Required\r\n\r\nhidden-password is wrong",
			"HTTP/1.1 407 hidden-password\r\n\r\nhidden%2Dpassword is hidden-password",
			"HTTP/1.1 407 \r\n\r\n" + base64.StdEncoding.EncodeToString([]byte("hidden-user:hidden-password")),
		} {
			err := through(proxy, answer)
			wantNothing(t, err)
			assert.NotContains(t, err.Error(), base64.StdEncoding.EncodeToString([]byte("hidden-user:"))[:12])
		}
	}
	for _, proxy := range []string{"https://hidden-user:hidden-password@proxy:3128", "ftp://hidden-user:hidden-password@proxy", "socks5://hidden-user:hidden-password@proxy"} {
		for _, answer := range []string{"", "hidden-password", "\x05\x02", "\x05\x02\x01\x01", "\x05\xff", "\x05\x00\x05\x01hidden"} {
			wantNothing(t, through(proxy, answer))
		}
	}
	refusing := &Dialer{NetDial: func(_ context.Context, _, address string) (net.Conn, error) {
		return nil, fmt.Errorf("dial %s: refused", address)
	}}
	for _, proxy := range append(proxies, "socks5://hidden-user:hidden-password@proxy", "https://hidden-user:hidden-password@proxy") {
		_, err := refusing.dialThrough(t.Context(), parseURL(t, proxy), "server:80")
		wantNothing(t, err)
	}
	wantNothing(t, dialed(t, refusing, endpoint, headers))
	assert.Equal(t, "wss://server:4320", Place(parseURL(t, "wss://server:4320/user:hidden@server/path")))
	assert.Equal(t, "wss://server/path", Place(parseURL(t, "wss://hidden:hidden@server/path?hidden#hidden")))
}

// inChild runs a test by itself, in a process with another environment.
func inChild(t *testing.T, env ...string) (child bool) {
	t.Helper()
	const marker = "SOCKET_TEST_CHILD"
	if os.Getenv(marker) != "" {
		return true
	}
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^"+t.Name()+"$", "-test.v")
	cmd.Env = append(append(os.Environ(), marker+"=1"), env...)
	output, err := cmd.CombinedOutput()
	require.NoError(t, err, "%s", output)
	require.Contains(t, string(output), "--- PASS: "+t.Name())
	return false
}

func TestAProxyOfTheEnvironmentThatCannotBeUsedIsNotRepeated(t *testing.T) {
	if !inChild(t, "HTTP_PROXY=http://user:hidden@proxy:3128", "REQUEST_METHOD=GET", "NO_PROXY=", "no_proxy=") { // as in CGI
		return
	}
	err := dialed(t, scripted(t, "", true), "ws://server.example/", nil)
	require.ErrorContains(t, err, "HTTP_PROXY")
	assert.NotContains(t, err.Error(), "hidden")
}

// This one looks to net/http like a proxy by the name of http, at a path.
func TestAProxyOfTheEnvironmentThatIsMistypedIsNotRepeated(t *testing.T) {
	if !inChild(t, "HTTP_PROXY=http://user:hidden/hidden@proxy:3128", "http_proxy=", "NO_PROXY=", "no_proxy=") {
		return
	}
	err := dialed(t, scripted(t, "", true), "ws://server.example/", nil)
	assert.NotContains(t, err.Error(), "hidden")
}

func TestAProxyOfTheEnvironmentIsUsed(t *testing.T) {
	if !inChild(t, "HTTP_PROXY=http://user:secret@proxy.example:3128", "http_proxy=", "NO_PROXY=", "no_proxy=") {
		return
	}
	near, far := memPipe(1 << 20)
	defer far.Close()
	d := &Dialer{ReadBufferSize: 4 << 10, NetDial: func(_ context.Context, _, address string) (net.Conn, error) {
		if address != "proxy.example:3128" {
			return nil, errors.New("dialed " + address)
		}
		return near, nil
	}}
	go func() {
		in := bufio.NewReader(far)
		asked, err := http.ReadRequest(in)
		if err != nil || asked.Method != http.MethodConnect || asked.Host != "server.example:80" ||
			asked.Header.Get("Proxy-Authorization") != "Basic dXNlcjpzZWNyZXQ=" {
			_, _ = far.Write([]byte("HTTP/1.1 400 Bad Request\r\n\r\n"))
			far.Close()
			return
		}
		_, _ = far.Write([]byte("HTTP/1.1 200 Connection established\r\n\r\n"))
		request, err := http.ReadRequest(in)
		if err == nil {
			upgrader := websocket.Upgrader{}
			_, _ = upgrader.Upgrade(&hijacked{conn: far, in: in}, request, nil)
		}
	}()
	conn, _, _, err := d.Dial(t.Context(), parseURL(t, "ws://server.example/"), nil)
	require.NoError(t, err)
	conn.Close()
}

// In its strict mode, FIPS 140 has no SHA-1, and a process that uses it panics.
func TestHandshakeUnderFIPS140(t *testing.T) {
	if !inChild(t, "GODEBUG=fips140=only") {
		return
	}
	require.True(t, fips140.Enforced())
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}}
	certificate, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	require.NoError(t, err)
	parsed, err := x509.ParseCertificate(certificate)
	require.NoError(t, err)
	roots := x509.NewCertPool()
	roots.AddCert(parsed)
	handler := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var ws *websocket.Conn
		var err error
		fips140.WithoutEnforcement(func() { ws, err = (&websocket.Upgrader{}).Upgrade(w, r, nil) })
		if err == nil {
			defer ws.Close()
			_ = ws.WriteMessage(websocket.BinaryMessage, []byte("hello"))
			_, _, _ = ws.ReadMessage()
		}
	})
	plain, secure := httptest.NewServer(handler), httptest.NewUnstartedServer(handler)
	secure.TLS = &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{certificate}, PrivateKey: key}}}
	secure.StartTLS()
	for scheme, server := range map[string]*httptest.Server{"ws": plain, "wss": secure} {
		d := &Dialer{NetDial: (&net.Dialer{}).DialContext, TLS: &tls.Config{RootCAs: roots}, ReadBufferSize: 4 << 10}
		conn, in, _, err := d.Dial(t.Context(), parseURL(t, scheme+"://"+server.Listener.Addr().String()), nil)
		require.NoError(t, err)
		s := New(conn, in, true, unlimited, writeTimeout, &counted{})
		message, err := s.Read()
		require.NoError(t, err)
		assert.Equal(t, "hello", string(message))
		s.Close()
		server.Close()
	}
	assert.True(t, fips140.Enforced(), "again")
}

// Whatever a server answers, dialing ends with a short error, or with its WebSocket.
func FuzzAnswer(f *testing.F) {
	f.Add([]byte("HTTP/1.1 401 Unauthorized\r\nContent-Length: 5\r\n\r\nhello"))
	f.Add([]byte("HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: x\r\nSec-WebSocket-Extensions: permessage-deflate; x=\"\r\n\r\n"))
	f.Add([]byte("HTTP/1.1 307 x\r\nLocation: https://a:b@c/d?e\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n<a>bc\r\n0\r\n\r\n"))
	f.Add([]byte("HTTP/1.1 302 Found\r\nLocation: /\r\n\r\n")) // and the connection ends
	f.Add([]byte("\x15\x03\x01\x00\x02\x02\x46"))
	f.Fuzz(func(t *testing.T, answer []byte) {
		err := dialed(t, scripted(t, string(answer), true), "ws://server/?key=hidden", nil)
		require.Less(t, len(err.Error()), 1000)
		require.True(t, utf8.ValidString(err.Error()))
		require.NotContains(t, err.Error(), "hidden")
		for _, r := range err.Error() {
			require.False(t, r < ' ' || r == 0x7f, "%q", err.Error())
		}
	})
}

// Frames of an extension that was not asked for could not be read.
func TestAnExtensionThatWasNotAskedForIsRefused(t *testing.T) {
	near, far := memPipe(1 << 20)
	defer far.Close()
	go func() {
		if request, err := http.ReadRequest(bufio.NewReader(far)); err == nil {
			_, _ = far.Write([]byte("HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n" +
				"Sec-WebSocket-Extensions: permessage-deflate; server_no_context_takeover; client_no_context_takeover\r\n" +
				"Sec-WebSocket-Accept: " + acceptKey(request.Header.Get("Sec-WebSocket-Key")) + "\r\n\r\n"))
		}
	}()
	d := &Dialer{
		NetDial:        func(context.Context, string, string) (net.Conn, error) { return near, nil },
		ReadBufferSize: 4 << 10,
	}
	require.ErrorContains(t, dialed(t, d, "ws://server/", nil), "extension")
}
