package window

import (
	"math/rand/v2"
	"slices"
	"time"
)

const second = int64(time.Second)

// link is a simulated link: flooders that always have something to say and take turns, a bystander with a
// message now and then that goes first, the writer, the buffers of both kernels, the path, and a server that
// reads in order. Each message's whole life is known when it is sent, so that time goes from one event of the
// writer to the next.
type link struct {
	// The world. Functions of time, in nanoseconds from the link's beginning.
	path      func(now int64) int64            // one way
	cost      func(now int64, bytes int) int64 // what a message costs the server
	drop      func(number uint64, now int64) bool
	readAhead int   // messages that the server's reader keeps in memory for its worker; 0: reader is worker
	kernel    int   // bytes between the writer and the server's reader
	write     int64 // what a message costs the writer

	flooders  int
	flood     func(now int64) bool // whether the flooders flood; nil: always
	size      int                  // of a flooder's message
	offered   int64                // nanoseconds between the messages of one that is not always busy; 0: none
	bystander int64                // nanoseconds between the bystander's messages; 0: none
	fifo      bool                 // no window, and the bystander's messages go behind bystanderBehind bytes: the old way

	// What is simulated.
	w        *Window
	now      int64
	writeAt  int64 // when the writer is free
	arrived  int64 // the last to come to the server
	readAt   int64 // when the server's reader is free
	workAt   int64 // when its worker is
	worked   []int64
	unread   []unread // handed to the kernel and not read
	inKernel int
	pongs    []pong
	backAt   int64

	// What was seen.
	waits  []wait // of the bystander
	sent   []int  // flooders' messages per second
	pings  []int  // per second
	onWay  int    // most messages, seen by the server's end
	closed int64  // longest time for which something waited and nothing was sent
}

type (
	unread struct {
		at    int64
		bytes int
	}
	pong struct {
		at     int64
		number uint64
	}
	wait struct{ at, took int64 }
)

// always returns a function of time that is always d.
func always(d time.Duration) func(int64) int64 {
	return func(int64) int64 { return int64(d) }
}

// perMessage returns the cost of messages at a server that takes d for each.
func perMessage(d time.Duration) func(int64, int) int64 {
	return func(int64, int) int64 { return int64(d) }
}

// jitter returns a path of d, more or less by a part of it.
func jitter(d time.Duration, part float64) func(int64) int64 {
	r := rand.New(rand.NewPCG(1, 2))
	return func(int64) int64 { return int64(float64(d) * (1 + part*(2*r.Float64()-1))) }
}

// weather returns a path of d, more or less by a part of it, that changes ten times a second.
func weather(d time.Duration, part float64) func(int64) int64 {
	return func(now int64) int64 {
		at := func(n int64) float64 { return rand.New(rand.NewPCG(1, uint64(n))).Float64() }
		n, along := now/(second/10), float64(now%(second/10))/float64(second/10)
		return int64(float64(d) * (1 + part*(2*(at(n)*(1-along)+at(n+1)*along)-1)))
	}
}

// handOver gives something to the kernel, and returns when the server's reader has come past it.
func (l *link) handOver(bytes int, isPing bool) (read, done int64) {
	l.arrived = max(l.arrived, l.now+l.path(l.now))
	start := max(l.arrived, l.readAt)
	switch {
	case isPing:
		l.readAt = start + 1000
		return l.readAt, l.readAt
	case l.readAhead == 0:
		l.readAt = start + l.cost(start, bytes)
		done = l.readAt
	default:
		if n := len(l.worked); n >= l.readAhead {
			start = max(start, l.worked[n-l.readAhead])
		}
		l.readAt = start + 1000
		begin := max(l.readAt, l.workAt)
		l.workAt = begin + l.cost(begin, bytes)
		l.worked = append(l.worked, l.workAt)
		done = l.workAt
	}
	l.unread = append(l.unread, unread{at: l.readAt, bytes: bytes})
	l.inKernel += bytes
	return l.readAt, done
}

