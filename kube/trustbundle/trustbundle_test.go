package trustbundle_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"

	"troth.dev/troth/ca"
	"troth.dev/troth/handshake"
	"troth.dev/troth/kube"
	"troth.dev/troth/kube/trustbundle"
	"troth.dev/troth/storage"
	"troth.dev/troth/test/apiserver"
)

// cluster is the control plane that all tests of the package share.
var cluster *apiserver.Cluster

func TestMain(m *testing.M) {
	os.Exit(apiserver.Main(m, func(c *apiserver.Cluster) { cluster = c }))
}

const patience = time.Minute

func eventually(t testing.TB, what string, holds func() bool) {
	t.Helper()
	late := time.After(patience)
	poll := time.NewTicker(10 * time.Millisecond)
	defer poll.Stop()
	for !holds() {
		select {
		case <-poll.C:
		case <-late:
			t.Fatalf("%s: never", what)
		}
	}
}

// world is a namespace, a trust domain and a signer name of one test's own.
type world struct {
	namespace   string
	trustDomain spiffeid.TrustDomain
	signer      string
	name        string // of the ClusterTrustBundle
}

func newWorld(t testing.TB) *world {
	t.Helper()
	namespace := cluster.CreateNamespace(t, "bundle-")
	w := &world{namespace: namespace, trustDomain: spiffeid.RequireTrustDomainFromString(namespace + ".test"), signer: "troth.dev/svid"}
	var err error
	if w.name, err = trustbundle.Name(w.signer, w.trustDomain); err != nil {
		t.Fatal(err)
	}
	return w
}

// authorities is the config of issuers that share a store in memory.
func (w *world) authorities(t testing.TB) ca.Config {
	t.Helper()
	kek := make([]byte, ca.KeySize)
	rand.Read(kek)
	keys, err := ca.NewSealedKeys(kek)
	if err != nil {
		t.Fatal(err)
	}
	memory := storage.NewMemory()
	return ca.Config{
		TrustDomain: w.trustDomain, Keys: keys, Authorities: memory, Ledger: memory,
		Audit: slog.New(slog.DiscardHandler), Publication: time.Millisecond,
	}
}

func open(t testing.TB, config ca.Config) *ca.Issuer {
	t.Helper()
	issuer, err := ca.Open(t.Context(), config)
	if err != nil {
		t.Fatal(err)
	}
	background(t, issuer.Run)
	return issuer
}

func background(t testing.TB, run func(context.Context) error) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- run(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("Run() = %v, want nil after its context ended", err)
		}
	})
	t.Cleanup(stop)
	return stop
}

// publisher is a config with both kinds of places.
func (w *world) publisher(t testing.TB, issuer *ca.Issuer) trustbundle.Config {
	t.Helper()
	places, err := trustbundle.ParsePlaces("clustertrustbundle,configmap=" + w.namespace + "/troth-bundle")
	if err != nil {
		t.Fatal(err)
	}
	return trustbundle.Config{
		Client: cluster.Client(), TrustDomain: w.trustDomain, SignerName: w.signer, Places: places,
		Bundle: issuer.Bundle(), Current: issuer.CurrentBundle, Published: issuer.Published,
		Namespace: w.namespace, Replica: "one", LeaseDuration: 3 * time.Second,
		Log: slog.New(slog.DiscardHandler), Metrics: prometheus.NewRegistry(),
	}
}

func publish(t testing.TB, config trustbundle.Config) (stop func()) {
	t.Helper()
	p, err := trustbundle.New(config)
	if err != nil {
		t.Fatal(err)
	}
	return background(t, p.Run)
}

// published is what a place has: nothing, if there is none.
type published struct{ revision, text string }

func (w *world) clusterTrustBundle(t testing.TB) published {
	t.Helper()
	o, err := cluster.Client().CertificatesV1().ClusterTrustBundles().Get(t.Context(), w.name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return published{}
	}
	if err != nil {
		t.Fatal(err)
	}
	if o.Spec.SignerName != w.signer {
		t.Errorf("it is of signer %q", o.Spec.SignerName)
	}
	return published{o.Annotations[trustbundle.RevisionAnnotation], o.Spec.TrustBundle}
}

func (w *world) configMap(t testing.TB) published {
	t.Helper()
	o, err := cluster.Client().CoreV1().ConfigMaps(w.namespace).Get(t.Context(), "troth-bundle", metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return published{}
	}
	if err != nil {
		t.Fatal(err)
	}
	return published{o.Annotations[trustbundle.RevisionAnnotation], o.Data[trustbundle.Key]}
}

