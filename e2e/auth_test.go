package e2e

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"
)

// toll is a server that takes only links with the right credentials, in front of which it keeps a list of those that came.
type toll struct {
	*Server
	pass http.Handler
	at   string // its URL

	mu    sync.Mutex
	right string // the Authorization that is taken
	came  []string
}

func startToll(t *testing.T, right string) *toll {
	t.Helper()
	s := &toll{Server: startServer(t, serverOptions{}), right: right}
	s.pass = httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: s.address})
	front := httptest.NewServer(s)
	t.Cleanup(front.Close)
	s.at = "ws://" + front.Listener.Addr().String() + "/v1/opamp"
	return s
}

func (s *toll) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	with := r.Header.Get("Authorization")
	s.mu.Lock()
	s.came = append(s.came, with)
	right := s.right
	s.mu.Unlock()
	if with != right {
		http.Error(w, "nobody knows "+with, http.StatusUnauthorized)
		return
	}
	s.pass.ServeHTTP(w, r)
}

// ask changes which credentials are taken from here on.
func (s *toll) ask(right string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.right = right
}

// with returns with what credentials links came.
func (s *toll) with() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.came)
}

// authenticated has the gateway use an extension of the collector towards its server.
func authenticated(extension string, settings map[string]any) func(config) {
	return func(c config) {
		c.set("service::telemetry::logs::level", "debug")
		c.set("extensions::"+extension, settings)
		c.set("service::extensions", []any{"opampgateway", extension}) // which starts first nevertheless
		c.gateway("server::auth", map[string]any{"authenticator": extension})
	}
}

// replace puts a text in a file, as those do that rotate credentials: by another file of its name.
func replace(t *testing.T, path, text string) {
	t.Helper()
	require.NoError(t, os.WriteFile(path+".new", []byte(text), 0o600))
	require.NoError(t, os.Rename(path+".new", path))
}

// A token in a file, which somebody else rotates: living links stay, others come with the new one.
func TestServerAuthByRotatingToken(t *testing.T) {
	t.Parallel()
	server := startToll(t, "Bearer s3cret-one")
	file := filepath.Join(t.TempDir(), "token")
	replace(t, file, "s3cret-one")
	gateway := startGateway(t, server.at, authenticated("bearertokenauth", map[string]any{"filename": file}))
	server.wantLinks(t, upstream(3)...)
	alice := startAgent(t, "alice", gateway.url(), agentOptions{})
	server.wantAgent(t, alice.id(), "is connected", isConnected)
	read := func(times int) {
		t.Helper()
		eventually(t, func() string {
			if n := len(gateway.log.with("refresh token")); n < times {
				return fmt.Sprintf("the token was read %d times, want %d", n, times)
			}
			return ""
		})
	}
	read(1)

	server.ask("Bearer s3cret-two")
	replace(t, file, "s3cret-two")
	read(2)
	require.Len(t, server.with(), 3, "nobody has to come again for that")
	server.cut(t, upstream(3)[0])
	gateway.wantLinks(t, 4)
	require.Equal(t, "Bearer s3cret-two", server.with()[3])
	server.wantLinks(t, upstream(3)...)

	// A reload stops the extension and starts another one.
	gateway.reload(t, func(config) {})
	gateway.wantReady(t, 2)
	gateway.wantLog(t, "going on with the connections from before the reload")
	read(3)
	require.Len(t, server.with(), 4)
	server.ask("Bearer s3cret-three")
	replace(t, file, "s3cret-three")
	read(4)
	server.cut(t, upstream(3)[0])
	gateway.wantLinks(t, 5)
	require.Equal(t, "Bearer s3cret-three", server.with()[4])
	alice.wantConnects(t, 1)
	require.NotContains(t, gateway.log.String(), "s3cret")
}

// The server does not take the token, and repeats it.
func TestServerAuthIsRefused(t *testing.T) {
	t.Parallel()
	server := startToll(t, "Bearer s3cret-two")
	file := filepath.Join(t.TempDir(), "token")
	replace(t, file, "s3cret-one")
	gateway := startGateway(t, server.at, authenticated("bearertokenauth", map[string]any{"filename": file}))
	gateway.wantLog(t, "cannot connect to the server", "server answered 401 Unauthorized: nobody knows Bearer…", "see server::auth")
	replace(t, file, "s3cret-two")
	server.wantLinks(t, upstream(3)...)
	require.NotContains(t, gateway.log.String(), "s3cret")
}

// User and password.
func TestServerAuthByPassword(t *testing.T) {
	t.Parallel()
	server := startToll(t, "Basic Z2F0ZXdheTpzM2NyZXQ=")
	gateway := startGateway(t, server.at, authenticated("basicauth", map[string]any{
		"client_auth": map[string]any{"username": "gateway", "password": "s3cret"},
	}), func(c config) {
		c.gateway("server::headers", map[string]any{"Authorization": "Secret-Key configured"}) // which gives way
	})
	server.wantLinks(t, upstream(3)...)
	require.NotContains(t, gateway.log.String(), "s3cret")
}

