package opampgateway

import (
	"bytes"
	"net/http"
	"testing"
	"time"

	"github.com/open-telemetry/opamp-go/protobufs"
	"github.com/stretchr/testify/require"

	"github.com/opampgateway/opampgateway/internal/telemetry"
)

// postedBy returns what a poller has posted at the server.
func (o *postOffice) postedBy(p *poller) (all []*posted) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, post := range o.all {
		if bytes.Equal(post.InstanceUid, p.uid) {
			all = append(all, post)
		}
	}
	return all
}

// TestPollsAreForwarded has agents over plain HTTP at a server over plain HTTP: each poll is one post, with the agent's own
// headers, and its answer that of the server. Nothing is posted for an agent that polls itself.
func TestPollsAreForwarded(t *testing.T) {
	playHTTP(t, func(t *testing.T, s *stage, o *postOffice) {
		alice := s.poller("alice", "X-Key", "hers")
		o.answers(func(w http.ResponseWriter, _ *http.Request, p *posted) bool {
			answerWith(w, &protobufs.ServerToAgent{InstanceUid: p.InstanceUid, Flags: p.SequenceNum})
			return true
		})
		wantMessage(t, &protobufs.ServerToAgent{InstanceUid: alice.uid, Flags: 1}, alice.poll(alice.describe(1)))
		const polls = 45 // half an hour
		for sequence := 2; sequence <= polls; sequence++ {
			time.Sleep(40 * time.Second) // less often than it would be polled for
			wantMessage(t, &protobufs.ServerToAgent{InstanceUid: alice.uid, Flags: uint64(sequence)}, alice.poll(alice.say(sequence)))
		}
		posts := o.postedBy(alice)
		require.Len(t, posts, polls)
		for i, p := range posts {
			require.EqualValues(t, i+1, p.SequenceNum)
			require.Equal(t, "hers", p.header.Get("X-Key"))
			require.Equal(t, "key of alice", p.header.Get("Authorization"))
		}
		s.wantFaults(nil)
	})
}

// TestPollsRefusedByPosts has such a server refuse an agent: that is the answer to its poll, and to the next ones.
func TestPollsRefusedByPosts(t *testing.T) {
	playHTTP(t, func(t *testing.T, s *stage, o *postOffice) {
		alice, bob := s.poller("alice"), s.poller("bob")
		o.answers(func(w http.ResponseWriter, r *http.Request, _ *posted) bool {
			if r.Header.Get("Authorization") != "key of alice" {
				return false
			}
			w.Header().Set("WWW-Authenticate", "Bearer")
			w.WriteHeader(http.StatusUnauthorized)
			return true
		})
		for sequence := 1; sequence <= 2; sequence++ {
			got := alice.want(http.StatusUnauthorized, alice.describe(sequence))
			require.Equal(t, "Bearer", got.Header.Get("WWW-Authenticate"))
		}
		require.Len(t, o.postedBy(alice), 1, "as the server has said before")
		wantMessage(t, bob.empty(), bob.poll(bob.describe(1)))
		s.wantFaults(map[telemetry.Reason]int{telemetry.ReasonAgentRefused: 1, telemetry.ReasonFrameLost: 1})
	})
}
