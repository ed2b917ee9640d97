package troth_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// importRules says what each package may import: packages of ours, and of what
// is kept to a few, the families below. A * stands for any package of ours but
// the test harnesses. Only what is not a test counts.
//
// The table is the architecture. To add to it is a decision about the design,
// never a way to make a build pass.
const importRules = `
	identity:
	deploy:
	internal/bounded:
	internal/health:
	internal/heap:
	internal/latest:
	internal/place:
	internal/proc:
	internal/version:
	handshake:           identity
	token:               identity
	mint:                internal/bounded token

	storage:             internal/latest
	storage/postgres:    internal/latest storage
	storage/sqlite:      internal/latest storage
	storage/kubernetes:  internal/latest storage storage/kubernetes/internal/batch kubernetes
	storage/kubernetes/internal/batch: storage
	storage/storagetest: storage

	ca:                  identity internal/latest storage
	fleet:               ca identity internal/latest storage
	ca/keyhelper:
	policy:              identity
	kube:                identity internal/latest kube/directory policy kubernetes
	kube/directory:      identity policy
	kube/lease:          kubernetes
	kube/podcert:        ca identity internal/place kube/lease kubernetes
	kube/trustbundle:    ca internal/latest kube/lease kubernetes

	api/troth/v1:        grpc
	api:                 api/troth/v1 handshake identity grpc
	server:              api/troth/v1 ca fleet handshake identity internal/health internal/latest internal/place internal/proc kube/directory mint policy storage token grpc

	agent/capture:       internal/latest internal/proc
	agent/workload:      identity internal/latest internal/proc grpc workloadapi
	agent/hbone:
	agent/proxy:         agent/hbone handshake internal/latest policy
	agent/cni:           internal/proc
	agent/pods:          agent/capture agent/cni agent/workload internal/proc
	agent/directory:     agent/proxy api/troth/v1 grpc
	agent:               agent/capture agent/cni agent/directory agent/pods agent/proxy agent/workload api api/troth/v1 handshake identity internal/health internal/latest policy grpc

	trothtest:           agent/workload ca handshake internal/latest policy storage
	trothtest/bad:       handshake identity
	check:               api api/troth/v1 identity internal/bounded kube policy kubernetes grpc

	internal/manifest:   policy
	internal/dev:        * grpc
	cmd/troth:           * grpc workloadapi
	cmd/troth-server:    *
	cmd/troth-agent:     *
	cmd/troth-cni:       agent/cni

	test/apiserver:      kubernetes test/parts test/pki
	test/cluster:        kubernetes test/apiserver test/cluster/machine/spec test/parts test/pki
	test/cluster/image/app:
	test/cluster/image/pause:
	test/cluster/image/workload: workloadapi
	test/cluster/machine: test/cluster/machine/spec
	test/cluster/machine/spec:
	test/cluster/up:     test/cluster
	test/e2e:
	test/load:           * grpc workloadapi test/tuned
	test/parts:
	test/pki:
	test/oidc:
	test/postgres:
	test/tuned:
`

// reachRules says what a package must not depend on, by however many steps: the
// packages named and all below them.
const reachRules = `
	agent:            ca fleet kube server storage k8s.io sigs.k8s.io
	cmd/troth-agent:  ca fleet kube server storage k8s.io sigs.k8s.io testing
	cmd/troth-server: agent testing
	cmd/troth-cni:    api ca fleet kube server storage google.golang.org/grpc google.golang.org/protobuf k8s.io github.com/prometheus testing
	agent/cni:        ca fleet kube server storage google.golang.org/grpc k8s.io github.com/prometheus
	cmd/troth:        testing
	ca:               kube server k8s.io google.golang.org/grpc
	fleet:            kube server k8s.io google.golang.org/grpc
	ca/keyhelper:     ca k8s.io google.golang.org/grpc
	handshake:        k8s.io google.golang.org/grpc
	identity:         k8s.io google.golang.org/grpc
	policy:           k8s.io google.golang.org/grpc
	storage:          k8s.io google.golang.org/grpc
	token:            k8s.io google.golang.org/grpc
	mint:             ca server storage k8s.io google.golang.org/grpc testing
`

// families are the words of importRules for packages that are not ours.
const families = `
	grpc:        google.golang.org/grpc google.golang.org/genproto
	workloadapi: github.com/spiffe/go-spiffe/v2/proto github.com/spiffe/go-spiffe/v2/workloadapi
	kubernetes:  k8s.io sigs.k8s.io
`

func TestImports(t *testing.T) {
	packages := load(t)
	allowed, family := parseTable(t, importRules), parseTable(t, families)

	for _, name := range slices.Sorted(maps.Keys(packages.ours)) {
		may, ok := allowed[name]
		if !ok {
			t.Errorf("package %s has no row in importRules: give it a row", name)
			continue
		}
		for _, path := range packages.ours[name].Imports {
			if imported, ok := ours(path); ok {
				harness := under(imported, "test") || imported == "storage/storagetest"
				if !slices.Contains(may, imported) && (harness || !slices.Contains(may, "*")) {
					t.Errorf("%s imports %s, which its row does not allow", name, imported)
				}
				continue
			}
			for word, roots := range family {
				if underAny(path, roots) && !slices.Contains(may, word) {
					t.Errorf("%s imports %s, of %s, which its row does not allow", name, path, word)
				}
			}
		}
	}
	for name, may := range allowed {
		if packages.ours[name] == nil {
			t.Errorf("importRules has a row for %s, which does not exist: delete the row", name)
		}
		for _, word := range may {
			if packages.ours[word] == nil && family[word] == nil && word != "*" {
				t.Errorf("importRules allows %s to import %s, which does not exist", name, word)
			}
		}
	}
}

