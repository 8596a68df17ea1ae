package door

import (
	"io"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/opampgateway/opampgateway/internal/fair"
)

// TestLetInToPoll has who is let in take no stranger's place, send a body and further requests, and be kept while places are
// not short.
func TestLetInToPoll(t *testing.T) {
	const request = "POST / HTTP/1.1\r\nHost: x\r\nContent-Type: application/x-protobuf\r\nContent-Length: 5\r\n\r\nhello"
	synctest.Test(t, func(t *testing.T) {
		limits := usual
		limits.Connections = 4
		h := buildInMemory(t, nil, limits, func(s *http.Server) {
			s.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				LetIn(r)
				LetIn(r)
				b, err := io.ReadAll(r.Body)
				if err != nil || !IsPoll(r) {
					panic(http.ErrAbortHandler)
				}
				Keep(w, r)
				_, _ = w.Write(b)
			})
			s.IdleTimeout = 10 * time.Second
		})
		v := h.knock()
		for range 3 {
			resp, text := v.say(request).wantAnswer(http.StatusOK)
			require.Equal(t, "hello", text)
			require.False(t, resp.Close)
			require.Zero(t, h.door.strangers.Taken())
			require.Equal(t, 1, h.door.Open())
			time.Sleep(5 * time.Second)
		}
		// A head that is larger than a stranger's may be does not get far, either.
		begin := time.Now()
		v.say("POST / HTTP/1.1\r\nX: " + strings.Repeat("x", mostHeaderSize+maxRequestLine+8<<10) + "\r\n\r\n").wantAnswer(http.StatusRequestHeaderFieldsTooLarge)
		require.Less(t, time.Since(begin), 2*time.Second)
		v.Close()

		// Others have come meanwhile, with and without a connection.
		address := fair.AddressOf("192.0.2.1:1")
		require.True(t, h.door.Enter(address))
		synctest.Wait()
		time.Sleep(time.Second)
		require.True(t, h.door.Enter(address))
		v = h.knock()
		resp, _ := v.say(request).wantAnswer(http.StatusOK)
		require.True(t, resp.Close)
		v.Close()
		time.Sleep(time.Second)
		require.True(t, h.door.Enter(fair.AddressOf("192.0.2.2:1")))
		require.False(t, h.door.Enter(fair.AddressOf("192.0.2.2:1")), "the last is for others")
		require.True(t, h.door.Enter(fair.AddressOf("192.0.2.3:1")))
		require.False(t, h.door.Enter(fair.AddressOf("192.0.2.4:1")), "all places are taken")
		for _, of := range []string{"192.0.2.1:1", "192.0.2.1:1", "192.0.2.2:1", "192.0.2.3:1"} {
			h.door.Leave(fair.AddressOf(of))
		}
	})
}

// TestIdle closes a connection between two requests on which nothing comes.
func TestIdle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := buildInMemory(t, nil, usual, func(s *http.Server) {
			s.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				LetIn(r)
				Keep(w, r)
			})
		})
		v := h.knock().say("POST / HTTP/1.1\r\nHost: x\r\nContent-Type: application/x-protobuf\r\n\r\n")
		v.wantAnswer(http.StatusOK)
		begin := time.Now()
		_, err := v.in.ReadByte()
		require.Error(t, err)
		require.Equal(t, idleTimeout, time.Since(begin))
		// What begins, and does not go on, has the time that a stranger's request has.
		v = h.knock().say("POST / HTTP/1.1\r\nHost: x\r\nContent-Type: application/x-protobuf\r\n\r\n")
		v.wantAnswer(http.StatusOK)
		begin = time.Now()
		_, err = v.say("POST / HTTP/1.1\r\n").in.ReadByte()
		require.Error(t, err)
		require.LessOrEqual(t, time.Since(begin), usual.Timeout+time.Second)
	})
}
