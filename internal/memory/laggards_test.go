package memory

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
)

// named returns whom Laggards names for so long, each once. Who is named is not closed.
func named(b *Budget, d time.Duration) (all []*actor) {
	seen := map[*actor]bool{}
	for range d / LaggardsInterval {
		for _, h := range b.Laggards() {
			if a := h.(*actor); !seen[a] {
				seen[a] = true
				all = append(all, a)
			}
		}
		time.Sleep(LaggardsInterval)
	}
	return all
}

// closeLaggards closes who is named, as the gateway does, while somebody waits, and for d at most.
func closeLaggards(b *Budget, d time.Duration) (closed int, took time.Duration) {
	for begin := time.Now(); ; time.Sleep(LaggardsInterval) {
		synctest.Wait()
		if took = time.Since(begin); took >= d || !b.Pressed() {
			return closed, took
		}
		for _, h := range b.Laggards() {
			h.(*actor).Close()
			closed++
		}
	}
}

// trickle has an actor receive n bytes ten times a second.
func (a *actor) trickle(t *testing.T, n int) {
	t.Helper()
	tick := time.NewTicker(time.Second / 10)
	done := make(chan struct{})
	t.Cleanup(func() { close(done) })
	go func() {
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				a.received.Add(uint64(n))
			case <-done:
				return
			}
		}
	}()
}

func TestNobodyLagsWhileNobodyWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBudget()
		crowd(t, b, SmallMessage)
		crowd(t, b, mib)
		require.False(t, b.Pressed())
		<-b.Exceeded() // by crowd, which tried to wait
		require.Empty(t, named(b, 10*time.Second))

		w := newActor(b).wait(SmallMessage, 0)
		require.True(t, b.Pressed())
		require.Len(t, b.Exceeded(), 1, "whoever makes room is called")
		require.Empty(t, named(b, 500*time.Millisecond), "those who hold memory have had no time")
		w.cancel()
	})
}

// 20 connections stop in the middle of messages, and one dawdles: others get theirs in within a second.
func TestTheIdleGo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, size := range []int{600, 100 * kib, mib, 8 * mib} {
			b := newBudget()
			crowd(t, b, size)
			bob := newActor(b).wait(size, size)
			_, took := closeLaggards(b, time.Minute)
			bob.wantGranted(t)
			require.Less(t, took, time.Second)
		}
	})
}

// Only as many have to go as are needed for those who wait.
func TestOnlyAsManyGoAsHaveTo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBudget()
		all := crowd(t, b, SmallMessage)
		bob := newActor(b).wait(SmallMessage, 0)
		closed, _ := closeLaggards(b, time.Minute)
		bob.wantGranted(t)
		require.Equal(t, 1, closed)

		cathy, dave := newActor(b).wait(SmallMessage, 0), newActor(b).wait(1000, 0)
		closed, _ = closeLaggards(b, time.Minute)
		cathy.wantGranted(t)
		dave.wantGranted(t)
		require.Equal(t, 2, closed)
		require.Len(t, all, 192)
	})
}

// The turn is what others wait for, even if it holds little.
func TestATurnThatIsNotUsedEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBudget()
		eve := newActor(b)
		eve.mustTake(t, SmallMessage, largest)
		other := newActor(b)
		other.mustTake(t, mib, mib)
		bob := newActor(b).wait(SmallMessage, largest)
		require.Equal(t, []*actor{eve}, named(b, time.Second), "it is hers alone that is in the way")
		eve.Close()
		bob.wantGranted(t)
	})
}

// Whoever has the turn has to be quick about it: a message of 64 MiB in 20 s.
func TestATurnIsShort(t *testing.T) {
	for rate, goes := range map[uint64]bool{largest / 20 * 11 / 10: false, largest / 20 * 9 / 10: true} {
		synctest.Test(t, func(t *testing.T) {
			b := newBudget()
			eve := newActor(b)
			eve.mustTake(t, SmallMessage, largest)
			require.Same(t, eve, turnOf(b))
			bob := newActor(b).wait(SmallMessage, largest)
			gone := false
			for range 40 {
				gone = gone || len(named(b, LaggardsInterval)) > 0
				eve.received.Add(rate / 4)
			}
			require.Equal(t, goes, gone, "%d bytes a second", rate)
			bob.cancel()
		})
	}
}

