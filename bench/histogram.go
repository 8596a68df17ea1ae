package main

import (
	"math/bits"
	"sync/atomic"
)

// histogram counts durations in buckets no wider than 1/64 of what they hold.
type histogram [64 * 40]uint64

func bucket(d int64) int {
	v := uint64(max(d, 0))
	shift := max(bits.Len64(v)-7, 0) // leaves 64 … 127
	return min(shift*64+int(v>>shift), len(histogram{})-1)
}

// middle is the middle of a bucket, in nanoseconds.
func middle(i int) float64 {
	if i < 128 {
		return float64(i)
	}
	shift := i/64 - 1
	return (float64(i-shift*64) + 0.5) * float64(uint64(1)<<shift)
}

func (h *histogram) record(d int64) { atomic.AddUint64(&h[bucket(d)], 1) }

func (h *histogram) copy() (c histogram) {
	for i := range h {
		c[i] = atomic.LoadUint64(&h[i])
	}
	return c
}

// since is what was recorded after before was copied.
func (h histogram) since(before histogram) histogram {
	for i := range h {
		h[i] -= before[i]
	}
	return h
}

// quantile is in nanoseconds.
func (h *histogram) quantile(q float64) float64 {
	var total uint64
	for _, n := range h {
		total += n
	}
	rank, seen := uint64(q*float64(total)), uint64(0)
	for i, n := range h {
		if seen += n; seen > rank {
			return middle(i)
		}
	}
	return 0
}
