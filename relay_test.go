package opampgateway

import (
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gorilla/websocket"
	"github.com/open-telemetry/opamp-go/protobufs"
	"github.com/stretchr/testify/require"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"
	"go.uber.org/zap"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/opampgateway/opampgateway/internal/gatewaytest"
	"github.com/opampgateway/opampgateway/internal/telemetry"
)

// TestRelayCaptures relays what real agents and servers said to each other.
func TestRelayCaptures(t *testing.T) {
	entries, err := os.ReadDir("testdata/captures")
	require.NoError(t, err)
	relayed := 0
	for _, entry := range entries {
		if !entry.IsDir() || entry.Name() == "gateway-upstream" {
			continue // the latter is TestRelayCaptureOfGateway's
		}
		relayed++
		t.Run(entry.Name(), func(t *testing.T) {
			play(t, func(_ *testing.T, s *stage) { relayCapture(s, "testdata/captures/"+entry.Name()) })
		})
	}
	require.Equal(t, 7, relayed)
}

func relayCapture(s *stage, directory string) {
	agent := s.connect("agent")
	links := s.server.WantLinks(3)
	known, up, down, unaddressed := false, 0, 0, 0
	for _, file := range captured(s.t, directory) {
		if file.up {
			message, err := gatewaytest.AgentToServer(file.frame)
			require.NoError(s.t, err)
			agent.Send(file.frame)
			s.server.WantFrame(message.InstanceUid, file.frame)
			known = true
			up++
			continue
		}
		message, err := gatewaytest.ServerToAgent(file.frame)
		require.NoError(s.t, err)
		link := links[down%len(links)] // whichever
		down++
		if message.InstanceUid == nil {
			link.Push(file.frame)
			unaddressed++
			continue
		}
		if !known { // a recording that begins with the server's word
			frame := gatewaytest.Status(message.InstanceUid, 0)
			agent.Send(frame)
			s.server.WantFrame(message.InstanceUid, frame)
			known = true
			up++
		}
		link.Push(file.frame)
		agent.WantFrame(file.frame)
	}
	require.NotZero(s.t, up)
	synctest.Wait()
	agent.WantNothing()
	s.wantFault(telemetry.ReasonServerNoUID, unaddressed)
	require.EqualValues(s.t, up, s.counted("messages", "upstream"))
	require.EqualValues(s.t, down-unaddressed, s.counted("messages", "downstream"))
}

// TestRelayCaptureOfGateway relays what another gateway and a server said to each other.
func TestRelayCaptureOfGateway(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		gateway := s.connect("gateway", gatewaytest.ConnectionIDHeader, "upstream-0")
		s.server.WantQuestion()
		s.server.OnConnect((*gatewaytest.Question).Silence)
		var link *gatewaytest.Link
		for _, file := range captured(t, "testdata/captures/gateway-upstream") {
			if !file.up {
				link.Push(file.frame)
				gateway.WantFrame(file.frame)
				continue
			}
			message, err := gatewaytest.AgentToServer(file.frame)
			require.NoError(t, err)
			gateway.Send(file.frame)
			if message.InstanceUid != nil {
				link = s.server.WantFrame(message.InstanceUid, file.frame)
				continue
			}
			question := s.server.WantQuestion()
			require.Equal(t, file.frame, question.Frame)
			link = question.Link
		}
		synctest.Wait()
		gateway.WantNothing()
		s.wantFaults(nil)
	})
}

type capturedFrame struct {
	up    bool
	frame []byte
}

func captured(t *testing.T, directory string) []capturedFrame {
	t.Helper()
	files, err := filepath.Glob(directory + "/*.bin")
	require.NoError(t, err)
	slices.Sort(files)
	var frames []capturedFrame
	for _, file := range files {
		frame, err := os.ReadFile(file)
		require.NoError(t, err)
		frames = append(frames, capturedFrame{up: strings.HasSuffix(file, "-up.bin"), frame: frame})
	}
	require.NotEmpty(t, frames)
	return frames
}

