package opampgateway

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gorilla/websocket"
	"github.com/open-telemetry/opamp-go/protobufs"
	"github.com/stretchr/testify/require"
	"go.uber.org/zap"

	"github.com/opampgateway/opampgateway/internal/gatewaytest"
	"github.com/opampgateway/opampgateway/internal/telemetry"
)

// below has a gateway connect, of which this is link n.
func (s *stage) below(name string, n int) *gatewaytest.Agent {
	s.t.Helper()
	return s.connect(name, gatewaytest.ConnectionIDHeader, fmt.Sprint("upstream-", n))
}

// ask has a gateway ask about an agent that shows this key.
func ask(gateway *gatewaytest.Agent, requestUID, key string) {
	gateway.Send(gatewaytest.Connect(requestUID, "192.0.2.1:1234", http.Header{"Authorization": {key}}))
}

// wantVerdict checks that what comes next is the verdict on what was asked under requestUID.
func wantVerdict(t *testing.T, gateway *gatewaytest.Agent, requestUID string, accept bool, status int) map[string]string {
	t.Helper()
	message, err := gatewaytest.ServerToAgent(gateway.Next())
	require.NoError(t, err)
	require.Equal(t, gatewaytest.ConnectResultType, message.GetCustomMessage().GetType(), "%v", message)
	var got struct {
		RequestUID string            `json:"request_uid"`
		Accept     bool              `json:"accept"`
		Status     int               `json:"http_status_code"`
		Headers    map[string]string `json:"response_headers"`
	}
	require.NoError(t, json.Unmarshal(message.GetCustomMessage().GetData(), &got))
	require.Equal(t, requestUID, got.RequestUID)
	require.Equal(t, accept, got.Accept)
	require.Equal(t, status, got.Status)
	return got.Headers
}

// unavailable is how a server asks to be left alone.
func unavailable(after time.Duration) []byte {
	return gatewaytest.Frame(&protobufs.ServerToAgent{ErrorResponse: &protobufs.ServerErrorResponse{
		Type:    protobufs.ServerErrorResponseType_ServerErrorResponseType_Unavailable,
		Details: &protobufs.ServerErrorResponse_RetryInfo{RetryInfo: &protobufs.RetryInfo{RetryAfterNanoseconds: uint64(after)}},
	}})
}

// TestGatewaysAreNotLetIn unless they are expected; whoever runs them hears what to set.
func TestGatewaysAreNotLetIn(t *testing.T) {
	for _, admission := range []AgentAdmission{AdmissionAsk, AdmissionAccept} {
		t.Run(string(admission), func(t *testing.T) {
			play(t, func(t *testing.T, s *stage) {
				s.door.WantRefused(t, "gateway", http.StatusForbidden, gatewaytest.ConnectionIDHeader, "upstream-0")
				s.wantAdmissions(telemetry.OutcomeNoGateways, 1)
				require.Empty(t, s.server.Questions())
				told := s.logged(zap.WarnLevel, "agents::allow_gateways")
				require.Len(t, told, 1)
				require.Equal(t, "10.0.0.1", told[0].ContextMap()["client.address"])
				s.introduce("alice")
			}, func(cfg *Config) {
				cfg.Agents.AllowGateways = createDefaultConfig().(*Config).Agents.AllowGateways
				cfg.Server.AgentAdmission = admission
			})
		})
	}
}

// TestNobodyIsAskedWhereAllAreAccepted has a gateway try out keys where nobody vouches for it.
func TestNobodyIsAskedWhereAllAreAccepted(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		mallory, bob := s.below("mallory", 0), s.introduce("bob")
		begin := time.Now()
		for range 10 {
			ask(mallory, "1", "a guess")
		}
		s.wantFaults(map[telemetry.Reason]int{telemetry.ReasonForeignConnect: 1})
		_, err := mallory.WantEnd(20 * time.Second)
		require.True(t, websocket.IsCloseError(err, websocket.ClosePolicyViolation), err)
		require.GreaterOrEqual(t, time.Since(begin), 5*time.Second)
		require.Empty(t, s.server.Questions())
		mallory.WantNothing()
		s.server.WantFrame(bob.UID, bob.Say(1))
	}, func(cfg *Config) { cfg.Server.AgentAdmission = AdmissionAccept })
}

