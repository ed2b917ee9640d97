package cluster_test

import (
	"archive/tar"
	"bufio"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"troth.dev/troth/test/cluster"
)

// What operators see of Troth, in figures: the bars of the test.
const (
	mebibyte = 1 << 20

	installBar     = time.Minute
	firstSVIDBar   = time.Second     // p99, from a workload's start
	certificateBar = 3 * time.Second // what a pod starts later by, because of its certificate
	serverImageBar = 60 * mebibyte
	agentImageBar  = 50 * mebibyte
	serverRSSBar   = 60 * mebibyte
)

// The tags of one Troth, built twice.
const thisTag, previousTag = "e2e-this", "e2e-previous"

// TestTroth is the life of Troth in a cluster: installed, used, changed, hurt, upgraded
// and removed, under applications that know nothing of it.
func TestTroth(t *testing.T) {
	e := newEnvironment(t)
	e.step("images", e.images)
	e.step("install", e.install)
	e.step("two pods talk", e.talk)
	e.step("STRICT is kept", e.strict)
	e.step("first SVID", e.firstSVID)
	e.step("kill a server", e.killServer)
	e.step("kill an agent", e.killAgent)
	e.step("upgrade, and back", e.upgrade)
	// Before there are certificates that kubelets asked for: an authority stays until the
	// last of those has expired, an hour at least.
	e.step("rotate the root", e.rotate)
	e.step("pod certificates", e.podCertificates)
	// Before the roles are taken from servers that have yet to end.
	e.step("audit log", e.audit)
	e.step("uninstall", e.uninstall)
}

// environment is a cluster, and what the steps have in common.
type environment struct {
	*cluster.Cluster
	t       *testing.T
	root    string // of the checkout
	dir     string // of the cluster
	report  []string
	timings []string
}

func newEnvironment(t *testing.T) *environment {
	dir, err := os.MkdirTemp("", "troth-e2e-")
	if err != nil {
		t.Fatal(err)
	}
	begin := time.Now()
	c, err := cluster.Start(t.Context(), cluster.Config{Folder: dir, Progress: os.Stderr})
	if err != nil {
		t.Fatalf("start a cluster: %v", err)
	}
	root, err := exec.Command("go", "list", "-m", "-f", "{{.Dir}}", "troth.dev/troth").Output()
	if err != nil {
		t.Fatalf("find the checkout: %v", err)
	}
	e := &environment{Cluster: c, t: t, root: strings.TrimSpace(string(root)), dir: dir}
	e.timing("cluster", begin)
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(e.state())
			t.Logf("the logs are in %s", dir)
		}
		if dead := e.Died(); len(dead) > 0 {
			t.Errorf("programs of the cluster ended by themselves: %q", dead)
		}
		if err := c.Close(); err != nil {
			t.Errorf("close the cluster: %v", err)
		}
		if !t.Failed() {
			_ = os.RemoveAll(dir)
		}
		t.Logf("the steps:\n%s\nthe figures:\n%s", strings.Join(e.timings, "\n"), strings.Join(e.report, "\n"))
	})
	return e
}

// step does one step, and says how long it took. A step that fails is the last.
func (e *environment) step(name string, do func()) {
	e.t.Helper()
	begin := time.Now()
	failed := e.t.Failed()
	defer func() {
		e.timing(name, begin)
		if e.t.Failed() && !failed {
			e.t.Logf("step %q failed", name)
		}
	}()
	do()
}

func (e *environment) timing(name string, begin time.Time) {
	line := fmt.Sprintf("  %-20s %s", name, time.Since(begin).Round(10*time.Millisecond))
	e.timings = append(e.timings, line)
	fmt.Fprintln(os.Stderr, "e2e:", line)
}

// figure records what was measured, and a failure if it is over its bar.
func (e *environment) figure(over bool, format string, args ...any) {
	e.t.Helper()
	line := "  " + fmt.Sprintf(format, args...)
	if over {
		line += "  OVER ITS BAR"
		e.t.Error(line)
	}
	e.report = append(e.report, line)
	fmt.Fprintln(os.Stderr, "e2e:", line)
}

func (e *environment) must(output string, err error) string {
	e.t.Helper()
	if err != nil {
		e.t.Fatal(err)
	}
	return output
}

func (e *environment) kubectl(args ...string) string {
	e.t.Helper()
	return e.must(e.Kubectl(e.t.Context(), "", args...))
}

