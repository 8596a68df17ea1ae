package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"io/fs"
	"maps"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/open-telemetry/opamp-go/protobufs"
	"github.com/stretchr/testify/require"
	"go.yaml.in/yaml/v3"
)

// What operators are given in deploy/ and docs/ holds together: each alert names an entry of
// docs/operations.md that exists and names it, each reason and outcome has an entry, and each line of
// the log that is quoted there is one that the gateway logs.
func TestOperationsPage(t *testing.T) {
	t.Parallel()
	page := readText(t, "../docs/operations.md")
	entries := map[string]string{} // by the anchor that a browser goes to
	for _, entry := range strings.Split(page, "\n## ")[1:] {
		heading, _, _ := strings.Cut(entry, "\n")
		entries[anchorOf(heading)] = entry
	}

	rules := alertRules(t)
	for name, rule := range rules {
		_, anchor, found := strings.Cut(rule.Annotations["runbook_url"], "/docs/operations.md#")
		require.True(t, found, "the runbook of %s", name)
		require.Contains(t, entries, anchor, "the entry for %s", name)
		require.Contains(t, entries[anchor], "`"+name+"`", "the entry for %s names it", name)
		require.NotEmpty(t, rule.Annotations["summary"], name)
		require.NotEmpty(t, rule.Annotations["description"], name)
		require.Contains(t, []string{"critical", "warning", "info"}, rule.Labels["severity"], name)
	}
	for _, name := range regexp.MustCompile("`OpAMPGateway[A-Za-z]*`").FindAllString(page, -1) {
		require.Contains(t, rules, strings.Trim(name, "`"), "an alert that docs/operations.md names")
	}

	for _, link := range regexp.MustCompile(`\]\(#([^)]*)\)`).FindAllStringSubmatch(page, -1) {
		require.Contains(t, entries, link[1], "where a link on the page leads")
	}
	for _, table := range []string{"outcomes", "reasons"} {
		for _, name := range namesOf(t, table) {
			row := regexp.MustCompile("(?m)^\\|.*`" + name + "`.*\\|$").FindString(entries["every-reason-and-outcome"])
			require.NotEmpty(t, row, "the row of %s in the last table", name)
			if anchor := regexp.MustCompile(`\(#(.*)\)`).FindStringSubmatch(row); anchor != nil {
				require.Contains(t, entries[anchor[1]], name, "the entry of %s has it", name)
			} else {
				require.Equal(t, "accepted", name, "what needs no entry")
			}
		}
	}

	source := sources(t)
	quoted := 0
	for line := range strings.Lines(page) {
		cells := strings.Split(line, "|")
		switch {
		case strings.HasPrefix(line, "- **Log** "):
		case strings.HasPrefix(line, "|") && len(cells) == 6: // the second column is what the log says
			line = cells[2]
		default:
			continue
		}
		for _, quote := range regexp.MustCompile("`([^`]* [^`]*)`").FindAllStringSubmatch(line, -1) {
			require.True(t, strings.Contains(source, strings.TrimSpace(quote[1])), //nolint:testifylint // it would show all of it
				"a line of the log that docs/operations.md quotes, and nobody logs: %s", quote[1])
			quoted++
		}
	}
	require.Greater(t, quoted, 15, "lines of the log quoted")
}

// The alerts fire when they should, and not otherwise, and each does in some case.
func TestAlertRules(t *testing.T) {
	t.Parallel()
	p := startProcess(t, "promtool", program(t, "E2E_PROMTOOL", "prometheus/promtool", "prometheus"),
		"test", "rules", "../deploy/prometheus/alerts_test.yaml")
	code, _ := p.wantExit(t)
	require.Zero(t, code, p.log.String())
	cases := readText(t, "../deploy/prometheus/alerts_test.yaml")
	for name := range alertRules(t) {
		require.Contains(t, cases, `{alertname="`+name+`"}`, "a case in which %s fires", name)
	}
}

