package server_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	jose "github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/types/known/durationpb"

	trothv1 "troth.dev/troth/api/troth/v1"
	"troth.dev/troth/ca"
	"troth.dev/troth/handshake"
	"troth.dev/troth/identity"
	"troth.dev/troth/kube"
	"troth.dev/troth/mint"
	"troth.dev/troth/server"
	"troth.dev/troth/storage"
	"troth.dev/troth/storage/postgres"
	"troth.dev/troth/test/apiserver"
	"troth.dev/troth/test/oidc"
	postgrestest "troth.dev/troth/test/postgres"
)

const (
	mintAudience = "troth-tests"
	mintedID     = "spiffe://tests.example/ci/shop"
)

var tests = spiffeid.RequireTrustDomainFromString("tests.example")

// mintRules are rules for an issuer; %s are its URL, its CA file and rules.
const mintRules = `
issuers:
- {name: ci, issuer: %q, audience: troth-tests, caFile: %q, maxTokenLife: 10m}
rules:
%s
`

const shopRule = `
- name: shop
  issuer: ci
  condition: claims.repository == "example/shop" && claims.ref == "refs/heads/main" && claims.event_name == "push"
  ids: ["spiffe://tests.example/ci/shop", "spiffe://tests.example/runs/{claims.run_id}/*"]
  maxTTL: 10m
`

