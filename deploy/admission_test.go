package deploy_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"math/big"
	"strings"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	authenticationv1 "k8s.io/api/authentication/v1"
	certificatesv1 "k8s.io/api/certificates/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"troth.dev/troth/test/apiserver"
)

// Who may do what identities are made of. The editor may do all of it by RBAC, in
// every namespace: what is refused here, admission refuses.
func (m *manifests) testAdmission(t *testing.T) {
	const node = "admission"
	m.CreateNode(t, node)
	shop := m.CreateNamespace(t, "shop")
	cart, editor, maker := m.CreateServiceAccount(t, shop, "cart"), m.CreateServiceAccount(t, shop, "editor"), m.CreateServiceAccount(t, shop, "maker")
	everything := []rbacv1.PolicyRule{
		{APIGroups: []string{""}, Resources: []string{"serviceaccounts/token", "pods", "configmaps"}, Verbs: []string{"*"}},
		{APIGroups: []string{"certificates.k8s.io"}, Resources: []string{"podcertificaterequests", "clustertrustbundles", "signers"}, Verbs: []string{"*"}},
	}
	m.grant(t, editor, everything...)
	m.grant(t, maker, append(everything, rbacv1.PolicyRule{
		APIGroups: []string{"troth.dev"}, Resources: []string{"operatortokens"}, ResourceNames: []string{"operator"}, Verbs: []string{"create"},
	})...)

	// Its certificate and its token are in its volumes, or its own kubelet could not ask
	// for them either.
	cartPod, err := m.Client().CoreV1().Pods(shop).Create(t.Context(), &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: "cart"},
		Spec: corev1.PodSpec{
			ServiceAccountName: cart.Name, NodeName: node, Containers: []corev1.Container{{Name: "main", Image: "none"}},
			Volumes: []corev1.Volume{{Name: "svid", VolumeSource: corev1.VolumeSource{Projected: &corev1.ProjectedVolumeSource{Sources: []corev1.VolumeProjection{
				{PodCertificate: &corev1.PodCertificateProjection{SignerName: signer, KeyType: "ECDSAP256", CredentialBundlePath: "svid.pem"}},
				{ServiceAccountToken: &corev1.ServiceAccountTokenProjection{Audience: audience, Path: "token"}},
			}}}}},
		},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	serverPod := m.serverPod(t, node)
	bearer := func(account *corev1.ServiceAccount) *kubernetes.Clientset {
		p := m.CreatePod(t, apiserver.Pod{Namespace: account.Namespace, Name: account.Name, ServiceAccount: account.Name, Node: node})
		return client(t, m.Bearer(m.AutomountToken(t, p)))
	}
	who := map[string]*kubernetes.Clientset{
		"kubelet": client(t, m.Node(t, node)),
		"admin":   client(t, m.Admin()),
		"editor":  bearer(editor),
		"maker":   bearer(maker),
		"server":  client(t, m.Bearer(m.kubeletToken(t, serverPod, ""))),
	}

	csr := newCSR(t)
	request := func(signer string) func(context.Context, *kubernetes.Clientset) error {
		return func(ctx context.Context, c *kubernetes.Clientset) error {
			_, err := c.CertificatesV1().PodCertificateRequests(shop).Create(ctx, &certificatesv1.PodCertificateRequest{
				ObjectMeta: metav1.ObjectMeta{GenerateName: "request-"},
				Spec: certificatesv1.PodCertificateRequestSpec{
					SignerName: signer, PodName: cartPod.Name, PodUID: cartPod.UID, ServiceAccountName: cart.Name, ServiceAccountUID: cart.UID,
					NodeName: node, NodeUID: m.nodeUID(t, node), StubPKCS10Request: csr,
				},
			}, metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}})
			return err
		}
	}
	token := func(namespace, account string, bound *corev1.Pod, audiences ...string) func(context.Context, *kubernetes.Clientset) error {
		return func(ctx context.Context, c *kubernetes.Clientset) error {
			r := &authenticationv1.TokenRequest{Spec: authenticationv1.TokenRequestSpec{Audiences: audiences}}
			if bound != nil {
				r.Spec.BoundObjectRef = &authenticationv1.BoundObjectReference{APIVersion: "v1", Kind: "Pod", Name: bound.Name, UID: bound.UID}
			}
			_, err := c.CoreV1().ServiceAccounts(namespace).CreateToken(ctx, account, r, metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}})
			return err
		}
	}
	m.CreateServiceAccount(t, shop, "operator")
	m.CreateServiceAccount(t, shop, "troth-server")
	anchor := newRoot(t)
	theirs := m.createBundle(t, "example.org:theirs:root", "example.org/theirs", anchor)
	bundle := func(name, signer string) func(context.Context, *kubernetes.Clientset) error {
		return func(ctx context.Context, c *kubernetes.Clientset) error {
			_, err := c.CertificatesV1().ClusterTrustBundles().Create(ctx, newBundle(name, signer, anchor), metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}})
			return err
		}
	}
	server := who["server"]
	if _, err := server.CertificatesV1().ClusterTrustBundles().Create(t.Context(), newBundle(bundleName, signer, anchor), metav1.CreateOptions{}); err != nil {
		t.Fatalf("the server publishes the trust bundle: %v", err)
	}
	change := func(name string) func(context.Context, *kubernetes.Clientset) error {
		return func(ctx context.Context, c *kubernetes.Clientset) error {
			patch, err := json.Marshal(map[string]any{"spec": map[string]string{"trustBundle": anchor + newRoot(t)}})
			if err != nil {
				return err
			}
			_, err = c.CertificatesV1().ClusterTrustBundles().Patch(ctx, name, types.MergePatchType, patch, metav1.PatchOptions{DryRun: []string{metav1.DryRunAll}})
			return err
		}
	}
	remove := func(name string) func(context.Context, *kubernetes.Clientset) error {
		return func(ctx context.Context, c *kubernetes.Clientset) error {
			return c.CertificatesV1().ClusterTrustBundles().Delete(ctx, name, metav1.DeleteOptions{DryRun: []string{metav1.DryRunAll}})
		}
	}
	mounting := func(namespace, folder string, readOnly, early bool) func(context.Context, *kubernetes.Clientset) error {
		return func(ctx context.Context, c *kubernetes.Clientset) error {
			p := &corev1.Pod{
				ObjectMeta: metav1.ObjectMeta{GenerateName: "mounting-"},
				Spec: corev1.PodSpec{
					Containers:     []corev1.Container{{Name: "main", Image: "none"}},
					InitContainers: []corev1.Container{{Name: "early", Image: "none"}},
					Volumes:        []corev1.Volume{{Name: "host", VolumeSource: corev1.VolumeSource{HostPath: &corev1.HostPathVolumeSource{Path: folder}}}},
				},
			}
			mount := []corev1.VolumeMount{{Name: "host", MountPath: "/host", ReadOnly: readOnly}}
			if early {
				p.Spec.InitContainers[0].VolumeMounts = mount
			} else {
				p.Spec.Containers[0].VolumeMounts = mount
			}
			_, err := c.CoreV1().Pods(namespace).Create(ctx, p, metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}})
			return err
		}
	}
	for _, name := range []string{shop, nodeNamespace} {
		// There is no controller to make it.
		m.CreateServiceAccount(t, name, "default")
	}

	const (
		onlyKubelet   = "only the kubelet of the pod's node may ask for its certificate"
		onlyBound     = "only a kubelet may ask for a bound token of the audience " + audience
		onlyOperators = "it takes the right to create operatortokens"
		onlyOurs      = "only a kubelet may ask for tokens of Troth's own service accounts"
		onlyServer    = "only troth-server may write the trust bundle"
		onlyReading   = "mount /run/troth with readOnly"
		onlyAgent     = "/run/troth-agent is for the agent alone"
	)
	for _, c := range []struct {
		who, what string
		does      func(context.Context, *kubernetes.Clientset) error
		want      string // in the refusal; empty if it is accepted
	}{
		{"editor", "asks for a pod's certificate", request(signer), onlyKubelet},
		{"admin", "asks for a pod's certificate", request(signer), onlyKubelet},
		{"kubelet", "asks for a pod's certificate", request(signer), ""},
		{"editor", "asks for a pod's certificate of another signer", request("example.org/theirs"), ""},

		{"editor", "asks for a pod's token", token(shop, cart.Name, cartPod, audience), onlyBound},
		{"admin", "asks for a pod's token", token(shop, cart.Name, cartPod, audience), onlyBound},
		{"maker", "asks for a pod's token", token(shop, cart.Name, cartPod, audience), onlyBound},
		{"editor", "hides the audience among others", token(shop, cart.Name, cartPod, "a", audience), onlyBound},
		{"kubelet", "asks for a pod's token", token(shop, cart.Name, cartPod, audience), ""},
		{"editor", "asks for a pod's token for others", token(shop, cart.Name, cartPod, "https://example.org"), ""},
		{"editor", "asks for an operator's token", token(shop, "operator", nil, audience), onlyOperators},
		{"maker", "asks for an operator's token", token(shop, "operator", nil, audience), ""},
		{"maker", "asks for another's token", token(shop, cart.Name, nil, audience), onlyOperators},
		{"admin", "asks for an operator's token", token(shop, "operator", nil, audience), ""},
		{"editor", "asks for a token for nobody in particular", token(shop, "operator", nil), ""},

		{"editor", "asks for the server's token", token(systemNamespace, "troth-server", nil), onlyOurs},
		{"admin", "asks for the server's token", token(systemNamespace, "troth-server", serverPod), onlyOurs},
		{"admin", "asks for the agent's token", token(nodeNamespace, "troth-agent", nil), onlyOurs},
		{"kubelet", "asks for the server's token", token(systemNamespace, "troth-server", serverPod), ""},
		{"editor", "asks for the token of one that is only called so", token(shop, "troth-server", nil), ""},

		{"editor", "publishes a bundle of our signer", bundle("troth.dev:svid:other", signer), onlyServer},
		{"editor", "changes our bundle", change(bundleName), onlyServer},
		{"admin", "changes our bundle", change(bundleName), onlyServer},
		{"editor", "deletes our bundle", remove(bundleName), onlyServer},
		{"admin", "deletes our bundle", remove(bundleName), onlyServer},
		{"server", "changes our bundle", change(bundleName), ""},
		{"editor", "publishes a bundle of another signer", bundle("example.org:theirs:other", "example.org/theirs"), ""},
		{"editor", "publishes a bundle of no signer", bundle("theirs", ""), ""},
		{"editor", "changes another signer's bundle", change(theirs), ""},
		{"editor", "deletes another signer's bundle", remove(theirs), ""},
		{"server", "deletes another signer's bundle", remove(theirs), "cannot delete resource"},
		{"server", "publishes another signer's bundle", bundle("example.org:theirs:other", "example.org/theirs"), "not permitted to attest"},

		{"editor", "mounts the Workload API's folder to write", mounting(shop, "/run/troth", false, false), onlyReading},
		{"editor", "mounts it in an init container", mounting(shop, "/run/troth/", false, true), onlyReading},
		{"editor", "mounts it by another spelling", mounting(shop, "/var/run//./troth", false, false), onlyReading},
		{"editor", "mounts its socket to write", mounting(shop, "/run/troth/workload.sock", false, false), onlyReading},
		{"editor", "mounts the Workload API's folder to read", mounting(shop, "/run/troth", true, false), ""},
		{"editor", "mounts the agent's folder", mounting(shop, "/run/troth-agent", true, false), onlyAgent},
		{"editor", "mounts what is in the agent's folder", mounting(shop, "/run/troth-agent/keeper.sock", true, true), onlyAgent},
		{"editor", "mounts another folder", mounting(shop, "/run/trothful", false, false), ""},
		{"admin", "mounts the agent's folder in the agents' namespace", mounting(nodeNamespace, "/run/troth-agent", false, false), ""},
	} {
		name := c.who + " " + c.what
		if c.want == "" {
			if err := c.does(t.Context(), who[c.who]); err != nil {
				t.Errorf("%s: %v, want it accepted", name, err)
			}
			continue
		}
		// A policy is in force a moment after it was applied.
		eventually(t, name, func(ctx context.Context) error {
			switch err := c.does(ctx, who[c.who]); {
			case err == nil:
				return fmt.Errorf("it is accepted, want a refusal with %q", c.want)
			case !strings.Contains(err.Error(), c.want):
				return fmt.Errorf("%w, want a refusal with %q", err, c.want)
			}
			return nil
		})
	}
}

