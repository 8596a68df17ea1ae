package e2e

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"testing"

	"github.com/gorilla/websocket"
	"github.com/open-telemetry/opamp-go/protobufs"
	"github.com/stretchr/testify/require"
)

// The numbers that the collector shows to Prometheus are right, to the byte.
func TestMetrics(t *testing.T) {
	t.Parallel()
	server := startServer(t, serverOptions{judge: onlyWithKey})
	metrics := freeAddress(t)
	gateway := startGateway(t, server.url(), func(c config) { c.metrics(t, metrics) })
	server.wantLinks(t, upstream(3)...)

	const agents, each = 7, 3
	up := 0
	crowd := make([]*rawAgent, agents)
	for i := range crowd {
		crowd[i] = connectRaw(t, gateway.url(), key("right"))
		for n := range each {
			up += crowd[i].send(t, &protobufs.AgentToServer{SequenceNum: uint64(n), Capabilities: 1})
		}
	}
	_, _, err := dialRaw(gateway.url(), key("wrong"), nil)
	require.Error(t, err)
	down := 0
	for _, a := range crowd {
		eventually(t, func() string {
			a.mu.Lock()
			defer a.mu.Unlock()
			if replies := len(a.messages) - 1; replies != each {
				return fmt.Sprintf("an agent has %d replies, and the server's capabilities from the gateway itself; want %d", replies, each)
			}
			return ""
		})
		down += a.bytes - a.own
	}
	wantSamples(t, metrics, map[string]float64{
		`otelcol_opampgateway_connections{direction="upstream"}`:      3,
		`otelcol_opampgateway_connections{direction="downstream"}`:    agents,
		`otelcol_opampgateway_messages{direction="upstream"}`:         agents * each,
		`otelcol_opampgateway_messages{direction="downstream"}`:       agents * each,
		`otelcol_opampgateway_messages_bytes{direction="upstream"}`:   float64(up),
		`otelcol_opampgateway_messages_bytes{direction="downstream"}`: float64(down),
		`otelcol_opampgateway_admissions{outcome="accepted"}`:         agents,
		`otelcol_opampgateway_admissions{outcome="refused"}`:          1,
	})
	latency := samples(t, metrics)[`otelcol_opampgateway_messages_latency_sum{direction="upstream"}`]
	require.Greater(t, latency, 0.0, "milliseconds that messages spent in the gateway")
	require.Less(t, latency, 30_000.0, "milliseconds that messages spent in the gateway")

	crowd[0].ws.Close()
	crowd[1].ws.Close()
	server.stop(t)
	wantSamples(t, metrics, map[string]float64{
		`otelcol_opampgateway_connections{direction="upstream"}`:   0,
		`otelcol_opampgateway_connections{direction="downstream"}`: agents - 2,
		`otelcol_opampgateway_faults{reason="link_lost"}`:          3,
	})
	server.start(t)
	wantSamples(t, metrics, map[string]float64{
		`otelcol_opampgateway_connections{direction="upstream"}`:   3,
		`otelcol_opampgateway_connections{direction="downstream"}`: agents - 2,
	})
}

// The health check extension shows whether there is a link, given its feature gate and its
// second kind of configuration. zPages lists the extension.
func TestHealthAndZPages(t *testing.T) {
	t.Parallel()
	server := startServer(t, serverOptions{})
	server.stop(t)
	health, zpages := freeAddress(t), freeAddress(t)
	c := gatewayConfig(server.url(), freeAddress(t))
	c.set("extensions::zpages::endpoint", zpages)
	c.set("extensions::health_check", map[string]any{
		"http":             map[string]any{"endpoint": health},
		"component_health": map[string]any{"include_recoverable_errors": true, "recovery_duration": "0s"},
	})
	c.set("service::extensions", []any{"health_check", "zpages", "opampgateway"})
	gateway := startCollector(t, "gateway", c, "--feature-gates=+extension.healthcheck.useComponentStatus")
	gateway.wantReady(t, 1)

	wantStatus := func(code int, status, problem string) {
		t.Helper()
		eventually(t, func() string {
			got, body := get(t, "http://"+health+"/status?verbose")
			var page struct {
				Components struct {
					Extensions struct {
						Components map[string]struct{ Status, Error string }
					}
				}
			}
			_ = json.Unmarshal([]byte(body), &page) // what is missing is seen below
			gateway := page.Components.Extensions.Components["extension:opampgateway"]
			if got != code || gateway.Status != status || !strings.Contains(gateway.Error, problem) {
				return fmt.Sprintf("/status is %d %s, want %d with %s: %s", got, body, code, status, problem)
			}
			return ""
		})
	}
	wantStatus(http.StatusInternalServerError, "StatusRecoverableError", "no link to the server: dial tcp "+server.address)
	server.start(t)
	wantStatus(http.StatusOK, "StatusOK", "")
	server.stop(t)
	wantStatus(http.StatusInternalServerError, "StatusRecoverableError", "no link to the server")

	code, body := get(t, "http://"+zpages+"/debug/extensionz")
	require.Equal(t, http.StatusOK, code)
	require.Contains(t, body, "opampgateway")
}

