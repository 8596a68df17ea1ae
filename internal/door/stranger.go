package door

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"sync/atomic"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/opampgateway/opampgateway/internal/fair"
	"github.com/opampgateway/opampgateway/internal/forwarded"
	"github.com/opampgateway/opampgateway/internal/socket"
	"github.com/opampgateway/opampgateway/internal/telemetry"
)

const (
	// answerTimeout bounds the writing of an answer of the door's own, which there always is room for.
	answerTimeout = time.Second

	// A connection closed with something unread is reset, which may take back the answer before it is
	// read. So what a stranger still sends is read, and thrown away, for as long as he may need to
	// hear that he was answered.
	lingerTimeout = 500 * time.Millisecond
	// lingerSize bounds that in bytes.
	lingerSize = 256 << 10
)

// stranger is the connection of a stranger, as the HTTP server sees it.
type stranger struct {
	// Set once.
	door    *Door
	place   *place             // the connection itself
	below   *socket.Conn       // over that
	secure  *tls.Conn          // over that; nil where there is no TLS
	conn    net.Conn           // secure, or below
	due     time.Time          // when the head has to be there
	proxies *forwarded.Proxies // one of which he has come by; nil if by none

	// Guarded by place.mu.
	address netip.Prefix    // who holds a place
	pool    *fair.ByAddress // nil if there was no place at all

	// Set once, or when the proxy has spoken: then by who reads, or by the handler.
	excess string   // why there is no place for him; empty if there is
	client net.Addr // from where he comes by the proxy's word; nil without

	// Owned by who reads: the HTTP server sees to it that there is one at a time.
	greeted bool // the proxy has spoken, if there is one that does so before him
	head    head
	held    pieces // of the head, while there is more to come, and until the server has them
	shaken  bool   // TLS has been tried
	clocked bool   // there is a deadline for the head
	ended   bool   // nothing more is read

	// Owned by the handler.
	timed bool // the server has a deadline for its answer

	// Shared.
	early    atomic.Bool // something came behind the head
	letIn    atomic.Bool // it may send bodies, and further requests
	answered atomic.Bool // at least in part
}

// secured is a stranger on TLS.
type secured struct{ *stranger }

// ConnectionState shakes hands first, and waits for the request's head: the HTTP server asks for it, in
// the connection's own goroutine, before it makes its buffers. Who is slow costs no more than his own.
func (s secured) ConnectionState() tls.ConnectionState {
	if s.shake() {
		s.readHead()
	}
	return s.secure.ConnectionState()
}

func (s *stranger) self() *stranger { return s }

// Read returns nothing of the request before all of its head is there, within the limits. After the
// answer there is nothing more to read: one request is all that a stranger has.
func (s *stranger) Read(b []byte) (int, error) {
	switch {
	case s.letIn.Load() && !s.ended:
		if s.held.first != nil {
			return s.held.take(b), nil
		}
		return s.conn.Read(b)
	case s.ended, s.answered.Load(): // the server may still be writing: all that ends is the reading
		return 0, io.EOF
	case !s.shake():
		return 0, io.EOF
	case s.held.first != nil && s.head.done:
		return s.held.take(b), nil
	case !s.head.done:
		return s.readHeadInto(b)
	}
	n, err := s.conn.Read(b)
	if n > 0 {
		s.early.Store(true)
	}
	return n, err
}

// readHead keeps all of the head, until it is there or refused.
func (s *stranger) readHead() {
	for !s.head.done && !s.ended {
		s.held.fill(s.hear)
	}
}

// readHeadInto mostly finds all of the head in b, and keeps nothing.
func (s *stranger) readHeadInto(b []byte) (int, error) {
	for {
		n := s.hear(b)
		switch {
		case s.ended:
			return 0, io.EOF
		case s.head.done && s.held.first == nil:
			return n, nil
		case s.head.done:
			s.held.keep(b[:n])
			return s.held.take(b), nil
		}
		s.held.keep(b[:n])
	}
}

// hear reads some of the head.
func (s *stranger) hear(b []byte) int {
	if !s.clocked { // by a server without a deadline of its own
		_ = s.SetReadDeadline(s.due) // an error comes again when it is read
	}
	n, err := s.conn.Read(b)
	if n > 0 {
		s.look(b[:n])
	}
	if err != nil && !s.head.done && !s.ended {
		s.leave(err)
	}
	return n
}

