package outbox

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/opampgateway/opampgateway/internal/memory"
)

// startMessages is how many messages a link's window holds in the beginning, and startBytes how many bytes.
const startMessages, startBytes = 16, 256 << 10

// fakeServer is a link's socket, and the server behind it, which reads what was written.
type fakeServer struct {
	*fakeSocket
	answers atomic.Bool           // pings, when it comes to them
	pace    time.Duration         // what it takes to read a message
	onWrite func(e Entry[string]) // set before the link starts
	link    *Link[string]
	ready   chan struct{} // closed when link is set
	arrived chan struct{}
	reading sync.WaitGroup

	// Guarded by fakeSocket.mu.
	unread []Entry[string]
	pings  []Entry[string] // not answered
	acks   []Acknowledgement[string]
}

// newServer returns a server that reads everything at once, and answers pings if it is told so.
func newServer(answers bool) *fakeServer {
	s := &fakeServer{fakeSocket: newSocket(), ready: make(chan struct{}), arrived: make(chan struct{}, 1)}
	s.answers.Store(answers)
	return s
}

// startLink returns a link to s that ends with the test.
func startLink(t *testing.T, limit int, s *fakeServer) *Link[string] {
	t.Helper()
	account := newAccount()
	o := NewLink[string](s, limit, account, false)
	s.link = o
	close(s.ready)
	s.reading.Go(s.read)
	t.Cleanup(func() {
		o.Abort()
		s.reading.Wait()
		assert.Empty(t, s.violation)
		assert.Zero(t, account.Held(), "bytes counted for a link that has ended")
		assert.Zero(t, o.lines.waiting)
	})
	return o
}

func (s *fakeServer) WriteBatch(batch []Entry[string]) (int, error) {
	<-s.ready
	n, err := s.fakeSocket.WriteBatch(batch)
	s.mu.Lock()
	s.unread = append(s.unread, batch[:n]...)
	s.mu.Unlock()
	select {
	case s.arrived <- struct{}{}:
	default:
	}
	if s.onWrite != nil {
		for _, e := range batch[:n] {
			s.onWrite(e)
		}
	}
	return n, err
}

// read is the server's reader, until the socket ends.
func (s *fakeServer) read() {
	for {
		s.mu.Lock()
		unread := s.unread
		s.unread = nil
		s.mu.Unlock()
		for _, e := range unread {
			switch e.Kind {
			case Ping:
				s.mu.Lock()
				s.pings = append(s.pings, e)
				s.mu.Unlock()
				if s.answers.Load() {
					s.answer()
				}
			case Message:
				if s.pace > 0 {
					time.Sleep(s.pace)
				}
			case Pong, Close:
			}
		}
		if len(unread) > 0 {
			continue
		}
		select {
		case <-s.arrived:
		case <-s.ended:
			return
		}
	}
}

// answer answers all pings that were read, and returns how many.
func (s *fakeServer) answer() int {
	s.mu.Lock()
	pings := s.pings
	s.pings = nil
	s.mu.Unlock()
	for _, e := range pings {
		s.answerOne(e)
	}
	return len(pings)
}

// answerFirst answers one ping.
func (s *fakeServer) answerFirst(t *testing.T) {
	t.Helper()
	s.mu.Lock()
	require.NotEmpty(t, s.pings)
	e := s.pings[0]
	s.pings = s.pings[1:]
	s.mu.Unlock()
	s.answerOne(e)
}

func (s *fakeServer) answerOne(e Entry[string]) {
	if ack, expected := s.link.Pong(slices.Clone(e.Frame)); expected {
		s.mu.Lock()
		s.acks = append(s.acks, ack)
		s.mu.Unlock()
	}
}

// settle answers pings until none comes any more at once.
func (s *fakeServer) settle() {
	for synctest.Wait(); s.answer() > 0; {
		synctest.Wait()
	}
}

// wrote returns all that was written, each as its kind and, of a message, its text.
func (s *fakeServer) wrote() (all []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, e := range s.got {
		switch e.Kind {
		case Message:
			all = append(all, textOf(e))
		case Ping:
			all = append(all, "ping")
		case Pong:
			all = append(all, "pong")
		case Close:
			all = append(all, "close")
		}
	}
	return all
}

// said returns the texts of the messages that were written.
func (s *fakeServer) said() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return texts(s.got)
}

func texts(entries []Entry[string]) (all []string) {
	for _, e := range entries {
		if e.Kind == Message {
			all = append(all, textOf(e))
		}
	}
	return all
}

func textOf(e Entry[string]) string { return strings.TrimRight(string(e.Frame), ".") }

// speaker is a sender: its messages are its name and a number.
type speaker struct {
	o      *Link[string]
	name   string
	weight int
	trial  bool // what it says is on trial
	alone  bool // and nothing else is
	line   Line[string]
	n      int
}

func newSpeaker(o *Link[string], name string) *speaker { return &speaker{o: o, name: name, weight: 1} }

func newSpeakers(o *Link[string], name string, n int) []*speaker {
	all := make([]*speaker, n)
	for i := range all {
		all[i] = newSpeaker(o, fmt.Sprintf("%s%d-", name, i))
	}
	return all
}

// next returns its next message, of size bytes at least.
func (s *speaker) next(size int) Entry[string] {
	text := s.name + strconv.Itoa(s.n)
	s.n++
	return Entry[string]{
		Kind: Message, Sender: s.name, Trial: s.trial, Alone: s.alone,
		Frame: []byte(text + strings.Repeat(".", max(0, size-len(text)))),
	}
}

// say has its next message wait, if there is room.
func (s *speaker) say(size int) error {
	err := s.o.Try(s.next(size), &s.line, s.weight)
	if err != nil {
		s.n--
	}
	return err
}

// sayAll says n messages, for which there has to be room.
func (s *speaker) sayAll(t *testing.T, n, size int) {
	t.Helper()
	for range n {
		require.NoError(t, s.say(size), s.name)
	}
}

// insist has its next message wait, in the background.
func (s *speaker) insist(ctx context.Context, size int) putting {
	p, e := putting{make(chan error, 1)}, s.next(size)
	go func() { p.done <- s.o.Put(ctx, e, &s.line, s.weight) }()
	return p
}

// flood says messages of size as fast as there is room for them.
func (s *speaker) flood(size int) {
	for more := true; more; {
		more = s.o.Put(context.Background(), s.next(size), &s.line, s.weight) == nil
	}
}

// putting is a Put in the background.
type putting struct{ done chan error }

// wantWaiting asserts that the Put has not returned, when everything has come to rest.
func (p putting) wantWaiting(t *testing.T, who string) {
	t.Helper()
	synctest.Wait()
	select {
	case err := <-p.done:
		t.Fatalf("%s should still wait, but Put returned %v", who, err)
	default:
	}
}

