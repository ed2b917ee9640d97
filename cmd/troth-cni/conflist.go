package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"

	"github.com/containernetworking/cni/pkg/version"
)

// pluginType is the plugin's name: in a configuration, and in the folder of plugins.
const pluginType = "troth-cni"

// maxConfig bounds a configuration that is read.
const maxConfig = 1 << 20

// conflist is a CNI network configuration list that belongs to somebody else. It is
// changed as text, at one place, so that all else in it stays byte for byte what its
// owner wrote: fields that nobody here has heard of, their order, their spacing.
type conflist struct {
	content []byte
	version string // empty means one before 0.3.0, or that there are several to choose from
	plugins []span
	ours    []int // which of plugins are ours
}

// span is the place of an element in the text.
type span struct{ start, end int }

// parseConflist reads a list, and fails if a container runtime would.
func parseConflist(content []byte) (*conflist, error) {
	if len(content) > maxConfig {
		return nil, fmt.Errorf("more than %d bytes", maxConfig)
	}
	l := &conflist{content: content}
	d := json.NewDecoder(bytes.NewReader(content))
	if err := expect(d, json.Delim('{')); err != nil {
		return nil, err
	}
	seen := make(map[string]bool)
	for d.More() {
		token, err := d.Token()
		if err != nil {
			return nil, err
		}
		key, ok := token.(string)
		if !ok || seen[key] {
			return nil, fmt.Errorf("key %q is there twice", key)
		}
		seen[key] = true
		switch key {
		case "plugins":
			if err := l.readPlugins(d); err != nil {
				return nil, fmt.Errorf("plugins: %w", err)
			}
		case "cniVersion":
			if err := d.Decode(&l.version); err != nil {
				return nil, fmt.Errorf("cniVersion: %w", err)
			}
		case "name":
			var name string
			if err := d.Decode(&name); err != nil {
				return nil, fmt.Errorf("name: %w", err)
			}
		default:
			var ignored json.RawMessage
			if err := d.Decode(&ignored); err != nil {
				return nil, err
			}
		}
	}
	if err := expect(d, json.Delim('}')); err != nil {
		return nil, err
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return nil, errors.New("there is more after its end")
	}
	if !seen["name"] {
		return nil, errors.New("it has no name")
	}
	if len(l.plugins) == 0 {
		return nil, errors.New("it has no plugins")
	}
	return l, nil
}

func (l *conflist) readPlugins(d *json.Decoder) error {
	if err := expect(d, json.Delim('[')); err != nil {
		return err
	}
	for d.More() {
		var element json.RawMessage
		if err := d.Decode(&element); err != nil {
			return err
		}
		name, err := typeOf(element)
		if err != nil {
			return err
		}
		end := int(d.InputOffset())
		if name == pluginType {
			l.ours = append(l.ours, len(l.plugins))
		}
		l.plugins = append(l.plugins, span{end - len(element), end})
	}
	return expect(d, json.Delim(']'))
}

func expect(d *json.Decoder, want json.Delim) error {
	token, err := d.Token()
	if err != nil {
		return err
	}
	if token != want {
		return fmt.Errorf("there is %v where %v should be", token, want)
	}
	return nil
}

func typeOf(plugin json.RawMessage) (string, error) {
	var p struct {
		Type string `json:"type"`
	}
	if err := json.Unmarshal(plugin, &p); err != nil {
		return "", err
	}
	if p.Type == "" {
		return "", errors.New("one has no type")
	}
	return p.Type, nil
}

// with returns the list with entry in it, once. Where it is already it stays, because
// somebody may have put theirs after it on purpose; only first it cannot be, since it
// makes no network.
func (l *conflist) with(entry []byte) ([]byte, error) {
	if chains, err := version.GreaterThanOrEqualTo(l.version, "0.3.0"); l.version != "" && (err != nil || !chains) {
		return nil, fmt.Errorf("version %q of the specification has no chains", l.version)
	}
	if len(l.ours) == 1 && l.ours[0] > 0 {
		place := l.plugins[l.ours[0]]
		return slices.Concat(l.content[:place.start], entry, l.content[place.end:]), nil
	}
	content := l.without()
	if content == nil {
		return nil, errors.New("there is no plugin that makes a network")
	}
	if len(l.ours) > 0 {
		var err error
		if l, err = parseConflist(content); err != nil {
			return nil, err
		}
	}
	last := l.plugins[len(l.plugins)-1]
	// As the one before it is set apart from what is before it.
	before := last.start
	for before > 0 && bytes.IndexByte([]byte(" \t\r\n"), l.content[before-1]) >= 0 {
		before--
	}
	return slices.Concat(l.content[:last.end], []byte(","), l.content[before:last.start], entry, l.content[last.end:]), nil
}

// without returns the list without any entry of ours, or nil if there would be nothing
// in it.
func (l *conflist) without() []byte {
	if len(l.ours) == len(l.plugins) {
		return nil
	}
	if len(l.ours) == 0 {
		return l.content
	}
	// With the comma, which is before it, or after it if it is the first.
	i := l.ours[len(l.ours)-1]
	place := l.plugins[i]
	if i > 0 {
		place.start = l.plugins[i-1].end
	} else {
		place.end = l.plugins[i+1].start
	}
	shorter, err := parseConflist(slices.Concat(l.content[:place.start], l.content[place.end:]))
	if err != nil {
		return nil // it was read before, and is whole without the element
	}
	return shorter.without()
}

// entry returns our entry, or nil if there is none.
func (l *conflist) entry() []byte {
	if len(l.ours) == 0 {
		return nil
	}
	place := l.plugins[l.ours[0]]
	return l.content[place.start:place.end]
}

// listOf makes a list of a configuration that is none, by the rule by which a runtime
// does: the one is the only plugin of the list, and lends it its name and its version.
func listOf(content []byte) ([]byte, error) {
	if len(content) > maxConfig {
		return nil, fmt.Errorf("more than %d bytes", maxConfig)
	}
	var single struct {
		CNIVersion string `json:"cniVersion"`
		Name       string `json:"name"`
	}
	if err := json.Unmarshal(content, &single); err != nil {
		return nil, err
	}
	if _, err := typeOf(content); err != nil {
		return nil, err
	}
	if single.Name == "" || single.CNIVersion == "" {
		return nil, errors.New("it has no name or no cniVersion")
	}
	head, err := json.Marshal(single)
	if err != nil {
		return nil, err
	}
	head = bytes.TrimSuffix(head, []byte("}"))
	return slices.Concat(head, []byte(`,"plugins":[`), bytes.TrimSpace(content), []byte("]}\n")), nil
}
