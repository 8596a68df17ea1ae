package memory

import (
	"math/bits"
	"runtime"
	"sync"
)

const (
	// MinPiece is the smallest piece of memory that is used again, in bytes.
	MinPiece = 8 << 10
	// steps is into how many sizes each doubling is divided, so that little is wasted.
	steps = 4
	// sizes is how many there are.
	sizes = steps * bits.UintSize
)

// smallSize is what most messages fit in, in bytes: heartbeats, and the replies to them.
const smallSize = 512

// small messages are not counted, but used again.
var small = sync.Pool{New: func() any { return new([smallSize]byte) }}

// Small returns memory of n bytes that need not be counted. What is in it is left from others.
func Small(n int) []byte {
	if n > smallSize {
		return make([]byte, n)
	}
	return small.Get().(*[smallSize]byte)[:n]
}

// PieceSize is the size of the piece that holds n bytes: at most a quarter more.
func PieceSize(n int) int {
	if n <= MinPiece {
		return MinPiece
	}
	step := 1 << (bits.Len(uint(n-1)) - 1) / steps
	return (n + step - 1) / step * step
}

// sizeIndex numbers the sizes of pieces.
func sizeIndex(size int) int {
	exponent := bits.Len(uint(size)) - 1
	return steps*exponent + (size-1<<exponent)*steps>>exponent
}

// pieceLocked returns a piece of just this size that waits to be used again, nil if there is none.
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
	if size == smallSize {
		small.Put((*[smallSize]byte)(piece[:smallSize]))
		return
	}
	if size < MinPiece || PieceSize(size) != size {
		return
	}
	if b.taken()+int64(size) > b.limit {
		b.garbage.Add(int64(size))
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.pieces[sizeIndex(size)] = append(b.pieces[sizeIndex(size)], piece[:size])
	b.free.Add(int64(size))
}

// Collect collects garbage if there is much of what was counted here. Left alone, Go would let it
// grow to as much as is in use.
func (b *Budget) Collect() {
	if b.muchGarbage() {
		b.garbage.Store(0)
		runtime.GC()
	}
}

func (b *Budget) muchGarbage() bool { return b.garbage.Load() > b.limit/8 }

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
			b.garbage.Add(int64(len(pieces[last])))
			pieces[last] = nil
			b.pieces[i] = pieces[:last]
		}
	}
}
