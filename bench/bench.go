package main

import (
	"fmt"
	"net"
	"net/url"
	"path/filepath"
	"slices"
	"time"
)

// bench is one run of the program.
type bench struct {
	gateway   string // the collector's program
	scenarios []*scenario
	work      string // directory for configurations, certificates and logs
	subjects  []*subject
	quick     bool
	repeat    int           // repetitions
	window    time.Duration // of each measurement under load
	settle    time.Duration // before memory is read
	admission string        // agent_admission of gateways that are started; "" for what it is by default
	results   *results
}

func (b *bench) certFile() string           { return filepath.Join(b.work, "cert.pem") }
func (b *bench) keyFile() string            { return filepath.Join(b.work, "key.pem") }
func (b *bench) pemFile() string            { return filepath.Join(b.work, "both.pem") } // as HAProxy wants it
func (b *bench) logFile(name string) string { return filepath.Join(b.work, name+".log") }

// choose is for numbers that a quick run has less of.
func (b *bench) choose(full, quick int) int {
	if b.quick {
		return quick
	}
	return full
}

// run repeats the scenarios. In each repetition, all subjects are measured one after the other,
// each time beginning with another one.
func (b *bench) run() {
	for repetition := range b.repeat {
		b.results.repetition = repetition
		for _, s := range b.scenarios {
			if repetition >= s.repeat && s.repeat > 0 {
				continue
			}
			for i := range b.subjects {
				subject := b.subjects[(i+repetition)%len(b.subjects)]
				if slices.Contains(s.without, subject.name) {
					continue
				}
				b.results.calibrate(s.name)
				progress("%d/%d %s: %s", repetition+1, b.repeat, s.name, subject.name)
				if err := s.run(b, subject); err != nil {
					b.results.fail(s.name, subject.name, err)
				}
			}
			b.results.calibrate(s.name)
		}
	}
}

func progress(format string, args ...any) {
	fmt.Printf("%s "+format+"\n", append([]any{time.Now().Format(time.TimeOnly)}, args...)...)
}

// listens reports whether somebody listens at a URL.
func listens(target string) error {
	u, err := url.Parse(target)
	if err != nil {
		return err
	}
	c, err := net.DialTimeout("tcp", u.Host, time.Second)
	if err != nil {
		return err
	}
	return c.Close()
}
