package e2e_test

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"

	trothv1 "troth.dev/troth/api/troth/v1"
	"troth.dev/troth/deploy"
	"troth.dev/troth/test/apiserver"
)

// mesh is a control plane with nodes whose pods have networks: each node and each
// pod is a network namespace, the nodes are joined by a switch, and a pod reaches
// another by its node's routes, as in a cluster. Only what the nodes need to reach
// troth-server leaves those namespaces.
type mesh struct {
	*plane
	hub     netns // the switch, and somebody who is in no node
	outside addresses
	hosts   []*host
	asked   trothv1.DirectoryServiceClient // once it was
}

// host is a node of a mesh.
type host struct {
	*node
	*cable

	ns        netns
	addresses addresses // between the nodes
	pods      subnet    // of its pods; the first addresses are the node's own there
	dir       string    // of the sockets
	keeper    *process
	taken     byte // of pods, the addresses that have been given out
}

// meshConfig is what a test demands of its mesh.
type meshConfig struct {
	life   time.Duration // of SVIDs; zero means an hour
	nodes  int           // zero means two
	server []string      // more flags
	agent  []string      // more flags
	plain  bool          // nothing is captured: the network as it is without Troth
}

// newMesh starts a control plane and the agents of its nodes.
func newMesh(t *testing.T, c meshConfig) *mesh {
	t.Helper()
	for _, program := range []string{"nft", "nsenter", "nginx", "curl", "nc", "openssl"} {
		if _, err := exec.LookPath(program); err != nil {
			t.Fatalf("%v (apt-get install nftables util-linux nginx-light curl netcat-openbsd openssl, or make deps)", err)
		}
	}
	if c.life == 0 {
		c.life = time.Hour
	}
	if c.nodes == 0 {
		c.nodes = 2
	}
	definition, err := deploy.CRDs.ReadFile("crds/peerauthentications.security.istio.io.yaml")
	if err != nil {
		t.Fatal(err)
	}
	cluster.ApplyCRD(t, definition)
	// Agents of its own: no other test's agents are waited for when it rotates.
	agents := cluster.CreateServiceAccount(t, system, "mesh-agents-").Name
	m := &mesh{plane: newPlane(t, c.life, append([]string{"-agents=" + system + "/" + agents}, c.server...)...)}
	m.agents = agents
	between := newSubnet()
	m.outside = between.at(1)
	for n := range c.nodes {
		h := &host{node: m.newNode(t), cable: newCable(t), addresses: between.at(byte(10 + n)), pods: newSubnet(), taken: 1}
		h.ns = netns(h.cable.namespace)
		m.hosts = append(m.hosts, h)
	}
	m.join(t)
	for _, h := range m.hosts {
		h.kubeProxy(t)
		if !c.plain {
			h.prepare(t, m, c.agent)
			h.startAgent(t)
		}
	}
	return m
}

// join lays the cables between the nodes, and tells each where the others' pods are.
func (m *mesh) join(t *testing.T) {
	t.Helper()
	m.hub = newNamespace(t, m.hosts[0].cable.namespace+"h")
	hub := []string{
		"link add switch type bridge",
		fmt.Sprintf("addr add %s/24 dev switch", m.outside.v4), fmt.Sprintf("addr add %s/64 dev switch", m.outside.v6),
		"link set switch up",
	}
	for n, h := range m.hosts {
		h.ns.configure(t)
		h.ns.set(t, map[string]string{"ipv4/ip_forward": "1", "ipv6/conf/all/forwarding": "1"})
		hub = append(hub,
			fmt.Sprintf("link add port%d type veth peer name eth0 netns %s", n, h.ns),
			fmt.Sprintf("link set port%d master switch up", n),
		)
	}
	ip(t, m.hub, strings.Join(hub, "\n"))
	var routes []string
	for _, h := range m.hosts {
		lines := []string{
			fmt.Sprintf("addr add %s/24 dev eth0", h.addresses.v4), fmt.Sprintf("addr add %s/64 dev eth0", h.addresses.v6),
			"link set eth0 up",
		}
		for _, other := range m.hosts {
			if other != h {
				lines = append(lines, other.route("eth0")...)
			}
		}
		ip(t, h.ns, strings.Join(lines, "\n"))
		routes = append(routes, h.route("switch")...)
	}
	ip(t, m.hub, strings.Join(routes, "\n"))
}

// route is how others reach the pods of the node.
func (h *host) route(dev string) []string {
	return []string{
		fmt.Sprintf("route add %s/24 via %s dev %s", h.pods.v4, h.addresses.v4, dev),
		fmt.Sprintf("route add %s/64 via %s dev %s", h.pods.v6, h.addresses.v6, dev),
	}
}