// want asserts what the Put has returned, when everything has come to rest.
func (p putting) want(t *testing.T, want error, who string) {
	t.Helper()
	synctest.Wait()
	select {
	case err := <-p.done:
		require.ErrorIs(t, err, want, who)
	default:
		t.Fatalf("%s should not wait any more", who)
	}
}

// fill has the window of a link whose server answers nothing used up, by somebody else.
func fill(t *testing.T, o *Link[string], s *fakeServer) {
	t.Helper()
	filler := newSpeaker(o, "filler")
	for range startMessages {
		filler.sayAll(t, 1, 0)
		synctest.Wait()
	}
	require.Len(t, s.said(), startMessages)
}

// Senders and turns.

func TestWhatASenderSaysStaysInOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newServer(true)
		o := startLink(t, 1<<20, s)
		resume := s.stall()
		alice := newSpeaker(o, "alice")
		var want []string
		for i := range 40 {
			alice.trial = i%7 == 3
			require.NoError(t, alice.say(i*30))
			want = append(want, "alice"+strconv.Itoa(i))
		}
		// Its goodbye, from another goroutine, waits for room, and behind what it said.
		alice.trial = false
		goodbye := alice.insist(t.Context(), 60<<10)
		goodbye.wantWaiting(t, "goodbye")
		resume()
		synctest.Wait()
		goodbye.want(t, nil, "goodbye")
		require.Equal(t, append(want, "alice40"), s.said())
	})
}

func TestASenderThatHadNothingWaitingGoesFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newServer(true)
		s.pace = time.Millisecond
		o := startLink(t, 1<<20, s)
		for _, flooder := range newSpeakers(o, "flooder", 10) {
			go flooder.flood(50)
		}
		alice := newSpeaker(o, "alice")
		for range 20 {
			time.Sleep(500*time.Millisecond + 7*time.Microsecond)
			synctest.Wait()
			before := len(s.said())
			require.NoError(t, alice.say(50))
			time.Sleep(200 * time.Millisecond)
			at := slices.Index(s.said(), "alice"+strconv.Itoa(alice.n-1))
			require.GreaterOrEqual(t, at, 0, "alice was not heard within 200 ms")
			require.LessOrEqual(t, at-before, 1+turn/messageCost, "others who went before alice: what one of them has left of its turn")
		}
	})
}

// A sender that says something just when its last message was written would be new each time.
func TestASenderThatRefillsItsQueueGetsNoMoreThanItsTurn(t *testing.T) {
	const messages, oneTurn = 400, turn - messageCost
	synctest.Test(t, func(t *testing.T) {
		speakers, written := map[string]*speaker{}, 0
		s := newServer(true)
		s.onWrite = func(e Entry[string]) {
			if written++; written < messages && e.Kind == Message {
				_ = speakers[e.Sender].say(oneTurn)
			}
		}
		o := startLink(t, 1<<20, s)
		synctest.Wait()
		resume := s.stall()
		for _, name := range []string{"clever", "alice", "bob", "cathy"} {
			speakers[name] = newSpeaker(o, name)
		}
		speakers["clever"].sayAll(t, 1, oneTurn)
		synctest.Wait()
		for _, name := range []string{"alice", "bob", "cathy"} {
			speakers[name].sayAll(t, 3, oneTurn)
		}
		resume()
		synctest.Wait()
		times := map[string]int{}
		for _, e := range s.got {
			if e.Kind == Message {
				times[e.Sender]++
			}
		}
		for _, name := range []string{"alice", "bob", "cathy"} {
			assert.LessOrEqual(t, times["clever"], times[name]+4, "%v", times)
		}
		assert.GreaterOrEqual(t, times["clever"], 30, "%v", times)
	})
}

// runs returns who spoke how many times in a row.
func runs(entries []Entry[string]) (who []string, times []int) {
	for _, e := range entries {
		switch {
		case e.Kind != Message:
		case len(who) > 0 && who[len(who)-1] == e.Sender:
			times[len(times)-1]++
		default:
			who, times = append(who, e.Sender), append(times, 1)
		}
	}
	return who, times
}

func TestATurnOfTinyMessagesIsShort(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newServer(true)
		o := startLink(t, 1<<20, s)
		resume := s.stall()
		speakers := newSpeakers(o, "s", 4)
		speakers[0].sayAll(t, 1, 0)
		synctest.Wait()
		for _, speaker := range speakers {
			speaker.sayAll(t, 96, 0)
		}
		resume()
		synctest.Wait()
		who, times := runs(s.got)
		// Each message is a few bytes and 1 KiB: 15 or 16 are a turn of 16 KiB.
		for i, n := range times[:len(times)-4] {
			assert.Contains(t, []int{15, 16}, n, "turn %d of %s", i, who[i])
			if i >= 4 {
				assert.Equal(t, who[i-4], who[i], "they take turns")
			}
		}
		require.Greater(t, len(times), 16)
	})
}

// Those who say large messages and those who say small ones get the same, by bytes and messages, and a gateway
// as many times that as it has weight.
func TestTurnsAreWorthTheSame(t *testing.T) {
	for name, sizes := range map[string][]int{
		"tiny and large":   {0, 7 << 10, 15 << 10},
		"above one turn":   {0, 30 << 10, 60 << 10},
		"all above a turn": {20 << 10, 40 << 10, 60 << 10},
	} {
		for _, weight := range []int{1, 4} {
			t.Run(fmt.Sprintf("%s, weight %d", name, weight), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					s := newServer(true)
					s.pace = 20 * time.Millisecond // so few are on their way that all have something waiting
					o := startLink(t, 8<<20, s)
					speakers := newSpeakers(o, "s", len(sizes))
					speakers[0].weight = weight
					for i, speaker := range speakers {
						go speaker.flood(sizes[i])
					}
					time.Sleep(2 * time.Second) // the first to come had the link for itself
					synctest.Wait()
					from := len(s.wrote())
					time.Sleep(20 * time.Second)
					o.Abort()
					synctest.Wait()
					spent, largest := map[string]int{}, 0
					for _, e := range s.got[from:] {
						if e.Kind == Message {
							spent[e.Sender] += cost(&e)
							largest = max(largest, cost(&e))
						}
					}
					first := spent[speakers[0].name] / weight
					require.Greater(t, first, 8*turn, "the test is too short to tell")
					for _, speaker := range speakers[1:] {
						assert.InDelta(t, first, spent[speaker.name], float64(2*turn+2*largest), "%v", spent)
					}
				})
			})
		}
	}
}

// Rounds in which nobody can say anything are passed at once, and no more of them than that.
func TestMessagesOfSeveralTurnsAlternate(t *testing.T) {
	var tr turns[string]
	lines := make([]Line[string], 3)
	for i := range lines {
		for range 4 {
			tr.add(tr.queueOf(&lines[i]), 1, Entry[string]{Kind: Message, Frame: make([]byte, 30*turn), Sender: strconv.Itoa(i)})
		}
	}
	order := ""
	for q := tr.next(); q != nil; q = tr.next() {
		e := tr.take(q)
		order += e.Sender
	}
	require.Equal(t, strings.Repeat("012", 4), order)
}

