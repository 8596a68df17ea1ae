package memory

import (
	"context"
	"math/bits"
	"sync/atomic"
)

// SmallMessage is up to what length, in bytes, a message going up is read into memory of a reserve
// of its own.
const SmallMessage = 128 << 10

// The classes of messages that are being read, going up.
const (
	small = iota // up to SmallMessage
	large
	classes
)

// class is the memory in which messages of about one size are read.
//
// Nobody waits for ever, as long as whom Laggards names is closed, and links write or end:
//
//   - A reader that holds small memory never waits for more of it: it gets all that a small message
//     needs at once. It may wait for large memory, when its message turns out to be a large one; then
//     it still holds SmallMessage, and Laggards names it if others wait for that.
//   - While readers wait for large memory, it is the turn of one. That one never waits, and its turn
//     ends with its message. If it is nobody's turn, more is in use than turnFits allows. Readers
//     without a turn hold no more than the room of the class, because fits says so, and turnFits
//     allows for an eighth of the limit more, which is what outboxes hold unless there is a single
//     message in one that is larger than its share. That is written, or its link ends, and so Give
//     has somebody go on.
type class struct {
	room    int64        // of all but the reader whose turn it is
	held    atomic.Int64 // by all readers
	waiting atomic.Int32 // readers in queues

	// The budget's mu guards what follows.
	wanted int64 // what would have all go on who wait for room, not for their turn
	// queues holds those who wait by the size of their message, in doublings, longest wait first: a
	// message for which there is no room does not stand in the way of smaller ones. The small have one.
	queues [doublings]queue
}

// doublings is into how many queues those who wait for large memory are divided: up to 1 GiB.
const doublings = 13

// Holder is who reads.
type Holder interface {
	// Received returns how many bytes of messages were read so far.
	Received() uint64
	// Paused reports whether the holder waits for others than its peer, so that it does not read.
	Paused() bool
}

// Reader is what one reader of agents' messages holds: at most one message, and the piece from which
// its memory grows. Its methods are its owner's.
type Reader struct {
	budget *Budget
	holder Holder
	index  int                   // in the budget's readers; the registry guards it
	waits  atomic.Pointer[class] // for which it waits; nil for none
	held   [classes]atomic.Int64
}

// NewReader returns a reader that holds nothing. It ends with Close.
func (b *Budget) NewReader(holder Holder) *Reader {
	b.registry.Lock()
	defer b.registry.Unlock()
	r := &Reader{budget: b, holder: holder, index: len(b.readers)}
	b.readers = append(b.readers, r)
	return r
}

// Close gives all back that the reader holds.
func (r *Reader) Close() {
	for range classes {
		r.Release(int(r.held[r.class()].Load()))
	}
	b := r.budget
	b.registry.Lock()
	defer b.registry.Unlock()
	last := len(b.readers) - 1
	b.readers[r.index] = b.readers[last]
	b.readers[r.index].index = r.index
	b.readers[last] = nil
	b.readers = b.readers[:last]
}

// waiter is a reader that waits for memory.
type waiter struct {
	// Set once.
	reader        *Reader
	kind          int // class of the memory
	size, message int64
	granted       chan struct{} // closed when it is

	// The budget's mu guards what follows.
	begun      uint64 // its place among all who wait
	queue      *queue // nil when it waits no more
	prev, next *waiter
	piece      []byte // what was granted; nil for one that is to be made
}

// Piece counts, and returns, memory of a size that PieceSize returns for the reader, on the way to
// a message of a length that may be known already. It waits until there is room. wait is called
// when it has to: it returns the context of the wait, and what is to be called afterwards.
// The error is the context's.
//
// A message whose length is not known gets SmallMessage at once, until that is not enough.
func (r *Reader) Piece(size, message int, wait func() (context.Context, func())) ([]byte, error) {
	b, kind := r.budget, small
	if message = max(size, message); message > SmallMessage {
		kind = large
	}
	piece, ok := r.takeNow(kind, size, int64(message))
	if !ok {
		w := &waiter{reader: r, kind: kind, size: int64(size), message: int64(message), granted: make(chan struct{})}
		if err := b.await(w, wait); err != nil {
			return nil, err
		}
		piece = w.piece
	}
	return b.finish(piece, size), nil
}

