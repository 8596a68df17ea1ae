package opampgateway

import (
	"context"
	"net"
	"os"
	"os/signal"
	"reflect"
	"slices"
	"sync"
	"syscall"
	"time"

	"go.opentelemetry.io/collector/component"
	"go.uber.org/zap"
)

// A collector that reloads shuts every component down and makes new ones in the same process. So Shutdown parks the
// running gateway, with its listener, agents and links, and the next Start of a component with the same ID takes it
// over. What nobody takes over is ended after the reload grace.

// parked is where gateways wait for the next component: all that the components of one process share.
var parked = parkingLot{places: map[component.ID]*place{}}

// parkingLot holds gateways between two components. Each gateway belongs to exactly one: to a component that
// was started and not shut down, to the lot, or to whoever has taken it out of the lot. Taking it out is the only
// decision, so that whoever does is alone in going on with it, or in ending it.
type parkingLot struct {
	mu     sync.Mutex
	places map[component.ID]*place
}

// keepPort is how long a parked gateway keeps its port: a reload mostly takes less, and if nobody takes over, somebody
// else may want it.
const keepPort = 2 * time.Second

// place is where one gateway is parked.
type place struct {
	gateway *gateway
	port    *time.Timer // gives its port back
	timer   *time.Timer // ends it
}

// put parks g for the time of grace, after which it ends. It returns the gateway that was there, which the
// caller has to end.
func (l *parkingLot) put(id component.ID, g *gateway, grace time.Duration) (before *gateway) {
	l.mu.Lock()
	defer l.mu.Unlock()
	before = l.takeLocked(id, l.places[id])
	p := &place{gateway: g}
	p.port = time.AfterFunc(keepPort, func() { l.givePort(id, p) })
	p.timer = time.AfterFunc(grace, func() { l.end(id, p) })
	l.places[id] = p
	return before
}

// take takes out the gateway that was parked by a component of this ID; nil if there is none.
func (l *parkingLot) take(id component.ID) *gateway {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.takeLocked(id, l.places[id])
}

// takeFrom takes out the gateway that listens where endpoint says; nil if none does.
func (l *parkingLot) takeFrom(endpoint string) *gateway {
	l.mu.Lock()
	defer l.mu.Unlock()
	for id, p := range l.places {
		if listensAt(p.gateway.server.door.Addr(), endpoint) {
			return l.takeLocked(id, p)
		}
	}
	return nil
}

func (l *parkingLot) takeLocked(id component.ID, p *place) *gateway {
	if p == nil || l.places[id] != p {
		return nil
	}
	p.port.Stop()
	p.timer.Stop()
	delete(l.places, id)
	return p.gateway
}

// givePort has a gateway that is still parked give its port back. Those that are connected stay.
func (l *parkingLot) givePort(id component.ID, p *place) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.places[id] == p {
		p.gateway.server.door.Vacate()
	}
}

// end ends a gateway that nobody has taken over, unless somebody just has. The timer calls it; nobody waits for
// that, since there is nobody left.
func (l *parkingLot) end(id component.ID, p *place) {
	l.mu.Lock()
	g := l.takeLocked(id, p)
	if g != nil && !g.server.door.Vacant() {
		g.server.door.Vacate() // before somebody else finds that it is not here any more, and wants the port
	}
	l.mu.Unlock()
	if g != nil {
		g.log.Info("nobody has taken over the gateway since its collector was shut down; its connections end")
		g.shutdown(context.Background())
	}
}

// listensAt reports whether endpoint would be at the same port as addr, or the same path.
func listensAt(addr net.Addr, endpoint string) bool {
	_, port, err := net.SplitHostPort(addr.String())
	if err != nil {
		return addr.String() == endpoint
	}
	_, wanted, err := net.SplitHostPort(endpoint)
	return err == nil && port == wanted
}

// watchSignals returns what reports whether the process was told to end, which is no reload, since it was called first,
// and whether it was told so again, by somebody who does not want to wait. That is done once, with the first component, and
// for good: a signal may come between two.
var watchSignals = sync.OnceValues(func() (told, anew func() bool) {
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	times := func(n int) func() bool {
		return func() bool {
			// Stop waits until signals that have arrived are in their channels.
			signal.Stop(make(chan os.Signal, 1))
			return len(signals) >= n // once told, it stays there
		}
	}
	return times(1), times(2)
})

