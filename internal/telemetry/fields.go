package telemetry

import (
	"net"
	"strconv"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

// Peer is a field of a log line that says where somebody is, as client.address and client.port for
// the role "client" (OpenTelemetry's semantic conventions). The address is one of package net; what
// has no port is all address.
func Peer(role, address string) zap.Field {
	return zap.Inline(zapcore.ObjectMarshalerFunc(func(e zapcore.ObjectEncoder) error {
		host, port, _ := net.SplitHostPort(address)
		if number, err := strconv.ParseUint(port, 10, 16); err == nil {
			e.AddString(role+".address", host)
			e.AddUint64(role+".port", number)
		} else {
			e.AddString(role+".address", address)
		}
		return nil
	}))
}
