package door

import "bytes"

// maxRequestLine bounds the first line of a request, in bytes: RFC 9112, section 3, recommends to take
// at least 8000.
const maxRequestLine = 8 << 10

// head watches the head of a request go by, in whatever pieces it comes. It knows lines, not headers:
// one that continues another counts, too. A line ends as net/http has it: with LF, or CR LF.
type head struct {
	// Set once.
	maxLines, maxSize int

	start  [len(prefaceHTTP2)]byte // its first bytes
	seen   int                     // how many of them
	lines  int                     // that have ended, the request line included
	size   int                     // bytes of those, without the request line
	length int                     // bytes of the line that has begun
	cr     bool                    // which are a single CR
	done   bool                    // the empty line was there
}

// verdict is what a head has come to.
type verdict int

const (
	verdictUnfinished verdict = iota
	verdictDone
	verdictLongRequestLine
	verdictTooManyLines
	verdictTooLarge
)

// look has the watcher see b, and returns how many bytes of it are behind the end of the head. After
// a verdict there is nothing more to look at.
func (h *head) look(b []byte) (behind int, v verdict) {
	h.seen += copy(h.start[h.seen:], b)
	for len(b) > 0 {
		part, ended := b, false
		if i := bytes.IndexByte(b, '\n'); i >= 0 {
			part, ended = b[:i+1], true
		}
		b = b[len(part):]
		h.cr = h.length == 0 && part[0] == '\r' && (len(part) == 1 || len(part) == 2 && ended) ||
			h.cr && len(part) == 1 && ended
		empty := h.cr || h.length == 0 && len(part) == 1 && ended
		if empty && ended {
			h.done = true
			return len(b), verdictDone
		}
		h.length += len(part)
		if !empty {
			switch {
			case h.lines == 0 && h.length > maxRequestLine:
				return len(b), verdictLongRequestLine
			case h.lines > h.maxLines:
				return len(b), verdictTooManyLines
			case h.lines > 0 && h.size+h.length > h.maxSize:
				return len(b), verdictTooLarge
			}
		}
		if ended {
			if h.lines > 0 {
				h.size += h.length
			}
			h.lines++
			h.length = 0
		}
	}
	return 0, verdictUnfinished
}

// begun reports whether anything of it has come.
func (h *head) begun() bool { return h.seen > 0 }

// http2 reports whether it is the begin of a connection of HTTP/2 (RFC 9113, section 3.4).
func (h *head) http2() bool { return string(h.start[:h.seen]) == prefaceHTTP2 }

const prefaceHTTP2 = "PRI * HTTP/2.0\r\n"

// pieceSize makes a piece a KiB.
const pieceSize = 1<<10 - 16

// piece is some of a head that comes in many. It has a fixed size, since one that grows would leave
// behind several times its bytes.
type piece struct {
	next *piece
	n    int
	b    [pieceSize]byte
}

// pieces are what has come of a head.
type pieces struct {
	first, last *piece
	taken       int // bytes of the first one
}

// fill keeps what read reads.
func (p *pieces) fill(read func([]byte) int) {
	if p.last == nil || p.last.n == pieceSize {
		next := &piece{}
		if p.last == nil {
			p.first = next
		} else {
			p.last.next = next
		}
		p.last = next
	}
	last := p.last
	last.n += read(last.b[last.n:])
}

// keep keeps a copy of b.
func (p *pieces) keep(b []byte) {
	for len(b) > 0 {
		p.fill(func(room []byte) int {
			n := copy(room, b)
			b = b[n:]
			return n
		})
	}
}

// take moves some to b.
func (p *pieces) take(b []byte) (n int) {
	for p.first != nil && n < len(b) {
		m := copy(b[n:], p.first.b[p.taken:p.first.n])
		n, p.taken = n+m, p.taken+m
		if p.taken < p.first.n {
			break
		}
		p.first, p.taken = p.first.next, 0
	}
	if p.first == nil {
		p.last = nil
	}
	return n
}
