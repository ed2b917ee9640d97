// Package version tells which Troth a program is of.
package version

import (
	"runtime/debug"

	"github.com/prometheus/client_golang/prometheus"
)

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

// Metric returns the metric troth_build_info, which is 1 and has the version as its
// label.
func Metric() prometheus.Collector {
	return prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "troth_build_info", Help: "1, for the version that the label has.", ConstLabels: prometheus.Labels{"version": String()},
	}, func() float64 { return 1 })
}
