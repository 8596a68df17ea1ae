package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/opampgateway/opampgateway/e2e/fault"
)

// linkInterval and linkTimeout are the keep-alive of links, and gracePeriod is how long agents
// may be without: short, so that a short run sees their ends.
const linkInterval, linkTimeout, gracePeriod = time.Second, 4 * time.Second, 20 * time.Second

// pollInterval is how far apart polls may be at least: an agent that misses three is gone. Its agents poll more often.
const pollInterval = 2 * time.Second

// gateway is one collector with the gateway extension, as a process.
type gateway struct {
	name    string
	program string
	address string // where agents connect
	metrics string
	up      *fault.Line // to the server, or to the gateway above
	agents  *fault.Line // from some of the agents
	polls   *fault.Line // from some of those over plain HTTP
	above   *gateway    // nil if that is the server
	dir     string      // of its configuration and log

	limited atomic.Bool // its lines are proxies that take no large WebSocket frames

	names map[string]string // at the end: what blames returns

	ways []*way // guarded by ledger.mu: its links, in the order in which they were opened

	// mu guards all below.
	mu          sync.Mutex
	connections int
	rollouts    int // how often a pipeline has changed
	listeners   int // how often the listener has
	cmd         *exec.Cmd
	started     time.Time
	ended       chan struct{} // closed when the process has ended
	disturbed   []disturbance // that the process went through
	hits        []time.Time   // when something happened on its way to the server
}

// disturbance is a reload of a gateway, or its end.
type disturbance struct {
	at     time.Time
	signal os.Signal
}

// writeConfig writes the configuration.
func (g *gateway) writeConfig() error {
	host, port, err := net.SplitHostPort(g.metrics)
	if err != nil {
		return err
	}
	number, err := strconv.Atoi(port)
	if err != nil {
		return err
	}
	type m = map[string]any
	text, err := json.MarshalIndent(m{
		"receivers": m{"otlp": m{"protocols": m{"grpc": m{"endpoint": "127.0.0.1:0"}}}},
		"exporters": m{"nop": nil, fmt.Sprintf("nop/%d", g.rollouts): nil},
		"extensions": m{"opampgateway": m{
			"server": m{
				"endpoint": "ws://" + g.up.Address() + "/v1/opamp", "agent_id": g.name, "connections": g.connections,
				"keep_alive":   m{"interval": linkInterval.String(), "timeout": linkTimeout.String()},
				"grace_period": gracePeriod.String(),
			},
			"listener": m{"endpoint": g.address, "write_timeout": (time.Minute + time.Duration(g.listeners)*time.Second).String()},
			"agents":   m{"keep_alive": m{"interval": "2s", "timeout": "10s"}, "allow_gateways": g.name == "upper", "poll_interval": pollInterval.String()},
		}},
		"service": m{
			"extensions": []string{"opampgateway"},
			"pipelines":  m{"logs": m{"receivers": []string{"otlp"}, "exporters": []string{"nop", fmt.Sprintf("nop/%d", g.rollouts)}}},
			"telemetry": m{"metrics": m{"readers": []m{{
				"pull": m{"exporter": m{"prometheus": m{"host": host, "port": number}}},
			}}}},
		},
	}, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(g.configPath(), text, 0o600)
}

func (g *gateway) configPath() string { return filepath.Join(g.dir, g.name+".yaml") }
func (g *gateway) logPath() string    { return filepath.Join(g.dir, g.name+".log") }

// start starts the process; it does not wait for anything. It is for the main goroutine.
func (g *gateway) start() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if err := g.writeConfig(); err != nil {
		return err
	}
	log, err := os.OpenFile(g.logPath(), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	cmd := exec.Command(g.program, "--config", g.configPath())
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = child()
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start gateway %s: %w", g.name, err)
	}
	ended := make(chan struct{})
	g.cmd, g.ended, g.started = cmd, ended, time.Now()
	go func() {
		_ = cmd.Wait() // the state tells
		close(ended)
	}()
	return nil
}

// signal sends the process a signal and notes when.
func (g *gateway) signal(sig os.Signal) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.disturbed = append(g.disturbed, disturbance{time.Now(), sig})
	_ = g.cmd.Process.Signal(sig) // its end is seen where it matters
}

// isNew reports whether the process may not yet know what to do with a signal, which then ends it.
func (g *gateway) isNew() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return time.Since(g.started) < 3*time.Second
}

// reload has the collector take up a configuration in which something has changed. Only some disturbs anybody.
func (g *gateway) reload(change func(*gateway), disturbs bool) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	change(g)
	if err := g.writeConfig(); err != nil {
		return err
	}
	if disturbs {
		g.disturbed = append(g.disturbed, disturbance{time.Now(), syscall.SIGHUP})
	}
	_ = g.cmd.Process.Signal(syscall.SIGHUP) // its end is seen where it matters
	return nil
}

// wait waits for the end of the process.
func (g *gateway) wait(within time.Duration) (code int, err error) {
	g.mu.Lock()
	cmd, ended := g.cmd, g.ended
	g.mu.Unlock()
	select {
	case <-ended:
		return cmd.ProcessState.ExitCode(), nil
	case <-time.After(within):
		return 0, fmt.Errorf("gateway %s has not ended within %s", g.name, within)
	}
}

// wasDisturbed returns what the process went through last in a time that ends at at; nil if that
// is nothing.
func (g *gateway) wasDisturbed(at time.Time, within time.Duration) (last *disturbance) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, d := range g.disturbed {
		if at.After(d.at) && at.Before(d.at.Add(within)) {
			last = &d
		}
	}
	return last
}

