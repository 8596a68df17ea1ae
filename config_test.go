package opampgateway

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.opentelemetry.io/collector/component"
	"go.opentelemetry.io/collector/config/configopaque"
	"go.opentelemetry.io/collector/confmap"
	"go.opentelemetry.io/collector/confmap/confmaptest"
	"go.uber.org/zap"
)

// load makes a configuration of what a user has written below the extension's name.
func load(conf *confmap.Conf) (*Config, error) {
	cfg := NewFactory().CreateDefaultConfig().(*Config)
	if err := conf.Unmarshal(cfg); err != nil {
		return nil, err
	}
	return cfg, confmap.Validate(cfg)
}

// example loads one of the examples in testdata/config.yaml.
func example(t *testing.T, name string) *Config {
	t.Helper()
	conf, err := confmaptest.LoadConf("testdata/config.yaml")
	require.NoError(t, err)
	conf, err = conf.Sub("opampgateway/" + name)
	require.NoError(t, err)
	cfg, err := load(conf)
	require.NoError(t, err)
	return cfg
}

func TestConfigDefaults(t *testing.T) {
	cfg := example(t, "minimal")
	want := createDefaultConfig().(*Config)
	want.Server.Endpoint = "ws://127.0.0.1:4320/v1/opamp"
	require.Equal(t, want, cfg)

	require.Equal(t, 3, cfg.Server.Connections)
	require.Equal(t, "localhost:4320", cfg.Listener.NetAddr.Endpoint)
	require.Equal(t, AdmissionAuto, cfg.Server.AgentAdmission)
	require.Equal(t, 500*time.Millisecond, cfg.Server.Retry.InitialInterval)
	require.Equal(t, 5*time.Second, cfg.Server.Retry.MaxInterval)
	require.Zero(t, cfg.Server.Retry.MaxElapsedTime)
	require.Equal(t, time.Minute, cfg.Server.GracePeriod)
	require.Equal(t, 64<<20, cfg.MaxMessageSize)
	require.Equal(t, 16<<10, cfg.Agents.MaxRequestHeaderSize)
	require.Equal(t, 4<<20, cfg.Agents.MaxQueueSize)
	require.Equal(t, 30*time.Second, cfg.Agents.WriteTimeout)
	require.Equal(t, 256<<20, cfg.MaxBufferedSize)
	require.True(t, cfg.Agents.SendDisconnect)
	require.False(t, cfg.Agents.SendDisconnectForGateways)
	require.False(t, cfg.Agents.AllowGateways)
	require.Equal(t, 64, cfg.Agents.MaxInstanceUIDs)
	require.Equal(t, 100, cfg.Agents.MaxRequestHeaders)
}

// TestConfigEveryKey loads an example that has every key of ours with another value than its default.
func TestConfigEveryKey(t *testing.T) {
	cfg := example(t, "every_key")
	require.Equal(t, "tcp4", string(cfg.Listener.NetAddr.Transport))
	require.Equal(t, "basicauth/agents", cfg.Listener.Auth.Get().Config.AuthenticatorID.String()) //nolint:staticcheck // newer collectors do not embed Config
	require.Equal(t, "ratelimiter", cfg.Listener.Middlewares[0].ID.String())
	require.Equal(t, "/etc/otel/agents-ca.crt", cfg.Listener.TLS.Get().ClientCAFile)

	conf, err := confmaptest.LoadConf("testdata/config.yaml")
	require.NoError(t, err)
	var check func(path string, got, fallback reflect.Value)
	check = func(path string, got, fallback reflect.Value) {
		for i := range got.NumField() {
			key, _, _ := strings.Cut(got.Type().Field(i).Tag.Get("mapstructure"), ",")
			if key == "" {
				continue
			}
			key = path + "::" + key
			require.True(t, conf.IsSet(key), "testdata/config.yaml has no %s", key)
			field := got.Field(i)
			if field.Kind() == reflect.Struct && field.Type().PkgPath() == got.Type().PkgPath() {
				check(key, field, fallback.Field(i))
				continue
			}
			require.NotEqual(t, fallback.Field(i).Interface(), field.Interface(), "%s is the default", key)
		}
	}
	check("opampgateway/every_key", reflect.ValueOf(*cfg), reflect.ValueOf(*createDefaultConfig().(*Config)))
}

