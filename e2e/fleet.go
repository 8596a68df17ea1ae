package e2e

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
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
)

const (
	// What opamp-go's client does: it gives an upgrade this long, and comes back at once when it
	// was let in before, else with ever more delay.
	upgradeTimeout = 45 * time.Second
	firstDelay     = 500 * time.Millisecond
	delayGrowth    = 1.5
	lastDelay      = time.Minute
)

// Fleet is many agents of bare WebSockets. Each costs a goroutine and a small buffer, numbers
// what it says, says who it is when asked, and comes back when its connection ends.
type Fleet struct {
	url    string
	opts   fleetOptions
	agents []*FleetAgent
	ctx    context.Context // ends with the test
	turns  chan struct{}   // holds a token per agent that may dial at the same time
	work   sync.WaitGroup
}

type fleetOptions struct {
	// state is what an agent says of itself, besides its uid, when it connects first and when it
	// is asked; nil for its name.
	state *protobufs.AgentToServer
	// timed has agents note how long the server, which echoes, takes to answer each message.
	timed bool
	// writeBuffer is what an agent's system takes of what it says, in bytes; 0 for the usual megabytes.
	writeBuffer int
	// frameLimit is the largest WebSocket frame that an agent takes; 0 is any.
	frameLimit int
	// userAgents are what the agents call themselves, some this, some that; nil for nothing.
	userAgents []string
}

// FleetAgent is one of a fleet.
type FleetAgent struct {
	fleet *Fleet
	uid   uuid.UUID

	stating atomic.Bool // it is about to say who it is

	writing sync.Mutex    // held while a message is written
	number  atomic.Uint64 // of the last message

	// mu guards all below.
	mu       sync.Mutex
	ws       *websocket.Conn // nil while it has none
	connects int
	since    time.Time // its last connect
	ends     []ending
	refusals []refusal
	heard    []uint64 // numbers of the server's pushes, in the order in which they came
	asked    int      // messages that asked for its full state
	strays   []string // what was not for it
	told     []*protobufs.ServerErrorResponse
	waiting  map[uint64]time.Time // for which answers, and since when, if it is timed
	answers  []echoed
}

// ending is how a connection of an agent ended.
type ending struct {
	at   time.Time
	code int // of the close frame; 0 if there was none
	err  error
}

// refusal is the answer to an upgrade request that failed.
type refusal struct {
	status     int // 0 if there was no answer
	retryAfter string
	err        error
}

// startFleet starts n agents that keep connecting, so many at a time, until the end of the test.
func startFleet(t *testing.T, n int, url string, atOnce int) *Fleet {
	t.Helper()
	return startFleetOf(t, n, url, atOnce, fleetOptions{})
}

func startFleetOf(t *testing.T, n int, url string, atOnce int, opts fleetOptions) *Fleet {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	f := &Fleet{url: url, opts: opts, ctx: ctx, turns: make(chan struct{}, atOnce)}
	t.Cleanup(func() {
		cancel()
		f.work.Wait()
	})
	for range n {
		a := &FleetAgent{fleet: f, uid: uuid.New(), waiting: map[uint64]time.Time{}}
		f.agents = append(f.agents, a)
		f.work.Go(a.live)
	}
	return f
}

// live is an agent's life; it ends with the test.
func (a *FleetAgent) live() {
	delay := firstDelay
	for a.fleet.ctx.Err() == nil {
		ws, refused := a.dial()
		if ws == nil {
			a.mu.Lock()
			a.refusals = append(a.refusals, refused)
			a.mu.Unlock()
			wait := delay/2 + rand.N(delay)
			if seconds, err := strconv.Atoi(refused.retryAfter); err == nil {
				wait = time.Duration(seconds) * time.Second
			}
			delay = min(time.Duration(delayGrowth*float64(delay)), lastDelay)
			select {
			case <-time.After(wait):
			case <-a.fleet.ctx.Done():
			}
			continue
		}
		delay = firstDelay
		a.mu.Lock()
		a.ws, a.since = ws, time.Now()
		a.connects++
		first := a.connects == 1
		a.mu.Unlock()
		if first {
			a.state() // an agent that comes back says only what is new
		} else {
			a.say(nil)
		}
		end := a.readAll(ws)
		a.mu.Lock()
		a.ws = nil
		a.ends = append(a.ends, end)
		a.mu.Unlock()
	}
}

// smallBuffers are shared by all agents; they write little and seldom.
var smallBuffers sync.Pool

