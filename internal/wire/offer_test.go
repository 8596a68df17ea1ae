package wire_test

import (
	"bytes"
	"testing"
	"unicode/utf8"

	"github.com/open-telemetry/opamp-go/protobufs"
	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"github.com/opampgateway/opampgateway/internal/wire"
)

const elsewhere, here = "wss://elsewhere.example/v1/opamp", "wss://gateway.example:4320/v1/opamp"

// offer is a message with all that stands around an endpoint that is offered.
func offer() *protobufs.ServerToAgent {
	return &protobufs.ServerToAgent{
		InstanceUid:  alice,
		RemoteConfig: &protobufs.AgentRemoteConfig{ConfigHash: []byte("config")},
		ConnectionSettings: &protobufs.ConnectionSettingsOffers{
			Hash: []byte("hash"),
			Opamp: &protobufs.OpAMPConnectionSettings{
				DestinationEndpoint:      elsewhere,
				Headers:                  &protobufs.Headers{Headers: []*protobufs.Header{{Key: "Authorization", Value: "secret"}}},
				HeartbeatIntervalSeconds: 30,
				Tls:                      &protobufs.TLSConnectionSettings{CaPemContents: "CA"},
			},
			OwnMetrics: &protobufs.TelemetryConnectionSettings{DestinationEndpoint: elsewhere},
		},
		Flags: 1,
	}
}

// frameOf encodes a message as a server would.
func frameOf(tb testing.TB, message proto.Message) []byte {
	tb.Helper()
	frame, err := proto.MarshalOptions{Deterministic: true}.MarshalAppend([]byte{0}, message)
	require.NoError(tb, err)
	return frame
}

// edit returns the frame with another endpoint.
func edit(t *testing.T, frame []byte, endpoint string) []byte {
	t.Helper()
	edited, ok := wire.WithEndpoint(frame, endpoint)
	require.True(t, ok)
	return edited
}

func TestWithEndpoint(t *testing.T) {
	frame, want := frameOf(t, offer()), offer()
	require.Equal(t, elsewhere, string(wire.OfferedEndpoint(frame)))
	want.ConnectionSettings.Opamp.DestinationEndpoint = here
	require.Equal(t, frameOf(t, want), edit(t, frame, here), "byte for byte as the server would have said it")
	want.ConnectionSettings.Opamp.DestinationEndpoint = ""
	require.Equal(t, frameOf(t, want), edit(t, frame, ""))
	require.Equal(t, frameOf(t, offer()), frame, "the frame itself")

	headless := frame[1:]
	require.Equal(t, elsewhere, string(wire.OfferedEndpoint(headless)))
	require.Equal(t, frameOf(t, want)[1:], edit(t, headless, ""))

	// Settings that offered nothing but the endpoint go, but not their hash, of which the agent tells the server.
	bare := offer()
	bare.ConnectionSettings.Opamp = &protobufs.OpAMPConnectionSettings{DestinationEndpoint: elsewhere}
	want = offer()
	want.ConnectionSettings.Opamp = nil
	require.Equal(t, frameOf(t, want), edit(t, frameOf(t, bare), ""))

	// An offer without an endpoint is no concern of ours.
	for _, other := range []func(*protobufs.ServerToAgent){
		func(m *protobufs.ServerToAgent) { m.ConnectionSettings.Opamp.DestinationEndpoint = "" },
		func(m *protobufs.ServerToAgent) { m.ConnectionSettings.Opamp = nil },
		func(m *protobufs.ServerToAgent) { m.ConnectionSettings = nil },
	} {
		message := offer()
		other(message)
		frame := frameOf(t, message)
		require.Empty(t, wire.OfferedEndpoint(frame))
		_, ok := wire.WithEndpoint(frame, here)
		require.False(t, ok)
	}
}

// TestWithEndpointKeepsUnknown has fields of a later version at each level, and the settings come in several parts, which
// the decoder merges.
func TestWithEndpointKeepsUnknown(t *testing.T) {
	unknown := func(b []byte) []byte {
		b = protowire.AppendTag(b, 99, protowire.BytesType)
		b = protowire.AppendString(b, "later")
		b = protowire.AppendTag(b, 100, protowire.Fixed32Type)
		return protowire.AppendFixed32(b, 7)
	}
	part := func(number protowire.Number, content []byte) []byte {
		return protowire.AppendBytes(protowire.AppendTag(nil, number, protowire.BytesType), content)
	}
	message := func(first, second []byte) []byte {
		settings := bytes.Join([][]byte{unknown(nil), part(2, unknown(first)), part(2, second)}, nil)
		return bytes.Join([][]byte{{0}, part(1, alice), unknown(nil), part(4, settings), part(4, part(1, []byte("hash")))}, nil)
	}
	frame := message(part(1, []byte("wss://first.example")), part(1, []byte(elsewhere)))
	require.Equal(t, elsewhere, string(wire.OfferedEndpoint(frame)))
	require.Equal(t, message(nil, part(1, []byte(here))), edit(t, frame, here), "the last one holds")
	require.Equal(t, message(nil, nil), edit(t, message(part(1, []byte(elsewhere)), nil), ""))
}

// TestWithEndpointUnreadable has settings that the decoder refuses, of which the agent is to judge.
func TestWithEndpointUnreadable(t *testing.T) {
	opamp := append(protowire.AppendString(protowire.AppendTag(nil, 1, protowire.BytesType), elsewhere), 0xff)
	settings := protowire.AppendBytes(protowire.AppendTag(nil, 2, protowire.BytesType), opamp)
	frame := protowire.AppendBytes(protowire.AppendTag([]byte{0}, 4, protowire.BytesType), settings)
	_, ok := wire.WithEndpoint(frame, "")
	require.False(t, ok)
}

// FuzzWithEndpoint holds the editor against the decoder: what it makes of a message is the same message but for the endpoint.
func FuzzWithEndpoint(f *testing.F) {
	f.Add(frameOf(f, offer()), here)
	f.Add(frameOf(f, offer())[1:], "")
	f.Add([]byte{0, 0x22, 4, 0x12, 2, 0x0a, 0}, here)
	f.Add([]byte{0, 0x22, 5, 0x12, 3, 0x0a, 1, 'x'}, "")
	f.Fuzz(func(t *testing.T, frame []byte, endpoint string) {
		if _, err := wire.ScanServerToAgent(frame); err != nil || !utf8.ValidString(endpoint) {
			return
		}
		before := bytes.Clone(frame)
		offered := wire.OfferedEndpoint(frame)
		edited, ok := wire.WithEndpoint(frame, endpoint)
		require.Equal(t, before, frame, "the frame itself has changed")
		require.LessOrEqual(t, len(edited), len(frame)+len(endpoint)+32)

		content := func(frame []byte) []byte { return bytes.TrimPrefix(frame, []byte{0}) }
		var was, is protobufs.ServerToAgent
		if proto.Unmarshal(content(frame), &was) != nil {
			return
		}
		require.Equal(t, was.GetConnectionSettings().GetOpamp().GetDestinationEndpoint(), string(offered))
		if was.GetConnectionSettings().GetOpamp().GetDestinationEndpoint() == "" {
			require.False(t, ok)
			return
		}
		require.True(t, ok)
		require.NoError(t, proto.Unmarshal(content(edited), &is))
		opamp := was.ConnectionSettings.Opamp
		opamp.DestinationEndpoint = endpoint
		if proto.Size(opamp) == 0 && is.GetConnectionSettings().GetOpamp() == nil {
			was.ConnectionSettings.Opamp = nil
		}
		require.True(t, proto.Equal(&was, &is), "got %v, want %v", &is, &was)
	})
}
