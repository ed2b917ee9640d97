package cluster_test

import (
	"bufio"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestKilled kills the process that has a cluster, which cannot clean up after itself,
// and looks for what is left of the cluster on this computer.
func TestKilled(t *testing.T) {
	dir := t.TempDir()
	up := filepath.Join(dir, "up")
	if output, err := exec.Command("go", "build", "-o", up, "./up").CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, output)
	}
	cmd := exec.Command(up)
	// The cluster's folder, whose path must be short, is made in here.
	folder, err := os.MkdirTemp("", "tk-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(folder) })
	cmd.Env = append(os.Environ(), "TMPDIR="+folder)
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	_, came := bufio.NewReader(stdout).ReadString('\n')
	matches, err := filepath.Glob(filepath.Join(folder, "troth-cluster-*"))
	if err != nil || len(matches) != 1 {
		t.Fatalf("the cluster's folder: %q, %v", matches, err)
	}
	name := filepath.Base(matches[0])
	namespaces := machines(t, name)
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	if came != nil {
		t.Fatal("the cluster did not come up")
	}
	if len(namespaces) != 3 {
		t.Fatalf("the cluster has %d machines, want 3", len(namespaces))
	}

	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	poll := time.NewTicker(100 * time.Millisecond)
	defer poll.Stop()
	for {
		left := remains(t, name, namespaces)
		if left == nil {
			return
		}
		select {
		case <-poll.C:
		case <-ctx.Done():
			t.Fatalf("of a killed cluster are left %q", left)
		}
	}
}

// machines returns the PID namespaces of the machines of the cluster whose folder is
// called name.
func machines(t *testing.T, name string) map[string]bool {
	t.Helper()
	namespaces := map[string]bool{}
	for process, arguments := range processes(t) {
		if strings.Contains(arguments, "serve ") && strings.Contains(arguments, name) {
			namespaces[namespace(process)] = true
		}
	}
	return namespaces
}

// namespace returns the PID namespace of a process, given its folder in /proc.
func namespace(process string) string {
	target, err := os.Readlink(filepath.Join(process, "ns", "pid"))
	if err != nil {
		return "" // it has ended
	}
	return target
}

// processes returns the command lines of all processes, by their folder in /proc.
func processes(t *testing.T) map[string]string {
	t.Helper()
	folders, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		t.Fatal(err)
	}
	all := map[string]string{}
	for _, folder := range folders {
		if content, err := os.ReadFile(filepath.Join(folder, "cmdline")); err == nil {
			all[folder] = strings.ReplaceAll(string(content), "\x00", " ")
		}
	}
	return all
}

// remains returns what there is of the cluster whose folder is called name and whose
// machines have those PID namespaces: processes, mounts, cgroups and state.
func remains(t *testing.T, name string, namespaces map[string]bool) []string {
	t.Helper()
	var left []string
	for _, pattern := range []string{
		"/sys/fs/cgroup/" + name + "*",
		"/sys/fs/cgroup/*/" + name + "*",
		filepath.Join(os.TempDir(), "tk-*", name, "node-?"),
	} {
		folders, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		left = append(left, folders...)
	}
	for process, arguments := range processes(t) {
		if strings.Contains(arguments, name) || namespaces[namespace(process)] {
			left = append(left, arguments)
		}
	}
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(mounts)) {
		if strings.Contains(line, name) {
			left = append(left, line)
		}
	}
	return left
}
