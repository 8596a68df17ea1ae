package e2e

import (
	"bufio"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"slices"
	"sync"
	"testing"

	"github.com/gorilla/websocket"
	"github.com/stretchr/testify/require"
)

// The way to the server leads through the proxy that the environment names.
func TestProxy(t *testing.T) {
	server := startServer(t, serverOptions{})
	proxy := startProxy(t, server.address)
	// Addresses of this machine are never asked of a proxy; the name of the server is known to it alone.
	t.Setenv("HTTP_PROXY", "http://"+proxy.address)
	t.Setenv("NO_PROXY", "")
	gateway := startGateway(t, "ws://opamp.invalid:4320/v1/opamp")
	server.wantLinks(t, upstream(3)...)
	alice := startAgent(t, "alice", gateway.url(), agentOptions{})
	server.wantAgent(t, alice.id(), "is connected", isConnected)
	require.Equal(t, slices.Repeat([]string{"CONNECT opamp.invalid:4320"}, 3), proxy.asked())
}

// Agents on the gateway's own machine may come by a unix socket.
func TestUnixSocket(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "s") // short, as the path of a socket has to be
	server := startServer(t, serverOptions{})
	startGateway(t, server.url(), func(c config) {
		c.gateway("listener::transport", "unix")
		c.gateway("listener::endpoint", path)
	})
	dialer := websocket.Dialer{NetDial: func(string, string) (net.Conn, error) { return net.Dial("unix", path) }}
	ws, _, err := dialer.Dial("ws://localhost/v1/opamp", nil)
	require.NoError(t, err)
	defer ws.Close()
	require.Len(t, server.asked(), 1)
}

// proxy is an HTTP proxy to which everybody has one address.
type proxy struct {
	address string
	target  string
	tunnels sync.WaitGroup

	mu       sync.Mutex
	requests []string
}

func startProxy(t *testing.T, target string) *proxy {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	p := &proxy{address: l.Addr().String(), target: target}
	p.tunnels.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			p.tunnels.Go(func() { p.tunnel(conn) })
		}
	})
	t.Cleanup(func() {
		l.Close()
		p.tunnels.Wait() // the gateway is gone by now, and so are its connections
	})
	return p
}

func (p *proxy) tunnel(conn net.Conn) {
	defer conn.Close()
	in := bufio.NewReader(conn)
	r, err := http.ReadRequest(in)
	if err != nil {
		return
	}
	p.mu.Lock()
	p.requests = append(p.requests, r.Method+" "+r.Host)
	p.mu.Unlock()
	out, err := net.Dial("tcp", p.target)
	if err != nil {
		return
	}
	defer out.Close()
	if _, err := io.WriteString(conn, "HTTP/1.1 200 OK\r\n\r\n"); err != nil {
		return
	}
	p.tunnels.Go(func() {
		_, _ = io.Copy(conn, out)
		conn.Close()
	})
	_, _ = io.Copy(out, in)
}

func (p *proxy) asked() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.requests)
}
