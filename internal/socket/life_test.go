package socket

import (
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gorilla/websocket"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// wantOpen asserts that nobody who waits has been told.
func wantOpen(tb testing.TB, awaited <-chan struct{}) {
	tb.Helper()
	select {
	case <-awaited:
		require.Fail(tb, "told of a sign of life that there was not")
	default:
	}
}

// startReading has the Socket read until its end.
func (f *fixture) startReading() {
	go func() {
		for {
			if _, err := f.Read(); err != nil && !Skippable(err) {
				return
			}
		}
	}()
}

func TestWhoDoubtsIsToldOfTheNextSignOfLife(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t, false, unlimited, 1<<20)
		f.startReading()
		for range 3 {
			require.NoError(t, f.peer.WriteMessage(websocket.BinaryMessage, []byte("before")))
			synctest.Wait()
			first := f.Await()
			second := f.Await()
			synctest.Wait()
			wantOpen(t, first)
			f.Sweep() // whoever else asks takes nothing away
			f.PingSent()
			wantOpen(t, second)
			require.NoError(t, f.peer.WriteControl(websocket.PongMessage, nil, time.Now().Add(time.Second)))
			synctest.Wait()
			<-first
			<-second
			wantOpen(t, f.Await())
			require.NoError(t, f.peer.WriteMessage(websocket.BinaryMessage, []byte("between")))
			synctest.Wait()
		}
		last := f.Await()
		f.Close()
		synctest.Wait()
		wantOpen(t, last) // an end is no sign of life
	})
}

// A doubt must not make an agent look silent that is not, nor one alive that is silent.
func TestADoubtChangesNothingForTheSweep(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t, false, unlimited, 1<<20)
		f.startReading()
		for name, ask := range map[string]func(){"await": func() { f.Await() }, "ping": f.PingSent} {
			require.NoError(t, f.peer.WriteMessage(websocket.BinaryMessage, []byte("heartbeat")))
			synctest.Wait()
			ask()
			require.Zero(t, f.Sweep(), name)
			ask()
			require.Equal(t, 1, f.Sweep(), name)
			ask()
			require.Equal(t, 2, f.Sweep(), name)
		}
	})
}

func TestAPingIsAnsweredByAnySignOfLife(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t, false, unlimited, 1<<20)
		f.startReading()
		assert.False(t, f.Unanswered(), "nobody has asked")
		for _, sign := range []func() error{
			func() error { return f.peer.WriteControl(websocket.PongMessage, nil, time.Now().Add(time.Second)) },
			func() error { return f.peer.WriteMessage(websocket.BinaryMessage, []byte("heartbeat")) },
		} {
			require.NoError(t, sign())
			synctest.Wait()
			f.PingSent()
			assert.True(t, f.Unanswered())
			f.Sweep()
			f.Await()
			awaited := f.Await()
			f.Excuse()
			require.Zero(t, f.Sweep())
			wantOpen(t, awaited)
			assert.True(t, f.Unanswered(), "whoever else asks is no answer, nor is an excuse")
			require.NoError(t, sign())
			synctest.Wait()
			assert.False(t, f.Unanswered())
			f.Sweep()
			f.Await()
			assert.False(t, f.Unanswered())
		}
		f.PingSent()
		f.Close()
		synctest.Wait()
		assert.True(t, f.Unanswered(), "an end is no answer")
	})
}

// However questions and signs of life fall together, no question stays without an answer, and no sweep
// misses one.
func TestSignsOfLifeReachAllWhoAsk(t *testing.T) {
	var l life
	var asking sync.WaitGroup
	signs, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(signs)
		for {
			select {
			case <-done:
				return
			default:
				l.alive()
			}
		}
	}()
	for range 4 {
		asking.Go(func() {
			for range 1000 {
				<-l.Await()
			}
		})
	}
	for range 1000 {
		l.PingSent()
		<-l.Await()
		l.sweep()
	}
	asking.Wait()
	close(done)
	<-signs
	l.sweep()
	l.PingSent()
	l.Await()
	l.alive()
	assert.True(t, l.sweep())
	assert.False(t, l.sweep())
	assert.False(t, l.Unanswered())
}
