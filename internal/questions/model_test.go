package questions

import (
	"fmt"
	"math"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// TestModel compares books, with little room, to a naive reference while anything happens to them.
func TestModel(t *testing.T) {
	for seed := range uint64(100) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			m := newModel(t, seed)
			for range 600 {
				m.step()
			}
			for i := range m.links {
				m.end(i)
			}
			require.Empty(t, m.untold, "questions whose askers were never told")
		})
	}
}

const (
	modelNewcomers     = 6
	modelIntroductions = 4
	modelWaiting       = 12
)

// model is a gateway with a server and three links, and what is to be expected of them.
type model struct {
	t      *testing.T
	rand   *rand.Rand
	now    time.Time
	server *Server
	links  [3]*modelLink
	known  []*Question[int] // some to abandon; many are not open any more
	number int              // of the last question
	untold map[int]struct{} // by Asker
	silent int              // how many answers the server does not give for each that it does

	answered, deaf bool
	trialAt        time.Time
	trial          *entry
	ends           []time.Time
	probe          *entry // the last; nil when it is over
	probing        bool
	probedAt       time.Time
}

// modelLink is a book and, in the order of asking, what should be in it.
type modelLink struct {
	*Book[int]
	entries []*entry
	paused  time.Time
	sent    bool // anything, ever
	before  int  // how many links had ended at a question when it began
	passed  map[turn]map[netip.Prefix]int
}

type entry struct {
	q     *Question[int]
	state state
}

// turn is whose turn it is or is not.
type turn struct {
	class Class
	from  netip.Prefix
}

func newModel(t *testing.T, seed uint64) *model {
	t.Helper()
	m := &model{
		t: t, rand: rand.New(rand.NewPCG(seed, 0)), now: time.Now(), server: NewServer(), untold: map[int]struct{}{}, silent: [...]int{0, 200, 20}[seed%3],
	}
	for i := range m.links {
		m.links[i] = m.newLink()
	}
	return m
}

func (m *model) newLink() *modelLink {
	l := &modelLink{Book: NewBook[int](m.server), before: len(m.ends), passed: map[turn]map[netip.Prefix]int{}}
	l.windows[ClassNewcomer].limit, l.windows[ClassIntroduction].limit = modelNewcomers, modelIntroductions
	for class := range l.windows {
		l.windows[class].most = modelWaiting
	}
	return l
}

func (m *model) upTo(d time.Duration) time.Duration { return time.Duration(m.rand.Int64N(int64(d))) }

// step has one thing happen.
func (m *model) step() {
	i := m.rand.IntN(len(m.links))
	l := m.links[i]
	switch n := m.rand.IntN(1000); {
	case n < 20 && m.cannotAsk():
		m.now = m.now.Add(m.upTo(10 * time.Minute))
	case n < 450:
		m.ask(l)
	case n < 650:
		m.answer(l)
	case n < 790:
		m.abandon(l)
	case n < 800:
		m.withdraw(l)
	case n < 880:
		m.now = m.now.Add(m.upTo(700 * time.Millisecond))
	case n < 980:
		m.sweep(l)
	case n < 985:
		until := m.now.Add(m.upTo(4 * time.Second))
		l.Pause(until)
		if until.After(l.paused) {
			l.paused = until
		}
	case n < 990:
		m.end(i)
	case n < 996:
		m.misunderstood(l)
	default:
		m.giveUp()
	}
	m.check(m.links[i])
}

