package e2e

import (
	"fmt"
	"net/http"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/gorilla/websocket"
	"github.com/open-telemetry/opamp-go/protobufs"
	"github.com/stretchr/testify/require"
)

// matrixServer is a server as the matrix needs it. It lets in who has the key "right" only, offers each agent that is new a
// heartbeat of a second, and asks each that it does not know for its state.
type matrixServer struct {
	url     string
	known   func(uuid.UUID) Known
	push    func(uuid.UUID, *protobufs.ServerToAgent)
	restart func()
	// check is for the end: whether all came the way that this server is there for.
	check func(*testing.T, *Gateway)
}

// matrixServers are the columns.
var matrixServers = []struct {
	name  string
	start func(*testing.T) *matrixServer
}{
	{"WebSocket, with the capability", func(t *testing.T) *matrixServer {
		t.Helper()
		return startMatrixServer(t, false, func(t *testing.T, g *Gateway) {
			t.Helper()
			require.Empty(t, g.log.with("from now on each agent is verified"))
		})
	}},
	{"WebSocket, without", func(t *testing.T) *matrixServer {
		t.Helper()
		return startMatrixServer(t, true, func(t *testing.T, g *Gateway) {
			t.Helper()
			require.Len(t, g.log.with("from now on each agent is verified"), 1)
		})
	}},
	{"plain HTTP", func(t *testing.T) *matrixServer {
		t.Helper()
		s := newPostedServer(t)
		s.onItsOwn()
		return &matrixServer{url: s.url(), known: s.known, push: s.push, restart: s.restartOnItsOwn, check: s.wantAsSpecified}
	}},
}

func startMatrixServer(t *testing.T, ordinary bool, check func(*testing.T, *Gateway)) *matrixServer {
	t.Helper()
	s := startServer(t, serverOptions{ordinary: ordinary, judge: onlyWithKey, heartbeat: time.Second})
	return &matrixServer{
		url:     s.url(),
		known:   s.known,
		push:    func(uid uuid.UUID, m *protobufs.ServerToAgent) { s.send(t, uid, m) },
		restart: func() { s.stop(t); s.start(t) },
		check:   check,
	}
}

func (s *matrixServer) wantAgent(t *testing.T, uid uuid.UUID, what string, is func(Known) bool) {
	t.Helper()
	eventually(t, func() string {
		if known := s.known(uid); !is(known) {
			return fmt.Sprintf("the server does not see that the agent %s: %+v", what, known)
		}
		return ""
	})
}

// matrixAgent is a row: a program that is an agent, over one of its transports.
type matrixAgent struct {
	name string
	http bool
	// start starts one with this UID and key, and returns how to read its log and how it leaves.
	start func(t *testing.T, url string, uid uuid.UUID, key string) (log func() string, leave func())
	// configured agents take configurations. Others are asked for their state, which is all that a server has for them.
	configured bool
	// end is how it leaves.
	end string
}

// matrixAgents are the rows.
var matrixAgents = []matrixAgent{
	{name: "opamp-go's client, WebSocket", start: startLibraryAgent, configured: true, end: "stopped"},
	{name: "opamp-go's client, plain HTTP", start: startLibraryAgent, configured: true, end: "stopped", http: true},
	{name: "`opamp` extension, WebSocket", start: startExtensionAgent, end: "killed"},
	{name: "`opamp` extension, plain HTTP", start: startExtensionAgent, end: "killed", http: true},
	{name: "supervisor, WebSocket", start: startSupervisorAgent, configured: true, end: "stopped"},
	{name: "supervisor, plain HTTP", start: startSupervisorAgent, configured: true, end: "stopped", http: true},
}

func startLibraryAgent(t *testing.T, url string, uid uuid.UUID, as string) (log func() string, leave func()) {
	t.Helper()
	a := startAgent(t, as, url, agentOptions{headers: key(as), uid: uid, heartbeat: time.Second})
	return func() string {
		a.mu.Lock()
		defer a.mu.Unlock()
		return strings.Join(a.log, "\n")
	}, a.stop
}

