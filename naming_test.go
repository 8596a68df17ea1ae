package opampgateway

import (
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/open-telemetry/opamp-go/protobufs"
	"github.com/stretchr/testify/require"

	"github.com/opampgateway/opampgateway/internal/gatewaytest"
	"github.com/opampgateway/opampgateway/internal/telemetry"
)

// asksForUID is a message of an agent that asks for an instance UID, since that one is temporary.
func asksForUID(uid []byte, sequence int) []byte {
	return gatewaytest.Frame(&protobufs.AgentToServer{
		InstanceUid: uid, SequenceNum: uint64(sequence),
		Flags: uint64(protobufs.AgentToServerFlags_AgentToServerFlags_RequestInstanceUid),
	})
}

// given is the server's answer to one that asks under uid.
func given(uid, to []byte) []byte {
	return gatewaytest.Frame(&protobufs.ServerToAgent{
		InstanceUid: uid, AgentIdentification: &protobufs.AgentIdentification{NewInstanceUid: to},
	})
}

// clone has an agent let in that speaks under a UID that others have, too.
func (s *stage) clone(name string, uid []byte, headers ...string) *gatewaytest.Agent {
	s.t.Helper()
	a := s.connect(name, headers...)
	a.UID = uid
	return a
}

// wantUID checks that the agent is given this UID, and is found under it.
func (s *stage) wantUID(a *gatewaytest.Agent, uid []byte) {
	s.t.Helper()
	a.WantFrame(given(a.UID, uid))
	s.wantFound(a, uid)
}

// wantFound checks that the agent is found under the UID that it was given, before and after it uses it.
func (s *stage) wantFound(a *gatewaytest.Agent, uid []byte) {
	s.t.Helper()
	links := s.server.Links()
	links[0].Push(gatewaytest.Offer(uid, "before", 10))
	a.WantFrame(gatewaytest.Offer(uid, "before", 10))
	a.UID = uid
	s.server.WantFrame(uid, a.Say(1))
	links[len(links)-1].Push(gatewaytest.Offer(uid, "after", 10))
	a.WantFrame(gatewaytest.Offer(uid, "after", 10))
}

// TestTemporaryUID has machines that were cloned ask for a UID under the same one, all at a time, on all links. Each
// gets exactly one; if they ask one after the other, that which the server has made for it.
func TestTemporaryUID(t *testing.T) {
	const crowd = 20
	temporary := gatewaytest.UID("image")
	for name, oneByOne := range map[string]bool{"at once": false, "one by one": true} {
		t.Run(name, func(t *testing.T) {
			play(t, func(t *testing.T, s *stage) {
				var agents []*gatewaytest.Agent
				for i := range crowd {
					agents = append(agents, s.clone(fmt.Sprint("clone ", i), temporary))
				}
				for i, a := range agents {
					a.Send(asksForUID(temporary, i)) // each with another number, by which the test knows it
					if oneByOne {
						synctest.Wait()
					}
				}
				asked := map[*gatewaytest.Link][]uint64{}
				for range agents {
					r := s.server.Next(temporary)
					asked[r.Link] = append(asked[r.Link], r.Message.SequenceNum)
				}
				// The server answers those of a link in order; which link comes first is up to it.
				require.Len(t, asked, 3)
				want := map[string]bool{}
				for link, numbers := range asked {
					for _, n := range numbers {
						uid := gatewaytest.UID(fmt.Sprint("own ", n))
						want[string(uid)] = true
						link.Push(given(temporary, uid))
						synctest.Wait()
					}
				}
				for i, a := range agents {
					message, err := gatewaytest.ServerToAgent(a.Next())
					require.NoError(t, err)
					uid := message.AgentIdentification.NewInstanceUid
					require.True(t, want[string(uid)], "given twice")
					delete(want, string(uid))
					if oneByOne {
						require.Equal(t, gatewaytest.UID(fmt.Sprint("own ", i)), uid)
					}
					s.wantFound(a, uid)
				}
				for _, a := range agents {
					a.WantNothing()
				}
				s.wantFaults(nil)
				s.wantConsistent()
			})
		})
	}
}

