package podcert_test

import (
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"net/url"
	"strings"
	"testing"
	"time"

	certificatesv1 "k8s.io/api/certificates/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"troth.dev/troth/kube/podcert"
)

// asking is a certificate request that asks for something.
func asking(t testing.TB, template x509.CertificateRequest) []byte {
	t.Helper()
	der, err := x509.CreateCertificateRequest(rand.Reader, &template, newKey(t))
	if err != nil {
		t.Fatal(err)
	}
	return der
}

const someUID = types.UID("6f1d2ab2-7c1b-4e34-9d0c-0f5cf6f5a0a1")

// Each reason for a denial, by what provokes it. Whoever is no kubelet may write into a
// request what they like: the API server asks nobody else for more than the syntax.
func TestDenies(t *testing.T) {
	w := newWorld(t)
	signer := w.signerConfig(t, openIssuer(t, authorityConfig(t)))
	metrics := registry(signer)
	background(t, newSigner(t, signer).Run)
	elsewhere := newWorld(t)
	other, _ := newNode(t)
	p521, err := ecdsa.GenerateKey(elliptic.P521(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	identity := &url.URL{Scheme: "spiffe", Host: "example.test", Path: "/ns/kube-system/sa/admin"}
	var many []string
	for n := range 200 {
		many = append(many, fmt.Sprintf("a-name-that-is-long-%d.example.test", n))
	}

	for _, test := range []struct {
		name   string
		pod    func(t *testing.T) *corev1.Pod // nil for one with the volume
		change func(*certificatesv1.PodCertificateRequest, *corev1.Pod)
		want   podcert.Reason
		detail string // in the message
	}{
		{"user annotation", nil, func(r *certificatesv1.PodCertificateRequest, _ *corev1.Pod) {
			r.Spec.UnverifiedUserAnnotations = map[string]string{"troth.dev/spiffe-id": "spiffe://example.test/ns/kube-system/sa/admin"}
		}, podcert.UnknownAnnotation, "an identity is not asked for"},
		{"key type", nil, func(r *certificatesv1.PodCertificateRequest, _ *corev1.Pod) {
			r.Spec.StubPKCS10Request = stub(t, p521)
		}, podcert.UnsupportedKeyType, "ECDSAP256 is best"},
		{"subject", nil, func(r *certificatesv1.PodCertificateRequest, _ *corev1.Pod) {
			r.Spec.StubPKCS10Request = asking(t, x509.CertificateRequest{Subject: pkix.Name{CommonName: "admin"}})
		}, podcert.InvalidCertificateRequest, "names a subject"},
		{"somebody else's identity", nil, func(r *certificatesv1.PodCertificateRequest, _ *corev1.Pod) {
			r.Spec.StubPKCS10Request = asking(t, x509.CertificateRequest{URIs: []*url.URL{identity}})
		}, podcert.InvalidCertificateRequest, "has attributes"},
		{"large request", nil, func(r *certificatesv1.PodCertificateRequest, _ *corev1.Pod) {
			r.Spec.StubPKCS10Request = asking(t, x509.CertificateRequest{DNSNames: many})
		}, podcert.InvalidCertificateRequest, "the limit is 4096"},
		{"no volume", func(t *testing.T) *corev1.Pod { return w.pod(t, "") },
			func(*certificatesv1.PodCertificateRequest, *corev1.Pod) {}, podcert.NoCertificateSource, w.signer},
		{"volume of another signer", func(t *testing.T) *corev1.Pod { return w.pod(t, "troth.dev/other") },
			func(*certificatesv1.PodCertificateRequest, *corev1.Pod) {}, podcert.NoCertificateSource, w.signer},
		{"UID of nobody", nil, func(r *certificatesv1.PodCertificateRequest, _ *corev1.Pod) {
			r.Spec.PodUID = someUID
		}, podcert.PodReplaced, "another UID"},
		{"UID of another pod", nil, func(r *certificatesv1.PodCertificateRequest, _ *corev1.Pod) {
			r.Spec.PodUID = w.pod(t, w.signer).UID
		}, podcert.PodMismatch, "another pod"},
		{"pod of another namespace", nil, func(r *certificatesv1.PodCertificateRequest, p *corev1.Pod) {
			foreign := elsewhere.pod(t, w.signer)
			r.Spec.PodName, r.Spec.PodUID = foreign.Name, foreign.UID
			r.Spec.ServiceAccountUID, r.Spec.NodeName, r.Spec.NodeUID = elsewhere.account.UID, types.NodeName(elsewhere.node.Name), elsewhere.node.UID
		}, podcert.PodMismatch, "in this namespace"},
		{"another service account", nil, func(r *certificatesv1.PodCertificateRequest, _ *corev1.Pod) {
			account := cluster.CreateServiceAccount(t, w.namespace, "admin")
			r.Spec.ServiceAccountName, r.Spec.ServiceAccountUID = account.Name, account.UID
		}, podcert.ServiceAccountMismatch, `"admin"`},
		{"another node", nil, func(r *certificatesv1.PodCertificateRequest, _ *corev1.Pod) {
			r.Spec.NodeName, r.Spec.NodeUID = types.NodeName(other.Name), other.UID
		}, podcert.PodOnOtherNode, other.Name},
		{"finished pod", func(t *testing.T) *corev1.Pod { return cluster.FinishPod(t, w.pod(t, w.signer)) },
			func(*certificatesv1.PodCertificateRequest, *corev1.Pod) {}, podcert.PodFinished, "finished"},
		{"deleted pod", func(t *testing.T) *corev1.Pod {
			pod := cluster.StartPod(t, w.pod(t, w.signer), "10.64.200.1")
			cluster.DeletePod(t, pod, time.Second)
			deadline := time.Now().Add(1500 * time.Millisecond)
			eventually(t, "the end of its grace", func() bool { return time.Now().After(deadline) })
			return pod
		}, func(*certificatesv1.PodCertificateRequest, *corev1.Pod) {}, podcert.PodDeleted, "deleted"},
	} {
		t.Run(test.name, func(t *testing.T) {
			pod := test.pod
			if pod == nil {
				pod = func(t *testing.T) *corev1.Pod { return w.pod(t, w.signer) }
			}
			of := pod(t)
			request := w.request(t, of)
			test.change(request, of)
			before := metrics.counter(t, "troth_pod_certificates_denied_total", string(test.want))
			denied, condition := outcome(t, create(t, cluster.Client(), request))
			if condition.Type != certificatesv1.PodCertificateRequestConditionTypeDenied || condition.Reason != string(test.want) ||
				!strings.Contains(condition.Message, test.detail) {
				t.Fatalf("%s, %s: %q; want it denied with %s: %q", condition.Type, condition.Reason, condition.Message, test.want, test.detail)
			}
			if denied.Status.CertificateChain != "" {
				t.Error("denied with a certificate")
			}
			eventually(t, "the metric", func() bool {
				return metrics.counter(t, "troth_pod_certificates_denied_total", string(test.want)) == before+1
			})
		})
	}
}

// What may come right is not denied: it waits, and the kubelet does not give up.
func TestWaits(t *testing.T) {
	w := newWorld(t)
	signer := w.signerConfig(t, openIssuer(t, authorityConfig(t)))
	metrics := registry(signer)
	background(t, newSigner(t, signer).Run)

	for _, test := range []struct {
		name   string
		change func(*certificatesv1.PodCertificateRequest)
		want   podcert.Reason
	}{
		{"no such pod", func(r *certificatesv1.PodCertificateRequest) { r.Spec.PodName, r.Spec.PodUID = "gone", someUID }, podcert.PodNotFound},
		{"node made anew", func(r *certificatesv1.PodCertificateRequest) { r.Spec.NodeUID = someUID }, podcert.NodeUIDMismatch},
		{"service account made anew", func(r *certificatesv1.PodCertificateRequest) { r.Spec.ServiceAccountUID = someUID }, podcert.ServiceAccountUIDMismatch},
	} {
		t.Run(test.name, func(t *testing.T) {
			request := w.request(t, w.pod(t, w.signer))
			test.change(request)
			created := create(t, cluster.Client(), request)
			eventually(t, "three tries", func() bool {
				if now := look(t, created); len(now.Status.Conditions) > 0 {
					t.Fatalf("became %v", now.Status.Conditions)
				}
				return metrics.counter(t, "troth_pod_certificates_retries_total", string(test.want)) >= 3
			})
		})
	}

	// A pod that a watch has brought before it was put on its node.
	node := w.node.Name
	w.node.Name = ""
	pod := w.pod(t, w.signer)
	w.node.Name = node
	created := create(t, cluster.Client(), w.request(t, pod))
	eventually(t, "a try", func() bool {
		return metrics.counter(t, "troth_pod_certificates_retries_total", string(podcert.PodNotScheduled)) >= 1
	})
	err := cluster.Client().CoreV1().Pods(w.namespace).Bind(t.Context(), &corev1.Binding{
		ObjectMeta: metav1.ObjectMeta{Name: pod.Name, Namespace: w.namespace},
		Target:     corev1.ObjectReference{Kind: "Node", Name: node},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if _, condition := outcome(t, created); condition.Type != certificatesv1.PodCertificateRequestConditionTypeIssued {
		t.Errorf("once it is on its node: %s, %s", condition.Type, condition.Message)
	}

	// The pods that are deleted, with a grace that has not ended, renew.
	running := cluster.StartPod(t, w.pod(t, w.signer), "10.64.200.2")
	cluster.DeletePod(t, running, time.Hour)
	if _, condition := outcome(t, create(t, w.kubelet, w.request(t, running))); condition.Type != certificatesv1.PodCertificateRequestConditionTypeIssued {
		t.Errorf("within its grace: %s, %s", condition.Type, condition.Message)
	}
}

// Every key that both Kubernetes and package ca take.
func TestKeyTypes(t *testing.T) {
	w := newWorld(t)
	background(t, newSigner(t, w.signerConfig(t, openIssuer(t, authorityConfig(t)))).Run)
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	_, edwards, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	rsa3072, err := rsa.GenerateKey(rand.Reader, 3072)
	if err != nil {
		t.Fatal(err)
	}
	for name, der := range map[string][]byte{
		"P-384": stub(t, p384), "Ed25519": stub(t, edwards), "RSA 3072": stub(t, rsa3072),
	} {
		request := w.request(t, w.pod(t, w.signer))
		request.Spec.StubPKCS10Request = der
		issued, condition := outcome(t, create(t, w.kubelet, request))
		if condition.Type != certificatesv1.PodCertificateRequestConditionTypeIssued {
			t.Errorf("%s: %s, %s: %s", name, condition.Type, condition.Reason, condition.Message)
			continue
		}
		if len(chain(t, issued)) != 1 {
			t.Errorf("%s: %d certificates", name, len(chain(t, issued)))
		}
	}
}

// Whatever passes asks for nothing, in the eyes of crypto/x509 too.
func FuzzStub(f *testing.F) {
	f.Add(stub(f, newKey(f)))
	f.Add(asking(f, x509.CertificateRequest{Subject: pkix.Name{CommonName: "admin"}}))
	f.Add(asking(f, x509.CertificateRequest{DNSNames: []string{"example.test"}}))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, der []byte) {
		if podcert.CheckStub(der) != nil {
			return
		}
		request, err := x509.ParseCertificateRequest(der)
		if err != nil {
			return // package ca refuses it
		}
		if len(request.Subject.Names)+len(request.Extensions)+len(request.URIs)+len(request.DNSNames)+
			len(request.EmailAddresses)+len(request.IPAddresses) > 0 || len(request.RawSubject) != 2 {
			t.Fatalf("passes, and asks for %v, %v", request.Subject, request.Extensions)
		}
	})
}

func TestCheckStub(t *testing.T) {
	good := stub(t, newKey(t))
	if err := podcert.CheckStub(good); err != nil {
		t.Errorf("CheckStub(the kubelet's) = %v", err)
	}
	for name, der := range map[string][]byte{
		"nothing":    nil,
		"a piece":    good[:len(good)-1],
		"more":       append(append([]byte(nil), good...), 0),
		"no request": {0x30, 0},
		"too large":  make([]byte, 5000),
	} {
		if podcert.CheckStub(der) == nil {
			t.Errorf("%s passes", name)
		}
	}
}

func TestCheckSignerName(t *testing.T) {
	for name, ok := range map[string]bool{
		"troth.dev/svid": true, "ca.example.org/mesh.svid": true,
		"": false, "troth.dev": false, "svid": false, "/svid": false, "troth/svid": false, "troth.dev/": false, "troth.dev/a/b": false,
		"Troth.dev/svid": false, "kubernetes.io/svid": false, "x.kubernetes.io/svid": false, "troth.dev/svid\n": false,
	} {
		if err := podcert.CheckSignerName(name); (err == nil) != ok {
			t.Errorf("CheckSignerName(%q) = %v", name, err)
		}
	}
}
