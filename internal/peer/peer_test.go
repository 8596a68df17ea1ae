package peer_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"testing"

	"github.com/gorilla/websocket"
	"github.com/stretchr/testify/require"

	"github.com/opampgateway/opampgateway/internal/peer"
)

// outbox notes what it is told to say last.
type outbox struct {
	replies [][]byte
	drained bool
}

func (o *outbox) Reply(payload []byte)  { o.replies = append(o.replies, payload) }
func (o *outbox) Drain(context.Context) { o.drained = len(o.replies) > 0 }

// TestAnswer answers a close frame with its code, without a code when there was none, and nothing else.
func TestAnswer(t *testing.T) {
	for name, test := range map[string]struct {
		err  error
		code int
		want [][]byte
	}{
		"a code":              {&websocket.CloseError{Code: 1009, Text: "too big"}, 1009, [][]byte{{0x3, 0xF1}}},
		"a code within":       {fmt.Errorf("read: %w", &websocket.CloseError{Code: 4000}), 4000, [][]byte{{0xF, 0xA0}}},
		"no code":             {&websocket.CloseError{Code: websocket.CloseNoStatusReceived}, 1005, [][]byte{nil}},
		"no close frame":      {&websocket.CloseError{Code: websocket.CloseAbnormalClosure}, 0, nil},
		"the end of the data": {io.EOF, 0, nil},
		"an error":            {errors.New("reset"), 0, nil},
	} {
		t.Run(name, func(t *testing.T) {
			require.Equal(t, test.code, peer.CloseCode(test.err))
			o := &outbox{}
			p := peer.Peer[int, *outbox, peer.WebSocket[int]]{Outbox: o}
			p.Answer(t.Context(), test.err)
			require.Equal(t, test.want, o.replies)
			require.Equal(t, test.want != nil, o.drained)
		})
	}
}
