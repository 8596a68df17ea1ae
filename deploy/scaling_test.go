package deploy

import (
	"fmt"
	"math"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// The table of docs/scaling.md follows from the figures of docs/sizing.md, and the defaults of docs/configuration.md.
func TestScalingTable(t *testing.T) {
	sizing := readFile(t, "../docs/sizing.md") + readFile(t, "../docs/configuration.md")
	figure := func(pattern string) float64 {
		t.Helper()
		found := regexp.MustCompile(pattern).FindStringSubmatch(sizing)
		require.NotNil(t, found, "the figure: %s", pattern)
		return number(t, found[1])
	}
	const mib, gib = 1 << 20, 1 << 30
	perGiB := figure(`\| agents per GiB to plan with \| [0-9,]+ \| ([0-9,]+) \|`)
	alone := figure(`Add ([0-9]+) MiB for the collector`) * mib
	grows := figure(`Go makes up to ([0-9.]+) times .max_buffered_size.`)
	buffered := figure("`max_buffered_size` \\| `([0-9]+)`")
	links := figure("`server.connections` \\| `([0-9]+)`")
	letIn := figure(`\| CPU to let an agent in \| ([0-9]+) µs`)

	rows := regexp.MustCompile(`(?m)^\| [0-9,]+ \| [0-9]+ \|.*$`).FindAllString(readFile(t, "../docs/scaling.md"), -1)
	require.Len(t, rows, 4)
	for _, row := range rows {
		cells := strings.Split(strings.Trim(row, "| "), " | ")
		agents, gateways := number(t, cells[0]), number(t, cells[1])
		atOne := math.Ceil(agents / (gateways - 1))
		require.Equal(t, []string{
			cells[0], cells[1],
			grouped(atOne), grouped(links * gateways),
			grouped(math.Round((atOne/perGiB*gib+alone+grows*buffered)/mib)) + " MiB",
			grouped(math.Floor(agents / 30)),
			fmt.Sprintf("%.1f s", agents*letIn/1e6), fmt.Sprintf("%.1f GiB", agents*64*1024/gib),
		}, cells, "%s agents at %s gateways", cells[0], cells[1])
	}
}

func number(t *testing.T, text string) float64 {
	t.Helper()
	n, err := strconv.ParseFloat(strings.ReplaceAll(text, ",", ""), 64)
	require.NoError(t, err)
	return n
}

// grouped writes a whole number below a billion as the documents do: 1,234,567.
func grouped(n float64) string {
	digits := strconv.Itoa(int(n))
	for i := len(digits) - 3; i > 0; i -= 3 {
		digits = digits[:i] + "," + digits[i:]
	}
	return digits
}
