// Package cluster gives tests a whole Kubernetes on one computer: a control plane and
// two nodes whose pods run. Only tests import it. It needs Linux, root, the go command,
// a C compiler with libseccomp's headers, and Debian's containernetworking-plugins,
// iproute2 and nftables.
//
// [Start] starts one, [Cluster.Import] gives its nodes an image, and everything else is
// done as with any cluster, through [Cluster.Client] or with [Cluster.Kubectl] and
// [Cluster.Helm]. The first start builds Kubernetes, containerd, runc, CoreDNS and Helm
// from source, in some minutes; they are kept in the user's cache folder.
//
// Every part is what it is in production: RBAC and Node authorization, NodeRestriction,
// an audit log, kubelets with credentials of their nodes, kube-proxy, CNI, CoreDNS.
// The control plane and each node have a process tree, a network, mounts, cgroups and a
// host name of their own. The computer itself gets a listener on the loopback interface,
// which leads to the API server, and nothing else: no address, no route, no rule, no
// mount. All of it ends with [Cluster.Close], and with the process that started it,
// however that ends.
package cluster

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"troth.dev/troth/test/apiserver"
	"troth.dev/troth/test/cluster/machine/spec"
	"troth.dev/troth/test/parts"
	"troth.dev/troth/test/pki"
)

//go:embed dns.yaml
var dns string

// Nodes are the names of a cluster's nodes.
var Nodes = []string{"node-a", "node-b"}

// Config says where a cluster is kept.
type Config struct {
	// Folder gets the cluster's logs and its kubeconfig, and is not removed. It must be
	// empty, and its path is 60 bytes at most, because there are sockets in it.
	Folder string
	// Progress is told what happens in lines of text, for people. It may be nil.
	Progress io.Writer
}

// Cluster is one running cluster.
type Cluster struct {
	dir       string
	progress  io.Writer
	programs  programs
	authority *pki.Authority
	outside   string // the API server's address outside
	admin     *rest.Config
	client    *kubernetes.Clientset
	control   *machine
	nodes     []*node

	mu     sync.Mutex
	closed bool
	dead   []string // programs that ended although the cluster did not
}

// programs are the folders of what was built.
type programs struct{ apiserver, kubernetes, containerd, runc, coredns, helm string }

// Start starts a cluster and returns when both nodes are Ready and its DNS answers: half
// a minute on two idle cores. ctx bounds the start, not the cluster's life: the caller
// calls [Cluster.Close].
func Start(ctx context.Context, config Config) (*Cluster, error) {
	dir, err := filepath.Abs(config.Folder)
	if err != nil {
		return nil, err
	}
	if len(dir) > 60 {
		return nil, fmt.Errorf("the folder %q has a path of more than 60 bytes", dir)
	}
	if os.Geteuid() != 0 {
		return nil, errors.New("a cluster on this computer needs root")
	}
	c := &Cluster{dir: dir, progress: config.Progress}
	if c.progress == nil {
		c.progress = io.Discard
	}
	if err := c.build(ctx); err != nil {
		return nil, err
	}
	if err := c.start(ctx); err != nil {
		err = fmt.Errorf("%w\n%s", err, c.Logs())
		return nil, errors.Join(err, c.Close())
	}
	return c, nil
}

// Close ends the cluster with everything in it, and returns when nothing of it is left
// but its logs.
func (c *Cluster) Close() error {
	c.mu.Lock()
	c.closed = true
	c.mu.Unlock()
	var wait sync.WaitGroup
	ends := make([]error, 1+len(c.nodes))
	for i, n := range c.nodes {
		wait.Go(func() { ends[1+i] = n.close() })
	}
	if c.control != nil {
		wait.Go(func() { ends[0] = c.control.close() })
	}
	wait.Wait()
	c.control, c.nodes = nil, nil
	return errors.Join(ends...)
}

// Kubeconfig returns the path of a kubeconfig file of a member of system:masters, for
// programs outside.
func (c *Cluster) Kubeconfig() string { return c.kubeconfig("admin") }

