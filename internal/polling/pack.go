package polling

import (
	"compress/gzip"
	"io"
	"net/http"
	"strconv"
	"strings"
	"sync"
)

const (
	// leastPacked is the smallest answer that is worth packing, in bytes: a smaller one fits in a packet anyway.
	leastPacked = 1400

	// maxPackers is how many answers are packed at once; others go as they are. Each takes about a MiB.
	maxPackers = 4
)

var (
	packers = sync.Pool{New: func() any {
		w, _ := gzip.NewWriterLevel(io.Discard, gzip.BestSpeed) // which is a level
		return w
	}}
	packing = make(chan struct{}, maxPackers)
)

// WritePacked writes b to w in gzip, if it is worth that and can be done now, and as it is otherwise. begin is told
// before anything is written.
func WritePacked(w io.Writer, b []byte, begin func(packed bool)) error {
	if len(b) < leastPacked {
		begin(false)
		return write(w, b)
	}
	select {
	case packing <- struct{}{}:
		defer func() { <-packing }()
	default:
		begin(false)
		return write(w, b)
	}
	begin(true)
	p := packers.Get().(*gzip.Writer)
	defer packers.Put(p)
	p.Reset(w)
	defer p.Reset(io.Discard) // it is to keep nothing of this one
	if err := write(p, b); err != nil {
		return err
	}
	return p.Close()
}

// Write writes b to w as it is.
func Write(w io.Writer, b []byte) error { return write(w, b) }

// pieceSize is how much is written at once, so that a deadline can be for progress.
const pieceSize = 128 << 10

func write(w io.Writer, b []byte) error {
	for len(b) > 0 {
		n := min(len(b), pieceSize)
		if _, err := w.Write(b[:n]); err != nil {
			return err
		}
		b = b[n:]
	}
	return nil
}

// TakesGzip reports whether a request's Accept-Encoding names gzip, and not with a quality of 0 (RFC 9110, section
// 12.5.3).
func TakesGzip(h http.Header) bool {
	for _, list := range h["Accept-Encoding"] {
		for element := range strings.SplitSeq(list, ",") {
			coding, parameters, _ := strings.Cut(element, ";")
			if !strings.EqualFold(strings.Trim(coding, " \t"), "gzip") {
				continue
			}
			name, value, found := strings.Cut(strings.Trim(parameters, " \t"), "=")
			if !found || !strings.EqualFold(name, "q") {
				return true
			}
			quality, err := strconv.ParseFloat(value, 64)
			return err == nil && quality > 0
		}
	}
	return false
}
