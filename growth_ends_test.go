package opampgateway

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha1"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/open-telemetry/opamp-go/protobufs"
	"github.com/stretchr/testify/require"
	"go.opentelemetry.io/collector/component/componenttest"
	"go.opentelemetry.io/collector/extension/extensiontest"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"

	"github.com/opampgateway/opampgateway/internal/gatewaytest"
	"github.com/opampgateway/opampgateway/internal/metadata"
	"github.com/opampgateway/opampgateway/internal/telemetry"
)

// What growth_test.go puts around a gateway: agents and a server that cost next to nothing, where
// those of gatewaytest have goroutines, buffers, books and a WebSocket library. They have no
// goroutine: what the gateway writes is dealt with by the writer, and what it reads is made up as
// it is read. Deadlines in the future never come.

// fleet is a gateway with many agents before it and a server behind it.
type fleet struct {
	*gateway
	tb     testing.TB
	stop   func() // ends it
	agents []*agentEnd
	silent atomic.Bool // the server hears messages, and answers none

	// done has a token for whatever was begun: an agent was let in, a frame has reached its agent,
	// the server knows that an agent has left or, while it is silent, what an agent said.
	done chan struct{}

	mu    sync.Mutex // guards what follows
	links []*serverEnd
	named uint64 // agents that got a UID

	knocks chan net.Conn // for the gateway to accept
	closed chan struct{}
	close  sync.Once
}

// newFleet starts a gateway whose links are up, without agents yet.
func newFleet(tb testing.TB) *fleet {
	tb.Helper()
	f := &fleet{tb: tb, done: make(chan struct{}, 1<<17), knocks: make(chan net.Conn, inFlight), closed: make(chan struct{})}
	cfg := createDefaultConfig().(*Config)
	cfg.Server.Endpoint = "ws://" + serverAddress + "/v1/opamp"
	cfg.Server.KeepAlive = KeepAliveConfig{Interval: time.Hour, Timeout: 2 * time.Hour} // it comes on top of what is measured
	cfg.Agents.KeepAlive = cfg.Server.KeepAlive
	cfg.Agents.MaxConnections, cfg.MaxBufferedSize = 200_000, 1<<30 // for the largest fleet
	set := extensiontest.NewNopSettings(metadata.Type)
	meters := sdkmetric.NewMeterProvider(sdkmetric.WithReader(sdkmetric.NewManualReader()))
	set.MeterProvider = meters
	tel, err := telemetry.New(set.TelemetrySettings)
	require.NoError(tb, err)
	f.gateway, err = startGateway(context.Background(), cfg, set, tel, componenttest.NewNopHost(), f, f.dial)
	require.NoError(tb, err)
	f.stop = func() {
		f.shutdown(context.Background())
		tel.Shutdown()
		_ = meters.Shutdown(context.Background())
	}
	for up := 0; up < cfg.Server.Connections; {
		f.pool.mu.Lock()
		var changed <-chan struct{}
		up, changed = f.pool.count, f.pool.changed
		f.pool.mu.Unlock()
		if up < cfg.Server.Connections {
			<-changed
		}
	}
	return f
}

// grow connects agents until there are so many. Each speaks once, so that it can be found.
func (f *fleet) grow(agents int) {
	var seats []int
	for seat := len(f.agents); seat < agents; seat++ {
		seats = append(seats, seat)
	}
	f.agents = append(make([]*agentEnd, 0, agents), f.agents...)[:agents] // no larger than it has to be
	f.fill(seats)
}

// leave has agents leave without a goodbye, until the server knows.
func (f *fleet) leave(seats []int) {
	w := window{f: f}
	for _, seat := range seats {
		w.begin()
		f.agents[seat].leave()
	}
	w.drain()
}

// fill has other agents take the seats of those that have left.
func (f *fleet) fill(seats []int) {
	w := window{f: f}
	for _, seat := range seats {
		w.begin()
		f.admit(seat)
	}
	w.drain()
	f.greet(seats)
}

// admit has a new agent ask to be let in.
func (f *fleet) admit(seat int) {
	f.agents[seat] = f.newAgent()
	f.knocks <- f.agents[seat]
}

