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

var update = flag.Bool("update", false, "write the tables of the docs that come from the code")

// TestTablesOfDocs has the tables of what is counted, and of what can be configured, be those of the code.
func TestTablesOfDocs(t *testing.T) {
	for _, table := range []struct {
		page, name, text string
	}{
		{"docs/metrics.md", "outcomes", outcomeTable()},
		{"docs/metrics.md", "reasons", reasonTable()},
		{"docs/configuration.md", "keys", keyTable(t)},
	} {
		before, err := os.ReadFile(table.page)
		require.NoError(t, err)
		page := replaceTable(t, string(before), table.name, table.text)
		switch {
		case page == string(before):
		case *update:
			require.NoError(t, os.WriteFile(table.page, []byte(page), 0o644))
		default:
			t.Errorf(`the table of %s in %s is out of date: run "make generate"`, table.name, table.page)
		}
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

func reasonTable() string {
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
