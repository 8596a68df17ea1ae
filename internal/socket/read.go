package socket

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"unicode/utf8"

	"github.com/gorilla/websocket"

	"github.com/opampgateway/opampgateway/internal/memory"
)

const (
	// firstPiece is how much memory a large message gets before any of it has come: who only
	// announces something takes little. It is what a message of unknown length begins with, too.
	firstPiece = memory.SmallMessage

	// headSize is how much of a message that is too large is told, in bytes.
	headSize = 64

	// The opcodes of RFC 6455, section 5.2.
	continuation, text, binaryMessage = 0x0, 0x1, 0x2
	closing, ping, pong               = 0x8, 0x9, 0xA
	// finBit marks the last frame of a message.
	finBit = 0x80
	// maxControl is the longest payload of a control frame, in bytes (section 5.5).
	maxControl = 125
	// smallPong is the longest payload of a pong for which there is memory already, in bytes.
	smallPong = 8
)

// frame is the header of a WebSocket frame, and how much of its payload is still to be read.
type frame struct {
	opcode byte
	fin    bool
	key    [4]byte // zero for none
	read   byte    // bytes of the payload, modulo those of the key
	left   int64   // may be more than an int holds, where that has 32 bits
}

// TooLargeError tells of a message above the limit, as far as it was read. It is an ErrTooLarge.
type TooLargeError struct {
	Size int64  // in bytes; at least, since more fragments may follow
	Head []byte // its first bytes, as many as came, up to 64
}

func (e *TooLargeError) Error() string {
	return fmt.Sprintf("%v: at least %d bytes", ErrTooLarge, e.Size)
}

// Unwrap makes a TooLargeError an ErrTooLarge.
func (e *TooLargeError) Unwrap() error { return ErrTooLarge }

// Read returns the next message, in memory of its own, which stays counted until the next call,
// or Release. After a Skippable error reading can go on; any other error is the end of the
// connection: ErrProtocol, or a *websocket.CloseError with what the peer said, or of the network.
func (s *Socket) Read() ([]byte, error) {
	s.Release()
	if s.broken {
		_, err := io.Copy(io.Discard, s.in)
		return nil, cmp.Or(err, io.EOF)
	}
	if err := s.skip(); err != nil {
		return nil, err
	}
	if err := s.next(); err != nil {
		return nil, err
	}
	if s.frame.opcode == text {
		s.skipping = true
		return nil, ErrText
	}
	message, n, err := s.message()
	if err != nil {
		s.giveBack(message)
		return nil, err
	}
	if s.held > 0 && memory.PieceSize(n) <= s.held/2 { // it came in fragments, so it got too much
		message = s.owner.Shrink(message, n)
		s.held = len(message)
	}
	return message[:n], nil
}

// message reads a message, of which the header of the first frame was read. It returns n bytes, and
// the memory that they are in.
func (s *Socket) message() (message []byte, n int, err error) {
	for message = []byte{}; ; {
		if s.frame.left > int64(s.limit-n) {
			s.skipping = true
			return message, n, s.tooLarge(message[:n])
		}
		if message, n, err = s.fill(message, n); err != nil || s.frame.fin {
			return message, n, err
		}
		if err := s.next(); err != nil {
			return message, n, err
		}
	}
}

// tooLarge returns the error for a message of which the frame does not fit behind what was read.
func (s *Socket) tooLarge(message []byte) error {
	e := &TooLargeError{Size: int64(len(message)) + s.frame.left}
	e.Head = append(make([]byte, 0, headSize), message[:min(len(message), headSize)]...)
	for len(e.Head) < headSize && s.frame.left > 0 {
		m, err := s.readPayload(e.Head[len(e.Head):headSize])
		if err != nil {
			return err
		}
		e.Head = e.Head[:len(e.Head)+m]
	}
	return e
}

// fill reads the rest of a frame behind the first n bytes of message, for which memory is taken
// as they come.
func (s *Socket) fill(message []byte, n int) ([]byte, int, error) {
	for s.frame.left > 0 {
		if n == len(message) {
			var err error
			if message, err = s.grow(message, n+int(s.frame.left)); err != nil {
				return message, n, err
			}
		}
		m, err := s.readPayload(message[n:])
		n += m
		s.received.Add(uint64(m))
		if err != nil {
			return message, n, err
		}
	}
	return message, n, nil
}

// grow returns larger memory with what is in message, which will have at least want bytes, and no
// more if the frame is the last.
//
// A large message gets as much as was announced of it, or may come, halved until it is at most
// four times what came. So the memory from which it grows is never more than half of the largest.
func (s *Socket) grow(message []byte, want int) ([]byte, error) {
	if want <= memory.UncountedMessage {
		return memory.Uncounted(), nil // never for more than was there: that has all of it
	}
	size := want
	switch {
	case s.frame.fin:
	case want <= firstPiece:
		size = min(firstPiece, s.limit)
	default:
		size = s.limit
	}
	for memory.PieceSize(size) > firstPiece && memory.PieceSize(size)/4 > len(message) {
		size = (size + 1) / 2
	}
	size = memory.PieceSize(size)
	piece, err := s.owner.Piece(size, want)
	if err != nil {
		return message, err
	}
	copy(piece, message)
	s.giveBack(message)
	s.held = size
	return piece, nil
}

// giveBack gives up memory that a message was read into.
func (s *Socket) giveBack(message []byte) {
	if s.held == 0 && len(message) > 0 {
		memory.GiveUncounted(message)
	}
	s.Drop(message)
}