// inUse reports whether somebody is connected, or about to be.
func (g *gateway) inUse() bool { return g.server.door.Open() > 0 }

// park has g go on without a component. It returns the gateway that was parked under this ID, which is to be ended.
func (g *gateway) park(id component.ID, grace time.Duration) (before *gateway) {
	g.host.Store(nil)
	g.server.leave()
	return parked.put(id, g, grace)
}

// canAdopt reports whether g can go on with this configuration: its listener is the same, but for its address, and
// so is what cannot be changed while agents are connected. One that has neither its address nor its server in common
// with it is another gateway, of another collector in this process perhaps.
func (g *gateway) canAdopt(cfg *Config) bool {
	before, after := *g.cfg.Load(), *cfg
	if before.Listener.NetAddr != after.Listener.NetAddr && before.Server.Endpoint != after.Server.Endpoint {
		return false
	}
	if before.Server.AgentAdmission == AdmissionAccept && !before.Server.overHTTP() && after.Server.overHTTP() {
		return false // nothing is kept of the headers that agents came with
	}
	before.Listener.NetAddr.Endpoint, after.Listener.NetAddr.Endpoint = "", ""
	return g.server.failed.Load() == nil && reflect.DeepEqual(before.Listener, after.Listener) &&
		before.Server.AgentAdmission == after.Server.AgentAdmission &&
		before.MaxMessageSize == after.MaxMessageSize && before.MaxBufferedSize == after.MaxBufferedSize
}

// sameLinks reports whether links are the same with both configurations.
func sameLinks(a, b *ServerConfig) bool {
	return a.Endpoint == b.Endpoint && slices.Equal(a.FallbackEndpoints, b.FallbackEndpoints) && a.Connections == b.Connections &&
		a.AgentID == b.AgentID && a.ProxyURL == b.ProxyURL && reflect.DeepEqual(a.Auth, b.Auth) &&
		reflect.DeepEqual(a.Headers, b.Headers) && reflect.DeepEqual(a.TLS, b.TLS)
}

// adopt has g go on for another component:
//
//  1. What can fail is done first: certificates are read again, there are the extensions of the new component,
//     another listener if the address has changed, or was given back, and metrics. With an error, g is to be ended.
//  2. What g says is the new component's from here on: logs, metrics, status.
//  3. The configuration holds that is the new component's. Where it has another server, there are other links.
//  4. Newcomers, which have waited, are let in.
func (g *gateway) adopt(ctx context.Context, e *gatewayExtension, host component.Host) error {
	before, cfg := g.cfg.Load(), e.cfg
	t, err := newTarget(ctx, cfg, e.set, host)
	if err != nil {
		return err
	}
	next, err := g.server.newLife(ctx, cfg, host, e.set.TelemetrySettings)
	if err != nil {
		return err
	}
	var listener net.Listener
	if vacant := g.server.door.Vacant(); vacant || cfg.Listener.NetAddr.Endpoint != before.Listener.NetAddr.Endpoint {
		listener, err = e.listen(ctx)
		if err != nil && !vacant { // the old address may be in the way of the new one, as localhost is of 0.0.0.0
			g.server.door.Vacate()
			listener, err = e.listen(ctx)
		}
		if err != nil {
			return err
		}
	}
	if err := g.tel.Adopt(e.tel); err != nil {
		if listener != nil {
			_ = listener.Close()
		}
		return err
	}
	e.tel = g.tel

	g.logs.Swap(e.set.Logger)
	g.host.Store(&host)
	g.cfg.Store(cfg)
	g.pool.verifier.resize()
	agents, links := g.server.count(), len(g.pool.links())
	same := sameLinks(&before.Server, &cfg.Server)
	g.pool.tellAgain(same)
	if same {
		g.pool.target.Load().renew(t)
	} else {
		g.log.Info("the server's configuration has changed; agents move to new links")
		g.pool.change(t.startingFrom(g.pool.target.Load()))
	}
	if listener != nil {
		g.server.door.Move(listener)
	}
	warnOfDangers(cfg, g.log)
	g.log.Info("going on with the connections from before the reload", zap.Int("agents", agents), zap.Int("links", links),
		zap.Stringer("address", g.server.door.Addr()))
	g.server.enterLife(next)
	return nil
}
