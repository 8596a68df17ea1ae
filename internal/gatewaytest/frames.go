package gatewaytest

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"net/http"

	"github.com/open-telemetry/opamp-go/protobufs"
	"google.golang.org/protobuf/proto"
)

// The custom messages of gateways, as protocol.md of this project describes them. They are
// spelled out here, so that the tests do not share a mistake with the code.
const (
	GatewayCapability = "com.bindplane.opamp-gateway"
	ConnectType       = "connect"
	ConnectResultType = "connectResult"

	// ConnectionIDHeader is how a gateway names each link in its upgrade request.
	ConnectionIDHeader = "X-Opamp-Gateway-Connection-Id"
)

// UID returns the instance UID of the agent of that name: 16 bytes.
func UID(name string) []byte {
	uid := make([]byte, 16)
	copy(uid, name)
	return uid
}

// TextUID returns the instance UID that an agent of that name had in the format of 2022: 26
// bytes of text.
func TextUID(name string) []byte {
	return []byte(fmt.Sprintf("%-26.26s", name))
}

// Frame returns a message as it travels today: with the header byte before it.
func Frame(message proto.Message) []byte {
	frame, err := proto.MarshalOptions{}.MarshalAppend([]byte{0}, message)
	if err != nil {
		panic(err)
	}
	return frame
}

// Status returns a frame of the agent with this uid, told from others by its sequence number.
func Status(uid []byte, sequence int) []byte {
	return Frame(&protobufs.AgentToServer{InstanceUid: uid, SequenceNum: uint64(sequence), Capabilities: 7})
}

// Report returns a frame of the agent with this uid that is about size bytes long.
func Report(uid []byte, sequence, size int) []byte {
	return Frame(&protobufs.AgentToServer{
		InstanceUid: uid, SequenceNum: uint64(sequence),
		EffectiveConfig: &protobufs.EffectiveConfig{ConfigMap: ConfigMap(size)},
	})
}

// Goodbye returns the last frame of the agent with this uid.
func Goodbye(uid []byte) []byte {
	return Frame(&protobufs.AgentToServer{InstanceUid: uid, AgentDisconnect: &protobufs.AgentDisconnect{}})
}

// GoodbyeAfter returns the goodbye of an agent, or of a gateway in its place, whose last message had
// this sequence number.
func GoodbyeAfter(uid []byte, sequence int) []byte {
	return Frame(&protobufs.AgentToServer{InstanceUid: uid, SequenceNum: uint64(sequence) + 1, AgentDisconnect: &protobufs.AgentDisconnect{}})
}

// Offer returns a frame for the agent with this uid that offers a configuration of about size
// bytes, told from others by its hash.
func Offer(uid []byte, hash string, size int) []byte {
	return Frame(&protobufs.ServerToAgent{
		InstanceUid:  uid,
		RemoteConfig: &protobufs.AgentRemoteConfig{Config: ConfigMap(size), ConfigHash: []byte(hash)},
	})
}

// ConfigMap returns a configuration of size bytes, no two of which are the same place in a
// pattern, so that what is lost or swapped shows.
func ConfigMap(size int) *protobufs.AgentConfigMap {
	body := make([]byte, size)
	for i := range body {
		body[i] = byte(i ^ i>>8 ^ i>>16)
	}
	return &protobufs.AgentConfigMap{ConfigMap: map[string]*protobufs.AgentConfigFile{"": {Body: body}}}
}

// AgentToServer decodes what an agent or a gateway has sent, with or without the header byte.
func AgentToServer(frame []byte) (*protobufs.AgentToServer, error) {
	message := new(protobufs.AgentToServer)
	return message, proto.Unmarshal(withoutHeader(frame), message)
}

// ServerToAgent decodes what a server or a gateway has sent, with or without the header byte.
func ServerToAgent(frame []byte) (*protobufs.ServerToAgent, error) {
	message := new(protobufs.ServerToAgent)
	return message, proto.Unmarshal(withoutHeader(frame), message)
}

func withoutHeader(frame []byte) []byte {
	if len(frame) > 0 && frame[0] == 0 {
		return frame[1:]
	}
	return frame
}

// Fragment returns one WebSocket frame as it stands on the wire. That of an agent is masked,
// with a key that changes nothing. The opcode of a message's further fragments is 0.
func Fragment(fromAgent bool, opcode byte, last bool, payload []byte) []byte {
	frame := []byte{opcode, 127}
	if last {
		frame[0] |= 0x80
	}
	frame = binary.BigEndian.AppendUint64(frame, uint64(len(payload)))
	if fromAgent {
		frame[1] |= 0x80
		frame = append(frame, 0, 0, 0, 0)
	}
	return append(frame, payload...)
}

// Connect returns the frame in which a gateway asks about one of its agents.
func Connect(requestUID, remoteAddress string, headers http.Header) []byte {
	return Frame(&protobufs.AgentToServer{
		CustomMessage: custom(ConnectType, map[string]any{
			"request_uid": requestUID, "remote_address": remoteAddress, "headers": headers,
		}),
	})
}

// Verdict is what a server decides about an agent.
type Verdict struct {
	Accept  bool
	Status  int
	Headers map[string]string
}

// ConnectResult returns the frame in which a server answers a gateway.
func ConnectResult(requestUID string, verdict Verdict) *protobufs.ServerToAgent {
	return &protobufs.ServerToAgent{
		CustomMessage: custom(ConnectResultType, map[string]any{
			"request_uid": requestUID, "accept": verdict.Accept,
			"http_status_code": verdict.Status, "response_headers": verdict.Headers,
		}),
	}
}

func custom(typ string, body any) *protobufs.CustomMessage {
	data, err := json.Marshal(body)
	if err != nil {
		panic(err)
	}
	return &protobufs.CustomMessage{Capability: GatewayCapability, Type: typ, Data: data}
}
