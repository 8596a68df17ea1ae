package e2e

import (
	"fmt"
	"net/http"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/gorilla/websocket"
	"github.com/open-telemetry/opamp-go/protobufs"
	"github.com/stretchr/testify/require"
)

// credentials are those of one agent; the server of these tests lets everybody in.
func credentials(name string) http.Header {
	return http.Header{"Authorization": {"Secret-Key " + name}, "Agent-Id": {name}}
}

// Mallory was let in with credentials of its own, and speaks under alice's uid once a second. It
// gets nothing that is for her, and cannot say that she has left.
func TestStolenUID(t *testing.T) {
	t.Parallel()
	server := startServer(t, serverOptions{})
	metrics := freeAddress(t)
	gateway := startGateway(t, server.url(), func(c config) { c.metrics(t, metrics) })
	gateway.wantLinks(t, 3)
	alice := connectRaw(t, gateway.url(), credentials("alice"))
	alice.exchange(t, "I am alice")
	mallory := connectRaw(t, gateway.url(), credentials("mallory"))
	mallory.exchange(t, "I am mallory")
	own := mallory.uid
	for i := range 4 {
		mallory.uid = alice.uid
		mallory.send(t, &protobufs.AgentToServer{CustomMessage: chatMessage(fmt.Sprint("I am alice, too ", i))})
		mallory.send(t, &protobufs.AgentToServer{AgentDisconnect: &protobufs.AgentDisconnect{}})
		for j := range 10 {
			text := fmt.Sprint("for alice ", i, " ", j)
			server.tell(t, alice.uid, text)
			alice.wantChat(t, text)
			<-time.After(100 * time.Millisecond)
		}
	}
	mallory.wantBadRequest(t, alice.uid[:])
	mallory.uid = own
	mallory.exchange(t, "I am mallory after all")
	require.Equal(t, []string{"I am mallory", "I am mallory after all"}, mallory.chats())
	known := server.known(alice.uid)
	require.Equal(t, []string{"I am alice"}, known.Chats)
	require.False(t, known.Goodbye)
	mallory.ws.Close()
	wantAgents(t, metrics, 1)
	alice.exchange(t, "still here")
	require.Equal(t, 2, server.known(alice.uid).Messages, "messages under alice's uid")
	gateway.wantLog(t, "warn", "other credentials", alice.uid.String())
	require.Positive(t, faults(t, metrics, "uid_taken"))
}

// Alice came back while her old connection still seems to be open: with the same credentials it is
// she who is reached, at once.
func TestSameCredentials(t *testing.T) {
	t.Parallel()
	server := startServer(t, serverOptions{})
	gateway := startGateway(t, server.url(), oneLink)
	gateway.wantLinks(t, 1)
	line := through(t, gateway.address)
	alice := connectRaw(t, "ws://"+line.Address(), credentials("alice"))
	alice.exchange(t, "I am alice")
	line.Conns()[0].Hold()
	back := connectRaw(t, gateway.url(), credentials("alice"))
	back.uid = alice.uid
	start := time.Now()
	back.exchange(t, "I am back")
	server.tell(t, alice.uid, "good to hear")
	back.wantChat(t, "good to hear")
	require.Less(t, time.Since(start), 3*time.Second)
	require.Empty(t, back.badRequests())
}

// The agent's key was changed, and its old connection has died without a word: the new one has to
// wait until the old one does not answer, and not longer.
func TestOtherCredentials(t *testing.T) {
	t.Parallel()
	server := startServer(t, serverOptions{})
	gateway := startGateway(t, server.url(), oneLink)
	gateway.wantLinks(t, 1)
	line := through(t, gateway.address)
	alice := connectRaw(t, "ws://"+line.Address(), credentials("alice"))
	alice.exchange(t, "I am alice")
	line.Conns()[0].Hold()
	back := connectRaw(t, gateway.url(), credentials("alice with a new key"))
	back.uid = alice.uid
	start := time.Now()
	back.exchange(t, "I am back")
	require.Greater(t, time.Since(start), 4*time.Second)
	require.Less(t, time.Since(start), 15*time.Second)
	server.tell(t, alice.uid, "good to hear")
	back.wantChat(t, "good to hear")
}

// One connection may be so many agents. What it says as one more is answered, and it stays.
func TestInstanceUIDsOfOneConnection(t *testing.T) {
	t.Parallel()
	server := startServer(t, serverOptions{})
	for _, most := range []int{64, 3} {
		t.Run(fmt.Sprint(most), func(t *testing.T) {
			t.Parallel()
			metrics := freeAddress(t)
			gateway := startGateway(t, server.url(), fasterSweeps, func(c config) {
				c.metrics(t, metrics)
				if most != 64 {
					c.gateway("agents::max_instance_uids", most)
				}
			})
			gateway.wantLinks(t, 3)
			many := connectRaw(t, gateway.url(), nil)
			uids := make([]uuid.UUID, most)
			for i := range uids {
				uids[i] = uuid.New()
				many.uid = uids[i]
				many.exchange(t, fmt.Sprint("I am number ", i))
			}
			for n := 1; n <= 3; n++ {
				many.uid = uuid.New()
				many.send(t, &protobufs.AgentToServer{CustomMessage: chatMessage("I am one more")})
				many.wantBadRequest(t, many.uid[:])
				require.Zero(t, server.known(many.uid).Messages)
				require.Equal(t, n, faults(t, metrics, "too_many_uids"))
			}
			start := time.Now()
			for i := 0; time.Since(start) < 6*time.Second; i++ { // longer than it takes to close one who offends
				many.uid = uids[i%most]
				many.exchange(t, fmt.Sprint("I am here ", i))
				<-time.After(50 * time.Millisecond)
			}
			many.wantOpen(t)
		})
	}
}

// The gateway's goodbye for an agent carries the next number of the agent's own, and the server may
// answer it.
func TestGoodbyeIsInSequence(t *testing.T) {
	t.Parallel()
	server := startServer(t, serverOptions{})
	metrics := freeAddress(t)
	gateway := startGateway(t, server.url(), oneLink, func(c config) { c.metrics(t, metrics) })
	gateway.wantLinks(t, 1)
	witness := connectRaw(t, gateway.url(), nil)
	const n = 20
	for i := range n {
		a := connectRaw(t, gateway.url(), nil)
		a.send(t, &protobufs.AgentToServer{SequenceNum: uint64(1000 * i)})
		a.send(t, &protobufs.AgentToServer{SequenceNum: uint64(1000*i + 1), CustomMessage: chatMessage("hello")})
		a.wantChat(t, "hello")
		a.ws.Close()
		known := server.wantAgent(t, a.uid, "has left", func(k Known) bool { return k.Goodbye })
		require.Equal(t, uint64(1000*i+2), known.Sequence)
		require.Equal(t, 3, known.Messages)
	}
	witness.exchange(t, "the answers to goodbyes have come") // on the same link
	require.Zero(t, faults(t, metrics, "server_unknown_uid"))
}

// Who says nothing that can be read is told why, with the uid as it came.
func TestMalformedUIDIsAnswered(t *testing.T) {
	t.Parallel()
	server := startServer(t, serverOptions{})
	gateway := startGateway(t, server.url())
	gateway.wantLinks(t, 3)
	a := connectRaw(t, gateway.url(), nil)
	a.sendFrame(t, websocket.BinaryMessage, []byte("\x00\x0a\x05alice"))
	a.wantBadRequest(t, []byte("alice"))
	gateway.wantLog(t, "info", "instance UID", clientAt(a.ws.LocalAddr().String()))
}
