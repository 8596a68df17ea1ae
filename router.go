package opampgateway

import (
	"errors"
	"sync"
	"sync/atomic"

	"github.com/opampgateway/opampgateway/internal/wire"
)

const (
	// maxUIDs bounds the instance UIDs of one connection. Nearly all have one; a terminating
	// proxy may have several.
	maxUIDs = 64
	// maxGatewayUIDs bounds those of a connection that is itself a gateway.
	maxGatewayUIDs = 100_000
)

var errTooManyUIDs = errors.New("connection claims too many instance UIDs")

// router knows on which agent connection each instance UID is to be reached.
type router struct {
	// mu guards the table, the holders of each route, and what each connection holds. A frame
	// takes it only to read, and an agent's frame not even that while nothing changes.
	mu     sync.RWMutex
	routes map[wire.UID]*route
}

// route is the way to one agent. Normally one connection holds it. Two do when an agent has
// reconnected before its old connection was found dead, or when an agent was cloned: the
// one that spoke last gets the replies, and when it leaves the one before gets them again.
// The older one is not closed, since two clones would then throw each other out for ever.
type route struct {
	uid wire.UID
	// current is the last of holders, to be read without the lock.
	current atomic.Pointer[agentConn]
	// told is what the agent has heard of the server's custom capabilities.
	told atomic.Pointer[capabilities]

	// Guarded by router.mu.
	holders []*agentConn // in the order in which they spoke last; never empty while in the table
	replace *route       // ends when this one is used: the agent was given this UID in place of that one
}

func newRouter() *router { return &router{routes: map[wire.UID]*route{}} }

// find returns the connection to which frames for uid go, and its route; nil if there is none.
func (r *router) find(uid []byte) (*agentConn, *route) {
	key, err := wire.ParseUID(uid)
	if err != nil {
		return nil, nil
	}
	r.mu.RLock()
	way := r.routes[key]
	r.mu.RUnlock()
	if way == nil {
		return nil, nil
	}
	return way.current.Load(), way
}

// claim makes a the connection to which frames for uid go, because it has just spoken under
// that UID. It reports whether another connection had it.
func (r *router) claim(a *agentConn, uid wire.UID) (way *route, conflict bool, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	way = r.routes[uid]
	if way == nil || way.current.Load() != a {
		conflict = way != nil
		if way, err = r.holdLocked(a, uid); err != nil {
			return nil, false, err
		}
	}
	a.held[way] = false // whoever speaks after a goodbye is back
	if old := way.replace; old != nil {
		way.replace = nil
		r.dropLocked(a, old)
	}
	return way, conflict, nil
}

// rename prepares for the agent behind way to speak as uid from its next frame on: frames for
// uid reach it already, frames for its old UID still do.
func (r *router) rename(way *route, uid wire.UID) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	a := way.current.Load()
	if a == nil || way.uid == uid {
		return nil
	}
	renamed, err := r.holdLocked(a, uid)
	if err != nil {
		return err
	}
	renamed.replace = way
	renamed.told.Store(way.told.Load())
	return nil
}

// holdLocked makes a the current holder of uid's route.
func (r *router) holdLocked(a *agentConn, uid wire.UID) (*route, error) {
	way := r.routes[uid]
	if _, held := a.held[way]; !held && len(a.held) >= a.maxUIDs() {
		r.forgetDepartedLocked(a)
		if len(a.held) >= a.maxUIDs() {
			return nil, errTooManyUIDs
		}
	}
	if way == nil {
		way = &route{uid: uid}
		r.routes[uid] = way
	}
	if a.held == nil {
		a.held = map[*route]bool{}
	}
	a.held[way] = false
	way.holders = append(without(way.holders, a), a)
	way.current.Store(a)
	way.told.Store(nil) // to the server's side of things this is a new connection
	return way, nil
}

// dropLocked ends a's hold of way; the connection that held it before is current again.
func (r *router) dropLocked(a *agentConn, way *route) {
	if _, held := a.held[way]; !held {
		return
	}
	delete(a.held, way)
	way.holders = without(way.holders, a)
	if len(way.holders) == 0 {
		delete(r.routes, way.uid)
		way.current.Store(nil)
		return
	}
	way.current.Store(way.holders[len(way.holders)-1])
}

// depart notes that the agent behind way has said goodbye itself on a. Its route stays for the
// server's answer.
func (r *router) depart(a *agentConn, way *route) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if _, held := a.held[way]; held {
		a.held[way] = true
	}
}

// forgetDepartedLocked makes room: behind a gateway, agents come and go on one connection.
func (r *router) forgetDepartedLocked(a *agentConn) {
	for way, departed := range a.held {
		if departed {
			r.dropLocked(a, way)
		}
	}
}

// uids returns the UIDs whose frames go to a.
func (r *router) uids(a *agentConn) []wire.UID {
	r.mu.RLock()
	defer r.mu.RUnlock()
	uids := make([]wire.UID, 0, len(a.held))
	for way := range a.held {
		if way.current.Load() == a {
			uids = append(uids, way.uid)
		}
	}
	return uids
}

// release ends all that a holds, at a cost of just that. It returns the UIDs that nobody
// holds any more and whose agents have not said goodbye.
func (r *router) release(a *agentConn) (gone []wire.UID) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for way, departed := range a.held {
		r.dropLocked(a, way)
		if !departed && len(way.holders) == 0 && way.replace == nil {
			gone = append(gone, way.uid)
		}
	}
	return gone
}

// has reports whether some connection holds uid.
func (r *router) has(uid wire.UID) bool {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return r.routes[uid] != nil
}

// without returns holders without a, which is nearly always not there or the only one.
func without(holders []*agentConn, a *agentConn) []*agentConn {
	kept := holders[:0]
	for _, holder := range holders {
		if holder != a {
			kept = append(kept, holder)
		}
	}
	clear(holders[len(kept):])
	return kept
}
