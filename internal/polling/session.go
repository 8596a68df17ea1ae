// Package polling is an agent over plain HTTP as the relay sees it: a connection that only exists while the agent
// polls. Each such agent has a session, which takes the place of a socket:
//
//   - What a poll says is handed to the reader of the agent's connection, as if it came off a WebSocket. It waits for
//     that, so a reader that waits for others has the agent wait, too.
//   - What the relay writes waits for the next poll, in the agent's outbox, where it is bounded and counted. The
//     session takes one message out of it for each poll, and gives it up only when it is written to the agent.
//   - Nothing can be asked of the agent between two polls. It is there for as long as it does not miss three of them.
//
// The package knows HTTP no more than it knows agents: a poll is somebody who brings a message, and takes one.
package polling

import (
	"context"
	"errors"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/open-telemetry/opamp-go/protobufs"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"github.com/opampgateway/opampgateway/internal/monotonic"
	"github.com/opampgateway/opampgateway/internal/outbox"
	"github.com/opampgateway/opampgateway/internal/wire"
)

var (
	// ErrBusy means that what the agent has said before was not taken yet.
	ErrBusy = errors.New("an earlier message of the agent still waits")
	// ErrEnded means that the session has ended, or is about to.
	ErrEnded = errors.New("session has ended")
)

const (
	// missedPolls is how many polls an agent may miss.
	missedPolls = 3

	// lateness is how much later than usual a poll may come.
	lateness = 5 * time.Second

	// MaxInterval is the longest time between two polls that is learnt: beyond it an agent is as good as gone.
	MaxInterval = time.Hour

	// memoryOfGaps is for how long the longest time between two polls is remembered, up to twice: polls come sooner
	// when there is something to say.
	memoryOfGaps = time.Hour

	// moment is how long the last words for an agent may take that is polling when its session ends.
	moment = time.Second
)

// Session is the connection of one agent over plain HTTP, for the entries of sender S.
type Session[S any] struct {
	// Set once.
	said    chan *Message // from a poll to the reader
	answers chan *Answer  // from the writer to a poll
	closing chan struct{} // closed when nothing more is taken from the agent
	ended   chan struct{} // closed when nothing more is given to it either

	// Owned by the reader.
	held *Message // that it has read last

	// Owned by the writer.
	capabilities uint64 // of the server, as the agent was told last
	told         bool   // it was told of some

	// Shared.
	received atomic.Uint64 // bytes of messages
	waits    atomic.Int64  // since when a message waits for a poll, of the monotonic clock; 0 for none
	offered  atomic.Int64  // the interval that the server has offered, in nanoseconds; 0 for none

	// mu guards what follows.
	mu        sync.Mutex
	poll      *poll         // the last, while it waits
	last      int64         // when a poll was last there, of the monotonic clock
	gap       time.Duration // the longest between two polls lately
	gapBefore time.Duration // the same, before
	gapSince  int64         // since when lately is
	awaited   chan struct{} // closed at the next poll; nil while nobody waits for one
	timer     *time.Timer   // ends a session that is closing
}

// poll is one of the agent's requests, while it is answered.
type poll struct {
	over chan struct{} // closed when the next has taken its place
}

// NewSession returns the session of an agent whose first poll is there. before is how long it had not polled when its
// last session ended for that; 0 for an agent that is not remembered.
func NewSession[S any](before time.Duration) *Session[S] {
	now := monotonic.Now()
	return &Session[S]{
		said: make(chan *Message), answers: make(chan *Answer), closing: make(chan struct{}), ended: make(chan struct{}),
		last: now, gapSince: now, gap: min(before, MaxInterval),
	}
}

// Message is what an agent says in a poll, as a frame. Whoever has it at last calls Done.
type Message struct {
	Frame []byte
	done  func()
}

// NewMessage returns a message of which done gives the memory back; nil for none that is counted.
func NewMessage(frame []byte, done func()) *Message { return &Message{Frame: frame, done: done} }

// Done gives its memory back. The frame may be somebody else's by then.
func (m *Message) Done() {
	if m.done != nil {
		m.done()
	}
}

// Answer is what there is to say to an agent in answer to a poll. Whoever has it has to call Written.
type Answer struct {
	Frame   []byte
	written chan bool // buffered
}

// Written tells whether the answer was written. If not, the next poll gets it; if so, the frame is not to be looked at
// any more.
func (a *Answer) Written(ok bool) { a.written <- ok }

