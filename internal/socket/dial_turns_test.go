package socket

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// names is a network with one name, and what comes of dialing each of its addresses.
type names struct {
	addresses []string
	answers   map[string]func(ctx context.Context) (net.Conn, error) // by address without port; else it connects

	mu     sync.Mutex
	dialed []string
	conns  []*memConn
	begin  time.Time
	at     []time.Duration
}

func (n *names) turn(turn int) *turnDialer {
	n.begin = time.Now()
	return &turnDialer{
		turn: turn,
		lookup: func(_ context.Context, _, host string) ([]netip.Addr, error) {
			if host != "server" {
				return nil, &net.DNSError{Err: "no such host", Name: host, IsNotFound: true}
			}
			var found []netip.Addr
			for _, a := range n.addresses {
				found = append(found, netip.MustParseAddr(a))
			}
			return found, nil
		},
		dial: func(ctx context.Context, _, address string) (net.Conn, error) {
			host, _, _ := net.SplitHostPort(address)
			n.mu.Lock()
			n.dialed = append(n.dialed, address)
			n.at = append(n.at, time.Since(n.begin))
			answer := n.answers[host]
			n.mu.Unlock()
			if answer != nil {
				return answer(ctx)
			}
			near, _ := memPipe(1)
			n.mu.Lock()
			defer n.mu.Unlock()
			n.conns = append(n.conns, near)
			return near, nil
		},
	}
}

func silent(ctx context.Context) (net.Conn, error) {
	<-ctx.Done()
	return nil, &net.OpError{Op: "dial", Net: "tcp", Err: ctx.Err()}
}

func refusing(context.Context) (net.Conn, error) {
	return nil, &net.OpError{Op: "dial", Net: "tcp", Err: errors.New("connection refused")}
}

func unreachable(context.Context) (net.Conn, error) {
	return nil, &net.OpError{Op: "dial", Net: "tcp", Err: errors.New("no route to host")}
}

// Links spread over all addresses of a name, in whatever order these are told.
func TestTurnsOfAddresses(t *testing.T) {
	for shuffled, addresses := range [][]string{
		{"10.0.0.1", "10.0.0.2", "10.0.0.3", "2001:db8::1", "2001:db8::2"},
		{"10.0.0.3", "2001:db8::2", "10.0.0.1", "::ffff:10.0.0.2", "2001:db8::1", "10.0.0.1"},
	} {
		for turn, want := range []string{
			"10.0.0.1 10.0.0.2 10.0.0.3 2001:db8::1 2001:db8::2",
			"10.0.0.2 10.0.0.3 10.0.0.1 2001:db8::2 2001:db8::1",
			"10.0.0.3 10.0.0.1 10.0.0.2 2001:db8::1 2001:db8::2",
			"10.0.0.1 10.0.0.2 10.0.0.3 2001:db8::2 2001:db8::1",
		} {
			var found []netip.Addr
			for _, a := range addresses {
				found = append(found, netip.MustParseAddr(a))
			}
			got := inTurn(found, turn)
			assert.Equal(t, "["+want+"]", fmt.Sprint(got), "turn %d, list %d", turn, shuffled)
		}
	}
	found := []netip.Addr{netip.MustParseAddr("2001:db8::2"), netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("fe80::1%eth0")}
	assert.Equal(t, "[fe80::1%eth0 2001:db8::2 10.0.0.1]", fmt.Sprint(inTurn(found, 1)))

	for turn, want := range []string{"10.0.0.1:443", "10.0.0.2:443", "10.0.0.1:443"} {
		n := &names{addresses: []string{"10.0.0.2", "10.0.0.1"}}
		conn, err := n.turn(turn).DialContext(t.Context(), "tcp", "server:443")
		require.NoError(t, err)
		conn.Close()
		require.Equal(t, []string{want}, n.dialed)
	}
}

func TestADeadAddressCostsAMoment(t *testing.T) {
	all := []string{"10.0.0.1", "10.0.0.2", "2001:db8::1"}
	for name, test := range map[string]struct {
		answers map[string]func(context.Context) (net.Conn, error)
		want    []string
		at      []time.Duration
	}{
		"silent":     {map[string]func(context.Context) (net.Conn, error){"10.0.0.1": silent}, []string{"10.0.0.1:80", "10.0.0.2:80"}, []time.Duration{0, nextAddressAfter}},
		"refusing":   {map[string]func(context.Context) (net.Conn, error){"10.0.0.1": refusing}, []string{"10.0.0.1:80", "10.0.0.2:80"}, []time.Duration{0, 0}},
		"a family":   {map[string]func(context.Context) (net.Conn, error){"10.0.0.1": silent, "10.0.0.2": silent}, []string{"10.0.0.1:80", "10.0.0.2:80", "[2001:db8::1]:80"}, []time.Duration{0, nextAddressAfter, 2 * nextAddressAfter}},
		"one of all": {map[string]func(context.Context) (net.Conn, error){"10.0.0.1": silent, "10.0.0.2": refusing}, []string{"10.0.0.1:80", "10.0.0.2:80", "[2001:db8::1]:80"}, []time.Duration{0, nextAddressAfter, nextAddressAfter}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				n := &names{addresses: all, answers: test.answers}
				conn, err := n.turn(0).DialContext(t.Context(), "tcp", "server:80")
				require.NoError(t, err)
				conn.Close()
				assert.Equal(t, test.want, n.dialed)
				assert.Equal(t, test.at, n.at)
			})
		})
	}
}

