package questions_test

import (
	"errors"
	"fmt"
	"net/netip"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/opampgateway/opampgateway/internal/questions"
)

type question = questions.Question[string]

// link is a book with the clock that its callers share.
type link struct {
	t *testing.T
	*questions.Book[string]
	clock *clock
}

type clock struct{ now time.Time }

// newLinks returns the books of n links to one server.
func newLinks(t *testing.T, n int) (*questions.Server, []*link) {
	t.Helper()
	server, links := newUntried(t, n)
	questions.NewBook[int](server).Answer("an earlier question", links[0].clock.now)
	return server, links
}

// newUntried returns the books of n links to a server that has never answered a question.
func newUntried(t *testing.T, n int) (*questions.Server, []*link) {
	t.Helper()
	server, now := questions.NewServer(), &clock{time.Now()}
	links := make([]*link, n)
	for i := range links {
		links[i] = &link{t, questions.NewBook[string](server), now}
	}
	return server, links
}

// newProbed returns the books of n links to a server that has never answered a question, and was first
// asked one a while ago.
func newProbed(t *testing.T, n int) (*questions.Server, []*link) {
	t.Helper()
	server, links := newUntried(t, n+1)
	links[n].wantSent("somebody")
	links[n].pass(500 * time.Millisecond)
	return server, links[:n]
}

func newLink(t *testing.T) *link {
	t.Helper()
	_, links := newLinks(t, 1)
	return links[0]
}

func (l *link) pass(d time.Duration) { l.clock.now = l.clock.now.Add(d) }

// about returns a question about somebody, who comes from an address of his own.
func (l *link) about(name string, class questions.Class) *question {
	return l.from(name, name, class)
}

// from returns a question under that UID about somebody who comes from a named address.
func (l *link) from(address, uid string, class questions.Class) *question {
	return &question{UID: uid, From: addressOf(address), Class: class, Expires: l.clock.now.Add(40 * time.Second), Asker: "the asker of " + uid}
}

var addresses sync.Map

// addressOf returns an address for each name.
func addressOf(name string) netip.Prefix {
	if known, ok := addresses.Load(name); ok {
		return known.(netip.Prefix)
	}
	n := addressCount.Add(1)
	address, _ := netip.AddrFrom4([4]byte{10, byte(n >> 16), byte(n >> 8), byte(n)}).Prefix(32)
	known, _ := addresses.LoadOrStore(name, address)
	return known.(netip.Prefix)
}

var addressCount atomic.Uint32

// ask asks q, which has to be taken, and returns what is sent.
func (l *link) ask(q *question) []string {
	l.t.Helper()
	send, err := l.Ask(q, l.clock.now)
	require.NoError(l.t, err, q.UID)
	return uids(send)
}

// wantSent asks about newcomers, and each has to be sent at once.
func (l *link) wantSent(names ...string) {
	l.t.Helper()
	for _, name := range names {
		require.Equal(l.t, []string{name}, l.ask(l.about(name, questions.ClassNewcomer)))
	}
}

// wantWait asks q, and it has to wait.
func (l *link) wantWait(q *question) *question {
	l.t.Helper()
	require.Empty(l.t, l.ask(q))
	return q
}

// wantAnswer answers what is open, and returns what is sent instead.
func (l *link) wantAnswer(uid string) []string {
	l.t.Helper()
	q, stray, send := l.Answer(uid, l.clock.now)
	require.False(l.t, stray, uid)
	require.NotNil(l.t, q, uid)
	require.Equal(l.t, uid, q.UID)
	return uids(send)
}

// wantStray has an answer be nobody's.
func (l *link) wantStray(uid string) {
	l.t.Helper()
	q, stray, send := l.Answer(uid, l.clock.now)
	require.True(l.t, stray, uid)
	require.Nil(l.t, q)
	require.Empty(l.t, send)
}

func (l *link) wantLen(waiting, sent int) {
	l.t.Helper()
	gotWaiting, gotSent := l.Len()
	require.Equal(l.t, [2]int{waiting, sent}, [2]int{gotWaiting, gotSent}, "waiting, sent")
}

// fill takes all places of newcomers, each for another address.
func (l *link) fill() {
	l.t.Helper()
	for i := range 256 {
		l.wantSent(fmt.Sprint("early bird ", i))
	}
}

func uids(list []*question) []string {
	var names []string
	for _, q := range list {
		names = append(names, q.UID)
	}
	return names
}

