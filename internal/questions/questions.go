// Package questions is the book of the questions that are open on one link.
//
// A question (connect) asks the server whether an agent may connect; its answer (connectResult)
// comes on the same link, in any order, late, twice or never. Some questions are our own, others
// those of gateways below, and here they are alike: all have the same bounds.
//
// Each link has a Book, and all books of a gateway share one Server, which knows whether the server
// can be asked at all. A question that is asked waits until there is a place for it, is sent, and
// leaves the book in exactly one way: it is answered, it expires, its asker abandons it, it is given
// up, or its link ends.
//
//	Ask ──▶ waits ──▶ sent ──▶ Answer
//	          │         │
//	          └────┬────┘
//	               ├──▶ Sweep: expired
//	               ├──▶ GiveUp: the server cannot be asked
//	               ├──▶ End: of the link; it can be asked again on another
//	               └──▶ Abandon: nobody has to be told
//
// Three rules keep strangers from each other's way:
//
//   - What is sent is bounded, for newcomers and for agents that were in already (introductions)
//     apart, so that the latter never wait behind the former.
//   - Places are shared fairly between the addresses that agents come from: none holds more than is
//     still free, and those that wait take turns. So whoever has nothing in flight is sent as long
//     as there is any place.
//   - A place stays taken while the server is at work, even when the asker has gone: hanging up is
//     no way to have the server do more at once.
//
// Methods do no I/O, start no goroutine, and call nobody: they return which questions to send now,
// and whose askers to tell. The caller does both after the call, without a lock. It does not matter
// in which order what different calls return is sent, but each has to be, since it holds a place,
// unless Withdraw says that it is not worth it any more.
package questions

import (
	"cmp"
	"errors"
	"math"
	"net/netip"
	"slices"
	"sync"
	"time"
)

const (
	// newcomerWindow and introductionWindow bound what is sent and unanswered on one link, by class.
	// One address alone gets half.
	newcomerWindow     = 256
	introductionWindow = 128

	// waitingLimit bounds what waits to be sent on one link, in each class. One address alone gets
	// half.
	waitingLimit = 20_000
)

var (
	// ErrFull means that as many wait already as may, or as the address may have waiting beside the
	// others.
	ErrFull = errors.New("too many questions wait for the server")
	// ErrTwice means that the request_uid is that of another question still open on the link.
	ErrTwice = errors.New("request_uid is in use")
	// ErrCannotAsk means that the server does not understand questions.
	ErrCannotAsk = errors.New("server cannot be asked")
	// ErrEnded means that the link has ended.
	ErrEnded = errors.New("link has ended")
)

// Class is what a question is about.
type Class uint8

const (
	// ClassNewcomer is an agent that is not in yet.
	ClassNewcomer Class = iota
	// ClassIntroduction is an agent that was in, and whose link was lost.
	ClassIntroduction

	classes
)

// Question is one question to the server, in the name of an asker. It is open on one book at most.
type Question[A any] struct {
	// Set once, by who asks; the book only reads them.
	UID     string       // the request_uid
	From    netip.Prefix // whom the agent's address counts as; see fair.Address
	Class   Class
	Expires time.Time // when nobody waits for the answer any longer
	Asker   A         // who has to be told

	// Owned by the book on which the question is open.
	state  state
	number uint64 // in the order of asking
	source *source[A]
	place  element[*Question[A]] // in the source's queue, while the question waits
}

// state is where a question stands that is open on a book.
type state uint8

const (
	stateWaiting   state = iota // for a place
	stateSent                   // or about to be
	stateAbandoned              // sent, and it keeps its place, but its asker needs to be told nothing
)

// source is what one address has open in one class. It goes when that is nothing.
type source[A any] struct {
	from    netip.Prefix
	sent    int
	waiting list[*Question[A]]
	turn    element[*source[A]] // in the window's queue, while something waits
}

// window is what is open in one class.
type window[A any] struct {
	limit   int // of what is sent
	sent    int
	most    int // of what waits
	waiting int
	sources table[netip.Prefix, *source[A]]
	turns   list[*source[A]] // those with something waiting; the first is next
}