// TestConfigOfProduct loads the example of the product's description, as it stands there.
func TestConfigOfProduct(t *testing.T) {
	conf, err := resolve(t, "testdata/product.yaml").Sub("extensions::opampgateway")
	require.NoError(t, err)
	cfg, err := load(conf)
	require.NoError(t, err)

	require.Equal(t, "wss://app.bindplane.com/v1/opamp", cfg.Server.Endpoint)
	authorization, ok := cfg.Server.Headers.Get("Authorization")
	require.True(t, ok)
	require.Equal(t, configopaque.String("Secret-Key from the environment"), authorization)
	require.Equal(t, 3, cfg.Server.Connections)
	require.Equal(t, "0.0.0.0:4320", cfg.Listener.NetAddr.Endpoint)
	require.Equal(t, "/etc/otel/server.crt", cfg.Listener.TLS.Get().CertFile)
	require.Equal(t, "/etc/otel/server.key", cfg.Listener.TLS.Get().KeyFile)
}

// resolve reads a file as a collector does.
func resolve(t *testing.T, file string) *confmap.Conf {
	t.Helper()
	resolver, err := confmap.NewResolver(confmap.ResolverSettings{
		URIs: []string{"file:" + file},
		ProviderFactories: []confmap.ProviderFactory{
			confmap.NewProviderFactory(func(confmap.ProviderSettings) confmap.Provider { return fileProvider{} }),
			confmap.NewProviderFactory(func(confmap.ProviderSettings) confmap.Provider { return envProvider{} }),
		},
	})
	require.NoError(t, err)
	conf, err := resolver.Resolve(t.Context())
	require.NoError(t, err)
	return conf
}

// fileProvider and envProvider are of what a collector has for file: and ${env:…} just what is needed.
type fileProvider struct{}

func (fileProvider) Scheme() string                 { return "file" }
func (fileProvider) Shutdown(context.Context) error { return nil }
func (fileProvider) Retrieve(_ context.Context, uri string, _ confmap.WatcherFunc) (*confmap.Retrieved, error) {
	content, err := os.ReadFile(strings.TrimPrefix(uri, "file:"))
	if err != nil {
		return nil, err
	}
	return confmap.NewRetrievedFromYAML(content)
}

type envProvider struct{}

func (envProvider) Scheme() string                 { return "env" }
func (envProvider) Shutdown(context.Context) error { return nil }
func (envProvider) Retrieve(_ context.Context, uri string, _ confmap.WatcherFunc) (*confmap.Retrieved, error) {
	switch uri {
	case "env:OPAMP_SECRET_KEY":
		return confmap.NewRetrieved("from the environment")
	case "env:NUMBER":
		return confmap.NewRetrievedFromYAML([]byte("0123"))
	case "env:LIST":
		return confmap.NewRetrievedFromYAML([]byte("[a, b]"))
	}
	return nil, fmt.Errorf("unexpected %s", uri)
}

