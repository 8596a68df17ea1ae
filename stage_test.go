package opampgateway

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"net"
	"net/http"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
	"unsafe"

	"github.com/stretchr/testify/require"
	"go.opentelemetry.io/collector/component"
	"go.opentelemetry.io/collector/component/componentstatus"
	"go.opentelemetry.io/collector/component/componenttest"
	"go.opentelemetry.io/collector/config/confignet"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"github.com/opampgateway/opampgateway/internal/gatewaytest"
	"github.com/opampgateway/opampgateway/internal/metadatatest"
	"github.com/opampgateway/opampgateway/internal/questions"
	"github.com/opampgateway/opampgateway/internal/telemetry"
)

const (
	serverAddress  = "localhost:9000" // localhost: no proxy of the environment gets in between
	gatewayAddress = "localhost:4320"
)

// stage is where the tests play: a server, a gateway in front of it, and a network in memory
// that connects them and whatever agents a test brings, in fake time. When the play is over,
// agents leave, nothing may be left of them in the gateway, the gateway is shut down, and
// no goroutine may be left of anybody.
type stage struct {
	t      *testing.T
	net    *gatewaytest.Network
	server *gatewaytest.Server
	*running

	extensions map[component.ID]component.Component // of the gateway's collector; set before start
}

// play runs a test in fake time on a stage with a server and a gateway whose links are up. The server
// has answered a question before. The gateway has the default configuration, changed by change.
func play(t *testing.T, test func(t *testing.T, s *stage), change ...func(*Config)) {
	t.Helper()
	playUntried(t, func(t *testing.T, s *stage) {
		questions.NewBook[*asker](s.pool.target.Load().asking).Answer("an earlier question", time.Now())
		test(t, s)
	}, change...)
}

// playUntried is play with a server that has never answered a question.
func playUntried(t *testing.T, test func(t *testing.T, s *stage), change ...func(*Config)) {
	t.Helper()
	playWithout(t, func(t *testing.T, s *stage) {
		s.server.Start()
		begin := time.Now()
		s.start(change...)
		s.server.WantLinks(s.cfg.Server.Connections)
		time.Sleep(linkSweepInterval - time.Since(begin)) // so that a link that is lost dials at once
		synctest.Wait()
		test(t, s)
	})
}

// playWithout is play before the server and the gateway are started.
func playWithout(t *testing.T, test func(t *testing.T, s *stage)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		s := &stage{t: t, net: gatewaytest.NewNetwork()}
		s.server = gatewaytest.NewServer(t, func() (net.Listener, error) { return s.net.Listen(serverAddress) })
		test(t, s)
	})
}

// start starts the gateway of the stage.
func (s *stage) start(change ...func(*Config)) {
	s.t.Helper()
	s.running = startWith(s.t, s.extensions, s.net, serverAddress, gatewayAddress, change...)
}

// connect has the agent of this name let in; further headers are given as name, value ….
func (s *stage) connect(name string, headers ...string) *gatewaytest.Agent {
	s.t.Helper()
	return s.door.Connect(s.t, name, headers...)
}

// introduce is connect for an agent that has said its first words, so that it can be found.
func (s *stage) introduce(name string, headers ...string) *gatewaytest.Agent {
	s.t.Helper()
	a := s.connect(name, headers...)
	s.server.WantFrame(a.UID, a.Say(0))
	return a
}

// comeFrom has agents that connect from here on do so from the host of this address.
func (s *stage) comeFrom(ip string) { s.door.Dial = s.net.DialFrom(ip) }

// linkOf returns the server's end of the link to which the agent of that name is attached.
func (s *stage) linkOf(a *gatewaytest.Agent) *gatewaytest.Link {
	s.t.Helper()
	a.Say(1000)
	return s.server.Next(a.UID).Link
}

// running is a gateway with what is observed of it.
type running struct {
	*gateway
	cfg     *Config
	door    gatewaytest.Door
	metrics *componenttest.Telemetry
	logs    *observer.ObservedLogs
	host    *statusHost

	t         *testing.T
	network   *gatewaytest.Network
	e         *gatewayExtension
	id        component.ID // of the component
	told      bool         // the process was told to end
	toldAgain atomic.Bool  // and once more
	over      sync.Once
}

// startRunning starts a gateway between two addresses.
func startRunning(t *testing.T, network *gatewaytest.Network, server, listen string, change ...func(*Config)) *running {
	t.Helper()
	return startWith(t, nil, network, server, listen, change...)
}