// A real Prometheus scrapes a gateway with agents and a fault: every query of the dashboard shows
// something, every rule can be evaluated and is about series that exist, and who is on call hears of
// the fault.
func TestDashboard(t *testing.T) {
	t.Parallel()
	server := startServer(t, serverOptions{judge: onlyWithKey})
	metrics := freeAddress(t)
	gateway := startGateway(t, server.url(), func(c config) { c.metrics(t, metrics) })
	gateway.wantLinks(t, 3)
	prometheus := startPrometheus(t, metrics)
	prometheus.wantSeries(t, `otelcol_opampgateway_faults{reason="server_no_uid"}`) // as 0, before it happens

	agents := startAgents(t, 5, gateway.url(), agentOptions{headers: key("right")})
	stop := make(chan struct{})
	var talking sync.WaitGroup
	t.Cleanup(func() {
		close(stop)
		talking.Wait()
	})
	for _, a := range agents {
		server.wantAgent(t, a.id(), "is connected", isConnected)
		talking.Go(func() { a.chatUntil(stop) })
	}
	for range 3 {
		_, _, err := dialRaw(gateway.url(), key("wrong"), nil)
		require.Error(t, err)
	}
	require.NoError(t, server.known(agents[0].id()).conn.Send(context.Background(),
		&protobufs.ServerToAgent{RemoteConfig: &protobufs.AgentRemoteConfig{ConfigHash: []byte("for whom?")}}))
	gateway.wantLog(t, "warn", "server sends messages without instance_uid")

	t.Run("the fault is told", func(t *testing.T) {
		prometheus.wantSeries(t, `ALERTS{alertname="OpAMPGatewayPushesWithoutUID", alertstate="firing", severity="critical"}`)
		require.Empty(t, prometheus.query(t, `ALERTS{alertname!~"OpAMPGatewayPushesWithoutUID"}`), "other alerts")
	})

	t.Run("rules", func(t *testing.T) {
		var answer struct {
			Groups []struct {
				Rules []struct{ Name, Health, LastError string }
			}
		}
		prometheus.get(t, "/api/v1/rules", nil, &answer)
		evaluated := []string{}
		for _, rule := range answer.Groups[0].Rules {
			require.Equal(t, "ok", rule.Health, "%s: %s", rule.Name, rule.LastError)
			evaluated = append(evaluated, rule.Name)
		}
		rules := alertRules(t)
		require.ElementsMatch(t, slices.Collect(maps.Keys(rules)), evaluated)
		for name, rule := range rules {
			for _, selector := range selectors(rule.Expr) {
				wantEach(t, prometheus, name, selector)
			}
		}
	})

	t.Run("dashboard", func(t *testing.T) {
		for panel, queries := range dashboardQueries(t) {
			for _, query := range queries {
				query = strings.NewReplacer("$__rate_interval", "1m", "$job", "opampgateway|other", "$instance", ".*").Replace(query)
				require.NotContains(t, query, "$", "a variable that this test does not know, in %s", panel)
				prometheus.wantSeries(t, query)
				for _, selector := range selectors(query) {
					wantEach(t, prometheus, panel, selector)
				}
			}
		}
	})
}

// wantEach checks that a selector of series finds some, and if it is one for several values of a label
// (a|b), some with each: a name that is misspelled would just never be seen.
func wantEach(t *testing.T, p *Prometheus, where, selector string) {
	t.Helper()
	require.NotEmpty(t, p.query(t, selector), "%s: %s finds nothing", where, selector)
	for _, list := range regexp.MustCompile(`(outcome|reason)=~"([a-z_|]*)"`).FindAllStringSubmatch(selector, -1) {
		for value := range strings.SplitSeq(list[2], "|") {
			one := strings.Replace(selector, list[0], fmt.Sprintf("%s=%q", list[1], value), 1)
			require.NotEmpty(t, p.query(t, one), "%s: %s finds nothing", where, one)
		}
	}
}

// selectors returns the selectors of series in an expression, each with its labels.
func selectors(expression string) []string {
	return regexp.MustCompile(`\b(otelcol_[a-z_]+|up)(\{[^}]*\})?`).FindAllString(expression, -1)
}

type alertRule struct {
	Alert, Expr         string
	Labels, Annotations map[string]string
	For                 string
}

// alertRules returns the rules of deploy/ by name.
func alertRules(t *testing.T) map[string]alertRule {
	t.Helper()
	var file struct {
		Groups []struct{ Rules []alertRule }
	}
	require.NoError(t, yaml.Unmarshal([]byte(readText(t, "../deploy/prometheus/alerts.yaml")), &file))
	rules := map[string]alertRule{}
	for _, rule := range file.Groups[0].Rules {
		require.NotContains(t, rules, rule.Alert)
		rules[rule.Alert] = rule
	}
	require.NotEmpty(t, rules)
	return rules
}

