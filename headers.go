package opampgateway

import (
	"cmp"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"

	"go.opentelemetry.io/collector/config/configopaque"
	"go.opentelemetry.io/collector/confmap"
	"golang.org/x/net/http/httpguts"
)

// Headers are headers of a request: each name has one value, or several. They are written as a map from
// names, or as a list of entries with name and value; a value is a text or a list of texts.
type Headers []Header

// Header is one name with its values.
type Header struct {
	Name   string                `mapstructure:"name"`
	Values []configopaque.String `mapstructure:"value"`

	// prevent unkeyed literal initialization
	_ struct{}
}

var (
	_ confmap.Unmarshaler = (*Headers)(nil)
	_ confmap.Unmarshaler = (*Header)(nil)

	// errHeaderValue stands for errors of decoding, some of which repeat the value.
	errHeaderValue = errors.New("must have a text, or a list of texts, as the value of each name")
)

// Unmarshal takes a map. What comes from a variable of the environment is one text, whatever it looks like.
func (h *Headers) Unmarshal(conf *confmap.Conf) error {
	var texts map[string]configopaque.String
	_ = conf.Unmarshal(&texts) // those of conf that are
	for name := range texts {
		conf.Delete(name)
	}
	var lists map[string][]configopaque.String
	if conf.Unmarshal(&lists) != nil {
		return errHeaderValue
	}
	*h = make(Headers, 0, len(texts)+len(lists))
	for name, text := range texts {
		*h = append(*h, Header{Name: name, Values: []configopaque.String{text}})
	}
	for name, list := range lists {
		*h = append(*h, Header{Name: name, Values: list})
	}
	slices.SortFunc(*h, func(a, b Header) int { return cmp.Compare(a.Name, b.Name) })
	return nil
}

// Unmarshal takes an entry of a list.
func (h *Header) Unmarshal(conf *confmap.Conf) error {
	for key := range conf.ToStringMap() {
		if key != "name" && key != "value" {
			return fmt.Errorf("has an unknown key %q, must have name and value", key)
		}
	}
	var one struct {
		Name string              `mapstructure:"name"`
		Text configopaque.String `mapstructure:"value"`
	}
	if conf.Unmarshal(&one) == nil {
		*h = Header{Name: one.Name, Values: []configopaque.String{one.Text}}
		return nil
	}
	var several struct {
		Name string                `mapstructure:"name"`
		List []configopaque.String `mapstructure:"value"`
	}
	if conf.Unmarshal(&several) != nil {
		return errHeaderValue
	}
	*h = Header{Name: several.Name, Values: several.List}
	return nil
}

// Get returns the first value of a name.
func (h Headers) Get(name string) (configopaque.String, bool) {
	for _, header := range h {
		if header.Name == name && len(header.Values) > 0 {
			return header.Values[0], true
		}
	}
	return "", false
}

// Set gives a name these values, in place of any before.
func (h *Headers) Set(name string, values ...configopaque.String) {
	*h = slices.DeleteFunc(slices.Clone(*h), func(header Header) bool { return header.Name == name })
	*h = append(*h, Header{Name: name, Values: values})
}

// addTo adds the headers to those of a request, in place of what it has by the same names.
func (h Headers) addTo(request http.Header) {
	for _, header := range h {
		request.Del(header.Name)
		for _, value := range header.Values {
			request.Add(header.Name, string(value))
		}
	}
}

// validate reports every name and value that a link's request cannot have.
func (h Headers) validate() error {
	var errs []error
	seen := map[string]bool{}
	for _, header := range h {
		name := header.Name
		canonical := http.CanonicalHeaderKey(name)
		switch {
		case !httpguts.ValidHeaderFieldName(name):
			errs = append(errs, fmt.Errorf("%q is not a header name", name))
		case seen[canonical]:
			errs = append(errs, fmt.Errorf("%q is there twice, give it a list of values", name))
		case canonical == "Connection", canonical == "Upgrade", strings.HasPrefix(canonical, "Sec-Websocket-"):
			errs = append(errs, fmt.Errorf("%q is reserved, the WebSocket handshake sets it", name))
		case canonical == connectionIDHeader:
			errs = append(errs, fmt.Errorf("%q is reserved, the gateway sets it; see agent_id", name))
		case len(header.Values) == 0:
			errs = append(errs, fmt.Errorf("%q has no value", name))
		case len(header.Values) > 1 && (canonical == "Host" || canonical == "User-Agent"):
			errs = append(errs, fmt.Errorf("%q can have one value only", name))
		case slices.ContainsFunc(header.Values, func(v configopaque.String) bool { return !httpguts.ValidHeaderFieldValue(string(v)) }):
			errs = append(errs, fmt.Errorf("the value of %q cannot be sent in a header", name))
		}
		seen[canonical] = true
	}
	return errors.Join(errs...)
}
