package opampgateway

import (
	"bytes"
	"compress/gzip"
	"fmt"
	"io"
	"net"
	"net/http"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gorilla/websocket"
	"github.com/open-telemetry/opamp-go/protobufs"
	"github.com/stretchr/testify/require"
	"go.opentelemetry.io/collector/config/configopaque"
	"go.uber.org/zap"
	"google.golang.org/protobuf/proto"

	"github.com/opampgateway/opampgateway/internal/connect"
	"github.com/opampgateway/opampgateway/internal/gatewaytest"
	"github.com/opampgateway/opampgateway/internal/telemetry"
)

// postOffice is a server over plain HTTP that is strict: it takes posts only as the specification has them, one at a
// time of each agent. It answers each with the agent's uid, unless a test says otherwise.
type postOffice struct {
	t      *testing.T
	server *http.Server

	lossy bool // connections are lost, and the server may notice late: a message is posted again while it is still at it

	mu      sync.Mutex
	answer  func(w http.ResponseWriter, r *http.Request, p *posted) bool // false for the usual answer; nil for always
	all     []*posted
	open    map[string]int // by uid
	most    int            // how many were open at a time
	probes  int
	connsUp map[net.Conn]bool
	conns   int // most at a time
}

// posted is one message that was posted.
type posted struct {
	*protobufs.AgentToServer

	header http.Header
	body   []byte
	at     time.Time
}

// playHTTP is play with a server over plain HTTP.
func playHTTP(t *testing.T, test func(t *testing.T, s *stage, o *postOffice), change ...func(*Config)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		s := &stage{t: t, net: gatewaytest.NewNetwork()}
		o := &postOffice{t: t, open: map[string]int{}, connsUp: map[net.Conn]bool{}}
		o.start(s.net)
		s.start(append([]func(*Config){func(cfg *Config) { cfg.Server.Endpoint = "http://" + serverAddress + "/v1/opamp" }}, change...)...)
		time.Sleep(time.Second)
		test(t, s, o)
	})
}

func (o *postOffice) start(network *gatewaytest.Network) {
	listener, err := network.Listen(serverAddress)
	require.NoError(o.t, err)
	server := &http.Server{Handler: o, ConnState: o.count}
	o.server = server
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = server.Serve(listener)
	}()
	o.t.Cleanup(func() {
		_ = server.Close()
		<-done
		time.Sleep(time.Second)
	})
}

func (o *postOffice) count(conn net.Conn, state http.ConnState) {
	o.mu.Lock()
	defer o.mu.Unlock()
	switch state {
	case http.StateNew:
		o.connsUp[conn] = true
	case http.StateClosed:
		delete(o.connsUp, conn)
	}
	o.conns = max(o.conns, len(o.connsUp))
}

func (o *postOffice) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return
	}
	p := &posted{AgentToServer: &protobufs.AgentToServer{}, header: r.Header, body: body, at: time.Now()}
	switch {
	case r.Method == http.MethodHead:
		o.mu.Lock()
		o.probes++
		o.mu.Unlock()
		w.WriteHeader(http.StatusMethodNotAllowed)
		return
	case r.Method != http.MethodPost, r.URL.Path != "/v1/opamp", r.Header.Get("Content-Type") != "application/x-protobuf",
		r.Header.Get("Accept-Encoding") != "gzip", proto.Unmarshal(body, p.AgentToServer) != nil, r.ContentLength != int64(len(body)):
		o.t.Errorf("not as the specification has it: %s %s %v", r.Method, r.URL, r.Header)
	}
	for name := range r.Header {
		if name == "Upgrade" || name == "Connection" || strings.HasPrefix(name, "Sec-Websocket") || name == connectionIDHeader {
			o.t.Errorf("header of another hop: %s", name)
		}
	}
	uid := string(p.InstanceUid)
	o.mu.Lock()
	o.all = append(o.all, p)
	o.open[uid]++
	if o.open[uid] > 1 && !o.lossy {
		o.t.Errorf("two posts of one agent at a time")
	}
	open := 0
	for _, n := range o.open {
		open += n
	}
	o.most = max(o.most, open)
	answer := o.answer
	o.mu.Unlock()
	defer func() {
		o.mu.Lock()
		defer o.mu.Unlock()
		o.open[uid]--
	}()
	if answer == nil || !answer(w, r, p) {
		answerWith(w, &protobufs.ServerToAgent{InstanceUid: p.InstanceUid})
	}
}

