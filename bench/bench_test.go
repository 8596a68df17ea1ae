package main

import (
	"bytes"
	"encoding/xml"
	"errors"
	"io"
	"math"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/open-telemetry/opamp-go/protobufs"
	"google.golang.org/protobuf/proto"
)

// TestMain has the test's own program play the roles that the bench starts.
func TestMain(m *testing.M) {
	if len(os.Args) == 3 && os.Args[1] == "-role" {
		exit(playRole(os.Args[2]))
	}
	m.Run()
}

// The bench itself, as far as it needs nothing else: it measures something in each scenario, for
// each subject, and writes it down.
func TestBench(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("CPU time and memory of other processes are read on Linux only")
	}
	var err error
	b := &bench{work: t.TempDir(), quick: true, repeat: 1, window: 100 * time.Millisecond, settle: 10 * time.Millisecond, results: &results{}}
	b.scenarios, err = choose(scenarios, "saturated,tls,paced-1k,storm,memory", func(s *scenario) string { return s.name })
	if err != nil {
		t.Fatal(err)
	}
	b.subjects, err = choose(subjects, "naive,direct", func(s *subject) string { return s.name })
	if err != nil {
		t.Fatal(err)
	}
	if err := b.writeCertificate(); err != nil {
		t.Fatal(err)
	}
	b.run()
	for _, failure := range b.results.failures {
		t.Error(failure)
	}
	for scenario, figures := range map[string]int{"saturated": 5, "tls": 5, "paced-1k": 5, "storm": 2, "memory": 5} {
		for _, f := range b.results.figures {
			if f.scenario != scenario {
				continue
			}
			figures--
			if f.unit != "KiB" && !(spreadOf(f.values[nameNaive]).median > 0) {
				t.Errorf("%s, %s: %v", scenario, f.name, f.values)
			}
		}
		if figures != 0 {
			t.Errorf("%s: %d figures are missing", scenario, figures)
		}
	}
	dir := t.TempDir()
	if err := b.report(dir); err != nil {
		t.Fatal(err)
	}
	report, err := os.ReadFile(filepath.Join(dir, "results.md"))
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range b.charts() {
		if !strings.Contains(string(report), "("+c.file+")") {
			t.Errorf("the report does not show %s", c.file)
		}
		svg, err := os.Open(filepath.Join(dir, c.file))
		if err != nil {
			t.Fatal(err)
		}
		for text := xml.NewDecoder(svg); err == nil; {
			_, err = text.Token()
		}
		if svg.Close(); !errors.Is(err, io.EOF) {
			t.Errorf("%s: %v", c.file, err)
		}
	}
}

// A bench that takes any reply for a good one would praise a relay that mixes agents up.
func TestAgentsNoticeWhatIsNotTheirs(t *testing.T) {
	const agentIndex, number = 7, 3
	reply := func(edit func(u *uid, data []byte)) []byte {
		u, data := uidOf(agentIndex), make([]byte, 150)
		fillData(data, agentIndex, number, 12345)
		edit(&u, data)
		return appendServerToAgent(nil, u, data)
	}
	for _, test := range []struct {
		name string
		edit func(u *uid, data []byte)
		want string // empty: nothing is wrong
	}{
		{"its own", func(*uid, []byte) {}, ""},
		{"to another agent", func(u *uid, _ []byte) { *u = uidOf(8) }, "got a message for"},
		{"what another said", func(_ *uid, data []byte) { fillData(data, 8, number, 12345) }, "not those that were sent"},
		{"one too early", func(_ *uid, data []byte) { fillData(data, agentIndex, number+1, 12345) }, "3 was due"},
		{"one again", func(_ *uid, data []byte) { fillData(data, agentIndex, number-1, 12345) }, "3 was due"},
		{"a byte changed", func(_ *uid, data []byte) { data[77]++ }, "not those that were sent"},
		{"the last byte changed", func(_ *uid, data []byte) { data[149]++ }, "not those that were sent"},
		{"another time", func(_ *uid, data []byte) { data[9]++ }, "not those that were sent"},
	} {
		t.Run(test.name, func(t *testing.T) {
			a := &agent{load: &load{}, index: agentIndex, uid: uidOf(agentIndex), received: number - 1}
			err := a.take(reply(test.edit))
			if test.want == "" && err != nil || test.want != "" && (err == nil || !strings.Contains(err.Error(), test.want)) {
				t.Errorf("got %v, want %q", err, test.want)
			}
		})
	}
}

