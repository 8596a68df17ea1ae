package window

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

const (
	ms = time.Millisecond
	us = time.Microsecond
)

// TestLinks simulates links of every kind with ten flooders, and a bystander whose message is to be read soon.
// It logs what it saw.
func TestLinks(t *testing.T) {
	// changing returns a function of time that is one thing from one time to another, and before and after that
	// something else.
	changing := func(usual, meanwhile time.Duration, from, to int64) func(int64) int64 {
		return func(now int64) int64 {
			if now >= from*second && now < to*second {
				return int64(meanwhile)
			}
			return int64(usual)
		}
	}
	costing := func(of func(int64) int64) func(int64, int) int64 {
		return func(now int64, _ int) int64 { return of(now) }
	}
	perByte := func(_ int64, bytes int) int64 { return int64(bytes) * 20 } // 50 MB/s
	each := func(nth uint64) func(uint64, int64) bool {
		return func(number uint64, _ int64) bool { return number%nth == 0 }
	}
	const lan = 100 * us

	for _, test := range []struct {
		name     string
		link     link
		run      time.Duration
		p99, max time.Duration // of the bystander's waits, after the first second
		from, to int           // in these seconds of the run ...
		least    int           // ... the flooders get through at least so many messages a second
		pings    int           // and at most so many pings go a second
		base     time.Duration // the round trip that is known in the end, less a quarter, or more and 2 ms
	}{
		{
			name: "1 ms a message", link: link{path: always(lan), cost: perMessage(ms), kernel: 4 << 20},
			run: time.Minute, p99: 65 * ms, max: 80 * ms, from: 1, to: 60, least: 960, pings: 80, base: 2 * lan,
		},
		{
			name: "1 ms a message of 64 KiB", link: link{path: always(lan), cost: perMessage(ms), size: 64 << 10},
			run: time.Minute, p99: 65 * ms, max: 80 * ms, from: 1, to: 60, least: 960, pings: 90, base: 2 * lan,
		},
		{
			name: "10 ms a message", link: link{path: always(lan), cost: perMessage(10 * ms), bystander: int64(337 * ms)},
			run: time.Minute, p99: 80 * ms, max: 90 * ms, from: 1, to: 60, least: 90, pings: 60, base: 2 * lan,
		},
		{
			name: "1 s a message", link: link{path: always(lan), cost: perMessage(1000 * ms), bystander: 17 * second},
			run: 5 * time.Minute, p99: 7 * time.Second, max: 7 * time.Second, from: 20, to: 300, least: 0, pings: 3, base: 2 * lan,
		},
		{
			name: "as fast as the writer", link: link{path: always(50 * us), cost: perMessage(5 * us)},
			run: 10 * time.Second, p99: ms, max: 5 * ms, from: 1, to: 10, least: 99_000, pings: 30, base: lan,
		},
		{
			name: "50 MB/s, messages of 64 KiB", link: link{path: always(50 * us), cost: perByte, size: 64 << 10},
			run: 30 * time.Second, p99: 65 * ms, max: 80 * ms, from: 1, to: 30, least: 740, pings: 90, base: lan,
		},
		{
			name: "round trip of 100 ms, fast", link: link{path: always(50 * ms), cost: perMessage(5 * us)},
			run: 20 * time.Second, p99: 110 * ms, max: 300 * ms, from: 2, to: 20, least: 95_000, pings: 30, base: 100 * ms,
		},
		{
			name: "round trip of 100 ms, 1 ms a message", link: link{path: always(50 * ms), cost: perMessage(ms)},
			run: time.Minute, p99: 250 * ms, max: 350 * ms, from: 2, to: 60, least: 930, pings: 35, base: 100 * ms,
		},
		{
			name: "round trip of 100 ms, 20 µs a message", link: link{path: always(50 * ms), cost: perMessage(20 * us)},
			run: 20 * time.Second, p99: 250 * ms, max: 350 * ms, from: 1, to: 20, least: 45_000, pings: 35, base: 100 * ms,
		},
		{
			name: "round trip of 100 ms ± 30 % each message", link: link{path: jitter(50*ms, 0.3), cost: perMessage(20 * us)},
			run: 40 * time.Second, p99: 350 * ms, max: 700 * ms, from: 3, to: 40, least: 40_000, pings: 35,
		},
		{
			name: "round trip of 100 ms ± 30 %, changing", link: link{path: weather(50*ms, 0.3), cost: perMessage(ms)},
			run: time.Minute, p99: 350 * ms, max: 700 * ms, from: 2, to: 60, least: 850, pings: 35,
		},
		{
			name: "round trip of 200 ms ± 30 % each message", link: link{path: jitter(100*ms, 0.3), cost: perMessage(100 * us)},
			run: 40 * time.Second, p99: 900 * ms, max: 1500 * ms, from: 4, to: 40, least: 5_000, pings: 35,
		},
		{
			name: "slows down by 10, and recovers", link: link{path: always(lan), cost: costing(changing(ms, 10*ms, 10, 30))},
			run: time.Minute, p99: 350 * ms, max: 600 * ms, from: 31, to: 60, least: 960, pings: 80, base: 2 * lan,
		},
		{
			name: "drops one ping", link: link{
				path: always(lan), cost: perMessage(ms),
				drop: func(number uint64, _ int64) bool { return number == 500 },
			},
			run: 20 * time.Second, p99: 65 * ms, max: 120 * ms, from: 1, to: 20, least: 960, pings: 80, base: 2 * lan,
		},
		{
			name: "drops each third ping", link: link{path: always(lan), cost: perMessage(ms), drop: each(3)},
			run: time.Minute, p99: 80 * ms, max: 150 * ms, from: 1, to: 60, least: 900, pings: 80, base: 2 * lan,
		},
		{
			name: "drops each third ping, 10 ms a message",
			link: link{path: always(lan), cost: perMessage(10 * ms), drop: each(3), bystander: int64(337 * ms)},
			run:  time.Minute, p99: 150 * ms, max: 300 * ms, from: 1, to: 60, least: 90, pings: 80, base: 2 * lan,
		},
		{
			name: "path from 10 to 110 ms and back, 1 ms a message",
			link: link{path: changing(5*ms, 55*ms, 10, 40), cost: perMessage(ms)},
			run:  70 * time.Second, p99: 300 * ms, max: 500 * ms, from: 12, to: 70, least: 930, pings: 80, base: 10 * ms,
		},
		{
			name: "path from 10 to 110 ms and back, 20 µs a message",
			link: link{path: changing(5*ms, 55*ms, 10, 40), cost: perMessage(20 * us)},
			run:  70 * time.Second, p99: 250 * ms, max: 500 * ms, from: 12, to: 70, least: 47_000, pings: 80, base: 10 * ms,
		},
		{
			name: "path from 10 to 110 ms for good",
			link: link{path: changing(5*ms, 55*ms, 10, 1000), cost: perMessage(20 * us)},
			run:  30 * time.Second, p99: 300 * ms, max: 500 * ms, from: 12, to: 30, least: 45_000, pings: 80, base: 110 * ms,
		},
		{
			name: "reads 100 messages ahead", link: link{path: always(lan), cost: perMessage(ms), readAhead: 100},
			run: 30 * time.Second, p99: 180 * ms, max: 250 * ms, from: 1, to: 30, least: 950, pings: 90,
		},
		{
			name: "reads everything ahead, as fast as the writer",
			link: link{path: always(lan), cost: perMessage(9 * us), readAhead: 1 << 30},
			run:  10 * time.Second, p99: 5 * ms, max: 20 * ms, from: 1, to: 10, least: 95_000, pings: 30, base: 2 * lan,
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			l := &test.link
			l.flooders = 10
			if l.bystander == 0 {
				l.bystander = int64(37 * ms)
			}
			l.run(test.run)
			seconds := int(test.run / time.Second)
			p50, p99, most := l.waited(0.5, time.Second, test.run), l.waited(0.99, time.Second, test.run), l.waited(1, time.Second, test.run)
			first := l.sent[:min(4, seconds)]
			through, pings := rate(l.sent, test.from, test.to), rate(l.pings, 1, seconds)
			t.Logf("bystander p50 %v, p99 %v, max %v; flooders %d/s (%v in the first seconds); %d pings/s; base %v, window %v",
				p50, p99, most, through, first, pings, time.Duration(l.w.base), l.w.size)
			require.LessOrEqual(t, p99, test.p99)
			require.LessOrEqual(t, most, test.max)
			require.GreaterOrEqual(t, through, test.least)
			require.LessOrEqual(t, pings, test.pings)
			if test.base != 0 {
				require.InDelta(t, test.base, l.w.base, float64(test.base/4+2*ms))
			}
			require.True(t, l.w.Answers())
		})
	}
}

