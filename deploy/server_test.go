package deploy_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	appsv1 "k8s.io/api/apps/v1"
	authenticationv1 "k8s.io/api/authentication/v1"
	certificatesv1 "k8s.io/api/certificates/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/types"

	"troth.dev/troth/api"
	trothv1 "troth.dev/troth/api/troth/v1"
	"troth.dev/troth/internal/latest"
)

// replica is one troth-server, run as its container would be: the Deployment's
// arguments, the token of its service account and the way to the API server that a pod
// is given. Only its ports and the name of its replica are others.
type replica struct {
	cmd             *exec.Cmd
	lines           *latest.Value[[]string] // all that it has written so far
	ended           chan struct{}
	address, health string
	bundle          string // the file in which it keeps the trust bundle
	key             string
}

// life is how long SVIDs live here, so that there is something to prune.
const life = 10 * time.Second

// buildServer returns the path of troth-server.
func buildServer(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "troth-server")
	build := exec.CommandContext(t.Context(), "go", "build", "-o", path, "troth.dev/troth/cmd/troth-server")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if output, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build troth-server: %v\n%s", err, output)
	}
	return path
}

// newKey returns the path of a key-encryption key.
func newKey(t *testing.T) string {
	t.Helper()
	key := make([]byte, 32)
	rand.Read(key)
	path := filepath.Join(t.TempDir(), "key")
	if err := os.WriteFile(path, key, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// serve starts a replica in a pod on a node.
func (m *manifests) serve(t *testing.T, program, key string, p *corev1.Pod) *replica {
	t.Helper()
	given := t.TempDir()
	for name, content := range map[string][]byte{
		"token":     []byte(m.kubeletToken(t, p, "")),
		"ca.crt":    m.Admin().CAData,
		"namespace": []byte(p.Namespace),
	} {
		if err := os.WriteFile(filepath.Join(given, name), content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	r := &replica{
		lines: latest.New[[]string](nil), ended: make(chan struct{}),
		bundle: filepath.Join(t.TempDir(), "bundle.pem"), key: key,
	}
	const place = "/run/secrets/kubernetes.io/serviceaccount" // /var/run is a link to /run
	args := []string{"-c", `mount -t tmpfs none /run && mkdir -p ` + place + ` && cp "$0"/* ` + place + ` && exec "$@"`, given, program}
	args = append(args, p.Spec.Containers[0].Args...)
	args = append(args, "-listen=127.0.0.1:0", "-health=127.0.0.1:0", "-replica="+p.Name, "-key-encryption-key="+key, "-bundle="+r.bundle,
		"-svid-life="+life.String(), "-keep-issuances=1s")
	r.cmd = exec.Command("sh", args...)
	at, err := url.Parse(m.Admin().Host)
	if err != nil {
		t.Fatal(err)
	}
	r.cmd.Env = append(os.Environ(), "KUBERNETES_SERVICE_HOST="+at.Hostname(), "KUBERNETES_SERVICE_PORT="+at.Port())
	// A view of the file system of its own, in which it finds what a pod finds: it takes root.
	r.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Unshareflags: syscall.CLONE_NEWNS}
	log, err := r.cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	started := make(chan error)
	go r.run(log, started)
	if err := <-started; err != nil {
		t.Fatalf("start troth-server in a mount namespace of its own: %v (the test takes root)", err)
	}
	t.Cleanup(func() {
		r.stop(t)
		if t.Failed() {
			lines, _ := r.lines.Load()
			t.Logf("the last lines of troth-server:\n%s", strings.Join(lines[max(0, len(lines)-40):], ""))
		}
	})
	return r
}

// run owns the process, on one thread: the kernel sends Pdeathsig when that ends.
func (r *replica) run(log io.Reader, started chan<- error) {
	defer close(r.ended)
	runtime.LockOSThread()
	err := r.cmd.Start()
	started <- err
	if err != nil {
		return
	}
	var lines []string
	for read := bufio.NewReader(log); ; {
		line, err := read.ReadString('\n')
		if err != nil {
			break
		}
		lines = append(lines, line)
		r.lines.Set(lines)
	}
	_ = r.cmd.Wait() // how it ended is in its ProcessState
}

// stop asks it to end and waits until it has.
func (r *replica) stop(t *testing.T) {
	t.Helper()
	select {
	case <-r.ended:
		return
	default:
	}
	if err := r.cmd.Process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		t.Error(err)
	}
	select {
	case <-r.ended:
	case <-time.After(patience):
		t.Error("troth-server does not end though it was told to")
		if err := r.cmd.Process.Kill(); err != nil {
			t.Error(err)
		}
		<-r.ended
	}
}

// says reports whether it has written a line that has all of the words.
func (r *replica) says(words ...string) bool {
	lines, _ := r.lines.Load()
	return slices.ContainsFunc(lines, func(line string) bool {
		return !slices.ContainsFunc(words, func(word string) bool { return !strings.Contains(line, word) })
	})
}

// where finds out where it listens. It returns an error if it has ended.
func (r *replica) where() error {
	lines, _ := r.lines.Load()
	for _, line := range lines {
		var l struct{ Msg, Address, Health string }
		if json.Unmarshal([]byte(line), &l) == nil && l.Msg == "serving" {
			r.address, r.health = l.Address, l.Health
			return nil
		}
	}
	select {
	case <-r.ended:
		return fmt.Errorf("troth-server has ended: %v", r.cmd.ProcessState)
	default:
		return errors.New("troth-server does not serve yet")
	}
}

// step is one thing that the server is there for.
type step struct {
	name string
	do   func(context.Context) error // until it returns nil
}

// exercise returns steps that use all that the server may do, on a fresh store. They ask
// whichever replica serves then, and leave things behind in a namespace of their own.
func (m *manifests) exercise(t *testing.T, serving func() *replica) []step {
	t.Helper()
	node := m.CreateNode(t, "work-").Name
	shop := m.CreateNamespace(t, "shop-")
	cart := m.CreateServiceAccount(t, shop, "cart")
	ours := []corev1.Volume{{Name: "svid", VolumeSource: corev1.VolumeSource{Projected: &corev1.ProjectedVolumeSource{Sources: []corev1.VolumeProjection{
		{PodCertificate: &corev1.PodCertificateProjection{SignerName: signer, KeyType: "ECDSAP256", CredentialBundlePath: "svid.pem"}},
		{ServiceAccountToken: &corev1.ServiceAccountTokenProjection{Audience: audience, Path: "token"}},
	}}}}}
	cartPod, err := m.Client().CoreV1().Pods(shop).Create(t.Context(), &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: "cart"},
		Spec:       corev1.PodSpec{ServiceAccountName: cart.Name, NodeName: node, Volumes: ours, Containers: []corev1.Container{{Name: "main", Image: "none"}}},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	cartPod = m.StartPod(t, cartPod, "10.2.0.1")
	agentPod, err := m.Client().CoreV1().Pods(nodeNamespace).Create(t.Context(),
		pod(nodeNamespace, &find[appsv1.DaemonSet](t, m, "DaemonSet", "troth-agent").Spec.Template, node), metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	agentPod = m.StartPod(t, agentPod, "10.3.0.1")
	agentToken, cartToken := m.kubeletToken(t, agentPod, audience), m.kubeletToken(t, cartPod, audience)
	operator := m.CreateServiceAccount(t, shop, "operator")
	m.grant(t, operator, rbacv1.PolicyRule{APIGroups: []string{"troth.dev"}, Resources: []string{"authorities"}, Verbs: []string{"*"}})
	answer, err := m.Client().CoreV1().ServiceAccounts(shop).CreateToken(t.Context(), operator.Name,
		&authenticationv1.TokenRequest{Spec: authenticationv1.TokenRequestSpec{Audiences: []string{audience}}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	operatorToken, csr := answer.Status.Token, newCSR(t)
	m.ApplyPolicy(t, "v1", shop, "default", "{mtls: {mode: STRICT}}")
	call := func(ctx context.Context, token string, f func(context.Context, *grpc.ClientConn) error) error {
		td := spiffeid.RequireTrustDomainFromString(trustDomain)
		r := serving()
		bundle, err := x509bundle.Load(td, r.bundle)
		if err != nil {
			return err
		}
		conn, err := api.Dial(api.Config{Address: r.address, TrustDomain: td, Bundles: bundle, Token: func() (string, error) { return token, nil }})
		if err != nil {
			return err
		}
		defer conn.Close()
		return f(ctx, conn)
	}
	kubelet := client(t, m.Node(t, node)).CertificatesV1().PodCertificateRequests(shop)
	var request *certificatesv1.PodCertificateRequest
	prepared := false
	return []step{
		{"it serves", func(context.Context) error { return serving().where() }},
		{"it is ready", func(ctx context.Context) error { return ready(ctx, serving().health) }},
		{"an agent is given its SVID", func(ctx context.Context) error {
			return call(ctx, agentToken, func(ctx context.Context, conn *grpc.ClientConn) error {
				_, err := trothv1.NewAttestationServiceClient(conn).AttestAgent(ctx, &trothv1.AttestAgentRequest{Csr: csr})
				return err
			})
		}},
		{"a workload is given its SVID", func(ctx context.Context) error {
			return call(ctx, cartToken, func(ctx context.Context, conn *grpc.ClientConn) error {
				got, err := trothv1.NewSVIDServiceClient(conn).IssueX509SVIDs(ctx, &trothv1.IssueX509SVIDsRequest{Items: []*trothv1.X509SVIDRequest{{Csr: csr}}})
				if err == nil && got.GetResults()[0].GetSvid() == nil {
					err = fmt.Errorf("refused: %v", got.GetResults()[0])
				}
				return err
			})
		}},
		{"a policy's author is told", func(ctx context.Context) error {
			policy, err := m.Policies("v1", shop).Get(ctx, "default", metav1.GetOptions{})
			if err != nil {
				return err
			}
			if conditions, _, err := unstructured.NestedSlice(policy.Object, "status", "conditions"); err != nil || len(conditions) == 0 {
				return fmt.Errorf("the policy has no status: %v", policy.Object)
			}
			return nil
		}},
		{"the trust bundle is published", func(ctx context.Context) error { return m.published(ctx, 1) }},
		{"a pod without an agent is given its certificate", func(ctx context.Context) error {
			if request == nil {
				var err error
				request, err = kubelet.Create(ctx, &certificatesv1.PodCertificateRequest{
					ObjectMeta: metav1.ObjectMeta{GenerateName: "request-"},
					Spec: certificatesv1.PodCertificateRequestSpec{
						SignerName: signer, PodName: cartPod.Name, PodUID: cartPod.UID, ServiceAccountName: cart.Name, ServiceAccountUID: cart.UID,
						NodeName: types.NodeName(node), NodeUID: m.nodeUID(t, node), StubPKCS10Request: csr,
					},
				}, metav1.CreateOptions{})
				if err != nil {
					request = nil
					return err
				}
			}
			now, err := m.Client().CertificatesV1().PodCertificateRequests(shop).Get(ctx, request.Name, metav1.GetOptions{})
			if err == nil && now.Status.CertificateChain == "" {
				err = fmt.Errorf("not yet: %v", now.Status)
			}
			return err
		}},
		{"an operator prepares an authority", func(ctx context.Context) error {
			if prepared {
				return nil
			}
			return call(ctx, operatorToken, func(ctx context.Context, conn *grpc.ClientConn) error {
				_, err := trothv1.NewAuthorityServiceClient(conn).PrepareAuthority(ctx, &trothv1.PrepareAuthorityRequest{Reason: "test"})
				prepared = err == nil
				return err
			})
		}},
		{"the new trust bundle is published", func(ctx context.Context) error { return m.published(ctx, 2) }},
	}
}

// published says whether the ClusterTrustBundle has that many authorities.
func (m *manifests) published(ctx context.Context, authorities int) error {
	b, err := m.Client().CertificatesV1().ClusterTrustBundles().Get(ctx, bundleName, metav1.GetOptions{})
	if err != nil {
		return err
	}
	if n := strings.Count(b.Spec.TrustBundle, "BEGIN CERTIFICATE"); n != authorities {
		return fmt.Errorf("%d authorities are published, want %d", n, authorities)
	}
	return nil
}

func ready(ctx context.Context, address string) error {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+address+"/readyz", http.NoBody)
	if err != nil {
		return err
	}
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		body, err := io.ReadAll(io.LimitReader(response.Body, 1<<10))
		return errors.Join(fmt.Errorf("%s: %s", response.Status, body), err)
	}
	return nil
}

// right is one verb on one kind of object, as RBAC and the audit log both say it.
type right struct{ group, resource, verb string }

func (r right) String() string { return r.verb + " " + r.resource + "." + r.group }

// granted returns the rules of the server's roles, each for one resource.
func (m *manifests) granted(t *testing.T) map[string][]rbacv1.PolicyRule {
	t.Helper()
	return map[string][]rbacv1.PolicyRule{
		"ClusterRole": split(find[rbacv1.ClusterRole](t, m, "ClusterRole", "troth-server").Rules),
		"Role":        split(find[rbacv1.Role](t, m, "Role", "troth-server").Rules),
	}
}

func split(rules []rbacv1.PolicyRule) []rbacv1.PolicyRule {
	var each []rbacv1.PolicyRule
	for _, rule := range rules {
		for _, resource := range rule.Resources {
			one := *rule.DeepCopy()
			one.Resources = []string{resource}
			each = append(each, one)
		}
	}
	return each
}

// asked returns what the server asked of the API server, and what of it was refused,
// by the audit log.
func (m *manifests) asked(t *testing.T) (used map[right]bool, refused []string) {
	t.Helper()
	content, err := os.ReadFile(m.AuditLog())
	if err != nil {
		t.Fatal(err)
	}
	used = make(map[right]bool)
	for line := range bytes.Lines(content) {
		var event struct {
			Verb, RequestURI string
			User             struct{ Username string }
			ObjectRef        *struct{ APIGroup, Resource, Subresource string }
			ResponseStatus   *struct{ Code int }
		}
		if err := json.Unmarshal(line, &event); err != nil {
			t.Fatalf("the audit log: %v\n%s", err, line)
		}
		if event.User.Username != "system:serviceaccount:"+systemNamespace+":troth-server" {
			continue
		}
		if event.ResponseStatus != nil && event.ResponseStatus.Code == http.StatusForbidden {
			refused = append(refused, event.Verb+" "+event.RequestURI)
		}
		if o := event.ObjectRef; o != nil {
			resource := o.Resource
			if o.Subresource != "" {
				resource += "/" + o.Subresource
			}
			used[right{o.APIGroup, resource, event.Verb}] = true
		}
	}
	return used, refused
}

// The server gets by with the rights that it is given, and uses each of them.
func TestServerRights(t *testing.T) {
	m := install(t)
	program, key := buildServer(t), newKey(t)
	serve := func() *replica {
		return m.serve(t, program, key, m.serverPod(t, m.CreateNode(t, "control-").Name))
	}
	current := serve()
	steps := m.exercise(t, func() *replica { return current })
	const shortLived = 4 // how many steps issue nothing that lives longer than an SVID
	for _, s := range steps[:shortLived] {
		eventually(t, s.name, s.do)
	}
	current.stop(t)
	expired := time.Now().Add(life + 2*time.Second) // with what -keep-issuances adds
	eventually(t, "all that was issued to expire", func(context.Context) error {
		if time.Now().Before(expired) {
			return errors.New("not yet")
		}
		return nil
	})
	current = serve()
	eventually(t, "the ledger to be pruned", func(context.Context) error {
		if !current.says("the ledger was pruned") {
			return errors.New("nothing is said of it")
		}
		return nil
	})
	for _, s := range steps {
		eventually(t, s.name, s.do)
	}
	current.stop(t)

	used, refused := m.asked(t)
	if len(refused) > 0 {
		t.Errorf("the API server refused the server %d times: %q", len(refused), refused)
	}
	for kind, rules := range m.granted(t) {
		for _, rule := range rules {
			for _, verb := range rule.Verbs {
				r := right{rule.APIGroups[0], rule.Resources[0], verb}
				switch {
				case r.resource == "signers":
					// Nobody requests these: the API server looks whether the server might.
					continue
				case r.verb == "list":
					// A watch brings a list by itself, from an API server that streams lists.
					r.verb = "watch"
				case r.verb == "get" && r.resource == "podcertificaterequests":
					// It looks again when a status was refused.
					continue
				case r.verb == "get" && slices.Contains([]string{"pods", "serviceaccounts", "nodes"}, r.resource):
					// Of a pod that is newer than what the watches have told, it asks. In the
					// cluster of two nodes it did, and was refused, when this was not granted.
					continue
				}
				if !used[r] {
					t.Errorf("the server's %s grants %v, and it was never used", kind, r)
				}
			}
		}
	}
}

// Without any one of its rights the server says which it lacks.
func TestEachRight(t *testing.T) {
	m := install(t)
	program := buildServer(t)
	for kind, rules := range m.granted(t) {
		for i, rule := range rules {
			t.Run(fmt.Sprintf("%s/%s %s", kind, strings.Join(rule.Verbs, ","), rule.Resources[0]), func(t *testing.T) {
				m.setRules(t, kind, slices.Delete(slices.Clone(rules), i, i+1))
				defer m.setRules(t, kind, rules)
				m.forget(t)
				r := m.serve(t, program, newKey(t), m.serverPod(t, m.CreateNode(t, "control-").Name))
				steps := m.exercise(t, func() *replica { return r })
				eventually(t, "the server to say what it lacks", func(ctx context.Context) error {
					for len(steps) > 0 {
						attempt, cancel := context.WithTimeout(ctx, 2*time.Second)
						err := steps[0].do(attempt)
						cancel()
						if complains(r, rule, err) {
							return nil
						}
						if err != nil {
							return fmt.Errorf("%s: %w", steps[0].name, err)
						}
						steps = steps[1:]
					}
					if complains(r, rule, nil) {
						return nil
					}
					return errors.New("all goes well without it")
				})
			})
		}
	}
}

// complains reports whether a right's absence shows, to who reads the server's log or to
// who called it.
func complains(r *replica, rule rbacv1.PolicyRule, err error) bool {
	resource := rule.Resources[0]
	for _, verb := range rule.Verbs {
		words := []string{"cannot " + verb + " resource", resource}
		if resource == "signers" {
			words = []string{"not permitted to", verb}
		}
		if r.says(words...) || err != nil && !slices.ContainsFunc(words, func(word string) bool { return !strings.Contains(err.Error(), word) }) {
			return true
		}
	}
	return false
}

// setRules gives the server's role other rules.
func (m *manifests) setRules(t *testing.T, kind string, rules []rbacv1.PolicyRule) {
	t.Helper()
	rbac := m.Client().RbacV1()
	ctx := context.WithoutCancel(t.Context())
	var err error
	if kind == "ClusterRole" {
		_, err = rbac.ClusterRoles().Update(ctx, &rbacv1.ClusterRole{ObjectMeta: metav1.ObjectMeta{Name: "troth-server"}, Rules: rules}, metav1.UpdateOptions{})
	} else {
		_, err = rbac.Roles(systemNamespace).Update(ctx, &rbacv1.Role{ObjectMeta: metav1.ObjectMeta{Name: "troth-server"}, Rules: rules}, metav1.UpdateOptions{})
	}
	if err != nil {
		t.Fatal(err)
	}
}

// forget deletes all that servers have written.
func (m *manifests) forget(t *testing.T) {
	t.Helper()
	ctx, every := t.Context(), metav1.ListOptions{}
	c := m.Client()
	for _, err := range []error{
		// Admission keeps the bundle from everybody, admins included.
		c.AdmissionregistrationV1().ValidatingAdmissionPolicyBindings().DeleteCollection(ctx, metav1.DeleteOptions{}, every),
		c.CoreV1().Secrets(systemNamespace).DeleteCollection(ctx, metav1.DeleteOptions{}, every),
		c.CoreV1().ConfigMaps(systemNamespace).DeleteCollection(ctx, metav1.DeleteOptions{}, every),
		c.CoordinationV1().Leases(systemNamespace).DeleteCollection(ctx, metav1.DeleteOptions{}, every),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "the trust bundle to be deleted", func(ctx context.Context) error {
		return c.CertificatesV1().ClusterTrustBundles().DeleteCollection(ctx, metav1.DeleteOptions{}, metav1.ListOptions{FieldSelector: "spec.signerName=" + signer})
	})
}
