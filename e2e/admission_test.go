package e2e

import (
	"io"
	"net/http"
	"strconv"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// onlyWithKey refuses all but those with the right key, each wrong one in a way of its own.
func onlyWithKey(headers http.Header) verdict {
	switch headers.Get("Authorization") {
	case "Secret-Key right":
		return verdict{}
	case "Secret-Key old-agent":
		return verdict{refusal: http.StatusUpgradeRequired, headers: map[string]string{"Upgrade": "opamp/2"}}
	case "Secret-Key busy":
		return verdict{refusal: http.StatusServiceUnavailable, headers: map[string]string{"Retry-After": "3"}}
	case "Secret-Key nonsense":
		return verdict{refusal: 42}
	default:
		return verdict{refusal: http.StatusUnauthorized, headers: map[string]string{"WWW-Authenticate": "Secret-Key", "Content-Length": "1000", "Keep-Alive": "X"}}
	}
}

func key(key string) http.Header { return http.Header{"Authorization": {"Secret-Key " + key}} }

// The server refuses agents, and each gets to know what the server said.
func TestRefusals(t *testing.T) {
	t.Parallel()
	server := startServer(t, serverOptions{judge: onlyWithKey})
	gateway := startGateway(t, server.url())
	server.wantLinks(t, upstream(3)...)

	for _, test := range []struct {
		key, header, value string
		status             int
	}{
		{"wrong", "WWW-Authenticate", "Secret-Key", http.StatusUnauthorized},
		{"old-agent", "Upgrade", "opamp/2", http.StatusUpgradeRequired},
		{"busy", "Retry-After", "3", http.StatusServiceUnavailable},
		{"nonsense", "", "", http.StatusUnauthorized},
	} {
		t.Run(test.key, func(t *testing.T) {
			_, resp, err := dialRaw(gateway.url(), key(test.key), nil)
			require.Error(t, err)
			require.NotNil(t, resp)
			require.Equal(t, test.status, resp.StatusCode)
			require.Equal(t, test.value, resp.Header.Get(test.header))
			require.Empty(t, resp.Header.Get("Keep-Alive"), "what concerns only the server's own connection")
			body, err := io.ReadAll(resp.Body)
			require.NoError(t, err)
			require.Contains(t, string(body), "refused by the OpAMP server")
		})
	}

	t.Run("opamp-go's client hears it", func(t *testing.T) {
		mallory := startAgent(t, "mallory", gateway.url(), agentOptions{headers: key("wrong")})
		mallory.wantFailures(t, 1)
		mallory.wantLog(t, "401 Unauthorized")
	})

	t.Run("opamp-go's client waits as long as it is told", func(t *testing.T) {
		bob := startAgent(t, "bob", gateway.url(), agentOptions{headers: key("busy")})
		failures := bob.wantFailures(t, 3) // the library reports each of them twice
		require.GreaterOrEqual(t, failures[2].Sub(failures[0]), 2900*time.Millisecond, "between bob's attempts")
	})

	t.Run("others get in", func(t *testing.T) {
		alice := startAgent(t, "alice", gateway.url(), agentOptions{headers: key("right")})
		server.wantAgent(t, alice.id(), "is connected", isConnected)
		alice.wantConnects(t, 1)
	})

	asked := server.asked()[0]
	require.Equal(t, []string{"Secret-Key wrong"}, asked.Headers["Authorization"])
	require.Contains(t, asked.RemoteAddress, "127.0.0.1:")
	require.NotEmpty(t, asked.RequestUID)
}

// The server is on opamp-go's library and knows nothing of gateways, and is only asked: agents get a definite
// answer at once, and the operator a line that says what to do. Doing it helps.
func TestOrdinaryServer(t *testing.T) {
	t.Parallel()
	server := startServer(t, serverOptions{ordinary: true})
	gateway := startGateway(t, server.url(), func(c config) { c.gateway("server::agent_admission", "ask") })
	server.wantLinks(t, upstream(3)...)

	for range 5 {
		start := time.Now()
		_, resp, err := dialRaw(gateway.url(), nil, nil)
		require.Error(t, err)
		require.NotNil(t, resp)
		require.Equal(t, http.StatusServiceUnavailable, resp.StatusCode)
		require.Less(t, time.Since(start), 5*time.Second, "until the answer")
		after, err := strconv.Atoi(resp.Header.Get("Retry-After"))
		require.NoError(t, err)
		require.GreaterOrEqual(t, after, 30)
	}
	gateway.wantLog(t, "does not know the capability "+gatewayCapability, "server::agent_admission: auto, or accept", server.url())
	require.LessOrEqual(t, len(gateway.log.with("does not know the capability")), 1, "it is said once")

	gateway.reload(t, func(c config) { c.gateway("server::agent_admission", "accept") })
	gateway.wantReady(t, 2)
	agents := startAgents(t, 6, gateway.url(), agentOptions{})
	for _, a := range agents {
		server.wantAgent(t, a.id(), "is connected", isConnected)
		a.say(t, "I am "+a.name)
		a.wantHeard(t, "I am "+a.name)
		server.tell(t, a.id(), "hello, "+a.name)
		a.wantHeard(t, "hello, "+a.name)
	}
	require.Empty(t, server.asked())
}

// The server is away for a moment when an agent comes: it is let in when the server is back.
// When the server stays away, the agent is told to come again.
func TestServerIsAway(t *testing.T) {
	t.Parallel()
	server := startServer(t, serverOptions{})
	server.stop(t)
	gateway := startGateway(t, server.url())
	gateway.wantLog(t, "warn", "cannot connect to the server", server.url(), "connection refused")

	_, resp, err := dialRaw(gateway.url(), nil, nil)
	require.Error(t, err)
	require.NotNil(t, resp)
	require.Equal(t, http.StatusServiceUnavailable, resp.StatusCode)
	require.NotEmpty(t, resp.Header.Get("Retry-After"))

	alice := startAgent(t, "alice", gateway.url(), agentOptions{})
	server.start(t)
	server.wantAgent(t, alice.id(), "is connected", isConnected)
	gateway.wantLog(t, "info", "connected to the server", server.url())
	alice.wantConnects(t, 1)
}
