package opampgateway

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.opentelemetry.io/collector/component"
	"go.opentelemetry.io/collector/component/componentstatus"
	"go.opentelemetry.io/collector/component/componenttest"
	"go.opentelemetry.io/collector/confmap"
	"go.opentelemetry.io/collector/extension/extensionauth"
	"go.uber.org/zap"

	"github.com/opampgateway/opampgateway/internal/gatewaytest"
)

// These tests are about what the collector brings along: TLS, authentication, other kinds of
// sockets. They run the whole extension on real sockets, in real time.

// loopback is a server and an extension on loopback.
type loopback struct {
	t      *testing.T
	server *gatewaytest.Server
	door   gatewaytest.Door
	host   *statusHost
	stop   func()
}

// startLoopback starts a server, which speaks TLS if serverTLS says so, and an extension with what
// a user may have written below its name; its server endpoint and the listener's port are filled in.
func startLoopback(t *testing.T, serverTLS *tls.Config, conf map[string]any, extensions map[component.ID]component.Component) *loopback {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	endpoint := "ws://" + listener.Addr().String() + "/v1/opamp"
	if serverTLS != nil {
		endpoint = "wss" + strings.TrimPrefix(endpoint, "ws")
		listener = tls.NewListener(listener, serverTLS)
	}
	r := &loopback{t: t, host: &statusHost{Host: componenttest.NewNopHost(), extensions: extensions}}
	r.server = gatewaytest.NewServer(t, func() (net.Listener, error) { return listener, nil })
	r.server.Start()

	c := confmap.NewFromStringMap(conf)
	require.NoError(t, c.Merge(confmap.NewFromStringMap(map[string]any{"server": map[string]any{"endpoint": endpoint}})))
	if !c.IsSet("listener::endpoint") {
		require.NoError(t, c.Merge(confmap.NewFromStringMap(map[string]any{"listener": map[string]any{"endpoint": freeAddress(t)}})))
	}
	cfg, err := load(c)
	require.NoError(t, err)
	set := settings(t)
	set.Logger = zap.NewNop()
	e, err := newGatewayExtension(set, cfg)
	require.NoError(t, err)
	e.told = func() bool { return true }
	require.NoError(t, e.Start(t.Context(), r.host))
	r.stop = func() { require.NoError(t, e.Shutdown(context.Background())) }
	t.Cleanup(r.stop)
	r.door = gatewaytest.Door{URL: "ws://" + cfg.Listener.NetAddr.Endpoint + "/v1/opamp", Dial: (&net.Dialer{}).DialContext}
	return r
}

// freeAddress returns a loopback address where nobody listens.
func freeAddress(t *testing.T) string {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer listener.Close()
	return listener.Addr().String()
}

// wantRelay has an agent let in, and a message each way.
func (r *loopback) wantRelay(name string, headers ...string) {
	r.t.Helper()
	agent := r.door.Connect(r.t, name, headers...)
	report := gatewaytest.Report(agent.UID, 1, 3<<20)
	agent.Send(report)
	link := r.server.WantFrame(agent.UID, report)
	offer := gatewaytest.Offer(agent.UID, "x", 3<<20)
	link.Push(offer)
	agent.WantFrame(offer)
}

func TestRealSockets(t *testing.T) {
	r := startLoopback(t, nil, nil, nil)
	r.wantRelay("alice")
	r.server.WantLinks(3)
	require.Equal(t, []componentstatus.Status{componentstatus.StatusOK}, r.host.statuses())

	_, resp, err := r.door.Knock(t, "bob", "X-Big", strings.Repeat("x", 200<<10))
	if err == nil || resp != nil { // or it was cut off while it was writing
		require.Error(t, err)
		require.Equal(t, http.StatusRequestHeaderFieldsTooLarge, resp.StatusCode)
	}
}

func TestTLS(t *testing.T) {
	authority := newAuthority(t)
	for name, mutual := range map[string]bool{"TLS": false, "mutual TLS": true} {
		t.Run(name, func(t *testing.T) {
			serverCert, listenerCert := authority.issue(t, "server"), authority.issue(t, "listener")
			serverTLS := &tls.Config{Certificates: []tls.Certificate{serverCert.pair}}
			clientConf := map[string]any{"ca_file": authority.file}
			listenerConf := map[string]any{"cert_file": listenerCert.certFile, "key_file": listenerCert.keyFile}
			if mutual {
				serverTLS.ClientAuth, serverTLS.ClientCAs = tls.RequireAndVerifyClientCert, authority.pool
				client := authority.issue(t, "gateway")
				clientConf["cert_file"], clientConf["key_file"] = client.certFile, client.keyFile
				listenerConf["client_ca_file"] = authority.file
			}
			r := startLoopback(t, serverTLS, map[string]any{
				"server":   map[string]any{"tls": clientConf},
				"listener": map[string]any{"tls": listenerConf},
			}, nil)
			r.server.WantLinks(3)

			r.door.URL = "wss" + strings.TrimPrefix(r.door.URL, "ws")
			r.door.TLS = &tls.Config{RootCAs: authority.pool}
			if mutual {
				_, resp, err := r.door.Knock(t, "without a certificate")
				require.Error(t, err)
				require.Nil(t, resp)
				require.Empty(t, r.server.Questions())
				r.door.TLS.Certificates = []tls.Certificate{authority.issue(t, "agent").pair}
			}
			r.wantRelay("alice")

			// An upgrade fails on HTTP/2.
			offer := r.door.TLS.Clone()
			offer.NextProtos = []string{"h2", "http/1.1"}
			conn, err := tls.Dial("tcp", strings.Split(r.door.URL, "/")[2], offer)
			require.NoError(t, err)
			defer conn.Close()
			require.Equal(t, "http/1.1", conn.ConnectionState().NegotiatedProtocol)
		})
	}

	t.Run("server that is not trusted", func(t *testing.T) {
		cert := authority.issue(t, "server")
		r := startLoopback(t, &tls.Config{Certificates: []tls.Certificate{cert.pair}}, nil, nil)
		require.Eventually(t, func() bool {
			statuses := r.host.statuses()
			return len(statuses) == 1 && statuses[0] == componentstatus.StatusRecoverableError
		}, 10*time.Second, 10*time.Millisecond)
		require.Empty(t, r.server.Upgrades())
	})
}

