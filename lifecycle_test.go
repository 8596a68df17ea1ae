package opampgateway

import (
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"runtime"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gorilla/websocket"
	"github.com/stretchr/testify/require"
	"go.opentelemetry.io/collector/component"
	"go.opentelemetry.io/collector/component/componenttest"
	"go.opentelemetry.io/collector/config/configauth"
	"go.opentelemetry.io/collector/config/confighttp"
	"go.opentelemetry.io/collector/config/confignet"
	"go.opentelemetry.io/collector/config/configoptional"
	"go.opentelemetry.io/collector/config/configtls"
	"go.opentelemetry.io/collector/extension"
	"go.opentelemetry.io/collector/extension/extensiontest"

	"github.com/opampgateway/opampgateway/internal/gatewaytest"
	"github.com/opampgateway/opampgateway/internal/telemetry"
)

// settings returns what a collector gives to an extension.
func settings(t *testing.T) extension.Settings {
	t.Helper()
	return extensiontest.NewNopSettings(NewFactory().Type())
}

// TestShutdown ends a gateway with agents that listen and a server that reads.
func TestShutdown(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		agents := s.crowd(20)
		links := s.server.WantLinks(3)
		const n = 50
		for _, a := range agents {
			for sequence := 1; sequence <= n; sequence++ {
				a.Say(sequence)
			}
		}
		require.Less(t, s.stop(), time.Second)
		for _, a := range agents {
			a.WantLetGo()
			for sequence := 1; sequence <= n; sequence++ { // last words
				s.server.WantFrame(a.UID, gatewaytest.Status(a.UID, sequence))
			}
			s.server.WantNothing(a.UID) // no goodbye: the end of the links says it
		}
		for _, link := range links {
			link.WantClosed(websocket.CloseGoingAway)
		}
		_, err := s.net.Dial(t.Context(), "tcp", gatewayAddress)
		require.Error(t, err, "the port is free")
	})
}

// TestShutdownInEveryState ends a gateway whatever it is doing, in no more time than it has.
func TestShutdownInEveryState(t *testing.T) {
	dial := func(s *stage, request string) net.Conn {
		conn, err := s.net.Dial(s.t.Context(), "tcp", gatewayAddress)
		require.NoError(s.t, err)
		s.t.Cleanup(func() { conn.Close() })
		_, err = io.WriteString(conn, request)
		require.NoError(s.t, err)
		return conn
	}
	silentConnect := func(s *stage) { s.server.OnConnect((*gatewaytest.Question).Silence) }
	for _, test := range []struct {
		name   string
		before func(s *stage)
		within time.Duration
	}{
		{"idle", func(*stage) {}, 0},
		{"agents that do not read", func(s *stage) {
			for _, a := range s.crowd(5) {
				a.StopReading()
				for range 5 {
					s.server.WantLinks(3)[0].Push(gatewaytest.Offer(a.UID, "x", gatewaytest.BufferSize))
				}
			}
		}, 4 * time.Second},
		{"agents that are black holes", func(s *stage) {
			for _, a := range s.crowd(5) {
				a.BlackHole()
			}
		}, 4 * time.Second},
		{"a server that does not read", func(s *stage) {
			agents := s.crowd(5)
			for _, link := range s.server.WantLinks(3) {
				link.StopReading()
			}
			for _, a := range agents {
				go func() {
					for sequence := range 50 {
						a.Send(gatewaytest.Report(a.UID, sequence, gatewaytest.BufferSize))
					}
				}()
			}
		}, 4 * time.Second},
		{"a server that is a black hole", func(s *stage) {
			agents := s.crowd(5)
			for _, link := range s.server.WantLinks(3) {
				link.BlackHole()
			}
			for _, a := range agents {
				a.Say(1)
			}
		}, 4 * time.Second},
		{"agents that wait for the server's answer", func(s *stage) {
			silentConnect(s)
			for i := range 10 {
				s.knock(fmt.Sprint("agent ", i))
			}
		}, 0},
		{"agents that offended", func(s *stage) {
			for _, a := range s.crowd(5) {
				a.Send(gatewaytest.Connect("1", "10.9.8.7:6", nil))
			}
		}, 0},
		{"no link, and agents that wait for one", func(s *stage) {
			agents := s.crowd(5)
			s.server.Stop()
			time.Sleep(3 * time.Second)
			for _, a := range agents[:3] {
				a.Say(1)
			}
			s.knock("agent")
		}, 0},
		{"agents that are being introduced", func(s *stage) {
			s.crowd(5)
			silentConnect(s)
			s.server.WantLinks(3)[0].Reset()
		}, 4 * time.Second},
		{"links that are being dialed", func(s *stage) {
			s.server.Stop()
			s.net.Silence(serverAddress, true)
			time.Sleep(10 * time.Second)
		}, 0},
		{"connections that say nothing, or not all", func(s *stage) {
			dial(s, "")
			dial(s, "GET / HTTP/1.1\r\nHost:")
			dial(s, "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\n")
		}, 500 * time.Millisecond}, // in which the last one hears its answer
	} {
		t.Run(test.name, func(t *testing.T) {
			play(t, func(_ *testing.T, s *stage) {
				test.before(s)
				synctest.Wait()
				require.LessOrEqual(s.t, s.stop(), test.within)
				synctest.Wait()
				for _, link := range s.server.Links() {
					link.ReadOn()
				}
			})
		})
	}

	t.Run("with less time", func(t *testing.T) {
		play(t, func(t *testing.T, s *stage) {
			for _, a := range s.crowd(5) {
				a.StopReading()
				for range 5 {
					s.server.WantLinks(3)[0].Push(gatewaytest.Offer(a.UID, "x", gatewaytest.BufferSize))
				}
			}
			ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
			defer cancel()
			begin := time.Now()
			s.shutdown(ctx)
			require.LessOrEqual(t, time.Since(begin), 500*time.Millisecond)
		})
	})
}

