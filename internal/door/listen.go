package door

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"strings"
	"syscall"

	"go.opentelemetry.io/collector/config/confignet"
)

// Listen listens where cfg says. The file of a Unix socket that a killed process has left behind, where
// nobody answers, is taken over.
func Listen(ctx context.Context, cfg confignet.AddrConfig) (net.Listener, error) {
	l, err := cfg.Listen(ctx)
	path := cfg.Endpoint
	if !errors.Is(err, syscall.EADDRINUSE) || cfg.Transport != confignet.TransportTypeUnix || strings.HasPrefix(path, "@") {
		return l, err
	}
	stale, problem := os.Lstat(path)
	if problem != nil || stale.Mode().Type() != fs.ModeSocket {
		return nil, fmt.Errorf("%w: the file is no socket", err)
	}
	var dialer net.Dialer
	conn, problem := dialer.DialContext(ctx, "unix", path)
	if problem == nil {
		conn.Close()
		return nil, fmt.Errorf("%w: another process answers there", err)
	}
	if !errors.Is(problem, syscall.ECONNREFUSED) {
		return nil, fmt.Errorf("%w: cannot tell whether another process answers there: %w", err, problem)
	}
	// Another gateway may have been faster. Its file may well have the number of the one that was there.
	if now, problem := os.Lstat(path); problem != nil || !os.SameFile(stale, now) || !now.ModTime().Equal(stale.ModTime()) {
		return nil, fmt.Errorf("%w: another process has just taken it", err)
	}
	if err := os.Remove(path); err != nil {
		return nil, fmt.Errorf("take over the socket of a process that has ended: %w", err)
	}
	return cfg.Listen(ctx)
}
