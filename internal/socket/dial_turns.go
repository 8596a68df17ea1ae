package socket

import (
	"cmp"
	"context"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"
)

const (
	// nextAddressAfter is how long one address of a name has for an answer before the next is tried as
	// well. What is right for two families of addresses (RFC 8305) is right for several servers.
	nextAddressAfter = 300 * time.Millisecond

	// addressTimeout is how long one of several addresses is tried in all, so that those that answer
	// are not kept from their next turn by one that does not.
	addressTimeout = 5 * time.Second
)

// DialInTurn returns a NetDial that tries all addresses of a name. The first is another one for each turn,
// so that connections spread over the servers behind the name, however its addresses are ordered.
func DialInTurn(turn int) func(ctx context.Context, network, address string) (net.Conn, error) {
	d := turnDialer{turn: turn, lookup: net.DefaultResolver.LookupNetIP, dial: (&net.Dialer{}).DialContext}
	return d.DialContext
}

// turnDialer dials by the addresses of a name.
type turnDialer struct {
	turn   int
	lookup func(ctx context.Context, network, host string) ([]netip.Addr, error)
	dial   func(ctx context.Context, network, address string) (net.Conn, error)
}

// DialContext connects to the address of a name that answers first. It returns once all attempts have ended.
func (d *turnDialer) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return nil, &net.OpError{Op: "dial", Net: network, Err: err}
	}
	if _, err := netip.ParseAddr(host); err == nil {
		return d.dial(ctx, network, address)
	}
	found, err := d.lookup(ctx, "ip", host)
	if err != nil {
		return nil, &net.OpError{Op: "dial", Net: network, Err: err}
	}
	if len(found) == 0 {
		return nil, &net.OpError{Op: "dial", Net: network, Err: &net.DNSError{Err: "no address", Name: host, IsNotFound: true}}
	}
	var addresses []string
	for _, a := range inTurn(found, d.turn) {
		addresses = append(addresses, net.JoinHostPort(a.String(), port))
	}
	if len(addresses) == 1 {
		return d.dial(ctx, network, addresses[0])
	}
	return d.dialFirst(ctx, network, addresses)
}

// inTurn returns the addresses in the order in which they are tried: those of the family that the resolver
// prefers, then the others, each beginning at another one in each turn.
func inTurn(found []netip.Addr, turn int) []netip.Addr {
	families := [2][]netip.Addr{}
	preferred := found[0].Unmap().Is4()
	for _, a := range found {
		a = a.Unmap()
		if a.Is4() == preferred {
			families[0] = append(families[0], a)
		} else {
			families[1] = append(families[1], a)
		}
	}
	var order []netip.Addr
	for _, family := range families {
		slices.SortFunc(family, netip.Addr.Compare) // a server of names shuffles them
		family = slices.Compact(family)
		if n := len(family); n > 0 {
			order = append(append(order, family[turn%n:]...), family[:turn%n]...)
		}
	}
	return order
}

// dialFirst dials the addresses one after the other: the next when the one before has failed, or has not
// answered for a moment. The first that answers is taken, the others are given up.
func (d *turnDialer) dialFirst(ctx context.Context, network string, addresses []string) (net.Conn, error) {
	ctx, cancel := context.WithCancel(ctx)
	var attempts sync.WaitGroup
	defer attempts.Wait()
	defer cancel()

	type result struct {
		address string
		conn    net.Conn
		err     error
	}
	results := make(chan result, len(addresses)) // nobody waits to say how it ended
	attempt := func(address string) {
		ctx, cancel := context.WithTimeout(ctx, addressTimeout)
		defer cancel()
		conn, err := d.dial(ctx, network, address)
		results <- result{address, conn, err}
	}
	var failed []result
	var next <-chan time.Time
	for started := 0; len(failed) < len(addresses); {
		if started < len(addresses) && next == nil {
			address := addresses[started]
			attempts.Go(func() { attempt(address) })
			started++
			next = time.After(nextAddressAfter)
		}
		select {
		case r := <-results:
			if r.err == nil {
				cancel()
				attempts.Wait()
				close(results)
				for late := range results {
					if late.conn != nil {
						late.conn.Close()
					}
				}
				return r.conn, nil
			}
			failed, next = append(failed, r), nil
		case <-next:
			next = nil
		}
	}
	// Whichever came first, the error is of the same address: it is logged when it changes.
	told := slices.MinFunc(failed, func(a, b result) int { return cmp.Compare(a.address, b.address) })
	return nil, fmt.Errorf("%w (and %d other addresses of the name failed)", told.err, len(failed)-1)
}
