package opampgateway

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/open-telemetry/opamp-go/protobufs"
	"github.com/stretchr/testify/require"
	"go.uber.org/zap"

	"github.com/opampgateway/opampgateway/internal/gatewaytest"
	"github.com/opampgateway/opampgateway/internal/telemetry"
)

// asked has the server be asked about agents, and nothing else be tried.
func asked(cfg *Config) { cfg.Server.AgentAdmission = AdmissionAsk }

// verified has each agent be verified.
func verified(cfg *Config) { cfg.Server.AgentAdmission = AdmissionVerify }

// places has so many be verified at a time.
func places(n int) func(*Config) {
	return func(cfg *Config) { cfg.Server.VerifyConnections = n }
}

// judge has the server answer, by f, those that come for a WebSocket and are no link of a gateway.
func (s *stage) judge(f func(*http.Request) *gatewaytest.Refusal) {
	s.server.OnUpgrade(func(r *http.Request) *gatewaytest.Refusal {
		if strings.HasPrefix(r.Header.Get(connectionIDHeader), "gateway/") {
			return nil
		}
		return f(r)
	})
}

// onlyKey refuses all whose key is another.
func onlyKey(key string) func(*http.Request) *gatewaytest.Refusal {
	return func(r *http.Request) *gatewaytest.Refusal {
		if r.Header.Get("Authorization") == key {
			return nil
		}
		return &gatewaytest.Refusal{Status: http.StatusUnauthorized, Header: http.Header{"Www-Authenticate": {"Key"}}}
	}
}

// hold has the server not answer the handshakes of agents. It returns how many it holds, and what lets them go on.
func (s *stage) hold() (held *atomic.Int32, most *atomic.Int32, goOn chan struct{}) {
	held, most, goOn = &atomic.Int32{}, &atomic.Int32{}, make(chan struct{})
	s.judge(func(r *http.Request) *gatewaytest.Refusal {
		most.Store(max(most.Load(), held.Add(1)))
		defer held.Add(-1)
		select {
		case <-goOn:
		case <-r.Context().Done():
		}
		return nil
	})
	return held, most, goOn
}

// deaf has the server answer questions as one that does not know them, until it is to answer.
func (s *stage) deaf() {
	s.server.OnConnect(func(q *gatewaytest.Question) {
		q.Link.Push(gatewaytest.Frame(&protobufs.ServerToAgent{CustomCapabilities: &protobufs.CustomCapabilities{}}))
	})
}

// visits returns the requests of those that are no link.
func (s *stage) visits() (visits []gatewaytest.Upgrade) {
	for _, u := range s.server.Upgrades() {
		if !strings.HasPrefix(u.Header.Get(connectionIDHeader), "gateway/") {
			visits = append(visits, u)
		}
	}
	return visits
}

// TestVerify has the server decide by its answer to an agent's own request: it sees what it would of the agent itself, and a
// connection on which nothing is said, which ends at once.
func TestVerify(t *testing.T) {
	playUntried(t, func(t *testing.T, s *stage) {
		s.judge(onlyKey("Secret-Key alice"))
		alice := s.introduce("alice", "Authorization", "Secret-Key alice", "User-Agent", "agent/1.0", "Connection-Note", "kept")
		require.Len(t, s.visits(), 1)
		visit := s.visits()[0]
		require.Equal(t, "/v1/opamp", visit.Path)
		for name, want := range map[string]string{
			"Authorization": "Secret-Key alice", "User-Agent": "agent/1.0", gatewaytest.NameHeader: "alice", "Connection-Note": "kept",
			connectionIDHeader: "", "X-Gateway-Key": "", // of the gateway's own
		} {
			require.Equal(t, want, visit.Header.Get(name), name)
		}
		require.Len(t, visit.Header["Sec-Websocket-Key"], 1)
		require.Len(t, s.server.Visits(), 1)
		s.server.Visits()[0].WantClosed(1000)
		require.Empty(t, s.server.Questions())
		require.Len(t, s.server.WantLinks(3), 3)
		s.exchange(alice, 2)

		headers := s.door.WantRefused(t, "mallory", http.StatusUnauthorized, "Authorization", "Secret-Key guessed")
		require.Equal(t, "Key", headers.Get("WWW-Authenticate"))
		s.wantAdmissions(telemetry.OutcomeAccepted, 1)
		s.wantAdmissions(telemetry.OutcomeRefused, 1)
		s.wantNotLogged("Secret-Key", "guessed")
		s.wantFaults(nil)
	}, verified, func(cfg *Config) { cfg.Server.Headers.Set("X-Gateway-Key", "of the gateway") })

	t.Run("an agent that names no product", func(t *testing.T) {
		playUntried(t, func(t *testing.T, s *stage) {
			s.connect("alice", "User-Agent", "")
			require.Empty(t, s.visits()[0].Header["User-Agent"], "the gateway's own word")
		}, verified)
	})
}

