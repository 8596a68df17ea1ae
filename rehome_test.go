package opampgateway

import (
	"fmt"
	"net/http"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gorilla/websocket"
	"github.com/open-telemetry/opamp-go/protobufs"
	"github.com/stretchr/testify/require"

	"github.com/opampgateway/opampgateway/internal/gatewaytest"
	"github.com/opampgateway/opampgateway/internal/telemetry"
)

// crowd has n agents introduced.
func (s *stage) crowd(n int) []*gatewaytest.Agent {
	s.t.Helper()
	agents := make([]*gatewaytest.Agent, n)
	for i := range agents {
		agents[i] = s.introduce(fmt.Sprintf("agent %03d", i))
	}
	return agents
}

// wantReachable checks that what the server pushes on any link reaches the agents, each of
// which may have got something else before.
func (s *stage) wantReachable(agents ...*gatewaytest.Agent) {
	s.t.Helper()
	links := s.server.Links()
	for i, a := range agents {
		frame := gatewaytest.Offer(a.UID, "reachable?", i%100)
		links[i%len(links)].Push(frame)
		got := a.Next()
		for !slices.Equal(got, frame) {
			got = a.Next()
		}
	}
}

// ways are those in which a link can be lost.
var ways = map[string]func(*gatewaytest.Link){
	"reset":       (*gatewaytest.Link).Reset,
	"hung up":     (*gatewaytest.Link).HangUp,
	"close frame": func(l *gatewaytest.Link) { l.Close(websocket.CloseGoingAway) },
}

// TestLinkLost loses one of three links in all ways there are.
func TestLinkLost(t *testing.T) {
	for name, lose := range ways {
		t.Run(name, func(t *testing.T) {
			play(t, func(t *testing.T, s *stage) {
				agents := s.crowd(30)
				asked := len(s.server.Questions())
				lost := s.server.WantLinks(3)[1]
				headers := map[string]http.Header{}
				for _, q := range s.server.Questions() {
					headers[q.Who()] = q.Headers
				}
				lose(lost)
				lost.WantEnd()
				begin := time.Now()
				synctest.Wait()

				// The agents of the lost link are introduced again, and asked for their state.
				again := s.server.Questions()[asked:]
				require.Len(t, again, 10)
				moved := map[string]*gatewaytest.Question{}
				for _, q := range again {
					require.Zero(t, q.At.Sub(begin))
					require.NotSame(t, lost, q.Link)
					require.Equal(t, lost.Name, q.Link.Name, "the redialed link of the same slot")
					require.Equal(t, headers[q.Who()], q.Headers)
					moved[q.Who()] = q
				}
				require.Len(t, moved, 10)
				for _, a := range agents {
					a.WantConnected()
					if moved[a.Name] != nil {
						a.WantFullStateRequest()
					}
					a.WantNothing()
				}
				for _, a := range agents {
					frame := a.Say(1)
					next := s.server.Next(a.UID)
					require.Equal(t, frame, next.Frame)
					if q := moved[a.Name]; q != nil {
						require.Same(t, q.Link, next.Link)
						require.Less(t, q.Order, next.Order, "a status before the introduction is lost")
					}
				}
				s.wantReachable(agents...)
				s.wantSpread(30, 0)
				s.wantConsistent()

				// Once more, if the server may notice the end of the old link late.
				if name != "reset" {
					clear(moved)
				}
				time.Sleep(59 * time.Second)
				synctest.Wait()
				for _, a := range agents {
					a.WantNothing()
				}
				asks := map[time.Time]int{}
				for range 40 {
					time.Sleep(time.Second)
					synctest.Wait()
					for _, a := range agents {
						if len(a.Inbox()) > 0 {
							require.NotNil(t, moved[a.Name])
							a.WantFullStateRequest()
							asks[time.Now()]++
							delete(moved, a.Name)
						}
					}
				}
				require.Empty(t, moved)
				if name == "reset" {
					require.Greater(t, len(asks), 2, "not all at the same time: %v", asks)
				}
				time.Sleep(time.Hour)
				synctest.Wait()
				for _, a := range agents {
					a.WantNothing()
					a.WantConnected()
				}
				s.wantFaults(map[telemetry.Reason]int{telemetry.ReasonLinkLost: 1})
			})
		})
	}
}

