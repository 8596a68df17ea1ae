package e2e

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"
)

func collectorProgram(t *testing.T) string {
	t.Helper()
	return program(t, "E2E_COLLECTOR", "otelcol-opampgateway", "collector")
}

// config is a collector's configuration. It is written as JSON, which is YAML.
type config map[string]any

// set sets the value at a path of keys, as in extensions::opampgateway::server::connections.
func (c config) set(path string, value any) {
	keys := strings.Split(path, "::")
	m := map[string]any(c)
	for _, key := range keys[:len(keys)-1] {
		below, ok := m[key].(map[string]any)
		if !ok {
			below = map[string]any{}
			m[key] = below
		}
		m = below
	}
	m[keys[len(keys)-1]] = value
}

// gateway sets a key below extensions::opampgateway.
func (c config) gateway(path string, value any) { c.set("extensions::opampgateway::"+path, value) }

// identity tells the collector from all others.
func (c config) identity(id string) {
	c.set("service::telemetry::resource", map[string]any{"attributes": []any{map[string]any{"name": "service.instance.id", "value": id}}})
}

// metrics has the collector show its own metrics to Prometheus.
func (c config) metrics(t *testing.T, address string) {
	t.Helper()
	host, port, err := net.SplitHostPort(address)
	require.NoError(t, err)
	number, err := strconv.Atoi(port)
	require.NoError(t, err)
	c.set("service::telemetry::metrics", map[string]any{"readers": []any{map[string]any{
		"pull": map[string]any{"exporter": map[string]any{"prometheus": map[string]any{"host": host, "port": number}}},
	}}})
}

func (c config) write(t *testing.T, path string) {
	t.Helper()
	var text bytes.Buffer
	encoder := json.NewEncoder(&text)
	encoder.SetEscapeHTML(false)
	encoder.SetIndent("", "  ")
	require.NoError(t, encoder.Encode(c))
	require.NoError(t, os.WriteFile(path, text.Bytes(), 0o600))
}

// newConfig is a collector with an idle pipeline, and without metrics.
func newConfig() config {
	c := config{}
	c.set("receivers::otlp::protocols::grpc::endpoint", "127.0.0.1:0")
	c.set("exporters::nop", nil)
	c.set("service::pipelines::logs", map[string]any{"receivers": []any{"otlp"}, "exporters": []any{"nop"}})
	c.set("service::telemetry::metrics::level", "none")
	return c
}

// Collector is a running collector.
type Collector struct {
	*Process
	config config
	path   string // of its configuration
}

func startCollector(t *testing.T, name string, c config, args ...string) *Collector {
	t.Helper()
	return startCollectorIn(t, nil, name, c, args...)
}

func startCollectorIn(t *testing.T, environment []string, name string, c config, args ...string) *Collector {
	t.Helper()
	path := filepath.Join(t.TempDir(), "config.yaml")
	c.write(t, path)
	args = append([]string{"--config", path}, args...)
	return &Collector{startProcessIn(t, environment, name, collectorProgram(t), args...), c, path}
}

// wantReady waits until the collector has started, for the nth time.
func (c *Collector) wantReady(t *testing.T, nth int) {
	t.Helper()
	eventually(t, func() string {
		ended := c.ended()
		if starts := len(c.log.with("Everything is ready")); starts < nth {
			require.False(t, ended, "%s has ended after %d starts, want %d", c.name, starts, nth)
			return fmt.Sprintf("%s has started %d times, want %d", c.name, starts, nth)
		}
		return ""
	})
}

// reload tells the collector to take up a changed configuration.
func (c *Collector) reload(t *testing.T, edit func(config)) {
	t.Helper()
	edit(c.config)
	c.config.write(t, c.path)
	c.Signal(t, syscall.SIGHUP)
}

// Gateway is a collector with the gateway extension.
type Gateway struct {
	*Collector
	address string
	scheme  string
}

// gatewayConfig is a gateway in front of the server at url. It has a name that its tests know.
func gatewayConfig(url, listen string) config {
	c := newConfig()
	c.identity(gatewayName)
	c.set("service::extensions", []any{"opampgateway"})
	c.gateway("server::endpoint", url)
	c.gateway("listener::endpoint", listen)
	return c
}

// gatewayName is the identity of most gateways, with which the names of their links begin.
const gatewayName = "gateway"

// allowGateways has a gateway let other gateways connect to it.
func allowGateways(c config) { c.gateway("agents::allow_gateways", true) }

// startGateway starts a gateway in front of the server at url and waits until it serves.
func startGateway(t *testing.T, url string, edits ...func(config)) *Gateway {
	t.Helper()
	g := launchGateway(t, "gateway", gatewayConfig(url, freeAddress(t)), edits...)
	g.wantReady(t, 1)
	return g
}

