package main

import (
	"crypto/sha256"
	"fmt"
	"math"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// results is what was measured so far.
type results struct {
	repetition int // counts from 0

	figures  []*figure
	failures []string
	loops    []loop
}

// loop is a fixed piece of work that was done between measurements.
type loop struct {
	scenario string
	took     float64 // in milliseconds
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

// calibrate measures the machine itself, all of its cores: the same work takes the same time where
// nobody else has any, and the clock of the CPU does not change.
func (r *results) calibrate(scenario string) {
	start := time.Now()
	var cores sync.WaitGroup
	for range runtime.NumCPU() {
		cores.Go(func() {
			block := make([]byte, 1<<20)
			for range 64 {
				sum := sha256.Sum256(block)
				block[0] = sum[0]
			}
		})
	}
	cores.Wait()
	r.loops = append(r.loops, loop{scenario, float64(time.Since(start).Microseconds()) / 1e3})
}

// muchNoise is from where on the largest value is too far above the least.
const muchNoise = 1.5

// noise says what that work took during a scenario, or all of them if none is named; nothing, if
// nothing was measured.
func (r *results) noise(scenario string) string {
	var all []float64
	for _, l := range r.loops {
		if scenario == "" || l.scenario == scenario {
			all = append(all, l.took)
		}
	}
	switch s := spreadOf(all); {
	case len(all) == 0:
		return ""
	case s.high > muchNoise*s.low:
		return s.String() + " ms, which is much: others were using the machine"
	default:
		return s.String() + " ms"
	}
}

// of returns the values of a figure, or none.
func (r *results) of(scenario, name, subject string) []float64 {
	if f := r.find(scenario, name); f != nil {
		return f.values[subject]
	}
	return nil
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
		digit := math.Pow(10, math.Floor(math.Log10(a))-2)
		return plain(math.Round(v/digit) * digit)
	case a >= 10:
		return fmt.Sprintf("%.1f", v)
	default:
		return fmt.Sprintf("%.2f", v)
	}
}

// plain has all digits that there are, up to the millionth; before the point in groups of three.
func plain(v float64) string {
	digits := strconv.FormatFloat(math.Round(v*1e6)/1e6, 'f', -1, 64)
	if v < 1000 {
		return digits
	}
	whole, rest, _ := strings.Cut(digits, ".")
	for i := len(whole) - 3; i > 0; i -= 3 {
		whole = whole[:i] + "," + whole[i:]
	}
	return strings.TrimSuffix(whole+"."+rest, ".")
}
