package e2e

import (
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/gorilla/websocket"
	"github.com/stretchr/testify/require"
)

// waysThere returns how long it took until the server had read what agents of the fleet said meanwhile, and how
// long that then stood in the server's own queue.
func (f *Fleet) waysThere(server *FleetServer, since, until time.Time) (there, stood waits) {
	for _, a := range f.agents {
		heard := map[uint64]said{}
		for _, m := range server.record(a).said {
			heard[m.number] = m
		}
		a.mu.Lock()
		for _, answer := range a.answers {
			if m, ok := heard[answer.number]; ok && answer.said.After(since) && answer.said.Before(until) {
				there = append(there, m.at.Add(-m.stood).Sub(answer.said))
				stood = append(stood, m.stood)
			}
		}
		a.mu.Unlock()
	}
	slices.Sort(there)
	slices.Sort(stood)
	return there, stood
}

// A server reads ahead and answers pings at once, and works off slowly what it has read: a pong tells little
// of that. Others wait as long as the server has them wait, and hardly longer. Not parallel: its subject is
// speed.
func TestServersThatReadAhead(t *testing.T) {
	for _, test := range []struct {
		name  string
		queue int // messages
	}{
		{"a little", 100},
		{"as much as there is", 4 << 20},
	} {
		t.Run(test.name, func(t *testing.T) {
			const lasts = 5 * time.Second
			var slow pace
			server := startFleetServer(t, fleetServerOptions{echoes: true, readsAhead: test.queue, heeds: slow.heeds})
			metrics, showMetrics := withMetrics(t)
			gateway := startGateway(t, server.url(), showMetrics, oneLink, keepAlive("server", "1s", "4s"))
			gateway.wantLinks(t, 1)
			flooder := floodingFleet(t, 1, server, gateway)
			others := timedFleet(t, 30, server, gateway)

			slow.each.Store(int64(time.Millisecond))
			stopFlood := flooder.flood(t)
			throughout(t, time.Second, func() string { return "" }) // until queues are full
			since := time.Now()
			stopTalk := others.talk(t, time.Second)
			throughout(t, lasts, func() string { return "" })
			until := time.Now()
			said := flooder.said()
			stopFlood()
			stopTalk()
			slow.each.Store(0)
			all := slices.Concat(flooder.agents, others.agents)
			server.wantHeard(t, all, ceiling)
			eventually(t, func() string {
				if n := others.unanswered(); n > 0 {
					return fmt.Sprintf("%d messages of the others have no answer", n)
				}
				return ""
			})
			waited, stood := others.waysThere(server, since, until)
			t.Logf("the flooding agent has said %d messages; the server has read what others said: %s; the goal is a p99 of %s; then that stood in its queue: %s",
				said, waited, waitGoal, stood)
			require.Greater(t, len(waited), 100, "answers to others")
			require.Less(t, waited.quantile(0.99), waitLimit, "the way to the server: %s", waited)
			repeated, missing := server.wantHistory(t, all)
			require.Zero(t, repeated+missing, "messages repeated or missing")
			flooder.wantBlameless(t)
			others.wantBlameless(t)
			wantUnlost(t, server, metrics, 1)
		})
	}
}

// A server answers no pings, as the gateway finds out, and links end every few seconds. What is said on the
// next ones does not wait until that is found out again.
func TestPinglessServerThatLosesLinks(t *testing.T) {
	t.Parallel()
	const losses, every, limit = 6, 3 * time.Second, time.Second
	server, line, gateway := behindLine(t, fleetServerOptions{echoes: true, answersPing: func(int) bool { return false }})
	fleet := timedFleet(t, 30, server, gateway)
	stopTalk := fleet.talk(t, 100*time.Millisecond)
	throughout(t, 8*time.Second, func() string { return "" }) // until it has been found out
	since := time.Now()
	var dropped []time.Time
	for i := range losses {
		var lost *FleetLink
		eventually(t, func() string {
			open := server.open()
			if len(open) < 3 {
				return fmt.Sprintf("%d links are open", len(open))
			}
			lost = open[i%3]
			return ""
		})
		dropped = append(dropped, time.Now())
		how := drops[1+i%2] // not by a reset: after that the server may forget the agents late
		how.drop(t, lineOf(t, line, lost), lost)
		throughout(t, every, func() string { return "" })
	}
	until := time.Now()
	stopTalk()
	repeated, missing := server.wantRepaired(t, fleet)
	answered, _ := fleet.waysThere(server, since, until)
	t.Logf("%d links lost; of %d messages %d were repeated, %d lost and made good; %d pings; the way to the server: %s",
		losses, fleet.said(), repeated, missing, server.pings(), answered)

	// Each agent says something every 150 ms at most, unless its reader is not read.
	silent := waits{}
	for _, a := range fleet.agents {
		var heard []time.Time
		for _, m := range server.record(a).said {
			if m.at.After(since) && m.at.Before(until) {
				heard = append(heard, m.at)
			}
		}
		slices.SortFunc(heard, time.Time.Compare)
		last := since
		for _, at := range append(heard, until) {
			silent = append(silent, at.Sub(last))
			last = at
		}
	}
	slices.Sort(silent)
	t.Logf("the server heard nothing of an agent for so long: %s", silent)
	require.Len(t, dropped, losses)
	require.Less(t, silent.quantile(1), limit, "the longest time in which the server heard nothing of an agent: %s", silent)
	require.Less(t, answered.quantile(0.99), limit, "the way to the server: %s", answered)
	fleet.wantBlameless(t)
	gateway.wantUnnamed(t, fleet)
}

