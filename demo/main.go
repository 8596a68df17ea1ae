// Command demo shows the OpAMP gateway at work, with nothing to install or to set up.
//
// It starts a fleet on loopback, in the order in which each part needs the one before:
//
//  1. an OpAMP server, in this process, on the server library of opamp-go (server.go);
//     what it knows of the world is a fleet (fleet.go);
//  2. the gateway: a collector process with the opampgateway extension;
//  3. agents: two collector processes with opampextension, and agents in this process
//     on the client library of opamp-go (agents.go).
//
// Then it has the server push a remote configuration through the gateway, and shows the
// fleet live (screen.go) until it is told to stop. Stopping goes through the same list
// backwards, so that each part can say goodbye to somebody who is still there.
//
// With -server it starts only the gateway, for a server that exists already (gateway.go).
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"syscall"
	"time"

	"golang.org/x/term"
)

type options struct {
	collector    string        // the collector's binary
	server       string        // run just the gateway, against this server
	listen       string        // where that gateway listens
	direct       bool          // no gateway: the agents connect to the server themselves
	clients      int           // agents in this process
	exitAfterAck bool          // stop when the configuration is acknowledged
	timeout      time.Duration // until then
	keep         bool          // leave the directory with configurations and logs
}

// secretKeyEnv carries the secret key to the collectors. Their configurations only refer
// to it, so the key itself is in no file and on no command line.
const secretKeyEnv = "OPAMP_SECRET_KEY"

func main() {
	o, err := parseFlags(os.Args[1:])
	if errors.Is(err, flag.ErrHelp) {
		return
	}
	if err != nil {
		os.Exit(2) // the flag package has said why
	}

	// The first signal asks for an orderly stop. The second one is somebody who has no
	// patience left: what still runs is killed, but nothing is left behind.
	ctx, stop := context.WithCancel(context.Background())
	hurry, kill := context.WithCancel(context.Background())
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGPIPE)
	go awaitSignals(signals, stop, kill)

	if o.server != "" {
		err = runGatewayOnly(ctx, hurry, o)
	} else {
		s := newTerminalScreen()
		err = runDemo(ctx, hurry, o, s)
		s.close()
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "demo: %v\n", err)
		os.Exit(1)
	}
}

// awaitSignals ends with the process. SIGPIPE means that nobody reads our output any more;
// it comes with every further line.
func awaitSignals(signals <-chan os.Signal, stop, kill context.CancelFunc) {
	<-signals
	stop()
	for s := range signals {
		if s != syscall.SIGPIPE {
			kill()
		}
	}
}

func parseFlags(args []string) (options, error) {
	var o options
	flags := flag.NewFlagSet("demo", flag.ContinueOnError)
	flags.StringVar(&o.collector, "collector", "../build/otelcol-opampgateway", "the collector to run, as built by make collector")
	flags.StringVar(&o.server, "server", "", "run just the gateway, against the OpAMP server at this ws:// or wss:// `URL`, with the secret key in "+secretKeyEnv)
	flags.StringVar(&o.listen, "listen", "localhost:4320", "with -server: the `address` at which agents connect to the gateway")
	flags.BoolVar(&o.direct, "direct", false, "leave the gateway out: agents connect straight to the server, to compare")
	flags.IntVar(&o.clients, "clients", 2, "the `number` of agents in this process, next to two collectors")
	agents := flags.Int("agents", 0, "the `number` of agents in all, instead of -clients: two are collectors")
	flags.BoolVar(&o.exitAfterAck, "exit-after-ack", false, "stop as soon as the pushed configuration is acknowledged; exit status 0 says that it was")
	flags.DurationVar(&o.timeout, "timeout", time.Minute, "the `time` all of this may take up to the acknowledgement")
	flags.BoolVar(&o.keep, "keep", false, "keep the directory with the configurations and logs")
	if err := flags.Parse(args); err != nil {
		return o, err
	}

	if *agents != 0 {
		o.clients = *agents - len(collectorNames)
	}

	var err error
	switch {
	case *agents != 0 && o.clients < 1:
		err = fmt.Errorf("-agents: must be at least %d; is %d", len(collectorNames)+1, *agents)
	case flags.NArg() > 0:
		err = fmt.Errorf("unexpected argument %q", flags.Arg(0))
	case o.clients < 1:
		err = fmt.Errorf("-clients: must be at least 1, somebody has to acknowledge the configuration; is %d", o.clients)
	case o.timeout <= 0:
		err = fmt.Errorf("-timeout: must be above 0, is %s", o.timeout)
	}
	if err != nil {
		fmt.Fprintf(flags.Output(), "demo: %v\n", err)
		return o, err
	}
	return o, nil
}

// findCollector says what to do when the collector was not built.
func findCollector(path string) error {
	if _, err := exec.LookPath(path); err != nil {
		return fmt.Errorf("no collector to run at %s: build it with \"make collector\", or name another with -collector", path)
	}
	return nil
}

// newTerminalScreen draws on the terminal, or prints lines where there is none.
func newTerminalScreen() *screen {
	fd := int(os.Stdout.Fd())
	if !term.IsTerminal(fd) || os.Getenv("TERM") == "dumb" {
		return newScreen(os.Stdout, nil, false)
	}
	size := func() (width, height int) {
		width, height, err := term.GetSize(fd)
		if err != nil || width <= 0 || height <= 0 {
			return 80, 24
		}
		return width, height
	}
	return newScreen(os.Stdout, size, os.Getenv("NO_COLOR") == "")
}