// TestRelayOrder has three agents and the server talk at once, without waiting for answers.
func TestRelayOrder(t *testing.T) {
	const n = 1000
	play(t, func(t *testing.T, s *stage) {
		agents := []*gatewaytest.Agent{s.introduce("alice"), s.introduce("bob"), s.introduce("cathy")}
		links := s.server.WantLinks(3)
		done := make(chan struct{})
		for i, a := range agents {
			go func() {
				for sequence := 1; sequence <= n; sequence++ {
					a.Say(sequence)
				}
				done <- struct{}{}
			}()
			go func() {
				for sequence := 1; sequence <= n; sequence++ {
					links[i].Push(gatewaytest.Offer(a.UID, fmt.Sprint(sequence), sequence%50))
				}
				done <- struct{}{}
			}()
		}
		for range 2 * len(agents) {
			<-done
		}
		for _, a := range agents {
			for sequence := 1; sequence <= n; sequence++ {
				s.server.WantFrame(a.UID, gatewaytest.Status(a.UID, sequence))
				a.WantFrame(gatewaytest.Offer(a.UID, fmt.Sprint(sequence), sequence%50))
			}
			s.server.WantNothing(a.UID)
			a.WantNothing()
		}
		require.EqualValues(t, 3*(n+1), s.counted("messages", "upstream"))
		require.EqualValues(t, 3*n, s.counted("messages", "downstream"))
		s.wantFaults(nil)
	})
}

// TestRelayAnyLink has the server speak to an agent over links that it is not attached to.
func TestRelayAnyLink(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		alice, bob := s.introduce("alice"), s.introduce("bob")
		for i, link := range s.server.WantLinks(3) {
			for _, a := range []*gatewaytest.Agent{alice, bob} {
				frame := gatewaytest.Offer(a.UID, fmt.Sprint(i), 100)
				link.Push(frame)
				a.WantFrame(frame)
			}
		}
		synctest.Wait()
		alice.WantNothing()
		bob.WantNothing()
	})
}

// TestRelayFormats relays frames that are not quite what opamp-go sends today, as they are.
func TestRelayFormats(t *testing.T) {
	uid, text := gatewaytest.UID("agent"), gatewaytest.TextUID("agent")
	unknownField := protowire.AppendString(protowire.AppendTag(nil, 5000, protowire.BytesType), "from the future")
	unknownNumber := protowire.AppendFixed64(protowire.AppendTag(nil, 31, protowire.Fixed64Type), 1)
	for _, test := range []struct {
		name     string
		uid      []byte
		up, down []byte
	}{
		{"today's", uid, gatewaytest.Status(uid, 1), gatewaytest.Offer(uid, "x", 9)},
		{"no header", uid, gatewaytest.Status(uid, 1)[1:], gatewaytest.Offer(uid, "x", 9)[1:]},
		{"text uid", text, gatewaytest.Status(text, 1), gatewaytest.Offer(text, "x", 9)},
		{"text uid, no header", text, gatewaytest.Status(text, 1)[1:], gatewaytest.Offer(text, "x", 9)[1:]},
		{"unknown fields", uid, slices.Concat([]byte{0}, unknownField, gatewaytest.Status(uid, 1)[1:], unknownNumber), slices.Concat(gatewaytest.Offer(uid, "x", 9), unknownNumber, unknownField)},
		{"uid alone", uid, gatewaytest.Frame(&protobufs.AgentToServer{InstanceUid: uid}), gatewaytest.Frame(&protobufs.ServerToAgent{InstanceUid: uid})},
		{"two uids, of which the last counts", uid, slices.Concat(gatewaytest.Status(gatewaytest.UID("mallory"), 1), gatewaytest.Status(uid, 1)[1:]), gatewaytest.Offer(uid, "x", 9)},
		{
			"custom message of others", uid,
			gatewaytest.Frame(&protobufs.AgentToServer{InstanceUid: uid, CustomMessage: &protobufs.CustomMessage{Capability: "com.example", Type: "connect", Data: []byte("{}")}}),
			gatewaytest.Frame(&protobufs.ServerToAgent{InstanceUid: uid, CustomMessage: &protobufs.CustomMessage{Capability: "com.example", Type: "connectResult", Data: []byte("{}")}}),
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			play(t, func(t *testing.T, s *stage) {
				agent := s.connect("agent")
				agent.Send(test.up)
				link := s.server.WantFrame(test.uid, test.up)
				link.Push(test.down)
				agent.WantFrame(test.down)
				s.wantFaults(nil)
			})
		})
	}
}

