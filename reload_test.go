package opampgateway

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
	"go.opentelemetry.io/collector/component"
	"go.opentelemetry.io/collector/component/componentstatus"
	"go.opentelemetry.io/collector/component/componenttest"
	"go.opentelemetry.io/collector/config/confighttp"
	"go.opentelemetry.io/collector/config/configoptional"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/opampgateway/opampgateway/internal/gatewaytest"
	"github.com/opampgateway/opampgateway/internal/telemetry"
)

// gap is how long a collector takes from the end of its extensions to the start of the next ones.
const gap = 50 * time.Millisecond

// leaveOff has the collector shut the extension down, as a reload begins.
func (r *running) leaveOff() {
	r.t.Helper()
	begin := time.Now()
	require.NoError(r.t, r.e.Shutdown(r.t.Context()))
	require.Zero(r.t, time.Since(begin), "a reload waits")
}

// goOn has the collector start the next extension, with a configuration that is changed so.
func (r *running) goOn(change ...func(*Config)) error {
	r.t.Helper()
	cfg := *r.cfg
	for _, f := range change {
		f(&cfg)
	}
	return r.begin(&cfg, r.host.extensions)
}

// reload is leaveOff and goOn. It returns what ran before.
func (r *running) reload(change ...func(*Config)) (before *gateway) {
	r.t.Helper()
	before = r.gateway
	r.leaveOff()
	time.Sleep(gap)
	require.NoError(r.t, r.goOn(change...))
	return before
}

// wantNothingParked checks that no gateway waits for a component.
func wantNothingParked(t *testing.T) {
	t.Helper()
	parked.mu.Lock()
	defer parked.mu.Unlock()
	require.Empty(t, parked.places)
}

// exchange has a message pass in each direction.
func (s *stage) exchange(a *gatewaytest.Agent, sequence int) {
	s.t.Helper()
	link := s.server.WantFrame(a.UID, a.Say(sequence))
	offer := gatewaytest.Offer(a.UID, strconv.Itoa(sequence), 100)
	link.Push(offer)
	a.WantFrame(offer)
}

func TestReload(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		agents := s.crowd(10)
		links, questions := s.server.WantLinks(3), len(s.server.Questions())
		gateway, before := s.gateway, s.logs
		s.leaveOff()
		logged, events := before.Len(), len(s.host.events)
		for i, a := range agents { // nothing is paused
			s.exchange(a, 10+i)
		}
		newcomer := s.knock("newcomer")
		synctest.Wait()
		require.Empty(t, newcomer, "it waits")
		require.Len(t, s.server.Questions(), questions)
		host := s.host
		time.Sleep(gap)
		require.NoError(t, s.goOn())

		require.Same(t, gateway, s.gateway)
		bob := s.wantLetIn(newcomer)
		s.exchange(bob, 1)
		for i, a := range agents {
			s.exchange(a, 100+i)
			a.WantNothing()
		}
		require.Equal(t, links, s.server.WantLinks(3), "the same links")
		require.Len(t, s.server.Questions(), questions+1, "nobody is asked about again")
		s.wantConnections(11)
		wantNothingParked(t)

		// What the gateway has to say, it says through the new component.
		require.Len(t, s.logged(zap.InfoLevel, "going on with the connections"), 1)
		links[0].Reset()
		time.Sleep(time.Second)
		require.Len(t, s.logged(zap.WarnLevel, "lost connection to the server"), 1)
		require.Equal(t, "localhost", s.logged(zap.WarnLevel, "lost connection to the server")[0].ContextMap()["server.address"])
		require.Equal(t, logged, before.Len(), "said through the component before: %v", before.All())
		s.wantFault(telemetry.ReasonLinkLost, 1)
		s.wantAdmissions(telemetry.OutcomeAccepted, 1)
		require.Equal(t, []componentstatus.Status{componentstatus.StatusOK}, s.host.statuses(), "told though nothing has changed")
		require.Len(t, host.events, events)
	})
}

