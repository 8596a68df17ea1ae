package opampgateway

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"

	"go.opentelemetry.io/collector/component"
	"go.opentelemetry.io/collector/config/configopaque"

	"github.com/opampgateway/opampgateway/internal/clientauth"
)

// proxySchemes are how a proxy can be spoken to.
var proxySchemes = []string{"http", "https", "socks5", "socks5h"}

// parseProxy reads a proxy's URL; nil if it is empty. The error repeats nothing of it, since any part may be of a password
// that was not escaped.
func parseProxy(text configopaque.String) (*url.URL, error) {
	if text == "" {
		return nil, nil //nolint:nilnil // no proxy is no error
	}
	u, err := url.Parse(string(text))
	switch {
	case err != nil:
		return nil, errors.New("is not a URL; in a user and password, special characters have to be escaped, as %40 is for @")
	case !slices.Contains(proxySchemes, u.Scheme):
		return nil, errors.New("must start with http://, https://, socks5:// or socks5h://")
	case u.Hostname() == "":
		return nil, errors.New("has no host")
	case u.Path != "" && u.Path != "/" || u.RawQuery != "" || u.Fragment != "":
		return nil, errors.New("must end with host and port; in a user and password, special characters have to be escaped, as %2F is for /")
	}
	if password, _ := u.User.Password(); len(u.User.Username()) > maxProxyLogin || len(password) > maxProxyLogin {
		return nil, fmt.Errorf("must not have a user or password of more than %d bytes", maxProxyLogin)
	}
	return u, nil
}

// maxProxyLogin is the longest user or password that SOCKS5 can say.
const maxProxyLogin = 255

// newAuthenticator returns who authenticates the gateway to the server, nil if nobody does.
func newAuthenticator(ctx context.Context, cfg *ServerConfig, host component.Host) (*clientauth.Authenticator, error) {
	auth := cfg.Auth.Get()
	if auth == nil {
		return nil, nil //nolint:nilnil // no authenticator is no error
	}
	return clientauth.New(ctx, *auth, host.GetExtensions())
}

// authenticate returns the headers of a request to the endpoint with what the authenticator adds. It is asked each time,
// since what it has may be good for minutes only.
func (t *target) authenticate(ctx context.Context, headers http.Header) (http.Header, error) {
	headers, err := t.auth.Load().Headers(ctx, t.endpoint, headers)
	if err != nil {
		return nil, fmt.Errorf("server::auth: %w", err)
	}
	return headers, nil
}

// renew has t go on with what a reload makes anew, although nothing was configured differently.
func (t *target) renew(with *target) {
	t.tls.Store(with.tls.Load())
	t.auth.Store(with.auth.Load())
}
