package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containernetworking/cni/libcni"
)

// Configurations as the projects of these names write them, less what is long.
const (
	flannel = `{
  "name": "cbr0",
  "cniVersion": "0.3.1",
  "plugins": [
    {
      "type": "flannel",
      "delegate": {
        "hairpinMode": true,
        "isDefaultGateway": true
      }
    },
    {
      "type": "portmap",
      "capabilities": {
        "portMappings": true
      }
    }
  ]
}
`
	calico  = `{"name":"k8s-pod-network","cniVersion":"0.3.1","plugins":[{"type":"calico","datastore_type":"kubernetes","mtu":0,"nodename_file_optional":false,"ipam":{"type":"calico-ipam","assign_ipv4":"true"},"policy":{"type":"k8s"}},{"type":"bandwidth","capabilities":{"bandwidth":true}}],"x-order":[1.0,2.50,1e3]}`
	kindnet = `
{
	"cniVersion": "1.1.0",
	"disableCheck" : true,
	"plugins": [ {"type": "ptp", "ipMasq": false, "ipam": {"type": "host-local", "ranges": [ [ { "subnet": "10.244.0.0/24" } ] ]}, "mtu": 1500 } ],
	"name": "kindnet"
}`
	bridge = `{
  "cniVersion": "1.0.0",
  "name": "bridge",
  "type": "bridge",
  "bridge": "cni0",
  "ipam": {"type": "host-local", "subnet": "10.85.0.0/16"}
}
`
)

// host is the two folders of a node.
type host struct {
	t         *testing.T
	bin, conf string
}

func newHost(t *testing.T, files map[string]string) *host {
	h := &host{t: t, bin: t.TempDir(), conf: t.TempDir()}
	for name, content := range files {
		h.write(name, content)
	}
	return h
}

func (h *host) write(name, content string) {
	h.t.Helper()
	if err := os.WriteFile(filepath.Join(h.conf, name), []byte(content), 0o600); err != nil {
		h.t.Fatal(err)
	}
}

func (h *host) run(command string, args ...string) error {
	args = append([]string{command, "-bin-dir", h.bin, "-conf-dir", h.conf}, args...)
	if out, err := exec.Command(program, args...).CombinedOutput(); err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	return nil
}

// files returns what is in the folder of configurations.
func (h *host) files() map[string]string {
	h.t.Helper()
	entries, err := os.ReadDir(h.conf)
	if err != nil {
		h.t.Fatal(err)
	}
	all := make(map[string]string)
	for _, e := range entries {
		content, err := os.ReadFile(filepath.Join(h.conf, e.Name()))
		if errors.Is(err, os.ErrNotExist) {
			continue // a file on its way
		}
		if err != nil {
			h.t.Fatal(err)
		}
		all[e.Name()] = string(content)
	}
	return all
}

// chain returns the types of the plugins that a runtime would run.
func (h *host) chain() []string {
	files := h.files()
	for _, name := range slices.Sorted(maps.Keys(files)) {
		if filepath.Ext(name) != ".conflist" {
			if ext := filepath.Ext(name); ext == ".conf" || ext == ".json" {
				return nil
			}
			continue
		}
		list, err := libcni.NetworkConfFromBytes([]byte(files[name]))
		if err != nil {
			return nil
		}
		var types []string
		for _, p := range list.Plugins {
			types = append(types, p.Network.Type)
		}
		return types
	}
	return nil
}

const ours = `{"type":"troth-cni","socket":"/run/troth/cni.sock","excludeNamespaces":["kube-system","troth-system"],"timeout":"30s"}`

