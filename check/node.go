package check

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"troth.dev/troth/internal/bounded"
)

// pluginName is the CNI plugin's: in a configuration, and in the folder of plugins.
const pluginName = "troth-cni"

// maxConflist bounds a CNI configuration that is read, in bytes.
const maxConflist = 1 << 20

func nodeChecks() []definition {
	return []definition{
		{Check{
			"cni-order", "troth-cni is the last CNI plugin of this node",
			"Before it the pod has no network to capture; what comes after it can send packets past it.",
			"The container cni of the node's agent puts it there within seconds: look at its log. If another program takes it out again, give that one a file of its own (docs/cni.md).",
		}, onNode, func(s *Snapshot) finding {
			return with(s.Node, func(n Node) finding {
				at := slices.Index(n.Plugins, pluginName)
				switch {
				case n.Conflist == "":
					return fail("this node has no CNI configuration")
				case at < 0:
					return fail("%s does not name %s, but %s", n.Conflist, pluginName, strings.Join(n.Plugins, ", "))
				case at != len(n.Plugins)-1:
					return fail("%s comes before %s in %s", pluginName, strings.Join(n.Plugins[at+1:], ", "), n.Conflist)
				}
				return pass("%s: %s", n.Conflist, strings.Join(n.Plugins, ", "))
			})
		}},
		{Check{
			"cni-program", "The program troth-cni is on this node",
			"A configuration that names a program which is not there lets no pod start.",
			"Look at the log of the container cni of the node's agent, and at cni.binDir.",
		}, onNode, func(s *Snapshot) finding {
			return with(s.Node, func(n Node) finding {
				switch named := slices.Contains(n.Plugins, pluginName); {
				case !n.Binary && named:
					return fail("the configuration names %s, and the program is not there", pluginName)
				case !n.Binary:
					return fail("the program is not there")
				}
				return pass("the program is there")
			})
		}},
		{Check{
			"node-sockets", "The agent listens on this node",
			"Pods get their certificates at one socket; the CNI plugin asks for capture at another, and lets no pod start without an answer.",
			"Look at the agent of this node and its log.",
		}, onNode, func(s *Snapshot) finding {
			return with(s.Node, func(n Node) finding {
				var missing []string
				for _, path := range slices.Sorted(maps.Keys(n.Sockets)) {
					if !n.Sockets[path] {
						missing = append(missing, path)
					}
				}
				switch {
				case len(n.Sockets) == 0:
					return unknown("no socket was looked for")
				case len(missing) > 0:
					return fail("nobody listens at %s", strings.Join(missing, ", "))
				}
				return pass("%s", strings.Join(slices.Sorted(maps.Keys(n.Sockets)), ", "))
			})
		}},
	}
}

// readConflist returns the CNI configuration in a folder that a container runtime uses:
// of the files with its endings the first by name.
func readConflist(folder string) (path string, plugins []string, err error) {
	entries, err := os.ReadDir(folder)
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil, nil
	}
	if err != nil {
		return "", nil, err
	}
	for _, entry := range entries { // sorted by name
		switch filepath.Ext(entry.Name()) {
		case ".conf", ".conflist", ".json":
			path = filepath.Join(folder, entry.Name())
			content, err := bounded.ReadFile(path, maxConflist)
			if err != nil {
				return "", nil, err
			}
			plugins, err = parseConflist(content)
			if err != nil {
				return "", nil, fmt.Errorf("%s: %w", path, err)
			}
			return path, plugins, nil
		}
	}
	return "", nil, nil
}

// parseConflist returns the names of the plugins of a network configuration list, or of
// a configuration that is none.
func parseConflist(content []byte) ([]string, error) {
	type plugin struct {
		Type string `json:"type"`
	}
	var list struct {
		Type    string   `json:"type"`
		Plugins []plugin `json:"plugins"`
	}
	decoder := json.NewDecoder(bytes.NewReader(content))
	if err := decoder.Decode(&list); err != nil {
		return nil, err
	}
	if _, err := decoder.Token(); !errors.Is(err, io.EOF) {
		return nil, errors.New("there is more after its end")
	}
	if list.Plugins == nil && list.Type != "" {
		return []string{list.Type}, nil
	}
	names := []string{}
	for _, p := range list.Plugins {
		if p.Type == "" {
			return nil, errors.New("a plugin without a type")
		}
		names = append(names, p.Type)
	}
	if len(names) == 0 {
		return nil, errors.New("it has no plugins")
	}
	return names, nil
}