// TestRequestUID bounds how long a gateway's request_uid may be; none may be in use twice.
func TestRequestUID(t *testing.T) {
	t.Run("of 128 bytes", func(t *testing.T) {
		play(t, func(t *testing.T, s *stage) {
			gateway, uid := s.below("gateway", 0), strings.Repeat("u", 128)
			ask(gateway, uid, "right")
			wantVerdict(t, gateway, uid, true, 200)
			s.wantFaults(nil)
		})
	})

	for name, uid := range map[string]string{"of 129 bytes": strings.Repeat("u", 129), "of 1 MB": strings.Repeat("u", 1_000_000)} {
		t.Run(name, func(t *testing.T) {
			play(t, func(t *testing.T, s *stage) {
				gateway := s.below("gateway", 0)
				for range maxBadInRow - 1 {
					ask(gateway, uid, "right")
					wantBadRequest(t, gateway, nil)
				}
				s.wantFaults(map[telemetry.Reason]int{telemetry.ReasonBadConnect: maxBadInRow - 1})
				require.Len(t, s.server.Questions(), 1, "that about the gateway itself")
				require.Zero(t, s.memory.Requests.Held())
				ask(gateway, "1", "right")
				wantVerdict(t, gateway, "1", true, 200)
			})
		})
	}

	t.Run("in use by another gateway", func(t *testing.T) {
		play(t, func(t *testing.T, s *stage) {
			one, two := s.below("one", 0), s.below("two", 0)
			s.server.WantQuestion()
			s.server.WantQuestion()
			s.server.OnConnect((*gatewaytest.Question).Silence)
			ask(one, "1", "right")
			right := s.server.WantQuestion()
			ask(two, "1", "wrong")
			wantBadRequest(t, two, nil)
			require.Len(t, s.server.Questions(), 3)
			s.wantFaults(map[telemetry.Reason]int{telemetry.ReasonBadConnect: 1})
			right.Accept()
			wantVerdict(t, one, "1", true, 200)
			ask(two, "1", "wrong") // it is free again
			s.server.WantQuestion().Refuse(http.StatusUnauthorized)
			wantVerdict(t, two, "1", false, 401)
			synctest.Wait()
			one.WantNothing()
			two.WantNothing()
		}, connections(1))
	})

	t.Run("in use by itself", func(t *testing.T) {
		play(t, func(t *testing.T, s *stage) {
			gateway := s.below("gateway", 0)
			s.server.WantQuestion()
			s.server.OnConnect((*gatewaytest.Question).Silence)
			ask(gateway, "1", "right")
			question := s.server.WantQuestion()
			ask(gateway, "1", "wrong")
			wantBadRequest(t, gateway, nil)
			question.Refuse(http.StatusUnauthorized)
			wantVerdict(t, gateway, "1", false, 401)
			synctest.Wait()
			gateway.WantNothing()
		})
	})

	t.Run("that is none of ours", func(t *testing.T) { // a gateway below cannot ask in our name
		play(t, func(t *testing.T, s *stage) {
			gateway := s.below("gateway", 0)
			s.server.WantQuestion()
			s.server.OnConnect((*gatewaytest.Question).Silence)
			knock := s.knock("alice")
			question := s.server.WantQuestion()
			ask(gateway, question.RequestUID, "right")
			wantBadRequest(t, gateway, nil)
			question.Refuse(http.StatusUnauthorized)
			require.Equal(t, http.StatusUnauthorized, (<-knock).StatusCode)
			synctest.Wait()
			gateway.WantNothing()
		}, connections(1))
	})
}

