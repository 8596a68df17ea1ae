package main

import (
	"fmt"
	"slices"
	"sort"
	"time"

	"github.com/opampgateway/opampgateway/e2e/fault"
)

// An agent may do two things to a link that others share with it: speak as fast as it can, which is a
// flood, and say what the server ends the connection at, which is a poison. On connections of their own
// neither would cost the others anything. The book knows who did what; here is what it may cost.

// flood is a time in which an agent speaks as fast as it can, and the server takes takesAMoment for each
// of its messages.
type flood struct {
	actor    *actor
	answered bool      // by the server
	from, to time.Time // to is zero while it lasts
}

// takesAMoment is how long the server works on a message of a flood.
const takesAMoment = time.Millisecond

// keptWaiting is how long a message may be on its way beside a flood. One in waitingShare may take longer, or
// waitingFew: a suspect's messages are on trial, one after the other, each behind what the server has to read. It is many times what a fair gateway needs, since here everything goes wrong at the same time on
// a machine that has no time; a queue that all share takes much longer still.
const keptWaiting, waitingShare, waitingFew = 6 * time.Second, 10, 5

// poisonKind is what an agent says, and how the server ends the connection at it.
type poisonKind struct {
	name  string
	code  int  // of the server's close frame; 0 for none
	size  int  // of the message, in bytes; 0 for any
	any   bool // whatever the agent says: the server does not want it
	links int  // how many may be lost until it is over
}

// sureLinks is how many may be lost where the server says that it was for a message.
const sureLinks = 2

// poisonKinds are the ways in which servers end connections. What a close frame says about a message is
// believed at the first one; what may as well be chance or an operator, at the second.
var poisonKinds = []poisonKind{
	{name: "1009, a message above 1 MiB", code: 1009, size: 2 << 20, links: 2},
	{name: "1008", code: 1008, links: 2},
	{name: "1007", code: 1007, links: 2},
	{name: "1003", code: 1003, links: 2},
	{name: "1002", code: 1002, links: 2},
	{name: "1000, whatever the agent says", code: 1000, any: true, links: 3},
	{name: "no close frame", links: 3},
}

// poison is a time in which an agent says what the server ends the connection at, each time that it is
// asked for its full state.
type poison struct {
	kind     poisonKind
	actor    *actor
	from, to time.Time   // to is zero while it lasts
	said     int         // how often
	ends     []time.Time // when the server ended a link at it
	told     []time.Time // when the agent was told that something is not relayed
}

// refusedFor bounds how long after its last poison an agent is told that nothing of it is relayed: a gateway
// does so for ten minutes.
const refusedFor = 11 * time.Minute

// refusedAtLeast is how long nothing of an agent is relayed once it was told so.
const refusedAtLeast = 2 * time.Second

// toldWithin is how soon an agent is told after the last link that may be lost at its poison.
const toldWithin = 10 * time.Second

func (l *ledger) startFlood(a *actor, answered bool) *flood {
	l.mu.Lock()
	defer l.mu.Unlock()
	f := &flood{actor: a, answered: answered, from: time.Now()}
	a.flood = f
	l.floods = append(l.floods, f)
	return f
}

func (l *ledger) endFlood(f *flood) {
	l.mu.Lock()
	defer l.mu.Unlock()
	f.to, f.actor.flood = time.Now(), nil
}

func (l *ledger) startPoison(a *actor, kind poisonKind) *poison {
	l.mu.Lock()
	defer l.mu.Unlock()
	p := &poison{kind: kind, actor: a, from: time.Now()}
	a.poison = p
	l.poisons = append(l.poisons, p)
	return p
}

func (l *ledger) endPoison(p *poison) {
	l.mu.Lock()
	defer l.mu.Unlock()
	p.to, p.actor.poison = time.Now(), nil
}

func (l *ledger) isFlooding(a *actor) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return a.flood != nil
}

// isAlone reports whether nobody has ever been a clone of the member, and it does nothing to its link.
func (l *ledger) isAlone(m *member) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(m.clones) == 0 && l.poisonOfLocked(m, time.Now(), time.Now()) == nil &&
		!slices.ContainsFunc(l.actors, func(a *actor) bool { return a.member == m && (a.clone || a.flood != nil) })
}

// isPoisonous reports whether an agent says a poison, or did so not long ago.
func (l *ledger) isPoisonous(m *member) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.poisonOfLocked(m, time.Now(), time.Now()) != nil
}

