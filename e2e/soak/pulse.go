package main

import (
	"sync"
	"time"
)

// pulse knows when the machine was so busy that this process did not run, and so neither may have
// others: whoever says how soon something has to have happened adds that.
type pulse struct {
	mu   sync.Mutex
	gaps []gap
}

type gap struct {
	from time.Time
	d    time.Duration
}

const beat = 10 * time.Millisecond

func startPulse() *pulse {
	p := &pulse{}
	go p.run()
	return p
}

// run ends with the process.
func (p *pulse) run() {
	for last := time.Now(); ; {
		time.Sleep(beat)
		now := time.Now()
		if d := now.Sub(last) - beat; d > 2*beat {
			p.mu.Lock()
			p.gaps = append(p.gaps, gap{last, d})
			p.mu.Unlock()
		}
		last = now
	}
}

// missed returns the longest time that the process did not run between two times, several times
// that: others may have to wait for several of their turns.
func (p *pulse) missed(from, to time.Time) time.Duration {
	const turns = 5
	p.mu.Lock()
	defer p.mu.Unlock()
	longest := time.Duration(0)
	for _, g := range p.gaps {
		if g.from.Add(g.d).After(from) && g.from.Before(to) {
			longest = max(longest, g.d)
		}
	}
	return turns * longest
}

func (p *pulse) longest() time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	longest := time.Duration(0)
	for _, g := range p.gaps {
		longest = max(longest, g.d)
	}
	return longest
}