func (e *environment) apply(objects string) {
	e.t.Helper()
	e.must(e.Kubectl(e.t.Context(), objects, "apply", "--filename=-"))
}

// await waits for what nobody tells of.
func (e *environment) await(what string, patience time.Duration, check func() error) {
	e.t.Helper()
	deadline, poll := time.After(patience), time.NewTicker(100*time.Millisecond)
	defer poll.Stop()
	for {
		err := check()
		if err == nil {
			return
		}
		select {
		case <-poll.C:
		case <-deadline:
			e.t.Fatalf("%s: not within %s: %v", what, patience, err)
		}
	}
}

// images builds Troth's images twice and measures them.
func (e *environment) images() {
	for tag, source := range map[string]string{thisTag: e.root, previousTag: e.previous()} {
		dir := filepath.Join(e.dir, tag)
		cmd := exec.CommandContext(e.t.Context(), "go", "run", ".", "-source", source, "-o", dir, "-tag", tag)
		cmd.Dir = filepath.Join(source, "tools", "image")
		if output, err := cmd.CombinedOutput(); err != nil {
			e.t.Fatalf("make the images: %v\n%s", err, output)
		}
		for _, image := range []struct {
			name string
			bar  int64
		}{{"troth-server", serverImageBar}, {"troth-agent", agentImageBar}} {
			file := filepath.Join(dir, image.name+".tar")
			if err := e.Import(e.t.Context(), file); err != nil {
				e.t.Fatal(err)
			}
			if tag != thisTag {
				continue
			}
			packed, unpacked := e.imageSize(file)
			e.figure(unpacked >= image.bar, "image %s: %.1f MiB, %.1f MiB to download", image.name, float64(unpacked)/mebibyte, float64(packed)/mebibyte)
		}
	}
}

// imageSize returns how large an image is, and its layers once they are unpacked.
func (e *environment) imageSize(file string) (packed, unpacked int64) {
	archive, err := os.Open(file)
	if err != nil {
		e.t.Fatal(err)
	}
	defer archive.Close()
	entries := tar.NewReader(archive)
	for {
		header, err := entries.Next()
		if errors.Is(err, io.EOF) {
			return packed, unpacked
		}
		if err != nil {
			e.t.Fatal(err)
		}
		packed += header.Size
		if !strings.HasSuffix(header.Name, ".tar.gz") {
			continue
		}
		layer, err := gzip.NewReader(entries)
		if err != nil {
			e.t.Fatal(err)
		}
		size, err := io.Copy(io.Discard, layer)
		if err != nil {
			e.t.Fatal(err)
		}
		unpacked += size
	}
}

func (e *environment) chart() string { return filepath.Join(e.root, "deploy", "chart") }

// previous returns a folder with the source of the commit before this one.
func (e *environment) previous() string {
	e.t.Helper()
	dir := filepath.Join(e.dir, "previous")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		e.t.Fatal(err)
	}
	archive := exec.CommandContext(e.t.Context(), "/bin/sh", "-c", `git archive --output="$1/source.tar" HEAD~1 && tar -x -f "$1/source.tar" -C "$1"`, "sh", dir)
	archive.Dir = e.root
	if output, err := archive.CombinedOutput(); err != nil {
		e.t.Fatalf("the commit before this one, which is upgraded from, takes a clone with its history: %v\n%s", err, output)
	}
	return dir
}

// values are what a release of the chart is given here.
func values(tag string, more ...string) []string {
	args := []string{
		"--namespace=troth-system",
		"--set=image.tag=" + tag, "--set=image.pullPolicy=Never",
		"--set=server.replicas=2", "--set=server.authorityLife=24h",
		// An agent can tell what is held on its node once it has run for as long, and
		// agents are killed here before authorities are revoked.
		"--set=server.svidLife=6m",
	}
	return append(args, more...)
}