// wantServedWithin asserts that nobody else had more than so many turns between two places in what was written.
func wantServedWithin(t *testing.T, turns int, between []Entry[string], who string) {
	t.Helper()
	spent, largest := map[string]int{}, map[string]int{}
	for _, e := range between {
		if e.Kind == Message && e.Sender != who {
			spent[e.Sender] += cost(&e)
			largest[e.Sender] = max(largest[e.Sender], cost(&e))
		}
	}
	for sender, n := range spent {
		if n > turns*turn+largest[sender] {
			t.Errorf("%s had to wait for %.1f turns of %s, not for %d", who, float64(n)/turn, sender, turns)
		}
	}
}

// boundOf is for how many turns of each other sender a message waits at most, once it is the first of its own: as many as
// it costs, one that the other is in, and one for which the other goes first because it had nothing waiting.
func boundOf[S any](e *Entry[S], weight int) int { return (cost(e)+turn*weight-1)/(turn*weight) + 2 }

func TestALargeMessageIsServedWithinABoundedNumberOfTurns(t *testing.T) {
	for _, size := range []int{0, 5 << 10, 64 << 10, 500 << 10} {
		for _, others := range []int{50, 30 << 10} {
			t.Run(fmt.Sprintf("%d among %d", size, others), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					s := newServer(true)
					s.pace = 5 * time.Millisecond
					o := startLink(t, 8<<20, s)
					for _, flooder := range newSpeakers(o, "flooder", 10) {
						go flooder.flood(others)
					}
					time.Sleep(2 * time.Second)
					synctest.Wait()
					alice := newSpeaker(o, "alice")
					from := len(s.wrote())
					large := alice.insist(t.Context(), size)
					time.Sleep(30 * time.Second)
					large.want(t, nil, "alice")
					o.Abort()
					synctest.Wait()
					to := slices.IndexFunc(s.got, func(e Entry[string]) bool { return e.Sender == "alice" })
					require.Positive(t, to, "was not written at all")
					e := s.got[to]
					wantServedWithin(t, boundOf(&e, 1), s.got[from:to], "alice")
				})
			})
		}
	}
}

// What is too large for the room left of the link is let in before what others, who come later, fill it with again.
func TestAMessageLargerThanTheRoomIsNotStarved(t *testing.T) {
	for _, flood := range []int{50, 5 << 10, 30 << 10} {
		t.Run(strconv.Itoa(flood), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newServer(true)
				s.pace = time.Millisecond
				o := startLink(t, 256<<10, s)
				for _, flooder := range newSpeakers(o, "flooder", 20) {
					go flooder.flood(flood)
				}
				time.Sleep(time.Second)
				alice := newSpeaker(o, "alice")
				large := alice.insist(t.Context(), 600<<10)
				time.Sleep(10 * time.Second)
				large.want(t, nil, "alice")
			})
		})
	}
}

// Room.

func TestASenderHasABoundOfItsOwn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newServer(false)
		o := startLink(t, 8<<20, s)
		fill(t, o, s)
		for _, weight := range []int{1, 3} {
			alice := newSpeaker(o, "alice"+strconv.Itoa(weight)+"-")
			alice.weight = weight
			n := 0
			for ; alice.say(1000) == nil; n++ {
				require.Less(t, n, 10_000)
			}
			assert.Equal(t, weight*lineShare/(1000+overhead), n)
			require.ErrorIs(t, alice.say(2000), ErrFull)
		}
		bob := newSpeaker(o, "bob")
		require.NoError(t, bob.say(2<<20), "one message may be of any size")
		require.ErrorIs(t, bob.say(0), ErrFull)
		cathy := newSpeaker(o, "cathy")
		for n := 0; cathy.say(0) == nil; n++ {
			require.Less(t, n, lineShare/overhead, "tiny ones are bounded, too")
		}
	})
}

func TestASenderWaitsForRoomOfItsOwn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newServer(false)
		o := startLink(t, 8<<20, s)
		fill(t, o, s)
		alice := newSpeaker(o, "alice")
		for more := true; more; {
			more = alice.say(10<<10) == nil
		}
		waits := alice.insist(t.Context(), 10<<10)
		waits.wantWaiting(t, "alice")
		require.NoError(t, newSpeaker(o, "bob").say(10<<10), "nobody else waits")
		s.answer()
		waits.want(t, nil, "alice")
		s.settle()
		require.Equal(t, "alice"+strconv.Itoa(alice.n-1), s.said()[len(s.said())-1])
	})
}

func TestALinkIsBoundedInBytes(t *testing.T) {
	const limit = 1 << 20
	synctest.Test(t, func(t *testing.T) {
		s := newServer(false)
		o := startLink(t, limit, s)
		fill(t, o, s)
		for _, speaker := range newSpeakers(o, "s", 1000) {
			for more := true; more; {
				more = speaker.say(5000) == nil
			}
		}
		assert.LessOrEqual(t, o.size, limit)
		assert.Greater(t, o.size, limit-6000)

		for _, speaker := range newSpeakers(o, "small", 500) { // half of them would fill it
			require.NoError(t, speaker.say(memory.TinyMessage), "small ones of those with nothing waiting always fit")
			require.ErrorIs(t, speaker.say(0), ErrFull, "and no other")
		}
		waits := newSpeaker(o, "large").insist(t.Context(), 5000)
		waits.wantWaiting(t, "large")
		s.settle()
		waits.want(t, nil, "large")
	})
	synctest.Test(t, func(t *testing.T) {
		s := newServer(false)
		o := startLink(t, limit, s)
		fill(t, o, s)
		for _, speaker := range newSpeakers(o, "s", 100) {
			for more := true; more; {
				more = speaker.say(500) == nil
			}
		}
		// Those that have something waiting leave half of the room to others.
		assert.LessOrEqual(t, o.size, limit/2+100*(500+overhead))
		assert.Greater(t, o.size, limit/2-(500+overhead))
		require.NoError(t, newSpeaker(o, "other").say(100<<10))
	})
}

func TestThoseWhoWaitForRoomGoInTheOrderInWhichTheyCame(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newServer(false)
		o := startLink(t, 100<<10, s)
		fill(t, o, s)
		require.NoError(t, newSpeaker(o, "first").say(90<<10))
		var all []putting
		for _, speaker := range newSpeakers(o, "waits", 5) {
			all = append(all, speaker.insist(t.Context(), 60<<10))
			all[len(all)-1].wantWaiting(t, speaker.name)
		}
		late := newSpeaker(o, "late")
		require.ErrorIs(t, late.say(5<<10), ErrFull, "it would fit, but others came before")
		lateWaits := late.insist(t.Context(), 5<<10)
		lateWaits.wantWaiting(t, "late")
		require.NoError(t, newSpeaker(o, "small").say(50), "but what is small always fits")

		s.settle()
		for i, p := range all {
			p.want(t, nil, strconv.Itoa(i))
		}
		lateWaits.want(t, nil, "late")
		var order []string
		for _, text := range s.said()[startMessages:] {
			if !strings.HasPrefix(text, "small") {
				order = append(order, text)
			}
		}
		require.Equal(t, []string{"first0", "waits0-0", "waits1-0", "waits2-0", "waits3-0"}, order[:5])
		require.ElementsMatch(t, []string{"waits4-0", "late0"}, order[5:])
	})
}

