package e2e

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/gorilla/websocket"
	"github.com/open-telemetry/opamp-go/protobufs"
	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/proto"
)

// asGateway is the header of a request by which a gateway tells what it is.
func asGateway(k string) http.Header {
	headers := key(k)
	headers.Set(connectionIDHeader, "upstream-0")
	return headers
}

// ask has a bare gateway ask about an agent with some key.
func (a *rawAgent) ask(t *testing.T, requestUID, k string) {
	t.Helper()
	data, err := json.Marshal(question{RequestUID: requestUID, RemoteAddress: "192.0.2.1:1", Headers: key(k)})
	require.NoError(t, err)
	frame, err := proto.MarshalOptions{}.MarshalAppend([]byte{0}, &protobufs.AgentToServer{CustomMessage: &protobufs.CustomMessage{
		Capability: gatewayCapability, Type: "connect", Data: data,
	}})
	require.NoError(t, err)
	a.sendFrame(t, websocket.BinaryMessage, frame)
}

// verdicts returns what a bare gateway has heard about the agent of a question so far.
func (a *rawAgent) verdicts(requestUID string) (accepted []bool) {
	for _, m := range a.heard() {
		var result struct {
			RequestUID string `json:"request_uid"`
			Accept     bool   `json:"accept"`
		}
		if m.GetCustomMessage().GetType() == "connectResult" &&
			json.Unmarshal(m.GetCustomMessage().GetData(), &result) == nil && result.RequestUID == requestUID {
			accepted = append(accepted, result.Accept)
		}
	}
	return accepted
}

// wantVerdict waits for the first answer to a question.
func (a *rawAgent) wantVerdict(t *testing.T, requestUID string, accept bool) {
	t.Helper()
	eventually(t, func() string {
		if got := a.verdicts(requestUID); len(got) == 0 || got[0] != accept {
			return fmt.Sprintf("the verdicts on %s are %v, want %v; the connection's end: %v", requestUID, got, accept, a.ended())
		}
		return ""
	})
}

// badRequests returns the messages in which the agent was told that it said something wrong.
func (a *rawAgent) badRequests() (bad []*protobufs.ServerToAgent) {
	for _, m := range a.heard() {
		if m.GetErrorResponse().GetType() == protobufs.ServerErrorResponseType_ServerErrorResponseType_BadRequest {
			bad = append(bad, m)
		}
	}
	return bad
}

// wantBadRequest waits until the agent was told so under a uid.
func (a *rawAgent) wantBadRequest(t *testing.T, uid []byte) {
	t.Helper()
	eventually(t, func() string {
		if !slices.ContainsFunc(a.badRequests(), func(m *protobufs.ServerToAgent) bool { return bytes.Equal(m.GetInstanceUid(), uid) }) {
			return fmt.Sprintf("no BAD_REQUEST for uid %x, just %v; the connection's end: %v", uid, a.badRequests(), a.ended())
		}
		return ""
	})
}

// Whoever calls itself a gateway is none, unless the configuration lets gateways in.
func TestGatewaysAreNotAllowed(t *testing.T) {
	t.Parallel()
	server := startServer(t, serverOptions{})
	gateway := startGateway(t, server.url())
	gateway.wantLinks(t, 3)
	_, resp, err := dialRaw(gateway.url(), asGateway("right"), nil)
	wantStatus(t, http.StatusForbidden, resp, err)
	require.Empty(t, server.asked())
	gateway.wantLog(t, "warn", "allow_gateways")

	lower := startGateway(t, gateway.url())
	lower.wantLog(t, "warn", "cannot connect to the server", "403")
}

