package opampgateway

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
	"go.opentelemetry.io/collector/component"
	"go.opentelemetry.io/collector/config/configauth"
	"go.opentelemetry.io/collector/config/configopaque"
	"go.opentelemetry.io/collector/config/configoptional"
	"go.opentelemetry.io/collector/extension/extensionauth"
	"go.uber.org/zap"

	"github.com/opampgateway/opampgateway/internal/gatewaytest"
)

// issuer is an authenticator whose token is another one each time: its name and a number.
type issuer struct {
	component.StartFunc
	component.ShutdownFunc
	extensionauth.ClientRoundTripperFunc

	issued atomic.Int64
	fails  atomic.Pointer[error]
}

var issuerID = component.MustNewID("issuer")

func newIssuer(name string) *issuer {
	i := &issuer{}
	i.ClientRoundTripperFunc = func(base http.RoundTripper) (http.RoundTripper, error) {
		return roundTripper(func(r *http.Request) (*http.Response, error) {
			if err := i.fails.Load(); err != nil {
				return nil, *err
			}
			r = r.Clone(r.Context())
			r.Header.Set("Authorization", fmt.Sprintf("Bearer %s-%d", name, i.issued.Add(1)))
			return base.RoundTrip(r)
		}), nil
	}
	return i
}

type roundTripper func(*http.Request) (*http.Response, error)

func (f roundTripper) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// withIssuer has the gateway authenticated by an issuer.
func withIssuer(cfg *Config) {
	cfg.Server.Auth = configoptional.Some(configauth.Config{AuthenticatorID: issuerID})
}

// startIssued starts the server, and a gateway in a collector with this issuer.
func (s *stage) startIssued(i *issuer, change ...func(*Config)) {
	s.t.Helper()
	s.extensions = map[component.ID]component.Component{issuerID: i}
	s.server.Start()
	s.start(append([]func(*Config){withIssuer}, change...)...)
}

// TestServerAuth has each dial of a link be authenticated anew, and those that there are stay.
func TestServerAuth(t *testing.T) {
	playWithout(t, func(t *testing.T, s *stage) {
		s.startIssued(newIssuer("token"), func(cfg *Config) {
			cfg.Server.Headers.Set("Authorization", "Secret-Key configured")
			cfg.Server.Headers.Set("X-Team", "a", "b")
		})
		tokens := func(links []*gatewaytest.Link) (all []string) {
			for _, link := range links {
				require.Equal(t, []string{"a", "b"}, link.Header["X-Team"])
				require.Len(t, link.Header["Authorization"], 1, "in place of that of server::headers")
				all = append(all, link.Header.Get("Authorization"))
			}
			return all
		}
		first := tokens(s.server.WantLinks(3))
		require.ElementsMatch(t, []string{"Bearer token-1", "Bearer token-2", "Bearer token-3"}, first)
		alice := s.introduce("alice")
		time.Sleep(time.Hour)
		require.Len(t, s.server.Upgrades(), 3, "a link lives on with an old token")
		s.server.WantLinks(3)[1].Reset()
		time.Sleep(time.Second)
		require.Equal(t, []string{first[0], "Bearer token-4", first[2]}, tokens(s.server.WantLinks(3)))
		s.server.WantFrame(alice.UID, alice.Say(1))
	})
}

// TestServerAuthAtReload has the extension asked that the collector has now: the one before was shut down.
func TestServerAuthAtReload(t *testing.T) {
	playWithout(t, func(t *testing.T, s *stage) {
		before, after := newIssuer("before"), newIssuer("after")
		s.startIssued(before)
		links := s.server.WantLinks(3)
		alice := s.introduce("alice")
		s.host.extensions = map[component.ID]component.Component{issuerID: after}
		s.reload()
		time.Sleep(time.Minute)
		require.Len(t, s.server.Upgrades(), 3, "nothing has changed for the links")
		links[0].Reset()
		synctest.Wait()
		time.Sleep(time.Second)
		upgrades := s.server.Upgrades()
		require.Len(t, upgrades, 4)
		require.Equal(t, "Bearer after-1", upgrades[3].Header.Get("Authorization"))
		require.EqualValues(t, 3, before.issued.Load())
		s.server.WantFrame(alice.UID, alice.Say(1))

		// Without it, there are other links.
		s.reload(func(cfg *Config) { cfg.Server.Auth = configoptional.None[configauth.Config]() })
		time.Sleep(2 * time.Second)
		for _, link := range s.server.WantLinks(3) {
			require.Empty(t, link.Header.Get("Authorization"))
		}
		s.server.WantFrame(alice.UID, alice.Say(2))
	})
}