// startWith is startRunning in a collector that has these extensions.
func startWith(t *testing.T, extensions map[component.ID]component.Component, network *gatewaytest.Network, server, listen string, change ...func(*Config)) *running {
	t.Helper()
	cfg := createDefaultConfig().(*Config)
	cfg.Server.Endpoint = "ws://" + server + "/v1/opamp"
	cfg.Agents.AllowGateways = true // many tests are about those
	for _, f := range change {
		f(cfg)
	}
	cfg.Listener.NetAddr.Endpoint = listen
	r := &running{
		t: t, cfg: cfg, network: network,
		door: gatewaytest.Door{URL: "ws://" + listen + "/v1/opamp", Dial: network.Dial},
	}
	require.NoError(t, r.begin(cfg, extensions))
	t.Cleanup(func() {
		defer time.Sleep(time.Second) // net/http is slow to let go of a connection that it refused
		defer r.wantNothingHeld()
		defer r.stop()
		if !t.Failed() {
			r.wantConsistent()
			r.wantNobody()
		}
	})
	return r
}

// begin has a collector start the extension with this configuration.
func (r *running) begin(cfg *Config, extensions map[component.ID]component.Component) error {
	r.t.Helper()
	r.cfg, r.metrics = cfg, componenttest.NewTelemetry()
	r.host = &statusHost{Host: componenttest.NewNopHost(), extensions: extensions}
	set := metadatatest.NewSettings(r.metrics)
	set.BuildInfo = component.BuildInfo{Command: "otelcol-test", Version: "1.2.3"}
	set.Resource.Attributes().PutStr(instanceIDKey, "gateway")
	var core zapcore.Core
	core, r.logs = observer.New(zap.DebugLevel)
	set.Logger = zap.New(core)
	if r.id != (component.ID{}) {
		set.ID = r.id
	}
	e, err := newGatewayExtension(set, cfg)
	require.NoError(r.t, err)
	e.told, e.anew = func() bool { return r.told }, func() bool { return r.toldAgain.Load() }
	e.net = func(_ context.Context, at confignet.AddrConfig) (net.Listener, error) {
		return r.network.Listen(at.Endpoint)
	}
	e.dial = r.network.Dial
	r.e = e
	ctx, cancel := context.WithCancel(r.t.Context())
	defer cancel() // the context is for starting only
	if err := e.Start(ctx, r.host); err != nil {
		return err
	}
	r.gateway = e.gateway
	return nil
}

// stop shuts the gateway down and returns how long that took.
func (r *running) stop() (took time.Duration) {
	r.over.Do(func() {
		start := time.Now()
		r.told = true
		require.NoError(r.t, r.e.Shutdown(context.Background()))
		took = time.Since(start)
	})
	return took
}

// wantNothingHeld checks that no memory is counted for messages any more.
func (r *running) wantNothingHeld() {
	r.t.Helper()
	require.Zero(r.t, r.server.memory.Up.Held(), "bytes of agents' messages")
	require.Zero(r.t, r.server.memory.Down.Held(), "bytes of the server's messages")
	require.Zero(r.t, r.server.memory.Kept.Held(), "bytes kept of agents")
}

// wantConsistent checks that the structures of the gateway agree with each other, once it is quiet.
func (r *running) wantConsistent() {
	r.t.Helper()
	synctest.Wait()
	r.pool.mu.Lock()
	defer r.pool.mu.Unlock()
	r.server.mu.Lock()
	defer r.server.mu.Unlock()
	r.router.mu.RLock()
	defer r.router.mu.RUnlock()
	count := 0
	for slot, l := range r.pool.live {
		if l == nil {
			continue
		}
		if !l.leaving {
			count++
		}
		require.Equal(r.t, slot, l.slot)
		for a := range l.agents {
			require.Same(r.t, l, a.attached, "attached to another link than the one that counts it")
		}
	}
	require.Equal(r.t, count, r.pool.count, "number of live links")
	for a := range r.server.agents {
		require.False(r.t, a.ending.Ended(), "an agent that has ended is still among the connected")
		if l := a.link.Load(); l != nil && l == a.attached {
			require.Contains(r.t, l.agents, a)
		}
		for i, c := range a.claims.all {
			require.Same(r.t, a, c.agent)
			require.Equal(r.t, i, c.index)
			require.Same(r.t, c.route, r.router.routes[c.route.uid], "a claim to a route that is not in the table")
		}
	}
	for uid, way := range r.router.routes {
		require.Equal(r.t, uid, way.uid)
		require.NotNil(r.t, way.current.Load(), "a route that nobody claims")
		for c := way.current.Load(); c != nil; c = c.older {
			require.Same(r.t, way, c.route)
			require.Contains(r.t, c.agent.claims.all, c)
			require.Contains(r.t, r.server.agents, c.agent, "a route to an agent that is not connected")
			if current := way.current.Load().agent; !current.gateway && !c.agent.gateway {
				require.Equal(r.t, current.credentials, c.agent.credentials, "a route of two owners")
			}
			if c.older != nil {
				require.Same(r.t, c, c.older.newer)
			}
		}
	}
}

