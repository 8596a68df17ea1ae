package e2e

import (
	"context"
	"crypto/tls"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/open-telemetry/opamp-go/client"
	"github.com/open-telemetry/opamp-go/client/types"
	"github.com/open-telemetry/opamp-go/protobufs"
	"github.com/stretchr/testify/require"
)

// Agent is an agent on opamp-go's client library.
type Agent struct {
	name   string
	client client.OpAMPClient
	stop   func()

	// mu guards all below.
	mu           sync.Mutex
	uid          uuid.UUID
	connects     int
	failures     []time.Time    // attempts to connect that failed
	log          []string       // of the library
	heard        map[string]int // chat, with how often
	news         chan struct{}  // closed and renewed when there is more of it
	capabilities [][]string     // each time the server stated its custom capabilities
	config       *protobufs.AgentConfigMap
}

type agentOptions struct {
	headers   http.Header
	tls       *tls.Config
	heartbeat time.Duration // 0 for none; over plain HTTP, the interval of polls
	compress  bool
	uid       uuid.UUID // one of its own unless set
}

// startAgent starts an agent; it does not wait until it is connected. It is stopped at the
// end of the test.
func startAgent(t *testing.T, name, url string, opts agentOptions) *Agent {
	t.Helper()
	if opts.uid == uuid.Nil {
		opts.uid = uuid.New()
	}
	a := &Agent{name: name, uid: opts.uid, heard: map[string]int{}, news: make(chan struct{})}
	a.client = client.NewWebSocket(a)
	if strings.HasPrefix(url, "http") {
		a.client = client.NewHTTP(a)
	}
	attribute := func(key, value string) *protobufs.KeyValue {
		return &protobufs.KeyValue{Key: key, Value: &protobufs.AnyValue{Value: &protobufs.AnyValue_StringValue{StringValue: value}}}
	}
	require.NoError(t, a.client.SetAgentDescription(&protobufs.AgentDescription{
		IdentifyingAttributes: []*protobufs.KeyValue{attribute("service.name", name)},
	}))
	require.NoError(t, a.client.SetHealth(&protobufs.ComponentHealth{Healthy: true}))
	require.NoError(t, a.client.SetCustomCapabilities(&protobufs.CustomCapabilities{Capabilities: []string{chat}}))
	can := protobufs.AgentCapabilities_AgentCapabilities_ReportsStatus |
		protobufs.AgentCapabilities_AgentCapabilities_ReportsHealth |
		protobufs.AgentCapabilities_AgentCapabilities_AcceptsRemoteConfig |
		protobufs.AgentCapabilities_AgentCapabilities_ReportsRemoteConfig |
		protobufs.AgentCapabilities_AgentCapabilities_ReportsEffectiveConfig |
		protobufs.AgentCapabilities_AgentCapabilities_ReportsHeartbeat
	require.NoError(t, a.client.SetCapabilities(&can))
	require.NoError(t, a.client.Start(context.Background(), types.StartSettings{
		OpAMPServerURL:    url,
		Header:            opts.headers,
		TLSConfig:         opts.tls,
		InstanceUid:       types.InstanceUid(a.uid),
		HeartbeatInterval: &opts.heartbeat,
		EnableCompression: opts.compress,
		Callbacks: types.Callbacks{
			OnConnect:          a.onConnect,
			OnConnectFailed:    a.onConnectFailed,
			OnMessage:          a.onMessage,
			GetEffectiveConfig: a.effectiveConfig,
		},
	}))
	a.stop = sync.OnceFunc(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		if err := a.client.Stop(ctx); err != nil {
			t.Errorf("stop %s: %v", name, err)
		}
	})
	t.Cleanup(func() {
		a.stop()
		if t.Failed() {
			t.Logf("%s: %s", name, a)
		}
	})
	return a
}

// startAgents starts n agents at once.
func startAgents(t *testing.T, n int, url string, opts agentOptions) []*Agent {
	t.Helper()
	agents := make([]*Agent, n)
	for i := range agents {
		agents[i] = startAgent(t, fmt.Sprintf("agent-%d", i), url, opts)
	}
	t.Cleanup(func() { stopAgents(agents) })
	return agents
}

// stopAgents stops agents at once; one after the other they would take their time.
func stopAgents(agents []*Agent) {
	var stopping sync.WaitGroup
	for _, a := range agents {
		stopping.Go(a.stop)
	}
	stopping.Wait()
}

func (a *Agent) onConnect(context.Context) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.connects++
}

func (a *Agent) onConnectFailed(context.Context, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.failures = append(a.failures, time.Now())
}

