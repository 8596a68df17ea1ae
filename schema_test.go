package opampgateway

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode"

	"github.com/stretchr/testify/require"
	"go.opentelemetry.io/collector/config/confighttp"
	"go.opentelemetry.io/collector/config/configoptional"
	"go.opentelemetry.io/collector/confmap"
)

// config.schema.yaml is made of config.go, in the dialect that components of Collector-contrib have theirs in: what is the
// Collector's is a reference to its schema.

const schemaFile = "config.schema.yaml"

type object = map[string]any

// schemaOf is the schema of a configuration whose defaults are those of v.
func schemaOf(v reflect.Value, comments map[string]string) object {
	properties := object{}
	schema := object{"type": "object", "properties": properties, "additionalProperties": false}
	for i := range v.NumField() {
		field := v.Type().Field(i)
		name, _, _ := strings.Cut(field.Tag.Get("mapstructure"), ",")
		if name == "" {
			continue
		}
		property := propertyOf(v.Field(i), comments)
		property["description"] = comments[v.Type().Name()+"."+field.Name]
		properties[name] = property
	}
	switch v.Type() {
	case reflect.TypeFor[Config]():
		schema["required"] = []any{"server"}
	case reflect.TypeFor[ServerConfig]():
		schema["required"] = []any{"endpoint"}
	}
	return schema
}

func propertyOf(v reflect.Value, comments map[string]string) object {
	switch value := v.Interface().(type) {
	case Headers:
		values := []any{object{"type": "string"}, object{"type": "array", "items": object{"type": "string"}}}
		return object{"anyOf": []any{
			object{"type": "object", "additionalProperties": object{"anyOf": values}},
			object{"type": "array", "items": object{
				"type": "object", "additionalProperties": false, "required": []any{"name"},
				"properties": object{"name": object{"type": "string"}, "value": object{"anyOf": values}},
			}},
		}}
	case configoptional.Optional[confighttp.ServerConfig]:
		return object{"x-optional": true, "$ref": referenceTo(reflect.TypeFor[confighttp.ServerConfig]())}
	case AgentAdmission:
		return object{"type": "string", "default": string(value), "enum": []any{string(AdmissionAuto), string(AdmissionVerify), string(AdmissionAsk), string(AdmissionAccept)}}
	case time.Duration:
		return object{"type": "string", "format": "duration", "x-customType": "time.Duration", "default": brief(value)}
	case int:
		return object{"type": "integer", "default": value}
	case bool:
		return object{"type": "boolean", "default": value}
	case string:
		return object{"type": "string"}
	}
	if v.Type().PkgPath() != reflect.TypeFor[Config]().PkgPath() {
		return object{"$ref": referenceTo(v.Type())}
	}
	return schemaOf(v, comments)
}

// referenceTo names the schema of a type of the Collector's.
func referenceTo(of reflect.Type) string {
	var name strings.Builder
	for i, r := range of.Name() {
		if unicode.IsUpper(r) && i > 0 {
			name.WriteByte('_')
		}
		name.WriteRune(unicode.ToLower(r))
	}
	return of.PkgPath() + "." + name.String()
}

// writeYAML writes a schema with its keys in order.
func writeYAML(b *strings.Builder, indent string, value any) {
	switch value := value.(type) {
	case object:
		b.WriteByte('\n')
		for _, key := range slices.Sorted(maps.Keys(value)) {
			b.WriteString(indent + key + ":")
			writeYAML(b, indent+"  ", value[key])
		}
	case []any:
		b.WriteByte('\n')
		for _, item := range value {
			b.WriteString(indent + "-")
			writeYAML(b, indent+"  ", item)
		}
	case string:
		fmt.Fprintf(b, " %q\n", value)
	default:
		fmt.Fprintf(b, " %v\n", value)
	}
}

// TestConfigSchema has the schema be that of config.go.
func TestConfigSchema(t *testing.T) {
	var b strings.Builder
	b.WriteString("# The configuration of the extension as a schema: made by make generate, of config.go.")
	writeYAML(&b, "", schemaOf(reflect.ValueOf(createDefaultConfig()).Elem(), commentsOfConfig(t)))
	before, err := os.ReadFile(schemaFile)
	if *update {
		require.NoError(t, os.WriteFile(schemaFile, []byte(b.String()), 0o644))
		return
	}
	require.NoError(t, err)
	require.Equal(t, b.String(), string(before), `%s is out of date: run "make generate"`, schemaFile)
}

