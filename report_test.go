package opampgateway

import (
	"fmt"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
	"go.opentelemetry.io/collector/component"
	"go.opentelemetry.io/collector/config/configoptional"
	"go.opentelemetry.io/collector/config/configtls"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"
	"go.uber.org/zap"

	"github.com/opampgateway/opampgateway/internal/gatewaytest"
	"github.com/opampgateway/opampgateway/internal/telemetry"
)

// TestAllThatCanGoWrongIsThereFromTheStart has every reason and outcome be 0 before the first time, so that
// a rate sees it.
func TestAllThatCanGoWrongIsThereFromTheStart(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		values := func(name, key string) map[string]int64 {
			metric, err := s.metrics.GetMetric("otelcol_opampgateway." + name)
			require.NoError(t, err)
			got := map[string]int64{}
			for _, point := range metric.Data.(metricdata.Sum[int64]).DataPoints {
				value, _ := point.Attributes.Value(attribute.Key(key))
				got[value.AsString()] = point.Value
			}
			return got
		}
		reasons, outcomes := map[string]int64{}, map[string]int64{}
		for _, r := range telemetry.Reasons {
			reasons[string(r.Reason)] = 0
		}
		for _, o := range telemetry.Outcomes {
			outcomes[string(o.Outcome)] = 0
		}
		require.Equal(t, reasons, values("faults", "reason"))
		require.Equal(t, outcomes, values("admissions", "outcome"))
	})
}

// TestLostMessagesAreCounted has messages be dropped in all ways there are: each is either received or counted.
func TestLostMessagesAreCounted(t *testing.T) {
	// wantAllAccounted checks that each of n messages that were said arrived or is counted.
	wantAllAccounted := func(t *testing.T, s *stage, a *gatewaytest.Agent, n, unsure int) {
		t.Helper()
		synctest.Wait()
		got, lost := map[uint64]bool{}, int(s.counted("faults", string(telemetry.ReasonFrameLost)))
		for _, r := range s.server.Received(a.UID) {
			if r.Message.GetEffectiveConfig() != nil {
				got[r.Message.SequenceNum] = true
			}
		}
		require.NotZero(t, lost)
		require.LessOrEqual(t, len(got)+lost, n)
		require.GreaterOrEqual(t, len(got)+lost, n-unsure, "%d arrived, %d are counted as lost", len(got), lost)
	}
	// unsure is how many messages may be in the buffers of the network, where nobody knows of them.
	const n, size, unsure = 80, 2_000, 2*gatewaytest.BufferSize/2_000 + 2

	t.Run("all links have ended, and the agent is let go", func(t *testing.T) {
		play(t, func(t *testing.T, s *stage) {
			alice, link := s.introduce("alice"), s.server.WantLinks(1)[0]
			link.StopReading()
			for sequence := 1; sequence <= n; sequence++ {
				alice.Send(gatewaytest.Report(alice.UID, sequence, size))
			}
			synctest.Wait()
			s.server.OnUpgrade(func(*http.Request) *gatewaytest.Refusal { return &gatewaytest.Refusal{Status: 503} })
			link.Reset()
			link.ReadOn()
			time.Sleep(2 * time.Minute)
			s.wantConnections(0)
			wantAllAccounted(t, s, alice, n, unsure)
		}, connections(1))
	})

	t.Run("the server refuses the agent after a link was lost", func(t *testing.T) {
		play(t, func(t *testing.T, s *stage) {
			alice, link := s.introduce("alice"), s.server.WantLinks(1)[0]
			link.StopReading()
			for sequence := 1; sequence <= n; sequence++ {
				alice.Send(gatewaytest.Report(alice.UID, sequence, size))
			}
			synctest.Wait()
			s.server.OnConnect(func(q *gatewaytest.Question) { q.Refuse(http.StatusForbidden) })
			link.Reset()
			link.ReadOn()
			time.Sleep(2 * time.Minute)
			s.wantConnections(0)
			wantAllAccounted(t, s, alice, n, unsure)
		}, connections(1))
	})

	t.Run("the agent has gone, and then the link ends", func(t *testing.T) {
		play(t, func(t *testing.T, s *stage) {
			alice, link := s.introduce("alice"), s.server.WantLinks(1)[0]
			link.StopReading()
			const n = 28 // so few that its reader need not wait
			for sequence := 1; sequence <= n; sequence++ {
				alice.Send(gatewaytest.Report(alice.UID, sequence, size))
			}
			synctest.Wait()
			alice.Vanish()
			synctest.Wait()
			link.Reset()
			link.ReadOn()
			time.Sleep(10 * time.Second)
			wantAllAccounted(t, s, alice, n, unsure)
		}, connections(1))
	})

	t.Run("a gateway below, when its link ends", func(t *testing.T) {
		play(t, func(t *testing.T, s *stage) {
			gateway, link := s.below("gateway", 0), s.server.WantLinks(1)[0]
			link.StopReading()
			for sequence := 1; sequence <= n; sequence++ {
				gateway.Send(gatewaytest.Report(gateway.UID, sequence, size))
			}
			synctest.Wait()
			link.Reset()
			link.ReadOn()
			time.Sleep(10 * time.Second)
			s.wantConnections(0)
			wantAllAccounted(t, s, gateway, n, unsure)
		}, connections(1))
	})

	t.Run("discarded while the agent is let go", func(t *testing.T) {
		play(t, func(t *testing.T, s *stage) {
			alice := s.introduce("alice")
			for range maxBadInRow {
				alice.Send([]byte("garbage"))
			}
			for sequence := 1; sequence <= 10; sequence++ {
				alice.Send(gatewaytest.Report(alice.UID, sequence, 100))
			}
			_, err := alice.WantEnd(20 * time.Second)
			require.Error(t, err)
			wantAllAccounted(t, s, alice, 10, 0)
		})
	})

	t.Run("down, when the agent does not read", func(t *testing.T) {
		play(t, func(t *testing.T, s *stage) {
			alice, link := s.introduce("alice"), s.server.WantLinks(1)[0]
			alice.StopReading()
			for i := range n {
				link.Push(gatewaytest.Offer(alice.UID, fmt.Sprint(i), 60_000))
			}
			time.Sleep(10 * time.Second)
			s.wantConnections(0)
			synctest.Wait()
			lost := int(s.counted("faults", string(telemetry.ReasonServerFrameLost)) + s.counted("faults", string(telemetry.ReasonServerUnknownUID)))
			require.GreaterOrEqual(t, lost, n-2*gatewaytest.BufferSize/60_000-2)
			require.LessOrEqual(t, lost, n)
		}, connections(1))
	})

	t.Run("down, when the agent vanishes", func(t *testing.T) {
		play(t, func(t *testing.T, s *stage) {
			alice, link := s.introduce("alice"), s.server.WantLinks(1)[0]
			alice.StopReading()
			for i := range 20 {
				link.Push(gatewaytest.Offer(alice.UID, fmt.Sprint(i), 60_000))
			}
			synctest.Wait()
			alice.Vanish()
			synctest.Wait()
			lost := int(s.counted("faults", string(telemetry.ReasonServerFrameLost)))
			require.GreaterOrEqual(t, lost, 20-2*gatewaytest.BufferSize/60_000-2)
		}, connections(1))
	})
}

