package deploy_test

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/util/yaml"

	"troth.dev/troth/deploy"
	"troth.dev/troth/policy"
	"troth.dev/troth/test/apiserver"
)

const definition = "peerauthentications.security.istio.io"

// inputs is what an author may write below metadata. wrong is the field that our
// own reader has to complain about, and none is for what is accepted. The API
// server refuses exactly what has something wrong, unless lenient says why it
// does not.
var inputs = []struct {
	name, input, wrong, lenient string
}{
	{name: "nothing"},
	{name: "an empty spec", input: "spec: {}"},
	{name: "an empty mtls", input: "spec: {mtls: {}}"},
	{name: "an empty mtls and empty labels", input: "spec: {selector: {matchLabels: {}}, mtls: {}}"},
	{name: "an empty selector", input: "spec: {selector: {}, mtls: {mode: STRICT}}"},
	{name: "UNSET", input: "spec: {mtls: {mode: UNSET}}"},
	{name: "DISABLE", input: "spec: {mtls: {mode: DISABLE}}"},
	{name: "PERMISSIVE", input: "spec: {mtls: {mode: PERMISSIVE}}"},
	{name: "STRICT", input: "spec: {mtls: {mode: STRICT}}"},
	{name: "a selector", input: "spec: {selector: {matchLabels: {app: cart, tier: a}}}"},
	{name: "a label without a value", input: `spec: {selector: {matchLabels: {app: ""}}}`},
	{name: "a value of 63 characters", input: "spec: {selector: {matchLabels: {app: " + strings.Repeat("a", 63) + "}}}"},
	{name: "a value of 63 characters that are more bytes", input: "spec: {selector: {matchLabels: {app: " + strings.Repeat("é", 63) + "}}}"},
	{name: "a key that no label could have", input: `spec: {selector: {matchLabels: {"not/a/label key": a}}}`},
	{name: "4096 labels", input: "spec: {selector: {matchLabels: " + labels(4096) + "}}"},
	{name: "ports", input: "spec: {selector: {matchLabels: {app: cart}}, mtls: {mode: STRICT}, portLevelMtls: {8080: {mode: DISABLE}, 1: {mode: UNSET}, 65535: {}}}"},
	{name: "a port with a zero before it", input: "spec: {selector: {matchLabels: {app: cart}}, portLevelMtls: {'08080': {mode: STRICT}}}"},
	{name: "a status", input: "spec: {}\nstatus: {conditions: [{type: Ready, status: 'True'}], theirs: 1}"},

	{name: "null for the spec", input: "spec: null"},
	{name: "null for mtls", input: "spec: {mtls: null}"},
	{name: "null for a mode", input: "spec: {mtls: {mode: null}}"},
	{name: "null for the selector", input: "spec: {selector: null}"},
	{name: "null for the labels", input: "spec: {selector: {matchLabels: null}}"},
	{name: "null for the ports", input: "spec: {selector: {matchLabels: {app: cart}}, portLevelMtls: null}"},

	{name: "a port and no selector", input: "spec: {portLevelMtls: {8080: {mode: STRICT}}}", wrong: "spec.portLevelMtls"},
	{name: "a port and an empty selector", input: "spec: {selector: {}, portLevelMtls: {8080: {mode: STRICT}}}", wrong: "spec.portLevelMtls"},
	{name: "a port and empty labels", input: "spec: {selector: {matchLabels: {}}, portLevelMtls: {8080: {mode: STRICT}}}", wrong: "spec.portLevelMtls"},
	{name: "no ports", input: "spec: {selector: {matchLabels: {app: cart}}, portLevelMtls: {}}", wrong: "spec.portLevelMtls"},
	{name: "port 0", input: "spec: {selector: {matchLabels: {app: cart}}, portLevelMtls: {0: {mode: STRICT}}}", wrong: "spec.portLevelMtls[0]"},
	{name: "port 65536", input: "spec: {selector: {matchLabels: {app: cart}}, portLevelMtls: {65536: {mode: STRICT}}}", wrong: "spec.portLevelMtls[65536]"},
	{name: "port -1", input: "spec: {selector: {matchLabels: {app: cart}}, portLevelMtls: {'-1': {mode: STRICT}}}", wrong: "spec.portLevelMtls[-1]"},
	{name: "a port beyond 64 bits", input: "spec: {selector: {matchLabels: {app: cart}}, portLevelMtls: {'99999999999999999999': {}}}", wrong: "spec.portLevelMtls[99999999999999999999]"},
	{name: "a port's name", input: "spec: {selector: {matchLabels: {app: cart}}, portLevelMtls: {http: {mode: STRICT}}}", wrong: "spec.portLevelMtls[http]"},
	{name: "a port in hexadecimal", input: "spec: {selector: {matchLabels: {app: cart}}, portLevelMtls: {'0x50': {mode: STRICT}}}", wrong: "spec.portLevelMtls[0x50]"},
	{name: "a port with a space", input: "spec: {selector: {matchLabels: {app: cart}}, portLevelMtls: {' 80': {mode: STRICT}}}", wrong: `spec.portLevelMtls[" 80"]`},
	{name: "a port and its name", input: "spec: {selector: {matchLabels: {app: cart}}, portLevelMtls: {8080: {}, http: {}}}", wrong: "spec.portLevelMtls[http]"},
	{name: "null for the only port", input: "spec: {selector: {matchLabels: {app: cart}}, portLevelMtls: {8080: null}}", wrong: "spec.portLevelMtls[8080]"},
	{name: "a port's mode for an object", input: "spec: {selector: {matchLabels: {app: cart}}, portLevelMtls: {8080: STRICT}}", wrong: "spec.portLevelMtls[8080]"},
	{name: "a port's unknown mode", input: "spec: {selector: {matchLabels: {app: cart}}, portLevelMtls: {8080: {mode: OFF}}}", wrong: "spec.portLevelMtls[8080].mode"},
	{name: "a port's unknown field", input: "spec: {selector: {matchLabels: {app: cart}}, portLevelMtls: {8080: {mod: STRICT}}}", wrong: "spec.portLevelMtls[8080].mod"},
	{name: "an unknown mode", input: "spec: {mtls: {mode: ENFORCE}}", wrong: "spec.mtls.mode"},
	{name: "a mode in lower case", input: "spec: {mtls: {mode: strict}}", wrong: "spec.mtls.mode"},
	{name: "an empty mode", input: `spec: {mtls: {mode: ""}}`, wrong: "spec.mtls.mode"},
	{name: "a mode that is a number", input: "spec: {mtls: {mode: 3}}", wrong: "spec.mtls.mode"},
	{name: "a mode that is a boolean", input: "spec: {mtls: {mode: true}}", wrong: "spec.mtls.mode"},
	{name: "mtls is a mode", input: "spec: {mtls: STRICT}", wrong: "spec.mtls"},
	{name: "mtls is a list", input: "spec: {mtls: [{mode: STRICT}]}", wrong: "spec.mtls"},
	{name: "spec is a list", input: "spec: []", wrong: "spec"},
	{name: "spec is a text", input: "spec: STRICT", wrong: "spec"},
	{name: "a selector that is a text", input: "spec: {selector: app=cart}", wrong: "spec.selector"},
	{name: "labels that are a list", input: "spec: {selector: {matchLabels: [app]}}", wrong: "spec.selector.matchLabels"},
	{name: "a value that is a number", input: "spec: {selector: {matchLabels: {app: 1}}}", wrong: "spec.selector.matchLabels[app]"},
	{name: "a value that is a boolean", input: "spec: {selector: {matchLabels: {app: true}}}", wrong: "spec.selector.matchLabels[app]"},
	{name: "an empty key", input: `spec: {selector: {matchLabels: {"": cart}}}`, wrong: `spec.selector.matchLabels[""]`},
	{name: "a * in a key", input: `spec: {selector: {matchLabels: {"app*": cart}}}`, wrong: "spec.selector.matchLabels[app*]"},
	{name: "a * in a value", input: `spec: {selector: {matchLabels: {app: "*"}}}`, wrong: "spec.selector.matchLabels[app]"},
	{name: "a value of 64 characters", input: "spec: {selector: {matchLabels: {app: " + strings.Repeat("a", 64) + "}}}", wrong: "spec.selector.matchLabels[app]"},
	{name: "4097 labels", input: "spec: {selector: {matchLabels: " + labels(4097) + "}}", wrong: "spec.selector.matchLabels"},
	{name: "an unknown field", input: "specs: {}", wrong: "specs"},
	{name: "an unknown field of the spec", input: "spec: {mode: STRICT}", wrong: "spec.mode"},
	{name: "an unknown field of mtls", input: "spec: {mtls: {mod: STRICT}}", wrong: "spec.mtls.mod"},
	{name: "an unknown field of the selector", input: "spec: {selector: {matchExpressions: []}}", wrong: "spec.selector.matchExpressions"},

	{
		name: "a port with a sign", input: "spec: {selector: {matchLabels: {app: cart}}, portLevelMtls: {'+80': {mode: STRICT}}}",
		wrong: `spec.portLevelMtls["+80"]`, lenient: "to CEL it is 80, and nobody writes a port so",
	},
	{
		name: "a port twice", input: "spec: {selector: {matchLabels: {app: cart}}, portLevelMtls: {80: {mode: STRICT}, '080': {mode: DISABLE}}}",
		wrong: "spec.portLevelMtls[080]", lenient: "the keys differ, and nobody could say which of them counts",
	},
	{
		name: "null for a value", input: "spec: {selector: {matchLabels: {app: null}}}",
		wrong: "spec.selector.matchLabels[app]", lenient: "it drops the label, and the policy is for the whole namespace",
	},
	{
		name: "null for one of two ports", input: "spec: {selector: {matchLabels: {app: cart}}, portLevelMtls: {8080: null, 9090: {mode: STRICT}}}",
		wrong: "spec.portLevelMtls[8080]", lenient: "it drops the port",
	},
}

