package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"
)

// stopTimeout is generous: a gateway with many agents takes its time to tell them all.
const stopTimeout = 30 * time.Second

// A process is a collector that the demo started. It runs in a process group of its own,
// so that the terminal's Ctrl-C reaches only the demo, which stops things in order.
type process struct {
	name string
	log  string // file with its output, empty when it went to the terminal
	cmd  *exec.Cmd

	done chan struct{} // closed when the process has ended
	err  error         // how it ended, to be read after done
}

// startCollector runs the collector with a configuration and the secret key. Its output
// goes to the file log, or to out where log is empty.
func startCollector(name, binary, config, log, key string, out *os.File) (*process, error) {
	if log != "" {
		f, err := os.Create(log)
		if err != nil {
			return nil, err
		}
		defer f.Close() // the child has its own
		out = f
	}
	p := &process{name: name, log: log, cmd: exec.Command(binary, "--config", config), done: make(chan struct{})}
	p.cmd.Stdout, p.cmd.Stderr = out, out
	p.cmd.Env = append(os.Environ(), secretKeyEnv+"="+key)
	p.cmd.SysProcAttr = ownGroup()
	if err := p.cmd.Start(); err != nil {
		return nil, fmt.Errorf("starting %s: %w", name, err)
	}
	go p.wait()
	return p, nil
}

// wait ends with the process.
func (p *process) wait() {
	p.err = p.cmd.Wait()
	close(p.done)
}

func (p *process) pid() int { return p.cmd.Process.Pid }

func (p *process) ended() bool {
	select {
	case <-p.done:
		return true
	default:
		return false
	}
}

// stop asks the process to end and waits for it. Only when that takes too long, or when
// hurry ends, the process is killed. A process that was over already is no error.
func (p *process) stop(hurry context.Context) error {
	if p.ended() {
		return nil
	}
	// Signal fails where the system knows no SIGTERM (Windows); there is only Kill then.
	if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		_ = killGroup(p.cmd.Process) // it may have ended meanwhile
	}
	ctx, cancel := context.WithTimeout(hurry, stopTimeout)
	defer cancel()
	select {
	case <-p.done:
		if p.err != nil && !p.terminated() {
			return fmt.Errorf("%s did not stop cleanly: %s", p.name, p.obituary())
		}
		return nil
	case <-ctx.Done():
		_ = killGroup(p.cmd.Process) // it may have ended meanwhile
		<-p.done
		if hurry.Err() != nil {
			return fmt.Errorf("%s was killed", p.name)
		}
		return fmt.Errorf("%s was killed, it did not stop within %s", p.name, stopTimeout)
	}
}

// terminated says that the process was stopped so early that it did not listen for
// signals yet: it could not do better.
func (p *process) terminated() bool {
	status, ok := p.cmd.ProcessState.Sys().(syscall.WaitStatus)
	return ok && status.Signaled() && status.Signal() == syscall.SIGTERM
}

// obituary says how the process ended, with the end of its log.
func (p *process) obituary() string {
	how := "it ended by itself"
	if p.err != nil {
		how = p.err.Error()
	}
	if p.log == "" {
		return how
	}
	lines := logTail(p.log, 12)
	if len(lines) == 0 {
		return how + "; its log is empty"
	}
	return how + "; the end of its log:\n  | " + strings.Join(lines, "\n  | ")
}

// logTail returns the last lines of a file, or nothing when it cannot be read.
func logTail(path string, n int) []string {
	f, err := os.Open(path)
	if err != nil {
		return nil
	}
	defer f.Close()
	const enough = 64 << 10
	if info, err := f.Stat(); err == nil && info.Size() > enough {
		_, _ = f.Seek(-enough, io.SeekEnd) // else more is read than needed
	}
	data, _ := io.ReadAll(f) // what could be read is shown
	return lastLines(data, n)
}

func lastLines(data []byte, n int) []string {
	text := string(bytes.TrimRight(data, "\n"))
	if text == "" {
		return nil
	}
	lines := strings.Split(text, "\n")
	return lines[max(0, len(lines)-n):]
}