// A server that has answered questions ends the link at one about an agent, in whatever way. That agent is
// told to come later, after so many links; others come meanwhile, and are let in.
func TestPoisonousQuestion(t *testing.T) {
	t.Parallel()
	const most, limit = 3, 10 * time.Second // links lost per agent, and until others are let in
	for _, test := range []struct {
		name   string
		links  int
		askers int // one after the other
		end    func(*FleetLink)
	}{
		{name: "1008", links: 3, askers: 3, end: closeWith(websocket.ClosePolicyViolation)},
		{name: "1000", links: 3, askers: 3, end: closeWith(websocket.CloseNormalClosure)},
		{name: "crash", links: 3, askers: 3, end: finish},
		{name: "on the only link", links: 1, askers: 1, end: closeWith(websocket.ClosePolicyViolation)},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			var unwanted sync.Map
			server := startFleetServer(t, fleetServerOptions{echoes: true, endsAsked: func(uid uuid.UUID) func(*FleetLink) {
				if _, is := unwanted.Load(uid); is {
					return test.end
				}
				return nil
			}})
			gateway := startGateway(t, server.url(), func(c config) { c.gateway("server::connections", test.links) })
			gateway.wantLinks(t, test.links)
			others := timedFleet(t, 30, server, gateway)
			stopTalk := others.talk(t, 300*time.Millisecond)
			first := server.opened()

			for nth := range test.askers {
				uid := uuid.New()
				unwanted.Store(uid, true)
				var mu sync.Mutex
				var arrivals span
				var coming sync.WaitGroup
				come := func() {
					took, err := arrive(t, gateway.url(), limit)
					mu.Lock()
					defer mu.Unlock()
					arrivals.add(took)
					if err != nil {
						t.Errorf("agent %d: another agent was not let in after %s: %v", nth, took, err)
					}
				}
				over := make(chan struct{})
				coming.Go(func() {
					for {
						select {
						case <-over:
							return
						case <-time.After(100 * time.Millisecond):
							come()
						}
					}
				})
				start := time.Now()
				_, resp, err := dialRaw(gateway.url(), http.Header{"Agent-Id": {uid.String()}}, nil)
				took := time.Since(start)
				close(over)
				coming.Wait()
				require.Error(t, err)
				require.NotNil(t, resp, "%v", err)
				require.Equal(t, http.StatusServiceUnavailable, resp.StatusCode)
				after, err := strconv.Atoi(resp.Header.Get("Retry-After"))
				require.NoError(t, err)
				require.GreaterOrEqual(t, after, 30)
				eventually(t, func() string {
					if n := len(server.open()); n < test.links {
						return fmt.Sprintf("%d links are open", n)
					}
					return ""
				})
				t.Logf("agent %d was answered after %s, with %d links lost so far; %d others came meanwhile, the slowest was answered after %s",
					nth, took.Round(time.Millisecond), server.opened()-first, arrivals.n, arrivals.slowest.Round(time.Millisecond))
				// In all: the last link lost to an agent may still count as open when that is answered.
				server.wantLost(t, first, most*(nth+1))
			}
			stopTalk()
			server.wantRepaired(t, others)
			others.wantBlameless(t)
			gateway.wantUnnamed(t, others)
		})
	}
}