// install installs the chart into a namespace that Kubernetes keeps restricted.
func (e *environment) install() {
	e.apply(`{apiVersion: v1, kind: Namespace, metadata: {name: troth-system, labels: {pod-security.kubernetes.io/enforce: restricted}}}`)
	begin := time.Now()
	e.must(e.Helm(e.t.Context(), append([]string{"install", "troth", e.chart()}, values(thisTag)...)...))
	e.await("Troth is ready", 4*time.Minute, e.trothReady)
	took := time.Since(begin)
	e.figure(took >= installBar, "from helm install to all agents ready: %s", took.Round(10*time.Millisecond))

	// Nobody uses it yet.
	for _, node := range cluster.Nodes {
		for _, rss := range e.rss(node, "troth-server") {
			e.figure(rss >= serverRSSBar, "memory of an idle server on %s: %.1f MiB", node, float64(rss)/mebibyte)
		}
		for _, rss := range e.rss(node, "troth-agent") {
			e.figure(false, "memory of an idle agent, or its keeper, on %s: %.1f MiB", node, float64(rss)/mebibyte)
		}
	}
}

// trothReady tells what is missing until every server and agent is ready, and of the
// newest generation.
func (e *environment) trothReady() error {
	apps := e.Client().AppsV1()
	agents, err := apps.DaemonSets("troth-node").Get(e.t.Context(), "troth-agent", metav1.GetOptions{})
	if err != nil {
		return err
	}
	servers, err := apps.Deployments("troth-system").Get(e.t.Context(), "troth-server", metav1.GetOptions{})
	if err != nil {
		return err
	}
	keepers, err := apps.DaemonSets("troth-node").Get(e.t.Context(), "troth-keeper", metav1.GetOptions{})
	if err != nil {
		return err
	}
	a, s := agents.Status, servers.Status
	all := int32(len(cluster.Nodes))
	if keepers.Status.NumberReady != all {
		return fmt.Errorf("keepers %d of %d ready", keepers.Status.NumberReady, all)
	}
	if a.ObservedGeneration < agents.Generation || a.DesiredNumberScheduled != all || a.NumberReady != all || a.UpdatedNumberScheduled != all ||
		s.ObservedGeneration < servers.Generation || s.UpdatedReplicas != *servers.Spec.Replicas || s.Replicas != *servers.Spec.Replicas || s.ReadyReplicas != *servers.Spec.Replicas {
		return fmt.Errorf("agents %d of %d ready, servers %d of %d ready", a.NumberReady, all, s.ReadyReplicas, *servers.Spec.Replicas)
	}
	return nil
}

// rss returns the resident memory of each process of that name on a node.
func (e *environment) rss(node, name string) []int {
	output := e.must(e.Run(e.t.Context(), node, "/bin/sh", "-c",
		`for p in /proc/[0-9]*; do [ "$(cat $p/comm 2>/dev/null)" != "$1" ] || grep VmRSS $p/status; done`, "sh", name[:min(15, len(name))]))
	var sizes []int
	for line := range strings.Lines(output) {
		kibibytes, err := strconv.Atoi(strings.Fields(line)[1])
		if err != nil {
			e.t.Fatalf("read %q: %v", line, err)
		}
		sizes = append(sizes, kibibytes<<10)
	}
	return sizes
}

// applications are two ordinary ones on two nodes, STRICT, and three callers that are
// not of the mesh: one that is left alone by its label, and one on each node's network.
const applications = `
apiVersion: v1
kind: Namespace
metadata: {name: shop}
---
apiVersion: v1
kind: Namespace
metadata: {name: outside}
---
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: default, namespace: shop}
spec: {mtls: {mode: STRICT}}
---
apiVersion: v1
kind: Service
metadata: {name: back, namespace: shop}
spec:
  selector: {app: back}
  ports: [{port: 80, targetPort: 8080}]
---
apiVersion: v1
kind: Pod
metadata: {name: back, namespace: shop, labels: {app: back}}
spec:
  nodeName: node-b
  terminationGracePeriodSeconds: 1
  containers:
  - name: app
    image: ` + cluster.AppImage + `
    imagePullPolicy: Never
    args: [serve, ":8080"]
    readinessProbe: {httpGet: {path: /, port: 8080}, periodSeconds: 1, failureThreshold: 2}
    livenessProbe: {httpGet: {path: /, port: 8080}, periodSeconds: 1, failureThreshold: 5, timeoutSeconds: 5}
---
apiVersion: v1
kind: Pod
metadata: {name: front, namespace: shop, labels: {app: front}}
spec:
  nodeName: node-a
  terminationGracePeriodSeconds: 1
  containers:
  - name: app
    image: ` + cluster.AppImage + `
    imagePullPolicy: Never
    args: [load, "http://back.shop.svc.cluster.local/", 20ms]
---
apiVersion: v1
kind: Pod
metadata: {name: opted-out, namespace: outside, labels: {troth.dev/capture: disabled}}
spec:
  nodeName: node-a
  terminationGracePeriodSeconds: 1
  containers: [{name: app, image: "` + cluster.AppImage + `", imagePullPolicy: Never, args: [wait]}]
---
apiVersion: v1
kind: Pod
metadata: {name: on-the-node, namespace: outside}
spec:
  nodeName: node-a
  hostNetwork: true
  dnsPolicy: ClusterFirstWithHostNet
  terminationGracePeriodSeconds: 1
  containers: [{name: app, image: "` + cluster.AppImage + `", imagePullPolicy: Never, args: [wait]}]
---
apiVersion: v1
kind: Pod
metadata: {name: inside, namespace: outside}
spec:
  nodeName: node-a
  terminationGracePeriodSeconds: 1
  containers: [{name: app, image: "` + cluster.AppImage + `", imagePullPolicy: Never, args: [wait]}]
`

