// Command bench measures the gateway next to other things that could stand in its place; see
// README.md.
package main

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

func main() {
	var b bench
	role := flag.String("role", "", "for the bench's own use: what this process shall be")
	flag.StringVar(&b.gateway, "gateway", "../build/otelcol-opampgateway", "the collector's program")
	out := flag.String("out", "../build/bench", "directory for results and logs")
	only := flag.String("only", "", "scenarios to run, separated by commas: "+strings.Join(names(scenarios, func(s *scenario) string { return s.name }), ", "))
	under := flag.String("subjects", "", "what to measure, separated by commas: "+strings.Join(names(subjects, func(s *subject) string { return s.name }), ", "))
	flag.BoolVar(&b.quick, "quick", false, "a short run that shows that all works, whatever -repeat, -window and -settle say")
	flag.IntVar(&b.repeat, "repeat", 5, "repetitions")
	flag.DurationVar(&b.window, "window", 4*time.Second, "how long each load is measured")
	flag.DurationVar(&b.settle, "settle", 15*time.Second, "how long agents are idle before memory is read")
	earlier := flag.String("before", "", "another build of the collector, to compare with as the subject \"before\"")
	target := flag.String("target", "", "size the gateway at this URL instead")
	listen := flag.String("server-listen", "127.0.0.1:4321", "with -target: where the bench's server listens, which that gateway has to use")
	agents := flag.Int("agents", 1000, "with -target: how many agents connect")
	pid := flag.Int("pid", 0, "with -target: the gateway's process, if it is on this machine")
	flag.Parse()

	if *role != "" {
		exit(playRole(*role))
	}
	if b.quick {
		b.repeat, b.window, b.settle = 1, 300*time.Millisecond, 300*time.Millisecond
	}
	var err error
	if b.gateway, err = filepath.Abs(b.gateway); err != nil {
		exit(err)
	}
	if b.work, err = filepath.Abs(filepath.Join(*out, "work")); err != nil {
		exit(err)
	}
	if err := os.MkdirAll(b.work, 0o755); err != nil {
		exit(err)
	}
	if err := b.writeCertificate(); err != nil {
		exit(err)
	}
	b.results = &results{}
	if *target != "" {
		exit(b.size(*out, sizing{*target, *listen, *agents, *pid}))
	}
	if *earlier != "" {
		program, err := filepath.Abs(*earlier)
		if err != nil {
			exit(err)
		}
		subjects = slices.Insert(subjects, 1, before(program))
	}
	if b.scenarios, err = choose(scenarios, *only, func(s *scenario) string { return s.name }); err != nil {
		exit(err)
	}
	if b.subjects, err = choose(subjects, *under, func(s *subject) string { return s.name }); err != nil {
		exit(err)
	}
	b.run()
	if err := b.report(*out); err != nil {
		exit(err)
	}
	if n := len(b.results.failures); n > 0 {
		exit(fmt.Errorf("%d measurements failed", n))
	}
}

func exit(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

func names[T any](all []T, name func(T) string) (list []string) {
	for _, one := range all {
		list = append(list, name(one))
	}
	return list
}

// choose returns those that are named in a list, in their own order; all, if none is.
func choose[T any](all []T, list string, name func(T) string) (chosen []T, err error) {
	if list == "" {
		return all, nil
	}
	for n := range strings.SplitSeq(list, ",") {
		if !slices.Contains(names(all, name), n) {
			return nil, fmt.Errorf("%q is none of %s", n, strings.Join(names(all, name), ", "))
		}
	}
	for _, one := range all {
		if slices.Contains(strings.Split(list, ","), name(one)) {
			chosen = append(chosen, one)
		}
	}
	return chosen, nil
}
