package memory

import (
	"cmp"
	"slices"
	"time"
)

const (
	// LaggardsInterval is how often Laggards is to be called while the budget is Pressed.
	LaggardsInterval = 250 * time.Millisecond
	// idleLimit is for how long a reader that holds memory may receive nothing while others wait.
	idleLimit = 500 * time.Millisecond
	// ratePeriod is how long a reader's rate is measured while others wait, at least.
	ratePeriod = time.Second
)

// leastRates are what readers have to receive while others wait, in bytes a second, by class.
var leastRates = [classes]float64{small: 16 << 10, large: 200 << 10}

// turnTime is how long a turn may last while others wait: its reader has to receive as much as it
// takes for that, and no less than any other.
const turnTime = 20 * time.Second

// mark is what a reader that holds memory had received at some time while others waited.
type mark struct {
	since    time.Time // of the rate being measured
	start    uint64    // received then
	last     uint64    // received when something new was last seen
	progress time.Time // when that was
}

// laggard is a reader that makes no progress.
type laggard struct {
	reader *Reader
	held   int64
	idle   time.Duration // since something was received
	waits  bool          // for memory of the other class
}

// Pressed reports whether somebody waits for memory.
func (b *Budget) Pressed() bool {
	return b.classes[small].waiting.Load() > 0 || b.classes[large].waiting.Load() > 0
}

// Laggards returns those who hold memory, make no progress with it, and have to go for others who
// wait for it to go on: no more than that, those without progress for longest first. It is to be
// called every LaggardsInterval while Pressed, by one goroutine, and by nobody else.
//
// No progress is to receive nothing for half a second, or too little in a second, while others wait.
// A reader that itself waits, for memory or, with a whole message, for its link, is not at fault. But
// one that waits for large memory has to go when otherwise small messages, of which it holds the
// memory, would have to wait for large ones.
func (b *Budget) Laggards() []Holder {
	b.registry.Lock()
	defer b.registry.Unlock()
	now := time.Now()
	var named []Holder
	for kind := range b.classes {
		var found []laggard
		marks := map[*Reader]mark{}
		if b.classes[kind].waiting.Load() > 0 {
			found = b.judge(kind, now, marks)
		}
		b.marks[kind] = marks // without those that hold nothing any more
		if len(found) == 0 {
			continue
		}
		turn, missing := b.missing(kind)
		slices.SortFunc(found, func(x, y laggard) int {
			if x.waits != y.waits {
				if x.waits {
					return 1
				}
				return -1
			}
			return cmp.Compare(y.idle, x.idle)
		})
		for _, l := range found {
			switch {
			case kind == large && l.reader == turn: // its turn is what somebody waits for
			case missing <= 0:
				continue
			default:
				missing -= l.held
			}
			named = append(named, l.reader.holder)
		}
	}
	return named
}

// judge returns the readers that make no progress, and marks all that hold memory of a class.
func (b *Budget) judge(kind int, now time.Time, marks map[*Reader]mark) (found []laggard) {
	c := &b.classes[kind]
	for _, r := range b.readers {
		held := r.held[kind].Load()
		if held == 0 {
			continue
		}
		waits := r.waits.Load()
		if waits == c || waits == nil && r.holder.Paused() {
			continue // and begins anew afterwards
		}
		received := r.holder.Received()
		m, known := b.marks[kind][r]
		if !known {
			m = mark{since: now, start: received, last: received, progress: now}
		}
		if received != m.last {
			m.last, m.progress = received, now
		}
		idle := now.Sub(m.progress)
		slow := false
		if period := now.Sub(m.since); period >= ratePeriod {
			if slow = float64(received-m.start) < b.leastRate(kind, r)*period.Seconds(); !slow {
				m.since, m.start = now, received
			}
		}
		marks[r] = m
		if slow || idle >= idleLimit {
			found = append(found, laggard{r, held, idle, waits != nil})
		}
	}
	return found
}

// leastRate is what r has to receive, in bytes a second.
func (b *Budget) leastRate(kind int, r *Reader) float64 {
	if kind == large {
		b.mu.Lock()
		defer b.mu.Unlock()
		if b.turn == r {
			return max(leastRates[kind], float64(b.turnOf)/turnTime.Seconds())
		}
	}
	return leastRates[kind]
}

// missing returns whose turn it is, and how much is to be given by others before all can go on who
// wait for room.
func (b *Budget) missing(kind int) (turn *Reader, n int64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	c := &b.classes[kind]
	if kind == small {
		return nil, c.wanted + c.held.Load() - c.room
	}
	if c.wanted > 0 {
		n = c.wanted + b.withoutTurn() - c.room
	}
	if b.turn == nil { // nobody can even have one
		n = max(n, b.withoutTurn()-c.room-b.limit/8)
	}
	return b.turn, n
}