// greet has agents speak and get an answer.
func (f *fleet) greet(seats []int) {
	w := window{f: f}
	for _, seat := range seats {
		w.begin()
		f.agents[seat].say()
	}
	w.drain()
}

// window bounds how much is under way at a time.
type window struct {
	f        *fleet
	underWay int
}

// inFlight is how much that is: as much as keeps the gateway busy, and lets it write several
// frames at once as it does when it is.
const inFlight = 64

// begin waits until something more may be under way.
func (w *window) begin() {
	if w.underWay == inFlight {
		<-w.f.done
		return
	}
	w.underWay++
}

// drain waits until nothing is.
func (w *window) drain() {
	for ; w.underWay > 0; w.underWay-- {
		<-w.f.done
	}
}

// Accept is that of net.Listener.
func (f *fleet) Accept() (net.Conn, error) {
	select {
	case conn := <-f.knocks:
		return conn, nil
	case <-f.closed:
		return nil, net.ErrClosed
	}
}

// Close is that of net.Listener.
func (f *fleet) Close() error {
	f.close.Do(func() { close(f.closed) })
	return nil
}

// Addr is that of net.Listener.
func (f *fleet) Addr() net.Addr { return &net.TCPAddr{} }

// dial connects a link to the server.
func (f *fleet) dial(context.Context, string, string) (net.Conn, error) {
	s := &serverEnd{lightEnd: lightEnd{fleet: f}}
	s.changed.L = &s.mu
	f.mu.Lock()
	defer f.mu.Unlock()
	f.links = append(f.links, s)
	return s, nil
}

// lightEnd is what the gateway's connections to an agent and to the server have in common.
type lightEnd struct {
	fleet *fleet

	mu      sync.Mutex
	changed sync.Cond // wakes the reader
	expired bool      // so that reading fails
	left    bool      // the other side will say nothing more
	closed  bool      // by the gateway
}

// errLocked returns why nothing can be read; nil if nothing is there yet.
func (e *lightEnd) errLocked() error {
	switch {
	case e.closed:
		return net.ErrClosed
	case e.expired:
		return os.ErrDeadlineExceeded
	case e.left:
		return io.EOF
	}
	return nil
}

func (e *lightEnd) set(what *bool, value bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	*what = value
	e.changed.Broadcast()
}

// Close is that of net.Conn.
func (e *lightEnd) Close() error {
	e.set(&e.closed, true)
	return nil
}

// SetReadDeadline is that of net.Conn, for deadlines that have passed. net/http ends its own reading so.
func (e *lightEnd) SetReadDeadline(t time.Time) error {
	e.set(&e.expired, !t.IsZero() && time.Until(t) <= 0)
	return nil
}

// SetDeadline is that of net.Conn.
func (e *lightEnd) SetDeadline(t time.Time) error { return e.SetReadDeadline(t) }

// SetWriteDeadline is that of net.Conn.
func (e *lightEnd) SetWriteDeadline(time.Time) error { return nil }

// LocalAddr is that of net.Conn.
func (e *lightEnd) LocalAddr() net.Addr { return &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 4320} }

// RemoteAddr is that of net.Conn.
func (e *lightEnd) RemoteAddr() net.Addr {
	return &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 50000}
}

// agentEnd is the gateway's connection to an agent, with the agent.
type agentEnd struct {
	lightEnd
	uid   [16]byte
	letIn atomic.Bool // its request was granted

	// Guarded by mu.
	asked bool // the request has been read
	due   int  // messages that it wants to send
	sent  int  // bytes of the request, or of the first of these messages
}

func (f *fleet) newAgent() *agentEnd {
	a := &agentEnd{lightEnd: lightEnd{fleet: f}}
	a.changed.L = &a.mu
	f.mu.Lock()
	defer f.mu.Unlock()
	f.named++
	binary.BigEndian.PutUint64(a.uid[:], f.named*0x9e3779b97f4a7c15) // spread as UUIDs are
	binary.BigEndian.PutUint64(a.uid[8:], f.named)
	return a
}

// say sends a message.
func (a *agentEnd) say() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.due++
	a.changed.Signal()
}

// leave ends the connection without a goodbye.
func (a *agentEnd) leave() { a.set(&a.left, true) }

