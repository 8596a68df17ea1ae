package forwarded

import (
	"net"
	"net/http"
	"net/netip"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// balancers are two networks of load balancers.
func balancers(t testing.TB, source Source) *Proxies {
	t.Helper()
	p := &Proxies{Source: source}
	for _, text := range []string{"10.0.0.0/8", "2001:db8:1::/48", "192.0.2.1"} {
		network, err := ParseNetwork(text)
		require.NoError(t, err)
		p.Networks = append(p.Networks, network)
	}
	return p
}

func TestParseNetwork(t *testing.T) {
	for text, want := range map[string]string{
		"10.1.2.3/8": "10.0.0.0/8", "192.0.2.1": "192.0.2.1/32", "2001:db8::1": "2001:db8::1/128", "::ffff:192.0.2.1": "192.0.2.1/32",
		"0.0.0.0/0": "0.0.0.0/0", "": "", "balancer.example": "", "10.0.0.0/33": "", "fe80::1%eth0": "", "::ffff:10.0.0.0/104": "",
	} {
		network, err := ParseNetwork(text)
		require.Equal(t, want == "", err != nil, text)
		if err == nil {
			require.Equal(t, want, network.String())
		}
	}
}

func TestTrust(t *testing.T) {
	p := balancers(t, SourceXForwardedFor)
	for ip, want := range map[string]bool{
		"10.9.8.7": true, "::ffff:10.9.8.7": true, "192.0.2.1": true, "192.0.2.2": false, "2001:db8:1::7": true, "2001:db8:2::7": false,
	} {
		require.Equal(t, want, p.Trust(&net.TCPAddr{IP: net.ParseIP(ip), Port: 1}), ip)
	}
	require.False(t, p.Trust(&net.UnixAddr{Name: "@", Net: "unix"}))
	require.False(t, p.Trust(nil))
	p.Source = SourceConnection
	require.False(t, p.Trust(&net.TCPAddr{IP: net.ParseIP("10.9.8.7")}), "they say nothing")
}

// TestClient takes the last address that is not a proxy's own, whatever an agent has put before it.
func TestClient(t *testing.T) {
	for _, test := range []struct {
		name   string
		lines  []string
		want   string // of X-Forwarded-For; empty for none
		forged bool   // where the header Forwarded differs
	}{
		{name: "nothing said"},
		{name: "one", lines: []string{"203.0.113.5"}, want: "203.0.113.5:0"},
		{name: "with a port", lines: []string{"203.0.113.5:4711"}, want: "203.0.113.5:4711"},
		{name: "IPv6", lines: []string{"2001:db8:2::7"}, want: "[2001:db8:2::7]:0"},
		{name: "IPv6 in brackets", lines: []string{"[2001:db8:2::7]"}, want: "[2001:db8:2::7]:0"},
		{name: "IPv6 with a port", lines: []string{"[2001:db8:2::7]:4711"}, want: "[2001:db8:2::7]:4711"},
		{name: "IPv4 as IPv6", lines: []string{"::ffff:203.0.113.5"}, want: "203.0.113.5:0"},
		{name: "through two proxies", lines: []string{"203.0.113.5, 10.0.0.2"}, want: "203.0.113.5:0"},
		{name: "in two lines", lines: []string{"203.0.113.5", "10.0.0.2 ,10.0.0.3"}, want: "203.0.113.5:0"},
		{name: "an agent that lies", lines: []string{"198.51.100.9, 203.0.113.5"}, want: "203.0.113.5:0"},
		{name: "an agent that says to be a proxy", lines: []string{"198.51.100.9, 10.0.0.2, 203.0.113.5, 10.0.0.3"}, want: "203.0.113.5:0"},
		{name: "an agent that says nonsense", lines: []string{"nonsense,\x00, 203.0.113.5"}, want: "203.0.113.5:0"},
		{name: "all proxies", lines: []string{"10.0.0.9, 10.0.0.2"}, want: "10.0.0.9:0"},
		{name: "a proxy that does not know", lines: []string{"203.0.113.5, unknown"}},
		{name: "a proxy behind which one does not know", lines: []string{"203.0.113.5, unknown, 10.0.0.3"}, want: "10.0.0.3:0"},
		{name: "empty", lines: []string{""}},
		{name: "commas", lines: []string{"203.0.113.5,,"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			check := func(p *Proxies, headers http.Header) {
				t.Helper()
				client, ok := p.Client(headers)
				require.Equal(t, test.want != "", ok)
				if ok {
					require.Equal(t, test.want, client.String())
				}
			}
			check(balancers(t, SourceXForwardedFor), http.Header{"X-Forwarded-For": test.lines, "Forwarded": {"for=198.51.100.9"}})
			// The same as the header Forwarded has it.
			var lines []string
			for _, line := range test.lines {
				var hops []string
				for hop := range strings.SplitSeq(line, ",") {
					hops = append(hops, `by=10.0.0.1;For="`+strings.TrimSpace(hop)+`"; proto=https`)
				}
				lines = append(lines, strings.Join(hops, ", "))
			}
			check(balancers(t, SourceForwarded), http.Header{"Forwarded": lines, "X-Forwarded-For": {"198.51.100.9"}})
		})
	}
	headers := http.Header{"Forwarded": {"for=198.51.100.9"}, "X-Forwarded-For": {"198.51.100.9"}}
	for _, source := range []Source{SourceConnection, SourceProxyProtocol} {
		_, ok := balancers(t, source).Client(headers)
		require.False(t, ok, "headers are not what is asked for")
	}
}

// TestForwarded reads the examples of RFC 7239, and what an agent may send to have another's address taken for its own.
func TestForwarded(t *testing.T) {
	for line, want := range map[string]string{
		`for="_gazonk"`:                                        "",
		`For="[2001:db8:cafe::17]:4711"`:                       "[2001:db8:cafe::17]:4711",
		`for=192.0.2.60;proto=http;by=203.0.113.43`:            "192.0.2.60:0",
		`for=192.0.2.43, for=198.51.100.17`:                    "198.51.100.17:0",
		`for="192.0.2.43:\4711"`:                               "192.0.2.43:4711",
		`proto=http`:                                           "",
		`for=198.51.100.9, proto=http`:                         "",
		`for=198.51.100.9;x=", for=203.0.113.5`:                "",
		`for="198.51.100.9, for=203.0.113.5`:                   "", // a quote of the agent's swallows what the proxy says: nobody knows
		`secret=",;for=198.51.100.9"; for = 203.0.113.5 ; x=y`: "203.0.113.5:0",
	} {
		client, ok := balancers(t, SourceForwarded).Client(http.Header{"Forwarded": {line}})
		require.Equal(t, want != "", ok, line)
		if ok {
			require.Equal(t, want, client.String(), line)
		}
	}
}

// FuzzClient has an agent say whatever it likes: what the proxy adds is found nevertheless, or nothing is.
func FuzzClient(f *testing.F) {
	for _, line := range []string{"", "203.0.113.5", "for=203.0.113.5", `for="`, `for=198.51.100.9;x="`, `for=198.51.100.9;x="\\`, `for="[::1]:7`, "a,b;c=\\\"", "10.0.0.1, ,"} {
		f.Add(line)
	}
	agent := netip.MustParseAddrPort("203.0.113.5:0")
	f.Fuzz(func(t *testing.T, line string) {
		client, ok := balancers(t, SourceXForwardedFor).Client(http.Header{"X-Forwarded-For": {line + ", 203.0.113.5, 10.0.0.3"}})
		require.True(t, ok)
		require.Equal(t, agent, client)
		client, ok = balancers(t, SourceForwarded).Client(http.Header{"Forwarded": {line, "for=203.0.113.5"}})
		require.True(t, ok)
		require.Equal(t, agent, client)
		for _, added := range []string{", for=203.0.113.5", `, for="203.0.113.5";by="10.0.0.3:443"`, `,by="[::1]:1";for=203.0.113.5`} {
			client, ok = balancers(t, SourceForwarded).Client(http.Header{"Forwarded": {line + added}})
			if ok || !strings.Contains(line, `"`) { // what is quoted, and not closed, hides what follows
				require.Equal(t, agent, client, added)
			}
		}
	})
}