// talk lets two pods talk over a Service, across two nodes.
func (e *environment) talk() {
	e.apply(applications)
	e.kubectl("wait", "--for=condition=Ready", "--timeout=120s", "--namespace=shop", "pod/back", "pod/front")
	e.kubectl("wait", "--for=condition=Ready", "--timeout=120s", "--namespace=outside", "pod", "--all")
	e.flows(0)
}

// count is a line of an application's load. See the folder image/app.
type count struct {
	OK, Failed int
	Error      string
	At         time.Time
}

// load returns the newest count of the front's load.
func (e *environment) load() (count, error) {
	var c count
	logs, err := e.Client().CoreV1().Pods("shop").GetLogs("front", &corev1.PodLogOptions{TailLines: new(int64(1))}).DoRaw(e.t.Context())
	if err != nil {
		return c, err
	}
	return c, json.Unmarshal(logs, &c)
}

// flows waits until the load has had two hundred more answers than at the call, and
// returns the newest count. At most that many requests may have failed since.
func (e *environment) flows(failures int) count {
	e.t.Helper()
	var first, last count
	e.await("there is load", time.Minute, func() (err error) { first, err = e.load(); return err })
	e.await("requests are answered", time.Minute, func() (err error) {
		if last, err = e.load(); err == nil && last.OK < first.OK+200 {
			err = fmt.Errorf("%d more requests were answered, %d more failed: %s", last.OK-first.OK, last.Failed-first.Failed, last.Error)
		}
		return err
	})
	if failed := last.Failed - first.Failed; failed > failures {
		e.t.Errorf("%d requests failed, the last one: %s", failed, last.Error)
	}
	return last
}

// under does something under the load, and returns how many requests failed meanwhile.
// The load has to flow afterwards.
func (e *environment) under(do func()) int {
	e.t.Helper()
	before := e.flows(0)
	do()
	after := e.flows(math.MaxInt32)
	e.report = append(e.report, fmt.Sprintf("  load: %d answered, %d failed", after.OK-before.OK, after.Failed-before.Failed))
	if after.Failed > before.Failed {
		e.report = append(e.report, "    the last failure: "+after.Error)
	}
	return after.Failed - before.Failed
}

// strict has those call who have no identity, and looks at the probes of one who has.
func (e *environment) strict() {
	pod, err := e.Client().CoreV1().Pods("shop").Get(e.t.Context(), "back", metav1.GetOptions{})
	if err != nil {
		e.t.Fatal(err)
	}
	for _, url := range []string{"http://" + pod.Status.PodIP + ":8080/", "http://back.shop.svc.cluster.local/"} {
		e.kubectl("exec", "--namespace=outside", "inside", "--", "/app", "get", url)
		for _, caller := range []string{"opted-out", "on-the-node"} {
			output, err := e.Kubectl(e.t.Context(), "", "exec", "--namespace=outside", caller, "--", "/app", "get", url)
			switch {
			case err == nil:
				e.t.Errorf("%s calls %s in plaintext and is answered: %s", caller, url, output)
			case !strings.Contains(err.Error(), "reset by peer") && !strings.Contains(err.Error(), "broken pipe") && !strings.Contains(err.Error(), "EOF"):
				e.t.Errorf("%s calls %s and is refused otherwise than by Troth: %v", caller, url, err)
			}
		}
	}
	if restarts := e.probed(); restarts > 0 {
		e.t.Errorf("the kubelet restarted a healthy pod %d times", restarts)
	}
}

