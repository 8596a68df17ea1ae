package main

import (
	"net"
	"syscall"
	"testing"
	"time"

	"github.com/open-telemetry/opamp-go/protobufs"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/opampgateway/opampgateway/e2e/fault"
)

// trial is a book with one agent of one gateway in it, which is behind a real line.
type trial struct {
	*ledger
	t       *testing.T
	gateway *gateway
	epoch   *epoch
}

func newTrial(t *testing.T) *trial {
	t.Helper()
	server, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	t.Cleanup(func() { server.Close() })
	l, g := newLedger(), &gateway{name: "direct"}
	g.up, err = fault.OpenTapped(server.Addr().String(), l.tap(g))
	require.NoError(t, err)
	t.Cleanup(g.up.Close)
	e := l.open(l.addActor(l.join(), false), g)
	l.letIn(e)
	return &trial{l, t, g, e}
}

// link opens another link, on which the server is asked about the agent.
func (tr *trial) link() *way {
	tr.t.Helper()
	ways := func() []*way {
		tr.mu.Lock()
		defer tr.mu.Unlock()
		return tr.gateway.ways
	}
	known := len(ways())
	conn, err := net.Dial("tcp", tr.gateway.up.Address())
	require.NoError(tr.t, err)
	tr.t.Cleanup(func() { conn.Close() })
	require.Eventually(tr.t, func() bool { return len(ways()) > known && len(tr.gateway.up.Conns()) > 0 }, 10*time.Second, time.Millisecond)
	w := ways()[known]
	tr.epoch.askings[0] = append(tr.epoch.askings[0], asking{w, time.Now()})
	tr.asked(tr.epoch, &serverConn{name: "link", number: known + 1, way: w})
	return w
}

// says has the agent say something, which its gateway writes on w unless that is nil; it may be heard.
func (tr *trial) says(w *way, heard bool) {
	said := tr.say(tr.epoch, 0, false)
	u := &tr.epoch.ups[said.number-1]
	if w != nil {
		u.written[0], u.writtenAt[0] = w, time.Now()
	}
	if heard {
		u.heard = tr.epoch.segments[len(tr.epoch.segments)-1]
	}
}

func (tr *trial) want(lost int, excuses map[string]int) {
	tr.t.Helper()
	tr.mu.Lock()
	tr.judgeUpLocked(tr.epoch)
	tr.mu.Unlock()
	assert.Len(tr.t, tr.findings, lost, "%+v", tr.findings)
	delete(tr.counts, "said by agents")
	assert.Equal(tr.t, excuses, tr.counts)
}

func TestLostUp(t *testing.T) {
	t.Run("into a black hole, and the gateway was reloaded before the agent spoke again", func(t *testing.T) {
		tr := newTrial(t)
		w := tr.link()
		tr.says(w, true)
		tr.hitWay(tr.gateway, w.conn, "was in a black hole")
		w.conn.Swallow()
		tr.says(w, false)
		tr.link()
		tr.gateway.disturbed = []disturbance{{time.Now(), syscall.SIGHUP}}
		tr.close(tr.epoch, "1012", false, false)
		tr.want(0, map[string]int{"lost up, with a link that was in a black hole": 1})
	})
	t.Run("forgotten while there was no link", func(t *testing.T) {
		tr := newTrial(t)
		w := tr.link()
		tr.hitWay(tr.gateway, w.conn, "was reset")
		w.conn.Reset()
		tr.says(nil, false)
		tr.says(tr.link(), true)
		tr.want(1, map[string]int{})
	})
	t.Run("just before a cut", func(t *testing.T) {
		tr := newTrial(t)
		w := tr.link()
		tr.says(nil, false)
		tr.hitWay(tr.gateway, w.conn, "was reset")
		w.conn.Reset()
		tr.says(tr.link(), true)
		tr.want(0, map[string]int{"lost up, in the last moment before a link was cut": 1})
	})
	t.Run("before something that arrived on the same link", func(t *testing.T) {
		tr := newTrial(t)
		w := tr.link()
		tr.says(w, false)
		tr.says(nil, false)
		tr.says(w, true)
		tr.hitWay(tr.gateway, w.conn, "was reset")
		w.conn.Reset()
		tr.want(2, map[string]int{})
	})
	t.Run("written, and the link lives", func(t *testing.T) {
		tr := newTrial(t)
		tr.says(tr.link(), false)
		tr.want(1, map[string]int{})
	})
	t.Run("never written, and the agent is connected", func(t *testing.T) {
		tr := newTrial(t)
		tr.link()
		tr.says(nil, false)
		tr.want(1, map[string]int{})
	})
	t.Run("never written, and the gateway was reloaded", func(t *testing.T) {
		for _, flooding := range []bool{false, true} {
			tr := newTrial(t)
			tr.link()
			excuses := map[string]int{}
			if flooding {
				tr.startFlood(tr.epoch.actor, true)
				excuses["lost up, with a gateway that was reloaded, of a flood"] = 1
			}
			tr.epoch.askings[0][0].at = time.Now().Add(-time.Minute)
			tr.says(nil, false)
			tr.gateway.disturbed = []disturbance{{time.Now(), syscall.SIGHUP}}
			tr.close(tr.epoch, "1012", false, false)
			tr.want(1-len(excuses), excuses)
		}
	})
	t.Run("the last before a kill", func(t *testing.T) {
		tr := newTrial(t)
		tr.link()
		tr.says(nil, false)
		tr.close(tr.epoch, "killed", true, false)
		tr.want(0, map[string]int{"lost up, with an agent's connection": 1})
	})
}

