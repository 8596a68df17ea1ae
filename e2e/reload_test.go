package e2e

import (
	"fmt"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// A gateway is reloaded twenty times below sixty agents that talk: with nothing changed, with
// another number of links, another port, another certificate. The agents come back each
// time, and nothing is left of the gateways before.
func TestReloads(t *testing.T) {
	t.Parallel()
	authority := newAuthority(t, "inside")
	identity := authority.issue(t, "gateway")
	server := startServer(t, serverOptions{})
	gateway := startGateway(t, server.url(), func(c config) {
		c.gateway("listener::tls", map[string]any{"cert_file": identity.certFile, "key_file": identity.keyFile})
	})
	gateway.wantLinks(t, 3)
	balancer := through(t, gateway.address) // the agents' way to the gateway, wherever that is
	const n = 60
	agents := startAgents(t, n, "wss://"+balancer.Address(), agentOptions{tls: authority.mutual(nil)})
	stop := make(chan struct{})
	var talking sync.WaitGroup
	for _, a := range agents {
		server.wantAgent(t, a.id(), "is connected", isConnected)
		talking.Go(func() { a.chatUntil(stop) })
	}
	defer talking.Wait()
	stopTalking := sync.OnceFunc(func() { close(stop) })
	defer stopTalking()

	const reloads, every = 20, 4 // every fourth is of the same kind
	links, slowest := 3, time.Duration(0)
	var early usage
	for i := range reloads {
		start := time.Now()
		gateway.reload(t, func(c config) {
			switch i % every {
			case 0:
				links = 8 - links
				c.gateway("server::connections", links)
			case 1:
				address := freeAddress(t)
				c.gateway("listener::endpoint", address)
				balancer.Redirect(address)
			case 2:
				identity = authority.issue(t, "gateway") // in the same files
			}
		})
		gateway.wantReady(t, i+2)
		ready := time.Since(start)
		wantHeardMore(t, agents)
		slowest = max(slowest, time.Since(start)-ready)
		server.wantLinks(t, upstream(links)...)
		require.Equal(t, serial(identity.cert.Leaf), shown(balancer.Address(), authority.mutual(nil)))
		if links == 5 && i%every == every-1 {
			now := gateway.usage(t)
			t.Logf("after %d reloads: %s; the last took %s", i+1, now, ready.Round(time.Millisecond))
			if early == (usage{}) {
				early = now
			}
		}
	}
	t.Logf("agents were back, and had heard three answers, after %s at most", slowest.Round(time.Millisecond))
	for _, a := range agents {
		known := server.known(a.id())
		require.True(t, known.Connected, "%s", a)
		for _, text := range a.everHeard() {
			require.True(t, strings.HasPrefix(text, a.name+": "), "%s hears what is not meant for it: %q", a.name, text)
		}
	}
	require.Len(t, gateway.log.with("Everything is ready"), reloads+1)

	stopTalking()
	talking.Wait()
	eventually(t, func() string { // connections that were only to look at the certificate end
		if now := gateway.usage(t); now.files > early.files {
			return fmt.Sprintf("after %d reloads: %s; after few: %s", reloads, now, early)
		}
		return ""
	})
	require.Less(t, (gateway.usage(t).memory-early.memory)>>20, 30, "MiB of memory more than after few reloads")

	// The process is asked for its goroutines in the one way it answers.
	gateway.Signal(t, syscall.SIGQUIT)
	gateway.wantExit(t)
	goroutines := 0
	in := map[string]int{"(*agentConn).read(": 0, "(*upstreamPool).keep(": 0, "(*upstreamPool).tellStatus(": 0, "(*downstreamServer).serve.": 0, "sweep(": 0}
	for stack := range strings.SplitSeq(gateway.log.String(), "\n\n") {
		if strings.Contains(stack, "\ncreated by ") {
			goroutines++
		}
		for name := range in {
			if strings.Contains(stack, "opampgateway."+name) {
				in[name]++
			}
		}
	}
	t.Logf("%d goroutines, among them %v", goroutines, in)
	require.Equal(t, map[string]int{
		"(*agentConn).read(": n, "(*upstreamPool).keep(": links, "(*upstreamPool).tellStatus(": 1, "(*downstreamServer).serve.": 1, "sweep(": 2,
	}, in)
	// A link has a reader and a writer.
	require.Less(t, goroutines-n-2*links, reloads, "goroutines besides those of agents and links: not one more with each reload")
	require.Empty(t, gateway.log.with("\terror\t"))
}
