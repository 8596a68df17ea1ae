package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/google/uuid"
	"github.com/open-telemetry/opamp-go/protobufs"
	"github.com/open-telemetry/opamp-go/server/types"
)

// A fleet is what the server knows: the connections it has, the agents that speak over
// them, and the configuration it wants these agents to have. It does no I/O: messages
// come in, answers go out.
type fleet struct {
	// Set once.
	now    func() time.Time
	report func(event) // called under mu: must neither block nor come back here

	// mu guards everything below, also inside the links and agents.
	mu      sync.Mutex
	links   map[*link]bool
	agents  map[string]*agent // by instance uid, as on the wire
	offer   *offer            // the latest configuration, nil before the first
	changed chan struct{}     // closed and replaced at each change
}

// A link is one WebSocket to the server. Behind a link of the gateway are many agents;
// an agent that connects directly has one of its own.
type link struct {
	name    string
	gateway bool
	conn    types.Connection // nil until the connection is up
}

func (l *link) String() string {
	if l.gateway {
		return l.name
	}
	return "a connection of its own"
}

type agent struct {
	uid      string
	name     string
	link     *link // the link of its last message, nil when it is gone
	lastSeen time.Time
	sequence uint64
	accepts  bool // takes remote configurations

	// As last reported; health is nil before the first report.
	described  bool
	health     *protobufs.ComponentHealth
	status     protobufs.RemoteConfigStatuses
	statusHash []byte
	effective  []byte

	ackedAt time.Time // when it acknowledged the latest offer, zero if it did not
}

// An offer is a remote configuration that all agents should have which accept any.
type offer struct {
	revision int
	body     []byte
	hash     []byte
	pushedAt time.Time
}

// configName is the one file in the demo's remote configurations.
const configName = "demo.yaml"

// An event is one line of what happened.
type event struct {
	at   time.Time
	who  string
	text string
	loud bool // something is wrong
}

func newFleet(now func() time.Time, report func(event)) *fleet {
	return &fleet{
		now:     now,
		report:  report,
		links:   map[*link]bool{},
		agents:  map[string]*agent{},
		changed: make(chan struct{}),
	}
}

// homes returns over which link each agent is connected, by UID.
func (f *fleet) homes() map[string]*link {
	f.mu.Lock()
	defer f.mu.Unlock()
	homes := map[string]*link{}
	for uid, a := range f.agents {
		if a.link != nil {
			homes[uid] = a.link
		}
	}
	return homes
}

// linkUp is called before any message of that link.
func (f *fleet) linkUp(l *link, conn types.Connection) {
	f.mu.Lock()
	defer f.mu.Unlock()
	l.conn = conn
	f.links[l] = true
	if l.gateway {
		f.happenedLocked("server", "link %s is up", l.name)
	}
	f.changedLocked()
}

// linkDown takes those agents for gone that spoke last over this link; others have moved on.
func (f *fleet) linkDown(l *link) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.links, l)
	if l.gateway {
		f.happenedLocked("server", "link %s is closed", l.name)
	}
	for _, a := range f.agents {
		if a.link == l {
			a.link = nil
			f.happenedLocked("agent", "%s is gone: its connection to the server ended without a goodbye", a.name)
		}
	}
	f.changedLocked()
}

// receive takes in one message of an agent and returns the answer.
func (f *fleet) receive(l *link, m *protobufs.AgentToServer) *protobufs.ServerToAgent {
	f.mu.Lock()
	defer f.mu.Unlock()
	defer f.changedLocked()

	uid := string(m.GetInstanceUid())
	a := f.agents[uid]
	known := a != nil
	if !known {
		a = &agent{uid: uid, name: shortUID(formatUID(uid))}
		f.agents[uid] = a
	}
	a.lastSeen = f.now()
	missed := known && m.GetSequenceNum() != a.sequence+1
	a.sequence = m.GetSequenceNum()

	f.describeLocked(a, m)
	answer := newAnswer(m.GetInstanceUid())
	if m.GetAgentDisconnect() != nil {
		if a.link != nil {
			f.happenedLocked("agent", "%s said goodbye", a.name)
		}
		a.link = nil
		return answer
	}

	arrived := a.link != l
	if arrived {
		if a.link == nil {
			f.happenedLocked("agent", "%s is connected over %s", a.name, l)
		} else {
			f.happenedLocked("agent", "%s moved from %s to %s", a.name, a.link, l)
		}
		a.link = l
	}
	f.statusLocked(a, m)

	// An agent whose story has a hole is asked to tell it again from the start.
	if missed || !known && !a.described {
		answer.Flags |= uint64(protobufs.ServerToAgentFlags_ServerToAgentFlags_ReportFullState)
	}
	// One that comes after the push, or comes back without having applied it, gets the
	// configuration with its answer.
	if arrived && f.offer != nil && a.accepts && !bytes.Equal(a.statusHash, f.offer.hash) {
		answer.RemoteConfig = f.offer.message()
	}
	return answer
}

