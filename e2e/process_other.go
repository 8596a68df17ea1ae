//go:build !linux

package e2e

import (
	"os/exec"
	"syscall"
)

func withParent() *syscall.SysProcAttr { return nil }

func startOnLastingThread(cmd *exec.Cmd) error { return cmd.Start() }