// Handshakes that are under way are answered by whichever component there is then.
func TestReloadDuringHandshakes(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		s.introduce("alice")
		held := make(chan *gatewaytest.Question, 2)
		s.server.OnConnect(func(q *gatewaytest.Question) { held <- q })
		yes, no := s.knock("yes"), s.knock("no")
		synctest.Wait()
		require.Len(t, held, 2)
		s.leaveOff()
		answer := func(q *gatewaytest.Question) {
			if q.Who() == "yes" {
				q.Accept()
			} else {
				q.Refuse(http.StatusUnauthorized)
			}
		}
		answer(<-held)
		synctest.Wait()
		time.Sleep(gap)
		require.NoError(t, s.goOn())
		answer(<-held)
		s.exchange(s.wantLetIn(yes), 1)
		require.Equal(t, http.StatusUnauthorized, (<-no).StatusCode)
	})
}

// TestReloadThatHangs has newcomers wait for a component that does not come for long.
func TestReloadThatHangs(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		alice := s.introduce("alice")
		s.leaveOff()
		newcomer := <-s.knock("newcomer")
		require.Equal(t, http.StatusServiceUnavailable, newcomer.StatusCode)
		require.Equal(t, lifeWait, newcomer.took)
		seconds, err := strconv.Atoi(newcomer.Header.Get("Retry-After"))
		require.NoError(t, err)
		require.GreaterOrEqual(t, seconds, 2)
		require.LessOrEqual(t, seconds, 5)
		_, err = s.net.Dial(t.Context(), "tcp", gatewayAddress)
		require.Error(t, err, "the port is free")
		time.Sleep(20 * time.Second)
		s.exchange(alice, 1)
		require.NoError(t, s.goOn())
		s.exchange(alice, 2)
		s.exchange(s.connect("newcomer"), 1)

		s.leaveOff()
		time.Sleep(keepPort - time.Millisecond)
		newcomer2 := s.knock("another")
		synctest.Wait()
		require.Empty(t, newcomer2, "it waits")
		require.NoError(t, s.goOn())
		s.exchange(s.wantLetIn(newcomer2), 1)
		time.Sleep(2 * keepPort)
		s.exchange(s.connect("one more"), 1)
	})
}

// TestReloadLosesPort has somebody else take the port while there is no component for long.
func TestReloadLosesPort(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		alice := s.introduce("alice")
		s.leaveOff()
		time.Sleep(keepPort + time.Second)
		other, err := s.net.Listen(gatewayAddress)
		require.NoError(t, err)
		s.exchange(alice, 1)
		require.ErrorContains(t, s.goOn(), "listener::endpoint")
		alice.WantLetGo()
		wantNothingParked(t)
		require.NoError(t, other.Close())
	})
}

func TestManyReloads(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		agents := s.crowd(10)
		goroutines := 0
		for i := range 20 {
			s.reload()
			for _, a := range agents {
				s.exchange(a, 10+i)
			}
			synctest.Wait()
			if i == 0 {
				goroutines = runtime.NumGoroutine()
			}
		}
		require.LessOrEqual(t, runtime.NumGoroutine(), goroutines, "goroutines of earlier components")
		s.leaveOff()
		require.NoError(t, s.goOn()) // at once
		s.leaveOff()
		time.Sleep(gap)
		require.NoError(t, s.goOn())
		for _, a := range agents {
			s.exchange(a, 100)
			a.WantNothing()
		}
		s.server.WantLinks(3)
		require.Len(t, s.server.Upgrades(), 3, "links were dialed once")
		wantNothingParked(t)
	})
}

// TestReloadUnderLoad has everybody talk while the collector reloads over and over.
func TestReloadUnderLoad(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		agents := s.crowd(10)
		done := make(chan struct{})
		const n = 300
		for _, a := range agents {
			go func() {
				for sequence := range n {
					a.Say(10 + sequence)
					time.Sleep(time.Millisecond)
				}
				done <- struct{}{}
			}()
		}
		for range 6 {
			s.reload()
		}
		for range agents {
			<-done
		}
		for _, a := range agents {
			for sequence := range n { // each once, in order
				s.server.WantFrame(a.UID, gatewaytest.Status(a.UID, 10+sequence))
			}
			s.server.WantNothing(a.UID)
			a.WantNothing()
		}
	})
}

