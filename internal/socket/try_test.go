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

	"github.com/opampgateway/opampgateway/internal/outbox"
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

// Large messages go through the kernel byte for byte, however little it takes at once.
func TestLargeMessagesOnTheKernelsConnections(t *testing.T) {
	for name, client := range map[string]bool{"as client": true, "as server": false} {
		t.Run(name, func(t *testing.T) {
			near, far := tcpPair(t)
			require.NoError(t, near.SetWriteBuffer(20_000))
			LimitUnsent(near)
			conn := Wrap(near)
			s := New(conn, InputOf(conn), client, unlimited, writeTimeout, &counted{})
			raw := make(chan []byte)
			go func() {
				b, _ := io.ReadAll(far)
				raw <- b
			}()
			var want [][]byte
			for round := range 3 {
				var batch []entry
				for i, size := range []int{100, 64 << 10, 16 << 10, 200, 1 << 20, 0, 70_000} {
					message := payload(uint64(round+i), size)
					want = append(want, message)
					batch = append(batch, entry{Kind: outbox.Message, Frame: message})
				}
				tried, err := 0, error(nil)
				if !client {
					tried, err = TryBatch(s, batch)
				}
				require.NoError(t, err)
				written, err := WriteBatch(s, batch[tried:])
				require.NoError(t, err)
				require.Equal(t, len(batch), tried+written)
			}
			s.Close()
			wantMessages(t, want, readBack(t, client, <-raw))
		})
	}
}
