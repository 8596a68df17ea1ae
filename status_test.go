package opampgateway

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gorilla/websocket"
	"github.com/open-telemetry/opamp-go/protobufs"
	"github.com/stretchr/testify/require"
	"go.opentelemetry.io/collector/component"
	"go.opentelemetry.io/collector/config/confighttp"
	"go.opentelemetry.io/collector/config/confignet"
	"go.opentelemetry.io/collector/config/configoptional"
	"go.opentelemetry.io/collector/confmap"
	"go.uber.org/zap"

	"github.com/opampgateway/opampgateway/internal/gatewaytest"
	"github.com/opampgateway/opampgateway/internal/status"
	"github.com/opampgateway/opampgateway/internal/telemetry"
	"github.com/opampgateway/opampgateway/internal/wire"
)

const pageAddress = "localhost:4321"

// withPage gives a gateway a status page.
func withPage(cfg *Config) {
	cfg.Status = createDefaultConfig().(*Config).Status
	cfg.Status.GetOrInsertDefault()
}

// page fetches something from the status page.
func (r *running) page(path string) (code int, body string) {
	r.t.Helper()
	client := &http.Client{Transport: &http.Transport{DialContext: r.network.Dial, DisableKeepAlives: true}}
	request, err := http.NewRequestWithContext(context.Background(), http.MethodGet, "http://"+pageAddress+path, nil)
	require.NoError(r.t, err)
	resp, err := client.Do(request)
	require.NoError(r.t, err)
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	require.NoError(r.t, err)
	return resp.StatusCode, string(text)
}

// shown returns what the status page says.
func (r *running) shown() (s status.Snapshot) {
	r.t.Helper()
	synctest.Wait()
	code, body := r.page("/api/v1/status")
	require.Equal(r.t, http.StatusOK, code)
	require.NoError(r.t, json.Unmarshal([]byte(body), &s))
	return s
}

// shownAgents returns the agents that the status page shows.
func (r *running) shownAgents(query string) []status.Agent {
	r.t.Helper()
	synctest.Wait()
	code, body := r.page("/api/v1/agents?" + query)
	require.Equal(r.t, http.StatusOK, code)
	var a status.Agents
	require.NoError(r.t, json.Unmarshal([]byte(body), &a))
	return a.Agents
}

// What is shown of agents is what has happened to them.
func TestShownAgents(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		begin := time.Now()
		alice := s.connect("alice", "User-Agent", "bindplane-agent/1.90", "Agent-ID", "01-alice", "Authorization", "Secret-Key mystery")
		a := s.shownAgents("")[0]
		require.Empty(t, a.UID, "she has said nothing yet")
		require.Nil(t, a.LastMessage)
		time.Sleep(10 * time.Second)
		said := 0
		for i := range 3 {
			frame := alice.Say(i)
			said += len(frame)
			s.server.WantFrame(alice.UID, frame)
		}
		offer := gatewaytest.Offer(alice.UID, "hash", 1000)
		s.server.WantLinks(3)[0].Push(offer)
		alice.WantFrame(offer)
		a = s.shownAgents("q=BINDPLANE")[0]
		require.Equal(t, writtenUID(alice), a.UID)
		require.Equal(t, alice.LocalAddr(), a.Address)
		require.Equal(t, "bindplane-agent/1.90", a.UserAgent)
		require.Equal(t, "01-alice", a.AgentID)
		require.Contains(t, a.Link, "gateway/upstream-")
		require.WithinDuration(t, begin, a.ConnectedSince, 2*time.Second)
		require.WithinDuration(t, begin.Add(10*time.Second), *a.LastMessage, time.Second)
		require.EqualValues(t, 3, a.MessagesUp)
		require.EqualValues(t, said, a.BytesUp)
		require.EqualValues(t, 1, a.MessagesDown)
		require.EqualValues(t, len(offer), a.BytesDown)
		require.Zero(t, a.Faults)
		require.Equal(t, 1, a.InstanceUIDs)

		alice.SendText("text")
		a = s.shownAgents("q=" + a.UID)[0]
		require.EqualValues(t, 1, a.Faults)
		require.Equal(t, "bad_frame", a.LastFault)
		require.Empty(t, s.shownAgents("q=nobody"))
	}, withPage)
}

