package main

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"text/tabwriter"
)

// report shows all results: on the terminal, and as Markdown and charts in a directory.
func (b *bench) report(dir string) error {
	b.write(os.Stdout, terminal{})
	var markdownText strings.Builder
	b.write(&markdownText, markdown{})
	if err := os.WriteFile(filepath.Join(dir, "results.md"), []byte(markdownText.String()), 0o644); err != nil {
		return err
	}
	for name, svg := range b.charts() {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(svg), 0o644); err != nil {
			return err
		}
	}
	fmt.Printf("\nThe same as Markdown and as charts: %s\n", dir)
	return nil
}

func (b *bench) write(w io.Writer, as style) {
	as.heading(w, "The bench")
	for _, line := range machine() {
		as.line(w, line)
	}
	as.line(w, fmt.Sprintf("Noise: the same work took %s ms of the machine, between all measurements.", spreadOf(b.results.loops)))
	as.line(w, "Figures are the median of all repetitions, with the least and the largest.")
	if b.quick {
		as.line(w, "This was a quick run, with fewer agents and short windows: it shows that all works, its figures mean little.")
	}
	for _, s := range b.scenarios {
		b.writeScenario(w, as, s)
	}
	b.writeGoals(w, as)
	if len(b.results.failures) > 0 {
		as.heading(w, "Failed")
		for _, failure := range b.results.failures {
			as.line(w, failure)
		}
	}
}

func (b *bench) writeScenario(w io.Writer, as style, s *scenario) {
	head := []string{"", ""}
	for _, subject := range b.subjects {
		head = append(head, subject.name)
	}
	rows := [][]string{head}
	for _, f := range b.results.figures {
		if f.scenario != s.name {
			continue
		}
		row := []string{f.name, f.unit}
		for _, subject := range b.subjects {
			row = append(row, spreadOf(f.values[subject.name]).String())
		}
		rows = append(rows, row)
	}
	if len(rows) > 1 {
		as.heading(w, s.name+": "+s.about)
		as.table(w, rows)
	}
}

func (b *bench) writeGoals(w io.Writer, as style) {
	rows := [][]string{{"figure", "measured", "goal", "stretch", ""}}
	for _, g := range goals {
		measured := spreadOf(g.values(b.results))
		verdict := g.verdict(measured)
		if verdict == "not measured" {
			continue
		}
		stretch := ""
		if g.stretch > 0 {
			stretch = "≤ " + strings.TrimSpace(number(g.stretch)+" "+g.unit)
		}
		rows = append(rows, []string{g.text, measured.String(), "≤ " + strings.TrimSpace(number(g.goal)+" "+g.unit), stretch, verdict})
	}
	if len(rows) > 1 {
		as.heading(w, "Goals for the gateway, repetition by repetition")
		as.table(w, rows)
	}
}

// style is how a report is written down.
type style interface {
	heading(w io.Writer, text string)
	line(w io.Writer, text string)
	table(w io.Writer, rows [][]string)
}

type terminal struct{}

func (terminal) heading(w io.Writer, text string) { fmt.Fprintf(w, "\n%s\n", text) }
func (terminal) line(w io.Writer, text string)    { fmt.Fprintf(w, "  %s\n", text) }

func (terminal) table(w io.Writer, rows [][]string) {
	columns := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for _, row := range rows {
		fmt.Fprintf(columns, "  %s\n", strings.Join(row, "\t"))
	}
	_ = columns.Flush() // to a terminal or to memory
}

type markdown struct{}

func (markdown) heading(w io.Writer, text string) { fmt.Fprintf(w, "\n## %s\n\n", text) }
func (markdown) line(w io.Writer, text string)    { fmt.Fprintf(w, "- %s\n", text) }

func (markdown) table(w io.Writer, rows [][]string) {
	for i, row := range rows {
		fmt.Fprintf(w, "| %s |\n", strings.Join(row, " | "))
		if i == 0 {
			fmt.Fprintf(w, "|%s\n", strings.Repeat("---|", len(row)))
		}
	}
}

// charts returns one for each scenario and unit, by the name of its file.
func (b *bench) charts() map[string]string {
	charts := map[string]*chart{}
	for _, f := range b.results.figures {
		s := b.scenarios[slices.IndexFunc(b.scenarios, func(s *scenario) bool { return s.name == f.scenario })]
		file := chartFile(f)
		c := charts[file]
		if c == nil {
			c = &chart{title: s.name + ": " + s.about, unit: f.unit}
			charts[file] = c
		}
		group := chartGroup{name: f.name}
		for i, subject := range b.subjects {
			if values := f.values[subject.name]; len(values) > 0 {
				group.bars = append(group.bars, chartBar{subject.name, i, spreadOf(values)})
			}
		}
		c.groups = append(c.groups, group)
	}
	files := map[string]string{}
	for file, c := range charts {
		files[file] = c.svg()
	}
	return files
}

// chartFile puts figures into one chart that can share an axis.
func chartFile(f *figure) string {
	kind := strings.NewReplacer("µs", "cpu", "1/s", "rate", "%", "share", "MiB", "base").Replace(f.unit)
	if strings.Contains(f.name, "latency") || strings.Contains(f.name, "p99") {
		kind = "latency"
	}
	return strings.ToLower(f.scenario + "-" + kind + ".svg")
}
