package main

import (
	"bytes"
	"compress/gzip"
	"errors"
	"io"
	"math/rand/v2"
	"net/http"
	"strconv"
	"time"

	"github.com/google/uuid"
	"github.com/open-telemetry/opamp-go/protobufs"
	"google.golang.org/protobuf/proto"
)

const (
	// agentsPerPoller is how many agents there are for one that speaks over plain HTTP.
	agentsPerPoller = 10

	// pollTimeout is how long an agent waits for the answer to a poll.
	pollTimeout = 20 * time.Second

	// pollAgain is how soon it polls again when that has failed.
	pollAgain = 500 * time.Millisecond
)

// poller is what an agent over plain HTTP has instead of connections. What is a connection in the book is here the time
// from its first poll to its goodbye, since the agent does not know when a gateway forgets it; the server is asked about
// it anew then, as when a link was lost.
type poller struct {
	*agent
	client  *http.Client
	say     chan chan<- told // has the agent say something at once, and tell what
	leaving chan struct{}    // holds something when it is to say goodbye, and come back
	vanish  chan struct{}    // closed when it is to leave without a word

	// Owned by the agent's goroutine.
	epoch  *epoch
	number uint32 // of what it said last
	asked  bool   // for its full state

	// Guarded by agent.mu.
	answered time.Time // when its last poll was
	silent   time.Time // until when it does not poll
}

// told is what an agent said, of which connection, and its number.
type told struct {
	epoch  *epoch
	number uint32
}

func newPoller(a *agent) *poller {
	return &poller{
		agent: a, say: make(chan chan<- told), leaving: make(chan struct{}, 1), vanish: make(chan struct{}),
		client: &http.Client{Timeout: pollTimeout, Transport: &http.Transport{MaxIdleConnsPerHost: 1}},
	}
}

// live polls until the agent goes for good.
func (p *poller) live() {
	defer close(p.done)
	defer p.client.CloseIdleConnections()
	for away := false; !away; {
		var wanted chan<- told
		leaving := false
		select {
		case <-time.After(p.pause()):
		case wanted = <-p.say:
		case <-p.leaving:
			leaving = true
		case <-p.quit:
			leaving, away = true, true
		case <-p.vanish:
		}
		if p.hasVanished() {
			return
		}
		if p.epoch == nil {
			p.epoch, p.asked = p.book.open(p.actor, p.gateway), true
			p.book.letIn(p.epoch)
		}
		m := &protobufs.AgentToServer{}
		switch {
		case leaving:
			m.AgentDisconnect = &protobufs.AgentDisconnect{}
		case p.asked:
			m.AgentDescription, p.asked = p.description(), false
		}
		if leaving || wanted != nil || m.AgentDescription != nil || !p.isQuiet() { // a heartbeat otherwise
			said := p.book.say(p.epoch, someSize(rand.IntN), m.GetAgentDescription() != nil)
			p.number = said.number
			m.CustomMessage = &protobufs.CustomMessage{Capability: capability, Type: "up", Data: said.payload()}
		}
		if wanted != nil {
			wanted <- told{p.epoch, p.number}
		}
		if !p.poll(m) {
			return
		}
		if leaving {
			p.book.close(p.epoch, "said goodbye", true, true)
			p.epoch = nil
		}
	}
}

// pause draws the time until the next poll.
func (p *poller) pause() time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.asked {
		return time.Until(p.silent)
	}
	return max(time.Until(p.silent), rand.N(2*talkEvery))
}

// poll says m until somebody takes it, and hears the answer. It reports whether that is so before the agent vanishes.
func (p *poller) poll(m *protobufs.AgentToServer) bool {
	m.InstanceUid = p.uid[:]
	m.SequenceNum = uint64(p.number)
	m.Capabilities = uint64(protobufs.AgentCapabilities_AgentCapabilities_ReportsStatus)
	body, err := proto.Marshal(m)
	if err != nil {
		panic(err) // nothing in it can be wrong
	}
	for {
		again, err := p.post(body)
		if err == nil {
			p.mu.Lock()
			p.answered = time.Now()
			p.mu.Unlock()
			return true
		}
		stamped := m.GetCustomMessage() != nil
		if !errors.Is(err, errNotTaken) {
			p.book.count("polls without an answer")
			p.book.pollFailed(p.epoch, stamped)
		}
		select {
		case <-time.After(again):
		case <-p.vanish:
		}
		if p.hasVanished() {
			return false
		}
		if stamped {
			p.book.sayAgain(p.epoch)
		}
	}
}

