package e2e

import (
	"math/rand/v2"
	"net/http"
	"strconv"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/gorilla/websocket"
	"github.com/open-telemetry/opamp-go/protobufs"
	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/proto"
)

// What somebody can do with suspicion who means to: have others named, or suspected, or be a suspect himself.

// mallory connects an agent with this uid that says m, and returns its connection; nil if it is not let in.
func mallory(t *testing.T, url string, uid uuid.UUID, m *protobufs.AgentToServer) *websocket.Conn {
	t.Helper()
	ws, _, err := (&websocket.Dialer{HandshakeTimeout: ceiling}).Dial(url, http.Header{"Agent-ID": {uid.String()}})
	if err != nil {
		return nil
	}
	t.Cleanup(func() { ws.Close() })
	go func() { // until the connection ends
		for {
			if _, _, err := ws.NextReader(); err != nil {
				return
			}
		}
	}()
	_ = ws.WriteMessage(websocket.BinaryMessage, frameOf(uid, m)) // or it has ended
	return ws
}

func frameOf(uid uuid.UUID, m *protobufs.AgentToServer) []byte {
	m = proto.Clone(m).(*protobufs.AgentToServer)
	m.InstanceUid, m.SequenceNum, m.Capabilities = uid[:], 1, 1
	frame, err := proto.MarshalOptions{}.MarshalAppend([]byte{0}, m)
	if err != nil {
		panic("an agent's message cannot be marshalled: " + err.Error()) // it is made here
	}
	return frame
}

// endsAtHealth ends links at messages that tell of an agent's health, if end is not nil; each message takes time.
func endsAtHealth(end func(*FleetLink), after, each time.Duration) func(uuid.UUID, *protobufs.AgentToServer, int) response {
	return func(_ uuid.UUID, m *protobufs.AgentToServer, _ int) (does response) {
		time.Sleep(each)
		if m.GetHealth() != nil {
			does.end, does.after = end, after
		}
		return does
	}
}

var unwell = &protobufs.AgentToServer{Health: &protobufs.ComponentHealth{}}

// The server reads on for a moment before it ends the link at a message, and takes 10 ms for each. Whoever
// comes as somebody new each time is never on trial; those who are must not be named for it.
func TestOthersAreNotNamedForWhatSomebodyNewSays(t *testing.T) {
	t.Parallel()
	server := startFleetServer(t, fleetServerOptions{
		echoes: true, heeds: endsAtHealth(closeWith(websocket.ClosePolicyViolation), 5*time.Millisecond, 10*time.Millisecond),
	})
	gateway := startGateway(t, server.url())
	gateway.wantLinks(t, 3)
	others := timedFleet(t, 30, server, gateway)
	others.talk(t, time.Second)
	for range 20 {
		mallory(t, gateway.url(), uuid.New(), unwell)
		time.Sleep(500 * time.Millisecond)
	}
	others.wantBlameless(t)
}

// Somebody whom the server does not want, and ends the connection at, comes as somebody new each time. Directly, that
// disturbs nobody; through the gateway others lose a link at the first few times only.
func TestNewcomersWithPoisonAreKeptApart(t *testing.T) {
	t.Parallel()
	for _, code := range []int{websocket.ClosePolicyViolation, websocket.CloseNormalClosure} {
		t.Run(strconv.Itoa(code), func(t *testing.T) {
			t.Parallel()
			server := startFleetServer(t, fleetServerOptions{echoes: true, heeds: endsAtHealth(closeWith(code), 0, 0)})
			gateway := startGateway(t, server.url())
			gateway.wantLinks(t, 3)
			others := timedFleet(t, 30, server, gateway)
			others.talk(t, 200*time.Millisecond)
			for range 40 {
				mallory(t, gateway.url(), uuid.New(), unwell)
				time.Sleep(500 * time.Millisecond)
			}
			most := 0
			for _, a := range others.agents {
				on := map[*FleetLink]bool{}
				for _, m := range server.record(a).said {
					on[m.link] = true
				}
				most = max(most, len(on))
			}
			t.Log("links on which one of the others has been:", most)
			require.LessOrEqual(t, most, 4)
			others.wantBlameless(t)
		})
	}
}

