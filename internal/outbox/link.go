package outbox

import (
	"context"
	"encoding/binary"
	"math"
	"runtime"
	"slices"
	"sync"
	"time"

	"github.com/opampgateway/opampgateway/internal/memory"
	"github.com/opampgateway/opampgateway/internal/monotonic"
	"github.com/opampgateway/opampgateway/internal/window"
)

const (
	// batchSize is about how many bytes are taken to be written at once: no more than that is decided early.
	batchSize = 16 << 10
	// keptEntries is for how many entries memory is kept while nothing is to be written.
	keptEntries = 256
	// maxControls is how many pings and pongs may wait.
	maxControls = 64
	// alwaysFits is the largest entry that its sender can always have waiting, if nothing else of it is, in bytes.
	alwaysFits = memory.TinyMessage + overhead
	// maxPings is how many pings may be on their way for the sake of messages on trial.
	maxPings = 8
	// maxPostponed is how many lines are looked at for something that is not on trial, while no more pings may be
	// on their way.
	maxPostponed = 64
	// trialTime is how long after a ping was answered the server is still at the message behind it; otherwise it, or the
	// network, is stuck. lateFor is how long after a message it may still end the link because of it.
	trialTime, lateFor = 5 * time.Second, time.Second
	// maxTried is how many messages on trial are remembered that were acknowledged.
	maxTried = 64
	// maxSent is how many messages are remembered that a server has not acknowledged that acknowledges nothing.
	maxSent = 8192
)

// Sent is a message that was handed to the socket.
type Sent[S any] struct {
	Sender S
	Size   int // in bytes

	ping uint64 // the number of the one just before it, if it is on trial; 0 otherwise
}

// Acknowledgement is what the answer to a ping tells.
type Acknowledgement[S any] struct {
	RoundTrip time.Duration // of the ping
	Largest   int           // of the messages acknowledged, in bytes
	Tried     []Sent[S]     // those of them that were on trial
}

// Link is the outbox of a link, on which many senders share a socket:
//
//   - Each sender's messages wait in a line of their own, and senders take turns, see turns.
//   - No more is written than the server reads soon: pings show what it has read, see package window.
//   - What was written and not acknowledged is known when the link ends, by sender and size. A message on
//     trial is written between two pings: if the server answers the first and then ends the link, it is because of
//     this message.
//
// One goroutine writes, and stays until the end.
type Link[S comparable] struct {
	// Set once.
	socket  Socket[S]
	limit   int
	account *memory.Account
	wake    *time.Timer // has the writer look at the window again

	// mu guards what follows. It is never held while the socket is written to.
	mu       sync.Mutex
	controls []Entry[S] // pings and pongs: before all else; they are not counted
	own      []Entry[S] // messages of the gateway's own
	lines    turns[S]
	size     int         // of all messages that wait or are being written
	large    int         // of those of them that do not fit always
	taken    int         // what these take, of the account
	crowd    []*queue[S] // senders that wait for room that all share, longest wait first
	window   *window.Window
	sent     ring[Sent[S]] // what was taken to be written, and is not acknowledged
	lastPing uint64        // its number
	pinged   uint64        // what was sent before it, as sent counts
	answered uint64        // the number of the last ping that was answered
	reached  int64         // when it was
	trying   int           // messages on trial that are not acknowledged
	triedAt  int64         // when the last of them was written
	alone    bool          // it is to be the only one
	tried    []tried[S]    // messages on trial that were acknowledged, the last maxTried
	wakeAt   int64         // when the timer goes off; math.MaxInt64 for not
	closing  []byte        // payload of the close frame that is to come last; nil while there is none
	replies  bool          // what waits is not to be written
	closed   bool          // nothing more is taken
	over     bool          // Abort has returned what was left
	parked   bool          // the writer waits
	held     bool          // for the window
	idle     bool          // the writer has nothing to write
	stays    bool          // the writer is there
	changed  sync.Cond     // any of these
	aside    []Entry[S]    // what a failed write left unwritten
}

// tried is a message that was on trial.
type tried[S any] struct {
	Sent[S]

	at int64 // when it was acknowledged
}

