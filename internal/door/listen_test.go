package door

import (
	"bytes"
	"context"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
	"go.opentelemetry.io/collector/config/confignet"
)

func unixAt(path string) confignet.AddrConfig {
	return confignet.AddrConfig{Transport: confignet.TransportTypeUnix, Endpoint: path}
}

// socketDirectory is short: some systems take a hundred bytes as the name of a socket.
func socketDirectory(t *testing.T) string {
	t.Helper()
	directory, err := os.MkdirTemp("", "door") //nolint:usetesting // see above
	require.NoError(t, err)
	t.Cleanup(func() { _ = os.RemoveAll(directory) })
	return directory
}

// TestKilledProcess has a process of our own killed while it listens.
func TestKilledProcess(t *testing.T) {
	if path := os.Getenv("DOOR_TEST_LISTEN"); path != "" {
		_, err := Listen(context.Background(), unixAt(path))
		require.NoError(t, err)
		fmt.Println("listening")
		select {}
	}
	if runtime.GOOS == "windows" {
		t.Skip("has other numbers for errors")
	}
	path := filepath.Join(socketDirectory(t), "gateway.sock")
	other := exec.Command(os.Args[0], "-test.run=^TestKilledProcess$")
	other.Env = append(os.Environ(), "DOOR_TEST_LISTEN="+path)
	out, err := other.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, other.Start())
	b := make([]byte, 100)
	n, err := out.Read(b)
	require.NoError(t, err)
	require.True(t, bytes.HasPrefix(b[:n], []byte("listening")), "%s", b[:n])

	_, err = Listen(t.Context(), unixAt(path))
	require.ErrorIs(t, err, syscall.EADDRINUSE)
	require.ErrorContains(t, err, ": another process answers there")

	require.NoError(t, other.Process.Kill())
	require.Error(t, other.Wait())
	info, err := os.Lstat(path)
	require.NoError(t, err, "the file is left")
	require.Equal(t, fs.ModeSocket, info.Mode().Type())

	l, err := Listen(t.Context(), unixAt(path))
	require.NoError(t, err)
	conn, err := net.Dial("unix", path)
	require.NoError(t, err)
	conn.Close()
	require.NoError(t, l.Close())
	require.NoFileExists(t, path)
}

func TestOtherFilesAreLeftAlone(t *testing.T) {
	directory := socketDirectory(t)
	file := filepath.Join(directory, "important")
	require.NoError(t, os.WriteFile(file, []byte("data"), 0o600))
	link := filepath.Join(directory, "link")
	require.NoError(t, os.Symlink(file, link))
	for _, path := range []string{file, link, directory} {
		_, err := Listen(t.Context(), unixAt(path))
		require.Error(t, err)
	}
	data, err := os.ReadFile(link)
	require.NoError(t, err)
	require.Equal(t, "data", string(data))
}

func TestAbstractSocket(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("Linux has them")
	}
	name := fmt.Sprintf("@door-%d", os.Getpid())
	l, err := Listen(t.Context(), unixAt(name))
	require.NoError(t, err)
	_, err = Listen(t.Context(), unixAt(name))
	require.ErrorIs(t, err, syscall.EADDRINUSE)
	require.NoError(t, l.Close())
}

func TestListenTCP(t *testing.T) {
	cfg := confignet.AddrConfig{Transport: confignet.TransportTypeTCP, Endpoint: "127.0.0.1:0"}
	l, err := Listen(t.Context(), cfg)
	require.NoError(t, err)
	defer l.Close()
	cfg.Endpoint = l.Addr().String()
	_, err = Listen(t.Context(), cfg)
	require.ErrorIs(t, err, syscall.EADDRINUSE)
}
