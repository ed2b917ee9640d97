package workload

import (
	"bytes"
	"errors"
	"fmt"
	"regexp"
	"strings"
)

// maxCgroupFile is more than any /proc/PID/cgroup: 13 hierarchies of a path of 4096
// bytes.
const maxCgroupFile = 64 << 10

// ParseCgroup reads the content of a /proc/PID/cgroup, and returns the UID of the
// pod that the process runs in and, where it can be told, the ID of its container.
// It fails if the file names no pod, or more than one, is malformed, or has more
// than 64 KiB.
//
// The UID of a static pod is the hash that the kubelet knows it by, not the UID of
// its mirror in the API server.
func ParseCgroup(file []byte) (podUID, containerID string, err error) {
	if len(file) > maxCgroupFile {
		return "", "", fmt.Errorf("more than %d bytes", maxCgroupFile)
	}
	// One line for each hierarchy: number:controllers:path (cgroups(7)). The kernel
	// refuses to make a cgroup with a newline in its name, and no controller has a
	// colon in its own, so that a name cannot forge a line or a field.
	for line := range bytes.Lines(file) {
		_, rest, _ := strings.Cut(strings.TrimSuffix(string(line), "\n"), ":")
		_, path, _ := strings.Cut(rest, ":")
		if !strings.HasPrefix(path, "/") {
			return "", "", fmt.Errorf("malformed line %q", line)
		}
		pod, container, ok := podOfPath(path)
		switch {
		case !ok:
			// Not every hierarchy is the kubelet's: the process may well be at the
			// root of one.
		case podUID == "":
			podUID, containerID = pod, container
		case pod != podUID:
			return "", "", fmt.Errorf("one hierarchy has the process in pod %q, another in pod %q", podUID, pod)
		case container != containerID:
			containerID = ""
		}
	}
	if podUID == "" {
		return "", "", errors.New("the process runs in no pod")
	}
	return podUID, containerID, nil
}

// podOfPath returns the pod and the container that a cgroup belongs to.
//
// Who may write into a cgroup may make cgroups below it, of any name, and a workload
// often may from its own container downwards. So the path is read from the root
// down, and the first pod in it decides: that one is the kubelet's, and a workload
// that calls a cgroup "kubepods/pod<another's UID>" makes it below its own. For the
// same reason the kubelet's part is left at the first segment in it that the kubelet
// would not make, and nothing further down is looked at.
//
// What is above the kubelet's part may have any name: the kubelet can be given a
// root, and can itself run in a container. All of it is made by the node's root or
// by whom root trusts, but for the part that systemd gives to logged-in users.
func podOfPath(path string) (podUID, containerID string, ok bool) {
	segments := strings.Split(path, "/")[1:]

	// A reader in a cgroup namespace sees paths relative to its own cgroup. That is
	// the agent's container, so that two steps up, to what contains its pod, is
	// inside the kubelet's part. One step up is the agent's own pod, where there are
	// containers, but no pods.
	climbed := 0
	for climbed < len(segments) && segments[climbed] == ".." {
		climbed++
	}
	if climbed == 1 {
		return "", "", false
	}
	inside := climbed > 0

	for i := climbed; i < len(segments); i++ {
		segment, rest, _ := strings.Cut(segments[i], ":")
		if i+1 < len(segments) {
			rest = segments[i+1]
		}
		if match := podSlice.FindStringSubmatch(segment); match != nil {
			return strings.ReplaceAll(match[1], "_", "-"), container(rest), true
		}
		if match := podFolder.FindStringSubmatch(segment); match != nil && inside {
			return match[1], container(rest), true
		}
		switch {
		case kubelets.MatchString(segment):
			inside = true
		case inside && (segment == "burstable" || segment == "besteffort"):
		case inside, segment == "user.slice":
			return "", "", false
		}
	}
	return "", "", false
}

// container returns the container ID in the segment below a pod's, or "" if there is
// none.
func container(segment string) string {
	segment = strings.TrimSuffix(segment, ".scope")
	id := segment[strings.LastIndexAny(segment, "-:")+1:]
	if !containerID.MatchString(id) {
		return ""
	}
	return id
}

// How the kubelet and the container runtimes name cgroups. With systemd's driver a
// slice has the names of those above it in its own, and underscores for the dashes
// of the UID. A runtime that was not told of systemd makes one folder of the
// slice's name, its own and the container's ID, with colons between.
var (
	kubelets    = regexp.MustCompile(`^(?:kubepods|(?:.+-)?kubepods(?:-burstable|-besteffort)?\.slice)$`)
	podSlice    = regexp.MustCompile(`^(?:.+-)?kubepods(?:-burstable|-besteffort)?-pod([0-9a-f]{8}(?:_[0-9a-f]{4}){3}_[0-9a-f]{12}|[0-9a-f]{32})\.slice$`)
	podFolder   = regexp.MustCompile(`^pod([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}|[0-9a-f]{32})$`)
	containerID = regexp.MustCompile(`^[0-9a-f]{64}$`)
)
