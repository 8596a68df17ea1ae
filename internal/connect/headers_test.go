package connect_test

import (
	"encoding/json"
	"net/http"
	"strings"
	"testing"

	"github.com/open-telemetry/opamp-go/protobufs"
	"github.com/stretchr/testify/require"
	"golang.org/x/net/http/httpguts"
	"google.golang.org/protobuf/proto"

	"github.com/opampgateway/opampgateway/internal/connect"
)

// TestAgentHeaders has an agent come to its server with what is its own to say.
func TestAgentHeaders(t *testing.T) {
	question, err := connect.NewQuestion("192.0.2.1:1234", http.Header{
		"Authorization": {"Secret-Key right"}, "User-Agent": {"agent/1.0"}, "Opamp-Version": {"v0.23.0"}, "X-Two": {"a", "b"}, "Origin": {"https://agent.example"},
		"Connection": {"Upgrade, X-Hop", "x-other"}, "X-Hop": {"1"}, "X-Other": {"2"}, "Upgrade": {"websocket"}, "Keep-Alive": {"9"}, "Te": {"trailers"},
		"Transfer-Encoding": {"chunked"}, "Content-Length": {"7"}, "Host": {"elsewhere"}, "Proxy-Authorization": {"Basic"}, "Client-Cert": {"forged"},
		"Sec-Websocket-Key": {"key"}, "Sec-Websocket-Version": {"13"}, "Sec-Websocket-Extensions": {"x"}, "Sec-Websocket-Protocol": {"y"},
		"Bad Name": {"x"}, "X-Bad": {"a\r\nb: c"},
	}, nil)
	require.NoError(t, err)
	headers, err := question.AgentHeaders()
	require.NoError(t, err)
	require.Equal(t, http.Header{
		"Authorization": {"Secret-Key right"}, "User-Agent": {"agent/1.0"}, "Opamp-Version": {"v0.23.0"}, "X-Two": {"a", "b"}, "Origin": {"https://agent.example"},
	}, headers)

	headers, err = connect.Question(`{"headers":null}`).AgentHeaders()
	require.NoError(t, err)
	require.Equal(t, http.Header{"User-Agent": {""}}, headers, "otherwise the HTTP client would name itself")
	for _, bad := range []string{"", "[]", `{"headers":"Secret-Key right"}`, `{"headers":{"Authorization":"Secret-Key right"}}`, `{"headers":{"a":[1]}}`} {
		_, err = connect.Question(bad).AgentHeaders()
		require.Error(t, err, bad)
		require.NotContains(t, err.Error(), "right")
	}
}

// FuzzAgentHeaders has a gateway below say about its agents' headers what it likes.
func FuzzAgentHeaders(f *testing.F) {
	f.Add([]byte(`{"request_uid":"1","headers":{"Authorization":["x"],"connection":["a, b"],"A":["1"]}}`))
	f.Add([]byte(`{"headers":{"host":["x"],"SEC-WEBSOCKET-KEY":["x"],"X":["a\nb",""]},"HEADERS":{"Upgrade":["h2c"]}}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		headers, err := connect.Question(data).AgentHeaders()
		if err != nil {
			return
		}
		require.Contains(t, headers, "User-Agent")
		for name, values := range headers {
			require.True(t, httpguts.ValidHeaderFieldName(name), name)
			require.Equal(t, http.CanonicalHeaderKey(name), name)
			require.False(t, strings.HasPrefix(name, "Sec-Websocket-"), name)
			require.NotContains(t, []string{"Connection", "Upgrade", "Host", "Content-Length", "Transfer-Encoding", "Client-Cert"}, name)
			for _, value := range values {
				require.True(t, httpguts.ValidHeaderFieldValue(value))
			}
		}
	})
}

// TestRefusalOfAnUpgrade makes a verdict of a server's answer, and passes it on to a gateway below.
func TestRefusalOfAnUpgrade(t *testing.T) {
	result := connect.Refusal(http.StatusUpgradeRequired, http.Header{
		"Upgrade": {"OpAMP/v0.9.0"}, "Connection": {"Upgrade"}, "Www-Authenticate": {"Key", "Basic"}, "Content-Type": {"text/html"}, "Set-Cookie": {"a"},
		"X-Long": {strings.Repeat("x", 20<<10)},
	})
	want := map[string]string{"Upgrade": "OpAMP/v0.9.0", "Www-Authenticate": "Key, Basic"}
	require.Equal(t, connect.Result{StatusCode: http.StatusUpgradeRequired, Headers: want}, result)

	for requestUID, result := range map[string]connect.Result{"1": result, "2": {Accept: true}, `"`: {StatusCode: 42}} {
		frame := result.Frame(requestUID)
		require.Zero(t, frame[0], "header")
		var message protobufs.ServerToAgent
		require.NoError(t, proto.Unmarshal(frame[1:], &message))
		require.Equal(t, "connectResult", message.GetCustomMessage().GetType())
		uid, parsed, err := connect.ParseResult(message.GetCustomMessage().GetData())
		require.NoError(t, err)
		require.Equal(t, requestUID, uid)
		require.Equal(t, result.Accept, parsed.Accept)
		if result.Accept {
			require.Equal(t, http.StatusOK, parsed.StatusCode)
			continue
		}
		require.Equal(t, result.RefusalStatus(), parsed.StatusCode)
		if requestUID == "1" {
			require.Equal(t, want, parsed.Headers)
		}
		require.True(t, json.Valid(message.GetCustomMessage().GetData()))
	}
}
