package main

import (
	"fmt"
	"html"
	"math"
	"strings"
)

// chart is groups of bars, as SVG that a browser shows on light and dark pages alike.
type chart struct {
	title, unit string
	groups      []chartGroup
}

type chartGroup struct {
	name string
	bars []chartBar
}

type chartBar struct {
	subject string
	color   int // of the subject, the same in all charts
	value   spread
}

var chartColors = []string{"#1f77b4", "#ff7f0e", "#7f7f7f", "#2ca02c"}

// Measures of a chart, in pixels. Bars lie, so that names have room.
const (
	chartWidth  = 760
	chartLeft   = 210 // names of groups
	chartRight  = 170 // figures
	chartTop    = 48
	barHeight   = 18
	groupMargin = 14
)

// svg draws the bars, each with a whisker from the least to the largest value.
func (c *chart) svg() string {
	scale, bars := 0.0, 0
	for _, g := range c.groups {
		for _, bar := range g.bars {
			bars++
			if !math.IsInf(bar.value.high, 0) {
				scale = max(scale, bar.value.high)
			}
		}
	}
	x := func(v float64) float64 {
		return chartLeft + min(max(v, 0)/max(scale, 1e-9), 1)*(chartWidth-chartLeft-chartRight)
	}
	var b strings.Builder
	height := chartTop + bars*barHeight + len(c.groups)*groupMargin + 8
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" viewBox="0 0 %d %d" font-family="sans-serif" font-size="12">`+"\n",
		chartWidth, height, chartWidth, height)
	fmt.Fprintf(&b, `<rect width="100%%" height="100%%" fill="#fff"/>`+"\n")
	fmt.Fprintf(&b, `<text x="10" y="20" font-size="14" font-weight="bold">%s</text>`+"\n", html.EscapeString(c.title))
	fmt.Fprintf(&b, `<text x="10" y="37" fill="#555">%s; bar: median, line: least to largest</text>`+"\n", html.EscapeString(c.unit))
	y := float64(chartTop)
	for _, g := range c.groups {
		fmt.Fprintf(&b, `<text x="10" y="%.0f">%s</text>`+"\n", y+13, html.EscapeString(g.name))
		for _, bar := range g.bars {
			v := bar.value
			middle := y + barHeight/2
			fmt.Fprintf(&b, `<rect x="%d" y="%.1f" width="%.1f" height="%d" fill="%s"/>`+"\n",
				chartLeft, y+1, x(v.median)-chartLeft, barHeight-3, chartColors[bar.color%len(chartColors)])
			fmt.Fprintf(&b, `<path d="M%.1f %.1fH%.1f" stroke="#000"/>`+"\n", x(v.low), middle-1, x(v.high))
			fmt.Fprintf(&b, `<text x="%.1f" y="%.1f">%s %s</text>`+"\n", x(v.high)+6, middle+3, bar.subject, number(v.median))
			y += barHeight
		}
		y += groupMargin
	}
	b.WriteString("</svg>\n")
	return b.String()
}
