package policy_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"troth.dev/troth/policy"
)

func TestParse(t *testing.T) {
	cartRef := policy.Ref{Namespace: "shop", Name: "cart"}
	app := map[string]string{"app": "cart"}
	for _, test := range []struct {
		name, text string
		want       []policy.PeerAuthentication
	}{
		{"nothing", "", nil},
		{"space", " \n  ", nil},
		{"comments", "# nothing\n---\n# here\n---\n", nil},
		{"null", "null", nil},
		{"YAML", document, []policy.PeerAuthentication{{Ref: cartRef, Selector: app, Mode: policy.Strict, Ports: map[uint16]policy.Mode{8080: policy.Disable}}}},
		{"with Windows's line ends", strings.ReplaceAll(document, "\n", "\r\n"), []policy.PeerAuthentication{{Ref: cartRef, Selector: app, Mode: policy.Strict, Ports: map[uint16]policy.Mode{8080: policy.Disable}}}},
		{"JSON", spec(`{"mtls":{"mode":"STRICT"}}`), []policy.PeerAuthentication{{Ref: cartRef, Mode: policy.Strict}}},
		{"JSON with tabs and escapes", "\t{\n\t" + head + "\t\"metadata\":\t{\"name\": \"cart\",\n\t\t\"namespace\": \"shop\", \"annotations\": {\"a\\/b\": \"\\ud83d\\ude00\"}}}\n",
			[]policy.PeerAuthentication{{Ref: cartRef}}},
		{"JSON values", spec(`{}`) + "\n" + strings.ReplaceAll(spec(`{}`), "cart", "web"),
			[]policy.PeerAuthentication{{Ref: cartRef}, {Ref: policy.Ref{Namespace: "shop", Name: "web"}}}},
		{"JSON between YAML", spec(`{}`) + "\n---\n" + strings.ReplaceAll(document, "cart", "web"),
			[]policy.PeerAuthentication{{Ref: cartRef}, {Ref: policy.Ref{Namespace: "shop", Name: "web"}, Selector: map[string]string{"app": "web"}, Mode: policy.Strict, Ports: map[uint16]policy.Mode{8080: policy.Disable}}}},
		{"flow style", "{apiVersion: security.istio.io/v1, kind: PeerAuthentication, metadata: {name: cart, namespace: shop}}", []policy.PeerAuthentication{{Ref: cartRef}}},
		{"no namespace", yamlSpec("cart", "{mtls: {mode: STRICT}}"), []policy.PeerAuthentication{{Ref: policy.Ref{Namespace: "stand-in", Name: "cart"}, Mode: policy.Strict}}},
		{"empty namespace", strings.Replace(spec("{}"), `"namespace":"shop"`, `"namespace":""`, 1), []policy.PeerAuthentication{{Ref: policy.Ref{Namespace: "stand-in", Name: "cart"}}}},
		{"null namespace", strings.Replace(spec("{}"), `"namespace":"shop"`, `"namespace":null`, 1), []policy.PeerAuthentication{{Ref: policy.Ref{Namespace: "stand-in", Name: "cart"}}}},
		{"created", strings.Replace(document, "name: cart", "name: cart\n  creationTimestamp: 2026-05-01T12:00:00Z", 1) /* no string for YAML */, []policy.PeerAuthentication{{
			Ref: cartRef, Created: time.Date(2026, 5, 1, 12, 0, 0, 0, time.UTC), Selector: app, Mode: policy.Strict, Ports: map[uint16]policy.Mode{8080: policy.Disable},
		}}},
		{"other kinds", "apiVersion: v1\nkind: Service\nmetadata: {name: cart}\n---\n" + document + "---\napiVersion: example.org/v1\nkind: PeerAuthentication\nmetadata: [a list]\n" +
			"---\napiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nspec: {x: &a [*a]}\n---\nkind: PodList\napiVersion: v1\nitems: [{}]\n---\nkind: List\napiVersion: v2\nitems: 5\n",
			[]policy.PeerAuthentication{{Ref: cartRef, Selector: app, Mode: policy.Strict, Ports: map[uint16]policy.Mode{8080: policy.Disable}}}},
		{"List", "apiVersion: v1\nkind: List\nitems:\n- " + spec(`{}`) + "\n- kind: Pod\n- {apiVersion: v1, kind: List, items: [" + strings.ReplaceAll(spec(`{}`), "cart", "web") + "]}\n",
			[]policy.PeerAuthentication{{Ref: cartRef}, {Ref: policy.Ref{Namespace: "shop", Name: "web"}}}},
		{"PeerAuthenticationList", `{"apiVersion":"security.istio.io/v1","kind":"PeerAuthenticationList","metadata":{},"items":[` + spec(`{}`) + `]}`, []policy.PeerAuthentication{{Ref: cartRef}}},
		{"empty List", `{"apiVersion":"v1","kind":"List","items":[]}`, nil},
		{"List without items", `{"apiVersion":"v1","kind":"List"}`, nil},
		{"the same name elsewhere", spec(`{}`) + strings.ReplaceAll(spec(`{}`), "shop", "bank"), []policy.PeerAuthentication{{Ref: cartRef}, {Ref: policy.Ref{Namespace: "bank", Name: "cart"}}}},
		{"numbers and what YAML 1.1 has for true", yamlSpec("cart", "{selector: {matchLabels: {yes: a, 0x10: b, 1.5: c}}, portLevelMtls: {0x50: {mode: STRICT}}}"),
			[]policy.PeerAuthentication{{Ref: policy.Ref{Namespace: "stand-in", Name: "cart"}, Selector: map[string]string{"true": "a", "16": "b", "1.5": "c"}, Ports: map[uint16]policy.Mode{80: policy.Strict}}}},
		{"aliases and merges", `
apiVersion: security.istio.io/v1
kind: &kind PeerAuthentication
metadata: {name: cart}
spec:
  selector: {matchLabels: {app: cart}}
  mtls: &strict {mode: STRICT}
  portLevelMtls: {80: *strict, 81: {<<: *strict, mode: DISABLE}, 82: {<<: [{mode: PERMISSIVE}, *strict]}, 83: {<<: *strict}}
`, []policy.PeerAuthentication{{
			Ref: policy.Ref{Namespace: "stand-in", Name: "cart"}, Selector: app, Mode: policy.Strict,
			Ports: map[uint16]policy.Mode{80: policy.Strict, 81: policy.Disable, 82: policy.Permissive, 83: policy.Strict},
		}}},
		{"with problems", yamlSpec("cart", "{mtls: {mode: [strict]}}") + "---\n" + yamlSpec("web", "{selector: {matchLabels: {app: on, debug: 1}}}") + "---\n" +
			strings.Replace(yamlSpec("version", "{}"), "/v1", "/v1alpha1", 1), []policy.PeerAuthentication{
			{Ref: policy.Ref{Namespace: "stand-in", Name: "cart"}, Problems: problems("spec.mtls.mode", "must be a string, and is a list")},
			{Ref: policy.Ref{Namespace: "stand-in", Name: "web"}, Problems: problems(
				"spec.selector.matchLabels[app]", "must be a string, and is true or false", "spec.selector.matchLabels[debug]", "must be a string, and is a number")},
			{Ref: policy.Ref{Namespace: "stand-in", Name: "version"}, Problems: problems("apiVersion", `"security.istio.io/v1alpha1" is not known: v1 and v1beta1 are`)},
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			got, err := policy.Parse([]byte(test.text), "stand-in")
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(test.want, got, comparePolicies); diff != "" {
				t.Errorf("Parse() (-want +got):\n%s", diff)
			}
		})
	}
}