func TestMessagesAreOpAMP(t *testing.T) {
	for _, size := range []int{64, 200, 4096, 64 << 10} {
		u, data := uidOf(1), make([]byte, dataSize(size))
		fillData(data, 1, 1, 1)
		up := appendAgentToServer(nil, u, data)
		if len(up) < size-4 || len(up) > size {
			t.Errorf("a message of %d bytes has %d", size, len(up))
		}
		var said protobufs.AgentToServer
		if err := proto.Unmarshal(body(up), &said); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(said.GetInstanceUid(), u[:]) || !bytes.Equal(said.GetRemoteConfigStatus().GetLastRemoteConfigHash(), data) {
			t.Error("the server would read something else than the agent wrote")
		}
		var answer protobufs.ServerToAgent
		c := &serverConn{uids: map[uid]bool{u: true}}
		if err := proto.Unmarshal(body((&server{}).answer(c, up, nil)), &answer); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(answer.GetInstanceUid(), u[:]) || !bytes.Equal(answer.GetRemoteConfig().GetConfigHash(), data) {
			t.Error("the agent would read something else than the server wrote")
		}
	}
}

func TestFrames(t *testing.T) {
	near, far := net.Pipe()
	defer near.Close()
	defer far.Close()
	long := bytes.Repeat([]byte("0123456789"), 7000)
	go func() {
		agent := newConn(near, true)
		for _, message := range [][]byte{[]byte("short"), long[:300], long} {
			_ = agent.write(opBinary, message)
		}
		fragments := appendFrame(nil, opBinary, long[:10], true)
		fragments[0] &^= 0x80 // more to come
		fragments = appendFrame(fragments, opPong, nil, true)
		fragments = appendFrame(fragments, opContinuation, long[10:20], true)
		fragments = appendFrame(fragments, opClose, nil, true)
		_, _ = near.Write(fragments)
	}()
	c := newConn(far, false)
	for _, want := range [][]byte{[]byte("short"), long[:300], long, long[:20]} {
		got, err := c.read()
		if err != nil || !bytes.Equal(got, want) {
			t.Fatalf("got %d bytes and %v, want %d", len(got), err, len(want))
		}
	}
	if _, err := c.read(); err != errClosed { //nolint:errorlint // never wrapped
		t.Errorf("got %v, want %v", err, errClosed)
	}
}

// Agents, server and the naive relay, all in this process.
func TestNaiveRelay(t *testing.T) {
	s := &server{conns: map[*serverConn]struct{}{}, agents: map[uid]*serverConn{}}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	go s.serve(listener)
	relay := NaiveConfig{Server: agentURL(false, listener.Addr().String()), Listen: freeAddress()}
	if err := (&naive{}).Run(relay, nil); err != nil {
		t.Fatal(err)
	}
	l := &load{url: &url.URL{Scheme: "ws", Host: relay.Listen}}
	l.size.Store(200)
	const agents = 20
	if err := l.Connect(Connect{agents, 5, 30 * time.Second, true}, nil); err != nil {
		t.Fatal(err)
	}
	if err := l.Start(Start{Size: 2000}, nil); err != nil {
		t.Fatal(err)
	}
	if err := l.until(time.Now().Add(30*time.Second), func() string {
		if l.replies.Load() < 50*agents {
			return "too few replies"
		}
		return ""
	}); err != nil {
		t.Fatal(err)
	}
	if err := l.Stop(struct{}{}, nil); err != nil {
		t.Fatal(err)
	}
	if failed := l.failed(); failed != "" || l.closed.Load() > 0 {
		t.Errorf("%d agents were disconnected%s", l.closed.Load(), failed)
	}
	var state ServerState
	if err := s.State(struct{}{}, &state); err != nil || state.Agents != agents || state.Connects != agents || state.Conns != naiveLinks {
		t.Errorf("the server saw %+v", state)
	}
	_ = l.Disconnect(struct{}{}, nil)
}

