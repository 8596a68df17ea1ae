package opampgateway

import (
	"context"
	"slices"

	"github.com/opampgateway/opampgateway/internal/wire"
)

// An agent may ask the server for an instance UID, under one that is temporary (RequestInstanceUid), and several may do so
// under the same one at a time: machines that were cloned have it from their image. Each is to get one of those that
// the server gives, and none of them is a thief of a UID that they all are about to leave.
//
// So an answer with a new_instance_uid goes to whoever has asked and has got none, in the order in which they asked: first
// to those on the link that it comes on, since a server answers there in that order. Those with the same credentials ask
// at the same time. With other credentials the next one waits until the one before has its new UID: what the
// server answers is then for nobody else. Without a new UID in time, it is turned down as any that
// speaks under another's UID; and who has not asked itself is never taken for one that has.

// maxAsks is how many agents behind one gateway may ask under one UID at a time.
const maxAsks = 16

// ask notes that the agent of c asks the server for another UID. An agent that asks again has asked but once; behind a
// gateway it may be another one.
func (c *claim) ask() {
	if c.asks >= maxAsks || c.asks > 0 && !c.agent.gateway {
		return
	}
	if c.asks == 0 {
		c.named = make(chan struct{})
	}
	c.asks++
	c.route.asking = append(c.route.asking, c)
}

// unask takes back what ask has noted, since the message was not sent.
func (r *router) unask(c *claim) {
	r.mu.Lock()
	defer r.mu.Unlock()
	c.forgetAsks()
}

// toName returns whose the new UID is that the server gives the agents of a route, of which c is the current claim, by a
// message that came on l: of who has asked first, or else of c.
func (r *router) toName(c *claim, uid wire.UID, l *link) *claim {
	r.mu.Lock()
	defer r.mu.Unlock()
	way := c.route
	if len(way.asking) == 0 {
		return c
	}
	i := slices.IndexFunc(way.asking, func(c *claim) bool { return c.agent.link.Load() == l })
	i = max(i, 0)
	c = way.asking[i]
	way.asking = slices.Delete(way.asking, i, i+1)
	if c.asks--; c.asks == 0 {
		close(c.named)
	}
	if uid == way.uid { // so it was no temporary one
		c.forgetAsks()
	}
	return c
}

// forgetAsks has c be one that does not ask.
func (c *claim) forgetAsks() {
	if c.asks > 0 {
		c.route.asking = slices.DeleteFunc(c.route.asking, func(other *claim) bool { return other == c })
		c.asks = 0
		close(c.named)
	}
	c.named = nil
}

// awaitNamed has the reader wait until the agent of c, which has asked for another UID, has got one; it reports false if
// that takes too long, or c has not asked any more.
func (a *agentConn) awaitNamed(c *claim) bool {
	r := a.server.router
	r.mu.RLock()
	named := c.named
	r.mu.RUnlock()
	if named == nil {
		return false
	}
	ctx, over := a.pause()
	defer over()
	ctx, cancel := context.WithTimeout(ctx, challengeTimeout)
	defer cancel()
	select {
	case <-named:
	case <-ctx.Done():
		return false
	}
	r.mu.RLock()
	defer r.mu.RUnlock()
	return c.index == dropped || c.named != nil && c.asks == 0
}
