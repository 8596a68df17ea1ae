package socket_test

import (
	"io"
	"testing"
	"time"

	"github.com/gorilla/websocket"
	"github.com/stretchr/testify/require"

	"github.com/opampgateway/opampgateway/internal/gatewaytest"
	"github.com/opampgateway/opampgateway/internal/socket"
)

// TestLeave ends a connection with a close frame and nothing else.
func TestLeave(t *testing.T) {
	near, far := gatewaytest.Pipe()
	socket.Leave(near)
	said, err := io.ReadAll(far)
	require.NoError(t, err)
	require.Len(t, said, 8, "one frame: its head, a mask, and a code")
	require.EqualValues(t, 0x88, said[0], "a whole close frame")
	require.EqualValues(t, 0x82, said[1], "masked, of two bytes")
	code := uint16(said[6]^said[2])<<8 | uint16(said[7]^said[3])
	require.EqualValues(t, websocket.CloseNormalClosure, code)

	t.Run("of a server that talks", func(t *testing.T) {
		near, far := gatewaytest.Pipe()
		_, err := far.TryWrite(make([]byte, 64<<10)) // as much as fits
		require.NoError(t, err)
		deaf := &counting{Conn: near}
		socket.Leave(deaf)
		require.Zero(t, deaf.reads, "something was read")
		_, err = far.Write(make([]byte, 64<<10))
		require.Error(t, err, "the connection goes on")
	})

	t.Run("of a server that takes nothing", func(t *testing.T) {
		near, far := gatewaytest.Pipe()
		defer far.Close()
		far.BlackHole()
		done := make(chan struct{})
		go func() {
			defer close(done)
			socket.Leave(near)
		}()
		select {
		case <-done:
		case <-time.After(5 * time.Second):
			t.Fatal("it waits")
		}
	})
}

// counting counts what is read of a connection.
type counting struct {
	*gatewaytest.Conn
	reads int
}

func (c *counting) Read(b []byte) (int, error) {
	c.reads++
	return c.Conn.Read(b)
}
