package policy_test

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"troth.dev/troth/policy"
)

const head = `"apiVersion":"security.istio.io/v1","kind":"PeerAuthentication",`

func TestDecode(t *testing.T) {
	cartRef := policy.Ref{Namespace: "shop", Name: "cart"}
	created := time.Date(2026, 5, 1, 12, 0, 0, 0, time.UTC)
	for _, test := range []struct {
		name, object string
		want         policy.PeerAuthentication
	}{
		{"no spec", `{` + head + `"metadata":{"name":"cart","namespace":"shop"}}`, policy.PeerAuthentication{Ref: cartRef}},
		{"empty spec", spec(`{}`), policy.PeerAuthentication{Ref: cartRef}},
		{"null for spec", spec(`null`), policy.PeerAuthentication{Ref: cartRef}},
		{"empty mtls", spec(`{"mtls":{}}`), policy.PeerAuthentication{Ref: cartRef}},
		{"nulls", spec(`{"selector":null,"mtls":null,"portLevelMtls":null}`), policy.PeerAuthentication{Ref: cartRef}},
		{"more nulls", spec(`{"selector":{"matchLabels":null},"mtls":{"mode":null}}`), policy.PeerAuthentication{Ref: cartRef}},
		{"empty selector", spec(`{"selector":{}}`), policy.PeerAuthentication{Ref: cartRef}},
		{"empty labels", spec(`{"selector":{"matchLabels":{}},"mtls":{"mode":"UNSET"}}`), policy.PeerAuthentication{Ref: cartRef}},
		{"v1beta1, as stored", `{"apiVersion":"security.istio.io/v1beta1","kind":"PeerAuthentication","metadata":{"name":"cart","namespace":"shop",
			"creationTimestamp":"2026-05-01T14:00:00+02:00","uid":"1","generation":2,"managedFields":[{}]},"spec":{"mtls":{"mode":"STRICT"}},"status":{"conditions":[{}],"x":1}}`,
			policy.PeerAuthentication{Ref: cartRef, Created: created, Mode: policy.Strict}},
		{"not created yet", `{` + head + `"metadata":{"name":"cart","namespace":"shop","creationTimestamp":null}}`, policy.PeerAuthentication{Ref: cartRef}},
		{"everything", spec(`{"selector":{"matchLabels":{"app":"cart","empty":""}},"mtls":{"mode":"PERMISSIVE"},
			"portLevelMtls":{"1":{"mode":"STRICT"},"80":{},"81":{"mode":"UNSET"},"65535":{"mode":"DISABLE"},"082":{"mode":"PERMISSIVE"}}}`),
			policy.PeerAuthentication{
				Ref: cartRef, Selector: map[string]string{"app": "cart", "empty": ""}, Mode: policy.Permissive,
				Ports: map[uint16]policy.Mode{1: policy.Strict, 80: policy.Unset, 81: policy.Unset, 82: policy.Permissive, 65535: policy.Disable},
			}},
		{"the longest label", spec(`{"selector":{"matchLabels":{"app":"` + strings.Repeat("é", 63) + `"}}}`),
			policy.PeerAuthentication{Ref: cartRef, Selector: map[string]string{"app": strings.Repeat("é", 63)}}},
		{"a dotted name", `{` + head + `"metadata":{"name":"cart.v1","namespace":"shop-1"}}`, policy.PeerAuthentication{Ref: policy.Ref{Namespace: "shop-1", Name: "cart.v1"}}},
	} {
		t.Run(test.name, func(t *testing.T) {
			got := decode(t, test.object)
			if diff := cmp.Diff(test.want, got, comparePolicies); diff != "" {
				t.Errorf("Decode() (-want +got):\n%s", diff)
			}
		})
	}
}