// TestConfigMistakes makes every mistake there is. Each is refused with what the user typed.
func TestConfigMistakes(t *testing.T) {
	const secret = "s3cret"
	type m = map[string]any
	server := func(key string, value any) m {
		return m{"server": m{"endpoint": "ws://localhost", key: value}}
	}
	listener := func(key string, value any) m {
		return m{"server": m{"endpoint": "ws://localhost"}, "listener": m{key: value}}
	}
	agents := func(key string, value any) m {
		return m{"server": m{"endpoint": "ws://localhost"}, "agents": m{key: value}}
	}
	for _, test := range []struct {
		name string
		conf m
		want []string
	}{
		{"nothing at all", m{}, []string{"server", "endpoint", "required"}},
		{"no endpoint", m{"server": m{"connections": 3}}, []string{"server", "endpoint", "required"}},
		{"empty server", m{"server": nil}, []string{"server", "endpoint", "required"}},
		{"ftp endpoint", server("endpoint", "ftp://localhost"), []string{"server", "endpoint", "ws://", "wss://", "http://", "https://", "ftp://localhost"}},
		{"endpoint without scheme", server("endpoint", "localhost:4320"), []string{"server", "endpoint", "ws://"}},
		{"endpoint without host", server("endpoint", "ws:///v1/opamp"), []string{"server", "endpoint", "no host"}},
		{"endpoint with nothing but a port", server("endpoint", "ws://:4320"), []string{"server", "endpoint", "no host"}},
		{"endpoint with a password", server("endpoint", "ws://me:"+secret+"@localhost"), []string{"server", "endpoint", "password"}},
		{"http endpoint with a password", server("endpoint", "http://me:"+secret+"@localhost"), []string{"server", "endpoint", "password"}},
		{"endpoint that is no URL", server("endpoint", "ws://me:"+secret+"@local host"), []string{"server", "endpoint", "URL"}},
		{"endpoint that is a list", server("endpoint", []string{"ws://localhost"}), []string{"server", "endpoint"}},
		{"no connections", server("connections", 0), []string{"server", "connections", "1 to 64", "0"}},
		{"negative connections", server("connections", -1), []string{"server", "connections", "1 to 64", "-1"}},
		{"very many connections", server("connections", 100_000), []string{"server", "connections", "1 to 64", "100000"}},
		{"65 connections", server("connections", 65), []string{"server", "connections"}},
		{"connections that are no number", server("connections", "three"), []string{"server", "connections"}},
		{"agent_id with a line feed", server("agent_id", "a\nb"), []string{"server", "agent_id"}},
		{"reserved header Upgrade", server("headers", m{"Upgrade": secret}), []string{"server", "headers", "Upgrade", "reserved"}},
		{"reserved header Connection", server("headers", m{"connection": secret}), []string{"server", "headers", "connection", "reserved"}},
		{"reserved header Sec-WebSocket-Key", server("headers", m{"Sec-WebSocket-Key": secret}), []string{"server", "headers", "Sec-WebSocket-Key", "reserved"}},
		{"reserved header Sec-WebSocket-Version", server("headers", m{"sec-websocket-version": secret}), []string{"server", "headers", "sec-websocket-version", "reserved"}},
		{"reserved header Sec-WebSocket-Protocol", server("headers", m{"Sec-Websocket-Protocol": secret}), []string{"server", "headers", "Sec-Websocket-Protocol", "reserved"}},
		{"reserved header Sec-WebSocket-Extensions", server("headers", m{"Sec-WebSocket-Extensions": secret}), []string{"server", "headers", "Sec-WebSocket-Extensions", "reserved"}},
		{"reserved header of gateways", server("headers", m{"x-opamp-gateway-connection-id": secret}), []string{"server", "headers", "x-opamp-gateway-connection-id", "agent_id"}},
		{"header that is no name", server("headers", m{"Author ization": secret}), []string{"server", "headers", "Author ization"}},
		{"header with a line feed", server("headers", m{"Authorization": secret + "\n"}), []string{"server", "headers", "Authorization"}},
		{"header with a line feed in a list", server("headers", m{"X-Team": []string{"a", secret + "\n"}}), []string{"server", "headers", "X-Team", "cannot be sent"}},
		{"header without any value", server("headers", m{"X-Team": []string{}}), []string{"server", "headers", "X-Team", "no value"}},
		{"header that is a number", server("headers", m{"X-Team": 4711}), []string{"server", "headers", "text, or a list of texts"}},
		{"header that is a list of lists", server("headers", m{"X-Team": []any{"a", []any{secret}}}), []string{"server", "headers", "text, or a list of texts"}},
		{"header that is a map", server("headers", m{"X-Team": m{"is": secret}}), []string{"server", "headers", "text, or a list of texts"}},
		{"header twice", server("headers", m{"X-Team": secret, "x-team": secret}), []string{"server", "headers", "x-team", "twice"}},
		{"two hosts", server("headers", m{"Host": []string{"a", "b"}}), []string{"server", "headers", "Host", "one value"}},
		{"two user agents", server("headers", m{"user-agent": []string{"a", "b"}}), []string{"server", "headers", "user-agent", "one value"}},
		{"header entry twice", server("headers", []any{m{"name": "X-Team", "value": "a"}, m{"name": "X-Team", "value": "b"}}), []string{"server", "headers", "X-Team", "twice"}},
		{"header entry without a name", server("headers", []any{m{"value": secret}}), []string{"server", "headers", `""`, "not a header name"}},
		{"header entry with another key", server("headers", []any{m{"name": "X-Team", "values": secret}}), []string{"server", "headers", "values", "name and value"}},
		{"header entry that is a number", server("headers", []any{m{"name": "X-Team", "value": 4711}}), []string{"server", "headers", "text, or a list of texts"}},
		{"reserved header in an entry", server("headers", []any{m{"name": "upgrade", "value": []string{secret}}}), []string{"server", "headers", "upgrade", "reserved"}},
		{"proxy that is no URL", server("proxy_url", "http://me:"+secret+"@pro xy"), []string{"server", "proxy_url", "is not a URL"}},
		{"proxy without a scheme", server("proxy_url", "proxy.example.com:3128"), []string{"server", "proxy_url", "must start with http://, https://, socks5:// or socks5h://"}},
		{"proxy of another kind", server("proxy_url", "ftp://me:"+secret+"@proxy.example.com"), []string{"server", "proxy_url", "must start with"}},
		{"proxy without a host", server("proxy_url", "http://me:"+secret+"@:3128"), []string{"server", "proxy_url", "no host"}},
		{"proxy with a slash in its password", server("proxy_url", "http://me:1/"+secret+"@proxy.example.com"), []string{"server", "proxy_url", "%2F"}},
		{"proxy with a question mark in its password", server("proxy_url", "http://me:1?"+secret+"@proxy.example.com"), []string{"server", "proxy_url"}},
		{"proxy with a long password", server("proxy_url", "socks5://me:"+strings.Repeat(secret, 64)+"@proxy.example.com"), []string{"server", "proxy_url", "255"}},
		{"authenticator without a name", server("auth", m{"authenticator": ""}), []string{"server", "auth"}},
		{"two mistakes in headers", server("headers", m{"Upgrade": secret, "a b": secret}), []string{"Upgrade", "a b"}},
		{"retry switched off", server("retry", m{"enabled": false}), []string{"server", "retry::enabled", "never gives up"}},
		{"retry that gives up", server("retry", m{"max_elapsed_time": "10m"}), []string{"server", "retry::max_elapsed_time", "never gives up", "10m"}},
		{"retry without delay", server("retry", m{"initial_interval": 0}), []string{"server", "retry::initial_interval"}},
		{"retry with a negative delay", server("retry", m{"initial_interval": "-1s"}), []string{"server", "retry::initial_interval"}},
		{"retry that ends before it starts", server("retry", m{"initial_interval": "10s"}), []string{"server", "retry::initial_interval", "max_interval"}},
		{"retry that becomes faster", server("retry", m{"multiplier": 0.5}), []string{"server", "retry::multiplier"}},
		{"retry with absurd jitter", server("retry", m{"randomization_factor": 7}), []string{"server", "retry", "randomization_factor"}},
		{"keep-alive without interval", server("keep_alive", m{"interval": 0}), []string{"server::keep_alive", "interval"}},
		{"keep-alive with a negative interval", server("keep_alive", m{"interval": "-1s"}), []string{"server::keep_alive", "interval"}},
		{"keep-alive that gives up before it pings", server("keep_alive", m{"interval": "30s", "timeout": "20s"}), []string{"server::keep_alive", "interval", "timeout"}},
		{"keep-alive that gives up as it pings", server("keep_alive", m{"interval": "20s"}), []string{"server::keep_alive", "interval", "timeout"}},
		{"keep-alive that is no duration", server("keep_alive", m{"interval": "often"}), []string{"server", "keep_alive", "interval"}},
		{"keep-alive of agents", agents("keep_alive", m{"timeout": "1s"}), []string{"agents::keep_alive", "interval", "timeout"}},
		{"strange admission", server("agent_admission", "maybe"), []string{"server", "agent_admission", "ask", "accept", "maybe"}},
		{"no admission", server("agent_admission", ""), []string{"server", "agent_admission"}},
		{"nobody verified", server("verify_connections", 0), []string{"server", "verify_connections", "1 to 256", "0"}},
		{"very many verified", server("verify_connections", 257), []string{"server", "verify_connections", "257"}},
		{"no time for admission", server("admission_timeout", 0), []string{"server", "admission_timeout"}},
		{"more time for admission than agents have", server("admission_timeout", "46s"), []string{"server", "admission_timeout", "45s"}},
		{"no grace", server("grace_period", 0), []string{"server", "grace_period"}},
		{"negative grace", server("grace_period", "-1m"), []string{"server", "grace_period"}},
		{"TLS version from the past", server("tls", m{"min_version": "0.9"}), []string{"server::tls", "min_version"}},
		{"no header size", agents("max_request_header_size", 0), []string{"agents", "max_request_header_size"}},
		{"few headers", agents("max_request_headers", 9), []string{"agents", "max_request_headers", "10 to 1000", "9"}},
		{"very many headers", agents("max_request_headers", 1001), []string{"agents", "max_request_headers", "10 to 1000", "1001"}},
		{"small headers", agents("max_request_header_size", 1023), []string{"agents", "max_request_header_size", "1024 to 65536", "1023"}},
		{"headers larger than a question", agents("max_request_header_size", 65537), []string{"agents", "max_request_header_size", "65536"}},
		{"negative max_connections", agents("max_connections", -1), []string{"agents", "max_connections", "-1"}},
		{"no instance UIDs", agents("max_instance_uids", 0), []string{"agents", "max_instance_uids", "1 to 100000", "0"}},
		{"very many instance UIDs", agents("max_instance_uids", 100_001), []string{"agents", "max_instance_uids", "100001"}},
		{"gateways that are no yes or no", agents("allow_gateways", "some"), []string{"agents", "allow_gateways"}},
		{"less memory than links need", m{"server": m{"endpoint": "ws://localhost", "connections": 64}, "max_message_size": 1 << 20, "max_buffered_size": 32 << 20}, []string{"max_buffered_size", "at least", "server::connections 64"}},
		{"no queue", agents("max_queue_size", 1000), []string{"agents", "max_queue_size"}},
		{"no time to write", agents("write_timeout", "10ms"), []string{"agents", "write_timeout"}},
		{"negative drain_time", agents("drain_time", "-1s"), []string{"agents", "drain_time", "0 to 5m", "-1s"}},
		{"drain_time of an hour", agents("drain_time", "1h"), []string{"agents", "drain_time", "1h"}},
		{"proxies, and no word of how", agents("trusted_proxies", []string{"192.0.2.1"}), []string{"agents", "address_from", "connection", "trusted_proxies"}},
		{"a way, and nobody who is trusted", agents("address_from", "proxy_protocol"), []string{"agents", "address_from", "trusted_proxies has 0"}},
		{"strange way", agents("address_from", "hearsay"), []string{"agents", "address_from", "x_forwarded_for", "hearsay"}},
		{
			"proxies that are no networks",
			m{"server": m{"endpoint": "ws://localhost"}, "agents": m{"address_from": "forwarded", "trusted_proxies": []string{"balancer.example", "::1", "10.0.0.0/33"}}},
			[]string{"agents", "trusted_proxies", "balancer.example", "10.0.0.0/33"},
		},
		{"negative wait of polls", agents("poll_wait", "-1s"), []string{"agents", "poll_wait", "0 to 30s"}},
		{"polls that wait too long", agents("poll_wait", "31s"), []string{"agents", "poll_wait", "31s"}},
		{"no time between polls", agents("poll_interval", "0s"), []string{"agents", "poll_interval", "1s to 1h0m0s"}},
		{"polls too far apart", agents("poll_interval", "2h"), []string{"agents", "poll_interval", "2h0m0s"}},
		{"no memory", m{"server": m{"endpoint": "ws://localhost"}, "max_buffered_size": 1 << 20}, []string{"max_buffered_size", "at least 268435456 bytes"}},
		{"less memory than messages need", m{"server": m{"endpoint": "ws://localhost"}, "max_message_size": 128 << 20}, []string{"max_buffered_size", "at least 536870912 bytes"}},
		{"no message size", m{"server": m{"endpoint": "ws://localhost"}, "max_message_size": 0}, []string{"max_message_size"}},
		{"negative message size", m{"server": m{"endpoint": "ws://localhost"}, "max_message_size": -1}, []string{"max_message_size"}},
		{"no listener endpoint", listener("endpoint", ""), []string{"listener::endpoint"}},
		{"certificate without key", listener("tls", m{"cert_file": "server.crt"}), []string{"listener::tls"}},
		{"unknown key", m{"server": m{"endpoint": "ws://localhost"}, "conections": 3}, []string{"conections"}},
		{"unknown key of server", server("conections", 3), []string{"server", "conections"}},
		{"unknown key of listener", listener("endpiont", "localhost:1"), []string{"listener", "endpiont"}},
		{"unknown key of agents", agents("keepalive", m{}), []string{"agents", "keepalive"}},
		{"unknown key of keep_alive", server("keep_alive", m{"every": "1s"}), []string{"keep_alive", "every"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			_, err := load(confmap.NewFromStringMap(test.conf))
			require.Error(t, err)
			for _, want := range test.want {
				require.ErrorContains(t, err, want)
			}
			require.NotContains(t, err.Error(), secret)
		})
	}

	t.Run("all at once", func(t *testing.T) {
		_, err := load(confmap.NewFromStringMap(m{"server": m{"endpoint": "ftp://x", "connections": 0}, "agents": m{"max_request_header_size": 0}, "max_message_size": 1}))
		for _, want := range []string{"endpoint", "connections", "max_request_header_size", "max_message_size"} {
			require.ErrorContains(t, err, want)
		}
	})

	t.Run("not a mistake", func(t *testing.T) {
		for name, conf := range map[string]m{
			"http endpoint":        server("endpoint", "http://localhost"),
			"https endpoint":       server("endpoint", "https://localhost:4320/v1/opamp"),
			"one connection":       server("connections", 1),
			"64 connections":       server("connections", 64),
			"IPv6":                 server("endpoint", "wss://[::1]:4320/v1/opamp?x=y"),
			"upper case":           server("endpoint", "WSS://LOCALHOST"),
			"ask":                  server("agent_admission", "ask"),
			"auto":                 server("agent_admission", "auto"),
			"verify":               server("agent_admission", "verify"),
			"one verified":         server("verify_connections", 1),
			"256 verified":         server("verify_connections", 256),
			"empty headers":        server("headers", m{}),
			"no headers":           server("headers", nil),
			"least":                agents("max_instance_uids", 1),
			"most":                 {"server": m{"endpoint": "ws://localhost", "connections": 64}, "agents": m{"max_request_headers": 1000, "max_request_header_size": 65536, "max_instance_uids": 100_000, "max_connections": 1_000_000}},
			"write_timeout":        agents("write_timeout", "1s"),
			"polls do not wait":    agents("poll_wait", "0s"),
			"rare polls":           agents("poll_interval", "1h"),
			"64 links, and memory": {"server": m{"endpoint": "ws://localhost", "connections": 64}, "max_message_size": 1 << 20, "max_buffered_size": 180 << 20},
			"proxies":              {"server": m{"endpoint": "ws://localhost"}, "agents": m{"address_from": "forwarded", "trusted_proxies": []string{"10.0.0.0/8", "192.0.2.1", "::1"}}},
			"drain_time":           agents("drain_time", "5m"),
			"empty listener":       {"server": m{"endpoint": "ws://localhost"}, "listener": nil},
		} {
			_, err := load(confmap.NewFromStringMap(conf))
			require.NoError(t, err, name)
		}
	})
}

