package opampgateway

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
	"go.opentelemetry.io/collector/component"
	"go.opentelemetry.io/collector/config/confighttp"
	"go.opentelemetry.io/collector/config/configmiddleware"
	"go.opentelemetry.io/collector/config/configoptional"
	"go.opentelemetry.io/collector/extension/extensionauth"
	"go.uber.org/zap"

	"github.com/opampgateway/opampgateway/internal/gatewaytest"
	"github.com/opampgateway/opampgateway/internal/telemetry"
)

// These tests are about connections of which nobody has said yet that they may stay.

// rawRequest has what an upgrade request needs: six lines of headers.
const rawRequest = "GET /v1/opamp HTTP/1.1\r\nHost: gateway\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n" +
	"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"

// rawHeaders is how many they are.
const rawHeaders = 5

// write opens a connection to the gateway and writes these bytes.
func (s *stage) write(request string) net.Conn {
	s.t.Helper()
	conn, err := s.door.Dial(s.t.Context(), "tcp", gatewayAddress)
	require.NoError(s.t, err)
	s.t.Cleanup(func() { conn.Close() })
	_, err = io.WriteString(conn, request)
	require.NoError(s.t, err)
	return conn
}

// wantAnswer reads the answer to what was written.
func (s *stage) wantAnswer(conn net.Conn, status int) *http.Response {
	s.t.Helper()
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	require.NoError(s.t, err)
	require.Equal(s.t, status, resp.StatusCode)
	return resp
}

// TestRequestWithBody refuses what has a body, or says that it has, before anything of it is read.
func TestRequestWithBody(t *testing.T) {
	for name, headers := range map[string]string{
		"compressed":         "Content-Encoding: snappy\r\nContent-Length: 20971520\r\n",
		"that never comes":   "Content-Length: 1\r\n",
		"of unknown length":  "Transfer-Encoding: chunked\r\n",
		"with 100 (expect)":  "Content-Length: 5\r\nExpect: 100-continue\r\n",
		"of 0 bytes, though": "Content-Length: 0\r\nX: y\r\n",
	} {
		t.Run(name, func(t *testing.T) {
			play(t, func(t *testing.T, s *stage) {
				begin := time.Now()
				conn := s.write(rawRequest + headers + "\r\n")
				if strings.Contains(headers, "Content-Length: 0") {
					s.wantAnswer(conn, http.StatusSwitchingProtocols)
					return
				}
				s.wantAnswer(conn, http.StatusBadRequest)
				require.Zero(t, time.Since(begin), "it was waited for")
				_, err := io.ReadAll(conn)
				require.NoError(t, err, "the connection has ended")
				require.LessOrEqual(t, time.Since(begin), time.Second)
				require.Empty(t, s.server.Questions())
				s.wantAdmissions(telemetry.OutcomeBadRequest, 1)
			})
		})
	}
}

// TestSilentStrangers keeps no connection that does not go on, whatever it waits for.
func TestSilentStrangers(t *testing.T) {
	for name, begins := range map[string]string{
		"that say nothing":       "",
		"in the first line":      "GET /v1/op",
		"before the empty line":  rawRequest,
		"with a body that waits": "POST / HTTP/1.1\r\nHost: gateway\r\nContent-Length: 99\r\n\r\n12345",
		"after they were told":   "GET / HTTP/1.1\r\nHost: gateway\r\n\r\n",
	} {
		t.Run(name, func(t *testing.T) {
			play(t, func(t *testing.T, s *stage) {
				begin := time.Now()
				ends := make(chan time.Duration, 50)
				for range cap(ends) {
					conn := s.write(begins)
					go func() {
						_, _ = io.Copy(io.Discard, conn)
						ends <- time.Since(begin)
					}()
				}
				for range cap(ends) {
					require.LessOrEqual(t, <-ends, 75*time.Second)
				}
				s.wantNobody()
			})
		})
	}

	t.Run("that drip", func(t *testing.T) {
		play(t, func(t *testing.T, s *stage) {
			conn := s.write(rawRequest)
			begin := time.Now()
			var err error
			for err == nil {
				time.Sleep(time.Second)
				_, err = io.WriteString(conn, "X")
			}
			require.LessOrEqual(t, time.Since(begin), 75*time.Second)
		})
	})
}

