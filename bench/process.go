package main

import (
	"fmt"
	"os"
	"os/exec"
	"time"
)

// process is a program that was started here. It ends here, too.
type process struct {
	name    string
	cmd     *exec.Cmd
	logFile string
	done    chan struct{} // closed when it has ended
}

// startProcess runs a program. What it says goes to logFile.
func startProcess(name string, cmd *exec.Cmd, logFile string) (*process, error) {
	log, err := os.Create(logFile)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	if cmd.Stdout == nil {
		cmd.Stdout = log
	}
	cmd.Stderr = log
	cmd.SysProcAttr = withParent()
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	p := &process{name: name, cmd: cmd, logFile: logFile, done: make(chan struct{})}
	go p.wait()
	return p, nil
}

// wait ends with the process.
func (p *process) wait() {
	_, _ = p.cmd.Process.Wait() // how it ended is in its log
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

// kill ends the process. It has done its work, and nothing of it is kept.
func (p *process) kill() {
	_ = p.cmd.Process.Kill() // it may have ended
	<-p.done
}

// tail is the end of the log.
func (p *process) tail() string {
	text, _ := os.ReadFile(p.logFile)
	return string(text[max(0, len(text)-1000):])
}

// wait waits until there is no error any more.
func wait(ceiling time.Duration, try func() error) error {
	for deadline := time.Now().Add(ceiling); ; time.Sleep(10 * time.Millisecond) {
		err := try()
		if err == nil || time.Now().After(deadline) {
			return err
		}
	}
}
