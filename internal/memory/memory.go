// Package memory bounds what peers' bytes take, over all connections of a gateway together, and
// uses large pieces of memory again.
//
// A message is counted while it is read, by its Reader, and while it waits to be written, by the
// Account of its direction. Going up, a reader has to wait until there is room: TCP then slows the
// agent, and nothing is lost. While others wait, whoever holds memory has to make progress; Laggards
// names those who do not. Going down nobody may wait; when all is used up, Exceeded says so to
// whoever can make room. What is kept for as long as a connection lives is counted by Kept, what
// waits to be let in by Requests; they refuse what is too much.
package memory

import (
	"math"
	"net/netip"
	"sync"
	"sync/atomic"

	"github.com/opampgateway/opampgateway/internal/fair"
)

// Budget is what the peers of one gateway may take of its memory. Of its size, a quarter is held
// back for what is not in use any more, but not collected yet. The rest is the limit, of which
//
//   - Down has a quarter in any case, and whatever else is free;
//   - an eighth is for reading messages up to SmallMessage going up, which larger ones never take;
//   - larger messages going up, and the outboxes of links, have the rest. Of this, the reader whose
//     turn it is may take what the largest message needs: a piece, and one of half its size from
//     which it grows. That is at most half of the limit.
//
// Beyond the limit go an eighth of it, in the outboxes of links, which do not wait (see LinkShare),
// a quarter for Kept, and an eighth for Requests; for half of these two Down makes room, even of its
// quarter. So all together they are at most 1 + 1/8 + 3/16 of the limit, which is less than the size.
type Budget struct {
	// Up counts what waits in the outboxes of links, Down all that the server said.
	Up, Down Account
	// Kept counts what is kept for as long as connections live.
	Kept Kept
	// Requests counts what waits to be let in.
	Requests Requests

	// Set once.
	limit    int64
	exceeded chan struct{}

	classes [classes]class
	free    atomic.Int64 // bytes of the pieces that wait to be used again

	// mu guards what follows, and the queues of the classes. It is never taken for a message up to
	// TinyMessage while nobody waits.
	mu     sync.Mutex
	turn   *Reader         // the one that may exceed the room of large; nil when none has to
	turnOf int64           // the length of its message, as far as it is known
	begun  uint64          // how many waits have
	pieces [sizes][][]byte // that wait to be used again, by size

	// registry guards what follows. It is never taken for a message.
	registry sync.Mutex
	readers  []*Reader
	marks    [classes]map[*Reader]mark // of those that held memory when Laggards was last called
}

const (
	// leastSmall is the least that messages up to SmallMessage have, in bytes: four of them.
	leastSmall = 4 * SmallMessage
	// leastLink and mostLink bound what the outbox of one link may hold, in bytes.
	leastLink, mostLink = 256 << 10, 8 << 20
)

// MinSize is the least budget with which messages of the given length can be relayed over so many
// links, in bytes.
func MinSize(largest, links int) int64 {
	limit := max(2*turnSize(largest), 8*leastSmall, 8*leastLink*int64(links))
	return (limit*4 + 2) / 3
}

// limitOf returns what may be in use of a budget of size bytes.
func limitOf(size int64) int64 { return size - size/4 }

// turnSize is what a message takes of the given length, in bytes, while its memory grows.
func turnSize(largest int) int64 { return int64(PieceSize(largest)) / 2 * 3 }

// LinkShare is what the outbox of each of so many links may hold, in bytes, of a budget of size bytes.
func LinkShare(size int64, links int) int {
	return int(max(leastLink, min(mostLink, limitOf(size)/8/int64(links))))
}

// New returns a budget of size bytes for messages of at most largest bytes each; size is at least
// what MinSize says.
func New(size int64, largest int) *Budget {
	limit := limitOf(size)
	b := &Budget{limit: limit, exceeded: make(chan struct{}, 1)}
	b.Up.budget, b.Down.budget = b, b
	b.classes[small].room = limit / 8
	b.classes[large].room = limit - limit/4 - limit/8 - turnSize(largest)
	b.Kept = Kept{budget: b, pool: fair.NewPool(clamp(limit / 4))}
	b.Requests = Requests{budget: b, pool: fair.NewByAddress(clamp(limit/8), 4)}
	return b
}

func clamp(n int64) int { return int(min(n, math.MaxInt)) }

// Account counts what is taken in one direction.
type Account struct {
	budget *Budget
	held   atomic.Int64
}

// Take counts n bytes. It never waits.
func (a *Account) Take(n int) {
	a.held.Add(int64(n))
	a.budget.makeRoom()
}

// Give counts n bytes no longer.
func (a *Account) Give(n int) {
	a.held.Add(-int64(n))
	if b := a.budget; a == &b.Up && b.classes[large].waiting.Load() > 0 {
		b.grant()
	}
}

