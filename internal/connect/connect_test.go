package connect_test

import (
	"bytes"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/open-telemetry/opamp-go/protobufs"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/net/http/httpguts"
	"google.golang.org/protobuf/proto"

	"github.com/opampgateway/opampgateway/internal/connect"
)

// captured returns one frame captured from another gateway, an agent or a server, decoded.
func captured[M proto.Message](tb testing.TB, name string, message M) M {
	tb.Helper()
	frame, err := os.ReadFile(filepath.Join("..", "..", "testdata", "captures", name+".bin"))
	require.NoError(tb, err)
	require.NoError(tb, proto.Unmarshal(bytes.TrimPrefix(frame, []byte{0}), message))
	return message
}

// capturedMessage returns the custom_message of a captured frame.
func capturedMessage(tb testing.TB, name string) *protobufs.CustomMessage {
	tb.Helper()
	var message *protobufs.CustomMessage
	if strings.HasSuffix(name, "-up") {
		message = captured(tb, name, &protobufs.AgentToServer{}).GetCustomMessage()
	} else {
		message = captured(tb, name, &protobufs.ServerToAgent{}).GetCustomMessage()
	}
	require.NotNil(tb, message, name)
	return message
}

func encode(tb testing.TB, message *protobufs.CustomMessage) []byte {
	tb.Helper()
	encoded, err := proto.Marshal(message)
	require.NoError(tb, err)
	return encoded
}

func TestMessageTellsWhatAGatewayAndItsServerSaid(t *testing.T) {
	for name, want := range map[string]connect.Kind{
		"gateway-upstream/001-up":        connect.Connect,
		"gateway-upstream/002-down":      connect.ConnectResult,
		"gateway-upstream/005-up":        connect.Connect,
		"gateway-upstream/006-down":      connect.ConnectResult,
		"gateway-upstream/021-up":        connect.Connect,
		"gateway-upstream/022-down":      connect.ConnectResult,
		"bdot/003-up":                    connect.Other, // measurements
		"opampgo-example-agent/013-down": connect.Other,
	} {
		message := capturedMessage(t, name)
		kind, data := connect.Message(encode(t, message))
		assert.Equal(t, want, kind, name)
		if want == connect.Other {
			assert.Nil(t, data, name)
		} else {
			assert.Equal(t, message.GetData(), data, name)
		}
	}
}

func TestMessageKnowsOnlyWellFormedGatewayMessages(t *testing.T) {
	question := encode(t, &protobufs.CustomMessage{Capability: connect.Capability, Type: "connect", Data: []byte("{}")})
	for name, test := range map[string]struct {
		message []byte
		kind    connect.Kind
		data    string
	}{
		"question":           {question, connect.Connect, "{}"},
		"answer":             {encode(t, &protobufs.CustomMessage{Capability: connect.Capability, Type: "connectResult"}), connect.ConnectResult, ""},
		"unknown fields":     {bytes.Join([][]byte{{0x20, 1}, question, {0x2a, 1, 'x'}}, nil), connect.Connect, "{}"},
		"last value counts":  {append(encode(t, &protobufs.CustomMessage{Capability: "weather", Type: "report", Data: []byte("rain")}), question...), connect.Connect, "{}"},
		"nothing":            {nil, connect.Other, ""},
		"another type":       {encode(t, &protobufs.CustomMessage{Capability: connect.Capability, Type: "disconnect"}), connect.Other, ""},
		"no type":            {encode(t, &protobufs.CustomMessage{Capability: connect.Capability}), connect.Other, ""},
		"no capability":      {encode(t, &protobufs.CustomMessage{Type: "connect"}), connect.Other, ""},
		"another capability": {encode(t, &protobufs.CustomMessage{Capability: "com.bindplane.opamp-gateway2", Type: "connect"}), connect.Other, ""},
		"another case":       {encode(t, &protobufs.CustomMessage{Capability: connect.Capability, Type: "Connect"}), connect.Other, ""},
		"overruled later":    {append(bytes.Clone(question), encode(t, &protobufs.CustomMessage{Capability: "weather"})...), connect.Other, ""},
		"garbage":            {[]byte("\xff\xff\xff"), connect.Other, ""},
		"cut in a field":     {question[:len(question)-1], connect.Other, ""},
		"garbage behind":     {append(bytes.Clone(question), 0xff), connect.Other, ""},
		"bad number behind":  {append(bytes.Clone(question), 0x20, 0x80), connect.Other, ""},
		"group behind":       {append(bytes.Clone(question), 0x23), connect.Other, ""},
		"type as a number":   {[]byte("\x0a\x1b" + connect.Capability + "\x10\x01"), connect.Other, ""},
	} {
		t.Run(name, func(t *testing.T) {
			kind, data := connect.Message(test.message)
			assert.Equal(t, test.kind, kind)
			assert.Equal(t, test.data, string(data))
		})
	}
}

