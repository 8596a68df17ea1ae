package opampgateway

import (
	"crypto/tls"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/open-telemetry/opamp-go/protobufs"
	"github.com/stretchr/testify/require"
	"go.uber.org/zap"

	"github.com/opampgateway/opampgateway/internal/gatewaytest"
	"github.com/opampgateway/opampgateway/internal/telemetry"
)

// impostor has an agent let in that will speak under the UID of another, with credentials of its own.
func (s *stage) impostor(of *gatewaytest.Agent, headers ...string) *gatewaytest.Agent {
	s.t.Helper()
	mallory := s.connect("mallory", append([]string{"Authorization", "mallory's"}, headers...)...)
	mallory.UID = of.UID
	return mallory
}

// wantHers checks that what the server sends to a goes there, and to nobody else.
func (s *stage) wantHers(a, other *gatewaytest.Agent, hash string) {
	s.t.Helper()
	for i, link := range s.server.Links() {
		offer := gatewaytest.Offer(a.UID, fmt.Sprint(hash, i), 10)
		link.Push(offer)
		a.WantFrame(offer)
	}
	synctest.Wait()
	other.WantNothing()
}

// TestStolenUID has an admitted agent speak under another's UID: it hears that it may not, and nothing else.
func TestStolenUID(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		alice := s.introduce("alice", "Authorization", "alice's")
		mallory := s.impostor(alice)
		begin := time.Now()
		mallory.Say(666)
		wantBadRequest(t, mallory, alice.UID)
		require.Zero(t, time.Since(begin), "alice answers at once")
		s.wantFaults(map[telemetry.Reason]int{telemetry.ReasonUIDTaken: 1})
		told := s.logged(zap.WarnLevel, "instance UID")
		require.Len(t, told, 1)
		fields := fmt.Sprint(told[0].ContextMap())
		for _, port := range []string{alice.LocalAddr(), mallory.LocalAddr()} {
			require.Contains(t, fields, port[strings.LastIndex(port, ":")+1:], "both addresses")
		}
		require.Contains(t, fields, "client.address:10.0.0.1")
		s.wantNotLogged("alice's", "mallory's")

		// Again and again, also with a goodbye: nothing of it reaches the server, nor does alice's go astray.
		for i := range 100 {
			mallory.Say(i)
			wantBadRequest(t, mallory, alice.UID)
			mallory.Send(gatewaytest.Goodbye(alice.UID))
			wantBadRequest(t, mallory, alice.UID)
			s.wantHers(alice, mallory, fmt.Sprint(i))
			time.Sleep(time.Second)
		}
		s.server.WantFrame(alice.UID, alice.Say(1))
		s.server.WantNothing(alice.UID)
		s.wantFaults(map[telemetry.Reason]int{telemetry.ReasonUIDTaken: 201})
		mallory.Vanish()
		synctest.Wait()
		s.server.WantNothing(alice.UID) // no goodbye in her name
		s.wantHers(alice, mallory, "afterwards")
	})
}

// TestOwnerIsAskedSeldom asks the owner of a UID for a sign of life at most every 30 s, however often
// another one speaks under it.
func TestOwnerIsAskedSeldom(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		alice := s.introduce("alice", "Authorization", "alice's")
		bob := s.introduce("bob", "Authorization", "bob's")
		mallory, eve := s.impostor(alice), s.impostor(alice)
		mallory.Say(1)
		wantBadRequest(t, mallory, alice.UID)
		alice.BlackHole() // from now on, whoever asks her waits
		for range 29 {
			begin := time.Now()
			for _, thief := range []*gatewaytest.Agent{mallory, eve} { // whoever it is, and whatever it says in between
				thief.Send(gatewaytest.Status(bob.UID, 1))
				wantBadRequest(t, thief, bob.UID)
				thief.Say(1)
				wantBadRequest(t, thief, alice.UID)
			}
			require.Zero(t, time.Since(begin), "she was asked again")
			time.Sleep(time.Second)
		}
		time.Sleep(time.Second)
		begin := time.Now()
		frame := mallory.Say(2)
		s.server.WantFrame(alice.UID, frame)
		require.Equal(t, 5*time.Second, time.Since(begin))
		s.wantHers(mallory, alice, "x")
		alice.Reset()
	}, func(cfg *Config) { cfg.Agents.KeepAlive = KeepAliveConfig{Interval: time.Hour, Timeout: 2 * time.Hour} })
}

