package opampgateway

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/open-telemetry/opamp-go/protobufs"
	"github.com/stretchr/testify/require"
	"go.uber.org/zap"
	"google.golang.org/protobuf/proto"

	"github.com/opampgateway/opampgateway/internal/gatewaytest"
	"github.com/opampgateway/opampgateway/internal/telemetry"
)

// TestQuestion looks at what the server is asked about an agent.
func TestQuestion(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		alice := s.connect("alice", "Authorization", "Secret-Key 123", "User-Agent", "some agent/1.0")
		question := s.server.WantQuestion()
		require.EqualValues(t, 0, question.Frame[0], "header")
		custom := question.Message.GetCustomMessage()
		require.Equal(t, "com.bindplane.opamp-gateway", custom.GetCapability())
		require.Equal(t, "connect", custom.GetType())
		require.True(t, proto.Equal(&protobufs.AgentToServer{CustomMessage: custom}, question.Message), "nothing but the custom message")

		var body map[string]json.RawMessage
		require.NoError(t, json.Unmarshal(custom.GetData(), &body))
		require.Equal(t, []string{"headers", "remote_address", "request_uid"}, sortedKeys(body))
		require.NotEmpty(t, question.RequestUID)
		require.Equal(t, alice.LocalAddr(), question.RemoteAddress)
		require.Equal(t, []string{"Secret-Key 123"}, question.Headers["Authorization"])
		require.Equal(t, []string{"some agent/1.0"}, question.Headers["User-Agent"])
		require.Equal(t, []string{"alice"}, question.Headers[gatewaytest.NameHeader])

		require.Same(t, question.Link, s.server.WantFrame(alice.UID, alice.Say(1)), "the link that carries the agent's messages is the one that was asked on")

		s.connect("bob")
		require.NotEqual(t, question.RequestUID, s.server.WantQuestion().RequestUID)
		s.wantAdmissions(telemetry.OutcomeAccepted, 2)
	})
}

// TestRefusal has refusals reach the agent as the server means them.
func TestRefusal(t *testing.T) {
	for _, test := range []struct {
		name    string
		status  int
		headers map[string]string
		want    int
		wantNot []string
	}{
		{"bad key", 401, nil, 401, nil},
		{"bad key, with a challenge", 401, map[string]string{"WWW-Authenticate": `Secret-Key realm="opamp"`}, 401, nil},
		{"forbidden", 403, nil, 403, nil},
		{"agent too old", 426, map[string]string{"Upgrade": "OpAMP/v0.9.0"}, 426, nil},
		{"too many", 429, map[string]string{"Retry-After": "77"}, 429, nil},
		{"overload", 503, map[string]string{"Retry-After": "Wed, 21 Oct 2065 07:28:00 GMT"}, 503, nil},
		{"of its own kind", 499, map[string]string{"X-Reason": "because"}, 499, nil},
		{"no status", 0, nil, 401, nil},
		{"nonsense: 42", 42, nil, 401, nil},
		{"nonsense: 101", 101, nil, 401, nil},
		{"nonsense: 200", 200, nil, 401, nil},
		{"elsewhere", 307, map[string]string{"Location": "ws://elsewhere"}, 307, nil},
		{"nonsense: 302, to nowhere", 302, nil, 401, nil},
		{"nonsense: 304", 304, map[string]string{"Location": "ws://elsewhere"}, 401, []string{"Location"}},
		{"nonsense: 600", 600, nil, 401, nil},
		{"nonsense: 99999", 99999, nil, 401, nil},
		{"nonsense: -1", -1, nil, 401, nil},
		{"headers of the connection", 403, map[string]string{
			"Content-Length": "100000", "Transfer-Encoding": "chunked", "Connection": "close", "Keep-Alive": "timeout=9",
			"Upgrade": "h2c", "Trailer": "X", "Bad Name": "x", "X-Bad-Value": "a\r\nSet-Cookie: b",
		}, 403, []string{"Keep-Alive", "Upgrade", "Trailer", "Bad Name", "X-Bad-Value", "Set-Cookie"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			play(t, func(t *testing.T, s *stage) {
				s.server.OnConnect(func(q *gatewaytest.Question) {
					q.Answer(gatewaytest.Verdict{Status: test.status, Headers: test.headers})
				})
				answer := <-s.knock("alice")
				require.NoError(t, ignore(answer.err))
				require.Nil(t, answer.agent)
				require.Equal(t, test.want, answer.StatusCode)
				for name, value := range test.headers {
					if test.wantNot == nil {
						require.Equal(t, value, answer.Header.Get(name), name)
					}
				}
				for _, name := range test.wantNot {
					require.Empty(t, answer.Header.Get(name), name)
				}
				if test.wantNot != nil {
					body, err := io.ReadAll(answer.Body)
					require.NoError(t, err, "the body is as long as it should be")
					require.NotEmpty(t, body)
				}
				s.wantAdmissions(telemetry.OutcomeRefused, 1)
			})
		})
	}

	t.Run("answers that cannot be read", func(t *testing.T) {
		play(t, func(t *testing.T, s *stage) {
			for i, body := range []string{
				`{"request_uid": %q}`,
				`{"request_uid": %q, "accept": "yes"}`,
				`{"request_uid": %q, "accept": true, "response_headers": []}`,
				`{"request_uid": %q, "accept": true, "http_status_code": "200"}`,
			} {
				s.server.OnConnect(func(q *gatewaytest.Question) {
					q.Link.Push(gatewaytest.Frame(&protobufs.ServerToAgent{CustomMessage: &protobufs.CustomMessage{
						Capability: gatewaytest.GatewayCapability, Type: gatewaytest.ConnectResultType,
						Data: fmt.Appendf(nil, body, q.RequestUID),
					}}))
				})
				s.door.WantRefused(t, fmt.Sprint("agent ", i), http.StatusUnauthorized)
			}
		})
	})
}

