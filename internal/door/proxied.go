package door

import (
	"errors"
	"net"
	"net/http"
	"net/netip"
	"os"

	"go.uber.org/zap"

	"github.com/opampgateway/opampgateway/internal/fair"
	"github.com/opampgateway/opampgateway/internal/forwarded"
	"github.com/opampgateway/opampgateway/internal/telemetry"
)

// greet hears what a trusted load balancer says before the stranger himself does, TLS included.
func (s *stranger) greet() {
	if s.greeted {
		return
	}
	s.greeted = true
	if s.proxies == nil || s.proxies.Source != forwarded.SourceProxyProtocol {
		return
	}
	err := s.below.SetReadDeadline(s.due)
	var client netip.AddrPort
	if err == nil {
		client, err = forwarded.ReadHeader(s.below)
	}
	switch {
	case err == nil:
		if s.comesFrom(client); s.excess != "" && s.pool == nil {
			s.door.turnedAway(telemetry.OutcomeTooMany)
			s.end(false)
		}
	case errors.Is(err, forwarded.ErrNoHeader), errors.Is(err, forwarded.ErrBadHeader):
		s.log(zap.WarnLevel, "a load balancer of agents::trusted_proxies does not say from where agents come, so they are refused: "+
			"have it send the PROXY protocol (HAProxy: send-proxy-v2), or change agents::address_from", zap.Error(err))
		s.refuse(s.below, &Refusal{
			Status: http.StatusBadRequest, Outcome: telemetry.OutcomeBadRequest,
			Text: "this listener expects the PROXY protocol from this address",
		})
	case errors.Is(err, os.ErrDeadlineExceeded) && s.place.heard:
		s.log(zap.WarnLevel, "a load balancer's PROXY protocol did not arrive in time", zap.Error(err))
		s.door.turnedAway(telemetry.OutcomeBadRequest)
		s.end(false)
	default: // a probe
		s.leave(err)
	}
}

// refuseProxyProtocol answers, on conn, who says from where he comes, and is not trusted in that.
func (s *stranger) refuseProxyProtocol(conn net.Conn) {
	s.log(zap.WarnLevel, "a peer sends the PROXY protocol, and is refused: it is taken from the networks of agents::trusted_proxies only, "+
		"and with agents::address_from: proxy_protocol")
	s.refuse(conn, &Refusal{
		Status: http.StatusBadRequest, Outcome: telemetry.OutcomeBadRequest,
		Text: "this listener does not take the PROXY protocol from this address",
	})
}

// hearForwarded takes from r what a trusted proxy says in it of where it comes from, and has all others see that. Requests
// of several may come on one connection: what was said of another says nothing of this one. A proxy may not be trusted
// any more.
func (s *stranger) hearForwarded(r *http.Request) {
	if s.proxies == nil {
		return
	}
	if s.proxies.Source != forwarded.SourceProxyProtocol {
		var client netip.AddrPort
		if now := &s.door.limits.Load().Proxies; now.Trust(s.place.RemoteAddr()) {
			client, _ = now.Client(r.Header)
		}
		s.client = nil
		s.comesFrom(client)
	}
	r.RemoteAddr = s.RemoteAddr().String()
}

// comesFrom notes from where a stranger comes, by the word of a trusted proxy; not valid if there is none. His place is that
// address's from here on, if that is fair. Otherwise he is one too many, as those that come by themselves.
func (s *stranger) comesFrom(client netip.AddrPort) {
	if client.IsValid() {
		s.client = net.TCPAddrFromAddrPort(client)
	}
	if s.excess == "" {
		if s.excess = s.moveTo(fair.Address(s.RemoteAddr())); s.excess != "" {
			s.log(zap.WarnLevel, s.excess+"; new ones are turned away")
		}
	}
}

// moveTo makes the stranger's place one of this address; if that is not fair, one of those that are too many, and says why.
func (s *stranger) moveTo(address netip.Prefix) (excess string) {
	d := s.door
	s.place.mu.Lock()
	defer s.place.mu.Unlock()
	if s.place.stranger == nil { // he has left
		return ""
	}
	switch free := d.limits.Load().Connections - int(d.open.Load()); {
	case d.strangers.Held(address) > strangersPerFree*max(0, free):
		excess = tooManyConnections
	case !d.strangers.Move(s.address, address, 1):
		excess = tooManyStrangers
	default:
		s.address = address
		return ""
	}
	s.pool.Give(s.address, 1)
	if s.address, s.pool = address, d.slack; !d.slack.Take(address, 1) {
		s.pool = nil
	}
	return excess
}
