package podcert_test

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	certificatesv1 "k8s.io/api/certificates/v1"
	coordinationv1 "k8s.io/api/coordination/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"troth.dev/troth/kube"
	"troth.dev/troth/kube/podcert"
	"troth.dev/troth/storage"
	"troth.dev/troth/test/apiserver"
)

// counters reads what a signer counts.
type counters struct{ registry *prometheus.Registry }

func registry(c podcert.Config) counters {
	return counters{c.Metrics.(*prometheus.Registry)} //nolint:forcetypeassert // signerConfig made it
}

// counter returns the value of a counter or a gauge, of that reason if there is one.
func (c counters) counter(t testing.TB, name, reason string) float64 {
	t.Helper()
	families, err := c.registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, family := range families {
		if family.GetName() != name {
			continue
		}
		for _, m := range family.GetMetric() {
			if reason == "" || m.GetLabel()[0].GetValue() == reason {
				return m.GetCounter().GetValue() + m.GetGauge().GetValue()
			}
		}
	}
	return 0
}

// troubled is a ledger that can be away, and counts how often it is written to.
type troubled struct {
	storage.Ledger
	away    atomic.Bool
	records atomic.Int32
}

func (l *troubled) Record(ctx context.Context, issuances ...storage.Issuance) error {
	if l.away.Load() {
		return errors.New("the ledger is away")
	}
	l.records.Add(1)
	return l.Ledger.Record(ctx, issuances...)
}

func (l *troubled) count(t testing.TB) int {
	t.Helper()
	all, err := l.Query(t.Context(), storage.Query{})
	if err != nil {
		t.Fatal(err)
	}
	return len(all)
}

func issued(t testing.TB, requests ...*certificatesv1.PodCertificateRequest) {
	t.Helper()
	for _, r := range requests {
		if _, condition := outcome(t, r); condition.Type != certificatesv1.PodCertificateRequestConditionTypeIssued {
			t.Fatalf("%s: %s, %s: %s", r.Name, condition.Type, condition.Reason, condition.Message)
		}
	}
}

// Without a store nothing is signed and nothing is given up.
func TestStoreIsAway(t *testing.T) {
	w := newWorld(t)
	config := authorityConfig(t)
	ledger := &troubled{Ledger: config.Ledger}
	config.Ledger = ledger
	signer := w.signerConfig(t, openIssuer(t, config))
	ledger.away.Store(true)
	background(t, newSigner(t, signer).Run)
	created := create(t, w.kubelet, w.request(t, w.pod(t, w.signer)))
	eventually(t, "three tries", func() bool {
		return registry(signer).counter(t, "troth_pod_certificates_retries_total", string(podcert.NotIssued)) >= 3
	})
	if now := look(t, created); len(now.Status.Conditions) > 0 {
		t.Fatalf("became %v", now.Status.Conditions)
	}
	ledger.away.Store(false)
	issued(t, created)
}

// The API server goes away and comes back, and the lease is lost meanwhile.
func TestAPIServerIsAway(t *testing.T) {
	w := newWorld(t)
	signer := w.signerConfig(t, openIssuer(t, authorityConfig(t)))
	log := new(lines)
	signer.Log = slog.New(slog.NewTextHandler(log, nil))
	background(t, newSigner(t, signer).Run)
	pod := w.pod(t, w.signer)
	issued(t, create(t, w.kubelet, w.request(t, pod)))
	cluster.StopAPIServer(t)
	eventually(t, "the lease is lost", func() bool { return log.count("signing no more pod certificates") == 1 })
	cluster.StartAPIServer(t)
	issued(t, create(t, w.kubelet, w.request(t, pod)))
}

// All pods of a node at once, as when its kubelet was restarted: recorded in batches.
func TestBurst(t *testing.T) {
	const pods = 110
	w := newWorld(t)
	config := authorityConfig(t)
	ledger := &troubled{Ledger: config.Ledger}
	config.Ledger = ledger
	signer := w.signerConfig(t, openIssuer(t, config))
	pod := w.pod(t, w.signer)
	requests := make([]*certificatesv1.PodCertificateRequest, pods)
	for n := range requests {
		requests[n] = create(t, w.kubelet, w.request(t, pod))
	}
	began := time.Now()
	background(t, newSigner(t, signer).Run)
	issued(t, requests...)
	t.Logf("%d certificates in %v, the lease included, with %d writes to the ledger", pods, time.Since(began), ledger.records.Load())
	if n := ledger.records.Load(); n > pods/4 {
		t.Errorf("%d writes to the ledger for %d certificates", n, pods)
	}
	if n := ledger.count(t); n != pods {
		t.Errorf("the ledger lists %d certificates, want %d", n, pods)
	}
	eventually(t, "that nothing is pending", func() bool {
		return registry(signer).counter(t, "troth_pod_certificates_pending", "") == 0
	})
}

