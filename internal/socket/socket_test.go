package socket

import (
	"bufio"
	"bytes"
	"crypto/ed25519"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/big"
	"math/rand/v2"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gorilla/websocket"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/opampgateway/opampgateway/internal/memory"
	"github.com/opampgateway/opampgateway/internal/monotonic"
	"github.com/opampgateway/opampgateway/internal/outbox"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

type entry = outbox.Entry[string]

const (
	unlimited    = 64 << 20
	writeTimeout = 30 * time.Second
)

// counted is an owner with memory without end. It counts what is held, and notes what it is told.
type counted struct {
	held, most     int
	pinged, ponged []string
}

func (c *counted) Piece(size, _ int) ([]byte, error) {
	c.held += size
	c.most = max(c.most, c.held)
	return make([]byte, size), nil
}

func (c *counted) Shrink(piece []byte, n int) []byte {
	c.Return(piece)
	smaller, _ := c.Piece(memory.PieceSize(n), n)
	copy(smaller, piece[:n])
	return smaller
}

func (c *counted) Return(piece []byte)   { c.held -= len(piece) }
func (c *counted) Release(n int)         { c.held -= n }
func (c *counted) Pinged(payload []byte) { c.pinged = append(c.pinged, string(payload)) }
func (c *counted) Ponged(payload []byte) { c.ponged = append(c.ponged, string(payload)) }

// fixture is a Socket and its peer, which is gorilla's.
type fixture struct {
	memory counted
	*Socket
	conn     *memConn        // of the Socket
	ws       *websocket.Conn // of the same end
	peer     *websocket.Conn
	peerConn *memConn
}

// newFixture connects a Socket that is the client, or the server, over buffers of capacity bytes.
func newFixture(tb testing.TB, client bool, limit, capacity int) *fixture {
	tb.Helper()
	f := &fixture{}
	// The handshake must not depend on how little is taken later.
	f.conn, f.peerConn = memPipe(max(capacity, 4<<10))
	if client {
		f.ws, f.peer = handshake(tb, Wrap(f.conn), f.peerConn)
	} else {
		f.peer, f.ws = handshake(tb, f.peerConn, Wrap(f.conn))
	}
	f.conn.out.capacity, f.conn.in.capacity = capacity, capacity
	f.conn.out.writes = 0
	in := InputOf(f.ws.NetConn())
	if client {
		in = LinkInput(f.ws.NetConn(), bufio.NewReader(nil), 2*inputSize)
	}
	f.Socket = New(f.ws.NetConn(), in, client, limit, writeTimeout, &f.memory)
	tb.Cleanup(func() {
		f.conn.Close()
		f.peerConn.Close()
	})
	return f
}

// write writes messages in one batch.
func (f *fixture) write(messages ...[]byte) error {
	batch := make([]entry, len(messages))
	for i, message := range messages {
		batch[i] = entry{Kind: outbox.Message, Frame: message}
	}
	_, err := WriteBatch(f.Socket, batch)
	return err
}

// received is what the peer gets to hear until the connection ends.
type received struct {
	messages [][]byte
	pings    []string
	err      error
}

// listen has the peer read in the background until the connection ends.
func (f *fixture) listen() <-chan received {
	all := make(chan received, 1)
	go func() { all <- f.hear() }()
	return all
}

// hear has the peer read until the connection ends.
func (f *fixture) hear() (r received) {
	f.peer.SetPingHandler(func(payload string) error {
		r.pings = append(r.pings, payload)
		return nil
	})
	for {
		kind, message, err := f.peer.ReadMessage()
		if err != nil {
			r.err = err
			return r
		}
		if kind != websocket.BinaryMessage {
			r.err = fmt.Errorf("message of kind %d", kind)
			return r
		}
		r.messages = append(r.messages, message)
	}
}

// payload returns size bytes that are not like those of another seed.
func payload(seed uint64, size int) []byte {
	random := rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8)})
	b := make([]byte, size)
	_, _ = random.Read(b) // never fails
	return b
}

// either is a test of the Socket as client and as server.
type either struct {
	*testing.T
	client bool
}

// asEither runs a test in a bubble, with the Socket as client and as server.
func asEither(t *testing.T, test func(t either)) {
	t.Helper()
	for name, client := range map[string]bool{"as client": true, "as server": false} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { test(either{t, client}) })
		})
	}
}

// The sizes at which the length takes more bytes, at which a batch is full, and real ones.
var sizes = []int{
	0, 1, 2, 3, 4, 5, 7, 8, 9, 25, 124, 125, 126, 127, 128, 4095, 4096, 4097,
	batchSize - 15, batchSize - 14, batchSize - 8, batchSize - 4, batchSize - 3, batchSize - 1, batchSize, batchSize + 1, 3*batchSize + 5,
	65534, 65535, 65536, 65537, chunkSize - 1, chunkSize, chunkSize + 1, 1 << 20, 5<<20 + 3,
}

func TestMessagesArriveByteForByte(t *testing.T) {
	asEither(t, func(t either) {
		f := newFixture(t, t.client, unlimited, 64<<10)
		heard := f.listen()
		sent := make([][]byte, 0, len(sizes))
		for i, size := range sizes {
			message := payload(uint64(i), size)
			before := bytes.Clone(message)
			require.NoError(t, f.write(message))
			require.True(t, bytes.Equal(before, message), "%d bytes: the message was changed", size)
			sent = append(sent, message)
		}
		f.Close()
		wantMessages(t, sent, (<-heard).messages)
	})
}

func TestABatchArrivesAsItsMessages(t *testing.T) {
	asEither(t, func(t either) {
		f := newFixture(t, t.client, unlimited, 64<<10)
		heard := f.listen()
		var sent [][]byte
		for i := range 2000 {
			size := sizes[i%len(sizes)]
			if i%50 != 0 {
				size %= 500
			}
			sent = append(sent, payload(uint64(i), size))
		}
		before := make([][]byte, len(sent))
		for i := range sent {
			before[i] = bytes.Clone(sent[i])
		}
		require.NoError(t, f.write(sent...))
		f.Close()
		wantMessages(t, before, sent)
		wantMessages(t, sent, (<-heard).messages)
	})
}

func wantMessages(tb testing.TB, want, got [][]byte) {
	tb.Helper()
	require.Len(tb, got, len(want), "messages")
	for i := range want {
		require.True(tb, bytes.Equal(want[i], got[i]), "message %d of %d bytes is another of %d", i, len(want[i]), len(got[i]))
	}
}

// A heartbeat each of hundreds of agents costs one call, not hundreds.
func TestABatchOfSmallMessagesIsHandedOverAtOnce(t *testing.T) {
	asEither(t, func(t either) {
		f := newFixture(t, t.client, unlimited, 4<<20)
		heartbeats := make([][]byte, 400)
		for i := range heartbeats {
			heartbeats[i] = payload(uint64(i), 25)
		}
		require.NoError(t, f.write(heartbeats...))
		assert.Equal(t, 1, f.conn.writes())
		require.NoError(t, f.write(payload(1, 1<<20)))
		atOnce := maxGathered * fragmentSize
		if t.client {
			atOnce = largeSize / batchSize * fragmentSize
		}
		assert.Equal(t, 1+1<<20/atOnce+1, f.conn.writes())
	})
}