func TestReach(t *testing.T) {
	packages := load(t)
	for name, never := range parseTable(t, reachRules) {
		from := packages.ours[name]
		if from == nil {
			t.Errorf("reachRules has a row for %s, which does not exist: delete the row", name)
			continue
		}
		for _, path := range from.Deps {
			short, _ := ours(path)
			if underAny(short, never) || underAny(path, never) {
				t.Errorf("%s depends on %s: go list -deps, or go mod why, tells how", name, path)
			}
		}
	}
}

// TestDependenciesAreDefended holds CONTRIBUTING.md to its word: every module
// that this one imports from has its sentence there.
func TestDependenciesAreDefended(t *testing.T) {
	packages := load(t)
	direct := make(map[string]bool)
	for _, p := range packages.ours {
		for _, path := range slices.Concat(p.Imports, p.TestImports, p.XTestImports) {
			if imported := packages.all[path]; imported != nil && imported.Module != nil && !imported.Module.Main {
				direct[imported.Module.Path] = true
			}
		}
	}

	contributing, err := os.ReadFile("CONTRIBUTING.md")
	if err != nil {
		t.Fatal(err)
	}
	row := regexp.MustCompile("(?m)^\\| `(\\S+)` \\| (.+) \\|$")
	defended := make(map[string]bool)
	for _, match := range row.FindAllSubmatch(contributing, -1) {
		defended[string(match[1])] = true
	}

	for module := range direct {
		if !defended[module] {
			t.Errorf("CONTRIBUTING.md does not say why we depend on %s", module)
		}
	}
	for module := range defended {
		if !direct[module] {
			t.Errorf("CONTRIBUTING.md defends %s, which nothing imports: delete the row", module)
		}
	}
}

// TestNoMachinePaths finds what works on its author's machine only: a path in
// somebody's home, or in this checkout.
func TestNoMachinePaths(t *testing.T) {
	checkout, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	places := []string{`/(home|Users)/\w`}
	for _, place := range []string{checkout, os.Getenv("HOME")} {
		// The root folder is nobody's, and the homes of system users are
		// places that a manifest may name.
		if strings.Count(place, "/") > 1 || place == filepath.Join("/", "root") {
			places = append(places, regexp.QuoteMeta(place)+`(/|\b)`)
		}
	}
	// A path begins where no longer path or address goes on.
	machinePath := regexp.MustCompile(`(?m)(^|[^\w./-])(` + strings.Join(places, "|") + `).*`)

	err = filepath.WalkDir(".", func(path string, entry fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case entry.IsDir() && (path == ".git" || path == "bin"):
			return filepath.SkipDir
		case !entry.Type().IsRegular():
			return nil
		}
		content, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		if found := machinePath.Find(content); found != nil {
			t.Errorf("%s names a path of one machine: %q", path, found)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// packageSet is all packages of this module, by their path below it, and all
// that they or their tests depend on, by their whole path.
type packageSet struct {
	ours, all map[string]*listed
}

// listed is what go list tells of a package.
type listed struct {
	ImportPath                         string
	Imports, TestImports, XTestImports []string
	Deps                               []string
	Module                             *struct {
		Path string
		Main bool
	}
}

func load(t *testing.T) packageSet {
	t.Helper()
	list := exec.CommandContext(t.Context(), "go", "list", "-deps", "-test",
		"-json=ImportPath,Imports,TestImports,XTestImports,Deps,Module", "./...")
	var complaint bytes.Buffer
	list.Stderr = &complaint
	output, err := list.Output()
	if err != nil {
		t.Fatalf("go list: %v\n%s", err, &complaint)
	}

	set := packageSet{ours: make(map[string]*listed), all: make(map[string]*listed)}
	for decoder := json.NewDecoder(bytes.NewReader(output)); ; {
		p := new(listed)
		if err := decoder.Decode(p); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatalf("read what go list says: %v", err)
		}
		set.all[p.ImportPath] = p
		// Left out are the variants that -test adds: a package as its test
		// sees it, the test's own program, and this folder, which has only tests.
		name, ok := ours(p.ImportPath)
		if ok && !strings.Contains(name, " ") && !strings.HasSuffix(name, ".test") {
			set.ours[name] = p
		}
	}
	if len(set.ours) == 0 {
		t.Fatal("go list ./... finds no package of ours")
	}
	return set
}

// ours returns the path of a package below our module, and whether it is there.
func ours(path string) (string, bool) {
	return strings.CutPrefix(path, "troth.dev/troth/")
}

// under reports whether path is root or below it.
func under(path, root string) bool {
	return path == root || strings.HasPrefix(path, root+"/")
}

func underAny(path string, roots []string) bool {
	return slices.ContainsFunc(roots, func(root string) bool { return under(path, root) })
}

// parseTable reads rows of a name, a colon and words.
func parseTable(t *testing.T, table string) map[string][]string {
	t.Helper()
	rows := make(map[string][]string)
	for line := range strings.Lines(table) {
		if strings.TrimSpace(line) == "" {
			continue
		}
		name, words, ok := strings.Cut(strings.TrimSpace(line), ":")
		if _, twice := rows[name]; !ok || twice {
			t.Fatalf("row %q has no colon, or is the second of its name", line)
		}
		rows[name] = strings.Fields(words)
	}
	return rows
}
