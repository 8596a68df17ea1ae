package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"time"
)

// A screen shows lines, one after another, and on a terminal a frame below them that is
// drawn anew each second. Where there is no terminal it is lines only, without escape
// codes. All writing is done by one goroutine: whoever has something to show never waits
// for a terminal that is paused.
type screen struct {
	out   io.Writer
	size  func() (width, height int) // nil where there is no terminal
	color bool
	wake  chan struct{} // capacity 1
	done  chan struct{} // closed when all is written

	mu      sync.Mutex // guards all below
	pending strings.Builder
	frame   func(width, height int) []string // nil: none
	drawn   int                              // lines of the frame now on the terminal
	closed  bool
}

func newScreen(out io.Writer, size func() (width, height int), color bool) *screen {
	s := &screen{out: out, size: size, color: color, wake: make(chan struct{}, 1), done: make(chan struct{})}
	go s.run()
	return s
}

// terminal says whether frames are shown.
func (s *screen) terminal() bool { return s.size != nil }

// run ends when the screen is closed.
func (s *screen) run() {
	defer close(s.done)
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		select {
		case <-s.wake:
		case <-tick.C:
		}
		s.mu.Lock()
		frame, closed := s.frame, s.closed
		s.mu.Unlock()

		// The frame is made without mu: it looks at things that show events here.
		var lines []string
		if frame != nil && s.terminal() {
			lines = frame(s.size())
		}
		_, _ = io.WriteString(s.out, s.next(lines)) // nobody is left to tell
		if closed {
			return
		}
	}
}

// next returns what to write: new lines go where the frame was, then comes the new frame.
func (s *screen) next(frame []string) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	var b strings.Builder
	if s.drawn > 0 {
		fmt.Fprintf(&b, "\r\x1b[%dA\x1b[J", s.drawn)
	}
	b.WriteString(s.pending.String())
	s.pending.Reset()
	for _, line := range frame {
		b.WriteString(line)
		b.WriteByte('\n')
	}
	s.drawn = len(frame)
	return b.String()
}

// say shows lines that stay.
func (s *screen) say(lines ...string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, line := range lines {
		s.pending.WriteString(line)
		s.pending.WriteByte('\n')
	}
	s.wakeLocked()
}

// happened shows an event.
func (s *screen) happened(e event) {
	who, text := fmt.Sprintf("%-8s", e.who), e.text
	if e.loud {
		who, text = s.paint(red, who), s.paint(red, text)
	}
	s.say("  " + s.paint(dim, e.at.Format(time.TimeOnly)) + "  " + who + " " + text)
}

// show has the frame drawn from now on, nil ends it.
func (s *screen) show(frame func(width, height int) []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.frame = frame
	s.wakeLocked()
}

// enterPressed is told when the user has pressed Enter, which moved the cursor down.
func (s *screen) enterPressed() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.drawn > 0 {
		s.drawn++
	}
}

// step shows that something is under way, and how it ended.
func (s *screen) step(what string, do func() (string, error)) error {
	start := time.Now()
	s.show(func(int, int) []string {
		return []string{fmt.Sprintf("… %s (%s)", what, time.Since(start).Round(time.Second))}
	})
	detail, err := do()
	s.show(nil)
	took := time.Since(start).Round(10 * time.Millisecond)
	if err != nil {
		outcome := "failed"
		if errors.Is(err, context.Canceled) {
			outcome = "interrupted"
		}
		s.say(fmt.Sprintf("%s … %s (%s)", what, s.paint(red, outcome), took))
		return fmt.Errorf("%s: %w", what, err)
	}
	s.say(fmt.Sprintf("%s … %s (%s)%s", what, s.paint(green, "ok"), took, because(detail)))
	return nil
}

// close shows what is left, without a frame.
func (s *screen) close() {
	s.mu.Lock()
	s.frame, s.closed = nil, true
	s.wakeLocked()
	s.mu.Unlock()
	<-s.done
}

func (s *screen) wakeLocked() {
	select {
	case s.wake <- struct{}{}:
	default: // it is awake, or will be
	}
}

func (s *screen) paint(c style, text string) string {
	if !s.color {
		return text
	}
	return c.paint(text)
}