// What the gateway is trusted with is in its log at no level; at info nothing is logged per
// message.
func TestLogs(t *testing.T) {
	t.Parallel()
	const secret = "marker-that-nobody-must-read"
	server := startServer(t, serverOptions{judge: func(headers http.Header) verdict {
		if headers.Get("Authorization") == "wrong-"+secret {
			return verdict{refusal: http.StatusForbidden, headers: map[string]string{"X-Why": secret}}
		}
		return verdict{}
	}})

	for _, level := range []string{"info", "debug"} {
		t.Run(level, func(t *testing.T) {
			gateway := startGateway(t, server.url()+"?token="+secret, func(c config) {
				c.gateway("server::headers::Authorization", secret)
				c.gateway("agents::keep_alive", map[string]any{"interval": "1s", "timeout": "3s"}) // for faster sweeps
				c.set("service::telemetry::logs::level", level)
			})
			for i := range 3 {
				gateway.wantLog(t, "info", "connected to the server", server.url(), upstream(3)[i])
			}
			headers := http.Header{"Authorization": {secret}, "Agent-Hostname": {secret}}
			alice := startAgent(t, "alice", gateway.url(), agentOptions{headers: headers})
			server.wantAgent(t, alice.id(), "is connected", isConnected)

			before := len(gateway.log.lines())
			for i := range 100 {
				text := fmt.Sprint(secret, i)
				alice.say(t, text)
				alice.wantHeard(t, text)
			}
			if level == "info" {
				require.Len(t, gateway.log.lines(), before, "lines in the log after 100 messages")
			}

			// Whatever else can be said.
			server.send(t, alice.id(), &protobufs.ServerToAgent{RemoteConfig: &protobufs.AgentRemoteConfig{
				ConfigHash: []byte(secret),
				Config:     &protobufs.AgentConfigMap{ConfigMap: map[string]*protobufs.AgentConfigFile{secret: {Body: []byte(secret)}}},
			}})
			server.wantAgent(t, alice.id(), "reports the configuration", func(k Known) bool { return k.EffectiveConfig.GetConfigMap() != nil })
			_, _, err := dialRaw(gateway.url()+"?key="+secret, http.Header{"Authorization": {"wrong-" + secret}}, nil)
			require.Error(t, err)
			mallory := connectRaw(t, gateway.url(), headers)
			mallory.send(t, &protobufs.AgentToServer{SequenceNum: 1})
			for range 20 {
				mallory.sendFrame(t, websocket.BinaryMessage, []byte(secret))
				mallory.sendFrame(t, websocket.TextMessage, []byte(secret))
			}
			mallory.wantClosed(t, websocket.CloseInvalidFramePayloadData)
			get(t, "http://"+gateway.address+"/"+secret)
			server.stop(t)
			for i := range 3 {
				gateway.wantLog(t, "warn", "lost connection to the server", server.url(), upstream(3)[i])
			}
			server.start(t)
			server.wantAgent(t, alice.id(), "is back", isConnected)
			alice.stop()

			require.NotContains(t, gateway.log.String(), secret)
			require.NotContains(t, gateway.log.String(), "token=")
		})
	}
}
