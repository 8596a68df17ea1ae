package main

import (
	"fmt"
	"strings"
	"time"
	"unicode/utf8"
)

// A style is how a terminal shows a text.
type style string

const (
	plain  style = ""
	bold   style = "1"
	dim    style = "2"
	red    style = "31"
	green  style = "32"
	yellow style = "33"
)

func (s style) paint(text string) string {
	if s == plain || text == "" {
		return text
	}
	return "\x1b[" + string(s) + "m" + text + "\x1b[0m"
}

type cell struct {
	text  string
	style style
}

const columnGap = 2

// agentTable shows the agents one per line, as wide as they need; where width is set and
// this is too much, uids are shortened.
func agentTable(agents []agentView, now time.Time, width int, color bool) []string {
	rows := [][]cell{header("AGENT", "HEALTH", "INSTANCE UID", "LINK", "LAST SEEN", "REMOTE CONFIG")}
	for _, a := range agents {
		rows = append(rows, []cell{
			{a.name, bold},
			{a.health, healthStyle(a)},
			{formatUID(a.uid), plain},
			{dash(a.link), plain},
			{ago(now.Sub(a.lastSeen)), plain},
			{a.config, configStyle(a)},
		})
	}
	if width > 0 && tableWidth(rows) > width {
		for _, row := range rows[1:] {
			row[2].text = shortUID(row[2].text)
		}
	}
	return drawTable(rows, width, color)
}

func header(names ...string) []cell {
	var row []cell
	for _, name := range names {
		row = append(row, cell{name, dim})
	}
	return row
}

func healthStyle(a agentView) style {
	switch {
	case a.healthy:
		return green
	case a.connected:
		return yellow
	default:
		return red
	}
}

func configStyle(a agentView) style {
	switch {
	case a.acked:
		return green
	case a.accepts:
		return yellow
	default:
		return dim
	}
}

func columnWidths(rows [][]cell) []int {
	var widths []int
	for _, row := range rows {
		for i, c := range row {
			if i == len(widths) {
				widths = append(widths, 0)
			}
			widths[i] = max(widths[i], utf8.RuneCountInString(c.text))
		}
	}
	return widths
}

func tableWidth(rows [][]cell) int {
	total := 0
	for _, w := range columnWidths(rows) {
		total += w + columnGap
	}
	return total // the gap after the last column counts for the margin
}

// drawTable pads the columns, and cuts lines off that are wider than width, if it is set.
func drawTable(rows [][]cell, width int, color bool) []string {
	widths := columnWidths(rows)
	var lines []string
	for _, row := range rows {
		var b strings.Builder
		left := width
		for i, c := range row {
			gap, pad := columnGap, widths[i]-utf8.RuneCountInString(c.text)
			if i == len(row)-1 {
				pad = 0
			}
			text := c.text
			if width > 0 {
				gap = min(gap, left)
				text = clip(text, left-gap)
				left -= gap + utf8.RuneCountInString(text)
				pad = min(pad, left)
				left -= pad
			}
			if color {
				text = c.style.paint(text)
			}
			b.WriteString(strings.Repeat(" ", gap) + text + strings.Repeat(" ", pad))
		}
		lines = append(lines, strings.TrimRight(b.String(), " "))
	}
	return lines
}

// clip cuts text to width characters.
func clip(text string, width int) string {
	if utf8.RuneCountInString(text) <= width {
		return text
	}
	if width <= 0 {
		return ""
	}
	return string([]rune(text)[:width-1]) + "…"
}

func dash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

// ago is how long something is past, as coarse as people think of it.
func ago(d time.Duration) string {
	switch {
	case d < time.Second:
		return "now"
	case d < time.Minute:
		return fmt.Sprintf("%.0fs ago", d.Truncate(time.Second).Seconds())
	default:
		return fmt.Sprintf("%.0fm ago", d.Truncate(time.Minute).Minutes())
	}
}