func (m *model) ask(l *modelLink) {
	m.number++
	q := &Question[int]{
		UID:     fmt.Sprint(m.rand.IntN(60)),
		From:    netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 0, 0, byte(min(m.rand.IntN(12), m.rand.IntN(12)))}), 32),
		Class:   Class(m.rand.IntN(2)),
		Expires: m.now.Add(m.upTo(6*time.Second) - time.Second/2),
		Asker:   m.number,
	}
	if len(m.known) > 0 && m.rand.IntN(10) == 0 { // one that may have been asked before is asked again
		if old := m.known[m.rand.IntN(len(m.known))]; m.closed(old) {
			q = old
			m.number++
			q.Asker, q.Expires = m.number, m.now.Add(m.upTo(6*time.Second))
		}
	}
	sent, waiting, waitingFrom := l.count(q.Class, q.From)
	twice := slices.ContainsFunc(l.entries, func(e *entry) bool { return e.q.UID == q.UID })
	goes := !m.now.Before(l.paused) && sent[1] < l.windows[q.Class].limit-sent[0] && m.most(l) == math.MaxInt
	full := !goes && waitingFrom >= modelWaiting-waiting

	send, err := l.Ask(q, m.now)
	switch {
	case twice:
		require.ErrorIs(m.t, err, ErrTwice)
	case full:
		require.ErrorIs(m.t, err, ErrFull)
	case m.cannotAsk():
		require.ErrorIs(m.t, err, ErrCannotAsk)
	default:
		require.NoError(m.t, err)
		e := &entry{q: q}
		l.entries = append(l.entries, e)
		m.known = append(m.known[max(0, len(m.known)-49):], q)
		m.untold[q.Asker] = struct{}{}
		if m.deaf {
			m.trial = e
		}
		m.wantSend(l, send)
		return
	}
	require.Empty(m.t, send)
}

func (m *model) cannotAsk() bool { return m.deaf && (m.trial != nil || m.now.Before(m.trialAt)) }

// closed reports whether q is on no book.
func (m *model) closed(q *Question[int]) bool {
	for _, l := range m.links {
		if slices.ContainsFunc(l.entries, func(e *entry) bool { return e.q == q }) {
			return false
		}
	}
	return true
}

func (m *model) answer(l *modelLink) {
	uid := fmt.Sprint(m.rand.IntN(60))
	if m.rand.IntN(m.silent+1) > 0 {
		return
	}
	var want *entry
	i := slices.IndexFunc(l.entries, func(e *entry) bool { return e.q.UID == uid && e.state != stateWaiting })
	if i >= 0 {
		want = l.entries[i]
		l.entries = slices.Delete(l.entries, i, i+1)
	}
	m.answered, m.deaf, m.trial = true, false, nil
	q, stray, send := l.Answer(uid, m.now)
	require.Equal(m.t, want == nil, stray)
	if want == nil || want.state == stateAbandoned {
		require.Nil(m.t, q)
	} else {
		require.Same(m.t, want.q, q)
		m.told(q)
	}
	m.wantSend(l, send)
	for _, l := range m.links {
		m.wantSend(l, l.Send(m.now))
	}
}

// most is how many may be sent now; if it is one, that is a probe.
func (m *model) most(l *modelLink) int {
	switch {
	case m.answered, m.trial != nil, !m.deaf && m.probing && m.now.Sub(m.probedAt) >= 500*time.Millisecond:
		return math.MaxInt
	case m.deaf, m.probing, len(m.ends) > l.before && m.sameEnd():
		return 0
	}
	return 1
}

func (m *model) sameEnd() bool {
	return len(m.ends) > 0 && m.now.Sub(m.ends[len(m.ends)-1]) < time.Second
}

// withdraw has something not be written whose asker has left.
func (m *model) withdraw(l *modelLink) {
	i := slices.IndexFunc(l.entries, func(e *entry) bool { return e.state == stateAbandoned })
	if i < 0 {
		return
	}
	e := l.entries[i]
	require.True(m.t, l.Withdraw(e.q))
	switch e {
	case m.trial:
		m.trial = nil
	case m.probe:
		m.probe, m.probing = nil, false
	}
	l.entries = slices.Delete(l.entries, i, i+1)
}

