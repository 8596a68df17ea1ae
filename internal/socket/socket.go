// Package socket is one WebSocket as the relay uses it, whichever end of it this is.
// gorilla/websocket shakes hands. Then reading takes a message into memory of just its size,
// as far as there is some; writing puts whole batches of frames together, none of them above 16 KiB,
// and hands them over in as few calls as possible; and what is to be said about a violation of the
// protocol is the caller's to say.
//
// One goroutine reads, one at a time writes (an outbox sees to that); Sweep belongs to one
// more. Hurry and Close may be called by anyone.
package socket

import (
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/opampgateway/opampgateway/internal/monotonic"
	"github.com/opampgateway/opampgateway/internal/outbox"
)

var (
	// ErrText means that the peer sent a text message, which OpAMP has not.
	ErrText = errors.New("text message")
	// ErrStalled means that a write made no progress for the write timeout.
	ErrStalled = errors.New("write made no progress")
	// ErrTooLarge means that the peer's message is above the limit. It is not read to its end.
	ErrTooLarge = errors.New("message above the size limit")
	// ErrProtocol means that the peer does not keep to RFC 6455. Nothing more can be read.
	ErrProtocol = errors.New("violation of the WebSocket protocol")
)

// Skippable reports whether err concerns one message only, so that reading can go on.
func Skippable(err error) bool { return errors.Is(err, ErrText) || errors.Is(err, ErrTooLarge) }

const (
	// batchSize is how much is put together before it is handed to the socket. Five times as much,
	// for large messages, cost a busy gateway about a fifth more.
	batchSize = 16 << 10
	// headerMax is the longest header of a frame that we write, and fragmentSize the longest payload:
	// some proxies and clients take no longer ones. Both together fill a batch, and a record of TLS.
	headerMax    = 8
	fragmentSize = batchSize - headerMax

	// chunkSize is how much of a larger message is written under one deadline.
	chunkSize = 128 << 10
	// tlsChunkSize is how much TLS gets at once, to be kept where there is no room: one record.
	tlsChunkSize = 16 << 10

	// stallPart is how long one call to write may wait, of a write timeout that is several times that.
	stallPart = time.Second
	// minStallParts is how many calls to write there are in a write timeout at least.
	minStallParts = 2

	// moment is how long the last words of a connection may take: this much to write them,
	// and as much again to hear the peer's.
	moment = time.Second
)

var batches = sync.Pool{New: func() any { b := make([]byte, 0, batchSize); return &b }}

// Owner is whose connection a Socket is. All of it is for the Socket's reader to call. It counts what
// that reader holds: the message that is being read, or was read last. Messages up to
// memory.UncountedMessage are not counted.
type Owner interface {
	// Piece returns, and counts, memory of a size that memory.PieceSize returns, on the way to a
	// message of at least as many bytes as the second says. It may wait until there is some; an
	// error ends the reading.
	Piece(size, message int) ([]byte, error)
	// Shrink returns the first n bytes of a piece in a smaller one. It never waits.
	Shrink(piece []byte, n int) []byte
	// Return takes a piece back.
	Return(piece []byte)
	// Release counts n bytes of a piece no longer, which is somebody else's now.
	Release(n int)

	// Pinged is to queue the answer to a ping of the peer, with the same payload, which is the owner's
	// from now on. It must not wait.
	Pinged(payload []byte)
	// Ponged is told of the peer's answer to a ping of ours; or of one to none, which a peer may send
	// (RFC 6455, section 5.5.3). The payload is valid during the call only. It must not wait.
	Ponged(payload []byte)
}

// Socket is one WebSocket.
type Socket struct {
	// Set once.
	conn         net.Conn // below, or TLS
	below        *Conn    // its Close never waits
	client       bool     // masks what it writes (RFC 6455, section 5.3)
	limit        int      // of one message read, in bytes
	writeTimeout time.Duration
	owner        Owner

	// Owned by the reader.
	in       Input
	frame    frame           // what is left of the one being read
	skipping bool            // the message that frame is of
	broken   bool            // the peer has violated the protocol
	held     int             // what is reserved of memory
	ponged   [smallPong]byte // memory for the payload of a pong

	// Owned by the writer.
	batch   *[]byte // what is put together; nil when nothing is
	pending int     // frames of which a part is in the batch, and those left out among them
	begun   int     // frames that TryBatch has begun
	sent    int     // bytes that TryBatch has written of a large message, with headers

	// Shared.
	life
	received atomic.Uint64 // bytes of messages that were read, but for what was skipped
	written  atomic.Uint64 // calls to write that have made progress
	writing  atomic.Int64  // when the call to write began that has not returned, by clock; 0 for none
	hurry    atomic.Int64  // when all writing has to be over, by clock; 0 for not yet

	// Owned by the sweeper.
	quiet       int32  // sweeps in a row without a sign of life
	lastWriting bool   // a call to write had not returned at the last sweep
	lastWritten uint64 // written at the last sweep
}

