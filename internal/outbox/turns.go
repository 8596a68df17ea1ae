package outbox

import (
	"time"

	"github.com/opampgateway/opampgateway/internal/monotonic"
)

// Senders take turns by deficit round robin (Shreedhar and Varghese, 1995), those that had nothing
// waiting first, as in fq_codel (RFC 8290, section 4.2).

const (
	// turn is how much a sender of weight 1 may say before the next one's turn comes, in bytes.
	turn = 16 << 10
	// messageCost is what a message costs of a turn beyond its bytes: a turn of tiny messages
	// keeps a server busy, too.
	messageCost = 1 << 10
	// lineShare is what one sender of weight 1 may have waiting, in bytes, or one message.
	lineShare = 64 << 10
	// sharedWait is about how long an entry waits in a shared line, in nanoseconds, while its sender is not held up by
	// others; and sharedLeast how many may wait in any case.
	sharedWait, sharedLeast = int64(50 * time.Millisecond), 16
	// keptQueues is for how many senders that have nothing waiting an outbox keeps their queues, and keptPlaces
	// how many entries' places each of these keeps at most.
	keptQueues, keptPlaces = 256, 512
)

// Line is where the messages of one sender wait in a link's outbox. It takes next to nothing while
// there are none. It is used with one outbox at a time, from one Abort to the next, and by one
// goroutine at a time.
type Line[S any] struct {
	// Shared says that many speak there, who take turns where they come from: so that it is their turns that
	// count, no more waits than is written in a moment. Set once.
	Shared bool

	queue *queue[S] // nil while nothing waits
}

// queue is what one sender has waiting, and its place among the senders. Senders that lately had
// something keep theirs for the rest of the round.
type queue[S any] struct {
	line    *Line[S]
	weight  int
	entries []Entry[S] // the first of them at head
	head    int
	size    int // of the entries, in bytes
	left    int // of its turn; may be less than the next message costs, by any number of turns

	// Of a shared line.
	share int   // how many entries may wait
	taken int   // how many were taken since
	since int64 // of the monotonic clock

	in         *list[S]
	prev, next *queue[S]

	// What Put waits to add.
	waits   bool
	crowds  bool // it waits for room that all share
	pending Entry[S]
	decided chan error // buffered; sent to once for each wait
}

// fits reports whether e may wait behind what waits already.
func (q *queue[S]) fits(e *Entry[S], weight int) bool {
	if q.size+e.size() > lineShare*weight {
		return false
	}
	return !q.line.Shared || len(q.entries)-q.head < max(q.share, sharedLeast)
}

// halfEmpty reports whether no more waits than half of what may, or it is a line that is short anyway.
func (q *queue[S]) halfEmpty() bool {
	return q.line.Shared || q.size <= lineShare*q.weight/2
}

// pace notes that an entry was taken out of a shared line.
func (q *queue[S]) pace() {
	q.taken++
	now := monotonic.Now()
	if q.since == 0 {
		q.since = now
	}
	if lasts := now - q.since; lasts >= sharedWait {
		q.share, q.taken, q.since = int(2*int64(q.taken)*sharedWait/lasts), 0, now // twice: it may have held it up
	} else {
		q.share = max(q.share, q.taken)
	}
}

func (q *queue[S]) empty() bool { return q.head == len(q.entries) }

func (q *queue[S]) first() *Entry[S] { return &q.entries[q.head] }

// list is some of the queues, in order.
type list[S any] struct {
	first, last *queue[S]
	len         int
}

func (l *list[S]) push(q *queue[S]) {
	q.in, q.prev, q.next = l, l.last, nil
	if l.last == nil {
		l.first = q
	} else {
		l.last.next = q
	}
	l.last = q
	l.len++
}

func (l *list[S]) remove(q *queue[S]) {
	if q.prev == nil {
		l.first = q.next
	} else {
		q.prev.next = q.next
	}
	if q.next == nil {
		l.last = q.prev
	} else {
		q.next.prev = q.prev
	}
	q.in, q.prev, q.next = nil, nil, nil
	l.len--
}

// turns decides whose message is next. Each queue is in one of two lists:
//
//   - fresh: senders that had nothing waiting, or have something left of their turn: they go first.
//   - round: all others, each of which gets a turn when it has come to the front, and then goes to the end. One
//     with nothing waiting is kept until it comes to the front: if it said something just when its
//     queue had been emptied, it would be fresh each time, and nobody else would get a word in.
type turns[S any] struct {
	fresh, round list[S]
	waiting      int // entries in all queues
	spare        *queue[S]
	spares       int
}

// queueOf returns the queue of a line, which gets one if it has none.
func (t *turns[S]) queueOf(line *Line[S]) *queue[S] {
	q := line.queue
	if q == nil {
		if q = t.spare; q != nil {
			t.spare, q.next = q.next, nil
			t.spares--
		} else {
			q = &queue[S]{}
		}
		q.line, line.queue = line, q
	}
	return q
}

