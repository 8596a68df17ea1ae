// Package telemetry counts what the gateway relays and what goes wrong. Counting a frame is
// an atomic addition; the instruments read the sums when they are collected.
package telemetry

import (
	"context"
	"errors"
	"fmt"
	"math"
	"sync"
	"sync/atomic"
	"time"

	"go.opentelemetry.io/collector/component"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"

	"github.com/opampgateway/opampgateway/internal/metadata"
)

// Direction is which way messages travel.
type Direction struct {
	messages, bytes atomic.Int64
	attributes      metric.MeasurementOption
	latency         atomic.Pointer[metric.Float64Histogram]
	timed           atomic.Int64          // when the last message was taken whose latency was recorded
	recorded        []metric.RecordOption // the attributes, as the histogram takes them without allocating
}

// latencyInterval is how often a latency is recorded at most, in nanoseconds: to record one costs
// more than all else that is counted of a message.
const latencyInterval = int64(time.Millisecond)

// Relayed counts messages, and their bytes, that were handed to their socket.
func (d *Direction) Relayed(messages, bytes int) {
	d.messages.Add(int64(messages))
	d.bytes.Add(int64(bytes))
}

// Total returns how many messages were handed to their socket so far, and their bytes.
func (d *Direction) Total() (messages, bytes int64) { return d.messages.Load(), d.bytes.Load() }

// LatencyDue reports whether it is time to record the latency of a message that was taken then, in
// nanoseconds of the process's own clock.
func (d *Direction) LatencyDue(taken int64) bool {
	last := d.timed.Load()
	return taken-last >= latencyInterval && d.timed.CompareAndSwap(last, taken)
}

// Latency records how long a message was in the gateway.
func (d *Direction) Latency(latency time.Duration) {
	(*d.latency.Load()).Record(context.Background(), float64(latency)/float64(time.Millisecond), d.recorded...)
}

// Telemetry counts with the instruments of one component, and may go on with those of the next: see Adopt.
type Telemetry struct {
	// Up is from agents to the server, Down from the server to agents.
	Up, Down Direction

	instruments atomic.Pointer[metadata.TelemetryBuilder]
	counted     sync.Map // from the value of reason or outcome to *counted

	// Set once, by Start.
	links, agents, unacknowledged, endpoint func() int
}

// counted is one value of an attribute, and how often it was counted.
type counted struct {
	options []metric.AddOption
	n       atomic.Int64
}

// New registers the instruments of one component.
func New(set component.TelemetrySettings) (*Telemetry, error) {
	builder, err := metadata.NewTelemetryBuilder(set)
	if err != nil {
		return nil, fmt.Errorf("create metrics: %w", err)
	}
	t := &Telemetry{}
	for d, name := range map[*Direction]string{&t.Up: "upstream", &t.Down: "downstream"} {
		d.attributes = metric.WithAttributeSet(attribute.NewSet(attribute.String("direction", name)))
		d.recorded = []metric.RecordOption{d.attributes}
		d.timed.Store(math.MinInt64 / 2) // any time is later
	}
	t.use(builder)
	return t, nil
}

// use has whatever is counted from now on counted with these instruments.
func (t *Telemetry) use(builder *metadata.TelemetryBuilder) {
	t.Up.latency.Store(&builder.OpampgatewayMessagesLatency)
	t.Down.latency.Store(&builder.OpampgatewayMessagesLatency)
	t.instruments.Store(builder)
}

// Start registers what is observed on collection; links and agents return how many there are now, and unacknowledged
// how many messages are on their way to the server, and endpoint at which of its endpoints the links are.
func (t *Telemetry) Start(links, agents, unacknowledged, endpoint func() int) error {
	t.links, t.agents, t.unacknowledged, t.endpoint = links, agents, unacknowledged, endpoint
	return t.observe(t.instruments.Load())
}

// Adopt takes over the instruments of next, the telemetry of a component that was not started: what is counted
// from now on is that component's. What was summed up goes on, and nothing is counted for the component before
// any more. With an error, all is as before, and next is done with.
func (t *Telemetry) Adopt(next *Telemetry) error {
	builder := next.instruments.Load()
	if err := t.observe(builder); err != nil {
		builder.Shutdown()
		return err
	}
	before := t.instruments.Load()
	t.use(builder)
	before.Shutdown()
	return nil
}