// poisonOfLocked returns the last poison for which an agent may have been told something in this time;
// nil if there is none.
func (l *ledger) poisonOfLocked(m *member, from, to time.Time) *poison {
	for _, p := range slices.Backward(l.poisons) {
		if p.actor.member == m && p.from.Before(to) && (p.to.IsZero() || from.Before(p.to.Add(refusedFor))) {
			return p
		}
	}
	return nil
}

// doings returns the poison that a message is, and the flood to which it belongs; nil if none, or if
// that is over: then the server takes all that comes, as fast as it can.
func (l *ledger) doings(s stamp) (*poison, *flood) {
	l.mu.Lock()
	defer l.mu.Unlock()
	e := l.epochOfLocked(s.actor, s.epoch)
	if e == nil || s.down || s.number == 0 || int(s.number) > len(e.ups) {
		return nil, nil
	}
	p, f := e.ups[s.number-1].poison, e.ups[s.number-1].flood
	if p != nil && !p.to.IsZero() {
		p = nil
	}
	if f != nil && !f.to.IsZero() {
		f = nil
	}
	return p, f
}

// stillPoisoned tells of a link that the server has just ended at a poison; "" for none.
func (l *ledger) stillPoisoned() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, p := range l.poisons {
		if n := len(p.ends); n > 0 && time.Since(p.ends[n-1]) < settling {
			return fmt.Sprintf("one ended at %s", l.since(p.ends[n-1]))
		}
	}
	return ""
}

// endsAt notes that the server is about to end c at a poison. On a link that has ended already, that
// costs nothing.
func (l *ledger) endsAt(p *poison, c *serverConn) {
	c.way.gateway.hit()
	l.mu.Lock()
	defer l.mu.Unlock()
	if c.way.lost() || c.way.conn.End().By != fault.Nobody {
		return
	}
	c.way.hit, c.way.hitAt = "was ended by the server at a poison, "+p.kind.name, time.Now()
	p.ends = append(p.ends, c.way.hitAt)
	l.counts["links that the server ended at a poison"]++
}

// judgeFloodLocked looks for what others had to wait for beside a flood. A message counts that went all
// its way on links to which nothing else happened, or waited too long before anything did.
func (l *ledger) judgeFloodLocked(f *flood, end time.Time) {
	if f.to.IsZero() {
		f.to = end
	}
	var all, late int
	var longest time.Duration
	var longestOf *epoch
	for _, flooder := range f.actor.epochs {
		for i, asked := range flooder.askings[0] {
			from, to := laterOf(f.from, asked.at), f.to
			if i+1 < len(flooder.askings[0]) {
				to = earlierOf(to, flooder.askings[0][i+1].at)
			}
			to = earlierOf(to, asked.way.conn.End().At, flooder.ended)
			for _, a := range l.actors {
				if a == f.actor || a.clone {
					continue
				}
				for _, e := range a.epochs {
					if e.gateway != flooder.gateway {
						continue
					}
					// In the order in which they were said.
					first := sort.Search(len(e.ups), func(j int) bool { return !e.ups[j].said.Before(from) })
					for j := first; j < len(e.ups) && !e.ups[j].said.After(to); j++ {
						switch waited, counts := l.waitedLocked(e, j, asked.way, end); {
						case !counts:
						case waited > keptWaiting:
							late++
							fallthrough
						default:
							if all++; waited > longest {
								longest, longestOf = waited, e
							}
						}
					}
				}
			}
		}
	}
	l.counts["messages said beside a flood"] += all
	l.longestWait = max(l.longestWait, longest)
	while := fmt.Sprintf("while agent %d spoke as fast as it could on the same link (for %s, answered: %t)", f.actor.id, f.to.Sub(f.from).Round(time.Second), f.answered)
	if late > waitingFew && late*waitingShare > all {
		l.findLocked("kept waiting", longestOf, f.from, "%d of %d messages of others took more than %s, one %s, %s",
			late, all, keptWaiting, longest.Round(time.Millisecond), while)
	}
}

