package main

import (
	"fmt"
	"math/rand/v2"
	"net"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/google/uuid"
	"github.com/open-telemetry/opamp-go/protobufs"

	"github.com/opampgateway/opampgateway/e2e/fault"
)

// injector has things go wrong.
type injector struct {
	soak *soak
	rand *rand.Rand

	pending sync.WaitGroup // faults that end later
	over    chan struct{}  // closed when all have to end at once

	// mu guards all below.
	mu    sync.Mutex
	log   []event
	count map[string]int
	held  map[*fault.Conn]bool

	// Owned by run.
	poisons []poisonKind // that come next
}

// event is one fault, for the report.
type event struct {
	at   time.Time
	kind string
	what string
	g    *gateway // whose agents it concerns; nil for the server
	way  *way     // the link that it hit
	a    *actor   // the one agent that it concerns
}

// kinds are the faults, and how often each comes, relative to the others: together about four
// a second.
func (in *injector) kinds() []kind {
	all := []kind{
		{"link reset", 8, 0, in.linkReset},
		{"link finished", 6, 0, in.linkFinish},
		{"link in a black hole", 3, 0, in.linkHole},
		{"link in a black hole and flooded", 3, 5 * time.Second, in.linkFull},
		{"link delayed", 4, 0, in.linkDelay},
		{"server restarted", 3, 8 * time.Second, in.serverRestart},
		{"gateway reloaded, nothing of it changed", 6, 0, in.reload(func(g *gateway) { g.rollouts++ }, false)},
		{"gateway reloaded, server changed", 2, 5 * time.Second, in.reload(func(g *gateway) { g.connections = 2 + in.rand.IntN(3) }, true)},
		{"gateway reloaded, listener changed", 2, 5 * time.Second, in.reload(func(g *gateway) { g.listeners++ }, true)},
		{"gateway killed", 1, 15 * time.Second, in.killGateway},
		{"agent killed", 20, 0, in.killAgent},
		{"agent's connection reset", 12, 0, in.agentReset},
		{"agent's connection finished", 8, 0, in.agentFinish},
		{"agent in a black hole", 6, 0, in.agentHole},
		{"agent said goodbye", 12, 0, in.goodbye},
		{"agent left for good", 4, 0, in.leave},
		{"agent stalled", 10, 0, in.stall},
		{"agent stalled and flooded", 1, 3 * time.Second, in.flood},
		{"agent cloned", 8, 0, in.clone},
		{"agent renamed", 8, 0, in.rename},
		{"agent flooding its link", 6, 15 * time.Second, in.flooder},
		{"agent poisoning its link", 6, 12 * time.Second, in.poison},
		{"frames limited", 4, 6 * time.Second, in.limitFrames},
		{"poll cut", 12, 0, in.cutPoll},
		{"polling agent silent", 5, 0, in.silence},
		{"polling agent said goodbye", 4, 0, in.goodbyePolling},
		{"polling agent left for good", 2, 0, in.leavePolling},
	}
	return slices.DeleteFunc(all, func(k kind) bool { return !in.soak.only.MatchString(k.name) })
}

type kind struct {
	name   string
	weight int
	apart  time.Duration // at least, between two of them
	do     func() *event // nil when there was nobody to do it to
}

// run has faults happen until the deadline, and waits for the end of those that last.
func (in *injector) run(deadline time.Time) {
	kinds := in.kinds()
	total := 0
	for _, k := range kinds {
		total += k.weight
	}
	last := map[string]time.Time{}
	for time.Now().Before(deadline) {
		time.Sleep(in.between(50*time.Millisecond, 400*time.Millisecond))
		n := in.rand.IntN(total)
		for _, k := range kinds {
			if n -= k.weight; n >= 0 {
				continue
			}
			if time.Since(last[k.name]) < k.apart {
				break
			}
			at := time.Now()
			if e := k.do(); e != nil {
				last[k.name] = at
				e.at, e.kind = at, k.name
				in.mu.Lock()
				in.log = append(in.log, *e)
				in.count[k.name]++
				in.mu.Unlock()
			}
			break
		}
	}
	close(in.over)
	in.pending.Wait()
}

