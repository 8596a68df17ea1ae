package e2e

import (
	"fmt"
	"hash/crc32"
	"math/rand/v2"
	"net/http"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/gorilla/websocket"
	"github.com/open-telemetry/opamp-go/protobufs"
	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/proto"

	"github.com/opampgateway/opampgateway/e2e/fault"
)

// openLine opens a line to address until the end of the test.
func openLine(t *testing.T, address string) *fault.Line {
	t.Helper()
	line, err := fault.Open(address)
	require.NoError(t, err)
	t.Cleanup(line.Close)
	return line
}

// lineOf returns the connection that carries a link.
func lineOf(t *testing.T, line *fault.Line, l *FleetLink) *fault.Conn {
	t.Helper()
	for _, c := range line.Conns() {
		if c.Source() == l.ws.RemoteAddr().String() {
			return c
		}
	}
	t.Fatalf("no connection carries %s", l.name)
	return nil
}

// behindLine starts a server, a line to it and a gateway before that, and waits for three links.
func behindLine(t *testing.T, opts fleetServerOptions, edits ...func(config)) (*FleetServer, *fault.Line, *Gateway) {
	t.Helper()
	server := startFleetServer(t, opts)
	line := openLine(t, server.address)
	gateway := startGateway(t, "ws://"+line.Address()+"/v1/opamp", edits...)
	gateway.wantLinks(t, 3)
	return server, line, gateway
}

// settledFleet starts a fleet and waits until the server knows all of it.
func settledFleet(t *testing.T, n int, server *FleetServer, gateway *Gateway) *Fleet {
	t.Helper()
	fleet := startFleet(t, n, gateway.url(), 100)
	fleet.wantConnected(t, ceiling, 1)
	server.wantKnown(t, fleet.agents, ceiling)
	return fleet
}

// keepAlive sets that of server or agents.
func keepAlive(whose, interval, timeout string) func(config) {
	return func(c config) {
		c.gateway(whose+"::keep_alive", map[string]any{"interval": interval, "timeout": timeout})
	}
}

// drops are the ways in which a link can be.
var drops = []struct {
	name string
	drop func(*testing.T, *fault.Conn, *FleetLink)
}{
	{"reset", func(_ *testing.T, c *fault.Conn, _ *FleetLink) { c.Reset() }},
	{"finish", func(_ *testing.T, c *fault.Conn, _ *FleetLink) { c.Finish() }},
	{"close frame", func(t *testing.T, _ *fault.Conn, l *FleetLink) { l.sayClose(t) }},
}

// One of three links is dropped, in all ways there are, while 300 agents talk. Not parallel:
// its subject is speed.
func TestLinkDropped(t *testing.T) {
	const (
		agents = 300
		goal   = 2 * time.Second // until all are reachable again
		limit  = 5 * time.Second // on a busy machine
		// oneWrite is how many messages at most are in the write that a drop cuts short.
		oneWrite = 16 << 10 / 24
	)
	for _, how := range drops {
		t.Run(how.name, func(t *testing.T) {
			server, line, gateway := behindLine(t, fleetServerOptions{})
			fleet := settledFleet(t, agents, server, gateway)
			stop := fleet.talk(t, 50*time.Millisecond)
			eventually(t, func() string {
				if n := fleet.said(); n < 20*agents {
					return fmt.Sprintf("the agents have said %d messages", n)
				}
				return ""
			})
			lost := server.open()[1]
			concerned := server.at(lost, fleet.agents)
			require.Len(t, concerned, agents/3)

			dropped := time.Now()
			how.drop(t, lineOf(t, line, lost), lost)
			server.wantReachable(t, fleet.agents, limit)
			t.Logf("all were reachable %s after the drop; the goal is %s", time.Since(dropped), goal)

			// The server hears anew all about those whose messages the link may have taken along.
			server.wantState(t, concerned, dropped, lost)
			stop()
			server.wantHeard(t, fleet.agents, ceiling)
			repeated, missing := server.wantHistory(t, fleet.agents)
			t.Logf("messages repeated: %d, missing: %d", repeated, missing)
			require.LessOrEqual(t, repeated, uint64(oneWrite))
			if how.name == "close frame" {
				require.Zero(t, repeated+missing, "messages repeated or missing, although the server has read to the end")
			}
			for _, a := range fleet.agents {
				again := 0
				if slices.Contains(concerned, a) {
					again = 1
				}
				k := server.record(a)
				require.Equal(t, 1+again, k.asked, "questions about agent %s", a.uid)
				require.Equal(t, again == 1, k.link != k.said[0].link, "only agents that have lost their link get another: %s", server.story(a))
				a.mu.Lock()
				require.Equal(t, again, a.asked, "requests for the full state of agent %s", a.uid)
				a.mu.Unlock()
			}
			fleet.wantUndisturbed(t)
		})
	}
}

