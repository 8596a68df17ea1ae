package main

import (
	"net"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/open-telemetry/opamp-go/protobufs"
	"google.golang.org/protobuf/proto"
)

// Agents over plain HTTP and the server, both in this process.
func TestPosts(t *testing.T) {
	s := &server{conns: map[*serverConn]struct{}{}, agents: map[uid]*serverConn{}}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	go s.serve(listener)
	l := &load{url: &url.URL{Scheme: "ws", Host: listener.Addr().String()}, posts: true}
	l.size.Store(200)
	const agents = 20
	if err := l.Connect(Connect{agents, 5, 30 * time.Second, true}, nil); err != nil {
		t.Fatal(err)
	}
	if err := l.Start(Start{Size: 2000, Rate: 1000}, nil); err != nil {
		t.Fatal(err)
	}
	if err := l.until(time.Now().Add(30*time.Second), func() string {
		if l.replies.Load() < 10*agents {
			return "too few replies"
		}
		return ""
	}); err != nil {
		t.Fatal(err)
	}
	if err := l.Stop(struct{}{}, nil); err != nil {
		t.Fatal(err)
	}
	var state ServerState
	if err := s.State(struct{}{}, &state); err != nil || state.Agents != agents || state.Upgrades != 0 || state.Conns != agents {
		t.Errorf("the server saw %+v", state)
	}
	if failed := l.failed(); failed != "" || l.closed.Load() > 0 {
		t.Errorf("%d agents were disconnected%s", l.closed.Load(), failed)
	}
	_ = l.Disconnect(struct{}{}, nil)
}

func TestPostHeads(t *testing.T) {
	for head, want := range map[string]string{
		"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nbody":                                 "",
		"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 4\r\n\r\nbody":                "answered",
		"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nbody\r\n0\r\n\r\n":      "without a length",
		"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\nbody":                              `" many"`,
		"HTTP/1.1 200 OK\r\nContent-Type: application/x-protobuf\r\nContent-Length: 4\r\n": "EOF",
	} {
		near, far := net.Pipe()
		go func() {
			_, _ = near.Write([]byte(head))
			near.Close()
		}()
		c := newConn(far, true)
		c.posts = []byte{}
		got, err := c.read()
		if want == "" && (err != nil || string(got) != "body") || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("%q: got %q and %v, want %q", head, got, err, want)
		}
		far.Close()
	}
}

func TestDescriptionIsOpAMP(t *testing.T) {
	u, data := uidOf(1), make([]byte, 40)
	var said protobufs.AgentToServer
	if err := proto.Unmarshal(body(appendDescription(appendAgentToServer(nil, u, data))), &said); err != nil {
		t.Fatal(err)
	}
	if said.GetAgentDescription() == nil || len(said.GetRemoteConfigStatus().GetLastRemoteConfigHash()) != len(data) {
		t.Errorf("the server would read %v", &said)
	}
}
