package opampgateway

import (
	"fmt"
	"net"
	"net/http"
	"runtime/debug"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
	"go.opentelemetry.io/collector/component"
	"go.opentelemetry.io/collector/component/componenttest"
	"go.uber.org/zap"

	"github.com/opampgateway/opampgateway/internal/gatewaytest"
	"github.com/opampgateway/opampgateway/internal/metadata"
)

const elsewhereAddress = "localhost:9001"

// startElsewhere starts a server to which that of the stage redirects all links, as long as it is asked at /v1/opamp.
func (s *stage) startElsewhere(location string) *gatewaytest.Server {
	s.t.Helper()
	elsewhere := gatewaytest.NewServer(s.t, func() (net.Listener, error) { return s.net.Listen(elsewhereAddress) })
	elsewhere.Start()
	s.server.OnUpgrade(func(r *http.Request) *gatewaytest.Refusal {
		if r.URL.Path != "/v1/opamp" {
			return nil
		}
		return &gatewaytest.Refusal{Status: http.StatusTemporaryRedirect, Header: http.Header{"Location": {location}}}
	})
	s.server.Start()
	return elsewhere
}

// TestGatewayName has no two gateways look alike to their server.
func TestGatewayName(t *testing.T) {
	const uuid = "^[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$"
	withID := func(id any) component.TelemetrySettings {
		set := componenttest.NewNopTelemetrySettings()
		require.NoError(t, set.Resource.Attributes().FromRaw(map[string]any{instanceIDKey: id}))
		return set
	}
	cfg := createDefaultConfig().(*Config)
	require.Equal(t, "site 7", gatewayName(cfg, withID("site 7")))
	require.Equal(t, "7", gatewayName(cfg, withID(7)))
	for _, set := range []component.TelemetrySettings{{}, componenttest.NewNopTelemetrySettings(), withID(""), withID("two\nlines"), withID(nil)} {
		one, another := gatewayName(cfg, set), gatewayName(cfg, set)
		require.Regexp(t, uuid, one)
		require.Regexp(t, uuid, another)
		require.NotEqual(t, one, another)
	}
	cfg.Server.AgentID = "gw-7"
	require.Equal(t, "gw-7", gatewayName(cfg, withID("site 7")))

	t.Run("for life", func(t *testing.T) {
		play(t, func(t *testing.T, s *stage) {
			for range 3 {
				s.server.WantLinks(3)[1].Reset()
				time.Sleep(time.Minute)
			}
			for _, upgrade := range s.server.Upgrades() {
				require.Regexp(t, "^gateway/upstream-[012]$", upgrade.Header.Get(connectionIDHeader))
			}
		})
	})
}

func TestUserAgent(t *testing.T) {
	agent := userAgent(component.BuildInfo{Command: "otelcol test", Version: "1.2.3"})
	require.Regexp(t, `^opamp-gateway/dev otelcol-test/1\.2\.3 \([a-z0-9]+/[a-z0-9]+\)$`, agent)
	require.Regexp(t, `^opamp-gateway/dev \([a-z0-9]+/[a-z0-9]+\)$`, userAgent(component.BuildInfo{Version: "1.2.3"}))
	require.Regexp(t, `^opamp-gateway/dev x/dev \(`, userAgent(component.BuildInfo{Command: "x"}))

	ours := metadata.ScopeName
	others := &debug.Module{Path: ours + "/e2e", Version: "v9.9.9"}
	for name, test := range map[string]struct {
		info debug.BuildInfo
		want string
	}{
		"a collector":                      {debug.BuildInfo{Main: debug.Module{Path: "collector"}, Deps: []*debug.Module{others, {Path: ours, Version: "v1.2.3"}}}, "1.2.3"},
		"of a commit":                      {debug.BuildInfo{Deps: []*debug.Module{{Path: ours, Version: "v0.1.1-0.20261127031234-0123456789ab"}}}, "0.1.1-0.20261127031234-0123456789ab"},
		"replaced by a directory":          {debug.BuildInfo{Deps: []*debug.Module{{Path: ours, Version: "v1.2.3", Replace: &debug.Module{Path: "../.."}}}}, "1.2.3"},
		"a placeholder, and a directory":   {debug.BuildInfo{Deps: []*debug.Module{{Path: ours, Version: "v0.0.0", Replace: &debug.Module{Path: "../.."}}}}, "dev"},
		"replaced by a fork":               {debug.BuildInfo{Deps: []*debug.Module{{Path: ours, Version: "v1.2.3", Replace: &debug.Module{Path: "fork", Version: "v1.2.4"}}}}, "1.2.4"},
		"our own test":                     {debug.BuildInfo{Main: debug.Module{Path: ours, Version: "(devel)"}}, "dev"},
		"our own module, of a repository":  {debug.BuildInfo{Main: debug.Module{Path: ours, Version: "v1.2.3+dirty"}}, "1.2.3+dirty"},
		"a program that knows of nothing":  {debug.BuildInfo{}, "dev"},
		"a program with somebody else's":   {debug.BuildInfo{Deps: []*debug.Module{others}}, "dev"},
		"a version that no header can say": {debug.BuildInfo{Deps: []*debug.Module{{Path: ours, Version: "v1 (x)"}}}, "1--x-"},
	} {
		require.Equal(t, test.want, versionIn(&test.info), name)
	}
}

