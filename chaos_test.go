package opampgateway

import (
	"fmt"
	"math/rand/v2"
	"net/http"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/opampgateway/opampgateway/internal/gatewaytest"
)

// TestChaos has everything happen at once, in an order that nobody chose: links and agents are
// lost in all ways there are, the server restarts, agents stall and come back. In the end all
// agents are reachable, nothing came out of order or to somebody else, and nothing is left over.
func TestChaos(t *testing.T) {
	for seed := range uint64(8) {
		t.Run(fmt.Sprint("seed ", seed), func(t *testing.T) {
			play(t, func(t *testing.T, s *stage) {
				c := &chaos{stage: s, t: t, rand: rand.New(rand.NewPCG(seed, 0)), lives: map[string]int{}, said: map[string]int{}, stalled: map[*gatewaytest.Link]bool{}}
				for i := range 20 {
					c.agents = append(c.agents, c.born(fmt.Sprint("agent ", i)))
				}
				for range 150 {
					c.something()
					time.Sleep(time.Duration(c.rand.Int64N(int64(3 * time.Second))))
				}
				c.calm()
			})
		})
	}
}

type chaos struct {
	*stage
	t      *testing.T
	rand   *rand.Rand
	agents []*gatewaytest.Agent
	lives  map[string]int // how often each has connected
	said   map[string]int // in this life

	stalled map[*gatewaytest.Link]bool
}

// born has an agent connect, as often as it takes.
func (c *chaos) born(name string) *gatewaytest.Agent {
	for {
		a, _, err := c.door.Knock(c.t, name)
		if err == nil {
			c.lives[name]++
			c.said[name] = 0
			return a
		}
		time.Sleep(time.Second)
	}
}

// says has an agent say something, unless it would have to wait.
func (c *chaos) says(i int) {
	a := c.agents[i]
	if ended, _, _ := a.Ended(); ended {
		a = c.born(a.Name)
		c.agents[i] = a
	}
	c.said[a.Name]++
	frame := gatewaytest.Report(a.UID, 1_000_000*c.lives[a.Name]+c.said[a.Name], c.rand.IntN(2000))
	done := make(chan struct{})
	go func() { // waits for as long as the gateway does not read
		a.Send(frame)
		close(done)
	}()
	select {
	case <-done:
	case <-time.After(30 * time.Second):
		a.Reset()
		<-done
	}
}

// something happens.
func (c *chaos) something() {
	for range 10 {
		c.says(c.rand.IntN(len(c.agents)))
	}
	links := c.server.Links()
	for _, link := range links {
		i := c.rand.IntN(len(c.agents))
		go link.Push(gatewaytest.Offer(c.agents[i].UID, "x", c.rand.IntN(10_000)))
	}
	i := c.rand.IntN(len(c.agents))
	switch what := c.rand.IntN(20); {
	case what < 6:
		if len(links) == 0 {
			return
		}
		link := links[c.rand.IntN(len(links))]
		[]func(){
			link.Reset, link.HangUp, func() { go link.Close(1001) },
			func() { link.BlackHole(); time.AfterFunc(time.Minute, link.HangUp) }, // the server notices long after the gateway
			func() { c.stall(link, 5*time.Second) }, func() { c.stall(link, time.Minute) },
		}[what]()
	case what == 6:
		c.server.Stop()
		time.Sleep(time.Duration(c.rand.Int64N(int64(20 * time.Second))))
		c.server.Start()
	case what < 10:
		a := c.agents[i]
		[]func(){a.Vanish, a.Reset, a.BlackHole}[what-7]()
		c.agents[i] = c.born(a.Name)
	case what == 10:
		c.agents[i].StopReading()
		time.AfterFunc(20*time.Second, c.agents[i].ReadOn)
	case what == 11:
		leaving := c.agents[i]
		go func() {
			leaving.Send(gatewaytest.Goodbye(leaving.UID))
			leaving.Vanish()
		}()
		c.agents[i] = c.born(leaving.Name)
	case what == 12:
		c.server.OnConnect((*gatewaytest.Question).Silence)
		time.AfterFunc(25*time.Second, func() { c.server.OnConnect(nil) })
	case what == 13:
		c.server.OnConnect(func(q *gatewaytest.Question) { q.Refuse(http.StatusServiceUnavailable) })
		time.AfterFunc(25*time.Second, func() { c.server.OnConnect(nil) })
	case what == 14:
		c.server.OnUpgrade(func(*http.Request) *gatewaytest.Refusal {
			return &gatewaytest.Refusal{Status: http.StatusServiceUnavailable, Header: http.Header{"Retry-After": {"7"}}}
		})
		time.AfterFunc(15*time.Second, func() { c.server.OnUpgrade(nil) })
	case what == 15:
		if clone, _, err := c.door.Knock(c.t, c.agents[i].Name); err == nil {
			clone.Send(gatewaytest.Status(clone.UID, 0))
			time.AfterFunc(10*time.Second, clone.Vanish)
		}
	}
}

// stall has the server not read from a link for a while. What the network holds of it may then
// be read when the gateway has long given the link up.
func (c *chaos) stall(link *gatewaytest.Link, d time.Duration) {
	c.stalled[link] = true
	link.StopReading()
	time.AfterFunc(d, link.ReadOn)
}

// calm waits until everything is in order again, and checks that it is.
func (c *chaos) calm() {
	t := c.t
	for _, link := range c.server.Links() {
		link.ReadOn()
	}
	time.Sleep(3 * time.Minute)
	c.server.WantLinks(3)
	for i, a := range c.agents {
		if ended, _, _ := a.Ended(); ended {
			c.agents[i] = c.born(a.Name)
		}
		a = c.agents[i]
		a.ReadOn()
		c.says(i)
	}
	synctest.Wait()
	c.wantReachable(c.agents...)
	c.wantConsistent()
	for _, a := range c.agents {
		// On each link nothing is missing or out of order, and no link has what came before
		// that on the link before it. Messages may be lost or come twice when the link changes.
		type place struct {
			life int
			link *gatewaytest.Link
		}
		first, last, latest := map[place]int{}, map[place]int{}, map[int]int{}
		for _, r := range c.server.Received(a.UID) {
			sequence := int(r.Message.GetSequenceNum())
			if sequence == 0 {
				continue // a goodbye
			}
			life, n := sequence/1_000_000, sequence%1_000_000
			at := place{life, r.Link}
			if _, known := first[at]; known {
				require.Equal(t, last[at]+1, n, "%s, life %d: lost or out of order on one link", a.Name, life)
			} else {
				first[at] = n
				if !c.stalled[r.Link] {
					require.Greater(t, n, latest[life], "%s, life %d: out of order from link to link", a.Name, life)
					latest[life] = n
				}
			}
			last[at] = n
		}
		for at, n := range last {
			latest[at.life] = max(latest[at.life], n)
		}
		require.Equal(t, c.said[a.Name], latest[c.lives[a.Name]], "%s: its last words", a.Name)
	}
	for _, reason := range []string{"bad_frame", "bad_uid", "too_many_uids", "foreign_connect", "server_bad_frame", "server_no_uid"} {
		require.Zero(t, c.counted("faults", reason), reason)
	}
}
