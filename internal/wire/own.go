package wire

import (
	"bytes"
	"slices"
	"strings"

	"github.com/open-telemetry/opamp-go/protobufs"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
)

// Format is how an agent's frames look, and so how the gateway's own frames for it have to.
type Format struct {
	// Header tells whether the agent's frames begin with the header byte.
	Header bool
	// Legacy tells whether the agent speaks the format of 2022, whose field numbers differ.
	Legacy bool
}

// FormatOf returns the format of an agent that sent f under uid.
func FormatOf(f *Fields, uid UID) Format {
	return Format{Header: f.Header, Legacy: !f.Header && uid.Text()}
}

// Departs reports whether the agent says in f that it is leaving.
func (m Format) Departs(f *Fields) bool {
	if m.Legacy {
		return f.Has(FieldLegacyAgentDisconnect)
	}
	return f.Has(FieldAgentDisconnect)
}

// RequestsUID reports whether the agent asks in f for another instance UID, since the one that it has is temporary.
func (m Format) RequestsUID(f *Fields) bool {
	return !m.Legacy && f.Flags&uint64(protobufs.AgentToServerFlags_AgentToServerFlags_RequestInstanceUid) != 0
}

// Goodbye returns what the agent would have said before it left: an AgentToServer with
// agent_disconnect, under this sequence_num, 0 for none.
func (m Format) Goodbye(uid UID, sequence uint64) []byte {
	frame := m.begin(uid)
	if sequence != 0 {
		frame = protowire.AppendTag(frame, fieldSequenceNum, protowire.VarintType)
		frame = protowire.AppendVarint(frame, sequence)
	}
	disconnect := protowire.Number(FieldAgentDisconnect)
	if m.Legacy {
		disconnect = FieldLegacyAgentDisconnect
	}
	frame = protowire.AppendTag(frame, disconnect, protowire.BytesType)
	return protowire.AppendBytes(frame, nil)
}

// Nothing returns a ServerToAgent with nothing to say: what a server answers where it has to.
func (m Format) Nothing(uid UID) []byte { return m.begin(uid) }

// Poll returns an AgentToServer in the agent's name that says nothing new, so that a server which speaks only when it is
// spoken to can answer: under this sequence_num, with the capabilities that the agent has told last.
func (m Format) Poll(uid UID, sequence, capabilities uint64) []byte {
	frame := m.begin(uid)
	frame = protowire.AppendTag(frame, fieldSequenceNum, protowire.VarintType)
	frame = protowire.AppendVarint(frame, sequence)
	if capabilities != 0 && !m.Legacy {
		frame = protowire.AppendTag(frame, fieldCapabilities, protowire.VarintType)
		frame = protowire.AppendVarint(frame, capabilities)
	}
	return frame
}

// Capabilities returns the capabilities in a frame of an agent that was scanned without an error; 0 if there are none.
func Capabilities(frame []byte) (capabilities uint64) {
	rest := bytes.TrimPrefix(frame, []byte{0})
	for len(rest) > 0 {
		number, kind, n := protowire.ConsumeTag(rest)
		if n < 0 {
			return capabilities
		}
		rest = rest[n:]
		if number == fieldCapabilities && kind == protowire.VarintType {
			capabilities, n = protowire.ConsumeVarint(rest)
		} else {
			n = protowire.ConsumeFieldValue(number, kind, rest)
		}
		if n < 0 {
			return capabilities
		}
		rest = rest[n:]
	}
	return capabilities
}

// WithUID returns a ServerToAgent frame with this instance UID added, which has none. The header is where it was.
func WithUID(frame []byte, uid UID) []byte {
	frame = slices.Clip(frame)
	frame = protowire.AppendTag(frame, fieldInstanceUID, protowire.BytesType)
	return protowire.AppendBytes(frame, uid.Bytes())
}

// ReportFullState returns a ServerToAgent that asks the agent for its full state.
func (m Format) ReportFullState(uid UID) []byte {
	return m.marshal(&protobufs.ServerToAgent{
		InstanceUid: uid.Bytes(),
		Flags:       uint64(protobufs.ServerToAgentFlags_ServerToAgentFlags_ReportFullState),
	})
}

// maxForeignUID is how much of an instance UID that is none goes back to who sent it, in bytes.
const maxForeignUID = 128

// BadRequest returns a ServerToAgent that tells the agent what is wrong with its message, under the
// instance_uid that it came with, whatever that is.
func (m Format) BadRequest(uid []byte, text string) []byte {
	return m.marshal(&protobufs.ServerToAgent{
		InstanceUid: uid[:min(len(uid), maxForeignUID)],
		ErrorResponse: &protobufs.ServerErrorResponse{
			Type:         protobufs.ServerErrorResponseType_ServerErrorResponseType_BadRequest,
			ErrorMessage: strings.ToValidUTF8(text, "\ufffd"),
		},
	})
}

// CustomCapabilities returns a ServerToAgent that states the server's custom capabilities, as it
// has encoded them, to the agent or, without a uid, to the gateway at the other end.
func (m Format) CustomCapabilities(uid UID, stated string) []byte {
	frame := m.begin(uid)
	frame = slices.Grow(frame, len(stated)+protowire.SizeTag(FieldCustomCapabilities)+protowire.SizeVarint(uint64(len(stated))))
	frame = protowire.AppendTag(frame, FieldCustomCapabilities, protowire.BytesType)
	return protowire.AppendString(frame, stated)
}

// begin returns the start of a frame, up to and including the UID, with room for a little more.
func (m Format) begin(uid UID) []byte {
	frame := make([]byte, 0, 48)
	if m.Header {
		frame = append(frame, 0)
	}
	if uid == (UID{}) {
		return frame
	}
	frame = protowire.AppendTag(frame, fieldInstanceUID, protowire.BytesType)
	return protowire.AppendBytes(frame, uid.Bytes())
}

func (m Format) marshal(message proto.Message) []byte {
	var frame []byte
	if m.Header {
		frame = append(frame, 0)
	}
	frame, err := proto.MarshalOptions{}.MarshalAppend(frame, message)
	if err != nil {
		panic("wire: our own message does not marshal: " + err.Error()) // only invalid UTF-8 could
	}
	return frame
}