// A link is dropped on which nothing moved, with all that waited for it in the gateway.
func TestStalledLinkDropped(t *testing.T) {
	t.Parallel()
	const agents, each, size = 9, 100, 256 << 10 // much more than the kernel takes
	for _, how := range drops {
		t.Run(how.name, func(t *testing.T) {
			t.Parallel()
			server, line, gateway := behindLine(t, fleetServerOptions{})
			fleet := settledFleet(t, agents, server, gateway)
			lost := server.open()[1]
			concerned := server.at(lost, fleet.agents)
			require.Len(t, concerned, agents/3)
			server.stopReading()
			var talking sync.WaitGroup
			talking.Go(func() { fleet.sayAll(each, size) })
			wantStill(t, time.Second, "what the agents have said", fleet.said)

			dropped := time.Now()
			how.drop(t, lineOf(t, line, lost), lost)
			gateway.wantLog(t, "lost connection to the server", lost.name)
			server.startReading()
			talking.Wait()
			server.wantState(t, concerned, dropped, lost)
			server.wantReachableAnew(t, fleet)
			server.wantHeard(t, fleet.agents, ceiling)
			repeated, missing := server.wantHistory(t, fleet.agents)
			t.Logf("messages repeated: %d, missing: %d", repeated, missing)
			require.LessOrEqual(t, repeated, uint64(1), "messages repeated; the write that the drop cut short was of one")
			if how.name == "close frame" {
				require.Zero(t, missing, "messages missing, although the server has read to the end")
			}
			fleet.wantUndisturbed(t)
		})
	}
}

// A server that notices the end of a link late marks its agents as gone although they have
// spoken elsewhere since. The gateway asks them for their state once more, about a minute and a
// half after: that is how long this takes.
func TestServerForgetsLate(t *testing.T) {
	t.Parallel()
	server, line, gateway := behindLine(t, fleetServerOptions{forgetAfter: 10 * time.Second})
	fleet := settledFleet(t, 30, server, gateway)
	lost := server.open()[1]
	concerned := server.at(lost, fleet.agents)
	require.Len(t, concerned, 10)

	dropped := time.Now()
	lineOf(t, line, lost).Reset()
	server.wantState(t, concerned, dropped, lost)
	server.wantReachable(t, fleet.agents, ceiling)
	eventually(t, func() string {
		for _, a := range concerned {
			if server.record(a).link != nil {
				return "the server has not yet forgotten agent " + a.uid.String()
			}
		}
		return ""
	})
	forgot := time.Now()
	require.Less(t, forgot.Sub(dropped), 50*time.Second, "the agents must not have been asked again before")

	server.wantKnown(t, fleet.agents, 2*time.Minute)
	t.Logf("the server knew all agents again %s after the drop, %s after it had forgotten them", time.Since(dropped), time.Since(forgot))
	server.wantReachable(t, fleet.agents, ceiling)
	for _, a := range concerned {
		a.mu.Lock()
		require.Equal(t, 2, a.asked, "requests for the full state of agent %s", a.uid)
		a.mu.Unlock()
	}
	fleet.wantUndisturbed(t)
}

// away has the server gone for 5 s, while each agent says n things. It returns how long after
// its return all agents were reachable.
func away(t *testing.T, server *FleetServer, gateway *Gateway, fleet *Fleet, n int, limit time.Duration) time.Duration {
	t.Helper()
	server.wantHeard(t, fleet.agents, ceiling) // so nothing is on the way that the server takes with it
	left := time.Now()
	server.stop()
	for _, name := range upstream(3) {
		gateway.wantLog(t, "lost connection to the server", name)
	}
	fleet.sayAll(n, 0)
	throughout(t, 5*time.Second-time.Since(left), func() string {
		if connected := fleet.connected(); connected < len(fleet.agents) {
			return fmt.Sprintf("only %d agents are still connected", connected)
		}
		return ""
	})
	server.start(t)
	took := server.wantReachable(t, fleet.agents, limit)

	server.wantHeard(t, fleet.agents, ceiling)
	repeated, missing := server.wantHistory(t, fleet.agents)
	require.Zero(t, repeated+missing, "messages repeated or missing; all were said while there was no server")
	server.wantKnown(t, fleet.agents, ceiling)
	var load []int
	for _, l := range server.open() {
		load = append(load, len(server.at(l, fleet.agents)))
	}
	t.Logf("agents on the links: %v", load)
	require.Len(t, load, 3)
	require.LessOrEqual(t, slices.Max(load)-slices.Min(load), len(fleet.agents)/10, "the spread of the agents: %v", load)
	fleet.wantUndisturbed(t)
	return took
}

