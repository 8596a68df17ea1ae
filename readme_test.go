package opampgateway

import (
	"flag"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/opampgateway/opampgateway/internal/ending"
	"github.com/opampgateway/opampgateway/internal/telemetry"
)

var update = flag.Bool("update", false, "write the tables of the README that come from the code")

// The README's tables of what is counted are those of the code.
func TestTablesOfREADME(t *testing.T) {
	before, err := os.ReadFile("README.md")
	require.NoError(t, err)
	readme := replaceTable(t, string(before), "outcomes", outcomeTable())
	readme = replaceTable(t, readme, "reasons", reasonTable(t))
	if *update {
		require.NoError(t, os.WriteFile("README.md", []byte(readme), 0o644))
		return
	}
	if readme != string(before) {
		t.Error(`README.md is out of date: run "make generate"`)
	}
}

// replaceTable puts table between the marks of that name.
func replaceTable(t *testing.T, text, name, table string) string {
	t.Helper()
	begin, end := "<!-- "+name+": made by make generate -->\n", "<!-- end of "+name+" -->"
	before, rest, found := strings.Cut(text, begin)
	require.True(t, found, begin)
	_, after, found := strings.Cut(rest, end)
	require.True(t, found, end)
	return before + begin + table + end + after
}

func outcomeTable() string {
	var b strings.Builder
	b.WriteString("| Outcome | How the request ended |\n|---|---|\n")
	for _, o := range telemetry.Outcomes {
		fmt.Fprintf(&b, "| `%s` | %s |\n", o.Outcome, o.What)
	}
	return b.String()
}

func reasonTable(t *testing.T) string {
	t.Helper()
	var b strings.Builder
	b.WriteString("| Reason | What happened | What the gateway does |\n|---|---|---|\n")
	for _, r := range telemetry.Reasons {
		does := []string{}
		if r.Then != "" {
			does = append(does, r.Then)
		}
		for _, cause := range ending.Causes {
			if cause.Reason == r.Reason {
				does = append(does, closes(cause))
			}
		}
		fmt.Fprintf(&b, "| `%s` | %s | %s |\n", r.Reason, r.What, strings.Join(does, "; "))
	}
	return b.String()
}

// closes says how a connection is ended for a cause.
func closes(c *ending.Cause) string {
	text := "ends the connection, without a close frame"
	if c.Code != 0 {
		text = fmt.Sprintf("closes the connection (%d, “%s”)", c.Code, c.Text)
	}
	if c.Late {
		text += " 5 to 15 s later"
	}
	if !c.Told {
		text += ", without telling the server"
	}
	return text
}
