package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
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

// usage returns what the process has now.
func (p *Process) usage(t *testing.T) (u usage) {
	t.Helper()
	proc := fmt.Sprintf("/proc/%d/", p.cmd.Process.Pid)
	status, err := os.ReadFile(proc + "status")
	require.NoError(t, err)
	for line := range strings.Lines(string(status)) {
		name, value, _ := strings.Cut(line, ":")
		var number int
		switch _, _ = fmt.Sscan(value, &number); name {
		case "VmRSS":
			u.memory = number << 10
		case "VmHWM":
			u.peak = number << 10
		}
	}
	files, err := os.ReadDir(proc + "fd")
	require.NoError(t, err)
	u.files = len(files)
	return u
}

// maxFiles is how many files one process may open.
func maxFiles() uint64 {
	var limit syscall.Rlimit
	if syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit) != nil {
		return 0
	}
	return limit.Max
}
