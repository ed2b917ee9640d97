package main

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"

	"troth.dev/troth/policy"
)

// grid prints rows in columns, under the first one as their heading. Cells that
// name a mode are coloured. What a cell has that is not printable is quoted: names
// in files may be anything.
func (p *printer) grid(rows [][]string) {
	var widths []int
	for _, row := range rows {
		for column, cell := range row {
			if column == len(widths) {
				widths = append(widths, 0)
			}
			widths[column] = max(widths[column], utf8.RuneCountInString(printable(cell)))
		}
	}
	for n, row := range rows {
		var line strings.Builder
		blank := 0 // pending, so that no line ends in spaces
		for column, cell := range row {
			cell = printable(cell)
			if cell != "" {
				line.WriteString(strings.Repeat(" ", blank))
				blank = 0
				if n == 0 {
					line.WriteString(p.paint(bold, cell))
				} else {
					line.WriteString(p.mode(cell))
				}
			}
			blank += widths[column] - utf8.RuneCountInString(cell) + 2
		}
		p.line("%s", &line)
	}
}

// mode colours the name of a mode and leaves all else.
func (p *printer) mode(text string) string {
	switch text {
	case policy.Strict.String():
		return p.paint(green, text)
	case policy.Disable.String():
		return p.paint(red, text)
	}
	return text
}

// printable quotes text that would do something to a terminal.
func printable(text string) string {
	if strings.ContainsFunc(text, func(r rune) bool { return !unicode.IsPrint(r) }) || !utf8.ValidString(text) {
		return strconv.Quote(text)
	}
	return text
}

// byText names who decides.
func byText(ref policy.Ref) string {
	if ref.IsZero() {
		return "default"
	}
	return ref.String()
}

// count spells a number of things.
func count(n int, thing string) string {
	if n == 1 {
		return "1 " + thing
	}
	return fmt.Sprintf("%d %ss", n, thing)
}

func join(ports []uint16) string {
	var parts []string
	for _, port := range ports {
		parts = append(parts, strconv.Itoa(int(port)))
	}
	return strings.Join(parts, ", ")
}

// labelText spells labels as --labels does.
func labelText(labels map[string]string) string {
	var parts []string
	for _, key := range slices.Sorted(maps.Keys(labels)) {
		parts = append(parts, key+"="+labels[key])
	}
	return strings.Join(parts, ",")
}
