package main

import (
	"encoding/json"
	"net/http"
	"testing"

	"github.com/open-telemetry/opamp-go/protobufs"
)

func newTestServer(t *testing.T) (*opampServer, *story) {
	t.Helper()
	s := newStory(t)
	return &opampServer{fleet: s.fleet, key: "the-key"}, s
}

// ask sends the gateway's question and returns the answer, or nil when there is none.
func ask(t *testing.T, s *opampServer, data string) *connectResult {
	t.Helper()
	answer := s.message(&link{name: "upstream-0", gateway: true}, &protobufs.AgentToServer{CustomMessage: &protobufs.CustomMessage{
		Capability: "com.bindplane.opamp-gateway", Type: "connect", Data: []byte(data),
	}})
	if answer == nil {
		t.Fatal("a question remains without any answer")
	}
	c := answer.GetCustomMessage()
	if c == nil {
		return nil
	}
	if c.GetCapability() != "com.bindplane.opamp-gateway" || c.GetType() != "connectResult" {
		t.Fatalf("the answer is a %s / %s", c.GetCapability(), c.GetType())
	}
	var result connectResult
	if err := json.Unmarshal(c.GetData(), &result); err != nil {
		t.Fatal(err)
	}
	return &result
}

func TestConnectAnswered(t *testing.T) {
	s, story := newTestServer(t)

	got := ask(t, s, `{"request_uid":"q1","remote_address":"10.0.0.1:1234","headers":{"Authorization":["Secret-Key the-key"],"Agent-ID":["x"]}}`)
	if got == nil || got.RequestUID != "q1" || !got.Accept {
		t.Errorf("the right key is answered %+v", got)
	}
	story.wantEvent("10.0.0.1:1234: accepted")

	for name, headers := range map[string]string{
		"wrong key":       `{"Authorization":["Secret-Key another"]}`,
		"no key":          `{}`,
		"key without tag": `{"Authorization":["the-key"]}`,
	} {
		got := ask(t, s, `{"request_uid":"q2","remote_address":"10.0.0.2:1","headers":`+headers+`}`)
		if got == nil || got.RequestUID != "q2" || got.Accept || got.HTTPStatusCode != http.StatusUnauthorized || got.ResponseHeaders["WWW-Authenticate"] == "" {
			t.Errorf("%s is answered %+v", name, got)
		}
	}
	story.wantEvent("10.0.0.2:1: refused with 401")

	t.Run("header names in any case", func(t *testing.T) {
		if got := ask(t, s, `{"request_uid":"q3","headers":{"authorization":["Secret-Key the-key"]}}`); got == nil || !got.Accept {
			t.Errorf("answered %+v", got)
		}
	})
	t.Run("unreadable", func(t *testing.T) {
		if got := ask(t, s, `{"request_uid":`); got != nil {
			t.Errorf("answered %+v, to nobody", got)
		}
		story.wantEvent("cannot read a question")
	})
	if n := len(story.view().agents); n != 0 {
		t.Errorf("questions made %d agents", n)
	}
}

func TestWhoMayConnect(t *testing.T) {
	s, story := newTestServer(t)
	request := func(key, linkName string) *http.Request {
		r := &http.Request{Header: http.Header{"Authorization": {authorization(key)}}}
		if linkName != "" {
			r.Header.Set("X-Opamp-Gateway-Connection-Id", linkName)
		}
		return r
	}

	if got := s.connecting(request("wrong", "upstream-0")); got.Accept || got.HTTPStatusCode != http.StatusUnauthorized {
		t.Errorf("a gateway with a wrong key is answered %+v", got)
	}

	got := s.connecting(request("the-key", "upstream-2"))
	if !got.Accept {
		t.Fatal("the gateway is refused")
	}
	conn := &fakeConn{}
	got.ConnectionCallbacks.OnConnected(t.Context(), conn)
	got.ConnectionCallbacks.OnMessage(t.Context(), conn, fullReport(alice, 0))
	story.wantAgent("alice", agentView{connected: true, described: true, link: "upstream-2", health: "healthy", healthy: true, accepts: true, config: "none yet"})

	t.Run("pushes go out where the agent spoke last", func(t *testing.T) {
		s.pushNext()
		s.pushes.Wait()
		if len(conn.sent) != 1 || conn.sent[0].GetRemoteConfig() == nil {
			t.Errorf("sent %v, want one remote configuration", conn.sent)
		}
	})
	t.Run("an agent may come directly", func(t *testing.T) {
		got := s.connecting(request("the-key", ""))
		got.ConnectionCallbacks.OnConnected(t.Context(), &fakeConn{})
		got.ConnectionCallbacks.OnMessage(t.Context(), &fakeConn{}, fullReport(bob, 0))
		story.wantAgent("bob", agentView{connected: true, described: true, link: "direct", health: "healthy", healthy: true, config: "takes none"})
		if n := len(story.view().links); n != 1 {
			t.Errorf("%d links of the gateway, want 1", n)
		}
	})
	t.Run("a message of nobody", func(t *testing.T) {
		if a := s.message(&link{}, &protobufs.AgentToServer{}); a == nil {
			t.Error("no answer")
		}
		if n := len(story.view().agents); n != 2 {
			t.Errorf("%d agents, want alice and bob", n)
		}
	})
}
