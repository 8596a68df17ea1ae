package e2e

import (
	"crypto/tls"
	"testing"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"
)

// Certificates are shown and checked on both sides of the gateway, in both directions.
func TestMutualTLS(t *testing.T) {
	t.Parallel()
	// Two authorities: nothing works because one side's certificates happen to do on the other.
	inside, outside := newAuthority(t, "inside"), newAuthority(t, "outside")
	server := startServer(t, serverOptions{tls: outside.mutual(outside.issue(t, "server"))})
	up, down := outside.issue(t, "gateway-up"), inside.issue(t, "gateway-down")
	withTLS := func(c config) {
		c.gateway("server::tls", map[string]any{"ca_file": outside.file, "cert_file": up.certFile, "key_file": up.keyFile})
		c.gateway("listener::tls", map[string]any{"cert_file": down.certFile, "key_file": down.keyFile, "client_ca_file": inside.file})
	}
	gateway := startGateway(t, server.url(), withTLS)
	server.wantLinks(t, upstream(3)...)

	t.Run("agents with a certificate", func(t *testing.T) {
		id := inside.issue(t, "agent")
		alice := startAgent(t, "alice", gateway.url(), agentOptions{tls: inside.mutual(id)})
		server.wantAgent(t, alice.id(), "is connected", isConnected)
		alice.say(t, "over TLS")
		alice.wantHeard(t, "over TLS")

		bob := uuid.Must(uuid.NewV7())
		c := agentConfig(gateway.url(), bob)
		c.set("extensions::opamp::server::ws::tls", map[string]any{"ca_file": inside.file, "cert_file": id.certFile, "key_file": id.keyFile})
		startCollector(t, "bob", c)
		server.wantAgent(t, bob, "is connected", isConnected)
	})

	t.Run("agents without", func(t *testing.T) {
		questions := len(server.asked())
		for name, id := range map[string]*Identity{"none": nil, "of a stranger": outside.issue(t, "stranger")} {
			_, _, err := dialRaw(gateway.url(), nil, inside.mutual(id))
			require.Error(t, err, "with a certificate: %s", name)
			require.Contains(t, err.Error(), "tls: ", "with a certificate: %s", name)
		}
		require.Len(t, server.asked(), questions, "the server was not asked about them")
	})

	t.Run("no plain text", func(t *testing.T) {
		_, resp, err := dialRaw("ws://"+gateway.address, nil, nil)
		require.Error(t, err)
		if resp != nil {
			require.Equal(t, 400, resp.StatusCode)
		}
	})

	t.Run("HTTP/2 is not offered", func(t *testing.T) {
		config := inside.mutual(inside.issue(t, "modern"))
		config.NextProtos = []string{"h2", "http/1.1"}
		conn, err := tls.Dial("tcp", gateway.address, config)
		require.NoError(t, err)
		defer conn.Close()
		require.Equal(t, "http/1.1", conn.ConnectionState().NegotiatedProtocol)
	})

	t.Run("gateway does not trust the server", func(t *testing.T) {
		t.Parallel()
		distrustful := startGateway(t, server.url(), withTLS, func(c config) { c.gateway("server::tls::ca_file", inside.file) })
		distrustful.wantLog(t, "warn", "cannot connect to the server", server.url(), "x509: certificate signed by unknown authority")
	})

	t.Run("server does not trust the gateway", func(t *testing.T) {
		t.Parallel()
		distrusted := startGateway(t, server.url(), withTLS, func(c config) {
			c.gateway("server::tls::cert_file", down.certFile)
			c.gateway("server::tls::key_file", down.keyFile)
		})
		distrusted.wantLog(t, "warn", "cannot connect to the server", server.url(), "tls: ")
	})
}
