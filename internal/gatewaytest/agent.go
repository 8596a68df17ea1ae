package gatewaytest

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"net/http"
	"sync"
	"testing"
	"time"

	"github.com/gorilla/websocket"
	"github.com/open-telemetry/opamp-go/protobufs"
	"google.golang.org/protobuf/proto"
)

// NameHeader is how the agents of these tests name themselves in their upgrade request.
const NameHeader = "Agent-Name"

// Door is where agents knock: a gateway's listener, or a server's.
type Door struct {
	URL  string
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
	TLS  *tls.Config
}

// Agent is one agent, or whatever else holds a WebSocket to the gateway.
type Agent struct {
	Name string
	UID  []byte

	t     testing.TB
	ws    *websocket.Conn
	reads sync.WaitGroup

	mu      sync.Mutex
	changed chan struct{} // closed and renewed whenever something below changes
	inbox   [][]byte      // what came and was not taken yet
	stopped chan struct{} // while it does not read: closed when it does again
	ended   bool
	endedAt time.Time
	err     error // why it ended
}

// Knock asks to be let in under name, with these headers besides, given as name, value, name,
// value …. It returns either the agent or the refusal, or an error if there was no answer.
func (d Door) Knock(t testing.TB, name string, headers ...string) (*Agent, *http.Response, error) {
	t.Helper()
	return d.KnockContext(t.Context(), t, name, headers...)
}

// KnockContext is Knock by an agent that hangs up when ctx ends before it is let in.
func (d Door) KnockContext(ctx context.Context, t testing.TB, name string, headers ...string) (*Agent, *http.Response, error) {
	t.Helper()
	header := http.Header{NameHeader: {name}}
	for i := 0; i+1 < len(headers); i += 2 {
		header.Set(headers[i], headers[i+1])
	}
	stop := func() bool { return true }
	dialer := websocket.Dialer{
		NetDialContext: func(ctx2 context.Context, network, address string) (net.Conn, error) {
			conn, err := d.Dial(ctx2, network, address)
			if err == nil { // gorilla does not notice the end of ctx itself
				stop = context.AfterFunc(ctx, func() { conn.Close() })
			}
			return conn, err
		},
		TLSClientConfig: d.TLS,
	}
	ws, resp, err := dialer.DialContext(ctx, d.URL, header)
	stop()
	if err != nil {
		return nil, resp, err
	}
	a := &Agent{Name: name, UID: UID(name), t: t, ws: ws, changed: make(chan struct{})}
	a.reads.Go(a.read)
	t.Cleanup(a.Vanish)
	return a, resp, nil
}

// Connect wants to be let in.
func (d Door) Connect(t testing.TB, name string, headers ...string) *Agent {
	t.Helper()
	a, resp, err := d.Knock(t, name, headers...)
	if err != nil {
		if resp != nil {
			t.Fatalf("%s was not let in: %s", name, resp.Status)
		}
		t.Fatalf("%s was not let in: %v", name, err)
	}
	return a
}

// WantRefused wants not to be let in, and returns the headers of the refusal.
func (d Door) WantRefused(t testing.TB, name string, status int, headers ...string) http.Header {
	t.Helper()
	a, resp, err := d.Knock(t, name, headers...)
	switch {
	case a != nil:
		t.Fatalf("%s was let in, want %d", name, status)
	case resp == nil:
		t.Fatalf("%s got no answer but %v, want %d", name, err, status)
	case resp.StatusCode != status:
		t.Fatalf("%s was answered %s, want %d", name, resp.Status, status)
	}
	return resp.Header
}

func (a *Agent) set(f func()) {
	a.mu.Lock()
	defer a.mu.Unlock()
	f()
	close(a.changed)
	a.changed = make(chan struct{})
}

func (a *Agent) read() {
	for {
		a.mu.Lock()
		stopped := a.stopped
		a.mu.Unlock()
		if stopped != nil {
			<-stopped
		}
		_, frame, err := a.ws.ReadMessage()
		if err != nil {
			a.ws.Close()
			a.set(func() { a.ended, a.endedAt, a.err = true, time.Now(), err })
			return
		}
		a.set(func() { a.inbox = append(a.inbox, frame) })
	}
}

// Send sends a frame, in as many fragments as gorilla finds fit. It waits while the gateway
// does not read.
func (a *Agent) Send(frame []byte) { a.sendMessage(websocket.BinaryMessage, frame) }

// SendText sends a text message.
func (a *Agent) SendText(text string) { a.sendMessage(websocket.TextMessage, []byte(text)) }

func (a *Agent) sendMessage(kind int, payload []byte) {
	a.t.Helper()
	if err := a.ws.WriteMessage(kind, payload); err != nil {
		a.t.Logf("%s could not send: %v", a.Name, err)
	}
}

// Ping sends a WebSocket ping.
func (a *Agent) Ping(payload string) {
	_ = a.ws.WriteControl(websocket.PingMessage, []byte(payload), time.Time{})
}

// SendRaw sends bytes that gorilla would not: they go to the connection as they are.
func (a *Agent) SendRaw(b []byte) { _, _ = a.ws.NetConn().Write(b) }

// Say sends a status under the agent's own UID, and returns it.
func (a *Agent) Say(sequence int) []byte {
	a.t.Helper()
	frame := Status(a.UID, sequence)
	a.Send(frame)
	return frame
}

