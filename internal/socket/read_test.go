package socket

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"testing"
	"testing/synctest"

	"github.com/gorilla/websocket"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/opampgateway/opampgateway/internal/memory"
	"github.com/opampgateway/opampgateway/internal/outbox"
)

// agent is whose messages are read, with memory of a budget.
type agent struct {
	*memory.Reader
	*fixture
}

func (a *agent) Received() uint64 { return a.fixture.Received() }
func (a *agent) Paused() bool     { return false }

// Piece is that of a reader for which there is always memory.
func (a *agent) Piece(size, message int) ([]byte, error) {
	return a.Reader.Piece(size, message, func() (context.Context, func()) { panic("there is none") })
}

func (a *agent) Release(n int) { a.Reader.Release(n) }

func (a *agent) Pinged([]byte) {}
func (a *agent) Ponged([]byte) {}

// newAgent returns an agent's connection whose memory is of a budget.
func newAgent(tb testing.TB, limit, capacity int) (*agent, *memory.Budget) {
	tb.Helper()
	b := memory.New(256<<20, unlimited)
	a := &agent{fixture: newFixture(tb, false, limit, capacity)}
	a.Reader = b.NewReader(a)
	a.owner = a
	return a, b
}

// frameOf is a frame of a client, not masked but by zeros.
func frameOf(opcode byte, fin bool, payload []byte) []byte {
	frame := append(appendHeader(nil, opcode, len(payload), true, [4]byte{}), payload...)
	if !fin {
		frame[0] &^= 0x80
	}
	return frame
}

// inFragments is a message in fragments of size bytes each.
func inFragments(message []byte, size int) (b []byte) {
	opcode := byte(binaryMessage)
	for len(message) > size {
		b = append(b, frameOf(opcode, false, message[:size])...)
		message, opcode = message[size:], continuation
	}
	return append(b, frameOf(opcode, true, message)...)
}

func (f *fixture) mustSend(tb testing.TB, b []byte) {
	tb.Helper()
	_, err := f.peerConn.Write(b)
	require.NoError(tb, err)
}

// A message in many fragments costs no more memory than in one, but for the first that needs some.
func TestFragmentsCostNoMemory(t *testing.T) {
	for _, size := range []int{400, 4075, 50_000, 100_000} {
		a, b := newAgent(t, unlimited, 4<<20)
		want := payload(3, size)
		fragments := inFragments(want, 1)
		read := func() {
			message, err := a.Read()
			require.NoError(t, err)
			require.True(t, bytes.Equal(want, message))
			a.Drop(message)
		}
		a.mustSend(t, fragments)
		read() // which makes what is used again from here on
		const messages = 20
		var allocated uint64
		for range messages {
			a.mustSend(t, fragments)
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			read()
			runtime.ReadMemStats(&after)
			allocated += after.TotalAlloc - before.TotalAlloc
		}
		require.Less(t, allocated/messages, uint64(2*size+4096), "%d bytes", size) // pools forget some under the race detector
		require.Zero(t, b.Reading())
	}
}

// What came in fragments is handed over in memory of about its size, and counted as that.
func TestFragmentsEndInMemoryOfTheirSize(t *testing.T) {
	for _, size := range []int{0, 1, 512, 513, 600, 4096, 4097, 20_000, 100_000, 128 << 10, 128<<10 + 1, 300_000, 5_000_000} {
		for _, fragment := range []int{100, 511, 4000, 1 << 20} {
			a, b := newAgent(t, 6_000_000, 16<<20)
			want := payload(5, size)
			a.mustSend(t, inFragments(want, fragment))
			message, err := a.Read()
			require.NoError(t, err)
			require.True(t, bytes.Equal(want, message))
			switch {
			case size <= memory.UncountedMessage:
				assert.LessOrEqual(t, cap(message), memory.UncountedMessage)
				assert.Zero(t, b.Reading())
			default:
				assert.Less(t, cap(message), 2*memory.PieceSize(size)+1, "%d bytes in fragments of %d", size, fragment)
				assert.EqualValues(t, cap(message), b.Reading())
			}
			a.Socket.Release()
			assert.Zero(t, b.Reading())
		}
	}
}

