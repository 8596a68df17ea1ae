package connect

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strings"

	"github.com/open-telemetry/opamp-go/protobufs"
	"golang.org/x/net/http/httpguts"
	"google.golang.org/protobuf/proto"
)

const (
	// MaxRequestUID is what a request_uid may have, in bytes.
	MaxRequestUID = 128
	// maxRefusalHeaders is what the headers of a refusal may have in all, in bytes as they are written.
	maxRefusalHeaders = 16 << 10
)

var (
	errNoObject = errors.New("not a JSON object")
	errEscaped  = errors.New("a key has an escape in it")
)

// RequestUID returns the request_uid in the JSON of a connect, or of a connectResult. There is
// exactly one, whatever its case: of two, another parser might read the other.
func RequestUID(data []byte) (string, error) {
	if err := checkObject(data); err != nil {
		return "", fmt.Errorf("read request_uid: %w", err)
	}
	var found []byte
	for key, value := range members(data) {
		switch {
		case bytes.IndexByte(key, '\\') >= 0:
			return "", fmt.Errorf("read request_uid: %w", errEscaped)
		case !is(key, "request_uid"):
		case found != nil:
			return "", errors.New("read request_uid: there are two")
		case string(key) != "request_uid":
			return "", errors.New("read request_uid: its key is in another case")
		default:
			found = value
		}
	}
	const longestEscape = len(`\u0000`)
	var requestUID string
	switch {
	case found == nil:
		return "", errors.New("read request_uid: missing")
	case len(found) > longestEscape*MaxRequestUID+len(`""`):
		return "", fmt.Errorf("read request_uid: above %d bytes", MaxRequestUID)
	case json.Unmarshal(found, &requestUID) != nil:
		return "", errors.New("read request_uid: not a string") // whose error would quote it
	case requestUID == "":
		return "", errors.New("read request_uid: empty")
	case len(requestUID) > MaxRequestUID:
		return "", fmt.Errorf("read request_uid: above %d bytes", MaxRequestUID)
	}
	return requestUID, nil
}

// Result is the server's verdict on one agent. Its zero value refuses with 401.
type Result struct {
	Accept     bool
	StatusCode int
	// Headers are those that may be for the agent, under their canonical names.
	Headers map[string]string
}

// ParseResult reads the JSON of a connectResult: the request_uid that it answers, and the verdict,
// which is a refusal if it cannot be read.
func ParseResult(data []byte) (requestUID string, result Result, err error) {
	if requestUID, err = RequestUID(data); err != nil {
		return "", Result{}, err
	}
	for key, value := range members(data) {
		switch {
		case is(key, "accept"):
			err = json.Unmarshal(value, &result.Accept)
		case is(key, "http_status_code"):
			err = json.Unmarshal(value, &result.StatusCode)
		case is(key, "response_headers"):
			result.Headers, err = parseHeaders(value)
		}
		if err != nil { // it is of another type than it should be
			return requestUID, Result{}, nil
		}
	}
	return requestUID, result, nil
}

// parseHeaders reads the JSON of response_headers. What is not for the agent, or too much, is left out.
func parseHeaders(object []byte) (map[string]string, error) {
	if string(object) == "null" {
		return nil, nil
	}
	if object[0] != '{' {
		return nil, errNoObject
	}
	headers := map[string]string{}
	size := 0
	for key, value := range members(object) {
		if value[0] != '"' && value[0] != 'n' {
			return nil, errors.New("a header is not a string")
		}
		if !forAgents(key) || size+headerSize(key, value) > maxRefusalHeaders {
			continue
		}
		size += headerSize(key, value)
		var text string
		if err := json.Unmarshal(value, &text); err != nil {
			return nil, err
		}
		headers[http.CanonicalHeaderKey(string(key))] = text
	}
	return headers, nil
}

// headerSize is what a header takes on the wire.
func headerSize[B []byte | string](name, value B) int {
	return len(name) + len(": ") + len(value) + len("\r\n")
}

// forAgents reports whether a header of this name may be for the agent. All others concern one
// connection, its HTTP, or a browser.
func forAgents[B []byte | string](name B) bool {
	return len(name) > 1 && (name[0] == 'X' || name[0] == 'x') && name[1] == '-' ||
		is(name, "Retry-After") || is(name, "WWW-Authenticate") || is(name, "Upgrade") || is(name, "Location")
}

// TurnAway returns the ServerToAgent frame by which a gateway itself refuses the agent about which
// the gateway below asked under requestUID: with 503, and when to come again, in seconds.
func TurnAway(requestUID, retryAfter string) []byte {
	return Result{StatusCode: http.StatusServiceUnavailable, Headers: map[string]string{"Retry-After": retryAfter}}.Frame(requestUID)
}