// Without masks, anybody could make what an agent says look like something else to a proxy
// (RFC 6455, section 10.3); and each frame has a new one.
func TestAClientMasksEachFrameAnew(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t, true, unlimited, 1<<20)
		plain := make([]byte, 100) // whose masked bytes are the mask
		require.NoError(t, f.write(plain, plain, plain))
		masks := map[string]bool{}
		for range 3 {
			frame := make([]byte, 6+100)
			_, err := io.ReadFull(f.peerConn, frame)
			require.NoError(t, err)
			require.Equal(t, []byte{0x82, 0x80 | 100}, frame[:2])
			require.Equal(t, bytes.Repeat(frame[2:6], 25), frame[6:])
			masks[string(frame[2:6])] = true
		}
		assert.Len(t, masks, 3)
	})
}

func TestPingsPongsAndACloseArriveAmongMessages(t *testing.T) {
	asEither(t, func(t either) {
		f := newFixture(t, t.client, unlimited, 1<<20)
		var pongs []string
		f.peer.SetPongHandler(func(payload string) error {
			pongs = append(pongs, payload)
			return nil
		})
		written, err := WriteBatch(f.Socket, []entry{
			{Kind: outbox.Message, Frame: []byte("one")},
			{Kind: outbox.Ping},
			{Kind: outbox.Pong, Frame: []byte("still here")},
			{Kind: outbox.Message, Frame: []byte("two")},
			{Kind: outbox.Close, Frame: websocket.FormatCloseMessage(websocket.CloseServiceRestart, "back soon")},
		})
		require.NoError(t, err)
		assert.Equal(t, 5, written)
		heard := f.hear()
		wantMessages(t, [][]byte{[]byte("one"), []byte("two")}, heard.messages)
		assert.Equal(t, []string{""}, heard.pings)
		assert.Equal(t, []string{"still here"}, pongs)
		assert.Equal(t, &websocket.CloseError{Code: websocket.CloseServiceRestart, Text: "back soon"}, heard.err)
	})
}

func TestStaleEntriesAreLeftOut(t *testing.T) {
	asEither(t, func(t either) {
		f := newFixture(t, t.client, unlimited, 1<<20)
		asked := 0
		stale := func() bool { asked++; return true }
		fresh := func() bool { asked++; return false }
		batch := []entry{
			{Kind: outbox.Message, Frame: []byte("goodbye of an agent that is back"), Stale: stale},
			{Kind: outbox.Message, Frame: []byte("one")},
			{Kind: outbox.Message, Frame: []byte("goodbye"), Stale: fresh},
			{Kind: outbox.Message, Frame: []byte("another"), Stale: stale},
		}
		written, err := WriteBatch(f.Socket, batch)
		require.NoError(t, err)
		assert.Equal(t, 4, written)
		assert.Equal(t, 3, asked)
		f.Close()
		wantMessages(t, [][]byte{[]byte("one"), []byte("goodbye")}, f.hear().messages)
		assert.Equal(t, "another", string(batch[3].Frame), "the batch is the outbox's")

		// A batch of nothing else writes nothing.
		f = newFixture(t, t.client, unlimited, 1<<20)
		written, err = WriteBatch(f.Socket, batch[3:])
		require.NoError(t, err)
		assert.Equal(t, 1, written)
		assert.Zero(t, f.conn.unread())
	})
}

// link is what both kinds of connection are to their outbox.
type link struct{ *fixture }

func (l link) WriteBatch(batch []entry) (int, error) { return WriteBatch(l.Socket, batch) }
func (l link) TryBatch(batch []entry) (int, error)   { return TryBatch(l.Socket, batch) }

// What was left out gives its room back; otherwise an outbox would be full one day, for ever.
func TestStaleEntriesGiveTheirRoomBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t, true, unlimited, 1<<20)
		o := outbox.New[string](link{f}, 10_000, &memory.New(memory.MinSize(1<<20, 1), 1<<20).Up)
		defer o.Abort()
		for range 100 {
			require.NoError(t, o.Try(entry{Kind: outbox.Message, Frame: make([]byte, 1000), Stale: func() bool { return true }}))
			synctest.Wait()
		}
		require.NoError(t, o.Try(entry{Kind: outbox.Message, Frame: make([]byte, 9000)}))
		synctest.Wait()
		require.NoError(t, o.Try(entry{Kind: outbox.Message, Frame: make([]byte, 20_000)}), "one of any size when it is empty")
	})
}

func TestReadReturnsMessagesAsTheyWereSent(t *testing.T) {
	asEither(t, func(t either) {
		f := newFixture(t, t.client, unlimited, 64<<10)
		go func() {
			for i, size := range sizes {
				_ = f.peer.WriteMessage(websocket.BinaryMessage, payload(uint64(i), size))
			}
			f.peerConn.Close()
		}()
		var got, want [][]byte
		for {
			message, err := f.Read()
			if err != nil {
				require.False(t, Skippable(err))
				break
			}
			require.NotNil(t, message)
			got = append(got, message)
		}
		for i, size := range sizes {
			want = append(want, payload(uint64(i), size))
		}
		wantMessages(t, want, got) // all kept until here: each has memory of its own
	})
}

// Ten thousand heartbeats waiting somewhere must not cost ten thousand read buffers.
func TestReadReturnsSmallMessagesInLittleMemory(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t, false, unlimited, 1<<20)
		for size, want := range map[int]int{25: 512, 512: 512, 513: 513, 2000: 2000} { // 512 is used again
			require.NoError(t, f.peer.WriteMessage(websocket.BinaryMessage, payload(1, size)))
			message, err := f.Read()
			require.NoError(t, err)
			assert.Equal(t, want, cap(message))
		}
	})
}

// opamp-go sends what is above 4 KiB in fragments, and anybody may ping in between.
func TestReadJoinsFragments(t *testing.T) {
	asEither(t, func(t either) {
		for _, piece := range []int{1 << 20, 1000, 1} {
			f := newFixture(t, t.client, unlimited, 1<<20)
			f.peerConn.inPieces(piece)
			want := payload(7, 50_000)
			w, err := f.peer.NextWriter(websocket.BinaryMessage)
			require.NoError(t, err)
			for i := 0; i < len(want); i += 5000 {
				_, err := w.Write(want[i : i+5000])
				require.NoError(t, err)
				require.NoError(t, f.peer.WriteControl(websocket.PingMessage, fmt.Append(nil, i/5000), time.Now().Add(time.Second)))
			}
			require.NoError(t, w.Close())
			require.NoError(t, f.peer.WriteMessage(websocket.BinaryMessage, []byte("next")))

			message, err := f.Read()
			require.NoError(t, err)
			wantMessages(t, [][]byte{want}, [][]byte{message})
			assert.Equal(t, "0 1 2 3 4 5 6 7 8 9", strings.Join(f.memory.pinged, " "))
			message, err = f.Read()
			require.NoError(t, err)
			assert.Equal(t, "next", string(message))
		}
	})
}

