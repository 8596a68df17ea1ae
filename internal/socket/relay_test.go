package socket

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/opampgateway/opampgateway/internal/memory"
	"github.com/opampgateway/opampgateway/internal/outbox"
)

// hop is one end of a connection of the kernel's: a Socket without its handshake, and its peer.
type hop struct {
	*Socket
	agent  *agent // whose memory it is
	budget *memory.Budget
	peer   *net.TCPConn
	spent  time.Duration
}

// newHop returns one over loopback. The kernel holds several of the largest messages.
func newHop(b *testing.B, client bool) *hop {
	b.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0") //nolint:noctx // it does not wait
	require.NoError(b, err)
	defer l.Close()
	near, err := net.Dial("tcp", l.Addr().String()) //nolint:noctx // it does not wait
	require.NoError(b, err)
	far, err := l.Accept()
	require.NoError(b, err)
	b.Cleanup(func() {
		near.Close()
		far.Close()
	})
	for _, conn := range []net.Conn{near, far} {
		require.NoError(b, conn.(*net.TCPConn).SetWriteBuffer(1<<20))
		require.NoError(b, conn.(*net.TCPConn).SetReadBuffer(1<<20))
	}
	h := &hop{peer: far.(*net.TCPConn), agent: &agent{fixture: &fixture{}}, budget: memory.New(256<<20, unlimited)}
	h.agent.Reader = h.budget.NewReader(h.agent)
	conn := Wrap(near)
	in := InputOf(conn)
	if client {
		in = LinkInput(conn, bufio.NewReaderSize(conn, 4<<10), 64<<10)
	}
	h.Socket = New(conn, in, client, unlimited, writeTimeout, h.agent)
	h.agent.Socket = h.Socket
	return h
}

// receive has the peer send what is one message, and reads it.
func (h *hop) receive(b *testing.B, sent []byte) []byte {
	b.Helper()
	if _, err := h.peer.Write(sent); err != nil {
		b.Fatal(err)
	}
	start := time.Now()
	message, err := h.Read()
	h.spent += time.Since(start)
	if err != nil {
		b.Fatal(err)
	}
	return message
}

// send writes a message in as many bytes as its peer then reads.
func (h *hop) send(b *testing.B, batch []outbox.Entry[string], bytes int) {
	b.Helper()
	start := time.Now()
	n, err := 0, error(nil)
	if !h.client {
		n, err = TryBatch(h.Socket, batch)
	}
	if n < len(batch) && err == nil {
		_, err = WriteBatch(h.Socket, batch[n:])
	}
	h.spent += time.Since(start)
	if err != nil {
		b.Fatal(err)
	}
	if _, err := io.CopyN(io.Discard, h.peer, int64(bytes)); err != nil {
		b.Fatal(err)
	}
}

// BenchmarkRelay is what a message costs that is read from one connection of the kernel's and written
// to another. Nothing ever waits, so the time of the calls is what the processor has to do.
func BenchmarkRelay(b *testing.B) {
	for _, size := range []int{200, 2 << 10, 16 << 10, 64 << 10, 100 << 10} {
		for _, up := range []bool{true, false} {
			for _, fragment := range []int{1 << 20, 16 << 10, 4 << 10} {
				if fragment < 1<<20 && fragment >= size {
					continue
				}
				way := "down"
				if up {
					way = "up"
				}
				b.Run(fmt.Sprintf("%s/%dB/fragments=%dB", way, size, fragment), func(b *testing.B) {
					from, to := newHop(b, !up), newHop(b, up)
					frame := fragments(payload(1, size), fragment, up)
					batch := make([]outbox.Entry[string], 1)
					// How many bytes it is when it is written.
					written := make(chan int, 1)
					go func() {
						reader := bufio.NewReader(io.TeeReader(to.peer, io.Discard))
						n, left := 0, 0
						for last := false; !last; {
							head, err := reader.Peek(2)
							if err != nil {
								break
							}
							last = head[0]&0x80 != 0
							size := 2
							if up {
								size += 4
							}
							switch head[1] & 0x7f {
							case 126:
								head, _ = reader.Peek(4)
								size, left = size+2, int(head[2])<<8|int(head[3])
							case 127:
								head, _ = reader.Peek(10)
								size, left = size+8, int(head[6])<<24|int(head[7])<<16|int(head[8])<<8|int(head[9])
							default:
								left = int(head[1] & 0x7f)
							}
							_, _ = io.CopyN(io.Discard, reader, int64(size+left))
							n += size + left
						}
						written <- n
					}()
					batch[0] = outbox.Entry[string]{Kind: outbox.Message, Frame: payload(1, size)}
					_, err := WriteBatch(to.Socket, batch)
					require.NoError(b, err)
					n := <-written

					from.spent, to.spent = 0, 0
					b.SetBytes(int64(size))
					b.ReportAllocs()
					for b.Loop() {
						message := from.receive(b, frame)
						batch[0] = outbox.Entry[string]{Kind: outbox.Message, Frame: message}
						from.budget.Up.Take(batch[0].Memory())
						from.Release()
						to.send(b, batch, n)
						from.budget.Up.Give(batch[0].Memory())
						from.budget.Recycle(message)
					}
					b.ReportMetric(float64(from.spent.Nanoseconds())/float64(b.N), "read-ns/op")
					b.ReportMetric(float64(to.spent.Nanoseconds())/float64(b.N), "write-ns/op")
				})
			}
		}
	}
}

// fragments is a message in fragments, masked or not.
func fragments(message []byte, size int, masked bool) (b []byte) {
	opcode, key := byte(binaryMessage), [4]byte{1, 2, 3, 4}
	for rest := message; ; {
		n := min(size, len(rest))
		part := bytes.Clone(rest[:n])
		start := len(b)
		if b = appendHeader(b, opcode, n, masked, key); masked {
			mask(part, key, 0)
		}
		b = append(b, part...)
		if rest = rest[n:]; len(rest) == 0 {
			return b
		}
		b[start] &^= 0x80
		opcode = continuation
	}
}
