package status

import (
	"cmp"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/opampgateway/opampgateway/internal/wire"
)

const (
	// defaultPer is how many agents a page has, maxPer how many it has at most.
	defaultPer, maxPer = 50, 1000
	// maxSearch is the longest text that is searched.
	maxSearch = 256
	// defaultSort has those on top with whom something is wrong.
	defaultSort = "faults"
)

// Query says which agents are to be told: those in whose UID, address, user agent, Agent-ID or link a text is found,
// whatever its case, and the connection that speaks for a UID; in what order; and which page of them, from 1 on.
type Query struct {
	Search string
	Sort   string // one of columns
	Desc   bool
	Page   int
	Per    int
}

// Agents is the answer of /api/v1/agents.
type Agents struct {
	Time     time.Time `json:"time"`
	Search   string    `json:"q"`
	Sort     string    `json:"sort"`
	Desc     bool      `json:"desc"`
	Page     int       `json:"page"` // the last, if there are fewer than were asked for
	Per      int       `json:"per"`
	Pages    int       `json:"pages"`
	Total    int       `json:"total"`    // agents connected
	Matching int       `json:"matching"` // of them, those that are searched
	Agents   []Agent   `json:"agents"`
}

// columns are what can be sorted by.
var columns = map[string]func(a, b *Row) int{
	"instance_uid":    func(a, b *Row) int { return a.UID.Compare(&b.UID) },
	"address":         func(a, b *Row) int { return strings.Compare(a.Address, b.Address) },
	"user_agent":      func(a, b *Row) int { return strings.Compare(a.UserAgent, b.UserAgent) },
	"agent_id":        func(a, b *Row) int { return strings.Compare(a.AgentID, b.AgentID) },
	"link":            func(a, b *Row) int { return strings.Compare(a.Link, b.Link) },
	"connected_since": func(a, b *Row) int { return cmp.Compare(a.Came, b.Came) },
	"last_message":    func(a, b *Row) int { return cmp.Compare(a.Heard, b.Heard) },
	"messages_up":     func(a, b *Row) int { return cmp.Compare(a.MessagesUp, b.MessagesUp) },
	"bytes_up":        func(a, b *Row) int { return cmp.Compare(a.BytesUp, b.BytesUp) },
	"messages_down":   func(a, b *Row) int { return cmp.Compare(a.MessagesDown, b.MessagesDown) },
	"bytes_down":      func(a, b *Row) int { return cmp.Compare(a.BytesDown, b.BytesDown) },
	"waiting":         func(a, b *Row) int { return cmp.Compare(a.WaitingUp+a.WaitingDown, b.WaitingUp+b.WaitingDown) },
	"faults":          func(a, b *Row) int { return cmp.Compare(a.Faults, b.Faults) },
}

// ParseQuery reads a Query. An error says which part of it is wrong.
func ParseQuery(values url.Values) (Query, error) {
	q := Query{Search: values.Get("q"), Sort: cmp.Or(values.Get("sort"), defaultSort), Desc: !values.Has("sort"), Page: 1, Per: defaultPer}
	if len(q.Search) > maxSearch {
		return q, fmt.Errorf("q: must have at most %d bytes", maxSearch)
	}
	if columns[q.Sort] == nil {
		return q, fmt.Errorf("sort: must be one of %s", strings.Join(slices.Sorted(maps.Keys(columns)), ", "))
	}
	if text := values.Get("desc"); text != "" {
		desc, err := strconv.ParseBool(text)
		if err != nil {
			return q, errors.New("desc: must be true or false")
		}
		q.Desc = desc
	}
	for name, number := range map[string]*int{"page": &q.Page, "per": &q.Per} {
		if text := values.Get(name); text != "" {
			n, err := strconv.Atoi(text)
			if err != nil || n < 1 {
				return q, fmt.Errorf("%s: must be a number from 1 on", name)
			}
			*number = n
		}
	}
	q.Per = min(q.Per, maxPer)
	return q, nil
}