// TestThroughputOfALongPath compares it with that of a link without a window.
func TestThroughputOfALongPath(t *testing.T) {
	for _, size := range []int{100, 64 << 10} {
		window := &link{path: always(50 * ms), cost: perMessage(20 * us), flooders: 10, size: size}
		window.run(20 * time.Second)
		fifo := &link{path: always(50 * ms), cost: perMessage(20 * us), flooders: 10, size: size, fifo: true}
		fifo.run(20 * time.Second)
		t.Logf("%d bytes: %v messages in the first seconds, without a window %v; then %d/s, %d/s", size,
			window.sent[:4], fifo.sent[:4], rate(window.sent, 2, 20), rate(fifo.sent, 2, 20))
		require.Greater(t, window.sent[2]*2, fifo.sent[2], "after two seconds")
		require.Greater(t, rate(window.sent, 2, 20)*10, rate(fifo.sent, 2, 20)*9)
	}
}

// TestPingsOfALinkThatIsNotFull: a small window does not cost a ping each 10 ms.
func TestPingsOfALinkThatIsNotFull(t *testing.T) {
	for name, test := range map[string]struct {
		path, cost, each time.Duration
	}{
		"3,300/s, nearby":               {50 * us, 10 * us, 300 * us},
		"3,300/s, round trip of 10 ms":  {5 * ms, 10 * us, 300 * us},
		"3,300/s, round trip of 100 ms": {50 * ms, 10 * us, 300 * us},
		"900/s, 1 ms each":              {50 * us, ms, 1100 * us},
		"10/s":                          {50 * us, 10 * us, 100 * ms},
	} {
		t.Run(name, func(t *testing.T) {
			l := &link{path: always(test.path), cost: perMessage(test.cost), offered: int64(test.each)}
			l.run(30 * time.Second)
			t.Logf("%d pings/s, %d in the first second; window %v", rate(l.pings, 1, 30), l.pings[0], l.w.size)
			require.LessOrEqual(t, rate(l.pings, 1, 30), 20)
		})
	}
}

