package opampgateway

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"go.opentelemetry.io/collector/component"
	"go.opentelemetry.io/collector/component/componentstatus"
	"go.opentelemetry.io/collector/config/confighttp"
	"go.opentelemetry.io/collector/config/confignet"
	"go.uber.org/zap"
	"golang.org/x/net/netutil"

	"github.com/opampgateway/opampgateway/internal/monotonic"
	"github.com/opampgateway/opampgateway/internal/outbox"
	"github.com/opampgateway/opampgateway/internal/peer"
	"github.com/opampgateway/opampgateway/internal/socket"
	"github.com/opampgateway/opampgateway/internal/status"
	"github.com/opampgateway/opampgateway/internal/telemetry"
	"github.com/opampgateway/opampgateway/internal/wire"
)

const (
	// pageConnections bounds who looks at the status page at once, and pageHeader how much a request may say.
	pageConnections, pageHeader = 64, 16 << 10

	// heardWithin is how exact the time of an agent's last message is: what is noted for every message would cost.
	heardWithin = int64(100 * time.Millisecond)

	// maxErrorText is how much is shown of the error with which a link has ended, or was not dialed.
	maxErrorText = 300
	// memoryTight is how much of the memory may be in use before that is a problem, of all.
	memoryTight = 0.9
)

// statusPage is the HTTP server on which one component shows its gateway. It is the component's own: after a reload
// there is another one. A nil one is none.
type statusPage struct {
	// Set once.
	collector string // program and version
	scheme    string
	log       *zap.Logger
	listener  net.Listener
	server    *http.Server
	report    func(error)

	gateway *gateway // by serve, before anybody asks
	serving sync.WaitGroup
	stopped atomic.Bool
}

// newStatusPage does what can fail about the page, and takes its address; nil if none is configured.
func newStatusPage(ctx context.Context, e *gatewayExtension, host component.Host) (*statusPage, error) {
	if !e.cfg.Status.HasValue() {
		return nil, nil
	}
	cfg := *e.cfg.Status.Get() // ToServer changes its own
	p := &statusPage{
		collector: e.set.BuildInfo.Command + " " + e.set.BuildInfo.Version, scheme: "http", log: e.set.Logger,
		report: func(err error) { componentstatus.ReportStatus(host, componentstatus.NewRecoverableErrorEvent(err)) },
	}
	var secure *tls.Config
	var err error
	if cfg.TLS.HasValue() {
		if secure, err = cfg.TLS.Get().LoadTLSConfig(ctx); err != nil {
			return nil, fmt.Errorf("status::tls: %w", err)
		}
		secure.NextProtos = []string{"h2", "http/1.1"}
	}
	if p.server, err = cfg.ToServer(ctx, host.GetExtensions(), e.set.TelemetrySettings, status.NewHandler(p)); err != nil {
		return nil, fmt.Errorf("status: %w", err)
	}
	p.server.Handler = status.Guard(p.server.Handler, pageNames(&cfg))
	p.server.MaxHeaderBytes = pageHeader
	if p.listener, err = e.net(ctx, cfg.NetAddr); err != nil {
		return nil, fmt.Errorf("status::endpoint: %w", err)
	}
	p.listener = netutil.LimitListener(p.listener, pageConnections)
	if secure != nil {
		p.scheme, p.listener = "https", tls.NewListener(p.listener, secure)
	}
	warnOfPage(&cfg, e.set.Logger)
	return p, nil
}

// pageNames are those by which the page may be called, besides IP addresses and localhost: the host of its endpoint,
// this machine's name, and the hosts of the origins that are configured.
func pageNames(cfg *confighttp.ServerConfig) (names []string) {
	if cfg.NetAddr.Transport != confignet.TransportTypeUnix {
		if host, _, err := net.SplitHostPort(cfg.NetAddr.Endpoint); err == nil && host != "" {
			names = append(names, host)
		}
	}
	if name, err := os.Hostname(); err == nil {
		names = append(names, name)
	}
	if cors := cfg.CORS.Get(); cors != nil {
		for _, origin := range cors.AllowedOrigins {
			if u, err := url.Parse(origin); err == nil && u.Hostname() != "" {
				names = append(names, u.Hostname())
			}
		}
	}
	return names
}

// serve shows g.
func (p *statusPage) serve(g *gateway) {
	if p == nil {
		return
	}
	p.gateway = g
	p.log.Info("the status page is at " + p.scheme + "://" + p.listener.Addr().String() + "/")
	p.serving.Go(func() {
		if err := p.server.Serve(p.listener); !p.stopped.Load() {
			p.log.Error("the status page is gone", zap.Error(err))
			p.report(fmt.Errorf("status: %w", err))
		}
	})
}