// growing notes what is taken while a message is read.
type growing struct {
	counted
	came  func() int
	check func(held, size, came int)
}

func (g *growing) Piece(size, message int) ([]byte, error) {
	g.check(g.held, size, g.came())
	return g.counted.Piece(size, message)
}

// Beyond the first piece, memory is paid for by the sender; and what it grows from is never more than half of
// the largest.
func TestMemoryGrowsWithWhatCame(t *testing.T) {
	for _, limit := range []int{1000, 5000, 100_000, 150_000, 1_000_000, 3<<20 + 1} {
		for _, size := range []int{limit, limit - 1, limit/2 + 1, limit / 3} {
			for _, fragment := range []int{limit, 4000, 300_000, limit/2 + 10} {
				f := newFixture(t, false, limit, 32<<20)
				sent := inFragments(make([]byte, size), fragment)
				g := &growing{came: func() int { return int(f.Received()) }}
				largest := memory.PieceSize(limit)
				g.check = func(held, size, came int) {
					what := fmt.Sprintf("%d bytes after %d, holding %d, limit %d, fragments of %d", size, came, held, limit, fragment)
					require.LessOrEqual(t, size, max(firstPiece, 4*came), what)
					require.Greater(t, size, came, what)
					require.LessOrEqual(t, held+size, max(largest/2*3, largest+firstPiece), what)
				}
				f.owner = g
				f.mustSend(t, sent)
				message, err := f.Read()
				require.NoError(t, err)
				require.Len(t, message, size)
			}
		}
	}
}

// The length of a frame is 64 bits, an int of some machines is 32.
func TestLengthOfFrame(t *testing.T) {
	for _, size := range []int64{1<<31 - 1, 1 << 31, 1<<32 + 5, 1 << 62} {
		f := newFixture(t, false, 1<<20, 64<<10)
		frame := append(binary.BigEndian.AppendUint64([]byte{0x82, 0xff}, uint64(size)), 0, 0, 0, 0)
		f.mustSend(t, append(frame, bytes.Repeat([]byte("hello"), 20)...))
		message, err := f.Read()
		require.ErrorIs(t, err, ErrTooLarge, "read %q", message)
		var tooLarge *TooLargeError
		require.ErrorAs(t, err, &tooLarge)
		require.Equal(t, size, tooLarge.Size)
	}
	f := newFixture(t, false, 1<<20, 64<<10)
	f.mustSend(t, append(binary.BigEndian.AppendUint64([]byte{0x82, 0xff}, 1<<63), 0, 0, 0, 0))
	_, err := f.Read()
	require.ErrorIs(t, err, ErrProtocol)
}

// What is known of a message that is too large is told, and what follows it is read.
func TestTooLarge(t *testing.T) {
	asEither(t, func(t either) {
		f := newFixture(t, t.client, 1000, 1<<20)
		want := payload(9, 5000)
		for _, test := range []struct {
			fragments []int // sizes
			size      int64
			head      int
		}{
			{[]int{1001}, 1001, 64},
			{[]int{5000}, 5000, 64},
			{[]int{10, 991}, 1001, 64},
			{[]int{10, 10, 1000}, 1020, 64},
			{[]int{900, 90, 11, 500}, 1001, 64},
			{[]int{1000, 1}, 1001, 64},
		} {
			f.peerConn.inPieces(1 << 20)
			sent, opcode := want, byte(binaryMessage)
			for i, size := range test.fragments {
				frame := appendHeader(nil, opcode, size, !t.client, [4]byte{1, 2, 3, 4})
				if i < len(test.fragments)-1 {
					frame[0] &^= 0x80
				}
				part := slices.Clone(sent[:size])
				if !t.client {
					mask(part, [4]byte{1, 2, 3, 4}, 0)
				}
				f.mustSend(t, append(frame, part...))
				sent, opcode = sent[size:], continuation
			}
			require.NoError(t, f.peer.WriteMessage(websocket.BinaryMessage, []byte("next")))

			message, err := f.Read()
			require.Nil(t, message)
			require.True(t, Skippable(err))
			var tooLarge *TooLargeError
			require.ErrorAs(t, err, &tooLarge)
			require.Equal(t, &TooLargeError{Size: test.size, Head: want[:test.head]}, tooLarge)
			require.NotContains(t, err.Error(), string(want[:4]), "what was sent is not for the log")
			require.Zero(t, f.memory.held)

			message, err = f.Read()
			require.NoError(t, err)
			require.Equal(t, "next", string(message))
		}
	})
}

