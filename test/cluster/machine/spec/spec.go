// Package spec is what package cluster and a machine's own process tell each other.
package spec

// Machine is a machine to be made.
type Machine struct {
	Name   string // its host name
	Folder string // seen at the same path inside: sockets, logs, what the machine is configured with
	State  string // a folder below Folder, removed with the machine
	Cgroup string // the name of its cgroup in every hierarchy
	Socket string // where its process 1 is called
	// Binds are folders of the machine's, and the folders of the computer that they are.
	// All else that is written in a machine is in memory.
	Binds map[string]string
	// Values are files of /proc/sys that the machine sees with a content of its own,
	// because its programs would set the whole computer's.
	Values map[string]string
	// Forward is an address inside to which connections go that arrive at the listener
	// which the machine was given, or empty.
	Forward string
}

// Program is a program to be started in a machine.
type Program struct {
	Path string
	Args []string
	Env  []string
	Log  string // a file below the machine's folder, appended to
}

// Signal is a signal for a program, by its process id inside.
type Signal struct{ PID, Number int }

// Service is the name of what answers on a machine's socket by package net/rpc: Start
// (Program, *int) starts a program and says its process id, Wait(int, *string) waits
// for its end and says how it ended if not well, and Signal(Signal, *bool) signals it.
const Service = "Machine"
