package main

import (
	"fmt"
	"math"
)

// goal is what we want a figure of the gateway to be: mostly in relation to another figure of the
// same repetition.
type goal struct {
	text             string
	goal, stretch    float64 // at most; 0: there is no stretch goal
	scenario, figure string
	to               relation
	of               string // the other figure's subject, or its name
}

// relation is what a goal compares the gateway's figure with.
type relation int

const (
	absolute relation = iota // nothing
	toPeer                   // the same figure of another subject
	addedTo                  // the same, as what is added to the figure of direct
	toOwn                    // another figure of the gateway
)

const (
	perRoundTrip = "CPU per round trip"
	perAgentOf   = "per agent, of 10000"
)

var goals = []goal{
	{"CPU per round trip, saturated, to the naive relay", 0.55, 0.45, "saturated", perRoundTrip, toPeer, nameNaive},
	{"CPU per round trip, saturated, to HAProxy", 0.65, 0.5, "saturated", perRoundTrip, toPeer, nameHAProxy},
	{"CPU, paced 10,000/s, to HAProxy", 1.6, 1.0, "paced-10k", perRoundTrip, toPeer, nameHAProxy},
	{"CPU per 64 KiB message, to the naive relay", 0.35, 0.25, "large", perRoundTrip, toPeer, nameNaive},
	{"resident memory per idle agent, plain, of 10,000, KiB", 8, 5, "memory", perAgentOf, absolute, ""},
	{"resident memory per idle agent, TLS, of 10,000, KiB", 17, 14, "memory-tls", perAgentOf, absolute, ""},
	{"CPU per disconnect, 15,000 agents to 2,000", 1.15, 0, "disconnect", "CPU per disconnect of 15000", toOwn, "CPU per disconnect of 2000"},
	{"CPU to let an agent in, to the naive relay", 0.9, 0, "storm", "CPU per agent let in", toPeer, nameNaive},
	{"added latency at 1,000/s, p50, to HAProxy's", 1.0, 0, "paced-1k", "latency p50", addedTo, nameHAProxy},
	{"added latency at 1,000/s, p99, to HAProxy's", 1.0, 0, "paced-1k", "latency p99", addedTo, nameHAProxy},
	{"p99 of healthy agents, one stalled to none", 1.5, 0, "stalled", "p99 of the others, meanwhile", toOwn, "p99 of the others, before"},
}

// goals are those that the run can tell something about.
func (b *bench) goals() (all []*goal) {
	if b.quick {
		return nil
	}
	for i := range goals {
		if !math.IsNaN(spreadOf(goals[i].values(b.results)).median) {
			all = append(all, &goals[i])
		}
	}
	return all
}

// values are what the goal is about, repetition by repetition.
func (g *goal) values(r *results) []float64 {
	own := r.of(g.scenario, g.figure, nameGateway)
	switch g.to {
	case toPeer:
		return ratios(own, r.of(g.scenario, g.figure, g.of))
	case addedTo:
		direct := r.of(g.scenario, g.figure, nameDirect)
		return ratios(differences(own, direct), differences(r.of(g.scenario, g.figure, g.of), direct))
	case toOwn:
		return ratios(own, r.of(g.scenario, g.of, nameGateway))
	default:
		return own
	}
}

// limit is what the gateway's figure may be where the goal is just reached; not a number where that
// is unknown.
func (g *goal) limit(r *results) float64 {
	median := func(figure, subject string) float64 { return spreadOf(r.of(g.scenario, figure, subject)).median }
	switch g.to {
	case toPeer:
		return g.goal * median(g.figure, g.of)
	case addedTo:
		direct := median(g.figure, nameDirect)
		return direct + g.goal*(median(g.figure, g.of)-direct)
	case toOwn:
		return g.goal * median(g.of, nameGateway)
	default:
		return g.goal
	}
}

// String says the goal in the chart of its figure.
func (g *goal) String() string {
	switch g.to {
	case addedTo:
		return fmt.Sprintf("≤ %s × what %s adds to direct", plain(g.goal), g.of)
	case absolute:
		return "≤ " + plain(g.goal)
	default:
		return fmt.Sprintf("≤ %s × %s", plain(g.goal), g.of)
	}
}

// ratios compares repetition by repetition. Nothing can be said in relation to nothing, or less.
func ratios(a, b []float64) (c []float64) {
	for i := range min(len(a), len(b)) {
		ratio := math.NaN()
		if b[i] > 0 {
			ratio = a[i] / b[i]
		}
		c = append(c, ratio)
	}
	return c
}

func differences(a, b []float64) (c []float64) {
	for i := range min(len(a), len(b)) {
		c = append(c, a[i]-b[i])
	}
	return c
}

func (g *goal) verdict(s spread) string {
	switch {
	case g.stretch > 0 && s.median <= g.stretch:
		return "stretch reached"
	case s.median <= g.goal:
		return "reached"
	default:
		return "NOT reached"
	}
}
