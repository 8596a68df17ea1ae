package e2e

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/gorilla/websocket"
	"github.com/open-telemetry/opamp-go/protobufs"
	"github.com/stretchr/testify/require"

	"github.com/opampgateway/opampgateway/e2e/fault"
)

// statusShown is what a test wants to know of /api/v1/status.
type statusShown struct {
	Gateway struct {
		State        string `json:"state"`
		Agents       int    `json:"agents"`
		InstanceUIDs int    `json:"instance_uids"`
		LinksUp      int    `json:"links_up"`
	} `json:"gateway"`
	Problems []string `json:"problems"`
	Links    []struct {
		Name      string `json:"name"`
		State     string `json:"state"`
		Agents    int    `json:"agents"`
		LastError string `json:"last_error"`
		Rate      struct {
			Up   float64 `json:"messages_up"`
			Down float64 `json:"messages_down"`
		} `json:"rate"`
		Ping *float64 `json:"ping_seconds"`
	} `json:"links"`
	Offenders []struct {
		Kind string `json:"kind"`
		UID  string `json:"instance_uid"`
	} `json:"offenders"`
	Suspects []struct {
		State string `json:"state"`
		UID   string `json:"instance_uid"`
	} `json:"suspects"`
	Ended []struct {
		Kind string `json:"kind"`
		Name string `json:"name"`
		Why  string `json:"why"`
	} `json:"ended"`
	Faults []struct {
		Name  string `json:"name"`
		Count int    `json:"count"`
	} `json:"faults"`
}

// statusAgents is what a test wants to know of /api/v1/agents.
type statusAgents struct {
	Total    int `json:"total"`
	Matching int `json:"matching"`
	Agents   []struct {
		UID        string `json:"instance_uid"`
		AgentID    string `json:"agent_id"`
		UserAgent  string `json:"user_agent"`
		Link       string `json:"link"`
		MessagesUp int    `json:"messages_up"`
		Faults     int    `json:"faults"`
		LastFault  string `json:"last_fault"`
	} `json:"agents"`
}

// withStatus gives a gateway a status page.
func withStatus(t *testing.T) (page string, edit func(config)) {
	t.Helper()
	address := freeAddress(t)
	return "http://" + address, func(c config) { c.gateway("status::endpoint", address) }
}

func getJSON(t *testing.T, address string, into any) {
	t.Helper()
	code, body := get(t, address)
	require.Equal(t, http.StatusOK, code, body)
	require.NoError(t, json.Unmarshal([]byte(body), into), body)
}

// wantOffender waits until somebody is shown as named.
func wantOffender(t *testing.T, page, kind string, uid uuid.UUID) {
	t.Helper()
	eventually(t, func() string {
		var s statusShown
		getJSON(t, page+"/api/v1/status", &s)
		for _, o := range s.Offenders {
			if o.Kind == kind && o.UID == uid.String() {
				return ""
			}
		}
		return fmt.Sprintf("%s is not shown as one who %s: %v", uid, kind, s.Offenders)
	})
}

