package polling

import (
	"context"
	"errors"
	"net"
	"testing"
	"testing/synctest"
	"time"

	"github.com/open-telemetry/opamp-go/protobufs"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"google.golang.org/protobuf/proto"

	"github.com/opampgateway/opampgateway/internal/outbox"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

type entry = outbox.Entry[int]

func message(m *protobufs.ServerToAgent) entry {
	frame, err := proto.MarshalOptions{}.MarshalAppend([]byte{0}, m)
	if err != nil {
		panic(err)
	}
	return entry{Frame: frame, Kind: outbox.Message}
}

func offer(hash string) entry {
	return message(&protobufs.ServerToAgent{InstanceUid: []byte("u"), RemoteConfig: &protobufs.AgentRemoteConfig{ConfigHash: []byte(hash)}})
}

var nothing = message(&protobufs.ServerToAgent{InstanceUid: []byte("u")})

// reading has s read until it ends, and returns what it has read.
func reading(s *Session[int]) (read func() []string) {
	var said []string
	done := make(chan error)
	go func() {
		for {
			frame, err := s.Read()
			if err != nil {
				s.Release()
				done <- err
				return
			}
			said = append(said, string(frame))
		}
	}()
	return func() []string {
		s.Close()
		if err := <-done; !errors.Is(err, net.ErrClosed) {
			panic(err)
		}
		return said
	}
}

func pollOnce(t *testing.T, s *Session[int], text string, wait time.Duration) (*Answer, error) {
	t.Helper()
	return s.Poll(t.Context(), NewMessage([]byte(text), nil), 2*time.Second, wait)
}

// TestSession hands on what polls say, in order, and gives each poll one of the messages that wait, in order.
func TestSession(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := NewSession[int](0)
		read := reading(s)
		written := make(chan int)
		go func() {
			n, err := s.WriteBatch([]entry{offer("1"), {Kind: outbox.Ping}, offer("2"), {Kind: outbox.Message, Stale: func() bool { return true }}, offer("3")})
			if err != nil {
				panic(err)
			}
			written <- n
		}()
		for i, text := range []string{"a", "b", "c"} {
			a, err := pollOnce(t, s, text, time.Minute)
			require.NoError(t, err)
			require.Equal(t, offer(string(rune('1' + i))).Frame[1:], a.Body())
			a.Written(true)
			synctest.Wait()
		}
		require.Equal(t, 5, <-written)
		begin := time.Now()
		a, err := pollOnce(t, s, "d", 7*time.Second)
		require.NoError(t, err)
		require.Nil(t, a)
		require.Equal(t, 7*time.Second, time.Since(begin))
		require.EqualValues(t, 4, s.Received())
		require.Equal(t, []string{"a", "b", "c", "d"}, read())
	})
}

// TestUnwritten offers a message again that could not be written to the agent.
func TestUnwritten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := NewSession[int](0)
		read := reading(s)
		done := make(chan error)
		go func() {
			_, err := s.WriteBatch([]entry{offer("1")})
			done <- err
		}()
		for _, ok := range []bool{false, false, true} {
			synctest.Wait()
			a, err := pollOnce(t, s, "x", time.Minute)
			require.NoError(t, err)
			require.Equal(t, offer("1").Frame, a.Frame)
			a.Written(ok)
		}
		require.NoError(t, <-done)
		read()
	})
}

// TestEnd ends whoever waits: a poll that was taken without an answer, one that was not with an error, the writer and
// the reader.
func TestEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := NewSession[int](0)
		read := reading(s)
		go func() {
			time.Sleep(time.Second)
			s.Close()
			s.Close()
		}()
		a, err := pollOnce(t, s, "x", time.Minute)
		require.NoError(t, err)
		require.Nil(t, a)
		_, err = pollOnce(t, s, "y", time.Minute)
		require.ErrorIs(t, err, ErrEnded)
		n, err := s.WriteBatch([]entry{offer("1"), offer("2")})
		require.Zero(t, n)
		require.ErrorIs(t, err, net.ErrClosed)
		require.True(t, s.Closing())
		require.Equal(t, []string{"x"}, read())
	})
}

