package window

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// at is a time of the test's own clock.
func at(d time.Duration) int64 { return int64(time.Hour + d) }

func TestFirstPingGoesBeforeAnythingElse(t *testing.T) {
	w := New(at(0))
	require.True(t, w.PingDue(at(0)))
	require.LessOrEqual(t, w.Next(), at(0))
	require.False(t, w.Answers())
	w.Sent(1)
	require.True(t, w.PingDue(at(0)), "whatever is said before it")
	w = New(at(0))
	number := w.Ping(at(0))
	require.False(t, w.PingDue(at(time.Second)), "the first is on its way, and nothing was sent")

	read, took, ok := w.Pong(number, at(5*time.Millisecond), false)
	require.True(t, ok)
	require.Zero(t, read)
	require.Equal(t, 5*time.Millisecond, took)
	require.True(t, w.Answers())
	require.Equal(t, never, w.Next(), "an idle link is not pinged")

	_, _, ok = w.Pong(number, at(6*time.Millisecond), false)
	require.False(t, ok, "twice")
	_, _, ok = w.Pong(number+1, at(6*time.Millisecond), false)
	require.False(t, ok, "never sent")
}

// answering returns the window of a link, at at(0), whose first ping took so long.
func answering(t *testing.T, roundTrip time.Duration) *Window {
	t.Helper()
	w := New(at(-roundTrip))
	_, _, ok := w.Pong(w.Ping(at(-roundTrip)), at(0), false)
	require.True(t, ok)
	return w
}

// fill sends messages of so many bytes until the window is closed, and returns how many went.
func fill(w *Window, bytes int) (n int) {
	for ; w.Open(); n++ {
		w.Sent(bytes)
	}
	return n
}

// wantPing makes sure that a ping is due at a time and no sooner, and sends it.
func wantPing(t *testing.T, w *Window, d time.Duration) (number uint64) {
	t.Helper()
	require.False(t, w.PingDue(at(d)-1))
	require.Equal(t, at(d), w.Next())
	require.True(t, w.PingDue(at(d)))
	return w.Ping(at(d))
}

func TestWindowIsClosedByMessagesAndByBytes(t *testing.T) {
	w := New(at(0))
	require.Equal(t, 16, fill(w, 100))
	messages, bytes := w.Unacknowledged()
	require.Equal(t, 16, messages)
	require.Equal(t, 1600, bytes)

	w = New(at(0))
	require.Equal(t, 4, fill(w, 64<<10), "256 KiB")

	w = New(at(0))
	require.Equal(t, 1, fill(w, 64<<20), "a message larger than the window goes when nothing is on its way")
}

func TestQuestionsPassAClosedWindowAndCount(t *testing.T) {
	w := answering(t, ms)
	fill(w, 100)
	w.Sent(1000)
	messages, bytes := w.Unacknowledged()
	require.Equal(t, 17, messages)
	require.Equal(t, 2600, bytes)
	require.False(t, w.Open())
}

func TestPongAcknowledgesAllBeforeItsPing(t *testing.T) {
	w := answering(t, ms)
	w.Sent(100)
	w.Sent(200)
	lost := w.Ping(at(10 * ms))
	w.Sent(300)
	second := w.Ping(at(20 * ms))
	w.Sent(400)

	read, took, ok := w.Pong(second, at(25*ms), true)
	require.True(t, ok)
	require.EqualValues(t, 3, read)
	require.Equal(t, 5*ms, took)
	messages, bytes := w.Unacknowledged()
	require.Equal(t, 1, messages)
	require.Equal(t, 400, bytes)

	read, _, ok = w.Pong(lost, at(26*ms), true)
	require.False(t, ok, "a later one was answered")
	require.EqualValues(t, 3, read)
}

func TestPingFollowsAQuarterOfTheWindow(t *testing.T) {
	w := answering(t, ms)
	fill(w, 100)
	w.Pong(w.Ping(at(0)), at(ms), true) // and now the window is 32, and judged
	require.True(t, w.Open())
	for range 15 {
		w.Sent(100)
	}
	require.Equal(t, at(100*ms), w.Next(), "less than half of it is on its way")
	w.Sent(100)
	wantPing(t, w, 10*ms)
	for range 7 {
		w.Sent(100)
	}
	require.Equal(t, at(110*ms), w.Next())
	w.Sent(100)
	wantPing(t, w, 20*ms)

	w = answering(t, ms)
	w.Sent(1)
	wantPing(t, w, 99*ms) // the first went a millisecond before 0
}