// TestRelayFragments joins what comes in pieces, with pings between them.
func TestRelayFragments(t *testing.T) {
	const binaryMessage, continuation, ping = 2, 0, 9
	inPieces := func(fromAgent bool, frame []byte) []byte {
		return slices.Concat(
			gatewaytest.Fragment(fromAgent, binaryMessage, false, frame[:1]),
			gatewaytest.Fragment(fromAgent, continuation, false, frame[1:10]),
			slices.Replace(gatewaytest.Fragment(fromAgent, ping, true, nil), 1, 10, map[bool]byte{true: 0x80}[fromAgent]),
			gatewaytest.Fragment(fromAgent, continuation, false, nil),
			gatewaytest.Fragment(fromAgent, continuation, true, frame[10:]))
	}
	play(t, func(t *testing.T, s *stage) {
		alice := s.connect("alice")
		report := gatewaytest.Report(alice.UID, 1, 10_000)
		alice.SendRaw(inPieces(true, report))
		link := s.server.WantFrame(alice.UID, report)
		offer := gatewaytest.Offer(alice.UID, "x", 100_000)
		link.PushRaw(inPieces(false, offer))
		alice.WantFrame(offer)
		s.wantFaults(nil)
	})
}

// TestRelayLarge relays messages up to the limit, and nothing above it.
func TestRelayLarge(t *testing.T) {
	t.Run("5 MiB", func(t *testing.T) {
		play(t, func(t *testing.T, s *stage) {
			alice, bob := s.introduce("alice"), s.introduce("bob")
			report, offer := gatewaytest.Report(alice.UID, 1, 5<<20), gatewaytest.Offer(alice.UID, "x", 5<<20)
			go alice.Send(report)
			link := s.server.WantFrame(alice.UID, report)
			go link.Push(offer)
			alice.WantFrame(offer)
			s.server.WantFrame(bob.UID, bob.Say(1))
			s.wantFaults(nil)
		})
	})

	const limit = 100_000
	lower := func(cfg *Config) { cfg.MaxMessageSize = limit }
	exactly := func(size int, frame func(size int) []byte) []byte {
		return frame(2*size - len(frame(size)))
	}
	report := func(uid []byte, size int) []byte {
		return exactly(size, func(size int) []byte { return gatewaytest.Report(uid, 1, size) })
	}
	offer := func(uid []byte, size int) []byte {
		return exactly(size, func(size int) []byte { return gatewaytest.Offer(uid, "x", size) })
	}

	t.Run("exactly the limit", func(t *testing.T) {
		play(t, func(t *testing.T, s *stage) {
			alice := s.introduce("alice")
			up, down := report(alice.UID, limit), offer(alice.UID, limit)
			require.Len(t, up, limit)
			require.Len(t, down, limit)
			go alice.Send(up)
			link := s.server.WantFrame(alice.UID, up)
			go link.Push(down)
			alice.WantFrame(down)
			s.wantFaults(nil)
		}, lower)
	})

	t.Run("above the limit from an agent", func(t *testing.T) {
		play(t, func(t *testing.T, s *stage) {
			alice, bob := s.introduce("alice"), s.introduce("bob")
			start := time.Now()
			go func() {
				alice.Send(report(alice.UID, limit+1))
				alice.Say(2)
			}()
			s.wantFault(telemetry.ReasonTooLarge, 1)
			alice.WantConnected() // it is closed late, so that it does not come back at once
			s.server.WantFrame(bob.UID, bob.Say(1))
			_, err := alice.WantEnd(20 * time.Second)
			require.True(t, websocket.IsCloseError(err, websocket.CloseMessageTooBig), err)
			require.GreaterOrEqual(t, time.Since(start), 5*time.Second)
			require.LessOrEqual(t, time.Since(start), 15*time.Second)
			s.server.WantGoodbye(alice.UID)
			s.server.WantNothing(alice.UID)
			s.wantFaults(map[telemetry.Reason]int{telemetry.ReasonTooLarge: 1, telemetry.ReasonFrameLost: 1})
		}, lower)
	})

	t.Run("above the limit from the server", func(t *testing.T) {
		play(t, func(t *testing.T, s *stage) {
			alice := s.introduce("alice")
			link, next := s.linkOf(alice), gatewaytest.Offer(alice.UID, "next", 10)
			go func() {
				link.Push(offer(alice.UID, limit+1))
				link.Push(offer(alice.UID, 50*limit))
				link.Push(next)
			}()
			alice.WantFrame(next)
			s.wantFaults(map[telemetry.Reason]int{telemetry.ReasonServerTooLarge: 2})
			require.True(t, link.Open())
		}, lower)
	})
}

