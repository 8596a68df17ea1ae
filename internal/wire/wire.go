// Package wire reads of an OpAMP frame what a relay needs and nothing more: the
// header rule, whose message it is, and which of the fields that concern the hop
// itself it carries. It never decodes a message.
//
// A frame is the payload of one binary WebSocket message: a varint header, today
// always zero, then the protobuf (OpAMP specification, "WebSocket Message
// Format"). Agents older than the header send the protobuf alone; its first byte
// is a tag and so never zero.
package wire

import (
	"bytes"
	"cmp"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"

	"google.golang.org/protobuf/encoding/protowire"
)

// Field numbers of opamp.proto that concern the hop.
const (
	fieldInstanceUID = 1 // both messages

	// ServerToAgent.
	FieldErrorResponse       = 2
	FieldConnectionSettings  = 4
	FieldAgentIdentification = 8
	FieldCustomCapabilities  = 10
	fieldCustomMessageDown   = 11

	// AgentToServer. The 2022 format, which has no header, has agent_disconnect one lower.
	fieldSequenceNum           = 2
	fieldCapabilities          = 4
	fieldFlags                 = 10 // but not in the 2022 format
	FieldAgentDisconnect       = 9
	FieldLegacyAgentDisconnect = 8
	fieldCustomMessageUp       = 13
)

var (
	// ErrEmpty means that the frame has no message in it, not even an empty one with a header.
	ErrEmpty = errors.New("empty frame")
	// ErrMalformed means that the frame is not a protobuf message; the full decoder would refuse it too.
	ErrMalformed = errors.New("malformed frame")
)

// Fields is what a scan finds at the top level of a frame. Its slices point into
// the frame. The zero value is that of an empty message.
type Fields struct {
	// UID is the instance_uid as sent, of any length; nil when there is none.
	UID []byte
	// CustomMessage is the encoded custom_message; nil when there is none.
	CustomMessage []byte
	// Sequence is the sequence_num of an AgentToServer, in both formats; 0 when there is none.
	Sequence uint64
	// Flags are those of an AgentToServer; 0 when there are none. In the 2022 format they are something else.
	Flags uint64
	// Header tells whether the frame began with the header byte.
	Header bool
	// present has bit n set when field n < 32 occurs as an embedded message or bytes.
	present uint32
	// fields is the number of fields, known and unknown.
	fields int
}

// Has reports whether the message or bytes field number occurs. Only numbers below 32 are kept.
func (f *Fields) Has(number protowire.Number) bool { return f.present&(1<<number) != 0 }

// Empty reports whether the message has no fields at all.
func (f *Fields) Empty() bool { return f.fields == 0 }

// Bare reports whether the message says at most whose it is.
func (f *Fields) Bare() bool { return f.fields == 0 || f.fields == 1 && f.UID != nil }

// ScanAgentToServer scans a frame sent by an agent.
func ScanAgentToServer(frame []byte) (Fields, error) { return scan(frame, fieldCustomMessageUp) }

// ScanServerToAgent scans a frame sent by a server.
func ScanServerToAgent(frame []byte) (Fields, error) { return scan(frame, fieldCustomMessageDown) }

// scan walks the top-level fields once. As in the decoder, the last occurrence of
// a scalar wins, occurrences of an embedded message add up, and a known number
// with another wire type is an unknown field. Nested bytes are skipped: the
// decoder may still refuse what scan accepts, never the other way round. On an
// error the fields found so far are returned with it.
func scan(frame []byte, customMessage protowire.Number) (Fields, error) {
	var f Fields
	if len(frame) == 0 {
		return f, ErrEmpty
	}
	rest := frame
	if rest[0] == 0 {
		f.Header, rest = true, rest[1:]
	}
	for len(rest) > 0 {
		number, kind, n := protowire.ConsumeTag(rest)
		if n < 0 {
			return f, ErrMalformed
		}
		rest = rest[n:]
		f.fields++
		if kind != protowire.BytesType {
			switch {
			case kind != protowire.VarintType:
				n = protowire.ConsumeFieldValue(number, kind, rest)
			case number == fieldSequenceNum:
				f.Sequence, n = protowire.ConsumeVarint(rest)
			case number == fieldFlags:
				f.Flags, n = protowire.ConsumeVarint(rest)
			default:
				_, n = protowire.ConsumeVarint(rest)
			}
			if n < 0 {
				return f, ErrMalformed
			}
			rest = rest[n:]
			continue
		}
		value, n := protowire.ConsumeBytes(rest)
		if n < 0 {
			return f, ErrMalformed
		}
		rest = rest[n:]
		if number >= 32 {
			continue
		}
		f.present |= 1 << number
		switch number {
		case fieldInstanceUID:
			f.UID = value
		case customMessage:
			// A second occurrence is merged into the first, which is the same as
			// decoding both in a row. Nobody sends that, but nothing may hide in it.
			// Without spare capacity the merge is a copy, and the frame stays as it is.
			if f.CustomMessage == nil {
				f.CustomMessage = slices.Clip(value)
			} else {
				f.CustomMessage = append(f.CustomMessage, value...)
			}
		}
	}
	return f, nil
}

