package podcert_test

import (
	"crypto/x509"
	"testing"
	"time"

	certificatesv1 "k8s.io/api/certificates/v1"

	"troth.dev/troth/handshake"
)

// What a kubelet asks for a pod with the volume is issued, and verifies as an SVID of
// the pod's service account.
func TestIssues(t *testing.T) {
	w := newWorld(t)
	issuer := openIssuer(t, authorityConfig(t))
	background(t, newSigner(t, w.signerConfig(t, issuer)).Run)

	hour := int32(3600)
	request := w.request(t, w.pod(t, w.signer))
	request.Spec.MaxExpirationSeconds = &hour // the shortest that there is
	issued, condition := outcome(t, create(t, w.kubelet, request))
	if condition.Type != certificatesv1.PodCertificateRequestConditionTypeIssued || condition.Reason != "Issued" {
		t.Fatalf("condition %s, %s: %s", condition.Type, condition.Reason, condition.Message)
	}
	status := issued.Status
	if life := status.NotAfter.Sub(status.NotBefore.Time); life != time.Hour {
		t.Errorf("it lives %v, want an hour", life)
	}
	if refresh := status.BeginRefreshAt.Sub(status.NotBefore.Time); refresh < 24*time.Minute || refresh > 30*time.Minute {
		t.Errorf("the kubelet is to ask again after %v, want 24 to 30 minutes", refresh)
	}

	certificates := chain(t, issued)
	bundle, _ := issuer.Bundle().Load()
	peer, err := handshake.Verify(certificates, bundle.X509Bundle(), time.Now())
	if err != nil {
		t.Fatal(err)
	}
	if want := "spiffe://example.test/ns/" + w.namespace + "/sa/cart"; peer.ID.String() != want {
		t.Errorf("an SVID of %q, want %q", peer.ID, want)
	}
	roots := x509.NewCertPool()
	for _, a := range bundle.Authorities {
		roots.AddCert(a.Certificate)
	}
	for _, usage := range []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth} {
		if _, err := certificates[0].Verify(x509.VerifyOptions{Roots: roots, KeyUsages: []x509.ExtKeyUsage{usage}}); err != nil {
			t.Errorf("for usage %d: %v", usage, err)
		}
	}
}
