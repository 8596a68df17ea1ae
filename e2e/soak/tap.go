package main

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"time"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/opampgateway/opampgateway/e2e/fault"
)

// way is one connection on a gateway's line up: a link. The line sees all that the gateway has
// written there, so that what was lost with a link is known, and not guessed.
type way struct {
	gateway *gateway
	conn    *fault.Conn
	number  int // of its gateway's
	opened  time.Time

	// Guarded by ledger.mu.
	hit     string // what was done to it first; "" for nothing
	hitAt   time.Time
	closed  time.Time // when its gateway sent a close frame
	stopped bool      // the server was stopped when it lived
}

// lost reports whether the way was taken from its gateway.
func (w *way) lost() bool {
	end := w.conn.End()
	return w.hit != "" || w.stopped || end.By == fault.Fault ||
		end.By == fault.Target && w.closed.IsZero() // which answers a close frame by closing
}

func (w *way) String() string { return fmt.Sprintf("way %d up from %s", w.number, w.gateway.name) }

// ended tells what ended the way, for the report; "" if nothing did.
func (w *way) ended(l *ledger) string {
	end := w.conn.End()
	text := ""
	switch {
	case end.By == fault.Nobody:
	case w.hit != "":
		text = fmt.Sprintf("%s at %s", w.hit, l.since(w.hitAt))
	default:
		text = fmt.Sprintf("ended by %s at %s", end.By, l.since(end.At))
	}
	if !end.Cut.IsZero() {
		text += ", cut at " + l.since(end.Cut)
	}
	return text
}

// asking is that the server, or the gateway above, was asked about an agent on a way: from then
// on the agent's gateway sends there what the agent says.
type asking struct {
	way *way
	at  time.Time
}

// tap returns what listens in on the links of a gateway.
func (l *ledger) tap(g *gateway) func(*fault.Conn) (up, down func([]byte)) {
	return func(c *fault.Conn) (up, down func([]byte)) {
		l.mu.Lock()
		defer l.mu.Unlock()
		w := &way{gateway: g, conn: c, number: len(g.ways) + 1, opened: time.Now()}
		g.ways = append(g.ways, w)
		f := &frames{message: func(start []byte) { l.written(w, start) }, closing: func() { l.closing(w) }}
		f.frame = func(size int) { l.limitFrame(g, g, w, size) }
		if g.above == nil {
			return f.read, nil
		}
		back := &frames{message: func([]byte) {}, closing: func() {}}
		back.frame = func(size int) { l.limitFrame(g, g.above, w, size) }
		return f.read, back.read
	}
}

// hitWay notes that a fault is about to hit a link of g; the first is what counts.
func (l *ledger) hitWay(g *gateway, c *fault.Conn, what string) *way {
	w := l.way(g, c)
	l.mu.Lock()
	defer l.mu.Unlock()
	if w.hit == "" {
		w.hit, w.hitAt = what, time.Now()
	}
	return w
}

// way returns the link of g that c is.
func (l *ledger) way(g *gateway, c *fault.Conn) *way {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, w := range slices.Backward(g.ways) {
		if w.conn == c {
			return w
		}
	}
	panic("a link that was never opened")
}

// closing notes that a gateway has said all that it has to say on a link.
func (l *ledger) closing(w *way) {
	l.mu.Lock()
	defer l.mu.Unlock()
	w.closed = time.Now()
}

// written takes the start of a message that a gateway has written, whole, on w.
func (l *ledger) written(w *way, start []byte) {
	kind, data := customMessage(start)
	switch kind {
	case "connect":
		var question struct {
			Headers http.Header `json:"headers"`
		}
		if json.Unmarshal(data, &question) != nil {
			return // the server will say so
		}
		if e := l.epochNamed(question.Headers.Get(actorHeader)); e != nil {
			l.mu.Lock()
			defer l.mu.Unlock()
			hop := e.hop(w.gateway)
			e.askings[hop] = append(e.askings[hop], asking{w, time.Now()})
		}
	case "up":
		s, err := startOfStamp(data)
		if err != nil {
			return
		}
		l.mu.Lock()
		defer l.mu.Unlock()
		if e := l.epochOfLocked(s.actor, s.epoch); e != nil && s.number > 0 && int(s.number) <= len(e.ups) {
			said, hop := &e.ups[s.number-1], e.hop(w.gateway)
			if said.written[hop] != w {
				said.ways[hop]++
			}
			said.written[hop], said.writtenAt[hop] = w, time.Now()
		}
	}
}

