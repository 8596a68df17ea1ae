package main

import (
	"runtime"
	"syscall"
)

// Should the demo itself be killed, the kernel ends its children. "Itself" means the
// thread that started them, so main stays on its thread, which lives as long as the
// process; children are started from main only.
func init() { runtime.LockOSThread() }

func ownGroup() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGTERM}
}
