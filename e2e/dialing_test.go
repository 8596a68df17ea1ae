package e2e

import (
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// No two gateways look alike to their server, and it sees of which make they are.
func TestGatewaysIntroduceThemselves(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		edit func(config)
		want string // the links' names, without their numbers
	}{
		"by default":                     {func(c config) { c.set("service::telemetry::resource", map[string]any{}) }, `[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}`},
		"by the collector's instance ID": {func(c config) { c.identity("site-7") }, "site-7"},
		"without an instance ID": {func(c config) {
			c.set("service::telemetry::resource", map[string]any{"service.instance.id": nil})
		}, `[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}`},
		"by an agent ID": {func(c config) { c.gateway("server::agent_id", "edge-7") }, "edge-7"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			server := startServer(t, serverOptions{})
			gateway := startGateway(t, server.url(), test.edit, func(c config) {
				c.gateway("server::headers", map[string]any{"X-Team": []any{"a", "b"}, "X-Site": "north"})
			})
			gateway.wantLinks(t, 3)
			names := server.linkNames()
			require.Len(t, names, 3)
			first, _, _ := strings.Cut(names[0], "/")
			require.Regexp(t, "^"+test.want+"$", first)
			require.Equal(t, []string{first + "/upstream-0", first + "/upstream-1", first + "/upstream-2"}, names)
			headers := server.linkHeaders(names[0])
			require.Regexp(t, `^opamp-gateway/\S+ otelcol-opampgateway/\d+\.\d+\.\d+ \([a-z0-9]+/[a-z0-9]+\)$`, headers.Get("User-Agent"))
			require.Equal(t, []string{"a", "b"}, headers["X-Team"])
			require.Equal(t, []string{"north"}, headers["X-Site"])

			// The name stays for the life of the gateway.
			server.cut(t, names[1])
			gateway.wantLinks(t, 4)
			server.wantLinks(t, names...)
		})
	}
}

// redirector answers each request with a redirect.
func redirector(t *testing.T, location string, secure bool) (address string) {
	t.Helper()
	handler := http.RedirectHandler(location, http.StatusTemporaryRedirect)
	var server *httptest.Server
	if secure {
		server = httptest.NewTLSServer(handler)
	} else {
		server = httptest.NewServer(handler)
	}
	t.Cleanup(server.Close)
	return server.Listener.Addr().String()
}

func withSecret(c config) {
	c.gateway("server::headers", map[string]any{"Authorization": "Secret-Key s3cret"})
}

// A server may send the links elsewhere.
func TestRedirect(t *testing.T) {
	t.Parallel()
	t.Run("to another server", func(t *testing.T) {
		t.Parallel()
		server := startServer(t, serverOptions{})
		gateway := startGateway(t, "ws://"+redirector(t, "http"+strings.TrimPrefix(server.url(), "ws"), false)+"/", withSecret)
		server.wantLinks(t, upstream(3)...)
		gateway.wantLinks(t, 3)
		gateway.wantLog(t, "connected to the server", "redirected_to", server.url())
		for _, name := range upstream(3) {
			require.Empty(t, server.linkHeaders(name)["Authorization"], "it is not for this one")
		}
		alice := startAgent(t, "alice", gateway.url(), agentOptions{})
		server.wantAgent(t, alice.id(), "is connected", isConnected)
		require.NotContains(t, gateway.log.tail(1000), "s3cret")
	})

	t.Run("to another path", func(t *testing.T) {
		t.Parallel()
		server := startFleetServer(t, fleetServerOptions{})
		seen := make(chan http.Header, 100)
		front := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path != "/v2" {
				http.Redirect(w, r, "/v2?token=s3cret", http.StatusMovedPermanently)
				return
			}
			seen <- r.Header.Clone()
			server.ServeHTTP(w, r)
		}))
		t.Cleanup(front.Close)
		address := front.Listener.Addr().String()
		gateway := startGateway(t, "ws://"+address+"/v1/opamp", withSecret)
		gateway.wantLinks(t, 3)
		gateway.wantLog(t, "connected to the server", "redirected_to", "ws://"+address+"/v2")
		for range 3 {
			require.Equal(t, []string{"Secret-Key s3cret"}, (<-seen)["Authorization"])
		}
		require.NotContains(t, gateway.log.tail(1000), "s3cret")
	})

	t.Run("out of TLS", func(t *testing.T) {
		t.Parallel()
		server := startServer(t, serverOptions{})
		gateway := startGateway(t, "wss://"+redirector(t, server.url(), true)+"/", withSecret, func(c config) {
			c.gateway("server::tls", map[string]any{"insecure_skip_verify": true})
		})
		gateway.wantLog(t, "cannot connect to the server", "not followed: it is without TLS", "server::endpoint")
		require.Empty(t, server.linkNames())
	})

	t.Run("in a circle", func(t *testing.T) {
		t.Parallel()
		gateway := startGateway(t, "ws://"+redirector(t, "/v1/opamp", false)+"/v1/opamp")
		gateway.wantLog(t, "cannot connect to the server", "redirected to 127.0.0.1", "there were 3 before", "server::endpoint")
	})
}

// The server's name may have several addresses; localhost mostly has two, of which the server has one.
func TestAllAddressesOfAName(t *testing.T) {
	t.Parallel()
	server := startServer(t, serverOptions{})
	gateway := startGateway(t, strings.Replace(server.url(), "127.0.0.1", "localhost", 1))
	gateway.wantLinks(t, 3)
	names := upstream(3)
	slices.Sort(names)
	require.Equal(t, names, server.linkNames())
	server.stop(t)
	gateway.wantLog(t, "cannot connect to the server", "connection refused")
	server.start(t)
	server.wantLinks(t, names...)
}
