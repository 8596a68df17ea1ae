package e2e

import (
	"crypto/tls"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// ofGateway returns the lines of the gateway's log that the gateway itself wrote, at these levels.
func (g *Gateway) ofGateway(levels ...string) (lines []string) {
	for _, line := range g.log.with("opampgateway") {
		if slices.ContainsFunc(levels, func(level string) bool { return strings.Contains(line, "\t"+level+"\t") }) {
			lines = append(lines, line)
		}
	}
	return lines
}

// Every reason and every outcome that docs/metrics.md names is in the metrics from the start, as 0, and
// no other.
func TestMetricsAreThereFromTheStart(t *testing.T) {
	t.Parallel()
	page := string(read(t, "../docs/metrics.md"))
	server := startServer(t, serverOptions{})
	metrics := freeAddress(t)
	gateway := startGateway(t, server.url(), func(c config) { c.metrics(t, metrics) })
	gateway.wantLinks(t, 3)
	for _, test := range []struct{ metric, attribute, section string }{
		{"faults", "reason", "reasons"}, {"admissions", "outcome", "outcomes"},
	} {
		_, section, _ := strings.Cut(page, "<!-- "+test.section)
		section, _, _ = strings.Cut(section, "<!-- end of "+test.section)
		named := regexp.MustCompile("(?m)^\\| `([a-z_]+)`").FindAllStringSubmatch(section, -1)
		require.NotEmpty(t, named, "%s in docs/metrics.md", test.section)
		want := map[string]float64{}
		for _, name := range named {
			want[fmt.Sprintf("otelcol_opampgateway_%s{%s=%q}", test.metric, test.attribute, name[1])] = 0
		}
		got := samples(t, metrics)
		maps.DeleteFunc(got, func(name string, _ float64) bool {
			return !strings.HasPrefix(name, "otelcol_opampgateway_"+test.metric+"{")
		})
		require.Equal(t, want, got)
	}
}

// The log says where agents connect, and whether with TLS.
func TestListeningIsLogged(t *testing.T) {
	t.Parallel()
	authority := newAuthority(t, "inside")
	server := startServer(t, serverOptions{})
	plain := startGateway(t, server.url())
	secure := startGateway(t, server.url(), withTLS(authority.issue(t, "gateway")))
	for gateway, secured := range map[*Gateway]string{plain: `"tls": false`, secure: `"tls": true`} {
		gateway.wantLog(t, "\tinfo\t", "listening", gateway.address, secured)
	}
}

// The log says who was refused, by whom and why, but not what the agent tried as its key.
func TestRefusedAgentIsLogged(t *testing.T) {
	t.Parallel()
	server := startServer(t, serverOptions{judge: onlyWithKey})
	gateway := startGateway(t, server.url())
	gateway.wantLinks(t, 3)
	headers := key("wrong")
	headers.Set("User-Agent", "mallory/1.0")
	headers.Set("Agent-ID", "the-id-of-mallory")
	for range 50 {
		_, resp, err := dialRaw(gateway.url(), headers, nil)
		wantStatus(t, http.StatusUnauthorized, resp, err)
	}
	gateway.wantLog(t, "\tinfo\t", "refused", `"http.response.status_code": 401`, `"user_agent.original": "mallory/1.0"`, "the-id-of-mallory", "client.address")
	require.Less(t, len(gateway.log.with("refused", "mallory")), 20, "lines about one who tries 50 times")
	require.NotContains(t, gateway.log.String(), "wrong")
}

// A message of the server's that is too large is in the log, with whom it was for and its size.
func TestOversizedMessageOfServerIsLogged(t *testing.T) {
	t.Parallel()
	server := startBareServer(t)
	gateway := startGateway(t, server.url(), func(c config) { c.gateway("max_message_size", 64<<10) })
	gateway.wantLinks(t, 3)
	alice := connectRaw(t, gateway.url(), nil)
	alice.exchange(t, "hello")
	frame := serverFrame(t, alice.uid[:], strings.Repeat("x", 100<<10))
	require.NoError(t, server.home(t, alice.uid).pushFrame(2, frame))
	gateway.wantLog(t, "\twarn\t", alice.uid.String(), fmt.Sprint(len(frame)))
	alice.exchange(t, "still here")
}

// The log says what a server answers that does not want the gateway: the first line, and where else
// it wants it to go.
func TestAnswerOfServerIsLogged(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name   string
		answer string
		wants  []string
	}{
		{
			"refusal", "HTTP/1.1 403 Forbidden\r\nContent-Length: 67\r\n\r\nlicense allows 2 connections per organisation\nmore that is not said\n",
			[]string{"403", "license allows 2 connections per organisation"},
		},
		{
			"redirect", "HTTP/1.1 307 Temporary Redirect\r\nLocation: https://me:mystery@other.example/v1/opamp?key=mystery\r\nContent-Length: 0\r\n\r\n",
			[]string{"307", "other.example/v1/opamp"},
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			listener, err := net.Listen("tcp", "127.0.0.1:0")
			require.NoError(t, err)
			done := make(chan struct{})
			t.Cleanup(func() {
				listener.Close()
				<-done
			})
			go func() { // ends with the listener
				defer close(done)
				for {
					conn, err := listener.Accept()
					if err != nil {
						return
					}
					_, _ = conn.Read(make([]byte, 4096))
					_, _ = io.WriteString(conn, test.answer)
					conn.Close()
				}
			}()
			gateway := launchGateway(t, "gateway", gatewayConfig("ws://"+listener.Addr().String(), freeAddress(t)))
			gateway.wantLog(t, append([]string{"\twarn\t", "cannot connect to the server"}, test.wants...)...)
			require.NotContains(t, gateway.log.String(), "mystery")
			require.NotContains(t, gateway.log.String(), "more that is not said")
		})
	}
}