// TestConfigHeaders takes one value or several, in both shapes that the collector has for headers.
func TestConfigHeaders(t *testing.T) {
	want := http.Header{"Authorization": {"a, b"}, "X-Empty": {""}, "X-Number": {"0123"}, "X-List": {"[a, b]"}, "X-Team": {"a", "b"}, "X-One": {"c"}}
	for name, text := range map[string]string{
		"map": `
authorization: a, b
X-Empty:
X-Number: ${env:NUMBER}
X-List: ${env:LIST}
X-Team: [a, b]
X-One: [c]
`,
		"list": `
- {name: authorization, value: "a, b"}
- {name: X-Empty}
- {name: X-Number, value: "${env:NUMBER}"}
- {name: X-List, value: "${env:LIST}"}
- {name: X-Team, value: [a, b]}
- {name: X-One, value: [c]}
`,
	} {
		t.Run(name, func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "config.yaml")
			text = "server:\n  endpoint: ws://localhost\n  headers:" + strings.ReplaceAll(text, "\n", "\n    ")
			require.NoError(t, os.WriteFile(file, []byte(text), 0o600))
			cfg, err := load(resolve(t, file))
			require.NoError(t, err)
			got := http.Header{"X-Team": {"of before"}, "User-Agent": {"gateway"}}
			cfg.Server.Headers.addTo(got)
			require.Equal(t, []string{"gateway"}, got["User-Agent"])
			delete(got, "User-Agent")
			require.Equal(t, want, got)

			// What a collector tells of its configuration it can take, too, and it has the same shape.
			conf := confmap.New()
			require.NoError(t, conf.Marshal(cfg))
			told, err := load(conf)
			require.NoError(t, err)
			require.Len(t, told.Server.Headers, len(cfg.Server.Headers))
			team, ok := told.Server.Headers.Get("X-Team")
			require.True(t, ok)
			require.Equal(t, configopaque.String("[REDACTED]"), team)
		})
	}
}

