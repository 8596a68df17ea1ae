// Package status is the page on which an operator sees what a gateway does, and the same as JSON for scripts. It is
// told what it shows by a Source; it counts nothing itself while nobody looks, but for the few numbers of a History,
// and what is kept in a Recent or in Offenders, all of which are bounded.
//
// GET /api/v1/status returns a Snapshot, GET /api/v1/agents some of the agents, see Query. What these say is stable:
// within v1 keys are added, and neither removed nor given another meaning. Nothing there is a header's value, but for
// the user agent and the Agent-ID of agents; no payload; and no URL with what may be secret of one.
package status

import (
	"time"

	"github.com/opampgateway/opampgateway/internal/wire"
)

// Source is the gateway that is shown. Its methods are called by one goroutine at a time.
type Source interface {
	// Status returns all but the agents.
	Status() *Snapshot
	// Agents appends all agents to rows. That whose connection speaks for the UID, if it is not the zero one, is marked
	// as Holds.
	Agents(rows []Row, uid wire.UID) []Row
}

// Snapshot is the answer of /api/v1/status.
type Snapshot struct {
	Time       time.Time  `json:"time"` // of the gateway's host; all others are to be compared to it
	Gateway    Gateway    `json:"gateway"`
	Problems   []string   `json:"problems"` // what is wrong now, in words, the worst first
	Links      []Link     `json:"links"`
	Rates      Rates      `json:"rates"`
	Memory     Memory     `json:"memory"`
	Offenders  []Offender `json:"offenders"` // the latest first
	Suspects   []Suspect  `json:"suspects"`  // the latest first, MaxSuspects at most
	Ended      []Ended    `json:"ended"`     // the latest first
	Faults     []Count    `json:"faults"`    // since the gateway started; all reasons
	Admissions []Count    `json:"admissions"`
}

// State is how a gateway is, or a link.
type State string

// The states. Of a gateway, StateOK has all links, StateDegraded some, StateDown none.
const (
	StateOK         State = "ok"
	StateDegraded   State = "degraded"
	StateDown       State = "down"
	StateConnected  State = "connected"  // a link that is live
	StateConnecting State = "connecting" // a link that is being dialed, or will be
	StateLeaving    State = "leaving"    // a link that ends since there is another server
)

// Gateway is what is told of the gateway as a whole.
type Gateway struct {
	State         State     `json:"state"`
	Name          string    `json:"name"` // comes first in the names of links
	Version       string    `json:"version"`
	Collector     string    `json:"collector"`
	Server        string    `json:"server"`   // its address, without what may be secret
	Listener      string    `json:"listener"` // where agents connect
	Admission     string    `json:"agent_admission"`
	Started       time.Time `json:"started"`
	Agents        int       `json:"agents"`   // connections, those of gateways included
	Gateways      int       `json:"gateways"` // connections of other gateways
	InstanceUIDs  int       `json:"instance_uids"`
	LinksUp       int       `json:"links_up"`
	LinksExpected int       `json:"links_expected"`
}

// Link is one place of a link to the server.
type Link struct {
	Slot          int        `json:"slot"`
	Name          string     `json:"name"`
	State         State      `json:"state"`
	Since         time.Time  `json:"since"` // of the state
	Agents        int        `json:"agents"`
	Rate          Rate       `json:"rate"`
	PingSeconds   *float64   `json:"ping_seconds"` // of the last that was answered; null for none
	OnItsWay      int        `json:"on_its_way"`   // messages that the server has not acknowledged
	OnItsWayBytes int        `json:"on_its_way_bytes"`
	WaitingBytes  int        `json:"waiting_bytes"` // for their turn
	LastError     string     `json:"last_error"`    // empty for none
	LastErrorAt   *time.Time `json:"last_error_at"`
}

// Rate is what passes in a second, as of some seconds ago. Up is to the server.
type Rate struct {
	MessagesUp   float64 `json:"messages_up"`
	BytesUp      float64 `json:"bytes_up"`
	MessagesDown float64 `json:"messages_down"`
	BytesDown    float64 `json:"bytes_down"`
}

// Memory is what max_buffered_size bounds, in bytes.
type Memory struct {
	Limit    int64 `json:"limit"`   // of what may be in use: three quarters of max_buffered_size
	InUse    int64 `json:"in_use"`  // what follows, in all
	Reading  int64 `json:"reading"` // messages of agents that are being read
	Up       int64 `json:"up"`      // what waits for the server
	Down     int64 `json:"down"`    // what waits for agents
	Kept     int64 `json:"kept"`    // of each agent as long as it is connected
	Requests int64 `json:"requests"`
}

