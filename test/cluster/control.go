package cluster

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"net"
	"os"
	"path/filepath"

	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"

	"troth.dev/troth/test/pki"
)

// What has which address. All of them are of networks that only the cluster has.
const (
	controlAddress = "172.30.0.1"
	apiAddress     = controlAddress + ":6443"
	serviceRange   = "10.96.0.0/16"
	apiService     = "10.96.0.1"
	dnsService     = "10.96.0.10"
	podRange       = "10.244.0.0/16"
)

// Issuer is the issuer of the cluster's service-account tokens, and the API server's
// own audience.
const Issuer = "https://kubernetes.default.svc.cluster.local"

const auditLog = "audit.log"

// auditPolicy logs each request once, when it is answered or, for a watch, when it
// ends, without bodies: tokens stay out of the log.
const auditPolicy = `
apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [RequestReceived]
rules:
- level: Metadata
`

// writeControlFiles writes what the control plane's programs are configured with.
func (c *Cluster) writeControlFiles() error {
	var err error
	if c.authority, err = pki.NewAuthority(); err != nil {
		return fmt.Errorf("make the cluster's authority: %w", err)
	}
	authorityKey, err := c.authority.KeyPEM()
	if err != nil {
		return err
	}
	certificate, key, err := c.authority.Issue(&x509.Certificate{
		Subject:     pkix.Name{CommonName: "kube-apiserver"},
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1), net.ParseIP(controlAddress), net.ParseIP(apiService)},
		DNSNames:    []string{"kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local"},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	})
	if err != nil {
		return err
	}
	kubeletCertificate, kubeletKey, err := c.authority.IssueClient("kube-apiserver", "system:masters")
	if err != nil {
		return err
	}
	tokens, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	tokenKey, err := pki.PrivateKeyPEM(tokens)
	if err != nil {
		return err
	}
	tokenPublic, err := pki.PublicKeyPEM(tokens)
	if err != nil {
		return err
	}
	for name, content := range map[string][]byte{
		"ca.crt":      c.authority.CertificatePEM(),
		"ca.key":      authorityKey,
		"serving.crt": certificate,
		"serving.key": key,
		"kubelet.crt": kubeletCertificate,
		"kubelet.key": kubeletKey,
		"tokens.key":  tokenKey,
		"tokens.pub":  tokenPublic,
		"audit.yaml":  []byte(auditPolicy),
	} {
		if err := os.WriteFile(c.file(name), content, 0o600); err != nil {
			return err
		}
	}
	for name, user := range map[string]struct{ user, group, server string }{
		"admin":                   {"admin", "system:masters", "https://" + c.outside},
		"kube-controller-manager": {"system:kube-controller-manager", "", "https://" + apiAddress},
		"kube-scheduler":          {"system:kube-scheduler", "", "https://" + apiAddress},
		"kube-proxy":              {"system:kube-proxy", "", "https://" + apiAddress},
	} {
		if err := c.writeKubeconfig(name, user.user, user.group, user.server); err != nil {
			return err
		}
	}
	return nil
}

// writeKubeconfig writes the way in of a user as the file NAME.kubeconfig.
func (c *Cluster) writeKubeconfig(name, user, group, server string) error {
	certificate, key, err := c.authority.IssueClient(user, group)
	if err != nil {
		return err
	}
	const entry = "cluster"
	return clientcmd.WriteToFile(clientcmdapi.Config{
		Clusters: map[string]*clientcmdapi.Cluster{entry: {
			Server:                   server,
			CertificateAuthorityData: c.authority.CertificatePEM(),
		}},
		AuthInfos:      map[string]*clientcmdapi.AuthInfo{entry: {ClientCertificateData: certificate, ClientKeyData: key}},
		Contexts:       map[string]*clientcmdapi.Context{entry: {Cluster: entry, AuthInfo: entry}},
		CurrentContext: entry,
	}, c.kubeconfig(name))
}

func (c *Cluster) kubeconfig(name string) string { return c.file(name + ".kubeconfig") }

func (c *Cluster) file(name string) string { return filepath.Join(c.dir, name) }

// startControlPlane starts etcd and the programs that keep a cluster. Each waits for
// those before it by itself.
func (c *Cluster) startControlPlane() error {
	const etcd, peers = "http://127.0.0.1:2379", "http://127.0.0.1:2380"
	for _, p := range []struct {
		name, program string
		args          []string
	}{
		{"etcd", filepath.Join(c.programs.apiserver, "server"), []string{
			"--name=test", "--data-dir=" + filepath.Join(c.control.State, "etcd"),
			"--listen-client-urls=" + etcd, "--advertise-client-urls=" + etcd,
			"--listen-peer-urls=" + peers, "--initial-advertise-peer-urls=" + peers, "--initial-cluster=test=" + peers,
			"--unsafe-no-fsync", // nothing here has to survive a crash of the computer
			"--log-level=warn",
		}},
		{"kube-apiserver", filepath.Join(c.programs.apiserver, "kube-apiserver"), []string{
			"--etcd-servers=" + etcd,
			"--advertise-address=" + controlAddress,
			"--secure-port=6443",
			"--tls-cert-file=" + c.file("serving.crt"), "--tls-private-key-file=" + c.file("serving.key"),
			"--client-ca-file=" + c.file("ca.crt"),
			"--kubelet-client-certificate=" + c.file("kubelet.crt"), "--kubelet-client-key=" + c.file("kubelet.key"),
			"--kubelet-certificate-authority=" + c.file("ca.crt"),
			"--kubelet-preferred-address-types=InternalIP",
			"--service-account-issuer=" + Issuer,
			"--service-account-signing-key-file=" + c.file("tokens.key"), "--service-account-key-file=" + c.file("tokens.pub"),
			"--service-cluster-ip-range=" + serviceRange,
			"--authorization-mode=Node,RBAC",
			"--enable-admission-plugins=NodeRestriction",
			"--allow-privileged",
			"--audit-policy-file=" + c.file("audit.yaml"), "--audit-log-path=" + c.AuditLog(),
		}},
		{"kube-controller-manager", filepath.Join(c.programs.kubernetes, "kube-controller-manager"), []string{
			"--kubeconfig=" + c.kubeconfig("kube-controller-manager"),
			"--use-service-account-credentials",
			"--service-account-private-key-file=" + c.file("tokens.key"),
			"--root-ca-file=" + c.file("ca.crt"),
			"--cluster-signing-cert-file=" + c.file("ca.crt"), "--cluster-signing-key-file=" + c.file("ca.key"),
			"--cluster-cidr=" + podRange, "--service-cluster-ip-range=" + serviceRange,
			"--bind-address=127.0.0.1", "--leader-elect=false",
		}},
		{"kube-scheduler", filepath.Join(c.programs.kubernetes, "kube-scheduler"), []string{
			"--kubeconfig=" + c.kubeconfig("kube-scheduler"),
			"--bind-address=127.0.0.1", "--leader-elect=false",
		}},
	} {
		ended, err := c.control.start(p.name, p.program, p.args...)
		if err != nil {
			return err
		}
		c.watch(p.name, ended)
	}
	return nil
}