// TestRelayNobody drops what the server says to nobody, or to somebody who is not there.
func TestRelayNobody(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		alice := s.introduce("alice")
		link := s.linkOf(alice)
		link.Push(gatewaytest.Offer(gatewaytest.UID("bob"), "x", 10))
		s.wantFault(telemetry.ReasonServerUnknownUID, 1)

		link.Push([]byte{0}) // to keep the connection alive
		s.wantFaults(map[telemetry.Reason]int{telemetry.ReasonServerUnknownUID: 1})

		for range 3 {
			link.Push(gatewaytest.Offer(nil, "x", 10))
		}
		s.wantFault(telemetry.ReasonServerNoUID, 3)
		require.Len(t, s.logged(zap.WarnLevel, "without instance_uid"), 1)

		link.Push([]byte{0, 0xff})
		link.Push([]byte("\x00\x0a\x10too short"))
		link.PushText("hello")
		s.wantFault(telemetry.ReasonServerBadFrame, 3)

		next := gatewaytest.Offer(alice.UID, "next", 10)
		link.Push(next)
		alice.WantFrame(next)
		synctest.Wait()
		alice.WantNothing()
	})
}

// TestManyUIDs has one connection speak for several agents, as a terminating proxy does.
func TestManyUIDs(t *testing.T) {
	const maxUIDs = 64
	uid := func(i int) []byte { return gatewaytest.UID(fmt.Sprintf("agent %d", i)) }

	t.Run("each is found", func(t *testing.T) {
		play(t, func(t *testing.T, s *stage) {
			proxy := s.connect("proxy")
			for round := range 3 {
				for i := range maxUIDs {
					frame := gatewaytest.Status(uid(i), round)
					proxy.Send(frame)
					link := s.server.WantFrame(uid(i), frame)
					answer := gatewaytest.Offer(uid(i), fmt.Sprint(round), 10)
					link.Push(answer)
					proxy.WantFrame(answer)
				}
			}
			s.wantFaults(nil)
			proxy.Vanish()
			for i := range maxUIDs {
				s.server.WantGoodbye(uid(i))
			}
		})
	})

	t.Run("one too many", func(t *testing.T) {
		play(t, func(t *testing.T, s *stage) {
			proxy := s.connect("proxy")
			for i := range maxUIDs + 1 {
				proxy.Send(gatewaytest.Status(uid(i), 0))
			}
			s.wantFaults(map[telemetry.Reason]int{telemetry.ReasonTooManyUIDs: 1})
			require.Empty(t, s.server.Received(uid(maxUIDs)))
			wantBadRequest(t, proxy, uid(maxUIDs))
			time.Sleep(time.Minute)
			s.server.Next(uid(7))
			proxy.Send(gatewaytest.Status(uid(7), 1))
			s.server.WantFrame(uid(7), gatewaytest.Status(uid(7), 1))
		})
	})

	t.Run("those who said goodbye do not count", func(t *testing.T) {
		play(t, func(t *testing.T, s *stage) {
			proxy := s.connect("proxy")
			for i := range 3 * maxUIDs {
				proxy.Send(gatewaytest.Status(uid(i), 0))
				proxy.Send(gatewaytest.Goodbye(uid(i)))
				s.server.Next(uid(i))
				link := s.server.WantGoodbye(uid(i)).Link
				answer := gatewaytest.Offer(uid(i), "bye", 10)
				link.Push(answer)
				proxy.WantFrame(answer)
			}
			s.wantFaults(nil)
		})
	})
}

