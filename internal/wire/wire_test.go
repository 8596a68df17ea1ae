package wire_test

import (
	"bytes"
	"strings"
	"testing"

	"github.com/open-telemetry/opamp-go/protobufs"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"github.com/opampgateway/opampgateway/internal/wire"
)

var (
	alice = []byte("\x01\x98\x00\x00\x00\x00\x70\x00\x80\x00\x00\x00\x00\x00\x00\x0a")
	bob   = []byte("\x01\x98\x00\x00\x00\x00\x70\x00\x80\x00\x00\x00\x00\x00\x00\x0b")
	// cathy is an agent of 2022, whose UID is the text of a ULID.
	cathy = []byte("01H5MG7N9N36J28WEC8A8X5B17")
)

// header is what agents of today put before each message.
var header = []byte{0}

// customMessageUp and customMessageDown are the numbers of custom_message going up and down.
const customMessageUp, customMessageDown = 13, 11

func join(parts ...[]byte) []byte { return bytes.Join(parts, nil) }

func bytesField(number protowire.Number, value []byte) []byte {
	return protowire.AppendBytes(protowire.AppendTag(nil, number, protowire.BytesType), value)
}

func varintField(number protowire.Number, value uint64) []byte {
	return protowire.AppendVarint(protowire.AppendTag(nil, number, protowire.VarintType), value)
}

func fixed32Field(number protowire.Number) []byte {
	return protowire.AppendFixed32(protowire.AppendTag(nil, number, protowire.Fixed32Type), 1)
}

func fixed64Field(number protowire.Number) []byte {
	return protowire.AppendFixed64(protowire.AppendTag(nil, number, protowire.Fixed64Type), 1)
}

func group(number protowire.Number, content ...[]byte) []byte {
	return protowire.AppendTag(
		join(protowire.AppendTag(nil, number, protowire.StartGroupType), join(content...)),
		number, protowire.EndGroupType)
}

func encode(t *testing.T, message proto.Message) []byte {
	t.Helper()
	encoded, err := proto.Marshal(message)
	require.NoError(t, err)
	return encoded
}

func TestScanFindsWhoseFrameItIs(t *testing.T) {
	for name, test := range map[string]struct {
		frame  []byte
		uid    []byte
		header bool
	}{
		"with header":                      {frame: join(header, bytesField(1, alice)), uid: alice, header: true},
		"without header":                   {frame: bytesField(1, alice), uid: alice},
		"text of a legacy agent":           {frame: bytesField(1, cathy), uid: cathy},
		"text, with header":                {frame: join(header, bytesField(1, cathy)), uid: cathy, header: true},
		"of a length no UID has":           {frame: join(header, bytesField(1, []byte("bob"))), uid: []byte("bob"), header: true},
		"empty":                            {frame: join(header, bytesField(1, nil)), uid: []byte{}, header: true},
		"nobody's":                         {frame: join(header, varintField(2, 7)), header: true},
		"header alone":                     {frame: header, header: true},
		"twice: the last one counts":       {frame: join(header, bytesField(1, alice), bytesField(1, bob)), uid: bob, header: true},
		"behind other fields":              {frame: join(header, varintField(2, 7), bytesField(3, alice), bytesField(1, bob)), uid: bob, header: true},
		"among unknown fields":             {frame: join(header, varintField(99, 7), bytesField(1, alice), bytesField(536870911, bob)), uid: alice, header: true},
		"among fixed-size fields":          {frame: join(header, fixed32Field(20), bytesField(1, alice), fixed64Field(21)), uid: alice, header: true},
		"behind a group with a field 1":    {frame: join(header, bytesField(1, alice), group(30, bytesField(1, bob), group(31))), uid: alice, header: true},
		"field 1 as a number is unknown":   {frame: join(header, varintField(1, 7)), header: true},
		"field 1 as a group is unknown":    {frame: join(header, group(1, bytesField(1, bob))), header: true},
		"field 1 as number does not count": {frame: join(header, bytesField(1, alice), varintField(1, 7)), uid: alice, header: true},
	} {
		t.Run(name, func(t *testing.T) {
			for direction, scan := range scans {
				f, err := scan.scan(test.frame)
				require.NoError(t, err, direction)
				assert.Equal(t, test.uid, f.UID, direction)
				assert.Equal(t, test.header, f.Header, direction)
				assertAgrees(t, test.frame, scan)
			}
		})
	}
}

