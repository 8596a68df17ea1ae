package telemetry_test

import (
	"context"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.opentelemetry.io/collector/component/componenttest"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"
	"go.opentelemetry.io/otel/sdk/metric/metricdata/metricdatatest"

	"github.com/opampgateway/opampgateway/internal/metadatatest"
	"github.com/opampgateway/opampgateway/internal/telemetry"
)

// start returns the telemetry of one component, with what collects it.
func start(t *testing.T, links, agents func() int) (*telemetry.Telemetry, *componenttest.Telemetry) {
	t.Helper()
	collected := componenttest.NewTelemetry()
	t.Cleanup(func() { require.NoError(t, collected.Shutdown(context.WithoutCancel(t.Context()))) })
	tel, err := telemetry.New(collected.NewTelemetrySettings())
	require.NoError(t, err)
	t.Cleanup(tel.Shutdown)
	require.NoError(t, tel.Start(links, agents, none, none))
	return tel, collected
}

func none() int { return 0 }

func point(key, value string, n int64) metricdata.DataPoint[int64] {
	return metricdata.DataPoint[int64]{Attributes: attribute.NewSet(attribute.String(key, value)), Value: n}
}

// bothWays are the data points of what is counted in each direction.
func bothWays(upstream, downstream int64) []metricdata.DataPoint[int64] {
	return []metricdata.DataPoint[int64]{point("direction", "upstream", upstream), point("direction", "downstream", downstream)}
}

func TestConnectionsAreAsManyAsThereAreNow(t *testing.T) {
	links, agents := 3, 1000
	_, collected := start(t, func() int { return links }, func() int { return agents })
	metadatatest.AssertEqualOpampgatewayConnections(t, collected, bothWays(3, 1000), metricdatatest.IgnoreTimestamp())
	links, agents = 0, 999
	metadatatest.AssertEqualOpampgatewayConnections(t, collected, bothWays(0, 999), metricdatatest.IgnoreTimestamp())
}

func TestRelayedMessagesAreCountedByDirection(t *testing.T) {
	tel, collected := start(t, none, none)
	metadatatest.AssertEqualOpampgatewayMessages(t, collected, bothWays(0, 0), metricdatatest.IgnoreTimestamp())

	tel.Up.Relayed(2, 100_025)
	tel.Up.Relayed(1, 0)
	tel.Down.Relayed(1, 19)
	for _, latency := range []time.Duration{40 * time.Microsecond, 3 * time.Millisecond, 0} {
		tel.Up.Latency(latency)
	}
	tel.Down.Latency(time.Minute)
	metadatatest.AssertEqualOpampgatewayMessages(t, collected, bothWays(3, 1), metricdatatest.IgnoreTimestamp())
	metadatatest.AssertEqualOpampgatewayMessagesBytes(t, collected, bothWays(100_025, 19), metricdatatest.IgnoreTimestamp())

	bounds := []float64{0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500, 1000, 5000, 30000}
	metadatatest.AssertEqualOpampgatewayMessagesLatency(t, collected, []metricdata.HistogramDataPoint[float64]{
		{
			Attributes: attribute.NewSet(attribute.String("direction", "upstream")),
			Count:      3, Bounds: bounds,
			BucketCounts: []uint64{2, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0},
			Min:          metricdata.NewExtrema(0.0), Max: metricdata.NewExtrema(3.0), Sum: 3.04,
		},
		{
			Attributes: attribute.NewSet(attribute.String("direction", "downstream")),
			Count:      1, Bounds: bounds,
			BucketCounts: []uint64{0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1},
			Min:          metricdata.NewExtrema(60000.0), Max: metricdata.NewExtrema(60000.0), Sum: 60000,
		},
	}, metricdatatest.IgnoreTimestamp())
}

func TestMessagesAreCountedByManyAtOnce(t *testing.T) {
	tel, collected := start(t, none, none)
	var relaying sync.WaitGroup
	for range 8 {
		relaying.Go(func() {
			for range 1000 {
				tel.Up.Relayed(1, 2)
			}
		})
	}
	relaying.Wait()
	metadatatest.AssertEqualOpampgatewayMessages(t, collected, bothWays(8000, 0), metricdatatest.IgnoreTimestamp())
	metadatatest.AssertEqualOpampgatewayMessagesBytes(t, collected, bothWays(16_000, 0), metricdatatest.IgnoreTimestamp())
}

func TestFaultsAreCountedByReason(t *testing.T) {
	tel, collected := start(t, none, none)
	tel.Fault(telemetry.ReasonBadFrame)
	tel.Fault(telemetry.ReasonLinkLost)
	tel.Fault(telemetry.ReasonBadFrame)
	counted := map[telemetry.Reason]int64{telemetry.ReasonBadFrame: 2, telemetry.ReasonLinkLost: 1}
	var want []metricdata.DataPoint[int64] // every reason, also those for which nothing was counted
	for _, r := range telemetry.Reasons {
		want = append(want, point("reason", string(r.Reason), counted[r.Reason]))
	}
	metadatatest.AssertEqualOpampgatewayFaults(t, collected, want, metricdatatest.IgnoreTimestamp())
}

