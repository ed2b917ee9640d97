package workload_test

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/google/uuid"

	"troth.dev/troth/agent/workload"
)

const (
	podA       = "2c48913c-b29f-11e7-9350-020968147796"
	podB       = "9bca8d63-d5fa-4107-8391-5bcff0ecac12"
	sliceA     = "pod2c48913c_b29f_11e7_9350_020968147796.slice"
	sliceB     = "pod9bca8d63_d5fa_4107_8391_5bcff0ecac12.slice"
	static     = "c0ad93fff4f7bf1a4ac0b9f0a6ec1d2b" // the hash that a static pod has for a UID
	containerA = "9f5dd53c8eed9be3a9a0cb5a1b7d2a6f7e5d4c3b2a190817263544536271809a"
	containerB = "1111111111111111111111111111111111111111111111111111111111111111"
)

func TestParseCgroup(t *testing.T) {
	for _, test := range []struct {
		name, file     string
		pod, container string
		err            string
	}{
		// v2
		{name: "v2, systemd, containerd, besteffort", pod: podA, container: containerA,
			file: "0::/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-" + sliceA + "/cri-containerd-" + containerA + ".scope\n"},
		{name: "v2, systemd, containerd, burstable", pod: podA, container: containerA,
			file: "0::/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-" + sliceA + "/cri-containerd-" + containerA + ".scope\n"},
		{name: "v2, systemd, containerd, guaranteed", pod: podA, container: containerA,
			file: "0::/kubepods.slice/kubepods-" + sliceA + "/cri-containerd-" + containerA + ".scope\n"},
		{name: "v2, systemd, CRI-O", pod: podA, container: containerA,
			file: "0::/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-" + sliceA + "/crio-" + containerA + ".scope\n"},
		{name: "v2, systemd, CRI-O, below the scope", pod: podA, container: containerA,
			file: "0::/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-" + sliceA + "/crio-" + containerA + ".scope/container\n"},
		{name: "v2, systemd, CRI-O's conmon", pod: podA, container: containerA,
			file: "0::/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-" + sliceA + "/crio-conmon-" + containerA + ".scope\n"},
		{name: "v2, systemd, cri-dockerd", pod: podA, container: containerA,
			file: "0::/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-" + sliceA + "/docker-" + containerA + ".scope\n"},
		{name: "v2, cgroupfs, besteffort", pod: podA, container: containerA,
			file: "0::/kubepods/besteffort/pod" + podA + "/" + containerA + "\n"},
		{name: "v2, cgroupfs, burstable", pod: podA, container: containerA,
			file: "0::/kubepods/burstable/pod" + podA + "/" + containerA + "\n"},
		{name: "v2, cgroupfs, guaranteed", pod: podA, container: containerA,
			file: "0::/kubepods/pod" + podA + "/" + containerA + "\n"},
		{name: "v2, cgroupfs, CRI-O", pod: podA, container: containerA,
			file: "0::/kubepods/burstable/pod" + podA + "/crio-" + containerA + "\n"},
		{name: "v2, init of the container has its own", pod: podA, container: containerA,
			file: "0::/kubepods/burstable/pod" + podA + "/" + containerA + "/init.scope\n"},
		{name: "v2, in the pod and in no container", pod: podA,
			file: "0::/kubepods/burstable/pod" + podA + "\n"},
		{name: "v2, in the pod and in something that is no container", pod: podA,
			file: "0::/kubepods/burstable/pod" + podA + "/kata_overhead\n"},
		{name: "v2, no newline at the end", pod: podA, container: containerA,
			file: "0::/kubepods/burstable/pod" + podA + "/" + containerA},

		// v1
		{name: "v1, cgroupfs", pod: podA, container: containerA,
			file: strings.ReplaceAll("12:rdma:/\n11:cpuset:P\n10:cpu,cpuacct:P\n9:memory:P\n1:name=systemd:P\n", "P", "/kubepods/burstable/pod"+podA+"/"+containerA)},
		{name: "v1, systemd", pod: podA, container: containerA,
			file: strings.ReplaceAll("11:cpuset:P\n10:cpu,cpuacct:P\n1:name=systemd:P\n", "P",
				"/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-"+sliceA+"/cri-containerd-"+containerA+".scope")},
		{name: "v1, containerd that does not know of systemd's driver", pod: podA, container: containerA,
			file: "11:cpuset:/system.slice/containerd.service/kubepods-burstable-" + sliceA + ":cri-containerd:" + containerA + "\n"},
		{name: "hybrid, v2 at its root", pod: podA, container: containerA,
			file: "2:pids:/kubepods/pod" + podA + "/" + containerA + "\n1:name=systemd:/kubepods/pod" + podA + "/" + containerA + "\n0::/\n"},
		{name: "hybrid, v2 in a service", pod: podA, container: containerA,
			file: "2:pids:/kubepods/pod" + podA + "/" + containerA + "\n0::/system.slice/containerd.service\n"},
		{name: "hybrid, drivers differ", pod: podA, container: containerA,
			file: "2:pids:/kubepods/pod" + podA + "/" + containerA + "\n0::/kubepods.slice/kubepods-" + sliceA + "/cri-containerd-" + containerA + ".scope\n"},
		{name: "hybrid, containers differ", pod: podA,
			file: "2:pids:/kubepods/pod" + podA + "/" + containerA + "\n0::/kubepods/pod" + podA + "/" + containerB + "\n"},

		// nested kubelets, and kubelets with a root
		{name: "kind, systemd", pod: podA, container: containerA,
			file: "0::/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-besteffort.slice/kubelet-kubepods-besteffort-" + sliceA + "/cri-containerd-" + containerA + ".scope\n"},
		{name: "kind, systemd, from the host", pod: podA, container: containerA,
			file: "0::/system.slice/docker-" + containerB + ".scope/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-" + sliceA + "/cri-containerd-" + containerA + ".scope\n"},
		{name: "kind, cgroupfs", pod: podA, container: containerA,
			file: "0::/kubelet/kubepods/besteffort/pod" + podA + "/" + containerA + "\n"},
		{name: "kind, cgroupfs, from the host", pod: podA, container: containerA,
			file: "1:name=systemd:/docker/" + containerB + "/kubelet/kubepods/besteffort/pod" + podA + "/" + containerA + "\n"},
		{name: "docker in docker", pod: podA, container: containerA,
			file: "1:name=systemd:/docker/" + containerB + "/docker/" + containerB + "/kubelet/kubepods/pod" + podA + "/" + containerA + "\n"},
		{name: "custom root", pod: podA, container: containerA,
			file: "0::/nodeb/kubepods/besteffort/pod" + podA + "/" + containerA + "\n"},
		{name: "custom root, systemd", pod: podA, container: containerA,
			file: "0::/nodeb.slice/nodeb-kubepods.slice/nodeb-kubepods-burstable.slice/nodeb-kubepods-burstable-" + sliceA + "/crio-" + containerA + ".scope\n"},

		// static pods
		{name: "static pod, cgroupfs", pod: static, container: containerA,
			file: "0::/kubepods/burstable/pod" + static + "/" + containerA + "\n"},
		{name: "static pod, systemd", pod: static, container: containerA,
			file: "0::/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod" + static + ".slice/cri-containerd-" + containerA + ".scope\n"},

		// seen from a cgroup namespace, which is how an agent sees others under v2
		{name: "namespace, cgroupfs, same class", pod: podA, container: containerA,
			file: "0::/../../pod" + podA + "/" + containerA + "\n"},
		{name: "namespace, cgroupfs, another class", pod: podA, container: containerA,
			file: "0::/../../../burstable/pod" + podA + "/" + containerA + "\n"},
		{name: "namespace, cgroupfs, guaranteed", pod: podA, container: containerA,
			file: "0::/../../../pod" + podA + "/" + containerA + "\n"},
		{name: "namespace, systemd, same class", pod: podA, container: containerA,
			file: "0::/../../kubepods-besteffort-" + sliceA + "/cri-containerd-" + containerA + ".scope\n"},
		{name: "namespace, systemd, another class", pod: podA, container: containerA,
			file: "0::/../../../kubepods-burstable.slice/kubepods-burstable-" + sliceA + "/cri-containerd-" + containerA + ".scope\n"},
		{name: "namespace, from outside of Kubernetes", pod: podA, container: containerA,
			file: "0::/../../kubepods/pod" + podA + "/" + containerA + "\n"},
		{name: "namespace, another container of the agent's own pod",
			file: "0::/../" + containerA + "\n", err: "the process runs in no pod"},
		{name: "namespace, in the agent's own pod",
			file: "0::/../pod" + podB + "/" + containerB + "\n", err: "the process runs in no pod"},
		{name: "namespace, the agent itself",
			file: "0::/\n", err: "the process runs in no pod"},
		{name: "namespace, the node's own",
			file: "0::/../../../../system.slice/sshd.service\n", err: "the process runs in no pod"},
		{name: "namespace, all the way up",
			file: "0::/../../../..\n", err: "the process runs in no pod"},

		// no pods
		{name: "user session", file: "0::/user.slice/user-1000.slice/session-3.scope\n", err: "the process runs in no pod"},
		{name: "service", file: "0::/system.slice/sshd.service\n", err: "the process runs in no pod"},
		{name: "docker", file: "0::/docker/" + containerA + "\n", err: "the process runs in no pod"},
		{name: "the kubelet's own", file: "0::/kubepods.slice/kubepods-besteffort.slice\n", err: "the process runs in no pod"},
		{name: "pod outside of kubepods", file: "0::/pod" + podA + "/" + containerA + "\n", err: "the process runs in no pod"},
		{name: "pod with dashes in a slice", file: "0::/kubepods.slice/kubepods-pod" + podA + ".slice/" + containerA + "\n", err: "the process runs in no pod"},
		{name: "UID too short", file: "0::/kubepods/pod" + podA[1:] + "/" + containerA + "\n", err: "the process runs in no pod"},
		{name: "UID too long", file: "0::/kubepods/pod" + podA + "0/" + containerA + "\n", err: "the process runs in no pod"},
		{name: "cgroup that was removed", file: "0::/kubepods/pod" + podA + " (deleted)\n", err: "the process runs in no pod"},

		// Attacks: pod A makes cgroups below its own container, named like B's.
		{name: "attack, cgroupfs below cgroupfs", pod: podA, container: containerA,
			file: "0::/kubepods/burstable/pod" + podA + "/" + containerA + "/kubepods/burstable/pod" + podB + "/" + containerB + "\n"},
		{name: "attack, bare pod below cgroupfs", pod: podA, container: containerA,
			file: "0::/kubepods/burstable/pod" + podA + "/" + containerA + "/pod" + podB + "/" + containerB + "\n"},
		{name: "attack, systemd below cgroupfs", pod: podA, container: containerA,
			file: "0::/kubepods/burstable/pod" + podA + "/" + containerA + "/kubepods.slice/kubepods-" + sliceB + "/cri-containerd-" + containerB + ".scope\n"},
		{name: "attack, systemd below systemd", pod: podA, container: containerA,
			file: "0::/kubepods.slice/kubepods-" + sliceA + "/cri-containerd-" + containerA + ".scope/kubepods.slice/kubepods-" + sliceB + "/cri-containerd-" + containerB + ".scope\n"},
		{name: "attack, cgroupfs below systemd", pod: podA, container: containerA,
			file: "0::/kubepods.slice/kubepods-" + sliceA + "/cri-containerd-" + containerA + ".scope/kubepods/pod" + podB + "/" + containerB + "\n"},
		{name: "attack, seen from a namespace", pod: podA, container: containerA,
			file: "0::/../../pod" + podA + "/" + containerA + "/kubepods/pod" + podB + "/" + containerB + "\n"},
		{name: "attack, from a container beside the agent's",
			file: "0::/../" + containerA + "/kubepods/pod" + podB + "/" + containerB + "\n", err: "the process runs in no pod"},
		{name: "attack, slice from a container beside the agent's",
			file: "0::/../" + containerA + "/kubepods-" + sliceB + "/" + containerB + "\n", err: "the process runs in no pod"},
		{name: "attack, from a process that the kubelet keeps outside of pods",
			file: "0::/kubepods/besteffort/other/kubepods/pod" + podB + "/" + containerB + "\n", err: "the process runs in no pod"},
		{name: "attack, from a user's session, cgroupfs",
			file: "0::/user.slice/user-1000.slice/user@1000.service/kubepods/pod" + podB + "/" + containerB + "\n", err: "the process runs in no pod"},
		{name: "attack, from a user's session, systemd",
			file: "0::/user.slice/user-1000.slice/user@1000.service/kubepods-" + sliceB + "/" + containerB + "\n", err: "the process runs in no pod"},
		{name: "attack, another pod in another hierarchy",
			file: "2:pids:/kubepods/pod" + podA + "/" + containerA + "\n1:name=mine:/kubepods/pod" + podB + "/" + containerB + "\n",
			err:  fmt.Sprintf("one hierarchy has the process in pod %q, another in pod %q", podA, podB)},

		// malformed
		{name: "empty", err: "the process runs in no pod"},
		{name: "empty line", file: "\n", err: `malformed line "\n"`},
		{name: "no path", file: "0:\n", err: `malformed line "0:\n"`},
		{name: "relative path", file: "0::kubepods/pod" + podA + "\n", err: `malformed line "0::kubepods/pod` + podA + `\n"`},
		{name: "malformed after a pod", file: "0::/kubepods/pod" + podA + "\nx", err: `malformed line "x"`},
		{name: "too long", file: strings.Repeat("0::/\n", 64<<10/5+1), err: "more than 65536 bytes"},
	} {
		t.Run(test.name, func(t *testing.T) {
			pod, container, err := workload.ParseCgroup([]byte(test.file))
			var reason string
			if err != nil {
				reason = err.Error()
			}
			if pod != test.pod || container != test.container || reason != test.err {
				t.Errorf("ParseCgroup(%q) =\n%q, %q, %q, want\n%q, %q, %q", test.file, pod, container, reason, test.pod, test.container, test.err)
			}
		})
	}
}

