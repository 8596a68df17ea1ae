//go:build unix

package opampgateway

import (
	"os"
	"os/exec"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.opentelemetry.io/collector/component/componenttest"
)

// TestToldToEnd tells a process of its own that it is to end, which would end the others here, too.
func TestToldToEnd(t *testing.T) {
	if os.Getenv("GATEWAY_TEST_TOLD") != "" {
		e, err := newGatewayExtension(settings(t), createDefaultConfig().(*Config))
		require.NoError(t, err)
		e.cfg.Server.Endpoint, e.cfg.Listener.NetAddr.Endpoint = "ws://localhost:9", "localhost:0"
		require.NoError(t, e.Start(t.Context(), componenttest.NewNopHost()))
		defer func() { require.NoError(t, e.Shutdown(t.Context())) }()
		require.False(t, e.told())
		require.NoError(t, syscall.Kill(os.Getpid(), syscall.SIGTERM))
		require.Eventually(t, e.told, 10*time.Second, time.Millisecond)
		require.True(t, e.told(), "once told, that is so for good")
		require.False(t, e.anew())
		require.NoError(t, syscall.Kill(os.Getpid(), syscall.SIGINT))
		require.Eventually(t, e.anew, 10*time.Second, time.Millisecond)
		return
	}
	process := exec.Command(os.Args[0], "-test.run=^TestToldToEnd$", "-test.v")
	process.Env = append(os.Environ(), "GATEWAY_TEST_TOLD=1")
	output, err := process.CombinedOutput()
	require.NoError(t, err, "%s", output)
	require.Contains(t, string(output), "PASS: TestToldToEnd")
}