// Nobody takes over when the extension was removed from the configuration.
func TestReloadGraceIsOver(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		alice := s.introduce("alice")
		links := s.server.WantLinks(3)
		s.leaveOff()
		time.Sleep(s.cfg.ReloadGrace - time.Second)
		s.exchange(alice, 1)
		time.Sleep(2 * time.Second)
		alice.WantLetGo()
		for _, l := range links {
			l.WantClosed(1001)
		}
		wantNothingParked(t)
		_, err := s.net.Dial(t.Context(), "tcp", gatewayAddress)
		require.Error(t, err, "the port is free")
		require.NoError(t, s.goOn())
		s.introduce("alice")
	})
}

// TestNoReload has a component that does not leave its gateway to the next.
func TestNoReload(t *testing.T) {
	for name, test := range map[string]struct {
		before func(s *stage)
		change func(cfg *Config)
	}{
		"told to end":     {func(s *stage) { s.introduce("alice"); s.told = true }, func(*Config) {}},
		"turned off":      {func(s *stage) { s.introduce("alice") }, func(cfg *Config) { cfg.ReloadGrace = 0 }},
		"nobody is there": {func(*stage) {}, func(*Config) {}},
	} {
		t.Run(name, func(t *testing.T) {
			play(t, func(t *testing.T, s *stage) {
				test.before(s)
				require.NoError(t, s.e.Shutdown(t.Context()))
				wantNothingParked(t)
				s.server.WantLinks(0)
				gateway := s.gateway
				s.told = false
				require.NoError(t, s.goOn())
				require.NotSame(t, gateway, s.gateway)
				s.introduce("alice")
			}, test.change)
		})
	}
}

// The component of another ID is another gateway; it gets the port of one that nobody takes over.
func TestReloadWithAnotherID(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		alice := s.introduce("alice")
		s.leaveOff()
		s.id = component.MustNewIDWithName("opampgateway", "renamed")
		require.NoError(t, s.goOn())
		alice.WantLetGo()
		s.introduce("alice")
		wantNothingParked(t)
	})
}

func TestReloadThatFails(t *testing.T) {
	for name, change := range map[string]func(*Config){
		"certificate": func(cfg *Config) { cfg.Server.TLS.CAFile = "/does/not/exist.ca" },
		"busy port":   func(cfg *Config) { cfg.Listener.NetAddr.Endpoint = serverAddress },
		"authenticator, and another listener": func(cfg *Config) {
			auth := confighttp.AuthConfig{}
			auth.Config.AuthenticatorID = component.MustNewID("basicauth") //nolint:staticcheck // newer collectors do not embed Config
			cfg.Listener.Auth = configoptional.Some(auth)
		},
	} {
		t.Run(name, func(t *testing.T) {
			play(t, func(t *testing.T, s *stage) {
				alice := s.introduce("alice")
				good := *s.cfg
				s.leaveOff()
				require.Error(t, s.goOn(change))
				require.NoError(t, s.e.Shutdown(t.Context()))
				alice.WantLetGo()
				s.server.WantLinks(0)
				wantNothingParked(t)
				_, err := s.net.Dial(t.Context(), "tcp", gatewayAddress)
				require.Error(t, err, "nothing is left open")
				require.NoError(t, s.begin(&good, nil))
				s.introduce("alice")
			})
		})
	}
}

// A pipeline that fails has the collector shut down again what it has just started.
func TestReloadThatFailsElsewhere(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		alice := s.introduce("alice")
		s.reload()
		s.leaveOff()
		s.exchange(alice, 1)
		time.Sleep(s.cfg.ReloadGrace + time.Second)
		alice.WantLetGo()
		wantNothingParked(t)
	})
}

