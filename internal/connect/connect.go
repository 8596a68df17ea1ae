// Package connect speaks the two custom messages by which a gateway asks its
// server about an agent: connect, and the server's connectResult.
package connect

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"

	"github.com/open-telemetry/opamp-go/protobufs"
	"golang.org/x/net/http/httpguts"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
)

const (
	// Capability names the gateway messages among all custom messages.
	Capability = "com.bindplane.opamp-gateway"

	typeConnect = "connect"
	typeResult  = "connectResult"
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
		switch number { // of opamp.proto's CustomMessage
		case 1:
			capability = value
		case 2:
			typ = value
		case 3:
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

// Question is what the server is told about one agent: the JSON of a connect
// without its request_uid, since an agent may have to be introduced again and
// again. It holds the agent's credentials and must never be logged.
type Question []byte

// NewQuestion returns the question about the agent at remoteAddress, whose
// upgrade request had these headers.
func NewQuestion(remoteAddress string, headers http.Header) (Question, error) {
	body, err := json.Marshal(struct {
		RemoteAddress string      `json:"remote_address"`
		Headers       http.Header `json:"headers"`
	}{remoteAddress, headers})
	if err != nil {
		return nil, fmt.Errorf("marshal connect: %w", err)
	}
	return body, nil
}

// Frame returns the AgentToServer frame that asks the question under requestUID,
// which must not need escaping in JSON.
func (q Question) Frame(requestUID string) ([]byte, error) {
	data := make([]byte, 0, len(q)+len(requestUID)+len(`{"request_uid":"",`))
	data = append(data, `{"request_uid":"`...)
	data = append(data, requestUID...)
	data = append(data, `",`...)
	data = append(data, q[1:]...)
	frame, err := proto.MarshalOptions{}.MarshalAppend([]byte{0}, &protobufs.AgentToServer{
		CustomMessage: &protobufs.CustomMessage{Capability: Capability, Type: typeConnect, Data: data},
	})
	if err != nil {
		return nil, fmt.Errorf("marshal connect: %w", err)
	}
	return frame, nil
}

// RequestUID returns the request_uid in the JSON of a connect.
func RequestUID(data []byte) (string, error) {
	requestUID, _, err := ParseResult(data)
	return requestUID, err
}

// Result is the server's verdict on one agent. Its zero value refuses with 401.
type Result struct {
	Accept     bool              `json:"accept"`
	StatusCode int               `json:"http_status_code"`
	Headers    map[string]string `json:"response_headers"`
}

// ParseResult reads the JSON of a connectResult: the request_uid that it answers, and the verdict,
// which is a refusal if it cannot be read.
func ParseResult(data []byte) (requestUID string, result Result, err error) {
	var message struct {
		RequestUID string `json:"request_uid"`
		Result
	}
	err = json.Unmarshal(data, &message)
	switch {
	case message.RequestUID == "" && err != nil:
		return "", Result{}, fmt.Errorf("read request_uid: %w", err)
	case message.RequestUID == "":
		return "", Result{}, errors.New("read request_uid: missing")
	case err != nil: // something else is of another type than it should be
		message.Result = Result{}
	}
	return message.RequestUID, message.Result, nil
}

// RefusalStatus returns the HTTP status for a refused agent: the server's, if it
// is one that can refuse, otherwise 401.
func (r Result) RefusalStatus() int {
	if r.StatusCode < 400 || r.StatusCode > 599 {
		return http.StatusUnauthorized
	}
	return r.StatusCode
}

// hopByHop are the headers that belong to one connection and are never passed on
// (RFC 9110, section 7.6.1), and those that this end's HTTP stack sets itself.
var hopByHop = map[string]bool{
	"Connection": true, "Keep-Alive": true, "Proxy-Authenticate": true, "Proxy-Authorization": true,
	"Proxy-Connection": true, "Te": true, "Trailer": true, "Transfer-Encoding": true,
	"Content-Length": true,
}

// CopyRefusalHeaders adds the server's headers for a refused agent to h. Upgrade
// stays on a 426, where it says what to upgrade to.
func (r Result) CopyRefusalHeaders(h http.Header) {
	for name, value := range r.Headers {
		name = http.CanonicalHeaderKey(name)
		switch {
		case hopByHop[name],
			name == "Upgrade" && r.RefusalStatus() != http.StatusUpgradeRequired,
			!httpguts.ValidHeaderFieldName(name), !httpguts.ValidHeaderFieldValue(value):
			continue
		}
		h.Set(name, value)
		if name == "Upgrade" {
			h.Set("Connection", "Upgrade") // the one header cannot be without the other (RFC 9110, section 7.8)
		}
	}
}