func TestReadKeepsExactlyToTheLimit(t *testing.T) {
	for _, limit := range []int{1, 125, 126, 1000, 4095, 4096, 4097, 8191, 8192, 8193, 10_000, 1 << 20} {
		t.Run(strconv.Itoa(limit), func(t *testing.T) {
			asEither(t, func(t either) {
				f := newFixture(t, t.client, limit, 64<<10)
				sent := []int{limit, limit + 1, limit - 1, 2 * limit, 5*limit + 1, limit + 1, limit, 0}
				go func() {
					for i, size := range sent {
						message := payload(uint64(i), size)
						w, _ := f.peer.NextWriter(websocket.BinaryMessage) // in fragments, if it is large
						_, _ = w.Write(message[:size/3])
						_, _ = w.Write(message[size/3:])
						_ = w.Close()
					}
				}()
				for i, size := range sent {
					message, err := f.Read()
					if size > limit {
						require.ErrorIs(t, err, ErrTooLarge, "%d bytes", size)
						require.True(t, Skippable(err))
						require.Nil(t, message)
						continue
					}
					require.NoError(t, err, "%d bytes", size)
					require.True(t, bytes.Equal(payload(uint64(i), size), message), "%d bytes", size)
				}
			})
		})
	}
}

// However large a message is, no more memory is taken for it than for one at the limit.
func TestReadTakesNoMoreThanTheLimitOfAMessage(t *testing.T) {
	asEither(t, func(t either) {
		for _, limit := range []int{5000, 10_000, 100_000} {
			f := newFixture(t, t.client, limit, 2<<20)
			require.NoError(t, f.peer.WriteMessage(websocket.BinaryMessage, make([]byte, 1<<20)))
			sent := f.peerConn.unread()
			_, err := f.Read()
			require.ErrorIs(t, err, ErrTooLarge)
			assert.LessOrEqual(t, sent-f.peerConn.unread(), limit+2*inputSize)
		}
	})
}

// Most agents say nothing most of the time.
func TestWhoWaitsToReadHoldsNoBuffer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t, false, unlimited, 1<<20)
		in := f.in.(*lazyInput)
		for _, sizes := range [][]int{{25}, {200, 3, 0, 1}, {inputSize - 8}, {100_000, 25}} {
			for i, size := range sizes {
				require.NoError(t, f.peer.WriteMessage(websocket.BinaryMessage, payload(uint64(i), size)))
			}
			for i, size := range sizes {
				message, err := f.Read()
				require.NoError(t, err)
				require.True(t, bytes.Equal(payload(uint64(i), size), message))
			}
			require.Nil(t, in.buffer, sizes)
		}
		header := []byte{0x82, 0x80}
		_, err := f.peerConn.Write(header) // and its key later
		require.NoError(t, err)
		read := make(chan []byte)
		go func() {
			message, _ := f.Read()
			read <- message
		}()
		synctest.Wait()
		_, err = f.peerConn.Write(make([]byte, 4))
		require.NoError(t, err)
		assert.Equal(t, []byte{}, <-read)
		assert.Nil(t, in.buffer)
	})
}

func TestReadSkipsText(t *testing.T) {
	asEither(t, func(t either) {
		f := newFixture(t, t.client, unlimited, 1<<20)
		require.NoError(t, f.peer.WriteMessage(websocket.TextMessage, []byte("hello")))
		require.NoError(t, f.peer.WriteMessage(websocket.TextMessage, bytes.Repeat([]byte("hello"), 10_000)))
		require.NoError(t, f.peer.WriteMessage(websocket.TextMessage, nil))
		require.NoError(t, f.peer.WriteMessage(websocket.BinaryMessage, []byte("an OpAMP message")))
		for range 3 {
			_, err := f.Read()
			require.ErrorIs(t, err, ErrText)
			require.True(t, Skippable(err))
		}
		message, err := f.Read()
		require.NoError(t, err)
		assert.Equal(t, "an OpAMP message", string(message))
	})
}

func TestReadPassesPingsAndPongsOn(t *testing.T) {
	asEither(t, func(t either) {
		f := newFixture(t, t.client, unlimited, 1<<20)
		deadline := time.Now().Add(time.Second)
		require.NoError(t, f.peer.WriteControl(websocket.PingMessage, nil, deadline))
		require.NoError(t, f.peer.WriteControl(websocket.PingMessage, []byte("are you there?"), deadline))
		require.NoError(t, f.peer.WriteControl(websocket.PongMessage, nil, deadline))
		require.NoError(t, f.peer.WriteControl(websocket.PongMessage, []byte("number 1"), deadline))
		require.NoError(t, f.peer.WriteControl(websocket.PongMessage, bytes.Repeat([]byte("x"), maxControl), deadline))
		require.NoError(t, f.peer.WriteMessage(websocket.BinaryMessage, []byte("a message")))
		message, err := f.Read()
		require.NoError(t, err)
		assert.Equal(t, "a message", string(message))
		assert.Equal(t, []string{"", "are you there?"}, f.memory.pinged)
		assert.Equal(t, []string{"", "number 1", strings.Repeat("x", maxControl)}, f.memory.ponged)
		assert.Zero(t, f.conn.writes(), "the answer is for the outbox to write")
	})
}

func TestReadReturnsHowThePeerClosed(t *testing.T) {
	asEither(t, func(t either) {
		for _, test := range []struct {
			payload []byte
			want    *websocket.CloseError
		}{
			{websocket.FormatCloseMessage(websocket.CloseNormalClosure, "bye"), &websocket.CloseError{Code: websocket.CloseNormalClosure, Text: "bye"}},
			{websocket.FormatCloseMessage(websocket.CloseTryAgainLater, ""), &websocket.CloseError{Code: websocket.CloseTryAgainLater}},
			{nil, &websocket.CloseError{Code: websocket.CloseNoStatusReceived}},
		} {
			f := newFixture(t, t.client, unlimited, 1<<20)
			require.NoError(t, f.peer.WriteControl(websocket.CloseMessage, test.payload, time.Now().Add(time.Second)))
			_, err := f.Read()
			assert.Equal(t, test.want, err)
			assert.False(t, Skippable(err))
			assert.Zero(t, f.conn.writes(), "the answer is for the outbox to write")
		}
	})
}

func TestReadEndsWithTheConnection(t *testing.T) {
	asEither(t, func(t either) {
		f := newFixture(t, t.client, unlimited, 1<<20)
		require.NoError(t, f.peer.WriteMessage(websocket.BinaryMessage, []byte("last words")))
		w, err := f.peer.NextWriter(websocket.BinaryMessage)
		require.NoError(t, err)
		_, err = w.Write(payload(1, 10_000)) // a part of which stays unsaid
		require.NoError(t, err)
		f.peerConn.Close()
		message, err := f.Read()
		require.NoError(t, err)
		assert.Equal(t, "last words", string(message))
		_, err = f.Read()
		require.Error(t, err, "half a message is none")
		require.False(t, Skippable(err))

		f = newFixture(t, t.client, unlimited, 1<<20)
		w, err = f.peer.NextWriter(websocket.TextMessage)
		require.NoError(t, err)
		_, err = w.Write(make([]byte, 10_000))
		require.NoError(t, err)
		f.peerConn.Close()
		_, err = f.Read()
		require.ErrorIs(t, err, ErrText)
		_, err = f.Read()
		require.Error(t, err, "it ends in what is read past")
		require.False(t, Skippable(err))

		f = newFixture(t, t.client, unlimited, 1<<20)
		time.AfterFunc(time.Second, f.Close)
		_, err = f.Read()
		require.ErrorIs(t, err, net.ErrClosed)
		require.False(t, Skippable(err))
	})
}

