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

// chain is a stage with a second gateway below the first, to which the agents connect.
type chain struct {
	*stage
	lower *running
}

// playChain is play with two gateways in a row.
func playChain(t *testing.T, test func(t *testing.T, c *chain), change ...func(*Config)) {
	t.Helper()
	play(t, func(t *testing.T, s *stage) {
		c := &chain{stage: s}
		c.lower = startRunning(t, s.net, gatewayAddress, "localhost:4321", func(cfg *Config) {
			cfg.Server.AgentID = "lower"
			cfg.Server.Headers.Set("Authorization", "lower's own")
		})
		s.door = c.lower.door
		time.Sleep(time.Second)
		synctest.Wait()
		require.Len(t, c.lower.pool.links(), 3)
		test(t, c)
	}, change...)
}

// TestChain has agents connect through two gateways in a row.
func TestChain(t *testing.T) {
	playChain(t, func(t *testing.T, c *chain) {
		names := map[string]bool{}
		for range 3 { // the lower gateway's links are agents of the upper one
			q := c.server.WantQuestion()
			require.Equal(t, "lower's own", q.Headers.Get("Authorization"))
			names[q.Headers.Get(gatewaytest.ConnectionIDHeader)] = true
		}
		require.Equal(t, map[string]bool{"lower/upstream-0": true, "lower/upstream-1": true, "lower/upstream-2": true}, names)

		c.server.State(measurements)
		for i := range 30 {
			agent := c.connect(fmt.Sprint("agent ", i), "Authorization", "agent's own")
			q := c.server.WantQuestion()
			require.Equal(t, agent.LocalAddr(), q.RemoteAddress)
			require.Equal(t, agent.Name, q.Who())
			require.Equal(t, "agent's own", q.Headers.Get("Authorization"))
			link := c.server.WantFrame(agent.UID, agent.Say(1))
			require.Same(t, q.Link, link)

			link.Send(reply(agent.UID))
			agent.WantMessage(reply(agent.UID))
			agent.WantCapabilities(measurements)
			for _, any := range c.server.WantLinks(3) {
				any.Push(gatewaytest.Offer(agent.UID, "x", 100))
				agent.WantFrame(gatewaytest.Offer(agent.UID, "x", 100))
			}
			synctest.Wait()
			agent.WantNothing()
		}
		c.lower.wantSpread(30, 0)
		c.wantSpread(3, 0)
		c.lower.wantConsistent()
		c.wantConsistent()
		c.wantFaults(nil)
		c.lower.wantFaults(nil)
	})
}

// TestChainRefusal has a refusal pass two gateways.
func TestChainRefusal(t *testing.T) {
	playChain(t, func(t *testing.T, c *chain) {
		c.server.OnConnect(func(q *gatewaytest.Question) {
			q.Refuse(http.StatusUpgradeRequired, "Upgrade", "OpAMP/v0.9.0", "X-Reason", "too old")
		})
		headers := c.door.WantRefused(t, "alice", http.StatusUpgradeRequired)
		require.Equal(t, "OpAMP/v0.9.0", headers.Get("Upgrade"))
		require.Equal(t, "too old", headers.Get("X-Reason"))
		c.lower.wantAdmissions(telemetry.OutcomeRefused, 1)
		c.wantAdmissions(telemetry.OutcomeAccepted, 3)
	})
}

// TestChainManyAgents has more agents behind a gateway than one connection could speak for otherwise.
func TestChainManyAgents(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		gateway := s.connect("gateway", gatewaytest.ConnectionIDHeader, "upstream-0")
		for i := range 1000 {
			gateway.Send(gatewaytest.Status(gatewaytest.UID(fmt.Sprint("agent ", i)), 1))
		}
		synctest.Wait()
		require.EqualValues(t, 1000, s.counted("messages", "upstream"))
		s.wantFaults(nil)
	})
}

// TestChainCapabilities tells the gateway below what the server states, before its first agent
// can be told anything.
func TestChainCapabilities(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		s.server.State(gatewayCapability, measurements)
		gateway := s.connect("gateway", gatewaytest.ConnectionIDHeader, "upstream-0")
		ask := func(requestUID string) {
			gateway.Send(gatewaytest.Connect(requestUID, "10.9.8.7:6", nil))
		}
		told := &protobufs.ServerToAgent{CustomCapabilities: &protobufs.CustomCapabilities{Capabilities: []string{gatewayCapability, measurements}}}
		result := func(requestUID string) *protobufs.ServerToAgent {
			return gatewaytest.ConnectResult(requestUID, gatewaytest.Verdict{Accept: true, Status: 200})
		}
		ask("1")
		gateway.WantMessage(result("1"))
		gateway.WantMessage(told)
		ask("2")
		gateway.WantMessage(result("2"))
		alice := gatewaytest.UID("alice")
		gateway.Send(gatewaytest.Status(alice, 1))
		s.server.Next(alice).Link.Send(reply(alice))
		gateway.WantMessage(reply(alice))
		synctest.Wait()
		gateway.WantNothing()
	}, connections(1))

	t.Run("not if the answer states them", func(t *testing.T) {
		play(t, func(t *testing.T, s *stage) {
			gateway := s.connect("gateway", gatewaytest.ConnectionIDHeader, "upstream-0")
			answer := gatewaytest.ConnectResult("1", gatewaytest.Verdict{Accept: true})
			answer.CustomCapabilities = &protobufs.CustomCapabilities{Capabilities: []string{measurements}}
			s.server.OnConnect(func(q *gatewaytest.Question) { q.Link.Send(answer) })
			for range 2 {
				gateway.Send(gatewaytest.Connect("1", "10.9.8.7:6", nil))
				gateway.WantMessage(answer)
			}
			synctest.Wait()
			gateway.WantNothing()
		}, connections(1))
	})
}

