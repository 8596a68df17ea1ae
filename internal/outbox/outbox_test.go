package outbox

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
	"weak"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/opampgateway/opampgateway/internal/memory"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var errBroken = errors.New("socket is broken")

// fakeSocket takes what is written to it, unless it is stalled or breaks.
type fakeSocket struct {
	mu        sync.Mutex
	got       []Entry[string]
	batches   []int         // how many entries each write had
	stalled   chan struct{} // while open, a write waits
	ended     chan struct{} // closed by Close
	breaksAt  int           // the write that comes to this entry fails; -1 for never
	hurried   int
	closed    int
	inWrite   bool
	violation string
}

func newSocket() *fakeSocket { return &fakeSocket{breaksAt: -1, ended: make(chan struct{})} }

// start returns an agent's outbox that ends with the test, and its socket.
func start(t *testing.T, limit int) (*Outbox[string], *fakeSocket) {
	t.Helper()
	sock, account := newSocket(), newAccount()
	o := New(sock, limit, account)
	t.Cleanup(func() {
		o.Abort()
		assert.Empty(t, sock.violation)
		assert.Zero(t, account.Held(), "bytes counted for an outbox that has ended")
	})
	return o, sock
}

func newAccount() *memory.Account {
	const largest = 1 << 20
	return &memory.New(memory.MinSize(largest, 1), largest).Up
}

func (s *fakeSocket) WriteBatch(batch []Entry[string]) (int, error) {
	s.mu.Lock()
	stalled := s.stalled
	s.batches = append(s.batches, len(batch))
	if s.inWrite || len(batch) == 0 {
		s.violation = "two writes at once, or an empty one"
	}
	s.inWrite = true
	s.mu.Unlock()
	if stalled != nil {
		select {
		case <-stalled:
		case <-s.ended:
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.inWrite = false
	for i, e := range batch {
		if s.closed > 0 || len(s.got) == s.breaksAt {
			return i, errBroken
		}
		s.got = append(s.got, e)
	}
	return len(batch), nil
}

// TryBatch takes what WriteBatch would, but for a part of it while the socket is stalled: that is begun.
func (s *fakeSocket) TryBatch(batch []Entry[string]) (int, error) {
	s.mu.Lock()
	stalled := s.stalled
	s.mu.Unlock()
	if stalled != nil {
		return 0, nil
	}
	return s.WriteBatch(batch)
}

func (s *fakeSocket) Hurry() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.hurried++
}

func (s *fakeSocket) Close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed++; s.closed == 1 {
		close(s.ended)
	}
}

// stall has all writes wait, until the returned function is called.
func (s *fakeSocket) stall() (resume func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	stalled := make(chan struct{})
	s.stalled = stalled
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.stalled == stalled {
			s.stalled = nil
		}
		close(stalled)
	}
}

// breakAt has the write fail that would write one more entry than n.
func (s *fakeSocket) breakAt(n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.breaksAt = n
}

// written returns the frames written so far.
func (s *fakeSocket) written() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return frames(s.got)
}

func frames(entries []Entry[string]) []string {
	all := make([]string, len(entries))
	for i, e := range entries {
		all[i] = string(e.Frame)
	}
	return all
}

// message is a frame of few bytes from a sender.
func message(sender, text string) Entry[string] {
	return Entry[string]{Kind: Message, Sender: sender, Frame: []byte(text)}
}

// ofSize is an entry that takes size bytes of an outbox.
func ofSize(size int, text string) Entry[string] {
	return Entry[string]{Kind: Message, Frame: []byte(text + strings.Repeat(".", size-overhead-len(text)))}
}

// writers counts the goroutines that write for an agent's outbox.
func writers() int {
	stacks := make([]byte, 1<<20)
	return strings.Count(string(stacks[:runtime.Stack(stacks, true)]), ").finish(")
}

func TestFramesAreWrittenInOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o, sock := start(t, 1<<20)
		require.NoError(t, o.Try(message("alice", "1")))
		require.NoError(t, o.Try(message("bob", "2")))
		require.NoError(t, o.Try(message("alice", "3")))
		require.NoError(t, o.Try(Entry[string]{Kind: Ping}))
		synctest.Wait()
		require.Equal(t, []string{"1", "2", "3", ""}, sock.written())

		got := sock.got
		assert.Equal(t, "bob", got[1].Sender)
		assert.Equal(t, Ping, got[3].Kind)
		assert.Empty(t, o.Abort())
	})
}

func TestAllThatWaitsIsWrittenAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o, sock := start(t, 1<<20)
		resume := sock.stall()
		for _, text := range []string{"1", "2", "3", "4"} {
			require.NoError(t, o.Try(message("alice", text)))
			synctest.Wait()
		}
		resume()
		synctest.Wait()
		assert.Equal(t, []string{"1", "2", "3", "4"}, sock.written())
		assert.Equal(t, []int{1, 3}, sock.batches)
	})
}

func TestOutboxIsBoundedInBytes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o, sock := start(t, 1000)
		resume := sock.stall()
		require.NoError(t, o.Try(ofSize(400, "1")))
		synctest.Wait() // what is being written counts as well
		require.NoError(t, o.Try(ofSize(400, "2")))
		require.ErrorIs(t, o.Try(ofSize(201, "too large")), ErrFull)
		require.NoError(t, o.Try(ofSize(200, "3")))
		require.ErrorIs(t, o.Try(message("", "")), ErrFull)
		resume()
		synctest.Wait()
		require.Len(t, sock.written(), 3, "what did not fit was not taken")

		// All of the room is back, however often it was used.
		for range 10 {
			resume := sock.stall()
			require.NoError(t, o.Try(ofSize(1000, "all")))
			require.ErrorIs(t, o.Try(message("", "")), ErrFull)
			resume()
			synctest.Wait()
		}
	})
}

func TestAFloodOfTinyFramesIsBoundedToo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o, sock := start(t, 1<<20)
		sock.stall()
		taken := 0
		for o.Try(Entry[string]{Kind: Pong}) == nil {
			taken++
			require.Less(t, taken, 20_000)
		}
		assert.Greater(t, taken, 1000)
	})
}

func TestOneOversizeFrameFitsIntoAnEmptyOutbox(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o, sock := start(t, 1000)
		resume := sock.stall()
		require.NoError(t, o.Try(ofSize(5000, "large")))
		require.ErrorIs(t, o.Try(ofSize(5000, "another")), ErrFull)
		require.ErrorIs(t, o.Try(message("", "small")), ErrFull)
		resume()
		synctest.Wait()
		require.NoError(t, o.Try(ofSize(5000, "another")))
		synctest.Wait()
		require.Len(t, sock.written(), 2)
	})
}

func TestCloseWritesWhatWaitsAndThenACloseFrame(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o, sock := start(t, 1000)
		resume := sock.stall()
		require.NoError(t, o.Try(ofSize(500, "1")))
		synctest.Wait()
		require.NoError(t, o.Try(ofSize(500, "2")))

		o.Close([]byte("goodbye")) // for which there always is room, and which does not wait
		assert.Equal(t, 1, sock.hurried)
		assert.Zero(t, sock.closed, "the reader is left to hear the peer's answer")
		require.ErrorIs(t, o.Try(message("bob", "")), ErrClosed)
		require.ErrorIs(t, o.Try(ofSize(5000, "bob")), ErrClosed)
		o.Close([]byte("goodbye again"))
		resume()
		synctest.Wait()

		got := sock.written()
		require.Len(t, got, 3)
		assert.Equal(t, "goodbye", got[2])
		assert.Equal(t, Close, sock.got[2].Kind)
		assert.Equal(t, 1, sock.hurried)
		o.Close([]byte("and again"))
		synctest.Wait()
		assert.Len(t, sock.written(), 3, "a close frame is sent once")
		assert.Empty(t, o.Abort())
	})
}

