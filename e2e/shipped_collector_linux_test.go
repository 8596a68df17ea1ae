package e2e

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"
)

// shippedExample returns the configuration of docs/shipped-collector.md that has all of these in it, as a file.
func shippedExample(t *testing.T, has ...string) string {
	t.Helper()
	for _, block := range regexp.MustCompile("(?ms)^```yaml\n(.*?\n)```$").FindAllStringSubmatch(readText(t, "../docs/shipped-collector.md"), -1) {
		found := true
		for _, text := range has {
			found = found && strings.Contains(block[1], text)
		}
		if found {
			path := filepath.Join(t.TempDir(), "config.yaml")
			require.NoError(t, os.WriteFile(path, []byte(block[1]), 0o600))
			return path
		}
	}
	require.Fail(t, "there is no such example", "%v", has)
	return ""
}

// startShipped starts the collector with an example, but for what is set: those of one site.
func startShipped(t *testing.T, name, example string, environment []string, set map[string]string) *Process {
	t.Helper()
	args := []string{"--config", example, "--config", "yaml:service::telemetry::metrics::level: none"}
	for key, value := range set {
		args = append(args, "--config", fmt.Sprintf("yaml:%s: %q", key, value))
	}
	return startProcessIn(t, append([]string{"OPAMP_SECRET_KEY=0123456789"}, environment...), name, collectorProgram(t), args...)
}

// The gateway that is nothing else relays an agent.
func TestShippedGatewayOnly(t *testing.T) {
	t.Parallel()
	server, listen := startServer(t, serverOptions{}), freeAddress(t)
	startShipped(t, "gateway", shippedExample(t, "extensions: [opampgateway]"), nil, map[string]string{
		"extensions::opampgateway::server::endpoint": server.url(), "extensions::opampgateway::listener::endpoint": listen,
	})
	eventually(t, func() string {
		if len(server.linkNames()) != 3 {
			return fmt.Sprintf("links: %v", server.linkNames())
		}
		return ""
	})
	alice := startAgent(t, "alice", "ws://"+listen, agentOptions{})
	server.wantAgent(t, alice.id(), "is connected", isConnected)
}

// A token stands before the server, and users before the status page; an agent says the token by the same extension, or
// gets one of OAuth for the server.
func TestShippedAuthenticators(t *testing.T) {
	t.Parallel()
	server, listen, page := startServer(t, serverOptions{}), freeAddress(t), freeAddress(t)
	startShipped(t, "gateway", shippedExample(t, "authenticator: bearertokenauth/agents"),
		[]string{"AGENTS_TOKEN=let-me-in", "OPERATORS=olga:knows"}, map[string]string{
			"extensions::opampgateway::server::endpoint":   server.url(),
			"extensions::opampgateway::listener::endpoint": listen,
			"extensions::opampgateway::status::endpoint":   page,
		})
	eventually(t, func() string {
		if len(server.linkNames()) != 3 {
			return fmt.Sprintf("links: %v", server.linkNames())
		}
		return ""
	})

	code, _ := get(t, "http://"+page+"/api/v1/status")
	require.Equal(t, http.StatusUnauthorized, code)
	code, body := get(t, "http://olga:knows@"+page+"/api/v1/status")
	require.Equal(t, http.StatusOK, code, body)

	carol := uuid.Must(uuid.NewV7())
	startShipped(t, "stranger", shippedExample(t, "auth: bearertokenauth/gateway"), []string{"AGENTS_TOKEN=guessed"}, map[string]string{
		"extensions::opamp::server::ws::endpoint": "ws://" + listen, "extensions::opamp::instance_uid": carol.String(),
	})
	bob := uuid.Must(uuid.NewV7())
	startShipped(t, "agent", shippedExample(t, "auth: bearertokenauth/gateway"), []string{"AGENTS_TOKEN=let-me-in"}, map[string]string{
		"extensions::opamp::server::ws::endpoint": "ws://" + listen, "extensions::opamp::instance_uid": bob.String(),
	})
	server.wantAgent(t, bob, "is connected", isConnected)
	eventually(t, func() string { // the stranger has been refused
		_, body := get(t, "http://olga:knows@"+page+"/api/v1/status")
		if !regexp.MustCompile(`"name":"unauthorized","what":"[^"]*","count":[1-9]`).MatchString(body) {
			return "nobody was refused at the listener"
		}
		return ""
	})
	for _, q := range server.asked() {
		require.Equal(t, "Secret-Key 0123456789", q.Headers.Get("Authorization"))
		require.Equal(t, "let-me-in", q.Headers.Get("X-Gateway-Token"), "the server is not asked about strangers")
	}
}

