package memory

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// actor is somebody with a reader.
type actor struct {
	*Reader
	received atomic.Uint64
	paused   atomic.Bool
}

func (a *actor) Received() uint64 { return a.received.Load() }
func (a *actor) Paused() bool     { return a.paused.Load() }

func newActor(b *Budget) *actor {
	a := &actor{}
	a.Reader = b.NewReader(a)
	return a
}

// dontWait is how a reader waits that is not to wait at all.
func dontWait() (context.Context, func()) {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	return ctx, func() {}
}

// take takes memory on the way to a message, if it can be had at once.
func (a *actor) take(size, message int) bool {
	_, err := a.Piece(PieceSize(size), message, dontWait)
	return err == nil
}

func (a *actor) mustTake(tb testing.TB, size, message int) []byte {
	tb.Helper()
	piece, err := a.Piece(PieceSize(size), message, dontWait)
	require.NoError(tb, err)
	return piece
}

// waiting is somebody who takes memory in the background, until cancelled.
type waiting struct {
	granted chan error
	cancel  context.CancelFunc
}

func (a *actor) wait(size, message int) waiting {
	ctx, cancel := context.WithCancel(context.Background())
	w := waiting{make(chan error, 1), cancel}
	go func() {
		_, err := a.Piece(PieceSize(size), message, func() (context.Context, func()) {
			a.paused.Store(true)
			return ctx, func() { a.paused.Store(false) }
		})
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

func (w waiting) wantGivenUp(t *testing.T) {
	t.Helper()
	synctest.Wait()
	require.ErrorIs(t, <-w.granted, context.Canceled)
}

// crowd returns actors who hold all that can be had at once in steps of size bytes.
func crowd(t *testing.T, b *Budget, size int) (all []*actor) {
	t.Helper()
	for range 100_000 {
		a := newActor(b)
		if !a.take(size, size) {
			a.Close()
			return all
		}
		all = append(all, a)
	}
	t.Fatal("there is no end to it")
	return nil
}

// turnOf returns whose turn it is.
func turnOf(b *Budget) *actor {
	if b.turn == nil {
		return nil
	}
	return b.turn.holder.(*actor)
}

// wantIdle checks that nobody waits when nobody holds anything, and that nothing is counted.
func wantIdle(t *testing.T, b *Budget) {
	t.Helper()
	require.Zero(t, b.inUse())
	require.False(t, b.Pressed(), "somebody still waits")
	require.Nil(t, b.turn)
	for i := range b.classes {
		c := &b.classes[i]
		require.Zero(t, c.held.Load())
		require.Zero(t, c.wanted)
		for _, q := range c.queues {
			require.Equal(t, queue{}, q)
		}
	}
}

func TestNothingWaitsWhileThereIsRoom(t *testing.T) {
	b := newBudget()
	alice := newActor(b)
	for size := SmallMessage; size <= largest; size *= 2 { // as a message grows
		alice.mustTake(t, size, size)
		if size > SmallMessage {
			alice.Release(size / 2)
		}
	}
	require.EqualValues(t, largest, b.Reading())
	alice.Release(largest)
	wantIdle(t, b)
}

// However much others take of one size, something is left for all that is smaller, and who is small
// has a reserve that nothing large takes.
func TestRoomForTheSmall(t *testing.T) {
	for size := 2 * SmallMessage; size <= largest; size *= 2 {
		b := newBudget()
		crowd(t, b, size)
		for smaller := min(8*mib, size/4); smaller > SmallMessage; smaller /= 2 {
			require.True(t, newActor(b).take(smaller, smaller), "%d while others want %d", smaller, size)
		}
		crowd(t, b, SmallMessage+1)
		b.Up.Take(100 * mib) // and the links are slow
		reports := crowd(t, b, 100*kib)
		require.Len(t, reports, 24*mib/PieceSize(100*kib), "the reserve")
		reports[0].Close()
		require.Greater(t, len(crowd(t, b, 600)), 100*kib/600)
	}
}

// What is large does not wait for what is small, either.
func TestRoomForTheLarge(t *testing.T) {
	b := newBudget()
	crowd(t, b, SmallMessage)
	crowd(t, b, 513)
	require.LessOrEqual(t, b.Reading(), int64(24*mib))
	require.Greater(t, b.Reading(), int64(24*mib-513))
	require.True(t, newActor(b).take(largest, largest))
}

// What a reader holds of a message already does not stand in the way of the rest.
func TestMessageThatGrowsBesideATurn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBudget()
		slow, bob := newActor(b), newActor(b)
		require.True(t, slow.take(PieceSize(largest), largest), "its turn, for a long time")
		require.Same(t, slow, turnOf(b))
		const size = 10 * mib // less than half of the room
		for _, piece := range []int{512 << 10, 2 * mib, 8 * mib, size} {
			require.True(t, bob.take(PieceSize(piece), size), "%d bytes", piece)
			if held := bob.held[large].Load() - int64(PieceSize(piece)); held > 0 {
				bob.Release(int(held)) // the piece from which it grew
			}
		}
		bob.Close()
		slow.Close()
		wantIdle(t, b)
	})
}

