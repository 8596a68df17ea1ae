package memory

import (
	"fmt"
	"net/netip"
	"testing"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	kib     = 1 << 10
	mib     = 1 << 20
	largest = 64 * mib
)

// newBudget returns the default one: 192 MiB are the limit, of which large messages have 24 MiB, and a
// turn 96 MiB.
func newBudget() *Budget { return New(256*mib, largest) }

func TestMinSize(t *testing.T) {
	require.EqualValues(t, 256*mib, MinSize(largest, 3), "the default")
	require.Equal(t, int64(4<<30), MinSize(1<<30, 64), "also where an int has 32 bits")
	for _, largest := range []int{1, kib, mib - 1, mib, mib + 1, 33 * mib, largest, 1 << 30} {
		for links := 1; links <= 128; links *= 2 {
			for _, size := range []int64{MinSize(largest, links), 2 * MinSize(largest, links), 1 << 40} {
				b := New(size, largest)
				require.GreaterOrEqual(t, b.classes[small].room, int64(leastSmall))
				queued := int64(links) * int64(LinkShare(size, links))
				require.GreaterOrEqual(t, b.classes[large].room, b.limit/8)
				require.LessOrEqual(t, queued, b.limit/8, "the outboxes of %d links", links)
				up := b.classes[small].room + b.classes[large].room + turnSize(largest)
				kept, requests := b.limit/4, b.limit/8
				down := b.limit/4 - (kept+requests)/2
				require.LessOrEqual(t, up+queued+down+kept+requests, size, "all together")
			}
		}
	}
}

func TestLinkShare(t *testing.T) {
	for _, test := range []struct {
		size  int64
		links int
		want  int
	}{
		{256 * mib, 1, 8 * mib},
		{256 * mib, 3, 8 * mib},
		{256 * mib, 6, 4 * mib},
		{64 * mib, 16, 384 * kib},
		{1 * mib, 16, 256 * kib},
	} {
		require.Equal(t, test.want, LinkShare(test.size, test.links), test)
	}
}

func TestExceeded(t *testing.T) {
	b := newBudget()
	b.Down.Take(192 * mib)
	require.Empty(t, b.Exceeded())
	b.Down.Take(1)
	require.Len(t, b.Exceeded(), 1)
	require.EqualValues(t, 1, b.Excess())
	require.EqualValues(t, 24*mib+1, b.ToFree())
	b.Down.Take(mib) // nobody has taken note yet
	<-b.Exceeded()
	b.Down.Give(2 * mib)
	b.Up.Take(10 * mib)
	require.Len(t, b.Exceeded(), 1, "what goes up needs room, too")
	require.EqualValues(t, 9*mib+1, b.Excess())
	<-b.Exceeded()
	b.Down.Give(191*mib + 1 - 48*mib) // its share is left
	b.Up.Take(300 * mib)
	require.Empty(t, b.Exceeded(), "what goes down has its share in any case")
	require.Zero(t, b.Excess())
	b.Down.Take(mib)
	require.Len(t, b.Exceeded(), 1)
	require.EqualValues(t, mib, b.Excess())
}

// What is read going up is counted as well, whichever class it is of.
func TestExceededByReaders(t *testing.T) {
	for _, size := range []int{513, 64 * kib, 10 * mib} {
		b := newBudget()
		alice := newActor(b)
		b.Down.Take(192 * mib)
		alice.mustTake(t, size, size)
		b.Down.Take(1)
		require.Len(t, b.Exceeded(), 1)
		require.EqualValues(t, PieceSize(size)+1, b.Excess())
		alice.Close()
		require.EqualValues(t, 1, b.Excess())
	}
}

