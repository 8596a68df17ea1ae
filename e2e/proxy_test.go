package e2e

import (
	"crypto/tls"
	"io"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

const proxySecret = "myst3ry"

// proxyProgram is one of the proxies of Debian that `make proxies` installs.
func proxyProgram(t *testing.T, name string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	require.NoError(t, err, "run \"make proxies\"")
	return path
}

// startTinyproxy starts a proxy of HTTP, with more in its configuration.
func startTinyproxy(t *testing.T, more ...string) (address string) {
	t.Helper()
	address = freeAddress(t)
	_, port, err := net.SplitHostPort(address)
	require.NoError(t, err)
	path := filepath.Join(t.TempDir(), "tinyproxy.conf")
	lines := append([]string{"Port " + port, "Listen 127.0.0.1", "Timeout 600", "MaxClients 100", "LogLevel Info"}, more...)
	require.NoError(t, os.WriteFile(path, []byte(strings.Join(lines, "\n")+"\n"), 0o600))
	startProcess(t, "tinyproxy", proxyProgram(t, "tinyproxy"), "-d", "-c", path)
	wantListening(t, address)
	return address
}

// startMicrosocks starts a SOCKS5 proxy, with more on its command line.
func startMicrosocks(t *testing.T, more ...string) (address string) {
	t.Helper()
	address = freeAddress(t)
	host, port, err := net.SplitHostPort(address)
	require.NoError(t, err)
	startProcess(t, "microsocks", proxyProgram(t, "microsocks"), append([]string{"-i", host, "-p", port}, more...)...)
	wantListening(t, address)
	return address
}

// serveEach has everybody who comes to an address be served.
func serveEach(t *testing.T, serve func(net.Conn)) (address string) {
	t.Helper()
	listener := listenAt(t, "127.0.0.1:0")
	t.Cleanup(func() { _ = listener.Close() })
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				serve(conn)
			}()
		}
	}()
	return listener.Addr().String()
}

func listenAt(t *testing.T, address string) net.Listener {
	t.Helper()
	listener, err := net.Listen("tcp", address)
	require.NoError(t, err)
	return listener
}

func wantListening(t *testing.T, address string) {
	t.Helper()
	eventually(t, func() string {
		if !dialable(address) {
			return "nobody listens at " + address
		}
		return ""
	})
}

// behindTLS has a proxy speak TLS.
func behindTLS(t *testing.T, identity *Identity, proxy string) (address string) {
	t.Helper()
	return serveEach(t, func(conn net.Conn) {
		secured := tls.Server(conn, &tls.Config{Certificates: []tls.Certificate{identity.cert}})
		plain, err := net.Dial("tcp", proxy)
		if err != nil {
			return
		}
		defer plain.Close()
		go func() {
			defer conn.Close()
			_, _ = io.Copy(secured, plain)
		}()
		_, _ = io.Copy(plain, secured)
	})
}

// throughProxy has the gateway reach its server through a proxy; of both it trusts certificates of an authority.
func throughProxy(proxy string, trusted *Authority) func(config) {
	return func(c config) {
		c.set("service::telemetry::logs::level", "debug")
		c.gateway("server::proxy_url", proxy)
		c.gateway("server::tls", map[string]any{"ca_file": trusted.file})
	}
}

// Links reach the server through the proxies of the field, and so do their agents.
func TestProxies(t *testing.T) {
	t.Parallel()
	login := "gateway:" + url.QueryEscape(proxySecret) + "@"
	authority := newAuthority(t, "authority")
	identity := authority.issue(t, "proxy")
	open, closed := startTinyproxy(t), startTinyproxy(t, "BasicAuth gateway "+proxySecret)
	socks, closedSOCKS := startMicrosocks(t), startMicrosocks(t, "-u", "gateway", "-P", proxySecret)
	for name, proxy := range map[string]string{
		"HTTP":                   "http://" + open,
		"HTTP with a user":       "http://" + login + closed,
		"HTTPS":                  "https://" + behindTLS(t, identity, open),
		"HTTPS with a user":      "https://" + login + behindTLS(t, identity, closed),
		"SOCKS5":                 "socks5://" + socks,
		"SOCKS5 with a user":     "socks5://" + login + closedSOCKS,
		"SOCKS5, names included": "socks5h://" + socks,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var opts serverOptions
			if strings.Contains(name, "user") { // and TLS in TLS
				opts.tls = &tls.Config{Certificates: []tls.Certificate{authority.issue(t, "server").cert}}
			}
			server := startServer(t, opts)
			gateway := startGateway(t, server.url(), throughProxy(proxy, authority))
			server.wantLinks(t, upstream(3)...)
			alice := startAgent(t, "alice", gateway.url(), agentOptions{})
			server.wantAgent(t, alice.id(), "is connected", isConnected)
			alice.say(t, "hello")
			alice.wantHeard(t, "hello")
			require.NotContains(t, gateway.log.String(), proxySecret)
		})
	}
}