// TestVerifyRefusals has refusals reach the agent as the server means them; what decides nothing about the agent is no refusal.
func TestVerifyRefusals(t *testing.T) {
	for _, test := range []struct {
		status  int
		headers http.Header
		want    int
		pass    []string
		drop    []string
	}{
		{401, http.Header{"Www-Authenticate": {"Key", "Basic"}, "Set-Cookie": {"a=b"}}, 401, []string{"Www-Authenticate"}, []string{"Set-Cookie"}},
		{403, http.Header{"X-Reason": {"because"}, "Keep-Alive": {"timeout=9"}}, 403, []string{"X-Reason"}, []string{"Keep-Alive"}},
		{426, http.Header{"Upgrade": {"OpAMP/v0.9.0"}, "Connection": {"Upgrade"}}, 426, []string{"Upgrade"}, nil},
		{429, http.Header{"Retry-After": {"77"}}, 429, []string{"Retry-After"}, nil},
		{404, nil, 404, nil, nil},
		{503, http.Header{"Retry-After": {"5"}}, 503, []string{"Retry-After"}, nil},
		{503, nil, 503, nil, nil},
		{502, http.Header{"X-Reason": {"balancer"}}, 503, nil, []string{"X-Reason"}},
		{500, http.Header{"Retry-After": {"44"}}, 503, []string{"Retry-After"}, nil},
		{200, nil, 503, nil, nil},
		{302, http.Header{"Location": {"ws://" + elsewhereAddress}}, 503, nil, []string{"Location"}},
		{301, nil, 503, nil, nil},
	} {
		t.Run(fmt.Sprint(test.status, test.headers), func(t *testing.T) {
			playUntried(t, func(t *testing.T, s *stage) {
				s.judge(func(*http.Request) *gatewaytest.Refusal {
					return &gatewaytest.Refusal{Status: test.status, Header: test.headers}
				})
				answer := <-s.knock("alice")
				require.NoError(t, ignore(answer.err))
				require.Nil(t, answer.agent)
				require.Equal(t, test.want, answer.StatusCode)
				for _, name := range test.pass {
					require.Equal(t, strings.Join(test.headers[name], ", "), answer.Header.Get(name))
				}
				for _, name := range test.drop {
					require.Empty(t, answer.Header.Get(name), name)
				}
				if test.want == http.StatusServiceUnavailable {
					require.NotEmpty(t, answer.Header.Get("Retry-After"))
				}
				body, err := io.ReadAll(answer.Body)
				require.NoError(t, err)
				require.NotEmpty(t, body)
				outcome := telemetry.OutcomeRefused
				if test.status != test.want {
					outcome = telemetry.OutcomeCannotVerify
				}
				s.wantAdmissions(outcome, 1)
			}, verified)
		})
	}

	t.Run("redirected within the host", func(t *testing.T) {
		playUntried(t, func(t *testing.T, s *stage) {
			s.judge(func(r *http.Request) *gatewaytest.Refusal {
				if r.URL.Path == "/v1/opamp" {
					return &gatewaytest.Refusal{Status: http.StatusTemporaryRedirect, Header: http.Header{"Location": {"/v2"}}}
				}
				return onlyKey("right")(r)
			})
			s.connect("alice", "Authorization", "right")
			s.door.WantRefused(t, "mallory", http.StatusUnauthorized)
		}, verified)
	})

	t.Run("redirected to another host", func(t *testing.T) {
		playWithout(t, func(t *testing.T, s *stage) {
			elsewhere := s.startElsewhere("ws://" + elsewhereAddress + "/v1/opamp")
			s.start(verified)
			elsewhere.WantLinks(3) // which have no headers to hide
			before := len(elsewhere.Upgrades())
			s.wantTurnedAway(s.knock("alice", "Authorization", "hers"))
			require.Len(t, elsewhere.Upgrades(), before, "it was shown an agent's key, or believed without one")
			require.Len(t, s.logged(zap.WarnLevel, "gave no verdict"), 1)
			require.Contains(t, fmt.Sprint(s.logged(zap.WarnLevel, "gave no verdict")[0].ContextMap()["error"]), "server::endpoint")
		})
	})

	t.Run("a server that cannot be reached", func(t *testing.T) {
		playUntried(t, func(t *testing.T, s *stage) {
			s.net.Silence(serverAddress, true)
			require.Equal(t, 40*time.Second, s.wantTurnedAway(s.knock("alice")).took)
			s.wantAdmissions(telemetry.OutcomeNoAnswer, 1)
			s.net.Silence(serverAddress, false)
			s.connect("alice")
		}, verified)
	})
}

