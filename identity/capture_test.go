package identity_test

import (
	"testing"

	"troth.dev/troth/identity"
)

func TestCapture(t *testing.T) {
	uncaptured := map[string]bool{"kube-system": true}
	disabled := map[string]string{identity.CaptureLabel: "disabled"}
	in := func(namespace string, labels map[string]string, hostNetwork bool) identity.Pod {
		return identity.Pod{PodReference: identity.PodReference{Namespace: namespace}, Labels: labels, HostNetwork: hostNetwork}
	}
	for _, test := range []struct {
		name string
		pod  identity.Pod
		want identity.Capture
	}{
		{"any", in("shop", nil, false), identity.Captured},
		{"another value", in("shop", map[string]string{identity.CaptureLabel: "Disabled"}, false), identity.Captured},
		{"opted out", in("shop", disabled, false), identity.UncapturedByLabel},
		{"the node's network", in("shop", nil, true), identity.UncapturedHost},
		{"the node's network, above all else", in("kube-system", disabled, true), identity.UncapturedHost},
		{"namespace", in("kube-system", nil, false), identity.UncapturedNamespace},
	} {
		if got := test.pod.Capture(uncaptured); got != test.want {
			t.Errorf("%s: Capture() = %d, want %d", test.name, got, test.want)
		}
	}
}