// New takes over conn, a *Conn or TLS over one, after the handshake, with what in has read of it
// already. Messages above limit bytes are not read; a write that makes no progress for
// writeTimeout fails.
func New(conn net.Conn, in Input, client bool, limit int, writeTimeout time.Duration, owner Owner) *Socket {
	below, ok := conn.(*Conn)
	if !ok {
		below = conn.(interface{ NetConn() net.Conn }).NetConn().(*Conn)
	}
	below.keep()
	return &Socket{
		conn: conn, below: below, in: in, client: client,
		limit: limit, writeTimeout: writeTimeout, owner: owner,
	}
}

// WriteBatch is what both kinds of connection do for their outbox; see outbox.Socket.
func WriteBatch[S any](s *Socket, batch []outbox.Entry[S]) (written int, err error) {
	begun, ends := s.begun, false
	if err := s.resume(); err != nil {
		return 0, err
	}
	for i := begun; i < len(batch); i++ {
		e := &batch[i]
		if s.sent == 0 && e.Stale != nil && e.Stale() {
			if s.pending > 0 {
				s.pending++ // it stands between those that are
			}
			continue
		}
		if e.Kind == outbox.End {
			ends = true
			if s.pending > 0 {
				s.pending++ // it stands behind those that are
			}
			continue
		}
		if err := s.writeFrame(byte(e.Kind), e.Frame); err != nil {
			return max(begun, i+1-s.pending), err
		}
	}
	if err := s.flush(); err != nil {
		return max(begun, len(batch)-s.pending), err
	}
	if ends {
		s.closeWrite()
	}
	return len(batch), nil
}

// TryBatch is WriteBatch as far as nothing has to wait; see outbox.Socket.
func TryBatch[S any](s *Socket, batch []outbox.Entry[S]) (written int, err error) {
	for written < len(batch) && err == nil {
		n := written
		s.openBatch()
		for ; n < len(batch); n++ {
			e := &batch[n]
			if e.Stale != nil && e.Stale() {
				continue
			}
			if len(*s.batch)+headerMax+len(e.Frame) > batchSize {
				break
			}
			s.appendFrame(byte(e.Kind), e.Frame)
		}
		if n == written {
			// A large one waits for WriteBatch, unless it can be tried by itself.
			var whole bool
			if s.gathers() {
				whole, err = s.tryLarge(batch[n].Frame)
			}
			if !whole {
				break
			}
			written++
			continue
		}
		if len(*s.batch) > 0 { // not all were stale
			_, err = s.conn.Write(*s.batch)
		}
		switch {
		case err != nil:
		case s.below.full():
			s.begun = n - written
			s.closeBatch()
			return written, nil
		default:
			written, *s.batch = n, (*s.batch)[:0]
		}
	}
	s.closeBatch()
	return written, err
}

// resume finishes what TryBatch has begun.
func (s *Socket) resume() error {
	if s.begun == 0 {
		return nil
	}
	s.begun = 0
	return s.below.drain(s.await)
}

// writeFrame adds one WebSocket frame to the batch, or several if it is a large message, and hands over
// what is full. The payload is not changed, and not kept; only that of a message may be large. The opcodes
// are those of RFC 6455, section 5.2.
func (s *Socket) writeFrame(opcode byte, payload []byte) error {
	if len(payload) > fragmentSize {
		return s.writeLarge(payload)
	}
	s.openBatch()
	if len(*s.batch)+headerMax+min(len(payload), batchSize/4) > batchSize {
		if err := s.handOver(); err != nil {
			s.pending++ // this one is not written either
			return err
		}
	}
	key := s.appendHeader(opcode, len(payload))
	s.pending++
	for offset := 0; len(payload) > 0; {
		n := min(batchSize-len(*s.batch), len(payload))
		s.appendPayload(payload[:n], key, offset)
		offset, payload = offset+n, payload[n:]
		if len(payload) > 0 {
			if err := s.handOver(); err != nil {
				return err
			}
			s.pending = 1
		}
	}
	return nil
}