// look watches the head go by. What the HTTP server is not to see is answered.
func (s *stranger) look(b []byte) {
	if !s.head.begun() && b[0] == recordTypeHandshake && s.secure == nil {
		s.log(zap.WarnLevel, "a peer talks TLS to this listener, which has none: give the agent a ws:// endpoint, or the listener a certificate (listener::tls)")
		s.refuse(s.conn, &Refusal{
			Status: http.StatusBadRequest, Outcome: telemetry.OutcomeBadRequest,
			Text: "this listener has no TLS",
		})
		return
	}
	behind, v := s.head.look(b)
	if forwarded.Begins(s.head.start[:s.head.seen]) {
		s.refuseProxyProtocol(s.conn)
		return
	}
	switch v {
	case verdictUnfinished:
	case verdictDone:
		if s.head.http2() {
			s.log(zap.WarnLevel, "a peer talks HTTP/2 (OTLP?) to this listener, which is for OpAMP agents: they connect by WebSocket, on HTTP/1.1")
			s.refuse(s.conn, &Refusal{
				Status: http.StatusHTTPVersionNotSupported, Outcome: telemetry.OutcomeBadRequest,
				Text: "this is an OpAMP gateway: agents connect to it by WebSocket, on HTTP/1.1",
			})
			return
		}
		if behind > 0 {
			s.early.Store(true)
		}
	case verdictLongRequestLine:
		s.refuseHead(http.StatusRequestURITooLong, fmt.Sprintf("the request line is longer than %d bytes", maxRequestLine))
	case verdictTooManyLines:
		s.refuseHead(http.StatusRequestHeaderFieldsTooLarge,
			fmt.Sprintf("the request has more than %d headers, see agents::max_request_headers", s.head.maxLines))
	case verdictTooLarge:
		s.refuseHead(http.StatusRequestHeaderFieldsTooLarge,
			fmt.Sprintf("the request's headers are larger than %d bytes, see agents::max_request_header_size", s.head.maxSize))
	}
}

// recordTypeHandshake is the first byte of TLS (RFC 8446, section 5.1).
const recordTypeHandshake = 0x16

// refuseHead answers a request of which the rest may still be on its way.
func (s *stranger) refuseHead(status int, text string) {
	s.log(zap.InfoLevel, "a request is refused", zap.Int("http.response.status_code", status), zap.String("reason", text))
	s.refuse(s.conn, &Refusal{Status: status, Text: text, Outcome: telemetry.OutcomeBadRequest})
}

// refuse answers, on conn, whom the HTTP server never sees.
func (s *stranger) refuse(conn net.Conn, r *Refusal) {
	s.door.turnedAway(r.Outcome)
	s.answer(conn, r, true)
	s.end(true)
}

// answer is the last that is said. An error means that the stranger has left.
func (s *stranger) answer(conn net.Conn, r *Refusal, withText bool) {
	s.answered.Store(true)
	_ = s.below.SetWriteDeadline(time.Now().Add(answerTimeout))
	_, _ = conn.Write(r.format(withText))
}

// end has nothing more be read but for what comes while the stranger has not heard, if that may be.
func (s *stranger) end(linger bool) {
	s.ended, s.held = true, pieces{}
	if !linger {
		return
	}
	_ = s.CloseWrite()
	_ = s.below.SetReadDeadline(time.Now().Add(lingerTimeout))
	b := make([]byte, 1<<10)
	for n := 0; n < lingerSize; {
		m, err := s.below.Read(b)
		if err != nil {
			return
		}
		n += m
	}
}

// leave is for a stranger that has gone, or run out of time, before his request was there. A probe
// comes like that every few seconds, and is nothing to talk about.
func (s *stranger) leave(err error) {
	if s.head.begun() && errors.Is(err, os.ErrDeadlineExceeded) {
		r := &Refusal{Status: http.StatusRequestTimeout, Text: "the request did not arrive in time", Outcome: telemetry.OutcomeBadRequest}
		s.log(zap.InfoLevel, "a request is refused", zap.Int("http.response.status_code", r.Status), zap.String("reason", r.Text))
		s.door.turnedAway(r.Outcome)
		s.answer(s.conn, r, true)
	} else {
		s.log(zap.DebugLevel, "a peer has left before it asked for anything", zap.Error(err))
	}
	s.end(false)
}