// TestHurry ends a session at once between two polls, and in a moment while one waits, which may still hear something.
func TestHurry(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := NewSession[int](0)
		read := reading(s)
		s.Hurry()
		synctest.Wait()
		require.True(t, s.Closing())
		read()

		s = NewSession[int](0)
		read = reading(s)
		begin := time.Now()
		heard := make(chan *Answer)
		go func() {
			a, _ := s.Poll(context.Background(), NewMessage([]byte("x"), nil), time.Second, time.Minute)
			heard <- a
		}()
		synctest.Wait()
		s.Hurry()
		s.Hurry()
		require.Nil(t, <-heard)
		require.Equal(t, moment, time.Since(begin))
		read()

		// An end that comes in its turn ends it, too.
		s = NewSession[int](0)
		read = reading(s)
		n, err := s.WriteBatch([]entry{{Kind: outbox.End}})
		require.NoError(t, err)
		require.Equal(t, 1, n)
		require.True(t, s.Closing())
		read()
	})
}

// TestBusy has a poll wait for a reader that takes nothing, but not for long, and leaves its message to it.
func TestBusy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := NewSession[int](0)
		begin, done := time.Now(), 0
		m := NewMessage([]byte("x"), func() { done++ })
		_, err := s.Poll(t.Context(), m, 2*time.Second, time.Minute)
		require.ErrorIs(t, err, ErrBusy)
		require.Equal(t, 2*time.Second, time.Since(begin))
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		_, err = s.Poll(ctx, m, 2*time.Second, time.Minute)
		require.ErrorIs(t, err, context.Canceled)
		require.Zero(t, done)
		m.Done()
		require.Equal(t, 1, done)
	})
}

// TestDone tells when a message is done with: when the next is read, or nothing more is.
func TestDone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := NewSession[int](0)
		done := 0
		go func() { _, _ = s.Poll(context.Background(), NewMessage(nil, func() { done++ }), time.Second, 0) }()
		_, err := s.Read()
		require.NoError(t, err)
		require.Zero(t, done)
		s.Close()
		_, err = s.Read()
		require.ErrorIs(t, err, net.ErrClosed)
		require.Equal(t, 1, done)
		s.Release()
		require.Equal(t, 1, done)
	})
}

// TestTryBatch writes what needs no poll: what says nothing, when nobody waits for it.
func TestTryBatch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := NewSession[int](0)
		read := reading(s)
		able := message(&protobufs.ServerToAgent{InstanceUid: []byte("u"), Capabilities: 3})
		for _, test := range []struct {
			batch []entry
			n     int
		}{
			{[]entry{nothing, {Kind: outbox.Ping}, {Kind: outbox.Pong}, nothing}, 4},
			{[]entry{nothing, offer("1"), nothing}, 1},
			{[]entry{able}, 0},
			{[]entry{message(&protobufs.ServerToAgent{InstanceUid: []byte("u"), Flags: 1})}, 0},
			{[]entry{{Frame: []byte{0, 0xff}, Kind: outbox.Message}}, 0},
			{[]entry{{Frame: []byte{0, 1<<3 | 2, 99}, Kind: outbox.Message}}, 0},
		} {
			n, err := s.TryBatch(test.batch)
			require.NoError(t, err)
			require.Equal(t, test.n, n)
		}
		// The agent waits, even for nothing; and then knows what the server is able to.
		go func() {
			if _, err := s.WriteBatch([]entry{able}); err != nil {
				panic(err)
			}
		}()
		a, err := pollOnce(t, s, "x", time.Minute)
		require.NoError(t, err)
		a.Written(true)
		synctest.Wait()
		n, err := s.TryBatch([]entry{able})
		require.NoError(t, err)
		require.Equal(t, 1, n)
		heard := make(chan *Answer)
		go func() {
			a, _ := s.Poll(context.Background(), NewMessage(nil, nil), time.Second, time.Minute)
			heard <- a
		}()
		synctest.Wait()
		n, err = s.TryBatch([]entry{nothing})
		require.NoError(t, err)
		require.Zero(t, n)
		s.Close()
		require.Nil(t, <-heard)
		read()
	})
}

