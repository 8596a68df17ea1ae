package e2e

import (
	"bytes"
	"compress/gzip"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/open-telemetry/opamp-go/protobufs"
	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/proto"
)

// httpURL is where agents over plain HTTP find the gateway: where all others do.
func (g *Gateway) httpURL() string { return strings.Replace(g.url(), "ws", "http", 1) }

// quickPolls has the gateway miss agents over plain HTTP after three seconds.
func quickPolls(c config) { c.gateway("agents::poll_interval", "1s") }

// An agent on opamp-go's HTTP client is let in, heard and answered, pushed to, renamed, kept over a reload, and missed.
func TestHTTPAgent(t *testing.T) {
	t.Parallel()
	for name, compress := range map[string]bool{"plain": false, "gzip": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			server := startServer(t, serverOptions{capabilities: []string{chat}})
			gateway := startGateway(t, server.url(), quickPolls)
			alice := startAgent(t, "alice", gateway.httpURL(), agentOptions{
				headers: http.Header{"Authorization": {"Secret-Key good"}}, heartbeat: time.Second, compress: compress,
			})
			server.wantAgent(t, alice.id(), "describes itself", isConnected)
			require.Contains(t, upstream(3), server.known(alice.id()).Link)
			require.Len(t, server.asked(), 1)
			require.Equal(t, "Secret-Key good", server.asked()[0].Headers.Get("Authorization"))
			eventually(t, func() string {
				alice.mu.Lock()
				defer alice.mu.Unlock()
				if len(alice.capabilities) == 0 {
					return "alice was not told of the server's custom capabilities"
				}
				return ""
			})
			alice.say(t, "hello")
			alice.wantHeard(t, "hello")

			large := strings.Repeat("a: large configuration\n", 20_000)
			for _, hash := range []string{"1", "2", "3"} { // at once: each takes a poll
				server.send(t, alice.id(), &protobufs.ServerToAgent{RemoteConfig: &protobufs.AgentRemoteConfig{
					ConfigHash: []byte(hash),
					Config:     &protobufs.AgentConfigMap{ConfigMap: map[string]*protobufs.AgentConfigFile{"": {Body: []byte(large + "b: " + hash)}}},
				}})
			}
			server.wantAgent(t, alice.id(), "has applied the last configuration, and reports it", func(k Known) bool {
				return string(k.ConfigStatus.GetLastRemoteConfigHash()) == "3" && configText(k.EffectiveConfig.GetConfigMap()) == large+"b: 3"
			})

			before, renamed := alice.id(), uuid.New()
			server.send(t, before, &protobufs.ServerToAgent{AgentIdentification: &protobufs.AgentIdentification{NewInstanceUid: renamed[:]}})
			server.wantAgent(t, renamed, "speaks under its new UID", func(k Known) bool { return k.Messages > 0 })
			server.tell(t, renamed, "under its new UID")
			alice.wantHeard(t, "under its new UID")

			gateway.reload(t, func(c config) { c.gateway("agents::poll_wait", "1s") })
			alice.say(t, "after the reload")
			alice.wantHeard(t, "after the reload")
			require.Len(t, server.asked(), 1, "nobody was asked again")

			alice.stop()
			server.wantAgent(t, renamed, "has missed its polls", func(k Known) bool { return k.Goodbye })
			require.False(t, server.known(before).Goodbye)
		})
	}
}

// The server's refusals are the responses to an agent over plain HTTP, with their headers; once it is let in, all is well.
func TestHTTPAgentRefused(t *testing.T) {
	t.Parallel()
	server := startServer(t, serverOptions{judge: func(h http.Header) verdict {
		switch h.Get("Authorization") {
		case "Secret-Key wrong":
			return verdict{refusal: http.StatusUnauthorized, headers: map[string]string{"WWW-Authenticate": "Secret-Key"}}
		case "Secret-Key busy":
			return verdict{refusal: http.StatusServiceUnavailable, headers: map[string]string{"Retry-After": "33"}}
		}
		return verdict{}
	}})
	gateway := startGateway(t, server.url())
	uid := uuid.New()
	p := newPoller(gateway.httpURL(), uid)
	p.key = "Secret-Key wrong"
	resp, _ := p.post(t, p.status(t, nil))
	require.Equal(t, http.StatusUnauthorized, resp.StatusCode)
	require.Equal(t, "Secret-Key", resp.Header.Get("WWW-Authenticate"))
	p.key = "Secret-Key busy"
	resp, _ = p.post(t, p.status(t, nil))
	require.Equal(t, http.StatusServiceUnavailable, resp.StatusCode)
	require.Equal(t, "33", resp.Header.Get("Retry-After"))
	require.Zero(t, server.known(uid).Messages)
	p.key = "Secret-Key good"
	p.poll(t, &protobufs.AgentToServer{AgentDescription: &protobufs.AgentDescription{}})
	require.Equal(t, 1, server.known(uid).Messages)
}

// poller is an agent over plain HTTP that was written from the specification alone: one POST, one response.
type poller struct {
	url      string
	uid      uuid.UUID
	key      string
	sequence uint64
	gzip     bool
	client   *http.Client
}

func newPoller(url string, uid uuid.UUID) *poller {
	return &poller{url: url, uid: uid, client: &http.Client{Timeout: time.Minute, Transport: &http.Transport{DisableKeepAlives: true}}}
}

// status is what the agent says.
func (p *poller) status(t *testing.T, m *protobufs.AgentToServer) []byte {
	t.Helper()
	if m == nil {
		m = &protobufs.AgentToServer{}
	}
	p.sequence++
	m.InstanceUid, m.SequenceNum, m.Capabilities = p.uid[:], p.sequence, 1
	b, err := proto.Marshal(m)
	require.NoError(t, err)
	return b
}

