package status_test

import (
	"net/http"
	"net/http/httptest"
	"net/url"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/opampgateway/opampgateway/internal/status"
)

// Whatever is asked, the answer is either what is wrong with the question, or a page that is no larger than it may be.
func FuzzQuery(f *testing.F) {
	f.Add("q=agent&sort=address&desc=true&page=2&per=3")
	f.Add("page=9223372036854775807&per=9223372036854775807")
	f.Add("q=%00%ff&sort=&desc=")
	f.Fuzz(func(t *testing.T, text string) {
		values, err := url.ParseQuery(text)
		if err != nil {
			return
		}
		q, err := status.ParseQuery(values)
		if err != nil {
			require.NotContains(t, err.Error(), "\n")
			return
		}
		a := q.Select(rowsOf(20), status.NewClock())
		require.LessOrEqual(t, len(a.Agents), min(q.Per, 1000))
		require.LessOrEqual(t, len(a.Agents), a.Matching)
		require.True(t, a.Matching == 0 || len(a.Agents) > 0, "a page without agents")
		require.LessOrEqual(t, a.Page, a.Pages)
	})
}

// Whoever calls the page by a name that is not its own gets nothing.
func FuzzHost(f *testing.F) {
	f.Add("evil.example", "/api/v1/status")
	f.Add("127.0.0.1.evil.example:80", "/")
	f.Add("[::1", "/")
	f.Fuzz(func(t *testing.T, host, path string) {
		target, err := url.Parse(path)
		if err != nil || target.Path == "" || target.Path[0] != '/' {
			return
		}
		asked := false
		guard := status.Guard(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { asked = true }), nil)
		r := httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/", nil)
		r.Host, r.URL = host+".evil.example", target
		guard.ServeHTTP(httptest.NewRecorder(), r)
		require.False(t, asked)
	})
}