func TestAStalledWriteFailsAfterTheWriteTimeout(t *testing.T) {
	asEither(t, func(t either) {
		f := newFixture(t, t.client, unlimited, 10_000)
		f.conn.out.buffer = make([]byte, 10_000) // nobody reads, and nothing more fits
		start := time.Now()
		require.ErrorIs(t, f.write([]byte("anybody?")), ErrStalled)
		assert.Equal(t, writeTimeout, time.Since(start))
	})
}

// The progress at the start of a write is only noticed at its deadline.
func TestAWriteThatStallsOnItsWayFails(t *testing.T) {
	asEither(t, func(t either) {
		f := newFixture(t, t.client, unlimited, 10_000)
		start := time.Now()
		written, err := WriteBatch(f.Socket, []entry{
			{Kind: outbox.Message, Frame: payload(1, 5000)},
			{Kind: outbox.Message, Frame: payload(2, 1<<20)},
		})
		require.ErrorIs(t, err, ErrStalled)
		assert.LessOrEqual(t, written, 1)
		assert.GreaterOrEqual(t, time.Since(start), writeTimeout)
		assert.LessOrEqual(t, time.Since(start), 2*writeTimeout)
	})
}

func TestASlowPeerIsNotAStalledOne(t *testing.T) {
	asEither(t, func(t either) {
		f := newFixture(t, t.client, unlimited, 10_000)
		message := payload(1, 300_000)
		start := time.Now()
		done := make(chan error)
		go func() { done <- f.write(message) }()
		for range 70 { // 5 KB, every 20 s
			time.Sleep(20 * time.Second)
			select {
			case err := <-done:
				require.NoError(t, err)
				assert.Greater(t, time.Since(start), 10*writeTimeout)
				return
			default:
				f.peerConn.take(t, 5000)
			}
		}
		t.Error("the message was not written")
	})
}

func TestHurryBoundsTheLastWords(t *testing.T) {
	asEither(t, func(t either) {
		t.Log("a write that waits already")
		f := newFixture(t, t.client, unlimited, 10_000)
		f.conn.out.buffer = make([]byte, 10_000)
		start := time.Now()
		time.AfterFunc(5*time.Second, f.Hurry)
		err := f.write([]byte("anybody?"))
		require.ErrorIs(t, err, os.ErrDeadlineExceeded)
		require.NotErrorIs(t, err, ErrStalled, "the peer was not given the time to stall")
		assert.Equal(t, 6*time.Second, time.Since(start))

		t.Log("writes that come later, whether or not there is progress")
		f = newFixture(t, t.client, unlimited, 10_000)
		f.Hurry()
		start = time.Now()
		require.NoError(t, f.write([]byte("what waited")))
		time.Sleep(700 * time.Millisecond)
		f.Hurry() // it does not begin anew
		require.Error(t, f.write(payload(1, 1<<20)))
		assert.Equal(t, time.Second, time.Since(start))
		require.Error(t, f.write([]byte("too late")))
		assert.Equal(t, time.Second, time.Since(start))

		t.Log("the reader, who waits for the peer's answer")
		_, err = f.Read()
		wantTimeout(t, err)
		assert.Equal(t, 2*time.Second, time.Since(start))

		t.Log("the reader who waits already")
		f = newFixture(t, t.client, unlimited, 10_000)
		start = time.Now()
		time.AfterFunc(5*time.Second, f.Hurry)
		_, err = f.Read()
		wantTimeout(t, err)
		assert.Equal(t, 7*time.Second, time.Since(start))
	})
}

// wantTimeout asserts that a read has timed out; gorilla makes an error of its own of that.
func wantTimeout(tb testing.TB, err error) {
	tb.Helper()
	var timeout net.Error
	require.ErrorAs(tb, err, &timeout)
	require.True(tb, timeout.Timeout(), err)
	require.False(tb, Skippable(err))
}

func TestHurryLeavesTimeForTheLastWords(t *testing.T) {
	asEither(t, func(t either) {
		f := newFixture(t, t.client, unlimited, 10_000)
		heard := f.listen()
		f.Hurry()
		require.NoError(t, f.write(payload(1, 100_000), []byte("goodbye")))
		require.NoError(t, f.peer.WriteMessage(websocket.BinaryMessage, []byte("goodbye to you")))
		time.Sleep(1900 * time.Millisecond)
		message, err := f.Read()
		require.NoError(t, err)
		assert.Equal(t, "goodbye to you", string(message))
		f.Close()
		assert.Len(t, (<-heard).messages, 2)
	})
}

func TestCloseEndsAWriteAtOnce(t *testing.T) {
	asEither(t, func(t either) {
		f := newFixture(t, t.client, unlimited, 10_000)
		start := time.Now()
		time.AfterFunc(time.Second, f.Close)
		require.ErrorIs(t, f.write(payload(1, 1<<20)), net.ErrClosed)
		assert.Equal(t, time.Second, time.Since(start))
		_, err := f.Read()
		require.ErrorIs(t, err, net.ErrClosed)
	})
}

// crypto/tls waits 5 s to say goodbye on a connection whose peer does not read.
func TestCloseDoesNotWaitForTLS(t *testing.T) {
	certificate := selfSigned(t)
	synctest.Test(t, func(t *testing.T) {
		conn, peerConn := memPipe(10_000)
		defer peerConn.Close()
		ours := tls.Server(Wrap(conn), &tls.Config{Certificates: []tls.Certificate{certificate}})
		// InsecureSkipVerify: what is tested is how the connection ends.
		theirs := tls.Client(peerConn, &tls.Config{InsecureSkipVerify: true})
		peer, ws := handshake(t, theirs, ours)
		s := New(ws.NetConn(), InputOf(ws.NetConn()), false, unlimited, writeTimeout, &counted{})

		_, err := WriteBatch(s, []entry{{Kind: outbox.Message, Frame: []byte("hello")}})
		require.NoError(t, err)
		_, message, err := peer.ReadMessage()
		require.NoError(t, err)
		require.Equal(t, "hello", string(message))

		conn.out.capacity = 0
		start := time.Now()
		s.Close()
		assert.Zero(t, time.Since(start))
		_, err = s.Read()
		require.ErrorIs(t, err, net.ErrClosed)
	})
}

func TestATLSPeerThatStallsIsNoticed(t *testing.T) {
	certificate := selfSigned(t)
	synctest.Test(t, func(t *testing.T) {
		conn, peerConn := memPipe(10_000)
		defer peerConn.Close()
		ours := tls.Server(Wrap(conn), &tls.Config{Certificates: []tls.Certificate{certificate}})
		theirs := tls.Client(peerConn, &tls.Config{InsecureSkipVerify: true})
		_, ws := handshake(t, theirs, ours)
		s := New(ws.NetConn(), InputOf(ws.NetConn()), false, unlimited, writeTimeout, &counted{})
		defer s.Close()
		start := time.Now()
		_, err := WriteBatch(s, []entry{{Kind: outbox.Message, Frame: payload(1, 1<<20)}})
		require.ErrorIs(t, err, ErrStalled)
		assert.LessOrEqual(t, time.Since(start), 2*writeTimeout)
	})
}

