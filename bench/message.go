package main

import (
	"encoding/binary"
	"errors"
	"fmt"

	"google.golang.org/protobuf/encoding/protowire"
)

// uid is an instance UID.
type uid [16]byte

// uidOf gives each agent its own, spread as UUIDs are.
func uidOf(agent int) (u uid) {
	binary.BigEndian.PutUint64(u[:], mix(uint64(agent)))
	binary.BigEndian.PutUint64(u[8:], uint64(agent))
	return u
}

// mix is the step of splitmix64: a cheap source of bytes that look random.
func mix(x uint64) uint64 {
	x += 0x9e3779b97f4a7c15
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}

// What a message carries: who, which, when, and bytes that follow from these. An agent knows by
// them that a reply is its own, the next one, and whole.
const (
	stampSize = 16 // number and time
	pushed    = 1 << 63
)

// fillData makes the data of a message. The number of a push has the highest bit set.
func fillData(data []byte, agent int, number uint64, time int64) {
	binary.LittleEndian.PutUint64(data, number)
	binary.LittleEndian.PutUint64(data[8:], uint64(time))
	x := mix(uint64(agent)<<32 ^ number ^ uint64(time)<<1)
	rest := data[stampSize:]
	for ; len(rest) >= 8; rest = rest[8:] {
		binary.LittleEndian.PutUint64(rest, x)
		x += 0x9e3779b97f4a7c15
	}
	for i := range rest {
		rest[i] = byte(x >> (8 * i))
	}
}

// checkData returns the number and time of data that came back to an agent.
func checkData(data []byte, agent int) (number uint64, time int64, err error) {
	if len(data) < stampSize {
		return 0, 0, fmt.Errorf("data of %d bytes", len(data))
	}
	number, time = binary.LittleEndian.Uint64(data), int64(binary.LittleEndian.Uint64(data[8:]))
	x := mix(uint64(agent)<<32 ^ number ^ uint64(time)<<1)
	rest := data[stampSize:]
	for ; len(rest) >= 8; rest = rest[8:] {
		if binary.LittleEndian.Uint64(rest) != x {
			return 0, 0, errors.New("the bytes are not those that were sent")
		}
		x += 0x9e3779b97f4a7c15
	}
	for i := range rest {
		if rest[i] != byte(x>>(8*i)) {
			return 0, 0, errors.New("the last bytes are not those that were sent")
		}
	}
	return number, time, nil
}

// Field numbers of opamp.proto. The data travels in a flat field of bytes that every agent and
// server has (remote_config_status.last_remote_config_hash up, remote_config.config_hash down):
// it costs a relay that decodes messages as little as can be.
const (
	fieldUID = 1

	// AgentToServer.
	fieldSequence        = 2
	fieldDescription     = 3
	fieldStatus          = 7
	fieldAgentDisconnect = 9
	fieldCustomUp        = 13

	// ServerToAgent.
	fieldRemoteConfig = 3
	fieldFlags        = 6
	fieldCustomDown   = 11

	fieldStatusHash = 1 // of RemoteConfigStatus
	fieldConfigHash = 2 // of AgentRemoteConfig

	// CustomMessage.
	fieldCapability = 1
	fieldType       = 2
	fieldData       = 3

	flagReportFullState = 1
)

// The messages between gateway and server about agents.
const (
	gatewayCapability = "com.bindplane.opamp-gateway"
	typeConnect       = "connect"
	typeConnectResult = "connectResult"
)

// connectRequest is the data of a connect.
type connectRequest struct {
	RequestUID    string              `json:"request_uid"`
	RemoteAddress string              `json:"remote_address"`
	Headers       map[string][]string `json:"headers"`
}

// connectResult is the data of a connectResult.
type connectResult struct {
	RequestUID      string            `json:"request_uid"`
	Accept          bool              `json:"accept"`
	HTTPStatusCode  int               `json:"http_status_code"`
	ResponseHeaders map[string]string `json:"response_headers"`
}

// dataSize is how much data makes a message of size bytes.
func dataSize(size int) int {
	for n := size; n > stampSize; n-- {
		inner := protowire.SizeTag(1) + protowire.SizeBytes(n)
		if 1+protowire.SizeTag(1)+protowire.SizeBytes(16)+protowire.SizeTag(1)+protowire.SizeBytes(inner) <= size {
			return n
		}
	}
	return stampSize
}

func appendAgentToServer(b []byte, u uid, data []byte) []byte {
	return appendMessage(b, u, fieldStatus, fieldStatusHash, data)
}

// appendDescription appends an agent_description, which is all that makes a message a full status.
func appendDescription(b []byte) []byte {
	return protowire.AppendBytes(protowire.AppendTag(b, fieldDescription, protowire.BytesType), nil)
}

func appendServerToAgent(b []byte, u uid, data []byte) []byte {
	return appendMessage(b, u, fieldRemoteConfig, fieldConfigHash, data)
}

func appendMessage(b []byte, u uid, outer, inner protowire.Number, data []byte) []byte {
	b = append(b, 0) // the header
	b = protowire.AppendTag(b, fieldUID, protowire.BytesType)
	b = protowire.AppendBytes(b, u[:])
	b = protowire.AppendTag(b, outer, protowire.BytesType)
	b = protowire.AppendVarint(b, uint64(protowire.SizeTag(inner)+protowire.SizeBytes(len(data))))
	b = protowire.AppendTag(b, inner, protowire.BytesType)
	return protowire.AppendBytes(b, data)
}

func appendCustom(b []byte, field protowire.Number, typ string, data []byte) []byte {
	var custom []byte
	custom = protowire.AppendTag(custom, fieldCapability, protowire.BytesType)
	custom = protowire.AppendString(custom, gatewayCapability)
	custom = protowire.AppendTag(custom, fieldType, protowire.BytesType)
	custom = protowire.AppendString(custom, typ)
	custom = protowire.AppendTag(custom, fieldData, protowire.BytesType)
	custom = protowire.AppendBytes(custom, data)
	b = append(b, 0)
	b = protowire.AppendTag(b, field, protowire.BytesType)
	return protowire.AppendBytes(b, custom)
}

// fields calls found for each field of a message that holds bytes, or a number.
func fields(message []byte, found func(number protowire.Number, value []byte, varint uint64)) error {
	for len(message) > 0 {
		number, kind, n := protowire.ConsumeTag(message)
		if n < 0 {
			return protowire.ParseError(n)
		}
		message = message[n:]
		var value []byte
		var varint uint64
		switch kind {
		case protowire.BytesType:
			value, n = protowire.ConsumeBytes(message)
		case protowire.VarintType:
			varint, n = protowire.ConsumeVarint(message)
		default:
			n = protowire.ConsumeFieldValue(number, kind, message)
		}
		if n < 0 {
			return protowire.ParseError(n)
		}
		message = message[n:]
		found(number, value, varint)
	}
	return nil
}

// body is a message without the header.
func body(message []byte) []byte {
	if len(message) > 0 && message[0] == 0 {
		return message[1:]
	}
	return message
}
