package main

import (
	"crypto/sha256"
	"fmt"
	"math"
	"slices"
	"time"
)

// results is what was measured so far.
type results struct {
	repetition int // counts from 0

	figures  []*figure
	failures []string
	loops    []float64 // what the same work took each time, in milliseconds
}

// figure is one thing that was measured, of each subject, once per repetition: not a number where
// that failed.
type figure struct {
	scenario, name, unit string
	values               map[string][]float64 // by subject
}

func (r *results) add(scenario, name, unit, subject string, value float64) {
	f := r.find(scenario, name)
	if f == nil {
		f = &figure{scenario, name, unit, map[string][]float64{}}
		r.figures = append(r.figures, f)
	}
	for len(f.values[subject]) < r.repetition {
		f.values[subject] = append(f.values[subject], math.NaN())
	}
	f.values[subject] = append(f.values[subject], value)
}

func (r *results) find(scenario, name string) *figure {
	i := slices.IndexFunc(r.figures, func(f *figure) bool { return f.scenario == scenario && f.name == name })
	if i < 0 {
		return nil
	}
	return r.figures[i]
}

func (r *results) fail(scenario, subject string, err error) {
	what := fmt.Sprintf("%s, %s: %v", scenario, subject, err)
	r.failures = append(r.failures, what)
	progress("FAILED: %s", what)
}

// calibrate measures the machine itself: the same work takes the same time where nobody else has
// any, and the clock of the CPU does not change.
func (r *results) calibrate() {
	block := make([]byte, 1<<20)
	start := time.Now()
	for range 64 {
		sum := sha256.Sum256(block)
		block[0] = sum[0]
	}
	r.loops = append(r.loops, float64(time.Since(start).Microseconds())/1e3)
}

// spread is several measurements of one thing.
type spread struct{ median, low, high float64 }

func spreadOf(values []float64) spread {
	values = slices.DeleteFunc(slices.Clone(values), math.IsNaN)
	if len(values) == 0 {
		return spread{math.NaN(), math.NaN(), math.NaN()}
	}
	sorted := slices.Sorted(slices.Values(values))
	middle := sorted[len(sorted)/2]
	if len(sorted)%2 == 0 {
		middle = (middle + sorted[len(sorted)/2-1]) / 2
	}
	return spread{middle, sorted[0], sorted[len(sorted)-1]}
}

func (s spread) String() string {
	switch {
	case math.IsNaN(s.median):
		return "–"
	case s.low == s.high:
		return number(s.median)
	}
	return fmt.Sprintf("%s (%s–%s)", number(s.median), number(s.low), number(s.high))
}

// number has three digits that count.
func number(v float64) string {
	switch a := math.Abs(v); {
	case math.IsInf(v, 0):
		return "stuck"
	case a >= 100:
		return fmt.Sprintf("%.0f", v)
	case a >= 10:
		return fmt.Sprintf("%.1f", v)
	default:
		return fmt.Sprintf("%.2f", v)
	}
}
