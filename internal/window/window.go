// Package window bounds what is on its way on one link to the server: handed to the socket, and not known to
// be read. WebSocket has no acknowledgements, but a server answers a ping when its reader comes to it, after
// the messages before it: a pong tells how much the server has read, and the time it took tells how long a
// message waits behind what was on its way. The window keeps that wait at about 50 ms above the link's own
// round trip, so that a burst of one agent waits in the gateway, where others can pass it, and not in front
// of the server, where nobody can.
//
// It is arithmetic only: whoever writes to the socket asks it and tells it.
//
//	for something waits {
//		if !w.Open() { wait for a pong, or until w.Next(), whichever is first }
//		write it; w.Sent(its bytes)
//		if w.PingDue(now) { write a ping with w.Ping(now) }
//	}
//
// What passes by time alone, a ping that is due or a server that is given up, is noticed in PingDue: call it
// when Next says so, and Open after it.
package window

import (
	"math"
	"time"
)

// How much may be on its way.
const (
	startMessages = 16
	startBytes    = 256 << 10
	floorMessages = 4
	floorBytes    = 64 << 10
	ceilMessages  = 8192
	ceilBytes     = 8 << 20

	// ceilMessagesLong is for a round trip of at least longRoundTrip: there, more is on its way in the
	// network alone.
	ceilMessagesLong = 65536
	longRoundTrip    = int64(20 * time.Millisecond)
)

// How long a message is to wait behind what is on its way, above the link's own round trip: leastTarget, or half
// of that round trip if it is more, since those of a long path differ by as much with nothing waiting.
const (
	leastTarget = int64(50 * time.Millisecond)
	mostTarget  = int64(250 * time.Millisecond)
)

// When pings go.
const (
	// pingApart is the least time between two pings.
	pingApart = int64(10 * time.Millisecond)
	// pingIdle is when a ping follows messages that do not make a quarter of the window.
	pingIdle = int64(100 * time.Millisecond)
	// pingEnough is how often is often enough: pings that follow one another sooner because the window is
	// small let it grow.
	pingEnough = int64(50 * time.Millisecond)
	// pingLost is when an unanswered ping is replaced at the latest.
	pingLost = int64(2 * time.Second)
	// pingWithout is how long after the last one a ping goes to a server that is served without a window.
	pingWithout = int64(10 * time.Second)

	// maxOutstanding bounds the pings that are on their way, apart from those that replace lost ones.
	maxOutstanding = 8
	// remembered bounds all that may still be answered.
	remembered = 16
)

// When a server is served without a window.
const (
	// neverAnswered is after the first ping of a link: it, and the one in its place, got no answer.
	neverAnswered = 2 * pingLost
	// stoppedAnswering is after the last pong, with pings and messages on their way.
	stoppedAnswering = int64(10 * time.Second)
)

// When the link's own round trip is measured anew, by emptying the link.
const (
	// farFor is how long no round trip was known to be the link's own, while the window held the writer up.
	farFor = int64(10 * time.Second)
	// near is how far above the least round trip is near it.
	near = leastTarget / 5
	// emptyApart is the least time between two measurements.
	emptyApart = int64(10 * time.Second)
	// emptyPart is how many times as long as one took it is to the next, but emptyRare at most: not many
	// messages are to wait for it.
	emptyPart = 100
	emptyRare = int64(30 * time.Second)
	// emptyFor is how long the window is closed for one at most.
	emptyFor = int64(2 * time.Second)
	// emptyPings is how many pings are tried one after the other before a longer round trip is believed: the
	// first may have come while the server paused.
	emptyPings = 3
	// flooredTwice is how many times in a row the window was to become smaller than it can, before the round
	// trip is doubted sooner.
	flooredTwice = 2
)

// never is a time that does not come.
const never int64 = math.MaxInt64

// sent counts what was handed to the socket, from the link's beginning.
type sent struct{ messages, bytes uint64 }

// ping is one that may still be answered.
type ping struct {
	at    int64
	sent  sent // before it
	onWay sent // before it, and not known to be read when it went
}

// held says which dimension of the window held the writer up.
type held struct{ messages, bytes bool }

// Window is that of one link. It is not safe for concurrent use, and no call allocates or takes longer the
// more is on its way. Times are nanoseconds of a monotonic clock.
type Window struct {
	// What may be on its way, and what is.
	size sent // the window
	sent sent
	read sent // of sent, as the last pong told

	// The pings. Those of the numbers answered+1 to next-1 are outstanding, as far as they are remembered.
	pings    [remembered]ping
	next     uint64
	answered uint64
	lastAt   int64 // of the last ping; before it, the link's beginning
	lastSent sent  // before the last ping
	again    int64 // how long after the last ping another goes, though nothing was sent since
	giveUpAt int64 // when the server is given up unless it answers

	shut    bool // it was found closed, since the last ping or pong
	inForce bool // false: served without a window
	spoke   bool // at least one pong came

	// The rule.
	base     int64  // the link's own round trip: the least seen
	held     held   // since the last change
	changed  uint64 // pings below this number went before the last change, and tell nothing of it
	round    round
	floored  int   // how many times in a row a smaller window was wanted than there is
	nearAt   int64 // when base was seen with little on its way
	heldUp   bool  // since then, by the window
	pongAt   int64 // the last pong
	emptying emptying
}