// NewLink returns a link's outbox, for socket. All that senders have waiting is about limit bytes at most,
// but for what is alwaysFits; what it holds is counted in account. A server that is blind to pings, as another link
// has shown, is sent all that comes until it answers one. Its end is an Abort.
func NewLink[S comparable](socket Socket[S], limit int, account *memory.Account, blind bool) *Link[S] {
	o := &Link[S]{
		socket: socket, limit: limit, account: account, window: window.New(monotonic.Now()), wakeAt: math.MaxInt64, stays: true,
	}
	o.changed.L = &o.mu
	o.controls = o.pingLocked(nil) // before anything else: it shows the link's own round trip
	o.wake = time.AfterFunc(time.Hour, o.awake)
	o.wake.Stop()
	if blind {
		o.window.Blinden()
	}
	go o.write()
	return o
}

// awake is what the timer does.
func (o *Link[S]) awake() {
	o.mu.Lock()
	o.wakeAt = math.MaxInt64
	o.mu.Unlock()
	o.signal()
}

// signal has the writer, and others who wait, look again.
func (o *Link[S]) signal() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.parked = false
	o.changed.Broadcast()
}

// Try adds a message of a sender, unless it has no room, or the outbox is closed. It never waits.
func (o *Link[S]) Try(e Entry[S], line *Line[S], weight int) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.closed {
		return ErrClosed
	}
	q := o.lines.queueOf(line)
	if !o.fitsLocked(q, &e, weight) {
		o.leaveLocked(q)
		return ErrFull
	}
	o.addLocked(q, e, weight)
	return nil
}

// Put adds a message of a sender, and waits while it has no room. It returns ErrClosed, or the
// error of ctx, if the entry was not taken.
func (o *Link[S]) Put(ctx context.Context, e Entry[S], line *Line[S], weight int) error {
	o.mu.Lock()
	if o.closed {
		o.mu.Unlock()
		return ErrClosed
	}
	q := o.lines.queueOf(line)
	if o.fitsLocked(q, &e, weight) {
		o.addLocked(q, e, weight)
		o.mu.Unlock()
		return nil
	}
	if q.decided == nil {
		q.decided = make(chan error, 1)
	}
	q.waits, q.pending, q.weight = true, e, weight
	o.goOnLocked(q)
	o.mu.Unlock()

	select {
	case err := <-q.decided:
		return err
	case <-ctx.Done():
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if !q.waits { // decided in the meantime
		return <-q.decided
	}
	o.giveUpLocked(q)
	return ctx.Err()
}

// Withdraw takes out of a line what waits there of one sender, in order: it speaks elsewhere by now. A Put of it that
// waits has its message taken, too. What is being written stays.
func (o *Link[S]) Withdraw(line *Line[S], sender S) (entries []Entry[S]) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if q := o.queueLocked(line); q != nil {
		return o.withdrawLocked(q, sender)
	}
	return nil
}

// Waiting returns the senders of whom something waits in a line.
func (o *Link[S]) Waiting(line *Line[S]) (senders []S) {
	o.mu.Lock()
	defer o.mu.Unlock()
	q := o.queueLocked(line)
	if q == nil {
		return nil
	}
	known := map[S]struct{}{}
	for _, e := range q.entries[q.head:] {
		if _, is := known[e.Sender]; !is {
			known[e.Sender] = struct{}{}
			senders = append(senders, e.Sender)
		}
	}
	return senders
}

// queueLocked returns the queue of a line, nil if it has none. The line may be used with another outbox, but not before
// this one's Abort.
func (o *Link[S]) queueLocked(line *Line[S]) *queue[S] {
	if o.over {
		return nil
	}
	return line.queue
}

func (o *Link[S]) withdrawLocked(q *queue[S], sender S) []Entry[S] {
	entries := o.lines.withdraw(q, func(e *Entry[S]) bool { return e.Sender == sender })
	for i := range entries {
		e := &entries[i]
		o.size -= e.size()
		if e.size() > alwaysFits {
			o.large -= e.size()
		}
		o.taken -= e.Memory()
		o.account.Give(e.Memory())
	}
	if q.waits && q.pending.Sender == sender {
		entries = append(entries, q.pending)
		if q.crowds {
			o.leaveCrowdLocked(q)
		}
		q.waits, q.crowds, q.pending = false, false, Entry[S]{}
		q.decided <- nil
		o.leaveLocked(q)
	}
	o.goOnLocked(q)
	o.thinLocked()
	o.startLocked() // there may be nothing left to write
	return entries
}