func answerWith(w http.ResponseWriter, message *protobufs.ServerToAgent) {
	body, _ := proto.Marshal(message)
	w.Header().Set("Content-Type", "application/x-protobuf")
	_, _ = w.Write(body)
}

// answers has the server answer otherwise from now on.
func (o *postOffice) answers(answer func(w http.ResponseWriter, r *http.Request, p *posted) bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.answer = answer
}

// fails has the server answer this status to everybody, or to some.
func (o *postOffice) fails(status int, to ...*gatewaytest.Agent) {
	o.answers(func(w http.ResponseWriter, _ *http.Request, p *posted) bool {
		for _, a := range to {
			if bytes.Equal(p.InstanceUid, a.UID) {
				w.WriteHeader(status)
				return true
			}
		}
		if len(to) == 0 {
			w.WriteHeader(status)
		}
		return len(to) == 0
	})
}

// from returns what an agent has posted, once it is quiet.
func (o *postOffice) from(a *gatewaytest.Agent) (all []*posted) {
	synctest.Wait()
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, p := range o.all {
		if bytes.Equal(p.InstanceUid, a.UID) {
			all = append(all, p)
		}
	}
	return all
}

// wantSequence checks the sequence numbers of what an agent has posted.
func (o *postOffice) wantSequence(a *gatewaytest.Agent, want ...uint64) {
	o.t.Helper()
	got := []uint64{}
	for _, p := range o.from(a) {
		got = append(got, p.SequenceNum)
	}
	require.Equal(o.t, want, got)
}

func uidOnly(a *gatewaytest.Agent) *protobufs.ServerToAgent {
	return &protobufs.ServerToAgent{InstanceUid: a.UID}
}

func TestPosts(t *testing.T) {
	playHTTP(t, func(t *testing.T, s *stage, o *postOffice) {
		alice := s.connect("alice", "Authorization", "Secret-Key alice", "X-Team", "blue")
		bob := s.connect("bob", "Authorization", "Secret-Key bob")
		frame := alice.Say(1)
		alice.WantMessage(uidOnly(alice))
		bob.Say(1)
		bob.WantMessage(uidOnly(bob))
		alice.Say(2)
		alice.WantMessage(uidOnly(alice))

		posts := o.from(alice)
		require.Len(t, posts, 2)
		require.Equal(t, frame[1:], posts[0].body, "byte for byte")
		require.Equal(t, "Secret-Key alice", posts[0].header.Get("Authorization"))
		require.Equal(t, "blue", posts[0].header.Get("X-Team"))
		require.Equal(t, "alice", posts[1].header.Get(gatewaytest.NameHeader))
		require.Len(t, posts[0].header.Get("Opamp-Instance-Uid"), 36)
		require.Equal(t, "Secret-Key bob", o.from(bob)[0].header.Get("Authorization"))
		s.wantNotLogged("Secret-Key")
		require.Len(t, s.pool.links(), 1)
	}, func(cfg *Config) { cfg.Server.Headers.Set("Authorization", "Secret-Key gateway") })
}

// The gateway's own key is for those that have none, where the listener decides who is let in; and for nobody
// where the server does.
func TestPostsWithKeyOfGateway(t *testing.T) {
	for admission, want := range map[AgentAdmission]string{AdmissionAsk: "", AdmissionAccept: "Secret-Key gateway"} {
		t.Run(string(admission), func(t *testing.T) {
			playHTTP(t, func(t *testing.T, s *stage, o *postOffice) {
				alice, bob := s.connect("alice"), s.connect("bob", "Authorization", "Secret-Key bob")
				alice.Say(1)
				bob.Say(1)
				require.Equal(t, want, o.from(alice)[0].header.Get("Authorization"))
				require.Equal(t, "Secret-Key bob", o.from(bob)[0].header.Get("Authorization"))
			}, func(cfg *Config) {
				cfg.Server.AgentAdmission = admission
				cfg.Server.Headers.Set("Authorization", configopaque.String("Secret-Key gateway"))
			})
		})
	}
}

