package opampgateway

import (
	"bufio"
	"bytes"
	"fmt"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gorilla/websocket"
	"github.com/open-telemetry/opamp-go/protobufs"
	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/proto"

	"github.com/opampgateway/opampgateway/internal/gatewaytest"
	"github.com/opampgateway/opampgateway/internal/wire"
)

// These tests are of what meets: agents over plain HTTP and load balancers, both and WebSockets, servers over plain HTTP
// and fallbacks.

// balanced is one connection of a load balancer to the gateway, on which it passes on requests of whoever comes.
type balanced struct {
	t    *testing.T
	conn net.Conn
	in   *bufio.Reader
}

func (s *stage) balanced() *balanced {
	s.t.Helper()
	conn, err := s.net.DialFrom(balancerIP)(s.t.Context(), "tcp", gatewayAddress)
	require.NoError(s.t, err)
	s.t.Cleanup(func() { _ = conn.Close() })
	return &balanced{s.t, conn, bufio.NewReader(conn)}
}

// passOn passes on a request, and returns the status of the response, and whether the connection stays.
func (b *balanced) passOn(method string, body []byte, headers ...string) (status int, stays bool) {
	b.t.Helper()
	r, err := http.NewRequestWithContext(b.t.Context(), method, "http://"+gatewayAddress+"/v1/opamp", bytes.NewReader(body))
	require.NoError(b.t, err)
	for i := 0; i+1 < len(headers); i += 2 {
		r.Header.Set(headers[i], headers[i+1])
	}
	require.NoError(b.t, r.Write(b.conn))
	response, err := http.ReadResponse(b.in, r)
	require.NoError(b.t, err)
	if response.StatusCode != http.StatusSwitchingProtocols {
		_, err = new(bytes.Buffer).ReadFrom(response.Body)
		require.NoError(b.t, err)
	}
	return response.StatusCode, !response.Close
}

func (b *balanced) poll(p *poller, sequence int, headers ...string) {
	b.t.Helper()
	status, stays := b.passOn(http.MethodPost, p.say(sequence), append([]string{
		gatewaytest.NameHeader, p.name, "Authorization", p.headers.Get("Authorization"), "Content-Type", "application/x-protobuf",
	}, headers...)...)
	require.Equal(b.t, http.StatusOK, status)
	require.True(b.t, stays)
}

// TestAgentsOnOneConnection has a load balancer pass on polls of several agents on one connection: each comes from where
// the balancer says, or, where it does not say, from the balancer, and never from where the one before came.
func TestAgentsOnOneConnection(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		b := s.balanced()
		b.poll(s.poller("alice"), 1, "X-Forwarded-For", "203.0.113.5")
		require.Equal(t, "203.0.113.5:0", s.server.WantQuestion().RemoteAddress)
		b.poll(s.poller("bob"), 1, "X-Forwarded-For", "203.0.113.6")
		require.Equal(t, "203.0.113.6:0", s.server.WantQuestion().RemoteAddress)
		b.poll(s.poller("cathy"), 1)
		host, _, err := net.SplitHostPort(s.server.WantQuestion().RemoteAddress)
		require.NoError(t, err)
		require.Equal(t, balancerIP, host)

		s.reload(func(cfg *Config) { cfg.Agents.TrustedProxies, cfg.Agents.AddressFrom = nil, AddressFromConnection })
		b.poll(s.poller("dave"), 1, "X-Forwarded-For", "203.0.113.7")
		host, _, err = net.SplitHostPort(s.server.WantQuestion().RemoteAddress)
		require.NoError(t, err)
		require.Equal(t, balancerIP, host, "it is not trusted any more")
	}, believing(AddressFromXForwardedFor))
}

// TestWebSocketBehindPoll has a load balancer use the connection for a WebSocket on which it has passed on a poll.
func TestWebSocketBehindPoll(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		upgrade := []string{"Connection", "Upgrade", "Upgrade", "websocket", "Sec-WebSocket-Version", "13", "Sec-WebSocket-Key", "AAAAAAAAAAAAAAAAAAAAAA==", "Authorization", "of bob"}
		b := s.balanced()
		b.poll(s.poller("alice"), 1, "X-Forwarded-For", "203.0.113.5")
		status, _ := b.passOn(http.MethodGet, nil, append(upgrade, "X-Forwarded-For", "203.0.113.6", gatewaytest.NameHeader, "bob")...)
		require.Equal(t, http.StatusSwitchingProtocols, status)
		s.wantConnections(2)

		// The limits of a head hold there, too.
		b = s.balanced()
		b.poll(s.poller("alice"), 2)
		status, _ = b.passOn(http.MethodGet, nil, append(upgrade, "X-Large", strings.Repeat("x", s.cfg.Agents.MaxRequestHeaderSize))...)
		require.Equal(t, http.StatusRequestHeaderFieldsTooLarge, status)

		// And who does not wait for the answer is not let in.
		b = s.balanced()
		b.poll(s.poller("alice"), 3)
		r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+gatewayAddress, nil)
		require.NoError(t, err)
		for i := 0; i < len(upgrade); i += 2 {
			r.Header.Set(upgrade[i], upgrade[i+1])
		}
		var head bytes.Buffer
		require.NoError(t, r.Write(&head))
		_, err = b.conn.Write(append(head.Bytes(), 0x82, 0x80, 0, 0, 0, 0))
		require.NoError(t, err)
		response, err := http.ReadResponse(b.in, r)
		require.NoError(t, err)
		require.Equal(t, http.StatusBadRequest, response.StatusCode)
	}, believing(AddressFromXForwardedFor))
}