func launchGateway(t *testing.T, name string, c config, edits ...func(config)) *Gateway {
	t.Helper()
	return launchGatewayIn(t, nil, name, c, edits...)
}

// launchGatewayIn is launchGateway with more in the collector's environment.
func launchGatewayIn(t *testing.T, environment []string, name string, c config, edits ...func(config)) *Gateway {
	t.Helper()
	for _, edit := range edits {
		edit(c)
	}
	listener := c["extensions"].(map[string]any)["opampgateway"].(map[string]any)["listener"].(map[string]any)
	g := &Gateway{address: listener["endpoint"].(string), scheme: "ws"}
	if listener["tls"] != nil {
		g.scheme = "wss"
	}
	g.Collector = startCollectorIn(t, environment, name, c)
	return g
}

// wantLinks waits until the gateway has connected n links since it was started. Until then new
// agents cannot be spread evenly; the server sees a link a moment before the gateway does.
func (g *Gateway) wantLinks(t *testing.T, n int) {
	t.Helper()
	eventually(t, func() string {
		if up := len(g.log.with("connected to the server")); up != n {
			return fmt.Sprintf("%s has connected %d links, want %d", g.name, up, n)
		}
		return ""
	})
}

func (g *Gateway) url() string { return g.scheme + "://" + g.address + "/v1/opamp" }

// agentConfig is a collector with opampextension: an agent of the server, or gateway, at url.
func agentConfig(url string, uid uuid.UUID) config {
	c := newConfig()
	c.set("service::extensions", []any{"opamp"})
	c.set("extensions::opamp::instance_uid", uid.String())
	c.set("extensions::opamp::server::ws::endpoint", url)
	return c
}

// startSupervisor starts a supervisor that manages a collector.
//
// At its start it asks the collector for its feature gates, and v0.158.0 closes the pipe now
// and then before it has read the answer. It then takes the collector for an old one that
// needs a pipeline, tries one with the nop receiver, which ours has not, and gives up. Its
// service manager would start it again, and so do we.
func startSupervisor(t *testing.T, url string, uid uuid.UUID, edits ...func(config)) *Process {
	t.Helper()
	dir := t.TempDir()
	path := filepath.Join(dir, "supervisor.yaml")
	c := config{
		"server": map[string]any{"endpoint": url},
		"capabilities": map[string]any{
			"accepts_remote_config": true, "reports_remote_config": true, "reports_effective_config": true, "reports_health": true,
			"reports_own_metrics": false,
		},
		"storage": map[string]any{"directory": filepath.Join(dir, "storage")},
		"agent": map[string]any{
			"executable": collectorProgram(t), "instance_id": uid.String(),
			"bootstrap_timeout": "8s", "orphan_detection_interval": "1s", "validate_config": true, "passthrough_logs": true,
			// Somebody else here may have the port that a collector shows its metrics on by default.
			"args": []any{"--set=service::telemetry::metrics::level=none"},
		},
	}
	for _, edit := range edits {
		edit(c)
	}
	c.write(t, path)
	supervisor := program(t, "E2E_SUPERVISOR", "opampsupervisor", "opampsupervisor")
	for range 5 {
		p := startProcess(t, "supervisor", supervisor, "--config", path)
		eventually(t, func() string {
			if p.ended() || len(p.log.with("Supervisor starting")) > 0 {
				return ""
			}
			return "the supervisor has neither started nor given up"
		})
		if !p.ended() {
			return p
		}
	}
	t.Fatal("the supervisor does not start")
	return nil
}

// get fetches a page of the collector's.
func get(t *testing.T, url string) (status int, body string) {
	t.Helper()
	resp, err := http.Get(url)
	if err != nil {
		return 0, err.Error()
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	require.NoError(t, err)
	return resp.StatusCode, string(text)
}

// samples reads what the collector shows to Prometheus: values by name with labels, such as
// otelcol_opampgateway_connections{direction="upstream"}.
func samples(t *testing.T, address string) map[string]float64 {
	t.Helper()
	values := map[string]float64{}
	_, body := get(t, "http://"+address+"/metrics")
	for line := range strings.Lines(body) {
		line = strings.TrimSpace(line)
		space := strings.LastIndex(line, " ")
		if space < 0 || strings.HasPrefix(line, "#") {
			continue
		}
		if value, err := strconv.ParseFloat(line[space+1:], 64); err == nil {
			values[line[:space]] = value
		}
	}
	return values
}

// wantSamples waits until the collector shows these values.
func wantSamples(t *testing.T, address string, want map[string]float64) {
	t.Helper()
	eventually(t, func() string {
		got := samples(t, address)
		for name, value := range want {
			if have, ok := got[name]; !ok || have != value {
				return fmt.Sprintf("metrics: %s is %v (shown: %v), want %v; all: %v", name, have, ok, value, got)
			}
		}
		return ""
	})
}