// All readers together stay in what is theirs, whatever they read.
func TestWhatGoesUpStaysInItsShare(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBudget()
		var all []waiting
		for i := range 3000 {
			all = append(all, newActor(b).wait(600<<(i%17), 600<<(i%17)))
		}
		require.LessOrEqual(t, b.Reading(), int64(144*mib))
		require.Greater(t, b.Reading(), int64(50*mib))
		for _, w := range all {
			w.cancel()
		}
	})
}

// Messages up to SmallMessage wait for one another in the order in which they came.
func TestTheSmallWaitInOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBudget()
		all := crowd(t, b, SmallMessage)
		bob, cathy, dave := newActor(b).wait(SmallMessage, 0), newActor(b).wait(1000, 0), newActor(b).wait(SmallMessage, 0)
		all[0].Release(SmallMessage - 1000)
		require.False(t, newActor(b).take(600, 600), "there are others before it")
		bob.wantWaiting(t)
		cathy.wantWaiting(t)
		all[0].Release(1000)
		bob.wantGranted(t)
		cathy.wantWaiting(t)
		all[1].Close()
		cathy.wantGranted(t)
		dave.wantWaiting(t)
		all[2].Close()
		dave.wantGranted(t)
	})
}

// A message that has no room does not stand in the way of others that are smaller.
func TestTheLargeWaitBySize(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBudget()
		eve := newActor(b)
		eve.mustTake(t, mib, largest) // her turn
		require.Same(t, eve, turnOf(b))
		w := newActor(b).wait(SmallMessage, largest)
		w.wantWaiting(t)
		require.True(t, newActor(b).take(500*kib, 500*kib))
		alice := newActor(b)
		require.True(t, alice.take(8*mib, 8*mib))
		bob, cathy := newActor(b).wait(8*mib, 8*mib), newActor(b).wait(8*mib-1, 8*mib-1)
		require.True(t, newActor(b).take(mib, mib))
		alice.Close()
		bob.wantGranted(t) // they are about the same, and bob came first
		cathy.wantWaiting(t)
		w.cancel()
		cathy.cancel()
	})
}

func TestTurn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBudget()
		all := crowd(t, b, mib)
		turn := turnOf(b)
		require.NotNil(t, turn)
		require.True(t, turn.take(largest/2, largest), "with the turn, a message gets in")
		turn.Release(mib)
		require.True(t, turn.take(largest, largest))
		turn.Release(largest / 2)

		second, third := newActor(b), newActor(b)
		first, then := second.wait(mib, 20*mib), third.wait(mib, 20*mib)
		first.wantWaiting(t)
		turn.Release(largest - mib)
		first.wantWaiting(t) // it is not over yet
		turn.Release(mib)
		first.wantGranted(t)
		then.wantWaiting(t)
		require.True(t, second.take(largest, largest))
		second.Release(largest + mib)
		then.wantGranted(t)
		third.Release(mib)
		for _, a := range all {
			a.Close()
		}
		wantIdle(t, b)
	})
}

// Whoever has waited longest has the next turn, whatever its size.
func TestTurnsInOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBudget()
		crowd(t, b, SmallMessage+1)
		turn := turnOf(b)
		first, second, third := newActor(b).wait(mib, 50*mib), newActor(b).wait(mib, mib), newActor(b).wait(mib, 30*mib)
		turn.Close()
		first.wantGranted(t)
		turnOf(b).Close()
		second.wantGranted(t)
		turnOf(b).Close()
		third.wantGranted(t)
	})
}

// While outboxes hold what they may, there are turns; a message beyond that has to be written first.
func TestTurnsAndOutboxes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBudget()
		crowd(t, b, SmallMessage+1)
		turnOf(b).Close()
		b.Up.Take(24 * mib)
		require.True(t, newActor(b).take(SmallMessage, largest))
		turn := turnOf(b)
		require.NotNil(t, turn)
		require.True(t, turn.take(largest, largest))
		b.Up.Take(largest)
		turn.Close()
		w := newActor(b).wait(mib, largest)
		w.wantWaiting(t)
		b.Up.Give(largest / 2)
		w.wantWaiting(t)
		b.Up.Give(largest / 2)
		w.wantGranted(t)
	})
}

func TestWaitThatIsGivenUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, size := range []int{600, SmallMessage, mib} {
			b := newBudget()
			all := crowd(t, b, size)
			before := b.Reading()
			first, second, third := newActor(b).wait(size, size), newActor(b).wait(size, size), newActor(b).wait(size, size)
			second.cancel()
			second.wantGivenUp(t)
			require.Equal(t, before, b.Reading())
			first.cancel()
			first.wantGivenUp(t)
			for _, a := range all {
				a.Close()
			}
			third.wantGranted(t)
		}
	})
}

// Who gives up may be what others have waited behind.
func TestTheFirstInTheQueueGivesUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBudget()
		all := crowd(t, b, SmallMessage)
		bob, cathy := newActor(b).wait(SmallMessage, 0), newActor(b).wait(600, 0)
		all[0].Release(1000)
		cathy.wantWaiting(t)
		bob.cancel()
		bob.wantGivenUp(t)
		cathy.wantGranted(t)
	})
}

// What waits in a link's outbox makes readers of large messages wait, and its writing lets them go on.
func TestQueuesAndReaders(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBudget()
		newActor(b).mustTake(t, mib, largest) // the turn
		b.Up.Take(24 * mib)
		w := newActor(b).wait(mib, mib)
		require.True(t, newActor(b).take(SmallMessage, 0), "small ones do not wait for that")
		b.Up.Give(2*mib - 1)
		w.wantWaiting(t)
		b.Up.Give(1)
		w.wantGranted(t)
	})
}

// A message of unknown length begins small, and goes on as a large one.
func TestAMessageThatTurnsOutLarge(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBudget()
		alice := newActor(b)
		alice.mustTake(t, SmallMessage, 1000)
		require.EqualValues(t, SmallMessage, b.classes[small].held.Load())
		eve := newActor(b)
		eve.mustTake(t, mib, largest)
		b.Up.Take(24 * mib)
		w := alice.wait(SmallMessage*2, SmallMessage+1)
		w.wantWaiting(t)
		eve.Close()
		w.wantGranted(t)
		alice.Release(SmallMessage)
		require.Zero(t, b.classes[small].held.Load())
		require.EqualValues(t, SmallMessage*2, b.classes[large].held.Load())
		alice.Close()
		require.Zero(t, b.Reading())
	})
}

// Who announces a large message and stops does not stand in the way of a smaller one, whatever it holds.
func TestAnnouncedMessages(t *testing.T) {
	b := newBudget()
	for range 1000 {
		newActor(b).take(SmallMessage, 5*mib)
	}
	require.LessOrEqual(t, b.Reading(), int64(24*mib-2*5*mib+2*SmallMessage))
	alice := newActor(b)
	for _, n := range []int{SmallMessage, mib / 4, mib} {
		alice.mustTake(t, n, mib)
	}
}

// TestAnything has everybody take, wait, give up and give back at random, and then all leave: sums are
// those of the parts, limits are kept, and nobody is forgotten.
func TestAnything(t *testing.T) {
	const actors, messages = 60, 300
	size := MinSize(mib, 3)
	b := New(size, mib)
	var everybody sync.WaitGroup
	var read, waited, givenUp, most atomic.Int64
	for seed := range uint64(actors) {
		everybody.Go(func() {
			random := rand.New(rand.NewPCG(seed, 0))
			a := newActor(b)
			defer a.Close()
			for range messages {
				n := 513 << random.IntN(12)
				n = min(mib, n+random.IntN(n))
				if seed == 0 {
					checkSums(t, b, size)
					b.Laggards() // names whom it likes; nobody minds
				}
				held, ok := a.read(n, random, &waited)
				if !ok {
					givenUp.Add(1)
				}
				if used := b.inUse(); used > most.Load() {
					most.Store(used) // or somebody else's, which is about as much
				}
				if ok && random.IntN(4) == 0 {
					held = a.Shrink(held, max(513, n/3))
				}
				if ok && random.IntN(8) > 0 {
					b.Up.Take(len(held)) // in an outbox
					a.Release(len(held))
					b.Up.Give(len(held))
					b.Recycle(held)
					read.Add(1)
				} else if held != nil {
					a.Return(held)
				}
			}
		})
	}
	everybody.Wait()
	wantIdle(t, b)
	require.Empty(t, b.readers)
	require.Greater(t, read.Load(), int64(actors*messages/4))
	require.Positive(t, waited.Load(), "it was no crowd at all")
	require.Positive(t, givenUp.Load())
	require.LessOrEqual(t, most.Load(), size)
}

