//go:build linux

package capture

var (
	OpenBy = open
	Inside = inside
)