// wantNobody checks that the gateway holds nothing any more of any agent. Those that vanished
// without a word, or while they were waiting for a link, are given time to be noticed.
func (r *running) wantNobody() {
	r.t.Helper()
	synctest.Wait()
	for range 10 {
		if r.server.count() == 0 && r.memory.Requests.Held() == 0 {
			break
		}
		time.Sleep(20 * time.Second)
		synctest.Wait()
	}
	require.Zero(r.t, r.server.count(), "agents connected")
	require.Zero(r.t, r.memory.Requests.Held(), "bytes of agents waiting to be let in")
	r.router.mu.RLock()
	require.Empty(r.t, r.router.routes, "routes")
	r.router.mu.RUnlock()
	for _, l := range r.pool.links() {
		r.wantIdle(l)
	}
}

// wantIdle checks that a link has nothing to do with anybody.
func (r *running) wantIdle(l *link) {
	r.t.Helper()
	r.pool.mu.Lock()
	require.Empty(r.t, l.agents, "agents attached to a link")
	r.pool.mu.Unlock()
	waiting, _ := l.book.Len() // those sent keep their places until they are answered, or expire
	require.Zero(r.t, waiting, "questions that wait on a link")
	outbox := reflect.ValueOf(l.Outbox).Elem()
	mu := (*sync.Mutex)(unsafe.Pointer(outbox.FieldByName("mu").UnsafeAddr()))
	mu.Lock()
	defer mu.Unlock()
	require.Zero(r.t, outbox.FieldByName("size").Int(), "bytes in a link's outbox")
	require.Zero(r.t, outbox.FieldByName("crowd").Len(), "agents waiting for a link's outbox")
	require.True(r.t, outbox.FieldByName("idle").Bool(), "writer of a link's outbox runs")
}

// wantConnections checks how many agents are connected.
func (r *running) wantConnections(n int) {
	r.t.Helper()
	synctest.Wait()
	require.Equal(r.t, n, r.server.count(), "agents connected")
}

// wantSpread checks that no link has many more agents than another.
func (r *running) wantSpread(agents, most int) {
	r.t.Helper()
	synctest.Wait()
	r.pool.mu.Lock()
	defer r.pool.mu.Unlock()
	var loads []int
	total := 0
	for _, l := range r.pool.live {
		if l != nil {
			loads = append(loads, len(l.agents))
			total += len(l.agents)
		}
	}
	require.Equal(r.t, agents, total, "agents attached")
	require.LessOrEqual(r.t, slices.Max(loads)-slices.Min(loads), most, "agents per link: %v", loads)
}

// count returns how often a metric with this attribute value was counted.
func (r *running) counted(name, value string) int64 {
	r.t.Helper()
	synctest.Wait()
	metric, err := r.metrics.GetMetric("otelcol_opampgateway." + name)
	if err != nil {
		return 0 // never counted anything
	}
	for _, point := range metric.Data.(metricdata.Sum[int64]).DataPoints {
		for _, attribute := range point.Attributes.ToSlice() {
			if attribute.Value.AsString() == value {
				return point.Value
			}
		}
	}
	return 0
}

// wantFault checks how often something has gone wrong, by reason.
func (r *running) wantFault(reason telemetry.Reason, n int) {
	r.t.Helper()
	require.EqualValues(r.t, n, r.counted("faults", string(reason)), "faults: %s", reason)
}

// wantFaults checks all that has gone wrong.
func (r *running) wantFaults(want map[telemetry.Reason]int) {
	r.t.Helper()
	synctest.Wait()
	got := map[telemetry.Reason]int{}
	if metric, err := r.metrics.GetMetric("otelcol_opampgateway.faults"); err == nil {
		for _, point := range metric.Data.(metricdata.Sum[int64]).DataPoints {
			reason, _ := point.Attributes.Value("reason")
			if point.Value > 0 {
				got[telemetry.Reason(reason.AsString())] = int(point.Value)
			}
		}
	}
	if want == nil {
		want = map[telemetry.Reason]int{}
	}
	require.Equal(r.t, want, got, "faults")
}

