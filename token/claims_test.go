package token_test

import (
	"crypto/elliptic"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	jose "github.com/go-jose/go-jose/v4"

	"troth.dev/troth/identity"
	"troth.dev/troth/token"
)

func TestMatches(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var i issuer
		key := newECKey(t, elliptic.P256(), "p256")
		i.publish(key)
		v := i.verifier(t)
		verified := func(c claims) token.Claims {
			t.Helper()
			got, err := v.Verify(t.Context(), sign(t, jose.ES256, key, c.json(t)))
			if err != nil {
				t.Fatal(err)
			}
			return got
		}
		var (
			now         = time.Now()
			good        = verified(goodClaims())
			noNode      = verified(goodClaims().withK8s("node", nil))
			noNodeUID   = verified(goodClaims().withK8s("node", object{Name: "node-1"}))
			nodeUIDOnly = verified(goodClaims().withK8s("node", object{UID: "node-uid"}))
		)
		noAccountUID := good
		noAccountUID.ServiceAccountUID = ""
		tests := []struct {
			name   string
			claims token.Claims
			change func(p *identity.Pod)
			want   token.Reason
			is     error
		}{
			{"as it was", good, func(p *identity.Pod) {}, "", nil},
			{"pending", good, func(p *identity.Pod) { p.Phase = identity.PodPending }, "", nil},
			{"recreated with the same name", good, func(p *identity.Pod) { p.UID = "other" }, token.PodReplaced, identity.ErrPodReplaced},
			{"another name", good, func(p *identity.Pod) { p.Name = "web-1" }, token.PodReplaced, identity.ErrPodReplaced},
			{"another namespace", good, func(p *identity.Pod) { p.Namespace = "kube-system" }, token.PodReplaced, identity.ErrPodReplaced},
			{"no record", good, func(p *identity.Pod) { *p = identity.Pod{} }, token.PodReplaced, identity.ErrPodReplaced},
			{"zero claims", token.Claims{}, func(p *identity.Pod) { p.PodReference = identity.PodReference{} }, token.PodReplaced, identity.ErrPodReplaced},
			{"finished", good, func(p *identity.Pod) { p.Phase = identity.PodFinished }, token.PodFinished, identity.ErrPodFinished},
			{"of no known phase", good, func(p *identity.Pod) { p.Phase = identity.PodPhaseUnknown }, token.PodFinished, identity.ErrPodFinished},
			{"deleted, the grace over", good, func(p *identity.Pod) { p.DeletedAt = now }, token.PodDeleted, identity.ErrPodDeleted},
			{"deleted, the grace running", good, func(p *identity.Pod) { p.DeletedAt = now.Add(time.Second) }, "", nil},
			{"another service account", good, func(p *identity.Pod) { p.ServiceAccount = "admin" }, token.ServiceAccountMismatch, nil},
			{"service account recreated", good, func(p *identity.Pod) { p.ServiceAccountUID = "other" }, token.ServiceAccountReplaced, nil},
			{"service account gone", good, func(p *identity.Pod) { p.ServiceAccountUID = "" }, token.ServiceAccountReplaced, nil},
			{"no UID of a service account on either side", noAccountUID, func(p *identity.Pod) { p.ServiceAccountUID = "" }, token.ServiceAccountReplaced, nil},
			{"on another node", good, func(p *identity.Pod) { p.Node = identity.Node{Name: "node-2", UID: "node-uid"} }, token.NodeMismatch, nil},
			{"on no node", good, func(p *identity.Pod) { p.Node = identity.Node{} }, token.NodeMismatch, nil},
			{"node recreated", good, func(p *identity.Pod) { p.Node.UID = "other" }, token.NodeReplaced, nil},
			{"node gone", good, func(p *identity.Pod) { p.Node.UID = "" }, token.NodeReplaced, nil},
			{"no node claim", noNode, func(p *identity.Pod) { p.Node = identity.Node{Name: "node-2", UID: "other"} }, "", nil},
			{"node claim without UID", noNodeUID, func(p *identity.Pod) { p.Node.UID = "other" }, "", nil},
			{"node claim without UID, another node", noNodeUID, func(p *identity.Pod) { p.Node.Name = "node-2" }, token.NodeMismatch, nil},
			{"node claim without name", nodeUIDOnly, func(p *identity.Pod) {}, token.NodeMismatch, nil},
		}
		for _, tt := range tests {
			p := podOf()
			tt.change(&p)
			err := tt.claims.Matches(p, now)
			if got := reasonOf(t, err); got != tt.want {
				t.Errorf("Matches(%s) = %v, want reason %q", tt.name, err, tt.want)
			}
			if tt.is != nil && !errors.Is(err, tt.is) {
				t.Errorf("Matches(%s) = %v, which does not wrap %v", tt.name, err, tt.is)
			}
		}
	})
}
