package e2e

import (
	"io"
	"net/http"
	"strconv"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/open-telemetry/opamp-go/protobufs"
	"github.com/stretchr/testify/require"
)

// A server on opamp-go's library that knows nothing of gateways decides on each agent itself, with nothing configured
// but its endpoint: agents are let in and refused as it would directly.
func TestOrdinaryServerDecides(t *testing.T) {
	t.Parallel()
	server := startServer(t, serverOptions{ordinary: true, judge: onlyWithKey})
	gateway := startGateway(t, server.url(), func(c config) { c.gateway("server::headers::Authorization", "Secret-Key right") })
	server.wantLinks(t, upstream(3)...)

	for _, test := range []struct {
		key, header, value string
		status             int
	}{
		{"wrong", "WWW-Authenticate", "Secret-Key", http.StatusUnauthorized},
		{"old-agent", "Upgrade", "opamp/2", http.StatusUpgradeRequired},
		{"busy", "Retry-After", "3", http.StatusServiceUnavailable},
	} {
		_, resp, err := dialRaw(gateway.url(), key(test.key), nil)
		require.Error(t, err)
		require.NotNil(t, resp)
		require.Equal(t, test.status, resp.StatusCode)
		require.Equal(t, test.value, resp.Header.Get(test.header))
		require.Empty(t, resp.Header.Get("Keep-Alive"), "what concerns only the server's own connection")
		_, err = io.Copy(io.Discard, resp.Body)
		require.NoError(t, err)
	}
	_, resp, err := dialRaw(gateway.url(), nil, nil)
	require.Error(t, err)
	require.Equal(t, http.StatusUnauthorized, resp.StatusCode, "the gateway's own key is no agent's")

	mallory := startAgent(t, "mallory", gateway.url(), agentOptions{headers: key("wrong")})
	mallory.wantLog(t, "401 Unauthorized")
	agents := startAgents(t, 6, gateway.url(), agentOptions{headers: key("right")})
	for _, a := range agents {
		server.wantAgent(t, a.id(), "is connected", isConnected)
		a.say(t, "I am "+a.name)
		a.wantHeard(t, "I am "+a.name)
		server.tell(t, a.id(), "hello, "+a.name)
		a.wantHeard(t, "hello, "+a.name)
		require.Contains(t, upstream(3), server.known(a.id()).Link)
	}
	server.wantLinks(t, upstream(3)...) // and nothing is left of the handshakes
	gateway.wantLog(t, "info", "from now on each agent is verified instead")
	require.Len(t, gateway.log.with("from now on each agent is verified"), 1, "it is said once")

	// An agent renamed, one that has gone, and one that comes again.
	renamed := uuid.Must(uuid.NewV7())
	server.send(t, agents[0].id(), &protobufs.ServerToAgent{
		AgentIdentification: &protobufs.AgentIdentification{NewInstanceUid: renamed[:]},
	})
	eventually(t, func() string {
		if agents[0].id() != renamed {
			return "agent-0 has not heard its new name"
		}
		return ""
	})
	agents[0].say(t, "it is me")
	server.wantAgent(t, renamed, "speaks under its new name", isConnected)
	agents[1].stop()
	server.wantAgent(t, agents[1].id(), "has said goodbye", func(k Known) bool { return k.Goodbye })
	again := startAgent(t, "again", gateway.url(), agentOptions{headers: key("right"), uid: agents[1].id()})
	server.wantAgent(t, again.id(), "is back", isConnected)

	// The server is killed and started again: nobody is verified again, and everybody is there.
	server.stop(t)
	server.start(t)
	for _, a := range agents[2:] {
		server.wantAgent(t, a.id(), "is connected", isConnected)
		a.wantConnects(t, 1)
	}
}

// The gateway has a client certificate for the server. It is not lent to those that are verified.
func TestVerifyLendsNoCertificate(t *testing.T) {
	t.Parallel()
	authority := newAuthority(t, "authority")
	server := startServer(t, serverOptions{ordinary: true, tls: authority.mutual(authority.issue(t, "server"))})
	up := authority.issue(t, "gateway")
	gateway := startGateway(t, server.url(), func(c config) {
		c.gateway("server::tls", map[string]any{"ca_file": authority.file, "cert_file": up.certFile, "key_file": up.keyFile})
	})
	server.wantLinks(t, upstream(3)...)
	_, resp, err := dialRaw(gateway.url(), nil, nil)
	require.Error(t, err)
	require.NotNil(t, resp)
	require.Equal(t, http.StatusServiceUnavailable, resp.StatusCode)
	after, err := strconv.Atoi(resp.Header.Get("Retry-After"))
	require.NoError(t, err)
	require.GreaterOrEqual(t, after, 30)
	gateway.wantLog(t, "warn", "server gave no verdict on an agent")
	server.wantLinks(t, upstream(3)...)
}

// Many strangers come at once: the server sees no more than 16 handshakes at a time, and an agent from elsewhere gets in.
func TestVerifyCrowd(t *testing.T) {
	t.Parallel()
	slow := func(http.Header) verdict {
		time.Sleep(20 * time.Millisecond)
		return verdict{refusal: http.StatusForbidden}
	}
	server := startServer(t, serverOptions{ordinary: true, judge: slow})
	gateway := startGateway(t, server.url(), func(c config) {
		c.gateway("server::headers::Authorization", "Secret-Key right")
		c.gateway("server::agent_admission", "verify")
	})
	server.wantLinks(t, upstream(3)...)
	refused := make(chan int)
	const crowd = 100
	start := time.Now()
	for range crowd {
		go func() {
			_, resp, err := dialRaw(gateway.url(), nil, nil)
			if err == nil || resp == nil {
				refused <- 0
				return
			}
			refused <- resp.StatusCode
		}()
	}
	for range crowd {
		require.Equal(t, http.StatusForbidden, <-refused)
	}
	require.GreaterOrEqual(t, time.Since(start), crowd/16*20*time.Millisecond)
}