// What may let anybody in, or keys out, is legal; the log warns of it, once.
func TestWarningsAtStart(t *testing.T) {
	t.Parallel()
	authority := newAuthority(t, "inside")
	identity := authority.issue(t, "gateway")
	warnings := []string{"agent_admission", "ws://", "insecure_skip_verify", "below 1.2"}
	// Nothing can be sent to this address, so that none of these leaves the machine.
	const elsewhere = "255.255.255.255:4320"
	for _, test := range []struct {
		name     string
		endpoint string
		edit     func(config)
		warns    []string
	}{
		{"nothing", "ws://127.0.0.1:9", func(c config) { c.gateway("server::headers::Authorization", "Secret-Key x") }, nil},
		{"accept", "ws://127.0.0.1:9", func(c config) { c.gateway("server::agent_admission", "accept") }, warnings[:1]},
		{"accept with certificates", "ws://127.0.0.1:9", func(c config) {
			c.gateway("server::agent_admission", "accept")
			withTLS(identity)(c)
			c.gateway("listener::tls::client_ca_file", authority.file)
		}, nil},
		{"key in clear", "ws://" + elsewhere, func(c config) { c.gateway("server::headers::Authorization", "Secret-Key x") }, warnings[1:2]},
		{"key in TLS", "wss://" + elsewhere, func(c config) { c.gateway("server::headers::Authorization", "Secret-Key x") }, nil},
		{"any certificate", "wss://127.0.0.1:9", func(c config) { c.gateway("server::tls::insecure_skip_verify", true) }, warnings[2:3]},
		{"old TLS to the server", "wss://127.0.0.1:9", func(c config) { c.gateway("server::tls::min_version", "1.1") }, warnings[3:]},
		{"old TLS to agents", "ws://127.0.0.1:9", func(c config) {
			withTLS(identity)(c)
			c.gateway("listener::tls::min_version", "1.0")
		}, warnings[3:]},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			gateway := launchGateway(t, "gateway", gatewayConfig(test.endpoint, freeAddress(t)), test.edit)
			gateway.wantReady(t, 1)
			lines := slices.DeleteFunc(gateway.ofGateway("warn"), func(line string) bool { return strings.Contains(line, "cannot connect to the server") })
			require.Len(t, lines, len(test.warns))
			for i, part := range test.warns {
				require.Contains(t, lines[i], part)
			}
		})
	}
}

