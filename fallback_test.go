package opampgateway

import (
	"fmt"
	"net"
	"net/http"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
	"go.opentelemetry.io/collector/component/componentstatus"
	"go.opentelemetry.io/collector/confmap"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"github.com/opampgateway/opampgateway/internal/gatewaytest"
	"github.com/opampgateway/opampgateway/internal/status"
)

// fallbackAddress, and those behind it, are where the other servers of a test listen.
func fallbackAddress(n int) string { return fmt.Sprintf("localhost:%d", 9100+n) }

// withFallbacks gives the gateway n fallback endpoints.
func withFallbacks(n int) func(*Config) {
	return func(cfg *Config) {
		for i := range n {
			cfg.Server.FallbackEndpoints = append(cfg.Server.FallbackEndpoints, "ws://"+fallbackAddress(i)+"/v1/opamp?key=secret")
		}
	}
}

// fallback returns the server of the nth fallback endpoint, which is not started.
func (s *stage) fallback(n int) *gatewaytest.Server {
	s.t.Helper()
	return gatewaytest.NewServer(s.t, func() (net.Listener, error) { return s.net.Listen(fallbackAddress(n)) })
}

// playFallback is play with n fallback servers, which are started.
func playFallback(t *testing.T, n int, test func(t *testing.T, s *stage, others []*gatewaytest.Server), change ...func(*Config)) {
	t.Helper()
	playWithout(t, func(t *testing.T, s *stage) {
		var others []*gatewaytest.Server
		for i := range n {
			others = append(others, s.fallback(i))
			others[i].Start()
		}
		s.server.Start()
		s.start(append(change, withFallbacks(n))...)
		s.server.WantLinks(s.cfg.Server.Connections)
		time.Sleep(outageSteady)
		synctest.Wait()
		test(t, s, others)
	})
}

// wantAt checks at which endpoint metric and status page see the links.
func (s *stage) wantAt(at int) {
	s.t.Helper()
	synctest.Wait()
	metric, err := s.metrics.GetMetric("otelcol_opampgateway.endpoint")
	require.NoError(s.t, err)
	require.EqualValues(s.t, at, metric.Data.(metricdata.Gauge[int64]).DataPoints[0].Value)
	page := (&statusPage{gateway: s.gateway}).Status()
	require.Equal(s.t, at, page.Gateway.Endpoint)
	if at != 0 {
		require.Contains(s.t, page.Problems, "the first endpoint of the server cannot be reached; links go to "+page.Gateway.Server+" instead")
		require.NotEqual(s.t, status.StateOK, page.Gateway.State)
	}
}

// waitLogged waits until there is a log line with this text.
func (s *stage) waitLogged(text string, limit time.Duration) {
	s.t.Helper()
	for begin := time.Now(); s.logs.FilterMessageSnippet(text).Len() == 0; time.Sleep(10 * time.Millisecond) {
		require.Less(s.t, time.Since(begin), limit, "no log line says %q", text)
	}
}

// wantHome checks that each agent speaks at this server, and at no other.
func wantHome(t *testing.T, home *gatewaytest.Server, sequence int, agents []*gatewaytest.Agent, others ...*gatewaytest.Server) {
	t.Helper()
	for _, a := range agents {
		a.WantConnected()
		home.WantFrame(a.UID, a.Say(sequence))
	}
	for _, other := range others {
		for _, a := range agents {
			other.WantNothing(a.UID)
		}
	}
}