// Book holds the questions open on one link. It is safe for concurrent use.
type Book[A any] struct {
	// Set once.
	server     *Server
	endsBefore int // of links at a question, when this link began

	// mu guards what follows. Server.mu may be taken while it is held, never the other way round,
	// and never the mu of another book.
	mu       sync.Mutex
	windows  [classes]window[A]
	open     table[string, *Question[A]]                 // by UID
	expiring map[time.Duration]map[*Question[A]]struct{} // by when they expire, in whole seconds since epoch
	epoch    time.Time                                   // when the first was asked
	asked    uint64                                      // how many were
	paused   time.Time                                   // nothing is sent before
	hasSent  bool                                        // something, ever
	ended    bool
	trial    *Question[A] // the one that the server, being deaf, is tried with
	probe    *Question[A] // the first one sent to a server that has never answered, if it was here
}

// NewBook returns the book for a new link to s.
func NewBook[A any](s *Server) *Book[A] {
	b := &Book[A]{server: s, endsBefore: s.endsSoFar()}
	for class, limit := range [classes]int{ClassNewcomer: newcomerWindow, ClassIntroduction: introductionWindow} {
		b.windows[class].limit, b.windows[class].most = limit, waitingLimit
	}
	return b
}

// NewPlaces returns a book that is of no link: for what is found out about newcomers in another way than by a question
// to the server, with so many places. Turns, bounds and fairness are those of questions. Only newcomers may be asked about.
func NewPlaces[A any](places int) *Book[A] {
	b := NewBook[A](&Server{answered: true})
	b.windows[ClassNewcomer].limit = places
	return b
}

// Resize has the book have so many places, and returns what may be sent now.
func (b *Book[A]) Resize(places int, now time.Time) []*Question[A] {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.windows[ClassNewcomer].limit = places
	return b.sendLocked(now)
}

// Ask opens q, and returns what may be sent now: q itself, unless it has to wait, and whatever else
// has a place. An error is ErrFull, ErrTwice, ErrCannotAsk or ErrEnded; then q is not open, and what
// is open is not touched. A question that is not open any more can be asked again, here or on
// another book.
func (b *Book[A]) Ask(q *Question[A], now time.Time) (send []*Question[A], err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	w := &b.windows[q.Class]
	switch {
	case b.ended:
		return nil, ErrEnded
	case b.open.has(q.UID):
		return nil, ErrTwice
	case !w.mayWait(q.From) && (b.pausedLocked(now) || !b.server.mayFlow(now) || !w.maySend(q.From)):
		return nil, ErrFull
	}
	trial, ok := b.server.mayAsk(now)
	if !ok {
		return nil, ErrCannotAsk
	}
	if trial {
		b.trial = q
	}
	b.addLocked(q, now)
	return b.sendLocked(now), nil
}

// Answer takes an answer of the server. It returns the question, now answered, and what may be sent
// in its place. There is none when nobody waits for the answer any more; it is a stray one when it
// answers nothing that is open and sent, as when it came twice, or late.
func (b *Book[A]) Answer(uid string, now time.Time) (q *Question[A], stray bool, send []*Question[A]) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.server.heard() // even by a stray answer
	// To one that waits there can be no answer yet: it is to an earlier question under that uid.
	if q, _ = b.open.get(uid); q == nil || q.state == stateWaiting {
		return nil, true, b.sendLocked(now)
	}
	abandoned := q.state == stateAbandoned
	b.removeLocked(q)
	if abandoned {
		q = nil
	}
	return q, false, b.sendLocked(now)
}

// Abandon tells that the asker of q waits no longer, and reports whether q was still its to abandon;
// otherwise another call has returned q, or is about to. If q was sent, it keeps its place until it
// is answered or expires, and its UID stays in use.
func (b *Book[A]) Abandon(q *Question[A]) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	// It may be open on another book by now, which then owns its state.
	if open, _ := b.open.get(q.UID); open != q || q.state == stateAbandoned {
		return false
	}
	if q.state == stateSent {
		q.state = stateAbandoned
		return true
	}
	if q == b.trial {
		b.server.tried(false, time.Time{})
	}
	b.removeLocked(q)
	return true
}

// Withdraw is for the caller to ask right before it writes q to the link: it reports whether its asker
// has left. Then q is not written, and has no place any more; the next call has another sent there.
func (b *Book[A]) Withdraw(q *Question[A]) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if open, _ := b.open.get(q.UID); open != q || q.state != stateAbandoned {
		return false
	}
	switch q {
	case b.trial:
		b.server.tried(false, time.Time{})
	case b.probe:
		b.server.notProbed()
	}
	b.removeLocked(q)
	return true
}

// Send returns what may be sent now. It is to be called on all books when the server has answered its
// first question.
func (b *Book[A]) Send(now time.Time) []*Question[A] {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.sendLocked(now)
}