// Push adds a message of the gateway's own, whose number something else bounds. It never waits.
func (o *Link[S]) Push(e Entry[S]) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.closed {
		return ErrClosed
	}
	o.own = append(o.own, e)
	o.takeLocked(&e)
	o.startLocked()
	return nil
}

// Control adds a ping or a pong, unless too many wait. It never waits.
func (o *Link[S]) Control(kind Kind, payload []byte) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	switch {
	case o.closed:
		return ErrClosed
	case len(o.controls) >= maxControls:
		return ErrFull
	}
	o.controls = append(o.controls, Entry[S]{Kind: kind, Frame: payload})
	o.startLocked()
	return nil
}

// Ping asks the server for a sign of life.
func (o *Link[S]) Ping() {
	o.mu.Lock()
	defer o.mu.Unlock()
	if !o.closed && len(o.controls) < maxControls {
		o.controls = o.pingLocked(o.controls)
		o.startLocked()
	}
}

// Pong takes the server's answer to a ping. It reports whether it is one that was expected.
func (o *Link[S]) Pong(payload []byte) (ack Acknowledgement[S], expected bool) {
	if len(payload) != pingSize {
		return ack, false
	}
	number := binary.BigEndian.Uint64(payload)
	now := monotonic.Now()
	o.mu.Lock()
	defer o.mu.Unlock()
	acknowledged, roundTrip, expected := o.window.Pong(number, now, o.lines.waiting > 0)
	if !expected {
		return ack, false
	}
	ack.RoundTrip = roundTrip
	o.answered, o.reached = number, now
	for o.sent.begin < acknowledged && o.sent.len() > 0 {
		s := o.popLocked()
		ack.Largest = max(ack.Largest, s.Size)
		if s.ping != 0 {
			ack.Tried = append(ack.Tried, s)
			if len(o.tried) == maxTried {
				o.tried = slices.Delete(o.tried, 0, 1)
			}
			o.tried = append(o.tried, tried[S]{s, now})
		}
	}
	if o.lines.waiting > 0 {
		o.startLocked() // the window may be open
	}
	return ack, true
}

// Unacknowledged returns what was handed to the socket, or begun, and not acknowledged, in order; whether the first of
// it was on trial, and the server had just come to it; and what was on trial and acknowledged shortly before. It is to be
// called after Abort.
func (o *Link[S]) Unacknowledged() (sent []Sent[S], caught bool, before []Sent[S]) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.sent.len() > 0 {
		ping := o.sent.first().ping
		caught = ping != 0 && ping <= o.answered && monotonic.Since(o.reached) < trialTime
	}
	for _, t := range o.tried {
		if monotonic.Since(t.at) < lateFor {
			before = append(before, t.Sent)
		}
	}
	return o.sent.all(), caught, before
}

// Blind reports whether the server does not answer pings.
func (o *Link[S]) Blind() bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.window.Blind()
}

// OnItsWay returns how many messages were handed to the socket and are not acknowledged.
func (o *Link[S]) OnItsWay() int {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.sent.len()
}

// Load is what a link has to do.
type Load[S any] struct {
	OnItsWay, OnItsWayBytes int              // messages handed to the socket that are not acknowledged
	Waiting                 int              // bytes of messages that wait, or are being written
	Lines                   map[*Line[S]]int // of senders, the bytes that wait of each for which some do
}

// Load returns what there is to do.
func (o *Link[S]) Load() Load[S] {
	o.mu.Lock()
	defer o.mu.Unlock()
	_, bytes := o.window.Unacknowledged()
	l := Load[S]{OnItsWay: o.sent.len(), OnItsWayBytes: bytes, Waiting: o.size, Lines: map[*Line[S]]int{}}
	for q := range o.lines.all {
		size := q.size
		if q.waits {
			size += q.pending.size()
		}
		if size > 0 && q.line != nil {
			l.Lines[q.line] = size
		}
	}
	return l
}

// Close has what waits written, then a close frame with this payload, all in a moment, and
// takes nothing more. It never waits. The socket is left to its reader, which sees the
// peer's answer, or runs into the moment's end.
func (o *Link[S]) Close(payload []byte) { o.close(payload, false) }

// Reply is Close for a server that has itself said that it is closing: what waits is not
// written, since nobody will read it, but left for Abort to return.
func (o *Link[S]) Reply(payload []byte) { o.close(payload, true) }