// The server is gone for 5 s. Not parallel: its subject is speed.
func TestServerAway(t *testing.T) {
	server := startFleetServer(t, fleetServerOptions{})
	gateway := startGateway(t, server.url())
	gateway.wantLinks(t, 3)
	fleet := settledFleet(t, 300, server, gateway)
	took := away(t, server, gateway, fleet, 3, 10*time.Second)
	t.Logf("all were reachable %s after the server's return; the goal is 5s", took)
}

// The server stays away for longer than the grace period: agents are let go one after the
// other, and new ones are told to come again later.
func TestGraceOver(t *testing.T) {
	t.Parallel()
	const agents, grace = 100, 5 * time.Second
	server := startFleetServer(t, fleetServerOptions{})
	gateway := startGateway(t, server.url(), func(c config) { c.gateway("server::grace_period", grace.String()) })
	gateway.wantLinks(t, 3)
	fleet := settledFleet(t, agents, server, gateway)

	left := time.Now()
	server.stop()
	eventually(t, func() string { // they come again at once, and are refused
		if refused := fleet.refusals()[http.StatusServiceUnavailable]; refused < agents {
			return fmt.Sprintf("%d agents have been refused; %s", refused, fleet)
		}
		return ""
	})
	early, first, last := 0, time.Hour, time.Duration(0)
	waits := map[int]bool{}
	for _, a := range fleet.agents {
		a.mu.Lock()
		end, refused := a.ends[0], a.refusals[0]
		a.mu.Unlock()
		require.Zero(t, end.code, "the end of agent %s has a close frame: %v", a.uid, end.err)
		after := end.at.Sub(left)
		first, last = min(first, after), max(last, after)
		if after < grace+grace/4 {
			early++
		}
		require.Equal(t, http.StatusServiceUnavailable, refused.status, "%v", refused.err)
		wait, err := strconv.Atoi(refused.retryAfter)
		require.NoError(t, err)
		require.GreaterOrEqual(t, wait, 30)
		require.LessOrEqual(t, wait, 60)
		waits[wait] = true
	}
	t.Logf("agents were let go from %s to %s after the server had left, %d in the first half of that time", first, last, early)
	require.GreaterOrEqual(t, first, grace)
	require.Less(t, last, grace*3/2+5*time.Second)
	require.Greater(t, early, agents/10)
	require.Less(t, early, agents*9/10)
	require.Greater(t, len(waits), 5, "they are not told to come again all at once: %v", waits)
}

// Agents that come while the server is away for a moment wait for it.
func TestArrivalWhileServerIsAway(t *testing.T) {
	t.Parallel()
	server := startFleetServer(t, fleetServerOptions{})
	gateway := startGateway(t, server.url())
	gateway.wantLinks(t, 3)
	server.stop()
	for _, name := range upstream(3) {
		gateway.wantLog(t, "lost connection to the server", name)
	}
	fleet := startFleet(t, 100, gateway.url(), 100)
	throughout(t, 3*time.Second, func() string {
		if fleet.connected() > 0 {
			return "agents were let in without the server"
		}
		return ""
	})
	server.start(t)
	back := time.Now()
	last := fleet.wantConnected(t, ceiling, 1)
	t.Logf("the last was let in %s after the server's return", last.Sub(back))
	server.wantKnown(t, fleet.agents, ceiling)
	server.wantReachable(t, fleet.agents, ceiling)
	fleet.wantUndisturbed(t)
}