// TestServerAuthFails says in the log what is wrong, and goes on trying.
func TestServerAuthFails(t *testing.T) {
	const secret = "s3cret"
	playWithout(t, func(t *testing.T, s *stage) {
		i := newIssuer("token")
		no := errors.New("cannot get a token (endpoint \"https://idp/?key=" + secret + "\"): 401 Unauthorized\nResponse: " + secret)
		i.fails.Store(&no)
		s.startIssued(i, connections(1))
		time.Sleep(time.Minute)
		require.Empty(t, s.server.Upgrades())
		told := s.logged(zap.WarnLevel, "cannot connect")
		require.Len(t, told, 1, "told once")
		require.Equal(t, "server::auth: issuer has given no credentials: cannot get a token (endpoint …): 401 Unauthorized", told[0].ContextMap()["error"])
		s.wantNotLogged(secret)

		i.fails.Store(nil)
		time.Sleep(10 * time.Second)
		s.server.WantLinks(1)
	})
}

// TestServerAuthRefused has the server's refusal name the key, and not repeat the token.
func TestServerAuthRefused(t *testing.T) {
	playWithout(t, func(t *testing.T, s *stage) {
		s.server.OnUpgrade(func(*http.Request) *gatewaytest.Refusal {
			return &gatewaytest.Refusal{Status: http.StatusUnauthorized, Header: http.Header{"Retry-After": {"3600"}}}
		})
		s.startIssued(newIssuer("token"), connections(1))
		time.Sleep(time.Second)
		told := s.logged(zap.WarnLevel, "cannot connect")
		require.Len(t, told, 1)
		require.Equal(t, "server answered 401 Unauthorized: it does not take the gateway's own credentials, see server::auth", told[0].ContextMap()["error"])
		s.wantNotLogged("token-")
	})
}

// TestServerAuthStaysHome has credentials go to the endpoint's host only.
func TestServerAuthStaysHome(t *testing.T) {
	playWithout(t, func(t *testing.T, s *stage) {
		elsewhere := s.startElsewhere("ws://" + elsewhereAddress + "/")
		elsewhere.OnUpgrade(func(r *http.Request) *gatewaytest.Refusal {
			require.Empty(t, r.Header.Get("Authorization"))
			return &gatewaytest.Refusal{Status: http.StatusForbidden}
		})
		s.extensions = map[component.ID]component.Component{issuerID: newIssuer("token")}
		s.start(withIssuer, connections(1))
		time.Sleep(time.Second)
		require.NotEmpty(t, elsewhere.Upgrades())
		require.Equal(t, "Bearer token-1", s.server.Upgrades()[0].Header.Get("Authorization"))
		told := s.logged(zap.WarnLevel, "cannot connect")
		require.Len(t, told, 1)
		require.Equal(t, "redirected to "+elsewhereAddress+": server answered 403 Forbidden: "+
			"it was not sent what server::auth adds, which is for the host of server::endpoint", told[0].ContextMap()["error"])
	})
}

// TestSlowServerAuth has an extension that does not answer cost a dial, and not the end of the gateway.
func TestSlowServerAuth(t *testing.T) {
	playWithout(t, func(t *testing.T, s *stage) {
		i := newIssuer("token")
		i.ClientRoundTripperFunc = func(http.RoundTripper) (http.RoundTripper, error) {
			return roundTripper(func(r *http.Request) (*http.Response, error) {
				<-r.Context().Done()
				return nil, r.Context().Err()
			}), nil
		}
		s.startIssued(i, connections(1))
		time.Sleep(dialTimeout + time.Second)
		told := s.logged(zap.WarnLevel, "cannot connect")
		require.Len(t, told, 1)
		require.Equal(t, "server::auth: issuer has given no credentials in time: context deadline exceeded", told[0].ContextMap()["error"])
		require.Less(t, s.stop(), shutdownTimeout)
	})
}

const proxyAddress = "proxy.example:3128"

// startProxy has what is dialed at a proxy's address be answered so, and then be relayed to the server if that is a yes.
func (s *stage) startProxy(answer func(ask string) (said string, yes bool)) (stop func()) {
	s.t.Helper()
	listener, err := s.net.Listen(proxyAddress)
	require.NoError(s.t, err)
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			go s.serveProxy(conn, answer)
		}
	}()
	return func() { _ = listener.Close() }
}

