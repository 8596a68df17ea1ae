package e2e

import (
	"crypto/tls"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/opampgateway/opampgateway/e2e/fault"
)

// pair is two gateways behind HAProxy, all with the files of deploy/.
type pair struct {
	server    *Server
	authority *Authority
	identity  *Identity
	passed    bool           // TLS is passed on to the gateways; otherwise it ends at HAProxy
	ports     [2]string      // of listener and health page, on every host
	line      [2]*fault.Line // of each gateway to the server
	gateways  [2]*Process    // nil while it is away
	url       string         // for agents
}

// haproxyAddress is from where HAProxy connects, and drainTime over how long gateways let their agents go.
const haproxyAddress, drainTime = "127.0.0.10", 6 * time.Second

// host is a gateway's own address.
func (p *pair) host(gateway int) string { return fmt.Sprintf("127.0.0.%d", 11+gateway) }

func (p *pair) startGateway(t *testing.T, gateway int) {
	t.Helper()
	_, metrics, err := net.SplitHostPort(freeAddress(t))
	require.NoError(t, err)
	addressFrom := "x_forwarded_for"
	if p.passed {
		addressFrom = "proxy_protocol"
	}
	args := []string{"--config=../deploy/config.yaml", healthGate}
	if p.passed {
		args = append(args, "--config=../deploy/config-tls.yaml")
	}
	p.gateways[gateway] = startProcessIn(t, []string{
		"OPAMP_ENDPOINT=ws://" + p.line[gateway].Address() + "/v1/opamp", "OPAMP_SECRET_KEY=0123456789",
		fmt.Sprintf("GATEWAY_NAME=gateway-%d", gateway+1), "GATEWAY_GRACE=20s", "GATEWAY_DRAIN=" + drainTime.String(),
		"GATEWAY_PROXIES=[" + haproxyAddress + "]", "GATEWAY_ADDRESS_FROM=" + addressFrom,
		"GATEWAY_LISTEN=" + net.JoinHostPort(p.host(gateway), p.ports[0]),
		"HEALTH_LISTEN=" + net.JoinHostPort(p.host(gateway), p.ports[1]),
		"METRICS_HOST=" + p.host(gateway), "METRICS_PORT=" + metrics,
		"GATEWAY_CERT=" + p.identity.certFile, "GATEWAY_KEY=" + p.identity.keyFile,
	}, fmt.Sprintf("gateway-%d", gateway+1), collectorProgram(t), args...)
}

// wantLinks waits until the gateway has all its links.
func (p *pair) wantLinks(t *testing.T, gateway int) {
	t.Helper()
	eventually(t, func() string {
		n := 0
		for _, name := range p.server.linkNames() {
			if strings.HasPrefix(name, fmt.Sprintf("gateway-%d/", gateway+1)) {
				n++
			}
		}
		if n != 3 {
			return fmt.Sprintf("gateway-%d has %d links, want 3", gateway+1, n)
		}
		return ""
	})
}

// at returns how many agents the server has at a gateway.
func (p *pair) at(gateway int) (n int) {
	for link, agents := range p.server.load() {
		if strings.HasPrefix(link, fmt.Sprintf("gateway-%d/", gateway+1)) {
			n += agents
		}
	}
	return n
}

// wantAllAt waits until a gateway has all agents, and each of them is answered there. It returns how long
// that took.
func (p *pair) wantAllAt(t *testing.T, gateway int, agents []*Agent, limit time.Duration) {
	t.Helper()
	start := time.Now()
	within(t, limit, func() string {
		if n := p.at(gateway); n != len(agents) {
			return fmt.Sprintf("the server has %d of %d agents at gateway-%d: %v", n, len(agents), gateway+1, p.server.load())
		}
		return ""
	})
	t.Logf("all %d agents are at gateway-%d after %s", len(agents), gateway+1, time.Since(start).Round(10*time.Millisecond))
	p.wantServed(t, agents)
}

