// Package ending is how an agent's connection ends: one state, and one table of causes.
//
//	open ─▶ offended ─▶ closing ─▶ discarding ─▶ ended
//
// A connection moves to the right only, and may leave out steps. What offends is read no
// further and closed by a later sweep: an agent that is let in and closed at once would come
// back thousands of times a second. While closing, what waits for the agent is written, then a
// close frame, and its last words are still relayed. While discarding, they are read past: there
// is nowhere to take them.
package ending

import (
	"context"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/gorilla/websocket"

	"github.com/opampgateway/opampgateway/internal/monotonic"
	"github.com/opampgateway/opampgateway/internal/telemetry"
)

// Cause is why the gateway ends a connection.
type Cause struct {
	Reason telemetry.Reason // what went wrong; empty for nothing
	Counts bool             // the ending is counted under Reason; otherwise what led to it was, or nothing is
	Code   int              // of the close frame (RFC 6455, section 7.4); 0 for none
	Text   string           // of the close frame, and of the log
	Late   bool             // the connection offends, and is closed by a later sweep
	Told   bool             // the server is told that the agents there have left
}

// The causes. The server is not told of agents that may be elsewhere already, since they merely fell
// silent; that it refused itself; that a gateway below introduces again; or whose end that of
// all links tells it.
//
// An agent that is let go for no fault of its own, nor of its way here, gets no close frame: some clients
// take one for good and never come back. It sees the connection end, as when a server stops.
var (
	BadMessages    = &Cause{Reason: telemetry.ReasonBadFrame, Code: websocket.CloseInvalidFramePayloadData, Text: "too many unreadable messages", Late: true, Told: true}
	NoWebSocket    = &Cause{Reason: telemetry.ReasonBadFrame, Counts: true, Code: websocket.CloseProtocolError, Text: "violation of the WebSocket protocol", Late: true, Told: true}
	TooLarge       = &Cause{Reason: telemetry.ReasonTooLarge, Counts: true, Code: websocket.CloseMessageTooBig, Text: "message above max_message_size", Late: true, Told: true}
	ForeignConnect = &Cause{Reason: telemetry.ReasonForeignConnect, Counts: true, Code: websocket.ClosePolicyViolation, Text: "nobody is asked about agents here", Late: true, Told: true}
	Mute           = &Cause{Reason: telemetry.ReasonAgentMute, Counts: true, Code: websocket.ClosePolicyViolation, Text: "nothing said since the connection began", Told: true}
	Slow           = &Cause{Reason: telemetry.ReasonAgentSlow, Counts: true, Code: websocket.CloseTryAgainLater, Text: "agent reads too slowly", Told: true}
	MemoryFull     = &Cause{Reason: telemetry.ReasonMemoryFull, Counts: true, Code: websocket.CloseTryAgainLater, Text: "no progress while memory is used up", Told: true}
	Silent         = &Cause{Reason: telemetry.ReasonAgentSilent, Counts: true, Code: websocket.CloseGoingAway, Text: "no sign of life"}
	PollsMissed    = &Cause{Reason: telemetry.ReasonAgentMissedPolls, Counts: true, Text: "three polls missed", Told: true}
	GraceOver      = &Cause{Reason: telemetry.ReasonGraceOver, Counts: true, Text: "no connection to the server", Told: true}
	Refused        = &Cause{Reason: telemetry.ReasonAgentRefused, Counts: true, Code: websocket.ClosePolicyViolation, Text: "refused by the server"}
	LinkLost       = &Cause{Code: websocket.CloseServiceRestart, Text: "connection to the server was lost"}
	Shutdown       = &Cause{Text: "gateway is shutting down"}
)

// Causes is the table of all causes, for docs/metrics.md.
var Causes = []*Cause{
	BadMessages, NoWebSocket, TooLarge, ForeignConnect, Mute, Slow, MemoryFull, Silent, PollsMissed, GraceOver, Refused, LinkLost, Shutdown,
}

