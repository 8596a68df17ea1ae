// Package posting speaks to a server that is reached over plain HTTP only: every message is a POST of its own, whose
// response is the server's answer.
//
//   - Queue is what waits to be posted. Each sender has a line of its own, of which one message at a time is
//     posted, in order; senders take turns. It knows neither HTTP nor agents.
//   - Client makes one request, and says what has become of it.
//
// Who posts, and what an answer means for its agent, is the caller's.
package posting

import (
	"container/heap"
	"context"
	"sync"
	"time"

	"github.com/opampgateway/opampgateway/internal/memory"
	"github.com/opampgateway/opampgateway/internal/outbox"
)

const (
	// lineShare is what a sender may have waiting before it is held up, in bytes: as on a link, where as much may wait
	// before it comes here.
	lineShare = 64 << 10
	// overhead is what a message takes beyond its bytes.
	overhead = 256
)

// Queue is what waits to be posted, by sender: K tells senders apart, S is what the rest of the gateway knows them by.
// What a message takes is counted in an account of the budget, from Put until it is done with.
type Queue[K comparable, S any] struct {
	// Set once.
	limit   int // of all that waits, in bytes, but for the last that was put
	account *memory.Account

	// mu guards what follows.
	mu       sync.Mutex
	changed  sync.Cond
	lines    map[K]*line[K, S] // those that have something
	ready    []*line[K, S]     // of them, those whose turn may come, in order
	resting  rest[K, S]        // of them, those that wait for their time
	size     int
	busy     int       // messages that are being posted
	throttle K         // whom the server asked last to wait
	until    time.Time // for how long
	pause    time.Time // until when nobody's turn comes
	wake     *time.Timer
	finished bool // nothing more is taken
	closed   bool // and nothing more is posted
}

// line is what one sender has waiting.
type line[K comparable, S any] struct {
	key   K
	posts []*Post[K, S]
	size  int
	after time.Time     // when its turn may come, while it rests
	room  chan struct{} // closed when there is room again; nil while nobody waits for that
}

// Post is one message on its way.
type Post[K comparable, S any] struct {
	Key   K
	Entry outbox.Entry[S]
	Poll  bool // the gateway's own, see wire.Format.Poll

	// Owned by who posts it.
	Tries  int    // that have failed
	Blamed int    // those of them after which others did not fail
	Epoch  uint64 // of the last of these

	line *line[K, S]
}

func (p *Post[K, S]) size() int { return len(p.Entry.Frame) + overhead }

// NewQueue returns a queue in which about limit bytes wait at most. Its end is Close and Rest.
func NewQueue[K comparable, S any](limit int, account *memory.Account) *Queue[K, S] {
	q := &Queue[K, S]{limit: limit, account: account, lines: map[K]*line[K, S]{}}
	q.changed.L = &q.mu
	q.wake = time.AfterFunc(time.Hour, q.signal)
	q.wake.Stop()
	return q
}

func (q *Queue[K, S]) signal() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.changed.Broadcast()
}

// Put adds a message behind what its sender has waiting, and waits while too much waits of all. It returns
// outbox.ErrClosed if the queue takes nothing more. The frame is copied.
func (q *Queue[K, S]) Put(key K, e outbox.Entry[S]) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	for q.size >= q.limit && !q.finished {
		q.changed.Wait()
	}
	if q.finished {
		return outbox.ErrClosed
	}
	e.Frame = append([]byte(nil), e.Frame...)
	q.addLocked(&Post[K, S]{Key: key, Entry: e})
	return nil
}

// Poll adds a message of the gateway's own for a sender that has nothing waiting, unless too much waits of all. It
// never waits, and reports whether the message was taken.
func (q *Queue[K, S]) Poll(key K, e outbox.Entry[S]) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.finished || q.size >= q.limit || q.lines[key] != nil {
		return false
	}
	q.addLocked(&Post[K, S]{Key: key, Entry: e, Poll: true})
	return true
}

func (q *Queue[K, S]) addLocked(p *Post[K, S]) {
	l := q.lines[p.Key]
	if l == nil {
		l = &line[K, S]{key: p.Key}
		q.lines[p.Key] = l
		q.ready = append(q.ready, l)
	}
	p.line = l
	l.posts = append(l.posts, p)
	l.size += p.size()
	q.size += p.size()
	q.account.Take(p.size())
	q.changed.Broadcast()
}

// Await waits while the sender has more waiting than may. Others do not wait for it.
func (q *Queue[K, S]) Await(ctx context.Context, key K) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	for {
		l := q.lines[key]
		switch {
		case q.finished:
			return outbox.ErrClosed
		case l == nil || l.size < lineShare:
			return nil
		}
		if l.room == nil {
			l.room = make(chan struct{})
		}
		room := l.room
		q.mu.Unlock()
		select {
		case <-room:
		case <-ctx.Done():
		}
		q.mu.Lock()
		if ctx.Err() != nil {
			return ctx.Err()
		}
	}
}

// Full reports whether Await would wait.
func (q *Queue[K, S]) Full(key K) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	l := q.lines[key]
	return l != nil && l.size >= lineShare && !q.finished
}

