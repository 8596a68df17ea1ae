package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
)

// The opcodes of WebSocket frames that are told apart here.
const (
	opContinuation = 0
	opBinary       = 2
	opClose        = 8
	opPing         = 9
	opPong         = 10
)

var errClosed = errors.New("closed by the other side")

// conn is one WebSocket after its handshake, or a connection of posts. It is as cheap as can be, so that the load leaves
// the machine to what is measured: an idle one has a small buffer, a message is one write.
type conn struct {
	net.Conn
	client bool   // a client masks what it writes
	posts  []byte // what messages are behind that are posted instead; nil for a WebSocket

	// Owned by the reader.
	buffer      []byte // what was read is buffer[from:to]
	from, to    int
	fragments   []byte // of a message that has not ended
	fragmenting bool

	writing sync.Mutex
}

// readBuffer holds any small message and its header.
const readBuffer = 512

func newConn(c net.Conn, client bool) *conn {
	return &conn{Conn: c, client: client, buffer: make([]byte, readBuffer)}
}

// read returns the next message, which is valid until the next call. It answers pings.
func (c *conn) read() ([]byte, error) {
	if c.posts != nil {
		return c.readPost()
	}
	for {
		opcode, last, payload, err := c.readFrame()
		if err != nil {
			return nil, err
		}
		switch opcode {
		case opPing:
			if err := c.write(opPong, payload); err != nil {
				return nil, err
			}
		case opPong:
		case opClose:
			return nil, errClosed
		case opBinary, opContinuation:
			if last && !c.fragmenting {
				return payload, nil
			}
			if !c.fragmenting {
				c.fragments = c.fragments[:0]
			}
			c.fragments = append(c.fragments, payload...)
			c.fragmenting = !last
			if last {
				return c.fragments, nil
			}
		default:
			return nil, fmt.Errorf("frame with opcode %d", opcode)
		}
	}
}

func (c *conn) readFrame() (opcode byte, last bool, payload []byte, err error) {
	head, err := c.take(2)
	if err != nil {
		return 0, false, nil, err
	}
	opcode, last = head[0]&0x0f, head[0]&0x80 != 0
	masked, size := head[1]&0x80 != 0, uint64(head[1]&0x7f)
	switch size {
	case 126:
		if head, err = c.take(2); err != nil {
			return 0, false, nil, err
		}
		size = uint64(binary.BigEndian.Uint16(head))
	case 127:
		if head, err = c.take(8); err != nil {
			return 0, false, nil, err
		}
		size = binary.BigEndian.Uint64(head)
	}
	if size > 1<<28 {
		return 0, false, nil, fmt.Errorf("frame of %d bytes", size)
	}
	var mask [4]byte
	if masked {
		if head, err = c.take(4); err != nil {
			return 0, false, nil, err
		}
		copy(mask[:], head)
	}
	if payload, err = c.take(int(size)); err != nil {
		return 0, false, nil, err
	}
	if masked {
		xor(payload, mask)
	}
	return opcode, last, payload, nil
}

// take returns the next n bytes, which are valid until the next call.
func (c *conn) take(n int) ([]byte, error) {
	if c.to-c.from < n {
		if c.from > 0 {
			c.to = copy(c.buffer, c.buffer[c.from:c.to])
			c.from = 0
		}
		if n > len(c.buffer) {
			larger := make([]byte, n+readBuffer)
			copy(larger, c.buffer[:c.to])
			c.buffer = larger
		}
		for c.to < n {
			read, err := c.Read(c.buffer[c.to:])
			if read == 0 && err != nil {
				return nil, err
			}
			c.to += read
		}
	}
	c.from += n
	return c.buffer[c.from-n : c.from], nil
}

// writeBuffers has the frames being written, of all connections.
var writeBuffers = sync.Pool{New: func() any { return new([]byte) }}

// write writes one message as one frame, by one call of the socket.
func (c *conn) write(opcode byte, payload []byte) error {
	if c.posts != nil {
		return c.writePost(payload)
	}
	buffer := writeBuffers.Get().(*[]byte)
	defer writeBuffers.Put(buffer)
	*buffer = appendFrame((*buffer)[:0], opcode, payload, c.client)
	c.writing.Lock()
	defer c.writing.Unlock()
	_, err := c.Write(*buffer)
	return err
}

func appendFrame(b []byte, opcode byte, payload []byte, masked bool) []byte {
	var maskBit byte
	if masked {
		maskBit = 0x80
	}
	b = append(b, 0x80|opcode)
	switch n := len(payload); {
	case n < 126:
		b = append(b, maskBit|byte(n))
	case n < 1<<16:
		b = binary.BigEndian.AppendUint16(append(b, maskBit|126), uint16(n))
	default:
		b = binary.BigEndian.AppendUint64(append(b, maskBit|127), uint64(n))
	}
	if !masked {
		return append(b, payload...)
	}
	mask := [4]byte{0x5a, 0xc3, 0x96, 0x3c}
	b = append(b, mask[:]...)
	b = append(b, payload...)
	xor(b[len(b)-len(payload):], mask)
	return b
}

func xor(b []byte, mask [4]byte) {
	word := binary.LittleEndian.Uint32(mask[:])
	long := uint64(word) | uint64(word)<<32
	i := 0
	for ; i+8 <= len(b); i += 8 {
		binary.LittleEndian.PutUint64(b[i:], binary.LittleEndian.Uint64(b[i:])^long)
	}
	for ; i < len(b); i++ {
		b[i] ^= mask[i&3]
	}
}

// readHead reads an HTTP head up to its empty line, byte by byte as far as it has to: what
// follows is left for the WebSocket.
func (c *conn) readHead() (string, error) {
	var head []byte
	for len(head) < 16<<10 {
		b, err := c.take(1)
		if err != nil {
			return "", err
		}
		head = append(head, b[0])
		if n := len(head); n >= 4 && string(head[n-4:]) == "\r\n\r\n" {
			return string(head), nil
		}
	}
	return "", io.ErrShortBuffer
}
