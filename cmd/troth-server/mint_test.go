package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"troth.dev/troth/storage/sqlite"
)

const mintRules = `
issuers:
- {name: ci, issuer: "https://ci.test", audience: troth-tests}
rules:
- {name: all, issuer: ci, condition: 'claims.repository == "example/shop"', ids: ["spiffe://tests.example/ci/shop"], maxTTL: 10m}
`

func TestMintFlags(t *testing.T) {
	dir := t.TempDir()
	key, rules := filepath.Join(dir, "key"), filepath.Join(dir, "rules.yaml")
	write := func(path, content string) {
		t.Helper()
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(key, strings.Repeat("k", 32))
	for _, test := range []struct {
		name, rules string
		args        []string
		want        string
	}{
		{"rules alone", mintRules, []string{"-mint-rules", rules}, "-mint-rules and -mint-trust-domain go together"},
		{"trust domain alone", mintRules, []string{"-mint-trust-domain", "tests.example"}, "-mint-rules and -mint-trust-domain go together"},
		{"no file", mintRules, []string{"-mint-rules", rules + ".none", "-mint-trust-domain", "tests.example"}, "no such file"},
		{"no trust domain", mintRules, []string{"-mint-rules", rules, "-mint-trust-domain", "x y"}, "-mint-trust-domain: "},
		{"another trust domain", mintRules, []string{"-mint-rules", rules, "-mint-trust-domain", "other.example"}, `trust domain "tests.example", and -mint-trust-domain is "other.example"`},
		{"production", strings.ReplaceAll(mintRules, "tests.example", "example.test"), []string{"-mint-rules", rules, "-mint-trust-domain", "example.test"}, "it is that of production"},
		{"the agents' audience", strings.ReplaceAll(mintRules, "troth-tests", "spiffe://example.test"), []string{"-mint-rules", rules, "-mint-trust-domain", "tests.example"}, "is that of pods and agents"},
		{"bad rules", mintRules + "  x: 1\n", []string{"-mint-rules", rules, "-mint-trust-domain", "tests.example"}, "rules.yaml: mint: yaml: line "},
		{"all is well", mintRules, []string{"-mint-rules", rules, "-mint-trust-domain", "tests.example"}, "kubeconfig"},
	} {
		t.Run(test.name, func(t *testing.T) {
			write(rules, test.rules)
			_, err := serverIn(t, t.TempDir(), append(test.args, "-key-encryption-key", key)...)
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("the server ends with %v, want %q", err, test.want)
			}
		})
	}

	// The authorities for tests are beside the others, and of the trust domain for tests.
	if _, err := serverIn(t, dir, "-key-encryption-key", key, "-mint-rules", rules, "-mint-trust-domain", "tests.example"); err == nil {
		t.Fatal("it serves without a cluster")
	}
	store, err := sqlite.Open(t.Context(), sqlite.Config{Path: filepath.Join(dir, "troth.db")})
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	doc, err := store.Tests().Load(t.Context())
	if err != nil || !strings.Contains(string(doc.Data), "tests.example") || strings.Contains(production(t, store), "tests.example") {
		t.Errorf("the document for tests is %d bytes, %v", len(doc.Data), err)
	}
}

func production(t *testing.T, store *sqlite.Store) string {
	t.Helper()
	doc, err := store.Load(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return string(doc.Data)
}