// Ours and Istio's accept the same, in both versions, and what they refuse is what
// package policy finds wrong.
func TestPeerAuthentication(t *testing.T) {
	cluster := apiserver.Start(t)
	namespace := cluster.CreateNamespace(t, "shop")
	for _, whose := range []struct {
		name       string
		definition []byte
	}{
		{"ours", ours(t)},
		{"Istio's", istios(t)},
	} {
		t.Run(whose.name, func(t *testing.T) {
			name := cluster.ApplyCRD(t, whose.definition)
			t.Cleanup(func() { cluster.DeleteCRD(t, name) })
			for _, version := range []string{"v1", "v1beta1"} {
				policies := cluster.Dynamic().Resource(schema.GroupVersionResource{
					Group: "security.istio.io", Version: version, Resource: "peerauthentications",
				}).Namespace(namespace)
				for _, input := range inputs {
					t.Run(version+"/"+input.name, func(t *testing.T) {
						object := decode(t, input.input, version, namespace)
						read := policy.Decode(object.Object)
						var wrong string
						if len(read.Problems) > 0 {
							wrong = read.Problems[0].Field
						}
						if wrong != input.wrong {
							t.Errorf("Decode() has the problems %q, want one with %q", read.Problems, input.wrong)
						}
						stored, err := policies.Create(t.Context(), object, metav1.CreateOptions{
							DryRun: []string{metav1.DryRunAll}, FieldValidation: metav1.FieldValidationStrict,
						})
						refused := apierrors.IsInvalid(err) || apierrors.IsBadRequest(err)
						switch {
						case err != nil && !refused:
							t.Fatal(err)
						case refused != (input.wrong != "" && input.lenient == ""):
							t.Fatalf("the API server says %v, and Decode finds %q wrong", err, read.Problems)
						case err == nil && input.wrong == "":
							got := policy.Decode(stored.Object)
							if diff := cmp.Diff(read, got, cmpopts.IgnoreUnexported(read), cmpopts.IgnoreFields(read, "Created")); diff != "" {
								t.Errorf("what is stored has another meaning (-written +stored):\n%s", diff)
							}
						}
					})
				}
			}
		})
	}
}

