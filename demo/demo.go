package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/google/uuid"
	"golang.org/x/term"
)

const (
	demoKey     = "demo-key"
	connections = 3 // links of the gateway
)

// A demo is one run with everything on loopback. Its fields are set by the steps of show,
// one after another; stop goes over those that were reached.
type demo struct {
	o       options
	dir     string // configurations and logs
	started time.Time
	screen  *screen
	fleet   *fleet
	fail    context.CancelCauseFunc // ends show with an error

	logs       []io.Closer
	server     *opampServer
	gateway    *process // nil with -direct
	collectors []*process
	clients    []*clientAgent
	expected   map[string]bool // uids of our agents, as on the wire

	agentURL string        // where agents connect
	metrics  string        // address of the gateway's metrics, empty with -direct
	page     string        // URL of its status page, as metrics
	config   gatewayConfig // of the gateway, as it is now

	settled  atomic.Bool // the fleet is complete: from now on a child's end is news, not failure
	stopping atomic.Bool // children end because they are told to
	latest   atomic.Pointer[gatewayMetrics]
}

// runDemo shows the demo and takes everything away again, whatever happens.
func runDemo(ctx, hurry context.Context, o options, s *screen) (err error) {
	if err := findCollector(o.collector); err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "opampgateway-demo-")
	if err != nil {
		return err
	}
	if !o.keep {
		defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	}

	d := &demo{o: o, dir: dir, started: time.Now(), screen: s, expected: map[string]bool{}}
	d.fleet = newFleet(time.Now, d.screen.happened)

	show, fail := context.WithCancelCause(ctx)
	defer fail(nil)
	d.fail = fail
	err = d.show(show)
	switch {
	case err != nil && ctx.Err() != nil && !o.exitAfterAck:
		err = nil // stopped by the user
	case err != nil && ctx.Err() != nil:
		err = errors.New("stopped before the configuration was acknowledged")
	}
	return errors.Join(err, d.stop(hurry))
}

// show is the demo. It starts the parts in the order in which they need each other:
//
//  1. the server,
//  2. the gateway, until all its links are up,
//  3. the agents, until the server sees all of them in good health;
//  4. lets a stranger knock,
//  5. pushes a configuration and waits until it is acknowledged;
//  6. then the fleet is shown until the user has seen enough.
func (d *demo) show(ctx context.Context) error {
	d.screen.say(
		d.screen.paint(bold, "OpAMP gateway demo"),
		"  Many agents are managed by one OpAMP server; between them the gateway relays everything",
		"  over a few connections, its links. All of it runs here, on loopback.",
		"  Configurations and logs: "+d.dir,
		"")

	late := fmt.Errorf("not within %s (-timeout)", d.o.timeout)
	limited, cancel := context.WithTimeoutCause(ctx, d.o.timeout, late)
	defer cancel()
	steps := []struct {
		what string
		do   func(context.Context) (string, error)
	}{
		{"starting an OpAMP server", d.startServer},
		{fmt.Sprintf("starting the gateway, with %d links to the server", connections), d.startGateway},
		{fmt.Sprintf("starting %d agents", len(collectorNames)+d.o.clients), d.startAgents},
		{"letting a stranger with a wrong key knock", d.strangerKnocks},
		{"pushing a remote configuration to the agents that take one", d.pushConfiguration},
	}
	for i, s := range steps {
		if i == 1 && d.o.direct {
			d.agentURL = d.server.endpoint()
			continue
		}
		if err := d.screen.step(s.what, func() (string, error) { return s.do(limited) }); err != nil {
			if errors.Is(err, late) && d.gateway != nil && !d.gateway.ended() {
				err = fmt.Errorf("%w; the end of the gateway's log:\n  | %s", err, strings.Join(logTail(d.gateway.log, 12), "\n  | "))
			}
			return err
		}
	}
	if d.o.exitAfterAck {
		d.readMetrics(ctx)
		d.screen.say(d.summary()...)
		return nil
	}
	d.settled.Store(true)
	return d.live(ctx)
}

func (d *demo) startServer(context.Context) (string, error) {
	logger, err := d.newLogger("server.log")
	if err != nil {
		return "", err
	}
	d.server, err = startServer(d.fleet, demoKey, logger)
	if err != nil {
		return "", err
	}
	return d.server.endpoint(), nil
}

func (d *demo) startGateway(ctx context.Context) (string, error) {
	ports, err := freePorts(3)
	if err != nil {
		return "", err
	}
	d.agentURL, d.metrics, d.page = "ws://"+ports[0]+"/v1/opamp", ports[1], "http://"+ports[2]+"/"
	d.config = gatewayConfig{Server: d.server.endpoint(), Listen: ports[0], Connections: connections, Metrics: d.metrics, Status: ports[2]}
	config, err := render(gatewayTemplate, d.config)
	if err != nil {
		return "", err
	}
	if d.gateway, err = d.startProcess("gateway", config); err != nil {
		return "", err
	}
	err = d.fleet.waitFor(ctx, func(v fleetView) bool { return len(v.links) == connections })
	return fmt.Sprintf("%s, pid %d", d.agentURL, d.gateway.pid()), err
}

