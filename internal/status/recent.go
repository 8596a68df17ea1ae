package status

import (
	"sync"

	"github.com/opampgateway/opampgateway/internal/monotonic"
)

const (
	// maxEnded is how many connections are shown that have ended, and maxOffenders how many offenders: the last.
	maxEnded, maxOffenders = 200, 100
)

// Recent is what has ended lately.
type Recent struct {
	// mu guards what follows.
	mu    sync.Mutex
	ended []Ended // a ring once it is full
	next  int
}

// Add keeps one more, in place of the oldest if need be.
func (r *Recent) Add(e Ended) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.ended) < maxEnded {
		r.ended = append(r.ended, e)
		return
	}
	r.ended[r.next] = e
	r.next = (r.next + 1) % maxEnded
}

// All returns them, the latest first.
func (r *Recent) All() []Ended {
	r.mu.Lock()
	defer r.mu.Unlock()
	all := make([]Ended, 0, len(r.ended))
	for i := range r.ended {
		all = append(all, r.ended[(r.next+len(r.ended)-1-i)%len(r.ended)])
	}
	return all
}

// Offenders are those that were named lately.
type Offenders struct {
	// mu guards what follows.
	mu    sync.Mutex
	known []Offender // the one that offended last comes last
}

// Add notes an offence. Whoever offends again in the same way is kept once.
func (o *Offenders) Add(latest Offender) {
	latest.last = monotonic.Now()
	latest.first, latest.Times = latest.last, 1
	o.mu.Lock()
	defer o.mu.Unlock()
	for i := range o.known {
		if k := &o.known[i]; k.Kind == latest.Kind && k.UID == latest.UID {
			latest.first, latest.Times = k.first, k.Times+1
			o.known = append(o.known[:i], o.known[i+1:]...)
			break
		}
	}
	if len(o.known) >= maxOffenders {
		o.known = append(o.known[:0], o.known[1:]...)
	}
	o.known = append(o.known, latest)
}

// All returns them, the latest first.
func (o *Offenders) All(c Clock) []Offender {
	o.mu.Lock()
	defer o.mu.Unlock()
	all := make([]Offender, 0, len(o.known))
	for i := range o.known {
		k := o.known[len(o.known)-1-i]
		k.First, k.Last = c.Time(k.first), c.Time(k.last)
		all = append(all, k)
	}
	return all
}
