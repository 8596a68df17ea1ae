package main

import (
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/open-telemetry/opamp-go/protobufs"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/opampgateway/opampgateway/e2e/fault"
)

var badRequest = &protobufs.ServerErrorResponse{
	ErrorMessage: "opampgateway: the server ended the connection at what this agent said",
	Type:         protobufs.ServerErrorResponseType_ServerErrorResponseType_BadRequest,
}

// poisonOf is the kind of poison that has this name.
func poisonOf(t *testing.T, name string) poisonKind {
	t.Helper()
	i := slices.IndexFunc(poisonKinds, func(k poisonKind) bool { return strings.HasPrefix(k.name, name) })
	require.GreaterOrEqual(t, i, 0)
	return poisonKinds[i]
}

// swallowed has the server end w at what the agent says now, which its gateway has written there.
func (tr *trial) swallowed(p *poison, w *way) {
	tr.t.Helper()
	said := tr.say(tr.epoch, 0, true)
	u := &tr.epoch.ups[said.number-1]
	u.written[0], u.writtenAt[0] = w, time.Now()
	got, _ := tr.doings(said)
	require.Same(tr.t, p, got)
	tr.endsAt(p, &serverConn{way: w})
	w.conn.Reset()
}

// judgeAt is the verdict on everything, at that time.
func (tr *trial) judgeAt(at time.Time) (kinds []string) {
	tr.judge(at)
	for _, f := range tr.findings {
		kinds = append(kinds, f.kind)
	}
	return kinds
}