// What is shown is what is true: of a fleet of which one floods, one says what the server ends links at, one takes
// another's instance UID, and one leaves; and of a server that goes away.
func TestStatus(t *testing.T) {
	t.Parallel()
	var p pace
	server := startFleetServer(t, fleetServerOptions{echoes: true, heeds: func(uid uuid.UUID, m *protobufs.AgentToServer, size int) (does response) {
		if m.GetEffectiveConfig() != nil {
			does.end = closeWith(websocket.CloseInvalidFramePayloadData)
			return does
		}
		return p.heeds(uid, m, size)
	}})
	page, showStatus := withStatus(t)
	metrics, showMetrics := withMetrics(t)
	gateway := startGateway(t, server.url(), showStatus, showMetrics)
	gateway.wantLinks(t, 3)
	fleet := startFleetOf(t, 60, gateway.url(), 100, fleetOptions{userAgents: []string{"collector/1.2.3"}})
	fleet.wantConnected(t, ceiling, 1)
	server.wantKnown(t, fleet.agents, ceiling)

	var s statusShown
	getJSON(t, page+"/api/v1/status", &s)
	require.Equal(t, "ok", s.Gateway.State)
	require.Empty(t, s.Problems)
	require.Equal(t, 60, s.Gateway.Agents)
	require.Equal(t, 60, s.Gateway.InstanceUIDs)
	require.Len(t, s.Links, 3)
	open := server.open()
	for _, l := range open {
		for _, shown := range s.Links {
			if shown.Name == gatewayName+"/"+l.name {
				require.Equal(t, "connected", shown.State)
				require.Equal(t, len(server.at(l, fleet.agents)), shown.Agents, l.name)
				require.NotNil(t, shown.Ping)
			}
		}
	}
	for _, a := range fleet.agents[:10] {
		var found statusAgents
		getJSON(t, page+"/api/v1/agents?q="+a.uid.String(), &found)
		require.Equal(t, 1, found.Matching)
		require.Equal(t, a.uid.String(), found.Agents[0].UID)
		require.Equal(t, a.uid.String(), found.Agents[0].AgentID)
		require.Equal(t, "collector/1.2.3", found.Agents[0].UserAgent)
		require.Equal(t, gatewayName+"/"+server.record(a).link.name, found.Agents[0].Link)
		require.EqualValues(t, a.number.Load(), found.Agents[0].MessagesUp)
	}

	p.each.Store(int64(2 * time.Millisecond))
	flooders := floodingFleet(t, 1, server, gateway)
	stopFlood := flooders.flood(t)
	wantOffender(t, page, "floods", flooders.agents[0].uid)
	stopFlood()
	p.each.Store(0)

	mallory := connectRaw(t, gateway.url(), http.Header{"Authorization": {"Secret-Key mallory"}, "Agent-Id": {uuid.NewString()}})
	mallory.uid = fleet.agents[0].uid
	mallory.send(t, &protobufs.AgentToServer{})
	wantOffender(t, page, "uid_taken", fleet.agents[0].uid)

	poisoning := startFleetOf(t, 1, gateway.url(), 1, fleetOptions{state: configOf(1000)})
	wantOffender(t, page, "ends_links", poisoning.agents[0].uid)
	getJSON(t, page+"/api/v1/status", &s)
	require.NotEmpty(t, s.Suspects)
	require.Equal(t, "turned_down", s.Suspects[0].State, "the latest first")
	require.Equal(t, poisoning.agents[0].uid.String(), s.Suspects[0].UID)
	var worst statusAgents
	getJSON(t, page+"/api/v1/agents?per=3", &worst)
	require.Equal(t, 63, worst.Total)
	for _, a := range worst.Agents {
		require.NotZero(t, a.Faults, "those with faults come first")
	}

	server.stop()
	eventually(t, func() string {
		var s statusShown
		getJSON(t, page+"/api/v1/status", &s)
		if s.Gateway.State != "down" || len(s.Problems) != 4 || s.Links[0].LastError == "" {
			return fmt.Sprintf("it is not shown that the server has gone: %+v", s)
		}
		return ""
	})
	server.start(t)
	eventually(t, func() string {
		var s statusShown
		getJSON(t, page+"/api/v1/status", &s)
		if s.Gateway.State != "ok" || s.Gateway.LinksUp != 3 {
			return "it is not shown that the server is back"
		}
		return ""
	})
	eventually(t, func() string { // what the metrics say
		getJSON(t, page+"/api/v1/status", &s)
		for _, f := range s.Faults {
			if n := faults(t, metrics, f.Name); n != f.Count {
				return fmt.Sprintf("%s: %d shown, %d counted", f.Name, f.Count, n)
			}
		}
		return ""
	})
}