func TestInstall(t *testing.T) {
	tests := []struct {
		name          string
		before, after map[string]string
		chain         []string
	}{
		{
			name:   "flannel",
			before: map[string]string{"10-flannel.conflist": flannel},
			after: map[string]string{"10-flannel.conflist": strings.Replace(flannel, `        "portMappings": true
      }
    }`, `        "portMappings": true
      }
    },
    `+ours, 1)},
			chain: []string{"flannel", "portmap", pluginType},
		},
		{
			name:   "calico, and numbers as they were",
			before: map[string]string{"10-calico.conflist": calico, "99-loopback.conf": bridge, "calico-kubeconfig": "x"},
			after: map[string]string{
				"10-calico.conflist": strings.Replace(calico, `true}}]`, `true}},`+ours+`]`, 1),
				"99-loopback.conf":   bridge, "calico-kubeconfig": "x",
			},
			chain: []string{"calico", "bandwidth", pluginType},
		},
		{
			name:   "kindnet, whose plugins come before its name",
			before: map[string]string{"10-kindnet.conflist": kindnet},
			after:  map[string]string{"10-kindnet.conflist": strings.Replace(kindnet, `1500 }`, `1500 }, `+ours, 1)},
			chain:  []string{"ptp", pluginType},
		},
		{
			name:   "bridge, which is no list",
			before: map[string]string{"10-bridge.conf": bridge},
			after: map[string]string{
				"10-bridge.conf.troth-replaced": bridge,
				"10-bridge.conflist": `{"cniVersion":"1.0.0","name":"bridge","plugins":[` + strings.TrimSpace(bridge) + `,` +
					strings.TrimSuffix(ours, "}") + `,"replaces":"10-bridge.conf"}]}` + "\n",
			},
			chain: []string{"bridge", pluginType},
		},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			h := newHost(t, test.before)
			for range 2 { // the second time it is so already
				if err := h.run("install", "-once"); err != nil {
					t.Fatalf("install: %v", err)
				}
				if got := h.files(); !maps.Equal(got, test.after) {
					t.Errorf("installed:\n%v\nwant:\n%v", got, test.after)
				}
				if got := h.chain(); !slices.Equal(got, test.chain) {
					t.Errorf("the runtime runs %v, want %v", got, test.chain)
				}
			}
			if info, err := os.Stat(filepath.Join(h.bin, pluginType)); err != nil || info.Mode() != 0o755 {
				t.Errorf("the binary: %v, %v", info, err)
			}
			for name := range test.before {
				if info, err := os.Stat(filepath.Join(h.conf, name)); err == nil && info.Mode() != 0o600 {
					t.Errorf("%s has mode %v, want what it had", name, info.Mode())
				}
			}
			// With other settings the entry changes, and nothing else.
			if err := h.run("install", "-once", "-timeout", "5s"); err != nil {
				t.Fatal(err)
			}
			for name, content := range h.files() {
				if want := strings.Replace(test.after[name], `"timeout":"30s"`, `"timeout":"5s"`, 1); content != want {
					t.Errorf("%s:\n%s\nwant:\n%s", name, content, want)
				}
			}
			for range 2 {
				if err := h.run("uninstall"); err != nil {
					t.Fatalf("uninstall: %v", err)
				}
				if got := h.files(); !maps.Equal(got, test.before) {
					t.Errorf("uninstalled:\n%v\nwant:\n%v", got, test.before)
				}
			}
			if left, err := os.ReadDir(h.bin); err != nil || len(left) > 0 {
				t.Errorf("left over: %v, %v", left, err)
			}
		})
	}
}

