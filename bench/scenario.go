package main

import (
	"errors"
	"fmt"
	"math"
	"time"
)

// scenario is one kind of measurement.
type scenario struct {
	name    string
	about   string
	without []string // subjects that it makes no sense for
	repeat  int      // repetitions at most; 0 for all
	run     func(b *bench, s *subject) error
}

var scenarios = []*scenario{
	{name: "saturated", about: "1,000 agents, each says 200 bytes and gets 200 back, again and again", run: func(b *bench, s *subject) error {
		return b.underLoad("saturated", s, traffic{agents: b.choose(1000, 200), size: 200})
	}},
	{name: "tls", about: "the same over TLS", run: func(b *bench, s *subject) error {
		return b.underLoad("tls", s, traffic{agents: b.choose(1000, 200), size: 200, tls: true})
	}},
	{name: "paced-1k", about: "1,000 agents, 1,000 messages of 200 bytes a second, and their replies", run: func(b *bench, s *subject) error {
		return b.underLoad("paced-1k", s, traffic{agents: b.choose(1000, 200), size: 200, rate: 1000})
	}},
	{name: "paced-10k", about: "1,000 agents, 10,000 messages of 200 bytes a second, and their replies", run: func(b *bench, s *subject) error {
		return b.underLoad("paced-10k", s, traffic{agents: b.choose(1000, 200), size: 200, rate: 10_000})
	}},
	{name: "http-1k", about: "1,000 agents over plain HTTP, each polls once a second with 200 bytes, and gets 200 back", without: []string{nameNaive}, run: func(b *bench, s *subject) error {
		agents := b.choose(1000, 200)
		return b.underLoad("http-1k", s, traffic{agents: agents, size: 200, rate: agents, posts: true})
	}},
	{name: "large", about: "50 agents, each says 64 KiB and gets 64 KiB back, again and again", run: func(b *bench, s *subject) error {
		return b.underLoad("large", s, traffic{agents: 50, size: 64 << 10})
	}},
	{name: "storm", about: "agents connect, 500 at once; the gateway and the naive relay ask the server about each", without: []string{nameDirect}, run: (*bench).storm},
	{name: "verify", about: "the same, and the gateway lets the server decide by a WebSocket with the agent's own headers", without: []string{nameNaive, nameDirect}, run: (*bench).verify},
	{name: "disconnect", about: "all agents leave at once, without a goodbye", without: []string{nameDirect}, run: (*bench).disconnect},
	{name: "memory", about: "memory of agents that say nothing", without: []string{nameDirect}, repeat: 2, run: func(b *bench, s *subject) error {
		return b.memory("memory", s, false)
	}},
	{name: "memory-tls", about: "the same over TLS", without: []string{nameDirect}, repeat: 2, run: func(b *bench, s *subject) error {
		return b.memory("memory-tls", s, true)
	}},
	{name: "stalled", about: "one of 500 agents stops reading while the server sends to it", run: (*bench).stalled},
	{name: "link-loss", about: "all links end at once; until a push of the server reaches every agent", without: []string{nameHAProxy, nameNaive, nameDirect}, run: (*bench).linkLoss},
}

// traffic is what agents say.
type traffic struct {
	agents, size, rate int // rate 0: saturated
	tls                bool
	posts              bool // over plain HTTP
}

func (b *bench) underLoad(scenario string, s *subject, t traffic) error {
	st, err := b.stage(s, t.tls)
	if err != nil {
		return err
	}
	defer st.close()
	if t.posts {
		if err := st.load.call("Posts", nil, nil); err != nil {
			return err
		}
	}
	if err := st.connect(t.agents, 200, true); err != nil {
		return err
	}
	return b.measure(scenario, st, t)
}

// measure puts a load on a stage whose agents are connected.
func (b *bench) measure(scenario string, st *stage, t traffic) error {
	if err := st.load.call("Start", Start{Size: t.size, Rate: t.rate}, nil); err != nil {
		return err
	}
	time.Sleep(b.window / 3) // buffers, heaps and schedulers find their level
	w, err := st.watch(b.window)
	if err != nil {
		return err
	}
	if err := st.load.call("Stop", nil, nil); err != nil {
		return err
	}
	if _, err := st.loadState(); err != nil {
		return err
	}
	if w.replies == 0 {
		return errors.New("no replies")
	}
	r := b.results
	if st.pid != 0 {
		r.add(scenario, perRoundTrip, "µs", st.name, float64(w.cpu.Nanoseconds())/1e3/float64(w.replies))
		r.add(scenario, "CPU used", "cores", st.name, w.cpu.Seconds()/w.took.Seconds())
	}
	r.add(scenario, "round trips", "1/s", st.name, float64(w.replies)/w.took.Seconds())
	r.add(scenario, "latency p50", "µs", st.name, w.latency.quantile(0.5)/1e3)
	r.add(scenario, "latency p99", "µs", st.name, w.latency.quantile(0.99)/1e3)
	return nil
}