// What Istio's documentation of the API has for examples, from the text to the
// mode.
func TestDocumentedExamples(t *testing.T) {
	const (
		meshStrict      = "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: default, namespace: istio-system}\nspec: {mtls: {mode: STRICT}}\n"
		namespaceStrict = "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: default, namespace: shop}\nspec: {mtls: {mode: STRICT}}\n"
		meshPermissive  = "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: default, namespace: istio-system}\nspec: {mtls: {mode: PERMISSIVE}}\n"
		inheriting      = `
apiVersion: security.istio.io/v1beta1
kind: PeerAuthentication
metadata:
  name: inheriting
  namespace: shop
spec:
  selector:
    matchLabels:
      app: cart
  mtls:
    mode: UNSET
  portLevelMtls:
    8080:
      mode: DISABLE
`
	)
	for _, test := range []struct{ name, text, want string }{
		{"the mesh is STRICT", meshStrict, "*=S"},
		{"a namespace is STRICT", namespaceStrict, "*=S"},
		{"a namespace is STRICT in a PERMISSIVE mesh", meshPermissive + "---\n" + namespaceStrict, "*=S"},
		{"a workload is STRICT in a PERMISSIVE mesh", meshPermissive + "---" + strings.ReplaceAll(strings.ReplaceAll(document, "DISABLE", "UNSET"), "8080", "80"), "80=S *=S"},
		{"a workload is STRICT but for a port", document, "8080=D *=S"},
		{"a workload inherits STRICT but for a port", namespaceStrict + "---" + inheriting, "8080=D *=S"},
		{"the same from the mesh", meshStrict + "---" + inheriting, "8080=D *=S"},
		{"nothing to inherit", inheriting, "8080=D *=P"},
	} {
		policies, err := policy.Parse([]byte(test.text), "")
		if err != nil {
			t.Fatal(err)
		}
		if got := modes(policy.NewSet(root, policies...).Resolve(cart), test.want); got != test.want {
			t.Errorf("%s: %s, want %s", test.name, got, test.want)
		}
	}
}

