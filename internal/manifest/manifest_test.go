package manifest_test

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"troth.dev/troth/internal/manifest"
	"troth.dev/troth/policy"
)

const (
	strict = "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: strict}\nspec: {mtls: {mode: STRICT}}\n"
	wrong  = "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: wrong}\nspec: {mtls: {mode: LOOSE}}\n"
)

func TestRead(t *testing.T) {
	dir := t.TempDir()
	for name, content := range map[string]string{
		"b.yaml": "b", "a.yml": "a", "c.json": "c", "notes.txt": "not a manifest", "below/d.yaml": "not in this folder",
	} {
		write(t, filepath.Join(dir, name), content)
	}
	files, err := manifest.Read([]string{dir, "-", filepath.Join(dir, "notes.txt")}, strings.NewReader("in"))
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, f := range files {
		got = append(got, filepath.Base(f.Name)+"="+string(f.Content))
	}
	want := []string{"a.yml=a", "b.yaml=b", "c.json=c", "standard input=in", "notes.txt=not a manifest"}
	if !slices.Equal(got, want) {
		t.Errorf("Read = %q, want %q", got, want)
	}
}

func TestReadRefuses(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "a.yaml")
	write(t, file, "a")
	large := filepath.Join(dir, "large.yaml")
	write(t, large, "")
	if err := os.Truncate(large, 32<<20+1); err != nil {
		t.Fatal(err)
	}
	empty := filepath.Join(dir, "empty")
	if err := os.Mkdir(empty, 0o755); err != nil {
		t.Fatal(err)
	}
	if _, err := manifest.Read([]string{file, file}, nil); !errors.As(err, new(manifest.Errors)) {
		t.Errorf("Read(a file twice) = %v, want Errors", err)
	}
	if _, err := manifest.Read([]string{empty}, nil); !errors.Is(err, manifest.ErrEmpty) {
		t.Errorf("Read(an empty folder) = %v, want ErrEmpty", err)
	}
	if _, err := manifest.Read([]string{large}, nil); err == nil || !strings.Contains(err.Error(), "more than 32 MiB") {
		t.Errorf("Read(33 MiB) = %v, want an error with the bound", err)
	}
	if err := os.Truncate(large, 32<<20); err != nil {
		t.Fatal(err)
	}
	if files, err := manifest.Read([]string{large}, nil); err != nil || len(files[0].Content) != 32<<20 {
		t.Errorf("Read(32 MiB) = %v", err)
	}
	if _, err := manifest.Read([]string{filepath.Join(dir, "missing")}, nil); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("Read(a file that is missing) = %v", err)
	}
}

func TestPolicies(t *testing.T) {
	set, err := manifest.Policies([]manifest.File{
		{Name: "a.yaml", Content: []byte(strict)}, {Name: "b.yaml", Content: []byte("kind: Pod\n---\n" + wrong)},
	}, "shop")
	if err != nil {
		t.Fatal(err)
	}
	if got := set.Origin[policy.Ref{Namespace: "shop", Name: "wrong"}]; got != "b.yaml: document 2, line 3" {
		t.Errorf("the second is from %q", got)
	}
	const want = `b.yaml: document 2, line 3: shop/wrong: spec.mtls.mode: "LOOSE" is not UNSET, DISABLE, PERMISSIVE or STRICT`
	if err := set.Invalid(); err == nil || err.Error() != want {
		t.Errorf("Invalid() = %v, want %s", err, want)
	}

	_, err = manifest.Policies([]manifest.File{
		{Name: "a.yaml", Content: []byte(strict)}, {Name: "b.yaml", Content: []byte(strict)}, {Name: "c.yaml", Content: []byte("a: b: c")},
	}, "shop")
	var wrongs manifest.Errors
	if !errors.As(err, &wrongs) || len(wrongs) != 2 ||
		!strings.HasPrefix(wrongs[0], "b.yaml: document 1, line 1: shop/strict is there twice, first in a.yaml: document 1") ||
		!strings.HasPrefix(wrongs[1], "c.yaml: ") {
		t.Errorf("Policies(one twice, and no YAML) = %v", err)
	}
}

func write(t *testing.T, name, content string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(name, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}