// customMessage returns type and data of the custom message in a frame, as far as there is one in
// its start.
func customMessage(start []byte) (kind string, data []byte) {
	if len(start) == 0 {
		return "", nil
	}
	const custom, typ, payload = 13, 2, 3 // of AgentToServer, and of CustomMessage
	fields := beginnings(start[1:])
	inner := beginnings(fields[custom])
	return string(inner[typ]), inner[payload]
}

// beginnings returns the fields of a message that have bytes, each as far as it is there.
func beginnings(b []byte) map[protowire.Number][]byte {
	fields := map[protowire.Number][]byte{}
	for len(b) > 0 {
		number, typ, n := protowire.ConsumeTag(b)
		if n < 0 {
			break
		}
		if b = b[n:]; typ != protowire.BytesType {
			if n = protowire.ConsumeFieldValue(number, typ, b); n < 0 {
				break
			}
			b = b[n:]
			continue
		}
		length, n := protowire.ConsumeVarint(b)
		if n < 0 {
			break
		}
		b = b[n:]
		length = min(length, uint64(len(b)))
		fields[number], b = b[:length], b[length:]
	}
	return fields
}

// startSize is how much of a message is looked at: a question about an agent in whole.
const startSize = 4 << 10

// frames follows the WebSocket frames of a client (RFC 6455, section 5.2), behind its upgrade request, or
// of a server, behind its answer.
type frames struct {
	message func(start []byte) // is called with the start of each message, when the whole is there
	closing func()             // is called when there is a close frame
	frame   func(size int)     // is called when a frame starts, with the size of its payload; nil for nobody

	upgraded bool
	header   []byte // of the upgrade request, or the frame, as far as it is there
	opcode   byte
	fin      bool
	key      [4]byte // zero for none, as a server has none
	at, left int     // in the payload
	start    []byte  // of the message
}

func (f *frames) read(b []byte) {
	for len(b) > 0 {
		if f.left > 0 {
			n := min(len(b), f.left)
			f.payload(b[:n])
			b = b[n:]
		} else {
			f.header = append(f.header, b[0])
			b = b[1:]
			f.open()
		}
	}
}

// open looks at the header, if that is complete.
func (f *frames) open() {
	if !f.upgraded {
		if bytes.HasSuffix(f.header, []byte("\r\n\r\n")) {
			f.upgraded, f.header = true, nil
		}
		return
	}
	const fin, opcode, masked, length = 0x80, 0x0f, 0x80, 0x7f
	if len(f.header) < 2 {
		return
	}
	size, more := 2, 0
	switch f.header[1] & length {
	case 126:
		more = 2
	case 127:
		more = 8
	}
	size += more
	f.key = [4]byte{}
	if f.header[1]&masked != 0 {
		size += len(f.key)
	}
	if len(f.header) < size {
		return
	}
	switch more {
	case 0:
		f.left = int(f.header[1] & length)
	case 2:
		f.left = int(binary.BigEndian.Uint16(f.header[2:]))
	default:
		f.left = int(binary.BigEndian.Uint64(f.header[2:]))
	}
	f.fin, f.opcode, f.at = f.header[0]&fin != 0, f.header[0]&opcode, 0
	if f.header[1]&masked != 0 {
		copy(f.key[:], f.header[size-len(f.key):])
	}
	f.header = f.header[:0]
	if f.frame != nil {
		f.frame(f.left)
	}
	if f.left == 0 {
		f.close()
	}
}

func (f *frames) payload(b []byte) {
	const control = 0x8
	if room := startSize - len(f.start); room > 0 && f.opcode < control {
		for i, c := range b[:min(len(b), room)] {
			f.start = append(f.start, c^f.key[(f.at+i)%len(f.key)])
		}
	}
	f.at, f.left = f.at+len(b), f.left-len(b)
	if f.left == 0 {
		f.close()
	}
}

// close is the end of a frame.
func (f *frames) close() {
	const closing = 0x8
	switch {
	case f.opcode == closing:
		f.closing()
	case f.opcode < closing && f.fin:
		f.message(f.start)
		f.start = f.start[:0]
	}
}
