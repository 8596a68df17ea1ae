package door

import (
	"bufio"
	"crypto/tls"
	"io"
	"net"
	"net/http"
	"testing"

	"github.com/stretchr/testify/require"
	"go.uber.org/zap"

	"github.com/opampgateway/opampgateway/internal/telemetry"
)

// BenchmarkLetIn is what it takes to let an agent in, its own end and the kernel included.
func BenchmarkLetIn(b *testing.B) {
	secure, trusting := certificates(b)
	for name, config := range map[string]*tls.Config{"plain": nil, "TLS": secure} {
		b.Run(name, func(b *testing.B) {
			l, err := net.Listen("tcp", "127.0.0.1:0")
			require.NoError(b, err)
			d := New(l, config, usual, zap.NewNop(), func(telemetry.Outcome) {})
			letIn := make(chan net.Conn)
			rules := NewRules(nil)
			server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if refusal := rules.Check(r); refusal != nil {
					refusal.Answer(w, r)
					return
				}
				if conn, err := Upgrade(w, r); err == nil {
					letIn <- conn
				}
			})}
			d.Prepare(server)
			served := make(chan error)
			go func() { served <- server.Serve(d) }()
			request := upgrade("User-Agent: agent/1.0", "Authorization: Bearer 0123456789abcdef0123456789abcdef")
			in := bufio.NewReader(nil)
			b.ReportAllocs()
			for b.Loop() {
				conn, err := net.Dial("tcp", l.Addr().String())
				require.NoError(b, err)
				if config != nil {
					conn = tls.Client(conn, trusting)
				}
				_, _ = io.WriteString(conn, request)
				in.Reset(conn)
				if _, err := in.ReadSlice('\n'); err != nil {
					b.Fatal(err)
				}
				agent := <-letIn
				agent.Close()
				conn.Close()
			}
			server.Close()
			<-served
		})
	}
}