func TestMessageDoesNotAllocate(t *testing.T) {
	for _, name := range []string{"gateway-upstream/001-up", "gateway-upstream/002-down", "bdot/003-up"} {
		message := encode(t, capturedMessage(t, name))
		assert.Zero(t, testing.AllocsPerRun(10, func() { connect.Message(message) }), name)
	}
}

func FuzzMessage(f *testing.F) {
	for _, name := range []string{
		"gateway-upstream/001-up", "gateway-upstream/002-down", "gateway-upstream/006-down",
		"bdot/003-up", "opampgo-example-agent/013-down",
	} {
		f.Add(encode(f, capturedMessage(f, name)))
	}
	f.Add([]byte("\x0a\x1b" + connect.Capability + "\x10\x01\x12\x07connect\x23\x24\x1a\x02{}"))
	f.Fuzz(func(t *testing.T, encoded []byte) {
		kind, data := connect.Message(encoded)
		var message protobufs.CustomMessage
		if err := proto.Unmarshal(encoded, &message); err != nil {
			return // ours to be lenient about: text that is not UTF-8, where it was overruled
		}
		want := connect.Other
		if message.GetCapability() == connect.Capability {
			switch message.GetType() {
			case "connect":
				want = connect.Connect
			case "connectResult":
				want = connect.ConnectResult
			}
		}
		require.Equal(t, want, kind)
		if kind != connect.Other {
			require.Equal(t, string(message.GetData()), string(data))
		}
	})
}

// The JSON shapes are not ours: they are what servers understand, see the captures.
type connectJSON struct {
	RequestUID    string      `json:"request_uid"`
	RemoteAddress string      `json:"remote_address"`
	Headers       http.Header `json:"headers"`
}

// wantQuestion decodes a frame that asks about an agent, with nothing but that in it.
func wantQuestion(t *testing.T, frame []byte) connectJSON {
	t.Helper()
	require.NotEmpty(t, frame)
	require.Zero(t, frame[0], "header")
	var message protobufs.AgentToServer
	require.NoError(t, proto.Unmarshal(frame[1:], &message))
	custom := message.GetCustomMessage()
	require.True(t, proto.Equal(&protobufs.AgentToServer{CustomMessage: custom}, &message), "more than custom_message: %v", &message)
	require.Equal(t, "com.bindplane.opamp-gateway", custom.GetCapability())
	require.Equal(t, "connect", custom.GetType())

	decoder := json.NewDecoder(bytes.NewReader(custom.GetData()))
	decoder.DisallowUnknownFields()
	var question connectJSON
	require.NoError(t, decoder.Decode(&question), "%s", custom.GetData())
	require.False(t, decoder.More())
	return question
}

// The reference gateway and we, asked about the same agent, send the server the same.
func TestQuestionIsWhatTheReferenceGatewayAsks(t *testing.T) {
	for _, name := range []string{"gateway-upstream/001-up", "gateway-upstream/005-up", "gateway-upstream/021-up"} {
		reference := captured(t, name, &protobufs.AgentToServer{})
		var want connectJSON
		require.NoError(t, json.Unmarshal(reference.GetCustomMessage().GetData(), &want))
		require.NotEmpty(t, want.Headers["Authorization"], name)

		question, err := connect.NewQuestion(want.RemoteAddress, want.Headers, nil)
		require.NoError(t, err)
		frame := question.Frame(want.RequestUID)
		assert.Equal(t, want, wantQuestion(t, frame), name)

		// Down to the keys: none is left out, none is of another type.
		var ours, theirs map[string]any
		var message protobufs.AgentToServer
		require.NoError(t, proto.Unmarshal(frame[1:], &message))
		require.NoError(t, json.Unmarshal(message.GetCustomMessage().GetData(), &ours))
		require.NoError(t, json.Unmarshal(reference.GetCustomMessage().GetData(), &theirs))
		assert.Equal(t, theirs, ours, name)
	}
}