// What is kept leaves less to messages going down, and of their share at least a quarter.
func TestKept(t *testing.T) {
	b := newBudget()
	require.True(t, b.Kept.Take(0, 24*mib), "half of what is free")
	require.False(t, b.Kept.Take(24*mib, 1), "who has that much gets no more")
	require.True(t, b.Kept.Take(0, 12*mib))
	require.False(t, b.Kept.Take(12*mib, 1))
	require.False(t, b.Kept.Take(0, 12*mib+1))
	require.True(t, b.Kept.Take(0, 12*mib), "somebody new gets something")
	require.False(t, b.Kept.Take(0, 1), "all is taken")
	require.EqualValues(t, 48*mib, b.Kept.Held())

	b.Down.Take(144 * mib)
	require.LessOrEqual(t, b.Excess(), int64(0))
	b.Down.Take(1)
	require.Len(t, b.Exceeded(), 1, "it counts in what is taken")
	b.Up.Take(1000 * mib)
	require.EqualValues(t, 120*mib+1, b.Excess(), "24 MiB of what goes down are left alone")

	b.Kept.Give(48 * mib)
	require.Zero(t, b.Kept.Held())
	require.True(t, b.Kept.Take(0, 48*mib), "what is given can be taken again")
	b.Kept.Give(48 * mib)
}

func TestRequests(t *testing.T) {
	b := newBudget()
	eve, bob := netip.MustParsePrefix("192.0.2.1/32"), netip.MustParsePrefix("192.0.2.2/32")
	taken := 0
	for b.Requests.Take(eve, 64*kib) {
		taken += 64 * kib
	}
	require.InDelta(t, 24*mib*4/5, taken, 64*kib, "four fifths of what there is for requests")
	require.True(t, b.Requests.Take(bob, 64*kib), "others still get in")
	require.EqualValues(t, taken+64*kib, b.Requests.Held())
	b.Down.Take(192*mib - taken - 64*kib)
	require.Empty(t, b.Exceeded())
	require.True(t, b.Requests.Take(bob, 1))
	require.Len(t, b.Exceeded(), 1, "they count in what is taken")
	b.Requests.Give(eve, taken)
	b.Requests.Give(bob, 64*kib+1)
	require.Zero(t, b.Requests.Held())
	require.True(t, b.Requests.Take(eve, 24*mib), "what is given can be taken again")
}

func TestPieceSize(t *testing.T) {
	for _, test := range []struct{ n, size int }{
		{513, 513},
		{TinyMessage, TinyMessage},
		{TinyMessage + 1, minPiece},
		{minPiece, minPiece},
		{minPiece + 1, 10 << 10},
		{10 << 10, 10 << 10},
		{15 << 10, 16 << 10},
		{16 << 10, 16 << 10},
		{SmallMessage, SmallMessage},
		{64 * mib, 64 * mib},
		{64*mib + 1, 80 * mib},
	} {
		require.Equal(t, test.size, PieceSize(test.n), test.n)
		require.Equal(t, test.size, PieceSize(test.size), test.n)
	}
	last := -1
	for size := minPiece; size < 1<<30; size = PieceSize(size + 1) {
		require.Equal(t, sizeIndex(minPiece)+last+1, sizeIndex(size), size)
		require.Less(t, PieceSize(size+1), size+size/4+2)
		last++
	}
}

func TestPieces(t *testing.T) {
	b := newBudget()
	piece := b.Down.Piece(10 << 10)
	require.Len(t, piece, 10<<10)
	piece[0] = 42
	b.Down.Give(10 << 10)
	b.Recycle(piece[:10])
	require.EqualValues(t, 10<<10, b.free.Load())
	require.Len(t, b.Down.Piece(12<<10), 12<<10)
	alice := newActor(b)
	again := alice.mustTake(t, 10<<10, 0)
	require.Len(t, again, 10<<10, "of its full length again")
	require.EqualValues(t, 42, again[0], "not used again")
	require.Zero(t, b.free.Load())
	alice.Return(again)
	require.EqualValues(t, 10<<10, b.free.Load())
	require.Zero(t, b.Reading())
	b.dropLocked(0)
	for _, odd := range [][]byte{nil, {}, make([]byte, 100), make([]byte, 4096), make([]byte, 10_000)} {
		b.Recycle(odd)
	}
	require.Zero(t, b.free.Load())

	for i := range 8 {
		b.Recycle(make([]byte, minPiece<<i))
	}
	free := b.free.Load()
	b.Trim()
	require.LessOrEqual(t, b.free.Load(), free/2)
	for range 20 {
		b.Trim()
	}
	require.Zero(t, b.free.Load())
}

