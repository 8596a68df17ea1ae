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
