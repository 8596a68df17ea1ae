package wire_test

import (
	"bytes"
	"testing"

	"github.com/open-telemetry/opamp-go/protobufs"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"github.com/opampgateway/opampgateway/internal/wire"
)

var formats = map[string]wire.Format{"with header": {Header: true}, "without header": {}}

func parse(t *testing.T, uid []byte) wire.UID {
	t.Helper()
	parsed, err := wire.ParseUID(uid)
	require.NoError(t, err)
	return parsed
}

// wantFrame decodes a frame of the gateway's own and compares it with want.
func wantFrame(t *testing.T, want opampMessage, frame []byte, format wire.Format) {
	t.Helper()
	require.NotEmpty(t, frame)
	require.Equal(t, format.Header, frame[0] == 0, "a header exactly if the agent's frames have one")
	if format.Header {
		frame = frame[1:]
	}
	got := proto.Clone(want)
	proto.Reset(got)
	require.NoError(t, proto.Unmarshal(frame, got))
	require.True(t, proto.Equal(want, got), "got %v, want %v", got, want)
}

func TestOwnFramesDecodeToWhatTheySay(t *testing.T) {
	for name, format := range formats {
		for _, uid := range [][]byte{alice, cathy} {
			t.Run(name, func(t *testing.T) {
				for _, sequence := range []uint64{0, 1, 127, 128, 1<<64 - 1} {
					wantFrame(t, &protobufs.AgentToServer{
						InstanceUid:     uid,
						SequenceNum:     sequence,
						AgentDisconnect: &protobufs.AgentDisconnect{},
					}, format.Goodbye(parse(t, uid), sequence), format)
				}

				wantFrame(t, &protobufs.ServerToAgent{
					InstanceUid: uid,
					Flags:       uint64(protobufs.ServerToAgentFlags_ServerToAgentFlags_ReportFullState),
				}, format.ReportFullState(parse(t, uid)), format)

				wantFrame(t, &protobufs.ServerToAgent{
					InstanceUid: uid,
					ErrorResponse: &protobufs.ServerErrorResponse{
						Type:         protobufs.ServerErrorResponseType_ServerErrorResponseType_BadRequest,
						ErrorMessage: "malformed frame",
					},
				}, format.BadRequest(uid, "malformed frame"), format)

				wantFrame(t, &protobufs.ServerToAgent{
					InstanceUid:        uid,
					CustomCapabilities: &protobufs.CustomCapabilities{Capabilities: []string{"weather", "tides"}},
				}, format.CustomCapabilities(parse(t, uid), stated(t, "weather", "tides")), format)
			})
		}
	}
}

// stated returns custom capabilities as a server encodes them.
func stated(t *testing.T, capabilities ...string) string {
	t.Helper()
	return string(encode(t, &protobufs.CustomCapabilities{Capabilities: capabilities}))
}

// Whoever sends something that is no UID is told so under what it sent, and not more than it takes to
// recognize that.
func TestBadRequestGoesBackUnderWhateverCame(t *testing.T) {
	format := wire.Format{Header: true}
	long := bytes.Repeat([]byte("x"), 1000)
	for _, uid := range [][]byte{nil, []byte("bob"), []byte("\xff\x00\xfe"), long[:128], long[:129], long} {
		wantFrame(t, &protobufs.ServerToAgent{
			InstanceUid: uid[:min(len(uid), 128)],
			ErrorResponse: &protobufs.ServerErrorResponse{
				Type:         protobufs.ServerErrorResponseType_ServerErrorResponseType_BadRequest,
				ErrorMessage: "what is not \ufffd text",
			},
		}, format.BadRequest(uid, "what is not \xff text"), format)
	}
}

