package e2e

import (
	"crypto/tls"
	"fmt"
	"os"
	"slices"
	"sync/atomic"
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

// shown is the serial number of the certificate that whoever connects to address sees, or what
// went wrong.
func shown(address string, config *tls.Config) string {
	conn, err := tls.Dial("tcp", address, config)
	if err != nil {
		return err.Error()
	}
	defer conn.Close()
	return serial(conn.ConnectionState().PeerCertificates[0])
}

// Certificates are replaced on both sides while agents are connected: new connections use the
// new ones, the old connections go on.
func TestCertificatesRotate(t *testing.T) {
	t.Parallel()
	inside, outside := newAuthority(t, "inside"), newAuthority(t, "outside")
	var serverIdentity atomic.Pointer[Identity]
	serverIdentity.Store(outside.issue(t, "server"))
	serverTLS := outside.mutual(nil)
	serverTLS.GetCertificate = func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return &serverIdentity.Load().cert, nil }
	server := startServer(t, serverOptions{tls: serverTLS})
	up, down := outside.issue(t, "gateway-up"), inside.issue(t, "gateway-down")
	gateway := startGateway(t, server.url(), func(c config) {
		c.gateway("server::tls", map[string]any{"ca_file": outside.file, "cert_file": up.certFile, "key_file": up.keyFile, "reload_interval": "100ms"})
		c.gateway("listener::tls", map[string]any{
			"cert_file": down.certFile, "key_file": down.keyFile, "reload_interval": "100ms",
			"client_ca_file": inside.file, "client_ca_file_reload": true,
		})
	})
	gateway.wantLinks(t, 3)
	agent := inside.mutual(inside.issue(t, "agent"))
	alice := connectTLS(t, gateway.url(), agent)
	alice.exchange(t, "I am alice")

	t.Run("of the listener", func(t *testing.T) {
		require.Equal(t, serial(down.cert.Leaf), shown(gateway.address, agent))
		down = inside.issue(t, "gateway-down") // in the same files
		eventually(t, func() string {
			if got := shown(gateway.address, agent); got != serial(down.cert.Leaf) {
				return "agents do not see the new certificate: " + got
			}
			return ""
		})
		connectTLS(t, gateway.url(), agent).exchange(t, "I came later")
		alice.exchange(t, "I was here before")
	})

	t.Run("of the authority for agents", func(t *testing.T) {
		next := newAuthority(t, "next")
		newcomer := inside.mutual(next.issue(t, "newcomer"))
		_, _, err := dialRaw(gateway.url(), nil, newcomer)
		require.Error(t, err)
		require.NoError(t, os.WriteFile(inside.file, read(t, next.file), 0o600))
		eventually(t, func() string {
			ws, _, err := dialRaw(gateway.url(), nil, newcomer)
			if err != nil {
				return "the newcomer is not let in: " + err.Error()
			}
			ws.Close()
			return ""
		})
		_, _, err = dialRaw(gateway.url(), nil, agent)
		require.ErrorContains(t, err, "tls: ")
		alice.exchange(t, "but I am still here")
	})

	// certificates are the serial numbers of those that the gateway has shown on its links.
	certificates := func() (serials []string) {
		for _, name := range upstream(3) {
			if l := server.link(name); l != nil {
				serials = append(serials, serial(l.tls.PeerCertificates[0]))
			}
		}
		return serials
	}
	wantCertificates := func(t *testing.T, want ...*Identity) {
		t.Helper()
		eventually(t, func() string {
			got := certificates()
			for i, id := range want {
				if len(got) != len(want) || got[i] != serial(id.cert.Leaf) {
					return fmt.Sprintf("the gateway's certificates are %v, want another one on link %d", got, i)
				}
			}
			return ""
		})
	}

	t.Run("for the server, and of the server", func(t *testing.T) {
		wantCertificates(t, up, up, up)
		next := outside.issue(t, "gateway-up") // in the same files
		serverIdentity.Store(outside.issue(t, "server"))
		// The next link shows the certificate that was loaded last, and loads the new one then at the latest.
		server.cut(t, "upstream-1")
		wantCertificates(t, up, next, up)
		server.cut(t, "upstream-0")
		server.cut(t, "upstream-2")
		wantCertificates(t, next, next, next)
		alice.exchange(t, "what happened?")
	})

	t.Run("of the server's authority, by a reload", func(t *testing.T) {
		next := newAuthority(t, "next")
		both := slices.Concat(read(t, outside.file), read(t, next.file))
		require.NoError(t, os.WriteFile(outside.file, both, 0o600))
		gateway.reload(t, func(config) {})
		gateway.wantReady(t, 2)
		server.wantLinks(t, upstream(3)...)
		serverIdentity.Store(next.issue(t, "server"))
		server.cut(t, "upstream-0")
		gateway.wantLog(t, "warn", "lost connection to the server", "upstream-0")
		gateway.wantLinks(t, 3+3+1) // at first, after the cuts, and this one: a reload disturbs none
		server.wantLinks(t, upstream(3)...)
		alice.exchange(t, "I have noticed nothing")
	})
}

func read(t *testing.T, file string) []byte {
	t.Helper()
	text, err := os.ReadFile(file)
	require.NoError(t, err)
	return text
}