func (m *model) abandon(l *modelLink) {
	if len(m.known) == 0 {
		return
	}
	q := m.known[m.rand.IntN(len(m.known))]
	i := slices.IndexFunc(l.entries, func(e *entry) bool { return e.q == q && e.state != stateAbandoned })
	require.Equal(m.t, i >= 0, l.Abandon(q))
	if i < 0 {
		return
	}
	m.told(q)
	if e := l.entries[i]; e.state == stateSent {
		e.state = stateAbandoned
		return
	}
	if l.entries[i] == m.trial {
		m.trial = nil
	}
	l.entries = slices.Delete(l.entries, i, i+1)
}

func (m *model) sweep(l *modelLink) {
	expired, send := l.Sweep(m.now)
	var want []*Question[int]
	l.entries = slices.DeleteFunc(l.entries, func(e *entry) bool {
		if e.q.Expires.After(m.now) {
			return false
		}
		if e.state != stateAbandoned {
			want = append(want, e.q)
			m.told(e.q)
		}
		if e == m.trial {
			m.endTrial(e.state != stateWaiting)
		}
		if e == m.probe {
			m.probe = nil
		}
		return true
	})
	require.Equal(m.t, want, expired)
	m.wantSend(l, send)
}

func (m *model) endTrial(inVain bool) {
	m.trial = nil
	if inVain {
		m.trialAt = m.now.Add(10 * time.Minute)
	}
}

func (m *model) misunderstood(l *modelLink) {
	became := l.Misunderstood(m.now)
	switch {
	case l.sent && !m.deaf && !m.answered:
		require.True(m.t, became)
		m.becomeDeaf()
	case m.trial != nil && m.trial.state != stateWaiting && slices.Contains(l.entries, m.trial):
		require.True(m.t, became)
		m.endTrial(true)
	default:
		require.False(m.t, became)
		return
	}
	m.giveUp()
}

func (m *model) becomeDeaf() { m.deaf, m.trialAt = true, m.now.Add(10*time.Minute) }

func (m *model) giveUp() {
	for _, l := range m.links {
		var want []*Question[int]
		if m.deaf {
			l.entries = slices.DeleteFunc(l.entries, func(e *entry) bool {
				if e == m.trial || e.state == stateAbandoned {
					return false
				}
				want = append(want, e.q)
				m.told(e.q)
				waiting := e.state == stateWaiting
				e.state = stateAbandoned
				return waiting
			})
		}
		require.Equal(m.t, want, l.GiveUp())
	}
}

// end ends a link, and makes another.
func (m *model) end(i int) {
	l := m.links[i]
	byServer := m.rand.IntN(2) == 0
	open, became := l.End(byServer, m.now)
	var want []*Question[int]
	atQuestion := false
	for _, e := range l.entries {
		atQuestion = atQuestion || e.state != stateWaiting
		if e.state != stateAbandoned {
			want = append(want, e.q)
			m.told(e.q)
		}
	}
	require.Equal(m.t, want, open)
	wantDeaf, atProbe := false, m.probe != nil && slices.Contains(l.entries, m.probe)
	alone := atProbe && m.now.Sub(m.probedAt) < 500*time.Millisecond
	if atProbe {
		m.probe, m.probing = nil, false
	}
	switch {
	case m.trial != nil && slices.Contains(l.entries, m.trial):
		wantDeaf = byServer && m.trial.state != stateWaiting
		m.endTrial(wantDeaf)
	case byServer && atQuestion:
		if alone || !m.sameEnd() {
			m.ends = append(m.ends, m.now)
			if len(m.ends) >= 2 && !m.deaf && !m.answered {
				wantDeaf = true
				m.becomeDeaf()
			}
		}
	}
	require.Equal(m.t, wantDeaf, became)
	m.links[i] = m.newLink()
	if became {
		m.giveUp()
	}
}

// told notes that the asker of q is told, once.
func (m *model) told(q *Question[int]) {
	require.Contains(m.t, m.untold, q.Asker, "told twice")
	delete(m.untold, q.Asker)
}

