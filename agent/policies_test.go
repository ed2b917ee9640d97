package agent

import (
	"testing"

	"github.com/google/go-cmp/cmp"

	trothv1 "troth.dev/troth/api/troth/v1"
	"troth.dev/troth/policy"
)

// What the control plane did not say, or says in a way of which this agent has not
// heard, is STRICT.
func TestParsePolicy(t *testing.T) {
	const disable, permissive, strict = trothv1.MTLSMode_MTLS_MODE_DISABLE, trothv1.MTLSMode_MTLS_MODE_PERMISSIVE, trothv1.MTLSMode_MTLS_MODE_STRICT
	mesh, ports := policy.Ref{Namespace: "istio-system", Name: "default"}, policy.Ref{Namespace: "shop", Name: "ports"}
	for _, tt := range []struct {
		name string
		in   *trothv1.EffectivePolicy
		want policy.Effective
	}{
		{"none", nil, policy.Effective{Mode: policy.Strict}},
		{"empty", &trothv1.EffectivePolicy{}, policy.Effective{Mode: policy.Strict}},
		{"a mode of the future", &trothv1.EffectivePolicy{Mode: 9}, policy.Effective{Mode: policy.Strict}},
		{"disable", &trothv1.EffectivePolicy{Mode: disable}, policy.Effective{Mode: policy.Disable}},
		{"permissive", &trothv1.EffectivePolicy{Mode: permissive}, policy.Effective{Mode: policy.Permissive}},
		{"decided", &trothv1.EffectivePolicy{Mode: strict, DecidedBy: "istio-system/default"},
			policy.Effective{Mode: policy.Strict, DecidedBy: mesh}},
		{"ports", &trothv1.EffectivePolicy{
			Mode: permissive, PortsDecidedBy: "shop/ports",
			PortModes: map[uint32]trothv1.MTLSMode{9090: strict, 80: disable, 443: 7, 8080: permissive},
		}, policy.Effective{
			Mode: policy.Permissive, PortsBy: ports,
			Ports: []policy.PortMode{{Port: 80, Mode: policy.Disable}, {Port: 443, Mode: policy.Strict}, {Port: 9090, Mode: policy.Strict}},
		}},
		{"ports that are none", &trothv1.EffectivePolicy{
			Mode: strict, PortsDecidedBy: "shop/ports",
			PortModes: map[uint32]trothv1.MTLSMode{0: disable, 1 << 16: disable, 1<<16 + 80: disable},
		}, policy.Effective{Mode: policy.Strict}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if diff := cmp.Diff(&tt.want, parsePolicy(tt.in)); diff != "" {
				t.Errorf("parsePolicy (-want +got):\n%s", diff)
			}
		})
	}
}

// Whoever follows a pod's policy hears of each change of it and of nothing else,
// and of the end of the pod.
func TestPolicyOf(t *testing.T) {
	i := newIdentities(td)
	value, release := i.policyOf("uid-1")
	defer release()
	if e, _ := value.Load(); e.Decide(policy.Connection{}).Allowed || e != nil {
		t.Errorf("before the control plane has spoken the policy is %v, want nil", e)
	}
	web := podOf(1, "web")
	steps := []struct {
		name   string
		pods   []pod
		change bool
		want   *policy.Effective
	}{
		{"strict", []pod{with(web, policy.Strict)}, true, &policy.Effective{Mode: policy.Strict}},
		{"the same again", []pod{with(web, policy.Strict)}, false, &policy.Effective{Mode: policy.Strict}},
		{"another pod", []pod{with(web, policy.Strict), with(podOf(2, "pay"), policy.Disable)}, false, &policy.Effective{Mode: policy.Strict}},
		{"permissive", []pod{with(web, policy.Permissive)}, true, &policy.Effective{Mode: policy.Permissive}},
		{"gone", nil, true, nil},
	}
	for _, s := range steps {
		_, changed := value.Load()
		i.setPods(s.name, s.pods)
		told := false
		select {
		case <-changed:
			told = true
		default:
		}
		got, _ := value.Load()
		if told != s.change || !got.Equal(s.want) {
			t.Errorf("%s: told %t and holds %v, want %t and %v", s.name, told, got, s.change, s.want)
		}
	}
}

func with(p pod, mode policy.Mode) pod {
	p.policy = &policy.Effective{Mode: mode}
	return p
}