func (f *fleet) describeLocked(a *agent, m *protobufs.AgentToServer) {
	if d := m.GetAgentDescription(); d != nil {
		a.described = true
		for _, kv := range d.GetIdentifyingAttributes() {
			if name := kv.GetValue().GetStringValue(); kv.GetKey() == "service.name" && name != "" {
				a.name = name
			}
		}
	}
	if caps := m.GetCapabilities(); caps != 0 {
		a.accepts = caps&uint64(protobufs.AgentCapabilities_AgentCapabilities_AcceptsRemoteConfig) != 0
	}
}

func (f *fleet) statusLocked(a *agent, m *protobufs.AgentToServer) {
	if h := m.GetHealth(); h != nil {
		before := healthWord(a.health)
		a.health = h
		if now := healthWord(h); now != before {
			f.happenedLocked("agent", "%s is %s%s", a.name, now, because(h.GetLastError()))
		}
	}
	if file, ok := m.GetEffectiveConfig().GetConfigMap().GetConfigMap()[configName]; ok {
		a.effective = file.GetBody()
	}
	if s := m.GetRemoteConfigStatus(); s != nil {
		changed := s.GetStatus() != a.status || !bytes.Equal(s.GetLastRemoteConfigHash(), a.statusHash)
		a.status, a.statusHash = s.GetStatus(), s.GetLastRemoteConfigHash()
		if changed && a.status != protobufs.RemoteConfigStatuses_RemoteConfigStatuses_UNSET {
			f.happenedLocked("agent", "%s reports configuration %s as %s%s", a.name, shortHash(a.statusHash), statusWord(a.status), because(s.GetErrorMessage()))
		}
	}
	if a.ackedAt.IsZero() && f.ackedLocked(a) {
		a.ackedAt = f.now()
		f.happenedLocked("agent", "%s acknowledged configuration %d: it runs with exactly what was pushed", a.name, f.offer.revision)
	}
}

// ackedLocked: it is not enough to say so, the effective configuration has to show it.
func (f *fleet) ackedLocked(a *agent) bool {
	return f.offer != nil &&
		a.status == protobufs.RemoteConfigStatuses_RemoteConfigStatuses_APPLIED &&
		bytes.Equal(a.statusHash, f.offer.hash) &&
		bytes.Equal(a.effective, f.offer.body)
}

// A push is one message to be sent, and where.
type push struct {
	conn    types.Connection
	message *protobufs.ServerToAgent
}

// offerNext makes up the next configuration. The pushes it returns are for the agents
// that are there now; others get it when they come.
func (f *fleet) offerNext() []push {
	f.mu.Lock()
	defer f.mu.Unlock()
	revision := 1
	if f.offer != nil {
		revision = f.offer.revision + 1
	}
	body := fmt.Appendf(nil, "# pushed by the demo's server through the gateway\nrevision: %d\n", revision)
	hash := sha256.Sum256(body)
	f.offer = &offer{revision: revision, body: body, hash: hash[:], pushedAt: f.now()}

	var pushes []push
	for _, a := range f.agents {
		a.ackedAt = time.Time{}
		if a.accepts && a.link != nil {
			m := newAnswer([]byte(a.uid))
			m.RemoteConfig = f.offer.message()
			pushes = append(pushes, push{a.link.conn, m})
		}
	}
	f.happenedLocked("server", "pushes configuration %d (%s) to %s", revision, shortHash(f.offer.hash), count(len(pushes), "agent"))
	f.changedLocked()
	return pushes
}

func (o *offer) message() *protobufs.AgentRemoteConfig {
	return &protobufs.AgentRemoteConfig{
		Config: &protobufs.AgentConfigMap{ConfigMap: map[string]*protobufs.AgentConfigFile{
			configName: {Body: o.body, ContentType: "text/yaml"},
		}},
		ConfigHash: o.hash,
	}
}

// newAnswer names the agent: on a shared link nothing else says whom a message is for.
func newAnswer(uid []byte) *protobufs.ServerToAgent {
	return &protobufs.ServerToAgent{
		InstanceUid: uid,
		Capabilities: uint64(protobufs.ServerCapabilities_ServerCapabilities_AcceptsStatus |
			protobufs.ServerCapabilities_ServerCapabilities_OffersRemoteConfig |
			protobufs.ServerCapabilities_ServerCapabilities_AcceptsEffectiveConfig),
	}
}

// serverEvent adds what the server has to tell that changes nothing here.
func (f *fleet) serverEvent(format string, args ...any) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.happenedLocked("server", format, args...)
}

func (f *fleet) happenedLocked(who, format string, args ...any) {
	f.report(event{at: f.now(), who: who, text: fmt.Sprintf(format, args...)})
}

func (f *fleet) changedLocked() {
	close(f.changed)
	f.changed = make(chan struct{})
}