// TestPollWithOtherKey has somebody poll under the UID of an agent whose credentials stand in a header of its own: the server
// decides on the request as it is, and the agent is left in peace.
func TestPollWithOtherKey(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		s.server.OnConnect(func(q *gatewaytest.Question) {
			if q.Headers.Get("X-Api-Key") == "right" || q.Headers.Get("X-Api-Key") == "new" {
				q.Accept()
				return
			}
			q.Refuse(http.StatusUnauthorized)
		})
		alice, mallory := s.poller("alice", "X-Api-Key", "right"), s.poller("alice", "X-Api-Key", "wrong")
		alice.headers.Del("Authorization")
		mallory.headers.Del("Authorization")
		alice.poll(alice.describe(0))
		s.push(alice, alice.offer("secret"))
		mallory.want(http.StatusUnauthorized, mallory.say(7))
		wantMessage(t, alice.offer("secret"), alice.poll(alice.say(1)))
		alice.headers.Set("X-Api-Key", "new")
		alice.poll(alice.say(2))
		require.Len(t, s.server.Questions(), 3, "asked about when what it comes with changes")
		alice.poll(alice.say(3))
		alice.headers.Set("Traceparent", "00-1-2-01") // of the request, not of the agent
		alice.poll(alice.say(4))
		require.Len(t, s.server.Questions(), 3)
		require.Len(t, s.server.Received(alice.uid), 5)
		s.wantConnections(1)
	})
}

// TestClonesOverHTTP has two agents with the same credentials ask for a UID under the same one, over plain HTTP: each goes on
// under its own, and what is for one is not the other's.
func TestClonesOverHTTP(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		names := 0
		s.server.OnMessage(func(r *gatewaytest.Received) {
			if r.Message.GetFlags()&uint64(protobufs.AgentToServerFlags_AgentToServerFlags_RequestInstanceUid) == 0 {
				r.Link.Send(&protobufs.ServerToAgent{InstanceUid: r.UID()})
				return
			}
			names++
			r.Link.Send(&protobufs.ServerToAgent{InstanceUid: r.UID(), AgentIdentification: &protobufs.AgentIdentification{
				NewInstanceUid: gatewaytest.UID(fmt.Sprintf("clone %d", names)),
			}})
		})
		alice, bob := s.poller("image"), s.poller("image")
		ask := func(p *poller, sequence int) {
			body, err := proto.Marshal(&protobufs.AgentToServer{
				InstanceUid: p.uid, SequenceNum: uint64(sequence), AgentDescription: &protobufs.AgentDescription{},
				Flags: uint64(protobufs.AgentToServerFlags_AgentToServerFlags_RequestInstanceUid),
			})
			require.NoError(t, err)
			p.uid = p.poll(body).GetAgentIdentification().GetNewInstanceUid()
			require.NotEmpty(t, p.uid)
		}
		ask(alice, 1)
		alice.poll(alice.say(2))
		ask(bob, 1)
		bob.poll(bob.say(2))
		require.NotEqual(t, alice.uid, bob.uid)
		s.wantConnections(2)
		for n := range 3 {
			s.push(alice, alice.offer("alice"))
			wantMessage(t, bob.empty(), bob.poll(bob.say(3+n)))
			wantMessage(t, alice.offer("alice"), alice.poll(alice.say(3+n)))
		}
	})
}

// TestPollersArePolledForByNobody leaves agents over plain HTTP to poll by themselves, also those that do so rarely.
func TestPollersArePolledForByNobody(t *testing.T) {
	playHTTP(t, func(t *testing.T, s *stage, o *postOffice) {
		alice := s.poller("alice")
		for n := range 4 {
			alice.poll(alice.say(n))
			time.Sleep(70 * time.Second)
		}
		o.wantSequence(&gatewaytest.Agent{UID: alice.uid}, 0, 1, 2, 3)
	})
}

