package opampgateway

import (
	"errors"
	"fmt"
	"net/http"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/opampgateway/opampgateway/internal/socket"
)

const (
	// paceStep is how far apart the links of one gateway are dialed, so that a load balancer sees one
	// after the other when it chooses, and a server that is back is not overrun.
	paceStep = 50 * time.Millisecond

	// paceAll is how long that may take for all links. It is within the patience of their agents.
	paceAll = patience / 2
)

// pace keeps the attempts to dial links apart.
type pace struct {
	step time.Duration

	mu   sync.Mutex
	free time.Time // when the next attempt may begin
}

func newPace(connections int) *pace {
	return &pace{step: min(paceStep, paceAll/time.Duration(connections))}
}

// next returns how long an attempt has to wait that is to begin now.
func (p *pace) next() time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now()
	if p.free.Before(now) {
		p.free = now
	}
	wait := p.free.Sub(now)
	p.free = p.free.Add(p.step)
	return wait
}

// askedToWait returns how long a server that refused a link wants to be left alone.
func askedToWait(err error) time.Duration {
	if answer, ok := errors.AsType[*socket.HandshakeError](err); ok {
		return parseRetryAfter(answer.RetryAfter)
	}
	return 0
}

// explainDial adds to the error of an attempt to dial which setting it has to do with.
func (p *upstreamPool) explainDial(err error) error {
	answer, answered := errors.AsType[*socket.HandshakeError](err)
	refused := answered && answer.Proxy == "" && (answer.StatusCode == http.StatusUnauthorized || answer.StatusCode == http.StatusForbidden)
	switch {
	case errors.Is(err, socket.ErrRedirect):
		return fmt.Errorf("%w; see server::endpoint", err)
	case refused && answer.Withheld && len(p.cfg.Server.Headers) > 0:
		return fmt.Errorf("%w: it was not sent server::headers, which are for the host of server::endpoint", err)
	case refused:
		return fmt.Errorf("%w: it does not take the gateway's own credentials, see server::headers", err)
	}
	return err
}

// redirectedTo says in the log where the server has sent a link, if it has.
func redirectedTo(place string) zap.Field {
	if place == "" {
		return zap.Skip()
	}
	return zap.String("redirected_to", place)
}
