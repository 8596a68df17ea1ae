package socket

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gorilla/websocket"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// spoken is what one end of a scripted dialogue hears, and keeps of what the other says.
type spoken struct {
	io.Reader
	bytes.Buffer
}

func (s *spoken) Read(b []byte) (int, error) { return s.Reader.Read(b) }

func TestDialogueWithSOCKS(t *testing.T) {
	const yes = "\x05\x00\x00\x01\x01\x02\x03\x04\x00\x50"
	for name, test := range map[string]struct {
		proxy, address, answers string
		said, err               string
		status                  int
	}{
		"a name":                        {"socks5h://proxy", "server:443", "\x05\x00" + yes, "\x05\x01\x00" + "\x05\x01\x00\x03\x06server\x01\xbb", "", 0},
		"IPv4":                          {"socks5://proxy", "192.0.2.1:80", "\x05\x00" + yes, "\x05\x01\x00" + "\x05\x01\x00\x01\xc0\x00\x02\x01\x00\x50", "", 0},
		"IPv6":                          {"socks5://proxy", "[::1]:80", "\x05\x00" + yes, "\x05\x01\x00" + "\x05\x01\x00\x04" + strings.Repeat("\x00", 15) + "\x01\x00\x50", "", 0},
		"bound to IPv6":                 {"socks5://proxy", "s:80", "\x05\x00\x05\x00\x00\x04" + strings.Repeat("x", 18), "\x05\x01\x00" + "\x05\x01\x00\x03\x01s\x00\x50", "", 0},
		"bound to a name":               {"socks5://proxy", "s:80", "\x05\x00\x05\x00\x00\x03\x02nnpp", "\x05\x01\x00" + "\x05\x01\x00\x03\x01s\x00\x50", "", 0},
		"a user":                        {"socks5://me:hidden%40@proxy", "s:80", "\x05\x02\x01\x00" + yes, "\x05\x02\x00\x02" + "\x01\x02me\x07hidden@" + "\x05\x01\x00\x03\x01s\x00\x50", "", 0},
		"a user whom nobody asks for":   {"socks5://me:hidden@proxy", "s:80", "\x05\x00" + yes, "\x05\x02\x00\x02" + "\x05\x01\x00\x03\x01s\x00\x50", "", 0},
		"a user is missing":             {"socks5://proxy", "s:80", "\x05\xff", "\x05\x01\x00", "proxy socks5://proxy answered 255 no acceptable method of authentication", 407},
		"another user":                  {"socks5://me:hidden@proxy", "s:80", "\x05\x02\x01\x01", "\x05\x02\x00\x02" + "\x01\x02me\x06hidden", "proxy socks5://proxy answered 1 user and password refused", 407},
		"not allowed":                   {"socks5://proxy", "s:80", "\x05\x00\x05\x02\x00\x01", "\x05\x01\x00" + "\x05\x01\x00\x03\x01s\x00\x50", "proxy socks5://proxy answered 2 connection not allowed by its rules", 0},
		"server refuses":                {"socks5://proxy:9", "s:80", "\x05\x00\x05\x05", "\x05\x01\x00" + "\x05\x01\x00\x03\x01s\x00\x50", "proxy socks5://proxy:9 answered 5 connection refused", 0},
		"unknown":                       {"socks5://proxy", "s:80", "\x05\x00\x05\x63", "\x05\x01\x00" + "\x05\x01\x00\x03\x01s\x00\x50", "proxy socks5://proxy answered 99 for a reason unknown", 0},
		"HTTP":                          {"socks5://proxy", "s:80", "HTTP/1.1 400 Bad Request\r\n\r\n", "\x05\x01\x00", "proxy socks5://proxy does not speak SOCKS5", 0},
		"a method that was not offered": {"socks5://proxy", "s:80", "\x05\x02", "\x05\x01\x00", "proxy socks5://proxy does not speak SOCKS5", 0},
		"an address of no kind":         {"socks5://proxy", "s:80", "\x05\x00\x05\x00\x00\x02xxxxxxxxxxxx", "\x05\x01\x00" + "\x05\x01\x00\x03\x01s\x00\x50", "proxy socks5://proxy does not speak SOCKS5", 0},
		"nothing":                       {"socks5://proxy", "s:80", "", "\x05\x01\x00", "proxy socks5://proxy has hung up instead of an answer: unexpected EOF", 0},
		"half an answer":                {"socks5://proxy", "s:80", "\x05\x00\x05\x00\x00\x01x", "\x05\x01\x00" + "\x05\x01\x00\x03\x01s\x00\x50", "proxy socks5://proxy has hung up instead of an answer: unexpected EOF", 0},
		"a long name":                   {"socks5://proxy", strings.Repeat("x", 256) + ":80", "", "", "proxy socks5://proxy: name, user or password is longer than SOCKS5 allows", 0},
	} {
		t.Run(name, func(t *testing.T) {
			const after = "what the server says"
			in := strings.NewReader(test.answers + after)
			if test.err != "" {
				in = strings.NewReader(test.answers)
			}
			conn := &spoken{Reader: in}
			err := askSOCKS(conn, parseURL(t, test.proxy), test.address)
			assert.Equal(t, test.said, conn.String())
			if test.err == "" {
				require.NoError(t, err)
				require.Equal(t, len(after), in.Len(), "what follows is the server's")
				return
			}
			require.EqualError(t, err, test.err)
			if answered := (*HandshakeError)(nil); errors.As(err, &answered) {
				require.Equal(t, test.status, answered.StatusCode)
			}
		})
	}
}

