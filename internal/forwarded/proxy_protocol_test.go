package forwarded

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"net/netip"
	"regexp"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// header2 is a header of version 2.
func header2(command, family byte, rest string) string {
	return signature2 + string([]byte{command, family}) + string(binary.BigEndian.AppendUint16(nil, uint16(len(rest)))) + rest
}

const (
	from4 = "\xcb\x00\x71\x05\x0a\x00\x00\x01\x12\x67\x10\xe0" // 203.0.113.5:4711 to 10.0.0.1:4320
	from6 = "\x20\x01\x0d\xb8\x00\x02\x00\x00\x00\x00\x00\x00\x00\x00\x00\x07" +
		"\x20\x01\x0d\xb8\x00\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x01\x12\x67\x10\xe0"
)

// headers are good and bad ones, and whom they tell of: "" for nobody, an error for those that cannot be read.
var headers = []struct {
	name, header, client string
	err                  error
}{
	{"version 1", "PROXY TCP4 203.0.113.5 10.0.0.1 4711 4320\r\n", "203.0.113.5:4711", nil},
	{"version 1, IPv6", "PROXY TCP6 2001:db8:2::7 2001:db8:1::1 4711 4320\r\n", "[2001:db8:2::7]:4711", nil},
	{"version 1, unknown", "PROXY UNKNOWN\r\n", "", nil},
	{"version 1, unknown with addresses", "PROXY UNKNOWN ffff:f...f:ffff 1 2\r\n", "", nil},
	{"version 1, longest", "PROXY UNKNOWN " + strings.Repeat("x", maxLine1-16) + "\r\n", "", nil},
	{"version 1, too long", "PROXY UNKNOWN " + strings.Repeat("x", maxLine1-15) + "\r\n", "", ErrBadHeader},
	{"version 1, without end", "PROXY " + strings.Repeat("x", 200), "", ErrBadHeader},
	{"version 1, without CR", "PROXY TCP4 203.0.113.5 10.0.0.1 4711 4320\n", "", ErrBadHeader},
	{"version 1, a field too few", "PROXY TCP4 203.0.113.5 4711 4320\r\n", "", ErrBadHeader},
	{"version 1, a field too many", "PROXY TCP4 203.0.113.5 10.0.0.1 4711 4320 1\r\n", "", ErrBadHeader},
	{"version 1, another family", "PROXY TCP6 203.0.113.5 10.0.0.1 4711 4320\r\n", "", ErrBadHeader},
	{"version 1, a name", "PROXY TCP4 agent.example 10.0.0.1 4711 4320\r\n", "", ErrBadHeader},
	{"version 1, a zone", "PROXY TCP6 fe80::1%eth0 2001:db8:1::1 4711 4320\r\n", "", ErrBadHeader},
	{"version 1, a port too high", "PROXY TCP4 203.0.113.5 10.0.0.1 65536 4320\r\n", "", ErrBadHeader},
	{"version 1, UDP", "PROXY UDP4 203.0.113.5 10.0.0.1 4711 4320\r\n", "", ErrBadHeader},
	{"version 2", header2(0x21, 0x11, from4), "203.0.113.5:4711", nil},
	{"version 2, IPv6", header2(0x21, 0x21, from6), "[2001:db8:2::7]:4711", nil},
	{"version 2, IPv4 as IPv6", header2(0x21, 0x21, "\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\xff\xff\xcb\x00\x71\x05"+from6[16:]), "203.0.113.5:4711", nil},
	{"version 2, with more", header2(0x21, 0x11, from4+"\x03\x00\x04abcd"), "203.0.113.5:4711", nil},
	{"version 2, with all there may be", header2(0x21, 0x11, from4+strings.Repeat("x", maxRest2-len(from4))), "203.0.113.5:4711", nil},
	{"version 2, with more than that", header2(0x21, 0x11, from4+strings.Repeat("x", maxRest2-len(from4)+1)), "", ErrBadHeader},
	{"version 2, the balancer itself", header2(0x20, 0x00, ""), "", nil},
	{"version 2, the balancer itself, with addresses", header2(0x20, 0x11, from4), "", nil},
	{"version 2, unix", header2(0x21, 0x31, strings.Repeat("x", 216)), "", nil},
	{"version 2, unknown", header2(0x21, 0x00, ""), "", nil},
	{"version 2, cut addresses", header2(0x21, 0x11, from4[:11]), "", ErrBadHeader},
	{"version 2, cut addresses of IPv6", header2(0x21, 0x21, from6[:35]), "", ErrBadHeader},
	{"version 3", header2(0x31, 0x11, from4), "", ErrBadHeader},
	{"version 2, unknown command", header2(0x22, 0x11, from4), "", ErrBadHeader},
	{"HTTP", "GET /v1/opamp HTTP/1.1\r\n\r\n", "", ErrNoHeader},
	{"TLS", "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03xxxxxx", "", ErrNoHeader},
	{"almost version 2", "\r\n\r\n\x00\r\nQUIT\rxxxx", "", ErrNoHeader},
	{"nothing", "", "", io.EOF},
	{"some", "PROXY TC", "", io.ErrUnexpectedEOF},
	{"not all", "PROXY TCP4 203.0.113.5 ", "", io.EOF},
	{"not all of version 2", header2(0x21, 0x11, from4)[:20], "", io.ErrUnexpectedEOF},
}

