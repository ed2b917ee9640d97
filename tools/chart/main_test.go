package main

import (
	"encoding/json"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"
	"helm.sh/helm/v4/pkg/action"
	"helm.sh/helm/v4/pkg/chart/common"
	"helm.sh/helm/v4/pkg/chart/v2/loader"
)

const deployFolder = "../../deploy"

// What is checked in is what the chart makes now.
func TestCurrent(t *testing.T) {
	if err := run(t.Context(), []string{"-check"}); err != nil {
		t.Error(err)
	}
}

// A change of the chart is seen.
func TestNotCurrent(t *testing.T) {
	deploy, docs := t.TempDir(), t.TempDir()
	if err := os.CopyFS(deploy, os.DirFS(deployFolder)); err != nil {
		t.Fatal(err)
	}
	if err := os.CopyFS(docs, os.DirFS("../../docs")); err != nil {
		t.Fatal(err)
	}
	args := []string{"-deploy", deploy, "-docs", docs}
	check := append([]string{"-check"}, args...)
	if err := run(t.Context(), check); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ name, old, new, want string }{
		{"chart/values.yaml", "replicas: 3", "replicas: 4", "troth.yaml"},
		{"crds/peerauthentications.security.istio.io.yaml", "kind: CustomResourceDefinition", "kind: CustomResourceDefinition # ours", "chart/files"},
		{"chart/templates/cleanup.yaml", "terminationGracePeriodSeconds: 1", "terminationGracePeriodSeconds: 2", "cleanup.yaml"},
		{"chart/values.schema.json", "How many. All of them serve and sign.", "How many.", "install.md"},
		{"manifests/troth.yaml", "kind: Deployment", "kind: Daemonset", "troth.yaml"},
	} {
		path := filepath.Join(deploy, c.name)
		before, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		after := strings.Replace(string(before), c.old, c.new, 1)
		if after == string(before) {
			t.Fatalf("%s has no %q", c.name, c.old)
		}
		if err := os.WriteFile(path, []byte(after), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := run(t.Context(), check); err == nil || !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), "make generate") {
			t.Errorf("after a change of %s: %v, want an error that names %s", c.name, err, c.want)
		}
		if err := run(t.Context(), args); err != nil {
			t.Errorf("after a change of %s: %v", c.name, err)
		}
		if err := run(t.Context(), check); err != nil {
			t.Errorf("after it was rendered anew: %v", err)
		}
	}
}

// everything switches on what is off, and off what is on.
const everything = `
trustDomain: example.org
serverNamespace: control
image: {server: registry.example.org/troth/server, agent: registry.example.org/troth/agent, tag: "1.0", pullSecrets: [{name: pull}]}
server:
  postgresSecret: database
  upstreamSecret: upstream
  userNamespace: true
  tokenReview: true
  policyStatus: false
  nodeSelector: {pool: system}
  tolerations: [{key: node-role.kubernetes.io/control-plane, operator: Exists, effect: NoSchedule}]
  extraArgs: [-agent-return=10s]
keyEncryptionKey: {create: false, secret: key, previousSecrets: [key-2025, key-2024]}
signer: {enabled: false}
trustBundle: {source: ConfigMap, namespaces: [shop]}
mint: {enabled: true, trustDomain: ci.example.org, rules: "rules: []"}
capture: {enabled: true, egress: refuse, uncapturedNamespaces: [monitoring]}
agent: {kubeletAddress: "10.0.0.1,fd00::1", seLinuxOptions: {type: spc_t}, nodeSelector: {pool: work}, maxUnavailable: 1, extraArgs: [-admin=]}
peerAuthentication: {install: never}
networkPolicy: {metricsFrom: [{namespaceSelector: {matchLabels: {name: monitoring}}}]}
podMonitor: {enabled: true, labels: {release: prometheus}}
`

// helm lint has nothing to say, not even a warning.
func TestLint(t *testing.T) {
	for name, values := range map[string]string{"as it is": "", "with everything": everything} {
		lint := action.NewLint()
		lint.Strict, lint.Namespace = true, "troth-system"
		lint.KubeVersion = &common.KubeVersion{Version: "v1.37.0", Major: "1", Minor: "37"}
		result := lint.Run([]string{filepath.Join(deployFolder, "chart")}, parse(t, values))
		for _, err := range result.Errors {
			t.Errorf("%s: %v", name, err)
		}
		if result.TotalChartsLinted != 1 {
			t.Errorf("%s: %d charts were looked at", name, result.TotalChartsLinted)
		}
	}
}