func TestPoison(t *testing.T) {
	later := time.Now().Add(time.Minute)
	t.Run("its agent is told, and nothing more of it is relayed", func(t *testing.T) {
		tr := newTrial(t)
		p := tr.startPoison(tr.epoch.actor, poisonOf(t, "1008"))
		tr.swallowed(p, tr.link())
		tr.swallowed(p, tr.link())
		tr.turnedDown(tr.epoch, badRequest)
		tr.link()
		tr.says(nil, false)
		tr.turnedDown(tr.epoch, badRequest)
		assert.Empty(t, tr.judgeAt(later), "%+v", tr.findings)
		assert.Equal(t, 2, tr.counts["links that the server ended at a poison"])
		assert.Equal(t, 2, tr.counts["lost up, a poison"])
		assert.Equal(t, 1, tr.counts["lost up, turned down, of an agent with a poison"])
	})
	t.Run("it costs more links than it may", func(t *testing.T) {
		tr := newTrial(t)
		p := tr.startPoison(tr.epoch.actor, poisonOf(t, "1008"))
		for range 3 + besideOthers {
			tr.swallowed(p, tr.link())
		}
		tr.turnedDown(tr.epoch, badRequest)
		assert.Equal(t, []string{"poison"}, tr.judgeAt(later))
	})
	t.Run("it costs three links, without a close frame", func(t *testing.T) {
		tr := newTrial(t)
		p := tr.startPoison(tr.epoch.actor, poisonOf(t, "no close frame"))
		for range 3 {
			tr.swallowed(p, tr.link())
		}
		tr.turnedDown(tr.epoch, badRequest)
		assert.Empty(t, tr.judgeAt(later), "%+v", tr.findings)
	})
	t.Run("it costs four links, and the gateway was reloaded meanwhile", func(t *testing.T) {
		tr := newTrial(t)
		p := tr.startPoison(tr.epoch.actor, poisonOf(t, "1008"))
		for range 2 {
			tr.swallowed(p, tr.link())
		}
		tr.turnedDown(tr.epoch, badRequest)
		tr.gateway.disturbed = []disturbance{{time.Now(), syscall.SIGHUP}}
		for range 2 {
			tr.swallowed(p, tr.link())
		}
		assert.Empty(t, tr.judgeAt(later), "%+v", tr.findings)
	})
	t.Run("nobody tells its agent", func(t *testing.T) {
		tr := newTrial(t)
		p := tr.startPoison(tr.epoch.actor, poisonOf(t, "1008"))
		for range 2 {
			tr.swallowed(p, tr.link())
		}
		assert.Equal(t, []string{"poison"}, tr.judgeAt(later))
	})
	t.Run("what its agent says then is relayed", func(t *testing.T) {
		tr := newTrial(t)
		p := tr.startPoison(tr.epoch.actor, poisonOf(t, "1008"))
		for range 2 {
			tr.swallowed(p, tr.link())
		}
		tr.turnedDown(tr.epoch, badRequest)
		tr.says(tr.link(), true)
		assert.Equal(t, []string{"poison"}, tr.judgeAt(later))
	})
	t.Run("what its agent says then is dropped, and nobody says so", func(t *testing.T) {
		tr := newTrial(t)
		p := tr.startPoison(tr.epoch.actor, poisonOf(t, "1008"))
		for range 2 {
			tr.swallowed(p, tr.link())
		}
		tr.turnedDown(tr.epoch, badRequest)
		tr.link()
		tr.says(nil, false)
		assert.Equal(t, []string{"lost"}, tr.judgeAt(later))
	})
	t.Run("another agent is told", func(t *testing.T) {
		tr := newTrial(t)
		bystander := tr.open(tr.addActor(tr.join(), false), tr.gateway)
		tr.startPoison(tr.epoch.actor, poisonOf(t, "1008"))
		tr.turnedDown(bystander, badRequest)
		require.Len(t, tr.findings, 1)
		assert.Equal(t, "wrongly told", tr.findings[0].kind)
	})
	t.Run("its agent is told long afterwards", func(t *testing.T) {
		tr := newTrial(t)
		p := tr.startPoison(tr.epoch.actor, poisonOf(t, "1008"))
		tr.endPoison(p)
		tr.turnedDown(tr.epoch, badRequest)
		assert.Empty(t, tr.findings)
		p.to = time.Now().Add(-refusedFor)
		tr.turnedDown(tr.epoch, badRequest)
		assert.Len(t, tr.findings, 1)
	})
	t.Run("it comes to a link that has ended already", func(t *testing.T) {
		tr := newTrial(t)
		p := tr.startPoison(tr.epoch.actor, poisonOf(t, "1008"))
		w := tr.link()
		tr.hitWay(tr.gateway, w.conn, "was reset")
		w.conn.Reset()
		tr.swallowed(p, w)
		assert.Empty(t, p.ends)
	})
	t.Run("only the full state is one, but where the agent is not wanted", func(t *testing.T) {
		for name, any := range map[string]bool{"1008": false, "1000": true} {
			tr := newTrial(t)
			p := tr.startPoison(tr.epoch.actor, poisonOf(t, name))
			got, _ := tr.doings(tr.say(tr.epoch, 0, false))
			assert.Equal(t, any, got == p, name)
			state := tr.say(tr.epoch, 0, true)
			got, _ = tr.doings(state)
			assert.Same(t, p, got, name)
			tr.endPoison(p)
			got, _ = tr.doings(state)
			assert.Nil(t, got, "it is over")
		}
	})
	t.Run("it is large where the server takes no large messages", func(t *testing.T) {
		tr := newTrial(t)
		tr.startPoison(tr.epoch.actor, poisonOf(t, "1009"))
		assert.EqualValues(t, 10, tr.say(tr.epoch, 10, false).size)
		assert.Greater(t, int(tr.say(tr.epoch, 10, true).size), maxMessage)
	})
}

func TestNames(t *testing.T) {
	tr := newTrial(t)
	p := tr.startPoison(tr.epoch.actor, poisonOf(t, "1008"))
	bystander := tr.join().uids[0].String()
	for range 2 {
		tr.swallowed(p, tr.link())
	}
	tr.turnedDown(tr.epoch, badRequest)
	line := func(agent string) string {
		return "2026-11-27T00:00:00Z\twarn\tsuspects.go:1\tserver ends the connection when it reads a message of this agent, so\t" +
			"{\"link\": \"a\", \"agent\": \"" + agent + "\", \"bytes\": 7}\n"
	}
	tr.gateway.names = blames(strings.NewReader("a\twarn\tother\t{\"agent\": \"" + bystander + "\"}\n"))
	tr.judgeNames([]*gateway{tr.gateway})
	require.Len(t, tr.findings, 1, "nobody is named")
	assert.Equal(t, "poison", tr.findings[0].kind)

	tr.gateway.names = blames(strings.NewReader(line(p.actor.member.uids[0].String())))
	tr.judgeNames([]*gateway{tr.gateway})
	require.Len(t, tr.findings, 1, "the right one is named")

	tr.gateway.names = blames(strings.NewReader(line(p.actor.member.uids[0].String()) + line(bystander)))
	tr.judgeNames([]*gateway{tr.gateway})
	require.Len(t, tr.findings, 2, "another is named")
	assert.Equal(t, "wrongly told", tr.findings[1].kind)
}