// Pause has nothing sent until then, if it is later than what was told before: the server is
// unavailable. What may be sent afterwards is returned by the next Answer, Sweep, or Ask without an
// error.
func (b *Book[A]) Pause(until time.Time) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if until.After(b.paused) {
		b.paused = until
	}
}

// Sweep forgets the questions that have expired and returns those whose askers have to be told, in
// the order of asking, and what may be sent in their places. It is to be called each second.
func (b *Book[A]) Sweep(now time.Time) (expired, send []*Question[A]) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for second, questions := range b.expiring {
		if second > b.secondLocked(now) {
			continue
		}
		for q := range questions {
			if q.Expires.After(now) {
				continue
			}
			if q == b.trial { // that it was not even sent says nothing about the server
				b.server.tried(q.state != stateWaiting, now)
			}
			if q.state != stateAbandoned {
				expired = append(expired, q)
			}
			b.removeLocked(q)
		}
	}
	slices.SortFunc(expired, inOrder)
	return expired, b.sendLocked(now)
}

// Misunderstood tells that the server showed that it does not understand questions. It reports
// whether the server is deaf from now on: then GiveUp is to be called on each book.
func (b *Book[A]) Misunderstood(now time.Time) (deaf bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	switch {
	case !b.hasSent:
		return false // what it showed, it did not show of a question
	case b.trial == nil:
		return b.server.misunderstood(now)
	case b.trial.state == stateWaiting:
		return false
	}
	b.trial = nil // GiveUp returns it
	return b.server.tried(true, now)
}

// Silent tells that q has had no answer for long, and reports whether the server is deaf from now on: then GiveUp is to be
// called on each book. It is not because of a question that was not sent, nor if it has ever answered one, or has stated
// that it knows them.
func (b *Book[A]) Silent(q *Question[A], now time.Time) (deaf bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if open, _ := b.open.get(q.UID); open != q || q.state == stateWaiting {
		return false
	}
	return b.server.silent(now)
}

// GiveUp returns all questions whose askers have to be told that the server cannot be asked, in the
// order of asking: if it is deaf, all but the one it is tried with. Those sent keep their places
// until they are answered, which would show that the server is not deaf after all, or expire.
func (b *Book[A]) GiveUp() (open []*Question[A]) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if !b.server.IsDeaf() {
		return nil
	}
	for _, q := range b.openLocked() {
		switch {
		case q == b.trial:
			continue
		case q.state == stateSent:
			q.state = stateAbandoned
		default:
			b.removeLocked(q)
		}
		open = append(open, q)
	}
	return open
}

// End tells that the link has ended: by the server's doing, or by ours. It returns all questions
// whose askers have to be told, in the order of asking; they may be asked again on another book. It
// reports whether the server is deaf from now on: then GiveUp is to be called on each other book.
func (b *Book[A]) End(byServer bool, now time.Time) (open []*Question[A], deaf bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.ended = true
	_, sent := b.lenLocked()
	switch {
	case b.trial != nil:
		inVain := byServer && b.trial.state != stateWaiting
		if inVain {
			b.server.hungUp()
		}
		deaf = b.server.tried(inVain, now)
	case b.probe != nil && byServer:
		deaf = b.server.endedAtProbe(now)
	case b.probe != nil:
		b.server.notProbed()
	case byServer && sent > 0:
		deaf = b.server.endedAtQuestion(now)
	}
	open = b.openLocked()
	b.windows, b.open, b.expiring, b.trial, b.probe = [classes]window[A]{}, table[string, *Question[A]]{}, nil, nil, nil
	for _, q := range open {
		q.source, q.place = nil, element[*Question[A]]{}
	}
	return open, deaf
}

// Len returns how many questions wait, and how many were sent and hold a place.
func (b *Book[A]) Len() (waiting, sent int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.lenLocked()
}

func (b *Book[A]) lenLocked() (waiting, sent int) {
	for class := range b.windows {
		waiting += b.windows[class].waiting
		sent += b.windows[class].sent
	}
	return waiting, sent
}

// openLocked returns the questions whose askers have to be told something yet, in the order of asking.
func (b *Book[A]) openLocked() (open []*Question[A]) {
	for _, q := range b.open.entries {
		if q.state != stateAbandoned {
			open = append(open, q)
		}
	}
	slices.SortFunc(open, inOrder)
	return open
}

func inOrder[A any](p, q *Question[A]) int { return cmp.Compare(p.number, q.number) }

