package opampgateway

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/hex"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/open-telemetry/opamp-go/protobufs"
	"github.com/stretchr/testify/require"
	"go.uber.org/zap"
	"google.golang.org/protobuf/proto"

	"github.com/opampgateway/opampgateway/internal/gatewaytest"
	"github.com/opampgateway/opampgateway/internal/telemetry"
)

// poller is an agent over plain HTTP. It polls when its test says so.
type poller struct {
	s       *stage
	name    string
	uid     []byte
	headers http.Header
	client  *http.Client
}

// poller returns an agent of this name, which has its own credentials; further headers are given as name, value ….
func (s *stage) poller(name string, headers ...string) *poller {
	s.t.Helper()
	transport := &http.Transport{DialContext: s.door.Dial, DisableCompression: true}
	s.t.Cleanup(transport.CloseIdleConnections)
	p := &poller{
		s: s, name: name, uid: gatewaytest.UID(name), client: &http.Client{Transport: transport},
		headers: http.Header{gatewaytest.NameHeader: {name}, "Authorization": {"key of " + name}, "Content-Type": {"application/x-protobuf"}},
	}
	for i := 0; i+1 < len(headers); i += 2 {
		p.headers.Set(headers[i], headers[i+1])
	}
	return p
}

// gone forgets that the agent has a connection.
func (p *poller) gone() { p.client.CloseIdleConnections() }

// response is the answer to a poll, with all of its body.
type response struct {
	*http.Response
	body []byte
	took time.Duration
}

// post sends a body, with these headers besides, and returns the response.
func (p *poller) post(body io.Reader, headers ...string) (*response, error) {
	return p.postContext(p.s.t.Context(), body, headers...)
}

func (p *poller) postContext(ctx context.Context, body io.Reader, headers ...string) (*response, error) {
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://"+gatewayAddress+"/v1/opamp", body)
	if err != nil {
		return nil, err
	}
	r.Header = p.headers.Clone()
	for i := 0; i+1 < len(headers); i += 2 {
		r.Header.Set(headers[i], headers[i+1])
	}
	begin := time.Now()
	resp, err := p.client.Do(r)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return &response{resp, b, time.Since(begin)}, err
}

// say is a status of the agent's, as it stands in a POST.
func (p *poller) say(sequence int) []byte { return gatewaytest.Status(p.uid, sequence)[1:] }

// describe is what an agent says that begins anew.
func (p *poller) describe(sequence int) []byte {
	b, err := proto.Marshal(&protobufs.AgentToServer{InstanceUid: p.uid, SequenceNum: uint64(sequence), AgentDescription: &protobufs.AgentDescription{}})
	require.NoError(p.s.t, err)
	return b
}

// want posts a body, and wants a response of this status.
func (p *poller) want(status int, body []byte, headers ...string) *response {
	p.s.t.Helper()
	got, err := p.post(bytes.NewReader(body), headers...)
	require.NoError(p.s.t, err, p.name)
	require.Equal(p.s.t, status, got.StatusCode, "%s: %s", p.name, got.body)
	return got
}

// poll says that, and returns what the gateway answers.
func (p *poller) poll(body []byte) *protobufs.ServerToAgent {
	p.s.t.Helper()
	return p.message(p.want(http.StatusOK, body))
}

func (p *poller) message(got *response) *protobufs.ServerToAgent {
	p.s.t.Helper()
	require.Equal(p.s.t, "application/x-protobuf", got.Header.Get("Content-Type"))
	message := new(protobufs.ServerToAgent)
	require.NoError(p.s.t, proto.Unmarshal(got.body, message))
	return message
}

// meanwhile has f run, and returns what waits for its end.
func meanwhile(f func()) (wait func()) {
	var running sync.WaitGroup
	running.Go(f)
	return running.Wait
}

// empty is what an agent is told when there is nothing to tell.
func (p *poller) empty() *protobufs.ServerToAgent {
	return &protobufs.ServerToAgent{InstanceUid: p.uid}
}

// offer is a message of the server's for the agent, told from others by its hash.
func (p *poller) offer(hash string) *protobufs.ServerToAgent {
	return &protobufs.ServerToAgent{InstanceUid: p.uid, RemoteConfig: &protobufs.AgentRemoteConfig{ConfigHash: []byte(hash)}}
}

func wantMessage(t testing.TB, want, got *protobufs.ServerToAgent) {
	t.Helper()
	if !proto.Equal(want, got) {
		t.Fatalf("got %v\nwant %v", got, want)
	}
}

// answering has the server answer every message with one that repeats its sequence number as a hash.
func (s *stage) answering() {
	s.server.OnMessage(func(r *gatewaytest.Received) {
		r.Link.Send(&protobufs.ServerToAgent{InstanceUid: r.UID(), RemoteConfig: &protobufs.AgentRemoteConfig{
			ConfigHash: []byte(strconv.FormatUint(r.Message.GetSequenceNum(), 10)),
		}})
	})
}

// push has the server send a message on the link of an agent.
func (s *stage) push(p *poller, message *protobufs.ServerToAgent) {
	s.t.Helper()
	synctest.Wait()
	received := s.server.Received(p.uid)
	require.NotEmpty(s.t, received)
	received[len(received)-1].Link.Send(message)
	synctest.Wait()
}