func (in *injector) between(from, to time.Duration) time.Duration {
	return from + time.Duration(in.rand.Int64N(int64(to-from)))
}

// later does something after d, or when all faults have to end.
func (in *injector) later(d time.Duration, do func()) {
	in.pending.Go(func() {
		select {
		case <-time.After(d):
		case <-in.over:
		}
		do()
	})
}

// link picks a link of some gateway, one on which nothing goes on.
func (in *injector) link() (*gateway, *fault.Conn) {
	g := in.gateway()
	conns := slices.DeleteFunc(g.up.Conns(), in.isHeld)
	if len(conns) == 0 {
		return nil, nil
	}
	return g, conns[in.rand.IntN(len(conns))]
}

func (in *injector) isHeld(c *fault.Conn) bool {
	in.mu.Lock()
	defer in.mu.Unlock()
	return in.held[c]
}

// hold does something to a connection, on which nothing else is to happen then, until the end is
// done to it.
func (in *injector) hold(c *fault.Conn, d time.Duration, begin, end func(*fault.Conn)) {
	in.mu.Lock()
	in.held[c] = true
	in.mu.Unlock()
	begin(c)
	in.later(d, func() {
		end(c)
		in.mu.Lock()
		defer in.mu.Unlock()
		delete(in.held, c)
	})
}

// hitLink does something to a link.
func (in *injector) hitLink(what string, do func(*fault.Conn)) *event {
	g, c := in.link()
	if c == nil {
		return nil
	}
	g.hit()
	w := in.soak.book.hitWay(g, c, what)
	do(c)
	return &event{what: w.String(), g: g, way: w}
}

func (in *injector) linkReset() *event {
	return in.hitLink("was reset", (*fault.Conn).Reset)
}

func (in *injector) linkFinish() *event {
	return in.hitLink("was finished", (*fault.Conn).Finish)
}

// linkHole is a black hole for longer than the keep-alive takes. The server notices later.
func (in *injector) linkHole() *event {
	return in.hole((*fault.Conn).Swallow, (*fault.Conn).Reset)
}

// linkFull is a black hole into which an agent says so much that most of that stays in the gateway.
func (in *injector) linkFull() *event {
	e := in.hole((*fault.Conn).Sink, (*fault.Conn).EndSunk)
	if e == nil {
		return nil
	}
	if a := in.agentOn(e.way); a != nil {
		a.talkMuch(192, 128<<10)
		e.what += fmt.Sprintf(", into which agent %d says 24 MiB", a.id)
	}
	return e
}

func (in *injector) hole(begin, end func(*fault.Conn)) *event {
	d := in.between(6*time.Second, 12*time.Second)
	return in.hitLink("was in a black hole", func(c *fault.Conn) { in.hold(c, d, begin, end) })
}

// agentOn returns an agent that speaks on a way; nil if there is none.
func (in *injector) agentOn(w *way) *agent {
	agents := in.soak.fleet()
	in.soak.book.mu.Lock()
	defer in.soak.book.mu.Unlock()
	for _, a := range agents {
		if n := len(a.epochs); n > 0 && a.poller == nil {
			if asked := a.epochs[n-1].askings[0]; len(asked) > 0 && asked[len(asked)-1].way == w {
				return a
			}
		}
	}
	return nil
}

// linkDelay is a black hole that is over before anybody notices; nothing may get lost.
func (in *injector) linkDelay() *event {
	g, c := in.link()
	if c == nil {
		return nil
	}
	d := in.between(200*time.Millisecond, 1500*time.Millisecond)
	w := in.soak.book.way(g, c)
	in.hold(c, d, (*fault.Conn).Hold, (*fault.Conn).Release)
	return &event{what: fmt.Sprintf("%s, for %s", w, d.Round(time.Millisecond)), g: g}
}

func (in *injector) serverRestart() *event {
	d := in.between(200*time.Millisecond, 3*time.Second)
	for _, g := range in.soak.gateways {
		if g.above == nil {
			g.hit()
		}
	}
	in.soak.server.stop()
	time.Sleep(d)
	if err := in.soak.server.start(); err != nil {
		in.soak.book.find("soak", nil, time.Now(), "%v", err)
	}
	return &event{what: fmt.Sprintf("away for %s", d.Round(time.Millisecond))}
}