func TestPutThatIsGivenUpLeavesNothingBehind(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newServer(false)
		o := startLink(t, 100<<10, s)
		fill(t, o, s)
		require.NoError(t, newSpeaker(o, "first").say(50<<10))
		ctx, cancel := context.WithCancel(t.Context())
		speakers := newSpeakers(o, "s", 3)
		alice, bob, cathy := speakers[0], speakers[1], speakers[2]
		aliceWaits := alice.insist(ctx, 80<<10)
		aliceWaits.wantWaiting(t, "alice")
		bobWaits := bob.insist(t.Context(), 40<<10)
		bobWaits.wantWaiting(t, "bob, behind alice")
		cathyWaits := cathy.insist(t.Context(), 60<<10)
		cathyWaits.wantWaiting(t, "cathy")
		dave := newSpeaker(o, "dave")
		for more := true; more; {
			more = dave.say(3000) == nil
		}
		daves := dave.insist(ctx, 3000)
		daves.wantWaiting(t, "dave, who has something waiting")

		cancel()
		aliceWaits.want(t, context.Canceled, "alice")
		daves.want(t, context.Canceled, "dave")
		assert.Nil(t, alice.line.queue)
		bobWaits.want(t, nil, "bob, who was only kept by alice")
		cathyWaits.wantWaiting(t, "cathy")
		s.settle()
		cathyWaits.want(t, nil, "cathy")
		assert.NotContains(t, s.said(), "s0-0")
		assert.NotContains(t, s.said(), "dave"+strconv.Itoa(dave.n-1))
		require.NoError(t, alice.say(10), "who may speak again")
		require.NoError(t, dave.say(10))
		s.settle()
		assert.Contains(t, s.said(), "s0-1")
	})
}

// Of many that speak in one line, one goes elsewhere: what waits of it does not overtake what it says there.
func TestWhatASenderHasWaitingCanBeWithdrawn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newServer(false)
		o := startLink(t, 100<<10, s)
		fill(t, o, s)
		line := &Line[string]{Shared: true}
		say := func(who, text string) {
			t.Helper()
			require.NoError(t, o.Try(message(who, text), line, 1))
		}
		say("alice", "a0")
		say("bob", "b0")
		say("alice", "a1")
		other := newSpeaker(o, "other")
		other.sayAll(t, 2, 0)

		assert.Equal(t, []string{"alice", "bob"}, o.Waiting(line))
		assert.Empty(t, o.Waiting(&Line[string]{}))
		assert.Empty(t, o.Withdraw(&Line[string]{}, "alice"), "has nothing waiting there")
		assert.Equal(t, []string{"a0", "a1"}, texts(o.Withdraw(line, "alice")))
		assert.Empty(t, o.Withdraw(line, "alice"), "again")
		say("bob", "b1")
		s.settle()
		assert.Equal(t, []string{"b0", "b1"}, slices.DeleteFunc(s.said(), func(text string) bool { return text[0] != 'b' && text[0] != 'a' }))
		assert.Contains(t, s.said(), "other1")
	})
}

// What waits to be added is withdrawn with the rest, and whoever has waited behind it goes on.
func TestWhatWaitsForRoomCanBeWithdrawn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newServer(false)
		o := startLink(t, 100<<10, s)
		fill(t, o, s)
		alice, bob, cathy := newSpeaker(o, "alice"), newSpeaker(o, "bob"), newSpeaker(o, "cathy")
		alice.sayAll(t, 1, 50<<10)
		alices := alice.insist(t.Context(), 60<<10)
		alices.wantWaiting(t, "alice, of whom something waits")
		bobs := bob.insist(t.Context(), 80<<10)
		bobs.wantWaiting(t, "bob, for room")
		cathys := cathy.insist(t.Context(), 40<<10)
		cathys.wantWaiting(t, "cathy, behind bob")

		assert.Equal(t, []string{"bob0"}, texts(o.Withdraw(&bob.line, "bob")))
		bobs.want(t, nil, "bob")
		cathys.want(t, nil, "cathy, whom nobody keeps any more")
		assert.Nil(t, bob.line.queue)
		assert.Equal(t, []string{"alice0", "alice1"}, texts(o.Withdraw(&alice.line, "alice")))
		alices.want(t, nil, "alice")
		assert.Equal(t, []string{"cathy0"}, texts(o.Withdraw(&cathy.line, "cathy")))
		o.Drain(t.Context()) // nothing is left to be written
		alice.sayAll(t, 1, 0)
		s.settle()
		assert.Equal(t, []string{"alice2"}, s.said()[startMessages:])
	})
}

func TestPutReturnsTheErrorOfItsContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newServer(false)
		o := startLink(t, 100<<10, s)
		fill(t, o, s)
		require.NoError(t, newSpeaker(o, "first").say(100<<10))
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		began := time.Now()
		alice := newSpeaker(o, "alice")
		require.ErrorIs(t, o.Put(ctx, alice.next(10<<10), &alice.line, 1), context.DeadlineExceeded)
		assert.Equal(t, time.Second, time.Since(began))
	})
}

func TestThoseWhoWaitHearThatTheLinkIsClosed(t *testing.T) {
	for name, end := range map[string]func(o *Link[string]){
		"close": func(o *Link[string]) { o.Close(nil) },
		"reply": func(o *Link[string]) { o.Reply(nil) },
		"abort": func(o *Link[string]) { o.Abort() },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newServer(false)
				o := startLink(t, 100<<10, s)
				fill(t, o, s)
				require.NoError(t, newSpeaker(o, "first").say(100<<10))
				crowds := newSpeaker(o, "crowds")
				crowdsWaits := crowds.insist(t.Context(), 10<<10)
				alice := newSpeaker(o, "alice")
				require.NoError(t, alice.say(10))
				aliceWaits := alice.insist(t.Context(), 10<<10)
				aliceWaits.wantWaiting(t, "alice")
				crowdsWaits.wantWaiting(t, "crowds")

				end(o)
				crowdsWaits.want(t, ErrClosed, "crowds")
				aliceWaits.want(t, ErrClosed, "alice")
				require.ErrorIs(t, alice.say(10), ErrClosed)
				require.ErrorIs(t, o.Put(t.Context(), alice.next(1), &alice.line, 1), ErrClosed)
				require.ErrorIs(t, o.Push(alice.next(1)), ErrClosed)
				require.ErrorIs(t, o.Control(Pong, nil), ErrClosed)
				o.Abort()
				assert.Nil(t, alice.line.queue, "its line is ready for the next link")
				assert.Nil(t, crowds.line.queue)
			})
		})
	}
}