// TestOwnerIsGone passes a UID on to who comes with other credentials, as after they were changed, once
// the connection that had it gives no sign of life.
func TestOwnerIsGone(t *testing.T) {
	t.Run("without a word", func(t *testing.T) {
		play(t, func(t *testing.T, s *stage) {
			alice := s.introduce("alice", "Authorization", "alice's")
			alice.BlackHole()
			next := s.impostor(alice)
			begin := time.Now()
			frame := next.Say(1)
			later := next.Say(2)
			s.server.WantFrame(alice.UID, frame)
			require.Equal(t, 5*time.Second, time.Since(begin))
			s.server.WantFrame(alice.UID, later) // in order, and nothing lost
			s.wantHers(next, alice, "x")
			s.wantFault(telemetry.ReasonUIDTaken, 0)
			time.Sleep(2 * time.Minute) // until the old connection is given up
			s.wantConnections(1)
			s.server.WantNothing(alice.UID) // no goodbye: the agent is here
			s.wantHers(next, alice, "y")
		})
	})

	t.Run("while it is asked", func(t *testing.T) {
		play(t, func(t *testing.T, s *stage) {
			alice := s.introduce("alice", "Authorization", "alice's")
			alice.BlackHole()
			next := s.impostor(alice)
			begin := time.Now()
			frame := next.Say(1)
			time.Sleep(2 * time.Second)
			alice.Reset()
			for time.Since(begin) < 6*time.Second && len(s.server.Received(alice.UID)) < 2 {
				time.Sleep(100 * time.Millisecond)
			}
			for {
				received := s.server.Next(alice.UID)
				if received.Message.GetAgentDisconnect() == nil {
					require.Equal(t, frame, received.Frame)
					break
				}
			}
			require.LessOrEqual(t, time.Since(begin), 6*time.Second)
			s.wantHers(next, alice, "x")
			s.wantFault(telemetry.ReasonUIDTaken, 0)
		})
	})

	t.Run("and had said goodbye", func(t *testing.T) {
		play(t, func(t *testing.T, s *stage) {
			alice := s.introduce("alice", "Authorization", "alice's")
			alice.Send(gatewaytest.Goodbye(alice.UID))
			s.server.WantGoodbye(alice.UID)
			next := s.impostor(alice)
			begin := time.Now()
			s.server.WantFrame(alice.UID, next.Say(1))
			require.Zero(t, time.Since(begin))
			s.wantFaults(nil)
		})
	})
}

// TestOwnerCannotBeHeard gives an agent that we do not read, since its link is full, the benefit of the doubt.
func TestOwnerCannotBeHeard(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		alice := s.introduce("alice", "Authorization", "alice's")
		mallory := s.impostor(alice)
		link := s.server.WantLinks(1)[0]
		link.StopReading()
		go func() {
			for sequence := range 300 {
				alice.Send(gatewaytest.Report(alice.UID, sequence, 100_000))
			}
		}()
		synctest.Wait()
		mallory.Say(666)
		wantBadRequest(t, mallory, alice.UID)
		time.Sleep(6 * time.Second)
		link.ReadOn()
		for sequence := range 300 {
			s.server.WantFrame(alice.UID, gatewaytest.Report(alice.UID, sequence, 100_000))
		}
		s.wantHers(alice, mallory, "x")
		s.wantFaults(map[telemetry.Reason]int{telemetry.ReasonUIDTaken: 1})
	}, connections(1))
}

