package e2e

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// noPipelines is for examples that leave them to the reader.
const noPipelines = `
receivers: {nop: }
exporters: {nop: }
`

// Every example of a collector's configuration is taken by the collector as it stands, or with a pipeline that does nothing.
func TestExamplesOfDocs(t *testing.T) {
	for _, name := range []string{"OPAMP_SECRET_KEY", "AGENTS_TOKEN", "OPERATORS"} {
		t.Setenv(name, "abc:def")
	}
	pages, err := filepath.Glob("../docs/*.md")
	require.NoError(t, err)
	tried := 0
	for _, page := range append(pages, "../README.md") {
		for _, block := range regexp.MustCompile("(?ms)^```yaml\n(.*?\n)```$").FindAllStringSubmatch(string(read(t, page)), -1) {
			text := block[1]
			service := regexp.MustCompile(`(?m)^  extensions: \[.*\]$`)
			if !strings.Contains(text, "opampgateway") || !service.MatchString(text) {
				continue // a part of one; the unit tests load what is the gateway's
			}
			if !strings.Contains(text, "pipelines:") {
				text = service.ReplaceAllString(text, "$0\n  pipelines: {logs: {receivers: [nop], exporters: [nop]}}") + noPipelines
			}
			if !regexp.MustCompile(`(?m)^  opampgateway:`).MatchString(text) {
				text = strings.Replace(text, "extensions:\n", "extensions:\n  opampgateway: {server: {endpoint: wss://opamp.example.com/v1/opamp}}\n", 1)
			}
			tried++
			path := filepath.Join(t.TempDir(), "config.yaml")
			require.NoError(t, os.WriteFile(path, []byte(text), 0o600))
			p := startProcess(t, "validate", collectorProgram(t), "validate", "--config", path, "--feature-gates=+extension.healthcheck.useComponentStatus")
			code, _ := p.wantExit(t)
			require.Zero(t, code, "%s:\n%s\n%s", page, text, p.log.String())
		}
	}
	require.GreaterOrEqual(t, tried, 2)
}