// whenAsked is a context that is done from when it is first asked for it, and has something else happen right then.
type whenAsked struct {
	context.Context
	meanwhile func()
	done      chan struct{}
}

func (c *whenAsked) Done() <-chan struct{} {
	c.meanwhile()
	return c.done
}

func (c *whenAsked) Err() error { return context.Canceled }

// A sender may be told to go on before it has begun to wait for that, and its message be written, and its queue
// another's by then.
func TestADecisionIsForWhomItWasMade(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newServer(false)
		o := startLink(t, 100<<10, s)
		fill(t, o, s)
		require.NoError(t, newSpeaker(o, "first").say(100<<10))
		alice := newSpeaker(o, "alice")
		var others []putting // one of which gets the queue that was alice's
		var resume func()
		ctx := &whenAsked{Context: t.Context(), done: make(chan struct{})}
		ctx.meanwhile = func() {
			s.settle() // alice's message is written, and nothing waits
			resume = s.stall()
			require.NoError(t, o.Push(message("own", strings.Repeat(".", 100<<10)))) // takes the room, and no queue
			for _, other := range newSpeakers(o, "other", 4) {
				others = append(others, other.insist(t.Context(), 10<<10))
			}
			synctest.Wait()
		}
		require.NoError(t, o.Put(ctx, alice.next(10<<10), &alice.line, 1), "it was written")
		require.Contains(t, s.said(), "alice0")
		for i, waits := range others {
			waits.wantWaiting(t, fmt.Sprintf("other%d, for whom there is no room", i))
		}
		resume()
		s.settle()
		for i, waits := range others {
			waits.want(t, nil, strconv.Itoa(i))
			require.Contains(t, s.said(), fmt.Sprintf("other%d-0", i))
		}
	})
}

// The gateway's own, and the window.

func TestAPingIsTheFirstThatALinkWrites(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newServer(true)
		o := startLink(t, 1<<20, s)
		require.NoError(t, newSpeaker(o, "alice").say(0))
		time.Sleep(time.Hour)
		require.Equal(t, "ping", s.wrote()[0])
		require.Equal(t, []string{"ping", "alice0", "ping"}, s.wrote(), "and no more than is needed to know what was read")
		require.Len(t, s.acks, 2)
		assert.Positive(t, s.acks[1].Largest)
		assert.Empty(t, s.acks[1].Tried)
		assert.Zero(t, o.OnItsWay())
	})
}

func TestTheGatewaysOwnGoesFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newServer(false)
		o := startLink(t, 1<<20, s)
		synctest.Wait()
		resume := s.stall()
		require.NoError(t, o.Push(message("own", "first")))
		synctest.Wait()
		newSpeaker(o, "alice").sayAll(t, 2, 0)
		require.NoError(t, o.Push(message("own", "question1")))
		require.NoError(t, o.Push(message("own", "question2")))
		require.NoError(t, o.Control(Pong, []byte("1")))
		o.Ping()
		resume()
		synctest.Wait()
		require.Equal(t, []string{"ping", "first", "pong", "ping", "question1", "question2", "alice0", "alice1"}, s.wrote()[:8])
	})
}

func TestNoMoreIsOnItsWayThanTheWindowHolds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newServer(false)
		o := startLink(t, 1<<20, s)
		fill(t, o, s)
		newSpeaker(o, "alice").sayAll(t, 10, 0)
		synctest.Wait()
		require.Len(t, s.said(), startMessages, "what is beyond the window waits")
		require.Equal(t, startMessages, o.OnItsWay())

		require.NoError(t, o.Push(message("own", "question")))
		require.NoError(t, o.Control(Pong, nil))
		synctest.Wait()
		require.Equal(t, "question", s.said()[startMessages], "the gateway's own passes a closed window")
		require.Equal(t, "pong", s.wrote()[len(s.wrote())-2])
		require.Len(t, s.said(), startMessages+1)

		s.answer()
		synctest.Wait()
		require.Len(t, s.said(), startMessages+1+10, "what was read makes room")
		_, caught, _ := o.Unacknowledged()
		assert.False(t, caught)
	})
}

func TestAServerThatNeverAnswersPingsIsServed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newServer(false)
		o := startLink(t, 1<<20, s)
		alice, bob := newSpeaker(o, "alice"), newSpeaker(o, "bob")
		bob.trial = true
		alice.sayAll(t, 100, 0)
		bob.sayAll(t, 3, 0)
		time.Sleep(time.Second)
		require.Less(t, len(s.said()), 100)
		time.Sleep(4 * time.Second)
		require.Len(t, s.said(), 103, "also what is on trial")
		_, caught, _ := o.Unacknowledged()
		assert.False(t, caught, "of which nobody can say anything")
		for range 30 * time.Minute / time.Second {
			require.NoError(t, alice.say(0))
			require.NoError(t, bob.say(0))
			synctest.Wait()
			require.Zero(t, o.lines.waiting, "nothing waits any more")
			time.Sleep(time.Second)
		}
		for range 2 * maxSent {
			require.NoError(t, alice.say(0))
			synctest.Wait()
		}
		require.LessOrEqual(t, o.OnItsWay(), maxSent, "what is remembered is bounded")
	})
}

// What comes when nothing waits any more, and the window is open, is written at once.
func TestAWindowThatWasClosedOnceHoldsUpNobody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newServer(false)
		o := startLink(t, 1<<20, s)
		s.settle()
		alice := newSpeaker(o, "alice")
		resume := s.stall()
		require.NoError(t, alice.say(0))
		synctest.Wait()
		alice.sayAll(t, startMessages+2, 0)
		resumeNext := s.stall()
		resume()
		synctest.Wait() // a batch of as many as the window holds is being written
		o.Pong(binary.BigEndian.AppendUint64(nil, o.lastPing))
		resumeNext()
		synctest.Wait()
		require.Len(t, s.said(), startMessages+3)
		s.settle()
		before := len(s.said())
		require.NoError(t, alice.say(0))
		synctest.Wait()
		require.Len(t, s.said(), before+1)
	})
}

func TestTooManyPongsAreNotKept(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newServer(false)
		o := startLink(t, 1<<20, s)
		synctest.Wait()
		s.stall()
		require.NoError(t, o.Push(message("own", "1")))
		synctest.Wait()
		for range maxControls {
			require.NoError(t, o.Control(Pong, nil))
		}
		require.ErrorIs(t, o.Control(Pong, nil), ErrFull)
		o.Ping()
		assert.Len(t, o.controls, maxControls)
	})
}

