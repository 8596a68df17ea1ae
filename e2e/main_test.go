package e2e

import (
	"flag"
	"fmt"
	"os"
	"os/signal"
	"testing"
)

// Tests mostly wait for processes to start and for each other, so a few more than there are
// cores run at once. Those of speed come first, alone: they do not call t.Parallel.
func TestMain(m *testing.M) {
	flag.Parse()
	if !isSet("test.parallel") {
		if err := flag.Set("test.parallel", "6"); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(2)
		}
	}
	// What a shell runs in the background ignores SIGINT, and what we start would inherit that:
	// the supervisor stops its collector with it.
	if signal.Ignored(os.Interrupt) {
		signal.Notify(make(chan os.Signal, 1), os.Interrupt)
	}
	os.Exit(m.Run())
}

func isSet(name string) (set bool) {
	flag.Visit(func(f *flag.Flag) { set = set || f.Name == name })
	return set
}
