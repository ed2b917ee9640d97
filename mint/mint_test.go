package mint_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"strings"
	"testing"
	"time"

	"troth.dev/troth/mint"
)

const audience = "troth-tests"

// github is an issuer, and the beginning of rules.
const github = `
issuers:
- name: github
  issuer: https://token.actions.test
  audience: troth-tests
  maxTokenLife: 15m
rules:
`

func rules(t testing.TB, text string) *mint.Rules {
	t.Helper()
	r, err := mint.Parse([]byte(text))
	if err != nil {
		t.Fatalf("Parse = %v\n%s", err, text)
	}
	return r
}

// rule is a rule of that condition that gives the IDs.
func rule(condition string, ids ...string) string {
	return fmt.Sprintf("- {name: r, issuer: github, condition: %q, ids: [%s], maxTTL: 10m}\n", condition, `"`+strings.Join(ids, `", "`)+`"`)
}

// githubClaims are those of a push to the main branch of example/shop.
func githubClaims() map[string]any {
	now := time.Now().Unix()
	return map[string]any{
		"iss": "https://token.actions.test", "aud": audience, "jti": "5f3c1f0e", "iat": now, "nbf": now - 600, "exp": now + 300,
		"sub": "repo:example/shop:ref:refs/heads/main", "repository": "example/shop", "repository_owner": "example",
		"repository_id": "1001", "repository_owner_id": "17",
		"ref": "refs/heads/main", "ref_type": "branch", "event_name": "push", "run_id": "42",
		"workflow_ref": "example/shop/.github/workflows/test.yaml@refs/heads/main",
	}
}

func with(claims map[string]any, more map[string]any) map[string]any {
	claims = maps.Clone(claims)
	maps.Copy(claims, more)
	maps.DeleteFunc(claims, func(_ string, value any) bool { return value == nil })
	return claims
}

func parseClaims(t testing.TB, claims map[string]any) mint.Claims {
	t.Helper()
	data, err := json.Marshal(claims)
	if err != nil {
		t.Fatal(err)
	}
	c, err := mint.ParseClaims(data)
	if err != nil {
		t.Fatalf("ParseClaims(%s) = %v", data, err)
	}
	return c
}

