package opampgateway

import (
	"errors"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/opampgateway/opampgateway/internal/memory"
	"github.com/opampgateway/opampgateway/internal/monotonic"
	"github.com/opampgateway/opampgateway/internal/wire"
)

const (
	// maxGatewayUIDs bounds the instance UIDs of a connection that is a gateway's.
	maxGatewayUIDs = 100_000

	// claimMemory is what one claim and its route take, in bytes, as far as the budget is concerned.
	claimMemory = 384

	// farewellTime is how long a goodbye is remembered, for the server's answer, and maxFarewells how many
	// are. Both up to twice.
	farewellTime, maxFarewells = time.Minute, 8192

	// maxBehind is of how many agents it is remembered that they have left something behind.
	maxBehind = 8192
)

var (
	errTooManyUIDs = errors.New("too many instance UIDs on one connection")
	errNoMemory    = errors.New("memory is used up, see max_buffered_size")
)

// router knows on which agent connection each instance UID is to be reached.
type router struct {
	memory *memory.Budget

	// mu guards the table, the claims of each route and of each connection, and what those
	// say below. For a frame it is taken only to read, and by an agent's not even that
	// while the connection speaks for one agent.
	mu     sync.RWMutex
	routes map[wire.UID]*route
	// Of whom a goodbye was said a while ago, or before that, and not answered yet.
	farewells, earlier map[wire.UID]struct{}
	// Of whom something waits yet to be written to the server, though their connection has ended.
	behind    map[wire.UID]*claim
	forgotten int64 // when the earlier were last forgotten, of the monotonic clock
}

// route is the way to one agent. Normally one connection claims it. Several do when an agent has
// reconnected before its old connection was found dead, or when an agent was cloned: the
// one that spoke last gets the replies, and when it leaves the one before gets them again.
// The older ones are not closed, since two clones would then throw each other out for ever.
// All of them came with the same credentials, but for gateways: those of its agents are not known here.
type route struct {
	uid     wire.UID
	current atomic.Pointer[claim] // the newest, to be read without the lock; nil once the route is not in the table
	shared  bool                  // two have claimed it at a time
	asking  []*claim              // who waits for another UID, in the order in which they asked; see naming.go
}

// claim is one connection's claim to one route: one agent, as long as it is connected there.
type claim struct {
	// Set once.
	agent  *agentConn
	route  *route
	format wire.Format // of the agent's frames

	// told is what the agent has heard of the server's custom capabilities.
	told atomic.Pointer[capabilities]

	// Owned by the agent's reader.
	sequence uint64 // of the agent's last message

	// Shared.
	awaited  atomic.Pointer[chan struct{}] // closed when the agent speaks here; nil while nobody waits for that
	polls    atomic.Pointer[polled]        // nil unless it has posted something
	answered atomic.Int64                  // when it last gave a sign of life because of another, of the monotonic clock; 0 for never

	// Guarded by router.mu.
	index        int           // of this in agent.claims; dropped when it is not there any more
	older, newer *claim        // of the same route, in the order in which they spoke last
	departed     bool          // the agent has said goodbye here; the claim stays for the server's answer
	listed       bool          // it is in agent.claims.departed
	given        bool          // by the server, and the agent has not used it yet
	former, next *claim        // while given: in place of which one; and the other way round
	renamed      bool          // a given one was used in place of this
	asks         int           // how often it is in route.asking
	named        chan struct{} // closed when it is not there any more; nil if its agent is none that asks
}

// dropped is the index of a claim that has ended.
const dropped = -1

func newRouter(budget *memory.Budget) *router {
	return &router{memory: budget, routes: map[wire.UID]*route{}, farewells: map[wire.UID]struct{}{}, behind: map[wire.UID]*claim{}}
}

// find returns the claim by which frames reach uid; nil if there is none.
func (r *router) find(uid []byte) *claim {
	key, err := wire.ParseUID(uid)
	if err != nil {
		return nil
	}
	r.mu.RLock()
	defer r.mu.RUnlock()
	if way := r.routes[key]; way != nil {
		return way.current.Load()
	}
	return nil
}

