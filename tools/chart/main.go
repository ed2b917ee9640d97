// Command chart renders Troth's Helm chart to the plain manifests in
// deploy/manifests, with Helm's own library, so that nobody has to have helm
// installed, and writes what values there are into docs/install.md:
//
//	go run . [-check]
//
// With -check it writes nothing and fails if what is there is not what it would write.
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"

	"go.yaml.in/yaml/v3"
	"helm.sh/helm/v4/pkg/action"
	"helm.sh/helm/v4/pkg/chart/common"
	chart "helm.sh/helm/v4/pkg/chart/v2"
	"helm.sh/helm/v4/pkg/chart/v2/loader"
	release "helm.sh/helm/v4/pkg/release/v1"
)

func main() {
	if err := run(context.Background(), os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "chart:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	f := flag.NewFlagSet("chart", flag.ContinueOnError)
	deploy := f.String("deploy", filepath.Join("..", "..", "deploy"), "the folder deploy")
	docs := f.String("docs", filepath.Join("..", "..", "docs"), "the folder docs")
	check := f.Bool("check", false, "write nothing, and fail if something would change")
	if err := f.Parse(args); err != nil {
		return err
	}
	if f.NArg() > 0 {
		return fmt.Errorf("unexpected argument %q", f.Arg(0))
	}
	files, err := generate(ctx, *deploy, *docs)
	if err != nil {
		return err
	}
	for _, file := range files {
		old, err := os.ReadFile(file.path)
		switch {
		case err != nil && !errors.Is(err, fs.ErrNotExist):
			return err
		case err == nil && bytes.Equal(old, file.content):
			continue
		case *check:
			return fmt.Errorf("%s is not what the chart makes: run make generate", file.path)
		}
		if err := os.MkdirAll(filepath.Dir(file.path), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(file.path, file.content, 0o644); err != nil {
			return err
		}
	}
	return nil
}

// file is one that is made of others.
type file struct {
	path    string
	content []byte
}

// generate returns all of them.
func generate(ctx context.Context, deploy, docs string) ([]file, error) {
	// A chart has nothing but what is in its own folder.
	const definition = "peerauthentications.security.istio.io.yaml"
	crd, err := os.ReadFile(filepath.Join(deploy, "crds", definition))
	if err != nil {
		return nil, err
	}
	chart, err := loader.LoadDir(filepath.Join(deploy, "chart"))
	if err != nil {
		return nil, err
	}
	for _, f := range chart.Files {
		if f.Name == "files/"+definition {
			f.Data = crd
		}
	}
	release, err := render(ctx, chart, map[string]any{
		// Whoever applies plain manifests makes the key: a file that is for all to read has none.
		"keyEncryptionKey":      map[string]any{"create": false},
		"createServerNamespace": true,
	})
	if err != nil {
		return nil, err
	}
	var cleanup strings.Builder
	for _, hook := range release.Hooks {
		fmt.Fprintf(&cleanup, "---\n%s\n", strings.TrimSpace(hook.Manifest))
	}
	guide := filepath.Join(docs, "install.md")
	text, err := os.ReadFile(guide)
	if err != nil {
		return nil, err
	}
	table, err := describe(filepath.Join(deploy, "chart"))
	if err != nil {
		return nil, err
	}
	before, rest, ok := strings.Cut(string(text), tableBegins)
	_, after, end := strings.Cut(rest, tableEnds)
	if !ok || !end {
		return nil, fmt.Errorf("%s has no place for the table of values, between %q and %q", guide, tableBegins, tableEnds)
	}
	return []file{
		{filepath.Join(deploy, "chart", "files", definition), crd},
		{filepath.Join(deploy, "manifests", "troth.yaml"), []byte(strings.TrimSpace(release.Manifest) + "\n")},
		{filepath.Join(deploy, "manifests", "cleanup.yaml"), []byte(cleanup.String())},
		{guide, []byte(before + tableBegins + "\n" + table + tableEnds + after)},
	}, nil
}

// render returns the chart as "helm template" renders it, for the oldest Kubernetes
// that it takes and the namespace that the documentation names.
func render(ctx context.Context, c *chart.Chart, values map[string]any) (*release.Release, error) {
	install := action.NewInstall(action.NewConfiguration(action.ConfigurationSetLogger(slog.DiscardHandler)))
	install.DryRunStrategy = action.DryRunClient
	install.ReleaseName, install.Namespace = "troth", "troth-system"
	install.KubeVersion = &common.KubeVersion{Version: "v1.37.0", Major: "1", Minor: "37"}
	rendered, err := install.RunWithContext(ctx, c, values)
	if err != nil {
		return nil, err
	}
	return rendered.(*release.Release), nil
}

// Between these lines docs/install.md has the table of values.
const (
	tableBegins = "<!-- The values, as their schema describes them: make generate -->"
	tableEnds   = "<!-- End of the values -->"
)

// described is what a schema says of a value.
type described struct {
	Description string               `json:"description"`
	Properties  map[string]described `json:"properties"`
}

// describe returns the table of all values, in the order in which they have defaults.
func describe(folder string) (string, error) {
	content, err := os.ReadFile(filepath.Join(folder, "values.schema.json"))
	if err != nil {
		return "", err
	}
	var schema described
	if err := json.Unmarshal(content, &schema); err != nil {
		return "", err
	}
	if content, err = os.ReadFile(filepath.Join(folder, "values.yaml")); err != nil {
		return "", err
	}
	var defaults yaml.Node
	if err := yaml.Unmarshal(content, &defaults); err != nil {
		return "", err
	}
	if len(defaults.Content) != 1 {
		return "", errors.New("values.yaml is empty")
	}
	var table strings.Builder
	table.WriteString("| value | default | meaning |\n|---|---|---|\n")
	if err := rows(&table, "", schema, defaults.Content[0]); err != nil {
		return "", err
	}
	return table.String(), nil
}

// rows writes the rows of the values in an object.
func rows(table *strings.Builder, path string, schema described, object *yaml.Node) error {
	for i := 0; i+1 < len(object.Content); i += 2 {
		name, value := object.Content[i].Value, object.Content[i+1]
		about, ok := schema.Properties[name]
		if !ok {
			return fmt.Errorf("%s%s is not in the schema", path, name)
		}
		if len(value.Content) > 0 && value.Kind == yaml.MappingNode && len(about.Properties) > 0 {
			if err := rows(table, path+name+".", about, value); err != nil {
				return err
			}
			continue
		}
		var decoded any
		if err := value.Decode(&decoded); err != nil {
			return err
		}
		text, err := json.Marshal(decoded)
		if err != nil {
			return err
		}
		fmt.Fprintf(table, "| `%s%s` | `%s` | %s |\n", path, name, text, strings.ReplaceAll(about.Description, "|", "\\|"))
	}
	return nil
}
