package socket

import (
	"bufio"
	"context"
	"crypto/fips140"
	"crypto/tls"
	"encoding/base64"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"os"
	"strings"

	"github.com/gorilla/websocket"
)

// Dialer connects to a server as a WebSocket client.
type Dialer struct {
	// NetDial connects to the server, or to the proxy on the way there.
	NetDial func(ctx context.Context, network, address string) (net.Conn, error)
	// Proxy is the one on the way to the server; nil leaves that to the environment.
	Proxy *url.URL
	// TLS applies to wss:// and to the https:// of a proxy, whose name is always that of its URL.
	TLS *tls.Config
	// ReadBufferSize is in bytes.
	ReadBufferSize int
	// Elsewhere are the headers for any other host than the endpoint's, to which it may redirect.
	Elsewhere http.Header
	// EndpointOnly has no redirect followed to another host than the endpoint's.
	EndpointOnly bool
}

// Dial connects and shakes hands, through the proxy if there is one, with whom the endpoint redirects to. It
// returns what New takes over, and where that is if it is not the endpoint. An error is a *HandshakeError if
// a server, or the proxy, has answered something else than yes, a *ProxyError if it is the proxy's, and
// ErrRedirect if the server redirects where we do not go. No error, nor the place, tells what is secret in the endpoint, a proxy's
// URL, or the headers.
func (d *Dialer) Dial(ctx context.Context, endpoint *url.URL, headers http.Header) (conn net.Conn, in *bufio.Reader, place string, err error) {
	r := route{Dialer: d, endpoint: endpoint, at: endpoint, headers: headers, secrets: secretsOf(endpoint, headers)}
	for {
		conn, in, err = r.dial(ctx)
		if err == nil {
			return conn, in, r.place(), nil
		}
		answered := (*HandshakeError)(nil)
		if !errors.As(err, &answered) || answered.Proxy != "" || answered.next == nil {
			return nil, nil, "", r.explain(err)
		}
		if problem := r.follow(answered.next); problem != "" {
			answered.Reason = "" // a page with a link
			return nil, nil, "", r.explain(fmt.Errorf("%w, %w: %s", answered, ErrRedirect, problem))
		}
	}
}

// dial is Dial without following a redirect.
func (r *route) dial(ctx context.Context) (conn net.Conn, in *bufio.Reader, err error) {
	d, endpoint := r.Dialer, r.at
	secure := endpoint.Scheme == "wss"
	through := d.Proxy
	if through == nil {
		through, err = http.ProxyFromEnvironment(&http.Request{URL: withScheme(endpoint, "http", secure)})
		if err != nil { // which may quote the proxy's URL
			return nil, nil, errors.New("proxy that the environment names cannot be used, see HTTP_PROXY and HTTPS_PROXY")
		}
	}
	address := hostPort(endpoint, secure)
	if through == nil {
		conn, err = d.NetDial(ctx, "tcp", address)
	} else {
		conn, err = d.dialThrough(ctx, through, address)
	}
	if err != nil {
		return nil, nil, err
	}
	LimitUnsent(conn)
	raw := Wrap(conn)
	conn = raw
	stop := context.AfterFunc(ctx, func() { raw.Close() })
	defer func() {
		err = inTime(ctx, stop(), "server", err)
		if err != nil {
			raw.Close()
			conn, in = nil, nil
		}
	}()
	if secure {
		if conn, err = startTLS(ctx, raw, r.tls(), endpoint.Hostname()); err != nil {
			return nil, nil, explainTLS(err, "server", "ws://", "wss://")
		}
	}
	in = bufio.NewReaderSize(conn, d.ReadBufferSize)
	return conn, in, r.shakeHands(ctx, conn, in)
}

// shakeHands asks for a WebSocket. What follows the answer is left in in.
func (r *route) shakeHands(ctx context.Context, conn net.Conn, in *bufio.Reader) error {
	endpoint := r.at
	heard := &answer{in: in}
	dialer := websocket.Dialer{
		NetDialContext: func(context.Context, string, string) (net.Conn, error) { return handshaking{conn, heard}, nil },
	}
	var response *http.Response
	var err error
	// The SHA-1 of the handshake secures nothing (RFC 6455, section 1.3), so the strict mode of FIPS 140
	// need not end the process for it. TLS has agreed on its algorithms by now.
	fips140.WithoutEnforcement(func() {
		// TLS is done; the scheme says no more than that.
		_, response, err = dialer.DialContext(ctx, withScheme(endpoint, "ws", false).String(), r.headers)
	})
	switch {
	case err == nil && response.Header.Get("Sec-Websocket-Extensions") != "":
		return errors.New("server uses an extension of WebSocket that was not asked for")
	case err == nil:
		return nil
	case errors.Is(err, websocket.ErrBadHandshake):
		refusal := newHandshakeError(response, "", r.secrets)
		refusal.Withheld = r.elsewhere
		if endpoint.Scheme == "ws" && refusal.StatusCode == http.StatusBadRequest && strings.Contains(refusal.Reason, "HTTPS") {
			refusal.Reason += " (it seems to want wss://)" // what servers with TLS say to who has none
		}
		return refusal
	}
	return heard.explain(err, "server", "wss://", r.secrets)
}

