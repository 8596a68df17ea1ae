package e2e

import (
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/gorilla/websocket"
	"github.com/open-telemetry/opamp-go/protobufs"
	"github.com/stretchr/testify/require"
)

const (
	// budget is what messages may take of the gateway's memory by default, garbage what Go's
	// collector may leave lying about for a while. What was used before comes on top.
	budget, garbage = 256 << 20, 120 << 20

	// promptly is how long those may wait whom it does not concern, on a busy machine.
	promptly = 5 * time.Second
)

// numbered is a text of some size that begins with its number.
func numbered(i, size int) string { return fmt.Sprintf("%09d ", i) + strings.Repeat("x", size-10) }

// wantNumbered checks that the texts are the first of those numbered from 0.
func wantNumbered(t *testing.T, texts []string) {
	t.Helper()
	for i, text := range texts {
		require.Equal(t, fmt.Sprintf("%09d ", i), text[:min(10, len(text))], "message %d is lost, or out of order", i)
	}
}

func faults(t *testing.T, metrics, reason string) int {
	t.Helper()
	return int(samples(t, metrics)[fmt.Sprintf("otelcol_opampgateway_faults{reason=%q}", reason)])
}

// An agent stops reading while the server pushes to it: it is let go when 4 MiB wait for it.
// Others on the same link do not notice.
func TestStalledAgent(t *testing.T) {
	t.Parallel()
	server := startServer(t, serverOptions{})
	metrics := freeAddress(t)
	gateway := startGateway(t, server.url(), func(c config) {
		c.gateway("server::connections", 1)
		c.metrics(t, metrics)
	})
	gateway.wantLinks(t, 1)
	alice := connectDeaf(t, gateway.url(), nil)
	alice.send(t, &protobufs.AgentToServer{SequenceNum: 1})
	server.wantAgent(t, alice.uid, "is connected", func(k Known) bool { return k.Connected })
	others := startBystanders(t, gateway, 3)

	const size = 64 << 10
	pushed := 0
	for faults(t, metrics, "agent_slow") == 0 {
		require.Less(t, pushed, 64<<20, "bytes pushed to an agent that does not read")
		for range 16 {
			server.tell(t, alice.uid, numbered(pushed/size, size))
			pushed += size
		}
	}
	t.Logf("let go when %d KiB had been pushed", pushed>>10)
	require.Greater(t, pushed, 4<<20, "bytes pushed when the agent was let go")
	within(t, 15*time.Second, func() string { // long before a write that makes no progress would have ended it
		if !server.known(alice.uid).Goodbye {
			return "the agent has not been let go"
		}
		return ""
	})
	gateway.wantLog(t, "info", "agent reads too slowly", clientAt(alice.ws.LocalAddr().String()))

	alice.listen()
	_ = alice.wantEnded(t) // by a close frame, if there was room for one
	require.NotEmpty(t, alice.chats())
	wantNumbered(t, alice.chats()) // what she got is without a gap
	others.wantServed(t, promptly)
}

// An agent that pauses for a moment loses nothing of what is pushed meanwhile.
func TestPausedAgent(t *testing.T) {
	t.Parallel()
	server := startServer(t, serverOptions{})
	gateway := startGateway(t, server.url())
	gateway.wantLinks(t, 3)
	for _, test := range []struct{ n, size int }{
		{4 << 10, 1 << 10}, {1 << 10, 4 << 10}, {64, 64 << 10}, {4, 1 << 20}, {1, 20 << 20},
	} {
		t.Run(fmt.Sprintf("%d messages of %d KiB", test.n, test.size>>10), func(t *testing.T) {
			t.Parallel()
			alice := connectDeaf(t, gateway.url(), nil)
			alice.send(t, &protobufs.AgentToServer{SequenceNum: 1})
			server.wantAgent(t, alice.uid, "is connected", func(k Known) bool { return k.Connected })
			over := time.After(3 * time.Second)
			for i := range test.n {
				server.tell(t, alice.uid, numbered(i, test.size-100)) // 4 MiB with all that is around them
			}
			<-over
			alice.listen()
			eventually(t, func() string {
				if got := len(alice.chats()); got < test.n {
					return fmt.Sprintf("%d messages have arrived; the connection's end: %v", got, alice.ended())
				}
				return ""
			})
			wantNumbered(t, alice.chats())
			alice.wantOpen(t)
		})
	}
}

