package outbox

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
)

// FuzzTurns has senders come, speak and be served in any order. Whatever they do, each one's messages come out once and in
// order, and one whose message is the first of its own waits for a bounded number of turns of each other sender: for boundOf.
func FuzzTurns(f *testing.F) {
	f.Add([]byte{0x00, 0x11, 0x22, 0x83, 0x80, 0x00, 0xff, 0x81, 0xf0})
	f.Add([]byte(strings.Repeat("\x01\xff\x02\x81\x07", 50)))
	for seed := range uint64(50) {
		random, ops := rand.New(rand.NewPCG(seed, 0)), make([]byte, 1000)
		for i := range ops {
			ops[i] = byte(random.Uint32())
			if seed%2 == 0 && i > 300 { // more is served than comes
				ops[i] |= byte(random.Uint32() & 0x80)
			}
		}
		f.Add(ops)
	}
	f.Fuzz(func(t *testing.T, ops []byte) {
		const senders = 8
		type waiting struct {
			e      Entry[int]
			served [senders]int // of each other, since it became the first of its own, by cost per weight
		}
		var tr turns[int]
		var lines [senders]Line[int]
		var queues [senders][]Entry[int]
		var first [senders]*waiting
		said, total := 0, 0
		weightOf := func(sender int) int { return 1 + sender%2*3 }
		largestOf := [senders]int{}
		come := func(sender int) {
			if first[sender] == nil && len(queues[sender]) > 0 {
				first[sender] = &waiting{e: queues[sender][0]}
			}
		}
		serve := func() {
			q := tr.next()
			if q == nil {
				require.Zero(t, total)
				return
			}
			e := tr.take(q)
			s := e.Sender
			require.NotEmpty(t, queues[s])
			require.Equal(t, queues[s][0].Taken, e.Taken, "order of sender %d", s)
			queues[s], first[s] = queues[s][1:], nil
			total--
			come(s)
			for other, w := range first {
				if w == nil || other == s {
					continue
				}
				w.served[s] += cost(&e)
				bound := boundOf(&w.e, weightOf(other))*turn*weightOf(s) + largestOf[s]
				if w.served[s] > bound {
					t.Fatalf("sender %d waits with a message that costs %d, and %d of sender %d went before it, not %d",
						other, cost(&w.e), w.served[s], s, bound)
				}
			}
		}
		for _, op := range ops {
			if op&0x80 != 0 {
				for range 1 + op&0x0f {
					serve()
				}
				continue
			}
			sender := int(op & 7)
			e := Entry[int]{Kind: Message, Sender: sender, Taken: int64(said), Trial: op&0x78 == 0x78}
			switch op >> 3 & 0xf {
			case 0, 1, 2, 3, 4, 5, 6, 7:
				e.Frame = make([]byte, int(op>>3&0xf)*300)
			case 8, 9, 10, 11, 12:
				e.Frame = make([]byte, int(op>>3&0xf)*2<<10)
			default:
				e.Frame = make([]byte, 64<<10)
			}
			said++
			largestOf[sender] = max(largestOf[sender], cost(&e))
			tr.add(tr.queueOf(&lines[sender]), weightOf(sender), e)
			queues[sender] = append(queues[sender], e)
			total++
			come(sender)
		}
		require.Equal(t, total, tr.waiting)
		for total > 0 {
			serve()
		}
		require.Nil(t, tr.next())
		for i := range lines {
			require.Nil(t, lines[i].queue)
		}
	})
}

