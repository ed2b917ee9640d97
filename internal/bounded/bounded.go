// Package bounded reads what somebody else has written, whole or not at all.
package bounded

import (
	"fmt"
	"io"
	"os"
)

// ReadAll returns all that r has. It fails if that is more than limit bytes, of which it
// reads one more.
func ReadAll(r io.Reader, limit int64) ([]byte, error) {
	content, err := io.ReadAll(io.LimitReader(r, limit+1))
	if err != nil {
		return nil, err
	}
	if int64(len(content)) > limit {
		return nil, fmt.Errorf("more than %d bytes", limit)
	}
	return content, nil
}

// ReadFile returns the content of a file, as ReadAll does.
func ReadFile(path string, limit int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	content, err := ReadAll(f, limit)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return content, nil
}