// An agent takes nothing of the little that waits for it: it is let go after 30 s. Some more
// pass because Linux at first takes what it had room for all along.
func TestAgentTakesNothing(t *testing.T) {
	t.Parallel()
	for _, over := range []string{"TCP", "TLS"} {
		t.Run("over "+over, func(t *testing.T) {
			t.Parallel()
			authority := newAuthority(t, "inside")
			identity := authority.issue(t, "gateway")
			server := startServer(t, serverOptions{})
			metrics := freeAddress(t)
			gateway := startGateway(t, server.url(), func(c config) {
				c.metrics(t, metrics)
				if over == "TLS" {
					c.gateway("listener::tls", map[string]any{"cert_file": identity.certFile, "key_file": identity.keyFile})
				}
				c.gateway("agents::keep_alive", map[string]any{"interval": "5m", "timeout": "10m"}) // that is another test's subject
			})
			gateway.wantLinks(t, 3)
			alice := connectDeaf(t, gateway.url(), authority.mutual(nil))
			alice.send(t, &protobufs.AgentToServer{SequenceNum: 1})
			server.wantAgent(t, alice.uid, "is connected", func(k Known) bool { return k.Connected })

			// Nobody knows how much the two systems take in between: pushed until nothing moves any more.
			const size, piece = 64 << 10, 8
			relayed := func() int { return int(samples(t, metrics)[`otelcol_opampgateway_messages{direction="downstream"}`]) }
			moves := func(pushed int) bool {
				for deadline := time.Now().Add(3 * time.Second); time.Now().Before(deadline); {
					if relayed() >= pushed {
						return true
					}
				}
				return false
			}
			pushed := 0
			start := time.Now()
			for ; moves(pushed); pushed += piece {
				require.Less(t, pushed*size, 64<<20, "bytes pushed to an agent that does not read")
				start = time.Now()
				for i := range piece {
					server.tell(t, alice.uid, numbered(pushed+i, size))
				}
			}
			for i := range 2 << 20 / size { // Linux still takes some, but does not say so
				server.tell(t, alice.uid, numbered(pushed+i, size))
			}
			require.Zero(t, faults(t, metrics, "agent_slow"))
			within(t, 2*time.Minute, func() string {
				if !server.known(alice.uid).Goodbye {
					return "the agent has not been let go"
				}
				return ""
			})
			after := time.Since(start)
			t.Logf("let go after %s", after.Round(time.Second))
			require.Greater(t, after, 29*time.Second)
			require.Less(t, after, 75*time.Second)
			require.Equal(t, 1, faults(t, metrics, "agent_slow"))
		})
	}
}

// heap watches what memory a gateway needs above what it had before.
type heap struct {
	gateway *Gateway
	before  int
}

func watchHeap(t *testing.T, gateway *Gateway) *heap {
	t.Helper()
	return &heap{gateway, gateway.usage(t).memory}
}

func (h *heap) peak(t *testing.T) int {
	t.Helper()
	peak := h.gateway.usage(t).peak - h.before
	require.Less(t, peak>>20, 2<<10, "MiB of memory more than before: the test ends before the machine does")
	return peak
}

// wantBounded checks that messages took no more than they may, with what Go leaves lying about.
func (h *heap) wantBounded(t *testing.T) {
	t.Helper()
	peak := h.peak(t)
	t.Logf("memory: %s, which is %d MiB more than before", h.gateway.usage(t), peak>>20)
	// Three quarters of the budget may be in use, of which Go lets its heap grow to twice.
	require.Less(t, peak>>20, (budget/4*6+garbage)>>20, "MiB of memory more than before")
}