// A peer that has said that it is closing reads no more: what waits for it is for others.
func TestReplyKeepsWhatWaits(t *testing.T) {
	for name, breaksAt := range map[string]int{"the write succeeds": -1, "the write fails": 0} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				o, sock := start(t, 1000)
				resume := sock.stall()
				sock.breakAt(breaksAt)
				require.NoError(t, o.Try(message("alice", "1")))
				synctest.Wait()
				require.NoError(t, o.Try(message("alice", "2")))
				require.NoError(t, o.Try(message("bob", "3")))

				o.Reply([]byte("goodbye"))
				assert.Equal(t, 1, sock.hurried)
				require.ErrorIs(t, o.Try(message("cathy", "4")), ErrClosed)
				o.Reply([]byte("goodbye again"))
				resume()
				synctest.Wait()
				if breaksAt < 0 {
					assert.Equal(t, []string{"1", "goodbye"}, sock.written())
					assert.Equal(t, []string{"2", "3"}, frames(o.Abort()))
				} else {
					assert.Empty(t, sock.written())
					assert.Equal(t, []string{"1", "2", "3"}, frames(o.Abort())[:3], "in order")
				}
			})
		})
	}
}

func TestCloseOfAnIdleOutbox(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o, sock := start(t, 1000)
		o.Close([]byte("goodbye"))
		synctest.Wait()
		assert.Equal(t, []string{"goodbye"}, sock.written())
		assert.Empty(t, o.Abort())
		assert.Equal(t, 1, sock.closed)
	})
}

func TestCloseAfterTheEndDoesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o, sock := start(t, 1000)
		assert.Empty(t, o.Abort())
		o.Close([]byte("goodbye"))
		synctest.Wait()
		assert.Empty(t, sock.written())
		assert.Zero(t, sock.hurried)
		require.ErrorIs(t, o.Try(message("", "")), ErrClosed)
	})
}

// Nothing may be missing, nothing that was written may come again, and the order stays.
func TestAbortReturnsExactlyWhatWasNotWritten(t *testing.T) {
	for breaksAt := range 7 {
		t.Run(fmt.Sprintf("breaks after %d", breaksAt), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				o, sock := start(t, 6*(overhead+1))
				resume := sock.stall()
				sock.breakAt(breaksAt)
				var all []string
				for i := range 6 { // 0 is in the first batch, 1 to 5 in the second, unless that is not reached
					text := string(rune('0' + i))
					require.NoError(t, o.Try(message("", text)))
					all = append(all, text)
					synctest.Wait()
				}
				resume()
				synctest.Wait()
				if breaksAt < 6 {
					assert.Equal(t, 1, sock.closed, "the reader has to wake up and clean up")
					require.ErrorIs(t, o.Try(message("", "late")), ErrClosed)
				}
				unwritten := frames(o.Abort())
				assert.Equal(t, all, append(sock.written(), unwritten...))
				assert.Len(t, sock.written(), breaksAt)
				assert.Empty(t, o.Abort(), "once")
			})
		})
	}
}

func TestAbortDoesNotWaitForAStalledWrite(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o, sock := start(t, 1000)
		sock.stall()
		require.NoError(t, o.Try(ofSize(400, "1")))
		synctest.Wait()
		require.NoError(t, o.Try(ofSize(400, "2")))

		began := time.Now()
		unwritten := o.Abort()
		assert.Zero(t, time.Since(began))
		require.Len(t, unwritten, 2, "what is being written, and what waits")
		assert.Contains(t, string(unwritten[0].Frame), "1")
		assert.Contains(t, string(unwritten[1].Frame), "2")
		assert.Zero(t, writers())
	})
}

func TestAbortReturnsTheCloseFrameThatWasNotWritten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o, sock := start(t, 1000)
		sock.stall()
		require.NoError(t, o.Try(message("alice", "1")))
		synctest.Wait()
		o.Close([]byte("goodbye"))
		unwritten := o.Abort()
		require.Len(t, unwritten, 2)
		assert.Equal(t, Message, unwritten[0].Kind)
		assert.Equal(t, Close, unwritten[1].Kind)
	})
}

func TestAnIdleOutboxOfAnAgentHasNoGoroutine(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o, sock := start(t, 1000)
		assert.Zero(t, writers(), "before the first frame")
		for range 3 {
			resume := sock.stall()
			require.NoError(t, o.Try(message("alice", "1")))
			synctest.Wait()
			require.Equal(t, 1, writers(), "while it writes")
			resume()
			synctest.Wait()
			require.Zero(t, writers(), "when nothing is left")
		}
	})
}

