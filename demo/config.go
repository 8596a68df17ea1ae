package main

import (
	"encoding/json"
	"fmt"
	"net"
	"strings"
	"text/template"
)

// gatewayConfig is what the gateway collector is configured with.
type gatewayConfig struct {
	Server      string // URL of the OpAMP server
	Listen      string // where agents connect
	Connections int
	Metrics     string // address of its own metrics
	Status      string // address of its status page
	Rollout     int    // what was rolled out to it so far
}

// agentConfig is what a collector is configured with that is an agent.
type agentConfig struct {
	Name     string
	UID      string
	Endpoint string // the gateway's URL, or the server's
}

// A collector wants at least one pipeline. These are idle: the demo is about management.
const idlePipeline = `
receivers:
  nop:
exporters:
  nop:
`

var gatewayTemplate = parse("gateway", `# The collector that is the gateway.
extensions:
  opampgateway:
    server:
      endpoint: {{yaml .Server}}
      headers:
        Authorization: "Secret-Key ${env:`+secretKeyEnv+`}"
      agent_id: demo
      connections: {{.Connections}}
    listener:
      endpoint: {{yaml .Listen}}
    status:
      endpoint: {{yaml .Status}}
`+idlePipeline+`
service:
  extensions: [opampgateway]
  pipelines:
    logs:
      receivers: [nop]
      exporters: [nop]
{{- if .Rollout}}
    logs/{{.Rollout}}:
      receivers: [nop]
      exporters: [nop]
{{- end}}
  telemetry:
    logs:
      disable_stacktrace: true
    metrics:
      readers:
        - pull:
            exporter:
              prometheus:
                host: {{yaml .MetricsHost}}
                port: {{.MetricsPort}}
                without_scope_info: true
                without_type_suffix: true
                without_units: true
`)

var agentTemplate = parse("agent", `# A collector that is an agent.
extensions:
  opamp:
    instance_uid: {{yaml .UID}}
    server:
      ws:
        endpoint: {{yaml .Endpoint}}
        headers:
          Authorization: "Secret-Key ${env:`+secretKeyEnv+`}"
`+idlePipeline+`
service:
  extensions: [opamp]
  pipelines:
    logs:
      receivers: [nop]
      exporters: [nop]
  telemetry:
    resource:
      service.name: {{yaml .Name}}
    logs:
      disable_stacktrace: true
    metrics:
      level: none
`)

func (c gatewayConfig) MetricsHost() (string, error) {
	host, _, err := net.SplitHostPort(c.Metrics)
	return host, err
}

func (c gatewayConfig) MetricsPort() (string, error) {
	_, port, err := net.SplitHostPort(c.Metrics)
	return port, err
}

func parse(name, text string) *template.Template {
	return template.Must(template.New(name).Funcs(template.FuncMap{"yaml": yamlString}).Parse(text))
}

// yamlString quotes s for a collector's configuration: JSON strings are YAML strings, and
// in all of them the collector takes $ for the start of a reference, unless it is doubled.
func yamlString(s string) (string, error) {
	data, err := json.Marshal(s)
	return strings.ReplaceAll(string(data), "$", "$$"), err
}

func render(t *template.Template, data any) (string, error) {
	var b strings.Builder
	if err := t.Execute(&b, data); err != nil {
		return "", fmt.Errorf("writing the %s's configuration: %w", t.Name(), err)
	}
	return b.String(), nil
}

// freePorts finds n different loopback addresses. Somebody else could take one before
// the collector does; then the collector says so.
func freePorts(n int) ([]string, error) {
	var listeners []net.Listener
	defer func() { // only at the end, so that no port comes twice
		for _, l := range listeners {
			l.Close()
		}
	}()
	var addrs []string
	for range n {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return nil, fmt.Errorf("finding a free port: %w", err)
		}
		listeners = append(listeners, l)
		addrs = append(addrs, l.Addr().String())
	}
	return addrs, nil
}