// A hundred agents stall, with 8 MiB for each of them on the way: not parallel, since the
// tests themselves take their part of the machine's memory.
func TestMemoryOfStalledAgents(t *testing.T) {
	for _, test := range []struct {
		name    string
		n, size int // for each of them
	}{{"in many messages", 128, 64 << 10}, {"in one message", 1, 8 << 20}} {
		t.Run(test.name, func(t *testing.T) {
			server := startServer(t, serverOptions{})
			metrics := freeAddress(t)
			gateway := startGateway(t, server.url(), func(c config) { c.metrics(t, metrics) })
			gateway.wantLinks(t, 3)
			connected := func(connect func() *rawAgent) []*rawAgent {
				agents := make([]*rawAgent, 100)
				for i := range agents {
					agents[i] = connect()
					agents[i].send(t, &protobufs.AgentToServer{SequenceNum: 1})
				}
				for _, a := range agents {
					server.wantAgent(t, a.uid, "is connected", func(k Known) bool { return k.Connected })
				}
				return agents
			}
			stalled := connected(func() *rawAgent { return connectDeaf(t, gateway.url(), nil) })
			memory := watchHeap(t, gateway)
			others := startBystanders(t, gateway, 6)
			for i := range test.n {
				for _, a := range stalled {
					server.tell(t, a.uid, numbered(i, test.size))
				}
				memory.peak(t)
			}
			t.Logf("8 MiB are pushed to each of 100 agents; let go because too much waits: %d, because memory is full: %d",
				faults(t, metrics, "agent_slow"), faults(t, metrics, "memory_full"))
			others.wantServed(t, promptly)

			closeAll(stalled)
			for _, a := range stalled {
				server.wantAgent(t, a.uid, "has left", func(k Known) bool { return k.Goodbye })
			}
			// What they had is there for others.
			before := faults(t, metrics, "memory_full")
			for _, a := range connected(func() *rawAgent { return connectRaw(t, gateway.url(), nil) }) {
				server.tell(t, a.uid, numbered(0, 4<<20))
				a.wantMessage(t, "of 4 MiB", func(m *protobufs.ServerToAgent) bool { return len(m.GetCustomMessage().GetData()) == 4<<20 })
				a.ws.Close()
			}
			require.Equal(t, before, faults(t, metrics, "memory_full"))
			memory.wantBounded(t)
		})
	}
}