// TestLinkLostUnwritten loses a link while messages wait for it in the gateway: they go first
// on the next one, in order.
func TestLinkLostUnwritten(t *testing.T) {
	const size, n = 2000, 200 // far more than the network holds
	for name, lose := range ways {
		t.Run(name, func(t *testing.T) {
			play(t, func(t *testing.T, s *stage) {
				agents := s.crowd(3)
				lost := s.server.WantLinks(1)[0]
				lost.StopReading()
				for _, a := range agents {
					go func() {
						for sequence := 1; sequence <= n+10; sequence++ {
							a.Send(gatewaytest.Report(a.UID, sequence, size))
						}
					}()
				}
				synctest.Wait()
				asked := s.server.Questions()
				lose(lost)
				time.Sleep(2 * time.Second) // a server that says it is closing is given a moment
				lost.ReadOn()
				for _, a := range agents {
					a.WantFullStateRequest()
				}
				synctest.Wait()
				introduced := s.server.Questions()[len(asked):]
				require.Len(t, introduced, len(agents))
				for _, a := range agents {
					before, last := 0, 0                             // on the lost link, and on the next
					for _, r := range s.server.Received(a.UID)[1:] { // without the introduction
						sequence := int(r.Message.SequenceNum)
						switch {
						case r.Link == lost:
							require.Equal(t, before+1, sequence)
							before = sequence
							continue
						case last == 0: // what the network held is gone
							require.Less(t, (sequence-before)*size, 2*gatewaytest.BufferSize)
							at := slices.IndexFunc(introduced, func(q *gatewaytest.Question) bool { return q.Who() == a.Name })
							require.Less(t, introduced[at].Order, r.Order)
						default:
							require.Equal(t, last+1, sequence, "%s: lost or out of order", a.Name)
						}
						last = sequence
					}
					require.Equal(t, n+10, last)
					a.WantConnected()
				}
				s.wantFaults(map[telemetry.Reason]int{telemetry.ReasonLinkLost: 1})
				s.wantSpread(3, 3)
			}, connections(1))
		})
	}
}

// TestLinkLostAgainAndAgain loses one link after the other before it has taken what agents said:
// more than the gateway holds, so that they wait.
func TestLinkLostAgainAndAgain(t *testing.T) {
	const agents, n, size = 10, 60, 20_000
	play(t, func(t *testing.T, s *stage) {
		crowd := s.crowd(agents)
		link := s.server.WantLinks(1)[0]
		link.StopReading()
		for _, a := range crowd {
			go func() {
				for sequence := 1; sequence <= n; sequence++ {
					a.Send(gatewaytest.Report(a.UID, sequence, size))
				}
			}()
		}
		synctest.Wait()
		for range 5 {
			asked := len(s.server.Questions())
			s.server.OnConnect((*gatewaytest.Question).Silence)
			link.Close(websocket.CloseServiceRestart) // so it is nobody's fault
			link.ReadOn()
			link.WantEnd()
			time.Sleep(5 * time.Second)
			link = s.server.WantLinks(1)[0]
			synctest.Wait()
			questions := s.server.Questions()[asked:]
			require.Len(t, questions, agents)
			link.StopReading()
			for _, q := range questions {
				q.Accept()
			}
			synctest.Wait()
		}
		link.ReadOn()
		time.Sleep(10 * time.Second)
		synctest.Wait()
		for _, a := range crowd {
			a.WantConnected()
			last := &gatewaytest.Received{Message: &protobufs.AgentToServer{}}
			for _, r := range s.server.Received(a.UID)[1:] { // without the introduction
				gap := int(r.Message.SequenceNum) - int(last.Message.SequenceNum) - 1
				switch {
				case gap < 0:
					require.NotSame(t, last.Link, r.Link, "%s: %d after %d", a.Name, r.Message.SequenceNum, last.Message.SequenceNum)
					require.Equal(t, -1, gap, "more than one message came twice")
				case gap > 0:
					require.NotSame(t, last.Link, r.Link, "%s: %d after %d", a.Name, r.Message.SequenceNum, last.Message.SequenceNum)
					require.Less(t, gap*size, 5*2*gatewaytest.BufferSize, "more was lost than the network held")
				}
				last = r
			}
			require.EqualValues(t, n, last.Message.SequenceNum)
		}
	}, connections(1), exactly)
}