// stop ends the page; its address is free from here on.
func (p *statusPage) stop() {
	if p == nil {
		return
	}
	p.stopped.Store(true)
	_ = p.server.Close() // the error concerns nobody any more
	_ = p.listener.Close()
	p.serving.Wait()
}

// Status returns all but the agents; the page calls it.
func (p *statusPage) Status() *status.Snapshot {
	g, c := p.gateway, status.NewClock()
	cfg, t := g.cfg.Load(), g.pool.target.Load()
	s := &status.Snapshot{
		Time: c.Now(), Links: g.linkStates(c), Rates: g.pool.seen.history.Rates(), Offenders: g.pool.seen.offenders.All(c),
		Suspects: g.suspects(c), Ended: g.pool.seen.ended.All(), Problems: []string{},
		Memory: status.Memory{
			Limit: g.memory.Limit(), InUse: g.memory.InUse(), Reading: g.memory.Reading(), Up: g.memory.Up.Held(),
			Down: g.memory.Down.Held(), Kept: g.memory.Kept.Held(), Requests: g.memory.Requests.Held(),
		},
		Gateway: status.Gateway{
			Name: t.name, Version: gatewayVersion(), Collector: p.collector, Server: socket.Place(t.endpoint), Endpoint: t.at,
			Listener: g.server.door.Addr().String(), Admission: g.pool.admissionInWords(t), Started: c.Time(g.began),
			LinksExpected: t.slots, InstanceUIDs: g.router.count(),
		},
	}
	s.Gateway.Agents, s.Gateway.Gateways = g.server.counts()
	for _, l := range s.Links {
		if l.State == status.StateConnected {
			s.Gateway.LinksUp++
		}
	}
	for _, r := range telemetry.Reasons {
		s.Faults = append(s.Faults, status.Count{Name: string(r.Reason), What: r.What, Count: g.tel.FaultCount(r.Reason)})
	}
	for _, o := range telemetry.Outcomes {
		s.Admissions = append(s.Admissions, status.Count{Name: string(o.Outcome), What: o.What, Count: g.tel.AdmissionCount(o.Outcome)})
	}
	s.Gateway.State, s.Problems = judgeState(s, cfg.Server.AgentAdmission == AdmissionAsk && t.asking.Deaf(time.Now()))
	return s
}

// judgeState tells how a gateway is, and what is wrong; deaf says whether its server is to be asked about agents, and
// cannot be.
func judgeState(s *status.Snapshot, deaf bool) (state status.State, problems []string) {
	state, problems = status.StateOK, []string{}
	for _, l := range s.Links {
		if l.State == status.StateConnected {
			continue
		}
		state = status.StateDegraded
		text := fmt.Sprintf("link %s has been %s for %s", l.Name, l.State, inWords(s.Time.Sub(l.Since)))
		if l.LastError != "" {
			text += ": " + l.LastError
		}
		problems = append(problems, text)
	}
	if s.Gateway.LinksUp == 0 {
		state = status.StateDown
		problems = slices.Insert(problems, 0, "there is no link to the server: no agent is relayed, and none is let in")
	}
	if s.Gateway.Endpoint != 0 {
		if state == status.StateOK {
			state = status.StateDegraded
		}
		problems = append(problems, "the first endpoint of the server cannot be reached; links go to "+s.Gateway.Server+" instead")
	}
	if deaf {
		if state == status.StateOK {
			state = status.StateDegraded
		}
		problems = append(problems, "the server cannot be asked about agents, so none is let in; see server::agent_admission")
	}
	if used := float64(s.Memory.InUse) / float64(s.Memory.Limit); used >= memoryTight {
		if state == status.StateOK {
			state = status.StateDegraded
		}
		problems = append(problems, fmt.Sprintf("%.0f %% of the memory for messages is in use, see max_buffered_size", 100*used))
	}
	return state, problems
}