func TestInstallRefuses(t *testing.T) {
	list := func(plugins string) string { return `{"name":"n","cniVersion":"1.0.0","plugins":` + plugins + `}` }
	tests := []struct{ name, file, content, want string }{
		{"nothing there", "", "", "no CNI configuration to be added to"},
		{"no JSON", "a.conflist", "plugins", "invalid character"},
		{"more than one", "a.conflist", calico + "{}", "more after its end"},
		{"no name", "a.conflist", `{"plugins":[{"type":"x"}]}`, "no name"},
		{"no plugins", "a.conflist", list("[]"), "no plugins"},
		{"plugins that are none", "a.conflist", list("{}"), "where [ should be"},
		{"plugins without a type", "a.conflist", list("[{}]"), "no type"},
		{"only ours", "a.conflist", list(`[{"type":"troth-cni"}]`), "no plugin that makes a network"},
		{"plugins twice", "a.conflist", `{"name":"n","plugins":[{"type":"a"}],"plugins":[{"type":"b"}]}`, "twice"},
		{"a version without chains", "a.conflist", `{"name":"n","cniVersion":"0.2.0","plugins":[{"type":"a"}]}`, "no chains"},
		{"a list that is a list", "a.conflist", "[]", "where { should be"},
		{"too large", "a.conflist", strings.Repeat(" ", maxConfig+1), "more than"},
		{"no list, an old version", "a.conf", `{"name":"n","cniVersion":"0.1.0","type":"x"}`, "no chains"},
		{"no list, no version", "a.conf", `{"name":"n","type":"x"}`, "no cniVersion"},
		{"no list, no type", "a.json", `{"name":"n","cniVersion":"1.0.0"}`, "no type"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			h := newHost(t, nil)
			if test.file != "" {
				h.write(test.file, test.content)
			}
			before := h.files()
			if err := h.run("install", "-once"); err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("install: %v, want %q", err, test.want)
			}
			if !maps.Equal(h.files(), before) {
				t.Errorf("install changed %v to %v", before, h.files())
			}
		})
	}
	for _, args := range [][]string{{"remove"}, {"install", "x"}, {"install", "-timeout", "1ms"}, {"uninstall", "-once"}} {
		if err := run(t.Context(), args, io.Discard); err == nil {
			t.Errorf("troth-cni %v is taken", args)
		}
	}
}

func TestEntriesThatAreThere(t *testing.T) {
	const entry = `{"type":"troth-cni","timeout":"1s"}`
	for before, want := range map[string]string{
		`[{"type":"a"}, {"type":"troth-cni"}, {"type":"b"}]`:                        `[{"type":"a"}, ` + entry + `, {"type":"b"}]`,
		`[{"type":"troth-cni"}, {"type":"a"}]`:                                      `[{"type":"a"},` + entry + `]`,
		`[{"type":"troth-cni"}, {"type":"troth-cni"}, {"type":"a"}]`:                `[{"type":"a"},` + entry + `]`,
		`[{"type":"a"}, {"type":"troth-cni"}, {"type":"b"}, {"type":"troth-cni"} ]`: `[{"type":"a"}, {"type":"b"}, ` + entry + ` ]`,
	} {
		l, err := parseConflist([]byte(`{"name":"n","plugins":` + before + `}`))
		if err != nil {
			t.Fatal(err)
		}
		got, err := l.with([]byte(entry))
		if want := `{"name":"n","plugins":` + want + `}`; err != nil || string(got) != want {
			t.Errorf("%s becomes %s, %v, want %s", before, got, err, want)
		}
	}
}

// TestAnotherRewrites has another plugin write its configuration anew, first as it was,
// then under another name that comes first, then as no list.
func TestAnotherRewrites(t *testing.T) {
	h := newHost(t, nil)
	ctx, cancel := context.WithCancel(t.Context())
	kept := make(chan error)
	i := installation{binDir: h.bin, confDir: h.conf, config: config{Timeout: "3s"}, log: slog.New(slog.DiscardHandler)}
	go func() { kept <- i.keep(ctx, 1, 1<<40) }()
	expect := func(want ...string) {
		t.Helper()
		eventually(t, strings.Join(want, ", "), func() bool { return slices.Equal(h.chain(), want) })
	}
	h.write("10-flannel.conflist", flannel) // the node's network comes after us
	expect("flannel", "portmap", pluginType)
	h.write("10-flannel.conflist", flannel)
	expect("flannel", "portmap", pluginType)
	h.write("05-calico.conflist", calico)
	expect("calico", "bandwidth", pluginType)
	h.write("01-bridge.conf", bridge)
	expect("bridge", pluginType)
	h.write("01-bridge.conf", strings.ReplaceAll(bridge, "cni0", "cni1"))
	eventually(t, "the newer bridge", func() bool {
		return slices.Equal(h.chain(), []string{"bridge", pluginType}) && strings.Contains(h.files()["01-bridge.conflist"], "cni1")
	})
	if err := os.Remove(filepath.Join(h.conf, "01-bridge.conflist")); err != nil {
		t.Fatal(err)
	}
	expect("calico", "bandwidth", pluginType)
	cancel()
	if err := <-kept; err != nil {
		t.Errorf("keep() = %v", err)
	}
	expect("calico", "bandwidth", pluginType) // it stays when nobody keeps it
}

