package status_test

import (
	"fmt"
	"math/rand/v2"
	"net/url"
	"slices"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/opampgateway/opampgateway/internal/monotonic"
	"github.com/opampgateway/opampgateway/internal/status"
	"github.com/opampgateway/opampgateway/internal/wire"
)

// uidOf is the UID of the nth agent.
func uidOf(n int) wire.UID {
	uid, _ := wire.ParseUID(fmt.Appendf(nil, "%016d", n)) // it has 16 bytes
	return uid
}

// rowsOf are so many agents, which differ in all that can be sorted by.
func rowsOf(n int) []status.Row {
	random := rand.New(rand.NewPCG(1, 2))
	rows := make([]status.Row, n)
	now := monotonic.Now()
	for i := range rows {
		rows[i] = status.Row{
			UID: uidOf(i), Address: fmt.Sprintf("192.0.2.%d:%d", i%250, 1000+i), UserAgent: fmt.Sprintf("agent/1.%d", i%7), AgentID: fmt.Sprintf("ID-%d", n-i),
			Link: fmt.Sprintf("gateway/upstream-%d", i%3), Came: now - int64(i)*1e9, Heard: now - random.Int64N(1e12),
			MessagesUp: random.Uint64N(1e6), BytesUp: random.Uint64N(1e9), MessagesDown: random.Uint64N(1e6), BytesDown: random.Uint64N(1e9),
			WaitingUp: random.IntN(1000), WaitingDown: random.IntN(1000), InstanceUIDs: 1,
		}
	}
	random.Shuffle(n, func(i, j int) { rows[i], rows[j] = rows[j], rows[i] })
	return rows
}

func parse(t *testing.T, text string) status.Query {
	t.Helper()
	values, err := url.ParseQuery(text)
	require.NoError(t, err)
	q, err := status.ParseQuery(values)
	require.NoError(t, err)
	return q
}

func TestQueriesThatAreNone(t *testing.T) {
	for text, want := range map[string]string{
		"sort=secret": "sort: must be one of address, agent_id, bytes_down, bytes_up, ",
		"desc=down":   "desc: must be true or false",
		"page=0":      "page: must be a number from 1 on",
		"page=-1":     "page: must be a number from 1 on",
		"page=first":  "page: must be a number from 1 on",
		"per=0":       "per: must be a number from 1 on",
		"per=1e3":     "per: must be a number from 1 on",
		"q=" + long:   "q: must have at most 256 bytes",
	} {
		values, err := url.ParseQuery(text)
		require.NoError(t, err)
		_, err = status.ParseQuery(values)
		require.ErrorContains(t, err, want, text)
	}
	require.Equal(t, status.Query{Sort: "faults", Desc: true, Page: 1, Per: 50}, parse(t, ""))
	require.Equal(t, status.Query{Search: "x", Sort: "address", Page: 7, Per: 1000}, parse(t, "q=x&sort=address&page=7&per=100000"))
}

var long = string(slices.Repeat([]byte{'x'}, 257))

// Whatever page is asked for, all pages together are all agents, each once and in order.
func TestPages(t *testing.T) {
	for _, column := range []string{
		"instance_uid", "address", "user_agent", "agent_id", "link", "connected_since", "last_message",
		"messages_up", "bytes_up", "messages_down", "bytes_down", "waiting", "faults",
	} {
		for _, desc := range []bool{false, true} {
			var paged []string
			for page := 1; ; page++ {
				q := status.Query{Sort: column, Desc: desc, Page: page, Per: 30}
				answer := q.Select(rowsOf(100), status.NewClock())
				require.Equal(t, 100, answer.Total)
				require.Equal(t, 4, answer.Pages)
				if answer.Page != page { // there is no such page
					require.Equal(t, 5, page)
					break
				}
				for _, a := range answer.Agents {
					paged = append(paged, a.UID)
				}
			}
			whole := status.Query{Sort: column, Desc: desc, Page: 1, Per: 100}
			var once []string
			for _, a := range whole.Select(rowsOf(100), status.NewClock()).Agents {
				once = append(once, a.UID)
			}
			require.Equal(t, once, paged, column)
			require.Len(t, slices.Compact(slices.Sorted(slices.Values(paged))), 100, column)
		}
	}
	q := parse(t, "sort=bytes_up&desc=true&per=1000")
	answer := q.Select(rowsOf(3000), status.NewClock())
	require.True(t, slices.IsSortedFunc(answer.Agents, func(a, b status.Agent) int { return -compare(a.BytesUp, b.BytesUp) }))
	q = parse(t, "sort=bytes_up&page=3&per=1000") // more than can be put in order one by one
	last := q.Select(rowsOf(3000), status.NewClock())
	require.Equal(t, answer.Agents[0].UID, last.Agents[999].UID)
}

func compare(a, b uint64) int {
	if a < b {
		return -1
	}
	return int(min(1, a-b))
}

func TestSearch(t *testing.T) {
	for text, want := range map[string]int{
		"":                     100,
		"192.0.2.17:":          1,
		"AGENT/1.3":            14,
		"id-7":                 11, // and 70 to 79
		"upstream-1":           33,
		uidOf(42).String():     1,
		uidOf(42).String()[9:]: 1,
		"nobody":               0,
		"\tid-100\t":           1,
	} {
		q := status.Query{Search: text, Sort: "address", Page: 1, Per: 1000}
		answer := q.Select(rowsOf(100), status.NewClock())
		require.Len(t, answer.Agents, want, text)
		require.Equal(t, want, answer.Matching, text)
		require.Equal(t, 100, answer.Total)
	}
	rows := rowsOf(3)
	rows[1].Holds = true // a gateway, with an agent behind it of the UID that is searched
	q := status.Query{Search: uidOf(4711).String(), Sort: "address", Page: 1, Per: 10}
	require.Equal(t, 1, q.Select(rows, status.NewClock()).Matching)
}

func BenchmarkSelect(b *testing.B) {
	rows := rowsOf(15_000)
	for _, text := range []string{"", "sort=bytes_up&desc=true", "sort=instance_uid", "q=id-77", "sort=address&page=200"} {
		b.Run(text, func(b *testing.B) {
			values, _ := url.ParseQuery(text)
			q, err := status.ParseQuery(values)
			require.NoError(b, err)
			b.ReportAllocs()
			for b.Loop() {
				q.Select(rows, status.NewClock())
			}
		})
	}
}
