//go:build unix

package socket

import (
	"net"
	"os"
	"sync"
	"syscall"
)

// newTrier returns what writes to conn without waiting; nil if its kind cannot.
func newTrier(conn net.Conn) trier {
	if sc, ok := conn.(syscall.Conn); ok {
		if raw, err := sc.SyscallConn(); err == nil {
			return &rawTrier{raw}
		}
	}
	return nil
}

type rawTrier struct{ raw syscall.RawConn }

// TryWrite is one call to the kernel, which does not wait since Go's sockets never do.
func (r *rawTrier) TryWrite(b []byte) (int, error) {
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
		n, err := syscall.Write(int(fd), a.b)
		switch err { //nolint:errorlint // the kernel's own are bare
		case nil:
			a.n = n
		case syscall.EINTR:
			continue
		case syscall.EAGAIN:
		default:
			a.err = os.NewSyscallError("write", err)
		}
		return true
	}
}