// Poll hands m to the reader, for which it waits as long as patience, and waits for an answer as long as wait; nil
// means that there was none. With an error, m is still the caller's. A poll that comes while another waits takes its
// place: of that, the agent expects no answer any more.
func (s *Session[S]) Poll(ctx context.Context, m *Message, patience, wait time.Duration) (*Answer, error) {
	p := s.arrive()
	defer s.leave(p)
	size := len(m.Frame)
	if s.Closing() { // what the reader takes then may be thrown away
		return nil, ErrEnded
	}
	impatient := time.NewTimer(patience)
	defer impatient.Stop()
	select {
	case s.said <- m:
		s.received.Add(uint64(size))
	case <-impatient.C:
		return nil, ErrBusy
	case <-s.closing:
		return nil, ErrEnded
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	select {
	case a := <-s.answers: // even if it is not to be waited for
		return a, nil
	default:
	}
	over := time.NewTimer(wait)
	defer over.Stop()
	select {
	case a := <-s.answers:
		return a, nil
	case <-over.C:
	case <-p.over:
	case <-s.ended:
	case <-ctx.Done():
	}
	return nil, nil
}

// arrive notes that the agent polls.
func (s *Session[S]) arrive() *poll {
	p := &poll{over: make(chan struct{})}
	now := monotonic.Now()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.poll != nil {
		close(s.poll.over)
	}
	if time.Duration(now-s.gapSince) > memoryOfGaps {
		s.gapBefore, s.gap, s.gapSince = s.gap, 0, now
	}
	s.gap = min(MaxInterval, max(s.gap, time.Duration(now-s.last)))
	s.poll, s.last = p, now
	if s.awaited != nil {
		close(s.awaited)
		s.awaited = nil
	}
	return p
}

func (s *Session[S]) leave(p *poll) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.last = monotonic.Now()
	if s.poll == p {
		s.poll = nil
	}
}

// polled reports whether a poll waits for an answer.
func (s *Session[S]) polled() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.poll != nil
}

// intervalLocked is how long the agent may be from one poll to the next, at least the time given.
func (s *Session[S]) intervalLocked(least time.Duration) time.Duration {
	return max(least, s.gap, s.gapBefore, time.Duration(s.offered.Load()))
}

// Overdue reports whether the agent has missed its last polls, which are at least so far apart, and since when there was
// none, of the monotonic clock.
func (s *Session[S]) Overdue(least time.Duration) (since int64, overdue bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.last, s.poll == nil && monotonic.Since(s.last) >= missedPolls*s.intervalLocked(least)
}

// Due returns how long the agent has until its next poll is late; it may be so already.
func (s *Session[S]) Due(least time.Duration) time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.intervalLocked(least) + lateness - monotonic.Since(s.last)
}

// Read returns what the agent says next. Its memory stays counted until the next call, or Release.
func (s *Session[S]) Read() ([]byte, error) {
	s.Release()
	select {
	case s.held = <-s.said:
		return s.held.Frame, nil
	case <-s.ended:
		return nil, net.ErrClosed
	}
}

// Release counts the message that was read last no longer.
func (s *Session[S]) Release() {
	if s.held != nil {
		s.held.Done()
		s.held = nil
	}
}

// WriteBatch has each message wait for a poll, and returns when the last was written; see outbox.Socket.
func (s *Session[S]) WriteBatch(batch []outbox.Entry[S]) (written int, err error) {
	for i := range batch {
		e := &batch[i]
		if s.settles(e) {
			continue
		}
		if !s.hand(e.Frame) {
			return i, net.ErrClosed
		}
		s.learn(e.Frame)
	}
	return len(batch), nil
}

// TryBatch deals with what no poll is needed for; see outbox.AgentSocket.
func (s *Session[S]) TryBatch(batch []outbox.Entry[S]) (written int, err error) {
	for written < len(batch) && s.settles(&batch[written]) {
		written++
	}
	return written, nil
}

// settles deals with an entry that need not wait for a poll: what says nothing is not worth one of its own, when the
// agent waits for nothing. It reports false for any other.
func (s *Session[S]) settles(e *outbox.Entry[S]) bool {
	switch {
	case e.Stale != nil && e.Stale():
		return true
	case e.Kind == outbox.Message:
		return !s.says(e.Frame) && !s.polled()
	case e.Kind == outbox.End, e.Kind == outbox.Close:
		s.Close()
	}
	return true // a ping, to which there is no answer; see Await
}

// hand has a message wait for a poll until it is written, and reports whether it was.
func (s *Session[S]) hand(frame []byte) bool {
	s.waits.Store(monotonic.Now())
	defer s.waits.Store(0)
	for {
		a := &Answer{Frame: frame, written: make(chan bool, 1)}
		select {
		case s.answers <- a:
		case <-s.ended:
			return false
		}
		if <-a.written {
			return true
		}
	}
}

