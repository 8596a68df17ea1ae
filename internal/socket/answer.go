package socket

import (
	"bufio"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"unicode"
)

const (
	// maxAnswer is what is read of an answer to a handshake, in bytes.
	maxAnswer = 64 << 10
	// maxWords is what is repeated of one, in bytes.
	maxWords = 200
	// maxBody is what is looked at of its body, in bytes.
	maxBody = 1 << 10
)

var errLongAnswer = errors.New("answer to the handshake is above 64 KiB")

// HandshakeError is what a server, or a proxy on the way to it, has answered instead of yes. Its texts
// are for people: printable, short, and without what is secret.
type HandshakeError struct {
	// Proxy names the proxy if it was the one to answer.
	Proxy string
	// Status is the status line without the protocol, as in "401 Unauthorized".
	Status     string
	StatusCode int
	// RetryAfter is the header of that name.
	RetryAfter string
	// Header is the whole of the answer's. It may be secret.
	Header http.Header
	// Reason is the first line of the body.
	Reason string
	// Location is where the server sends us, without its query.
	Location string
	// Withheld tells that a redirect has led to another host, which did not get what is for the endpoint's.
	Withheld bool

	next *url.URL // the whole Location, if its status is one of a redirect
}

func (e *HandshakeError) Error() string {
	who := e.Proxy
	if who == "" {
		who = "server"
	}
	text := who + " answered " + e.Status
	switch {
	case e.StatusCode == http.StatusSwitchingProtocols:
		text += ", and not as a WebSocket"
	case e.Location != "":
		text += " to " + e.Location
	}
	if e.Reason != "" {
		text += ": " + e.Reason
	}
	return text
}

// newHandshakeError returns the error that response is, from a proxy if it is named.
func newHandshakeError(response *http.Response, proxy string, secrets []string) *HandshakeError {
	e := &HandshakeError{
		Proxy:      proxy,
		Status:     words(response.Status, secrets),
		StatusCode: response.StatusCode,
		RetryAfter: response.Header.Get("Retry-After"),
		Header:     response.Header,
	}
	if !strings.Contains(e.Status, " ") { // HTTP/1.1 403, and no more
		e.Status = strings.TrimSpace(strconv.Itoa(response.StatusCode) + " " + http.StatusText(response.StatusCode))
	}
	if location, err := url.Parse(response.Header.Get("Location")); err == nil && response.StatusCode/100 == 3 {
		e.Location = words(Place(location), secrets)
		if isRedirect(response.StatusCode) && response.Header.Get("Location") != "" {
			e.next = location
		}
	}
	body, _ := io.ReadAll(io.LimitReader(response.Body, maxBody)) // what has come is enough
	for line := range strings.Lines(withoutTags(string(body))) {
		if e.Reason = words(line, secrets); e.Reason != "" {
			break
		}
	}
	return e
}

// answer is what a server, or a proxy, says to a handshake: not without end.
type answer struct {
	in   *bufio.Reader
	read int
	head []byte // its start
	err  error  // why it ended
}

func (a *answer) Read(b []byte) (n int, err error) {
	if a.read >= maxAnswer {
		a.err = errLongAnswer
		return 0, a.err
	}
	n, err = a.in.Read(b[:min(len(b), maxAnswer-a.read)])
	a.read += n
	a.head = append(a.head, b[:min(n, maxWords-len(a.head))]...)
	a.err = err
	return n, err
}

// explain returns an error that tells more of why no answer could be read than err does, which may
// quote any amount of it. Of who was spoken to plainly, secure is the scheme of the other kind.
func (a *answer) explain(err error, who, secure string, secrets []string) error {
	const alert, version = 0x15, 0x03 // of a TLS record
	switch {
	case len(a.head) > 1 && a.head[0] == alert && a.head[1] == version:
		return fmt.Errorf("%s speaks TLS: it seems to want %s", who, secure)
	case errors.Is(a.err, io.EOF):
		return fmt.Errorf("%s has hung up instead of an answer: %w", who, io.ErrUnexpectedEOF)
	case a.err != nil:
		return fmt.Errorf("%s: %w", who, a.err)
	case len(a.head) > 0:
		line, _, _ := strings.Cut(string(a.head), "\n")
		return fmt.Errorf("%s has not answered in HTTP/1.1: %q", who, words(line, secrets))
	}
	if quoting := (*url.Error)(nil); errors.As(err, &quoting) {
		return errors.New("endpoint is not a valid URL")
	}
	return err
}