// TestAgentsBehindGateways has agents behind another gateway, whose credentials are not known here.
func TestAgentsBehindGateways(t *testing.T) {
	alice := gatewaytest.UID("alice")
	t.Run("that are there are heard", func(t *testing.T) {
		play(t, func(t *testing.T, s *stage) {
			below := s.connect("gateway", gatewaytest.ConnectionIDHeader, "upstream-0", "Authorization", "gateway's")
			below.Send(gatewaytest.Status(alice, 1))
			s.server.Next(alice)
			mallory := s.connect("mallory", "Authorization", "mallory's")
			for sequence := range 20 {
				mallory.Send(gatewaytest.Status(alice, 666))
				if sequence == 0 { // a pong of the gateway would say nothing of her
					below.UID = alice
					below.WantFullStateRequest()
					time.Sleep(time.Second)
					below.Send(gatewaytest.Status(alice, 2))
					s.server.WantFrame(alice, gatewaytest.Status(alice, 2))
				}
				wantBadRequest(t, mallory, alice)
				time.Sleep(time.Second)
			}
			below.WantNothing() // she is not asked each time
			s.wantFaults(map[telemetry.Reason]int{telemetry.ReasonUIDTaken: 20})
			s.server.WantNothing(alice)
		})
	})

	t.Run("that have moved are not missed", func(t *testing.T) {
		play(t, func(t *testing.T, s *stage) {
			below := s.connect("gateway", gatewaytest.ConnectionIDHeader, "upstream-0", "Authorization", "gateway's")
			below.Send(gatewaytest.Status(alice, 1))
			s.server.Next(alice)
			begin := time.Now()
			direct := s.connect("alice", "Authorization", "alice's")
			s.server.WantFrame(alice, direct.Say(1))
			require.Equal(t, challengeTimeout, time.Since(begin))
			below.Next() // she was asked
			s.wantHers(direct, below, "direct")

			// And back, or to yet another gateway: it vouches for her, and its others do not wait.
			below.Send(gatewaytest.Status(alice, 2))
			s.server.WantFrame(alice, gatewaytest.Status(alice, 2))
			require.Equal(t, challengeTimeout, time.Since(begin))
			s.wantFault(telemetry.ReasonUIDConflict, 1)
			s.wantFault(telemetry.ReasonUIDTaken, 0)
		})
	})
}

// TestSameCredentials has an agent take its UID over at once, whether the old connection is there or not.
func TestSameCredentials(t *testing.T) {
	for name, headers := range map[string][]string{
		"a key":           {"Authorization", "alice's"},
		"a key and an id": {"Authorization", "alice's", "Agent-ID", "alice"},
		"none":            nil,
	} {
		t.Run(name, func(t *testing.T) {
			play(t, func(t *testing.T, s *stage) {
				alice := s.introduce("alice", headers...)
				alice.BlackHole()
				back := s.connect("alice", append([]string{"User-Agent", "a newer one"}, headers...)...)
				begin := time.Now()
				s.server.WantFrame(alice.UID, back.Say(1))
				s.wantHers(back, alice, "x")
				require.Zero(t, time.Since(begin))
				s.wantFaults(map[telemetry.Reason]int{telemetry.ReasonUIDConflict: 1})
				told := s.logged(zap.WarnLevel, "same credentials")
				require.Len(t, told, 1)
			})
		})
	}

	t.Run("not with the key as an id", func(t *testing.T) {
		play(t, func(t *testing.T, s *stage) {
			alice := s.introduce("alice", "Authorization", "alice's")
			mallory := s.connect("mallory", "Agent-ID", "alice's")
			mallory.UID = alice.UID
			mallory.Say(1)
			wantBadRequest(t, mallory, alice.UID)
		})
	})

	for name, other := range map[string][]string{
		"another key":       {"Authorization", "mallory's", "Agent-ID", "alice"},
		"another id":        {"Authorization", "alice's", "Agent-ID", "mallory"},
		"no key":            {"Agent-ID", "alice"},
		"key and id joined": {"Authorization", "alice'salice"},
	} {
		t.Run("not with "+name, func(t *testing.T) {
			play(t, func(t *testing.T, s *stage) {
				alice := s.introduce("alice", "Authorization", "alice's", "Agent-ID", "alice")
				mallory := s.connect("mallory", other...)
				mallory.UID = alice.UID
				mallory.Say(1)
				wantBadRequest(t, mallory, alice.UID)
			})
		})
	}
}

// TestTwoUIDs has an agent speak under a UID of its own and under another's: only the latter is turned down.
func TestTwoUIDs(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		alice := s.introduce("alice", "Authorization", "alice's")
		mallory, own := s.impostor(alice), gatewaytest.UID("mallory")
		for sequence := range 30 { // more than may be bad in a row
			mallory.Send(gatewaytest.Status(own, sequence))
			mallory.Send(gatewaytest.Status(alice.UID, sequence))
			s.server.WantFrame(own, gatewaytest.Status(own, sequence))
			wantBadRequest(t, mallory, alice.UID)
		}
		for range 30 {
			mallory.Say(1)
			wantBadRequest(t, mallory, alice.UID)
		}
		time.Sleep(time.Minute)
		mallory.WantConnected()
		s.server.WantNothing(alice.UID)
		offer := gatewaytest.Offer(own, "x", 10)
		s.server.Links()[0].Push(offer)
		mallory.WantFrame(offer)
	})
}

