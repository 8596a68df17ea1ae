package fair_test

import (
	"net"
	"net/netip"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/opampgateway/opampgateway/internal/fair"
)

func TestOneAloneGetsHalf(t *testing.T) {
	pool, mallory, alice := fair.NewByAddress(128, 1), fair.AddressOf("10.0.0.1:1"), fair.AddressOf("10.0.0.2:1")
	got := 0
	for pool.Take(mallory, 1) {
		got++
	}
	require.Equal(t, 64, got)
	require.True(t, pool.Take(alice, 1), "there is room for whoever holds nothing")
	pool.Give(alice, 1)
	pool.Give(mallory, got)
	require.Zero(t, pool.Taken())
}

func TestOneAloneGetsMost(t *testing.T) {
	pool, mallory := fair.NewByAddress(100, 4), fair.AddressOf("10.0.0.1:1")
	got := 0
	for pool.Take(mallory, 1) {
		got++
	}
	require.Equal(t, 80, got)
	require.Equal(t, 80, pool.Held(mallory))
	require.Zero(t, pool.Held(fair.AddressOf("10.0.0.2:1")))
	require.False(t, pool.Take(fair.AddressOf("10.0.0.2:1"), 21), "more than is free")
	require.True(t, pool.Take(fair.AddressOf("10.0.0.2:1"), 20))
}

func TestManyShareTheRest(t *testing.T) {
	pool := fair.NewByAddress(100, 1)
	for i := range byte(100) { // each takes what it can get
		address := fair.Address(&net.TCPAddr{IP: net.IPv4(10, 0, 0, i), Port: int(i)})
		require.True(t, pool.Take(address, 1), "address %d got nothing", i)
	}
	require.False(t, pool.Take(fair.AddressOf("10.0.1.0:1"), 1), "all are taken")
}

func TestPoolCountsForItsHolders(t *testing.T) {
	pool := fair.NewPool(1000)
	require.True(t, pool.Take(0, 400))
	require.False(t, pool.Take(400, 201), "more than is free")
	require.True(t, pool.Take(0, 600))
	require.False(t, pool.Take(0, 1))
	pool.Give(1000)
	require.Zero(t, pool.Taken())
}

func TestWhoCountsAsOne(t *testing.T) {
	for _, test := range []struct{ address, want string }{
		{"192.0.2.7:4320", "192.0.2.7/32"},
		{"[::ffff:192.0.2.7]:1", "192.0.2.7/32"},
		{"[2001:db8:1:2:3:4:5:6]:1", "2001:db8:1:2::/64"},
		{"[fe80::1%eth0]:1", "fe80::/64"},
	} {
		require.Equal(t, netip.MustParsePrefix(test.want), fair.AddressOf(test.address))
	}
	require.Zero(t, fair.AddressOf("@"), "a Unix socket")
	require.Zero(t, fair.Address(nil))
	require.Zero(t, fair.Address(&net.UnixAddr{Name: "/run/gateway.sock"}))
	require.Equal(t, fair.AddressOf("192.0.2.7:9"), fair.Address(&net.TCPAddr{IP: net.ParseIP("192.0.2.7"), Port: 1}))
}

// TestManyByOne has a load balancer take places for those that it brings, and each of them get his share.
func TestManyByOne(t *testing.T) {
	pool, balancer, mallory, alice := fair.NewByAddress(20, 1), fair.AddressOf("10.0.0.1:1"), fair.AddressOf("10.0.0.2:1"), fair.AddressOf("10.0.0.3:1")
	for range 20 {
		require.True(t, pool.TakeFree(balancer, 1))
	}
	require.False(t, pool.TakeFree(balancer, 1), "all are taken")
	require.False(t, pool.Move(balancer, balancer, 1), "more than its own share")
	require.True(t, pool.Move(balancer, mallory, 1))
	require.False(t, pool.Move(balancer, mallory, 1), "what she has is more than is free")
	require.True(t, pool.Move(balancer, alice, 1))
	require.Equal(t, 20, pool.Taken())
	pool.Give(balancer, 18)
	require.True(t, pool.TakeFree(balancer, 1))
	require.True(t, pool.Move(balancer, balancer, 1), "its own is one")
	require.Equal(t, 1, pool.Held(balancer))
	for _, address := range []netip.Prefix{balancer, mallory, alice} {
		require.Equal(t, 1, pool.Held(address))
		pool.Give(address, 1)
	}
	require.Zero(t, pool.Taken())
}