// linkStates tells of each slot whether it has a link, and of that how it is.
func (g *gateway) linkStates(c status.Clock) []status.Link {
	p := g.pool
	type found struct {
		link    *link
		state   slotState
		agents  int
		leaving bool
	}
	p.mu.Lock()
	t := p.target.Load()
	all := make([]found, 0, len(p.live))
	for slot, l := range p.live {
		if l == nil && slot >= t.slots {
			continue // from before a reload with fewer
		}
		f := found{link: l, state: p.states[slot]}
		if l != nil {
			f.agents, f.leaving = len(l.agents), l.leaving
		}
		all = append(all, f)
	}
	p.mu.Unlock()
	links := make([]status.Link, len(all))
	for i, f := range all {
		s := status.Link{
			Slot: i, Name: t.linkName(i), Server: socket.Place(t.endpoint), State: status.StateConnecting, Since: c.Time(f.state.since), Agents: f.agents,
			LastError: f.state.failure, LastErrorAt: c.Maybe(f.state.failed),
		}
		if l := f.link; l != nil {
			s.Name, s.Server, s.State = l.target.linkName(l.slot), socket.Place(l.target.endpoint), status.StateConnected
			if f.leaving {
				s.State = status.StateLeaving
			}
			load := l.Outbox.Load()
			s.Rate, s.OnItsWay, s.OnItsWayBytes, s.WaitingBytes = l.meter.Rate(), load.OnItsWay, load.OnItsWayBytes, load.Waiting
			if l.posts != nil {
				waiting, busy := l.posts.Waiting()
				s.OnItsWay, s.WaitingBytes = busy, s.WaitingBytes+waiting
			}
			if took := l.ping.Load(); took != 0 {
				seconds := time.Duration(took).Seconds()
				s.PingSeconds = &seconds
			}
		}
		links[i] = s
	}
	return links
}

// Agents appends all agents to rows; the page calls it.
func (p *statusPage) Agents(rows []status.Row, uid wire.UID) []status.Row {
	g := p.gateway
	var holder *agentConn
	if uid != (wire.UID{}) {
		if c := g.router.find(uid.Bytes()); c != nil {
			holder = c.agent
		}
	}
	waiting := map[*outbox.Line[*claim]]int{}
	names := map[*link]string{}
	for _, l := range g.pool.links() {
		names[l] = l.target.linkName(l.slot)
		maps.Copy(waiting, l.Outbox.Load().Lines)
	}
	g.server.mu.Lock()
	agents := make([]*agentConn, 0, len(g.server.agents))
	for a := range g.server.agents {
		agents = append(agents, a)
	}
	g.server.mu.Unlock()
	rows = slices.Grow(rows, len(agents))
	for _, a := range agents {
		r := status.Row{
			Address: a.remote, UserAgent: a.userAgent.Value(), AgentID: a.agentID, Gateway: a.gateway, Holds: a == holder,
			Came: a.came, Heard: a.heard.Load(), MessagesUp: a.messages.Load(), BytesUp: a.Socket.Received(),
			WaitingUp: waiting[&a.line], WaitingDown: a.Outbox.Memory(), InstanceUIDs: int(a.many.Load()),
			Faults: uint32(a.faults.Load()), Link: names[a.link.Load()],
		}
		r.MessagesDown, r.BytesDown = a.Written()
		if c := a.speaking.Load(); c != nil {
			r.UID = c.route.uid
		}
		if r.Faults > 0 {
			r.LastFault = string(telemetry.Reasons[a.fault.Load()].Reason)
		}
		rows = append(rows, r)
	}
	return rows
}

// counts returns how many agents are connected, and how many of them are gateways.
func (s *downstreamServer) counts() (agents, gateways int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for a := range s.agents {
		if a.gateway {
			gateways++
		}
	}
	return len(s.agents), gateways
}

// count returns how many instance UIDs can be reached.
func (r *router) count() int {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return len(r.routes)
}

// suspects tells because of whose messages the server may have ended links, and where they are.
func (g *gateway) suspects(c status.Clock) []status.Suspect {
	found := g.pool.suspicion.Suspected()
	found = found[:min(len(found), status.MaxSuspects)]
	all := make([]status.Suspect, 0, len(found))
	for _, f := range found {
		s := status.Suspect{
			State: status.SuspicionOnTrial, UID: status.UID(f.UID), Since: c.At(f.Since), Until: c.At(f.Until),
			Text: "was speaking when the server ended a link; what it says is tried, each message between two pings",
		}
		switch {
		case f.TurnedDown:
			s.State = status.SuspicionTurnedDown
			s.Text = "the server has ended links when it read a message of this agent; nothing of it is relayed"
		case f.Large:
			s.Text = "was sending a large message when the server ended a link for the size of one; its large ones are tried, each between two pings"
		}
		if held := g.router.find(f.UID.Bytes()); held != nil {
			s.Address, s.UserAgent, s.AgentID = held.agent.remote, held.agent.userAgent.Value(), held.agent.agentID
		}
		all = append(all, s)
	}
	return all
}

// seen is what the status page shows of what is over.
type seen struct {
	history   status.History
	ended     status.Recent
	offenders status.Offenders
}

