package policy

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"go.yaml.in/yaml/v3"
)

// Bounds of what Parse reads.
const (
	maxBytes     = 16 << 20
	maxDocuments = 10_000
	maxDepth     = 1_000
	maxValues    = 1 << 20 // in policies and Lists, each as often as aliases repeat it
)

// Parse reads the PeerAuthentications in a text of YAML documents or of JSON
// values, also those in Lists, and passes over objects of other kinds. namespace
// is where those belong that name none. A policy that is not valid is returned
// with its Problems.
//
// Parse fails for a text that is not YAML or not UTF-8, or is larger than 16 MiB
// or 10,000 documents, for a document that is not an object with a kind, and for
// a policy whose name or namespace is missing, is none that Kubernetes would
// give, or was there before. The error says in which document, and in which line
// of the text; both count from 1.
func Parse(data []byte, namespace string) ([]PeerAuthentication, error) {
	if len(data) > maxBytes {
		return nil, fmt.Errorf("a text of %d bytes; the limit is %d", len(data), maxBytes)
	}
	if !utf8.Valid(data) {
		line := 1
		for l := range bytes.Lines(data) {
			if !utf8.Valid(l) {
				return nil, fmt.Errorf("line %d: not UTF-8", line)
			}
			line++
		}
	}

	p := parser{namespace: namespace, values: maxValues, seen: make(map[Ref]string)}
	next, err := jsonDocuments(data)
	if err != nil {
		// What is not JSON may be YAML, of which JSON is nearly a part.
		next = yamlDocuments(data)
	}
	for {
		document, err := next()
		if errors.Is(err, io.EOF) {
			return p.policies, nil
		}
		p.document++
		if err != nil {
			return nil, fmt.Errorf("document %d: %s", p.document, strings.TrimPrefix(err.Error(), "yaml: "))
		}
		if p.document > maxDocuments {
			return nil, fmt.Errorf("more than %d documents", maxDocuments)
		}
		if err := p.object(document, 0); err != nil {
			return nil, err
		}
	}
}

// parser collects the policies of a text.
type parser struct {
	namespace string
	document  int // that is read
	values    int // that may still be read
	policies  []PeerAuthentication
	seen      map[Ref]string // where each is from
}

// object collects the policies in a document or in an item of a List.
func (p *parser) object(n *yaml.Node, depth int) error {
	n = target(n)
	if n.ShortTag() == "!!null" {
		return nil
	}
	fields, err := p.fields(n, depth)
	if err != nil {
		return err
	}
	var apiVersion, kind string
	var items *yaml.Node
	for _, f := range fields {
		switch f.key {
		case "apiVersion":
			apiVersion = textOf(f.value)
		case "kind":
			kind = textOf(f.value)
		case "items":
			items = f.value
		}
	}
	switch {
	case kind == "":
		return p.errorf(n, "an object without a kind")
	case isPeerAuthentication(apiVersion, kind):
		return p.policy(n, depth)
	case kind == "PeerAuthentication" && apiVersion == "":
		return p.errorf(n, "a PeerAuthentication without an apiVersion")
	case items == nil, !isPeerAuthentication(apiVersion, strings.TrimSuffix(kind, "List")) && (apiVersion != "v1" || kind != "List"):
		return nil
	}
	items = target(items)
	if items.Kind != yaml.SequenceNode {
		return p.errorf(items, "the items of a List that are not a list")
	}
	for _, item := range items.Content {
		if err := p.object(item, depth+1); err != nil {
			return err
		}
	}
	return nil
}

func (p *parser) policy(n *yaml.Node, depth int) error {
	value, err := p.value(n, depth)
	if err != nil {
		return err
	}
	object, _ := value.(map[string]any)
	if metadata, ok := object["metadata"].(map[string]any); ok && (metadata["namespace"] == nil || metadata["namespace"] == "") {
		metadata["namespace"] = p.namespace
	}
	policy := Decode(object)
	for _, problem := range policy.Problems {
		// Who the policy is, is not for a default to settle.
		if problem.Field == "metadata.name" || problem.Field == "metadata.namespace" || problem.Field == "metadata" {
			return p.errorf(n, "%v", problem)
		}
	}
	policy.document, policy.line = p.document, n.Line
	if origin, twice := p.seen[policy.Ref]; twice {
		return p.errorf(n, "the PeerAuthentication %s is there already, in %s", policy.Ref, origin)
	}
	p.seen[policy.Ref] = policy.Origin()
	p.policies = append(p.policies, policy)
	return nil
}