var podUIDPattern = regexp.MustCompile(`^([0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}|[0-9a-f]{32})$`)

func FuzzParseCgroup(f *testing.F) {
	f.Add("0::/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-" + sliceA + "/cri-containerd-" + containerA + ".scope\n")
	f.Add("11:cpuset:/system.slice/containerd.service/kubepods-burstable-" + sliceA + ":cri-containerd:" + containerA + "\n")
	f.Add("0::/../../pod" + podB + "/" + containerB + "\n")
	f.Add("kubepods/burstable/pod" + podB + "/" + containerB)
	f.Fuzz(func(t *testing.T, s string) {
		pod, _, err := workload.ParseCgroup([]byte(s))
		if (err == nil) != podUIDPattern.MatchString(pod) {
			t.Fatalf("ParseCgroup(%q) = %q, %v, want either a UID or an error", s, pod, err)
		}

		// Whatever pod A calls the cgroups below its container, it stays pod A. The
		// kernel gives a name neither a newline nor a NUL.
		if strings.ContainsAny(s, "\n\x00") || len(s) > 4096 {
			return
		}
		for _, own := range []string{
			"0::/kubepods/burstable/pod" + podA + "/" + containerA + "/",
			"0::/kubepods.slice/kubepods-" + sliceA + "/cri-containerd-" + containerA + ".scope/",
			"0::/../../pod" + podA + "/" + containerA + "/",
		} {
			pod, container, err := workload.ParseCgroup([]byte(own + s + "\n"))
			if pod != podA || container != containerA || err != nil {
				t.Fatalf("ParseCgroup(%q) = %q, %q, %v, want pod A still", own+s, pod, container, err)
			}
		}
	})
}

