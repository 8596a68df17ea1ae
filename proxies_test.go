package opampgateway

import (
	"context"
	"io"
	"net"
	"testing"
	"testing/synctest"

	"github.com/stretchr/testify/require"
	"go.uber.org/zap"

	"github.com/opampgateway/opampgateway/internal/gatewaytest"
)

// balancerIP is where a load balancer is that some of these tests trust.
const balancerIP = "10.1.2.3"

// believing trusts the load balancer, and nobody else, in this way.
func believing(from AddressFrom) func(*Config) {
	return func(cfg *Config) { cfg.Agents.TrustedProxies, cfg.Agents.AddressFrom = []string{balancerIP}, from }
}

// passOn has those that connect from here on come by a host that sends the PROXY protocol.
func (s *stage) passOn(by, header string) {
	dial := s.net.DialFrom(by)
	s.door.Dial = func(ctx context.Context, network, address string) (net.Conn, error) {
		conn, err := dial(ctx, network, address)
		if err == nil {
			_, err = io.WriteString(conn, header)
		}
		return conn, err
	}
}

// TestAddressOfAgent says to the server, to the log and on the status page from where an agent connects, by the word
// of a trusted load balancer.
func TestAddressOfAgent(t *testing.T) {
	headers := []string{"X-Forwarded-For", "198.51.100.9, 203.0.113.5", "Forwarded", `for=198.51.100.9, for="203.0.113.5:4711"`}
	for from, want := range map[AddressFrom]string{
		AddressFromProxyProtocol: "203.0.113.5:4711", AddressFromXForwardedFor: "203.0.113.5:0", AddressFromForwarded: "203.0.113.5:4711",
	} {
		t.Run(string(from), func(t *testing.T) {
			play(t, func(t *testing.T, s *stage) {
				s.comeFrom(balancerIP)
				if from == AddressFromProxyProtocol {
					s.passOn(balancerIP, "PROXY TCP4 203.0.113.5 10.0.0.1 4711 4320\r\n")
				}
				alice := s.introduce("alice", headers...)
				require.Equal(t, want, s.server.WantQuestion().RemoteAddress)
				require.Equal(t, want, s.shownAgents("")[0].Address)
				alice.SendText("no OpAMP")
				synctest.Wait()
				logged := s.logged(zap.InfoLevel, "agent's message is not relayed")
				require.Equal(t, "203.0.113.5", logged[0].ContextMap()["client.address"])

				s.server.OnConnect(func(q *gatewaytest.Question) { q.Refuse(401) })
				s.door.WantRefused(t, "mallory", 401, headers...)
				refused := s.logged(zap.InfoLevel, "server refused agent")
				require.Equal(t, "203.0.113.5", refused[0].ContextMap()["client.address"])
			}, believing(from), withPage)
		})
	}
}

// TestAddressIsNotClaimed has an agent say that it connects from elsewhere: nobody believes it.
func TestAddressIsNotClaimed(t *testing.T) {
	headers := []string{"X-Forwarded-For", "203.0.113.5", "Forwarded", "for=203.0.113.5"}
	for name, change := range map[string]func(*Config){
		"nobody is trusted": func(*Config) {}, "X-Forwarded-For of another": believing(AddressFromXForwardedFor),
		"Forwarded of another": believing(AddressFromForwarded), "PROXY protocol of another": believing(AddressFromProxyProtocol),
	} {
		t.Run(name, func(t *testing.T) {
			play(t, func(t *testing.T, s *stage) {
				s.comeFrom("10.9.9.9")
				s.introduce("mallory", headers...)
				host, _, err := net.SplitHostPort(s.server.WantQuestion().RemoteAddress)
				require.NoError(t, err)
				require.Equal(t, "10.9.9.9", host)
				s.passOn("10.9.9.9", "PROXY TCP4 203.0.113.5 10.0.0.1 4711 4320\r\n")
				_, resp, err := s.door.Knock(t, "mallory")
				require.Error(t, err)
				require.Equal(t, 400, resp.StatusCode)
			}, change)
		})
	}
}

// TestAddressAfterReload changes who is trusted: that holds for those who come from then on.
func TestAddressAfterReload(t *testing.T) {
	play(t, func(t *testing.T, s *stage) {
		s.comeFrom(balancerIP)
		alice := s.introduce("alice", "X-Forwarded-For", "203.0.113.5")
		require.NotContains(t, s.server.WantQuestion().RemoteAddress, "203.0.113.5")
		before := s.reload(believing(AddressFromXForwardedFor))
		require.Same(t, before, s.gateway)
		s.introduce("bob", "X-Forwarded-For", "203.0.113.6")
		require.Equal(t, "203.0.113.6:0", s.server.WantQuestion().RemoteAddress)
		s.exchange(alice, 1)
		s.reload(func(cfg *Config) { cfg.Agents.TrustedProxies, cfg.Agents.AddressFrom = nil, AddressFromConnection })
		s.introduce("cathy", "X-Forwarded-For", "203.0.113.7")
		require.NotContains(t, s.server.WantQuestion().RemoteAddress, "203.0.113.7")
	})
}
