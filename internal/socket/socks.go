package socket

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strconv"
)

// What a SOCKS5 client and its proxy say, of RFC 1928, and of RFC 1929 for user and password.
const (
	socksVersion, socksPasswordVersion = 5, 1

	socksNoAuthentication, socksPassword, socksNoMethod = 0x00, 0x02, 0xff

	socksConnect                    = 1
	socksIPv4, socksName, socksIPv6 = 1, 3, 4

	// maxSOCKSText is the longest name, user or password that can be said.
	maxSOCKSText = 255
	portLength   = 2
)

// socksReplies are what a proxy may answer instead of yes.
var socksReplies = [...]string{
	1: "general failure", 2: "connection not allowed by its rules", 3: "network unreachable", 4: "host unreachable",
	5: "connection refused", 6: "TTL expired", 7: "command not supported", 8: "address type not supported",
}

var errNoSOCKS = errors.New("does not speak SOCKS5")

// askSOCKS has a SOCKS5 proxy connect to address. The name in it is the proxy's to look up. A refusal is a
// *HandshakeError: with the status of an HTTP proxy, 407, if the proxy wants a user and password, or others.
func askSOCKS(conn io.ReadWriter, through *url.URL, address string) error {
	who := proxyAt(through)
	refused := func(reply byte, words string, status int) error {
		return &HandshakeError{Proxy: who, Status: strconv.Itoa(int(reply)) + " " + words, StatusCode: status}
	}
	host, port, _ := net.SplitHostPort(address) // by hostPort
	password, _ := through.User.Password()
	if max(len(host), len(through.User.Username()), len(password)) > maxSOCKSText {
		return fmt.Errorf("%s: name, user or password is longer than SOCKS5 allows", who)
	}
	s := socks{conn: conn}
	methods := []byte{socksNoAuthentication}
	if through.User != nil {
		methods = append(methods, socksPassword)
	}
	method := s.ask(append([]byte{socksVersion, byte(len(methods))}, methods...), socksVersion)
	switch {
	case s.err != nil:
	case method == socksNoMethod:
		return refused(method, "no acceptable method of authentication", http.StatusProxyAuthRequired)
	case method == socksPassword && through.User != nil:
		said := append([]byte{socksPasswordVersion}, socksText(through.User.Username())...)
		if status := s.ask(append(said, socksText(password)...), socksPasswordVersion); s.err == nil && status != 0 {
			return refused(status, "user and password refused", http.StatusProxyAuthRequired)
		}
	case method != socksNoAuthentication:
		s.err = errNoSOCKS
	}
	reply := s.ask(append([]byte{socksVersion, socksConnect, 0}, socksAddress(host, port)...), socksVersion)
	if s.err == nil && reply != 0 {
		words := "for a reason unknown"
		if int(reply) < len(socksReplies) {
			words = socksReplies[reply]
		}
		return refused(reply, words, 0)
	}
	s.skipAddress()
	switch {
	case errors.Is(s.err, io.EOF), errors.Is(s.err, io.ErrUnexpectedEOF):
		return fmt.Errorf("%s has hung up instead of an answer: %w", who, io.ErrUnexpectedEOF)
	case errors.Is(s.err, errNoSOCKS):
		return fmt.Errorf("%s %w", who, s.err)
	case s.err != nil:
		return fmt.Errorf("%s: %w", who, s.err)
	}
	return nil
}

// socks is a dialogue with a SOCKS5 proxy. After an error nothing more is said.
type socks struct {
	conn io.ReadWriter
	err  error
}

// ask says something, and returns the second byte of the answer, which begins with version.
func (s *socks) ask(said []byte, version byte) byte {
	if s.err == nil {
		_, s.err = s.conn.Write(said)
	}
	answer := s.read(2)
	if answer[0] != version {
		s.fail(errNoSOCKS)
	}
	return answer[1]
}

// skipAddress reads the rest of a reply: where the proxy has connected from, which is nothing to us. What
// follows is the server's.
func (s *socks) skipAddress() {
	length := 0
	switch kind := s.read(2)[1]; kind {
	case socksIPv4:
		length = net.IPv4len
	case socksIPv6:
		length = net.IPv6len
	case socksName:
		length = int(s.read(1)[0])
	default:
		s.fail(errNoSOCKS)
	}
	s.read(length + portLength)
}

// fail ends the dialogue with err, unless it has ended.
func (s *socks) fail(err error) {
	if s.err == nil {
		s.err = err
	}
}

// read returns the next bytes of the proxy; zeroes after an error.
func (s *socks) read(n int) []byte {
	answer := make([]byte, n)
	if s.err == nil {
		_, s.err = io.ReadFull(s.conn, answer)
	}
	return answer
}

// socksText is a text behind its length.
func socksText(text string) []byte { return append([]byte{byte(len(text))}, text...) }

// socksAddress is where to connect to.
func socksAddress(host, port string) []byte {
	number, _ := strconv.ParseUint(port, 10, 16)
	var target []byte
	switch ip, err := netip.ParseAddr(host); {
	case err != nil:
		target = append([]byte{socksName}, socksText(host)...)
	case ip.Is4():
		target = append([]byte{socksIPv4}, ip.AsSlice()...)
	default:
		target = append([]byte{socksIPv6}, ip.AsSlice()...)
	}
	return append(target, byte(number>>8), byte(number))
}