// TestVerifyAtOnce bounds how many handshakes a crowd of newcomers costs the server at a time, and has none keep out another.
func TestVerifyAtOnce(t *testing.T) {
	playUntried(t, func(t *testing.T, s *stage) {
		held, most, goOn := s.hold()
		var crowd []<-chan answer
		for i := range 100 {
			crowd = append(crowd, s.knock(fmt.Sprint("agent ", i)))
		}
		synctest.Wait()
		require.EqualValues(t, 8, held.Load(), "one address has half of the places")
		s.comeFrom("10.0.0.2")
		bob := s.knock("bob")
		synctest.Wait()
		require.EqualValues(t, 9, held.Load(), "bob waits behind the crowd")
		for i := range 30 {
			s.comeFrom(fmt.Sprint("10.0.1.", i))
			crowd = append(crowd, s.knock(fmt.Sprint("other ", i)))
		}
		synctest.Wait()
		require.LessOrEqual(t, held.Load(), int32(16))
		close(goOn)
		s.wantLetIn(bob)
		for _, knock := range crowd {
			s.wantLetIn(knock)
		}
		require.LessOrEqual(t, most.Load(), int32(16))
		require.Len(t, s.visits(), 131)
	}, verified)

	t.Run("those that leave", func(t *testing.T) {
		playUntried(t, func(t *testing.T, s *stage) {
			held, _, goOn := s.hold()
			ctx, leave := context.WithCancel(t.Context())
			var gone []<-chan answer
			for i := range 50 {
				gone = append(gone, s.knockContext(ctx, fmt.Sprint("agent ", i)))
			}
			synctest.Wait()
			require.EqualValues(t, 2, held.Load())
			leave()
			for _, knock := range gone {
				require.Error(t, (<-knock).err)
			}
			synctest.Wait()
			require.Zero(t, held.Load(), "the server is at work for nobody")
			waiting, sent := s.pool.verifier.book.Len()
			require.Zero(t, waiting+sent)
			close(goOn)
			s.connect("alice")
			s.wantAdmissions(telemetry.OutcomeAbandoned, 50)
		}, verified, places(4))
	})

	t.Run("a slow server", func(t *testing.T) {
		playUntried(t, func(t *testing.T, s *stage) {
			s.hold()
			var crowd []<-chan answer
			for i := range 5 {
				crowd = append(crowd, s.knock(fmt.Sprint("agent ", i)))
			}
			for _, knock := range crowd {
				require.Equal(t, 5*time.Second, s.wantTurnedAway(knock).took)
			}
			s.wantAdmissions(telemetry.OutcomeNoAnswer, 5)
		}, verified, places(1), func(cfg *Config) { cfg.Server.AdmissionTimeout = 5 * time.Second })
	})

	t.Run("and a reload with more of them", func(t *testing.T) {
		playUntried(t, func(t *testing.T, s *stage) {
			held, _, goOn := s.hold()
			var crowd []<-chan answer
			for i := range 20 {
				crowd = append(crowd, s.knock(fmt.Sprint("agent ", i)))
			}
			synctest.Wait()
			require.EqualValues(t, 1, held.Load())
			s.reload(places(8))
			synctest.Wait()
			require.EqualValues(t, 4, held.Load())
			close(goOn)
			for _, knock := range crowd {
				s.wantLetIn(knock)
			}
		}, verified, places(1))
	})
}

