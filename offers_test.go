package opampgateway

import (
	"fmt"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/open-telemetry/opamp-go/protobufs"
	"github.com/stretchr/testify/require"
	"go.opentelemetry.io/collector/confmap"
	"go.uber.org/zap"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"github.com/opampgateway/opampgateway/internal/gatewaytest"
	"github.com/opampgateway/opampgateway/internal/telemetry"
)

const (
	offeredEndpoint = "wss://user:hunter2@elsewhere.example/secret-path?key=secret"
	publicEndpoint  = "wss://gateway.example:4320/v1/opamp"
)

// withOffers has the gateway treat offers so.
func withOffers(offers ConnectionOffers) func(*Config) {
	return func(cfg *Config) {
		cfg.Agents.ConnectionOffers = offers
		if offers != OffersRelay {
			cfg.Agents.PublicEndpoint = publicEndpoint
		}
	}
}

// offerTo is a message that offers an agent an endpoint, with other settings around it.
func offerTo(a *gatewaytest.Agent, endpoint string) *protobufs.ServerToAgent {
	return &protobufs.ServerToAgent{
		InstanceUid:  a.UID,
		RemoteConfig: &protobufs.AgentRemoteConfig{ConfigHash: []byte("config")},
		ConnectionSettings: &protobufs.ConnectionSettingsOffers{
			Hash: []byte("hash"),
			Opamp: &protobufs.OpAMPConnectionSettings{
				DestinationEndpoint:      endpoint,
				Headers:                  &protobufs.Headers{Headers: []*protobufs.Header{{Key: "Authorization", Value: "secret"}}},
				HeartbeatIntervalSeconds: 30,
			},
		},
	}
}

// wantOffers checks how often which became of offers.
func (s *stage) wantOffers(want map[telemetry.OfferAction]int) {
	s.t.Helper()
	for _, action := range telemetry.OfferActions {
		require.EqualValues(s.t, want[action], s.counted("offers", string(action)), action)
	}
}

func TestConnectionOffers(t *testing.T) {
	for offers, test := range map[ConnectionOffers]struct {
		action   telemetry.OfferAction
		endpoint string // that the agent gets
	}{
		OffersRelay:   {telemetry.OfferRelayed, offeredEndpoint},
		OffersDrop:    {telemetry.OfferDropped, ""},
		OffersRewrite: {telemetry.OfferRewritten, publicEndpoint},
	} {
		t.Run(string(offers), func(t *testing.T) {
			play(t, func(t *testing.T, s *stage) {
				alice, bob := s.introduce("alice"), s.introduce("bob")
				link := s.server.WantLinks(3)[0]
				for i := range 3 {
					for _, a := range []*gatewaytest.Agent{alice, bob} {
						offer, want := offerTo(a, offeredEndpoint), offerTo(a, test.endpoint)
						config := gatewaytest.ConfigMap(1000 * i)
						offer.RemoteConfig.Config, want.RemoteConfig.Config = config, config
						link.Push(gatewaytest.Frame(offer))
						a.WantMessage(want)
					}
				}
				s.wantOffers(map[telemetry.OfferAction]int{test.action: 6})

				// It is logged once, without what may be secret of it.
				lines := s.logged(zap.InfoLevel, "the server offers agents an endpoint")
				require.Len(t, lines, 1)
				require.Equal(t, "wss://elsewhere.example", lines[0].ContextMap()["offered"])
				require.Equal(t, string(test.action), lines[0].ContextMap()["offer"])
				s.wantNotLogged("secret", "hunter2")

				// Nothing else is touched: settings without an endpoint, what no protobuf of today knows, byte for byte.
				frame := gatewaytest.Frame(offerTo(alice, ""))
				frame = protowire.AppendString(protowire.AppendTag(frame, 99, protowire.BytesType), "later")
				link.Push(frame)
				alice.WantFrame(frame)
				s.wantOffers(map[telemetry.OfferAction]int{test.action: 6})
			}, withOffers(offers))
		})
	}
}

// TestConnectionOffersHere has the server offer the gateway itself, which leads nobody around it.
func TestConnectionOffersHere(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		alice := s.introduce("alice")
		offer := offerTo(alice, "wss://gateway.example:4320/another/path")
		s.server.WantLinks(3)[0].Push(gatewaytest.Frame(offer))
		alice.WantMessage(offer)
		s.wantOffers(nil)
	}, withOffers(OffersDrop))
}