// Nothing moves on a link any more, and nobody says so. It takes up to 25 s to notice.
func TestBlackHoledLink(t *testing.T) {
	t.Parallel()
	server, line, gateway := behindLine(t, fleetServerOptions{})
	fleet := settledFleet(t, 60, server, gateway)
	lost := server.open()[1]
	concerned := server.at(lost, fleet.agents)
	require.Len(t, concerned, 20)

	dark := time.Now()
	lineOf(t, line, lost).Hold()
	fleet.sayAll(1, 0) // what the kernel takes for the link is lost
	gateway.wantLog(t, "no sign of life from the server", lost.name)
	took := time.Since(dark)
	t.Logf("noticed after %s; the goal is 25s", took)
	require.Less(t, took, 30*time.Second)
	require.Greater(t, took, 15*time.Second)
	t.Logf("all were reachable %s after that", server.wantReachable(t, fleet.agents, ceiling))
	server.wantState(t, concerned, dark, lost)
	server.wantHeard(t, fleet.agents, ceiling)
	server.wantHistory(t, fleet.agents)
	require.Contains(t, server.open(), lost, "the server has not heard of the link's end")
	require.Len(t, gateway.log.with("no sign of life"), 1)
	fleet.wantUndisturbed(t)
}

// An agent in a black hole is closed, which takes up to 75 s; one that has nothing to say,
// but answers pings, stays.
func TestBlackHoledAgent(t *testing.T) {
	t.Parallel()
	server := startServer(t, serverOptions{})
	gateway := startGateway(t, server.url())
	gateway.wantLinks(t, 3)
	line := openLine(t, gateway.address)
	alice := connectRaw(t, "ws://"+line.Address()+"/v1/opamp", nil)
	quiet := connectRaw(t, gateway.url(), nil)
	for _, a := range []*rawAgent{alice, quiet} {
		a.send(t, &protobufs.AgentToServer{SequenceNum: 1})
		server.wantAgent(t, a.uid, "is connected", func(k Known) bool { return k.Connected })
	}

	dark := time.Now()
	conn := line.Conns()[0]
	conn.Hold()
	within(t, 80*time.Second, func() string {
		if len(gateway.log.with("no sign of life", clientAt(conn.Source()))) == 0 {
			return "the gateway has not noticed that alice is gone"
		}
		return ""
	})
	took := time.Since(dark)
	t.Logf("noticed after %s; the goal is 75s", took)
	require.Greater(t, took, 55*time.Second)
	require.Len(t, gateway.log.with("no sign of life"), 1)
	quiet.wantOpen(t)
	server.tell(t, quiet.uid, "still there?")
	quiet.wantMessage(t, "from the server", func(m *protobufs.ServerToAgent) bool {
		return string(m.GetCustomMessage().GetData()) == "still there?"
	})
	require.False(t, server.known(alice.uid).Goodbye, "whoever fell silent may be elsewhere")
}

// An agent sends the largest message there is over a line so slow that it takes several times
// the keep-alive's timeout, and answers no pings meanwhile.
func TestSlowLargeMessage(t *testing.T) {
	t.Parallel()
	const size, speed = 64 << 20, 6 << 20 // bytes, and bytes a second
	server := startFleetServer(t, fleetServerOptions{})
	gateway := startGateway(t, server.url(), keepAlive("agents", "1s", "3s"))
	gateway.wantLinks(t, 3)
	line := openLine(t, gateway.address)
	line.Slow(speed)

	alice := &FleetAgent{uid: uuid.New()}
	ws, _, err := dialRaw("ws://"+line.Address()+"/v1/opamp", http.Header{"Agent-ID": {alice.uid.String()}}, nil)
	require.NoError(t, err)
	ws.SetPingHandler(func(string) error { return nil })
	var reading sync.WaitGroup
	pushes := make(chan struct{}, 100)
	reading.Go(func() { // until the end of the connection
		for {
			if _, _, err := ws.ReadMessage(); err != nil {
				return
			}
			pushes <- struct{}{}
		}
	})
	defer reading.Wait()
	defer ws.Close()

	data := make([]byte, size)
	for i := range data {
		data[i] = byte(rand.Uint32())
	}
	m := &protobufs.AgentToServer{InstanceUid: alice.uid[:], SequenceNum: 1, CustomMessage: &protobufs.CustomMessage{Capability: chat, Type: "says", Data: data}}
	m.CustomMessage.Data = data[:size-1-(proto.Size(m)-size)] // with all that is around it, the largest allowed
	frame, err := proto.MarshalOptions{}.MarshalAppend([]byte{0}, m)
	require.NoError(t, err)
	require.Len(t, frame, size)
	start := time.Now()
	require.NoError(t, ws.SetWriteDeadline(start.Add(2*ceiling)))
	require.NoError(t, ws.WriteMessage(websocket.BinaryMessage, frame))
	eventually(t, func() string {
		if len(server.record(alice).said) == 0 {
			return "the message has not arrived"
		}
		return ""
	})
	took := time.Since(start)
	t.Logf("it took %s; the gateway uses %s", took, gateway.usage(t))
	require.Greater(t, took, 9*time.Second, "three times the timeout")
	arrived := server.record(alice).said[0]
	require.Equal(t, size, arrived.size)
	require.Equal(t, crc32.ChecksumIEEE(m.GetCustomMessage().GetData()), arrived.sum)
	require.Empty(t, gateway.log.with("no sign of life"))
	require.NotNil(t, server.push(alice.uid, 1, nil))
	select {
	case <-pushes:
	case <-time.After(ceiling):
		t.Fatal("the server's push has not reached the agent")
	}
}

