package e2e

import (
	"os/exec"
	"runtime"
	"syscall"
)

// withParent has the kernel end a process when the tests are killed, by a timeout say.
func withParent() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM}
}

var starts = make(chan func())

// What the kernel takes for the parent is the thread that starts a process. This one lives
// as long as the tests do.
func init() {
	go func() {
		runtime.LockOSThread()
		for start := range starts {
			start()
		}
	}()
}

func startOnLastingThread(cmd *exec.Cmd) error {
	result := make(chan error)
	starts <- func() { result <- cmd.Start() }
	return <-result
}