// TestLinkLostElsewhere loses a link that does not come back: its agents go to the others.
func TestLinkLostElsewhere(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		agents := s.crowd(30)
		asked := len(s.server.Questions())
		s.server.OnUpgrade(func(*http.Request) *gatewaytest.Refusal {
			return &gatewaytest.Refusal{Status: http.StatusServiceUnavailable}
		})
		begin := time.Now()
		s.server.WantLinks(3)[2].Reset()
		for _, a := range agents {
			a.Say(1)
		}
		time.Sleep(999 * time.Millisecond)
		require.Len(t, s.server.Questions(), asked, "they wait for their slot")
		time.Sleep(2 * time.Millisecond)
		synctest.Wait()
		for _, q := range s.server.Questions()[asked:] {
			require.Equal(t, time.Second, q.At.Sub(begin))
		}
		require.Len(t, s.server.Questions(), asked+10)
		for _, a := range agents {
			s.server.WantFrame(a.UID, gatewaytest.Status(a.UID, 1))
		}
		s.wantReachable(agents...)
		s.wantSpread(30, 0)
		s.wantConsistent()
	})
}

// TestServerGone has the server away for a few seconds.
func TestServerGone(t *testing.T) {
	const n = 100
	play(t, func(t *testing.T, s *stage) {
		agents := s.crowd(n)
		s.server.Stop()
		time.Sleep(time.Second)
		for _, a := range agents {
			go a.Say(1)
		}
		time.Sleep(4 * time.Second)
		s.server.Start()
		back := time.Now()
		time.Sleep(5 * time.Second)
		for _, a := range agents {
			a.WantConnected()
			s.server.WantFrame(a.UID, gatewaytest.Status(a.UID, 1))
			a.WantFullStateRequest()
		}
		require.LessOrEqual(t, time.Since(back), 5*time.Second)
		s.wantReachable(agents...)
		s.wantSpread(n, 1+n/10)
		s.wantConsistent()
		s.wantFaults(map[telemetry.Reason]int{telemetry.ReasonLinkLost: 3})
	})
}

// TestServerGoneForLong has the server away for longer than the grace period: agents are let go,
// but not all at once.
func TestServerGoneForLong(t *testing.T) {
	const n = 60
	play(t, func(t *testing.T, s *stage) {
		agents := s.crowd(n)
		talkative := agents[0]
		s.server.Stop()
		gone := time.Now()
		synctest.Wait()
		talkative.Say(1) // its reader waits for a link
		time.Sleep(59 * time.Second)
		for _, a := range agents {
			a.WantConnected()
		}
		s.wantTurnedAway(s.knock("newcomer"))
		var ends []time.Duration
		for _, a := range agents {
			at, err := a.WantEnd(time.Minute)
			require.True(t, websocket.IsCloseError(err, websocket.CloseAbnormalClosure), "%s: %v", a.Name, err) // no close frame
			ends = append(ends, at.Sub(gone))
		}
		slices.Sort(ends)
		require.GreaterOrEqual(t, ends[0], time.Minute)
		require.LessOrEqual(t, ends[n-1], 90*time.Second)
		require.Greater(t, ends[n-1]-ends[0], 15*time.Second, "spread over time")
		s.wantFault(telemetry.ReasonGraceOver, n)
		s.wantFault(telemetry.ReasonFrameLost, 1)
		s.server.Start()
		s.server.WantLinks(3)
		synctest.Wait()
		for _, a := range agents {
			s.server.WantNothing(a.UID)
		}
	})
}