// TestPoll relays what an agent POSTs, as a WebSocket frame, and answers with what the server says to that.
func TestPoll(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		s.answering()
		alice := s.poller("alice", "Agent-ID", "a", "User-Agent", "agent/1")
		for n := range 3 {
			got := alice.want(http.StatusOK, alice.describe(n))
			wantMessage(t, alice.offer(strconv.Itoa(n)), alice.message(got))
			require.Zero(t, got.took, "it waits no longer than for the answer")
			require.Equal(t, gatewaytest.Frame(&protobufs.AgentToServer{
				InstanceUid: alice.uid, SequenceNum: uint64(n), AgentDescription: &protobufs.AgentDescription{},
			}), s.server.Next(alice.uid).Frame)
			time.Sleep(30 * time.Second)
		}
		require.Len(t, s.server.Questions(), 1, "asked about once")
		q := s.server.Questions()[0]
		require.Equal(t, "agent/1", q.Headers.Get("User-Agent"))
		require.Equal(t, "application/x-protobuf", q.Headers.Get("Content-Type"))
		require.Same(t, q.Link, s.server.Received(alice.uid)[0].Link, "introduced on the link where it speaks")
		s.wantConnections(1)
		s.wantAdmissions(telemetry.OutcomeAccepted, 1)
		s.wantFaults(nil)
		require.Empty(t, s.logged(zap.WarnLevel, ""))
		s.wantNotLogged("key of alice")
	})
}

// TestPollOfTextUID takes an agent with the UID of older ones for one of these: no header, either way.
func TestPollOfTextUID(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		s.answering()
		old := s.poller("old")
		old.uid = gatewaytest.TextUID("old")
		wantMessage(t, old.offer("7"), old.poll(old.say(7)))
		require.Equal(t, old.say(7), s.server.Next(old.uid).Frame)
		// Its goodbye stands in another field.
		old.poll(append(bytes.Clone(old.say(8)), 8<<3|2, 0))
		s.wantConnections(0)
	})
}

// TestPollWait answers a poll for which the server has no answer in time with nothing; what comes later, the next gets.
func TestPollWait(t *testing.T) {
	for _, wait := range []time.Duration{0, 2 * time.Second, 20 * time.Second} {
		t.Run(wait.String(), func(t *testing.T) {
			play(t, func(t *testing.T, s *stage) {
				alice := s.poller("alice")
				got := alice.want(http.StatusOK, alice.describe(0))
				wantMessage(t, alice.empty(), alice.message(got))
				require.Equal(t, wait, got.took)
				s.push(alice, alice.offer("late"))
				got = alice.want(http.StatusOK, alice.say(1))
				wantMessage(t, alice.offer("late"), alice.message(got))
				require.Zero(t, got.took, "what waits is answered at once")
			}, func(c *Config) { c.Agents.PollWait = wait })
		})
	}
}

// TestPushesBetweenPolls keeps what the server says between two polls, in order, and answers each poll with one message.
func TestPushesBetweenPolls(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		alice := s.poller("alice")
		alice.poll(alice.describe(0))
		for i := range 5 {
			s.push(alice, alice.offer(strconv.Itoa(i)))
		}
		for i := range 5 {
			wantMessage(t, alice.offer(strconv.Itoa(i)), alice.poll(alice.say(1+i)))
		}
		wantMessage(t, alice.empty(), alice.poll(alice.say(9)))
		s.wantFaults(nil)
	})
}

// TestAnswersThatSayNothing takes no poll of an agent for an answer in which there is nothing that it does not know:
// otherwise what was once pushed would have each answer come a poll too late.
func TestAnswersThatSayNothing(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		s.server.OnMessage(func(r *gatewaytest.Received) {
			r.Link.Send(&protobufs.ServerToAgent{InstanceUid: r.UID(), Capabilities: 3})
		})
		alice := s.poller("alice")
		says := &protobufs.ServerToAgent{InstanceUid: alice.uid, Capabilities: 3}
		wantMessage(t, says, alice.poll(alice.describe(0)))
		s.push(alice, alice.offer("a"))
		wantMessage(t, alice.offer("a"), alice.poll(alice.say(1)))
		synctest.Wait() // the answer to that says nothing, and nobody waits for it
		s.server.OnMessage(nil)
		s.push(alice, &protobufs.ServerToAgent{InstanceUid: alice.uid})
		wantMessage(t, alice.empty(), alice.poll(alice.say(2)))
		// Other capabilities are news.
		s.push(alice, &protobufs.ServerToAgent{InstanceUid: alice.uid, Capabilities: 5})
		wantMessage(t, &protobufs.ServerToAgent{InstanceUid: alice.uid, Capabilities: 5}, alice.poll(alice.say(3)))
		// So is a flag.
		flagged := &protobufs.ServerToAgent{InstanceUid: alice.uid, Capabilities: 5, Flags: 1}
		s.push(alice, flagged)
		wantMessage(t, flagged, alice.poll(alice.say(4)))
		s.wantFaults(nil)
	})
}

// TestPollTakesPlace has a poll take the place of one that still waits: that one is answered with nothing.
func TestPollTakesPlace(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		alice := s.poller("alice")
		alice.poll(alice.describe(0))
		begin := time.Now()
		first := meanwhile(func() {
			wantMessage(t, alice.empty(), alice.poll(alice.say(1)))
			require.Equal(t, time.Second, time.Since(begin))
		})
		time.Sleep(time.Second)
		second := meanwhile(func() { wantMessage(t, alice.offer("x"), alice.poll(alice.say(2))) })
		synctest.Wait()
		first()
		s.push(alice, alice.offer("x"))
		second()
		require.Len(t, s.server.Received(alice.uid), 3)
	}, func(c *Config) { c.Agents.PollWait = 10 * time.Second })
}