// TestManyHeaders takes as many headers, and as many bytes of them, as are configured, and not one more.
func TestManyHeaders(t *testing.T) {
	few := func(cfg *Config) { cfg.Agents.MaxRequestHeaders, cfg.Agents.MaxRequestHeaderSize = 20, 2<<10 }
	for name, test := range map[string]struct {
		change        func(*Config)
		headers, size int
	}{
		"by default":    {func(*Config) {}, 100, 16 << 10},
		"as configured": {few, 20, 2 << 10},
	} {
		t.Run(name, func(t *testing.T) {
			play(t, func(t *testing.T, s *stage) {
				many := func(n int) string { return rawRequest + strings.Repeat("X:y\r\n", n-rawHeaders) + "\r\n" }
				large := func(size int) string {
					_, headers, _ := strings.Cut(rawRequest, "\r\n")
					return rawRequest + "X: " + strings.Repeat("y", size-len(headers)-len("X: \r\n")) + "\r\n\r\n"
				}
				s.wantAnswer(s.write(many(test.headers)), http.StatusSwitchingProtocols)
				s.wantAnswer(s.write(large(test.size)), http.StatusSwitchingProtocols)
				asked := len(s.server.Questions())
				s.wantAnswer(s.write(many(test.headers+1)), http.StatusRequestHeaderFieldsTooLarge)
				s.wantAnswer(s.write(large(test.size+1)), http.StatusRequestHeaderFieldsTooLarge)
				require.Len(t, s.server.Questions(), asked)
				s.wantAdmissions(telemetry.OutcomeBadRequest, 2)
			}, test.change)
		})
	}

	t.Run("that make too large a question", func(t *testing.T) {
		play(t, func(t *testing.T, s *stage) {
			s.door.WantRefused(t, "alice", http.StatusRequestHeaderFieldsTooLarge, "X-Quotes", strings.Repeat(`"`, 40<<10))
			require.Empty(t, s.server.Questions())
			s.wantAdmissions(telemetry.OutcomeBadRequest, 1)
			s.connect("bob", "X-Quotes", strings.Repeat(`"`, 30<<10))
			require.Less(t, len(s.server.WantQuestion().Frame), 64<<10+200)
		}, func(cfg *Config) { cfg.Agents.MaxRequestHeaderSize = 64 << 10 })
	})

	t.Run("are kept in no more than their bytes, and counted", func(t *testing.T) {
		play(t, func(t *testing.T, s *stage) {
			before := s.memory.Kept.Held()
			alice := s.introduce("alice", "X-Large", strings.Repeat("y", 10_000))
			synctest.Wait()
			require.InDelta(t, 10_000, s.memory.Kept.Held()-before, 1_000)
			alice.SayGoodbye()
			synctest.Wait()
			require.Equal(t, before, s.memory.Kept.Held())
		})
	})
}

// TestEarlyData refuses who does not wait for the answer. Nothing is left of it.
func TestEarlyData(t *testing.T) {
	frame := string(frameOf(gatewaytest.Status(gatewaytest.UID("alice"), 1)))
	play(t, func(t *testing.T, s *stage) {
		s.wantAnswer(s.write(rawRequest+"\r\n"+frame), http.StatusBadRequest)
		s.wantAdmissions(telemetry.OutcomeBadRequest, 1)
		require.Empty(t, s.server.Questions())
	})

	t.Run("while the server is asked", func(t *testing.T) {
		play(t, func(t *testing.T, s *stage) {
			s.server.OnConnect((*gatewaytest.Question).Silence)
			conn := s.write(rawRequest + "\r\n")
			question := s.server.WantQuestion()
			_, err := io.WriteString(conn, frame)
			require.NoError(t, err)
			synctest.Wait()
			question.Accept()
			s.wantAnswer(conn, http.StatusBadRequest)
			time.Sleep(time.Second) // in which it may read that
			s.wantAdmissions(telemetry.OutcomeBadRequest, 1)
			s.wantNobody()
			require.Empty(t, s.server.Received(gatewaytest.UID("alice")))
		})
	})
}

// TestOrigins lets in only web pages that are expected.
func TestOrigins(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		s.connect("page", "Origin", "https://console.example")
		s.connect("pattern", "Origin", "https://a.pages.example")
		s.door.WantRefused(t, "other", http.StatusForbidden, "Origin", "https://evil.example")
		s.door.WantRefused(t, "host", http.StatusForbidden, "Origin", "http://"+gatewayAddress)
		s.wantAdmissions(telemetry.OutcomeBadRequest, 2)
	}, func(cfg *Config) {
		cfg.Listener.CORS = configoptional.Some(confighttp.CORSConfig{AllowedOrigins: []string{"https://console.example", "https://*.pages.example"}})
	})
}