// handshaking is a connection of which gorilla reads the server's answer byte by byte, so that
// nothing of what follows it stays in its buffer.
type handshaking struct {
	net.Conn
	heard *answer
}

func (h handshaking) Read(b []byte) (int, error) { return h.heard.Read(b[:min(1, len(b))]) }

// Close leaves the connection to Dial.
func (h handshaking) Close() error { return nil }

func startTLS(ctx context.Context, conn net.Conn, config *tls.Config, host string) (net.Conn, error) {
	config = config.Clone()
	if config == nil {
		config = &tls.Config{}
	}
	if config.ServerName == "" {
		config.ServerName = host
	}
	secured := tls.Client(conn, config)
	if err := secured.HandshakeContext(ctx); err != nil {
		return conn, err
	}
	return secured, nil
}

// ProxyError is what went wrong at the proxy on the way to the server.
type ProxyError struct{ Err error }

func (e *ProxyError) Error() string { return e.Err.Error() }

// Unwrap returns what went wrong there.
func (e *ProxyError) Unwrap() error { return e.Err }

// dialThrough connects to address through a proxy: an HTTP one is asked for a tunnel (RFC 9110,
// section 9.3.6), whatever is to go through it. Its errors are *ProxyError.
func (d *Dialer) dialThrough(ctx context.Context, through *url.URL, address string) (net.Conn, error) {
	var ask func(net.Conn) (net.Conn, error)
	switch through.Scheme {
	case "http", "https":
		ask = func(conn net.Conn) (net.Conn, error) { return d.tunnel(ctx, conn, through, address) }
	case "socks5", "socks5h":
		ask = func(conn net.Conn) (net.Conn, error) { return conn, askSOCKS(conn, through, address) }
	default:
		return nil, &ProxyError{fmt.Errorf("%s: of an unknown kind", proxyAt(through))}
	}
	conn, err := d.NetDial(ctx, "tcp", proxyHostPort(through))
	if err != nil {
		return nil, &ProxyError{fmt.Errorf("%s: %w", proxyAt(through), err)}
	}
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	tunnel, err := ask(conn)
	if err = inTime(ctx, stop(), proxyAt(through), err); err != nil {
		conn.Close()
		return nil, &ProxyError{err}
	}
	return tunnel, nil
}

// proxyHostPort returns where a proxy is dialed.
func proxyHostPort(through *url.URL) string {
	if through.Port() == "" && strings.HasPrefix(through.Scheme, "socks") {
		return net.JoinHostPort(through.Hostname(), "1080")
	}
	return hostPort(through, through.Scheme == "https")
}

func (d *Dialer) tunnel(ctx context.Context, conn net.Conn, through *url.URL, address string) (net.Conn, error) {
	who := proxyAt(through)
	if through.Scheme == "https" {
		var err error
		if conn, err = startTLS(ctx, conn, d.tlsElsewhere(), through.Hostname()); err != nil {
			return nil, explainTLS(err, who, "http://", "https://")
		}
	}
	ask := &http.Request{Method: http.MethodConnect, URL: &url.URL{Opaque: address}, Host: address, Header: http.Header{}}
	if user := through.User; user != nil {
		password, _ := user.Password()
		credentials := base64.StdEncoding.EncodeToString([]byte(user.Username() + ":" + password))
		ask.Header.Set("Proxy-Authorization", "Basic "+credentials)
	}
	if err := ask.Write(conn); err != nil {
		return nil, fmt.Errorf("%s: %w", who, err)
	}
	// Nothing follows the answer until we speak, so the reader's buffer holds nothing else.
	heard := &answer{in: bufio.NewReader(conn)}
	response, err := http.ReadResponse(bufio.NewReader(heard), ask) //nolint:bodyclose // it is the tunnel
	secrets := secretsOf(through, ask.Header)
	switch {
	case err != nil:
		return nil, heard.explain(err, who, "https://", secrets)
	case response.StatusCode != http.StatusOK:
		return nil, newHandshakeError(response, who, secrets)
	}
	return conn, nil
}

// inTime returns err, or that there was no answer of who in the time of ctx, which has stopped us unless
// it was stopped itself.
func inTime(ctx context.Context, stopped bool, who string, err error) error {
	answered := (*HandshakeError)(nil)
	switch {
	case errors.As(err, &answered):
		return err
	case !stopped:
		return fmt.Errorf("%s has not answered the handshake: %w", who, context.Cause(ctx))
	case errors.Is(err, os.ErrDeadlineExceeded): // that of ctx, a moment before
		return fmt.Errorf("%s has not answered the handshake: %w", who, context.DeadlineExceeded)
	}
	return err
}

// withScheme returns the same URL under another scheme, or that scheme's secure sister.
func withScheme(u *url.URL, scheme string, secure bool) *url.URL {
	other := *u
	other.Scheme = scheme
	if secure {
		other.Scheme += "s"
	}
	return &other
}

// HostPort returns where an endpoint is dialed.
func HostPort(endpoint *url.URL) string {
	return hostPort(endpoint, endpoint.Scheme == "wss" || endpoint.Scheme == "https")
}

func hostPort(u *url.URL, secure bool) string {
	port := u.Port()
	switch {
	case port != "":
	case secure:
		port = "443"
	default:
		port = "80"
	}
	return net.JoinHostPort(u.Hostname(), port)
}