// TestFallbackOverHTTP goes back to the first endpoint of a server over plain HTTP when that has answered for a minute.
func TestFallbackOverHTTP(t *testing.T) {
	playHTTP(t, func(t *testing.T, s *stage, o *postOffice) {
		other := &postOffice{t: t, open: map[string]int{}, connsUp: map[net.Conn]bool{}}
		listener, err := s.net.Listen(fallbackAddress(0))
		require.NoError(t, err)
		server := &http.Server{Handler: other, ConnState: other.count}
		var serving sync.WaitGroup
		serving.Go(func() { _ = server.Serve(listener) })
		t.Cleanup(func() { _ = server.Close(); serving.Wait() })

		alice, bob := s.connect("alice"), s.poller("bob")
		agent := &gatewaytest.Agent{UID: bob.uid}
		alice.Say(1)
		bob.poll(bob.say(1))
		o.wantSequence(alice, 1)
		o.wantSequence(agent, 1)
		require.NoError(t, o.server.Close())
		alice.Say(2)
		time.Sleep(30 * time.Second)
		bob.poll(bob.say(2))
		require.EqualValues(t, 2, other.from(alice)[len(other.from(alice))-1].SequenceNum)
		require.EqualValues(t, 2, other.from(agent)[len(other.from(agent))-1].SequenceNum)
		s.wantAt(1)

		o.start(s.net)
		time.Sleep(30 * time.Second)
		bob.poll(bob.say(3))
		s.wantAt(1)
		require.NoError(t, o.server.Close())
		time.Sleep(15 * time.Second)
		o.start(s.net)
		time.Sleep(provenTime - time.Second)
		bob.poll(bob.say(4))
		s.wantAt(1)
		time.Sleep(30 * time.Second)
		s.wantAt(0)
		bob.poll(bob.say(5))
		require.EqualValues(t, 5, o.from(agent)[len(o.from(agent))-1].SequenceNum)
		time.Sleep(5 * time.Second)
		other.mu.Lock()
		defer other.mu.Unlock()
		require.Empty(t, other.connsUp, "no connection is left there")
	}, func(cfg *Config) {
		cfg.Server.FallbackEndpoints = []string{"http://" + fallbackAddress(0) + "/v1/opamp"}
	})
}

// TestPollRefusedOverHTTP answers the poll of an agent as the server over plain HTTP has answered it.
func TestPollRefusedOverHTTP(t *testing.T) {
	playHTTP(t, func(t *testing.T, s *stage, o *postOffice) {
		o.answers(func(w http.ResponseWriter, r *http.Request, _ *posted) bool {
			if r.Header.Get("X-Api-Key") == "right" {
				return false
			}
			w.Header().Set("WWW-Authenticate", "Key")
			w.WriteHeader(http.StatusUnauthorized)
			return true
		})
		alice, mallory := s.poller("alice", "X-Api-Key", "right"), s.poller("alice", "X-Api-Key", "wrong")
		alice.poll(alice.say(1))
		for range 2 {
			got := mallory.want(http.StatusUnauthorized, mallory.describe(2), "Traceparent", time.Now().String())
			require.Equal(t, "Key", got.Header.Get("WWW-Authenticate"))
			time.Sleep(time.Second)
		}
		require.Len(t, o.from(&gatewaytest.Agent{UID: alice.uid}), 2, "what will be the same next time is not posted again")
		wantMessage(t, alice.empty(), alice.poll(alice.say(3)))
		s.wantConnections(1)
		o.wantSequence(&gatewaytest.Agent{UID: alice.uid}, 1, 2, 3)
	})
}