// TestCrowdOfStrangers has one address come with 1,500 requests, about which the server never says
// anything, and hang up. Those of other addresses do not wait for that.
func TestCrowdOfStrangers(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		s.server.OnConnect(func(q *gatewaytest.Question) {
			if !strings.HasPrefix(q.Who(), "mallory") {
				q.Accept()
			}
		})
		s.comeFrom("192.0.2.66")
		ctx, hangUp := context.WithCancel(t.Context())
		var knocks []<-chan answer
		for i := range 1500 {
			knocks = append(knocks, s.knockContext(ctx, fmt.Sprint("mallory ", i)))
		}
		time.Sleep(100 * time.Millisecond)
		hangUp()
		for _, knock := range knocks {
			require.Error(t, (<-knock).err)
		}
		asked := len(s.server.Questions())
		require.Less(t, asked, 3*256, "of one address, no more than a part of what the server is asked at once")

		for i := range 15 {
			s.comeFrom(fmt.Sprintf("192.0.2.%d", i))
			begin := time.Now()
			s.introduce(fmt.Sprint("honest ", i))
			require.LessOrEqual(t, time.Since(begin), 2*time.Second)
		}

		// The server is still at work on what was hung up on: places are free only afterwards.
		s.comeFrom("192.0.2.66")
		ctx, hangUp = context.WithTimeout(t.Context(), time.Second)
		defer hangUp()
		for i := range 1500 {
			s.knockContext(ctx, fmt.Sprint("mallory again ", i))
		}
		time.Sleep(2 * time.Second)
		require.Len(t, s.server.Questions(), asked+15)
	})
}

// TestReadTimeout is that of the request, not of the time that the server takes.
func TestReadTimeout(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		s.server.OnConnect((*gatewaytest.Question).Silence)
		knock := s.knock("alice")
		question := s.server.WantQuestion()
		time.Sleep(15 * time.Second)
		question.Accept()
		alice := s.wantLetIn(knock)
		time.Sleep(15 * time.Second)
		s.server.WantFrame(alice.UID, alice.Say(1))
	}, func(cfg *Config) { cfg.Listener.ReadTimeout = 10 * time.Second })
}

// TestClientCert tells the server which certificate an agent has shown, and never what it says of that itself.
func TestClientCert(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		s.connect("alice", "Client-Cert", ":bWFsbG9yeQ==:", "Client-Cert-Chain", ":bWFsbG9yeQ==:", "X-Client-Cert", "fine")
		question := s.server.WantQuestion()
		require.NotContains(t, question.Headers, "Client-Cert")
		require.NotContains(t, question.Headers, "Client-Cert-Chain")
		require.Equal(t, "fine", question.Headers.Get("X-Client-Cert"))
	})

	t.Run("that was verified", func(t *testing.T) {
		authority := newAuthority(t)
		cert, client := authority.issue(t, "listener"), authority.issue(t, "agent")
		r := startLoopback(t, nil, map[string]any{"listener": map[string]any{"tls": map[string]any{
			"cert_file": cert.certFile, "key_file": cert.keyFile, "client_ca_file": authority.file,
		}}}, nil)
		r.door.URL = "wss" + strings.TrimPrefix(r.door.URL, "ws")
		r.door.TLS = &tls.Config{RootCAs: authority.pool, Certificates: []tls.Certificate{client.pair}}
		r.door.Connect(t, "alice", "Client-Cert", ":bWFsbG9yeQ==:")
		want := ":" + base64.StdEncoding.EncodeToString(client.pair.Certificate[0]) + ":"
		require.Equal(t, []string{want}, r.server.WantQuestion().Headers["Client-Cert"])
	})
}