// rival has another program speak as the trial's agent, by a gateway below that of the agent, or, if not
// below, by the same.
func (tr *trial) rival(below bool) *epoch {
	tr.t.Helper()
	g := tr.gateway
	if below {
		g = &gateway{name: "lower", above: tr.gateway}
	}
	e := tr.open(tr.addActor(tr.epoch.actor.member, true), g)
	tr.letIn(e)
	return e
}

func TestTurnedDown(t *testing.T) {
	inUse := &protobufs.ServerErrorResponse{ErrorMessage: "opampgateway: this instance UID is in use by another agent"}
	const counted, lost = "turned down, of an agent or its clone", "lost up, turned down, of an agent or its clone"
	t.Run("while another speaks as the agent, below", func(t *testing.T) {
		tr := newTrial(t)
		w := tr.link()
		tr.rival(true)
		tr.says(nil, false)
		tr.turnedDown(tr.epoch, inUse)
		tr.says(w, true)
		tr.want(0, map[string]int{counted: 1, lost: 1})
	})
	t.Run("once, and two are lost", func(t *testing.T) {
		tr := newTrial(t)
		w := tr.link()
		tr.rival(true)
		tr.says(nil, false)
		tr.says(nil, false)
		tr.turnedDown(tr.epoch, inUse)
		tr.says(w, true)
		tr.want(1, map[string]int{counted: 1, lost: 1})
	})
	t.Run("before what is lost", func(t *testing.T) {
		tr := newTrial(t)
		w := tr.link()
		tr.rival(true)
		tr.turnedDown(tr.epoch, inUse)
		tr.says(nil, false)
		tr.says(w, true)
		tr.want(1, map[string]int{counted: 1})
	})
	t.Run("what was written, and the link lives", func(t *testing.T) {
		tr := newTrial(t)
		tr.rival(true)
		tr.says(tr.link(), false)
		tr.turnedDown(tr.epoch, inUse)
		tr.want(1, map[string]int{counted: 1})
	})
	t.Run("while another with the same credentials speaks as the agent", func(t *testing.T) {
		tr := newTrial(t)
		tr.rival(false)
		tr.turnedDown(tr.epoch, inUse)
		tr.want(1, map[string]int{})
	})
	t.Run("long after the other has left", func(t *testing.T) {
		tr := newTrial(t)
		tr.rival(true).ended = time.Now().Add(-deniedAfter)
		tr.turnedDown(tr.epoch, inUse)
		tr.want(1, map[string]int{})
	})
	t.Run("for another reason", func(t *testing.T) {
		tr := newTrial(t)
		tr.rival(true)
		tr.turnedDown(tr.epoch, &protobufs.ServerErrorResponse{ErrorMessage: "opampgateway: no"})
		tr.want(1, map[string]int{})
	})
}
