package socket

import (
	"crypto/tls"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strings"
)

// maxRedirects is how often one dial may be sent elsewhere.
const maxRedirects = 3

// ErrRedirect means that the server redirects, and that it is not followed.
var ErrRedirect = errors.New("which is not followed")

// route is where one dial has come to by redirects.
type route struct {
	*Dialer
	endpoint  *url.URL // where it began
	at        *url.URL
	redirects int
	elsewhere bool        // another host has been among the places, and may have chosen those after it
	headers   http.Header // for who is there
	secrets   []string    // see secretsOf; of all places
}

// isRedirect reports whether a status sends who is asking to another place, with the same request.
func isRedirect(status int) bool {
	switch status {
	case http.StatusMovedPermanently, http.StatusFound, http.StatusSeeOther, http.StatusTemporaryRedirect, http.StatusPermanentRedirect:
		return true
	}
	return false
}

// follow goes on to a Location, or returns what is wrong with that.
func (r *route) follow(location *url.URL) (problem string) {
	next := r.at.ResolveReference(location)
	switch next.Scheme {
	case "http":
		next.Scheme = "ws"
	case "https":
		next.Scheme = "wss"
	}
	next.Fragment, next.RawFragment = "", ""
	switch {
	case r.redirects == maxRedirects:
		return fmt.Sprintf("there were %d before", maxRedirects)
	case next.Scheme != "ws" && next.Scheme != "wss" || next.Hostname() == "":
		return "it is no place for a WebSocket"
	case next.User != nil:
		return "it holds a user"
	case r.at.Scheme == "wss" && next.Scheme == "ws":
		return "it is without TLS"
	case r.EndpointOnly && !sameHost(next, r.endpoint):
		return "it is another host, for which the headers are not"
	}
	r.at = next
	r.redirects++
	if !r.home() {
		r.elsewhere, r.headers = true, r.Elsewhere
	}
	r.secrets = append(r.secrets, secretsOf(next, r.headers)...)
	return ""
}

// home reports whether we are at the endpoint's host and port.
func (r *route) home() bool { return sameHost(r.at, r.endpoint) }

func sameHost(a, b *url.URL) bool { return strings.EqualFold(HostPort(a), HostPort(b)) }

// tls returns how TLS begins where we are. The name that a certificate has to have instead of the host's is
// that of the endpoint's only.
func (r *route) tls() *tls.Config {
	if r.TLS == nil || r.home() {
		return r.TLS
	}
	config := r.TLS.Clone()
	config.ServerName = ""
	return config
}

// place says where we are, "" if that is the endpoint.
func (r *route) place() string {
	if r.redirects == 0 {
		return ""
	}
	return words(Place(r.at), r.secrets)
}

// explain adds to an error where we were sent before.
func (r *route) explain(err error) error {
	if r.redirects == 0 {
		return err
	}
	return &RedirectedError{To: words(HostPort(r.at), r.secrets), Err: err}
}

// RedirectedError is what went wrong at a place to which the server has redirected.
type RedirectedError struct {
	To  string // host and port
	Err error
}

func (e *RedirectedError) Error() string { return "redirected to " + e.To + ": " + e.Err.Error() }

// Unwrap returns what went wrong there.
func (e *RedirectedError) Unwrap() error { return e.Err }
