package apiserver

import (
	"crypto"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"testing"

	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"

	"troth.dev/troth/test/pki"
)

// Admin returns the way in of a member of system:masters, who may do anything.
func (c *Cluster) Admin() *rest.Config { return c.admin }

// Node returns the way in of the kubelet of the node of that name, whether or
// not there is such a node: the Node authorizer and NodeRestriction apply.
func (c *Cluster) Node(t testing.TB, name string) *rest.Config {
	t.Helper()
	config, err := c.clientConfig("system:node:"+name, "system:nodes")
	if err != nil {
		t.Fatalf("make a client certificate for node %q: %v", name, err)
	}
	return config
}

// Bearer returns the way in of whoever presents a token, such as one of
// [Cluster.AutomountToken].
func (c *Cluster) Bearer(token string) *rest.Config {
	config := c.anonymous()
	config.BearerToken = token
	return config
}

// Kubeconfig writes config as a kubeconfig file that lives as long as the test
// and returns its path.
func (c *Cluster) Kubeconfig(t testing.TB, config *rest.Config) string {
	t.Helper()
	const name = "test"
	path := filepath.Join(t.TempDir(), "kubeconfig")
	err := clientcmd.WriteToFile(clientcmdapi.Config{
		Clusters: map[string]*clientcmdapi.Cluster{name: {
			Server:                   config.Host,
			CertificateAuthorityData: config.CAData,
		}},
		AuthInfos: map[string]*clientcmdapi.AuthInfo{name: {
			ClientCertificateData: config.CertData,
			ClientKeyData:         config.KeyData,
			Token:                 config.BearerToken,
		}},
		Contexts:       map[string]*clientcmdapi.Context{name: {Cluster: name, AuthInfo: name}},
		CurrentContext: name,
	}, path)
	if err != nil {
		t.Fatalf("write kubeconfig: %v", err)
	}
	return path
}

func (c *Cluster) anonymous() *rest.Config {
	return &rest.Config{
		Host:            fmt.Sprintf("https://127.0.0.1:%d", c.port),
		TLSClientConfig: rest.TLSClientConfig{CAData: c.authority.CertificatePEM()},
		QPS:             -1, // the API server limits by itself
	}
}

func (c *Cluster) clientConfig(user, group string) (*rest.Config, error) {
	certificate, key, err := c.authority.IssueClient(user, group)
	if err != nil {
		return nil, err
	}
	config := c.anonymous()
	config.CertData, config.KeyData = certificate, key
	return config, nil
}

// issueServing returns the API server's certificate and key in PEM.
func (c *Cluster) issueServing() (certificate, key []byte, err error) {
	return c.authority.Issue(&x509.Certificate{
		Subject:     pkix.Name{CommonName: "kube-apiserver"},
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	})
}

// tokenKey is a key that signs service-account tokens, as a pair of files.
type tokenKey struct{ private, public string }

func writeTokenKey(dir, name string, signer crypto.Signer) (tokenKey, error) {
	private, err := pki.PrivateKeyPEM(signer)
	if err != nil {
		return tokenKey{}, err
	}
	public, err := pki.PublicKeyPEM(signer)
	if err != nil {
		return tokenKey{}, err
	}
	key := tokenKey{private: filepath.Join(dir, name+".key"), public: filepath.Join(dir, name+".pub")}
	if err := os.WriteFile(key.private, private, 0o600); err != nil {
		return tokenKey{}, err
	}
	return key, os.WriteFile(key.public, public, 0o644)
}
