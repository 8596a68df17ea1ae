package door

import (
	"bufio"
	"bytes"
	"io"
	"net/http"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// lookAtAll is what a head comes to that is there as a whole: line by line, as one would write it
// without a thought of pieces.
func lookAtAll(b []byte, maxLines, maxSize int) (end int, v verdict) {
	size := 0
	for line := 0; ; line++ {
		text, _, ended := bytes.Cut(b[end:], []byte("\n"))
		length := len(text)
		if ended {
			length++
		}
		blank := len(text) == 0 || len(text) == 1 && text[0] == '\r'
		switch {
		case blank && ended:
			return end + length, verdictDone
		case blank:
			return 0, verdictUnfinished
		case line == 0 && length > maxRequestLine:
			return 0, verdictLongRequestLine
		case line > maxLines:
			return 0, verdictTooManyLines
		case line > 0 && size+length > maxSize:
			return 0, verdictTooLarge
		case !ended:
			return 0, verdictUnfinished
		}
		end += length
		if line > 0 {
			size += length
		}
	}
}

// FuzzHead has the watcher agree, whatever the pieces, with one that sees all at once, and with the
// HTTP server on where the head ends.
func FuzzHead(f *testing.F) {
	for _, request := range []string{
		upgrade(), upgrade() + "early", "GET / HTTP/1.1\n\n", "\r\n", "\n", "\r", "\r\r\n\n", "A\r\nB: c\r\n d\r\n\r\n", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
		"GET / HTTP/1.1\r\n" + strings.Repeat("a: b\r\n", 5) + "\r\n", "GET / HTTP/1.1\r\n" + strings.Repeat("a: b\r\n", 4) + "\r\r\n\r\n",
		"GET / HTTP/1.1\r\nX: " + strings.Repeat("x", 57) + "\r\n\r\n", "GET /" + strings.Repeat("x", maxRequestLine),
	} {
		f.Add([]byte(request), []byte{1, 2, 3})
		f.Add([]byte(request), []byte{255})
		f.Add([]byte(request), []byte{1})
	}
	f.Fuzz(func(t *testing.T, request, cuts []byte) {
		const maxLines, maxSize = 8, 256
		wantEnd, want := lookAtAll(request, maxLines, maxSize)
		watcher := head{maxLines: maxLines, maxSize: maxSize}
		var kept pieces
		v, at := verdictUnfinished, 0
		for i := 0; at < len(request) && v == verdictUnfinished; i++ {
			n := len(request) - at
			if len(cuts) > 0 {
				n = min(n, 1+int(cuts[i%len(cuts)])*16)
				if cuts[i%len(cuts)] < 128 {
					n = min(n, 1+int(cuts[i%len(cuts)]))
				}
			}
			piece := request[at : at+n]
			at += n
			kept.keep(piece)
			var behind int
			if behind, v = watcher.look(piece); v == verdictDone {
				require.Equal(t, wantEnd, at-behind)
			}
		}
		require.Equal(t, want, v)
		require.Equal(t, v == verdictDone, watcher.done)
		require.Equal(t, len(request) > 0, watcher.begun())
		require.Equal(t, at >= len(prefaceHTTP2) && strings.HasPrefix(string(request[:at]), prefaceHTTP2), watcher.http2())

		// What was kept comes out as it went in.
		var out []byte
		for b := make([]byte, 7); ; {
			n := kept.take(b)
			if n == 0 {
				break
			}
			out = append(out, b[:n]...)
		}
		require.Equal(t, string(request[:at]), string(out))

		// Where net/http finds a request, it begins to read the body where the head ends.
		if v == verdictDone {
			in := bufio.NewReader(strings.NewReader(string(request)))
			if r, err := http.ReadRequest(in); err == nil && r.Body == http.NoBody {
				rest, err := io.ReadAll(in)
				require.NoError(t, err)
				require.Equal(t, string(request[wantEnd:]), string(rest))
			}
		}
	})
}
