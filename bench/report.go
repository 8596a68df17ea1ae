package main

import (
	"fmt"
	"io"
	"math"
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
	for _, c := range b.charts() {
		if err := os.WriteFile(filepath.Join(dir, c.file), []byte(c.svg()), 0o644); err != nil {
			return err
		}
	}
	fmt.Printf("\nThe same as Markdown and as charts: %s\n", dir)
	return nil
}

func (b *bench) write(w io.Writer, as style) {
	as.heading(w, "The bench")
	for _, line := range b.machine() {
		as.line(w, line)
	}
	as.line(w, "noise: the same work on all cores, between measurements, took "+b.results.noise(""))
	as.line(w, "figures: the median of all repetitions, with the least and the largest")
	if b.quick {
		as.line(w, "a quick run, with fewer agents and short windows: it shows that all works, its figures mean little")
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
		if noise := b.results.noise(s.name); noise != "" {
			as.note(w, "noise: "+noise)
		}
		for _, c := range b.charts() {
			if c.scenario == s.name {
				as.chart(w, c)
			}
		}
	}
}

func (b *bench) writeGoals(w io.Writer, as style) {
	rows := [][]string{{"figure", "measured", "goal", "stretch", ""}}
	for _, g := range b.goals() {
		measured := spreadOf(g.values(b.results))
		stretch := ""
		if g.stretch > 0 {
			stretch = "≤ " + plain(g.stretch)
		}
		rows = append(rows, []string{g.text, measured.String(), "≤ " + plain(g.goal), stretch, g.verdict(measured)})
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
	note(w io.Writer, text string) // below a table
	chart(w io.Writer, c *chart)
}

type terminal struct{}

func (terminal) heading(w io.Writer, text string) { fmt.Fprintf(w, "\n%s\n", text) }
func (terminal) line(w io.Writer, text string)    { fmt.Fprintf(w, "  %s\n", text) }
func (terminal) note(w io.Writer, text string)    { fmt.Fprintf(w, "  %s\n", text) }
func (terminal) chart(io.Writer, *chart)          {}

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
func (markdown) note(w io.Writer, text string)    { fmt.Fprintf(w, "\n%s\n", text) }
func (markdown) chart(w io.Writer, c *chart)      { fmt.Fprintf(w, "\n![%s](%s)\n", c.title, c.file) }

func (markdown) table(w io.Writer, rows [][]string) {
	for i, row := range rows {
		fmt.Fprintf(w, "| %s |\n", strings.Join(row, " | "))
		if i == 0 {
			fmt.Fprintf(w, "|%s\n", strings.Repeat("---|", len(row)))
		}
	}
}

// charts returns one for each scenario and kind of figure.
func (b *bench) charts() (charts []*chart) {
	for _, f := range b.results.figures {
		file := chartFile(f)
		at := slices.IndexFunc(charts, func(c *chart) bool { return c.file == file })
		if at < 0 {
			at = len(charts)
			charts = append(charts, b.newChart(f, file))
		}
		group := chartGroup{name: f.name}
		for i, subject := range b.subjects {
			if value := spreadOf(f.values[subject.name]); !math.IsNaN(value.median) {
				group.bars = append(group.bars, chartBar{subject.name, i, value})
			}
		}
		for _, g := range b.goals() {
			if g.scenario == f.scenario && g.figure == f.name {
				group.goals = append(group.goals, g)
				group.lines = append(group.lines, g.limit(b.results))
			}
		}
		charts[at].groups = append(charts[at].groups, group)
	}
	return charts
}

func (b *bench) newChart(f *figure, file string) *chart {
	s := b.scenarios[slices.IndexFunc(b.scenarios, func(s *scenario) bool { return s.name == f.scenario })]
	better := "less is better; "
	switch f.unit {
	case "1/s", "%", "agents":
		better = "more is better; "
	case "cores":
		better = ""
	}
	notes := better + "bar: median of all repetitions, line: least to largest"
	if noise := b.results.noise(s.name); noise != "" {
		notes += "; noise: " + noise
	}
	return &chart{scenario: s.name, file: file, title: s.name + ": " + s.about, unit: f.unit, notes: notes}
}

// chartFile puts figures into one chart that can share an axis.
func chartFile(f *figure) string {
	kind := strings.NewReplacer("µs", "cpu", "1/s", "rate", "%", "share", "MiB", "base").Replace(f.unit)
	switch {
	case strings.HasPrefix(f.name, "latency"):
		kind = strings.ReplaceAll(f.name, " ", "-")
	case strings.Contains(f.name, "p99"):
		kind = "latency-p99"
	}
	return strings.ToLower(f.scenario + "-" + kind + ".svg")
}
