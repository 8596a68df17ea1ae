package e2e

import (
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/open-telemetry/opamp-go/protobufs"
	"github.com/stretchr/testify/require"
)

// Not parallel: its subject is speed.
func TestSIGTERM(t *testing.T) {
	server := startServer(t, serverOptions{})
	gateway := startGateway(t, server.url())
	server.wantLinks(t, upstream(3)...)
	agents := make([]*rawAgent, 200)
	for i := range agents {
		agents[i] = connectRaw(t, gateway.url(), nil)
		agents[i].send(t, &protobufs.AgentToServer{SequenceNum: 1})
	}
	for _, a := range agents {
		server.wantAgent(t, a.uid, "is connected", func(k Known) bool { return k.Connected })
	}

	// Half of them are in the middle of a conversation.
	var talking sync.WaitGroup
	for _, a := range agents[:100] {
		talking.Go(a.talk)
	}
	for _, a := range agents[:100] {
		server.wantAgent(t, a.uid, "talks", func(k Known) bool { return k.Messages > 10 })
	}

	gateway.Signal(t, syscall.SIGTERM)
	code, after := gateway.wantExit(t)
	require.Zero(t, code, "exit code")
	require.Less(t, after, 5*time.Second, "until the gateway was gone")
	for _, a := range agents {
		a.wantLetGo(t)
	}
	talking.Wait()
	require.False(t, dialable(gateway.address))
	server.wantLinks(t, []string{}...)
	for _, a := range agents {
		require.False(t, server.known(a.uid).Goodbye, "agents are not said to have left because the gateway does")
	}
	for _, level := range []string{"\terror\t", "\tpanic\t", "\tfatal\t"} {
		require.Empty(t, gateway.log.with(level))
	}
}

// A hundred agents keep talking while the gateway's configuration changes below them.
func TestReloadUnderLoad(t *testing.T) {
	server := startServer(t, serverOptions{})
	gateway := startGateway(t, server.url(), func(c config) { c.gateway("server::agent_id", "edge") })
	server.wantLinks(t, "edge/upstream-0", "edge/upstream-1", "edge/upstream-2")
	agents := startAgents(t, 100, gateway.url(), agentOptions{})
	for _, a := range agents {
		server.wantAgent(t, a.id(), "is connected", isConnected)
	}

	stop := make(chan struct{})
	var talking sync.WaitGroup
	for _, a := range agents {
		talking.Go(func() { a.chatUntil(stop) })
	}
	defer talking.Wait()
	defer close(stop)
	wantHeardMore(t, agents)

	gateway.reload(t, func(c config) { c.gateway("server::connections", 5) })
	gateway.wantReady(t, 2)
	server.wantLinks(t, "edge/upstream-0", "edge/upstream-1", "edge/upstream-2", "edge/upstream-3", "edge/upstream-4")
	wantHeardMore(t, agents)
	for _, a := range agents {
		require.True(t, server.known(a.id()).Connected, "%s", a)
		for _, text := range a.everHeard() {
			require.True(t, strings.HasPrefix(text, a.name+": "), "%s hears what is not meant for it: %q", a.name, text)
		}
	}
	load := slices.Sorted(maps.Values(server.load()))
	require.Len(t, load, 5)
	// Not exactly even: an agent that comes while links are still being dialed has fewer to choose from.
	require.Positive(t, load[0], "agents on the emptiest link")

	// Nothing changed, but somebody wants to be sure.
	gateway.reload(t, func(config) {})
	gateway.wantReady(t, 3)
	wantHeardMore(t, agents)
	server.wantLinks(t, "edge/upstream-0", "edge/upstream-1", "edge/upstream-2", "edge/upstream-3", "edge/upstream-4")
}

// wantHeardMore waits until the server has answered each of them three times more.
func wantHeardMore(t *testing.T, agents []*Agent) {
	t.Helper()
	before := make([]int, len(agents))
	for i, a := range agents {
		before[i] = len(a.everHeard())
	}
	for i, a := range agents {
		eventually(t, func() string {
			if n := len(a.everHeard()); n < before[i]+3 {
				return fmt.Sprintf("%s has heard %d answers, wants %d: %s", a.name, n, before[i]+3, a)
			}
			return ""
		})
	}
}