// TestTemporaryUIDAgain has agents ask more than once, or leave before they are answered. Nobody gets what another one
// has got.
func TestTemporaryUIDAgain(t *testing.T) {
	temporary := gatewaytest.UID("image")
	oneLink := func(cfg *Config) { cfg.Server.Connections = 1 }
	names := func(n int) []byte { return gatewaytest.UID(fmt.Sprint("own ", n)) }

	t.Run("more than once", func(t *testing.T) {
		play(t, func(t *testing.T, s *stage) {
			alice, bob := s.clone("alice", temporary), s.clone("bob", temporary)
			for _, a := range []*gatewaytest.Agent{alice, alice, bob, alice} {
				a.Send(asksForUID(temporary, 1))
				s.server.Next(temporary)
			}
			link := s.server.WantLinks(1)[0]
			link.Push(given(temporary, names(0)))
			link.Push(given(temporary, names(1)))
			s.wantUID(alice, names(0))
			s.wantUID(bob, names(1))
			s.wantConsistent()
		}, oneLink)
	})

	t.Run("and leaves", func(t *testing.T) {
		play(t, func(t *testing.T, s *stage) {
			alice, bob := s.clone("alice", temporary), s.clone("bob", temporary)
			for _, a := range []*gatewaytest.Agent{alice, bob} {
				a.Send(asksForUID(temporary, 1))
				s.server.Next(temporary)
			}
			alice.Vanish()
			synctest.Wait()
			s.server.WantLinks(1)[0].Push(given(temporary, names(0)))
			s.wantUID(bob, names(0))
			s.server.WantLinks(1)[0].Push(given(temporary, names(1))) // alice's; bob was the last to speak
			bob.WantFrame(given(temporary, names(1)))
			s.wantConsistent()
		}, oneLink)
	})

	t.Run("and is turned down", func(t *testing.T) {
		r, uid := newRouting(t), uidOf(t, "image")
		alice, bob := r.agent("key"), r.agent("key")
		alice.asks, bob.asks = true, true
		r.unask(r.wantClaim(alice, uid, false))
		b := r.wantClaim(bob, uid, true)
		require.Same(t, b, r.toName(b, uidOf(t, "own"), nil))
		require.Same(t, b, r.toName(b, uidOf(t, "another"), nil))
	})
}

// TestTemporaryUIDBehindGateway has agents behind another gateway ask, which are on one connection.
func TestTemporaryUIDBehindGateway(t *testing.T) {
	temporary := gatewaytest.UID("image")
	play(t, func(t *testing.T, s *stage) {
		below := s.clone("gateway below", temporary, connectionIDHeader, "below/upstream-0")
		alice := s.clone("alice", temporary)
		below.Send(asksForUID(temporary, 1))
		s.server.Next(temporary)
		below.Send(asksForUID(temporary, 1))
		s.server.Next(temporary)
		alice.Send(asksForUID(temporary, 1))
		s.server.Next(temporary)
		link := s.server.WantLinks(1)[0]
		for i := range 3 {
			link.Push(given(temporary, gatewaytest.UID(fmt.Sprint("own ", i))))
		}
		below.WantFrame(given(temporary, gatewaytest.UID("own 0")))
		below.WantFrame(given(temporary, gatewaytest.UID("own 1")))
		for i := range 2 { // both are known
			offer := gatewaytest.Offer(gatewaytest.UID(fmt.Sprint("own ", i)), "x", 10)
			link.Push(offer)
			below.WantFrame(offer)
		}
		s.wantUID(alice, gatewaytest.UID("own 2"))
		s.wantConsistent()

		// However many ask there, what is noted of them is bounded.
		for range 3 * maxAsks {
			below.Send(asksForUID(temporary, 1))
			s.server.Next(temporary)
		}
		require.Len(t, s.router.find(temporary).route.asking, maxAsks)
	}, func(cfg *Config) { cfg.Server.Connections = 1 })
}

