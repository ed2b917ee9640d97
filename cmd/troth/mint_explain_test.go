package main

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"troth.dev/troth/ca"
	"troth.dev/troth/identity"
	"troth.dev/troth/internal/dev"
	"troth.dev/troth/mint"
	"troth.dev/troth/server"
	"troth.dev/troth/storage"
	"troth.dev/troth/token"
)

const explainedRules = `
issuers:
- {name: ci, issuer: "https://ci.test", audience: troth-tests}
rules:
- {name: main, issuer: ci, condition: 'claims.ref == "main"', ids: ["spiffe://tests.example/ci/*"], maxTTL: 10m}
- {name: other, issuer: ci, condition: 'claims.environment == "x"', ids: ["spiffe://tests.example/ci/*"], maxTTL: 10m}
`

// explainMint runs the command with that standard input.
func explainMint(t *testing.T, stdin string, args ...string) (stdout string, err error) {
	t.Helper()
	var out bytes.Buffer
	cmd := mintExplainCommand()
	cmd.SilenceUsage, cmd.SilenceErrors = true, true
	cmd.SetArgs(args)
	cmd.SetIn(strings.NewReader(stdin))
	cmd.SetOut(&out)
	err = cmd.ExecuteContext(t.Context())
	return out.String(), err
}

func explainedClaims(t *testing.T) string {
	t.Helper()
	now := time.Now().Unix()
	claims, err := json.Marshal(map[string]any{
		"iss": "https://ci.test", "aud": "troth-tests", "sub": "job", "jti": "1", "iat": now - 7200, "exp": now - 7000, "ref": "main",
	})
	if err != nil {
		t.Fatal(err)
	}
	return string(claims)
}

func TestMintExplain(t *testing.T) {
	rules := filepath.Join(t.TempDir(), "rules.yaml")
	if err := os.WriteFile(rules, []byte(explainedRules), 0o600); err != nil {
		t.Fatal(err)
	}
	claims := explainedClaims(t)
	unsigned := base64.RawURLEncoding.EncodeToString([]byte(`{"alg":"none"}`)) + "." + base64.RawURLEncoding.EncodeToString([]byte(claims))
	const id = "spiffe://tests.example/ci/shop"
	table := "RULE   SAYS             BECAUSE\n" +
		"main   MATCHED          gives it for at most 10m0s\n" +
		"other  CONDITION_ERROR  the condition has no value: no such key: environment\n"
	for _, test := range []struct {
		name, stdin string
		args        []string
		want        string // of the output
		code        int
		err         string
	}{
		{"claims", claims, []string{"--rules", rules, "--token", "-", "--id", id}, table, 0, ""},
		{"a token without a signature", unsigned + ".\n", []string{"--rules", rules, "--token", "-", "--id", id}, table, 0, ""},
		{"two parts of one", unsigned, []string{"--rules", rules, "--token", "-", "--id", id}, table, 0, ""},
		{"claims alone", claims, []string{"--rules", rules, "--token", "-"}, "gives spiffe://tests.example/ci/*\n", 0, ""},
		{"JSON", claims, []string{"--rules", rules, "--token", "-", "-o", "json"}, `"reason": "CONDITION_ERROR"`, 0, ""},
		{"another ID", claims, []string{"--rules", rules, "--token", "-", "--id", id + "/x"}, "ID_NOT_PERMITTED", 1, "no rule gives this token " + id + "/x"},
		{"too long", claims, []string{"--rules", rules, "--token", "-", "--id", id, "--ttl", "1h"}, "TTL_TOO_LONG", 1, "no rule gives"},
		{"too short", claims, []string{"--rules", rules, "--token", "-", "--ttl", "1s"}, "", 2, "10s at least"},
		{"rules on standard input", explainedRules, []string{"--rules", "-", "--token", rules}, "", 2, "neither a JSON object nor a token"},
		{"both", "", []string{"--rules", "-", "--token", "-"}, "", 2, "cannot both"},
		{"no token", "", []string{"--rules", rules}, "", 2, "--token names"},
		{"no rules", claims, []string{"--token", "-"}, "", 2, "--rules, or of a server"},
		{"rules and a server", claims, []string{"--token", "-", "--rules", rules, "--server", "x"}, "", 2, "--rules, or of a server"},
		{"half a server", claims, []string{"--token", "-", "--server", "x"}, "", 2, "go together"},
		{"no such rules", claims, []string{"--token", "-", "--rules", rules + ".none"}, "", 2, "no such file"},
		{"bad rules", "rules: 1", []string{"--rules", "-", "--token", rules + ".none"}, "", 2, "no such file"},
		{"a member twice", `{"iss":"a","iss":"b"}`, []string{"--rules", rules, "--token", "-"}, "", 2, "duplicate key"},
		{"a huge token", strings.Repeat("a", 1<<17), []string{"--rules", rules, "--token", "-"}, "", 2, "more than 65536 bytes"},
		{"a token that is none", "a.!.b", []string{"--rules", rules, "--token", "-"}, "", 2, "second part"},
	} {
		t.Run(test.name, func(t *testing.T) {
			out, err := explainMint(t, test.stdin, test.args...)
			code, text := 0, ""
			if err != nil {
				code, text = exitCode(err), err.Error()
			}
			if code != test.code || !strings.Contains(text, test.err) || !strings.Contains(out, test.want) {
				t.Errorf("code %d, %q, output:\n%s\nwant code %d, %q, output:\n%s", code, text, out, test.code, test.err, test.want)
			}
		})
	}
}