// Large memory that waited is used again, too.
func TestPiecesOfLargeMessages(t *testing.T) {
	b := newBudget()
	piece := make([]byte, mib)
	b.Recycle(piece)
	alice := newActor(b)
	require.Same(t, &piece[0], &alice.mustTake(t, mib, mib)[0])
	require.Zero(t, b.free.Load())
	alice.Return(piece)
	require.EqualValues(t, mib, b.free.Load())
}

func TestShrink(t *testing.T) {
	b := newBudget()
	fill := func(piece []byte) []byte {
		for i := range piece {
			piece[i] = byte(i * 7)
		}
		return piece
	}
	for _, test := range []struct{ size, n int }{{SmallMessage, 600}, {SmallMessage, 20_000}, {4 * mib, 300_000}} {
		want := make([]byte, test.n)
		fill(want)

		got := b.Down.Shrink(fill(b.Down.Piece(test.size)), test.n)
		require.Equal(t, want, got[:test.n])
		require.EqualValues(t, PieceSize(test.n), b.Down.Held())
		b.Down.Return(got)
		require.Zero(t, b.Down.Held())

		alice := newActor(b)
		got = alice.Shrink(fill(alice.mustTake(t, test.size, test.size)), test.n)
		require.Equal(t, want, got[:test.n])
		require.Len(t, got, PieceSize(test.n))
		require.EqualValues(t, len(got), b.Reading())
		alice.Return(got)
		require.Zero(t, b.Reading())
	}
}

// What waits to be used again goes when memory is short.
func TestFreePiecesMakeRoom(t *testing.T) {
	b := newBudget()
	for range 10 {
		b.Recycle(make([]byte, 8*mib))
	}
	b.Down.Take(136 * mib)
	require.EqualValues(t, 56*mib, b.free.Load())
	require.Empty(t, b.Exceeded())
	b.Recycle(make([]byte, 8*mib))
	require.EqualValues(t, 56*mib, b.free.Load(), "there is no room for it")
	require.True(t, b.Kept.Take(0, 8*mib))
	require.EqualValues(t, 48*mib, b.free.Load())
	b.Down.Take(60 * mib)
	require.Zero(t, b.free.Load())
	require.Len(t, b.Exceeded(), 1)
}

// At the limit, what waits to be used again is used, not let go to make room for new memory.
func TestPiecesAtTheLimit(t *testing.T) {
	b := newBudget()
	b.Down.Take(184 * mib)
	piece := make([]byte, 8*mib)
	b.Recycle(piece)
	require.Same(t, &piece[0], &b.Down.Piece(8 * mib)[0])
	require.Empty(t, b.Exceeded())
	b.Down.Give(8 * mib)
	b.Recycle(piece)
	require.Same(t, &piece[0], &newActor(b).mustTake(t, 8*mib, 0)[0])
}

func BenchmarkAccount(b *testing.B) {
	budget := newBudget()
	for b.Loop() {
		budget.Up.Take(300)
		budget.Up.Give(300)
	}
}

// BenchmarkRelay is what a message costs here from its reader to the end of its outbox.
func BenchmarkRelay(b *testing.B) {
	for _, size := range []int{TinyMessage, 64 * kib, mib} {
		b.Run(fmt.Sprint(size), func(b *testing.B) {
			budget := newBudget()
			b.RunParallel(func(pb *testing.PB) {
				alice := newActor(budget)
				defer alice.Close()
				for pb.Next() {
					message, _ := alice.Piece(size, size, nil)
					budget.Up.Take(size)
					alice.Release(size)
					budget.Up.Give(size)
					budget.Recycle(message)
				}
			})
		})
	}
}
