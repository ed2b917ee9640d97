package main

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	spdx "github.com/spdx/tools-golang/json"
	"github.com/spdx/tools-golang/spdxlib"
)

const product = "../.."

// TestImages makes the images of Troth twice, from two folders, and looks into them
// with the library that registries' clients are made of.
func TestImages(t *testing.T) {
	var sources, outs [2]string
	for i := range outs {
		sources[i] = t.TempDir()
		copySource(t, product, sources[i])
		outs[i] = t.TempDir()
		var told bytes.Buffer
		if err := run(t.Context(), []string{"-source", sources[i], "-o", outs[i], "-tag", "v0.0.0-test"}, &told, os.Stderr); err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{"troth-server", "troth-agent"} {
			digest, err := open(t, filepath.Join(outs[i], name+".tar")).Digest()
			if err != nil {
				t.Fatal(err)
			}
			if want := fmt.Sprintf("%s:v0.0.0-test %s\n", name, digest); !strings.Contains(told.String(), want) {
				t.Errorf("told %q, want %q in it", &told, want)
			}
		}
		t.Logf("\n%s", &told)
	}

	t.Run("reproducible", func(t *testing.T) {
		for _, name := range []string{"troth-server.tar", "troth-server.spdx.json", "troth-agent.tar", "troth-agent.spdx.json"} {
			first, second := read(t, filepath.Join(outs[0], name)), read(t, filepath.Join(outs[1], name))
			if !bytes.Equal(first, second) {
				t.Errorf("%s differs between two builds of the same source", name)
			}
		}
	})

	for _, test := range []struct {
		name, user string
		entrypoint []string
		files      []string
		runs       map[string]string // argument lists, and what the program says of them
		module     string            // one that has to be in the bill
		not        string            // one that must not
	}{
		{
			name: "troth-server", user: "65532:65532", entrypoint: []string{"/troth-server"},
			files:  []string{"etc 755 0:0", "etc/group 644 0:0", "etc/passwd 644 0:0", "troth-server 755 0:0"},
			runs:   map[string]string{"/troth-server": "troth-server: -trust-domain is required\n"},
			module: "k8s.io/client-go", not: "github.com/containernetworking/cni",
		},
		{
			name: "troth-agent", user: "0:0", entrypoint: []string{"/troth-agent"},
			files: []string{"troth-agent 755 0:0", "troth-cni 755 0:0"},
			runs: map[string]string{
				"/troth-agent":             "troth-agent: -trust-domain is required\n",
				"/troth-agent keep excess": "troth-agent: unexpected argument \"excess\"\n",
				"/troth-cni nothing":       "troth-cni: ",
			},
			module: "github.com/containernetworking/cni", not: "k8s.io/client-go",
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			archive := filepath.Join(outs[0], test.name+".tar")
			image := open(t, archive)
			config, err := image.ConfigFile()
			if err != nil {
				t.Fatal(err)
			}
			want := v1.Config{
				User: test.user, Entrypoint: test.entrypoint, WorkingDir: "/",
				Labels: map[string]string{
					"org.opencontainers.image.title":   config.Config.Labels["org.opencontainers.image.title"],
					"org.opencontainers.image.version": "v0.0.0-test",
				},
			}
			if diff := cmp.Diff(want, config.Config); diff != "" {
				t.Errorf("configuration (-want +got):\n%s", diff)
			}
			if config.OS != "linux" || config.Architecture != runtime.GOARCH {
				t.Errorf("is for %s/%s, want linux/%s", config.OS, config.Architecture, runtime.GOARCH)
			}
			manifest, err := tarball.LoadManifest(func() (io.ReadCloser, error) { return os.Open(archive) })
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff([]string{test.name + ":v0.0.0-test"}, manifest[0].RepoTags); diff != "" {
				t.Errorf("tags (-want +got):\n%s", diff)
			}

			unpacked := t.TempDir()
			if diff := cmp.Diff(test.files, unpack(t, image, unpacked)); diff != "" {
				t.Errorf("files (-want +got):\n%s", diff)
			}
			for args, want := range test.runs {
				said := runIn(t, unpacked, test.user, strings.Fields(args))
				if !strings.Contains(said, want) {
					t.Errorf("%s says %q, want %q in it", args, said, want)
				}
			}
			for _, program := range test.files {
				name, _, _ := strings.Cut(program, " ")
				if strings.HasPrefix(name, "troth-") && bytes.Contains(read(t, filepath.Join(unpacked, name)), []byte(sources[0])) {
					t.Errorf("%s names the folder that it was built in", name)
				}
			}

			modules := bill(t, filepath.Join(outs[0], test.name+".spdx.json"), image)
			if sum := modules[test.module]; !strings.HasPrefix(sum, "go.sum: h1:") {
				t.Errorf("the bill says %q of %s, want its sum", sum, test.module)
			}
			if _, ok := modules[test.not]; ok {
				t.Errorf("the bill has %s, which is in no program", test.not)
			}
			for _, always := range []string{"stdlib", troth} {
				if _, ok := modules[always]; !ok {
					t.Errorf("the bill lacks %s", always)
				}
			}
		})
	}
}