// dashboardQueries returns the queries of each panel of the dashboard of deploy/.
func dashboardQueries(t *testing.T) map[string][]string {
	t.Helper()
	var dashboard struct {
		Panels []struct {
			Title, Type string
			Targets     []struct{ Expr string }
		}
	}
	require.NoError(t, json.Unmarshal([]byte(readText(t, "../deploy/grafana/opampgateway.json")), &dashboard))
	queries := map[string][]string{}
	for _, panel := range dashboard.Panels {
		for _, target := range panel.Targets {
			queries[panel.Title] = append(queries[panel.Title], target.Expr)
		}
		if panel.Type != "row" {
			require.NotEmpty(t, queries[panel.Title], "queries of %s", panel.Title)
		}
	}
	require.NotEmpty(t, queries)
	return queries
}

// Prometheus is a Prometheus that scrapes a gateway each second, with the alerts of deploy/.
type Prometheus struct {
	*Process
	address string
}

func startPrometheus(t *testing.T, targets ...string) *Prometheus {
	t.Helper()
	dir := t.TempDir()
	rules, err := filepath.Abs("../deploy/prometheus/alerts.yaml")
	require.NoError(t, err)
	path := filepath.Join(dir, "prometheus.yaml")
	config{
		"global":     map[string]any{"scrape_interval": "1s", "evaluation_interval": "1s"},
		"rule_files": []string{rules},
		"scrape_configs": []any{map[string]any{
			"job_name": "opampgateway", "static_configs": []any{map[string]any{"targets": targets}},
		}},
	}.write(t, path)
	p := &Prometheus{address: freeAddress(t)}
	p.Process = startProcess(t, "prometheus", program(t, "E2E_PROMETHEUS", "prometheus/prometheus", "prometheus"),
		"--config.file="+path, "--storage.tsdb.path="+filepath.Join(dir, "data"), "--web.listen-address="+p.address)
	p.wantLog(t, "Server is ready to receive web requests")
	return p
}

// get asks Prometheus for data.
func (p *Prometheus) get(t *testing.T, path string, form url.Values, data any) {
	t.Helper()
	code, body := get(t, "http://"+p.address+path+"?"+form.Encode())
	require.Equal(t, http.StatusOK, code, "%s of %v: %s", path, form, body)
	answer := struct {
		Status string
		Data   any
	}{Data: data}
	require.NoError(t, json.Unmarshal([]byte(body), &answer), body)
	require.Equal(t, "success", answer.Status, body)
}

// query returns the series that an expression has now.
func (p *Prometheus) query(t *testing.T, expression string) []json.RawMessage {
	t.Helper()
	var data struct{ Result []json.RawMessage }
	p.get(t, "/api/v1/query", url.Values{"query": {expression}}, &data)
	return data.Result
}

func (p *Prometheus) wantSeries(t *testing.T, expression string) {
	t.Helper()
	eventually(t, func() string {
		if series := p.query(t, expression); len(series) > 0 && !strings.Contains(string(series[0]), `"NaN"`) {
			return ""
		}
		return "nothing in Prometheus for " + expression
	})
}

// readText returns a file of the project.
func readText(t *testing.T, path string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.FromSlash(path))
	require.NoError(t, err)
	return string(text)
}

// sources returns all code of the gateway, with texts that are written in pieces put together.
func sources(t *testing.T) string {
	t.Helper()
	var all strings.Builder
	root := os.DirFS("..")
	for _, pattern := range []string{"*.go", "internal/*/*.go"} {
		files, err := fs.Glob(root, pattern)
		require.NoError(t, err)
		for _, file := range files {
			if !strings.HasSuffix(file, "_test.go") {
				all.WriteString(readText(t, "../"+file))
			}
		}
	}
	return regexp.MustCompile(`"\s*\+\s*"`).ReplaceAllString(all.String(), "")
}

// namesOf returns the first column of a table of docs/metrics.md that is made from the code.
func namesOf(t *testing.T, table string) (names []string) {
	t.Helper()
	_, text, found := strings.Cut(readText(t, "../docs/metrics.md"), "<!-- "+table+": made by make generate -->")
	require.True(t, found, "docs/metrics.md has a table of %s", table)
	text, _, _ = strings.Cut(text, "<!-- end of")
	for _, row := range regexp.MustCompile("(?m)^\\| `([a-z_]+)` \\|").FindAllStringSubmatch(text, -1) {
		names = append(names, row[1])
	}
	require.NotEmpty(t, names)
	return names
}

// anchorOf is what a browser shows of a page's heading in its URL.
func anchorOf(heading string) string {
	return strings.Map(func(r rune) rune {
		switch {
		case r >= 'a' && r <= 'z', r >= '0' && r <= '9', r == '-', r == '_':
			return r
		case r == ' ':
			return '-'
		}
		return -1
	}, strings.ToLower(heading))
}
