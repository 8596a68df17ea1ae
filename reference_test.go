package opampgateway

import (
	"fmt"
	"go/ast"
	"go/parser"
	gotoken "go/token"
	"reflect"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.opentelemetry.io/collector/confmap"
)

// The reference of the configuration is made of config.go: of its comments, of the defaults, and of what Validate says
// about values that it refuses. What a reload does when a key changes is written here, and held against the code.

// When a change of one key holds, after a reload.
const (
	whenLinks     = "links"     // agents come to other links
	whenEnds      = "ends"      // all agents are let go
	whenMoves     = "moves"     // the listener moves
	whenAtOnce    = "at once"   // for all
	whenNewcomers = "newcomers" // for those that come from then on
)

// whenChanged says of each key when a change of it holds.
var whenChanged = map[string]string{
	"server.endpoint":                     whenLinks,
	"server.headers":                      whenLinks,
	"server.tls":                          whenLinks,
	"server.connections":                  whenLinks,
	"server.agent_id":                     whenLinks,
	"server.retry":                        whenAtOnce,
	"server.keep_alive.interval":          whenAtOnce,
	"server.keep_alive.timeout":           whenAtOnce,
	"server.agent_admission":              whenEnds,
	"server.verify_connections":           whenAtOnce,
	"server.admission_timeout":            whenNewcomers,
	"server.grace_period":                 whenAtOnce,
	"listener":                            whenEnds,
	"listener.endpoint":                   whenMoves,
	"agents.keep_alive.interval":          whenAtOnce,
	"agents.keep_alive.timeout":           whenAtOnce,
	"agents.send_disconnect":              whenAtOnce,
	"agents.send_disconnect_for_gateways": whenAtOnce,
	"agents.allow_gateways":               whenAtOnce,
	"agents.max_connections":              whenNewcomers,
	"agents.max_instance_uids":            whenAtOnce,
	"agents.max_request_headers":          whenNewcomers,
	"agents.max_request_header_size":      whenNewcomers,
	"agents.max_queue_size":               whenNewcomers,
	"agents.write_timeout":                whenNewcomers,
	"max_message_size":                    whenEnds,
	"max_buffered_size":                   whenEnds,
	"reload_grace":                        whenAtOnce,
	"status":                              whenAtOnce,
}

// defaultText is for defaults that their value does not tell.
var defaultText = map[string]string{
	"server.endpoint":        "required",
	"server.headers":         "none",
	"server.tls":             "the system's authorities",
	"server.agent_id":        "the collector's `service.instance.id`",
	"listener":               "no TLS, no `auth`",
	"status":                 "off",
	"agents.max_connections": "from the limit of open files",
}

// settingsOfCollector are those of a kind that the Collector documents.
var settingsOfCollector = map[string]string{
	"server.tls":   "[TLS client settings](https://github.com/open-telemetry/opentelemetry-collector/blob/main/config/configtls/README.md)",
	"server.retry": "[Back-off settings](https://github.com/open-telemetry/opentelemetry-collector/blob/main/config/configretry/README.md)",
	"listener":     "[HTTP server settings](https://github.com/open-telemetry/opentelemetry-collector/blob/main/config/confighttp/README.md)",
	"status":       "[HTTP server settings](https://github.com/open-telemetry/opentelemetry-collector/blob/main/config/confighttp/README.md); [the page](status-page.md)",
}

// setting is one key of the configuration.
type setting struct {
	key     string // as in a path, with dots
	comment string // of its field
	group   bool   // it has keys of ours below it
	value   reflect.Value
}