func TestScanFindsTheSequenceNumber(t *testing.T) {
	for name, test := range map[string]struct {
		frame []byte
		want  uint64
	}{
		"of today":                  {join(header, bytesField(1, alice), varintField(2, 300)), 300},
		"of 2022":                   {join(bytesField(1, cathy), varintField(2, 300)), 300},
		"largest":                   {join(header, varintField(2, 1<<64-1)), 1<<64 - 1},
		"none":                      {join(header, bytesField(1, alice), varintField(3, 7)), 0},
		"twice: the last one":       {join(header, varintField(2, 7), bytesField(1, alice), varintField(2, 8)), 8},
		"as bytes it is unknown":    {join(header, varintField(2, 7), bytesField(2, []byte{9})), 7},
		"as fixed64 it is unknown":  {join(header, varintField(2, 7), fixed64Field(2)), 7},
		"that of a group is not it": {join(header, varintField(2, 7), group(30, varintField(2, 9))), 7},
	} {
		f, err := wire.ScanAgentToServer(test.frame)
		require.NoError(t, err, name)
		assert.Equal(t, test.want, f.Sequence, name)
		assertAgrees(t, test.frame, scans["up"])
	}
}

// Of a message that is too large only the start is looked at: enough to say whose it was.
func TestTheStartOfAMessageTellsWhoseItIs(t *testing.T) {
	for _, c := range captures(t) {
		f, err := scans[c.direction].scan(c.frame)
		require.NoError(t, err)
		if f.UID == nil {
			assert.Nil(t, wire.HeadUID(c.frame), c.name)
			continue
		}
		end := bytes.Index(c.frame, f.UID) + len(f.UID)
		assert.Equal(t, f.UID, wire.HeadUID(c.frame), c.name)
		assert.Equal(t, f.UID, wire.HeadUID(c.frame[:end]), c.name)
		assert.Nil(t, wire.HeadUID(c.frame[:end-1]), c.name)
	}
	assert.Equal(t, alice, wire.HeadUID(join(header, varintField(2, 7), bytesField(3, bob), group(4, bytesField(1, bob)), bytesField(1, alice))))
	assert.Equal(t, []byte("bob"), wire.HeadUID(bytesField(1, []byte("bob"))))
	for _, prefix := range [][]byte{
		nil, header,
		{0x0a},
		{0x0a, 0x80},
		{0xff},
		{0x0a, 16},
		join(header, []byte{0x1a, 0xff, 0x7f}, bytesField(1, alice)),
		varintField(1, 7), group(1, bytesField(1, alice)),
		{0x0e},
		{0},
	} {
		assert.Nil(t, wire.HeadUID(prefix), "%x", prefix)
	}
}

func TestScanTellsAnEmptyMessageFromOneWithFields(t *testing.T) {
	keepAlive, err := wire.ScanServerToAgent(header)
	require.NoError(t, err)
	assert.True(t, keepAlive.Empty())
	assert.True(t, keepAlive.Header)
	assert.Equal(t, wire.Fields{Header: true}, keepAlive)

	for name, field := range map[string][]byte{
		"a known field":    bytesField(1, alice),
		"an empty one":     bytesField(1, nil),
		"a number":         varintField(6, 1),
		"an unknown field": bytesField(1000, nil),
		"a group":          group(1000),
	} {
		f, err := wire.ScanServerToAgent(join(header, field))
		require.NoError(t, err, name)
		assert.False(t, f.Empty(), name)
	}
}