func (a *FleetAgent) dial() (*websocket.Conn, refusal) {
	select {
	case a.fleet.turns <- struct{}{}:
		defer func() { <-a.fleet.turns }()
	case <-a.fleet.ctx.Done():
		return nil, refusal{err: a.fleet.ctx.Err()}
	}
	dialer := websocket.Dialer{
		HandshakeTimeout: upgradeTimeout, ReadBufferSize: 1 << 10, WriteBufferSize: 4 << 10, WriteBufferPool: &smallBuffers,
		NetDialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
			conn, err := (&net.Dialer{}).DialContext(ctx, network, address)
			if err != nil {
				return nil, err
			}
			context.AfterFunc(a.fleet.ctx, func() { conn.Close() })
			if size := a.fleet.opts.writeBuffer; size > 0 {
				err = conn.(*net.TCPConn).SetWriteBuffer(size)
			}
			if limit := a.fleet.opts.frameLimit; limit > 0 {
				conn = limitFrames(conn, limit)
			}
			return conn, err
		},
	}
	headers := http.Header{"Agent-ID": {a.uid.String()}}
	if names := a.fleet.opts.userAgents; names != nil {
		headers.Set("User-Agent", names[int(a.uid[0])%len(names)])
	}
	ws, resp, err := dialer.DialContext(a.fleet.ctx, a.fleet.url, headers)
	if err == nil {
		return ws, refusal{}
	}
	refused := refusal{err: err}
	if resp != nil {
		refused.status = resp.StatusCode
		if resp.StatusCode == http.StatusServiceUnavailable || resp.StatusCode == http.StatusTooManyRequests {
			refused.retryAfter = resp.Header.Get("Retry-After")
		}
	}
	return nil, refused
}

// readAll ends with the connection.
func (a *FleetAgent) readAll(ws *websocket.Conn) ending {
	for {
		_, frame, err := ws.ReadMessage()
		if err != nil {
			ws.Close()
			end := ending{at: time.Now(), err: err}
			if closed, ok := err.(*websocket.CloseError); ok && closed.Code != websocket.CloseAbnormalClosure { //nolint:errorlint // gorilla's own, as it is
				end.code = closed.Code
			}
			return end
		}
		a.take(frame)
	}
}

func (a *FleetAgent) take(frame []byte) {
	var m protobufs.ServerToAgent
	err := proto.Unmarshal(frame[1:], &m) // behind the header
	fullState := m.GetFlags()&uint64(protobufs.ServerToAgentFlags_ServerToAgentFlags_ReportFullState) != 0
	a.mu.Lock()
	switch data := m.GetCustomMessage().GetData(); {
	case err != nil || !bytes.Equal(m.GetInstanceUid(), a.uid[:]):
		a.strays = append(a.strays, fmt.Sprintf("%v %v", &m, err))
	case m.GetErrorResponse() != nil:
		a.told = append(a.told, m.GetErrorResponse())
	case m.GetCustomMessage().GetType() == echo && len(data) >= 8:
		a.hearLocked(binary.BigEndian.Uint64(data), data[8:])
	case m.GetCustomMessage().GetCapability() == chat && len(data) >= 8:
		a.heard = append(a.heard, binary.BigEndian.Uint64(data))
	case fullState:
		a.asked++
	}
	a.mu.Unlock()
	if fullState && !a.stating.Swap(true) {
		a.fleet.work.Go(a.state) // its reader goes on
	}
}

// state says who the agent is, in full.
func (a *FleetAgent) state() {
	a.stating.Store(false)
	if state := a.fleet.opts.state; state != nil {
		a.say(proto.Clone(state).(*protobufs.AgentToServer))
		return
	}
	a.say(&protobufs.AgentToServer{
		AgentDescription: &protobufs.AgentDescription{IdentifyingAttributes: []*protobufs.KeyValue{{
			Key:   "service.name",
			Value: &protobufs.AnyValue{Value: &protobufs.AnyValue_StringValue{StringValue: "agent " + a.uid.String()}},
		}}},
	})
}

// say sends m, or else a heartbeat, with the next number. It waits as long as the gateway has
// the agent wait, and reports whether the agent was connected.
func (a *FleetAgent) say(m *protobufs.AgentToServer) bool {
	if m == nil {
		m = &protobufs.AgentToServer{}
	}
	a.writing.Lock()
	defer a.writing.Unlock()
	a.mu.Lock()
	ws := a.ws
	a.mu.Unlock()
	if ws == nil {
		return false
	}
	m.InstanceUid, m.SequenceNum, m.Capabilities = a.uid[:], a.number.Add(1), 1
	if a.fleet != nil && a.fleet.opts.timed {
		a.mu.Lock()
		a.waiting[m.GetSequenceNum()] = time.Now()
		a.mu.Unlock()
	}
	frame, err := proto.MarshalOptions{}.MarshalAppend([]byte{0}, m)
	if err != nil {
		panic("an agent's message cannot be marshalled: " + err.Error()) // it is made here
	}
	return ws.WriteMessage(websocket.BinaryMessage, frame) == nil
}

