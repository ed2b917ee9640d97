// Package manifest reads Kubernetes manifests from files, folders and standard
// input, under the names by which people know them, and within bounds.
//
// Start with [Read]; [Policies] finds the mTLS policies in what it reads.
package manifest

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"troth.dev/troth/policy"
)

// maxFile bounds one file, in bytes: some 10,000 pods as kubectl prints them.
const maxFile = 32 << 20

// ErrEmpty says that a folder has no manifest.
var ErrEmpty = errors.New("no .yaml, .yml or .json file in this folder")

// File is what a file had in it.
type File struct {
	Name    string // its path, or "standard input"
	Content []byte
}

// Read reads files, folders and, for "-", stdin. A folder stands for what it has of
// .yaml, .yml and .json, without the folders in it. Each path may be given once. It
// fails with [ErrEmpty], wrapped, for a folder without any: that is a slip of the
// fingers, and nothing in force a dangerous answer.
func Read(paths []string, stdin io.Reader) ([]File, error) {
	var files []File
	given := make(map[string]bool)
	for _, path := range paths {
		if given[path] {
			return nil, Errors{fmt.Sprintf("%q is given twice", path)}
		}
		given[path] = true
		if path == "-" {
			content, err := bounded(stdin)
			if err != nil {
				return nil, fmt.Errorf("read standard input: %w", err)
			}
			files = append(files, File{Name: "standard input", Content: content})
			continue
		}
		names, err := namesOf(path)
		if err != nil {
			return nil, err
		}
		for _, name := range names {
			content, err := readFile(name)
			if err != nil {
				return nil, err
			}
			files = append(files, File{Name: name, Content: content})
		}
	}
	return files, nil
}

// namesOf returns path itself if it is a file, and its manifests if it is a folder.
func namesOf(path string) ([]string, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if !info.IsDir() {
		return []string{path}, nil
	}
	entries, err := os.ReadDir(path)
	if err != nil {
		return nil, err
	}
	var names []string
	for _, entry := range entries {
		if kind := filepath.Ext(entry.Name()); !entry.IsDir() && slices.Contains([]string{".yaml", ".yml", ".json"}, kind) {
			names = append(names, filepath.Join(path, entry.Name()))
		}
	}
	if len(names) == 0 {
		return nil, fmt.Errorf("%s: %w", path, ErrEmpty)
	}
	return names, nil
}

func readFile(name string) ([]byte, error) {
	file, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	content, err := bounded(file)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", name, err)
	}
	return content, nil
}

func bounded(r io.Reader) ([]byte, error) {
	content, err := io.ReadAll(io.LimitReader(r, maxFile+1))
	if err != nil {
		return nil, err
	}
	if len(content) > maxFile {
		return nil, fmt.Errorf("more than %d MiB", maxFile>>20)
	}
	return content, nil
}

// PolicySet is the policies of some files, valid or not.
type PolicySet struct {
	List []policy.PeerAuthentication
	// Origin tells file, document and line of each.
	Origin map[policy.Ref]string
}

// Policies returns the policies in files. Those that name no namespace are of the
// one given, as with kubectl apply -n. Invalid ones are among them. What is no
// manifest, and a policy that is there twice, is an [Errors], which has a line for
// each.
func Policies(files []File, namespace string) (PolicySet, error) {
	all := PolicySet{Origin: make(map[policy.Ref]string)}
	var wrong Errors
	for _, file := range files {
		list, err := policy.Parse(file.Content, namespace)
		if err != nil {
			wrong = append(wrong, fmt.Sprintf("%s: %v", file.Name, err))
			continue
		}
		for _, p := range list {
			origin := file.Name + ": " + p.Origin()
			if before, twice := all.Origin[p.Ref]; twice {
				wrong = append(wrong, fmt.Sprintf("%s: %s is there twice, first in %s", origin, p.Ref, before))
				continue
			}
			all.Origin[p.Ref] = origin
			all.List = append(all.List, p)
		}
	}
	if len(wrong) > 0 {
		return PolicySet{}, wrong
	}
	return all, nil
}

// Invalid returns an [Errors] with a line for each problem of each policy, or nil
// if there is none.
func (s PolicySet) Invalid() error {
	var wrong Errors
	for _, p := range s.List {
		for _, problem := range p.Problems {
			wrong = append(wrong, fmt.Sprintf("%s: %s: %s", s.Origin[p.Ref], p.Ref, problem))
		}
	}
	if len(wrong) == 0 {
		return nil
	}
	return wrong
}

// Errors is all that is wrong with what was read, one or more. To read it again
// would change nothing.
type Errors []string

// Error returns a line for each.
func (e Errors) Error() string {
	if len(e) == 1 {
		return e[0]
	}
	return fmt.Sprintf("%d problems:\n%s", len(e), strings.Join(e, "\n"))
}