func TestWindows(t *testing.T) {
	l := newLink(t)
	l.fill()
	l.wantWait(l.about("alice", questions.ClassNewcomer))
	for i := range 128 { // who were in already do not wait behind those who were not
		name := fmt.Sprint("regular ", i)
		require.Equal(t, []string{name}, l.ask(l.about(name, questions.ClassIntroduction)))
	}
	l.wantWait(l.about("bob", questions.ClassIntroduction))
	l.wantLen(2, 256+128)
	require.Equal(t, []string{"alice"}, l.wantAnswer("early bird 7"))
	require.Empty(t, l.wantAnswer("early bird 8"))
	require.Equal(t, []string{"bob"}, l.wantAnswer("regular 7"))
	l.wantLen(0, 255+128)
}

func TestOneAddressGetsHalf(t *testing.T) {
	for class, want := range map[questions.Class]int{questions.ClassNewcomer: 128, questions.ClassIntroduction: 64} {
		l := newLink(t)
		for i := range 2 * want {
			l.ask(l.from("site", fmt.Sprint("agent ", i), class))
		}
		l.wantLen(want, want)
		require.Equal(t, []string{"alice"}, l.ask(l.about("alice", class)))
	}
}

func TestAddressesTakeTurns(t *testing.T) {
	l := newLink(t)
	l.fill()
	for _, uid := range []string{"a1", "a2", "a3", "b1", "c1", "b2"} {
		l.wantWait(l.from(uid[:1], uid, questions.ClassNewcomer))
	}
	for i, want := range []string{"a1", "b1", "c1"} {
		require.Equal(t, []string{want}, l.wantAnswer(fmt.Sprint("early bird ", i)))
	}
	require.Empty(t, l.wantAnswer("early bird 3"), "one place is free, and each of the two that wait holds one")
	require.Equal(t, []string{"a2"}, l.wantAnswer("early bird 4"))
	require.Equal(t, []string{"b2"}, l.wantAnswer("early bird 5"), "a holds two by now")
	require.Empty(t, l.wantAnswer("b1"), "a holds two, and no more are free")
	require.Equal(t, []string{"a3"}, l.wantAnswer("early bird 6"))
	l.wantLen(0, 256-2)
}

// TestPassedOver has mallory hold half of all places while others have much to ask at once.
func TestPassedOver(t *testing.T) {
	l := newLink(t)
	for i := range 129 {
		l.ask(l.from("mallory", fmt.Sprint("mallory ", i), questions.ClassNewcomer))
	}
	l.wantLen(1, 128)
	l.Pause(l.clock.now.Add(time.Second))
	var want []string
	for i := range 20 {
		for _, name := range []string{"alice", "bob"} {
			uid := fmt.Sprint(name, i)
			l.wantWait(l.from(name, uid, questions.ClassNewcomer))
			want = append(want, uid)
		}
	}
	l.pass(time.Second)
	_, send := l.Sweep(l.clock.now)
	require.Equal(t, want, uids(send))
	l.wantLen(1, 128+40)
}

// TestHangingUp has mallory fire questions and hang up, at a server that leaves bad ones unanswered.
func TestHangingUp(t *testing.T) {
	l := newLink(t)
	var sent int
	for i := range 1500 {
		q := l.from("mallory", fmt.Sprint("bad ", i), questions.ClassNewcomer)
		sent += len(l.ask(q))
		require.True(t, l.Abandon(q))
		require.False(t, l.Abandon(q), "it is nobody's any more")
	}
	require.Equal(t, 128, sent, "the server is at work on these")
	l.wantLen(0, 128)
	for i := range 15 {
		l.wantSent(fmt.Sprint("honest ", i))
		require.Empty(t, l.wantAnswer(fmt.Sprint("honest ", i)))
	}

	q, stray, send := l.Answer("bad 0", l.clock.now)
	require.Nil(t, q)
	require.False(t, stray, "it was asked")
	require.Empty(t, send)
	l.wantStray("bad 0")
	l.wantStray("bad 1400")

	l.pass(40 * time.Second)
	late := l.from("mallory", "late", questions.ClassNewcomer)
	expired, send := l.Sweep(l.clock.now)
	require.Empty(t, expired, "nobody has to be told")
	require.Empty(t, send)
	l.wantLen(0, 0)
	require.Equal(t, []string{"late"}, l.ask(late))
}