// findGiven returns the claim to a uid that the server has given its agent, and that the agent has not used yet; nil for any
// other.
func (r *router) findGiven(uid wire.UID) *claim {
	r.mu.RLock()
	defer r.mu.RUnlock()
	if way := r.routes[uid]; way != nil {
		if c := way.current.Load(); c.given {
			return c
		}
	}
	return nil
}

// claim makes a the connection to which frames for uid go, because it has just spoken under
// that UID, in this format. It tells who else has it, if anybody: with the same credentials, other
// stays the one before; with others there is no claim until other proves to be gone, see takeOver.
func (r *router) claim(a *agentConn, uid wire.UID, format wire.Format) (c *claim, other *rival, err error) {
	// Behind a gateway, each frame is of another agent, but nothing changes.
	r.mu.RLock()
	if way := r.routes[uid]; way != nil {
		c = way.current.Load()
	}
	settled := c != nil && c.agent == a && !c.departed && !c.given && !c.renamed && !a.asks
	r.mu.RUnlock()
	if settled {
		return c, nil, nil
	}

	r.mu.Lock()
	defer r.mu.Unlock()
	return r.claimLocked(a, uid, format)
}

// takeOver is claim after other was found to be gone: it loses its claim.
func (r *router) takeOver(a *agentConn, uid wire.UID, format wire.Format, other *rival) (*claim, *rival, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if way := r.routes[uid]; way != nil {
		for c := way.current.Load(); c != nil; c = c.older {
			if c.agent == other.agent {
				r.dropLocked(c)
				break
			}
		}
	}
	return r.claimLocked(a, uid, format)
}

// rival is who else claims a route.
type rival struct {
	*claim
	gone  bool // it has said goodbye, and its claim has ended
	same  bool // it came with the same credentials, or the newcomer is a gateway, which vouches for its agents
	fresh bool // it is the first time that two claim the route
	asks  bool // it has asked the server for another UID, so the one that it has is temporary
}

func (r *router) claimLocked(a *agentConn, uid wire.UID, format wire.Format) (c *claim, other *rival, err error) {
	way := r.routes[uid]
	if way == nil {
		if last := r.behind[uid]; last != nil && a.trusts(last.agent) {
			delete(r.behind, uid)
			other = &rival{claim: last, same: true, gone: true}
		}
	} else {
		switch last := way.current.Load(); {
		case last.agent == a:
		case last.departed: // and so the only one
			r.dropLocked(last)
			way, other = nil, &rival{claim: last, same: true, gone: true}
		default:
			other = &rival{claim: last, same: a.trusts(last.agent), fresh: !way.shared, asks: last.named != nil}
			if !other.same {
				return nil, other, nil
			}
		}
	}
	if c = a.claims.find(uid); c == nil {
		if c, err = r.addLocked(a, uid, format); err != nil {
			return nil, nil, err
		}
		way = c.route
	}
	c.departed, c.renamed = false, false // whoever speaks after a goodbye is back
	if c.given {
		c.given = false
		if c.former != nil {
			c.former.next, c.former.renamed, c.former = nil, true, nil
		}
	}
	way.shared = way.shared || other != nil && !other.gone
	way.toFront(c)
	if a.asks {
		c.ask()
	}
	return c, other, nil
}

// trusts reports whether another connection is the same agent's if it speaks under the same UID.
func (a *agentConn) trusts(other *agentConn) bool {
	return a.gateway || other.credentials == a.credentials
}

// addLocked adds a claim, which is not the current one of its route yet.
func (r *router) addLocked(a *agentConn, uid wire.UID, format wire.Format) (*claim, error) {
	if len(a.claims.all) >= a.maxUIDs() {
		r.forgetDepartedLocked(a)
	}
	if len(a.claims.all) >= a.maxUIDs() {
		return nil, errTooManyUIDs
	}
	if !r.memory.Kept.Take(a.kept, claimMemory) {
		return nil, errNoMemory
	}
	a.kept += claimMemory
	way := r.routes[uid]
	if way == nil {
		way = &route{uid: uid}
		r.routes[uid] = way
	}
	c := &claim{agent: a, route: way, format: format}
	a.claims.add(c)
	a.many.Store(int32(len(a.claims.all)))
	return c, nil
}

