package socket

import (
	"errors"
	"os"
	"sync"
	"syscall"
	"unsafe"
)

// TryGather is TryWrite for up to as many pieces as a message is handed over in, none of which is empty.
func (r *rawConn) TryGather(some [][]byte) (int, error) {
	g := gathers.Get().(*gathering)
	defer gathers.Put(g)
	for i, piece := range some {
		g.vectors[i].Base = &piece[0]
		g.vectors[i].SetLen(len(piece))
	}
	g.count = len(some)
	err := r.raw.Write(g.write)
	n := g.n
	if err == nil {
		err = g.err
	}
	clear(g.vectors[:g.count])
	g.count, g.n, g.err = 0, 0, nil
	return n, err
}

// gathering is one call, as an attempt is.
type gathering struct {
	write   func(fd uintptr) bool
	vectors [len(pieces{})]syscall.Iovec
	count   int
	n       int
	err     error
}

var gathers = sync.Pool{New: func() any {
	g := &gathering{}
	g.write = g.do
	return g
}}

func (g *gathering) do(fd uintptr) bool {
	for {
		n, _, errno := syscall.Syscall(syscall.SYS_WRITEV, fd, uintptr(unsafe.Pointer(&g.vectors[0])), uintptr(g.count))
		switch {
		case errno == 0:
			g.n = int(n)
		case errors.Is(errno, syscall.EAGAIN):
		case errors.Is(errno, syscall.EINTR):
			continue
		default:
			g.err = os.NewSyscallError("writev", errno)
		}
		return true
	}
}