func TestWaitingIsBounded(t *testing.T) {
	l := newLink(t)
	l.Pause(l.clock.now.Add(time.Minute))
	for i := range 10_000 {
		l.wantWait(l.from("mallory", fmt.Sprint("mallory ", i), questions.ClassNewcomer))
	}
	refused := func(q *question) {
		t.Helper()
		_, err := l.Ask(q, l.clock.now)
		require.ErrorIs(t, err, questions.ErrFull)
	}
	refused(l.from("mallory", "one more", questions.ClassNewcomer))
	for i := range 5_000 {
		l.wantWait(l.from("site", fmt.Sprint("site ", i), questions.ClassNewcomer))
	}
	refused(l.from("site", "one more", questions.ClassNewcomer))
	for i := range 5_000 {
		l.wantWait(l.about(fmt.Sprint("alone ", i), questions.ClassNewcomer))
	}
	refused(l.about("alice", questions.ClassNewcomer))
	l.wantWait(l.from("mallory", "introduction", questions.ClassIntroduction))
	l.wantLen(20_001, 0)

	l.pass(time.Minute) // now alice can take a place, of many that are free
	require.Equal(t, "introduction", l.ask(l.about("alice", questions.ClassNewcomer))[0])
	l.wantLen(20_001-256, 257)

	l = newLink(t)
	for i := range 128 + 10_000 {
		l.ask(l.from("mallory", fmt.Sprint("mallory ", i), questions.ClassNewcomer))
	}
	l.wantLen(10_000, 128)
	refused(l.from("mallory", "one more", questions.ClassNewcomer)) // though places are free
	l.wantSent("alice")
}

func TestTwice(t *testing.T) {
	l := newLink(t)
	first := l.about("alice", questions.ClassNewcomer)
	require.Equal(t, []string{"alice"}, l.ask(first))
	again := func() {
		t.Helper()
		_, err := l.Ask(l.from("mallory", "alice", questions.ClassIntroduction), l.clock.now)
		require.ErrorIs(t, err, questions.ErrTwice)
	}
	again()
	q, _, _ := l.Answer("alice", l.clock.now)
	require.Same(t, first, q)

	l.wantSent("alice") // the first is over
	l.wantStray("bob")
	l.Pause(l.clock.now.Add(time.Second))
	second := l.wantWait(l.about("bob", questions.ClassNewcomer))
	_, err := l.Ask(l.about("bob", questions.ClassNewcomer), l.clock.now)
	require.ErrorIs(t, err, questions.ErrTwice)
	require.True(t, l.Abandon(second), "the first is unharmed")

	// While the server is at work on one, what it says is about that one.
	third := l.about("cathy", questions.ClassNewcomer)
	l.pass(time.Second)
	l.ask(third)
	l.Abandon(third)
	_, err = l.Ask(l.about("cathy", questions.ClassNewcomer), l.clock.now)
	require.ErrorIs(t, err, questions.ErrTwice)
	require.False(t, l.Abandon(l.about("cathy", questions.ClassNewcomer)), "another one, never asked")
}

// TestAnswerBeforeItIsSent has the answer to an earlier question come while a later one under the
// same UID waits.
func TestAnswerBeforeItIsSent(t *testing.T) {
	l := newLink(t)
	l.wantSent("alice")
	l.wantAnswer("alice")
	l.fill()
	l.wantWait(l.about("alice", questions.ClassNewcomer))
	l.wantStray("alice")
	require.Equal(t, []string{"alice"}, l.wantAnswer("early bird 3"))
	l.wantAnswer("alice")
}

func TestPause(t *testing.T) {
	l := newLink(t)
	l.Pause(l.clock.now.Add(10 * time.Second))
	l.wantWait(l.about("alice", questions.ClassNewcomer))
	bob := l.about("bob", questions.ClassIntroduction)
	l.wantWait(bob)
	l.Pause(l.clock.now.Add(5 * time.Second)) // shortens nothing
	l.pass(9 * time.Second)
	_, send := l.Sweep(l.clock.now)
	require.Empty(t, send)
	l.Pause(l.clock.now.Add(10 * time.Second))
	l.pass(9 * time.Second)
	_, send = l.Sweep(l.clock.now)
	require.Empty(t, send)
	l.pass(time.Second)
	_, send = l.Sweep(l.clock.now)
	require.Equal(t, []string{"bob", "alice"}, uids(send), "introductions first")

	t.Run("is over for whatever is called first", func(t *testing.T) {
		for name, call := range map[string]func(l *link) []string{
			"Ask": func(l *link) []string { return l.ask(l.about("bob", questions.ClassNewcomer))[:1] },
			"Answer": func(l *link) []string {
				_, _, send := l.Answer("early", l.clock.now)
				return uids(send)
			},
			"Answer, stray": func(l *link) []string {
				_, _, send := l.Answer("unknown", l.clock.now)
				return uids(send)
			},
		} {
			l := newLink(t)
			l.wantSent("early")
			l.Pause(l.clock.now.Add(time.Second))
			l.wantWait(l.about("alice", questions.ClassNewcomer))
			l.pass(time.Second)
			require.Equal(t, []string{"alice"}, call(l), name)
		}
	})
}