func TestParseOrigin(t *testing.T) {
	yaml := "# two to come\n---\nkind: Pod\n---\n" + yamlSpec("a", "{}") + "---\nkind: List\napiVersion: v1\nitems:\n- " + spec("{}") + "\n-\n  " + strings.ReplaceAll(yamlSpec("b", "{}"), "\n", "\n  ")
	json := "\n{\"kind\": \"Pod\"}\n\n" + spec("{}") + "{\n \"apiVersion\": \"v1\", \"kind\": \"List\", \"items\": [\n\n" + strings.ReplaceAll(spec("{}"), "cart", "web") + "]}"
	for _, test := range []struct {
		text string
		want []string
	}{
		{yaml, []string{"document 2, line 5", "document 3, line 13", "document 3, line 15"}},
		{json, []string{"document 2, line 4", "document 3, line 7"}},
	} {
		policies, err := policy.Parse([]byte(test.text), "shop")
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, p := range policies {
			got = append(got, p.Origin())
		}
		if diff := cmp.Diff(test.want, got); diff != "" {
			t.Errorf("origins in\n%s\n(-want +got):\n%s", test.text, diff)
		}
	}
	if got := (policy.PeerAuthentication{}).Origin(); got != "" {
		t.Errorf("Origin() of a policy from nowhere = %q", got)
	}
}