func (b *Book[A]) pausedLocked(now time.Time) bool { return now.Before(b.paused) }

// secondLocked is where in expiring a time belongs.
func (b *Book[A]) secondLocked(at time.Time) time.Duration {
	return at.Sub(b.epoch).Truncate(time.Second)
}

// addLocked opens q: it waits.
func (b *Book[A]) addLocked(q *Question[A], now time.Time) {
	if b.asked == 0 {
		b.epoch = now
		b.expiring = map[time.Duration]map[*Question[A]]struct{}{}
	}
	b.asked++
	q.number, q.state = b.asked, stateWaiting
	b.open.set(q.UID, q)
	second := b.secondLocked(q.Expires)
	if b.expiring[second] == nil {
		b.expiring[second] = map[*Question[A]]struct{}{}
	}
	b.expiring[second][q] = struct{}{}
	b.windows[q.Class].add(q)
}

// removeLocked has q not open any more.
func (b *Book[A]) removeLocked(q *Question[A]) {
	if q == b.trial {
		b.trial = nil
	}
	if q == b.probe {
		b.probe = nil
	}
	b.open.remove(q.UID)
	second := b.secondLocked(q.Expires)
	if delete(b.expiring[second], q); len(b.expiring[second]) == 0 {
		delete(b.expiring, second)
	}
	b.windows[q.Class].remove(q)
}

// sendLocked returns what may be sent now, introductions first. Nothing with a place waits afterwards,
// unless all wait for what becomes of a probe.
func (b *Book[A]) sendLocked(now time.Time) (send []*Question[A]) {
	if waiting, _ := b.lenLocked(); waiting == 0 || b.pausedLocked(now) {
		return nil
	}
	probe, ok := b.server.mayNowSend(now, b.endsBefore)
	if !ok {
		return nil
	}
	most := math.MaxInt
	if probe {
		most = 1
	}
	send = b.windows[ClassNewcomer].send(b.windows[ClassIntroduction].send(nil, most), most)
	b.hasSent = b.hasSent || len(send) > 0
	if probe && len(send) > 0 {
		b.probe = send[0]
	} else if probe {
		b.server.notProbed()
	}
	return send
}

// mayWait reports whether one more from that address may wait.
func (w *window[A]) mayWait(from netip.Prefix) bool {
	waiting := 0
	if s, ok := w.sources.get(from); ok {
		waiting = s.waiting.len
	}
	return waiting < w.most-w.waiting
}

// maySend reports whether there is a place for one more from that address.
func (w *window[A]) maySend(from netip.Prefix) bool {
	sent := 0
	if s, ok := w.sources.get(from); ok {
		sent = s.sent
	}
	return sent < w.limit-w.sent
}

// add has q wait.
func (w *window[A]) add(q *Question[A]) {
	s, ok := w.sources.get(q.From)
	if !ok {
		s = &source[A]{from: q.From}
		s.turn.value = s
		w.sources.set(q.From, s)
	}
	if s.waiting.len == 0 {
		w.turns.push(&s.turn)
	}
	q.source, q.place.value = s, q
	s.waiting.push(&q.place)
	w.waiting++
}

// send appends those that have a place, which they take from now on, until there are as many as may
// be. Addresses take turns. One that holds as many as are free is passed over; since each of these
// holds at least one, they are fewer than the places, however many wait.
func (w *window[A]) send(send []*Question[A], most int) []*Question[A] {
	for passed := 0; passed < w.turns.len && w.sent < w.limit && len(send) < most; {
		s := w.turns.first.value
		w.turns.remove(&s.turn)
		if s.sent >= w.limit-w.sent {
			w.turns.push(&s.turn)
			passed++
			continue
		}
		passed = 0
		q := s.waiting.first.value
		s.waiting.remove(&q.place)
		w.waiting--
		q.state = stateSent
		s.sent++
		w.sent++
		if s.waiting.len > 0 {
			w.turns.push(&s.turn)
		}
		send = append(send, q)
	}
	return send
}

// remove takes q out, and gives its place back.
func (w *window[A]) remove(q *Question[A]) {
	s := q.source
	q.source = nil
	if q.state == stateWaiting {
		s.waiting.remove(&q.place)
		w.waiting--
		if s.waiting.len == 0 {
			w.turns.remove(&s.turn)
		}
	} else {
		s.sent--
		w.sent--
	}
	if s.sent == 0 && s.waiting.len == 0 {
		w.sources.remove(s.from)
	}
}