func (in *injector) gateway() *gateway {
	return in.soak.gateways[in.rand.IntN(len(in.soak.gateways))]
}

// reload has a gateway reloaded with a configuration that is changed so.
func (in *injector) reload(change func(*gateway), disturbs bool) func() *event {
	return func() *event {
		g := in.gateway()
		if g.isNew() {
			return nil
		}
		if err := g.reload(change, disturbs); err != nil {
			in.soak.book.find("soak", nil, time.Now(), "%v", err)
		}
		return &event{what: "gateway " + g.name, g: g}
	}
}

func (in *injector) killGateway() *event {
	g, d := in.gateway(), in.between(0, 2*time.Second)
	g.signal(syscall.SIGKILL)
	if _, err := g.wait(10 * time.Second); err != nil {
		in.soak.book.find("soak", nil, time.Now(), "%v", err)
	}
	time.Sleep(d)
	if err := g.start(); err != nil {
		in.soak.book.find("soak", nil, time.Now(), "%v", err)
	}
	return &event{what: fmt.Sprintf("gateway %s, away for %s", g.name, d.Round(time.Millisecond)), g: g}
}

// agent picks an agent that is connected, by a line if lined, and is not refused by its gateway.
func (in *injector) agent(lined bool) (*agent, *agentSocket) {
	for range 20 {
		agents := in.soak.fleet()
		a := agents[in.rand.IntN(len(agents))]
		if s := a.socket(); s != nil && !a.isAway() && !in.soak.book.isPoisonous(a.member) && (!lined || a.address == a.gateway.agents.Address()) {
			return a, s
		}
	}
	return nil, nil
}

// mostlyAtOnce is how long an agent stays away.
func (in *injector) mostlyAtOnce() time.Duration {
	if in.rand.IntN(2) == 0 {
		return 0
	}
	return in.between(0, 3*time.Second)
}

func (in *injector) about(a *agent, format string, args ...any) *event {
	return &event{what: fmt.Sprintf("agent %d: ", a.id) + fmt.Sprintf(format, args...), a: a.actor}
}

func (in *injector) killAgent() *event {
	a, _ := in.agent(false)
	if d := in.mostlyAtOnce(); a != nil && a.kill(d) {
		return in.about(a, "back after %s", d)
	}
	return nil
}

func (in *injector) hitAgent(what string, do func(*fault.Conn)) *event {
	a, s := in.agent(true)
	if a == nil {
		return nil
	}
	for _, c := range a.gateway.agents.Conns() {
		if c.From() == s.ws.LocalAddr().String() && !in.isHeld(c) {
			in.soak.book.touch(s.epoch, what)
			do(c)
			return in.about(a, "%s", what)
		}
	}
	return nil
}

func (in *injector) agentReset() *event  { return in.hitAgent("reset", (*fault.Conn).Reset) }
func (in *injector) agentFinish() *event { return in.hitAgent("finished", (*fault.Conn).Finish) }

// agentHole is long enough for the gateway to notice, or not.
func (in *injector) agentHole() *event {
	d := in.between(time.Second, 16*time.Second)
	return in.hitAgent(fmt.Sprintf("black hole for %s", d.Round(time.Millisecond)), func(c *fault.Conn) {
		in.hold(c, d, (*fault.Conn).Hold, (*fault.Conn).Reset)
	})
}

func (in *injector) goodbye() *event {
	a, _ := in.agent(false)
	if d := in.mostlyAtOnce(); a != nil && a.goodbye(d) {
		return in.about(a, "back after %s", d)
	}
	return nil
}

// leave has an agent leave for good; another joins in its place.
func (in *injector) leave() *event {
	a, _ := in.agent(false)
	if a == nil {
		return nil
	}
	a.goAway()
	what := "politely"
	if in.rand.IntN(2) == 0 {
		what = "without a word"
		a.kill(0)
	} else {
		a.goodbye(0)
	}
	in.soak.replace(a)
	return in.about(a, "%s", what)
}

