package wire

import (
	"google.golang.org/protobuf/proto"

	"github.com/open-telemetry/opamp-go/protobufs"
	"google.golang.org/protobuf/encoding/protowire"
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

// Goodbye returns what the agent would have said before it left: an AgentToServer with
// agent_disconnect.
func (m Format) Goodbye(uid UID) []byte {
	if m.Legacy {
		frame := m.begin(uid)
		frame = protowire.AppendTag(frame, FieldLegacyAgentDisconnect, protowire.BytesType)
		return protowire.AppendBytes(frame, nil)
	}
	return m.marshal(&protobufs.AgentToServer{InstanceUid: uid.Bytes(), AgentDisconnect: &protobufs.AgentDisconnect{}})
}

// ReportFullState returns a ServerToAgent that asks the agent for its full state.
func (m Format) ReportFullState(uid UID) []byte {
	return m.marshal(&protobufs.ServerToAgent{
		InstanceUid: uid.Bytes(),
		Flags:       uint64(protobufs.ServerToAgentFlags_ServerToAgentFlags_ReportFullState),
	})
}

// BadRequest returns a ServerToAgent that tells the agent what is wrong with its message.
func (m Format) BadRequest(uid UID, text string) []byte {
	return m.marshal(&protobufs.ServerToAgent{
		InstanceUid: uid.Bytes(),
		ErrorResponse: &protobufs.ServerErrorResponse{
			Type:         protobufs.ServerErrorResponseType_ServerErrorResponseType_BadRequest,
			ErrorMessage: text,
		},
	})
}

// CustomCapabilities returns a ServerToAgent that states the server's custom capabilities, to
// the agent or, without a uid, to the gateway at the other end.
func (m Format) CustomCapabilities(uid UID, capabilities []string) []byte {
	return m.marshal(&protobufs.ServerToAgent{
		InstanceUid:        uid.Bytes(),
		CustomCapabilities: &protobufs.CustomCapabilities{Capabilities: capabilities},
	})
}

// begin returns the start of a frame, up to and including the UID.
func (m Format) begin(uid UID) []byte {
	var frame []byte
	if m.Header {
		frame = append(frame, 0)
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
