package main

import (
	"syscall"
	"time"
)

// inFlight bounds how long before an end something may have been said that is lost with it. It
// only keeps an end from excusing everything before it: what is lost must in any case be the
// last that was said there.
const inFlight = 20 * time.Second

// troubled is how long a fault on a link may keep messages in the gateway: it is noticed, and
// the agents find another way.
const troubled = 8 * time.Second

// endedWithin is how soon a gateway that is reloaded or killed has closed its agents, and they
// have read it.
const endedWithin = 10 * time.Second

// forgottenWithin is how soon the server has been told of an agent's end: below another gateway
// after the grace period, if a link took the first news with it.
const forgottenWithin = gracePeriod + inFlight

// lastWords is how long a gateway that is reloaded hears an agent that does not read that it is
// closed.
const lastWords = time.Second

// stateWithin is how soon after an agent came to a new way its full state must be there.
const stateWithin = 10 * time.Second

// judge goes through the book at the end of the run, when nothing is on its way any more.
//
//   - An agent's message may be lost when a link on its way was lost: the messages just before
//     the server was asked about the agent again. And when the agent's own connection ended
//     other than by a goodbye: the last of that connection.
//   - A server's message may be lost when it was among the last that were said to the agent on
//     that way, before a link or the agent's connection ended.
//   - Nothing may be lost between two messages that went the same way.
func (l *ledger) judge(end time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, a := range l.actors {
		for _, e := range a.epochs {
			if !e.opened.IsZero() {
				l.judgeUpLocked(e)
				l.judgeEndLocked(e)
				l.judgeStateLocked(e, end)
			}
		}
	}
	for _, m := range l.members {
		l.judgeDownLocked(m)
	}
}

// judgeUpLocked looks for what a connection's agent said and the server has not heard.
func (l *ledger) judgeUpLocked(e *epoch) {
	before := 0 // index of the way of the last message that arrived
	for i := 0; i < len(e.said); i++ {
		if e.heardIn[i] != nil {
			before = e.heardIn[i].index
			continue
		}
		from := i
		for i < len(e.said) && e.heardIn[i] == nil {
			i++
		}
		lost := i - from
		switch {
		case i < len(e.said) && e.heardIn[i].index > before:
			l.judgeWayLocked(e, from, i, before)
		case i < len(e.said):
			l.findLocked("lost", e, e.said[from], "up %d to %d of %s, said at %s to %s: those before and behind arrived on the same way, %s",
				from+1, i, e, l.since(e.said[from]), l.since(e.said[i-1]), e.heardIn[i].conn)
		case e.ended.IsZero():
			l.findLocked("lost", e, e.said[from], "up %d to %d of %s, said from %s on: it is still connected", from+1, i, e, l.since(e.said[from]))
		case !e.touched.IsZero():
			l.permitLocked("up, with an agent's connection", lost, e.said[from], e.touched, e)
		default:
			l.judgeLastWordsLocked(e, lost, e.said[from])
		}
		if i < len(e.said) {
			before = e.heardIn[i].index
		}
	}
}

// judgeWayLocked looks at what was lost when an agent came from one way to another, perhaps by
// some on which nothing was heard. What it said when its gateway knew of the end of the last of
// these cannot have gone there: the gateway had it.
func (l *ledger) judgeWayLocked(e *epoch, from, to, before int) {
	next := e.heardIn[to]
	last, lost := e.said[to-1], to-from
	if e.gateway.above != nil { // which link below it was, nobody knows
		l.permitLocked("up, with a link between gateways", lost, e.said[from], next.asked, e)
		return
	}
	var old *serverConn
	for _, s := range e.segments[before:next.index] {
		if hit := s.conn.hit; hit != nil && !hit.by.IsZero() && (old == nil || hit.by.After(old.hit.by)) {
			old = s.conn
		}
	}
	switch {
	case old == nil:
		l.findLocked("lost", e, last, "up %d to %d of %s, said at %s to %s: no fault has ended %s",
			from+1, to, e, l.since(e.said[from]), l.since(last), e.segments[before].conn)
	case last.After(old.hit.by):
		l.findLocked("lost", e, last, "up %d to %d of %s, said at %s to %s: %s %s, which was known at %s at the latest",
			from+1, to, e, l.since(e.said[from]), l.since(last), old, old.hit.what, l.since(old.hit.by))
	default:
		l.permitLocked("up, with a link that "+old.hit.what, lost, e.said[from], next.asked, e)
	}
}