// waitFor returns when the fleet is as wanted, or with the reason for which ctx ended.
func (f *fleet) waitFor(ctx context.Context, wanted func(fleetView) bool) error {
	for {
		f.mu.Lock()
		changed := f.changed
		f.mu.Unlock()
		if wanted(f.view()) {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// A fleetView is a fleet at one moment, for the screen and for conditions.
type fleetView struct {
	links  []linkView  // of the gateway only, by name
	agents []agentView // by name
	offer  *offerView  // nil before the first push
}

type linkView struct {
	name   string
	agents int
}

type agentView struct {
	uid       string // as on the wire
	name      string
	connected bool
	described bool
	link      string // empty when it is gone
	health    string
	healthy   bool
	lastSeen  time.Time
	accepts   bool
	acked     bool
	config    string // the column about the remote configuration
}

type offerView struct {
	revision int
	hash     string
	wanted   int           // connected agents that accept configurations
	acked    int           // those of them that have acknowledged this one
	took     time.Duration // from the push to the last acknowledgement
}

func (f *fleet) view() fleetView {
	f.mu.Lock()
	defer f.mu.Unlock()
	var v fleetView
	load := map[*link]int{}
	if f.offer != nil {
		v.offer = &offerView{revision: f.offer.revision, hash: shortHash(f.offer.hash)}
	}
	for _, a := range f.agents {
		av := agentView{
			uid: a.uid, name: a.name, connected: a.link != nil, described: a.described,
			health: healthWord(a.health), healthy: a.health.GetHealthy(), lastSeen: a.lastSeen,
			accepts: a.accepts, acked: f.ackedLocked(a), config: f.configWordLocked(a),
		}
		if a.link == nil {
			av.health, av.healthy = "gone", false
		} else {
			av.link = a.link.name
			load[a.link]++
		}
		if v.offer != nil && a.accepts && a.link != nil {
			v.offer.wanted++
			if av.acked {
				v.offer.acked++
				v.offer.took = max(v.offer.took, a.ackedAt.Sub(f.offer.pushedAt))
			}
		}
		v.agents = append(v.agents, av)
	}
	for l := range f.links {
		if l.gateway {
			v.links = append(v.links, linkView{l.name, load[l]})
		}
	}
	slices.SortFunc(v.agents, func(a, b agentView) int {
		return cmp.Or(cmp.Compare(a.name, b.name), cmp.Compare(a.uid, b.uid))
	})
	slices.SortFunc(v.links, func(a, b linkView) int { return cmp.Compare(a.name, b.name) })
	return v
}

func (v fleetView) connected() int {
	n := 0
	for _, a := range v.agents {
		if a.connected {
			n++
		}
	}
	return n
}

func (f *fleet) configWordLocked(a *agent) string {
	switch {
	case !a.accepts:
		return "takes none"
	case a.status != protobufs.RemoteConfigStatuses_RemoteConfigStatuses_UNSET && (f.offer == nil || bytes.Equal(a.statusHash, f.offer.hash)):
		return statusWord(a.status) + " " + shortHash(a.statusHash)
	case f.offer != nil && a.link != nil:
		return "pushed " + shortHash(f.offer.hash)
	default:
		return "none yet"
	}
}

func healthWord(h *protobufs.ComponentHealth) string {
	switch {
	case h == nil:
		return "unknown"
	case h.GetHealthy():
		return "healthy"
	default:
		return "unhealthy"
	}
}

func statusWord(s protobufs.RemoteConfigStatuses) string {
	switch s {
	case protobufs.RemoteConfigStatuses_RemoteConfigStatuses_APPLIED:
		return "APPLIED"
	case protobufs.RemoteConfigStatuses_RemoteConfigStatuses_APPLYING:
		return "APPLYING"
	case protobufs.RemoteConfigStatuses_RemoteConfigStatuses_FAILED:
		return "FAILED"
	default:
		return "UNSET"
	}
}

// formatUID writes a uid as people know it: 16 bytes are a UUID, others are text already.
func formatUID(uid string) string {
	if id, err := uuid.FromBytes([]byte(uid)); err == nil {
		return id.String()
	}
	return fmt.Sprintf("%+q", uid)
}

// shortUID keeps the end of a uid: the start is the time, alike for all that begin together.
func shortUID(uid string) string {
	if len(uid) <= 12 {
		return uid
	}
	return "…" + uid[len(uid)-12:]
}

func shortHash(hash []byte) string {
	return hex.EncodeToString(hash[:min(len(hash), 4)])
}

func because(reason string) string {
	if reason == "" {
		return ""
	}
	return ": " + reason
}

func count(n int, thing string) string {
	if n == 1 {
		return "1 " + thing
	}
	return fmt.Sprintf("%d %ss", n, thing)
}

// connections returns those that are open.
func (f *fleet) connections() []types.Connection {
	f.mu.Lock()
	defer f.mu.Unlock()
	var conns []types.Connection
	for l := range f.links {
		conns = append(conns, l.conn)
	}
	return conns
}
