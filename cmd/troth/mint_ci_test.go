package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.yaml.in/yaml/v3"

	"troth.dev/troth/ca"
	"troth.dev/troth/identity"
	"troth.dev/troth/internal/dev"
	"troth.dev/troth/mint"
	"troth.dev/troth/server"
	"troth.dev/troth/storage"
	"troth.dev/troth/test/oidc"
	"troth.dev/troth/token"
)

// ciRules are those of docs/mint-rules.md that the templates are for, of an issuer for
// tests.
const ciRules = `
issuers:
- {name: ci, issuer: %q, audience: troth-tests, caFile: %q, maxTokenLife: 15m}
rules:
- name: shop-pull-requests
  issuer: ci
  condition: claims.repository == "example/shop" && claims.event_name == "pull_request"
  ids: ["spiffe://tests.example/shop/runs/{claims.run_id}/*"]
  maxTTL: 30m
- name: shop-merge-requests
  issuer: ci
  condition: claims.project_id == "4242" && claims.pipeline_source == "merge_request_event"
  ids: ["spiffe://tests.example/shop/pipelines/{claims.pipeline_id}/*"]
  maxTTL: 30m
`

// ciSystem is a CI system with a server that issues to its jobs.
type ciSystem struct {
	issuer  *oidc.Issuer
	rules   string
	address string
	bundle  string // PEM, of the server's trust domain
	store   *storage.Memory
}

const ciSecret = "the runner's own"

var (
	githubJob = map[string]any{"sub": "repo:example/shop:pull_request", "repository": "example/shop", "event_name": "pull_request", "run_id": "42"}
	gitlabJob = map[string]any{"sub": "project_path:example/shop", "project_id": "4242", "pipeline_source": "merge_request_event", "pipeline_id": "77"}
)

func startCI(t *testing.T) *ciSystem {
	t.Helper()
	c := &ciSystem{issuer: oidc.Start(t), store: storage.NewMemory()}
	c.rules = fmt.Sprintf(ciRules, c.issuer.URL, c.issuer.CAFile)
	rules, err := mint.Parse([]byte(c.rules))
	if err != nil {
		t.Fatal(err)
	}
	verifier, err := mint.NewVerifier(mint.VerifierConfig{Rules: rules})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(verifier.Close)

	kek := make([]byte, ca.KeySize)
	rand.Read(kek)
	keys, err := ca.NewSealedKeys(kek)
	if err != nil {
		t.Fatal(err)
	}
	td, discard := spiffeid.RequireTrustDomainFromString("example.org"), slog.New(slog.DiscardHandler)
	issuer, err := ca.Open(t.Context(), ca.Config{TrustDomain: td, Keys: keys, Authorities: c.store, Ledger: c.store, Audit: discard})
	if err != nil {
		t.Fatal(err)
	}
	profile, err := ca.NewProfile(ca.ProfileConfig{Life: rules.MaxTTL()})
	if err != nil {
		t.Fatal(err)
	}
	forTests, err := ca.Open(t.Context(), ca.Config{
		TrustDomain: rules.TrustDomain(), Keys: keys, Authorities: c.store.Tests(), Ledger: c.store, Audit: discard, Profile: profile, Test: true,
	})
	if err != nil {
		t.Fatal(err)
	}
	cluster, err := dev.NewCluster(identity.ServiceAccount{})
	if err != nil {
		t.Fatal(err)
	}
	tokens, err := token.New(token.Config{Issuers: []string{dev.Issuer}, Audience: td.IDString(), Keys: cluster.Keys})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(tokens.Close)
	s, err := server.New(server.Config{
		TrustDomain: td, Issuer: issuer, Tokens: tokens, Pods: cluster, Agents: identity.ServiceAccount{Namespace: "troth-node", Name: "troth-agent"},
		Fleet: c.store, Replica: "test", Log: discard, Metrics: prometheus.NewRegistry(),
		Mint: &server.Mint{Rules: rules, Verifier: verifier, Issuer: forTests, Tokens: c.store},
	})
	if err != nil {
		t.Fatal(err)
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	c.address = listener.Addr().String()
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	over := make(chan error, 1)
	go func() { over <- s.Serve(ctx, listener) }()
	t.Cleanup(func() {
		cancel()
		if err := <-over; err != nil {
			t.Errorf("the server ends with %v", err)
		}
	})
	bundle, _ := issuer.Bundle().Load()
	pem, err := bundle.X509Bundle().Marshal()
	if err != nil {
		t.Fatal(err)
	}
	c.bundle = string(pem)
	return c
}

// runner is the part of a GitHub runner that gives a job its token, for whoever knows
// the job's secret.
func (c *ciSystem) runner(t *testing.T, claims map[string]any) *httptest.Server {
	t.Helper()
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") != "bearer "+ciSecret || r.URL.Query().Get("api-version") != "2.0" {
			http.Error(w, "who are you?", http.StatusUnauthorized)
			return
		}
		made := c.issuer.Token(t, c.issuer.Claims(r.URL.Query().Get("audience"), claims))
		if err := json.NewEncoder(w).Encode(map[string]any{"count": len(made), "value": made}); err != nil {
			t.Error(err)
		}
	}))
	t.Cleanup(s.Close)
	return s
}