// writeLarge is writeFrame for a message in fragments (RFC 6455, section 5.4).
func (s *Socket) writeLarge(message []byte) error {
	s.openBatch()
	s.pending++
	if s.gathers() {
		return s.gather(message)
	}
	for offset := 0; offset < len(message); {
		end := min(offset+fragmentSize, len(message))
		if len(*s.batch)+headerMax+end-offset > batchSize {
			if err := s.handOver(); err != nil {
				return err
			}
			s.pending = 1
		}
		key := s.appendFragmentHeader(offset, end, len(message))
		s.appendPayload(message[offset:end], key, 0)
		offset = end
	}
	return nil
}

// plain reports whether there is no TLS above what has Write not wait.
func (s *Socket) plain() bool { return s.conn == net.Conn(s.below) }

// gathers reports whether large messages are handed over from where they are: they are not masked.
func (s *Socket) gathers() bool { return !s.client && s.plain() && s.below.gatherer() != nil }

// maxGathered is how many fragments are handed over at once from where they are.
const maxGathered = chunkSize / batchSize

// pieces are headers, which are in the batch, and parts of a message in turn.
type pieces [2 * maxGathered][]byte

var piecesPool = sync.Pool{New: func() any { return new(pieces) }}

// gather hands over what is in the batch and a large message that is not masked.
func (s *Socket) gather(message []byte) error {
	if len(*s.batch) > batchSize-maxGathered*headerMax {
		if err := s.handOver(); err != nil {
			return err
		}
		s.pending = 1
	}
	all := piecesPool.Get().(*pieces)
	defer piecesPool.Put(all)
	defer clear(all[:])
	offset, sent := s.begunAt()
	for offset < len(message) {
		var left [][]byte
		left, offset = s.fragments(all, message, offset)
		left, sent = skip(left, sent), 0
		for len(left) > 0 {
			n, err := s.below.gatherer().TryGather(left)
			if err != nil {
				return err
			}
			if left = skip(left, n); len(left) > 0 {
				if err := s.await(left[0]); err != nil {
					return err
				}
				left = left[1:]
			}
		}
		*s.batch, s.pending = (*s.batch)[:0], 1
	}
	s.pending = 0
	return nil
}

// tryLarge is gather as far as nothing has to wait, and not for more than can be gathered at once: a
// reader whom others share may be the caller. It reports whether it has handed over the whole message.
func (s *Socket) tryLarge(message []byte) (whole bool, err error) {
	all := piecesPool.Get().(*pieces)
	defer piecesPool.Put(all)
	defer clear(all[:])
	first, offset := s.fragments(all, message, 0)
	length := 0
	for _, piece := range first {
		length += len(piece)
	}
	n, err := s.below.gatherer().TryGather(first)
	*s.batch = (*s.batch)[:0]
	if err != nil || n == length && offset == len(message) {
		return err == nil, err
	}
	s.sent = n
	return false, nil
}

// fragments returns as many of the frames of a message, from an offset in it on, as can be gathered at
// once, and the offset behind them. Their headers are appended to the batch; the first piece has all
// that was in it before.
func (s *Socket) fragments(all *pieces, message []byte, offset int) (some [][]byte, next int) {
	some = all[:0]
	for start := 0; offset < len(message) && len(some) < len(all); {
		end := min(offset+fragmentSize, len(message))
		s.appendFragmentHeader(offset, end, len(message))
		some = append(some, (*s.batch)[start:], message[offset:end])
		start, offset = len(*s.batch), end
	}
	return some, offset
}

// begunAt returns the offset of the fragment in which TryBatch has stopped, and how much was sent of it.
func (s *Socket) begunAt() (offset, sent int) {
	const whole = 4 + fragmentSize // with the header of one that is not masked
	offset, sent = s.sent/whole*fragmentSize, s.sent%whole
	s.sent = 0
	return offset, sent
}

