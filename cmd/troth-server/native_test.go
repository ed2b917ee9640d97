package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	certificatesv1 "k8s.io/api/certificates/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"troth.dev/troth/ca"
	"troth.dev/troth/handshake"
	"troth.dev/troth/kube"
	"troth.dev/troth/test/apiserver"
)

// The whole command, by its flags: what a kubelet asks for is signed, and verifies by
// what is published.
func TestNative(t *testing.T) {
	cluster := apiserver.Start(t)
	ctx, cancel := context.WithCancel(context.Background())
	agents := cluster.CreateNamespace(t, "troth-node")
	dir := t.TempDir()
	key := make([]byte, ca.KeySize)
	rand.Read(key)
	keyFile := filepath.Join(dir, "key")
	if err := os.WriteFile(keyFile, key, 0o600); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() {
		ended <- run(ctx, []string{
			"-trust-domain", "example.org", "-agents", agents + "/troth-agent", "-replica", "one",
			"-listen", "127.0.0.1:0", "-health", "127.0.0.1:0", "-database", filepath.Join(dir, "troth.db"), "-key-encryption-key", keyFile,
			"-kubeconfig", cluster.Kubeconfig(t, cluster.Admin()),
			"-signer", "troth.dev/svid", "-trust-bundle", "clustertrustbundle,configmap=" + agents + "/troth-bundle",
		}, os.Stderr)
	}()
	defer func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("run() = %v", err)
		}
	}()

	namespace := cluster.CreateNamespace(t, "shop")
	account := cluster.CreateServiceAccount(t, namespace, "cart")
	node := cluster.CreateNode(t, "node-1")
	pod, err := cluster.Client().CoreV1().Pods(namespace).Create(t.Context(), &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: "cart"},
		Spec: corev1.PodSpec{
			ServiceAccountName: account.Name, NodeName: node.Name,
			Containers: []corev1.Container{{Name: "main", Image: "none"}},
			Volumes: []corev1.Volume{{Name: "svid", VolumeSource: corev1.VolumeSource{Projected: &corev1.ProjectedVolumeSource{
				Sources: []corev1.VolumeProjection{{PodCertificate: &corev1.PodCertificateProjection{
					SignerName: "troth.dev/svid", KeyType: "ECDSAP256", CredentialBundlePath: "svid.pem",
				}}},
			}}}},
		},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	kubelet, err := kube.NewClient(cluster.Node(t, node.Name))
	if err != nil {
		t.Fatal(err)
	}
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, private)
	if err != nil {
		t.Fatal(err)
	}
	requests := kubelet.CertificatesV1().PodCertificateRequests(namespace)
	eventually(t, "a request", func() bool { // NodeRestriction knows the pod a moment later
		_, err = requests.Create(t.Context(), &certificatesv1.PodCertificateRequest{
			ObjectMeta: metav1.ObjectMeta{Name: "cart"},
			Spec: certificatesv1.PodCertificateRequestSpec{
				SignerName: "troth.dev/svid", PodName: pod.Name, PodUID: pod.UID,
				ServiceAccountName: account.Name, ServiceAccountUID: account.UID,
				NodeName: types.NodeName(node.Name), NodeUID: node.UID, StubPKCS10Request: csr,
			},
		}, metav1.CreateOptions{})
		return err == nil
	})
	var chain []*x509.Certificate
	eventually(t, "a certificate", func() bool {
		request, err := requests.Get(t.Context(), "cart", metav1.GetOptions{})
		if err != nil || request.Status.CertificateChain == "" {
			return false
		}
		block, _ := pem.Decode([]byte(request.Status.CertificateChain))
		leaf, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			t.Fatal(err)
		}
		chain = []*x509.Certificate{leaf}
		return true
	})
	var texts []string
	eventually(t, "both bundles", func() bool {
		bundle, err := cluster.Client().CertificatesV1().ClusterTrustBundles().Get(t.Context(), "troth.dev:svid:example.org", metav1.GetOptions{})
		if err != nil {
			return false
		}
		config, err := cluster.Client().CoreV1().ConfigMaps(agents).Get(t.Context(), "troth-bundle", metav1.GetOptions{})
		texts = []string{bundle.Spec.TrustBundle, config.Data["bundle.pem"]}
		return err == nil
	})
	for _, text := range texts {
		bundle, err := x509bundle.Parse(spiffeid.RequireTrustDomainFromString("example.org"), []byte(text))
		if err != nil {
			t.Fatal(err)
		}
		peer, err := handshake.Verify(chain, bundle, time.Now())
		if err != nil || peer.ID.String() != "spiffe://example.org/ns/shop/sa/cart" {
			t.Errorf("Verify = %v, %v", peer.ID, err)
		}
	}
}

func eventually(t *testing.T, what string, holds func() bool) {
	t.Helper()
	late := time.After(time.Minute)
	poll := time.NewTicker(20 * time.Millisecond)
	defer poll.Stop()
	for !holds() {
		select {
		case <-poll.C:
		case <-late:
			t.Fatalf("%s: never", what)
		}
	}
}
