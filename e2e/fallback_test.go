package e2e

import (
	"fmt"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// The server dies, and comes back. Meanwhile agents are at another server, to which the gateway has brought them; at the end
// each is at the first one again, and at no other. None of them has lost its connection.
func TestFallback(t *testing.T) {
	t.Parallel()
	const agents = 30
	first, second := startServer(t, serverOptions{}), startServer(t, serverOptions{})
	metrics := freeAddress(t)
	gateway := startGateway(t, first.url(), func(c config) {
		c.gateway("server::fallback_endpoints", []any{second.url()})
		c.set("service::telemetry::metrics::level", "normal")
		c.metrics(t, metrics)
	})
	first.wantLinks(t, upstream(3)...)
	fleet := startAgents(t, agents, gateway.url(), agentOptions{})
	wantAt := func(s, other *Server, limit time.Duration, endpoint float64) {
		t.Helper()
		within(t, limit, func() string {
			for _, a := range fleet {
				if !isConnected(s.known(a.id())) {
					return fmt.Sprintf("%s is not at its server", a)
				}
				if other.known(a.id()).Connected {
					return fmt.Sprintf("%s is at both servers", a)
				}
			}
			return ""
		})
		s.wantLinks(t, upstream(3)...)
		for i, a := range fleet { // there and back again
			text := fmt.Sprintf("%d at %v", i, endpoint)
			a.say(t, text)
			a.wantHeard(t, text)
			s.tell(t, a.id(), "told "+text)
			a.wantHeard(t, "told "+text)
		}
		wantSamples(t, metrics, map[string]float64{"otelcol_opampgateway_endpoint": endpoint})
	}

	wantAt(first, second, 20*time.Second, 0)
	first.stop(t)
	wantAt(second, first, 40*time.Second, 1)
	first.start(t)
	wantAt(first, second, 2*time.Minute, 0)
	require.Empty(t, second.linkNames())
	for _, a := range fleet {
		a.wantConnects(t, 1)
	}
	require.Len(t, gateway.log.with("going to another of its endpoints"), 1)
	require.Len(t, gateway.log.with("links go back to it"), 1)
}