// prepare makes the flags of the node's agent, and starts its keeper.
func (h *host) prepare(t *testing.T, m *mesh, flags []string) {
	t.Helper()
	dir, err := os.MkdirTemp("", "te") // a socket's path is short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	h.dir = dir
	server := newBalancer(t, []*replica{{address: m.address}}).listen(t, h.cable.address)
	h.node.args = append(append(h.node.args,
		"-server="+server,
		"-capture",
		"-records="+filepath.Join(dir, "pods"),
		"-host-root=/",
		"-admin=127.0.0.1:15000",
		"-cni-socket="+filepath.Join(dir, "cni.sock"),
		"-keeper-socket="+filepath.Join(dir, "keeper.sock"),
		"-kubelet-address=node",
	), flags...)
	h.keeper = startCommand(t, "the keeper", h.cable.command("troth-agent", "keep", "-socket="+filepath.Join(dir, "keeper.sock")))
}

// two starts a pod that calls and one that is called, on different nodes. The latter
// echoes at port 9000.
func (m *mesh) two(t *testing.T) (caller, callee *sandbox) {
	t.Helper()
	caller = m.sandbox(t, m.hosts[0], sandboxConfig{account: m.account(t, "cart")})
	callee = m.sandbox(t, m.hosts[1], sandboxConfig{account: m.account(t, "web"), labels: map[string]string{"app": "web"}})
	callee.echoing(t, echoPort)
	return caller, callee
}

// echoPort is where pods echo.
const echoPort = 9000

// uncaptured starts a pod that has opted out.
func (m *mesh) uncaptured(t *testing.T, h *host, account string) *sandbox {
	t.Helper()
	return m.sandbox(t, h, sandboxConfig{account: account, labels: map[string]string{"troth.dev/capture": "disabled"}})
}

// policy applies a PeerAuthentication in the namespace of the pods, whose spec is
// the fields in YAML.
func (m *mesh) policy(t *testing.T, name, spec string) {
	t.Helper()
	cluster.ApplyPolicy(t, "v1", m.shop, name, "{"+spec+"}")
}

// strict is the spec of a policy.
const strict = "mtls: {mode: STRICT}"

// kubelet is where the node's own connections to its pods come from.
func (h *host) kubelet() addresses { return h.pods.at(1) }

// startAgent starts the node's agent, at first or again.
func (h *host) startAgent(t *testing.T) {
	t.Helper()
	h.daemon = startCommand(t, "troth-agent", h.cable.command("troth-agent", h.node.args...))
}

// connectionLine is the agent's line of a connection that has ended.
type connectionLine struct {
	Message     string        `json:"msg"`
	Direction   string        `json:"direction"`
	Protocol    string        `json:"protocol"`
	Pod         string        `json:"pod"`
	Source      string        `json:"source"`
	Destination string        `json:"destination"`
	Service     string        `json:"service"`
	Peer        string        `json:"peer"`
	PeerPod     string        `json:"peer_pod"`
	Policy      string        `json:"policy"`
	BytesIn     int64         `json:"bytes_in"`
	BytesOut    int64         `json:"bytes_out"`
	Duration    time.Duration `json:"duration"`
	Reason      string        `json:"reason"`
	Error       string        `json:"err"`
}

// connections returns the agent's lines of connections of a pod that have ended and
// fit.
func (h *host) connections(s *sandbox, direction string, fits func(connectionLine) bool) []connectionLine {
	return written(h.daemon, func(l connectionLine) bool {
		return l.Message == "connection ended" && l.Pod == string(s.UID) && l.Direction == direction && fits(l)
	})
}

// connection waits for such a line.
func (h *host) connection(t *testing.T, s *sandbox, direction, what string, fits func(connectionLine) bool) connectionLine {
	t.Helper()
	var found []connectionLine
	late := time.Now().Add(patience / 3)
	eventually(t, fmt.Sprintf("the agent's line of %s, %s", what, direction), func() bool {
		found = h.connections(s, direction, fits)
		return len(found) > 0 || time.Now().After(late)
	})
	if len(found) == 0 {
		all, _ := json.MarshalIndent(h.connections(s, direction, func(connectionLine) bool { return true }), "", "\t")
		t.Fatalf("the agent has no line of %s; of the pod's connections, %s, it has:\n%s", what, direction, all)
	}
	return found[0]
}

// sandbox is a pod with its network namespace.
type sandbox struct {
	*corev1.Pod
	addresses

	ns   netns
	host *host
	link string // its other end, on the node
	m    *mesh
}

// sandboxConfig is what a test demands of a pod.
type sandboxConfig struct {
	account string // has to exist
	labels  map[string]string
	ports   []int32
}

