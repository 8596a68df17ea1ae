package opampgateway

import (
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"time"

	"go.opentelemetry.io/collector/component/componentstatus"
	"go.opentelemetry.io/collector/config/confighttp"
	"go.opentelemetry.io/collector/config/confignet"
	"go.opentelemetry.io/collector/pdata/pcommon"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/opampgateway/opampgateway/internal/socket"
)

// sampled returns a logger that writes only the first few of each message in a while: for
// what may happen to thousands of agents at once. The metrics have the numbers.
func sampled(log *zap.Logger) *zap.Logger { return sampledTo(log, 5) }

// sampledTo is sampled for what names somebody, so that nearly always all are.
func sampledTo(log *zap.Logger, first int) *zap.Logger {
	const while = 10 * time.Second
	return log.WithOptions(zap.WrapCore(func(core zapcore.Core) zapcore.Core {
		return zapcore.NewSamplerWithOptions(core, while, first, 0)
	}))
}

// warnOfDangers says at start what is legal in cfg, and yet may let somebody in, or a key out.
func warnOfDangers(cfg *Config, log *zap.Logger) {
	listener, server := &cfg.Listener, &cfg.Server
	authenticated := listener.Auth.HasValue() || listener.TLS.HasValue() && listener.TLS.Get().ClientCAFile != ""
	if server.AgentAdmission == AdmissionAccept && !authenticated && listener.NetAddr.Transport != confignet.TransportTypeUnix {
		log.Warn("server::agent_admission is accept, and the listener does not authenticate: whoever reaches it is let in; see listener::auth and listener::tls::client_ca_file")
	}
	for i, text := range append([]string{server.Endpoint}, server.FallbackEndpoints...) {
		key := "server::endpoint"
		if i > 0 {
			key = fmt.Sprintf("server::fallback_endpoints[%d]", i-1)
		}
		endpoint, err := url.Parse(text)
		if err == nil && endpoint.Scheme == "ws" && (len(server.Headers) > 0 || server.Auth.HasValue()) && !isLoopback(endpoint.Hostname()) {
			log.Warn(key + " is ws://, so server::headers, server::auth, and what agents send, travel to another host in clear; use wss://")
		}
		if err == nil && endpoint.Scheme == "http" && !isLoopback(endpoint.Hostname()) {
			log.Warn(key + " is http://, so what agents send, and the keys in their headers, travel to another host in clear; use https://")
		}
	}
	if server.TLS.InsecureSkipVerify {
		log.Warn("server::tls::insecure_skip_verify is set: whoever answers at the server's address gets the keys of gateway and agents")
	}
	if isOldTLS(server.TLS.MinVersion) {
		log.Warn("server::tls::min_version is below 1.2, which is not safe any more")
	}
	if listener.TLS.HasValue() && isOldTLS(listener.TLS.Get().MinVersion) {
		log.Warn("listener::tls::min_version is below 1.2, which is not safe any more")
	}
}

// warnOfPage says at start what is legal of the status page, and yet may show it to somebody.
func warnOfPage(page *confighttp.ServerConfig, log *zap.Logger) {
	host, _, err := net.SplitHostPort(page.NetAddr.Endpoint)
	local := page.NetAddr.Transport == confignet.TransportTypeUnix || err == nil && isLoopback(host)
	authenticated := page.Auth.HasValue() || page.TLS.HasValue() && page.TLS.Get().ClientCAFile != ""
	if !local && !authenticated {
		log.Warn("status::endpoint is not of this host alone, and there is no authentication: whoever reaches it sees which agents there are; see status::auth and status::tls::client_ca_file")
	}
}

func isOldTLS(version string) bool { return version == "1.0" || version == "1.1" }

func isLoopback(host string) bool {
	ip, err := netip.ParseAddr(host)
	return host == "localhost" || err == nil && ip.IsLoopback()
}

// reportLink tells the collector whether there is a link to the server and, if that has several endpoints, at which.
func (g *gateway) reportLink(err error) {
	state := componentstatus.StatusOK
	if err != nil {
		state = componentstatus.StatusRecoverableError
	}
	t, where := g.pool.target.Load(), pcommon.NewMap()
	if len(t.sites) > 1 {
		where.PutStr("url.full", socket.Place(t.endpoint))
		where.PutInt("opampgateway.endpoint", int64(t.at))
	}
	g.report(componentstatus.NewEvent(state, componentstatus.WithError(err), componentstatus.WithAttributes(where)))
}
