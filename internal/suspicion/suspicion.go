// Package suspicion finds the message at which the server ends links.
//
// Many agents share a link. When the server ends it because of what one of them said, all lose it, and
// one that says the same again costs every agent each link in turn. What the server had not acknowledged
// when a link ended is known, by agent and size. So those agents are suspects if the server said that it
// was for a message, or if they are the same as at another end not long ago; and while links end, those
// who have come since the first of these ends. What a suspect says is on trial: it is written between two
// pings. When a link ends, the message is caught at which the server was by its pongs: the first of these
// was answered, and the second was not. Whoever is caught is named, unless it may have been another; what it
// says is turned down for a while.
//
//	innocent ──▶ suspect ──▶ named
//	    ▲           │  ▲       │
//	    └───────────┘  └───────┘
//
// It may have been another: somebody who came during these ends and was read just before, since servers may
// end a link somewhat later; or the network, if the server has not said that it was for a message. So it counts
// at how many of these ends somebody was caught, or was there. Whoever is suspected for the size of a message is
// tried for large ones only.
package suspicion

import (
	"bytes"
	"cmp"
	"math"
	"math/bits"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/gorilla/websocket"

	"github.com/opampgateway/opampgateway/internal/monotonic"
	"github.com/opampgateway/opampgateway/internal/wire"
)

const (
	// suspectFor is for how long somebody is a suspect at most; and how long after another end of a link for
	// no reason that was told it counts as the second.
	suspectFor = time.Minute
	// enoughTrials is after how many messages on trial, as large as what it is suspected for, a suspect is not named for
	// what may have been the network.
	enoughTrials = 4
	// enoughAlone is how many messages of a suspect are tried while nothing else is: for longer it would wait too long.
	enoughAlone = 8
	// namedFor is for how long an agent is turned down that is named for the first time, when the server has said that it
	// was for a message; otherwise unsureFor, since something else may just then have ended the link. It doubles each
	// time, up to maxNamedFor. Afterwards the agent stays a suspect for as long again.
	namedFor, unsureFor, maxNamedFor = 10 * time.Minute, 2 * time.Minute, time.Hour
	// limitFor is how long the server's limit is heeded. Servers may be configured anew.
	limitFor = time.Hour
	// together is within what time links end together, by one restart or crash of the server.
	together = time.Second
	// maxEnds is how many ends are looked at: the last.
	maxEnds = 64
	// maxAgents bounds how many agents are remembered of each kind.
	maxAgents = 1 << 16
)

// Message is one message of an agent.
type Message struct {
	UID  wire.UID // the zero one for the gateway's own
	Size int      // in bytes
	Came int64    // when its agent has connected, of the monotonic clock; or Always
}

// Always is when an agent has come that is not to be taken for a newcomer.
const Always = math.MinInt64

// End is what is known about the end of a link that the server, or the network, has ended.
type End struct {
	Code           int       // of the server's close frame (RFC 6455, section 7.4); 0 if there was none
	Unacknowledged []Message // in order
	Caught         bool      // the first of them was on trial, and the server had just come to it
	Before         []Message // on trial, and acknowledged shortly before
}

// Judgement is what to do with a message.
type Judgement int

// The judgements.
const (
	// Pass has it relayed.
	Pass Judgement = iota
	// Try has it relayed on trial.
	Try
	// TryAlone has it relayed on trial while nothing else is on its link: where the server says nothing when it ends a link,
	// its last pongs may be missing, too.
	TryAlone
	// Named turns it down: its agent was named.
	Named
	// TooLarge turns it down: the server has ended a link at one no larger.
	TooLarge
)

// Book knows who is suspected. It is safe for concurrent use.
type Book struct {
	// clean tells that nobody is in suspects or named, and no ends go on: what is looked at for each message.
	clean atomic.Bool
	limit atomic.Int64 // the smallest message known to be too large, in bytes

	// mu guards what follows.
	mu       sync.Mutex
	ends     []end     // of the last suspectFor, but maxEnds at most
	count    uint      // of all that were among them
	since    int64     // of the monotonic clock: who has come later is a suspect; math.MaxInt64 for nobody
	newcomer time.Time // the last end that may have been because of a newcomer
	traces   map[wire.UID]trace
	suspects map[wire.UID]suspect
	named    map[wire.UID]name
	largest  int       // message that was acknowledged
	limited  time.Time // until when limit is heeded
}

