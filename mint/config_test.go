package mint_test

import (
	"errors"
	"fmt"
	"os"
	"regexp"
	"strings"
	"testing"

	"troth.dev/troth/mint"
)

// Each thing that can be wrong with a configuration is said, with its place.
func TestParseRefuses(t *testing.T) {
	issuer := func(more string) string {
		return "issuers:\n- name: ci\n  issuer: https://ci.test\n  audience: tests\n" + more +
			"rules:\n- {name: r, issuer: ci, condition: 'true', ids: ['spiffe://t.example/a'], maxTTL: 1m}\n"
	}
	ruled := func(more string) string {
		return "issuers:\n- {name: ci, issuer: 'https://ci.test', audience: tests}\nrules:\n- name: r\n  issuer: ci\n" + more
	}
	const rest = "  ids: ['spiffe://t.example/a']\n  maxTTL: 1m\n"
	condition := func(text string) string { return ruled("  condition: '" + text + "'\n" + rest) }
	pattern := func(text string) string { return ruled("  condition: 'true'\n  maxTTL: 1m\n  ids: ['" + text + "']\n") }
	for _, test := range []struct {
		name, text string
		line       int
		want       string
	}{
		{"nothing", "", 0, "the configuration is empty"},
		{"no YAML", "issuers: [", 0, "yaml: line 1"},
		{"two documents", issuer("") + "---\n" + issuer(""), 0, "more than one document"},
		{"a text", "x", 0, "cannot unmarshal"},
		{"unknown field", issuer("  issuers: x\n"), 0, "line 5: field issuers not found"},
		{"a field twice", issuer("  name: x\n"), 0, `mapping key "name" already defined`},
		{"anchor", "issuers: &a\n- {name: ci, issuer: 'https://ci.test', audience: tests}\nrules: *a\n", 1, "anchors and aliases"},
		{"large", strings.Repeat("#", 1<<20+1), 0, "more than 1048576"},
		{"no issuers", "rules: []", 1, "issuers: from 1 to 16"},
		{"no rules", "issuers:\n- {name: ci, issuer: 'https://ci.test', audience: tests}\nrules: []\n", 3, "rules: from 1 to 256"},

		{"name", strings.Replace(issuer(""), "name: ci", "name: 'C I'", 1), 2, "lower-case letters"},
		{"two names", strings.Replace(issuer(""), "rules:", "- {name: ci, issuer: 'https://b.test', audience: b}\nrules:", 1), 5, `two issuers "ci"`},
		{"two issuers", strings.Replace(issuer(""), "rules:", "- {name: b, issuer: 'https://ci.test', audience: b}\nrules:", 1), 5, "one token would be two"},
		{"no issuer", strings.Replace(issuer(""), "https://ci.test", "''", 1), 3, "compared exactly; required"},
		{"HTTP", strings.Replace(issuer(""), "https:", "http:", 1), 3, "is not HTTPS"},
		{"HTTP on loopback", strings.Replace(issuer(""), "https://ci.test", "http://127.0.0.1:8080", 1), 3, "loopbackHTTP permits that"},
		{"HTTP on what calls itself loopback", strings.Replace(issuer("  loopbackHTTP: true\n"), "https://ci.test", "http://localhost", 1), 3, "is not HTTPS"},
		{"HTTP elsewhere, permitted", strings.Replace(issuer("  loopbackHTTP: true\n"), "https:", "http:", 1), 3, "is not HTTPS"},
		{"issuer that is no URL", strings.Replace(issuer(""), "https://ci.test", "ci", 1), 3, "no URL"},
		{"issuer with a password", strings.Replace(issuer(""), "https://ci.test", "https://a:b@ci.test", 1), 3, "no URL"},
		{"no audience", strings.Replace(issuer(""), "audience: tests", "audience: ''", 1), 4, "required"},
		{"the issuer's audience", strings.Replace(issuer(""), "audience: tests", "audience: https://ci.test", 1), 4, "is the issuer's own"},
		{"two sources", issuer("  jwksFile: x\n  jwksURL: https://x.test\n"), 3, "choose one"},
		{"jwksURL", issuer("  jwksURL: ftp://x\n"), 5, "is not HTTPS"},
		{"certificates for a file", issuer("  jwksFile: x\n  caFile: y\n"), 6, "nothing is fetched"},
		{"algorithm none", issuer("  algorithms: [none]\n"), 5, `"none" is not one of`},
		{"algorithm HS256", issuer("  algorithms: [ES256, HS256]\n"), 5, `"HS256" is not one of`},
		{"life", issuer("  maxTokenLife: 25h\n"), 5, "from 1s to 24h"},
		{"a life of nothing in particular", issuer("  maxTokenLife: 10\n"), 0, "line 5: cannot unmarshal"},
		{"leeway", issuer("  leeway: 2m\n"), 5, "at most 1m"},
		{"negative leeway", issuer("  leeway: -1s\n"), 5, "at most 1m"},

		{"no condition", ruled(rest), 4, "condition: required"},
		{"no CEL", condition("claims.a ="), 6, "Syntax error"},
		{"unknown variable", condition("claim.a == \"b\""), 6, "undeclared reference"},
		{"no comparison", condition("claims.repository"), 6, "compare, so that it is true or false"},
		{"a number", condition("1"), 6, "compare"},
		{"a list in a list", condition("claims.a.all(x, claims.a.all(y, x == y))"), 6, "at most 100000"},
		{"three lists", condition("claims.all(x, claims.all(y, claims.all(z, x != y)))"), 6, "at most 100000"},
		{"deep", condition(strings.Repeat("(", 100) + "true" + strings.Repeat(")", 100)), 6, "recursion"},
		{"long", condition("true || " + strings.Repeat(" ", 4096) + "true"), 6, "longer than 4096"},
		{"doubling", condition("[1].map(a,[a,a]).map(b,[b,b]).map(c,[c,c]).size() > 0 && claims.r.matches(claims.s + claims.s)"), 6, "at most 100000"},
		{"issuer that is not there", strings.Replace(condition("true"), "issuer: ci\n  c", "issuer: cj\n  c", 1), 5, `no issuer "cj"`},
		{"two rules", condition("true") + "- {name: r, issuer: ci, condition: 'true', ids: ['spiffe://t.example/a'], maxTTL: 1m}\n", 9, `two rules "r"`},
		{"no maxTTL", ruled("  condition: 'true'\n  ids: ['spiffe://t.example/a']\n"), 4, "maxTTL: from 10s to 24h"},
		{"short maxTTL", strings.Replace(condition("true"), "1m", "9s", 1), 8, "maxTTL: from 10s to 24h"},
		{"rate", condition("true") + "  rate: {perMinute: -1}\n", 9, "from 1 to 1000000"},
		{"subject's rate", condition("true") + "  rate: {perMinute: 5, perSubjectPerMinute: 6}\n", 9, "from 1 to perMinute"},
		{"subject", condition("true") + "  rate: {subject: repository}\n", 9, "is not claims.NAME"},
		{"no IDs", ruled("  condition: 'true'\n  maxTTL: 1m\n  ids: []\n"), 8, "from 1 to 32"},

		{"no SPIFFE ID", pattern("https://t.example/a"), 8, "spiffe://"},
		{"SPIFFE in capitals", pattern("SPIFFE://t.example/a"), 8, "spiffe://"},
		{"no path", pattern("spiffe://t.example"), 8, "no path"},
		{"an empty path", pattern("spiffe://t.example/"), 8, "segment"},
		{"wildcard trust domain", pattern("spiffe://*/a"), 8, "no trust domain"},
		{"claim as trust domain", pattern("spiffe://{claims.a}/a"), 8, "no trust domain"},
		{"trust domain in capitals", pattern("spiffe://T.example/a"), 8, "no trust domain"},
		{"two trust domains", ruled("  condition: 'true'\n  maxTTL: 1m\n  ids:\n  - spiffe://t.example/a\n  - spiffe://u.example/a\n"), 10, `not of trust domain "t.example"`},
		{"dots", pattern("spiffe://t.example/a/../b"), 8, "segment"},
		{"an empty segment", pattern("spiffe://t.example/a//b"), 8, "segment"},
		{"a wildcard of letters", pattern("spiffe://t.example/a*"), 8, "stands for a whole segment"},
		{"a wildcard of segments", pattern("spiffe://t.example/**"), 8, "stands for a whole segment"},
		{"wildcard and claim", pattern("spiffe://t.example/*{claims.a}"), 8, "other letters"},
		{"two claims in a segment", pattern("spiffe://t.example/{claims.a}-{claims.b}"), 8, "and no more"},
		{"open brace", pattern("spiffe://t.example/{claims.a"), 8, "without a }"},
		{"closing brace", pattern("spiffe://t.example/claims.a}"), 8, "without a {"},
		{"brace in braces", pattern("spiffe://t.example/{{claims.a}}"), 8, "in braces"},
		{"claims themselves", pattern("spiffe://t.example/{claims}"), 8, "is not claims.NAME"},
		{"another variable", pattern("spiffe://t.example/{env.HOME}"), 8, "is not claims.NAME"},
		{"an expression", pattern("spiffe://t.example/{claims.a + claims.b}"), 8, "is not claims.NAME"},
		{"a name in capitals is one, with a space not", pattern("spiffe://t.example/{claims.A B}"), 8, "is not claims.NAME"},
		{"percents", pattern("spiffe://t.example/a%2Fb"), 8, "segment"},
		{"Troth's own", pattern("spiffe://t.example/troth/server"), 8, "is Troth's own"},
		{"many segments", pattern("spiffe://t.example" + strings.Repeat("/a", 17)), 8, "more than 16"},
	} {
		t.Run(test.name, func(t *testing.T) {
			_, err := mint.Parse([]byte(test.text))
			e, ok := errors.AsType[*mint.ConfigError](err)
			if !ok || e.Line != test.line || !strings.Contains(err.Error(), test.want) {
				t.Errorf("Parse = %v, at line %d, want %q at line %d", err, line(e), test.want, test.line)
			}
		})
	}
}

