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
	"time"

	"go.opentelemetry.io/collector/component"
	"go.opentelemetry.io/collector/component/componentstatus"
	"go.opentelemetry.io/collector/extension"
	"go.opentelemetry.io/collector/extension/extensioncapabilities"

	"github.com/opampgateway/opampgateway/internal/door"
	"github.com/opampgateway/opampgateway/internal/memory"
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
	cfg *Config
	set extension.Settings
	tel *telemetry.Telemetry

	// mu guards what follows.
	mu      sync.Mutex
	gateway *gateway // nil before Start and after Shutdown
	stopped bool     // Shutdown was called
}

func newGatewayExtension(set extension.Settings, cfg *Config) (*gatewayExtension, error) {
	tel, err := telemetry.New(set.TelemetrySettings)
	if err != nil {
		return nil, err
	}
	return &gatewayExtension{cfg: cfg, set: set, tel: tel}, nil
}

// Dependencies names the extensions that the listener uses, so that they are started first.
func (e *gatewayExtension) Dependencies() []component.ID {
	var ids []component.ID
	if auth := e.cfg.Listener.Auth.Get(); auth != nil {
		ids = append(ids, auth.Config.AuthenticatorID) //nolint:staticcheck // newer collectors do not embed Config
	}
	for _, middleware := range e.cfg.Listener.Middlewares {
		ids = append(ids, middleware.ID)
	}
	return ids
}

// Start takes the listener and returns; it does not wait for the server.
func (e *gatewayExtension) Start(ctx context.Context, host component.Host) error {
	listener, err := door.Listen(ctx, e.cfg.Listener.NetAddr)
	if err != nil {
		return fmt.Errorf("listener::endpoint: %w", err)
	}
	g, err := startGateway(ctx, e.cfg, e.set, e.tel, host, listener, nil)
	if err != nil {
		_ = listener.Close()
		return err
	}
	e.mu.Lock()
	stopped := e.stopped
	if !stopped {
		e.gateway = g
	}
	e.mu.Unlock()
	if stopped {
		g.shutdown(ctx)
		e.tel.Shutdown()
		return errors.New("shut down while starting")
	}
	return nil
}

// Shutdown ends the gateway. It does nothing without a Start before it, or a second time.
func (e *gatewayExtension) Shutdown(ctx context.Context) error {
	e.mu.Lock()
	g := e.gateway
	e.gateway, e.stopped = nil, true
	e.mu.Unlock()
	if g != nil {
		g.shutdown(ctx)
	}
	e.tel.Shutdown()
	return nil
}

// gateway is what runs between one Start and its Shutdown.
type gateway struct {
	cfg    *Config
	router *router
	memory *memory.Budget
	pool   *upstreamPool
	server *downstreamServer
	cancel context.CancelFunc // ends all background work
	sweeps sync.WaitGroup
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
	g := &gateway{cfg: cfg, memory: memory.New(int64(cfg.MaxBufferedSize), cfg.MaxMessageSize), cancel: cancel}
	g.router = newRouter(g.memory)
	var err error
	g.pool, err = newUpstreamPool(ctx, cfg, set.BuildInfo, set.Logger, tel, g.router, g.memory, func(err error) { reportLink(host, err) })
	if err != nil {
		cancel()
		return nil, err
	}
	if dial != nil {
		g.pool.netDial = dial
	}
	g.server = newDownstreamServer(background, cfg, set.Logger, tel, g.router, g.pool, g.memory)
	if err := g.server.prepare(ctx, host, set.TelemetrySettings, listener); err != nil {
		cancel()
		return nil, err
	}
	if err := tel.Start(func() int { return len(g.pool.links()) }, g.server.count, g.pool.unacknowledged); err != nil {
		cancel()
		return nil, err
	}
	warnOfDangers(cfg, set.Logger)
	g.pool.start(background)
	g.server.serve(func(err error) {
		componentstatus.ReportStatus(host, componentstatus.NewFatalErrorEvent(err))
	})
	g.sweeps.Go(func() { sweep(background, cfg.Server.KeepAlive, linkSweepInterval, g.pool.sweep) })
	g.sweeps.Go(func() { sweep(background, cfg.Agents.KeepAlive, agentSweepInterval, g.server.sweep) })
	return g, nil
}

// shutdown ends the gateway within the time of ctx, and of its own:
//
//  1. No more agents are taken; the port is free from here on.
//  2. Agents are let go, and say their last words.
//  3. The links write what waits, and are closed.
//  4. What still runs is cancelled and waited for.
func (g *gateway) shutdown(ctx context.Context) {
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
	g.sweeps.Wait()
}