// end is one of a link, or of several for no reason that was told that came together.
type end struct {
	at       time.Time // of the first
	accuses  bool
	culprit  wire.UID // who was named, now or later, and explains it; the zero one for nobody
	doubtful bool     // several were caught at once
}

func (e *end) explained() bool { return e.culprit != (wire.UID{}) }

// trace says at which ends an agent was there, with a message that was not acknowledged, and at which it was caught.
type trace struct {
	at            time.Time // of the last
	nth           uint      // of all ends, the last
	there, caught uint64    // bit n: the nth before the last

	size   int  // of the message at which it was caught last; 0 for none
	passed bool // the server has read one as large of it since
	twice  bool // it had not, from the catch before to the last
}

// upTo returns the trace as seen from the end of this number.
func (t trace) upTo(nth uint) trace {
	t.there, t.caught, t.nth = t.there<<(nth-t.nth), t.caught<<(nth-t.nth), nth
	return t
}

type suspect struct {
	large        bool // only for the size of a message
	alone        bool // the server has said nothing
	size         int  // of the message, or somewhat less, in bytes
	heard        int  // how many messages of it were acknowledged that had been on trial
	tried        int  // how many as large were acknowledged that had been on trial
	since, until time.Time
}

type name struct {
	since    time.Time // it was named last
	until    time.Time // it is turned down
	remember time.Time // until then the next time is longer
	lasts    time.Duration
	unsure   bool // and not released yet
}

// NewBook returns a book in which nobody is suspected.
func NewBook() *Book {
	b := &Book{traces: map[wire.UID]trace{}, suspects: map[wire.UID]suspect{}, named: map[wire.UID]name{}, since: math.MaxInt64}
	b.clean.Store(true)
	b.limit.Store(math.MaxInt64)
	return b
}

// Forget has nobody be suspected or named, and no limit be known: from here on it is another server.
func (b *Book) Forget() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.ends = nil
	b.newcomersLocked(time.Now())
	clear(b.traces)
	clear(b.suspects)
	clear(b.named)
	b.largest = 0
	b.limit.Store(math.MaxInt64)
	b.tidyLocked()
}

// Judge returns what to do with a message. It costs next to nothing while nobody is suspected.
func (b *Book) Judge(m Message) Judgement {
	if b.clean.Load() && int64(m.Size) < b.limit.Load() {
		return Pass
	}
	now := time.Now()
	b.mu.Lock()
	defer b.mu.Unlock()
	if n, ok := b.named[m.UID]; ok && now.Before(n.until) {
		return Named
	}
	if int64(m.Size) >= b.limit.Load() {
		if now.Before(b.limited) {
			return TooLarge
		}
		return Try // the server may take more by now
	}
	if s, ok := b.suspects[m.UID]; ok && now.Before(s.until) && (!s.large || m.Size > b.largest) {
		if s.alone && s.heard < enoughAlone {
			return TryAlone
		}
		return Try
	}
	if b.newLocked(m) {
		return Try
	}
	return Pass
}

// newLocked reports whether the agent of a message has come while links ended.
func (b *Book) newLocked(m Message) bool { return m.Came >= b.since }

// NewcomersEnd reports whether links may end lately because of agents that are new each time.
func (b *Book) NewcomersEnd() bool {
	if b.clean.Load() {
		return false
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.since != math.MaxInt64 && !b.newcomer.IsZero() && time.Since(b.newcomer) < suspectFor
}

// New reports whether the agent of a message has come while links ended.
func (b *Book) New(m Message) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.newLocked(m)
}

// Limit returns the size of the smallest message known to be too large for the server, in bytes.
func (b *Book) Limit() int64 { return b.limit.Load() }