// TestChainServerThatDoesNotListIt has a server that answers questions, but does not list the
// capability for it among its custom capabilities.
func TestChainServerThatDoesNotListIt(t *testing.T) {
	playWithout(t, func(t *testing.T, s *stage) {
		s.server.State(measurements)
		s.server.Start()
		s.start()
		lower := startRunning(t, s.net, gatewayAddress, "localhost:4321")
		time.Sleep(10 * time.Second)
		s.door = lower.door
		for i := range 6 {
			agent := s.introduce(fmt.Sprint("agent ", i))
			s.linkOf(agent).Send(reply(agent.UID)) // where the server has stated them in its answer
			agent.WantMessage(reply(agent.UID))
			agent.WantCapabilities(measurements)
		}
	})
}

// TestForeignConnect has agents that are no gateways ask about agents: they would try out credentials.
func TestForeignConnect(t *testing.T) {
	withUID := func(uid []byte) []byte {
		message, _ := gatewaytest.AgentToServer(gatewaytest.Connect("1", "10.9.8.7:6", nil))
		message.InstanceUid = uid
		return gatewaytest.Frame(message)
	}
	result := gatewaytest.Frame(&protobufs.AgentToServer{CustomMessage: gatewaytest.ConnectResult("1", gatewaytest.Verdict{Accept: true}).CustomMessage})
	for name, test := range map[string]struct {
		frame   []byte
		headers []string
	}{
		"an agent, without a uid":       {gatewaytest.Connect("1", "10.9.8.7:6", nil), nil},
		"an agent, with its uid":        {withUID(gatewaytest.UID("alice")), nil},
		"a gateway, with a uid":         {withUID(gatewaytest.UID("alice")), []string{gatewaytest.ConnectionIDHeader, "upstream-0"}},
		"a gateway that answers":        {result, []string{gatewaytest.ConnectionIDHeader, "upstream-0"}},
		"hidden in pieces of the field": {nil, nil},
	} {
		t.Run(name, func(t *testing.T) {
			play(t, func(t *testing.T, s *stage) {
				alice, bob := s.introduce("alice", test.headers...), s.introduce("bob")
				asked := len(s.server.Questions())
				if test.frame == nil { // which the decoder would merge
					one := gatewaytest.Frame(&protobufs.AgentToServer{CustomMessage: &protobufs.CustomMessage{Capability: gatewaytest.GatewayCapability}})
					two := gatewaytest.Frame(&protobufs.AgentToServer{CustomMessage: &protobufs.CustomMessage{Type: gatewaytest.ConnectType, Data: []byte(`{"request_uid":"1"}`)}})
					test.frame = slices.Concat(one, two[1:])
				}
				alice.Send(test.frame)
				for sequence := range 10 {
					alice.Say(sequence)
				}
				start := time.Now()
				s.wantFaults(map[telemetry.Reason]int{telemetry.ReasonForeignConnect: 1})
				alice.WantConnected()
				s.server.WantNothing(alice.UID)
				s.server.WantFrame(bob.UID, bob.Say(1))
				_, err := alice.WantEnd(20 * time.Second)
				require.True(t, websocket.IsCloseError(err, websocket.ClosePolicyViolation), err)
				require.GreaterOrEqual(t, time.Since(start), 5*time.Second)
				require.LessOrEqual(t, time.Since(start), 15*time.Second)
				require.Len(t, s.server.Questions(), asked, "the server was asked")
			})
		})
	}
}

