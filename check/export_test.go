package check

// The parsers of what others wrote, for the fuzzer.
var (
	ParseConflist = parseConflist
	ParsePEM      = parsePEM
)
