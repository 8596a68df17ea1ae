package e2e

import (
	"bufio"
	"crypto/tls"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// long reports whether attacks are to last as long as they may, a minute or more: make attack.
func long() bool { return os.Getenv("LONG") != "" }

// needsLong skips a test that has to wait for a minute or more.
func needsLong(t *testing.T) {
	t.Helper()
	if !long() {
		t.Skip("waits for a minute or more: run it by make attack, or with LONG=1")
	}
}

// upgradeRequest asks for a WebSocket, with more lines of header.
func upgradeRequest(more ...string) string {
	lines := append([]string{
		"GET /v1/opamp HTTP/1.1", "Host: gateway", "Connection: Upgrade", "Upgrade: websocket",
		"Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==",
	}, more...)
	return strings.Join(lines, "\r\n") + "\r\n\r\n"
}

// dialPlain opens a connection that ends with the test at the latest, over TLS if config is not nil.
func dialPlain(t *testing.T, address string, config *tls.Config) net.Conn {
	t.Helper()
	conn, err := net.Dial("tcp", address)
	require.NoError(t, err)
	t.Cleanup(func() { conn.Close() })
	require.NoError(t, conn.SetDeadline(time.Now().Add(ceiling)))
	if config != nil {
		conn = secured(conn, config)
	}
	return conn
}

// secured is the agent's end of TLS on a connection to a gateway.
func secured(conn net.Conn, config *tls.Config) *tls.Conn {
	config = config.Clone()
	config.ServerName = "127.0.0.1"
	return tls.Client(conn, config)
}

// knock sends a request as it is, and returns the answer, and the time until the gateway ended the
// connection; that is not waited for when it answers 101.
func knock(t *testing.T, conn net.Conn, request string) (resp *http.Response, ended time.Duration) {
	t.Helper()
	start := time.Now()
	_, err := io.WriteString(conn, request)
	require.NoError(t, err)
	answers := bufio.NewReader(conn)
	resp, err = http.ReadResponse(answers, nil)
	require.NoError(t, err, "the answer to a request")
	if resp.StatusCode != http.StatusSwitchingProtocols {
		_, _ = io.Copy(io.Discard, answers) // a reset is an end, too
	}
	resp.Body.Close()
	return resp, time.Since(start)
}

// wantStatus checks the answer to an attempt to connect by a library.
func wantStatus(t *testing.T, want int, resp *http.Response, err error) {
	t.Helper()
	require.NotNil(t, resp, "no answer: %v", err)
	require.Equal(t, want, resp.StatusCode)
}