func TestScanNotesWhichFieldsOccur(t *testing.T) {
	f, err := wire.ScanServerToAgent(join(header, bytesField(1, alice),
		bytesField(wire.FieldErrorResponse, nil), bytesField(wire.FieldCustomCapabilities, nil)))
	require.NoError(t, err)
	assert.True(t, f.Has(wire.FieldErrorResponse))
	assert.True(t, f.Has(wire.FieldCustomCapabilities))
	assert.False(t, f.Has(wire.FieldAgentIdentification))

	// A known number with another wire type is an unknown field, in the decoder too; and field
	// 32+n is not field n.
	f, err = wire.ScanAgentToServer(join(header,
		varintField(wire.FieldAgentDisconnect, 1), group(wire.FieldAgentDisconnect),
		bytesField(32+wire.FieldAgentDisconnect, nil), bytesField(64+wire.FieldAgentDisconnect, nil)))
	require.NoError(t, err)
	assert.False(t, f.Has(wire.FieldAgentDisconnect))

	f, err = wire.ScanAgentToServer(join(header, bytesField(31, nil)))
	require.NoError(t, err)
	assert.True(t, f.Has(31))
}

func TestScanFindsTheCustomMessageOfItsDirection(t *testing.T) {
	message := encode(t, &protobufs.CustomMessage{Capability: "weather", Type: "report", Data: []byte("rain")})
	for direction, scan := range scans {
		f, err := scan.scan(join(header, bytesField(1, alice), bytesField(scan.customMessage, message)))
		require.NoError(t, err, direction)
		assert.Equal(t, message, f.CustomMessage, direction)

		f, err = scan.scan(join(header, bytesField(1, alice)))
		require.NoError(t, err, direction)
		assert.Nil(t, f.CustomMessage, "%s: there is none", direction)

		f, err = scan.scan(join(header, bytesField(scan.customMessage, nil)))
		require.NoError(t, err, direction)
		assert.Equal(t, []byte{}, f.CustomMessage, "%s: an empty one is one", direction)
	}
	f, err := wire.ScanAgentToServer(join(header, bytesField(customMessageDown, message)))
	require.NoError(t, err)
	assert.Nil(t, f.CustomMessage, "the other direction's number")
}

// Nobody sends custom_message twice, except to hide a connect from us in what the server's
// decoder will put together.
func TestScanMergesRepeatedCustomMessages(t *testing.T) {
	var (
		capability = encode(t, &protobufs.CustomMessage{Capability: "com.bindplane.opamp-gateway"})
		typ        = encode(t, &protobufs.CustomMessage{Type: "connect"})
		data       = encode(t, &protobufs.CustomMessage{Data: []byte("{}")})
		other      = encode(t, &protobufs.CustomMessage{Data: []byte("[]")})
	)
	for name, parts := range map[string][][]byte{
		"two":                    {join(capability, typ), data},
		"three":                  {capability, typ, data},
		"the last value counts":  {capability, typ, data, other},
		"first is empty":         {nil, capability, typ, data},
		"last is empty":          {capability, typ, data, nil},
		"one in between is":      {capability, nil, typ, nil, nil, data},
		"all are empty":          {nil, nil},
		"empty, and only one is": {nil, join(capability, typ, data), nil},
	} {
		t.Run(name, func(t *testing.T) {
			for _, scan := range scans {
				frame := bytes.Clone(header)
				for _, part := range parts {
					frame = append(frame, bytesField(scan.customMessage, part)...)
					frame = append(frame, bytesField(1, alice)...) // so that a merge in place would be seen
				}
				before := bytes.Clone(frame)
				f, err := scan.scan(frame)
				require.NoError(t, err)
				assert.NotNil(t, f.CustomMessage)
				assert.Equal(t, string(join(parts...)), string(f.CustomMessage))
				assert.Equal(t, before, frame, "what is relayed stays as it is")
				assertAgrees(t, frame, scan)
			}
		})
	}
}

// A frame is up to max_message_size large and comes from whoever was let in: putting it together
// must not copy it for every field.
func TestScanMergesManyCustomMessagesInLinearTime(t *testing.T) {
	many := bytes.Repeat(bytesField(customMessageUp, []byte("\x1a\x01x")), 10_000)
	allocations := testing.AllocsPerRun(1, func() {
		f, err := wire.ScanAgentToServer(many)
		if err != nil || len(f.CustomMessage) != 30_000 {
			t.Error("not merged:", err, len(f.CustomMessage))
		}
	})
	assert.Less(t, allocations, 100.0)
}