// writtenUID is how the UID of an agent is written.
func writtenUID(a *gatewaytest.Agent) string {
	uid, _ := wire.ParseUID(a.UID) // those of these tests are some
	return uid.String()
}

// What waits for an agent that does not read is shown, and for the server while that does not.
func TestShownWaiting(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		link := s.server.WantLinks(1)[0]
		alice := s.introduce("alice")
		alice.StopReading()
		link.Push(gatewaytest.Offer(alice.UID, "first", 1_000_000))
		synctest.Wait()
		link.Push(gatewaytest.Offer(alice.UID, "second", 500_000))
		require.Greater(t, s.shownAgents("sort=waiting&desc=true")[0].WaitingDown, 500_000)
		require.Greater(t, s.shown().Memory.Down, int64(500_000))
		alice.ReadOn()
		alice.Next()
		alice.Next()
		require.Zero(t, s.shownAgents("")[0].WaitingDown)

		link.StopReading()
		const n, size = 40, 100_000
		go func() {
			for i := range n {
				alice.Send(gatewaytest.Report(alice.UID, 100+i, size))
			}
		}()
		a, l := s.shownAgents("")[0], s.shown().Links[0]
		require.Greater(t, a.WaitingUp, 100_000)
		require.GreaterOrEqual(t, l.WaitingBytes, a.WaitingUp-200_000, "what waits to be taken is not the link's yet")
		require.Positive(t, l.OnItsWay)
		require.Greater(t, l.OnItsWayBytes, 100_000)
		require.LessOrEqual(t, l.OnItsWayBytes+a.WaitingUp, n*(size+200))
		link.ReadOn()
		for i := range n {
			s.server.WantFrame(alice.UID, gatewaytest.Report(alice.UID, 100+i, size))
		}
		time.Sleep(time.Second)
		l = s.shown().Links[0]
		require.Zero(t, s.shownAgents("")[0].WaitingUp)
		require.Zero(t, l.WaitingBytes)
		require.Zero(t, l.OnItsWay)
	}, withPage, connections(1))
}

// A lost link is shown until it is back, and why it was lost.
func TestShownLinks(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		alice := s.introduce("alice")
		for i := range 40 {
			s.server.WantFrame(alice.UID, alice.Say(i))
			time.Sleep(time.Second)
		}
		shown := s.shown()
		require.Equal(t, status.StateOK, shown.Gateway.State)
		require.Empty(t, shown.Problems)
		require.Equal(t, 3, shown.Gateway.LinksUp)
		require.Equal(t, 1, shown.Gateway.Agents)
		require.Equal(t, 1, shown.Gateway.InstanceUIDs)
		require.Equal(t, "ws://localhost:9000/v1/opamp", shown.Gateway.Server)
		agents, messages := 0, 0.0
		for i, l := range shown.Links {
			require.Equal(t, i, l.Slot)
			require.Equal(t, status.StateConnected, l.State)
			require.Empty(t, l.LastError)
			require.NotNil(t, l.PingSeconds)
			agents += l.Agents
			messages += l.Rate.MessagesUp
		}
		require.Equal(t, 1, agents)
		require.InDelta(t, 1, messages, 0.3, "messages a second")
		require.InDelta(t, 1, shown.Rates.MessagesUp[len(shown.Rates.MessagesUp)-1], 0.3)
		require.Equal(t, 1, shown.Rates.Agents[len(shown.Rates.Agents)-1])

		s.server.Stop()
		time.Sleep(3 * time.Second)
		shown = s.shown()
		require.Equal(t, status.StateDown, shown.Gateway.State)
		require.Contains(t, shown.Problems[0], "no link to the server")
		for _, l := range shown.Links {
			require.Equal(t, status.StateConnecting, l.State)
			require.NotEmpty(t, l.LastError)
			require.WithinDuration(t, time.Now().Add(-3*time.Second), l.Since, time.Second)
		}
		require.Empty(t, s.shownAgents("")[0].Link, "alice has no link")
		ended := shown.Ended[0]
		require.Equal(t, status.KindLink, ended.Kind)
		require.Equal(t, "link_lost", ended.Reason)
		require.False(t, ended.ByGateway)

		s.server.Start()
		s.server.WantLinks(3)
		time.Sleep(time.Second)
		require.Equal(t, status.StateOK, s.shown().Gateway.State)
	}, withPage)
}

