// Package clientauth has a client authenticator of the collector authenticate the upgrade request of a WebSocket.
//
// Such an extension knows HTTP requests only, and adds what it has to one as it is sent. So it is given a request
// that is sent nowhere, and the headers are taken of what would have been.
package clientauth

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"unicode"

	"go.opentelemetry.io/collector/component"
	"go.opentelemetry.io/collector/config/configauth"
	"golang.org/x/net/http/httpguts"
)

// Authenticator is an extension that authenticates requests. A nil one leaves them as they are.
type Authenticator struct {
	name    string
	through http.RoundTripper // on the way to nowhere
}

// New returns the authenticator that the configuration names, of a collector with these extensions.
func New(ctx context.Context, cfg configauth.Config, extensions map[component.ID]component.Component) (*Authenticator, error) {
	client, err := cfg.GetHTTPClientAuthenticator(ctx, extensions)
	if err != nil {
		return nil, err
	}
	through, err := client.RoundTripper(nowhere{})
	if err != nil {
		return nil, fmt.Errorf("%s cannot authenticate requests: %s", cfg.AuthenticatorID, reason(err))
	}
	return &Authenticator{name: cfg.AuthenticatorID.String(), through: through}, nil
}

// Headers returns the headers of a request to endpoint, which is a ws:// or wss:// one, with what the authenticator
// adds to them, or puts in their place. It asks anew each time; what that takes is the time of ctx. An error tells
// nothing that may be secret.
func (a *Authenticator) Headers(ctx context.Context, endpoint *url.URL, headers http.Header) (http.Header, error) {
	if a == nil {
		return headers, nil
	}
	sent, err := a.send(ctx, endpoint, headers)
	switch {
	case ctx.Err() != nil:
		return nil, fmt.Errorf("%s has given no credentials in time: %w", a.name, context.Cause(ctx))
	case err != nil:
		return nil, fmt.Errorf("%s has given no credentials: %s", a.name, reason(err))
	}
	for name, values := range sent.Header {
		if !httpguts.ValidHeaderFieldName(name) || !valid(values) {
			return nil, fmt.Errorf("%s has given a header that cannot be sent", a.name)
		}
	}
	headers = sent.Header.Clone()
	if sent.Host != "" && sent.Host != endpoint.Host {
		headers.Set("Host", sent.Host) // where a WebSocket's dialer expects it
	}
	return headers, nil
}

// send returns the request as it would have been sent.
func (a *Authenticator) send(ctx context.Context, endpoint *url.URL, headers http.Header) (*http.Request, error) {
	at := *endpoint
	at.Scheme = strings.Replace(at.Scheme, "ws", "http", 1)
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, at.String(), http.NoBody)
	if err != nil {
		return nil, errors.New("endpoint is not a valid URL")
	}
	request.Header = headers.Clone()
	if host := headers.Get("Host"); host != "" {
		request.Host = host
		request.Header.Del("Host")
	}
	response, err := a.through.RoundTrip(request)
	if err != nil {
		return nil, err
	}
	_ = response.Body.Close() // there is nothing in it
	return response.Request, nil
}

// nowhere answers each request with success, and says which it was, as any RoundTripper does.
type nowhere struct{}

func (nowhere) RoundTrip(request *http.Request) (*http.Response, error) {
	return &http.Response{
		Status: "200 OK", StatusCode: http.StatusOK, Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1,
		Header: http.Header{}, Body: http.NoBody, Request: request,
	}, nil
}

func valid(values []string) bool {
	return !slices.ContainsFunc(values, func(v string) bool { return !httpguts.ValidHeaderFieldValue(v) })
}

// maxReason is what is told of an error, in bytes.
const maxReason = 200

var (
	// quoted is what an error repeats of somebody else: of a URL, of what a token endpoint has answered.
	quoted = regexp.MustCompile(`"(?:[^"\\]|\\.)*(?:"|$)|\S*://\S*`)

	// known are the errors of OAuth 2.0 (RFC 6749, section 5.2), which may be repeated.
	known = []string{`"invalid_request"`, `"invalid_client"`, `"invalid_grant"`, `"unauthorized_client"`, `"unsupported_grant_type"`, `"invalid_scope"`}
)

// reason tells of an authenticator's error what helps and is no secret of its own: of the network what has failed
// where, otherwise the first line, without what it quotes.
func reason(err error) string {
	if failed, ok := errors.AsType[*net.OpError](err); ok && failed.Addr != nil { // the port at our end is another each time
		return fmt.Sprintf("%s %s: %v", failed.Op, failed.Addr, failed.Err)
	}
	text, _, _ := strings.Cut(err.Error(), "\n")
	text = quoted.ReplaceAllStringFunc(text, func(q string) string {
		if slices.Contains(known, q) {
			return q
		}
		return "…"
	})
	text = strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return ' '
		}
		return r
	}, strings.ToValidUTF8(text, "\ufffd"))
	if len(text) > maxReason {
		text = strings.ToValidUTF8(text[:maxReason-len("…")], "") + "…"
	}
	return text
}