// stall has an agent read nothing for a while, and be pushed to less than its outbox holds.
func (in *injector) stall() *event {
	a, _ := in.agent(false)
	if a == nil {
		return nil
	}
	d, pushed := in.between(time.Second, 3*time.Second), in.rand.IntN(2<<20)
	a.stall(d)
	in.pushSome(a, pushed)
	return in.about(a, "reads nothing for %s while %d KiB are pushed", d.Round(time.Millisecond), pushed>>10)
}

// flood is more than an outbox and the sockets' buffers hold.
func (in *injector) flood() *event {
	a, s := in.agent(false)
	if a == nil || a.gateway.above != nil { // its gateway's link would be flooded with it
		return nil
	}
	in.soak.book.mu.Lock()
	s.epoch.slow = true
	in.soak.book.mu.Unlock()
	a.stall(5 * time.Second)
	in.pushSome(a, 24<<20)
	return in.about(a, "reads nothing for 5 s while 24 MiB are pushed")
}

// pushSome pushes so many bytes, without waiting.
func (in *injector) pushSome(a *agent, bytes int) {
	in.pending.Go(func() {
		for ; bytes > 0; bytes -= 256 << 10 {
			if !in.soak.server.push(a.member, nil, &protobufs.ServerToAgent{}, min(bytes, 256<<10)) {
				return
			}
		}
	})
}

// flooder has an agent speak as fast as it can, for longer than others could wait. Nothing of it may get
// lost, and the others must not notice.
func (in *injector) flooder() *event {
	a, s := in.agent(false)
	if a == nil || !in.soak.book.isAlone(a.member) {
		return nil
	}
	if tcp, ok := s.ws.NetConn().(*net.TCPConn); ok {
		_ = tcp.SetWriteBuffer(64 << 10) // what waits there takes the server long enough
	}
	d, answered, how := in.between(10*time.Second, 20*time.Second), in.rand.IntN(2) == 0, "answers all of it"
	if !answered {
		how = "answers nothing"
	}
	f := in.soak.book.startFlood(a.actor, answered)
	in.later(d, func() { in.soak.book.endFlood(f) })
	return in.about(a, "for %s; the server %s", d.Round(time.Millisecond), how)
}

// poison has an agent say what the server ends the link at, now and whenever it is asked for its state.
// All kinds come in turn, in an order that is drawn.
func (in *injector) poison() *event {
	const lasts = 10 * time.Second
	a, s := in.agent(false)
	if a == nil || !in.soak.book.isAlone(a.member) {
		return nil
	}
	if len(in.poisons) == 0 {
		in.poisons = slices.Clone(poisonKinds)
		in.rand.Shuffle(len(in.poisons), func(i, j int) { in.poisons[i], in.poisons[j] = in.poisons[j], in.poisons[i] })
	}
	kind := in.poisons[0]
	in.poisons = in.poisons[1:]
	p := in.soak.book.startPoison(a.actor, kind)
	s.tellState()
	in.later(lasts, func() { in.soak.book.endPoison(p) })
	return &event{what: fmt.Sprintf("agent %d: %s", a.id, kind.name), g: a.gateway}
}

// limitFrames has the lines of a gateway be proxies that end a connection at a large WebSocket frame, while
// there are large messages to carry. A gateway does not write such frames.
func (in *injector) limitFrames() *event {
	const size, agents = 200 << 10, 8
	g, d := in.gateway(), in.between(3*time.Second, 6*time.Second)
	if g.limited.Swap(true) {
		return nil
	}
	var chosen []*agent
	fleet := in.soak.fleet()
	for _, i := range in.rand.Perm(len(fleet)) {
		a := fleet[i]
		if len(chosen) < agents && a.gateway == g && a.address == g.agents.Address() && in.soak.book.isAlone(a.member) {
			chosen = append(chosen, a)
		}
	}
	in.later(d, func() { g.limited.Store(false) })
	in.pending.Go(func() {
		for _, a := range chosen {
			a.talkMuch(1, size)
			in.soak.server.push(a.member, nil, &protobufs.ServerToAgent{}, size)
			select {
			case <-time.After(d / agents):
			case <-in.over:
				return
			}
		}
	})
	return &event{what: fmt.Sprintf("by the lines of gateway %s, for %s", g.name, d.Round(time.Millisecond)), g: g}
}