// The fields of ServerToAgent that a session reads.
const (
	fieldInstanceUID        = 1
	fieldConnectionSettings = 4
	fieldFlags              = 6
	fieldCapabilities       = 7
)

// says reports whether there is anything in a message that the agent has not heard: servers answer each message, mostly
// with nothing but the instance_uid, and their capabilities.
func (s *Session[S]) says(frame []byte) bool {
	for rest := body(frame); len(rest) > 0; {
		number, kind, n := protowire.ConsumeTag(rest)
		if n < 0 {
			return true
		}
		rest = rest[n:]
		switch {
		case number == fieldInstanceUID && kind == protowire.BytesType:
			_, n = protowire.ConsumeBytes(rest)
		case (number == fieldFlags || number == fieldCapabilities) && kind == protowire.VarintType:
			var value uint64
			value, n = protowire.ConsumeVarint(rest)
			if number == fieldFlags && value != 0 || number == fieldCapabilities && (!s.told || value != s.capabilities) {
				return true
			}
		default:
			return true
		}
		if n < 0 {
			return true
		}
		rest = rest[n:]
	}
	return false
}

// learn notes what an agent was told that concerns its polls.
func (s *Session[S]) learn(frame []byte) {
	for rest := body(frame); len(rest) > 0; {
		number, kind, n := protowire.ConsumeTag(rest)
		if n < 0 {
			return
		}
		rest = rest[n:]
		if number == fieldCapabilities && kind == protowire.VarintType {
			if value, n := protowire.ConsumeVarint(rest); n > 0 {
				s.capabilities, s.told = value, true
			}
		}
		if n = protowire.ConsumeFieldValue(number, kind, rest); n < 0 {
			return
		}
		if number == fieldConnectionSettings {
			s.learnInterval(frame)
		}
		rest = rest[n:]
	}
}

// learnInterval notes how often the server wants to hear of the agent.
func (s *Session[S]) learnInterval(frame []byte) {
	var offers protobufs.ConnectionSettingsOffers
	if proto.Unmarshal(wire.Embedded(frame, fieldConnectionSettings), &offers) != nil {
		return
	}
	if seconds := offers.GetOpamp().GetHeartbeatIntervalSeconds(); seconds > 0 {
		s.offered.Store(int64(min(seconds, uint64(MaxInterval/time.Second))) * int64(time.Second))
	}
}

// body returns a frame without its header, which plain HTTP has not.
func body(frame []byte) []byte {
	if len(frame) > 0 && frame[0] == 0 {
		return frame[1:]
	}
	return frame
}

// Body returns the answer as it stands in a response.
func (a *Answer) Body() []byte { return body(a.Frame) }

// Hurry has the session end in a moment, or at once if there is no poll that could hear anything more. It never waits.
func (s *Session[S]) Hurry() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.stopTakingLocked()
	if s.poll == nil {
		s.closeLocked()
	} else if s.timer == nil {
		s.timer = time.AfterFunc(moment, s.Close)
	}
}

// Close ends the session. It never waits.
func (s *Session[S]) Close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.stopTakingLocked()
	s.closeLocked()
}

func (s *Session[S]) stopTakingLocked() { closeOnce(s.closing) }

func (s *Session[S]) closeLocked() {
	closeOnce(s.ended)
	if s.timer != nil {
		s.timer.Stop()
	}
}

// closeOnce closes a channel that only its caller closes, and nobody sends to.
func closeOnce(c chan struct{}) {
	select {
	case <-c:
	default:
		close(c)
	}
}

// Closing reports whether the session takes nothing more.
func (s *Session[S]) Closing() bool {
	select {
	case <-s.closing:
		return true
	default:
		return false
	}
}

// Await returns a channel that is closed at the next poll, or never. All who wait share it.
func (s *Session[S]) Await() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.awaited == nil {
		s.awaited = make(chan struct{})
	}
	return s.awaited
}

// Stalled returns how much longer than usual something has been waiting for a poll.
func (s *Session[S]) Stalled() time.Duration {
	since := s.waits.Load()
	if since == 0 {
		return 0
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return max(0, monotonic.Since(max(since, s.last))-s.intervalLocked(0))
}

// Received returns how many bytes of messages have come.
func (s *Session[S]) Received() uint64 { return s.received.Load() }

// PingSent does nothing: there is no answer to a ping, see Await.
func (s *Session[S]) PingSent() {}

// Unanswered returns false: there is no ping.
func (s *Session[S]) Unanswered() bool { return false }

// Excuse does nothing: silence between two polls proves nothing anyway, see Overdue.
func (s *Session[S]) Excuse() {}

// Sweep returns 0: an agent between two polls is not quiet, see Overdue.
func (s *Session[S]) Sweep() (quiet int) { return 0 }
