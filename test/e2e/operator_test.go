package e2e_test

import (
	"bytes"
	"encoding/hex"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"troth.dev/troth/test/apiserver"
)

// newOperator returns the token of an account that may do all with authorities.
func (p *plane) newOperator(t *testing.T) string {
	t.Helper()
	name := cluster.CreateServiceAccount(t, p.shop, "operator").Name
	rbac := cluster.Client().RbacV1()
	_, err := rbac.ClusterRoles().Create(t.Context(), &rbacv1.ClusterRole{
		ObjectMeta: metav1.ObjectMeta{Name: p.shop},
		Rules:      []rbacv1.PolicyRule{{APIGroups: []string{"troth.dev"}, Resources: []string{"authorities"}, Verbs: []string{"*"}}},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	_, err = rbac.ClusterRoleBindings().Create(t.Context(), &rbacv1.ClusterRoleBinding{
		ObjectMeta: metav1.ObjectMeta{Name: p.shop},
		RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: p.shop},
		Subjects:   []rbacv1.Subject{{Kind: rbacv1.ServiceAccountKind, Namespace: p.shop, Name: name}},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	pod := cluster.CreatePod(t, apiserver.Pod{Namespace: p.shop, Name: "operator-", ServiceAccount: name, Node: cluster.CreateNode(t, "operators-").Name})
	return cluster.Token(t, pod, trustDomain.IDString(), 100*time.Minute)
}

// troth runs the command line as an operator does, and returns what it printed and
// how it ended.
func (p *plane) troth(t *testing.T, token string, args ...string) (output string, code int) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(file, []byte(token), 0o600); err != nil {
		t.Fatal(err)
	}
	args = append(args, "--server="+p.address, "--trust-domain="+trustDomain.Name(), "--bundle="+p.bundle, "--token="+file)
	var all bytes.Buffer
	cmd := exec.CommandContext(t.Context(), filepath.Join(programs, "troth"), args...)
	cmd.Stdout, cmd.Stderr = &all, &all
	err := cmd.Run()
	if ended, ok := errors.AsType[*exec.ExitError](err); ok {
		return all.String(), ended.ExitCode()
	}
	if err != nil {
		t.Fatal(err)
	}
	return all.String(), 0
}

// An operator rotates the root of a cluster from the command line, with the rights
// that RBAC gives, and who has none may not even look.
func TestOperatorRotates(t *testing.T) {
	t.Parallel()
	agents := cluster.CreateServiceAccount(t, system, "no-agents").Name // none is expected, and none can be cut off
	p := newPlane(t, 10*time.Second, "-agents="+system+"/"+agents)
	nobody := cluster.Token(t, p.pod(t, &node{name: cluster.CreateNode(t, "laptops-").Name}, p.account(t, "nobody")), trustDomain.IDString(), 10*time.Minute)
	if output, code := p.troth(t, nobody, "authority", "list"); code != 1 || !strings.Contains(output, "OPERATOR_FORBIDDEN") {
		t.Errorf("without rights: exit code %d and\n%s", code, output)
	}

	operator := p.newOperator(t)
	before := p.trusted(t)
	output, code := p.troth(t, operator, "authority", "revoke", authorityOf(t, p))
	if code != 3 || !strings.Contains(output, "WRONG_STATE") {
		t.Errorf("revoke of the active authority: exit code %d and\n%s", code, output)
	}
	if output, code = p.troth(t, operator, "authority", "rotate", "--reason", "a new year"); code != 0 {
		t.Fatalf("rotate: exit code %d and\n%s", code, output)
	}
	eventually(t, "the published bundle to be another", func() bool {
		after := p.trusted(t).X509Authorities()
		return len(after) == 1 && !before.HasX509Authority(after[0])
	})
	if output, code = p.troth(t, operator, "authority", "history"); code != 0 || strings.Count(output, "a new year") < 3 {
		t.Errorf("history: exit code %d and\n%s", code, output)
	}
}

// authorityOf is the ID of the plane's only authority.
func authorityOf(t *testing.T, p *plane) string {
	t.Helper()
	trusted := p.trusted(t).X509Authorities()
	if len(trusted) != 1 {
		t.Fatalf("%d authorities are trusted, want one", len(trusted))
	}
	return hex.EncodeToString(trusted[0].SubjectKeyId)
}