// TestOneUIDTwice has one instance UID in use on two connections: the one that spoke last
// gets the answers.
func TestOneUIDTwice(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		alice := s.introduce("alice")
		clone := s.connect("alice")
		links := s.server.WantLinks(3)
		serial := 0
		wantAnswered := func(who *gatewaytest.Agent) {
			t.Helper()
			for _, link := range links {
				serial++
				frame := gatewaytest.Offer(alice.UID, fmt.Sprint(serial), 10)
				link.Push(frame)
				who.WantFrame(frame)
			}
			synctest.Wait()
			alice.WantNothing()
			clone.WantNothing()
		}
		wantAnswered(alice) // the clone has said nothing yet

		clone.Say(1)
		s.server.Next(alice.UID)
		wantAnswered(clone)
		s.wantFault(telemetry.ReasonUIDConflict, 1)

		alice.Say(2)
		s.server.Next(alice.UID)
		wantAnswered(alice)
		s.wantFault(telemetry.ReasonUIDConflict, 2)

		alice.Vanish()
		synctest.Wait()
		wantAnswered(clone)
		s.server.WantNothing(alice.UID) // no goodbye: the clone is still there

		clone.Vanish()
		s.server.WantGoodbye(alice.UID)
		s.server.WantNothing(alice.UID)
	})

	t.Run("or more often", func(t *testing.T) {
		play(t, func(t *testing.T, s *stage) {
			var clones []*gatewaytest.Agent
			for range 4 {
				clones = append(clones, s.connect("alice"))
			}
			uid := clones[0].UID
			for i := range 8 { // in the end, the last has spoken last
				clones[i%4].Say(i)
				s.server.Next(uid)
			}
			s.wantConsistent()
			for i, clone := range slices.Backward(clones) {
				frame := gatewaytest.Offer(uid, fmt.Sprint(i), 10)
				s.server.Links()[0].Push(frame)
				clone.WantFrame(frame)
				s.server.WantNothing(uid)
				clone.Vanish()
				synctest.Wait()
			}
			s.server.WantGoodbye(uid)
		})
	})
}

