// Package fair shares places, or bytes, among those who want some: nobody may hold more than is
// still free. One alone gets half of all; each that joins in leaves less to the others, and
// whoever holds nothing yet gets something as long as anything is free. (It is what Choudhury and
// Hahne found for buffers in "Dynamic Queue Length Thresholds", 1998.)
package fair

import (
	"net"
	"net/netip"
	"sync"
)

// Pool is a number of places, or bytes, shared among holders that know how much they hold.
type Pool struct {
	mu    sync.Mutex
	limit int
	taken int
}

// NewPool returns a pool of so many places.
func NewPool(limit int) *Pool { return &Pool{limit: limit} }

// Take takes n more for somebody who holds so many already, and reports whether that is fair. It
// never waits.
func (p *Pool) Take(held, n int) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if held+n > p.limit-p.taken {
		return false
	}
	p.taken += n
	return true
}

// Give gives n back.
func (p *Pool) Give(n int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.taken -= n
}

// Taken returns how many are taken now.
func (p *Pool) Taken() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.taken
}

// ByAddress is a pool whose holders are addresses; see Address. Each may hold some times of what is
// still free.
type ByAddress struct {
	times int
	limit int

	mu    sync.Mutex
	taken int
	held  map[netip.Prefix]int // without those that hold nothing
}

// NewByAddress returns a pool of so many places, of which an address may hold so many times what is
// still free: alone it gets half of all when that is once, and four fifths when it is four times.
func NewByAddress(limit, times int) *ByAddress {
	return &ByAddress{times: times, limit: limit, held: map[netip.Prefix]int{}}
}

// Take takes n more for an address, and reports whether that is fair. It never waits.
func (p *ByAddress) Take(address netip.Prefix, n int) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if free := p.limit - p.taken; n > free || p.held[address]+n > p.times*free {
		return false
	}
	p.taken += n
	p.held[address] += n
	return true
}

// TakeFree takes n more for an address that stands for many, as that of a load balancer: as long as there is something free.
func (p *ByAddress) TakeFree(address netip.Prefix, n int) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if n > p.limit-p.taken {
		return false
	}
	p.taken += n
	p.held[address] += n
	return true
}

// Move makes n of one address those of another, if that is fair; it reports whether it is.
func (p *ByAddress) Move(from, to netip.Prefix, n int) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	held := p.held[to]
	if from == to {
		held -= n
	}
	if held+n > p.times*(p.limit-p.taken+n) {
		return false
	}
	p.held[to] += n
	if p.held[from] -= n; p.held[from] == 0 {
		delete(p.held, from)
	}
	return true
}

// Give gives n of an address back.
func (p *ByAddress) Give(address netip.Prefix, n int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.taken -= n
	if p.held[address] -= n; p.held[address] == 0 {
		delete(p.held, address)
	}
}

// Held returns how many an address holds now.
func (p *ByAddress) Held(address netip.Prefix) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.held[address]
}

// Taken returns how many are taken now.
func (p *ByAddress) Taken() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.taken
}

// Address is who counts as one: an IPv4 address, or the 64 bits of an IPv6 address that one
// subscriber has for himself (RFC 6177). All without an IP address, as on a Unix socket, are one.
func Address(addr net.Addr) netip.Prefix {
	if tcp, ok := addr.(*net.TCPAddr); ok {
		return prefixOf(tcp.AddrPort().Addr())
	}
	if addr == nil {
		return netip.Prefix{}
	}
	return AddressOf(addr.String())
}

// AddressOf is Address for the text of an address, with a port.
func AddressOf(hostPort string) netip.Prefix {
	at, err := netip.ParseAddrPort(hostPort)
	if err != nil {
		return netip.Prefix{}
	}
	return prefixOf(at.Addr())
}

func prefixOf(ip netip.Addr) netip.Prefix {
	ip = ip.Unmap().WithZone("")
	bits := ip.BitLen()
	if ip.Is6() {
		bits = 64
	}
	prefix, err := ip.Prefix(bits)
	if err != nil {
		return netip.Prefix{}
	}
	return prefix
}
