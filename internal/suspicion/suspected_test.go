package suspicion

import (
	"testing"
	"time"

	"github.com/gorilla/websocket"
	"github.com/stretchr/testify/require"
)

// An operator is told who is suspected, since when and until when.
func TestSuspected(t *testing.T) {
	bubble(t, func(t *testing.T, b *Book) {
		require.Empty(t, b.Suspected())
		begin := time.Now()
		ends(b, websocket.CloseInvalidFramePayloadData, says(alice, 200), says(bob, 30))
		on := func(n int) Suspected {
			return Suspected{UID: agent(n), Since: begin, Until: begin.Add(suspectFor)}
		}
		require.ElementsMatch(t, []Suspected{on(alice), on(bob)}, b.Suspected())

		time.Sleep(10 * time.Second)
		wantNamed(t, b, websocket.CloseInvalidFramePayloadData, namedFor, says(alice, 200))
		named := time.Now()
		turnedDown := Suspected{UID: agent(alice), TurnedDown: true, Since: named, Until: named.Add(namedFor)}
		require.Equal(t, []Suspected{turnedDown, on(bob)}, b.Suspected(), "the latest first")

		time.Sleep(suspectFor)
		require.Equal(t, []Suspected{turnedDown}, b.Suspected(), "bob's minute is over, whether it was swept or not")
		time.Sleep(namedFor - suspectFor)
		after := Suspected{UID: agent(alice), Since: turnedDown.Until, Until: named.Add(2 * namedFor)}
		require.Equal(t, []Suspected{after}, b.Suspected(), "it is on trial as long again")
		time.Sleep(namedFor)
		require.Empty(t, b.Suspected())
	})
}

// Who is tried for large messages only is told apart, and who is suspected again has been all the time.
func TestSuspectedForASize(t *testing.T) {
	bubble(t, func(t *testing.T, b *Book) {
		begin := time.Now()
		ends(b, websocket.CloseMessageTooBig, says(alice, 2<<20))
		time.Sleep(10 * time.Second)
		ends(b, websocket.CloseMessageTooBig, says(alice, 2<<20))
		require.Equal(t, []Suspected{{UID: agent(alice), Large: true, Since: begin, Until: time.Now().Add(suspectFor)}}, b.Suspected())
		b.Forget()
		require.Empty(t, b.Suspected())
	})
}
