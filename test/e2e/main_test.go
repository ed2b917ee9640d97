// Package e2e_test has the whole path of an identity under test: troth-server and
// troth-agent as the processes that they are in a cluster, a real API server,
// and workloads that are processes of their own, in cgroups such as the kubelet
// makes, with SPIFFE's own client on the agent's socket.
//
// Start with [newPlane], a control plane of one test's own, [plane.newNode], a
// node of it, and [startWorkload]. It needs root, for cgroups.
package e2e_test

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"troth.dev/troth/test/apiserver"
)

// What all tests of the package share. TestMain sets it, and nothing changes it
// afterwards. A test that stops the cluster's API server starts it again.
var (
	cluster  *apiserver.Cluster
	programs string // the folder with our programs
)

// trustDomain is that of every test's control plane. Each has authorities of its
// own.
var trustDomain = spiffeid.RequireTrustDomainFromString("e2e.test")

// patience is when a test gives up. Nothing that is waited for takes half of it.
const patience = 45 * time.Second

func TestMain(m *testing.M) {
	if os.Getenv(workloadVariable) != "" {
		if err := runWorkload(os.Stdin, os.Stdout); err != nil {
			fmt.Fprintln(os.Stderr, "workload:", err)
			os.Exit(1)
		}
		return
	}
	code, err := run(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, "e2e:", err)
		code = 1
	}
	os.Exit(code)
}

func run(m *testing.M) (code int, err error) {
	ctx := context.Background()
	dir, err := os.MkdirTemp("", "troth-e2e-")
	if err != nil {
		return 1, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	programs = filepath.Join(dir, "bin")
	if err := errors.Join(build(ctx, programs), buildForeign(ctx, programs)); err != nil {
		return 1, err
	}
	cluster, err = apiserver.Run(ctx, dir)
	if err != nil {
		return 1, fmt.Errorf("start a Kubernetes control plane: %w", err)
	}
	defer cluster.Close()
	if err := install(ctx, cluster.Client()); err != nil {
		return 1, fmt.Errorf("install Troth's accounts: %w", err)
	}
	// The tests wait for most of their time, on few processors as on many.
	flag.Parse()
	if err := flag.Set("test.parallel", "8"); err != nil {
		return 1, err
	}
	code = m.Run()
	if code != 0 {
		fmt.Fprintln(os.Stderr, cluster.Logs())
	}
	return code, nil
}

// build builds the programs as a release has them: without cgo.
func build(ctx context.Context, dir string) error {
	cmd := exec.CommandContext(ctx, "go", "build", "-o", dir+string(filepath.Separator),
		"troth.dev/troth/cmd/troth-server", "troth.dev/troth/cmd/troth-agent", "troth.dev/troth/cmd/troth-cni", "troth.dev/troth/cmd/troth")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if output, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("go build: %w\n%s", err, output)
	}
	return nil
}

// Troth's namespace and service accounts, as its flags have them by default.
const (
	system        = "troth-system"
	serverAccount = "troth-server"
	agentAccount  = "troth-agent"
)

// install gives the server all the rights that it needs, and no others: what it
// asks for beyond them fails here as it would in a cluster. Agents have none.
func install(ctx context.Context, client kubernetes.Interface) error {
	created := metav1.CreateOptions{}
	_, err := client.CoreV1().Namespaces().Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: system}}, created)
	if err != nil {
		return err
	}
	for _, name := range []string{serverAccount, agentAccount} {
		account := &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: name}}
		if _, err := client.CoreV1().ServiceAccounts(system).Create(ctx, account, created); err != nil {
			return err
		}
	}
	role := metav1.ObjectMeta{Name: serverAccount}
	_, err = client.RbacV1().ClusterRoles().Create(ctx, &rbacv1.ClusterRole{
		ObjectMeta: role,
		// As docs/cluster.md has them.
		Rules: []rbacv1.PolicyRule{
			{APIGroups: []string{"authentication.k8s.io"}, Resources: []string{"tokenreviews"}, Verbs: []string{"create"}},
			{APIGroups: []string{"authorization.k8s.io"}, Resources: []string{"subjectaccessreviews"}, Verbs: []string{"create"}},
			{
				APIGroups: []string{""},
				Resources: []string{"pods", "serviceaccounts", "nodes"},
				Verbs:     []string{"get", "list", "watch"},
			},
			{APIGroups: []string{""}, Resources: []string{"services"}, Verbs: []string{"list", "watch"}},
			{APIGroups: []string{"discovery.k8s.io"}, Resources: []string{"endpointslices"}, Verbs: []string{"list", "watch"}},
			{
				APIGroups:     []string{"apiextensions.k8s.io"},
				Resources:     []string{"customresourcedefinitions"},
				ResourceNames: []string{"peerauthentications.security.istio.io"},
				Verbs:         []string{"list", "watch"},
			},
			{
				APIGroups: []string{"security.istio.io"},
				Resources: []string{"peerauthentications"},
				Verbs:     []string{"list", "watch"},
			},
			{
				APIGroups: []string{"security.istio.io"},
				Resources: []string{"peerauthentications/status"},
				Verbs:     []string{"patch"},
			},
		},
	}, created)
	if err != nil {
		return err
	}
	_, err = client.RbacV1().ClusterRoleBindings().Create(ctx, &rbacv1.ClusterRoleBinding{
		ObjectMeta: role,
		RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: role.Name},
		Subjects:   []rbacv1.Subject{{Kind: rbacv1.ServiceAccountKind, Namespace: system, Name: serverAccount}},
	}, created)
	return err
}
