package socket

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"

	"github.com/gorilla/websocket"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// world has servers behind any name: what is asked of one is answered by its Location, or by a WebSocket
// where there is none.
type world struct {
	Dialer
	locations map[string]string // by scheme://host/path, as the server sees it
	status    int

	mu    sync.Mutex
	asked []*http.Request
}

func newWorld(t *testing.T, locations map[string]string) *world {
	t.Helper()
	w := &world{locations: locations, status: http.StatusFound}
	plain, secure := httptest.NewServer(w), httptest.NewUnstartedServer(w)
	secure.TLS = &tls.Config{Certificates: []tls.Certificate{selfSigned(t)}}
	secure.StartTLS()
	t.Cleanup(func() {
		plain.Close()
		secure.Close()
	})
	w.Dialer = Dialer{
		TLS: &tls.Config{InsecureSkipVerify: true}, ReadBufferSize: 4 << 10,
		Elsewhere: http.Header{"User-Agent": {"gateway"}, "X-Name": {"link"}},
		NetDial: func(ctx context.Context, network, address string) (net.Conn, error) {
			server := plain
			if strings.HasSuffix(address, "443") {
				server = secure
			}
			return (&net.Dialer{}).DialContext(ctx, network, server.Listener.Addr().String())
		},
	}
	return w
}

func (w *world) ServeHTTP(response http.ResponseWriter, r *http.Request) {
	w.mu.Lock()
	w.asked = append(w.asked, r)
	w.mu.Unlock()
	scheme := "http"
	if r.TLS != nil {
		scheme = "https"
	}
	if location, ok := w.locations[scheme+"://"+r.Host+r.URL.Path]; ok {
		response.Header().Set("Location", location)
		response.WriteHeader(w.status)
		_, _ = response.Write([]byte("<a href>see there</a>"))
		return
	}
	if r.Header.Get("Authorization") == "" && r.URL.Path == "/closed" {
		http.Error(response, "not for "+r.URL.RawQuery, http.StatusForbidden)
		return
	}
	if ws, err := (&websocket.Upgrader{}).Upgrade(response, r, nil); err == nil {
		ws.Close()
	}
}

