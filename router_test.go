package opampgateway

import (
	"strconv"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/opampgateway/opampgateway/internal/gatewaytest"
	"github.com/opampgateway/opampgateway/internal/wire"
)

var today = wire.Format{Header: true}

func uidOf(t testing.TB, name string) wire.UID {
	t.Helper()
	uid, err := wire.ParseUID(gatewaytest.UID(name))
	require.NoError(t, err)
	return uid
}

// wantClaim has a speak as uid.
func wantClaim(t testing.TB, r *router, a *agentConn, uid wire.UID, conflict bool) *hold {
	t.Helper()
	h, other, err := r.claim(a, uid, today)
	require.NoError(t, err)
	require.Equal(t, conflict, other != nil, "conflict")
	require.Same(t, h, r.find(uid.Bytes()))
	require.Same(t, a, h.agent)
	return h
}

// A connection behind which an agent has said goodbye has no part any more in where that agent
// is, though its route stays for the server's answer.
func TestRouteOfAgentThatMoved(t *testing.T) {
	r, alice := newRouter(), uidOf(t, "alice")
	below, direct := &agentConn{gateway: true}, &agentConn{}
	h := wantClaim(t, r, below, alice, false)
	r.depart(h)
	require.Same(t, h, r.find(alice.Bytes()), "for the server's answer")

	wantClaim(t, r, direct, alice, false)
	require.Len(t, r.release(direct), 1, "nobody has alice, so somebody has to say goodbye")
	require.Nil(t, r.find(alice.Bytes()))
	require.Empty(t, r.release(below))
	require.Empty(t, r.routes)
}

func TestRouteOfAgentThatIsBack(t *testing.T) {
	r, alice := newRouter(), uidOf(t, "alice")
	below := &agentConn{gateway: true}
	h := wantClaim(t, r, below, alice, false)
	r.depart(h)
	again := wantClaim(t, r, below, alice, false)
	require.Same(t, h, again)
	require.Contains(t, r.release(below), h, "it has not said goodbye since")
}

func TestRouteOfClones(t *testing.T) {
	r, alice := newRouter(), uidOf(t, "alice")
	one, other := &agentConn{}, &agentConn{}
	wantClaim(t, r, one, alice, false)
	wantClaim(t, r, other, alice, true)
	wantClaim(t, r, one, alice, true)
	require.Empty(t, r.release(one), "the other still has it")
	require.Same(t, other, r.find(alice.Bytes()).agent)
	require.Len(t, r.release(other), 1)
	require.Empty(t, r.routes)
}

func TestRouteOfRenamedAgent(t *testing.T) {
	r, old, renamed := newRouter(), uidOf(t, "old"), uidOf(t, "new")
	a := &agentConn{}
	h := wantClaim(t, r, a, old, false)
	h.told.Store(&capabilities{})
	require.NoError(t, r.rename(h, renamed))
	require.Same(t, a, r.find(old.Bytes()).agent)
	require.Same(t, a, r.find(renamed.Bytes()).agent)
	require.Same(t, h.told.Load(), r.find(renamed.Bytes()).told.Load(), "it is the same agent")

	t.Run("that has used neither", func(t *testing.T) {
		require.NoError(t, r.rename(h, uidOf(t, "newer")))
		require.NoError(t, r.rename(h, old), "no change")
	})
	used := wantClaim(t, r, a, renamed, false)
	require.Nil(t, r.find(old.Bytes()), "its old UID ends silently")
	require.NoError(t, r.rename(h, uidOf(t, "late")), "it is gone")
	require.Nil(t, r.find(gatewaytest.UID("late")))
	require.Contains(t, r.release(a), used, "a UID that was never used leaves nobody behind")
	require.Empty(t, r.routes)
}

// Behind a gateway agents come and go; those that said goodbye make room.
func TestRoomForUIDs(t *testing.T) {
	r, a := newRouter(), &agentConn{}
	for i := range maxUIDs {
		wantClaim(t, r, a, uidOf(t, strconv.Itoa(i)), false)
	}
	_, _, err := r.claim(a, uidOf(t, "one more"), today)
	require.ErrorIs(t, err, errTooManyUIDs)
	r.depart(r.find(gatewaytest.UID("7")))
	wantClaim(t, r, a, uidOf(t, "one more"), false)
	require.Nil(t, r.find(gatewaytest.UID("7")))
	require.Len(t, r.release(a), maxUIDs)
}

// Frames of many agents on one connection do not disturb those who look for others.
func TestNoLockForSettledAgents(t *testing.T) {
	r, alice, bob := newRouter(), uidOf(t, "alice"), uidOf(t, "bob")
	below := &agentConn{gateway: true}
	wantClaim(t, r, below, alice, false)
	wantClaim(t, r, below, bob, false)
	r.mu.RLock() // whoever wants to change something would wait for ever
	defer r.mu.RUnlock()
	wantClaim(t, r, below, alice, false)
	wantClaim(t, r, below, bob, false)

	uid := alice.Bytes()
	require.Zero(t, testing.AllocsPerRun(100, func() {
		r.find(uid)
		_, _, _ = r.claim(below, alice, today)
	}))
}
