package opampgateway

import (
	"fmt"
	"net/http"
	"runtime"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
	"go.opentelemetry.io/collector/component/componentstatus"
	"go.uber.org/zap"

	"github.com/opampgateway/opampgateway/internal/gatewaytest"
	"github.com/opampgateway/opampgateway/internal/telemetry"
)

// exactly has back-off delays without their jitter.
func exactly(cfg *Config) { cfg.Server.Retry.RandomizationFactor = 0 }

// TestLinks looks at how links announce themselves.
func TestLinks(t *testing.T) {
	names := func(s *stage, n int) (names []string) {
		for _, link := range s.server.WantLinks(n) {
			names = append(names, link.Name)
		}
		return names
	}

	t.Run("by default", func(t *testing.T) {
		play(t, func(t *testing.T, s *stage) {
			require.Equal(t, []string{"gateway/upstream-0", "gateway/upstream-1", "gateway/upstream-2"}, names(s, 3))
			for _, upgrade := range s.server.Upgrades() {
				require.Equal(t, "/v1/opamp", upgrade.Path)
				require.Equal(t, fmt.Sprintf("opamp-gateway/dev otelcol-test/1.2.3 (%s/%s)", runtime.GOOS, runtime.GOARCH), upgrade.Header.Get("User-Agent"))
				require.Empty(t, upgrade.Header.Get("Origin"))
			}
			time.Sleep(time.Hour)
			synctest.Wait()
			require.Len(t, s.server.Upgrades(), 3, "links that live are not dialed again")
			s.wantFaults(nil)
		})
	})

	t.Run("with an agent_id, headers and another number", func(t *testing.T) {
		play(t, func(t *testing.T, s *stage) {
			require.Equal(t, []string{"gw-7/upstream-0", "gw-7/upstream-1", "gw-7/upstream-2", "gw-7/upstream-3", "gw-7/upstream-4"}, names(s, 5))
			for _, upgrade := range s.server.Upgrades() {
				require.Equal(t, []string{"Secret-Key 123"}, upgrade.Header["Authorization"])
				require.Equal(t, []string{"mine"}, upgrade.Header["User-Agent"])
				require.Equal(t, []string{"a"}, upgrade.Header["X-Custom"])
			}
		}, connections(5), func(cfg *Config) {
			cfg.Server.AgentID = "gw-7"
			cfg.Server.Headers.Set("authorization", "Secret-Key 123")
			cfg.Server.Headers.Set("user-agent", "mine")
			cfg.Server.Headers.Set("x-custom", "a")
		})
	})
}