// Of two replicas one signs, and when it ends the other goes on.
func TestReplicas(t *testing.T) {
	w := newWorld(t)
	config := authorityConfig(t)
	ledger := &troubled{Ledger: config.Ledger}
	config.Ledger = ledger
	one, two := w.signerConfig(t, openIssuer(t, config)), w.signerConfig(t, openIssuer(t, config))
	two.Replica = "two"
	stopOne := background(t, newSigner(t, one).Run)
	eventually(t, "the first has the lease", func() bool { return w.holder(t) == "one" })
	background(t, newSigner(t, two).Run)

	pod := w.pod(t, w.signer)
	ask := func(n int) {
		t.Helper()
		requests := make([]*certificatesv1.PodCertificateRequest, n)
		for n := range requests {
			requests[n] = create(t, w.kubelet, w.request(t, pod))
		}
		issued(t, requests...)
	}
	ask(20)
	if n := ledger.count(t); n != 20 {
		t.Errorf("%d certificates for 20 requests", n)
	}
	began := time.Now()
	stopOne()
	ask(20)
	t.Logf("the second has taken over and signed after %v", time.Since(began))
	if n := ledger.count(t); n != 40 {
		t.Errorf("%d certificates for 40 requests", n)
	}
	if one, two := registry(one).counter(t, "troth_pod_certificates_issued_total", ""), registry(two).counter(t, "troth_pod_certificates_issued_total", ""); one != 20 || two != 20 {
		t.Errorf("the first has signed %v and the second %v, want 20 each", one, two)
	}
}

