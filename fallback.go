package opampgateway

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"sync/atomic"
	"time"

	"github.com/gorilla/websocket"
	"go.uber.org/zap"

	"github.com/opampgateway/opampgateway/internal/peer"
	"github.com/opampgateway/opampgateway/internal/questions"
	"github.com/opampgateway/opampgateway/internal/socket"
)

// A server may have several endpoints: server::endpoint, the first, and those of server::fallback_endpoints. All links
// are at the same one. When there is none for a while they go to the next, at once; when the first answers again for
// a while they go back to it, one after the other. Each endpoint has a target of its own, all of which share
// what was configured, and what is known of each endpoint.

const (
	// maxFallbacks bounds server::fallback_endpoints: with more than that, agents' grace period is over before the
	// last was tried.
	maxFallbacks = 8

	// outageTime is how long there may be no link before the next endpoint is tried, and outageSteady how long one has
	// to live to end an outage: a load balancer whose servers are gone takes links, and ends them.
	outageTime, outageSteady = 10 * time.Second, 5 * time.Second

	// provenTime is how long the first endpoint has to answer before links go back to it.
	provenTime = time.Minute

	// returnTime is how long a link may take to come up on the way back; otherwise all stay where they were. returnPause is
	// between two, for the agents of one to be introduced.
	returnTime, returnPause = 10 * time.Second, 2 * time.Second

	// proveAgain is how often a server over plain HTTP is asked meanwhile whether it is there.
	proveAgain = 5 * time.Second

	// elsewhereText is why a link ends whose slot goes to another endpoint.
	elsewhereText = "gateway goes to another endpoint"
)

// site is one endpoint of a server, and what is known of it.
type site struct {
	// Set once.
	endpoint *url.URL
	asking   *questions.Server

	verified atomic.Bool // see target.verified
	logged   []string    // by slot: why it could not be dialed, as was logged last; each is the slot's own
}

// sitesOf returns the endpoints that are configured, the first one first.
func sitesOf(cfg *ServerConfig) ([]*site, error) {
	var sites []*site
	for i, text := range append([]string{cfg.Endpoint}, cfg.FallbackEndpoints...) {
		endpoint, err := url.Parse(text)
		switch {
		case err != nil && i == 0:
			return nil, errors.New("server::endpoint: is not a URL") // Validate says more
		case err != nil:
			return nil, fmt.Errorf("server::fallback_endpoints[%d]: is not a URL", i-1)
		}
		sites = append(sites, &site{endpoint: endpoint, asking: questions.NewServer(), logged: make([]string, cfg.Connections)})
	}
	return sites, nil
}

// to returns a target of the same configuration at another of its endpoints.
func (t *target) to(at int) *target {
	other := *t
	other.at, other.endpoint, other.asking = at, t.sites[at].endpoint, t.sites[at].asking
	other.verified, other.dialing, other.leave = &t.sites[at].verified, nil, nil
	return &other
}

// startingFrom returns t, a target of a new configuration, at the endpoint where the links are with the configuration
// before: what is known of the others is no less true after a reload. With another first endpoint, it is tried.
func (t *target) startingFrom(before *target) *target {
	if t.endpoint.String() != before.sites[0].endpoint.String() {
		return t
	}
	for at, s := range t.sites {
		if s.endpoint.String() == before.endpoint.String() {
			return t.to(at)
		}
	}
	return t
}

// at returns at which of the server's endpoints the links are.
func (p *upstreamPool) at() int {
	if t := p.target.Load(); t != nil {
		return t.at
	}
	return 0 // it is being started
}

// follow has the links go to another endpoint of the server when there is a reason, until dialing ends.
func (p *upstreamPool) follow() {
	tried := 0 // endpoints where no link has lived since one has
	for p.dialing.Err() == nil {
		t := p.target.Load()
		if len(t.sites) == 1 {
			<-t.dialing.Done()
			continue
		}
		w := p.watch(t)
		if w.lived {
			tried = 0
		}
		switch {
		case t.dialing.Err() != nil: // a reload, or the end
		case w.proven:
			p.goBack(t)
		default:
			next := t.to((t.at + 1) % len(t.sites))
			if w.near {
				next = t.to(0)
			}
			if !p.replace(t, next, func(*link) bool { return true }) {
				continue
			}
			say := p.log.Warn
			if tried++; tried > len(t.sites) { // nothing new: none can be reached
				say = p.log.Debug
			}
			say("the server cannot be reached; going to another of its endpoints", zap.String("from", socket.Place(t.endpoint)))
		}
	}
}

// watched is what has become of a target: there was no link for too long, unless it is proven that the first endpoint
// answers again.
type watched struct {
	lived  bool // a link has, for a while
	near   bool // the first endpoint answers, if not for long enough yet
	proven bool
}

// watch waits until there is a reason to leave t, or t is no longer the target.
func (p *upstreamPool) watch(t *target) (w watched) {
	ctx, cancel := context.WithCancel(t.dialing)
	var near atomic.Bool
	proven, done := make(chan struct{}), make(chan struct{})
	if t.at == 0 {
		close(done)
	} else {
		p.slots.Go(func() {
			defer close(done)
			if p.prove(ctx, t.to(0), &near) {
				close(proven)
			}
		})
	}
	w.proven, w.lived = p.awaitOutage(ctx, proven)
	w.near = near.Load()
	cancel()
	<-done
	return w
}

