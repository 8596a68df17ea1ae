package main

import (
	"fmt"
	"maps"
	"slices"
	"strings"
)

// mustBeNone are the kinds of findings, in the order of the report.
var mustBeNone = []string{
	"lost", "duplicated", "reordered", "misdelivered", "corrupted", "leaked", "unreachable",
	"disconnected without reason", "link lost without reason", "full state missing", "refused", "gateway's end", "gateway's log", "soak",
}

// report prints what was injected and found; it returns false if something must not be.
func (s *soak) report() bool {
	b := s.book
	b.mu.Lock()
	defer b.mu.Unlock()
	if s.faults != nil {
		s.faults.mu.Lock()
		fmt.Println("\ninjected:")
		for _, k := range s.faults.kinds() {
			fmt.Printf("%8d  %s\n", s.faults.count[k.name], k.name)
		}
		s.faults.mu.Unlock()
	}
	fmt.Println("\ncounted:")
	for _, what := range slices.Sorted(maps.Keys(b.counts)) {
		fmt.Printf("%8d  %s\n", b.counts[what], what)
	}
	heard := b.counts["heard by the server"] + b.counts["heard by agents"]
	fmt.Printf("%8.0f  messages relayed a second\n", float64(heard)/max(1, s.talked.Seconds()))
	fmt.Printf("%8d  MiB that a gateway had at most at the end\n", s.memory)

	fmt.Println("\nfound, must be 0:")
	byKind := map[string][]finding{}
	for _, f := range b.findings {
		byKind[f.kind] = append(byKind[f.kind], f)
	}
	for _, kind := range mustBeNone {
		fmt.Printf("%8d  %s\n", len(byKind[kind]), kind)
	}
	for _, kind := range mustBeNone {
		s.detail(kind, byKind[kind])
	}
	return len(b.findings) == 0
}

// detail prints the first findings of a kind, with what happened near them.
func (s *soak) detail(kind string, findings []finding) {
	const few = 8
	for i, f := range findings {
		if i == few {
			fmt.Printf("\n%s: and %d more\n", kind, len(findings)-few)
			return
		}
		fmt.Printf("\n%s, at %s: %s\n", kind, s.book.since(f.at), f.text)
		if f.epoch != nil {
			fmt.Printf("    %s: let in at %s", f.epoch, s.book.since(f.epoch.opened))
			if !f.epoch.touched.IsZero() {
				fmt.Printf(", hit at %s by %s", s.book.since(f.epoch.touched), f.epoch.hurt)
			}
			if !f.epoch.ended.IsZero() {
				fmt.Printf(", ended at %s: %s", s.book.since(f.epoch.ended), f.epoch.end)
			}
			fmt.Println()
			for _, seg := range f.epoch.segments {
				fmt.Printf("    asked about on %s at %s; heard there: %d to %d\n", seg.conn, s.book.since(seg.asked), seg.first, seg.last)
			}
		}
		if s.faults != nil {
			fmt.Println("    " + strings.Join(s.faults.near(f.at, f.epoch), "\n    "))
		}
	}
}