// probed is that the kubelet, which has no identity, finds the pod ready. It returns how
// often the kubelet has restarted it.
func (e *environment) probed() int32 {
	e.t.Helper()
	pod, err := e.Client().CoreV1().Pods("shop").Get(e.t.Context(), "back", metav1.GetOptions{})
	if err != nil {
		e.t.Fatal(err)
	}
	status := pod.Status.ContainerStatuses[0]
	if !status.Ready {
		e.t.Error("the kubelet's probes do not find the pod ready")
	}
	return status.RestartCount
}

// svid is a line of a workload. See the folder image/workload.
type svid struct {
	ID       string
	Serial   string
	NotAfter time.Time
	After    time.Duration
}

// firstSVID starts workloads that ask for an identity as soon as they run.
func (e *environment) firstSVID() {
	const pods = 20
	e.apply(`{apiVersion: v1, kind: Namespace, metadata: {name: workloads}}`)
	var after []time.Duration
	for i := range pods {
		name := fmt.Sprintf("workload-%d", i)
		e.apply(workload(name, cluster.Nodes[i%len(cluster.Nodes)]))
		e.await(name+" has an SVID", time.Minute, func() error {
			logs, err := e.Client().CoreV1().Pods("workloads").GetLogs(name, &corev1.PodLogOptions{}).DoRaw(e.t.Context())
			if err != nil {
				return err
			}
			for line := range strings.Lines(string(logs)) {
				var s svid
				if json.Unmarshal([]byte(line), &s) == nil && s.ID != "" {
					if want := "spiffe://cluster.local/ns/workloads/sa/default"; s.ID != want {
						e.t.Errorf("%s is %s, want %s", name, s.ID, want)
					}
					after = append(after, s.After)
					return nil
				}
			}
			return fmt.Errorf("it says %q", logs)
		})
	}
	slices.Sort(after)
	worst := after[len(after)*99/100]
	e.figure(worst >= firstSVIDBar, "from a workload's start to its first SVID, %d pods: median %s, p99 %s",
		pods, after[len(after)/2].Round(time.Millisecond), worst.Round(time.Millisecond))
	e.kubectl("delete", "namespace", "workloads", "--wait=false")
}

func workload(name, node string) string {
	return fmt.Sprintf(`
apiVersion: v1
kind: Pod
metadata: {name: %s, namespace: workloads}
spec:
  nodeName: %s
  terminationGracePeriodSeconds: 1
  containers:
  - name: workload
    image: %s
    imagePullPolicy: Never
    env: [{name: SPIFFE_ENDPOINT_SOCKET, value: "unix:///run/troth/workload.sock"}]
    volumeMounts: [{name: troth, mountPath: /run/troth, readOnly: true}]
  volumes: [{name: troth, hostPath: {path: /run/troth, type: Directory}}]
`, name, node, cluster.WorkloadImage)
}

// podCertificates has the kubelet ask for the certificates of pods, and sees how much
// later these run than others.
func (e *environment) podCertificates() {
	const pairs = 5
	e.apply(`{apiVersion: v1, kind: Namespace, metadata: {name: certified}}`)
	var with, without []time.Duration
	for i := range pairs {
		node := cluster.Nodes[i%len(cluster.Nodes)]
		without = append(without, e.startPod(fmt.Sprintf("without-%d", i), node, false))
		with = append(with, e.startPod(fmt.Sprintf("with-%d", i), node, true))
	}
	slices.Sort(with)
	slices.Sort(without)
	more := with[pairs/2] - without[pairs/2]
	e.figure(more >= certificateBar, "from a pod's creation to its running, medians of %d: %s, with a certificate %s more",
		pairs, without[pairs/2].Round(time.Millisecond), more.Round(time.Millisecond))
	e.kubectl("delete", "namespace", "certified", "--wait=false")
}

