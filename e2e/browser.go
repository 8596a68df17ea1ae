package e2e

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/gorilla/websocket"
	"github.com/stretchr/testify/require"
)

// Browser is a headless Chromium with one page, spoken to by the DevTools protocol.
type Browser struct {
	*Process
	ws *websocket.Conn

	// mu guards what follows, and writing to ws.
	mu      sync.Mutex
	last    int
	answers map[int]chan devtools
	errors  []string // what the page has complained of
}

// devtools is what the protocol sends: the answer to a call, or an event.
type devtools struct {
	ID     int             `json:"id"`
	Method string          `json:"method"`
	Params json.RawMessage `json:"params"`
	Result json.RawMessage `json:"result"`
	Error  json.RawMessage `json:"error"`
}

// startBrowser starts a browser; the test is skipped where there is none.
func startBrowser(t *testing.T) *Browser {
	t.Helper()
	program := ""
	for _, name := range []string{"chromium", "chromium-browser", "google-chrome"} {
		if path, err := exec.LookPath(name); err == nil {
			program = path
			break
		}
	}
	if program == "" {
		t.Skip("there is no chromium here")
	}
	dir := t.TempDir()
	b := &Browser{answers: map[int]chan devtools{}}
	b.Process = startProcess(t, "chromium", program, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--log-level=3",
		"--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars", "--no-proxy-server",
		"--remote-debugging-port=0", "--user-data-dir="+dir, "about:blank")
	var port string
	within(t, 2*ceiling, func() string {
		text, err := os.ReadFile(filepath.Join(dir, "DevToolsActivePort"))
		if err != nil {
			return err.Error()
		}
		port, _, _ = strings.Cut(string(text), "\n")
		return ""
	})
	var target string
	within(t, 2*ceiling, func() string {
		_, body := get(t, "http://127.0.0.1:"+port+"/json/list")
		var pages []struct {
			Type string `json:"type"`
			URL  string `json:"webSocketDebuggerUrl"`
		}
		_ = json.Unmarshal([]byte(body), &pages) // otherwise there is none
		for _, p := range pages {
			if p.Type == "page" {
				target = p.URL
				return ""
			}
		}
		return "the browser has no page: " + body
	})
	ws, _, err := websocket.DefaultDialer.Dial(target, http.Header{})
	require.NoError(t, err)
	b.ws = ws
	var reading sync.WaitGroup
	reading.Go(b.readAll)
	t.Cleanup(func() {
		ws.Close()
		reading.Wait()
	})
	for _, domain := range []string{"Page", "Runtime", "Log", "Network"} {
		b.call(t, domain+".enable", nil, nil)
	}
	return b
}

// readAll ends with the connection.
func (b *Browser) readAll() {
	for {
		var m devtools
		if b.ws.ReadJSON(&m) != nil {
			return
		}
		b.mu.Lock()
		switch m.Method {
		case "":
			if answer := b.answers[m.ID]; answer != nil {
				answer <- m
				delete(b.answers, m.ID)
			}
		case "Runtime.exceptionThrown":
			b.errors = append(b.errors, string(m.Params))
		case "Runtime.consoleAPICalled", "Log.entryAdded":
			b.errors = append(b.errors, m.Method+": "+string(m.Params))
		}
		b.mu.Unlock()
	}
}

// call has the browser do something.
func (b *Browser) call(t *testing.T, method string, params, result any) {
	t.Helper()
	answer := make(chan devtools, 1)
	b.mu.Lock()
	b.last++
	b.answers[b.last] = answer
	if params == nil {
		params = struct{}{}
	}
	err := b.ws.WriteJSON(map[string]any{"id": b.last, "method": method, "params": params})
	b.mu.Unlock()
	require.NoError(t, err)
	select {
	case m := <-answer:
		require.Empty(t, string(m.Error), method)
		if result != nil {
			require.NoError(t, json.Unmarshal(m.Result, result))
		}
	case <-time.After(2 * ceiling):
		t.Fatalf("the browser does not answer %s", method)
	}
}

// evaluate returns what an expression is on the page, as JSON.
func (b *Browser) evaluate(t *testing.T, expression string, value any) {
	t.Helper()
	var result struct {
		Result struct {
			Value json.RawMessage `json:"value"`
		} `json:"result"`
		Exception json.RawMessage `json:"exceptionDetails"`
	}
	b.call(t, "Runtime.evaluate", map[string]any{"expression": expression, "returnByValue": true, "awaitPromise": true}, &result)
	require.Empty(t, string(result.Exception), expression)
	if value != nil {
		require.NoError(t, json.Unmarshal(result.Result.Value, value), expression)
	}
}

// text returns the visible text of the elements that a selector selects, each in a line.
func (b *Browser) text(t *testing.T, selector string) (text string) {
	t.Helper()
	b.evaluate(t, fmt.Sprintf("[...document.querySelectorAll(%q)].map(e => e.innerText).join('\\n')", selector), &text)
	return text
}

// wantText waits until the elements that a selector selects show all of these.
func (b *Browser) wantText(t *testing.T, selector string, parts ...string) {
	t.Helper()
	eventually(t, func() string {
		text := b.text(t, selector)
		for _, part := range parts {
			if !strings.Contains(text, part) {
				return fmt.Sprintf("%s does not show %q, but: %s", selector, part, text)
			}
		}
		return ""
	})
}

// visit goes to a page, of this size, in the light or in the dark.
func (b *Browser) visit(t *testing.T, url string, width, height int, dark bool) {
	t.Helper()
	scheme := map[bool]string{false: "light", true: "dark"}[dark]
	b.call(t, "Emulation.setDeviceMetricsOverride", map[string]any{"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}, nil)
	b.call(t, "Emulation.setEmulatedMedia", map[string]any{"features": []any{map[string]any{"name": "prefers-color-scheme", "value": scheme}}}, nil)
	b.call(t, "Page.navigate", map[string]any{"url": url}, nil)
}

// picture writes what is seen of the page, as much as the window shows, or the whole of it.
func (b *Browser) picture(t *testing.T, path string, whole bool) {
	t.Helper()
	var shot struct {
		Data string `json:"data"`
	}
	b.call(t, "Page.captureScreenshot", map[string]any{"format": "png", "captureBeyondViewport": whole}, &shot)
	png, err := base64.StdEncoding.DecodeString(shot.Data)
	require.NoError(t, err)
	require.NoError(t, os.MkdirAll(filepath.Dir(path), 0o755))
	require.NoError(t, os.WriteFile(path, png, 0o644))
}

// complaints returns what the page has complained of.
func (b *Browser) complaints() []string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return append([]string{}, b.errors...)
}
