package main

import (
	"errors"
	"flag"
	"io"
	"os"
	"strings"
	"testing"
)

func TestGatewayConfig(t *testing.T) {
	got, err := render(gatewayTemplate, gatewayConfig{Server: "wss://server/v1/opamp?a=$b", Listen: "localhost:4320", Connections: 3, Metrics: "127.0.0.1:9", Status: "127.0.0.1:10"})
	if err != nil {
		t.Fatal(err)
	}
	want := `# The collector that is the gateway.
extensions:
  opampgateway:
    server:
      endpoint: "wss://server/v1/opamp?a=$$b"
      headers:
        Authorization: "Secret-Key ${env:OPAMP_SECRET_KEY}"
      agent_id: demo
      connections: 3
    listener:
      endpoint: "localhost:4320"
    status:
      endpoint: "127.0.0.1:10"

receivers:
  nop:
exporters:
  nop:

service:
  extensions: [opampgateway]
  pipelines:
    logs:
      receivers: [nop]
      exporters: [nop]
  telemetry:
    logs:
      disable_stacktrace: true
    metrics:
      readers:
        - pull:
            exporter:
              prometheus:
                host: "127.0.0.1"
                port: 9
                without_scope_info: true
                without_type_suffix: true
                without_units: true
`
	if got != want {
		t.Errorf("the configuration is\n%s", got)
	}
}

func TestAgentConfig(t *testing.T) {
	got, err := render(agentTemplate, agentConfig{Name: "alice", UID: "01980000-0000-7000-8000-000000000001", Endpoint: "ws://127.0.0.1:4320"})
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		`instance_uid: "01980000-0000-7000-8000-000000000001"`,
		`endpoint: "ws://127.0.0.1:4320"`,
		`Authorization: "Secret-Key ${env:OPAMP_SECRET_KEY}"`,
		`service.name: "alice"`,
	} {
		if !strings.Contains(got, want) {
			t.Errorf("no %s in\n%s", want, got)
		}
	}
}

func TestFreePorts(t *testing.T) {
	addrs, err := freePorts(3)
	if err != nil {
		t.Fatal(err)
	}
	seen := map[string]bool{}
	for _, a := range addrs {
		if !strings.HasPrefix(a, "127.0.0.1:") || seen[a] {
			t.Errorf("the addresses are %v", addrs)
		}
		seen[a] = true
	}
}

func TestFlags(t *testing.T) {
	o, err := parseFlags([]string{"-exit-after-ack", "-clients", "5"})
	if err != nil || !o.exitAfterAck || o.clients != 5 || o.collector == "" || o.listen != "localhost:4320" {
		t.Errorf("parsed %+v, %v", o, err)
	}
	stderr := os.Stderr
	defer func() { os.Stderr = stderr }()
	os.Stderr, _ = os.Open(os.DevNull) // the flag package complains there
	for _, args := range [][]string{{"-clients", "0"}, {"-timeout", "0s"}, {"surplus"}, {"-unknown"}} {
		if _, err := parseFlags(args); err == nil {
			t.Errorf("%v is accepted", args)
		}
	}
	if _, err := parseFlags([]string{"-h"}); !errors.Is(err, flag.ErrHelp) {
		t.Errorf("-h gives %v", err)
	}
}

func TestGatewayOnly(t *testing.T) {
	for server, want := range map[string]string{
		"wss://server/v1/opamp":      "",
		"ws://127.0.0.1:1":           "",
		"http://server":              "ws:// or wss://",
		"wss://":                     "ws:// or wss://",
		"server:4320":                "ws:// or wss://",
		"wss://user:secret@server":   "user or password",
		"wss://user:secret@server:x": "ws:// or wss://",
	} {
		err := checkServer(server, "key")
		if (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", server, err, want)
		}
		if err != nil && strings.Contains(err.Error(), "secret") {
			t.Errorf("the error tells the password: %v", err)
		}
	}
	if err := checkServer("wss://server", ""); err == nil || !strings.Contains(err.Error(), "OPAMP_SECRET_KEY") {
		t.Errorf("without a key: %v", err)
	}

	text := strings.Join(gatewayIntroduction(options{server: "wss://server", listen: "localhost:4320"}, "file", "127.0.0.1:9", "127.0.0.1:10"), "\n")
	for _, want := range []string{"endpoint: ws://localhost:4320/v1/opamp", "secret_key: ${OPAMP_SECRET_KEY}", "Only agents on this machine", "http://127.0.0.1:10/"} {
		if !strings.Contains(text, want) {
			t.Errorf("no %q in\n%s", want, text)
		}
	}
	text = strings.Join(gatewayIntroduction(options{listen: "0.0.0.0:4320"}, "file", "127.0.0.1:9", "127.0.0.1:10"), "\n")
	if !strings.Contains(text, "ws://<this host>:4320/v1/opamp") || strings.Contains(text, "Only agents on this machine") {
		t.Errorf("for all addresses:\n%s", text)
	}
}

func TestParseMetrics(t *testing.T) {
	m, err := parseMetrics(strings.NewReader(`# HELP otelcol_opampgateway_connections Open connections.
# TYPE otelcol_opampgateway_connections gauge
otelcol_opampgateway_connections{direction="downstream",service_name="otelcol{x}"} 4
otelcol_opampgateway_connections{direction="upstream",service_name="otelcol"} 3
otelcol_opampgateway_messages{direction="upstream"} 1e+06
otelcol_opampgateway_messages{direction="downstream"} 21
otelcol_opampgateway_messages_bytes{direction="upstream"} 4096
otelcol_opampgateway_messages_bytes{direction="downstream"} 2.5
otelcol_opampgateway_messages_latency_bucket{direction="upstream",le="0.05"} 7
otelcol_process_uptime{} 5
`))
	want := gatewayMetrics{links: 3, agents: 4, messagesUp: 1e6, bytesUp: 4096, messagesDown: 21, bytesDown: 2.5}
	if err != nil || m != want {
		t.Errorf("read %+v, %v, want %+v", m, err, want)
	}
	if _, err := parseMetrics(strings.NewReader(`otelcol_opampgateway_messages{} many`)); err == nil {
		t.Error("no error for a metric that is no number")
	}
	if m, err := parseMetrics(io.MultiReader()); err != nil || m != (gatewayMetrics{}) {
		t.Errorf("of nothing is read %+v, %v", m, err)
	}
}
