package main

import (
	"io"
	"maps"
	"slices"
	"strings"
	"testing"

	"troth.dev/troth/identity"
)

func TestUncapturedNamespaces(t *testing.T) {
	agents := identity.ServiceAccount{Namespace: "troth-system", Name: "troth-agent"}
	for _, test := range []struct {
		name string
		args []string
		want []string
	}{
		{"default, outside a cluster", nil, []string{"kube-system", "troth-system"}},
		{"none", []string{"-uncaptured-namespaces", ""}, nil},
		{"some", []string{"-uncaptured-namespaces", "monitoring,kube-system,"}, []string{"kube-system", "monitoring"}},
	} {
		o, err := parse(append([]string{"-trust-domain", "example.org", "-kubeconfig", "some"}, test.args...), io.Discard)
		if err != nil {
			t.Errorf("%s: %v", test.name, err)
			continue
		}
		got, err := o.uncapturedNamespaces(agents)
		if err != nil {
			t.Errorf("%s: %v", test.name, err)
		}
		if names := slices.Sorted(maps.Keys(got)); !slices.Equal(names, test.want) {
			t.Errorf("%s: %q, want %q", test.name, names, test.want)
		}
	}
	_, err := parse([]string{"-trust-domain", "example.org", "-uncaptured-namespaces", "Shop"}, io.Discard)
	if err == nil || !strings.Contains(err.Error(), `"Shop`) {
		t.Errorf("parse(a name that is none) = %v, want an error that names it", err)
	}
}