func TestPostsInOrder(t *testing.T) {
	playHTTP(t, func(t *testing.T, s *stage, o *postOffice) {
		o.answers(func(http.ResponseWriter, *http.Request, *posted) bool {
			time.Sleep(10 * time.Millisecond)
			return false
		})
		var agents []*gatewaytest.Agent
		for i := range 10 {
			agents = append(agents, s.connect(fmt.Sprint("agent ", i)))
		}
		var want []uint64
		for n := range 20 {
			for _, a := range agents {
				a.Say(n + 1)
			}
			want = append(want, uint64(n+1))
		}
		time.Sleep(5 * time.Second)
		for _, a := range agents {
			o.wantSequence(a, want...)
			require.Len(t, a.Inbox(), 20)
		}
		require.Equal(t, 3, o.most, "posts at a time")
		require.Equal(t, 3, o.conns, "connections at a time")
	})
}

// An agent that says much waits itself, and others have their turns.
func TestPostsFairly(t *testing.T) {
	playHTTP(t, func(t *testing.T, s *stage, o *postOffice) {
		o.answers(func(http.ResponseWriter, *http.Request, *posted) bool {
			time.Sleep(100 * time.Millisecond)
			return false
		})
		mallory, alice := s.connect("mallory"), s.connect("alice")
		go func() {
			for n := range 100 {
				mallory.Send(gatewaytest.Report(mallory.UID, n+1, 16<<10))
			}
		}()
		time.Sleep(time.Second)
		bytes, _ := s.pool.links()[0].posts.Waiting()
		require.Less(t, bytes, 200<<10, "what waits to be posted of one agent")
		require.Less(t, len(o.from(mallory)), 20)
		began := time.Now()
		alice.Say(1)
		alice.WantMessage(uidOnly(alice))
		require.LessOrEqual(t, time.Since(began), 200*time.Millisecond)
		time.Sleep(20 * time.Second)
		require.Len(t, o.from(mallory), 100, "and nothing is lost")
	}, func(cfg *Config) { cfg.Server.Connections = 1 })
}

// An agent whose posts hang holds up others for no longer than one post may take, and only where there is one connection.
func TestPostsThatHang(t *testing.T) {
	playHTTP(t, func(t *testing.T, s *stage, o *postOffice) {
		mallory, alice := s.connect("mallory"), s.connect("alice")
		o.answers(func(_ http.ResponseWriter, r *http.Request, p *posted) bool {
			if bytes.Equal(p.InstanceUid, mallory.UID) {
				<-r.Context().Done()
				return true
			}
			return false
		})
		alice.Say(1)
		alice.WantMessage(uidOnly(alice))
		mallory.Say(1)
		for n := range 100 {
			time.Sleep(time.Second)
			began := time.Now()
			alice.Say(n + 2)
			alice.WantMessage(uidOnly(alice))
			require.Zero(t, time.Since(began))
		}
		require.GreaterOrEqual(t, len(o.from(mallory)), 3, "it is posted again")
		alice.WantConnected()
		mallory.WantConnected()
		s.wantFault(telemetry.ReasonLinkLost, 0)
		o.answers(nil)
	})
}

