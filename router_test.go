package opampgateway

import (
	"strconv"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/opampgateway/opampgateway/internal/gatewaytest"
	"github.com/opampgateway/opampgateway/internal/memory"
	"github.com/opampgateway/opampgateway/internal/monotonic"
	"github.com/opampgateway/opampgateway/internal/wire"
)

var today = wire.Format{Header: true}

func uidOf(t testing.TB, name string) wire.UID {
	t.Helper()
	uid, err := wire.ParseUID(gatewaytest.UID(name))
	require.NoError(t, err)
	return uid
}

// routing is a router with a configuration, for connections without sockets.
type routing struct {
	*router
	t      testing.TB
	server *downstreamServer
}

func newRouting(t testing.TB) *routing {
	t.Helper()
	cfg := createDefaultConfig().(*Config)
	r := newRouter(memory.New(int64(cfg.MaxBufferedSize), cfg.MaxMessageSize))
	server := &downstreamServer{cfg: &currentConfig{}}
	server.cfg.Store(cfg)
	return &routing{router: r, t: t, server: server}
}

// agent returns a connection that came with these credentials.
func (r *routing) agent(key string) *agentConn {
	return &agentConn{server: r.server, credentials: credentials([]byte((key + "                ")[:16]))}
}

func (r *routing) gateway() *agentConn {
	a := r.agent("gateway")
	a.gateway = true
	return a
}

// wantClaim has a speak as uid.
func (r *routing) wantClaim(a *agentConn, uid wire.UID, conflict bool) *claim {
	r.t.Helper()
	c, other, err := r.claim(a, uid, today)
	require.NoError(r.t, err)
	require.Equal(r.t, conflict, other != nil && !other.gone, "conflict")
	require.NotNil(r.t, c)
	require.Same(r.t, c, r.way(uid))
	require.Same(r.t, a, c.agent)
	return c
}

// wantTurnedDown has a speak as uid, which belongs to owner.
func (r *routing) wantTurnedDown(a, owner *agentConn, uid wire.UID) *rival {
	r.t.Helper()
	c, other, err := r.claim(a, uid, today)
	require.NoError(r.t, err)
	require.Nil(r.t, c)
	require.False(r.t, other.same)
	require.Same(r.t, owner, other.agent)
	require.Same(r.t, owner, r.way(uid).agent, "whose it was stays so")
	return other
}

func (r *routing) way(uid wire.UID) *claim {
	return r.find(uid.Bytes())
}

// wantNobody checks that nothing is left, and nothing counted.
func (r *routing) wantNobody() {
	r.t.Helper()
	require.Empty(r.t, r.routes)
	require.Zero(r.t, r.memory.Kept.Held())
}

// A connection behind which an agent has said goodbye has no part any more in where that agent
// is, though its route stays for the server's answer.
func TestRouteOfAgentThatMoved(t *testing.T) {
	r, alice := newRouting(t), uidOf(t, "alice")
	below, direct := r.gateway(), r.agent("alice")
	c := r.wantClaim(below, alice, false)
	r.depart(c)
	require.Same(t, c, r.way(alice), "for the server's answer")

	r.wantClaim(direct, alice, false)
	require.Len(t, r.release(direct, nil), 1, "nobody has alice, so somebody has to say goodbye")
	require.Nil(t, r.way(alice))
	require.Empty(t, r.release(below, nil))
	r.wantNobody()
}

func TestRouteOfAgentThatIsBack(t *testing.T) {
	r, alice := newRouting(t), uidOf(t, "alice")
	below := r.gateway()
	c := r.wantClaim(below, alice, false)
	r.depart(c)
	again := r.wantClaim(below, alice, false)
	require.Same(t, c, again)
	require.Contains(t, r.release(below, nil), c, "it has not said goodbye since")
	r.wantNobody()
}