// Why a link was lost is still shown when it is back at once.
func TestShownLossOfLink(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		s.server.WantLinks(1)[0].Close(websocket.CloseGoingAway)
		time.Sleep(time.Second)
		l := s.shown().Links[0]
		require.Equal(t, status.StateConnected, l.State)
		require.Contains(t, l.LastError, "1001")
		require.WithinDuration(t, time.Now().Add(-time.Second), *l.LastErrorAt, 100*time.Millisecond)
		require.Equal(t, "closed by the server (1001)", s.shown().Ended[0].Why)
	}, withPage, connections(1))
}

// Who has left, and why, and who was named for what.
func TestShownEndsAndOffenders(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		alice := s.introduce("alice", "Authorization", "hers")
		alice.Close(websocket.CloseNormalClosure)
		_, _ = alice.WantEnd(time.Second)
		ended := s.shown().Ended[0]
		require.Equal(t, status.KindAgent, ended.Kind)
		require.Equal(t, writtenUID(alice), ended.Name)
		require.Equal(t, "closed by the agent (1000)", ended.Why)
		require.False(t, ended.ByGateway)

		bob := s.connect("bob")
		time.Sleep(muteLimit + 2*agentSweepInterval)
		bob.WantClosed(websocket.ClosePolicyViolation)
		ended = s.shown().Ended[0]
		require.Equal(t, "agent_mute", ended.Reason)
		require.True(t, ended.ByGateway)

		cathy := s.introduce("cathy", "Authorization", "hers")
		mallory := s.connect("mallory", "Authorization", "another's")
		mallory.Send(gatewaytest.Status(cathy.UID, 1))
		synctest.Wait()
		clone := s.connect("clone", "Authorization", "hers")
		clone.Send(gatewaytest.Status(cathy.UID, 2))
		time.Sleep(time.Second)
		offenders := s.shown().Offenders
		kinds := map[status.Offence]status.Offender{}
		for _, o := range offenders {
			kinds[o.Kind] = o
			require.Equal(t, writtenUID(cathy), o.UID)
		}
		require.Equal(t, mallory.LocalAddr(), kinds[status.OffenceUIDTaken].Address)
		require.Equal(t, cathy.LocalAddr(), kinds[status.OffenceUIDTaken].Other)
		require.Contains(t, kinds, status.OffenceUIDConflict)
		for _, f := range s.shown().Faults {
			require.Equal(t, s.counted("faults", f.Name), f.Count, f.Name)
		}
		for _, o := range s.shown().Admissions {
			require.Equal(t, s.counted("admissions", o.Name), o.Count, o.Name)
		}
		require.Equal(t, int64(1), s.counted("faults", string(telemetry.ReasonUIDConflict)))
	}, withPage)
}

