package connect

import (
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"net/http"
	"strings"
	"sync"
	"unicode/utf8"

	"google.golang.org/protobuf/encoding/protowire"
)

// MaxQuestion is what a question may have, in bytes: it is kept for as long as its agent is connected.
const MaxQuestion = 64 << 10

// ErrQuestionTooLarge means that what there is to say about an agent is more than a server is asked.
var ErrQuestionTooLarge = errors.New("question about the agent is above 64 KiB")

// Question is what the server is told about one agent: the JSON of a connect
// without its request_uid, since an agent may have to be introduced again and
// again. It holds the agent's credentials and must never be logged.
type Question []byte

// clientCert is the header by which those who verify a client's certificate tell those who do not
// (RFC 9440). That of an agent is only its own word, which has no place there.
const (
	clientCert      = "Client-Cert"
	clientCertChain = "Client-Cert-Chain"
)

// scratch is where questions are put together, to be kept in no more memory than they have bytes.
var scratch = sync.Pool{New: func() any { b := make([]byte, 0, 2<<10); return &b }}

// NewQuestion returns the question about the agent at remoteAddress, whose upgrade request had
// these headers, and this certificate: a verified one, or nil. The headers are not changed.
func NewQuestion(remoteAddress string, headers http.Header, certificate *x509.Certificate) (Question, error) {
	buffer := scratch.Get().(*[]byte)
	b, ok := appendQuestion((*buffer)[:0], remoteAddress, headers, certificate)
	if !ok { // nor is the memory that it took kept
		return nil, ErrQuestionTooLarge
	}
	question := make(Question, len(b))
	copy(question, b)
	clear(b) // of the agent's credentials
	*buffer = b
	scratch.Put(buffer)
	return question, nil
}

// appendQuestion appends a question, as far as it is not too large.
func appendQuestion(b []byte, remoteAddress string, headers http.Header, certificate *x509.Certificate) (question []byte, ok bool) {
	b = append(b, `{"remote_address":`...)
	b = appendString(b, remoteAddress)
	b = append(b, `,"headers":{`...)
	first := true
	for name, values := range headers {
		if strings.EqualFold(name, clientCert) || strings.EqualFold(name, clientCertChain) {
			continue
		}
		if !first {
			b = append(b, ',')
		}
		first = false
		b = appendString(b, name)
		b = append(b, ":["...)
		for i, value := range values {
			if i > 0 {
				b = append(b, ',')
			}
			if b = appendString(b, value); len(b) > MaxQuestion {
				return b, false
			}
		}
		b = append(b, ']')
	}
	if certificate != nil {
		if !first {
			b = append(b, ',')
		}
		b = append(b, `"`+clientCert+`":[":`...)
		b = base64.StdEncoding.AppendEncode(b, certificate.Raw)
		b = append(b, `:"]`...)
	}
	b = append(b, "}}"...)
	return b, len(b) <= MaxQuestion
}

// appendString appends s as JSON. As in encoding/json, each byte that is not UTF-8 becomes U+FFFD.
// Nothing is escaped that need not be.
func appendString(b []byte, s string) []byte {
	const hex = "0123456789abcdef"
	b = append(b, '"')
	start := 0 // of what was not appended yet
	for i := 0; i < len(s); {
		c := s[i]
		if c >= utf8.RuneSelf {
			r, size := utf8.DecodeRuneInString(s[i:])
			if r == utf8.RuneError && size == 1 {
				b = append(b, s[start:i]...)
				b = utf8.AppendRune(b, utf8.RuneError)
				start = i + 1
			}
			i += size
			continue
		}
		if c < ' ' || c == '"' || c == '\\' {
			b = append(b, s[start:i]...)
			switch {
			case c >= ' ':
				b = append(b, '\\', c)
			case c >= '\b' && c <= '\r' && c != '\v':
				b = append(b, '\\', "btnvfr"[c-'\b'])
			default:
				b = append(b, '\\', 'u', '0', '0', hex[c>>4], hex[c&0xf])
			}
			start = i + 1
		}
		i++
	}
	b = append(b, s[start:]...)
	return append(b, '"')
}

// Frame returns the AgentToServer frame that asks the question under requestUID,
// which must not need escaping in JSON.
func (q Question) Frame(requestUID string) []byte {
	const before, behind = `{"request_uid":"`, `",`
	data := len(before) + len(requestUID) + len(behind) + len(q) - len("{")
	message := protowire.SizeTag(fieldCapability) + protowire.SizeBytes(len(Capability)) +
		protowire.SizeTag(fieldType) + protowire.SizeBytes(len(typeConnect)) +
		protowire.SizeTag(fieldData) + protowire.SizeBytes(data)

	frame := make([]byte, 0, 1+protowire.SizeTag(fieldCustomMessageUp)+protowire.SizeBytes(message))
	frame = append(frame, 0) // the header
	frame = protowire.AppendTag(frame, fieldCustomMessageUp, protowire.BytesType)
	frame = protowire.AppendVarint(frame, uint64(message))
	frame = protowire.AppendTag(frame, fieldCapability, protowire.BytesType)
	frame = protowire.AppendString(frame, Capability)
	frame = protowire.AppendTag(frame, fieldType, protowire.BytesType)
	frame = protowire.AppendString(frame, typeConnect)
	frame = protowire.AppendTag(frame, fieldData, protowire.BytesType)
	frame = protowire.AppendVarint(frame, uint64(data))
	frame = append(frame, before...)
	frame = append(frame, requestUID...)
	frame = append(frame, behind...)
	return append(frame, q[len("{"):]...)
}

// Headers returns the headers that the server is told of: those of the agent's upgrade request, and its verified
// certificate. They hold the agent's credentials, and must never be logged.
func (q Question) Headers() http.Header {
	var told struct {
		Headers http.Header `json:"headers"`
	}
	if len(q) > 0 && json.Unmarshal(q, &told) != nil {
		panic("connect: a question is not JSON") // it is our own
	}
	return told.Headers
}