func (s *stage) serveProxy(conn net.Conn, answer func(ask string) (string, bool)) {
	defer conn.Close()
	in := bufio.NewReader(conn)
	request, err := http.ReadRequest(in)
	if err != nil {
		return
	}
	said, yes := answer(request.Header.Get("Proxy-Authorization"))
	_, _ = io.WriteString(conn, said)
	if !yes {
		return
	}
	server, err := s.net.Dial(s.t.Context(), "tcp", request.Host)
	if err != nil {
		return
	}
	defer server.Close()
	go func() {
		defer conn.Close()
		_, _ = io.Copy(conn, server)
	}()
	_, _ = io.Copy(server, in)
}

// TestProxyOfConfiguration has links go through server::proxy_url, and what goes wrong there be told with the key.
func TestProxyOfConfiguration(t *testing.T) {
	const secret = "s3cret"
	through := func(cfg *Config) {
		cfg.Server.ProxyURL = configopaque.String("http://me:" + secret + "@" + proxyAddress)
	}
	t.Run("links", func(t *testing.T) {
		playWithout(t, func(t *testing.T, s *stage) {
			asked := make(chan string, 10)
			stop := s.startProxy(func(ask string) (string, bool) {
				asked <- ask
				return "HTTP/1.1 200 Connection established\r\n\r\n", true
			})
			defer stop()
			s.server.Start()
			s.start(through)
			s.server.WantLinks(3)
			require.Len(t, asked, 3)
			for range 3 {
				require.Equal(t, "Basic bWU6czNjcmV0", <-asked)
			}
			alice := s.introduce("alice")
			s.wantNotLogged(secret)

			// Without it, there are other links, and nobody is let go.
			s.reload(func(cfg *Config) { cfg.Server.ProxyURL = "" })
			time.Sleep(2 * time.Second)
			s.server.WantLinks(3)
			require.Len(t, s.server.Upgrades(), 6)
			require.Empty(t, asked)
			s.server.WantFrame(alice.UID, alice.Say(1))
		})
	})

	for name, test := range map[string]struct{ answer, want string }{
		"407": {
			"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n",
			"proxy http://proxy.example:3128 answered 407 Proxy Authentication Required: it wants a user and password, or others, see server::proxy_url",
		},
		"401": { // as tinyproxy says of a wrong password
			"HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n\r\n",
			"proxy http://proxy.example:3128 answered 401 Unauthorized: it wants a user and password, or others, see server::proxy_url",
		},
		"403": {
			"HTTP/1.1 403 Filtered\r\nContent-Length: 12\r\n\r\nno " + secret + " here",
			"proxy http://proxy.example:3128 answered 403 Filtered: no…; see server::proxy_url",
		},
		"no proxy": {
			"SSH-2.0-OpenSSH_9.6\r\n",
			`proxy http://proxy.example:3128 has not answered in HTTP/1.1: "SSH-2.0-OpenSSH_9.6"; see server::proxy_url`,
		},
		"nothing": {"", "proxy http://proxy.example:3128 has hung up instead of an answer: unexpected EOF; see server::proxy_url"},
	} {
		t.Run(name, func(t *testing.T) {
			playWithout(t, func(t *testing.T, s *stage) {
				stop := s.startProxy(func(string) (string, bool) { return test.answer, false })
				defer stop()
				s.start(through, connections(1))
				time.Sleep(time.Minute)
				told := s.logged(zap.WarnLevel, "cannot connect")
				require.Len(t, told, 1, "told once")
				require.Equal(t, test.want, told[0].ContextMap()["error"])
				s.wantNotLogged(secret)
			})
		})
	}
}

// TestProxyIsAway has the log tell it from a server that is.
func TestProxyIsAway(t *testing.T) {
	playWithout(t, func(t *testing.T, s *stage) {
		s.start(connections(1), func(cfg *Config) { cfg.Server.ProxyURL = "http://" + proxyAddress })
		time.Sleep(time.Minute)
		told := s.logged(zap.WarnLevel, "cannot connect")
		require.Len(t, told, 1)
		text := told[0].ContextMap()["error"].(string)
		require.True(t, strings.HasPrefix(text, "proxy http://"+proxyAddress+": "), text)
		require.True(t, strings.HasSuffix(text, "refused; see server::proxy_url"), text)
	})
}
