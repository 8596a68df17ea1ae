package e2e

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/gorilla/websocket"
	"github.com/open-telemetry/opamp-go/protobufs"
	"github.com/stretchr/testify/require"
)

// Whatever it is doing, a gateway that is told to end does so within 5 s, without an error, and
// says so to the agents that listen.
func TestSIGTERMInEveryState(t *testing.T) {
	t.Parallel()
	terminate := func(t *testing.T, gateway *Gateway, listening ...*rawAgent) {
		t.Helper()
		gateway.Signal(t, syscall.SIGTERM)
		code, after := gateway.wantExit(t)
		t.Logf("gone after %s", after.Round(time.Millisecond))
		require.Zero(t, code, "exit code")
		require.Len(t, gateway.log.with("disconnected from the server"), len(gateway.log.with("connected to the server\t"))-len(gateway.log.with("lost connection")), "links that were closed")
		require.Less(t, after, 8*time.Second, "until the gateway was gone; on a machine with nothing else to do it takes less than 5 s")
		for _, a := range listening {
			a.wantLetGo(t)
		}
		for _, level := range []string{"\terror\t", "\tpanic\t", "\tfatal\t", "panic:", "DATA RACE"} {
			require.Empty(t, gateway.log.with(level))
		}
	}
	connected := func(t *testing.T, server *Server, connect func() *rawAgent, n int) []*rawAgent {
		t.Helper()
		agents := make([]*rawAgent, n)
		for i := range agents {
			agents[i] = connect()
			agents[i].send(t, &protobufs.AgentToServer{SequenceNum: 1})
			server.wantAgent(t, agents[i].uid, "is connected", func(k Known) bool { return k.Connected })
		}
		return agents
	}

	t.Run("idle", func(t *testing.T) {
		t.Parallel()
		server := startServer(t, serverOptions{})
		gateway := startGateway(t, server.url())
		gateway.wantLinks(t, 3)
		alice := connectRaw(t, gateway.url(), nil)
		alice.exchange(t, "I am alice")
		terminate(t, gateway, alice)
		server.wantLinks(t, []string{}...)
	})

	t.Run("agents in the middle of what they say", func(t *testing.T) {
		t.Parallel()
		server := startServer(t, serverOptions{})
		gateway := startGateway(t, server.url())
		gateway.wantLinks(t, 3)
		agents := connected(t, server, func() *rawAgent { return connectRaw(t, gateway.url(), nil) }, 40)
		const last = 250
		var speaking sync.WaitGroup
		for _, a := range agents {
			speaking.Go(func() {
				for i := range last {
					a.send(t, &protobufs.AgentToServer{CustomMessage: chatMessage(numbered(i, 100))})
				}
			})
		}
		speaking.Wait()
		terminate(t, gateway, agents...)
		for _, a := range agents {
			chats := server.wantAgent(t, a.uid, "has said everything", func(k Known) bool { return len(k.Chats) >= last }).Chats
			require.Len(t, chats, last)
			wantNumbered(t, chats)
			require.False(t, server.known(a.uid).Goodbye)
		}
	})

	for _, over := range []string{"TCP", "TLS"} {
		t.Run("agents that do not read, over "+over, func(t *testing.T) {
			t.Parallel()
			server := startServer(t, serverOptions{})
			authority := newAuthority(t, "inside")
			identity := authority.issue(t, "gateway")
			gateway := startGateway(t, server.url(), func(c config) {
				if over == "TLS" {
					c.gateway("listener::tls", map[string]any{"cert_file": identity.certFile, "key_file": identity.keyFile})
				}
			})
			gateway.wantLinks(t, 3)
			stalled := connected(t, server, func() *rawAgent { return connectDeaf(t, gateway.url(), authority.mutual(nil)) }, 20)
			for _, a := range stalled {
				for i := range 100 {
					server.tell(t, a.uid, numbered(i, 64<<10)) // more than the systems take
				}
			}
			alice := connectTLS(t, gateway.url(), authority.mutual(nil))
			alice.exchange(t, "I am alice")
			terminate(t, gateway, alice)
		})
	}

	t.Run("agents that are black holes", func(t *testing.T) {
		t.Parallel()
		server := startServer(t, serverOptions{})
		gateway := startGateway(t, server.url())
		gateway.wantLinks(t, 3)
		line := through(t, gateway.address)
		connected(t, server, func() *rawAgent { return connectRaw(t, "ws://"+line.Address(), nil) }, 20)
		for _, c := range line.Conns() {
			c.Hold()
		}
		terminate(t, gateway, connectRaw(t, gateway.url(), nil))
	})

	t.Run("agents halfway through a message, and agents that wait for memory", func(t *testing.T) {
		t.Parallel()
		server := startServer(t, serverOptions{})
		metrics := freeAddress(t)
		gateway := startGateway(t, server.url(), func(c config) {
			c.metrics(t, metrics)
			c.gateway("max_message_size", 8<<20)
			c.gateway("max_buffered_size", 32<<20)
		})
		gateway.wantLinks(t, 3)
		agents := connected(t, server, func() *rawAgent {
			ws, _, err := dialRaw(gateway.url(), nil, nil)
			require.NoError(t, err)
			ws.SetCloseHandler(func(int, string) error { return nil }) // there is no way for an answer
			a := newRaw(t, ws)
			a.listen()
			return a
		}, 20)
		var writing sync.WaitGroup
		defer writing.Wait()
		for _, a := range agents {
			writing.Go(func() { // until the gateway is gone
				_, _ = a.ws.NetConn().Write(append(messageHeader(8<<20), make([]byte, 7<<20)...))
			})
		}
		eventually(t, func() string {
			if faults(t, metrics, "memory_full") == 0 {
				return "nobody waits for memory"
			}
			return ""
		})
		terminate(t, gateway, agents...)
	})

	t.Run("a server that reads nothing", func(t *testing.T) {
		t.Parallel()
		server := startBareServer(t)
		gateway := startGateway(t, server.url())
		gateway.wantLinks(t, 3)
		alice := connectRaw(t, gateway.url(), nil)
		alice.exchange(t, "I am alice")
		agents := make([]*rawAgent, 9)
		for i := range agents {
			agents[i] = connectRaw(t, gateway.url(), nil)
		}
		goOn := server.stopReading()
		defer goOn()
		var speaking sync.WaitGroup
		defer speaking.Wait()
		stuck := make(chan struct{}, len(agents))
		for _, a := range agents {
			speaking.Go(func() { // until the gateway is gone
				_ = a.ws.SetWriteDeadline(time.Now().Add(3 * time.Second))
				for i := range 1000 { // more than link and systems take
					if a.ws.WriteMessage(websocket.BinaryMessage, report(t, a, numbered(i, 256<<10))) != nil {
						break
					}
				}
				stuck <- struct{}{}
			})
		}
		for range agents {
			<-stuck
		}
		terminate(t, gateway, alice)
	})

	t.Run("agents that wait for the server's answer", func(t *testing.T) {
		t.Parallel()
		server := startBareServer(t)
		gateway := startGateway(t, server.url())
		gateway.wantLinks(t, 3)
		alice := connectRaw(t, gateway.url(), nil)
		server.fallSilent()
		const n = 30
		answers := make(chan *http.Response, n)
		for range n {
			go func() { // until it has an answer
				_, resp, _ := dialRaw(gateway.url(), nil, nil)
				answers <- resp
			}()
		}
		eventually(t, func() string {
			if asked := server.questions(); asked < 1+n {
				return fmt.Sprintf("the server was asked %d questions", asked)
			}
			return ""
		})
		terminate(t, gateway, alice)
		for range n {
			if resp := <-answers; resp != nil {
				require.Equal(t, http.StatusServiceUnavailable, resp.StatusCode)
			}
		}
	})

	t.Run("agents that are introduced on another link", func(t *testing.T) {
		t.Parallel()
		server := startBareServer(t)
		gateway := startGateway(t, server.url())
		gateway.wantLinks(t, 3)
		agents := make([]*rawAgent, 9)
		for i := range agents {
			agents[i] = connectRaw(t, gateway.url(), nil)
		}
		asked := server.questions()
		server.fallSilent()
		server.all()[0].ws.Close()
		eventually(t, func() string {
			if server.questions() == asked {
				return "nobody is introduced"
			}
			return ""
		})
		terminate(t, gateway, agents...)
	})

	t.Run("a server that is not there", func(t *testing.T) {
		t.Parallel()
		server := startServer(t, serverOptions{})
		line := through(t, server.address)
		line.Refuse(true)
		gateway := startGateway(t, "ws://"+line.Address())
		gateway.wantLog(t, "warn", "cannot connect to the server")
		line.Darken(true) // takes connections, and says nothing
		line.Refuse(false)
		eventually(t, func() string {
			if n := len(line.Conns()); n < 3 {
				return fmt.Sprintf("%d links are being dialed", n)
			}
			return ""
		})
		answer := make(chan *http.Response, 1)
		go func() { // until it has an answer
			_, resp, _ := dialRaw(gateway.url(), nil, nil)
			answer <- resp
		}()
		terminate(t, gateway)
		if resp := <-answer; resp != nil {
			require.Equal(t, http.StatusServiceUnavailable, resp.StatusCode)
		}
	})

	t.Run("connections that say nothing, or not all", func(t *testing.T) {
		t.Parallel()
		authority := newAuthority(t, "inside")
		identity := authority.issue(t, "gateway")
		server := startServer(t, serverOptions{})
		for _, secure := range []bool{true, false} {
			gateway := startGateway(t, server.url(), func(c config) {
				if secure {
					c.gateway("listener::tls", map[string]any{"cert_file": identity.certFile, "key_file": identity.keyFile})
				}
			})
			gateway.wantLinks(t, 3)
			for _, beginning := range []string{
				"", "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", "GET / HTTP/1.1\r\nHost:", "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\n",
			} {
				conn, err := net.Dial("tcp", gateway.address)
				require.NoError(t, err)
				t.Cleanup(func() { conn.Close() })
				_, err = io.WriteString(conn, beginning)
				require.NoError(t, err)
			}
			terminate(t, gateway, connectTLS(t, gateway.url(), authority.mutual(nil))) // she came later than they
		}
	})
}