func (p *poller) tryPost(body []byte) (*http.Response, []byte, error) {
	if p.gzip {
		var packed bytes.Buffer
		w := gzip.NewWriter(&packed)
		_, _ = w.Write(body)
		_ = w.Close()
		body = packed.Bytes()
	}
	r, err := http.NewRequest(http.MethodPost, p.url, bytes.NewReader(body))
	if err != nil {
		return nil, nil, err
	}
	r.Header.Set("Content-Type", "application/x-protobuf")
	r.Header.Set("Authorization", p.key)
	if p.gzip {
		r.Header.Set("Content-Encoding", "gzip")
	}
	resp, err := p.client.Do(r) // which takes gzip, and unpacks it
	if err != nil {
		return nil, nil, err
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(resp.Body)
	return resp, answer, err
}

func (p *poller) post(t *testing.T, body []byte) (*http.Response, []byte) {
	t.Helper()
	resp, answer, err := p.tryPost(body)
	require.NoError(t, err)
	return resp, answer
}

// poll says m, and returns what comes back.
func (p *poller) poll(t *testing.T, m *protobufs.AgentToServer) *protobufs.ServerToAgent {
	t.Helper()
	resp, b := p.post(t, p.status(t, m))
	require.Equal(t, http.StatusOK, resp.StatusCode, "%s", b)
	require.Equal(t, "application/x-protobuf", resp.Header.Get("Content-Type"))
	answer := new(protobufs.ServerToAgent)
	require.NoError(t, proto.Unmarshal(b, answer))
	require.Equal(t, p.uid[:], answer.GetInstanceUid())
	return answer
}

// An agent that was written from the specification alone: it POSTs, and gets the answer to that.
func TestHTTPAgentFromSpecification(t *testing.T) {
	t.Parallel()
	server := startServer(t, serverOptions{})
	gateway := startGateway(t, server.url())
	for _, packed := range []bool{false, true} {
		uid := uuid.New()
		p := newPoller(gateway.httpURL(), uid)
		p.gzip, p.key = packed, "Secret-Key "+uid.String()
		p.poll(t, &protobufs.AgentToServer{AgentDescription: &protobufs.AgentDescription{}})
		for i := range 3 {
			text := fmt.Sprint("message ", i)
			answer := p.poll(t, &protobufs.AgentToServer{CustomMessage: chatMessage(text)})
			for range 3 { // the server's capabilities may come first
				if answer.GetCustomMessage() != nil {
					break
				}
				answer = p.poll(t, nil)
			}
			require.Equal(t, text, string(answer.GetCustomMessage().GetData()))
		}
		server.tell(t, uid, strings.Repeat("long ", 100_000))
		require.Len(t, p.poll(t, nil).GetCustomMessage().GetData(), 500_000)
		p.poll(t, &protobufs.AgentToServer{AgentDisconnect: &protobufs.AgentDisconnect{}})
		server.wantAgent(t, uid, "has said goodbye", func(k Known) bool { return k.Goodbye })
	}
	resp, text := newPoller(gateway.httpURL(), uuid.New()).post(t, []byte("\xff\xff"))
	require.Equal(t, http.StatusBadRequest, resp.StatusCode)
	require.Contains(t, string(text), "AgentToServer")
}

// Thousands of idle agents over plain HTTP take no connection, and little memory each.
func TestManyHTTPAgents(t *testing.T) {
	t.Parallel()
	const agents = 2000
	server := startServer(t, serverOptions{})
	gateway := startGateway(t, server.url(), func(c config) { c.gateway("agents::poll_interval", "10m") })
	gateway.wantLinks(t, 3)
	before := gateway.usage(t)
	pollers := make([]*poller, agents)
	each := func(do func(p *poller) error) {
		t.Helper()
		var working sync.WaitGroup
		next, failed := make(chan *poller), make(chan error, 1)
		for range 20 {
			working.Go(func() {
				for p := range next {
					if err := do(p); err != nil {
						select {
						case failed <- err:
						default:
						}
					}
				}
			})
		}
		for _, p := range pollers {
			next <- p
		}
		close(next)
		working.Wait()
		select {
		case err := <-failed:
			t.Fatal(err)
		default:
		}
	}
	for i := range pollers {
		pollers[i] = newPoller(gateway.httpURL(), uuid.New())
		pollers[i].key = fmt.Sprint("Secret-Key ", i)
	}
	poll := func(p *poller) error {
		p.sequence++
		body, err := proto.Marshal(&protobufs.AgentToServer{InstanceUid: p.uid[:], SequenceNum: p.sequence, AgentDescription: &protobufs.AgentDescription{}})
		if err != nil {
			return err
		}
		resp, text, err := p.tryPost(body)
		if err != nil {
			return err
		}
		if resp.StatusCode != http.StatusOK {
			return fmt.Errorf("%s: %s", resp.Status, text)
		}
		return nil
	}
	for range 3 {
		each(poll)
	}
	require.Len(t, server.asked(), agents)
	eventually(t, func() string {
		if files := gateway.usage(t).files; files > before.files+50 {
			return fmt.Sprintf("%d files are open, %d before", files, before.files)
		}
		return ""
	})
	after := gateway.usage(t)
	perAgent := (after.memory - before.memory) / agents
	t.Logf("%d sessions take %d bytes of memory each: %s before, %s after", agents, perAgent, before, after)
	require.Less(t, perAgent, 64<<10)
	// All of them can still be pushed to.
	for _, p := range pollers[:50] {
		server.tell(t, p.uid, "news")
	}
	for _, p := range pollers[:50] {
		require.Equal(t, "news", string(p.poll(t, nil).GetCustomMessage().GetData()))
	}
}
