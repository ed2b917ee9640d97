package identity_test

import (
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"troth.dev/troth/identity"
)

var td = spiffeid.RequireTrustDomainFromString("example.org")

const uid = "0b5c1a2e-6f0a-4a51-9f3c-2f6f7d0c9a11"

func TestServiceAccountID(t *testing.T) {
	for _, test := range []struct {
		account identity.ServiceAccount
		want    string // empty for refused
	}{
		{identity.ServiceAccount{Namespace: "shop", Name: "web"}, "spiffe://example.org/ns/shop/sa/web"},
		{identity.ServiceAccount{Namespace: "shop", Name: "web.v2"}, "spiffe://example.org/ns/shop/sa/web.v2"},
		{identity.ServiceAccount{Namespace: strings.Repeat("n", 63), Name: strings.Repeat("a", 253)},
			"spiffe://example.org/ns/" + strings.Repeat("n", 63) + "/sa/" + strings.Repeat("a", 253)},
		{identity.ServiceAccount{}, ""},
		{identity.ServiceAccount{Namespace: "shop"}, ""},
		{identity.ServiceAccount{Namespace: strings.Repeat("n", 64), Name: "web"}, ""},
		{identity.ServiceAccount{Namespace: "shop", Name: strings.Repeat("a", 254)}, ""},
		{identity.ServiceAccount{Namespace: "shop.web", Name: "web"}, ""}, // a namespace is a label
		{identity.ServiceAccount{Namespace: "shop", Name: ".."}, ""},
		{identity.ServiceAccount{Namespace: "shop", Name: "a/b"}, ""},
		{identity.ServiceAccount{Namespace: "Shop", Name: "web"}, ""},
		{identity.ServiceAccount{Namespace: "shop", Name: "web\n"}, ""},
		{identity.ServiceAccount{Namespace: "shop", Name: "%2e"}, ""},
	} {
		id, err := test.account.ID(td)
		switch {
		case test.want == "" && err == nil:
			t.Errorf("%+v is spelled %q, want an error", test.account, id)
		case test.want != "" && (err != nil || id.String() != test.want):
			t.Errorf("%+v is spelled %q (%v), want %q", test.account, id, err, test.want)
		}
	}
}

func TestAgentID(t *testing.T) {
	agent := identity.Agent{Node: identity.Node{Name: "node-1.example", UID: uid}, PodName: "agent-x", PodUID: uid}
	id, err := agent.ID(td)
	if err != nil {
		t.Fatal(err)
	}
	if want := "spiffe://example.org/troth/agent/node-1.example/" + uid + "/agent-x/" + uid; id.String() != want {
		t.Errorf("ID() = %q, want %q", id, want)
	}
	for name, change := range map[string]func(*identity.Agent){
		"no node UID": func(a *identity.Agent) { a.Node.UID = "" },
		"no pod UID":  func(a *identity.Agent) { a.PodUID = "" },
		"no node":     func(a *identity.Agent) { a.Node.Name = "" },
		"no pod":      func(a *identity.Agent) { a.PodName = "" },
		"slash":       func(a *identity.Agent) { a.PodName = "a/b" },
		"dots":        func(a *identity.Agent) { a.Node.UID = ".." },
	} {
		bad := agent
		change(&bad)
		if id, err := bad.ID(td); err == nil {
			t.Errorf("%s: ID() = %q, want an error", name, id)
		}
	}
}

func TestServerID(t *testing.T) {
	id, err := identity.ServerID(td)
	if err != nil || id.String() != "spiffe://example.org/troth/server" {
		t.Errorf("ServerID() = %q, %v", id, err)
	}
	if _, err := identity.ServerID(spiffeid.TrustDomain{}); err == nil {
		t.Error("ServerID(no trust domain) succeeds")
	}
	if _, err := identity.ParseAgent(id); err == nil {
		t.Error("the server's ID is an agent's")
	}
}

// A pod has an identity while it is pending or running and its grace, if its
// deletion was asked for, has not ended.
func TestLive(t *testing.T) {
	now := time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)
	for _, test := range []struct {
		pod  identity.Pod
		want error
	}{
		{identity.Pod{}, identity.ErrPodFinished},
		{identity.Pod{Phase: identity.PodPending}, nil},
		{identity.Pod{Phase: identity.PodRunning}, nil},
		{identity.Pod{Phase: identity.PodFinished}, identity.ErrPodFinished},
		{identity.Pod{Phase: identity.PodPhase(9)}, identity.ErrPodFinished},
		{identity.Pod{Phase: identity.PodRunning, DeletedAt: now.Add(time.Second)}, nil},
		{identity.Pod{Phase: identity.PodRunning, DeletedAt: now}, identity.ErrPodDeleted},
		{identity.Pod{Phase: identity.PodFinished, DeletedAt: now.Add(-time.Second)}, identity.ErrPodDeleted},
	} {
		if got := test.pod.Live(now); got != test.want { //nolint:errorlint // the very value
			t.Errorf("%+v: Live() = %v, want %v", test.pod, got, test.want)
		}
	}
}

func TestCallerInContext(t *testing.T) {
	if got := identity.FromContext(t.Context()); got.Kind != identity.Anonymous {
		t.Errorf("the caller of nobody is %v", got.Kind)
	}
	ctx := identity.NewContext(t.Context(), identity.Caller{Kind: identity.AgentCaller})
	if got := identity.FromContext(ctx); got.Kind != identity.AgentCaller {
		t.Errorf("FromContext() = %v", got.Kind)
	}
}

// Whatever is spelled is read back as the same, and whatever is read is spelled
// the same again: no two accounts or agents share an ID, and no ID is both.
func FuzzIDs(f *testing.F) {
	f.Add("spiffe://example.org/ns/shop/sa/web")
	f.Add("spiffe://example.org/troth/agent/node-1/" + uid + "/agent/" + uid)
	f.Add("spiffe://example.org/ns/a/sa/b/")
	f.Add("spiffe://example.org/ns/../sa/b")
	f.Fuzz(func(t *testing.T, text string) {
		id, err := spiffeid.FromString(text)
		if err != nil {
			return
		}
		account, accountErr := identity.ParseServiceAccount(id)
		agent, agentErr := identity.ParseAgent(id)
		if accountErr == nil && agentErr == nil {
			t.Fatalf("%q is a service account's and an agent's", id)
		}
		if accountErr == nil {
			if again, err := account.ID(id.TrustDomain()); err != nil || again != id {
				t.Fatalf("%q is read as %v, which is spelled %q (%v)", id, account, again, err)
			}
		}
		if agentErr == nil {
			if again, err := agent.ID(id.TrustDomain()); err != nil || again != id {
				t.Fatalf("%q is read as %+v, which is spelled %q (%v)", id, agent, again, err)
			}
		}
	})
}