func (o *Link[S]) close(payload []byte, replies bool) {
	o.mu.Lock()
	if o.closed {
		o.mu.Unlock()
		return
	}
	o.closing, o.replies = append([]byte{}, payload...), replies
	o.idle = false
	o.closeLocked()
	o.mu.Unlock()
	o.socket.Hurry()
}

// Drain waits until nothing is left to write, or ctx is done.
func (o *Link[S]) Drain(ctx context.Context) {
	defer context.AfterFunc(ctx, o.signal)()
	o.mu.Lock()
	defer o.mu.Unlock()
	for !o.idle && o.stays && ctx.Err() == nil {
		o.changed.Wait()
	}
}

// Abort closes the socket, takes nothing more and waits for the writer. It returns, in
// order of each sender's, the entries that were not handed to the socket whole.
func (o *Link[S]) Abort() (unwritten []Entry[S]) {
	o.socket.Close()
	o.mu.Lock()
	defer o.mu.Unlock()
	o.closeLocked()
	for o.stays {
		o.changed.Wait()
	}
	o.wake.Stop()
	o.over = true
	unwritten = slices.Concat(o.aside, o.own, o.lines.drop())
	o.account.Give(o.taken)
	o.aside, o.own, o.controls, o.size, o.large, o.taken = nil, nil, nil, 0, 0, 0
	return unwritten
}

// fitsLocked reports whether e may wait behind what its sender has waiting. Half of the room is for those
// that have nothing waiting.
func (o *Link[S]) fitsLocked(q *queue[S], e *Entry[S], weight int) bool {
	if q.empty() {
		return e.size() <= alwaysFits || len(o.crowd) == 0 && o.roomLocked(e)
	}
	return q.fits(e, weight) && o.size+e.size() <= o.limit/2
}

// roomLocked reports whether there is room for e, which does not fit always. One that is larger than what is left gets in
// when half of the room is free: those that come later keep no more than the other half filled.
func (o *Link[S]) roomLocked(e *Entry[S]) bool {
	return o.large <= o.limit/2 || o.large+e.size() <= o.limit
}

// addLocked has e wait in q.
func (o *Link[S]) addLocked(q *queue[S], e Entry[S], weight int) {
	o.lines.add(q, weight, e)
	o.takeLocked(&e)
	if !o.held {
		o.startLocked()
	}
}

// takeLocked counts e.
func (o *Link[S]) takeLocked(e *Entry[S]) {
	o.size += e.size()
	if e.size() > alwaysFits {
		o.large += e.size()
	}
	o.taken += e.Memory()
	o.account.Take(e.Memory())
}

// leaveLocked forgets q if nothing waits there.
func (o *Link[S]) leaveLocked(q *queue[S]) {
	if q.in == nil && q.empty() && q.line != nil {
		o.lines.forget(q)
	}
}

// goOnLocked lets the sender of q, who waits, go on if it has room by now, and for more than one message: it costs
// as much to wake it for one as for many. One who has nothing waiting, and no room, joins the crowd.
func (o *Link[S]) goOnLocked(q *queue[S]) {
	switch {
	case !q.waits || q.crowds || !q.halfEmpty():
	case o.fitsLocked(q, &q.pending, q.weight):
		o.decideLocked(q, nil)
	case q.empty():
		q.crowds = true
		o.crowd = append(o.crowd, q)
	}
}

// decideLocked ends the wait of the sender of q: its message is added, unless there is an error.
func (o *Link[S]) decideLocked(q *queue[S], err error) {
	e := q.pending
	q.waits, q.crowds, q.pending = false, false, Entry[S]{}
	if err == nil {
		o.addLocked(q, e, q.weight)
	}
	q.decided <- err
}

// thinLocked lets those in the crowd go on for whom there is room by now.
func (o *Link[S]) thinLocked() {
	for len(o.crowd) > 0 {
		q := o.crowd[0]
		if !o.roomLocked(&q.pending) {
			return
		}
		o.crowd[0] = nil
		o.crowd = o.crowd[1:]
		o.decideLocked(q, nil)
	}
	o.crowd = nil
}

// giveUpLocked ends the wait of the sender of q, who does not want to any more.
func (o *Link[S]) giveUpLocked(q *queue[S]) {
	if q.crowds {
		o.leaveCrowdLocked(q)
	}
	q.waits, q.crowds, q.pending = false, false, Entry[S]{}
	o.leaveLocked(q)
	o.thinLocked() // it may have been what the others waited behind
}