// skip returns what is left of pieces without the first n bytes.
func skip(some [][]byte, n int) [][]byte {
	for len(some) > 0 && n >= len(some[0]) {
		n -= len(some[0])
		some = some[1:]
	}
	if n > 0 {
		some[0] = some[0][n:]
	}
	return some
}

// appendFrame adds a whole frame to the batch, which has room for it.
func (s *Socket) appendFrame(opcode byte, payload []byte) {
	s.appendPayload(payload, s.appendHeader(opcode, len(payload)), 0)
}

// appendFragmentHeader appends the header of what is from offset to end in a message of a length.
func (s *Socket) appendFragmentHeader(offset, end, length int) (key [4]byte) {
	start, opcode := len(*s.batch), byte(continuation)
	if offset == 0 {
		opcode = binaryMessage
	}
	key = s.appendHeader(opcode, end-offset)
	if end < length {
		(*s.batch)[start] &^= finBit
	}
	return key
}

func (s *Socket) appendHeader(opcode byte, length int) (key [4]byte) {
	if s.client {
		binary.LittleEndian.PutUint32(key[:], rand.Uint32())
	}
	*s.batch = appendHeader(*s.batch, opcode, length, s.client, key)
	return key
}

// appendPayload appends a payload, or what of it is from offset on, for which there is room.
func (s *Socket) appendPayload(payload []byte, key [4]byte, offset int) {
	if !s.client {
		*s.batch = append(*s.batch, payload...)
		return
	}
	start := len(*s.batch)
	*s.batch = (*s.batch)[:start+len(payload)]
	maskTo((*s.batch)[start:], payload, key, offset)
}

func (s *Socket) openBatch() {
	if s.batch == nil {
		s.batch = batches.Get().(*[]byte)
	}
}

// closeBatch gives the batch's memory back, after an error, too: the next to use it is another
// connection.
func (s *Socket) closeBatch() {
	*s.batch = (*s.batch)[:0]
	batches.Put(s.batch)
	s.batch = nil
}

// flush hands over what the batch holds.
func (s *Socket) flush() error {
	if s.batch == nil {
		return nil
	}
	defer s.closeBatch()
	return s.handOver()
}

func (s *Socket) handOver() error {
	if len(*s.batch) == 0 {
		return nil
	}
	if err := s.write(*s.batch); err != nil {
		return err
	}
	*s.batch, s.pending = (*s.batch)[:0], 0
	return nil
}

// write hands b to the connection. Mostly there is room for it; only if not, it takes a deadline
// and a wait.
func (s *Socket) write(b []byte) error {
	if s.plain() {
		n, err := s.below.tryWrite(b)
		if err != nil || n == len(b) {
			return err
		}
		return s.await(b[n:])
	}
	for len(b) > 0 {
		n := min(len(b), tlsChunkSize)
		if _, err := s.conn.Write(b[:n]); err != nil {
			return err
		}
		if err := s.below.drain(s.await); err != nil {
			return err
		}
		b = b[n:]
	}
	return nil
}

// await writes b below TLS, and waits for room. It fails when nothing moves for the write timeout.
// What moved is only known when a call returns, and when it moved is not known at all. So a call
// gets a part of that time, where it can be taken up again; where it cannot, it is a client's, whose
// pieces are small.
func (s *Socket) await(b []byte) error {
	defer s.writing.Store(0)
	parts := max(minStallParts, s.writeTimeout/stallPart)
	if !s.below.resumes() {
		parts = 1
	}
	for idle := time.Duration(0); len(b) > 0; {
		if idle == 0 {
			s.writing.Store(monotonic.Now())
		}
		if err := s.setWriteDeadline(time.Now().Add(s.writeTimeout / parts)); err != nil {
			return err
		}
		n, err := s.below.Conn.Write(b[:min(len(b), chunkSize)])
		b = b[n:]
		idle++
		if n > 0 {
			s.written.Add(1)
			idle = 0
		}
		hurry := s.hurry.Load()
		late := hurry != 0 && monotonic.Now() >= hurry
		switch paused := errors.Is(err, os.ErrDeadlineExceeded) && !late; {
		case paused && (idle == parts || parts == 1):
			return ErrStalled
		case err != nil && !paused:
			return err
		}
	}
	return s.setWriteDeadline(time.Time{}) // for what is only tried
}

