package memory

import (
	"context"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	mib     = 1 << 20
	largest = 64 * mib
)

// dontWait is how a reader waits that is not to wait at all.
func dontWait() (context.Context, func()) {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	return ctx, func() {}
}

// try reserves n bytes, if they can be had at once.
func try(r *Reader, n int) bool {
	_, err := r.Piece(n, n, dontWait)
	return err == nil
}

// waiting reserves n bytes in the background, until cancelled.
type waiting struct {
	granted chan error
	cancel  context.CancelFunc
}

func wait(r *Reader, n int) waiting {
	ctx, cancel := context.WithCancel(context.Background())
	w := waiting{make(chan error, 1), cancel}
	go func() {
		_, err := r.Piece(n, n, func() (context.Context, func()) { return ctx, cancel })
		w.granted <- err
	}()
	synctest.Wait()
	return w
}

func (w waiting) wantWaiting(t *testing.T) {
	t.Helper()
	synctest.Wait()
	require.Empty(t, w.granted, "it has not waited")
}

func (w waiting) wantGranted(t *testing.T) {
	t.Helper()
	synctest.Wait()
	require.Len(t, w.granted, 1, "it still waits")
	require.NoError(t, <-w.granted)
}

// hoggers returns readers that hold all that can be had in steps of n bytes, one of them with its turn.
func hoggers(t *testing.T, b *Budget, n int) (turn *Reader, others []*Reader) {
	t.Helper()
	for range 20_000 {
		r := b.NewReader()
		if !try(&r, n) {
			require.NotNil(t, b.turn)
			return b.turn, others
		}
		others = append(others, &r)
	}
	t.Fatal("there is no end to it")
	return nil, nil
}

func TestNothingWaitsWhileThereIsRoom(t *testing.T) {
	b := withLimit(256*mib, largest)
	r := b.NewReader()
	for size := MinPiece; size <= largest; size *= 2 { // as a message grows
		require.True(t, try(&r, size), size)
		if size > MinPiece {
			r.Release(size / 2)
		}
	}
	require.Equal(t, largest, b.Up.Held())
	r.Release(largest)
	require.Zero(t, b.Up.Held())
}

// However much the large take, something is left for the small.
func TestRoomForTheSmall(t *testing.T) {
	for size := MinPiece; size <= largest; size *= 2 {
		b := withLimit(256*mib, largest)
		hoggers(t, b, size)
		for small := size / 4; small >= MinPiece; small /= 2 {
			r := b.NewReader()
			require.True(t, try(&r, small), "%d while others want %d", small, size)
		}
		require.LessOrEqual(t, b.Up.Held(), 192*mib)
	}
}

func TestWhatGoesUpStaysInItsShare(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := withLimit(256*mib, largest)
		var all []waiting
		for i := range 300 {
			r := b.NewReader()
			all = append(all, wait(&r, MinPiece<<(i%14)))
		}
		assert.LessOrEqual(t, b.Up.Held(), 192*mib)
		for _, w := range all {
			w.cancel()
		}
	})
}

func TestTurn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := withLimit(256*mib, largest)
		turn, _ := hoggers(t, b, mib)
		require.True(t, try(turn, largest/2), "with the turn, a message gets in")
		require.True(t, try(turn, largest))
		turn.Release(largest / 2)

		second, third := b.NewReader(), b.NewReader()
		first := wait(&second, mib)
		then := wait(&third, mib)
		first.wantWaiting(t)
		turn.Release(largest)
		first.wantWaiting(t) // it is not over yet
		turn.Release(mib)
		first.wantGranted(t)
		then.wantWaiting(t)
		require.True(t, try(&second, largest))
		second.Release(largest + mib)
		then.wantGranted(t)
		third.Release(mib)
	})
}

