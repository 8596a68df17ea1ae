package opampgateway

import (
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gorilla/websocket"
	"github.com/open-telemetry/opamp-go/protobufs"
	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/opampgateway/opampgateway/internal/gatewaytest"
	"github.com/opampgateway/opampgateway/internal/telemetry"
)

// TestGoodbye tells the server that an agent has gone, as it would have seen without a gateway.
func TestGoodbye(t *testing.T) {
	for name, leave := range map[string]func(*gatewaytest.Agent){
		"killed":                      (*gatewaytest.Agent).Vanish,
		"reset":                       (*gatewaytest.Agent).Reset,
		"close frame without goodbye": func(a *gatewaytest.Agent) { a.Close(websocket.CloseNormalClosure) },
		"killed in a message": func(a *gatewaytest.Agent) {
			a.SendRaw(gatewaytest.Fragment(true, 2, false, []byte("\x00\x0a")))
			a.Vanish()
		},
		"after a goodbye it took back": func(a *gatewaytest.Agent) { a.Send(gatewaytest.Goodbye(a.UID)); a.Say(7); a.Vanish() },
	} {
		t.Run(name, func(t *testing.T) {
			play(t, func(t *testing.T, s *stage) {
				alice := s.introduce("alice")
				link := s.linkOf(alice)
				begin := time.Now()
				leave(alice)
				if name == "after a goodbye it took back" {
					s.server.WantGoodbye(alice.UID)
					s.server.WantFrame(alice.UID, gatewaytest.Status(alice.UID, 7))
				}
				goodbye := s.server.WantGoodbye(alice.UID)
				require.Zero(t, time.Since(begin), "at once")
				require.Same(t, link, goodbye.Link)
				last := 1000 // of linkOf
				if name == "after a goodbye it took back" {
					last = 7
				}
				require.Equal(t, gatewaytest.GoodbyeAfter(alice.UID, last), goodbye.Frame)
				goodbye.Link.Push(gatewaytest.Frame(&protobufs.ServerToAgent{InstanceUid: alice.UID})) // no fault
				time.Sleep(5 * time.Minute)
				s.server.WantNothing(alice.UID)
				s.wantFaults(nil)
			})
		})
	}

	t.Run("in the agent's format", func(t *testing.T) {
		play(t, func(t *testing.T, s *stage) {
			old, older := s.connect("old"), s.connect("older")
			old.Send(gatewaytest.Status(old.UID, 1)[1:])
			s.server.Next(old.UID)
			old.Vanish()
			s.server.WantFrame(old.UID, gatewaytest.GoodbyeAfter(old.UID, 1)[1:])

			uid := gatewaytest.TextUID("older")
			older.Send(gatewaytest.Status(uid, 1)[1:])
			s.server.Next(uid)
			older.Vanish()
			frame := protowire.AppendBytes(protowire.AppendTag(nil, 1, protowire.BytesType), uid)
			frame = protowire.AppendVarint(protowire.AppendTag(frame, 2, protowire.VarintType), 2)
			s.server.WantFrame(uid, protowire.AppendBytes(protowire.AppendTag(frame, 8, protowire.BytesType), nil))
		})
	})
}