func TestExpiry(t *testing.T) {
	l := newLink(t)
	l.fill()
	l.pass(500 * time.Millisecond)
	alice := l.wantWait(l.about("alice", questions.ClassNewcomer))
	alice.Asker = "alice herself"
	l.wantWait(l.about("bob", questions.ClassNewcomer))
	l.pass(39*time.Second + 500*time.Millisecond - 1)
	expired, send := l.Sweep(l.clock.now)
	require.Empty(t, expired)
	require.Empty(t, send)
	l.pass(1)
	expired, send = l.Sweep(l.clock.now)
	require.Len(t, expired, 256)
	for i, q := range expired {
		require.Equal(t, fmt.Sprint("early bird ", i), q.UID, "in the order of asking")
	}
	require.Equal(t, []string{"alice", "bob"}, uids(send), "their places are free")
	l.wantStray("early bird 0")

	l.wantWait(func() *question {
		l.Pause(l.clock.now.Add(time.Hour))
		return l.about("cathy", questions.ClassNewcomer)
	}())
	l.pass(10 * time.Minute)
	expired, send = l.Sweep(l.clock.now)
	require.Equal(t, []string{"alice", "bob", "cathy"}, uids(expired), "whether it was sent or not")
	require.Empty(t, send)
	l.wantLen(0, 0)
}

func TestEnd(t *testing.T) {
	_, links := newLinks(t, 2)
	l, other := links[0], links[1]
	l.fill()
	hasHungUp := l.wantWait(l.about("mallory", questions.ClassNewcomer))
	l.wantWait(l.about("alice", questions.ClassNewcomer))
	l.ask(l.about("bob", questions.ClassIntroduction))
	l.Abandon(hasHungUp)
	l.wantAnswer("early bird 0") // sends alice
	l.wantWait(l.from("early bird 5", "dave", questions.ClassNewcomer))
	open, deaf := l.End(true, l.clock.now)
	require.False(t, deaf)
	want := make([]string, 0, 258)
	for i := range 255 {
		want = append(want, fmt.Sprint("early bird ", i+1))
	}
	require.Equal(t, append(want, "alice", "bob", "dave"), uids(open), "in the order of asking")
	l.wantLen(0, 0)

	open2, _ := l.End(true, l.clock.now)
	require.Empty(t, open2, "it is told once")
	_, err := l.Ask(l.about("eve", questions.ClassNewcomer), l.clock.now)
	require.ErrorIs(t, err, questions.ErrEnded)
	l.wantStray("alice")
	expired, send := l.Sweep(l.clock.now.Add(time.Hour))
	require.Empty(t, append(expired, send...))

	dave := open[len(open)-1]
	other.wantSent("another")
	other.wantAnswer("another")
	for _, q := range open[:len(open)-1] { // they are asked again elsewhere
		require.Equal(t, []string{q.UID}, other.ask(q))
		require.False(t, l.Abandon(q), "it is open elsewhere")
	}
	other.wantWait(dave)
	require.Equal(t, []string{"dave"}, other.wantAnswer("early bird 5"))
	require.True(t, other.Abandon(open[0]))
}