// TestRefusalHeaders gives the agent of the server's headers only those that are meant for it.
func TestRefusalHeaders(t *testing.T) {
	for name, test := range map[string]struct {
		status  int
		headers []string // that the server sets
		want    []string // those of them that arrive
	}{
		"moved":                {301, []string{"Location", "wss://elsewhere/v1/opamp"}, []string{"Location"}},
		"found":                {302, []string{"Location", "https://elsewhere/v1/opamp"}, []string{"Location"}},
		"see other":            {303, []string{"Location", "/v2/opamp"}, []string{"Location"}},
		"permanent":            {308, []string{"Location", "ws://elsewhere", "X-Why", "moved"}, []string{"Location", "X-Why"}},
		"location of nowhere":  {403, []string{"Location", "ws://elsewhere"}, nil},
		"upgrade of another":   {403, []string{"Upgrade", "OpAMP/v9"}, nil},
		"those of HTTP":        {403, []string{"Set-Cookie", "a=b", "Server", "x", "Cache-Control", "no-store", "Strict-Transport-Security", "max-age=1", "Access-Control-Allow-Origin", "*"}, nil},
		"those of its own":     {429, []string{"Retry-After", "77", "X-Reason", "quota", "WWW-Authenticate", "Bearer"}, []string{"Retry-After", "X-Reason", "WWW-Authenticate"}},
		"too much of one":      {403, []string{"X-Large", strings.Repeat("y", 17<<10)}, nil},
		"with a line feed":     {403, []string{"X-Evil", "a\r\nX-Injected: b"}, nil},
		"a place that is none": {302, []string{"Location", "javascript:alert(1)"}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			play(t, func(t *testing.T, s *stage) {
				s.server.OnConnect(func(q *gatewaytest.Question) { q.Refuse(test.status, test.headers...) })
				status := test.status
				if name == "a place that is none" {
					status = http.StatusUnauthorized
				}
				got := s.door.WantRefused(t, "alice", status)
				wanted := map[string]bool{}
				for _, name := range test.want {
					wanted[name] = true
				}
				for i := 0; i < len(test.headers); i += 2 {
					name, value := test.headers[i], test.headers[i+1]
					if wanted[name] {
						require.Equal(t, []string{value}, got[http.CanonicalHeaderKey(name)])
					} else {
						require.NotContains(t, got, name)
					}
				}
				require.NotContains(t, got, "X-Injected")
			})
		})
	}

	t.Run("at most 16 KiB in all", func(t *testing.T) {
		play(t, func(t *testing.T, s *stage) {
			var headers []string
			for i := range 100 {
				headers = append(headers, fmt.Sprintf("X-%03d", i), strings.Repeat("y", 1000))
			}
			s.server.OnConnect(func(q *gatewaytest.Question) { q.Refuse(http.StatusForbidden, headers...) })
			size := 0
			for name, values := range s.door.WantRefused(t, "alice", http.StatusForbidden) {
				if strings.HasPrefix(name, "X-0") {
					size += len(name) + len(values[0])
				}
			}
			require.LessOrEqual(t, size, 16<<10)
			require.Greater(t, size, 14<<10)
		})
	})
}

// middleware is a middleware extension.
type middleware struct {
	component.StartFunc
	component.ShutdownFunc
	wrap func(http.Handler) http.Handler
}

// GetHTTPHandler is that of extensionmiddleware.HTTPServer.
func (m middleware) GetHTTPHandler(context.Context) (func(context.Context, http.Handler) (http.Handler, error), error) {
	return func(_ context.Context, next http.Handler) (http.Handler, error) { return m.wrap(next), nil }, nil
}

// playBehind is play where a middleware stands between the listener and the gateway.
func playBehind(t *testing.T, wrap func(http.Handler) http.Handler, test func(t *testing.T, s *stage)) {
	t.Helper()
	id := component.MustNewID("middleware")
	playWithout(t, func(t *testing.T, s *stage) {
		s.extensions = map[component.ID]component.Component{id: middleware{wrap: wrap}}
		s.server.Start()
		s.start(func(cfg *Config) { cfg.Listener.Middlewares = []configmiddleware.Config{{ID: id}} })
		s.server.WantLinks(3)
		test(t, s)
	})
}