func (o *Link[S]) leaveCrowdLocked(q *queue[S]) {
	i := slices.Index(o.crowd, q)
	o.crowd = slices.Delete(o.crowd, i, i+1)
}

// startLocked has the writer see what there is to write.
func (o *Link[S]) startLocked() {
	o.idle = false
	if o.parked {
		o.parked = false
		o.changed.Broadcast()
	}
}

func (o *Link[S]) closeLocked() {
	if o.closed {
		return
	}
	o.closed = true
	for q := range o.lines.all {
		if q.waits && !q.crowds {
			o.decideLocked(q, ErrClosed)
		}
	}
	for _, q := range o.crowd {
		o.decideLocked(q, ErrClosed)
		o.leaveLocked(q)
	}
	o.crowd = nil
	o.parked = false
	o.changed.Broadcast()
}

// write is the writer.
func (o *Link[S]) write() {
	var batch []Entry[S]
	for {
		batch = o.next(batch)
		if batch == nil {
			return
		}
		if n, err := o.socket.WriteBatch(batch); err != nil {
			o.fail(batch[n:])
			return
		}
	}
}

// next makes room for what was written and returns what is to be written next, in the same memory; nil tells the
// writer to leave.
func (o *Link[S]) next(batch []Entry[S]) []Entry[S] {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.forgetLocked(batch)
	batch = batch[:0]
	for {
		if o.lines.waiting > 0 && o.size < batchSize {
			// Those who are about to bring something do so first: it is all written in one call.
			o.mu.Unlock()
			runtime.Gosched()
			o.mu.Lock()
		}
		if batch = o.gatherLocked(batch); len(batch) > 0 {
			return batch
		}
		o.idle = o.lines.waiting == 0
		if o.idle && cap(batch) > keptEntries {
			batch = nil
		}
		if o.closed {
			o.stays, o.idle = false, true
			o.changed.Broadcast()
			return nil
		}
		o.waitLocked()
	}
}

// waitLocked has the writer wait for something to write, or for a change of the window.
func (o *Link[S]) waitLocked() {
	if o.idle {
		o.changed.Broadcast() // for Drain
	}
	// A timer that goes off too early is set anew then: that is cheaper than each time.
	if at := o.window.Next(); at < o.wakeAt {
		o.wakeAt = at
		o.wake.Reset(time.Duration(max(0, at-monotonic.Now())))
	}
	o.parked = true
	for o.parked {
		o.changed.Wait()
	}
}

// gatherLocked appends to batch what is to be written now.
func (o *Link[S]) gatherLocked(batch []Entry[S]) []Entry[S] {
	o.held = false
	if o.replies {
		return o.lastLocked(batch)
	}
	o.window.PingDue(monotonic.Now()) // which notices what time has changed
	batch = append(batch, o.controls...)
	clear(o.controls)
	o.controls = o.controls[:0]
	for _, e := range o.own {
		batch = o.sendLocked(batch, e)
	}
	clear(o.own)
	o.own = o.own[:0]
	for size, postponed := 0, 0; size < batchSize; {
		if o.closing == nil && o.lines.waiting > 0 && !o.window.Open() {
			o.held = true
			break
		}
		q := o.lines.next()
		if q == nil {
			break
		}
		trial := q.first().Trial && o.closing == nil && !o.window.Blind()
		if trial && !o.mayTryLocked(q.first()) {
			if postponed++; postponed > maxPostponed || postponed > o.lines.len() {
				break // all that waits has to be tried
			}
			o.lines.postpone(q)
			continue
		}
		e := o.lines.take(q)
		if trial {
			batch = o.tryLocked(batch, e)
			size += len(e.Frame)
			o.goOnLocked(q)
			continue
		}
		size += len(e.Frame)
		batch = o.sendLocked(batch, e)
		o.goOnLocked(q)
	}
	switch {
	case o.closing != nil && o.lines.waiting == 0:
		return o.lastLocked(batch)
	case !o.closed && o.window.PingDue(monotonic.Now()):
		batch = o.pingLocked(batch)
	}
	return batch
}

// mayTryLocked reports whether a message may be on trial now.
func (o *Link[S]) mayTryLocked(e *Entry[S]) bool {
	stuck := monotonic.Since(o.triedAt) >= trialTime // so that its end would prove nothing
	return (stuck || !o.alone && (!e.Alone || o.trying == 0)) && o.window.Outstanding() <= maxPings-2
}

