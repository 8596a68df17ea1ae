package opampgateway

import (
	"context"
	"math"
	"time"

	"go.uber.org/zap"

	"github.com/opampgateway/opampgateway/internal/ending"
)

// drainStep is how often some agents are let go while a gateway drains.
const drainStep = 50 * time.Millisecond

// drain lets agents go before an end that is meant, over agents.drain_time, so that what they come back to, another
// gateway most likely, and the server do not get all of them at once:
//
//  1. The port is given back. A load balancer finds at once that nobody is there, and goes on to another gateway; who
//     has connected and was not heard yet gets 503. Agents over plain HTTP go on polling on the connections that they have.
//  2. Agents are let go, evenly. Their links stay, and so does everything else. The server is not told: the end of the
//     links tells it of those that have not come back by another way.
//
// It returns when nobody is left, or the time is over; before that when anew, which may be nil, reports that the process was
// told to end again, or when ctx would leave no time to end properly.
func (g *gateway) drain(ctx context.Context, anew func() bool) {
	over := g.cfg.Load().Agents.DrainTime
	if end, limited := ctx.Deadline(); limited {
		over = min(over, time.Until(end)-shutdownTimeout)
	}
	s := g.server
	if over <= 0 || s.count() == 0 {
		return
	}
	g.host.Store(nil) // see shutdown
	g.log.Info("the process was told to end: nobody new is let in, and agents are let go one after the other; told again, it ends at once",
		zap.Int("agents", s.count()), zap.Duration("drain_time", over))
	s.mu.Lock()
	s.drains = true
	s.mu.Unlock()
	if !s.door.Vacant() {
		s.door.Vacate()
	}
	end := time.Now().Add(over)
	step := time.NewTicker(drainStep)
	defer step.Stop()
	for owed := 0.0; ; {
		select {
		case <-step.C:
		case <-ctx.Done():
			return
		}
		agents, left := s.staying(), time.Until(end)
		if len(agents) == 0 || left <= 0 || anew != nil && anew() {
			return
		}
		owed += float64(len(agents)) * min(1, float64(drainStep)/float64(left))
		leaving := agents[:min(len(agents), int(math.Floor(owed)))]
		owed -= float64(len(leaving))
		for _, a := range leaving {
			a.dismiss(ending.Shutdown)
		}
	}
}

// draining reports whether nobody new is let in any more.
func (s *downstreamServer) draining() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.drains
}

// staying returns the agents that are not being let go yet, in no order.
func (s *downstreamServer) staying() []*agentConn {
	s.mu.Lock()
	defer s.mu.Unlock()
	agents := make([]*agentConn, 0, len(s.agents))
	for a := range s.agents {
		if !a.ending.Closing() {
			agents = append(agents, a)
		}
	}
	return agents
}
