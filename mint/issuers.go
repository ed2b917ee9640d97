package mint

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/go-jose/go-jose/v4/json"

	"troth.dev/troth/internal/bounded"
	"troth.dev/troth/token"
)

// VerifierConfig is what a [Verifier] needs.
type VerifierConfig struct {
	// Rules names the issuers. Required.
	Rules *Rules
	// Kubernetes fetches the JWKS of the cluster, as [token.Config.Keys]. Required if an
	// issuer says that it is this cluster.
	Kubernetes func(ctx context.Context) ([]byte, error)
}

// Verifier verifies tokens of the configured issuers. It may be used from many
// goroutines.
type Verifier struct {
	issuers map[string]*source // by "iss"
	close   []func()
}

// source is an issuer and its keys.
type source struct {
	*issuer
	keys *token.Keys
}

// Token is what a verified token says, and by what it is spent.
type Token struct {
	Claims
	// IssuerName is what the configuration calls the issuer.
	IssuerName string
	// SpendID names the token to a [storage.TokenStore]: its jti, or what was signed.
	SpendID string
	// Until is when the token is not accepted any more, by whatever clock of ours.
	Until time.Time
}

// NewVerifier reads the certificates that the configuration names and fetches nothing.
// The caller closes the Verifier.
func NewVerifier(c VerifierConfig) (*Verifier, error) {
	if c.Rules == nil {
		return nil, errors.New("mint: no rules")
	}
	v := &Verifier{issuers: make(map[string]*source)}
	for _, i := range c.Rules.issuers {
		fetch := c.Kubernetes
		switch {
		case i.kubernetes && fetch == nil:
			return nil, fmt.Errorf("mint: issuer %q is the cluster, and there is none", i.name)
		case i.kubernetes:
		case i.jwksFile != "":
			fetch = func(context.Context) ([]byte, error) { return bounded.ReadFile(i.jwksFile, maxKeys) }
		default:
			client, err := i.client()
			if err != nil {
				return nil, fmt.Errorf("mint: issuer %q: %w", i.name, err)
			}
			fetch = func(ctx context.Context) ([]byte, error) { return i.fetch(ctx, client) }
		}
		keys := token.NewKeys(fetch)
		v.issuers[i.url] = &source{issuer: i, keys: keys}
		v.close = append(v.close, keys.Close)
	}
	return v, nil
}

// Close ends the fetches that are under way, and waits for them. A Verifier goes on
// verifying with the keys that it has.
func (v *Verifier) Close() {
	for _, end := range v.close {
		end()
	}
}

// Verify returns what a token says, if its issuer is configured and vouches for it, and
// it is in force; otherwise it fails with a [*token.Error]. The checks come cheapest
// first, so that only what would be accepted costs a signature or a fetch of keys. What
// a token says before that is proved is believed only where it speaks against it. Verify
// blocks as [token.Keys.Verify] does.
func (v *Verifier) Verify(ctx context.Context, raw string) (Token, error) {
	now := time.Now()
	// 1. Size, form and header.
	signed, err := token.Parse(raw)
	if err != nil {
		return Token{}, err
	}
	payload, err := signed.Payload()
	if err != nil {
		return Token{}, err
	}
	claims, err := ParseClaims(payload)
	if err != nil {
		return Token{}, &token.Error{Reason: token.Malformed, Err: err}
	}
	// 2. Whose it claims to be, and whether it would be accepted then.
	from := v.issuers[claims.Issuer]
	if from == nil {
		return Token{}, refuseToken(token.WrongIssuer, "issuer %.200q is not configured", claims.Issuer)
	}
	if !slices.Contains(from.algorithms, signed.Algorithm()) {
		return Token{}, refuseToken(token.WrongAlgorithm, "algorithm %q is not one of %q, which the issuer has", signed.Algorithm(), from.algorithms)
	}
	if refused := from.admits(claims); refused != nil {
		return Token{}, &token.Error{Reason: tokenReason(refused.Reason), Err: refused}
	}
	if err := from.inForce(claims, now); err != nil {
		return Token{}, err
	}
	// 3. The signature.
	if err := from.keys.Verify(ctx, signed); err != nil {
		return Token{}, err
	}
	t := Token{Claims: claims, IssuerName: from.name, SpendID: "jti:" + claims.ID}
	if claims.ID == "" {
		// What was signed, and not the token: an ECDSA signature has a twin that
		// verifies too.
		sum := sha256.Sum256([]byte(signed.Input()))
		t.SpendID = "sha256:" + hex.EncodeToString(sum[:])
	}
	// As late as another replica's clock may be behind this one's, and a minute.
	t.Until = claims.Expiry.Add(2*from.leeway + time.Minute)
	return t, nil
}

func refuseToken(reason token.Reason, format string, a ...any) *token.Error {
	return &token.Error{Reason: reason, Err: fmt.Errorf(format, a...)}
}