func selfSigned(tb testing.TB) tls.Certificate {
	tb.Helper()
	public, private, err := ed25519.GenerateKey(nil)
	require.NoError(tb, err)
	template := &x509.Certificate{SerialNumber: big.NewInt(1)}
	certificate, err := x509.CreateCertificate(rand.NewChaCha8([32]byte{}), template, template, public, private)
	require.NoError(tb, err)
	return tls.Certificate{Certificate: [][]byte{certificate}, PrivateKey: private}
}

func TestSweepCountsSilence(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t, false, unlimited, 1<<20)
		go func() {
			for {
				if _, err := f.Read(); err != nil && !Skippable(err) {
					return
				}
			}
		}()
		deadline := time.Now().Add(time.Hour)
		heartbeat, fragment := []byte("heartbeat"), []byte("not the end")
		w, err := f.peer.NextWriter(websocket.BinaryMessage)
		require.NoError(t, err)
		for _, sign := range []func() error{
			func() error { return f.peer.WriteControl(websocket.PingMessage, nil, deadline) },
			func() error { return f.peer.WriteControl(websocket.PongMessage, nil, deadline) },
			func() error { _, err := w.Write(bytes.Repeat(fragment, 1000)); return err },
			func() error { return w.Close() },
			func() error { return f.peer.WriteMessage(websocket.BinaryMessage, heartbeat) },
			func() error { return f.peer.WriteMessage(websocket.TextMessage, heartbeat) },
			func() error { f.Excuse(); return nil },
		} {
			for quiet := 1; quiet <= 3; quiet++ {
				require.Equal(t, quiet, f.Sweep())
			}
			require.NoError(t, sign())
			synctest.Wait()
			require.Zero(t, f.Sweep())
		}
		require.Equal(t, 1, f.Sweep())
	})
}

// A message above the limit may take long to read past; its bytes are signs of life all the same.
func TestSweepHearsWhatIsReadPast(t *testing.T) {
	for name, kind := range map[string]int{"too large": websocket.BinaryMessage, "text": websocket.TextMessage} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFixture(t, true, 1000, 1<<20)
				read := make(chan error, 10)
				go func() {
					for {
						_, err := f.Read()
						read <- err
						if err != nil && !Skippable(err) {
							return
						}
					}
				}()
				header := appendHeader(nil, byte(kind), 100_000, false, [4]byte{})
				_, err := f.peerConn.Write(append(header, make([]byte, 5000)...))
				require.NoError(t, err)
				synctest.Wait()
				require.True(t, Skippable(<-read))
				for range 95 {
					f.Sweep()
					_, err := f.peerConn.Write(make([]byte, 1000))
					require.NoError(t, err)
					synctest.Wait()
					require.Zero(t, f.Sweep())
				}
				require.NoError(t, f.peer.WriteMessage(websocket.BinaryMessage, []byte("next")))
				synctest.Wait()
				require.NoError(t, <-read)
			})
		})
	}
}

func TestSweepSeesTheProgressOfABlockedWrite(t *testing.T) {
	asEither(t, func(t either) {
		f := newFixture(t, t.client, unlimited, 10_000)
		wrote := make(chan error, 1)
		go func() { wrote <- f.write(payload(1, 1<<20)) }()
		synctest.Wait()
		require.Equal(t, 1, f.Sweep(), "what the kernel took proves nothing")
		for range 5 {
			f.peerConn.take(t, 5000) // alice reads, if slowly, and has no time to say anything
			time.Sleep(writeTimeout - stallPart)
			synctest.Wait()
			require.Zero(t, f.Sweep())
		}
		time.Sleep(writeTimeout / 2)
		require.Equal(t, 1, f.Sweep(), "no progress since")
		require.ErrorIs(t, <-wrote, ErrStalled)
		require.Equal(t, 2, f.Sweep(), "a write that failed is none either")
	})
}

func TestSweepIsNotFooledByWritesThatDoNotBlock(t *testing.T) {
	asEither(t, func(t either) {
		f := newFixture(t, t.client, unlimited, 1<<20) // nobody is there to read
		for quiet := 1; quiet < 10; quiet++ {
			require.NoError(t, f.write([]byte("anybody?"), []byte("hello?")))
			require.Equal(t, quiet, f.Sweep())
		}
	})
}

// writeAndBreak writes a batch to a peer whose connection breaks after breaksAfter bytes (or not
// at all), and compares what arrived with what WriteBatch says: all it counts as written has
// arrived whole, or was left out as stale, since nothing else will be written again.
func writeAndBreak(t *testing.T, client bool, batch []entry, breaksAfter int) {
	t.Helper()
	f := newFixture(t, client, unlimited, 1<<30)
	f.conn.breakAfter(breaksAfter)
	var fresh []entry
	for _, e := range batch {
		if e.Stale == nil {
			fresh = append(fresh, e)
		}
	}
	written, err := WriteBatch(f.Socket, batch)
	f.Close()
	sent := bytes.Clone(f.conn.out.buffer)

	var arrived [][]byte
	f.peer.SetPingHandler(func(payload string) error {
		arrived = append(arrived, []byte(payload))
		return nil
	})
	for {
		_, message, err := f.peer.ReadMessage()
		if err != nil {
			break
		}
		arrived = append(arrived, message)
	}
	wantMessages(t, arrived, readBack(t, client, sent))
	require.LessOrEqual(t, len(arrived), len(fresh))
	for i := range arrived {
		require.True(t, bytes.Equal(fresh[i].Frame, arrived[i]), "frame %d of %d bytes is another of %d", i, len(fresh[i].Frame), len(arrived[i]))
	}
	if err == nil {
		require.Equal(t, len(batch), written)
		require.Len(t, arrived, len(fresh))
		return
	}
	require.ErrorIs(t, err, errBroken)
	require.GreaterOrEqual(t, written, 0)
	counted := 0
	for _, e := range batch[:written] {
		if e.Stale == nil {
			counted++
		}
	}
	require.LessOrEqual(t, counted, len(arrived), "counted as written, and lost")
	// Those that will be written again although they arrived are from the last hand-over only,
	// the first of them perhaps with no more than its end.
	again := 0
	for _, e := range fresh[min(counted+1, len(arrived)):len(arrived)] {
		again += len(e.Frame)
	}
	require.LessOrEqual(t, again, batchSize, "would be written again")
}

// listening is an owner who hears of pings among the messages.
type listening struct {
	counted
	heard [][]byte
}

func (l *listening) Pinged(payload []byte) { l.heard = append(l.heard, payload) }

// readBack returns the messages and pings in what a client, or a server, has written, as a Socket at the
// other end reads them.
func readBack(t *testing.T, client bool, sent []byte) [][]byte {
	t.Helper()
	f := newFixture(t, !client, unlimited, 1<<30)
	owner := &listening{}
	f.owner = owner
	f.mustSend(t, sent)
	f.peerConn.Close()
	for {
		message, err := f.Read()
		if err != nil {
			require.False(t, Skippable(err))
			require.NotErrorIs(t, err, ErrProtocol)
			return owner.heard
		}
		owner.heard = append(owner.heard, message)
	}
}

// header is what a test wants to know of that of a frame.
type header struct {
	opcode byte
	fin    bool
	masked bool
	key    [4]byte
	length int
}

