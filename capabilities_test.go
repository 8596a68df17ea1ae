package opampgateway

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/open-telemetry/opamp-go/protobufs"
	"github.com/stretchr/testify/require"

	"github.com/opampgateway/opampgateway/internal/gatewaytest"
)

const (
	gatewayCapability = gatewaytest.GatewayCapability
	measurements      = "com.bindplane.measurements.v1"
	topology          = "com.bindplane.topology"
)

// reply is an ordinary message for the agent with this uid.
func reply(uid []byte) *protobufs.ServerToAgent {
	return &protobufs.ServerToAgent{InstanceUid: uid, Capabilities: 7}
}

// TestCapabilities has every agent learn the server's custom capabilities once, though the
// server states them once per link.
func TestCapabilities(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		s.server.State(gatewayCapability, measurements, topology)
		alice, bob := s.connect("alice"), s.connect("bob") // the connectResult states them
		synctest.Wait()
		alice.WantNothing()
		for _, a := range []*gatewaytest.Agent{alice, bob} {
			s.server.WantFrame(a.UID, a.Say(1))
		}
		link := s.server.WantLinks(1)[0]
		for _, a := range []*gatewaytest.Agent{bob, alice} {
			link.Send(reply(a.UID))
			a.WantMessage(reply(a.UID))
			a.WantCapabilities(gatewayCapability, measurements, topology)
		}
		for range 3 {
			link.Send(reply(alice.UID))
			alice.WantMessage(reply(alice.UID))
		}
		synctest.Wait()
		alice.WantNothing()
		bob.WantNothing()
	}, connections(1))

	t.Run("not for those who heard them from the server", func(t *testing.T) {
		play(t, func(t *testing.T, s *stage) {
			s.server.State(measurements)
			alice, bob := s.introduce("alice"), s.introduce("bob")
			link := s.server.WantLinks(1)[0]
			link.Send(reply(bob.UID))
			withThem := reply(bob.UID)
			withThem.CustomCapabilities = &protobufs.CustomCapabilities{Capabilities: []string{measurements}}
			bob.WantMessage(withThem)
			link.Send(reply(alice.UID))
			alice.WantMessage(reply(alice.UID))
			alice.WantCapabilities(measurements)
			for _, a := range []*gatewaytest.Agent{alice, bob} {
				link.Send(reply(a.UID))
				a.WantMessage(reply(a.UID))
			}
			synctest.Wait()
			alice.WantNothing()
			bob.WantNothing()
		}, connections(1), func(cfg *Config) { cfg.Server.AgentAdmission = AdmissionAccept })
	})

	t.Run("not if there are none", func(t *testing.T) {
		play(t, func(t *testing.T, s *stage) {
			s.server.State()
			alice := s.introduce("alice")
			s.server.WantLinks(1)[0].Send(reply(alice.UID))
			alice.WantMessage(reply(alice.UID))
			synctest.Wait()
			alice.WantNothing()
		}, connections(1))
	})

	t.Run("in the agent's format", func(t *testing.T) {
		play(t, func(t *testing.T, s *stage) {
			s.server.State(measurements)
			link := s.server.WantLinks(1)[0]

			old := s.connect("old") // sends no header
			status := gatewaytest.Status(old.UID, 1)[1:]
			old.Send(status)
			s.server.WantFrame(old.UID, status)
			link.Send(reply(old.UID))
			old.WantMessage(reply(old.UID))
			told, err := gatewaytest.ServerToAgent(old.Next())
			require.NoError(t, err)
			require.Equal(t, []string{measurements}, told.GetCustomCapabilities().GetCapabilities())

			older := s.connect("older") // would not understand them
			uid := gatewaytest.TextUID("older")
			status = gatewaytest.Status(uid, 1)[1:]
			older.Send(status)
			s.server.WantFrame(uid, status)
			link.Send(reply(uid))
			older.WantMessage(reply(uid))
			synctest.Wait()
			older.WantNothing()
		}, connections(1))
	})

	t.Run("for a clone", func(t *testing.T) {
		play(t, func(t *testing.T, s *stage) {
			s.server.State(measurements)
			alice := s.introduce("alice")
			link := s.server.WantLinks(1)[0]
			link.Send(reply(alice.UID))
			alice.WantMessage(reply(alice.UID))
			alice.WantCapabilities(measurements)
			clone := s.introduce("alice")
			link.Send(reply(alice.UID))
			clone.WantMessage(reply(alice.UID))
			clone.WantCapabilities(measurements)
			synctest.Wait()
			alice.WantNothing()
			clone.WantNothing()
		}, connections(1))
	})
}

// TestCapabilitiesAndNewUID has the server rename an agent in the very message after which it
// learns the custom capabilities.
func TestCapabilitiesAndNewUID(t *testing.T) {
	for name, heard := range map[string]bool{"told by the gateway": false, "told by the server": true} {
		t.Run(name, func(t *testing.T) {
			play(t, func(t *testing.T, s *stage) {
				if !heard {
					s.server.State(measurements) // in the connectResult
				}
				alice := s.introduce("alice")
				if heard {
					s.server.State(measurements) // in the first message for alice
				}
				wanda := gatewaytest.UID("wanda")
				link := s.server.WantLinks(1)[0]
				renamed := &protobufs.ServerToAgent{InstanceUid: alice.UID, AgentIdentification: &protobufs.AgentIdentification{NewInstanceUid: wanda}}
				if heard {
					renamed.CustomCapabilities = &protobufs.CustomCapabilities{Capabilities: []string{measurements}}
				}
				link.Push(gatewaytest.Frame(renamed))
				alice.WantMessage(renamed)
				if !heard {
					alice.WantCapabilities(measurements)
				}
				alice.Send(gatewaytest.Status(wanda, 1))
				s.server.Next(wanda)
				link.Push(gatewaytest.Frame(reply(wanda)))
				alice.WantMessage(reply(wanda))
				synctest.Wait()
				alice.WantNothing()
			}, connections(1))
		})
	}
}

// TestCapabilitiesOnAnotherLink has agents come to a link of a server that has changed, or has not.
func TestCapabilitiesOnAnotherLink(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		s.server.State(measurements, topology)
		alice := s.introduce("alice")
		say := func() {
			t.Helper()
			s.server.WantLinks(1)[0].Send(reply(alice.UID))
			alice.WantMessage(reply(alice.UID))
		}
		loseLink := func() {
			t.Helper()
			s.server.WantLinks(1)[0].Reset()
			alice.WantFullStateRequest()
			time.Sleep(2 * time.Minute) // and once more
			alice.WantFullStateRequest()
		}
		say()
		alice.WantCapabilities(measurements, topology)

		loseLink()
		say()
		synctest.Wait()
		alice.WantNothing() // the same as before

		s.server.State(measurements)
		loseLink()
		say()
		alice.WantCapabilities(measurements)

		s.server.State()
		loseLink()
		say()
		alice.WantCapabilities()

		say()
		synctest.Wait()
		alice.WantNothing()
	}, connections(1))
}
