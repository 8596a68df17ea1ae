package clientauth

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"os"
	"strings"
	"testing"
	"testing/synctest"
	"time"
	"unicode/utf8"

	"github.com/stretchr/testify/require"
	"go.opentelemetry.io/collector/component"
	"go.opentelemetry.io/collector/config/configauth"
	"go.opentelemetry.io/collector/extension/extensionauth"
)

// client is an extension that has others do what it does.
type client struct {
	component.StartFunc
	component.ShutdownFunc
	extensionauth.ClientRoundTripperFunc
}

// roundTripper is a function that is one.
type roundTripper func(*http.Request) (*http.Response, error)

func (f roundTripper) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// authenticator is one that does with each request what it is told, before it sends it. It has no manners: the request
// is not its own to change.
func authenticator(t *testing.T, does func(*http.Request) error) *Authenticator {
	t.Helper()
	id := component.MustNewID("client")
	a, err := New(t.Context(), configauth.Config{AuthenticatorID: id}, map[component.ID]component.Component{
		id: client{ClientRoundTripperFunc: func(base http.RoundTripper) (http.RoundTripper, error) {
			return roundTripper(func(r *http.Request) (*http.Response, error) {
				if err := does(r); err != nil {
					return nil, err
				}
				return base.RoundTrip(r)
			}), nil
		}},
	})
	require.NoError(t, err)
	return a
}

func endpoint(t *testing.T, text string) *url.URL {
	t.Helper()
	u, err := url.Parse(text)
	require.NoError(t, err)
	return u
}

func TestHeadersAreAddedAnewEachTime(t *testing.T) {
	asked := 0
	a := authenticator(t, func(r *http.Request) error {
		asked++
		require.Equal(t, "GET https://server/v1/opamp?x=y", r.Method+" "+r.URL.String())
		require.Equal(t, "server", r.Host)
		r.Header.Set("Authorization", fmt.Sprint("Bearer token-", asked))
		return nil
	})
	given := http.Header{"Authorization": {"Secret-Key configured"}, "X-Team": {"a", "b"}}
	for i := range 3 {
		got, err := a.Headers(t.Context(), endpoint(t, "wss://server/v1/opamp?x=y"), given)
		require.NoError(t, err)
		require.Equal(t, http.Header{"Authorization": {fmt.Sprint("Bearer token-", i+1)}, "X-Team": {"a", "b"}}, got)
	}
	require.Equal(t, http.Header{"Authorization": {"Secret-Key configured"}, "X-Team": {"a", "b"}}, given, "it is not theirs")

	got, err := (*Authenticator)(nil).Headers(t.Context(), endpoint(t, "ws://server"), given)
	require.NoError(t, err)
	require.Equal(t, given, got)
}

// What signs a request has to see the host that it is for.
func TestHostIsAsConfigured(t *testing.T) {
	a := authenticator(t, func(r *http.Request) error {
		require.Equal(t, "another", r.Host)
		require.Empty(t, r.Header["Host"])
		return nil
	})
	got, err := a.Headers(t.Context(), endpoint(t, "ws://server"), http.Header{"Host": {"another"}})
	require.NoError(t, err)
	require.Equal(t, http.Header{"Host": {"another"}}, got)
}

func TestWhatCannotBeSentIsNot(t *testing.T) {
	for name, value := range map[string]string{"Authorization": "hidden\r\nX: y", "Author ization": "hidden"} {
		a := authenticator(t, func(r *http.Request) error {
			r.Header[name] = []string{value}
			return nil
		})
		_, err := a.Headers(t.Context(), endpoint(t, "ws://server"), http.Header{})
		require.EqualError(t, err, "client has given a header that cannot be sent")
	}
}

func TestExtensionsThatAreNone(t *testing.T) {
	id := component.MustNewID("client")
	for want, extensions := range map[string]map[component.ID]component.Component{
		"not found":                     nil,
		"not a HTTP client":             {id: struct{ component.Component }{}},
		"client cannot authenticate re": {id: client{ClientRoundTripperFunc: func(http.RoundTripper) (http.RoundTripper, error) { return nil, errors.New("no") }}},
	} {
		_, err := New(t.Context(), configauth.Config{AuthenticatorID: id}, extensions)
		require.ErrorContains(t, err, want)
	}
}

// An extension that waits for a token does so for as long as a dial may take.
func TestASlowAuthenticatorIsGivenUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := authenticator(t, func(r *http.Request) error {
			<-r.Context().Done()
			return r.Context().Err()
		})
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		_, err := a.Headers(ctx, endpoint(t, "ws://server"), http.Header{})
		require.ErrorIs(t, err, context.DeadlineExceeded)
		require.EqualError(t, err, "client has given no credentials in time: context deadline exceeded")
	})
}

// An authenticator's error may repeat what it has been told, or has told others.
func TestReasonTellsNoSecret(t *testing.T) {
	refused := &net.OpError{Op: "dial", Net: "tcp", Source: &net.TCPAddr{Port: 4711}, Addr: &net.TCPAddr{IP: net.IPv4(192, 0, 2, 1), Port: 443}, Err: os.NewSyscallError("connect", errors.New("connection refused"))}
	for want, err := range map[string]error{
		"dial 192.0.2.1:443: connect: connection refused":         &url.Error{Op: "Post", URL: "https://hidden/token?hidden", Err: refused},
		"failed (endpoint …): oauth2: cannot fetch token: 401 Oh": errors.New("failed (endpoint \"https://idp/?key=hidden\"): oauth2: cannot fetch token: 401 Oh\nResponse: hidden"),
		`oauth2: "invalid_client" … …`:                            errors.New(`oauth2: "invalid_client" "hidden \" hidden" "https://hidden"`),
		"Post … x509: certificate signed by unknown authority":    errors.New("Post https://user:hidden@idp/token: x509: certificate signed by unknown authority"),
		"says … and no more":                                      errors.New(`says "hidden` + `" and no more`),
		"does not end …":                                          errors.New(`does not end "hidden`),
		"open /etc/otel/secret: no such file or directory":        &os.PathError{Op: "open", Path: "/etc/otel/secret", Err: errors.New("no such file or directory")},
		"a b\ufffd": errors.New("a\x1bb\xff"),
	} {
		require.Equal(t, want, reason(err))
	}
	long := reason(errors.New(strings.Repeat("ö", 1000)))
	require.LessOrEqual(t, len(long), maxReason)
	require.True(t, utf8.ValidString(long))
}

func FuzzReason(f *testing.F) {
	f.Add(`oauth2: "invalid_client" "hidden" (https://hidden)`)
	f.Add("\"\\")
	f.Fuzz(func(t *testing.T, text string) {
		told := reason(errors.New(text))
		require.LessOrEqual(t, len(told), maxReason)
		require.True(t, utf8.ValidString(told))
		quoted := reason(fmt.Errorf("has said %q", text))
		require.Contains(t, append([]string{`"…"`, "…"}, known...), strings.TrimPrefix(quoted, "has said "))
	})
}