func TestParseRefuses(t *testing.T) {
	laugh := "a: &a [x,x,x,x,x,x,x,x,x,x]\n"
	for i := 'b'; i <= 'j'; i++ {
		laugh += fmt.Sprintf("%c: &%c [%s]\n", i, i, strings.TrimSuffix(strings.Repeat(fmt.Sprintf("*%c,", i-1), 10), ","))
	}
	for _, test := range []struct {
		name, text, want string
	}{
		{"not YAML", "a: b: c\n", "document 1: mapping values are not allowed in this context"},
		{"not YAML, later", document + "---\na: [\n", "document 2: line 17: did not find expected node content"},
		{"broken JSON", `{"kind":"Pod"`, "document 1: line 1: did not find expected ',' or '}'"},
		{"not UTF-8", "a: b\nc: \xff\n", "line 2: not UTF-8"},
		{"a list", "kind: Pod\n---\n- a\n", "document 2, line 3: a list where an object should be"},
		{"a scalar", "text", `document 1, line 1: "text" where an object should be`},
		{"no kind", "a: b", "document 1, line 1: an object without a kind"},
		{"a kind that is a number", "kind: 5", "document 1, line 1: an object without a kind"},
		{"no version", "kind: PeerAuthentication", "document 1, line 1: a PeerAuthentication without an apiVersion"},
		{"no name", "\n" + yamlSpec("", "{}"), "document 1, line 2: metadata.name: is missing"},
		{"no metadata", "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\n", "document 1, line 1: metadata.name: is missing"},
		{"metadata that is a list", "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: []\n", "document 1, line 1: metadata: must be an object, and is a list"},
		{"a hostile name", yamlSpec(`"\e[2J"`, "{}"), `document 1, line 1: metadata.name: "\x1b[2J" is not a DNS subdomain (RFC 1123)`},
		{"a namespace that is none", strings.Replace(document, "namespace: shop", "namespace: Shop", 1), `document 1, line 2: metadata.namespace: "Shop" is not a DNS label (RFC 1123)`},
		{"the same twice", document + "---\n" + document, "document 2, line 18: the PeerAuthentication shop/cart is there already, in document 1, line 2"},
		{"the same twice by default", yamlSpec("cart", "{}") + "---\n" + strings.Replace(spec("{}"), "shop", "stand-in", 1), "document 2, line 6: the PeerAuthentication stand-in/cart is there already, in document 1, line 1"},
		{"a field twice", yamlSpec("cart", "{mtls: {mode: STRICT}, mtls: {mode: DISABLE}}"), `document 1, line 4: the field "mtls" is there twice`},
		{"a field twice in JSON", spec("{\"mtls\":{\"mode\":\"STRICT\",\n\"mode\":\"DISABLE\"}}"), `document 1, line 2: the field "mode" is there twice`},
		{"a field twice, spelled otherwise", yamlSpec("cart", "{portLevelMtls: {80: {}, 0x50: {}}}"), `document 1, line 4: the field "80" is there twice`},
		{"the kind twice", "kind: Pod\nkind: PeerAuthentication", `document 1, line 2: the field "kind" is there twice`},
		{"a key that is a list", yamlSpec("cart", "{[a]: b}"), "document 1, line 4: a list as a key"},
		{"a key that is null", yamlSpec("cart", "{~: b}"), "document 1, line 4: null as a key"},
		{"a tag", yamlSpec("cart", "{mtls: !secret x}"), `document 1, line 4: a value with the tag "!secret", which JSON has nothing for`},
		{"an integer that is none", yamlSpec("cart", "{mtls: !!int x}"), `document 1, line 4: "x" is not a number`},
		{"a boolean that is none", yamlSpec("cart", "{mtls: !!bool x}"), `document 1, line 4: "x" is not true or false`},
		{"a merge of a scalar", yamlSpec("cart", "{mtls: {<<: x}}"), `document 1, line 4: "x" where an object should be`},
		{"an unknown alias", "kind: *x", "document 1: unknown anchor 'x' referenced"},
		{"items that are no list", "apiVersion: v1\nkind: List\nitems: {}\n", "document 1, line 3: the items of a List that are not a list"},
		{"an item that is a scalar", "apiVersion: v1\nkind: List\nitems: [x]\n", `document 1, line 3: "x" where an object should be`},
		{"an item without a kind", "apiVersion: v1\nkind: List\nitems: [{}]\n", "document 1, line 3: an object without a kind"},
		{"what contains itself", yamlSpec("cart", "&spec {mtls: *spec}"), "document 1, line 4: values within values, more than 1000 deep"},
		{"a List that contains itself", "&list\napiVersion: v1\nkind: List\nitems: [*list]\n", "document 1, line 1: values within values, more than 1000 deep"},
		{"a merge of itself", yamlSpec("cart", "&spec {<<: *spec}"), "document 1, line 4: values within values, more than 1000 deep"},
		{"a billion laughs", "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: cart}\n" + laugh, "document 1, line 4: more than 1048576 values"},
		{"deep JSON", `{"kind":"Pod","x":` + strings.Repeat("[", 1001), "document 1: line 1: did not find expected node content"},
		{"deep YAML", strings.Repeat("[", 10_001), "document 1: exceeded max depth of 10000"},
		{"too many documents", strings.Repeat("---\n", 10_001), "more than 10000 documents"},
		{"too large", strings.Repeat("#", 16<<20+1), "a text of 16777217 bytes; the limit is 16777216"},
	} {
		t.Run(test.name, func(t *testing.T) {
			got, err := policy.Parse([]byte(test.text), "stand-in")
			if err == nil || err.Error() != test.want || got != nil {
				t.Errorf("Parse() = %v, %v; want the error %q", got, err, test.want)
			}
		})
	}
}

// As large as it may be.
func TestParseBounds(t *testing.T) {
	for name, text := range map[string]string{
		"documents": strings.Repeat("---\n", 10_000),
		"bytes":     `{"kind":"` + strings.Repeat("x", 16<<20-len(`{"kind":""}`)) + `"}`,
	} {
		if got, err := policy.Parse([]byte(text), "shop"); err != nil || got != nil {
			t.Errorf("Parse(the most %s) = %v, %v", name, got, err)
		}
	}
}

func yamlSpec(name, spec string) string {
	return "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: " + name + "}\nspec: " + spec + "\n"
}