// Drop gives up the message that was read last, which nobody needs any more.
func (s *Socket) Drop(message []byte) {
	if s.held > 0 {
		s.owner.Return(message[:s.held])
		s.held = 0
	}
}

// Release counts the message that was read last no longer.
func (s *Socket) Release() {
	if s.held > 0 {
		s.owner.Release(s.held)
		s.held = 0
	}
}

// skip reads past what is left of a message that is of no use.
func (s *Socket) skip() error {
	if !s.skipping {
		return nil
	}
	scratch := inputs.Get().(*[inputSize]byte)
	defer inputs.Put(scratch)
	for s.skipping {
		for s.frame.left > 0 {
			n, err := s.in.Read(scratch[:min(s.frame.left, inputSize)])
			if err != nil {
				return err
			}
			s.alive()
			s.frame.left -= int64(n)
		}
		if s.frame.fin {
			s.skipping = false
		} else if err := s.next(); err != nil {
			return err
		}
	}
	return nil
}

// next reads up to the payload of the next frame that belongs to a message: the first of one, or
// the next of the one begun. Control frames in between are dealt with.
func (s *Socket) next() error {
	begun := !s.frame.fin && s.frame.opcode != 0
	opcode := s.frame.opcode
	for {
		if err := s.header(); err != nil {
			return err
		}
		s.alive()
		switch f := &s.frame; {
		case f.opcode >= closing:
			if err := s.control(); err != nil {
				return err
			}
		case begun != (f.opcode == continuation):
			return s.violation("message within a message, or the rest of none")
		case begun:
			f.opcode = opcode
			return nil
		default:
			return nil
		}
	}
}

// header reads the header of a frame (RFC 6455, section 5.2).
func (s *Socket) header() error {
	start, err := s.peek(2)
	if err != nil {
		return err
	}
	const reservedBits, opcodeBits, maskBit, lengthBits = 0x70, 0x0f, 0x80, 0x7f
	f := frame{opcode: start[0] & opcodeBits, fin: start[0]&finBit != 0}
	masked, length := start[1]&maskBit != 0, uint64(start[1]&lengthBits)
	switch {
	case start[0]&reservedBits != 0:
		return s.violation("reserved bits are set")
	case f.opcode > binaryMessage && f.opcode < closing, f.opcode > pong:
		return s.violation("unknown opcode")
	case f.opcode >= closing && (!f.fin || length > maxControl):
		return s.violation("control frame is fragmented or too long")
	case masked == s.client:
		return s.violation("only a client masks, and it has to")
	}
	size := 2
	switch length {
	case 126:
		size += 2
	case 127:
		size += 8
	}
	if masked {
		size += 4
	}
	if start, err = s.peek(size); err != nil {
		return err
	}
	switch length {
	case 126:
		length = uint64(binary.BigEndian.Uint16(start[2:]))
	case 127:
		length = binary.BigEndian.Uint64(start[2:])
	}
	if length > 1<<62 {
		return s.violation("length is out of range")
	}
	if f.left = int64(length); masked {
		copy(f.key[:], start[size-4:])
	}
	s.frame = f
	_, err = s.in.Discard(size)
	return err
}

// peek returns the next n bytes without taking them.
func (s *Socket) peek(n int) ([]byte, error) {
	b, err := s.in.Peek(n)
	if errors.Is(err, io.EOF) && len(b) > 0 {
		err = io.ErrUnexpectedEOF
	}
	return b, err
}

// readPayload reads some of what is left of the frame.
func (s *Socket) readPayload(b []byte) (int, error) {
	f := &s.frame
	n, err := s.in.Read(b[:min(int64(len(b)), f.left)])
	if n > 0 {
		s.alive()
		if !s.client {
			mask(b[:n], f.key, int(f.read))
		}
		f.read = byte((int(f.read) + n) % len(f.key)) // only its place in the key matters
		f.left -= int64(n)
	}
	if errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return n, err
}

// control deals with a control frame (RFC 6455, section 5.5).
func (s *Socket) control() error {
	var payload []byte
	if s.frame.opcode == pong && s.frame.left <= smallPong {
		payload = s.ponged[:s.frame.left]
	} else {
		payload = make([]byte, s.frame.left)
	}
	for n := 0; n < len(payload); {
		m, err := s.readPayload(payload[n:])
		if err != nil {
			return err
		}
		n += m
	}
	switch s.frame.opcode {
	case ping:
		s.owner.Pinged(payload)
	case pong:
		s.owner.Ponged(payload)
	case closing:
		closed := &websocket.CloseError{Code: websocket.CloseNoStatusReceived}
		if len(payload) == 1 {
			return s.violation("close frame with half a code")
		}
		if len(payload) > 1 {
			closed.Code, closed.Text = int(binary.BigEndian.Uint16(payload)), string(payload[2:])
			if !validCode(closed.Code) {
				return s.violation("close frame with a code that is not to be sent")
			}
			if !utf8.ValidString(closed.Text) {
				return s.violation("close frame with a reason that is not UTF-8")
			}
		}
		return closed
	}
	return nil
}

// validCode reports whether a peer may close with code (RFC 6455, section 7.4).
func validCode(code int) bool {
	switch code {
	case 1004, websocket.CloseNoStatusReceived, websocket.CloseAbnormalClosure, websocket.CloseTLSHandshake:
		return false
	}
	return code >= 1000 && code <= 1014 || code >= 3000 && code < 5000
}

func (s *Socket) violation(how string) error {
	s.broken = true
	return fmt.Errorf("%w: %s", ErrProtocol, how)
}

// Received returns how many bytes of messages were read so far, but for what was skipped.
func (s *Socket) Received() uint64 { return s.received.Load() }