// add has e wait in q.
func (t *turns[S]) add(q *queue[S], weight int, e Entry[S]) {
	wasEmpty := q.empty()
	if wasEmpty {
		q.entries, q.head = q.entries[:0], 0
	} else if q.head > len(q.entries)/2 && len(q.entries) == cap(q.entries) {
		n := copy(q.entries, q.entries[q.head:])
		clear(q.entries[n:])
		q.entries, q.head = q.entries[:n], 0
	}
	q.entries = append(q.entries, e)
	q.size += e.size()
	q.weight = weight
	t.waiting++
	if !wasEmpty {
		return
	}
	switch {
	case q.in == nil:
		q.left = turn * weight
		t.fresh.push(q)
	case q.left >= cost(&e):
		q.in.remove(q)
		t.fresh.push(q)
	default:
		q.left += turn * weight // which it would have got at the end of its turn, had it had this waiting by then
	}
}

// cost is what a message costs of its sender's turn.
func cost[S any](e *Entry[S]) int { return len(e.Frame) + messageCost }

// next returns the queue whose first message is to be written, nil if nothing waits.
func (t *turns[S]) next() *queue[S] {
	for passed := 0; ; {
		from := &t.fresh
		if from.first == nil {
			from = &t.round
		}
		q := from.first
		switch {
		case q == nil:
			return nil
		case q.empty():
			from.remove(q)
			if !q.waits { // otherwise its sender is about to go on
				t.forget(q)
			}
		case q.left >= cost(q.first()):
			return q
		default:
			from.remove(q)
			q.left += turn * q.weight
			t.round.push(q)
			if passed++; passed > t.round.len {
				t.skip() // all that is left are large messages: many rounds
				passed = 0
			}
		}
	}
}

// postpone has q, which next has returned, wait for its turn to go on behind all others.
func (t *turns[S]) postpone(q *queue[S]) {
	q.in.remove(q)
	t.round.push(q)
}

// len returns how many queues there are.
func (t *turns[S]) len() int { return t.fresh.len + t.round.len }

// skip goes through as many rounds at once as nobody can say anything in.
func (t *turns[S]) skip() {
	rounds := -1
	for q := t.round.first; q != nil; q = q.next {
		if q.empty() {
			return
		}
		missing := (cost(q.first()) - q.left + turn*q.weight - 1) / (turn * q.weight)
		if missing <= 0 {
			return
		}
		if rounds < 0 || missing < rounds {
			rounds = missing
		}
	}
	for q := t.round.first; q != nil; q = q.next {
		q.left += (rounds - 1) * turn * q.weight
	}
}

// take takes the first message out of q.
func (t *turns[S]) take(q *queue[S]) Entry[S] {
	e := *q.first()
	*q.first() = Entry[S]{}
	q.head++
	q.size -= e.size()
	q.left -= cost(&e)
	t.waiting--
	if q.line.Shared {
		q.pace()
	}
	if q.empty() {
		q.in.remove(q)
		t.round.push(q)
	}
	return e
}

// withdraw takes all that is said to be out of q, in order.
func (t *turns[S]) withdraw(q *queue[S], out func(*Entry[S]) bool) (entries []Entry[S]) {
	stay := q.entries[:q.head]
	for _, e := range q.entries[q.head:] {
		if out(&e) {
			entries = append(entries, e)
			q.size -= e.size()
		} else {
			stay = append(stay, e)
		}
	}
	clear(q.entries[len(stay):])
	q.entries = stay
	t.waiting -= len(entries)
	return entries
}

// forget gives up a queue that is in no list and in which nothing waits.
func (t *turns[S]) forget(q *queue[S]) {
	q.line.queue, q.line = nil, nil
	q.share, q.taken, q.since = 0, 0, 0
	if t.spares >= keptQueues || len(q.decided) > 0 {
		return // the latter is for its sender, which has not received it yet
	}
	if q.entries, q.head = q.entries[:0], 0; cap(q.entries) > keptPlaces {
		q.entries = nil
	}
	q.next, t.spare = t.spare, q
	t.spares++
}

// all yields every queue that is in a list.
func (t *turns[S]) all(yield func(*queue[S]) bool) {
	for _, l := range []*list[S]{&t.fresh, &t.round} {
		for q := l.first; q != nil; q = q.next {
			if !yield(q) {
				return
			}
		}
	}
}

// drop takes all that waits, in order of each sender's, and gives up the queues.
func (t *turns[S]) drop() (entries []Entry[S]) {
	for q := range t.all {
		entries = append(entries, q.entries[q.head:]...)
		q.line.queue = nil
	}
	*t = turns[S]{}
	return entries
}