// Acknowledged tells the size of the largest message that the server has read lately, in bytes.
func (b *Book) Acknowledged(size int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.largest = max(b.largest, size)
	if int64(size) >= b.limit.Load() {
		b.limit.Store(math.MaxInt64)
	}
}

// Taken tells that the server has read a message that was on trial.
func (b *Book) Taken(m Message) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if s, ok := b.suspects[m.UID]; ok {
		s.heard++
		if m.Size >= s.size {
			s.tried++
		}
		b.suspects[m.UID] = s
	}
	if t, ok := b.traces[m.UID]; ok && m.Size >= t.size-t.size/8 {
		t.passed = true
		b.traces[m.UID] = t
	}
}

// Ended tells that a link has ended, and returns the message because of which it did, if that is clear, and for how
// long its agent is turned down.
func (b *Book) Ended(e End) (culprit Message, turnedDown time.Duration) {
	if innocent(e.Code) {
		return Message{}, 0
	}
	now := time.Now()
	b.mu.Lock()
	defer b.mu.Unlock()
	defer b.tidyLocked()
	latest := b.countLocked(&e, now)
	if slices.ContainsFunc(e.Unacknowledged, b.newLocked) || slices.ContainsFunc(e.Before, b.newLocked) {
		b.newcomer = now
	}
	again := b.traceLocked(&e, now)
	if e.Caught && latest.explained() && latest.culprit != e.Unacknowledged[0].UID {
		b.revokeLocked(latest, now)
	}
	if e.Caught && !latest.doubtful && b.provesLocked(&e) {
		culprit = e.Unacknowledged[0]
		b.explainLocked(culprit.UID, latest.accuses)
		if e.Code == websocket.CloseMessageTooBig && culprit.Size > b.largest {
			if !now.Before(b.limited) {
				b.limit.Store(math.MaxInt64) // what is known is too old
			}
			b.limit.Store(min(b.limit.Load(), int64(culprit.Size)))
			b.limited = now.Add(limitFor)
		}
		return culprit, b.nameLocked(culprit.UID, latest.accuses, now)
	}
	larger := func(m Message) bool { return m.Size > b.largest }
	if e.Code == websocket.CloseMessageTooBig && !slices.ContainsFunc(e.Unacknowledged, larger) {
		b.largest = 0 // the server takes less than it did
	}
	for _, m := range e.Unacknowledged {
		switch {
		case m.UID == (wire.UID{}):
		case e.Code == websocket.CloseMessageTooBig:
			if larger(m) { // smaller ones it has taken
				b.suspectLocked(m.UID, suspect{large: true, size: m.Size}, now)
			}
		case latest.accuses, again[m.UID]:
			// Said again, it may have changed a little.
			b.suspectLocked(m.UID, suspect{size: m.Size - m.Size/8, alone: !latest.accuses}, now)
		}
	}
	return Message{}, 0
}

// countLocked counts an end, unless it comes together with the last, for no reason that was told. It returns the end.
func (b *Book) countLocked(e *End, now time.Time) *end {
	b.forgetEndsLocked(now)
	accuses := accuses(e.Code)
	if n := len(b.ends); n > 0 && !accuses && !b.ends[n-1].accuses && now.Sub(b.ends[n-1].at) < together && !b.metLocked(e) {
		return &b.ends[n-1]
	}
	if len(b.ends) == maxEnds {
		b.ends = slices.Delete(b.ends, 0, 1)
	}
	b.ends = append(b.ends, end{at: now, accuses: accuses})
	b.count++
	b.newcomersLocked(now)
	return &b.ends[len(b.ends)-1]
}

// newcomersLocked has those be newcomers who have come since the first end, if that accuses, or is one of several.
func (b *Book) newcomersLocked(now time.Time) {
	b.since = math.MaxInt64
	if len(b.ends) > 1 || len(b.ends) == 1 && b.ends[0].accuses {
		b.since = monotonic.Now() - int64(now.Sub(b.ends[0].at))
	}
}