// TestLinksDialApart has the links of one gateway dial a moment apart, whenever all are to be dialed.
func TestLinksDialApart(t *testing.T) {
	wantApart := func(t *testing.T, upgrades []gatewaytest.Upgrade, begin time.Time, apart time.Duration) {
		t.Helper()
		for i, upgrade := range upgrades {
			require.Equal(t, time.Duration(i)*apart, upgrade.At.Sub(begin), "upgrade %d", i)
		}
	}
	playWithout(t, func(t *testing.T, s *stage) {
		s.server.Start()
		begin := time.Now()
		s.start(exactly)
		s.server.WantLinks(3)
		wantApart(t, s.server.Upgrades(), begin, 50*time.Millisecond)

		time.Sleep(time.Minute)
		before := len(s.server.Upgrades())
		begin = time.Now()
		for _, link := range s.server.WantLinks(3) {
			link.Reset()
		}
		time.Sleep(time.Second)
		s.server.WantLinks(3)
		wantApart(t, s.server.Upgrades()[before:], begin, 50*time.Millisecond)

		// When the server is back, the others do not wait for their own turns, and yet do not come at once.
		s.server.Stop()
		time.Sleep(time.Minute)
		before = len(s.server.Upgrades())
		s.server.Start()
		time.Sleep(10 * time.Second)
		upgrades := s.server.Upgrades()[before:]
		require.Len(t, upgrades, 3)
		wantApart(t, upgrades, upgrades[0].At, 50*time.Millisecond)
	})

	t.Run("many, within half a second", func(t *testing.T) {
		playWithout(t, func(t *testing.T, s *stage) {
			s.server.Start()
			begin := time.Now()
			s.start(connections(64))
			s.server.WantLinks(64)
			wantApart(t, s.server.Upgrades(), begin, 500*time.Millisecond/64)
		})
	})

	t.Run("not when the gateway is stopped meanwhile", func(t *testing.T) {
		playWithout(t, func(t *testing.T, s *stage) {
			s.server.Start()
			s.start()
			synctest.Wait()
			require.Less(t, s.stop(), shutdownTimeout)
			time.Sleep(time.Second)
			require.Len(t, s.server.Upgrades(), 1)
		})
	})
}

// TestFirstTurns has each link begin with the next address, and not each gateway with the same.
func TestFirstTurns(t *testing.T) {
	begins := map[int]bool{}
	for range 100 {
		turns := firstTurns(3)
		require.Equal(t, []int{turns[0], turns[0] + 1, turns[0] + 2}, turns)
		require.GreaterOrEqual(t, turns[0], 0)
		begins[turns[0]%5] = true
	}
	require.Len(t, begins, 5)
}