// delay is how long an offending connection is kept at least, and half of how long at most, but
// for the interval of the sweep.
const delay = 5 * time.Second

type phase uint8

const (
	open phase = iota
	offended
	closing
	discarding
	ended
)

// State is how far the ending of one connection has come. The zero value is that of an open one.
type State struct {
	// mu guards what follows. It is a leaf: nothing else is locked while it is held.
	mu     sync.Mutex
	phase  phase
	cause  *Cause
	at     int64              // offended: when it is to be closed; closing: since when
	moved  chan struct{}      // made by who waits for the end of an offence; closed when it is over
	giveUp context.CancelFunc // while the reader waits for others than its agent: ends that
}

// Offend notes that the connection is to be read no further, and closed later. It reports
// whether that is new: what is ending already stays as it is.
func (s *State) Offend(cause *Cause) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.phase != open {
		return false
	}
	s.phase, s.cause, s.at = offended, cause, monotonic.Now()+int64(delay+rand.N(delay))
	return true
}

// Close notes that the connection is being closed, and why unless it offended before; nil for no
// cause of ours. It reports whether that is new: then the caller closes it, with the cause returned.
func (s *State) Close(cause *Cause) (*Cause, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.phase >= closing {
		return s.cause, false
	}
	if s.cause == nil {
		s.cause = cause
	}
	s.at = monotonic.Now()
	s.moveLocked(closing)
	return s.cause, true
}

// Discard notes that what the agent still says cannot be taken anywhere.
func (s *State) Discard() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.phase < discarding {
		s.moveLocked(discarding)
	}
}

// End notes that the connection has ended, and returns why if that was the gateway's doing.
func (s *State) End() *Cause {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.moveLocked(ended)
	return s.cause
}

func (s *State) moveLocked(to phase) {
	s.phase = to
	if s.moved != nil {
		close(s.moved)
		s.moved = nil
	}
}

// Closing reports whether the gateway is ending the connection, or it has ended.
func (s *State) Closing() bool { return s.reached(closing) }

// Discards reports whether what the agent says is not to be relayed any more.
func (s *State) Discards() bool { return s.reached(discarding) }

// Ended reports whether the connection has ended.
func (s *State) Ended() bool { return s.reached(ended) }

func (s *State) reached(p phase) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.phase >= p
}

// Due returns the cause for which an offending connection is to be closed now; nil if it is not.
// The second result tells whether it offends at all.
func (s *State) Due() (*Cause, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.phase != offended {
		return nil, false
	}
	if monotonic.Now() < s.at {
		return nil, true
	}
	return s.cause, true
}

// AwaitClosing has the reader of an offending connection wait until that is closed. It does not
// wait for any other, and no longer than ctx.
func (s *State) AwaitClosing(ctx context.Context) {
	s.mu.Lock()
	if s.phase != offended {
		s.mu.Unlock()
		return
	}
	if s.moved == nil {
		s.moved = make(chan struct{})
	}
	moved := s.moved
	s.mu.Unlock()
	select {
	case <-moved:
	case <-ctx.Done():
	}
}

// Pause is for the reader to wait, in the context returned, for others than its agent; over is to
// be called afterwards. Meanwhile the agent's silence proves nothing.
func (s *State) Pause(parent context.Context) (ctx context.Context, over func()) {
	ctx, cancel := context.WithCancel(parent)
	s.mu.Lock()
	s.giveUp = cancel
	s.mu.Unlock()
	return ctx, func() {
		s.mu.Lock()
		s.giveUp = nil
		s.mu.Unlock()
		cancel()
	}
}

// Paused reports whether the reader waits for others than its agent. If the connection has been
// closing for longer than limit, the wait is ended.
func (s *State) Paused(limit time.Duration) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.giveUp == nil {
		return false
	}
	if s.phase >= closing && monotonic.Since(s.at) > limit {
		s.giveUp()
	}
	return true
}
