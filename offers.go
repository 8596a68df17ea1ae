package opampgateway

import (
	"net/url"
	"sync"

	"go.uber.org/zap"

	"github.com/opampgateway/opampgateway/internal/socket"
	"github.com/opampgateway/opampgateway/internal/telemetry"
	"github.com/opampgateway/opampgateway/internal/wire"
)

const (
	// maxOfferedNamed is how many endpoints that the server offers are named in the log, and maxOfferedText how much of each.
	maxOfferedNamed, maxOfferedText = 64, 256
)

// offered are the endpoints that the server has offered to agents, as they were logged.
type offered struct {
	mu    sync.Mutex
	named map[string]struct{}
}

// isNew reports whether a place is to be logged: once each.
func (o *offered) isNew(place string) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	if _, known := o.named[place]; known || len(o.named) >= maxOfferedNamed {
		return false
	}
	if o.named == nil {
		o.named = map[string]struct{}{}
	}
	o.named[place] = struct{}{}
	return true
}

// heedOffer returns what is to be delivered of a frame that has connection settings: if these offer the agent an endpoint
// that is not this gateway, what agents::connection_offers says. It is another frame than that, or that itself.
func (l *link) heedOffer(frame []byte, c *claim) []byte {
	endpoint := wire.OfferedEndpoint(frame)
	agents := &l.pool.cfg.Load().Agents
	if len(endpoint) == 0 || leadsHere(string(endpoint), agents.PublicEndpoint) {
		return frame
	}
	place, action := placeOffered(string(endpoint)), telemetry.OfferRelayed
	if agents.ConnectionOffers != OffersRelay {
		var edited []byte
		if edited, action = l.edit(frame, agents); action != telemetry.OfferRelayed {
			frame = edited
		}
	}
	l.pool.tel.Offer(action)
	if l.pool.offered.isNew(place) {
		l.pool.events.Info("the server offers agents an endpoint that is not this gateway, see agents::connection_offers",
			zap.String("offered", place), zap.String("offer", string(action)), zap.Stringer("agent", c.route.uid))
	}
	return frame
}

// edit returns a copy of a frame without the endpoint that it offers, or with this gateway's. Where that would make the
// message too large, the endpoint goes; settings that cannot be read are for the agent to refuse.
func (l *link) edit(frame []byte, agents *AgentsConfig) (edited []byte, action telemetry.OfferAction) {
	// What the copy takes until the outbox counts it, and the settings while it is made.
	l.pool.memory.Down.Take(3 * len(frame))
	defer l.pool.memory.Down.Give(3 * len(frame))
	if agents.ConnectionOffers == OffersRewrite {
		if edited, ok := wire.WithEndpoint(frame, agents.PublicEndpoint); ok && len(edited) <= l.pool.cfg.Load().MaxMessageSize {
			return edited, telemetry.OfferRewritten
		}
	}
	if edited, ok := wire.WithEndpoint(frame, ""); ok {
		return edited, telemetry.OfferDropped
	}
	return frame, telemetry.OfferRelayed
}

// leadsHere reports whether an endpoint is at the same host and port as that of this gateway.
func leadsHere(endpoint, public string) bool {
	if public == "" {
		return false
	}
	offered, err := url.Parse(endpoint)
	if err != nil {
		return false
	}
	here, err := url.Parse(public)
	return err == nil && offered.Scheme == here.Scheme && socket.HostPort(offered) == socket.HostPort(here)
}

// placeOffered is as much of an endpoint as is logged: neither path nor query, which may be secret.
func placeOffered(endpoint string) string {
	u, err := url.Parse(endpoint)
	if err != nil || u.Host == "" {
		return "unreadable"
	}
	place := u.Scheme + "://" + u.Host
	return place[:min(len(place), maxOfferedText)]
}