// firstDisturbed returns what the process went through first in a time that starts at at; nil if that is nothing.
func (g *gateway) firstDisturbed(at time.Time, within time.Duration) *disturbance {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, d := range g.disturbed {
		if d.at.After(at) && d.at.Before(at.Add(within)) {
			return &d
		}
	}
	return nil
}

// hit notes that something happens to the gateway's way to the server.
func (g *gateway) hit() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.hits = append(g.hits, time.Now())
}

// wasUpset reports whether something happened to the gateway, or to its way to the server, in this time.
func (g *gateway) wasUpset(from, to time.Time) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	in := func(at time.Time) bool { return at.After(from) && at.Before(to) }
	return slices.ContainsFunc(g.hits, in) || slices.ContainsFunc(g.disturbed, func(d disturbance) bool { return in(d.at) })
}

// wasKilled reports whether the process was killed just before at.
func (g *gateway) wasKilled(at time.Time) bool {
	d := g.wasDisturbed(at, endedWithin)
	return d != nil && d.signal == syscall.SIGKILL
}

// files counts the process's open files; -1 if nobody can tell.
func (g *gateway) files() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", g.cmd.Process.Pid))
	if err != nil {
		return -1
	}
	return len(entries)
}

// memory is the process's resident memory in MiB; -1 if nobody can tell.
func (g *gateway) memory() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", g.cmd.Process.Pid))
	fields := strings.Fields(string(text))
	if err != nil || len(fields) < 2 {
		return -1
	}
	pages, err := strconv.Atoi(fields[1])
	if err != nil {
		return -1
	}
	return pages * os.Getpagesize() >> 20
}

// count is what the gateway itself counts: its links, and its agents.
func (g *gateway) count() (links, agents int, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+g.metrics+"/metrics", http.NoBody)
	if err != nil {
		return 0, 0, err
	}
	r.Close = true // no connection of ours among its files
	resp, err := http.DefaultClient.Do(r)
	if err != nil {
		return 0, 0, err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		return 0, 0, err
	}
	found := 0
	for line := range strings.Lines(string(text)) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), " ")
		if !strings.HasPrefix(name, "otelcol_opampgateway_connections{") {
			continue
		}
		number, err := strconv.ParseFloat(value, 64)
		if err != nil {
			return 0, 0, err
		}
		found++
		if strings.Contains(name, `"upstream"`) {
			links = int(number)
		} else {
			agents = int(number)
		}
	}
	if found != 2 {
		return 0, 0, errors.New("the metrics of gateway " + g.name + " do not show its connections")
	}
	return links, agents, nil
}

// raceExit is how a program ends that was built with the race detector, and in which it found
// something.
const raceExit = 66

// complaints returns what a gateway must never write: lines of its log, and reports of the race
// detector, each as a whole.
func (g *gateway) complaints() (lines, races []string) {
	log, err := os.Open(g.logPath())
	if err != nil {
		return []string{err.Error()}, nil
	}
	defer log.Close()
	lines, races, err = complaints(log)
	if err != nil {
		lines = append(lines, "read the log: "+err.Error())
	}
	return lines, races
}

// blames returns which agents the log names for a link that the server ended, each with a line.
func (g *gateway) blames() map[string]string {
	log, err := os.Open(g.logPath())
	if err != nil {
		return nil
	}
	defer log.Close()
	return blames(log)
}

var blamed = regexp.MustCompile(`server ends the connection when it reads a message of this agent.*"agent": "([0-9a-f-]{36})"`)

func blames(log io.Reader) map[string]string {
	named := map[string]string{}
	scanner := bufio.NewScanner(log)
	scanner.Buffer(nil, 1<<20)
	for scanner.Scan() {
		if match := blamed.FindStringSubmatch(scanner.Text()); match != nil {
			named[match[1]] = scanner.Text()
		}
	}
	return named
}

func complaints(log io.Reader) (lines, races []string, err error) {
	const rule = "==================" // before and after a report of the race detector
	var race strings.Builder          // the report that is being read
	scanner := bufio.NewScanner(log)
	scanner.Buffer(nil, 1<<20)
	for scanner.Scan() {
		line := scanner.Text()
		switch {
		case race.Len() > 0 && line == rule:
			races = append(races, race.String())
			race.Reset()
		case race.Len() > 0 || strings.HasPrefix(line, "WARNING: DATA RACE"):
			race.WriteString(line + "\n")
		case slices.ContainsFunc([]string{"\terror\t", "\tfatal\t", "panic", "fatal error", "goroutine "},
			func(bad string) bool { return strings.Contains(line, bad) }):
			lines = append(lines, line)
		}
	}
	if race.Len() > 0 { // of a gateway that was killed meanwhile
		races = append(races, race.String())
	}
	return lines, races, scanner.Err()
}

// freeAddress returns a loopback address that nobody uses. Its port is above those that Linux
// gives to outgoing connections.
func freeAddress(intN func(int) int) (string, error) {
	for range 1000 {
		address := net.JoinHostPort("127.0.0.1", strconv.Itoa(61000+intN(4500)))
		l, err := net.Listen("tcp", address)
		if err == nil {
			l.Close()
			return address, nil
		}
	}
	return "", errors.New("no free port on 127.0.0.1")
}

// links is how many the gateway should have.
func (g *gateway) links() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.connections
}
