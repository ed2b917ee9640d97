package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"slices"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"troth.dev/troth/ca"
	"troth.dev/troth/kube"
	"troth.dev/troth/mint"
	"troth.dev/troth/server"
)

// maxMintRules bounds the file, in bytes; what is just larger is refused by mint.Parse.
const maxMintRules = 1<<20 + 1

// openMint returns what issues to CI jobs, or nil if nothing is to. Its authorities are
// like the others, but for tests: self-signed, in a document of their own, under the
// same keys.
func openMint(ctx context.Context, o options, like ca.Config, store store, connect func() (*kube.Client, error)) (*server.Mint, error) {
	if o.mintRules == "" {
		return nil, nil
	}
	td, err := spiffeid.TrustDomainFromString(o.mintTrustDomain)
	if err != nil {
		return nil, fmt.Errorf("-mint-trust-domain: %w", err)
	}
	f, err := os.Open(o.mintRules)
	if err != nil {
		return nil, fmt.Errorf("-mint-rules: %w", err)
	}
	defer f.Close()
	content, err := io.ReadAll(io.LimitReader(f, maxMintRules))
	if err != nil {
		return nil, fmt.Errorf("-mint-rules: %w", err)
	}
	rules, err := mint.Parse(content)
	if err != nil {
		return nil, fmt.Errorf("-mint-rules %s: %w", o.mintRules, err)
	}
	switch {
	case td == like.TrustDomain:
		return nil, fmt.Errorf("-mint-trust-domain %s: it is that of production; tests need another", td)
	case rules.TrustDomain() != td:
		return nil, fmt.Errorf("-mint-rules %s: the rules give SPIFFE IDs of trust domain %q, and -mint-trust-domain is %q", o.mintRules, rules.TrustDomain(), td)
	case slices.Contains(rules.Audiences(), o.audience):
		return nil, fmt.Errorf("-mint-rules %s: audience %q is that of pods and agents: CI needs one of its own", o.mintRules, o.audience)
	}
	profile, err := ca.NewProfile(ca.ProfileConfig{Life: rules.MaxTTL()})
	if err != nil {
		return nil, err
	}
	like.TrustDomain, like.Authorities, like.Profile = td, store.Tests(), profile
	like.Upstream, like.Test = nil, true
	like.AuthorityLife = max(like.AuthorityLife, 3*rules.MaxTTL())
	issuer, err := ca.Open(ctx, like)
	if err != nil {
		return nil, fmt.Errorf("authorities for tests: %w", err)
	}
	if _, err := issuer.Reseal(ctx); err != nil {
		return nil, fmt.Errorf("authorities for tests: %w", err)
	}
	// The store and the pods come from the cluster too, but rules are an error of a
	// file: they are said before it is asked.
	client, err := connect()
	if err != nil {
		return nil, err
	}
	verifier, err := mint.NewVerifier(mint.VerifierConfig{Rules: rules, Kubernetes: kube.Keys(client)})
	if err != nil {
		return nil, fmt.Errorf("-mint-rules %s: %w", o.mintRules, err)
	}
	return &server.Mint{Rules: rules, Verifier: verifier, Issuer: issuer, Tokens: store}, nil
}