func TestUnixSocket(t *testing.T) {
	directory, err := os.MkdirTemp("", "opamp") //nolint:usetesting // t.TempDir is too long for a socket on some systems
	require.NoError(t, err)
	defer func() { _ = os.RemoveAll(directory) }()
	path := filepath.Join(directory, "gateway.Socket")
	r := startLoopback(t, nil, map[string]any{"listener": map[string]any{"transport": "unix", "endpoint": path}}, nil)
	r.door = gatewaytest.Door{URL: "ws://gateway/v1/opamp", Dial: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", path)
	}}
	r.wantRelay("alice")
}

// doorman is an authentication extension that knows one password.
type doorman struct {
	component.StartFunc
	component.ShutdownFunc
	extensionauth.ServerAuthenticateFunc
}

func TestListenerAuth(t *testing.T) {
	id := component.MustNewID("doorman")
	check := func(ctx context.Context, headers map[string][]string) (context.Context, error) {
		if http.Header(headers).Get("Authorization") != "Bearer sesame" {
			return ctx, errors.New("not on the list")
		}
		return ctx, nil
	}
	r := startLoopback(t, nil, map[string]any{"listener": map[string]any{"auth": map[string]any{"authenticator": "doorman"}}},
		map[component.ID]component.Component{id: doorman{ServerAuthenticateFunc: check}})
	r.door.WantRefused(t, "mallory", http.StatusUnauthorized)
	r.door.WantRefused(t, "mallory", http.StatusUnauthorized, "Authorization", "Bearer simsalabim")
	require.Empty(t, r.server.Questions(), "the server is not troubled")
	r.wantRelay("alice", "Authorization", "Bearer sesame")
}

// TestRestart shuts an extension down and starts another one on the same port, as another process does.
func TestRestart(t *testing.T) {
	conf := map[string]any{"listener": map[string]any{"endpoint": freeAddress(t)}}
	for range 5 {
		r := startLoopback(t, nil, conf, nil)
		agent := r.door.Connect(t, "alice")
		r.server.WantFrame(agent.UID, agent.Say(1))
		agent.Say(2)
		begin := time.Now()
		r.stop()
		require.Less(t, time.Since(begin), time.Second)
		agent.WantLetGo()
		r.server.WantFrame(agent.UID, gatewaytest.Status(agent.UID, 2))
	}
}

// TestTwoInstances has two extensions in one collector.
func TestTwoInstances(t *testing.T) {
	a, b := startLoopback(t, nil, nil, nil), startLoopback(t, nil, nil, nil)
	a.wantRelay("alice")
	b.wantRelay("bob")
	require.Empty(t, a.server.Received(gatewaytest.UID("bob")))
	require.Empty(t, b.server.Received(gatewaytest.UID("alice")))
}

// authority issues certificates for loopback.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pool *x509.CertPool
	file string
}

type issued struct {
	pair              tls.Certificate
	certFile, keyFile string
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "authority"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	require.NoError(t, err)
	cert, err := x509.ParseCertificate(der)
	require.NoError(t, err)
	a := &authority{cert: cert, key: key, pool: x509.NewCertPool(), file: filepath.Join(t.TempDir(), "ca.crt")}
	a.pool.AddCert(cert)
	require.NoError(t, os.WriteFile(a.file, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600))
	return a
}

func (a *authority) issue(t *testing.T, name string) issued {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, DNSNames: []string{"localhost"},
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}, a.cert, &key.PublicKey, a.key)
	require.NoError(t, err)
	keyDER, err := x509.MarshalECPrivateKey(key)
	require.NoError(t, err)
	certPEM := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	keyPEM := pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: keyDER})
	directory := t.TempDir()
	i := issued{certFile: filepath.Join(directory, "tls.crt"), keyFile: filepath.Join(directory, "tls.key")}
	require.NoError(t, os.WriteFile(i.certFile, certPEM, 0o600))
	require.NoError(t, os.WriteFile(i.keyFile, keyPEM, 0o600))
	i.pair, err = tls.X509KeyPair(certPEM, keyPEM)
	require.NoError(t, err)
	return i
}
