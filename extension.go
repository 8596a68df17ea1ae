// Package opampgateway is an extension of the OpenTelemetry Collector that lets many OpAMP
// agents share a few connections to their server.
//
// Agents connect to it as if it were the server. It keeps a fixed pool of WebSockets
// ("links") to the server, attaches each agent to the link with the fewest, and carries
// OpAMP messages ("frames") between the two without changing them. It never decodes a
// message to relay it, stores none, and answers none: it reads the instance UID, to know
// whose a frame is, and whether the frame concerns the hop itself.
//
// A frame from an agent passes three files, top to bottom:
//
//	downstream_server.go   agentConn.read takes it off the agent's socket and scans it
//	router.go              router.claim makes this connection the way back to its UID
//	upstream_pool.go       it waits in the outbox of the agent's link, and is written
//
// and one from the server the same files backwards: link.read, router.find, and the outbox
// of the agent's connection.
package opampgateway

//go:generate mdatagen metadata.yaml

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"go.opentelemetry.io/collector/component"
	"go.opentelemetry.io/collector/component/componentstatus"
	"go.opentelemetry.io/collector/config/confighttp"
	"go.opentelemetry.io/collector/config/confignet"
	"go.opentelemetry.io/collector/extension"
	"go.opentelemetry.io/collector/extension/extensioncapabilities"
	"go.uber.org/zap"

	"github.com/opampgateway/opampgateway/internal/door"
	"github.com/opampgateway/opampgateway/internal/memory"
	"github.com/opampgateway/opampgateway/internal/monotonic"
	"github.com/opampgateway/opampgateway/internal/peer"
	"github.com/opampgateway/opampgateway/internal/swaplog"
	"github.com/opampgateway/opampgateway/internal/telemetry"
)

const (
	// agentSweepInterval and linkSweepInterval are how often the connections are looked after. There
	// are few links, and much hangs on each.
	agentSweepInterval, linkSweepInterval = 5 * time.Second, time.Second

	// shutdownTimeout bounds Shutdown, whatever its context allows.
	shutdownTimeout = 4 * time.Second
	// Before its end, the links have this long to write what waits, and the server to take it.
	drainTime, closeTime = time.Second, time.Second
)

var _ extensioncapabilities.Dependent = (*gatewayExtension)(nil)

// gatewayExtension is the component: its configuration, and the gateway while it runs.
type gatewayExtension struct {
	cfg  *Config
	set  extension.Settings
	tel  *telemetry.Telemetry                                                     // the gateway's own once it has one
	told func() bool                                                              // whether the process was told to end; set by Start but in tests
	net  func(ctx context.Context, at confignet.AddrConfig) (net.Listener, error) // door.Listen but in tests
	dial dialFunc                                                                 // nil but in tests

	// mu guards what follows.
	mu      sync.Mutex
	gateway *gateway    // nil before Start and after Shutdown
	page    *statusPage // nil unless it is configured; otherwise as gateway
	started bool        // Start was called
	stopped bool        // Shutdown was called
}

func newGatewayExtension(set extension.Settings, cfg *Config) (*gatewayExtension, error) {
	tel, err := telemetry.New(set.TelemetrySettings)
	if err != nil {
		return nil, err
	}
	return &gatewayExtension{cfg: cfg, set: set, tel: tel, net: door.Listen}, nil
}

// Dependencies names the extensions that the listener uses, so that they are started first.
func (e *gatewayExtension) Dependencies() []component.ID {
	ids := extensionsOf(&e.cfg.Listener)
	if page := e.cfg.Status.Get(); page != nil {
		ids = append(ids, extensionsOf(page)...)
	}
	return ids
}

// extensionsOf names the extensions that an HTTP server uses.
func extensionsOf(cfg *confighttp.ServerConfig) (ids []component.ID) {
	if auth := cfg.Auth.Get(); auth != nil {
		ids = append(ids, auth.Config.AuthenticatorID) //nolint:staticcheck // newer collectors do not embed Config
	}
	for _, middleware := range cfg.Middlewares {
		ids = append(ids, middleware.ID)
	}
	return ids
}

