// Package suspicion finds the message at which the server ends links.
//
// Many agents share a link. When the server ends it because of what one of them said, all lose it, and
// one that says the same again costs every agent each link in turn. What the server had not acknowledged
// when a link ended is known, by agent and size. So those agents are suspects if the server said that it
// was for a message, or if they are the same as at another end not long ago. What a suspect says is on trial:
// it is written between two pings. A link that ends after the first of them is answered, and before the second,
// ends because of this message: its agent is named, and what it says is turned down for a while.
//
//	innocent ──▶ suspect ──▶ named
//	    ▲           │  ▲       │
//	    └───────────┘  └───────┘
//
// Innocent again is a suspect after a while; while others wait for their trials already when messages of it were
// acknowledged. Who is suspected for the size of a message is tried for large ones only.
package suspicion

import (
	"math"
	"math/bits"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/gorilla/websocket"

	"github.com/opampgateway/opampgateway/internal/wire"
)

const (
	// suspectFor is for how long somebody is a suspect at most; and how long after another end of a link for
	// no reason that was told it counts as the second.
	suspectFor = time.Minute
	// enoughTrials is after how many messages a suspect may be acquitted; those as large as what it is suspected for count
	// twice. After a link was lost, an agent is asked for its full state, which is then among the first.
	enoughTrials = 4
	// namedFor is for how long an agent is turned down that is named for the first time, when the server has said that it
	// was for a message; otherwise unsureFor, since something else may just then have ended the link. It doubles each
	// time, up to maxNamedFor. Afterwards the agent stays a suspect for as long again.
	namedFor, unsureFor, maxNamedFor = 10 * time.Minute, 2 * time.Minute, time.Hour
	// limitFor is how long the server's limit is heeded. Servers may be configured anew.
	limitFor = time.Hour
	// together is within what time links end together, by one restart or crash of the server.
	together = time.Second
	// maxAgents bounds how many agents are remembered of each kind.
	maxAgents = 1 << 16
)

// Message is one message of an agent.
type Message struct {
	UID  wire.UID // the zero one for the gateway's own
	Size int      // in bytes
}

// End is what is known about the end of a link that the server, or the network, has ended.
type End struct {
	Code           int       // of the server's close frame (RFC 6455, section 7.4); 0 if there was none
	Unacknowledged []Message // in order
	Trial          int       // the index of the one on trial; -1 for none
}

// Judgement is what to do with a message.
type Judgement int

// The judgements.
const (
	// Pass has it relayed.
	Pass Judgement = iota
	// Try has it relayed on trial.
	Try
	// Named turns it down: its agent was named.
	Named
	// TooLarge turns it down: the server has ended a link at one no larger.
	TooLarge
)

// Book knows who is suspected. It is safe for concurrent use.
type Book struct {
	// clean tells that nobody is in suspects or named: what is looked at for each message.
	clean atomic.Bool
	limit atomic.Int64 // the smallest message known to be too large, in bytes

	// mu guards what follows.
	mu       sync.Mutex
	last     map[wire.UID]presence // not acknowledged when links ended for no reason that was told
	ends     []time.Time           // such ends, of the last suspectFor; those that come together are one
	count    uint                  // of all of them
	suspects map[wire.UID]suspect
	named    map[wire.UID]name
	largest  int       // message that was acknowledged
	limited  time.Time // until when limit is heeded
}

// presence says at which ends of links a message of an agent was not acknowledged.
type presence struct {
	at   time.Time // of the last
	nth  uint      // of all ends, the last
	ends uint64    // bit n: the nth before the last
}

// with returns the presence at the end of this number, too.
func (p presence) with(nth uint, now time.Time) presence {
	return presence{now, nth, p.ends<<(nth-p.nth) | 1}
}

type suspect struct {
	large bool // only for the size of a message
	size  int  // of the message, or somewhat less, in bytes
	tried int  // how many messages of it were acknowledged that had been on trial; one as large counts as two
	until time.Time
	named bool // before, and so not acquitted
}

type name struct {
	until    time.Time // it is turned down
	remember time.Time // until then the next time is longer
	lasts    time.Duration
	unsure   bool // and not released yet
}

// NewBook returns a book in which nobody is suspected.
func NewBook() *Book {
	b := &Book{last: map[wire.UID]presence{}, suspects: map[wire.UID]suspect{}, named: map[wire.UID]name{}}
	b.clean.Store(true)
	b.limit.Store(math.MaxInt64)
	return b
}