// TestRelayedQuestions looks at what becomes of a lower gateway's questions.
func TestRelayedQuestions(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		var questions []*gatewaytest.Question
		one := s.connect("one", gatewaytest.ConnectionIDHeader, "upstream-0")
		two := s.connect("two", gatewaytest.ConnectionIDHeader, "upstream-1")
		s.server.WantQuestion()
		s.server.WantQuestion()
		s.server.OnConnect((*gatewaytest.Question).Silence)
		one.Send(gatewaytest.Connect("of one", "10.9.8.7:6", nil))
		two.Send(gatewaytest.Connect("of two", "10.9.8.7:6", nil))
		for range 2 {
			questions = append(questions, s.server.WantQuestion())
		}
		for _, q := range questions { // each goes to whoever asked, once
			q.Accept()
			q.Accept()
		}
		one.WantMessage(gatewaytest.ConnectResult("of one", gatewaytest.Verdict{Accept: true, Status: 200}))
		two.WantMessage(gatewaytest.ConnectResult("of two", gatewaytest.Verdict{Accept: true, Status: 200}))
		s.wantFault(telemetry.ReasonServerStray, 2)

		// An answer after the admission time is nobody's any more.
		one.Send(gatewaytest.Connect("late", "10.9.8.7:6", nil))
		late := s.server.WantQuestion()
		time.Sleep(50 * time.Second)
		late.Accept()
		s.wantFault(telemetry.ReasonServerStray, 3)

		// Nor one for a gateway that has gone.
		two.Send(gatewaytest.Connect("gone", "10.9.8.7:6", nil))
		gone := s.server.WantQuestion()
		two.Vanish()
		synctest.Wait()
		gone.Accept()
		synctest.Wait()
		one.WantNothing()
	})
}

// TestChainLinkLost has the upper gateway lose a link to the server, and the lower one bring
// its agents back.
func TestChainLinkLost(t *testing.T) {
	playChain(t, func(t *testing.T, c *chain) {
		var agents []*gatewaytest.Agent
		for i := range 9 {
			agents = append(agents, c.introduce(fmt.Sprint("agent ", i)))
		}
		c.server.WantLinks(3)[0].Reset()
		time.Sleep(2 * time.Second)
		c.server.WantLinks(3)
		for _, a := range agents {
			a.WantConnected()
			frame := a.Say(1)
			link := c.server.WantFrame(a.UID, frame)
			link.Push(gatewaytest.Offer(a.UID, "x", 100))
			for {
				if message, _ := gatewaytest.ServerToAgent(a.Next()); message.GetRemoteConfig() != nil {
					break
				}
			}
		}
		c.lower.wantFault(telemetry.ReasonLinkLost, 1)
		c.wantConsistent()
		c.lower.wantConsistent()
		// The agents were claimed again elsewhere, so nobody says goodbye for them.
		time.Sleep(3 * time.Minute)
		for _, a := range agents {
			c.server.WantNothing(a.UID)
		}
	})
}

// TestChainRestart has the upper gateway shut down, and another one take its place.
func TestChainRestart(t *testing.T) {
	playChain(t, func(t *testing.T, c *chain) {
		var agents []*gatewaytest.Agent
		for i := range 9 {
			agents = append(agents, c.introduce(fmt.Sprint("agent ", i)))
		}
		c.stop()
		for _, a := range agents {
			go a.Say(1)
		}
		time.Sleep(5 * time.Second)
		startRunning(t, c.net, serverAddress, gatewayAddress)
		time.Sleep(5 * time.Second)
		for _, a := range agents {
			a.WantConnected()
			c.server.WantFrame(a.UID, gatewaytest.Status(a.UID, 1))
			a.WantFullStateRequest()
		}
		c.wantReachable(agents...)
		c.lower.wantSpread(9, 0)
		c.lower.stop() // before what is above it
	})
}

// TestChainGoodbye says goodbye for the agents of a gateway that has gone, after a while, and
// only for those that have not turned up by another way.
func TestChainGoodbye(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		gateway := s.connect("gateway", gatewaytest.ConnectionIDHeader, "upstream-0")
		alice, bob, cathy := gatewaytest.UID("alice"), gatewaytest.UID("bob"), gatewaytest.UID("cathy")
		for _, uid := range [][]byte{alice, bob, cathy} {
			gateway.Send(gatewaytest.Status(uid, 1))
			s.server.Next(uid)
		}
		gateway.Send(gatewaytest.Goodbye(cathy))
		s.server.WantGoodbye(cathy)
		gateway.Vanish()
		time.Sleep(30 * time.Second)
		s.server.WantNothing(alice)
		s.introduce("bob")
		start := time.Now()
		time.Sleep(29 * time.Second)
		s.server.WantNothing(alice)
		s.server.WantGoodbye(alice)
		require.Equal(t, 30*time.Second, time.Since(start))
		time.Sleep(5 * time.Minute)
		s.server.WantNothing(bob)
		s.server.WantNothing(cathy)
	}, func(cfg *Config) { cfg.Agents.SendDisconnectForGateways = true })

	t.Run("but not unless configured: they may be at another gateway", func(t *testing.T) {
		play(t, func(t *testing.T, s *stage) {
			gateway, alice := s.connect("gateway", gatewaytest.ConnectionIDHeader, "upstream-0"), gatewaytest.UID("alice")
			gateway.Send(gatewaytest.Status(alice, 1))
			s.server.Next(alice)
			gateway.Vanish()
			time.Sleep(5 * time.Minute)
			s.server.WantNothing(alice)
		})
	})
}
