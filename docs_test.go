package opampgateway

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"go.opentelemetry.io/collector/confmap"
)

// page is one of what people read.
type page struct {
	name, text string
	prose      string // text without what stands in fences
}

var fence = regexp.MustCompile("(?ms)^ *```([a-z]*)\n(.*?\n) *```$")

// pages returns all of them.
func pages(t *testing.T) (all []page) {
	t.Helper()
	for _, pattern := range []string{"*.md", "docs/*.md", "*/README.md"} {
		names, err := filepath.Glob(pattern)
		require.NoError(t, err)
		for _, name := range names {
			if name == filepath.Join("build", "README.md") {
				continue
			}
			text, err := os.ReadFile(name)
			require.NoError(t, err)
			all = append(all, page{filepath.ToSlash(name), string(text), fence.ReplaceAllString(string(text), "")})
		}
	}
	require.Greater(t, len(all), 10)
	return all
}

// fences returns what stands in fences of a language.
func (p page) fences(language string) (found []string) {
	for _, f := range fence.FindAllStringSubmatch(p.text, -1) {
		if f[1] == language {
			found = append(found, f[2])
		}
	}
	return found
}

var (
	links   = regexp.MustCompile(`\]\(([^()\s]+)\)`)
	heading = regexp.MustCompile(`(?m)^#+ +(.*?) *$`)
)

// anchors returns what a link into the page can name, as GitHub makes it of the headings.
func (p page) anchors() (all []string) {
	for _, h := range heading.FindAllStringSubmatch(p.prose, -1) {
		text := links.ReplaceAllString(h[1], "")
		all = append(all, strings.Map(func(r rune) rune {
			switch {
			case r == ' ':
				return '-'
			case r == '-', r == '_', 'a' <= r && r <= 'z', '0' <= r && r <= '9', r > 127:
				return r
			case 'A' <= r && r <= 'Z':
				return r + 'a' - 'A'
			}
			return -1
		}, text))
	}
	return all
}

// TestLinksOfDocs follows every link from a page to a file of the project, or to a heading.
func TestLinksOfDocs(t *testing.T) {
	known := map[string]page{}
	for _, p := range pages(t) {
		known[p.name] = p
	}
	for _, p := range known {
		for _, l := range links.FindAllStringSubmatch(p.prose, -1) {
			if strings.Contains(l[1], "://") {
				continue
			}
			path, anchor, _ := strings.Cut(l[1], "#")
			target := p.name
			if path != "" {
				target = filepath.ToSlash(filepath.Join(filepath.Dir(p.name), filepath.FromSlash(path)))
				_, err := os.Stat(target)
				require.NoError(t, err, "%s: link to %s", p.name, l[1])
			}
			if to, ok := known[target]; ok && anchor != "" {
				require.Contains(t, to.anchors(), anchor, "%s: link to %s", p.name, l[1])
			}
		}
	}
}

// makeCommand is a command to copy: at the start of a line in a fence, or between backquotes.
var makeCommand = regexp.MustCompile("(?m)(?:^|`)make ([a-z][a-z-]*)(?: *[A-Z#`]| {2}|$)")

// TestExamplesOfDocs loads every example of a configuration, and asks the Makefile for every target.
func TestExamplesOfDocs(t *testing.T) {
	makefile, err := os.ReadFile("Makefile")
	require.NoError(t, err)
	var targets []string
	for _, target := range regexp.MustCompile("(?m)^([a-z0-9-]+):").FindAllSubmatch(makefile, -1) {
		targets = append(targets, string(target[1]))
	}
	loaded := 0
	for _, p := range pages(t) {
		for i, text := range p.fences("yaml") {
			retrieved, err := confmap.NewRetrievedFromYAML([]byte(text))
			require.NoError(t, err, "%s: example %d", p.name, i)
			conf, err := retrieved.AsConf()
			if err != nil {
				continue // a list
			}
			extensions, err := conf.Sub("extensions")
			if err != nil {
				continue // a manifest
			}
			for name := range extensions.ToStringMap() {
				if name != "opampgateway" && !strings.HasPrefix(name, "opampgateway/") {
					continue
				}
				loaded++
				t.Run(fmt.Sprint(p.name, " ", i, " ", name), func(t *testing.T) {
					conf, err := extensions.Sub(name)
					require.NoError(t, err)
					_, err = load(conf)
					require.NoError(t, err)
				})
			}
		}
		for _, target := range makeCommand.FindAllStringSubmatch(p.prose+strings.Join(p.fences("sh"), ""), -1) {
			require.Contains(t, targets, target[1], "%s: make %s", p.name, target[1])
		}
	}
	require.Greater(t, loaded, 5)
}

// TestTestsOfDocs looks for every test that a page names, in the file that it links to if it does; each line of a
// table of the security page that has a column for tests names one.
func TestTestsOfDocs(t *testing.T) {
	tests := map[string][]string{} // the files that have one, by name
	require.NoError(t, filepath.WalkDir(".", func(path string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && (path == "build" || strings.HasPrefix(d.Name(), ".") && path != "."):
			return filepath.SkipDir
		case !strings.HasSuffix(path, "_test.go"):
			return nil
		}
		text, err := os.ReadFile(path)
		for _, f := range regexp.MustCompile(`(?m)^func ((?:Test|Fuzz)\w+)\(`).FindAllSubmatch(text, -1) {
			tests[string(f[1])] = append(tests[string(f[1])], filepath.ToSlash(path))
		}
		return err
	}))
	named := 0
	for _, p := range pages(t) {
		for _, name := range regexp.MustCompile("`((?:Test|Fuzz)[A-Z]\\w+)`(?:\\]\\(([^()]+)\\))?").FindAllStringSubmatch(p.text, -1) {
			named++
			require.NotEmpty(t, tests[name[1]], "%s names %s", p.name, name[1])
			if name[2] != "" {
				file := filepath.ToSlash(filepath.Join(filepath.Dir(p.name), filepath.FromSlash(name[2])))
				require.Contains(t, tests[name[1]], file, "%s links %s", p.name, name[1])
			}
		}
		if p.name != "docs/security.md" {
			continue
		}
		withTest := false
		for line := range strings.Lines(p.text) {
			switch cells := strings.Split(strings.TrimSpace(line), "|"); {
			case len(cells) < 4:
				withTest = false
			case slices.ContainsFunc(cells, func(c string) bool { return strings.TrimSpace(c) == "Test" }):
				withTest = true
			case withTest && !strings.HasPrefix(line, "|---"):
				require.Regexp(t, "`(Test|Fuzz)", cells[len(cells)-2], line)
			}
		}
	}
	require.Greater(t, named, 20)
}

// TestMetricsOfDocs has the page of metrics explain each that there is.
func TestMetricsOfDocs(t *testing.T) {
	generated, err := os.ReadFile("documentation.md")
	require.NoError(t, err)
	text, err := os.ReadFile("docs/metrics.md")
	require.NoError(t, err)
	metrics := regexp.MustCompile(`(?m)^### otelcol_(\S+)$`).FindAllStringSubmatch(string(generated), -1)
	require.NotEmpty(t, metrics)
	for _, metric := range metrics {
		require.Regexp(t, "(?m)^\\| `"+regexp.QuoteMeta(metric[1])+"` ", string(text))
	}
}