// startPod returns how long a pod takes to run.
func (e *environment) startPod(name, node string, certificate bool) time.Duration {
	volumes, mounts := "[]", "[]"
	if certificate {
		volumes = `[{name: svid, projected: {sources: [{podCertificate: {signerName: troth.dev/svid, keyType: ECDSAP256, credentialBundlePath: credentials.pem}}]}}]`
		mounts = `[{name: svid, mountPath: /svid}]`
	}
	begin := time.Now()
	e.apply(fmt.Sprintf(`
apiVersion: v1
kind: Pod
metadata: {name: %s, namespace: certified}
spec:
  nodeName: %s
  terminationGracePeriodSeconds: 1
  containers: [{name: app, image: "%s", imagePullPolicy: Never, args: [wait], volumeMounts: %s}]
  volumes: %s
`, name, node, cluster.AppImage, mounts, volumes))
	e.await(name+" runs", time.Minute, func() error {
		pod, err := e.Client().CoreV1().Pods("certified").Get(e.t.Context(), name, metav1.GetOptions{})
		if err == nil && (pod.Status.Phase != corev1.PodRunning || !pod.Status.ContainerStatuses[0].Ready) {
			err = fmt.Errorf("it is %s", pod.Status.Phase)
		}
		return err
	})
	return time.Since(begin)
}

// rotate replaces the authority as an operator does, with the command line. It takes
// five minutes at least, for which the new bundle has to stand in the cluster before its
// authority may sign.
func (e *environment) rotate() {
	e.apply(`
apiVersion: v1
kind: ServiceAccount
metadata: {name: operator, namespace: outside}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: rotate-roots}
rules: [{apiGroups: [troth.dev], resources: [authorities], verbs: [list, prepare, activate, taint, revoke, abort]}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: rotate-roots}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: rotate-roots}
subjects: [{kind: ServiceAccount, name: operator, namespace: outside}]
`)
	const audience = "spiffe://cluster.local"
	token := e.kubectl("create", "token", "operator", "--namespace=outside", "--audience="+audience, "--duration=1h")
	bundle := e.kubectl("get", "clustertrustbundle", "troth.dev:svid:cluster.local", "--output=jsonpath={.spec.trustBundle}")
	address := e.kubectl("get", "service", "troth-server", "--namespace=troth-system", "--output=jsonpath={.spec.clusterIP}")
	troth := filepath.Join(e.dir, "troth")
	build := exec.CommandContext(e.t.Context(), "go", "build", "-o", troth, "./cmd/troth")
	build.Dir, build.Env = e.root, append(os.Environ(), "CGO_ENABLED=0")
	if output, err := build.CombinedOutput(); err != nil {
		e.t.Fatalf("build the command line: %v\n%s", err, output)
	}
	for name, content := range map[string]string{"operator.token": token, "bundle.pem": bundle} {
		if err := os.WriteFile(filepath.Join(e.dir, name), []byte(content), 0o600); err != nil {
			e.t.Fatal(err)
		}
	}
	args := func(command ...string) []string {
		return append(append([]string{"authority"}, command...), "--server="+address+":8443", "--trust-domain=cluster.local",
			"--bundle="+filepath.Join(e.dir, "bundle.pem"), "--token="+filepath.Join(e.dir, "operator.token"))
	}
	begin := time.Now()
	failed := e.under(func() {
		// On a node: a person's own computer does not reach a Service.
		ctx, cancel := context.WithTimeout(e.t.Context(), 15*time.Minute)
		defer cancel()
		output, err := e.Run(ctx, cluster.Nodes[0], troth, args("rotate", "--taint", "--reason=end to end")...)
		if err != nil {
			status, _ := e.Run(e.t.Context(), cluster.Nodes[0], troth, args("status")...)
			e.t.Fatalf("rotate: %v\n%s\n%s", err, output, status)
		}
	})
	e.figure(failed > 0, "a rotation took %s, %d requests failed", time.Since(begin).Round(10*time.Millisecond), failed)
}

// killServer kills one of the two servers, which says goodbye to nobody.
func (e *environment) killServer() {
	pods := e.pods("troth-system", "app.kubernetes.io/name=troth-server")
	failed := e.under(func() {
		e.kubectl("delete", "pod", "--namespace=troth-system", "--grace-period=0", "--force", pods[0].Name)
		begin := time.Now()
		e.await("the server is replaced", 2*time.Minute, func() error {
			ready := 0
			for _, pod := range e.pods("troth-system", "app.kubernetes.io/name=troth-server") {
				if pod.UID != pods[0].UID && len(pod.Status.ContainerStatuses) > 0 && pod.Status.ContainerStatuses[0].Ready {
					ready++
				}
			}
			if ready < len(pods) {
				return fmt.Errorf("%d of %d others are ready", ready, len(pods))
			}
			return nil
		})
		e.figure(false, "from a server's death to two that are ready: %s", time.Since(begin).Round(10*time.Millisecond))
	})
	if failed > 0 {
		e.t.Errorf("%d requests failed when a server was killed", failed)
	}
}