// TestDialing dials a server that is not there, ever more patiently and for ever.
func TestDialing(t *testing.T) {
	playWithout(t, func(t *testing.T, s *stage) {
		var attempts []time.Duration
		begin := time.Now()
		s.server.OnUpgrade(func(*http.Request) *gatewaytest.Refusal {
			attempts = append(attempts, time.Since(begin))
			return &gatewaytest.Refusal{Status: http.StatusInternalServerError}
		})
		s.server.Start()
		s.start(connections(1), exactly)
		time.Sleep(time.Hour)
		synctest.Wait()
		want := []time.Duration{0}
		for delay := 500 * time.Millisecond; ; delay = min(delay*3/2, 5*time.Second) {
			next := want[len(want)-1] + delay
			if next > time.Hour {
				break
			}
			want = append(want, next)
		}
		require.Len(t, attempts, len(want))
		for i := range want {
			require.InDelta(t, want[i], attempts[i], float64(time.Millisecond))
		}
		require.Len(t, s.logged(zap.WarnLevel, "cannot connect"), 1, "told once per change")
		require.Equal(t, []componentstatus.Status{componentstatus.StatusRecoverableError}, s.host.statuses())

		s.server.OnUpgrade(nil)
		s.server.WantLinks(1)
		synctest.Wait()
		require.Equal(t, []componentstatus.Status{componentstatus.StatusRecoverableError, componentstatus.StatusOK}, s.host.statuses())
		require.Len(t, s.logged(zap.InfoLevel, "connected to the server"), 1)
	})

	t.Run("with jitter", func(t *testing.T) {
		playWithout(t, func(t *testing.T, s *stage) {
			attempts := map[string][]time.Time{}
			s.server.OnUpgrade(func(r *http.Request) *gatewaytest.Refusal {
				name := r.Header.Get(gatewaytest.ConnectionIDHeader)
				attempts[name] = append(attempts[name], time.Now())
				time.Sleep(time.Millisecond) // one after the other, for the map's sake
				return &gatewaytest.Refusal{Status: http.StatusUnauthorized}
			})
			s.server.Start()
			s.start(connections(1))
			time.Sleep(10 * time.Minute)
			synctest.Wait()
			gaps := map[time.Duration]bool{}
			times := attempts["gateway/upstream-0"]
			for i := 1; i < len(times); i++ {
				gap := times[i].Sub(times[i-1])
				require.GreaterOrEqual(t, gap, 250*time.Millisecond)
				require.LessOrEqual(t, gap, 7600*time.Millisecond)
				gaps[gap] = true
			}
			require.Greater(t, len(gaps), len(times)/2)
		})
	})

	t.Run("a server that does not answer", func(t *testing.T) {
		playWithout(t, func(t *testing.T, s *stage) {
			s.net.Silence(serverAddress, true)
			s.start(exactly)
			time.Sleep(5 * time.Minute)
			require.Len(t, s.logged(zap.WarnLevel, "cannot connect"), 3)
			s.net.Silence(serverAddress, false)
			s.server.Start()
			begin := time.Now()
			time.Sleep(35 * time.Second)
			s.server.WantLinks(3)
			for _, link := range s.server.Links() {
				require.LessOrEqual(t, link.Since.Sub(begin), 35*time.Second)
			}
		})
	})

	t.Run("a server that takes the connection and is silent", func(t *testing.T) {
		playWithout(t, func(t *testing.T, s *stage) {
			listener, err := s.net.Listen(serverAddress)
			require.NoError(t, err)
			s.start(connections(1), exactly)
			for range 3 {
				conn, err := listener.Accept()
				require.NoError(t, err)
				begin := time.Now()
				buf := make([]byte, 10_000)
				for err == nil {
					_, err = conn.Read(buf)
				}
				require.Equal(t, dialTimeout, time.Since(begin))
				conn.Close()
			}
			listener.Close()
		})
	})

	t.Run("what it tells of a change", func(t *testing.T) {
		playWithout(t, func(t *testing.T, s *stage) {
			refuse := func(status int) {
				s.server.OnUpgrade(func(*http.Request) *gatewaytest.Refusal { return &gatewaytest.Refusal{Status: status} })
			}
			refuse(http.StatusUnauthorized)
			s.server.Start()
			s.start(connections(1))
			time.Sleep(time.Minute)
			refuse(http.StatusForbidden)
			time.Sleep(time.Minute)
			told := s.logged(zap.WarnLevel, "cannot connect")
			require.Len(t, told, 2)
			require.Contains(t, told[0].ContextMap()["error"], "401")
			require.Contains(t, told[1].ContextMap()["error"], "403")
			require.Equal(t, "localhost", told[0].ContextMap()["server.address"])
			require.EqualValues(t, 9000, told[0].ContextMap()["server.port"])
			require.Equal(t, "gateway/upstream-0", told[0].ContextMap()["link"])
		})
	})
}

// TestRetryAfter heeds how long the server wants to be left alone.
func TestRetryAfter(t *testing.T) {
	for name, test := range map[string]struct {
		status     int
		retryAfter string
		want       time.Duration
	}{
		"503":                     {http.StatusServiceUnavailable, "33", 33 * time.Second},
		"429":                     {http.StatusTooManyRequests, "120", 2 * time.Minute},
		"a date":                  {http.StatusServiceUnavailable, time.Date(2000, 1, 1, 0, 0, 45, 0, time.UTC).Format(http.TimeFormat), 45 * time.Second},
		"less than our own delay": {http.StatusServiceUnavailable, "0", 500 * time.Millisecond},
		"a year":                  {http.StatusServiceUnavailable, "31536000", 10 * time.Minute},
		"more than fits":          {http.StatusServiceUnavailable, "9999999999999", 10 * time.Minute},
		"nonsense":                {http.StatusServiceUnavailable, "soon", 500 * time.Millisecond},
		"negative":                {http.StatusServiceUnavailable, "-5", 500 * time.Millisecond},
		"the past":                {http.StatusServiceUnavailable, time.Date(1999, 1, 1, 0, 0, 0, 0, time.UTC).Format(http.TimeFormat), 500 * time.Millisecond},
	} {
		t.Run(name, func(t *testing.T) {
			playWithout(t, func(t *testing.T, s *stage) {
				s.server.OnUpgrade(func(*http.Request) *gatewaytest.Refusal {
					return &gatewaytest.Refusal{Status: test.status, Header: http.Header{"Retry-After": {test.retryAfter}}}
				})
				s.server.Start()
				s.start(connections(1), exactly)
				time.Sleep(11 * time.Minute)
				synctest.Wait()
				upgrades := s.server.Upgrades()
				require.Equal(t, test.want, upgrades[1].At.Sub(upgrades[0].At))
			})
		})
	}
}

