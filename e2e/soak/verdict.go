package main

import (
	"fmt"
	"slices"
	"syscall"
	"time"

	"github.com/opampgateway/opampgateway/e2e/fault"
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

// unread is how long what a gateway has written may wait until the line reads it, or what the line
// has passed on until its target does: a line holds a link for that long at most.
const unread = 3 * time.Second

// settling is how long an agent that the server was asked about anew is on its way to that link.
const settling = 2 * time.Second

// denied is how soon an agent has been told that its message is turned down: the gateway first asks
// whoever has its UID for a sign of life. It does so every 30 s, so that an agent may be turned down for
// deniedAfter the other has ended, if the news of that was lost.
const denied, deniedAfter = 10 * time.Second, 40 * time.Second

// judge goes through the book at the end of the run, when nothing is on its way any more.
//
// The lines see what a gateway writes, and know how each link ended. So what an agent said and the
// server has not heard was written to a link, or it was not:
//
//   - What was written may be lost when that link was lost, with all that was written there behind
//     it, or when its gateway was killed.
//   - What was not written may be lost in the last moment before a link was cut; only then nobody
//     knows what a gateway had written there. Otherwise the gateway had it and has to write it to
//     another link, as long as the agent stays.
//   - What was turned down, as the agent was told, was not written by the gateway that did so.
//   - A poison is lost.
//   - What an agent has said by a poll, which was answered, has no connection to end with: when its gateway was
//     ended, the last before that may be lost.
//   - When the agent's own connection ended other than by a goodbye, or its gateway was ended, the
//     last of that connection may be lost.
//
// A server's message may be lost when it was among the last that were said to the agent on that
// way, before a link or the agent's connection ended; nothing may be lost between two that went
// the same way.
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
	for _, f := range l.floods {
		l.judgeFloodLocked(f, end)
	}
	for _, p := range l.poisons {
		l.judgePoisonLocked(p, end)
	}
}

// judgeUpLocked looks for what a connection's agent said and the server has not heard.
func (l *ledger) judgeUpLocked(e *epoch) {
	last := len(e.ups) // from here on no gateway has written anything
	for last > 0 && e.ups[last-1].heard == nil && e.ups[last-1].written[0] == nil {
		last--
	}
	tails := e.tailsLocked()
	denials := e.denials
	wrong, from := "", 0
	for i := range e.ups {
		is := ""
		if e.ups[i].heard == nil {
			var excuse string
			excuse, is = l.whyLostLocked(e, i, last, tails)
			switch {
			case e.ups[i].poison != nil:
				excuse, is = "a poison", ""
			case is != "":
				if of := e.ups[i].wasTurnedDown(&denials, e.hops()-1); of != "" {
					excuse, is = "turned down, of an agent "+of, ""
				}
			}
			if is == "" {
				l.counts["lost up, "+excuse]++
				l.excused = append(l.excused, excusedLoss{e, i, excuse})
			}
		}
		if is != wrong {
			l.lostUpLocked(e, from, i, wrong)
			wrong, from = is, i
		}
	}
	l.lostUpLocked(e, from, len(e.ups), wrong)
}

// wasTurnedDown reports of what agent u is, if it may be what one of the denials was about, which come in the
// order of what was said; that is then used up. The gateway of the last hop may deny what another has written.
func (u *up) wasTurnedDown(denials *[]denial, last int) (of string) {
	for len(*denials) > 0 {
		told := (*denials)[0]
		by := 0
		if told.poison {
			by = last
		}
		switch {
		case told.at.Before(u.said): // it was about what was lost in any case
			*denials = (*denials)[1:]
		case told.at.Sub(u.said) >= denied || u.written[by] != nil:
			return ""
		default:
			*denials = (*denials)[1:]
			if told.poison {
				return "with a poison"
			}
			return "or its clone"
		}
	}
	return ""
}

// tail is which of an agent's messages, by index, was the last that was written to a link, and the last of
// those that have arrived from there; -1 for none.
type tail struct{ written, heard int }

// tailsLocked returns the tail of each link to which a message of e was written last.
func (e *epoch) tailsLocked() map[*way]tail {
	tails := map[*way]tail{}
	for i := range e.ups {
		u := &e.ups[i]
		for hop, w := range u.written {
			if w == nil {
				continue
			}
			of, some := tails[w]
			if !some {
				of.heard = -1
			}
			of.written = i
			if u.heard != nil && (hop < e.hops()-1 && u.ways[hop] == 1 || u.heard.conn.way == w) {
				of.heard = i
			}
			tails[w] = of
		}
	}
	return tails
}