// dial dials an endpoint with headers that are for its host only. It returns the requests that were made.
func (w *world) dial(t *testing.T, endpoint string) (asked []*http.Request, place string, err error) {
	t.Helper()
	var conn net.Conn
	var in *bufio.Reader
	conn, in, place, err = w.Dial(t.Context(), parseURL(t, endpoint), http.Header{
		"User-Agent": {"mine"}, "X-Name": {"link"}, "Authorization": {"Secret-Key hidden-key"}, "X-Team": {"hidden-team"},
	})
	if err == nil {
		require.NotNil(t, in)
		conn.Close()
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.asked, place, err
}

// wantHeaders checks that a request has all headers, or only those for anybody.
func wantHeaders(t *testing.T, all bool, r *http.Request) {
	t.Helper()
	assert.Equal(t, []string{"link"}, r.Header["X-Name"])
	if all {
		assert.Equal(t, []string{"Secret-Key hidden-key"}, r.Header["Authorization"])
		assert.Equal(t, []string{"mine"}, r.Header["User-Agent"])
		return
	}
	assert.Empty(t, r.Header["Authorization"], r.Host)
	assert.Empty(t, r.Header["X-Team"], r.Host)
	assert.Equal(t, []string{"gateway"}, r.Header["User-Agent"])
}

func TestARedirectIsFollowed(t *testing.T) {
	for name, test := range map[string]struct {
		endpoint, location string // of a server at ws://one.example:80
		at, place          string
		all                bool // headers
	}{
		"to a path":                {"ws://one.example/old?key=1", "/new", "one.example/new", "ws://one.example/new", true},
		"to a path beside":         {"ws://one.example/old", "new?key=hidden", "one.example/new", "ws://one.example/new", true},
		"to the same host":         {"ws://one.example/old", "http://one.example/new", "one.example/new", "ws://one.example/new", true},
		"to the same in capitals":  {"ws://one.example/old", "ws://ONE.example:80/new#x", "ONE.example:80/new", "ws://ONE.example:80/new", true},
		"without a scheme":         {"ws://one.example/old", "//two.example/old", "two.example/old", "ws://two.example/old", false},
		"to another host":          {"ws://one.example/old", "ws://two.example/", "two.example/", "ws://two.example/", false},
		"to another port":          {"ws://one.example/old", "http://one.example:81/", "one.example:81/", "ws://one.example:81/", false},
		"to TLS, which is another": {"ws://one.example/old", "https://one.example/new", "one.example/new", "wss://one.example/new", false},
		"to TLS at the same port":  {"ws://one.example:443/old", "wss://one.example/new", "one.example/new", "wss://one.example/new", true},
		"with TLS":                 {"wss://one.example/old", "https://one.example/new", "one.example/new", "wss://one.example/new", true},
		"with TLS to another":      {"wss://one.example/old", "wss://two.example/new", "two.example/new", "wss://two.example/new", false},
		"not at all":               {"wss://one.example/new", "", "one.example/new", "", true},
	} {
		t.Run(name, func(t *testing.T) {
			for _, status := range []int{301, 302, 303, 307, 308} {
				w := newWorld(t, map[string]string{"http://one.example/old": test.location, "https://one.example/old": test.location})
				w.status = status
				if strings.Contains(test.endpoint, ":443") { // without TLS there
					plain := w.NetDial
					first := true
					w.locations = map[string]string{"http://one.example:443/old": test.location}
					w.NetDial = func(ctx context.Context, network, address string) (net.Conn, error) {
						if first {
							address, first = "one.example:80", false
						}
						return plain(ctx, network, address)
					}
				}
				asked, place, err := w.dial(t, test.endpoint)
				require.NoError(t, err)
				last := asked[len(asked)-1]
				require.Equal(t, test.at, last.Host+last.URL.Path)
				require.Equal(t, test.place, place)
				wantHeaders(t, true, asked[0])
				wantHeaders(t, test.all, last)
			}
		})
	}
}

// Whoever is not the endpoint's host must not get our headers by sending us on, not even back.
func TestHeadersStayWithheld(t *testing.T) {
	w := newWorld(t, map[string]string{
		"http://one.example/":     "http://two.example/",
		"http://two.example/":     "http://one.example/open",
		"http://one.example/open": "/end",
	})
	asked, place, err := w.dial(t, "ws://one.example/")
	require.NoError(t, err)
	require.Equal(t, "ws://one.example/end", place)
	require.Len(t, asked, 4)
	wantHeaders(t, true, asked[0])
	for _, r := range asked[1:] {
		wantHeaders(t, false, r)
	}
}

func TestARedirectIsNotFollowedForEver(t *testing.T) {
	for name, test := range map[string]struct {
		locations map[string]string
		endpoint  string
		want      string
		asked     int
	}{
		"in a circle": {
			map[string]string{"http://one.example/": "http://two.example/", "http://two.example/": "http://one.example/"},
			"ws://one.example",
			"redirected to two.example:80: server answered 302 Found to http://one.example/, which is not followed: there were 3 before", 4,
		},
		"out of TLS": {
			map[string]string{"https://one.example/": "http://one.example:443/"},
			"wss://one.example",
			"server answered 302 Found to http://one.example:443/, which is not followed: it is without TLS", 1,
		},
		"into TLS and out of it": {
			map[string]string{"http://one.example/": "wss://two.example/", "https://two.example/": "ws://one.example/"},
			"ws://one.example",
			"redirected to two.example:443: server answered 302 Found to ws://one.example/, which is not followed: it is without TLS", 2,
		},
		"to a file": {
			map[string]string{"http://one.example/": "file:///etc/passwd"},
			"ws://one.example",
			"server answered 302 Found to file:///etc/passwd, which is not followed: it is no place for a WebSocket", 1,
		},
		"to no host": {
			map[string]string{"http://one.example/": "http:///x"},
			"ws://one.example",
			"server answered 302 Found to http:///x, which is not followed: it is no place for a WebSocket", 1,
		},
		"as somebody": {
			map[string]string{"http://one.example/": "http://me:hidden-password@one.example/"},
			"ws://one.example",
			"server answered 302 Found to http://one.example/, which is not followed: it holds a user", 1,
		},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, test.locations)
			asked, _, err := w.dial(t, test.endpoint)
			require.ErrorIs(t, err, ErrRedirect)
			require.EqualError(t, err, test.want)
			require.Len(t, asked, test.asked)
			answered := (*HandshakeError)(nil)
			require.ErrorAs(t, err, &answered)
		})
	}
}

