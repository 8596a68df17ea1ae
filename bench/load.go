package main

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/protobuf/encoding/protowire"
)

// load is many agents in one process. Each has one goroutine, its reader, which checks what
// comes and, while the load is saturated, says the next thing at once.
type load struct {
	url    *url.URL
	posts  bool // agents speak over plain HTTP
	tls    *tls.Config
	agents []*agent

	size       atomic.Int64 // of the messages that agents send
	saturated  atomic.Bool
	lossy      atomic.Bool // connections end on purpose: a reply may be missing
	stopPacing chan struct{}
	pacing     sync.WaitGroup

	sent, replies atomic.Uint64
	latency       histogram
	closed        atomic.Int64 // connections that ended, and we did not end them
	reached       atomic.Int64 // agents that got a push since AwaitPushes
	lastReached   atomic.Int64 // when, in Unix nanoseconds
	epoch         atomic.Int64 // counts AwaitPushes

	mu       sync.Mutex // guards failures
	failures []string   // the first few
}

// agent is one of them.
type agent struct {
	load    *load
	index   int
	uid     uid
	conn    *conn
	leaving atomic.Bool
	stalled atomic.Bool // it shall no longer read

	// Owned by the reader.
	received uint64 // number of the last reply
	epoch    int64  // of the last push

	mu     sync.Mutex // guards what follows, and orders what is sent
	number uint64     // of the last message
	data   []byte     // of a message being sent
	buffer []byte     // the same message, encoded
}

// Target says where agents connect.
type Target struct {
	URL      string
	CertFile string // whom to trust; any certificate will do without
}

// Target sets it.
func (l *load) Target(args Target, _ *struct{}) error {
	target, err := url.Parse(args.URL)
	if err != nil {
		return err
	}
	l.url = target
	l.size.Store(200)
	l.tls = &tls.Config{ServerName: target.Hostname(), InsecureSkipVerify: args.CertFile == ""}
	if args.CertFile == "" {
		return nil
	}
	pem, err := os.ReadFile(args.CertFile)
	if err != nil {
		return err
	}
	l.tls.RootCAs = x509.NewCertPool()
	l.tls.RootCAs.AppendCertsFromPEM(pem)
	return nil
}

// Posts has the agents that connect from now on speak over plain HTTP.
func (l *load) Posts(struct{}, *struct{}) error {
	l.posts = true
	return nil
}

// Connect is agents to connect.
type Connect struct {
	Agents   int
	AtOnce   int           // handshakes under way
	Within   time.Duration // all have to be connected and heard by then
	Greeting bool          // each says something, and waits for the answer
}

// Connect connects more agents.
func (l *load) Connect(args Connect, _ *struct{}) error {
	deadline := time.Now().Add(args.Within)
	first := len(l.agents)
	l.agents = append(l.agents, make([]*agent, args.Agents)...)
	var next atomic.Int64
	var failed atomic.Pointer[error]
	var dialing sync.WaitGroup
	for range min(args.AtOnce, args.Agents) {
		dialing.Go(func() {
			for failed.Load() == nil {
				i := int(next.Add(1)) - 1
				if i >= args.Agents {
					return
				}
				a, err := l.dial(first+i, deadline)
				if err != nil {
					failed.CompareAndSwap(nil, &err)
					return
				}
				l.agents[first+i] = a
			}
		})
	}
	dialing.Wait()
	if err := failed.Load(); err != nil {
		return *err
	}
	before := l.replies.Load()
	for _, a := range l.agents[first:] {
		if args.Greeting {
			if err := a.send(); err != nil {
				return err
			}
		}
		go a.run()
	}
	if !args.Greeting {
		return nil
	}
	return l.until(deadline, func() string {
		if n := l.replies.Load() - before; n < uint64(args.Agents) {
			return fmt.Sprintf("%d of %d agents have an answer", n, args.Agents)
		}
		return ""
	})
}