// headersOf returns those of the frames in b, which have to be whole.
func headersOf(t *testing.T, b []byte) (all []header) {
	t.Helper()
	for len(b) > 0 {
		h := header{opcode: b[0] & 0x0f, fin: b[0]&finBit != 0, masked: b[1]&0x80 != 0, length: int(b[1] & 0x7f)}
		require.NotEqual(t, 127, h.length, "length of 64 bits")
		if b = b[2:]; h.length == 126 {
			h.length = int(binary.BigEndian.Uint16(b))
			b = b[2:]
		}
		if h.masked {
			b = b[copy(h.key[:], b):]
		}
		require.GreaterOrEqual(t, len(b), h.length)
		b = b[h.length:]
		all = append(all, h)
	}
	return all
}

// Some proxies and clients take no frame above 32 KiB, or so.
func TestLargeMessagesAreWrittenInFragments(t *testing.T) {
	asEither(t, func(t either) {
		for _, size := range []int{
			fragmentSize - 1, fragmentSize, fragmentSize + 1, 2 * fragmentSize, 2*fragmentSize + 125, 2*fragmentSize + 126,
			64 << 10, largeSize, maxGathered * fragmentSize, maxGathered*fragmentSize + 1, 1 << 20,
		} {
			f := newFixture(t, t.client, unlimited, 4<<20)
			written, err := WriteBatch(f.Socket, []entry{
				{Kind: outbox.Message, Frame: []byte("small")},
				{Kind: outbox.Message, Frame: payload(1, size)},
				{Kind: outbox.Ping, Frame: payload(2, maxControl)},
			})
			require.NoError(t, err)
			require.Equal(t, 3, written)

			keys := map[[4]byte]bool{}
			var got []header
			for _, h := range headersOf(t.T, f.conn.out.buffer) {
				require.Equal(t, t.client, h.masked)
				keys[h.key] = true
				h.masked, h.key = false, [4]byte{}
				got = append(got, h)
			}
			want := []header{{opcode: binaryMessage, fin: true, length: 5}}
			opcode := byte(binaryMessage)
			for left := size; left > 0; left -= fragmentSize {
				want = append(want, header{opcode: opcode, fin: left <= fragmentSize, length: min(left, fragmentSize)})
				opcode = continuation
			}
			want = append(want, header{opcode: ping, fin: true, length: maxControl})
			require.Equal(t, want, got, "%d bytes", size)
			require.LessOrEqual(t, fragmentSize, 16<<10)
			if t.client {
				require.Len(t, keys, len(want), "a key for each frame")
			}
		}
	})
}

func TestNothingCountsAsWrittenThatWasNotHandedOver(t *testing.T) {
	for name, client := range map[string]bool{"as client": true, "as server": false} {
		t.Run(name, func(t *testing.T) {
			random := rand.New(rand.NewPCG(1, 2))
			for range 300 {
				var batch []entry
				total := 0
				for i := range 1 + random.IntN(20) {
					size := random.IntN(200)
					if random.IntN(4) == 0 {
						size = sizes[random.IntN(len(sizes)-2)]
					}
					e := entry{Kind: outbox.Message, Frame: payload(uint64(i), size)}
					if random.IntN(4) == 0 {
						e.Stale = func() bool { return true }
					}
					batch = append(batch, e)
					total += size + 8
				}
				writeAndBreak(t, client, batch, random.IntN(total+1))
				writeAndBreak(t, client, batch, -1)
			}
		})
	}
}

// What there is no room for at once is written later, from just where it was left.
func TestWhatWasTriedIsFinishedLater(t *testing.T) {
	certificate := selfSigned(t)
	for _, name := range []string{"client", "server", "tls"} {
		t.Run(name, func(t *testing.T) {
			random := rand.New(rand.NewPCG(1, 2))
			for range 100 {
				var batch []entry
				var sent [][]byte
				for i := range 1 + random.IntN(60) {
					size := random.IntN(1000)
					if random.IntN(10) == 0 {
						size = sizes[random.IntN(len(sizes)-2)]
					}
					e := entry{Kind: outbox.Message, Frame: payload(uint64(i), size)}
					if random.IntN(4) == 0 {
						asked := false
						e.Stale = func() bool {
							require.False(t, asked, "asked twice")
							asked = true
							return asked
						}
					} else {
						sent = append(sent, e.Frame)
					}
					batch = append(batch, e)
				}
				room := random.IntN(40_000)
				synctest.Test(t, func(t *testing.T) {
					var f *fixture
					if name == "tls" {
						f = newTLSFixture(t, certificate)
					} else {
						f = newFixture(t, name == "client", unlimited, 1<<20)
					}
					f.conn.out.capacity = room
					tried, err := TryBatch(f.Socket, batch)
					require.NoError(t, err)
					require.LessOrEqual(t, f.conn.unread(), room)
					heard := f.listen()
					written, err := WriteBatch(f.Socket, batch[tried:])
					require.NoError(t, err)
					require.Equal(t, len(batch), tried+written)
					f.Close()
					wantMessages(t, sent, (<-heard).messages)
				})
			}
		})
	}
}

// A large message to an agent needs nobody else's time if there is room for it; and once begun, it is
// finished, whatever has become of it.
func TestALargeMessageIsTriedToo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t, false, unlimited, 1<<20)
		small, large := entry{Kind: outbox.Message, Frame: []byte("small")}, entry{Kind: outbox.Message, Frame: payload(1, 64<<10)}
		tried, err := TryBatch(f.Socket, []entry{small, large, small, large})
		require.NoError(t, err)
		require.Equal(t, 4, tried)
		require.Nil(t, f.batch)

		stale := false
		large.Stale = func() bool { return stale }
		f.conn.out.capacity = len(f.conn.out.buffer) + 40_000
		batch := []entry{small, large, small}
		tried, err = TryBatch(f.Socket, batch)
		require.NoError(t, err)
		require.Equal(t, 1, tried)
		require.Nil(t, f.batch)
		stale = true
		heard := f.listen()
		written, err := WriteBatch(f.Socket, batch[tried:])
		require.NoError(t, err)
		require.Equal(t, 2, written)
		f.Close()
		wantMessages(t, [][]byte{
			small.Frame, large.Frame, small.Frame, large.Frame, small.Frame, large.Frame, small.Frame,
		}, (<-heard).messages)

		// One that takes longer is for somebody else to write.
		f = newFixture(t, false, unlimited, 4<<20)
		tried, err = TryBatch(f.Socket, []entry{{Kind: outbox.Message, Frame: payload(1, 1<<20)}})
		require.NoError(t, err)
		require.Zero(t, tried)
		require.LessOrEqual(t, f.conn.unread(), maxGathered*batchSize)
	})
}

// newTLSFixture is newFixture for a server with TLS.
func newTLSFixture(t *testing.T, certificate tls.Certificate) *fixture {
	t.Helper()
	f := &fixture{}
	f.conn, f.peerConn = memPipe(1 << 20)
	ours := tls.Server(Wrap(f.conn), &tls.Config{Certificates: []tls.Certificate{certificate}})
	theirs := tls.Client(f.peerConn, &tls.Config{InsecureSkipVerify: true})
	f.peer, f.ws = handshake(t, theirs, ours)
	f.Socket = New(ours, InputOf(ours), false, unlimited, writeTimeout, &f.memory)
	t.Cleanup(func() {
		f.conn.Close()
		f.peerConn.Close()
	})
	return f
}

