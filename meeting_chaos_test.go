package opampgateway

import (
	"bytes"
	"compress/gzip"
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/open-telemetry/opamp-go/protobufs"
	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/proto"

	"github.com/opampgateway/opampgateway/internal/gatewaytest"
)

// TestChaosOfPollers has agents over plain HTTP do all that they may, while links are lost, and reloads take the gateway from a
// server by WebSocket to one over plain HTTP and back. Nobody is told what is for another, in the end all are reachable, and
// nothing is left over.
func TestChaosOfPollers(t *testing.T) {
	for seed := range uint64(4) {
		t.Run(fmt.Sprint("seed ", seed), func(t *testing.T) {
			play(t, func(t *testing.T, s *stage) { chaosOfPollers(t, s, seed) }, func(cfg *Config) {
				cfg.Server.AgentAdmission = []AgentAdmission{AdmissionAuto, AdmissionVerify}[seed%2]
			})
		})
	}
}

func chaosOfPollers(t *testing.T, s *stage, seed uint64) {
	t.Helper()
	o := &postOffice{t: t, lossy: true, open: map[string]int{}, connsUp: map[net.Conn]bool{}}
	listener, err := s.net.Listen(fallbackAddress(0))
	require.NoError(t, err)
	server := &http.Server{Handler: o, ConnState: o.count}
	var serving sync.WaitGroup
	serving.Go(func() { _ = server.Serve(listener) })
	t.Cleanup(func() { _ = server.Close(); serving.Wait(); time.Sleep(time.Second) })

	tell := func(uid []byte) *protobufs.ServerToAgent {
		return &protobufs.ServerToAgent{InstanceUid: uid, RemoteConfig: &protobufs.AgentRemoteConfig{ConfigHash: uid}}
	}
	s.server.OnMessage(func(r *gatewaytest.Received) { r.Link.Send(tell(r.UID())) })
	var failing atomic.Bool
	o.answers(func(w http.ResponseWriter, r *http.Request, p *posted) bool {
		switch {
		case r.Header.Get("X-Api-Key") == "wrong":
			w.WriteHeader(http.StatusUnauthorized)
		case failing.Load():
			w.WriteHeader(http.StatusBadGateway)
		default:
			answerWith(w, tell(p.InstanceUid))
		}
		return true
	})
	s.server.OnConnect(func(q *gatewaytest.Question) {
		if q.Headers.Get("X-Api-Key") == "wrong" {
			q.Refuse(http.StatusUnauthorized)
			return
		}
		q.Accept()
	})

	s.server.OnUpgrade(func(r *http.Request) *gatewaytest.Refusal {
		if r.Header.Get("X-Api-Key") == "wrong" {
			return &gatewaytest.Refusal{Status: http.StatusUnauthorized}
		}
		return nil
	})

	stop := make(chan struct{})
	var agents sync.WaitGroup
	pollers := make([]*poller, 12)
	check := func(p *poller, got *response, err error) bool {
		if err != nil || got.StatusCode != http.StatusOK {
			return false
		}
		message := new(protobufs.ServerToAgent)
		if got.Header.Get("Content-Encoding") == "" && proto.Unmarshal(got.body, message) == nil && !bytes.Equal(message.InstanceUid, p.uid) {
			t.Errorf("%s was told what is for %q", p.name, message.InstanceUid)
		}
		return true
	}
	for i := range pollers {
		p := s.poller(fmt.Sprint("poller ", i), "X-Api-Key", "right")
		if i%3 == 0 {
			p.headers.Del("Authorization")
		}
		pollers[i] = p
		chance := rand.New(rand.NewPCG(seed, uint64(i)))
		agents.Go(func() {
			for n := 1; ; n++ {
				select {
				case <-stop:
					return
				case <-time.After(within(chance, 10*time.Second)):
				}
				body, headers := p.say(n), []string{}
				ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
				switch chance.IntN(12) {
				case 0: // does not wait for the answer
					cancel()
					ctx, cancel = context.WithTimeout(t.Context(), within(chance, 3*time.Second))
				case 1:
					body = p.describe(n)
				case 2: // is gone for a while
					p.gone()
					time.Sleep(within(chance, 3*time.Minute))
				case 3: // says a lot
					message := &protobufs.AgentToServer{InstanceUid: p.uid, SequenceNum: uint64(n), EffectiveConfig: &protobufs.EffectiveConfig{
						ConfigMap: &protobufs.AgentConfigMap{ConfigMap: map[string]*protobufs.AgentConfigFile{"": {Body: bytes.Repeat([]byte("x"), chance.IntN(1<<20))}}},
					}}
					body, _ = proto.Marshal(message)
				case 4: // is not the one
					headers = append(headers, "X-Api-Key", "wrong")
				case 5: // has another name for the same
					headers = append(headers, "X-Site", fmt.Sprint(chance.IntN(3)))
				case 6:
					body = body[:len(body)/2]
				case 7:
					body, _ = proto.Marshal(&protobufs.AgentToServer{InstanceUid: p.uid, SequenceNum: uint64(n), AgentDisconnect: &protobufs.AgentDisconnect{}})
				case 8, 9:
					var packed bytes.Buffer
					zip := gzip.NewWriter(&packed)
					_, _ = zip.Write(body)
					if zip.Close(); chance.IntN(4) == 0 {
						packed.Truncate(packed.Len() / 2)
					}
					body, headers = packed.Bytes(), append(headers, "Content-Encoding", "gzip")
				}
				got, err := p.postContext(ctx, bytes.NewReader(body), headers...)
				cancel()
				check(p, got, err)
			}
		})
	}
	chance, ws := rand.New(rand.NewPCG(seed, 1000)), s.cfg.Server.Endpoint
	for range 60 {
		time.Sleep(within(chance, 10*time.Second))
		switch chance.IntN(6) {
		case 0:
			s.reload(func(cfg *Config) { cfg.Server.Endpoint = ws })
		case 1:
			s.reload(func(cfg *Config) { cfg.Server.Endpoint = "http://" + fallbackAddress(0) + "/v1/opamp" })
		case 2:
			failing.Store(chance.IntN(3) == 0)
		case 3:
			for _, l := range s.server.Links() {
				if chance.IntN(2) == 0 {
					l.HangUp()
				}
			}
		case 4:
			s.server.Stop()
			time.Sleep(within(chance, 20*time.Second))
			s.server.Start()
		case 5:
			_ = (&statusPage{gateway: s.gateway}).Status()
		}
	}
	failing.Store(false)
	close(stop)
	agents.Wait()
	time.Sleep(2 * time.Minute)
	for _, p := range pollers {
		reached := false
		for n := range 5 {
			got, err := p.post(bytes.NewReader(p.describe(10_000 + n)))
			reached = reached || check(p, got, err) && bytes.Contains(got.body, p.uid)
			time.Sleep(5 * time.Second)
		}
		require.True(t, reached, p.name)
	}
	for _, p := range pollers {
		p.gone()
	}
	time.Sleep(3 * time.Hour) // three times the longest that is learnt
	synctest.Wait()
	s.wantConnections(0)
	require.Zero(t, s.gateway.server.door.Open(), "places")
	require.Empty(t, s.gateway.server.polled.agents)
	require.Empty(t, s.gateway.server.polled.standings)
	require.Zero(t, s.memory.Up.Held())
	require.Zero(t, s.memory.Down.Held())
	require.Zero(t, s.memory.Kept.Held())
	require.Zero(t, s.memory.Requests.Held())
	require.Zero(t, s.memory.Reading())
}

// within returns a time below d.
func within(chance *rand.Rand, d time.Duration) time.Duration {
	return time.Duration(chance.Int64N(int64(d)))
}