// TestReloadChangesListener has agents let go: others may come in now.
func TestReloadChangesListener(t *testing.T) {
	id := component.MustNewID("doorman")
	check := func(ctx context.Context, headers map[string][]string) (context.Context, error) {
		if http.Header(headers).Get("Authorization") != "Bearer sesame" {
			return ctx, errors.New("not on the list")
		}
		return ctx, nil
	}
	play(t, func(t *testing.T, s *stage) {
		alice := s.introduce("alice")
		s.server.OnConnect((*gatewaytest.Question).Silence)
		waiting := s.knock("bob")
		synctest.Wait()
		s.leaveOff()
		s.host.extensions = map[component.ID]component.Component{id: doorman{ServerAuthenticateFunc: check}}
		require.NoError(t, s.goOn(func(cfg *Config) {
			auth := confighttp.AuthConfig{}
			auth.Config.AuthenticatorID = id //nolint:staticcheck // newer collectors do not embed Config
			cfg.Listener.Auth = configoptional.Some(auth)
		}))
		alice.WantLetGo()
		bob := <-waiting
		require.Equal(t, http.StatusServiceUnavailable, bob.StatusCode, "answered, not reset")
		require.Contains(t, []string{"2", "3", "4", "5"}, bob.Header.Get("Retry-After"))
		s.server.OnConnect((*gatewaytest.Question).Accept)
		s.server.WantLinks(3)
		s.door.WantRefused(t, "alice", http.StatusUnauthorized)
		alice = s.introduce("alice", "Authorization", "Bearer sesame")

		// The next one knows another word.
		s.host.extensions = map[component.ID]component.Component{id: doorman{ServerAuthenticateFunc: func(ctx context.Context, _ map[string][]string) (context.Context, error) {
			return ctx, errors.New("closed today")
		}}}
		s.reload()
		s.exchange(alice, 5)
		s.door.WantRefused(t, "bob", http.StatusUnauthorized, "Authorization", "Bearer sesame")
		s.wantAdmissions(telemetry.OutcomeUnauthorized, 1)
	})
}

// An authenticator is not shut down before it has answered, if it does not take too long.
func TestReloadWaitsForAuthentication(t *testing.T) {
	id := component.MustNewID("doorman")
	play(t, func(t *testing.T, s *stage) {
		asked, answer := 0, make(chan struct{})
		s.host.extensions = map[component.ID]component.Component{id: doorman{ServerAuthenticateFunc: func(ctx context.Context, _ map[string][]string) (context.Context, error) {
			asked++
			<-answer
			return ctx, nil
		}}}
		require.NoError(t, s.e.Shutdown(t.Context()))
		require.NoError(t, s.goOn(func(cfg *Config) {
			auth := confighttp.AuthConfig{}
			auth.Config.AuthenticatorID = id //nolint:staticcheck // newer collectors do not embed Config
			cfg.Listener.Auth = configoptional.Some(auth)
		}))
		s.server.WantLinks(3)
		alice := s.knock("alice")
		synctest.Wait()
		require.Equal(t, 1, asked)
		time.AfterFunc(leaveTime/2, func() { close(answer) })
		begin := time.Now()
		require.NoError(t, s.e.Shutdown(t.Context()))
		require.Equal(t, leaveTime/2, time.Since(begin))
		require.NoError(t, s.goOn())
		s.exchange(s.wantLetIn(alice), 1)
	})
}

func TestReloadMovesListener(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		alice := s.introduce("alice")
		links := s.server.WantLinks(3)
		s.reload(func(cfg *Config) { cfg.Listener.NetAddr.Endpoint = "localhost:4321" })
		s.exchange(alice, 1)
		alice.WantNothing()
		_, err := s.net.Dial(t.Context(), "tcp", gatewayAddress)
		require.Error(t, err, "the old port is free")
		s.door.URL = "ws://localhost:4321/"
		s.introduce("bob")
		require.Equal(t, links, s.server.WantLinks(3))
		s.wantConnections(2)

		// One with neither the address nor the server in common is another gateway.
		s.reload(func(cfg *Config) {
			cfg.Listener.NetAddr.Endpoint = gatewayAddress
			cfg.Server.Endpoint = "ws://elsewhere.example:4320"
		})
		alice.WantLetGo()
		wantNothingParked(t)
	})
}