// What is wrong is refused, and said where.
func TestWrongValues(t *testing.T) {
	for _, c := range []struct{ values, want string }{
		{"trustdomain: example.org", "additional properties 'trustdomain' not allowed"},
		{"server: {replica: 3}", "at '/server': additional properties 'replica' not allowed"},
		{"server: {resources: {limits: {memory: 1Gi}, limit: {}}}", "at '/server/resources': additional properties 'limit' not allowed"},
		{"trustDomain: ''", "at '/trustDomain': '' does not match pattern"},
		{"trustDomain: Example.org", "at '/trustDomain': 'Example.org' does not match pattern"},
		{"trustDomain: spiffe://example.org", "at '/trustDomain': 'spiffe://example.org' does not match pattern"},
		{"trustDomain: \"x' in []\"", `at '/trustDomain': 'x\' in []' does not match pattern`},
		{"trustDomain: " + strings.Repeat("a", 201), "at '/trustDomain': maxLength: got 201, want 200"},
		{"nodeNamespace: ''", "at '/nodeNamespace': '' does not match pattern"},
		{"nodeNamespace: Node", "at '/nodeNamespace': 'Node' does not match pattern"},
		{"image: {server: ''}", "at '/image/server': minLength: got 0, want 1"},
		{"image: {agent: 'troth-agent latest'}", "at '/image/agent': 'troth-agent latest' does not match pattern"},
		{"image: {tag: 1.0}", "at '/image/tag': got number, want string"},
		{"image: {tag: 'a b'}", "at '/image/tag': 'a b' does not match pattern"},
		{"image: {pullPolicy: Sometimes}", "at '/image/pullPolicy': value must be one of 'Always', 'IfNotPresent', 'Never'"},
		{"image: {pullSecrets: [pull]}", "at '/image/pullSecrets/0': got string, want object"},
		{"server: {replicas: 0}", "at '/server/replicas': minimum: got 0, want 1"},
		{"server: {replicas: 100}", "at '/server/replicas': maximum: got 100, want 15"},
		{"server: {replicas: two}", "at '/server/replicas': got string, want integer"},
		{"server: {svidLife: 1d}", "at '/server/svidLife': '1d' does not match pattern"},
		{"server: {svidLife: 3600}", "at '/server/svidLife': got number, want string"},
		{"server: {resources: {limits: {memory: lots}}}", "at '/server/resources/limits/memory': 'lots' does not match pattern"},
		{"server: {extraArgs: [svid-life]}", "at '/server/extraArgs/0': 'svid-life' does not match pattern"},
		{"server: {tokenReview: 'yes'}", "at '/server/tokenReview': got string, want boolean"},
		{"server: {tolerations: [{effect: Never}]}", "at '/server/tolerations/0/effect': value must be one of"},
		{"keyEncryptionKey: {secret: ''}", "at '/keyEncryptionKey/secret': '' does not match pattern"},
		{"keyEncryptionKey: {previousSecrets: [../x]}", "at '/keyEncryptionKey/previousSecrets/0': '../x' does not match pattern"},
		{"trustBundle: {source: Secret}", "at '/trustBundle/source': value must be one of 'ClusterTrustBundle', 'ConfigMap'"},
		{"mint: {enabled: true}", "mint.trustDomain is required with mint.enabled"},
		{"mint: {enabled: true, trustDomain: ci.example.org}", "mint.rules is required with mint.enabled"},
		{"capture: {egress: deny}", "at '/capture/egress': value must be one of 'allow', 'refuse'"},
		{"capture: {uncapturedNamespaces: ['a,b']}", "at '/capture/uncapturedNamespaces/0': 'a,b' does not match pattern"},
		{"cni: {binDir: opt/cni/bin}", "at '/cni/binDir': 'opt/cni/bin' does not match pattern"},
		{"cni: {confDir: /}", "at '/cni/confDir': '/' does not match pattern"},
		{"agent: {kubeletAddress: kubelet}", "at '/agent/kubeletAddress': 'kubelet' does not match pattern"},
		{"agent: {drain: 5m}", "at '/agent/drain': '5m' does not match pattern"},
		{"agent: {maxUnavailable: 0}", "at '/agent/maxUnavailable': minimum: got 0, want 1"},
		{"agent: {maxUnavailable: 0%}", "at '/agent/maxUnavailable': '0%' does not match pattern"},
		{"peerAuthentication: {install: maybe}", "at '/peerAuthentication/install': value must be one of 'missing', 'always', 'never'"},
		{"podMonitor: {interval: often}", "at '/podMonitor/interval': 'often' does not match pattern"},
	} {
		chart, err := loader.LoadDir(filepath.Join(deployFolder, "chart"))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := render(t.Context(), chart, parse(t, c.values)); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want an error with %q", c.values, err, c.want)
		}
	}
}

