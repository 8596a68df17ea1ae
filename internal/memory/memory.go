// Package memory bounds what messages take while they are on their way, over all connections
// of a gateway together, and uses large pieces of it again.
//
// A message is counted while it is read, by its Reader, and while it waits to be written, by
// the Account of its direction. Going up, a reader has to wait until there is room: TCP then
// slows the agent, and nothing is lost. Going down nobody may wait; when all is used up,
// Exceeded says so to whoever can make room.
package memory

import (
	"context"
	"math"
	"slices"
	"sync"
	"sync/atomic"
)

// Budget is what the messages of one gateway may take.
type Budget struct {
	// Up is what agents said, Down what the server said.
	Up, Down Account

	// Set once.
	limit    int64 // of both together
	share    int64 // of Down, whatever Up takes
	room     int64 // of Up, but for the reader whose turn it is
	exceeded chan struct{}

	free    atomic.Int64 // bytes of the pieces that wait to be used again
	garbage atomic.Int64 // bytes of the pieces let go since Collect has last collected them

	// mu guards what follows, and what each Reader holds. It is never taken for a small message.
	mu       sync.Mutex
	waiting  []*waiter       // longest wait first
	turn     *Reader         // the one that may exceed the room; nil when none has to
	received uint64          // by turn, when Overdue was last asked; notYet until then
	pieces   [sizes][][]byte // that wait to be used again, by size
}

const notYet = math.MaxUint64

// MinSize is the least budget with which messages of the given length can be relayed.
func MinSize(largest int) int { return 4 * PieceSize(largest) }

// New returns a budget of size bytes for messages of at most largest bytes each; size is at
// least MinSize(largest). A quarter is left to what is not in use any more, but not collected yet.
func New(size, largest int) *Budget { return withLimit(size-size/4, largest) }

// withLimit returns a budget for limit bytes in use.
//
//   - What goes down may take a quarter in any case, and whatever else is free.
//   - What goes up may take three quarters. Of these, the reader whose turn it is may take what
//     the largest message needs while its memory grows: a piece, and one of half its size.
func withLimit(limit, largest int) *Budget {
	b := &Budget{limit: int64(limit), share: int64(limit) / 4, exceeded: make(chan struct{}, 1)}
	b.room = b.limit - b.share - int64(PieceSize(largest))*3/2
	b.Up.budget, b.Down.budget = b, b
	b.Up.wakeAt.Store(math.MinInt64)
	b.Down.wakeAt.Store(math.MinInt64)
	return b
}

// Account counts what is taken in one direction.
type Account struct {
	budget *Budget
	held   atomic.Int64
	wakeAt atomic.Int64 // with no more held than that, somebody who waits can go on
}

// Take counts n bytes. It never waits.
func (a *Account) Take(n int) {
	a.held.Add(int64(n))
	if b := a.budget; b.taken() > b.limit {
		b.mu.Lock()
		defer b.mu.Unlock()
		b.makeRoomLocked()
	}
}

// Give counts n bytes no longer.
func (a *Account) Give(n int) {
	if a.held.Add(-int64(n)) <= a.wakeAt.Load() {
		a.budget.mu.Lock()
		defer a.budget.mu.Unlock()
		a.budget.grantLocked()
	}
}

// Piece counts, and returns, memory of a size that PieceSize returns, of its full length. What is
// in it is left from others. It never waits.
func (a *Account) Piece(size int) []byte {
	b := a.budget
	b.mu.Lock()
	a.held.Add(int64(size))
	piece := b.pieceLocked(size)
	b.makeRoomLocked()
	b.mu.Unlock()
	if piece == nil {
		piece = make([]byte, size)
	}
	return piece
}

// Return takes back a piece that was counted here.
func (a *Account) Return(piece []byte) {
	a.Give(len(piece))
	a.budget.Recycle(piece)
}

// Recycle takes back a piece that is not counted any more; see Budget.Recycle.
func (a *Account) Recycle(piece []byte) { a.budget.Recycle(piece) }

// Held returns how many bytes are counted now.
func (a *Account) Held() int { return int(a.held.Load()) }

// taken is what is counted, and what waits to be used again.
func (b *Budget) taken() int64 { return b.Up.held.Load() + b.Down.held.Load() + b.free.Load() }

// makeRoomLocked lets go of what waits to be used again, and calls for help if that is not enough.
func (b *Budget) makeRoomLocked() {
	if over := b.taken() - b.limit; over > 0 {
		b.dropLocked(max(0, b.free.Load()-over))
	}
	if b.Excess() > 0 || b.muchGarbage() {
		select {
		case b.exceeded <- struct{}{}:
		default:
		}
	}
}

// Exceeded receives something when more is taken than the limit and Down has more than its share,
// and when there is garbage to collect.
func (b *Budget) Exceeded() <-chan struct{} { return b.exceeded }