// TestKilledWhileInstalling kills the command again and again, at any moment. There is
// always a configuration that a runtime would take, whole, and no name of a binary that
// is not there; the next one ends what this one began.
func TestKilledWhileInstalling(t *testing.T) {
	for _, name := range []string{"10-flannel.conflist", "10-bridge.conf"} {
		content := map[string]string{"10-flannel.conflist": flannel, "10-bridge.conf": bridge}[name]
		h := newHost(t, map[string]string{name: content})
		for n := range 40 {
			command := []string{"install", "-once"}
			if n%2 == 1 {
				command = []string{"uninstall"}
			}
			cmd := exec.Command(program, append(command[:1:1], append([]string{"-bin-dir", h.bin, "-conf-dir", h.conf}, command[1:]...)...)...)
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			// A little later each time: by as many looks at what it has done as fit.
			eventually(t, "it has begun", func() bool { return begun(cmd.Process.Pid) })
			for range n * 8 {
				h.files()
			}
			cmd.Process.Kill()
			cmd.Wait()
			valid := false
			files := h.files()
			for file, content := range files {
				switch filepath.Ext(file) {
				case ".conflist":
					list, err := libcni.NetworkConfFromBytes([]byte(content))
					if err != nil {
						t.Fatalf("after %v: %s: %v", command, file, err)
					}
					valid = true
					if _, err := os.Stat(filepath.Join(h.bin, pluginType)); err != nil && list.Plugins[len(list.Plugins)-1].Network.Type == pluginType {
						t.Fatalf("after %v: %s names a binary that is not there", command, file)
					}
				case ".conf":
					if !json.Valid([]byte(content)) {
						t.Fatalf("after %v: %s: %q", command, file, content)
					}
					valid = true
				}
			}
			if !valid {
				t.Fatalf("after %v there is no configuration: %v", command, files)
			}
		}
		if err := h.run("install", "-once"); err != nil {
			t.Fatal(err)
		}
		if got := h.chain(); !slices.Contains(got, pluginType) {
			t.Errorf("the runtime runs %v", got)
		}
		if err := h.run("uninstall"); err != nil {
			t.Fatal(err)
		}
		files := h.files()
		maps.DeleteFunc(files, func(file, _ string) bool { return strings.HasPrefix(file, temporary) })
		if want := map[string]string{name: content}; !maps.Equal(files, want) {
			t.Errorf("uninstalled: %v, want %v", files, want)
		}
	}
}

// begun reports whether a process runs its own program, or has ended.
func begun(pid int) bool {
	name, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
	return err != nil || bytes.HasPrefix(name, []byte(pluginType))
}

func FuzzConflist(f *testing.F) {
	for _, s := range []string{flannel, calico, kindnet, bridge, `{"name":"n","plugins":[{"type":"troth-cni"},{"type":"a"},{"type":"troth-cni"}]}`} {
		f.Add([]byte(s))
	}
	entry := []byte(ours)
	f.Fuzz(func(t *testing.T, content []byte) {
		if list, err := listOf(content); err == nil {
			if _, err := parseConflist(list); err != nil {
				t.Errorf("%q is made a list that is none: %v", content, err)
			}
		}
		l, err := parseConflist(content)
		if err != nil {
			return
		}
		with, err := l.with(entry)
		if err != nil {
			return
		}
		again, err := parseConflist(with)
		if err != nil || len(again.ours) != 1 || again.ours[0] == 0 || len(again.plugins) != len(l.plugins)-len(l.ours)+1 {
			t.Fatalf("%q becomes %q: %v", content, with, err)
		}
		if twice, err := again.with(entry); err != nil || !bytes.Equal(twice, with) {
			t.Errorf("%q becomes %q the second time, %v", with, twice, err)
		}
		if without := again.without(); len(l.ours) == 0 && !bytes.Equal(without, content) {
			t.Errorf("%q comes back as %q", content, without)
		}
	})
}