func startExtensionAgent(t *testing.T, url string, uid uuid.UUID, as string) (log func() string, leave func()) {
	t.Helper()
	c := newConfig()
	c.set("service::extensions", []any{"opamp"})
	c.set("extensions::opamp::instance_uid", uid.String())
	transport := "ws"
	if strings.HasPrefix(url, "http") {
		transport = "http"
		c.set("extensions::opamp::server::http::polling_interval", "1s")
	}
	c.set("extensions::opamp::server::"+transport+"::endpoint", url)
	c.set("extensions::opamp::server::"+transport+"::headers", map[string]any{"Authorization": "Secret-Key " + as})
	agent := startCollector(t, as, c)
	return agent.log.String, func() {
		agent.Signal(t, syscall.SIGKILL)
		agent.wantExit(t)
	}
}

func startSupervisorAgent(t *testing.T, url string, uid uuid.UUID, as string) (log func() string, leave func()) {
	t.Helper()
	supervisor := startSupervisor(t, url, uid, func(c config) {
		c.set("server::headers", map[string]any{"Authorization": "Secret-Key " + as})
	})
	return supervisor.log.String, func() {
		supervisor.Signal(t, syscall.SIGTERM)
		supervisor.wantExit(t)
	}
}

// matrixCell is one agent at one server.
type matrixCell struct {
	server  *matrixServer
	gateway *Gateway
	agent   *matrixAgent
	uid     uuid.UUID
	former  uuid.UUID // before it was renamed
	leave   func()
}

// matrixStep is one thing that is tried.
type matrixStep struct {
	name string
	try  func(*matrixCell, *testing.T)
}

// steps are the things that are tried with the agent, in order.
func (a *matrixAgent) steps() []matrixStep {
	push := matrixStep{"asked for its state", (*matrixCell).askForState}
	if a.configured {
		push = matrixStep{"configured", (*matrixCell).configure}
	}
	return []matrixStep{
		{"refused", (*matrixCell).refuse},
		{"let in", (*matrixCell).letIn},
		push,
		{"renamed", (*matrixCell).rename},
		{"back after a restart of the server", (*matrixCell).restart},
		{a.end, (*matrixCell).gone},
	}
}

// url is where agents of this kind find the gateway.
func (c *matrixCell) url() string {
	if c.agent.http {
		return c.gateway.httpURL()
	}
	return c.gateway.url()
}

// refuse has an agent with a wrong key come, which is told the server's status; to whoever reads them, the headers, too.
func (c *matrixCell) refuse(t *testing.T) {
	t.Helper()
	mallory := uuid.Must(uuid.NewV7())
	log, leave := c.agent.start(t, c.url(), mallory, "wrong")
	eventually(t, func() string {
		if !strings.Contains(log(), "401") {
			return "the agent's log says nothing of 401"
		}
		return ""
	})
	require.Zero(t, c.server.known(mallory).Messages)
	leave()

	eventually(t, func() string {
		resp := c.knock(t, mallory, "wrong")
		if resp.StatusCode == http.StatusUnauthorized && resp.Header.Get("WWW-Authenticate") == "Secret-Key" {
			return ""
		}
		return fmt.Sprintf("the answer is %s, %v", resp.Status, resp.Header)
	})
}

// knock returns the answer to a bare request of an agent of this kind.
func (c *matrixCell) knock(t *testing.T, uid uuid.UUID, as string) *http.Response {
	t.Helper()
	if c.agent.http {
		p := newPoller(c.url(), uid)
		p.key = "Secret-Key " + as
		resp, _ := p.post(t, p.status(t, nil))
		return resp
	}
	ws, resp, err := dialRaw(c.url(), key(as), nil)
	if err == nil {
		// Over plain HTTP the server says what it thinks of an agent only when this has said something.
		a := newRaw(t, ws)
		a.listen()
		a.send(t, &protobufs.AgentToServer{})
		a.wantClosed(t, websocket.ClosePolicyViolation)
	}
	require.NotNil(t, resp, "%v", err)
	return resp
}

func (c *matrixCell) letIn(t *testing.T) {
	t.Helper()
	_, c.leave = c.agent.start(t, c.url(), c.uid, "right")
	c.server.wantAgent(t, c.uid, "describes itself and is healthy", func(k Known) bool {
		return isConnected(k) && k.Health.GetHealthy()
	})
}

func (c *matrixCell) askForState(t *testing.T) {
	t.Helper()
	before := c.server.known(c.uid).Descriptions
	c.server.push(c.uid, &protobufs.ServerToAgent{Flags: uint64(protobufs.ServerToAgentFlags_ServerToAgentFlags_ReportFullState)})
	c.server.wantAgent(t, c.uid, "says its state again", func(k Known) bool { return k.Descriptions > before })
}

