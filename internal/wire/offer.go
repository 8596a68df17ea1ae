package wire

import (
	"google.golang.org/protobuf/encoding/protowire"
)

// Field numbers on the way from a ServerToAgent to the endpoint that it offers its agent, below connection_settings: opamp,
// destination_endpoint.
const (
	fieldOpAMPSettings       = 2
	fieldDestinationEndpoint = 1
)

// offerPath is that way.
var offerPath = [...]protowire.Number{FieldConnectionSettings, fieldOpAMPSettings, fieldDestinationEndpoint}

// OfferedEndpoint returns the endpoint at which a ServerToAgent that was scanned without an error would have its agent
// connect from now on; nil if there is none. It points into frame. Where there are several, the last one holds, as in the
// decoder.
func OfferedEndpoint(frame []byte) []byte {
	endpoint, _ := lastAt(body(frame), offerPath[:])
	return endpoint
}

// body returns the message of a frame without the header.
func body(frame []byte) []byte {
	if len(frame) > 0 && frame[0] == 0 {
		return frame[1:]
	}
	return frame
}

// lastAt returns the last value at path in message, of which no part needs to be a message, and how many there are.
func lastAt(message []byte, path []protowire.Number) (last []byte, count int) {
	for number, f := range fieldsOf(message) {
		switch {
		case number != path[0]:
		case len(path) == 1:
			last = f.content
			count++
		default:
			if deeper, n := lastAt(f.content, path[1:]); n > 0 {
				last = deeper
				count += n
			}
		}
	}
	return last, count
}

// field is one field of a message as it is encoded.
type field struct {
	encoded []byte // with its tag
	content []byte // of a message, or bytes; nil of another kind
}

// fieldsOf yields the fields of a message, up to the first that cannot be read; of others than messages and bytes the
// number is 0, which is no field's.
func fieldsOf(message []byte) func(yield func(protowire.Number, field) bool) {
	return func(yield func(protowire.Number, field) bool) {
		for len(message) > 0 {
			number, kind, tag := protowire.ConsumeTag(message)
			if tag < 0 {
				return
			}
			n := protowire.ConsumeFieldValue(number, kind, message[tag:])
			if n < 0 {
				return
			}
			f := field{encoded: message[:tag+n]}
			if kind == protowire.BytesType {
				f.content, _ = protowire.ConsumeBytes(message[tag:])
			} else {
				number = 0
			}
			if !yield(number, f) {
				return
			}
			message = message[tag+n:]
		}
	}
}

// WithEndpoint returns a copy of a ServerToAgent that was scanned without an error, which offers its agent this endpoint
// instead of its own; or none, if endpoint is empty. OpAMP settings that hold nothing else are left out then. All other
// fields, unknown ones as well, are as they were, and in order. It reports false for a frame that offers no endpoint, or
// whose settings cannot be read. The copy is longer by no more than the endpoint and a few bytes.
func WithEndpoint(frame []byte, endpoint string) (edited []byte, ok bool) {
	message := body(frame)
	offered, count := lastAt(message, offerPath[:])
	if len(offered) == 0 {
		return nil, false
	}
	e := editor{endpoint: endpoint, left: count}
	edited = make([]byte, 0, len(frame)+len(endpoint)+maxGrowth)
	edited = append(edited, frame[:len(frame)-len(message)]...)
	return e.edit(edited, message, offerPath[:])
}

// maxGrowth is how much longer the tags and lengths around an endpoint can become.
const maxGrowth = 32

// editor puts another endpoint in the place of that which a message offers.
type editor struct {
	endpoint string
	left     int // endpoints that the rest of the message has; the last one holds, so the others just go
}

// edit appends message to b, with another value at path. It reports false if message cannot be read.
func (e *editor) edit(b, message []byte, path []protowire.Number) (edited []byte, ok bool) {
	read := 0
	for number, f := range fieldsOf(message) {
		read += len(f.encoded)
		switch {
		case number != path[0]:
			b = append(b, f.encoded...)
		case len(path) == 1:
			if e.left--; e.left == 0 && e.endpoint != "" {
				b = protowire.AppendTag(b, number, protowire.BytesType)
				b = protowire.AppendString(b, e.endpoint)
			}
		default:
			before := e.left
			inner, ok := e.edit(nil, f.content, path[1:])
			switch {
			case !ok:
				return b, false
			case e.left == before: // nothing is offered there
				b = append(b, f.encoded...)
			case len(inner) > 0 || number != fieldOpAMPSettings: // connection_settings stay, even empty
				b = protowire.AppendTag(b, number, protowire.BytesType)
				b = protowire.AppendBytes(b, inner)
			}
		}
	}
	return b, read == len(message)
}
