package main

import (
	"io"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

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

func TestNativeFlags(t *testing.T) {
	for _, test := range []struct {
		args []string
		want string // the problem, if there is one
	}{
		{nil, ""},
		{[]string{"-trust-bundle", "clustertrustbundle"}, ""},
		{[]string{"-signer", "troth.dev/svid", "-trust-bundle", "clustertrustbundle,configmap=troth-node/troth-bundle"}, ""},
		{[]string{"-signer", "troth.dev/svid"}, "say where it is published with -trust-bundle"},
		{[]string{"-signer", "troth.dev/svid", "-trust-bundle", ""}, "say where it is published with -trust-bundle"},
		{[]string{"-signer", "svid", "-trust-bundle", "clustertrustbundle"}, "DOMAIN/PATH"},
		{[]string{"-trust-bundle", "secret=a/b"}, "neither clustertrustbundle nor configmap"},
	} {
		_, err := parse(append([]string{"-trust-domain", "example.org", "-kubeconfig", "some", "-replica", "one"}, test.args...), io.Discard)
		if (err == nil) != (test.want == "") || err != nil && !strings.Contains(err.Error(), test.want) {
			t.Errorf("parse(%q) = %v, want %q", test.args, err, test.want)
		}
	}
	for life, want := range map[time.Duration]time.Duration{time.Minute: time.Hour, 2 * time.Hour: 2 * time.Hour} {
		if got := (options{svidLife: life}).podCertificateLife(); got != want {
			t.Errorf("with SVIDs of %v they live %v, want %v", life, got, want)
		}
	}
}