func TestFallback(t *testing.T) {
	playFallback(t, 1, func(t *testing.T, s *stage, others []*gatewaytest.Server) {
		agents := s.crowd(12)
		s.wantAt(0)
		s.server.Stop()
		time.Sleep(outageTime - time.Millisecond)
		synctest.Wait()
		require.Empty(t, others[0].Links(), "too early")
		time.Sleep(2 * patience)
		others[0].WantLinks(3)
		s.wantAt(1)
		require.Len(t, others[0].Questions(), 12, "each agent is introduced to the other server")
		for _, a := range agents {
			a.WantFullStateRequest()
		}
		wantHome(t, others[0], 1, agents)
		s.wantSpread(12, 1)

		lines := s.logged(zap.WarnLevel, "the server cannot be reached; going to another of its endpoints")
		require.Len(t, lines, 1)
		require.Equal(t, "ws://"+fallbackAddress(0)+"/v1/opamp", lines[0].ContextMap()["url.full"])
		require.Equal(t, "ws://"+serverAddress+"/v1/opamp", lines[0].ContextMap()["from"])
		last := s.host.last()
		require.Equal(t, componentstatus.StatusOK, last.Status())
		require.Equal(t, map[string]any{"url.full": "ws://" + fallbackAddress(0) + "/v1/opamp", "opampgateway.endpoint": int64(1)}, last.Attributes().AsRaw())

		// The first is back, and watched for a minute on a connection of its own, on which nothing is said.
		time.Sleep(time.Hour)
		s.server.Start()
		time.Sleep(10 * time.Second)
		synctest.Wait()
		probes := s.server.Links()
		require.Len(t, probes, 1)
		require.Equal(t, "gateway/probe", probes[0].Name)
		wantHome(t, others[0], 2, agents, s.server)
		time.Sleep(provenTime - 11*time.Second)
		s.wantAt(1)

		// Then the links go back, one after the other.
		asked := len(s.server.Questions())
		var at []int
		for range 200 {
			time.Sleep(100 * time.Millisecond)
			synctest.Wait()
			before, after := len(others[0].Links()), 0
			for _, l := range s.server.Links() {
				if l.Name != "gateway/probe" {
					after++
				}
			}
			require.GreaterOrEqual(t, before+after, 2, "one at a time")
			require.LessOrEqual(t, before+after, 3)
			if len(at) == 0 || at[len(at)-1] != after {
				at = append(at, after)
			}
		}
		require.Equal(t, []int{0, 1, 2, 3}, at)
		require.Empty(t, others[0].Links())
		require.Len(t, s.server.Questions()[asked:], 12, "each agent is introduced once")
		for _, a := range agents {
			a.WantFullStateRequest()
			a.WantNothing()
		}
		wantHome(t, s.server, 3, agents, others[0])
		s.wantSpread(12, 0)
		s.wantAt(0)
		s.wantConsistent()
		require.Len(t, s.logged(zap.InfoLevel, "links go back to it"), 1)
		require.Equal(t, "ws://"+serverAddress+"/v1/opamp", s.host.last().Attributes().AsRaw()["url.full"])
		require.Equal(t, []componentstatus.Status{componentstatus.StatusOK, componentstatus.StatusRecoverableError, componentstatus.StatusOK}, s.host.statuses())
		s.wantNotLogged("key=secret")

		time.Sleep(time.Hour)
		require.Len(t, s.server.WantLinks(3), 3, "and there they stay")
	})
}

// last returns what was reported last.
func (h *statusHost) last() *componentstatus.Event {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.events[len(h.events)-1]
}

// TestFallbackOneSlot has one slot in trouble, for as long as it may be: that moves nobody.
func TestFallbackOneSlot(t *testing.T) {
	playFallback(t, 1, func(t *testing.T, s *stage, others []*gatewaytest.Server) {
		links := s.server.WantLinks(3)
		s.server.OnUpgrade(func(*http.Request) *gatewaytest.Refusal { return &gatewaytest.Refusal{Status: http.StatusBadGateway} })
		links[0].HangUp()
		links[1].HangUp()
		time.Sleep(time.Hour)
		synctest.Wait()
		require.Empty(t, others[0].Upgrades())
		s.wantAt(0)
	})
}

// TestFallbackInOrder has none of the endpoints answer, which are tried in order, over and over, and the log say so once.
func TestFallbackInOrder(t *testing.T) {
	playWithout(t, func(t *testing.T, s *stage) {
		s.start(withFallbacks(2))
		for _, at := range []int{0, 1, 2, 0, 1, 2, 0, 1} {
			time.Sleep(outageTime / 2)
			s.wantAt(at)
			time.Sleep(outageTime / 2)
		}
		require.Len(t, s.logged(zap.WarnLevel, "going to another"), 3)
		require.Len(t, s.logged(zap.WarnLevel, "cannot connect"), 9, "each link, at each endpoint")
		last := s.fallback(1)
		last.Start()
		time.Sleep(outageTime)
		last.WantLinks(3)
		s.wantAt(2)
	})
}

// TestFallbackHandshakeHangs has the first endpoint take connections and say nothing, so that each attempt takes longer than
// the outage may.
func TestFallbackHandshakeHangs(t *testing.T) {
	playWithout(t, func(t *testing.T, s *stage) {
		s.server.Start()
		s.net.Silence(serverAddress, true)
		other := s.fallback(0)
		other.Start()
		s.start(withFallbacks(1))
		time.Sleep(outageTime + patience)
		other.WantLinks(3)
		s.wantAt(1)
		s.net.Silence(serverAddress, false)
	})
}