// read has a message of n bytes grow, as a socket does.
func (a *actor) read(n int, random *rand.Rand, waited *atomic.Int64) (held []byte, ok bool) {
	size := n
	if n > SmallMessage || random.IntN(2) == 0 {
		size = SmallMessage
	}
	message := n
	if random.IntN(2) == 0 {
		message = min(n, SmallMessage) // and more is not known yet
	}
	for {
		piece, err := a.Piece(PieceSize(size), message, func() (context.Context, func()) {
			waited.Add(1)
			if random.IntN(4) > 0 {
				return context.Background(), func() {}
			}
			return context.WithTimeout(context.Background(), time.Duration(random.IntN(1000))*time.Microsecond)
		})
		if err != nil {
			return held, false
		}
		a.received.Add(uint64(len(piece) - len(held)))
		if held != nil {
			a.Return(held)
		}
		if held = piece; len(held) >= n {
			return held, true
		}
		size, message = min(n, 2*len(held)), n
	}
}

// checkSums compares what is counted with what there is.
func checkSums(t *testing.T, b *Budget, size int64) {
	t.Helper()
	b.mu.Lock()
	defer b.mu.Unlock()
	n := b.withoutTurn() - b.Up.held.Load()
	assert.LessOrEqual(t, n, b.classes[large].room, "of those whose turn it is not")
	for i := range b.classes {
		c := &b.classes[i]
		waiting, wanted := int32(0), int64(0)
		for _, q := range c.queues {
			for w := q.first; w != nil; w = w.next {
				waiting++
				wanted += b.wants(w)
			}
		}
		assert.Equal(t, waiting, c.waiting.Load())
		assert.Equal(t, wanted, c.wanted)
	}
	pieces := 0
	for _, p := range &b.pieces {
		for _, piece := range p {
			pieces += len(piece)
		}
	}
	assert.EqualValues(t, pieces, b.free.Load())
	assert.LessOrEqual(t, b.inUse(), size)
}

// A message up to TinyMessage takes no lock.
func TestTinyMessagesTakeNoLock(t *testing.T) {
	b := newBudget()
	alice := newActor(b)
	b.mu.Lock()
	defer b.mu.Unlock()
	b.registry.Lock()
	defer b.registry.Unlock()
	allocations := testing.AllocsPerRun(100, func() {
		_, _ = alice.Piece(TinyMessage, TinyMessage, nil)
		b.Up.Take(TinyMessage)
		alice.Release(TinyMessage)
		b.Up.Give(TinyMessage)
	})
	require.InDelta(t, 1, allocations, 0, "its memory")
}

// BenchmarkWaiters is what one message costs while so many readers wait for memory for theirs.
func BenchmarkWaiters(b *testing.B) {
	for _, message := range []int{SmallMessage, largest} {
		for _, n := range []int{500, 5_000, 40_000} {
			b.Run(fmt.Sprintf("message=%dKiB/readers=%d", message/kib, n), func(b *testing.B) {
				budget := newBudget()
				type holding struct {
					*actor
					piece []byte
				}
				ready := make(chan holding, n)
				wait := func() (context.Context, func()) { return context.Background(), func() {} }
				take := func(a *actor) {
					piece, err := a.Piece(64*kib, message, wait)
					if err != nil {
						panic(err)
					}
					ready <- holding{a, piece}
				}
				for range n {
					go take(newActor(budget))
				}
				waiting := func() int {
					return int(budget.classes[small].waiting.Load() + budget.classes[large].waiting.Load())
				}
				for waiting()+len(ready) < n {
					time.Sleep(time.Millisecond)
				}
				b.ResetTimer()
				for range b.N { // whose message is read goes to wait again
					h := <-ready
					h.Return(h.piece)
					go take(h.actor)
				}
				b.StopTimer()
				for range n {
					h := <-ready
					h.Return(h.piece)
				}
			})
		}
	}
}

// BenchmarkGiveUp is what it costs to wait, and to give up, while so many others wait.
func BenchmarkGiveUp(b *testing.B) {
	for _, n := range []int{500, 5_000, 40_000} {
		b.Run(fmt.Sprintf("readers=%d", n), func(b *testing.B) {
			budget := newBudget()
			eve := newActor(budget)
			_, _ = eve.Piece(SmallMessage, largest, nil)
			ctx, cancel := context.WithCancel(context.Background())
			var everybody sync.WaitGroup
			for range n {
				everybody.Go(func() {
					_, _ = newActor(budget).Piece(SmallMessage, largest, func() (context.Context, func()) { return ctx, func() {} })
				})
			}
			for int(budget.classes[large].waiting.Load()) < n {
				time.Sleep(time.Millisecond)
			}
			alice := newActor(budget)
			for b.Loop() {
				alice.take(SmallMessage, largest)
			}
			cancel()
			everybody.Wait()
		})
	}
}