func TestPingThatIsLostIsReplaced(t *testing.T) {
	w := answering(t, ms)
	w.Sent(1)
	w.Ping(at(0))
	wantPing(t, w, 100*ms)
	wantPing(t, w, 300*ms)
	wantPing(t, w, 700*ms)
	wantPing(t, w, 1500*ms)
	wantPing(t, w, 3100*ms)
	last := wantPing(t, w, 5100*ms)
	_, _, ok := w.Pong(last-2, at(5500*ms), false)
	require.True(t, ok, "the answer of one that was replaced counts, too")
	messages, _ := w.Unacknowledged()
	require.Zero(t, messages)
	require.Equal(t, never, w.Next())
}

func TestNoMoreThanEightPingsAreOnTheirWay(t *testing.T) {
	w := answering(t, ms)
	now := time.Duration(0)
	for range 8 {
		w.Sent(1)
		now += 100 * ms
		wantPing(t, w, now-ms)
	}
	w.Sent(1)
	wantPing(t, w, now-ms+2*time.Second)
}

func TestWindowGrowsOnlyWhereItHeldTheWriterUp(t *testing.T) {
	w := answering(t, ms)
	fill(w, 100)
	w.Pong(w.Ping(at(20*ms)), at(22*ms), true)
	require.Equal(t, sent{32, startBytes}, w.size)

	fill(w, 64<<10)
	w.Pong(w.Ping(at(40*ms)), at(42*ms), true)
	require.Equal(t, sent{32, 2 * startBytes}, w.size)

	w.Sent(1)
	w.Pong(w.Ping(at(1000*ms)), at(1002*ms), true)
	require.Equal(t, sent{32, 2 * startBytes}, w.size, "nobody was held up")

	fill(w, 100)
	w.Pong(w.Ping(at(1100*ms)), at(1100*ms+41*ms), true)
	require.Equal(t, sent{32, 2 * startBytes}, w.size, "the wait is what it is to be")
}

func TestWindowShrinksToWhatWouldHaveWaitedLess(t *testing.T) {
	w := answering(t, 0)
	fill(w, 100)
	before := w.Ping(at(0))
	same := w.Ping(at(0))
	w.Pong(before, at(80*ms), false)
	require.Equal(t, sent{startMessages, startBytes}, w.size, "nothing waits")
	w.Pong(same, at(80*ms), true)
	require.Equal(t, sent{10, floorBytes}, w.size, "16 messages waited for 80 ms")
}

func TestWindowIsJudgedByPingsAfterItsChange(t *testing.T) {
	w := answering(t, 0)
	fill(w, 100)
	first, second := w.Ping(at(0)), w.Ping(at(0))
	w.Pong(first, at(80*ms), true)
	require.EqualValues(t, 10, w.size.messages)
	w.Pong(second, at(80*ms), true)
	require.EqualValues(t, 10, w.size.messages, "this one waited behind the larger window")
	fill(w, 100)
	w.Pong(w.Ping(at(90*ms)), at(90*ms+200*ms), true)
	require.EqualValues(t, 5, w.size.messages, "by half at most")
	fill(w, 100)
	w.Pong(w.Ping(at(300*ms)), at(600*ms), true)
	require.EqualValues(t, floorMessages, w.size.messages)
}

func TestWindowHasACeiling(t *testing.T) {
	for roundTrip, most := range map[time.Duration]int{19 * ms: 8192, 20 * ms: 65536} {
		for _, bytes := range []int{1, 1 << 20} {
			w := answering(t, roundTrip)
			now := at(0)
			n := 0
			for range 20 {
				n = fill(w, bytes)
				number := w.Ping(now)
				now += int64(roundTrip)
				w.Pong(number, now, true)
			}
			if bytes > 1 {
				most = 8
			}
			require.Equal(t, most, n)
		}
	}
}

func TestShorterRoundTripIsKnownAtOnce(t *testing.T) {
	w := answering(t, 60*ms)
	w.Sent(1)
	w.Pong(w.Ping(at(100*ms)), at(130*ms), true)
	require.EqualValues(t, 30*ms, w.base)
}

// TestLinkIsEmptiedToMeasureIt is the slow way to a longer round trip.
func TestLinkIsEmptiedToMeasureIt(t *testing.T) {
	w := answering(t, ms)
	now := at(0)
	step := func(roundTrip time.Duration) {
		number := w.Ping(now)
		now += int64(roundTrip)
		w.Pong(number, now, true)
	}
	for now < at(10*time.Second) {
		require.NotZero(t, fill(w, 100))
		step(50 * ms) // as if something waited; but it is the path
	}
	require.Empty(t, fill(w, 100), "closed")
	require.True(t, w.PingDue(now), "nothing is on its way, so a ping goes alone")
	w.Sent(100) // a question passes
	step(200 * ms)
	require.False(t, w.Open(), "it was not alone")
	require.True(t, w.PingDue(now))
	step(52 * ms)
	require.False(t, w.Open(), "the server may have paused")
	step(50 * ms)
	require.False(t, w.Open())
	step(55 * ms)
	require.True(t, w.Open())
	require.EqualValues(t, 50*ms, w.base)

	for end := now + 29*second; now < end; {
		require.NotZero(t, fill(w, 100), "not again soon, for it took a third of a second")
		step(100 * ms)
	}
	closed := false
	for range 20 {
		closed = closed || fill(w, 100) == 0
		step(100 * ms)
	}
	require.True(t, closed, "but again")
	require.EqualValues(t, 100*ms, w.base)
}

