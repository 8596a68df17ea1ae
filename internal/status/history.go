package status

import (
	"sync"
	"time"

	"github.com/opampgateway/opampgateway/internal/monotonic"
)

const (
	// SampleInterval is the time between two samples, and samples how many are kept: a quarter of an hour.
	SampleInterval = 5 * time.Second
	samples        = int(15*time.Minute/SampleInterval) + 1
)

// Totals are counted from the start on.
type Totals struct{ MessagesUp, BytesUp, MessagesDown, BytesDown, Faults int64 }

// Sample is what there was at one time.
type Sample struct {
	Totals

	Agents, Links int
	Memory        int64

	at int64 // of the monotonic clock
}

// Rates is what was there in the last quarter of an hour: one value for each interval, the oldest first. All have the
// same length.
type Rates struct {
	IntervalSeconds float64   `json:"interval_seconds"`
	Agents          []int     `json:"agents"`
	Links           []int     `json:"links"`
	Memory          []int64   `json:"memory_bytes"`
	MessagesUp      []float64 `json:"messages_up"` // in a second, as what follows
	BytesUp         []float64 `json:"bytes_up"`
	MessagesDown    []float64 `json:"messages_down"`
	BytesDown       []float64 `json:"bytes_down"`
	Faults          []float64 `json:"faults"`
}

// History keeps samples.
type History struct {
	// mu guards what follows.
	mu   sync.Mutex
	ring [samples]Sample
	n    int // taken so far
}

// Due reports whether it is time for a sample.
func (h *History) Due() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	// Sweeps come somewhat late, never early: without tolerance, every other would be missed.
	return h.n == 0 || monotonic.Since(h.ring[(h.n-1)%samples].at) >= SampleInterval-SampleInterval/10
}

// Take keeps a sample of now, in place of the oldest if need be.
func (h *History) Take(s Sample) {
	s.at = monotonic.Now()
	h.mu.Lock()
	defer h.mu.Unlock()
	h.ring[h.n%samples] = s
	h.n++
}

// Rates returns what the samples show.
func (h *History) Rates() Rates {
	h.mu.Lock()
	defer h.mu.Unlock()
	n := max(0, min(h.n, samples)-1)
	r := Rates{
		IntervalSeconds: SampleInterval.Seconds(), Agents: make([]int, n), Links: make([]int, n), Memory: make([]int64, n),
		MessagesUp: make([]float64, n), BytesUp: make([]float64, n), MessagesDown: make([]float64, n), BytesDown: make([]float64, n),
		Faults: make([]float64, n),
	}
	for i := range n {
		nth := h.n - n + i
		before, s := &h.ring[(nth-1)%samples], &h.ring[nth%samples]
		seconds := float64(s.at-before.at) / float64(time.Second)
		r.Agents[i], r.Links[i], r.Memory[i] = s.Agents, s.Links, s.Memory
		r.MessagesUp[i] = rate(before.MessagesUp, s.MessagesUp, seconds)
		r.BytesUp[i] = rate(before.BytesUp, s.BytesUp, seconds)
		r.MessagesDown[i] = rate(before.MessagesDown, s.MessagesDown, seconds)
		r.BytesDown[i] = rate(before.BytesDown, s.BytesDown, seconds)
		r.Faults[i] = rate(before.Faults, s.Faults, seconds)
	}
	return r
}

// rate is what was counted in a second, to a thousandth.
func rate(before, after int64, seconds float64) float64 {
	if seconds <= 0 {
		return 0
	}
	return float64(int64(float64(after-before)/seconds*1000+0.5)) / 1000
}

// Meter tells how much passes on one link. The zero value is that of a link that has just come up.
type Meter struct {
	// mu guards what follows.
	mu   sync.Mutex
	last Totals
	at   int64 // of the monotonic clock; 0 before the first
	rate Rate
}

// Take notes what was counted so far.
func (m *Meter) Take(t Totals) {
	now := monotonic.Now()
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.at != 0 {
		seconds := float64(now-m.at) / float64(time.Second)
		m.rate = Rate{
			MessagesUp: rate(m.last.MessagesUp, t.MessagesUp, seconds), BytesUp: rate(m.last.BytesUp, t.BytesUp, seconds),
			MessagesDown: rate(m.last.MessagesDown, t.MessagesDown, seconds), BytesDown: rate(m.last.BytesDown, t.BytesDown, seconds),
		}
	}
	m.last, m.at = t, now
}

// Rate returns what passes in a second.
func (m *Meter) Rate() Rate {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.rate
}
