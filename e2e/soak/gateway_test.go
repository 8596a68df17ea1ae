package main

import (
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// A data race is one finding with all that the race detector says of it, in a log of lines that
// are nobody's fault and of some that are.
func TestComplaints(t *testing.T) {
	const race = "WARNING: DATA RACE\nWrite at 0x00c000123456 by goroutine 7:\n  main.f()\n      x.go:12 +0x34\n\nGoroutine 7 (running) created at:\n  main.main()\n"
	const rule = "==================\n"
	lines, races, err := complaints(strings.NewReader("2026-11-27T00:00:00Z\tinfo\tEverything is ready\n" +
		rule + race + rule + "a\terror\tb\n" + rule + race + rule + "panic: x\ngoroutine 1 [running]:\n" + rule + race))
	require.NoError(t, err)
	require.Equal(t, []string{"a\terror\tb", "panic: x", "goroutine 1 [running]:"}, lines)
	require.Equal(t, []string{race, race, race}, races, "the last one has no end, since the gateway was killed")
}