// takeNow counts memory if there is room and nobody waits, or if it is the reader's turn. It returns a
// piece if there is one.
func (r *Reader) takeNow(kind, size int, message int64) (piece []byte, ok bool) {
	b, c := r.budget, &r.budget.classes[kind]
	if kind == small {
		if c.waiting.Load() > 0 || !c.take(int64(size)) {
			return nil, false
		}
		r.held[small].Add(int64(size))
		return b.reuse(size), true
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.turn != r && (c.waiting.Load() > 0 || !b.fits(r, message)) {
		return nil, false
	}
	c.held.Add(int64(size))
	return b.handOverLocked(r, large, size), true
}

// take counts n bytes if there is room for them.
func (c *class) take(n int64) bool {
	if c.held.Add(n) <= c.room {
		return true
	}
	c.held.Add(-n)
	return false
}

func (b *Budget) await(w *waiter, wait func() (context.Context, func())) error {
	b.mu.Lock()
	b.queueLocked(w)
	b.grantLocked()
	waits := w.queue != nil
	b.mu.Unlock()
	if !waits {
		return nil
	}
	b.call()

	ctx, over := wait()
	defer over()
	select {
	case <-w.granted:
		return nil
	case <-ctx.Done():
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if w.queue == nil { // granted in the meantime
		return nil
	}
	b.leaveLocked(w)
	b.grantLocked() // it may have been what the others waited behind
	return ctx.Err()
}

// Shrink returns the first n bytes of a piece that the reader holds in a smaller one. It never
// waits: only while the bytes are copied there are two pieces, of which one is counted.
func (r *Reader) Shrink(piece []byte, n int) []byte {
	smaller := r.budget.fetch(PieceSize(n))
	copy(smaller, piece[:n])
	r.Release(len(piece) - len(smaller))
	r.budget.Recycle(piece)
	return smaller
}

// Return takes back a piece that the reader held.
func (r *Reader) Return(piece []byte) {
	r.Release(len(piece))
	r.budget.Recycle(piece)
}

// Release counts n bytes of the reader's no longer; somebody else has them. When it holds no large
// memory, its turn is over.
func (r *Reader) Release(n int) {
	b, kind := r.budget, r.class()
	c := &b.classes[kind]
	if kind == small {
		r.held[small].Add(-int64(n))
		c.held.Add(-int64(n))
		if c.waiting.Load() > 0 {
			b.grant()
		}
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	c.held.Add(-int64(n))
	if r.held[large].Add(-int64(n)) == 0 && b.turn == r {
		b.turn = nil
	}
	b.grantLocked()
}

// class returns which memory of the reader's is given first: it grows from small to large.
func (r *Reader) class() int {
	if r.held[small].Load() > 0 {
		return small
	}
	return large
}

// grant lets go on who can.
func (b *Budget) grant() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.grantLocked()
}

// grantLocked lets go on who can: in each queue the first as long as there is room, and then, if it
// is nobody's turn, the one that has waited longest for large memory. It looks at no other waiter.
func (b *Budget) grantLocked() {
	for i := range b.classes {
		c := &b.classes[i]
		if c.waiting.Load() == 0 {
			continue
		}
		var longest *waiter
		for j := range c.queues {
			q := &c.queues[j]
			for q.first != nil && b.takeLocked(c, q.first) {
				b.goOnLocked(q.first)
			}
			if w := q.first; w != nil && (longest == nil || w.begun < longest.begun) {
				longest = w
			}
		}
		if i == large && longest != nil && b.turn == nil && b.turnFits() {
			b.turn, b.turnOf = longest.reader, longest.message
			c.held.Add(longest.size)
			b.goOnLocked(longest)
		}
	}
}

// takeLocked counts what w wants if there is room.
func (b *Budget) takeLocked(c *class, w *waiter) bool {
	if w.kind == small {
		return c.take(w.size)
	}
	if !b.fits(w.reader, w.message) {
		return false
	}
	c.held.Add(w.size)
	return true
}

// fits reports whether there is room for twice a large message, what its reader holds of it already
// included, so that the largest, however many stop halfway, never take the last room from smaller ones.
func (b *Budget) fits(r *Reader, message int64) bool {
	return b.withoutTurn()-r.held[large].Load()+2*message <= b.classes[large].room
}

// turnFits reports whether somebody may have a turn; see class.
func (b *Budget) turnFits() bool { return b.withoutTurn() <= b.classes[large].room+b.limit/8 }

// withoutTurn is what large messages and outboxes take, but for the reader whose turn it is.
func (b *Budget) withoutTurn() int64 {
	n := b.Up.held.Load() + b.classes[large].held.Load()
	if b.turn != nil {
		n -= b.turn.held[large].Load()
	}
	return n
}

// queueLocked has w wait.
func (b *Budget) queueLocked(w *waiter) {
	c, i := &b.classes[w.kind], 0
	if w.kind == large {
		i = min(bits.Len64(uint64(w.message-1)/SmallMessage)-1, doublings-1)
	}
	w.queue = &c.queues[i]
	b.begun++
	w.begun = b.begun
	w.queue.add(w)
	c.waiting.Add(1)
	c.wanted += b.wants(w)
	w.reader.waits.Store(c)
}

// wants is what w adds to what its class wants; see there.
func (b *Budget) wants(w *waiter) int64 {
	switch {
	case w.kind == small:
		return w.size
	case 2*w.message > b.classes[large].room: // only its turn helps it
		return 0
	}
	return 2*w.message - w.reader.held[large].Load() // which does not change while it waits
}

// goOnLocked lets w go on, for which size was counted.
func (b *Budget) goOnLocked(w *waiter) {
	b.leaveLocked(w)
	w.piece = b.handOverLocked(w.reader, w.kind, int(w.size))
	close(w.granted)
}

// handOverLocked notes that a reader holds what was counted for it, and returns a piece if there is one.
func (b *Budget) handOverLocked(r *Reader, kind, size int) []byte {
	r.held[kind].Add(int64(size))
	if size < minPiece {
		return nil
	}
	return b.pieceLocked(size)
}

// leaveLocked has w wait no more.
func (b *Budget) leaveLocked(w *waiter) {
	c := &b.classes[w.kind]
	w.queue.remove(w)
	w.queue = nil
	c.waiting.Add(-1)
	c.wanted -= b.wants(w)
	w.reader.waits.Store(nil)
}

// queue is a list of waiters, from any place of which one can leave.
type queue struct{ first, last *waiter }

// add has w wait behind the others.
func (q *queue) add(w *waiter) {
	if w.prev = q.last; w.prev == nil {
		q.first = w
	} else {
		w.prev.next = w
	}
	q.last = w
}

func (q *queue) remove(w *waiter) {
	if w.prev == nil {
		q.first = w.next
	} else {
		w.prev.next = w.next
	}
	if w.next == nil {
		q.last = w.prev
	} else {
		w.next.prev = w.prev
	}
	w.prev, w.next = nil, nil
}