// metLocked reports whether somebody was there at the last end, too, and so has spoken in between.
func (b *Book) metLocked(e *End) bool {
	return slices.ContainsFunc(e.Unacknowledged, func(m Message) bool {
		t, known := b.traces[m.UID]
		return known && t.nth == b.count
	})
}

func (b *Book) forgetEndsLocked(now time.Time) {
	b.ends = slices.DeleteFunc(b.ends, func(e end) bool { return now.Sub(e.at) >= suspectFor })
	b.newcomersLocked(now)
}

// traceLocked notes who was there at the end, and returns who was there at another not long ago, too.
func (b *Book) traceLocked(e *End, now time.Time) (again map[wire.UID]bool) {
	again = map[wire.UID]bool{}
	for i, m := range e.Unacknowledged {
		t, known := b.traces[m.UID]
		if m.UID == (wire.UID{}) || !known && len(b.traces) >= maxAgents {
			continue
		}
		if !known {
			t.nth = b.count
		} else if t.at != now || t.nth != b.count { // several may be of one agent
			again[m.UID] = again[m.UID] || now.Sub(t.at) < suspectFor
		}
		t = t.upTo(b.count)
		t.at = now
		t.there |= 1
		if i == 0 && e.Caught {
			t.caught |= 1
			t.twice = t.size > 0 && !t.passed
			t.size, t.passed = m.Size, false
		}
		b.traces[m.UID] = t
	}
	return again
}

// provesLocked reports whether it is clear that a link has ended because of the message that was caught.
func (b *Book) provesLocked(e *End) bool {
	m := e.Unacknowledged[0]
	t, known := b.traces[m.UID]
	if !known {
		return false
	}
	alike := uint64(0) // the ends of this kind that are not explained, in the bits of a trace
	for i := range b.ends {
		if other := &b.ends[i]; other.accuses == accuses(e.Code) && !other.explained() {
			alike |= 1 << (len(b.ends) - 1 - i)
		}
	}
	all, there, caught := bits.OnesCount64(alike), bits.OnesCount64(t.there&alike), bits.OnesCount64(t.caught&alike)
	if !accuses(e.Code) {
		// A poison is there each time, and on trial from the third. What is not a poison is there by chance.
		return 2*there >= all && 3*caught >= all-2 && (there >= 3 || b.namedBeforeLocked(m.UID)) &&
			b.suspects[m.UID].tried < enoughTrials
	}
	another := slices.ContainsFunc(e.Before, func(o Message) bool { return o.UID != m.UID && b.newLocked(o) })
	// Where there are several poisons, each is caught at some of the ends, and one as large never passes.
	return t.twice || 2*caught >= all && (caught > 1 || !another)
}

func (b *Book) namedBeforeLocked(uid wire.UID) bool {
	_, known := b.named[uid]
	return known
}

// explainLocked notes that the ends of this kind were due to who is to be named, as far as it was there.
func (b *Book) explainLocked(uid wire.UID, accuses bool) {
	t := b.traces[uid]
	for i := range b.ends {
		if e := &b.ends[i]; e.accuses == accuses && t.there>>(len(b.ends)-1-i)&1 != 0 {
			e.culprit = uid
		}
	}
}

// revokeLocked has who was named for an end named no longer: another was caught at the same, on another link.
func (b *Book) revokeLocked(latest *end, now time.Time) {
	latest.doubtful = true
	if n, ok := b.named[latest.culprit]; ok && n.unsure {
		n.until = now
		b.named[latest.culprit] = n
	}
	uid := latest.culprit
	for i := range b.ends {
		if e := &b.ends[i]; e.culprit == uid {
			e.culprit = wire.UID{}
		}
	}
}

// accuses reports whether a server that closes a link with code says that it is for a message that it was sent.
func accuses(code int) bool {
	switch code {
	case websocket.CloseProtocolError, websocket.CloseUnsupportedData, websocket.CloseInvalidFramePayloadData,
		websocket.ClosePolicyViolation, websocket.CloseMessageTooBig:
		return true
	}
	return false
}