// A gateway that is let in asks about agents, under names of its own that may be so long and no
// longer; its connection stays, whatever it asks.
func TestQuestionsOfGateways(t *testing.T) {
	t.Parallel()
	server := startServer(t, serverOptions{judge: onlyWithKey})
	gateway := startGateway(t, server.url(), oneLink, allowGateways, fasterSweeps)
	gateway.wantLinks(t, 1)
	lower := connectRaw(t, gateway.url(), asGateway("right"))
	longest := strings.Repeat("x", 128)
	lower.ask(t, longest, "right")
	lower.wantVerdict(t, longest, true)
	lower.ask(t, longest+"x", "right")
	lower.ask(t, "", "right")
	lower.ask(t, "2", "wrong")
	lower.wantVerdict(t, "2", false)
	lower.ask(t, "2", "right") // once it has been answered, the name may be used again
	eventually(t, func() string {
		if got := lower.verdicts("2"); !slices.Equal(got, []bool{false, true}) {
			return fmt.Sprintf("verdicts: %v", got)
		}
		return ""
	})
	for _, q := range server.asked() {
		require.LessOrEqual(t, len(q.RequestUID), 128)
		require.NotEmpty(t, q.RequestUID)
	}
	lower.wantOpen(t)
}

// Two gateways below ask under one name, one about an agent with a good key and one about an
// agent with a bad one, while the server takes its time: neither gets the other's verdict.
func TestSameQuestionOfTwoGateways(t *testing.T) {
	t.Parallel()
	var slow atomic.Bool
	server := startServer(t, serverOptions{judge: func(headers http.Header) verdict {
		if slow.Load() {
			<-time.After(300 * time.Millisecond) // both have been asked by then
		}
		return onlyWithKey(headers)
	}})
	gateway := startGateway(t, server.url(), oneLink, allowGateways)
	gateway.wantLinks(t, 1)
	good, bad := connectRaw(t, gateway.url(), asGateway("right")), connectRaw(t, gateway.url(), asGateway("right"))
	slow.Store(true)
	for i := range 5 {
		name := fmt.Sprint(i)
		first, second := func() { good.ask(t, name, "right") }, func() { bad.ask(t, name, "wrong") }
		if i%2 == 1 {
			first, second = second, first
		}
		first()
		second()
		// The later one may as well be told that the name is in use.
		answered := func(a *rawAgent) bool { return len(a.verdicts(name)) > 0 || len(a.badRequests()) > 0 }
		eventually(t, func() string {
			if !answered(good) || !answered(bad) {
				return fmt.Sprintf("verdicts of question %d: %v on the good key, %v on the bad one", i, good.verdicts(name), bad.verdicts(name))
			}
			return ""
		})
		require.NotContains(t, good.verdicts(name), false, "the good key was refused")
		require.NotContains(t, bad.verdicts(name), true, "the bad key was let in")
	}
	good.wantOpen(t)
	bad.wantOpen(t)
}

// Where nobody is asked, nobody asks: a gateway that does so offends.
func TestQuestionWhereAllAreAccepted(t *testing.T) {
	t.Parallel()
	server := startServer(t, serverOptions{})
	gateway := startGateway(t, server.url(), allowGateways, fasterSweeps, func(c config) { c.gateway("server::agent_admission", "accept") })
	gateway.wantLinks(t, 3)
	lower := connectRaw(t, gateway.url(), asGateway("right"))
	lower.ask(t, "1", "guess")
	lower.wantClosed(t, websocket.ClosePolicyViolation)
	require.Empty(t, server.asked())
}

// A gateway below has a larger limit for messages: one that is too large for the upper is skipped,
// whose it was is told, and nobody else on that link notices.
func TestOversizedMessageOfGateway(t *testing.T) {
	t.Parallel()
	server := startServer(t, serverOptions{})
	metrics := freeAddress(t)
	gateway := startGateway(t, server.url(), allowGateways, fasterSweeps, func(c config) {
		c.gateway("max_message_size", 64<<10)
		c.metrics(t, metrics)
	})
	gateway.wantLinks(t, 3)
	lower := connectRaw(t, gateway.url(), asGateway("right"))
	alice, bob := lower.uid, uuid.New()
	lower.exchange(t, "I am alice")
	lower.uid = bob
	lower.send(t, &protobufs.AgentToServer{CustomMessage: chatMessage(strings.Repeat("x", 100<<10))})
	lower.wantBadRequest(t, bob[:])
	lower.uid = alice
	start := time.Now()
	for i := 0; time.Since(start) < 6*time.Second; i++ { // longer than it takes to close one who offends
		lower.exchange(t, fmt.Sprint("I am still here: ", i))
		<-time.After(100 * time.Millisecond)
	}
	require.Zero(t, server.known(bob).Messages)
	require.Equal(t, 1, faults(t, metrics, "too_large"))
	lower.wantOpen(t)
}

