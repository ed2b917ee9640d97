package proxy

import (
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

// Identity is who a pod is, and whom it trusts, at one moment. It is never changed:
// a renewed SVID or another bundle make another Identity.
type Identity struct {
	// SVID is nil if the pod has none: not yet, or, because it is gone, not any more.
	SVID *x509svid.SVID
	// Bundles are those that peers are verified by. Nil trusts nobody.
	Bundles *x509bundle.Set
}
