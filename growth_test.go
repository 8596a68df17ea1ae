package opampgateway

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"runtime"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/opampgateway/opampgateway/internal/status"
)

// What the gateway costs must not grow with the number of its agents. The figures are those of the
// gateway and of ends that cost next to nothing; bench/README.md says how to read them.

// fleetSizes are how many agents there are: up to more than there can be files for.
var fleetSizes = []int{2_000, 10_000, 50_000, 100_000}

const (
	// stride is from which agent to which it goes on, so that none is still in the processor's
	// caches from the one before. It divides no size, so that all have their turn.
	stride = 7_919

	// turnover is how many agents leave, or come, before others take their place: few of a fleet.
	turnover = 250
)

// atEachSize runs a benchmark before fleets of all sizes, and once more before the largest, of which
// only as many agents are active as the smallest has: what differs from the smallest fleet then is
// owed to the number of agents, and what differs between fleets besides to the processor's caches.
func atEachSize(b *testing.B, benchmark func(b *testing.B, f *fleet, active int)) {
	b.Helper()
	for _, size := range fleetSizes {
		var f *fleet
		run := func(name string, active int) {
			b.Run(name, func(b *testing.B) {
				if f == nil { // of several runs, and unless it is not asked for
					f = newFleet(b)
					f.grow(size)
				}
				runtime.GC() // what was left of that
				b.ReportAllocs()
				b.ResetTimer()
				benchmark(b, f, active)
			})
		}
		run(fmt.Sprintf("agents=%d", size), size)
		if size == fleetSizes[len(fleetSizes)-1] {
			run(fmt.Sprintf("agents=%d,active=%d", size, fleetSizes[0]), fleetSizes[0])
		}
		if f != nil {
			f.stop()
		}
	}
}

// One message of an agent to the server, and the answer.
func BenchmarkMessage(b *testing.B) {
	atEachSize(b, func(b *testing.B, f *fleet, active int) {
		w := window{f: f}
		for i := range b.N {
			w.begin()
			f.agents[i*stride%active].say()
		}
		w.drain()
	})
}

// One agent's connection ends without a goodbye, until the server knows.
func BenchmarkDisconnect(b *testing.B) {
	atEachSize(b, func(b *testing.B, f *fleet, active int) {
		w := window{f: f}
		var left []int
		for i := range b.N {
			if len(left) == turnover {
				w.drain()
				b.StopTimer()
				f.fill(left)
				left = left[:0]
				b.StartTimer()
			}
			w.begin()
			left = append(left, i*stride%active)
			f.agents[left[len(left)-1]].leave()
		}
		w.drain()
		b.StopTimer()
		f.fill(left)
	})
}

// One agent is let in, about which the server is asked.
func BenchmarkAdmit(b *testing.B) {
	atEachSize(b, func(b *testing.B, f *fleet, active int) {
		w := window{f: f}
		var came []int
		for i := range b.N {
			if i%turnover == 0 {
				w.drain()
				b.StopTimer()
				f.greet(came)
				came = came[:0]
				for j := i; j < min(i+turnover, b.N); j++ {
					came = append(came, j*stride%active)
				}
				f.leave(came)
				b.StartTimer()
			}
			w.begin()
			f.admit(came[i%turnover])
		}
		w.drain()
		b.StopTimer()
		f.greet(came)
	})
}

// The memory of an agent that is connected, has spoken, and is idle. That of its end is left out.
func BenchmarkMemory(b *testing.B) {
	f := newFleet(b)
	defer f.stop()
	none := inUse()
	ends := make([]*agentEnd, fleetSizes[0])
	for i := range ends {
		ends[i] = f.newAgent()
	}
	perEnd := float64(inUse().heap-none.heap) / float64(len(ends))
	runtime.KeepAlive(ends)

	none = inUse()
	for _, size := range fleetSizes { // one fleet that grows: goroutines of another would be used again
		b.Run(fmt.Sprintf("agents=%d", size), func(b *testing.B) {
			f.grow(size)
			all := inUse()
			b.ReportMetric(float64(all.heap-none.heap)/float64(size)-perEnd, "heap-B/agent")
			b.ReportMetric(float64(all.stack-none.stack)/float64(size), "stack-B/agent")
			b.ReportMetric(0, "ns/op") // of no interest
		})
	}
}

// memoryInUse is memory with something in it, in bytes.
type memoryInUse struct{ heap, stack int64 }

// inUse measures it once nothing is left to collect.
func inUse() memoryInUse {
	for range 4 { // a stack shrinks by half at a time; a pool is empty after two
		runtime.GC()
	}
	var stats runtime.MemStats
	runtime.ReadMemStats(&stats)
	return memoryInUse{int64(stats.HeapAlloc), int64(stats.StackInuse)}
}

// How often memory may be allocated to relay one small message: never, since that of messages is
// used again.
const allocationsUp, allocationsDown = 0, 0

func TestRelayingAllocatesNothing(t *testing.T) {
	f := newFleet(t)
	defer f.stop()
	f.grow(10)
	alice := f.agents[3]
	f.silent.Store(true)
	up := testing.AllocsPerRun(1000, func() {
		alice.say()
		<-f.done
	})
	require.LessOrEqual(t, up, float64(allocationsUp), "allocations per message to the server")
	down := testing.AllocsPerRun(1000, func() {
		f.push(alice)
		<-f.done
	})
	require.LessOrEqual(t, down, float64(allocationsDown), "allocations per message to an agent")
}

// The status page is asked for all that it shows. It asks twice in two seconds.
func BenchmarkStatus(b *testing.B) {
	f := newFleet(b)
	defer f.stop()
	const agents = 15_000
	f.grow(agents)
	handler := status.NewHandler(&statusPage{gateway: f.gateway})
	for _, path := range []string{"/api/v1/status", "/api/v1/agents?per=25", "/api/v1/agents?per=25&sort=instance_uid", "/api/v1/agents?q=agent/1&sort=address&page=100"} {
		b.Run(fmt.Sprintf("agents=%d%s", agents, path), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				w := httptest.NewRecorder()
				handler.ServeHTTP(w, httptest.NewRequest(http.MethodGet, path, nil))
				if w.Code != http.StatusOK {
					b.Fatal(w.Code, w.Body)
				}
			}
		})
	}
}
