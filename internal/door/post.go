package door

import (
	"math/rand/v2"
	"net/http"
	"slices"
	"strconv"
	"strings"

	"github.com/opampgateway/opampgateway/internal/telemetry"
)

// contentType is that of OpAMP over plain HTTP.
const contentType = "application/x-protobuf"

// keptOf is for which part of all connections the places have to be free that those who have polled keep theirs: more
// is for who has no other way in.
const keptOf = 2

// IsPoll reports whether r, which Check has found good, is that of an agent over plain HTTP.
func IsPoll(r *http.Request) bool { return r.Method == http.MethodPost }

// HasPolled reports whether r is the poll of one of those that LetIn has let in before, on the same connection.
func HasPolled(r *http.Request) bool {
	s := strangerOf(r)
	return s != nil && s.letIn.Load() && IsPoll(r)
}

// LetIn lets in who sent r, which Check has found good: a body may be read, and further requests be sent. The
// connection takes no stranger's place any more.
func LetIn(r *http.Request) {
	if s := strangerOf(r); s != nil && !s.letIn.Swap(true) {
		s.place.letIn()
	}
}

// Keep has the connection of r stay open behind its answer, which is about to be written, unless places are short.
func Keep(w http.ResponseWriter, r *http.Request) {
	s := strangerOf(r)
	if s != nil && s.letIn.Load() && int(s.door.open.Load()) <= s.door.limits.Load().Connections/keptOf {
		w.Header().Del("Connection")
	}
}

// checkPost is Check for a request with a body, of which nothing is read.
func (rules *Rules) checkPost(s *stranger, r *http.Request) *Refusal {
	switch {
	case !isContentType(r.Header["Content-Type"]):
		return &Refusal{
			Status: http.StatusUnsupportedMediaType, Outcome: telemetry.OutcomeBadRequest,
			Header: http.Header{"Accept": {contentType}},
			Text:   "this is an OpAMP gateway: agents over plain HTTP POST Content-Type: " + contentType,
		}
	case !isEncoding(r.Header["Content-Encoding"]):
		return &Refusal{
			Status: http.StatusUnsupportedMediaType, Outcome: telemetry.OutcomeBadRequest,
			Header: http.Header{"Accept-Encoding": {"gzip"}},
			Text:   "the only Content-Encoding that is taken is gzip",
		}
	case r.ContentLength == 0:
		return badRequest("the body is empty; an agent over plain HTTP sends an AgentToServer message")
	case !rules.allow(r.Header["Origin"]):
		return foreignOrigin()
	case s != nil && s.excess != "":
		return tooMany(s.excess)
	case s != nil && s.letIn.Load():
		return s.checkHead(r)
	}
	return nil
}

// checkHead holds those to the limits of a request's head whom the door watches no more. The HTTP server
// has its own, which are wider.
func (s *stranger) checkHead(r *http.Request) *Refusal {
	limits := s.door.limits.Load()
	lines, size := 1, len("Host: \r\n")+len(r.Host)
	for name, values := range r.Header {
		for _, value := range values {
			lines++
			size += len(name) + len(": ") + len(value) + len("\r\n")
		}
	}
	if lines > limits.Headers || size > limits.HeaderSize {
		return &Refusal{
			Status: http.StatusRequestHeaderFieldsTooLarge, Outcome: telemetry.OutcomeBadRequest,
			Text: "the request's headers are too many, or too large; see agents::max_request_headers and agents::max_request_header_size",
		}
	}
	return nil
}

// isContentType reports whether there is one content type, and it is OpAMP's. It may have parameters.
func isContentType(values []string) bool {
	if len(values) != 1 {
		return false
	}
	kind, _, _ := strings.Cut(values[0], ";")
	return strings.EqualFold(strings.TrimSpace(kind), contentType)
}

// isEncoding reports whether a body can be read that is encoded so.
func isEncoding(values []string) bool {
	return !slices.ContainsFunc(values, func(value string) bool {
		return value != "" && !strings.EqualFold(value, "identity") && !strings.EqualFold(value, "gzip")
	}) && len(values) <= 1
}

func foreignOrigin() *Refusal {
	return &Refusal{
		Status: http.StatusForbidden, Outcome: telemetry.OutcomeBadRequest,
		Text: "web pages of this origin may not connect, see listener::cors::allowed_origins",
	}
}

func tooMany(text string) *Refusal {
	return &Refusal{
		Status: http.StatusServiceUnavailable, Outcome: telemetry.OutcomeTooMany, Text: text,
		// 30 s is the least that the OpAMP specification recommends; the jitter spreads a fleet.
		Header: http.Header{"Retry-After": {strconv.Itoa(30 + rand.IntN(31))}},
	}
}
