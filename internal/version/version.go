// Package version tells which Troth a program is of.
package version

import "runtime/debug"

// stamp is the version that whoever built the program gave it, by the linker's -X.
var stamp string

// String returns the version that the program was stamped with, or else the one of
// the module that Go built it from, or "unknown".
func String() string {
	if stamp != "" {
		return stamp
	}
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" {
		return info.Main.Version
	}
	return "unknown"
}