func (w *world) holder(t testing.TB) string {
	t.Helper()
	leases, err := cluster.Client().CoordinationV1().Leases(w.namespace).List(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for _, lease := range leases.Items {
		if lease.Name == podcert.LeaseName {
			return holderOf(lease)
		}
	}
	return ""
}

func holderOf(lease coordinationv1.Lease) string {
	if lease.Spec.HolderIdentity == nil {
		return ""
	}
	return *lease.Spec.HolderIdentity
}

// Two that both believe to have the lease: the API server takes one status each, and
// the other one leaves it at that.
func TestTwoSign(t *testing.T) {
	w, elsewhere := newWorld(t), newWorld(t)
	config := authorityConfig(t)
	one, two := w.signerConfig(t, openIssuer(t, config)), w.signerConfig(t, openIssuer(t, config))
	two.Namespace = elsewhere.namespace // another lease
	background(t, newSigner(t, one).Run)
	background(t, newSigner(t, two).Run)
	pod := w.pod(t, w.signer)
	var creating sync.WaitGroup
	requests := make([]*certificatesv1.PodCertificateRequest, 40)
	for n := range requests {
		request := w.request(t, pod)
		creating.Go(func() { requests[n] = create(t, w.kubelet, request) })
	}
	creating.Wait()
	issued(t, requests...)
	for _, c := range []podcert.Config{one, two} {
		eventually(t, "that nothing is pending", func() bool {
			return registry(c).counter(t, "troth_pod_certificates_pending", "") == 0
		})
	}
	var sum float64
	for _, c := range []podcert.Config{one, two} {
		sum += registry(c).counter(t, "troth_pod_certificates_issued_total", "")
	}
	if sum != 40 {
		t.Errorf("%v statuses written, want 40", sum)
	}
}

// rules are the rights that docs/native-certificates.md names, without those that
// package kube needs.
func rules(signer string) []rbacv1.PolicyRule {
	return []rbacv1.PolicyRule{
		{APIGroups: []string{"certificates.k8s.io"}, Resources: []string{"podcertificaterequests"}, Verbs: []string{"get", "list", "watch"}},
		{APIGroups: []string{"certificates.k8s.io"}, Resources: []string{"podcertificaterequests/status"}, Verbs: []string{"patch"}},
		{APIGroups: []string{"certificates.k8s.io"}, Resources: []string{"signers"}, ResourceNames: []string{signer}, Verbs: []string{"sign"}},
		{APIGroups: []string{"coordination.k8s.io"}, Resources: []string{"leases"}, Verbs: []string{"create"}},
		{APIGroups: []string{"coordination.k8s.io"}, Resources: []string{"leases"}, ResourceNames: []string{podcert.LeaseName}, Verbs: []string{"get", "update"}},
	}
}

// grant gives the world's service account rights, and returns its client.
func (w *world) grant(t testing.TB, rules []rbacv1.PolicyRule) *kube.Client {
	t.Helper()
	role, err := cluster.Client().RbacV1().ClusterRoles().Create(t.Context(), &rbacv1.ClusterRole{
		ObjectMeta: metav1.ObjectMeta{GenerateName: w.namespace + "-"}, Rules: rules}, metav1.CreateOptions{})
	if err == nil {
		_, err = cluster.Client().RbacV1().ClusterRoleBindings().Create(t.Context(), &rbacv1.ClusterRoleBinding{
			ObjectMeta: metav1.ObjectMeta{GenerateName: w.namespace + "-"},
			RoleRef:    rbacv1.RoleRef{APIGroup: "rbac.authorization.k8s.io", Kind: "ClusterRole", Name: role.Name},
			Subjects:   []rbacv1.Subject{{Kind: "ServiceAccount", Namespace: w.namespace, Name: w.account.Name}},
		}, metav1.CreateOptions{})
	}
	if err != nil {
		t.Fatal(err)
	}
	pod := cluster.CreatePod(t, apiserver.Pod{Namespace: w.namespace, Name: "troth-server-", ServiceAccount: w.account.Name, Node: w.node.Name})
	client, err := kube.NewClient(cluster.Bearer(cluster.Token(t, pod, apiserver.Issuer, time.Hour)))
	if err != nil {
		t.Fatal(err)
	}
	return client
}

// The documented rights are enough. Without the one to sign, what was issued is
// recorded and handed to nobody, as if the process had died in between: the next one
// issues again.
func TestRightsAndCrash(t *testing.T) {
	w := newWorld(t)
	config := authorityConfig(t)
	ledger := &troubled{Ledger: config.Ledger}
	config.Ledger = ledger
	signer := w.signerConfig(t, openIssuer(t, config))
	all := rules(w.signer)
	mute := w.grant(t, append(append([]rbacv1.PolicyRule(nil), all[:2]...), all[3:]...))
	signer.Client = mute
	log := new(lines)
	signer.Log = slog.New(slog.NewTextHandler(log, nil))
	stop := background(t, newSigner(t, signer).Run)
	created := create(t, w.kubelet, w.request(t, w.pod(t, w.signer)))
	eventually(t, "two tries", func() bool {
		return registry(signer).counter(t, "troth_pod_certificates_retries_total", string(podcert.NotWritten)) >= 2
	})
	stop()
	if now := look(t, created); len(now.Status.Conditions) > 0 {
		t.Fatalf("became %v", now.Status.Conditions)
	}
	if n := log.count("pod certificate request waits"); n != 1 {
		t.Errorf("%d lines say that the request waits, want one:\n%s", n, log)
	}
	recorded := ledger.count(t)
	if recorded < 2 {
		t.Errorf("the ledger lists %d certificates, want one for each try", recorded)
	}

	able := w.signerConfig(t, openIssuer(t, config))
	able.Client = w.grant(t, all)
	able.Replica = "two"
	background(t, newSigner(t, able).Run)
	issued(t, created)
	if n := ledger.count(t); n <= recorded {
		t.Errorf("the ledger lists %d certificates as before", n)
	}
}

// lines is a log that can be read while it is written.
type lines struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

func (l *lines) count(what string) int { return strings.Count(l.String(), what) }

func TestNewRefuses(t *testing.T) {
	w := newWorld(t)
	good := w.signerConfig(t, openIssuer(t, authorityConfig(t)))
	for name, change := range map[string]func(*podcert.Config){
		"no client":       func(c *podcert.Config) { c.Client = nil },
		"no trust domain": func(c *podcert.Config) { c.TrustDomain = podcert.Config{}.TrustDomain },
		"no signer name":  func(c *podcert.Config) { c.SignerName = "" },
		"no replica":      func(c *podcert.Config) { c.Replica = "" },
		"short life":      func(c *podcert.Config) { c.Life = 59 * time.Minute },
	} {
		bad := good
		change(&bad)
		if _, err := podcert.New(bad); err == nil {
			t.Errorf("%s: New() takes it", name)
		}
	}
}
