package podcert_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"log/slog"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	certificatesv1 "k8s.io/api/certificates/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"

	"troth.dev/troth/ca"
	"troth.dev/troth/identity"
	"troth.dev/troth/kube"
	"troth.dev/troth/kube/podcert"
	"troth.dev/troth/storage"
	"troth.dev/troth/test/apiserver"
)

// cluster is the control plane that all tests of the package share.
var cluster *apiserver.Cluster

func TestMain(m *testing.M) {
	os.Exit(apiserver.Main(m, func(c *apiserver.Cluster) { cluster = c }))
}

var (
	trustDomain = spiffeid.RequireTrustDomainFromString("example.test")
	agents      = identity.ServiceAccount{Namespace: "troth-node", Name: "troth-agent"}
)

// patience is when a test gives up. Nothing here takes a tenth of it.
const patience = time.Minute

// eventually polls what nobody is told of.
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

// world is a namespace, a service account, a node with its kubelet's credentials, and a
// signer name of one test's own.
type world struct {
	namespace string
	signer    string
	account   *corev1.ServiceAccount
	node      *corev1.Node
	kubelet   kubernetes.Interface
}

func newWorld(t testing.TB) *world {
	t.Helper()
	namespace := cluster.CreateNamespace(t, "shop-")
	w := &world{
		namespace: namespace,
		signer:    "troth.dev/" + namespace,
		account:   cluster.CreateServiceAccount(t, namespace, "cart"),
	}
	w.node, w.kubelet = newNode(t)
	return w
}

func newNode(t testing.TB) (*corev1.Node, kubernetes.Interface) {
	t.Helper()
	node := cluster.CreateNode(t, "node-")
	client, err := kube.NewClient(cluster.Node(t, node.Name))
	if err != nil {
		t.Fatal(err)
	}
	return node, client
}

// pod creates a pod on the world's node that is about to start, and waits for a
// certificate of that signer if it is not empty.
func (w *world) pod(t testing.TB, signer string) *corev1.Pod {
	t.Helper()
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{GenerateName: "cart-"},
		Spec: corev1.PodSpec{
			ServiceAccountName: w.account.Name,
			NodeName:           w.node.Name,
			Containers:         []corev1.Container{{Name: "main", Image: "none"}},
		},
	}
	if signer != "" {
		pod.Spec.Volumes = []corev1.Volume{{Name: "svid", VolumeSource: corev1.VolumeSource{
			Projected: &corev1.ProjectedVolumeSource{Sources: []corev1.VolumeProjection{{
				PodCertificate: &corev1.PodCertificateProjection{SignerName: signer, KeyType: "ECDSAP256", CredentialBundlePath: "bundle.pem"},
			}}},
		}}}
	}
	created, err := cluster.Client().CoreV1().Pods(w.namespace).Create(t.Context(), pod, metav1.CreateOptions{})
	if err != nil {
		t.Fatalf("create a pod: %v", err)
	}
	return created
}

// request is what the kubelet asks for a pod of the world.
func (w *world) request(t testing.TB, pod *corev1.Pod) *certificatesv1.PodCertificateRequest {
	t.Helper()
	return &certificatesv1.PodCertificateRequest{
		ObjectMeta: metav1.ObjectMeta{GenerateName: "req-", Namespace: pod.Namespace},
		Spec: certificatesv1.PodCertificateRequestSpec{
			SignerName:         w.signer,
			PodName:            pod.Name,
			PodUID:             pod.UID,
			ServiceAccountName: w.account.Name,
			ServiceAccountUID:  w.account.UID,
			NodeName:           types.NodeName(w.node.Name),
			NodeUID:            w.node.UID,
			StubPKCS10Request:  stub(t, newKey(t)),
		},
	}
}

