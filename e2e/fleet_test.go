package e2e

import (
	"fmt"
	"net/http"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// The tests of this file have the machine to themselves: they do not call t.Parallel.

// needsFiles skips a test where one process cannot have so many connections.
func needsFiles(t *testing.T, n int) {
	t.Helper()
	if testing.Short() {
		t.Skip("takes long")
	}
	if limit := maxFiles(); limit < uint64(n)+1000 {
		t.Skipf("one process may open %d files only", limit)
	}
}

// The server is gone for 5 s, and asked about ten thousand agents when it is back: no more at
// once than it can bear.
func TestServerAwayFromMany(t *testing.T) {
	const agents = 10_000
	needsFiles(t, agents)
	server := startFleetServer(t, fleetServerOptions{answerAfter: 20 * time.Millisecond})
	gateway := startGateway(t, server.url())
	gateway.wantLinks(t, 3)
	start := time.Now()
	fleet := startFleet(t, agents, gateway.url(), 500)
	last := fleet.wantConnected(t, 2*time.Minute, 1)
	server.wantKnown(t, fleet.agents, ceiling)
	t.Logf("%d agents were connected after %s; questions in flight on one link: %d at most", agents, last.Sub(start), server.mostAsking())
	require.LessOrEqual(t, server.mostAsking(), 128)

	took := away(t, server, gateway, fleet, 1, time.Minute)
	most := 0
	for _, l := range server.open() {
		most = max(most, l.mostAsking)
	}
	t.Logf("all were reachable %s after the server's return; questions in flight on one link: %d at most; the gateway uses %s", took, most, gateway.usage(t))
	require.LessOrEqual(t, most, 64)
	require.Equal(t, 2*agents, server.asked(), "questions in all")
}

// Two thousand agents come at once to a server that takes its time.
func TestManyHandshakes(t *testing.T) {
	const agents = 2000
	server := startFleetServer(t, fleetServerOptions{answerAfter: 2 * time.Second})
	gateway := startGateway(t, server.url())
	gateway.wantLinks(t, 3)
	start := time.Now()
	fleet := startFleet(t, agents, gateway.url(), agents)
	last := fleet.wantConnected(t, ceiling, 1)
	most := server.mostAsking()
	t.Logf("all %d were let in after %s; questions in flight on one link: %d at most", agents, last.Sub(start), most)
	require.LessOrEqual(t, most, 128)
	require.Greater(t, most, 100)
	require.Equal(t, agents, server.asked())
	server.wantKnown(t, fleet.agents, ceiling)
	fleet.wantUndisturbed(t)
}

// A full gateway reloads, which disturbs nobody who talks meanwhile; then its listener is changed, and all of its agents
// come back at once.
func TestManyAgentsReload(t *testing.T) {
	const agents = 15_000
	needsFiles(t, agents)
	server := startFleetServer(t, fleetServerOptions{})
	gateway := startGateway(t, server.url())
	gateway.wantLinks(t, 3)

	start := time.Now()
	fleet := startFleet(t, agents, gateway.url(), agents)
	last := fleet.wantConnected(t, 2*time.Minute, 1)
	server.wantKnown(t, fleet.agents, ceiling)
	t.Logf("%d agents were connected after %s; the gateway uses %s", agents, last.Sub(start), gateway.usage(t))
	fleet.wantUndisturbed(t)

	const rollouts = 5
	stop := fleet.talk(t, 7*time.Second) // 2,000 messages a second
	said := fleet.said()
	for i := range rollouts {
		gateway.rollOut(t)
		gateway.wantReady(t, i+2)
		enough := fleet.said() + agents/10
		eventually(t, func() string {
			if now := fleet.said(); now < enough {
				return fmt.Sprintf("%d messages were said, want %d", now, enough)
			}
			return ""
		})
	}
	stop()
	t.Logf("%d messages during %d rollouts; the gateway uses %s", fleet.said()-said, rollouts, gateway.usage(t))
	server.wantHeard(t, fleet.agents, time.Minute)
	fleet.wantUndisturbed(t)
	repeated, missing := server.wantHistory(t, fleet.agents)
	require.Zero(t, repeated)
	require.Zero(t, missing)
	require.Equal(t, agents, server.asked(), "questions in all")

	start = time.Now()
	gateway.reload(t, func(c config) { c.gateway("listener::read_header_timeout", "29s") })
	gateway.wantReady(t, rollouts+2)
	ready := time.Since(start)
	last = fleet.wantConnected(t, 2*time.Minute, 2)
	server.wantReachable(t, fleet.agents, time.Minute)
	t.Logf("the reload took %s; all were back after %s; the gateway uses %s; refusals: %v",
		ready, last.Sub(start), gateway.usage(t), fleet.refusals())
	require.Zero(t, fleet.refusals()[http.StatusServiceUnavailable], "refusals: %v", fleet.refusals())
	for _, a := range fleet.agents {
		a.mu.Lock()
		ends, refusals := a.ends, a.refusals
		a.mu.Unlock()
		require.Len(t, ends, 1)
		require.Zero(t, ends[0].code, "an end for no fault of the agent's has no close frame: %v", ends[0].err)
		for _, r := range refusals { // while nobody listens
			require.Zero(t, r.status, "%v", r.err)
		}
	}
	fleet.wantOrder(t)
}
