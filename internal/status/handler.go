package status

import (
	"bytes"
	"crypto/sha256"
	_ "embed" // the page
	"encoding/base64"
	"encoding/json"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"strings"
	"sync"

	"github.com/opampgateway/opampgateway/internal/wire"
)

//go:embed page.html
var page []byte

//go:embed icon.svg
var icon []byte

// policy is what the page may do: run its own script and style, by their hashes, and ask where it came from.
var policy = "default-src 'none'; script-src " + hashOf("script") + "; style-src " + hashOf("style") +
	"; img-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"

// hashOf returns the hash of the page's only element of this name, as a Content-Security-Policy has it.
func hashOf(element string) string {
	_, text, _ := bytes.Cut(page, []byte("<"+element+">"))
	text, _, _ = bytes.Cut(text, []byte("</"+element+">"))
	sum := sha256.Sum256(text)
	return "'sha256-" + base64.StdEncoding.EncodeToString(sum[:]) + "'"
}

// handler answers with what its source says.
type handler struct {
	source Source

	// mu is held while the source is asked, so that however many look, it is asked by one at a time.
	mu   sync.Mutex
	rows sync.Pool // memory for all agents, of type *[]Row, which is not collected while somebody looks
}

// NewHandler returns what answers requests for the page, and for the same as JSON. It belongs behind Guard.
func NewHandler(source Source) http.Handler {
	h := &handler{source: source}
	mux := http.NewServeMux()
	mux.HandleFunc("/{$}", func(w http.ResponseWriter, r *http.Request) { serve(w, r, "text/html; charset=utf-8", page) })
	mux.HandleFunc("/icon.svg", func(w http.ResponseWriter, r *http.Request) { serve(w, r, "image/svg+xml", icon) })
	mux.HandleFunc("/api/v1/status", h.status)
	mux.HandleFunc("/api/v1/agents", h.agents)
	return mux
}

func (h *handler) status(w http.ResponseWriter, r *http.Request) {
	h.mu.Lock()
	snapshot := h.source.Status()
	h.mu.Unlock()
	serveJSON(w, r, snapshot)
}

func (h *handler) agents(w http.ResponseWriter, r *http.Request) {
	q, err := ParseQuery(r.URL.Query())
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	serveJSON(w, r, h.ask(&q))
}

// ask answers q.
func (h *handler) ask(q *Query) *Agents {
	h.mu.Lock()
	defer h.mu.Unlock()
	rows, ok := h.rows.Get().(*[]Row)
	if !ok {
		rows = &[]Row{}
	}
	*rows = h.source.Agents((*rows)[:0], q.uid())
	answer := q.Select(*rows, NewClock())
	h.rows.Put(rows)
	return answer
}

func serveJSON(w http.ResponseWriter, r *http.Request, v any) {
	body, err := json.Marshal(v)
	if err != nil {
		http.Error(w, "cannot be written as JSON", http.StatusInternalServerError) // it is made of what can
		return
	}
	serve(w, r, "application/json", append(body, '\n'))
}

func serve(w http.ResponseWriter, r *http.Request, kind string, body []byte) {
	w.Header().Set("Content-Type", kind)
	w.Header().Set("Content-Length", strconv.Itoa(len(body)))
	if r.Method != http.MethodHead {
		_, _ = w.Write(body) // whoever has left needs no answer
	}
}

// Guard returns what stands before all else that answers requests, authentication included: it says what a browser may
// do with the answers, and refuses what no page of another origin is to read. names are those by which the address
// may be called, besides those of loopback and any IP address: a page can have its own name mean another address, but
// not an address mean another.
func Guard(next http.Handler, names []string) http.Handler {
	known := map[string]bool{"localhost": true}
	for _, name := range names {
		known[strings.ToLower(strings.TrimSuffix(name, "."))] = true
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		header := w.Header()
		header.Set("Content-Security-Policy", policy)
		header.Set("X-Content-Type-Options", "nosniff")
		header.Set("X-Frame-Options", "DENY")
		header.Set("Referrer-Policy", "no-referrer")
		header.Set("Cross-Origin-Resource-Policy", "same-origin")
		header.Set("Cross-Origin-Opener-Policy", "same-origin")
		header.Set("Cache-Control", "no-store")
		switch {
		case r.Method != http.MethodGet && r.Method != http.MethodHead:
			header.Set("Allow", "GET, HEAD")
			http.Error(w, "there is only something to read here", http.StatusMethodNotAllowed)
		case !isKnown(r.Host, known):
			http.Error(w, "this is not how the status page is called: use its IP address, localhost, the host of status::endpoint, "+
				"or name another in status::cors::allowed_origins", http.StatusForbidden)
		case strings.HasPrefix(r.URL.Path, "/api/") && isForeign(r):
			http.Error(w, "pages of other origins cannot read this", http.StatusForbidden)
		default:
			next.ServeHTTP(w, r)
		}
	})
}

// isKnown reports whether a request's Host, which may have a port, is one of ours.
func isKnown(host string, known map[string]bool) bool {
	name := host
	if h, _, err := net.SplitHostPort(host); err == nil {
		name = h
	}
	if _, err := netip.ParseAddr(strings.Trim(name, "[]")); err == nil {
		return true
	}
	return known[strings.ToLower(strings.TrimSuffix(name, "."))]
}

// isForeign reports whether a page of another origin has made the request. Our own makes requests without an Origin.
func isForeign(r *http.Request) bool {
	if r.Header.Get("Origin") != "" {
		return true
	}
	switch r.Header.Get("Sec-Fetch-Site") {
	case "", "same-origin", "none":
		return false
	}
	return true
}

// CutTo bounds what a stranger has shown of a header, in bytes.
const CutTo = 128

// Cut returns at most CutTo bytes of text, in memory of its own.
func Cut(text string) string {
	return strings.ToValidUTF8(strings.Clone(text[:min(len(text), CutTo)]), "")
}

// UID returns uid as it is shown: nothing for the zero one.
func UID(uid wire.UID) string {
	if uid == (wire.UID{}) {
		return ""
	}
	return uid.String()
}