// uid returns the UID that is searched, the zero one if it is none.
func (q *Query) uid() (uid wire.UID) {
	text := strings.TrimSpace(q.Search)
	if b, err := hex.DecodeString(strings.ReplaceAll(text, "-", "")); err == nil && len(b) == 16 {
		uid, _ = wire.ParseUID(b)
	} else if len(text) == 26 {
		uid, _ = wire.ParseUID([]byte(text))
	}
	return uid
}

// Select answers q from rows, whose order it changes.
func (q *Query) Select(rows []Row, c Clock) *Agents {
	search := strings.ToLower(strings.TrimSpace(q.Search))
	isHex := strings.Trim(search, "0123456789abcdef-") == ""
	found := make([]*Row, 0, len(rows))
	for i := range rows {
		if r := &rows[i]; search == "" || r.Holds || r.has(search, isHex) {
			found = append(found, r)
		}
	}
	pages := max(1, (len(found)+q.Per-1)/q.Per)
	page := min(q.Page, pages)
	begin, end := (page-1)*q.Per, min(page*q.Per, len(found))
	a := &Agents{
		Time: c.Now(), Search: q.Search, Sort: q.Sort, Desc: q.Desc, Page: page, Per: q.Per, Pages: pages,
		Total: len(rows), Matching: len(found), Agents: make([]Agent, 0, end-begin),
	}
	for _, r := range first(found, end, q.compare())[begin:] {
		a.Agents = append(a.Agents, r.agent(c))
	}
	return a
}

// compare returns the order of q, in which no two rows are equal: a page that is asked for again is the same.
func (q *Query) compare() func(a, b *Row) int {
	column, sign := columns[q.Sort], 1
	if q.Desc {
		sign = -1
	}
	return func(a, b *Row) int {
		if c := column(a, b); c != 0 {
			return sign * c
		}
		return cmp.Or(cmp.Compare(a.Came, b.Came), strings.Compare(a.Address, b.Address))
	}
}

// fewRows is how many rows can be put in order one by one.
const fewRows = 1000

// first returns the first n of rows in order. To find a page of thousands does not need all of them in order.
func first(rows []*Row, n int, compare func(a, b *Row) int) []*Row {
	if n > fewRows {
		slices.SortFunc(rows, compare)
		return rows[:n]
	}
	best := make([]*Row, 0, n+1)
	for _, r := range rows {
		if len(best) == n && (n == 0 || compare(best[n-1], r) <= 0) {
			continue
		}
		at, _ := slices.BinarySearchFunc(best, r, compare)
		best = slices.Insert(best, at, r)
		best = best[:min(len(best), n)]
	}
	return best
}

// has reports whether a text, in lower case, is found in r. In most UIDs it cannot be unless it is hexadecimal.
func (r *Row) has(text string, isHex bool) bool {
	return contains(r.UserAgent, text) || contains(r.AgentID, text) || contains(r.Address, text) || contains(r.Link, text) ||
		(isHex || r.UID.IsText()) && contains(UID(r.UID), text)
}

// contains reports whether sub, in lower case, is in s, whatever the case of its letters of ASCII.
func contains(s, sub string) bool {
	for i := 0; i+len(sub) <= len(s); i++ {
		j := 0
		for j < len(sub) && lower(s[i+j]) == sub[j] {
			j++
		}
		if j == len(sub) {
			return true
		}
	}
	return false
}

func lower(b byte) byte {
	if 'A' <= b && b <= 'Z' {
		return b + 'a' - 'A'
	}
	return b
}

func (r *Row) agent(c Clock) Agent {
	a := Agent{
		Address: r.Address, UserAgent: r.UserAgent, AgentID: r.AgentID, Gateway: r.Gateway, InstanceUIDs: r.InstanceUIDs, Link: r.Link,
		ConnectedSince: c.Time(r.Came), LastMessage: c.Maybe(r.Heard),
		MessagesUp: r.MessagesUp, BytesUp: r.BytesUp, MessagesDown: r.MessagesDown, BytesDown: r.BytesDown,
		WaitingUp: r.WaitingUp, WaitingDown: r.WaitingDown, Faults: r.Faults, LastFault: r.LastFault,
	}
	if r.UID != (wire.UID{}) {
		a.UID = r.UID.String()
	}
	return a
}