// TestFloodAfterAQuietTime: a window that grew for the sake of fewer pings is not too large for a flood.
func TestFloodAfterAQuietTime(t *testing.T) {
	l := &link{
		path: always(50 * us), cost: perMessage(ms), offered: int64(1100 * us), bystander: int64(37 * ms),
		flooders: 10, flood: func(now int64) bool { return now > 10*second },
	}
	l.run(30 * time.Second)
	before, p99, most := l.waited(1, 0, 9*time.Second), l.waited(0.99, 10*time.Second, 30*time.Second), l.waited(1, 10*time.Second, 30*time.Second)
	t.Logf("before at most %v; p99 %v, max %v", before, p99, most)
	require.Less(t, before, 5*ms)
	require.Less(t, p99, 80*ms)
	require.Less(t, most, 150*ms)
}

// TestServerThatReadsEverythingAhead is what the window cannot help: pings are answered at once, though messages
// wait in the server's memory. It does not do harm there either.
func TestServerThatReadsEverythingAhead(t *testing.T) {
	l := &link{path: always(100 * us), cost: perMessage(ms), readAhead: 1 << 30, flooders: 10}
	l.run(5 * time.Second)
	t.Logf("%d/s, %d pings/s, window %v", rate(l.sent, 1, 5), rate(l.pings, 1, 5), l.w.size)
	require.Greater(t, rate(l.sent, 1, 5), 990)
	require.Equal(t, uint64(ceilMessages), l.w.size.messages)
}

// TestServerThatNeverAnswers is served as if there were no window, once that is known.
func TestServerThatNeverAnswers(t *testing.T) {
	l := &link{
		path: always(100 * us), cost: perMessage(ms), flooders: 10, kernel: 10_000,
		drop: func(uint64, int64) bool { return true },
	}
	l.run(time.Minute)
	t.Logf("%v in the first seconds, then %d/s; %d pings in all", l.sent[:6], rate(l.sent, 5, 60), rate(l.pings, 0, 60)*60)
	require.False(t, l.w.Answers())
	require.Greater(t, rate(l.sent, 5, 60), 960)
	require.LessOrEqual(t, rate(l.pings, 5, 60), 1)
	require.Less(t, time.Duration(l.closed), 4*time.Second+ms)
}

// TestServerThatStopsAnswering is served so after 10 s, and with a window again when it answers.
func TestServerThatStopsAnswering(t *testing.T) {
	l := &link{
		path: always(100 * us), cost: perMessage(ms), flooders: 10, kernel: 10_000, bystander: int64(37 * ms),
		drop: func(_ uint64, now int64) bool { return now > 10*second && now < 40*second },
	}
	l.run(70 * time.Second)
	t.Logf("per second, from the 9th: %v; bystander's p99 after 55 s %v", l.sent[9:24], l.waited(0.99, 55*time.Second, 70*time.Second))
	require.Greater(t, rate(l.sent, 21, 40), 960)
	require.True(t, l.w.Answers())
	require.Greater(t, rate(l.sent, 55, 70), 960)
	require.Less(t, l.waited(0.99, 55*time.Second, 70*time.Second), 80*ms)
}
