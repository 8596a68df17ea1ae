package e2e

import (
	"fmt"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/open-telemetry/opamp-go/protobufs"
	"github.com/stretchr/testify/require"
)

// Some connections stop in the middle of large messages, of sizes that together take all the
// memory there is for them, and one sends such a message as slowly as it may. Heartbeats, reports
// and newcomers get through. Not parallel, since it is a matter of time and memory.
func TestStoppedInTheMiddle(t *testing.T) {
	server := startServer(t, serverOptions{})
	gateway := startGateway(t, server.url())
	gateway.wantLinks(t, 3)
	alice, bob := connectRaw(t, gateway.url(), nil), connectRaw(t, gateway.url(), nil)
	alice.exchange(t, "hello")
	bob.exchange(t, "hello")
	memory := watchHeap(t, gateway)

	const largest = 64 << 20
	var sending sync.WaitGroup
	defer sending.Wait()
	var attackers []*rawAgent
	defer func() { closeAll(attackers) }()
	// begin sends the beginning of a message, and then a piece ten times a second, if there is one.
	begin := func(size uint32, sent, piece int) {
		a := connectRaw(t, gateway.url(), nil)
		attackers = append(attackers, a)
		conn := a.ws.NetConn()
		sending.Go(func() { // ends with what is sent, or the connection
			_, err := conn.Write(append(messageHeader(size), make([]byte, sent)...))
			tick := time.NewTicker(100 * time.Millisecond)
			defer tick.Stop()
			for err == nil && piece > 0 {
				<-tick.C
				_, err = conn.Write(make([]byte, piece))
			}
		})
	}
	// A gateway that makes room as a message grows has made it for the whole message by then.
	for size := uint32(16 << 20); size >= 64<<10; size /= 2 {
		for range 3 {
			begin(size, int(size/4)+1, 0)
		}
	}
	begin(largest, 1, 23<<10)
	for range 5 {
		begin(largest, 1, 0)
	}

	const limit = 2 * time.Second // a second is meant, on a machine that has one to spare
	took := func(what string, do func()) {
		start := time.Now()
		do()
		require.Less(t, time.Since(start), limit, what)
	}
	start := time.Now()
	for i := 0; time.Since(start) < 6*time.Second; i++ {
		took("a heartbeat", func() { alice.exchange(t, fmt.Sprint("heartbeat ", i)) })
		took("a report of 100 KiB", func() { bob.exchange(t, numbered(i, 100<<10)) })
		took("a newcomer and its report of 20 KiB", func() {
			a := connectRaw(t, gateway.url(), nil)
			a.exchange(t, numbered(i, 20<<10))
			a.ws.Close()
		})
	}
	memory.wantBounded(t)
	// A large message gets through, too, when those who make no progress are gone.
	connectRaw(t, gateway.url(), nil).exchange(t, numbered(0, 10<<20))
}

// The server states custom capabilities of 32 MiB. They are not kept, let alone once for each agent.
func TestMemoryOfCapabilities(t *testing.T) {
	server := startBareServer(t)
	metrics := freeAddress(t)
	gateway := startGateway(t, server.url(), func(c config) { c.metrics(t, metrics) })
	gateway.wantLinks(t, 3)
	agents := make([]*rawAgent, 50)
	for i := range agents {
		agents[i] = connectRaw(t, gateway.url(), nil)
		agents[i].exchange(t, "hello")
	}
	memory := watchHeap(t, gateway)
	var capabilities []string
	for size := 0; size < 32<<20; {
		capabilities = append(capabilities, fmt.Sprintf("%08d%s", len(capabilities), strings.Repeat("x", 100)))
		size += 110
	}
	// Whether the one whom these are for takes so much is not the subject.
	target := connectRaw(t, gateway.url(), nil)
	target.exchange(t, "hello")
	for _, l := range server.all() {
		require.NoError(t, l.push(&protobufs.ServerToAgent{
			InstanceUid: target.uid[:], CustomCapabilities: &protobufs.CustomCapabilities{Capabilities: capabilities},
		}))
	}
	for i, a := range agents {
		a.exchange(t, fmt.Sprint("still here ", i))
		a.wantOpen(t)
	}
	// What was not addressed to an agent is not said to it, or at most in so many bytes.
	for _, a := range agents {
		a.mu.Lock()
		own := a.own
		a.mu.Unlock()
		require.LessOrEqual(t, own, 65<<10, "bytes of capabilities that an agent was told by the gateway")
	}
	for _, l := range server.all() {
		l.wantOpen(t)
	}
	memory.wantBounded(t)
}

// Who answers the gateway's own handshake goes on for ever. Not parallel, since it is a matter of
// memory.
func TestEndlessHandshake(t *testing.T) {
	const status = "HTTP/1.1 101 Switching Protocols\r\n"
	noise := strings.Repeat("x", 64<<10)
	for _, test := range []struct{ name, first, then string }{
		{"line of header", status + "X: ", noise},
		{"header", status, strings.Repeat("X: x\r\n", 10<<10)},
		{"status line", "HTTP/1.1 101 ", noise},
		{"interim answers", "", strings.Repeat("HTTP/1.1 100 Continue\r\n\r\n", 1<<10)},
		{"refusal", "HTTP/1.1 403 Forbidden\r\nTransfer-Encoding: chunked\r\n\r\n", "10000\r\n" + noise + "\r\n"},
	} {
		t.Run(test.name, func(t *testing.T) {
			var serving sync.WaitGroup
			t.Cleanup(serving.Wait)
			listener, err := net.Listen("tcp", "127.0.0.1:0")
			require.NoError(t, err)
			t.Cleanup(func() { listener.Close() })
			serving.Go(func() { // ends with the listener
				for {
					conn, err := listener.Accept()
					if err != nil {
						return
					}
					serving.Go(func() { // ends with the connection, or when a machine would feel it
						defer conn.Close()
						_, err := conn.Write([]byte(test.first))
						for range 128 << 20 / len(test.then) {
							if err != nil {
								return
							}
							_, err = conn.Write([]byte(test.then))
						}
					})
				}
			})
			c := gatewayConfig("ws://"+listener.Addr().String()+"/v1/opamp", freeAddress(t))
			gateway := launchGateway(t, "gateway", c)
			gateway.wantLog(t, "warn", "cannot connect to the server")
			peak := 0
			throughout(t, 2*time.Second, func() string {
				peak = gateway.usage(t).peak
				if peak > 128<<20 {
					return fmt.Sprintf("the gateway has %d MiB", peak>>20)
				}
				return ""
			})
			t.Logf("the gateway has %d MiB at most", peak>>20)
			require.Empty(t, gateway.log.with("panic"))
		})
	}
}