// waitedLocked returns how long message i of e was on its way, if that was by the link w from its
// beginning to its end.
func (l *ledger) waitedLocked(e *epoch, i int, w *way, end time.Time) (waited time.Duration, counts bool) {
	u := &e.ups[i]
	until, quietly := u.heardAt, !u.heardAt.IsZero()
	disturbed := func(at time.Time) {
		if !at.IsZero() && at.After(u.said) && (until.IsZero() || at.Before(until)) {
			until, quietly = at, false
		}
	}
	at := -1
	for n, asked := range e.askings[0] {
		if asked.at.Before(u.said) {
			at = n
		} else {
			disturbed(asked.at)
		}
	}
	before := func(at time.Time) bool { return !at.IsZero() && !at.After(u.said) }
	// What was done to a gateway a moment ago is still felt.
	if at < 0 || e.askings[0][at].way != w || u.poison != nil || u.flood != nil ||
		before(w.hitAt) || before(w.conn.End().At) || before(e.touched) ||
		l.poisonOfLocked(e.actor.member, u.said, end) != nil || e.gateway.wasDisturbed(u.said, troubled) != nil {
		return 0, false
	}
	disturbed(w.hitAt)
	disturbed(w.conn.End().At)
	disturbed(e.touched)
	disturbed(e.ended)
	if above := e.gateway.above; above != nil {
		if above.wasUpset(u.said.Add(-troubled), u.said) {
			return 0, false
		}
		above.mu.Lock()
		for _, at := range above.hits {
			disturbed(at)
		}
		above.mu.Unlock()
	}
	for g := e.gateway; g != nil; g = g.above {
		g.mu.Lock()
		for _, d := range g.disturbed {
			disturbed(d.at)
		}
		g.mu.Unlock()
	}
	if until.IsZero() {
		return 0, false // it is lost, which others judge
	}
	waited = until.Sub(u.said) - l.pulse.missed(u.said, until)
	return waited, quietly || waited > keptWaiting
}

// tookLocked returns how long message i of e was on its way, and by which link: nil if it had none, or
// something happened to it.
func (l *ledger) tookLocked(e *epoch, i int) (time.Duration, *way) {
	for _, asked := range slices.Backward(e.askings[0]) {
		if asked.at.Before(e.ups[i].said) {
			if waited, counts := l.waitedLocked(e, i, asked.way, time.Now()); counts {
				return waited, asked.way
			}
			break
		}
	}
	return 0, nil
}

