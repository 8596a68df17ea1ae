package e2e

import (
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// A configuration that cannot work is refused, and the message names the key to change.
func TestInvalidConfig(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name  string
		edit  func(config)
		wants string
	}{
		{"no endpoint", func(c config) { c.gateway("server", map[string]any{}) }, "server: endpoint: is required"},
		{"ftp endpoint", func(c config) { c.gateway("server::endpoint", "ftp://opamp.example") }, `server: endpoint: must start with ws://, wss://, http:// or https://, is "ftp://opamp.example"`},
		{"no host", func(c config) { c.gateway("server::endpoint", "ws:///v1/opamp") }, "server: endpoint: has no host"},
		{"password in the endpoint", func(c config) { c.gateway("server::endpoint", "ws://me:mystery@opamp.example") }, "server: endpoint: must not hold a user or password"},
		{"no connections", func(c config) { c.gateway("server::connections", 0) }, "server: connections: must be from 1 to 64, is 0"},
		{"less than none", func(c config) { c.gateway("server::connections", -1) }, "server: connections: must be from 1 to 64, is -1"},
		{"too many", func(c config) { c.gateway("server::connections", 100_000) }, "server: connections: must be from 1 to 64, is 100000"},
		{"not a number", func(c config) { c.gateway("server::connections", "many") }, "'server.connections'"},
		{"unknown key", func(c config) { c.gateway("server::conections", 3) }, "conections"},
		{"unknown key at the top", func(c config) { c.gateway("upstream", map[string]any{}) }, "upstream"},
		{"reserved header", func(c config) { c.gateway("server::headers::Sec-WebSocket-Key", "x") }, `server: headers: "Sec-WebSocket-Key" is reserved`},
		{"the gateway's own header", func(c config) { c.gateway("server::headers::"+connectionIDHeader, "x") }, `server: headers: "` + connectionIDHeader + `" is reserved`},
		{"header that cannot be sent", func(c config) { c.gateway("server::headers::Authorization", "mystery\nX: y") }, `server: headers: the value of "Authorization" cannot be sent`},
		{"no retries", func(c config) { c.gateway("server::retry::enabled", false) }, "server: retry::enabled: must not be false"},
		{"giving up", func(c config) { c.gateway("server::retry::max_elapsed_time", "5m") }, "server: retry::max_elapsed_time: must be 0"},
		{"admission", func(c config) { c.gateway("server::agent_admission", "deny") }, `server: agent_admission: must be "auto", "verify", "ask" or "accept", is "deny"`},
		{"keep-alive", func(c config) { c.gateway("server::keep_alive::timeout", "1s") }, "server::keep_alive: interval: must be"},
		{"no address of the status page", func(c config) { c.gateway("status::endpoint", "") }, "status::endpoint: must not be empty"},
		{"unknown key of the status page", func(c config) { c.gateway("status::port", 1) }, "port"},
		{"message size", func(c config) { c.gateway("max_message_size", 10) }, "max_message_size: must be"},
	} {
		t.Run(test.name, func(t *testing.T) {
			c := gatewayConfig("ws://opamp.example", "127.0.0.1:0")
			test.edit(c)
			code, output := validate(t, c)
			require.Equal(t, 1, code, output)
			require.Contains(t, output, test.wants)
			require.Contains(t, output, "opampgateway")
			require.NotContains(t, output, "mystery")
		})
	}

	t.Run("valid", func(t *testing.T) {
		code, output := validate(t, gatewayConfig("ws://opamp.example", "127.0.0.1:0"))
		require.Zero(t, code, output)
	})
}

// The example of the product's description is taken as it stands.
func TestDocumentedConfig(t *testing.T) {
	t.Setenv("OPAMP_SECRET_KEY", "abc")
	const text = `
# gateway-collector-config.yaml
extensions:
  opampgateway:
    server:
      endpoint: wss://app.bindplane.com/v1/opamp
      headers:
        Authorization: "Secret-Key ${env:OPAMP_SECRET_KEY}"
      connections: 3
    listener:
      endpoint: 0.0.0.0:4320
      tls:
        cert_file: /etc/otel/server.crt
        key_file:  /etc/otel/server.key
receivers: {otlp: {protocols: {grpc: }}}
exporters: {nop: }
service: {extensions: [opampgateway], pipelines: {logs: {receivers: [otlp], exporters: [nop]}}}
`
	path := filepath.Join(t.TempDir(), "config.yaml")
	require.NoError(t, os.WriteFile(path, []byte(text), 0o600))
	p := startProcess(t, "validate", collectorProgram(t), "validate", "--config", path)
	code, _ := p.wantExit(t)
	require.Zero(t, code, p.log.String())
}

// What is wrong outside the configuration shows at the start.
func TestCannotStart(t *testing.T) {
	t.Parallel()
	busy, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer busy.Close()
	missing := filepath.Join(t.TempDir(), "missing.pem")
	authority := newAuthority(t, "authority")
	id, other := authority.issue(t, "gateway"), authority.issue(t, "other")
	for _, test := range []struct {
		name  string
		edit  func(config)
		wants []string
	}{
		{"busy port", func(c config) { c.gateway("listener::endpoint", busy.Addr().String()) }, []string{"listener::endpoint: ", busy.Addr().String(), "address already in use"}},
		{"busy port of the status page", func(c config) { c.gateway("status::endpoint", busy.Addr().String()) }, []string{"status::endpoint: ", busy.Addr().String(), "address already in use"}},
		{"no such authenticator of the status page", func(c config) {
			c.gateway("status", map[string]any{"endpoint": freeAddress(t), "auth": map[string]any{"authenticator": "oidc"}})
		}, []string{"oidc"}},
		{"no such certificate of the status page", func(c config) {
			c.gateway("status", map[string]any{"endpoint": freeAddress(t), "tls": map[string]any{"cert_file": missing, "key_file": id.keyFile}})
		}, []string{"status::tls: ", missing}},
		{"no such CA file", func(c config) {
			c.gateway("server::endpoint", "wss://127.0.0.1:9")
			c.gateway("server::tls::ca_file", missing)
		}, []string{"server::tls: ", missing}},
		{"no such certificate", func(c config) {
			c.gateway("listener::tls", map[string]any{"cert_file": missing, "key_file": id.keyFile})
		}, []string{"listener::tls: ", missing}},
		{"key of another certificate", func(c config) {
			c.gateway("listener::tls", map[string]any{"cert_file": id.certFile, "key_file": other.keyFile})
		}, []string{"listener::tls: ", "private key does not match public key"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			g := launchGateway(t, "gateway", gatewayConfig("ws://127.0.0.1:9", freeAddress(t)), test.edit)
			code, _ := g.wantExit(t)
			require.Equal(t, 1, code)
			for _, want := range test.wants {
				require.Contains(t, g.log.String(), want)
			}
		})
	}
}

// validate runs the collector's own check of its configuration.
func validate(t *testing.T, c config) (code int, output string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "config.yaml")
	c.write(t, path)
	p := startProcess(t, "validate", collectorProgram(t), "validate", "--config", path)
	code, _ = p.wantExit(t)
	return code, strings.TrimSpace(p.log.String())
}
