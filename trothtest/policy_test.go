package trothtest_test

import (
	"strings"
	"testing"

	"troth.dev/troth/policy"
	"troth.dev/troth/trothtest"
)

// What a team writes for its cluster, and what it means to have meant by it.
func TestPolicies(t *testing.T) {
	a := trothtest.New(t)
	frontend := a.Identity("/ns/shop/sa/frontend")
	payments := policy.Workload{Namespace: "shop", Labels: map[string]string{"app": "payments"}}
	cart := policy.Workload{Namespace: "shop", Labels: map[string]string{"app": "cart"}}

	verdict := func(why string, w policy.Workload, port uint16, caller *trothtest.Identity, want policy.Verdict) {
		t.Helper()
		if got := a.Decide(w, port, caller); got != want {
			t.Errorf("%s: %+v, want %+v", why, got, want)
		}
	}
	verdict("no policy", payments, 8080, nil, policy.Verdict{Allowed: true, Reason: policy.PlaintextAccepted})

	a.ApplyPolicies(`
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: payments, namespace: shop}
spec:
  selector: {matchLabels: {app: payments}}
  mtls: {mode: STRICT}
  portLevelMtls: {9090: {mode: PERMISSIVE}}
`)
	by := policy.Ref{Namespace: "shop", Name: "payments"}
	verdict("STRICT", payments, 8080, nil, policy.Verdict{Reason: policy.PlaintextRefused, Policy: by})
	verdict("STRICT, by mutual TLS", payments, 8080, frontend, policy.Verdict{Allowed: true, Reason: policy.MTLSAccepted, Policy: by})
	verdict("the port of its metrics", payments, 9090, nil, policy.Verdict{Allowed: true, Reason: policy.PlaintextAccepted, Policy: by})
	verdict("another workload", cart, 8080, nil, policy.Verdict{Allowed: true, Reason: policy.PlaintextAccepted})

	a.ApplyPolicies("")
	verdict("none any more", payments, 8080, nil, policy.Verdict{Allowed: true, Reason: policy.PlaintextAccepted})
}

func TestPolicyThatIsNotValid(t *testing.T) {
	a, err := trothtest.Open(t.Context(), trothtest.Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	a.ApplyPolicies("{apiVersion: security.istio.io/v1, kind: PeerAuthentication, metadata: {name: all, namespace: shop}, spec: {mtls: {mode: SOMETIMES}}}")
	if err := a.Err(); err == nil || !strings.Contains(err.Error(), "shop/all") || !strings.Contains(err.Error(), "SOMETIMES") {
		t.Errorf("Err() = %v, want what is wrong with shop/all", err)
	}
}