// wantServed checks that each agent is connected at the server, and answered.
func (p *pair) wantServed(t *testing.T, agents []*Agent) {
	t.Helper()
	for _, a := range agents {
		p.server.wantAgent(t, a.id(), "is connected", isConnected)
		text := fmt.Sprintf("%s at %d", a.name, time.Now().UnixNano())
		a.say(t, text)
		a.wantHeard(t, text)
	}
}

func startPair(t *testing.T, config string) *pair {
	t.Helper()
	p := &pair{server: startServer(t, serverOptions{}), authority: newAuthority(t, "inside"), passed: config == "haproxy.cfg"}
	p.identity = p.authority.issue(t, "gateways")
	for i := range p.ports {
		_, port, err := net.SplitHostPort(freeAddress(t))
		require.NoError(t, err)
		p.ports[i] = port
	}
	for i := range p.gateways {
		p.line[i] = through(t, p.server.address)
		p.startGateway(t, i)
	}
	listen := freeAddress(t)
	pem := filepath.Join(t.TempDir(), "opamp.pem")
	require.NoError(t, os.WriteFile(pem, []byte(readText(t, p.identity.certFile)+readText(t, p.identity.keyFile)), 0o600))
	haproxy, err := exec.LookPath("/usr/sbin/haproxy") // which is on the PATH of root only
	if err != nil {
		haproxy, err = exec.LookPath("haproxy")
	}
	require.NoError(t, err, "install it: make haproxy")
	file := filepath.Join(t.TempDir(), config)
	text := readText(t, "../deploy/haproxy/"+config)
	// Otherwise HAProxy and agents have the same address here.
	text = strings.Replace(text, "default-server ", "default-server source "+haproxyAddress+" ", 1)
	if os.Geteuid() != 0 { // who is not root cannot become another user
		text = strings.NewReplacer("user haproxy", "", "group haproxy", "").Replace(text)
	}
	require.NoError(t, os.WriteFile(file, []byte(text), 0o600))
	check := exec.Command(haproxy, "-c", "-f", file) // with the defaults, which an operator replaces
	check.Env = []string{"CERT=" + pem}
	output, err := check.CombinedOutput()
	require.NoError(t, err, string(output))
	balancer := startProcessIn(t, []string{
		"LISTEN=" + listen, "CERT=" + pem, "MAXCONN=2000", "HEALTH_PORT=" + p.ports[1],
		"GATEWAY_1=" + net.JoinHostPort(p.host(0), p.ports[0]), "GATEWAY_2=" + net.JoinHostPort(p.host(1), p.ports[0]),
	}, "haproxy", haproxy, "-db", "-f", file)
	p.url = "wss://" + listen + "/v1/opamp"
	for i := range p.gateways {
		p.wantLinks(t, i)
	}
	eventually(t, func() string {
		if balancer.ended() {
			return "haproxy has ended"
		}
		if !dialable(listen) {
			return "haproxy does not listen"
		}
		return ""
	})
	return p
}

// maintain stops gateway-2: its agents go to the other one bit by bit, and whoever comes meanwhile at once. It returns the
// agents there are then.
func (p *pair) maintain(t *testing.T, agents []*Agent, options agentOptions) []*Agent {
	t.Helper()
	before, start := p.at(1), time.Now()
	p.gateways[1].Signal(t, syscall.SIGTERM)
	time.Sleep(drainTime / 4) // what takes time here is what is tested
	newcomer := startAgent(t, "newcomer while gateway-2 drains", p.url, options)
	asked := time.Now()
	p.server.wantAgent(t, newcomer.id(), "is connected", isConnected)
	t.Logf("a newcomer is let in %s after it has come", time.Since(asked).Round(time.Millisecond))
	require.Less(t, time.Since(asked), 3*time.Second)
	newcomer.wantConnects(t, 1)
	agents = append(agents, newcomer)
	response, err := http.Get("http://" + net.JoinHostPort(p.host(1), p.ports[1]) + "/status")
	if err == nil { // the collector may have ended that before
		response.Body.Close()
		require.NotEqual(t, http.StatusOK, response.StatusCode, "nobody who asks takes it for ready")
	}
	time.Sleep(time.Until(start.Add(drainTime / 2)))
	require.InDelta(t, before/2, p.at(1), float64(before)/4, "half of the agents after half of the time")
	p.wantAllAt(t, 0, agents, 15*time.Second)
	code, _ := p.gateways[1].wantExit(t)
	require.Zero(t, code)
	t.Logf("gateway-2 has ended %s after it was told to", time.Since(start).Round(10*time.Millisecond))
	require.Less(t, time.Since(start), drainTime+4*time.Second)
	p.wantServed(t, agents)
	return agents
}