// TestAnswerOfWhoLeft keeps a message for the next poll if the agent has hung up before it could be written.
func TestAnswerOfWhoLeft(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		alice := s.poller("alice")
		alice.poll(alice.describe(0))
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		_, err := alice.postContext(ctx, bytes.NewReader(alice.say(1)))
		require.ErrorIs(t, err, context.DeadlineExceeded)
		s.push(alice, alice.offer("x"))
		wantMessage(t, alice.offer("x"), alice.poll(alice.say(2)))
	})
}

// TestPollRefused passes the server's refusal on as the response to the POST, before anything is read of the body.
func TestPollRefused(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		s.server.OnConnect(func(q *gatewaytest.Question) { q.Refuse(http.StatusUnauthorized, "WWW-Authenticate", "Secret-Key") })
		alice := s.poller("alice")
		got, err := alice.post(neverRead{t})
		require.NoError(t, err)
		require.Equal(t, http.StatusUnauthorized, got.StatusCode)
		require.Equal(t, "Secret-Key", got.Header.Get("WWW-Authenticate"))
		require.True(t, got.Close)
		s.wantConnections(0)
		s.wantAdmissions(telemetry.OutcomeRefused, 1)
		s.server.OnConnect(func(q *gatewaytest.Question) { q.Refuse(http.StatusServiceUnavailable, "Retry-After", "77") })
		require.Equal(t, "77", alice.want(http.StatusServiceUnavailable, alice.say(0)).Header.Get("Retry-After"))
		require.Empty(t, s.server.Received(alice.uid))
	})
}

// neverRead is a body of which nothing is sent before the sender may; net/http reads the first bytes to know its length.
type neverRead struct{ t *testing.T }

func (b neverRead) Read([]byte) (int, error) {
	<-b.t.Context().Done()
	return 0, io.EOF
}

// TestBodyOfRefused waits for nothing of the body of who is refused.
func TestBodyOfRefused(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		s.server.OnConnect(func(q *gatewaytest.Question) { q.Refuse(http.StatusUnauthorized) })
		begin := time.Now()
		conn := s.write("POST / HTTP/1.1\r\nHost: gateway\r\nContent-Type: application/x-protobuf\r\nContent-Length: 1000\r\n\r\n12345")
		b, _ := io.ReadAll(conn)
		require.Contains(t, string(b), "HTTP/1.1 401 ")
		require.LessOrEqual(t, time.Since(begin), 2*time.Second)

		s.server.OnConnect(func(q *gatewaytest.Question) { q.Accept() })
		begin = time.Now()
		conn = s.write("POST / HTTP/1.1\r\nHost: gateway\r\nContent-Type: application/x-protobuf\r\nTransfer-Encoding: chunked\r\n\r\n800\r\n" + strings.Repeat("x", 2<<10))
		b, _ = io.ReadAll(conn)
		require.Contains(t, string(b), "HTTP/1.1 413 ")
		require.LessOrEqual(t, time.Since(begin), 2*time.Second)
	}, func(c *Config) { c.MaxMessageSize = 1 << 10 })
}

// TestBodyBeforeRight reads nothing of the body of a stranger: not before the server has let him in.
func TestBodyBeforeRight(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		asked := make(chan *gatewaytest.Question, 1)
		s.server.OnConnect(func(q *gatewaytest.Question) { asked <- q })
		alice := s.poller("alice", "Expect", "100-continue")
		transport := alice.client.Transport.(*http.Transport)
		transport.ExpectContinueTimeout = time.Hour
		body := &countedReader{Reader: bytes.NewReader(alice.describe(0))}
		wait := meanwhile(func() {
			got, err := alice.post(body)
			require.NoError(t, err)
			require.Equal(t, http.StatusOK, got.StatusCode)
		})
		q := <-asked
		time.Sleep(10 * time.Second)
		require.Zero(t, body.read())
		q.Accept()
		wait()
		require.Equal(t, len(alice.describe(0)), body.read())
		require.Len(t, s.server.Received(alice.uid), 1)
	})
}

type countedReader struct {
	io.Reader
	mu sync.Mutex
	n  int
}

func (r *countedReader) Read(b []byte) (int, error) {
	n, err := r.Reader.Read(b)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.n += n
	return n, err
}

func (r *countedReader) read() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.n
}

// TestAskedAgain asks about an agent again when a quarter of an hour has passed, on the link where it is.
func TestAskedAgain(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		alice := s.poller("alice")
		alice.poll(alice.describe(0))
		link := s.server.Received(alice.uid)[0].Link
		for n := 1; n < 30; n++ {
			time.Sleep(28 * time.Second) // and 2 for an answer that does not come
			alice.poll(alice.say(n))
		}
		require.Len(t, s.server.Questions(), 1)
		time.Sleep(28 * time.Second)
		alice.poll(alice.say(30))
		require.Len(t, s.server.Questions(), 2)
		require.Same(t, link, s.server.Questions()[1].Link)

		// A refusal ends the session, and is the response.
		s.server.OnConnect(func(q *gatewaytest.Question) { q.Refuse(http.StatusForbidden, "X-Reason", "revoked") })
		for n := 31; n < 60; n++ {
			time.Sleep(28 * time.Second)
			alice.poll(alice.say(n))
		}
		s.wantConnections(1)
		time.Sleep(28 * time.Second)
		got := alice.want(http.StatusForbidden, alice.say(60))
		require.Equal(t, "revoked", got.Header.Get("X-Reason"))
		s.wantConnections(0)
		require.Len(t, s.server.Received(alice.uid), 60, "no goodbye: the server knows")
		s.wantFaults(map[telemetry.Reason]int{telemetry.ReasonAgentRefused: 1})
	})
}