// collectorNames are the agents that are collectors.
var collectorNames = []string{"collector-a", "collector-b"}

func (d *demo) startAgents(ctx context.Context) (string, error) {
	for _, name := range collectorNames {
		uid, err := d.newUID()
		if err != nil {
			return "", err
		}
		config, err := render(agentTemplate, agentConfig{Name: name, UID: uid.String(), Endpoint: d.agentURL})
		if err != nil {
			return "", err
		}
		p, err := d.startProcess(name, config)
		if err != nil {
			return "", err
		}
		d.collectors = append(d.collectors, p)
	}
	logger, err := d.newLogger("clients.log")
	if err != nil {
		return "", err
	}
	for i := range d.o.clients {
		uid, err := d.newUID()
		if err != nil {
			return "", err
		}
		// Not ctx: it is for starting, the agents stay.
		a, err := startClientAgent(context.WithoutCancel(ctx), fmt.Sprintf("client-%d", i+1), uid, d.agentURL, demoKey, logger)
		if err != nil {
			return "", err
		}
		d.clients = append(d.clients, a)
	}
	if err := d.fleet.waitFor(ctx, d.complete); err != nil {
		return "", err
	}
	return fmt.Sprintf("%s with opampextension, %s of opamp-go", count(len(d.collectors), "collector"), count(len(d.clients), "client")), nil
}

// complete: the server sees all our agents, described and in good health.
func (d *demo) complete(v fleetView) bool {
	n := 0
	for _, a := range v.agents {
		if d.expected[a.uid] && a.connected && a.described && a.healthy {
			n++
		}
	}
	return n == len(d.expected)
}

// strangerKnocks shows that the gateway lets in whom the server lets in, and nobody else.
func (d *demo) strangerKnocks(ctx context.Context) (string, error) {
	status, err := knock(ctx, d.agentURL, authorization("wrong-key"))
	switch {
	case err != nil:
		return "", err
	case status != http.StatusUnauthorized:
		return "", fmt.Errorf("the answer is %d, not the server's 401", status)
	default:
		return "the answer is 401, as the server decided", nil
	}
}

// knock asks to connect as an agent would, and returns the status of the answer.
func knock(ctx context.Context, wsURL, authorization string) (int, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http"+strings.TrimPrefix(wsURL, "ws"), nil)
	if err != nil {
		return 0, err
	}
	req.Header = http.Header{
		"Connection":            {"Upgrade"},
		"Upgrade":               {"websocket"},
		"Sec-Websocket-Version": {"13"},
		"Sec-Websocket-Key":     {"a25vY2sga25vY2sga25vYw=="},
		"Authorization":         {authorization},
	}
	resp, err := http.DefaultTransport.RoundTrip(req)
	if err != nil {
		return 0, err
	}
	return resp.StatusCode, resp.Body.Close()
}

func (d *demo) pushConfiguration(ctx context.Context) (string, error) {
	d.server.pushNext()
	var o offerView
	err := d.fleet.waitFor(ctx, func(v fleetView) bool {
		o = *v.offer
		return o.wanted == d.o.clients && o.acked == o.wanted
	})
	return o.String(), err
}

func (o offerView) String() string {
	s := fmt.Sprintf("configuration %d (%s) acknowledged by %d of %s", o.revision, o.hash, o.acked, count(o.wanted, "agent"))
	if o.wanted > 0 && o.acked == o.wanted {
		s += " after " + o.took.Round(100*time.Microsecond).String()
	}
	return s
}

// live shows the fleet until ctx ends.
func (d *demo) live(ctx context.Context) error {
	if !d.screen.terminal() {
		d.readMetrics(ctx)
		d.screen.say(d.summary()...)
	}
	d.screen.say("")
	d.screen.say(d.hints()...)
	d.screen.say("", "running; Ctrl-C stops everything. What happens from now on:")
	if d.screen.terminal() {
		if d.gateway != nil {
			openPage(d.page)
		}
		if term.IsTerminal(int(os.Stdin.Fd())) {
			go d.pushOnEnter()
		}
		go d.watchMetrics(ctx)
		d.screen.show(d.frame)
		defer d.screen.show(nil)
	}
	<-ctx.Done()
	return context.Cause(ctx)
}