func (l *link) ping() {
	number := l.w.Ping(l.now)
	read, _ := l.handOver(16, true)
	l.pings[l.now/second]++
	if l.drop != nil && l.drop(number, l.now) {
		return
	}
	l.backAt = max(l.backAt, read+l.path(read))
	l.pongs = append(l.pongs, pong{at: l.backAt, number: number})
}

// run simulates the link for so long.
func (l *link) run(d time.Duration) {
	end := int64(d)
	if l.kernel == 0 {
		l.kernel = 4 << 20
	}
	if l.write == 0 {
		l.write = 10_000
	}
	if l.size == 0 {
		l.size = 100
	}
	l.sent, l.pings = make([]int, d/time.Second+1), make([]int, d/time.Second+1)
	l.w = New(0)
	var bystander []int64 // when its waiting messages came
	nextBystander, nextOffered, offered, lastSent := int64(0), int64(0), 0, int64(0)
	waiting := func() bool {
		return len(bystander) > 0 || offered > 0 || l.flooders > 0 && (l.flood == nil || l.flood(l.now))
	}
	for l.now < end {
		for len(l.pongs) > 0 && l.pongs[0].at <= l.now {
			l.w.Pong(l.pongs[0].number, l.now, waiting())
			l.pongs = l.pongs[1:]
		}
		for len(l.unread) > 0 && l.unread[0].at <= l.now {
			l.inKernel -= l.unread[0].bytes
			l.unread = l.unread[1:]
		}
		for l.bystander > 0 && nextBystander <= l.now {
			bystander = append(bystander, nextBystander)
			nextBystander += l.bystander
		}
		for l.offered > 0 && nextOffered <= l.now {
			offered++
			nextOffered += l.offered
		}
		next := end
		if len(l.pongs) > 0 {
			next = min(next, l.pongs[0].at)
		}
		if l.bystander > 0 {
			next = min(next, nextBystander)
		}
		if l.offered > 0 {
			next = min(next, nextOffered)
		}
		switch {
		case l.now < l.writeAt:
			next = min(next, l.writeAt)
		case !l.fifo && l.w.PingDue(l.now):
			l.ping()
			continue
		case waiting() && l.inKernel >= l.kernel:
			next = min(next, l.unread[0].at)
			lastSent = l.now
		case waiting() && (l.fifo || l.w.Open()):
			size := l.size
			if len(bystander) > 0 {
				size = 100
			}
			_, done := l.handOver(size, false)
			l.w.Sent(size)
			l.writeAt = l.now + l.write
			l.closed = max(l.closed, l.now-lastSent)
			lastSent = l.now
			l.onWay = max(l.onWay, len(l.unread))
			switch {
			case len(bystander) > 0:
				l.waits = append(l.waits, wait{at: bystander[0], took: done - bystander[0]})
				bystander = bystander[1:]
			case offered > 0:
				offered--
			default:
				l.sent[min(done/second, int64(len(l.sent)-1))]++
			}
			continue
		default:
			if !waiting() {
				lastSent = l.now
			}
			if !l.fifo {
				if l.w.Next() <= l.now {
					if l.w.PingDue(l.now) { // since it was found closed
						l.ping()
						continue
					}
					panic("a time that has passed, and nothing came of it")
				}
				next = min(next, l.w.Next())
			}
		}
		if l.flood != nil { // it may begin
			next = min(next, l.now+second/1000)
		}
		l.now = next
	}
}

// waited returns a part of the bystander's waits, from one time to another.
func (l *link) waited(part float64, from, to time.Duration) time.Duration {
	var took []int64
	for _, w := range l.waits {
		if w.at >= int64(from) && w.at < int64(to) {
			took = append(took, w.took)
		}
	}
	if len(took) == 0 {
		return 0
	}
	slices.Sort(took)
	return time.Duration(took[min(int(part*float64(len(took))), len(took)-1)]).Round(time.Microsecond)
}

// rate returns how many of a thing there were per second, from one second to another.
func rate(perSecond []int, from, to int) int {
	n := 0
	for _, c := range perSecond[from:to] {
		n += c
	}
	return n / (to - from)
}
