package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"troth.dev/troth/test/cluster/machine/spec"
)

const cgroupRoot = "/sys/fs/cgroup"

// keep makes a machine, prints the process id of its process 1 once that can be
// called, and ends it when standard input or the machine itself ends.
func keep(m spec.Machine, file string) (err error) {
	// The kernel sends Pdeathsig when the thread ends that started a process.
	runtime.LockOSThread()
	cgroups, err := makeCgroups(m.Cgroup)
	defer func() { err = errors.Join(err, removeCgroups(cgroups), os.RemoveAll(m.State)) }()
	if err != nil {
		return err
	}

	self, err := os.Executable()
	if err != nil {
		return err
	}
	ready, readyEnd, err := os.Pipe()
	if err != nil {
		return err
	}
	init := exec.Command(self, "init", file)
	begin, err := init.StdinPipe()
	if err != nil {
		return err
	}
	init.Stdout, init.Stderr = os.Stderr, os.Stderr
	init.ExtraFiles = []*os.File{readyEnd}
	if m.Forward != "" {
		init.ExtraFiles = append(init.ExtraFiles, os.NewFile(3, "listener"))
	}
	init.SysProcAttr = &syscall.SysProcAttr{
		Pdeathsig: syscall.SIGKILL,
		Cloneflags: unix.CLONE_NEWPID | unix.CLONE_NEWNS | unix.CLONE_NEWNET |
			unix.CLONE_NEWUTS | unix.CLONE_NEWIPC,
	}
	if err := init.Start(); err != nil {
		return fmt.Errorf("make the namespaces: %w", err)
	}
	ended := make(chan struct{})
	go func() { _ = init.Wait(); close(ended) }()
	defer func() {
		_ = init.Process.Kill()
		<-ended
	}()
	readyEnd.Close()
	for _, cgroup := range cgroups {
		// Before it makes a cgroup namespace, whose root this is to be.
		pid := []byte(strconv.Itoa(init.Process.Pid))
		if err := os.WriteFile(filepath.Join(cgroup, "cgroup.procs"), pid, 0); err != nil {
			return fmt.Errorf("enter the cgroup: %w", err)
		}
	}
	begin.Close()

	if _, err := ready.Read(make([]byte, 1)); err != nil {
		return errors.New("its process 1 did not come up")
	}
	if _, err := fmt.Println(init.Process.Pid); err != nil {
		return err
	}
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP)
	closed := make(chan struct{})
	go func() { _, _ = io.Copy(io.Discard, os.Stdin); close(closed) }()
	select {
	case <-closed:
	case <-signals:
	case <-ended:
		return errors.New("its process 1 ended")
	}
	return nil
}

// makeCgroups makes the cgroup called name in every hierarchy and returns their folders.
func makeCgroups(name string) ([]string, error) {
	roots, err := hierarchies()
	if err != nil {
		return nil, err
	}
	var cgroups []string
	for _, root := range roots {
		cgroup := filepath.Join(root, name)
		if err := os.Mkdir(cgroup, 0o755); err != nil {
			return cgroups, err
		}
		cgroups = append(cgroups, cgroup)
		// The processors and the memory that a cgroup v1 may use are none at first.
		for _, file := range []string{"cpuset.cpus", "cpuset.mems"} {
			value, err := os.ReadFile(filepath.Join(root, file))
			if errors.Is(err, fs.ErrNotExist) {
				continue
			}
			if err == nil {
				err = os.WriteFile(filepath.Join(cgroup, file), value, 0)
			}
			if err != nil {
				return cgroups, err
			}
		}
	}
	return cgroups, nil
}

// hierarchies returns where the computer's cgroup hierarchies are mounted: many of
// version 1, perhaps with one of version 2 beside them, or one of version 2.
func hierarchies() ([]string, error) {
	controllers, err := os.ReadFile(filepath.Join(cgroupRoot, "cgroup.controllers"))
	if err == nil {
		enable := "+" + strings.Join(strings.Fields(string(controllers)), " +")
		return []string{cgroupRoot}, os.WriteFile(filepath.Join(cgroupRoot, "cgroup.subtree_control"), []byte(enable), 0)
	}
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return nil, err
	}
	var roots []string
	for line := range bytes.Lines(mounts) {
		fields := strings.Fields(string(line))
		if len(fields) > 2 && strings.HasPrefix(fields[2], "cgroup") && filepath.Dir(fields[1]) == cgroupRoot {
			roots = append(roots, fields[1])
		}
	}
	if len(roots) == 0 {
		return nil, fmt.Errorf("no cgroup hierarchy is mounted below %s", cgroupRoot)
	}
	return roots, nil
}

// removeCgroups removes the cgroups with all below them. The last processes of a
// machine that was killed leave theirs a moment later.
func removeCgroups(cgroups []string) error {
	deadline := time.Now().Add(10 * time.Second)
	for {
		var failed error
		for _, cgroup := range cgroups {
			failed = errors.Join(failed, removeCgroup(cgroup))
		}
		if failed == nil || time.Now().After(deadline) {
			return failed
		}
		time.Sleep(20 * time.Millisecond)
	}
}

func removeCgroup(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	for _, entry := range entries {
		if entry.IsDir() {
			if err := removeCgroup(filepath.Join(dir, entry.Name())); err != nil {
				return err
			}
		}
	}
	if err := os.Remove(dir); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}
