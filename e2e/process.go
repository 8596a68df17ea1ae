package e2e

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// Process is a program that a test started. It ends with the test at the latest.
type Process struct {
	name string
	cmd  *exec.Cmd
	log  logBuffer
	done chan struct{} // closed when it has ended
	err  error         // of cmd.Wait; to be read after done
}

// startProcess runs a program. The end of its log is shown if the test fails.
func startProcess(t *testing.T, name, program string, args ...string) *Process {
	t.Helper()
	return startProcessIn(t, nil, name, program, args...)
}

// startProcessIn is startProcess with more in its environment.
func startProcessIn(t *testing.T, environment []string, name, program string, args ...string) *Process {
	t.Helper()
	p := &Process{name: name, cmd: exec.Command(program, args...), done: make(chan struct{})}
	p.cmd.Env = append(os.Environ(), environment...)
	p.cmd.Stdout, p.cmd.Stderr = &p.log, &p.log
	p.cmd.SysProcAttr = withParent()
	p.cmd.WaitDelay = time.Second // a grandchild may keep our end of the log open
	require.NoError(t, startOnLastingThread(p.cmd), "start %s", name)
	go p.wait()
	t.Cleanup(func() {
		p.end(t)
		if t.Failed() {
			t.Logf("the end of the log of %s:\n%s", name, p.log.tail(60))
		}
	})
	return p
}

// wait ends with the process.
func (p *Process) wait() {
	p.err = p.cmd.Wait()
	close(p.done)
}

// end is for the end of a test: politely first.
func (p *Process) end(t *testing.T) {
	t.Helper()
	for _, signal := range []os.Signal{syscall.SIGTERM, syscall.SIGKILL} {
		if p.ended() {
			return
		}
		_ = p.cmd.Process.Signal(signal) // it may have ended meanwhile
		select {
		case <-p.done:
			return
		case <-time.After(15 * time.Second):
			t.Errorf("%s did not end on %s", p.name, signal)
		}
	}
}

func (p *Process) ended() bool {
	select {
	case <-p.done:
		return true
	default:
		return false
	}
}

// Signal sends the process a signal.
func (p *Process) Signal(t *testing.T, signal os.Signal) {
	t.Helper()
	require.NoError(t, p.cmd.Process.Signal(signal), "signal %s", p.name)
}

// wantExit waits for the process to end by itself, and returns its exit code and the time it took.
func (p *Process) wantExit(t *testing.T) (code int, after time.Duration) {
	t.Helper()
	start := time.Now()
	select {
	case <-p.done:
	case <-time.After(ceiling):
		t.Fatalf("%s has not ended after %s", p.name, ceiling)
	}
	var exit *exec.ExitError
	if p.err != nil && !errors.As(p.err, &exit) && !errors.Is(p.err, exec.ErrWaitDelay) {
		t.Fatalf("wait for %s: %v", p.name, p.err)
	}
	return p.cmd.ProcessState.ExitCode(), time.Since(start)
}

// clientAt is how the log names whoever connected from an address.
func clientAt(address string) string {
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return fmt.Sprintf(`"client.address": %q`, address)
	}
	return fmt.Sprintf(`"client.address": %q, "client.port": %s`, host, port)
}

// wantLog waits for a line in the log that has all of these parts, and returns it.
func (p *Process) wantLog(t *testing.T, parts ...string) (line string) {
	t.Helper()
	eventually(t, func() string {
		if lines := p.log.with(parts...); len(lines) > 0 {
			line = lines[0]
			return ""
		}
		if p.ended() {
			return p.name + " has ended without a line in its log with " + strings.Join(parts, " … ")
		}
		return "no line in the log of " + p.name + " with " + strings.Join(parts, " … ")
	})
	return line
}

// usage is what a process has of the machine's.
type usage struct {
	memory, peak int // resident, in bytes: now, and at most so far
	files        int // open ones, sockets among them
}

func (u usage) String() string {
	return fmt.Sprintf("%d MiB, at most %d MiB, %d files", u.memory>>20, u.peak>>20, u.files)
}

// logBuffer is what a process has written so far.
type logBuffer struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (b *logBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.Write(p)
}

func (b *logBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.String()
}

func (b *logBuffer) lines() []string {
	return strings.Split(strings.TrimSuffix(b.String(), "\n"), "\n")
}

// with returns the lines that have all of these parts.
func (b *logBuffer) with(parts ...string) (lines []string) {
next:
	for _, line := range b.lines() {
		for _, part := range parts {
			if !strings.Contains(line, part) {
				continue next
			}
		}
		lines = append(lines, line)
	}
	return lines
}

func (b *logBuffer) tail(n int) string {
	lines := b.lines()
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}

// program finds something that make has built.
func program(t *testing.T, variable, built, target string) string {
	t.Helper()
	path := os.Getenv(variable)
	if path == "" {
		path = filepath.Join("..", "build", built)
	}
	path, err := filepath.Abs(path)
	require.NoError(t, err)
	if _, err := exec.LookPath(path); err != nil {
		t.Fatalf("cannot run %s: build it with \"make %s\", or name another in %s", path, target, variable)
	}
	return path
}