// TestDeafServer has the server show in several ways that it does not understand questions.
func TestDeafServer(t *testing.T) {
	// wantDeaf has all links refuse, until it is time to try the server again.
	wantDeaf := func(t *testing.T, server *questions.Server, links ...*link) {
		t.Helper()
		wait := func(l *link, name string) {
			t.Helper()
			_, err := l.Ask(l.about(name, questions.ClassIntroduction), l.clock.now)
			require.ErrorIs(t, err, questions.ErrCannotAsk)
			require.True(t, server.Deaf(l.clock.now))
		}
		for _, l := range links {
			wait(l, "x")
		}
		links[0].pass(10*time.Minute - 1)
		for _, l := range links {
			wait(l, "x")
		}
		links[0].pass(1)
		require.False(t, server.Deaf(links[0].clock.now))
	}

	t.Run("misunderstands", func(t *testing.T) {
		server, links := newProbed(t, 3)
		one, two, three := links[0], links[1], links[2]
		require.False(t, one.Misunderstood(one.clock.now), "nothing was asked")
		one.wantSent("alice")
		require.False(t, two.Misunderstood(two.clock.now), "nothing was asked on this one")
		two.wantSent("bob")
		two.wantSent("cathy")
		two.Pause(two.clock.now.Add(time.Minute))
		two.wantWait(two.about("dave", questions.ClassIntroduction))
		hasHungUp := two.wantWait(two.about("eve", questions.ClassNewcomer))
		two.Abandon(hasHungUp)
		require.Empty(t, two.GiveUp(), "it is not deaf yet")

		require.True(t, one.Misunderstood(one.clock.now))
		require.False(t, two.Misunderstood(one.clock.now), "it is told once")
		require.Equal(t, []string{"alice"}, uids(one.GiveUp()))
		require.Equal(t, []string{"bob", "cathy", "dave"}, uids(two.GiveUp()))
		require.Empty(t, two.GiveUp(), "they are told once")
		two.wantLen(0, 2) // their places are not free: the server may be at work
		wantDeaf(t, server, one, two, three)
	})

	t.Run("is not one that has answered", func(t *testing.T) {
		server, links := newProbed(t, 2)
		one, two := links[0], links[1]
		one.wantSent("alice")
		two.wantSent("bob")
		two.wantAnswer("bob")
		require.False(t, one.Misunderstood(one.clock.now))
		for range 5 {
			one.End(true, one.clock.now)
			one.pass(time.Minute)
			one = &link{t, questions.NewBook[string](server), one.clock}
			one.wantSent("alice")
		}
		require.False(t, server.Deaf(one.clock.now))
		require.Empty(t, one.GiveUp())
	})

	t.Run("ends links", func(t *testing.T) {
		server, links := newProbed(t, 5)
		for i, name := range []string{"alice", "bob", "cathy"} {
			links[i].wantSent(name)
		}
		for i, l := range links[:3] { // by one crash
			open, deaf := l.End(true, l.clock.now)
			require.Len(t, open, 1)
			require.False(t, deaf, i)
			l.pass(300 * time.Millisecond)
		}
		links[3].pass(100 * time.Millisecond)
		links[3].wantSent("alice")
		links[4].wantSent("bob")
		open, deaf := links[3].End(true, links[3].clock.now)
		require.Equal(t, []string{"alice"}, uids(open))
		require.True(t, deaf)
		require.Equal(t, []string{"bob"}, uids(links[4].GiveUp()))
		_, deaf = links[4].End(true, links[4].clock.now.Add(time.Hour))
		require.False(t, deaf, "it is told once")
		wantDeaf(t, server, &link{t, questions.NewBook[string](server), links[0].clock})
	})

	t.Run("ends links at questions whose askers have gone", func(t *testing.T) {
		_, links := newProbed(t, 2)
		for i, want := range []bool{false, true} {
			q := links[i].about("mallory", questions.ClassNewcomer)
			links[i].ask(q)
			links[i].Abandon(q)
			open, deaf := links[i].End(true, links[i].clock.now)
			require.Empty(t, open)
			require.Equal(t, want, deaf)
			links[i].pass(time.Second)
		}
	})

	t.Run("is not one whose links end otherwise", func(t *testing.T) {
		server, links := newProbed(t, 10)
		for i, l := range links {
			l.pass(time.Minute)
			byServer := i%3 != 0
			switch i % 3 {
			case 0: // by our doing
				l.wantSent("alice")
			case 1: // with nothing asked
			case 2: // with nothing sent
				l.Pause(l.clock.now.Add(time.Second))
				l.wantWait(l.about("alice", questions.ClassNewcomer))
			}
			_, deaf := l.End(byServer, l.clock.now)
			require.False(t, deaf)
		}
		require.False(t, server.Deaf(links[0].clock.now))
	})

	// deafLinks returns links to a server that is deaf, the first with a question open as a trial.
	deafLinks := func(t *testing.T, sent bool) (server *questions.Server, one, two *link, trial *question) {
		t.Helper()
		server, links := newProbed(t, 3)
		one, two = links[0], links[1]
		one.wantSent("alice")
		links[2].wantSent("cathy")
		require.True(t, links[2].Misunderstood(links[2].clock.now))
		for _, l := range links {
			l.GiveUp()
		}
		wantDeaf(t, server, links...)
		trial = one.about("trial", questions.ClassNewcomer)
		if sent {
			require.Equal(t, []string{"trial"}, one.ask(trial))
		} else {
			one.Pause(one.clock.now.Add(time.Hour))
			one.wantWait(trial)
		}
		for _, l := range links { // one is enough
			_, err := l.Ask(l.about("another", questions.ClassNewcomer), l.clock.now)
			require.ErrorIs(t, err, questions.ErrCannotAsk)
			require.Empty(t, l.GiveUp(), "the trial goes on")
		}
		return server, one, two, trial
	}

	t.Run("tried, and it answers", func(t *testing.T) {
		server, one, two, _ := deafLinks(t, true)
		one.wantAnswer("trial")
		require.False(t, server.Deaf(one.clock.now))
		one.wantSent("bob")
		two.wantSent("cathy")
		require.False(t, two.Misunderstood(two.clock.now), "it does understand")
	})
	t.Run("tried, and it answers another", func(t *testing.T) {
		server, one, two, _ := deafLinks(t, true)
		two.wantStray("late")
		require.False(t, server.Deaf(two.clock.now))
		one.wantSent("bob")
		_, deaf := one.End(true, one.clock.now)
		require.False(t, deaf)
	})
	t.Run("tried, and it misunderstands", func(t *testing.T) {
		server, one, two, _ := deafLinks(t, true)
		require.False(t, two.Misunderstood(two.clock.now), "nothing was asked there")
		require.True(t, one.Misunderstood(one.clock.now))
		require.Empty(t, two.GiveUp())
		require.Equal(t, []string{"trial"}, uids(one.GiveUp()))
		wantDeaf(t, server, one, two)
		two.wantSent("another trial")
	})
	t.Run("tried, and it ends the link", func(t *testing.T) {
		server, one, two, _ := deafLinks(t, true)
		open, deaf := one.End(true, one.clock.now)
		require.Equal(t, []string{"trial"}, uids(open))
		require.True(t, deaf)
		wantDeaf(t, server, two)
		two.wantSent("another trial")
	})
	t.Run("tried, and it says nothing", func(t *testing.T) {
		server, one, two, _ := deafLinks(t, true)
		one.pass(40 * time.Second)
		expired, _ := one.Sweep(one.clock.now)
		require.Equal(t, []string{"trial"}, uids(expired))
		wantDeaf(t, server, one, two)
	})
	t.Run("tried, and its asker leaves", func(t *testing.T) {
		server, one, two, trial := deafLinks(t, true)
		require.True(t, one.Abandon(trial))
		one.pass(40*time.Second - 1)
		require.True(t, server.Deaf(one.clock.now), "it may answer yet")
		one.pass(1)
		expired, _ := one.Sweep(one.clock.now)
		require.Empty(t, expired)
		wantDeaf(t, server, one, two)
	})

	// What says nothing about the server is followed by another trial at once.
	for name, test := range map[string]struct {
		sent bool
		end  func(l *link, trial *question)
	}{
		"its asker leaves before it is sent": {false, func(l *link, trial *question) {
			require.True(l.t, l.Abandon(trial))
		}},
		"it expires before it is sent": {false, func(l *link, _ *question) {
			expired, _ := l.Sweep(l.clock.now.Add(40 * time.Second))
			require.Equal(l.t, []string{"trial"}, uids(expired))
		}},
		"its link ends before it is sent": {false, func(l *link, _ *question) {
			require.False(l.t, l.Misunderstood(l.clock.now), "it was not asked")
			open, deaf := l.End(true, l.clock.now)
			require.Equal(l.t, []string{"trial"}, uids(open))
			require.False(l.t, deaf)
		}},
		"its link ends by our doing": {true, func(l *link, _ *question) {
			open, deaf := l.End(false, l.clock.now)
			require.Equal(l.t, []string{"trial"}, uids(open))
			require.False(l.t, deaf)
		}},
	} {
		t.Run("tried without result: "+name, func(t *testing.T) {
			server, one, two, trial := deafLinks(t, test.sent)
			require.True(t, server.Deaf(two.clock.now))
			test.end(one, trial)
			require.False(t, server.Deaf(two.clock.now))
			two.wantSent("another trial")
			require.True(t, server.Deaf(two.clock.now))
		})
	}
}

