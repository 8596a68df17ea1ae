package posting

import (
	"bytes"
	"compress/gzip"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"

	"golang.org/x/net/http/httpguts"

	"github.com/opampgateway/opampgateway/internal/memory"
)

const (
	contentType = "application/x-protobuf"
	encoding    = "gzip"

	// uidHeader is how agents over plain HTTP name themselves besides, for whoever spreads requests over servers.
	uidHeader = "Opamp-Instance-Uid"

	// maxRedirects is how often one request may be sent elsewhere.
	maxRedirects = 3
	// maxHeaders is what the headers of an answer may have, in bytes.
	maxHeaders = 64 << 10
	// maxRefusal is what is read past of an answer that is none, so that its connection can be used again.
	maxRefusal = 64 << 10
	// firstRead is for how much of an answer memory is taken first.
	firstRead = 4 << 10
	// idleTimeout is how long a connection is kept on which nothing is posted.
	idleTimeout = 90 * time.Second
)

var (
	// ErrTooLarge means that an answer is above the limit. It was not read to its end.
	ErrTooLarge = errors.New("answer is above max_message_size")
	// ErrNoAnswer means that what has answered is no OpAMP server.
	ErrNoAnswer = errors.New("answer is no OpAMP message")
	// ErrRedirect means that the server redirects, and that it is not followed.
	ErrRedirect = errors.New("server redirects, which is not followed")
	errProxy    = errors.New("proxy that the environment names cannot be used, see HTTP_PROXY and HTTPS_PROXY")
)

// Client makes requests to a server, over connections that are kept.
type Client struct {
	endpoint  *url.URL
	userAgent string
	limit     int
	account   *memory.Account
	transport *http.Transport
}

// Options say how a client reaches its server.
type Options struct {
	Endpoint    *url.URL // http:// or https://
	UserAgent   string   // of who has none
	Proxy       *url.URL // the one on the way there; nil leaves it to the environment
	Dial        func(ctx context.Context, network, address string) (net.Conn, error)
	TLS         *tls.Config
	Connections int             // at a time
	Limit       int             // of an answer, in bytes, decompressed
	Account     *memory.Account // in which answers are counted while they are read
}

// NewClient returns a client. Its end is Close.
func NewClient(o Options) *Client {
	return &Client{
		endpoint: o.Endpoint, userAgent: o.UserAgent, limit: o.Limit, account: o.Account,
		transport: &http.Transport{
			Proxy: func(r *http.Request) (*url.URL, error) {
				if o.Proxy != nil {
					return o.Proxy, nil
				}
				through, err := http.ProxyFromEnvironment(r)
				if err != nil { // it may quote the proxy's URL, and so its password
					return nil, errProxy
				}
				return through, nil
			},
			DialContext:            o.Dial,
			TLSClientConfig:        o.TLS.Clone(),
			MaxConnsPerHost:        o.Connections,
			MaxIdleConnsPerHost:    o.Connections,
			IdleConnTimeout:        idleTimeout,
			ForceAttemptHTTP2:      true,
			DisableCompression:     true, // what is decompressed has a limit, which is ours
			MaxResponseHeaderBytes: maxHeaders,
		},
	}
}

// Close ends the connections on which nothing is posted.
func (c *Client) Close() { c.transport.CloseIdleConnections() }

// Answer is what the server has answered.
type Answer struct {
	StatusCode int
	Header     http.Header
	// Message is the ServerToAgent, behind as many bytes as were asked for. Its memory is counted until Release.
	Message []byte
	// Withheld tells that a redirect has led to another host, which did not get what is for the endpoint's.
	Withheld bool

	counted int
	account *memory.Account
}

// Release counts the memory of the message no longer, which is somebody else's now.
func (a *Answer) Release() {
	if a.counted > 0 {
		a.account.Give(a.counted)
		a.counted = 0
	}
}

// OK reports whether the server has taken the message.
func (a *Answer) OK() bool { return a.StatusCode/100 == 2 }

// Status is the status for people.
func (a *Answer) Status() string {
	return strings.TrimSpace(fmt.Sprintf("%d %s", a.StatusCode, http.StatusText(a.StatusCode)))
}