// explainTLS returns an error that tells more of why TLS does not begin with who, which was spoken to
// under the scheme secure and seems to speak plainly.
func explainTLS(err error, who, plain, secure string) error {
	if record := (tls.RecordHeaderError{}); errors.As(err, &record) {
		return fmt.Errorf("%s does not speak TLS: it seems to want %s instead of %s", who, plain, secure)
	}
	return fmt.Errorf("%s: %w", who, err)
}

// Place returns where u is, without what may be secret: of an endpoint, or where we are sent.
func Place(u *url.URL) string {
	shown := url.URL{Scheme: u.Scheme, Host: u.Host, Path: u.Path}
	if strings.Contains(u.Path, "@") { // a password with a slash in it looks so
		shown.Path = ""
	}
	return shown.String()
}

// proxyAt names a proxy.
func proxyAt(u *url.URL) string { return "proxy " + u.Scheme + "://" + u.Host }

// minSecret is how many bytes at the start of a secret give it away; of fewer there is no telling.
const minSecret, maxSecret = 4, 12

// secretsOf returns the starts of what must not be repeated of a request, although its answer may.
func secretsOf(u *url.URL, headers http.Header) []string {
	var secrets []string
	add := func(secret string) {
		if len(secret) >= minSecret {
			secrets = append(secrets, secret[:min(len(secret), maxSecret)])
		}
	}
	add(u.RawQuery)
	for _, values := range u.Query() {
		for _, value := range values {
			add(value)
			add(url.QueryEscape(value))
		}
	}
	if u.User != nil {
		password, _ := u.User.Password()
		add(password)
		add(url.QueryEscape(password))
	}
	for name, values := range headers {
		if name == "User-Agent" {
			continue
		}
		for _, value := range values {
			if name == "Authorization" || name == "Proxy-Authorization" {
				if _, credentials, ok := strings.Cut(value, " "); ok { // behind the scheme, which is none
					value = credentials
				}
			}
			add(value)
		}
	}
	return secrets
}

// words returns a text of the other end for people to read: one line, printable, cut to what is of use,
// and before anything that is secret.
func words(text string, secrets []string) string {
	text, cut := withoutSecrets(text, secrets)
	text = strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return ' '
		}
		return r
	}, strings.ToValidUTF8(text, "\ufffd"))
	text = strings.Join(strings.Fields(text), " ")
	if len(text) > maxWords {
		text, cut = strings.ToValidUTF8(text[:maxWords-len("…")], ""), true
	}
	if cut {
		text += "…"
	}
	return text
}

// withoutSecrets returns what is before anything that is secret, escaped as in a URL or not.
func withoutSecrets(text string, secrets []string) (before string, cut bool) {
	for _, secret := range secrets {
		if i := strings.Index(text, secret); i >= 0 {
			text, cut = text[:i], true
		}
	}
	if plain, err := url.PathUnescape(text); err == nil && plain != text {
		if plain, hidden := withoutSecrets(plain, secrets); hidden {
			return plain, true
		}
	}
	return text, cut
}

// withoutTags returns what there is to read of a page of HTML, which many proxies answer with.
func withoutTags(text string) string {
	if !strings.HasPrefix(strings.TrimSpace(text), "<") {
		return text
	}
	var b strings.Builder
	for text != "" {
		before, tag, _ := strings.Cut(text, "<")
		b.WriteString(before)
		_, text, _ = strings.Cut(tag, ">")
	}
	return b.String()
}