// ignore takes the error of a handshake that was answered otherwise than granted.
func ignore(err error) error {
	if err != nil && strings.Contains(err.Error(), "bad handshake") {
		return nil
	}
	return err
}

// TestAnswersInAnyOrder answers many questions in the wrong order, again and again, late, and
// some that were never asked.
func TestAnswersInAnyOrder(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		s.server.OnConnect((*gatewaytest.Question).Silence)
		const n = 30
		var knocks []<-chan answer
		for i := range n {
			knocks = append(knocks, s.knock(fmt.Sprint("agent ", i)))
		}
		synctest.Wait()
		questions := s.server.Questions()
		require.Len(t, questions, n)
		strays := 0
		for i, q := range slices.Backward(questions) {
			if i%3 == 0 {
				q.Refuse(http.StatusTooManyRequests, "Retry-After", fmt.Sprint(100+i))
			} else {
				q.Accept()
			}
		}
		for _, q := range questions {
			for range 200 / n {
				q.Accept() // too late for the refused
				q.Refuse(http.StatusForbidden)
				strays += 2
			}
		}
		for range 200 {
			questions[0].Accept()
			strays++
		}
		byName := map[string]*gatewaytest.Question{}
		for _, q := range questions {
			byName[q.Who()] = q
		}
		require.Len(t, byName, n)
		for _, knock := range knocks {
			answer := <-knock
			i := slices.Index(questions, byName[answer.name])
			if i%3 != 0 {
				require.NotNil(t, answer.agent, "%s was not let in", answer.name)
				s.server.WantFrame(answer.agent.UID, answer.agent.Say(1))
				continue
			}
			require.Nil(t, answer.agent)
			require.Equal(t, http.StatusTooManyRequests, answer.StatusCode)
			require.Equal(t, fmt.Sprint(100+i), answer.Header.Get("Retry-After"), "it got somebody else's answer")
		}
		links := s.server.WantLinks(3)
		for _, link := range links {
			link.Send(gatewaytest.ConnectResult("nobody asked", gatewaytest.Verdict{Accept: true}))
			strays++
		}
		// What was asked on one link is not answered on another.
		knock := s.knock("bob")
		synctest.Wait()
		question := s.server.Questions()[n]
		for _, link := range links {
			if link != question.Link {
				link.Send(gatewaytest.ConnectResult(question.RequestUID, gatewaytest.Verdict{Accept: true}))
				strays++
			}
		}
		synctest.Wait()
		require.Empty(t, knock)
		question.Accept()
		s.wantLetIn(knock)
		s.wantFaults(map[telemetry.Reason]int{telemetry.ReasonServerStray: strays})
	})
}