// A reload with a configuration that is invalid ends the collector: it shuts the old one down
// before it reads the new one. What is left says which key is to blame.
func TestReloadInvalid(t *testing.T) {
	t.Parallel()
	server := startServer(t, serverOptions{})
	gateway := startGateway(t, server.url())
	server.wantLinks(t, upstream(3)...)
	alice := connectRaw(t, gateway.url(), nil)

	gateway.reload(t, func(c config) { c.gateway("server::connections", 0) })
	code, _ := gateway.wantExit(t)
	require.Equal(t, 1, code)
	require.Contains(t, gateway.log.String(), "extensions::opampgateway::server: connections: must be from 1 to 64, is 0")
	alice.wantLetGo(t)
}

// Agents, the server and the gateway stop in whatever order.
func TestStopWhileServerIsAway(t *testing.T) {
	t.Parallel()
	server := startServer(t, serverOptions{})
	gateway := startGateway(t, server.url())
	server.wantLinks(t, upstream(3)...)
	alice := connectRaw(t, gateway.url(), nil)
	alice.send(t, &protobufs.AgentToServer{SequenceNum: 1})
	server.wantAgent(t, alice.uid, "is connected", func(k Known) bool { return k.Connected })

	server.stop(t)
	gateway.wantLog(t, "lost connection to the server")
	alice.send(t, &protobufs.AgentToServer{SequenceNum: 2}) // waits in the gateway
	waiting := make(chan int)
	go func() { // and somebody waits to be let in
		_, resp, _ := dialRaw(gateway.url(), http.Header{}, nil)
		if resp == nil {
			waiting <- 0
			return
		}
		waiting <- resp.StatusCode
	}()

	gateway.Signal(t, syscall.SIGTERM)
	code, after := gateway.wantExit(t)
	require.Zero(t, code)
	require.Less(t, after, 8*time.Second)
	alice.wantLetGo(t)
	require.Contains(t, []int{0, http.StatusServiceUnavailable}, <-waiting)
}

// Two gateways in one collector, each between agents and a server of its own, have nothing to
// do with each other; they are reloaded and end together.
func TestTwoInstances(t *testing.T) {
	t.Parallel()
	names := []string{"a", "b"}
	servers, gateways, agents := map[string]*Server{}, map[string]string{}, map[string]*Agent{}
	metrics := freeAddress(t)
	c := newConfig()
	c.set("service::extensions", []any{"opampgateway/a", "opampgateway/b"})
	c.metrics(t, metrics)
	for i, name := range names {
		servers[name] = startServer(t, serverOptions{})
		address := freeAddress(t)
		gateways[name] = "ws://" + address
		c.set("extensions::opampgateway/"+name+"::server::endpoint", servers[name].url())
		c.set("extensions::opampgateway/"+name+"::server::agent_id", name)
		c.set("extensions::opampgateway/"+name+"::server::connections", 2+i)
		c.set("extensions::opampgateway/"+name+"::listener::endpoint", address)
	}
	collector := startCollector(t, "collector", c)
	wantServed := func(nth int) {
		collector.wantReady(t, nth)
		servers["a"].wantLinks(t, "a/upstream-0", "a/upstream-1")
		servers["b"].wantLinks(t, "b/upstream-0", "b/upstream-1", "b/upstream-2")
		for _, name := range names {
			text := fmt.Sprint(name, " ", nth)
			servers[name].wantAgent(t, agents[name].id(), "is connected", isConnected)
			agents[name].say(t, text)
			agents[name].wantHeard(t, text)
		}
		require.Zero(t, servers["a"].known(agents["b"].id()).Messages)
		require.Zero(t, servers["b"].known(agents["a"].id()).Messages)
	}
	collector.wantReady(t, 1)
	for _, name := range names {
		agents[name] = startAgent(t, name, gateways[name], agentOptions{})
	}
	wantServed(1)
	wantSamples(t, metrics, map[string]float64{`otelcol_opampgateway_connections{direction="upstream"}`: 2 + 3})

	collector.reload(t, func(config) {})
	wantServed(2)
	stopAgents([]*Agent{agents["a"], agents["b"]})
	collector.Signal(t, syscall.SIGTERM)
	code, _ := collector.wantExit(t)
	require.Zero(t, code)
	require.Empty(t, collector.log.with("\terror\t"))
}