// TestManyAtOnce has many ask at the same time, on links that come and go; each is told once.
func TestManyAtOnce(t *testing.T) {
	const links, askers, rounds = 3, 16, 300
	server := questions.NewServer()
	questions.NewBook[int](server).Answer("an earlier question", time.Now()) // otherwise all wait for a probe
	var told, asked, strays atomic.Int64
	var all sync.WaitGroup
	for i := range links {
		book := questions.NewBook[chan string](server)
		wire := make(chan string, askers*rounds) // what is sent
		now := time.Now()
		send := func(list []*questions.Question[chan string]) {
			for _, q := range list {
				wire <- q.UID
			}
		}
		tell := func(list []*questions.Question[chan string], what string) {
			for _, q := range list {
				q.Asker <- what
			}
		}
		var askersDone, others sync.WaitGroup
		for j := range askers {
			askersDone.Go(func() {
				for k := range rounds {
					q := &questions.Question[chan string]{
						UID: fmt.Sprint(j, "/", k), From: addressOf(fmt.Sprint("site ", j%4)), Class: questions.Class(k % 2),
						Expires: now.Add(time.Minute), Asker: make(chan string, 2),
					}
					list, err := book.Ask(q, now)
					if err != nil {
						if !errors.Is(err, questions.ErrEnded) {
							t.Error(err)
						}
						return
					}
					asked.Add(1)
					send(list)
					if k%3 == 0 && book.Abandon(q) {
						told.Add(1)
						continue
					}
					<-q.Asker
					told.Add(1)
				}
			})
		}
		others.Go(func() { // the server
			for uid := range wire {
				for range 2 {
					q, stray, list := book.Answer(uid, now)
					send(list)
					if stray {
						strays.Add(1)
					}
					if q != nil {
						q.Asker <- "answered"
					}
				}
			}
		})
		if i == 0 {
			others.Go(func() {
				runtime.Gosched()
				open, _ := book.End(true, now)
				tell(open, "ended")
			})
		}
		all.Go(func() {
			askersDone.Wait()
			close(wire)
			others.Wait()
			if waiting, sent := book.Len(); waiting+sent > 0 {
				t.Errorf("%d wait and %d were sent when all is over", waiting, sent)
			}
		})
	}
	all.Wait()
	require.Equal(t, asked.Load(), told.Load())
	require.Positive(t, strays.Load())
}