// TestReadHeader reads headers, and nothing of what is behind.
func TestReadHeader(t *testing.T) {
	const behind = "\x16\x03\x01what the agent says"
	for _, test := range headers {
		t.Run(test.name, func(t *testing.T) {
			text := test.header
			if test.err == nil {
				text += behind
			}
			in := strings.NewReader(text)
			client, err := ReadHeader(in)
			require.ErrorIs(t, err, test.err)
			require.Equal(t, test.client != "", client.IsValid())
			if client.IsValid() {
				require.Equal(t, test.client, client.String())
			}
			if test.err == nil {
				rest, err := io.ReadAll(in)
				require.NoError(t, err)
				require.Equal(t, behind, string(rest))
			}
		})
	}
}

func TestBegins(t *testing.T) {
	for _, text := range []string{"PROXY", "PROXY ", "PROXY TCP4", "\r\n\r\n\x00", signature2, signature2 + "\x21"} {
		require.True(t, Begins([]byte(text)), "%q", text)
	}
	for _, text := range []string{"", "P", "PROX", "GET / HTTP", "PROXYX", "\r\n\r\nGET /", "\x16\x03\x01\x02\x00\x01"} {
		require.False(t, Begins([]byte(text)), "%q", text)
	}
}

var line1 = regexp.MustCompile(`^PROXY (?:UNKNOWN(?: [^\n]*)?|(TCP[46]) ([0-9a-fA-F.:]+) [^ \n]* ([0-9]+) [^ \n]*)\r\n`)

// FuzzReadHeader holds the reader against another one, that has all at once.
func FuzzReadHeader(f *testing.F) {
	for _, h := range headers {
		f.Add([]byte(h.header))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		in := bytes.NewReader(b)
		client, err := ReadHeader(in)
		taken := len(b) - in.Len()
		if err != nil {
			require.False(t, client.IsValid())
			require.LessOrEqual(t, taken, max(maxLine1, 16+maxRest2))
			return
		}
		if !bytes.HasPrefix(b, []byte(signature2)) {
			require.LessOrEqual(t, taken, maxLine1)
			require.Equal(t, bytes.IndexByte(b, '\n')+1, taken)
			found := line1.FindSubmatch(b[:taken])
			if string(b[6:13]) == "UNKNOWN" {
				require.False(t, client.IsValid())
				return
			}
			require.NotNil(t, found)
			at, err := netip.ParseAddr(string(found[2]))
			require.NoError(t, err)
			require.Equal(t, at.Unmap(), client.Addr())
			var port uint16
			_, err = fmt.Sscan(strings.TrimLeft(string(found[3]), "0")+" ", &port)
			require.True(t, err == nil || strings.Trim(string(found[3]), "0") == "")
			require.Equal(t, port, client.Port())
			return
		}
		length := int(b[14])<<8 | int(b[15])
		require.Equal(t, 16+length, taken)
		switch {
		case b[12] == 0x21 && b[13]>>4 == 1:
			require.Equal(t, netip.AddrPortFrom(netip.AddrFrom4([4]byte(b[16:20])), uint16(b[24])<<8|uint16(b[25])), client)
		case b[12] == 0x21 && b[13]>>4 == 2:
			require.Equal(t, netip.AddrPortFrom(netip.AddrFrom16([16]byte(b[16:32])).Unmap(), uint16(b[48])<<8|uint16(b[49])), client)
		default:
			require.False(t, client.IsValid())
		}
	})
}