// Admin returns the same way in.
func (c *Cluster) Admin() *rest.Config { return rest.CopyConfig(c.admin) }

// Client returns a client of the same.
func (c *Cluster) Client() kubernetes.Interface { return c.client }

// AuditLog returns the path of the API server's audit log: one line of JSON for each
// request, by whom and with which outcome.
func (c *Cluster) AuditLog() string { return c.file(auditLog) }

// Logs returns the ends of the logs of all programs, for people.
func (c *Cluster) Logs() string { return tail(c.dir) }

// Died returns the names of the programs that have ended although nobody ended them.
func (c *Cluster) Died() []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return append([]string(nil), c.dead...)
}

// Programs returns the paths of kubectl and of Helm.
func (c *Cluster) Programs() (kubectl, helm string) {
	return filepath.Join(c.programs.kubernetes, "kubectl"), filepath.Join(c.programs.helm, "helm")
}

// Kubectl runs kubectl, with stdin as its input, and returns what it prints to standard output.
func (c *Cluster) Kubectl(ctx context.Context, stdin string, args ...string) (string, error) {
	kubectl, _ := c.Programs()
	return c.command(ctx, stdin, kubectl, args)
}

// Helm runs Helm and returns what it prints to standard output.
func (c *Cluster) Helm(ctx context.Context, args ...string) (string, error) {
	_, helm := c.Programs()
	return c.command(ctx, "", helm, args)
}

// Run runs a program on a node, in its network, with its file system and among its
// processes, and returns what it prints. The program's path is absolute.
func (c *Cluster) Run(ctx context.Context, nodeName, program string, args ...string) (string, error) {
	for _, n := range c.nodes {
		if n.Name == nodeName {
			return n.run(ctx, program, args...)
		}
	}
	return "", fmt.Errorf("there is no node %q", nodeName)
}

// Import gives both nodes the images in a file that docker save would have written.
func (c *Cluster) Import(ctx context.Context, file string) error {
	// Nodes see no change of the computer's files but those in the cluster's folder.
	image, err := os.CreateTemp(c.dir, "import-*.tar")
	if err != nil {
		return err
	}
	defer os.Remove(image.Name())
	defer image.Close()
	source, err := os.Open(file)
	if err != nil {
		return err
	}
	defer source.Close()
	if _, err := io.Copy(image, source); err != nil {
		return fmt.Errorf("read %q: %w", file, err)
	}
	for _, n := range c.nodes {
		if err := n.importImage(ctx, c.programs.containerd, image.Name()); err != nil {
			return err
		}
	}
	return nil
}

func (c *Cluster) command(ctx context.Context, stdin, program string, args []string) (string, error) {
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.Env = append(os.Environ(), "KUBECONFIG="+c.Kubeconfig(), "HOME="+c.dir)
	return output(cmd, stdin)
}

// build finds the programs, and builds those that nobody has built.
func (c *Cluster) build(ctx context.Context) error {
	const folder = "test/cluster/parts/"
	for _, each := range []struct {
		dir *string
		parts.Module
	}{
		{&c.programs.apiserver, apiserver.Parts},
		{&c.programs.kubernetes, parts.Module{Folder: folder + "kubernetes", Cache: "cluster/kubernetes", Kubernetes: true}},
		{&c.programs.containerd, parts.Module{Folder: folder + "containerd", Cache: "cluster/containerd", Tags: []string{"no_btrfs", "no_zfs"}}},
		// Without libseccomp it would start no container that has a profile.
		{&c.programs.runc, parts.Module{Folder: folder + "runc", Cache: "cluster/runc", Tags: []string{"seccomp"}, CGO: true}},
		{&c.programs.coredns, parts.Module{Folder: folder + "coredns", Cache: "cluster/coredns"}},
		{&c.programs.helm, parts.Module{Folder: folder + "helm", Cache: "cluster/helm"}},
	} {
		var err error
		if *each.dir, err = parts.Build(ctx, each.Module); err != nil {
			return err
		}
	}
	return buildProgram(ctx, c.file("machine"), "./test/cluster/machine")
}

