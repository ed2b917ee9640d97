package policy_test

import (
	"encoding/json"
	"fmt"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"

	"troth.dev/troth/policy"
)

// FuzzParse: whatever is returned has a name that is its own, is STRICT if
// anything is wrong with it, and comes back the same when it is written down.
func FuzzParse(f *testing.F) {
	f.Add([]byte(document))
	f.Fuzz(func(t *testing.T, data []byte) {
		policies, err := policy.Parse(data, "stand-in")
		if err != nil {
			if policies != nil {
				t.Fatalf("Parse() = %v and %v", policies, err)
			}
			if len(err.Error()) > 1000 || !utf8.ValidString(err.Error()) {
				t.Fatalf("Parse() = %q: too much of what was given", err)
			}
			return
		}
		seen := make(map[policy.Ref]bool)
		var valid []policy.PeerAuthentication
		var written []byte
		for _, p := range policies {
			if seen[p.Ref] || p.Namespace == "" || p.Name == "" || p.Origin() == "" {
				t.Fatalf("%q in %q is nobody, or somebody else", p.Ref, p.Origin())
			}
			seen[p.Ref] = true
			checkPolicy(t, p)
			if len(p.Problems) == 0 {
				valid = append(valid, p)
				written = append(written, write(t, p)...)
			}
		}
		again, err := policy.Parse(written, "another")
		if diff := cmp.Diff(valid, again, comparePolicies); diff != "" || err != nil {
			t.Fatalf("%s\nread again: %v (-first +second):\n%s", written, err, diff)
		}
	})
}

// FuzzDecode: the same for objects as they come from an API server.
func FuzzDecode(f *testing.F) {
	f.Add([]byte(spec(`{"selector":{"matchLabels":{"app":"cart"}},"portLevelMtls":{"80":{"mode":"DISABLE"}}}`)))
	f.Fuzz(func(t *testing.T, data []byte) {
		var object map[string]any
		if json.Unmarshal(data, &object) != nil {
			return
		}
		p := policy.Decode(object)
		checkPolicy(t, p)
		if len(p.Problems) > 0 {
			return
		}
		var written map[string]any
		if err := json.Unmarshal(write(t, p), &written); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(p, policy.Decode(written), comparePolicies); diff != "" {
			t.Fatalf("decoded again (-first +second):\n%s", diff)
		}
	})
}

// checkPolicy holds a policy that was read to what is promised of it.
func checkPolicy(t *testing.T, p policy.PeerAuthentication) {
	t.Helper()
	if len(p.Problems) > 33 {
		t.Fatalf("%d problems", len(p.Problems))
	}
	for _, problem := range p.Problems {
		if s := problem.String(); len(s) > 1000 || !utf8.ValidString(s) {
			t.Fatalf("the problem %q is too much of what was given", s)
		}
	}
	if len(p.Problems) > 0 {
		checkStrict(t, p)
		return
	}
	if p.Mode > policy.Strict || len(p.Selector) == 0 && p.Ports != nil || p.Ports != nil && len(p.Ports) == 0 {
		t.Fatalf("%+v is valid", p)
	}
	for port, mode := range p.Ports {
		if port == 0 || mode > policy.Strict {
			t.Fatalf("%+v is valid", p)
		}
	}
	w := policy.Workload{Namespace: p.Namespace, Labels: p.Selector}
	effective := policy.NewSet(root, p).Resolve(w)
	for _, port := range []uint16{80, 8080, 12345} {
		mode, by := effective.At(port)
		wantMode, wantBy := oracle(root, []policy.PeerAuthentication{p}, w, port)
		if mode != wantMode || by != wantBy {
			t.Fatalf("%+v at %d: %v by %q, want %v by %q", p, port, mode, by, wantMode, wantBy)
		}
	}
}

// write is what an API server would send of a policy.
func write(t *testing.T, p policy.PeerAuthentication) []byte {
	t.Helper()
	metadata := map[string]any{"name": p.Name, "namespace": p.Namespace}
	if !p.Created.IsZero() {
		metadata["creationTimestamp"] = p.Created.Format(time.RFC3339Nano)
	}
	spec := map[string]any{"selector": map[string]any{"matchLabels": p.Selector}, "mtls": map[string]any{"mode": p.Mode}}
	if p.Ports != nil {
		ports := make(map[string]any)
		for port, mode := range p.Ports {
			ports[fmt.Sprint(port)] = map[string]any{"mode": mode}
		}
		spec["portLevelMtls"] = ports
	}
	text, err := json.Marshal(map[string]any{
		"apiVersion": "security.istio.io/v1beta1", "kind": "PeerAuthentication", "metadata": metadata, "spec": spec,
	})
	if err != nil {
		t.Fatal(err)
	}
	return append(text, '\n')
}
