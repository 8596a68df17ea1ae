//go:build linux || darwin

package socket

import (
	"net"
	"runtime"
	"syscall"
)

// unsentLimit is how much more than what is on its way the kernel takes, in bytes.
const unsentLimit = 16 << 10

// notSentLowAt is TCP_NOTSENT_LOWAT.
func notSentLowAt() int {
	if runtime.GOOS == "darwin" {
		return 0x201
	}
	return 0x19
}

// LimitUnsent has the kernel take little more for a TCP connection than is on its way to the peer, where
// it can be told so: what waits is to wait where turns can be taken. For other connections it does nothing.
func LimitUnsent(conn net.Conn) {
	tcp, ok := conn.(*net.TCPConn)
	if !ok {
		return
	}
	if raw, err := tcp.SyscallConn(); err == nil {
		// Without it the connection works, too.
		_ = raw.Control(func(fd uintptr) {
			_ = syscall.SetsockoptInt(int(fd), syscall.IPPROTO_TCP, notSentLowAt(), unsentLimit)
		})
	}
}