func (c *Cluster) start(ctx context.Context) error {
	begin := time.Now()
	listener, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		return err
	}
	defer listener.Close() // the control plane's machine has it too
	c.outside = listener.Addr().String()
	if err := c.writeControlFiles(); err != nil {
		return err
	}
	if c.admin, err = clientcmd.BuildConfigFromFlags("", c.Kubeconfig()); err != nil {
		return err
	}
	c.admin.QPS = -1 // the API server limits by itself
	if c.client, err = kubernetes.NewForConfig(c.admin); err != nil {
		return err
	}
	if err := c.makeMachines(ctx, listener); err != nil {
		return err
	}
	if err := c.startControlPlane(); err != nil {
		return err
	}
	images, err := c.images(ctx)
	if err != nil {
		return err
	}
	err = c.onNodes(func(n *node) error {
		if err := c.startNode(ctx, n); err != nil {
			return err
		}
		return n.importImage(ctx, c.programs.containerd, images...)
	})
	if err != nil {
		return err
	}
	fmt.Fprintf(c.progress, "cluster: the programs run after %s\n", time.Since(begin).Round(time.Millisecond))
	err = await(ctx, 2*time.Minute, func(ctx context.Context) error {
		return c.client.Discovery().RESTClient().Get().AbsPath("/readyz").Do(ctx).Error()
	})
	if err != nil {
		return fmt.Errorf("wait for the API server: %w", err)
	}
	fmt.Fprintf(c.progress, "cluster: the API server is ready after %s\n", time.Since(begin).Round(time.Millisecond))
	if _, err := c.Kubectl(ctx, dns, "apply", "--filename=-"); err != nil {
		return err
	}
	if err := await(ctx, 3*time.Minute, c.nodesReady); err != nil {
		return fmt.Errorf("wait for the nodes: %w", err)
	}
	fmt.Fprintf(c.progress, "cluster: both nodes are Ready after %s\n", time.Since(begin).Round(time.Millisecond))
	if err := await(ctx, 2*time.Minute, c.dnsReady); err != nil {
		return fmt.Errorf("wait for DNS: %w", err)
	}
	fmt.Fprintf(c.progress, "cluster: DNS answers after %s\n", time.Since(begin).Round(time.Millisecond))
	return nil
}

// makeMachines makes the control plane's machine with a bridge, and each node's, which
// a cable joins to it.
func (c *Cluster) makeMachines(ctx context.Context, listener *net.TCPListener) error {
	path := c.programs.containerd + ":" + c.programs.runc + ":/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
	describe := func(name string) (spec.Machine, error) {
		m := spec.Machine{
			Name: name, Folder: c.dir, State: c.file(name), Socket: c.file(name + ".socket"),
			Cgroup: filepath.Base(c.dir) + "-" + name,
		}
		return m, os.Mkdir(m.State, 0o755)
	}
	m, err := describe("control-plane")
	if err != nil {
		return err
	}
	m.Forward = apiAddress
	if c.control, err = startMachine(c.file("machine"), m, path, listener); err != nil {
		return err
	}
	steps := [][]string{
		{"link", "set", "lo", "up"},
		{"link", "add", "nodes", "type", "bridge"},
		{"link", "set", "nodes", "up"},
		{"address", "add", controlAddress + "/24", "dev", "nodes"},
	}
	for _, step := range steps {
		if err := c.control.ip(ctx, step...); err != nil {
			return err
		}
	}

	for i, name := range Nodes {
		m, err := describe(name)
		if err != nil {
			return err
		}
		// What is much, or is mounted over by an overlay file system.
		m.Binds = map[string]string{}
		for _, dir := range []string{"/var/lib/containerd", "/var/lib/kubelet", "/var/lib/cni"} {
			m.Binds[dir] = filepath.Join(m.State, filepath.Base(dir))
			if err := os.Mkdir(m.Binds[dir], 0o755); err != nil {
				return err
			}
		}
		// What the kubelet would set on the whole computer, as it wants to see it.
		m.Values = map[string]string{
			"/proc/sys/vm/overcommit_memory": "1\n", "/proc/sys/vm/panic_on_oom": "0\n",
			"/proc/sys/kernel/panic": "10\n", "/proc/sys/kernel/panic_on_oops": "1\n",
			"/proc/sys/kernel/keys/root_maxkeys": "1000000\n", "/proc/sys/kernel/keys/root_maxbytes": "25000000\n",
		}
		made, err := startMachine(c.file("machine"), m, path, nil)
		if err != nil {
			return err
		}
		c.nodes = append(c.nodes, &node{
			machine: made,
			address: fmt.Sprintf("172.30.0.%d", 11+i),
			pods:    fmt.Sprintf("10.244.%d.0/24", 1+i),
		})
	}
	for _, n := range c.nodes {
		if err := c.join(ctx, n); err != nil {
			return err
		}
	}
	return nil
}

