package e2e

import (
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
)

// The demo of `make run` plays its story to the end: agents come, a configuration is pushed
// and acknowledged, everything is stopped.
func TestDemo(t *testing.T) {
	t.Parallel()
	demo := filepath.Join(t.TempDir(), "demo")
	build := exec.Command("go", "build", "-o", demo, ".")
	build.Dir = filepath.Join("..", "demo")
	output, err := build.CombinedOutput()
	require.NoError(t, err, "build the demo: %s", output)

	p := startProcess(t, "demo", demo, "-collector", collectorProgram(t), "-exit-after-ack")
	code, _ := p.wantExit(t)
	require.Zero(t, code)
}