// awaitOutage waits until there was no link for too long, or the first endpoint is proven. It reports as well whether a
// link has lived meanwhile. A link that ends at once does not end an outage.
func (p *upstreamPool) awaitOutage(ctx context.Context, proven <-chan struct{}) (isProven, lived bool) {
	begun := time.Now()
	for {
		p.mu.Lock()
		count, since, changed := p.count, p.since, p.changed
		p.mu.Unlock()
		wait := time.Until(begun.Add(outageTime))
		if count > 0 {
			wait = time.Until(since.Add(outageSteady))
		} else if wait <= 0 {
			return false, lived
		}
		var look <-chan time.Time
		if wait > 0 {
			look = time.After(wait)
		} else {
			lived = true
		}
		select {
		case <-look:
		case <-changed:
			if lived && wait <= 0 { // the next outage begins when this link ends
				begun = time.Now()
			}
		case <-proven:
			return true, lived
		case <-ctx.Done():
			return false, lived
		}
	}
}

// prove holds a connection to the first endpoint, of which t is a target that is nobody's, until it has lived for
// long enough; near says whether there is one. It reports false when ctx ends first. Nothing is said on it but pings.
func (p *upstreamPool) prove(ctx context.Context, t *target, near *atomic.Bool) bool {
	t.dialing = ctx
	delays := newDelays(p.cfg.Load().Server.Retry)
	for {
		l, retryAfter, err := p.dial(t, t.slots)
		if err == nil {
			near.Store(true)
			if l.posts != nil {
				err = p.holdPosts(ctx, l)
			} else {
				err = p.hold(ctx, l)
			}
			near.Store(false)
			if err == nil {
				return true
			}
		}
		p.log.Debug("the first endpoint does not answer yet", zap.Error(err))
		if sleep(ctx, max(delays.NextBackOff(), retryAfter)) != nil {
			return false
		}
	}
}

// hold keeps a link that is in no slot until it is proven, and ends it. An error says why it is not.
func (p *upstreamPool) hold(ctx context.Context, l *link) error {
	ctx, cancel := context.WithTimeout(ctx, provenTime)
	defer cancel()
	swept := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		if errors.Is(ctx.Err(), context.DeadlineExceeded) {
			l.Outbox.Close(websocket.FormatCloseMessage(websocket.CloseGoingAway, "links follow"))
			return
		}
		l.Socket.Close()
	})
	p.slots.Go(func() {
		defer close(swept)
		keepAlive := func() KeepAliveConfig { return p.cfg.Load().Server.KeepAlive }
		sweep(ctx, keepAlive, linkSweepInterval, func(limits peer.Limits) {
			switch l.Sweep(limits) {
			case peer.Silent:
				l.Socket.Close()
			case peer.Quiet:
				l.Outbox.Ping()
			case peer.Alive:
			}
		})
	})
	err := l.readOver()
	ended := ctx.Err()
	stop()
	cancel()
	<-swept
	l.Outbox.Abort()
	if errors.Is(ended, context.DeadlineExceeded) {
		return nil
	}
	return err
}

// holdPosts is hold for a server over plain HTTP, which has no connection to hold: it is asked again and again whether it is
// there.
func (p *upstreamPool) holdPosts(ctx context.Context, l *link) (err error) {
	t := l.target
	for begun := time.Now(); ; {
		l.abandon()
		if time.Since(begun) >= provenTime {
			return nil
		}
		if err := sleep(ctx, proveAgain); err != nil {
			return err
		}
		if l, _, err = p.dial(t, t.slots); err != nil {
			return err
		}
	}
}

// readOver reads what comes on a link of nobody's, until it ends.
func (l *link) readOver() error {
	for {
		frame, err := l.Socket.Read()
		switch {
		case err == nil:
			l.Socket.Drop(frame)
		case !socket.Skippable(err):
			l.Answer(l.pool.ctx, err)
			return err
		}
	}
}

// goBack has the links go from a fallback to the first endpoint, one after the other. If it does not take one, all
// stay where they were, or go there again.
func (p *upstreamPool) goBack(from *target) {
	t := from.to(0)
	if !p.replace(from, t, func(*link) bool { return false }) {
		return
	}
	p.log.Info("the first endpoint answers again; links go back to it, one after the other", zap.String("from", socket.Place(from.endpoint)))
	for slot := range t.slots {
		p.leave(slot, t)
		if p.settled(t, slot) {
			continue
		}
		if p.replace(t, t.to(from.at), func(l *link) bool { return l.target.at != from.at }) {
			p.log.Warn("the first endpoint does not take all links; staying at another one")
		}
		return
	}
	p.tellAgain(true)
}

// leave has the link of a slot end, unless it is to t already.
func (p *upstreamPool) leave(slot int, t *target) {
	p.mu.Lock()
	l := p.live[slot]
	leaves := l != nil && l.target != t && p.leaveLocked(l)
	p.mu.Unlock()
	if leaves {
		l.Outbox.Close(websocket.FormatCloseMessage(websocket.CloseGoingAway, elsewhereText))
	}
}

// settled waits until the slot has a link to t that has lived for a moment; it reports false if that takes too long.
func (p *upstreamPool) settled(t *target, slot int) bool {
	ctx, cancel := context.WithTimeout(t.dialing, returnTime)
	defer cancel()
	for ctx.Err() == nil {
		p.mu.Lock()
		l, changed := p.live[slot], p.changed
		p.mu.Unlock()
		var steady <-chan time.Time
		var ended <-chan struct{}
		if l != nil && l.target == t {
			steady, ended, changed = time.After(returnPause), l.ended, nil
		}
		select {
		case <-steady:
			return true
		case <-ended:
		case <-changed:
		case <-ctx.Done():
		}
	}
	return false
}