// Nothing that is secret is shown, wherever it comes from.
func TestNothingSecretIsShown(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		alice := s.introduce("alice", "Authorization", "mystery-1", "Cookie", "mystery-2", "X-Other", "mystery-3", "Agent-ID", "alice", "User-Agent", "agent/1")
		alice.Send(gatewaytest.Frame(gatewaytest.ConfigMap(10)))
		alice.SendText("mystery-5")
		s.server.WantLinks(3)[0].Push(gatewaytest.Offer(alice.UID, "mystery-6", 100))
		synctest.Wait()
		alice.Close(websocket.CloseNormalClosure)
		_, _ = alice.WantEnd(time.Second)
		s.introduce("bob", "Authorization", "mystery-1")
		s.server.Stop()
		time.Sleep(3 * time.Second)
		for _, path := range []string{"/", "/api/v1/status", "/api/v1/agents"} {
			_, body := s.page(path)
			require.NotContains(t, body, "mystery", path)
			require.NotContains(t, body, "token", path)
		}
		s.server.Start()
	}, withPage, func(cfg *Config) {
		cfg.Server.Endpoint += "?token=mystery-7"
		cfg.Server.Headers.Set("Authorization", "mystery-8")
	})
}

// After a reload the page is the next component's, and shows the same gateway; or there is none any more.
func TestPageAfterReload(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		s.introduce("alice")
		started := s.shown().Gateway.Started
		s.leaveOff()
		_, err := s.network.Dial(t.Context(), "tcp", pageAddress)
		require.Error(t, err, "the address is free")
		time.Sleep(gap)
		require.NoError(t, s.goOn())
		shown := s.shown()
		require.Equal(t, 1, shown.Gateway.Agents)
		require.Equal(t, started, shown.Gateway.Started)

		s.reload(func(cfg *Config) { cfg.Status = configoptional.None[confighttp.ServerConfig]() })
		_, err = s.network.Dial(t.Context(), "tcp", pageAddress)
		require.Error(t, err)
		s.reload(withPage)
		require.Equal(t, 1, s.shown().Gateway.Agents)
	}, withPage)
}

// An address that is in use keeps the gateway from starting, and the message names the key.
func TestPageCannotStart(t *testing.T) {
	playWithout(t, func(t *testing.T, s *stage) {
		s.server.Start()
		busy, err := s.net.Listen(pageAddress)
		require.NoError(t, err)
		defer busy.Close()
		r := &running{t: t, network: s.net}
		cfg := createDefaultConfig().(*Config)
		cfg.Server.Endpoint = "ws://" + serverAddress
		withPage(cfg)
		require.ErrorContains(t, r.begin(cfg, nil), "status::endpoint: ")
		require.NoError(t, r.e.Shutdown(t.Context()))

		cfg.Status.Get().NetAddr.Endpoint = "localhost:1"
		cfg.Status.Get().Auth = configoptional.Some(confighttp.AuthConfig{})
		require.ErrorContains(t, r.begin(cfg, nil), "status: ")
		require.NoError(t, r.e.Shutdown(t.Context()))
		s.server.Stop()
	})
}

func TestPageIsOffUnlessGiven(t *testing.T) {
	for _, test := range []struct {
		conf map[string]any
		want string
	}{
		{map[string]any{}, ""},
		{map[string]any{"status": nil}, "localhost:4321"},
		{map[string]any{"status": map[string]any{}}, "localhost:4321"},
		{map[string]any{"status": map[string]any{"endpoint": "127.0.0.1:80"}}, "127.0.0.1:80"},
	} {
		cfg := createDefaultConfig().(*Config)
		require.NoError(t, confmap.NewFromStringMap(test.conf).Unmarshal(cfg))
		endpoint := ""
		if page := cfg.Status.Get(); page != nil {
			endpoint = page.NetAddr.Endpoint
		}
		require.Equal(t, test.want, endpoint, test.conf)
	}
	cfg := createDefaultConfig().(*Config)
	withPage(cfg)
	cfg.Status.Get().NetAddr.Endpoint = ""
	require.ErrorContains(t, cfg.Validate(), "status::endpoint: must not be empty")
}

// Whoever can reach the page sees which agents there are, so it is said when that may be anybody.
func TestWarningOfPage(t *testing.T) {
	for endpoint, want := range map[string]int{
		"localhost:4321": 0, "127.0.0.1:4321": 0, "[::1]:1": 0, "0.0.0.0:4321": 1, ":4321": 1, "192.0.2.1:80": 1,
	} {
		playWithout(t, func(t *testing.T, s *stage) {
			s.server.Start()
			s.start(withPage, func(cfg *Config) { cfg.Status.Get().NetAddr.Endpoint = endpoint })
			require.Len(t, s.logged(zap.WarnLevel, "status::endpoint is not of this host alone"), want, endpoint)
		})
	}
}

