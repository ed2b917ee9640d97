package main

import (
	"fmt"
	"io"
	"slices"
	"text/tabwriter"
)

// report collects what was measured.
type report struct {
	rows []row
}

// row is one quantity, a value for each round, and what it is held against.
type row struct {
	what  string
	troth []float64
	floor []float64 // round by round; nil if there is none
	// The bar, of the kind that is not zero: the largest ratio to the floor, or
	// the largest value. No bar if both are zero.
	maxRatio, maxValue float64
}

func (r *report) add(rows ...row) { r.rows = append(r.rows, rows...) }

// print writes one line for each quantity: medians over the rounds, and the
// median of the ratios, each to the floor of its own round.
func (r *report) print(w io.Writer) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "what\ttroth\tfloor\tratio\tlowest to highest\tbar\t")
	for _, each := range r.rows {
		fmt.Fprintln(t, each.String())
	}
	return t.Flush()
}

func (r row) String() string {
	value, ratio := median(r.troth), 0.0
	floor, ratioText := "-", "-"
	spread := fmt.Sprintf("%.4g to %.4g", slices.Min(r.troth), slices.Max(r.troth))
	if r.floor != nil {
		ratios := make([]float64, len(r.troth))
		for n := range ratios {
			ratios[n] = r.troth[n] / r.floor[n]
		}
		ratio = median(ratios)
		floor, ratioText = fmt.Sprintf("%.4g", median(r.floor)), fmt.Sprintf("%.2f", ratio)
		spread = fmt.Sprintf("%.2f to %.2f", slices.Min(ratios), slices.Max(ratios))
	}
	bar := "-"
	switch {
	case r.maxRatio != 0:
		bar = fmt.Sprintf("%.2f x floor: %s", r.maxRatio, verdict(ratio <= r.maxRatio))
	case r.maxValue != 0:
		bar = fmt.Sprintf("%.4g: %s", r.maxValue, verdict(value <= r.maxValue))
	}
	return fmt.Sprintf("%s\t%.4g\t%s\t%s\t%s\t%s\t", r.what, value, floor, ratioText, spread, bar)
}

func verdict(met bool) string {
	if met {
		return "met"
	}
	return "MISSED"
}

func median(values []float64) float64 {
	sorted := slices.Sorted(slices.Values(values))
	middle := len(sorted) / 2
	if len(sorted)%2 == 1 {
		return sorted[middle]
	}
	return (sorted[middle-1] + sorted[middle]) / 2
}
