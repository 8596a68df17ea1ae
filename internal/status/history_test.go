package status_test

import (
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/opampgateway/opampgateway/internal/status"
)

// The rates are those of the last quarter of an hour.
func TestRates(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var h status.History
		require.Empty(t, h.Rates().Agents)
		require.True(t, h.Due())
		for i := range 500 {
			require.True(t, h.Due())
			h.Take(status.Sample{
				Agents: i, Links: 3, Memory: int64(i),
				Totals: status.Totals{MessagesUp: int64(i * i * 5), BytesUp: 500 * int64(i), MessagesDown: 5, BytesDown: 0, Faults: int64(i)},
			})
			require.False(t, h.Due())
			if i == 1 {
				require.Equal(t, []float64{1}, h.Rates().MessagesUp)
			}
			time.Sleep(status.SampleInterval)
		}
		r := h.Rates()
		require.Len(t, r.Agents, 180)
		require.Equal(t, 320, r.Agents[0])
		require.Equal(t, 499, r.Agents[179])
		require.InDelta(t, 499*499-498*498, r.MessagesUp[179], 1e-6)
		require.InDelta(t, 100, r.BytesUp[0], 1e-6)
		require.Zero(t, r.MessagesDown[179])
		require.InDelta(t, 0.2, r.Faults[7], 1e-6)
		require.InDelta(t, 5, r.IntervalSeconds, 1e-6)
	})
}

func TestMeter(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var m status.Meter
		m.Take(status.Totals{MessagesUp: 1000})
		require.Zero(t, m.Rate(), "nothing is known yet")
		time.Sleep(10 * time.Second)
		m.Take(status.Totals{MessagesUp: 1005, BytesUp: 20, MessagesDown: 30, BytesDown: 40})
		require.Equal(t, status.Rate{MessagesUp: 0.5, BytesUp: 2, MessagesDown: 3, BytesDown: 4}, m.Rate())
	})
}

func TestOnlyTheLastAreKept(t *testing.T) {
	var r status.Recent
	require.Empty(t, r.All())
	for i := range 450 {
		r.Add(status.Ended{Name: fmt.Sprint(i)})
	}
	ended := r.All()
	require.Len(t, ended, 200)
	require.Equal(t, "449", ended[0].Name)
	require.Equal(t, "250", ended[199].Name)

	var o status.Offenders
	for i := range 250 {
		o.Add(status.Offender{Kind: status.OffenceFloods, UID: fmt.Sprint(i)})
	}
	offenders := o.All(status.NewClock())
	require.Len(t, offenders, 100)
	require.Equal(t, "249", offenders[0].UID)
	require.Equal(t, "150", offenders[99].UID)
}

// Whoever offends again is kept once, and comes first.
func TestOffendsAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var o status.Offenders
		o.Add(status.Offender{Kind: status.OffenceFloods, UID: "alice", Text: "for 1 s"})
		o.Add(status.Offender{Kind: status.OffenceFloods, UID: "bob"})
		time.Sleep(time.Minute)
		o.Add(status.Offender{Kind: status.OffenceFloods, UID: "alice", Text: "for 10 s"})
		o.Add(status.Offender{Kind: status.OffenceUIDTaken, UID: "bob"})
		all := o.All(status.NewClock())
		require.Len(t, all, 3)
		require.Equal(t, status.OffenceUIDTaken, all[0].Kind)
		require.Equal(t, "alice", all[1].UID)
		require.Equal(t, "for 10 s", all[1].Text)
		require.Equal(t, 2, all[1].Times)
		require.Equal(t, time.Minute, all[1].Last.Sub(all[1].First))
	})
}

// What is told of the calendar keeps the distance of what happened, when the host's clock is what it is.
func TestClock(t *testing.T) {
	c := status.NewClock()
	require.Nil(t, c.Maybe(0))
	require.WithinDuration(t, c.Now(), c.Time(1).Add(c.Now().Sub(c.Time(1))), 0)
	require.Equal(t, time.Second, c.Time(5e9).Sub(c.Time(4e9)))
}
