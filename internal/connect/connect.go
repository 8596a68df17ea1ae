// Package connect speaks the two custom messages by which a gateway asks its
// server about an agent: connect, and the server's connectResult.
package connect

import "google.golang.org/protobuf/encoding/protowire"

const (
	// Capability names the gateway messages among all custom messages.
	Capability = "com.bindplane.opamp-gateway"

	typeConnect = "connect"
	typeResult  = "connectResult"
)

// The fields of opamp.proto that a gateway message is made of.
const (
	fieldCustomMessageUp protowire.Number = 13 // of AgentToServer

	fieldCapability protowire.Number = 1 // of CustomMessage
	fieldType       protowire.Number = 2
	fieldData       protowire.Number = 3
)

// Kind tells the gateway messages from everybody else's.
type Kind int

const (
	// Other is any custom message that is not between gateway and server.
	Other Kind = iota
	// Connect asks the server about an agent.
	Connect
	// ConnectResult is the server's answer.
	ConnectResult
)

// Message finds out what an encoded custom_message is, and returns the JSON that
// it carries. It does not allocate; the data points into message. Whatever is not
// a well-formed gateway message is Other.
func Message(message []byte) (kind Kind, data []byte) {
	var capability, typ []byte
	for len(message) > 0 {
		number, wireType, n := protowire.ConsumeTag(message)
		if n < 0 {
			return Other, nil
		}
		message = message[n:]
		if wireType != protowire.BytesType {
			if n = protowire.ConsumeFieldValue(number, wireType, message); n < 0 {
				return Other, nil
			}
			message = message[n:]
			continue
		}
		value, n := protowire.ConsumeBytes(message)
		if n < 0 {
			return Other, nil
		}
		message = message[n:]
		switch number {
		case fieldCapability:
			capability = value
		case fieldType:
			typ = value
		case fieldData:
			data = value
		}
	}
	if string(capability) != Capability {
		return Other, nil
	}
	switch string(typ) {
	case typeConnect:
		return Connect, data
	case typeResult:
		return ConnectResult, data
	default:
		return Other, nil
	}
}
