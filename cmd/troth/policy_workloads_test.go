package main

import (
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"troth.dev/troth/identity"
)

func TestParsePods(t *testing.T) {
	const whole = `
apiVersion: v1
kind: Pod
metadata:
  name: cart-1
  namespace: shop
  uid: 0b7b2f6e-5a3c-4a5e-8c9d-000000000001
  labels:
    app: cart
    version: 2
spec:
  serviceAccountName: cart
  initContainers:
  - name: migrate
    ports:
    - containerPort: 1
  - name: sidecar
    restartPolicy: Always
    ports:
    - containerPort: 15020
  containers:
  - name: cart
    ports:
    - containerPort: 9090
      protocol: TCP
    - containerPort: 53
      protocol: UDP
  - name: more
    ports:
    - containerPort: 8080
    - containerPort: 9090
status:
  phase: Running
  podIPs:
  - ip: 10.64.0.1
  - ip: fd00::1
`
	named := func(namespace, name string) identity.Pod {
		return identity.Pod{
			PodReference:   identity.PodReference{Namespace: namespace, Name: name},
			ServiceAccount: "default", Phase: identity.PodPending,
		}
	}
	for name, test := range map[string]struct {
		data string
		want []identity.Pod
	}{
		"nothing":       {"", nil},
		"comments":      {"# none\n---\n# none\n", nil},
		"no object":     {"- apiVersion: v1\n---\n7\n---\nnull\n", nil},
		"other kinds":   {"apiVersion: v1\nkind: Service\nspec: 7\n---\napiVersion: apps/v1\nkind: Pod\nmetadata: 7\n", nil},
		"empty list":    {"apiVersion: v1\nkind: List\n", nil},
		"default":       {"apiVersion: v1\nkind: Pod\nmetadata: {name: a}\n", []identity.Pod{named("here", "a")}},
		"JSON":          {`{"apiVersion":"v1","kind":"Pod","metadata":{"name":"a","namespace":"b"}}`, []identity.Pod{named("b", "a")}},
		"two documents": {"apiVersion: v1\nkind: Pod\nmetadata: {name: a}\n---\napiVersion: v1\nkind: Pod\nmetadata: {name: b}\n", []identity.Pod{named("here", "a"), named("here", "b")}},
		"list":          {`{"apiVersion":"v1","kind":"List","items":[{"apiVersion":"v1","kind":"Pod","metadata":{"name":"a"}},{"apiVersion":"v1","kind":"Secret","metadata":7}]}`, []identity.Pod{named("here", "a")}},
		"pod list":      {`{"apiVersion":"v1","kind":"PodList","items":[{"metadata":{"name":"a"}}]}`, []identity.Pod{named("here", "a")}},
		"failed":        {"apiVersion: v1\nkind: Pod\nmetadata: {name: a, namespace: b}\nstatus: {phase: Failed}\n", []identity.Pod{{PodReference: identity.PodReference{Namespace: "b", Name: "a"}, ServiceAccount: "default", Phase: identity.PodFinished}}},
		"whole": {whole, []identity.Pod{{
			PodReference:   identity.PodReference{Namespace: "shop", Name: "cart-1", UID: "0b7b2f6e-5a3c-4a5e-8c9d-000000000001"},
			ServiceAccount: "cart", Phase: identity.PodRunning,
			Labels:         map[string]string{"app": "cart", "version": "2"},
			Addresses:      []netip.Addr{netip.MustParseAddr("10.64.0.1"), netip.MustParseAddr("fd00::1")},
			ContainerPorts: []uint16{8080, 9090, 15020},
		}}},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := parsePods([]byte(test.data), "here")
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(test.want, got, cmpopts.EquateComparable(netip.Addr{})); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestParsePodsRefuses(t *testing.T) {
	const pod = "apiVersion: v1\nkind: Pod\nmetadata: {name: a, namespace: b}\n"
	var wide strings.Builder
	for n := range maxFields + 1 {
		wide.WriteString("k" + strconv.Itoa(n) + ": 0\n")
	}
	for name, test := range map[string]struct{ data, want string }{
		"no YAML":        {"a: b: c", "document 1: yaml: mapping values are not allowed in this context"},
		"second":         {pod + "---\n{", "document 2: yaml: line 5: did not find expected node content"},
		"no name":        {"apiVersion: v1\nkind: Pod\n", "document 1: line 1: a pod without a name"},
		"no namespace":   {"apiVersion: v1\nkind: Pod\nmetadata: {name: a}\n", `document 1: pod "a" names no namespace: say which with --namespace`},
		"item":           {"apiVersion: v1\nkind: PodList\nitems:\n- 7\n", "document 1: line 4: item 1 is not an object"},
		"nameless item":  {"apiVersion: v1\nkind: PodList\nitems:\n- metadata: {}\n", "document 1: line 4: a pod without a name"},
		"port 0":         {pod + "spec: {containers: [{ports: [{containerPort: 0}]}]}\n", `document 1: pod "a": a container port has to be from 1 to 65535`},
		"port 65536":     {pod + "spec: {containers: [{ports: [{containerPort: 65536}]}]}\n", "document 1: yaml: unmarshal errors:\n  line 4: cannot unmarshal !!int `65536` into uint16"},
		"address":        {pod + "status: {podIPs: [{ip: 10.0.0}]}\n", `document 1: pod "a": ParseAddr("10.0.0"): IPv4 address too short`},
		"alias":          {"a: &a [1]\nb: *a\n", "document 1: line 2: an alias, which is not read here"},
		"too many":       {wide.String(), "document 1: line 1: an object of 5001 fields; the limit is 5000"},
		"field is twice": {"apiVersion: v1\nkind: Pod\nkind: Service\n", "document 1: yaml: unmarshal errors:\n  line 3: mapping key \"kind\" already defined at line 2"},
	} {
		t.Run(name, func(t *testing.T) {
			pods, err := parsePods([]byte(test.data), "")
			if err == nil || err.Error() != test.want {
				t.Errorf("parsePods() = %v, %v; want the error %q", pods, err, test.want)
			}
		})
	}
}

// FuzzParsePods: whatever is read, a pod has what the commands count on.
func FuzzParsePods(f *testing.F) {
	f.Add([]byte("apiVersion: v1\nkind: Pod\nmetadata: {name: a, labels: {b: c}}\n"))
	f.Add([]byte("apiVersion: v1\nkind: List\nitems:\n- apiVersion: v1\n  kind: Pod\n  metadata: {name: a}\n  status: {podIPs: [{ip: 10.0.0.1}]}\n"))
	f.Add([]byte(`{"apiVersion":"v1","kind":"PodList","items":[{"metadata":{"name":"a"},"spec":{"containers":[{"ports":[{"containerPort":80}]}]}}]}`))
	f.Add([]byte("# none\n---\n---\nnull\n...\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		pods, err := parsePods(data, "here")
		if err != nil && pods != nil {
			t.Errorf("pods beside the error %v", err)
		}
		for _, pod := range pods {
			if pod.Namespace == "" || pod.Name == "" || pod.ServiceAccount == "" || pod.Phase == identity.PodPhaseUnknown {
				t.Errorf("%+v is not whole", pod)
			}
			ports := pod.ContainerPorts
			if !slices.IsSorted(ports) || len(slices.Compact(slices.Clone(ports))) != len(ports) || slices.Contains(ports, 0) {
				t.Errorf("the ports %d are not in order", ports)
			}
		}
	})
}
