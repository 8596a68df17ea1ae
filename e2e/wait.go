package e2e

import (
	"fmt"
	"net"
	"strconv"
	"sync/atomic"
	"testing"
	"time"
)

// ceiling is how long anything may take that is not a matter of speed: far more than needed
// on a busy machine. Tests of speed have limits of their own.
const ceiling = 45 * time.Second

// eventually waits until wrong returns "". What it returned last is how the test fails.
func eventually(t *testing.T, wrong func() string) {
	t.Helper()
	within(t, ceiling, wrong)
}

func within(t *testing.T, limit time.Duration, wrong func() string) {
	t.Helper()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(limit); ; <-tick.C {
		last := wrong()
		if last == "" {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("after %s: %s", limit, last)
		}
	}
}

// throughout checks for a while that nothing is wrong.
func throughout(t *testing.T, while time.Duration, wrong func() string) {
	t.Helper()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for start := time.Now(); time.Since(start) < while; <-tick.C {
		if now := wrong(); now != "" {
			t.Fatalf("after %s: %s", time.Since(start), now)
		}
	}
}

// wantStill waits until a number has not changed for a while.
func wantStill(t *testing.T, while time.Duration, what string, number func() uint64) {
	t.Helper()
	last, since := number(), time.Now()
	eventually(t, func() string {
		if now := number(); now != last {
			last, since = now, time.Now()
		}
		if time.Since(since) < while {
			return fmt.Sprintf("%s still changes: %d", what, last)
		}
		return ""
	})
}

// lastPort is the last port given out. The ports below 32768 are those that no system gives
// to outgoing connections: nothing takes one between here and the process it is for.
var lastPort atomic.Int32

func init() { lastPort.Store(int32(15000 + time.Now().UnixNano()/1000%16000)) }

// freeAddress returns a loopback address that nobody uses, and that nobody else here gets.
func freeAddress(t *testing.T) string {
	t.Helper()
	for range 1000 {
		port := lastPort.Add(1)
		if port > 32000 {
			lastPort.CompareAndSwap(port, 15000)
		}
		address := net.JoinHostPort("127.0.0.1", strconv.Itoa(int(port)))
		// Not by listening: a process that is just being started would hold the port for a moment.
		if !dialable(address) {
			return address
		}
	}
	t.Fatal("no free port on 127.0.0.1")
	return ""
}

// dialable reports whether somebody listens at address.
func dialable(address string) bool {
	conn, err := net.Dial("tcp", address)
	if err != nil {
		return false
	}
	conn.Close()
	return true
}
