package e2e

import (
	"net/http"
	"syscall"
	"testing"

	"github.com/open-telemetry/opamp-go/protobufs"
	"github.com/stretchr/testify/require"
)

// Agents, a gateway at the edge, another one in the middle, the server.
func TestChain(t *testing.T) {
	t.Parallel()
	const weather = "io.opampgateway.e2e.weather"
	server := startServer(t, serverOptions{judge: onlyWithKey, capabilities: []string{weather}})
	middleConfig := gatewayConfig(server.url(), freeAddress(t))
	middle := launchGateway(t, "middle", middleConfig, allowGateways, func(c config) { c.gateway("server::agent_id", "middle") })
	links := []string{"middle/upstream-0", "middle/upstream-1", "middle/upstream-2"}
	server.wantLinks(t, links...)
	edge := startGateway(t, middle.url(), func(c config) {
		c.gateway("server::connections", 2)
		c.gateway("server::headers::Authorization", "Secret-Key right") // the server is asked about the edge, too
	})
	edge.wantLinks(t, 2)
	introduced := server.asked()
	require.Len(t, introduced, 2)
	for _, q := range introduced {
		require.NotEmpty(t, q.Headers[connectionIDHeader], "the middle asks about the edge as what it is")
	}

	agents := startAgents(t, 8, edge.url(), agentOptions{headers: key("right")})
	conversation := func(t *testing.T, text string) {
		t.Helper()
		for _, a := range agents {
			server.wantAgent(t, a.id(), "is connected", isConnected)
			a.say(t, text+" "+a.name)
			a.wantHeard(t, text+" "+a.name)
			server.tell(t, a.id(), text+" from the server to "+a.name)
			a.wantHeard(t, text+" from the server to "+a.name)
		}
	}
	conversation(t, "hello")
	for _, a := range agents {
		a.mu.Lock()
		stated := a.capabilities
		a.mu.Unlock()
		require.Equal(t, [][]string{{gatewayCapability, weather}}, stated, "custom capabilities that %s has heard, once", a.name)
	}

	t.Run("refusals pass through", func(t *testing.T) {
		for refused, status := range map[string]int{"wrong": http.StatusUnauthorized, "old-agent": http.StatusUpgradeRequired, "busy": http.StatusServiceUnavailable} {
			_, resp, err := dialRaw(edge.url(), key(refused), nil)
			require.Error(t, err)
			require.NotNil(t, resp)
			require.Equal(t, status, resp.StatusCode)
			if refused == "busy" {
				require.Equal(t, "3", resp.Header.Get("Retry-After"))
			}
		}
	})

	t.Run("an agent that is killed is missed", func(t *testing.T) {
		raw := connectRaw(t, edge.url(), key("right"))
		raw.send(t, &protobufs.AgentToServer{SequenceNum: 1})
		server.wantAgent(t, raw.uid, "is connected", func(k Known) bool { return k.Connected })
		raw.ws.NetConn().Close()
		server.wantAgent(t, raw.uid, "is gone, as the edge says for it", func(k Known) bool { return k.Goodbye })
	})

	// The middle restarts, and no agent notices.
	middle.Signal(t, syscall.SIGTERM)
	code, _ := middle.wantExit(t)
	require.Zero(t, code)
	edge.wantLog(t, "warn", "lost connection to the server", middle.url())
	launchGateway(t, "middle, again", middleConfig)
	server.wantLinks(t, links...)
	conversation(t, "still here")
	for _, a := range agents {
		a.wantConnects(t, 1)
	}

	stopAgents(agents)
	for _, a := range agents {
		server.wantAgent(t, a.id(), "said goodbye", func(k Known) bool { return k.Goodbye })
	}
}