// Excess returns how many bytes of Down are too many; none if it is not positive.
func (b *Budget) Excess() int { return b.beyond(b.limit) }

// ToFree returns how many bytes of Down are to be given when there is excess: somewhat more, so that
// their memory is there to be used again. Otherwise all that comes next would take new memory,
// and what was given would wait for the garbage collector, which lets it double first.
func (b *Budget) ToFree() int { return b.beyond(b.limit - b.limit/8) }

// beyond returns by how much limit is exceeded, of what is not the share of Down.
func (b *Budget) beyond(limit int64) int {
	up, down := b.Up.held.Load(), b.Down.held.Load()
	return int(min(up+down-limit, down-b.share))
}

// Reader is what one reader of agents' messages holds. Its methods but Overdue are its owner's.
type Reader struct {
	budget *Budget
	held   int64
}

// NewReader returns a reader that holds nothing.
func (b *Budget) NewReader() Reader { return Reader{budget: b} }

type waiter struct {
	reader        *Reader
	size, message int64
	piece         []byte // what was granted; nil for one that is to be made
	granted       chan struct{}
}

// Piece counts, and returns, memory of a size that PieceSize returns for the reader, on the way to
// a message of a length that may be known already. It waits until there is room. wait is called
// when it has to: it returns the context of the wait, and what is to be called afterwards.
// The error is the context's.
func (r *Reader) Piece(size, message int, wait func() (context.Context, func())) ([]byte, error) {
	w := &waiter{reader: r, size: int64(size), message: int64(max(size, message)), granted: make(chan struct{})}
	if err := r.budget.await(w, wait); err != nil {
		return nil, err
	}
	if w.piece == nil {
		w.piece = make([]byte, size)
	}
	return w.piece, nil
}

func (b *Budget) await(w *waiter, wait func() (context.Context, func())) error {
	b.mu.Lock()
	if b.grantedLocked(w) {
		b.mu.Unlock()
		return nil
	}
	b.waiting = append(b.waiting, w)
	b.grantLocked()
	b.mu.Unlock()

	ctx, over := wait()
	defer over()
	select {
	case <-w.granted:
		return nil
	case <-ctx.Done():
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	i := slices.Index(b.waiting, w)
	if i < 0 { // granted in the meantime
		return nil
	}
	b.waiting = slices.Delete(b.waiting, i, i+1)
	return ctx.Err()
}

// Return takes back a piece that the reader held.
func (r *Reader) Return(piece []byte) {
	r.Release(len(piece))
	r.budget.Recycle(piece)
}

// Release counts n bytes of the reader's no longer; somebody else has them. When it holds nothing,
// its turn is over.
func (r *Reader) Release(n int) {
	b := r.budget
	b.mu.Lock()
	defer b.mu.Unlock()
	r.held -= int64(n)
	b.Up.held.Add(-int64(n))
	if b.turn == r && r.held == 0 {
		b.turn = nil
	}
	b.grantLocked()
}

// Overdue reports whether it is the turn of r while others wait, and r makes too little of it:
// less than progress bytes since Overdue was last asked of it, which is told how many it has
// received in all.
func (r *Reader) Overdue(received uint64, progress uint64) bool {
	b := r.budget
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.turn != r {
		return false
	}
	before := b.received
	b.received = received
	return before != notYet && len(b.waiting) > 0 && received-before < progress
}

// grantedLocked grants what w wants if twice the message would fit, so that large ones, however
// many stop halfway, never take the last room from smaller ones; or else, if it is nobody's
// turn, as the reader's turn. A turn gets the message in, whatever the others hold that cannot go on.
func (b *Budget) grantedLocked(w *waiter) bool {
	general := b.Up.held.Load()
	if b.turn != nil {
		general -= b.turn.held
	}
	switch {
	case b.turn == w.reader, general+2*w.message <= b.room:
	case b.turn == nil && general <= b.room:
		b.turn, b.received = w.reader, notYet
	default:
		return false
	}
	w.reader.held += w.size
	b.Up.held.Add(w.size)
	w.piece = b.pieceLocked(int(w.size)) // before room is made by letting it go
	b.makeRoomLocked()
	return true
}

// grantLocked lets go on who can, and notes at what point somebody else can.
func (b *Budget) grantLocked() {
	for {
		least := int64(math.MaxInt64)
		b.waiting = slices.DeleteFunc(b.waiting, func(w *waiter) bool {
			if b.grantedLocked(w) {
				close(w.granted)
				return true
			}
			least = min(least, w.message)
			return false
		})
		wakeAt := int64(math.MinInt64)
		if len(b.waiting) > 0 {
			if wakeAt = b.room; b.turn != nil {
				wakeAt = b.turn.held + b.room - 2*least
			}
		}
		b.Up.wakeAt.Store(wakeAt)
		if b.Up.held.Load() > wakeAt { // nothing was given between the look and the note
			return
		}
	}
}