// TestNewUID has the server give an agent a new instance UID.
func TestNewUID(t *testing.T) {
	renamed := func(uid, to []byte) []byte {
		return gatewaytest.Frame(&protobufs.ServerToAgent{InstanceUid: uid, AgentIdentification: &protobufs.AgentIdentification{NewInstanceUid: to}})
	}

	t.Run("is known before and after it is used", func(t *testing.T) {
		play(t, func(t *testing.T, s *stage) {
			alice := s.introduce("alice")
			wanda := gatewaytest.UID("wanda")
			links := s.server.WantLinks(3)
			links[0].Push(renamed(alice.UID, wanda))
			alice.WantFrame(renamed(alice.UID, wanda))
			for _, uid := range [][]byte{wanda, alice.UID, wanda} {
				links[1].Push(gatewaytest.Offer(uid, "before", 10))
				alice.WantFrame(gatewaytest.Offer(uid, "before", 10))
			}
			alice.Send(gatewaytest.Status(wanda, 1))
			s.server.WantFrame(wanda, gatewaytest.Status(wanda, 1))
			links[2].Push(gatewaytest.Offer(wanda, "after", 10))
			alice.WantFrame(gatewaytest.Offer(wanda, "after", 10))
			links[2].Push(gatewaytest.Offer(alice.UID, "to the old one", 10))
			alice.WantFrame(gatewaytest.Offer(alice.UID, "to the old one", 10))
			s.wantFaults(nil)

			alice.Vanish()
			s.server.WantGoodbye(wanda)
			s.server.WantNothing(alice.UID) // it ended without a word
		})
	})

	t.Run("is not said goodbye for before it is used", func(t *testing.T) {
		play(t, func(t *testing.T, s *stage) {
			alice := s.introduce("alice")
			wanda := gatewaytest.UID("wanda")
			s.server.WantLinks(3)[0].Push(renamed(alice.UID, wanda))
			alice.Next()
			alice.Vanish()
			s.server.WantGoodbye(alice.UID)
			synctest.Wait()
			s.server.WantNothing(wanda)
		})
	})

	t.Run("may be nonsense", func(t *testing.T) {
		play(t, func(t *testing.T, s *stage) {
			alice := s.introduce("alice")
			for _, uid := range [][]byte{nil, []byte("short"), alice.UID} {
				frame := renamed(alice.UID, uid)
				s.server.WantLinks(3)[0].Push(frame)
				alice.WantFrame(frame)
			}
			s.server.WantFrame(alice.UID, alice.Say(1))
			s.wantFaults(nil)
		})
	})
}

// TestMetrics counts connections and messages, and measures how long messages take.
func TestMetrics(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		alice, bob := s.introduce("alice"), s.introduce("bob")
		require.EqualValues(t, 3, s.counted("connections", "upstream"))
		require.EqualValues(t, 2, s.counted("connections", "downstream"))
		frame := gatewaytest.Offer(alice.UID, "x", 1000)
		s.linkOf(alice).Push(frame)
		alice.WantFrame(frame)
		// alice and bob introduced themselves, alice once more for linkOf. Questions do not count.
		up := len(gatewaytest.Status(alice.UID, 0)) + len(gatewaytest.Status(bob.UID, 0)) + len(gatewaytest.Status(alice.UID, 1000))
		require.EqualValues(t, 3, s.counted("messages", "upstream"))
		require.EqualValues(t, up, s.counted("messages.bytes", "upstream"))
		require.EqualValues(t, 1, s.counted("messages", "downstream"))
		require.EqualValues(t, len(frame), s.counted("messages.bytes", "downstream"))
		s.wantLatencies("upstream", 1, 0) // all at the same moment

		// A server that does not read has messages wait.
		link := s.linkOf(bob)
		link.StopReading()
		for sequence := range 3 {
			bob.Send(gatewaytest.Report(bob.UID, sequence, gatewaytest.BufferSize))
			time.Sleep(time.Second)
		}
		link.ReadOn()
		synctest.Wait()
		s.wantLatencies("upstream", 3, 2*time.Second)

		bob.SayGoodbye()
		require.EqualValues(t, 1, s.counted("connections", "downstream"))
		s.server.OnUpgrade(func(*http.Request) *gatewaytest.Refusal {
			return &gatewaytest.Refusal{Status: http.StatusServiceUnavailable}
		})
		s.server.WantLinks(3)[0].Reset()
		require.EqualValues(t, 2, s.counted("connections", "upstream"), "a link that is down is no connection")
	})
}

// wantLatencies checks how many messages were measured, and the longest.
func (r *running) wantLatencies(direction string, n int, longest time.Duration) {
	r.t.Helper()
	synctest.Wait()
	metric, err := r.metrics.GetMetric("otelcol_opampgateway.messages.latency")
	require.NoError(r.t, err)
	require.Equal(r.t, "ms", metric.Unit)
	for _, point := range metric.Data.(metricdata.Histogram[float64]).DataPoints {
		if value, _ := point.Attributes.Value("direction"); value.AsString() == direction {
			require.EqualValues(r.t, n, point.Count)
			most, _ := point.Max.Value()
			require.InDelta(r.t, longest.Milliseconds(), most, 1)
			return
		}
	}
	require.Fail(r.t, "no latencies measured")
}
