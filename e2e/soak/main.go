// Command soak has everything go wrong that networks, servers, agents and operators can do to
// gateways, for a while, and keeps a book of every message both ways.
//
//	make soak DURATION=10m
//	make soak-race          the same with the race detector in the gateways
//
// The cast: one server, in this process; three gateways, processes of the built collector; and
// agents, in this process; with -pollers, one in ten over plain HTTP. Each dash is a line that breaks, and so does everybody else:
//
//	agents ── gateway direct ── server
//	agents ── gateway upper ── server
//	agents ── gateway lower ── gateway upper
//
// It prints what was injected and what was found, and ends with 1 if something was found that
// must not be.
//
//	main.go      the run, from its beginning to its end
//	server.go    the server
//	gateway.go   the gateways
//	agent.go     the agents
//	poller.go    those over plain HTTP
//	faults.go    what goes wrong
//	tap.go       what the lines see of what gateways write
//	message.go   what is said: who, on which connection, the how manyth
//	ledger.go    the book of what was said and heard
//	verdict.go   what of that must not be
//	sharing.go   what an agent may do to a link that it shares with others
//	pulse.go     when the machine was too busy for anybody to be in time
//	report.go    what is printed
package main

import (
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/open-telemetry/opamp-go/protobufs"

	"github.com/opampgateway/opampgateway/e2e/fault"
)

func main() {
	duration := flag.Duration("duration", time.Minute, "how long things go wrong")
	agents := flag.Int("agents", 500, "number of agents")
	pollers := flag.Bool("pollers", false, "a tenth of the agents speak over plain HTTP")
	seed := flag.Uint64("seed", uint64(time.Now().UnixNano())%100_000, "of the faults' order")
	program := flag.String("collector", "../build/otelcol-opampgateway", "the collector with the gateway")
	faults := flag.String("faults", ".", "a regular expression: only faults with such names happen")
	trace := flag.String("trace", "", "where to write all that is known of the run; if it fails, with the gateways' logs")
	flag.Parse()
	runtime.LockOSThread() // see child
	only, err := regexp.Compile(*faults)
	if err != nil {
		fmt.Println(err)
		os.Exit(2)
	}
	s := &soak{only: only, book: newLedger(), rand: rand.New(rand.NewPCG(*seed, 1)), seed: *seed, duration: *duration, pollers: *pollers}
	fmt.Printf("soak: %d agents for %s, seed %d\n", *agents, *duration, *seed)
	if err := s.run(*program, *agents, *duration); err != nil {
		s.book.find("soak", nil, time.Now(), "%v", err)
	}
	s.endGateways()
	ok := s.report()
	if !ok && *trace == "" {
		*trace = filepath.Join(s.dir, "trace.txt")
	}
	if *trace != "" {
		if err := s.trace(*trace); err != nil {
			fmt.Println(err)
		}
	}
	if !ok {
		fmt.Printf("\nlogs of the gateways: %s; all that is known: %s\n", s.dir, *trace)
		os.Exit(1)
	}
	_ = os.RemoveAll(s.dir)
}

// soak is one run.
type soak struct {
	book     *ledger
	rand     *rand.Rand
	seed     uint64
	only     *regexp.Regexp // the names of the faults that happen
	duration time.Duration
	pollers  bool // there are agents over plain HTTP
	dir      string
	server   *server
	gateways []*gateway
	faults   *injector
	memory   int           // the most that a gateway had at the end, in MiB
	talked   time.Duration // how long agents and server have talked

	// mu guards the agents that belong to the fleet. Clones do not, nor do those that left.
	mu     sync.Mutex
	agents []*agent
	left   []*agent
}

// healWithin bounds each step after the last fault. The second request for the full state,
// which comes 60 to 90 s after a link was lost, is not waited for by itself.
const healWithin = 60 * time.Second

func (s *soak) run(program string, agents int, duration time.Duration) error {
	if err := s.setUp(program); err != nil {
		return err
	}
	files := map[*gateway]int{}
	for _, g := range s.gateways {
		files[g] = g.files() - g.links() - s.connections(true)[g]
	}
	for i := range agents {
		n := i / len(s.gateways)
		s.add(s.gateways[i%len(s.gateways)], n%2 == 0,
			s.pollers && n%agentsPerPoller < 2 && n/agentsPerPoller%2 == n%2) // of those behind a line and others
	}
	s.await("agents are connected", "unreachable", s.notConnected)

	s.faults = &injector{soak: s, rand: s.rand, over: make(chan struct{}), count: map[string]int{}, held: map[*fault.Conn]bool{}}
	s.faults.run(time.Now().Add(duration))

	s.await("the server ends no link any more", "unreachable", s.book.stillPoisoned)
	s.await("agents are connected again", "unreachable", s.notConnected)
	s.talked = time.Since(s.book.start)
	s.server.hush()
	for _, a := range s.fleet() {
		a.hush()
	}
	s.probe()
	s.await("the server has forgotten who left", "leaked", s.notForgotten)
	s.await("the gateways have the connections that there are", "leaked", func() string { return s.miscounted(false) })
	s.checkFiles(files, false)
	s.book.judge(time.Now())
	for _, a := range s.fleet() {
		a.goAway()
		a.goodbye(0)
	}
	s.await("the agents have left", "unreachable", s.stillThere)
	s.await("the gateways have no agents", "leaked", func() string { return s.miscounted(true) })
	s.checkFiles(files, true)
	return nil
}

