package main

import (
	"context"
	"fmt"
	"net/http"
	"sync"
	"time"

	"github.com/google/uuid"
	"github.com/open-telemetry/opamp-go/client"
	"github.com/open-telemetry/opamp-go/client/types"
	"github.com/open-telemetry/opamp-go/protobufs"
)

// heartbeat is far more frequent than anybody needs in earnest; it makes the table move.
const heartbeat = 2 * time.Second

// A clientAgent is an agent on opamp-go's client library. It takes remote configurations;
// to apply one it makes it its effective configuration.
type clientAgent struct {
	name   string
	uid    uuid.UUID
	client client.OpAMPClient

	mu     sync.Mutex
	config *protobufs.AgentConfigMap // effective
}

func startClientAgent(ctx context.Context, name string, uid uuid.UUID, endpoint, key string, logger types.Logger) (*clientAgent, error) {
	a := &clientAgent{name: name, uid: uid, client: client.NewWebSocket(logger), config: startingConfig()}
	capabilities := protobufs.AgentCapabilities_AgentCapabilities_ReportsStatus |
		protobufs.AgentCapabilities_AgentCapabilities_AcceptsRemoteConfig |
		protobufs.AgentCapabilities_AgentCapabilities_ReportsRemoteConfig |
		protobufs.AgentCapabilities_AgentCapabilities_ReportsEffectiveConfig |
		protobufs.AgentCapabilities_AgentCapabilities_ReportsHealth |
		protobufs.AgentCapabilities_AgentCapabilities_ReportsHeartbeat
	now := uint64(time.Now().UnixNano())
	interval := heartbeat
	for _, step := range []func() error{
		func() error { return a.client.SetAgentDescription(a.description()) },
		func() error {
			return a.client.SetHealth(&protobufs.ComponentHealth{Healthy: true, StartTimeUnixNano: now, StatusTimeUnixNano: now})
		},
		// A client refuses capabilities for which it has nothing to report yet.
		func() error { return a.client.SetCapabilities(&capabilities) },
		func() error {
			return a.client.Start(ctx, types.StartSettings{
				OpAMPServerURL:    endpoint,
				Header:            http.Header{"Authorization": {authorization(key)}},
				InstanceUid:       types.InstanceUid(uid),
				HeartbeatInterval: &interval,
				Callbacks: types.Callbacks{
					OnMessage:          a.message,
					GetEffectiveConfig: a.effectiveConfig,
				},
			})
		},
	} {
		if err := step(); err != nil {
			return nil, fmt.Errorf("starting %s: %w", name, err)
		}
	}
	return a, nil
}

func startingConfig() *protobufs.AgentConfigMap {
	return &protobufs.AgentConfigMap{ConfigMap: map[string]*protobufs.AgentConfigFile{
		configName: {Body: []byte("# what the agent started with\nrevision: 0\n"), ContentType: "text/yaml"},
	}}
}

func (a *clientAgent) description() *protobufs.AgentDescription {
	attribute := func(key, value string) *protobufs.KeyValue {
		return &protobufs.KeyValue{Key: key, Value: &protobufs.AnyValue{Value: &protobufs.AnyValue_StringValue{StringValue: value}}}
	}
	return &protobufs.AgentDescription{IdentifyingAttributes: []*protobufs.KeyValue{
		attribute("service.name", a.name),
		attribute("service.instance.id", a.uid.String()),
	}}
}

// message is called by the client, for one message after another.
func (a *clientAgent) message(ctx context.Context, m *types.MessageData) {
	if m.RemoteConfig == nil {
		return
	}
	a.mu.Lock()
	a.config = m.RemoteConfig.GetConfig()
	a.mu.Unlock()

	// Neither can fail on a running client with the capabilities from above.
	_ = a.client.UpdateEffectiveConfig(ctx)
	_ = a.client.SetRemoteConfigStatus(&protobufs.RemoteConfigStatus{
		LastRemoteConfigHash: m.RemoteConfig.GetConfigHash(),
		Status:               protobufs.RemoteConfigStatuses_RemoteConfigStatuses_APPLIED,
	})
}

func (a *clientAgent) effectiveConfig(context.Context) (*protobufs.EffectiveConfig, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return &protobufs.EffectiveConfig{ConfigMap: a.config}, nil
}

// stop says goodbye to the server.
func (a *clientAgent) stop(ctx context.Context) error {
	if err := a.client.Stop(ctx); err != nil {
		return fmt.Errorf("stopping %s: %w", a.name, err)
	}
	return nil
}