// One row for each thing that can be wrong. selector is what is selected by
// nevertheless.
func TestDecodeProblems(t *testing.T) {
	app := map[string]string{"app": "cart"}
	const ports = `"selector":{"matchLabels":{"app":"cart"}},"portLevelMtls":`
	many := make([]string, 4097)
	for i := range many {
		many[i] = fmt.Sprintf(`"l%d":""`, i)
	}
	for _, test := range []struct {
		name, object string
		selector     map[string]string
		want         []policy.Problem
	}{
		{"ports without selector", spec(`{"portLevelMtls":{"80":{}}}`), nil, problems("spec.portLevelMtls", "needs a selector with labels")},
		{"ports with empty selector", spec(`{"selector":{},"portLevelMtls":{"80":{}}}`), nil, problems("spec.portLevelMtls", "needs a selector with labels")},
		{"ports with empty labels", spec(`{"selector":{"matchLabels":{}},"portLevelMtls":{"80":{}}}`), nil, problems("spec.portLevelMtls", "needs a selector with labels")},
		{"no ports", spec(`{` + ports + `{}}`), app, problems("spec.portLevelMtls", "has no port")},
		{"port 0", spec(`{` + ports + `{"0":{}}}`), app, problems("spec.portLevelMtls[0]", "is not a port from 1 to 65535")},
		{"port 65536", spec(`{` + ports + `{"65536":{}}}`), app, problems("spec.portLevelMtls[65536]", "is not a port from 1 to 65535")},
		{"negative port", spec(`{` + ports + `{"-1":{}}}`), app, problems("spec.portLevelMtls[-1]", "is not a port from 1 to 65535")},
		{"named port", spec(`{` + ports + `{"http":{}}}`), app, problems("spec.portLevelMtls[http]", "is not a port from 1 to 65535")},
		{"hostile port", spec(`{` + ports + `{"\u001b[2J":{}}}`), app, problems(`spec.portLevelMtls["\x1b[2J"]`, "is not a port from 1 to 65535")},
		{"empty port", spec(`{` + ports + `{"":{}}}`), app, problems(`spec.portLevelMtls[""]`, "is not a port from 1 to 65535")},
		{"port twice", spec(`{` + ports + `{"80":{},"080":{}}}`), app, problems("spec.portLevelMtls[080]", "is there twice")},
		{"port that is a string", spec(`{` + ports + `{"80":"STRICT"}}`), app, problems("spec.portLevelMtls[80]", "must be an object, and is a string")},
		{"port that is null", spec(`{` + ports + `{"80":null}}`), app, problems("spec.portLevelMtls[80]", "must be an object, and is null")},
		{"mode of a port", spec(`{` + ports + `{"80":{"mode":"OFF"}}}`), app, problems("spec.portLevelMtls[80].mode", `"OFF" is not UNSET, DISABLE, PERMISSIVE or STRICT`)},
		{"field of a port", spec(`{` + ports + `{"80":{"Mode":"STRICT"}}}`), app, problems("spec.portLevelMtls[80].Mode", "is not a field of a PeerAuthentication")},
		{"ports that are a list", spec(`{` + ports + `[80]}`), app, problems("spec.portLevelMtls", "must be an object, and is a list")},

		{"mode", spec(`{"mtls":{"mode":"strict"}}`), nil, problems("spec.mtls.mode", `"strict" is not UNSET, DISABLE, PERMISSIVE or STRICT`)},
		{"empty mode", spec(`{"mtls":{"mode":""}}`), nil, problems("spec.mtls.mode", `"" is not UNSET, DISABLE, PERMISSIVE or STRICT`)},
		{"mode that is a number", spec(`{"mtls":{"mode":3}}`), nil, problems("spec.mtls.mode", "must be a string, and is a number")},
		{"mode that is a boolean", spec(`{"mtls":{"mode":true}}`), nil, problems("spec.mtls.mode", "must be a string, and is true or false")},
		{"mtls that is a string", spec(`{"mtls":"STRICT"}`), nil, problems("spec.mtls", "must be an object, and is a string")},
		{"a long mode", spec(`{"mtls":{"mode":"` + strings.Repeat("S", 1000) + `"}}`), nil,
			problems("spec.mtls.mode", `"`+strings.Repeat("S", 64)+`" is not UNSET, DISABLE, PERMISSIVE or STRICT`)},

		{"empty key", spec(`{"selector":{"matchLabels":{"":"cart"}}}`), nil, problems(`spec.selector.matchLabels[""]`, "has an empty key")},
		{"* in a key", spec(`{"selector":{"matchLabels":{"app*":"cart"}}}`), nil, problems("spec.selector.matchLabels[app*]", "has a *, which is no wildcard here")},
		{"* in a value", spec(`{"selector":{"matchLabels":{"app":"*"}}}`), nil, problems("spec.selector.matchLabels[app]", "has a *, which is no wildcard here")},
		{"long value", spec(`{"selector":{"matchLabels":{"app":"` + strings.Repeat("é", 64) + `"}}}`), nil, problems("spec.selector.matchLabels[app]", "is longer than 63 characters")},
		{"value that is a number", spec(`{"selector":{"matchLabels":{"app":1}}}`), nil, problems("spec.selector.matchLabels[app]", "must be a string, and is a number")},
		{"value that is null", spec(`{"selector":{"matchLabels":{"app":null}}}`), nil, problems("spec.selector.matchLabels[app]", "must be a string, and is null")},
		{"too many labels", spec(`{"selector":{"matchLabels":{` + strings.Join(many, ",") + `}}}`), nil, problems("spec.selector.matchLabels", "has 4097 labels; the limit is 4096")},
		{"selector that is a string", spec(`{"selector":"app=cart"}`), nil, problems("spec.selector", "must be an object, and is a string")},
		{"labels that are a list", spec(`{"selector":{"matchLabels":["app"]}}`), nil, problems("spec.selector.matchLabels", "must be an object, and is a list")},
		// What is readable still selects.
		{"field of a selector", spec(`{"selector":{"matchLabels":{"app":"cart"},"matchExpressions":[]}}`), app, problems("spec.selector.matchExpressions", "is not a field of a PeerAuthentication")},
		{"a misspelled field", spec(`{"selector":{"matchLabel":{"app":"cart"}}}`), nil, problems("spec.selector.matchLabel", "is not a field of a PeerAuthentication")},
		{"ports beside a wrong label", spec(`{"selector":{"matchLabels":{"app":"*"}},"portLevelMtls":{"80":{}}}`), nil, problems("spec.selector.matchLabels[app]", "has a *, which is no wildcard here")},

		{"field of spec", spec(`{"mtl":{"mode":"STRICT"}}`), nil, problems("spec.mtl", "is not a field of a PeerAuthentication")},
		{"field of mtls", spec(`{"mtls":{"modes":"STRICT"}}`), nil, problems("spec.mtls.modes", "is not a field of a PeerAuthentication")},
		{"field of the object", `{` + head + `"metadata":{"name":"cart","namespace":"shop"},"spce":{}}`, nil, problems("spce", "is not a field of a PeerAuthentication")},
		{"spec that is a list", spec(`[]`), nil, problems("spec", "must be an object, and is a list")},

		{"version", `{"apiVersion":"security.istio.io/v2","kind":"PeerAuthentication","metadata":{"name":"cart","namespace":"shop"}}`, nil,
			problems("apiVersion", `"security.istio.io/v2" is not known: v1 and v1beta1 are`)},
		{"no version", `{"apiVersion":"security.istio.io","kind":"PeerAuthentication","metadata":{"name":"cart","namespace":"shop"}}`, nil,
			problems("apiVersion", `"security.istio.io" is not known: v1 and v1beta1 are`)},
		{"kind", `{"apiVersion":"v1","kind":"Pod","metadata":{"name":"cart","namespace":"shop"}}`, nil,
			problems("kind", `"Pod" of "v1" is not PeerAuthentication of "security.istio.io"`)},
		{"created", `{` + head + `"metadata":{"name":"cart","namespace":"shop","creationTimestamp":"yesterday"}}`, nil,
			problems("metadata.creationTimestamp", `"yesterday" is not a time (RFC 3339)`)},
		{"no name", `{` + head + `"metadata":{"namespace":"shop"}}`, nil, problems("metadata.name", "is missing")},
		{"name", `{` + head + `"metadata":{"name":"Cart","namespace":"shop"}}`, nil, problems("metadata.name", `"Cart" is not a DNS subdomain (RFC 1123)`)},
		{"namespace", `{` + head + `"metadata":{"name":"cart","namespace":"shop.eu"}}`, nil, problems("metadata.namespace", `"shop.eu" is not a DNS label (RFC 1123)`)},
		{"name that is a number", `{` + head + `"metadata":{"name":1,"namespace":"shop"}}`, nil,
			problems("metadata.name", "must be a string, and is a number", "metadata.name", "is missing")},
		{"nothing", `{}`, nil, problems("kind", `"" of "" is not PeerAuthentication of "security.istio.io"`,
			"metadata.name", "is missing", "metadata.namespace", "is missing")},
		{"several", spec(`{"mtls":{"mode":"x"},` + ports + `{"10":{"mode":"y"},"9":{"mode":"z"},"x":{}},"a":1}`), app, problems(
			"spec.a", "is not a field of a PeerAuthentication",
			"spec.mtls.mode", `"x" is not UNSET, DISABLE, PERMISSIVE or STRICT`,
			"spec.portLevelMtls[9].mode", `"z" is not UNSET, DISABLE, PERMISSIVE or STRICT`,
			"spec.portLevelMtls[x]", "is not a port from 1 to 65535",
			"spec.portLevelMtls[10].mode", `"y" is not UNSET, DISABLE, PERMISSIVE or STRICT`)},
	} {
		t.Run(test.name, func(t *testing.T) {
			got := decode(t, test.object)
			if diff := cmp.Diff(test.want, got.Problems); diff != "" {
				t.Errorf("Problems (-want +got):\n%s", diff)
			}
			if diff := cmp.Diff(test.selector, got.Selector); diff != "" {
				t.Errorf("Selector (-want +got):\n%s", diff)
			}
			checkStrict(t, got)
		})
	}
}