func laterOf(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

// earlierOf returns the earliest of times; zero is never, but for the first.
func earlierOf(first time.Time, others ...time.Time) time.Time {
	for _, at := range others {
		if !at.IsZero() && at.Before(first) {
			first = at
		}
	}
	return first
}

// judgePoisonLocked looks for what a poison cost, and what its agent was told.
func (l *ledger) judgePoisonLocked(p *poison, end time.Time) {
	find := func(at time.Time, format string, args ...any) {
		l.findLocked("poison", p.epochLocked(at), at, "of agent %d (%s), said %d times from %s on: %s",
			p.actor.id, p.kind.name, p.said, l.since(p.from), fmt.Sprintf(format, args...))
	}
	if allowed := p.allowedLocked(); len(p.ends) > allowed {
		find(p.ends[allowed], "%d links were lost, not at most %d", len(p.ends), allowed)
	}
	if len(p.ends) >= p.kind.links {
		last := p.ends[p.kind.links-1]
		e := p.epochLocked(last)
		upset := slices.ContainsFunc(e.gateways(), func(g *gateway) bool {
			return g.wasDisturbed(last.Add(toldWithin), toldWithin+endedWithin) != nil
		})
		told := slices.ContainsFunc(p.told, func(at time.Time) bool { return at.Before(last.Add(toldWithin)) })
		if !told && !upset && p.othersEndedLocked() == 0 && end.Sub(last) > toldWithin && (e.ended.IsZero() || e.ended.Sub(last) > toldWithin) {
			find(last, "%d links were lost, and within %s nobody told the agent", p.kind.links, toldWithin)
		}
	}
	if len(p.told) == 0 || p.kind.size > 0 { // whose message is too large may say others
		return
	}
	told, relayed := p.told[0], 0
	e := p.epochLocked(told)
	for i := range e.ups {
		u := &e.ups[i]
		forgotten := func(g *gateway) bool { return g.firstDisturbed(told, u.heardAt.Sub(told)) != nil }
		if u.said.After(told) && u.said.Before(told.Add(refusedAtLeast)) && u.heard != nil && !slices.ContainsFunc(e.gateways(), forgotten) {
			relayed++
		}
	}
	if relayed > 0 {
		find(told, "%d messages were relayed that it said within %s after it was told that nothing is", relayed, refusedAtLeast)
	}
}

// besideOthers is how many links a poison may cost more than the tests with one fault at a time allow: here others are
// suspects, too, so that a suspect is acquitted for what it says between its poisons.
const besideOthers = 2

// unexplainedFor is how long gateways look back at ends of links for which the server has told no reason.
const unexplainedFor = time.Minute

// othersEndedLocked is how many links of the same gateways have ended for another reason at about the same time, if
// the server tells no reason at this poison: to the gateway they look the same, so it has to see the poison at about as
// many ends.
func (p *poison) othersEndedLocked() (n int) {
	if p.kind.links <= sureLinks {
		return 0
	}
	for _, g := range p.epochLocked(p.from).gateways() {
		for _, w := range g.ways {
			at := w.conn.End().At
			if at.After(p.from.Add(-unexplainedFor)) && (p.to.IsZero() || at.Before(p.to)) && !slices.Contains(p.ends, w.hitAt) {
				n++
			}
		}
	}
	return n
}

// allowedLocked is how many links may be lost at the poison: a gateway that is killed or reloaded may have
// forgotten what it knew.
func (p *poison) allowedLocked() int {
	allowed := p.kind.links + besideOthers + p.othersEndedLocked()
	for _, g := range p.epochLocked(p.from).gateways() {
		g.mu.Lock()
		for _, d := range g.disturbed {
			if d.at.After(p.from) && (p.to.IsZero() || d.at.Before(p.to)) {
				allowed += p.kind.links
			}
		}
		g.mu.Unlock()
	}
	return allowed
}

// epochLocked returns the connection that the agent had at that time, or its first.
func (p *poison) epochLocked(at time.Time) *epoch {
	last := p.actor.epochs[0]
	for _, e := range p.actor.epochs {
		if !e.opened.IsZero() && e.opened.Before(at) {
			last = e
		}
	}
	return last
}

// gateways are those on the way of e.
func (e *epoch) gateways() (all []*gateway) {
	for g := e.gateway; g != nil; g = g.above {
		all = append(all, g)
	}
	return all
}

// judgeNames looks whether the logs name who has said a poison, and nobody else.
func (l *ledger) judgeNames(gateways []*gateway) {
	l.mu.Lock()
	defer l.mu.Unlock()
	named := map[*member]bool{}
	for _, g := range gateways {
		for id, line := range g.names {
			of := slices.IndexFunc(l.poisons, func(p *poison) bool { return p.actor.member.hasName(id) })
			if of < 0 {
				l.findLocked("wrongly told", nil, time.Now(), "gateway %s names who has said no poison: %s", g.name, line)
				continue
			}
			named[l.poisons[of].actor.member] = true
		}
	}
	for _, p := range l.poisons {
		if len(p.told) > 0 && len(p.ends) >= p.kind.links && !named[p.actor.member] {
			l.findLocked("poison", p.epochLocked(p.from), p.from, "of agent %d (%s): no gateway's log names %s", p.actor.id, p.kind.name, p.actor.member.uids)
		}
	}
}

func (m *member) hasName(id string) bool {
	for _, uid := range m.uids {
		if uid.String() == id {
			return true
		}
	}
	return false
}

// frameLimit is the largest payload of a WebSocket frame that some proxies let through, in bytes.
const frameLimit = 32 << 10

// limitFrame ends a link at a frame that is too large, while its line is such a proxy. The frame is a
// gateway's: the link's own, or the one above.
func (l *ledger) limitFrame(line, writer *gateway, w *way, size int) {
	if size <= frameLimit || !line.limited.Load() {
		return
	}
	line.hit()
	l.mu.Lock()
	first := w.hit == ""
	if first {
		w.hit, w.hitAt = "was ended at a large frame", time.Now()
		l.findLocked("frame too large", nil, time.Now(), "gateway %s wrote one of %d bytes on %s", writer.name, size, w)
	}
	l.mu.Unlock()
	if first {
		w.conn.Finish()
	}
}

// tapAgents listens in on what a gateway writes to agents behind its line.
func (s *soak) tapAgents(g *gateway) func(*fault.Conn) (up, down func([]byte)) {
	return func(c *fault.Conn) (up, down func([]byte)) {
		f := &frames{message: func([]byte) {}, closing: func() {}}
		f.frame = func(size int) {
			if size <= frameLimit || !g.limited.Load() {
				return
			}
			var e *epoch
			for _, a := range s.fleet() {
				if at := a.socket(); at != nil && at.ws.LocalAddr().String() == c.From() {
					e = at.epoch
					s.book.touch(e, "large frame")
				}
			}
			s.book.find("frame too large", e, time.Now(), "gateway %s wrote one of %d bytes to an agent", g.name, size)
			c.Reset()
		}
		return nil, f.read
	}
}