// Read is that of net.Conn.
func (a *agentEnd) Read(b []byte) (int, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for {
		if err := a.errLocked(); err != nil {
			return 0, err
		}
		switch {
		case !a.asked:
			n := copy(b, upgradeRequest[a.sent:])
			if a.sent += n; a.sent == len(upgradeRequest) {
				a.asked, a.sent = true, 0
			}
			return n, nil
		case a.due > 0:
			var frame [256]byte
			whole := frame[:copy(frame[:], fromAgent)]
			copy(whole[fromAgentUID:], a.uid[:])
			n := copy(b, whole[a.sent:])
			if a.sent += n; a.sent == len(whole) {
				a.due, a.sent = a.due-1, 0
			}
			return n, nil
		}
		a.changed.Wait()
	}
}

// Write is that of net.Conn.
func (a *agentEnd) Write(b []byte) (int, error) { return a.TryWrite(b) }

// TryWrite takes whole frames, as they come from an agent's outbox.
func (a *agentEnd) TryWrite(b []byte) (int, error) {
	if !a.letIn.Load() {
		if !bytes.HasPrefix(b, []byte("HTTP/1.1 101 ")) {
			a.fleet.tb.Errorf("an agent was answered %q", b)
		}
		a.letIn.Store(true)
		a.fleet.done <- struct{}{}
		return len(b), nil
	}
	for rest := b; len(rest) > 0; {
		opcode, payload, size := firstFrame(rest)
		switch {
		case size == 0:
			return 0, errors.New("half a frame")
		case opcode == opcodeClose:
			a.leave()
		case !bytes.Equal(payload[uidAt:][:len(a.uid)], a.uid[:]):
			a.fleet.tb.Error("an agent got what was not for it")
		default:
			a.fleet.done <- struct{}{}
		}
		rest = rest[size:]
	}
	return len(b), nil
}

// serverEnd is a link of the gateway to the server, with the server: it lets every agent in, and
// answers each message with one of the same size.
type serverEnd struct {
	lightEnd

	// Guarded by mu.
	served bool   // its upgrade request was answered
	said   []byte // by the gateway; the part that is not dealt with
	in     []byte // what the server says: from read on, it is still to be read
	read   int
}

// Read is that of net.Conn.
func (s *serverEnd) Read(b []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for {
		if err := s.errLocked(); err != nil {
			return 0, err
		}
		if s.read < len(s.in) {
			n := copy(b, s.in[s.read:])
			if s.read += n; s.read == len(s.in) {
				s.in, s.read = s.in[:0], 0
			}
			return n, nil
		}
		s.changed.Wait()
	}
}

// Write is that of net.Conn.
func (s *serverEnd) Write(b []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return 0, net.ErrClosed
	}
	s.said = append(s.said, b...)
	if !s.served {
		return len(b), s.shakeHandsLocked()
	}
	rest := s.said
	for {
		opcode, payload, size := firstFrame(rest)
		if size == 0 {
			s.said = append(s.said[:0], rest...)
			s.changed.Signal()
			return len(b), nil
		}
		s.takeLocked(opcode, payload)
		rest = rest[size:]
	}
}

func (s *serverEnd) takeLocked(opcode byte, payload []byte) {
	switch {
	case opcode == opcodeClose:
		s.left = true
	case opcode == opcodePing:
		s.in = append(append(s.in, 0x80|opcodePong, byte(len(payload))), payload...)
	case payload[1] == tagCustomMessage:
		_, requestUID, _ := bytes.Cut(payload, []byte(`"request_uid":"`))
		s.in = append(s.in, letIn...)
		copy(s.in[len(s.in)-len(letIn)+letInRequestUID:], requestUID[:requestUIDSize])
	case payload[uidAt+16] == tagSequenceNum && payload[uidAt+18] == tagAgentDisconnect, s.fleet.silent.Load():
		s.fleet.done <- struct{}{}
	default:
		s.answerLocked(payload[uidAt:][:16])
	}
}

func (s *serverEnd) answerLocked(uid []byte) {
	s.in = append(s.in, fromServer...)
	copy(s.in[len(s.in)-len(fromServer)+fromServerUID:], uid)
}