func TestPongsThatNobodyAskedFor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newServer(false)
		o := startLink(t, 1<<20, s)
		fill(t, o, s)
		for _, payload := range [][]byte{nil, {1}, make([]byte, 8), []byte("12345678"), make([]byte, 125)} {
			_, expected := o.Pong(payload)
			require.False(t, expected)
		}
		require.Equal(t, startMessages, o.OnItsWay())
		s.answer()
		synctest.Wait()
		_, expected := o.Pong(binary.BigEndian.AppendUint64(nil, 1))
		require.False(t, expected, "twice")
	})
}

// Trials.

func TestAMessageOnTrialStandsBetweenTwoPings(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newServer(false)
		o := startLink(t, 1<<20, s)
		s.settle()
		alice, bob := newSpeaker(o, "alice"), newSpeaker(o, "bob")
		require.NoError(t, bob.say(0))
		synctest.Wait()
		alice.trial = true
		alice.sayAll(t, 2, 100)
		synctest.Wait()
		require.NoError(t, bob.say(0), "others go on meanwhile")
		synctest.Wait()
		require.Equal(t, []string{"ping", "bob0", "ping", "alice0", "ping", "alice1", "ping", "bob1"}, s.wrote(), "one ping between two is enough")

		sent, caught, _ := o.Unacknowledged()
		require.False(t, caught, "the server may not have come to it")
		require.Len(t, sent, 4)

		s.answerFirst(t)
		sent, caught, before := o.Unacknowledged()
		require.Equal(t, "alice", sent[0].Sender)
		require.Len(t, sent, 3)
		require.True(t, caught)
		require.Empty(t, before)

		s.answerFirst(t)
		require.Len(t, s.acks[len(s.acks)-1].Tried, 1)
		require.Equal(t, 100, s.acks[len(s.acks)-1].Largest)
		s.answerFirst(t)
		sent, caught, before = o.Unacknowledged()
		require.Equal(t, "bob", sent[0].Sender)
		require.False(t, caught, "is not on trial")
		require.Len(t, before, 2)
		time.Sleep(lateFor)
		_, _, before = o.Unacknowledged()
		require.Empty(t, before, "the server would have ended the link by now")
		s.settle()
		assert.Empty(t, s.acks[0].Tried)
	})
}

// A ping that was answered long before a message on trial was written does not tell that the server has come to it.
func TestAMessageOnTrialHasAPingOfItsOwn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newServer(false)
		o := startLink(t, 1<<20, s)
		s.settle()
		alice := newSpeaker(o, "alice")
		alice.trial = true
		require.NoError(t, alice.say(0))
		synctest.Wait()
		s.settle()
		time.Sleep(time.Hour)
		s.settle()
		require.NoError(t, alice.say(0))
		synctest.Wait()
		_, caught, _ := o.Unacknowledged()
		require.False(t, caught)
		s.answerFirst(t)
		_, caught, _ = o.Unacknowledged()
		require.True(t, caught)
	})
}

// No more pings are on their way for the sake of trials than a server answers gladly.
func TestMessagesOnTrialWaitForTheirPings(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newServer(false)
		o := startLink(t, 1<<20, s)
		s.settle()
		alice, bob := newSpeaker(o, "alice"), newSpeaker(o, "bob")
		alice.trial = true
		alice.sayAll(t, 20, 0)
		synctest.Wait()
		require.Len(t, s.said(), maxPings-2)
		s.answerFirst(t)
		synctest.Wait()
		require.Len(t, s.said(), maxPings-1)
		bob.sayAll(t, 3, 0)
		for len(s.said()) < 23 {
			s.answerFirst(t)
			synctest.Wait()
		}
		s.settle()
		_, caught, before := o.Unacknowledged()
		require.False(t, caught)
		require.Len(t, before, 20)
	})
}

// One that is to be on trial alone waits for others that are, and they for it; what is not on trial passes.
func TestOneIsOnTrialAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newServer(false)
		o := startLink(t, 1<<20, s)
		s.settle()
		alice, bob, cathy := newSpeaker(o, "alice"), newSpeaker(o, "bob"), newSpeaker(o, "cathy")
		alice.trial, bob.trial, bob.alone = true, true, true
		require.NoError(t, alice.say(0))
		synctest.Wait()
		bob.sayAll(t, 2, 0)
		synctest.Wait()
		require.NoError(t, cathy.say(0))
		synctest.Wait()
		require.Equal(t, []string{"alice0", "cathy0"}, s.said())
		s.answerFirst(t)
		s.answerFirst(t) // alice0 was read
		synctest.Wait()
		require.Equal(t, []string{"alice0", "cathy0", "bob0"}, s.said())
		require.NoError(t, alice.say(0))
		synctest.Wait()
		require.NoError(t, cathy.say(0))
		synctest.Wait()
		require.Equal(t, []string{"alice0", "cathy0", "bob0", "cathy1"}, s.said())
		for len(s.said()) < 6 {
			s.answerFirst(t)
			synctest.Wait()
		}
		s.settle()
		require.ElementsMatch(t, []string{"bob1", "alice1"}, s.said()[4:])
	})
}

// A server that does not answer keeps others from their trials for trialTime, and somewhat more, at most.
func TestATrialThatIsStuckDoesNotBlockOthers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newServer(false)
		o := startLink(t, 1<<20, s)
		s.settle()
		alice, bob := newSpeaker(o, "alice"), newSpeaker(o, "bob")
		alice.trial, alice.alone, bob.trial, bob.alone = true, true, true, true
		require.NoError(t, alice.say(0))
		synctest.Wait()
		require.NoError(t, bob.say(0))
		time.Sleep(trialTime - time.Second)
		require.Equal(t, []string{"alice0"}, s.said())
		time.Sleep(3 * time.Second)
		require.Equal(t, []string{"alice0", "bob0"}, s.said())
	})
}

// Others pass what waits for a ping.
func TestOthersPassWhatIsToBeTried(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newServer(false)
		o := startLink(t, 1<<20, s)
		s.settle()
		suspects := []*speaker{newSpeaker(o, "alice"), newSpeaker(o, "cathy")}
		bob := newSpeaker(o, "bob")
		for _, suspect := range suspects {
			suspect.trial = true
			suspect.sayAll(t, 20, 0)
		}
		synctest.Wait()
		tried := len(s.said())
		require.Equal(t, maxPings-2, tried)
		bob.sayAll(t, 5, 0)
		synctest.Wait()
		require.Equal(t, []string{"bob0", "bob1", "bob2", "bob3", "bob4"}, s.said()[tried:])
		for len(s.said()) < 45 {
			s.answerFirst(t)
			synctest.Wait()
		}
	})
}