// pushOnEnter ends with the process, or with the input. A line with an r in it is a rollout to the gateway itself.
func (d *demo) pushOnEnter() {
	b := make([]byte, 256)
	for {
		n, err := os.Stdin.Read(b)
		if err != nil || d.stopping.Load() {
			return
		}
		if strings.Contains(string(b[:n]), "\n") {
			d.screen.enterPressed()
			if d.gateway == nil || !bytes.ContainsAny(b[:n], "rR") {
				d.server.pushNext()
				continue
			}
			text, err := d.rollOut()
			if err != nil {
				text = "was not reloaded: " + err.Error()
			}
			d.screen.happened(event{at: time.Now(), who: "gateway", text: text, loud: err != nil})
		}
	}
}

// rollOut has the gateway's collector reload with another pipeline, and says who noticed.
func (d *demo) rollOut() (string, error) {
	const line = "Everything is ready"
	starts := func() int {
		text, _ := os.ReadFile(d.gateway.log) // what cannot be read has no line
		return strings.Count(string(text), line)
	}
	d.config.Rollout++
	config, err := render(gatewayTemplate, d.config)
	if err != nil {
		return "", err
	}
	before, started, began := d.fleet.homes(), starts(), time.Now()
	if err := os.WriteFile(filepath.Join(d.dir, "gateway.yaml"), []byte(config), 0o600); err != nil {
		return "", err
	}
	if err := d.gateway.cmd.Process.Signal(syscall.SIGHUP); err != nil {
		return "", err
	}
	for starts() == started {
		if time.Since(began) > 10*time.Second || d.gateway.ended() {
			return "", errors.New("it did not start again; see its log")
		}
		time.Sleep(10 * time.Millisecond)
	}
	took := time.Since(began).Round(10 * time.Millisecond)
	time.Sleep(time.Second) // in which somebody who was disturbed would be seen
	moved, after := 0, d.fleet.homes()
	for uid, home := range before {
		if after[uid] != home {
			moved++
		}
	}
	return fmt.Sprintf("reloaded with a new pipeline within %s: %d of %s moved", took, moved, count(len(before), "agent")), nil
}