// Judge returns what to do with a message. It costs next to nothing while nobody is suspected.
func (b *Book) Judge(uid wire.UID, size int) Judgement {
	if b.clean.Load() && int64(size) < b.limit.Load() {
		return Pass
	}
	now := time.Now()
	b.mu.Lock()
	defer b.mu.Unlock()
	if n, ok := b.named[uid]; ok && now.Before(n.until) {
		return Named
	}
	if int64(size) >= b.limit.Load() {
		if now.Before(b.limited) {
			return TooLarge
		}
		return Try // the server may take more by now
	}
	if s, ok := b.suspects[uid]; ok && now.Before(s.until) && (!s.large || size > b.largest) {
		return Try
	}
	return Pass
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

// Acquit tells that the server has read a message that was on trial. While nobody else waits for a trial, that
// costs next to nothing, so the suspect stays one: what it is asked for next may be what it is suspected for.
// It reports whether the suspect is innocent.
func (b *Book) Acquit(m Message, othersWait bool) (innocent bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	s, ok := b.suspects[m.UID]
	if !ok || s.named {
		return !ok
	}
	if s.tried++; m.Size >= s.size {
		s.tried++
	}
	if s.tried < enoughTrials || !othersWait {
		b.suspects[m.UID] = s
		return false
	}
	delete(b.suspects, m.UID)
	b.tidyLocked()
	return true
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
	if !accuses(e.Code) {
		b.countLocked(now)
	}
	if e.Trial == 0 && b.provesLocked(&e) {
		culprit = e.Unacknowledged[0]
		if e.Code == websocket.CloseMessageTooBig && culprit.Size > b.largest {
			if !now.Before(b.limited) {
				b.limit.Store(math.MaxInt64) // what is known is too old
			}
			b.limit.Store(min(b.limit.Load(), int64(culprit.Size)))
			b.limited = now.Add(limitFor)
		}
		return culprit, b.nameLocked(culprit.UID, accuses(e.Code), now)
	}
	larger := func(m Message) bool { return m.Size > b.largest }
	if e.Code == websocket.CloseMessageTooBig && !slices.ContainsFunc(e.Unacknowledged, larger) {
		b.largest = 0 // the server takes less than it did
	}
	for _, m := range e.Unacknowledged {
		if m.UID == (wire.UID{}) {
			continue
		}
		before, again := b.last[m.UID]
		switch {
		case e.Code == websocket.CloseMessageTooBig:
			if larger(m) { // smaller ones it has taken
				b.suspectLocked(m.UID, suspect{large: true, size: m.Size}, now)
			}
		case accuses(e.Code), again && now.Sub(before.at) < suspectFor:
			b.suspectLocked(m.UID, suspect{size: m.Size - m.Size/8}, now) // said again, it may have changed a little
		}
	}
	for _, m := range e.Unacknowledged { // once all were looked at: several may be of one agent
		if p, known := b.last[m.UID]; m.UID != (wire.UID{}) && (known || len(b.last) < maxAgents) {
			b.last[m.UID] = p.with(b.count, now)
		}
	}
	return Message{}, 0
}

// provesLocked reports whether a link has ended because of the message on trial, which was the first that was not
// acknowledged. Something else may just then have ended the link: if the server has taken some of the agent on trial
// since the last end, or, as far as no reason was told, links mostly end without it.
func (b *Book) provesLocked(e *End) bool {
	uid := e.Unacknowledged[0].UID
	s := b.suspects[uid]
	if uid == (wire.UID{}) || s.tried >= enoughTrials {
		return false
	}
	if accuses(e.Code) {
		return true
	}
	recent := min(len(b.ends), 64)
	present := bits.OnesCount64(b.last[uid].with(b.count, time.Time{}).ends << (64 - recent))
	return 2*present >= recent
}

// countLocked counts an end of a link for no reason that was told.
func (b *Book) countLocked(now time.Time) {
	b.ends = slices.DeleteFunc(b.ends, func(at time.Time) bool { return now.Sub(at) >= suspectFor })
	if n := len(b.ends); n == 0 || now.Sub(b.ends[n-1]) >= together {
		b.ends = append(b.ends, now)
		b.count++
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
	if until := now.Add(suspectFor); until.After(s.until) {
		s.until = until
	}
	s.large, s.size, s.tried = fresh.large && (s.large || !known), max(s.size, fresh.size), 0
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
	b.named[uid] = name{until: now.Add(lasts), remember: now.Add(2 * lasts), lasts: lasts, unsure: !sure}
	b.suspects[uid] = suspect{named: true, until: now.Add(2 * lasts)}
	return lasts
}

// Sweep forgets what is over. It returns who is turned down no longer and may have been named by mistake: what it
// said in the meantime is missing. It is to be called now and then.
func (b *Book) Sweep() (released []wire.UID) {
	now := time.Now()
	b.mu.Lock()
	defer b.mu.Unlock()
	for uid, p := range b.last {
		if now.Sub(p.at) >= suspectFor {
			delete(b.last, uid)
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

func (b *Book) tidyLocked() { b.clean.Store(len(b.suspects) == 0 && len(b.named) == 0) }