// TestRelayedQuestionsWait has a gateway's questions wait as our own do.
func TestRelayedQuestionsWait(t *testing.T) {
	t.Run("for their turn", func(t *testing.T) {
		play(t, func(t *testing.T, s *stage) {
			gateway := s.below("gateway", 0)
			s.server.WantQuestion()
			s.server.OnConnect((*gatewaytest.Question).Silence)
			const n = 500
			for i := range n {
				ask(gateway, fmt.Sprint(i), "right")
			}
			answered := 0
			for answered < n {
				synctest.Wait()
				questions := s.server.Questions()[1:]
				require.Len(t, questions, min(n, answered+newcomersOfOneAddress))
				for _, q := range questions[answered:min(n, answered+100)] {
					q.Accept()
					wantVerdict(t, gateway, q.RequestUID, true, 200)
					answered++
				}
			}
			require.Zero(t, s.memory.Requests.Held())
			s.wantFaults(nil)
		}, connections(1))
	})

	t.Run("beside those of others", func(t *testing.T) {
		play(t, func(t *testing.T, s *stage) {
			s.comeFrom("192.0.2.66")
			gateway := s.below("gateway", 0)
			s.server.OnConnect(func(q *gatewaytest.Question) {
				if q.Headers.Get("Authorization") != "a guess" {
					q.Accept()
				}
			})
			for i := range 2000 {
				ask(gateway, fmt.Sprint(i), "a guess")
			}
			synctest.Wait()
			require.Less(t, len(s.server.Questions()), 256)
			for i := range 15 {
				s.comeFrom(fmt.Sprintf("192.0.2.%d", i))
				begin := time.Now()
				s.introduce(fmt.Sprint("honest ", i))
				require.Zero(t, time.Since(begin))
			}
		}, connections(1))
	})

	t.Run("while the server wants to be left alone", func(t *testing.T) {
		play(t, func(t *testing.T, s *stage) {
			gateway := s.below("gateway", 0)
			s.server.WantLinks(1)[0].Push(unavailable(20 * time.Second))
			synctest.Wait()
			ask(gateway, "1", "right")
			begin := time.Now()
			time.Sleep(19 * time.Second)
			require.Len(t, s.server.Questions(), 1)
			wantVerdict(t, gateway, "1", true, 200)
			require.Equal(t, 20*time.Second, time.Since(begin))
		}, connections(1))
	})

	t.Run("not for ever", func(t *testing.T) {
		play(t, func(t *testing.T, s *stage) {
			gateway := s.below("gateway", 0)
			s.server.WantLinks(1)[0].Push(unavailable(time.Hour))
			synctest.Wait()
			for i := range 100 {
				ask(gateway, fmt.Sprint(i), "right")
			}
			synctest.Wait()
			require.NotZero(t, s.memory.Requests.Held())
			time.Sleep(50 * time.Second)
			synctest.Wait()
			require.Zero(t, s.memory.Requests.Held())
			require.Len(t, s.server.Questions(), 1)
			waiting, sent := s.pool.links()[0].book.Len()
			require.Zero(t, waiting+sent)
		}, connections(1))
	})
}