// An agent that reads is written to at once, by who has something for it.
func TestAnAgentThatReadsIsWrittenToAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o, sock := start(t, 1000)
		for _, want := range [][]string{{"1"}, {"1", "2"}} {
			require.NoError(t, o.Try(message("", want[len(want)-1])))
			require.Equal(t, want, sock.written())
			require.Zero(t, writers())
		}
		sock.breakAt(2)
		require.NoError(t, o.Try(message("", "3")))
		require.ErrorIs(t, o.Try(message("", "4")), ErrClosed)
		assert.Equal(t, 1, sock.closed)
		assert.Equal(t, []string{"3"}, frames(o.Abort()))
	})
}

// What is relayed costs no memory but its own.
func TestAnOutboxAllocatesNothing(t *testing.T) {
	o := New[string](discard{}, 1<<20, newAccount())
	defer o.Abort()
	e := message("", "hello")
	assert.Zero(t, testing.AllocsPerRun(1000, func() {
		if o.Try(e) != nil || o.Memory() > 0 {
			t.Fail()
		}
	}))
}

// released returns entries, and asserts in the end that none of their frames is held any more.
type released []weak.Pointer[byte]

func (r *released) entry() Entry[string] {
	e := Entry[string]{Kind: Message, Frame: make([]byte, 1<<10)}
	*r = append(*r, weak.Make(&e.Frame[0]))
	return e
}

func (r *released) want(t *testing.T) {
	t.Helper()
	runtime.GC()
	held := 0
	for _, frame := range *r {
		if frame.Value() != nil {
			held++
		}
	}
	require.Zero(t, held, "frames held of %d", len(*r))
}

// An agent is slow for a moment; an hour later nothing of what it was told may still be held.
func TestAnIdleOutboxHoldsNoMemory(t *testing.T) {
	var said released
	sock := newSocket()
	o := New[string](forgetful{sock}, 8<<10, newAccount())
	resume := sock.stall()
	for full := false; !full; {
		full = o.Try(said.entry()) != nil
	}
	resume()
	o.Drain(t.Context())
	said.want(t)
	assert.Equal(t, 1, cap(o.queue))
	o.Abort()
}

func TestABusyOutboxHoldsOnlyWhatWaits(t *testing.T) {
	var said released
	sock := newSocket()
	o := New[string](forgetful{sock}, 1<<20, newAccount())
	inWrites := func(n int) func() bool {
		return func() bool {
			sock.mu.Lock()
			defer sock.mu.Unlock()
			return len(sock.batches) == n
		}
	}
	resume := sock.stall()
	require.NoError(t, o.Try(said.entry()))
	waitFor(t, inWrites(1))
	for range 20 {
		require.NoError(t, o.Try(said.entry()))
	}
	resumeNext := sock.stall()
	resume()
	waitFor(t, inWrites(2)) // these 20
	require.NoError(t, o.Try(message("alice", "still busy")))
	resumeLast := sock.stall()
	resumeNext()
	waitFor(t, inWrites(3))
	said.want(t)
	resumeLast()
	o.Drain(t.Context())
	assert.Empty(t, o.Abort())
}

// forgetful keeps nothing of what is written, as the contract of Socket demands.
type forgetful struct{ *fakeSocket }

func (s forgetful) WriteBatch(batch []Entry[string]) (int, error) {
	n, err := s.fakeSocket.WriteBatch(batch)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.got = nil
	return n, err
}

func (s forgetful) TryBatch(batch []Entry[string]) (int, error) {
	n, err := s.fakeSocket.TryBatch(batch)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.got = nil
	return n, err
}

// waitFor waits for what other goroutines are about to do, where a bubble would be in the way of
// what is tested.
func waitFor(t *testing.T, reached func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !reached(); runtime.Gosched() {
		if time.Now().After(deadline) {
			t.Fatal("waited in vain")
		}
	}
}

