package questions

import (
	"sync"
	"time"
)

const (
	// deafFor is how long a deaf server is left alone before it is tried with a question.
	deafFor = 10 * time.Minute

	// endsBeforeDeaf is at how many questions a server may end the link before it is deaf.
	endsBeforeDeaf = 2

	// sameEnd is the time within which links end by one crash of the server.
	sameEnd = time.Second

	// probeFor is for how long all others wait for what becomes of a server's first question.
	probeFor = 500 * time.Millisecond
)

// Server is what is known about the server as one to be asked. All books of a gateway share it, and
// it outlives them.
//
// Some servers do not understand questions: they answer them as something else, end the connection,
// or even crash. Such a server is deaf, and is asked no more, so that agents are told at once instead
// of waiting for ever and the server crashing again; after a while a single question tries it. A
// server that has answered one question is never deaf again. One that is merely silent is not
// either: it may be busy. Where nobody suffers for a mistake, since agents get in without a question, too,
// Silent says that it is, and Spare keeps questions from a server that ends links at them.
//
// So that it takes no more than two questions to find out, however many agents come at once, a server
// that has never answered is asked one question first, its probe. If its link ends, the next one is
// a probe, too. If nothing comes of it for a moment, the others go as well.
type Server struct {
	// mu guards what follows; see Book.mu for the order.
	mu       sync.Mutex
	answered bool      // a question, ever
	probing  bool      // if not: a probe was sent
	probedAt time.Time // when
	ends     int       // of links, at a question
	lastEnd  time.Time // the last of those
	deaf     bool
	trialAt  time.Time // if deaf: when a question may try it
	trying   bool      // if deaf: one does
	stated   bool      // that it knows questions; when it was tried in vain, since then
	spared   bool      // once it has ended links at questions, it is tried only when it has stated that
	hangsUp  bool      // it has
}

// NewServer returns a server that nobody has asked yet.
func NewServer() *Server { return &Server{} }

// Spare has the server, if it turns out to end links at questions, not be tried with one again before it has stated that
// it knows them: each try may be a crash. It returns s, and is to be called before anybody else knows of that.
func (s *Server) Spare() *Server {
	s.spared = true
	return s
}

// Deaf reports whether the server cannot be asked now. When it is time to try it, it can be.
func (s *Server) Deaf(now time.Time) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.deafLocked(now)
}

func (s *Server) deafLocked(now time.Time) bool {
	return s.deaf && (s.trying || now.Before(s.trialAt) || s.spared && s.hangsUp && !s.stated)
}

// IsDeaf reports whether the server is deaf, be it time to try it or not.
func (s *Server) IsDeaf() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.deaf
}

// mayAsk reports whether the server may be asked, and whether the question is the one to try it
// with; if so, tried has to be called once that is decided.
func (s *Server) mayAsk(now time.Time) (trial, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.deafLocked(now) {
		return false, false
	}
	s.trying = s.deaf
	return s.trying, true
}

// Stated notes that the server has stated that it knows questions.
func (s *Server) Stated() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.stated = true
}

// silent notes that a question was not answered for long, and reports whether the server is deaf from now on.
func (s *Server) silent(now time.Time) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return !s.stated && s.deafenLocked(now)
}

// Answered reports whether the server has ever answered a question.
func (s *Server) Answered() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.answered
}

// endsSoFar returns how many links have ended at a question.
func (s *Server) endsSoFar() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.ends
}

// mayFlow reports whether all questions may be sent now for which there is a place.
func (s *Server) mayFlow(now time.Time) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.mayFlowLocked(now)
}

func (s *Server) mayFlowLocked(now time.Time) bool {
	switch {
	case s.answered:
		return true
	case s.deaf:
		return s.trying
	}
	return s.probing && now.Sub(s.probedAt) >= probeFor
}

// mayNowSend reports whether questions may be sent now, or just one, as a probe, on a link that began
// after so many ends. One that was there at the last end may be about to end, too, for the same reason,
// whatever is asked there.
func (s *Server) mayNowSend(now time.Time, endsBefore int) (probe, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.mayFlowLocked(now):
		return false, true
	case s.deaf, s.probing, s.ends > endsBefore && now.Sub(s.lastEnd) < sameEnd:
		return false, false
	}
	s.probing, s.probedAt = true, now
	return true, true
}

// notProbed takes back that there is a probe: it was not sent, or its link ended by our doing.
func (s *Server) notProbed() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.probing = false
}

// endedAtProbe is endedAtQuestion for the link of a probe.
func (s *Server) endedAtProbe(now time.Time) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.probing = false
	if now.Sub(s.probedAt) >= probeFor { // others were sent as well
		return s.endedLocked(now)
	}
	return s.countEndLocked(now)
}

// heard notes that the server answers questions.
func (s *Server) heard() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.answered, s.deaf = true, false
}

// tried ends a trial: in vain, or, if not, without any result, so that the next question is another
// trial. It reports whether the server is deaf again.
func (s *Server) tried(inVain bool, now time.Time) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.trying = false
	if !s.deaf || !inVain { // not deaf: it has answered another question since
		return false
	}
	s.trialAt, s.stated = now.Add(deafFor), false
	return true
}

// hungUp notes that the server has ended the link of a trial.
func (s *Server) hungUp() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.hangsUp = true
}

// misunderstood notes that the server took a question for something else, and reports whether it is
// deaf from now on.
func (s *Server) misunderstood(now time.Time) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.deafenLocked(now)
}

// endedAtQuestion notes that the server ended a link while a question was unanswered, and reports
// whether it is deaf from now on. Links that end together end by one crash, at one question, even
// when each has some.
func (s *Server) endedAtQuestion(now time.Time) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.endedLocked(now)
}

func (s *Server) endedLocked(now time.Time) bool {
	if s.ends > 0 && now.Sub(s.lastEnd) < sameEnd {
		return false
	}
	return s.countEndLocked(now)
}

func (s *Server) countEndLocked(now time.Time) bool {
	s.lastEnd = now
	s.ends++
	if s.ends < endsBeforeDeaf || !s.deafenLocked(now) {
		return false
	}
	s.hangsUp, s.stated = true, false
	return true
}

func (s *Server) deafenLocked(now time.Time) bool {
	if s.answered || s.deaf {
		return false
	}
	s.deaf, s.trialAt = true, now.Add(deafFor)
	return true
}