// A turn has to be used while others wait.
func TestOverdueTurn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := withLimit(256*mib, largest)
		turn, others := hoggers(t, b, mib)
		for received := range uint64(5) {
			require.False(t, turn.Overdue(received, 1000), "nobody waits")
		}
		r := b.NewReader()
		w := wait(&r, mib)
		require.False(t, turn.Overdue(2004, 1000))
		require.False(t, others[0].Overdue(0, 1000), "it is not its turn")
		require.False(t, turn.Overdue(3004, 1000))
		require.True(t, turn.Overdue(4003, 1000))
		turn.Release(mib)
		w.wantGranted(t)
		second := b.NewReader()
		w = wait(&second, mib)
		require.False(t, r.Overdue(0, 1000), "its turn has just begun")
		require.True(t, r.Overdue(999, 1000))
		w.cancel()
	})
}

func TestWaitThatIsGivenUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := withLimit(256*mib, largest)
		turn, _ := hoggers(t, b, mib)
		impatient, patient := b.NewReader(), b.NewReader()
		w, next := wait(&impatient, mib), wait(&patient, mib)
		held := b.Up.Held()
		w.cancel()
		synctest.Wait()
		require.ErrorIs(t, <-w.granted, context.Canceled)
		require.Equal(t, held, b.Up.Held())
		turn.Release(mib)
		next.wantGranted(t)
	})
}

// What waits in a link's outbox makes readers wait, and its writing lets them go on.
func TestQueuesAndReaders(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := withLimit(256*mib, largest)
		b.Up.Take(100 * mib)
		r := b.NewReader()
		w := wait(&r, mib)
		b.Up.Give(3 * mib)
		w.wantWaiting(t)
		b.Up.Give(mib) // as much as fits but for a turn
		w.wantGranted(t)
		second := b.NewReader()
		w = wait(&second, 2*mib)
		b.Up.Give(4*mib - 1)
		w.wantWaiting(t)
		b.Up.Give(1)
		w.wantGranted(t)
	})
}

func TestExceeded(t *testing.T) {
	b := withLimit(256*mib, largest)
	b.Down.Take(256 * mib)
	require.Empty(t, b.Exceeded())
	b.Down.Take(1)
	require.Len(t, b.Exceeded(), 1)
	require.Equal(t, 1, b.Excess())
	b.Down.Take(mib) // nobody has taken note yet
	<-b.Exceeded()
	b.Down.Give(2 * mib)
	b.Up.Take(10 * mib)
	require.Len(t, b.Exceeded(), 1, "what goes up needs room, too")
	require.Equal(t, 9*mib+1, b.Excess())
	<-b.Exceeded()
	b.Down.Give(200 * mib)
	b.Up.Take(300 * mib)
	require.Empty(t, b.Exceeded(), "what goes down has its share in any case")
	require.LessOrEqual(t, b.Excess(), 0)
	b.Down.Take(20 * mib)
	require.Len(t, b.Exceeded(), 1)
	require.Equal(t, 11*mib+1, b.Excess())
}

// Everybody gets their message in, in the end, and nothing stays counted.
func TestCrowd(t *testing.T) {
	const readers, messages = 50, 200
	b := New(MinSize(mib), mib)
	var done sync.WaitGroup
	var most, got atomic.Int64
	for seed := range uint64(readers) {
		done.Go(func() {
			random := rand.New(rand.NewPCG(seed, 0))
			r := b.NewReader()
			for range messages {
				size := MinPiece << random.IntN(8)
				held := 0
				for n := MinPiece; n <= size; n *= 2 {
					_, err := r.Piece(n, n, func() (context.Context, func()) {
						return context.WithTimeout(context.Background(), time.Minute)
					})
					if err != nil {
						t.Error(err)
						return
					}
					r.Release(held)
					held = n
					most.Store(max(most.Load(), int64(b.Up.Held())))
				}
				b.Up.Take(size) // in an outbox
				r.Release(held)
				b.Up.Give(size)
				got.Add(1)
			}
		})
	}
	done.Wait()
	require.EqualValues(t, readers*messages, got.Load())
	require.Zero(t, b.Up.Held())
	require.Less(t, most.Load(), int64(readers*mib), "it was no crowd at all")
	require.Empty(t, b.waiting)
}