// FuzzLink has senders with messages of any size, weight and trial, and a socket and a server of any pace, which ends or
// not. What was taken is written or returned, once and in order of each sender's.
func FuzzLink(f *testing.F) {
	f.Add([]byte{1, 0, 50, 2, 200, 3, 255, 9, 100, 10, 3}, uint16(0), uint8(0))
	f.Add([]byte{8, 255, 16, 255, 24, 255, 7, 7, 7}, uint16(12), uint8(3))
	f.Add([]byte{24, 0, 8, 255, 8, 255, 48, 9, 48, 9, 40, 3, 48, 9, 32, 0}, uint16(0), uint8(1))
	f.Add([]byte(strings.Repeat("\x01\xff\x0a\x03\x17\x80\xf0\x02", 30)), uint16(0), uint8(200))
	f.Fuzz(func(t *testing.T, ops []byte, breaksAt uint16, pace uint8) {
		synctest.Test(t, func(t *testing.T) {
			const senders = 8
			s := newServer(pace%4 != 3)
			s.pace = time.Duration(pace) * 100 * time.Microsecond
			if breaksAt > 0 {
				s.breakAt(int(breaksAt))
			}
			o := startLink(t, 200<<10, s)
			speakers := make([]*speaker, senders)
			taken, putting := make([][]string, senders), make([]chan struct{}, senders)
			for i := range speakers {
				speakers[i] = newSpeaker(o, strconv.Itoa(i))
				speakers[i].weight = 1 + i%3
				putting[i] = make(chan struct{}, 1)
			}
			withdrawn := map[string]bool{}
			resume := func() {}
			for i := 0; i+1 < len(ops) && i < 600; i += 2 {
				op, size := ops[i], int(ops[i+1])
				speaker := speakers[op%senders]
				speaker.trial = op&0x40 != 0
				switch op >> 3 & 7 {
				case 0:
					size *= size
				case 1:
					size *= 500
				case 2:
					time.Sleep(time.Duration(size) * time.Millisecond)
				case 3:
					resume()
					resume = s.stall()
				case 4:
					resume()
					resume = func() {}
					synctest.Wait()
				case 5:
					for _, e := range o.Withdraw(&speaker.line, speaker.name) {
						withdrawn[string(e.Frame)] = true
					}
				}
				e := speaker.next(size)
				text := string(e.Frame)
				select { // one at a time speaks for a sender
				case putting[op%senders] <- struct{}{}:
				default:
					continue
				}
				go func() {
					if o.Put(t.Context(), e, &speaker.line, speaker.weight) == nil {
						taken[op%senders] = append(taken[op%senders], text)
					}
					<-putting[op%senders]
				}()
				if op&0x80 != 0 {
					synctest.Wait()
				}
			}
			resume()
			time.Sleep(time.Minute) // for those that wait for room
			if breaksAt == 0 {
				o.Drain(t.Context())
			}
			unwritten := o.Abort()
			synctest.Wait()
			if breaksAt == 0 && len(unwritten) > 0 {
				t.Fatalf("%d were not written", len(unwritten))
			}
			for i := range taken {
				taken[i] = slices.DeleteFunc(taken[i], func(text string) bool { return withdrawn[text] })
			}
			wantAllOnce(t, taken, append(slices.Clone(s.got), unwritten...))
			for _, speaker := range speakers {
				require.Nil(t, speaker.line.queue)
			}
		})
	})
}

// BenchmarkLink is what a small message costs on a link that many senders share, and, for scale, in a channel.
func BenchmarkLink(b *testing.B) {
	for _, senders := range []int{1, 10, 1000} {
		b.Run(fmt.Sprintf("%d senders", senders), func(b *testing.B) {
			account := newAccount()
			s := &echo{ready: make(chan struct{})}
			o := NewLink[string](s, 8<<20, account, false)
			s.link = o
			close(s.ready)
			e, lines := message("alice", "hello, this is a heartbeat"), make([]Line[string], senders)
			b.ReportAllocs()
			i := 0
			for b.Loop() {
				if err := o.Put(b.Context(), e, &lines[i%senders], 1); err != nil {
					b.Fatal(err)
				}
				i++
			}
			o.Drain(b.Context())
			o.Abort()
		})
	}
	b.Run("channel", func(b *testing.B) {
		entries, ended := make(chan Entry[string], 1024), make(chan struct{})
		go func() {
			defer close(ended)
			var batch []Entry[string]
			for e := range entries {
				if batch = append(batch, e); len(batch) == 256 {
					_, _ = discard{}.WriteBatch(batch)
					batch = batch[:0]
				}
			}
		}()
		e := message("alice", "hello, this is a heartbeat")
		b.ReportAllocs()
		for b.Loop() {
			entries <- e
		}
		close(entries)
		<-ended
	})
}

// echo is a socket whose server answers each ping at once.
type echo struct {
	discard
	link  *Link[string]
	ready chan struct{}
}

func (s *echo) WriteBatch(batch []Entry[string]) (int, error) {
	<-s.ready
	for _, e := range batch {
		if e.Kind == Ping {
			s.link.Pong(e.Frame)
		}
	}
	return len(batch), nil
}