// shell runs a script as CI systems do, with troth on its path.
type shell struct {
	dir string
	env []string
}

func newShell(t *testing.T, env ...string) shell {
	t.Helper()
	program, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	bin := t.TempDir()
	// Called so, this program is troth: TestMain sees to that.
	if err := os.Symlink(program, filepath.Join(bin, "troth")); err != nil {
		t.Fatal(err)
	}
	return shell{dir: t.TempDir(), env: append(os.Environ(), append(env, "PATH="+bin+":"+os.Getenv("PATH"))...)}
}

func (s shell) run(t *testing.T, script string) (output string, err error) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "bash", "-e", "-o", "pipefail", "-c", script)
	cmd.Dir, cmd.Env = s.dir, s.env
	said, err := cmd.CombinedOutput()
	return string(said), err
}

func (s shell) write(t *testing.T, path, content string) {
	t.Helper()
	path = filepath.Join(s.dir, path)
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}

const ciIdentities = "# Who is in the shop.\nspiffe://ci.test/ns/shop/sa/cart\nspiffe://ci.test/ns/shop/sa/stock\n"

// checkout puts into the shell's folder what the templates expect of a repository: a
// list of identities, and a module with the test of docs/ci.md.
func (s shell) checkout(t *testing.T) {
	t.Helper()
	root, err := filepath.Abs(filepath.Join("..", ".."))
	if err != nil {
		t.Fatal(err)
	}
	page, err := os.ReadFile(filepath.Join(root, "docs", "ci.md"))
	if err != nil {
		t.Fatal(err)
	}
	code := regexp.MustCompile("(?s)```go\n(.*?)```").FindSubmatch(page)
	if code == nil {
		t.Fatal("docs/ci.md has no test")
	}
	s.write(t, "ci/identities.txt", ciIdentities)
	s.write(t, "shop_test.go", string(code[1]))
	// The module is this one with another name in front: it has what it has.
	for _, name := range []string{"go.mod", "go.sum"} {
		content, err := os.ReadFile(filepath.Join(root, name))
		if err != nil {
			t.Fatal(err)
		}
		if name == "go.mod" {
			content = bytes.Replace(content, []byte("module troth.dev/troth"), []byte("module example.com/shop"), 1)
			content = fmt.Appendf(content, "\nrequire troth.dev/troth v0.0.0\nreplace troth.dev/troth => %s\n", root)
		}
		s.write(t, name, string(content))
	}
}

// installs are the steps that the test leaves out: troth is there, as built from this
// very code.
const installs = "go install troth.dev/troth/cmd/troth@latest"