// setUp starts server and gateways.
func (s *soak) setUp(program string) error {
	program, err := filepath.Abs(program)
	if err != nil {
		return err
	}
	if s.dir, err = os.MkdirTemp("", "soak"); err != nil {
		return err
	}
	address, err := freeAddress(s.rand.IntN)
	if err != nil {
		return err
	}
	s.server = newServer(s.book, address)
	s.server.excuse = func(c *serverConn) bool {
		for _, g := range s.gateways {
			if g == c.way.gateway {
				return g.wasDisturbed(time.Now(), inFlight/2) != nil
			}
		}
		return false
	}
	s.server.wayFrom = func(address string) (from *way) {
		for _, g := range s.gateways {
			for _, w := range g.ways { // one port is used again; the newest has it now
				if g.above == nil && w.conn.Source() == address && (from == nil || w.opened.After(from.opened)) {
					from = w
				}
			}
		}
		return from
	}
	var upper *gateway
	for _, name := range []string{"direct", "upper", "lower"} {
		g := &gateway{name: name, program: program, dir: s.dir, connections: 3}
		target := s.server.address
		if name == "lower" {
			g.above, target = upper, upper.address
		}
		if g.address, err = freeAddress(s.rand.IntN); err != nil {
			return err
		}
		if g.metrics, err = freeAddress(s.rand.IntN); err != nil {
			return err
		}
		if g.up, err = fault.OpenTapped(target, s.book.tap(g)); err != nil {
			return err
		}
		if g.agents, err = fault.OpenTapped(g.address, s.tapAgents(g)); err != nil {
			return err
		}
		if g.polls, err = fault.Open(g.address); err != nil {
			return err
		}
		s.gateways = append(s.gateways, g)
		if name == "upper" {
			upper = g
		}
	}
	if err := s.server.start(); err != nil {
		return err
	}
	for _, g := range s.gateways {
		if err := g.start(); err != nil {
			return err
		}
	}
	if !s.await("the gateways are up", "soak", func() string { return s.miscounted(true) }) {
		return errors.New("nothing was injected")
	}
	return nil
}

// add starts an agent of a gateway, behind a line or not, that speaks over plain HTTP or not.
func (s *soak) add(g *gateway, lined, polls bool) {
	address := g.address
	switch {
	case lined && polls:
		address = g.polls.Address()
	case lined:
		address = g.agents.Address()
	}
	m := s.book.join()
	m.polls = polls
	a := startAgent(s.book, s.book.addActor(m, false), g, address)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.agents = append(s.agents, a)
}

// replace has another agent join in place of one that leaves.
func (s *soak) replace(a *agent) {
	s.mu.Lock()
	s.agents = slices.DeleteFunc(s.agents, func(other *agent) bool { return other == a })
	s.left = append(s.left, a)
	s.mu.Unlock()
	s.add(a.gateway, a.address != a.gateway.address, a.poller != nil)
}

func (s *soak) fleet() []*agent {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.agents)
}

// relayed are the agents of the fleet of which all is relayed.
func (s *soak) relayed() []*agent {
	return slices.DeleteFunc(s.fleet(), func(a *agent) bool { return s.book.isPoisonous(a.member) })
}

// await waits until wrong returns "", and reports whether it ever did.
func (s *soak) await(what, kind string, wrong func() string) bool {
	start := time.Now()
	for {
		last := wrong()
		if last == "" {
			fmt.Printf("%8s  %s (%s)\n", s.book.since(time.Now()), what, time.Since(start).Round(time.Millisecond))
			return true
		}
		if time.Since(start) > healWithin {
			s.book.find(kind, nil, time.Now(), "after %s not yet: %s: %s", healWithin, what, last)
			return false
		}
		time.Sleep(50 * time.Millisecond)
	}
}

func (s *soak) notConnected() string {
	n := 0
	for _, a := range s.fleet() {
		if !a.isConnected() {
			n++
		}
	}
	if n > 0 {
		return fmt.Sprintf("%d agents are not", n)
	}
	return ""
}

func (s *soak) stillThere() string {
	n := 0
	for _, a := range s.fleet() {
		select {
		case <-a.done:
		default:
			n++
			a.goodbye(0)
		}
	}
	if n > 0 {
		return fmt.Sprintf("%d agents have not", n)
	}
	return ""
}