func TestRouteOfClones(t *testing.T) {
	r, alice := newRouting(t), uidOf(t, "alice")
	one, other, third := r.agent("key"), r.agent("key"), r.agent("key")
	r.wantClaim(one, alice, false)
	r.wantClaim(other, alice, true)
	r.wantClaim(third, alice, true)
	r.wantClaim(one, alice, true)
	require.Empty(t, r.release(one, nil), "others still have it")
	require.Same(t, third, r.way(alice).agent, "who spoke last before")
	r.depart(r.way(alice))
	require.Same(t, other, r.way(alice).agent, "a goodbye while others are there is an end")
	require.Len(t, r.release(other, nil), 1)
	require.Empty(t, r.release(third, nil))
	r.wantNobody()
}

// Whoever comes with other credentials has to wait until the owner proves to be gone.
func TestRouteOfAnotherAgent(t *testing.T) {
	r, alice := newRouting(t), uidOf(t, "alice")
	owner, clone, mallory := r.agent("alice's"), r.agent("alice's"), r.agent("mallory's")
	r.wantClaim(owner, alice, false)
	r.wantClaim(clone, alice, true)
	other := r.wantTurnedDown(mallory, clone, alice)

	c, other, err := r.takeOver(mallory, alice, today, other)
	require.NoError(t, err)
	require.Nil(t, c)
	require.Same(t, owner, other.agent, "the other one may be there")
	c, other, err = r.takeOver(mallory, alice, today, other)
	require.NoError(t, err)
	require.Nil(t, other)
	require.Same(t, c, r.way(alice))
	r.wantTurnedDown(owner, mallory, alice)

	require.Empty(t, r.release(clone, nil))
	require.Empty(t, r.release(owner, nil))
	require.Len(t, r.release(mallory, nil), 1)
	r.wantNobody()
}

func TestRouteOfRenamedAgent(t *testing.T) {
	r, old, second, third := newRouting(t), uidOf(t, "old"), uidOf(t, "second"), uidOf(t, "third")
	a := r.agent("key")
	c := r.wantClaim(a, old, false)
	c.told.Store(&capabilities{})
	require.NoError(t, r.rename(c, second))
	require.Same(t, a, r.way(old).agent)
	require.Same(t, a, r.way(second).agent)
	require.Same(t, c.told.Load(), r.way(second).told.Load(), "it is the same agent")

	require.NoError(t, r.rename(c, third))
	require.Nil(t, r.way(second), "a UID that was replaced before it was used is no way to anybody")
	require.NoError(t, r.rename(r.way(third), second), "said to the new UID, it is the same")
	require.Nil(t, r.way(third))
	require.NoError(t, r.rename(c, old), "no change")

	used := r.wantClaim(a, second, false)
	require.Same(t, a, r.way(old).agent, "the old UID's route stays with the connection")
	require.NoError(t, r.rename(used, third))
	require.Equal(t, []*claim{used}, r.release(a, nil), "an old UID, and one that was never used, leave nobody behind")
	r.wantNobody()
}

// A server that gives an agent the UID of another does not take it from that one.
func TestRenamedToAnother(t *testing.T) {
	r, alice, bob := newRouting(t), uidOf(t, "alice"), uidOf(t, "bob")
	a, b := r.agent("alice's"), r.agent("bob's")
	c := r.wantClaim(a, alice, false)
	r.wantClaim(b, bob, false)
	require.NoError(t, r.rename(c, bob))
	require.Same(t, b, r.way(bob).agent)
	r.wantTurnedDown(a, b, bob)
}

func TestBackUnderTheOldUID(t *testing.T) {
	r, old, renamed := newRouting(t), uidOf(t, "old"), uidOf(t, "new")
	a := r.agent("key")
	c := r.wantClaim(a, old, false)
	require.NoError(t, r.rename(c, renamed))
	r.wantClaim(a, renamed, false)
	r.wantClaim(a, old, false)
	require.Len(t, r.release(a, nil), 2, "it has used both since")
}