// TestReloadChangesServer has agents keep their connections, and come to other links.
func TestReloadChangesServer(t *testing.T) {
	const other = "localhost:9001"
	for name, test := range map[string]struct {
		change func(cfg *Config)
		links  int
	}{
		"headers":       {func(cfg *Config) { cfg.Server.Headers = Headers{}; cfg.Server.Headers.Set("Authorization", "new") }, 3},
		"fewer links":   {func(cfg *Config) { cfg.Server.Connections = 1 }, 1},
		"more links":    {func(cfg *Config) { cfg.Server.Connections = 6 }, 6},
		"name of links": {func(cfg *Config) { cfg.Server.AgentID = "renamed" }, 3},
	} {
		t.Run(name, func(t *testing.T) {
			play(t, func(t *testing.T, s *stage) {
				agents := s.crowd(12)
				before := s.server.WantLinks(3)
				done := make(chan struct{})
				const n = 200
				for _, a := range agents { // nothing is lost, nor comes twice
					go func() {
						for sequence := range n {
							a.Say(10 + sequence)
							time.Sleep(time.Millisecond)
						}
						done <- struct{}{}
					}()
				}
				gateway := s.reload(test.change)
				for range agents {
					<-done
				}
				require.Same(t, gateway, s.gateway)
				time.Sleep(2 * time.Second)
				for _, l := range before {
					l.WantClosed(1001)
				}
				require.Len(t, s.server.WantLinks(test.links), test.links)
				for _, a := range agents {
					for sequence := range n {
						s.server.WantFrame(a.UID, gatewaytest.Status(a.UID, 10+sequence))
					}
					s.server.WantNothing(a.UID)
				}
				s.wantConnections(12)
				s.wantSpread(12, 0)
				s.wantFaults(nil)
				require.Equal(t, []componentstatus.Status{componentstatus.StatusOK}, s.host.statuses())
			})
		})
	}
	t.Run("endpoint", func(t *testing.T) {
		play(t, func(t *testing.T, s *stage) {
			alice := s.introduce("alice")
			second := gatewaytest.NewServer(t, func() (net.Listener, error) { return s.net.Listen(other) })
			second.Start()
			s.reload(func(cfg *Config) { cfg.Server.Endpoint = "ws://" + other + "/v1/opamp" })
			second.WantLinks(3)
			time.Sleep(time.Second)
			s.server.WantLinks(0)
			require.Len(t, second.Questions(), 1, "alice is introduced")
			second.WantFrame(alice.UID, alice.Say(1))
			require.EqualValues(t, 9001, s.logged(zap.InfoLevel, "connected to the server")[0].ContextMap()["server.port"])
			s.wantConnections(1)
		})
	})
}

// TestReloadChangesLimits has the gateway heed what is changed.
func TestReloadChangesLimits(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		alice := s.introduce("alice")
		gateway := s.introduce("gateway", connectionIDHeader, "below")
		s.reload(func(cfg *Config) {
			cfg.Agents.AllowGateways = false
			cfg.Agents.MaxRequestHeaders = 10
			cfg.Agents.MaxConnections = 100
			cfg.Server.AdmissionTimeout = 5 * time.Second
		})
		gateway.WantLetGo()
		s.exchange(alice, 1)
		s.door.WantRefused(t, "gateway", http.StatusForbidden, connectionIDHeader, "below")
		var many []string
		for i := range 10 {
			many = append(many, fmt.Sprint("X-", i), "x")
		}
		s.door.WantRefused(t, "bob", http.StatusRequestHeaderFieldsTooLarge, many...)
		s.server.OnConnect((*gatewaytest.Question).Silence)
		require.Equal(t, 5*time.Second, s.wantTurnedAway(s.knock("bob")).took)
	})
}

// TestReloadOfTwo has two components of one collector reload, each for itself.
func TestReloadOfTwo(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		other := &running{
			t: t, network: s.net, id: component.MustNewIDWithName("opampgateway", "other"),
			door: gatewaytest.Door{URL: "ws://localhost:4321/", Dial: s.net.Dial},
		}
		cfg := *s.cfg
		cfg.Listener.NetAddr.Endpoint = "localhost:4321"
		require.NoError(t, other.begin(&cfg, nil))
		alice, bob := s.introduce("alice"), other.door.Connect(t, "bob")
		s.exchange(bob, 0)
		a, b := s.gateway, other.gateway
		s.leaveOff()
		other.leaveOff()
		require.NoError(t, other.goOn())
		require.NoError(t, s.goOn())
		require.Same(t, a, s.gateway)
		require.Same(t, b, other.gateway)
		s.exchange(alice, 1)
		s.exchange(bob, 1)
		other.stop()
		bob.WantLetGo()
		s.exchange(alice, 2)
	})
}