// TestConfigHidesHeaders shows a configuration in all ways there are.
func TestConfigHidesHeaders(t *testing.T) {
	cfg := example(t, "every_key")
	conf := confmap.New()
	require.NoError(t, conf.Marshal(cfg))
	inJSON, err := json.Marshal(cfg.Server)
	require.NoError(t, err)
	dumps := []string{
		fmt.Sprint(conf.ToStringMap()), fmt.Sprintf("%v", cfg), fmt.Sprintf("%+v", *cfg), fmt.Sprintf("%s", cfg.Server.Headers),
		fmt.Sprint(zap.Any("config", cfg)), fmt.Sprintf("%#v", cfg.Server.Headers), string(inJSON),
	}
	require.Contains(t, dumps[0], "[REDACTED]")
	for _, dump := range dumps {
		require.NotContains(t, dump, "0123456789")
		require.NotContains(t, dump, "north")
		require.NotContains(t, dump, "east")
	}
}

func TestDependencies(t *testing.T) {
	set := settings(t)
	ids := func(cfg *Config) []component.ID {
		e, err := newGatewayExtension(set, cfg)
		require.NoError(t, err)
		return e.Dependencies()
	}
	require.Empty(t, ids(example(t, "minimal")))
	got := ids(example(t, "every_key"))
	require.Len(t, got, 4)
	require.True(t, slices.Contains(got, component.MustNewID("oauth2client")))
	require.True(t, slices.Contains(got, component.MustNewIDWithName("basicauth", "agents")))
	require.True(t, slices.Contains(got, component.MustNewID("ratelimiter")))
	require.True(t, slices.Contains(got, component.MustNewIDWithName("basicauth", "operators")))
}
