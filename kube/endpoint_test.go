package kube

import (
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"

	"troth.dev/troth/kube/directory"
)

// A condition that is not given is what the API says of it: ready and serving are
// true, terminating is false.
func TestConditionsThatAreNotGiven(t *testing.T) {
	yes, no := true, false
	for _, test := range []struct {
		name       string
		conditions discoveryv1.EndpointConditions
		want       directory.SliceEndpoint
	}{
		{"none", discoveryv1.EndpointConditions{}, directory.SliceEndpoint{Ready: true, Serving: true}},
		{"terminating", discoveryv1.EndpointConditions{Ready: &no, Terminating: &yes}, directory.SliceEndpoint{Serving: true, Terminating: true}},
		{"not ready", discoveryv1.EndpointConditions{Ready: &no}, directory.SliceEndpoint{Serving: true}},
		{"not serving", discoveryv1.EndpointConditions{Serving: &no}, directory.SliceEndpoint{Ready: true}},
	} {
		test.want.Address, test.want.IsPod = netip.MustParseAddr("10.64.0.1"), true
		got, ok := endpointOf(&discoveryv1.Endpoint{
			Addresses: []string{"10.64.0.1"}, Conditions: test.conditions, TargetRef: &corev1.ObjectReference{Kind: "Pod"},
		})
		if diff := cmp.Diff(test.want, got, cmpopts.EquateComparable(netip.Addr{})); !ok || diff != "" {
			t.Errorf("%s: endpointOf(), %t (-want +got):\n%s", test.name, ok, diff)
		}
	}
}