// An operator asks a server about the rules that it has.
func TestMintExplainByServer(t *testing.T) {
	discard := slog.New(slog.DiscardHandler)
	td := spiffeid.RequireTrustDomainFromString("dev.troth.test")
	cluster, err := dev.NewCluster(identity.ServiceAccount{})
	if err != nil {
		t.Fatal(err)
	}
	keys, err := ca.NewSealedKeys(bytes.Repeat([]byte{7}, ca.KeySize))
	if err != nil {
		t.Fatal(err)
	}
	rules, err := mint.Parse([]byte(explainedRules))
	if err != nil {
		t.Fatal(err)
	}
	store := storage.NewMemory()
	config := ca.Config{TrustDomain: td, Keys: keys, Authorities: store, Ledger: store, Audit: discard}
	issuer, err := ca.Open(t.Context(), config)
	if err != nil {
		t.Fatal(err)
	}
	config.TrustDomain, config.Authorities, config.Test = rules.TrustDomain(), store.Tests(), true
	forTests, err := ca.Open(t.Context(), config)
	if err != nil {
		t.Fatal(err)
	}
	verifier, err := mint.NewVerifier(mint.VerifierConfig{Rules: rules})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(verifier.Close)
	tokens, err := token.New(token.Config{Issuers: []string{dev.Issuer}, Audience: td.IDString(), Keys: cluster.Keys})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(tokens.Close)
	s, err := server.New(server.Config{
		TrustDomain: td, Issuer: issuer, Tokens: tokens, Pods: cluster, Agents: identity.ServiceAccount{Namespace: "troth-system", Name: "troth-agent"},
		Fleet: store, Replica: "test", Log: discard, Metrics: prometheus.NewRegistry(),
		Mint: &server.Mint{Rules: rules, Verifier: verifier, Issuer: forTests, Tokens: store},
		Operator: func(_ context.Context, raw string, right server.Right) (string, error) {
			if raw != "operator" || right != (server.Right{Verb: "explain", Resource: "mintrules"}) {
				return "", identity.ErrForbidden
			}
			return "somebody", nil
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	served := make(chan error, 1)
	go func() { served <- s.Serve(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		if err := <-served; err != nil {
			t.Errorf("Serve = %v", err)
		}
	})

	dir := t.TempDir()
	bundle, _ := issuer.Bundle().Load()
	write := func(name string, content []byte) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, content, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	args := []string{
		"--token", "-", "--id", "spiffe://tests.example/ci/shop", "--server", l.Addr().String(), "--trust-domain", td.Name(),
		"--bundle", write("bundle.pem", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: bundle.Authorities[0].Certificate.Raw})),
		"--operator-token",
	}
	out, err := explainMint(t, explainedClaims(t), append(args, write("operator", []byte("operator")))...)
	if err != nil || !strings.Contains(out, "main   MATCHED          gives it for at most 10m0s\n") || !strings.Contains(out, "other  CONDITION_ERROR") {
		t.Errorf("%v, output:\n%s", err, out)
	}
	if _, err := explainMint(t, explainedClaims(t), append(args, write("other", []byte("other")))...); err == nil || !strings.Contains(err.Error(), "RBAC") {
		t.Errorf("somebody without the right: %v", err)
	}
}