// TestAgentHangsUp has agents hang up while they wait to be let in.
func TestAgentHangsUp(t *testing.T) {
	hangUp := func(s *stage, n int) {
		s.t.Helper()
		for i := range n {
			ctx, cancel := context.WithCancel(s.t.Context())
			knock := s.knockContext(ctx, fmt.Sprint("agent ", i))
			time.Sleep(time.Second)
			synctest.Wait()
			cancel()
			require.Error(s.t, (<-knock).err)
		}
		s.wantAdmissions(telemetry.OutcomeAbandoned, n)
		s.wantConsistent()
		s.wantNobody()
	}

	t.Run("while the server thinks", func(t *testing.T) {
		play(t, func(t *testing.T, s *stage) {
			s.server.OnConnect((*gatewaytest.Question).Silence)
			hangUp(s, 20)
			questions := s.server.Questions()
			require.Len(t, questions, 20)
			for _, q := range questions {
				q.Accept()
			}
			s.wantFault(telemetry.ReasonServerStray, 0) // they were asked
			s.wantNobody()
		})
	})

	t.Run("while there is no link", func(t *testing.T) {
		playWithout(t, func(t *testing.T, s *stage) {
			s.start()
			hangUp(s, 5)
		})
	})

	t.Run("while others are asked about", func(t *testing.T) {
		play(t, func(t *testing.T, s *stage) {
			s.server.OnConnect((*gatewaytest.Question).Silence)
			var knocks []<-chan answer
			for i := range newcomersOfOneAddress {
				knocks = append(knocks, s.knock(fmt.Sprint("other ", i)))
			}
			synctest.Wait()
			ctx, cancel := context.WithCancel(t.Context())
			knock := s.knockContext(ctx, "agent")
			synctest.Wait()
			require.Len(t, s.server.Questions(), newcomersOfOneAddress)
			cancel()
			require.Error(t, (<-knock).err)
			s.wantAdmissions(telemetry.OutcomeAbandoned, 1)
			for _, q := range s.server.Questions() {
				q.Accept()
			}
			for _, knock := range knocks {
				s.wantLetIn(knock)
			}
			require.Len(t, s.server.Questions(), newcomersOfOneAddress, "nobody is asked about who has gone")
		}, connections(1))
	})

	t.Run("while the server does not read", func(t *testing.T) {
		play(t, func(t *testing.T, s *stage) {
			bob := s.introduce("bob")
			link := s.server.WantLinks(1)[0]
			link.StopReading()
			for sequence := range 3 {
				bob.Send(gatewaytest.Report(bob.UID, sequence, gatewaytest.BufferSize))
			}
			synctest.Wait()
			ctx, cancel := context.WithCancel(t.Context())
			knock := s.knockContext(ctx, "alice")
			time.Sleep(time.Second)
			cancel()
			require.Error(t, (<-knock).err)
			synctest.Wait()
			link.ReadOn()
			for range 3 {
				s.server.Next(bob.UID)
			}
			require.Len(t, s.server.Questions(), 1, "nobody is asked about who has gone")
		}, connections(1))
	})
}

// connections returns a change of the configuration to so many links.
func connections(n int) func(*Config) { return func(cfg *Config) { cfg.Server.Connections = n } }

// TestNoLink has agents come while there is no link to the server.
func TestNoLink(t *testing.T) {
	t.Run("for long", func(t *testing.T) {
		playWithout(t, func(t *testing.T, s *stage) {
			s.start()
			answer := s.wantTurnedAway(s.knock("alice"))
			require.Equal(t, 8*time.Second, answer.took)
			s.wantAdmissions(telemetry.OutcomeNoLink, 1)
		})
	})

	t.Run("for a moment", func(t *testing.T) {
		playWithout(t, func(t *testing.T, s *stage) {
			s.start()
			knock := s.knock("alice")
			time.Sleep(4 * time.Second)
			s.server.Start()
			alice := s.wantLetIn(knock)
			s.server.WantFrame(alice.UID, alice.Say(1))
		})
	})
}

