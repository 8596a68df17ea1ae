package e2e

import (
	"crypto/tls"
	"fmt"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/open-telemetry/opamp-go/protobufs"
	"github.com/stretchr/testify/require"
)

// The goals are for a machine that has nothing else to do. What fails here fails by far: before
// links were shared fairly, these waited for tens of seconds.
const (
	waitGoal, waitLimit       = 250 * time.Millisecond, time.Second // p99, at a server that takes a millisecond
	arrivalGoal, arrivalLimit = time.Second, 3 * time.Second
)

// withMetrics is a gateway's configuration with metrics.
func withMetrics(t *testing.T) (address string, edit func(config)) {
	t.Helper()
	address = freeAddress(t)
	return address, func(c config) { c.metrics(t, address) }
}

// timedFleet is a settledFleet that notes how long answers take.
func timedFleet(t *testing.T, n int, server *FleetServer, gateway *Gateway) *Fleet {
	t.Helper()
	fleet := startFleetOf(t, n, gateway.url(), 100, fleetOptions{timed: true})
	fleet.wantConnected(t, ceiling, 1)
	server.wantKnown(t, fleet.agents, ceiling)
	return fleet
}

// floodingFleet are agents that are to flood: what they say waits here, not in megabytes of their systems'.
func floodingFleet(t *testing.T, n int, server *FleetServer, gateway *Gateway) *Fleet {
	t.Helper()
	fleet := startFleetOf(t, n, gateway.url(), 100, fleetOptions{writeBuffer: 32 << 10})
	fleet.wantConnected(t, ceiling, 1)
	server.wantKnown(t, fleet.agents, ceiling)
	return fleet
}

// wantUnlost checks that no link was lost, of so many.
func wantUnlost(t *testing.T, server *FleetServer, metrics string, links int) {
	t.Helper()
	require.Equal(t, links, server.opened(), "links that there were; they have ended by: %v", server.endings())
	require.Zero(t, faults(t, metrics, "link_lost"))
	require.Zero(t, faults(t, metrics, "link_silent"))
}