// TestNotNowAgain keeps the session of an agent that the server cannot take just now, or cannot be asked about.
func TestNotNowAgain(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		alice := s.poller("alice")
		alice.poll(alice.describe(0))
		n := 0
		pollFor := func(d time.Duration) {
			for range d / (30 * time.Second) {
				time.Sleep(30*time.Second - s.cfg.Agents.PollWait)
				n++
				alice.poll(alice.say(n))
			}
		}
		pollFor(14*time.Minute + 30*time.Second)
		s.server.OnConnect(func(q *gatewaytest.Question) { q.Refuse(http.StatusTooManyRequests, "Retry-After", "40") })
		time.Sleep(30 * time.Second)
		require.Equal(t, "40", alice.want(http.StatusTooManyRequests, alice.say(n)).Header.Get("Retry-After"))
		s.wantConnections(1)
		s.server.OnConnect(func(*gatewaytest.Question) {}) // never answers
		alice.poll(alice.say(n))                           // within the grace period
		time.Sleep(50 * time.Second)                       // less than its connection is kept
		require.NotEmpty(t, alice.want(http.StatusServiceUnavailable, alice.say(n)).Header.Get("Retry-After"))
		s.wantConnections(1)
		s.server.OnConnect(func(q *gatewaytest.Question) { q.Accept() })
		alice.poll(alice.say(n))
		s.wantConnections(1)
		time.Sleep(5 * time.Minute) // it has polled less often than every 30 s
	})
}

// TestChangedCredentials asks about an agent that comes with others, and takes it for itself when it does not poll with
// the earlier ones any more.
func TestChangedCredentials(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		s.answering()
		alice := s.poller("alice")
		wantMessage(t, alice.offer("0"), alice.poll(alice.describe(0)))
		time.Sleep(30 * time.Second)
		alice.headers.Set("Authorization", "another token")
		got := alice.want(http.StatusOK, alice.say(1))
		require.Len(t, s.server.Questions(), 2)
		require.Equal(t, "another token", s.server.Questions()[1].Headers.Get("Authorization"))
		_ = got
		time.Sleep(30 * time.Second)
		require.Len(t, s.server.Received(alice.uid), 2, "its message was relayed")
		alice.poll(alice.say(2))
		time.Sleep(2 * time.Minute)
		s.wantConnections(0)
		s.wantFault(telemetry.ReasonUIDTaken, 0)
	})
}

// TestStolenUIDOfPoller does not let one agent speak for another, which has other credentials and goes on polling.
func TestStolenUIDOfPoller(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		alice, mallory := s.poller("alice"), s.poller("mallory")
		mallory.uid = alice.uid
		alice.poll(alice.describe(0))
		stop := make(chan struct{})
		wait := meanwhile(func() {
			for n := 1; ; n++ {
				select {
				case <-stop:
					return
				case <-time.After(28 * time.Second):
					alice.poll(alice.say(n))
				}
			}
		})
		time.Sleep(10 * time.Second)
		_, err := mallory.post(bytes.NewReader(mallory.describe(1000)))
		require.NoError(t, err)
		time.Sleep(20 * time.Second)
		got := mallory.poll(mallory.say(1001))
		require.Contains(t, got.GetErrorResponse().GetErrorMessage(), "in use by another agent")
		close(stop)
		wait()
		for _, r := range s.server.Received(alice.uid) {
			require.Less(t, r.Message.GetSequenceNum(), uint64(1000))
		}
		require.NotZero(t, s.counted("faults", string(telemetry.ReasonUIDTaken)))
	})
}

// TestSharedCredentials tells agents with the same credentials apart by their UIDs; each is asked about.
func TestSharedCredentials(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		s.answering()
		alice, bob := s.poller("alice", "Authorization", "shared"), s.poller("bob", "Authorization", "shared")
		wantMessage(t, alice.offer("1"), alice.poll(alice.describe(1)))
		wantMessage(t, bob.offer("2"), bob.poll(bob.describe(2)))
		wantMessage(t, alice.offer("3"), alice.poll(alice.say(3)))
		s.wantConnections(2)
		require.Len(t, s.server.Questions(), 2)
		// Each again, when it is time.
		for n := range 31 {
			time.Sleep(30 * time.Second)
			alice.poll(alice.say(10 + n))
			bob.poll(bob.say(10 + n))
		}
		require.Len(t, s.server.Questions(), 4)
		s.wantConnections(2)
	})
}

