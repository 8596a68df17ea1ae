package polling

import (
	"compress/gzip"
	"context"
	"errors"
	"io"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/opampgateway/opampgateway/internal/memory"
)

// ErrTooLarge means that a body is above the limit, as it came or unpacked. It is not read to its end.
var ErrTooLarge = errors.New("body above the size limit")

// Upload is the body of one poll on its way into memory, which the budget counts as it does that of a message that
// comes by WebSocket. It ends with Close, or when the Message is done that it has become.
type Upload struct {
	// Set once.
	memory *memory.Reader
	ctx    context.Context // ends when the rest is not to be read
	cancel context.CancelFunc

	// Owned by who reads, and then by who has the message.
	piece []byte
	n     int // of it, the place for the header included
	held  int // of it, as far as that is counted

	// Shared.
	received atomic.Uint64
	handed   atomic.Bool
	cut      atomic.Bool
}

// NewUpload returns an upload of which nothing was read. ctx is that of the request.
func NewUpload(ctx context.Context, budget *memory.Budget) *Upload {
	u := &Upload{n: 1}
	u.ctx, u.cancel = context.WithCancel(ctx)
	u.memory = budget.NewReader(u)
	return u
}

// Context ends when nothing more is to be read.
func (u *Upload) Context() context.Context { return u.ctx }

// Received returns how many bytes have come; the memory's budget calls it.
func (u *Upload) Received() uint64 { return u.received.Load() }

// Paused reports whether all of it is there, so that others than the agent are waited for; the memory's budget calls it.
func (u *Upload) Paused() bool { return u.handed.Load() }

// Cut ends the reading, for the sake of others who wait for memory. It reports whether that is new.
func (u *Upload) Cut() bool {
	u.cancel()
	return !u.cut.Swap(true)
}

// WasCut reports whether Cut has ended the reading.
func (u *Upload) WasCut() bool { return u.cut.Load() }

// Read reads all of body, which has a length of its own or -1, and may have limit bytes. While there is no memory for
// it, it waits; short is called before.
func (u *Upload) Read(body io.Reader, length int64, limit int, short func()) error {
	if length > int64(limit) {
		return ErrTooLarge
	}
	for {
		if u.n > limit { // with the place for the header
			return u.end(body)
		}
		if u.piece == nil || u.n == len(u.piece) {
			if err := u.grow(int(length), limit, short); err != nil {
				return err
			}
		}
		m, err := body.Read(u.piece[u.n:min(len(u.piece), limit+1)])
		u.n += m
		u.received.Add(uint64(m))
		switch {
		case errors.Is(err, io.EOF):
			u.shrink()
			return nil
		case err != nil:
			return err
		}
	}
}

// shrink gives back memory that was taken for a body of unknown length, which turned out to be short.
func (u *Upload) shrink() {
	if u.n > memory.UncountedMessage && memory.PieceSize(u.n) <= u.held/2 {
		u.piece = u.memory.Shrink(u.piece, u.n)
		u.held = len(u.piece)
	}
}

// end reads the end of a body that has all the bytes which it may have.
func (u *Upload) end(body io.Reader) error {
	var more [1]byte
	for {
		switch n, err := body.Read(more[:]); {
		case n > 0:
			return ErrTooLarge
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return err
		}
	}
}

// grow takes larger memory, by the rules that hold for messages which come by WebSocket: a small message, of which the
// length is not known, gets all that it may need at once; a large one at most four times what has come.
func (u *Upload) grow(length, limit int, short func()) error {
	known, want := length >= 0, u.n+1
	if known {
		want = max(want, length+1)
	}
	if want <= memory.UncountedMessage {
		u.piece = memory.Uncounted()
		return nil
	}
	size := want
	switch {
	case known:
	case u.piece == nil:
		u.piece = memory.Uncounted()
		return nil
	case want <= memory.SmallMessage:
		size = min(memory.SmallMessage, limit+1)
	default:
		size = limit + 1
	}
	for memory.PieceSize(size) > memory.SmallMessage && memory.PieceSize(size)/4 > u.n {
		size = (size + 1) / 2
	}
	size = memory.PieceSize(size)
	piece, err := u.memory.Piece(size, want, func() (context.Context, func()) {
		short()
		return u.ctx, func() {}
	})
	if err != nil {
		return err
	}
	copy(piece, u.piece[:min(u.n, len(u.piece))])
	u.giveBack()
	u.piece, u.held = piece, size
	return nil
}

// giveBack gives up the memory that there is.
func (u *Upload) giveBack() {
	switch {
	case u.held > 0:
		u.memory.Return(u.piece[:u.held])
	case u.piece != nil:
		memory.GiveUncounted(u.piece)
	}
	u.piece, u.held = nil, 0
}

// Bytes returns what was read.
func (u *Upload) Bytes() []byte {
	if u.piece == nil {
		return nil
	}
	return u.piece[1:u.n]
}

// Message returns what was read as a frame, with the header that a WebSocket has and plain HTTP has not, unless it is
// of an agent that knows of none. The upload ends with it.
func (u *Upload) Message(header bool) *Message {
	u.handed.Store(true)
	frame := u.Bytes()
	if header {
		u.piece[0] = 0
		frame = u.piece[:u.n]
	}
	return NewMessage(frame, func() {
		if u.held > 0 {
			u.memory.Release(u.held)
		}
		u.finish()
	})
}

// Close gives everything back of an upload that has become no message.
func (u *Upload) Close() {
	u.giveBack()
	u.finish()
}

func (u *Upload) finish() {
	u.cancel()
	u.memory.Close()
}

// UnpackMemory is what it takes to unpack a body, in bytes, beside the body.
const UnpackMemory = 48 << 10

var unpackers = sync.Pool{New: func() any { return new(gzip.Reader) }}

// Unpacked is a body in gzip, as it was before.
type Unpacked struct {
	packed io.Reader
	gzip   *gzip.Reader // nil until something is read
}

// Unpack returns body unpacked. Nothing is read yet.
func Unpack(body io.Reader) *Unpacked { return &Unpacked{packed: body} }

// Read is that of io.Reader.
func (p *Unpacked) Read(b []byte) (int, error) {
	if p.gzip == nil {
		p.gzip = unpackers.Get().(*gzip.Reader)
		if err := p.gzip.Reset(p.packed); err != nil {
			if errors.Is(err, io.EOF) { // an empty body is not gzip
				err = io.ErrUnexpectedEOF
			}
			return 0, err
		}
	}
	return p.gzip.Read(b)
}

// Close gives back what it took.
func (p *Unpacked) Close() {
	if p.gzip != nil {
		_ = p.gzip.Reset(strings.NewReader("")) // it is to keep nothing of this one; that nothing is not gzip, it says
		unpackers.Put(p.gzip)
		p.gzip = nil
	}
}