// TestOverdue gives an agent three times the interval at which it polls, or was offered to, and no less than is usual.
func TestOverdue(t *testing.T) {
	const least = 30 * time.Second
	for name, test := range map[string]struct {
		before time.Duration // that it was remembered for
		gaps   []time.Duration
		offer  uint64
		after  time.Duration
	}{
		"new":                          {0, nil, 0, 90 * time.Second},
		"quick":                        {0, []time.Duration{time.Second, 2 * time.Second}, 0, 90 * time.Second},
		"slow":                         {0, []time.Duration{60 * time.Second}, 0, 180 * time.Second},
		"slow, with more to say":       {0, []time.Duration{80 * time.Second, time.Second, time.Second, time.Second}, 0, 240 * time.Second},
		"slow long ago":                {0, append([]time.Duration{80 * time.Second}, repeated(250, 30*time.Second)...), 0, 90 * time.Second},
		"remembered":                   {5 * time.Minute, nil, 0, 15 * time.Minute},
		"remembered for too long":      {48 * time.Hour, nil, 0, 3 * MaxInterval},
		"offered":                      {0, nil, 120, 6 * time.Minute},
		"offered what is far too long": {0, nil, 1 << 40, 3 * MaxInterval},
		"offered less":                 {0, nil, 1, 90 * time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := NewSession[int](test.before)
				for _, gap := range test.gaps {
					time.Sleep(gap)
					s.leave(s.arrive())
				}
				if test.offer > 0 {
					s.learn(message(&protobufs.ServerToAgent{ConnectionSettings: &protobufs.ConnectionSettingsOffers{
						Opamp: &protobufs.OpAMPConnectionSettings{HeartbeatIntervalSeconds: test.offer},
					}}).Frame)
				}
				require.Equal(t, test.after/missedPolls+lateness, s.Due(least))
				time.Sleep(test.after - time.Second)
				_, overdue := s.Overdue(least)
				require.False(t, overdue)
				time.Sleep(time.Second)
				_, overdue = s.Overdue(least)
				require.True(t, overdue)
				p := s.arrive()
				time.Sleep(24 * time.Hour)
				_, overdue = s.Overdue(least)
				require.False(t, overdue, "it is there")
				s.leave(p)
			})
		})
	}
}

func repeated(n int, d time.Duration) (all []time.Duration) {
	for range n {
		all = append(all, d)
	}
	return all
}

// TestAwait tells of the next poll.
func TestAwait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := NewSession[int](0)
		sign := s.Await()
		require.Equal(t, sign, s.Await())
		select {
		case <-sign:
			t.Fatal("there was no poll")
		default:
		}
		s.leave(s.arrive())
		<-sign
		require.NotEqual(t, sign, s.Await())
	})
}

// TestStalled tells how much later than usual the poll is for which something waits.
func TestStalled(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := NewSession[int](0)
		time.Sleep(40 * time.Second)
		s.leave(s.arrive())
		time.Sleep(30 * time.Second)
		require.Zero(t, s.Stalled())
		done := make(chan struct{})
		go func() {
			_, _ = s.WriteBatch([]entry{offer("1")})
			close(done)
		}()
		time.Sleep(30 * time.Second)
		require.Zero(t, s.Stalled())
		time.Sleep(30 * time.Second)
		require.Equal(t, 20*time.Second, s.Stalled())
		s.Close()
		<-done
		require.Zero(t, s.Stalled())
	})
}

// FuzzSays compares what is read of a message with the full decoder.
func FuzzSays(f *testing.F) {
	for _, e := range []entry{nothing, offer("1"), message(&protobufs.ServerToAgent{Flags: 1, Capabilities: 7})} {
		f.Add(e.Frame)
	}
	f.Add([]byte{0, 6<<3 | 2, 0})
	f.Fuzz(func(t *testing.T, frame []byte) {
		s := NewSession[int](0)
		s.learn(frame)
		s.told, s.capabilities = true, 7
		var decoded protobufs.ServerToAgent
		if proto.Unmarshal(body(frame), &decoded) != nil || s.says(frame) {
			return
		}
		decoded.InstanceUid = nil
		if decoded.Capabilities == 7 {
			decoded.Capabilities = 0
		}
		if !proto.Equal(&decoded, &protobufs.ServerToAgent{}) {
			t.Fatalf("%v is taken for nothing", &decoded)
		}
	})
}
