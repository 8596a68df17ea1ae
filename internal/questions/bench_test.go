package questions_test

import (
	"fmt"
	"net/netip"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/opampgateway/opampgateway/internal/questions"
)

// BenchmarkQuestion is the life of one question, while so many wait: it is asked, waits, is sent and
// answered.
func BenchmarkQuestion(b *testing.B) {
	for _, waiting := range []int{100, 1000, 19_000} {
		for _, addresses := range []int{20, waiting} {
			b.Run(fmt.Sprintf("waiting=%d/addresses=%d", waiting, addresses), func(b *testing.B) {
				life(b, waiting, addresses)
			})
		}
	}
}

func life(b *testing.B, waiting, addresses int) {
	b.Helper()
	book, now := questions.NewBook[int](questions.NewServer()), time.Now()
	from := make([]netip.Prefix, addresses)
	for i := range from {
		from[i] = addressOf(fmt.Sprint("site ", i))
	}
	var sent []*questions.Question[int] // the server's, which answers in order
	asked := 0
	ask := func(uid string) {
		q := &questions.Question[int]{UID: uid, From: from[asked%addresses], Expires: now.Add(40 * time.Second)}
		asked++
		send, err := book.Ask(q, now)
		require.NoError(b, err)
		sent = append(sent, send...)
	}
	for range waiting + 256 {
		ask(fmt.Sprint("early ", asked))
	}
	uids := make([]string, b.N)
	for i := range uids {
		uids[i] = fmt.Sprint("agent ", i)
	}
	b.ReportAllocs()
	b.ResetTimer()
	for i := range b.N {
		now = now.Add(10 * time.Microsecond)
		q := sent[0]
		sent = sent[1:]
		_, _, send := book.Answer(q.UID, now)
		sent = append(sent, send...)
		ask(uids[i])
		if i%100_000 == 0 { // each second
			book.Sweep(now)
		}
	}
}

// BenchmarkPassedOver is the same where all that wait hold as many places as are free, and one of
// the others is answered, and asks again.
func BenchmarkPassedOver(b *testing.B) {
	book, now := questions.NewBook[int](questions.NewServer()), time.Now()
	ask := func(uid, from string) {
		_, err := book.Ask(&questions.Question[int]{UID: uid, From: addressOf(from), Expires: now.Add(time.Hour)}, now)
		require.NoError(b, err)
	}
	for i := range 255 {
		ask(fmt.Sprint("sent ", i), fmt.Sprint("site ", i))
	}
	for i := range 19_000 {
		ask(fmt.Sprint("waits ", i), fmt.Sprint("site ", i%254))
	}
	waiting, sent := book.Len()
	require.Equal(b, [2]int{19_000, 255}, [2]int{waiting, sent})
	b.ReportAllocs()
	for b.Loop() {
		ask("alice", "alice")
		book.Answer("alice", now)
	}
}

// BenchmarkAbandon is a question that is abandoned while so many wait.
func BenchmarkAbandon(b *testing.B) {
	for _, waiting := range []int{100, 19_000} {
		b.Run(fmt.Sprintf("waiting=%d", waiting), func(b *testing.B) {
			book, now := questions.NewBook[int](questions.NewServer()), time.Now()
			book.Pause(now.Add(time.Hour))
			for i := range waiting {
				_, err := book.Ask(&questions.Question[int]{UID: fmt.Sprint(i), From: addressOf(fmt.Sprint("site ", i%1000)), Expires: now.Add(40 * time.Second)}, now)
				require.NoError(b, err)
			}
			q := &questions.Question[int]{UID: "alice", From: addressOf("site 1"), Expires: now.Add(40 * time.Second)}
			b.ReportAllocs()
			for b.Loop() {
				_, err := book.Ask(q, now)
				require.NoError(b, err)
				book.Abandon(q)
			}
		})
	}
}

// BenchmarkSweep is a second in which nothing expires.
func BenchmarkSweep(b *testing.B) {
	book, now := questions.NewBook[int](questions.NewServer()), time.Now()
	book.Pause(now.Add(time.Hour))
	for i := range 19_000 {
		_, err := book.Ask(&questions.Question[int]{UID: fmt.Sprint(i), From: addressOf(fmt.Sprint("site ", i%1000)), Expires: now.Add(40 * time.Second)}, now)
		require.NoError(b, err)
	}
	b.ReportAllocs()
	for b.Loop() {
		book.Sweep(now)
	}
}
