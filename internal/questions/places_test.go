package questions_test

import (
	"fmt"
	"net/netip"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/opampgateway/opampgateway/internal/questions"
)

// TestPlaces has what is of no link take turns for places, within the bounds of questions.
func TestPlaces(t *testing.T) {
	book, now := questions.NewPlaces[string](4), time.Now()
	from := func(i byte) netip.Prefix { return netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 0, 0, i}), 32) }
	n := 0
	take := func(from netip.Prefix) (*question, []*question, error) {
		n++
		q := &question{UID: fmt.Sprint(n), From: from, Expires: now.Add(time.Minute)}
		send, err := book.Ask(q, now)
		return q, send, err
	}
	var crowd []*question
	for range 10_000 {
		q, send, err := take(from(1))
		require.NoError(t, err)
		require.Equal(t, len(crowd) < 2, len(send) == 1, "the crowd has half of the places")
		crowd = append(crowd, q)
	}
	refused := 0
	for range 10 {
		if _, _, err := take(from(1)); err != nil {
			require.ErrorIs(t, err, questions.ErrFull)
			refused++
		}
	}
	require.GreaterOrEqual(t, refused, 8, "and half of those that may wait")
	bob, send, err := take(from(2))
	require.NoError(t, err)
	require.Equal(t, []*question{bob}, send)

	// A place that is free goes to the next.
	answered, stray, send := book.Answer(crowd[0].UID, now)
	require.False(t, stray)
	require.Same(t, crowd[0], answered)
	require.Equal(t, []*question{crowd[2]}, send[:1])
	// More places, and fewer.
	require.NotEmpty(t, book.Resize(16, now))
	_, sent := book.Len()
	require.Empty(t, book.Resize(1, now))
	_, _, send = book.Answer(bob.UID, now)
	require.Empty(t, send)
	_, left := book.Len()
	require.Equal(t, sent-1, left)
}

// TestSilentServer is one that can be asked no more where agents get in without a question, too.
func TestSilentServer(t *testing.T) {
	server, links := newUntried(t, 1)
	now := links[0].clock.now
	ask := func(uid string) *question {
		q := &question{UID: uid, Expires: now.Add(time.Minute)}
		_, err := links[0].Ask(q, now)
		require.NoError(t, err)
		return q
	}
	probe, waits := ask("1"), ask("2")
	require.False(t, links[0].Silent(waits, now), "it was not sent")
	require.True(t, links[0].Silent(probe, now))
	require.True(t, server.IsDeaf())
	require.Equal(t, []*question{probe, waits}, links[0].GiveUp())
	// A late answer shows that it can be asked.
	links[0].Answer("1", now)
	require.False(t, server.IsDeaf())
	require.False(t, links[0].Silent(ask("3"), now), "it has answered")

	server, links = newUntried(t, 1)
	server.Stated()
	require.False(t, links[0].Silent(ask("1"), now), "it has stated that it knows questions")
}

// TestSparedServer is one that ends its links at questions: it is not asked again before it has stated that it knows them.
func TestSparedServer(t *testing.T) {
	for name, spared := range map[string]bool{"spared": true, "not spared": false} {
		t.Run(name, func(t *testing.T) {
			server, now := questions.NewServer(), time.Now()
			if spared {
				server.Spare()
			}
			end := func() (asked, deaf bool) {
				book := questions.NewBook[string](server)
				_, err := book.Ask(&question{UID: "1", Expires: now.Add(time.Hour)}, now)
				_, deaf = book.End(true, now)
				return err == nil, deaf
			}
			end()
			now = now.Add(2 * time.Second)
			_, deaf := end()
			require.True(t, deaf)
			now = now.Add(time.Hour)
			asked, _ := end()
			require.Equal(t, !spared, asked)
			server.Stated()
			now = now.Add(time.Hour)
			asked, deaf = end()
			require.True(t, asked)
			require.True(t, deaf, "again")
			now = now.Add(time.Hour)
			asked, _ = end()
			require.Equal(t, !spared, asked)
		})
	}
}
