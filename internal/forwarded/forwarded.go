// Package forwarded finds out from where an agent connects that comes through load balancers and proxies: by the word of
// those that are trusted, as they say it at the start of a connection (the PROXY protocol) or in headers of a request
// (X-Forwarded-For, Forwarded). Whatever anybody else says counts for nothing.
package forwarded

import (
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
)

// Source is how proxies say from where an agent connects.
type Source int

// The ways there are.
const (
	SourceConnection    Source = iota // they do not: it is where the connection comes from
	SourceProxyProtocol               // by the PROXY protocol
	SourceXForwardedFor               // by the header X-Forwarded-For
	SourceForwarded                   // by the header Forwarded (RFC 7239)
)

// Proxies are those whose word is taken. The zero value trusts nobody.
type Proxies struct {
	Networks []netip.Prefix
	Source   Source
}

// ParseNetwork reads a network, or an address, which is a network of its own.
func ParseNetwork(text string) (netip.Prefix, error) {
	if ip, err := netip.ParseAddr(text); err == nil && ip.Zone() == "" {
		ip = ip.Unmap()
		return netip.PrefixFrom(ip, ip.BitLen()), nil
	}
	network, err := netip.ParsePrefix(text)
	if err != nil || network.Addr().Is4In6() {
		return netip.Prefix{}, fmt.Errorf("%q is no network, such as 192.0.2.0/24 or 2001:db8::/32, and no IP address", text)
	}
	return network.Masked(), nil
}

// Trust reports whether a connection from there is one of a proxy whose word is taken.
func (p *Proxies) Trust(from net.Addr) bool {
	tcp, ok := from.(*net.TCPAddr)
	return ok && p.Source != SourceConnection && p.trust(tcp.AddrPort().Addr())
}

func (p *Proxies) trust(ip netip.Addr) bool {
	ip = ip.Unmap().WithZone("")
	return slices.ContainsFunc(p.Networks, func(network netip.Prefix) bool { return network.Contains(ip) })
}

// Client returns from where the request with these headers came to the first of the proxies that are trusted: each has
// added the address of who came to it, so that is the last which is not one of theirs. Without a port it is 0. What
// stands before that, or before something that is no address, is only the word of somebody else. There
// is none where no header says anything.
func (p *Proxies) Client(headers http.Header) (client netip.AddrPort, ok bool) {
	var hops []string
	switch p.Source {
	case SourceXForwardedFor:
		for _, line := range headers["X-Forwarded-For"] {
			hops = append(hops, strings.Split(line, ",")...)
		}
	case SourceForwarded:
		for _, line := range headers["Forwarded"] {
			hops = appendHops(hops, line)
		}
	case SourceConnection, SourceProxyProtocol:
	}
	for _, hop := range slices.Backward(hops) {
		at, err := parseHop(strings.Trim(hop, " \t"))
		if err != nil {
			break
		}
		client, ok = at, true
		if !p.trust(at.Addr()) {
			break
		}
	}
	return client, ok
}

// parseHop reads an address as proxies write it: with a port or without, one of IPv6 in brackets or not.
func parseHop(text string) (netip.AddrPort, error) {
	at, err := netip.ParseAddrPort(text)
	if err != nil {
		inner, bracketed := strings.CutPrefix(text, "[")
		if bracketed {
			inner, bracketed = strings.CutSuffix(inner, "]")
		}
		if !bracketed {
			inner = text
		}
		var ip netip.Addr
		if ip, err = netip.ParseAddr(inner); err != nil {
			return netip.AddrPort{}, err
		}
		at = netip.AddrPortFrom(ip, 0)
	}
	return netip.AddrPortFrom(at.Addr().Unmap().WithZone(""), at.Port()), nil
}

// appendHops appends what the header Forwarded says of each hop: its "for", which is empty where it says nothing of that, or
// cannot be read. A quoted string may hold what separates things elsewhere.
func appendHops(hops []string, line string) []string {
	for more := true; more; {
		var hop string
		for inHop := true; inHop; {
			var name, value string
			var end byte
			name, value, end, line = nextPair(line)
			switch {
			case end == unended:
				hop = "" // what stands there may be another's, swallowed by a quote
			case strings.EqualFold(name, "for"):
				hop = value
			}
			inHop, more = end == ';', end == ',' || end == ';'
		}
		hops = append(hops, hop)
	}
	return hops
}

// unended is what a quoted string has that is never closed.
const unended = '"'

// nextPair takes one name=value off a header, and what has ended it: a comma, a semicolon, 0 for the header's end, or unended.
func nextPair(line string) (name, value string, end byte, rest string) {
	var b strings.Builder
	named, quoted := false, false
	i := 0
	for ; i < len(line); i++ {
		switch c := line[i]; {
		case quoted && c == '\\' && i+1 < len(line):
			i++
			b.WriteByte(line[i])
		case c == '"':
			quoted = !quoted
		case quoted:
			b.WriteByte(c)
		case c == '=' && !named:
			name, named = strings.Trim(b.String(), " \t"), true
			b.Reset()
		case c == ',' || c == ';':
			return name, strings.Trim(b.String(), " \t"), c, line[i+1:]
		default:
			b.WriteByte(c)
		}
	}
	if quoted {
		return "", "", unended, ""
	}
	return name, strings.Trim(b.String(), " \t"), 0, ""
}