// TLS answers by itself, too; a peer that has it answer again and again, and reads nothing, must not
// have the answers pile up.
func TestWhatIsKeptIsBounded(t *testing.T) {
	near, _ := memPipe(100)
	conn := Wrap(near)
	conn.keep()
	var err error
	kept := 0
	for ; err == nil; kept += 50 {
		require.LessOrEqual(t, kept, maxRest+100)
		_, err = conn.Write(make([]byte, 50))
	}
	require.ErrorIs(t, err, ErrStalled)
	assert.Greater(t, kept, tlsChunkSize, "what TLS makes of a batch has to fit")
}

// A connection that breaks while it is only tried is an error like any other.
func TestTryingABrokenConnectionFails(t *testing.T) {
	for _, client := range []bool{true, false} {
		f := newFixture(t, client, unlimited, 1<<20)
		f.conn.breakAfter(10)
		written, err := TryBatch(f.Socket, []entry{{Kind: outbox.Message, Frame: make([]byte, 100)}})
		require.ErrorIs(t, err, errBroken)
		assert.Zero(t, written)
	}
}

// A small message to an agent costs one call and no memory.
func TestTryingAllocatesNothing(t *testing.T) {
	f := newFixture(t, false, unlimited, 1<<20)
	f.conn.out.discards = true
	batch := []entry{{Kind: outbox.Message, Frame: make([]byte, 200)}}
	assert.Zero(t, testing.AllocsPerRun(1000, func() {
		if n, err := TryBatch(f.Socket, batch); n != 1 || err != nil {
			t.Fail()
		}
	}))
}

// A link has many pongs to hear, whose payloads are numbers.
func TestHearingPongsAllocatesNothing(t *testing.T) {
	for _, client := range []bool{true, false} {
		f := newFixture(t, client, unlimited, 1<<20)
		f.owner = &deaf{}
		const pongs = 1000
		sent := appendHeader(nil, pong, smallPong, !client, [4]byte{})
		sent = bytes.Repeat(append(sent, "12345678"...), pongs+1)
		f.mustSend(t, sent)
		f.in = bufio.NewReaderSize(f.conn, 1<<20) // so that nothing else is measured
		assert.Zero(t, testing.AllocsPerRun(pongs, func() {
			if err := errors.Join(f.header(), f.control()); err != nil {
				t.Fatal(err)
			}
		}))
	}
}

// deaf is an owner who does nothing with what it is told.
type deaf struct{ counted }

func (*deaf) Ponged([]byte) {}

// The two ways to lose a message, by hand.
func TestAMessageThatWaitedInTheBatchIsNotLost(t *testing.T) {
	stale := func() bool { return true }
	small := entry{Kind: outbox.Message, Frame: []byte("small")}
	large := entry{Kind: outbox.Message, Frame: make([]byte, 20_000)}
	for name, batch := range map[string][]entry{
		"when a large one behind it fails":  {small, small, {Kind: outbox.Message, Frame: make([]byte, batchSize-5)}},
		"when one behind it is not written": {small, {Kind: outbox.Message, Frame: []byte("goodbye"), Stale: stale}},
		"when large ones are before it":     {large, large, large, small},
		"when many behind it are not":       {{Frame: nil, Stale: stale}, small, {Stale: stale}, {Stale: stale}, small, {Stale: stale}},
	} {
		t.Run(name, func(t *testing.T) {
			for _, client := range []bool{true, false} {
				writeAndBreak(t, client, batch, 0)
				writeAndBreak(t, client, batch, 45_000)
			}
		})
	}
}

// A large message that was handed over whole is not written again when what follows it fails.
func TestALargeMessageCountsAsWritten(t *testing.T) {
	for _, client := range []bool{true, false} {
		f := newFixture(t, client, unlimited, 1<<30)
		large := entry{Kind: outbox.Message, Frame: payload(1, 50_000)}
		f.conn.breakAfter(len(fragments(large.Frame, fragmentSize, client)))
		written, err := WriteBatch(f.Socket, []entry{large, {Kind: outbox.Message, Frame: []byte("small")}})
		require.ErrorIs(t, err, errBroken)
		require.Equal(t, 1, written)
	}
}

// What is put together is never more than there is memory for, which is used again.
func TestABatchDoesNotGrow(t *testing.T) {
	for _, client := range []bool{true, false} {
		for size := fragmentSize - 200; size <= fragmentSize; size++ {
			f := newFixture(t, client, unlimited, 1<<30)
			f.conn.out.discards = true
			require.NoError(t, f.writeFrame(binaryMessage, make([]byte, size)))
			require.NoError(t, f.writeFrame(binaryMessage, make([]byte, 200_000)))
			require.Contains(t, []int{batchSize, largeSize}, cap(*f.batch))
			require.NoError(t, f.flush())
		}
	}
}

// What could not be written to a connection that broke must not turn up on another one.
func TestABrokenConnectionLeavesNothingForOthers(t *testing.T) {
	for range 100 {
		broken := newFixture(t, true, unlimited, 1<<20)
		broken.conn.breakAfter(0)
		require.Error(t, broken.write([]byte("alice's secrets")))

		other := newFixture(t, true, unlimited, 1<<20)
		require.NoError(t, other.write([]byte("hello")))
		other.Close()
		wantMessages(t, [][]byte{[]byte("hello")}, other.hear().messages)
	}
}

// FuzzWriteBatch makes a batch of its input: two bytes of size and one of flags for each entry.
func FuzzWriteBatch(f *testing.F) {
	const isStale, isPing, isLarge = 1, 2, 4
	f.Add([]byte{0, 5, 0, 0, 5, isStale, 0x40, 0, 0}, -1, true)
	f.Add([]byte{0, 5, 0, 0, 5, isStale}, 0, false)
	f.Add([]byte{0, 5, 0, 0x3f, 0xf0, 0, 0xff, 0xff, 0}, 10, true)
	f.Add([]byte{0, 125, isPing, 0xff, 0xff, isLarge, 0, 0, 0, 0, 126, 0}, 300_000, false)
	f.Add(bytes.Repeat([]byte{0, 25, 0}, 600), 18_000, true)
	f.Fuzz(func(t *testing.T, input []byte, breaksAfter int, client bool) {
		var batch []entry
		for spec := range slices.Chunk(input[:min(len(input), 3000)], 3) {
			if len(spec) < 3 {
				break
			}
			size, flags := int(binary.BigEndian.Uint16(spec)), spec[2]
			e := entry{Kind: outbox.Message}
			switch {
			case flags&isPing != 0:
				e.Kind, size = outbox.Ping, size%126
			case flags&isLarge != 0:
				size *= 5
			case len(input) > 60:
				size %= 2000
			}
			e.Frame = payload(uint64(len(batch)), size)
			if flags&isStale != 0 {
				e.Stale = func() bool { return true }
			}
			batch = append(batch, e)
		}
		writeAndBreak(t, client, batch, max(-1, breaksAfter))
	})
}