// Next returns the message whose turn it is, and waits until there is one. It is the caller's until Done or Again; nil
// tells the caller to leave.
func (q *Queue[K, S]) Next() *Post[K, S] {
	q.mu.Lock()
	defer q.mu.Unlock()
	for {
		now := time.Now()
		for len(q.resting) > 0 && !q.resting[0].after.After(now) {
			q.ready = append(q.ready, heap.Pop(&q.resting).(*line[K, S]))
		}
		switch {
		case q.closed, q.finished && len(q.lines) == 0:
			q.changed.Broadcast()
			return nil
		case len(q.ready) > 0 && !q.pause.After(now):
			l := q.ready[0]
			q.ready[0] = nil
			q.ready = q.ready[1:]
			q.busy++
			return l.posts[0]
		}
		if at, ok := q.nextLocked(); ok {
			q.wake.Reset(at.Sub(now))
		}
		q.changed.Wait()
	}
}

// nextLocked returns when something changes by itself.
func (q *Queue[K, S]) nextLocked() (at time.Time, ok bool) {
	switch {
	case len(q.ready) > 0:
		return q.pause, true
	case len(q.resting) > 0:
		return q.resting[0].after, true
	}
	return time.Time{}, false
}

// Done notes that there is no more to do for a message; its sender goes to the end of those whose turn comes.
func (q *Queue[K, S]) Done(p *Post[K, S]) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.busy--
	l := p.line
	l.posts[0] = nil
	l.posts = l.posts[1:]
	q.giveLocked(l, p)
	if len(l.posts) == 0 {
		delete(q.lines, l.key)
		q.roomLocked(l)
	} else {
		q.ready = append(q.ready, l)
	}
	q.changed.Broadcast()
}

// Again has a message be posted again, and its sender wait for that as long as delay.
func (q *Queue[K, S]) Again(p *Post[K, S], delay time.Duration) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.againLocked(p, delay)
}

func (q *Queue[K, S]) againLocked(p *Post[K, S], delay time.Duration) {
	q.busy--
	p.line.after = time.Now().Add(delay)
	heap.Push(&q.resting, p.line)
	q.changed.Broadcast()
}

// Throttle is Again for a message that the server does not want now. When it has said so to somebody else, who still
// waits for that, all wait: it is too much for the server, not too much of one agent.
func (q *Queue[K, S]) Throttle(p *Post[K, S], delay time.Duration) (all bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	now := time.Now()
	if q.until.After(now) && q.throttle != p.Key {
		all = true
		if until := now.Add(delay); until.After(q.pause) {
			q.pause = until
		}
	}
	q.throttle, q.until = p.Key, now.Add(delay)
	q.againLocked(p, delay)
	return all
}

// Drop is Done for p, and for all that its sender has waiting behind it. It returns how many messages that were, of the
// sender's own.
func (q *Queue[K, S]) Drop(p *Post[K, S]) (dropped int) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.busy--
	l := p.line
	for _, p := range l.posts {
		q.giveLocked(l, p)
		if !p.Poll {
			dropped++
		}
	}
	l.posts = nil
	delete(q.lines, l.key)
	q.roomLocked(l)
	q.changed.Broadcast()
	return dropped
}

func (q *Queue[K, S]) giveLocked(l *line[K, S], p *Post[K, S]) {
	l.size -= p.size()
	q.size -= p.size()
	q.account.Give(p.size())
	if l.size < lineShare {
		q.roomLocked(l)
	}
}

func (q *Queue[K, S]) roomLocked(l *line[K, S]) {
	if l.room != nil {
		close(l.room)
		l.room = nil
	}
}

// Finish has the queue take nothing more. What waits is still posted.
func (q *Queue[K, S]) Finish() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.finishLocked()
}

func (q *Queue[K, S]) finishLocked() {
	if q.finished {
		return
	}
	q.finished = true
	for _, l := range q.lines {
		q.roomLocked(l)
	}
	q.changed.Broadcast()
}

// Close is Finish, and has nothing more be posted.
func (q *Queue[K, S]) Close() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.closed = true
	q.finishLocked()
	q.wake.Stop()
	q.changed.Broadcast()
}

// Drain waits until nothing is left to post, or ctx is done.
func (q *Queue[K, S]) Drain(ctx context.Context) {
	defer context.AfterFunc(ctx, q.signal)()
	q.mu.Lock()
	defer q.mu.Unlock()
	for len(q.lines) > 0 && !q.closed && ctx.Err() == nil {
		q.changed.Wait()
	}
}

// Rest returns what was not posted, in order of each sender's, without polls. It is to be called after Close, when
// nobody posts any more.
func (q *Queue[K, S]) Rest() (entries []outbox.Entry[S]) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for key, l := range q.lines {
		for _, p := range l.posts {
			q.giveLocked(l, p)
			if !p.Poll {
				entries = append(entries, p.Entry)
			}
		}
		delete(q.lines, key)
	}
	q.ready, q.resting = nil, nil
	return entries
}

// Waiting returns how many bytes wait, or are being posted, and how many messages are being posted.
func (q *Queue[K, S]) Waiting() (bytes, busy int) {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.size, q.busy
}

// rest is a heap of lines, by when their turn may come.
type rest[K comparable, S any] []*line[K, S]

func (r rest[K, S]) Len() int           { return len(r) }
func (r rest[K, S]) Less(i, j int) bool { return r[i].after.Before(r[j].after) }
func (r rest[K, S]) Swap(i, j int)      { r[i], r[j] = r[j], r[i] }

// Push is for package heap.
func (r *rest[K, S]) Push(l any) { *r = append(*r, l.(*line[K, S])) }

// Pop is for package heap.
func (r *rest[K, S]) Pop() any {
	end := len(*r) - 1
	l := (*r)[end]
	(*r)[end] = nil
	*r = (*r)[:end]
	return l
}