// TestRenamedPoller follows an agent that the server has given another UID.
func TestRenamedPoller(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		alice := s.poller("alice")
		alice.poll(alice.describe(0))
		renamed := gatewaytest.UID("alice II")
		message := &protobufs.ServerToAgent{InstanceUid: alice.uid, AgentIdentification: &protobufs.AgentIdentification{NewInstanceUid: renamed}}
		s.push(alice, message)
		wantMessage(t, message, alice.poll(alice.say(1)))
		alice.uid = renamed
		wantMessage(t, alice.empty(), alice.poll(alice.say(2)))
		s.push(alice, alice.offer("x"))
		wantMessage(t, alice.offer("x"), alice.poll(alice.say(3)))
		s.wantConnections(1)
		require.Len(t, s.server.Questions(), 1)
		alice.gone()
		time.Sleep(2 * time.Minute)
		s.wantConnections(0)
		s.server.WantFrame(renamed, alice.frame(2))
		s.server.WantFrame(renamed, alice.frame(3))
		s.server.WantFrame(renamed, gatewaytest.GoodbyeAfter(renamed, 3))
		require.Len(t, s.server.Received(gatewaytest.UID("alice")), 2, "no goodbye for the old UID")
	})
}

func (p *poller) frame(sequence int) []byte { return gatewaytest.Status(p.uid, sequence) }

// TestMissedPolls says goodbye for an agent that has missed three polls, and takes it back when it comes again.
func TestMissedPolls(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		alice := s.poller("alice")
		alice.poll(alice.describe(0))
		begin := time.Now()
		for s.gateway.server.count() > 0 {
			time.Sleep(time.Second)
		}
		require.InDelta(t, 90, time.Since(begin).Seconds(), agentSweepInterval.Seconds())
		synctest.Wait()
		require.Equal(t, gatewaytest.GoodbyeAfter(alice.uid, 0), s.server.Received(alice.uid)[1].Frame)
		s.wantFaults(map[telemetry.Reason]int{telemetry.ReasonAgentMissedPolls: 1})

		// Asked about as a newcomer, and for all that it has to say, since it does not know that it was gone. It polls
		// less often than it might, so it has more time from now on.
		time.Sleep(100 * time.Second)
		got := alice.poll(alice.say(1))
		require.EqualValues(t, protobufs.ServerToAgentFlags_ServerToAgentFlags_ReportFullState, got.GetFlags())
		require.Len(t, s.server.Questions(), 2)
		time.Sleep(9 * time.Minute)
		s.wantConnections(1)
		time.Sleep(2 * time.Minute)
		s.wantConnections(0)
	})
}

// TestOfferedInterval gives an agent the time that the server wants it to take.
func TestOfferedInterval(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		alice := s.poller("alice")
		alice.poll(alice.describe(0))
		s.push(alice, &protobufs.ServerToAgent{InstanceUid: alice.uid, ConnectionSettings: &protobufs.ConnectionSettingsOffers{
			Opamp: &protobufs.OpAMPConnectionSettings{HeartbeatIntervalSeconds: 300},
		}})
		alice.poll(alice.say(1))
		time.Sleep(14 * time.Minute)
		s.wantConnections(1)
		time.Sleep(2 * time.Minute)
		s.wantConnections(0)
	})
}

// TestPollerSaysGoodbye ends the session of an agent that says that it leaves, after the response.
func TestPollerSaysGoodbye(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		alice := s.poller("alice")
		alice.poll(alice.describe(0))
		s.server.Next(alice.uid)
		alice.poll(gatewaytest.Goodbye(alice.uid)[1:])
		s.server.WantFrame(alice.uid, gatewaytest.Goodbye(alice.uid))
		s.wantConnections(0)
		time.Sleep(time.Minute)
		require.Len(t, s.server.Received(alice.uid), 2, "it is not said twice")
		s.wantFaults(nil)
	})
}

func zip(t testing.TB, b []byte) []byte {
	t.Helper()
	var packed bytes.Buffer
	w := gzip.NewWriter(&packed)
	_, err := w.Write(b)
	require.NoError(t, err)
	require.NoError(t, w.Close())
	return packed.Bytes()
}

// TestGzip unpacks what comes in gzip, and packs what goes to who takes that, if it is worth it.
func TestGzip(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		alice := s.poller("alice", "Content-Encoding", "gzip", "Accept-Encoding", "br, gzip;q=0.5")
		big := gatewaytest.Report(alice.uid, 0, 300<<10)
		got := alice.want(http.StatusOK, zip(t, big[1:]))
		require.Empty(t, got.Header.Get("Content-Encoding"), "it is short")
		require.Equal(t, big, s.server.Next(alice.uid).Frame)
		offer, err := gatewaytest.ServerToAgent(gatewaytest.Offer(alice.uid, "big", 200<<10))
		require.NoError(t, err)
		s.push(alice, &protobufs.ServerToAgent{InstanceUid: alice.uid, Flags: 1})
		alice.poll(zip(t, alice.say(1)))
		s.push(alice, offer)
		got = alice.want(http.StatusOK, zip(t, alice.say(1)))
		require.Equal(t, "gzip", got.Header.Get("Content-Encoding"))
		r, err := gzip.NewReader(bytes.NewReader(got.body))
		require.NoError(t, err)
		got.body, err = io.ReadAll(r)
		require.NoError(t, err)
		wantMessage(t, offer, alice.message(got))
		// Who does not take it gets it as it is.
		s.push(alice, offer)
		got = alice.want(http.StatusOK, zip(t, alice.say(2)), "Accept-Encoding", "gzip;q=0")
		require.Empty(t, got.Header.Get("Content-Encoding"))
		wantMessage(t, offer, alice.message(got))
		s.wantFaults(nil)
	})
}