// TestShutdownUnderLoad ends a gateway while agents come, go and talk, and the server does.
func TestShutdownUnderLoad(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		agents := s.crowd(20)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{}, 100)
		for i, a := range agents {
			go func() {
				for sequence := 0; ctx.Err() == nil; sequence++ {
					a.Say(sequence)
					if links := s.server.Links(); len(links) > 0 {
						links[0].Push(gatewaytest.Offer(a.UID, "x", 1000*i))
					}
					time.Sleep(time.Millisecond)
				}
				done <- struct{}{}
			}()
			go func() {
				for ctx.Err() == nil {
					newcomer, _, err := s.door.Knock(t, fmt.Sprint("newcomer ", i))
					if err != nil {
						time.Sleep(100 * time.Millisecond)
						continue
					}
					newcomer.Say(1)
					time.Sleep(time.Millisecond)
					newcomer.Vanish()
				}
				done <- struct{}{}
			}()
		}
		time.Sleep(50 * time.Millisecond)
		require.LessOrEqual(t, s.stop(), 4*time.Second)
		for _, a := range agents {
			a.WantLetGo()
		}
		cancel()
		for range 2 * len(agents) {
			<-done
		}
	})
}

// TestShutdownOfExtension shuts down what was never started, and what has been shut down.
func TestShutdownOfExtension(t *testing.T) {
	cfg := createDefaultConfig().(*Config)
	cfg.Server.Endpoint = "ws://localhost:9" // where nobody listens
	cfg.Listener.NetAddr.Endpoint = "localhost:0"
	never, err := NewFactory().Create(t.Context(), settings(t), cfg)
	require.NoError(t, err)
	require.NoError(t, never.Shutdown(t.Context()))
	require.NoError(t, never.Shutdown(t.Context()))

	require.ErrorContains(t, never.Start(t.Context(), componenttest.NewNopHost()), "shut down")

	twice, err := NewFactory().Create(t.Context(), settings(t), cfg)
	require.NoError(t, err)
	require.NoError(t, twice.Start(t.Context(), componenttest.NewNopHost()))
	require.NoError(t, twice.Shutdown(t.Context()))
	require.NoError(t, twice.Shutdown(t.Context()))

	// A start that was too slow leaves nothing behind.
	late, err := NewFactory().Create(t.Context(), settings(t), cfg)
	require.NoError(t, err)
	require.NoError(t, late.Shutdown(t.Context()))
	require.Error(t, late.Start(t.Context(), componenttest.NewNopHost()))
}