func TestPostsAnswers(t *testing.T) {
	for name, test := range map[string]struct {
		answer func(w http.ResponseWriter, p *posted)
		want   func(a *gatewaytest.Agent) *protobufs.ServerToAgent // nil for nothing
		fault  telemetry.Reason
	}{
		"an offer": {
			func(w http.ResponseWriter, p *posted) {
				answerWith(w, &protobufs.ServerToAgent{InstanceUid: p.InstanceUid, Flags: 1})
			},
			func(a *gatewaytest.Agent) *protobufs.ServerToAgent {
				return &protobufs.ServerToAgent{InstanceUid: a.UID, Flags: 1}
			}, "",
		},
		"without uid": {
			func(w http.ResponseWriter, _ *posted) { answerWith(w, &protobufs.ServerToAgent{Flags: 1}) },
			func(a *gatewaytest.Agent) *protobufs.ServerToAgent {
				return &protobufs.ServerToAgent{InstanceUid: a.UID, Flags: 1}
			}, "",
		},
		"empty":      {func(http.ResponseWriter, *posted) {}, uidOnly, ""},
		"no content": {func(w http.ResponseWriter, _ *posted) { w.WriteHeader(http.StatusNoContent) }, uidOnly, ""},
		"compressed": {
			func(w http.ResponseWriter, p *posted) {
				body, _ := proto.Marshal(&protobufs.ServerToAgent{InstanceUid: p.InstanceUid, Flags: 1})
				w.Header().Set("Content-Encoding", "gzip")
				zip := gzip.NewWriter(w)
				_, _ = zip.Write(body)
				_ = zip.Close()
			},
			func(a *gatewaytest.Agent) *protobufs.ServerToAgent {
				return &protobufs.ServerToAgent{InstanceUid: a.UID, Flags: 1}
			}, "",
		},
		"compressed, too large": {
			func(w http.ResponseWriter, _ *posted) {
				w.Header().Set("Content-Encoding", "gzip")
				zip := gzip.NewWriter(w)
				_, _ = zip.Write(make([]byte, 10<<20))
				_ = zip.Close()
			}, nil, telemetry.ReasonServerTooLarge,
		},
		"large": {
			func(w http.ResponseWriter, p *posted) {
				_, _ = w.Write(gatewaytest.Offer(p.InstanceUid, "hash", 900<<10)[1:])
			},
			func(a *gatewaytest.Agent) *protobufs.ServerToAgent {
				m, _ := gatewaytest.ServerToAgent(gatewaytest.Offer(a.UID, "hash", 900<<10))
				return m
			}, "",
		},
		"unreadable": {
			func(w http.ResponseWriter, _ *posted) { _, _ = w.Write([]byte{0xff, 0xff}) }, nil, telemetry.ReasonServerBadFrame,
		},
	} {
		t.Run(name, func(t *testing.T) {
			playHTTP(t, func(t *testing.T, s *stage, o *postOffice) {
				o.answers(func(w http.ResponseWriter, _ *http.Request, p *posted) bool {
					w.Header().Set("Content-Type", "application/x-protobuf; charset=binary")
					test.answer(w, p)
					return true
				})
				alice := s.connect("alice")
				alice.Say(1)
				time.Sleep(time.Second)
				synctest.Wait()
				if test.want != nil {
					alice.WantMessage(test.want(alice))
				}
				alice.WantNothing()
				alice.WantConnected()
				if test.fault != "" {
					s.wantFault(test.fault, 1)
				}
				o.answers(nil)
				alice.Say(2)
				alice.WantMessage(uidOnly(alice))
			}, func(cfg *Config) { cfg.MaxMessageSize = 1 << 20 })
		})
	}
}

func TestPostsRename(t *testing.T) {
	playHTTP(t, func(t *testing.T, s *stage, o *postOffice) {
		alice := s.connect("alice")
		before, next := alice.UID, gatewaytest.UID("alice's next")
		o.answers(func(w http.ResponseWriter, _ *http.Request, p *posted) bool {
			if bytes.Equal(p.InstanceUid, before) {
				answerWith(w, &protobufs.ServerToAgent{AgentIdentification: &protobufs.AgentIdentification{NewInstanceUid: next}})
				return true
			}
			return false
		})
		alice.Say(1)
		alice.Next()
		require.NotNil(t, s.router.find(next))
		alice.UID = next
		alice.Say(2)
		alice.WantMessage(uidOnly(alice))
		time.Sleep(pollInterval + pollSlack + 2*time.Second)
		o.wantSequence(alice, 2, 3) // and the old name is polled for no more
		require.Len(t, o.all, 3)
	})
}