// TestVerifyOnce has an agent lose its link: it is not verified again, but at another server it is.
func TestVerifyOnce(t *testing.T) {
	playUntried(t, func(t *testing.T, s *stage) {
		s.judge(onlyKey("right"))
		alice := s.introduce("alice", "Authorization", "right")
		bob := s.introduce("bob", "Authorization", "right")
		s.linkOf(alice).Reset()
		alice.WantFullStateRequest()
		s.exchange(alice, 2)
		require.Len(t, s.visits(), 2)

		// The same server on other links.
		s.reload(connections(2))
		s.server.WantLinks(2)
		alice.WantFullStateRequest()
		s.exchange(alice, 3)
		require.Len(t, s.visits(), 2)

		// Another server, which takes other keys.
		s.judge(func(r *http.Request) *gatewaytest.Refusal {
			if r.Header.Get(gatewaytest.NameHeader) == "bob" {
				return &gatewaytest.Refusal{Status: http.StatusForbidden}
			}
			return nil
		})
		s.reload(connections(2), func(cfg *Config) { cfg.Server.Endpoint += "/other" })
		_, err := bob.WantEnd(20 * time.Second)
		require.ErrorContains(t, err, "1008")
		alice.WantFullStateRequest()
		s.exchange(alice, 4)
		require.Len(t, s.visits(), 4)
		s.wantFault(telemetry.ReasonAgentRefused, 1)
	}, verified)

	t.Run("though the other server is slow to take it", func(t *testing.T) {
		playUntried(t, func(t *testing.T, s *stage) {
			alice := s.introduce("alice")
			busy := true
			s.judge(func(*http.Request) *gatewaytest.Refusal {
				if !busy {
					return nil
				}
				busy = false
				return &gatewaytest.Refusal{Status: http.StatusBadGateway}
			})
			s.reload(func(cfg *Config) { cfg.Server.Endpoint += "/other" })
			alice.WantFullStateRequest()
			s.exchange(alice, 4)
			require.Len(t, s.visits(), 3)
		}, verified)
	})
}

// TestVerifyForGatewaysBelow answers the questions of a gateway below by verifying.
func TestVerifyForGatewaysBelow(t *testing.T) {
	playUntried(t, func(t *testing.T, s *stage) {
		s.judge(onlyKey("right"))
		gateway := s.connect("below", "Authorization", "right", gatewaytest.ConnectionIDHeader, "below/upstream-0")
		ask(gateway, "1", "right")
		wantVerdict(t, gateway, "1", true, 200)
		ask(gateway, "2", "a guess")
		require.Equal(t, map[string]string{"Www-Authenticate": "Key"}, wantVerdict(t, gateway, "2", false, 401))
		require.Equal(t, "a guess", s.visits()[2].Header.Get("Authorization"))
		require.Empty(t, s.visits()[2].Header.Get(gatewaytest.ConnectionIDHeader))

		s.judge(func(*http.Request) *gatewaytest.Refusal { return &gatewaytest.Refusal{Status: http.StatusBadGateway} })
		ask(gateway, "3", "right")
		require.NotEmpty(t, wantVerdict(t, gateway, "3", false, 503)["Retry-After"])
		require.Empty(t, s.server.Questions())
		s.wantFaults(nil)
		s.wantNotLogged("a guess")
	}, verified)

	t.Run("as many at a time as for others", func(t *testing.T) {
		playUntried(t, func(t *testing.T, s *stage) {
			gateway := s.below("below", 0)
			held, _, goOn := s.hold()
			for i := range 100 {
				ask(gateway, fmt.Sprint(i), "right")
			}
			synctest.Wait()
			require.EqualValues(t, 8, held.Load())
			s.comeFrom("10.0.0.2")
			alice := s.knock("alice")
			synctest.Wait()
			require.EqualValues(t, 9, held.Load())
			require.NotZero(t, s.memory.Requests.Held())
			close(goOn)
			s.wantLetIn(alice)
			for range 100 {
				gateway.Next()
			}
		}, verified)
	})

	t.Run("a server that is slow", func(t *testing.T) {
		playUntried(t, func(t *testing.T, s *stage) {
			gateway := s.below("below", 0)
			s.hold()
			ask(gateway, "1", "right")
			ask(gateway, "2", "right")
			time.Sleep(45 * time.Second)
			for range 2 {
				message, err := gatewaytest.ServerToAgent(gateway.Next())
				require.NoError(t, err)
				require.Contains(t, string(message.GetCustomMessage().GetData()), "503")
			}
		}, verified, places(1))
	})

	t.Run("in a chain of two", func(t *testing.T) {
		playUntried(t, func(t *testing.T, s *stage) {
			s.deaf()
			s.judge(onlyKey("right"))
			lower := startRunning(t, s.net, gatewayAddress, "localhost:4330", func(cfg *Config) {
				cfg.Server.Headers.Set("Authorization", "right")
			})
			alice := lower.door.Connect(t, "alice", "Authorization", "right")
			s.server.WantFrame(alice.UID, alice.Say(1))
			lower.door.WantRefused(t, "mallory", http.StatusUnauthorized, "Authorization", "wrong")
			require.Empty(t, lower.logged(zap.WarnLevel, "cannot be asked"))
			require.False(t, lower.pool.verifies(lower.pool.target.Load()), "the gateway above answers questions")
		})
	})
}

