package gatewaytest

import (
	"context"
	"io"
	"net"
	"os"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/net/nettest"
)

// TestConnIsAConn holds the connections in memory to what is expected of a net.Conn.
func TestConnIsAConn(t *testing.T) {
	nettest.TestConn(t, func() (c1, c2 net.Conn, stop func(), err error) {
		near, far := Pipe()
		return near, far, func() {
			near.Close()
			far.Close()
		}, nil
	})
}

// TestConnEnds looks at the ways in which a connection ends.
func TestConnEnds(t *testing.T) {
	write := func(t *testing.T, c *Conn) {
		t.Helper()
		n, err := c.Write([]byte("hello"))
		require.NoError(t, err)
		require.Equal(t, 5, n)
	}
	read := func(c *Conn) (string, error) {
		buf := make([]byte, 100)
		n, err := c.Read(buf)
		return string(buf[:n]), err
	}
	for name, test := range map[string]func(t *testing.T, near, far *Conn){
		"closed: what was written is read": func(t *testing.T, near, far *Conn) {
			t.Helper()
			t.Helper()
			write(t, near)
			near.Close()
			got, err := read(far)
			require.NoError(t, err)
			require.Equal(t, "hello", got)
			_, err = read(far)
			require.Equal(t, io.EOF, err)
		},
		"closed with something unread: reset": func(t *testing.T, near, far *Conn) {
			t.Helper()
			t.Helper()
			write(t, near)
			write(t, far)
			near.Close()
			_, err := read(far)
			require.ErrorIs(t, err, syscall.ECONNRESET)
		},
		"written to the closed: reset": func(t *testing.T, near, far *Conn) {
			t.Helper()
			t.Helper()
			write(t, near)
			near.Close()
			write(t, far)
			_, err := read(far)
			require.ErrorIs(t, err, syscall.ECONNRESET)
			_, err = far.Write([]byte("hello"))
			require.ErrorIs(t, err, syscall.ECONNRESET)
		},
		"reset: what was not read is lost": func(t *testing.T, near, far *Conn) {
			t.Helper()
			t.Helper()
			write(t, near)
			near.Reset()
			for _, c := range []*Conn{near, far} {
				_, err := read(c)
				require.ErrorIs(t, err, syscall.ECONNRESET)
			}
		},
		"black hole: nobody knows": func(t *testing.T, near, far *Conn) {
			t.Helper()
			t.Helper()
			near.BlackHole()
			write(t, near)
			near.Close()
			require.NoError(t, far.SetReadDeadline(time.Now().Add(time.Hour)))
			_, err := read(far)
			require.ErrorIs(t, err, os.ErrDeadlineExceeded)
			require.NoError(t, far.SetWriteDeadline(time.Now().Add(time.Hour)))
			n, err := far.Write(make([]byte, 2*BufferSize))
			require.ErrorIs(t, err, os.ErrDeadlineExceeded)
			require.Equal(t, BufferSize, n)
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				near, far := Pipe()
				test(t, near, far)
			})
		})
	}
}

// TestNetwork dials those who listen, and those who do not.
func TestNetwork(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := NewNetwork()
		_, err := n.Dial(t.Context(), "tcp", "here:1")
		require.ErrorIs(t, err, syscall.ECONNREFUSED)
		l, err := n.Listen("here:1")
		require.NoError(t, err)
		_, err = n.Listen("here:1")
		require.ErrorIs(t, err, syscall.EADDRINUSE)

		near, err := n.Dial(t.Context(), "tcp", "here:1")
		require.NoError(t, err)
		far, err := l.Accept()
		require.NoError(t, err)
		require.Equal(t, near.LocalAddr(), far.RemoteAddr())
		require.Equal(t, "here:1", near.RemoteAddr().String())

		waiting, err := n.Dial(t.Context(), "tcp", "here:1")
		require.NoError(t, err)
		require.NoError(t, l.Close())
		_, err = l.Accept()
		require.ErrorIs(t, err, net.ErrClosed)
		_, err = waiting.Read(make([]byte, 1))
		require.ErrorIs(t, err, syscall.ECONNRESET)

		n.Silence("here:1", true)
		ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
		defer cancel()
		begin := time.Now()
		_, err = n.Dial(ctx, "tcp", "here:1")
		require.ErrorIs(t, err, context.DeadlineExceeded)
		require.Equal(t, time.Hour, time.Since(begin))
	})
}

// TestThrottle has a slow line take its time.
func TestThrottle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := NewNetwork()
		l, err := n.Listen("here:1")
		require.NoError(t, err)
		n.Throttle(1000)
		near, err := n.Dial(t.Context(), "tcp", "here:1")
		require.NoError(t, err)
		far, err := l.Accept()
		require.NoError(t, err)
		go func() {
			for range 10 {
				_, _ = near.Write(make([]byte, 1000))
			}
			near.Close()
		}()
		begin := time.Now()
		got, err := io.ReadAll(far)
		require.NoError(t, err)
		require.Len(t, got, 10_000)
		require.Equal(t, 9*time.Second, time.Since(begin))
	})
}