// The end of the connection in the head of a message is just that.
func TestTooLargeAndGone(t *testing.T) {
	f := newFixture(t, false, 1000, 1<<20)
	f.mustSend(t, frameOf(binaryMessage, true, make([]byte, 2000))[:20])
	f.peerConn.Close()
	_, err := f.Read()
	require.Error(t, err)
	require.False(t, Skippable(err))
}

// The reason of a close frame is text (RFC 6455, section 5.5.1).
func TestCloseReasonIsUTF8(t *testing.T) {
	for reason, valid := range map[string]bool{"": true, "bye": true, "адье": true, "\xff": false, "caf\xe9": false, "\xed\xa0\x80": false, "\xc3": false} {
		f := newFixture(t, false, 1000, 1<<20)
		f.mustSend(t, frameOf(closing, true, append([]byte{0x03, 0xe8}, reason...)))
		_, err := f.Read()
		var closed *websocket.CloseError
		require.Equal(t, valid, errors.As(err, &closed), "%q", reason)
		require.Equal(t, !valid, errors.Is(err, ErrProtocol), "%q", reason)
	}
}

// Progress is what comes of messages; who only pings makes none.
func TestReceived(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t, false, 10_000, 1<<20)
		go func() {
			for {
				if _, err := f.Read(); err != nil && !Skippable(err) {
					return
				}
			}
		}()
		for _, test := range []struct {
			sent []byte
			want uint64
		}{
			{frameOf(binaryMessage, true, make([]byte, 200)), 200},
			{frameOf(ping, true, make([]byte, 100)), 200},
			{frameOf(binaryMessage, false, make([]byte, 5000)), 5200},
			{frameOf(ping, true, make([]byte, 100)), 5200},
			{frameOf(continuation, true, make([]byte, 5000))[:14], 5210 - 4}, // in the middle
		} {
			f.mustSend(t, test.sent)
			synctest.Wait()
			require.Equal(t, test.want, f.Received())
		}
		f.peerConn.Close()
	})
}

// Who is skipped shows signs of life, and takes no memory.
func TestSkippingTakesNoMemory(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := newAgent(t, 1000, 1<<20)
		frame := frameOf(binaryMessage, true, make([]byte, 100_000))
		a.mustSend(t, frame[:2000])
		_, err := a.Read()
		require.ErrorIs(t, err, ErrTooLarge)
		received := a.Received()
		go func() { _, _ = a.Read() }()
		for i := 2000; i < len(frame); i += 1000 {
			synctest.Wait()
			a.Sweep()
			a.mustSend(t, frame[i:min(len(frame), i+1000)])
			synctest.Wait()
			require.Zero(t, a.Sweep(), "no sign of life")
			require.Zero(t, b.Reading())
		}
		require.Equal(t, received, a.Received())
		a.peerConn.Close()
	})
}

// BenchmarkRead is what a message of an agent costs from the network to the end of its outbox.
func BenchmarkRead(b *testing.B) {
	for _, size := range []int{200, 2 << 10, 20 << 10, 64 << 10} {
		for _, fragment := range []int{1 << 20, 4 << 10} {
			b.Run(fmt.Sprintf("%dB/fragments=%dB", size, fragment), func(b *testing.B) {
				a, budget := newAgent(b, unlimited, 8<<20)
				frame := inFragments(payload(1, size), fragment)
				few := bytes.Repeat(frame, 1<<20/len(frame))
				b.ReportAllocs()
				b.SetBytes(int64(size))
				for i := range b.N {
					if i%(1<<20/len(frame)) == 0 {
						b.StopTimer()
						a.mustSend(b, few)
						b.StartTimer()
					}
					message, err := a.Read()
					if err != nil || len(message) != size {
						b.Fatal(err)
					}
					e := outbox.Entry[string]{Frame: message}
					budget.Up.Take(e.Memory())
					a.Socket.Release()
					budget.Up.Give(e.Memory())
					budget.Recycle(message)
				}
			})
		}
	}
}