// violations returns what a value has that a schema does not let it have. What is below a reference is not looked at.
func violations(schema object, path string, value any) (all []string) {
	if alternatives, ok := schema["anyOf"].([]any); ok {
		for _, alternative := range alternatives {
			found := violations(alternative.(object), path, value)
			if len(found) == 0 {
				return nil
			}
			all = append(all, found...)
		}
		return all
	}
	if text, ok := value.(string); ok && strings.HasPrefix(text, "${") {
		return nil // it is not known yet
	}
	wrong := func() []string { return append(all, fmt.Sprintf("%s: is %v, want %v", path, value, schema["type"])) }
	switch schema["type"] {
	case "object":
		entries, ok := value.(object)
		if !ok && value != nil {
			return wrong()
		}
		required, _ := schema["required"].([]any)
		for _, name := range required {
			if _, there := entries[name.(string)]; !there {
				all = append(all, fmt.Sprintf("%s: has no %s", path, name))
			}
		}
		properties, _ := schema["properties"].(object)
		for name, entry := range entries {
			property, known := properties[name].(object)
			if !known {
				property, known = schema["additionalProperties"].(object)
			}
			if !known {
				all = append(all, fmt.Sprintf("%s: has %s", path, name))
				continue
			}
			all = append(all, violations(property, path+"::"+name, entry)...)
		}
	case "array":
		items, ok := value.([]any)
		if !ok {
			return wrong()
		}
		for i, item := range items {
			all = append(all, violations(schema["items"].(object), fmt.Sprint(path, "::", i), item)...)
		}
	case "string":
		text, ok := value.(string)
		if !ok {
			return wrong()
		}
		if _, err := time.ParseDuration(text); schema["format"] == "duration" && err != nil {
			return wrong()
		}
		if values, ok := schema["enum"].([]any); ok && !slices.Contains(values, value) {
			return wrong()
		}
	case "integer":
		if _, ok := value.(int); !ok {
			return wrong()
		}
	case "boolean":
		if _, ok := value.(bool); !ok {
			return wrong()
		}
	}
	return all
}

// parsed is a text of YAML as it is given.
func parsed(t *testing.T, text []byte) object {
	t.Helper()
	retrieved, err := confmap.NewRetrievedFromYAML(text)
	require.NoError(t, err)
	raw, err := retrieved.AsRaw()
	require.NoError(t, err)
	value, _ := raw.(object)
	return value
}

// Each configuration that is in the documentation, or that other tests load, is one that the schema takes; what
// the gateway does not take, it does not.
func TestSchemaOfExamples(t *testing.T) {
	text, err := os.ReadFile(schemaFile)
	require.NoError(t, err)
	schema := parsed(t, text)

	var sources []object
	for _, p := range pages(t) {
		for _, example := range p.fences("yaml") {
			if regexp.MustCompile(`(?m)^extensions:`).MatchString(example) {
				sources = append(sources, parsed(t, []byte(example)))
			}
		}
	}
	for _, pattern := range []string{"testdata/*.yaml", "deploy/config*.yaml"} {
		files, err := filepath.Glob(pattern)
		require.NoError(t, err)
		for _, file := range files {
			text, err := os.ReadFile(file)
			require.NoError(t, err)
			sources = append(sources, parsed(t, text))
		}
	}
	tried := 0
	for _, source := range sources {
		if extensions, ok := source["extensions"].(object); ok {
			source = extensions
		}
		for name, value := range source {
			kind, _, _ := strings.Cut(name, "/")
			entries, ok := value.(object)
			if kind != "opampgateway" || !ok {
				continue
			}
			if _, whole := entries["server"]; !whole {
				continue // to be given behind another
			}
			tried++
			require.Empty(t, violations(schema, name, value))
		}
	}
	require.Greater(t, tried, 15)

	for _, broken := range []string{
		"{}", "{server: {}}", "{server: ws://opamp.example}", "{server: {endpoint: 1}}",
		"{server: {endpoint: ws://opamp.example}, agent: {}}",
		"{server: {endpoint: ws://opamp.example, connections: three}}",
		"{server: {endpoint: ws://opamp.example, agent_admission: never}}",
		"{server: {endpoint: ws://opamp.example, grace_period: soon}}",
		"{server: {endpoint: ws://opamp.example, headers: [{nam: Authorization}]}}",
		"{server: {endpoint: ws://opamp.example, headers: {Authorization: {secret: key}}}}",
		"{server: {endpoint: ws://opamp.example}, agents: {keep_alive: {intervall: 1s}}}",
		"{server: {endpoint: ws://opamp.example}, agents: {allow_gateways: perhaps}}",
	} {
		value := parsed(t, []byte(broken))
		_, err := load(confmap.NewFromStringMap(value))
		require.Error(t, err, "the gateway takes %s", broken)
		require.NotEmpty(t, violations(schema, "opampgateway", value), broken)
	}
}
