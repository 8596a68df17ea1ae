package main

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"time"
)

// gatewayMetrics are a few of the gateway's metrics, in both directions.
type gatewayMetrics struct {
	links, agents           int
	messagesUp, bytesUp     float64
	messagesDown, bytesDown float64
}

const metricPrefix = "otelcol_opampgateway_"

// readMetrics asks the gateway collector, which serves its own metrics for Prometheus.
func readMetrics(ctx context.Context, addr string) (gatewayMetrics, error) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+addr+"/metrics", nil)
	if err != nil {
		return gatewayMetrics{}, err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return gatewayMetrics{}, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return gatewayMetrics{}, fmt.Errorf("metrics endpoint answers %s", resp.Status)
	}
	return parseMetrics(resp.Body)
}

// parseMetrics reads the Prometheus text format as far as needed: lines of a name, labels
// in braces, and a value.
func parseMetrics(r io.Reader) (gatewayMetrics, error) {
	var m gatewayMetrics
	lines := bufio.NewScanner(r)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		line, ok := strings.CutPrefix(lines.Text(), metricPrefix)
		if !ok {
			continue
		}
		name, rest, ok := strings.Cut(line, "{")
		brace := strings.LastIndexByte(rest, '}')
		if !ok || brace < 0 {
			continue
		}
		labels, value := rest[:brace], strings.Fields(rest[brace+1:])
		if len(value) == 0 {
			continue
		}
		n, err := strconv.ParseFloat(value[0], 64)
		if err != nil {
			return m, fmt.Errorf("metric %s: %w", name, err)
		}
		up := strings.Contains(labels, `direction="upstream"`)
		switch {
		case name == "connections" && up:
			m.links += int(n)
		case name == "connections":
			m.agents += int(n)
		case name == "messages" && up:
			m.messagesUp += n
		case name == "messages":
			m.messagesDown += n
		case name == "messages_bytes" && up:
			m.bytesUp += n
		case name == "messages_bytes":
			m.bytesDown += n
		}
	}
	return m, lines.Err()
}

func (m gatewayMetrics) String() string {
	return fmt.Sprintf("%s + %s, messages: %.0f up (%s), %.0f down (%s)",
		count(m.agents, "agent"), count(m.links, "link"), m.messagesUp, size(m.bytesUp), m.messagesDown, size(m.bytesDown))
}

func size(bytes float64) string {
	switch {
	case bytes < 1<<10:
		return fmt.Sprintf("%.0f B", bytes)
	case bytes < 1<<20:
		return fmt.Sprintf("%.1f KiB", bytes/(1<<10))
	default:
		return fmt.Sprintf("%.1f MiB", bytes/(1<<20))
	}
}
