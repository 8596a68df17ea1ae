package main

import (
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"
	"github.com/open-telemetry/opamp-go/protobufs"
)

// ledger is the book of all that was said and heard. Its rules are in verdict.go.
type ledger struct {
	start time.Time
	pulse *pulse

	// mu guards all below, and all that belongs to it.
	mu       sync.Mutex
	actors   []*actor
	members  []*member
	findings []finding
	excused  []excusedLoss
	counts   map[string]int
	floods   []*flood
	poisons  []*poison
	// longestWait is how long a message took at most that was said beside a flood.
	longestWait time.Duration
}

// excusedLoss is a message of an agent that was lost and may be.
type excusedLoss struct {
	epoch  *epoch
	index  int
	excuse string
}

// member is one agent of the fleet: an instance UID, and everybody who speaks under it.
type member struct {
	number  int
	uids    []uuid.UUID // that it was ever given; it uses the last as soon as it has heard of it
	renamed time.Time   // when it was given the last, if that is not its first
	polls   bool        // it speaks over plain HTTP; set once
	clones  []*epoch    // the connections of its clones
	downs   []*down     // all that the server has said to it
}

// actor is one program that is an agent: the member's own, or a clone of it.
type actor struct {
	id     uint32
	member *member
	clone  bool
	epochs []*epoch
	flood  *flood  // in which it is; nil for none
	poison *poison // that it says; nil for none
}

// epoch is one connection of an actor, from the attempt to connect until its end.
type epoch struct {
	actor    *actor
	number   uint32
	gateway  *gateway
	opened   time.Time // zero when it was never let in
	touched  time.Time // when a fault first hit it, zero when none did
	hurt     string    // which fault
	slow     bool      // it was pushed more to than its outbox holds, while it did not read
	ended    time.Time
	end      string // how it ended
	byItself bool   // the agent ended it
	polite   bool   // with a goodbye

	ups      []up              // what it said, by number - 1
	askings  [maxHops][]asking // by hop, in the order in which they were written
	segments []*segment
	lastDown uint32   // the last that was heard of what is for this connection
	denials  []denial // what it was told instead of an answer

	// Of an agent over plain HTTP.
	absences []absence
	failures []time.Time // when it had no answer to a poll
}

// absence is a time in which an agent does not poll.
type absence struct {
	from, to time.Time
}

// denial is that an agent was told that something of it is not relayed.
type denial struct {
	at     time.Time
	poison bool // because of its poison; else, because its UID is another's
}

// maxHops is how many gateways stand between an agent and the server at most.
const maxHops = 2

// up is one message of an agent.
type up struct {
	said    time.Time
	heard   *segment // where it arrived first; nil for not
	heardAt time.Time
	flood   *flood  // of which it is; nil for none
	poison  *poison // that it is; nil for none
	again   bool    // it was said again, since the poll that said it had no answer
	// By hop: the way on which a gateway wrote it last, nil for none, when, and on how many.
	written   [maxHops]*way
	writtenAt [maxHops]time.Time
	ways      [maxHops]int
}

// repeated reports whether a gateway has written it to more than one link: it may arrive twice.
func (u *up) repeated() bool { return slices.Max(u.ways[:]) > 1 }

// hop is the how manyth gateway g is on the way of e.
func (e *epoch) hop(g *gateway) int {
	if g == e.gateway {
		return 0
	}
	return 1
}

// hops is how many gateways are on the way of e.
func (e *epoch) hops() int {
	if e.gateway.above == nil {
		return 1
	}
	return 2
}

func (e *epoch) String() string {
	kind := "agent"
	if e.actor.clone {
		kind = fmt.Sprintf("clone of agent %d,", e.actor.member.number)
	}
	return fmt.Sprintf("%s %d, connection %d by gateway %s", kind, e.actor.id, e.number, e.gateway.name)
}

