package main

import (
	"crypto/sha1"
	"crypto/tls"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/protobuf/encoding/protowire"
)

// server is the OpAMP server behind all that is measured. It lets every agent in and sends back
// what an agent says, to its instance UID and on the connection that it came on. Like the servers
// that agents meet, it handles the messages of a connection one after another, with one write each.
type server struct {
	upgrades    atomic.Int64 // WebSockets
	connects    atomic.Int64 // questions about agents
	disconnects atomic.Int64 // agent_disconnect

	// mu guards what follows.
	mu     sync.Mutex
	conns  map[*serverConn]struct{}
	agents map[uid]*serverConn // where each was heard last
}

type serverConn struct {
	*conn
	uids map[uid]bool // heard here; its reader's own
}

// ServerListen says where to listen.
type ServerListen struct {
	Address           string // host:port, port 0 for any; plain
	CertFile, KeyFile string
}

// ServerAddress is where the server listens, plain and with TLS.
type ServerAddress struct{ Plain, TLS string }

// Listen starts to serve.
func (s *server) Listen(args ServerListen, reply *ServerAddress) error {
	s.conns, s.agents = map[*serverConn]struct{}{}, map[uid]*serverConn{}
	listener, err := net.Listen("tcp", args.Address)
	if err != nil {
		return err
	}
	reply.Plain = listener.Addr().String()
	go s.serve(listener)
	cert, err := tls.LoadX509KeyPair(args.CertFile, args.KeyFile)
	if err != nil {
		return err
	}
	listener, err = tls.Listen("tcp", "127.0.0.1:0", &tls.Config{Certificates: []tls.Certificate{cert}})
	if err != nil {
		return err
	}
	reply.TLS = listener.Addr().String()
	go s.serve(listener)
	return nil
}

// serve ends with the process.
func (s *server) serve(listener net.Listener) {
	for {
		c, err := listener.Accept()
		if err != nil {
			return
		}
		go s.serveConn(c)
	}
}

// serveConn ends with the connection.
func (s *server) serveConn(nc net.Conn) {
	defer nc.Close()
	c := &serverConn{conn: newConn(nc, false), uids: map[uid]bool{}}
	_ = c.SetDeadline(time.Now().Add(time.Minute))
	head, err := c.readHead()
	if err != nil {
		return
	}
	posts := isPost(head)
	if !posts && accept(c.conn, head) != nil {
		return
	}
	_ = c.SetDeadline(time.Time{})
	s.mu.Lock()
	s.conns[c] = struct{}{}
	s.mu.Unlock()
	defer s.forget(c)
	if posts {
		s.servePosts(c, head)
		return
	}
	s.upgrades.Add(1)
	var out []byte
	for {
		message, err := c.read()
		if err != nil {
			return
		}
		if out = s.answer(c, message, out[:0]); len(out) > 0 && c.write(opBinary, out) != nil {
			return
		}
	}
}

func (s *server) forget(c *serverConn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.conns, c)
	for u := range c.uids {
		if s.agents[u] == c {
			delete(s.agents, u)
		}
	}
}

// answer appends the answer to a message to out, if there is one.
func (s *server) answer(c *serverConn, message, out []byte) []byte {
	var u uid
	var named bool
	var data, custom []byte
	_ = fields(body(message), func(number protowire.Number, value []byte, _ uint64) {
		switch number {
		case fieldUID:
			named = copy(u[:], value) == len(u)
		case fieldStatus:
			_ = fields(value, func(number protowire.Number, value []byte, _ uint64) {
				if number == fieldStatusHash {
					data = value
				}
			})
		case fieldAgentDisconnect:
			s.disconnects.Add(1)
		case fieldCustomUp:
			custom = value
		}
	})
	if custom != nil {
		return s.admit(custom, out)
	}
	if !named || data == nil {
		return out
	}
	if !c.uids[u] {
		c.uids[u] = true
		s.mu.Lock()
		s.agents[u] = c
		s.mu.Unlock()
	}
	return appendServerToAgent(out, u, data)
}

func (s *server) admit(custom, out []byte) []byte {
	var request connectRequest
	_ = fields(custom, func(number protowire.Number, value []byte, _ uint64) {
		if number == fieldData {
			_ = json.Unmarshal(value, &request)
		}
	})
	if request.RequestUID == "" {
		return out
	}
	s.connects.Add(1)
	answer, _ := json.Marshal(connectResult{RequestUID: request.RequestUID, Accept: true, HTTPStatusCode: 200})
	return appendCustom(out, fieldCustomDown, typeConnectResult, answer)
}

// accept answers a WebSocket handshake.
func accept(c *conn, head string) error {
	var key string
	for line := range strings.SplitSeq(head, "\r\n") {
		if name, value, _ := strings.Cut(line, ":"); strings.EqualFold(name, "Sec-WebSocket-Key") {
			key = strings.TrimSpace(value)
		}
	}
	if key == "" {
		// What looks whether the server is alive gets an answer, too.
		_, err := c.Write([]byte("HTTP/1.1 426 Upgrade Required\r\nUpgrade: websocket\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"))
		return errors.Join(errors.New("no WebSocket handshake"), err)
	}
	sum := sha1.Sum([]byte(key + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"))
	_, err := fmt.Fprintf(c, "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: %s\r\n\r\n",
		base64.StdEncoding.EncodeToString(sum[:]))
	return err
}

// ServerState is what the server knows.
type ServerState struct {
	Conns, Agents                   int
	Upgrades, Connects, Disconnects int64
}

// State counts.
func (s *server) State(_ struct{}, reply *ServerState) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	*reply = ServerState{len(s.conns), len(s.agents), s.upgrades.Load(), s.connects.Load(), s.disconnects.Load()}
	return nil
}

// CloseAll ends all connections, and says when.
func (s *server) CloseAll(_ struct{}, at *time.Time) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	*at = time.Now()
	for c := range s.conns {
		c.Close()
	}
	return nil
}

// PushAll sends one small push to each of the first agents whose connection is known.
func (s *server) PushAll(agents int, pushes *int) error {
	for agent := range agents {
		if s.push(agent, uint64(time.Now().UnixNano()), stampSize+8) == nil {
			*pushes++
		}
	}
	return nil
}

// Flood is a stream of pushes to one agent.
type Flood struct {
	Agent, Size int
	Every       time.Duration
	Burst       int // pushes at once, at the start
	Pushes      int // after that
}

// Flood starts one, and returns.
func (s *server) Flood(args Flood, _ *struct{}) error {
	go s.flood(args)
	return nil
}

// flood ends after the last push, or when there is nobody to push to.
func (s *server) flood(args Flood) {
	for n := range args.Burst + args.Pushes {
		if n >= args.Burst {
			time.Sleep(args.Every)
		}
		if s.push(args.Agent, uint64(n), args.Size) != nil {
			return
		}
	}
}

func (s *server) push(agent int, number uint64, size int) error {
	u := uidOf(agent)
	s.mu.Lock()
	c := s.agents[u]
	s.mu.Unlock()
	if c == nil {
		return errors.New("the agent is not connected")
	}
	data := make([]byte, dataSize(size))
	fillData(data, agent, number|pushed, 0)
	return c.write(opBinary, appendServerToAgent(nil, u, data))
}
