package opampgateway

import (
	"errors"
	"fmt"
	"io"
	"math"
	"time"

	"go.uber.org/zap"

	"github.com/opampgateway/opampgateway/internal/monotonic"
	"github.com/opampgateway/opampgateway/internal/outbox"
	"github.com/opampgateway/opampgateway/internal/peer"
	"github.com/opampgateway/opampgateway/internal/status"
	"github.com/opampgateway/opampgateway/internal/suspicion"
	"github.com/opampgateway/opampgateway/internal/telemetry"
)

const (
	// gatewayWeight is how many turns the connection of a gateway has on a link at most, however many agents it
	// speaks for.
	gatewayWeight = 16

	// An agent floods when its reader has had to wait for room on its link so many times, with no longer than floodGap in
	// between, for floodTime. It is named after floodNamed. Who waits for floodStuck waits for a link that is stuck.
	floodWaits, floodGap, floodTime, floodNamed, floodStuck = 8, time.Second, time.Second, 10 * time.Second, 5 * time.Second
)

var (
	errSuspect     = errors.New("the server has ended connections because of this agent's messages; none is relayed for a while")
	errServerLimit = errors.New("message is too large for the server, which has ended a connection because of one no larger")
)

// judge decides whether a message of an agent may go to the server, or only on trial. An error is errSuspect or
// errServerLimit.
func (p *upstreamPool) judge(e *entry) error {
	switch p.suspicion.Judge(e.Sender.says(len(e.Frame))) {
	case suspicion.Named:
		return errSuspect
	case suspicion.TooLarge:
		return errServerLimit
	case suspicion.Try:
		e.Trial, e.Alone = true, false
	case suspicion.TryAlone:
		e.Trial, e.Alone = true, true
	case suspicion.Pass:
		e.Trial, e.Alone = false, false
	}
	return nil
}

// reasonOf returns the reason of an error of judge.
func reasonOf(err error) telemetry.Reason {
	if errors.Is(err, errServerLimit) {
		return telemetry.ReasonServerLimit
	}
	return telemetry.ReasonAgentTurnedDown
}

// turnDown counts a message that is not relayed, and tells its agent why.
func (p *upstreamPool) turnDown(c *claim, reason telemetry.Reason, err error) {
	c.agent.blame(reason)
	c.agent.sendOwn(c.format.BadRequest(c.route.uid.Bytes(), "opampgateway: "+err.Error()))
}

// says returns what suspicion is to know of a message. Whatever UIDs an agent uses on one connection, it is the same agent;
// those behind a gateway are known by theirs alone.
func (c *claim) says(size int) suspicion.Message {
	switch {
	case c == nil:
		return suspicion.Message{Size: size, Came: suspicion.Always}
	case c.agent.gateway:
		return suspicion.Message{UID: c.route.uid, Size: size, Came: suspicion.Always}
	default:
		m := c.agent.says()
		m.Size = size
		return m
	}
}

// says returns who it is that says something, of an agent that is no gateway.
func (a *agentConn) says() suspicion.Message { return suspicion.Message{UID: a.first, Came: a.came} }

// allSay is says for several.
func allSay(sent []outbox.Sent[*claim]) []suspicion.Message {
	said := make([]suspicion.Message, len(sent))
	for i, s := range sent {
		said[i] = s.Sender.says(s.Size)
	}
	return said
}

// findCulprit finds out whether the server has ended l because of a message. If so, its agent is told, and named.
// It reports whether the server was just at a message on trial.
func (p *upstreamPool) findCulprit(l *link, err error) bool {
	if l.givenUp.Load() || p.dialing.Err() != nil {
		return false
	}
	sent, caught, before := l.Outbox.Unacknowledged()
	culprit, turnedDown := p.suspicion.Ended(suspicion.End{
		Code: peer.CloseCode(err), Unacknowledged: allSay(sent), Caught: caught, Before: allSay(before),
	})
	if turnedDown == 0 {
		return caught
	}
	c := sent[0].Sender
	p.names.Warn("server ends the connection when it reads a message of this agent, so the message is dropped, and what the agent says is turned down for a while",
		c.agent.logged(zap.Stringer("agent", c.route.uid), zap.Int("bytes", culprit.Size), zap.Duration("for", turnedDown),
			zap.String("link", p.linkName(l.slot)), zap.NamedError("server_said", err))...)
	p.seen.offends(c.agent, c.route.uid, status.Offender{
		Kind: status.OffenceEndsLinks,
		Text: fmt.Sprintf("the server ends the link when it reads a message of this agent (%d bytes); what it says is turned down for %s", culprit.Size, inWords(turnedDown)),
	})
	p.turnDown(c, telemetry.ReasonServerEndsLink, errSuspect)
	return true
}

// release asks those for their full state that are turned down no longer, and may have been by mistake.
func (p *upstreamPool) release() {
	for _, uid := range p.suspicion.Sweep() {
		if c := p.router.find(uid.Bytes()); c != nil {
			c.agent.sendOwn(c.format.ReportFullState(uid))
		}
	}
}

// endsLate reports whether the server may not have noticed yet that a link has ended with err.
func endsLate(err error) bool {
	return peer.CloseCode(err) == 0 && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF)
}

// weight is how many turns the connection has on its link: one, or as many as there are agents behind it.
func (a *agentConn) weight() int {
	if !a.gateway {
		return 1
	}
	return max(1, min(gatewayWeight, int(a.many.Load())))
}

// flood is what an agent costs itself that says more than its link takes.
type flood struct {
	since, last int64 // the first wait, and the end of the last, of the monotonic clock
	waits       int
	waited      time.Duration
	counted     bool
	named       bool // also of an earlier flood
}

// noteWait notes that the reader had to wait for room on its link since began. Others do not, so that is
// worth no more than to be known.
func (a *agentConn) noteWait(began int64) {
	f, now := a.flood, monotonic.Now()
	switch {
	case now-began > int64(floodStuck):
		if f != nil {
			f.last = math.MinInt64 / 2 // another spell begins
		}
		return
	case f == nil:
		f = &flood{since: began}
		a.flood = f
	case began-f.last > int64(floodGap):
		*f = flood{since: began, named: f.named}
	}
	f.last = now
	f.waits++
	f.waited += time.Duration(now - began)
	lasts := time.Duration(now - f.since)
	if f.waits < floodWaits || lasts < floodTime {
		return
	}
	if !f.counted {
		f.counted = true
		a.blame(telemetry.ReasonAgentFloods)
		a.server.pool.seen.offends(a, a.uid, status.Offender{
			Kind: status.OffenceFloods,
			Text: "says more than the server takes; it is read no faster than that, and nobody else slower",
		})
	}
	if !f.named && lasts >= floodNamed {
		f.named = true
		a.server.names.Warn("agent says more than the server takes; it is read no faster than that, and nobody else slower",
			a.logged(zap.Stringer("agent", a.uid), zap.Duration("for", lasts), zap.Duration("waited", f.waited))...)
	}
}