// TestShutdownWhileStarting shuts an extension down at some moment of its start: whichever is
// first, nothing is left of it, and its port is free.
func TestShutdownWhileStarting(t *testing.T) {
	for range 200 {
		cfg := createDefaultConfig().(*Config)
		cfg.Server.Endpoint = "ws://localhost:9" // where nobody listens
		cfg.Listener.NetAddr.Endpoint = "localhost:0"
		e, err := NewFactory().Create(t.Context(), settings(t), cfg)
		require.NoError(t, err)
		started := make(chan error)
		go func() { started <- e.Start(t.Context(), componenttest.NewNopHost()) }()
		for range rand.IntN(100) {
			runtime.Gosched()
		}
		require.NoError(t, e.Shutdown(t.Context()))
		if err := <-started; err != nil {
			require.ErrorContains(t, err, "shut down while starting")
		}
		require.Nil(t, e.(*gatewayExtension).gateway)
	}
}

// TestStartFails names the key of what is wrong, and leaves nothing behind.
func TestStartFails(t *testing.T) {
	busy, err := net.Listen("tcp", "localhost:0")
	require.NoError(t, err)
	defer busy.Close()
	badTLS := configtls.ServerConfig{Config: configtls.Config{CertFile: "/does/not/exist.crt", KeyFile: "/does/not/exist.key"}}
	for name, test := range map[string]struct {
		change func(*Config)
		want   []string
	}{
		"busy port":                   {func(cfg *Config) { cfg.Listener.NetAddr.Endpoint = busy.Addr().String() }, []string{"listener::endpoint", busy.Addr().String()}},
		"no such address":             {func(cfg *Config) { cfg.Listener.NetAddr.Endpoint = "192.0.2.1:4320" }, []string{"listener::endpoint"}},
		"certificate of the listener": {func(cfg *Config) { cfg.Listener.TLS = configoptional.Some(badTLS) }, []string{"listener::tls", "/does/not/exist"}},
		"certificate for the server": {func(cfg *Config) {
			cfg.Server.Endpoint = "wss://localhost:9"
			cfg.Server.TLS.CAFile = "/does/not/exist.ca"
		}, []string{"server::tls", "/does/not/exist.ca"}},
		"missing authenticator": {func(cfg *Config) {
			auth := confighttp.AuthConfig{}
			auth.Config.AuthenticatorID = component.MustNewID("basicauth") //nolint:staticcheck // newer collectors do not embed Config
			cfg.Listener.Auth = configoptional.Some(auth)
		}, []string{"listener", "basicauth"}},
		"missing authenticator of the gateway": {func(cfg *Config) {
			cfg.Server.Auth = configoptional.Some(configauth.Config{AuthenticatorID: component.MustNewID("oauth2client")})
		}, []string{"server::auth", "oauth2client", "not found"}},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := createDefaultConfig().(*Config)
			cfg.Server.Endpoint = "ws://localhost:9"
			cfg.Listener.NetAddr.Endpoint = "localhost:0"
			test.change(cfg)
			e, err := NewFactory().Create(t.Context(), settings(t), cfg)
			require.NoError(t, err)
			err = e.Start(t.Context(), componenttest.NewNopHost())
			for _, want := range test.want {
				require.ErrorContains(t, err, want)
			}
			require.NoError(t, e.Shutdown(t.Context()))
		})
	}
}