// The connection of a gateway ends. Its agents may be elsewhere already, so nobody says goodbye
// for them, unless told to.
func TestNoGoodbyeForGateways(t *testing.T) {
	needsLong(t)
	t.Parallel()
	server := startServer(t, serverOptions{})
	quiet := startGateway(t, server.url(), allowGateways)
	told := startGateway(t, server.url(), allowGateways, func(c config) { c.gateway("agents::send_disconnect_for_gateways", true) })
	behind := func(gateway *Gateway) uuid.UUID {
		lower := connectRaw(t, gateway.url(), asGateway("right"))
		lower.exchange(t, "hello")
		lower.ws.Close()
		return lower.uid
	}
	alice, bob := behind(quiet), behind(told)
	within(t, 100*time.Second, func() string {
		if !server.known(bob).Goodbye {
			return "the server was not told that an agent behind a gateway has left"
		}
		return ""
	})
	throughout(t, 20*time.Second, func() string {
		if server.known(alice).Goodbye {
			return "the server was told that an agent behind a gateway has left"
		}
		return ""
	})
}

// A server ends a link at each question, or crashes and starts again, as some do that know nothing
// of gateways. After the second time it is not asked any more.
func TestServerThatEndsAtQuestions(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name string
		end  func(*bareServer, *bareLink)
		most int // links that may be lost
	}{
		{"the link", func(_ *bareServer, l *bareLink) {
			_ = l.pushFrame(websocket.CloseMessage, websocket.FormatCloseMessage(websocket.CloseNormalClosure, "")) // it may be in use
			l.ws.Close()
		}, 3},
		{"all links", func(s *bareServer, _ *bareLink) {
			for _, l := range s.all() {
				l.ws.Close()
			}
		}, 9},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			server := startBareServer(t)
			server.asked = func(l *bareLink) { test.end(server, l) }
			gateway := startGateway(t, server.url(), func(c config) { c.gateway("server::agent_admission", "ask") })
			gateway.wantLinks(t, 3)
			patient := func() *http.Response {
				_, resp, err := dialRaw(gateway.url(), nil, nil)
				wantStatus(t, http.StatusServiceUnavailable, resp, err)
				return resp
			}
			patient()
			gateway.wantLog(t, "warn", "cannot be asked", "agent_admission: auto, or accept")
			for range 5 {
				start := time.Now()
				require.NotEmpty(t, patient().Header.Get("Retry-After"))
				require.Less(t, time.Since(start), promptly, "until an agent is turned away")
			}
			require.LessOrEqual(t, server.questions(), 3, "questions that the server was asked")
			links := 0
			eventually(t, func() string {
				links = len(server.all())
				live := 0
				for _, l := range server.all() {
					select {
					case <-l.ended:
					default:
						live++
					}
				}
				if live != 3 {
					return fmt.Sprintf("%d links are up", live)
				}
				return ""
			})
			require.LessOrEqual(t, links-3, test.most, "links lost")
		})
	}
}

// An agent waits for a link, but not for longer than its library waits for an answer.
func TestWaitForLink(t *testing.T) {
	t.Parallel()
	server := startServer(t, serverOptions{})
	server.stop(t)
	gateway := startGateway(t, server.url())
	start := time.Now()
	_, resp, err := dialRaw(gateway.url(), nil, nil)
	wantStatus(t, http.StatusServiceUnavailable, resp, err)
	require.NotEmpty(t, resp.Header.Get("Retry-After"))
	require.Less(t, time.Since(start), 9*time.Second, "until an agent was told that there is no link")
}