// round is the pongs that are judged together: where the path is long, those that come within its round trip,
// by the one that took least. A queue delays all of them, and a path that is sometimes slow only some.
type round struct {
	on    bool
	until int64
	wait  int64
	onWay sent
}

// emptying is a measurement of the link's own round trip: the window is closed until nothing is on its way,
// then pings go alone.
type emptying struct {
	on    bool
	begun int64
	until int64
	pings int   // that went alone and were answered
	least int64 // their least round trip
	due   bool  // a ping is to go alone
	after int64 // not before that is the next measurement
}

// New returns the window of a link that begins now.
func New(now int64) *Window {
	return &Window{
		size: sent{startMessages, startBytes}, inForce: true,
		next: 1, lastAt: now, giveUpAt: never,
		base: never, nearAt: now, pongAt: now,
	}
}

// onWay returns what was sent and is not known to be read.
func (w *Window) onWay() sent {
	return sent{w.sent.messages - w.read.messages, w.sent.bytes - w.read.bytes}
}

// Open reports whether another message may go: less is on its way than the window holds, in messages and in
// bytes, or nothing at all. A closed window notes which of the two held the writer up, so ask only when
// something waits.
func (w *Window) Open() bool {
	n := w.sent.messages - w.read.messages
	if !w.inForce || (n == 0 || n < w.size.messages && w.sent.bytes-w.read.bytes < w.size.bytes) && !w.emptying.on {
		return true
	}
	w.shut = true
	w.holdUp(n)
	return false
}

// holdUp notes which dimension of the window holds the writer up.
func (w *Window) holdUp(onWay uint64) {
	if w.emptying.on {
		return
	}
	w.heldUp = true
	if onWay >= w.size.messages {
		w.held.messages = true
	} else {
		w.held.bytes = true
	}
}

// Sent counts a message that is handed to the socket, whether or not the window is open: the gateway's own
// questions pass a closed one.
func (w *Window) Sent(bytes int) {
	w.sent.messages++
	w.sent.bytes += uint64(max(bytes, 0))
}

// PingDue reports whether a ping is to follow what was sent. It also notices what the mere passing of time
// changes.
func (w *Window) PingDue(now int64) bool {
	if now >= w.turnAt() {
		w.turn(now)
	}
	return now >= w.pingAt()
}

// Next returns when PingDue will be true, or Open may be after it was asked, by the mere passing of time:
// math.MaxInt64 for never. It may lie in the past.
func (w *Window) Next() int64 { return min(w.pingAt(), w.turnAt()) }

// Outstanding returns how many pings were not answered.
func (w *Window) Outstanding() int { return int(w.next - 1 - w.answered) }

// pingAt returns when a ping is due.
func (w *Window) pingAt() int64 {
	since := w.sent.messages - w.lastSent.messages
	outstanding := w.next - 1 - w.answered
	switch {
	case w.next == 1:
		return w.lastAt // the link's first: its round trip with nothing before it
	case !w.inForce:
		if since == 0 {
			return never
		}
		return w.lastAt + pingWithout
	case w.emptying.due:
		return w.lastAt
	case outstanding >= remembered:
		return never // one of them is answered, or the server is given up
	case since > 0 && outstanding == 0 && w.shut:
		return w.lastAt // nothing else would open it
	case since > 0 && outstanding < maxOutstanding:
		switch {
		case w.emptying.on:
			return w.lastAt + pingApart
		case w.enough():
			return w.lastAt + w.apart()
		}
		return w.lastAt + pingIdle
	case w.sent.messages == w.read.messages && w.spoke && !w.emptying.on:
		return never
	case outstanding >= maxOutstanding:
		return w.lastAt + pingLost
	default:
		return w.lastAt + w.again
	}
}

// apart returns the least time between two pings. On a long round trip there is none: a window that is written
// at once has to be acknowledged in parts, or it is written at once again, one round trip later, and the server
// has nothing to do in between. Neither is there one before the window was judged: all of the first may be
// written at once, too, and to a slow server it is much.
func (w *Window) apart() int64 {
	if w.changed == 0 || w.base >= longRoundTrip {
		return 0
	}
	return pingApart
}

