package e2e

import (
	"crypto/tls"
	"encoding/binary"
	"fmt"
	"net"
	"net/http"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/gorilla/websocket"
	"github.com/open-telemetry/opamp-go/protobufs"
	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/proto"
)

// rawAgent is an agent of a bare WebSocket.
type rawAgent struct {
	uid uuid.UUID
	ws  *websocket.Conn

	read sync.WaitGroup
	news chan struct{} // holds something when something was read; closed at the end

	// mu guards what the reader has heard.
	mu       sync.Mutex
	bytes    int // of all frames
	own      int // of those in which the gateway itself states the server's custom capabilities
	messages []*protobufs.ServerToAgent
	end      error // of the connection; nil while it lasts
}

// dialRaw asks for an upgrade, and returns the answer.
func dialRaw(url string, headers http.Header, config *tls.Config) (*websocket.Conn, *http.Response, error) {
	dialer := websocket.Dialer{TLSClientConfig: config, HandshakeTimeout: ceiling}
	return dialer.Dial(url, headers)
}

// connectRaw connects an agent and reads what it is sent, until the connection ends.
func connectRaw(t *testing.T, url string, headers http.Header) *rawAgent {
	t.Helper()
	ws, resp, err := dialRaw(url, headers, nil)
	require.NoError(t, err, "connect to %s: %s", url, status(resp))
	a := newRaw(t, ws)
	a.listen()
	return a
}

// connectTLS is connectRaw over TLS.
func connectTLS(t *testing.T, url string, config *tls.Config) *rawAgent {
	t.Helper()
	ws, resp, err := dialRaw(url, nil, config)
	require.NoError(t, err, "connect to %s: %s", url, status(resp))
	a := newRaw(t, ws)
	a.listen()
	return a
}

// connectDeaf connects an agent that does not read until it is told to listen, and whose
// system takes but little for it.
func connectDeaf(t *testing.T, url string, config *tls.Config) *rawAgent {
	t.Helper()
	dialer := websocket.Dialer{TLSClientConfig: config, HandshakeTimeout: ceiling, NetDial: func(network, address string) (net.Conn, error) {
		conn, err := net.Dial(network, address)
		if tcp, ok := conn.(*net.TCPConn); ok {
			_ = tcp.SetReadBuffer(128 << 10) // less than two segments on loopback would make it crawl
		}
		return conn, err
	}}
	ws, resp, err := dialer.Dial(url, nil)
	require.NoError(t, err, "connect to %s: %s", url, status(resp))
	return newRaw(t, ws)
}

func newRaw(t *testing.T, ws *websocket.Conn) *rawAgent {
	t.Helper()
	a := &rawAgent{uid: uuid.New(), ws: ws, news: make(chan struct{}, 1)}
	t.Cleanup(func() {
		ws.Close()
		a.read.Wait()
	})
	return a
}

// closeAll ends the agents' connections without a word.
func closeAll(agents []*rawAgent) {
	for _, a := range agents {
		a.ws.Close()
	}
}

// listen has the agent read, until the connection ends.
func (a *rawAgent) listen() { a.read.Go(a.readAll) }

// readAll ends with the connection.
func (a *rawAgent) readAll() {
	defer close(a.news)
	for {
		_, frame, err := a.ws.ReadMessage()
		a.mu.Lock()
		if err != nil {
			a.end = err
			a.mu.Unlock()
			return
		}
		var m protobufs.ServerToAgent
		if proto.Unmarshal(frame[1:], &m) == nil { // behind the header
			a.messages = append(a.messages, &m)
		}
		a.bytes += len(frame)
		if m.GetCustomCapabilities() != nil {
			a.own += len(frame)
		}
		a.mu.Unlock()
		select {
		case a.news <- struct{}{}:
		default:
		}
	}
}

// send sends a message under the agent's uid and returns the size of the frame.
func (a *rawAgent) send(t *testing.T, m *protobufs.AgentToServer) int {
	t.Helper()
	m.InstanceUid = a.uid[:]
	frame, err := proto.MarshalOptions{}.MarshalAppend([]byte{0}, m)
	require.NoError(t, err)
	a.sendFrame(t, websocket.BinaryMessage, frame)
	return len(frame)
}