// The page in a browser: it shows what is true, follows a lost link by itself, and complains of nothing.
func TestStatusInBrowser(t *testing.T) {
	t.Parallel()
	server, line, gateway, page := statusBehindLine(t)
	b := startBrowser(t)
	fleet := startFleetOf(t, 120, gateway.url(), 100, fleetOptions{userAgents: []string{"collector/1.2.3", "bindplane-agent/1.90"}})
	fleet.wantConnected(t, ceiling, 1)
	server.wantKnown(t, fleet.agents, ceiling)
	b.visit(t, page, 1400, 900, false)
	b.wantText(t, "#state", "ok")
	b.wantText(t, "#found", "1–25 of 120")
	b.wantText(t, "#links", "gateway/upstream-0", "gateway/upstream-2", "connected")
	require.NotContains(t, b.text(t, "#links"), "connecting")
	require.Empty(t, b.text(t, "#problems"))

	// Search, sort and pages.
	wanted := fleet.agents[77].uid.String()
	b.evaluate(t, fmt.Sprintf("(() => { const s = document.getElementById('search'); s.value = %q; s.dispatchEvent(new Event('input')); })()", wanted), nil)
	b.wantText(t, "#found", "1–1 of 1 found, 120 in all")
	b.wantText(t, "#agents tbody", wanted)
	b.evaluate(t, "(() => { const s = document.getElementById('search'); s.value = ''; s.dispatchEvent(new Event('input')); })()", nil)
	b.wantText(t, "#found", "1–25 of 120")
	b.evaluate(t, "document.querySelector('th[data-sort=instance_uid] button').click()", nil)
	eventually(t, func() string {
		var sorted string
		b.evaluate(t, "document.querySelector('th[data-sort=instance_uid]').getAttribute('aria-sort') || ''", &sorted)
		if sorted != "ascending" {
			return "agents are not sorted, but " + sorted
		}
		return ""
	})
	b.evaluate(t, "document.getElementById('next').click()", nil)
	b.wantText(t, "#found", "26–50 of 120")
	require.Less(t, "0", strings.Fields(b.text(t, "#agents tbody tr:first-child td:first-child"))[0])

	// A link is lost, and cannot come back.
	line.Refuse(true)
	lost := server.open()[0]
	drops[0].drop(t, lineOf(t, line, lost), lost)
	b.wantText(t, "#state", "degraded")
	b.wantText(t, "#problems", "link gateway/"+lost.name+" has been connecting for")
	b.wantText(t, "#links", "connecting")
	b.wantText(t, "#ended", "link_lost")
	line.Refuse(false)
	b.wantText(t, "#state", "ok")
	b.wantText(t, "#found", "26–50 of 120")

	// What agents say of themselves is text.
	bad := connectRaw(t, gateway.url(), http.Header{"User-Agent": {"<img src=x onerror=console.error(1)>"}, "Agent-Id": {uuid.NewString()}})
	bad.send(t, &protobufs.AgentToServer{})
	b.evaluate(t, "(() => { const s = document.getElementById('search'); s.value = 'onerror'; s.dispatchEvent(new Event('input')); })()", nil)
	b.wantText(t, "#agents tbody", "<img src=x onerror=console.error(1)>")

	// Who has the server end links is named, and shown as turned down for a while.
	poisoning := startFleetOf(t, 1, gateway.url(), 1, fleetOptions{state: configOf(1000)})
	b.wantText(t, "#suspects", poisoning.agents[0].uid.String(), "turned down")
	b.wantText(t, "#offenders", poisoning.agents[0].uid.String(), "ends links")

	// It is readable on a phone: nothing is wider than that.
	b.visit(t, page, 400, 800, true)
	b.wantText(t, "#found", "of 122")
	var width int
	b.evaluate(t, "document.documentElement.scrollWidth", &width)
	require.LessOrEqual(t, width, 400)
	require.Empty(t, b.complaints())

	// Nobody asks while it is not looked at.
	b.evaluate(t, "document.getElementById('pause').click()", nil)
	b.wantText(t, "#fresh", "as of")
	asked := 0
	b.evaluate(t, "performance.getEntriesByType('resource').length", &asked)
	throughout(t, 5*time.Second, func() string {
		now := 0
		b.evaluate(t, "performance.getEntriesByType('resource').length", &now)
		if now != asked {
			return "it asks while it is paused"
		}
		return ""
	})
}

// Other origins cannot read what is shown, whatever a browser is made to ask.
func TestStatusInOtherOrigins(t *testing.T) {
	t.Parallel()
	server := startFleetServer(t, fleetServerOptions{})
	page, showStatus := withStatus(t)
	startGateway(t, server.url(), showStatus)
	u, err := url.Parse(page)
	require.NoError(t, err)
	for _, test := range []struct {
		method, path, host string
		header, value      string
		want               int
	}{
		{method: "GET", path: "/", want: 200},
		{method: "HEAD", path: "/api/v1/status", want: 200},
		{method: "GET", path: "/api/v1/status", header: "Origin", value: "http://evil.example", want: 403},
		{method: "GET", path: "/api/v1/agents", header: "Sec-Fetch-Site", value: "cross-site", want: 403},
		{method: "GET", path: "/api/v1/status", host: "evil.example:" + u.Port(), want: 403},
		{method: "GET", path: "/", host: "evil.example", want: 403},
		{method: "GET", path: "/", host: "localhost:" + u.Port(), want: 200},
		{method: "POST", path: "/api/v1/status", want: 405},
		{method: "OPTIONS", path: "/api/v1/status", header: "Origin", value: "http://evil.example", want: 405},
	} {
		request, err := http.NewRequest(test.method, page+test.path, nil)
		require.NoError(t, err)
		request.Host = test.host
		if test.header != "" {
			request.Header.Set(test.header, test.value)
		}
		resp, err := http.DefaultClient.Do(request)
		require.NoError(t, err)
		resp.Body.Close()
		require.Equal(t, test.want, resp.StatusCode, "%+v", test)
		require.Contains(t, resp.Header.Get("Content-Security-Policy"), "default-src 'none'")
		require.Empty(t, resp.Header.Get("Access-Control-Allow-Origin"))
	}
}

