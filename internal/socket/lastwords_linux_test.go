package socket

import (
	"crypto/tls"
	"net"
	"testing"
	"time"

	"github.com/gorilla/websocket"
	"github.com/stretchr/testify/require"

	"github.com/opampgateway/opampgateway/internal/outbox"
)

// A server that is told something it cannot bear says so, and closes with the rest of it unread, which
// resets the connection. Whoever writes to it learns of the reset; its reader is to learn what was said.
func TestLastWordsAreReadAfterAFailedWrite(t *testing.T) {
	certificate := selfSigned(t)
	for name, secured := range map[string]bool{"TCP": false, "TLS": true} {
		for side, client := range map[string]bool{"client": true, "server": false} {
			t.Run(name+" "+side, func(t *testing.T) {
				near, far := tcpPair(t)
				ours, theirs := net.Conn(Wrap(near)), net.Conn(far)
				if secured {
					config := &tls.Config{Certificates: []tls.Certificate{certificate}}
					if client {
						ours, theirs = tls.Client(ours, &tls.Config{InsecureSkipVerify: true}), tls.Server(theirs, config)
					} else {
						ours, theirs = tls.Server(ours, config), tls.Client(theirs, &tls.Config{InsecureSkipVerify: true})
					}
				}
				var peer *websocket.Conn
				if client {
					_, peer = handshake(t, ours, theirs)
				} else {
					peer, _ = handshake(t, theirs, ours)
				}
				owner := &counted{}
				s := New(ours, InputOf(ours), client, unlimited, writeTimeout, owner)
				defer s.Close()

				require.NoError(t, peer.WriteMessage(websocket.BinaryMessage, payload(1, 100_000)))
				failed := make(chan error)
				go func() {
					batch := []entry{{Kind: outbox.Message, Frame: payload(2, 1<<20)}}
					for {
						if _, err := WriteBatch(s, batch); err != nil {
							s.Hurry()
							failed <- err
							return
						}
					}
				}()
				_, _, err := peer.ReadMessage()
				require.NoError(t, err)
				last := websocket.FormatCloseMessage(websocket.CloseMessageTooBig, "too big")
				require.NoError(t, peer.WriteControl(websocket.CloseMessage, last, time.Now().Add(time.Minute)))
				require.NoError(t, far.Close()) // with something unread, and without a goodbye of TLS
				err = <-failed
				require.NotErrorIs(t, err, ErrStalled)

				message, err := s.Read()
				require.NoError(t, err)
				require.Len(t, message, 100_000)
				_, err = s.Read()
				var closed *websocket.CloseError
				require.ErrorAs(t, err, &closed)
				require.Equal(t, &websocket.CloseError{Code: websocket.CloseMessageTooBig, Text: "too big"}, closed)
			})
		}
	}
}