// One end of a connection speaks TLS and the other does not: the log says so, and what to do.
func TestTLSMistakes(t *testing.T) {
	t.Parallel()
	authority := newAuthority(t, "inside")
	server := startServer(t, serverOptions{})
	plain := startGateway(t, server.url())
	secure := startGateway(t, server.url(), withTLS(authority.issue(t, "gateway")))

	t.Run("plain agent, listener with TLS", func(t *testing.T) {
		_, resp, err := dialRaw("ws://"+secure.address, nil, nil)
		wantStatus(t, http.StatusBadRequest, resp, err)
		secure.wantLog(t, "\twarn\t", "client.address", "wss://")
	})
	t.Run("agent with TLS, plain listener", func(t *testing.T) {
		_, _, err := dialRaw("wss://"+plain.address, nil, authority.mutual(nil))
		require.Error(t, err)
		plain.wantLog(t, "\twarn\t", "client.address", "TLS", "ws://")
	})
	t.Run("plain gateway, server with TLS", func(t *testing.T) {
		tlsServer := startServer(t, serverOptions{tls: &tls.Config{Certificates: []tls.Certificate{authority.issue(t, "server").cert}, MinVersion: tls.VersionTLS12}})
		gateway := startGateway(t, "ws://"+tlsServer.address)
		gateway.wantLog(t, "\twarn\t", "cannot connect to the server", "wss://")
	})
	t.Run("gateway with TLS, plain server", func(t *testing.T) {
		gateway := startGateway(t, "wss://"+server.address)
		gateway.wantLog(t, "\twarn\t", "cannot connect to the server", "does not speak TLS", "it seems to want ws://")
	})
}

// Probes connect and leave, every few seconds for years. No line of the log is about them.
func TestProbes(t *testing.T) {
	t.Parallel()
	authority := newAuthority(t, "inside")
	server := startServer(t, serverOptions{})
	for name, edits := range map[string][]func(config){"plain": nil, "TLS": {withTLS(authority.issue(t, "gateway"))}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			metrics := freeAddress(t)
			gateway := startGateway(t, server.url(), append(edits, func(c config) { c.metrics(t, metrics) })...)
			gateway.wantLinks(t, 3)
			before := gateway.ofGateway("info", "warn", "error")
			for i := range 20 {
				conn, err := net.Dial("tcp", gateway.address)
				require.NoError(t, err)
				if i%2 == 1 {
					require.NoError(t, conn.(*net.TCPConn).SetLinger(0)) // its end is a reset
				}
				conn.Close()
			}
			throughout(t, 2*time.Second, func() string {
				if after := gateway.ofGateway("info", "warn", "error"); len(after) > len(before) {
					return "probes are logged: " + after[len(before)]
				}
				return ""
			})
			for name, value := range samples(t, metrics) {
				if strings.HasPrefix(name, "otelcol_opampgateway_admissions") || strings.HasPrefix(name, "otelcol_opampgateway_faults") {
					require.Zero(t, value, name)
				}
			}
		})
	}
}

// Keys in the query of the server's URL, and passwords of proxies, are in no line of the log, at
// any level, however the connection fails.
func TestSecretsInURLs(t *testing.T) {
	t.Parallel()
	const secret = "mystery"
	refused := freeAddress(t)
	proxy := startProxy(t, refused)
	for _, test := range []struct{ name, endpoint, proxy string }{
		{"server that is away", "ws://" + refused + "/v1/opamp?key=" + secret, ""},
		{"proxy that is away", "ws://opamp.invalid/v1/opamp?key=" + secret, "http://me:" + secret + "@" + refused},
		{"proxy that does not get there", "ws://opamp.invalid/v1/opamp?key=" + secret, "http://me:" + secret + "@" + proxy.address},
		{"SOCKS proxy that is away", "ws://opamp.invalid/v1/opamp?key=" + secret, "socks5://me:" + secret + "@" + refused},
		{"proxy of an unknown kind", "ws://opamp.invalid/v1/opamp?key=" + secret, "gopher://me:" + secret + "@" + refused},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			c := gatewayConfig(test.endpoint, freeAddress(t))
			c.set("service::telemetry::logs::level", "debug")
			gateway := launchGatewayIn(t, []string{"HTTP_PROXY=" + test.proxy, "NO_PROXY="}, "gateway", c)
			gateway.wantLog(t, "cannot connect to the server")
			gateway.Signal(t, os.Interrupt)
			gateway.wantExit(t)
			require.NotContains(t, gateway.log.String(), secret)
		})
	}

	t.Run("endpoint that is wrong", func(t *testing.T) {
		t.Parallel()
		for _, endpoint := range []string{"ftp://opamp.example?key=" + secret, "ws://?key=" + secret, "ws://opamp.example:x?key=" + secret, "ws://me:" + secret + "@opamp.example", "ws://me:" + secret + "/x@opamp.example"} {
			code, output := validate(t, gatewayConfig(endpoint, "127.0.0.1:0"))
			require.Equal(t, 1, code)
			require.NotContains(t, output, secret)
		}
	})
}