func TestAdmissionsAreCountedByOutcome(t *testing.T) {
	tel, collected := start(t, none, none)
	tel.Admission(telemetry.OutcomeAccepted)
	tel.Admission(telemetry.OutcomeRefused)
	tel.Admission(telemetry.OutcomeAccepted)
	counted := map[telemetry.Outcome]int64{telemetry.OutcomeAccepted: 2, telemetry.OutcomeRefused: 1}
	var want []metricdata.DataPoint[int64]
	for _, o := range telemetry.Outcomes {
		want = append(want, point("outcome", string(o.Outcome), counted[o.Outcome]))
	}
	metadatatest.AssertEqualOpampgatewayAdmissions(t, collected, want, metricdatatest.IgnoreTimestamp())
}

// A collector reload makes a new component while the old one's provider stays: what has ended
// must not be observed any more, nor its connections be held.
func TestNothingIsObservedAfterShutdown(t *testing.T) {
	ended := false
	tel, collected := start(t, func() int {
		assert.False(t, ended, "asked after the end")
		return 1
	}, none)
	metadatatest.AssertEqualOpampgatewayConnections(t, collected, bothWays(1, 0), metricdatatest.IgnoreTimestamp())
	tel.Shutdown()
	ended = true
	for _, name := range []string{"connections", "messages", "messages.bytes"} {
		_, err := collected.GetMetric("otelcol_opampgateway." + name)
		require.Error(t, err, name)
	}
	tel.Shutdown() // harmless
}

// A gateway that outlives its component counts for the next one: sums go on, and nothing is counted twice.
func TestAdopt(t *testing.T) {
	links := 3
	tel, before := start(t, func() int { return links }, none)
	tel.Up.Relayed(2, 20)
	tel.Fault(telemetry.ReasonBadFrame)
	tel.Up.Latency(time.Millisecond)

	after := componenttest.NewTelemetry()
	t.Cleanup(func() { require.NoError(t, after.Shutdown(context.WithoutCancel(t.Context()))) })
	next, err := telemetry.New(after.NewTelemetrySettings())
	require.NoError(t, err)
	require.NoError(t, tel.Adopt(next))
	links = 2
	tel.Up.Relayed(1, 5)
	tel.Fault(telemetry.ReasonBadFrame)
	tel.Admission(telemetry.OutcomeAccepted)
	tel.Up.Latency(time.Millisecond)
	tel.RoundTrip(time.Millisecond)

	metadatatest.AssertEqualOpampgatewayConnections(t, after, bothWays(2, 0), metricdatatest.IgnoreTimestamp())
	metadatatest.AssertEqualOpampgatewayMessages(t, after, bothWays(3, 0), metricdatatest.IgnoreTimestamp())
	metadatatest.AssertEqualOpampgatewayMessagesBytes(t, after, bothWays(25, 0), metricdatatest.IgnoreTimestamp())
	var faults []metricdata.DataPoint[int64] // each there from the start
	for _, r := range telemetry.Reasons {
		n := int64(0)
		if r.Reason == telemetry.ReasonBadFrame {
			n = 1
		}
		faults = append(faults, point("reason", string(r.Reason), n))
	}
	metadatatest.AssertEqualOpampgatewayFaults(t, after, faults, metricdatatest.IgnoreTimestamp())
	for _, name := range []string{"admissions", "messages.latency", "link.ping", "link.unacknowledged"} {
		_, err := after.GetMetric("otelcol_opampgateway." + name)
		require.NoError(t, err, name)
	}

	for _, name := range []string{"connections", "messages", "messages.bytes", "link.unacknowledged"} {
		_, err := before.GetMetric("otelcol_opampgateway." + name)
		require.Error(t, err, "%s is observed for the component before", name)
	}
	faults[0].Value = 1
	metadatatest.AssertEqualOpampgatewayFaults(t, before, faults, metricdatatest.IgnoreTimestamp())

	tel.Shutdown()
	_, err = after.GetMetric("otelcol_opampgateway.connections")
	require.Error(t, err)
}

// Whoever counts while the instruments change counts for one of the two.
func TestAdoptWhileCounting(t *testing.T) {
	tel, before := start(t, none, none)
	var counting sync.WaitGroup
	for range 4 {
		counting.Go(func() {
			for range 1000 {
				tel.Admission(telemetry.OutcomeAccepted)
				tel.Up.Latency(time.Millisecond)
			}
		})
	}
	after := componenttest.NewTelemetry()
	t.Cleanup(func() { require.NoError(t, after.Shutdown(context.WithoutCancel(t.Context()))) })
	next, err := telemetry.New(after.NewTelemetrySettings())
	require.NoError(t, err)
	require.NoError(t, tel.Adopt(next))
	counting.Wait()
	sum := int64(0)
	for _, collected := range []*componenttest.Telemetry{before, after} {
		counted, err := collected.GetMetric("otelcol_opampgateway.admissions")
		require.NoError(t, err)
		for _, p := range counted.Data.(metricdata.Sum[int64]).DataPoints {
			sum += p.Value
		}
	}
	require.EqualValues(t, 4000, sum)
}

func TestCountingAFrameDoesNotAllocate(t *testing.T) {
	tel, _ := start(t, none, none)
	assert.Zero(t, testing.AllocsPerRun(100, func() {
		tel.Up.Relayed(1, 25)
		tel.Up.Latency(time.Millisecond)
	}))
}

// Busy gateways measure some messages, others all.
func TestLatencyIsMeasuredOnceAMillisecond(t *testing.T) {
	tel, _ := start(t, none, none)
	for taken, due := range []bool{0: true, 1: false, 2: true, 3: false} {
		assert.Equal(t, due, tel.Up.LatencyDue(-1_000_000+int64(taken)*600_000), taken)
	}
	assert.True(t, tel.Down.LatencyDue(0), "each direction by itself")
}