// segment is the time of an epoch on one way to the server: it starts when the server is asked
// about the agent, first when the agent connects, and then whenever a link on its way was lost.
type segment struct {
	epoch       *epoch
	index       int
	conn        *serverConn
	below       *way // on which its gateway had asked last; nil for none
	asked       time.Time
	first, last uint32    // of the messages that arrived here
	described   time.Time // when an agent description arrived
	lastDown    uint32    // the last of the server's messages from here that was heard
	lastHeard   uint32    // the same, of those that have certainly come this way
}

// down is one message of the server.
type down struct {
	at      time.Time
	segment *segment
	heard   bool
	between bool // it was said when the server had been asked about the agent again already
	oldUID  bool // it was sent under a UID that the agent had just been told to give up
	early   bool // the agent, which is behind two gateways, had said nothing there yet: the upper one may not know its way
}

// finding is something that must not be.
type finding struct {
	kind  string
	at    time.Time
	text  string
	epoch *epoch // nil if it concerns none
}

func newLedger() *ledger {
	return &ledger{start: time.Now(), pulse: startPulse(), counts: map[string]int{}}
}

func (l *ledger) since(at time.Time) string {
	return fmt.Sprintf("%.3fs", at.Sub(l.start).Seconds())
}

func (l *ledger) find(kind string, e *epoch, at time.Time, format string, args ...any) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.findLocked(kind, e, at, format, args...)
}

func (l *ledger) findLocked(kind string, e *epoch, at time.Time, format string, args ...any) {
	l.findings = append(l.findings, finding{kind, at, fmt.Sprintf(format, args...), e})
}

func (l *ledger) count(what string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.counts[what]++
}

// join takes a new member into the fleet.
func (l *ledger) join() *member {
	l.mu.Lock()
	defer l.mu.Unlock()
	m := &member{number: len(l.members), uids: []uuid.UUID{uuid.New()}}
	l.members = append(l.members, m)
	return m
}

func (l *ledger) addActor(m *member, clone bool) *actor {
	l.mu.Lock()
	defer l.mu.Unlock()
	a := &actor{id: uint32(len(l.actors)), member: m, clone: clone}
	l.actors = append(l.actors, a)
	return a
}

// open starts the actor's next epoch, before it tries to connect.
func (l *ledger) open(a *actor, g *gateway) *epoch {
	l.mu.Lock()
	defer l.mu.Unlock()
	e := &epoch{actor: a, number: uint32(len(a.epochs) + 1), gateway: g}
	a.epochs = append(a.epochs, e)
	return e
}

func (l *ledger) letIn(e *epoch) {
	l.mu.Lock()
	defer l.mu.Unlock()
	e.opened = time.Now()
	if e.actor.clone {
		e.actor.member.clones = append(e.actor.member.clones, e)
	}
}

// touch notes that a fault has hit the agent's own connection.
func (l *ledger) touch(e *epoch, fault string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if e.touched.IsZero() {
		e.touched, e.hurt = time.Now(), fault
	}
}

// close notes how a connection ended; only the first to say so counts.
func (l *ledger) close(e *epoch, how string, byItself, polite bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if e.ended.IsZero() {
		e.ended, e.end, e.byItself, e.polite = time.Now(), how, byItself, polite
	}
}

// say numbers the next message of an agent, which may be its full state. What is a poison by its size is
// larger than was asked for.
func (l *ledger) say(e *epoch, size int, state bool) stamp {
	l.mu.Lock()
	defer l.mu.Unlock()
	said := up{said: time.Now(), flood: e.actor.flood}
	if p := e.actor.poison; p != nil && (state || p.kind.any) {
		said.poison = p
		size = max(size, p.kind.size)
		p.said++
	}
	e.ups = append(e.ups, said)
	l.counts["said by agents"]++
	return stamp{actor: e.actor.id, epoch: e.number, number: uint32(len(e.ups)), size: uint32(size)}
}