// Tokens of an OAuth 2.0 server, which is down at first, then refuses, and then is slow.
func TestServerAuthByOAuth2(t *testing.T) {
	t.Parallel()
	const secret = "s3cret"
	server := startToll(t, "Bearer "+secret+"-token")
	address := freeAddress(t)
	gateway := startGateway(t, server.at, authenticated("oauth2client", map[string]any{
		"client_id": "gateway", "client_secret": secret, "token_url": "http://" + address + "/token?key=" + secret,
	}))
	gateway.wantLog(t, "cannot connect to the server", "server::auth: oauth2client has given no credentials: dial "+address, "connection refused")

	answers := make(chan func(http.ResponseWriter), 1)
	issuer := &httptest.Server{Config: &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		answer := <-answers
		answers <- answer
		_ = r.ParseForm()
		_, password, _ := r.BasicAuth()
		if password != secret && r.PostForm.Get("client_secret") != secret {
			w.WriteHeader(http.StatusTeapot)
			return
		}
		answer(w)
	})}}
	answers <- func(w http.ResponseWriter) {
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(http.StatusUnauthorized)
		_ = json.NewEncoder(w).Encode(map[string]any{"error": "invalid_client", "error_description": "not " + secret})
	}
	issuer.Listener = listenAt(t, address)
	issuer.Start()
	t.Cleanup(issuer.Close)
	gateway.wantLog(t, "cannot connect to the server", "server::auth: oauth2client has given no credentials", "invalid_client")

	<-answers
	answers <- func(w http.ResponseWriter) {
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(map[string]any{"access_token": secret + "-token", "token_type": "Bearer", "expires_in": 3600})
	}
	server.wantLinks(t, upstream(3)...)
	require.NotContains(t, gateway.log.String(), secret)
}

// What stands in the configuration has to be an extension of the collector, of the right kind.
func TestServerAuthIsWrong(t *testing.T) {
	t.Parallel()
	c := gatewayConfig("ws://localhost", "127.0.0.1:0")
	c.gateway("server::auth", map[string]any{"authenticator": "bearertokenauth"})
	p := startCollector(t, "collector", c)
	p.wantLog(t, "bearertokenauth")
	code, _ := p.wantExit(t)
	require.Equal(t, 1, code)
}

// The listener has users with passwords, or tokens; a reload brings others, and disturbs nobody who is in.
func TestListenerAuth(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		extension     string
		settings      func(file string) map[string]any
		before, after string // what is in the file
		old, new      string // what agents show
	}{
		"users": {
			"basicauth", func(file string) map[string]any { return map[string]any{"htpasswd": map[string]any{"file": file}} },
			"agent:s3cret-one\n", "agent:s3cret-two\n", "Basic YWdlbnQ6czNjcmV0LW9uZQ==", "Basic YWdlbnQ6czNjcmV0LXR3bw==",
		},
		"tokens": {
			"bearertokenauth", func(file string) map[string]any { return map[string]any{"filename": file} },
			"s3cret-zero\ns3cret-one\n", "s3cret-two\n", "Bearer s3cret-one", "Bearer s3cret-two",
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			server := startServer(t, serverOptions{})
			file := filepath.Join(t.TempDir(), "credentials")
			replace(t, file, test.before)
			gateway := startGateway(t, server.url(), func(c config) {
				c.set("service::telemetry::logs::level", "debug")
				c.set("extensions::"+test.extension, test.settings(file))
				c.set("service::extensions", []any{"opampgateway", test.extension})
				c.gateway("listener::auth", map[string]any{"authenticator": test.extension})
			})
			gateway.wantLinks(t, 3)
			with := func(credentials string) agentOptions {
				return agentOptions{headers: http.Header{"Authorization": {credentials}}}
			}
			refused := func(credentials string) {
				t.Helper()
				_, resp, err := dialRaw(gateway.url(), http.Header{"Authorization": {credentials}}, nil)
				wantStatus(t, http.StatusUnauthorized, resp, err)
			}
			alice := startAgent(t, "alice", gateway.url(), with(test.old))
			server.wantAgent(t, alice.id(), "is connected", isConnected)
			refused(test.new)
			refused("")
			refused("Nonsense")
			gateway.wantLog(t, "request refused by listener::auth or a middleware")

			replace(t, file, test.after)
			gateway.reload(t, func(config) {})
			gateway.wantReady(t, 2)
			bob := startAgent(t, "bob", gateway.url(), with(test.new))
			server.wantAgent(t, bob.id(), "is connected", isConnected)
			refused(test.old)
			alice.say(t, "still here")
			alice.wantHeard(t, "still here")
			alice.wantConnects(t, 1)
			require.NotContains(t, strings.ReplaceAll(gateway.log.String(), file, ""), "s3cret")
		})
	}
}