// FuzzRead has a peer send anything at all. What gorilla takes for messages are messages, text
// and what is above the limit is skipped, and nothing else happens.
func FuzzRead(f *testing.F) {
	frame := func(opcode byte, payload string) []byte {
		return append(appendHeader(nil, opcode, len(payload), false, [4]byte{}), payload...)
	}
	masked := func(opcode byte, payload string) []byte {
		key := [4]byte{1, 2, 3, 4}
		b := []byte(payload)
		mask(b, key, 0)
		return append(appendHeader(nil, opcode, len(payload), true, key), b...)
	}
	f.Add(slices.Concat(masked(2, "binary"), masked(9, "ping"), masked(1, "text"), masked(2, strings.Repeat("x", 5000))), 10_000, 7, false)
	f.Add(slices.Concat(masked(2, "binary"), frame(2, "not masked")), 100, 10, false)
	f.Add(slices.Concat([]byte("\x02\x83\x00\x00\x00\x00abc\x89\x80\x00\x00\x00\x00\x80\x83\x01\x02\x03\x04ghi"), masked(2, "")), 100, 10, false)
	f.Add(slices.Concat(frame(2, "binary"), frame(9, "ping"), frame(1, "text"), frame(2, "again"), frame(8, "\x03\xe8bye")), 100, 1, true)
	f.Add(slices.Concat([]byte("\x02\x03abc\x89\x00\x00\x03def\x80\x03ghi"), frame(2, strings.Repeat("x", 300)), frame(2, "")), 8, 1000, true)
	f.Add(frame(2, strings.Repeat("y", 70_000)), 70_000, 5000, true)
	f.Add([]byte("\x81\x7e\xff\xffthe start of a long text"), 100, 7, true)
	f.Add([]byte("\x82\x7f\xff\xff\xff\xff\xff\xff\xff\xffhello"), 1<<20, 3, true)
	f.Fuzz(func(t *testing.T, sent []byte, limit, piece int, client bool) {
		limit, piece = max(1, min(limit, 1<<20)), max(1, min(piece, 1<<20))
		open := func() *fixture {
			f := newFixture(t, client, limit, 1<<30)
			f.peerConn.inPieces(piece)
			_, err := f.peerConn.Write(sent)
			require.NoError(t, err)
			f.peerConn.Close()
			return f
		}
		reference := open().ws
		reference.SetPingHandler(func(string) error { return nil })
		f := open()
		for {
			kind, want, wantErr := reference.ReadMessage()
			got, err := f.Read()
			switch {
			case wantErr != nil: // in the middle of a message that may have been skipped by then
				if Skippable(err) {
					_, err = f.Read()
				}
				require.Error(t, err)
				require.False(t, Skippable(err))
				return
			case kind == websocket.TextMessage:
				require.ErrorIs(t, err, ErrText)
			case len(want) > limit:
				require.ErrorIs(t, err, ErrTooLarge)
			default:
				require.NoError(t, err)
				require.True(t, bytes.Equal(want, got))
			}
		}
	})
}

func TestOnlySkippableErrorsAreSkippable(t *testing.T) {
	assert.True(t, Skippable(fmt.Errorf("read: %w", ErrText)))
	assert.True(t, Skippable(ErrTooLarge))
	for _, err := range []error{ErrStalled, io.EOF, net.ErrClosed, os.ErrDeadlineExceeded, &websocket.CloseError{Code: 1000}, errors.New("text message")} {
		assert.False(t, Skippable(err), err)
	}
}

func BenchmarkWriteBatch(b *testing.B) {
	for _, size := range []int{25, 2 << 10, 100 << 10, 4 << 20} {
		for name, client := range map[string]bool{"up": true, "down": false} {
			b.Run(fmt.Sprintf("%dB/%s", size, name), func(b *testing.B) {
				f := newFixture(b, client, unlimited, 1<<20)
				f.conn.out.discards = true
				batch := make([]entry, max(1, min(100, 1<<20/size)))
				for i := range batch {
					batch[i] = entry{Kind: outbox.Message, Frame: make([]byte, size)}
				}
				b.ReportAllocs()
				b.SetBytes(int64(size * len(batch)))
				for b.Loop() {
					if _, err := WriteBatch(f.Socket, batch); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
	}
}

// A peer that takes something all the time is not stalled, however short the write timeout is.
func TestProgressIsSeenWithinAShortWriteTimeout(t *testing.T) {
	certificate := selfSigned(t)
	for _, timeout := range []time.Duration{time.Second, 1500 * time.Millisecond, 2 * time.Second, 30 * time.Second} {
		for _, name := range []string{"client", "server", "tls"} {
			t.Run(name+" "+timeout.String(), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					var f *fixture
					if name == "tls" {
						f = newTLSFixture(t, certificate)
					} else {
						f = newFixture(t, name == "client", unlimited, 1<<20)
					}
					f.conn.out.capacity = 16 << 10
					f.writeTimeout = timeout
					done := make(chan error)
					go func() { done <- f.write(payload(1, 256<<10)) }()
					for { // 10 KiB a second
						time.Sleep(400 * time.Millisecond)
						select {
						case err := <-done:
							require.NoError(t, err)
							return
						default:
							f.peerConn.take(t, min(f.conn.unread(), 4<<10))
						}
					}
				})
			})
		}
	}
}

// One that takes nothing is noticed soon, however short it is.
func TestAShortWriteTimeoutEnds(t *testing.T) {
	asEither(t, func(t either) {
		f := newFixture(t, t.client, unlimited, 10_000)
		f.writeTimeout = time.Second
		start := time.Now()
		time.AfterFunc(100*time.Millisecond, func() { f.peerConn.take(t, 1000) })
		require.ErrorIs(t, f.write(payload(1, 1<<20)), ErrStalled)
		assert.LessOrEqual(t, time.Since(start), 2*time.Second)
	})
}

// Below a proxy with TLS a write that timed out cannot be taken up again: it is made of small pieces.
func TestProgressIsSeenBelowTLS(t *testing.T) {
	certificate := selfSigned(t)
	synctest.Test(t, func(t *testing.T) {
		near, far := memPipe(1 << 20)
		peer := tls.Server(far, &tls.Config{Certificates: []tls.Certificate{certificate}})
		proxied := tls.Client(near, &tls.Config{InsecureSkipVerify: true})
		go func() { _ = peer.Handshake() }()
		require.NoError(t, proxied.Handshake())
		s := New(Wrap(proxied), nil, true, unlimited, time.Second, &counted{})
		near.out.capacity = 16 << 10
		done := make(chan error)
		go func() {
			_, err := WriteBatch(s, []entry{{Kind: outbox.Message, Frame: make([]byte, 256<<10)}})
			done <- err
		}()
		for { // 40 KiB a second
			time.Sleep(100 * time.Millisecond)
			select {
			case err := <-done:
				require.NoError(t, err)
				near.Close()
				far.Close()
				return
			default:
				far.take(t, min(near.unread(), 4<<10))
			}
		}
	})
}

// What is being written is known to stall, by a clock that nobody sets.
func TestStalledTellsForHowLong(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t, false, unlimited, 10_000)
		assert.Zero(t, f.Stalled())
		go func() { _ = f.write(payload(1, 20_000)) }()
		time.Sleep(3 * time.Second)
		assert.InDelta(t, 3*time.Second, f.Stalled(), 10)
		f.peerConn.take(t, 20_000)
		synctest.Wait()
		assert.Zero(t, f.Stalled())
		assert.WithinDuration(t, time.Now().Add(time.Minute), monotonic.Time(monotonic.Now()+int64(time.Minute)), 10)
	})
}
