package telemetry

import "context"

// OfferAction says what has become of an endpoint that the server has offered an agent, in the action attribute of
// opampgateway.offers.
type OfferAction string

// The actions.
const (
	OfferRelayed   OfferAction = "relayed"
	OfferDropped   OfferAction = "dropped"
	OfferRewritten OfferAction = "rewritten"
)

// OfferActions is all of them.
var OfferActions = []OfferAction{OfferRelayed, OfferDropped, OfferRewritten}

// Offer counts an endpoint that the server has offered an agent.
func (t *Telemetry) Offer(action OfferAction) {
	t.instruments.Load().OpampgatewayOffers.Add(context.Background(), 1, t.of("action", string(action)).options...)
}