func newKey(t testing.TB) crypto.Signer {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// stub is a certificate request as the kubelet makes it.
func stub(t testing.TB, key crypto.Signer) []byte {
	t.Helper()
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

// create makes the request as that client. NodeRestriction knows a pod only when its
// own watch has brought it: until then it answers with an error.
func create(t testing.TB, as kubernetes.Interface, request *certificatesv1.PodCertificateRequest) *certificatesv1.PodCertificateRequest {
	t.Helper()
	var created *certificatesv1.PodCertificateRequest
	var err error
	late := time.Now().Add(patience / 4)
	poll := time.NewTicker(20 * time.Millisecond)
	defer poll.Stop()
	for {
		created, err = as.CertificatesV1().PodCertificateRequests(request.Namespace).Create(t.Context(), request, metav1.CreateOptions{})
		if err == nil {
			return created
		}
		if time.Now().After(late) {
			t.Fatalf("create a PodCertificateRequest: %v", err)
		}
		<-poll.C
	}
}

func look(t testing.TB, request *certificatesv1.PodCertificateRequest) *certificatesv1.PodCertificateRequest {
	t.Helper()
	now, err := cluster.Client().CertificatesV1().PodCertificateRequests(request.Namespace).Get(t.Context(), request.Name, metav1.GetOptions{})
	if err != nil {
		t.Fatalf("get a PodCertificateRequest: %v", err)
	}
	return now
}

// outcome waits until a request is decided on and returns it, with its condition.
func outcome(t testing.TB, request *certificatesv1.PodCertificateRequest) (*certificatesv1.PodCertificateRequest, metav1.Condition) {
	t.Helper()
	var now *certificatesv1.PodCertificateRequest
	eventually(t, "a decision on "+request.Name, func() bool {
		now = look(t, request)
		return len(now.Status.Conditions) > 0
	})
	return now, now.Status.Conditions[0]
}

// chain returns the certificates of an issued request.
func chain(t testing.TB, request *certificatesv1.PodCertificateRequest) []*x509.Certificate {
	t.Helper()
	var certificates []*x509.Certificate
	rest := []byte(request.Status.CertificateChain)
	for {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			t.Fatal(err)
		}
		certificates = append(certificates, c)
	}
	if len(certificates) == 0 || len(bytes.TrimSpace(rest)) > 0 {
		t.Fatalf("%d certificates, and %q after them", len(certificates), rest)
	}
	return certificates
}

// authorityConfig is an issuer's, in memory.
func authorityConfig(t testing.TB) ca.Config {
	t.Helper()
	kek := make([]byte, ca.KeySize)
	rand.Read(kek)
	keys, err := ca.NewSealedKeys(kek)
	if err != nil {
		t.Fatal(err)
	}
	memory := storage.NewMemory()
	return ca.Config{
		TrustDomain: trustDomain, Keys: keys, Authorities: memory, Ledger: memory,
		Audit: slog.New(slog.DiscardHandler), LongestLife: podcert.MinLife,
	}
}

func openIssuer(t testing.TB, config ca.Config) *ca.Issuer {
	t.Helper()
	issuer, err := ca.Open(t.Context(), config)
	if err != nil {
		t.Fatal(err)
	}
	background(t, issuer.Run)
	return issuer
}

// background runs something until the test ends, or until stop.
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

func runPods(t testing.TB) *kube.Pods {
	t.Helper()
	client, err := kube.NewClient(cluster.Admin())
	if err != nil {
		t.Fatal(err)
	}
	pods, err := kube.NewPods(kube.PodsConfig{Client: client, Dynamic: client.Dynamic, Agents: agents})
	if err != nil {
		t.Fatal(err)
	}
	background(t, pods.Run)
	return pods
}

// signerConfig is what signs for the world, as an admin.
func (w *world) signerConfig(t testing.TB, issuer *ca.Issuer) podcert.Config {
	t.Helper()
	return podcert.Config{
		Client: cluster.Client(), TrustDomain: trustDomain, SignerName: w.signer, Issuer: issuer, Life: podcert.MinLife,
		Pods: runPods(t), Namespace: w.namespace, Replica: "one", LeaseDuration: 3 * time.Second,
		Log: slog.New(slog.DiscardHandler), Metrics: prometheus.NewRegistry(),
	}
}

func newSigner(t testing.TB, config podcert.Config) *podcert.Signer {
	t.Helper()
	signer, err := podcert.New(config)
	if err != nil {
		t.Fatal(err)
	}
	return signer
}