// A suspect has no more of the link than anybody else, even if each message of its fills the window.
func TestTrialsTakePartInTheTurns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newServer(false)
		o := startLink(t, 8<<20, s)
		synctest.Wait()
		s.settle()
		suspect, bob := newSpeaker(o, "suspect"), newSpeaker(o, "bob")
		suspect.trial = true
		require.NoError(t, suspect.say(startBytes+1))
		synctest.Wait()
		require.NoError(t, suspect.say(startBytes+1))
		for range 3 {
			require.NoError(t, bob.say(100))
		}
		synctest.Wait()
		require.Equal(t, []string{"suspect0"}, s.said(), "it fills the window")
		s.settle()
		require.Equal(t, []string{"suspect0", "bob0", "bob1", "bob2", "suspect1"}, s.said())
	})
}

func TestAPingBeforeATrialThatWasAnsweredLongAgoProvesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newServer(false)
		o := startLink(t, 1<<20, s)
		s.settle()
		alice := newSpeaker(o, "alice")
		alice.trial = true
		require.NoError(t, alice.say(0))
		synctest.Wait()
		s.answerFirst(t)
		time.Sleep(trialTime - time.Millisecond)
		_, caught, _ := o.Unacknowledged()
		require.True(t, caught)
		time.Sleep(2 * time.Millisecond)
		_, caught, _ = o.Unacknowledged()
		require.False(t, caught)
	})
}

// The end.

// What a link did not write before it was lost is written to the next link: nothing may be missing, nothing that was
// written may come again, and the order of each sender's stays.
func TestAbortOfALinkReturnsExactlyWhatWasNotWritten(t *testing.T) {
	for breaksAt := range 14 {
		t.Run(fmt.Sprintf("breaks after %d", breaksAt), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newServer(true)
				s.breakAt(breaksAt)
				resume := s.stall() // the first ping already
				o := startLink(t, 1<<20, s)
				synctest.Wait()
				speakers := newSpeakers(o, "s", 4)
				speakers[3].trial = true
				for i := range 3 {
					for _, speaker := range speakers {
						require.NoError(t, speaker.say(50))
						if i == 1 {
							synctest.Wait()
						}
					}
				}
				resume()
				synctest.Wait()
				if breaksAt < 13 {
					require.ErrorIs(t, speakers[0].say(1), ErrClosed)
					assert.GreaterOrEqual(t, s.hurried, 1, "the reader has a moment to learn why")
				}
				unwritten := o.Abort()
				for _, e := range unwritten {
					assert.Equal(t, Message, e.Kind)
				}
				all := append(slices.Clone(s.got), unwritten...)
				for _, speaker := range speakers {
					var of []string
					for _, e := range all {
						if e.Sender == speaker.name {
							of = append(of, textOf(e))
						}
					}
					require.Len(t, of, 3)
					for i, text := range of {
						require.Equal(t, speaker.name+strconv.Itoa(i), text)
					}
					assert.Nil(t, speaker.line.queue)
				}
				assert.Empty(t, o.Abort(), "once")
			})
		})
	}
}

func TestAbortDoesNotWaitForALinkThatIsStuck(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newServer(false)
		o := startLink(t, 1<<20, s)
		synctest.Wait()
		s.stall()
		alice := newSpeaker(o, "alice")
		alice.sayAll(t, 3, 0)
		synctest.Wait()
		require.NoError(t, o.Push(message("own", "question")))
		began := time.Now()
		unwritten := o.Abort()
		assert.Zero(t, time.Since(began))
		assert.ElementsMatch(t, []string{"alice0", "alice1", "alice2", "question"}, texts(unwritten))
		assert.Equal(t, 1, s.closed)
	})
}

func TestCloseWritesAllThatWaitsWhateverTheWindowSays(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newServer(false)
		o := startLink(t, 8<<20, s)
		fill(t, o, s)
		speakers := newSpeakers(o, "s", 20)
		for i, speaker := range speakers {
			speaker.trial = i%2 == 0
			speaker.sayAll(t, 3, 10<<10)
		}
		o.Close([]byte("goodbye"))
		assert.Equal(t, 1, s.hurried)
		assert.Zero(t, s.closed, "the reader is left to hear the server's answer")
		synctest.Wait()
		require.Len(t, s.said(), startMessages+60)
		wrote := s.wrote()
		require.Equal(t, "close", wrote[len(wrote)-1])
		require.Equal(t, "goodbye", string(s.got[len(s.got)-1].Frame))
		for _, speaker := range speakers {
			assert.Less(t, slices.Index(wrote, speaker.name+"0"), slices.Index(wrote, speaker.name+"1"))
			assert.Less(t, slices.Index(wrote, speaker.name+"1"), slices.Index(wrote, speaker.name+"2"))
		}
		o.Close([]byte("again"))
		o.Reply([]byte("and again"))
		synctest.Wait()
		assert.Len(t, s.wrote(), len(wrote))
		assert.Empty(t, o.Abort())
	})
}

// A server that has said that it is closing reads no more: what waits for it is for the next link.
func TestReplyOfALinkKeepsWhatWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newServer(false)
		o := startLink(t, 1<<20, s)
		synctest.Wait()
		resume := s.stall()
		alice, bob := newSpeaker(o, "alice"), newSpeaker(o, "bob")
		bob.trial = true
		alice.sayAll(t, 1, 0)
		synctest.Wait()
		alice.sayAll(t, 2, 0)
		bob.sayAll(t, 2, 0)
		require.NoError(t, o.Push(message("own", "question")))
		require.NoError(t, o.Control(Pong, nil))
		o.Reply([]byte("goodbye"))
		assert.Equal(t, 1, s.hurried)
		resume()
		synctest.Wait()
		require.Equal(t, []string{"alice0"}, s.said())
		require.Equal(t, "close", s.wrote()[len(s.wrote())-1])
		require.Equal(t, []string{"question", "alice1", "alice2", "bob0", "bob1"}, texts(o.Abort()))
	})
}

func TestDrainOfALinkWaitsUntilNothingIsLeft(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newServer(false)
		o := startLink(t, 1<<20, s)
		began := time.Now()
		o.Drain(t.Context()) // nothing to do
		assert.Zero(t, time.Since(began))

		fill(t, o, s)
		newSpeaker(o, "alice").sayAll(t, 3, 0)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		o.Drain(ctx)
		assert.Equal(t, time.Second, time.Since(began), "no longer than its context")
		time.AfterFunc(time.Second, func() { s.answer() })
		o.Drain(t.Context())
		assert.Equal(t, 2*time.Second, time.Since(began))
		assert.Contains(t, s.said(), "alice2")

		s.settle()
		resume := s.stall()
		time.AfterFunc(time.Second, resume)
		o.signal() // the writer has a look at the window
		require.NoError(t, newSpeaker(o, "bob").say(0))
		began = time.Now()
		o.Drain(t.Context())
		assert.Equal(t, time.Second, time.Since(began))
		assert.Contains(t, s.said(), "bob0")

		newSpeaker(o, "cathy").sayAll(t, 30, 0)
		time.AfterFunc(time.Second, s.Close) // and with the socket
		began = time.Now()
		o.Drain(t.Context())
		assert.LessOrEqual(t, time.Since(began), 3*time.Second)
	})
}