// killAgent kills the agent on the callee's node. What it carried breaks, and new
// connections wait for the next one, which the keeper's sockets let them.
func (e *environment) killAgent() {
	failed := e.under(func() {
		begin := time.Now()
		e.must(e.Run(e.t.Context(), "node-b", "/bin/sh", "-c",
			`for p in /proc/[0-9]*; do if [ "$(tr '\0' ' ' <$p/cmdline 2>/dev/null | cut -d' ' -f1,2 | grep -c '^/troth-agent -')" = 1 ]; then kill -9 "${p#/proc/}"; fi; done`))
		e.await("the agent is not ready", time.Minute, func() error {
			if e.trothReady() == nil {
				return errors.New("it is ready still")
			}
			return nil
		})
		e.await("the agent is ready again", 2*time.Minute, e.trothReady)
		e.figure(false, "from an agent's death to its readiness: %s", time.Since(begin).Round(10*time.Millisecond))
	})
	e.figure(failed > 20, "an agent was killed: %d requests failed", failed)

	// And the whole pod.
	for _, pod := range e.pods("troth-node", "app.kubernetes.io/name=troth-agent") {
		if pod.Spec.NodeName != "node-b" {
			continue
		}
		begin := time.Now()
		failed := e.under(func() {
			e.kubectl("delete", "pod", "--namespace=troth-node", "--grace-period=0", "--force", pod.Name)
			e.await("the agent's pod is replaced", 2*time.Minute, e.trothReady)
		})
		e.figure(failed > 20, "an agent's pod was killed: traffic flows again after %s at most, %d requests failed", time.Since(begin).Round(10*time.Millisecond), failed)
	}
	if restarts := e.probed(); restarts > 0 {
		e.t.Errorf("the kubelet restarted a healthy pod %d times", restarts)
	}
}

func (e *environment) pods(namespace, selector string) []corev1.Pod {
	list, err := e.Client().CoreV1().Pods(namespace).List(e.t.Context(), metav1.ListOptions{LabelSelector: selector})
	if err != nil {
		e.t.Fatal(err)
	}
	return list.Items
}

// upgrade goes back to the chart and the images of the commit before, and from there to
// this one's, under load: while a node has no agent, connections wait in the sockets that
// its keeper has. Those that are open at the end of an agent's drain are lost.
func (e *environment) upgrade() {
	for _, way := range []struct {
		name string
		args []string
	}{
		{"back to the commit before", append([]string{"upgrade", "troth", filepath.Join(e.dir, "previous", "deploy", "chart")}, values(previousTag)...)},
		{"upgrade from the commit before", append([]string{"upgrade", "troth", e.chart()}, values(thisTag)...)},
	} {
		begin := time.Now()
		failed := e.under(func() {
			e.must(e.Helm(e.t.Context(), way.args...))
			e.await("Troth is ready after the "+way.name, 5*time.Minute, e.trothReady)
		})
		e.figure(failed > 20, "%s: all ready after %s, %d requests failed", way.name, time.Since(begin).Round(10*time.Millisecond), failed)
	}
	restarts := e.probed()
	e.figure(restarts > 0, "restarts of a probed pod meanwhile: %d", restarts)
}