// takeSample keeps what has happened so far, if it is time for that.
func (g *gateway) takeSample() {
	history := &g.pool.seen.history
	if !history.Due() {
		return
	}
	links := g.pool.links()
	s := status.Sample{Agents: g.server.count(), Links: len(links), Memory: g.memory.InUse()}
	s.MessagesUp, s.BytesUp = g.tel.Up.Total()
	s.MessagesDown, s.BytesDown = g.tel.Down.Total()
	for _, r := range telemetry.Reasons {
		s.Faults += g.tel.FaultCount(r.Reason)
	}
	history.Take(s)
	for _, l := range links {
		up, upBytes := l.Written()
		l.meter.Take(status.Totals{
			MessagesUp: int64(up), BytesUp: int64(upBytes), MessagesDown: int64(l.messages.Load()), BytesDown: int64(l.received()),
		})
	}
}

// slotState is what is known of a slot beside its link.
type slotState struct {
	since   int64  // when its link has come up, or ended, of the monotonic clock
	failure string // why there was none last
	failed  int64  // when that was, of the monotonic clock; 0 for never
}

// noteFailure notes why a slot has no link.
func (p *upstreamPool) noteFailure(slot int, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	s := &p.states[slot]
	s.failure, s.failed = errorText(err), monotonic.Now()
}

// inWords is how a duration is told: to the second, and to the minute if that is all.
func inWords(d time.Duration) string {
	text := max(0, d).Round(time.Second).String()
	if minutes, ok := strings.CutSuffix(text, "m0s"); ok {
		return minutes + "m"
	}
	return text
}

// errorText is as much of an error as is shown.
func errorText(err error) string {
	text := err.Error()
	return text[:min(len(text), maxErrorText)]
}

// hears notes that a message has come, when it was taken.
func (a *agentConn) hears(taken int64) {
	a.messages.Add(1)
	if taken-a.heard.Load() >= heardWithin || a.heard.Load() == 0 {
		a.heard.Store(taken)
	}
}

// blame counts what went wrong because of the agent.
func (a *agentConn) blame(reason telemetry.Reason) {
	a.server.tel.Fault(reason)
	a.fault.Store(int32(telemetry.Index(reason)))
	a.faults.Add(1)
}

// offends notes that an agent is named, by the UID that it uses.
func (s *seen) offends(a *agentConn, uid wire.UID, o status.Offender) {
	o.UID, o.Address, o.UserAgent, o.AgentID = status.UID(uid), a.remote, a.userAgent.Value(), a.agentID
	s.offenders.Add(o)
}

// agentEnded notes that a's connection has ended; err is what reading it ended with.
func (s *seen) agentEnded(a *agentConn, err error) {
	e := status.Ended{
		Time: time.Now().UTC().Round(time.Millisecond), Kind: status.KindAgent, Name: status.UID(a.uid), Address: a.remote,
		UserAgent: a.userAgent.Value(), AgentID: a.agentID, Seconds: monotonic.Since(a.came).Seconds(),
	}
	if a.gateway {
		e.Kind = status.KindGateway
	}
	if cause := a.ending.End(); cause != nil {
		e.Why, e.Reason, e.ByGateway = cause.Text, string(cause.Reason), true
	} else {
		e.Why = howEnded("agent", err)
	}
	s.ended.Add(e)
}

// linkEnded notes that a link has ended.
func (s *seen) linkEnded(l *link, after time.Duration, err error) {
	e := status.Ended{
		Time: time.Now().UTC().Round(time.Millisecond), Kind: status.KindLink, Name: l.target.linkName(l.slot),
		Address: socket.HostPort(l.target.endpoint), Seconds: after.Seconds(), Reason: string(telemetry.ReasonLinkLost),
	}
	switch {
	case l.target.dialing.Err() != nil:
		e.Why, e.Reason, e.ByGateway = "the gateway is done with this server", "", true
	case l.givenUp.Load() && l.posts == nil:
		e.Why, e.Reason, e.ByGateway = "no sign of life from the server", string(telemetry.ReasonLinkSilent), true
	default:
		e.Why = howEnded("server", err)
	}
	s.ended.Add(e)
}

// howEnded tells how the other side has ended its connection. What it has written as a reason is not repeated.
func howEnded(who string, err error) string {
	code := peer.CloseCode(err)
	switch {
	case code != 0:
		return fmt.Sprintf("closed by the %s (%d)", who, code)
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return "ended by the " + who + " without a close frame"
	case err == nil:
		return "ended"
	}
	if op, ok := errors.AsType[*net.OpError](err); ok {
		err = op.Err // without the addresses
	}
	return "connection failed: " + errorText(err)
}