func TestPolls(t *testing.T) {
	playHTTP(t, func(t *testing.T, s *stage, o *postOffice) {
		alice, bob := s.connect("alice", "Authorization", "Secret-Key alice"), s.connect("bob")
		alice.Say(1)
		alice.WantMessage(uidOnly(alice))
		go func() { // bob beats his heart himself
			for n := range 4 {
				bob.Say(n + 1)
				time.Sleep(pollInterval)
			}
		}()
		time.Sleep(pollInterval + pollSlack - time.Second)
		o.wantSequence(alice, 1)
		time.Sleep(2 * time.Second)
		o.wantSequence(alice, 1, 2)
		time.Sleep(pollInterval)
		o.wantSequence(alice, 1, 2, 3)
		poll := o.from(alice)[2]
		require.Equal(t, uint64(7), poll.Capabilities)
		require.Equal(t, "Secret-Key alice", poll.header.Get("Authorization"))
		alice.WantNothing() // the answer was for nobody
		o.wantSequence(bob, 1, 2, 3)

		o.answers(func(w http.ResponseWriter, _ *http.Request, p *posted) bool {
			answerWith(w, &protobufs.ServerToAgent{InstanceUid: p.InstanceUid, ConnectionSettings: &protobufs.ConnectionSettingsOffers{
				Opamp: &protobufs.OpAMPConnectionSettings{HeartbeatIntervalSeconds: 5},
			}})
			return true
		})
		time.Sleep(pollInterval)
		require.Equal(t, uint64(5), mustMessage(t, alice.Next()).GetConnectionSettings().GetOpamp().GetHeartbeatIntervalSeconds(), "what is pushed")
		before := len(o.from(alice))
		time.Sleep(20 * time.Second)
		require.InDelta(t, 4, len(o.from(alice))-before, 1, "as often as the server has offered")
		alice.SayGoodbye()
		time.Sleep(time.Second)
		require.NotNil(t, o.from(alice)[len(o.from(alice))-1].AgentDisconnect)
		before = len(o.from(alice))
		time.Sleep(time.Minute)
		require.Len(t, o.from(alice), before, "nobody is polled for who has left")
	})
}

func mustMessage(t *testing.T, frame []byte) *protobufs.ServerToAgent {
	t.Helper()
	message, err := gatewaytest.ServerToAgent(frame)
	require.NoError(t, err)
	return message
}

func TestPostsRefused(t *testing.T) {
	playHTTP(t, func(t *testing.T, s *stage, o *postOffice) {
		alice, bob := s.introduceHTTP("alice"), s.connect("bob", "X-Key", "wrong")
		o.answers(func(w http.ResponseWriter, r *http.Request, _ *posted) bool {
			if r.Header.Get("X-Key") != "wrong" {
				return false
			}
			w.Header().Set("WWW-Authenticate", "Secret-Key")
			w.Header().Set("Server", "secret version")
			http.Error(w, "no", http.StatusUnauthorized)
			return true
		})
		bob.Say(1)
		bob.WantClosed(websocket.ClosePolicyViolation)
		s.wantFault(telemetry.ReasonAgentRefused, 1)
		require.Len(t, s.logged(zap.WarnLevel, "refused an agent"), 1)
		require.Len(t, o.from(bob), 1, "no goodbye for whom the server does not know")

		header := s.door.WantRefused(t, "bob", http.StatusUnauthorized, "X-Key", "wrong")
		require.Equal(t, "Secret-Key", header.Get("WWW-Authenticate"))
		require.Empty(t, header.Get("Server"))
		require.Len(t, o.from(bob), 1, "as the server has said before")
		again := s.connect("bob", "X-Key", "right")
		again.Say(1)
		again.WantMessage(uidOnly(again))
		time.Sleep(2 * refusalTime)
		s.connect("bob", "X-Key", "wrong") // until the server says so again
		alice.WantConnected()
	})
}

// introduceHTTP is introduce where the server answers.
func (s *stage) introduceHTTP(name string, headers ...string) *gatewaytest.Agent {
	s.t.Helper()
	a := s.connect(name, headers...)
	a.Say(1)
	a.WantMessage(uidOnly(a))
	return a
}

// A message that the server does not take is not posted again, and its agent is told.
func TestPostsTurnedDown(t *testing.T) {
	for _, status := range []int{http.StatusBadRequest, http.StatusRequestEntityTooLarge} {
		playHTTP(t, func(t *testing.T, s *stage, o *postOffice) {
			alice := s.introduceHTTP("alice")
			o.fails(status)
			alice.Say(2)
			require.Equal(t, protobufs.ServerErrorResponseType_ServerErrorResponseType_BadRequest, mustMessage(t, alice.Next()).GetErrorResponse().GetType())
			s.wantFault(telemetry.ReasonServerTurnsDown, 1)
			o.answers(nil)
			alice.Say(3)
			alice.WantMessage(uidOnly(alice))
			o.wantSequence(alice, 1, 2, 3)
		})
	}
}