// TestCertificatesAreCredentials has agents that show nothing but a client certificate.
func TestCertificatesAreCredentials(t *testing.T) {
	authority := newAuthority(t)
	cert := authority.issue(t, "listener")
	r := startLoopback(t, nil, map[string]any{"listener": map[string]any{"tls": map[string]any{
		"cert_file": cert.certFile, "key_file": cert.keyFile, "client_ca_file": authority.file,
	}}}, nil)
	r.door.URL = "wss" + strings.TrimPrefix(r.door.URL, "ws")
	as := func(who issued) *gatewaytest.Agent {
		r.door.TLS = &tls.Config{RootCAs: authority.pool, Certificates: []tls.Certificate{who.pair}}
		return r.door.Connect(t, "alice")
	}
	her, his := authority.issue(t, "alice"), authority.issue(t, "mallory")
	alice, mallory, back := as(her), as(his), as(her)
	r.server.WantFrame(alice.UID, alice.Say(1))
	mallory.Say(666)
	wantBadRequest(t, mallory, alice.UID)
	r.server.WantFrame(alice.UID, back.Say(2))
	r.server.WantNothing(alice.UID)
}

// TestTooManyUIDs takes no more instance UIDs of a connection than it may have; the connection stays.
func TestTooManyUIDs(t *testing.T) {
	uid := func(i int) []byte { return gatewaytest.UID(fmt.Sprint("agent ", i)) }
	for _, most := range []int{64, 3} {
		t.Run(fmt.Sprint(most), func(t *testing.T) {
			play(t, func(t *testing.T, s *stage) {
				proxy := s.connect("proxy")
				for i := range most {
					proxy.Send(gatewaytest.Status(uid(i), 0))
					s.server.Next(uid(i))
				}
				for i := range 2 * maxBadInRow {
					proxy.Send(gatewaytest.Status(uid(most+i), 0))
					wantBadRequest(t, proxy, uid(most+i))
				}
				time.Sleep(time.Minute)
				for i := range most {
					proxy.Send(gatewaytest.Status(uid(i), 1))
					s.server.WantFrame(uid(i), gatewaytest.Status(uid(i), 1))
				}
				s.wantFaults(map[telemetry.Reason]int{telemetry.ReasonTooManyUIDs: 2 * maxBadInRow})
			}, func(cfg *Config) { cfg.Agents.MaxInstanceUIDs = most })
		})
	}
}

// TestRenamedTwice has the server give an agent one UID after the other, of which it uses the last.
func TestRenamedTwice(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		alice, link := s.introduce("alice"), s.server.WantLinks(1)[0]
		second, third := gatewaytest.UID("second"), gatewaytest.UID("third")
		for _, uid := range [][]byte{second, third} {
			link.Push(gatewaytest.Frame(&protobufs.ServerToAgent{
				InstanceUid: alice.UID, AgentIdentification: &protobufs.AgentIdentification{NewInstanceUid: uid},
			}))
			alice.Next()
		}
		alice.Send(gatewaytest.Status(third, 1))
		s.server.WantFrame(third, gatewaytest.Status(third, 1))
		for _, uid := range [][]byte{alice.UID, third} {
			link.Push(gatewaytest.Offer(uid, "x", 10))
			alice.WantFrame(gatewaytest.Offer(uid, "x", 10))
		}
		link.Push(gatewaytest.Offer(second, "x", 10))
		s.wantFaults(map[telemetry.Reason]int{telemetry.ReasonServerUnknownUID: 1})
		alice.WantNothing()
		alice.Vanish()
		s.server.WantGoodbye(third)
		s.server.WantNothing(alice.UID)
		s.server.WantNothing(second)
	}, connections(1))
}

// TestMalformedUID says in the log why a UID is none.
func TestMalformedUID(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		alice := s.connect("alice")
		alice.Send(gatewaytest.Status([]byte("short"), 1))
		wantBadRequest(t, alice, []byte("short"))
		told := s.logged(zap.InfoLevel, "agent's message is not relayed")
		require.Len(t, told, 1)
		require.Contains(t, told[0].Message, "neither 16 nor 26 bytes")
		require.Equal(t, "10.0.0.1", told[0].ContextMap()["client.address"])
	})
}
