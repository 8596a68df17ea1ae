package polling

import (
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"io"
	"net/http"
	"strings"
	"testing"
	"testing/iotest"
	"testing/synctest"

	"github.com/stretchr/testify/require"

	"github.com/opampgateway/opampgateway/internal/memory"
)

const limit = 8 << 20

func pattern(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i ^ i>>8 ^ i>>16)
	}
	return b
}

func never() { panic("there is enough memory") }

// TestUpload reads bodies of all lengths, known or not, in memory that is counted, and given back.
func TestUpload(t *testing.T) {
	budget := memory.New(64<<20, limit)
	for _, n := range []int{
		0, 1, memory.UncountedMessage - 2, memory.UncountedMessage - 1, memory.UncountedMessage, memory.UncountedMessage + 1,
		memory.TinyMessage, memory.SmallMessage - 1, memory.SmallMessage, memory.SmallMessage + 1, 1 << 20, limit - 1, limit,
	} {
		want := pattern(n)
		for name, body := range map[string]func() (io.Reader, int64){
			"known":           func() (io.Reader, int64) { return bytes.NewReader(want), int64(n) },
			"unknown":         func() (io.Reader, int64) { return bytes.NewReader(want), -1 },
			"end with data":   func() (io.Reader, int64) { return iotest.DataErrReader(bytes.NewReader(want)), -1 },
			"in small pieces": func() (io.Reader, int64) { return iotest.HalfReader(bytes.NewReader(want)), -1 },
			"packed":          func() (io.Reader, int64) { return Unpack(bytes.NewReader(zip(t, want))), -1 },
		} {
			u := NewUpload(t.Context(), budget)
			r, length := body()
			require.NoError(t, u.Read(r, length, limit, never), "%s of %d bytes", name, n)
			require.True(t, bytes.Equal(want, u.Bytes()), "%s of %d bytes", name, n)
			require.EqualValues(t, n, u.Received())
			if n >= memory.UncountedMessage {
				require.GreaterOrEqual(t, budget.Reading(), int64(n))
				require.LessOrEqual(t, budget.Reading(), int64(2*n+memory.SmallMessage))
			}
			require.False(t, u.Paused())
			if n == 0 {
				u.Close()
				continue
			}
			m := u.Message(n%2 == 0)
			require.True(t, u.Paused(), "its agent is not waited for")
			if n%2 == 0 {
				require.Zero(t, m.Frame[0])
				require.True(t, bytes.Equal(want, m.Frame[1:]))
			} else {
				require.True(t, bytes.Equal(want, m.Frame))
			}
			m.Done()
			require.Zero(t, budget.Reading(), "%s of %d bytes", name, n)
		}
	}
}

func zip(t testing.TB, b []byte) []byte {
	t.Helper()
	var packed bytes.Buffer
	w := gzip.NewWriter(&packed)
	_, err := w.Write(b)
	require.NoError(t, err)
	require.NoError(t, w.Close())
	return packed.Bytes()
}

// TestUploadTooLarge reads no more of a body than it may have, and one byte.
func TestUploadTooLarge(t *testing.T) {
	budget := memory.New(64<<20, limit)
	for name, body := range map[string]io.Reader{
		"a byte more": bytes.NewReader(make([]byte, limit+1)),
		"much more":   bytes.NewReader(make([]byte, 4*limit)),
		"bomb":        Unpack(bytes.NewReader(zip(t, make([]byte, 8*limit)))),
	} {
		u := NewUpload(t.Context(), budget)
		require.ErrorIs(t, u.Read(body, -1, limit, never), ErrTooLarge, name)
		require.LessOrEqual(t, u.Received(), uint64(limit))
		u.Close()
		require.Zero(t, budget.Reading())
	}
	u := NewUpload(t.Context(), budget)
	require.ErrorIs(t, u.Read(iotest.ErrReader(errors.New("was read")), limit+1, limit, never), ErrTooLarge)
	u.Close()
}

// TestUploadFails passes errors of the body on, and gives back what was taken.
func TestUploadFails(t *testing.T) {
	budget := memory.New(64<<20, limit)
	broken := errors.New("broken")
	for name, test := range map[string]struct {
		body io.Reader
		want error
	}{
		"at once":             {iotest.ErrReader(broken), broken},
		"later":               {io.MultiReader(bytes.NewReader(pattern(300<<10)), iotest.ErrReader(broken)), broken},
		"at the limit":        {io.MultiReader(bytes.NewReader(pattern(limit)), iotest.ErrReader(broken)), broken},
		"packed text":         {Unpack(strings.NewReader("this is no gzip, whatever they say")), gzip.ErrHeader},
		"packed, and nothing": {Unpack(strings.NewReader("")), io.ErrUnexpectedEOF},
		"half of a packed":    {Unpack(bytes.NewReader(zip(t, pattern(100))[:40])), io.ErrUnexpectedEOF},
		"packed twice":        {Unpack(bytes.NewReader(append(zip(t, pattern(100)), "more than that"...))), gzip.ErrHeader},
	} {
		u := NewUpload(t.Context(), budget)
		require.ErrorIs(t, u.Read(test.body, -1, limit, never), test.want, name)
		u.Close()
		require.Zero(t, budget.Reading())
	}
}

