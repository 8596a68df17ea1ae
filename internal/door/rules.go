package door

import (
	"encoding/base64"
	"errors"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/opampgateway/opampgateway/internal/telemetry"
)

// Rules say which requests may become a connection.
type Rules struct {
	anyOrigin bool
	origins   []string    // in lower case
	patterns  [][2]string // what is before and behind the *, in lower case
}

// NewRules returns rules by which web pages of these origins may connect, and no other: "*" is any,
// and one * in an origin is any part of it, as in the collector's cors::allowed_origins.
func NewRules(allowedOrigins []string) *Rules {
	r := &Rules{}
	for _, origin := range allowedOrigins {
		origin = strings.ToLower(origin)
		before, behind, pattern := strings.Cut(origin, "*")
		switch {
		case origin == "*":
			r.anyOrigin = true
		case pattern:
			r.patterns = append(r.patterns, [2]string{before, behind})
		default:
			r.origins = append(r.origins, origin)
		}
	}
	return r
}

// Check returns nil if r can become an agent's connection, or is the poll of an agent over plain HTTP. It reads
// nothing of a body.
func (rules *Rules) Check(r *http.Request) *Refusal {
	s := strangerOf(r)
	switch {
	case r.Method == http.MethodPost:
		return rules.checkPost(s, r)
	case r.Method != http.MethodGet && r.Method != http.MethodHead:
		return &Refusal{
			Status: http.StatusMethodNotAllowed, Outcome: telemetry.OutcomeBadRequest,
			Header: http.Header{"Allow": {"GET, POST"}},
			Text:   "this is an OpAMP gateway: agents connect to it by WebSocket, or POST to it",
		}
	case r.ContentLength != 0 || len(r.TransferEncoding) > 0:
		return badRequest("this is an OpAMP gateway: agents connect to it by WebSocket, whose request has no body, or POST to it")
	case r.Method != http.MethodGet || !r.ProtoAtLeast(1, 1) || !upgradesToWebSocket(r.Header):
		return &Refusal{
			Status: http.StatusUpgradeRequired, Outcome: telemetry.OutcomeBadRequest,
			Header: http.Header{"Upgrade": {"websocket"}, "Connection": {"Upgrade"}},
			Text:   "this is an OpAMP gateway: agents connect to it by WebSocket, or POST to it",
		}
	case r.Header.Get("Sec-Websocket-Version") != "13":
		refusal := badRequest("WebSocket version 13 is needed")
		refusal.Header = http.Header{"Sec-Websocket-Version": {"13"}}
		return refusal
	case !validKey(r.Header["Sec-Websocket-Key"]):
		return badRequest("Sec-WebSocket-Key is missing or malformed")
	case !rules.allow(r.Header["Origin"]):
		return foreignOrigin()
	case s != nil && s.letIn.Load(): // a load balancer uses the connection for whoever comes next
		return s.checkHead(r)
	case s != nil && s.early.Load():
		return earlyData()
	case s != nil && s.excess != "":
		return tooMany(s.excess)
	}
	return nil
}

func badRequest(text string) *Refusal {
	return &Refusal{Status: http.StatusBadRequest, Text: text, Outcome: telemetry.OutcomeBadRequest}
}

func earlyData() *Refusal {
	return badRequest("data was sent behind the request, before it was answered")
}

func upgradesToWebSocket(h http.Header) bool {
	return hasToken(h["Connection"], "upgrade") && hasToken(h["Upgrade"], "websocket")
}

// hasToken reports whether a list (RFC 9110, section 5.6.1) in one or more headers has the token.
func hasToken(lists []string, token string) bool {
	for _, list := range lists {
		for element := range strings.SplitSeq(list, ",") {
			if strings.EqualFold(strings.Trim(element, " \t"), token) {
				return true
			}
		}
	}
	return false
}

// validKey reports whether there is one key, of 16 bytes in base64 (RFC 6455, section 4.2.1).
func validKey(keys []string) bool {
	if len(keys) != 1 || len(keys[0]) != keySize {
		return false
	}
	var nonce [keySize]byte
	n, err := base64.StdEncoding.Decode(nonce[:], []byte(keys[0]))
	return err == nil && n == 16
}

const keySize = 24

// allow reports whether a web page of these origins may connect, of which a browser sends one. That it
// is the origin of the Host header says nothing: a page can have its name resolve to any address.
func (rules *Rules) allow(origins []string) bool {
	for _, origin := range origins {
		if origin != "" && !rules.anyOrigin && !rules.knows(strings.ToLower(origin)) {
			return false
		}
	}
	return true
}

func (rules *Rules) knows(origin string) bool {
	if slices.Contains(rules.origins, origin) {
		return true
	}
	for _, p := range rules.patterns {
		if len(origin) >= len(p[0])+len(p[1]) && strings.HasPrefix(origin, p[0]) && strings.HasSuffix(origin, p[1]) {
			return true
		}
	}
	return false
}

// Refusal is the answer to a request that cannot become a connection.
type Refusal struct {
	Status  int
	Header  http.Header // besides those that every answer has
	Text    string
	Outcome telemetry.Outcome
}

// Answer refuses the request, and ends its connection. It may wait for a moment, until the peer has
// heard it.
func (refusal *Refusal) Answer(w http.ResponseWriter, r *http.Request) {
	s, err := take(w, r)
	if err != nil { // something is in between
		w.Header()["Connection"] = closeToken
		for name, values := range refusal.Header {
			w.Header()[name] = append(w.Header()[name], values...)
		}
		http.Error(w, refusal.Text, refusal.Status)
		return
	}
	s.answer(s.conn, refusal, r.Method != http.MethodHead)
	s.end(r.ContentLength != 0 || s.early.Load())
	s.Close()
}

// take takes the connection out of the hands of the HTTP server.
func take(w http.ResponseWriter, r *http.Request) (*stranger, error) {
	s := strangerOf(r)
	if s == nil {
		return nil, errors.New("it did not come through the door")
	}
	// What the server has read beyond the request is refused, so its buffers hold nothing of value.
	_, buffers, err := http.NewResponseController(w).Hijack()
	if err == nil && s.letIn.Load() { // what has come before this request was the body of another
		s.early.Store(buffers.Reader.Buffered() > 0 || s.held.first != nil)
	}
	return s, err
}

// format returns all of the answer.
func (refusal *Refusal) format(withText bool) []byte {
	b := make([]byte, 0, 512)
	b = append(b, "HTTP/1.1 "...)
	b = strconv.AppendInt(b, int64(refusal.Status), 10)
	b = append(b, ' ')
	b = append(b, http.StatusText(refusal.Status)...)
	b = append(b, "\r\n"...)
	for name, values := range refusal.Header {
		for _, value := range values {
			b = append(append(append(append(b, name...), ": "...), value...), "\r\n"...)
		}
	}
	b = append(b, "Connection: close\r\nContent-Type: text/plain; charset=utf-8\r\nX-Content-Type-Options: nosniff\r\nDate: "...)
	b = time.Now().UTC().AppendFormat(b, http.TimeFormat)
	b = append(b, "\r\nContent-Length: "...)
	b = strconv.AppendInt(b, int64(len(refusal.Text)+1), 10)
	b = append(b, "\r\n\r\n"...)
	if withText {
		b = append(append(b, refusal.Text...), '\n')
	}
	return b
}