// Start takes the listener and returns; it does not wait for the server. If the component before a reload has left
// its gateway, that goes on, as far as the configuration allows; otherwise it is ended first.
func (e *gatewayExtension) Start(ctx context.Context, host component.Host) error {
	e.mu.Lock()
	again := e.started
	e.started = true
	e.mu.Unlock()
	if again {
		return errors.New("started twice")
	}
	if e.told == nil {
		e.told = watchSignals()
	}
	page, err := newStatusPage(ctx, e, host)
	if err != nil {
		e.tel.Shutdown()
		return err
	}
	g, err := e.start(ctx, host)
	if err != nil {
		page.stop()
		e.tel.Shutdown()
		return err
	}
	page.serve(g)
	e.mu.Lock()
	stopped := e.stopped
	if !stopped {
		e.gateway, e.page = g, page
	}
	e.mu.Unlock()
	if stopped {
		page.stop()
		g.shutdown(ctx)
		return errors.New("shut down while starting")
	}
	return nil
}

func (e *gatewayExtension) start(ctx context.Context, host component.Host) (*gateway, error) {
	if g := parked.take(e.set.ID); g != nil {
		if g.canAdopt(e.cfg) {
			err := g.adopt(ctx, e, host)
			if err != nil {
				g.shutdown(ctx) // nothing is left of a reload that has failed
				return nil, err
			}
			return g, nil
		}
		g.log.Info("the gateway's configuration has changed in what its connections depend on; all are ended, and agents come back")
		g.shutdown(ctx)
	}
	listener, err := e.listen(ctx)
	if err != nil {
		return nil, err
	}
	g, err := startGateway(ctx, e.cfg, e.set, e.tel, host, listener, e.dial)
	if err != nil {
		_ = listener.Close()
		return nil, err
	}
	return g, nil
}