// TestReintroduction has the server answer introductions in other ways than to accept.
func TestReintroduction(t *testing.T) {
	loseLink := func(s *stage) {
		s.t.Helper()
		link := s.server.WantLinks(1)[0]
		link.Reset()
		link.WantEnd()
		s.server.WantLinks(1)
		synctest.Wait()
	}

	for _, status := range []int{http.StatusUnauthorized, http.StatusForbidden, http.StatusUpgradeRequired, 0} {
		t.Run(fmt.Sprint("refused for good: ", status), func(t *testing.T) {
			play(t, func(t *testing.T, s *stage) {
				alice, bob := s.introduce("alice"), s.introduce("bob")
				s.server.OnConnect(func(q *gatewaytest.Question) {
					if q.Who() == "bob" {
						q.Accept()
						return
					}
					q.Refuse(status)
				})
				loseLink(s)
				alice.WantClosed(websocket.ClosePolicyViolation)
				bob.WantFullStateRequest()
				s.wantFault(telemetry.ReasonAgentRefused, 1)
				s.server.WantNothing(alice.UID) // no goodbye: it is not the server's any more
				s.wantReachable(bob)
			}, connections(1))
		})
	}

	for _, status := range []int{http.StatusServiceUnavailable, http.StatusTooManyRequests} {
		t.Run(fmt.Sprint("not just now: ", status), func(t *testing.T) {
			play(t, func(t *testing.T, s *stage) {
				alice := s.introduce("alice")
				s.server.WantQuestion()
				s.server.OnConnect(func(q *gatewaytest.Question) { q.Refuse(status, "Retry-After", "12") })
				loseLink(s)
				first := s.server.WantQuestion()
				second := func() *gatewaytest.Question { time.Sleep(12 * time.Second); return s.server.WantQuestion() }()
				require.Equal(t, 12*time.Second, second.At.Sub(first.At))
				s.server.OnConnect(func(q *gatewaytest.Question) { q.Refuse(status) })
				time.Sleep(12 * time.Second)
				third := s.server.WantQuestion()
				s.server.OnConnect((*gatewaytest.Question).Accept)
				fourth := s.server.WantQuestion()
				require.Equal(t, introduceAgain, fourth.At.Sub(third.At))
				alice.WantFullStateRequest()
				s.server.WantFrame(alice.UID, alice.Say(1))
			}, connections(1))
		})
	}

	t.Run("until the grace period is over", func(t *testing.T) {
		for name, onConnect := range map[string]func(*gatewaytest.Question){
			"refused": func(q *gatewaytest.Question) { q.Refuse(http.StatusServiceUnavailable) },
			"silent":  (*gatewaytest.Question).Silence,
			"not asked": func(q *gatewaytest.Question) {
				q.Link.Push(gatewaytest.Frame(&protobufs.ServerToAgent{CustomCapabilities: &protobufs.CustomCapabilities{}}))
			},
			"busy": func(q *gatewaytest.Question) { q.Refuse(http.StatusTooManyRequests, "Retry-After", "3600") },
		} {
			t.Run(name, func(t *testing.T) {
				play(t, func(t *testing.T, s *stage) {
					alice := s.introduce("alice")
					s.server.OnConnect(onConnect)
					lost := time.Now()
					loseLink(s)
					at, err := alice.WantEnd(2 * time.Minute)
					require.True(t, websocket.IsCloseError(err, websocket.CloseAbnormalClosure), err) // no close frame
					require.GreaterOrEqual(t, at.Sub(lost), time.Minute)
					require.LessOrEqual(t, at.Sub(lost), 90*time.Second)
					s.wantFault(telemetry.ReasonGraceOver, 1)
					require.LessOrEqual(t, len(s.server.Questions()), 2+90/5)
				}, connections(1))
			})
		}
	})

	t.Run("silence", func(t *testing.T) {
		play(t, func(t *testing.T, s *stage) {
			alice := s.introduce("alice")
			s.server.WantQuestion()
			s.server.OnConnect((*gatewaytest.Question).Silence)
			loseLink(s)
			first := s.server.WantQuestion()
			time.Sleep(15 * time.Second)
			second := s.server.WantQuestion()
			require.Equal(t, answerTimeout, second.At.Sub(first.At))
			first.Accept() // too late
			time.Sleep(time.Second)
			synctest.Wait()
			alice.WantNothing()
			second.Accept()
			alice.WantFullStateRequest()
			s.wantFault(telemetry.ReasonServerStray, 1)
		}, connections(1))
	})

	t.Run("the next link is lost, too", func(t *testing.T) {
		play(t, func(t *testing.T, s *stage) {
			alice := s.introduce("alice")
			s.server.WantQuestion()
			s.server.OnConnect((*gatewaytest.Question).Silence)
			loseLink(s)
			for range 5 {
				alice.Say(1)
				s.server.WantQuestion().Link.Reset()
			}
			s.server.OnConnect((*gatewaytest.Question).Accept)
			s.server.WantQuestion().Accept()
			alice.WantFullStateRequest()
			for range 5 {
				s.server.WantFrame(alice.UID, gatewaytest.Status(alice.UID, 1))
			}
			s.server.WantNothing(alice.UID)
		}, connections(1))
	})
}

// TestIntroductionsAreBounded has very many agents come from a lost link.
func TestIntroductionsAreBounded(t *testing.T) {
	const n = 300
	play(t, func(t *testing.T, s *stage) {
		agents := s.crowd(n)
		s.server.OnConnect((*gatewaytest.Question).Silence)
		link := s.server.WantLinks(1)[0]
		link.Reset()
		link.WantEnd()
		s.server.WantLinks(1)
		for answered := 0; answered < n; {
			synctest.Wait()
			questions := s.server.Questions()[n:]
			require.Len(t, questions, min(n, answered+64))
			for _, q := range questions[answered:] {
				q.Accept()
				answered++
			}
		}
		for _, a := range agents {
			a.WantFullStateRequest()
		}
	}, connections(1))
}

