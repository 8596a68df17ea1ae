package e2e

import (
	"fmt"
	"slices"
	"testing"

	"github.com/google/uuid"
	"github.com/open-telemetry/opamp-go/protobufs"
	"github.com/stretchr/testify/require"
)

// exchange has the agent say something, and waits until it hears the server's answer itself.
func (a *rawAgent) exchange(t *testing.T, text string) {
	t.Helper()
	a.send(t, &protobufs.AgentToServer{CustomMessage: chatMessage(text)})
	a.wantChat(t, text)
}

func (a *rawAgent) wantChat(t *testing.T, text string) {
	t.Helper()
	eventually(t, func() string {
		if !slices.Contains(a.chats(), text) {
			return fmt.Sprintf("the agent has not heard %q; the connection's end: %v", text, a.ended())
		}
		return ""
	})
}

const conflictLog = "instance UID is in use on two connections"

// A machine was cloned, and with it the agent's instance UID. Both stay connected; the one that
// spoke last is the one that is reached.
func TestClones(t *testing.T) {
	t.Parallel()
	server := startServer(t, serverOptions{})
	metrics := freeAddress(t)
	gateway := startGateway(t, server.url(), func(c config) { c.metrics(t, metrics) })
	gateway.wantLinks(t, 3)
	alice, clone := connectRaw(t, gateway.url(), nil), connectRaw(t, gateway.url(), nil)
	clone.uid = alice.uid
	alice.exchange(t, "I am alice")
	require.Zero(t, faults(t, metrics, "uid_conflict"))

	for i := range 50 {
		for name, a := range map[string]*rawAgent{"clone": clone, "alice": alice} {
			a.exchange(t, fmt.Sprint(name, " ", i))
			server.tell(t, a.uid, fmt.Sprint("to ", name, " ", i))
			a.wantChat(t, fmt.Sprint("to ", name, " ", i))
		}
	}
	alice.wantOpen(t)
	clone.wantOpen(t)
	require.Len(t, alice.chats(), 1+2*50)
	require.Len(t, clone.chats(), 2*50)
	require.Positive(t, faults(t, metrics, "uid_conflict"))
	require.Len(t, gateway.log.with(conflictLog, alice.uid.String()), 1, "lines in the log about the two")

	// When one leaves, the other is reached again, and the server is not told that it has left.
	alice.exchange(t, "I spoke last")
	messages := server.known(alice.uid).Messages
	alice.ws.Close()
	wantAgents(t, metrics, 1)
	server.tell(t, alice.uid, "who is left?")
	clone.wantChat(t, "who is left?")
	clone.exchange(t, "me")
	require.Equal(t, messages+1, server.known(alice.uid).Messages, "no goodbye was said for who is still there")
	clone.ws.Close()
	server.wantAgent(t, alice.uid, "has left", func(k Known) bool { return k.Goodbye })
}

// Two agents on opamp-go's library with one instance UID do not throw each other out.
func TestRealClones(t *testing.T) {
	t.Parallel()
	server := startServer(t, serverOptions{})
	gateway := startGateway(t, server.url())
	gateway.wantLinks(t, 3)
	uid := uuid.New()
	clones := []*Agent{
		startAgent(t, "alice", gateway.url(), agentOptions{uid: uid}),
		startAgent(t, "clone", gateway.url(), agentOptions{uid: uid}),
	}
	stop := make(chan struct{})
	defer close(stop)
	for _, a := range clones {
		go a.chatUntil(stop) // ends with the test
	}
	for _, a := range clones {
		eventually(t, func() string {
			if n := len(a.everHeard()); n < 100 {
				return fmt.Sprintf("%s has heard %d messages", a.name, n)
			}
			return ""
		})
	}
	for _, a := range clones {
		a.wantConnects(t, 1)
	}
	require.LessOrEqual(t, len(gateway.log.with(conflictLog)), 2, "lines in the log about the two")
}

// An agent's connection has died without its end being seen, and the agent comes back on
// another. When the old connection's end is seen at last, nobody takes the agent for gone.
func TestHalfOpenReconnect(t *testing.T) {
	t.Parallel()
	server := startServer(t, serverOptions{})
	metrics := freeAddress(t)
	gateway := startGateway(t, server.url(), oneLink, func(c config) { c.metrics(t, metrics) })
	gateway.wantLinks(t, 1)
	line := through(t, gateway.address)

	alice := connectRaw(t, "ws://"+line.Address(), nil)
	alice.exchange(t, "I am alice")
	line.Conns()[0].Hold()
	back := connectRaw(t, gateway.url(), nil)
	back.uid = alice.uid
	back.exchange(t, "I am back")
	require.Equal(t, 1, faults(t, metrics, "uid_conflict"))
	server.tell(t, alice.uid, "good to hear")
	back.wantChat(t, "good to hear")

	line.Conns()[0].Reset()
	wantAgents(t, metrics, 1)
	back.exchange(t, "I am still here")
	require.Equal(t, 3, server.known(alice.uid).Messages, "no goodbye was said")
	server.tell(t, alice.uid, "so you are")
	back.wantChat(t, "so you are")
	require.Equal(t, []string{"I am alice"}, alice.chats())
	require.Equal(t, 1, faults(t, metrics, "uid_conflict"))
	require.Len(t, gateway.log.with(conflictLog, alice.uid.String()), 1, "lines in the log about the two")
}