// The server reads no further. As long as it gives a sign of life, its links stay; else they
// are replaced, again and again. Either way agents wait, however long, and memory stays bounded.
func TestServerStopsReading(t *testing.T) {
	t.Parallel()
	const agents, each, size = 20, 30, 1 << 20
	const enough = (256 + 150) << 20 // bytes of messages, and of all else
	server := startFleetServer(t, fleetServerOptions{})
	gateway := startGateway(t, server.url(), keepAlive("server", "1s", "4s"), keepAlive("agents", "1s", "3s"))
	gateway.wantLinks(t, 3)
	fleet := settledFleet(t, agents, server, gateway)

	for _, test := range []struct {
		name  string
		alive bool
	}{{"alive", true}, {"silent", false}} {
		passed := t.Run(test.name, func(t *testing.T) {
			server.wantHeard(t, fleet.agents, ceiling)
			links, said := server.open(), fleet.said()
			server.stopReading()
			var talking sync.WaitGroup
			talking.Go(func() { fleet.sayAll(each, size) })
			lost := func() int { return len(gateway.log.with("lost connection to the server")) }
			before := lost()
			throughout(t, 12*time.Second, func() string { // four times as long as a silent agent is borne
				if test.alive {
					for _, l := range links {
						l.ping()
					}
				}
				if test.alive && lost() > before {
					return "a link was given up although the server shows signs of life"
				}
				if n := fleet.connected(); n < agents {
					return fmt.Sprintf("only %d agents are still connected: %s; the gateway says %q", n, fleet, gateway.log.with("from agent"))
				}
				if now := gateway.usage(t); now.peak > enough {
					return fmt.Sprintf("the gateway uses %s", now)
				}
				return ""
			})
			said = fleet.said() - said
			require.Less(t, said, uint64(agents*each*3/4), "messages that agents could get rid of; the others have to wait")
			if !test.alive {
				require.GreaterOrEqual(t, lost(), before+3, "the silent links are replaced")
				gateway.wantLog(t, "no sign of life from the server")
			}
			t.Logf("the gateway uses %s; the agents got rid of %d messages of %d", gateway.usage(t), said, agents*each)

			server.startReading()
			talking.Wait()
			server.wantReachableAnew(t, fleet)
			fleet.wantUndisturbed(t)
			server.wantHeard(t, fleet.agents, ceiling)
			repeated, missing := server.wantHistory(t, fleet.agents)
			t.Logf("messages repeated: %d, missing: %d", repeated, missing)
			if test.alive {
				require.Zero(t, repeated+missing, "messages repeated or missing")
			}
			// What the kernel had taken on the gateway's side goes with a link, up to 4 MiB.
			require.LessOrEqual(t, missing, uint64(3*5), "messages missing")
		})
		if !passed {
			return // the server may still not read
		}
	}
}

// A link dies while agents wait to be let in: the server is asked again, on another link.
func TestLinkLostDuringAdmission(t *testing.T) {
	t.Parallel()
	server, line, gateway := behindLine(t, fleetServerOptions{})
	server.stopAnswering()
	fleet := startFleet(t, 30, gateway.url(), 30)
	wantAsked := func(n int) {
		t.Helper()
		eventually(t, func() string {
			if asked := server.asked(); asked != n {
				return fmt.Sprintf("the server was asked %d times, want %d", asked, n)
			}
			return ""
		})
	}
	wantAsked(30)
	lost := server.open()[1]
	lineOf(t, line, lost).Reset()
	wantAsked(40)
	require.Zero(t, fleet.connected())
	server.startAnswering()
	fleet.wantConnected(t, ceiling, 1)
	server.wantKnown(t, fleet.agents, ceiling)
	server.wantReachable(t, fleet.agents, ceiling)
	server.wantHistory(t, fleet.agents)

	// The same with all links at once.
	server.stopAnswering()
	more := startFleet(t, 30, gateway.url(), 30)
	wantAsked(70)
	server.stop()
	server.start(t)
	wantAsked(70 + 30 + 30) // those waiting, and those who are in
	server.startAnswering()
	for _, f := range []*Fleet{fleet, more} {
		f.wantConnected(t, ceiling, 1)
		server.wantKnown(t, f.agents, ceiling)
		server.wantReachable(t, f.agents, ceiling)
		server.wantHistory(t, f.agents)
		f.wantUndisturbed(t)
	}
}

