//go:build unix

package main

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// script makes a stand-in for a collector.
func script(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "collector")
	if err := os.WriteFile(path, []byte("#!/bin/sh\n"+text+"\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestProcessStops(t *testing.T) {
	log := filepath.Join(t.TempDir(), "log")
	p, err := startCollector("alice", script(t, "exec sleep 600"), "config", log, "key", nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.stop(t.Context()); err != nil {
		t.Error(err)
	}
	if !p.ended() {
		t.Error("it is still there")
	}
}

func TestProcessKilledInAHurry(t *testing.T) {
	log := filepath.Join(t.TempDir(), "log")
	p, err := startCollector("alice", script(t, "trap '' TERM; while :; do sleep 600; done"), "config", log, "key", nil)
	if err != nil {
		t.Fatal(err)
	}
	hurry, cancel := context.WithCancel(t.Context())
	cancel()
	_ = p.stop(hurry) // its error depends on whether the shell had come to the trap
	if !p.ended() {
		t.Error("it is still there")
	}
}

func TestProcessTellsItsEnd(t *testing.T) {
	log := filepath.Join(t.TempDir(), "log")
	p, err := startCollector("alice", script(t, `echo "$1 $2"; echo "key: $OPAMP_SECRET_KEY" >&2; exit 3`), "config.yaml", log, "the-key", nil)
	if err != nil {
		t.Fatal(err)
	}
	<-p.done
	want := "exit status 3; the end of its log:\n  | --config config.yaml\n  | key: the-key"
	if got := p.obituary(); got != want {
		t.Errorf("its end is told as %q, want %q", got, want)
	}
	if err := p.stop(t.Context()); err != nil {
		t.Errorf("stopping what has ended: %v", err)
	}
}

func TestLastLines(t *testing.T) {
	for text, want := range map[string]string{
		"":                "",
		"\n":              "",
		"one\ntwo\n":      "one|two",
		"one\ntwo\nthree": "two|three",
	} {
		if got := strings.Join(lastLines([]byte(text), 2), "|"); got != want {
			t.Errorf("the last lines of %q are %q, want %q", text, got, want)
		}
	}
}

// A demo whose gateway fails says why, ends what it started and leaves nothing behind.
func TestDemoWithAFailingGateway(t *testing.T) {
	t.Setenv("TMPDIR", t.TempDir())
	var out bytes.Buffer
	s := newScreen(&out, nil, false)
	o := options{collector: script(t, "echo no such extension; exit 1"), clients: 1, timeout: time.Minute}
	err := runDemo(t.Context(), t.Context(), o, s)
	s.close()
	if err == nil || !strings.Contains(err.Error(), "gateway (pid ") || !strings.Contains(err.Error(), "| no such extension") {
		t.Errorf("it ended with %v", err)
	}
	if !strings.Contains(out.String(), "starting the gateway, with 3 links to the server … failed") {
		t.Errorf("it showed\n%s", &out)
	}
	if left, err := os.ReadDir(os.TempDir()); err != nil || len(left) != 0 {
		t.Errorf("it left %v, %v", left, err)
	}
}

// A demo that is interrupted ends without an error, unless something was expected of it.
func TestDemoInterrupted(t *testing.T) {
	for _, expected := range []bool{false, true} {
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		s := newScreen(&bytes.Buffer{}, nil, false)
		o := options{collector: script(t, "exec sleep 600"), clients: 1, timeout: time.Minute, exitAfterAck: expected}
		err := runDemo(ctx, t.Context(), o, s)
		s.close()
		if (err != nil) != expected {
			t.Errorf("with -exit-after-ack=%v it ended with %v", expected, err)
		}
	}
}

func TestNoCollector(t *testing.T) {
	err := runDemo(t.Context(), t.Context(), options{collector: "/nowhere/collector"}, nil)
	if err == nil || !strings.Contains(err.Error(), "make collector") {
		t.Errorf("it ended with %v", err)
	}
}