// The jobs of the templates do what they say, against a real server and an issuer of
// tokens that is the test's.
func TestCITemplates(t *testing.T) {
	c := startCI(t)
	t.Run("github-actions.yaml", func(t *testing.T) {
		var workflow struct {
			Permissions map[string]string `yaml:"permissions"`
			Jobs        map[string]struct {
				Permissions map[string]string `yaml:"permissions"`
				Env         map[string]string `yaml:"env"`
				Steps       []struct {
					Name string `yaml:"name"`
					Run  string `yaml:"run"`
				} `yaml:"steps"`
			} `yaml:"jobs"`
		}
		readTemplate(t, "github-actions.yaml", &workflow)
		vars := strings.NewReplacer(
			"${{ vars.TROTH_SERVER }}", c.address, "${{ vars.TROTH_TRUST_DOMAIN }}", "example.org", "${{ vars.TROTH_SERVER_BUNDLE }}", c.bundle)
		for name, job := range workflow.Jobs {
			t.Run(name, func(t *testing.T) {
				env := []string{"RUNNER_TEMP=" + t.TempDir(), "GITHUB_RUN_ID=42"}
				if job.Permissions["id-token"] == "write" || job.Permissions == nil && workflow.Permissions["id-token"] == "write" {
					env = append(env, "ACTIONS_ID_TOKEN_REQUEST_URL="+c.runner(t, githubJob).URL+"/token?api-version=2.0", "ACTIONS_ID_TOKEN_REQUEST_TOKEN="+ciSecret)
				}
				for variable, value := range job.Env {
					if value = vars.Replace(value); strings.Contains(value, "${{") {
						t.Fatalf("%s is %s, which the test does not know", variable, value)
					}
					env = append(env, variable+"="+value)
				}
				sh := newShell(t, env...)
				sh.checkout(t)
				for _, step := range job.Steps {
					if step.Run == "" || step.Run == installs {
						continue
					}
					said, err := sh.run(t, step.Run)
					if err != nil {
						t.Fatalf("%s: %v\n%s", step.Name, err, said)
					}
					checkSaid(t, name, step.Name, said)
				}
			})
		}
	})
	t.Run("gitlab-ci.yml", func(t *testing.T) {
		var pipeline map[string]struct {
			IDTokens map[string]struct {
				Audience string `yaml:"aud"`
			} `yaml:"id_tokens"`
			BeforeScript []string `yaml:"before_script"`
			Script       []string `yaml:"script"`
		}
		readTemplate(t, "gitlab-ci.yml", &pipeline)
		for name, job := range pipeline {
			if name == "default" {
				continue
			}
			t.Run(name, func(t *testing.T) {
				bundle := filepath.Join(t.TempDir(), "bundle")
				if err := os.WriteFile(bundle, []byte(c.bundle), 0o600); err != nil {
					t.Fatal(err)
				}
				env := []string{"CI_PIPELINE_ID=77", "TROTH_SERVER=" + c.address, "TROTH_TRUST_DOMAIN=example.org", "TROTH_SERVER_BUNDLE=" + bundle}
				for variable, asked := range job.IDTokens {
					env = append(env, variable+"="+c.issuer.Token(t, c.issuer.Claims(asked.Audience, gitlabJob)))
				}
				sh := newShell(t, env...)
				sh.checkout(t)
				for _, line := range append(job.BeforeScript, job.Script...) {
					if line == installs {
						continue
					}
					said, err := sh.run(t, line)
					if err != nil {
						t.Fatalf("%s: %v\n%s", line, err, said)
					}
					checkSaid(t, name, line, said)
				}
			})
		}
	})
	// What the server signed is in its ledger.
	for _, id := range []string{"spiffe://tests.example/shop/runs/42/cart", "spiffe://tests.example/shop/pipelines/77/stock"} {
		issued, err := c.store.Query(t.Context(), storage.Query{ID: spiffeid.RequireFromString(id)})
		if err != nil || len(issued) != 1 {
			t.Errorf("the ledger has %d certificates of %s (%v)", len(issued), id, err)
		}
	}
}

// checkSaid sees that a step did something: a loop over no file succeeds too.
func checkSaid(t *testing.T, job, step, said string) {
	t.Helper()
	verified := strings.Count(said, "/svid.pem: OK")
	switch {
	case strings.Contains(step, "int") && !strings.Contains(said, "2 identities of"):
		t.Errorf("%s: %s: %s", job, step, said)
	case strings.Contains(step, "openssl") && verified != 2, job == "go-test" && !strings.Contains(said, "ok"):
		t.Errorf("%s: %s: %s", job, step, said)
	case step == "Test" && job != "go-test" && verified != 2:
		t.Errorf("%s: %d were verified: %s", job, verified, said)
	}
}

func readTemplate(t *testing.T, name string, into any) {
	t.Helper()
	content, err := os.ReadFile(filepath.Join("..", "..", "docs", "ci", name))
	if err != nil {
		t.Fatal(err)
	}
	if err := yaml.Unmarshal(content, into); err != nil {
		t.Fatal(err)
	}
}