// The kernel's own word, for processes in cgroups as the kubelet makes them. It
// needs root, and a cgroup file system that can be written to.
func TestCgroupPodOnRealCgroups(t *testing.T) {
	for name, root := range cgroupRoots(t) {
		t.Run(name, func(t *testing.T) {
			inA := filepath.Join(root, "kubepods/besteffort/pod"+podA, containerA)
			inB := filepath.Join(root, "kubepods/burstable/pod"+podB, containerB)
			below := filepath.Join(inA, "kubepods/burstable/pod"+podB, containerB)
			outside := filepath.Join(root, "system.slice/sshd.service")
			for _, test := range []struct{ cgroup, want string }{
				{inA, podA},
				{inB, podB},
				{below, podA},
				{outside, ""},
			} {
				c := run(t, "wait", nil)
				c.line(t)
				enter(t, test.cgroup, c.Process.Pid)
				got, err := workload.CgroupPod(workload.Peer{PID: int32(c.Process.Pid)})
				if got != test.want || (err != nil) != (test.want == "") {
					t.Errorf("CgroupPod(process in %s) = %q, %v, want %q", test.cgroup, got, err, test.want)
				}
			}

			// The agent is itself in a pod, and in a cgroup namespace.
			agent := run(t, "look", nil)
			agent.line(t)
			enter(t, filepath.Join(root, "kubepods/besteffort/pod"+uuid.NewString(), containerA), agent.Process.Pid)
			fmt.Fprintln(agent.stdin)
			for _, test := range []struct{ cgroup, want string }{
				{inA, podA},
				{inB, podB},
				{below, podA},
			} {
				c := run(t, "wait", nil)
				c.line(t)
				enter(t, test.cgroup, c.Process.Pid)
				fmt.Fprintln(agent.stdin, c.Process.Pid)
				if got := agent.line(t); got != test.want {
					t.Errorf("from a cgroup namespace, CgroupPod(process in %s) = %q, want %q", test.cgroup, got, test.want)
				}
			}
			// It sees no pod in what is beside it in its own, where it stands itself.
			fmt.Fprintln(agent.stdin, agent.Process.Pid)
			if got := agent.line(t); !strings.HasSuffix(got, "the process runs in no pod") {
				t.Errorf("from a cgroup namespace, CgroupPod(agent) = %q, want no pod", got)
			}
		})
	}
}