// TestTemporaryUIDOtherCredentials has agents ask that each came with credentials of their own: one after the other, so
// that what the server answers one never reaches the other.
func TestTemporaryUIDOtherCredentials(t *testing.T) {
	temporary := gatewaytest.UID("image")
	own := func(name string) []byte { return gatewaytest.UID(name + "'s own") }

	t.Run("are answered", func(t *testing.T) {
		play(t, func(t *testing.T, s *stage) {
			agents := map[string]*gatewaytest.Agent{}
			for _, name := range []string{"alice", "bob", "cathy"} {
				agents[name] = s.clone(name, temporary, "Authorization", name+"'s")
				agents[name].Send(asksForUID(temporary, 1))
				synctest.Wait()
			}
			for range agents {
				r := s.server.Next(temporary)
				synctest.Wait()
				s.server.WantNothing(temporary) // the others wait
				time.Sleep(time.Second)
				var name string
				for n, a := range agents {
					if c := s.router.find(temporary); c != nil && hasUID(a, c.agent) {
						name = n
					}
				}
				r.Link.Push(given(temporary, own(name)))
				agents[name].WantFrame(given(temporary, own(name)))
				agents[name].UID = own(name)
			}
			for name, a := range agents {
				s.server.WantFrame(own(name), a.Say(2))
				a.WantNothing()
			}
			s.wantFaults(nil)
			s.wantConsistent()
		})
	})

	t.Run("are not answered", func(t *testing.T) {
		play(t, func(t *testing.T, s *stage) {
			alice := s.clone("alice", temporary, "Authorization", "alice's")
			bob := s.clone("bob", temporary, "Authorization", "bob's")
			alice.Send(asksForUID(temporary, 1))
			s.server.Next(temporary)
			begin := time.Now()
			bob.Send(asksForUID(temporary, 1))
			wantBadRequest(t, bob, temporary)
			require.Equal(t, challengeTimeout, time.Since(begin))
			s.server.WantNothing(temporary)
			s.wantFault(telemetry.ReasonUIDTaken, 1)

			// Once alice is answered, bob's next try gets through at once.
			s.server.WantLinks(3)[0].Push(given(temporary, own("alice")))
			alice.WantFrame(given(temporary, own("alice")))
			bob.Send(asksForUID(temporary, 2))
			s.server.WantFrame(temporary, asksForUID(temporary, 2))
			s.server.WantLinks(3)[0].Push(given(temporary, own("bob")))
			bob.WantFrame(given(temporary, own("bob")))
			alice.WantNothing()
		})
	})
}

// hasUID reports whether the agent is at the other end of the connection.
func hasUID(a *gatewaytest.Agent, conn *agentConn) bool { return conn.remote == a.LocalAddr() }

// TestTemporaryUIDIsNoTheft has an agent with other credentials pretend that the UID of one that is there is a temporary
// one. It is turned down as any thief, whether that one has asked itself once, or has not.
func TestTemporaryUIDIsNoTheft(t *testing.T) {
	for name, before := range map[string]func(s *stage, alice *gatewaytest.Agent){
		"never asked": func(*stage, *gatewaytest.Agent) {},
		"was given the same": func(s *stage, alice *gatewaytest.Agent) {
			alice.Send(asksForUID(alice.UID, 1))
			s.server.Next(alice.UID).Link.Push(given(alice.UID, alice.UID))
			alice.WantFrame(given(alice.UID, alice.UID))
		},
		"is still to be answered": func(s *stage, alice *gatewaytest.Agent) {
			alice.Send(asksForUID(alice.UID, 1))
			s.server.Next(alice.UID)
		},
	} {
		t.Run(name, func(t *testing.T) {
			play(t, func(t *testing.T, s *stage) {
				alice := s.introduce("alice", "Authorization", "alice's")
				before(s, alice)
				mallory := s.impostor(alice)
				for i := range 3 {
					mallory.Send(asksForUID(alice.UID, i))
					wantBadRequest(t, mallory, alice.UID)
					s.wantHers(alice, mallory, fmt.Sprint(i))
				}
				s.server.WantNothing(alice.UID)
				s.server.Links()[0].Push(given(alice.UID, gatewaytest.UID("new")))
				alice.WantFrame(given(alice.UID, gatewaytest.UID("new")))
				synctest.Wait()
				mallory.WantNothing()
			})
		})
	}
}