// unsay takes back the last message, which never left.
func (l *ledger) unsay(e *epoch) {
	l.mu.Lock()
	defer l.mu.Unlock()
	e.ups = e.ups[:len(e.ups)-1]
	l.counts["said by agents"]--
}

// pollFailed notes that an agent has had no answer to a poll: what it said, if that is in the book, may have arrived.
func (l *ledger) pollFailed(e *epoch, stamped bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	e.failures = append(e.failures, time.Now())
	if stamped {
		e.ups[len(e.ups)-1].again = true
	}
}

// sayAgain notes that an agent says again what it said last.
func (l *ledger) sayAgain(e *epoch) {
	l.mu.Lock()
	defer l.mu.Unlock()
	e.ups[len(e.ups)-1].said = time.Now()
}

// fallSilent notes that an agent does not poll for a while.
func (l *ledger) fallSilent(a *actor, d time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if n := len(a.epochs); n > 0 {
		now := time.Now()
		a.epochs[n-1].absences = append(a.epochs[n-1].absences, absence{now, now.Add(d)})
	}
}

// rename draws a new UID for an agent.
func (l *ledger) rename(m *member) uuid.UUID {
	l.mu.Lock()
	defer l.mu.Unlock()
	uid := uuid.New()
	m.uids, m.renamed = append(m.uids, uid), time.Now()
	return uid
}

// name is how a connection is known to the server before the agent has said anything.
func (e *epoch) name() string { return fmt.Sprintf("%d/%d", e.actor.id, e.number) }