func parseRules(t testing.TB, text string) *mint.Rules {
	t.Helper()
	rules, err := mint.Parse([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	return rules
}

// mintStore is what the mint has to remember.
type mintStore interface {
	storage.Ledger
	storage.TokenStore
	Tests() storage.AuthorityStore
}

func newMint(t testing.TB, rules *mint.Rules, store mintStore, kubernetes func(context.Context) ([]byte, error)) *server.Mint {
	t.Helper()
	sealed, err := ca.NewSealedKeys(bytes.Repeat([]byte{8}, ca.KeySize))
	if err != nil {
		t.Fatal(err)
	}
	profile, err := ca.NewProfile(ca.ProfileConfig{Life: rules.MaxTTL()})
	if err != nil {
		t.Fatal(err)
	}
	issuer, err := ca.Open(t.Context(), ca.Config{
		TrustDomain: rules.TrustDomain(), Keys: sealed, Authorities: store.Tests(), Ledger: store, Test: true,
		Audit: slog.New(slog.DiscardHandler), Profile: profile,
	})
	if err != nil {
		t.Fatal(err)
	}
	verifier, err := mint.NewVerifier(mint.VerifierConfig{Rules: rules, Kubernetes: kubernetes})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(verifier.Close)
	return &server.Mint{Rules: rules, Verifier: verifier, Issuer: issuer, Tokens: store}
}

// startMint starts a plane that issues to the jobs of a CI system of its own.
func startMint(t testing.TB, rules string, limits server.Limits) (*plane, *oidc.Issuer) {
	t.Helper()
	issuer := oidc.Start(t)
	store := storage.NewMemory()
	p, _, _ := startDev(t, func(c *server.Config) {
		c.Mint = newMint(t, parseRules(t, fmt.Sprintf(mintRules, issuer.URL, issuer.CAFile, rules)), store, nil)
		c.Limits.MintCalls = 10_000
		if limits != (server.Limits{}) {
			c.Limits = limits
		}
	})
	return p, issuer
}

// job is the claims of a push to example/shop's main branch.
func job(i *oidc.Issuer, more map[string]any) map[string]any {
	claims := map[string]any{
		"sub": "repo:example/shop:ref:refs/heads/main", "repository": "example/shop", "repository_owner": "example",
		"ref": "refs/heads/main", "event_name": "push", "run_id": "42",
	}
	maps.Copy(claims, more)
	return i.Claims(mintAudience, claims)
}

// mintWith asks for the IDs with a token.
func (p *plane) mintWith(t testing.TB, tok string, ids ...string) (*trothv1.MintX509SVIDsResponse, error) {
	t.Helper()
	in := &trothv1.MintX509SVIDsRequest{}
	for _, id := range ids {
		_, csr := newCSR(t)
		in.Items = append(in.Items, &trothv1.MintX509SVIDRequest{SpiffeId: id, Csr: csr})
	}
	return trothv1.NewMintServiceClient(p.dial(t, nil, tok)).MintX509SVIDs(t.Context(), in)
}

// minted is what becomes of each ID, or of the call.
func (p *plane) minted(t testing.TB, tok string, ids ...string) string {
	t.Helper()
	out, err := p.mintWith(t, tok, ids...)
	if err != nil {
		return refusal(err)
	}
	var all []string
	for _, result := range out.GetResults() {
		all = append(all, itemRefusal(result))
	}
	return strings.Join(all, ", ")
}

// What a job gets is an SVID of the trust domain for tests, for as long as it asked for,
// which verifies by the bundle that comes with it and is refused in production.
func TestMint(t *testing.T) {
	p, ci := startMint(t, shopRule, server.Limits{})
	key, csr := newCSR(t)
	_, csr2 := newCSR(t)
	out, err := trothv1.NewMintServiceClient(p.dial(t, nil, ci.Token(t, job(ci, nil)))).MintX509SVIDs(t.Context(), &trothv1.MintX509SVIDsRequest{
		Items: []*trothv1.MintX509SVIDRequest{
			{SpiffeId: mintedID, Csr: csr, Ttl: durationpb.New(time.Minute)},
			{SpiffeId: "spiffe://tests.example/runs/42/db", Csr: csr2},
			{SpiffeId: "spiffe://tests.example/runs/43/db", Csr: csr2},
			{SpiffeId: mintedID, Csr: csr2, Ttl: durationpb.New(11 * time.Minute)},
			{SpiffeId: mintedID, Csr: csr2, Ttl: durationpb.New(0)},
			{SpiffeId: mintedID, Csr: csr2, Ttl: &durationpb.Duration{Seconds: 1, Nanos: -1}},
			{SpiffeId: "spiffe://tests.example", Csr: csr2},
			{SpiffeId: mintedID, Csr: []byte("no request")},
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	for n, want := range []string{
		"OK", "OK", "PermissionDenied ID_NOT_PERMITTED", "PermissionDenied TTL_TOO_LONG", "InvalidArgument TTL_INVALID",
		"InvalidArgument TTL_INVALID", "InvalidArgument ID_MALFORMED", "InvalidArgument CSR_MALFORMED",
	} {
		if got := itemRefusal(out.GetResults()[n]); got != want {
			t.Errorf("item %d: %s, want %s", n, got, want)
		}
	}
	svid := assemble(t, key, out.GetResults()[0].GetSvid())
	if left := time.Until(svid.Certificates[0].NotAfter); svid.ID.String() != mintedID || left > time.Minute || left < 50*time.Second {
		t.Errorf("an SVID of %s for another %v, want %s for a minute", svid.ID, left, mintedID)
	}
	if long := out.GetResults()[1].GetSvid().GetExpiresAt().AsTime(); time.Until(long) < 9*time.Minute {
		t.Errorf("without a TTL it lives until %v, want as long as the rule gives", long)
	}
	bundle := bundleOf(t, out.GetBundle())
	if out.GetBundle().GetTrustDomain() != tests.Name() || !identity.IsTest(svid.Certificates[0]) {
		t.Errorf("the bundle is of %q, the SVID for tests: %v", out.GetBundle().GetTrustDomain(), identity.IsTest(svid.Certificates[0]))
	}
	if _, err := handshake.VerifyAcceptingTests(svid.Certificates, bundle, time.Now()); err != nil {
		t.Errorf("it does not verify in a test: %v", err)
	}
	if _, err := handshake.Verify(svid.Certificates, bundle, time.Now()); err == nil || !strings.Contains(err.Error(), "TEST_IDENTITY") {
		t.Errorf("it verifies in production: %v", err)
	}
	// The bundle can be had later, too; and an SVID for tests opens no door of the server.
	got, err := trothv1.NewBundleServiceClient(p.dial(t, nil, "")).GetBundle(t.Context(), &trothv1.GetBundleRequest{TrustDomain: tests.Name()})
	if err != nil || !bytes.Equal(got.GetBundle().GetX509Authorities()[0].GetCertificate(), out.GetBundle().GetX509Authorities()[0].GetCertificate()) {
		t.Errorf("GetBundle = %v, %v", got, err)
	}
	if _, err := trothv1.NewBundleServiceClient(p.dial(t, svid, "")).GetBundle(t.Context(), &trothv1.GetBundleRequest{}); err == nil {
		t.Error("the server takes a connection by an SVID for tests")
	}
}

func bundleOf(t testing.TB, in *trothv1.Bundle) *x509bundle.Bundle {
	t.Helper()
	bundle := x509bundle.New(tests)
	for _, a := range in.GetX509Authorities() {
		c, err := x509.ParseCertificate(a.GetCertificate())
		if err != nil {
			t.Fatal(err)
		}
		bundle.AddX509Authority(c)
	}
	return bundle
}

// One row for each way in which a token can be none, and each trick to make it one.
func TestMintRefuses(t *testing.T) {
	p, ci := startMint(t, shopRule, server.Limits{})
	other := oidc.Start(t)
	now := time.Now().Unix()
	payload := func(claims map[string]any) []byte {
		data, err := json.Marshal(claims)
		if err != nil {
			t.Fatal(err)
		}
		return data
	}
	// unsigned puts a token together as its parts say.
	unsigned := func(header string, payload []byte, signature string) string {
		encode := base64.RawURLEncoding.EncodeToString
		return encode([]byte(header)) + "." + encode(payload) + "." + signature
	}
	own := ci.Key()
	public, err := x509.MarshalPKIXPublicKey(own.Public().Key)
	if err != nil {
		t.Fatal(err)
	}
	stranger, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	twice := func(member string) []byte {
		return append([]byte("{"+member+","), payload(job(ci, nil))[1:]...)
	}

	for _, test := range []struct {
		name string
		tok  string
		want string
	}{
		{"no token", "", "Unauthenticated NO_CREDENTIALS"},
		{"no JWT", "x", "Unauthenticated TOKEN_MALFORMED"},
		{"huge", strings.Repeat("x", 8<<10+1), "Unauthenticated TOKEN_TOO_LARGE"},
		{"huge and signed", ci.Token(t, job(ci, map[string]any{"x": strings.Repeat("x", 8<<10)})), "Unauthenticated TOKEN_TOO_LARGE"},
		{"alg none", unsigned(`{"alg":"none"}`, payload(job(ci, nil)), ""), "Unauthenticated TOKEN_ALGORITHM"},
		{"alg None", unsigned(`{"alg":"None","kid":"first"}`, payload(job(ci, nil)), ""), "Unauthenticated TOKEN_ALGORITHM"},
		{"HS256 with the public key", oidc.Sign(t, jose.HS256, jose.JSONWebKey{Key: public, KeyID: "first"}, payload(job(ci, nil))), "Unauthenticated TOKEN_ALGORITHM"},
		{"ES384, which the issuer does not have", unsigned(`{"alg":"ES384","kid":"first"}`, payload(job(ci, nil)), "AAAA"), "Unauthenticated TOKEN_ALGORITHM"},
		{"RS256 over an ECDSA key", unsigned(`{"alg":"RS256","kid":"first"}`, payload(job(ci, nil)), "AAAA"), "Unauthenticated TOKEN_ALGORITHM"},
		{"no signature", unsigned(`{"alg":"ES256","kid":"first"}`, payload(job(ci, nil)), ""), "Unauthenticated TOKEN_SIGNATURE"},
		{"another's signature", oidc.Sign(t, jose.ES256, jose.JSONWebKey{Key: stranger, KeyID: "first"}, payload(job(ci, nil))), "Unauthenticated TOKEN_SIGNATURE"},
		{"unknown key", oidc.Sign(t, jose.ES256, jose.JSONWebKey{Key: stranger, KeyID: "other"}, payload(job(ci, nil))), "Unauthenticated TOKEN_UNKNOWN_KEY retry"},
		{"key in the token", func() string {
			signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: stranger}, &jose.SignerOptions{EmbedJWK: true})
			if err != nil {
				t.Fatal(err)
			}
			signed, err := signer.Sign(payload(job(ci, nil)))
			if err != nil {
				t.Fatal(err)
			}
			raw, err := signed.CompactSerialize()
			if err != nil {
				t.Fatal(err)
			}
			return raw
		}(), "Unauthenticated TOKEN_UNKNOWN_KEY"},

		{"another issuer", other.Token(t, job(other, nil)), "Unauthenticated TOKEN_ISSUER"},
		{"another issuer under the right name", other.Token(t, job(ci, nil)), "Unauthenticated TOKEN_SIGNATURE"},
		{"another issuer with the right key", oidc.Sign(t, jose.ES256, ci.Key(), payload(job(other, nil))), "Unauthenticated TOKEN_ISSUER"},
		{"the issuer with a slash", ci.Token(t, job(ci, map[string]any{"iss": ci.URL + "/"})), "Unauthenticated TOKEN_ISSUER"},
		{"no issuer", ci.Token(t, job(ci, map[string]any{"iss": nil})), "Unauthenticated TOKEN_ISSUER"},

		{"another audience", ci.Token(t, job(ci, map[string]any{"aud": "sts.amazonaws.com"})), "Unauthenticated TOKEN_AUDIENCE"},
		{"ours and another", ci.Token(t, job(ci, map[string]any{"aud": []string{mintAudience, "sts.amazonaws.com"}})), "Unauthenticated TOKEN_AUDIENCE"},
		{"no audience", ci.Token(t, job(ci, map[string]any{"aud": nil})), "Unauthenticated TOKEN_AUDIENCE"},
		{"audience of the agents", ci.Token(t, job(ci, map[string]any{"aud": audience})), "Unauthenticated TOKEN_AUDIENCE"},

		{"expired", ci.Token(t, job(ci, map[string]any{"iat": now - 400, "nbf": now - 400, "exp": now - 31})), "Unauthenticated TOKEN_EXPIRED"},
		{"not yet valid", ci.Token(t, job(ci, map[string]any{"nbf": now + 120})), "Unauthenticated TOKEN_NOT_YET_VALID retry"},
		{"issued in the future", ci.Token(t, job(ci, map[string]any{"iat": now + 120})), "Unauthenticated TOKEN_NOT_YET_VALID retry"},
		{"a life too long", ci.Token(t, job(ci, map[string]any{"iat": now, "exp": now + 601})), "Unauthenticated TOKEN_LIFETIME"},
		{"expiry of the year 10000", ci.Token(t, job(ci, map[string]any{"exp": int64(253402300800)})), "Unauthenticated TOKEN_MALFORMED"},
		{"a time with a fraction", ci.Token(t, job(ci, map[string]any{"exp": float64(now) + 100.5})), "Unauthenticated TOKEN_MALFORMED"},
		{"no jti", ci.Token(t, job(ci, map[string]any{"jti": nil})), "Unauthenticated TOKEN_NO_ID"},
		{"a jti that is no text", ci.Token(t, job(ci, map[string]any{"jti": 7})), "Unauthenticated TOKEN_MALFORMED"},

		{"a claim twice", oidc.Sign(t, jose.ES256, ci.Key(), twice(`"repository":"evil/x"`)), "Unauthenticated TOKEN_MALFORMED"},
		{"a claim twice below", oidc.Sign(t, jose.ES256, ci.Key(), twice(`"x":{"a":1,"a":2}`)), "Unauthenticated TOKEN_MALFORMED"},
		{"deep claims", oidc.Sign(t, jose.ES256, ci.Key(), twice(`"x":`+strings.Repeat("[", 9)+strings.Repeat("]", 9))), "Unauthenticated TOKEN_MALFORMED"},
		{"claims that are no object", oidc.Sign(t, jose.ES256, ci.Key(), []byte(`[1]`)), "Unauthenticated TOKEN_MALFORMED"},
		{"claims that are nothing", oidc.Sign(t, jose.ES256, ci.Key(), []byte(`null`)), "Unauthenticated TOKEN_MALFORMED"},
		{"claims and more", oidc.Sign(t, jose.ES256, ci.Key(), append(payload(job(ci, nil)), "{}"...)), "Unauthenticated TOKEN_MALFORMED"},
		{"half a surrogate pair", oidc.Sign(t, jose.ES256, ci.Key(), twice(`"x":"\ud800"`)), "Unauthenticated TOKEN_MALFORMED"},

		{"pull request from a fork", ci.Token(t, job(ci, map[string]any{"event_name": "pull_request", "sub": "repo:example/shop:pull_request",
			"ref": "refs/pull/7/merge"})), "PermissionDenied NO_RULE_MATCHES"},
		{"another repository", ci.Token(t, job(ci, map[string]any{"repository": "example/shop-evil"})), "PermissionDenied NO_RULE_MATCHES"},
		{"repository that would climb", ci.Token(t, job(ci, map[string]any{"repository": "example/../example/shop"})), "PermissionDenied NO_RULE_MATCHES"},
		{"branch that spells another", ci.Token(t, job(ci, map[string]any{"ref": "refs/heads/main:environment:production"})), "PermissionDenied NO_RULE_MATCHES"},
		{"a claim that is not there", ci.Token(t, job(ci, map[string]any{"repository": nil})), "PermissionDenied NO_RULE_MATCHES"},
	} {
		t.Run(test.name, func(t *testing.T) {
			if got := p.minted(t, test.tok, mintedID); got != test.want {
				t.Errorf("%s, want %s", got, test.want)
			}
		})
	}
	if got := p.minted(t, ci.Token(t, job(ci, nil)), mintedID); got != "OK" {
		t.Errorf("a good token after all these: %s", got)
	}
	// The unknown keys cost one fetch beside the first.
	if n := ci.Fetches(); n > 2 {
		t.Errorf("the keys were fetched %d times", n)
	}
}

// A batch has limits, and a call that gets nothing spends no token.
func TestMintSpendsOnce(t *testing.T) {
	p, ci := startMint(t, shopRule, server.Limits{})
	tok := ci.Token(t, job(ci, nil))
	for _, test := range []struct {
		name string
		ids  []string
		want string
	}{
		{"nothing", nil, "InvalidArgument NO_ITEMS"},
		{"too much", make([]string, 501), "InvalidArgument TOO_MANY_ITEMS"},
		{"nothing that may be", []string{"spiffe://tests.example/ci/other"}, "PermissionDenied ID_NOT_PERMITTED"},
		{"some", []string{mintedID, "spiffe://tests.example/ci/other", mintedID}, "OK, PermissionDenied ID_NOT_PERMITTED, OK"},
		{"again", []string{mintedID}, "Unauthenticated TOKEN_SPENT"},
	} {
		if got := p.minted(t, tok, test.ids...); got != test.want {
			t.Errorf("%s: %s, want %s", test.name, got, test.want)
		}
	}
	// The same jti in another token is spent, too.
	claims := job(ci, nil)
	if got := p.minted(t, ci.Token(t, claims), mintedID); got != "OK" {
		t.Fatal(got)
	}
	claims["exp"] = claims["exp"].(int64) + 60
	if got := p.minted(t, ci.Token(t, claims), mintedID); got != "Unauthenticated TOKEN_SPENT" {
		t.Errorf("another token of the same jti: %s", got)
	}
}

// Without a jti, what was signed takes its place, so that another signature over it is
// no other token.
func TestMintWithoutJTI(t *testing.T) {
	ci := oidc.Start(t)
	store := storage.NewMemory()
	p, _, _ := startDev(t, func(c *server.Config) {
		rules := strings.Replace(fmt.Sprintf(mintRules, ci.URL, ci.CAFile, shopRule), "maxTokenLife", "requireJTI: false, maxTokenLife", 1)
		c.Mint = newMint(t, parseRules(t, rules), store, nil)
	})
	claims := job(ci, map[string]any{"jti": nil})
	if got := p.minted(t, ci.Token(t, claims), mintedID); got != "OK" {
		t.Fatal(got)
	}
	if got := p.minted(t, ci.Token(t, claims), mintedID); got != "Unauthenticated TOKEN_SPENT" { // ECDSA signs anew
		t.Errorf("the same, signed again: %s", got)
	}
	claims["run_id"] = "43"
	if got := p.minted(t, ci.Token(t, claims), mintedID); got != "OK" {
		t.Errorf("another: %s", got)
	}
}

// A rule and each of its subjects get so much in a minute, and what is refused or found
// spent counts for nothing.
func TestMintRates(t *testing.T) {
	p, ci := startMint(t, `
- {name: limited, issuer: ci, condition: "true", ids: ["spiffe://tests.example/ci/*"], maxTTL: 1m,
   rate: {perMinute: 10, perSubjectPerMinute: 6, subject: claims.repository}}
`, server.Limits{})
	of := func(repository string) string { return ci.Token(t, job(ci, map[string]any{"repository": repository})) }
	ask := func(tok string, n int) string {
		ids := make([]string, n)
		for i := range ids {
			ids[i] = mintedID
		}
		return p.minted(t, tok, ids...)
	}
	ok := func(n int) string { return strings.TrimSuffix(strings.Repeat("OK, ", n), ", ") }
	first := of("a")
	for _, step := range []struct {
		tok  string
		n    int
		want string
	}{
		{of("a"), 7, "ResourceExhausted RATE_LIMITED"}, // more than there ever is
		{first, 5, ok(5)},
		{first, 1, "Unauthenticated TOKEN_SPENT"},
		{first, 1, "Unauthenticated TOKEN_SPENT"},
		{of("a"), 1, ok(1)},
		{of("a"), 1, "ResourceExhausted RATE_LIMITED retry"}, // the subject's
		{of("b"), 5, "ResourceExhausted RATE_LIMITED retry"}, // the rule's
		{of("b"), 4, ok(4)},
		{of("c"), 1, "ResourceExhausted RATE_LIMITED retry"},
	} {
		if got := ask(step.tok, step.n); got != step.want {
			t.Errorf("%d: %s, want %s", step.n, got, step.want)
		}
	}
}

// Garbage is limited before it is looked at.
func TestMintLimitsGarbage(t *testing.T) {
	p, ci := startMint(t, shopRule, server.Limits{PerConnection: 1000, Unproven: 1000, MintCalls: 1})
	limited := 0
	for range 10 {
		if p.minted(t, "x.y.z", mintedID) == "ResourceExhausted RATE_LIMITED retry" {
			limited++
		}
	}
	if limited < 7 {
		t.Errorf("of 10 calls at once %d were limited", limited)
	}
	_ = ci
}

// Two replicas on one PostgreSQL, and a token that is presented to both at once, again
// and again: one of them serves it.
func TestMintReplayAcrossReplicas(t *testing.T) {
	const tokens = 20
	url := postgrestest.Start(t).Database(t)
	ci := oidc.Start(t)
	rules := parseRules(t, fmt.Sprintf(mintRules, ci.URL, ci.CAFile, shopRule))
	var planes []*plane
	for range 2 {
		store, err := postgres.Open(t.Context(), postgres.Config{URL: url})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { store.Close() })
		p, _, _ := startDev(t, func(c *server.Config) { c.Mint = newMint(t, rules, store, nil) })
		planes = append(planes, p)
	}
	for range tokens {
		tok := ci.Token(t, job(ci, nil))
		results := make(chan string, 4)
		var all sync.WaitGroup
		for n := range cap(results) {
			all.Go(func() { results <- planes[n%2].minted(t, tok, mintedID) })
		}
		all.Wait()
		close(results)
		count := make(map[string]int)
		for r := range results {
			count[r]++
		}
		if count["OK"] != 1 || count["Unauthenticated TOKEN_SPENT"] != 3 {
			t.Fatalf("one token, presented four times to two replicas: %v", count)
		}
	}
	// Both issue under one authority, which each replica has from the store.
	out, err := planes[1].mintWith(t, ci.Token(t, job(ci, nil)), mintedID)
	if err != nil || len(out.GetBundle().GetX509Authorities()) != 1 {
		t.Errorf("the bundle of two replicas has %d authorities, %v", len(out.GetBundle().GetX509Authorities()), err)
	}
}

// The issuer is away: keys that are known serve, and tokens of none say when to come
// back.
func TestMintWhileTheIssuerIsAway(t *testing.T) {
	p, ci := startMint(t, shopRule, server.Limits{})
	away := func(w http.ResponseWriter, _ *http.Request) bool {
		w.WriteHeader(http.StatusServiceUnavailable)
		return true
	}
	ci.Answer(away)
	tok := ci.Token(t, job(ci, nil))
	if got := p.minted(t, tok, mintedID); got != "Unavailable TOKEN_KEYS_UNAVAILABLE retry" {
		t.Errorf("without keys: %s", got)
	}
	ci.Answer(nil)
	eventually(t, "when it is back", "OK", func() string {
		got := p.minted(t, tok, mintedID)
		if got == "OK" {
			tok = "" // spent
		}
		return got
	})
	ci.Answer(away)
	if got := p.minted(t, ci.Token(t, job(ci, nil)), mintedID); got != "OK" {
		t.Errorf("with keys that are known: %s", got)
	}
}

// The tokens of a cluster's pods, as an issuer.
func TestMintForPods(t *testing.T) {
	cluster := apiserver.Start(t)
	client, err := kube.NewClient(cluster.Admin())
	if err != nil {
		t.Fatal(err)
	}
	issuer, err := kube.Issuer(t.Context(), client)
	if err != nil {
		t.Fatal(err)
	}
	rules := parseRules(t, fmt.Sprintf(`
issuers:
- {name: cluster, issuer: %q, audience: troth-tests, kubernetes: true}
rules:
- name: runners
  issuer: cluster
  condition: claims["kubernetes.io"].namespace == "ci" && claims.sub == "system:serviceaccount:ci:runner"
  ids: ['spiffe://tests.example/pods/{claims["kubernetes.io"].pod.uid}/*']
  maxTTL: 1h
  rate: {subject: 'claims["kubernetes.io"].pod.uid'}
`, issuer))
	store := storage.NewMemory()
	p, _, _ := startDev(t, func(c *server.Config) { c.Mint = newMint(t, rules, store, kube.Keys(client)) })
	cluster.CreateNode(t, "node-1")
	cluster.CreateNamespace(t, "ci")
	cluster.CreateServiceAccount(t, "ci", "runner")
	cluster.CreateServiceAccount(t, "ci", "other")
	runner := cluster.CreatePod(t, apiserver.Pod{Namespace: "ci", Name: "job-1", ServiceAccount: "runner", Node: "node-1"})
	stranger := cluster.CreatePod(t, apiserver.Pod{Namespace: "ci", Name: "job-2", ServiceAccount: "other", Node: "node-1"})
	id := "spiffe://tests.example/pods/" + string(runner.UID) + "/db"
	tok := cluster.Token(t, runner, mintAudience, 10*time.Minute)
	for _, test := range []struct {
		name, tok, id, want string
	}{
		{"another pod's ID", tok, "spiffe://tests.example/pods/" + string(stranger.UID) + "/db", "PermissionDenied ID_NOT_PERMITTED"},
		{"its own", tok, id, "OK"},
		{"again", tok, id, "Unauthenticated TOKEN_SPENT"},
		{"another service account", cluster.Token(t, stranger, mintAudience, 10*time.Minute), id, "PermissionDenied NO_RULE_MATCHES"},
		{"another audience", cluster.Token(t, runner, audience, 10*time.Minute), id, "Unauthenticated TOKEN_AUDIENCE"},
		{"an automounted token", cluster.AutomountToken(t, runner), id, "Unauthenticated TOKEN_AUDIENCE"},
		{"a long life", cluster.Token(t, runner, mintAudience, 2*time.Hour), id, "Unauthenticated TOKEN_LIFETIME"},
	} {
		if got := p.minted(t, test.tok, test.id); got != test.want {
			t.Errorf("%s: %s, want %s", test.name, got, test.want)
		}
	}
}

// Who else calls: an agent is no job, whoever shows a certificate and a token is told to
// choose, and a job is nobody elsewhere. Without rules there is no mint.
func TestMintCallers(t *testing.T) {
	ci := oidc.Start(t)
	store := storage.NewMemory()
	p, cluster, pod := startDev(t, func(c *server.Config) {
		c.Mint = newMint(t, parseRules(t, fmt.Sprintf(mintRules, ci.URL, ci.CAFile, shopRule)), store, nil)
		c.Operator = func(context.Context, string, server.Right) (string, error) { return "", identity.ErrForbidden }
	})
	agent := p.attest(t, tokenFor(t, cluster, pod))
	_, csr := newCSR(t)
	in := &trothv1.MintX509SVIDsRequest{Items: []*trothv1.MintX509SVIDRequest{{SpiffeId: mintedID, Csr: csr}}}
	client := trothv1.NewMintServiceClient(p.dial(t, agent, ""))
	if _, err := client.MintX509SVIDs(t.Context(), in); refusal(err) != "PermissionDenied METHOD_NOT_PERMITTED" {
		t.Errorf("an agent: %s", refusal(err))
	}
	both := metadata.AppendToOutgoingContext(t.Context(), "authorization", "Bearer "+ci.Token(t, job(ci, nil)))
	if _, err := client.MintX509SVIDs(both, in); refusal(err) != "InvalidArgument AMBIGUOUS_CALLER" {
		t.Errorf("a certificate and a token: %s", refusal(err))
	}
	if got := p.minted(t, tokenFor(t, cluster, pod), mintedID); got != "Unauthenticated TOKEN_ISSUER" {
		t.Errorf("an agent's token: %s", got)
	}
	_, err := trothv1.NewAttestationServiceClient(p.dial(t, nil, ci.Token(t, job(ci, nil)))).AttestAgent(t.Context(), &trothv1.AttestAgentRequest{Csr: csr})
	if refusal(err) != "Unauthenticated TOKEN_UNKNOWN_KEY retry" && refusal(err) != "Unauthenticated TOKEN_UNKNOWN_KEY" {
		t.Errorf("a job that attests: %s", refusal(err))
	}
	_, err = trothv1.NewMintServiceClient(p.dial(t, nil, ci.Token(t, job(ci, nil)))).ExplainMint(t.Context(), &trothv1.ExplainMintRequest{Claims: []byte("{}")})
	if refusal(err) != "PermissionDenied OPERATOR_FORBIDDEN" {
		t.Errorf("a job that wants an explanation: %s", refusal(err))
	}

	none, _, _ := startDev(t, nil)
	if got := none.minted(t, ci.Token(t, job(ci, nil)), mintedID); got != "Unimplemented MINT_DISABLED" {
		t.Errorf("a server without rules: %s", got)
	}
}

func TestExplainMint(t *testing.T) {
	ci := oidc.Start(t)
	store := storage.NewMemory()
	p, _, _ := startDev(t, func(c *server.Config) {
		c.Mint = newMint(t, parseRules(t, fmt.Sprintf(mintRules, ci.URL, ci.CAFile, shopRule)), store, nil)
		c.Operator = func(_ context.Context, raw string, right server.Right) (string, error) {
			if raw != "operator" || right != (server.Right{Verb: "explain", Resource: "mintrules"}) {
				return "", identity.ErrForbidden
			}
			return "somebody", nil
		}
	})
	client := trothv1.NewMintServiceClient(p.dial(t, nil, "operator"))
	claims, err := json.Marshal(job(ci, nil))
	if err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		in   *trothv1.ExplainMintRequest
		want string
	}{
		{&trothv1.ExplainMintRequest{Claims: claims, SpiffeId: mintedID}, "MATCHED"},
		{&trothv1.ExplainMintRequest{Claims: claims}, "MATCHED"},
		{&trothv1.ExplainMintRequest{Claims: claims, SpiffeId: mintedID + "x"}, "ID_NOT_PERMITTED"},
		{&trothv1.ExplainMintRequest{Claims: claims, SpiffeId: mintedID, Ttl: durationpb.New(time.Hour)}, "TTL_TOO_LONG"},
		{&trothv1.ExplainMintRequest{Claims: []byte(`{"iss":"x"}`)}, "ISSUER"},
		{&trothv1.ExplainMintRequest{Claims: []byte(`{"iss":1}`)}, "InvalidArgument CLAIMS_MALFORMED"},
		{&trothv1.ExplainMintRequest{}, "InvalidArgument CLAIMS_MALFORMED"},
		{&trothv1.ExplainMintRequest{Claims: claims, Ttl: durationpb.New(0)}, "InvalidArgument TTL_INVALID"},
	} {
		out, err := client.ExplainMint(t.Context(), test.in)
		got := ""
		if err != nil {
			got = refusal(err)
		} else if v := out.GetVerdicts(); len(v) == 1 && v[0].GetRule() == "shop" && v[0].GetMatched() == (v[0].GetReason() == "MATCHED") {
			got = v[0].GetReason()
		}
		if got != test.want {
			t.Errorf("ExplainMint(%v) = %s, %v; want %s", test.in, got, out, test.want)
		}
	}
}

// failing is a store that fails when it is told to.
type failing struct {
	*storage.Memory
	record, spend atomic.Bool
}

func (f *failing) Record(ctx context.Context, issuances ...storage.Issuance) error {
	if f.record.Load() {
		return errors.New("the disk is full")
	}
	return f.Memory.Record(ctx, issuances...)
}

func (f *failing) Spend(ctx context.Context, issuer, id string, until time.Time) error {
	if f.spend.Load() {
		return errors.New("the disk is full")
	}
	return f.Memory.Spend(ctx, issuer, id, until)
}

// The token is spent first. If it cannot be, nothing was issued and the token is as good
// as before; if what follows fails, the token is gone and nothing was released.
func TestMintSpendsFirst(t *testing.T) {
	ci := oidc.Start(t)
	store := &failing{Memory: storage.NewMemory()}
	p, _, _ := startDev(t, func(c *server.Config) {
		c.Mint = newMint(t, parseRules(t, fmt.Sprintf(mintRules, ci.URL, ci.CAFile, shopRule)), store, nil)
	})
	tok := ci.Token(t, job(ci, nil))
	for _, step := range []struct {
		record, spend bool
		want          string
	}{
		{false, true, "Unavailable LEDGER_UNAVAILABLE retry"},
		{true, false, "Unavailable LEDGER_UNAVAILABLE retry"},
		{false, false, "Unauthenticated TOKEN_SPENT"},
	} {
		store.record.Store(step.record)
		store.spend.Store(step.spend)
		if got := p.minted(t, tok, mintedID); got != step.want {
			t.Errorf("%+v: %s", step, got)
		}
	}
	issued, err := store.Query(t.Context(), storage.Query{ID: spiffeid.RequireFromString(mintedID)})
	if len(issued) != 0 || err != nil {
		t.Errorf("the ledger has %d issuances, %v", len(issued), err)
	}
	if got := p.minted(t, ci.Token(t, job(ci, nil)), mintedID); got != "OK" {
		t.Errorf("another token: %s", got)
	}
	issued, err = store.Query(t.Context(), storage.Query{ID: spiffeid.RequireFromString(mintedID)})
	if len(issued) != 1 || err != nil || issued[0].Caller != `ci issuer=ci rule=shop sub="repo:example/shop:ref:refs/heads/main"` {
		t.Errorf("the ledger has %+v, %v", issued, err)
	}
}
