package main

import (
	"bufio"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"
	"time"
)

// mustBeNone are the kinds of findings, in the order of the report.
var mustBeNone = []string{
	"lost", "duplicated", "reordered", "misdelivered", "corrupted", "leaked", "unreachable",
	"kept waiting", "poison", "wrongly told", "frame too large",
	"disconnected without reason", "link lost without reason", "full state missing", "refused", "gateway's end", "gateway's log",
	"data race", "soak",
}

// report prints what was injected and found; it returns false if something must not be. The
// verdict comes last: of a long log, its end is what people see first.
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
	fmt.Printf("%8d  ms that a message said beside a flood took at most\n", b.longestWait.Milliseconds())
	fmt.Printf("%8d  MiB that a gateway had at most at the end\n", s.memory)
	fmt.Printf("%8d  ms that the machine had no time for this process, at most\n", b.pulse.longest().Milliseconds())

	byKind := map[string][]finding{}
	for _, f := range b.findings {
		byKind[f.kind] = append(byKind[f.kind], f)
	}
	if len(b.findings) > 0 {
		s.histories(byKind)
	}
	fmt.Printf("\nfound in %s with seed %d, must be 0:\n", s.duration, s.seed)
	for _, kind := range mustBeNone {
		fmt.Printf("%8d  %s\n", len(byKind[kind]), kind)
	}
	const few = 4
	for _, kind := range mustBeNone {
		for i, f := range byKind[kind] {
			if i == few {
				fmt.Printf("%s: and %d more\n", kind, len(byKind[kind])-few)
				break
			}
			fmt.Printf("%s, at %s: %s\n", kind, b.since(f.at), f.text)
		}
	}
	return len(b.findings) == 0
}

// histories prints what happened near the first findings of each kind.
func (s *soak) histories(byKind map[string][]finding) {
	const few = 3
	for _, kind := range mustBeNone {
		for _, f := range byKind[kind][:min(few, len(byKind[kind]))] {
			s.history(os.Stdout, f)
		}
	}
}

// trace writes all that is known to a file: findings, what was injected, links, and what was lost
// and may be.
func (s *soak) trace(path string) error {
	file, err := os.Create(path)
	if err != nil {
		return err
	}
	defer file.Close()
	b := s.book
	b.mu.Lock()
	defer b.mu.Unlock()
	w := bufio.NewWriter(file)
	for _, f := range b.findings {
		s.history(w, f)
	}
	fmt.Fprintln(w, "\nall that was injected:")
	if s.faults != nil {
		for _, line := range s.faults.near(b.start, time.Now(), nil) {
			fmt.Fprintln(w, line)
		}
	}
	fmt.Fprintln(w, "\nall links:")
	for _, g := range s.gateways {
		for _, way := range g.ways {
			fmt.Fprintf(w, "%s %s: %s\n", b.since(way.opened), way, way.ended(b))
		}
	}
	fmt.Fprintln(w, "\nall that was lost on the way up, and may be:")
	for _, lost := range b.excused {
		said := &lost.epoch.ups[lost.index]
		fmt.Fprintf(w, "%d of %s, said at %s, lost %s", lost.index+1, lost.epoch, b.since(said.said), lost.excuse)
		for hop := range lost.epoch.hops() {
			if way := said.written[hop]; way != nil {
				fmt.Fprintf(w, "; written on %s at %s, which %s", way, b.since(said.writtenAt[hop]), way.ended(b))
			}
		}
		fmt.Fprintln(w)
	}
	fmt.Fprintf(w, "\nall that took more than %s on its way up, or until something happened to its links:\n", keptWaiting)
	for _, a := range b.actors {
		for _, e := range a.epochs {
			for i := range e.ups {
				if waited, way := b.tookLocked(e, i); waited > keptWaiting {
					fmt.Fprintf(w, "%d of %s, said at %s, on %s: %s\n", i+1, e, b.since(e.ups[i].said), way, waited.Round(time.Millisecond))
				}
			}
		}
	}
	return w.Flush()
}

// history prints a finding, with what happened near it.
func (s *soak) history(w io.Writer, f finding) {
	b := s.book
	fmt.Fprintf(w, "\n%s, at %s: %s\n", f.kind, b.since(f.at), f.text)
	if e := f.epoch; e != nil {
		fmt.Fprintf(w, "    %s: let in at %s", e, b.since(e.opened))
		if !e.touched.IsZero() {
			fmt.Fprintf(w, ", hit at %s by %s", b.since(e.touched), e.hurt)
		}
		if !e.ended.IsZero() {
			fmt.Fprintf(w, ", ended at %s: %s", b.since(e.ended), e.end)
		}
		fmt.Fprintf(w, "; said %d\n", len(e.ups))
		for _, seg := range e.segments {
			fmt.Fprintf(w, "    the server was asked on %s at %s; heard there: %d to %d\n", seg.conn, b.since(seg.asked), seg.first, seg.last)
		}
		for hop := range e.hops() {
			for _, asked := range e.askings[hop] {
				from, to := 0, 0
				for i := range e.ups {
					if e.ups[i].written[hop] == asked.way {
						if to = i + 1; from == 0 {
							from = to
						}
					}
				}
				fmt.Fprintf(w, "    asked on %s at %s, written there last: %d to %d; %s\n", asked.way, b.since(asked.at), from, to, asked.way.ended(b))
			}
		}
	}
	if s.faults != nil {
		fmt.Fprintln(w, "    "+strings.Join(s.faults.near(f.at.Add(-inFlight), f.at.Add(3*time.Second), f.epoch), "\n    "))
	}
}