// What programs see of both definitions is the same: all but the words for people,
// and how a rule is written.
func TestSchemaIsIstios(t *testing.T) {
	var specs []any
	for _, definition := range [][]byte{ours(t), istios(t)} {
		object := make(map[string]any)
		if err := yaml.Unmarshal(definition, &object); err != nil {
			t.Fatal(err)
		}
		specs = append(specs, withoutWords(object["spec"]))
	}
	if diff := cmp.Diff(specs[1], specs[0]); diff != "" {
		t.Errorf("the definitions differ (-Istio's +ours):\n%s", diff)
	}
}

func withoutWords(value any) any {
	switch value := value.(type) {
	case map[string]any:
		for key, child := range value {
			if _, ok := child.(string); ok && key == "description" {
				delete(value, key)
			} else if rules, ok := child.([]any); ok && key == "x-kubernetes-validations" {
				value[key] = len(rules)
			} else {
				value[key] = withoutWords(child)
			}
		}
	case []any:
		for i, child := range value {
			value[i] = withoutWords(child)
		}
	}
	return value
}

func ours(t *testing.T) []byte {
	t.Helper()
	content, err := deploy.CRDs.ReadFile("crds/" + definition + ".yaml")
	if err != nil {
		t.Fatal(err)
	}
	return content
}

