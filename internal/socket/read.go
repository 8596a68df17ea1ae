package socket

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/gorilla/websocket"

	"github.com/opampgateway/opampgateway/internal/memory"
)

const (
	// smallMessage is what a message may have, in bytes, without being counted.
	smallMessage = 4 << 10
	// firstPiece is how much memory a large message gets before any of it has come: who only
	// announces something takes little.
	firstPiece = 128 << 10

	// trimFrom is the size from which memory is worth a copy, in bytes.
	trimFrom = 1 << 20

	// The opcodes of RFC 6455, section 5.2.
	continuation, text, binaryMessage = 0x0, 0x1, 0x2
	closing, ping, pong               = 0x8, 0x9, 0xA
	// maxControl is the longest payload of a control frame, in bytes (section 5.5).
	maxControl = 125
)

// frame is the header of a WebSocket frame, and how much of its payload is still to be read.
type frame struct {
	opcode byte
	fin    bool
	key    [4]byte // zero for none
	read   int     // bytes of the payload
	left   int
}

// Read returns the next message, in memory of its own, which stays reserved until the next call,
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
	message := []byte{}
	for n := 0; ; {
		if s.frame.left > s.limit-n {
			s.skipping = true
			s.Drop(message)
			return nil, ErrTooLarge
		}
		var err error
		if message, n, err = s.fill(message, n); err == nil && s.frame.fin {
			if message, err = s.trim(message[:n]); err == nil {
				return message, nil
			}
		}
		if err == nil {
			err = s.next()
		}
		if err != nil {
			s.Drop(message)
			return nil, err
		}
	}
}

// fill reads the rest of a frame behind the first n bytes of message, for which memory is taken
// as they come.
func (s *Socket) fill(message []byte, n int) ([]byte, int, error) {
	for s.frame.left > 0 {
		if n == len(message) {
			var err error
			if message, err = s.grow(message, n+s.frame.left); err != nil {
				return message, n, err
			}
		}
		m, err := s.readPayload(message[n:])
		n += m
		if err != nil {
			return message, n, err
		}
	}
	return message, n, nil
}

// grow returns larger memory with what is in message, which will have at least want bytes.
func (s *Socket) grow(message []byte, want int) ([]byte, error) {
	if want <= smallMessage {
		return append(memory.Small(want)[:0], message...)[:want], nil
	}
	size := want
	if !s.frame.fin { // more is to come
		size = min(s.limit, max(want, 2*len(message)))
	}
	return s.move(message, memory.PieceSize(min(size, max(firstPiece, 4*len(message)))), want)
}

// move returns a piece of another size with what is in message.
func (s *Socket) move(message []byte, size, want int) ([]byte, error) {
	piece, err := s.memory.Piece(size, want)
	if err != nil {
		return message, err
	}
	copy(piece, message)
	s.Drop(message)
	s.held = size
	return piece, nil
}

// trim returns a large message that came in fragments in memory of its size: it may have got twice that.
func (s *Socket) trim(message []byte) ([]byte, error) {
	size := memory.PieceSize(len(message))
	if s.held < trimFrom || size > s.held/4*3 {
		return message, nil
	}
	piece, err := s.move(message, size, len(message))
	return piece[:len(message)], err
}

// Drop gives up the message that was read last, which nobody needs any more.
func (s *Socket) Drop(message []byte) {
	if s.held > 0 {
		s.memory.Return(message[:s.held])
		s.held = 0
	}
}

// Release gives back what the message that was read last has reserved.
func (s *Socket) Release() {
	if s.held > 0 {
		s.memory.Release(s.held)
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
			s.frame.left -= n
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
	const finBit, reservedBits, opcodeBits, maskBit, lengthBits = 0x80, 0x70, 0x0f, 0x80, 0x7f
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
	if f.left = int(length); masked {
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
	n, err := s.in.Read(b[:min(len(b), f.left)])
	if n > 0 {
		s.alive()
		s.received.Add(uint64(n))
		if !s.client {
			mask(b[:n], f.key, f.read)
		}
		f.read += n
		f.left -= n
	}
	if errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return n, err
}

// control deals with a control frame (RFC 6455, section 5.5).
func (s *Socket) control() error {
	payload := make([]byte, s.frame.left)
	for n := 0; n < len(payload); {
		m, err := s.readPayload(payload[n:])
		if err != nil {
			return err
		}
		n += m
	}
	switch s.frame.opcode {
	case ping:
		s.pong(payload)
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

// Received returns how many bytes of messages were read.
func (s *Socket) Received() uint64 { return s.received.Load() }
