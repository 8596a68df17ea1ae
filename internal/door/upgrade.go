package door

import (
	"crypto/fips140"
	"crypto/sha1"
	"encoding/base64"
	"errors"
	"fmt"
	"net"
	"net/http"
	"time"
)

// ErrCannotUpgrade means that the connection cannot be had from the HTTP server: something between it
// and the handler, as a middleware, hides it.
var ErrCannotUpgrade = errors.New("connection cannot be upgraded: something between the HTTP server and the gateway, as a middleware, does not give it away")

// ErrEarlyData means that the peer did not wait for the answer.
var ErrEarlyData = errors.New("data was sent before the upgrade was answered")

// Upgrade lets in who sent r, which Check has found good: it answers the WebSocket handshake (RFC 6455,
// section 4.2.2). It returns the connection, a *socket.Conn or TLS over one, without a deadline;
// nothing of it was read. With an error all is done: the request was answered as far as that was
// possible, and is over.
func Upgrade(w http.ResponseWriter, r *http.Request) (net.Conn, error) {
	s, err := take(w, r)
	if err != nil {
		http.Error(w, "this gateway is set up in a way that makes WebSocket impossible", http.StatusInternalServerError)
		return nil, fmt.Errorf("%w: %w", ErrCannotUpgrade, err)
	}
	if s.early.Load() {
		s.answer(s.conn, earlyData(), true)
		s.end(true)
		s.Close()
		return nil, ErrEarlyData
	}
	if err := s.switchProtocols(r.Header.Get("Sec-Websocket-Key")); err != nil {
		s.Close()
		return nil, fmt.Errorf("answer the upgrade: %w", err)
	}
	s.place.letIn()
	return s.conn, nil
}

func (s *stranger) switchProtocols(key string) error {
	if err := s.below.SetWriteDeadline(time.Now().Add(s.door.limits.Load().Timeout)); err != nil {
		return err
	}
	b := make([]byte, 0, 192)
	b = append(b, "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: "...)
	b = appendAcceptKey(b, key)
	b = append(b, "\r\n\r\n"...)
	if _, err := s.conn.Write(b); err != nil {
		return err
	}
	return s.below.SetWriteDeadline(time.Time{})
}

// appendAcceptKey proves that the answer is to a WebSocket handshake (RFC 6455, section 1.3).
func appendAcceptKey(b []byte, key string) []byte {
	text := append([]byte(key), "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"...)
	var sum [sha1.Size]byte
	// SHA-1 has no security function here: it only shows that the peer has read the key. So it may be
	// used where the process is held to FIPS 140-3.
	fips140.WithoutEnforcement(func() { sum = sha1.Sum(text) })
	return base64.StdEncoding.AppendEncode(b, sum[:])
}
