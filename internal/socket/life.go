package socket

import (
	"sync"
	"sync/atomic"
)

// life is what a socket knows of whether its peer is alive. The reader notes signs of life, which is
// on the path of every message; the sweeper, and whoever doubts, ask for them.
type life struct {
	// heard tells the reader that nobody has asked since the last sign of life. It mostly only looks,
	// since writing costs the other core its cache line.
	heard atomic.Bool

	// mu guards what follows. The reader takes it for the first sign of life after a question only.
	mu         sync.Mutex
	lively     bool          // since the last sweep
	unanswered bool          // a ping was sent, and nothing came since
	awaited    chan struct{} // closed at the next sign of life; nil while nobody waits
}

// alive notes a sign of life.
func (l *life) alive() {
	if !l.heard.Load() {
		l.answer()
	}
}

// answer tells all who have asked.
func (l *life) answer() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.heard.Store(true)
	l.lively, l.unanswered = true, false
	if l.awaited != nil {
		close(l.awaited)
		l.awaited = nil
	}
}

// Await returns a channel that is closed at the next sign of life of the peer, or never. All who wait
// share it.
func (l *life) Await() <-chan struct{} {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.awaited == nil {
		l.awaited = make(chan struct{})
	}
	l.heard.Store(false)
	return l.awaited
}

// PingSent notes that a ping is sent.
func (l *life) PingSent() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.unanswered = true
	l.heard.Store(false)
}

// Unanswered reports whether there was no sign of life since the last ping: then an end of the
// connection may be no more than the answer to that ping, from a host that knows nothing of it.
func (l *life) Unanswered() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.unanswered
}

// Excuse is for the next sweep like a sign of life: it is not the peer's silence when we do not read.
// It answers nobody else, since it is none.
func (l *life) Excuse() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.lively = true
}

// sweep reports whether there was a sign of life since the last sweep.
func (l *life) sweep() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	lively := l.lively
	l.lively = false
	l.heard.Store(false)
	return lively
}