// A gateway at the other end is told without a UID.
func TestOwnCustomCapabilitiesCanBeForAGateway(t *testing.T) {
	format := wire.Format{Header: true}
	frame := format.CustomCapabilities(wire.UID{}, stated(t, "weather"))
	wantFrame(t, &protobufs.ServerToAgent{
		CustomCapabilities: &protobufs.CustomCapabilities{Capabilities: []string{"weather"}},
	}, frame, format)
	f, err := wire.ScanServerToAgent(frame)
	require.NoError(t, err)
	assert.Nil(t, f.UID)
	assert.True(t, f.Has(wire.FieldCustomCapabilities))
}

// The server of a legacy agent reads agent_disconnect from field 8; opamp-go does not know that
// format any more, so the bytes are compared.
func TestOwnGoodbyeForALegacyAgent(t *testing.T) {
	legacy := wire.Format{Legacy: true}
	last := []byte{8<<3 | byte(protowire.BytesType), 0}
	assert.Equal(t, join([]byte{0x0a, 26}, cathy, last), legacy.Goodbye(parse(t, cathy), 0))
	goodbye := legacy.Goodbye(parse(t, cathy), 300)
	assert.Equal(t, join([]byte{0x0a, 26}, cathy, varintField(2, 300), last), goodbye)

	f, err := wire.ScanAgentToServer(goodbye)
	require.NoError(t, err)
	assert.True(t, legacy.Departs(&f))
	assert.Equal(t, legacy, wire.FormatOf(&f, parse(t, f.UID)))
}

func TestFormatIsToldFromAFrame(t *testing.T) {
	for name, test := range map[string]struct {
		frame []byte
		want  wire.Format
	}{
		"of today":            {join(header, bytesField(1, alice)), wire.Format{Header: true}},
		"older than headers":  {bytesField(1, alice), wire.Format{}},
		"of 2022":             {bytesField(1, cathy), wire.Format{Legacy: true}},
		"of today, with text": {join(header, bytesField(1, cathy)), wire.Format{Header: true}},
	} {
		f, err := wire.ScanAgentToServer(test.frame)
		require.NoError(t, err, name)
		assert.Equal(t, test.want, wire.FormatOf(&f, parse(t, f.UID)), name)
	}
	for _, c := range captures(t) {
		if c.direction == "up" {
			f, err := wire.ScanAgentToServer(c.frame)
			require.NoError(t, err, c.name)
			uid, _ := wire.ParseUID(f.UID) // a connect has none
			want := wire.Format{Header: true}
			if c.name == "legacy-v020/001-up" {
				want = wire.Format{Legacy: true}
			}
			assert.Equal(t, want, wire.FormatOf(&f, uid), c.name)
		}
	}
}

func TestDepartingAgentsAreRecognized(t *testing.T) {
	for name, test := range map[string]struct {
		frame []byte
		want  bool
	}{
		"goodbye of today":                   {join(header, bytesField(1, alice), bytesField(9, nil)), true},
		"goodbye without header":             {join(bytesField(1, alice), bytesField(9, nil)), true},
		"goodbye of 2022":                    {join(bytesField(1, cathy), bytesField(8, nil)), true},
		"field 8 of today is something else": {join(header, bytesField(1, alice), bytesField(8, nil)), false},
		"field 9 of 2022 is something else":  {join(bytesField(1, cathy), bytesField(9, nil)), false},
		"heartbeat":                          {join(header, bytesField(1, alice), varintField(2, 7)), false},
	} {
		f, err := wire.ScanAgentToServer(test.frame)
		require.NoError(t, err, name)
		assert.Equal(t, test.want, wire.FormatOf(&f, parse(t, f.UID)).Departs(&f), name)
	}
	departed := map[string]bool{"opampextension/019-up": true, "opampsupervisor/025-up": true, "bdot/013-up": true}
	for _, c := range captures(t) {
		if c.direction == "up" {
			f, err := wire.ScanAgentToServer(c.frame)
			require.NoError(t, err, c.name)
			uid, _ := wire.ParseUID(f.UID) // a connect has none
			assert.Equal(t, departed[c.name], wire.FormatOf(&f, uid).Departs(&f), c.name)
			delete(departed, c.name)
		}
	}
	assert.Empty(t, departed, "these captures are gone")
}
