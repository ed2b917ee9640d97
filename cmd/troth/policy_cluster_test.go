package main

import (
	"bytes"
	"errors"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"troth.dev/troth/deploy"
	"troth.dev/troth/test/apiserver"
)

// TestPolicyOfCluster asks about the pods of a real API server.
func TestPolicyOfCluster(t *testing.T) {
	cluster := apiserver.Start(t)
	cluster.CreateNamespace(t, "istio-system")
	cluster.CreateNamespace(t, "shop")
	cluster.CreateServiceAccount(t, "shop", "cart")
	for _, name := range []string{"cart-1", "cart-2"} {
		_, err := cluster.Client().CoreV1().Pods("shop").Create(t.Context(), &corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{"app": "cart"}},
			Spec: corev1.PodSpec{
				ServiceAccountName: "cart",
				Containers: []corev1.Container{{
					Name: "cart", Image: "none", Ports: []corev1.ContainerPort{{ContainerPort: 8080}},
				}},
			},
		}, metav1.CreateOptions{})
		if err != nil {
			t.Fatal(err)
		}
	}
	kubeconfig := cluster.Kubeconfig(t, cluster.Admin())
	troth := func(args ...string) (string, error) {
		var stdout bytes.Buffer
		err := run(t.Context(), append(args, "--kubeconfig", kubeconfig), strings.NewReader(strict), &stdout, &stdout)
		return stdout.String(), err
	}
	prints := func(want string, args ...string) {
		t.Helper()
		got, err := troth(args...)
		if err != nil {
			t.Fatalf("troth %s: %v", strings.Join(args, " "), err)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("troth %s (- want, + got):\n%s", strings.Join(args, " "), diff)
		}
	}

	// Without the CustomResourceDefinition there are no policies.
	prints(`pod cart-1 in namespace shop, with app=cart

LEVEL      POLICY  ASKS FOR  IN FORCE    NOTE
default                      PERMISSIVE
mesh       none              PERMISSIVE
namespace  none              PERMISSIVE
workload   none              PERMISSIVE

PERMISSIVE, by default
`, "policy", "explain", "cart-1", "-n", "shop")

	definition, err := deploy.CRDs.ReadFile("crds/peerauthentications.security.istio.io.yaml")
	if err != nil {
		t.Fatal(err)
	}
	cluster.ApplyCRD(t, definition)
	cluster.ApplyPolicy(t, "v1", "istio-system", "default", "{mtls: {mode: STRICT}}")
	cluster.ApplyPolicy(t, "v1", "shop", "cart",
		"{selector: {matchLabels: {app: cart}}, portLevelMtls: {8080: {mode: DISABLE}, 80: {mode: PERMISSIVE}}}")

	prints(`pod cart-1 in namespace shop, with app=cart

LEVEL      POLICY                ASKS FOR    IN FORCE    NOTE
default                                      PERMISSIVE
mesh       istio-system/default  STRICT      STRICT
namespace  none                              STRICT
workload   shop/cart             UNSET       STRICT      inherits
port 80    shop/cart             PERMISSIVE  PERMISSIVE
port 8080  shop/cart             DISABLE     DISABLE

Warnings
shop/cart names port 80, which no container of the pod declares: it has to be the container's port, not the Service's

STRICT, by istio-system/default
port 80: PERMISSIVE, by shop/cart
port 8080: DISABLE, by shop/cart
`, "policy", "explain", "cart-1", "-n", "shop", "--context", "test")
	prints(`pod cart-1 in namespace shop, with app=cart

LEVEL      POLICY                ASKS FOR  IN FORCE    NOTE
default                                    PERMISSIVE
mesh       istio-system/default  STRICT    STRICT
namespace  none                            STRICT
workload   shop/cart             UNSET     STRICT      inherits
port 443   none                            STRICT

Warnings
shop/cart names port 80, which no container of the pod declares: it has to be the container's port, not the Service's
no container of the pod declares port 443: --port has to be the container's port, not the Service's

port 443: STRICT, by istio-system/default
`, "policy", "explain", "cart-1", "-n", "shop", "--port", "443")

	// The policy takes the place of the one that is there.
	prints(`NAMESPACE  SERVICE ACCOUNT  PODS  PORT  BEFORE      AFTER   BY
shop       cart             2     80    PERMISSIVE  STRICT  istio-system/default
shop       cart             2     8080  DISABLE     STRICT  istio-system/default

Changing: 2 of 2 pods.
`, "policy", "dry-run", "-f", "-", "-n", "shop")
	if _, err := troth("policy", "dry-run", "-f", "-", "-n", "shop", "--exit-code"); !errors.Is(err, errChanges) {
		t.Errorf("dry-run --exit-code = %v, want %v", err, errChanges)
	}

	for _, test := range []struct {
		args []string
		want string
	}{
		{[]string{"policy", "explain", "cart-3", "-n", "shop"}, `there is no pod "cart-3" in namespace "shop"`},
		{[]string{"policy", "explain", "cart-1", "-n", "istio-system"}, `there is no pod "cart-1" in namespace "istio-system"`},
		{[]string{"policy", "explain", "cart-1", "-n", "shop", "--context", "other"}, `context "other" does not exist`},
		{[]string{"policy", "dry-run", "-f", "-", "-n", "shop", "--context", "other"}, `context "other" does not exist`},
	} {
		printed, err := troth(test.args...)
		if err == nil || !strings.Contains(err.Error(), test.want) || exitCode(err) != 1 || printed != "" {
			t.Errorf("troth %s = %q, %v (exit code %d), want %q (1)", strings.Join(test.args, " "), printed, err, exitCode(err), test.want)
		}
	}
}

const strict = `
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata:
  name: cart
spec:
  selector:
    matchLabels:
      app: cart
`
