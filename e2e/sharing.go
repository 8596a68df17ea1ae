package e2e

import (
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"net"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/gorilla/websocket"
	"github.com/open-telemetry/opamp-go/protobufs"
	"github.com/stretchr/testify/require"
)

// echo is the type of a server's chat that tells which message it answers.
const echo = "echo"

// What agents on one link do to each other, and what servers do at it.

// response is what a FleetServer does about a message. Its zero value is an ordinary answer.
type response struct {
	silent bool             // it is not answered
	end    func(*FleetLink) // nil, or the way in which the link is ended at it
	after  time.Duration    // how long after it was read, while more is; 0: nothing more is read
}

var errEndedAtMessage = errors.New("the server ends the link at a message")

// closeWith ends a link with a close frame, as most servers do: nothing more is read.
func closeWith(code int) func(*FleetLink) {
	return func(l *FleetLink) {
		_ = l.ws.WriteControl(websocket.CloseMessage, websocket.FormatCloseMessage(code, ""), time.Now().Add(time.Second)) // or it has ended
		l.ws.Close()
	}
}

// finish ends a link without a close frame, as servers that drop a connection do.
func finish(l *FleetLink) {
	_ = l.ws.NetConn().(*net.TCPConn).CloseWrite() // or it has ended
	l.ws.Close()
}

// resetLink ends a link as a server's death does, when there is more to read.
func resetLink(l *FleetLink) {
	_ = l.ws.NetConn().(*net.TCPConn).SetLinger(0) // or it has ended
	l.ws.Close()
}

// heedPings sets what becomes of pings on a link, before it is read.
func (l *FleetLink) heedPings() {
	s := l.server
	if s.opts.readLimit > 0 {
		l.ws.SetReadLimit(s.opts.readLimit)
	}
	pong := l.ws.PingHandler()
	l.ws.SetPingHandler(func(data string) error {
		s.mu.Lock()
		nth := l.pings
		l.pings++
		s.mu.Unlock()
		if s.opts.answersPing != nil && !s.opts.answersPing(nth) {
			return nil
		}
		return pong(data)
	})
	if s.opts.pongWithin > 0 {
		var pongs atomic.Int64
		l.ws.SetPongHandler(func(string) error {
			pongs.Add(1)
			return nil
		})
		s.work.Go(func() { l.wantPongs(&pongs) })
	}
}

// wantPongs ends the link when it does not answer pings in time. It ends with the link.
func (l *FleetLink) wantPongs(pongs *atomic.Int64) {
	for sent := int64(1); ; sent++ {
		l.ping()
		select {
		case <-time.After(l.server.opts.pongWithin):
			if pongs.Load() < sent {
				l.ws.Close()
				return
			}
		case <-l.ended:
			return
		}
	}
}

// opened returns how many links there ever were.
func (s *FleetServer) opened() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.links)
}

// heardOf returns how many messages of a fleet the server has heard.
func (s *FleetServer) heardOf(f *Fleet) (n uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, a := range f.agents {
		if k := s.records[a.uid]; k != nil {
			n += uint64(len(k.said))
		}
	}
	return n
}

// pings returns how many pings have come on all links.
func (s *FleetServer) pings() (n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, l := range s.links {
		n += l.pings
	}
	return n
}

// endings returns how the links have ended that did.
func (s *FleetServer) endings() (ends []error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, l := range s.links {
		if l.end != nil {
			ends = append(ends, l.end)
		}
	}
	return ends
}

// wantLost fails when more links were lost than may be, of those that there were at first.
func (s *FleetServer) wantLost(t *testing.T, first, most int) {
	t.Helper()
	require.LessOrEqual(t, s.opened()-first, most, "links lost; they have ended by: %v", s.endings())
}

// pace is how long a server takes for each message of a link, which may change.
type pace struct{ each, perByte atomic.Int64 } // nanoseconds

func (p *pace) heeds(_ uuid.UUID, _ *protobufs.AgentToServer, size int) response {
	if took := time.Duration(p.each.Load() + p.perByte.Load()*int64(size)); took > 0 {
		time.Sleep(took) // what servers do: write to a database
	}
	return response{}
}

// echoed is one message that the server has answered.
type echoed struct {
	number uint64
	said   time.Time
	took   time.Duration
	sum    uint32 // of what was in it
}

// hearLocked takes the server's answer to a message.
func (a *FleetAgent) hearLocked(number uint64, data []byte) {
	said, waits := a.waiting[number]
	if !waits {
		return // it was said again after a link was lost, and has been answered
	}
	delete(a.waiting, number)
	a.answers = append(a.answers, echoed{number, said, time.Since(said), crc32.ChecksumIEEE(data)})
}

// waits are how long agents waited for answers, the longest last.
type waits []time.Duration

// waits returns how long the agents waited for the answers to what they said since then. Whoever
// has no answer yet has waited until now.
func (f *Fleet) waits(since time.Time) waits {
	var all waits
	for _, a := range f.agents {
		a.mu.Lock()
		for _, answer := range a.answers {
			if answer.said.After(since) {
				all = append(all, answer.took)
			}
		}
		for _, said := range a.waiting {
			if said.After(since) {
				all = append(all, time.Since(said))
			}
		}
		a.mu.Unlock()
	}
	slices.Sort(all)
	return all
}