// value makes of a node what JSON of the same meaning becomes.
func (p *parser) value(n *yaml.Node, depth int) (any, error) {
	n = target(n)
	switch n.Kind {
	case yaml.MappingNode:
		fields, err := p.fields(n, depth)
		if err != nil {
			return nil, err
		}
		object := make(map[string]any, len(fields))
		for _, f := range fields {
			if object[f.key], err = p.value(f.value, depth+1); err != nil {
				return nil, err
			}
		}
		return object, nil
	case yaml.SequenceNode:
		if err := p.spend(n, len(n.Content), depth); err != nil {
			return nil, err
		}
		list := make([]any, len(n.Content))
		for i, item := range n.Content {
			var err error
			if list[i], err = p.value(item, depth+1); err != nil {
				return nil, err
			}
		}
		return list, nil
	default:
		return p.scalar(n)
	}
}

// field is one of a mapping.
type field struct {
	key   string
	value *yaml.Node
}

// fields returns the fields of a mapping, and of those merged into it that it
// does not have itself. A field that is there twice is an error: of two modes,
// nobody could say which counts.
func (p *parser) fields(n *yaml.Node, depth int) ([]field, error) {
	if n.Kind != yaml.MappingNode {
		return nil, p.errorf(n, "%s where an object should be", kindOfNode(n))
	}
	if err := p.spend(n, len(n.Content)/2, depth); err != nil {
		return nil, err
	}
	fields := make([]field, 0, len(n.Content)/2)
	have := make(map[string]bool, len(n.Content)/2)
	var merged []*yaml.Node
	for pair := range slices.Chunk(n.Content, 2) {
		key, value := target(pair[0]), pair[1]
		if key.ShortTag() == "!!merge" {
			if source := target(value); source.Kind == yaml.SequenceNode {
				merged = append(merged, source.Content...)
			} else {
				merged = append(merged, source)
			}
			continue
		}
		name, err := p.key(key)
		if err != nil {
			return nil, err
		}
		if have[name] {
			return nil, p.errorf(key, "the field %.64q is there twice", name)
		}
		have[name] = true
		fields = append(fields, field{key: name, value: value})
	}
	for _, source := range merged {
		more, err := p.fields(target(source), depth+1)
		if err != nil {
			return nil, err
		}
		for _, f := range more {
			if !have[f.key] {
				have[f.key] = true
				fields = append(fields, f)
			}
		}
	}
	return fields, nil
}

// key spells a key as JSON does.
func (p *parser) key(n *yaml.Node) (string, error) {
	if n.Kind != yaml.ScalarNode {
		return "", p.errorf(n, "%s as a key", kindOfNode(n))
	}
	value, err := p.scalar(n)
	if err != nil {
		return "", err
	}
	switch value := value.(type) {
	case string:
		return value, nil
	case nil:
		return "", p.errorf(n, "null as a key")
	default:
		return fmt.Sprint(value), nil
	}
}

// scalar reads a scalar as kubectl does, which is by YAML 1.1.
func (p *parser) scalar(n *yaml.Node) (any, error) {
	switch tag := n.ShortTag(); tag {
	case "!!null":
		return nil, nil
	case "!!timestamp":
		return n.Value, nil
	case "!!str":
		if n.Style == 0 {
			switch n.Value {
			case "y", "Y", "yes", "Yes", "YES", "on", "On", "ON":
				return true, nil
			case "n", "N", "no", "No", "NO", "off", "Off", "OFF":
				return false, nil
			}
		}
		return n.Value, nil
	case "!!bool":
		var value bool
		if err := n.Decode(&value); err != nil {
			return nil, p.errorf(n, "%.64q is not true or false", n.Value)
		}
		return value, nil
	case "!!int":
		var value int64
		if err := n.Decode(&value); err == nil {
			return value, nil
		}
		fallthrough
	case "!!float":
		var value float64
		if err := n.Decode(&value); err != nil {
			return nil, p.errorf(n, "%.64q is not a number", n.Value)
		}
		return value, nil
	default:
		return nil, p.errorf(n, "a value with the tag %.64q, which JSON has nothing for", tag)
	}
}

