// Package proc is what the kernel says about processes: who is at the other end of a
// Unix socket ([Peer]), when a process began and whose child it is ([StatOf]), and
// whatever else is in its folder of /proc ([Read]).
package proc

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"strconv"
)

// Credentials are a process and whose it is, as SO_PEERCRED has them (unix(7)).
type Credentials struct {
	PID      int32
	UID, GID uint32
}

// Stat is what /proc/PID/stat says of a process (proc_pid_stat(5)).
type Stat struct {
	Parent  int32  // field 4
	Started uint64 // field 22, in clock ticks since boot
}

// StatOf returns the Stat of a process. Of two processes that have had one number,
// Started tells which it is.
func StatOf(pid int32) (Stat, error) {
	stat, err := Read(pid, "stat", 4<<10)
	if err != nil {
		return Stat{}, err
	}
	// Field 2 is the name, in parentheses, which the process chose and which may itself
	// have spaces and parentheses. Nothing after it does.
	fields := bytes.Fields(stat[bytes.LastIndexByte(stat, ')')+1:])
	const first, parent, started = 3, 4, 22
	if len(fields) <= started-first {
		return Stat{}, fmt.Errorf("/proc/%d/stat has %d fields after the name", pid, len(fields))
	}
	p, err := strconv.ParseInt(string(fields[parent-first]), 10, 32)
	if err != nil {
		return Stat{}, fmt.Errorf("/proc/%d/stat: %w", pid, err)
	}
	began, err := strconv.ParseUint(string(fields[started-first]), 10, 64)
	if err != nil {
		return Stat{}, fmt.Errorf("/proc/%d/stat: %w", pid, err)
	}
	return Stat{Parent: int32(p), Started: began}, nil
}

// Started returns when a process began, in clock ticks since boot.
func Started(pid int32) (uint64, error) {
	stat, err := StatOf(pid)
	return stat.Started, err
}

// Read returns a file of a process's folder, limit bytes of it at most.
func Read(pid int32, name string, limit int64) ([]byte, error) {
	f, err := os.Open(fmt.Sprintf("/proc/%d/%s", pid, name))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, limit))
}