// serverPod returns a pod of the server as its Deployment makes it, which runs.
func (m *manifests) serverPod(t *testing.T, node string) *corev1.Pod {
	t.Helper()
	deployment := find[appsv1.Deployment](t, m, "Deployment", "troth-server")
	p, err := m.Client().CoreV1().Pods(systemNamespace).Create(t.Context(), pod(systemNamespace, &deployment.Spec.Template, node), metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return m.StartPod(t, p, "10.1.1.1")
}

// kubeletToken returns a token of a pod's service account as the kubelet of its node
// gets it; an empty audience is the API server's.
func (m *manifests) kubeletToken(t *testing.T, p *corev1.Pod, audience string) string {
	t.Helper()
	r := &authenticationv1.TokenRequest{Spec: authenticationv1.TokenRequestSpec{
		BoundObjectRef: &authenticationv1.BoundObjectReference{APIVersion: "v1", Kind: "Pod", Name: p.Name, UID: p.UID},
	}}
	if audience != "" {
		r.Spec.Audiences = []string{audience}
	}
	kubelet := client(t, m.Node(t, p.Spec.NodeName))
	// The Node authorizer learns of the pod by a watch.
	eventually(t, "a token by the kubelet", func(ctx context.Context) error {
		answer, err := kubelet.CoreV1().ServiceAccounts(p.Namespace).CreateToken(ctx, p.Spec.ServiceAccountName, r.DeepCopy(), metav1.CreateOptions{})
		if err == nil {
			r = answer
		}
		return err
	})
	return r.Status.Token
}

// grant gives an account rights in the whole cluster.
func (m *manifests) grant(t *testing.T, account *corev1.ServiceAccount, rules ...rbacv1.PolicyRule) {
	t.Helper()
	name := account.Namespace + "-" + account.Name
	rbac := m.Client().RbacV1()
	_, err := rbac.ClusterRoles().Create(t.Context(), &rbacv1.ClusterRole{ObjectMeta: metav1.ObjectMeta{Name: name}, Rules: rules}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	_, err = rbac.ClusterRoleBindings().Create(t.Context(), &rbacv1.ClusterRoleBinding{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: name},
		Subjects:   []rbacv1.Subject{{Kind: rbacv1.ServiceAccountKind, Namespace: account.Namespace, Name: account.Name}},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
}

func newBundle(name, signer, anchor string) *certificatesv1.ClusterTrustBundle {
	return &certificatesv1.ClusterTrustBundle{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec:       certificatesv1.ClusterTrustBundleSpec{SignerName: signer, TrustBundle: anchor},
	}
}

func (m *manifests) createBundle(t *testing.T, name, signer, anchor string) string {
	t.Helper()
	if _, err := m.Client().CertificatesV1().ClusterTrustBundles().Create(t.Context(), newBundle(name, signer, anchor), metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	return name
}

func client(t *testing.T, config *rest.Config) *kubernetes.Clientset {
	t.Helper()
	c, err := kubernetes.NewForConfig(config)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// newCSR returns a request that says nothing but which key is held, as kubelets make it.
func newCSR(t *testing.T) []byte {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		t.Fatal(err)
	}
	return csr
}

// newRoot returns the certificate of an authority, in PEM.
func newRoot(t *testing.T) string {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "root"}, NotBefore: time.Now(), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
}