// An agent's token of OAuth comes to the server through the gateway.
func TestShippedOAuth(t *testing.T) {
	t.Parallel()
	server, listen := startServer(t, serverOptions{}), freeAddress(t)
	startShipped(t, "gateway", shippedExample(t, "extensions: [opampgateway]"), nil, map[string]string{
		"extensions::opampgateway::server::endpoint": server.url(), "extensions::opampgateway::listener::endpoint": listen,
	})
	issuer := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		_, _ = io.WriteString(w, `{"access_token":"issued","token_type":"Bearer","expires_in":3600}`)
	}))
	t.Cleanup(issuer.Close)
	dave := uuid.Must(uuid.NewV7())
	startShipped(t, "agent", shippedExample(t, "auth: oauth2client"), []string{"CLIENT_SECRET=secret", "TOKEN_URL=" + issuer.URL}, map[string]string{
		"extensions::opamp::server::ws::endpoint": "ws://" + listen, "extensions::opamp::instance_uid": dave.String(),
	})
	server.wantAgent(t, dave, "is connected", isConnected)
	asked := server.asked()
	require.NotEmpty(t, asked)
	require.Equal(t, "Bearer issued", asked[len(asked)-1].Headers.Get("Authorization"))
}

// The forwarder next to a gateway hands on downloads and what is polled, to a server with the right name in its certificate,
// and nothing else.
func TestForwarder(t *testing.T) {
	t.Parallel()
	haproxy, err := exec.LookPath("/usr/sbin/haproxy")
	if err != nil {
		haproxy, err = exec.LookPath("haproxy")
	}
	require.NoError(t, err, "install it: make haproxy")
	const name = "opamp.example.com"
	authority := newAuthority(t, "upstream")
	upstream := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		_, _ = fmt.Fprintf(w, "%s %s%s key %s: %s", r.Method, r.Host, r.URL.Path, r.Header.Get("Authorization"), body)
	}))
	upstream.TLS = authority.mutual(authority.issue(t, name))
	upstream.TLS.ClientAuth = 0
	upstream.StartTLS()
	t.Cleanup(upstream.Close)

	text := readText(t, "../deploy/haproxy/forwarder.cfg")
	if os.Geteuid() != 0 { // who is not root cannot become another user
		text = strings.NewReplacer("user haproxy", "", "group haproxy", "").Replace(text)
	}
	file := filepath.Join(t.TempDir(), "forwarder.cfg")
	require.NoError(t, os.WriteFile(file, []byte(text), 0o600))
	command(t, haproxy, "-c", "-f", file) // with the defaults, which an operator replaces
	start := func(name string) (url string) {
		listen := freeAddress(t)
		startProcessIn(t, []string{
			"LISTEN=" + listen, "UPSTREAM=" + upstream.Listener.Addr().String(), "UPSTREAM_NAME=" + name, "UPSTREAM_CA=" + authority.file,
		}, "haproxy for "+name, haproxy, "-db", "-f", file)
		eventually(t, func() string {
			if !dialable(listen) {
				return "haproxy does not listen"
			}
			return ""
		})
		return "http://" + listen
	}
	ask := func(method, url, body string) (int, string) {
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		request, err := http.NewRequestWithContext(ctx, method, url, strings.NewReader(body))
		require.NoError(t, err)
		request.Header.Set("Authorization", "mine")
		response, err := http.DefaultClient.Do(request)
		require.NoError(t, err)
		defer response.Body.Close()
		answer, err := io.ReadAll(response.Body)
		require.NoError(t, err)
		return response.StatusCode, string(answer)
	}

	url := start(name)
	code, body := ask(http.MethodGet, url+"/downloads/agent.tar.gz", "")
	require.Equal(t, http.StatusOK, code, body)
	require.Equal(t, "GET opamp.example.com/downloads/agent.tar.gz key mine: ", body)
	code, body = ask(http.MethodPost, url+"/v1/opamp", "status")
	require.Equal(t, http.StatusOK, code, body)
	require.Equal(t, "POST opamp.example.com/v1/opamp key mine: status", body)
	for _, path := range []string{"/", "/v1/agents", "/downloads/../v1/agents", "/downloads/%2e%2e/v1/agents", "/v1/opamp"} {
		code, body = ask(http.MethodGet, url+path, "")
		require.Equal(t, http.StatusForbidden, code, "%s: %s", path, body)
	}
	code, _ = ask(http.MethodPost, url+"/downloads/agent.tar.gz", "mine")
	require.Equal(t, http.StatusForbidden, code)

	code, body = ask(http.MethodGet, start("another.example.com")+"/downloads/agent.tar.gz", "")
	require.Equal(t, http.StatusServiceUnavailable, code, "the server is not who it should be: %s", body)
}