// Next returns the next frame that came.
func (a *Agent) Next() []byte {
	a.t.Helper()
	var frame []byte
	await(a.t, a.Name+" got nothing", func() bool {
		a.mu.Lock()
		defer a.mu.Unlock()
		if len(a.inbox) == 0 {
			return false
		}
		frame, a.inbox = a.inbox[0], a.inbox[1:]
		return true
	}, func() <-chan struct{} {
		a.mu.Lock()
		defer a.mu.Unlock()
		return a.changed
	})
	return frame
}

// WantFrame checks that the next frame that comes is this one, byte for byte.
func (a *Agent) WantFrame(frame []byte) {
	a.t.Helper()
	wantEqual(a.t, a.Name, a.Next(), frame)
}

// WantMessage checks that the next frame that comes has the header byte and decodes to this.
func (a *Agent) WantMessage(want *protobufs.ServerToAgent) {
	a.t.Helper()
	frame := a.Next()
	got, err := ServerToAgent(frame)
	if err != nil || frame[0] != 0 || !proto.Equal(got, want) {
		a.t.Fatalf("%s: got %v (%v)\nwant %v", a.Name, got, err, want)
	}
}

// WantCapabilities checks that the next frame states these custom capabilities and nothing else.
func (a *Agent) WantCapabilities(capabilities ...string) {
	a.t.Helper()
	a.WantMessage(&protobufs.ServerToAgent{InstanceUid: a.UID, CustomCapabilities: &protobufs.CustomCapabilities{Capabilities: capabilities}})
}

// WantFullStateRequest checks that the next frame asks for the agent's full state and nothing else.
func (a *Agent) WantFullStateRequest() {
	a.t.Helper()
	a.WantMessage(&protobufs.ServerToAgent{InstanceUid: a.UID, Flags: uint64(protobufs.ServerToAgentFlags_ServerToAgentFlags_ReportFullState)})
}

// Inbox returns what came and was not taken by Next.
func (a *Agent) Inbox() [][]byte {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.inbox
}

// WantNothing checks that nothing came that Next has not returned.
func (a *Agent) WantNothing() {
	a.t.Helper()
	for _, frame := range a.Inbox() {
		message, _ := ServerToAgent(frame)
		a.t.Errorf("%s: got %v, want nothing", a.Name, message)
	}
}

// Ended returns whether, when and how the connection has ended.
func (a *Agent) Ended() (ended bool, at time.Time, err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.ended, a.endedAt, a.err
}

// WantConnected checks that the connection has not ended.
func (a *Agent) WantConnected() {
	a.t.Helper()
	if ended, _, err := a.Ended(); ended {
		a.t.Fatalf("%s was disconnected: %v", a.Name, err)
	}
}

// WantClosed checks that the connection ends with a close frame of this code, soon, and
// returns when.
func (a *Agent) WantClosed(code int) time.Time {
	a.t.Helper()
	at, err := a.WantEnd(patience)
	if closeCode(err) != code {
		a.t.Fatalf("%s was disconnected with %v, want close code %d", a.Name, err, code)
	}
	return at
}

// WantLetGo checks that the connection ends without a close frame, soon, and returns when.
func (a *Agent) WantLetGo() time.Time {
	a.t.Helper()
	at, err := a.WantEnd(patience)
	if closed, ok := errors.AsType[*websocket.CloseError](err); ok && closed.Code == websocket.CloseAbnormalClosure {
		return at // which is how gorilla has an end without one
	}
	a.t.Fatalf("%s was disconnected with %v, want an end without a close frame", a.Name, err)
	return at
}

// WantEnd checks that the connection ends within a time, and returns when and how.
func (a *Agent) WantEnd(within time.Duration) (at time.Time, err error) {
	a.t.Helper()
	ended := make(chan struct{})
	go func() { // ends when the agent does, by itself or at the end of the test
		a.reads.Wait()
		close(ended)
	}()
	select {
	case <-ended:
	case <-time.After(within):
		a.t.Fatalf("%s is still connected after %s", a.Name, within)
	}
	_, at, err = a.Ended()
	return at, err
}

// StopReading has the agent read no more, once it has read one more message.
func (a *Agent) StopReading() {
	a.set(func() {
		if a.stopped == nil {
			a.stopped = make(chan struct{})
		}
	})
}

// ReadOn ends what StopReading began.
func (a *Agent) ReadOn() {
	a.set(func() {
		if a.stopped != nil {
			close(a.stopped)
			a.stopped = nil
		}
	})
}

// SayGoodbye leaves as agents do: with a last message, then a close frame.
func (a *Agent) SayGoodbye() {
	a.t.Helper()
	a.Send(Goodbye(a.UID))
	a.Close(websocket.CloseNormalClosure)
}

// Close sends a close frame and waits for the answer.
func (a *Agent) Close(code int) {
	a.t.Helper()
	_ = a.ws.WriteControl(websocket.CloseMessage, websocket.FormatCloseMessage(code, ""), time.Time{})
	a.WantClosed(code)
}

// Vanish ends the connection without a word, as when the agent's process is killed.
func (a *Agent) Vanish() {
	_ = a.ws.NetConn().Close()
	a.ReadOn()
	a.reads.Wait()
}

// Reset breaks the connection.
func (a *Agent) Reset() { a.ws.NetConn().(*Conn).Reset() }

// BlackHole has nothing more pass, in either direction, and nobody know.
func (a *Agent) BlackHole() { a.ws.NetConn().(*Conn).BlackHole() }

// LocalAddr is where the gateway sees the agent come from.
func (a *Agent) LocalAddr() string { return a.ws.NetConn().LocalAddr().String() }