// istios returns Istio's definition, out of the module that testdata/istio pins.
func istios(t *testing.T) []byte {
	t.Helper()
	download := exec.CommandContext(t.Context(), "go", "mod", "download", "-json", "istio.io/api")
	download.Dir = filepath.Join("testdata", "istio")
	download.Env = append(os.Environ(), "GOWORK=off", "GOFLAGS=")
	output, err := download.Output()
	if err != nil {
		t.Fatalf("download Istio's API: %v\n%s", err, output)
	}
	var module struct{ Dir string }
	if err := json.Unmarshal(output, &module); err != nil {
		t.Fatal(err)
	}
	definitions, err := os.ReadFile(filepath.Join(module.Dir, "kubernetes", "customresourcedefinitions.gen.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	for reader := yaml.NewYAMLReader(bufio.NewReader(bytes.NewReader(definitions))); ; {
		document, err := reader.Read()
		if errors.Is(err, io.EOF) {
			t.Fatalf("Istio's API has no definition of %s", definition)
		} else if err != nil {
			t.Fatal(err)
		}
		if bytes.Contains(document, []byte("\n  name: "+definition+"\n")) {
			return document
		}
	}
}

// decode makes an object of what an author wrote.
func decode(t *testing.T, input, version, namespace string) *unstructured.Unstructured {
	t.Helper()
	object := make(map[string]any)
	if err := yaml.Unmarshal([]byte(input), &object); err != nil {
		t.Fatal(err)
	}
	object["apiVersion"], object["kind"] = "security.istio.io/"+version, "PeerAuthentication"
	object["metadata"] = map[string]any{"name": "default", "namespace": namespace}
	return &unstructured.Unstructured{Object: object}
}

// labels writes that many labels.
func labels(n int) string {
	written := make([]string, n)
	for i := range written {
		written[i] = fmt.Sprintf("l%d: a", i)
	}
	return "{" + strings.Join(written, ", ") + "}"
}