// enough reports whether so much was sent that a ping follows soon.
func (w *Window) enough() bool { return w.enoughMessages() || w.enoughBytes() }

// enoughMessages reports whether a quarter of the window was sent since the last ping. As long as less than
// half of it is on its way, the answer will be here before the window is used up.
func (w *Window) enoughMessages() bool {
	return (w.sent.messages-w.lastSent.messages)*4 >= w.size.messages &&
		(w.sent.messages-w.read.messages)*2 >= w.size.messages
}

// enoughBytes is enoughMessages for bytes.
func (w *Window) enoughBytes() bool {
	return (w.sent.bytes-w.lastSent.bytes)*4 >= w.size.bytes && (w.sent.bytes-w.read.bytes)*2 >= w.size.bytes
}

// turnAt returns when the window changes by time alone.
func (w *Window) turnAt() int64 {
	if w.emptying.on {
		return min(w.giveUpAt, w.emptying.until)
	}
	return w.giveUpAt
}

// turn is what the passing of time changes: the server is given up, or it took too long to empty the link.
func (w *Window) turn(now int64) {
	if w.emptying.on && now >= w.emptying.until {
		w.emptied(now)
	}
	if now < w.giveUpAt {
		return
	}
	w.giveUpAt = never // until the next ping
	if w.next == 2 && !w.spoke {
		w.giveUpAt = now + pingLost // nobody looked when the first ping was to be replaced
		return
	}
	if w.spoke && w.sent.messages == w.read.messages {
		return // it owes an answer to a ping, but no message waits for it
	}
	w.inForce = false
	w.emptying = emptying{after: w.emptying.after}
}

// Ping notes a ping that goes out now, behind all that was Sent, and returns its number, which is its payload.
func (w *Window) Ping(now int64) (number uint64) {
	since := w.sent.messages - w.lastSent.messages
	if now-w.lastAt < pingEnough && w.next > 1 && !w.emptying.on {
		// The window may hold nobody up, but pings follow one another for nothing.
		w.held.messages = w.held.messages || w.enoughMessages()
		w.held.bytes = w.held.bytes || w.enoughBytes()
	}
	switch {
	case !w.spoke:
		w.again = pingLost
	case since == 0:
		w.again = min(2*w.again, pingLost) // one more in place of the last
	}
	if w.giveUpAt == never && w.inForce {
		w.giveUpAt = now + stoppedAnswering
		if !w.spoke {
			w.giveUpAt = now + neverAnswered
		}
	}
	number = w.next
	w.next++
	w.pings[number%remembered] = ping{at: now, sent: w.sent, onWay: w.onWay()}
	w.lastAt, w.lastSent, w.shut = now, w.sent, false
	w.emptying.due = false
	return number
}

// Pong takes the answer to a ping; waiting says whether something waits to be sent. It returns how many
// messages, counted from the link's beginning, the server has read by now, and how long the ping took. ok is
// false for an answer to no ping that is known: one that was not sent, was answered already, itself or a
// later one, or is forgotten.
func (w *Window) Pong(number uint64, now int64, waiting bool) (acknowledged uint64, roundTrip time.Duration, ok bool) {
	if number <= w.answered || number >= w.next || w.next-number > remembered {
		return w.read.messages, 0, false
	}
	p := &w.pings[number%remembered]
	took := max(now-p.at, 0)
	w.answered, w.read, w.shut = number, p.sent, false
	w.again = min(max(pingIdle, 2*took), pingLost)
	w.giveUpAt = never
	if number+1 < w.next && w.sent.messages != w.read.messages {
		w.giveUpAt = now + stoppedAnswering
	}
	if now-w.pongAt > farFor/4 {
		w.nearAt, w.heldUp = now, false // what was before a pause tells nothing
	}
	w.pongAt = now
	w.spoke = true
	w.base = min(w.base, took)
	switch {
	case !w.inForce:
		w.inForce = true
		w.size = sent{startMessages, startBytes}
		w.change()
		w.nearAt = now
	case w.emptying.on:
		w.alone(p, took, now)
	default:
		w.adjust(number, p, took-w.base, now, waiting)
		w.doubt(p, took, now)
	}
	return w.read.messages, time.Duration(took), true
}

// change begins to judge a new size of the window.
func (w *Window) change() {
	w.changed = w.next
	w.round = round{}
	w.held = held{}
	w.floored = 0
}

// target returns how long a message is to wait above the link's own round trip. Up to a fifth less, or a
// quarter more, nothing is changed.
func (w *Window) target() int64 { return min(max(leastTarget, w.base/2), mostTarget) }

