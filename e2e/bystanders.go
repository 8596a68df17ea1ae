package e2e

import (
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/gorilla/websocket"
	"github.com/stretchr/testify/require"
)

// bystanders are agents that talk, and others that come and go, while something happens to
// the gateway that is none of their business.
type bystanders struct {
	gateway *Gateway
	stop    chan struct{}
	running sync.WaitGroup

	// mu guards what has happened to them.
	mu              sync.Mutex
	failure         error
	answer, upgrade span
}

// span is how often something was waited for, and how long at most.
type span struct {
	n       int
	slowest time.Duration
}

func (s *span) add(d time.Duration) {
	s.n++
	s.slowest = max(s.slowest, d)
}

// startBystanders connects n agents that talk from now on, and starts to connect others.
func startBystanders(t *testing.T, gateway *Gateway, n int) *bystanders {
	t.Helper()
	b := &bystanders{gateway: gateway, stop: make(chan struct{})}
	for range n {
		a := connectRaw(t, gateway.url(), nil)
		b.running.Go(func() { b.talk(a) })
	}
	b.running.Go(b.come)
	t.Cleanup(b.end)
	return b
}

func (b *bystanders) end() {
	b.mu.Lock()
	select {
	case <-b.stop:
	default:
		close(b.stop)
	}
	b.mu.Unlock()
	b.running.Wait()
}

// talk says something as soon as the server has answered.
func (b *bystanders) talk(a *rawAgent) {
	for b.pause() {
		start := time.Now()
		if err := a.ws.WriteMessage(websocket.BinaryMessage, heartbeat(a.uid, 1)); err != nil {
			b.fail(fmt.Errorf("an agent cannot speak: %w", err))
			return
		}
		select {
		case _, open := <-a.news:
			if !open {
				b.fail(fmt.Errorf("an agent was closed: %w", a.ended()))
				return
			}
		case <-time.After(ceiling):
			b.fail(fmt.Errorf("an agent has no answer after %s", ceiling))
			return
		}
		b.mu.Lock()
		b.answer.add(time.Since(start))
		b.mu.Unlock()
	}
}

// come connects one agent after the other.
func (b *bystanders) come() {
	for b.pause() {
		start := time.Now()
		ws, resp, err := dialRaw(b.gateway.url(), nil, nil)
		if err != nil {
			b.fail(fmt.Errorf("an agent was not let in: %w: %s", err, status(resp)))
			return
		}
		ws.Close()
		b.mu.Lock()
		b.upgrade.add(time.Since(start))
		b.mu.Unlock()
	}
}

// pause lets a moment pass; it reports false at the end.
func (b *bystanders) pause() bool {
	select {
	case <-b.stop:
		return false
	case <-time.After(10 * time.Millisecond):
		return true
	}
}

func (b *bystanders) fail(err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.failure == nil {
		b.failure = err
	}
}

// wantServed ends them; none may have been closed or refused, or have waited for longer.
func (b *bystanders) wantServed(t *testing.T, limit time.Duration) {
	t.Helper()
	b.end()
	require.NoError(t, b.failure)
	t.Logf("meanwhile %d answers, the slowest after %s, and %d agents let in, the slowest after %s",
		b.answer.n, b.answer.slowest.Round(time.Millisecond), b.upgrade.n, b.upgrade.slowest.Round(time.Millisecond))
	require.Positive(t, b.answer.n, "answers")
	require.Positive(t, b.upgrade.n, "agents let in")
	require.Less(t, b.answer.slowest, limit, "the slowest answer")
	require.Less(t, b.upgrade.slowest, limit, "the slowest upgrade")
}