// innocent reports whether a server that closes a link with code says that it is for no message.
func innocent(code int) bool {
	switch code {
	case websocket.CloseGoingAway, websocket.CloseServiceRestart, websocket.CloseTryAgainLater:
		return true
	}
	return false
}

func (b *Book) suspectLocked(uid wire.UID, fresh suspect, now time.Time) {
	s, known := b.suspects[uid]
	if !known && len(b.suspects) >= maxAgents {
		return
	}
	if !known {
		s.since = now
	}
	if until := now.Add(suspectFor); until.After(s.until) {
		s.until = until
	}
	s.large, s.size = fresh.large && (s.large || !known), max(s.size, fresh.size)
	s.alone, s.tried, s.heard = fresh.alone, 0, 0
	b.suspects[uid] = s
}

func (b *Book) nameLocked(uid wire.UID, sure bool, now time.Time) time.Duration {
	lasts := unsureFor
	if sure {
		lasts = namedFor
	}
	if n, known := b.named[uid]; known {
		lasts = min(2*n.lasts, maxNamedFor)
	} else if len(b.named) >= maxAgents {
		return 0
	}
	b.named[uid] = name{since: now, until: now.Add(lasts), remember: now.Add(2 * lasts), lasts: lasts, unsure: !sure}
	b.suspects[uid] = suspect{alone: !sure, since: now, until: now.Add(2 * lasts)}
	return lasts
}

// Suspected is an agent whose messages are on trial, or turned down.
type Suspected struct {
	UID          wire.UID
	TurnedDown   bool // it was named
	Large        bool // only messages larger than the server has read lately are on trial
	Since, Until time.Time
}

// Suspected returns who is suspected now, the latest first. Who is suspected only for having come while links
// ended is not among them.
func (b *Book) Suspected() []Suspected {
	if b.clean.Load() {
		return nil
	}
	all := b.copySuspected(time.Now())
	slices.SortFunc(all, func(x, y Suspected) int {
		return cmp.Or(y.Since.Compare(x.Since), bytes.Compare(x.UID.Bytes(), y.UID.Bytes()))
	})
	return all
}

func (b *Book) copySuspected(now time.Time) []Suspected {
	b.mu.Lock()
	defer b.mu.Unlock()
	all := make([]Suspected, 0, len(b.suspects))
	turnedDown := func(uid wire.UID) bool { return now.Before(b.named[uid].until) }
	for uid, n := range b.named {
		if turnedDown(uid) {
			all = append(all, Suspected{UID: uid, TurnedDown: true, Since: n.since, Until: n.until})
		}
	}
	for uid, s := range b.suspects {
		if now.Before(s.until) && !turnedDown(uid) {
			since := s.since
			if released := b.named[uid].until; released.After(since) {
				since = released // on trial only since then
			}
			all = append(all, Suspected{UID: uid, Large: s.large, Since: since, Until: s.until})
		}
	}
	return all
}

// Sweep forgets what is over. It returns who is turned down no longer and may have been named by mistake: what it
// said in the meantime is missing. It is to be called now and then.
func (b *Book) Sweep() (released []wire.UID) {
	now := time.Now()
	b.mu.Lock()
	defer b.mu.Unlock()
	b.forgetEndsLocked(now)
	for uid, t := range b.traces {
		if now.Sub(t.at) >= suspectFor {
			delete(b.traces, uid)
		}
	}
	for uid, s := range b.suspects {
		if !now.Before(s.until) {
			delete(b.suspects, uid)
		}
	}
	for uid, n := range b.named {
		if n.unsure && !now.Before(n.until) {
			n.unsure = false
			b.named[uid] = n
			released = append(released, uid)
		}
		if !now.Before(n.remember) {
			delete(b.named, uid)
		}
	}
	b.tidyLocked()
	return released
}

func (b *Book) tidyLocked() {
	b.clean.Store(len(b.suspects) == 0 && len(b.named) == 0 && b.since == math.MaxInt64)
}