func TestScanRefusesWhatTheDecoderRefuses(t *testing.T) {
	uid := bytesField(1, alice)
	deep := strings.Repeat("\xf3\x07", 20_000) // groups in groups
	for name, rest := range map[string][]byte{
		"cut in a tag":               {0x80},
		"cut in a number":            {0x10, 0x80},
		"cut in a fixed32":           fixed32Field(20)[:5],
		"cut in a fixed64":           fixed64Field(20)[:9],
		"cut in a length":            {0x1a, 0x80},
		"cut in a field":             {0x1a, 2, 'x'},
		"length beyond all memory":   {0x1a, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f},
		"number of eleven bytes":     join([]byte{0x10}, bytes.Repeat([]byte{0xff}, 10), []byte{1}),
		"field number zero":          {0x02, 0},
		"field number beyond int32":  {0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f, 0},
		"a second header":            {0},
		"end of a group not begun":   {0x0c},
		"group without end":          {0xf3, 0x07},
		"group with another's end":   {0xf3, 0x07, 0x0c},
		"wire type 6":                {0x0e},
		"wire type 7":                {0x0f},
		"groups deeper than allowed": []byte(deep),
	} {
		t.Run(name, func(t *testing.T) {
			for _, start := range [][]byte{join(header, uid), uid} {
				frame := join(start, rest)
				for direction, scan := range scans {
					f, err := scan.scan(frame)
					require.ErrorIs(t, err, wire.ErrMalformed, direction)
					assert.Equal(t, alice, f.UID, "%s: whom to tell is known", direction)
					assert.Equal(t, start[0] == 0, f.Header, direction)
					assertAgrees(t, frame, scan)
				}
			}
		})
	}
}

func TestScanRefusesAnEmptyFrame(t *testing.T) {
	for direction, scan := range scans {
		_, err := scan.scan(nil)
		require.ErrorIs(t, err, wire.ErrEmpty, direction)
		_, err = scan.scan([]byte{})
		require.ErrorIs(t, err, wire.ErrEmpty, direction)
	}
}

// Every captured frame, of agents and servers that nobody here wrote.
func TestScanAgreesWithTheDecoderOnCaptures(t *testing.T) {
	for _, capture := range captures(t) {
		t.Run(capture.name, func(t *testing.T) {
			f, err := scans[capture.direction].scan(capture.frame)
			require.NoError(t, err)
			assertAgrees(t, capture.frame, scans[capture.direction])
			assert.Equal(t, !strings.HasPrefix(capture.name, "legacy-"), f.Header)
			if f.UID != nil {
				_, err := wire.ParseUID(f.UID)
				require.NoError(t, err)
			}
		})
	}
}

func TestScanDoesNotAllocate(t *testing.T) {
	for _, capture := range captures(t) {
		scan := scans[capture.direction].scan
		assert.Zero(t, testing.AllocsPerRun(10, func() {
			if f, err := scan(capture.frame); err != nil || f.Empty() {
				t.Error(capture.name, err)
			}
		}), capture.name)
	}
}

func TestParseUIDTakesUUIDsAndULIDs(t *testing.T) {
	for length := range 64 {
		b := bytes.Repeat([]byte{'x'}, length)
		uid, err := wire.ParseUID(b)
		if length != 16 && length != 26 {
			require.ErrorIs(t, err, wire.ErrUID, "%d bytes", length)
			assert.Equal(t, wire.UID{}, uid)
			continue
		}
		require.NoError(t, err, "%d bytes", length)
		assert.Equal(t, b, uid.Bytes())
		assert.Equal(t, length == 26, uid.Text())
	}
}

func TestUIDIsAKeyThatOutlivesItsFrame(t *testing.T) {
	frame := bytes.Clone(alice)
	key, err := wire.ParseUID(frame)
	require.NoError(t, err)
	copy(frame, bob)
	assert.Equal(t, alice, key.Bytes())

	again, err := wire.ParseUID(alice)
	require.NoError(t, err)
	other, err := wire.ParseUID(bob)
	require.NoError(t, err)
	table := map[wire.UID]string{key: "alice", other: "bob"}
	assert.Equal(t, "alice", table[again])
	assert.Len(t, table, 2)

	// 16 bytes and 26 that begin with them, then zeros, are not the same.
	long, err := wire.ParseUID(join(alice, make([]byte, 10)))
	require.NoError(t, err)
	assert.NotEqual(t, key, long)
	assert.False(t, key.Is(long.Bytes()))
	assert.False(t, long.Is(alice))
}