// uninstall removes the chart, under pods that go on, and looks for what is left.
func (e *environment) uninstall() {
	e.must(e.Helm(e.t.Context(), "uninstall", "troth", "--namespace=troth-system", "--wait"))
	for _, node := range cluster.Nodes {
		e.await("no rule of Troth's is left on "+node, 2*time.Minute, func() error {
			// In the node's network, and in that of each pod.
			rules, err := e.Run(e.t.Context(), node, "/bin/sh", "-c", `
				nft list ruleset 2>/dev/null | grep -i troth
				for ns in /run/netns/*; do
					nsenter --net=$ns nft list ruleset 2>/dev/null | grep -i "table.*troth" && echo "in $ns"
					nsenter --net=$ns ip rule | grep 29703 && echo "in $ns"
				done
				ls /etc/cni/net.d /opt/cni/bin | grep -i troth
				grep -rl troth /etc/cni/net.d
				true`)
			if err == nil && strings.TrimSpace(rules) != "" {
				err = fmt.Errorf("there are %q", rules)
			}
			return err
		})
	}
	// A pod starts, and those that were captured are called in plaintext.
	e.apply(strings.ReplaceAll(workloadless, "NAME", "after"))
	e.kubectl("wait", "--for=condition=Ready", "--timeout=60s", "--namespace=outside", "pod/after")
	e.flows(math.MaxInt32)

	e.await("nothing of ours is left but what the chart says it keeps", time.Minute, func() error {
		left, err := e.Kubectl(e.t.Context(), "", "get", "--all-namespaces", "--selector=app.kubernetes.io/part-of=troth", "--output=name",
			"all,serviceaccounts,configmaps,secrets,roles,rolebindings,clusterroles,clusterrolebindings,leases,networkpolicies,poddisruptionbudgets,"+
				"validatingadmissionpolicies,validatingadmissionpolicybindings,clustertrustbundles,podcertificaterequests")
		if err != nil {
			return err
		}
		var orphans []string
		for line := range strings.Lines(left) {
			line = strings.TrimSpace(line)
			if line != "" && !strings.Contains(line, "troth-cleanup") && line != "secret/troth-key-encryption-key" {
				orphans = append(orphans, line)
			}
		}
		if len(orphans) > 0 {
			return fmt.Errorf("there are %q", orphans)
		}
		return nil
	})
	left := e.kubectl("get", "secrets,configmaps,leases,clustertrustbundles", "--all-namespaces", "--output=custom-columns=K:.kind,N:.metadata.namespace,M:.metadata.name", "--no-headers")
	for line := range strings.Lines(left) {
		if strings.Contains(line, "troth") && !strings.Contains(line, "kube-root-ca.crt") {
			e.report = append(e.report, "  left after helm uninstall: "+strings.Join(strings.Fields(line), " "))
		}
	}
}

const workloadless = `
apiVersion: v1
kind: Pod
metadata: {name: NAME, namespace: outside}
spec:
  nodeName: node-b
  terminationGracePeriodSeconds: 1
  containers: [{name: app, image: "` + cluster.AppImage + `", imagePullPolicy: Never, args: [wait]}]
`

// audit looks whether Troth was ever refused by the API server: its roles are all that
// it needs.
func (e *environment) audit() {
	file, err := os.Open(e.AuditLog())
	if err != nil {
		e.t.Fatal(err)
	}
	defer file.Close()
	lines := bufio.NewScanner(file)
	lines.Buffer(nil, mebibyte)
	requests := 0
	for lines.Scan() {
		var event struct {
			User           struct{ Username string }
			Verb           string
			RequestURI     string
			ResponseStatus struct {
				Code   int
				Reason string
			}
		}
		if err := json.Unmarshal(lines.Bytes(), &event); err != nil {
			continue // the last line may be half written
		}
		account, ours := strings.CutPrefix(event.User.Username, "system:serviceaccount:troth-")
		if !ours {
			continue
		}
		requests++
		if event.ResponseStatus.Code == 403 {
			e.t.Errorf("troth-%s: %s %s is forbidden", account, event.Verb, event.RequestURI)
		}
		if strings.HasPrefix(account, "node:") {
			e.t.Errorf("an agent asks the API server: %s %s", event.Verb, event.RequestURI)
		}
	}
	if err := lines.Err(); err != nil {
		e.t.Fatal(err)
	}
	if requests == 0 {
		e.t.Error("the audit log has no request of Troth's")
	}
	e.figure(false, "requests of Troth's to the API server: %d", requests)
}

// state is what a person would look at first.
func (e *environment) state() string {
	ctx := context.WithoutCancel(e.t.Context())
	var state strings.Builder
	for _, args := range [][]string{
		{"get", "pods,daemonsets,deployments", "--all-namespaces", "--output=wide"},
		{"get", "events", "--all-namespaces", "--sort-by=.lastTimestamp"},
		{"logs", "--namespace=troth-system", "--selector=app.kubernetes.io/name=troth-server", "--all-containers", "--prefix", "--tail=15"},
		{"logs", "--namespace=troth-node", "--selector=app.kubernetes.io/name=troth-agent", "--all-containers", "--prefix", "--tail=15"},
	} {
		output, err := e.Kubectl(ctx, "", args...)
		fmt.Fprintf(&state, "kubectl %s\n%s", strings.Join(args, " "), output)
		if err != nil && !apierrors.IsNotFound(err) {
			fmt.Fprintln(&state, err)
		}
	}
	return state.String()
}