// wantAdmissions checks how often agents' requests ended so.
func (r *running) wantAdmissions(outcome telemetry.Outcome, n int) {
	r.t.Helper()
	synctest.Wait() // an answer is counted when it is written
	require.EqualValues(r.t, n, r.counted("admissions", string(outcome)), "admissions: %s", outcome)
}

// logged returns the log entries of a level in which text occurs.
func (r *running) logged(level zapcore.Level, text string) []observer.LoggedEntry {
	var found []observer.LoggedEntry
	for _, entry := range r.logs.All() {
		if entry.Level == level && strings.Contains(entry.Message, text) {
			found = append(found, entry)
		}
	}
	return found
}

// wantNotLogged checks that no log entry, of any level, has secret in it anywhere.
func (r *running) wantNotLogged(secrets ...string) {
	r.t.Helper()
	require.NotEmpty(r.t, r.logs.All())
	for _, entry := range r.logs.All() {
		line := entry.Message + fmt.Sprint(entry.ContextMap())
		for _, secret := range secrets {
			require.NotContains(r.t, line, secret, "log")
		}
	}
	for _, span := range r.metrics.SpanRecorder.Ended() {
		for _, attribute := range span.Attributes() {
			for _, secret := range secrets {
				require.NotContains(r.t, attribute.Value.String(), secret, "trace")
			}
		}
	}
}

// statusHost is a collector that remembers what the gateway reports of itself.
type statusHost struct {
	component.Host
	extensions map[component.ID]component.Component

	mu     sync.Mutex
	events []*componentstatus.Event
}

func (h *statusHost) GetExtensions() map[component.ID]component.Component { return h.extensions }

// Report is that of componentstatus.Reporter.
func (h *statusHost) Report(event *componentstatus.Event) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.events = append(h.events, event)
}

// statuses returns what was reported, without repetitions.
func (h *statusHost) statuses() []componentstatus.Status {
	h.mu.Lock()
	defer h.mu.Unlock()
	var statuses []componentstatus.Status
	for _, event := range h.events {
		statuses = append(statuses, event.Status())
	}
	return slices.Compact(statuses)
}

// sortedKeys returns the keys of m in order.
func sortedKeys[K cmp.Ordered, V any](m map[K]V) []K { return slices.Sorted(maps.Keys(m)) }

// answer is what an agent got that knocked.
type answer struct {
	name  string
	agent *gatewaytest.Agent // if it was let in
	*http.Response
	err  error
	took time.Duration
}

// knock has the agent of this name ask to be let in, meanwhile.
func (s *stage) knock(name string, headers ...string) <-chan answer {
	return s.knockContext(s.t.Context(), name, headers...)
}

// knockContext is knock by an agent that hangs up when ctx ends.
func (s *stage) knockContext(ctx context.Context, name string, headers ...string) <-chan answer {
	answers, start, door := make(chan answer, 1), time.Now(), s.door
	go func() {
		agent, resp, err := door.KnockContext(ctx, s.t, name, headers...)
		answers <- answer{name, agent, resp, err, time.Since(start)}
	}()
	return answers
}

// wantLetIn waits for the answer to a knock, which has to let the agent in.
func (s *stage) wantLetIn(answers <-chan answer) *gatewaytest.Agent {
	s.t.Helper()
	a := <-answers
	if a.agent == nil {
		s.t.Fatalf("%s was not let in: %v %v", a.name, a.Response, a.err)
	}
	return a.agent
}

// wantTurnedAway waits for the answer to a knock, which has to be a 503 that asks for at least 30 s.
func (s *stage) wantTurnedAway(answers <-chan answer) answer {
	s.t.Helper()
	a := <-answers
	require.Nil(s.t, a.agent, "%s was let in", a.name)
	require.NotNil(s.t, a.Response, "%s got no answer", a.name)
	require.Equal(s.t, http.StatusServiceUnavailable, a.StatusCode)
	seconds, err := strconv.Atoi(a.Header.Get("Retry-After"))
	require.NoError(s.t, err)
	require.GreaterOrEqual(s.t, seconds, 30)
	require.LessOrEqual(s.t, seconds, 60)
	return a
}
