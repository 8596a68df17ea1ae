package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"time"
)

// subject is a thing under test: what stands between agents and server.
type subject struct {
	name  string
	links int // connections that it keeps to the server; 0: one per agent
	// files is how many files it has open per agent.
	files int
	start func(b *bench, tls bool, server ServerAddress) (*running, error)
}

const (
	nameGateway = "gateway"
	nameHAProxy = "haproxy"
	nameNaive   = "naive"
	nameDirect  = "direct"
	nameBefore  = "before"
)

var subjects = []*subject{
	{nameGateway, 3, 1, func(b *bench, tls bool, server ServerAddress) (*running, error) {
		return startGateway(b, nameGateway, b.gateway, tls, server)
	}},
	{nameHAProxy, 0, 2, startHAProxy},
	{nameNaive, naiveLinks, 1, startNaive},
	{nameDirect, 0, 1, startDirect},
}

// before is another build of the collector, to compare with in the same run.
func before(program string) *subject {
	return &subject{nameBefore, 3, 1, func(b *bench, tls bool, server ServerAddress) (*running, error) {
		return startGateway(b, nameBefore, program, tls, server)
	}}
}

// running is a subject that runs.
type running struct {
	url     string
	pid     int      // whose CPU time and memory count; 0: nobody's
	process *process // nil: it is not ours, or there is nothing but the server
}

func runs(url string, p *process) *running { return &running{url, p.pid(), p} }

func agentURL(tls bool, address string) string {
	if tls {
		return "wss://" + address + "/v1/opamp"
	}
	return "ws://" + address + "/v1/opamp"
}

func startDirect(_ *bench, tls bool, server ServerAddress) (*running, error) {
	if tls {
		return &running{url: agentURL(tls, server.TLS)}, nil
	}
	return &running{url: agentURL(tls, server.Plain)}, nil
}

// startGateway runs the collector as a user would, its own metrics included. They are on a port
// that is free instead of the usual one.
func startGateway(b *bench, name, program string, tls bool, server ServerAddress) (*running, error) {
	address, metrics := freeAddress(), freeAddress()
	_, port, _ := net.SplitHostPort(metrics)
	metricsPort, _ := strconv.Atoi(port)
	type m = map[string]any
	listener := m{"endpoint": address}
	if tls {
		listener["tls"] = m{"cert_file": b.certFile(), "key_file": b.keyFile()}
	}
	upstream := m{"endpoint": agentURL(false, server.Plain)}
	if b.admission != "" {
		upstream["agent_admission"] = b.admission
	}
	config, err := json.Marshal(m{ // JSON is YAML
		"extensions": m{"opampgateway": m{
			"server":   upstream,
			"listener": listener,
		}},
		"receivers": m{"otlp": m{"protocols": m{"grpc": m{"endpoint": "127.0.0.1:0"}}}},
		"exporters": m{"nop": nil},
		"service": m{
			"extensions": []string{"opampgateway"},
			"pipelines":  m{"logs": m{"receivers": []string{"otlp"}, "exporters": []string{"nop"}}},
			"telemetry": m{"metrics": m{"readers": []any{
				m{"pull": m{"exporter": m{"prometheus": m{"host": "127.0.0.1", "port": metricsPort}}}},
			}}},
		},
	})
	if err != nil {
		return nil, err
	}
	file := filepath.Join(b.work, name+".yaml")
	if err := os.WriteFile(file, config, 0o600); err != nil {
		return nil, err
	}
	p, err := startProcess(name, exec.Command(program, "--config", file), b.logFile(name))
	if err != nil {
		return nil, err
	}
	return runs(agentURL(tls, address), p), nil
}

const haproxyConfig = `global
  maxconn %d
defaults
  mode http
  timeout connect 5s
  timeout client 1m
  timeout server 1m
  timeout tunnel 1h
frontend agents
  bind %s %s
  default_backend opamp
backend opamp
  server opamp %s
`

// haproxyProgram is where Debian puts it, which is on the PATH of root only, or on the PATH.
func haproxyProgram() (string, error) {
	if program, err := exec.LookPath("/usr/sbin/haproxy"); err == nil {
		return program, nil
	}
	return exec.LookPath("haproxy")
}

// startHAProxy runs it with as many threads as it likes, which is one per core.
func startHAProxy(b *bench, tls bool, server ServerAddress) (*running, error) {
	program, err := haproxyProgram()
	if err != nil {
		return nil, errors.New("haproxy is not installed: apt-get install haproxy, or choose other -subjects")
	}
	address, withTLS := freeAddress(), ""
	if tls {
		withTLS = "ssl crt " + b.pemFile()
	}
	config := fmt.Sprintf(haproxyConfig, maxFiles()/2-100, address, withTLS, server.Plain)
	file := filepath.Join(b.work, "haproxy.cfg")
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		return nil, err
	}
	p, err := startProcess(nameHAProxy, exec.Command(program, "-db", "-f", file), b.logFile(nameHAProxy))
	if err != nil {
		return nil, err
	}
	return runs(agentURL(tls, address), p), nil
}