// Post posts a message with these headers, which are the client's from then on. Of the answer, the message is put behind
// lead bytes. An error means that there is no answer, or none that could be read.
func (c *Client) Post(ctx context.Context, headers http.Header, message []byte, uid string, lead int) (*Answer, error) {
	headers.Set("Content-Type", contentType)
	headers.Set("Accept-Encoding", encoding)
	if uid != "" {
		headers.Set(uidHeader, uid)
	}
	return c.do(ctx, http.MethodPost, headers, message, lead)
}

// Probe asks whether the server is there, without saying anything to it: whatever it answers shows that it is, unless
// it is somebody before it who says that it is not. It returns how many messages can be posted on one connection at a time.
func (c *Client) Probe(ctx context.Context, headers http.Header) (streams int, answer *Answer, err error) {
	const ofHTTP2 = 16 // enough on a long way, and far below what servers allow
	response, withheld, err := c.follow(ctx, http.MethodHead, headers, nil)
	if err != nil {
		return 0, nil, err
	}
	_ = response.Body.Close()
	streams = 1
	if response.ProtoMajor >= 2 {
		streams = ofHTTP2
	}
	answer = &Answer{StatusCode: response.StatusCode, Header: response.Header, Withheld: withheld}
	if code := response.StatusCode; code >= 500 && code != http.StatusNotImplemented {
		return 0, answer, errors.New("server answered " + answer.Status())
	}
	return streams, answer, nil
}

func (c *Client) do(ctx context.Context, method string, headers http.Header, message []byte, lead int) (*Answer, error) {
	response, withheld, err := c.follow(ctx, method, headers, message)
	if err != nil {
		return nil, err
	}
	defer func() { _ = response.Body.Close() }()
	a := &Answer{StatusCode: response.StatusCode, Header: response.Header, Withheld: withheld, account: c.account}
	if !a.OK() {
		_, _ = io.CopyN(io.Discard, response.Body, maxRefusal)
		return a, nil
	}
	if kind, _, _ := strings.Cut(response.Header.Get("Content-Type"), ";"); kind != "" && !strings.EqualFold(strings.TrimSpace(kind), contentType) {
		_, _ = io.CopyN(io.Discard, response.Body, maxRefusal)
		return nil, fmt.Errorf("%w: its Content-Type is another one", ErrNoAnswer)
	}
	if err := c.read(a, response, lead); err != nil {
		a.Release()
		return nil, err
	}
	return a, nil
}

// read takes the message of an answer.
func (c *Client) read(a *Answer, response *http.Response, lead int) error {
	body := io.Reader(response.Body)
	switch coding := response.Header.Get("Content-Encoding"); {
	case strings.EqualFold(coding, encoding):
		unzip, err := gzip.NewReader(body)
		if err != nil {
			return fmt.Errorf("%w: %w", ErrNoAnswer, err)
		}
		body = unzip
	case coding != "" && !strings.EqualFold(coding, "identity"):
		return fmt.Errorf("%w: its Content-Encoding is unknown", ErrNoAnswer)
	}
	size := firstRead
	if n := response.ContentLength; n >= 0 && n < firstRead {
		size = int(n) + 1 // and the end
	}
	message := make([]byte, lead, lead+size)
	a.count(cap(message))
	for {
		if len(message) == cap(message) {
			grown := make([]byte, len(message), min(2*cap(message), lead+c.limit+1))
			copy(grown, message)
			a.count(cap(grown) - cap(message)) // the old one is garbage, for which the budget holds some back
			message = grown
		}
		n, err := body.Read(message[len(message):cap(message)])
		message = message[:len(message)+n]
		switch {
		case len(message)-lead > c.limit:
			return ErrTooLarge
		case errors.Is(err, io.EOF):
			a.Message = message
			return nil
		case err != nil:
			return fmt.Errorf("read the answer: %w", err)
		}
	}
}

func (a *Answer) count(n int) {
	a.account.Take(n)
	a.counted += n
}