func TestPostsThrottled(t *testing.T) {
	playHTTP(t, func(t *testing.T, s *stage, o *postOffice) {
		alice, bob, cathy := s.introduceHTTP("alice"), s.introduceHTTP("bob"), s.introduceHTTP("cathy")
		throttle := func(to ...*gatewaytest.Agent) {
			o.answers(func(w http.ResponseWriter, _ *http.Request, p *posted) bool {
				for _, a := range to {
					if bytes.Equal(a.UID, p.InstanceUid) {
						w.Header().Set("Retry-After", "20")
						w.WriteHeader(http.StatusServiceUnavailable)
						return true
					}
				}
				return false
			})
		}
		throttle(alice)
		alice.Say(2)
		bob.Say(2)
		bob.WantMessage(uidOnly(bob))
		time.Sleep(time.Second)
		throttle(alice, bob)
		bob.Say(3)
		synctest.Wait()
		cathy.Say(2) // it is too much for the server
		began := time.Now()
		throttle()
		time.Sleep(19 * time.Second)
		cathy.WantMessage(uidOnly(cathy))
		require.Equal(t, 20*time.Second, time.Since(began))
		bob.WantMessage(uidOnly(bob))
		alice.WantMessage(uidOnly(alice))
		o.wantSequence(alice, 1, 2, 2)
		o.wantSequence(bob, 1, 2, 3, 3)
		s.wantFault(telemetry.ReasonLinkLost, 0)
	})
}

// A message at which the server fails, and only at this one, is given up after a while.
func TestPostsThatFail(t *testing.T) {
	playHTTP(t, func(t *testing.T, s *stage, o *postOffice) {
		mallory, alice := s.introduceHTTP("mallory"), s.introduceHTTP("alice")
		o.fails(http.StatusInternalServerError, mallory)
		mallory.Say(2)
		for n := range 60 {
			alice.Say(n + 2)
			alice.WantMessage(uidOnly(alice))
			time.Sleep(time.Second)
		}
		require.Equal(t, protobufs.ServerErrorResponseType_ServerErrorResponseType_BadRequest, mustMessage(t, mallory.Next()).GetErrorResponse().GetType())
		s.wantFault(telemetry.ReasonServerTurnsDown, 1)
		s.wantFault(telemetry.ReasonLinkLost, 0)
		tries := 0
		for _, p := range o.from(mallory) {
			if p.SequenceNum == 2 {
				tries++
			}
		}
		require.InDelta(t, maxBlamed, tries, 2)
		o.answers(nil)
		mallory.Say(3)
		mallory.WantMessage(uidOnly(mallory))
	})
}

// A server that is away loses nothing, nobody is let in meanwhile, and agents stay for the grace period.
func TestPostsToServerThatIsAway(t *testing.T) {
	playHTTP(t, func(t *testing.T, s *stage, o *postOffice) {
		alice := s.introduceHTTP("alice")
		require.NoError(t, o.server.Close())
		time.Sleep(time.Second)
		alice.Say(2)
		alice.Say(3)
		time.Sleep(5 * time.Second)
		require.Empty(t, s.pool.links())
		s.wantFault(telemetry.ReasonLinkLost, 1)
		s.door.WantRefused(t, "bob", http.StatusServiceUnavailable)
		o.start(s.net)
		time.Sleep(10 * time.Second)
		o.wantSequence(alice, 1, 2, 3)
		alice.WantMessage(uidOnly(alice))
		alice.WantMessage(uidOnly(alice))
		alice.WantNothing() // it is not asked for its state: the server has not noticed anything

		require.NoError(t, o.server.Close())
		alice.Say(4)
		_, err := alice.WantEnd(2 * time.Minute)
		require.Error(t, err)
		s.wantFault(telemetry.ReasonGraceOver, 1)
	})
}