// judgeLastWordsLocked looks for why the last that an agent said is lost, when nothing happened
// on its own connection but what the agent did itself, or the gateway.
func (l *ledger) judgeLastWordsLocked(e *epoch, lost int, said time.Time) {
	gateway := e.gateway.wasDisturbed(e.ended, inFlight)
	hit := e.wayHitLocked(said)
	switch {
	case e.byItself && !e.polite:
		l.permitLocked("up, with an agent's connection", lost, said, e.ended, e)
	case gateway != nil && gateway.signal == syscall.SIGKILL:
		l.permitLocked("up, with a gateway that was killed", lost, said, e.ended, e)
	case gateway != nil && said.After(gateway.at.Add(lastWords)):
		l.permitLocked("up, said long after a gateway that was reloaded had closed the connection", lost, said, e.ended, e)
	case gateway != nil && hit && e.lastLinkLost():
		l.permitLocked("up, with a gateway that was reloaded when the link was lost", lost, said, e.ended, e)
	case e.polite && hit:
		l.permitLocked("up, with a link, last words before a goodbye", lost, said, e.ended, e)
	case e.slow:
		l.permitLocked("up, with an agent that was too slow", lost, said, e.ended, e)
	default:
		l.findLocked("lost", e, said, "the last %d that %s said, from %s on: nothing happened on its way, and it ended so: %s", lost, e, l.since(said), e.end)
	}
}

// permitLocked counts what was lost with something that ended, if that was not long before.
func (l *ledger) permitLocked(why string, n int, said, ended time.Time, e *epoch) {
	bound := inFlight
	if e.gateway.above != nil { // it may go from one broken way to the next, as long as it is not let go
		bound += gracePeriod * 3 / 2
	}
	if ended.Sub(said) > bound {
		l.findLocked("lost", e, said, "%d messages %s of %s: they were said at %s, and the end came only at %s", n, why, e, l.since(said), l.since(ended))
		return
	}
	l.counts["lost "+why] += n
}

// wayHitLocked reports whether something happened on the way of e while what was said then was
// on it.
func (e *epoch) wayHitLocked(said time.Time) bool {
	return e.gateway.wasHit(said.Add(-troubled), e.ended.Add(time.Second))
}

// lastLinkLost reports whether a fault hit the last link that the agent spoke on, as far as that
// is known: not below another gateway.
func (e *epoch) lastLinkLost() bool {
	if e.gateway.above != nil || len(e.segments) == 0 {
		return true
	}
	hit := e.segments[len(e.segments)-1].conn.hit
	return hit != nil && hit.what != endedByGateway
}

// judgeEndLocked looks for ends that nobody caused.
func (l *ledger) judgeEndLocked(e *epoch) {
	if e.ended.IsZero() || e.byItself || !e.touched.IsZero() || e.slow || e.gateway.wasDisturbed(e.ended, endedWithin) != nil {
		return
	}
	l.findLocked("disconnected without reason", e, e.ended, "%s, let in at %s, ended at %s: %s", e, l.since(e.opened), l.since(e.ended), e.end)
}

// judgeStateLocked looks for ways on which an agent stayed and the server never saw its state.
func (l *ledger) judgeStateLocked(e *epoch, end time.Time) {
	if len(e.actor.member.clones) > 0 {
		return // the request goes to whoever spoke last
	}
	for i, s := range e.segments {
		until := end
		if i+1 < len(e.segments) {
			until = e.segments[i+1].asked
		}
		for _, at := range []time.Time{e.touched, e.ended, s.conn.ended} {
			if !at.IsZero() && at.Before(until) {
				until = at
			}
		}
		if s.described.IsZero() && until.Sub(s.asked) > stateWithin {
			l.findLocked("full state missing", e, s.asked, "of %s on %s, since the server was asked about it at %s (for the %d. time) until %s",
				e, s.conn, l.since(s.asked), i+1, l.since(until))
		}
	}
}

// judgeDownLocked looks for what the server said to an agent and nobody has heard.
func (l *ledger) judgeDownLocked(m *member) {
	for i, d := range m.downs {
		e, number := d.segment.epoch, uint32(i+1)
		switch {
		case d.heard:
		case d.oldUID:
			l.counts["lost down, under a UID that the agent was about to give up"]++
		case m.hadCloneLocked(d.at):
			l.counts["lost down, to an agent while it had a clone"]++
		case number < d.segment.lastHeard:
			l.findLocked("lost", e, d.at, "down %d for %s, said at %s on %s: %d was heard on the same way", number, e, l.since(d.at), d.segment.conn, d.segment.lastHeard)
		default:
			l.judgeLastLocked(d, number)
		}
	}
}

// judgeLastLocked looks for an end that excuses the loss of the last that was said on a way.
func (l *ledger) judgeLastLocked(d *down, number uint32) {
	s, e := d.segment, d.segment.epoch
	excused := func(at time.Time) bool {
		return !at.IsZero() && at.Sub(d.at) < inFlight && d.at.Sub(at) < forgottenWithin
	}
	switch {
	case excused(e.touched), excused(e.ended):
		l.counts["lost down, with an agent's connection"]++
	case s.index+1 < len(e.segments) && excused(e.segments[s.index+1].asked), excused(s.conn.ended):
		l.counts["lost down, with a link"]++
	default:
		l.findLocked("lost", e, d.at, "down %d for %s, said at %s on %s: nothing has ended there", number, e, l.since(d.at), s.conn)
	}
}

// hadCloneLocked reports whether the agent had a clone when something was on its way to it.
func (m *member) hadCloneLocked(at time.Time) bool {
	for _, e := range m.clones {
		if at.After(e.opened.Add(-inFlight/4)) && (e.ended.IsZero() || at.Before(e.ended.Add(inFlight/4))) {
			return true
		}
	}
	return false
}
