package opampgateway

import (
	"errors"
	"slices"
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
	// mu guards the table, the holds of each route and of each connection, and whether they
	// are departed. For a frame it is taken only to read, and by an agent's not even that
	// while the connection speaks for one agent.
	mu     sync.RWMutex
	routes map[wire.UID]*route
}

// route is the way to one agent. Normally one connection holds it. Two do when an agent has
// reconnected before its old connection was found dead, or when an agent was cloned: the
// one that spoke last gets the replies, and when it leaves the one before gets them again.
// The older one is not closed, since two clones would then throw each other out for ever.
type route struct {
	uid     wire.UID
	current atomic.Pointer[hold] // the last of holds, to be read without the lock
	holds   []*hold              // in the order in which they spoke last; never empty while in the table
	shared  bool                 // two have held it at a time
}

// rival is whom a route was taken from that has not left.
type rival struct {
	agent *agentConn
	fresh bool // it is the first time that two hold the route
}

// hold is one connection's hold of one route: one agent, as long as it is connected there.
type hold struct {
	// Set once.
	agent  *agentConn
	route  *route
	format wire.Format // of the agent's frames

	// told is what the agent has heard of the server's custom capabilities.
	told atomic.Pointer[capabilities]

	// Guarded by router.mu.
	index    int   // of this in agent.held; ended when it is not there any more
	departed bool  // the agent has said goodbye here; the hold stays for the server's answer
	replaces *hold // ends when this one is used: the agent was given this UID in place of that
}

// ended is the index of a hold that has ended.
const ended = -1

func newRouter() *router { return &router{routes: map[wire.UID]*route{}} }

// find returns the hold by which frames reach uid; nil if there is none.
func (r *router) find(uid []byte) *hold {
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

// claim makes a the connection to which frames for uid go, because it has just spoken under
// that UID, in this format. It returns who else has it, if anybody.
func (r *router) claim(a *agentConn, uid wire.UID, format wire.Format) (h *hold, other *rival, err error) {
	// Behind a gateway, each frame is of another agent, but nothing changes.
	r.mu.RLock()
	if way := r.routes[uid]; way != nil {
		h = way.current.Load()
	}
	settled := h != nil && h.agent == a && !h.departed && h.replaces == nil
	r.mu.RUnlock()
	if settled {
		return h, nil, nil
	}

	r.mu.Lock()
	defer r.mu.Unlock()
	h, other, err = r.holdLocked(a, uid, format)
	if err != nil {
		return nil, nil, err
	}
	if old := h.replaces; old != nil {
		h.replaces = nil
		r.dropLocked(old)
	}
	return h, other, nil
}

// rename prepares for the agent of h to speak as uid from its next frame on: frames for uid
// reach it already, frames for its old UID still do.
func (r *router) rename(h *hold, uid wire.UID) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if h.index == ended || h.route.uid == uid {
		return nil
	}
	renamed, _, err := r.holdLocked(h.agent, uid, h.format)
	if err != nil {
		return err
	}
	renamed.replaces = h
	renamed.told.Store(h.told.Load()) // it is the same agent
	return nil
}

// holdLocked makes a the current holder of uid's route. Those who said goodbye elsewhere are
// there no more, so the only rival is one who did not.
func (r *router) holdLocked(a *agentConn, uid wire.UID, format wire.Format) (h *hold, last *rival, err error) {
	way := r.routes[uid]
	if way != nil {
		for _, other := range slices.Clone(way.holds) {
			switch {
			case other.agent == a:
				h = other
			case other.departed:
				r.dropLocked(other)
			default:
				last = &rival{agent: other.agent, fresh: !way.shared}
			}
		}
	}
	if h == nil {
		if len(a.held) >= a.maxUIDs() {
			r.forgetDepartedLocked(a)
		}
		if len(a.held) >= a.maxUIDs() {
			return nil, nil, errTooManyUIDs
		}
		if way = r.routes[uid]; way == nil { // it may have gone with those who said goodbye
			way = &route{uid: uid}
			r.routes[uid] = way
		}
		h = &hold{agent: a, route: way, format: format, index: len(a.held)}
		a.held = append(a.held, h)
	}
	h.departed = false // whoever speaks after a goodbye is back
	way.shared = way.shared || last != nil
	way.holds = append(without(way.holds, h), h)
	way.current.Store(h)
	return h, last, nil
}

// dropLocked ends h, unless it has ended; the connection that held the route before is
// current again.
func (r *router) dropLocked(h *hold) {
	if h.index == ended {
		return
	}
	a, way := h.agent, h.route
	last := a.held[len(a.held)-1] // takes the place of h
	a.held[h.index], last.index = last, h.index
	a.held[len(a.held)-1] = nil
	a.held, h.index = a.held[:len(a.held)-1], ended
	way.holds = without(way.holds, h)
	if len(way.holds) == 0 {
		delete(r.routes, way.uid)
		way.current.Store(nil)
		return
	}
	way.current.Store(way.holds[len(way.holds)-1])
}

// depart notes that the agent of h has said goodbye itself.
func (r *router) depart(h *hold) {
	r.mu.Lock()
	defer r.mu.Unlock()
	h.departed = true
}

// forgetDepartedLocked makes room: behind a gateway, agents come and go on one connection.
func (r *router) forgetDepartedLocked(a *agentConn) {
	for _, h := range slices.Backward(a.held) { // what takes the place of one dropped was looked at
		if h.departed {
			r.dropLocked(h)
		}
	}
}

// reached returns the holds by which frames go to a.
func (r *router) reached(a *agentConn) []*hold {
	r.mu.RLock()
	defer r.mu.RUnlock()
	holds := make([]*hold, 0, len(a.held))
	for _, h := range a.held {
		if h.route.current.Load() == h {
			holds = append(holds, h)
		}
	}
	return holds
}

// release ends all that a holds, at a cost of just that. It returns what was held of agents
// that nobody else holds and that have not said goodbye.
func (r *router) release(a *agentConn) (gone []*hold) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for len(a.held) > 0 {
		h := a.held[len(a.held)-1]
		r.dropLocked(h)
		if !h.departed && len(h.route.holds) == 0 && h.replaces == nil {
			gone = append(gone, h)
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

// without returns holds without h, which is nearly always not there or the only one.
func without(holds []*hold, h *hold) []*hold {
	return slices.DeleteFunc(holds, func(other *hold) bool { return other == h })
}
