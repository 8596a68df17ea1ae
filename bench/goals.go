package main

import "math"

// goal is what we want a figure of the gateway to be, mostly in relation to a peer's in the same
// repetition.
type goal struct {
	text          string
	goal, stretch float64 // at most; 0: there is no stretch goal
	unit          string  // empty for a ratio
	values        func(r *results) []float64
}

const (
	perRoundTrip = "CPU per round trip"
	perAgentOf   = "per agent, of 10000"
)

var goals = []goal{
	{"CPU per round trip, saturated, to the naive relay", 0.55, 0.45, "", toPeer("saturated", perRoundTrip, nameNaive)},
	{"CPU per round trip, saturated, to HAProxy", 0.65, 0.5, "", toPeer("saturated", perRoundTrip, nameHAProxy)},
	{"CPU, paced 10,000/s, to HAProxy", 1.6, 1.0, "", toPeer("paced-10k", perRoundTrip, nameHAProxy)},
	{"CPU per 64 KiB message, to the naive relay", 0.35, 0.25, "", toPeer("large", perRoundTrip, nameNaive)},
	{"resident memory per idle agent, plain, of 10,000", 8, 5, "KiB", own("memory", perAgentOf)},
	{"resident memory per idle agent, TLS, of 10,000", 17, 14, "KiB", own("memory-tls", perAgentOf)},
	{"CPU per disconnect, 15,000 agents to 2,000", 1.15, 0, "", ofSelf("disconnect", "CPU per disconnect of 15000", "CPU per disconnect of 2000")},
	{"CPU to let an agent in, to the naive relay", 0.9, 0, "", toPeer("storm", "CPU per agent let in", nameNaive)},
	{"added latency at 1,000/s, p50, to HAProxy's", 1.0, 0, "", added("latency p50")},
	{"added latency at 1,000/s, p99, to HAProxy's", 1.0, 0, "", added("latency p99")},
	{"p99 of healthy agents, one stalled to none", 1.5, 0, "", ofSelf("stalled", "p99 of the others, meanwhile", "p99 of the others, before")},
}

// of returns the values of a figure, or none.
func (r *results) of(scenario, name, subject string) []float64 {
	if f := r.find(scenario, name); f != nil {
		return f.values[subject]
	}
	return nil
}

func own(scenario, name string) func(*results) []float64 {
	return func(r *results) []float64 { return r.of(scenario, name, nameGateway) }
}

func toPeer(scenario, name, peer string) func(*results) []float64 {
	return func(r *results) []float64 {
		return ratios(r.of(scenario, name, nameGateway), r.of(scenario, name, peer))
	}
}

func ofSelf(scenario, name, base string) func(*results) []float64 {
	return func(r *results) []float64 {
		return ratios(r.of(scenario, name, nameGateway), r.of(scenario, base, nameGateway))
	}
}

// added compares what gateway and HAProxy add to the latency without either.
func added(name string) func(*results) []float64 {
	return func(r *results) []float64 {
		direct := r.of("paced-1k", name, nameDirect)
		return ratios(differences(r.of("paced-1k", name, nameGateway), direct), differences(r.of("paced-1k", name, nameHAProxy), direct))
	}
}

// ratios compares repetition by repetition.
func ratios(a, b []float64) (c []float64) {
	for i := range min(len(a), len(b)) {
		c = append(c, a[i]/b[i])
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
	case math.IsNaN(s.median):
		return "not measured"
	case g.stretch > 0 && s.median <= g.stretch:
		return "stretch reached"
	case s.median <= g.goal:
		return "reached"
	default:
		return "NOT reached"
	}
}
