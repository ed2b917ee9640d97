package policy

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"
)

// Decode reads a PeerAuthentication from the maps, slices and scalars that JSON
// becomes. It never fails: what is wrong, by the rules of the API server or by
// Istio's, is in Problems, of which there are never more than 33. A selector in
// which something is wrong selects the whole namespace, for nobody can know what
// was meant.
func Decode(object map[string]any) PeerAuthentication {
	var d decoder
	var p PeerAuthentication
	d.header(object, &p)
	d.fields(object, "", "apiVersion", "kind", "metadata", "spec", "status")

	spec := d.object(object, "spec", "spec")
	d.fields(spec, "spec", "selector", "mtls", "portLevelMtls")
	var selective bool
	p.Selector, selective = d.selector(spec)
	p.Mode = d.mtls(d.object(spec, "mtls", "spec.mtls"), "spec.mtls")
	p.Ports = d.ports(spec, selective)
	p.Problems = d.problems
	return p
}

// Bounds of the API server's schema for a PeerAuthentication.
const (
	maxLabels     = 4096
	maxLabelValue = 63 // in characters
)

// maxProblems is how many problems are worth a line of their own.
const maxProblems = 32

type decoder struct {
	problems []Problem
}

func (d *decoder) problem(field, format string, args ...any) {
	switch n := len(d.problems); {
	case n < maxProblems:
		d.problems = append(d.problems, Problem{Field: field, Message: fmt.Sprintf(format, args...)})
	case n == maxProblems:
		d.problems = append(d.problems, Problem{Field: "spec", Message: "has more problems"})
	}
}

// header reads what every Kubernetes object has.
func (d *decoder) header(object map[string]any, p *PeerAuthentication) {
	apiVersion, kind := d.text(object, "apiVersion", "apiVersion"), d.text(object, "kind", "kind")
	switch {
	case !isPeerAuthentication(apiVersion, kind):
		d.problem("kind", "%.64q of %.64q is not PeerAuthentication of %q", kind, apiVersion, apiGroup)
	case apiVersion != apiGroup+"/v1" && apiVersion != apiGroup+"/v1beta1":
		d.problem("apiVersion", "%.64q is not known: v1 and v1beta1 are", apiVersion)
	}

	metadata := d.object(object, "metadata", "metadata")
	p.Name = d.text(metadata, "name", "metadata.name")
	if p.Name == "" {
		d.problem("metadata.name", "is missing")
	} else if len(p.Name) > 253 || !areLabels(strings.Split(p.Name, ".")...) {
		d.problem("metadata.name", "%.64q is not a DNS subdomain (RFC 1123)", p.Name)
	}
	p.Namespace = d.text(metadata, "namespace", "metadata.namespace")
	if p.Namespace == "" {
		d.problem("metadata.namespace", "is missing")
	} else if len(p.Namespace) > 63 || !areLabels(p.Namespace) {
		d.problem("metadata.namespace", "%.64q is not a DNS label (RFC 1123)", p.Namespace)
	}
	if created := d.text(metadata, "creationTimestamp", "metadata.creationTimestamp"); created != "" {
		var err error
		if p.Created, err = time.Parse(time.RFC3339, created); err != nil {
			p.Created = time.Time{}
			d.problem("metadata.creationTimestamp", "%.64q is not a time (RFC 3339)", created)
		}
	}
}

// selector returns the labels to select by, and whether the policy means to
// select by any.
func (d *decoder) selector(spec map[string]any) (labels map[string]string, selective bool) {
	before := len(d.problems)
	selector := d.object(spec, "selector", "spec.selector")
	const field = "spec.selector.matchLabels"
	matchLabels := d.object(selector, "matchLabels", field)
	if len(matchLabels) > maxLabels {
		d.problem(field, "has %d labels; the limit is %d", len(matchLabels), maxLabels)
	} else if len(matchLabels) > 0 {
		labels = make(map[string]string, len(matchLabels))
		for _, key := range slices.Sorted(maps.Keys(matchLabels)) {
			labels[key] = d.label(matchLabels, key, index(field, key))
		}
	}
	if len(d.problems) > before {
		labels = nil
	}
	d.fields(selector, "spec.selector", "matchLabels")
	return labels, len(matchLabels) > 0
}

func (d *decoder) label(labels map[string]any, key, field string) string {
	value, ok := labels[key].(string)
	switch {
	case !ok:
		d.problem(field, "must be a string, and is %s", kindOf(labels[key]))
	case key == "":
		d.problem(field, "has an empty key")
	case strings.Contains(key, "*"), strings.Contains(value, "*"):
		d.problem(field, "has a *, which is no wildcard here")
	case utf8.RuneCountInString(value) > maxLabelValue:
		d.problem(field, "is longer than %d characters", maxLabelValue)
	}
	return value
}