// What goes wrong at another place names that place, and nothing that is secret.
func TestErrorsBehindARedirect(t *testing.T) {
	w := newWorld(t, map[string]string{
		"http://one.example/": "http://two.example/hidden-key/x?token=hidden-token", "http://two.example/hidden-key/x": "",
	})
	_, _, err := w.dial(t, "ws://one.example/?token=hidden-token")
	require.EqualError(t, err, "redirected to two.example:80: server answered 302 Found: see there")
	answered := (*HandshakeError)(nil)
	require.ErrorAs(t, err, &answered)
	require.True(t, answered.Withheld)

	w.locations = map[string]string{"http://one.example/": "http://two.example/hidden-key/x?token=hidden-token"}
	_, place, err := w.dial(t, "ws://one.example/?token=hidden-token")
	require.NoError(t, err)
	require.Equal(t, "ws://two.example/…", place)

	// Those who send us on may have secrets, too; and who has been elsewhere has no headers any more.
	for _, last := range []string{"http://two.example/closed?token=hidden-other", "http://one.example/closed?token=hidden-other"} {
		w.locations = map[string]string{"http://one.example/": "http://two.example/", "http://two.example/": last}
		_, _, err = w.dial(t, "ws://one.example/")
		require.EqualError(t, err, "redirected to "+parseURL(t, last).Host+":80: server answered 403 Forbidden: not for…")
		require.ErrorAs(t, err, &answered)
		require.True(t, answered.Withheld)
	}

	w.locations = map[string]string{"http://one.example/": "http://hidden-key.two.example/"}
	inner := w.NetDial
	w.NetDial = func(ctx context.Context, network, address string) (net.Conn, error) {
		if address != "one.example:80" {
			return nil, errors.New("refused")
		}
		return inner(ctx, network, address)
	}
	_, _, err = w.dial(t, "ws://one.example/")
	require.EqualError(t, err, "redirected to …: refused")

	w.locations = map[string]string{"http://one.example/": "/again", "http://one.example/again": "http://["}
	_, _, err = w.dial(t, "ws://one.example/")
	require.EqualError(t, err, "redirected to one.example:80: server answered 302 Found: see there")
	require.ErrorAs(t, err, &answered)
	require.False(t, answered.Withheld)
}

// A certificate may have another name than the endpoint's host, but only there.
func TestServerNameIsOfTheEndpoint(t *testing.T) {
	w := newWorld(t, map[string]string{
		"https://one.example/": "/new", "https://one.example/new": "wss://two.example/", "https://two.example/": "wss://one.example/end",
	})
	w.TLS.ServerName = "internal"
	asked, _, err := w.dial(t, "wss://one.example/")
	require.NoError(t, err)
	var names []string
	for _, r := range asked {
		names = append(names, r.TLS.ServerName)
	}
	require.Equal(t, []string{"internal", "internal", "two.example", "internal"}, names)
}

// Only the server redirects, not who stands before it.
func TestAProxyDoesNotRedirect(t *testing.T) {
	if !inChild(t, "HTTP_PROXY=http://proxy.example:3128", "http_proxy=", "NO_PROXY=", "no_proxy=") {
		return
	}
	err := dialed(t, scripted(t, "HTTP/1.1 302 Found\r\nLocation: http://login.example/\r\nContent-Length: 0\r\n\r\n", true), "ws://server.example/", nil)
	require.EqualError(t, err, "proxy http://proxy.example:3128 answered 302 Found to http://login.example/")
}