// TestLogOfStart says where the gateway listens; with a good configuration nothing worse.
func TestLogOfStart(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		told := s.logged(zap.InfoLevel, "listening for agents")
		require.Len(t, told, 1)
		require.Equal(t, gatewayAddress, told[0].ContextMap()["address"])
		require.Equal(t, false, told[0].ContextMap()["tls"])
		s.introduce("alice").SayGoodbye()
		time.Sleep(time.Minute)
		require.Empty(t, s.logged(zap.WarnLevel, ""))
		require.Empty(t, s.logged(zap.ErrorLevel, ""))
	}, func(cfg *Config) { cfg.Server.Headers.Set("Authorization", "gateway's") }) // to this host
}

// TestWarningsOfStart warns of what is legal, and yet may let somebody in, or a key out: once each, by the
// name of the setting.
func TestWarningsOfStart(t *testing.T) {
	tlsOf := func(version string) configoptional.Optional[configtls.ServerConfig] {
		authority := newAuthority(t)
		cert := authority.issue(t, "listener")
		return configoptional.Some(configtls.ServerConfig{
			Config:       configtls.Config{CertFile: cert.certFile, KeyFile: cert.keyFile, MinVersion: version},
			ClientCAFile: authority.file,
		})
	}
	old, good := tlsOf("1.1"), tlsOf("1.2")
	for name, test := range map[string]struct {
		change func(*Config)
		want   string // empty for none
	}{
		"all are let in": {func(cfg *Config) { cfg.Server.AgentAdmission = AdmissionAccept }, "server::agent_admission"},
		"all who have a certificate are let in": {func(cfg *Config) {
			cfg.Server.AgentAdmission, cfg.Listener.TLS = AdmissionAccept, good
		}, ""},
		"a key in clear": {func(cfg *Config) {
			cfg.Server.Endpoint = "ws://opamp.example:80/"
			cfg.Server.Headers.Set("Authorization", "s3cret")
		}, "server::endpoint"},
		"no key in clear": {func(cfg *Config) { cfg.Server.Endpoint = "ws://opamp.example:80/" }, ""},
		"a token in clear": {func(cfg *Config) {
			cfg.Server.Endpoint = "ws://opamp.example:80/"
			withIssuer(cfg)
		}, "server::endpoint"},
		"a key to this host": {func(cfg *Config) {
			cfg.Server.Endpoint = "ws://127.0.0.1:80/"
			cfg.Server.Headers.Set("Authorization", "s3cret")
		}, ""},
		"a key to this host, by IPv6": {func(cfg *Config) {
			cfg.Server.Endpoint = "ws://[::1]:80/"
			cfg.Server.Headers.Set("Authorization", "s3cret")
		}, ""},
		"a server that may be anybody": {func(cfg *Config) {
			cfg.Server.Endpoint = "wss://localhost:9000/"
			cfg.Server.TLS.InsecureSkipVerify = true
		}, "server::tls::insecure_skip_verify"},
		"old TLS to the server": {func(cfg *Config) { cfg.Server.Endpoint = "wss://localhost:9000/"; cfg.Server.TLS.MinVersion = "1.0" }, "server::tls::min_version"},
		"old TLS to agents":     {func(cfg *Config) { cfg.Listener.TLS = old }, "listener::tls::min_version"},
		"new TLS to agents":     {func(cfg *Config) { cfg.Listener.TLS = good }, ""},
	} {
		t.Run(name, func(t *testing.T) {
			playWithout(t, func(t *testing.T, s *stage) {
				s.net.Silence(serverAddress, true)
				s.net.Silence("opamp.example:80", true)
				s.extensions = map[component.ID]component.Component{issuerID: newIssuer("s3cret")}
				s.start(test.change)
				told := s.logged(zap.WarnLevel, "::")
				if test.want == "" {
					require.Empty(t, told)
					return
				}
				require.Len(t, told, 1)
				require.Contains(t, told[0].Message, test.want)
				s.wantNotLogged("s3cret")
			})
		})
	}
}