func TestUIDIsWhatItWasParsedFrom(t *testing.T) {
	for _, b := range [][]byte{alice, cathy} {
		uid, err := wire.ParseUID(b)
		require.NoError(t, err)
		assert.True(t, uid.Is(b))
		assert.False(t, uid.Is(bob))
		assert.False(t, uid.Is(b[:15]))
		assert.False(t, uid.Is(nil))
	}
	var nobody wire.UID
	assert.False(t, nobody.Is(nil), "no UID is nobody's, not the same as another's lack of one")
	assert.False(t, nobody.Is(alice))
	assert.Empty(t, nobody.Bytes())
}

func TestUIDReadsAsPeopleKnowIt(t *testing.T) {
	for text, b := range map[string][]byte{
		"01980000-0000-7000-8000-00000000000a": alice,
		`"01H5MG7N9N36J28WEC8A8X5B17"`:         cathy,
		// It ends up in logs, and an agent may send anything.
		`"\n\x1b[31mred alert!!!!!!!!!!!"`: []byte("\n\x1b[31mred alert!!!!!!!!!!!"),
	} {
		uid, err := wire.ParseUID(b)
		require.NoError(t, err)
		assert.Equal(t, text, uid.String())
	}
	assert.Equal(t, "none", wire.UID{}.String())
}

func TestUIDDoesNotAllocate(t *testing.T) {
	for _, b := range [][]byte{alice, cathy} {
		uid, err := wire.ParseUID(b)
		require.NoError(t, err)
		table := map[wire.UID]int{uid: 1}
		assert.Zero(t, testing.AllocsPerRun(10, func() {
			again, err := wire.ParseUID(b)
			if err != nil || again != uid || table[again] != 1 {
				t.Error("not the same")
			}
		}), "ParseUID")
		assert.Zero(t, testing.AllocsPerRun(10, func() {
			if !uid.Is(b) || uid.Is(bob) {
				t.Error("not the same")
			}
		}), "Is")
	}
}

// A message within the message is found wherever it stands, and its parts are taken together.
func TestEmbeddedMessages(t *testing.T) {
	agent := encode(t, &protobufs.ServerToAgent{
		InstanceUid:         cathy,
		AgentIdentification: &protobufs.AgentIdentification{NewInstanceUid: []byte("new")},
		CustomCapabilities:  &protobufs.CustomCapabilities{Capabilities: []string{"weather"}},
	})
	more := encode(t, &protobufs.ServerToAgent{CustomCapabilities: &protobufs.CustomCapabilities{Capabilities: []string{"tides"}}})
	for _, frame := range [][]byte{join(agent, more), join([]byte{0}, agent, more)} {
		before := bytes.Clone(frame)
		assert.Equal(t, []byte(stated(t, "weather", "tides")), wire.Embedded(frame, wire.FieldCustomCapabilities))
		assert.Equal(t, encode(t, &protobufs.AgentIdentification{NewInstanceUid: []byte("new")}), wire.Embedded(frame, wire.FieldAgentIdentification))
		assert.Nil(t, wire.Embedded(frame, wire.FieldErrorResponse))
		assert.Equal(t, before, frame, "the frame stays as it is")
	}
	assert.Nil(t, wire.Embedded(nil, wire.FieldErrorResponse))
	assert.Nil(t, wire.Embedded([]byte{0, 0xff}, wire.FieldErrorResponse))
}

func TestOrderOfUIDs(t *testing.T) {
	parse := func(text string) wire.UID {
		uid, err := wire.ParseUID([]byte(text))
		require.NoError(t, err)
		return uid
	}
	a, b, text := parse("aaaaaaaaaaaaaaaa"), parse("aaaaaaaaaaaaaaab"), parse("aaaaaaaaaaaaaaaaaaaaaaaaaa")
	require.Negative(t, a.Compare(&b))
	require.Positive(t, b.Compare(&a))
	require.Zero(t, a.Compare(&a))
	require.Negative(t, b.Compare(&text))
	require.False(t, a.IsText())
	require.True(t, text.IsText())
}
