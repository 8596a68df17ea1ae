package door

import (
	"bufio"
	"crypto/tls"
	"fmt"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/zap"

	"github.com/opampgateway/opampgateway/internal/forwarded"
	"github.com/opampgateway/opampgateway/internal/telemetry"
)

// behind are limits with a load balancer on this host that says from where strangers come.
func behind(source forwarded.Source) Limits {
	limits := usual
	limits.Proxies = forwarded.Proxies{Networks: []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")}, Source: source}
	return limits
}

// fromAlice is the PROXY protocol's for a connection of alice.
const fromAlice = "PROXY TCP4 203.0.113.5 10.0.0.1 4711 4320\r\n"

// seen has a house note from where requests come.
func seen(addresses chan string) func(*http.Server) {
	return func(s *http.Server) {
		answer := s.Handler
		s.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			addresses <- r.RemoteAddr
			answer.ServeHTTP(w, r)
		})
	}
}

// TestProxyProtocol has a trusted load balancer say from where an agent comes, before TLS.
func TestProxyProtocol(t *testing.T) {
	secure, trusting := certificates(t)
	for name, config := range map[string]*tls.Config{"plain": nil, "TLS": secure} {
		for header, client := range map[string]string{
			fromAlice: "203.0.113.5:4711",
			"PROXY TCP6 2001:db8::7 2001:db8::1 4711 4320\r\n":                                                       "[2001:db8::7]:4711",
			"\r\n\r\n\x00\r\nQUIT\n\x21\x11\x00\x0c\xcb\x00\x71\x05\x0a\x00\x00\x01\x12\x67\x10\xe0":                 "203.0.113.5:4711",
			"\r\n\r\n\x00\r\nQUIT\n\x20\x00\x00\x00":                                                                 "127.0.0.1:",
			"PROXY UNKNOWN\r\n":                                                                                      "127.0.0.1:",
			"\r\n\r\n\x00\r\nQUIT\n\x21\x11\x00\x13\xcb\x00\x71\x05\x0a\x00\x00\x01\x12\x67\x10\xe0\x03\x00\x04abcd": "203.0.113.5:4711",
		} {
			t.Run(fmt.Sprintf("%s, %.12q, %s", name, header, client), func(t *testing.T) {
				from := make(chan string, 1)
				h := buildOnLoopback(t, config, behind(forwarded.SourceProxyProtocol), seen(from))
				v := h.knock().say(header)
				if config != nil {
					v.Conn = tls.Client(v.Conn, trusting)
					v.in = bufio.NewReader(v.Conn)
				}
				// A header that says otherwise is only the agent's.
				v.say(upgrade("X-Forwarded-For: 198.51.100.9", "Forwarded: for=198.51.100.9")).wantAnswer(http.StatusSwitchingProtocols)
				require.True(t, strings.HasPrefix(<-from, client))
				conn := <-h.letIn
				_, err := v.Write([]byte("x"))
				require.NoError(t, err)
				_, err = conn.Read(make([]byte, 1))
				require.NoError(t, err)
				conn.Close()
			})
		}
	}
	t.Run("what is refused bears the agent's address", func(t *testing.T) {
		h := buildOnLoopback(t, nil, behind(forwarded.SourceProxyProtocol))
		h.knock().say(fromAlice + "GET / HTTP/1.1\r\n" + strings.Repeat("X: y\r\n", 200)).wantRefused(http.StatusRequestHeaderFieldsTooLarge)
		require.Equal(t, "203.0.113.5", h.wantLog(zap.InfoLevel, "a request is refused")["client.address"])
	})
}