// TestPanic keeps a fault of an extension to the one connection in which it shows.
func TestPanic(t *testing.T) {
	wantPanic := func(t *testing.T, s *stage) {
		t.Helper()
		bob := s.introduce("bob")
		knock := <-s.knock("alice")
		require.Nil(t, knock.agent)
		require.Error(t, knock.err, "the connection ends")
		s.wantFault(telemetry.ReasonPanic, 1)
		told := s.logged(zap.ErrorLevel, "")
		require.Len(t, told, 1)
		require.Equal(t, "oh dear", told[0].ContextMap()["panic"])
		require.Contains(t, told[0].ContextMap()["stack"], "strangers_test.go")
		require.Equal(t, "10.0.0.1", told[0].ContextMap()["client.address"])
		s.wantConnections(1)
		require.Zero(t, s.memory.Requests.Held())
		s.server.WantFrame(bob.UID, bob.Say(1))
		s.introduce("cathy")
		s.wantSpread(2, 1)
	}

	t.Run("of a middleware, before the agent is asked about", func(t *testing.T) {
		playBehind(t, func(next http.Handler) http.Handler {
			return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if r.Header.Get(gatewaytest.NameHeader) == "alice" {
					panic("oh dear")
				}
				next.ServeHTTP(w, r)
			})
		}, wantPanic)
	})

	t.Run("of a middleware, after it was let in", func(t *testing.T) {
		playBehind(t, func(next http.Handler) http.Handler {
			return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if r.Header.Get(gatewaytest.NameHeader) == "alice" {
					w = fragile{w}
				}
				next.ServeHTTP(w, r)
			})
		}, wantPanic)
	})

	t.Run("of the authentication", func(t *testing.T) {
		id := component.MustNewID("doorman")
		playWithout(t, func(t *testing.T, s *stage) {
			s.extensions = map[component.ID]component.Component{id: doorman{ServerAuthenticateFunc: func(ctx context.Context, headers map[string][]string) (context.Context, error) {
				if http.Header(headers).Get(gatewaytest.NameHeader) == "alice" {
					panic("oh dear")
				}
				return ctx, nil
			}}}
			s.server.Start()
			s.start(authenticated(id))
			s.server.WantLinks(3)
			wantPanic(t, s)
		})
	})
}

// fragile breaks when the connection is to be upgraded.
type fragile struct{ http.ResponseWriter }

func (fragile) Hijack() (net.Conn, *bufio.ReadWriter, error) { panic("oh dear") }

func authenticated(id component.ID) func(*Config) {
	return func(cfg *Config) {
		var auth confighttp.AuthConfig
		auth.Config.AuthenticatorID = id //nolint:staticcheck // newer collectors do not embed Config
		cfg.Listener.Auth = configoptional.Some(auth)
	}
}

var _ extensionauth.Server = doorman{}

// TestUnauthorized counts and logs those whom the listener's authentication, or a middleware, turns away.
func TestUnauthorized(t *testing.T) {
	id := component.MustNewID("doorman")
	playWithout(t, func(t *testing.T, s *stage) {
		s.extensions = map[component.ID]component.Component{id: doorman{ServerAuthenticateFunc: func(ctx context.Context, headers map[string][]string) (context.Context, error) {
			if http.Header(headers).Get("Authorization") != "sesame" {
				return ctx, errors.New("not on the list")
			}
			return ctx, nil
		}}}
		s.server.Start()
		s.start(authenticated(id))
		s.server.WantLinks(3)
		s.door.WantRefused(t, "mallory", http.StatusUnauthorized, "Authorization", "simsalabim", "User-Agent", "mallory/6.6")
		s.wantAdmissions(telemetry.OutcomeUnauthorized, 1)
		require.Empty(t, s.server.Questions())
		told := s.logged(zap.InfoLevel, "listener::auth")
		require.Len(t, told, 1)
		require.Equal(t, "mallory/6.6", told[0].ContextMap()["user_agent.original"])
		s.introduce("alice", "Authorization", "sesame")
		s.wantAdmissions(telemetry.OutcomeUnauthorized, 1)
		s.wantAdmissions(telemetry.OutcomeAccepted, 1)
		s.wantNotLogged("simsalabim", "sesame")
	})

	t.Run("by a middleware", func(t *testing.T) {
		playBehind(t, func(http.Handler) http.Handler {
			return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusTooManyRequests) })
		}, func(t *testing.T, s *stage) {
			s.door.WantRefused(t, "alice", http.StatusTooManyRequests)
			s.wantAdmissions(telemetry.OutcomeUnauthorized, 1)
		})
	})
}

// TestUpgradeThatCannotWork says so when a middleware makes it impossible for anybody to connect.
func TestUpgradeThatCannotWork(t *testing.T) {
	playBehind(t, func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			next.ServeHTTP(struct{ http.ResponseWriter }{w}, r) // hides all else that w can do
		})
	}, func(t *testing.T, s *stage) {
		s.door.WantRefused(t, "alice", http.StatusInternalServerError)
		s.wantAdmissions(telemetry.OutcomeCannotUpgrade, 1)
		s.wantAdmissions(telemetry.OutcomeAbandoned, 0)
		require.Len(t, s.logged(zap.ErrorLevel, "middleware"), 1)
		s.wantConnections(0)
		s.wantSpread(0, 0)
		require.Zero(t, s.memory.Kept.Held())
	})
}
