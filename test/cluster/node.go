package cluster

import (
	"context"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"time"
)

// node is one node.
type node struct {
	*machine
	address string // on the nodes' network
	pods    string // the range of its pods' addresses
}

const criSocket = "/run/containerd/containerd.sock"

// containerd's configuration. The programs of a node may lack CAP_SYS_RESOURCE, and
// then a container cannot be given the score that it should have.
const containerdConfig = `version = 3
root = "/var/lib/containerd"
state = "/run/containerd"

[grpc]
address = "` + criSocket + `"

[plugins."io.containerd.cri.v1.images"]
snapshotter = "overlayfs"

[plugins."io.containerd.cri.v1.images".pinned_images]
sandbox = "` + PauseImage + `"

[plugins."io.containerd.cri.v1.runtime"]
restrict_oom_score_adj = true

[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"

[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc.options]
BinaryName = "%s"

[plugins."io.containerd.cri.v1.runtime".cni]
bin_dirs = ["/opt/cni/bin"]
conf_dir = "/etc/cni/net.d"
`

// A kubelet's configuration. The node's file system is the computer's, whose use says
// nothing about the node: nothing is evicted.
const kubeletConfig = `apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
authentication: {anonymous: {enabled: false}, webhook: {enabled: true}, x509: {clientCAFile: %[1]s/ca.crt}}
authorization: {mode: Webhook}
tlsCertFile: %[1]s/%[2]s.crt
tlsPrivateKeyFile: %[1]s/%[2]s.key
containerRuntimeEndpoint: unix://` + criSocket + `
cgroupDriver: cgroupfs
failCgroupV1: false
failSwapOn: false
enforceNodeAllocatable: []
evictionHard: {imagefs.available: 0%%, nodefs.available: 0%%, memory.available: 0%%}
imageGCHighThresholdPercent: 100
clusterDNS: [` + dnsService + `]
clusterDomain: cluster.local
resolvConf: /etc/resolv.conf
nodeStatusUpdateFrequency: 2s
serverTLSBootstrap: false
`

const proxyConfig = `apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
clientConnection: {kubeconfig: %s}
mode: nftables
clusterCIDR: ` + podRange + `
conntrack: {maxPerCore: 0, min: 0, tcpCloseWaitTimeout: 0s, tcpEstablishedTimeout: 0s}
healthzBindAddress: 127.0.0.1:10256
metricsBindAddress: 127.0.0.1:10249
`

const networkConfig = `{
  "cniVersion": "1.0.0",
  "name": "pods",
  "plugins": [
    {"type": "bridge", "bridge": "pods0", "isGateway": true, "isDefaultGateway": true, "hairpinMode": true,
     "ipam": {"type": "host-local", "dataDir": "/var/lib/cni/networks", "ranges": [[{"subnet": "%s"}]]}},
    {"type": "portmap", "capabilities": {"portMappings": true}}
  ]
}
`

// startNode starts the programs of a node, and returns when its containers could be.
func (c *Cluster) startNode(ctx context.Context, n *node) error {
	certificate, key, err := c.authority.Issue(&x509.Certificate{
		Subject:     pkix.Name{CommonName: "system:node:" + n.Name, Organization: []string{"system:nodes"}},
		IPAddresses: []net.IP{net.ParseIP(n.address)},
		DNSNames:    []string{n.Name},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	})
	if err != nil {
		return err
	}
	if err := c.writeKubeconfig(n.Name, "system:node:"+n.Name, "system:nodes", "https://"+apiAddress); err != nil {
		return err
	}
	file := func(name string) string { return c.file(n.Name + name) }
	for name, content := range map[string][]byte{
		".crt":             certificate,
		".key":             key,
		"-containerd.toml": fmt.Appendf(nil, containerdConfig, filepath.Join(c.programs.runc, "runc")),
		"-kubelet.yaml":    fmt.Appendf(nil, kubeletConfig, c.dir, n.Name),
		"-proxy.yaml":      fmt.Appendf(nil, proxyConfig, c.kubeconfig("kube-proxy")),
		"-pods.conflist":   fmt.Appendf(nil, networkConfig, n.pods),
	} {
		if err := os.WriteFile(file(name), content, 0o600); err != nil {
			return err
		}
	}
	// Resolvers and plugins of the computer's are none of the node's.
	_, err = n.run(ctx, "/bin/sh", "-euc", `
		mkdir -p /etc/cni/net.d /opt/cni/bin /var/log/pods
		rm -f /etc/cni/net.d/* /etc/resolv.conf
		: >/etc/resolv.conf
		ln -sf /usr/lib/cni/* /opt/cni/bin/
		cp "$1" /etc/cni/net.d/10-pods.conflist`, "sh", file("-pods.conflist"))
	if err != nil {
		return err
	}

	ended, err := n.start("containerd", filepath.Join(c.programs.containerd, "containerd"), "--config", file("-containerd.toml"))
	if err != nil {
		return err
	}
	c.watch(n.Name+"'s containerd", ended)
	err = await(ctx, time.Minute, func(context.Context) error {
		select {
		case <-ended:
			return errors.New("containerd ended")
		default:
		}
		_, err := n.run(ctx, filepath.Join(c.programs.containerd, "ctr"), "--address", criSocket, "version")
		return err
	})
	if err != nil {
		return fmt.Errorf("wait for containerd on %s: %w", n.Name, err)
	}
	for _, p := range []struct {
		name string
		args []string
	}{
		{"kubelet", []string{
			"--config=" + file("-kubelet.yaml"), "--kubeconfig=" + c.kubeconfig(n.Name),
			"--hostname-override=" + n.Name, "--node-ip=" + n.address,
		}},
		{"kube-proxy", []string{"--config=" + file("-proxy.yaml"), "--hostname-override=" + n.Name}},
	} {
		ended, err := n.start(p.name, filepath.Join(c.programs.kubernetes, p.name), p.args...)
		if err != nil {
			return err
		}
		c.watch(n.Name+"'s "+p.name, ended)
	}
	return nil
}

// importImage gives the node's containerd the images in files, which are in the
// cluster's folder.
func (n *node) importImage(ctx context.Context, programs string, files ...string) error {
	for _, file := range files {
		_, err := n.run(ctx, filepath.Join(programs, "ctr"), "--address", criSocket,
			"--namespace", "k8s.io", "images", "import", "--local", file)
		if err != nil {
			return fmt.Errorf("import %q: %w", file, err)
		}
	}
	return nil
}
