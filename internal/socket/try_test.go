//go:build unix

package socket

import (
	"errors"
	"io"
	"net"
	"syscall"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// The kernel takes what it has room for, and says how much that was.
func TestTryOnTheKernelsConnections(t *testing.T) {
	for network, address := range map[string]string{"tcp": "127.0.0.1:0", "unix": t.TempDir() + "/socket"} {
		t.Run(network, func(t *testing.T) {
			l, err := net.Listen(network, address)
			require.NoError(t, err)
			defer l.Close()
			near, err := net.Dial(network, l.Addr().String())
			require.NoError(t, err)
			far, err := Listen(l).Accept()
			require.NoError(t, err)
			defer far.Close()

			conn := far.(*Conn)
			data, sent := make([]byte, 1<<20), 0
			for n := -1; n != 0; sent += n {
				require.Less(t, sent, 1<<30)
				n, err = conn.tryWrite(data)
				require.NoError(t, err)
			}
			require.Positive(t, sent)
			_, err = io.CopyN(io.Discard, near, int64(sent))
			require.NoError(t, err)
			n, err := conn.tryWrite([]byte("again"))
			require.NoError(t, err)
			assert.Equal(t, 5, n)

			near.Close()                    // with something unread, which resets it
			_, _ = io.Copy(io.Discard, far) // until it is
			_, err = conn.tryWrite([]byte("?"))
			assert.True(t, errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE), err)
		})
	}
}