// TestProxyProtocolRefused has those say from where they come who are not to, and those not that are.
func TestProxyProtocolRefused(t *testing.T) {
	secure, _ := certificates(t)
	stranger := behind(forwarded.SourceProxyProtocol)
	stranger.Proxies.Networks = []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24")}
	const version2 = "\r\n\r\n\x00\r\nQUIT\n\x21\x11\x00\x0c\xcb\x00\x71\x05\x0a\x00\x00\x01\x12\x67\x10\xe0"
	for name, config := range map[string]*tls.Config{"plain": nil, "TLS": secure} {
		for who, limits := range map[string]Limits{"nobody is trusted": usual, "others are trusted": stranger, "headers are trusted": behind(forwarded.SourceXForwardedFor)} {
			for version, header := range map[string]string{"version 1": fromAlice, "version 2": version2} {
				t.Run(name+", "+who+", "+version, func(t *testing.T) {
					h := buildOnLoopback(t, config, limits)
					_, text := h.knock().say(header + upgrade()).wantRefused(http.StatusBadRequest)
					require.Contains(t, text, "PROXY protocol")
					fields := h.wantLog(zap.WarnLevel, "agents::trusted_proxies")
					require.Equal(t, "127.0.0.1", fields["client.address"], "not what it says")
					h.wantTurned(telemetry.OutcomeBadRequest, 1)
				})
			}
		}
		for what, said := range map[string]string{
			"no header": upgrade(), "TLS": "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03xxxxxxxxx",
			"a bad header": "PROXY TCP4 alice.example 10.0.0.1 4711 4320\r\n" + upgrade(), "a header without end": "PROXY " + strings.Repeat("x", 200),
		} {
			t.Run(name+", "+what, func(t *testing.T) {
				h := buildOnLoopback(t, config, behind(forwarded.SourceProxyProtocol))
				_, text := h.knock().say(said).wantRefused(http.StatusBadRequest)
				require.Contains(t, text, "PROXY protocol")
				h.wantLog(zap.WarnLevel, "send-proxy-v2")
				h.wantTurned(telemetry.OutcomeBadRequest, 1)
			})
		}
		t.Run(name+", the agent says it once more", func(t *testing.T) {
			h := buildOnLoopback(t, config, behind(forwarded.SourceProxyProtocol))
			h.knock().say(fromAlice + "PROXY TCP4 198.51.100.9 10.0.0.1 4711 4320\r\n" + upgrade()).wantRefused(http.StatusBadRequest)
			require.Equal(t, "203.0.113.5", h.wantLog(zap.WarnLevel, "a peer sends the PROXY protocol")["client.address"])
		})
		t.Run(name+", a probe", func(t *testing.T) {
			h := buildOnLoopback(t, config, behind(forwarded.SourceProxyProtocol))
			h.knock().Close()
			require.Eventually(t, func() bool { return h.logs.FilterLevelExact(zap.DebugLevel).Len() == 1 && h.door.Open() == 0 }, 10*time.Second, time.Millisecond)
			require.Equal(t, 1, h.logs.Len())
			require.Empty(t, h.turned)
		})
	}
}

// TestProxyProtocolInTime gives a load balancer's header no more time than there is for the request.
func TestProxyProtocolInTime(t *testing.T) {
	for _, said := range []string{"", "PROXY TCP4 203.", fromAlice, fromAlice + "GET / HTTP/1.1\r\n"} {
		t.Run(fmt.Sprintf("%q", said), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				limits := behind(forwarded.SourceProxyProtocol)
				limits.Proxies.Networks = append(limits.Proxies.Networks, netip.MustParsePrefix("10.0.0.0/8"))
				h := buildInMemory(t, nil, limits)
				begin := time.Now()
				v := h.knock().say(said)
				var dripping sync.WaitGroup
				if said == "PROXY TCP4 203." {
					dripping.Go(func() {
						for range 40 {
							time.Sleep(900 * time.Millisecond)
							_, _ = v.Write([]byte("0"))
						}
					})
				}
				_, _ = v.in.WriteTo(new(strings.Builder))
				require.Equal(t, usual.Timeout, time.Since(begin))
				v.Close()
				dripping.Wait()
				synctest.Wait()
				require.Zero(t, h.door.Open())
			})
		})
	}
}