// sandbox starts a pod as a kubelet does: its network is made, and the plugin is
// asked, before anything runs in it.
func (m *mesh) sandbox(t *testing.T, h *host, c sandboxConfig) *sandbox {
	t.Helper()
	s := m.unplugged(t, h, c)
	if output, err := s.cni(t, "ADD"); err != nil {
		t.Fatalf("CNI ADD: %v\n%s", err, output)
	}
	return s.started(t)
}

// unplugged is a pod with a network whose plugin has not been asked: nothing of it is
// captured, and it does not run yet.
func (m *mesh) unplugged(t *testing.T, h *host, c sandboxConfig) *sandbox {
	t.Helper()
	h.taken++
	s := &sandbox{
		Pod: cluster.CreatePod(t, apiserver.Pod{
			Namespace: m.shop, Name: c.account + "-", ServiceAccount: c.account, Node: h.name, Labels: c.labels, Ports: c.ports, Pending: true,
		}),
		addresses: h.pods.at(h.taken), host: h, m: m, link: fmt.Sprintf("pod%d", h.taken),
	}
	s.ns = newNamespace(t, fmt.Sprintf("%sp%d", h.ns, h.taken))
	gateway := h.pods.at(1)
	ip(t, h.ns, fmt.Sprintf(`link add %[1]s type veth peer name eth0 netns %[2]s
addr add %[3]s/32 dev %[1]s
addr add %[4]s/128 dev %[1]s
link set %[1]s up
route add %[5]s/32 dev %[1]s src %[3]s
route add %[6]s/128 dev %[1]s`, s.link, s.ns, gateway.v4, gateway.v6, s.v4, s.v6))
	ip(t, s.ns, fmt.Sprintf(`addr add %[1]s/32 dev eth0
addr add %[2]s/128 dev eth0
link set eth0 up
route add %[3]s/32 dev eth0 scope link
route add default via %[3]s dev eth0
route add %[4]s/128 dev eth0
route add default via %[4]s dev eth0`, s.v4, s.v6, gateway.v4, gateway.v6))
	return s
}