// TestMemory has what waits cost little, and nothing when it has gone.
func TestMemory(t *testing.T) {
	const n = 19_000 // from 1,000 addresses
	l := newLink(t)
	used := func() int64 {
		var stats runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&stats)
		return int64(stats.HeapAlloc)
	}
	l.Pause(l.clock.now.Add(time.Hour))
	from := make([]netip.Prefix, 0, n)
	uid := make([]string, 0, n)
	for i := range n {
		from = append(from, addressOf(fmt.Sprint("site ", i%1000)))
		uid = append(uid, fmt.Sprint("agent ", i))
	}
	before := used()
	for i := range n {
		q := &question{UID: uid[i], From: from[i], Expires: l.clock.now.Add(40 * time.Second)}
		_, err := l.Ask(q, l.clock.now)
		require.NoError(t, err)
	}
	each := (used() - before) / n
	t.Logf("%d bytes each", each)
	require.Less(t, each, int64(400))

	l.pass(time.Second)
	l.wantWait(l.about("the last", questions.ClassNewcomer))
	l.pass(39 * time.Second)
	expired, _ := l.Sweep(l.clock.now)
	require.Len(t, expired, n)
	expired = nil
	left := used() - before
	t.Logf("%d bytes left", left)
	require.Less(t, left, int64(64<<10))
	runtime.KeepAlive(expired)
	runtime.KeepAlive(from)
	runtime.KeepAlive(uid)
	l.wantLen(1, 0)
}

// A question that has not left yet when its asker does is not sent at all.
func TestWithdraw(t *testing.T) {
	book, now := questions.NewBook[string](questions.NewServer()), time.Now()
	q := &questions.Question[string]{UID: "alice", Expires: now.Add(time.Minute)}
	send, err := book.Ask(q, now)
	require.NoError(t, err)
	require.Equal(t, []*questions.Question[string]{q}, send)
	require.False(t, book.Withdraw(q), "alice waits")
	require.True(t, book.Abandon(q))
	require.True(t, book.Withdraw(q))
	require.False(t, book.Withdraw(q), "once")
	waiting, sent := book.Len()
	require.Zero(t, waiting+sent)
	_, stray, _ := book.Answer("alice", now)
	require.True(t, stray)
}

