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

// A real connection is read as one in memory is: whatever the pieces, to the end.
func TestReadingTheKernelsConnections(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer l.Close()
	near, err := net.Dial("tcp", l.Addr().String())
	require.NoError(t, err)
	far, err := Listen(l).Accept()
	require.NoError(t, err)
	defer far.Close()
	in := InputOf(far).(*lazyInput)

	for _, piece := range []string{"he", "llo", " world"} {
		_, err = near.Write([]byte(piece))
		require.NoError(t, err)
	}
	start, err := in.Peek(5)
	require.NoError(t, err)
	assert.Equal(t, "hello", string(start))
	_, err = in.Discard(5)
	require.NoError(t, err)
	rest := make([]byte, 6)
	_, err = io.ReadFull(in, rest)
	require.NoError(t, err)
	assert.Equal(t, " world", string(rest))
	assert.Nil(t, in.buffer)

	near.Close()
	_, err = in.Peek(2)
	require.ErrorIs(t, err, io.EOF)
	require.NoError(t, far.Close())
	_, err = in.Peek(2)
	require.ErrorIs(t, err, net.ErrClosed)
}
