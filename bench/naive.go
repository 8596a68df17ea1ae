package main

import (
	"context"
	"encoding/json"
	"errors"
	"net"
	"net/http"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/gorilla/websocket"
	"github.com/open-telemetry/opamp-go/protobufs"
	"google.golang.org/protobuf/proto"
)

// naive is a relay as it is usually written: a library's defaults, two goroutines and an
// unbuffered channel per connection, every message decoded. It shares links among agents and asks
// the server about each, as the gateway does, and has none of the gateway's care for what goes
// wrong.
type naive struct {
	upgrader websocket.Upgrader
	links    []*naiveConn
	next     atomic.Uint64

	// mu guards what follows.
	mu      sync.Mutex
	agents  map[uid]*naiveConn
	waiting map[string]chan connectResult
}

// naiveConn is a WebSocket with a goroutine that writes what comes out of the channel.
type naiveConn struct {
	ws   *websocket.Conn
	out  chan []byte
	done chan struct{} // closed at the end
}

func newNaiveConn(ws *websocket.Conn) *naiveConn {
	c := &naiveConn{ws: ws, out: make(chan []byte), done: make(chan struct{})}
	go c.write()
	return c
}

// write ends with the connection.
func (c *naiveConn) write() {
	for {
		select {
		case message := <-c.out:
			if c.ws.WriteMessage(websocket.BinaryMessage, message) != nil {
				c.ws.Close()
				return
			}
		case <-c.done:
			return
		}
	}
}

func (c *naiveConn) send(message []byte) error {
	select {
	case c.out <- message:
		return nil
	case <-c.done:
		return errClosed
	}
}

// NaiveConfig is all that it needs to know.
type NaiveConfig struct {
	Server            string // URL
	Listen            string
	CertFile, KeyFile string // empty for plain connections
}

const naiveLinks = 3

// Run starts the relay.
func (n *naive) Run(cfg NaiveConfig, _ *struct{}) error {
	n.agents, n.waiting = map[uid]*naiveConn{}, map[string]chan connectResult{}
	for i := range naiveLinks {
		ws, _, err := websocket.DefaultDialer.DialContext(context.Background(), cfg.Server,
			http.Header{"X-Opamp-Gateway-Connection-Id": {"upstream-" + strconv.Itoa(i)}})
		if err != nil {
			return err
		}
		link := newNaiveConn(ws)
		n.links = append(n.links, link)
		go n.readLink(link)
	}
	listener, err := net.Listen("tcp", cfg.Listen)
	if err != nil {
		return err
	}
	server := &http.Server{Handler: http.HandlerFunc(n.serve), ReadHeaderTimeout: time.Minute}
	if cfg.CertFile != "" {
		go func() { _ = server.ServeTLS(listener, cfg.CertFile, cfg.KeyFile) }()
	} else {
		go func() { _ = server.Serve(listener) }()
	}
	return nil
}

// serve is one agent, until it leaves.
func (n *naive) serve(w http.ResponseWriter, r *http.Request) {
	link := n.links[n.next.Add(1)%naiveLinks]
	if err := n.ask(link, r); err != nil {
		http.Error(w, err.Error(), http.StatusServiceUnavailable)
		return
	}
	ws, err := n.upgrader.Upgrade(w, r, nil)
	if err != nil {
		return
	}
	c := newNaiveConn(ws)
	defer ws.Close()
	defer close(c.done)
	var known uid
	for {
		_, message, err := ws.ReadMessage()
		if err != nil {
			break
		}
		var decoded protobufs.AgentToServer
		if proto.Unmarshal(body(message), &decoded) != nil {
			continue
		}
		var u uid
		copy(u[:], decoded.GetInstanceUid())
		n.mu.Lock()
		n.agents[u] = c
		n.mu.Unlock()
		known = u
		if link.send(message) != nil {
			break
		}
	}
	n.mu.Lock()
	delete(n.agents, known)
	n.mu.Unlock()
	goodbye, err := proto.Marshal(&protobufs.AgentToServer{InstanceUid: known[:], AgentDisconnect: &protobufs.AgentDisconnect{}})
	if err == nil {
		_ = link.send(append([]byte{0}, goodbye...))
	}
}

// ask asks the server about an agent.
func (n *naive) ask(link *naiveConn, r *http.Request) error {
	id := strconv.FormatUint(mix(n.next.Add(1)), 16)
	data, err := json.Marshal(connectRequest{RequestUID: id, RemoteAddress: r.RemoteAddr, Headers: r.Header})
	if err != nil {
		return err
	}
	question, err := proto.Marshal(&protobufs.AgentToServer{CustomMessage: &protobufs.CustomMessage{
		Capability: gatewayCapability, Type: typeConnect, Data: data,
	}})
	if err != nil {
		return err
	}
	answer := make(chan connectResult, 1)
	n.mu.Lock()
	n.waiting[id] = answer
	n.mu.Unlock()
	if err := link.send(append([]byte{0}, question...)); err != nil {
		return err
	}
	select {
	case result := <-answer:
		if !result.Accept {
			return errors.New("refused")
		}
		return nil
	case <-time.After(40 * time.Second):
		return errors.New("no answer")
	}
}

// readLink ends with the link.
func (n *naive) readLink(link *naiveConn) {
	defer close(link.done)
	for {
		_, message, err := link.ws.ReadMessage()
		if err != nil {
			return
		}
		var decoded protobufs.ServerToAgent
		if proto.Unmarshal(body(message), &decoded) != nil {
			continue
		}
		if custom := decoded.GetCustomMessage(); custom.GetType() == typeConnectResult {
			var result connectResult
			if json.Unmarshal(custom.GetData(), &result) != nil {
				continue
			}
			n.mu.Lock()
			answer := n.waiting[result.RequestUID]
			delete(n.waiting, result.RequestUID)
			n.mu.Unlock()
			if answer != nil {
				answer <- result
			}
			continue
		}
		var u uid
		copy(u[:], decoded.GetInstanceUid())
		n.mu.Lock()
		c := n.agents[u]
		n.mu.Unlock()
		if c != nil {
			_ = c.send(message)
		}
	}
}
