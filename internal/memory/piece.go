package memory

import (
	"math/bits"
	"sync"
)

const (
	// UncountedMessage is up to what length a message is not counted while it is read, in bytes:
	// heartbeats, and the replies to them. It is part of what a connection costs.
	UncountedMessage = 512
	// TinyMessage is up to what length, in bytes, a message has memory of just its size, which is not
	// used again.
	TinyMessage = 4 << 10
	// minPiece is the smallest piece of memory that is used again, in bytes.
	minPiece = 8 << 10
	// steps is into how many sizes each doubling is divided, so that little is wasted.
	steps = 4
	// sizes is how many there are.
	sizes = steps * bits.UintSize
)

// uncounted is memory for messages that are not counted.
var uncounted = sync.Pool{New: func() any { return new([UncountedMessage]byte) }}

// Uncounted returns memory of UncountedMessage bytes. What is in it is left from others.
func Uncounted() []byte { return uncounted.Get().(*[UncountedMessage]byte)[:] }

// GiveUncounted takes back what Uncounted returned.
func GiveUncounted(b []byte) { uncounted.Put((*[UncountedMessage]byte)(b[:UncountedMessage])) }

// PieceSize is the size of the memory for n bytes, which are more than UncountedMessage. From
// minPiece on, it is at most a quarter more.
func PieceSize(n int) int {
	switch {
	case n <= TinyMessage:
		return n
	case n <= minPiece:
		return minPiece
	}
	step := 1 << (bits.Len(uint(n-1)) - 1) / steps
	return (n + step - 1) / step * step
}

// sizeIndex numbers the sizes of pieces.
func sizeIndex(size int) int {
	exponent := bits.Len(uint(size)) - 1
	return steps*exponent + (size-1<<exponent)*steps>>exponent
}

// fetch returns memory of just this size, which is counted.
func (b *Budget) fetch(size int) []byte { return b.finish(b.reuse(size), size) }

// reuse returns a piece of just this size that waits to be used again, nil if there is none.
func (b *Budget) reuse(size int) []byte {
	if size < minPiece {
		return nil
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.pieceLocked(size)
}

// finish returns the piece, or makes one, for which size was counted. Room is made only now: what waits
// to be used again is used, not let go to make room for new memory.
func (b *Budget) finish(piece []byte, size int) []byte {
	b.makeRoom()
	if piece == nil {
		piece = make([]byte, size)
	}
	return piece
}

// pieceLocked is reuse for a size from minPiece on.
func (b *Budget) pieceLocked(size int) []byte {
	pieces := b.pieces[sizeIndex(size)]
	if len(pieces) == 0 {
		return nil
	}
	last := len(pieces) - 1
	piece := pieces[last]
	pieces[last] = nil
	b.pieces[sizeIndex(size)] = pieces[:last]
	b.free.Add(-int64(size))
	return piece
}

// Recycle takes back a piece that nobody uses any more and that is not counted, unless memory is
// short. It may be given anything: what is no piece is left to the garbage collector.
func (b *Budget) Recycle(piece []byte) {
	size := cap(piece)
	if size == UncountedMessage {
		GiveUncounted(piece)
		return
	}
	if size < minPiece || PieceSize(size) != size || b.inUse()+b.free.Load()+int64(size) > b.limit {
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.pieces[sizeIndex(size)] = append(b.pieces[sizeIndex(size)], piece[:size])
	b.free.Add(int64(size))
}

// Trim lets half of the pieces go that wait to be used again. To be called now and then, it leaves
// those that are.
func (b *Budget) Trim() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.dropLocked(b.free.Load() / 2)
}

// dropLocked leaves pieces to the garbage collector until no more than keep bytes are free, the
// largest first.
func (b *Budget) dropLocked(keep int64) {
	for i := sizes - 1; i >= 0 && b.free.Load() > keep; i-- {
		for pieces := b.pieces[i]; len(pieces) > 0 && b.free.Load() > keep; pieces = b.pieces[i] {
			last := len(pieces) - 1
			b.free.Add(-int64(len(pieces[last])))
			pieces[last] = nil
			b.pieces[i] = pieces[:last]
		}
	}
}