// TestBadPolls refuses what is no poll, says why, and troubles nobody with it.
func TestBadPolls(t *testing.T) {
	const limit = 1 << 20
	uid := gatewaytest.UID("alice")
	bomb := zip(t, make([]byte, 64*limit))
	foreign := gatewaytest.Frame(&protobufs.AgentToServer{InstanceUid: []byte("short"), SequenceNum: 1})[1:]
	for name, test := range map[string]struct {
		body    io.Reader
		headers []string
		status  int
		text    string
		reason  telemetry.Reason
	}{
		"not a message":      {strings.NewReader("\xff\xff\xff"), nil, 400, "no AgentToServer message", telemetry.ReasonBadFrame},
		"half a message":     {bytes.NewReader(gatewaytest.Report(uid, 1, 1000)[1:900]), nil, 400, "no AgentToServer message", telemetry.ReasonBadFrame},
		"WebSocket's header": {bytes.NewReader(gatewaytest.Status(uid, 1)), nil, 400, "begins with the header", telemetry.ReasonBadFrame},
		"no UID":             {bytes.NewReader([]byte{2 << 3, 1}), nil, 400, "instance UID", telemetry.ReasonBadUID},
		"short UID":          {bytes.NewReader(foreign), nil, 400, "instance UID", telemetry.ReasonBadUID},
		"nothing":            {http.NoBody, nil, 400, "empty", ""},
		"nothing, chunked":   {io.MultiReader(), nil, 400, "no AgentToServer message", telemetry.ReasonBadFrame},
		"too large":          {bytes.NewReader(make([]byte, limit+1)), nil, 413, "max_message_size", telemetry.ReasonTooLarge},
		"too large, chunked": {io.LimitReader(zeros{}, limit+1), nil, 413, "max_message_size", telemetry.ReasonTooLarge},
		"bomb":               {bytes.NewReader(bomb), []string{"Content-Encoding", "gzip"}, 413, "max_message_size", telemetry.ReasonTooLarge},
		"not gzip":           {strings.NewReader("text"), []string{"Content-Encoding", "gzip"}, 400, "not gzip", telemetry.ReasonBadFrame},
		"half of gzip":       {bytes.NewReader(bomb[:100]), []string{"Content-Encoding", "gzip"}, 400, "not gzip", telemetry.ReasonBadFrame},
		"gzip, and more":     {bytes.NewReader(append(zip(t, []byte("x")), 'y')), []string{"Content-Encoding", "gzip"}, 400, "not gzip", telemetry.ReasonBadFrame},
		"another encoding":   {strings.NewReader("x"), []string{"Content-Encoding", "zstd"}, 415, "gzip", ""},
		"another type":       {strings.NewReader("{}"), []string{"Content-Type", "application/json"}, 415, "application/x-protobuf", ""},
		"a gateway":          {bytes.NewReader(gatewaytest.Status(uid, 1)[1:]), []string{connectionIDHeader, "gw/upstream-0"}, 400, "by WebSocket", ""},
		"a page":             {bytes.NewReader(gatewaytest.Status(uid, 1)[1:]), []string{"Origin", "https://evil.example"}, 403, "allowed_origins", ""},
	} {
		t.Run(name, func(t *testing.T) {
			play(t, func(t *testing.T, s *stage) {
				alice := s.poller("alice")
				got, err := alice.post(test.body, test.headers...)
				require.NoError(t, err)
				require.Equal(t, test.status, got.StatusCode, "%s", got.body)
				require.Contains(t, string(got.body), test.text)
				require.True(t, got.Close)
				s.wantAdmissions(telemetry.OutcomeBadRequest, 1)
				s.wantConnections(0)
				if test.reason == "" {
					require.Empty(t, s.server.Questions())
				} else {
					s.wantFaults(map[telemetry.Reason]int{test.reason: 1})
				}
				require.Empty(t, s.server.Received(uid))
				require.Zero(t, s.memory.Reading())
			}, func(c *Config) { c.MaxMessageSize = limit })
		})
	}
}

type zeros struct{}

func (zeros) Read(b []byte) (int, error) {
	clear(b)
	return len(b), nil
}

// TestLargestPoll takes a message as large as may be, however it comes.
func TestLargestPoll(t *testing.T) {
	const limit = 1 << 20
	play(t, func(t *testing.T, s *stage) {
		alice := s.poller("alice")
		frame := gatewaytest.Report(alice.uid, 1, limit-60)
		frame = append(frame, make([]byte, 0, 100)...)
		for len(frame)-1 < limit { // an unknown field of one byte fills it up
			frame = append(frame, 15<<3, 1)
		}
		frame = frame[:1+limit]
		if (len(frame)-len(gatewaytest.Report(alice.uid, 1, limit-60)))%2 == 1 {
			frame = frame[:limit-1]
		}
		alice.poll(frame[1:])
		require.Equal(t, frame, s.server.Next(alice.uid).Frame)
		got, err := alice.post(struct{ io.Reader }{bytes.NewReader(frame[1:])}) // of unknown length
		require.NoError(t, err)
		require.Equal(t, http.StatusOK, got.StatusCode)
		require.Equal(t, frame, s.server.Next(alice.uid).Frame)
		alice.want(http.StatusOK, zip(t, frame[1:]), "Content-Encoding", "gzip")
		require.Equal(t, frame, s.server.Next(alice.uid).Frame)
		require.Zero(t, s.memory.Reading())
		s.wantFaults(nil)
	}, func(c *Config) { c.MaxMessageSize = limit })
}