// TestReloadTakesSlotsAwayAndBack has slots be taken away, and given back while their old links are still ending.
func TestReloadTakesSlotsAwayAndBack(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		agents := s.crowd(6)
		for _, l := range s.server.WantLinks(3) {
			l.BlackHole()
		}
		s.reload(func(cfg *Config) { cfg.Server.Connections = 1 })
		s.reload(func(cfg *Config) { cfg.Server.Connections = 3 })
		time.Sleep(10 * time.Second)
		require.Len(t, s.pool.links(), 3)
		for i, a := range agents {
			s.server.WantFrame(a.UID, a.Say(100+i))
		}
	})
}

// A newcomer waits while all links are about to end, and none is there yet.
func TestReloadNewcomersWhileLinksEnd(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		s.introduce("alice")
		for _, l := range s.server.WantLinks(3) {
			l.BlackHole()
		}
		s.leaveOff()
		bob := s.knock("bob")
		synctest.Wait()
		require.NoError(t, s.goOn(func(cfg *Config) { cfg.Server.AgentID = "renamed" }))
		s.exchange(s.wantLetIn(bob), 1)
	})
}

// Links that are about to end are none, as far as the status is concerned.
func TestReloadStatusFewerSlotsNoServer(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		s.introduce("alice")
		links := s.server.WantLinks(3)
		for _, l := range links[1:] {
			l.BlackHole()
		}
		s.reload(func(cfg *Config) {
			cfg.Server.Connections = 1
			cfg.Server.Endpoint = "ws://localhost:9001"
		})
		time.Sleep(15 * time.Second)
		require.Equal(t, []componentstatus.Status{componentstatus.StatusRecoverableError}, s.host.statuses())
	})
}

// TestReloadStatusSilentServer has the next server not answer at all, for which an attempt to dial waits long.
func TestReloadStatusSilentServer(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		s.introduce("alice")
		s.net.Silence("localhost:9001", true)
		time.Sleep(linkWait)
		s.reload(func(cfg *Config) { cfg.Server.Endpoint = "ws://localhost:9001" })
		time.Sleep(linkWait + time.Second)
		require.Equal(t, []componentstatus.Status{componentstatus.StatusRecoverableError}, s.host.statuses())
	})
}

// TestReloadSpellsAddressAnew moves the listener to an address that is busy as long as the old one is taken.
func TestReloadSpellsAddressAnew(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	_, port, _ := net.SplitHostPort(l.Addr().String())
	require.NoError(t, l.Close())
	set := settings(t)
	start := func(host string) *gatewayExtension {
		cfg := createDefaultConfig().(*Config)
		cfg.Server.Endpoint, cfg.Listener.NetAddr.Endpoint = "ws://127.0.0.1:9", net.JoinHostPort(host, port)
		e, err := newGatewayExtension(set, cfg)
		require.NoError(t, err)
		e.told = func() bool { return false }
		require.NoError(t, e.Start(t.Context(), componenttest.NewNopHost()))
		return e
	}
	e := start("127.0.0.1")
	conn, err := net.Dial("tcp", "127.0.0.1:"+port)
	require.NoError(t, err)
	defer conn.Close()
	require.Eventually(t, e.gateway.inUse, 5*time.Second, time.Millisecond)
	g := e.gateway
	require.NoError(t, e.Shutdown(t.Context()))
	e = start("0.0.0.0")
	require.Same(t, g, e.gateway)
	e.told = func() bool { return true }
	require.NoError(t, e.Shutdown(t.Context()))
}

// A gateway that is being let in when gateways are shut out is let go, as those that are connected.
func TestReloadShutsOutGatewayThatIsComing(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		s.introduce("alice")
		held := make(chan *gatewaytest.Question, 1)
		s.server.OnConnect(func(q *gatewaytest.Question) { held <- q })
		below := s.knock("gateway", connectionIDHeader, "below")
		q := <-held
		s.reload(func(cfg *Config) { cfg.Agents.AllowGateways = false })
		q.Accept()
		if a := (<-below).agent; a != nil {
			a.WantLetGo()
		}
		s.wantConnections(1)
	})
}