// count returns how many were sent, of all and of an address, and how many wait.
func (l *modelLink) count(class Class, from netip.Prefix) (sent [2]int, waiting, waitingFrom int) {
	for _, e := range l.entries {
		switch {
		case e.q.Class != class:
		case e.state == stateWaiting:
			waiting++
			if e.q.From == from {
				waitingFrom++
			}
		default:
			sent[0]++
			if e.q.From == from {
				sent[1]++
			}
		}
	}
	return sent, waiting, waitingFrom
}

// first returns who of each address is next in that class.
func (l *modelLink) first(class Class) map[netip.Prefix]*entry {
	next := map[netip.Prefix]*entry{}
	for _, e := range l.entries {
		if _, ok := next[e.q.From]; !ok && e.state == stateWaiting && e.q.Class == class {
			next[e.q.From] = e
		}
	}
	return next
}

func (l *modelLink) hasPlace(e *entry) bool {
	sent, _, _ := l.count(e.q.Class, e.q.From)
	return sent[1] < l.windows[e.q.Class].limit-sent[0]
}

// wantSend checks that what is sent may be, one after the other, that addresses take turns, and that
// nobody waits afterwards for whom there is a place.
func (m *model) wantSend(l *modelLink, send []*Question[int]) {
	m.t.Helper()
	if m.now.Before(l.paused) {
		require.Empty(m.t, send, "paused")
		return
	}
	most := m.most(l)
	require.LessOrEqual(m.t, len(send), most, "one at a time")
	class := ClassIntroduction
	for _, q := range send {
		require.LessOrEqual(m.t, q.Class, class, "introductions first")
		class = q.Class
		next := l.first(class)
		require.NotNil(m.t, next[q.From])
		require.Same(m.t, q, next[q.From].q, "who asked first")
		require.True(m.t, l.hasPlace(next[q.From]), "more than is fair")
		for from, e := range next {
			key := turn{class, from}
			switch {
			case from == q.From, !l.hasPlace(e):
				delete(l.passed, key)
			default:
				if l.passed[key] == nil {
					l.passed[key] = map[netip.Prefix]int{}
				}
				l.passed[key][q.From]++
				require.LessOrEqual(m.t, l.passed[key][q.From], 1, "%v had two turns while %v waited", q.From, from)
			}
		}
		next[q.From].state = stateSent
		l.sent = true
		if most == 1 {
			m.probe, m.probing, m.probedAt = next[q.From], true, m.now
		}
	}
	if len(send) == most {
		return // the others wait, be there places or not
	}
	for class := range classes {
		next := l.first(class)
		for _, e := range next {
			require.False(m.t, l.hasPlace(e), "%s waits, and there is a place", e.q.UID)
		}
	}
}

// check compares what can be seen of the state.
func (m *model) check(l *modelLink) {
	require.Equal(m.t, m.cannotAsk(), m.server.Deaf(m.now))
	wantWaiting, wantSent := 0, 0
	for class := range classes {
		sent, waiting, _ := l.count(class, netip.Prefix{})
		require.LessOrEqual(m.t, sent[0], l.windows[class].limit)
		require.LessOrEqual(m.t, waiting, modelWaiting)
		require.Equal(m.t, waiting, l.windows[class].waiting)
		wantWaiting, wantSent = wantWaiting+waiting, wantSent+sent[0]
		for key := range l.passed {
			if next := l.first(key.class); next[key.from] == nil {
				delete(l.passed, key)
			}
		}
	}
	waiting, sent := l.Len()
	require.Equal(m.t, [2]int{wantWaiting, wantSent}, [2]int{waiting, sent})
	require.Len(m.t, l.open.entries, waiting+sent)
	if waiting+sent == 0 {
		require.Empty(m.t, l.expiring, "nothing of what is over is kept")
		for class := range classes {
			require.Empty(m.t, l.windows[class].sources.entries)
			require.Zero(m.t, l.windows[class].turns)
		}
	}
}