// TestSlowBody gives an agent that sends nothing more of its body up.
func TestSlowBody(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		conn := s.write("POST / HTTP/1.1\r\nHost: gateway\r\nContent-Type: application/x-protobuf\r\nContent-Length: 1000\r\n\r\n12345")
		begin := time.Now()
		b, _ := io.ReadAll(conn)
		require.Contains(t, string(b), "HTTP/1.1 408 ")
		require.InDelta(t, uploadPause.Seconds(), time.Since(begin).Seconds(), 1)
		require.Zero(t, s.memory.Reading())
	})
}

// TestPollsWhileLinksAreLost keeps an agent whose link is lost: its message waits for another link, and so does it.
func TestPollsWhileLinksAreLost(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		alice := s.poller("alice")
		alice.poll(alice.describe(0))
		s.server.Stop()
		time.Sleep(time.Second)
		wantMessage(t, alice.empty(), alice.poll(alice.say(1))) // taken, and kept
		got := alice.want(http.StatusServiceUnavailable, alice.say(2))
		require.NotEmpty(t, got.Header.Get("Retry-After"))
		s.server.Start()
		s.server.WantLinks(3)
		time.Sleep(10 * time.Second)
		received := s.server.Received(alice.uid)
		require.Equal(t, alice.frame(1), received[len(received)-1].Frame)
		s.wantConnections(1)
		message := alice.poll(alice.say(2))
		require.EqualValues(t, protobufs.ServerToAgentFlags_ServerToAgentFlags_ReportFullState, message.GetFlags())
		s.wantFault(telemetry.ReasonFrameLost, 0)
	})
}

// TestPollsOverReload keeps sessions over a reload, and has their settings be the new ones.
func TestPollsOverReload(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		alice := s.poller("alice")
		alice.poll(alice.describe(0))
		s.push(alice, alice.offer("before"))
		s.reload(func(c *Config) { c.Agents.PollWait = 7 * time.Second })
		wantMessage(t, alice.offer("before"), alice.poll(alice.say(1)))
		require.Equal(t, 7*time.Second, alice.want(http.StatusOK, alice.say(2)).took)
		require.Len(t, s.server.Questions(), 1)
		s.wantConnections(1)
		s.wantFaults(nil)
	})
}

// TestPollsAtShutdown answers who polls when the gateway stops, and holds nobody up.
func TestPollsAtShutdown(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		alice, bob := s.poller("alice"), s.poller("bob")
		alice.poll(alice.describe(0))
		bob.poll(bob.describe(0))
		s.push(bob, bob.offer("never fetched"))
		wait := meanwhile(func() { wantMessage(t, alice.empty(), alice.poll(alice.say(1))) })
		time.Sleep(time.Second)
		require.Less(t, s.stop(), time.Second)
		wait()
	}, func(c *Config) { c.Agents.PollWait = 20 * time.Second })
}

// TestPlacesOfPollers counts sessions among the connections, keeps a place for others, and closes connections between
// polls when places are short.
func TestPlacesOfPollers(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		var pollers []*poller
		for i := range 30 {
			p := s.poller(fmt.Sprintf("agent-%d", i))
			got, err := p.post(bytes.NewReader(p.describe(0)))
			require.NoError(t, err)
			if got.StatusCode != http.StatusOK {
				require.Equal(t, http.StatusServiceUnavailable, got.StatusCode)
				require.NotEmpty(t, got.Header.Get("Retry-After"))
				break
			}
			if pollers = append(pollers, p); len(pollers) > 10 {
				require.True(t, got.Close, "connections are closed when half of the places are taken")
			} else if len(pollers) < 4 {
				require.False(t, got.Close, "they are kept when there are many places")
			}
		}
		require.Greater(t, len(pollers), 10)
		require.Less(t, len(pollers), 20, "some are left for other addresses")
		s.comeFrom("192.0.2.9")
		other := s.poller("other")
		other.poll(other.describe(0))
		for _, p := range pollers { // they are still there
			p.poll(p.say(1))
		}
	}, func(c *Config) { c.Agents.MaxConnections, c.Agents.PollWait = 20, 0 })
}

// TestConnectionOfPollers keeps a connection for the next poll as long as the listener says, and counts it as no
// stranger's.
func TestConnectionOfPollers(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		alice := s.poller("alice")
		dials := 0
		dial := s.door.Dial
		alice.client.Transport.(*http.Transport).DialContext = func(ctx context.Context, network, address string) (c net.Conn, err error) {
			dials++
			return dial(ctx, network, address)
		}
		for n := range 5 {
			alice.poll(alice.describe(n))
			time.Sleep(30 * time.Second)
		}
		require.Equal(t, 1, dials)
		require.Equal(t, 2, s.gateway.server.door.Open(), "the session, and its connection")
		time.Sleep(40 * time.Second)
		require.Equal(t, 1, s.gateway.server.door.Open(), "the session only")
		// Headers above the limits are refused on it, too.
		alice.poll(alice.describe(9))
		alice.want(http.StatusRequestHeaderFieldsTooLarge, alice.describe(10), "X-Big", strings.Repeat("x", 17<<10))
		time.Sleep(4 * time.Minute) // it has polled less often than every 30 s
	})
}