// tryLocked appends to batch a message on trial, between two pings; one between it and the last on trial is enough.
func (o *Link[S]) tryLocked(batch []Entry[S], e Entry[S]) []Entry[S] {
	if o.pinged != o.sent.end || o.lastPing == o.answered {
		batch = o.pingLocked(batch)
	}
	batch = o.sendLocked(batch, e)
	o.sent.last().ping = o.lastPing
	o.trying++
	o.triedAt, o.alone = monotonic.Now(), e.Alone
	return o.pingLocked(batch)
}

// popLocked takes the first message out of what is on its way.
func (o *Link[S]) popLocked() Sent[S] {
	s := o.sent.pop()
	if s.ping != 0 {
		o.trying--
		o.alone = false
	}
	return s
}

// sendLocked appends a message to batch.
func (o *Link[S]) sendLocked(batch []Entry[S], e Entry[S]) []Entry[S] {
	o.window.Sent(len(e.Frame))
	if o.sent.len() >= maxSent && o.window.Blind() {
		o.popLocked()
	}
	o.sent.push(Sent[S]{Sender: e.Sender, Size: len(e.Frame)})
	return append(batch, e)
}

// pingLocked appends a ping to batch.
func (o *Link[S]) pingLocked(batch []Entry[S]) []Entry[S] {
	o.lastPing, o.pinged = o.window.Ping(monotonic.Now()), o.sent.end
	return append(batch, Entry[S]{Kind: Ping, Frame: binary.BigEndian.AppendUint64(nil, o.lastPing)})
}

// lastLocked appends the close frame to batch, if that was not written yet.
func (o *Link[S]) lastLocked(batch []Entry[S]) []Entry[S] {
	if o.closing != nil {
		batch = append(batch, Entry[S]{Frame: o.closing, Kind: Close})
		o.closing = nil
	}
	return batch
}

// forgetLocked takes what was written off the books, and gives its memory back.
func (o *Link[S]) forgetLocked(written []Entry[S]) {
	given := 0
	for i := range written {
		if e := &written[i]; e.Kind == Message {
			o.size -= e.size()
			if e.size() > alwaysFits {
				o.large -= e.size()
			}
			given += e.Memory()
		}
	}
	if given == 0 {
		return
	}
	o.taken -= given
	o.account.Give(given)
	for i := range written {
		if e := &written[i]; e.Kind == Message {
			o.account.Recycle(e.Frame)
		}
	}
	clear(written)
	o.thinLocked()
}

// fail ends the outbox after an error of the socket. Its reader has a moment yet to learn why.
func (o *Link[S]) fail(unwritten []Entry[S]) {
	o.socket.Hurry()
	o.mu.Lock()
	defer o.mu.Unlock()
	o.closeLocked()
	o.aside = slices.DeleteFunc(unwritten, func(e Entry[S]) bool { return e.Kind != Message })
	o.stays, o.idle = false, true
	o.changed.Broadcast()
}

// pingSize is how long the payload of a numbered ping is, in bytes.
const pingSize = 8

// ring is a queue that counts what has passed through it.
type ring[T any] struct {
	places     []T // their number is a power of two
	begin, end uint64
}

func (r *ring[T]) len() int { return int(r.end - r.begin) }

func (r *ring[T]) push(v T) {
	if r.len() == len(r.places) {
		places := make([]T, max(16, 2*len(r.places)))
		for i := r.begin; i < r.end; i++ {
			places[i%uint64(len(places))] = r.places[i%uint64(len(r.places))]
		}
		r.places = places
	}
	r.places[r.end%uint64(len(r.places))] = v
	r.end++
}

func (r *ring[T]) first() *T { return &r.places[r.begin%uint64(len(r.places))] }

func (r *ring[T]) last() *T { return &r.places[(r.end-1)%uint64(len(r.places))] }

func (r *ring[T]) pop() (v T) {
	place := r.first()
	v, *place = *place, v
	if r.begin++; r.begin == r.end && len(r.places) > keptEntries {
		r.places = nil
	}
	return v
}

func (r *ring[T]) all() []T {
	all := make([]T, 0, r.len())
	for i := r.begin; i < r.end; i++ {
		all = append(all, r.places[i%uint64(len(r.places))])
	}
	return all
}
