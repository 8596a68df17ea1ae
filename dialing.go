package opampgateway

import (
	"crypto/rand"
	"errors"
	"fmt"
	mathrand "math/rand/v2"
	"net/http"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"time"

	"go.opentelemetry.io/collector/component"
	"go.uber.org/zap"
	"golang.org/x/net/http/httpguts"

	"github.com/opampgateway/opampgateway/internal/metadata"
	"github.com/opampgateway/opampgateway/internal/socket"
	"github.com/opampgateway/opampgateway/internal/wire"
)

const (
	// paceStep is how far apart the links of one gateway are dialed, so that a load balancer sees one
	// after the other when it chooses, and a server that is back is not overrun.
	paceStep = 50 * time.Millisecond

	// paceAll is how long that may take for all links. It is within the patience of their agents.
	paceAll = patience / 2

	// instanceIDKey is the attribute of a collector's resource that tells it from all others.
	instanceIDKey = "service.instance.id"

	// unknownVersion is that of a gateway built from a directory.
	unknownVersion = "dev"
)

// gatewayName returns what comes first in the names of the links, so that no two gateways look alike:
// what is configured, or else the identity of the collector, or else a new one.
func gatewayName(cfg *Config, set component.TelemetrySettings) string {
	if cfg.Server.AgentID != "" {
		return cfg.Server.AgentID
	}
	if set.Resource != noResource {
		if id, ok := set.Resource.Attributes().Get(instanceIDKey); ok && id.AsString() != "" && httpguts.ValidHeaderFieldValue(id.AsString()) {
			return id.AsString()
		}
	}
	id := make([]byte, 16)
	_, _ = rand.Read(id)        // it never fails
	id[6] = 0x40 | id[6]&0x0f   // version 4
	id[8] = 0x80 | id[8]&0x3f   // of RFC 9562
	uid, _ := wire.ParseUID(id) // it has 16 bytes
	return uid.String()
}

// noResource is what settings made by hand have.
var noResource = component.TelemetrySettings{}.Resource

// userAgent says who dials: the gateway, and the collector that it is in.
func userAgent(build component.BuildInfo) string {
	products := []string{"opamp-gateway/" + gatewayVersion()}
	if build.Command != "" {
		products = append(products, token(build.Command)+"/"+token(build.Version))
	}
	return strings.Join(products, " ") + " (" + runtime.GOOS + "/" + runtime.GOARCH + ")"
}

// gatewayVersion returns the version of this module in the running program.
func gatewayVersion() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return unknownVersion
	}
	return versionIn(info)
}

// versionIn returns the version of this module in a program: as its main module, or as what it depends on.
// What the go command or a manifest puts where there is none is no version.
func versionIn(info *debug.BuildInfo) string {
	for _, module := range slices.Concat(info.Deps, []*debug.Module{&info.Main}) {
		if module.Path != metadata.ScopeName {
			continue
		}
		version := module.Version
		if module.Replace != nil && module.Replace.Version != "" { // by that of a fork, not by a directory
			version = module.Replace.Version
		}
		if version == "" || version == "v0.0.0" || version == "(devel)" {
			break
		}
		return token(strings.TrimPrefix(version, "v"))
	}
	return unknownVersion
}

// token returns what can stand in a User-Agent as the name or the version of a product.
func token(text string) string {
	text = strings.Map(func(r rune) rune {
		if !httpguts.IsTokenRune(r) {
			return '-'
		}
		return r
	}, text)
	if text == "" {
		return unknownVersion
	}
	return text
}

// pace keeps the attempts to dial links apart.
type pace struct {
	step time.Duration

	mu   sync.Mutex
	free time.Time // when the next attempt may begin
}

func newPace(connections int) *pace {
	return &pace{step: min(paceStep, paceAll/time.Duration(connections))}
}

// next returns how long an attempt has to wait that is to begin now.
func (p *pace) next() time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now()
	if p.free.Before(now) {
		p.free = now
	}
	wait := p.free.Sub(now)
	p.free = p.free.Add(p.step)
	return wait
}

// firstTurns returns, by slot, with which of the server's addresses each link begins: with the next one each,
// from one at random on, so that not all gateways begin with the same.
func firstTurns(connections int) []int {
	first := mathrand.IntN(1 << 16)
	turns := make([]int, connections)
	for slot := range turns {
		turns[slot] = first + slot
	}
	return turns
}

// askedToWait returns how long a server that refused a link wants to be left alone.
func askedToWait(err error) time.Duration {
	if answer, ok := errors.AsType[*socket.HandshakeError](err); ok {
		return parseRetryAfter(answer.RetryAfter)
	}
	return 0
}

// explainDial adds to the error of an attempt to dial which setting it has to do with.
func (p *upstreamPool) explainDial(err error) error {
	answer, answered := errors.AsType[*socket.HandshakeError](err)
	refused := answered && answer.Proxy == "" && (answer.StatusCode == http.StatusUnauthorized || answer.StatusCode == http.StatusForbidden)
	if _, ok := errors.AsType[*socket.ProxyError](err); ok {
		return p.explainProxy(err, answered && (answer.StatusCode == http.StatusProxyAuthRequired || answer.StatusCode == http.StatusUnauthorized))
	}
	cfg := &p.cfg.Load().Server
	keys, withheld := "server::headers", "server::headers, which are"
	switch {
	case cfg.Auth.HasValue() && len(cfg.Headers) > 0:
		keys, withheld = "server::headers and server::auth", "server::headers and what server::auth adds, which are"
	case cfg.Auth.HasValue():
		keys, withheld = "server::auth", "what server::auth adds, which is"
	}
	switch {
	case errors.Is(err, socket.ErrRedirect):
		return fmt.Errorf("%w; see server::endpoint", err)
	case refused && answer.Withheld && (len(cfg.Headers) > 0 || cfg.Auth.HasValue()):
		return fmt.Errorf("%w: it was not sent %s for the host of server::endpoint", err, withheld)
	case refused:
		return fmt.Errorf("%w: it does not take the gateway's own credentials, see %s", err, keys)
	}
	return err
}

// explainProxy is explainDial for what went wrong at a proxy.
func (p *upstreamPool) explainProxy(err error, credentials bool) error {
	key := "server::proxy_url"
	if p.target.Load().proxy == nil {
		key = "HTTP_PROXY and HTTPS_PROXY"
	}
	if credentials {
		return fmt.Errorf("%w: it wants a user and password, or others, see %s", err, key)
	}
	return fmt.Errorf("%w; see %s", err, key)
}

// redirectedTo says in the log where the server has sent a link, if it has.
func redirectedTo(place string) zap.Field {
	if place == "" {
		return zap.Skip()
	}
	return zap.String("redirected_to", place)
}