func TestDecodeStopsCountingProblems(t *testing.T) {
	ports := make(map[string]any)
	for i := range 100 {
		ports[fmt.Sprint(i)] = "STRICT"
	}
	got := policy.Decode(object("shop", "STRICT", map[string]any{"matchLabels": map[string]any{"app": "cart"}}, ports))
	if len(got.Problems) != 33 {
		t.Fatalf("%d problems, want 32 and one that says that there are more", len(got.Problems))
	}
	if want := (policy.Problem{Field: "spec", Message: "has more problems"}); got.Problems[32] != want {
		t.Errorf("the last problem is %v, want %v", got.Problems[32], want)
	}
}

// Whatever p's mode and ports say, it is STRICT for what it selects, if nothing
// comes before it.
func checkStrict(t *testing.T, p policy.PeerAuthentication) {
	t.Helper()
	if p.Namespace == root && len(p.Selector) > 0 {
		return
	}
	set := policy.NewSet(root, p)
	effective := set.Resolve(policy.Workload{Namespace: p.Namespace, Labels: p.Selector})
	if want := (policy.Effective{Mode: policy.Strict, DecidedBy: p.Ref}); !effective.Equal(&want) {
		t.Errorf("%v with the problems %v: %+v is in force, want STRICT", p, p.Problems, effective)
	}
}

func spec(s string) string {
	return `{` + head + `"metadata":{"name":"cart","namespace":"shop"},"spec":` + s + `}`
}

func decode(t testing.TB, text string) policy.PeerAuthentication {
	t.Helper()
	var object map[string]any
	if err := json.Unmarshal([]byte(text), &object); err != nil {
		t.Fatal(err)
	}
	return policy.Decode(object)
}

func problems(fieldsAndMessages ...string) []policy.Problem {
	var problems []policy.Problem
	for i := 0; i < len(fieldsAndMessages); i += 2 {
		problems = append(problems, policy.Problem{Field: fieldsAndMessages[i], Message: fieldsAndMessages[i+1]})
	}
	return problems
}