// TestAuto asks, and verifies where the server turns out not to know questions; those that have waited are verified, too.
func TestAuto(t *testing.T) {
	auto := "from now on each agent is verified"
	back := "from now on it is asked"
	playUntried(t, func(t *testing.T, s *stage) {
		s.judge(onlyKey("right"))
		s.server.OnConnect((*gatewaytest.Question).Silence)
		require.Equal(t, "auto: ask", s.shown().Gateway.Admission)
		alice, bob, mallory := s.knock("alice", "Authorization", "right"), s.knock("bob", "Authorization", "right"), s.knock("mallory")
		question := s.server.WantQuestion()
		time.Sleep(time.Second)
		question.Link.Push(gatewaytest.Frame(&protobufs.ServerToAgent{CustomCapabilities: &protobufs.CustomCapabilities{}}))
		s.wantLetIn(alice)
		s.wantLetIn(bob)
		require.Equal(t, http.StatusUnauthorized, (<-mallory).StatusCode)
		require.Len(t, s.visits(), 3)
		require.Equal(t, "auto: verify", s.shown().Gateway.Admission)
		require.Empty(t, s.shown().Problems)

		known := len(s.server.Questions())
		for i := range 20 {
			s.connect(fmt.Sprint("agent ", i), "Authorization", "right")
		}
		require.Len(t, s.server.Questions(), known, "this server is not asked again")
		require.Len(t, s.logged(zap.InfoLevel, auto), 1)
		require.Empty(t, s.logged(zap.WarnLevel, ""))

		// After ten minutes one question tries it, of a newcomer that does not wait for the answer.
		for tries := 1; tries <= 2; tries++ {
			time.Sleep(10*time.Minute + time.Second)
			for i := range 3 {
				begin := time.Now()
				s.connect(fmt.Sprint("late ", tries, i), "Authorization", "right")
				require.Zero(t, time.Since(begin))
			}
			require.Len(t, s.server.Questions(), known+tries)
			require.Len(t, s.logged(zap.InfoLevel, auto), 1)
			time.Sleep(time.Minute)
		}
		// The server has become another.
		s.server.OnConnect((*gatewaytest.Question).Accept)
		time.Sleep(10*time.Minute + time.Second)
		s.connect("cathy", "Authorization", "right")
		synctest.Wait()
		require.Len(t, s.logged(zap.InfoLevel, back), 1)
		visits := len(s.visits())
		s.connect("dave", "Authorization", "right")
		require.Len(t, s.visits(), visits, "dave was verified")
		require.Equal(t, "auto: ask", s.shown().Gateway.Admission)
		s.wantAdmissions(telemetry.OutcomeCannotAsk, 0)
	}, withPage, connections(1))

	t.Run("a server that says nothing", func(t *testing.T) {
		playUntried(t, func(t *testing.T, s *stage) {
			s.server.OnConnect((*gatewaytest.Question).Silence)
			knocks := []<-chan answer{s.knock("alice"), s.knock("bob")}
			for _, knock := range knocks {
				a := <-knock
				require.NotNil(t, a.agent)
				require.LessOrEqual(t, a.took, 6*time.Second)
			}
			s.connect("cathy")
			require.Len(t, s.server.Questions(), 2)
			require.Len(t, s.logged(zap.InfoLevel, auto), 1)
			// A late answer shows that it was only slow.
			s.server.OnConnect((*gatewaytest.Question).Accept)
			s.server.WantQuestion().Accept()
			synctest.Wait()
			require.Len(t, s.logged(zap.InfoLevel, back), 1)
			s.connect("dave")
			require.Len(t, s.server.Questions(), 3)
		})
	})

	t.Run("a server that has answered is waited for", func(t *testing.T) {
		play(t, func(t *testing.T, s *stage) {
			s.server.OnConnect((*gatewaytest.Question).Silence)
			require.Equal(t, 40*time.Second, s.wantTurnedAway(s.knock("alice")).took)
			require.Empty(t, s.visits())
		})
	})

	t.Run("a server that ends the link", func(t *testing.T) {
		playUntried(t, func(t *testing.T, s *stage) {
			endAtQuestion(s)
			s.wantLetIn(s.knock("alice"))
			require.Len(t, s.server.Questions(), 2)
			for range 3 {
				time.Sleep(20 * time.Minute)
				s.connect("bob").SayGoodbye()
			}
			require.Len(t, s.server.Questions(), 2, "it was made to crash again")
			require.Len(t, s.logged(zap.InfoLevel, auto), 1)

			// It is restarted, and states that it knows questions: it is tried once.
			s.server.State("com.bindplane.opamp-gateway")
			cathy := s.introduce("cathy")
			s.linkOf(cathy).Send(&protobufs.ServerToAgent{InstanceUid: cathy.UID})
			cathy.Next()
			s.connect("dave").SayGoodbye()
			synctest.Wait()
			require.Len(t, s.server.Questions(), 3)
			for range 3 {
				time.Sleep(20 * time.Minute)
				s.connect("bob").SayGoodbye()
			}
			require.LessOrEqual(t, len(s.server.Questions()), 4)
		})
	})

	t.Run("a link that is lost", func(t *testing.T) {
		playUntried(t, func(t *testing.T, s *stage) {
			s.deaf()
			alice := s.introduce("alice")
			visits, questions := len(s.visits()), len(s.server.Questions())
			s.linkOf(alice).Reset()
			for { // it has heard of the server's capabilities, too
				if m, err := gatewaytest.ServerToAgent(alice.Next()); err == nil && m.GetFlags() != 0 {
					break
				}
			}
			require.Len(t, s.visits(), visits)
			require.Len(t, s.server.Questions(), questions)
		})
	})

	t.Run("another server, which cannot be asked", func(t *testing.T) {
		play(t, func(t *testing.T, s *stage) {
			alice := s.introduce("alice")
			require.Empty(t, s.visits())
			s.deaf()
			s.reload(func(cfg *Config) { cfg.Server.Endpoint += "/other" })
			for {
				if m, err := gatewaytest.ServerToAgent(alice.Next()); err == nil && m.GetFlags() != 0 {
					break
				}
			}
			require.Len(t, s.visits(), 1, "it has not decided on alice yet")
		})
	})

	t.Run("a mode that a reload brings", func(t *testing.T) {
		playUntried(t, func(t *testing.T, s *stage) {
			s.deaf()
			alice := s.introduce("alice")
			s.reload(asked)
			_, _ = alice.WantEnd(10 * time.Second)
			s.server.WantLinks(3)
			s.wantTurnedAway(s.knock("alice"))
			s.reload(verified)
			s.server.WantLinks(3)
			s.connect("alice")
		})
	})
}