// TestRedirect follows where the server sends a link, with headers that are only for the endpoint's host.
func TestRedirect(t *testing.T) {
	const secret = "s3cret"
	withHeaders := func(cfg *Config) {
		cfg.Server.Headers.Set("Authorization", secret)
		cfg.Server.Headers.Set("User-Agent", "mine")
		cfg.Server.Headers.Set("X-Team", "a", "b")
	}
	t.Run("on the same host", func(t *testing.T) {
		playWithout(t, func(t *testing.T, s *stage) {
			s.startElsewhere("/v2?token=" + secret)
			s.start(withHeaders)
			for _, link := range s.server.WantLinks(3) {
				require.Equal(t, []string{secret}, link.Header["Authorization"])
				require.Equal(t, []string{"a", "b"}, link.Header["X-Team"])
			}
			synctest.Wait()
			told := s.logged(zap.InfoLevel, "connected to the server")
			require.Len(t, told, 3)
			require.Equal(t, "ws://"+serverAddress+"/v2", told[0].ContextMap()["redirected_to"])
			require.Equal(t, "/v1/opamp", s.server.Upgrades()[0].Path)
			s.wantNotLogged(secret)
			alice := s.connect("alice")
			alice.Say(1)
			s.server.Next(alice.UID)
		})
	})

	t.Run("to another host", func(t *testing.T) {
		playWithout(t, func(t *testing.T, s *stage) {
			elsewhere := s.startElsewhere("http://" + elsewhereAddress + "/")
			s.start(withHeaders)
			for i, link := range elsewhere.WantLinks(3) {
				require.Equal(t, fmt.Sprint("gateway/upstream-", i), link.Name)
				require.Empty(t, link.Header["Authorization"])
				require.Empty(t, link.Header["X-Team"])
				require.True(t, strings.HasPrefix(link.Header.Get("User-Agent"), "opamp-gateway/"), link.Header)
			}
			require.Empty(t, s.server.Links())

			// Each attempt begins at the endpoint: it may choose another host now.
			synctest.Wait() // the gateway has seen its last link, too
			s.server.OnUpgrade(nil)
			elsewhere.WantLinks(3)[0].Reset()
			require.Equal(t, []string{secret}, s.server.WantLinks(1)[0].Header["Authorization"])
			synctest.Wait()
			told := s.logged(zap.InfoLevel, "connected to the server")
			require.Len(t, told, 4)
			require.Equal(t, "ws://"+elsewhereAddress+"/", told[0].ContextMap()["redirected_to"])
			require.NotContains(t, told[3].ContextMap(), "redirected_to")
			elsewhere.Stop()
			s.server.WantLinks(3)
		})
	})

	t.Run("to a host that wants our headers", func(t *testing.T) {
		playWithout(t, func(t *testing.T, s *stage) {
			elsewhere := s.startElsewhere("ws://" + elsewhereAddress + "/")
			elsewhere.OnUpgrade(func(*http.Request) *gatewaytest.Refusal {
				return &gatewaytest.Refusal{Status: http.StatusUnauthorized, Header: http.Header{"Retry-After": {"60"}}}
			})
			s.start(withHeaders, connections(1))
			time.Sleep(59 * time.Second)
			told := s.logged(zap.WarnLevel, "cannot connect")
			require.Len(t, told, 1)
			require.Equal(t, "redirected to "+elsewhereAddress+": server answered 401 Unauthorized: "+
				"it was not sent server::headers, which are for the host of server::endpoint", told[0].ContextMap()["error"])
			require.Len(t, elsewhere.Upgrades(), 1, "it wants to be left alone")
			s.wantNotLogged(secret)
		})
	})

	t.Run("for ever", func(t *testing.T) {
		playWithout(t, func(t *testing.T, s *stage) {
			s.startElsewhere("/v1/opamp")
			s.start(connections(1))
			time.Sleep(time.Minute)
			told := s.logged(zap.WarnLevel, "cannot connect")
			require.Len(t, told, 1)
			require.Equal(t, "redirected to "+serverAddress+": server answered 307 Temporary Redirect to /v1/opamp, "+
				"which is not followed: there were 3 before; see server::endpoint", told[0].ContextMap()["error"])
		})
	})

	t.Run("to a host that is not there, and then not even that", func(t *testing.T) {
		playWithout(t, func(t *testing.T, s *stage) {
			s.startElsewhere("ws://localhost:9002/")
			s.start(connections(1))
			time.Sleep(time.Minute)
			s.server.Stop()
			time.Sleep(time.Minute)
			told := s.logged(zap.WarnLevel, "cannot connect")
			require.Len(t, told, 2, "told once per change")
			require.Contains(t, told[0].ContextMap()["error"], "redirected to localhost:9002: ")
			require.NotContains(t, told[1].ContextMap()["error"], "redirected")
		})
	})
}