// TestReloadAnswersWhoWaits has the next component not go on with the gateway for which newcomers wait.
func TestReloadAnswersWhoWaits(t *testing.T) {
	for range 30 {
		play(t, func(t *testing.T, s *stage) {
			s.introduce("alice")
			s.leaveOff()
			var waiting []<-chan answer
			for range 20 {
				waiting = append(waiting, s.knock("bob"))
			}
			synctest.Wait()
			require.NoError(t, s.goOn(func(cfg *Config) {
				cfg.Listener.CORS = configoptional.Some(confighttp.CORSConfig{AllowedOrigins: []string{"https://x.example"}})
			}))
			for _, w := range waiting {
				a := <-w
				require.NotNil(t, a.Response)
				require.Equal(t, http.StatusServiceUnavailable, a.StatusCode)
			}
		})
	}
}

// The write timeout of the listener may be shorter than newcomers wait.
func TestReloadHangsWithWriteTimeout(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		s.introduce("alice")
		s.leaveOff()
		a := <-s.knock("bob")
		require.NotNil(t, a.Response)
		require.Equal(t, http.StatusServiceUnavailable, a.StatusCode)
		require.NoError(t, s.goOn())
	}, func(cfg *Config) { cfg.Listener.WriteTimeout = time.Second })
}

// A newcomer about whom the server is slow to answer outlasts more reloads than links may end at it.
func TestReloadsWhileAsked(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		s.introduce("alice")
		s.server.OnConnect(func(q *gatewaytest.Question) {
			if q.Who() != "bob" {
				q.Accept()
			}
		})
		bob := s.knock("bob")
		for i := range maxAsked {
			time.Sleep(6 * time.Second)
			if i == maxAsked-1 {
				s.server.OnConnect((*gatewaytest.Question).Accept)
			}
			s.reload(func(cfg *Config) { cfg.Server.AgentID = fmt.Sprint(i) })
		}
		s.exchange(s.wantLetIn(bob), 1)
	})
}

// TestReloadGraceIsOverAtOnce has a component start when a gateway has just been found to be nobody's.
func TestReloadGraceIsOverAtOnce(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		alice := s.introduce("alice")
		free := make(chan error, 1)
		s.gateway.logs.Swap(s.e.set.Logger.WithOptions(zap.Hooks(func(e zapcore.Entry) error {
			if strings.Contains(e.Message, "nobody has taken over") {
				l, err := s.net.Listen(gatewayAddress)
				if err == nil {
					err = l.Close()
				}
				free <- err
			}
			return nil
		})))
		s.leaveOff()
		require.NoError(t, <-free)
		alice.WantLetGo()
		wantNothingParked(t)
	}, func(cfg *Config) { cfg.ReloadGrace = time.Second })
}

// TestReloadsAtRandom reloads over and over, with other links or the same, while links end or fall silent. Nobody is let go,
// whoever comes is let in, and a stop ends it all at any moment.
func TestReloadsAtRandom(t *testing.T) {
	for range 10 {
		play(t, func(t *testing.T, s *stage) {
			agents := s.crowd(8)
			var knocks []<-chan answer
			for i := range 10 {
				for _, l := range s.server.Links() {
					switch rand.IntN(5) {
					case 0:
						l.BlackHole()
					case 1:
						l.Reset()
					}
				}
				time.Sleep(time.Duration(rand.IntN(1500)) * time.Millisecond)
				for _, a := range agents {
					a.Say(10 + i)
				}
				knocks = append(knocks, s.knock(fmt.Sprint("new", i)))
				s.leaveOff()
				time.Sleep(time.Duration(rand.IntN(100)) * time.Millisecond)
				require.NoError(t, s.goOn(func(cfg *Config) {
					cfg.Server.Connections = 1 + rand.IntN(4)
					if rand.IntN(2) == 0 {
						cfg.Server.AgentID = fmt.Sprint("name", i)
					}
				}))
				if rand.IntN(20) == 0 {
					break
				}
			}
			if rand.IntN(3) == 0 {
				require.LessOrEqual(t, s.stop(), shutdownTimeout)
				return
			}
			time.Sleep(25 * time.Second)
			require.Len(t, s.pool.links(), s.cfg.Server.Connections)
			for _, k := range knocks {
				s.wantLetIn(k)
			}
			s.wantConnections(len(agents) + len(knocks))
			for _, a := range agents {
				n := len(s.server.Received(a.UID))
				a.Say(100)
				time.Sleep(time.Second)
				require.Len(t, s.server.Received(a.UID), n+1)
			}
			require.LessOrEqual(t, s.stop(), shutdownTimeout)
		})
	}
}
