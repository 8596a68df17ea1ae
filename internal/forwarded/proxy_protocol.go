package forwarded

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"net/netip"
	"strconv"
	"strings"
)

// The PROXY protocol (haproxy.org, "The PROXY protocol Versions 1 & 2"): a load balancer that passes on a connection as it is
// says first from where it has come.

const (
	// signature1 and signature2 are how the two versions begin.
	signature1 = "PROXY "
	signature2 = "\r\n\r\n\x00\r\nQUIT\n"

	// maxLine1 is the longest header of version 1, and what a reader has to take at once at most.
	maxLine1 = 107

	// maxRest2 bounds what follows the first 16 bytes of version 2: addresses of Unix sockets have 216, and what a load
	// balancer adds (TLVs, as of a cloud's endpoint, or of a certificate's names) some hundred.
	maxRest2 = 2 << 10
)

// Begins reports whether b, the first bytes of a connection, are those of the PROXY protocol, as far as can be seen.
func Begins(b []byte) bool {
	return len(b) >= 5 && (bytes.HasPrefix(b, []byte(signature1)[:min(len(b), len(signature1))]) ||
		bytes.HasPrefix(b, []byte(signature2)[:min(len(b), len(signature2))]))
}

var (
	// ErrNoHeader means that a connection does not begin with the PROXY protocol.
	ErrNoHeader = errors.New("the connection does not begin with the PROXY protocol")
	// ErrBadHeader means that it does, and cannot be read.
	ErrBadHeader = errors.New("the header of the PROXY protocol cannot be read")
)

// ReadHeader reads the header of the PROXY protocol, and nothing behind it, so that of version 1 is read byte by
// byte. The address is not valid if the load balancer speaks for itself, as when it looks whether we are there, or does not know.
func ReadHeader(r io.Reader) (client netip.AddrPort, err error) {
	var b [maxLine1]byte
	// No header is shorter: that of version 1 has 15 bytes at least.
	if _, err := io.ReadFull(r, b[:len(signature2)]); err != nil {
		return netip.AddrPort{}, err
	}
	switch {
	case string(b[:len(signature2)]) == signature2:
		return readRest2(r)
	case string(b[:len(signature1)]) != signature1:
		return netip.AddrPort{}, ErrNoHeader
	}
	for n := len(signature2); n < len(b); n++ {
		if _, err := io.ReadFull(r, b[n:n+1]); err != nil {
			return netip.AddrPort{}, err
		}
		if b[n] == '\n' {
			return parseLine1(string(b[:n+1]))
		}
	}
	return netip.AddrPort{}, ErrBadHeader
}

// parseLine1 reads a header of version 1.
func parseLine1(line string) (netip.AddrPort, error) {
	line, ended := strings.CutSuffix(line, "\r\n")
	fields := strings.Split(line, " ")
	if !ended {
		return netip.AddrPort{}, ErrBadHeader
	}
	if fields[1] == "UNKNOWN" {
		return netip.AddrPort{}, nil
	}
	if len(fields) != 6 || fields[1] != "TCP4" && fields[1] != "TCP6" {
		return netip.AddrPort{}, ErrBadHeader
	}
	ip, err := netip.ParseAddr(fields[2])
	port, portErr := strconv.ParseUint(fields[4], 10, 16)
	if err != nil || portErr != nil || ip.Zone() != "" || ip.Is4() != (fields[1] == "TCP4") {
		return netip.AddrPort{}, ErrBadHeader
	}
	return netip.AddrPortFrom(ip.Unmap(), uint16(port)), nil
}

// readRest2 reads what follows the signature of version 2: version and command, address family and transport, the length of
// the rest, the addresses, and what else there is, which is read past.
func readRest2(r io.Reader) (netip.AddrPort, error) {
	var head [4]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return netip.AddrPort{}, err
	}
	length := int(binary.BigEndian.Uint16(head[2:]))
	const commandLocal, commandProxy = 0x20, 0x21 // of version 2
	if command := head[0]; command != commandLocal && command != commandProxy || length > maxRest2 {
		return netip.AddrPort{}, ErrBadHeader
	}
	rest := make([]byte, length)
	if _, err := io.ReadFull(r, rest); err != nil {
		return netip.AddrPort{}, err
	}
	if head[0] == commandLocal {
		return netip.AddrPort{}, nil
	}
	const overIPv4, overIPv6 = 0x1, 0x2
	var size int // of an address
	switch head[1] >> 4 {
	case overIPv4:
		size = 4
	case overIPv6:
		size = 16
	default: // a Unix socket, or unknown
		return netip.AddrPort{}, nil
	}
	if length < 2*size+4 {
		return netip.AddrPort{}, ErrBadHeader
	}
	ip, _ := netip.AddrFromSlice(rest[:size])
	return netip.AddrPortFrom(ip.Unmap(), binary.BigEndian.Uint16(rest[2*size:])), nil
}
