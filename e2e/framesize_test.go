package e2e

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/open-telemetry/opamp-go/protobufs"
	"github.com/stretchr/testify/require"
)

// randomChat returns a chat message of so many bytes that nothing can be mistaken for, and their sum.
func randomChat(size int) (*protobufs.AgentToServer, uint32) {
	m := chatOf(size)
	for i := 0; i < size; i += 4 {
		binary.LittleEndian.PutUint32(m.CustomMessage.Data[i:], rand.Uint32())
	}
	return m, crc32.ChecksumIEEE(m.CustomMessage.Data)
}

// Servers, clients and proxies limit the WebSocket frame and not only the message. A server and
// agents that take frames of 32 KiB exchange 200 KiB, and more, as if they were connected directly:
// an agent's library writes frames of 4 KiB.
func TestFrameLimit(t *testing.T) {
	t.Parallel()
	const agents, frameLimit = 6, 32 << 10
	sizes := []int{4 << 10, 16 << 10, 32 << 10, 64 << 10, 200 << 10, 200 << 10, 200 << 10, 4 << 20}
	server := startFleetServer(t, fleetServerOptions{echoes: true, frameLimit: frameLimit})
	metrics, showMetrics := withMetrics(t)
	gateway := startGateway(t, server.url(), showMetrics)
	gateway.wantLinks(t, 3)
	fleet := startFleetOf(t, agents, gateway.url(), 100, fleetOptions{timed: true, frameLimit: frameLimit})
	fleet.wantConnected(t, ceiling, 1)
	server.wantKnown(t, fleet.agents, ceiling)

	for _, size := range sizes {
		sums := map[*FleetAgent]uint32{}
		for _, a := range fleet.agents {
			var m *protobufs.AgentToServer
			m, sums[a] = randomChat(size)
			require.True(t, a.say(m), "agent %s cannot say %d bytes; %s", a.uid, size, fleet)
		}
		for _, a := range fleet.agents {
			number := a.number.Load()
			eventually(t, func() string { // the server's answer has all in it that it heard
				require.Equal(t, 3, server.opened(), "links that there were; they have ended by: %v", server.endings())
				a.mu.Lock()
				defer a.mu.Unlock()
				if !slices.ContainsFunc(a.answers, func(e echoed) bool { return e.number == number && e.sum == sums[a] }) {
					return fmt.Sprintf("agent %s has no answer to its %d bytes; ended connections: %v", a.uid, size, a.ends)
				}
				return ""
			})
		}
	}
	repeated, missing := server.wantHistory(t, fleet.agents)
	require.Zero(t, repeated+missing, "messages repeated or missing")
	fleet.wantBlameless(t)
	wantUnlost(t, server, metrics, 3)
}
