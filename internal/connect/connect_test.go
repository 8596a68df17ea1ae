package connect_test

import (
	"bytes"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

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

		question, err := connect.NewQuestion(want.RemoteAddress, want.Headers)
		require.NoError(t, err)
		frame, err := question.Frame(want.RequestUID)
		require.NoError(t, err)
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
	question, err := connect.NewQuestion(`[::1%eth"0]:4320`, headers)
	require.NoError(t, err)
	frame, err := question.Frame("request-1")
	require.NoError(t, err)
	assert.Equal(t, connectJSON{"request-1", `[::1%eth"0]:4320`, headers}, wantQuestion(t, frame))

	// Bytes that are not text cannot stand in JSON. They may be refused by the server, but must
	// not keep the agent from being asked about.
	question, err = connect.NewQuestion("", http.Header{"X-Latin1": {"gr\xf6\xdfer"}})
	require.NoError(t, err)
	frame, err = question.Frame("request-2")
	require.NoError(t, err)
	assert.Equal(t, http.Header{"X-Latin1": {"gr\ufffd\ufffder"}}, wantQuestion(t, frame).Headers)
}

// An agent that lost its link is introduced again, with the question asked before.
func TestQuestionCanBeAskedAgain(t *testing.T) {
	question, err := connect.NewQuestion("192.0.2.1:1234", http.Header{"Authorization": {"dummy"}})
	require.NoError(t, err)
	before := bytes.Clone(question)
	for _, requestUID := range []string{"request-1", "a-second-and-longer-request", "3"} {
		frame, err := question.Frame(requestUID)
		require.NoError(t, err)
		asked := wantQuestion(t, frame)
		assert.Equal(t, requestUID, asked.RequestUID)
		assert.Equal(t, "192.0.2.1:1234", asked.RemoteAddress)
		assert.Equal(t, http.Header{"Authorization": {"dummy"}}, asked.Headers)
	}
	assert.Equal(t, before, []byte(question))
}

func TestRequestUIDTiesAnswersToQuestions(t *testing.T) {
	asked, err := connect.RequestUID(capturedMessage(t, "gateway-upstream/001-up").GetData())
	require.NoError(t, err)
	answered, err := connect.RequestUID(capturedMessage(t, "gateway-upstream/002-down").GetData())
	require.NoError(t, err)
	assert.Equal(t, asked, answered)
	assert.Len(t, asked, 36)

	for _, data := range []string{
		"", "{", "[]", "null", "{}", `{"request_uid":""}`, `{"request_uid":7}`, `{"request_uid":null}`,
		`{"request_uid":"x"`, `{"request_uid":"x"}}`, `"x"`,
	} {
		requestUID, err := connect.RequestUID([]byte(data))
		require.Error(t, err, data)
		assert.Empty(t, requestUID, data)
	}
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
		"not those of one connection": {
			status: 426,
			from: map[string]string{
				"Connection": "close", "keep-alive": "timeout=5", "Proxy-Authenticate": "Basic", "PROXY-AUTHORIZATION": "x",
				"Proxy-Connection": "close", "TE": "trailers", "trailer": "X", "Transfer-Encoding": "chunked",
				"content-length": "1000000", "X-Kept": "yes",
			},
			want: http.Header{"X-Kept": {"yes"}},
		},
		"no invalid names": {
			status: 401,
			from: map[string]string{
				"": "x", "X Space": "x", "X:Colon": "x", "X\r\nSet-Cookie": "x", "Größe": "x", "X-Nul\x00": "x",
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
		require.GreaterOrEqual(t, status, 400)
		require.LessOrEqual(t, status, 599)
		if !json.Valid(data) {
			require.Equal(t, connect.Result{}, result)
		}
		h := http.Header{}
		result.CopyRefusalHeaders(h)
		for name, values := range h {
			require.True(t, httpguts.ValidHeaderFieldName(name), "%q", name)
			require.Equal(t, http.CanonicalHeaderKey(name), name)
			require.NotContains(t, []string{"Keep-Alive", "Transfer-Encoding", "Trailer", "Te", "Content-Length"}, name)
			if status != http.StatusUpgradeRequired {
				require.NotContains(t, []string{"Upgrade", "Connection"}, name)
			}
			for _, value := range values {
				require.True(t, httpguts.ValidHeaderFieldValue(value), "%q", value)
			}
		}
	})
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