func TestHistogram(t *testing.T) {
	var h, before histogram
	h.record(1 << 50)
	before = h.copy()
	for d := range int64(1_000_000) {
		h.record(d)
	}
	h = h.since(before)
	for _, q := range []float64{0.001, 0.5, 0.99} {
		if got, want := h.quantile(q), q*1e6; math.Abs(got-want) > want/50 {
			t.Errorf("quantile %v is %v, want about %v", q, got, want)
		}
	}
}

func TestSpreadLeavesOutWhatFailed(t *testing.T) {
	r := &results{}
	for _, value := range []float64{4, 0, 2} { // the second repetition fails
		if value != 0 {
			r.add("saturated", perRoundTrip, "µs", nameGateway, value)
		}
		r.add("saturated", perRoundTrip, "µs", nameNaive, 4)
		r.repetition++
	}
	if got, want := spreadOf((&goal{scenario: "saturated", figure: perRoundTrip, to: toPeer, of: nameNaive}).values(r)), (spread{0.75, 0.5, 1}); got != want {
		t.Errorf("got %v, want %v", got, want)
	}
}

func TestNumbers(t *testing.T) {
	for value, want := range map[float64]string{
		0: "0.00", 0.0123: "0.01", 9.876: "9.88", 12.34: "12.3", 123.4: "123", 1234: "1,230", 79_663: "79,700", 3_271_557: "3,270,000",
		math.Inf(1): "stuck",
	} {
		if got := number(value); got != want {
			t.Errorf("%v is %q, want %q", value, got, want)
		}
	}
	for value, want := range map[float64]string{0: "0", 3 * 0.2: "0.6", 2500: "2,500", 1_000_000: "1,000,000"} {
		if got := plain(value); got != want {
			t.Errorf("%v is %q, want %q", value, got, want)
		}
	}
}

// The line of a goal in a chart is where its verdict turns.
func TestGoalsHaveTheirLines(t *testing.T) {
	for i := range goals {
		g := &goals[i]
		r := &results{}
		r.add(g.scenario, g.figure, "", nameDirect, 3)
		r.add(g.scenario, g.figure, "", nameNaive, 20)
		r.add(g.scenario, g.figure, "", nameHAProxy, 30)
		if g.to == toOwn {
			r.add(g.scenario, g.of, "", nameGateway, 7)
		}
		limit := g.limit(r)
		r.add(g.scenario, g.figure, "", nameGateway, limit)
		if got := spreadOf(g.values(r)).median; math.Abs(got-g.goal) > 1e-9 {
			t.Errorf("%s: at the line of %v it is %v, want %v", g.text, limit, got, g.goal)
		}
	}
}

func TestTargetsHaveAPort(t *testing.T) {
	for target, want := range map[string]string{
		"wss://gateway.example/v1/opamp": "wss://gateway.example:443/v1/opamp",
		"ws://127.0.0.1:4320/v1/opamp":   "ws://127.0.0.1:4320/v1/opamp",
		"ws://[::1]":                     "ws://[::1]:80",
		"http://gateway.example":         "",
		"gateway.example:4320":           "",
	} {
		if got, err := withPort(target); got != want || (err == nil) != (want != "") {
			t.Errorf("%s is %q and %v, want %q", target, got, err, want)
		}
	}
}
