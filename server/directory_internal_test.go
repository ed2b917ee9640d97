package server

import (
	"net/netip"
	"testing"
)

// FuzzParseAddress: what an agent names is refused, or is one address that can be
// spelled again.
func FuzzParseAddress(f *testing.F) {
	for _, seed := range []string{"10.0.0.1", "fd00::1", "FD00:0::1", "::ffff:10.0.0.1", "fe80::1%eth0", "", "1", "::", "10.0.0.1:80"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, spelled string) {
		a, err := parseAddress(spelled)
		if err != nil {
			if a.IsValid() || refusalOf(err) != refusals.invalidAddress {
				t.Errorf("parseAddress(%q) = %v, %v", spelled, a, err)
			}
			return
		}
		if again, err := netip.ParseAddr(a.String()); err != nil || again != a || a.Is4In6() || a.Zone() != "" {
			t.Errorf("parseAddress(%q) = %v, which is no address that a pod can call", spelled, a)
		}
	})
}
