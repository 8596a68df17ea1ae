package socket

import (
	"bufio"
	"bytes"
	"crypto/tls"
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
	peer   net.Conn
	spent  time.Duration
}

// newHop returns one over loopback. The kernel holds several of the largest messages.
func newHop(b *testing.B, client bool, certificate *tls.Certificate) *hop {
	b.Helper()
	near, far := tcpPair(b)
	for _, conn := range []*net.TCPConn{near, far} {
		require.NoError(b, conn.SetWriteBuffer(1<<20))
		require.NoError(b, conn.SetReadBuffer(1<<20))
	}
	h := &hop{peer: far, agent: &agent{fixture: &fixture{}}, budget: memory.New(256<<20, unlimited)}
	h.agent.Reader = h.budget.NewReader(h.agent)
	conn := net.Conn(Wrap(near))
	if certificate != nil {
		ours := tls.Server(conn, &tls.Config{Certificates: []tls.Certificate{*certificate}})
		theirs := tls.Client(far, &tls.Config{InsecureSkipVerify: true})
		go func() { _ = ours.Handshake() }()
		require.NoError(b, theirs.Handshake())
		require.NoError(b, ours.Handshake())
		conn, h.peer = ours, theirs
	}
	in := InputOf(conn)
	if client {
		in = LinkInput(conn, bufio.NewReader(nil), 64<<10)
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

// send writes a message, which has a length on the wire, and has the peer read it.
func (h *hop) send(b *testing.B, batch []entry, length int) {
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
	if _, err := io.CopyN(io.Discard, h.peer, int64(length)); err != nil {
		b.Fatal(err)
	}
}

// BenchmarkRelay is what a message costs that is read from one connection of the kernel's and written
// to another. Nothing ever waits, so the time of the calls is what the processor has to do.
func BenchmarkRelay(b *testing.B) {
	certificate := selfSigned(b)
	for _, up := range []bool{true, false} {
		for _, secured := range []*tls.Certificate{nil, &certificate} {
			for _, size := range []int{200, 2 << 10, 16 << 10, 64 << 10, 100 << 10} {
				for _, fragment := range []int{1 << 20, 16 << 10, 4 << 10} {
					if fragment < 1<<20 && fragment >= size {
						continue
					}
					name := map[bool]string{true: "up", false: "down"}[up]
					if secured != nil {
						name += "/TLS"
					}
					b.Run(fmt.Sprintf("%s/%dB/fragments=%dB", name, size, fragment), func(b *testing.B) {
						relay(b, newHop(b, !up, secured), newHop(b, up, secured), size, fragment)
					})
				}
			}
		}
	}
}

// relay reads messages in fragments of a size from one hop and writes them to the other.
func relay(b *testing.B, from, to *hop, size, fragment int) {
	b.Helper()
	sent := fragments(payload(1, size), fragment, !from.client)
	written := len(fragments(payload(1, size), fragmentSize, to.client))
	batch := make([]entry, 1)
	b.SetBytes(int64(size))
	b.ReportAllocs()
	for b.Loop() {
		message := from.receive(b, sent)
		batch[0] = entry{Kind: outbox.Message, Frame: message}
		from.budget.Up.Take(batch[0].Memory())
		from.Release()
		to.send(b, batch, written)
		from.budget.Up.Give(batch[0].Memory())
		from.budget.Recycle(message)
	}
	b.ReportMetric(float64(from.spent.Nanoseconds())/float64(b.N), "read-ns/op")
	b.ReportMetric(float64(to.spent.Nanoseconds())/float64(b.N), "write-ns/op")
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