// rename prepares for the agent of c to speak as uid from its next frame on: frames for uid
// reach it already, frames for its old UID still do. What an earlier rename prepared is gone,
// unless the agent has used it.
func (r *router) rename(c *claim, uid wire.UID) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if c.index == dropped || c.route.uid == uid {
		return nil
	}
	if c.former != nil { // it has not used its last name
		c = c.former
	}
	if c.next != nil && !c.agent.gateway { // of which several agents may have got one
		r.dropLocked(c.next)
	}
	if r.routes[uid] != nil {
		return nil // whoever has it is asked once the agent uses it
	}
	renamed, err := r.addLocked(c.agent, uid, c.format)
	if err != nil {
		return err
	}
	renamed.route.toFront(renamed)
	renamed.given, renamed.former, c.next = true, c, renamed
	renamed.told.Store(c.told.Load()) // it is the same agent
	return nil
}

// dropLocked ends c, unless it has ended; the connection that claimed the route before is
// current again.
func (r *router) dropLocked(c *claim) {
	if c.index == dropped {
		return
	}
	if c.former != nil {
		c.former.next = nil
	}
	if c.next != nil {
		c.next.former = nil
	}
	c.former, c.next = nil, nil
	c.forgetAsks()
	c.agent.claims.remove(c)
	c.agent.many.Store(int32(len(c.agent.claims.all)))
	c.agent.kept -= claimMemory
	r.memory.Kept.Give(claimMemory)
	if c.route.remove(c) {
		delete(r.routes, c.route.uid)
	}
}

// depart notes that the agent of c has said goodbye itself.
func (r *router) depart(c *claim) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if c.index == dropped {
		return
	}
	c.departed = true
	if c.older != nil || c.newer != nil {
		r.dropLocked(c) // the others are still there
		return
	}
	c.agent.claims.depart(c)
}

// forgetDepartedLocked makes room: behind a gateway, agents come and go on one connection.
func (r *router) forgetDepartedLocked(a *agentConn) {
	for _, c := range a.claims.departed() {
		c.listed = false
		if c.departed && c.index != dropped { // otherwise it is back, or gone
			r.noteFarewellLocked(c.route.uid)
			r.dropLocked(c)
		}
	}
}

// reached returns the claims by which frames go to a.
func (r *router) reached(a *agentConn) []*claim {
	r.mu.RLock()
	defer r.mu.RUnlock()
	claims := make([]*claim, 0, len(a.claims.all))
	for _, c := range a.claims.all {
		if c.route.current.Load() == c {
			claims = append(claims, c)
		}
	}
	return claims
}

// release ends all that a claims, at a cost of just that, and what is kept of it. Of those in waiting, there is something
// yet to be written. It returns the claims to agents that nobody else claims and that have not said goodbye.
func (r *router) release(a *agentConn, waiting []*claim) (gone []*claim) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for len(a.claims.all) > 0 {
		c := a.claims.all[len(a.claims.all)-1]
		r.dropLocked(c)
		if c.route.current.Load() != nil {
			continue // it is connected elsewhere
		}
		if c.departed {
			r.noteFarewellLocked(c.route.uid)
		} else if !c.renamed && !c.given {
			gone = append(gone, c)
		}
	}
	for _, c := range waiting {
		if c.route.current.Load() == nil && len(r.behind) < maxBehind {
			r.behind[c.route.uid] = c
		}
	}
	r.memory.Kept.Give(a.kept)
	a.kept = 0
	return gone
}

// noteFarewell remembers for a while that a goodbye was said of uid: servers answer it.
func (r *router) noteFarewell(uid wire.UID) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.noteFarewellLocked(uid)
}

func (r *router) noteFarewellLocked(uid wire.UID) {
	if len(r.farewells) >= maxFarewells {
		r.forgetLocked()
	}
	r.farewells[uid] = struct{}{}
}

// takeFarewell reports whether a message for uid answers a goodbye. Each has one answer.
func (r *router) takeFarewell(uid []byte) bool {
	key, err := wire.ParseUID(uid)
	if err != nil {
		return false
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	_, said := r.farewells[key]
	if !said {
		_, said = r.earlier[key]
	}
	delete(r.farewells, key)
	delete(r.earlier, key)
	return said
}

// forgetFarewells forgets goodbyes of long ago. To be called now and then.
func (r *router) forgetFarewells() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if monotonic.Since(r.forgotten) >= farewellTime && len(r.farewells)+len(r.earlier)+len(r.behind) > 0 {
		r.forgetLocked()
	}
}

