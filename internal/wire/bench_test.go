package wire_test

import (
	"fmt"
	"testing"

	"github.com/open-telemetry/opamp-go/protobufs"
	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/proto"

	"github.com/opampgateway/opampgateway/internal/wire"
)

// largeReport returns an agent's first report of about size bytes, nearly all of them its
// effective configuration.
func largeReport(tb testing.TB, size int) []byte {
	tb.Helper()
	files := map[string]*protobufs.AgentConfigFile{}
	for i := range 8 {
		files[fmt.Sprintf("part-%d.yaml", i)] = &protobufs.AgentConfigFile{Body: make([]byte, size/8)}
	}
	var message protobufs.AgentToServer
	require.NoError(tb, proto.Unmarshal(captured(tb, "opampextension/001-up")[1:], &message))
	message.EffectiveConfig = &protobufs.EffectiveConfig{ConfigMap: &protobufs.AgentConfigMap{ConfigMap: files}}
	frame, err := proto.MarshalOptions{}.MarshalAppend([]byte{0}, &message)
	require.NoError(tb, err)
	return frame
}

// BenchmarkScan is what the gateway does with every frame, next to what a gateway that decodes
// its frames would do.
func BenchmarkScan(b *testing.B) {
	for _, frame := range []struct {
		name  string
		bytes []byte
	}{
		{"heartbeat", captured(b, "opampextension/011-up")},
		{"report", captured(b, "opampextension/001-up")},
		{"report-100KiB", largeReport(b, 100<<10)},
		{"report-4MiB", largeReport(b, 4<<20)},
	} {
		b.Run(frame.name+"/scan", func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if _, err := wire.ScanAgentToServer(frame.bytes); err != nil {
					b.Fatal(err)
				}
			}
		})
		b.Run(frame.name+"/decode", func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				var message protobufs.AgentToServer
				if err := proto.Unmarshal(frame.bytes[1:], &message); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkParseUID(b *testing.B) {
	b.ReportAllocs()
	for b.Loop() {
		if uid, err := wire.ParseUID(alice); err != nil || !uid.Is(alice) {
			b.Fatal(err)
		}
	}
}