// lastHeard returns the number of the last push that the agent has heard.
func (a *FleetAgent) lastHeard() uint64 {
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.heard) == 0 {
		return 0
	}
	return a.heard[len(a.heard)-1]
}

// talk has each agent say something about so often, until stop is called.
func (f *Fleet) talk(t *testing.T, every time.Duration) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(f.ctx)
	var talking sync.WaitGroup
	for _, a := range f.agents {
		talking.Add(1)
		f.work.Go(func() {
			defer talking.Done()
			for {
				select {
				case <-time.After(every/2 + rand.N(every)):
					a.say(nil)
				case <-ctx.Done():
					return
				}
			}
		})
	}
	stop = sync.OnceFunc(func() {
		cancel()
		talking.Wait()
	})
	t.Cleanup(cancel)
	return stop
}

// sayAll has each agent say n things with so many bytes in each. It returns when they are said;
// an agent that the gateway has wait holds up nobody else.
func (f *Fleet) sayAll(n, size int) {
	var talking sync.WaitGroup
	for _, a := range f.agents {
		talking.Go(func() { // until the agent's connection ends, at the latest
			for range n {
				a.say(chatOf(size))
			}
		})
	}
	talking.Wait()
}

// said returns how much all agents have said so far, or are just saying.
func (f *Fleet) said() (n uint64) {
	for _, a := range f.agents {
		n += a.number.Load()
	}
	return n
}

// chatOf returns a message of about this size; nil, a heartbeat, for 0.
func chatOf(size int) *protobufs.AgentToServer {
	if size == 0 {
		return nil
	}
	return &protobufs.AgentToServer{CustomMessage: &protobufs.CustomMessage{Capability: chat, Type: "says", Data: make([]byte, size)}}
}

// connected returns how many agents are.
func (f *Fleet) connected() (n int) {
	for _, a := range f.agents {
		a.mu.Lock()
		if a.ws != nil {
			n++
		}
		a.mu.Unlock()
	}
	return n
}

// wantConnected waits until all agents have connected for the nth time, and returns when the
// last one had.
func (f *Fleet) wantConnected(t *testing.T, limit time.Duration, nth int) (last time.Time) {
	t.Helper()
	within(t, limit, func() string {
		n := 0
		for _, a := range f.agents {
			a.mu.Lock()
			if a.ws != nil && a.connects == nth {
				n++
				if a.since.After(last) {
					last = a.since
				}
			}
			a.mu.Unlock()
		}
		if n < len(f.agents) {
			return fmt.Sprintf("%d agents of %d have connected for the %dth time; %s", n, len(f.agents), nth, f)
		}
		return ""
	})
	return last
}

// wantUndisturbed checks that every agent has connected once, at its first attempt, has stayed,
// has heard only what was for it, and the pushes in order.
func (f *Fleet) wantUndisturbed(t *testing.T) {
	t.Helper()
	for _, a := range f.agents {
		a.mu.Lock()
		connects, ends, refusals := a.connects, a.ends, a.refusals
		a.mu.Unlock()
		require.Empty(t, refusals, "refusals of agent %s", a.uid)
		require.Empty(t, ends, "connections of agent %s that have ended; %s", a.uid, f)
		require.Equal(t, 1, connects, "connections of agent %s", a.uid)
	}
	f.wantOrder(t)
}

// wantOrder checks that every agent has heard only what was for it, and the pushes in order.
func (f *Fleet) wantOrder(t *testing.T) {
	t.Helper()
	for _, a := range f.agents {
		a.mu.Lock()
		heard, strays := a.heard, a.strays
		a.mu.Unlock()
		require.Empty(t, strays, "what agent %s heard that is not for it", a.uid)
		for i := 1; i < len(heard); i++ {
			require.Greater(t, heard[i], heard[i-1], "pushes that agent %s has heard: %v", a.uid, heard)
		}
	}
}

// refusals returns how often an upgrade was refused, by status; 0 is no answer.
func (f *Fleet) refusals() map[int]int {
	by := map[int]int{}
	for _, a := range f.agents {
		a.mu.Lock()
		for _, r := range a.refusals {
			by[r.status]++
		}
		a.mu.Unlock()
	}
	return by
}

func (f *Fleet) String() string {
	ends := map[string]int{}
	for _, a := range f.agents {
		a.mu.Lock()
		for _, end := range a.ends {
			ends[end.err.Error()]++
		}
		a.mu.Unlock()
	}
	return fmt.Sprintf("%d agents, %d connected; refusals %v; ended connections %v", len(f.agents), f.connected(), f.refusals(), ends)
}