func (l *load) until(deadline time.Time, missing func() string) error {
	for {
		what := missing()
		switch {
		case what == "":
			return nil
		case time.Now().After(deadline):
			return errors.New(what + l.failed())
		}
		time.Sleep(2 * time.Millisecond)
	}
}

func (l *load) dial(index int, deadline time.Time) (*agent, error) {
	dialer := net.Dialer{Deadline: deadline}
	nc, err := dialer.Dial("tcp", l.url.Host)
	if err != nil {
		return nil, err
	}
	if l.url.Scheme == "wss" {
		nc = tls.Client(nc, l.tls)
	}
	a := &agent{load: l, index: index, uid: uidOf(index), conn: newConn(nc, true)}
	if err := a.shakeHands(deadline); err != nil {
		nc.Close()
		return nil, fmt.Errorf("handshake of agent %d: %w", index, err)
	}
	return a, nil
}

func (a *agent) shakeHands(deadline time.Time) error {
	target := a.load.url
	path := target.Path
	if path == "" {
		path = "/v1/opamp"
	}
	if a.load.posts {
		a.beginPosts(path)
		return nil
	}
	_ = a.conn.SetDeadline(deadline)
	request := "GET " + path + " HTTP/1.1\r\nHost: " + target.Host + "\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n" +
		"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n" + a.headers() + "\r\n"
	if _, err := a.conn.Write([]byte(request)); err != nil {
		return err
	}
	head, err := a.conn.readHead()
	if err != nil {
		return err
	}
	if status, _, _ := strings.Cut(head, "\r\n"); !strings.HasPrefix(status, "HTTP/1.1 101 ") {
		return fmt.Errorf("answered %q", status)
	}
	return a.conn.SetDeadline(time.Time{})
}

// headers are those that tell who the agent is.
func (a *agent) headers() string {
	return "Authorization: Secret-Key 01J9ZQ0V4E7S8T9R2K3M4N5P6Q\r\nUser-Agent: bench/1.0\r\nOpAMP-Version: v0.2.0\r\n" +
		fmt.Sprintf("Agent-ID: %x\r\nAgent-Version: v1.95.0\r\nAgent-Hostname: host-%d\r\n", a.uid, a.index)
}

// send sends the agent's next message.
func (a *agent) send() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	size := dataSize(int(a.load.size.Load()))
	if cap(a.data) < size {
		a.data = make([]byte, size)
	}
	a.data = a.data[:size]
	a.number++
	fillData(a.data, a.index, a.number, time.Now().UnixNano())
	a.buffer = appendAgentToServer(a.buffer[:0], a.uid, a.data)
	if a.load.posts && a.number == 1 { // who does not say who it is would be asked
		a.buffer = appendDescription(a.buffer)
	}
	a.load.sent.Add(1)
	return a.conn.write(opBinary, a.buffer)
}

// run reads until the connection ends.
func (a *agent) run() {
	defer a.conn.Close()
	for {
		message, err := a.conn.read()
		if err != nil {
			if !a.leaving.Load() {
				a.load.closed.Add(1)
			}
			return
		}
		if a.stalled.Load() {
			select {} // to the end of the process, with the connection open
		}
		if err := a.take(message); err != nil {
			a.load.fail(fmt.Sprintf("agent %d: %v", a.index, err))
		}
	}
}

// take checks a message of the server: it has to be this agent's, the one that is due, and whole.
func (a *agent) take(message []byte) error {
	var owner, data []byte
	var flags uint64
	err := fields(body(message), func(number protowire.Number, value []byte, varint uint64) {
		switch number {
		case fieldUID:
			owner = value
		case fieldFlags:
			flags = varint
		case fieldRemoteConfig:
			_ = fields(value, func(number protowire.Number, value []byte, _ uint64) {
				if number == fieldConfigHash {
					data = value
				}
			})
		}
	})
	if err != nil {
		return err
	}
	if len(owner) > 0 && !bytes.Equal(owner, a.uid[:]) {
		return fmt.Errorf("got a message for %x", owner)
	}
	if flags&flagReportFullState != 0 {
		return a.send()
	}
	if data == nil {
		return nil // news from the gateway itself
	}
	number, sent, err := checkData(data, a.index)
	if err != nil {
		return err
	}
	if number&pushed != 0 {
		a.reached()
		return nil
	}
	if due := a.received + 1; number != due && (!a.load.lossy.Load() || number < due) {
		return fmt.Errorf("got reply %d, %d was due", number, due)
	}
	a.received = number
	a.load.latency.record(time.Now().UnixNano() - sent)
	a.load.replies.Add(1)
	if a.load.saturated.Load() {
		return a.send()
	}
	return nil
}