// TestForwardedFor takes from a trusted proxy's headers from where an agent comes, and from nobody else's.
func TestForwardedFor(t *testing.T) {
	untrusted := behind(forwarded.SourceXForwardedFor)
	untrusted.Proxies.Networks = []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24")}
	for _, test := range []struct {
		name   string
		limits Limits
		want   string
	}{
		{"trusted", behind(forwarded.SourceXForwardedFor), "203.0.113.5:0"},
		{"the other header", behind(forwarded.SourceForwarded), "203.0.113.6:0"},
		{"of somebody else", untrusted, "127.0.0.1:"},
		{"where none is taken", usual, "127.0.0.1:"},
	} {
		t.Run(test.name, func(t *testing.T) {
			from := make(chan string, 1)
			h := buildOnLoopback(t, nil, test.limits, seen(from))
			h.knock().say(upgrade("X-Forwarded-For: 198.51.100.9, 203.0.113.5, 127.0.0.9", "Forwarded: for=203.0.113.6")).wantAnswer(http.StatusSwitchingProtocols)
			require.True(t, strings.HasPrefix(<-from, test.want))
			(<-h.letIn).Close()
		})
	}
	t.Run("without the header", func(t *testing.T) {
		from := make(chan string, 1)
		h := buildOnLoopback(t, nil, behind(forwarded.SourceXForwardedFor), seen(from))
		h.knock().say(upgrade()).wantAnswer(http.StatusSwitchingProtocols)
		require.True(t, strings.HasPrefix(<-from, "127.0.0.1:"))
		(<-h.letIn).Close()
	})
}

// TestCrowdBehindProxy has mallory come by a load balancer many times: she gets half of the places, as she would by
// herself, and alice, who comes the same way, has one.
func TestCrowdBehindProxy(t *testing.T) {
	for name, say := range map[string]struct {
		source forwarded.Source
		from   func(ip string) string
	}{
		"PROXY protocol":  {forwarded.SourceProxyProtocol, func(ip string) string { return "PROXY TCP4 " + ip + " 10.0.0.1 4711 4320\r\n" + upgrade() }},
		"X-Forwarded-For": {forwarded.SourceXForwardedFor, func(ip string) string { return upgrade("X-Forwarded-For: " + ip) }},
	} {
		t.Run(name, func(t *testing.T) {
			limits := behind(say.source)
			limits.Strangers = 20
			h := buildOnLoopback(t, nil, limits)
			goOn := h.hold()
			var waiting []*visitor
			knock := func(ip string, waits bool) {
				t.Helper()
				v := h.knock().say(say.from(ip))
				if !waits {
					_, text := v.wantRefused(http.StatusServiceUnavailable)
					require.Equal(t, tooManyStrangers+"\n", text)
					return
				}
				waiting = append(waiting, v)
				require.Eventually(t, func() bool { return int(h.begun.Load()) == len(waiting) }, 10*time.Second, time.Millisecond)
			}
			for range 10 {
				knock("198.51.100.9", true)
			}
			knock("198.51.100.9", false)
			require.Equal(t, "198.51.100.9", h.wantLog(zap.WarnLevel, tooManyStrangers)["client.address"])
			for i := range 5 { // of the 10 that are free
				knock(fmt.Sprintf("203.0.113.%d", i), true)
			}
			knock("198.51.100.9", false)
			require.Equal(t, 15, h.door.strangers.Taken())
			goOn()
			for _, v := range waiting {
				v.wantAnswer(http.StatusSwitchingProtocols)
			}
		})
	}
	t.Run("before it says whom", func(t *testing.T) {
		limits := behind(forwarded.SourceProxyProtocol)
		limits.Strangers = 20
		h := buildOnLoopback(t, nil, limits)
		for range 20 {
			h.knock()
		}
		require.Eventually(t, func() bool { return h.door.strangers.Taken() == 20 }, 10*time.Second, time.Millisecond, "all places, and not half of them")
		h.knock().say(fromAlice + upgrade()).wantRefused(http.StatusServiceUnavailable)
		require.Equal(t, 20, h.door.strangers.Taken(), "and no more than that")
	})
}