// TestConnectionOffersTooLarge has an offer become too large by this gateway's endpoint, which is longer.
func TestConnectionOffersTooLarge(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		alice := s.introduce("alice")
		short := "ws://b"
		offer, want := offerTo(alice, short), offerTo(alice, "")
		config := gatewaytest.ConfigMap(1)
		offer.RemoteConfig.Config, want.RemoteConfig.Config = config, config
		body := &config.ConfigMap[sortedKeys(config.ConfigMap)[0]].Body
		*body = make([]byte, s.cfg.MaxMessageSize-proto.Size(offer)-16)
		for len(gatewaytest.Frame(offer)) < s.cfg.MaxMessageSize {
			*body = append(*body, 'x')
		}
		s.server.WantLinks(3)[0].Push(gatewaytest.Frame(offer))
		alice.WantMessage(want)
		s.wantOffers(map[telemetry.OfferAction]int{telemetry.OfferDropped: 1})
		synctest.Wait()
		require.Zero(t, s.memory.Down.Held(), "bytes of the server's messages")
	}, withOffers(OffersRewrite), func(cfg *Config) { cfg.MaxMessageSize = 64 << 10 })
}

// TestConnectionOffersUnreadable has settings that no decoder takes: they are the agent's to refuse.
func TestConnectionOffersUnreadable(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		alice := s.introduce("alice")
		field := func(number protowire.Number, content string) string {
			return string(protowire.AppendString(protowire.AppendTag(nil, number, protowire.BytesType), content))
		}
		frame := []byte("\x00" + field(1, string(alice.UID)) + field(4, field(2, field(1, offeredEndpoint)+"\xff")))
		s.server.WantLinks(3)[0].Push(frame)
		alice.WantFrame(frame)
		s.wantOffers(map[telemetry.OfferAction]int{telemetry.OfferRelayed: 1})
	}, withOffers(OffersDrop))
}

// TestConnectionOffersMany has the server offer ever another endpoint: the log stays short.
func TestConnectionOffersMany(t *testing.T) {
	var seen offered
	named := 0
	for i := range 10 * maxOfferedNamed {
		if seen.isNew(placeOffered(fmt.Sprintf("wss://%d.example/%d", i, i))) {
			named++
		}
	}
	require.Equal(t, maxOfferedNamed, named)
	require.False(t, seen.isNew("wss://1.example"))
	require.Len(t, placeOffered("wss://"+strings.Repeat("a", 1000)), maxOfferedText)
	require.Equal(t, "unreadable", placeOffered("wss://%zz"))
	require.Equal(t, "unreadable", placeOffered("elsewhere:4320"))
}

func TestConnectionOffersConfig(t *testing.T) {
	for name, test := range map[string]struct {
		offers ConnectionOffers
		public string
		says   string
	}{
		"neither":        {"keep", "", `connection_offers: must be "relay", "drop" or "rewrite", is "keep"`},
		"no endpoint":    {OffersRewrite, "", `public_endpoint: must be given with connection_offers "rewrite"`},
		"scheme":         {OffersRewrite, "ftp://gateway", "public_endpoint: must be a URL with ws://"},
		"no host":        {OffersRewrite, "wss:///v1/opamp", "public_endpoint: must be a URL with ws://"},
		"no URL":         {OffersRewrite, "wss://gateway:hunter2", "public_endpoint: is not a URL"},
		"credentials":    {OffersDrop, "wss://user:hunter2@gateway", "public_endpoint: must not hold a user or password"},
		"as it is to be": {OffersRewrite, publicEndpoint, ""},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := createDefaultConfig().(*Config)
			cfg.Server.Endpoint, cfg.Agents.ConnectionOffers, cfg.Agents.PublicEndpoint = "wss://a.example", test.offers, test.public
			err := confmap.Validate(cfg)
			if test.says == "" {
				require.NoError(t, err)
				return
			}
			require.ErrorContains(t, err, "agents: "+test.says)
			require.NotContains(t, err.Error(), "hunter2")
		})
	}
}