// An agent, or ten, speak as fast as they can, and the server takes a millisecond for each message.
// Others do not notice, new agents are let in, links stay, and nothing that anybody said is lost. Not
// parallel: its subject is speed.
func TestFloodingAgents(t *testing.T) {
	const aSecond = time.Second
	for _, test := range []struct {
		name            string
		links, flooders int
		pongWithin      time.Duration
		unanswered      bool
		secure          bool
	}{
		{name: "one", links: 3, flooders: 1},
		{name: "ten on one link", links: 1, flooders: 10},
		{name: "the server wants pongs", links: 3, flooders: 1, pongWithin: 5 * time.Second},
		{name: "the server answers the flooder nothing", links: 3, flooders: 1, unanswered: true},
		{name: "over TLS", links: 3, flooders: 1, secure: true},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			var slow pace
			var mute sync.Map // the uids that are answered nothing
			var secured *tls.Config
			trust := func(config) {}
			if test.secure {
				authority := newAuthority(t, "server")
				secured = &tls.Config{Certificates: []tls.Certificate{authority.issue(t, "server").cert}, MinVersion: tls.VersionTLS12}
				trust = func(c config) { c.gateway("server::tls::ca_file", authority.file) }
			}
			server := startFleetServer(t, fleetServerOptions{
				echoes: true, pongWithin: test.pongWithin, tls: secured,
				heeds: func(uid uuid.UUID, m *protobufs.AgentToServer, size int) response {
					slow.heeds(uid, m, size)
					_, silent := mute.Load(uid)
					return response{silent: silent}
				},
			})
			metrics, showMetrics := withMetrics(t)
			gateway := startGateway(t, server.url(), showMetrics, trust, keepAlive("server", "1s", "4s"), func(c config) {
				c.gateway("server::connections", test.links)
			})
			gateway.wantLinks(t, test.links)
			flooders := floodingFleet(t, test.flooders, server, gateway)
			others := timedFleet(t, 30, server, gateway)
			if test.unanswered {
				for _, a := range flooders.agents {
					mute.Store(a.uid, true)
				}
			}

			slow.each.Store(int64(time.Millisecond))
			stopFlood := flooders.flood(t)
			const begins, lasts = 2 * time.Second, 10 * time.Second // until all queues are full, and what is measured
			throughout(t, begins, func() string { return "" })
			since, before := time.Now(), server.heardOf(flooders)
			stopTalk := others.talk(t, aSecond)
			arrivals, arriving := span{}, time.NewTicker(aSecond/2)
			defer arriving.Stop()
			for time.Since(since) < lasts {
				<-arriving.C
				took, err := arrive(t, gateway.url(), arrivalLimit)
				if err != nil {
					t.Errorf("a new agent was not let in: %v", err)
				}
				arrivals.add(took)
			}
			waited := others.waits(since)
			took := server.heardOf(flooders) - before
			t.Logf("others: %s; the goal is a p99 of %s", waited, waitGoal)
			t.Logf("%d new agents, the slowest let in after %s; the goal is %s", arrivals.n, arrivals.slowest.Round(time.Millisecond), arrivalGoal)
			t.Logf("the server took %d messages of the flooding agents in %s", took, time.Since(since).Round(time.Millisecond))
			if p99 := waited.quantile(0.99); p99 >= waitLimit {
				t.Errorf("others had to wait: %s", waited)
			}
			if arrivals.slowest >= arrivalLimit {
				t.Errorf("new agents had to wait %s", arrivals.slowest)
			}
			wantUnlost(t, server, metrics, test.links)

			if t.Failed() {
				return
			}
			// What nobody else wants, those who flood get. A server that takes a millisecond takes 1,000 a second.
			require.Greater(t, took, uint64(200*time.Since(since).Seconds()), "messages of flooding agents that the server took meanwhile")
			eventually(t, func() string {
				if n := faults(t, metrics, "agent_floods"); n < test.flooders {
					return fmt.Sprintf("agent_floods is %d, with %d flooding agents", n, test.flooders)
				}
				return ""
			})
			for _, a := range flooders.agents {
				gateway.wantLog(t, a.uid.String())
			}

			slow.each.Store(0)
			stopFlood()
			stopTalk()
			all := slices.Concat(flooders.agents, others.agents)
			server.wantHeard(t, all, ceiling)
			repeated, missing := server.wantHistory(t, all)
			require.Zero(t, repeated+missing, "messages repeated or missing")
			eventually(t, func() string {
				if n := others.unanswered(); n > 0 {
					return fmt.Sprintf("%d messages of the others have no answer", n)
				}
				return ""
			})
			flooders.wantBlameless(t)
			others.wantBlameless(t)
			wantUnlost(t, server, metrics, test.links)
			for _, a := range flooders.agents {
				require.Len(t, gateway.log.with(a.uid.String()), 1, "lines that name a flooding agent")
			}
			for _, a := range others.agents {
				require.Empty(t, gateway.log.with(a.uid.String()), "lines that name an agent which does not flood")
			}
		})
	}
}

// An agent says 400,000 things of 19 bytes at once, to a server that takes them as fast as it can. Others
// do not stand behind all that. Not parallel: its subject is speed.
func TestBurstOfTinyMessages(t *testing.T) {
	const n, goal = 400_000, 20 * time.Millisecond // the others' median
	const part = 8                                 // of the time that all takes; in one queue the median is a third
	server := startFleetServer(t, fleetServerOptions{echoes: true})
	metrics, showMetrics := withMetrics(t)
	gateway := startGateway(t, server.url(), showMetrics, oneLink)
	gateway.wantLinks(t, 1)
	others := timedFleet(t, 9, server, gateway)
	burst := startFleet(t, 1, gateway.url(), 1)
	burst.wantConnected(t, ceiling, 1)
	server.wantKnown(t, burst.agents, ceiling)
	alice := burst.agents[0]
	stopTalk := others.talk(t, 100*time.Millisecond)

	tiny := slices.Concat([]byte{0, 0x0a, 16}, alice.uid[:]) // nothing but the uid
	all := make([]byte, 0, n*(6+len(tiny)))
	for range n {
		all = append(all, 0x82, 0x80|byte(len(tiny)), 0, 0, 0, 0) // masked with zeros
		all = append(all, tiny...)
	}
	since := time.Now()
	heard := len(server.record(alice).said)
	_, err := alice.ws.NetConn().Write(all)
	require.NoError(t, err)
	written := time.Since(since)
	eventually(t, func() string {
		if got := server.heardOf(burst) - uint64(heard); got < n {
			return fmt.Sprintf("the server has heard %d of %d tiny messages", got, n)
		}
		return ""
	})
	took := time.Since(since)
	waited := others.waits(since)
	stopTalk()
	t.Logf("%d messages were written in %s, and heard in %s; others meanwhile: %s; the goal is a median of %s",
		n, written.Round(time.Millisecond), took.Round(time.Millisecond), waited, goal)
	require.Greater(t, len(waited), 9, "answers to others meanwhile: the burst is too short to see anything")
	require.Less(t, waited.quantile(0.5), took/part, "the others' median: %s", waited)
	server.wantHeard(t, others.agents, ceiling)
	repeated, missing := server.wantHistory(t, others.agents)
	require.Zero(t, repeated+missing, "messages repeated or missing")
	burst.wantBlameless(t)
	others.wantBlameless(t)
	wantUnlost(t, server, metrics, 1)
}

