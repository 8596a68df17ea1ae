package memory

import (
	"math/bits"
	"sync"
)

// MinPiece is the smallest piece that is used again, in bytes; a smaller one is no burden.
const MinPiece = 8 << 10

// pools hold pieces that wait to be used again, by the exponent of their size.
var pools [bits.UintSize]sync.Pool

// PieceSize is the size of the piece that holds n bytes: a power of two.
func PieceSize(n int) int { return 1 << bits.Len(uint(max(n, MinPiece)-1)) }

// Piece returns a piece for at least n bytes, of its full length. What is in it is left from others.
func Piece(n int) []byte {
	size := PieceSize(n)
	if b, ok := pools[bits.TrailingZeros(uint(size))].Get().(*[]byte); ok {
		return *b
	}
	return make([]byte, size)
}

// Recycle takes back a piece that nobody uses any more. It may be anything: what did not come
// from Piece and cannot be used is left to the garbage collector.
func Recycle(b []byte) {
	size := cap(b)
	if size < MinPiece || size&(size-1) != 0 {
		return
	}
	b = b[:size]
	pools[bits.TrailingZeros(uint(size))].Put(&b)
}