// push sends a message to an agent, on any link.
func (f *fleet) push(a *agentEnd) {
	f.mu.Lock()
	s := f.links[0]
	f.mu.Unlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.answerLocked(a.uid[:])
	s.changed.Signal()
}

// shakeHandsLocked answers the link's upgrade request once it is whole.
func (s *serverEnd) shakeHandsLocked() error {
	request, err := http.ReadRequest(bufio.NewReader(bytes.NewReader(s.said)))
	if err != nil {
		return nil //nolint:nilerr // the rest is about to come
	}
	sum := sha1.Sum([]byte(request.Header.Get("Sec-Websocket-Key") + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"))
	s.in = fmt.Appendf(s.in, "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: %s\r\n\r\n",
		base64.StdEncoding.EncodeToString(sum[:]))
	s.said, s.served = s.said[:0], true
	s.changed.Signal()
	return nil
}

// What is said on all connections, but for UIDs and request_uids: these are put in their places.
const (
	upgradeRequest = "GET /v1/opamp HTTP/1.1\r\nHost: gateway\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n" +
		"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nAuthorization: Secret-Key of-26-characters-as-usual\r\n" +
		"User-Agent: agent/1.0\r\nOpAMP-Version: v0.2.0\r\nAgent-ID: 00000000-0000-0000-0000-000000000000\r\nAgent-Hostname: host\r\n\r\n"

	uidAt          = 3  // in the payload: after the header byte, tag and length
	requestUIDSize = 36 // a UUID as text

	// The tags of custom_message, sequence_num and agent_disconnect in an AgentToServer.
	tagCustomMessage, tagSequenceNum, tagAgentDisconnect = 13<<3 | 2, 2 << 3, 9<<3 | 2

	opcodeMessage, opcodeClose, opcodePing, opcodePong = 0x2, 0x8, 0x9, 0xA
)

var (
	fromAgent = gatewaytest.Fragment(true, opcodeMessage, true, gatewaytest.Frame(&protobufs.AgentToServer{
		InstanceUid:        placeholder,
		RemoteConfigStatus: &protobufs.RemoteConfigStatus{LastRemoteConfigHash: make([]byte, messageData)},
	}))
	fromServer = gatewaytest.Fragment(false, opcodeMessage, true, gatewaytest.Frame(&protobufs.ServerToAgent{
		InstanceUid:  placeholder,
		RemoteConfig: &protobufs.AgentRemoteConfig{ConfigHash: make([]byte, messageData)},
	}))
	letIn = gatewaytest.Fragment(false, opcodeMessage, true, gatewaytest.Frame(
		gatewaytest.ConnectResult(string(bytes.Repeat(placeholder[:1], requestUIDSize)), gatewaytest.Verdict{Accept: true, Status: http.StatusOK})))

	placeholder = bytes.Repeat([]byte("?"), 16)

	fromAgentUID    = bytes.Index(fromAgent, placeholder)
	fromServerUID   = bytes.Index(fromServer, placeholder)
	letInRequestUID = bytes.Index(letIn, placeholder)
)

// messageData makes messages of 200 bytes.
const messageData = 175

// firstFrame returns the first frame of b, unmasked in place, and its size; 0 if it is not whole.
func firstFrame(b []byte) (opcode byte, payload []byte, size int) {
	if len(b) < 2 {
		return 0, nil, 0
	}
	masked, length, at := b[1]&0x80 != 0, int(b[1]&0x7f), 2
	if length == 126 { // nobody here says as much as needs 127
		if len(b) < 4 {
			return 0, nil, 0
		}
		length, at = int(binary.BigEndian.Uint16(b[2:])), 4
	}
	if masked {
		at += 4
	}
	if size = at + length; len(b) < size {
		return 0, nil, 0
	}
	payload = b[at:size]
	if masked {
		key := uint64(binary.LittleEndian.Uint32(b[at-4:]))
		key |= key << 32
		i := 0
		for ; i+8 <= len(payload); i += 8 {
			binary.LittleEndian.PutUint64(payload[i:], binary.LittleEndian.Uint64(payload[i:])^key)
		}
		for ; i < len(payload); i++ {
			payload[i] ^= byte(key >> (i % 8 * 8))
		}
	}
	return b[0] & 0x0f, payload, size
}