// Behind a gateway agents come and go; those that said goodbye make room.
func TestRoomForUIDs(t *testing.T) {
	r := newRouting(t)
	a, most := r.agent("proxy"), r.server.cfg.Load().Agents.MaxInstanceUIDs
	for i := range most {
		c := r.wantClaim(a, uidOf(t, strconv.Itoa(i)), false)
		if i == 3 {
			r.depart(c) // while there are few
		}
	}
	r.wantClaim(a, uidOf(t, "in the place of 3"), false)
	require.Nil(t, r.way(uidOf(t, "3")))
	_, _, err := r.claim(a, uidOf(t, "one more"), today)
	require.ErrorIs(t, err, errTooManyUIDs)
	for range 1000 { // comes and goes
		r.depart(r.way(uidOf(t, "7")))
		r.wantClaim(a, uidOf(t, "7"), false)
	}
	require.LessOrEqual(t, len(a.claims.more.departed), 2*most+1, "what is remembered of them")
	r.depart(r.way(uidOf(t, "7")))
	r.wantClaim(a, uidOf(t, "one more"), false)
	require.Nil(t, r.way(uidOf(t, "7")))
	require.Len(t, r.release(a, nil), most)
	r.wantNobody()
}

// One connection cannot use up what is kept for all.
func TestUIDsAreInTheBudget(t *testing.T) {
	r := newRouting(t)
	r.memory = memory.New(32<<20, 1<<20)
	a := r.gateway()
	var err error
	claims := 0
	for ; err == nil; claims++ {
		_, _, err = r.claim(a, uidOf(t, strconv.Itoa(claims)), today)
	}
	require.ErrorIs(t, err, errNoMemory)
	require.Less(t, claims*claimMemory, 32<<20/4)
	r.wantClaim(r.agent("alice's"), uidOf(t, "alice"), false)
}

// The server's answer to a goodbye is no fault; what else it says to an agent that has left is.
func TestAnswerToGoodbye(t *testing.T) {
	r, alice := newRouting(t), uidOf(t, "alice")
	a := r.agent("alice's")
	r.depart(r.wantClaim(a, alice, false))
	require.Empty(t, r.release(a, nil))
	require.True(t, r.takeFarewell(alice.Bytes()))
	require.False(t, r.takeFarewell(alice.Bytes()), "one answer")
	require.False(t, r.takeFarewell([]byte("no uid")))

	r.noteFarewell(alice)
	for i := range 10 * maxFarewells {
		r.noteFarewell(uidOf(t, strconv.Itoa(i)))
	}
	require.LessOrEqual(t, len(r.farewells)+len(r.earlier), 2*maxFarewells, "what is remembered")
	require.False(t, r.takeFarewell(alice.Bytes()))
	synctest.Test(t, func(*testing.T) {
		r.forgotten = monotonic.Now()
		r.noteFarewell(alice)
		for range 3 {
			time.Sleep(farewellTime)
			r.forgetFarewells()
		}
		require.False(t, r.takeFarewell(alice.Bytes()), "long ago")
	})
}

// Frames of many agents on one connection do not disturb those who look for others.
func TestNoLockForSettledAgents(t *testing.T) {
	r, alice, bob := newRouting(t), uidOf(t, "alice"), uidOf(t, "bob")
	below := r.gateway()
	r.wantClaim(below, alice, false)
	r.wantClaim(below, bob, false)
	r.mu.RLock() // whoever wants to change something would wait for ever
	defer r.mu.RUnlock()
	r.wantClaim(below, alice, false)
	r.wantClaim(below, bob, false)

	uid := alice.Bytes()
	require.Zero(t, testing.AllocsPerRun(100, func() {
		r.find(uid)
		_, _, _ = r.claim(below, alice, today)
	}))
}

// However many connections share a UID, a message of one costs the same.
func BenchmarkClones(b *testing.B) {
	for _, n := range []int{2, 100, 10_000} {
		b.Run(strconv.Itoa(n), func(b *testing.B) {
			r, alice := newRouting(b), uidOf(b, "alice")
			clones := make([]*agentConn, n)
			for i := range clones {
				clones[i] = r.agent("key")
			}
			for i := range b.N {
				if _, _, err := r.claim(clones[i%n], alice, today); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