// A hundred agents stop in the middle of a message of 60 MiB. Not parallel, for the same reason.
func TestMemoryOfHalfMessages(t *testing.T) {
	server := startServer(t, serverOptions{})
	metrics := freeAddress(t)
	gateway := startGateway(t, server.url(), func(c config) { c.metrics(t, metrics) })
	gateway.wantLinks(t, 3)
	halves := make([]*rawAgent, 100)
	for i := range halves {
		halves[i] = connectRaw(t, gateway.url(), nil)
		halves[i].send(t, &protobufs.AgentToServer{SequenceNum: 1})
		server.wantAgent(t, halves[i].uid, "is connected", func(k Known) bool { return k.Connected })
	}
	memory := watchHeap(t, gateway)
	others := startBystanders(t, gateway, 6)
	large := connectRaw(t, gateway.url(), nil)

	var written atomic.Int64
	var writing sync.WaitGroup
	defer writing.Wait()
	defer closeAll(halves)
	zeros := make([]byte, 64<<10)
	for _, a := range halves {
		writing.Go(func() { // ends when half of the message is written, or with the connection
			conn := a.ws.NetConn()
			if _, err := conn.Write(messageHeader(60 << 20)); err != nil {
				return
			}
			for range 30 << 20 / len(zeros) {
				n, err := conn.Write(zeros)
				written.Add(int64(n))
				if err != nil {
					return
				}
			}
		})
	}

	// Others are served until they get no further, and at least as long as it takes the gateway
	// to look after all connections twice.
	slowest := time.Duration(0)
	begin := time.Now()
	for last, rounds := int64(-1), 0; rounds < 10 || time.Since(begin) < 12*time.Second; rounds++ {
		require.Less(t, time.Since(begin), 2*time.Minute, "%d MiB are written, and still more are taken", written.Load()>>20)
		start := time.Now()
		text := numbered(rounds, 1<<20)
		large.send(t, &protobufs.AgentToServer{CustomMessage: chatMessage(text)})
		eventually(t, func() string {
			memory.peak(t)
			if !slices.Contains(large.chats(), text) {
				return fmt.Sprintf("a message of 1 MiB has no answer, with %d MiB of half messages written; %s", written.Load()>>20, gateway.usage(t))
			}
			return ""
		})
		slowest = max(slowest, time.Since(start))
		if now := written.Load(); now != last {
			last, rounds = now, 0
		}
	}
	t.Logf("%d MiB of 100 half messages are written, memory was full %d times; meanwhile 1 MiB there and back took %s at most",
		written.Load()>>20, faults(t, metrics, "memory_full"), slowest.Round(time.Millisecond))
	require.Less(t, slowest, promptly, "a message of 1 MiB, there and back")
	others.wantServed(t, promptly)

	// When they are gone, what they had is there for others.
	closeAll(halves)
	for _, a := range halves {
		server.wantAgent(t, a.uid, "has left", func(k Known) bool { return k.Goodbye })
	}
	for range 10 {
		a := connectRaw(t, gateway.url(), nil)
		a.send(t, &protobufs.AgentToServer{CustomMessage: &protobufs.CustomMessage{Capability: "io.opampgateway.e2e.load", Data: make([]byte, 20<<20)}})
		server.wantAgent(t, a.uid, "has sent 20 MiB", func(k Known) bool { return k.Messages == 1 })
	}
	memory.wantBounded(t)
}

// Agents send messages above the limit, all at once: none is ever held whole, and the agents are
// let go, late. One of just the limit is relayed.
func TestMemoryOfOversizedMessages(t *testing.T) {
	server := startServer(t, serverOptions{})
	metrics := freeAddress(t)
	gateway := startGateway(t, server.url(), func(c config) { c.metrics(t, metrics) })
	gateway.wantLinks(t, 3)
	memory := watchHeap(t, gateway)
	others := startBystanders(t, gateway, 6)

	const limit, n = 64 << 20, 5
	oversized := make([]*rawAgent, n)
	var writing sync.WaitGroup
	defer writing.Wait()
	for i := range oversized {
		oversized[i] = connectRaw(t, gateway.url(), nil)
		conn := oversized[i].ws.NetConn()
		writing.Go(func() { // ends with the connection at the latest
			_, err := conn.Write(messageHeader(100 << 20))
			zeros := make([]byte, 64<<10)
			for range 100 << 20 / len(zeros) {
				if err != nil {
					return
				}
				_, err = conn.Write(zeros)
			}
		})
	}
	defer closeAll(oversized)
	for _, a := range oversized {
		a.wantClosed(t, websocket.CloseMessageTooBig)
	}
	require.Equal(t, n, faults(t, metrics, "too_large"))
	others.wantServed(t, promptly)

	largest := connectRaw(t, gateway.url(), nil)
	data := make([]byte, limit-100)
	size := largest.send(t, &protobufs.AgentToServer{CustomMessage: &protobufs.CustomMessage{Capability: "io.opampgateway.e2e.load", Data: data}})
	require.LessOrEqual(t, size, limit)
	server.wantAgent(t, largest.uid, "has sent 64 MiB", func(k Known) bool { return k.Messages == 1 })
	memory.wantBounded(t)
}