// A server all of whose answers are failures is as one that is away: what is said waits for it, and comes once.
func TestPostsWhileAllFail(t *testing.T) {
	playHTTP(t, func(t *testing.T, s *stage, o *postOffice) {
		alice, bob := s.introduceHTTP("alice"), s.introduceHTTP("bob")
		taken := map[string][]uint64{}
		o.fails(http.StatusBadGateway)
		alice.Say(2)
		bob.Say(2)
		time.Sleep(25 * time.Second)
		require.NotZero(t, s.tel.FaultCount(telemetry.ReasonLinkLost))
		o.answers(func(_ http.ResponseWriter, _ *http.Request, p *posted) bool {
			o.mu.Lock()
			defer o.mu.Unlock()
			taken[string(p.InstanceUid)] = append(taken[string(p.InstanceUid)], p.SequenceNum)
			return false
		})
		time.Sleep(10 * time.Second)
		synctest.Wait()
		require.Equal(t, []uint64{2}, taken[string(alice.UID)])
		require.Equal(t, []uint64{2}, taken[string(bob.UID)])
		alice.WantConnected()
		require.Less(t, len(o.all), 100, "it is not hammered")
	})
}

func TestPostsRedirected(t *testing.T) {
	for name, test := range map[string]struct {
		to       string
		withheld bool
		follows  bool
	}{
		"same host":    {"/v1/opamp?again", false, true},
		"another host": {"http://localhost:9001/v1/opamp", true, true},
		"a user":       {"http://me@localhost:9000/v1/opamp", false, false},
		"no HTTP":      {"ftp://localhost/", false, false},
	} {
		t.Run(name, func(t *testing.T) {
			playHTTP(t, func(t *testing.T, s *stage, o *postOffice) {
				elsewhere := &postOffice{t: t, open: map[string]int{}, connsUp: map[net.Conn]bool{}}
				listener, err := s.net.Listen("localhost:9001")
				require.NoError(t, err)
				server := &http.Server{Handler: elsewhere}
				go func() { _ = server.Serve(listener) }()
				defer server.Close()
				alice := s.connect("alice", "Authorization", "Secret-Key alice")
				redirect := func(w http.ResponseWriter, r *http.Request, _ *posted) bool {
					if r.URL.RawQuery == "again" {
						return false
					}
					w.Header().Set("Location", test.to)
					w.WriteHeader(http.StatusTemporaryRedirect)
					return true
				}
				o.answers(redirect)
				alice.Say(1)
				time.Sleep(500 * time.Millisecond)
				synctest.Wait()
				all := slices.Concat(o.from(alice)[1:], elsewhere.from(alice))
				o.answers(nil)
				if !test.follows {
					require.NotEmpty(t, s.logged(zap.WarnLevel, "lost connection"))
					return
				}
				require.Len(t, all, 1)
				require.Equal(t, test.withheld, all[0].header.Get("Authorization") == "")
				alice.WantMessage(uidOnly(alice))
			})
		})
	}
}

// What is said at the end is posted, and no more.
func TestPostsAtTheEnd(t *testing.T) {
	playHTTP(t, func(t *testing.T, s *stage, o *postOffice) {
		alice, bob := s.introduceHTTP("alice", "X-Key", "alice"), s.introduceHTTP("bob")
		alice.Vanish()
		time.Sleep(time.Second)
		last := o.from(alice)
		require.Len(t, last, 2)
		require.NotNil(t, last[1].AgentDisconnect)
		require.Equal(t, "alice", last[1].header.Get("X-Key"))
		o.answers(func(http.ResponseWriter, *http.Request, *posted) bool {
			time.Sleep(1200 * time.Millisecond) // longer than the link has without draining
			return false
		})
		bob.Say(2)
		bob.Say(3)
		synctest.Wait()
		s.stop()
		o.wantSequence(bob, 1, 2, 3)
		s.wantFault(telemetry.ReasonServerUnknownUID, 2) // the answers to bob's last words, whom it has let go
	})
}

// From a server on WebSockets to one over plain HTTP and back: agents stay.
func TestPostsAfterReload(t *testing.T) {
	playHTTP(t, func(t *testing.T, s *stage, o *postOffice) {
		alice := s.introduceHTTP("alice", "Authorization", "Secret-Key alice")
		server := gatewaytest.NewServer(t, func() (net.Listener, error) { return s.net.Listen("localhost:9002") })
		server.Start()
		s.reload(func(cfg *Config) { cfg.Server.Endpoint = "ws://localhost:9002/v1/opamp" })
		server.WantLinks(3)
		alice.WantFullStateRequest()
		server.WantFrame(alice.UID, alice.Say(2))
		s.reload(func(cfg *Config) { cfg.Server.Endpoint = "http://" + serverAddress + "/v1/opamp" })
		time.Sleep(3 * time.Second)
		alice.WantFullStateRequest()
		alice.Say(3)
		alice.WantMessage(uidOnly(alice))
		o.wantSequence(alice, 1, 3)
		require.Equal(t, "Secret-Key alice", o.from(alice)[1].header.Get("Authorization"))
	})
}