// epochNamed returns the connection of that name; nil if there is none.
func (l *ledger) epochNamed(name string) *epoch {
	var actor, number uint32
	if _, err := fmt.Sscanf(name, "%d/%d", &actor, &number); err != nil {
		return nil
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.epochOfLocked(actor, number)
}

// epochOfLocked returns the connection that a stamp names; nil if there is none.
func (l *ledger) epochOfLocked(actor, number uint32) *epoch {
	if int(actor) >= len(l.actors) || number == 0 || int(number) > len(l.actors[actor].epochs) {
		return nil
	}
	return l.actors[actor].epochs[number-1]
}

// asked notes that the server was asked about an agent: from now on it speaks on c.
func (l *ledger) asked(e *epoch, c *serverConn) {
	l.mu.Lock()
	defer l.mu.Unlock()
	seg := &segment{epoch: e, index: len(e.segments), conn: c, asked: time.Now()}
	if n := len(e.askings[0]); n > 0 {
		seg.below = e.askings[0][n-1].way
	}
	e.segments = append(e.segments, seg)
}

// arrived takes a message of an agent that arrived at the server on c. It returns where it
// belongs, nil if nowhere.
//
// What a lost link had in flight may still arrive when the agent speaks on another already:
// nobody reads two sockets in order. On another socket to the server that is seen by the
// segment. On the same one, below another gateway, such a straggler is older than all that
// the agent has said in the new segment, or is repeated there.
func (l *ledger) arrived(c *serverConn, s stamp, uid uuid.UUID, described bool) *segment {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := time.Now()
	e := l.epochOfLocked(s.actor, s.epoch)
	if e == nil || s.down || int(s.number) > len(e.ups) || s.number == 0 {
		l.findLocked("corrupted", e, now, "%s arrived at the server, but nobody has said it", s)
		return nil
	}
	if !e.actor.member.has(uid) {
		l.findLocked("misdelivered", e, now, "%s arrived at the server under the UID %s of somebody else", s, uid)
		return nil
	}
	var seg *segment
	for _, of := range e.segments {
		if of.conn == c {
			seg = of
		}
	}
	if said := &e.ups[s.number-1]; e.gateway.above != nil && said.ways[0] == 1 {
		for _, of := range e.segments {
			if of.conn == c && of.below == said.written[0] {
				seg = of // by whichever link to the gateway above it came
			}
		}
	}
	if seg == nil {
		if seg = l.broughtLocked(e, s, c); seg == nil {
			return nil
		}
	}
	l.counts["heard by the server"]++
	first := e.ups[s.number-1].heard
	switch {
	case s.number > seg.last:
		if seg.first == 0 {
			seg.first = s.number
		}
		seg.last = s.number
		if first != nil {
			l.counts["repeated after a link was lost"]++
		} else if seg.index < len(e.segments)-1 {
			l.counts["late, from a link that was lost"]++
		}
	case seg.index > 0 && s.number > e.segments[seg.index-1].last && e.maybeStragglerLocked(s.number, seg):
		l.counts["late, from a link that was lost"]++
		seg = e.segments[seg.index-1]
		seg.last = s.number
	case e.ups[s.number-1].again: // by a poll that was given up before
		l.counts["repeated after a poll had no answer"]++
	case first != nil:
		l.findLocked("duplicated", e, now, "%s arrived again on %s, where it was heard before; %d is the last there", s, c, seg.last)
	default:
		l.findLocked("reordered", e, now, "%s arrived on %s behind %d", s, c, seg.last)
	}
	if first == nil {
		e.ups[s.number-1].heard, e.ups[s.number-1].heardAt = seg, now
	}
	if described {
		seg.described = now
	}
	return seg
}

// broughtLocked returns the new segment of an agent whose message arrived on c, about which the server was not asked there: what
// waited of it when its connection ended goes before all that it says on the next one, wherever that is. Anything else is
// misdelivered, or reordered.
func (l *ledger) broughtLocked(e *epoch, s stamp, c *serverConn) *segment {
	for _, later := range e.actor.epochs[s.epoch:] {
		for _, of := range later.segments {
			if of.conn != c {
				continue
			}
			if of.first != 0 {
				l.findLocked("reordered", e, time.Now(), "%s arrived on %s behind what the agent has said on its next connection", s, c)
			}
			l.counts["brought along by the next connection"]++
			seg := &segment{epoch: e, index: len(e.segments), conn: c, asked: of.asked}
			e.segments = append(e.segments, seg)
			return seg
		}
	}
	l.findLocked("misdelivered", e, time.Now(), "%s arrived on %s, on which the server was never asked about it", s, c)
	return nil
}

// maybeStragglerLocked reports whether message number of e, behind others of seg on the same socket to
// the server, may have come there by an earlier link between gateways. What was written to one
// link stays in order.
func (e *epoch) maybeStragglerLocked(number uint32, seg *segment) bool {
	if e.gateway.above == nil {
		return false
	}
	said := &e.ups[number-1]
	if number < seg.first {
		return said.repeated() || said.written[0] != e.ups[seg.last-1].written[0]
	}
	return said.heard == seg && said.repeated()
}

// tell numbers the next message of the server for an agent.
func (l *ledger) tell(seg *segment, size int, uid uuid.UUID) stamp {
	l.mu.Lock()
	defer l.mu.Unlock()
	m := seg.epoch.actor.member
	oldUID := uid != m.uids[len(m.uids)-1] && time.Since(m.renamed) < inFlight
	between := seg.index < len(seg.epoch.segments)-1
	m.downs = append(m.downs, &down{at: time.Now(), segment: seg, between: between, oldUID: oldUID, early: seg.first == 0 && seg.epoch.hops() > 1})
	l.counts["said by the server"]++
	return stamp{down: true, actor: seg.epoch.actor.id, epoch: seg.epoch.number, number: uint32(len(m.downs)), size: uint32(size)}
}

// take takes what an agent was told, whoever has said it.
func (l *ledger) take(e *epoch, m *protobufs.ServerToAgent) {
	if failure := m.GetErrorResponse(); failure != nil {
		l.turnedDown(e, failure)
	}
	if custom := m.GetCustomMessage(); custom != nil {
		said, err := readStamp(custom.GetData())
		if err != nil {
			l.find("corrupted", e, time.Now(), "at %s: %v", e, err)
			return
		}
		l.heard(e, said, m.GetInstanceUid())
	}
}

// heard takes a message of the server that arrived at an agent.
func (l *ledger) heard(e *epoch, s stamp, uid []byte) {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := time.Now()
	m := e.actor.member
	to := l.epochOfLocked(s.actor, s.epoch)
	if to == nil || !s.down {
		l.findLocked("corrupted", e, now, "%s arrived at an agent, but nobody has said it", s)
		return
	}
	id, err := uuid.FromBytes(uid)
	if to.actor.member != m || err != nil || !m.has(id) {
		l.findLocked("misdelivered", e, now, "%s, under UID %x, arrived at %s", s, uid, e)
		return
	}
	if s.number == 0 || int(s.number) > len(m.downs) {
		l.findLocked("corrupted", e, now, "%s arrived, but the server has said %d", s, len(m.downs))
		return
	}
	l.counts["heard by agents"]++
	d := m.downs[s.number-1]
	if d.heard {
		l.findLocked("duplicated", e, now, "%s arrived again", s)
		return
	}
	d.heard = true
	if to == e && !d.between && !e.movedBelow(d.at) { // what comes later, or elsewhere, says nothing about this way
		d.segment.lastHeard = max(d.segment.lastHeard, s.number)
	}
	switch {
	case to != e: // for the agent's earlier connection, or for its clone
		l.counts["heard on another connection of the agent"]++
	case s.number > e.lastDown:
		e.lastDown = s.number
	case e.gateway.above != nil && s.number > d.segment.lastDown:
		// Two links of the gateway above live, and it reads them in no order: what is said on the
		// new way may be overtaken by the last reply on the old, or the other way round.
		l.counts["late, below a gateway with two ways"]++
	default:
		l.findLocked("reordered", e, now, "%s arrived behind %d", s, e.lastDown)
	}
	d.segment.lastDown = max(d.segment.lastDown, s.number)
}

// movedBelow reports whether the agent has come to another link below another gateway since: what the
// server said before may reach it there.
func (e *epoch) movedBelow(since time.Time) bool {
	n := len(e.askings[0])
	return e.gateway.above != nil && n > 0 && e.askings[0][n-1].at.After(since)
}

// turnedDown takes what a gateway told an agent of a message that it does not relay. It may do that
// while it knows of another that speaks under the same UID, and came with other credentials; and when
// the agent has said what the server ends links at.
func (l *ledger) turnedDown(e *epoch, failure *protobufs.ServerErrorResponse) {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := time.Now()
	poison := l.poisonOfLocked(e.actor.member, now, now)
	switch {
	case strings.Contains(failure.GetErrorMessage(), "in use by another agent") && l.hasRivalLocked(e, now):
		l.counts["turned down, of an agent or its clone"]++
	case poison != nil && failure.GetType() == protobufs.ServerErrorResponseType_ServerErrorResponseType_BadRequest:
		l.counts["turned down, of an agent with a poison"]++
		poison.told = append(poison.told, now)
	default:
		l.findLocked("wrongly told", e, now, "%s was told: %s", e, failure)
		return
	}
	e.denials = append(e.denials, denial{now, poison != nil})
}

// hasRivalLocked reports whether another program speaks as the same member below the gateway of e, or
// did so not long ago. That gateway has it by the word of the one below only, so that to it the two do not
// have the same credentials.
func (l *ledger) hasRivalLocked(e *epoch, now time.Time) bool {
	return slices.ContainsFunc(l.actors, func(other *actor) bool {
		return other.member == e.actor.member && other != e.actor && slices.ContainsFunc(other.epochs, func(o *epoch) bool {
			return o.gateway.above == e.gateway && !o.opened.IsZero() && (o.ended.IsZero() || now.Sub(o.ended) < deniedAfter)
		})
	})
}

func (m *member) has(uid uuid.UUID) bool {
	return slices.Contains(m.uids, uid)
}