func TestNamesOfPage(t *testing.T) {
	cfg := confighttp.NewDefaultServerConfig()
	cfg.NetAddr.Endpoint = "gateway.example:4321"
	cfg.CORS = configoptional.Some(confighttp.CORSConfig{AllowedOrigins: []string{"https://status.example:8443", "*"}})
	names := pageNames(&cfg)
	require.Contains(t, names, "gateway.example")
	require.Contains(t, names, "status.example")
	require.NotContains(t, names, "*")
	cfg.NetAddr = confignet.AddrConfig{Endpoint: "/run/status.sock", Transport: confignet.TransportTypeUnix}
	require.NotContains(t, strings.Join(pageNames(&cfg), " "), "sock")
}

// TLS, client certificates and authentication are those of the collector.
func TestPageIsProtected(t *testing.T) {
	authority := newAuthority(t)
	cert, operator := authority.issue(t, "page"), authority.issue(t, "operator")
	check := func(ctx context.Context, headers map[string][]string) (context.Context, error) {
		if http.Header(headers).Get("Authorization") != "Bearer sesame" {
			return ctx, errors.New("not on the list")
		}
		return ctx, nil
	}
	address := freeAddress(t)
	startLoopback(t, nil, map[string]any{"status": map[string]any{
		"endpoint": address, "auth": map[string]any{"authenticator": "doorman"},
		"tls": map[string]any{"cert_file": cert.certFile, "key_file": cert.keyFile, "client_ca_file": authority.file},
	}}, map[component.ID]component.Component{component.MustNewID("doorman"): doorman{ServerAuthenticateFunc: check}})

	ask := func(config *tls.Config, path string, headers ...string) (*http.Response, error) {
		transport := &http.Transport{TLSClientConfig: config, ForceAttemptHTTP2: true}
		defer transport.CloseIdleConnections()
		request, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "https://"+address+path, nil)
		require.NoError(t, err)
		for i := 0; i < len(headers); i += 2 {
			request.Header.Set(headers[i], headers[i+1])
		}
		resp, err := (&http.Client{Transport: transport}).Do(request)
		if err == nil {
			_ = resp.Body.Close()
		}
		return resp, err
	}
	_, err := ask(&tls.Config{RootCAs: authority.pool}, "/")
	require.Error(t, err, "without a certificate")
	known := &tls.Config{RootCAs: authority.pool, Certificates: []tls.Certificate{operator.pair}}
	for _, path := range []string{"/", "/api/v1/status", "/api/v1/agents"} {
		resp, err := ask(known, path)
		require.NoError(t, err)
		require.Equal(t, http.StatusUnauthorized, resp.StatusCode, path)
		require.NotEmpty(t, resp.Header.Get("Content-Security-Policy"))
		resp, err = ask(known, path, "Authorization", "Bearer sesame")
		require.NoError(t, err)
		require.Equal(t, http.StatusOK, resp.StatusCode, path)
		require.Equal(t, 2, resp.ProtoMajor)
		resp, err = ask(known, path, "Authorization", "Bearer sesame", "Origin", "https://evil.example")
		require.NoError(t, err)
		require.Equal(t, path == "/", resp.StatusCode == http.StatusOK, path)
	}
}

// That nobody is let in, since the server cannot be asked, is shown before the first agent complains.
func TestShownServerThatCannotBeAsked(t *testing.T) {
	playUntried(t, func(t *testing.T, s *stage) {
		require.Empty(t, s.shown().Problems)
		s.server.OnConnect((*gatewaytest.Question).Silence)
		first, second := s.knock("alice"), s.knock("bob")
		question := s.server.WantQuestion()
		s.server.WantQuestion()
		reply := gatewaytest.Frame(&protobufs.ServerToAgent{CustomCapabilities: &protobufs.CustomCapabilities{}})
		question.Link.Push(reply)
		question.Link.Push(reply)
		s.wantTurnedAway(first)
		s.wantTurnedAway(second)
		shown := s.shown()
		require.Equal(t, status.StateDegraded, shown.Gateway.State)
		require.Contains(t, shown.Problems[0], "the server cannot be asked about agents")
	}, withPage, asked)
}

