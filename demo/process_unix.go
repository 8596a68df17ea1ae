//go:build unix

package main

import (
	"os"
	"syscall"
)

// killGroup ends a process and whatever it started itself.
func killGroup(p *os.Process) error { return syscall.Kill(-p.Pid, syscall.SIGKILL) }