// One row for each reason, and for each trick that I know of to get another's identity.
func TestExplain(t *testing.T) {
	const (
		ofMain = `claims.repository == "example/shop" && claims.ref == "refs/heads/main" && claims.event_name == "push"`
		bySub  = `claims.sub == "repo:example/shop:environment:production"`
		id     = "spiffe://tests.example/ci/shop"
	)
	for _, test := range []struct {
		name      string
		condition string
		pattern   string
		claims    map[string]any
		id        string
		ttl       time.Duration
		want      mint.Reason
	}{
		{"all is well", ofMain, id, nil, id, 0, mint.Matched},
		{"claims alone", ofMain, id, nil, "", 0, mint.Matched},
		{"exactly the limit", ofMain, id, nil, id, 10 * time.Minute, mint.Matched},
		{"too long", ofMain, id, nil, id, 10*time.Minute + 1, mint.TTLTooLong},
		{"too long for whatever ID", ofMain, id, nil, "", time.Hour, mint.TTLTooLong},
		{"too short", ofMain, id, nil, id, 9 * time.Second, mint.TTLInvalid},
		{"negative", ofMain, id, nil, id, -time.Minute, mint.TTLInvalid},

		{"another issuer", ofMain, id, map[string]any{"iss": "https://token.actions.test/"}, id, 0, mint.Issuer},
		{"no issuer", ofMain, id, map[string]any{"iss": nil}, id, 0, mint.Issuer},
		{"another audience", ofMain, id, map[string]any{"aud": "troth-tests2"}, id, 0, mint.Audience},
		{"ours and another audience", ofMain, id, map[string]any{"aud": []string{audience, "sts.amazonaws.com"}}, id, 0, mint.Audience},
		{"ours twice", ofMain, id, map[string]any{"aud": []string{audience, audience}}, id, 0, mint.Audience},
		{"our audience in an array", ofMain, id, map[string]any{"aud": []string{audience}}, id, 0, mint.Matched},
		{"no audience", ofMain, id, map[string]any{"aud": nil}, id, 0, mint.Audience},
		{"no jti", ofMain, id, map[string]any{"jti": nil}, id, 0, mint.NoID},
		{"an empty jti", ofMain, id, map[string]any{"jti": ""}, id, 0, mint.NoID},
		{"a life too long", ofMain, id, map[string]any{"iat": time.Now().Unix(), "exp": time.Now().Unix() + 902}, id, 0, mint.Lifetime},
		{"no life", ofMain, id, map[string]any{"exp": time.Now().Unix() - 300}, id, 0, mint.Lifetime},
		{"no expiry", ofMain, id, map[string]any{"exp": nil}, id, 0, mint.Lifetime},
		{"no beginning", ofMain, id, map[string]any{"iat": nil}, id, 0, mint.Lifetime},

		// A pull request from a fork runs with the base repository's name, for the
		// merge's ref; GitHub gives such runs no token unless somebody changed that.
		{"pull request from a fork", ofMain, id, map[string]any{"event_name": "pull_request",
			"sub": "repo:example/shop:pull_request", "ref": "refs/pull/7/merge", "head_ref": "main", "base_ref": "main"}, id, 0, mint.Condition},
		{"pull_request_target runs on the base's ref", ofMain, id, map[string]any{"event_name": "pull_request_target",
			"sub": "repo:example/shop:ref:refs/heads/main"}, id, 0, mint.Condition},
		{"pull request by the subject", bySub, id, map[string]any{"sub": "repo:example/shop:pull_request"}, id, 0, mint.Condition},
		// A branch may be called main:environment:production.
		{"branch that spells an environment", bySub, id, map[string]any{"sub": "repo:example/shop:ref:refs/heads/main:environment:production",
			"ref": "refs/heads/main:environment:production"}, id, 0, mint.Condition},
		{"the same for a condition on its parts", `claims.environment == "production"`, id,
			map[string]any{"ref": "refs/heads/main:environment:production"}, id, 0, mint.ConditionError},
		{"repository of a longer name", ofMain, id, map[string]any{"repository": "example/shop-evil"}, id, 0, mint.Condition},
		{"repository of a longer owner", ofMain, id, map[string]any{"repository": "evil-example/shop"}, id, 0, mint.Condition},
		{"repository in other letters", ofMain, id, map[string]any{"repository": "Example/Shop"}, id, 0, mint.Condition},
		{"repository with a homoglyph", ofMain, id, map[string]any{"repository": "ex\u0430mple/shop"}, id, 0, mint.Condition},
		{"repository and a line more", ofMain, id, map[string]any{"repository": "example/shop\n"}, id, 0, mint.Condition},
		{"a claim of another type", ofMain, id, map[string]any{"repository": []string{"example/shop"}}, id, 0, mint.Condition},
		{"claim that is not there", ofMain, id, map[string]any{"repository": nil}, id, 0, mint.ConditionError},
		{"claims that cannot be compared", `claims.run_id > 3`, id, nil, id, 0, mint.ConditionError},
		{"no subject", ofMain, id, map[string]any{"sub": nil}, id, 0, mint.Subject},

		{"another ID", ofMain, id, nil, "spiffe://tests.example/ci/shop-evil", 0, mint.IDNotPermitted},
		{"a segment more", ofMain, id, nil, id + "/x", 0, mint.IDNotPermitted},
		{"a segment less", ofMain, id, nil, "spiffe://tests.example/ci", 0, mint.IDNotPermitted},
		{"another case", ofMain, id, nil, "spiffe://tests.example/CI/shop", 0, mint.IDNotPermitted},
		{"another trust domain", ofMain, id, nil, "spiffe://example.org/ci/shop", 0, mint.IDNotPermitted},
		{"a trust domain of a longer name", ofMain, id, nil, "spiffe://tests.example.evil/ci/shop", 0, mint.IDNotPermitted},
		{"no path", ofMain, id, nil, "spiffe://tests.example", 0, mint.IDMalformed},
		{"dots", ofMain, id, nil, "spiffe://tests.example/ci/../ci/shop", 0, mint.IDMalformed},
		{"an empty segment", ofMain, id, nil, "spiffe://tests.example/ci//shop", 0, mint.IDMalformed},
		{"a slash in percents", ofMain, id, nil, "spiffe://tests.example/ci%2Fshop", 0, mint.IDMalformed},
		{"a query", ofMain, id, nil, id + "?x", 0, mint.IDMalformed},

		{"wildcard", "true", "spiffe://tests.example/ci/*", nil, id, 0, mint.Matched},
		{"wildcard of no segment", "true", "spiffe://tests.example/ci/*", nil, "spiffe://tests.example/ci", 0, mint.IDNotPermitted},
		{"wildcard of two segments", "true", "spiffe://tests.example/ci/*", nil, "spiffe://tests.example/ci/a/b", 0, mint.IDNotPermitted},
		{"wildcard asked for", "true", "spiffe://tests.example/ci/*", nil, "spiffe://tests.example/ci/*", 0, mint.IDMalformed},
		{"wildcard for what is Troth's", "true", "spiffe://tests.example/*/server", nil, "spiffe://tests.example/troth/server", 0, mint.IDNotPermitted},
		{"claim for what is Troth's", "true", "spiffe://tests.example/{claims.ref}/server", map[string]any{"ref": "troth"}, "spiffe://tests.example/troth/server", 0, mint.IDNotPermitted},

		{"claim", "true", "spiffe://tests.example/ci/{claims.repository_owner}/x", nil, "spiffe://tests.example/ci/example/x", 0, mint.Matched},
		{"another's claim", "true", "spiffe://tests.example/ci/{claims.repository_owner}/x", nil, "spiffe://tests.example/ci/other/x", 0, mint.IDNotPermitted},
		{"claim with a slash", "true", "spiffe://tests.example/ci/{claims.repository}", nil, "spiffe://tests.example/ci/example_2Fshop", 0, mint.Matched},
		{"claim with a slash adds no segment", "true", "spiffe://tests.example/ci/{claims.repository}", nil, "spiffe://tests.example/ci/example/shop", 0, mint.IDNotPermitted},
		{"claim that would climb", "true", "spiffe://tests.example/ci/a/{claims.ref}/x", map[string]any{"ref": ".."}, "spiffe://tests.example/ci/a/_2E./x", 0, mint.Matched},
		{"repository that would climb", "true", "spiffe://tests.example/ci/{claims.repository}", map[string]any{"repository": "example/../other"}, "spiffe://tests.example/ci/example_2F.._2Fother", 0, mint.Matched},
		{"claim that is a wildcard", "true", "spiffe://tests.example/ci/{claims.ref}", map[string]any{"ref": "*"}, "spiffe://tests.example/ci/anything", 0, mint.IDNotPermitted},
		{"claim that is a claim", "true", "spiffe://tests.example/ci/{claims.ref}", map[string]any{"ref": "{claims.repository_owner}"}, "spiffe://tests.example/ci/example", 0, mint.IDNotPermitted},
		{"claim that is spelled as one with a slash", "true", "spiffe://tests.example/ci/{claims.ref}", map[string]any{"ref": "example_2Fshop"}, "spiffe://tests.example/ci/example_2Fshop", 0, mint.IDNotPermitted},
		{"letters around a claim", "true", "spiffe://tests.example/run-{claims.run_id}.x", nil, "spiffe://tests.example/run-42.x", 0, mint.Matched},
		{"a claim that is not there", "true", "spiffe://tests.example/ci/{claims.environment}", nil, "spiffe://tests.example/ci/x", 0, mint.IDNotPermitted},
		{"an empty claim", "true", "spiffe://tests.example/ci/{claims.ref}", map[string]any{"ref": ""}, "spiffe://tests.example/ci/x", 0, mint.IDNotPermitted},
		{"a claim that is a list", "true", "spiffe://tests.example/ci/{claims.ref}", map[string]any{"ref": []string{"a"}}, "spiffe://tests.example/ci/a", 0, mint.IDNotPermitted},
		{"a claim that is a number", "true", "spiffe://tests.example/ci/{claims.ref}", map[string]any{"ref": 7}, "spiffe://tests.example/ci/7", 0, mint.Matched},
		{"a very long claim", "true", "spiffe://tests.example/ci/{claims.ref}", map[string]any{"ref": strings.Repeat("a", 600)}, "spiffe://tests.example/ci/" + strings.Repeat("a", 600), 0, mint.IDNotPermitted},
		{"a claim in objects", "true", `spiffe://tests.example/{claims[\"kubernetes.io\"].pod.name}`,
			map[string]any{"kubernetes.io": map[string]any{"pod": map[string]any{"name": "web-0"}}}, "spiffe://tests.example/web-0", 0, mint.Matched},
	} {
		t.Run(test.name, func(t *testing.T) {
			r := rules(t, github+rule(test.condition, test.pattern))
			c := parseClaims(t, with(githubClaims(), test.claims))
			verdicts := r.Explain(c, test.id, test.ttl)
			if len(verdicts) != 1 || verdicts[0].Rule != "r" || verdicts[0].Reason != test.want || verdicts[0].Message == "" {
				t.Fatalf("Explain = %+v, want %s", verdicts, test.want)
			}
			t.Log(verdicts[0].Message)
			// The decision is the explanation.
			if test.id == "" {
				return
			}
			got := mint.Matched
			if m := r.Match(c); m == nil {
				got = "" // no rule at all
			} else if grant, err := m.Decide(test.id, test.ttl); err != nil {
				refused, ok := errors.AsType[*mint.Refusal](err)
				if !ok {
					t.Fatalf("Decide = %v, which is no Refusal", err)
				}
				got = refused.Reason
			} else if grant.ID.String() != test.id || grant.TTL != max(test.ttl, 0) && grant.TTL != 10*time.Minute || grant.Subject != c.Subject {
				t.Errorf("Decide = %+v", grant)
			}
			switch test.want {
			case mint.Issuer, mint.Audience, mint.NoID, mint.Lifetime, mint.Condition, mint.ConditionError, mint.Subject:
				if got != "" {
					t.Errorf("a rule that says %s matches: %s", test.want, got)
				}
			default:
				if got != test.want {
					t.Errorf("Decide says %q, and Explain %q", got, test.want)
				}
			}
		})
	}
}

