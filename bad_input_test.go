package opampgateway

import (
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gorilla/websocket"
	"github.com/open-telemetry/opamp-go/protobufs"
	"github.com/stretchr/testify/require"

	"github.com/opampgateway/opampgateway/internal/gatewaytest"
	"github.com/opampgateway/opampgateway/internal/telemetry"
)

// wantBadRequest checks that the next frame tells the agent that its message was no good.
func wantBadRequest(t *testing.T, a *gatewaytest.Agent, uid []byte) {
	t.Helper()
	message, err := gatewaytest.ServerToAgent(a.Next())
	require.NoError(t, err)
	require.Equal(t, uid, message.GetInstanceUid())
	require.NotNil(t, message.GetErrorResponse())
	require.Equal(t, protobufs.ServerErrorResponseType_ServerErrorResponseType_BadRequest, message.GetErrorResponse().GetType())
	require.Contains(t, message.GetErrorResponse().GetErrorMessage(), "opampgateway: ")
}

// TestBadMessage skips what an agent sends that is no message of its own.
func TestBadMessage(t *testing.T) {
	alice := gatewaytest.UID("alice")
	status := gatewaytest.Status(alice, 1)
	for _, test := range []struct {
		name   string
		frame  []byte
		reason telemetry.Reason
		uid    []byte // that it states, with which it is answered
	}{
		{"garbage", []byte("GET / HTTP/1.1\r\n\r\n"), telemetry.ReasonBadFrame, nil},
		{"garbage after the header", []byte("\x00\xff\xff\xff\xff"), telemetry.ReasonBadFrame, nil},
		{"empty", nil, telemetry.ReasonBadFrame, nil},
		{"another header", slices.Concat([]byte{1}, status[1:]), telemetry.ReasonBadFrame, nil},
		{"two headers", slices.Concat([]byte{0}, status), telemetry.ReasonBadFrame, nil},
		{"truncated", status[:len(status)-1], telemetry.ReasonBadFrame, alice},
		{"truncated in the uid", status[:10], telemetry.ReasonBadFrame, nil},
		{"with more behind it", slices.Concat(status, []byte{0xff}), telemetry.ReasonBadFrame, alice},
		{"header only", []byte{0}, telemetry.ReasonBadUID, nil},
		{"no uid", gatewaytest.Status(nil, 1), telemetry.ReasonBadUID, nil},
		{"uid of 5 bytes", gatewaytest.Status([]byte("alice"), 1), telemetry.ReasonBadUID, []byte("alice")},
		{"uid of 17 bytes", gatewaytest.Status([]byte("alice89012345678."), 1), telemetry.ReasonBadUID, []byte("alice89012345678.")},
		{"uid of 25 bytes", gatewaytest.Status([]byte("alice89012345678.........")[:25], 1), telemetry.ReasonBadUID, []byte("alice89012345678.........")[:25]},
		{"uid of 1 MiB", gatewaytest.Status(make([]byte, 1<<20), 1), telemetry.ReasonBadUID, make([]byte, 128)},
	} {
		t.Run(test.name, func(t *testing.T) {
			play(t, func(t *testing.T, s *stage) {
				bob := s.introduce("bob")
				agent := s.connect("alice")
				agent.Send(test.frame) // before she has said who she is
				synctest.Wait()
				wantBadRequest(t, agent, test.uid)
				agent.WantNothing()
				s.wantFaults(map[telemetry.Reason]int{test.reason: 1})

				s.server.WantFrame(alice, agent.Say(1))
				agent.Send(test.frame)
				if test.uid == nil {
					wantBadRequest(t, agent, alice) // it was hers, then
				} else {
					wantBadRequest(t, agent, test.uid)
				}
				s.wantFaults(map[telemetry.Reason]int{test.reason: 2})
				s.server.WantFrame(alice, agent.Say(2)) // what comes after it counts
				s.server.WantFrame(bob.UID, bob.Say(2))
				require.Len(t, s.server.Received(alice), 2)
				require.Empty(t, s.server.Received(nil), "it was relayed")
			})
		})
	}

	t.Run("text", func(t *testing.T) {
		play(t, func(t *testing.T, s *stage) {
			agent := s.introduce("alice")
			agent.SendText("hello")
			wantBadRequest(t, agent, alice)
			agent.SendText(string(status))
			wantBadRequest(t, agent, alice)
			s.wantFaults(map[telemetry.Reason]int{telemetry.ReasonBadFrame: 2})
			s.server.WantFrame(alice, agent.Say(1))
		})
	})

	t.Run("in the agent's format", func(t *testing.T) {
		play(t, func(t *testing.T, s *stage) {
			agent := s.connect("alice")
			agent.Send(status[1:])
			s.server.WantFrame(alice, status[1:])
			agent.Send([]byte("garbage"))
			frame := agent.Next()
			require.NotZero(t, frame[0], "header")
		})
	})
}

// TestTooManyBadMessages closes the connection of an agent that sends nothing else, but late.
func TestTooManyBadMessages(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		alice, bob := s.introduce("alice"), s.introduce("bob")
		for range 5 { // a good one in between starts the count anew
			for range maxBadInRow - 1 {
				alice.Send([]byte("garbage"))
				wantBadRequest(t, alice, alice.UID)
			}
			s.server.WantFrame(alice.UID, alice.Say(1))
		}
		alice.WantConnected()
		for range 3 * maxBadInRow {
			alice.Send([]byte("garbage"))
		}
		alice.Say(2)
		start := time.Now()
		synctest.Wait()
		for range maxBadInRow {
			wantBadRequest(t, alice, alice.UID)
		}
		alice.WantNothing()
		alice.WantConnected()
		s.wantFault(telemetry.ReasonBadFrame, 5*(maxBadInRow-1)+maxBadInRow)
		s.server.WantFrame(bob.UID, bob.Say(1))
		_, err := alice.WantEnd(20 * time.Second)
		require.True(t, websocket.IsCloseError(err, websocket.CloseInvalidFramePayloadData), err)
		require.GreaterOrEqual(t, time.Since(start), 5*time.Second)
		require.LessOrEqual(t, time.Since(start), 15*time.Second)
		s.server.WantGoodbye(alice.UID)
	})
}