// Offender is somebody because of whom others could suffer, or whose identity is in doubt.
type Offender struct {
	Kind      Offence   `json:"kind"`
	UID       string    `json:"instance_uid"`
	Address   string    `json:"address"`
	UserAgent string    `json:"user_agent"`
	AgentID   string    `json:"agent_id"`
	Other     string    `json:"other,omitempty"` // the address of the other, of a UID in use twice
	Text      string    `json:"text"`
	First     time.Time `json:"first"`
	Last      time.Time `json:"last"`
	Times     int       `json:"times"`

	first, last int64
}

// Offence is what somebody is named for.
type Offence string

// The offences.
const (
	OffenceFloods      Offence = "floods"
	OffenceEndsLinks   Offence = "ends_links"
	OffenceUIDConflict Offence = "uid_conflict"
	OffenceUIDTaken    Offence = "uid_taken"
)

// MaxSuspects is how many suspects are shown: the latest.
const MaxSuspects = 100

// Suspect is an agent because of whose messages the server may have ended links. Where it is connected is empty if
// it is not.
type Suspect struct {
	State     Suspicion `json:"state"`
	UID       string    `json:"instance_uid"`
	Address   string    `json:"address"`
	UserAgent string    `json:"user_agent"`
	AgentID   string    `json:"agent_id"`
	Since     time.Time `json:"since"` // of the state
	Until     time.Time `json:"until"` // if no other link ends because of it
	Text      string    `json:"text"`
}

// Suspicion is what becomes of a suspect's messages.
type Suspicion string

// The suspicions.
const (
	SuspicionOnTrial    Suspicion = "on_trial"
	SuspicionTurnedDown Suspicion = "turned_down"
)

// Ended is a connection that has ended lately.
type Ended struct {
	Time      time.Time `json:"time"`
	Kind      Kind      `json:"kind"`
	Name      string    `json:"name"` // the instance UID of an agent, the name of a link
	Address   string    `json:"address"`
	UserAgent string    `json:"user_agent"`
	AgentID   string    `json:"agent_id"`
	Seconds   float64   `json:"seconds"` // for which it was there
	Why       string    `json:"why"`
	Reason    string    `json:"reason"` // as faults are counted; empty if it is no fault
	ByGateway bool      `json:"by_gateway"`
}

// Kind is what a connection is of.
type Kind string

// The kinds.
const (
	KindAgent   Kind = "agent"
	KindGateway Kind = "gateway" // another one, below this
	KindLink    Kind = "link"
)

// Count is how often something happened.
type Count struct {
	Name  string `json:"name"`
	What  string `json:"what"`
	Count int64  `json:"count"`
}

// Agent is one connection of an agent, or of another gateway.
type Agent struct {
	UID            string     `json:"instance_uid"` // of its last message; empty before the first
	Address        string     `json:"address"`
	UserAgent      string     `json:"user_agent"`
	AgentID        string     `json:"agent_id"`
	Gateway        bool       `json:"gateway"`
	InstanceUIDs   int        `json:"instance_uids"` // that it speaks for
	Link           string     `json:"link"`          // empty while it has none
	ConnectedSince time.Time  `json:"connected_since"`
	LastMessage    *time.Time `json:"last_message"`
	MessagesUp     uint64     `json:"messages_up"`
	BytesUp        uint64     `json:"bytes_up"`
	MessagesDown   uint64     `json:"messages_down"`
	BytesDown      uint64     `json:"bytes_down"`
	WaitingUp      int        `json:"waiting_up_bytes"`
	WaitingDown    int        `json:"waiting_down_bytes"`
	Faults         uint32     `json:"faults"`
	LastFault      string     `json:"last_fault"`
}

// Row is an Agent as a Source tells it. Times are of the monotonic clock, 0 for never.
type Row struct {
	UID                      wire.UID
	Address, UserAgent       string
	AgentID, Link, LastFault string
	Came, Heard              int64
	MessagesUp, BytesUp      uint64
	MessagesDown, BytesDown  uint64
	WaitingUp, WaitingDown   int
	InstanceUIDs             int
	Faults                   uint32
	Gateway                  bool
	Holds                    bool // its connection speaks for the UID that is searched
}