// TestNoGoodbye says none that is not the gateway's to say. That of a silent agent, of one that
// was refused, and of one that is here twice are with what they are about.
func TestNoGoodbye(t *testing.T) {
	t.Run("said already", func(t *testing.T) {
		play(t, func(t *testing.T, s *stage) {
			alice, older := s.introduce("alice"), s.connect("older")
			alice.SayGoodbye()
			s.server.WantGoodbye(alice.UID)

			uid := gatewaytest.TextUID("older")
			frame := protowire.AppendBytes(protowire.AppendTag(nil, 1, protowire.BytesType), uid)
			older.Send(frame)
			s.server.WantFrame(uid, frame)
			frame = protowire.AppendBytes(protowire.AppendTag(frame, 8, protowire.BytesType), nil)
			older.Send(frame)
			s.server.WantFrame(uid, frame)
			older.Vanish()

			time.Sleep(5 * time.Minute)
			s.server.WantNothing(alice.UID)
			s.server.WantNothing(uid)
		})
	})

	t.Run("never heard of", func(t *testing.T) {
		play(t, func(t *testing.T, s *stage) {
			alice := s.connect("alice")
			alice.Vanish()
			time.Sleep(5 * time.Minute)
			s.server.WantNothing(alice.UID)
			s.server.WantNothing(nil)
		})
	})

	t.Run("not wanted", func(t *testing.T) {
		play(t, func(t *testing.T, s *stage) {
			alice := s.introduce("alice")
			alice.Vanish()
			time.Sleep(5 * time.Minute)
			s.server.WantNothing(alice.UID)
		}, func(cfg *Config) { cfg.Agents.SendDisconnect = false })
	})

	t.Run("its host was restarted, and answers our ping with a reset", func(t *testing.T) {
		play(t, func(t *testing.T, s *stage) {
			alice := s.introduce("alice")
			alice.BlackHole()            // it is back by way of another gateway
			time.Sleep(36 * time.Second) // until it was pinged
			alice.Reset()
			s.wantConnections(0)
			time.Sleep(5 * time.Minute)
			s.server.WantNothing(alice.UID)
		})
	})

	t.Run("but of one that is reset before it was pinged", func(t *testing.T) {
		play(t, func(t *testing.T, s *stage) {
			alice := s.introduce("alice")
			time.Sleep(10 * time.Minute) // and has answered many
			alice.Say(1)
			s.server.Next(alice.UID)
			alice.Reset()
			s.server.WantGoodbye(alice.UID)
		})
	})

	t.Run("at shutdown", func(t *testing.T) {
		play(t, func(t *testing.T, s *stage) {
			alice := s.introduce("alice")
			s.stop()
			s.server.WantNothing(alice.UID)
		})
	})

	t.Run("it is back before the goodbye was written", func(t *testing.T) {
		play(t, func(t *testing.T, s *stage) {
			alice, bob := s.introduce("alice"), s.introduce("bob")
			back := s.connect("alice")
			link := s.server.WantLinks(1)[0]
			link.StopReading()
			for sequence := range 4 {
				bob.Send(gatewaytest.Report(bob.UID, sequence, gatewaytest.BufferSize))
			}
			synctest.Wait()
			alice.Vanish()
			synctest.Wait()
			back.Say(1)
			synctest.Wait()
			link.ReadOn()
			s.server.WantFrame(back.UID, gatewaytest.Status(back.UID, 1))
			synctest.Wait()
			s.server.WantNothing(back.UID)
			s.wantFault(telemetry.ReasonUIDConflict, 0)
		}, connections(1))
	})
}

// TestAnswerToGoodbyes has the server answer goodbyes, of the gateway and of agents themselves, when nobody is
// there any more to hear it.
func TestAnswerToGoodbyes(t *testing.T) {
	for name, leave := range map[string]func(*gatewaytest.Agent){
		"of the agent":   (*gatewaytest.Agent).SayGoodbye,
		"of the gateway": (*gatewaytest.Agent).Vanish,
	} {
		t.Run(name, func(t *testing.T) {
			play(t, func(t *testing.T, s *stage) {
				for i := range 100 {
					alice := s.introduce(fmt.Sprint("agent ", i))
					leave(alice)
					link := s.server.WantGoodbye(alice.UID).Link
					s.wantConnections(0)
					time.Sleep(time.Second)
					link.Push(gatewaytest.Frame(reply(alice.UID)))
				}
				s.wantFaults(nil)
				s.server.Links()[0].Push(gatewaytest.Frame(reply(gatewaytest.UID("agent 7")))) // once more
				s.wantFaults(map[telemetry.Reason]int{telemetry.ReasonServerUnknownUID: 1})
			})
		})
	}
}