// adjust makes the window what would have kept the wait of a ping at the target. wait is what it was.
func (w *Window) adjust(number uint64, p *ping, wait, now int64, waiting bool) {
	if number < w.changed {
		return
	}
	if wait < w.target()*4/5 && w.held != (held{}) && w.grow(p.onWay, max(wait, 1)) {
		return
	}
	if !w.round.on {
		w.round = round{on: true, until: now, wait: never}
		if w.base >= longRoundTrip {
			w.round.until = now + w.base
		}
	}
	if wait < w.round.wait {
		w.round.wait, w.round.onWay = wait, p.onWay
	}
	if now < w.round.until {
		return
	}
	if w.round.wait > w.target()*5/4 && waiting {
		w.shrink()
		return
	}
	w.round = round{}
}

// shrink takes what was on its way down to what would have waited for the target.
func (w *Window) shrink() {
	floored := 0
	if w.size == (sent{floorMessages, floorBytes}) {
		floored = w.floored + 1
	}
	f := max(float64(w.base+w.target())/float64(w.base+w.round.wait), 0.5)
	w.size.messages = max(uint64(float64(min(w.size.messages, w.round.onWay.messages))*f), floorMessages)
	w.size.bytes = max(uint64(float64(min(w.size.bytes, w.round.onWay.bytes))*f), floorBytes)
	w.change()
	w.floored = floored
}

// grow makes the dimensions larger that held the writer up, to what would have waited for the target, and
// twice at most. It reports whether it did: of a ping with little before it a short wait says little.
func (w *Window) grow(onWay sent, wait int64) bool {
	f := float64(w.base+w.target()) / float64(w.base+wait)
	if wait < w.target()/4 {
		f = float64(w.target()) / float64(wait) // nothing waits yet: what was on its way was on the path
	}
	size := w.size
	if w.held.messages {
		top := uint64(ceilMessages)
		if w.base >= longRoundTrip {
			top = ceilMessagesLong
		}
		size.messages = grown(size.messages, onWay.messages, f, top)
	}
	if w.held.bytes {
		size.bytes = grown(size.bytes, onWay.bytes, f, ceilBytes)
	}
	if size == w.size {
		return false
	}
	w.size = size
	w.change()
	return true
}

// grown returns one dimension of the window, not made smaller.
func grown(size, onWay uint64, f float64, top uint64) uint64 {
	return max(size, min(uint64(min(float64(onWay)*f, float64(2*size))), top))
}

// doubt begins to empty the link when its own round trip may have become longer, or was never seen: with a
// queue before the server that is never empty, the least seen may be that of the queue. The smallest window
// that does not help is doubted at once.
func (w *Window) doubt(p *ping, took, now int64) {
	little := p.onWay.messages <= w.size.messages/8 && p.onWay.bytes <= w.size.bytes/8
	if took <= near || took-w.base <= near && little {
		w.nearAt, w.heldUp = now, false
		return
	}
	if now < w.emptying.after || w.floored < flooredTwice && (!w.heldUp || now-w.nearAt < farFor) {
		return
	}
	w.emptying = emptying{
		on: true, begun: now, until: now + emptyFor, least: never,
		due: w.sent.messages == w.read.messages,
	}
}

// alone takes a pong while the link is being emptied.
func (w *Window) alone(p *ping, took, now int64) {
	e := &w.emptying
	if p.onWay == (sent{}) {
		e.pings++
		e.least = min(e.least, took)
		if e.pings >= emptyPings || e.least-w.base <= max(near, w.base/4) {
			w.emptied(now)
			return
		}
	}
	if e.due = w.sent.messages == w.read.messages; e.due {
		w.again = min(max(pingApart, w.base), pingLost) // if it is lost, the link stands empty
	}
}

// emptied ends the measurement.
func (w *Window) emptied(now int64) {
	if w.emptying.pings > 0 {
		w.base = w.emptying.least
	}
	rest := min(max((now-w.emptying.begun)*emptyPart, emptyApart), emptyRare)
	w.emptying = emptying{after: now + rest}
	w.nearAt, w.heldUp = now, false
	w.change()
}

// Unacknowledged returns what is on its way. It is nothing while the server is served without a window, since
// then nobody knows.
func (w *Window) Unacknowledged() (messages, bytes int) {
	if !w.inForce {
		return 0, 0
	}
	n := w.onWay()
	return int(min(n.messages, math.MaxInt)), int(min(n.bytes, math.MaxInt))
}

// Answers reports whether the server is known to answer pings: at least one pong came, and the window is in
// force.
func (w *Window) Answers() bool { return w.spoke && w.inForce }

// Blind reports whether the server is served without a window, since it does not answer pings.
func (w *Window) Blind() bool { return !w.inForce }

// Blinden has the server served without a window until it answers a ping: another link to it showed that it does
// not.
func (w *Window) Blinden() { w.inForce, w.giveUpAt = false, never }