// join lays the cable of a node and tells everybody else the way to its pods.
func (c *Cluster) join(ctx context.Context, n *node) error {
	type step struct {
		at   *machine
		args []string
	}
	steps := []step{
		{c.control, []string{"link", "add", n.Name, "type", "veth", "peer", "name", "eth0", "netns", fmt.Sprint(n.pid)}},
		{c.control, []string{"link", "set", n.Name, "master", "nodes", "up"}},
		{c.control, []string{"route", "add", n.pods, "via", n.address}},
		{n.machine, []string{"link", "set", "lo", "up"}},
		{n.machine, []string{"address", "add", n.address + "/24", "dev", "eth0"}},
		{n.machine, []string{"link", "set", "eth0", "up"}},
		// Services have no other way out of a node until kube-proxy rewrites them.
		{n.machine, []string{"route", "add", "default", "via", controlAddress}},
	}
	for _, other := range c.nodes {
		if other != n {
			steps = append(steps, step{n.machine, []string{"route", "add", other.pods, "via", other.address}})
		}
	}
	for _, s := range steps {
		if err := s.at.ip(ctx, s.args...); err != nil {
			return err
		}
	}
	return nil
}

// watch takes note of a program that ends before the cluster does.
func (c *Cluster) watch(name string, ended <-chan struct{}) {
	go func() {
		<-ended
		c.mu.Lock()
		defer c.mu.Unlock()
		if !c.closed {
			c.dead = append(c.dead, name)
		}
	}()
}

// onNodes does the same on all nodes at once.
func (c *Cluster) onNodes(do func(*node) error) error {
	var wait sync.WaitGroup
	ends := make([]error, len(c.nodes))
	for i, n := range c.nodes {
		wait.Go(func() { ends[i] = do(n) })
	}
	wait.Wait()
	return errors.Join(ends...)
}

func (c *Cluster) nodesReady(ctx context.Context) error {
	if dead := c.Died(); len(dead) > 0 {
		return fmt.Errorf("ended: %q", dead)
	}
	for _, name := range Nodes {
		n, err := c.client.CoreV1().Nodes().Get(ctx, name, metav1.GetOptions{})
		if err != nil {
			return err
		}
		ready := false
		for _, condition := range n.Status.Conditions {
			if condition.Type == corev1.NodeReady {
				ready = condition.Status == corev1.ConditionTrue
				err = errors.New(condition.Message)
			}
		}
		if !ready {
			return fmt.Errorf("node %s is not Ready: %w", name, err)
		}
	}
	return nil
}

func (c *Cluster) dnsReady(ctx context.Context) error {
	deployment, err := c.client.AppsV1().Deployments("kube-system").Get(ctx, "coredns", metav1.GetOptions{})
	if err != nil {
		return err
	}
	for _, condition := range deployment.Status.Conditions {
		if condition.Type == appsv1.DeploymentAvailable && condition.Status == corev1.ConditionTrue {
			return nil
		}
	}
	return errors.New("the deployment of CoreDNS is not available")
}