// Whatever a proxy says, it costs no more than its answer.
func FuzzSOCKS(f *testing.F) {
	f.Add("\x05\x02\x01\x00\x05\x00\x00\x03\x02nnpp")
	f.Add("\x05\x00\x05\x00\x00\x01xxxxxx")
	f.Add("\x05\x00\x05\x05")
	f.Fuzz(func(t *testing.T, answers string) {
		err := askSOCKS(&spoken{Reader: strings.NewReader(answers)}, parseURL(t, "socks5://me:hidden@proxy"), "server:80")
		if err != nil {
			require.Less(t, len(err.Error()), 200)
			require.NotContains(t, err.Error(), "hidden")
			return
		}
		require.GreaterOrEqual(t, len(answers), 8)
		require.EqualValues(t, socksVersion, answers[0])
	})
}

// proxyOf returns a Dialer whose server, behind a proxy of this URL, lets everybody in; and what the proxy is.
func proxyOf(t *testing.T, through string, ask func(conn net.Conn) error) *Dialer {
	t.Helper()
	near, far := memPipe(1 << 20)
	t.Cleanup(func() {
		near.Close()
		far.Close()
	})
	u := parseURL(t, through)
	go func() {
		if ask(far) != nil {
			far.Close()
			return
		}
		in := bufio.NewReader(far)
		if request, err := http.ReadRequest(in); err == nil {
			_, _ = (&websocket.Upgrader{}).Upgrade(&hijacked{conn: far, in: in}, request, nil)
		}
	}()
	return &Dialer{Proxy: u, ReadBufferSize: 4 << 10, NetDial: func(_ context.Context, _, address string) (net.Conn, error) {
		if address != proxyHostPort(u) {
			return nil, errors.New("dialed " + address)
		}
		return near, nil
	}}
}

func acceptSOCKS(conn net.Conn) error {
	if _, err := io.ReadFull(conn, make([]byte, 3)); err != nil {
		return err
	}
	if _, err := conn.Write([]byte("\x05\x00")); err != nil {
		return err
	}
	asked := make([]byte, len("\x05\x01\x00\x03\x0eserver.example\x00\x50"))
	if _, err := io.ReadFull(conn, asked); err != nil {
		return err
	}
	_, err := conn.Write([]byte("\x05\x00\x00\x01\x01\x02\x03\x04\x00\x50"))
	return err
}

// The proxy of the configuration is used for whatever the environment says: NO_PROXY is not for it.
func TestAProxyOfTheConfigurationIsUsed(t *testing.T) {
	if !inChild(t, "HTTP_PROXY=http://other.example:3128", "http_proxy=", "NO_PROXY=server.example", "no_proxy=") {
		return
	}
	for _, through := range []string{"socks5://proxy.example", "socks5h://proxy.example:9999"} {
		conn, _, _, err := proxyOf(t, through, acceptSOCKS).Dial(t.Context(), parseURL(t, "ws://server.example/"), nil)
		require.NoError(t, err)
		conn.Close()
	}
}

// A SOCKS proxy that says nothing costs the time of a dial.
func TestASilentSOCKSProxyIsGivenUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		d := proxyOf(t, "socks5://proxy", func(conn net.Conn) error {
			_, err := io.Copy(io.Discard, conn)
			return errors.Join(err, io.EOF)
		})
		err := dialed(t, d, "ws://server/", nil)
		require.ErrorIs(t, err, context.DeadlineExceeded)
		require.EqualError(t, err, "proxy socks5://proxy has not answered the handshake: context deadline exceeded")
		var proxy *ProxyError
		require.ErrorAs(t, err, &proxy)
		require.Equal(t, 5*time.Second, time.Since(start))
	})
}

// The name that the endpoint's certificate has to have is nothing to a proxy.
func TestServerNameIsNotTheProxys(t *testing.T) {
	names := make(chan string, 1)
	certificate := selfSigned(t)
	d := proxyOf(t, "https://proxy.example", func(conn net.Conn) error {
		return tls.Server(conn, &tls.Config{GetCertificate: func(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
			names <- hello.ServerName
			return &certificate, nil
		}}).HandshakeContext(t.Context())
	})
	d.TLS = &tls.Config{ServerName: "opamp.internal", RootCAs: nil}
	err := dialed(t, d, "ws://server/", nil)
	require.Equal(t, "proxy.example", <-names)
	require.ErrorContains(t, err, "proxy https://proxy.example: ")
	require.ErrorContains(t, err, "certificate")
	require.Equal(t, "opamp.internal", d.TLS.ServerName)
}

// A server's refusal behind a proxy is the server's; a proxy's is the proxy's.
func TestWhoseRefusalItIs(t *testing.T) {
	for answer, proxys := range map[string]bool{
		"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n":    true,
		"HTTP/1.1 200 OK\r\n\r\nHTTP/1.1 403 Forbidden\r\n\r\n": false,
	} {
		d := scripted(t, answer, true)
		d.Proxy = &url.URL{Scheme: "http", Host: "proxy:3128"}
		err := dialed(t, d, "ws://server/", nil)
		var proxy *ProxyError
		require.Equal(t, proxys, errors.As(err, &proxy), "%v", err)
	}
}

// What a login says is found in what others repeat of it, decoded or not.
func TestSecretsOfCredentials(t *testing.T) {
	headers := http.Header{"Authorization": {"Basic Z2F0ZXdheTpoaWRkZW4tcGFzc3dvcmQ="}, "X-Token": {"Bearer hidden-token"}}
	for said, told := range map[string]string{
		"no such password: hidden-password":               "no such password:…",
		"no such login: Z2F0ZXdheTpoaWRkZW4tcGFzc3dvcmQ=": "no such login:…",
		"no such token: hidden-token":                     "no such token:…",
		"Basic and Bearer are known here":                 "Basic and Bearer are known here",
	} {
		require.Equal(t, told, words(said, secretsOf(parseURL(t, "ws://server"), headers)))
	}
}
