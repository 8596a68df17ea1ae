package socket

import (
	"math/rand/v2"
	"net"
	"time"

	"github.com/gorilla/websocket"
)

// Leave ends a connection that Dial has made, and that New has not taken over: with a close frame (1000), and nothing
// else. Nothing is read of it. It takes no longer than a moment.
func Leave(conn net.Conn) {
	defer conn.Close()
	payload := websocket.FormatCloseMessage(websocket.CloseNormalClosure, "")
	const fin, opcode, masked = 0x80, websocket.CloseMessage, 0x80
	frame := []byte{fin | opcode, masked | byte(len(payload))}
	mask := rand.Uint32() // of a client (RFC 6455, section 5.3)
	for i := range 4 {
		frame = append(frame, byte(mask>>(8*i)))
	}
	for i, b := range payload {
		frame = append(frame, b^frame[2+i%4])
	}
	if conn.SetDeadline(time.Now().Add(moment)) == nil { // also of what TLS says at its end
		_, _ = conn.Write(frame) // the end of the connection says it, too
	}
}