// A link ends each time right after it came up: it is dialed less and less often, and agents
// that are attached to it in between get another one.
func TestFlappingLink(t *testing.T) {
	t.Parallel()
	var steady atomic.Bool
	server := startFleetServer(t, fleetServerOptions{takeLink: func(name string, _ int) linkAnswer {
		return linkAnswer{drop: name == "upstream-0" && !steady.Load()}
	}})
	gateway := startGateway(t, server.url())
	fleet := settledFleet(t, 30, server, gateway)
	stop := fleet.talk(t, 100*time.Millisecond)
	var dialed []time.Time
	eventually(t, func() string {
		if dialed = server.dialed("upstream-0"); len(dialed) < 7 {
			return fmt.Sprintf("the link was dialed %d times", len(dialed))
		}
		return ""
	})
	// The first time it is dialed again at once, then after 0.5 s and ever more, by half. The
	// jitter takes half of each at most; a busy machine may take some more.
	var gaps []time.Duration
	nominal := 500 * time.Millisecond
	for i := 2; i < 7; i++ {
		gap := dialed[i].Sub(dialed[i-1])
		gaps = append(gaps, gap)
		require.GreaterOrEqual(t, gap, nominal/3, "between dials %d and %d", i, i+1)
		nominal += nominal / 2
	}
	t.Logf("time between dials: %v", gaps)
	require.Greater(t, gaps[4], gaps[0])
	require.Len(t, server.open(), 2)

	steady.Store(true)
	eventually(t, func() string {
		if n := len(server.open()); n != 3 {
			return fmt.Sprintf("%d links are up", n)
		}
		return ""
	})
	server.wantReachable(t, fleet.agents, ceiling)
	stop()
	server.wantHeard(t, fleet.agents, ceiling)
	server.wantHistory(t, fleet.agents)
	fleet.wantUndisturbed(t)
}

// A server that does not take the links themselves: the operator is told once for each reason
// and link, not for each attempt. A server that says when to come again is heeded.
func TestLinksRefused(t *testing.T) {
	t.Parallel()
	t.Run("credentials", func(t *testing.T) {
		t.Parallel()
		server := startFleetServer(t, fleetServerOptions{takeLink: func(_ string, nth int) linkAnswer {
			switch {
			case nth < 5:
				return linkAnswer{refusal: http.StatusUnauthorized}
			case nth < 10:
				return linkAnswer{refusal: http.StatusForbidden}
			}
			return linkAnswer{}
		}})
		gateway := startGateway(t, server.url(), func(c config) {
			c.gateway("server::retry", map[string]any{"initial_interval": "200ms", "max_interval": "400ms"})
		})
		gateway.wantLinks(t, 3)
		for _, reason := range []string{"401 Unauthorized", "403 Forbidden"} {
			lines := gateway.log.with("warn", "cannot connect to the server", reason, "server::headers")
			require.Len(t, lines, 3, "one for each link")
		}
		require.Len(t, gateway.log.with("cannot connect to the server"), 6)
		for _, name := range upstream(3) {
			require.GreaterOrEqual(t, len(server.dialed(name)), 11)
		}
		fleet := settledFleet(t, 3, server, gateway)
		fleet.wantUndisturbed(t)
	})
	t.Run("drain", func(t *testing.T) {
		t.Parallel()
		server := startFleetServer(t, fleetServerOptions{takeLink: func(_ string, nth int) linkAnswer {
			if nth < 2 {
				return linkAnswer{refusal: http.StatusServiceUnavailable, retryAfter: "3"}
			}
			return linkAnswer{}
		}})
		gateway := startGateway(t, server.url())
		gateway.wantLinks(t, 3)
		for _, name := range upstream(3) {
			dialed := server.dialed(name)
			require.Len(t, dialed, 3)
			for i := range 2 {
				require.Greater(t, dialed[i+1].Sub(dialed[i]), 2900*time.Millisecond, "between dials %d and %d of %s", i+1, i+2, name)
			}
		}
		require.Len(t, gateway.log.with("cannot connect to the server", "503"), 3)
	})
}