// TestUnpacked gives its memory back, and keeps nothing of the body.
func TestUnpacked(t *testing.T) {
	u := Unpack(bytes.NewReader(zip(t, []byte("x"))))
	b, err := io.ReadAll(u)
	require.NoError(t, err)
	require.Equal(t, "x", string(b))
	u.Close()
	u.Close()
	require.Nil(t, u.gzip)
}

// TestUploadWaits has a body wait for memory, until there is some, or it is cut, or its agent leaves.
func TestUploadWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		budget := memory.New(memory.MinSize(limit, 1), limit)
		var holders []*Upload
		for range 3 { // one has the turn for large messages, others what there is besides
			u := NewUpload(t.Context(), budget)
			go func() {
				_ = u.Read(io.MultiReader(bytes.NewReader(pattern(1<<20)), blocked{u.Context()}), limit, limit, func() {})
			}()
			holders = append(holders, u)
			synctest.Wait()
		}
		wait := func(ctx context.Context) (u *Upload, short *int, done chan error) {
			u, done, short = NewUpload(ctx, budget), make(chan error, 1), new(int)
			go func() { done <- u.Read(bytes.NewReader(pattern(limit)), limit, limit, func() { *short++ }) }()
			synctest.Wait()
			return u, short, done
		}
		u, short, done := wait(t.Context())
		require.Equal(t, 1, *short)
		require.True(t, u.Cut())
		require.False(t, u.Cut())
		require.True(t, u.WasCut())
		require.ErrorIs(t, <-done, context.Canceled)
		u.Close()

		ctx, cancel := context.WithCancel(t.Context())
		u, _, done = wait(ctx)
		cancel()
		require.ErrorIs(t, <-done, context.Canceled)
		require.False(t, u.WasCut())
		u.Close()

		u, _, done = wait(t.Context())
		for _, h := range holders {
			h.Cut()
			synctest.Wait()
			h.Close()
		}
		require.NoError(t, <-done)
		u.Close()
		require.Zero(t, budget.Reading())
	})
}

type blocked struct{ ctx context.Context }

func (b blocked) Read([]byte) (int, error) {
	<-b.ctx.Done()
	return 0, b.ctx.Err()
}

// TestWritePacked packs what is worth it, unless too many do.
func TestWritePacked(t *testing.T) {
	write := func(b []byte) (packed bool, written []byte) {
		var w bytes.Buffer
		require.NoError(t, WritePacked(&w, b, func(p bool) {
			require.Zero(t, w.Len())
			packed = p
		}))
		if !packed {
			return false, w.Bytes()
		}
		require.Less(t, w.Len(), len(b))
		r, err := gzip.NewReader(&w)
		require.NoError(t, err)
		written, err = io.ReadAll(r)
		require.NoError(t, err)
		return true, written
	}
	small, large := pattern(leastPacked-1), bytes.Repeat([]byte("configuration "), 50_000)
	packed, written := write(small)
	require.False(t, packed)
	require.Equal(t, small, written)
	for range 3 {
		packed, written = write(large)
		require.True(t, packed)
		require.True(t, bytes.Equal(large, written))
	}
	for range maxPackers {
		packing <- struct{}{}
	}
	packed, written = write(large)
	require.False(t, packed)
	require.True(t, bytes.Equal(large, written))
	for range maxPackers {
		<-packing
	}
	broken := errors.New("broken")
	require.ErrorIs(t, WritePacked(failing{broken}, large, func(bool) {}), broken)
	require.ErrorIs(t, Write(failing{broken}, large), broken)
	require.Empty(t, packing)
}

type failing struct{ err error }

func (f failing) Write([]byte) (int, error) { return 0, f.err }

// TestTakesGzip reads Accept-Encoding.
func TestTakesGzip(t *testing.T) {
	for list, want := range map[string]bool{
		"": false, "gzip": true, "GZIP": true, "br, gzip": true, "gzip;q=0": false, "gzip; q=0.0": false, "gzip;q=0.1": true,
		"br;q=1, gzip; Q=0.3": true, "identity": false, "*": false, "gzipped": false, "gzip;q=x": false,
	} {
		require.Equal(t, want, TakesGzip(http.Header{"Accept-Encoding": {list}}), list)
	}
	require.False(t, TakesGzip(http.Header{}))
}

// FuzzUnpack reads what claims to be gzip like the standard library, and gives everything back.
func FuzzUnpack(f *testing.F) {
	f.Add(zip(f, []byte("hello")))
	f.Add([]byte{0x1f, 0x8b, 8})
	budget := memory.New(64<<20, 1<<20)
	f.Fuzz(func(t *testing.T, packed []byte) {
		var want []byte
		r, wantErr := gzip.NewReader(bytes.NewReader(packed))
		if wantErr == nil {
			want, wantErr = io.ReadAll(io.LimitReader(r, 1<<20+1))
		}
		if wantErr == nil && len(want) > 1<<20 {
			wantErr = ErrTooLarge
		}
		u, p := NewUpload(context.Background(), budget), Unpack(bytes.NewReader(packed))
		err := u.Read(p, -1, 1<<20, never)
		p.Close()
		require.Equal(t, wantErr == nil, err == nil, "%v, %v", wantErr, err)
		if err == nil {
			require.True(t, bytes.Equal(want, u.Bytes()))
		}
		u.Close()
		require.Zero(t, budget.Reading())
	})
}