// However many come at once, a server that never answered is asked one question first.
func TestProbe(t *testing.T) {
	// crowd has three more ask on each link, who all have to wait.
	crowd := func(links ...*link) {
		for i, l := range links {
			for j := range 3 {
				l.wantWait(l.about(fmt.Sprint("waits ", i, j), questions.ClassNewcomer))
			}
		}
	}

	t.Run("that is answered", func(t *testing.T) {
		server, links := newUntried(t, 2)
		one, two := links[0], links[1]
		one.wantSent("alice")
		crowd(one, two)
		require.False(t, server.Answered())
		require.Len(t, one.wantAnswer("alice"), 3)
		require.True(t, server.Answered())
		require.Len(t, two.Send(two.clock.now), 3)
		two.wantSent("bob")
	})

	t.Run("at which the server ends the link, twice", func(t *testing.T) {
		server, links := newUntried(t, 4)
		links[0].wantSent("alice")
		crowd(links...)
		_, deaf := links[0].End(true, links[0].clock.now)
		require.False(t, deaf)
		require.Empty(t, links[1].Send(links[1].clock.now), "it may be about to end by the same crash")
		_, deaf = links[3].End(true, links[3].clock.now)
		require.False(t, deaf, "nothing was asked there")
		next := &link{t, questions.NewBook[string](server), links[0].clock}
		next.wantSent("another probe, since this link is new")
		require.Empty(t, links[2].Send(links[2].clock.now))
		_, deaf = next.End(true, next.clock.now)
		require.True(t, deaf, "however soon")
		require.True(t, server.Deaf(links[0].clock.now))
		require.Empty(t, links[2].Send(links[2].clock.now), "they are about to be told")
		require.Len(t, links[2].GiveUp(), 3)
	})

	t.Run("at which the server ends the link, and the others live", func(t *testing.T) {
		_, links := newUntried(t, 2)
		links[0].wantSent("alice")
		crowd(links...)
		_, deaf := links[0].End(true, links[0].clock.now)
		require.False(t, deaf)
		links[1].pass(999 * time.Millisecond)
		_, send := links[1].Sweep(links[1].clock.now)
		require.Empty(t, send)
		links[1].pass(time.Millisecond)
		_, send = links[1].Sweep(links[1].clock.now)
		require.Len(t, send, 1, "another probe")
		_, deaf = links[1].End(true, links[1].clock.now)
		require.True(t, deaf)
	})

	t.Run("to a server that is restarted", func(t *testing.T) {
		server, links := newUntried(t, 3)
		links[0].wantSent("alice")
		for i, l := range links { // alice is asked about wherever there is a link yet
			_, deaf := l.End(true, l.clock.now)
			require.False(t, deaf)
			if i < 2 {
				links[i+1].wantWait(links[i+1].about("alice", questions.ClassNewcomer))
			}
			l.pass(time.Millisecond)
		}
		next := &link{t, questions.NewBook[string](server), links[0].clock}
		next.wantSent("alice")
		next.wantAnswer("alice")
	})

	t.Run("that is not answered", func(t *testing.T) {
		_, links := newUntried(t, 3)
		links[0].wantSent("alice")
		crowd(links...)
		links[0].pass(499 * time.Millisecond)
		for _, l := range links {
			_, send := l.Sweep(l.clock.now)
			require.Empty(t, send)
		}
		links[0].pass(time.Millisecond)
		for _, l := range links {
			_, send := l.Sweep(l.clock.now)
			require.Len(t, send, 3)
		}
		for i := range links { // by one crash, in any order
			_, deaf := links[2-i].End(true, links[0].clock.now)
			require.False(t, deaf)
		}
	})

	t.Run("for which no more wait than may", func(t *testing.T) {
		_, links := newUntried(t, 2)
		links[0].wantSent("alice")
		l := links[1]
		for i := range 10_000 {
			l.wantWait(l.from("site", fmt.Sprint("agent ", i), questions.ClassNewcomer))
		}
		_, err := l.Ask(l.from("site", "one more", questions.ClassNewcomer), l.clock.now)
		require.ErrorIs(t, err, questions.ErrFull)
	})

	t.Run("that was not sent, or whose link we end", func(t *testing.T) {
		_, links := newUntried(t, 2)
		q := links[0].about("alice", questions.ClassNewcomer)
		require.Len(t, links[0].ask(q), 1)
		links[0].Abandon(q)
		require.True(t, links[0].Withdraw(q))
		links[0].wantSent("bob")
		links[0].End(false, links[0].clock.now)
		links[1].wantSent("cathy")
		links[1].wantWait(links[1].about("dave", questions.ClassNewcomer))
	})
}