// Each switch does what it says, and nothing of it is there without it.
func TestSwitches(t *testing.T) {
	for _, c := range []struct {
		values        string
		with, without []string // in what is rendered
	}{
		{
			values:  "",
			with:    []string{"kind: Secret", "immutable: true", "-signer=troth.dev/svid", "-trust-bundle=clustertrustbundle\n", "clusterTrustBundle:", "- -capture", "- SYS_ADMIN", "kind: CustomResourceDefinition", "-exclude-namespaces=kube-system,troth-system,troth-node\n"},
			without: []string{"PodMonitor", "mint", "hostUsers", "-postgres", "-upstream", "privileged: true", "troth-bundle\n"},
		},
		{
			values: everything,
			with: []string{
				"namespace: control", "registry.example.org/troth/server:1.0", "registry.example.org/troth/agent:1.0", "- name: pull",
				"-postgres=/etc/troth-postgres/url", "-upstream-root=/etc/troth-upstream/ca.crt", "hostUsers: false", "-token-review=true",
				"-previous-key-encryption-key=/etc/troth-previous/key-2024/key", "secretName: key\n", "-agent-return=10s", "pool: work",
				"-trust-bundle=configmap=troth-node/troth-bundle,configmap=shop/troth-bundle\n", "-mint-trust-domain=ci.example.org",
				"-kubelet-address=10.0.0.1,fd00::1", "type: spc_t", "-egress=refuse", "kube-system,control,troth-node,monitoring\n", "kind: PodMonitor", "maxUnavailable: 1\n",
				"request.namespace in ['troth-node', 'shop']", "name: monitoring",
			},
			without: []string{"kind: Secret", "-kubernetes-store", "resourceNames: [troth-authorities]", "-signer", "podcertificaterequests", "clusterTrustBundle:", "clustertrustbundles]\n  resourceNames", "peerauthentications/status", "kind: CustomResourceDefinition"},
		},
		{
			values:  "capture: {enabled: false}",
			with:    []string{"hostPID: true", "path: /run/troth,"},
			without: []string{"- -capture", "SYS_ADMIN", "NET_ADMIN", "troth-cni", "keeper", "Unconfined", "/run/troth-agent, type", "-kubelet-address"},
		},
		{
			values: `mint: {enabled: true, trustDomain: ci.example.org, rules: "rules: []"}`,
			with:   []string{"-mint-rules=/etc/troth-mint/rules.yaml", "rules.yaml: \"rules: []\"", "checksum/mint-rules", "resourceNames: [troth-test-authorities]"},
		},
		{values: "admission: {enabled: false}", without: []string{"ValidatingAdmissionPolicy"}},
		{values: "networkPolicy: {enabled: false}", without: []string{"NetworkPolicy"}},
		{values: "peerAuthentication: {install: always}", with: []string{"kind: CustomResourceDefinition"}},
		{values: "agent: {kubeletAddress: ''}", without: []string{"-kubelet-address"}},
		{values: "cleanup: {enabled: false}", without: []string{"troth-cleanup"}},
	} {
		chart, err := loader.LoadDir(filepath.Join(deployFolder, "chart"))
		if err != nil {
			t.Fatal(err)
		}
		release, err := render(t.Context(), chart, parse(t, c.values))
		if err != nil {
			t.Errorf("%s: %v", c.values, err)
			continue
		}
		all := release.Manifest
		for _, h := range release.Hooks {
			all += h.Manifest
		}
		for _, text := range c.with {
			if !strings.Contains(all, text) {
				t.Errorf("with %q: there is no %q", c.values, text)
			}
		}
		for _, text := range c.without {
			if strings.Contains(all, text) {
				t.Errorf("with %q: there is %q", c.values, text)
			}
		}
	}
}

// Every value is described, and has a default; and every object refuses what it does
// not know.
func TestSchemaIsWhole(t *testing.T) {
	content, err := os.ReadFile(filepath.Join(deployFolder, "chart", "values.schema.json"))
	if err != nil {
		t.Fatal(err)
	}
	var schema map[string]any
	if err := json.Unmarshal(content, &schema); err != nil {
		t.Fatal(err)
	}
	defaults, err := os.ReadFile(filepath.Join(deployFolder, "chart", "values.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	var compare func(path string, schema, values map[string]any)
	compare = func(path string, schema, values map[string]any) {
		if schema["additionalProperties"] != false {
			t.Errorf("%s takes what it does not know", path)
		}
		properties, _ := schema["properties"].(map[string]any)
		for _, name := range slices.Sorted(maps.Keys(properties)) {
			property, _ := properties[name].(map[string]any)
			if text, _ := property["description"].(string); text == "" {
				t.Errorf("%s.%s has no description", path, name)
			}
			value, ok := values[name]
			if !ok && name != "global" {
				t.Errorf("%s.%s has no default", path, name)
			}
			if inner, ok := value.(map[string]any); ok && property["properties"] != nil {
				if _, bag := property["properties"].(map[string]any)["user"]; bag {
					continue // seLinuxOptions: none is the default
				}
				compare(path+"."+name, property, inner)
			}
		}
		for name := range values {
			if properties[name] == nil {
				t.Errorf("%s.%s has a default, and is not in the schema", path, name)
			}
		}
	}
	compare("values", schema, parse(t, string(defaults)))
}

func parse(t *testing.T, values string) map[string]any {
	t.Helper()
	parsed := make(map[string]any)
	if err := yaml.Unmarshal([]byte(values), &parsed); err != nil {
		t.Fatal(err)
	}
	return parsed
}