// TestFallbackFlapping has a load balancer take links of the first endpoint and end them at once. That is no
// answer: links leave, and do not come back for it.
func TestFallbackFlapping(t *testing.T) {
	playFallback(t, 1, func(t *testing.T, s *stage, others []*gatewaytest.Server) {
		alice := s.introduce("alice")
		stop := make(chan struct{})
		done := make(chan struct{})
		go func() {
			defer close(done)
			for {
				for _, l := range s.server.Links() {
					l.HangUp()
				}
				select {
				case <-stop:
					return
				case <-time.After(100 * time.Millisecond):
				}
			}
		}()
		time.Sleep(30 * time.Second)
		others[0].WantLinks(3)
		s.wantAt(1)
		time.Sleep(10 * time.Minute)
		s.wantAt(1)
		others[0].WantLinks(3)
		wantHome(t, others[0], 1, []*gatewaytest.Agent{alice})
		close(stop)
		<-done
		time.Sleep(2 * provenTime)
		s.wantAt(0)
		wantHome(t, s.server, 2, []*gatewaytest.Agent{alice})
	})
}

// TestFallbackStays has the first endpoint answer the probe, and take one link, but not the next: all go on at the
// fallback, and those that have not moved notice nothing.
func TestFallbackStays(t *testing.T) {
	playFallback(t, 1, func(t *testing.T, s *stage, others []*gatewaytest.Server) {
		agents := s.crowd(9)
		s.server.Stop()
		time.Sleep(2 * outageTime)
		stayed := others[0].WantLinks(3)
		s.server.OnUpgrade(func(r *http.Request) *gatewaytest.Refusal {
			if name := r.Header.Get(connectionIDHeader); name == "gateway/upstream-1" {
				return &gatewaytest.Refusal{Status: http.StatusServiceUnavailable}
			}
			return nil
		})
		s.server.Start()
		s.waitLogged("links go back to it", 2*provenTime)
		s.wantAt(0)
		time.Sleep(returnPause + returnTime + 2*time.Second)
		s.wantAt(1)
		require.Len(t, s.logged(zap.WarnLevel, "does not take all links"), 1)
		links := others[0].WantLinks(3)
		require.Contains(t, links, stayed[2], "the third has not moved")
		wantHome(t, others[0], 1, agents)
		s.wantConsistent()

		// It is tried again and again, for which nothing piles up.
		time.Sleep(20 * (provenTime + returnTime))
		require.Greater(t, len(s.logged(zap.WarnLevel, "does not take all links")), 5)
		s.server.OnUpgrade(nil)
		time.Sleep(2 * provenTime)
		s.wantAt(0)
		wantHome(t, s.server, 2, agents, others[0])
	})
}

// TestFallbackReload changes the list while the links are at a fallback.
func TestFallbackReload(t *testing.T) {
	for name, test := range map[string]struct {
		change func(*Config)
		at     int
		links  int // that the fallback has seen
	}{
		"nothing of the server": {func(c *Config) { c.Agents.SendDisconnect = false }, 1, 3},
		"one more": {func(c *Config) {
			c.Server.FallbackEndpoints = append(c.Server.FallbackEndpoints, "ws://localhost:9199")
		}, 1, 6},
		"one before": {func(c *Config) {
			c.Server.FallbackEndpoints = append([]string{"ws://localhost:9199"}, c.Server.FallbackEndpoints...)
		}, 2, 6},
		"the fallback is the first now": {func(c *Config) {
			c.Server.Endpoint, c.Server.FallbackEndpoints = c.Server.FallbackEndpoints[0], []string{c.Server.Endpoint}
		}, 0, 6},
	} {
		t.Run(name, func(t *testing.T) {
			playFallback(t, 1, func(t *testing.T, s *stage, others []*gatewaytest.Server) {
				alice := s.introduce("alice")
				s.server.Stop()
				time.Sleep(2 * outageTime)
				s.wantAt(1)
				s.reload(test.change)
				time.Sleep(5 * time.Second)
				s.wantAt(test.at)
				others[0].WantLinks(3)
				require.Len(t, others[0].Upgrades(), test.links)
				wantHome(t, others[0], 1, []*gatewaytest.Agent{alice})
			})
		})
	}
}

// TestFallbackStop shuts the gateway down while a probe is held, and while links go back.
func TestFallbackStop(t *testing.T) {
	for name, wait := range map[string]func(*stage){
		"probe":    func(*stage) { time.Sleep(20 * time.Second) },
		"way back": func(s *stage) { s.waitLogged("links go back to it", 2*provenTime) },
	} {
		t.Run(name, func(t *testing.T) {
			playFallback(t, 1, func(_ *testing.T, s *stage, _ []*gatewaytest.Server) {
				s.server.Stop()
				time.Sleep(2 * outageTime)
				s.server.Start()
				wait(s)
				require.LessOrEqual(t, s.stop(), shutdownTimeout)
			})
		})
	}
}