// shake shakes hands, where there is TLS, and reports whether the stranger can be heard.
func (s *stranger) shake() bool {
	s.greet()
	if s.secure == nil || s.shaken || s.ended {
		return !s.ended
	}
	s.shaken, s.clocked = true, true
	err := s.below.SetDeadline(s.due)
	if err == nil {
		s.place.shaking.Store(true)
		err = s.secure.HandshakeContext(context.Background()) // the deadline ends it
		s.place.shaking.Store(false)
	}
	var plain tls.RecordHeaderError
	var network *net.OpError
	switch {
	case err == nil:
		return true
	case errors.As(err, &plain) && plain.Conn != nil && forwarded.Begins(plain.RecordHeader[:]):
		s.refuseProxyProtocol(s.below)
	case errors.As(err, &plain) && plain.Conn != nil && looksLikeHTTP(plain.RecordHeader):
		s.log(zap.WarnLevel, "a peer talks plain HTTP to this listener, which has TLS: give the agent a wss:// endpoint")
		s.refuse(s.below, &Refusal{
			Status: http.StatusBadRequest, Outcome: telemetry.OutcomeBadRequest,
			Text: "this listener has TLS: plain HTTP was sent to it, use wss://",
		})
	case errors.Is(err, os.ErrDeadlineExceeded) && s.place.heard:
		s.failed(err)
		s.end(false)
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, net.ErrClosed),
		errors.As(err, &network) && (network.Op == "read" || network.Op == "write"):
		s.leave(err)
	default:
		s.failed(err)
		s.end(true) // or the alert is lost that tells the peer why
	}
	return false
}

// failed tells of a TLS handshake.
func (s *stranger) failed(err error) {
	s.log(zap.WarnLevel, "a peer's TLS handshake failed", zap.Error(err))
	s.door.turnedAway(telemetry.OutcomeBadRequest)
}

// looksLikeHTTP reports whether what should be the header of a TLS record is the begin of a method.
func looksLikeHTTP(header [5]byte) bool {
	for _, b := range header[:3] {
		if b < 'A' || b > 'Z' {
			return false
		}
	}
	return true
}

func (s *stranger) log(level zapcore.Level, text string, fields ...zap.Field) {
	if entry := s.door.log.Check(level, text); entry != nil {
		entry.Write(append(fields, clientAddress(s))...)
	}
}

// Write is for the HTTP server's answer.
func (s *stranger) Write(b []byte) (int, error) {
	if !s.answered.Swap(true) && !s.timed {
		if err := s.conn.SetWriteDeadline(time.Now().Add(s.door.limits.Load().Timeout)); err != nil {
			return 0, err
		}
	}
	return s.conn.Write(b)
}

// CloseWrite says that nothing more will be written.
func (s *stranger) CloseWrite() error {
	if s.secure != nil {
		_ = s.secure.CloseWrite() // an error means that the handshake, or the connection, has ended
	}
	_ = s.place.CloseWrite() // where that can be said
	return nil
}

// Close ends the connection, and gives its place back.
func (s *stranger) Close() error { return s.conn.Close() }

// LocalAddr is that of net.Conn.
func (s *stranger) LocalAddr() net.Addr { return s.place.LocalAddr() }

// RemoteAddr is that of net.Conn. The HTTP server asks for it before anything is read, so it takes the connection's.
func (s *stranger) RemoteAddr() net.Addr {
	if s.client != nil {
		return s.client
	}
	return s.place.RemoteAddr()
}

// SetDeadline is that of net.Conn.
func (s *stranger) SetDeadline(t time.Time) error {
	return errors.Join(s.SetReadDeadline(t), s.SetWriteDeadline(t))
}

// SetReadDeadline is that of net.Conn, but nothing gives a stranger more time for the head of his
// request than he has.
func (s *stranger) SetReadDeadline(t time.Time) error {
	if !s.head.done {
		s.clocked = true
		if t.IsZero() || t.After(s.due) {
			t = s.due
		}
	}
	return s.conn.SetReadDeadline(t)
}

// SetWriteDeadline is that of net.Conn.
func (s *stranger) SetWriteDeadline(t time.Time) error {
	s.timed = !t.IsZero()
	return s.conn.SetWriteDeadline(t)
}