// probe has every agent say something, and then the server tell it something; each must arrive.
func (s *soak) probe() {
	type said struct {
		epoch  *epoch
		number uint32
	}
	ups := map[*agent]said{}
	s.await("what every agent says arrives", "unreachable", func() string {
		agents := s.relayed()
		for _, a := range agents {
			if ups[a].epoch == nil {
				if e, n, err := a.sayNow(time.Second); err == nil {
					ups[a] = said{e, n}
				}
			}
		}
		missing, example := 0, ""
		s.book.mu.Lock()
		defer s.book.mu.Unlock()
		for _, a := range agents {
			up := ups[a]
			switch {
			case up.epoch == nil:
			case up.epoch.ups[up.number-1].heard != nil:
				continue
			case !up.epoch.ended.IsZero():
				delete(ups, a)
			}
			missing++
			example = fmt.Sprintf("agent %d of gateway %s", a.id, a.gateway.name)
		}
		return some(missing, example)
	})
	downs := map[*agent]int{}
	s.await("what the server tells every agent arrives", "unreachable", func() string {
		missing, example := 0, ""
		for _, a := range s.relayed() {
			s.book.mu.Lock()
			n, asked := downs[a]
			heard := asked && a.member.downs[n].heard
			s.book.mu.Unlock()
			if heard {
				continue
			}
			if !asked {
				s.book.mu.Lock()
				n := len(a.member.downs)
				s.book.mu.Unlock()
				if s.server.push(a.member, nil, &protobufs.ServerToAgent{}, 10) {
					downs[a] = n
				}
			}
			missing++
			example = fmt.Sprintf("agent %d of gateway %s", a.id, a.gateway.name)
		}
		return some(missing, example)
	})
}

func some(n int, example string) string {
	if n == 0 {
		return ""
	}
	return fmt.Sprintf("of %d agents, one is %s", n, example)
}

// notForgotten looks for agents that left and are connected to the server.
func (s *soak) notForgotten() string {
	living := map[*member]bool{}
	for _, a := range s.fleet() {
		living[a.member] = true
	}
	s.server.mu.Lock()
	defer s.server.mu.Unlock()
	var texts []string
	for m, at := range s.server.places {
		if !living[m] {
			texts = append(texts, fmt.Sprintf("%s, on %s", at.segment.epoch, at.segment.conn))
		}
	}
	if len(texts) == 0 {
		return ""
	}
	return some(len(texts), texts[0])
}

// connections is how many agents each gateway should have, another gateway's links among them.
func (s *soak) connections(empty bool) map[*gateway]int {
	agents := map[*gateway]int{}
	for _, a := range s.fleet() {
		if !empty {
			agents[a.gateway]++
		}
	}
	for _, g := range s.gateways {
		if g.above != nil {
			agents[g.above] += g.links()
		}
	}
	return agents
}

// miscounted compares what the gateways count with what there is.
func (s *soak) miscounted(empty bool) string {
	agents, links := s.connections(empty), 0
	for _, g := range s.gateways {
		if g.above == nil {
			links += g.links()
		}
		up, down, err := g.count()
		if err != nil {
			return err.Error()
		}
		if up != g.links() || down != agents[g] {
			return fmt.Sprintf("gateway %s counts %d links and %d agents, not %d and %d", g.name, up, down, g.links(), agents[g])
		}
	}
	s.server.mu.Lock()
	defer s.server.mu.Unlock()
	if len(s.server.conns) != links {
		return fmt.Sprintf("the server has %d links, not %d", len(s.server.conns), links)
	}
	return ""
}

// checkFiles compares the files that the gateways have open with those that they had without
// any connection.
func (s *soak) checkFiles(base map[*gateway]int, empty bool) {
	const spare = 4 // what the collector itself opens now and then
	agents := s.connections(empty)
	s.await("the gateways have no more files open than connections explain", "leaked", func() string {
		for _, g := range s.gateways {
			if got, want := g.files(), base[g]+g.links()+agents[g]; got > want+spare {
				return fmt.Sprintf("gateway %s has %d, not %d", g.name, got, want)
			}
			s.memory = max(s.memory, g.memory())
		}
		return ""
	})
}

// endGateways ends the gateways politely, the lower before the upper, and looks at their logs.
func (s *soak) endGateways() {
	defer func() { s.book.judgeNames(s.gateways) }()
	for _, g := range slices.Backward(s.gateways) {
		g.signal(syscall.SIGTERM)
		code, err := g.wait(20 * time.Second)
		if err != nil {
			g.signal(syscall.SIGKILL)
			s.book.find("gateway's end", nil, time.Now(), "%v on SIGTERM", err)
		} else if code != 0 && code != raceExit { // what was found tells more
			s.book.find("gateway's end", nil, time.Now(), "gateway %s ended with %d on SIGTERM", g.name, code)
		}
		lines, races := g.complaints()
		g.names = g.blames()
		for _, line := range lines {
			s.book.find("gateway's log", nil, time.Now(), "%s: %s", g.name, line)
		}
		for _, race := range races {
			s.book.find("data race", nil, time.Now(), "%s: %s", g.name, race)
		}
		if code == raceExit && len(races) == 0 {
			s.book.find("data race", nil, time.Now(), "%s ended with %d, and its log does not tell why", g.name, code)
		}
	}
}
