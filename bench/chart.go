package main

import (
	"fmt"
	"html"
	"math"
	"strings"
)

// chart is groups of bars, as SVG that a browser shows on light and dark pages alike.
type chart struct {
	scenario, file     string
	title, unit, notes string
	groups             []chartGroup
}

type chartGroup struct {
	name  string
	bars  []chartBar
	goals []*goal
	lines []float64 // where the goals are
}

type chartBar struct {
	subject string
	color   int // of the subject, the same in all charts
	value   spread
}

var chartColors = []string{"#1f77b4", "#ff7f0e", "#7f7f7f", "#2ca02c"}

// Measures of a chart, in pixels. Bars lie, so that names have room.
const (
	chartWidth  = 800
	chartLeft   = 80  // names of subjects
	chartRight  = 180 // figures
	chartTop    = 58
	chartBottom = 40 // the axis
	barHeight   = 20
	groupHead   = 20 // name and goals of a group
	groupMargin = 10
	figureWidth = 150
)

// svg draws the bars, each with a whisker from the least to the largest value, and dashed lines
// where the gateway's bar ought to end.
func (c *chart) svg() string {
	scale, height := 0.0, chartTop+chartBottom
	for _, g := range c.groups {
		height += groupHead + len(g.bars)*barHeight + groupMargin
		for _, v := range append(g.lines, 0) {
			scale = max(scale, v)
		}
		for _, bar := range g.bars {
			if !math.IsInf(bar.value.high, 0) {
				scale = max(scale, bar.value.high)
			}
		}
	}
	x := func(v float64) float64 {
		return chartLeft + min(max(v, 0)/max(scale, 1e-9), 1)*(chartWidth-chartLeft-chartRight)
	}
	var b strings.Builder
	draw := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }
	text := html.EscapeString
	draw(`<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" viewBox="0 0 %[1]d %[2]d" role="img" font-family="sans-serif" font-size="12" fill="#222">`,
		chartWidth, height)
	draw(`<title>%s</title>`, text(c.title))
	draw(`<rect width="100%%" height="100%%" fill="#fff"/>`)
	draw(`<text x="10" y="20" font-size="14" font-weight="bold">%s</text>`, text(c.title))
	draw(`<text x="10" y="38" fill="#555">%s</text>`, text(c.notes))
	bottom := height - chartBottom
	all := ticks(scale)
	for i, tick := range all {
		label := plain(tick)
		if i == len(all)-1 {
			label += " " + c.unit
		}
		draw(`<path d="M%.1f %dV%d" stroke="#ddd"/>`, x(tick), chartTop-6, bottom)
		draw(`<text x="%.1f" y="%d" text-anchor="middle" fill="#555">%s</text>`, x(tick), bottom+15, text(label))
	}
	y := chartTop
	for _, g := range c.groups {
		draw(`<text x="10" y="%d"><tspan font-weight="bold">%s</tspan>%s</text>`, y+13, text(g.name), text(g.goalText()))
		y += groupHead
		for _, bar := range g.bars {
			v := bar.value
			middle := float64(y) + barHeight/2
			opacity := 1.0
			if math.IsInf(v.median, 0) {
				opacity = 0.3 // there is no figure
			}
			draw(`<text x="%d" y="%.1f" text-anchor="end">%s</text>`, chartLeft-8, middle+4, text(bar.subject))
			draw(`<rect x="%d" y="%d" width="%.1f" height="%d" fill="%s" fill-opacity="%.1f"/>`,
				chartLeft, y+2, x(v.median)-chartLeft, barHeight-4, chartColors[bar.color%len(chartColors)], opacity)
			if v.low < v.high {
				draw(`<path d="M%.1f %.1fv6m0 -3H%.1fm0 -3v6" stroke="#000" fill="none"/>`, x(v.low), middle-3, x(v.high))
			}
			end := x(v.high)
			if bar.subject == nameGateway {
				for _, line := range g.lines {
					draw(`<path d="M%.1f %dv%d" stroke="#fff" stroke-width="5"/>`, x(line), y+2, barHeight-4)
					draw(`<path d="M%.1f %dv%d" stroke="#d62728" stroke-width="2" stroke-dasharray="5 2"/>`, x(line), y-1, barHeight+2)
					if x(line) < end+figureWidth { // it would run through the figure
						end = max(end, x(line))
					}
				}
			}
			draw(`<text x="%.1f" y="%.1f">%s</text>`, end+8, middle+4, text(v.String()))
			y += barHeight
		}
		y += groupMargin
	}
	draw(`</svg>`)
	return b.String()
}

// goalText says what the dashed lines of a group are.
func (g *chartGroup) goalText() string {
	if len(g.goals) == 0 {
		return ""
	}
	var all []string
	for _, goal := range g.goals {
		all = append(all, goal.String())
	}
	return " – dashed: goal for the gateway, " + strings.Join(all, ", and ")
}

// ticks are round numbers from 0 to scale, a handful.
func ticks(scale float64) (all []float64) {
	if scale <= 0 {
		return nil
	}
	step := math.Pow(10, math.Floor(math.Log10(scale)))
	for _, part := range []float64{0.2, 0.5, 1} {
		if scale/(step*part) <= 6 {
			step *= part
			break
		}
	}
	for i := 0; float64(i)*step <= scale; i++ {
		all = append(all, float64(i)*step)
	}
	return all
}