// watched is what happened in a window of time.
type watched struct {
	took    time.Duration
	cpu     time.Duration // of the subject
	replies uint64
	latency histogram
}

func (st *stage) watch(window time.Duration) (w watched, err error) {
	before, err := st.loadState()
	if err != nil {
		return w, err
	}
	cpuBefore, err := st.cpu()
	if err != nil {
		return w, err
	}
	start := time.Now()
	time.Sleep(window)
	after, err := st.loadState()
	if err != nil {
		return w, err
	}
	cpuAfter, err := st.cpu()
	return watched{time.Since(start), cpuAfter - cpuBefore, after.Replies - before.Replies, after.Latency.since(before.Latency)}, err
}

// storm measures what it costs to let an agent in.
func (b *bench) storm(s *subject) error {
	return b.letIn("storm", s, func(st ServerState) int64 { return st.Connects })
}

// verify measures it where the gateway does not ask, but makes a WebSocket for each agent.
func (b *bench) verify(s *subject) error {
	b.admission = "verify"
	defer func() { b.admission = "" }()
	return b.letIn("verify", s, func(st ServerState) int64 { return st.Upgrades - int64(s.links) })
}

// letIn has agents connect, about each of which the server has to be asked, which asked counts.
func (b *bench) letIn(scenario string, s *subject, asked func(ServerState) int64) error {
	st, err := b.stage(s, false)
	if err != nil {
		return err
	}
	defer st.close()
	agents := b.choose(3000, 500)
	before, err := st.quiet()
	if err != nil {
		return err
	}
	start := time.Now()
	if err := st.connect(agents, 500, false); err != nil {
		return err
	}
	took := time.Since(start)
	after, err := st.quiet()
	if err != nil {
		return err
	}
	if state, err := st.serverState(); err != nil || s.links > 0 && asked(state) != int64(agents) {
		return errors.Join(err, fmt.Errorf("the server was asked about %d of %d agents", asked(state), agents))
	}
	b.results.add(scenario, "CPU per agent let in", "µs", s.name, float64((after-before).Nanoseconds())/1e3/float64(agents))
	b.results.add(scenario, "agents let in", "1/s", s.name, float64(agents)/took.Seconds())
	_, err = st.loadState()
	return err
}

// disconnect measures what it costs when agents leave, at two sizes.
func (b *bench) disconnect(s *subject) error {
	for _, size := range []struct{ agents, rounds int }{
		{b.choose(2000, 200), 4}, // a small number of agents more than once, for the same precision
		{b.choose(15_000, 600), 1},
	} {
		if size.agents*s.files > maxFiles()-200 {
			continue
		}
		if err := b.disconnectOf(s, size.agents, size.rounds); err != nil {
			return err
		}
	}
	return nil
}

func (b *bench) disconnectOf(s *subject, agents, rounds int) error {
	st, err := b.stage(s, false)
	if err != nil {
		return err
	}
	defer st.close()
	var cpu time.Duration
	for round := range rounds {
		if err := st.connect(agents, 200, true); err != nil {
			return err
		}
		before, err := st.quiet()
		if err != nil {
			return err
		}
		if _, err := st.loadState(); err != nil {
			return err
		}
		if err := st.load.call("Disconnect", nil, nil); err != nil {
			return err
		}
		if err := wait(time.Minute, func() error { return st.gone(int64(agents * (round + 1))) }); err != nil {
			return err
		}
		after, err := st.quiet()
		if err != nil {
			return err
		}
		cpu += after - before
	}
	b.results.add("disconnect", fmt.Sprintf("CPU per disconnect of %d", agents), "µs", s.name,
		float64(cpu.Nanoseconds())/1e3/float64(agents*rounds))
	return nil
}