// HeadUID returns the instance_uid of a message of which prefix is the start, whoever sent it; nil
// unless all of it is there. It points into prefix.
func HeadUID(prefix []byte) []byte {
	rest := bytes.TrimPrefix(prefix, []byte{0})
	for len(rest) > 0 {
		number, kind, n := protowire.ConsumeTag(rest)
		if n < 0 {
			return nil
		}
		rest = rest[n:]
		if number == fieldInstanceUID && kind == protowire.BytesType {
			uid, n := protowire.ConsumeBytes(rest)
			if n < 0 {
				return nil
			}
			return uid
		}
		if n = protowire.ConsumeFieldValue(number, kind, rest); n < 0 {
			return nil
		}
		rest = rest[n:]
	}
	return nil
}

// Embedded returns what a frame that was scanned without an error has of the embedded message of
// this number, encoded; nil if there is none. Occurrences add up, as in the decoder.
func Embedded(frame []byte, number protowire.Number) (value []byte) {
	if len(frame) > 0 && frame[0] == 0 {
		frame = frame[1:]
	}
	for len(frame) > 0 {
		n, kind, size := protowire.ConsumeTag(frame)
		if size < 0 {
			return nil
		}
		frame = frame[size:]
		if n == number && kind == protowire.BytesType {
			part, _ := protowire.ConsumeBytes(frame)
			if value == nil {
				value = slices.Clip(part)
			} else {
				value = append(value, part...)
			}
		}
		if size = protowire.ConsumeFieldValue(n, kind, frame); size < 0 {
			return nil
		}
		frame = frame[size:]
	}
	return value
}

// UID is an instance UID in a form that can be compared and used as a map key:
// 16 bytes (UUID) or 26 bytes of text (the ULID of older agents). The zero value
// is no UID.
type UID struct {
	length uint8
	bytes  [26]byte
}

// ErrUID means that an instance UID has neither 16 nor 26 bytes.
var ErrUID = errors.New("instance UID has neither 16 nor 26 bytes")

// ParseUID takes the bytes of an instance_uid field. It copies them.
func ParseUID(b []byte) (UID, error) {
	if len(b) != 16 && len(b) != 26 {
		return UID{}, ErrUID
	}
	uid := UID{length: uint8(len(b))}
	copy(uid.bytes[:], b)
	return uid, nil
}

// Is reports whether b holds this UID.
func (u *UID) Is(b []byte) bool { return len(b) > 0 && bytes.Equal(b, u.bytes[:u.length]) }

// Bytes returns the UID as it stands in a message.
func (u *UID) Bytes() []byte { return u.bytes[:u.length] }

// Text reports whether the UID is the 26-byte text of older agents.
func (u *UID) Text() bool { return u.length == 26 }

// Compare puts UIDs in an order: the shorter ones first, which are not text, then by their bytes.
func (u *UID) Compare(v *UID) int {
	return cmp.Or(cmp.Compare(u.length, v.length), bytes.Compare(u.bytes[:], v.bytes[:]))
}

// IsText reports whether the UID is a text of 26 characters, as older agents have it.
func (u *UID) IsText() bool { return u.length == 26 }

// String returns the UID as people know it: a UUID in its usual form, or the text.
func (u UID) String() string {
	switch u.length {
	case 16:
		h := hex.EncodeToString(u.bytes[:16])
		return h[:8] + "-" + h[8:12] + "-" + h[12:16] + "-" + h[16:20] + "-" + h[20:]
	case 26:
		return fmt.Sprintf("%q", u.bytes[:26])
	default:
		return "none"
	}
}