// beside has an agent flood the link w for a minute, and another say something on it ten times a second,
// which takes so long; it returns the connection of that one.
func (tr *trial) beside(w *way, takes func(i int) time.Duration) *epoch {
	start := time.Now()
	f := tr.startFlood(tr.epoch.actor, true)
	e := tr.open(tr.addActor(tr.join(), false), tr.gateway)
	tr.letIn(e)
	e.opened = start
	e.askings[0] = []asking{{w, start}}
	for i := range 600 {
		at := start.Add(time.Duration(i+1) * time.Second / 10)
		e.ups = append(e.ups, up{said: at, heard: &segment{}, heardAt: at.Add(takes(i))})
	}
	tr.endFlood(f)
	f.to = start.Add(time.Minute)
	return e
}

func TestKeptWaiting(t *testing.T) {
	judged := func(tr *trial) []finding {
		tr.mu.Lock()
		defer tr.mu.Unlock()
		tr.judgeFloodLocked(tr.floods[0], time.Now().Add(2*time.Minute))
		return tr.findings
	}
	always := func(d time.Duration) func(int) time.Duration { return func(int) time.Duration { return d } }
	t.Run("not at all", func(t *testing.T) {
		tr := newTrial(t)
		tr.beside(tr.link(), always(keptWaiting/10))
		assert.Empty(t, judged(tr))
		assert.InDelta(t, 600, tr.counts["messages said beside a flood"], 1)
	})
	t.Run("all", func(t *testing.T) {
		tr := newTrial(t)
		tr.beside(tr.link(), always(2*keptWaiting))
		assert.Len(t, judged(tr), 1)
	})
	t.Run("five of one agent", func(t *testing.T) {
		tr := newTrial(t)
		tr.beside(tr.link(), func(i int) time.Duration { return time.Duration(min(1, max(0, 5-i))) * 2 * keptWaiting })
		assert.Empty(t, judged(tr))
	})
	t.Run("on another link", func(t *testing.T) {
		tr := newTrial(t)
		other := tr.link()
		tr.link()
		tr.beside(other, always(2*keptWaiting))
		tr.epoch.askings[0] = tr.epoch.askings[0][1:]
		assert.Empty(t, judged(tr))
	})
	t.Run("until the link was lost, soon", func(t *testing.T) {
		tr := newTrial(t)
		w := tr.link()
		e := tr.beside(w, always(2*keptWaiting))
		w.hit, w.hitAt = "was reset", e.ups[0].said.Add(time.Second)
		assert.Empty(t, judged(tr))
	})
	t.Run("behind a line in a black hole", func(t *testing.T) {
		tr := newTrial(t)
		e := tr.beside(tr.link(), always(2*keptWaiting))
		e.touched = e.ups[0].said
		assert.Empty(t, judged(tr))
	})
	t.Run("until the link was lost, late", func(t *testing.T) {
		tr := newTrial(t)
		w := tr.link()
		e := tr.beside(w, always(time.Minute))
		w.hit, w.hitAt = "was reset", e.ups[0].said.Add(2*keptWaiting)
		assert.Len(t, judged(tr), 1)
	})
	t.Run("while the gateway was reloaded", func(t *testing.T) {
		tr := newTrial(t)
		e := tr.beside(tr.link(), always(2*keptWaiting))
		for i := range e.ups {
			tr.gateway.disturbed = append(tr.gateway.disturbed, disturbance{e.ups[i].said.Add(time.Second / 20), syscall.SIGHUP})
		}
		assert.Empty(t, judged(tr))
	})
}

func TestLimitFrame(t *testing.T) {
	for name, test := range map[string]struct {
		limited bool
		size    int
		found   int
	}{
		"a large one":                  {true, frameLimit + 1, 1},
		"the largest":                  {true, frameLimit, 0},
		"a large one, and none limits": {false, frameLimit + 1, 0},
	} {
		t.Run(name, func(t *testing.T) {
			tr := newTrial(t)
			w := tr.link()
			tr.gateway.limited.Store(test.limited)
			for range 2 {
				tr.limitFrame(tr.gateway, tr.gateway, w, test.size)
			}
			assert.Len(t, tr.findings, test.found)
			assert.Equal(t, test.found > 0, w.lost())
			assert.Equal(t, test.found > 0, w.conn.End().By == fault.Fault)
		})
	}
}
