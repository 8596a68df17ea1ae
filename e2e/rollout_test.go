package e2e

import (
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/gorilla/websocket"
	"github.com/stretchr/testify/require"
)

// rollOut has a collector take up a configuration in which a pipeline has changed, and nothing of the gateway.
func (g *Gateway) rollOut(t *testing.T) {
	t.Helper()
	g.reload(t, func(c config) { c.set("receivers::otlp::protocols::grpc::endpoint", freeAddress(t)) })
}

// Twenty rollouts disturb none of two hundred agents that talk, nor the server.
func TestRollouts(t *testing.T) {
	for _, over := range []string{"TCP", "TLS"} {
		t.Run(over, func(t *testing.T) {
			authority := newAuthority(t, "inside")
			identity := authority.issue(t, "gateway")
			server := startServer(t, serverOptions{})
			metrics := freeAddress(t)
			gateway := startGateway(t, server.url(), func(c config) {
				c.metrics(t, metrics)
				if over == "TLS" {
					c.gateway("listener::tls", map[string]any{"cert_file": identity.certFile, "key_file": identity.keyFile})
				}
			})
			gateway.wantLinks(t, 3)
			var trusting *tls.Config
			if over == "TLS" {
				trusting = authority.mutual(nil)
			}
			const n, rollouts = 200, 20
			agents := startAgents(t, n, gateway.url(), agentOptions{tls: trusting})
			for _, a := range agents {
				server.wantAgent(t, a.id(), "is connected", isConnected)
			}
			stop := make(chan struct{})
			var talking sync.WaitGroup
			for _, a := range agents {
				talking.Go(func() { a.count(t, stop) })
			}
			defer talking.Wait()
			stopTalking := sync.OnceFunc(func() { close(stop) })
			defer stopTalking()
			wantHeardMore(t, agents)
			asked := len(server.asked())
			before := gateway.usage(t)

			ready := 1
			for i := range rollouts {
				gateway.rollOut(t)
				if ready++; i%5 == 4 { // and at once another one
					time.Sleep(50 * time.Millisecond)
					gateway.rollOut(t)
				}
				eventually(t, func() string {
					if going := len(gateway.log.with("going on with the connections", `"links": 3`)); going < ready-1 {
						return fmt.Sprintf("gone on %d times, want %d", going, ready-1)
					}
					return ""
				})
				wantHeardMore(t, agents)
				ready = 1 + len(gateway.log.with("going on with the connections"))
			}
			stopTalking()
			talking.Wait()
			t.Logf("before: %s; after %d rollouts: %s", before, ready-1, gateway.usage(t))
			said := 0
			for _, a := range agents {
				a.wantConnects(t, 1)
				a.wantFailures(t, 0)
				known := server.known(a.id())
				require.True(t, known.Connected)
				require.False(t, known.Goodbye)
				for i, text := range known.Chats { // and the agent has heard that, or would not have gone on
					require.Equal(t, a.numbered(i), text, "in order, each once")
				}
				said += len(known.Chats)
			}
			t.Logf("%d messages were answered", said)
			gateway.wantLinks(t, 3)
			server.wantLinks(t, upstream(3)...)
			require.Len(t, server.asked(), asked, "nobody was asked about again")
			require.Empty(t, gateway.log.with("lost connection to the server"))
			require.Empty(t, gateway.log.with("\terror\t"))
			eventually(t, func() string {
				if now := gateway.usage(t); now.files > before.files+2 {
					return fmt.Sprintf("now %s, before %s", now, before)
				}
				return ""
			})
			require.Less(t, (gateway.usage(t).memory-before.memory)>>20, 40, "MiB more than before")
			wantSamples(t, metrics, map[string]float64{
				`otelcol_opampgateway_connections{direction="upstream"}`:   3,
				`otelcol_opampgateway_connections{direction="downstream"}`: n,
			})

			// A process that is told to end while it reloads ends.
			gateway.rollOut(t)
			gateway.Signal(t, syscall.SIGTERM)
			code, after := gateway.wantExit(t)
			require.Zero(t, code)
			require.Less(t, after, 8*time.Second)
			require.False(t, dialable(gateway.address))
			server.wantLinks(t, []string{}...)
		})
	}
}

// count is chatUntil for an agent of which nothing gets lost: what is not answered is not said again.
func (a *Agent) count(t *testing.T, stop <-chan struct{}) {
	t.Helper()
	for i := 0; ; i++ {
		if err := a.trySay(a.numbered(i)); err != nil {
			t.Errorf("%s: %v", a.name, err)
			return
		}
		for !a.hasHeard(a.numbered(i)) {
			a.mu.Lock()
			news := a.news
			a.mu.Unlock()
			if a.hasHeard(a.numbered(i)) {
				break
			}
			select {
			case <-news:
			case <-time.After(ceiling):
				t.Errorf("%s has no answer to %q", a.name, a.numbered(i))
				return
			}
		}
		select {
		case <-stop:
			return
		default:
		}
	}
}

func (a *Agent) numbered(i int) string { return fmt.Sprint(a.name, ": ", i) }