// listen takes the address that is configured, if need be from a gateway that was left by a component of another ID.
func (e *gatewayExtension) listen(ctx context.Context) (net.Listener, error) {
	at := e.cfg.Listener.NetAddr
	listener, err := e.net(ctx, at)
	if err != nil {
		if g := parked.takeFrom(at.Endpoint); g != nil {
			g.shutdown(ctx)
			listener, err = e.net(ctx, at)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("listener::endpoint: %w", err)
	}
	return listener, nil
}

// Shutdown ends the gateway, or leaves it to the next component if this may be a reload. It does nothing without a
// Start before it, or a second time.
func (e *gatewayExtension) Shutdown(ctx context.Context) error {
	e.mu.Lock()
	g, page, concerned := e.gateway, e.page, e.started || e.stopped // then Start, or Shutdown, ends what there is
	e.gateway, e.page, e.stopped = nil, nil, true
	e.mu.Unlock()
	page.stop()
	switch {
	case g != nil && e.cfg.ReloadGrace > 0 && !e.told() && g.inUse():
		if before := g.park(e.set.ID, e.cfg.ReloadGrace); before != nil { // by another collector in this process
			before.shutdown(ctx)
		}
	case g != nil:
		g.shutdown(ctx)
	case !concerned:
		e.tel.Shutdown()
	}
	return nil
}

// currentConfig is the configuration that holds now.
type currentConfig = atomic.Pointer[Config]

// gateway is what runs from a Start to the Shutdown after which nobody takes it over. What it has of a component,
// it asks for when it needs it: after a reload there is another one.
type gateway struct {
	cfg    *currentConfig
	log    *zap.Logger
	logs   *swaplog.Target
	tel    *telemetry.Telemetry
	router *router
	memory *memory.Budget
	began  int64 // when it was started, of the monotonic clock
	pool   *upstreamPool
	server *downstreamServer
	cancel context.CancelFunc // ends all background work
	sweeps sync.WaitGroup

	// host is told of the gateway's status; nil while there is no component, or it is being shut down.
	host atomic.Pointer[component.Host]
}

// dialFunc connects to the server, or to a proxy on the way there.
type dialFunc func(ctx context.Context, network, address string) (net.Conn, error)

// startGateway starts a gateway that takes agents from listener:
//
//  1. What can fail is done first: certificates, the listener's middleware, metrics. What is
//     legal but dangerous is said.
//  2. The slots of the pool start to dial.
//  3. Agents are served; those that come before the first link is up wait for it.
//  4. The sweeps start.
//
// ctx is for starting only. dial is nil but in tests.
func startGateway(ctx context.Context, cfg *Config, set extension.Settings, tel *telemetry.Telemetry, host component.Host, listener net.Listener, dial dialFunc) (*gateway, error) {
	background, cancel := context.WithCancel(context.WithoutCancel(ctx))
	g := &gateway{cfg: &currentConfig{}, tel: tel, memory: memory.New(int64(cfg.MaxBufferedSize), cfg.MaxMessageSize), cancel: cancel, began: monotonic.Now()}
	g.cfg.Store(cfg)
	g.logs, g.log = swaplog.New(set.Logger)
	g.host.Store(&host)
	g.router = newRouter(g.memory)
	t, err := newTarget(ctx, cfg, set)
	if err != nil {
		cancel()
		return nil, err
	}
	g.pool = newUpstreamPool(g.cfg, g.log, tel, g.router, g.memory, g.reportLink)
	g.pool.netDial = dial
	g.server = newDownstreamServer(background, g.cfg, g.log, tel, g.router, g.pool, g.memory)
	if err := g.server.prepare(ctx, host, set.TelemetrySettings, listener); err != nil {
		cancel()
		return nil, err
	}
	if err := tel.Start(func() int { return len(g.pool.links()) }, g.server.count, g.pool.unacknowledged); err != nil {
		cancel()
		return nil, err
	}
	warnOfDangers(cfg, g.log)
	g.pool.start(background, t)
	g.server.serve(func(err error) { g.report(componentstatus.NewFatalErrorEvent(err)) })
	g.sweeps.Go(func() {
		sweep(background, func() KeepAliveConfig { return g.cfg.Load().Server.KeepAlive }, linkSweepInterval, func(limits peer.Limits) {
			g.pool.sweep(limits)
			g.takeSample()
		})
	})
	g.sweeps.Go(func() {
		sweep(background, func() KeepAliveConfig { return g.cfg.Load().Agents.KeepAlive }, agentSweepInterval, g.server.sweep)
	})
	return g, nil
}

// report tells the collector of the gateway's status, if there is a component to tell it for.
func (g *gateway) report(event *componentstatus.Event) {
	if host := g.host.Load(); host != nil {
		componentstatus.ReportStatus(*host, event)
	}
}

// shutdown ends the gateway within the time of ctx, and of its own:
//
//  1. No more agents are taken; the port is free from here on.
//  2. Agents are let go, and say their last words.
//  3. The links write what waits, and are closed.
//  4. What still runs is cancelled and waited for.
func (g *gateway) shutdown(ctx context.Context) {
	g.host.Store(nil) // a fatal status would have the collector hang that is shutting down
	ctx, cancel := context.WithTimeout(ctx, shutdownTimeout)
	defer cancel()
	end, _ := ctx.Deadline()
	drained, cancelDrained := context.WithDeadline(ctx, end.Add(-closeTime))
	defer cancelDrained()
	letGo, cancelLetGo := context.WithDeadline(ctx, end.Add(-closeTime-drainTime))
	defer cancelLetGo()
	defer context.AfterFunc(ctx, func() {
		g.cancel()
		g.server.cutOff()
	})()

	g.server.stop(letGo)
	g.pool.finish(ctx, drained)
	g.cancel()
	g.server.wait()
	g.pool.homing.Wait()
	g.pool.verifier.work.Wait()
	g.sweeps.Wait()
	g.tel.Shutdown()
}
