// Command chart renders Troth's Helm chart to the plain manifests in
// deploy/manifests, with Helm's own library, so that nobody has to have helm
// installed:
//
//	go run . [-check]
//
// With -check it writes nothing and fails if what is there is not what it would write.
package main

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"

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
	check := f.Bool("check", false, "write nothing, and fail if something would change")
	if err := f.Parse(args); err != nil {
		return err
	}
	if f.NArg() > 0 {
		return fmt.Errorf("unexpected argument %q", f.Arg(0))
	}
	files, err := generate(ctx, *deploy)
	if err != nil {
		return err
	}
	for _, file := range files {
		path := filepath.Join(*deploy, file.name)
		if *check {
			switch old, err := os.ReadFile(path); {
			case err != nil:
				return err
			case !bytes.Equal(old, file.content):
				return fmt.Errorf("%s is not what the chart makes: run make generate", path)
			}
			continue
		}
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(path, file.content, 0o644); err != nil {
			return err
		}
	}
	return nil
}

// file is one that is made of others. Its name is from the folder deploy on.
type file struct {
	name    string
	content []byte
}

// generate returns all of them.
func generate(ctx context.Context, deploy string) ([]file, error) {
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
	return []file{
		{filepath.Join("chart", "files", definition), crd},
		{filepath.Join("manifests", "troth.yaml"), []byte(strings.TrimSpace(release.Manifest) + "\n")},
		{filepath.Join("manifests", "cleanup.yaml"), []byte(cleanup.String())},
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