// All agents of a link report 64 KiB at once to a server that takes so many bytes a second. One more
// says that it is alive. Not parallel: its subject is speed.
func TestReportsOfAll(t *testing.T) {
	const agents, size, speed = 1000, 64 << 10, 16 << 20
	const goal, limit = 500 * time.Millisecond, 1500 * time.Millisecond
	const all = agents * size * time.Second / speed // how long the server takes for all reports
	var slow pace
	server := startFleetServer(t, fleetServerOptions{echoes: true, heeds: func(uid uuid.UUID, m *protobufs.AgentToServer, n int) response {
		slow.heeds(uid, m, n)
		return response{silent: n >= size} // what is answered would be another load
	}})
	metrics, showMetrics := withMetrics(t)
	gateway := startGateway(t, server.url(), showMetrics, oneLink)
	gateway.wantLinks(t, 1)
	crowd := settledFleet(t, agents, server, gateway)
	alive := timedFleet(t, 1, server, gateway)

	slow.perByte.Store(int64(time.Second / speed))
	since := time.Now()
	var talking sync.WaitGroup
	talking.Go(func() { crowd.sayAll(1, size) })
	stopTalk := alive.talk(t, 50*time.Millisecond)
	eventually(t, func() string {
		if got := server.heardOf(crowd); got < 2*agents {
			return fmt.Sprintf("the server has heard %d messages of %d", got, 2*agents)
		}
		return ""
	})
	took := time.Since(since)
	waited := alive.waits(since)
	stopTalk()
	talking.Wait()
	t.Logf("%d reports were heard in %s, at least %s; one more agent meanwhile: %s; the goal is %s at worst", agents, took.Round(time.Millisecond), all, waited, goal)
	require.Less(t, waited.quantile(1), limit, "the worst: %s", waited)
	everybody := slices.Concat(crowd.agents, alive.agents)
	server.wantHeard(t, everybody, ceiling)
	repeated, missing := server.wantHistory(t, everybody)
	require.Zero(t, repeated+missing, "messages repeated or missing")
	crowd.wantBlameless(t)
	alive.wantBlameless(t)
	wantUnlost(t, server, metrics, 1)
}