// A network that drops links at random times accuses nobody.
func TestNobodyIsNamedForTheNetwork(t *testing.T) {
	t.Parallel()
	server, line, gateway := behindLine(t, fleetServerOptions{
		echoes: true, heeds: endsAtHealth(nil, 0, 10*time.Millisecond),
	})
	others := timedFleet(t, 30, server, gateway)
	others.talk(t, time.Second)
	for range 40 {
		time.Sleep(rand.N(1500 * time.Millisecond))
		if open := line.Conns(); len(open) > 0 {
			open[rand.N(len(open))].Finish()
		}
	}
	others.wantBlameless(t)
}

// A suspect gets no more of its link than it would without being one. What it says is larger than the window, but
// no larger than what acquits it, so that it stays a suspect.
func TestSuspectDoesNotStarveOthers(t *testing.T) {
	t.Parallel()
	const poison, large, limit = 30 << 20, 24 << 20, 5 * time.Second // a message takes half a second
	server := startFleetServer(t, fleetServerOptions{echoes: true, heeds: func(_ uuid.UUID, m *protobufs.AgentToServer, size int) (does response) {
		time.Sleep(time.Duration(20 * size)) // 50 MB/s
		if m.GetHealth() != nil {
			does.end = closeWith(websocket.ClosePolicyViolation)
		}
		does.silent = size > 1<<20
		return does
	}})
	gateway := startGateway(t, server.url(), oneLink)
	gateway.wantLinks(t, 1)
	others := timedFleet(t, 10, server, gateway)
	uid := uuid.New()
	state := configOf(poison)
	state.Health = unwell.GetHealth()
	ws := mallory(t, gateway.url(), uid, state)
	gateway.wantLinks(t, 2)
	others.talk(t, time.Second)
	go func() { // until the connection ends
		for err := error(nil); err == nil; {
			err = ws.WriteMessage(websocket.BinaryMessage, frameOf(uid, configOf(large)))
		}
	}()
	time.Sleep(3 * time.Second) // it is at it
	begun := time.Now()
	time.Sleep(2 * limit)
	waited := others.waits(begun)
	t.Log(waited)
	require.Less(t, waited.quantile(1), limit)
}

// Somebody has the server end links just when everybody reports in full, so that all are suspected for a message
// that is much larger than what they say afterwards. They go on to be heard at once, at a server that is far away.
func TestSuspectsThatAreFarAway(t *testing.T) {
	t.Parallel()
	const limit = 3 * time.Second
	server := startFleetServer(t, fleetServerOptions{echoes: true, heeds: endsAtHealth(closeWith(websocket.ClosePolicyViolation), 0, 0)})
	way := openLongWay(t, server.address, 50*time.Millisecond)
	gateway := startGateway(t, way.url())
	gateway.wantLinks(t, 3)
	state := configOf(10 << 10)
	state.AgentDescription = &protobufs.AgentDescription{} // or the server would ask for it again and again
	others := startFleetOf(t, 100, gateway.url(), 100, fleetOptions{timed: true, state: state})
	others.wantConnected(t, ceiling, 1)
	server.wantKnown(t, others.agents, ceiling)
	others.talk(t, time.Second)
	for range 6 {
		for range 3 {
			mallory(t, gateway.url(), uuid.New(), unwell)
		}
		time.Sleep(600 * time.Millisecond)
	}
	time.Sleep(5 * time.Second) // the links are back
	begun := time.Now()
	time.Sleep(10 * time.Second)
	waited := others.waits(begun)
	t.Log(waited)
	require.Less(t, waited.quantile(0.99), limit)
}
