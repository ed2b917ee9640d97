package pods

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"

	"troth.dev/troth/agent/cni"
	"troth.dev/troth/agent/workload"
	"troth.dev/troth/internal/proc"
)

// census is what a search of the node's processes found.
type census struct {
	pods     map[string]process     // of each pod, by UID, the process that began first
	occupied map[cni.Namespace]bool // the networks that some process is in
	// shared is the networks in which not every process is of one and the same pod. That
	// is how the node's own is known, whatever else is: in a pod's there is nobody else.
	shared map[cni.Namespace]bool
}

// process is a process in a pod and in a network that is not the node's.
type process struct {
	pid     int
	started uint64 // clock ticks since boot
	id      cni.Namespace
}

// search looks through the processes of the node.
//
// A pod's network is that of its first process. A workload that may make namespaces,
// as one with a user namespace of its own may, can put processes into another
// network, and would have that one captured in the place of its own; but none of its
// processes is older than the one that the runtime made to hold the pod's namespaces.
func (p *Pods) search() (census, error) {
	found := census{
		pods: make(map[string]process), occupied: make(map[cni.Namespace]bool), shared: make(map[cni.Namespace]bool),
	}
	owners := make(map[cni.Namespace]string)
	folder, err := os.Open("/proc")
	if err != nil {
		return found, err
	}
	defer folder.Close()
	names, err := folder.Readdirnames(-1)
	if err != nil {
		return found, err
	}
	for _, name := range names {
		pid, err := strconv.Atoi(name)
		if err != nil || pid == os.Getpid() {
			continue // our own threads go into pods' networks, and /proc shows the first's
		}
		// A process that ends while it is looked at is one that is not there.
		id, err := networkOf(pid)
		if err != nil || p.isHost(id) {
			continue
		}
		found.occupied[id] = true
		uid, err := podOf(pid)
		if owner, seen := owners[id]; err != nil || (seen && owner != uid) {
			found.shared[id] = true
			continue
		}
		owners[id] = uid
		if isStatic(uid) {
			continue
		}
		started, err := proc.Started(int32(pid))
		if err != nil {
			continue
		}
		if first, ok := found.pods[uid]; !ok || started < first.started || (started == first.started && pid < first.pid) {
			found.pods[uid] = process{pid: pid, started: started, id: id}
		}
	}
	return found, nil
}

// discover makes an entry for each pod that runs and has none.
func (p *Pods) discover(found census) {
	for uid, process := range found.pods {
		p.mu.Lock()
		known := p.entries[uid] != nil
		p.mu.Unlock()
		if known || found.shared[process.id] {
			continue
		}
		ns, err := process.open(uid)
		if err != nil {
			p.config.Log.Debug("pod's process not found again", "pod", uid, "pid", process.pid, "err", err)
			continue
		}
		t := &target{sighting: sighting{id: process.id}, pod: cni.Pod{UID: uid}, ns: ns}
		if _, _, err := p.post(uid, t); err != nil {
			return
		}
	}
}

// open opens the network of a process that was found before, if it is that process
// still, in that pod and that network.
func (p process) open(uid string) (*os.File, error) {
	ns, err := os.Open(procPath(p.pid, "ns/net"))
	if err != nil {
		return nil, err
	}
	id, err := cni.NamespaceOf(ns)
	if err == nil && id != p.id {
		err = errors.New("it is in another network by now")
	}
	if err == nil {
		var now string
		if now, err = podOf(p.pid); err == nil && now != uid {
			err = fmt.Errorf("it is in pod %q by now", now)
		}
	}
	if err == nil {
		// Last: if it is the same process now, it was when the others were read.
		var started uint64
		if started, err = proc.Started(int32(p.pid)); err == nil && started != p.started {
			err = errors.New("its number went to another process")
		}
	}
	if err != nil {
		ns.Close()
		return nil, err
	}
	return ns, nil
}

// bury ends the entries that nothing was heard of since before, whose network is gone:
// no process is in it, and the path by which the runtime knew it is another one's or
// nobody's. It returns them with the generations that are their ends.
func (p *Pods) bury(before map[*entry]sighting, found census) map[*entry]uint64 {
	maps.DeleteFunc(before, func(_ *entry, seen sighting) bool { return p.alive(seen, found) })
	p.mu.Lock()
	defer p.mu.Unlock()
	buried := make(map[*entry]uint64)
	for e, seen := range before {
		if e.newest != seen {
			continue
		}
		p.config.Log.Info("pod is gone", "pod", e.uid)
		e.put(&target{sighting: seen, gone: true})
		buried[e] = e.newest.generation
	}
	return buried
}

// alive reports whether a network is still somebody's.
func (p *Pods) alive(seen sighting, found census) bool {
	if found.occupied[seen.id] {
		return true
	}
	if seen.netns == "" {
		return false
	}
	ns, err := p.openPath(seen.netns, seen.id)
	if err != nil {
		return false
	}
	ns.Close()
	return true
}

// openPath opens the namespace at a path of the host, if it is the one that is meant.
func (p *Pods) openPath(path string, want cni.Namespace) (*os.File, error) {
	ns, err := os.Open(filepath.Join(p.config.HostRoot, path))
	if err != nil {
		return nil, err
	}
	id, err := cni.NamespaceOf(ns)
	if err == nil && id != want {
		err = errors.New("it is another namespace by now")
	}
	if err != nil {
		ns.Close()
		return nil, err
	}
	return ns, nil
}

// hostNamespaces returns the networks that are never captured: the agent's own, and
// that of the first process, which is the node's for an agent that sees the node's
// processes. One that may not look at the first process is told so; it has to be in the
// node's network itself.
func hostNamespaces(log *slog.Logger) ([]cni.Namespace, error) {
	own, err := cni.OwnNamespace()
	if err != nil {
		return nil, err
	}
	node, err := networkOf(1)
	if errors.Is(err, fs.ErrPermission) {
		log.Warn("the network of process 1 is not seen (that takes CAP_SYS_PTRACE): only the agent's own is known for the node's", "err", err)
		return []cni.Namespace{own}, nil
	}
	if err != nil {
		return nil, fmt.Errorf("network of process 1: %w", err)
	}
	return []cni.Namespace{own, node}, nil
}

func (p *Pods) isHost(id cni.Namespace) bool { return slices.Contains(p.host, id) }

// networkOf returns the network that a process is in.
func networkOf(pid int) (cni.Namespace, error) {
	ns, err := os.Open(procPath(pid, "ns/net"))
	if err != nil {
		return cni.Namespace{}, err
	}
	defer ns.Close()
	return cni.NamespaceOf(ns)
}

// podOf returns the UID of the pod that a process is in, and an error if it is in none.
func podOf(pid int) (string, error) {
	const limit = 64<<10 + 1 // of which one is too much for ParseCgroup
	file, err := proc.Read(int32(pid), "cgroup", limit)
	if err != nil {
		return "", err
	}
	uid, _, err := workload.ParseCgroup(file)
	return uid, err
}

func procPath(pid int, name string) string { return fmt.Sprintf("/proc/%d/%s", pid, name) }

// isStatic reports whether a UID is that of a static pod: the hash by which the kubelet
// knows it. The API server knows its mirror, under another UID. It has no service
// account and so no identity, its maker is the node's root, and there is nothing to
// capture it with.
func isStatic(uid string) bool { return staticForm.MatchString(uid) }

const reasonStatic = "STATIC_POD"

var staticForm = regexp.MustCompile(`^[0-9a-f]{32}$`)
