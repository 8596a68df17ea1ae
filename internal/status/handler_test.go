package status_test

import (
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/opampgateway/opampgateway/internal/status"
	"github.com/opampgateway/opampgateway/internal/wire"
)

// source is a gateway of three agents.
type source struct{ searched wire.UID }

func (s *source) Status() *status.Snapshot {
	return &status.Snapshot{Problems: []string{}, Gateway: status.Gateway{State: status.StateOK, Name: "gateway"}}
}

func (s *source) Agents(rows []status.Row, uid wire.UID) []status.Row {
	s.searched = uid
	return append(rows, rowsOf(3)...)
}

// ask has the page answer one request.
func ask(t *testing.T, method, target string, headers ...string) *httptest.ResponseRecorder {
	t.Helper()
	r := httptest.NewRequestWithContext(t.Context(), method, target, nil)
	for i := 0; i < len(headers); i += 2 {
		r.Header.Set(headers[i], headers[i+1])
	}
	w := httptest.NewRecorder()
	status.Guard(status.NewHandler(&source{}), []string{"Gateway.example"}).ServeHTTP(w, r)
	return w
}

func TestJSON(t *testing.T) {
	w := ask(t, "GET", "http://localhost:4321/api/v1/status")
	require.Equal(t, http.StatusOK, w.Code)
	require.Equal(t, "application/json", w.Header().Get("Content-Type"))
	var s map[string]any
	require.NoError(t, json.Unmarshal(w.Body.Bytes(), &s))
	for _, key := range []string{"time", "gateway", "problems", "links", "rates", "memory", "offenders", "suspects", "ended", "faults", "admissions"} {
		require.Contains(t, s, key)
	}

	w = ask(t, "GET", "http://localhost:4321/api/v1/agents?sort=instance_uid&per=2&q=agent")
	require.Equal(t, http.StatusOK, w.Code)
	var a status.Agents
	require.NoError(t, json.Unmarshal(w.Body.Bytes(), &a))
	require.Equal(t, 3, a.Matching)
	require.Equal(t, 2, a.Pages)
	require.Equal(t, []string{uidOf(0).String(), uidOf(1).String()}, []string{a.Agents[0].UID, a.Agents[1].UID})
	require.WithinDuration(t, time.Now(), a.Agents[0].ConnectedSince, time.Minute)

	w = ask(t, "GET", "http://localhost:4321/api/v1/agents?sort=x")
	require.Equal(t, http.StatusBadRequest, w.Code)
	require.Equal(t, http.StatusNotFound, ask(t, "GET", "http://localhost:4321/api/v2/status").Code)
}

// The connection is found that speaks for a UID, however it is written.
func TestSearchedUID(t *testing.T) {
	for text, want := range map[string]wire.UID{
		uidOf(7).String(): uidOf(7), "30303030303030303030303030303037": uidOf(7), "x": {}, "": {},
	} {
		s := &source{}
		w := httptest.NewRecorder()
		status.NewHandler(s).ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), "GET", "/api/v1/agents?q="+text, nil))
		require.Equal(t, want, s.searched, text)
	}
}

// What a browser may do with the page is nothing but to run the one script that is in it.
func TestPolicy(t *testing.T) {
	w := ask(t, "GET", "http://localhost:4321/")
	require.Equal(t, http.StatusOK, w.Code)
	html := w.Body.String()
	policy := w.Header().Get("Content-Security-Policy")
	for _, directive := range []string{"default-src 'none'", "connect-src 'self'", "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'"} {
		require.Contains(t, policy, directive)
	}
	require.NotContains(t, policy, "unsafe")
	for _, element := range []string{"script", "style"} {
		found := regexp.MustCompile(`(?s)<`+element+`>(.*?)</`+element+`>`).FindAllStringSubmatch(html, -1)
		require.Len(t, found, 1, element)
		sum := sha256.Sum256([]byte(found[0][1]))
		require.Contains(t, policy, element+"-src 'sha256-"+base64.StdEncoding.EncodeToString(sum[:])+"'")
	}
	for name, want := range map[string]string{
		"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Cache-Control": "no-store",
		"Cross-Origin-Resource-Policy": "same-origin", "Content-Type": "text/html; charset=utf-8",
	} {
		require.Equal(t, want, w.Header().Get(name), name)
	}
	for _, bad := range []string{"innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", " style=", " onclick=", "http://", "https://"} {
		html := strings.ReplaceAll(html, `"http://www.w3.org/2000/svg"`, "") // the name of what SVG is
		require.NotContains(t, html, bad)
	}
}

func TestRefusals(t *testing.T) {
	const api = "http://localhost:4321/api/v1/status"
	for _, method := range []string{"POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE"} {
		w := ask(t, method, api)
		require.Equal(t, http.StatusMethodNotAllowed, w.Code, method)
		require.Equal(t, "GET, HEAD", w.Header().Get("Allow"))
	}
	w := ask(t, "HEAD", api)
	require.Equal(t, http.StatusOK, w.Code)
	require.Empty(t, w.Body.String())

	for host, want := range map[string]int{
		"localhost:4321": 200, "LOCALHOST": 200, "127.0.0.1:4321": 200, "[::1]:4321": 200, "[::1]": 200, "192.0.2.1:4321": 200,
		"gateway.example:4321": 200, "gateway.example.": 200,
		"evil.example": 403, "localhost.evil.example:4321": 403, "127.0.0.1.evil.example": 403, "": 403,
	} {
		for _, path := range []string{"/", "/api/v1/status"} {
			r := httptest.NewRequestWithContext(t.Context(), "GET", path, nil)
			r.Host = host
			w := httptest.NewRecorder()
			status.Guard(status.NewHandler(&source{}), []string{"Gateway.example"}).ServeHTTP(w, r)
			require.Equal(t, want, w.Code, "host %q", host)
			require.NotEmpty(t, w.Header().Get("Content-Security-Policy"))
		}
	}

	for _, test := range []struct {
		name, value string
		want        int
	}{
		{"Origin", "https://evil.example", 403},
		{"Origin", "null", 403},
		{"Origin", "http://localhost:4321", 403}, // ours sends none
		{"Sec-Fetch-Site", "cross-site", 403},
		{"Sec-Fetch-Site", "same-site", 403}, // another port of this host
		{"Sec-Fetch-Site", "same-origin", 200},
		{"Sec-Fetch-Site", "none", 200},
	} {
		w := ask(t, "GET", api, test.name, test.value)
		require.Equal(t, test.want, w.Code, "%s: %s", test.name, test.value)
		if test.want == 403 {
			require.NotContains(t, w.Body.String(), "gateway\"")
			require.Empty(t, w.Header().Get("Access-Control-Allow-Origin"))
		}
	}
	require.Equal(t, http.StatusOK, ask(t, "GET", "http://localhost:4321/", "Sec-Fetch-Site", "cross-site").Code, "a link to the page")
}

func TestCut(t *testing.T) {
	require.Equal(t, "agent/1", status.Cut("agent/1"))
	require.Len(t, status.Cut(strings.Repeat("x", 1000)), 128)
	require.Equal(t, strings.Repeat("x", 127), status.Cut(strings.Repeat("x", 127)+"é"), "no half of a letter")
}