// Memory.

func TestAMessageAllocatesNothing(t *testing.T) {
	account := newAccount()
	o := NewLink[string](discard{}, 1<<20, account, false)
	defer o.Abort()
	lines := make([]Line[string], 100)
	e := message("alice", "hello")
	allocations := testing.AllocsPerRun(100, func() {
		for i := range lines {
			if o.Put(context.Background(), e, &lines[i], 1) != nil {
				t.Fail()
			}
		}
		for account.Held() > 0 {
			o.signal()
			runtime.Gosched()
			o.mu.Lock()
			n := o.lastPing
			o.mu.Unlock()
			o.Pong(pongOf(n))
		}
	})
	assert.LessOrEqual(t, allocations/float64(len(lines)), 0.3, "allocations of a message: none but of pings")
}

// pongOf returns the payload of a pong; of the same number, the same memory.
func pongOf(number uint64) []byte {
	p := pongs.Get().(*[8]byte)
	defer pongs.Put(p)
	binary.BigEndian.PutUint64(p[:], number)
	return p[:]
}

var pongs = sync.Pool{New: func() any { return new([8]byte) }}

func TestASenderWithNothingWaitingHasNoQueue(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newServer(true)
		o := startLink(t, 8<<20, s)
		speakers := newSpeakers(o, "s", 2*keptQueues)
		for range 3 {
			resume := s.stall()
			for _, speaker := range speakers {
				speaker.sayAll(t, 3, 100)
			}
			speakers[0].sayAll(t, 200, 0)
			resume()
			synctest.Wait()
			for _, speaker := range speakers {
				require.Nil(t, speaker.line.queue)
			}
			require.Equal(t, keptQueues, o.lines.spares)
			require.Empty(t, o.lines.round.len+o.lines.fresh.len)
		}
		require.NoError(t, newSpeaker(o, "s").o.Try(Entry[string]{Frame: make([]byte, 9<<20)}, &speakers[0].line, 1))
	})
}

// A burst is over; an hour later nothing of what was said may still be held.
func TestAnIdleLinkHoldsNoMemory(t *testing.T) {
	var said released
	s := newServer(true)
	s.breaksAt = -1
	o := NewLink[string](forgetfulServer{s}, 8<<20, newAccount(), false)
	s.link = o
	close(s.ready)
	s.reading.Go(s.read)
	resume := s.stall()
	lines := make([]Line[string], 300)
	for i := range lines {
		for range 5 {
			require.NoError(t, o.Try(said.entry(), &lines[i], 1))
		}
	}
	resume()
	o.Drain(t.Context())
	said.want(t)
	for q := o.lines.spare; q != nil; q = q.next {
		require.LessOrEqual(t, cap(q.entries), keptPlaces)
	}
	o.Abort()
	s.reading.Wait()
}

// forgetfulServer keeps nothing of what is written but pings.
type forgetfulServer struct{ *fakeServer }

func (s forgetfulServer) WriteBatch(batch []Entry[string]) (int, error) {
	n, err := s.fakeServer.WriteBatch(batch)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.got = nil
	s.unread = slices.DeleteFunc(s.unread, func(e Entry[string]) bool { return e.Kind == Message })
	return n, err
}

// Many at once.

// Many senders at once, some of which give up, or are on trial; the socket breaks at some point, or not. Whatever was
// taken is written or returned, exactly once, and in the order in which each sender sent.
func TestManySendersAtOnce(t *testing.T) {
	const senders, each = 16, 200
	for _, breaksAt := range []int{-1, 0, 1000, 2500} {
		t.Run(fmt.Sprintf("breaks at %d", breaksAt), func(t *testing.T) {
			s := newServer(true)
			s.breakAt(breaksAt)
			o := startLink(t, 10_000, s)
			taken := make([][]string, senders)
			var sending sync.WaitGroup
			for sender := range senders {
				sending.Go(func() {
					random := rand.New(rand.NewPCG(uint64(sender), uint64(breaksAt)))
					var line Line[string]
					for i := range each {
						e := message(strconv.Itoa(sender), fmt.Sprintf("%d/%d", sender, i))
						e.Frame = append(e.Frame, make([]byte, random.IntN(1+random.IntN(8000)))...)
						e.Trial = random.IntN(20) == 0
						text := string(e.Frame)
						err := ErrFull
						if random.IntN(2) == 0 {
							err = o.Try(e, &line, 1+sender%3)
						}
						if errors.Is(err, ErrFull) {
							ctx, cancel := context.WithCancel(context.Background())
							if random.IntN(8) == 0 {
								go func() {
									runtime.Gosched()
									cancel()
								}()
							}
							err = o.Put(ctx, e, &line, 1+sender%3)
							cancel()
						}
						switch {
						case err == nil:
							taken[sender] = append(taken[sender], text)
						case errors.Is(err, ErrClosed):
							return
						case !errors.Is(err, context.Canceled):
							t.Errorf("unexpected: %v", err)
						}
					}
				})
			}
			sending.Wait()
			if breaksAt < 0 {
				o.Drain(t.Context())
			}
			unwritten := o.Abort()
			if breaksAt < 0 {
				assert.Empty(t, unwritten)
			}
			wantAllOnce(t, taken, append(s.got, unwritten...))
		})
	}
}

// What a link has to do is told by sender, with the message for which a sender waits.
func TestLoadOfALink(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newServer(false)
		o := startLink(t, 8<<20, s)
		require.Empty(t, o.Load().Lines)
		fill(t, o, s)
		before := o.Load()
		require.Equal(t, startMessages, before.OnItsWay)
		alice, bob := newSpeaker(o, "alice"), newSpeaker(o, "bob")
		alice.sayAll(t, 3, 1000)
		waits := alice.insist(t.Context(), lineShare)
		bob.sayAll(t, 1, 500)
		waits.wantWaiting(t, "alice")
		l := o.Load()
		alices, bobs := l.Lines[&alice.line], l.Lines[&bob.line]
		require.GreaterOrEqual(t, alices, 3*(1000+overhead)+lineShare+overhead)
		require.GreaterOrEqual(t, bobs, 500+overhead)
		require.Len(t, l.Lines, 2)
		require.Equal(t, alices+bobs-lineShare-overhead, l.Waiting-before.Waiting, "what is to be taken yet is not the link's")

		s.answers.Store(true)
		s.answer()
		synctest.Wait()
		time.Sleep(time.Second)
		synctest.Wait()
		l = o.Load()
		require.Empty(t, l.Lines)
		require.Zero(t, l.Waiting)
		require.Zero(t, l.OnItsWay)
		require.Zero(t, l.OnItsWayBytes)
	})
}