func TestLinkThatCannotBeEmptiedOpensAfterTwoSeconds(t *testing.T) {
	w := answering(t, ms)
	now := at(0)
	for !w.emptying.on {
		fill(w, 100)
		number := w.Ping(now)
		now += int64(50 * ms)
		w.Sent(100) // there is always a question on its way
		w.Pong(number, now, true)
	}
	end := now + 2*second
	for range 1000 {
		if w.PingDue(now) {
			w.Ping(now) // lost
		}
		if w.Open() {
			break
		}
		now = w.Next()
	}
	require.Equal(t, end, now)
	require.EqualValues(t, ms, w.base)
}

func TestServerThatNeverAnsweredIsServedWithoutAWindow(t *testing.T) {
	w := New(at(0))
	first := wantPing(t, w, 0)
	wantPing(t, w, 2*time.Second)
	fill(w, 100)
	require.True(t, w.PingDue(at(2*time.Second)))
	w.Ping(at(2 * time.Second))
	require.False(t, w.PingDue(at(4*time.Second)-1))
	require.False(t, w.Open())
	require.False(t, w.PingDue(at(4*time.Second)))
	require.True(t, w.Open())
	require.False(t, w.Answers())
	messages, bytes := w.Unacknowledged()
	require.Zero(t, messages+bytes, "nobody knows")
	for range 100_000 {
		require.True(t, w.Open())
		w.Sent(1000)
	}
	wantPing(t, w, 12*time.Second) // not more often than each 10 s
	require.Equal(t, never, w.Next())
	w.Sent(1)
	last := wantPing(t, w, 22*time.Second)
	w.Sent(1)

	read, took, ok := w.Pong(last, at(22*time.Second+ms), true)
	require.True(t, ok, "it answers after all")
	require.Equal(t, ms, took)
	require.EqualValues(t, 16+100_000+1, read)
	require.True(t, w.Answers())
	require.Equal(t, sent{startMessages, startBytes}, w.size)
	messages, _ = w.Unacknowledged()
	require.Equal(t, 1, messages)
	_, _, ok = w.Pong(first, at(23*time.Second), true)
	require.False(t, ok)
}

// TestFirstPingIsReplacedBeforeTheServerIsGivenUp, even if nobody looked in time.
func TestFirstPingIsReplacedBeforeTheServerIsGivenUp(t *testing.T) {
	w := New(at(0))
	w.Ping(at(0))
	wantPing := func(d time.Duration) {
		require.True(t, w.PingDue(at(d)))
		w.Ping(at(d))
	}
	wantPing(time.Hour)
	fill(w, 1)
	wantPing(time.Hour)
	require.False(t, w.Open())
	require.False(t, w.PingDue(at(time.Hour+time.Second)))
	require.False(t, w.Open())
	w.PingDue(at(time.Hour + 2*time.Second))
	require.True(t, w.Open())
}

func TestServerThatStoppedAnsweringIsServedWithoutAWindow(t *testing.T) {
	w := answering(t, ms)
	fill(w, 100)
	w.Pong(w.Ping(at(-ms)), at(0), true)
	require.Equal(t, 32, fill(w, 100))
	w.Ping(at(0))
	now := at(0)
	for now < at(10*time.Second) {
		require.False(t, w.Open())
		if w.PingDue(now) {
			w.Ping(now)
		}
		now = w.Next()
	}
	require.Equal(t, at(10*time.Second), now)
	w.PingDue(now)
	require.True(t, w.Open())
	require.False(t, w.Answers())

	w.Pong(w.next-1, now+1, true)
	require.True(t, w.Answers())
	require.Equal(t, 16, fill(w, 100))
}

func TestIdleLinkIsNotGivenUp(t *testing.T) {
	w := answering(t, ms)
	w.Sent(1)
	first := w.Ping(at(0))
	w.Ping(at(200 * ms)) // and this one is lost
	w.Pong(first, at(201*ms), false)
	require.Equal(t, never, w.Next())
	require.False(t, w.PingDue(at(time.Hour)))
	require.True(t, w.Answers())
	w.Sent(1)
	require.True(t, w.PingDue(at(time.Hour)))
	require.True(t, w.Answers())
}

