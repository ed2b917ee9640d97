package mint_test

import (
	"encoding/json"
	"errors"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"troth.dev/troth/mint"
)

// FuzzParse: whatever a file has, it is rules that can be asked, or an error.
func FuzzParse(f *testing.F) {
	f.Add(github + rule("true", "spiffe://t.example/a"))
	f.Add(github + rule(`claims.a == "b" && claims["c.d"].e in ["f"]`, `spiffe://t.example/*/{claims[\"c.d\"].e}`))
	f.Add("issuers: [{name: a, issuer: b, audience: c, jwksFile: d}]\nrules: [{name: e, issuer: a, condition: 'claims.all(x, x != \"\")', ids: ['spiffe://f/g'], maxTTL: 1h}]")
	f.Add("a: &a [*a]")
	c := parseClaims(f, githubClaims())
	f.Fuzz(func(t *testing.T, text string) {
		r, err := mint.Parse([]byte(text))
		if err != nil {
			if _, ok := errors.AsType[*mint.ConfigError](err); !ok {
				t.Fatalf("Parse = %v, which has no place", err)
			}
			return
		}
		if len(r.Explain(c, "spiffe://t.example/a", 0)) == 0 || r.TrustDomain().IsZero() || r.MaxTTL() < mint.MinTTL {
			t.Errorf("Parse(%q) = rules of nothing", text)
		}
	})
}

// FuzzClaims: what is read keeps the bounds, and means the same to another reader.
func FuzzClaims(f *testing.F) {
	good, err := json.Marshal(githubClaims())
	if err != nil {
		f.Fatal(err)
	}
	for _, seed := range []string{
		string(good), `{}`, `null`, `[]`, `{"aud":["a",1]}`, `{"iat":1e400}`, `{"iat":9223372036854775808}`, `{"a":{"b":1,"b":2}}`, `{"a":"\ud800"}`,
		`{"iss":"a","ISS":"b"}`, `{"a":[[[[[[[[1]]]]]]]]}`, `{} {}`, `{"a":"[[[[[[[[[["}`, "{\"a\":\"\xff\"}",
	} {
		f.Add([]byte(seed))
	}
	r := rules(f, github+rule(`claims.all(name, name != "x") && has(claims.a)`, "spiffe://t.example/{claims.a}"))
	f.Fuzz(func(t *testing.T, data []byte) {
		c, err := mint.ParseClaims(data)
		if err != nil {
			return
		}
		var again map[string]any
		if err := json.Unmarshal(data, &again); err != nil || again == nil {
			t.Fatalf("ParseClaims(%q) succeeds, and encoding/json: %v", data, err)
		}
		if iss, _ := again["iss"].(string); iss != c.Issuer {
			t.Errorf("ParseClaims(%q) reads issuer %q, and encoding/json %q", data, c.Issuer, iss)
		}
		r.Explain(c, "spiffe://t.example/a", 0)
	})
}

// FuzzPattern: whatever a claim's value is, a rule gives exactly one ID for it, which
// has as many segments as the pattern; and another value gives another.
func FuzzPattern(f *testing.F) {
	for _, seed := range []string{"main", "..", ".", "*", "a/b", "a_2Fb", "{claims.b}", "", "\x00", "ä", "refs/heads/main:environment:production", "%2F", "a/../b"} {
		f.Add(seed, "other", "spiffe://t.example/a/"+seed)
	}
	const before, behind = "spiffe://t.example/x/p-", "/y"
	r := rules(f, github+rule("true", before+"{claims.ref}"+behind))
	gives := func(t *testing.T, value string) (string, bool) {
		claims := githubClaims()
		claims["ref"] = value
		data, err := json.Marshal(claims)
		if err != nil {
			t.Fatal(err)
		}
		c, err := mint.ParseClaims(data)
		if err != nil {
			return "", false
		}
		message := r.Explain(c, "", 0)[0].Message
		id, ok := strings.CutPrefix(message, "gives spiffe://")
		return "spiffe://" + id, ok
	}
	f.Fuzz(func(t *testing.T, one, other, asked string) {
		id, ok := gives(t, one)
		if !ok {
			return
		}
		parsed, err := spiffeid.FromString(id)
		if err != nil || strings.Count(parsed.Path(), "/") != 3 || !strings.HasPrefix(id, before) || !strings.HasSuffix(id, behind) {
			t.Fatalf("%q gives %q, %v", one, id, err)
		}
		claims := githubClaims()
		claims["ref"] = one
		m := r.Match(parseClaims(t, claims))
		if _, err := m.Decide(id, 0); err != nil {
			t.Errorf("%q is said to give %q, and does not: %v", one, id, err)
		}
		if _, err := m.Decide(asked, 0); err == nil && asked != id {
			t.Errorf("%q gives %q too", one, asked)
		}
		if another, ok := gives(t, other); ok && other != one && another == id {
			t.Errorf("%q and %q both give %q", one, other, id)
		}
	})
}
