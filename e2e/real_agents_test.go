package e2e

import (
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/open-telemetry/opamp-go/protobufs"
	"github.com/stretchr/testify/require"
)

// A collector with opampextension comes, is seen as what it is, and is killed.
func TestCollectorAsAgent(t *testing.T) {
	t.Parallel()
	server := startServer(t, serverOptions{})
	gateway := startGateway(t, server.url())
	server.wantLinks(t, upstream(3)...)

	alice := uuid.Must(uuid.NewV7())
	c := agentConfig(gateway.url(), alice)
	c.set("service::telemetry::resource", map[string]any{"service.name": "alice"})
	agent := startCollector(t, "alice", c)

	server.wantAgent(t, alice, "describes itself", func(k Known) bool {
		return strings.Contains(k.Description.String(), `string_value:"alice"`)
	})
	server.wantAgent(t, alice, "is healthy", func(k Known) bool {
		return k.Health.GetHealthy() && k.Health.GetComponentHealthMap()["extensions"] != nil
	})
	server.wantAgent(t, alice, "reports its effective configuration", func(k Known) bool {
		return strings.Contains(configText(k.EffectiveConfig.GetConfigMap()), gateway.address)
	})
	require.Contains(t, upstream(3), server.known(alice).Link)

	agent.Signal(t, syscall.SIGKILL)
	agent.wantExit(t)
	server.wantAgent(t, alice, "is gone, as the gateway says for it", func(k Known) bool { return k.Goodbye })
	server.wantLinks(t, upstream(3)...)
}

// A collector is the gateway, and through it an agent itself: a managed gateway. Its secrets
// are not in the configuration that it reports.
func TestGatewayIsItsOwnAgent(t *testing.T) {
	t.Parallel()
	server := startServer(t, serverOptions{})
	gateway := uuid.Must(uuid.NewV7())
	address := freeAddress(t)
	launchGateway(t, "gateway", gatewayConfig(server.url(), address), func(c config) {
		c.gateway("server::headers::Authorization", "Secret-Key do-not-tell")
		c.set("extensions::opamp::instance_uid", gateway.String())
		c.set("extensions::opamp::server::ws::endpoint", "ws://"+address)
		c.set("service::extensions", []any{"opamp", "opampgateway"})
	})

	known := server.wantAgent(t, gateway, "reports its effective configuration", func(k Known) bool { return k.EffectiveConfig != nil })
	text := configText(known.EffectiveConfig.GetConfigMap())
	require.Contains(t, text, "opampgateway")
	require.Contains(t, text, "[REDACTED]")
	require.NotContains(t, text, "do-not-tell")
	server.wantAgent(t, gateway, "is healthy", func(k Known) bool { return k.Health.GetHealthy() })
}

// A supervisor takes a remote configuration through the gateway, has its collector apply it,
// and says so. A configuration that cannot work is reported as failed.
func TestSupervisor(t *testing.T) {
	t.Parallel()
	server := startServer(t, serverOptions{})
	gateway := startGateway(t, server.url())
	bob := uuid.Must(uuid.NewV7())
	supervisor := startSupervisor(t, gateway.url(), bob)
	// Not before: a configuration that comes while v0.158.0 is starting is overwritten by its
	// initial one, and reported as applied.
	server.wantAgent(t, bob, "runs its collector", func(k Known) bool { return k.Health.GetComponentHealthMap()["extensions"] != nil })

	push := func(hash, body string) {
		server.send(t, bob, &protobufs.ServerToAgent{RemoteConfig: &protobufs.AgentRemoteConfig{
			ConfigHash: []byte(hash),
			Config:     &protobufs.AgentConfigMap{ConfigMap: map[string]*protobufs.AgentConfigFile{"": {Body: []byte(body), ContentType: "text/yaml"}}},
		}})
	}
	hasStatus := func(hash string, status protobufs.RemoteConfigStatuses) func(Known) bool {
		return func(k Known) bool {
			return k.ConfigStatus.GetStatus() == status && string(k.ConfigStatus.GetLastRemoteConfigHash()) == hash
		}
	}

	otlp := freeAddress(t)
	push("first", `
receivers: {otlp: {protocols: {http: {endpoint: "`+otlp+`"}}}}
exporters: {debug: {}}
service: {pipelines: {logs: {receivers: [otlp], exporters: [debug]}}}
`)
	server.wantAgent(t, bob, "has applied the configuration", hasStatus("first", protobufs.RemoteConfigStatuses_RemoteConfigStatuses_APPLIED))
	server.wantAgent(t, bob, "runs it", func(k Known) bool {
		return strings.Contains(configText(k.EffectiveConfig.GetConfigMap()), otlp) && k.Health.GetHealthy()
	})
	require.True(t, dialable(otlp), "the managed collector listens where the server told it to")

	push("second", "receivers: {no_such_receiver: {}}\nexporters: {debug: {}}\nservice: {pipelines: {logs: {receivers: [no_such_receiver], exporters: [debug]}}}\n")
	server.wantAgent(t, bob, "could not apply the second", hasStatus("second", protobufs.RemoteConfigStatuses_RemoteConfigStatuses_FAILED))

	supervisor.Signal(t, syscall.SIGTERM)
	code, _ := supervisor.wantExit(t)
	require.Zero(t, code)
	server.wantAgent(t, bob, "said goodbye", func(k Known) bool { return k.Goodbye })
}

// An agent that is idle sends heartbeats, at the interval that the server offers.
func TestHeartbeats(t *testing.T) {
	t.Parallel()
	server := startServer(t, serverOptions{})
	gateway := startGateway(t, server.url())
	alice := startAgent(t, "alice", gateway.url(), agentOptions{})
	server.wantAgent(t, alice.id(), "is connected", isConnected)
	before := server.known(alice.id()).Heartbeats

	server.send(t, alice.id(), &protobufs.ServerToAgent{ConnectionSettings: &protobufs.ConnectionSettingsOffers{
		Opamp: &protobufs.OpAMPConnectionSettings{HeartbeatIntervalSeconds: 1},
	}})
	start := time.Now()
	server.wantAgent(t, alice.id(), "sends heartbeats", func(k Known) bool { return k.Heartbeats >= before+2 })
	require.Greater(t, time.Since(start), 1500*time.Millisecond, "the two heartbeats came at the interval offered")
	alice.wantConnects(t, 1)
}

// configText puts all files of a configuration together.
func configText(m *protobufs.AgentConfigMap) string {
	var text strings.Builder
	for _, file := range m.GetConfigMap() {
		text.Write(file.GetBody())
	}
	return text.String()
}