func TestLinkThatHoldsNobodyUpIsNotEmptied(t *testing.T) {
	w := answering(t, ms)
	now := at(0)
	step := func() {
		w.Sent(1)
		number := w.Ping(now)
		now += int64(50 * ms)
		w.Pong(number, now, false)
		require.True(t, w.Open())
	}
	for now < at(time.Minute) {
		step()
	}
	fill(w, 100) // once; and then a pause
	now += 3600 * second
	for range 20 {
		step()
	}
}

func TestSmallestWindowThatDoesNotHelpIsDoubtedAtOnce(t *testing.T) {
	w := answering(t, ms)
	now := at(0)
	for range 5 { // 16, 8, 4
		fill(w, 100)
		number := w.Ping(now)
		now += int64(110 * ms)
		w.Pong(number, now, true)
	}
	require.Zero(t, fill(w, 100))
	number := w.Ping(now)
	w.Pong(number, now+int64(100*ms), true)
}

// TestQueueIsNotTakenForTheLink: when the least round trip seen is that of a queue that is never empty, it is
// no proof that it is seen again.
func TestQueueIsNotTakenForTheLink(t *testing.T) {
	w := answering(t, 50*ms)
	now := at(0)
	for now < at(10*time.Second) {
		require.NotZero(t, fill(w, 100))
		number := w.Ping(now)
		now += int64(50 * ms)
		w.Pong(number, now, true)
	}
	require.Zero(t, fill(w, 100))
	number := w.Ping(now)
	w.Pong(number, now+int64(5*ms), true)
	require.NotZero(t, fill(w, 100))
	require.EqualValues(t, 5*ms, w.base)
}

func TestLongPathMayHaveALongerQueue(t *testing.T) {
	judged := func(base, roundTrip time.Duration) sent {
		w := answering(t, base)
		fill(w, 100)
		var numbers []uint64
		for i := range 3 { // those of one round trip are judged together, and the first is part of the link's beginning
			numbers = append(numbers, w.Ping(at(time.Duration(i)*base)))
		}
		for i, number := range numbers {
			w.Pong(number, at(time.Duration(i)*base+roundTrip), true)
		}
		return w.size
	}
	start := sent{startMessages, startBytes}
	require.Equal(t, start, judged(200*ms, 310*ms))
	require.NotEqual(t, start, judged(200*ms, 330*ms))
	require.NotEqual(t, start, judged(100*ms, 170*ms))
	require.Less(t, judged(2*time.Second, 2400*ms).messages, start.messages, "but not as long as that")
}

func TestAnswersToForgottenPingsAreNotTaken(t *testing.T) {
	w := New(at(0))
	now := at(0)
	for range 20 {
		for !w.PingDue(now) {
			w.Sent(1)
			now += second
		}
		w.Ping(now)
	}
	_, _, ok := w.Pong(4, now, true)
	require.False(t, ok)
	_, _, ok = w.Pong(5, now, true)
	require.True(t, ok, "the last sixteen are remembered")
}

func TestServerIsGivenUpTenSecondsAfterItsLastAnswer(t *testing.T) {
	w := answering(t, ms)
	fill(w, 100)
	w.Sent(1)
	first := w.Ping(at(0))
	w.Sent(1)
	w.Ping(at(10 * ms))
	w.Pong(first, at(20*ms), true)
	w.PingDue(at(20*ms + 10*time.Second - 1))
	require.True(t, w.Answers())
	w.PingDue(at(20*ms + 10*time.Second))
	require.False(t, w.Answers())
}

// TestServerIsNotGivenUpForAPingAlone that is lost while the link is measured.
func TestServerIsNotGivenUpForAPingAlone(t *testing.T) {
	w := answering(t, ms)
	now := at(0)
	for !w.emptying.on {
		fill(w, 100)
		number := w.Ping(now)
		now += int64(50 * ms)
		w.Pong(number, now, true)
	}
	w.Ping(now)
	w.PingDue(now + 2*second)
	require.True(t, w.Open())
	w.PingDue(now + 60*second)
	require.True(t, w.Answers())
	require.Equal(t, never, w.Next())
}

// A link to a server that did not answer on another link does not begin with a pause, and has its window once the
// server answers after all.
func TestBlindedFromTheBeginning(t *testing.T) {
	w := New(0)
	require.True(t, w.PingDue(0))
	n := w.Ping(0)
	w.Blinden()
	for range 10 * startMessages {
		require.True(t, w.Open())
		w.Sent(100)
	}
	require.True(t, w.Blind())
	_, _, ok := w.Pong(n, int64(time.Second), true)
	require.True(t, ok)
	require.False(t, w.Blind())
	require.False(t, w.Open())
}