func (l *ledger) lostUpLocked(e *epoch, from, to int, wrong string) {
	if wrong != "" {
		l.findLocked("lost", e, e.ups[from].said, "up %d to %d of %s, said at %s to %s: %s",
			from+1, to, e, l.since(e.ups[from].said), l.since(e.ups[to-1].said), wrong)
	}
}

// whyLostLocked looks for why message i of e is lost; if nothing excuses it, it says what is wrong.
// From last on no gateway has written anything.
func (l *ledger) whyLostLocked(e *epoch, i, last int, tails map[*way]tail) (excuse, wrong string) {
	said := &e.ups[i]
	for hop := e.hops() - 1; hop >= 0; hop-- {
		if said.written[hop] != nil {
			return l.whyLostOnLocked(e, i, hop, tails)
		}
	}
	if l.wasCutOffLocked(e, i, tails) {
		return "in the last moment before a link was cut", ""
	}
	if e.actor.member.polls {
		if excuse := l.whyPollLostLocked(e, said.said); excuse != "" {
			return excuse, ""
		}
	}
	if i < last {
		return "", "its gateway has not written it to any link, but what the agent said later"
	}
	return l.whyLastLocked(e, said.said, said.flood != nil)
}

// whyLostOnLocked is whyLostLocked for what was written, and by which gateway last.
func (l *ledger) whyLostOnLocked(e *epoch, i, hop int, tails map[*way]tail) (excuse, wrong string) {
	said := &e.ups[i]
	w, top := said.written[hop], hop == e.hops()-1
	if later := tails[w].heard; later > i {
		return "", fmt.Sprintf("it was written on %s, and %d, which was written there later, has arrived", w, later+1)
	}
	end := w.conn.End()
	at := said.writtenAt[hop]
	late := at.Add(unread + l.pulse.missed(at, end.At))
	if !top { // a gateway reads no further while its own link takes nothing
		late = late.Add(troubled)
	}
	switch {
	case w.lost() && end.At.After(late):
		return "", fmt.Sprintf("it was written on %s at %s, long before that was lost: %s", w, l.since(at), w.ended(l))
	case w.lost() && w.hit != "":
		return "with a link that " + w.hit, ""
	case w.lost() && top:
		return "with a link that ended with the server", ""
	case w.gateway.wasKilled(end.At):
		return "with a gateway that was killed", ""
	case !top && w.gateway.above.wasUpset(at.Add(-troubled-l.pulse.missed(at, end.At)), late):
		return "with a link of the gateway above, or its end", ""
	}
	return "", fmt.Sprintf("it was written on %s at %s, and no fault explains that: %s", w, l.since(at), w.ended(l))
}

// wasCutOffLocked reports whether message i of e, which the line has not seen, may have been
// written to a link just before that was cut.
func (l *ledger) wasCutOffLocked(e *epoch, i int, tails map[*way]tail) bool {
	said := e.ups[i].said
	for n, asked := range e.askings[0] {
		cut := asked.way.conn.End().Cut
		moved := n+1 < len(e.askings[0]) && e.askings[0][n+1].at.Before(said)
		if cut.IsZero() || moved || !asked.way.lost() || said.After(cut) {
			continue
		}
		from := said
		if asked.at.After(from) { // it was not written before
			from = asked.at
		}
		late := from.Add(unread + l.pulse.missed(from, cut))
		if e.gateway.above != nil { // which reads no further while its own link takes nothing
			late = late.Add(troubled)
		}
		if cut.After(late) {
			continue
		}
		if last, some := tails[asked.way]; !some || last.written <= i {
			return true
		}
	}
	return false
}

// whyLastLocked looks for why the last that an agent said, from said on, was never written. Much of a flood waits
// in the agent's own connection, and ends with it.
func (l *ledger) whyLastLocked(e *epoch, said time.Time, flood bool) (excuse, wrong string) {
	if e.ended.IsZero() {
		return "", "its gateway has not written it to any link, and the agent is still connected"
	}
	ended, why := e.ended, "with an agent's connection"
	gateway := e.gateway.wasDisturbed(e.ended, inFlight)
	late := l.pulse.missed(said, e.ended)
	switch {
	case !e.touched.IsZero():
		ended = e.touched
	case e.byItself && !e.polite:
	case gateway != nil && gateway.signal == syscall.SIGKILL:
		why = "with a gateway that was killed"
	case gateway != nil && said.After(gateway.at.Add(lastWords-late)):
		why = "said long after a gateway that was reloaded had closed the connection"
	case gateway != nil && e.wasHomelessLocked(gateway.at, settling+late):
		why = "with a gateway that was reloaded when the agent had no link"
	case gateway != nil && flood:
		why = "with a gateway that was reloaded, of a flood"
	case e.polite && e.linkLostLocked(gateway, said.Add(-troubled), e.ended.Add(troubled+late)):
		why = "with a link, last words before a goodbye"
	case e.slow:
		why = "with an agent that was too slow"
	default:
		return "", "its gateway has not written it to any link, and nothing has happened to the agent's connection, which ended so: " + e.end
	}
	bound := inFlight
	if e.gateway.above != nil { // it may go from one broken way to the next, as long as it is not let go
		bound += gracePeriod * 3 / 2
	}
	if ended.Sub(said) > bound {
		return "", "its gateway has not written it to any link, and the end came only at " + l.since(ended)
	}
	return why, ""
}

