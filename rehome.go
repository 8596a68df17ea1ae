package opampgateway

import (
	"context"
	"errors"
	"math/rand/v2"
	"net/http"
	"time"

	"go.uber.org/zap"

	"github.com/opampgateway/opampgateway/internal/ending"
	"github.com/opampgateway/opampgateway/internal/monotonic"
	"github.com/opampgateway/opampgateway/internal/outbox"
	"github.com/opampgateway/opampgateway/internal/questions"
)

const (
	// answerTimeout is how long an introduction waits for its answer before it is tried again.
	answerTimeout = 20 * time.Second

	// introduceAgain is how long an agent that the server would not take just now waits, if
	// the server does not say.
	introduceAgain = 5 * time.Second
)

var (
	errNotNow  = errors.New("server cannot take the agent just now")
	errRefused = errors.New("server refused the agent")
)

// rehome brings a, which has lost the link from, to a new one, while a's reader waits:
//
//  1. It attaches a to a link, for which it waits as long as the grace period.
//  2. It introduces a to the server, which may refuse it for good, or just now.
//  3. It sends what a had said and was not written, in order.
//  4. It lets a's reader go on, and asks the agent for its full state, for what the lost link
//     may have taken with it; once more later, if the server may forget it when it notices the end of the
//     lost link.
func (p *upstreamPool) rehome(a *agentConn, from *link) {
	grace := p.cfg.Load().Server.GracePeriod
	// Those who wait in vain do not all leave at once.
	ctx, cancel := context.WithTimeout(p.ctx, grace+rand.N(grace/2+1))
	defer cancel()
	before := from.target
	pending, late, lost := from.unwritten[a], from.late, time.Now()
	p.countIn(pending)
	defer func() {
		p.countOut(pending)
		p.lose(pending)
	}()
	for {
		l, err := p.attach(ctx, a, from, lost)
		if errors.Is(err, errAgentEnded) {
			return
		}
		if err != nil {
			p.giveUpOn(a, ending.GraceOver)
			return
		}
		delay, err := p.introduce(ctx, a, l)
		switch {
		case errors.Is(err, questions.ErrEnded):
			<-l.ended // it is about to be
			late = late || l.late
			from, lost = l, time.Now()
			continue
		case errors.Is(err, errRefused):
			p.giveUpOn(a, ending.Refused)
			return
		case err != nil:
			_ = sleep(ctx, delay)
			continue
		}
		for len(pending) > 0 && p.resend(ctx, l, &pending[0]) {
			p.countOut(pending[:1])
			pending = pending[1:]
		}
		if len(pending) == 0 && p.settle(a, l) {
			if l.posts == nil || l.target != before { // otherwise nothing is lost, and nobody has seen it
				a.askFullState()
			}
			if late {
				a.fullState.Store(monotonic.Now() + int64(fullStateAgain+rand.N(fullStateAgain/2)))
			}
			return
		}
		if p.leftWhileHoming(a, l) {
			return
		}
		select { // so l has ended, or a's time is over
		case <-l.ended:
			p.countIn(l.unwritten[a])
			pending = append(l.unwritten[a], pending...) // what l did not write comes first
			late = late || l.late
			from, lost = l, time.Now()
		case <-ctx.Done():
		}
	}
}

// resend has what a lost link has not written wait on l, and reports whether there is no more to do for it:
// what is not to be sent any more is turned down.
func (p *upstreamPool) resend(ctx context.Context, l *link, e *entry) bool {
	a := e.Sender.agent
	if err := p.judge(e); err != nil {
		p.turnDown(e.Sender, reasonOf(err), err)
		p.memory.Recycle(e.Frame)
		return true
	}
	return l.Outbox.Put(ctx, *e, &a.line, a.weight()) == nil
}

// countIn counts the memory of entries that are in no outbox, until countOut.
func (p *upstreamPool) countIn(entries []entry) {
	for i := range entries {
		p.memory.Up.Take(entries[i].Memory())
	}
}