// TestLeftWhileHoming has agents leave while they wait for another link.
func TestLeftWhileHoming(t *testing.T) {
	t.Run("while there is none", func(t *testing.T) {
		play(t, func(t *testing.T, s *stage) {
			alice, bob := s.introduce("alice"), s.introduce("bob")
			asked := len(s.server.Questions())
			s.server.Stop()
			synctest.Wait()
			alice.Vanish()
			bob.Say(1) // its reader waits, so that bob's end is noticed later
			synctest.Wait()
			bob.Vanish()
			time.Sleep(5 * time.Second)
			s.server.Start()
			s.server.WantLinks(3)
			s.server.WantFrame(bob.UID, gatewaytest.Status(bob.UID, 1))
			s.server.WantGoodbye(bob.UID)
			time.Sleep(5 * time.Second)
			s.server.WantNothing(alice.UID)
			require.Len(t, s.server.Questions(), asked+1)
		})
	})

	t.Run("while the server thinks", func(t *testing.T) {
		play(t, func(t *testing.T, s *stage) {
			alice := s.introduce("alice")
			s.server.WantQuestion()
			s.server.OnConnect((*gatewaytest.Question).Silence)
			s.server.WantLinks(1)[0].Reset()
			q := s.server.WantQuestion()
			alice.Vanish()
			synctest.Wait()
			q.Accept()
			s.server.WantGoodbye(alice.UID) // it was introduced
			s.wantNobody()
			time.Sleep(time.Minute)
			require.Len(t, s.server.Questions(), 2)
		}, connections(1))
	})
}

// TestGatewayIsNotRehomed closes a connection that is another gateway when its link is lost: it
// introduces its own agents again.
func TestGatewayIsNotRehomed(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		gateway := s.connect("gateway", gatewaytest.ConnectionIDHeader, "upstream-0")
		alice, bob := gatewaytest.UID("alice"), s.introduce("bob")
		gateway.Send(gatewaytest.Status(alice, 1))
		s.server.Next(alice)
		s.server.WantLinks(1)[0].Reset()
		gateway.WantClosed(websocket.CloseServiceRestart)
		bob.WantFullStateRequest()
		time.Sleep(30 * time.Second)
		s.server.WantNothing(alice)
		s.wantConnections(1)
	}, connections(1))

	t.Run("not even one with much to say", func(t *testing.T) {
		play(t, func(t *testing.T, s *stage) {
			gateway := s.connect("gateway", gatewaytest.ConnectionIDHeader, "upstream-0")
			alice := gatewaytest.UID("alice")
			link := s.server.WantLinks(1)[0]
			link.StopReading()
			go func() {
				for sequence := range 200 {
					gateway.Send(gatewaytest.Report(alice, sequence, 100_000))
				}
			}()
			synctest.Wait()
			link.Reset()
			link.ReadOn()
			time.Sleep(3 * time.Second)
			s.wantConnections(0)
		}, connections(1))
	})
}

// TestRehomeFormats asks agents for their state in their own format.
func TestRehomeFormats(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		old, silent, proxy := s.connect("old"), s.connect("silent"), s.connect("proxy")
		text := gatewaytest.TextUID("old")
		old.Send(gatewaytest.Status(text, 1)[1:])
		s.server.Next(text)
		uids := map[string]bool{}
		for i := range 5 {
			uid := gatewaytest.UID(fmt.Sprint("behind the proxy ", i)[11:])
			uids[string(uid)] = true
			proxy.Send(gatewaytest.Status(uid, 1))
			s.server.Next(uid)
		}
		s.server.WantLinks(1)[0].Reset()
		frame := old.Next()
		require.NotZero(t, frame[0], "no header")
		message, err := gatewaytest.ServerToAgent(frame)
		require.NoError(t, err)
		require.Equal(t, text, message.GetInstanceUid())
		require.EqualValues(t, protobufs.ServerToAgentFlags_ServerToAgentFlags_ReportFullState, message.GetFlags())
		for range 5 {
			message, err := gatewaytest.ServerToAgent(proxy.Next())
			require.NoError(t, err)
			require.EqualValues(t, protobufs.ServerToAgentFlags_ServerToAgentFlags_ReportFullState, message.GetFlags())
			delete(uids, string(message.GetInstanceUid()))
		}
		require.Empty(t, uids)
		synctest.Wait()
		silent.WantNothing() // its uid is not known
		s.server.WantFrame(silent.UID, silent.Say(1))
	}, connections(1))
}