// cgroupRoots makes a directory for the test in every kind of hierarchy that is
// mounted, and removes it when all children have ended.
func cgroupRoots(t *testing.T) map[string]string {
	t.Helper()
	roots := make(map[string]string)
	var failed []error
	for name, mounts := range map[string][]string{
		"v2": {"/sys/fs/cgroup", "/sys/fs/cgroup/unified"},
		"v1": {"/sys/fs/cgroup/pids", "/sys/fs/cgroup/systemd"},
	} {
		for _, mount := range mounts {
			// Both kinds have this file in each of their directories, and nothing
			// else does.
			if _, err := os.Stat(filepath.Join(mount, "cgroup.procs")); err != nil {
				continue
			}
			root := filepath.Join(mount, "troth-test-"+uuid.NewString())
			if err := os.Mkdir(root, 0o755); err != nil {
				failed = append(failed, err)
				continue
			}
			t.Cleanup(func() { removeCgroup(t, root) })
			roots[name] = root
			break
		}
	}
	if len(roots) == 0 {
		t.Fatalf("no cgroup hierarchy can be written to: this test needs root, and /sys/fs/cgroup mounted read-write; tried: %v", failed)
	}
	return roots
}

func enter(t *testing.T, cgroup string, pid int) {
	t.Helper()
	if err := os.MkdirAll(cgroup, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(cgroup, "cgroup.procs"), fmt.Append(nil, pid), 0o644); err != nil {
		t.Fatal(err)
	}
}

// removeCgroup removes a cgroup and those below it. Their files go with them.
func removeCgroup(t *testing.T, dir string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Error(err)
	}
	for _, entry := range entries {
		if entry.IsDir() {
			removeCgroup(t, filepath.Join(dir, entry.Name()))
		}
	}
	if err := os.Remove(dir); err != nil {
		t.Error(err)
	}
}