func (a *agent) reached() {
	if epoch := a.load.epoch.Load(); a.epoch != epoch {
		a.epoch = epoch
		a.load.reached.Add(1)
		a.load.lastReached.Store(time.Now().UnixNano())
	}
}

func (l *load) fail(what string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.failures) < 5 {
		l.failures = append(l.failures, what)
	}
}

func (l *load) failed() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.failures) == 0 {
		return ""
	}
	return "; " + strings.Join(l.failures, "; ")
}

// Start is a load to begin with.
type Start struct {
	Size int
	Rate int // messages per second, of all agents; 0 for as many as possible
	Skip int // of the agents, so many stay silent
}

// Start begins a load.
func (l *load) Start(args Start, _ *struct{}) error {
	l.size.Store(int64(args.Size))
	agents := l.agents[args.Skip:]
	if args.Rate == 0 {
		l.saturated.Store(true)
		for _, a := range agents {
			if err := a.send(); err != nil {
				return err
			}
		}
		return nil
	}
	stop := make(chan struct{})
	l.stopPacing = stop
	l.pacing.Go(func() { l.pace(agents, args.Rate, stop) })
	return nil
}

// pace has the agents speak in turn, until stop is closed.
func (l *load) pace(agents []*agent, rate int, stop <-chan struct{}) {
	start := time.Now()
	for n := 0; ; n++ {
		due := start.Add(time.Duration(n) * time.Second / time.Duration(rate))
		if wait := time.Until(due); wait > 0 {
			time.Sleep(wait)
		}
		select {
		case <-stop:
			return
		default:
		}
		if err := agents[n%len(agents)].send(); err != nil {
			l.fail(err.Error())
			return
		}
	}
}

// Stop ends the load and waits until all that was said is answered.
func (l *load) Stop(struct{}, *struct{}) error {
	l.saturated.Store(false)
	if l.stopPacing != nil {
		close(l.stopPacing)
		l.stopPacing = nil
	}
	l.pacing.Wait()
	return l.until(time.Now().Add(20*time.Second), func() string {
		if sent, replies := l.sent.Load(), l.replies.Load(); sent != replies {
			return fmt.Sprintf("%d messages were sent, %d answered", sent, replies)
		}
		return ""
	})
}

// LoadState is what the agents have seen so far.
type LoadState struct {
	Replies     uint64
	Latency     histogram
	Closed      int64
	Reached     int64
	LastReached time.Time
	Failures    []string
}

// State says it.
func (l *load) State(_ struct{}, reply *LoadState) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	*reply = LoadState{l.replies.Load(), l.latency.copy(), l.closed.Load(), l.reached.Load(), time.Unix(0, l.lastReached.Load()), l.failures}
	return nil
}

// Stall has the first agent read no more, after what comes next.
func (l *load) Stall(struct{}, *struct{}) error {
	l.agents[0].stalled.Store(true)
	return nil
}

// AwaitPushes counts anew which agents a push has reached; from now on, connections may be lost.
func (l *load) AwaitPushes(struct{}, *struct{}) error {
	l.lossy.Store(true)
	l.reached.Store(0)
	l.epoch.Add(1)
	return nil
}

// Disconnect ends all connections without a goodbye, as the end of many processes does.
func (l *load) Disconnect(struct{}, *struct{}) error {
	for _, a := range l.agents {
		a.leaving.Store(true)
	}
	for _, a := range l.agents {
		a.conn.Close()
	}
	l.agents = nil
	return nil
}