// TestLinkLostWhileAsking has the server fall silent about an agent, and then lose the link.
func TestLinkLostWhileAsking(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		s.server.OnConnect((*gatewaytest.Question).Silence)
		knock := s.knock("alice")
		first := s.server.WantQuestion()
		time.Sleep(35 * time.Second)
		first.Link.Reset()
		second := s.server.WantQuestion()
		require.NotSame(t, first.Link, second.Link)
		require.Equal(t, first.Headers, second.Headers)
		require.NotEqual(t, first.RequestUID, second.RequestUID)
		require.Zero(t, time.Since(first.At)-35*time.Second, "at once")
		second.Accept()
		alice := s.wantLetIn(knock)
		require.Same(t, second.Link, s.server.WantFrame(alice.UID, alice.Say(1)))
	})

	t.Run("within the agent's time", func(t *testing.T) {
		play(t, func(t *testing.T, s *stage) {
			s.server.OnConnect((*gatewaytest.Question).Silence)
			knock := s.knock("alice")
			time.Sleep(35 * time.Second)
			s.server.Stop()
			time.Sleep(time.Second)
			s.server.Start()
			require.Equal(t, 40*time.Second, s.wantTurnedAway(knock).took)
		})
	})
}

// TestNoAnswer has the server not answer.
func TestNoAnswer(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		s.server.OnConnect((*gatewaytest.Question).Silence)
		require.Equal(t, 40*time.Second, s.wantTurnedAway(s.knock("alice")).took)
		s.wantAdmissions(telemetry.OutcomeNoAnswer, 1)
	})

	t.Run("in a time of one's own choice", func(t *testing.T) {
		play(t, func(t *testing.T, s *stage) {
			s.server.OnConnect((*gatewaytest.Question).Silence)
			require.Equal(t, 5*time.Second, s.wantTurnedAway(s.knock("alice")).took)
		}, func(cfg *Config) { cfg.Server.AdmissionTimeout = 5 * time.Second })
	})
}

// TestLateRefusal has the server take longer than the listener's write timeout, which counts
// from the request.
func TestLateRefusal(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		s.server.OnConnect((*gatewaytest.Question).Silence)
		for _, late := range []time.Duration{20 * time.Second, 39 * time.Second} {
			knock := s.knock("alice")
			question := s.server.WantQuestion()
			time.Sleep(late)
			question.Refuse(http.StatusForbidden, "X-Late", "yes")
			answer := <-knock
			require.NotNil(t, answer.Response, "no answer: %v", answer.err)
			require.Equal(t, http.StatusForbidden, answer.StatusCode)
			require.Equal(t, "yes", answer.Header.Get("X-Late"))
		}
		knock := s.knock("alice")
		question := s.server.WantQuestion()
		time.Sleep(39 * time.Second)
		question.Accept()
		alice := s.wantLetIn(knock)
		time.Sleep(time.Minute)
		s.server.WantFrame(alice.UID, alice.Say(1))
	}, func(cfg *Config) { cfg.Listener.WriteTimeout = 10 * time.Second })
}

// TestServerCannotBeAsked has a server that does not know the gateway capability.
func TestServerCannotBeAsked(t *testing.T) {
	for name, reply := range map[string]*protobufs.ServerToAgent{
		"opamp-go without custom capabilities": {CustomCapabilities: &protobufs.CustomCapabilities{}},
		"opamp-go with others":                 {CustomCapabilities: &protobufs.CustomCapabilities{Capabilities: []string{"com.example"}}, Capabilities: 7},
		"one that calls it an error":           {ErrorResponse: &protobufs.ServerErrorResponse{Type: protobufs.ServerErrorResponseType_ServerErrorResponseType_BadRequest}},
	} {
		t.Run(name, func(t *testing.T) {
			playUntried(t, func(t *testing.T, s *stage) {
				s.server.OnConnect((*gatewaytest.Question).Silence)
				first, second := s.knock("alice"), s.knock("bob")
				question := s.server.WantQuestion()
				s.server.WantQuestion()
				time.Sleep(time.Second)
				question.Link.Push(gatewaytest.Frame(reply))
				question.Link.Push(gatewaytest.Frame(reply)) // each gets one
				for _, knock := range []<-chan answer{first, second} {
					require.Equal(t, 2*time.Second, s.wantTurnedAway(knock).took) // the second is asked when nothing came of the first
				}
				for range 20 {
					require.Zero(t, s.wantTurnedAway(s.knock("cathy")).took)
				}
				require.Len(t, s.server.Questions(), 2, "this server is not asked again")
				s.wantAdmissions(telemetry.OutcomeCannotAsk, 22)
				require.Len(t, s.logged(zap.WarnLevel, "server::agent_admission"), 1)
				require.Contains(t, s.logged(zap.WarnLevel, "")[0].Message, "com.bindplane.opamp-gateway")

				// Another server may take its place.
				s.server.OnConnect((*gatewaytest.Question).Accept)
				question.Link.Close(1000)
				question.Link.WantClosed(1000)
				s.server.WantLinks(1)
				s.wantTurnedAway(s.knock("alice"))
				time.Sleep(10 * time.Minute)
				alice := s.connect("alice")
				s.server.WantFrame(alice.UID, alice.Say(1))
			}, connections(1), asked)
		})
	}

	t.Run("but one that has answered can", func(t *testing.T) {
		play(t, func(t *testing.T, s *stage) {
			s.connect("alice")
			s.server.WantQuestion()
			s.server.OnConnect((*gatewaytest.Question).Silence)
			knock := s.knock("bob")
			question := s.server.WantQuestion()
			question.Link.Push(gatewaytest.Frame(&protobufs.ServerToAgent{CustomCapabilities: &protobufs.CustomCapabilities{}}))
			question.Link.Push([]byte{0})
			time.Sleep(time.Second)
			question.Accept()
			s.wantLetIn(knock)
			require.Empty(t, s.logged(zap.WarnLevel, ""))
		}, connections(1))
	})
}