// Two gateways stand behind HAProxy, which passes TLS on or ends it. One is killed, one is stopped for
// maintenance, one loses its server: each time the agents are served by the other within seconds,
// whoever has come back gets the new ones, and the server ends with each agent once.
func TestHAProxy(t *testing.T) {
	t.Parallel()
	for _, config := range []string{"haproxy.cfg", "haproxy-tls.cfg"} {
		t.Run(config, func(t *testing.T) {
			t.Parallel()
			p := startPair(t, config)
			trust := func() agentOptions {
				return agentOptions{tls: &tls.Config{RootCAs: p.authority.mutual(nil).RootCAs, MinVersion: tls.VersionTLS12}}
			}
			agents := startAgents(t, 20, p.url, trust())
			p.wantServed(t, agents)
			require.Equal(t, 10, p.at(0), "leastconn")
			require.Equal(t, 10, p.at(1), "leastconn")

			p.gateways[0].Signal(t, syscall.SIGKILL)
			p.wantAllAt(t, 1, agents, 15*time.Second)

			p.startGateway(t, 0)
			p.wantLinks(t, 0)
			eventually(t, func() string { // HAProxy has it back, and newcomers go there
				agents = append(agents, startAgent(t, fmt.Sprintf("newcomer-%d", len(agents)), p.url, trust()))
				p.server.wantAgent(t, agents[len(agents)-1].id(), "is connected", isConnected)
				if n := p.at(0); n < 5 {
					return fmt.Sprintf("%d agents at gateway-1, which has come back", n)
				}
				return ""
			})
			require.GreaterOrEqual(t, p.at(1), 20, "who is connected is not moved")

			agents = p.maintain(t, agents, trust())

			p.startGateway(t, 1)
			p.wantLinks(t, 1)
			p.line[0].Refuse(true)
			for _, conn := range p.line[0].Conns() {
				conn.Reset()
			}
			p.wantAllAt(t, 1, agents, 45*time.Second)
			// Gateway-1 has fewer agents, and gets none nevertheless.
			start := time.Now()
			newcomer := startAgent(t, "newcomer", p.url, trust())
			agents = append(agents, newcomer)
			p.server.wantAgent(t, newcomer.id(), "is connected", isConnected)
			require.Less(t, time.Since(start), 5*time.Second, "HAProxy sends nobody to a gateway without links")
			newcomer.wantConnects(t, 1)

			// It has links again, and does not tell the server that its old agents have gone.
			p.line[0].Refuse(false)
			p.wantLinks(t, 0)
			throughout(t, 3*time.Second, func() string {
				if n := p.at(0) + p.at(1); n != len(agents) {
					return fmt.Sprintf("the server has %d agents, want %d: %v", n, len(agents), p.server.load())
				}
				return ""
			})
			p.wantServed(t, agents)

			asked := p.server.asked()
			for _, q := range asked {
				address, forwarded := q.RemoteAddress, q.Headers.Get("X-Forwarded-For")
				require.True(t, strings.HasPrefix(address, "127.0.0.1:"), "an agent's own, not HAProxy's: %s", address)
				require.Equal(t, !p.passed, forwarded == "127.0.0.1", "X-Forwarded-For: %q", forwarded)
			}
		})
	}
}