// TestRelayedQuestionsTurnedAway has the gateway answer a gateway's question itself when the server cannot be asked:
// agents get a 503 at once, and not after 40 s.
func TestRelayedQuestionsTurnedAway(t *testing.T) {
	wantTurnedAway := func(t *testing.T, gateway *gatewaytest.Agent, requestUID string) {
		t.Helper()
		require.Contains(t, wantVerdict(t, gateway, requestUID, false, http.StatusServiceUnavailable), "Retry-After")
	}

	t.Run("too many wait", func(t *testing.T) {
		play(t, func(t *testing.T, s *stage) {
			gateway := s.below("gateway", 0)
			s.server.OnConnect((*gatewaytest.Question).Silence)
			const n = 20_000
			for i := range n {
				ask(gateway, fmt.Sprint(i), "right")
			}
			synctest.Wait()
			away := len(gateway.Inbox())
			require.Greater(t, away, 1000, "one address gets no more than a part of the places")
			require.Less(t, away, n-5000)
			begin := time.Now()
			wantTurnedAway(t, gateway, fmt.Sprint(n-away))
			require.Zero(t, time.Since(begin))
			gateway.WantConnected()
			require.Less(t, s.memory.Requests.Held(), int64(s.cfg.MaxBufferedSize/4))
		}, connections(1))
	})

	t.Run("too large", func(t *testing.T) {
		play(t, func(t *testing.T, s *stage) {
			gateway := s.below("gateway", 0)
			gateway.Send(gatewaytest.Connect("1", "192.0.2.1:1234", http.Header{"X-Large": {strings.Repeat("y", 65<<10)}}))
			wantTurnedAway(t, gateway, "1")
			s.wantFaults(map[telemetry.Reason]int{telemetry.ReasonBadConnect: 1})
			require.Len(t, s.server.Questions(), 1)
		})
	})
}

// TestQuestionOfHomelessGateway has a gateway ask in the moment in which its link has ended.
func TestQuestionOfHomelessGateway(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		s.server.OnConnect(func(q *gatewaytest.Question) { q.Accept(); q.Link.HangUp() })
		knock := s.knock("gateway", gatewaytest.ConnectionIDHeader, "upstream-0")
		synctest.Wait()
		s.server.OnConnect((*gatewaytest.Question).Accept)
		gateway := s.wantLetIn(knock)
		ask(gateway, "1", "right")
		time.Sleep(10 * time.Second)
		if ended, _, err := gateway.Ended(); ended { // it asks again, on its next connection
			require.True(t, websocket.IsCloseError(err, websocket.CloseServiceRestart), err)
		} else {
			wantVerdict(t, gateway, "1", true, 200)
		}
		s.wantFault(telemetry.ReasonServerStray, 0)
		require.Zero(t, s.memory.Requests.Held())
	}, connections(1))
}

// TestLargeMessageOfGateway skips what a gateway sends that is above the limit here: it is one of its
// agents' message, and the connection is everybody's.
func TestLargeMessageOfGateway(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		gateway := s.below("gateway", 0)
		alice, bob := gatewaytest.UID("alice"), gatewaytest.UID("bob")
		gateway.Send(gatewaytest.Status(bob, 1))
		s.server.WantFrame(bob, gatewaytest.Status(bob, 1))
		for i := range 2 * maxBadInRow {
			begin := time.Now()
			gateway.Send(gatewaytest.Report(alice, i, 200_000))
			gateway.Send(gatewaytest.Status(bob, 2+i))
			s.server.WantFrame(bob, gatewaytest.Status(bob, 2+i))
			require.Zero(t, time.Since(begin), "others waited")
			wantBadRequest(t, gateway, alice)
		}
		time.Sleep(time.Minute)
		gateway.WantConnected()
		s.server.WantNothing(alice)
		s.wantFaults(map[telemetry.Reason]int{telemetry.ReasonTooLarge: 2 * maxBadInRow})
	}, func(cfg *Config) { cfg.MaxMessageSize = 100_000 })
}

// TestGatewayThatMovedOn has a gateway below go to another one next to this, with its agents: they are
// not said to have left.
func TestGatewayThatMovedOn(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		alice, gateway := gatewaytest.UID("alice"), s.below("gateway", 0)
		gateway.Send(gatewaytest.Status(alice, 1))
		s.server.Next(alice)
		next := startRunning(t, s.net, serverAddress, "localhost:4399")
		time.Sleep(time.Second)
		gateway.Vanish()
		gateway = next.door.Connect(t, "gateway", gatewaytest.ConnectionIDHeader, "upstream-0")
		for sequence := range 10 {
			gateway.Send(gatewaytest.Status(alice, sequence))
			s.server.WantFrame(alice, gatewaytest.Status(alice, sequence))
			time.Sleep(15 * time.Second)
		}
		s.server.WantNothing(alice)
	})
}

