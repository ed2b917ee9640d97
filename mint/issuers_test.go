package mint_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	jose "github.com/go-jose/go-jose/v4"

	"troth.dev/troth/mint"
	"troth.dev/troth/test/oidc"
	"troth.dev/troth/token"
)

// verifier verifies the tokens of one issuer, which is configured by fields.
func verifier(t testing.TB, url, fields string) *mint.Verifier {
	t.Helper()
	r := rules(t, fmt.Sprintf("issuers:\n- {name: ci, issuer: %q, audience: troth-tests, %s}\nrules:\n", url, fields)+
		`- {name: r, issuer: ci, condition: "true", ids: ["spiffe://t.example/a"], maxTTL: 1m}`)
	v, err := mint.NewVerifier(mint.VerifierConfig{Rules: r})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(v.Close)
	return v
}

// verified is the reason of a refusal and what is said of it, or "OK".
func verified(t testing.TB, v *mint.Verifier, raw string) (token.Reason, string) {
	t.Helper()
	_, err := v.Verify(t.Context(), raw)
	if err == nil {
		return "OK", ""
	}
	e, ok := errors.AsType[*token.Error](err)
	if !ok {
		t.Fatalf("error %v (%T) is no *token.Error", err, err)
	}
	return e.Reason, err.Error()
}

// What an issuer can answer in the place of its keys, and what becomes of it.
func TestFetch(t *testing.T) {
	elsewhere := oidc.Start(t)
	send := func(text string) func(w http.ResponseWriter) {
		return func(w http.ResponseWriter) { fmt.Fprint(w, text) }
	}
	redirect := func(to string) func(w http.ResponseWriter) {
		return func(w http.ResponseWriter) { w.Header().Set("Location", to); w.WriteHeader(http.StatusFound) }
	}
	const discovery, keys = "/.well-known/openid-configuration", oidc.KeysPath
	for _, test := range []struct {
		name   string
		path   string
		answer func(own string) func(w http.ResponseWriter)
		want   string // of what is said; empty if all is well
	}{
		{"all is well", "/none", nil, ""},
		{"no configuration", discovery, func(string) func(http.ResponseWriter) { return func(w http.ResponseWriter) { w.WriteHeader(404) } }, "404 Not Found"},
		{"no JSON", discovery, func(string) func(http.ResponseWriter) { return send("<html>") }, "invalid character"},
		{"large configuration", discovery, func(string) func(http.ResponseWriter) { return send(strings.Repeat(" ", 64<<10) + "{}") }, "more than 65536 bytes"},
		{"another issuer", discovery, func(own string) func(http.ResponseWriter) {
			return send(`{"issuer":"` + own + `/","jwks_uri":"` + own + keys + `"}`)
		}, "calls itself"},
		{"keys elsewhere", discovery, func(own string) func(http.ResponseWriter) {
			return send(`{"issuer":"` + own + `","jwks_uri":"` + elsewhere.URL + keys + `"}`)
		}, "another host"},
		{"keys by HTTP", discovery, func(own string) func(http.ResponseWriter) {
			return send(`{"issuer":"` + own + `","jwks_uri":"http` + strings.TrimPrefix(own, "https") + keys + `"}`)
		}, "is not HTTPS"},
		{"keys in a file", discovery, func(own string) func(http.ResponseWriter) {
			return send(`{"issuer":"` + own + `","jwks_uri":"file:///etc/passwd"}`)
		}, "no URL of keys"},
		{"the issuer twice", discovery, func(own string) func(http.ResponseWriter) {
			return send(`{"issuer":"x","issuer":"` + own + `","jwks_uri":"` + own + keys + `"}`)
		}, "duplicate key"},
		{"redirected configuration", discovery, func(string) func(http.ResponseWriter) { return redirect(elsewhere.URL + discovery) }, "it redirects to"},
		{"redirected keys", keys, func(string) func(http.ResponseWriter) { return redirect(elsewhere.URL + keys) }, "it redirects to"},
		{"redirected to itself", keys, func(own string) func(http.ResponseWriter) { return redirect(own + keys + "2") }, "it redirects to"},
		{"large keys", keys, func(string) func(http.ResponseWriter) { return send(strings.Repeat(" ", 1<<20) + `{"keys":[]}`) }, "more than 1048576 bytes"},
		{"many keys", keys, func(string) func(http.ResponseWriter) { return send(`{"keys":[` + strings.Repeat("{},", 100) + `{}]}`) }, "101 keys"},
		{"no keys", keys, func(string) func(http.ResponseWriter) { return send(`{}`) }, "without keys"},
	} {
		t.Run(test.name, func(t *testing.T) {
			ci := oidc.Start(t)
			if test.answer != nil {
				ci.Answer(func(w http.ResponseWriter, r *http.Request) bool {
					if r.URL.Path != test.path {
						return false
					}
					test.answer(ci.URL)(w)
					return true
				})
			}
			v := verifier(t, ci.URL, fmt.Sprintf("caFile: %q", ci.CAFile))
			reason, text := verified(t, v, ci.Token(t, ci.Claims(audience, nil)))
			if test.want == "" && reason == "OK" {
				return
			}
			if reason != token.KeysUnavailable || !strings.Contains(text, test.want) {
				t.Errorf("Verify = %s: %s; want %s with %q", reason, text, token.KeysUnavailable, test.want)
			}
		})
	}
}