// TestScreenshots makes the pictures of the documentation: make screenshots.
func TestScreenshots(t *testing.T) {
	dir := os.Getenv("SCREENSHOTS")
	if dir == "" {
		t.Skip("make screenshots")
	}
	server, line, gateway, page := statusBehindLine(t)
	b := startBrowser(t)
	names := []string{"opamp-go/0.23.0 bindplane-agent/1.90.2", "otelcol-contrib/0.158.0 (linux/amd64)", "otelcol-opampgateway/0.1.0 (linux/arm64)", "opampsupervisor/0.158.0"}
	fleet := startFleetOf(t, 300, gateway.url(), 100, fleetOptions{userAgents: names})
	fleet.wantConnected(t, ceiling, 1)
	server.wantKnown(t, fleet.agents, ceiling)
	fleet.talk(t, 400*time.Millisecond)

	mallory := connectRaw(t, gateway.url(), http.Header{"Authorization": {"Secret-Key mallory"}, "Agent-Id": {uuid.NewString()}})
	mallory.uid = fleet.agents[0].uid
	mallory.send(t, &protobufs.AgentToServer{})
	poisoning := startFleetOf(t, 1, gateway.url(), 1, fleetOptions{state: configOf(200_000), userAgents: names})
	wantOffender(t, page, "ends_links", poisoning.agents[0].uid)
	throughout(t, 90*time.Second, func() string { return "" }) // charts have something to show
	b.visit(t, page, 1440, 1000, false)
	b.wantText(t, "#state", "ok")
	b.wantText(t, "#found", "of 302")
	throughout(t, time.Second, func() string { return "" })
	b.picture(t, filepath.Join(dir, "status-light.png"), false)
	b.visit(t, page, 400, 860, false)
	b.wantText(t, "#found", "of 302")
	b.picture(t, filepath.Join(dir, "status-phone.png"), false)

	line.Refuse(true)
	lost := server.open()[1]
	drops[0].drop(t, lineOf(t, line, lost), lost)
	b.visit(t, page, 1440, 1000, true)
	b.wantText(t, "#state", "degraded")
	throughout(t, time.Second, func() string { return "" })
	b.picture(t, filepath.Join(dir, "status-dark.png"), false)
	b.visit(t, page, 400, 860, true)
	b.wantText(t, "#state", "degraded")
	b.evaluate(t, "document.getElementById('h-agents').scrollIntoView()", nil)
	b.wantText(t, "#found", "of 302")
	b.picture(t, filepath.Join(dir, "status-phone-dark.png"), false)
	line.Refuse(false)

	const many = 15_000
	rest := startFleetOf(t, many-302, gateway.url(), 100, fleetOptions{userAgents: names})
	rest.wantConnected(t, 2*time.Minute, 1)
	b.visit(t, page, 1440, 1000, false)
	b.wantText(t, "#found", "of 15,000")
	cost(t, gateway, page)
	b.picture(t, filepath.Join(dir, "status-15000.png"), false)
	require.Empty(t, b.complaints())
}

// cost tells how long answers take with as many agents as there are.
func cost(t *testing.T, _ *Gateway, page string) {
	t.Helper()
	for _, path := range []string{"/api/v1/status", "/api/v1/agents", "/api/v1/agents?sort=instance_uid", "/api/v1/agents?q=bindplane&sort=bytes_up", "/api/v1/agents?sort=address&page=250"} {
		worst, sum := time.Duration(0), time.Duration(0)
		for range 20 {
			begin := time.Now()
			code, _ := get(t, page+path)
			require.Equal(t, http.StatusOK, code)
			took := time.Since(begin)
			worst, sum = max(worst, took), sum+took
		}
		t.Logf("%s: %s on average, %s at worst", path, (sum / 20).Round(10*time.Microsecond), worst.Round(10*time.Microsecond))
	}
}

// statusBehindLine starts a gateway with a status page behind a line to a server that ends links at configurations.
func statusBehindLine(t *testing.T) (server *FleetServer, line *fault.Line, gateway *Gateway, page string) {
	t.Helper()
	page, showStatus := withStatus(t)
	server, line, gateway = behindLine(t, fleetServerOptions{echoes: true, heeds: func(_ uuid.UUID, m *protobufs.AgentToServer, _ int) (does response) {
		if m.GetEffectiveConfig() != nil {
			does.end = closeWith(websocket.CloseInvalidFramePayloadData)
		}
		return does
	}}, showStatus)
	return server, line, gateway, page
}