// settingsOf returns the keys of cfg in the order of config.go.
func settingsOf(t *testing.T, cfg *Config) []setting {
	t.Helper()
	comments := commentsOfConfig(t)
	var all []setting
	var walk func(path string, v reflect.Value)
	walk = func(path string, v reflect.Value) {
		for i := range v.NumField() {
			field := v.Type().Field(i)
			name, _, _ := strings.Cut(field.Tag.Get("mapstructure"), ",")
			if name == "" {
				continue
			}
			key := strings.TrimPrefix(path+"."+name, ".")
			comment := comments[v.Type().Name()+"."+field.Name]
			text, begins := strings.CutPrefix(comment, field.Name+" ")
			require.True(t, begins, "the comment of %s.%s in config.go begins with another name", v.Type().Name(), field.Name)
			group := field.Type.Kind() == reflect.Struct && field.Type.PkgPath() == v.Type().PkgPath()
			all = append(all, setting{key: key, comment: "`" + name + "` " + text, group: group, value: v.Field(i)})
			if group {
				walk(key, v.Field(i))
			}
		}
	}
	walk("", reflect.ValueOf(cfg).Elem())
	return all
}

// commentsOfConfig returns the comments in config.go: of fields by type and name, and of constants by type, together.
func commentsOfConfig(t *testing.T) map[string]string {
	t.Helper()
	file, err := parser.ParseFile(gotoken.NewFileSet(), "config.go", nil, parser.ParseComments)
	require.NoError(t, err)
	comments := map[string]string{}
	plain := func(doc *ast.CommentGroup) string { return strings.Join(strings.Fields(doc.Text()), " ") }
	ast.Inspect(file, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.TypeSpec:
			if s, ok := n.Type.(*ast.StructType); ok {
				for _, field := range s.Fields.List {
					for _, name := range field.Names {
						comments[n.Name.Name+"."+name.Name] = plain(field.Doc)
					}
				}
			}
		case *ast.ValueSpec:
			kind, ok := n.Type.(*ast.Ident)
			if !ok || len(n.Values) != 1 || n.Doc == nil {
				break
			}
			if value, ok := n.Values[0].(*ast.BasicLit); ok {
				text := strings.TrimPrefix(plain(n.Doc), n.Names[0].Name)
				comments[kind.Name] += " `" + strings.Trim(value.Value, `"`) + "`" + text
			}
		}
		return true
	})
	return comments
}

// keyTable is the reference of the configuration.
func keyTable(t *testing.T) string {
	t.Helper()
	comments, refused := commentsOfConfig(t), refusedValues(t)
	var b strings.Builder
	b.WriteString("| Key | Default | Meaning | When it changes |\n|---|---|---|---|\n")
	for _, s := range settingsOf(t, createDefaultConfig().(*Config)) {
		if s.group {
			fmt.Fprintf(&b, "| **`%s`** | | %s | |\n", s.key, s.comment)
			continue
		}
		meaning := s.comment
		if s.value.Type().PkgPath() == reflect.TypeFor[Config]().PkgPath() {
			meaning += comments[s.value.Type().Name()] // of each value that it can have
		}
		if what := refused[s.key]; what != "" {
			meaning += " It " + what + "."
		}
		if link := settingsOfCollector[s.key]; link != "" {
			meaning += " " + link + "."
		}
		when := whenChanged[s.key]
		require.NotEmpty(t, when, "whenChanged does not say when a change of %s holds", s.key)
		fmt.Fprintf(&b, "| `%s` | %s | %s | %s |\n", s.key, defaultOf(s), strings.ReplaceAll(meaning, "|", `\|`), when)
		if s.key == "listener" {
			fmt.Fprintf(&b, "| `listener.endpoint` | `%s` | `endpoint` is where agents connect: address and port, or with `transport: unix` a path. | %s |\n",
				createDefaultConfig().(*Config).Listener.NetAddr.Endpoint, whenChanged["listener.endpoint"])
		}
	}
	return b.String()
}