// A refusal brings the agent the headers that concern it, and no others; a redirect is one, if it
// says where to.
func TestHeadersOfRefusals(t *testing.T) {
	t.Parallel()
	const elsewhere = "ws://127.0.0.1:9/v1/opamp"
	verdicts := map[string]verdict{
		"Secret-Key redirect": {refusal: http.StatusTemporaryRedirect, headers: map[string]string{"Location": elsewhere}},
		"Secret-Key nowhere":  {refusal: http.StatusTemporaryRedirect},
		"Secret-Key old":      {refusal: http.StatusUpgradeRequired, headers: map[string]string{"Upgrade": "opamp/2", "Location": elsewhere}},
		"Secret-Key many": {refusal: http.StatusTooManyRequests, headers: map[string]string{
			"Retry-After": "7", "WWW-Authenticate": "Secret-Key", "X-Why": "because", "Set-Cookie": "a=b", "Server": "opamp",
			"Access-Control-Allow-Origin": "*", "Content-Encoding": "gzip", "Upgrade": "opamp/2", "Location": elsewhere,
		}},
		"Secret-Key large": {refusal: http.StatusForbidden, headers: map[string]string{"X-Large": strings.Repeat("x", 20<<10)}},
	}
	server := startServer(t, serverOptions{judge: func(headers http.Header) verdict { return verdicts[headers.Get("Authorization")] }})
	gateway := startGateway(t, server.url())
	gateway.wantLinks(t, 3)
	for _, test := range []struct {
		key     string
		status  int
		headers map[string]string // "" for none
	}{
		{"redirect", http.StatusTemporaryRedirect, map[string]string{"Location": elsewhere}},
		{"nowhere", http.StatusUnauthorized, map[string]string{"Location": ""}},
		{"old", http.StatusUpgradeRequired, map[string]string{"Upgrade": "opamp/2", "Location": ""}},
		{"many", http.StatusTooManyRequests, map[string]string{
			"Retry-After": "7", "WWW-Authenticate": "Secret-Key", "X-Why": "because", "Set-Cookie": "", "Server": "",
			"Access-Control-Allow-Origin": "", "Content-Encoding": "", "Upgrade": "", "Location": "",
		}},
		{"large", http.StatusForbidden, map[string]string{"X-Large": ""}},
	} {
		t.Run(test.key, func(t *testing.T) {
			_, resp, err := dialRaw(gateway.url(), key(test.key), nil)
			wantStatus(t, test.status, resp, err)
			for name, value := range test.headers {
				require.Equal(t, value, resp.Header.Get(name), name)
			}
		})
	}
}

// The server is told the certificate by which an agent has shown who it is, and never one that an
// agent only claims.
func TestClientCertificate(t *testing.T) {
	t.Parallel()
	inside := newAuthority(t, "inside")
	identity := inside.issue(t, "agent")
	server := startServer(t, serverOptions{})
	mutual := startGateway(t, server.url(), withTLS(inside.issue(t, "gateway")), func(c config) { c.gateway("listener::tls::client_ca_file", inside.file) })
	plain := startGateway(t, server.url())
	forged := http.Header{"Client-Cert": {":Zm9yZ2Vk:"}, "Client-Cert-Chain": {":Zm9yZ2Vk:"}, "X-Other": {"kept"}}

	ask := func(gateway *Gateway) http.Header {
		ws, resp, err := dialRaw(gateway.url(), forged, inside.mutual(identity))
		require.NoError(t, err, status(resp))
		ws.Close()
		asked := server.asked()
		return asked[len(asked)-1].Headers
	}
	headers := ask(mutual)
	require.Equal(t, []string{":" + base64Of(identity) + ":"}, headers.Values("Client-Cert"))
	require.Empty(t, headers.Values("Client-Cert-Chain"))
	require.Equal(t, "kept", headers.Get("X-Other"))
	headers = ask(plain)
	require.Empty(t, headers.Values("Client-Cert"))
	require.Empty(t, headers.Values("Client-Cert-Chain"))
	require.Equal(t, "kept", headers.Get("X-Other"))

	// Neither by a name that is spelled otherwise.
	conn, err := net.Dial("tcp", plain.address)
	require.NoError(t, err)
	defer conn.Close()
	resp, _ := knock(t, conn, upgradeRequest("cLIENT-cERT: :Zm9yZ2Vk:", "client-cert: :Zm9yZ2Vk:"))
	require.Equal(t, http.StatusSwitchingProtocols, resp.StatusCode)
	asked := server.asked()
	for name := range asked[len(asked)-1].Headers {
		require.False(t, strings.EqualFold(name, "Client-Cert"), "what an agent sends as %s", name)
	}
}
