package connect

import (
	"encoding/json"
	"errors"
	"net/http"
	"strings"

	"golang.org/x/net/http/httpguts"
)

var errBadHeaders = errors.New("headers of the agent cannot be read")

// AgentHeaders returns, of the headers in a question, be it ours or the JSON of a connect, those with which its agent would
// come to the server itself. Left out are those of its connection to us, of the handshake, and those by which
// somebody in between would speak of it. An error never quotes them.
func (q Question) AgentHeaders() (http.Header, error) {
	var question struct {
		Headers http.Header `json:"headers"`
	}
	if json.Unmarshal(q, &question) != nil { // whose error would quote them
		return nil, errBadHeaders
	}
	named := map[string]bool{} // by Connection, to be of the connection only
	for name, values := range question.Headers {
		if strings.EqualFold(name, "Connection") {
			for _, value := range values {
				for token := range strings.SplitSeq(value, ",") {
					named[http.CanonicalHeaderKey(strings.TrimSpace(token))] = true
				}
			}
		}
	}
	// Without one in it, the HTTP client would say its own.
	headers := http.Header{"User-Agent": {""}}
	for name, values := range question.Headers {
		canonical := http.CanonicalHeaderKey(name)
		if !httpguts.ValidHeaderFieldName(name) || named[canonical] || ofConnection(canonical) {
			continue
		}
		var valid []string
		for _, value := range values {
			if httpguts.ValidHeaderFieldValue(value) {
				valid = append(valid, value)
			}
		}
		if len(valid) > 0 {
			headers[canonical] = valid
		}
	}
	return headers, nil
}

// ofConnection reports whether a header concerns one connection, or the request for it, or is no agent's to say.
func ofConnection(canonical string) bool {
	switch canonical {
	case "Connection", "Keep-Alive", "Proxy-Connection", "Proxy-Authenticate", "Proxy-Authorization", "Te", "Trailer",
		"Transfer-Encoding", "Upgrade", "Content-Length", "Expect", "Host", clientCert, clientCertChain:
		return true
	}
	return strings.HasPrefix(canonical, "Sec-Websocket-")
}

// Refusal returns the verdict that a server has given by refusing an upgrade request with this status and these
// headers.
func Refusal(status int, headers http.Header) Result {
	result, size := Result{StatusCode: status, Headers: map[string]string{}}, 0
	for name, values := range headers {
		if value := strings.Join(values, ", "); forAgents(name) && size+headerSize(name, value) <= maxRefusalHeaders {
			size += headerSize(name, value)
			result.Headers[http.CanonicalHeaderKey(name)] = value
		}
	}
	return result
}
