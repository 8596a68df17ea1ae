package telemetry_test

import (
	"testing"

	"github.com/stretchr/testify/require"
	"go.uber.org/zap/zapcore"

	"github.com/opampgateway/opampgateway/internal/telemetry"
)

func TestPeer(t *testing.T) {
	for address, want := range map[string]map[string]any{
		"192.0.2.7:4320":       {"client.address": "192.0.2.7", "client.port": uint64(4320)},
		"[2001:db8::1]:1":      {"client.address": "2001:db8::1", "client.port": uint64(1)},
		"/run/gateway.sock":    {"client.address": "/run/gateway.sock"},
		"@":                    {"client.address": "@"},
		"":                     {"client.address": ""},
		"host.example:service": {"client.address": "host.example:service"},
	} {
		fields := zapcore.NewMapObjectEncoder()
		telemetry.Peer("client", address).AddTo(fields)
		require.Equal(t, want, fields.Fields)
	}
}