// follow makes a request, with whom the server redirects to. Another host is told nothing that is for the endpoint's.
func (c *Client) follow(ctx context.Context, method string, headers http.Header, message []byte) (response *http.Response, withheld bool, err error) {
	at := c.endpoint
	if headers.Get("User-Agent") == "" {
		headers.Set("User-Agent", c.userAgent)
	}
	for redirects := 0; ; redirects++ {
		var body io.Reader
		if message != nil {
			body = bytes.NewReader(message)
		}
		request, err := http.NewRequestWithContext(ctx, method, at.String(), body)
		if err != nil {
			return nil, withheld, errors.New("endpoint is not a valid URL")
		}
		request.Header = headers
		if host := headers.Get("Host"); host != "" {
			request.Host = host
		}
		response, err := c.transport.RoundTrip(request)
		if err != nil {
			if quoting, ok := errors.AsType[*url.Error](err); ok {
				err = quoting.Err // without the URL
			}
			return nil, withheld, err
		}
		next, problem := redirect(response, at, redirects)
		if next == nil && problem == "" {
			return response, withheld, nil
		}
		_, _ = io.CopyN(io.Discard, response.Body, maxRefusal)
		_ = response.Body.Close()
		if problem != "" {
			return nil, withheld, fmt.Errorf("%w: %s", ErrRedirect, problem)
		}
		at = next
		if !strings.EqualFold(hostPort(at), hostPort(c.endpoint)) && !withheld {
			withheld, headers = true, neutral(headers)
		}
	}
}

// redirect returns where a response sends us, or what is wrong with that.
func redirect(response *http.Response, at *url.URL, before int) (next *url.URL, problem string) {
	switch response.StatusCode {
	case http.StatusMovedPermanently, http.StatusFound, http.StatusSeeOther, http.StatusTemporaryRedirect, http.StatusPermanentRedirect:
	default:
		return nil, ""
	}
	location, err := url.Parse(response.Header.Get("Location"))
	if err != nil || response.Header.Get("Location") == "" {
		return nil, "its Location is none"
	}
	next = at.ResolveReference(location)
	next.Fragment, next.RawFragment = "", ""
	switch {
	case before == maxRedirects:
		return nil, fmt.Sprintf("there were %d before", maxRedirects)
	case next.Scheme != "http" && next.Scheme != "https" || next.Hostname() == "":
		return nil, "it is no place for a request"
	case next.User != nil:
		return nil, "it holds a user"
	case at.Scheme == "https" && next.Scheme == "http":
		return nil, "it is without TLS"
	}
	return next, ""
}

// neutral returns what any host may know of a request's headers.
func neutral(headers http.Header) http.Header {
	some := http.Header{}
	for _, name := range []string{"Content-Type", "Accept-Encoding", "User-Agent", uidHeader} {
		if values := headers[name]; values != nil {
			some[name] = values
		}
	}
	return some
}

func hostPort(u *url.URL) string {
	port := u.Port()
	switch {
	case port != "":
	case u.Scheme == "https":
		port = "443"
	default:
		port = "80"
	}
	return net.JoinHostPort(u.Hostname(), port)
}

// ofTheHop are the headers of an agent's upgrade request that are about that request, and not about the agent.
var ofTheHop = map[string]bool{
	"Connection": true, "Upgrade": true, "Keep-Alive": true, "Proxy-Connection": true, "Proxy-Authenticate": true,
	"Proxy-Authorization": true, "Te": true, "Trailer": true, "Transfer-Encoding": true, "Host": true, "Expect": true,
	"Content-Length": true, "Content-Type": true, "Content-Encoding": true, "Accept-Encoding": true, uidHeader: true,
}

// OwnHeaders takes out of the headers of an agent's upgrade request what is about that request, so that its own are left:
// those that it would post a message with.
func OwnHeaders(headers http.Header) http.Header {
	own := http.Header{}
	named := headers["Connection"]
	for name, values := range headers {
		name = http.CanonicalHeaderKey(name)
		if ofTheHop[name] || strings.HasPrefix(name, "Sec-Websocket-") || httpguts.HeaderValuesContainsToken(named, name) ||
			!httpguts.ValidHeaderFieldName(name) {
			continue
		}
		for _, value := range values {
			if httpguts.ValidHeaderFieldValue(value) {
				own[name] = append(own[name], value)
			}
		}
	}
	return own
}

// RetryAfter returns the header of that name.
func (a *Answer) RetryAfter() string { return a.Header.Get("Retry-After") }

// IsDial reports whether an error means that the server, or a proxy on the way to it, could not be connected to.
func IsDial(err error) bool {
	op, ok := errors.AsType[*net.OpError](err)
	return ok && (op.Op == "dial" || op.Op == "proxyconnect")
}