// observe registers with builder what is observed on collection.
func (t *Telemetry) observe(builder *metadata.TelemetryBuilder) error {
	err := errors.Join(
		builder.RegisterOpampgatewayEndpointCallback(func(_ context.Context, o metric.Int64Observer) error {
			o.Observe(int64(t.endpoint()))
			return nil
		}),
		builder.RegisterOpampgatewayLinkUnacknowledgedCallback(func(_ context.Context, o metric.Int64Observer) error {
			o.Observe(int64(t.unacknowledged()))
			return nil
		}),
		builder.RegisterOpampgatewayConnectionsCallback(t.both(
			func() int64 { return int64(t.links()) }, func() int64 { return int64(t.agents()) })),
		builder.RegisterOpampgatewayMessagesCallback(t.both(t.Up.messages.Load, t.Down.messages.Load)),
		builder.RegisterOpampgatewayMessagesBytesCallback(t.both(t.Up.bytes.Load, t.Down.bytes.Load)),
	)
	if err != nil {
		return fmt.Errorf("register metrics: %w", err)
	}
	// Whatever can happen is there as 0 from the start, so that a rate sees the first one.
	for _, r := range Reasons {
		builder.OpampgatewayFaults.Add(context.Background(), 0, t.of("reason", string(r.Reason)).options...)
	}
	for _, o := range Outcomes {
		builder.OpampgatewayAdmissions.Add(context.Background(), 0, t.of("outcome", string(o.Outcome)).options...)
	}
	for _, action := range OfferActions {
		builder.OpampgatewayOffers.Add(context.Background(), 0, t.of("action", string(action)).options...)
	}
	return nil
}

// both observes something in each direction.
func (t *Telemetry) both(up, down func() int64) metric.Int64Callback {
	return func(_ context.Context, o metric.Int64Observer) error {
		o.Observe(up(), t.Up.attributes)
		o.Observe(down(), t.Down.attributes)
		return nil
	}
}

// RoundTrip records how long the server took to answer a ping.
func (t *Telemetry) RoundTrip(d time.Duration) {
	t.instruments.Load().OpampgatewayLinkPing.Record(context.Background(), d.Seconds())
}

// Shutdown unregisters what is observed. It is not called at the same time as Adopt.
func (t *Telemetry) Shutdown() { t.instruments.Load().Shutdown() }

// Fault counts one thing that went wrong.
func (t *Telemetry) Fault(reason Reason) { t.Faults(reason, 1) }

// Faults counts n things that went wrong.
func (t *Telemetry) Faults(reason Reason, n int) {
	c := t.of("reason", string(reason))
	c.n.Add(int64(n))
	t.instruments.Load().OpampgatewayFaults.Add(context.Background(), int64(n), c.options...)
}

// Admission counts how one agent's request to connect ended.
func (t *Telemetry) Admission(outcome Outcome) {
	c := t.of("outcome", string(outcome))
	c.n.Add(1)
	t.instruments.Load().OpampgatewayAdmissions.Add(context.Background(), 1, c.options...)
}

// FaultCount returns how many things of this kind went wrong.
func (t *Telemetry) FaultCount(reason Reason) int64 { return t.of("reason", string(reason)).n.Load() }

// AdmissionCount returns how many requests ended in this way.
func (t *Telemetry) AdmissionCount(outcome Outcome) int64 {
	return t.of("outcome", string(outcome)).n.Load()
}

// of returns what counts one value, with the attribute as a counter takes it. It is made once: what goes wrong may come
// as a flood.
func (t *Telemetry) of(key, value string) *counted {
	if c, ok := t.counted.Load(value); ok {
		return c.(*counted)
	}
	c, _ := t.counted.LoadOrStore(value, &counted{
		options: []metric.AddOption{metric.WithAttributeSet(attribute.NewSet(attribute.String(key, value)))},
	})
	return c.(*counted)
}