// started lets the pod run, for the API server, and returns once troth-server has heard
// of that: until then its addresses are nobody's, and nobody is called in plaintext.
func (s *sandbox) started(t *testing.T) *sandbox {
	t.Helper()
	s.Pod = cluster.StartPod(t, s.Pod, s.strings()...)
	if s.Spec.HostNetwork {
		return s // its addresses stay its node's
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	stream, err := s.m.directory(t).Resolve(ctx)
	if err == nil {
		err = stream.Send(&trothv1.ResolveRequest{Resolve: s.strings()})
	}
	for known := make(map[string]bool); err == nil && len(known) < 2; {
		var answer *trothv1.ResolveResponse
		if answer, err = stream.Recv(); err == nil && answer.GetPod().GetPodUid() == string(s.UID) {
			known[answer.GetAddress()] = true
		}
	}
	if err != nil {
		t.Fatalf("ask troth-server for a pod: %v", err)
	}
	return s
}

// directory is the server's, as an agent asks it.
func (m *mesh) directory(t *testing.T) trothv1.DirectoryServiceClient {
	t.Helper()
	if m.asked == nil {
		c := m.client(t)
		svid, err := c.attest(bounded(t), m.hosts[0].token)
		if err != nil {
			t.Fatal(err)
		}
		m.asked = trothv1.NewDirectoryServiceClient(closing(t)(c.withSVID(svid)))
	}
	return m.asked
}

// cni runs the plugin as the node's container runtime does, and returns what it
// printed.
func (s *sandbox) cni(t *testing.T, command string) (string, error) {
	t.Helper()
	config, err := json.Marshal(map[string]any{
		"cniVersion": "1.1.0", "name": "mesh", "type": "troth-cni", "socket": filepath.Join(s.host.dir, "cni.sock"),
		"prevResult": map[string]any{
			"cniVersion": "1.1.0",
			"interfaces": []map[string]any{{"name": s.link}, {"name": "eth0", "sandbox": s.ns.path()}},
			"ips": []map[string]any{
				{"address": s.v4.String() + "/32", "gateway": s.host.pods.at(1).v4.String(), "interface": 1},
				{"address": s.v6.String() + "/128", "gateway": s.host.pods.at(1).v6.String(), "interface": 1},
			},
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	cmd := s.host.ns.command(ctx, filepath.Join(programs, "troth-cni"))
	cmd.Env = append(os.Environ(),
		"CNI_COMMAND="+command,
		"CNI_CONTAINERID="+s.containerID(),
		"CNI_NETNS="+s.ns.path(),
		"CNI_IFNAME=eth0",
		"CNI_PATH="+programs,
		fmt.Sprintf("CNI_ARGS=IgnoreUnknown=1;K8S_POD_NAMESPACE=%s;K8S_POD_NAME=%s;K8S_POD_INFRA_CONTAINER_ID=%s;K8S_POD_UID=%s",
			s.Namespace, s.Name, s.containerID(), s.UID),
	)
	cmd.Stdin = strings.NewReader(string(config))
	output, err := cmd.CombinedOutput()
	return string(output), err
}

func (s *sandbox) containerID() string { return strings.ReplaceAll(string(s.UID), "-", "") }

// id is the pod's SPIFFE ID.
func (s *sandbox) id() string { return s.m.id(s.Spec.ServiceAccountName) }

// run runs a program inside to its end, with what it is to read, and returns what it
// printed.
func (s *sandbox) run(t *testing.T, input, name string, args ...string) (string, error) {
	t.Helper()
	return s.ns.run(t, input, name, args...)
}

func (n netns) run(t *testing.T, input, name string, args ...string) (string, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	cmd := n.command(ctx, name, args...)
	cmd.Stdin = strings.NewReader(input)
	var problems strings.Builder
	cmd.Stderr = &problems
	output, err := cmd.Output()
	if err != nil {
		err = fmt.Errorf("%s %q: %w\n%s", name, args, err, problems.String())
	}
	return string(output), err
}

// curl gets http://AT/PATH from inside.
func (n netns) curl(t *testing.T, at netip.AddrPort, path string) (string, error) {
	t.Helper()
	return n.run(t, "", "curl", "--silent", "--show-error", "--fail", "--globoff", "--max-time", "15", fmt.Sprintf("http://%s%s", at, path))
}

// nginx is an nginx that answers every request with a text, at port 80.
type nginx struct {
	*process
	answer string
}

// request is a line of nginx's access log.
type request struct {
	From string `json:"from"`
	Path string `json:"path"`
}

// nginx starts one inside.
func (s *sandbox) nginx(t *testing.T, answer string) *nginx {
	t.Helper()
	dir := t.TempDir()
	file := filepath.Join(dir, "nginx.conf")
	err := os.WriteFile(file, fmt.Appendf(nil, `
daemon off;
master_process off;
pid %[1]s/pid;
error_log stderr warn;
events {}
http {
	log_format line escape=json '{"from":"$remote_addr","path":"$uri"}';
	access_log /dev/stderr line;
	client_body_temp_path %[1]s/body;
	proxy_temp_path %[1]s/proxy;
	fastcgi_temp_path %[1]s/fastcgi;
	uwsgi_temp_path %[1]s/uwsgi;
	scgi_temp_path %[1]s/scgi;
	server {
		listen 80;
		listen [::]:80;
		location / { return 200 %[2]q; }
	}
}
`, dir, answer), 0o600)
	if err != nil {
		t.Fatal(err)
	}
	n := &nginx{answer: answer}
	// Not the context of the test: the test's end asks it to end.
	n.process = startCommand(t, "nginx", s.ns.command(context.WithoutCancel(t.Context()), "nginx", "-p", dir, "-c", file, "-e", "stderr"))
	eventually(t, "nginx to listen", func() bool {
		conn, err := s.ns.dial(t.Context(), netip.MustParseAddrPort("127.0.0.1:80"))
		if err != nil {
			return false
		}
		return conn.Close() == nil
	})
	return n
}

// requests returns who has asked for a path so far.
func (n *nginx) requests(path string) []string {
	var from []string
	for _, r := range written(n.process, func(r request) bool { return r.Path == path }) {
		from = append(from, r.From)
	}
	return from
}

// echoing listens inside at a port of all addresses, and sends back what it is sent.
// What it takes is sent to the channel, which is read or has room.
func (s *sandbox) echoing(t *testing.T, port uint16) {
	t.Helper()
	l := s.ns.listen(t, netip.AddrPortFrom(netip.IPv6Unspecified(), port))
	go func() {
		for {
			conn, err := l.AcceptTCP()
			if err != nil {
				return // the test has ended
			}
			go func() {
				defer conn.Close()
				_, _ = conn.ReadFrom(conn)
			}()
		}
	}()
}

// greeted connects and exchanges a greeting with something that echoes. The
// connection ends with the test.
func (n netns) greeted(t *testing.T, to netip.AddrPort) (*net.TCPConn, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	conn, err := n.dial(ctx, to)
	if err != nil {
		return nil, err
	}
	t.Cleanup(func() { conn.Close() })
	return conn, greetWithin(conn, 10*time.Second)
}

func greetWithin(conn net.Conn, limit time.Duration) error {
	conn.SetDeadline(time.Now().Add(limit))
	defer conn.SetDeadline(time.Time{})
	return greet(conn)
}

// at is an address of each family with a port.
func (a addresses) at(port uint16) []netip.AddrPort {
	return []netip.AddrPort{netip.AddrPortFrom(a.v4, port), netip.AddrPortFrom(a.v6, port)}
}
