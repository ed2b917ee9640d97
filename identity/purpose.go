package identity

import "crypto/x509"

// TestPolicy is the certificate policy (RFC 5280 §4.2.1.4) of everything that was
// issued for tests: authorities, and what they sign. Whoever verifies for production
// refuses a chain that has it, even one that leads to an authority in its own bundle.
// Nobody writes it.
//
// Its object identifier is under 2.25, where a UUID needs nobody's leave (ITU-T X.667).
var TestPolicy = testPolicy()

func testPolicy() x509.OID {
	policy, err := x509.ParseOID("2.25.65806001193306203067736400821030592043")
	if err != nil {
		panic(err) // it is spelled above
	}
	return policy
}

// IsTest says whether a certificate has [TestPolicy].
func IsTest(c *x509.Certificate) bool {
	for _, policy := range c.Policies {
		if policy.Equal(TestPolicy) {
			return true
		}
	}
	return false
}
