package e2e

import (
	"fmt"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/gorilla/websocket"
	"github.com/open-telemetry/opamp-go/protobufs"
	"github.com/stretchr/testify/require"
)

// startLower starts a gateway with one link to another, which lets gateways in.
func startLower(t *testing.T, upper *Gateway) *Gateway {
	t.Helper()
	lower := launchGateway(t, "lower gateway", gatewayConfig(upper.url(), freeAddress(t)), oneLink)
	lower.wantReady(t, 1)
	lower.wantLinks(t, 1)
	return lower
}

// An agent of a gateway below says what the server does not take. The gateway above names it, and it alone
// is told, through the one below, which comes back, and whose other agents miss nothing.
func TestPoisonBehindLowerGateway(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name string
		most int // links lost of the gateway above
		end  func(*FleetLink)
		says string
	}{
		{name: "1007", most: 2, end: closeWith(websocket.CloseInvalidFramePayloadData), says: "1007"},
		{name: "crash", most: 3, end: finish},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			poison := configOf(10 << 10)
			server := startFleetServer(t, fleetServerOptions{echoes: true, heeds: func(_ uuid.UUID, m *protobufs.AgentToServer, _ int) (does response) {
				if m.GetEffectiveConfig() != nil {
					does.end = test.end
				}
				return does
			}})
			metrics, showMetrics := withMetrics(t)
			upper := startGateway(t, server.url(), showMetrics, allowGateways)
			upper.wantLinks(t, 3)
			lower := startLower(t, upper)
			above, below := timedFleet(t, 20, server, upper), timedFleet(t, 20, server, lower)
			stops := []func(){above.talk(t, 300*time.Millisecond), below.talk(t, 300*time.Millisecond)}
			first := server.opened()

			begun := time.Now()
			poisoning := startFleetOf(t, 1, lower.url(), 1, fleetOptions{state: poison})
			poisoning.talk(t, 500*time.Millisecond)
			alice := poisoning.agents[0]
			line := wantNamed(t, server, upper, metrics, alice, first, test.most)
			t.Logf("over %s after it began, with %d links lost", time.Since(begun).Round(time.Millisecond), server.opened()-first)
			require.Contains(t, line, test.says, "what the server said")
			require.Contains(t, line, strconv.Itoa(frameSize(poison)), "the size of the message")
			alice.wantTold(t, len(alice.wasTold())+3) // for a while, whatever she says
			throughout(t, 5*time.Second, func() string {
				server.wantLost(t, first, test.most)
				return ""
			})
			require.Len(t, upper.log.with("warn", alice.uid.String()), 1, "lines that name the agent")

			for _, stop := range stops {
				stop()
			}
			for _, f := range []*Fleet{above, below} {
				repeated, missing := server.wantRepaired(t, f)
				t.Logf("of %d messages of %d bystanders %d were repeated, %d were lost with a link and made good; %s",
					f.said(), len(f.agents), repeated, missing, f.waits(begun))
			}
			for _, f := range []*Fleet{above, below} {
				f.wantBlameless(t)
				upper.wantUnnamed(t, f)
				lower.wantUnnamed(t, f)
			}
			poisoning.wantUndisturbed(t)
			lost := lower.log.with("lost connection to the server")
			t.Logf("the gateway below has lost its link %d times", len(lost))
			require.LessOrEqual(t, len(lost), test.most, "links lost of the gateway below: %v", lost)
			lower.wantLinks(t, 1+len(lost))
		})
	}
}

// A gateway below and its agents share a link with single agents above, and some flood. Nobody else waits for
// long, whoever it is. Not parallel: its subject is speed.
func TestShareOfLowerGateway(t *testing.T) {
	for _, test := range []struct {
		name                         string
		floodingAbove, floodingBelow int
		busyBelow                    int
	}{
		{name: "one floods above, many are busy below", floodingAbove: 1, busyBelow: 20},
		{name: "one floods below", floodingBelow: 1},
		{name: "ten flood below", floodingBelow: 10},
	} {
		t.Run(test.name, func(t *testing.T) {
			var slow pace
			server := startFleetServer(t, fleetServerOptions{echoes: true, heeds: slow.heeds})
			metrics, showMetrics := withMetrics(t)
			upper := startGateway(t, server.url(), showMetrics, oneLink, allowGateways)
			upper.wantLinks(t, 1)
			lower := startLower(t, upper)
			floods := []*Fleet{
				floodingFleet(t, test.floodingAbove, server, upper),
				floodingFleet(t, test.floodingBelow, server, lower),
			}
			above, below := timedFleet(t, 10, server, upper), timedFleet(t, 10, server, lower)
			busy := timedFleet(t, test.busyBelow, server, lower)

			slow.each.Store(int64(time.Millisecond))
			var stops []func()
			for _, f := range floods {
				stops = append(stops, f.flood(t))
			}
			throughout(t, 2*time.Second, func() string { return "" }) // until all queues are full
			since := time.Now()
			stops = append(stops, above.talk(t, time.Second), below.talk(t, time.Second), busy.talk(t, 100*time.Millisecond))
			throughout(t, 8*time.Second, func() string { return "" })
			for _, who := range []struct {
				name  string
				fleet *Fleet
				limit time.Duration
			}{
				{"agents above", above, waitLimit},
				{"agents below", below, 2 * waitLimit}, // two windows stand before them
				{"busy agents below", busy, 2 * waitLimit},
			} {
				if len(who.fleet.agents) == 0 {
					continue
				}
				waited := who.fleet.waits(since)
				t.Logf("%s: %s; the goal is a p99 of %s", who.name, waited, waitGoal)
				if p99 := waited.quantile(0.99); p99 >= who.limit {
					t.Errorf("%s had to wait: %s", who.name, waited)
				}
			}
			for i, where := range []string{"above", "below"} {
				t.Logf("the server has taken %d messages of those who flood %s", server.heardOf(floods[i]), where)
			}
			if t.Failed() {
				return
			}
			slow.each.Store(0)
			for _, stop := range stops {
				stop()
			}
			all := slices.Concat(floods[0].agents, floods[1].agents, above.agents, below.agents, busy.agents)
			server.wantHeard(t, all, ceiling)
			repeated, missing := server.wantHistory(t, all)
			require.Zero(t, repeated+missing, "messages repeated or missing")
			for i, f := range []*Fleet{floods[0], floods[1], above, below, busy} {
				eventually(t, func() string {
					if n := f.unanswered(); n > 0 {
						return fmt.Sprintf("%d messages of fleet %d have no answer", n, i)
					}
					return ""
				})
				f.wantBlameless(t)
			}
			require.Empty(t, lower.log.with("lost connection to the server"))
			wantUnlost(t, server, metrics, 1)
		})
	}
}
