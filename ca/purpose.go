package ca

import (
	"crypto/x509"
	"errors"
	"fmt"
	"slices"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"troth.dev/troth/identity"
)

// limitToTests gives an authority the policy of tests, and confines it to its trust
// domain. The policy keeps it out of Troth's own verifiers. The constraint keeps it
// from speaking for anybody else in those that know nothing of the policy, if it ever
// gets into a bundle where it does not belong.
func limitToTests(template *x509.Certificate, td spiffeid.TrustDomain) {
	template.Policies = []x509.OID{identity.TestPolicy}
	// RFC 5280 §4.2.1.10: a host without a leading period is that host alone, one
	// with it is all below. Go takes the first for both, so that both are said.
	template.PermittedURIDomains = []string{td.Name()}
	template.ExcludedURIDomains = []string{"." + td.Name()}
	template.PermittedDNSDomainsCritical = true // of all constraints: the extension is one
}

// checkPurpose returns an error unless the authority is for tests exactly if it
// should be. An authority of the one kind never signs for the other: neither by a
// store that was pointed to by mistake, nor by a flag that was set on a store that
// had authorities.
func (a Authority) checkPurpose(td spiffeid.TrustDomain, test bool) error {
	c := a.Certificate
	if !test {
		for _, each := range append([]*x509.Certificate{c}, a.Upstream...) {
			if identity.IsTest(each) {
				return fmt.Errorf("ca: authority %q is for tests, and this trust domain is not: is it another's store?", a.ID)
			}
		}
		return nil
	}
	switch {
	case !identity.IsTest(c), len(c.Policies) != 1:
		return fmt.Errorf("ca: authority %q is not for tests, and this trust domain is: is it another's store?", a.ID)
	case !extension(c, oidNameConstraints).Critical,
		!slices.Equal(c.PermittedURIDomains, []string{td.Name()}),
		!slices.Equal(c.ExcludedURIDomains, []string{"." + td.Name()}):
		return fmt.Errorf("ca: authority %q is for tests and not confined to trust domain %q", a.ID, td)
	case len(a.Upstream) > 0:
		return errors.New("ca: an authority for tests has an upstream")
	}
	return nil
}
