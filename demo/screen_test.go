package main

import (
	"bytes"
	"errors"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/open-telemetry/opamp-go/protobufs"
)

// The pool of one link with alice healthy and bob gone.
func tableStory(t *testing.T) *story {
	t.Helper()
	s := newStory(t)
	l := s.gatewayLink("upstream-0")
	s.receive(l, fullReport(alice, 0))
	s.receive(l, acknowledgement(alice, 1, s.offerNext()[0].message.GetRemoteConfig()))
	s.receive(l, fullReport(bob, 0))
	goodbye := heartbeatOf(bob, 1)
	goodbye.AgentDisconnect = &protobufs.AgentDisconnect{}
	s.receive(l, goodbye)
	s.clock = s.clock.Add(12500 * time.Millisecond)
	return s
}

func TestAgentTable(t *testing.T) {
	s := tableStory(t)
	got := strings.Join(agentTable(s.view().agents, s.clock, 0, false), "\n")
	want := strings.TrimPrefix(`
  AGENT  HEALTH   INSTANCE UID                          LINK        LAST SEEN  REMOTE CONFIG
  alice  healthy  616c6963-652d-2d2d-2d2d-2d2d2d2d2d2d  upstream-0  12s ago    APPLIED 50eb1782
  bob    gone     626f622d-2d2d-2d2d-2d2d-2d2d2d2d2d2d  -           12s ago    takes none`, "\n")
	if got != want {
		t.Errorf("the table is\n%s\nwant\n%s", got, want)
	}

	t.Run("uids are shortened for a narrow terminal", func(t *testing.T) {
		got := strings.Join(agentTable(s.view().agents, s.clock, 80, false), "\n")
		want := strings.TrimPrefix(`
  AGENT  HEALTH   INSTANCE UID   LINK        LAST SEEN  REMOTE CONFIG
  alice  healthy  …2d2d2d2d2d2d  upstream-0  12s ago    APPLIED 50eb1782
  bob    gone     …2d2d2d2d2d2d  -           12s ago    takes none`, "\n")
		if got != want {
			t.Errorf("the table is\n%s\nwant\n%s", got, want)
		}
	})
	t.Run("no line is wider than the terminal", func(t *testing.T) {
		for width := 1; width < 100; width++ {
			for _, line := range agentTable(s.view().agents, s.clock, width, false) {
				if n := utf8.RuneCountInString(line); n > width {
					t.Fatalf("at width %d a line has %d characters: %q", width, n, line)
				}
			}
		}
	})
	t.Run("colours change no position", func(t *testing.T) {
		for _, width := range []int{0, 50, 80} {
			without := strings.Join(agentTable(s.view().agents, s.clock, width, false), "\n")
			with := strings.Join(agentTable(s.view().agents, s.clock, width, true), "\n")
			if !strings.Contains(with, "\x1b[32mhealthy\x1b[0m") {
				t.Errorf("no green in %q", with)
			}
			for _, c := range []style{bold, dim, red, green, yellow} {
				with = strings.ReplaceAll(with, "\x1b["+string(c)+"m", "")
			}
			if with = strings.ReplaceAll(with, "\x1b[0m", ""); with != without {
				t.Errorf("with colours\n%s\nwithout\n%s", with, without)
			}
		}
	})
}

func TestSummary(t *testing.T) {
	s := tableStory(t)
	m := &gatewayMetrics{links: 1, agents: 1, messagesUp: 5, bytesUp: 2048, messagesDown: 4, bytesDown: 100}
	lines := summarize(s.view(), s.clock, places{gateway: "ws://g (pid 1)", server: "ws://s"}, m, 0, false)
	got := strings.Join(lines[:7], "\n")
	want := strings.TrimPrefix(`
  agents         1 connected, all through the gateway
  links          1 up, with agents: upstream-0 1
  gateway        ws://g (pid 1)
  server         ws://s
  remote config  1 (50eb1782) acknowledged by 1 of 1 agent after 0s
  gateway counts 1 agent + 1 link, messages: 5 up (2.0 KiB), 4 down (100 B)
`, "\n")
	if got != want {
		t.Errorf("the summary is\n%s\nwant\n%s", got, want)
	}
}

func TestScreenWithoutTerminal(t *testing.T) {
	var out bytes.Buffer
	s := newScreen(&out, nil, false)
	s.show(func(int, int) []string { return []string{"a frame"} })
	s.happened(event{at: time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC), who: "agent", text: "alice is healthy", loud: true})
	if err := s.step("opening", func() (string, error) { return "wide", nil }); err != nil {
		t.Error(err)
	}
	err := s.step("closing", func() (string, error) { return "", errors.New("stuck") })
	if err == nil || err.Error() != "closing: stuck" {
		t.Errorf("the step failed with %v", err)
	}
	s.close()
	want := "  03:04:05  agent    alice is healthy\nopening … ok (0s): wide\nclosing … failed (0s)\n"
	if got := out.String(); got != want {
		t.Errorf("the output is\n%q, want\n%q", got, want)
	}
}

func TestScreenWithTerminal(t *testing.T) {
	s := &screen{size: func() (int, int) { return 80, 24 }, wake: make(chan struct{}, 1)}
	want := func(frame []string, want string) {
		t.Helper()
		if got := s.next(frame); got != want {
			t.Errorf("written %q, want %q", got, want)
		}
	}
	s.say("first")
	want([]string{"one", "two"}, "first\none\ntwo\n")
	want([]string{"three"}, "\r\x1b[2A\x1b[Jthree\n")
	s.say("second")
	s.enterPressed()
	want([]string{"four"}, "\r\x1b[2A\x1b[Jsecond\nfour\n")
	want(nil, "\r\x1b[1A\x1b[J")
	want(nil, "")
}
