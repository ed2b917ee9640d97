package kube_test

import (
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"k8s.io/client-go/rest"

	"troth.dev/troth/kube"
	"troth.dev/troth/test/apiserver"
)

func TestIssuer(t *testing.T) {
	w := newWorld(t)
	// What every service account may do is enough.
	client, wire := client(t, cluster.Bearer(cluster.AutomountToken(t, w.pod(t, "cart-"))))
	issuer, err := kube.Issuer(t.Context(), client)
	if err != nil || issuer != apiserver.Issuer {
		t.Errorf("Issuer() = %q, %v, want %q", issuer, err, apiserver.Issuer)
	}
	if n := wire.count("GET", "/.well-known/openid-configuration"); n != 1 {
		t.Errorf("Issuer() read the discovery document %d times, want once", n)
	}
}

func TestKeysFollowRotation(t *testing.T) {
	w := newWorld(t)
	bearer, _ := client(t, cluster.Bearer(cluster.AutomountToken(t, w.pod(t, "cart-"))))
	keys := kube.Keys(bearer)
	types := func() []string {
		t.Helper()
		document, err := keys(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		var set struct {
			Keys []struct{ Kty string }
		}
		if err := json.Unmarshal(document, &set); err != nil {
			t.Fatal(err)
		}
		count := make(map[string]int)
		for _, key := range set.Keys {
			count[key.Kty]++
		}
		var all []string
		for _, kty := range []string{"RSA", "EC"} {
			for range count[kty] {
				all = append(all, kty)
			}
		}
		return all
	}

	before := types()
	cluster.RotateSigningKey(t)
	if diff := cmp.Diff(append(before, "EC"), types()); diff != "" {
		t.Errorf("keys after a rotation (-want +got):\n%s", diff)
	}
	cluster.DropOldSigningKeys(t)
	// The client's own token is signed by a dropped key now.
	if _, err := keys(t.Context()); err == nil {
		t.Error("Keys() with a token that the API server refuses = nil, want an error")
	}
	client, wire := adminClient(t)
	keys = kube.Keys(client)
	if diff := cmp.Diff([]string{"EC"}, types()); diff != "" {
		t.Errorf("keys after the old ones were dropped (-want +got):\n%s", diff)
	}
	if n := wire.asked(); n != 1 {
		t.Errorf("Keys() sent %d requests, want the one for the keys", n)
	}
}

func TestDocumentsAreBounded(t *testing.T) {
	hostile := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		io.Copy(w, io.LimitReader(zeros{}, 2<<20))
	}))
	defer hostile.Close()
	client, err := kube.NewClient(&rest.Config{Host: hostile.URL})
	if err != nil {
		t.Fatal(err)
	}
	if document, err := kube.Keys(client)(t.Context()); err == nil || !strings.Contains(err.Error(), "more than 1048576 bytes") {
		t.Errorf("Keys(2 MiB) = %d bytes, %v, want it refused for its size", len(document), err)
	}
	if issuer, err := kube.Issuer(t.Context(), client); err == nil {
		t.Errorf("Issuer(2 MiB) = %q, want an error", issuer)
	}
}

func TestIssuerRefuses(t *testing.T) {
	for name, document := range map[string]string{"no JSON": "<html>", "no issuer": `{"jwks_uri":"https://elsewhere"}`} {
		server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, document) }))
		defer server.Close()
		client, err := kube.NewClient(&rest.Config{Host: server.URL})
		if err != nil {
			t.Fatal(err)
		}
		if issuer, err := kube.Issuer(t.Context(), client); err == nil {
			t.Errorf("Issuer(%s) = %q, want an error", name, issuer)
		}
	}
}

func TestConnect(t *testing.T) {
	client, err := kube.Connect(cluster.Kubeconfig(t, cluster.Admin()))
	if err != nil {
		t.Fatal(err)
	}
	if issuer, err := kube.Issuer(t.Context(), client); err != nil || issuer != apiserver.Issuer {
		t.Errorf("Issuer(by kubeconfig) = %q, %v, want %q", issuer, err, apiserver.Issuer)
	}
	if _, err := kube.Connect(t.TempDir() + "/none"); err == nil {
		t.Error("Connect(no such file) = nil, want an error")
	}
	t.Setenv("KUBERNETES_SERVICE_HOST", "")
	if _, err := kube.Connect(""); err == nil {
		t.Error("Connect(not in a cluster) = nil, want an error")
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}