// mtls reads a mode from where the API has one.
func (d *decoder) mtls(mtls map[string]any, field string) Mode {
	d.fields(mtls, field, "mode")
	if mtls["mode"] == nil {
		return Unset
	}
	name, ok := mtls["mode"].(string)
	if !ok {
		d.problem(field+".mode", "must be a string, and is %s", kindOf(mtls["mode"]))
		return Unset
	}
	mode, err := ParseMode(name)
	if err != nil {
		d.problem(field+".mode", "%v", err)
	}
	return mode
}

func (d *decoder) ports(spec map[string]any, selective bool) map[uint16]Mode {
	const field = "spec.portLevelMtls"
	if spec["portLevelMtls"] == nil {
		return nil
	}
	entries := d.object(spec, "portLevelMtls", field)
	if entries == nil {
		return nil
	}
	if !selective {
		d.problem(field, "needs a selector with labels")
	}
	if len(entries) == 0 {
		d.problem(field, "has no port")
	}
	ports := make(map[uint16]Mode, len(entries))
	// Numbers in their order.
	keys := slices.SortedFunc(maps.Keys(entries), func(a, b string) int {
		return cmp.Or(cmp.Compare(len(a), len(b)), cmp.Compare(a, b))
	})
	for _, key := range keys {
		field := index(field, key)
		number, err := strconv.ParseUint(key, 10, 16)
		if err != nil || number == 0 {
			d.problem(field, "is not a port from 1 to 65535")
			continue
		}
		port := uint16(number)
		if _, twice := ports[port]; twice {
			d.problem(field, "is there twice")
		}
		entry, ok := entries[key].(map[string]any)
		if !ok {
			d.problem(field, "must be an object, and is %s", kindOf(entries[key]))
		}
		ports[port] = d.mtls(entry, field)
	}
	return ports
}

// object returns the object at key of parent, whose path is field, or nil. The
// API server takes null for a field that is not there.
func (d *decoder) object(parent map[string]any, key, field string) map[string]any {
	if parent[key] == nil {
		return nil
	}
	object, ok := parent[key].(map[string]any)
	if !ok {
		d.problem(field, "must be an object, and is %s", kindOf(parent[key]))
	}
	return object
}

// text returns the string at key of parent, whose path is field, or "".
func (d *decoder) text(parent map[string]any, key, field string) string {
	if parent[key] == nil {
		return ""
	}
	text, ok := parent[key].(string)
	if !ok {
		d.problem(field, "must be a string, and is %s", kindOf(parent[key]))
	}
	return text
}

// fields reports every field of the object at path that is not among known. The
// API server drops such fields from what it stores, and kubectl refuses them.
func (d *decoder) fields(object map[string]any, path string, known ...string) {
	var unknown []string
	for key := range object {
		if !slices.Contains(known, key) {
			unknown = append(unknown, key)
		}
	}
	slices.Sort(unknown)
	for _, key := range unknown {
		field := plain(key)
		if path != "" {
			field = path + "." + field
		}
		d.problem(field, "is not a field of a PeerAuthentication")
	}
}

const apiGroup = "security.istio.io"

// isPeerAuthentication is true of every version: what a version says that we do
// not know must not count for nothing.
func isPeerAuthentication(apiVersion, kind string) bool {
	group, _, _ := strings.Cut(apiVersion, "/")
	return kind == "PeerAuthentication" && group == apiGroup
}

// index returns the path of an entry of the map at path.
func index(path, key string) string { return path + "[" + plain(key) + "]" }

// plain returns the key as it is if it can stand in a path, and quoted if not.
func plain(key string) string {
	const plainBytes = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_./*"
	if key == "" || len(key) > 253+1+63 || strings.Trim(key, plainBytes) != "" {
		return fmt.Sprintf("%.64q", key)
	}
	return key
}

func kindOf(value any) string {
	switch value.(type) {
	case nil:
		return "null"
	case string:
		return "a string"
	case bool:
		return "true or false"
	case map[string]any:
		return "an object"
	case []any:
		return "a list"
	default:
		return "a number"
	}
}

// areLabels reports whether each is a DNS label, but for its length.
func areLabels(names ...string) bool {
	for _, name := range names {
		if name == "" || name[0] == '-' || name[len(name)-1] == '-' ||
			strings.Trim(name, "abcdefghijklmnopqrstuvwxyz0123456789-") != "" {
			return false
		}
	}
	return true
}