// TestAdmissionAccept lets every agent in without a question.
func TestAdmissionAccept(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		alice := s.introduce("alice")
		link := s.linkOf(alice)
		link.Push(gatewaytest.Offer(alice.UID, "x", 10))
		alice.WantFrame(gatewaytest.Offer(alice.UID, "x", 10))
		require.Empty(t, s.server.Questions())
		s.wantAdmissions(telemetry.OutcomeAccepted, 1)

		link.Reset()
		alice.WantFullStateRequest()
		s.server.WantFrame(alice.UID, alice.Say(2))
		require.Empty(t, s.server.Questions())
	}, func(cfg *Config) { cfg.Server.AgentAdmission = AdmissionAccept })
}

// TestUnavailable has the server ask to be left alone for a while.
func TestUnavailable(t *testing.T) {
	unavailable := func(after time.Duration) []byte {
		return gatewaytest.Frame(&protobufs.ServerToAgent{ErrorResponse: &protobufs.ServerErrorResponse{
			Type:    protobufs.ServerErrorResponseType_ServerErrorResponseType_Unavailable,
			Details: &protobufs.ServerErrorResponse_RetryInfo{RetryInfo: &protobufs.RetryInfo{RetryAfterNanoseconds: uint64(after)}},
		}})
	}
	play(t, func(t *testing.T, s *stage) {
		alice := s.introduce("alice")
		link := s.linkOf(alice)
		link.Push(unavailable(20 * time.Second))
		synctest.Wait()
		start, asked := time.Now(), len(s.server.Questions())
		knock := s.knock("bob")
		time.Sleep(19 * time.Second)
		require.Len(t, s.server.Questions(), asked)
		s.server.WantFrame(alice.UID, alice.Say(1)) // others go on
		s.wantLetIn(knock)
		require.Equal(t, 20*time.Second, time.Since(start))

		// What would take longer than agents wait.
		link.Push(unavailable(time.Hour))
		synctest.Wait()
		require.Equal(t, 40*time.Second, s.wantTurnedAway(s.knock("cathy")).took)
		s.wantFaults(nil)
	}, connections(1))

	t.Run("on a link that is lost", func(t *testing.T) {
		play(t, func(t *testing.T, s *stage) {
			link := s.linkOf(s.introduce("alice"))
			link.Push(unavailable(time.Hour))
			synctest.Wait()
			knock := s.knock("bob")
			time.Sleep(5 * time.Second)
			start := time.Now()
			link.Reset()
			s.wantLetIn(knock)
			require.Less(t, time.Since(start), time.Second, "the next link takes questions")
		}, connections(1))
	})

	t.Run("on one link of several", func(t *testing.T) {
		play(t, func(t *testing.T, s *stage) {
			links := s.server.WantLinks(3)
			links[0].Push(unavailable(20 * time.Second))
			links[1].Push(unavailable(20 * time.Second))
			synctest.Wait()
			var knocks []<-chan answer
			for i := range 6 {
				knocks = append(knocks, s.knock(fmt.Sprint("agent ", i)))
			}
			synctest.Wait()
			require.Len(t, s.server.Questions(), 2)
			for _, knock := range knocks {
				s.wantLetIn(knock)
			}
		})
	})
}