// TestNothingSecretIsLogged has a gateway go through whatever it logs.
func TestNothingSecretIsLogged(t *testing.T) {
	const secret = "s3cret"
	playWithout(t, func(t *testing.T, s *stage) {
		s.start(func(cfg *Config) {
			cfg.Server.Endpoint += "?token=" + secret
			cfg.Server.Headers.Set("Authorization", secret)
			cfg.Server.AdmissionTimeout = 5 * time.Second
		})
		s.wantTurnedAway(s.knock("nobody yet", "Authorization", secret))
		s.server.OnUpgrade(func(*http.Request) *gatewaytest.Refusal {
			return &gatewaytest.Refusal{Status: http.StatusUnauthorized, Header: http.Header{"X-Reason": {secret}}}
		})
		s.server.Start()
		time.Sleep(10 * time.Second)
		s.server.OnUpgrade(nil)
		s.server.WantLinks(3)

		s.server.OnConnect(func(q *gatewaytest.Question) { q.Refuse(http.StatusForbidden, "X-Reason", secret) })
		s.door.WantRefused(t, "refused", http.StatusForbidden, "Authorization", secret)
		s.server.OnConnect((*gatewaytest.Question).Silence)
		s.wantTurnedAway(s.knock("no answer", "Authorization", secret))
		s.server.OnConnect((*gatewaytest.Question).Accept)

		alice, clone := s.introduce("alice", "Authorization", secret), s.introduce("alice", "Authorization", secret)
		bob, cathy, dave := s.introduce("bob", "Cookie", secret), s.introduce("cathy", "Cookie", secret), s.introduce("dave")
		link := s.linkOf(bob)
		link.Push(gatewaytest.Offer(nil, secret, 10))
		link.Push(gatewaytest.Offer(gatewaytest.UID("nobody"), secret, 10))
		link.Push([]byte(secret))
		link.PushText(secret)
		link.Push(gatewaytest.Offer(bob.UID, secret, 10))
		bob.Next()
		for range maxBadInRow {
			bob.Send([]byte(secret))
			bob.SendText(secret)
		}
		cathy.Send(gatewaytest.Connect(secret, secret, http.Header{"Authorization": {secret}}))
		dave.StopReading()
		for range 80 {
			link.Push(gatewaytest.Offer(dave.UID, secret, 100_000))
		}
		alice.BlackHole()
		s.server.OnConnect(func(q *gatewaytest.Question) {
			if q.Who() == "alice" {
				q.Refuse(http.StatusForbidden, "X-Reason", secret)
			}
		})
		for _, link := range s.server.WantLinks(3) {
			link.Reset()
		}
		clone.WantClosed(websocket.ClosePolicyViolation)
		time.Sleep(3 * time.Minute)
		s.server.Stop()
		time.Sleep(3 * time.Minute)
		s.stop()

		s.wantNotLogged(secret)
		for _, reason := range []telemetry.Reason{telemetry.ReasonUIDConflict, telemetry.ReasonServerNoUID, telemetry.ReasonServerBadFrame, telemetry.ReasonBadFrame, telemetry.ReasonForeignConnect, telemetry.ReasonAgentSlow, telemetry.ReasonAgentRefused, telemetry.ReasonLinkLost} {
			require.NotZero(t, s.counted("faults", string(reason)), "%s has not happened", reason)
		}
		require.Less(t, len(s.logs.All()), 100, "a handful of lines per event")
		for _, entry := range s.logs.All() {
			require.False(t, strings.HasSuffix(entry.Message, "."), entry.Message)
		}
	})
}

// TestShutdownWhileAdopting shuts an extension down at some moment while it takes a gateway over.
func TestShutdownWhileAdopting(t *testing.T) {
	for range 50 {
		play(t, func(t *testing.T, s *stage) {
			alice := s.introduce("alice")
			s.leaveOff()
			e, err := newGatewayExtension(settings(t), s.cfg)
			require.NoError(t, err)
			e.set.ID = s.e.set.ID
			e.told = func() bool { return false }
			e.dial = s.net.Dial
			e.net = func(_ context.Context, at confignet.AddrConfig) (net.Listener, error) {
				return s.net.Listen(at.Endpoint)
			}
			h := &heldHost{Host: componenttest.NewNopHost(), reached: make(chan struct{}), goOn: make(chan struct{})}
			done := make(chan error)
			go func() { done <- e.Start(t.Context(), h) }()
			<-h.reached
			close(h.goOn)
			for range rand.IntN(100) {
				runtime.Gosched()
			}
			require.NoError(t, e.Shutdown(t.Context()))
			err = <-done // either is first
			if err != nil {
				require.ErrorContains(t, err, "shut down while starting")
			}
			time.Sleep(time.Minute)
			alice.WantLetGo()
			wantNothingParked(t)
		})
	}
}

// heldHost has whoever asks for its extensions first wait, as in the midst of a start.
type heldHost struct {
	component.Host
	reached, goOn chan struct{}
	once          sync.Once
}

// GetExtensions is that of component.Host.
func (h *heldHost) GetExtensions() map[component.ID]component.Component {
	h.once.Do(func() {
		close(h.reached)
		<-h.goOn
	})
	return nil
}

// A second Start changes nothing.
func TestStartTwice(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		alice := s.introduce("alice")
		require.ErrorContains(t, s.e.Start(t.Context(), s.host), "started twice")
		require.Same(t, s.gateway, s.e.gateway)
		s.exchange(alice, 1)
	})
}
