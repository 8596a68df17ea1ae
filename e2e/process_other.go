//go:build !linux

package e2e

import (
	"os/exec"
	"syscall"
	"testing"
)

func withParent() *syscall.SysProcAttr { return nil }

func startOnLastingThread(cmd *exec.Cmd) error { return cmd.Start() }

// usage is read from /proc, which only Linux has.
func (p *Process) usage(t *testing.T) usage {
	t.Helper()
	t.Skip("what a process uses is only known on Linux")
	return usage{}
}

func maxFiles() uint64 { return 0 }