// An agent of a gateway below floods: neither the other agents there nor those above notice. The
// connection of that gateway counts for more than that of one agent.
func TestFloodBehindLowerGateway(t *testing.T) {
	var slow pace
	server := startFleetServer(t, fleetServerOptions{echoes: true, heeds: slow.heeds})
	metrics, showMetrics := withMetrics(t)
	upper := startGateway(t, server.url(), showMetrics, oneLink, allowGateways)
	upper.wantLinks(t, 1)
	lower := launchGateway(t, "lower gateway", gatewayConfig(upper.url(), freeAddress(t)), oneLink)
	lower.wantReady(t, 1)
	lower.wantLinks(t, 1)
	flooder := floodingFleet(t, 1, server, lower)
	above, below := timedFleet(t, 10, server, upper), timedFleet(t, 10, server, lower)

	slow.each.Store(int64(time.Millisecond))
	stopFlood := flooder.flood(t)
	throughout(t, 2*time.Second, func() string { return "" }) // until all queues are full
	since := time.Now()
	stops := []func(){above.talk(t, time.Second), below.talk(t, time.Second)}
	throughout(t, 8*time.Second, func() string { return "" })
	waitedAbove, waitedBelow := above.waits(since), below.waits(since)
	t.Logf("agents above: %s; the goal is a p99 of %s", waitedAbove, waitGoal)
	t.Logf("agents beside the flooding one: %s", waitedBelow)
	if p99 := waitedAbove.quantile(0.99); p99 >= waitLimit {
		t.Errorf("agents above had to wait: %s", waitedAbove)
	}
	if p99 := waitedBelow.quantile(0.99); p99 >= 2*waitLimit { // two windows stand before it
		t.Errorf("agents beside the flooding one had to wait: %s", waitedBelow)
	}
	if lost := lower.log.with("lost connection to the server"); len(lost) > 0 {
		t.Errorf("the gateway below has lost its link: %s", lost)
	}
	if t.Failed() {
		return
	}
	slow.each.Store(0)
	stopFlood()
	for _, stop := range stops {
		stop()
	}
	all := slices.Concat(flooder.agents, above.agents, below.agents)
	server.wantHeard(t, all, ceiling)
	repeated, missing := server.wantHistory(t, all)
	require.Zero(t, repeated+missing, "messages repeated or missing")
	for _, f := range []*Fleet{flooder, above, below} {
		f.wantBlameless(t)
	}
	require.Empty(t, lower.log.with("lost connection to the server"))
	wantUnlost(t, server, metrics, 1)
}

// What an agent said last arrives before the goodbye that the gateway says for it, at a slow server, too.
func TestGoodbyeIsLast(t *testing.T) {
	t.Parallel()
	const n = 2000
	var slow pace
	var mu sync.Mutex
	last, goodbye := map[uuid.UUID]uint64{}, map[uuid.UUID]uint64{} // what was said last, and last before the goodbye
	server := startFleetServer(t, fleetServerOptions{heeds: func(uid uuid.UUID, m *protobufs.AgentToServer, size int) response {
		mu.Lock()
		if m.GetAgentDisconnect() != nil {
			goodbye[uid] = last[uid]
		} else {
			last[uid] = m.GetSequenceNum()
		}
		mu.Unlock()
		return slow.heeds(uid, m, size)
	}})
	gateway := startGateway(t, server.url(), oneLink)
	gateway.wantLinks(t, 1)
	slow.each.Store(int64(time.Millisecond))
	uid := uuid.New()
	ws, _, err := dialRaw(gateway.url(), map[string][]string{"Agent-Id": {uid.String()}}, nil)
	require.NoError(t, err)
	var reading sync.WaitGroup
	reading.Go(func() { // until the end of the connection; what is not read would reset it
		for {
			if _, _, err := ws.ReadMessage(); err != nil {
				return
			}
		}
	})
	alice := FleetAgent{uid: uid, ws: ws}
	for range n {
		require.True(t, alice.say(nil))
	}
	require.NoError(t, ws.NetConn().(*net.TCPConn).CloseWrite())
	eventually(t, func() string {
		mu.Lock()
		defer mu.Unlock()
		if goodbye[uid] == 0 {
			return fmt.Sprintf("the server has heard no goodbye, and %d messages", last[uid])
		}
		return ""
	})
	ws.Close()
	reading.Wait()
	mu.Lock()
	defer mu.Unlock()
	require.Equal(t, uint64(n), goodbye[uid], "the last message before the goodbye")
	require.Equal(t, uint64(n), last[uid], "the last message of all")
}