// want is what every place is to have of the bundle.
func want(b ca.Bundle) published {
	var text strings.Builder
	for _, a := range b.X509Bundle().X509Authorities() {
		_ = pem.Encode(&text, &pem.Block{Type: "CERTIFICATE", Bytes: a.Raw})
	}
	return published{strconv.FormatUint(b.Revision, 10), text.String()}
}

func bundleOf(issuer *ca.Issuer) ca.Bundle {
	b, _ := issuer.Bundle().Load()
	return b
}

func (w *world) awaitPublished(t testing.TB, b ca.Bundle) {
	t.Helper()
	eventually(t, "the ClusterTrustBundle", func() bool { return w.clusterTrustBundle(t) == want(b) })
	eventually(t, "the ConfigMap", func() bool { return w.configMap(t) == want(b) })
}

func newCSR(t testing.TB) []byte {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

var operator = ca.Order{Actor: "alice", Reason: "planned"}

// A whole rotation in a cluster without agents: the next authority is published before
// it signs, and the one before stays published for as long as it may be depended on.
// Whoever verifies by what is published is never surprised.
func TestRotation(t *testing.T) {
	w := newWorld(t)
	issuer := open(t, w.authorities(t))
	publish(t, w.publisher(t, issuer))
	w.awaitPublished(t, bundleOf(issuer))

	id := spiffeid.RequireFromPath(w.trustDomain, "/ns/shop/sa/cart")
	verify := func() string {
		t.Helper()
		results, err := issuer.Issue(t.Context(), ca.Request{ID: id, CSR: newCSR(t), Caller: ca.KubeletCaller})
		if err == nil {
			err = results[0].Err
		}
		if err != nil {
			t.Fatal(err)
		}
		var chain []*x509.Certificate
		for _, der := range results[0].SVID.Certificates {
			c, err := x509.ParseCertificate(der)
			if err != nil {
				t.Fatal(err)
			}
			chain = append(chain, c)
		}
		for _, text := range []string{w.clusterTrustBundle(t).text, w.configMap(t).text} {
			bundle, err := x509bundle.Parse(w.trustDomain, []byte(text))
			if err != nil {
				t.Fatal(err)
			}
			if _, err := handshake.Verify(chain, bundle, time.Now()); err != nil {
				t.Errorf("what is published does not verify it: %v", err)
			}
		}
		return results[0].SVID.AuthorityID
	}
	first := verify()

	next, err := issuer.Prepare(t.Context(), operator)
	if err != nil {
		t.Fatal(err)
	}
	order := operator
	eventually(t, "the next authority signs", func() bool {
		order.Evidence = ca.Propagation{At: time.Now()}
		_, err = issuer.Activate(t.Context(), next.ID, order)
		var blocked *ca.Blocked
		if errors.As(err, &blocked) && blocked.Blockers[0].Obstacle != ca.BundleUnpublished {
			t.Fatal(err)
		}
		return err == nil
	})
	if by := verify(); by != next.ID {
		t.Errorf("signed by %s, want %s", by, next.ID)
	}
	order.Evidence = ca.Propagation{At: time.Now()}
	if _, err := issuer.Revoke(t.Context(), first, order); err == nil {
		t.Error("revoked while a certificate lives that it signed")
	}
	w.awaitPublished(t, bundleOf(issuer))
	if n := len(bundleOf(issuer).Authorities); n != 2 {
		t.Errorf("%d authorities are published, want 2", n)
	}
	order.Force = true
	if _, err := issuer.Revoke(t.Context(), first, order); err != nil {
		t.Fatal(err)
	}
	w.awaitPublished(t, bundleOf(issuer)) // now it is gone
}

// An authority that is not published does not sign.
func TestUnpublishedDoesNotSign(t *testing.T) {
	w := newWorld(t)
	config := w.authorities(t)
	config.Publication = time.Hour
	issuer := open(t, config)
	publish(t, w.publisher(t, issuer))
	next, err := issuer.Prepare(t.Context(), operator)
	if err != nil {
		t.Fatal(err)
	}
	order := operator
	until := func() time.Time {
		order.Evidence = ca.Propagation{At: time.Now()}
		_, err := issuer.Activate(t.Context(), next.ID, order)
		var blocked *ca.Blocked
		if !errors.As(err, &blocked) || blocked.Blockers[0].Obstacle != ca.BundleUnpublished {
			t.Fatalf("Activate = %v, want BUNDLE_UNPUBLISHED", err)
		}
		return blocked.Blockers[0].Until
	}
	w.awaitPublished(t, bundleOf(issuer))
	eventually(t, "it is known to be published", func() bool { return !until().IsZero() })
}

// What others change or delete is written again, and what they add stays.
func TestWrittenAgain(t *testing.T) {
	w := newWorld(t)
	issuer := open(t, w.authorities(t))
	publish(t, w.publisher(t, issuer))
	w.awaitPublished(t, bundleOf(issuer))
	ctx, bundles, maps := t.Context(), cluster.Client().CertificatesV1().ClusterTrustBundles(), cluster.Client().CoreV1().ConfigMaps(w.namespace)

	foreign := want(bundleOf(open(t, newWorld(t).authorities(t))))
	o, err := bundles.Get(ctx, w.name, metav1.GetOptions{})
	if err == nil {
		o.Spec.TrustBundle = foreign.text
		o.Annotations["example.test/note"] = "mine"
		_, err = bundles.Update(ctx, o, metav1.UpdateOptions{})
	}
	if err != nil {
		t.Fatal(err)
	}
	m, err := maps.Get(ctx, "troth-bundle", metav1.GetOptions{})
	if err == nil {
		// Whoever claims to be newer than the store is not believed.
		m.Data = map[string]string{trustbundle.Key: foreign.text, "other": "mine"}
		m.Annotations[trustbundle.RevisionAnnotation] = "999"
		_, err = maps.Update(ctx, m, metav1.UpdateOptions{})
	}
	if err != nil {
		t.Fatal(err)
	}
	w.awaitPublished(t, bundleOf(issuer))
	if o, err = bundles.Get(ctx, w.name, metav1.GetOptions{}); err != nil || o.Annotations["example.test/note"] != "mine" {
		t.Errorf("somebody else's annotation is %q (%v)", o.Annotations["example.test/note"], err)
	}
	if m, err = maps.Get(ctx, "troth-bundle", metav1.GetOptions{}); err != nil || m.Data["other"] != "mine" {
		t.Errorf("somebody else's key is %q (%v)", m.Data["other"], err)
	}

	if err := errors.Join(bundles.Delete(ctx, w.name, metav1.DeleteOptions{}), maps.Delete(ctx, "troth-bundle", metav1.DeleteOptions{})); err != nil {
		t.Fatal(err)
	}
	w.awaitPublished(t, bundleOf(issuer))
}

// A replica that has slept through a change holds the lease, and replaces nothing: it
// asks the store before it writes, and without the store it does not write.
func TestNeverGoesBack(t *testing.T) {
	w := newWorld(t)
	config := w.authorities(t)
	newer := open(t, config)
	stop := publish(t, w.publisher(t, newer))
	asleep, err := ca.Open(t.Context(), config) // follows nothing
	if err != nil {
		t.Fatal(err)
	}
	old := bundleOf(asleep)
	if _, err := newer.Prepare(t.Context(), operator); err != nil {
		t.Fatal(err)
	}
	w.awaitPublished(t, bundleOf(newer))
	stop()

	sleeper := w.publisher(t, asleep)
	sleeper.Replica = "two"
	asked := make(chan struct{}, 1000)
	sleeper.Current = func(context.Context) (ca.Bundle, error) {
		asked <- struct{}{}
		return ca.Bundle{}, errors.New("the store is away")
	}
	stop = publish(t, sleeper)
	for range 4 { // two places, twice
		select {
		case <-asked:
		case <-time.After(patience):
			t.Fatal("the sleeper never asks the store")
		}
	}
	stop()
	if got := w.configMap(t); got != want(bundleOf(newer)) || got == want(old) {
		t.Errorf("revision %s is published, want %d", got.revision, bundleOf(newer).Revision)
	}

	sleeper.Current, sleeper.Metrics = asleep.CurrentBundle, prometheus.NewRegistry()
	version := func() string {
		m, err := cluster.Client().CoreV1().ConfigMaps(w.namespace).Get(t.Context(), "troth-bundle", metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		return m.ResourceVersion
	}
	before := version()
	publish(t, sleeper)
	eventually(t, "the sleeper wakes up", func() bool { return bundleOf(asleep).Revision == bundleOf(newer).Revision })
	w.awaitPublished(t, bundleOf(newer))
	if after := version(); after != before {
		t.Errorf("it was written again, as version %s after %s", after, before)
	}
}

// A replica that was stopped between asking the store and writing finds the object
// changed, or there, and leaves it.
func TestOvertaken(t *testing.T) {
	for _, exists := range []bool{true, false} {
		t.Run(fmt.Sprintf("there was one: %v", exists), func(t *testing.T) {
			w := newWorld(t)
			issuer := open(t, w.authorities(t))
			maps := cluster.Client().CoreV1().ConfigMaps(w.namespace)
			put := func(revision, text string) {
				m := &corev1.ConfigMap{
					ObjectMeta: metav1.ObjectMeta{Name: "troth-bundle", Annotations: map[string]string{trustbundle.RevisionAnnotation: revision}},
					Data:       map[string]string{trustbundle.Key: text},
				}
				_, err := maps.Update(context.Background(), m, metav1.UpdateOptions{})
				if apierrors.IsNotFound(err) {
					_, err = maps.Create(context.Background(), m, metav1.CreateOptions{})
				}
				if err != nil {
					t.Error(err)
				}
			}
			if exists {
				put("0", "older")
			}
			config := w.publisher(t, issuer)
			config.Places = config.Places[1:]
			asked := make(chan struct{}, 100)
			calls := 0 // of the one goroutine that keeps the one place
			config.Current = func(ctx context.Context) (ca.Bundle, error) {
				defer func() { asked <- struct{}{} }()
				if calls++; calls > 1 {
					return ca.Bundle{}, errors.New("the store is away")
				}
				put("7", "newer")
				return bundleOf(issuer), ctx.Err()
			}
			publish(t, config)
			for range 2 {
				select {
				case <-asked:
				case <-time.After(patience):
					t.Fatal("the store is never asked")
				}
			}
			if got := w.configMap(t); got != (published{"7", "newer"}) {
				t.Errorf("revision %s is published, want 7", got.revision)
			}
		})
	}
}

// One place that cannot be written is enough for an authority to wait.
func TestPlaceIsMissing(t *testing.T) {
	w := newWorld(t)
	issuer := open(t, w.authorities(t))
	config := w.publisher(t, issuer)
	places, err := trustbundle.ParsePlaces("clustertrustbundle,configmap=no-such-namespace/troth-bundle")
	if err != nil {
		t.Fatal(err)
	}
	log := new(lines)
	config.Places, config.Log = places, slog.New(slog.NewTextHandler(log, nil))
	publish(t, config)
	next, err := issuer.Prepare(t.Context(), operator)
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "the ClusterTrustBundle", func() bool { return w.clusterTrustBundle(t) == want(bundleOf(issuer)) })
	eventually(t, "the log says so, twice", func() bool {
		return strings.Count(log.String(), "configmap=no-such-namespace/troth-bundle") >= 2 && strings.Contains(log.String(), "what was there stays")
	})
	order := operator
	order.Evidence = ca.Propagation{At: time.Now()}
	_, err = issuer.Activate(t.Context(), next.ID, order)
	var blocked *ca.Blocked
	if !errors.As(err, &blocked) || blocked.Blockers[0].Obstacle != ca.BundleUnpublished || !blocked.Blockers[0].Until.IsZero() {
		t.Errorf("Activate = %v, want BUNDLE_UNPUBLISHED until nobody knows when", err)
	}
}

// Of two replicas one writes; both know what is published.
func TestReplicas(t *testing.T) {
	w := newWorld(t)
	config := w.authorities(t)
	config.Publication = time.Hour
	one, two := open(t, config), open(t, config)
	stop := publish(t, w.publisher(t, one))
	w.awaitPublished(t, bundleOf(one))
	second := w.publisher(t, two)
	second.Replica = "two"
	publish(t, second)
	next, err := one.Prepare(t.Context(), operator)
	if err != nil {
		t.Fatal(err)
	}
	w.awaitPublished(t, bundleOf(one))
	for name, issuer := range map[string]*ca.Issuer{"one": one, "two": two} {
		eventually(t, name+" knows that it is published", func() bool {
			order := operator
			order.Evidence = ca.Propagation{At: time.Now()}
			_, err := issuer.Activate(t.Context(), next.ID, order)
			var blocked *ca.Blocked
			return errors.As(err, &blocked) && !blocked.Blockers[0].Until.IsZero()
		})
	}
	stop()
	if _, err := two.Abort(t.Context(), next.ID, operator); err != nil {
		t.Fatal(err)
	}
	w.awaitPublished(t, bundleOf(two)) // by the second
}

// older answers like an API server of before Kubernetes 1.37 about the API that it lacks.
type older struct{ http.RoundTripper }

func (o older) RoundTrip(r *http.Request) (*http.Response, error) {
	if !strings.HasPrefix(r.URL.Path, "/apis/certificates.k8s.io/v1") {
		return o.RoundTripper.RoundTrip(r)
	}
	const body = `{"kind":"Status","apiVersion":"v1","status":"Failure","reason":"NotFound","code":404}`
	return &http.Response{
		Status: "404 Not Found", StatusCode: http.StatusNotFound, Proto: r.Proto, ProtoMajor: r.ProtoMajor, Request: r,
		Header: http.Header{"Content-Type": {"application/json"}}, Body: io.NopCloser(strings.NewReader(body)),
	}, nil
}

// A kind that the API server does not serve is left out, and the others are kept. The
// gates do not wait for what nobody can read.
func TestUnserved(t *testing.T) {
	w := newWorld(t)
	issuer := open(t, w.authorities(t))
	publisher := w.publisher(t, issuer)
	config := rest.CopyConfig(cluster.Admin())
	config.Wrap(func(next http.RoundTripper) http.RoundTripper { return older{next} })
	client, err := kube.NewClient(config)
	if err != nil {
		t.Fatal(err)
	}
	log := new(lines)
	publisher.Client, publisher.Log = client, slog.New(slog.NewTextHandler(log, nil))
	publish(t, publisher)
	eventually(t, "the ConfigMap", func() bool { return w.configMap(t) == want(bundleOf(issuer)) })
	eventually(t, "the log says so", func() bool { return strings.Contains(log.String(), "does not serve this kind of object") })
	next, err := issuer.Prepare(t.Context(), operator)
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "the next authority signs", func() bool {
		order := operator
		order.Evidence = ca.Propagation{At: time.Now()}
		_, err := issuer.Activate(t.Context(), next.ID, order)
		return err == nil
	})
	if got := w.clusterTrustBundle(t); got != (published{}) {
		t.Errorf("a ClusterTrustBundle of revision %s", got.revision)
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

// rules are the rights that docs/trust-bundle.md names.
func rules(w *world) []rbacv1.PolicyRule {
	return []rbacv1.PolicyRule{
		{APIGroups: []string{"certificates.k8s.io"}, Resources: []string{"clustertrustbundles"}, Verbs: []string{"create"}},
		{APIGroups: []string{"certificates.k8s.io"}, Resources: []string{"clustertrustbundles"}, ResourceNames: []string{w.name}, Verbs: []string{"get", "list", "watch", "patch"}},
		{APIGroups: []string{"certificates.k8s.io"}, Resources: []string{"signers"}, ResourceNames: []string{w.signer}, Verbs: []string{"attest"}},
		{APIGroups: []string{""}, Resources: []string{"configmaps"}, Verbs: []string{"create"}},
		{APIGroups: []string{""}, Resources: []string{"configmaps"}, ResourceNames: []string{"troth-bundle"}, Verbs: []string{"get", "list", "watch", "patch"}},
		{APIGroups: []string{"coordination.k8s.io"}, Resources: []string{"leases"}, Verbs: []string{"create"}},
		{APIGroups: []string{"coordination.k8s.io"}, Resources: []string{"leases"}, ResourceNames: []string{trustbundle.LeaseName}, Verbs: []string{"get", "update"}},
	}
}

// The documented rights are enough.
func TestRights(t *testing.T) {
	w := newWorld(t)
	account := cluster.CreateServiceAccount(t, w.namespace, "troth-server")
	role, err := cluster.Client().RbacV1().ClusterRoles().Create(t.Context(), &rbacv1.ClusterRole{
		ObjectMeta: metav1.ObjectMeta{GenerateName: w.namespace + "-"}, Rules: rules(w)}, metav1.CreateOptions{})
	if err == nil {
		_, err = cluster.Client().RbacV1().ClusterRoleBindings().Create(t.Context(), &rbacv1.ClusterRoleBinding{
			ObjectMeta: metav1.ObjectMeta{GenerateName: w.namespace + "-"},
			RoleRef:    rbacv1.RoleRef{APIGroup: "rbac.authorization.k8s.io", Kind: "ClusterRole", Name: role.Name},
			Subjects:   []rbacv1.Subject{{Kind: "ServiceAccount", Namespace: w.namespace, Name: account.Name}},
		}, metav1.CreateOptions{})
	}
	if err != nil {
		t.Fatal(err)
	}
	node := cluster.CreateNode(t, "node-")
	pod := cluster.CreatePod(t, apiserver.Pod{Namespace: w.namespace, Name: "troth-server-", ServiceAccount: account.Name, Node: node.Name})
	issuer := open(t, w.authorities(t))
	config := w.publisher(t, issuer)
	if config.Client, err = kube.NewClient(cluster.Bearer(cluster.Token(t, pod, apiserver.Issuer, time.Hour))); err != nil {
		t.Fatal(err)
	}
	publish(t, config)
	w.awaitPublished(t, bundleOf(issuer))
	if _, err := issuer.Prepare(t.Context(), operator); err != nil { // to create is one thing, to replace another
		t.Fatal(err)
	}
	w.awaitPublished(t, bundleOf(issuer))
}

func TestParsePlaces(t *testing.T) {
	for list, problem := range map[string]string{
		"":                   "",
		"clustertrustbundle": "",
		"clustertrustbundle,configmap=troth-node/troth-bundle,configmap=a/b": "",
		"configmap=a/b,configmap=a/b":                                        "there twice",
		"configmap=a":                                                        "NAMESPACE/NAME",
		"configmap=/b":                                                       "NAMESPACE/NAME",
		"configmap=A/b":                                                      "NAMESPACE/NAME",
		"configmap=a/b/c":                                                    "NAMESPACE/NAME",
		"clustertrustbundle=x":                                               "neither",
		"secret=a/b":                                                         "neither",
	} {
		places, err := trustbundle.ParsePlaces(list)
		if problem != "" {
			if err == nil || !strings.Contains(err.Error(), problem) {
				t.Errorf("ParsePlaces(%q) = %v, want %q", list, err, problem)
			}
			continue
		}
		var again []string
		for _, p := range places {
			again = append(again, p.String())
		}
		if err != nil || strings.Join(again, ",") != list {
			t.Errorf("ParsePlaces(%q) = %q, %v", list, again, err)
		}
	}
}

func TestName(t *testing.T) {
	if name, err := trustbundle.Name("troth.dev/svid", spiffeid.RequireTrustDomainFromString("example.org")); err != nil || name != "troth.dev:svid:example.org" {
		t.Errorf("Name() = %q, %v", name, err)
	}
	if name, err := trustbundle.Name("troth.dev/svid", spiffeid.RequireTrustDomainFromString("a_b.example.org")); err == nil {
		t.Errorf("Name() = %q for a trust domain that cannot be in it", name)
	}
}

func TestNewRefuses(t *testing.T) {
	w := newWorld(t)
	good := w.publisher(t, open(t, w.authorities(t)))
	for name, change := range map[string]func(*trustbundle.Config){
		"no places":    func(c *trustbundle.Config) { c.Places = nil },
		"a zero place": func(c *trustbundle.Config) { c.Places = []trustbundle.Place{{}} },
		"no client":    func(c *trustbundle.Config) { c.Client = nil },
		"no replica":   func(c *trustbundle.Config) { c.Replica = "" },
		"trust domain": func(c *trustbundle.Config) { c.TrustDomain = spiffeid.RequireTrustDomainFromString("a_b") },
	} {
		bad := good
		change(&bad)
		if _, err := trustbundle.New(bad); err == nil {
			t.Errorf("%s: New() takes it", name)
		}
	}
}

// What others write there may be anything.
func FuzzAnchors(f *testing.F) {
	f.Add("-----BEGIN CERTIFICATE-----\nMAA=\n-----END CERTIFICATE-----\n")
	f.Add("text -----BEGIN PRIVATE KEY-----\nMAA=\n-----END PRIVATE KEY-----")
	f.Fuzz(func(t *testing.T, text string) {
		for der := range trustbundle.AnchorsIn(text) {
			again := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: []byte(der)})
			if !trustbundle.AnchorsIn(string(again))[der] {
				t.Fatalf("%x is not found again", der)
			}
		}
	})
}
