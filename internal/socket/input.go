package socket

import (
	"bufio"
	"io"
	"net"
	"sync"
)

// Input is what has come from the peer and was not read yet; a *bufio.Reader is one.
type Input interface {
	io.Reader
	Peek(n int) ([]byte, error)
	Discard(n int) (int, error)
	Buffered() int
}

const (
	// inputSize is enough for most messages of agents, in bytes; longer reads go past it.
	inputSize = 4 << 10
	// plainInputSize is the same where the buffer cannot be given back.
	plainInputSize = 1 << 10
	// tlsInputSize is enough for the header of a frame: TLS has a buffer of its own.
	tlsInputSize = 16
)

// InputOf returns the input of an agent's connection, of which there are many that mostly wait.
func InputOf(conn net.Conn) Input {
	below, plain := conn.(*Conn)
	switch {
	case !plain:
		return bufio.NewReaderSize(conn, tlsInputSize)
	case below.wait == nil:
		return bufio.NewReaderSize(conn, plainInputSize)
	}
	in := &lazyInput{conn: below}
	in.ready = in.read
	return in
}

// waiter reads into what in takes when there is something to read.
type waiter interface {
	readWhenReady(in *lazyInput) error
}

// lazyInput has a buffer only while there is something in it.
type lazyInput struct {
	conn       *Conn
	buffer     *[inputSize]byte
	start, end int                   // of what is in it
	ready      func(fd uintptr) bool // read, for the kernel's connections
	err        error                 // of read
}

var inputs = sync.Pool{New: func() any { return new([inputSize]byte) }}

func (in *lazyInput) take() []byte {
	if in.buffer == nil {
		in.buffer = inputs.Get().(*[inputSize]byte)
	}
	return in.buffer[in.end:]
}

// release gives the buffer back when nothing is in it.
func (in *lazyInput) release() {
	if in.start == in.end && in.buffer != nil {
		inputs.Put(in.buffer)
		in.buffer, in.start, in.end = nil, 0, 0
	}
}

// fill adds to what is there, which is less than the header of a frame.
func (in *lazyInput) fill() error {
	if in.release(); in.buffer == nil {
		return in.conn.wait.readWhenReady(in)
	}
	in.end = copy(in.buffer[:], in.buffer[in.start:in.end])
	in.start = 0
	n, err := in.conn.Read(in.take())
	in.end += n
	return err
}

// Peek is that of bufio.Reader, for the header of a frame.
func (in *lazyInput) Peek(n int) ([]byte, error) {
	var err error
	for in.Buffered() < n && err == nil {
		err = in.fill()
	}
	if in.Buffered() >= n {
		return in.buffer[in.start : in.start+n], nil
	}
	if in.buffer == nil {
		return nil, err
	}
	return in.buffer[in.start:in.end], err
}

// Discard is that of bufio.Reader, for what is buffered.
func (in *lazyInput) Discard(n int) (int, error) {
	n = min(n, in.Buffered())
	in.start += n
	in.release()
	return n, nil
}

// Read is that of bufio.Reader.
func (in *lazyInput) Read(b []byte) (int, error) {
	if in.Buffered() == 0 {
		return in.conn.Read(b)
	}
	n := copy(b, in.buffer[in.start:in.end])
	in.start += n
	in.release()
	return n, nil
}

// Buffered returns how much is there.
func (in *lazyInput) Buffered() int { return in.end - in.start }

// LinkInput returns the input of a link's connection, which many agents' messages share, with what read
// holds of it already. It reads up to size bytes at once.
func LinkInput(conn net.Conn, read *bufio.Reader, size int) Input {
	in := &linkInput{conn: conn, buffer: make([]byte, max(size, read.Buffered(), inputSize))}
	in.atOnce = len(in.buffer)
	held, _ := read.Peek(read.Buffered()) // which is no more than there is
	in.end = copy(in.buffer, held)
	return in
}

// linkInput reads much at once, but for large payloads: these go past its buffer, except for their start.
type linkInput struct {
	conn       net.Conn
	buffer     []byte
	start, end int // of what is in it
	atOnce     int // how much to read at once: little after a large payload, when another may come
}

// fill adds to what is there, which is less than the header of a frame.
func (in *linkInput) fill() error {
	in.end = copy(in.buffer, in.buffer[in.start:in.end])
	in.start = 0
	n, err := in.conn.Read(in.buffer[in.end:min(in.end+in.atOnce, len(in.buffer))])
	in.end += n
	if n == in.atOnce {
		in.atOnce = len(in.buffer)
	}
	return err
}

// Peek is that of bufio.Reader, for the header of a frame.
func (in *linkInput) Peek(n int) ([]byte, error) {
	var err error
	for in.Buffered() < n && err == nil {
		err = in.fill()
	}
	if in.Buffered() >= n {
		return in.buffer[in.start : in.start+n], nil
	}
	return in.buffer[in.start:in.end], err
}

// Discard is that of bufio.Reader, for what is buffered.
func (in *linkInput) Discard(n int) (int, error) {
	n = min(n, in.Buffered())
	in.start += n
	return n, nil
}

// Read is that of bufio.Reader.
func (in *linkInput) Read(b []byte) (int, error) {
	if len(b) >= len(in.buffer)/2 {
		in.atOnce = inputSize
	}
	if in.Buffered() == 0 {
		if len(b) >= in.atOnce {
			return in.conn.Read(b)
		}
		if err := in.fill(); in.Buffered() == 0 {
			return 0, err
		}
	}
	n := copy(b, in.buffer[in.start:in.end])
	in.start += n
	return n, nil
}

// Buffered returns how much is there.
func (in *linkInput) Buffered() int { return in.end - in.start }