// TestCIPage holds docs/ci.md to its word: its commands print what it says, but for
// times. With -update it is made to.
func TestCIPage(t *testing.T) {
	page, err := filepath.Abs(filepath.Join("..", "..", "docs", "ci.md"))
	if err != nil {
		t.Fatal(err)
	}
	content, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	c := startCI(t)
	sh := newShell(t, "ACTIONS_ID_TOKEN_REQUEST_URL="+c.runner(t, githubJob).URL+"/token?api-version=2.0", "ACTIONS_ID_TOKEN_REQUEST_TOKEN="+ciSecret)
	sh.write(t, "ci/identities.txt", ciIdentities)
	sh.write(t, "bundle.pem", c.bundle)
	sh.write(t, "mint.yaml", c.rules)
	claims, err := json.Marshal(c.issuer.Claims("troth-tests", githubJob))
	if err != nil {
		t.Fatal(err)
	}
	sh.write(t, "claims.json", string(claims))

	commands := 0
	told := regexp.MustCompile("(?s)```console\n(.*?)```").ReplaceAllFunc(content, func(block []byte) []byte {
		var printed bytes.Buffer
		printed.WriteString("```console\n")
		for line := range bytes.Lines(block) {
			command, ok := bytes.CutPrefix(line, []byte("$ "))
			if !ok {
				continue
			}
			commands++
			printed.Write(line)
			said, _ := sh.run(t, strings.ReplaceAll(string(command), "troth.example.org:8443", c.address))
			printed.WriteString(strings.ReplaceAll(said, c.address, "troth.example.org:8443"))
		}
		printed.WriteString("```")
		return printed.Bytes()
	})
	if commands == 0 {
		t.Fatal("there is no command on the page")
	}
	moments := regexp.MustCompile(`20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ`)
	masked := func(text []byte) string { return string(moments.ReplaceAll(text, []byte("TIME"))) }
	if diff := cmp.Diff(masked(content), masked(told)); diff != "" && !*update {
		t.Errorf("what the page says (-) and what the commands print (+); -update writes it:\n%s", diff)
	}
	if *update && masked(content) != masked(told) {
		if err := os.WriteFile(page, told, 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

// What a server or a runner says that is no good is an error, and nothing is written.
func TestMintByServerRefused(t *testing.T) {
	c := startCI(t)
	sh := newShell(t)
	sh.write(t, "bundle.pem", c.bundle)
	token := func(claims map[string]any) string { return c.issuer.Token(t, c.issuer.Claims("troth-tests", claims)) }
	sh.write(t, "good", token(githubJob))
	sh.write(t, "another", token(githubJob))
	sh.write(t, "stranger", token(map[string]any{"sub": "x", "repository": "example/other", "event_name": "pull_request", "run_id": "42"}))
	if err := os.MkdirAll(filepath.Join(sh.dir, "other"), 0o700); err != nil {
		t.Fatal(err)
	}
	with := "troth mint --server " + c.address + " --trust-domain example.org "
	runner := func(answer string, status int) string {
		s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(status)
			fmt.Fprint(w, answer)
		}))
		t.Cleanup(s.Close)
		return "ACTIONS_ID_TOKEN_REQUEST_TOKEN=x ACTIONS_ID_TOKEN_REQUEST_URL=" + s.URL + "/?a=b "
	}
	for _, tt := range []struct{ name, script, want string }{
		{"one of two", with + "--bundle bundle.pem --token another --spiffe-id spiffe://tests.example/shop/runs/42/cart --spiffe-id spiffe://tests.example/shop/runs/43/cart --out out", "refuses 1 of 2 identities, and nothing is written:\n  spiffe://tests.example/shop/runs/43/cart: ID_NOT_PERMITTED: "},
		{"good", with + "--bundle bundle.pem --token good --spiffe-id spiffe://tests.example/shop/runs/42/cart --out good-out", "1 identity of tests.example in good-out"},
		{"spent", with + "--bundle bundle.pem --token good --spiffe-id spiffe://tests.example/shop/runs/42/cart --out out", "troth: mint: TOKEN_SPENT: "},
		{"no rule", with + "--bundle bundle.pem --token stranger --spiffe-id spiffe://tests.example/shop/runs/42/cart --out out", "troth: mint: NO_RULE_MATCHES: "},
		{"too long", with + "--bundle bundle.pem --ttl 1h --token <(cat fresh) --spiffe-id spiffe://tests.example/shop/runs/42/cart --out out", "TTL_TOO_LONG"},
		{"not the server", "troth mint --ephemeral --spiffe-id spiffe://example.org/a --out other/o > /dev/null; " + with + "--bundle other/o/bundle.pem --token good --spiffe-id spiffe://tests.example/a --out out", "CERTIFICATE_UNTRUSTED"},
		{"no such token", with + "--bundle bundle.pem --token nowhere --spiffe-id spiffe://tests.example/a --out out", "nowhere: no such file"},
		{"runner refuses", runner("", 403) + with + "--bundle bundle.pem --github x --spiffe-id spiffe://tests.example/a --out out", "ask GitHub for a token: 403 Forbidden"},
		{"runner has none", runner("{}", 200) + with + "--bundle bundle.pem --github x --spiffe-id spiffe://tests.example/a --out out", "ask GitHub for a token: the answer has none"},
		{"runner speaks nonsense", runner("<html>", 200) + with + "--bundle bundle.pem --github x --spiffe-id spiffe://tests.example/a --out out", "ask GitHub for a token: read the answer: "},
		{"runner says a line", runner(`{"value":"a\nb"}`, 200) + with + "--bundle bundle.pem --github x --spiffe-id spiffe://tests.example/a --out out", "ask GitHub for a token: the answer has none"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			sh.write(t, "fresh", token(githubJob))
			said, err := sh.run(t, tt.script)
			if (err == nil) != (tt.name == "good") || !strings.Contains(said, tt.want) {
				t.Errorf("it says %q (%v), want %q", said, err, tt.want)
			}
			if left, err := filepath.Glob(filepath.Join(sh.dir, "*out")); err != nil || len(left) > 1 {
				t.Errorf("there is %v (%v)", left, err)
			}
		})
	}
}