func TestQuestionCarriesWhateverHeadersAnAgentSends(t *testing.T) {
	headers := http.Header{
		"Authorization": {"Secret-Key dummy"},
		"X-Twice":       {"one", "two"},
		"X-None":        {},
		"X-Empty":       {""},
		"X-Quotes":      {`"}],"headers":{"Authorization":["stolen"]}`, `\`, "\t"},
		"X-Html":        {"<a href='x'>&amp;</a>"},
		"X-Unicode":     {"größer \u2028 🙂"},
		"weird-Case":    {"kept"},
		"":              {"no name"},
	}
	before := headers.Clone()
	question, err := connect.NewQuestion(`[::1%eth"0]:4320`, headers, nil)
	require.NoError(t, err)
	assert.Equal(t, connectJSON{"request-1", `[::1%eth"0]:4320`, headers}, wantQuestion(t, question.Frame("request-1")))
	assert.Equal(t, before, headers)

	// Bytes that are not text cannot stand in JSON. They may be refused by the server, but must
	// not keep the agent from being asked about.
	question, err = connect.NewQuestion("", http.Header{"X-Latin1": {"gr\xf6\xdfer"}}, nil)
	require.NoError(t, err)
	assert.Equal(t, http.Header{"X-Latin1": {"gr\ufffd\ufffder"}}, wantQuestion(t, question.Frame("request-2")).Headers)

	question, err = connect.NewQuestion("192.0.2.1:1234", nil, nil)
	require.NoError(t, err)
	assert.Equal(t, connectJSON{"request-3", "192.0.2.1:1234", http.Header{}}, wantQuestion(t, question.Frame("request-3")))
}

// An agent that lost its link is introduced again, with the question asked before.
func TestQuestionCanBeAskedAgain(t *testing.T) {
	question, err := connect.NewQuestion("192.0.2.1:1234", http.Header{"Authorization": {"dummy"}}, nil)
	require.NoError(t, err)
	before := bytes.Clone(question)
	for _, requestUID := range []string{"request-1", "a-second-and-longer-request", "3"} {
		asked := wantQuestion(t, question.Frame(requestUID))
		assert.Equal(t, requestUID, asked.RequestUID)
		assert.Equal(t, "192.0.2.1:1234", asked.RemoteAddress)
		assert.Equal(t, http.Header{"Authorization": {"dummy"}}, asked.Headers)
	}
	assert.Equal(t, before, []byte(question))
}

// A server is told who an agent is by who has verified its certificate, never by the agent.
func TestQuestionNamesTheVerifiedCertificate(t *testing.T) {
	claimed := http.Header{
		"Client-Cert": {":c3RvbGVu:"}, "client-cert": {":c3RvbGVu:"}, "CLIENT-CERT": {":c3RvbGVu:"},
		"Client-Cert-Chain": {":c3RvbGVu:"}, "client-cert-CHAIN": {":c3RvbGVu:"},
		"Client-Certificate": {"something else"},
	}
	before := claimed.Clone()
	for name, test := range map[string]struct {
		headers     http.Header
		certificate *x509.Certificate
		want        http.Header
	}{
		"without a certificate": {claimed, nil, http.Header{"Client-Certificate": {"something else"}}},
		"with one": {
			claimed, &x509.Certificate{Raw: []byte("\xff\xfe\xfdDER")},
			http.Header{"Client-Certificate": {"something else"}, "Client-Cert": {"://79REVS:"}},
		},
		"with one, and nothing else": {nil, &x509.Certificate{Raw: []byte("DER!")}, http.Header{"Client-Cert": {":REVSIQ==:"}}},
	} {
		question, err := connect.NewQuestion("192.0.2.1:1234", test.headers, test.certificate)
		require.NoError(t, err, name)
		assert.Equal(t, test.want, wantQuestion(t, question.Frame("request-1")).Headers, name)
	}
	assert.Equal(t, before, claimed)
}

func TestQuestionIsBounded(t *testing.T) {
	const most = 64 << 10
	of := func(size int) http.Header {
		return http.Header{"X": {"secret" + strings.Repeat("x", size-len("secret"))}}
	}
	question, err := connect.NewQuestion("", of(10_000), nil)
	require.NoError(t, err)
	rest := len(question) - 10_000
	question, err = connect.NewQuestion("", of(most-rest), nil)
	require.NoError(t, err)
	assert.Len(t, question, most)

	escaped := map[string]http.Header{
		"one byte more":       of(most - rest + 1),
		"a header":            of(1 << 20),
		"much to be escaped":  {"X": {strings.Repeat("\x01", most/6)}},
		"many names":          {},
		"many values of one":  {"X": make([]string, most)},
		"one name":            {strings.Repeat("x", most): {""}},
		"a name with nothing": {strings.Repeat("x", most): nil},
	}
	for i := range 10_000 {
		escaped["many names"]["X-"+strconv.Itoa(i)] = []string{""}
	}
	for name, headers := range escaped {
		question, err := connect.NewQuestion("", headers, nil)
		require.ErrorIs(t, err, connect.ErrQuestionTooLarge, name)
		assert.Nil(t, question, name)
		assert.NotContains(t, err.Error(), "secret")
	}
	_, err = connect.NewQuestion("", nil, &x509.Certificate{Raw: make([]byte, most)})
	require.ErrorIs(t, err, connect.ErrQuestionTooLarge)
	_, err = connect.NewQuestion(strings.Repeat("x", most), nil, nil)
	require.ErrorIs(t, err, connect.ErrQuestionTooLarge)
}

// usual is what an agent sends.
var usual = http.Header{
	"Authorization": {"Secret-Key 01980000-0000-7000-8000-00000000000a"}, "Agent-Id": {"01980000-0000-7000-8000-00000000000a"},
	"Agent-Version": {"v1.89.0"}, "Agent-Hostname": {"host.example.com"}, "Opamp-Version": {"v0.23.0"},
	"User-Agent": {"opamp-go"}, "Connection": {"Upgrade"}, "Upgrade": {"websocket"},
	"Sec-Websocket-Key": {"dGhlIHNhbXBsZSBub25jZQ=="}, "Sec-Websocket-Version": {"13"},
}

// A question is kept for as long as its agent is connected; each is asked while the server waits.
func TestQuestionTakesNoMoreThanItsBytes(t *testing.T) {
	question, err := connect.NewQuestion("192.0.2.1:1234", usual, nil)
	require.NoError(t, err)
	assert.Equal(t, len(question), cap(question))
	frame := question.Frame("01980000-0000-7000-8000-00000000000a")
	assert.Equal(t, len(frame), cap(frame))
	assert.Less(t, testing.AllocsPerRun(1000, func() { question.Frame("01980000-0000-7000-8000-00000000000a") }), 2.0)
	// The race detector has pools forget.
	assert.Less(t, testing.AllocsPerRun(1000, func() { _, _ = connect.NewQuestion("192.0.2.1:1234", usual, nil) }), 4.0)
}

// FuzzQuestion compares what is put together by hand with what encoding/json makes of the same.
func FuzzQuestion(f *testing.F) {
	f.Add("192.0.2.1:1234", "Authorization", "Secret-Key dummy", "request-1")
	f.Add(`"`, "\\", "\x00\b\t\n\v\f\r\x1f\x7f\"\\/<>&'", "2")
	f.Add("gr\xf6\xdfer", "größer \u2028\u2029 🙂", "\xed\xa0\x80\xff\xf0\x9f\x99", "3")
	f.Add("\xf0\x9f", "\ufffd", "\xc3", "")
	f.Fuzz(func(t *testing.T, address, name, value, requestUID string) {
		if strings.HasPrefix(strings.ToLower(name), "client-cert") || name == "Twice" {
			return
		}
		headers := http.Header{name: {value}, "Twice": {value, name}}
		question, err := connect.NewQuestion(address, headers, nil)
		if err != nil {
			require.ErrorIs(t, err, connect.ErrQuestionTooLarge)
			require.Greater(t, len(address)+2*(len(name)+len(value)), 64<<10/6-100)
			return
		}
		var want, got connectJSON
		encoded, err := json.Marshal(connectJSON{RemoteAddress: address, Headers: headers})
		require.NoError(t, err)
		require.NoError(t, json.Unmarshal(encoded, &want))
		require.NoError(t, json.Unmarshal(question, &got))
		require.Equal(t, want, got)
		if utf8.ValidString(address + "|" + name + "|" + value) {
			require.Equal(t, connectJSON{RemoteAddress: address, Headers: headers}, got)
		}
		require.LessOrEqual(t, len(question), len(encoded))

		if asked, err := json.Marshal(requestUID); err == nil && string(asked) == `"`+requestUID+`"` {
			want.RequestUID = requestUID
			require.Equal(t, want, wantQuestion(t, question.Frame(requestUID)))
		}
	})
}

func TestRequestUIDTiesAnswersToQuestions(t *testing.T) {
	asked, err := connect.RequestUID(capturedMessage(t, "gateway-upstream/001-up").GetData())
	require.NoError(t, err)
	answered, err := connect.RequestUID(capturedMessage(t, "gateway-upstream/002-down").GetData())
	require.NoError(t, err)
	assert.Equal(t, asked, answered)
	assert.Len(t, asked, 36)

	for data, want := range map[string]string{
		`{"request_uid":"x"}`:                          "x",
		" {\t\"request_uid\"\n:\r\"x\" } ":             "x",
		`{"request_uid":"\u0078"}`:                     "x",
		`{"request_uid":"gr\u00f6ßer"}`:                "größer",
		`{"request_uid":"\"}, \\\"request_uid\":\"y"}`: `"}, \"request_uid":"y`,
		`{"a":{"request_uid":"a"},"b":[{"request_uid":"b"},"}",-1.5e3],"c":true,"request_uid":"x","d":null}`: "x",
		`{"request_uids":"a","xrequest_uid":"b","request_uid":"x"}`:                                          "x",
		`{"request_uid":"` + strings.Repeat("x", 128) + `"}`:                                                 strings.Repeat("x", 128),
		`{"request_uid":"` + strings.Repeat(`\u0078`, 128) + `"}`:                                            strings.Repeat("x", 128),
	} {
		requestUID, err := connect.RequestUID([]byte(data))
		require.NoError(t, err, data)
		assert.Equal(t, want, requestUID, data)
	}
	for _, data := range []string{
		"", "{", "[]", "null", "{}", `{"request_uid":""}`, `{"request_uid":7}`, `{"request_uid":null}`,
		`{"request_uid":"x"`, `{"request_uid":"x"}}`, `"x"`, `{"request_uid":["x"]}`, `{"request_uid":"x",}`,
	} {
		requestUID, err := connect.RequestUID([]byte(data))
		require.Error(t, err, data)
		assert.Empty(t, requestUID, data)
	}
}

// What is remembered of a question is small, and no two parsers see different ones.
func TestRequestUIDIsShortAndUnambiguous(t *testing.T) {
	for data, why := range map[string]string{
		`{"request_uid":"` + strings.Repeat("x", 129) + `"}`:        "above 128 bytes",
		`{"request_uid":"` + strings.Repeat("ö", 65) + `"}`:         "above 128 bytes",
		`{"request_uid":"` + strings.Repeat(`\u0078`, 129) + `"}`:   "above 128 bytes",
		`{"request_uid":"` + strings.Repeat("x", 1<<20) + `"}`:      "above 128 bytes",
		`{"request_uid":"x","request_uid":"y"}`:                     "there are two",
		`{"request_uid":"x","headers":{},"request_uid":"x"}`:        "there are two",
		`{"request_uid":"x","Request_UID":"y"}`:                     "there are two",
		`{"REQUEST_UID":"x","request_uid":"y"}`:                     "another case",
		`{"REQUEST_UID":"x"}`:                                       "another case",
		"{\"reque\u017ft_uid\":\"x\"}":                              "another case", // long s, which encoding/json folds
		`{"request_uid":"x","request\u005fuid":"y"}`:                "escape",
		`{"request_uid":"x","\u0072equest_uid":"y"}`:                "escape",
		`{"request_uid":"x","reque\u017ft_uid":"y"}`:                "escape",
		`{"request_uid":{"secret":"s"},"headers":{"X":["secret"]}}`: "not a string",
	} {
		requestUID, err := connect.RequestUID([]byte(data))
		require.ErrorContains(t, err, why, data)
		assert.NotContains(t, err.Error(), "secret")
		assert.Empty(t, requestUID)
		_, result, err := connect.ParseResult([]byte(data))
		require.ErrorContains(t, err, why, data)
		assert.Equal(t, connect.Result{}, result)
	}
}

// Whoever was let in may send megabytes of what looks like a question, or an answer.
func TestAHostileMessageCostsNoMoreThanALook(t *testing.T) {
	for name, member := range map[string]string{
		"headers":       `,"h%d":""`,
		"for the agent": `,"X-%d":""`,
		"wanted":        `,"Retry-After":"","u%d":""`,
		"nested":        `,"h%d":[{"a":[]},{}]`,
	} {
		var entries strings.Builder
		for i := range 100_000 {
			fmt.Fprintf(&entries, member, i)
		}
		headers := `"response_headers":{"X-First":"1"` + entries.String() + `}`
		for _, data := range []string{
			`{"request_uid":"x"` + entries.String() + `}`,
			`{"request_uid":"x","accept":true,"http_status_code":429,` + headers + `}`,
		} {
			allocations := testing.AllocsPerRun(1, func() {
				requestUID, err := connect.RequestUID([]byte(data))
				if err != nil || requestUID != "x" {
					t.Error(name, requestUID, err)
				}
			})
			assert.Less(t, allocations, 20.0, name)
			allocations = testing.AllocsPerRun(1, func() {
				_, result, err := connect.ParseResult([]byte(data))
				if err != nil || len(result.Headers) > 16<<10/8 {
					t.Error(name, len(result.Headers), err)
				}
			})
			assert.Less(t, allocations, 20_000.0, "%s: what is kept is within 16 KiB", name)
		}
	}
}

func TestResultKeepsABoundedAmountOfHeaders(t *testing.T) {
	long := strings.Repeat("x", 10_000)
	_, result, err := connect.ParseResult([]byte(`{"request_uid":"x","http_status_code":503,"response_headers":
		{"X-Long":"` + long + `","X-Longer":"` + long + `","X-Short":"1","Retry-After":"60","Set-Cookie":"` + long + `"}}`))
	require.NoError(t, err)
	assert.Equal(t, map[string]string{"X-Long": long, "X-Short": "1", "Retry-After": "60"}, result.Headers)

	h := http.Header{}
	connect.Result{StatusCode: 503, Headers: map[string]string{"Retry-After": "60", "X-A": long, "X-B": long, "X-C": "1"}}.CopyRefusalHeaders(h)
	assert.Equal(t, http.Header{"Retry-After": {"60"}, "X-A": {long}, "X-C": {"1"}}, h)
}

func TestResultIsTheServersVerdict(t *testing.T) {
	requestUID, result, err := connect.ParseResult(capturedMessage(t, "gateway-upstream/002-down").GetData())
	require.NoError(t, err)
	assert.Len(t, requestUID, 36)
	assert.Equal(t, connect.Result{Accept: true, StatusCode: 200, Headers: map[string]string{}}, result)

	requestUID, result, err = connect.ParseResult([]byte(`{"request_uid":"x","accept":false,"http_status_code":429,
		"response_headers":{"Retry-After":"60"},"something_new":[1]}`))
	require.NoError(t, err)
	assert.Equal(t, "x", requestUID)
	assert.False(t, result.Accept)
	assert.Equal(t, http.StatusTooManyRequests, result.RefusalStatus())
	assert.Equal(t, map[string]string{"Retry-After": "60"}, result.Headers)
}

func TestTurnAwayIsAnAnswerThatAgentsWaitOn(t *testing.T) {
	var message protobufs.ServerToAgent
	require.NoError(t, proto.Unmarshal(connect.TurnAway("x", "33")[1:], &message))
	requestUID, result, err := connect.ParseResult(message.GetCustomMessage().GetData())
	require.NoError(t, err)
	assert.Equal(t, "x", requestUID)
	assert.False(t, result.Accept)
	assert.Equal(t, http.StatusServiceUnavailable, result.RefusalStatus())
	assert.Equal(t, map[string]string{"Retry-After": "33"}, result.Headers)
}

func TestResultThatCannotBeReadIsARefusal(t *testing.T) {
	for _, data := range []string{
		"", "null", "{}", "[]", "true", `"accept"`, "{", `{"accept":true`, `{"accept":true}x`,
		`{"accept":"true"}`, `{"accept":1}`, `{"accept":null}`,
		`{"accept":true,"http_status_code":"200"}`, `{"accept":true,"http_status_code":1e99}`,
		`{"accept":true,"response_headers":{"Retry-After":["60"]}}`, `{"accept":true,"response_headers":[]}`,
		"\x00", "\xff{\"accept\":true}",
	} {
		_, result, err := connect.ParseResult([]byte(data))
		require.Error(t, err, "it answers nothing")
		assert.False(t, result.Accept, data)
		assert.Equal(t, http.StatusUnauthorized, result.RefusalStatus(), data)
		h := http.Header{}
		result.CopyRefusalHeaders(h)
		assert.Empty(t, h, data)
	}
	for _, verdict := range []string{`"accept":"true"`, `"accept":true,"response_headers":[]`, `"accept":true,"http_status_code":"200"`} {
		requestUID, result, err := connect.ParseResult([]byte(`{"request_uid":"x",` + verdict + `}`))
		require.NoError(t, err, "it answers a question")
		assert.Equal(t, "x", requestUID)
		assert.Equal(t, connect.Result{}, result)
	}
	assert.Equal(t, http.StatusUnauthorized, connect.Result{}.RefusalStatus())
}

func TestRefusalStatusIsOneThatRefuses(t *testing.T) {
	for status, want := range map[int]int{
		400: 400, 401: 401, 403: 403, 426: 426, 429: 429, 499: 499, 500: 500, 503: 503, 599: 599,
		-1: 401, 0: 401, 42: 401, 101: 401, 200: 401, 302: 401, 399: 401, 600: 401, 1000: 401, 99999: 401,
	} {
		assert.Equal(t, want, connect.Result{StatusCode: status}.RefusalStatus(), status)
	}
}

// Some servers send agents to another; agents follow.
func TestRefusalMaySendTheAgentElsewhere(t *testing.T) {
	for location, usable := range map[string]bool{
		"https://other.example/v1/opamp?x=1": true, "wss://other.example": true, "http://[::1]:4320/": true, "ws://other:4320": true,
		"/v2/opamp": true, "opamp": true, "//other.example/": true, "?again": true,
		"": false, "https://": false, "https:///path": false, "javascript:alert(1)": false, "mailto:x@example.com": false,
		"https://a b/": false, "https://other/\r\nX: y": false, "/\x00": false, "/\x7f": false, " /": false, "https://größer/": false,
		"http://[::1": false, "/%zz": false, "https://other:port/": false,
	} {
		for _, status := range []int{301, 302, 303, 307, 308} {
			for _, name := range []string{"Location", "location"} {
				result := connect.Result{StatusCode: status, Headers: map[string]string{name: location}}
				h := http.Header{}
				result.CopyRefusalHeaders(h)
				if usable {
					assert.Equal(t, status, result.RefusalStatus(), location)
					assert.Equal(t, http.Header{"Location": {location}}, h)
				} else {
					assert.Equal(t, http.StatusUnauthorized, result.RefusalStatus(), "%q", location)
					assert.Empty(t, h)
				}
			}
		}
	}
	for _, status := range []int{300, 304, 305, 306, 399, 201, 401, 503} { // these send nobody anywhere
		h := http.Header{}
		result := connect.Result{StatusCode: status, Headers: map[string]string{"Location": "/v2/opamp"}}
		assert.GreaterOrEqual(t, result.RefusalStatus(), 400)
		result.CopyRefusalHeaders(h)
		assert.Empty(t, h, status)
	}
}

func TestRefusalHeadersReachTheAgent(t *testing.T) {
	for name, test := range map[string]struct {
		status int
		from   map[string]string
		want   http.Header
	}{
		"none": {status: 401, from: nil, want: http.Header{}},
		"why, and when to come back": {
			status: 503,
			from:   map[string]string{"Retry-After": "60", "X-Reason": "moving house", "www-authenticate": "Secret-Key"},
			want:   http.Header{"Retry-After": {"60"}, "X-Reason": {"moving house"}, "Www-Authenticate": {"Secret-Key"}},
		},
		"what to upgrade to": {
			status: 426,
			from:   map[string]string{"Upgrade": "v1.99.0"},
			want:   http.Header{"Upgrade": {"v1.99.0"}, "Connection": {"Upgrade"}},
		},
		"no upgrade with another status":       {status: 401, from: map[string]string{"upgrade": "v1.99.0"}, want: http.Header{}},
		"no upgrade with a nonsensical status": {status: 99, from: map[string]string{"Upgrade": "v1.99.0"}, want: http.Header{}},
		"no others": {
			status: 426,
			from: map[string]string{
				"Connection": "close", "keep-alive": "timeout=5", "Proxy-Authenticate": "Basic", "PROXY-AUTHORIZATION": "x",
				"Proxy-Connection": "close", "TE": "trailers", "trailer": "X", "Transfer-Encoding": "chunked",
				"content-length": "1000000", "Set-Cookie": "x", "Content-Type": "text/html", "Content-Encoding": "gzip",
				"Strict-Transport-Security": "max-age=1", "Server": "x", "Xenon": "x", "X": "x", "X-Kept": "yes", "x-kept-too": "yes",
			},
			want: http.Header{"X-Kept": {"yes"}, "X-Kept-Too": {"yes"}},
		},
		"no invalid names": {
			status: 401,
			from: map[string]string{
				"": "x", "X- Space": "x", "X-:Colon": "x", "X-\r\nSet-Cookie": "x", "X-Größe": "x", "X-Nul\x00": "x",
				" Content-Length": "7", "Content-Length ": "7", "X-Kept": "yes",
			},
			want: http.Header{"X-Kept": {"yes"}},
		},
		"no invalid values": {
			status: 401,
			from: map[string]string{
				"X-Injected": "x\r\nSet-Cookie: stolen", "X-Newline": "x\n", "X-Return": "x\r", "X-Nul": "\x00", "X-Del": "\x7f",
				"X-Empty": "", "X-Tab": "a\tb", "X-Unicode": "größer",
			},
			want: http.Header{"X-Empty": {""}, "X-Tab": {"a\tb"}, "X-Unicode": {"größer"}},
		},
	} {
		t.Run(name, func(t *testing.T) {
			h := http.Header{}
			connect.Result{StatusCode: test.status, Headers: test.from}.CopyRefusalHeaders(h)
			assert.Equal(t, test.want, h)
		})
	}
}

// What is there already stays, unless the server says otherwise; and what goes out is one
// response with nothing smuggled in.
func TestRefusalIsOneCleanResponse(t *testing.T) {
	response := httptest.NewRecorder()
	response.Header().Set("Vary", "Origin")
	response.Header().Set("X-Reason", "ours")
	_, result, err := connect.ParseResult([]byte(`{"request_uid":"x","accept":false,"http_status_code":426,"response_headers":
		{"Upgrade":"v1.99.0","x-reason":"theirs","X-Evil":"x\r\n\r\nHTTP/1.1 101 Switching Protocols","X-Evil\r\nX-Worse":"x"}}`))
	require.NoError(t, err)
	result.CopyRefusalHeaders(response.Header())
	assert.Equal(t, http.Header{"Vary": {"Origin"}, "Upgrade": {"v1.99.0"}, "Connection": {"Upgrade"}, "X-Reason": {"theirs"}}, response.Header())
}

func FuzzResult(f *testing.F) {
	f.Add(capturedMessage(f, "gateway-upstream/002-down").GetData())
	f.Add([]byte(`{"accept":false,"http_status_code":426,"response_headers":{"Upgrade":"v2","Connection":"x","A b":"c","X":"\r\n"}}`))
	f.Add([]byte(`{"accept":false,"http_status_code":-9223372036854775808,"response_headers":{"":""}}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		_, result, _ := connect.ParseResult(data)
		status := result.RefusalStatus()
		require.GreaterOrEqual(t, status, 300)
		require.LessOrEqual(t, status, 599)
		require.Equal(t, status < 400, redirected(result), "it says where to")
		if !json.Valid(data) {
			require.Equal(t, connect.Result{}, result)
		}
		h := http.Header{}
		result.CopyRefusalHeaders(h)
		size := 0
		for name, values := range h {
			size += len(name) + len(values[0])
			require.Len(t, values, 1)
			require.True(t, httpguts.ValidHeaderFieldName(name), "%q", name)
			require.Equal(t, http.CanonicalHeaderKey(name), name)
			require.Regexp(t, "^(Retry-After|Www-Authenticate|Upgrade|Connection|Location|X-.*)$", name)
			if status != http.StatusUpgradeRequired {
				require.NotContains(t, []string{"Upgrade", "Connection"}, name)
			}
			for _, value := range values {
				require.True(t, httpguts.ValidHeaderFieldValue(value), "%q", value)
			}
		}
		require.LessOrEqual(t, size, 16<<10+len("ConnectionUpgrade"))
	})
}

func redirected(result connect.Result) bool {
	h := http.Header{}
	result.CopyRefusalHeaders(h)
	return h.Get("Location") != ""
}

// FuzzRequestUID compares with encoding/json, which is what most servers are made with: where we see
// a request_uid, it sees the same, and no other parser could see another.
func FuzzRequestUID(f *testing.F) {
	f.Add(capturedMessage(f, "gateway-upstream/001-up").GetData())
	for _, data := range []string{
		`{"a":{"request_uid":"a"},"b":[{"x":"b"},"}",-1.5e3],"request_uid":"x","d":null}`, `{"request_uid":"x","REQUEST_UID":"y"}`,
		`{"request_uid":"\ud83d\ude42\\\""}`, `{"request\u005fuid":"x"}`, `{"":[[[]]],"request_uid":"x","":{}}`, " {\"request_uid\" : \"x\"\r}\t",
	} {
		f.Add([]byte(data))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		requestUID, err := connect.RequestUID(data)
		var message struct {
			RequestUID string `json:"request_uid"`
		}
		if err == nil {
			require.NoError(t, json.Unmarshal(data, &message))
			require.Equal(t, message.RequestUID, requestUID)
			require.NotEmpty(t, requestUID)
			require.LessOrEqual(t, len(requestUID), 128)
		}
		var all map[string]json.RawMessage
		if json.Unmarshal(data, &all) != nil {
			require.Error(t, err)
			return
		}
		if value, ok := all["request_uid"]; ok && err != nil && json.Unmarshal(value, &message.RequestUID) == nil {
			// Then it is one of the reasons that it may have.
			require.Regexp(t, "two|another case|escape|empty|above 128|not a string", err.Error())
		}
	})
}

func BenchmarkNewQuestion(b *testing.B) {
	b.ReportAllocs()
	for b.Loop() {
		if _, err := connect.NewQuestion("192.0.2.1:1234", usual, nil); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkFrame(b *testing.B) {
	question, err := connect.NewQuestion("192.0.2.1:1234", usual, nil)
	require.NoError(b, err)
	b.ReportAllocs()
	for b.Loop() {
		question.Frame("01980000-0000-7000-8000-00000000000a")
	}
}

func BenchmarkParseResult(b *testing.B) {
	data := capturedMessage(b, "gateway-upstream/002-down").GetData()
	b.ReportAllocs()
	for b.Loop() {
		if _, _, err := connect.ParseResult(data); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkMessage(b *testing.B) {
	for _, name := range []string{"gateway-upstream/001-up", "bdot/003-up"} {
		message := encode(b, capturedMessage(b, name))
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				connect.Message(message)
			}
		})
	}
}