// TestQuestionsInFlight has many agents come while the server takes its time.
func TestQuestionsInFlight(t *testing.T) {
	const n = 500
	play(t, func(t *testing.T, s *stage) {
		s.server.OnConnect((*gatewaytest.Question).Silence)
		var knocks []<-chan answer
		for i := range n {
			knocks = append(knocks, s.knock(fmt.Sprint("agent ", i)))
		}
		answered := 0
		for answered < n {
			synctest.Wait()
			questions := s.server.Questions()
			require.Len(t, questions, min(n, answered+newcomersOfOneAddress))
			next := questions[answered:]
			for _, q := range next[:min(len(next), 100)] {
				q.Accept()
				answered++
			}
		}
		for _, knock := range knocks {
			s.wantLetIn(knock)
		}
	}, connections(1))
}

// TestTooManyConnections turns away those who come when as many are connected as may be.
func TestTooManyConnections(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		alice := s.connect("alice")
		asked := len(s.server.Questions())
		require.Zero(t, s.wantTurnedAway(s.knock("bob")).took)
		s.wantAdmissions(telemetry.OutcomeTooMany, 1)
		require.Len(t, s.server.Questions(), asked, "nobody was asked")
		alice.SayGoodbye()
		synctest.Wait()
		s.connect("bob")
	}, func(cfg *Config) { cfg.Agents.MaxConnections = 1 })
}

// newcomersOfOneAddress is about how many of one address a server is asked at once on one link.
const newcomersOfOneAddress = 128

// TestNoUpgrade refuses what is no upgrade request without troubling the server.
func TestNoUpgrade(t *testing.T) {
	const upgrade = "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
	const version = "Sec-WebSocket-Version: 13\r\n"
	for name, test := range map[string]struct {
		request string
		status  int
	}{
		"plain GET":            {"GET /v1/opamp HTTP/1.1\r\nHost: gateway\r\n\r\n", http.StatusUpgradeRequired},
		"plain POST":           {"POST /v1/opamp HTTP/1.1\r\nHost: gateway\r\nContent-Type: application/x-protobuf\r\nContent-Length: 2\r\n\r\nhi", http.StatusBadRequest},
		"POST with an upgrade": {"POST /v1/opamp HTTP/1.1\r\nHost: gateway\r\n" + upgrade + version + "\r\n", http.StatusUpgradeRequired},
		"old WebSocket":        {"GET / HTTP/1.1\r\nHost: gateway\r\n" + upgrade + "Sec-WebSocket-Version: 8\r\n\r\n", http.StatusBadRequest},
		"foreign origin":       {"GET / HTTP/1.1\r\nHost: gateway\r\nOrigin: https://evil.example\r\n" + upgrade + version + "\r\n", http.StatusForbidden},
		"its own origin":       {"GET / HTTP/1.1\r\nHost: gateway\r\nOrigin: http://gateway\r\n" + upgrade + version + "\r\n", http.StatusForbidden},
		"strange origin":       {"GET / HTTP/1.1\r\nHost: gateway\r\nOrigin: ://\r\n" + upgrade + version + "\r\n", http.StatusForbidden},
		"no key":               {"GET / HTTP/1.1\r\nHost: gateway\r\n" + strings.Replace(upgrade, "Key", "Kei", 1) + version + "\r\n", http.StatusBadRequest},
		"big headers":          {"GET / HTTP/1.1\r\nHost: gateway\r\nX-Big: " + strings.Repeat("x", 40<<10) + "\r\n" + upgrade + version + "\r\n", http.StatusRequestHeaderFieldsTooLarge},
	} {
		t.Run(name, func(t *testing.T) {
			play(t, func(t *testing.T, s *stage) {
				conn, err := s.net.Dial(t.Context(), "tcp", gatewayAddress)
				require.NoError(t, err)
				defer conn.Close()
				_, err = io.WriteString(conn, test.request)
				require.NoError(t, err)
				resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
				require.NoError(t, err)
				require.Equal(t, test.status, resp.StatusCode)
				require.Empty(t, s.server.Questions())
			})
		})
	}

	t.Run("but any path is fine", func(t *testing.T) {
		play(t, func(t *testing.T, s *stage) {
			for _, path := range []string{"", "/", "/v1/opamp", "/some/other?x=y"} {
				s.door.URL = "ws://" + gatewayAddress + path
				s.introduce("bob").SayGoodbye()
				s.server.Next(gatewaytest.UID("bob"))
			}
			s.connect("cathy", "X-Big", strings.Repeat("x", 15<<10))
		})
	})
}