// TestLogOfRefusals tells who was refused, and why, of a few.
func TestLogOfRefusals(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		s.server.OnConnect(func(q *gatewaytest.Question) { q.Refuse(http.StatusUnauthorized) })
		s.comeFrom("192.0.2.7")
		for i := range 100 {
			s.door.WantRefused(t, fmt.Sprint("agent ", i), http.StatusUnauthorized,
				"Authorization", "s3cret", "User-Agent", "agent/1.2 "+strings.Repeat("x", 1000), "Agent-ID", "0123-4567")
		}
		told := s.logged(zap.InfoLevel, "server refused agent")
		require.NotEmpty(t, told)
		require.Less(t, len(told), 20)
		fields := told[0].ContextMap()
		require.Equal(t, "192.0.2.7", fields["client.address"])
		require.NotZero(t, fields["client.port"])
		require.EqualValues(t, http.StatusUnauthorized, fields["http.response.status_code"])
		require.Equal(t, "0123-4567", fields["agent_id"])
		require.Contains(t, fields["user_agent.original"], "agent/1.2")
		require.Less(t, len(fields["user_agent.original"].(string)), 300)
		time.Sleep(time.Minute) // later ones are told again
		s.door.WantRefused(t, "another", http.StatusUnauthorized)
		require.Greater(t, len(s.logged(zap.InfoLevel, "server refused agent")), len(told))
		s.wantNotLogged("s3cret")
	})
}

// TestLogOfLargeMessages tells whom an oversized message of the server was for, and how large it was.
func TestLogOfLargeMessages(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		alice, link := s.introduce("alice"), s.server.WantLinks(1)[0]
		offer := gatewaytest.Offer(alice.UID, "x", 500_000)
		link.Push(offer)
		s.wantFaults(map[telemetry.Reason]int{telemetry.ReasonServerTooLarge: 1})
		told := s.logged(zap.WarnLevel, "max_message_size")
		require.Len(t, told, 1)
		require.Equal(t, uidOf(t, "alice").String(), told[0].ContextMap()["agent"])
		require.EqualValues(t, len(offer), told[0].ContextMap()["bytes"])
		for range 100 {
			link.Push(offer)
		}
		s.wantFault(telemetry.ReasonServerTooLarge, 101)
		require.Less(t, len(s.logged(zap.WarnLevel, "max_message_size")), 10)
	}, connections(1), func(cfg *Config) { cfg.MaxMessageSize = 100_000 })
}

// TestLogOfRedirect tells where a server wants the gateway to go.
func TestLogOfRedirect(t *testing.T) {
	playWithout(t, func(t *testing.T, s *stage) {
		s.server.OnUpgrade(func(*http.Request) *gatewaytest.Refusal {
			return &gatewaytest.Refusal{Status: http.StatusFound, Header: http.Header{"Location": {"https://login.example/?from=opamp"}}}
		})
		s.server.Start()
		s.start(connections(1))
		time.Sleep(10 * time.Second)
		told := s.logged(zap.WarnLevel, "cannot connect")
		require.Len(t, told, 1)
		require.Contains(t, told[0].ContextMap()["error"], "redirected to login.example:443")
	})
}

// TestLogOfStrangers is quiet about probes that connect and leave, and not about who speaks TLS.
func TestLogOfStrangers(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		for range 20 {
			require.NoError(t, s.write("").Close())
		}
		time.Sleep(time.Minute)
		for _, entry := range s.logs.All() {
			require.LessOrEqual(t, entry.Level, zap.InfoLevel, entry.Message)
			require.False(t, entry.Level == zap.InfoLevel && entry.ContextMap()["client.address"] != nil, entry.Message)
		}
		s.write("\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + strings.Repeat("x", 600))
		synctest.Wait()
		require.Len(t, s.logged(zap.WarnLevel, "TLS"), 1)
	})
}
