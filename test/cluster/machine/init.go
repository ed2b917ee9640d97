package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"

	"troth.dev/troth/test/cluster/machine/spec"
)

// enter makes the new namespaces a machine, and goes on as "machine serve".
func enter(m spec.Machine, file string) error {
	// A cgroup namespace belongs to a thread, and this one alone survives exec.
	runtime.LockOSThread()
	if _, err := io.Copy(io.Discard, os.Stdin); err != nil {
		return err
	}
	hierarchies, err := hierarchiesByName()
	if err != nil {
		return err
	}
	if err := unix.Unshare(unix.CLONE_NEWCGROUP); err != nil {
		return fmt.Errorf("make a cgroup namespace: %w", err)
	}
	if err := unix.Sethostname([]byte(m.Name)); err != nil {
		return err
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	if err := mountAll(m, hierarchies); err != nil {
		return err
	}
	// As on a node, where the init system sees to both.
	if err := os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0); err != nil {
		return err
	}
	return unix.Exec(self, []string{self, "serve", file}, os.Environ())
}

// mountAll gives the machine a file system whose every change is in memory and gone
// with it, over the computer's as it is; the folders that it was given; and its own
// /proc, /sys, /run and cgroups.
func mountAll(m spec.Machine, hierarchies map[string]string) error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("keep mounts apart: %w", err)
	}
	memory := filepath.Join(m.State, "memory")
	root := filepath.Join(memory, "root")
	mounts := []mount{
		{"tmpfs", memory, "tmpfs", 0, "mode=0755"},
		{"overlay", root, "overlay", 0, fmt.Sprintf("lowerdir=/,upperdir=%s/upper,workdir=%s/work", memory, memory)},
		{"proc", root + "/proc", "proc", 0, ""},
		{"sysfs", root + "/sys", "sysfs", 0, ""},
		{"/dev", root + "/dev", "", unix.MS_BIND | unix.MS_REC, ""},
		{"tmpfs", root + "/run", "tmpfs", 0, "mode=0755"},
		{m.Folder, root + m.Folder, "", unix.MS_BIND, ""},
	}
	for inside, outside := range m.Binds {
		mounts = append(mounts, mount{outside, root + inside, "", unix.MS_BIND, ""})
	}
	if controllers, ok := hierarchies[""]; ok {
		mounts = append(mounts, mount{"cgroup2", root + cgroupRoot, "cgroup2", 0, controllers})
	} else {
		mounts = append(mounts, mount{"tmpfs", root + cgroupRoot, "tmpfs", 0, "mode=0755"})
	}
	for name, options := range hierarchies {
		switch {
		case name == "":
		case options == "cgroup2":
			mounts = append(mounts, mount{"cgroup2", filepath.Join(root+cgroupRoot, name), "cgroup2", 0, ""})
		default:
			mounts = append(mounts, mount{"cgroup", filepath.Join(root+cgroupRoot, name), "cgroup", 0, options})
		}
	}
	for _, each := range mounts {
		if err := each.make(); err != nil {
			return err
		}
		if each.target == memory {
			for _, dir := range []string{"upper", "work"} {
				if err := os.Mkdir(filepath.Join(memory, dir), 0o755); err != nil {
					return err
				}
			}
		}
	}
	for path, value := range m.Values {
		name := filepath.Join(memory, strings.ReplaceAll(path, "/", "-"))
		if err := os.WriteFile(name, []byte(value), 0o644); err != nil {
			return err
		}
		if err := unix.Mount(name, root+path, "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("cover %s: %w", path, err)
		}
	}
	if err := os.Chdir(root); err != nil {
		return err
	}
	// Both at the same place: the old root is on top of the new one, and is let go.
	if err := unix.PivotRoot(".", "."); err != nil {
		return fmt.Errorf("change the root: %w", err)
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("let go of the old root: %w", err)
	}
	// Pods may ask to see later mounts of their node's.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SHARED, ""); err != nil {
		return fmt.Errorf("share mounts: %w", err)
	}
	if _, ok := hierarchies[""]; ok {
		return leaveCgroupRoot()
	}
	return nil
}

type mount struct {
	source, target, kind string
	flags                uintptr
	options              string
}

func (m mount) make() error {
	if err := os.MkdirAll(m.target, 0o755); err != nil {
		return err
	}
	if err := unix.Mount(m.source, m.target, m.kind, m.flags, m.options); err != nil {
		return fmt.Errorf("mount %s: %w", m.target, err)
	}
	return nil
}

// hierarchiesByName returns the options to mount each cgroup hierarchy with, by the
// name of its folder: "cgroup2" for one of version 2 beside others, and the one entry
// "" if it is the only one.
func hierarchiesByName() (map[string]string, error) {
	roots, err := hierarchies()
	if err != nil {
		return nil, err
	}
	options := map[string]string{}
	for _, root := range roots {
		name, err := filepath.Rel(cgroupRoot, root)
		if err != nil {
			return nil, err
		}
		if name == "." {
			return map[string]string{"": ""}, nil
		}
		var stat unix.Statfs_t
		switch err := unix.Statfs(root, &stat); {
		case err != nil:
			return nil, err
		case stat.Type == unix.CGROUP2_SUPER_MAGIC:
			options[name] = "cgroup2"
		case name == "systemd":
			options[name] = "none,name=systemd"
		default:
			options[name] = name // as every distribution mounts them
		}
	}
	return options, nil
}

// leaveCgroupRoot moves this process to a leaf: in version 2 a cgroup has processes or
// children with controllers.
func leaveCgroupRoot() error {
	leaf := filepath.Join(cgroupRoot, "init")
	if err := os.Mkdir(leaf, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	if err := os.WriteFile(filepath.Join(leaf, "cgroup.procs"), []byte("0"), 0); err != nil {
		return err
	}
	controllers, err := os.ReadFile(filepath.Join(cgroupRoot, "cgroup.controllers"))
	if err != nil {
		return err
	}
	enable := "+" + strings.Join(strings.Fields(string(controllers)), " +")
	return os.WriteFile(filepath.Join(cgroupRoot, "cgroup.subtree_control"), []byte(enable), 0)
}