// whyPollLostLocked looks for why what was said by a poll was never written: its gateway was ended soon after. "" is
// for no reason.
func (l *ledger) whyPollLostLocked(e *epoch, said time.Time) string {
	ended := e.gateway.firstDisturbed(said, inFlight)
	switch {
	case ended == nil:
	case ended.signal == syscall.SIGKILL:
		return "with a gateway that was killed, of a poll"
	case e.wasHomelessLocked(ended.at, settling+l.pulse.missed(said, ended.at)):
		return "with a gateway that was reloaded when the agent, which polls, had no link"
	}
	return ""
}

// wasHomelessLocked reports whether the agent had no link when its gateway was reloaded: the last was
// lost, or closed by the gateway above, or the agent was on its way to it.
func (e *epoch) wasHomelessLocked(reloaded time.Time, within time.Duration) bool {
	n := len(e.askings[0])
	if n == 0 {
		return true
	}
	last := e.askings[0][n-1]
	end := last.way.conn.End()
	return last.way.lost() || end.By != fault.Nobody && end.At.Before(reloaded) ||
		n > 1 && last.at.After(reloaded.Add(-within))
}

// linkLostLocked reports whether a link of the agent's was lost in this time, or closed by the gateway
// above; not by its own, when that was disturbed.
func (e *epoch) linkLostLocked(disturbed *disturbance, from, to time.Time) bool {
	return slices.ContainsFunc(e.askings[0], func(asked asking) bool {
		end := asked.way.conn.End()
		return (asked.way.lost() || end.By != fault.Nobody && disturbed == nil) && end.At.After(from) && end.At.Before(to)
	})
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
		for _, at := range append(e.wayEndsLocked(s.asked), e.touched, e.ended, s.conn.ended, e.absentLocked(s.asked)) {
			if !at.IsZero() && at.Before(until) {
				until = at
			}
		}
		if l.poisonOfLocked(e.actor.member, s.asked, until) != nil {
			continue // which is its state
		}
		if s.described.IsZero() && until.Sub(s.asked) > stateWithin+l.pulse.missed(s.asked, until) {
			l.findLocked("full state missing", e, s.asked, "of %s on %s, since the server was asked about it at %s (for the %d. time) until %s",
				e, s.conn, l.since(s.asked), i+1, l.since(until))
		}
	}
}

// absentLocked returns when an agent began not to poll that had not yet begun again at at; zero for never.
func (e *epoch) absentLocked(at time.Time) time.Time {
	for _, a := range e.absences {
		if a.to.After(at) {
			return laterOf(a.from, at)
		}
	}
	return time.Time{}
}

// wayEndsLocked returns when each link ended on which e was when the server was asked about it at that
// time; zero for one that has not.
func (e *epoch) wayEndsLocked(at time.Time) (ends []time.Time) {
	for hop := range e.hops() {
		var last *way
		for _, asked := range e.askings[hop] {
			if asked.at.Before(at) {
				last = asked.way
			}
		}
		if last != nil {
			ends = append(ends, last.conn.End().At)
		}
	}
	return ends
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
		case d.early: // servers learn where an agent is from what it says
			l.counts["lost down, to an agent behind two gateways that had not spoken there yet"]++
		case e.pollFailedLocked(d.at): // the answer to it was this, perhaps
			l.counts["lost down, with a poll that had no answer"]++
		case number < d.segment.lastHeard:
			l.findLocked("lost", e, d.at, "down %d for %s, said at %s on %s: %d was heard on the same way", number, e, l.since(d.at), d.segment.conn, d.segment.lastHeard)
		default:
			l.judgeLastLocked(d, number)
		}
	}
}

// pollFailedLocked reports whether the agent had no answer to a poll soon after at.
func (e *epoch) pollFailedLocked(at time.Time) bool {
	return slices.ContainsFunc(e.failures, func(failed time.Time) bool { return failed.After(at) && failed.Sub(at) < inFlight })
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