// Piece counts, and returns, memory of a size that PieceSize returns, of its full length. What is
// in it is left from others. It never waits.
func (a *Account) Piece(size int) []byte {
	a.held.Add(int64(size))
	return a.budget.fetch(size)
}

// Shrink returns the first n bytes of a piece that is counted here in a smaller one.
func (a *Account) Shrink(piece []byte, n int) []byte {
	smaller := a.Piece(PieceSize(n))
	copy(smaller, piece[:n])
	a.Return(piece)
	return smaller
}

// Return takes back a piece that was counted here.
func (a *Account) Return(piece []byte) {
	a.Give(len(piece))
	a.budget.Recycle(piece)
}

// Recycle takes back a piece that is not counted any more; see Budget.Recycle.
func (a *Account) Recycle(piece []byte) { a.budget.Recycle(piece) }

// Held returns how many bytes are counted now.
func (a *Account) Held() int64 { return a.held.Load() }

// Kept counts what is kept for as long as connections live: at most a quarter of the limit in all,
// and for nobody more than is still free.
type Kept struct {
	budget *Budget
	pool   *fair.Pool
	held   atomic.Int64
}

// Take counts n more bytes for somebody for whom so many are kept already, and reports whether
// that is fair. It never waits.
func (k *Kept) Take(held, n int) bool {
	if !k.pool.Take(held, n) {
		return false
	}
	k.held.Add(int64(n))
	k.budget.makeRoom()
	return true
}

// Give counts n bytes no longer.
func (k *Kept) Give(n int) {
	k.held.Add(-int64(n))
	k.pool.Give(n)
}

// Held returns how many bytes are counted now.
func (k *Kept) Held() int64 { return k.held.Load() }

// Requests counts what waits to be let in, by address: at most an eighth of the limit in all, and
// for no address more than four times of what is still free. A balancer may hide thousands of agents
// behind one.
type Requests struct {
	budget *Budget
	pool   *fair.ByAddress
	held   atomic.Int64
}

// Take counts n more bytes for an address, and reports whether that is fair. It never waits.
func (q *Requests) Take(address netip.Prefix, n int) bool {
	if !q.pool.Take(address, n) {
		return false
	}
	q.held.Add(int64(n))
	q.budget.makeRoom()
	return true
}

// Give counts n bytes of an address no longer.
func (q *Requests) Give(address netip.Prefix, n int) {
	q.held.Add(-int64(n))
	q.pool.Give(address, n)
}

// Held returns how many bytes are counted now.
func (q *Requests) Held() int64 { return q.held.Load() }

// Reading returns how many bytes of messages are counted that are being read, going up.
func (b *Budget) Reading() int64 { return b.classes[small].held.Load() + b.classes[large].held.Load() }

// Limit returns how many bytes may be in use.
func (b *Budget) Limit() int64 { return b.limit }

// InUse returns how many bytes are counted now.
func (b *Budget) InUse() int64 { return b.inUse() }

// inUse is what is counted.
func (b *Budget) inUse() int64 {
	return b.Up.held.Load() + b.Down.held.Load() + b.Reading() + b.Kept.held.Load() + b.Requests.held.Load()
}

// makeRoom lets go of what waits to be used again when more than the limit is taken, and calls for
// help if that is not enough.
func (b *Budget) makeRoom() {
	used, free := b.inUse(), b.free.Load()
	if used+free <= b.limit {
		return
	}
	if free > 0 {
		b.mu.Lock()
		b.dropLocked(max(0, b.limit-used))
		b.mu.Unlock()
	}
	if b.Excess() > 0 {
		b.call()
	}
}

// call has Exceeded receive something.
func (b *Budget) call() {
	select {
	case b.exceeded <- struct{}{}:
	default:
	}
}

// Exceeded receives something when there is Excess, and when Pressed begins to be true.
func (b *Budget) Exceeded() <-chan struct{} { return b.exceeded }

// Excess returns how many bytes of Down are too many, because more than the limit is in use and Down
// has more than its share; none if it is not positive.
func (b *Budget) Excess() int64 { return b.beyond(b.limit) }

// ToFree returns how many bytes of Down are to be given when there is excess: somewhat more, so that
// what comes next finds room, and does not have somebody else shed.
func (b *Budget) ToFree() int64 { return b.beyond(b.limit - b.limit/8) }

// beyond returns by how much limit is exceeded, of what is not the share of Down.
func (b *Budget) beyond(limit int64) int64 {
	share := b.limit/4 - (b.Kept.held.Load()+b.Requests.held.Load())/2
	return min(b.inUse()-limit, b.Down.held.Load()-share)
}