// spend counts values, so that a text in which aliases of aliases multiply is
// given up, and one that contains itself too.
func (p *parser) spend(n *yaml.Node, values, depth int) error {
	if depth > maxDepth {
		return p.errorf(n, "values within values, more than %d deep", maxDepth)
	}
	if p.values -= values; p.values < 0 {
		return p.errorf(n, "more than %d values", maxValues)
	}
	return nil
}

func (p *parser) errorf(n *yaml.Node, format string, args ...any) error {
	return fmt.Errorf("document %d, line %d: %s", p.document, n.Line, fmt.Sprintf(format, args...))
}

// target returns what n stands for.
func target(n *yaml.Node) *yaml.Node {
	if n.Kind == yaml.AliasNode {
		return n.Alias
	}
	return n
}

func textOf(n *yaml.Node) string {
	if n = target(n); n.ShortTag() != "!!str" {
		return ""
	}
	return n.Value
}

func kindOfNode(n *yaml.Node) string {
	switch n.Kind {
	case yaml.MappingNode:
		return "an object"
	case yaml.SequenceNode:
		return "a list"
	default:
		return fmt.Sprintf("%.64q", n.Value)
	}
}

// yamlDocuments returns a function that returns one document after the other,
// and then io.EOF.
func yamlDocuments(data []byte) func() (*yaml.Node, error) {
	decoder := yaml.NewDecoder(bytes.NewReader(data))
	return func() (*yaml.Node, error) {
		var document yaml.Node
		if err := decoder.Decode(&document); err != nil {
			return nil, err
		}
		return document.Content[0], nil
	}
}

// jsonDocuments does the same for JSON values that follow each other, with
// whatever space between. It fails if data is anything else.
func jsonDocuments(data []byte) (func() (*yaml.Node, error), error) {
	if !bytes.HasPrefix(bytes.TrimLeft(data, " \t\r\n"), []byte("{")) {
		return nil, errors.New("not JSON")
	}
	r := jsonReader{data: data, decoder: json.NewDecoder(bytes.NewReader(data)), line: 1}
	r.decoder.UseNumber()
	var documents []*yaml.Node
	for {
		document, err := r.value(0)
		if errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return nil, err
		}
		documents = append(documents, document)
	}
	return func() (*yaml.Node, error) {
		if len(documents) == 0 {
			return nil, io.EOF
		}
		document := documents[0]
		documents = documents[1:]
		return document, nil
	}, nil
}

// jsonReader makes YAML's nodes of JSON.
type jsonReader struct {
	data    []byte
	decoder *json.Decoder
	line    int // in which the last token ended
	offset  int64
}

func (r *jsonReader) value(depth int) (*yaml.Node, error) {
	if depth > maxDepth {
		return nil, fmt.Errorf("values within values, more than %d deep", maxDepth)
	}
	token, err := r.decoder.Token()
	if err != nil {
		return nil, err
	}
	end := r.decoder.InputOffset()
	r.line += bytes.Count(r.data[r.offset:end], []byte("\n"))
	r.offset = end

	n := &yaml.Node{Kind: yaml.ScalarNode, Line: r.line}
	switch token := token.(type) {
	case nil:
		n.Tag = "!!null"
	case bool:
		n.Tag, n.Value = "!!bool", strconv.FormatBool(token)
	case json.Number:
		n.Tag, n.Value = "!!float", token.String()
		if !strings.ContainsAny(n.Value, ".eE") {
			n.Tag = "!!int"
		}
	case string:
		n.Tag, n.Value, n.Style = "!!str", token, yaml.DoubleQuotedStyle
	case json.Delim:
		n.Kind, n.Tag = yaml.MappingNode, "!!map"
		if token == '[' {
			n.Kind, n.Tag = yaml.SequenceNode, "!!seq"
		}
		for r.decoder.More() {
			child, err := r.value(depth + 1)
			if err != nil {
				return nil, unexpected(err)
			}
			n.Content = append(n.Content, child)
		}
		if _, err := r.decoder.Token(); err != nil {
			return nil, unexpected(err)
		}
	}
	return n, nil
}

// unexpected makes an error of an end that comes too early.
func unexpected(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}
