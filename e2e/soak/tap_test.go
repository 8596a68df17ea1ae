package main

import (
	"bytes"
	"strings"
	"testing"

	"github.com/gorilla/websocket"
	"github.com/open-telemetry/opamp-go/protobufs"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/proto"
)

// frame returns a masked WebSocket frame (RFC 6455, section 5.2).
func frame(opcode byte, payload []byte) []byte {
	b := []byte{0x80 | opcode}
	switch n := len(payload); {
	case n < 126:
		b = append(b, 0x80|byte(n))
	case n < 1<<16:
		b = append(b, 0x80|126, byte(n>>8), byte(n))
	default:
		b = append(b, 0x80|127, 0, 0, 0, 0, byte(n>>24), byte(n>>16), byte(n>>8), byte(n))
	}
	key := []byte{1, 2, 3, 4}
	b = append(b, key...)
	for i, c := range payload {
		b = append(b, c^key[i%4])
	}
	return b
}

// What a client writes is followed however it comes apart, and a message counts when it is whole.
func TestFrames(t *testing.T) {
	said := stamp{actor: 7, epoch: 2, number: 3, size: 70_000}
	var messages [][]byte
	for _, size := range []uint32{0, 100, 1000, 70_000} {
		said.size = size
		m, err := proto.Marshal(&protobufs.AgentToServer{
			InstanceUid: bytes.Repeat([]byte{1}, 16), SequenceNum: 300,
			CustomMessage: &protobufs.CustomMessage{Capability: capability, Type: "up", Data: said.payload()},
		})
		require.NoError(t, err)
		messages = append(messages, append([]byte{0}, m...))
	}
	stream := []byte("GET / HTTP/1.1\r\nHost: x\r\n\r\n")
	for _, m := range messages {
		stream = append(stream, frame(websocket.BinaryMessage, m)...)
		stream = append(stream, frame(websocket.PingMessage, nil)...)
	}
	stream = append(stream, frame(websocket.CloseMessage, []byte{3, 232})...)

	for _, step := range []int{1, 7, 4096, len(stream)} {
		heard, closed := 0, false
		f := &frames{closing: func() { closed = true }}
		f.message = func(start []byte) {
			kind, data := customMessage(start)
			assert.Equal(t, "up", kind)
			assert.Equal(t, said.payload()[:13], data[:13])
			assert.True(t, bytes.HasPrefix(messages[heard], start))
			heard++
		}
		for rest := stream; len(rest) > 0; {
			n := min(step, len(rest))
			f.read(rest[:n])
			if len(rest) == n+1 {
				assert.False(t, closed)
			}
			rest = rest[n:]
		}
		assert.Equal(t, len(messages), heard, "read by %d", step)
		assert.True(t, closed)
	}

	whole := 0
	f := &frames{message: func([]byte) { whole++ }, upgraded: true}
	last := frame(websocket.BinaryMessage, []byte(strings.Repeat("x", 300)))
	f.read(last[:len(last)-1])
	assert.Zero(t, whole, "a part is none")
	f.read(last[len(last)-1:])
	assert.Equal(t, 1, whole)
}

// Of what a server writes, which is not masked, and in fragments with other frames in between, the size of each
// frame is known, and what is a whole message.
func TestFramesOfServers(t *testing.T) {
	stream := []byte("HTTP/1.1 101 Switching Protocols\r\n\r\n")
	want := []int{}
	add := func(first byte, size int) {
		want = append(want, size)
		stream = append(stream, first, 126, byte(size>>8), byte(size))
		stream = append(stream, bytes.Repeat([]byte{'x'}, size)...)
	}
	const fin = 0x80
	add(websocket.BinaryMessage, 16_384)
	add(fin|websocket.PingMessage, 8)
	add(0, 16_384)
	add(fin, 300)
	add(fin|websocket.BinaryMessage, 33_000)
	for _, step := range []int{1, 1000, len(stream)} {
		var sizes, messages []int
		f := &frames{frame: func(size int) { sizes = append(sizes, size) }}
		f.message = func(start []byte) {
			messages = append(messages, len(sizes))
			assert.Equal(t, strings.Repeat("x", startSize), string(start))
		}
		for rest := stream; len(rest) > 0; {
			n := min(step, len(rest))
			f.read(rest[:n])
			rest = rest[n:]
		}
		assert.Equal(t, want, sizes)
		assert.Equal(t, []int{4, 5}, messages, "how many frames there were when each was whole")
	}
}
