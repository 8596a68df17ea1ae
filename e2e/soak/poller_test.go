package main

import (
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// newPollTrial is newTrial with an agent over plain HTTP, on a link.
func newPollTrial(t *testing.T) (*trial, *way) {
	t.Helper()
	tr := newTrial(t)
	tr.epoch.actor.member.polls = true
	w := tr.link()
	return tr, w
}

// TestLostPoll excuses what was said by a poll, and never written, only when its gateway was ended soon after; the agent
// goes on without noticing.
func TestLostPoll(t *testing.T) {
	for name, test := range map[string]struct {
		signal syscall.Signal
		after  time.Duration // from what was said to the end of its gateway
		excuse string
	}{
		"nothing has happened":                   {},
		"its gateway was killed":                 {syscall.SIGKILL, time.Millisecond, "lost up, with a gateway that was killed, of a poll"},
		"its gateway was killed before":          {syscall.SIGKILL, -time.Millisecond, ""},
		"its gateway was killed much later":      {syscall.SIGKILL, time.Minute, ""},
		"its gateway was reloaded, and had time": {syscall.SIGHUP, 10 * time.Second, ""},
	} {
		t.Run(name, func(t *testing.T) {
			tr, w := newPollTrial(t)
			tr.says(w, true)
			tr.says(nil, false)
			if test.signal != 0 {
				tr.gateway.disturbed = []disturbance{{tr.epoch.ups[1].said.Add(test.after), test.signal}}
			}
			tr.says(w, true)
			if test.excuse != "" {
				tr.want(0, map[string]int{test.excuse: 1})
			} else {
				tr.want(1, map[string]int{})
			}
		})
	}
}

// TestRepeatedPoll takes what arrives twice for a duplicate, unless the agent had no answer to the poll that said it.
func TestRepeatedPoll(t *testing.T) {
	for name, failed := range map[string]bool{"answered": false, "without an answer": true} {
		t.Run(name, func(t *testing.T) {
			tr, w := newPollTrial(t)
			said := tr.say(tr.epoch, 0, false)
			uid := tr.epoch.actor.member.uids[0]
			c := tr.epoch.segments[0].conn
			require.Equal(t, w, c.way)
			tr.arrived(c, said, uid, false)
			if failed {
				tr.pollFailed(tr.epoch, true)
				tr.sayAgain(tr.epoch)
			}
			tr.arrived(c, said, uid, false)
			if failed {
				require.Empty(t, tr.findings)
				require.Equal(t, 1, tr.counts["repeated after a poll had no answer"])
			} else {
				require.Len(t, tr.findings, 1)
				require.Equal(t, "duplicated", tr.findings[0].kind)
			}
		})
	}
}

// TestStateOfAbsent wants no full state of an agent while it does not poll.
func TestStateOfAbsent(t *testing.T) {
	for name, test := range map[string]struct {
		from, to time.Duration // of its absence, from the time when the server was asked about it
		missing  bool
	}{
		"was there all the time": {-2 * time.Hour, -time.Hour, true},
		"had just gone":          {time.Second, time.Minute, false},
		"came back later":        {-time.Second, time.Minute, false},
		"went much later":        {time.Minute, 2 * time.Minute, true},
	} {
		t.Run(name, func(t *testing.T) {
			tr, _ := newPollTrial(t)
			asked := tr.epoch.segments[0].asked
			tr.epoch.absences = []absence{{asked.Add(test.from), asked.Add(test.to)}}
			tr.mu.Lock()
			tr.judgeStateLocked(tr.epoch, asked.Add(time.Hour))
			tr.mu.Unlock()
			require.Len(t, tr.findings, map[bool]int{true: 1, false: 0}[test.missing])
		})
	}
}

// TestLostAnswer excuses what the server said and no agent has heard if a poll had no answer soon after.
func TestLostAnswer(t *testing.T) {
	for name, failed := range map[string]bool{"all polls were answered": false, "a poll was not": true} {
		t.Run(name, func(t *testing.T) {
			tr, w := newPollTrial(t)
			tr.says(w, true)
			m := tr.epoch.actor.member
			tr.tell(tr.epoch.segments[0], 0, m.uids[0])
			if failed {
				tr.pollFailed(tr.epoch, false)
			}
			second := tr.tell(tr.epoch.segments[0], 0, m.uids[0])
			tr.heard(tr.epoch, second, m.uids[0][:])
			tr.mu.Lock()
			tr.judgeDownLocked(m)
			tr.mu.Unlock()
			require.Len(t, tr.findings, map[bool]int{true: 0, false: 1}[failed])
		})
	}
}