func TestFetchTrusts(t *testing.T) {
	ci := oidc.Start(t)
	raw := ci.Token(t, ci.Claims(audience, nil))
	if reason, text := verified(t, verifier(t, ci.URL, "algorithms: [ES256]"), raw); reason != token.KeysUnavailable || !strings.Contains(text, "certificate") {
		t.Errorf("without the certificate of who vouches for the issuer: %s: %s", reason, text)
	}
	// The keys may be elsewhere if that is said, and in a file.
	elsewhere := fmt.Sprintf("caFile: %q, jwksURL: %q", ci.CAFile, ci.URL+oidc.KeysPath)
	claims := ci.Claims(audience, map[string]any{"iss": "https://named.test"})
	if reason, text := verified(t, verifier(t, "https://named.test", elsewhere), ci.Token(t, claims)); reason != "OK" {
		t.Errorf("with jwksURL: %s: %s", reason, text)
	}
	key := ci.Key()
	set, err := json.Marshal(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{key.Public()}})
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "jwks.json")
	if err := os.WriteFile(file, set, 0o600); err != nil {
		t.Fatal(err)
	}
	if reason, text := verified(t, verifier(t, "named", fmt.Sprintf("jwksFile: %q", file)), ci.Token(t, ci.Claims(audience, map[string]any{"iss": "named"}))); reason != "OK" {
		t.Errorf("with jwksFile: %s: %s", reason, text)
	}
	// On this machine HTTP will do, if that is said.
	plain := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { w.Write(set) }))
	t.Cleanup(plain.Close)
	if reason, text := verified(t, verifier(t, "named", fmt.Sprintf("jwksURL: %q, loopbackHTTP: true", plain.URL)), ci.Token(t, ci.Claims(audience, map[string]any{"iss": "named"}))); reason != "OK" {
		t.Errorf("by HTTP: %s: %s", reason, text)
	}
}

// However many unknown keys come, the issuer is asked once in half a minute, and a token
// that would be refused anyway asks it nothing.
func TestUnknownKeys(t *testing.T) {
	ci, other := oidc.Start(t), oidc.Start(t)
	v := verifier(t, ci.URL, fmt.Sprintf("caFile: %q", ci.CAFile))
	expired := ci.Claims(audience, map[string]any{"exp": 1, "iat": 1, "nbf": 1})
	for _, claims := range []map[string]any{expired, ci.Claims("other", nil), other.Claims(audience, nil)} {
		if reason, _ := verified(t, v, ci.Token(t, claims)); reason == "OK" {
			t.Errorf("Verify(%v) = OK", claims)
		}
	}
	if n := ci.Fetches(); n != 0 {
		t.Errorf("tokens that are refused anyway had the keys fetched %d times", n)
	}
	if reason, text := verified(t, v, ci.Token(t, ci.Claims(audience, nil))); reason != "OK" {
		t.Fatalf("Verify = %s: %s", reason, text)
	}
	for n := range 50 {
		other.Rotate(t, fmt.Sprintf("made-up-%d", n))
		if reason, _ := verified(t, v, other.Token(t, ci.Claims(audience, nil))); reason != token.UnknownKey {
			t.Fatalf("Verify(unknown key) = %s", reason)
		}
	}
	if n := ci.Fetches(); n != 1 {
		t.Errorf("50 unknown keys had the keys fetched %d times, want once in all", n)
	}
	if reason, text := verified(t, v, ci.Token(t, ci.Claims(audience, nil))); reason != "OK" {
		t.Errorf("after them: %s: %s", reason, text)
	}
}

func TestNewVerifierRefuses(t *testing.T) {
	if _, err := mint.NewVerifier(mint.VerifierConfig{}); err == nil {
		t.Error("NewVerifier without rules succeeded")
	}
	const one = "issuers:\n- {name: ci, issuer: 'https://ci.test', audience: tests, %s}\nrules:\n" +
		`- {name: r, issuer: ci, condition: "true", ids: ["spiffe://t.example/a"], maxTTL: 1m}`
	for fields, want := range map[string]string{
		"kubernetes: true":       "is the cluster, and there is none",
		"caFile: /nowhere":       "no such file",
		"caFile: /proc/self/exe": "",
	} {
		_, err := mint.NewVerifier(mint.VerifierConfig{Rules: rules(t, fmt.Sprintf(one, fields))})
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("NewVerifier(%s) = %v, want %q", fields, err, want)
		}
	}
	v, err := mint.NewVerifier(mint.VerifierConfig{
		Rules:      rules(t, fmt.Sprintf(one, "kubernetes: true")),
		Kubernetes: func(context.Context) ([]byte, error) { return nil, errors.New("away") },
	})
	if err != nil {
		t.Fatal(err)
	}
	v.Close()
}
