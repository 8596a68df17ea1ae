package opampgateway

import (
	"bytes"
	"context"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gorilla/websocket"
	"github.com/stretchr/testify/require"

	"github.com/opampgateway/opampgateway/internal/gatewaytest"
)

// drainingFor sets agents.drain_time.
func drainingFor(d time.Duration) func(*Config) {
	return func(cfg *Config) { cfg.Agents.DrainTime = d }
}

// endSlowly tells the gateway to end, in the background; what it returns waits for that, and says how long it took.
func (s *stage) endSlowly() (wait func() time.Duration) {
	took := make(chan time.Duration, 1)
	go func() { took <- s.stop() }()
	synctest.Wait()
	return func() time.Duration { return <-took }
}

// TestDrain stops a gateway for maintenance: nobody new is let in, and its agents leave one after the other, while all
// that they say goes on to the server.
func TestDrain(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		agents := s.crowd(100)
		links := s.server.WantLinks(3)
		early, err := s.net.Dial(t.Context(), "tcp", gatewayAddress) // has connected, and not asked yet
		require.NoError(t, err)
		defer early.Close()

		stopped := s.endSlowly()
		_, err = s.net.Dial(t.Context(), "tcp", gatewayAddress)
		require.Error(t, err, "a load balancer finds nobody here")
		_, err = fmt.Fprintf(early, "GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"+
			"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n")
		require.NoError(t, err)
		answer := make([]byte, 1000)
		n, err := early.Read(answer)
		require.NoError(t, err)
		require.Contains(t, string(answer[:n]), "503")
		require.Contains(t, string(answer[:n]), "Retry-After: ")

		for tenth := range 9 {
			time.Sleep(2 * time.Second)
			synctest.Wait()
			require.InDelta(t, 100-10*(tenth+1), len(s.gateway.server.staying()), 2, "after %d s", 2*(tenth+1))
		}
		last := s.gateway.server.staying()[0]
		for _, a := range agents {
			if bytes.Equal(last.uid.Bytes(), a.UID) {
				s.server.WantFrame(a.UID, a.Say(77))
			}
		}
		require.Len(t, s.server.Links(), 3)
		took := stopped()
		require.InDelta(t, 20*time.Second, took, float64(time.Second))
		for _, a := range agents {
			a.WantLetGo()
			s.server.WantNothing(a.UID) // no goodbye: the end of the links says it
		}
		for _, link := range links {
			link.WantClosed(websocket.CloseGoingAway)
		}
	}, drainingFor(20*time.Second))
}

// TestDrainOfFew lets the last agents go as evenly as many.
func TestDrainOfFew(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		s.crowd(3)
		stopped := s.endSlowly()
		for _, want := range []int{3, 2, 1} {
			require.Len(t, s.gateway.server.staying(), want)
			time.Sleep(10*time.Second + time.Second/4)
			synctest.Wait()
		}
		require.LessOrEqual(t, stopped(), 31*time.Second)
	}, drainingFor(30*time.Second))
}

// TestDrainEnds has a drain end before its time, or not begin.
func TestDrainEnds(t *testing.T) {
	for _, test := range []struct {
		name string
		play func(t *testing.T, s *stage)
	}{
		{"when nobody is left", func(t *testing.T, s *stage) {
			agents := s.crowd(5)
			stopped := s.endSlowly()
			time.Sleep(time.Second)
			for _, a := range agents {
				a.Vanish()
			}
			require.LessOrEqual(t, stopped(), 2*time.Second)
		}},
		{"when it is told again", func(t *testing.T, s *stage) {
			agents := s.crowd(50)
			stopped := s.endSlowly()
			time.Sleep(time.Second)
			s.toldAgain.Store(true)
			require.LessOrEqual(t, stopped(), 2*time.Second)
			for _, a := range agents {
				a.WantLetGo()
			}
		}},
		{"with nobody connected", func(t *testing.T, s *stage) {
			require.Zero(t, s.stop())
		}},
		{"with a context that ends before", func(t *testing.T, s *stage) {
			s.crowd(5)
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
			defer cancel()
			begin := time.Now()
			s.told = true
			require.NoError(t, s.e.Shutdown(ctx))
			require.InDelta(t, 10*time.Second-shutdownTimeout, time.Since(begin), float64(time.Second))
			require.NoError(t, ctx.Err(), "there was time for a proper end")
		}},
		{"in time without a server", func(t *testing.T, s *stage) {
			agents := s.crowd(5)
			stopped := s.endSlowly()
			time.Sleep(10 * time.Second)
			s.server.Stop()
			time.Sleep(time.Second)
			for _, a := range agents {
				a.Say(1) // their readers wait for a link, and they are let go nevertheless
			}
			time.Sleep(39 * time.Second)
			require.InDelta(t, 1, s.gateway.server.count(), 1, "of five, after 50 of 60 s")
			require.LessOrEqual(t, stopped(), time.Minute+5*time.Second)
			for _, a := range agents {
				a.WantLetGo()
			}
		}},
	} {
		t.Run(test.name, func(t *testing.T) { play(t, test.play, drainingFor(time.Minute)) })
	}

	t.Run("a reload is none", func(t *testing.T) {
		play(t, func(t *testing.T, s *stage) {
			alice := s.introduce("alice")
			s.reload()
			s.server.WantFrame(alice.UID, alice.Say(1))
		}, drainingFor(time.Minute))
	})
}

// TestDrainKeepsWhoIsAsked lets an agent finish that the server was being asked about, and lets it go in its turn.
func TestDrainKeepsWhoIsAsked(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		s.crowd(5)
		var asked *gatewaytest.Question
		s.server.OnConnect(func(q *gatewaytest.Question) { asked = q })
		s.knock("alice")
		synctest.Wait()
		require.NotNil(t, asked)
		stopped := s.endSlowly()
		time.Sleep(time.Second)
		asked.Accept()
		synctest.Wait()
		require.Len(t, s.gateway.server.staying(), 6)
		require.LessOrEqual(t, stopped(), 21*time.Second)
	}, drainingFor(20*time.Second))
}