func (r *router) forgetLocked() {
	r.earlier, r.farewells, r.forgotten = r.farewells, map[wire.UID]struct{}{}, monotonic.Now()
	clear(r.behind) // or else it waits for as long
}

// await returns a channel that is closed when the agent speaks here, and whether it is new: then the
// caller has the agent speak. All who wait share it.
func (c *claim) await() (spoken <-chan struct{}, isNew bool) {
	fresh := make(chan struct{})
	for {
		if c.awaited.CompareAndSwap(nil, &fresh) {
			return fresh, true
		}
		if known := c.awaited.Load(); known != nil {
			return *known, false
		}
	}
}

// speaks notes that the agent speaks here.
func (c *claim) speaks(sequence uint64) {
	c.sequence = sequence
	if c.awaited.Load() == nil { // as nearly always
		return
	}
	if awaited := c.awaited.Swap(nil); awaited != nil {
		close(*awaited)
	}
}

// has reports whether some connection claims uid.
func (r *router) has(uid wire.UID) bool {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return r.routes[uid] != nil
}

// toFront makes c the current claim of its route.
func (w *route) toFront(c *claim) {
	last := w.current.Load()
	if last == c {
		return
	}
	c.unlink()
	if c.older = last; last != nil {
		last.newer = c
	}
	w.current.Store(c)
}

// remove takes c out of its route, and reports whether nobody claims that any more.
func (w *route) remove(c *claim) (empty bool) {
	if w.current.Load() == c {
		w.current.Store(c.older)
	}
	c.unlink()
	return w.current.Load() == nil
}

func (c *claim) unlink() {
	if c.older != nil {
		c.older.newer = c.newer
	}
	if c.newer != nil {
		c.newer.older = c.older
	}
	c.older, c.newer = nil, nil
}

// claims are those of one connection: mostly one.
type claims struct {
	all  []*claim
	more *moreClaims // nil on most connections
}

// moreClaims is what makes many claims of one connection easy to find.
type moreClaims struct {
	byUID    map[wire.UID]*claim
	departed []*claim // agents that have said goodbye; some may be back, or gone
}

// fewClaims is how many can be looked through.
const fewClaims = 8

func (s *claims) find(uid wire.UID) *claim {
	if s.more != nil {
		return s.more.byUID[uid]
	}
	for _, c := range s.all {
		if c.route.uid == uid {
			return c
		}
	}
	return nil
}

func (s *claims) add(c *claim) {
	c.index = len(s.all)
	s.all = append(s.all, c)
	switch {
	case s.more != nil:
		s.more.byUID[c.route.uid] = c
	case len(s.all) > fewClaims:
		s.more = &moreClaims{byUID: make(map[wire.UID]*claim, 2*fewClaims)}
		for _, c := range s.all {
			s.more.byUID[c.route.uid] = c
			if c.departed {
				s.depart(c)
			}
		}
	}
}

// remove puts the last in the place of c.
func (s *claims) remove(c *claim) {
	end := len(s.all) - 1
	last := s.all[end]
	s.all[c.index], last.index = last, c.index
	s.all[end] = nil
	s.all, c.index = s.all[:end], dropped
	if s.more != nil {
		delete(s.more.byUID, c.route.uid)
	}
}

// depart notes an agent that may be forgotten to make room for another.
func (s *claims) depart(c *claim) {
	if s.more == nil || c.listed { // few are looked through
		return
	}
	if len(s.more.departed) > 2*len(s.all) {
		s.more.departed = slices.DeleteFunc(s.more.departed, func(c *claim) bool { return c.index == dropped })
	}
	s.more.departed, c.listed = append(s.more.departed, c), true
}

// departed returns those that have said goodbye since it was last called, or all, if there are few.
func (s *claims) departed() []*claim {
	if s.more == nil {
		return slices.Clone(s.all)
	}
	departed := s.more.departed
	s.more.departed = nil
	return departed
}
