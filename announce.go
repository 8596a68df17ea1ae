package opampgateway

import (
	"crypto/rand"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"

	"go.opentelemetry.io/collector/component"
	"golang.org/x/net/http/httpguts"

	"github.com/opampgateway/opampgateway/internal/metadata"
	"github.com/opampgateway/opampgateway/internal/wire"
)

// instanceIDKey is the attribute of a collector's resource that tells it from all others.
const instanceIDKey = "service.instance.id"

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

// unknownVersion is that of a gateway built from a directory.
const unknownVersion = "dev"

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
