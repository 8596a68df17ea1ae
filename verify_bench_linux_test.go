package opampgateway

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"math/big"
	"net"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.opentelemetry.io/collector/component/componenttest"

	"github.com/opampgateway/opampgateway/internal/gatewaytest"
	"github.com/opampgateway/opampgateway/internal/metadatatest"
)

// BenchmarkAdmission lets one agent in after the other, and out again: gateway, server and agents together. What is more than with
// accept is what the server's decision costs both of them.
func BenchmarkAdmission(b *testing.B) {
	for _, admission := range []AgentAdmission{AdmissionAccept, AdmissionAsk, AdmissionVerify} {
		for _, scheme := range []string{"ws", "wss"} {
			b.Run(string(admission)+"/"+scheme, func(b *testing.B) { benchmarkAdmission(b, admission, scheme) })
		}
	}
}

func benchmarkAdmission(b *testing.B, admission AgentAdmission, scheme string) {
	b.Helper()
	listener, err := net.Listen("tcp", "localhost:0")
	require.NoError(b, err)
	address := listener.Addr().String()
	if scheme == "wss" {
		listener = tls.NewListener(listener, &tls.Config{Certificates: []tls.Certificate{selfSigned(b)}, MinVersion: tls.VersionTLS13})
	}
	server := gatewaytest.NewServer(b, func() (net.Listener, error) { return listener, nil })
	server.Start()
	cfg := createDefaultConfig().(*Config)
	cfg.Server.Endpoint = scheme + "://" + address
	cfg.Server.TLS.InsecureSkipVerify = true
	cfg.Server.AgentAdmission = admission
	cfg.Listener.NetAddr.Endpoint = "localhost:0"
	metrics := componenttest.NewTelemetry()
	e, err := newGatewayExtension(metadatatest.NewSettings(metrics), cfg)
	require.NoError(b, err)
	e.told = func() bool { return true }
	require.NoError(b, e.Start(b.Context(), componenttest.NewNopHost()))
	b.Cleanup(func() { require.NoError(b, e.Shutdown(context.Background())) })
	server.WantLinks(cfg.Server.Connections)
	door := gatewaytest.Door{URL: "ws://" + e.gateway.server.door.Addr().String(), Dial: (&net.Dialer{}).DialContext}
	n, begin := 0, processorTime(b)
	for b.Loop() {
		n++
		door.Connect(b, "agent", "Authorization", "Secret-Key 01980000-0000-7000-8000-00000000000a").Vanish()
	}
	b.ReportMetric(float64(processorTime(b)-begin)/float64(n), "cpu-ns/op")
}

// processorTime returns what this process has taken of the processors so far.
func processorTime(b *testing.B) time.Duration {
	b.Helper()
	var usage syscall.Rusage
	require.NoError(b, syscall.Getrusage(syscall.RUSAGE_SELF, &usage))
	return time.Duration(usage.Utime.Nano() + usage.Stime.Nano())
}

// selfSigned returns a certificate that nobody trusts.
func selfSigned(b *testing.B) tls.Certificate {
	b.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(b, err)
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), DNSNames: []string{"localhost"}}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	require.NoError(b, err)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}