func TestDrainWaitsUntilNothingIsLeft(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o, sock := start(t, 1000)
		began := time.Now()
		o.Drain(t.Context()) // nothing to do
		assert.Zero(t, time.Since(began))

		resume := sock.stall()
		time.AfterFunc(3*time.Second, resume)
		require.NoError(t, o.Try(ofSize(800, "1")))
		require.NoError(t, o.Try(ofSize(200, "2")))
		o.Drain(t.Context())
		assert.Equal(t, 3*time.Second, time.Since(began))
		assert.Len(t, sock.written(), 2)
	})
}

func TestDrainWaitsNoLongerThanItsContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o, sock := start(t, 1000)
		sock.stall()
		require.NoError(t, o.Try(message("alice", "1")))
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		defer cancel()
		began := time.Now()
		o.Drain(ctx)
		assert.Equal(t, 2*time.Second, time.Since(began))
		o.Drain(ctx) // and not at all when it is done already
		assert.Equal(t, 2*time.Second, time.Since(began))
	})
}

func TestDrainEndsWithTheSocket(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o, sock := start(t, 1000)
		resume := sock.stall()
		time.AfterFunc(time.Second, resume)
		sock.breakAt(0)
		require.NoError(t, o.Try(message("alice", "1")))
		began := time.Now()
		o.Drain(t.Context())
		assert.Equal(t, time.Second, time.Since(began))
		assert.Len(t, o.Abort(), 1)
	})
}

// Many bring something at once; the socket breaks at some point, or not. Whatever was taken is written or
// returned, exactly once, and in the order in which each brought it.
func TestManyBringSomethingAtOnce(t *testing.T) {
	const senders, each = 8, 300
	for _, breaksAt := range []int{-1, 0, 500} {
		t.Run(fmt.Sprintf("breaks at %d", breaksAt), func(t *testing.T) {
			sock := newSocket()
			sock.breakAt(breaksAt)
			o := New(sock, 2000, newAccount())
			taken := make([][]string, senders)
			var sending sync.WaitGroup
			for sender := range senders {
				sending.Go(func() {
					for i := 0; i < each; {
						e := message(strconv.Itoa(sender), fmt.Sprintf("%d/%d", sender, i))
						switch err := o.Try(e); {
						case err == nil:
							taken[sender] = append(taken[sender], string(e.Frame))
							i++
						case errors.Is(err, ErrClosed):
							return
						default:
							runtime.Gosched()
						}
					}
				})
			}
			sending.Wait()
			o.Drain(t.Context())
			wantAllOnce(t, taken, append(sock.got, o.Abort()...))
		})
	}
}

// wantAllOnce asserts that of each sender what was taken came out, once and in order. Senders are numbers.
func wantAllOnce(t *testing.T, taken [][]string, out []Entry[string]) {
	t.Helper()
	bySender := make([][]string, len(taken))
	for _, e := range out {
		if e.Kind == Message {
			sender, err := strconv.Atoi(e.Sender)
			require.NoError(t, err)
			bySender[sender] = append(bySender[sender], string(e.Frame))
		}
	}
	for sender := range taken {
		if !slices.Equal(taken[sender], bySender[sender]) {
			t.Errorf("of sender %d, %d were taken and %d came out, or in another order",
				sender, len(taken[sender]), len(bySender[sender]))
		}
	}
}

func BenchmarkTry(b *testing.B) {
	for _, size := range []int{25, 2 << 10, 100 << 10} {
		b.Run(fmt.Sprintf("%dB", size), func(b *testing.B) {
			o := New[string](discard{}, 8<<20, newAccount())
			defer o.Abort()
			e := Entry[string]{Kind: Message, Frame: make([]byte, size)}
			b.SetBytes(int64(size))
			b.ReportAllocs()
			for b.Loop() {
				if err := o.Try(e); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// discard is a socket that takes everything.
type discard struct{}

func (discard) WriteBatch(batch []Entry[string]) (int, error) { return len(batch), nil }
func (discard) TryBatch(batch []Entry[string]) (int, error)   { return len(batch), nil }
func (discard) Hurry()                                        {}
func (discard) Close()                                        {}