// The gateway asks by pings what the server has read while there is something to ask about, shows
// how long that takes, and is quiet when nobody says anything.
func TestLinkPings(t *testing.T) {
	t.Parallel()
	server := startFleetServer(t, fleetServerOptions{echoes: true})
	metrics, showMetrics := withMetrics(t)
	gateway := startGateway(t, server.url(), showMetrics)
	gateway.wantLinks(t, 3)
	fleet := timedFleet(t, 30, server, gateway)
	stop := fleet.talk(t, 50*time.Millisecond)
	pinged := func() (n int) {
		for name, value := range samples(t, metrics) {
			if strings.HasPrefix(name, "otelcol_opampgateway_link_ping") && strings.Contains(name, "_count") {
				n += int(value)
			}
		}
		return n
	}
	eventually(t, func() string {
		if n := pinged(); n < 10 {
			return fmt.Sprintf("the metric of answered pings counts %d, the server has heard %d", n, server.pings())
		}
		return ""
	})
	stop()
	server.wantHeard(t, fleet.agents, ceiling)
	wantStill(t, 2*time.Second, "the number of pings", func() uint64 { return uint64(server.pings()) })

	said, before := fleet.said(), server.pings()
	const quiet = 6 * time.Second
	throughout(t, quiet, func() string { return "" })
	idle := server.pings() - before
	t.Logf("%d pings for %d messages, %d of them shown; then %d in %s", before, said, pinged(), idle, quiet)
	require.LessOrEqual(t, idle, 3, "pings in %s on three links on which nobody says anything: keep-alive is one in 15 s", quiet)
	require.Less(t, uint64(before), said, "pings for so many messages")
}

// Servers that answer no pings, or not all, are served all the same.
func TestServersThatDropPings(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name    string
		answers func(nth int) bool
	}{
		{"all", func(int) bool { return false }},
		{"all after the first", func(nth int) bool { return nth == 0 }},
		{"every third", func(nth int) bool { return nth%3 != 2 }},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			const agents, each = 30, 500
			server := startFleetServer(t, fleetServerOptions{echoes: true, answersPing: test.answers})
			metrics, showMetrics := withMetrics(t)
			gateway := startGateway(t, server.url(), showMetrics)
			gateway.wantLinks(t, 3)
			fleet := timedFleet(t, agents, server, gateway)
			start := time.Now()
			fleet.sayAll(each, 0)
			server.wantHeard(t, fleet.agents, ceiling)
			took := time.Since(start)
			for range 3 { // by and by, too
				fleet.sayAll(1, 0)
				server.wantHeard(t, fleet.agents, ceiling)
			}
			t.Logf("%d messages were heard in %s; %s; %d pings", agents*each, took.Round(time.Millisecond), fleet.waits(start), server.pings())
			require.Less(t, took, 20*time.Second, "%d messages", agents*each)
			repeated, missing := server.wantHistory(t, fleet.agents)
			require.Zero(t, repeated+missing, "messages repeated or missing")
			fleet.wantBlameless(t)
			wantUnlost(t, server, metrics, 3)
		})
	}
}

// The server is far away, and then farther. Much can be on the way at the same time, as without the
// acknowledgements that the gateway waits for. In windows of the size that a near server gets, it
// would take half a minute.
func TestLongRoundTrip(t *testing.T) {
	t.Parallel()
	const agents, each, roundTrip = 30, 1000, 100 * time.Millisecond
	server := startFleetServer(t, fleetServerOptions{echoes: true})
	way := openLongWay(t, server.address, roundTrip/2)
	metrics, showMetrics := withMetrics(t)
	gateway := startGateway(t, way.url(), showMetrics)
	gateway.wantLinks(t, 3)
	fleet := timedFleet(t, agents, server, gateway)
	for _, rtt := range []time.Duration{roundTrip, 3 * roundTrip} {
		way.oneWay.Store(int64(rtt / 2))
		alone := time.Now()
		fleet.sayAll(1, 0)
		server.wantHeard(t, fleet.agents, ceiling)
		t.Logf("one message of each was heard after %s", time.Since(alone).Round(time.Millisecond))
		start := time.Now()
		fleet.sayAll(each, 0)
		server.wantHeard(t, fleet.agents, ceiling)
		took := time.Since(start)
		t.Logf("over a round trip of %s %d messages were heard in %s; %d pings so far", rtt, agents*each, took.Round(time.Millisecond), server.pings())
		require.Less(t, took, 12*time.Second, "%d messages over a round trip of %s", agents*each, rtt)
	}
	repeated, missing := server.wantHistory(t, fleet.agents)
	require.Zero(t, repeated+missing, "messages repeated or missing")
	fleet.wantBlameless(t)
	wantUnlost(t, server, metrics, 3)
}