func (a *Agent) onMessage(ctx context.Context, m *types.MessageData) {
	a.mu.Lock()
	if m.CustomMessage != nil {
		a.heard[string(m.CustomMessage.GetData())]++
		close(a.news)
		a.news = make(chan struct{})
	}
	if m.CustomCapabilities != nil {
		a.capabilities = append(a.capabilities, m.CustomCapabilities.GetCapabilities())
	}
	if id, err := uuid.FromBytes(m.AgentIdentification.GetNewInstanceUid()); err == nil {
		a.uid = id
	}
	if m.RemoteConfig != nil {
		a.config = m.RemoteConfig.GetConfig()
	}
	a.mu.Unlock()
	if m.RemoteConfig != nil {
		_ = a.client.UpdateEffectiveConfig(ctx)
		_ = a.client.SetRemoteConfigStatus(&protobufs.RemoteConfigStatus{
			LastRemoteConfigHash: m.RemoteConfig.GetConfigHash(), Status: protobufs.RemoteConfigStatuses_RemoteConfigStatuses_APPLIED,
		})
	}
}

func (a *Agent) effectiveConfig(context.Context) (*protobufs.EffectiveConfig, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return &protobufs.EffectiveConfig{ConfigMap: a.config}, nil
}

// Debugf and Errorf take the library's log.
func (a *Agent) Debugf(context.Context, string, ...any) {}

// Errorf is the part of the log that tells what went wrong.
func (a *Agent) Errorf(_ context.Context, format string, v ...any) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.log = append(a.log, fmt.Sprintf(format, v...))
}

// say sends the server a chat message.
func (a *Agent) say(t *testing.T, text string) {
	t.Helper()
	require.NoError(t, a.trySay(text), "%s says %q", a.name, text)
}

func (a *Agent) trySay(text string) error {
	deadline := time.Now().Add(ceiling)
	for {
		sent, err := a.client.SendCustomMessage(chatMessage(text))
		if err == nil {
			return nil
		}
		if sent == nil || time.Now().After(deadline) {
			return err
		}
		select { // one at a time
		case <-sent:
		case <-time.After(time.Until(deadline)):
		}
	}
}

func (a *Agent) hasHeard(text string) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.heard[text] > 0
}

// chatUntil keeps saying something new as soon as the server has answered. What gets lost with
// a connection is said again.
func (a *Agent) chatUntil(stop <-chan struct{}) {
	for i := 0; ; i++ {
		text := fmt.Sprintf("%s: %d", a.name, i)
		for !a.hasHeard(text) {
			a.mu.Lock()
			news := a.news
			a.mu.Unlock()
			if a.trySay(text) != nil {
				return
			}
			select {
			case <-stop:
				return
			case <-news:
			case <-time.After(time.Second):
			}
		}
	}
}

// everHeard returns what the agent has heard so far, sorted.
func (a *Agent) everHeard() []string {
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.Sorted(maps.Keys(a.heard))
}

// wantHeard waits until the server has told the agent text.
func (a *Agent) wantHeard(t *testing.T, text string) {
	t.Helper()
	eventually(t, func() string {
		if a.hasHeard(text) {
			return ""
		}
		return fmt.Sprintf("%s has not heard %q: %s", a.name, text, a)
	})
}

// wantConnects checks how often the agent has connected so far.
func (a *Agent) wantConnects(t *testing.T, n int) {
	t.Helper()
	a.mu.Lock()
	defer a.mu.Unlock()
	require.Equal(t, n, a.connects, "connections that %s has made; its log: %q", a.name, a.log)
	require.Empty(t, a.failures, "attempts of %s to connect that failed; its log: %q", a.name, a.log)
}

// wantFailures waits until n attempts of the agent to connect have failed, and returns when.
func (a *Agent) wantFailures(t *testing.T, n int) (at []time.Time) {
	t.Helper()
	eventually(t, func() string {
		a.mu.Lock()
		defer a.mu.Unlock()
		if at = slices.Clone(a.failures); len(at) < n {
			return fmt.Sprintf("%d attempts of %s to connect have failed, want %d", len(at), a.name, n)
		}
		return ""
	})
	return at
}

// wantLog waits for a line in the library's log.
func (a *Agent) wantLog(t *testing.T, part string) {
	t.Helper()
	eventually(t, func() string {
		a.mu.Lock()
		defer a.mu.Unlock()
		if !strings.Contains(strings.Join(a.log, "\n"), part) {
			return fmt.Sprintf("nothing about %q in the log of %s: %q", part, a.name, a.log)
		}
		return ""
	})
}

// id returns the agent's instance UID.
func (a *Agent) id() uuid.UUID {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.uid
}

func (a *Agent) String() string {
	a.mu.Lock()
	defer a.mu.Unlock()
	return fmt.Sprintf("uid %s, %d connects, %d failures, heard %d messages, end of the log %q", a.uid, a.connects, len(a.failures), len(a.heard), a.log[max(0, len(a.log)-4):])
}