// TestAcceptedPollers asks nobody where every agent is accepted.
func TestAcceptedPollers(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		s.answering()
		alice := s.poller("alice")
		for n := range 40 {
			wantMessage(t, alice.offer(strconv.Itoa(n)), alice.poll(alice.describe(n)))
			time.Sleep(30 * time.Second)
		}
		require.Empty(t, s.server.Questions())
	}, func(c *Config) { c.Server.AgentAdmission = AdmissionAccept })
}

// TestMemoryOfPolls has an agent with a large message wait while memory is used up, and gives one up that sends too slowly
// while others wait.
func TestMemoryOfPolls(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		var slow []net.Conn
		for range 12 { // each announces a lot, and sends enough of it to be given memory, then nothing
			c := s.write("POST / HTTP/1.1\r\nHost: gateway\r\nContent-Type: application/x-protobuf\r\nContent-Length: 4000000\r\n\r\n")
			go func() { _, _ = c.Write(make([]byte, 2<<20)) }()
			slow = append(slow, c)
		}
		synctest.Wait()
		require.NotZero(t, s.memory.Reading())
		alice := s.poller("alice")
		frame := gatewaytest.Report(alice.uid, 1, 3_000_000)
		begin := time.Now()
		alice.poll(frame[1:])
		require.Less(t, time.Since(begin), 20*time.Second)
		require.Equal(t, frame, s.server.Next(alice.uid).Frame)
		require.NotZero(t, s.counted("faults", string(telemetry.ReasonMemoryFull)))
		for _, c := range slow {
			c.Close()
		}
		time.Sleep(time.Minute)
		require.Zero(t, s.memory.Reading())
	}, func(c *Config) { c.MaxMessageSize, c.MaxBufferedSize = 4<<20, 17<<20 })
}

// TestHintOfPollers asks again on the link of the agent that polls, which its header names.
func TestHintOfPollers(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		var pollers []*poller
		for _, name := range []string{"alice", "bob", "cathy"} {
			p := s.poller(name, "Authorization", "shared")
			h := hex.EncodeToString(p.uid)
			p.headers.Set("OpAMP-Instance-UID", h[:8]+"-"+h[8:12]+"-"+h[12:16]+"-"+h[16:20]+"-"+h[20:])
			p.poll(p.describe(0))
			pollers = append(pollers, p)
		}
		time.Sleep(admissionLife + time.Minute)
		for _, p := range slices.Backward(pollers) { // the first is not where a newcomer would be
			p.poll(p.say(1))
		}
		require.Len(t, s.server.Questions(), 6)
		for i, q := range s.server.Questions()[3:] {
			p := pollers[len(pollers)-1-i]
			require.Same(t, s.server.Received(p.uid)[0].Link, q.Link, p.name)
		}
		s.wantConnections(3)
		s.stop()
	}, func(c *Config) { c.Agents.PollInterval = time.Hour })
}

// TestPollsBehindMiddleware has middlewares see nothing of a body, which they could read before its sender may send one,
// and the Collector not unpack it; what they say counts.
func TestPollsBehindMiddleware(t *testing.T) {
	wrap := func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if b, err := io.ReadAll(r.Body); err != nil || len(b) > 0 {
				http.Error(w, "there is a body", http.StatusTeapot)
				return
			}
			if r.Header.Get("X-Forbidden") != "" {
				http.Error(w, "no", http.StatusForbidden)
				return
			}
			next.ServeHTTP(w, r)
		})
	}
	playBehind(t, wrap, func(t *testing.T, s *stage) {
		s.answering()
		alice := s.poller("alice")
		alice.poll(alice.describe(0))
		s.server.Next(alice.uid)
		big := gatewaytest.Report(alice.uid, 1, 30<<20) // above what the Collector's servers take by default
		wantMessage(t, alice.offer("1"), alice.message(alice.want(http.StatusOK, zip(t, big[1:]), "Content-Encoding", "gzip")))
		require.True(t, bytes.Equal(big, s.server.Next(alice.uid).Frame))
		alice.want(http.StatusForbidden, alice.say(2), "X-Forbidden", "yes")
		wantMessage(t, alice.offer("3"), alice.poll(alice.say(3)))
		s.wantAdmissions(telemetry.OutcomeUnauthorized, 1)
	})
}

// TestVerifiedPollers shows a server that is not asked the headers of the agent, as if it came by WebSocket; again after
// a quarter of an hour, with those that it comes with then.
func TestVerifiedPollers(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		var came []http.Header
		refused := 0
		s.server.OnUpgrade(func(r *http.Request) *gatewaytest.Refusal {
			if r.Header.Get(connectionIDHeader) != "" {
				return nil
			}
			came = append(came, r.Header.Clone())
			if refused != 0 {
				return &gatewaytest.Refusal{Status: refused}
			}
			return nil
		})
		alice := s.poller("alice")
		alice.poll(alice.describe(0))
		require.Len(t, came, 1)
		require.Equal(t, "key of alice", came[0].Get("Authorization"))
		require.Empty(t, came[0].Get("Content-Type"), "it is no poll")
		for n := range 30 {
			time.Sleep(28 * time.Second)
			alice.poll(alice.say(n))
		}
		require.Len(t, came, 2)
		refused = http.StatusForbidden
		bob := s.poller("bob")
		bob.want(http.StatusForbidden, bob.describe(0))
		s.wantConnections(1)
	}, func(c *Config) { c.Server.AgentAdmission = AdmissionVerify })
}
