package main

import (
	"debug/buildinfo"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
)

// machine says what it was measured on, and what was measured.
func (b *bench) machine() []string {
	lines := []string{
		fmt.Sprintf("%s, %d cores, kernel %s, files per process: %d", model(), runtime.NumCPU(), firstLine("/proc/sys/kernel/osrelease"), maxFiles()),
		"bench and naive relay: " + runtime.Version() + "; gorilla/websocket with its defaults",
	}
	if build, err := buildinfo.ReadFile(b.gateway); err == nil && b.measures(nameGateway) {
		lines = append(lines, "gateway: "+build.GoVersion)
	}
	if program, err := haproxyProgram(); err == nil && b.measures(nameHAProxy) {
		out, _ := exec.Command(program, "-v").Output()
		version, _, _ := strings.Cut(string(out), "\n")
		lines = append(lines, version)
	}
	return lines
}

func (b *bench) measures(name string) bool {
	return slices.ContainsFunc(b.subjects, func(s *subject) bool { return s.name == name })
}

func model() string {
	text, _ := os.ReadFile("/proc/cpuinfo")
	for line := range strings.Lines(string(text)) {
		if name, value, found := strings.Cut(line, ":"); found && strings.TrimSpace(name) == "model name" {
			return strings.TrimSpace(value)
		}
	}
	return runtime.GOARCH
}

func firstLine(file string) string {
	text, _ := os.ReadFile(file)
	line, _, _ := strings.Cut(string(text), "\n")
	return line
}