func line(e *mint.ConfigError) int {
	if e == nil {
		return -1
	}
	return e.Line
}

// The rules that the documentation recommends can be read.
func TestDocumentedRules(t *testing.T) {
	text, err := os.ReadFile("../docs/mint-rules.md")
	if err != nil {
		t.Fatal(err)
	}
	blocks := regexp.MustCompile("(?s)```yaml\n(.*?)```").FindAllSubmatch(text, -1)
	if len(blocks) < 3 {
		t.Fatalf("the page has %d configurations", len(blocks))
	}
	for n, block := range blocks {
		if _, err := mint.Parse(block[1]); err != nil {
			t.Errorf("configuration %d of the page: %v", n+1, err)
		}
	}
}

// What the most expensive condition may cost that is taken, for the largest claims.
func BenchmarkCondition(b *testing.B) {
	for _, bench := range []struct{ name, condition string }{
		{"usual", `claims.repository == "example/shop" && claims.ref == "refs/heads/main" && claims.event_name == "push"`},
		{"expensive", `claims.groups.exists(g, g.endsWith("x")) || claims.groups.exists(g, g.contains("y"))`},
	} {
		b.Run(bench.name, func(b *testing.B) {
			r := rules(b, github+rule(bench.condition, "spiffe://t.example/a"))
			groups := make([]string, 256)
			for n := range groups {
				groups[n] = fmt.Sprintf("group-%d-%s", n, strings.Repeat("a", 100))
			}
			c := parseClaims(b, with(githubClaims(), map[string]any{"groups": groups}))
			for b.Loop() {
				r.Match(c)
			}
		})
	}
}
