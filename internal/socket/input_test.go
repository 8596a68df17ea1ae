package socket

import (
	"bufio"
	"bytes"
	"net"
	"testing"

	"github.com/stretchr/testify/require"
)

// readCounter counts the calls that a connection is read with.
type readCounter struct {
	net.Conn
	reads int
}

func (c *readCounter) Read(b []byte) (int, error) {
	c.reads++
	return c.Conn.Read(b)
}

// Of a link, many small messages are read at once, and large ones into their own memory.
func TestLinkInput(t *testing.T) {
	const size = 64 << 10
	near, far := memPipe(64 << 20)
	defer near.Close()
	defer far.Close()
	conn := &readCounter{Conn: near}
	frame := func(seed uint64, size int) []byte { return fragments(payload(seed, size), 1<<30, false) }
	write := func(b []byte) {
		_, err := far.Write(b)
		require.NoError(t, err)
	}
	write(frame(1, 25))
	before := bufio.NewReader(near) // who has shaken hands
	_, err := before.Peek(10)
	require.NoError(t, err)
	in := LinkInput(conn, before, size)
	s := New(Wrap(near), in, true, unlimited, writeTimeout, &counted{})
	read := func(seed uint64, size int) {
		t.Helper()
		message, err := s.Read()
		require.NoError(t, err)
		require.True(t, bytes.Equal(payload(seed, size), message))
	}
	read(1, 25)
	require.Zero(t, conn.reads, "it was there already")

	const small = 2000 // of 100 bytes
	for range small {
		write(frame(2, 100))
	}
	for range small {
		read(2, 100)
	}
	require.LessOrEqual(t, conn.reads, small*102/size+1)

	conn.reads = 0
	const large = 100
	for range large {
		write(frame(3, 2*size))
	}
	for i := range large {
		read(3, 2*size)
		if i > 0 {
			require.LessOrEqual(t, in.(*linkInput).end, inputSize, "more of it went by way of the buffer")
		}
	}
	require.LessOrEqual(t, conn.reads, 2*large+1)

	conn.reads = 0
	for range small {
		write(frame(2, 100))
	}
	for range small {
		read(2, 100)
	}
	require.LessOrEqual(t, conn.reads, small*102/size+2, "little is read at once after a large one only")
}
