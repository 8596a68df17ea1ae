package socket

import (
	"net"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
)

// What a peer that does not read has not got, waits with us and not in the kernel, where it would take
// megabytes.
func TestLimitUnsent(t *testing.T) {
	taken := func(limited bool) (n int) {
		near, far := tcpPair(t)
		require.NoError(t, far.SetReadBuffer(16<<10))
		// What is taken would grow with what the peer reads.
		require.NoError(t, near.SetWriteBuffer(8<<20))
		if limited {
			LimitUnsent(near)
		}
		raw, err := near.SyscallConn()
		require.NoError(t, err)
		require.NoError(t, raw.Control(func(fd uintptr) {
			limit, err := syscall.GetsockoptInt(int(fd), syscall.IPPROTO_TCP, notSentLowAt())
			require.NoError(t, err)
			require.Equal(t, limited, limit == unsentLimit, limit)
		}))
		conn := Wrap(near)
		for {
			m, err := conn.tryWrite(make([]byte, 4<<10))
			require.NoError(t, err)
			if n += m; m == 0 {
				return n
			}
		}
	}
	without, with := taken(false), taken(true)
	t.Log(without, with)
	require.Less(t, with, without)

	one, other := net.Pipe()
	LimitUnsent(one) // does nothing
	one.Close()
	other.Close()
}
