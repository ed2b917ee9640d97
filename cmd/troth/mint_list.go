package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Bounds of a list of identities.
const (
	maxMintList = 4 << 20 // bytes
	maxMintIDs  = 10000
	maxSPIFFEID = 2048 // bytes (SPIFFE-ID §2.3)
)

// mintList is SPIFFE IDs to mint, each once.
type mintList struct {
	ids  []spiffeid.ID
	seen map[spiffeid.ID]bool
}

// add checks the text and adds the SPIFFE ID that it is.
func (l *mintList) add(text string) error {
	if len(text) > maxSPIFFEID {
		return fmt.Errorf("%q... has %d bytes; a SPIFFE ID has at most %d", text[:64], len(text), maxSPIFFEID)
	}
	id, err := spiffeid.FromString(text)
	switch {
	case err != nil:
		return fmt.Errorf("%q: %w", text, err)
	case id.Path() == "":
		return fmt.Errorf("%q has no path: it names a trust domain, and nobody in it", text)
	case l.seen[id]:
		return fmt.Errorf("%q is given twice", text)
	case len(l.ids) == maxMintIDs:
		return fmt.Errorf("more than %d identities", maxMintIDs)
	}
	if l.seen == nil {
		l.seen = make(map[spiffeid.ID]bool)
	}
	l.seen[id] = true
	l.ids = append(l.ids, id)
	return nil
}

// readMintList adds the SPIFFE IDs in a file, or in stdin if it is "-".
func readMintList(path string, stdin io.Reader, l *mintList) error {
	name, r := path, stdin
	if path == "-" {
		name = "standard input"
	} else {
		file, err := os.Open(path)
		if err != nil {
			return err
		}
		defer file.Close()
		r = file
	}
	content, err := io.ReadAll(io.LimitReader(r, maxMintList+1))
	if err != nil {
		return fmt.Errorf("read %s: %w", name, err)
	}
	if err := l.parse(content); err != nil {
		return inputErrorf("%s: %w", name, err)
	}
	return nil
}

// parse adds the SPIFFE IDs of a list: one on each line, without those that are
// empty and from # on, which no SPIFFE ID has.
func (l *mintList) parse(content []byte) error {
	if len(content) > maxMintList {
		return fmt.Errorf("more than %d MiB", maxMintList>>20)
	}
	if bytes.IndexByte(content, 0) >= 0 {
		return errors.New("it is not text")
	}
	number := 0
	for line := range strings.Lines(string(content)) {
		number++
		line, _, _ = strings.Cut(line, "#")
		if line = strings.TrimSpace(line); line == "" {
			continue
		}
		if err := l.add(line); err != nil {
			return fmt.Errorf("line %d: %w", number, err)
		}
	}
	return nil
}
