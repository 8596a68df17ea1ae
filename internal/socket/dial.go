package socket

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/base64"
	"fmt"
	"net"
	"net/http"
	"net/url"

	"github.com/gorilla/websocket"
	"golang.org/x/net/proxy"
)

// Dialer connects to a server as a WebSocket client.
type Dialer struct {
	// NetDial connects to the server, or to the proxy on the way there.
	NetDial func(ctx context.Context, network, address string) (net.Conn, error)
	// TLS applies to wss:// and to the https:// of a proxy.
	TLS *tls.Config
	// ReadBufferSize is in bytes.
	ReadBufferSize int
}

// Dial connects and shakes hands, through the proxy that the environment names. It returns what New
// takes over. With an error comes the server's answer if it gave one, its body read.
func (d *Dialer) Dial(ctx context.Context, endpoint *url.URL, headers http.Header) (conn net.Conn, in *bufio.Reader, answer *http.Response, err error) {
	secure := endpoint.Scheme == "wss"
	through, err := http.ProxyFromEnvironment(&http.Request{URL: withScheme(endpoint, "http", secure)})
	if err != nil {
		return nil, nil, nil, fmt.Errorf("proxy of the environment: %w", err)
	}
	address := hostPort(endpoint, secure)
	if through == nil {
		conn, err = d.NetDial(ctx, "tcp", address)
	} else {
		conn, err = d.dialThrough(ctx, through, address)
	}
	if err != nil {
		return nil, nil, nil, err
	}
	raw := Wrap(conn)
	conn = raw
	stop := context.AfterFunc(ctx, func() { raw.Close() })
	defer func() {
		if !stop() && err == nil {
			err = context.Cause(ctx)
		}
		if err != nil {
			raw.Close()
		}
	}()
	if secure {
		if conn, err = d.startTLS(ctx, raw, endpoint.Hostname()); err != nil {
			return raw, nil, nil, err
		}
	}
	in = bufio.NewReaderSize(conn, d.ReadBufferSize)
	dialer := websocket.Dialer{
		NetDialContext: func(context.Context, string, string) (net.Conn, error) { return handshaking{conn, in}, nil },
	}
	// TLS is done; the scheme says no more than that.
	_, answer, err = dialer.DialContext(ctx, withScheme(endpoint, "ws", false).String(), headers)
	return conn, in, answer, err
}

// handshaking is a connection of which gorilla reads the server's answer byte by byte, so that
// nothing of what follows it stays in its buffer.
type handshaking struct {
	net.Conn
	in *bufio.Reader
}

func (h handshaking) Read(b []byte) (int, error) { return h.in.Read(b[:min(1, len(b))]) }

// Close leaves the connection to Dial.
func (h handshaking) Close() error { return nil }

func (d *Dialer) startTLS(ctx context.Context, conn net.Conn, host string) (net.Conn, error) {
	config := d.TLS.Clone()
	if config == nil {
		config = &tls.Config{}
	}
	if config.ServerName == "" {
		config.ServerName = host
	}
	secured := tls.Client(conn, config)
	if err := secured.HandshakeContext(ctx); err != nil {
		return conn, err
	}
	return secured, nil
}

// dialThrough connects to address through a proxy: an HTTP one is asked for a tunnel (RFC 9110,
// section 9.3.6), whatever is to go through it.
func (d *Dialer) dialThrough(ctx context.Context, through *url.URL, address string) (net.Conn, error) {
	secure := through.Scheme == "https"
	if !secure && through.Scheme != "http" {
		socks, err := proxy.FromURL(through, forward{d})
		if err != nil {
			return nil, fmt.Errorf("proxy %s: %w", through.Redacted(), err)
		}
		return socks.(proxy.ContextDialer).DialContext(ctx, "tcp", address)
	}
	conn, err := d.NetDial(ctx, "tcp", hostPort(through, secure))
	if err != nil {
		return nil, err
	}
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	tunnel, err := d.tunnel(ctx, conn, through, address)
	if err != nil {
		conn.Close()
		return nil, fmt.Errorf("proxy %s: %w", through.Redacted(), err)
	}
	return tunnel, nil
}

func (d *Dialer) tunnel(ctx context.Context, conn net.Conn, through *url.URL, address string) (net.Conn, error) {
	if through.Scheme == "https" {
		var err error
		if conn, err = d.startTLS(ctx, conn, through.Hostname()); err != nil {
			return nil, err
		}
	}
	ask := &http.Request{Method: http.MethodConnect, URL: &url.URL{Opaque: address}, Host: address, Header: http.Header{}}
	if user := through.User; user != nil {
		password, _ := user.Password()
		credentials := base64.StdEncoding.EncodeToString([]byte(user.Username() + ":" + password))
		ask.Header.Set("Proxy-Authorization", "Basic "+credentials)
	}
	if err := ask.Write(conn); err != nil {
		return nil, err
	}
	// Nothing follows the answer until we speak, so the reader's buffer holds nothing else.
	answer, err := http.ReadResponse(bufio.NewReader(conn), ask) //nolint:bodyclose // it is the tunnel
	if err != nil {
		return nil, err
	}
	if answer.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("answered %s", answer.Status)
	}
	return conn, nil
}

// forward is how a SOCKS proxy is reached.
type forward struct{ *Dialer }

func (f forward) Dial(network, address string) (net.Conn, error) {
	return f.NetDial(context.Background(), network, address)
}

func (f forward) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	return f.NetDial(ctx, network, address)
}

// withScheme returns the same URL under another scheme, or that scheme's secure sister.
func withScheme(u *url.URL, scheme string, secure bool) *url.URL {
	other := *u
	other.Scheme = scheme
	if secure {
		other.Scheme += "s"
	}
	return &other
}

// hostPort is where u is dialed.
func hostPort(u *url.URL, secure bool) string {
	port := u.Port()
	switch {
	case port != "":
	case secure:
		port = "443"
	default:
		port = "80"
	}
	return net.JoinHostPort(u.Hostname(), port)
}