// TestRedial dials a link that was lost at once, but one that flaps only with ever more delay.
func TestRedial(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		lost := func(after time.Duration) (gap time.Duration) {
			t.Helper()
			link := s.server.WantLinks(1)[0]
			synctest.Wait()
			time.Sleep(time.Until(link.Since.Add(after)))
			link.Reset()
			link.WantEnd()
			ended := time.Now()
			return s.server.WantLinks(1)[0].Since.Sub(ended)
		}
		require.Zero(t, lost(10*time.Second), "at once")
		require.Equal(t, 500*time.Millisecond, lost(10*time.Second))
		require.Equal(t, 750*time.Millisecond, lost(0))
		require.Equal(t, 1125*time.Millisecond, lost(59*time.Second))
		for range 10 {
			lost(0)
		}
		require.Equal(t, 5*time.Second, lost(0))
		require.Zero(t, lost(time.Minute), "at once, since it lived for a minute")
		require.Equal(t, 500*time.Millisecond, lost(0))
		s.wantFault(telemetry.ReasonLinkLost, 17)
	}, connections(1), exactly)

	t.Run("one link does not wait for another", func(t *testing.T) {
		play(t, func(t *testing.T, s *stage) {
			for range 5 {
				links := s.server.WantLinks(3)
				links[0].Reset()
				links[0].WantEnd()
				time.Sleep(6 * time.Second)
			}
			links := s.server.WantLinks(3)
			begin := time.Now()
			links[1].Reset()
			links[1].WantEnd()
			s.server.WantLinks(3)
			require.Zero(t, time.Since(begin))
			require.Equal(t, []componentstatus.Status{componentstatus.StatusOK}, s.host.statuses(), "two links are enough")
		}, exactly)
	})
}

// TestStatus reports to the collector when there is no link to the server, and when there is.
func TestStatus(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		const ok, recoverable = componentstatus.StatusOK, componentstatus.StatusRecoverableError
		require.Equal(t, []componentstatus.Status{ok}, s.host.statuses())
		s.server.Stop()
		synctest.Wait()
		require.Equal(t, []componentstatus.Status{ok, recoverable}, s.host.statuses())
		time.Sleep(10 * time.Second)
		synctest.Wait() // links are dialed a moment apart, and each failure is told
		last := s.host.events[len(s.host.events)-1]
		require.ErrorIs(t, last.Err(), errNoLink)
		require.ErrorContains(t, last.Err(), "connection refused")
		told := len(s.host.events)
		s.server.OnUpgrade(func(*http.Request) *gatewaytest.Refusal {
			return &gatewaytest.Refusal{Status: http.StatusInternalServerError}
		})
		s.server.Start()
		time.Sleep(20 * time.Second)
		require.Len(t, s.host.events, told, "another reason is not told: health checks count from what was told last")
		s.server.OnUpgrade(nil)
		s.server.WantLinks(3)
		synctest.Wait()
		require.Equal(t, []componentstatus.Status{ok, recoverable, ok}, s.host.statuses())
		s.stop()
		require.Equal(t, []componentstatus.Status{ok, recoverable, ok}, s.host.statuses(), "no link any more, but that is no error")
	})
}

// TestSpread attaches each agent to the link that has the fewest.
func TestSpread(t *testing.T) {
	t.Run("one at a time", func(t *testing.T) {
		play(t, func(t *testing.T, s *stage) {
			var agents []*gatewaytest.Agent
			for i := range 20 {
				agents = append(agents, s.introduce(fmt.Sprint("agent ", i)))
				s.wantSpread(i+1, 1)
			}
			for i := 0; i < 20; i += 3 { // all from one link
				agents[i].SayGoodbye()
			}
			synctest.Wait()
			for i := range 7 {
				s.introduce(fmt.Sprint("another agent ", i))
			}
			s.wantSpread(20, 1)
			s.wantConsistent()
		})
	})

	t.Run("64 at once", func(t *testing.T) {
		play(t, func(t *testing.T, s *stage) {
			s.server.OnConnect((*gatewaytest.Question).Silence)
			var knocks []<-chan answer
			for i := range 64 {
				knocks = append(knocks, s.knock(fmt.Sprint("agent ", i)))
			}
			s.wantSpread(64, 1)
			perLink := map[string]int{}
			for _, q := range s.server.Questions() {
				perLink[q.Link.Name]++
				q.Accept()
			}
			require.Len(t, perLink, 3)
			for _, n := range perLink {
				require.Contains(t, []int{21, 22}, n)
			}
			for _, knock := range knocks {
				s.wantLetIn(knock)
			}
			s.wantSpread(64, 1)
			s.wantConsistent()
		})
	})

	t.Run("not to a link that is down", func(t *testing.T) {
		play(t, func(t *testing.T, s *stage) {
			s.server.OnUpgrade(func(*http.Request) *gatewaytest.Refusal {
				return &gatewaytest.Refusal{Status: http.StatusServiceUnavailable}
			})
			s.server.WantLinks(3)[1].Reset()
			s.server.WantLinks(2)
			synctest.Wait()
			for i := range 10 {
				s.introduce(fmt.Sprint("agent ", i))
			}
			s.wantSpread(10, 0)
			s.server.OnUpgrade(nil)
			s.server.WantLinks(3)
			synctest.Wait()
			for i := range 5 {
				require.Equal(t, "gateway/upstream-1", s.linkOf(s.connect(fmt.Sprint("another agent ", i))).Name)
			}
			s.wantSpread(15, 0)
		})
	})
}