// clone has another program speak under an agent's UID for a few seconds.
func (in *injector) clone() *event {
	a, _ := in.agent(false)
	if a == nil || in.soak.book.isFlooding(a.actor) {
		return nil
	}
	d := in.between(time.Second, 5*time.Second)
	// An agent of the upper gateway is turned down there while its clone is one of the lower gateway's.
	g, where := a.gateway, "at the same gateway"
	if in.rand.IntN(3) == 0 {
		g, where = in.gateway(), "somewhere"
	}
	c := startAgent(in.soak.book, in.soak.book.addActor(a.member, true), g, g.address)
	in.later(d, func() {
		c.goAway()
		c.kill(0)
		<-c.done
	})
	return in.about(a, "%s, for %s", where, d.Round(time.Millisecond))
}

func (in *injector) rename() *event {
	a, _ := in.agent(false)
	if a == nil {
		return nil
	}
	in.soak.book.mu.Lock()
	cloned := len(a.member.clones) > 0
	in.soak.book.mu.Unlock()
	if cloned {
		return nil
	}
	id := in.soak.book.rename(a.member)
	in.soak.server.push(a.member, nil, &protobufs.ServerToAgent{AgentIdentification: &protobufs.AgentIdentification{NewInstanceUid: uuidBytes(id)}}, 0)
	return in.about(a, "now %s", id)
}

// cutPoll resets the connection on which an agent polls, or will.
func (in *injector) cutPoll() *event {
	g := in.gateway()
	conns := g.polls.Conns()
	if len(conns) == 0 {
		return nil
	}
	conns[in.rand.IntN(len(conns))].Reset()
	return &event{what: "at gateway " + g.name, g: g}
}

// polling picks an agent that polls.
func (in *injector) polling() *agent {
	agents := slices.DeleteFunc(in.soak.fleet(), func(a *agent) bool { return a.poller == nil || !a.isConnected() })
	if len(agents) == 0 {
		return nil
	}
	return agents[in.rand.IntN(len(agents))]
}

// silence is long enough for the gateway to take the agent for gone, or not.
func (in *injector) silence() *event {
	a, d := in.polling(), in.between(time.Second, 12*time.Second)
	if a == nil {
		return nil
	}
	a.poller.fallSilent(d)
	return in.about(a, "for %s", d.Round(time.Millisecond))
}

func (in *injector) goodbyePolling() *event {
	if a := in.polling(); a != nil && a.poller.goodbye() {
		return in.about(a, "and comes back")
	}
	return nil
}

// leavePolling has an agent leave for good; another joins in its place.
func (in *injector) leavePolling() *event {
	a := in.polling()
	if a == nil {
		return nil
	}
	what := "politely"
	if in.rand.IntN(2) == 0 {
		what = "without a word"
		close(a.poller.vanish)
	} else {
		a.goAway()
	}
	in.soak.replace(a)
	return in.about(a, "%s", what)
}

func uuidBytes(id uuid.UUID) []byte { return id[:] }

// near returns what happened between two times that concerns e; all if e is nil.
func (in *injector) near(from, to time.Time, e *epoch) (lines []string) {
	in.mu.Lock()
	defer in.mu.Unlock()
	for _, f := range in.log {
		if f.at.Before(from) || f.at.After(to) {
			continue
		}
		concerned := e == nil || f.a == nil && f.g == nil
		if f.a != nil && e != nil {
			concerned = f.a.member == e.actor.member
		}
		for g := gatewayOf(e); g != nil; g = g.above {
			concerned = concerned || f.g == g
		}
		if concerned {
			lines = append(lines, fmt.Sprintf("%s %s: %s", in.soak.book.since(f.at), f.kind, strings.TrimSpace(f.what)))
		}
	}
	return lines
}

func gatewayOf(e *epoch) *gateway {
	if e == nil {
		return nil
	}
	return e.gateway
}
