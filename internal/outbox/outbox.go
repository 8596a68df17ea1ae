// Package outbox holds what waits to be written to one socket: in order, and bounded in bytes.
//
// A frame handed to an outbox is not looked at again by the giver. There are two kinds:
//
//   - Of an agent's (Outbox), there are many, and mostly nothing waits. Whoever brings the first entry
//     writes it, if the socket takes it at once; a goroutine writes what it does not, and leaves
//     when nothing is left.
//   - Of a link's (Link), there are few, and many senders bring something at the same time. They take
//     turns; one goroutine writes, and stays.
package outbox

import (
	"context"
	"errors"
	"slices"
	"sync"

	"github.com/opampgateway/opampgateway/internal/memory"
)

var (
	// ErrFull means that the entry does not fit into what the outbox may hold.
	ErrFull = errors.New("outbox is full")
	// ErrClosed means that nothing more is taken: the socket has ended or is about to.
	ErrClosed = errors.New("outbox is closed")
)

// Kind is what an entry is on the WebSocket; the values are its opcodes (RFC 6455, section 5.2).
type Kind byte

const (
	// End is no frame: it ends the writing, without a word to the peer. Nothing follows it.
	End Kind = 0x0
	// Message is one binary message.
	Message Kind = 0x2
	// Close is a close frame; nothing follows it.
	Close Kind = 0x8
	// Ping asks the peer for a sign of life.
	Ping Kind = 0x9
	// Pong gives the peer its sign of life.
	Pong Kind = 0xA
)

// Entry is one frame with what has to be known about it until it is written.
type Entry[S any] struct {
	Frame []byte
	Kind  Kind
	// Sender is whom the frame came from, zero for the gateway's own.
	Sender S
	// Taken is when the frame was read from its sender, in nanoseconds of the process's own clock.
	Taken int64
	// Trial has a link's outbox write it between two pings, see Link.
	Trial bool
	// Alone has it do so only while no other is on trial there.
	Alone bool
	// Stale, when set, is asked right before the frame is written; a stale one is left out.
	Stale func() bool
}

// overhead is what an entry costs beyond its frame, so that a flood of tiny frames is bounded too.
const overhead = 128

func (e *Entry[S]) size() int { return len(e.Frame) + overhead }

// Memory is what the entry takes, in bytes.
func (e *Entry[S]) Memory() int { return cap(e.Frame) + overhead }

// Socket is what an outbox writes to.
type Socket[S any] interface {
	// WriteBatch writes the entries in order and flushes, under a deadline. It returns how
	// many were handed to the socket whole; fewer than all only with an error. It is
	// called by one goroutine at a time, and neither changes the batch nor keeps any of it.
	WriteBatch(batch []Entry[S]) (written int, err error)
	// Hurry bounds all that is still to be written and read to a moment. It never waits.
	Hurry()
	// Close ends the socket. It never waits, and a write in progress fails.
	Close()
}

// AgentSocket is what an agent's outbox writes to.
type AgentSocket[S any] interface {
	Socket[S]
	// TryBatch is WriteBatch as far as nothing has to wait. What it has not written, it may have
	// begun: the next WriteBatch begins with the same entries.
	TryBatch(batch []Entry[S]) (written int, err error)
}

// Outbox holds the entries for one agent's socket.
type Outbox[S any] struct {
	// Set once.
	socket  AgentSocket[S]
	limit   int
	account *memory.Account

	// mu guards what follows. It is never held while the socket is written to.
	mu      sync.Mutex
	queue   []Entry[S]  // waits to be written
	size    int         // of the queue and of the batch being written
	taken   int         // what they take, of the account
	closed  bool        // nothing more is taken
	writing bool        // somebody is the writer, and has something to write
	changed sync.Cond   // writing
	aside   []Entry[S]  // what a failed write, or Reply, left unwritten
	first   [1]Entry[S] // memory for a queue of one
}

// New returns an agent's outbox, for socket, that holds up to limit bytes, or one entry of any
// size. What it holds is counted in account. A frame is the outbox's own from when it is taken:
// once written, its memory is used again.
func New[S any](socket AgentSocket[S], limit int, account *memory.Account) *Outbox[S] {
	o := &Outbox[S]{socket: socket, limit: limit, account: account}
	o.changed.L, o.queue = &o.mu, o.first[:0]
	return o
}

// Try adds e unless the outbox is full or closed. It never waits.
func (o *Outbox[S]) Try(e Entry[S]) error {
	o.mu.Lock()
	switch {
	case o.closed:
		o.mu.Unlock()
		return ErrClosed
	case o.size > 0 && o.size+e.size() > o.limit:
		o.mu.Unlock()
		return ErrFull
	}
	o.queueLocked(e)
	if o.writing {
		o.mu.Unlock()
		return nil
	}
	o.writing = true
	batch := o.batchLocked(nil)
	o.mu.Unlock()
	o.writeNow(batch)
	return nil
}

// Close has what waits written, then a close frame with this payload, all in a moment, and
// takes nothing more. It never waits. The socket is left to its reader, which sees the
// peer's answer, or runs into the moment's end.
func (o *Outbox[S]) Close(payload []byte) { o.close(Entry[S]{Frame: payload, Kind: Close}) }

