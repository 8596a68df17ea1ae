package posting

import (
	"compress/gzip"
	"context"
	"crypto/tls"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/opampgateway/opampgateway/internal/memory"
)

const limit = 1 << 20

// clientOf returns a client of a server, and the account in which it counts.
func clientOf(t *testing.T, server *httptest.Server) (*Client, *memory.Account) {
	t.Helper()
	endpoint, err := url.Parse(server.URL + "/v1/opamp?key=s3cret")
	require.NoError(t, err)
	budget := memory.New(64<<20, limit)
	var secure *tls.Config
	if server.TLS != nil {
		secure = server.Client().Transport.(*http.Transport).TLSClientConfig
	}
	c := NewClient(Options{
		Endpoint: endpoint, UserAgent: "gateway", Dial: (&net.Dialer{}).DialContext, TLS: secure, Connections: 2,
		Limit: limit, Account: &budget.Down,
	})
	t.Cleanup(func() {
		c.Close()
		server.Close()
		require.Zero(t, budget.Down.Held())
	})
	return c, &budget.Down
}

func TestHTTP2(t *testing.T) {
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("X-Proto", r.Proto)
	}))
	server.EnableHTTP2 = true
	server.StartTLS()
	c, _ := clientOf(t, server)
	streams, _, err := c.Probe(t.Context(), http.Header{})
	require.NoError(t, err)
	require.Greater(t, streams, 1)
	answer, err := c.Post(t.Context(), http.Header{}, []byte("x"), "", 0)
	require.NoError(t, err)
	require.Equal(t, "HTTP/2.0", answer.Header.Get("X-Proto"))
	answer.Release()
}

func TestProbe(t *testing.T) {
	for status, there := range map[int]bool{200: true, 400: true, 401: true, 404: true, 405: true, 429: true, 501: true, 500: false, 502: false, 503: false} {
		c, _ := clientOf(t, httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			assert.Equal(t, http.MethodHead, r.Method)
			w.WriteHeader(status)
		})))
		_, _, err := c.Probe(t.Context(), http.Header{})
		require.Equal(t, there, err == nil, "%d: %v", status, err)
	}
}

// Errors do not tell what is secret in the endpoint.
func TestErrors(t *testing.T) {
	server := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }))
	c, _ := clientOf(t, server)
	_, err := c.Post(t.Context(), http.Header{"Authorization": {"s3cret"}}, []byte("x"), "", 1)
	require.Error(t, err)
	require.NotContains(t, err.Error(), "s3cret")
	require.False(t, IsDial(err))
	server.Close()
	_, _, err = c.Probe(t.Context(), http.Header{})
	require.Error(t, err)
	require.NotContains(t, err.Error(), "s3cret")
	require.True(t, IsDial(err))
}

// No more memory is taken than the limit, whatever an answer decompresses to, and it is counted.
func TestAnswerSize(t *testing.T) {
	size := 0
	c, account := clientOf(t, httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Encoding", "gzip")
		zip := gzip.NewWriter(w)
		_, _ = zip.Write(make([]byte, size))
		_ = zip.Close()
	})))
	for size = range []int{0, 1} {
		answer, err := c.Post(t.Context(), http.Header{}, []byte("x"), "", 1)
		require.NoError(t, err)
		require.Len(t, answer.Message, 1+size)
		answer.Release()
	}
	size = limit
	answer, err := c.Post(t.Context(), http.Header{}, []byte("x"), "", 1)
	require.NoError(t, err)
	require.Len(t, answer.Message, 1+limit)
	require.GreaterOrEqual(t, account.Held(), int64(limit))
	require.LessOrEqual(t, account.Held(), int64(2*limit))
	answer.Release()
	size = limit + 1
	_, err = c.Post(t.Context(), http.Header{}, []byte("x"), "", 1)
	require.ErrorIs(t, err, ErrTooLarge)
	require.Zero(t, account.Held())
}

func TestNoOpAMP(t *testing.T) {
	for name, value := range map[string]string{"Content-Type": "text/html", "Content-Encoding": "br"} {
		c, _ := clientOf(t, httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set(name, value)
			_, _ = w.Write([]byte("hello"))
		})))
		_, err := c.Post(t.Context(), http.Header{}, []byte("x"), "", 1)
		require.ErrorIs(t, err, ErrNoAnswer)
	}
}

func TestPostTimeout(t *testing.T) {
	c, _ := clientOf(t, httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body) // or it would not notice
		<-r.Context().Done()
	})))
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	_, err := c.Post(ctx, http.Header{}, []byte("x"), "", 1)
	require.ErrorIs(t, err, context.DeadlineExceeded)
}

func TestRedirectsWithoutEnd(t *testing.T) {
	for _, status := range []int{301, 302, 303, 307, 308} {
		asked := 0
		c, _ := clientOf(t, httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			asked++
			assert.Equal(t, http.MethodPost, r.Method)
			w.Header().Set("Location", "/again")
			w.WriteHeader(status)
		})))
		_, err := c.Post(t.Context(), http.Header{}, []byte("x"), "", 1)
		require.ErrorIs(t, err, ErrRedirect)
		require.Equal(t, 1+maxRedirects, asked)
	}
}

func TestRedirectToNoTLS(t *testing.T) {
	plain := httptest.NewServer(http.NotFoundHandler())
	defer plain.Close()
	server := httptest.NewTLSServer(http.RedirectHandler(plain.URL, http.StatusTemporaryRedirect))
	c, _ := clientOf(t, server)
	_, err := c.Post(t.Context(), http.Header{}, []byte("x"), "", 1)
	require.ErrorIs(t, err, ErrRedirect)
	require.ErrorContains(t, err, "without TLS")
}

func TestOwnHeaders(t *testing.T) {
	got := OwnHeaders(http.Header{
		"Authorization": {"key"}, "X-Two": {"a", "b"}, "User-Agent": {"agent"}, "Connection": {"Upgrade, X-Hop"}, "Upgrade": {"websocket"},
		"X-Hop": {"1"}, "Sec-Websocket-Key": {"k"}, "Sec-WebSocket-Version": {"13"}, "Content-Length": {"5"}, "Te": {"trailers"},
		"Proxy-Authorization": {"key"}, "X-Bad": {"a\nb"}, "Bad Name": {"x"}, "Accept-Encoding": {"br"},
	})
	require.Equal(t, http.Header{"Authorization": {"key"}, "X-Two": {"a", "b"}, "User-Agent": {"agent"}}, got)
}
