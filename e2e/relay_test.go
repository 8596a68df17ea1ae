package e2e

import (
	"fmt"
	"testing"

	"github.com/google/uuid"
	"github.com/open-telemetry/opamp-go/protobufs"
	"github.com/stretchr/testify/require"
)

// Thirty agents share three links: spread evenly, each hears what is meant for it, and the
// server's restart is no event for them.
func TestManyAgents(t *testing.T) {
	t.Parallel()
	server := startServer(t, serverOptions{})
	gateway := startGateway(t, server.url(), func(c config) { c.gateway("server::agent_id", "edge-7") })
	links := []string{"edge-7/upstream-0", "edge-7/upstream-1", "edge-7/upstream-2"}
	server.wantLinks(t, links...)
	gateway.wantLinks(t, 3)
	require.Contains(t, server.linkHeaders(links[0]).Get("User-Agent"), " otelcol-opampgateway/")

	agents := startAgents(t, 30, gateway.url(), agentOptions{})
	for _, a := range agents {
		server.wantAgent(t, a.id(), "is connected", isConnected)
	}
	require.Equal(t, map[string]int{links[0]: 10, links[1]: 10, links[2]: 10}, server.load())

	conversation := func(t *testing.T, round string) {
		t.Helper()
		for _, a := range agents {
			a.say(t, a.name+" in "+round)
		}
		for _, a := range agents {
			server.tell(t, a.id(), round+" to "+a.name)
		}
		for _, a := range agents {
			a.wantHeard(t, a.name+" in "+round)
			a.wantHeard(t, round+" to "+a.name)
		}
	}
	conversation(t, "round 1")
	for _, a := range agents {
		require.Equal(t, []string{a.name + " in round 1", "round 1 to " + a.name}, a.everHeard(), "%s hears its own answer and its own push, nobody else's", a.name)
		require.Equal(t, []string{a.name + " in round 1"}, server.known(a.id()).Chats)
	}

	// A push may come on any link: here on the one of the next agent.
	for i, a := range agents {
		server.sendBy(t, agents[(i+1)%len(agents)].id(), a.id(), &protobufs.ServerToAgent{CustomMessage: chatMessage("by another link")})
	}
	for _, a := range agents {
		a.wantHeard(t, "by another link")
	}

	server.stop(t)
	gateway.wantLog(t, "lost connection to the server", server.url())
	server.start(t)
	server.wantLinks(t, links...)
	for _, a := range agents {
		server.wantAgent(t, a.id(), "is back", isConnected)
	}
	require.Len(t, server.asked(), len(agents), "each agent was introduced once to the new server")
	conversation(t, "round 2")
	for _, a := range agents {
		a.wantConnects(t, 1)
	}

	// Those who leave, leave by name.
	agents[0].stop()
	server.wantAgent(t, agents[0].id(), "said goodbye", func(k Known) bool { return k.Goodbye })
	require.True(t, server.known(agents[1].id()).Connected)
}

// One of three links breaks. Its agents keep their connections, are introduced again, and tell
// the server their full state, in case the link took some with it. The others notice nothing.
func TestLinkLost(t *testing.T) {
	t.Parallel()
	server := startServer(t, serverOptions{})
	gateway := startGateway(t, server.url())
	gateway.wantLinks(t, 3)
	agents := startAgents(t, 9, gateway.url(), agentOptions{})
	before := map[uuid.UUID]Known{}
	for _, a := range agents {
		server.wantAgent(t, a.id(), "is connected", isConnected)
		a.say(t, "hello")
		a.wantHeard(t, "hello")
		before[a.id()] = server.known(a.id())
	}
	require.Len(t, server.asked(), len(agents))

	server.cut(t, "upstream-1")
	gateway.wantLog(t, "lost connection to the server", "upstream-1")
	concerned := 0
	for _, a := range agents {
		was := before[a.id()]
		if was.Link != "upstream-1" {
			continue
		}
		concerned++
		server.wantAgent(t, a.id(), "has said who it is once more", func(k Known) bool {
			return k.Connected && k.Descriptions == was.Descriptions+1
		})
	}
	require.Equal(t, 3, concerned)
	server.wantLinks(t, upstream(3)...)
	require.Len(t, server.asked(), len(agents)+concerned)
	for _, a := range agents {
		a.say(t, "again")
		a.wantHeard(t, "again")
		a.wantConnects(t, 1)
		if was := before[a.id()]; was.Link != "upstream-1" {
			require.Equal(t, was.Messages+1, server.known(a.id()).Messages, "%s was not on that link", a.name)
			require.Equal(t, was.Link, server.known(a.id()).Link)
		}
	}
}

// The server gives an agent a new uid, and pushes to it before the agent has used it.
func TestNewInstanceUID(t *testing.T) {
	t.Parallel()
	server := startServer(t, serverOptions{})
	gateway := startGateway(t, server.url())
	alice := startAgent(t, "alice", gateway.url(), agentOptions{})
	bob := startAgent(t, "bob", gateway.url(), agentOptions{})
	server.wantAgent(t, alice.id(), "is connected", isConnected)
	server.wantAgent(t, bob.id(), "is connected", isConnected)

	before, after := alice.id(), uuid.New()
	server.send(t, before, &protobufs.ServerToAgent{AgentIdentification: &protobufs.AgentIdentification{NewInstanceUid: after[:]}})
	server.sendBy(t, before, after, &protobufs.ServerToAgent{CustomMessage: chatMessage("hello, new alice")})
	alice.wantHeard(t, "hello, new alice")

	alice.say(t, "it is me")
	alice.wantHeard(t, "it is me")
	require.Equal(t, []string{"it is me"}, server.known(after).Chats)
	require.False(t, server.known(before).Goodbye, "no goodbye for a uid that was replaced")
	require.Empty(t, bob.everHeard())

	alice.stop()
	server.wantAgent(t, after, "said goodbye", func(k Known) bool { return k.Goodbye })
}

// One agent sends and is sent several megabytes while others chat.
func TestLargeMessages(t *testing.T) {
	t.Parallel()
	server := startServer(t, serverOptions{})
	gateway := startGateway(t, server.url())
	gateway.wantLinks(t, 3)
	agents := startAgents(t, 4, gateway.url(), agentOptions{}) // so two share a link
	for _, a := range agents {
		server.wantAgent(t, a.id(), "is connected", isConnected)
	}
	body := make([]byte, 6<<20)
	for i := range body {
		body[i] = byte('a' + i%26)
	}
	alice := agents[0]
	server.send(t, alice.id(), &protobufs.ServerToAgent{RemoteConfig: &protobufs.AgentRemoteConfig{
		ConfigHash: []byte("large"),
		Config:     &protobufs.AgentConfigMap{ConfigMap: map[string]*protobufs.AgentConfigFile{"": {Body: body}}},
	}})
	for i := range 20 {
		for _, a := range agents[1:] {
			text := fmt.Sprintf("%s: %d", a.name, i)
			a.say(t, text)
			a.wantHeard(t, text)
		}
	}
	known := server.wantAgent(t, alice.id(), "has applied the large configuration", func(k Known) bool {
		return string(k.ConfigStatus.GetLastRemoteConfigHash()) == "large" && k.EffectiveConfig != nil
	})
	require.Equal(t, string(body), configText(known.EffectiveConfig.GetConfigMap()), "the configuration, there and back")
	for _, a := range agents {
		a.wantConnects(t, 1)
	}
}
