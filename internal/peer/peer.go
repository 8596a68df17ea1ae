// Package peer is what both sides of the relay have in common, an agent's connection and a link to the server: a
// socket, or what takes its place, with its outbox. It counts what is written, tells who gives no sign of life any more, and
// answers who says goodbye.
package peer

import (
	"context"
	"errors"
	"sync/atomic"
	"time"

	"github.com/gorilla/websocket"

	"github.com/opampgateway/opampgateway/internal/monotonic"
	"github.com/opampgateway/opampgateway/internal/outbox"
	"github.com/opampgateway/opampgateway/internal/socket"
	"github.com/opampgateway/opampgateway/internal/telemetry"
)

// Outbox is what Peer needs of its outbox.
type Outbox interface {
	Reply(payload []byte)
	Drain(ctx context.Context)
}

// Socket is what Peer needs of what carries its messages.
type Socket[S any] interface {
	WriteBatch(batch []outbox.Entry[S]) (written int, err error)
	TryBatch(batch []outbox.Entry[S]) (written int, err error)
	Hurry()
	Close()
	Sweep() (quiet int)
}

// WebSocket is a Socket for entries of sender S.
type WebSocket[S any] struct{ *socket.Socket }

// WriteBatch writes to the socket.
func (w WebSocket[S]) WriteBatch(batch []outbox.Entry[S]) (written int, err error) {
	return socket.WriteBatch(w.Socket, batch)
}

// TryBatch writes to the socket what it takes at once.
func (w WebSocket[S]) TryBatch(batch []outbox.Entry[S]) (written int, err error) {
	return socket.TryBatch(w.Socket, batch)
}

// Peer is one connection whose entries have a sender S, wait in an outbox O, and are carried by C. Both are set once,
// before anybody else knows of it.
type Peer[S any, O Outbox, C Socket[S]] struct {
	Socket  C
	Outbox  O
	Relayed *telemetry.Direction // what is written to it

	messages, bytes atomic.Uint64 // that were written to it; whoever writes counts, so one at a time
}

// Written returns how many messages were handed to the socket, and their bytes.
func (p *Peer[S, O, C]) Written() (messages, bytes uint64) { return p.messages.Load(), p.bytes.Load() }

// WriteBatch writes to the socket; the outbox calls it.
func (p *Peer[S, O, C]) WriteBatch(batch []outbox.Entry[S]) (written int, err error) {
	written, err = p.Socket.WriteBatch(batch)
	p.count(batch[:written])
	return written, err
}

// TryBatch writes to the socket what it takes at once; the outbox calls it.
func (p *Peer[S, O, C]) TryBatch(batch []outbox.Entry[S]) (written int, err error) {
	written, err = p.Socket.TryBatch(batch)
	p.count(batch[:written])
	return written, err
}

// Hurry bounds what the connection may still take; the outbox calls it.
func (p *Peer[S, O, C]) Hurry() { p.Socket.Hurry() }

// Close ends the connection; the outbox calls it.
func (p *Peer[S, O, C]) Close() { p.Socket.Close() }

// Answer is for the reader whose reading has ended with err: a close frame of the other side is answered, for
// which it waits as long as ctx, and for a moment at most.
func (p *Peer[S, O, C]) Answer(ctx context.Context, err error) {
	code := CloseCode(err)
	if code == 0 {
		return
	}
	var payload []byte
	if code != websocket.CloseNoStatusReceived {
		payload = websocket.FormatCloseMessage(code, "") // RFC 6455, section 5.5.1
	}
	p.Outbox.Reply(payload)
	p.Outbox.Drain(ctx)
}

// CloseCode returns the code of the close frame with which reading has ended (RFC 6455, section 7.4); 0 if it did
// without one.
func CloseCode(err error) int {
	if closed, ok := errors.AsType[*websocket.CloseError](err); ok && closed.Code != websocket.CloseAbnormalClosure {
		return closed.Code
	}
	return 0
}

// Limits say after how many sweeps without a sign of life a connection is pinged, and after how many it is
// given up.
type Limits struct{ Ping, Close int }

// Sign is what a sweep finds.
type Sign int

// What a sweep finds.
const (
	// Alive is a peer that was heard of lately.
	Alive Sign = iota
	// Quiet is one that is to be pinged.
	Quiet
	// Silent is one that is given up.
	Silent
)

// Sweep tells whether there was a sign of life lately.
func (p *Peer[S, O, C]) Sweep(limits Limits) Sign {
	switch quiet := p.Socket.Sweep(); {
	case quiet >= limits.Close:
		return Silent
	case quiet >= limits.Ping:
		return Quiet
	}
	return Alive
}

// Handed counts messages that were handed over otherwise than by WriteBatch.
func (p *Peer[S, O, C]) Handed(batch []outbox.Entry[S]) { p.count(batch) }

// count counts messages that were handed to their socket. Of a batch, the first has waited the longest.
func (p *Peer[S, O, C]) count(batch []outbox.Entry[S]) {
	messages, bytes, first := 0, 0, int64(0)
	for i := range batch {
		if e := &batch[i]; e.Taken != 0 {
			if messages == 0 {
				first = e.Taken
			}
			messages++
			bytes += len(e.Frame)
		}
	}
	if messages == 0 {
		return
	}
	p.messages.Add(uint64(messages))
	p.bytes.Add(uint64(bytes))
	direction := p.Relayed
	direction.Relayed(messages, bytes)
	if direction.LatencyDue(first) {
		direction.Latency(time.Duration(monotonic.Now() - first))
	}
}