// tokenReason is how a call is refused for what a rule would say.
func tokenReason(r Reason) token.Reason {
	switch r {
	case Audience:
		return token.WrongAudience
	case NoID:
		return token.NoID
	case Lifetime:
		return token.LifetimeTooLong
	default:
		return token.Malformed
	}
}

// admits says whether the issuer's tokens may be like that, whatever the time is.
func (i *issuer) admits(c Claims) *Refusal {
	// Whoever else a token is made for could present it here.
	if len(c.Audience) != 1 || c.Audience[0] != i.audience {
		return refuse(Audience, "audiences %.200q are not %q alone", c.Audience, i.audience)
	}
	if c.ID == "" && i.requireJTI {
		return refuse(NoID, "the token has no jti, and issuer %q is to give each one", i.name)
	}
	if c.IssuedAt.IsZero() || c.Expiry.IsZero() {
		return refuse(Lifetime, "the token has no iat or no exp")
	}
	if life := c.Expiry.Sub(c.IssuedAt); life <= 0 || life > i.maxLife {
		return refuse(Lifetime, "the token lives for %v, which is not within the %v of issuer %q", life, i.maxLife, i.name)
	}
	return nil
}

// inForce holds the claims against the clock.
func (i *issuer) inForce(c Claims, now time.Time) error {
	if !now.Before(c.Expiry.Add(i.leeway)) {
		return refuseToken(token.Expired, "expired at %v", c.Expiry.UTC())
	}
	start := c.NotBefore
	if c.IssuedAt.After(start) {
		start = c.IssuedAt
	}
	if wait := start.Add(-i.leeway).Sub(now); wait > 0 {
		return &token.Error{Reason: token.NotYetValid, RetryAfter: wait, Err: fmt.Errorf("not valid before %v", start.UTC())}
	}
	return nil
}

// The bounds of what an issuer sends, in bytes.
const (
	maxDiscovery = 64 << 10
	maxKeys      = 1 << 20
)

// client returns a client that talks to one host and follows nobody elsewhere.
func (i *issuer) client() (*http.Client, error) {
	config := &tls.Config{MinVersion: tls.VersionTLS12}
	if i.caFile != "" {
		content, err := bounded.ReadFile(i.caFile, maxKeys)
		if err != nil {
			return nil, err
		}
		config.RootCAs = x509.NewCertPool()
		if !config.RootCAs.AppendCertsFromPEM(content) {
			return nil, fmt.Errorf("%s has no certificate", i.caFile)
		}
	}
	return &http.Client{
		Transport: &http.Transport{
			Proxy: http.ProxyFromEnvironment, TLSClientConfig: config, ForceAttemptHTTP2: true,
			DisableKeepAlives: true, MaxResponseHeaderBytes: 64 << 10, // one fetch in minutes
		},
		CheckRedirect: func(request *http.Request, _ []*http.Request) error {
			return fmt.Errorf("it redirects to %.200q: keys are taken from where the configuration says, and nowhere else", request.URL)
		},
	}, nil
}

// fetch fetches the issuer's keys, and where they are if that is not configured. It ends
// with ctx.
func (i *issuer) fetch(ctx context.Context, client *http.Client) ([]byte, error) {
	at := i.jwksURL
	if at == "" {
		var err error
		if at, err = i.discover(ctx, client); err != nil {
			return nil, err
		}
	}
	return get(ctx, client, at, maxKeys)
}

// discover asks the issuer where its keys are (OpenID Connect Discovery 1.0 §4).
func (i *issuer) discover(ctx context.Context, client *http.Client) (string, error) {
	content, err := get(ctx, client, strings.TrimSuffix(i.url, "/")+"/.well-known/openid-configuration", maxDiscovery)
	if err != nil {
		return "", err
	}
	var found struct {
		Issuer string `json:"issuer"`
		Keys   string `json:"jwks_uri"`
	}
	if err := json.Unmarshal(content, &found); err != nil {
		return "", fmt.Errorf("its configuration: %w", err)
	}
	if found.Issuer != i.url { // §4.3
		return "", fmt.Errorf("what is at %q calls itself %.200q", i.url, found.Issuer)
	}
	if err := checkURL(found.Keys, i.loopbackHTTP); err != nil {
		return "", fmt.Errorf("jwks_uri: %w", err)
	}
	own, err := url.Parse(i.url)
	if err != nil {
		return "", err
	}
	if keys, err := url.Parse(found.Keys); err != nil || keys.Host != own.Host || keys.Scheme != own.Scheme {
		return "", fmt.Errorf("its keys are at %.200q, another host: say so by jwksURL if that is right", found.Keys)
	}
	return found.Keys, nil
}

func get(ctx context.Context, client *http.Client, from string, limit int64) ([]byte, error) {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, from, nil)
	if err != nil {
		return nil, err
	}
	response, err := client.Do(request)
	if err != nil {
		return nil, err
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("GET %s: %s", from, response.Status)
	}
	content, err := bounded.ReadAll(response.Body, limit)
	if err != nil {
		return nil, fmt.Errorf("GET %s: %w", from, err)
	}
	return content, nil
}