// Of several rules, the first that gives what is asked for gives it, and a refusal is
// that of the one which came nearest.
func TestDecide(t *testing.T) {
	r := rules(t, github+`
- {name: wide, issuer: github, condition: "true", ids: ["spiffe://tests.example/a/*"], maxTTL: 1m}
- {name: never, issuer: github, condition: "false", ids: ["spiffe://tests.example/*/*"], maxTTL: 24h}
- {name: long, issuer: github, condition: "true", ids: ["spiffe://tests.example/a/b", "spiffe://tests.example/c/{claims.run_id}"], maxTTL: 1h,
   rate: {perMinute: 10, perSubjectPerMinute: 3, subject: claims.repository}}
`)
	if r.MaxTTL() != 24*time.Hour || r.TrustDomain().Name() != "tests.example" {
		t.Errorf("the rules are for %s, %v at most", r.TrustDomain(), r.MaxTTL())
	}
	m := r.Match(parseClaims(t, githubClaims()))
	for _, test := range []struct {
		id   string
		ttl  time.Duration
		rule string
		want time.Duration
	}{
		{"spiffe://tests.example/a/b", 0, "wide", time.Minute},
		{"spiffe://tests.example/a/b", 2 * time.Minute, "long", 2 * time.Minute},
		{"spiffe://tests.example/a/x", 30 * time.Second, "wide", 30 * time.Second},
		{"spiffe://tests.example/a/x", 2 * time.Minute, string(mint.TTLTooLong), 0},
		{"spiffe://tests.example/c/42", 0, "long", time.Hour},
		{"spiffe://tests.example/c/43", 0, string(mint.IDNotPermitted), 0},
	} {
		grant, err := m.Decide(test.id, test.ttl)
		got := ""
		if refused, ok := errors.AsType[*mint.Refusal](err); ok {
			got = string(refused.Reason)
		} else {
			got = grant.Rule.Name
		}
		if got != test.rule || grant.TTL != test.want {
			t.Errorf("Decide(%s, %v) = %s for %v, want %s for %v", test.id, test.ttl, got, grant.TTL, test.rule, test.want)
		}
	}
	grant, err := m.Decide("spiffe://tests.example/c/42", 0)
	if err != nil || grant.Subject != "example/shop" || grant.Rule.PerMinute != 10 || grant.Rule.PerSubject != 3 {
		t.Errorf("Decide = %+v, %v", grant, err)
	}
	if m := r.Match(parseClaims(t, with(githubClaims(), map[string]any{"iss": "https://other.test"}))); m != nil {
		t.Error("the token of another issuer matches")
	}
	if m := r.Match(mint.Claims{}); m != nil {
		t.Error("the zero Claims match")
	}
}
