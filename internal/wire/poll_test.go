package wire_test

import (
	"testing"

	"github.com/open-telemetry/opamp-go/protobufs"
	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/proto"

	"github.com/opampgateway/opampgateway/internal/wire"
)

func TestPoll(t *testing.T) {
	uid, err := wire.ParseUID([]byte("0123456789abcdef"))
	require.NoError(t, err)
	frame := wire.Format{Header: true}.Poll(uid, 300, 7)
	require.Zero(t, frame[0])
	var got protobufs.AgentToServer
	require.NoError(t, proto.Unmarshal(frame[1:], &got))
	require.True(t, proto.Equal(&protobufs.AgentToServer{InstanceUid: uid.Bytes(), SequenceNum: 300, Capabilities: 7}, &got))
	require.Equal(t, uint64(7), wire.Capabilities(frame))
}

func TestWithUID(t *testing.T) {
	uid, err := wire.ParseUID([]byte("0123456789abcdef"))
	require.NoError(t, err)
	for _, frame := range [][]byte{{}, {0}, {0, 0x30, 1}} {
		before := append(make([]byte, 0, 100), frame...)
		after := wire.WithUID(before, uid)
		f, err := wire.ScanServerToAgent(after)
		require.NoError(t, err)
		require.True(t, uid.Is(f.UID))
		require.Equal(t, frame, after[:len(frame)])
		require.Equal(t, make([]byte, 50), before[len(before):][:50:50], "the memory behind it is somebody else's")
	}
}

// Capabilities are what the full decoder finds.
func FuzzCapabilities(f *testing.F) {
	f.Add([]byte{0, 0x20, 7})
	f.Add([]byte{0x20, 7, 0x20, 8, 0x22, 1, 9})
	f.Fuzz(func(t *testing.T, frame []byte) {
		message := frame
		if len(message) > 0 && message[0] == 0 {
			message = message[1:]
		}
		got := wire.Capabilities(frame)
		var want protobufs.AgentToServer
		if proto.Unmarshal(message, &want) == nil && got != want.GetCapabilities() {
			t.Fatalf("%d, want %d", got, want.GetCapabilities())
		}
	})
}