// A gateway below is shown as one connection, which is found by the UID of any agent behind it.
func TestShownGateways(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		s.introduce("alice")
		below := s.connect("below", connectionIDHeader, "below/upstream-0")
		for _, name := range []string{"bob", "cathy", "dave"} {
			below.Send(gatewaytest.Status(gatewaytest.UID(name), 1))
		}
		found := s.shownAgents("q=" + uidOf(t, "bob").String())
		require.Len(t, found, 1)
		require.True(t, found[0].Gateway)
		require.Equal(t, 3, found[0].InstanceUIDs)
		require.EqualValues(t, 3, found[0].MessagesUp)
		shown := s.shown().Gateway
		require.Equal(t, []int{2, 1, 4}, []int{shown.Agents, shown.Gateways, shown.InstanceUIDs})
	}, withPage)
}

// A memory that is nearly used up is a problem, as is each link that is missing, and none at all is the first.
func TestProblems(t *testing.T) {
	up, down := status.Link{Name: "a", State: status.StateConnected}, status.Link{Name: "b", State: status.StateConnecting, LastError: "refused"}
	for _, test := range []struct {
		links    []status.Link
		inUse    int64
		want     status.State
		problems []string
	}{
		{[]status.Link{up, up}, 89, status.StateOK, nil},
		{[]status.Link{up, up}, 90, status.StateDegraded, []string{"90 % of the memory"}},
		{[]status.Link{up, down}, 0, status.StateDegraded, []string{"link b has been connecting for 1m: refused"}},
		{[]status.Link{down}, 95, status.StateDown, []string{"no link to the server", "link b", "95 %"}},
	} {
		s := &status.Snapshot{Links: test.links, Memory: status.Memory{Limit: 100, InUse: test.inUse}}
		s.Time = s.Time.Add(time.Minute)
		for _, l := range test.links {
			if l.State == status.StateConnected {
				s.Gateway.LinksUp++
			}
		}
		state, problems := judgeState(s, false)
		require.Equal(t, test.want, state)
		require.Len(t, problems, len(test.problems))
		for i, want := range test.problems {
			require.Contains(t, problems[i], want)
		}
	}
}

// The page is looked at while agents come and go, and links end: what is shown at any moment adds up.
func TestPageWhileAllChanges(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		var changing sync.WaitGroup
		for i := range 8 {
			changing.Go(func() {
				for n := range 20 {
					a := s.connect(fmt.Sprint("agent ", i, "-", n))
					for sequence := range 5 {
						a.Say(sequence)
						time.Sleep(time.Duration(i+1) * time.Millisecond)
					}
					a.Vanish()
				}
			})
		}
		changing.Go(func() {
			for range 10 {
				time.Sleep(50 * time.Millisecond)
				s.server.WantLinks(3)[0].Close(websocket.CloseGoingAway)
			}
		})
		for range 200 {
			time.Sleep(3 * time.Millisecond)
			for _, path := range []string{"/api/v1/status", "/api/v1/agents?sort=waiting&q=127"} {
				code, body := s.page(path)
				require.Equal(t, http.StatusOK, code, body)
			}
			var fleet status.Agents
			_, body := s.page("/api/v1/agents?per=3")
			require.NoError(t, json.Unmarshal([]byte(body), &fleet))
			require.Equal(t, fleet.Total, fleet.Matching)
			require.LessOrEqual(t, fleet.Total, 8*20)
		}
		changing.Wait()
		require.NotEmpty(t, s.shown().Ended)
	}, withPage)
}