func (p *upstreamPool) countOut(entries []entry) {
	for i := range entries {
		p.memory.Up.Give(entries[i].Memory())
	}
}

// leftWhileHoming reports whether a's connection has ended by itself. The server has been told
// of the agent on l, and is now told of its end.
func (p *upstreamPool) leftWhileHoming(a *agentConn, l *link) bool {
	p.mu.Lock()
	hasLeft, gone := a.ending.Ended(), a.gone
	if hasLeft {
		p.detachLocked(a)
	}
	var lost []entry
	if p.live[l.slot] != l { // otherwise what l still has will be written, or counted when it ends
		lost = l.unwritten[a]
	}
	p.mu.Unlock()
	if hasLeft {
		p.lose(lost)
		p.sayGoodbye(l, gone)
	}
	return hasLeft
}

// introduce tells the server about an agent that came from a lost link. An error other than
// questions.ErrEnded and errRefused comes with how long to wait before the next try.
func (p *upstreamPool) introduce(ctx context.Context, a *agentConn, l *link) (delay time.Duration, err error) {
	if a.question == nil || l.posts != nil {
		return 0, nil
	}
	result, err := l.decide(ctx, a, questions.ClassIntroduction, answerTimeout)
	_, noVerdict := errors.AsType[*noVerdictError](err)
	switch status := result.RefusalStatus(); {
	case errors.Is(err, questions.ErrCannotAsk), errors.Is(err, questions.ErrFull), noVerdict:
		return introduceAgain, err
	case err != nil:
		return 0, err
	case result.Accept:
		a.decided = l.target
		return 0, nil
	case status == http.StatusTooManyRequests || status == http.StatusServiceUnavailable:
		return max(introduceAgain, parseRetryAfter(result.Headers["Retry-After"])), errNotNow
	default:
		return 0, errRefused
	}
}

// giveUpOn closes an agent that has no home, unless its connection has ended anyway.
func (p *upstreamPool) giveUpOn(a *agentConn, cause *ending.Cause) {
	if p.ctx.Err() != nil {
		return
	}
	a.dismiss(cause)
	p.mu.Lock()
	defer p.mu.Unlock()
	p.exileLocked(a)
}

// sayGoodbye tells the server on l that agents have left, unless they turn up again first. Those
// behind a gateway most likely come back by another way, and are given time for that.
func (p *upstreamPool) sayGoodbye(l *link, gone []*claim) {
	if len(gone) == 0 || !p.cfg.Load().Agents.SendDisconnect {
		return
	}
	if !gone[0].agent.gateway {
		p.sayGoodbyeNow(l, &gone[0].agent.line, gone) // behind what it said
		return
	}
	if p.cfg.Load().Agents.SendDisconnectForGateways {
		p.homing.Go(func() {
			if sleep(p.ctx, p.cfg.Load().Server.GracePeriod) == nil {
				p.sayGoodbyeNow(p.anyLink(), &outbox.Line[*claim]{}, gone)
			}
		})
	}
}

// sayGoodbyeNow has the goodbyes wait on l, in line.
func (p *upstreamPool) sayGoodbyeNow(l *link, line *outbox.Line[*claim], gone []*claim) {
	if l == nil {
		return // the links' end has said it
	}
	for _, c := range gone {
		uid := c.route.uid
		back := func() bool { return p.router.has(uid) }
		p.router.noteFarewell(uid)
		e := entry{Frame: c.format.Goodbye(uid, c.sequence+1), Kind: outbox.Message, Sender: c, Stale: back}
		if p.judge(&e) != nil {
			continue // the server has had enough of it
		}
		if l.Outbox.Put(p.ctx, e, line, c.agent.weight()) != nil {
			return // the link's end says it
		}
	}
	p.log.Debug("said goodbye for agents that left", zap.Int("agents", len(gone)))
}