func (a *rawAgent) sendFrame(t *testing.T, kind int, frame []byte) {
	t.Helper()
	require.NoError(t, a.ws.SetWriteDeadline(time.Now().Add(ceiling)))
	require.NoError(t, a.ws.WriteMessage(kind, frame))
}

// wantMessage waits for a message from the server, or the gateway.
func (a *rawAgent) wantMessage(t *testing.T, what string, is func(*protobufs.ServerToAgent) bool) {
	t.Helper()
	eventually(t, func() string {
		a.mu.Lock()
		defer a.mu.Unlock()
		if slices.ContainsFunc(a.messages, is) {
			return ""
		}
		return fmt.Sprintf("no message %s, just %v; the connection's end: %v", what, a.messages, a.end)
	})
}

// heard returns all that the agent was sent so far.
func (a *rawAgent) heard() []*protobufs.ServerToAgent {
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.Clone(a.messages)
}

// ended returns how the connection ended; nil while it lasts.
func (a *rawAgent) ended() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.end
}

// chats returns what the server has told the agent so far, in order.
func (a *rawAgent) chats() (texts []string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, m := range a.messages {
		if m.CustomMessage != nil {
			texts = append(texts, string(m.CustomMessage.GetData()))
		}
	}
	return texts
}

// wantEnded waits for the end of the connection, and returns it.
func (a *rawAgent) wantEnded(t *testing.T) (end error) {
	t.Helper()
	eventually(t, func() string {
		if end = a.ended(); end == nil {
			return "the agent is still connected"
		}
		return ""
	})
	return end
}

// wantClosed waits for the end of the connection, which has to be a close frame with this code.
func (a *rawAgent) wantClosed(t *testing.T, code int) {
	t.Helper()
	var closed *websocket.CloseError
	require.ErrorAs(t, a.wantEnded(t), &closed, "the connection ended without a close frame")
	require.Equal(t, code, closed.Code, "the close frame was: %v", closed)
}

// wantLetGo checks that the connection ends without a close frame, as it does for no fault of the agent's.
func (a *rawAgent) wantLetGo(t *testing.T) {
	t.Helper()
	a.wantClosed(t, websocket.CloseAbnormalClosure) // which is how gorilla has an end without one
}

// talk says something as soon as the server has answered, until the connection ends.
func (a *rawAgent) talk() {
	for i := 0; ; i++ {
		if a.ws.WriteMessage(websocket.BinaryMessage, heartbeat(a.uid, i)) != nil {
			return
		}
		if _, open := <-a.news; !open {
			return
		}
	}
}

// heartbeat is a message with nothing in it.
func heartbeat(uid uuid.UUID, sequence int) []byte {
	return fmt.Appendf(nil, "\x00\x0a\x10%s\x10%c", uid[:], 1+sequence%100)
}

// report is a message of the agent with a text to chat about.
func report(t *testing.T, a *rawAgent, text string) []byte {
	t.Helper()
	frame, err := proto.MarshalOptions{}.MarshalAppend([]byte{0}, &protobufs.AgentToServer{InstanceUid: a.uid[:], CustomMessage: chatMessage(text)})
	require.NoError(t, err)
	return frame
}

// messageHeader is the header of a binary message of this size, masked with zeros (RFC 6455,
// section 5.2): what is written behind it is its payload as it is.
func messageHeader(size uint32) []byte {
	return append(binary.BigEndian.AppendUint32([]byte{0x82, 0xff, 0, 0, 0, 0}, size), 0, 0, 0, 0)
}

func status(resp *http.Response) string {
	if resp == nil {
		return "no answer"
	}
	return resp.Status
}

// wantOpen checks that the connection lasts.
func (a *rawAgent) wantOpen(t *testing.T) {
	t.Helper()
	a.mu.Lock()
	defer a.mu.Unlock()
	require.NoError(t, a.end, "the agent's connection has ended")
}