// setWriteDeadline sets a deadline, unless Hurry was first, or comes in between: its own stands.
func (s *Socket) setWriteDeadline(t time.Time) error {
	if err := s.below.SetWriteDeadline(t); err != nil {
		return err
	}
	if hurry := s.hurry.Load(); hurry != 0 {
		return s.below.SetWriteDeadline(monotonic.Time(hurry))
	}
	return nil
}

// Hurry gives whatever is still being written a moment, and the reader twice that. It never waits.
func (s *Socket) Hurry() {
	s.hurry.CompareAndSwap(0, monotonic.Now()+int64(moment))
	end := monotonic.Time(s.hurry.Load())
	// An error here means that the connection has ended, which is what Hurry is about.
	_ = s.conn.SetWriteDeadline(end)
	_ = s.conn.SetReadDeadline(end.Add(moment))
}

// closeWrite tells the peer that nothing more will be written, and leaves the rest to the reader. Where that
// cannot be told, the connection ends.
func (s *Socket) closeWrite() {
	if secured, ok := s.conn.(interface{ CloseWrite() error }); ok && !s.plain() {
		_ = secured.CloseWrite() // an error means that the connection has ended
		_ = s.below.drain(s.await)
	}
	half, ok := s.below.Conn.(interface{ CloseWrite() error })
	if !ok || half.CloseWrite() != nil {
		s.Close()
	}
}

// Close ends the connection. It never waits, which TLS does to say goodbye.
func (s *Socket) Close() { _ = s.below.Close() }

// Sweep returns for how many sweeps in a row the peer gave no sign of life: nothing was
// read, and a blocked write moved nothing. A write that did not block proves nothing; the
// kernel takes it whether or not there still is a peer.
func (s *Socket) Sweep() (quiet int) {
	alive := s.sweep()
	written, writing := s.written.Load(), s.writing.Load() != 0
	if writing && s.lastWriting && written != s.lastWritten {
		alive = true
	}
	s.lastWritten, s.lastWriting = written, writing
	s.quiet++
	if alive {
		s.quiet = 0
	}
	return int(s.quiet)
}

// Stalled returns for how long what is being written has made no progress; 0 when nothing is.
func (s *Socket) Stalled() time.Duration {
	if since := s.writing.Load(); since != 0 {
		return monotonic.Since(since)
	}
	return 0
}

// appendHeader appends the header of an unfragmented frame (RFC 6455, section 5.2).
func appendHeader(b []byte, opcode byte, length int, masked bool, key [4]byte) []byte {
	const maskBit = 0x80
	var m byte
	if masked {
		m = maskBit
	}
	b = append(b, finBit|opcode)
	switch {
	case length <= 125:
		b = append(b, m|byte(length))
	case length <= 0xffff:
		b = binary.BigEndian.AppendUint16(append(b, m|126), uint16(length))
	default:
		b = binary.BigEndian.AppendUint64(append(b, m|127), uint64(length))
	}
	if masked {
		b = append(b, key[:]...)
	}
	return b
}

// mask applies the key to b, which begins offset bytes into the payload.
func mask(b []byte, key [4]byte, offset int) { maskTo(b, b, key, offset) }

// maskTo puts into dst what mask makes of b, which is as long.
func maskTo(dst, b []byte, key [4]byte, offset int) {
	var k [8]byte
	for i := range k {
		k[i] = key[(offset+i)%4]
	}
	k8 := binary.LittleEndian.Uint64(k[:])
	for ; len(b) >= 32 && len(dst) >= 32; dst, b = dst[32:], b[32:] { // twice as fast as by eight
		binary.LittleEndian.PutUint64(dst, binary.LittleEndian.Uint64(b)^k8)
		binary.LittleEndian.PutUint64(dst[8:], binary.LittleEndian.Uint64(b[8:])^k8)
		binary.LittleEndian.PutUint64(dst[16:], binary.LittleEndian.Uint64(b[16:])^k8)
		binary.LittleEndian.PutUint64(dst[24:], binary.LittleEndian.Uint64(b[24:])^k8)
	}
	for ; len(b) >= 8; dst, b = dst[8:], b[8:] {
		binary.LittleEndian.PutUint64(dst, binary.LittleEndian.Uint64(b)^k8)
	}
	for i := range b {
		dst[i] = b[i] ^ k[i%4]
	}
}
