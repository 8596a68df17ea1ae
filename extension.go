package opampgateway

//go:generate mdatagen metadata.yaml

import (
	"context"

	"go.opentelemetry.io/collector/component"
	"go.opentelemetry.io/collector/extension"
)

type gatewayExtension struct {
	set extension.Settings
	cfg *Config
}

func newGatewayExtension(set extension.Settings, cfg *Config) (*gatewayExtension, error) {
	return &gatewayExtension{set: set, cfg: cfg}, nil
}

func (e *gatewayExtension) Start(context.Context, component.Host) error { return nil }
func (e *gatewayExtension) Shutdown(context.Context) error              { return nil }
