package fault

import (
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// Who listens in hears what who dialed says, even when it goes nowhere, and how the connection ended.
func TestTap(t *testing.T) {
	for name, test := range map[string]struct {
		hit   func(*Conn)
		by    Ender
		after bool // whether what is said afterwards is heard
		cut   bool
	}{
		"finish":  {(*Conn).Finish, Fault, true, false},
		"swallow": {(*Conn).Swallow, Fault, true, false},
		"reset":   {(*Conn).Reset, Fault, false, true},
		"nothing": {func(*Conn) {}, Dialer, true, false},
	} {
		t.Run(name, func(t *testing.T) {
			target, err := net.Listen("tcp", "127.0.0.1:0")
			require.NoError(t, err)
			defer target.Close()
			var mu sync.Mutex
			var heard strings.Builder
			text := func() string { mu.Lock(); defer mu.Unlock(); return heard.String() }
			line, err := OpenTapped(target.Addr().String(), func(*Conn) (up, down func([]byte)) {
				return func(b []byte) { mu.Lock(); defer mu.Unlock(); heard.Write(b) }, nil
			})
			require.NoError(t, err)
			defer line.Close()

			near, err := net.Dial("tcp", line.Address())
			require.NoError(t, err)
			defer near.Close()
			far, err := target.Accept()
			require.NoError(t, err)
			go func() { _, _ = io.Copy(io.Discard, far); far.Close() }()
			_, err = near.Write([]byte("before "))
			require.NoError(t, err)
			require.Eventually(t, func() bool { return text() == "before " }, 10*time.Second, time.Millisecond)
			c := line.Conns()[0]
			test.hit(c)
			_, _ = near.Write([]byte("after"))
			near.Close()
			if test.after {
				require.Eventually(t, func() bool { return text() == "before after" }, 10*time.Second, time.Millisecond)
			}
			require.Eventually(t, func() bool { return c.End().By == test.by }, 10*time.Second, time.Millisecond)
			assert.Equal(t, test.cut, !c.End().Cut.IsZero())
		})
	}
}

// What a target says before it closes reaches who dialed, although the target has not read all, and so
// resets the connection; and who dialed sees an end, not a reset.
func TestTapLastWords(t *testing.T) {
	target, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer target.Close()
	line, err := OpenTapped(target.Addr().String(), func(*Conn) (up, down func([]byte)) {
		return func([]byte) {}, func([]byte) {}
	})
	require.NoError(t, err)
	defer line.Close()
	for range 50 {
		near, err := net.Dial("tcp", line.Address())
		require.NoError(t, err)
		far, err := target.Accept()
		require.NoError(t, err)
		var speaking sync.WaitGroup
		speaking.Go(func() {
			for err := error(nil); err == nil; {
				_, err = near.Write(make([]byte, 10_000))
			}
		})
		_, err = io.ReadFull(far, make([]byte, 100_000))
		require.NoError(t, err)
		_, err = far.Write([]byte("1009"))
		require.NoError(t, err)
		far.Close()
		said, err := io.ReadAll(near)
		near.Close()
		speaking.Wait()
		require.NoError(t, err)
		require.Equal(t, "1009", string(said))
	}
}

// Who listens in on what comes from the target may end the connection at it.
func TestTapDown(t *testing.T) {
	target, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer target.Close()
	line, err := OpenTapped(target.Addr().String(), func(c *Conn) (up, down func([]byte)) {
		return nil, func(b []byte) {
			if strings.Contains(string(b), "bad") {
				c.Reset()
			}
		}
	})
	require.NoError(t, err)
	defer line.Close()
	near, err := net.Dial("tcp", line.Address())
	require.NoError(t, err)
	defer near.Close()
	far, err := target.Accept()
	require.NoError(t, err)
	defer far.Close()
	_, err = far.Write([]byte("good"))
	require.NoError(t, err)
	said := make([]byte, 100)
	n, err := near.Read(said)
	require.NoError(t, err)
	require.Equal(t, "good", string(said[:n]))
	_, err = far.Write([]byte("bad"))
	require.NoError(t, err)
	_, err = near.Read(said)
	require.Error(t, err)
}