// The first that answers is taken, and of the others nothing is left.
func TestTheFirstAnswerIsTaken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var late *memConn
		n := &names{addresses: []string{"10.0.0.1", "10.0.0.2"}}
		n.answers = map[string]func(context.Context) (net.Conn, error){"10.0.0.1": func(ctx context.Context) (net.Conn, error) {
			<-ctx.Done() // it has connected at the very moment
			late, _ = memPipe(1)
			return late, nil
		}}
		conn, err := n.turn(0).DialContext(t.Context(), "tcp", "server:80")
		require.NoError(t, err)
		require.Same(t, n.conns[0], conn)
		_, err = late.Write([]byte("x"))
		require.ErrorIs(t, err, net.ErrClosed)
		_, err = conn.Write([]byte("x"))
		require.NoError(t, err)
		conn.Close()
	})
	t.Run("slow but sure", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			n := &names{addresses: []string{"10.0.0.1", "10.0.0.2"}}
			far, _ := memPipe(1)
			n.answers = map[string]func(context.Context) (net.Conn, error){"10.0.0.1": func(context.Context) (net.Conn, error) {
				time.Sleep(2 * time.Second)
				return far, nil
			}, "10.0.0.2": silent}
			conn, err := n.turn(0).DialContext(t.Context(), "tcp", "server:80")
			require.NoError(t, err)
			require.Same(t, far, conn)
		})
	})
}

func TestWhenNoAddressAnswers(t *testing.T) {
	type answer = func(context.Context) (net.Conn, error)
	both := func(one, another answer) *names {
		return &names{
			addresses: []string{"10.0.0.1", "10.0.0.2"},
			answers:   map[string]answer{"10.0.0.1": one, "10.0.0.2": another},
		}
	}
	synctest.Test(t, func(t *testing.T) {
		// The error is the same in each turn, or it would be logged each time.
		for turn := range 4 {
			_, err := both(refusing, unreachable).turn(turn).DialContext(t.Context(), "tcp", "server:80")
			require.EqualError(t, err, "dial tcp: connection refused (and 1 other addresses of the name failed)")
			op := (*net.OpError)(nil)
			require.ErrorAs(t, err, &op)
		}
		begin := time.Now()
		_, err := both(silent, silent).turn(0).DialContext(t.Context(), "tcp", "server:80")
		require.ErrorIs(t, err, context.DeadlineExceeded)
		require.Equal(t, addressTimeout+nextAddressAfter, time.Since(begin))

		begin = time.Now()
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		_, err = both(silent, silent).turn(0).DialContext(ctx, "tcp", "server:80")
		require.ErrorIs(t, err, context.DeadlineExceeded)
		require.Equal(t, time.Second, time.Since(begin))

		// One address alone has all the time that there is.
		n := &names{addresses: []string{"10.0.0.1"}, answers: map[string]func(context.Context) (net.Conn, error){"10.0.0.1": silent}}
		begin = time.Now()
		ctx, cancel = context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		_, err = n.turn(1).DialContext(ctx, "tcp", "server:80")
		require.ErrorIs(t, err, context.DeadlineExceeded)
		require.Equal(t, time.Minute, time.Since(begin))
	})
}

func TestNamesAndAddresses(t *testing.T) {
	n := &names{}
	for _, address := range []string{"10.0.0.9:80", "[2001:db8::9]:80", "[fe80::9%eth0]:80"} {
		_, err := n.turn(3).DialContext(t.Context(), "tcp", address)
		require.NoError(t, err)
		require.Equal(t, address, n.dialed[len(n.dialed)-1])
	}
	_, err := n.turn(0).DialContext(t.Context(), "tcp", "nobody:80")
	require.EqualError(t, err, "dial tcp: lookup nobody: no such host")
	_, err = n.turn(0).DialContext(t.Context(), "tcp", "server:80")
	require.EqualError(t, err, "dial tcp: lookup server: no address")
	dns := (*net.DNSError)(nil)
	require.ErrorAs(t, err, &dns)
	_, err = n.turn(0).DialContext(t.Context(), "tcp", "server")
	require.ErrorContains(t, err, "missing port")
}

// The machine's own resolver and network are used.
func TestDialInTurn(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer l.Close()
	_, port, err := net.SplitHostPort(l.Addr().String())
	require.NoError(t, err)
	for turn := range 3 {
		conn, err := DialInTurn(turn)(t.Context(), "tcp", net.JoinHostPort("localhost", port))
		require.NoError(t, err)
		require.True(t, strings.HasPrefix(conn.RemoteAddr().String(), "127."))
		conn.Close()
	}
}