// gone finds out whether the server knows that so many agents have left.
func (st *stage) gone(agents int64) error {
	state, err := st.serverState()
	switch {
	case err != nil:
		return err
	case st.links > 0 && state.Disconnects < agents:
		return fmt.Errorf("%d of %d agents have left", state.Disconnects, agents)
	case st.links == 0 && state.Conns > 0:
		return fmt.Errorf("%d connections are left", state.Conns)
	}
	return nil
}

// memory measures what idle agents take, more and more of them.
func (b *bench) memory(scenario string, s *subject, tls bool) error {
	st, err := b.stage(s, tls)
	if err != nil {
		return err
	}
	defer st.close()
	time.Sleep(min(b.settle, 3*time.Second))
	empty, err := resident(st.pid)
	if err != nil {
		return err
	}
	b.results.add(scenario, "without agents", "MiB", s.name, empty/(1<<20))
	connected := 0
	for _, agents := range []int{b.choose(2000, 200), b.choose(5000, 400), b.choose(10_000, 600), b.choose(15_000, 800)} {
		if agents*s.files > maxFiles()-200 {
			break
		}
		if err := st.connect(agents-connected, 200, true); err != nil {
			return err
		}
		connected = agents
		time.Sleep(b.settle)
		full, err := resident(st.pid)
		if err != nil {
			return err
		}
		b.results.add(scenario, fmt.Sprintf("per agent, of %d", agents), "KiB", s.name, (full-empty)/1024/float64(agents))
	}
	_, err = st.loadState()
	return err
}

// stalled measures what the others feel when one agent stops reading.
func (b *bench) stalled(s *subject) error {
	st, err := b.stage(s, false)
	if err != nil {
		return err
	}
	defer st.close()
	if err := st.connect(500, 200, true); err != nil {
		return err
	}
	if err := st.load.call("Start", Start{Size: 200, Rate: 2000, Skip: 1}, nil); err != nil {
		return err
	}
	time.Sleep(b.window / 3)
	healthy, err := st.watch(b.window)
	if err != nil {
		return err
	}
	if err := st.load.call("Stall", nil, nil); err != nil {
		return err
	}
	// What sockets hold is filled at once; then it goes on at 1 MiB/s.
	flood := Flood{Agent: 0, Size: 64 << 10, Every: time.Second / 16, Burst: 64, Pushes: 16 * 60}
	if err := st.server.call("Flood", flood, nil); err != nil {
		return err
	}
	time.Sleep(b.window / 3)
	during, err := st.watch(b.window)
	if err != nil {
		return err
	}
	before, after := healthy.latency.quantile(0.99)/1e3, during.latency.quantile(0.99)/1e3
	if during.replies < healthy.replies*9/10 {
		after = math.Inf(1) // those that are still answered say nothing of the others
	}
	b.results.add("stalled", "p99 of the others, before", "µs", s.name, before)
	b.results.add("stalled", "p99 of the others, meanwhile", "µs", s.name, after)
	b.results.add("stalled", "messages answered meanwhile", "%", s.name, 100*float64(during.replies)/float64(healthy.replies))
	return nil
}

// linkLoss measures how long agents cannot be reached when all links end.
func (b *bench) linkLoss(s *subject) error {
	st, err := b.stage(s, false)
	if err != nil {
		return err
	}
	defer st.close()
	agents := b.choose(10_000, 500)
	if err := st.connect(agents, 200, true); err != nil {
		return err
	}
	before, err := st.quiet()
	if err != nil {
		return err
	}
	var at time.Time
	if err := st.load.call("AwaitPushes", nil, nil); err != nil {
		return err
	}
	if err := st.server.call("CloseAll", nil, &at); err != nil {
		return err
	}
	var last time.Time
	err = wait(2*time.Minute, func() error {
		var pushes int
		if err := st.server.call("PushAll", agents, &pushes); err != nil {
			return err
		}
		time.Sleep(200 * time.Millisecond)
		state, err := st.loadState()
		if err != nil {
			return err
		}
		if state.Reached < int64(agents) {
			return fmt.Errorf("%d of %d agents are reachable", state.Reached, agents)
		}
		last = state.LastReached
		return nil
	})
	if err != nil {
		return err
	}
	after, err := st.quiet()
	if err != nil {
		return err
	}
	b.results.add("link-loss", fmt.Sprintf("until %d agents are reachable", agents), "s", s.name, last.Sub(at).Seconds())
	b.results.add("link-loss", "CPU per agent", "µs", s.name, float64((after-before).Nanoseconds())/1e3/float64(agents))
	return nil
}