// Who announces a large message and stops does not stand in the way of a smaller one, whatever it holds.
func TestAnnouncedMessages(t *testing.T) {
	b := withLimit(256*mib, largest)
	for range 1000 {
		r := b.NewReader()
		_, _ = r.Piece(mib, 20*mib, dontWait)
	}
	require.LessOrEqual(t, b.Up.Held(), 96*mib-2*20*mib+2*mib)
	small := b.NewReader()
	for _, n := range []int{mib / 16, mib / 4, mib} {
		_, err := small.Piece(n, 5*mib, dontWait)
		require.NoError(t, err)
	}
}

func TestPieceSize(t *testing.T) {
	for _, test := range []struct{ n, size int }{
		{0, MinPiece},
		{1, MinPiece},
		{MinPiece, MinPiece},
		{MinPiece + 1, 10 << 10},
		{10 << 10, 10 << 10},
		{15 << 10, 16 << 10},
		{16 << 10, 16 << 10},
		{64 * mib, 64 * mib},
		{64*mib + 1, 80 * mib},
	} {
		require.Equal(t, test.size, PieceSize(test.n), test.n)
		require.Equal(t, test.size, PieceSize(test.size), test.n)
	}
	last := -1
	for size := MinPiece; size < 1<<30; size = PieceSize(size + 1) {
		require.Equal(t, sizeIndex(MinPiece)+last+1, sizeIndex(size), size)
		require.Less(t, PieceSize(size+1), size+size/4+2)
		last++
	}
}

func TestPieces(t *testing.T) {
	b := withLimit(256*mib, largest)
	piece := b.Down.Piece(10 << 10)
	require.Len(t, piece, 10<<10)
	piece[0] = 42
	b.Down.Give(10 << 10)
	b.Recycle(piece[:10])
	require.EqualValues(t, 10<<10, b.free.Load())
	require.Len(t, b.Down.Piece(12<<10), 12<<10)
	r := b.NewReader()
	again, err := r.Piece(10<<10, 0, dontWait)
	require.NoError(t, err)
	require.Len(t, again, 10<<10, "of its full length again")
	require.EqualValues(t, 42, again[0], "not used again")
	require.Zero(t, b.free.Load())
	r.Return(again)
	require.EqualValues(t, 10<<10, b.free.Load())
	require.Zero(t, b.Up.Held())
	b.dropLocked(0)
	for _, odd := range [][]byte{nil, {}, make([]byte, 100), make([]byte, 4096), make([]byte, 10_000)} {
		b.Recycle(odd)
	}
	require.Zero(t, b.free.Load())

	for i := range 8 {
		b.Recycle(make([]byte, MinPiece<<i))
	}
	free := b.free.Load()
	b.Trim()
	require.LessOrEqual(t, b.free.Load(), free/2)
	for range 20 {
		b.Trim()
	}
	require.Zero(t, b.free.Load())
}

// What waits to be used again goes when memory is short.
func TestFreePiecesMakeRoom(t *testing.T) {
	b := withLimit(256*mib, largest)
	for range 10 {
		b.Recycle(make([]byte, 8*mib))
	}
	b.Down.Take(200 * mib)
	require.EqualValues(t, 56*mib, b.free.Load())
	require.Empty(t, b.Exceeded())
	b.Recycle(make([]byte, 8*mib))
	require.EqualValues(t, 56*mib, b.free.Load(), "there is no room for it")
	b.Down.Take(60 * mib)
	require.Zero(t, b.free.Load())
	require.Len(t, b.Exceeded(), 1)
}

// At the limit, what waits to be used again is used, not let go to make room for new memory.
func TestPiecesAtTheLimit(t *testing.T) {
	b := withLimit(256*mib, largest)
	b.Down.Take(248 * mib)
	piece := make([]byte, 8*mib)
	b.Recycle(piece)
	require.Same(t, &piece[0], &b.Down.Piece(8 * mib)[0])
	require.Empty(t, b.Exceeded())
	b.Down.Give(8 * mib)
	b.Recycle(piece)
	r := b.NewReader()
	again, err := r.Piece(8*mib, 0, dontWait)
	require.NoError(t, err)
	require.Same(t, &piece[0], &again[0])
}

func BenchmarkAccount(b *testing.B) {
	budget := withLimit(256*mib, largest)
	for b.Loop() {
		budget.Up.Take(300)
		budget.Up.Give(300)
	}
}
