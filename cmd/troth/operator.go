package main

import (
	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"troth.dev/troth/api"
)

// operatorFlags say how an operator reaches the control plane.
type operatorFlags struct{ server, trustDomain, bundle, token string }

func (o *operatorFlags) flags(cmd *cobra.Command) {
	cmd.Flags().StringVar(&o.server, "server", "", "HOST:PORT of the control plane")
	cmd.Flags().StringVar(&o.trustDomain, "trust-domain", "", "trust domain of the control plane")
	cmd.Flags().StringVar(&o.bundle, "bundle", "", "`file` of the trust bundle, PEM")
	cmd.Flags().StringVar(&o.token, "token", "", "`file` of the operator's token, for the audience spiffe://TRUST_DOMAIN")
}

func (o *operatorFlags) given() bool { return *o != operatorFlags{} }

// config checks the flags and returns what to dial.
func (o *operatorFlags) config() (api.Config, error) {
	if o.server == "" || o.trustDomain == "" || o.bundle == "" || o.token == "" {
		return api.Config{}, inputErrorf("--server, --trust-domain, --bundle and --token go together")
	}
	td, err := spiffeid.TrustDomainFromString(o.trustDomain)
	if err != nil {
		return api.Config{}, inputErrorf("--trust-domain: %w", err)
	}
	bundle, err := x509bundle.Load(td, o.bundle)
	if err != nil {
		return api.Config{}, err
	}
	return api.Config{Address: o.server, TrustDomain: td, Bundles: bundle, Token: api.TokenFile(o.token)}, nil
}
