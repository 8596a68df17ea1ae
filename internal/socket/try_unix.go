//go:build unix

package socket

import (
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
)

// rawOf returns what can be done with a connection of the kernel's; nothing if conn is none.
func rawOf(conn net.Conn) (trier, waiter) {
	if sc, ok := conn.(syscall.Conn); ok {
		if raw, err := sc.SyscallConn(); err == nil {
			r := &rawConn{raw}
			return r, r
		}
	}
	return nil, nil
}

type rawConn struct{ raw syscall.RawConn }

// TryWrite is one call to the kernel, which does not wait since Go's sockets never do.
func (r *rawConn) TryWrite(b []byte) (int, error) {
	a := attempts.Get().(*attempt)
	a.b = b
	err := r.raw.Write(a.write)
	n := a.n
	if err == nil {
		err = a.err
	}
	a.b, a.n, a.err = nil, 0, nil
	attempts.Put(a)
	return n, err
}

// attempt is one call, and what came of it. They are used again, for the closure's sake.
type attempt struct {
	write func(fd uintptr) bool
	b     []byte
	n     int
	err   error
}

var attempts = sync.Pool{New: func() any {
	a := &attempt{}
	a.write = a.do
	return a
}}

func (a *attempt) do(fd uintptr) bool {
	for {
		n, err := writeNow(fd, a.b)
		switch {
		case err == nil:
			a.n = n
		case errors.Is(err, syscall.EAGAIN):
		case errors.Is(err, syscall.EINTR):
			continue
		default:
			a.err = os.NewSyscallError("write", err)
		}
		return true
	}
}

func (r *rawConn) readWhenReady(in *lazyInput) error {
	if err := r.raw.Read(in.ready); err != nil {
		return err
	}
	return in.err
}

// read is one call to the kernel. It reports false if nothing has come yet; the buffer is not kept
// while it waits.
func (in *lazyInput) read(fd uintptr) bool {
	in.take()
	for {
		n, err := readNow(fd, in.buffer) // which is empty
		switch {
		case err == nil && n > 0:
			in.end += n
		case err == nil:
			in.err = io.EOF
		case errors.Is(err, syscall.EAGAIN):
			in.release()
			return false
		case errors.Is(err, syscall.EINTR):
			continue
		default:
			in.err = os.NewSyscallError("read", err)
		}
		return true
	}
}