// endAtQuestion has the server end the link at each question.
func endAtQuestion(s *stage) { s.server.OnConnect(func(q *gatewaytest.Question) { q.Link.HangUp() }) }

// TestServerEndsAtQuestions has a server that ends the connection when it is asked, or crashes: it is asked
// no more, so that agents hear of it at once, and it can live.
func TestServerEndsAtQuestions(t *testing.T) {
	playUntried(t, func(t *testing.T, s *stage) {
		endAtQuestion(s)
		begin := time.Now()
		s.wantTurnedAway(s.knock("alice"))
		require.LessOrEqual(t, time.Since(begin), 10*time.Second)
		require.Len(t, s.server.Questions(), 2, "it crashed again")
		told := s.logged(zap.WarnLevel, "server::agent_admission")
		require.Len(t, told, 1)
		require.Contains(t, told[0].Message, "accept")
		for range 50 {
			require.LessOrEqual(t, s.wantTurnedAway(s.knock("bob")).took, time.Second)
			time.Sleep(10 * time.Second)
		}
		require.Len(t, s.server.Questions(), 2)
		require.Len(t, s.logged(zap.WarnLevel, "server::agent_admission"), 1)
		s.wantAdmissions(telemetry.OutcomeCannotAsk, 51)

		// After ten minutes one question tries it, in vain; after ten more another.
		for tries := 3; tries <= 4; tries++ {
			time.Sleep(10 * time.Minute)
			for range 3 {
				s.wantTurnedAway(s.knock("bob"))
			}
			require.Len(t, s.server.Questions(), tries)
		}
		s.server.OnConnect((*gatewaytest.Question).Accept)
		s.wantTurnedAway(s.knock("bob"))
		time.Sleep(10 * time.Minute)
		s.introduce("bob")
		s.introduce("cathy")
	}, asked)

	t.Run("at two at once", func(t *testing.T) {
		playUntried(t, func(t *testing.T, s *stage) {
			endAtQuestion(s)
			var knocks []<-chan answer
			for i := range 9 {
				knocks = append(knocks, s.knock(fmt.Sprint("agent ", i)))
			}
			for _, knock := range knocks {
				require.LessOrEqual(t, s.wantTurnedAway(knock).took, 15*time.Second)
			}
			before := len(s.server.Questions())
			s.wantTurnedAway(s.knock("bob"))
			require.Len(t, s.server.Questions(), before)
		}, asked)
	})

	t.Run("but not one that has answered", func(t *testing.T) {
		playUntried(t, func(t *testing.T, s *stage) {
			s.introduce("alice")
			ends := 0
			s.server.OnConnect(func(q *gatewaytest.Question) {
				if q.Who() == "bob" && ends < 3 {
					ends++
					q.Link.HangUp()
					return
				}
				q.Accept()
			})
			s.wantTurnedAway(s.knock("bob")) // one question costs no more links
			require.Equal(t, 3, ends)
			time.Sleep(time.Second)
			s.wantLetIn(s.knock("bob"))
			require.Empty(t, s.logged(zap.WarnLevel, "server::agent_admission"))
		}, connections(1))
	})

	t.Run("nor one that was restarted", func(t *testing.T) {
		playUntried(t, func(t *testing.T, s *stage) {
			s.server.OnConnect((*gatewaytest.Question).Silence)
			knock := s.knock("alice")
			s.server.WantQuestion()
			s.server.Stop() // all links end, once
			s.server.OnConnect((*gatewaytest.Question).Accept)
			time.Sleep(time.Second)
			s.server.Start()
			s.wantLetIn(knock)
			s.introduce("bob")
		})
	})
}
