package e2e

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net"
)

// frameLimitListener is that of a server which takes only WebSocket frames of so many bytes.
type frameLimitListener struct {
	net.Listener
	limit int
}

func (l *frameLimitListener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return limitFrames(conn, l.limit), nil
}

// frameLimitConn is a connection on which a larger WebSocket frame cannot be read, as with peers
// and proxies that have room for no more. It begins with the headers of the upgrade.
type frameLimitConn struct {
	net.Conn
	limit int

	// All below is the reader's.
	begun  []byte // of the headers, or else of the header of a frame
	framed bool   // the headers are over
	rest   int    // bytes of the present frame that are to come
	err    error  // a frame was too large
}

func limitFrames(conn net.Conn, limit int) net.Conn {
	return &frameLimitConn{Conn: conn, limit: limit}
}

func (c *frameLimitConn) Read(p []byte) (int, error) {
	if c.err != nil {
		return 0, c.err
	}
	n, err := c.Conn.Read(p)
	if c.pass(p[:n]); c.err != nil {
		return 0, c.err
	}
	return n, err
}

// pass looks at what was read, piece by piece.
func (c *frameLimitConn) pass(p []byte) {
	for len(p) > 0 && c.err == nil {
		if c.rest > 0 {
			n := min(c.rest, len(p))
			c.rest -= n
			p = p[n:]
			continue
		}
		c.begun = append(c.begun, p[0])
		p = p[1:]
		if !c.framed {
			if bytes.HasSuffix(c.begun, []byte("\r\n\r\n")) {
				c.framed, c.begun = true, nil
			}
			continue
		}
		if size, whole := payloadSize(c.begun); whole {
			if size > uint64(c.limit) {
				c.err = fmt.Errorf("a WebSocket frame of %d bytes, which is above %d", size, c.limit)
			}
			c.rest, c.begun = int(size), nil
		}
	}
}

// payloadSize reads the header of a WebSocket frame (RFC 6455, section 5.2), if all of it is there.
func payloadSize(header []byte) (size uint64, whole bool) {
	if len(header) < 2 {
		return 0, false
	}
	end, short := 2, header[1]&0x7f
	switch short {
	case 126:
		end += 2
	case 127:
		end += 8
	}
	length := end
	if header[1]&0x80 != 0 {
		end += 4 // the mask
	}
	if len(header) < end {
		return 0, false
	}
	switch short {
	case 126:
		return uint64(binary.BigEndian.Uint16(header[2:length])), true
	case 127:
		return binary.BigEndian.Uint64(header[2:length]), true
	default:
		return uint64(short), true
	}
}