// End is Close without a close frame: after what waits, the peer sees the connection end.
func (o *Outbox[S]) End() { o.close(Entry[S]{Kind: End}) }

func (o *Outbox[S]) close(last Entry[S]) {
	o.mu.Lock()
	if o.closed {
		o.mu.Unlock()
		return
	}
	o.queueLocked(last)
	o.startLocked()
	o.closeLocked()
	o.mu.Unlock()
	o.socket.Hurry()
}

// Reply is Close for a peer that has itself said that it is closing: what waits is not
// written, since nobody will read it, but left for Abort to return.
func (o *Outbox[S]) Reply(payload []byte) {
	o.mu.Lock()
	if o.closed {
		o.mu.Unlock()
		return
	}
	o.aside, o.queue = o.queue, nil
	o.queueLocked(Entry[S]{Frame: payload, Kind: Close})
	o.startLocked()
	o.closeLocked()
	o.mu.Unlock()
	o.socket.Hurry()
}

// Drain waits until nothing is left to write, or ctx is done.
func (o *Outbox[S]) Drain(ctx context.Context) {
	stop := context.AfterFunc(ctx, func() {
		o.mu.Lock()
		defer o.mu.Unlock()
		o.changed.Broadcast()
	})
	defer stop()
	o.mu.Lock()
	defer o.mu.Unlock()
	for o.writing && ctx.Err() == nil {
		o.changed.Wait()
	}
}

// Abort closes the socket, takes nothing more and waits for the writer. It returns, in
// order, the entries that were not handed to the socket whole. Every outbox ends with it.
func (o *Outbox[S]) Abort() (unwritten []Entry[S]) {
	o.socket.Close()
	o.mu.Lock()
	defer o.mu.Unlock()
	o.closeLocked()
	for o.writing {
		o.changed.Wait()
	}
	unwritten = slices.Concat(o.aside, o.queue)
	o.account.Give(o.taken)
	o.aside, o.queue, o.size, o.taken = nil, nil, 0, 0
	return unwritten
}

// Memory returns what the outbox takes now, in bytes.
func (o *Outbox[S]) Memory() int {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.taken
}

func (o *Outbox[S]) queueLocked(e Entry[S]) {
	o.queue = append(o.queue, e)
	o.size += e.size()
	o.taken += e.Memory()
	o.account.Take(e.Memory())
}

// startLocked has what is queued written by a goroutine, unless there is a writer.
func (o *Outbox[S]) startLocked() {
	if !o.writing {
		o.writing = true
		go o.finish(o.batchLocked(nil), 0)
	}
}

func (o *Outbox[S]) closeLocked() {
	o.closed = true
	o.changed.Broadcast()
}

// writeNow is the writer for what the socket takes at once. The rest is for a goroutine.
func (o *Outbox[S]) writeNow(batch []Entry[S]) {
	n, err := o.socket.TryBatch(batch)
	if err != nil {
		o.fail(batch[n:])
		return
	}
	if n == len(batch) {
		batch, n = o.next(batch), 0
	}
	if batch != nil {
		go o.finish(batch, n)
	}
}

// finish is the writer as a goroutine, while there is something to write: it writes the rest of a batch of
// which n entries are written, and then what is queued. Abort waits for it.
func (o *Outbox[S]) finish(batch []Entry[S], n int) {
	for batch != nil {
		written, err := o.socket.WriteBatch(batch[n:])
		if err != nil {
			o.fail(batch[n+written:])
			return
		}
		batch, n = o.next(batch), 0
	}
}

// next makes room for what was written and returns all that waits now; nil tells the writer
// to leave. The two slices change places, so a busy outbox allocates nothing.
func (o *Outbox[S]) next(written []Entry[S]) []Entry[S] {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.forgetLocked(written)
	if len(o.queue) == 0 {
		o.writing = false
		o.changed.Broadcast()
		o.queue, o.first = o.first[:0], [1]Entry[S]{} // an idle one holds nothing
		return nil
	}
	return o.batchLocked(written)
}

// forgetLocked takes what was written off the books, and gives its memory back.
func (o *Outbox[S]) forgetLocked(written []Entry[S]) {
	if len(written) == 0 {
		return
	}
	given := 0
	for i := range written {
		o.size -= written[i].size()
		given += written[i].Memory()
	}
	o.taken -= given
	o.account.Give(given)
	for i := range written {
		o.account.Recycle(written[i].Frame)
	}
	clear(written)
}

// batchLocked takes all that is queued, and leaves the memory of what was written for a queue.
func (o *Outbox[S]) batchLocked(written []Entry[S]) []Entry[S] {
	batch := o.queue
	o.queue = written[:0]
	return batch
}

// fail ends the outbox after an error of the socket, which it closes: that wakes the reader,
// which cleans up.
func (o *Outbox[S]) fail(unwritten []Entry[S]) {
	o.socket.Close()
	o.mu.Lock()
	defer o.mu.Unlock()
	o.closeLocked()
	o.aside = slices.Concat(unwritten, o.aside)
	o.writing = false
	o.changed.Broadcast()
}