// A rollout that fails since a port is busy ends the collector; nothing of the gateway is left.
func TestRolloutAtBusyPort(t *testing.T) {
	t.Parallel()
	busy, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	t.Cleanup(func() { busy.Close() })
	for name, key := range map[string]string{
		"the gateway's": "extensions::opampgateway::listener::endpoint",
		"a receiver's":  "receivers::otlp::protocols::grpc::endpoint",
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			server := startServer(t, serverOptions{})
			gateway := startGateway(t, server.url())
			gateway.wantLinks(t, 3)
			alice := connectRaw(t, gateway.url(), nil)
			alice.exchange(t, "I am alice")
			gateway.reload(t, func(c config) { c.set(key, busy.Addr().String()) })
			code, after := gateway.wantExit(t)
			require.Equal(t, 1, code)
			require.Less(t, after, 8*time.Second)
			alice.wantLetGo(t)
			server.wantLinks(t, []string{}...)
		})
	}
}

// okHTTP is a client as the Java agents of this field are: a close frame is the last that it hears, and it comes back
// when its connection ends in any other way.
type okHTTP struct {
	url      string
	connects atomic.Int64
	goodbye  atomic.Bool // it has got a close frame, and stays away
	stop     chan struct{}
	life     sync.WaitGroup
}

func startOKHTTP(t *testing.T, url string) *okHTTP {
	t.Helper()
	c := &okHTTP{url: url, stop: make(chan struct{})}
	c.life.Go(c.live)
	t.Cleanup(func() {
		close(c.stop)
		c.life.Wait()
	})
	return c
}

func (c *okHTTP) live() {
	for {
		if ws, _, err := dialRaw(c.url, nil, nil); err == nil {
			c.connects.Add(1)
			c.life.Go(func() {
				<-c.stop
				ws.Close()
			})
			for err == nil {
				_, _, err = ws.ReadMessage()
			}
			ws.Close()
			var frame *websocket.CloseError
			if errors.As(err, &frame) && frame.Code != websocket.CloseAbnormalClosure {
				c.goodbye.Store(true)
				return
			}
		}
		select {
		case <-time.After(200 * time.Millisecond):
		case <-c.stop:
			return
		}
	}
}

// A client that takes a close frame for good is back in seconds when the listener has changed, or the gateway has stopped.
func TestRolloutAndJavaClient(t *testing.T) {
	t.Parallel()
	server := startServer(t, serverOptions{})
	gateway := startGateway(t, server.url())
	gateway.wantLinks(t, 3)
	client := startOKHTTP(t, gateway.url())
	wantConnects := func(n int64) {
		t.Helper()
		within(t, 10*time.Second, func() string {
			if now := client.connects.Load(); now != n || client.goodbye.Load() {
				return fmt.Sprintf("%d connections, want %d; told goodbye: %t", now, n, client.goodbye.Load())
			}
			return ""
		})
	}
	wantConnects(1)
	gateway.rollOut(t)
	gateway.wantReady(t, 2)
	wantConnects(1)
	gateway.reload(t, func(c config) { c.gateway("listener::read_header_timeout", "20s") })
	gateway.wantReady(t, 3)
	wantConnects(2)
	gateway.Signal(t, syscall.SIGTERM)
	_, _ = gateway.wantExit(t)
	again := launchGateway(t, "again", gatewayConfig(server.url(), gateway.address))
	again.wantReady(t, 1)
	wantConnects(3)
}

// The collector's own telemetry takes long to shut down, since what it exports to answers late: agents that are
// collectors themselves keep their connections all the while. (If it does not answer at all, the collector ends.)
func TestRolloutThatHangs(t *testing.T) {
	t.Parallel()
	const late = 6 * time.Second
	exports := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		select {
		case <-time.After(late):
		case <-r.Context().Done():
		}
	}))
	t.Cleanup(exports.Close)
	server := startServer(t, serverOptions{})
	gateway := startGateway(t, server.url(), func(c config) {
		c.set("service::telemetry::metrics", map[string]any{"readers": []any{map[string]any{"periodic": map[string]any{
			"interval": 3_600_000, // so that it is the end that hangs
			"exporter": map[string]any{"otlp": map[string]any{"protocol": "http/protobuf", "endpoint": exports.URL + "/v1/metrics"}},
		}}}})
	})
	gateway.wantLinks(t, 3)
	alice := uuid.Must(uuid.NewV7())
	startCollector(t, "alice", agentConfig(gateway.url(), alice))
	server.wantAgent(t, alice, "is healthy", func(k Known) bool { return k.Health.GetHealthy() })
	bob := connectRaw(t, gateway.url(), nil)
	bob.exchange(t, "I am bob")
	asked, begun := len(server.asked()), time.Now()

	gateway.rollOut(t)
	for i := 0; len(gateway.log.with("going on with the connections")) == 0; i++ {
		bob.exchange(t, fmt.Sprintf("bob says %d", i))
		require.Less(t, time.Since(begun), 2*time.Minute)
		time.Sleep(50 * time.Millisecond) // at the pace of an agent
	}
	t.Logf("the rollout took %s", time.Since(begun).Round(time.Millisecond))
	require.Greater(t, time.Since(begun), late, "it does not hang")
	bob.exchange(t, "I am still bob")
	require.Len(t, server.asked(), asked, "nobody has come again")
	require.True(t, server.known(alice).Connected)
	require.False(t, server.known(alice).Goodbye)
	connectRaw(t, gateway.url(), nil).exchange(t, "I am new")
}