// TestPollersOverReloadToHTTP takes agents over plain HTTP from a server by WebSocket to one over plain HTTP, and back.
func TestPollersOverReloadToHTTP(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		o := &postOffice{t: t, open: map[string]int{}, connsUp: map[net.Conn]bool{}}
		listener, err := s.net.Listen(fallbackAddress(0))
		require.NoError(t, err)
		server := &http.Server{Handler: o, ConnState: o.count}
		var serving sync.WaitGroup
		serving.Go(func() { _ = server.Serve(listener) })
		t.Cleanup(func() { _ = server.Close(); serving.Wait(); time.Sleep(time.Second) })

		alice, bob := s.poller("alice"), s.connect("bob")
		alice.poll(alice.describe(1))
		ws := s.cfg.Server.Endpoint
		for n := range 3 {
			same := s.gateway
			s.reload(func(cfg *Config) { cfg.Server.Endpoint = "http://" + fallbackAddress(0) + "/v1/opamp" })
			require.Same(t, same, s.gateway)
			time.Sleep(5 * time.Second)
			alice.poll(alice.say(10*n + 2))
			time.Sleep(time.Second)
			posts := o.from(&gatewaytest.Agent{UID: alice.uid})
			require.EqualValues(t, 10*n+2, posts[len(posts)-1].SequenceNum)
			bob.Say(10*n + 2)
			posts = o.from(bob)
			require.EqualValues(t, 10*n+2, posts[len(posts)-1].SequenceNum)
			(&statusPage{gateway: s.gateway}).Status()
			(&statusPage{gateway: s.gateway}).Agents(nil, wire.UID{})
			s.wantConnections(2)
			asked := len(s.server.Questions())
			s.reload(func(cfg *Config) { cfg.Server.Endpoint = ws })
			require.Same(t, same, s.gateway)
			time.Sleep(5 * time.Second)
			alice.poll(alice.say(10*n + 3))
			require.Len(t, s.server.Questions(), asked+2, "both are introduced")
			synctest.Wait()
			received := s.server.Received(alice.uid)
			require.EqualValues(t, 10*n+3, received[len(received)-1].Message.GetSequenceNum())
			s.wantConnections(2)
		}
		s.wantFaults(nil)
	})
}

// TestDrainOfPollers has agents over plain HTTP go on polling while the gateway drains, until it is their turn to go.
func TestDrainOfPollers(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		s.answering()
		agents := make([]*poller, 20)
		for i := range agents {
			agents[i] = s.poller(fmt.Sprintf("agent %d", i))
			agents[i].poll(agents[i].describe(1))
		}
		links := s.server.WantLinks(3)
		stopped := s.endSlowly()
		for round := range 9 {
			time.Sleep(2 * time.Second)
			staying := len(s.gateway.server.staying())
			require.InDelta(t, 20-2*(round+1), staying, 1)
			polled := 0
			for _, a := range agents {
				if got, err := a.post(bytes.NewReader(a.say(2 + round))); err == nil && got.StatusCode == http.StatusOK {
					wantMessage(t, a.offer(strconv.Itoa(2+round)), a.message(got))
					polled++
				} else if err == nil {
					require.Equal(t, http.StatusServiceUnavailable, got.StatusCode)
					require.NotEmpty(t, got.Header.Get("Retry-After"))
				}
			}
			require.Equal(t, staying, polled)
		}
		require.InDelta(t, 20*time.Second, stopped(), float64(time.Second))
		require.Len(t, s.server.Questions(), 20, "nobody new is asked about")
		for _, link := range links {
			link.WantClosed(websocket.CloseGoingAway)
		}
	}, drainingFor(20*time.Second))
}

// TestAcceptedFromHTTP takes agents that nobody is asked about from a server over plain HTTP to one by WebSocket, which does
// not know questions: it is asked none.
func TestAcceptedFromHTTP(t *testing.T) {
	playHTTP(t, func(t *testing.T, s *stage, _ *postOffice) {
		s.server = gatewaytest.NewServer(t, func() (net.Listener, error) { return s.net.Listen(fallbackAddress(0)) })
		s.server.OnConnect(func(*gatewaytest.Question) {})
		s.server.Start()
		alice, bob := s.connect("alice"), s.poller("bob")
		alice.Say(1)
		bob.poll(bob.describe(1))
		s.reload(func(cfg *Config) { cfg.Server.Endpoint = "ws://" + fallbackAddress(0) + "/v1/opamp" })
		time.Sleep(10 * time.Second)
		s.server.WantFrame(alice.UID, alice.Say(2))
		bob.poll(bob.say(2))
		require.EqualValues(t, 2, s.server.Next(bob.uid).Message.GetSequenceNum())
		require.Empty(t, s.server.Questions())
	}, func(cfg *Config) { cfg.Server.AgentAdmission = AdmissionAccept })
}

// TestShownPosts shows what waits for a server over plain HTTP.
func TestShownPosts(t *testing.T) {
	playHTTP(t, func(t *testing.T, s *stage, o *postOffice) {
		answer := make(chan struct{})
		o.answers(func(http.ResponseWriter, *http.Request, *posted) bool {
			<-answer
			return false
		})
		alice := s.connect("alice")
		for n := range 3 {
			alice.Say(n)
		}
		synctest.Wait()
		link := (&statusPage{gateway: s.gateway}).Status().Links[0]
		require.Equal(t, 1, link.OnItsWay)
		require.Greater(t, link.WaitingBytes, 2*len(gatewaytest.Status(alice.UID, 1)))
		close(answer)
		o.wantSequence(alice, 0, 1, 2)
		require.Zero(t, (&statusPage{gateway: s.gateway}).Status().Links[0].WaitingBytes)
	})
}