// defaultOf shows the default of a key.
func defaultOf(s setting) string {
	if text := defaultText[s.key]; text != "" {
		return text
	}
	switch v := s.value.Interface().(type) {
	case time.Duration:
		return "`" + brief(v) + "`"
	case int:
		for unit, size := range map[string]int{"KiB": 1 << 10, "MiB": 1 << 20} {
			if v >= size && v < size<<10 && v%size == 0 {
				return fmt.Sprintf("`%d` (%d %s)", v, v/size, unit)
			}
		}
		return fmt.Sprintf("`%d`", v)
	}
	if s.key == "server.retry" {
		retry := createDefaultConfig().(*Config).Server.Retry
		return fmt.Sprintf("`%s`, growing to `%s`", brief(retry.InitialInterval), brief(retry.MaxInterval))
	}
	return fmt.Sprintf("`%v`", s.value.Interface())
}

// brief writes a duration as people do: 1m, not 1m0s.
func brief(d time.Duration) string {
	text := d.String()
	if strings.HasSuffix(text, "m0s") {
		text = strings.TrimSuffix(text, "0s")
	}
	return text
}

// refusedValues returns, by key, what Validate says about a value that no setting of that kind can have.
func refusedValues(t *testing.T) map[string]string {
	t.Helper()
	says := map[string]string{}
	count := len(settingsOf(t, createDefaultConfig().(*Config)))
	for i := range count {
		cfg := createDefaultConfig().(*Config)
		cfg.Server.Endpoint = "wss://opamp.example"
		s := settingsOf(t, cfg)[i]
		switch s.value.Kind() {
		case reflect.Int, reflect.Int64:
			s.value.SetInt(-1)
		case reflect.String:
			if s.key != "server.endpoint" {
				continue
			}
			s.value.SetString("")
		default:
			continue
		}
		err := confmap.Validate(cfg)
		if err == nil || s.key == "agents.max_connections" { // whose comment says it
			continue
		}
		found := saysOfValue.FindStringSubmatch(err.Error())
		require.NotNil(t, found, "%s: %v", s.key, err)
		says[s.key] = found[1]
	}
	return says
}

// saysOfValue finds in an error of Validate what a value must be, without what it is.
var saysOfValue = regexp.MustCompile(`(must be .*?|is required, .*?)([,;] is .*)?$`)

// TestReferenceOfReloads holds what the reference says about reloads against what a gateway can go on with.
func TestReferenceOfReloads(t *testing.T) {
	given := func() *Config {
		cfg := createDefaultConfig().(*Config)
		cfg.Server.Endpoint = "wss://opamp.example"
		return cfg
	}
	changes := map[string]func(*Config){
		"server.headers":    func(c *Config) { c.Server.Headers.Set("Authorization", "another") },
		"server.tls":        func(c *Config) { c.Server.TLS.InsecureSkipVerify = true },
		"server.retry":      func(c *Config) { c.Server.Retry.MaxInterval++ },
		"status":            withPage,
		"listener":          func(c *Config) { c.Listener.WriteTimeout++ },
		"listener.endpoint": func(c *Config) { c.Listener.NetAddr.Endpoint = "localhost:4321" },
	}
	for i, s := range settingsOf(t, given()) {
		if s.group || changes[s.key] != nil {
			continue
		}
		changes[s.key] = func(c *Config) {
			switch v := settingsOf(t, c)[i].value; v.Kind() {
			case reflect.Int, reflect.Int64:
				v.SetInt(v.Int() + 1)
			case reflect.Bool:
				v.SetBool(!v.Bool())
			case reflect.String:
				v.SetString(v.String() + "x")
			default:
				t.Errorf("do not know how to change %s", s.key)
			}
		}
	}
	for key, change := range changes {
		before, after := given(), given()
		change(after)
		running := &gateway{cfg: &currentConfig{}, server: &downstreamServer{}}
		running.cfg.Store(before)
		var want []string
		switch {
		case !running.canAdopt(after):
			want = []string{whenEnds}
		case !sameLinks(&before.Server, &after.Server):
			want = []string{whenLinks}
		case before.Listener.NetAddr != after.Listener.NetAddr:
			want = []string{whenMoves}
		default:
			want = []string{whenAtOnce, whenNewcomers}
		}
		require.Contains(t, want, whenChanged[key], key)
	}
	require.Len(t, whenChanged, len(changes), "whenChanged has keys that there are not")
}