// unanswered returns how many messages of the agents have no answer.
func (f *Fleet) unanswered() (n int) {
	for _, a := range f.agents {
		a.mu.Lock()
		n += len(a.waiting)
		a.mu.Unlock()
	}
	return n
}

// quantile returns what that part of all waited for at most.
func (w waits) quantile(q float64) time.Duration {
	if len(w) == 0 {
		return 0
	}
	return w[min(len(w)-1, int(q*float64(len(w))))]
}

func (w waits) String() string {
	ms := time.Millisecond
	return fmt.Sprintf("%d answers: median %s, p99 %s, worst %s", len(w), w.quantile(0.5).Round(ms), w.quantile(0.99).Round(ms), w.quantile(1).Round(ms))
}

// flood has all agents speak as fast as they may, until stop is called.
func (f *Fleet) flood(t *testing.T) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(f.ctx)
	var flooding sync.WaitGroup
	for _, a := range f.agents {
		flooding.Add(1)
		f.work.Go(func() {
			defer flooding.Done()
			for ctx.Err() == nil {
				if !a.say(nil) && ctx.Err() == nil {
					t.Errorf("flooding agent %s cannot speak", a.uid)
					return
				}
			}
		})
	}
	stop = sync.OnceFunc(func() {
		cancel()
		flooding.Wait()
	})
	t.Cleanup(cancel)
	return stop
}

// arrive connects an agent that says nothing and stays until the end of the test, and returns how
// long that took.
func arrive(t *testing.T, url string, limit time.Duration) (time.Duration, error) {
	t.Helper()
	start := time.Now()
	dialer := websocket.Dialer{HandshakeTimeout: limit}
	ws, resp, err := dialer.Dial(url, http.Header{"Agent-ID": {uuid.NewString()}})
	if err != nil {
		return time.Since(start), fmt.Errorf("%w: %s", err, status(resp))
	}
	t.Cleanup(func() { ws.Close() })
	return time.Since(start), nil
}

// wasTold returns what an agent was told to be wrong with what it said.
func (a *FleetAgent) wasTold() []*protobufs.ServerErrorResponse {
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.Clone(a.told)
}

// wantTold waits until an agent was told n times that what it said was wrong.
func (a *FleetAgent) wantTold(t *testing.T, n int) {
	t.Helper()
	eventually(t, func() string {
		if told := a.wasTold(); len(told) < n {
			return fmt.Sprintf("agent %s was told %v, want %d such messages", a.uid, told, n)
		}
		return ""
	})
	for _, told := range a.wasTold() {
		require.Equal(t, protobufs.ServerErrorResponseType_ServerErrorResponseType_BadRequest, told.GetType(), "what agent %s was told: %v", a.uid, told)
	}
}

// wantBlameless checks that nobody of the fleet was told that it had said anything wrong, or closed.
func (f *Fleet) wantBlameless(t *testing.T) {
	t.Helper()
	for _, a := range f.agents {
		require.Empty(t, a.wasTold(), "what agent %s was told", a.uid)
	}
	f.wantUndisturbed(t)
}

// wantRepaired waits until the server has heard all of the agents, and the full state of each on the link to
// which it came last, when it has lost one. For that each has to be asked once for each link to which it
// came: more often is a burden for all, less often leaves lost what a link took with it. It returns how
// many messages were repeated or missing meanwhile. Nobody must be talking any more.
func (s *FleetServer) wantRepaired(t *testing.T, f *Fleet) (repeated, missing uint64) {
	t.Helper()
	s.wantReachable(t, f.agents, ceiling) // those of the last link that was lost are asked only now
	s.wantHeard(t, f.agents, ceiling)
	eventually(t, func() string {
		for _, a := range f.agents {
			k := s.record(a)
			stated := map[*FleetLink]bool{}
			last := said{}
			for _, m := range k.said {
				stated[m.link] = stated[m.link] || m.state
				if m.introduced > last.introduced {
					last = m
				}
			}
			a.mu.Lock()
			asked := a.asked
			a.mu.Unlock()
			if asked < len(stated)-1 { // more, if a link was lost again before the server had heard the answer
				return fmt.Sprintf("agent %s was asked %d times for its full state, and spoke on %d links: %s", a.uid, asked, len(stated), s.story(a))
			}
			if !stated[last.link] {
				return fmt.Sprintf("agent %s has not told its state on %s: %s", a.uid, last.link.name, s.story(a))
			}
		}
		return ""
	})
	for _, a := range f.agents {
		a.mu.Lock()
		asked := a.asked
		a.mu.Unlock()
		require.LessOrEqual(t, asked, s.record(a).asked-1, "requests for the full state of agent %s, which was brought to so many other links: %s", a.uid, s.story(a))
	}
	return s.wantHistory(t, f.agents)
}
