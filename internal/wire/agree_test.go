package wire_test

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/open-telemetry/opamp-go/protobufs"
	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/opampgateway/opampgateway/internal/wire"
)

// direction is one of the two scans, with the decoder's view of the same message.
type direction struct {
	scan          func([]byte) (wire.Fields, error)
	customMessage protowire.Number
	message       func() opampMessage
}

// opampMessage is what the two OpAMP messages have in common.
type opampMessage interface {
	proto.Message
	GetInstanceUid() []byte
	GetCustomMessage() *protobufs.CustomMessage
}

var scans = map[string]direction{
	"up":   {wire.ScanAgentToServer, customMessageUp, func() opampMessage { return &protobufs.AgentToServer{} }},
	"down": {wire.ScanServerToAgent, customMessageDown, func() opampMessage { return &protobufs.ServerToAgent{} }},
}

// assertAgrees compares what the scan finds in frame with what the full decoder does:
//
//   - What the decoder accepts, the scan accepts; only a frame of no bytes at all is not a
//     message to us.
//   - The instance UID is the same.
//   - So is the sequence number.
//   - A message field occurs for the one if it does for the other; so does a field of bytes or
//     text that is not empty.
//   - The custom message decodes to the same.
//   - The frame is left as it was.
func assertAgrees(t *testing.T, frame []byte, d direction) {
	t.Helper()
	before := bytes.Clone(frame)
	f, scanErr := d.scan(frame)
	require.Equal(t, before, frame, "the frame was changed")
	if len(frame) == 0 {
		require.ErrorIs(t, scanErr, wire.ErrEmpty)
		return
	}
	require.Equal(t, frame[0] == 0, f.Header)

	message := d.message()
	if err := proto.Unmarshal(bytes.TrimPrefix(frame, header), message); err != nil {
		return // the scan may accept what it does not look into
	}
	require.NoError(t, scanErr, "the decoder accepts it")
	require.True(t, bytes.Equal(message.GetInstanceUid(), f.UID), "instance_uid: %x, and not %x", f.UID, message.GetInstanceUid())
	if up, ok := message.(*protobufs.AgentToServer); ok {
		require.Equal(t, up.GetSequenceNum(), f.Sequence, "sequence_num")
		require.Equal(t, up.GetFlags(), f.Flags, "flags")
	}
	if f.Empty() {
		require.Zero(t, proto.Size(message), "fields of a message said to be empty")
	}

	m := message.ProtoReflect()
	fields := m.Descriptor().Fields()
	for i := range fields.Len() {
		field := fields.Get(i)
		if field.Number() >= 32 {
			continue
		}
		switch {
		case field.Kind() == protoreflect.MessageKind && !field.IsList() && !field.IsMap():
			require.Equal(t, m.Has(field), f.Has(field.Number()), field.Name())
		case field.Kind() == protoreflect.BytesKind, field.Kind() == protoreflect.StringKind:
			if m.Has(field) {
				require.True(t, f.Has(field.Number()), field.Name())
			}
		}
	}

	custom := message.GetCustomMessage()
	require.Equal(t, custom != nil, f.CustomMessage != nil, "custom_message")
	if custom != nil {
		var merged protobufs.CustomMessage
		require.NoError(t, proto.Unmarshal(f.CustomMessage, &merged))
		require.True(t, proto.Equal(custom, &merged), "custom_message: %v, and not %v", &merged, custom)
	}
}

type capture struct {
	name      string // as in "bdot/001-up"
	direction string
	frame     []byte
}

// captures returns every frame that was captured from agents and servers.
func captures(tb testing.TB) []capture {
	tb.Helper()
	files, err := filepath.Glob("../../testdata/captures/*/*.bin")
	require.NoError(tb, err)
	require.NotEmpty(tb, files)
	all := make([]capture, 0, len(files))
	for _, file := range files {
		frame, err := os.ReadFile(file)
		require.NoError(tb, err)
		name := strings.TrimSuffix(filepath.ToSlash(file), ".bin")
		name = strings.TrimPrefix(name, "../../testdata/captures/")
		direction := name[strings.LastIndexByte(name, '-')+1:]
		require.Contains(tb, scans, direction, file)
		all = append(all, capture{name, direction, frame})
	}
	return all
}

// captured returns one captured frame.
func captured(tb testing.TB, name string) []byte {
	tb.Helper()
	for _, c := range captures(tb) {
		if c.name == name {
			return c.frame
		}
	}
	require.Fail(tb, "no capture "+name)
	return nil
}

func fuzz(f *testing.F, d direction) {
	f.Helper()
	for _, c := range captures(f) {
		f.Add(c.frame)
	}
	f.Add(join(header, bytesField(1, alice), group(30, bytesField(1, bob)), varintField(1, 1), bytesField(1, bob)))
	f.Add(join(bytesField(d.customMessage, []byte("\x0a\x01x")), bytesField(d.customMessage, nil), bytesField(d.customMessage, []byte("\x0a\x01y"))))
	f.Add(join(header, varintField(2, 1), varintField(2, 1<<63), bytesField(2, alice), varintField(3, 7), []byte{0x10, 0x80, 0}))
	f.Fuzz(func(t *testing.T, frame []byte) { assertAgrees(t, frame, d) })
}

func FuzzScanAgentToServer(f *testing.F) { fuzz(f, scans["up"]) }

func FuzzScanServerToAgent(f *testing.F) { fuzz(f, scans["down"]) }

// FuzzHeadUID cuts messages: whatever is found at their start is what the scan finds first.
func FuzzHeadUID(f *testing.F) {
	for _, c := range captures(f) {
		f.Add(c.frame, uint(18))
	}
	f.Add(join(header, varintField(2, 7), group(5, bytesField(1, bob)), bytesField(1, alice)), uint(100))
	f.Fuzz(func(t *testing.T, frame []byte, cut uint) {
		prefix := frame[:min(cut, uint(len(frame)))]
		uid := wire.HeadUID(prefix)
		if uid == nil {
			return
		}
		end := bytes.Index(prefix, uid) + len(uid)
		for ; end <= len(prefix); end++ { // the message as it is up to there
			if fields, err := wire.ScanServerToAgent(prefix[:end]); err == nil && bytes.Equal(fields.UID, uid) {
				return
			}
		}
		require.Fail(t, "found what the scan does not")
	})
}