// errNotTaken is that a gateway has answered that it does not relay this: it must not.
var errNotTaken = errors.New("answered that it was not taken")

// post sends a message once. An error comes with how long to wait before the next time.
func (p *poller) post(body []byte) (again time.Duration, err error) {
	var packed bytes.Buffer
	if p.id%2 == 0 {
		w := gzip.NewWriter(&packed)
		_, _ = w.Write(body) // to memory
		_ = w.Close()
		body = packed.Bytes()
	}
	r, err := http.NewRequest(http.MethodPost, "http://"+p.address+"/v1/opamp", bytes.NewReader(body))
	if err != nil {
		return pollAgain, err
	}
	r.GetBody = nil // it is the agent that says it again, and notes that
	r.Header.Set(actorHeader, p.epoch.name())
	r.Header.Set("Authorization", "Secret-Key soak")
	r.Header.Set("Content-Type", "application/x-protobuf")
	if packed.Len() > 0 {
		r.Header.Set("Content-Encoding", "gzip")
	}
	resp, err := p.client.Do(r)
	if err != nil {
		return pollAgain, err
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(resp.Body)
	switch {
	case err != nil:
		return pollAgain, err
	case resp.StatusCode == http.StatusServiceUnavailable:
		p.book.count("polls that were answered " + resp.Status)
		after, _ := strconv.Atoi(resp.Header.Get("Retry-After"))
		return max(pollAgain, min(lastDelay, time.Duration(after)*time.Second)), errNotTaken
	case resp.StatusCode != http.StatusOK:
		p.book.find("refused", p.epoch, time.Now(), "a poll of %s: %s: %.100s", p.epoch, resp.Status, answer)
		return lastDelay, errNotTaken
	}
	p.book.count("polls that were answered")
	var m protobufs.ServerToAgent
	if proto.Unmarshal(answer, &m) != nil {
		p.book.find("corrupted", p.epoch, time.Now(), "%s cannot read an answer of %d bytes", p.epoch, len(answer))
		return 0, nil
	}
	if id, wrong := uuid.FromBytes(m.GetInstanceUid()); wrong != nil || id != p.uid {
		p.book.find("misdelivered", p.epoch, time.Now(), "an answer for %x at %s", m.GetInstanceUid(), p.epoch)
	}
	p.book.take(p.epoch, &m)
	p.asked = p.asked || m.GetFlags()&uint64(protobufs.ServerToAgentFlags_ServerToAgentFlags_ReportFullState) != 0
	return 0, nil
}

// isConnected reports whether the agent's last poll was answered, and not long ago.
func (p *poller) isConnected() bool {
	const lately = 4 * time.Second
	p.mu.Lock()
	defer p.mu.Unlock()
	return time.Since(p.answered) < lately
}

// fallSilent has the agent not poll for a while, as one whose machine sleeps.
func (p *poller) fallSilent(d time.Duration) {
	p.book.fallSilent(p.actor, d)
	p.mu.Lock()
	defer p.mu.Unlock()
	p.silent = time.Now().Add(d)
}

func (p *poller) hasVanished() bool {
	select {
	case <-p.vanish:
		if p.epoch != nil {
			p.book.close(p.epoch, "left without a word", true, false)
		}
		return true
	default:
		return false
	}
}

// goodbye has the agent say goodbye, and come back.
func (p *poller) goodbye() bool {
	select {
	case p.leaving <- struct{}{}:
		return true
	default:
		return false
	}
}

// sayNow is that of agent.
func (p *poller) sayNow(within time.Duration) (*epoch, uint32, error) {
	said := make(chan told, 1)
	select {
	case p.say <- said:
		s := <-said
		return s.epoch, s.number, nil
	case <-p.done:
	case <-time.After(within):
	}
	return nil, 0, errNotSaid
}