// TestFallbackIsLost has the second endpoint be lost while the first answers again, but not for long enough yet: links
// go there, and not to the third.
func TestFallbackIsLost(t *testing.T) {
	playFallback(t, 2, func(t *testing.T, s *stage, others []*gatewaytest.Server) {
		alice := s.introduce("alice")
		s.server.Stop()
		time.Sleep(2 * outageTime)
		s.wantAt(1)
		s.server.Start()
		time.Sleep(10 * time.Second)
		others[0].Stop()
		time.Sleep(outageTime + patience)
		s.wantAt(0)
		require.Empty(t, others[1].Upgrades())
		wantHome(t, s.server, 1, []*gatewaytest.Agent{alice})
	})
}

// TestFallbackReloadOnTheWayBack has another configuration come while links go back.
func TestFallbackReloadOnTheWayBack(t *testing.T) {
	playFallback(t, 1, func(t *testing.T, s *stage, others []*gatewaytest.Server) {
		agents := s.crowd(9)
		s.server.Stop()
		time.Sleep(2 * outageTime)
		s.server.Start()
		s.waitLogged("links go back to it", 2*provenTime)
		time.Sleep(returnPause + time.Second)
		s.reload(func(cfg *Config) { cfg.Server.Connections = 2 })
		time.Sleep(2 * patience)
		s.server.WantLinks(2)
		require.Empty(t, others[0].Links())
		s.wantAt(0)
		wantHome(t, s.server, 1, agents)
		s.wantConsistent()
	})
}

func TestFallbackConfig(t *testing.T) {
	for name, test := range map[string]struct {
		fallbacks []string
		says      string
	}{
		"scheme":         {[]string{"wss://b.example", "file:///etc"}, `fallback_endpoints[1]: endpoint: must start with ws`},
		"empty":          {[]string{""}, "fallback_endpoints[0]: endpoint: is required"},
		"credentials":    {[]string{"wss://user:hunter2@b.example"}, "fallback_endpoints[0]: endpoint: must not hold a user or password"},
		"no URL":         {[]string{"wss://b.example:hunter2"}, "fallback_endpoints[0]: endpoint: is not a URL"},
		"the first":      {[]string{"wss://b.example", "wss://a.example"}, "fallback_endpoints[1]: is there twice"},
		"twice":          {[]string{"wss://b.example", "wss://b.example"}, "fallback_endpoints[1]: is there twice"},
		"too many":       {make([]string, maxFallbacks+1), "fallback_endpoints: must be at most 8, are 9"},
		"as it is to be": {[]string{"wss://b.example", "ws://c.example:4320/v1/opamp"}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := createDefaultConfig().(*Config)
			cfg.Server.Endpoint, cfg.Server.FallbackEndpoints = "wss://a.example", test.fallbacks
			err := confmap.Validate(cfg)
			if test.says == "" {
				require.NoError(t, err)
				return
			}
			require.ErrorContains(t, err, test.says)
			require.NotContains(t, err.Error(), "user:hunter2", "a password")
		})
	}
}

// TestFallbackInClear warns of each endpoint to which credentials travel in clear.
func TestFallbackInClear(t *testing.T) {
	cfg := createDefaultConfig().(*Config)
	cfg.Server.Endpoint, cfg.Server.FallbackEndpoints = "wss://a.example", []string{"wss://b.example", "ws://c.example"}
	cfg.Server.Headers.Set("Authorization", "secret")
	core, logs := observer.New(zap.WarnLevel)
	warnOfDangers(cfg, zap.New(core))
	require.Len(t, logs.FilterMessageSnippet("server::fallback_endpoints[1] is ws://").All(), 1)
	require.Len(t, logs.FilterMessageSnippet("is ws://").All(), 1)
}

// TestFallbackHeaders has links present themselves at each endpoint with the gateway's own credentials, and nowhere else:
// not where one of them redirects to.
func TestFallbackHeaders(t *testing.T) {
	playWithout(t, func(t *testing.T, s *stage) {
		fallback, third := s.fallback(0), s.fallback(1)
		fallback.OnUpgrade(func(*http.Request) *gatewaytest.Refusal {
			return &gatewaytest.Refusal{Status: http.StatusTemporaryRedirect, Header: http.Header{"Location": {"ws://" + fallbackAddress(1)}}}
		})
		fallback.Start()
		third.Start()
		s.start(withFallbacks(1), func(cfg *Config) { cfg.Server.Headers.Set("Authorization", "gateway's") })
		time.Sleep(outageTime + patience)
		third.WantLinks(3)
		for _, u := range fallback.Upgrades() {
			require.Equal(t, "gateway's", u.Header.Get("Authorization"))
		}
		for _, u := range third.Upgrades() {
			require.Empty(t, u.Header.Get("Authorization"))
		}
		s.server.Start() // for the probe
		time.Sleep(10 * time.Second)
		require.Equal(t, "gateway's", s.server.Upgrades()[0].Header.Get("Authorization"))
		s.wantNotLogged("gateway's")
	})
}