func startNaive(b *bench, tls bool, server ServerAddress) (*running, error) {
	r, err := startRole(nameNaive, b.logFile(nameNaive))
	if err != nil {
		return nil, err
	}
	cfg := NaiveConfig{Server: agentURL(false, server.Plain), Listen: freeAddress()}
	if tls {
		cfg.CertFile, cfg.KeyFile = b.certFile(), b.keyFile()
	}
	if err := r.call("Run", cfg, nil); err != nil {
		r.kill()
		return nil, err
	}
	return runs(agentURL(tls, cfg.Listen), r.process), nil
}

// freeAddress is an address that nobody listens on. Somebody else may take it before it is used,
// which then shows as a program that does not start.
func freeAddress() string {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		panic(err) // nothing of this can work
	}
	defer listener.Close()
	return listener.Addr().String()
}

// stage is one measurement: a subject with agents before it and a server behind it, all of them
// fresh processes.
type stage struct {
	*subject
	*running
	server, load *role
}

func (b *bench) stage(s *subject, tls bool) (*stage, error) {
	st := &stage{subject: s}
	if err := st.open(b, tls); err != nil {
		st.close()
		return nil, err
	}
	return st, nil
}

func (st *stage) open(b *bench, tls bool) error {
	address, err := st.startServer(b, "127.0.0.1:0")
	if err != nil {
		return err
	}
	if st.running, err = st.start(b, tls, address); err != nil {
		return err
	}
	if err := st.ready(); err != nil {
		return err
	}
	return st.startLoad(b, b.certFile())
}

func (st *stage) startServer(b *bench, listen string) (address ServerAddress, err error) {
	if st.server, err = startRole("server", b.logFile("server")); err != nil {
		return address, err
	}
	err = st.server.call("Listen", ServerListen{listen, b.certFile(), b.keyFile()}, &address)
	return address, err
}

// startLoad starts the agents' process. They trust the certificate in a file; any, if none is named.
func (st *stage) startLoad(b *bench, certFile string) (err error) {
	if st.load, err = startRole("load", b.logFile("load")); err != nil {
		return err
	}
	return st.load.call("Target", Target{st.url, certFile}, nil)
}

// ready waits until the subject has its links, and listens.
func (st *stage) ready() error {
	return wait(30*time.Second, func() error {
		if st.process != nil && st.process.ended() {
			return fmt.Errorf("%s has ended: %s", st.name, st.process.tail())
		}
		state, err := st.serverState()
		if err != nil || state.Conns < st.links {
			return errors.Join(err, fmt.Errorf("%s has %d links", st.name, state.Conns))
		}
		return listens(st.url)
	})
}

func (st *stage) close() {
	if st.load != nil {
		st.load.kill()
	}
	if st.running != nil && st.process != nil {
		st.process.kill()
	}
	if st.server != nil {
		st.server.kill()
	}
}

func (st *stage) serverState() (state ServerState, err error) {
	err = st.server.call("State", nil, &state)
	return state, err
}

// loadState fails when agents have found something wrong.
func (st *stage) loadState() (state LoadState, err error) {
	if err := st.load.call("State", nil, &state); err != nil {
		return state, err
	}
	if len(state.Failures) > 0 {
		return state, fmt.Errorf("agents were served wrongly: %q", state.Failures)
	}
	if state.Closed > 0 {
		return state, fmt.Errorf("%d agents were disconnected", state.Closed)
	}
	return state, nil
}

// cpu is the CPU time of the subject; 0 where there is none.
func (st *stage) cpu() (time.Duration, error) {
	if st.pid == 0 {
		return 0, nil
	}
	return cpuTime(st.pid)
}

// quiet waits until the subject has nothing more to do, and returns its CPU time.
func (st *stage) quiet() (time.Duration, error) {
	before, err := st.cpu()
	for range 100 { // 20 s
		if err != nil {
			return 0, err
		}
		time.Sleep(200 * time.Millisecond)
		var now time.Duration
		if now, err = st.cpu(); err == nil && now-before < 2*time.Millisecond {
			return now, nil
		}
		before = now
	}
	return before, err
}

func (st *stage) connect(agents, atOnce int, greeting bool) error {
	return st.load.call("Connect", Connect{agents, atOnce, 2 * time.Minute, greeting}, nil)
}