// TestOffenderCostsLittle has an agent come back whenever it is closed: the server is asked
// about it at most once per sweep.
func TestOffenderCostsLittle(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		begin := time.Now()
		for time.Since(begin) < 10*time.Minute {
			mallory := s.connect("mallory")
			mallory.Send(gatewaytest.Connect("1", "10.9.8.7:6", nil))
			_, err := mallory.WantEnd(time.Minute)
			require.True(t, websocket.IsCloseError(err, websocket.ClosePolicyViolation), err)
		}
		require.LessOrEqual(t, len(s.server.Questions()), 10*60/5)
	})
}

// TestBadQuestion has a gateway ask a question that cannot be read.
func TestBadQuestion(t *testing.T) {
	for _, body := range []string{"", "{}", `{"request_uid":7}`, "]", `{"request_uid":""}`} {
		t.Run(body, func(t *testing.T) {
			play(t, func(t *testing.T, s *stage) {
				gateway := s.connect("gateway", gatewaytest.ConnectionIDHeader, "upstream-0")
				gateway.Send(gatewaytest.Frame(&protobufs.AgentToServer{CustomMessage: &protobufs.CustomMessage{
					Capability: gatewaytest.GatewayCapability, Type: gatewaytest.ConnectType, Data: []byte(body),
				}}))
				s.wantFaults(map[telemetry.Reason]int{telemetry.ReasonBadConnect: 1})
				wantBadRequest(t, gateway, nil)
				gateway.WantConnected()
				require.Len(t, s.server.Questions(), 1)
				gateway.Send(gatewaytest.Connect("1", "10.9.8.7:6", nil))
				gateway.Next()
				require.Len(t, s.server.Questions(), 2)
			})
		})
	}
}

// TestPingFlood answers pings, and serves others meanwhile.
func TestPingFlood(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		alice, bob := s.introduce("alice"), s.introduce("bob")
		messages := s.counted("messages", "downstream")
		pings := strings.Repeat(string(gatewaytest.Fragment(true, websocket.PingMessage, true, nil)[:1])+"\x80\x00\x00\x00\x00", 1000)
		alice.StopReading() // the pongs
		alice.Say(1)
		go func() {
			for range 100 {
				alice.SendRaw([]byte(pings))
			}
		}()
		for sequence := range 100 {
			s.server.WantFrame(bob.UID, bob.Say(sequence))
		}
		alice.ReadOn()
		synctest.Wait()
		s.server.Next(alice.UID)
		s.server.WantFrame(alice.UID, alice.Say(2))
		require.Equal(t, messages, s.counted("messages", "downstream"))
		s.wantFaults(nil)
	})
}

// TestBrokenWebSocket has an agent, and then the server, break the rules of WebSockets.
func TestBrokenWebSocket(t *testing.T) {
	broken := []byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff}
	play(t, func(t *testing.T, s *stage) {
		alice, bob := s.introduce("alice"), s.introduce("bob")
		alice.SendRaw(broken)
		time.Sleep(5 * time.Second)
		alice.WantConnected() // or it would be back thousands of times a second
		alice.WantClosed(websocket.CloseProtocolError)
		s.server.WantGoodbye(alice.UID)
		s.wantFault(telemetry.ReasonBadFrame, 1)
		s.server.WantFrame(bob.UID, bob.Say(1))

		link := s.linkOf(bob)
		link.PushRaw(broken)
		link.WantEnd()
		s.server.WantLinks(3)
		bob.WantFullStateRequest()
		s.server.WantFrame(bob.UID, bob.Say(2))
	})
}

// TestSlowloris has 200 connections that never finish their request.
func TestSlowloris(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		begin := time.Now()
		ends := make(chan time.Time, 200)
		for range 200 {
			conn, err := s.net.Dial(t.Context(), "tcp", gatewayAddress)
			require.NoError(t, err)
			_, err = io.WriteString(conn, "GET /v1/opamp HTTP/1.1\r\nHost: gateway\r\n")
			require.NoError(t, err)
			go func() {
				_, _ = io.ReadAll(conn)
				conn.Close()
				ends <- time.Now()
			}()
		}
		s.crowd(10)
		for range 200 {
			require.LessOrEqual(t, (<-ends).Sub(begin), time.Minute)
		}
		require.Len(t, s.server.Questions(), 10)
	})
}

// TestFloodForNobody has the server send very much to agents that are not there.
func TestFloodForNobody(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		alice := s.introduce("alice")
		link := s.linkOf(alice)
		for i := range 5000 {
			link.Push(gatewaytest.Offer(gatewaytest.UID(fmt.Sprint("nobody ", i)), "x", 100))
		}
		link.Push(gatewaytest.Offer(alice.UID, "x", 100))
		alice.WantFrame(gatewaytest.Offer(alice.UID, "x", 100))
		s.wantFaults(map[telemetry.Reason]int{telemetry.ReasonServerUnknownUID: 5000})
		require.Less(t, len(s.logs.All()), 50)
	})
}
