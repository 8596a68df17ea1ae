package main

import (
	"errors"
	"fmt"
	"net"
	"net/url"
	"time"
)

// sizing is a gateway that somebody else runs, to be measured by itself.
type sizing struct {
	url, listen string
	agents      int
	pid         int // 0: not on this machine, or of no interest
}

const nameTarget = "target"

// size measures a gateway of the user's own. Its server has to be the one that is started here.
func (b *bench) size(out string, t sizing) error {
	b.scenarios = []*scenario{
		{name: "idle", about: fmt.Sprintf("%d agents that say nothing", t.agents)},
		{name: "paced", about: fmt.Sprintf("%d agents, 1,000 messages of 200 bytes a second, and their replies", t.agents)},
		{name: "saturated", about: fmt.Sprintf("%d agents, each says 200 bytes and gets 200 back, again and again", t.agents)},
		{name: "sizing", about: "what follows for agents that send a heartbeat every 30 s, and nothing else"},
	}
	var err error
	if t.url, err = withPort(t.url); err != nil {
		return err
	}
	st := &stage{subject: &subject{name: nameTarget}, running: &running{url: t.url, pid: t.pid}}
	b.subjects = []*subject{st.subject}
	defer st.close()
	if err := b.sizeOn(st, t); err != nil {
		return err
	}
	return b.report(out)
}

// withPort adds the usual port to a WebSocket's URL that has none.
func withPort(target string) (string, error) {
	u, err := url.Parse(target)
	if err != nil {
		return "", fmt.Errorf("-target: %w", err)
	}
	port, known := map[string]string{"ws": "80", "wss": "443"}[u.Scheme]
	if !known || u.Hostname() == "" {
		return "", fmt.Errorf("-target: %q is no ws:// or wss:// URL", target)
	}
	if u.Port() == "" {
		u.Host = net.JoinHostPort(u.Hostname(), port)
	}
	return u.String(), nil
}

func (b *bench) sizeOn(st *stage, t sizing) error {
	address, err := st.startServer(b, t.listen)
	if err != nil {
		return err
	}
	progress("The bench's server listens at %s: it has to be the server::endpoint of the gateway at %s.", agentURL(false, address.Plain), t.url)
	progress("Waiting up to 5 minutes for links of that gateway. The bench's server lets every agent in.")
	err = wait(5*time.Minute, func() error {
		state, err := st.serverState()
		if err == nil && state.Conns == 0 {
			err = errors.New("no gateway has connected to the bench's server")
		}
		return errors.Join(err, listens(t.url))
	})
	if err != nil {
		return err
	}
	if err := st.startLoad(b, ""); err != nil {
		return err
	}
	b.results.calibrate("idle")
	perAgent, err := b.sizeIdle(st, t)
	if err != nil {
		return err
	}
	b.results.calibrate("idle")
	for _, load := range []struct {
		scenario string
		rate     int
	}{{"paced", 1000}, {"saturated", 0}} {
		progress("%s", load.scenario)
		b.results.calibrate(load.scenario)
		if err := b.measure(load.scenario, st, traffic{agents: t.agents, size: 200, rate: load.rate}); err != nil {
			return err
		}
		b.results.calibrate(load.scenario)
	}
	if t.pid != 0 {
		cpu := b.results.of("paced", perRoundTrip, nameTarget)[0]
		b.results.add("sizing", "agents per core", "agents", nameTarget, 30*1e6/cpu)
		if perAgent > 0 { // a few agents may fit into what was there already
			b.results.add("sizing", "agents per GiB", "agents", nameTarget, (1<<20)/perAgent)
		}
	}
	return nil
}

// sizeIdle connects the agents, and returns the memory that each takes, in KiB.
func (b *bench) sizeIdle(st *stage, t sizing) (perAgent float64, err error) {
	var empty, full float64
	if t.pid != 0 {
		if empty, err = resident(t.pid); err != nil {
			return 0, err
		}
	}
	progress("%d agents connect", t.agents)
	if err := st.connect(t.agents, 200, true); err != nil {
		return 0, err
	}
	if t.pid == 0 {
		return 0, nil
	}
	time.Sleep(b.settle)
	if full, err = resident(t.pid); err != nil {
		return 0, err
	}
	perAgent = (full - empty) / 1024 / float64(t.agents)
	b.results.add("idle", "without agents", "MiB", nameTarget, empty/(1<<20))
	b.results.add("idle", "per agent", "KiB", nameTarget, perAgent)
	return perAgent, nil
}