// The agents behind a gateway are posted for with its headers, each by itself; one that is refused is told, and no other is.
func TestPostsBehindGateway(t *testing.T) {
	playHTTP(t, func(t *testing.T, s *stage, o *postOffice) {
		below := s.connect("gateway", connectionIDHeader, "below/0", "Authorization", "Secret-Key below")
		alice, bob := gatewaytest.UID("alice"), gatewaytest.UID("bob")
		o.answers(func(w http.ResponseWriter, r *http.Request, p *posted) bool {
			require.Equal(t, "Secret-Key below", r.Header.Get("Authorization"))
			if bytes.Equal(p.InstanceUid, bob) {
				w.WriteHeader(http.StatusForbidden)
				return true
			}
			time.Sleep(time.Millisecond)
			return false
		})
		below.Send(gatewaytest.Status(bob, 1))
		require.Equal(t, protobufs.ServerErrorResponseType_ServerErrorResponseType_BadRequest, mustMessage(t, below.Next()).GetErrorResponse().GetType())
		below.Send(gatewaytest.Status(alice, 1))
		require.Equal(t, alice, mustMessage(t, below.Next()).GetInstanceUid())
		below.WantConnected()
		s.wantFault(telemetry.ReasonAgentRefused, 1)
		time.Sleep(pollInterval + pollSlack + time.Second)
		below.UID = alice
		o.wantSequence(below, 1, 2)

		below.Send(gatewaytest.Connect("request", "10.0.0.1:1", http.Header{}))
		time.Sleep(20 * time.Second)
		below.WantClosed(websocket.ClosePolicyViolation)
	})
}

// An idle agent costs the goroutine that reads from it, as with any server; posts cost one each while they are made.
func TestPostsIdle(t *testing.T) {
	playHTTP(t, func(t *testing.T, s *stage, o *postOffice) {
		const many = 50
		before := runtime.NumGoroutine()
		alone := s.introduceHTTP("alice")
		synctest.Wait()
		each := runtime.NumGoroutine() - before // with those of the test's network and agent, and of one connection to the server
		for i := range many {
			s.introduceHTTP(fmt.Sprint("agent ", i))
		}
		time.Sleep(2 * time.Minute)
		synctest.Wait()
		require.LessOrEqual(t, runtime.NumGoroutine()-before, each*(many+1)+10)
		bytes, busy := s.pool.links()[0].posts.Waiting()
		require.Zero(t, bytes)
		require.Zero(t, busy)
		require.Zero(t, s.memory.Up.Held())
		require.Zero(t, s.memory.Down.Held())
		require.GreaterOrEqual(t, len(o.from(alone)), 4)
		require.LessOrEqual(t, o.conns, 3)
	})
}

// A server that refuses everything fills no memory: what is remembered of it is bounded, and forgotten.
func TestRefusalsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var r refusals
		question := func(i int) connect.Question {
			q, err := connect.NewQuestion("10.0.0.1:1", http.Header{"Authorization": {strconv.Itoa(i)}, "Sec-Websocket-Key": {strconv.Itoa(i)}}, nil)
			require.NoError(t, err)
			return q
		}
		verdict := connect.Refusal(http.StatusForbidden, http.Header{"X-Reason": {strings.Repeat("x", 1000)}})
		for i := range 3000 {
			r.note(question(i), verdict)
		}
		require.LessOrEqual(t, r.bytes, maxRefusalBytes)
		require.NotEmpty(t, r.known)
		_, ok := r.find(question(0))
		require.True(t, ok)
		_, ok = r.find(question(2999))
		require.False(t, ok)
		time.Sleep(2 * refusalTime)
		_, ok = r.find(question(0))
		require.False(t, ok, "for a while only")
		r.note(question(2999), verdict)
		_, ok = r.find(question(2999))
		require.True(t, ok)
		require.LessOrEqual(t, r.bytes, maxRefusalBytes)
		r.forget()
		require.Zero(t, r.bytes)
	})
}
