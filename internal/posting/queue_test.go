package posting

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/opampgateway/opampgateway/internal/memory"
	"github.com/opampgateway/opampgateway/internal/outbox"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

type entry = outbox.Entry[string]

func message(text string) entry {
	return entry{Frame: []byte(text), Kind: outbox.Message, Sender: text}
}

// play runs a test with a queue of which nothing may be left.
func play(t *testing.T, limit int, test func(t *testing.T, q *Queue[string, string])) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		budget := memory.New(64<<20, 1<<20)
		q := NewQueue[string, string](limit, &budget.Up)
		test(t, q)
		q.Close()
		q.Rest()
		require.Zero(t, budget.Up.Held())
		bytes, _ := q.Waiting()
		require.Zero(t, bytes)
	})
}

// take returns the next message, which has to be there.
func take(t *testing.T, q *Queue[string, string], want string) *Post[string, string] {
	t.Helper()
	began := time.Now()
	p := q.Next()
	require.NotNil(t, p)
	require.Equal(t, want, string(p.Entry.Frame))
	require.Zero(t, time.Since(began), "it had to wait")
	return p
}

// Senders take turns, and of each one message at a time is posted, in order.
func TestTurns(t *testing.T) {
	play(t, 1<<20, func(t *testing.T, q *Queue[string, string]) {
		for _, text := range []string{"a1", "a2", "a3", "b1", "c1", "b2"} {
			require.NoError(t, q.Put(text[:1], message(text)))
		}
		a1 := take(t, q, "a1")
		b1 := take(t, q, "b1")
		c1 := take(t, q, "c1")
		q.Done(b1)
		b2 := take(t, q, "b2")
		q.Done(a1)
		a2 := take(t, q, "a2")
		q.Done(c1)
		q.Done(b2)
		q.Again(a2, time.Second)
		began := time.Now()
		again := q.Next()
		require.Same(t, a2, again, "before what its sender has said later")
		require.Equal(t, time.Second, time.Since(began))
		q.Done(again)
		q.Done(take(t, q, "a3"))
	})
}

// The giver's memory is used again as soon as Put has returned.
func TestPutCopies(t *testing.T) {
	play(t, 1<<20, func(t *testing.T, q *Queue[string, string]) {
		e := message("hello")
		require.NoError(t, q.Put("a", e))
		copy(e.Frame, "HELLO")
		q.Done(take(t, q, "hello"))
	})
}

// Who has too much waiting waits; nobody else does.
func TestAwait(t *testing.T) {
	play(t, 1<<20, func(t *testing.T, q *Queue[string, string]) {
		require.NoError(t, q.Put("a", message(string(make([]byte, lineShare)))))
		require.NoError(t, q.Put("a", message("last")))
		require.True(t, q.Full("a"))
		require.False(t, q.Full("b"))
		require.NoError(t, q.Await(t.Context(), "b"))
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		require.ErrorIs(t, q.Await(ctx, "a"), context.DeadlineExceeded)
		awaited := make(chan error, 1)
		go func() { awaited <- q.Await(t.Context(), "a") }()
		synctest.Wait()
		require.Empty(t, awaited)
		q.Done(q.Next())
		require.NoError(t, <-awaited)

		require.NoError(t, q.Put("a", message(string(make([]byte, lineShare)))))
		go func() { awaited <- q.Await(t.Context(), "a") }()
		synctest.Wait()
		q.Finish()
		require.ErrorIs(t, <-awaited, outbox.ErrClosed)
	})
}

// What waits of all is bounded; polls come when there is room, or not at all.
func TestLimit(t *testing.T) {
	play(t, 1<<10, func(t *testing.T, q *Queue[string, string]) {
		require.True(t, q.Poll("poll", message("p")))
		require.False(t, q.Poll("poll", message("p")), "one waits already")
		require.NoError(t, q.Put("a", message(string(make([]byte, 1<<10)))))
		require.False(t, q.Poll("another", message("p")))
		put := make(chan error, 1)
		go func() { put <- q.Put("b", message("b")) }()
		synctest.Wait()
		require.Empty(t, put)
		q.Done(q.Next())
		q.Done(q.Next())
		require.NoError(t, <-put)
		q.Done(take(t, q, "b"))

		require.NoError(t, q.Put("a", message(string(make([]byte, 1<<10)))))
		go func() { put <- q.Put("b", message("b")) }()
		synctest.Wait()
		q.Close()
		require.ErrorIs(t, <-put, outbox.ErrClosed)
	})
}

// One is asked to wait, and waits; two are, and all do.
func TestThrottle(t *testing.T) {
	play(t, 1<<20, func(t *testing.T, q *Queue[string, string]) {
		for _, text := range []string{"a", "b", "c", "d"} {
			require.NoError(t, q.Put(text, message(text)))
		}
		began := time.Now()
		require.False(t, q.Throttle(take(t, q, "a"), 10*time.Second))
		time.Sleep(time.Second)
		require.True(t, q.Throttle(take(t, q, "b"), 5*time.Second))
		p := q.Next()
		require.Equal(t, 6*time.Second, time.Since(began))
		require.Equal(t, "c", string(p.Entry.Frame))
		q.Done(p)
		q.Done(take(t, q, "d"))
		q.Done(take(t, q, "b"))
		q.Done(q.Next())
		require.Equal(t, 10*time.Second, time.Since(began))
	})
}

func TestDrop(t *testing.T) {
	play(t, 1<<20, func(t *testing.T, q *Queue[string, string]) {
		for _, text := range []string{"a1", "b1", "a2", "a3"} {
			require.NoError(t, q.Put(text[:1], message(text)))
		}
		require.Equal(t, 3, q.Drop(take(t, q, "a1")))
		q.Done(take(t, q, "b1"))
		require.NoError(t, q.Put("a", message("a4")))
		q.Done(take(t, q, "a4"))
	})
}

// After Finish what waits is posted, and workers leave when it is.
func TestFinish(t *testing.T) {
	play(t, 1<<20, func(t *testing.T, q *Queue[string, string]) {
		require.NoError(t, q.Put("a", message("a1")))
		require.NoError(t, q.Put("a", message("a2")))
		q.Finish()
		require.ErrorIs(t, q.Put("a", message("a3")), outbox.ErrClosed)
		a1 := take(t, q, "a1")
		left := make(chan *Post[string, string], 2)
		go func() { left <- q.Next() }()
		synctest.Wait()
		require.Empty(t, left, "a2 waits for a1")
		q.Done(a1)
		a2 := <-left
		go func() { left <- q.Next() }()
		synctest.Wait()
		drained := make(chan struct{})
		go func() {
			defer close(drained)
			q.Drain(t.Context())
		}()
		q.Done(a2)
		require.Nil(t, <-left)
		<-drained
	})
}

// What was not posted is what the next link has to post; polls are not.
func TestRest(t *testing.T) {
	play(t, 1<<20, func(t *testing.T, q *Queue[string, string]) {
		require.NoError(t, q.Put("a", message("a1")))
		require.NoError(t, q.Put("a", message("a2")))
		require.True(t, q.Poll("b", message("poll")))
		p := take(t, q, "a1")
		q.Close()
		require.Nil(t, q.Next())
		q.Again(p, 0)
		rest := q.Rest()
		require.Len(t, rest, 2)
		require.Equal(t, "a1", rest[0].Sender)
		require.Equal(t, "a2", rest[1].Sender)
	})
}