func (c *matrixCell) configure(t *testing.T) {
	t.Helper()
	otlp := freeAddress(t)
	c.server.push(c.uid, &protobufs.ServerToAgent{RemoteConfig: &protobufs.AgentRemoteConfig{
		ConfigHash: []byte("first"),
		Config: &protobufs.AgentConfigMap{ConfigMap: map[string]*protobufs.AgentConfigFile{"": {ContentType: "text/yaml", Body: []byte(`
receivers: {otlp: {protocols: {http: {endpoint: "` + otlp + `"}}}}
exporters: {debug: {}}
service: {pipelines: {logs: {receivers: [otlp], exporters: [debug]}}}
`)}}},
	}})
	c.server.wantAgent(t, c.uid, "has applied its configuration, and reports it", func(k Known) bool {
		return k.ConfigStatus.GetStatus() == protobufs.RemoteConfigStatuses_RemoteConfigStatuses_APPLIED &&
			string(k.ConfigStatus.GetLastRemoteConfigHash()) == "first" &&
			strings.Contains(configText(k.EffectiveConfig.GetConfigMap()), otlp)
	})
}

func (c *matrixCell) rename(t *testing.T) {
	t.Helper()
	next := uuid.Must(uuid.NewV7())
	c.server.push(c.uid, &protobufs.ServerToAgent{
		AgentIdentification: &protobufs.AgentIdentification{NewInstanceUid: next[:]},
		Flags:               uint64(protobufs.ServerToAgentFlags_ServerToAgentFlags_ReportFullState), // so that it speaks at once
	})
	c.former, c.uid = c.uid, next
	c.server.wantAgent(t, next, "speaks under its new UID", isConnected)
	require.False(t, c.server.known(c.former).Goodbye)
}

// restart has the server forget everybody. It is not to take until the agent's next heartbeat, of 30 s, that it knows it again.
func (c *matrixCell) restart(t *testing.T) {
	t.Helper()
	c.server.restart()
	within(t, 20*time.Second, func() string {
		if known := c.server.known(c.uid); !isConnected(known) {
			return fmt.Sprintf("the agent is not back: %+v", known)
		}
		return ""
	})
}

func (c *matrixCell) gone(t *testing.T) {
	t.Helper()
	c.leave()
	c.server.wantAgent(t, c.uid, "is gone, as it or the gateway for it says", func(k Known) bool { return k.Goodbye })
	require.Zero(t, c.server.known(c.former).Messages, "nothing was said of it under the UID that it had once, since the server's restart")
}

// Each agent, over each of its transports, at each kind of server: refused, let in, pushed to, renamed, back, gone.
func TestEveryAgentAtEveryServer(t *testing.T) {
	t.Parallel()
	for i := range matrixAgents {
		agent := &matrixAgents[i]
		for _, server := range matrixServers {
			t.Run(strings.ReplaceAll(agent.name, "`", "")+"/"+server.name, func(t *testing.T) {
				t.Parallel()
				c := &matrixCell{server: server.start(t), agent: agent, uid: uuid.Must(uuid.NewV7())}
				c.gateway = startGateway(t, c.server.url, quickPolls, func(c config) {
					c.gateway("server::headers::Authorization", "Secret-Key right")
				})
				for _, step := range agent.steps() {
					start := time.Now()
					step.try(c, t)
					t.Logf("%s: %s", step.name, time.Since(start).Round(10*time.Millisecond))
				}
				c.server.check(t, c.gateway)
			})
		}
	}
}

// The documentation has a table of what is tried, cell by cell.
func TestTableOfAgentsAndServers(t *testing.T) {
	t.Parallel()
	table := "| |"
	for _, server := range matrixServers {
		table += " " + server.name + " |"
	}
	table += "\n|---|" + strings.Repeat("---|", len(matrixServers)) + "\n"
	for _, agent := range matrixAgents {
		var tried []string
		for _, step := range agent.steps() {
			tried = append(tried, step.name)
		}
		table += "| " + agent.name + " |" + strings.Repeat(" "+strings.Join(tried, ", ")+" |", len(matrixServers)) + "\n"
	}
	require.Contains(t, string(read(t, "../docs/compatibility.md")), "\n"+table+"\n")
}