// Those go first that have received nothing for longest.
func TestTheLongestIdleGoFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBudget()
		all := crowd(t, b, SmallMessage)
		eve := all[100]
		for _, a := range all {
			if a != eve {
				a.received.Add(1)
			}
		}
		bob := newActor(b).wait(SmallMessage, 0)
		require.Empty(t, named(b, 250*time.Millisecond))
		for _, a := range all {
			if a != eve {
				a.received.Add(1)
			}
		}
		require.Equal(t, []*actor{eve}, named(b, 10*time.Second))
		bob.cancel()
	})
}

// When readers and outboxes hold so much that nobody can have a turn, as many have to go as are in its way.
func TestNobodyCanHaveATurn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBudget()
		all := crowd(t, b, mib)
		turnOf(b).Close()
		b.Up.Take(30 * mib)
		bob := newActor(b).wait(SmallMessage, largest)
		require.Nil(t, b.turn)
		closed, took := closeLaggards(b, time.Minute)
		bob.wantGranted(t)
		require.Less(t, took, time.Second)
		require.Equal(t, len(all)-1+30-24-24, closed)
	})
}

func TestTheSlowGo(t *testing.T) {
	for _, test := range []struct {
		size, rate int
		slow       bool
	}{
		{100 * kib, 15 * kib, true},
		{100 * kib, 18 * kib, false},
		{mib, 190 * kib, true},
		{mib, 250 * kib, false},
	} {
		synctest.Test(t, func(t *testing.T) {
			b := newBudget()
			for _, a := range crowd(t, b, test.size) {
				a.received.Add(10 * mib) // what came before counts for nothing
				a.trickle(t, test.rate/10)
			}
			bob := newActor(b).wait(test.size, test.size)
			require.Empty(t, named(b, time.Second), "it is measured for a second")
			require.Equal(t, test.slow, len(named(b, 10*time.Second)) > 0, test)
			bob.cancel()
		})
	}
}

// A burst now and then is no excuse for the time in between.
func TestTheRateIsMeasuredAnew(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBudget()
		eve := newActor(b)
		eve.mustTake(t, mib, largest)
		bob := newActor(b).wait(mib, largest)
		eve.trickle(t, 10*kib)
		require.Empty(t, named(b, 250*time.Millisecond))
		eve.received.Add(32 * mib)
		require.Empty(t, named(b, time.Second))
		require.Equal(t, []*actor{eve}, named(b, 3*time.Second))
		bob.cancel()
	})
}

// Who waits for its link, or for memory, cannot make progress.
func TestWhoWaitsIsNotAtFault(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBudget()
		all := crowd(t, b, mib)
		for _, a := range all {
			a.paused.Store(true)
		}
		bob := newActor(b).wait(mib, mib)
		require.Empty(t, named(b, time.Minute))
		all[0].paused.Store(false)
		require.Empty(t, named(b, 500*time.Millisecond), "it had no time to go on")
		require.Equal(t, all[:1], named(b, time.Second))
		all[0].paused.Store(true)

		// A reader in the middle of its message waits for more.
		w := all[1].wait(2*mib, 2*mib)
		require.Empty(t, named(b, time.Minute))
		bob.cancel()
		w.cancel()
	})
}

// Who waits for large memory while it holds small has to go, for others who want small: those could
// otherwise be shut out by many whose messages turn out large. But first those who just do not read on.
func TestTheSmallDoNotWaitForTheLarge(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBudget()
		eve := newActor(b)
		eve.mustTake(t, mib, largest)
		eve.paused.Store(true) // for ever
		b.Up.Take(24 * mib)
		all := crowd(t, b, SmallMessage)
		var grow []waiting
		for _, a := range all[1:] {
			grow = append(grow, a.wait(2*SmallMessage, SmallMessage+1))
		}
		bob := newActor(b).wait(SmallMessage, 0)
		require.Equal(t, all[:1], named(b, time.Minute), "it does not read on")
		cathy := newActor(b).wait(SmallMessage, 0)
		require.Len(t, named(b, time.Second), 2, "and one that waits")
		for _, w := range grow {
			w.cancel()
		}
		bob.cancel()
		cathy.cancel()
	})
}

// Who holds nothing is nobody's business, and who has gone is forgotten.
func TestNobodyIsRemembered(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBudget()
		all := crowd(t, b, SmallMessage)
		bob := newActor(b)
		w := bob.wait(SmallMessage, 0)
		require.Len(t, named(b, time.Second), 1)
		require.Len(t, b.marks[small], len(all))
		for _, a := range all {
			a.Close()
		}
		w.wantGranted(t)
		require.Empty(t, b.Laggards())
		require.Empty(t, b.marks[small])
		require.Equal(t, []*Reader{bob.Reader}, b.readers)
		bob.Close()
		require.Empty(t, b.readers)
		wantIdle(t, b)
	})
}
