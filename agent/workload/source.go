package workload

import (
	"bytes"
	"crypto/x509"
	"fmt"
	"slices"
	"time"
	"unicode/utf8"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"troth.dev/troth/internal/latest"
)

// Source says what each pod is entitled to. Its method is called from many
// goroutines.
type Source interface {
	// Workload returns the state of one pod, kept current until release is
	// called, which happens once. It does not block, and it answers for every
	// UID: a pod that is not known has a state that says so.
	Workload(podUID string) (state *latest.Value[State], release func())
}

// Status says how far the agent has come with a pod.
type Status int

// The statuses of a pod. What is not a status is [StatusUnknown].
const (
	StatusUnknown Status = iota // the agent is not in sync, and knows nothing of any pod
	StatusDenied                // the agent is in sync, and no such pod lives on this node
	StatusPending               // the pod is known, its SVID is on its way
	StatusReady                 // the pod has an SVID
)

// State is what a pod is entitled to at one moment. It is never changed once it is
// in a [latest.Value], nor is anything that it points to.
type State struct {
	Status Status
	// Identities are the pod's, the default one first (SPIFFE Workload API §8).
	// None unless Status is StatusReady.
	Identities []Identity
	// Bundles are those of the trust domains that the pod may trust, its own trust
	// domain's first, one for each. A trust domain that is missing is not trusted.
	Bundles []Bundle
}

// Identity is one X509-SVID with its key.
type Identity struct {
	SVID *x509svid.SVID
	// Hint tells the workload what the identity is for. A hint that an earlier
	// identity has, that is longer than 1024 bytes or that is not UTF-8 is not sent
	// (SPIFFE Workload API §5.2.1 and §8).
	Hint string
}

// Bundle is the trust bundle of one trust domain.
type Bundle struct {
	*x509bundle.Bundle

	Revision uint64 // grows with every change
}

// x509SVIDs returns the answer to FetchX509SVID, or the status that a stream ends
// with if it must end in this state. PermissionDenied is a "no", Unavailable is a
// "not yet".
//
// An SVID that has expired is "not yet": no peer would accept it, and a workload
// that is told so retries, while one that is handed it believes all is well. One
// expired SVID holds back all, because to leave it out would redact it and, if it
// is the first, make another identity the default.
func x509SVIDs(s State, now time.Time) (proto.Message, error) {
	bundles, err := s.check()
	if err != nil {
		return nil, err
	}
	response := &workload.X509SVIDResponse{}
	hints := map[string]bool{"": true}
	for _, identity := range s.Identities {
		svid := identity.SVID
		for _, cert := range svid.Certificates {
			if now.After(cert.NotAfter) {
				return nil, notYet("the SVID of %q expired at %s and there is no new one", svid.ID, cert.NotAfter.UTC().Format(time.RFC3339))
			}
		}
		// The chain, leaf first, and the key as PKCS#8, as §5.2.1 has them.
		chain, key, err := svid.MarshalRaw()
		if err != nil {
			return nil, notYet("the SVID of %q cannot be encoded: %v", svid.ID, err)
		}
		hint := identity.Hint
		if hints[hint] || len(hint) > 1024 || !utf8.ValidString(hint) {
			hint = ""
		}
		hints[hint] = true
		response.Svids = append(response.Svids, &workload.X509SVID{
			SpiffeId:    svid.ID.String(),
			X509Svid:    chain,
			X509SvidKey: key,
			Bundle:      bundles[svid.ID.TrustDomain()],
			Hint:        hint,
		})
	}
	delete(bundles, s.Bundles[0].TrustDomain())
	response.FederatedBundles = byID(bundles)
	return response, nil
}

// x509Bundles returns the answer to FetchX509Bundles, or a status as x509SVIDs
// does. Only a pod with an identity is answered, but it may have expired: whom to
// trust does not depend on it.
func x509Bundles(s State, _ time.Time) (proto.Message, error) {
	bundles, err := s.check()
	if err != nil {
		return nil, err
	}
	return &workload.X509BundlesResponse{Bundles: byID(bundles)}, nil
}

// check returns the bundles in DER, or the status for a state that entitles to
// nothing or that lacks something a response must have (§5.2.1, §5.2.2). A bundle
// without authorities counts as absent, which withdraws the trust in it (§4.4).
func (s State) check() (map[spiffeid.TrustDomain][]byte, error) {
	switch s.Status {
	case StatusReady:
	case StatusDenied:
		return nil, errNoIdentity
	case StatusPending:
		return nil, notYet("the SVID of this pod is on its way")
	default:
		return nil, notYet("the agent is not in sync yet")
	}
	if len(s.Identities) == 0 {
		return nil, errNoIdentity
	}

	bundles := make(map[spiffeid.TrustDomain][]byte, len(s.Bundles))
	for i, bundle := range s.Bundles {
		if bundle.Bundle == nil {
			return nil, notYet("bundle %d is missing", i)
		}
		td := bundle.TrustDomain()
		if _, twice := bundles[td]; twice {
			return nil, notYet("there are two bundles of trust domain %q", td)
		}
		if !bundle.Empty() {
			bundles[td] = encode(bundle.X509Authorities())
		}
	}
	if len(s.Bundles) == 0 || bundles[s.Bundles[0].TrustDomain()] == nil {
		return nil, notYet("there is no bundle of the pod's own trust domain")
	}
	for i, identity := range s.Identities {
		if identity.SVID == nil || len(identity.SVID.Certificates) == 0 {
			return nil, notYet("identity %d has no SVID", i)
		}
		if td := identity.SVID.ID.TrustDomain(); bundles[td] == nil {
			return nil, notYet("there is no bundle of trust domain %q", td)
		}
	}
	return bundles, nil
}

// encode returns the authorities in DER, in an order that depends on nothing but
// what they are: the same authorities in another order are no news.
func encode(authorities []*x509.Certificate) []byte {
	slices.SortFunc(authorities, func(a, b *x509.Certificate) int { return bytes.Compare(a.Raw, b.Raw) })
	var der []byte
	for _, authority := range authorities {
		der = append(der, authority.Raw...)
	}
	return der
}

func byID(bundles map[spiffeid.TrustDomain][]byte) map[string][]byte {
	ids := make(map[string][]byte, len(bundles))
	for td, der := range bundles {
		ids[td.IDString()] = der
	}
	return ids
}

// errNoIdentity is all that a caller learns when the answer is no (SPIFFE Workload
// Endpoint §6): why is for the log.
var errNoIdentity = status.Error(codes.PermissionDenied, "no identity issued")

func notYet(format string, args ...any) error {
	return status.Error(codes.Unavailable, fmt.Sprintf(format, args...))
}