// Frame returns the ServerToAgent frame that answers the question under requestUID so. It is for what
// servers have not said in this form: of what they have, the frame is passed on.
func (r Result) Frame(requestUID string) []byte {
	status, headers := http.StatusOK, map[string]string{}
	if !r.Accept {
		status = r.RefusalStatus()
		passed := http.Header{}
		r.CopyRefusalHeaders(passed)
		passed.Del("Connection") // it belongs to the HTTP of who gets them
		for name := range passed {
			headers[name] = passed.Get(name)
		}
	}
	data, err := json.Marshal(struct {
		RequestUID string            `json:"request_uid"`
		Accept     bool              `json:"accept"`
		StatusCode int               `json:"http_status_code"`
		Headers    map[string]string `json:"response_headers"`
	}{requestUID, r.Accept, status, headers})
	if err != nil {
		panic("connect: a result does not marshal: " + err.Error()) // there is nothing in it that could not
	}
	frame, err := proto.MarshalOptions{}.MarshalAppend([]byte{0}, &protobufs.ServerToAgent{
		CustomMessage: &protobufs.CustomMessage{Capability: Capability, Type: typeResult, Data: data},
	})
	if err != nil {
		panic("connect: a result does not marshal: " + err.Error())
	}
	return frame
}

// RefusalStatus returns the HTTP status for a refused agent: the server's, if it is one that can
// refuse, or sends the agent elsewhere and says where; otherwise 401.
func (r Result) RefusalStatus() int {
	switch code := r.StatusCode; {
	case code >= 400 && code <= 599:
		return code
	case redirects(code) && usableLocation(r.header("Location")):
		return code
	default:
		return http.StatusUnauthorized
	}
}

func redirects(code int) bool {
	switch code {
	case http.StatusMovedPermanently, http.StatusFound, http.StatusSeeOther,
		http.StatusTemporaryRedirect, http.StatusPermanentRedirect:
		return true
	}
	return false
}

// usableLocation reports whether an agent can be sent there: the URL of an HTTP or WebSocket server,
// or one relative to that of the agent's request.
func usableLocation(location string) bool {
	if location == "" || strings.ContainsFunc(location, func(r rune) bool { return r <= ' ' || r > '~' }) {
		return false
	}
	u, err := url.Parse(location)
	if err != nil {
		return false
	}
	switch u.Scheme {
	case "":
		return true
	case "http", "https", "ws", "wss":
		return u.Hostname() != ""
	}
	return false
}

// header returns the header of this canonical name.
func (r Result) header(name string) string {
	for key, value := range r.Headers {
		if http.CanonicalHeaderKey(key) == name {
			return value
		}
	}
	return ""
}

// CopyRefusalHeaders adds the server's headers for a refused agent to h. Upgrade
// stays on a 426, where it says what to upgrade to, and Location where it says where to go.
func (r Result) CopyRefusalHeaders(h http.Header) {
	status, size := r.RefusalStatus(), 0
	for _, key := range slices.Sorted(maps.Keys(r.Headers)) {
		name, value := http.CanonicalHeaderKey(key), r.Headers[key]
		switch {
		case !forAgents(name),
			name == "Upgrade" && status != http.StatusUpgradeRequired,
			name == "Location" && !redirects(status),
			!httpguts.ValidHeaderFieldName(name), !httpguts.ValidHeaderFieldValue(value),
			size+headerSize(name, value) > maxRefusalHeaders:
			continue
		}
		size += headerSize(name, value)
		h.Set(name, value)
		if name == "Upgrade" {
			h.Set("Connection", "Upgrade") // the one header cannot be without the other (RFC 9110, section 7.8)
		}
	}
}

// checkObject returns an error unless data is a JSON object, and nothing else.
func checkObject(data []byte) error {
	if data = skipSpace(data); len(data) == 0 || data[0] != '{' || !json.Valid(data) {
		return errNoObject
	}
	return nil
}

// members goes through the members of a JSON object, which was found valid: the key as it is written
// between its quotes, and the JSON of the value. It does not allocate, however many there are.
func members(object []byte) iter.Seq2[[]byte, []byte] {
	return func(yield func(key, value []byte) bool) {
		for rest := skipSpace(object)[1:]; ; {
			rest = skipSpace(rest)
			if rest[0] == '}' {
				return
			}
			if rest[0] == ',' {
				rest = skipSpace(rest[1:])
			}
			n := valueLength(rest)
			key := rest[1 : n-1]
			rest = skipSpace(skipSpace(rest[n:])[1:]) // the colon
			n = valueLength(rest)
			if !yield(key, rest[:n]) {
				return
			}
			rest = rest[n:]
		}
	}
}

// is reports whether a key is the one of this name, as encoding/json sees it: in any case.
func is[B []byte | string](key B, name string) bool {
	return len(key) < 2*len(name) && strings.EqualFold(string(key), name)
}

func skipSpace(json []byte) []byte { return bytes.TrimLeft(json, " \t\r\n") }

// valueLength returns how long the value is with which json, which was found valid, begins.
func valueLength(json []byte) int {
	depth := 0
	for i := 0; ; i++ {
		switch json[i] {
		case '"':
			for i++; json[i] != '"'; i++ {
				if json[i] == '\\' {
					i++
				}
			}
		case '{', '[':
			depth++
			continue
		case '}', ']':
			if depth == 0 { // behind a number, true, false or null
				return i
			}
			depth--
		case ',', ' ', '\t', '\r', '\n':
			if depth == 0 {
				return i
			}
			continue
		default:
			continue
		}
		if depth == 0 {
			return i + 1
		}
	}
}