// watchMetrics ends with ctx.
func (d *demo) watchMetrics(ctx context.Context) {
	tick := time.NewTicker(2 * time.Second)
	defer tick.Stop()
	for {
		d.readMetrics(ctx)
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// readMetrics remembers what the gateway says of itself, or that it says nothing.
func (d *demo) readMetrics(ctx context.Context) {
	if d.metrics == "" {
		return
	}
	m, err := readMetrics(ctx, d.metrics)
	if err != nil {
		d.latest.Store(nil)
		return
	}
	d.latest.Store(&m)
}

// frame is what stays in sight on a terminal.
func (d *demo) frame(width, height int) []string {
	lines := []string{"", clip(fmt.Sprintf("OpAMP gateway demo (%s): Ctrl-C stops it, Enter pushes a configuration, r Enter reloads the gateway",
		time.Since(d.started).Round(time.Second)), width-1), ""}
	v := d.fleet.view()
	summary := summarize(v, time.Now(), d.places(), d.latest.Load(), width-1, d.screen.color)
	if room := max(0, height-1-len(lines)); len(summary) > room {
		summary = summary[:room]
	}
	return append(lines, summary...)
}

// summary is the same for the record.
func (d *demo) summary() []string {
	return append([]string{""}, summarize(d.fleet.view(), time.Now(), d.places(), d.latest.Load(), 0, d.screen.color)...)
}

// places are the addresses that summaries show.
type places struct {
	gateway string // empty with -direct
	page    string // as gateway
	server  string
}

func (d *demo) places() places {
	p := places{server: d.server.endpoint()}
	if d.gateway != nil {
		p.gateway = fmt.Sprintf("%s (pid %d)", d.agentURL, d.gateway.pid())
		p.page = d.page
	}
	return p
}

// summarize tells how things are: totals first, so that they are seen on a small terminal too.
func summarize(v fleetView, now time.Time, p places, m *gatewayMetrics, width int, color bool) []string {
	var lines []string
	add := func(what, format string, args ...any) {
		line := fmt.Sprintf("  %-14s %s", what, fmt.Sprintf(format, args...))
		if width > 0 {
			line = clip(line, width)
		}
		lines = append(lines, line)
	}
	if p.gateway == "" {
		add("agents", "%d connected, straight to the server", v.connected())
	} else {
		var loads []string
		for _, l := range v.links {
			loads = append(loads, fmt.Sprintf("%s %d", l.name, l.agents))
		}
		add("agents", "%d connected, all through the gateway", v.connected())
		add("links", "%d up, with agents: %s", len(v.links), dash(strings.Join(loads, ", ")))
		add("gateway", "%s", p.gateway)
		if p.page != "" {
			add("status page", "%s", p.page)
		}
	}
	add("server", "%s", p.server)
	if v.offer != nil {
		add("remote config", "%s", strings.TrimPrefix(v.offer.String(), "configuration "))
	}
	if m != nil {
		add("gateway counts", "%s", m)
	}
	lines = append(lines, "")
	return append(lines, agentTable(v.agents, now, width, color)...)
}

// hints are what one may try next.
func (d *demo) hints() []string {
	last, learns := d.collectors[len(d.collectors)-1], "the server sees its connection end"
	if d.gateway != nil {
		learns = "the gateway says goodbye to the server in its place"
	}
	var lines []string
	if d.gateway != nil {
		lines = append(lines, "see it in a browser: "+d.screen.paint(bold, d.page), "")
	}
	lines = append(lines,
		"things to try in another terminal:",
		fmt.Sprintf("  kill -9 %-8d %s vanishes without a word; %s", last.pid(), last.name, learns),
		fmt.Sprintf("  tail -f %s", filepath.Join(d.dir, "*.log")),
	)
	if d.gateway != nil {
		lines = append(lines,
			fmt.Sprintf("  kill -HUP %-6d the gateway reloads its configuration, and no agent notices", d.gateway.pid()),
			fmt.Sprintf("  curl -s http://%s/metrics | grep %s", d.metrics, strings.TrimSuffix(metricPrefix, "_")))
	}
	return lines
}

// startProcess writes a configuration and runs a collector with it.
func (d *demo) startProcess(name, config string) (*process, error) {
	file := filepath.Join(d.dir, name+".yaml")
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		return nil, err
	}
	p, err := startCollector(name, d.o.collector, file, filepath.Join(d.dir, name+".log"), demoKey, nil)
	if err != nil {
		return nil, err
	}
	go d.watch(p)
	return p, nil
}

// watch ends with the process, and cries out if nobody wanted that.
func (d *demo) watch(p *process) {
	<-p.done
	if d.stopping.Load() {
		return
	}
	text := fmt.Sprintf("%s (pid %d) has ended unexpectedly: %s", p.name, p.pid(), p.obituary())
	if !d.settled.Load() {
		d.fail(errors.New(text))
		return
	}
	d.screen.happened(event{at: time.Now(), who: "demo", text: text, loud: true})
}

func (d *demo) newUID() (uuid.UUID, error) {
	uid, err := uuid.NewV7()
	if err == nil {
		d.expected[string(uid[:])] = true
	}
	return uid, err
}

// stop ends what show has started: the agents, then the gateway, then the server.
func (d *demo) stop(hurry context.Context) error {
	d.stopping.Store(true)
	d.screen.say("")
	var errs []error
	if len(d.clients)+len(d.collectors) > 0 {
		errs = append(errs, d.screen.step("stopping the agents", func() (string, error) { return "", d.stopAgents(hurry) }))
	}
	if d.gateway != nil {
		errs = append(errs, d.screen.step("stopping the gateway", func() (string, error) { return "", d.gateway.stop(hurry) }))
	}
	if d.server != nil {
		errs = append(errs, d.screen.step("stopping the server", func() (string, error) {
			ctx, cancel := context.WithTimeout(hurry, stopTimeout)
			defer cancel()
			return "", d.server.stop(ctx)
		}))
	}
	for _, l := range d.logs {
		errs = append(errs, l.Close())
	}
	if d.o.keep {
		d.screen.say("configurations and logs are kept in " + d.dir)
	}
	err := errors.Join(errs...)
	if err == nil {
		d.screen.say("all stopped, nothing is left running")
	}
	return err
}

func (d *demo) stopAgents(hurry context.Context) error {
	ctx, cancel := context.WithTimeout(hurry, stopTimeout)
	defer cancel()
	var wg sync.WaitGroup
	errs := make([]error, len(d.clients)+len(d.collectors))
	for i, a := range d.clients {
		wg.Go(func() { errs[i] = a.stop(ctx) })
	}
	for i, p := range d.collectors {
		wg.Go(func() { errs[len(d.clients)+i] = p.stop(hurry) })
	}
	wg.Wait()
	return errors.Join(errs...)
}

// newLogger makes a log file for opamp-go.
func (d *demo) newLogger(name string) (*fileLogger, error) {
	f, err := os.Create(filepath.Join(d.dir, name))
	if err != nil {
		return nil, err
	}
	d.logs = append(d.logs, f)
	return &fileLogger{log.New(f, "", log.LstdFlags|log.Lmicroseconds)}, nil
}

// A fileLogger is what opamp-go logs to.
type fileLogger struct{ log *log.Logger }

func (l *fileLogger) Debugf(_ context.Context, format string, v ...any) {
	l.log.Printf("debug "+format, v...)
}

func (l *fileLogger) Errorf(_ context.Context, format string, v ...any) {
	l.log.Printf("error "+format, v...)
}