// Each way in which a proxy says no is one clear line in the log, for each link, and no secret is in it.
func TestProxiesSayNo(t *testing.T) {
	t.Parallel()
	filter := filepath.Join(t.TempDir(), "filter")
	require.NoError(t, os.WriteFile(filter, []byte("127\n"), 0o600))
	authority, stranger := newAuthority(t, "authority"), newAuthority(t, "stranger")
	away := freeAddress(t)
	open, closed := startTinyproxy(t), startTinyproxy(t, "BasicAuth gateway "+proxySecret)
	filtered := startTinyproxy(t, `Filter "`+filter+`"`)
	ports := startTinyproxy(t, "ConnectPort 443")
	socks, closedSOCKS := startMicrosocks(t), startMicrosocks(t, "-u", "gateway", "-P", "another")
	silent := serveEach(t, func(conn net.Conn) { _, _ = io.Copy(io.Discard, conn) })
	ssh := serveEach(t, func(conn net.Conn) {
		_, _ = conn.Write([]byte("SSH-2.0-OpenSSH_9.6\r\n"))
		_, _ = io.Copy(io.Discard, conn)
	})
	server := startServer(t, serverOptions{})
	login := "gateway:" + proxySecret + "@"
	for name, test := range map[string]struct {
		proxy, endpoint string
		want            []string
	}{
		"HTTP: no user":           {"http://" + closed, server.url(), []string{"proxy http://" + closed + " answered 407", "wants a user and password", "server::proxy_url"}},
		"HTTP: another user":      {"http://another:" + proxySecret + "@" + closed, server.url(), []string{"proxy http://" + closed + " answered 40", "wants a user and password, or others", "server::proxy_url"}},
		"HTTP: filtered":          {"http://" + login + filtered, server.url(), []string{"proxy http://" + filtered + " answered 403", "server::proxy_url"}},
		"HTTP: not this port":     {"http://" + ports, server.url(), []string{"proxy http://" + ports + " answered 403", "server::proxy_url"}},
		"HTTP: server is away":    {"http://" + open, "ws://" + away + "/v1/opamp", []string{"proxy http://" + open + " answered 500", "Unable to connect", "server::proxy_url"}},
		"HTTP: away":              {"http://" + login + away, server.url(), []string{"proxy http://" + away, "connection refused", "server::proxy_url"}},
		"HTTP: slow":              {"http://" + login + silent, server.url(), []string{"proxy http://" + silent + " has not answered the handshake: context deadline exceeded", "server::proxy_url"}},
		"HTTP: no proxy":          {"http://" + login + ssh, server.url(), []string{"proxy http://" + ssh + " has not answered in HTTP/1.1", "SSH-2.0", "server::proxy_url"}},
		"HTTP: no proxy, but web": {"http://" + login + server.address, server.url(), []string{"proxy http://" + server.address + " answered 4", "server::proxy_url"}},
		"HTTPS: no TLS":           {"https://" + login + server.address, server.url(), []string{"proxy https://" + server.address + " does not speak TLS", "http:// instead of https://", "server::proxy_url"}},
		"HTTPS: another CA":       {"https://" + login + behindTLS(t, stranger.issue(t, "proxy"), open), server.url(), []string{"proxy https://", "x509:", "server::proxy_url"}},
		"HTTP: with TLS":          {"http://" + login + behindTLS(t, authority.issue(t, "proxy"), open), server.url(), []string{"proxy http://", "has hung up instead of an answer", "server::proxy_url"}},
		"SOCKS5: no user":         {"socks5://" + closedSOCKS, server.url(), []string{"proxy socks5://" + closedSOCKS + " answered 255 no acceptable method of authentication", "wants a user and password", "server::proxy_url"}},
		"SOCKS5: another user":    {"socks5://" + login + closedSOCKS, server.url(), []string{"proxy socks5://" + closedSOCKS + " answered", "wants a user and password", "server::proxy_url"}},
		"SOCKS5: server is away":  {"socks5://" + socks, "ws://" + away + "/v1/opamp", []string{"proxy socks5://" + socks + " answered 5 connection refused", "server::proxy_url"}},
		"SOCKS5: away":            {"socks5h://" + login + away, server.url(), []string{"proxy socks5h://" + away, "connection refused", "server::proxy_url"}},
		"SOCKS5: slow":            {"socks5://" + login + silent, server.url(), []string{"proxy socks5://" + silent + " has not answered the handshake", "server::proxy_url"}},
		"SOCKS5: no proxy":        {"socks5://" + login + ssh, server.url(), []string{"proxy socks5://" + ssh + " does not speak SOCKS5", "server::proxy_url"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			gateway := startGateway(t, test.endpoint, throughProxy(test.proxy, authority), func(c config) {
				c.gateway("server::connections", 1)
			})
			gateway.wantLog(t, append([]string{"cannot connect to the server"}, test.want...)...)
			require.Len(t, gateway.log.with("cannot connect to the server"), 1)
			require.NotContains(t, gateway.log.String(), proxySecret)
		})
	}

	t.Run("the environment's", func(t *testing.T) {
		t.Parallel()
		c := gatewayConfig("ws://opamp.invalid/v1/opamp", freeAddress(t))
		gateway := launchGatewayIn(t, []string{"HTTP_PROXY=http://" + closed, "NO_PROXY="}, "gateway", c)
		gateway.wantLog(t, "cannot connect to the server", "answered 407", "see HTTP_PROXY and HTTPS_PROXY")
	})

	t.Run("that is wrong", func(t *testing.T) {
		t.Parallel()
		for _, proxy := range []string{"gopher://me:" + proxySecret + "@proxy", "http://me:" + proxySecret + "/@proxy:3128", "me:" + proxySecret + "@proxy:3128"} {
			c := gatewayConfig("ws://localhost", "127.0.0.1:0")
			c.gateway("server::proxy_url", proxy)
			code, output := validate(t, c)
			require.Equal(t, 1, code)
			require.Contains(t, output, "proxy_url")
			require.NotContains(t, output, proxySecret)
		}
	})
}
