package opampgateway

import (
	"slices"

	"github.com/open-telemetry/opamp-go/protobufs"
	"google.golang.org/protobuf/proto"

	"github.com/opampgateway/opampgateway/internal/connect"
	"github.com/opampgateway/opampgateway/internal/wire"
)

// maxCapabilities is how long a server's list of custom capabilities may be, in bytes: each agent is
// told of it.
const maxCapabilities = 64 << 10

// capabilities are a server's custom capabilities, as it states them. Equal ones are the same object,
// so that agents that come to another link are told again only of other ones.
type capabilities struct {
	stated string // the encoded message
	empty  bool
}

// frame tells the agent of uid, or without a uid the gateway at the other end.
func (c *capabilities) frame(format wire.Format, uid wire.UID) []byte {
	return format.CustomCapabilities(uid, c.stated)
}

// noteCapabilities remembers the server's custom capabilities, which it states once per
// WebSocket, in whatever it says first. A server that was asked, says this, and neither
// answers nor knows the capability will never answer.
func (l *link) noteCapabilities(frame []byte, f *wire.Fields) {
	if l.caps.Load() != nil || !f.Has(wire.FieldCustomCapabilities) {
		return
	}
	stated := wire.Embedded(frame, wire.FieldCustomCapabilities)
	if len(stated) > maxCapabilities {
		l.noteTooLarge("list of custom capabilities above 64 KiB", f.UID, int64(len(stated)))
		return
	}
	var message protobufs.CustomCapabilities
	if proto.Unmarshal(stated, &message) != nil {
		return
	}
	names := message.GetCapabilities()
	l.caps.Store(l.pool.intern(string(stated), len(names) == 0))
	if !slices.Contains(names, connect.Capability) {
		l.misunderstood()
		return
	}
	l.target.asking.Stated()
}

// tellCapabilities tells a gateway below of the server's custom capabilities, unless it has heard them.
func (l *link) tellCapabilities(a *agentConn) {
	if caps := l.caps.Load(); caps != nil && a.told.Swap(caps) != caps {
		a.sendOwn(caps.frame(wire.Format{Header: true}, wire.UID{}))
	}
}

// intern returns the one object for these capabilities.
func (p *upstreamPool) intern(stated string, empty bool) *capabilities {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, known := range p.stated {
		if known.stated == stated {
			return known
		}
	}
	caps := &capabilities{stated: stated, empty: empty}
	p.stated = append(p.stated[max(0, len(p.stated)+1-maxStated):], caps)
	return caps
}

// untoldCapabilities returns a frame that tells the agent of c of the server's custom
// capabilities, to follow f, the first frame that goes there; nil if the agent has heard them.
func (l *link) untoldCapabilities(c *claim, f *wire.Fields) []byte {
	caps := l.caps.Load()
	if caps == nil || c.agent.gateway || c.told.Load() == caps {
		return nil
	}
	told := c.told.Swap(caps)
	if f.Has(wire.FieldCustomCapabilities) || (told == nil && caps.empty) || c.format.Legacy {
		return nil
	}
	return caps.frame(c.format, c.route.uid)
}