// TestBinary makes an image of a program that is not Troth's.
func TestBinary(t *testing.T) {
	folder := t.TempDir()
	if err := os.WriteFile(filepath.Join(folder, "main.go"), []byte("package main\n\nfunc main() { println(\"here\") }\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	program := filepath.Join(folder, "program")
	compile := exec.CommandContext(t.Context(), "go", "build", "-o", program, filepath.Join(folder, "main.go"))
	compile.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := compile.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	out := t.TempDir()
	if err := run(t.Context(), []string{"-binary", program, "-name", "test-app", "-tag", "t", "-o", out}, io.Discard, os.Stderr); err != nil {
		t.Fatal(err)
	}
	image := open(t, filepath.Join(out, "test-app.tar"))
	unpacked := t.TempDir()
	if diff := cmp.Diff([]string{"test-app 755 0:0"}, unpack(t, image, unpacked)); diff != "" {
		t.Errorf("files (-want +got):\n%s", diff)
	}
	if said := runIn(t, unpacked, nobody, []string{"/test-app"}); said != "here\n" {
		t.Errorf("it says %q", said)
	}
	bill(t, filepath.Join(out, "test-app.spdx.json"), image)
}

func TestRefusals(t *testing.T) {
	dynamic := filepath.Join(t.TempDir(), "dynamic")
	cc := exec.CommandContext(t.Context(), "cc", "-x", "c", "-o", dynamic, "-")
	cc.Stdin = strings.NewReader("int main(void) { return 0; }\n")
	if out, err := cc.CombinedOutput(); err != nil {
		t.Fatalf("cc: %v (install gcc and libc6-dev)\n%s", err, out)
	}
	script := filepath.Join(t.TempDir(), "script")
	if err := os.WriteFile(script, []byte("#!/bin/sh\n"+strings.Repeat("#", 100)), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct{ args, want string }{
		{"-binary " + dynamic, "-binary and -name go together"},
		{"-name x", "-binary and -name go together"},
		{"excess", `unexpected argument "excess"`},
		{"-binary " + dynamic + " -name x", "image x: /x is linked dynamically, and the image has no libraries: build it with CGO_ENABLED=0"},
		{"-binary " + dynamic + " -name x -arch s390x", `image x: architecture "s390x": images are made for amd64 and arm64`},
		{"-binary " + script + " -name x", "image x: /x is no program for Linux: bad magic number '[35 33 47 98]' in record at byte 0x0"},
		{"-binary " + script + " -name ../x", `image ../x: "../x" is no name of an image: lower-case letters and digits, with . _ or - between them`},
		{"-binary " + script + " -name x -user nobody", `image x: "nobody" is no UID:GID: the image has no names of users that every runtime reads`},
		{"-binary " + script + " -name x -ca-certificates " + script, "-ca-certificates is for the image of troth-server"},
	} {
		out := t.TempDir()
		err := run(t.Context(), append(strings.Fields(test.args), "-o", out), io.Discard, io.Discard)
		if err == nil || err.Error() != test.want {
			t.Errorf("image %s: %v, want %q", test.args, err, test.want)
		}
		if left, err := os.ReadDir(out); err != nil || len(left) > 0 {
			t.Errorf("image %s leaves %v, %v", test.args, left, err)
		}
	}
}

// TestLimit holds an image to its size.
func TestLimit(t *testing.T) {
	s := spec{name: "x", tag: "x", arch: runtime.GOARCH, user: nobody, limit: 10, files: []file{{path: "/etc/x", mode: 0o644, content: []byte("x")}}}
	out := t.TempDir()
	if _, err := s.write(out); err == nil || !strings.HasSuffix(err.Error(), " bytes, compressed, and may have 10") {
		t.Errorf("an image above its limit: %v", err)
	}
	if left, err := os.ReadDir(out); err != nil || len(left) > 0 {
		t.Errorf("an image above its limit leaves %v, %v", left, err)
	}
}

// copySource copies what the compiler reads of a module: not its history, nor what was
// built of it.
func copySource(t *testing.T, from, to string) {
	t.Helper()
	err := filepath.WalkDir(from, func(path string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		relative, err := filepath.Rel(from, path)
		if err != nil {
			return err
		}
		switch {
		case relative == ".git" || relative == "bin" || relative == "tools" || relative == "test" || entry.Name() == "testdata":
			if entry.IsDir() {
				return filepath.SkipDir
			}
			return nil
		case entry.IsDir():
			return os.MkdirAll(filepath.Join(to, relative), 0o755)
		case !entry.Type().IsRegular():
			return nil
		}
		content, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		return os.WriteFile(filepath.Join(to, relative), content, 0o644)
	})
	if err != nil {
		t.Fatal(err)
	}
}

func open(t *testing.T, archive string) v1.Image {
	t.Helper()
	image, err := tarball.ImageFromPath(archive, nil)
	if err != nil {
		t.Fatal(err)
	}
	return image
}

func read(t *testing.T, path string) []byte {
	t.Helper()
	content, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return content
}

// unpack writes the image's files into folder and lists them, with mode and owner.
func unpack(t *testing.T, image v1.Image, folder string) []string {
	t.Helper()
	// Others than root have to get through to the programs.
	for above := folder; strings.HasPrefix(above, os.TempDir()+"/"); above = filepath.Dir(above) {
		if err := os.Chmod(above, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	content := mutate.Extract(image)
	defer content.Close()
	var list []string
	for r := tar.NewReader(content); ; {
		header, err := r.Next()
		if errors.Is(err, io.EOF) {
			return list
		}
		if err != nil {
			t.Fatal(err)
		}
		if header.ModTime.Unix() != 0 {
			t.Errorf("%s has a time: %s", header.Name, header.ModTime)
		}
		name := filepath.Join(folder, header.Name)
		list = append(list, fmt.Sprintf("%s %o %d:%d", header.Name, header.Mode, header.Uid, header.Gid))
		if header.Typeflag == tar.TypeDir {
			if err := os.MkdirAll(name, header.FileInfo().Mode()); err != nil {
				t.Fatal(err)
			}
			continue
		}
		data, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, data, header.FileInfo().Mode()); err != nil {
			t.Fatal(err)
		}
	}
}

// runIn runs a program with folder as its whole world, as the image's user, and
// returns what it says.
func runIn(t *testing.T, folder, user string, args []string) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("only root changes the root folder: run the tests as root, or in \"unshare -r\"")
	}
	var id syscall.Credential
	if _, err := fmt.Sscanf(user, "%d:%d", &id.Uid, &id.Gid); err != nil {
		t.Fatal(err)
	}
	program := exec.CommandContext(t.Context(), args[0], args[1:]...)
	program.Dir = "/"
	program.Env = []string{}
	program.SysProcAttr = &syscall.SysProcAttr{Chroot: folder, Credential: &id}
	said, err := program.CombinedOutput()
	if exit := (*exec.ExitError)(nil); err != nil && !errors.As(err, &exit) {
		t.Fatalf("%s: %v", args, err)
	}
	return string(said)
}

// bill reads a bill of materials with the library of those who define SPDX, and
// returns the comment on each module.
func bill(t *testing.T, path string, image v1.Image) map[string]string {
	t.Helper()
	document, err := spdx.Read(bytes.NewReader(read(t, path)))
	if err != nil {
		t.Fatal(err)
	}
	if err := spdxlib.ValidateDocument(document); err != nil {
		t.Error(err)
	}
	digest, err := image.Digest()
	if err != nil {
		t.Fatal(err)
	}
	modules := make(map[string]string)
	for _, p := range document.Packages {
		if "SPDXRef-"+string(p.PackageSPDXIdentifier) == imageID {
			if p.PackageChecksums[0].Value != digest.Hex {
				t.Errorf("the bill is of %s, the image is %s", p.PackageChecksums[0].Value, digest.Hex)
			}
			continue
		}
		if _, twice := modules[p.PackageName]; twice {
			t.Errorf("the bill has %s twice", p.PackageName)
		}
		modules[p.PackageName] = p.PackageComment
	}
	return modules
}
