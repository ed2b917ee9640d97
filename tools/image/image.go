package main

import (
	"archive/tar"
	"bytes"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

// spec says what an image is made of. Its first file is the program that it runs.
type spec struct {
	name, tag, title, arch string
	user                   string // UID:GID
	limit                  int64  // of what a node downloads, in bytes
	files                  []file
}

// file is a file of an image, which belongs to root.
type file struct {
	path    string
	mode    int64
	content []byte
}

// made tells what was written.
type made struct {
	digest             v1.Hash // of the manifest
	archived, unpacked int64   // bytes
	modules            int
}

// write writes the image and its bill of materials into folder. Each replaces its
// predecessor whole.
func (s spec) write(folder string) (made, error) {
	var m made
	if err := s.check(); err != nil {
		return m, err
	}
	for _, f := range s.files {
		m.unpacked += int64(len(f.content))
	}
	image, err := s.image()
	if err != nil {
		return m, err
	}
	if size, err := download(image); err != nil {
		return m, err
	} else if size > s.limit {
		return m, fmt.Errorf("has %d bytes, compressed, and may have %d", size, s.limit)
	}
	if m.digest, err = image.Digest(); err != nil {
		return m, err
	}
	// With its own name and no registry: who imports it decides where it belongs.
	tag, err := name.NewTag(s.name + ":" + s.tag)
	if err != nil {
		return m, err
	}
	bill, modules, err := s.bill(m.digest)
	if err != nil {
		return m, err
	}
	m.modules = modules
	archive := filepath.Join(folder, s.name+".tar")
	if err := replace(archive, func(w io.Writer) error { return tarball.Write(tag, image, w) }); err != nil {
		return m, err
	}
	info, err := os.Stat(archive)
	if err != nil {
		return m, err
	}
	m.archived = info.Size()
	return m, replace(filepath.Join(folder, s.name+".spdx.json"), func(w io.Writer) error {
		_, err := w.Write(bill)
		return err
	})
}

// check refuses what would not run in an image that has nothing else in it.
func (s spec) check() error {
	if !regexp.MustCompile(`^[a-z0-9]+([._-][a-z0-9]+)*$`).MatchString(s.name) {
		return fmt.Errorf("%q is no name of an image: lower-case letters and digits, with . _ or - between them", s.name)
	}
	if !regexp.MustCompile(`^[0-9]{1,10}:[0-9]{1,10}$`).MatchString(s.user) {
		return fmt.Errorf("%q is no UID:GID: the image has no names of users that every runtime reads", s.user)
	}
	machines := map[string]elf.Machine{"amd64": elf.EM_X86_64, "arm64": elf.EM_AARCH64}
	machine, ok := machines[s.arch]
	if !ok {
		return fmt.Errorf("architecture %q: images are made for amd64 and arm64", s.arch)
	}
	for _, f := range s.programs() {
		program, err := elf.NewFile(bytes.NewReader(f.content))
		if err != nil {
			return fmt.Errorf("%s is no program for Linux: %w", f.path, err)
		}
		if program.Machine != machine {
			return fmt.Errorf("%s is a program for %s, not for %s", f.path, program.Machine, s.arch)
		}
		if slices.ContainsFunc(program.Progs, func(p *elf.Prog) bool { return p.Type == elf.PT_INTERP }) {
			return fmt.Errorf("%s is linked dynamically, and the image has no libraries: build it with CGO_ENABLED=0", f.path)
		}
	}
	return nil
}

// programs returns the files that are executed.
func (s spec) programs() []file {
	return slices.DeleteFunc(slices.Clone(s.files), func(f file) bool { return f.mode&0o111 == 0 })
}

func (s spec) image() (v1.Image, error) {
	content, err := s.layer()
	if err != nil {
		return nil, err
	}
	layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) {
		return io.NopCloser(bytes.NewReader(content)), nil
	}, tarball.WithCompressedCaching)
	if err != nil {
		return nil, err
	}
	epoch := v1.Time{Time: time.Unix(0, 0).UTC()}
	image, err := mutate.Append(empty.Image, mutate.Addendum{
		Layer:   layer,
		History: v1.History{Created: epoch, CreatedBy: "troth.dev/troth/tools/image"},
	})
	if err != nil {
		return nil, err
	}
	// With the history and the layers that it has by now.
	config, err := image.ConfigFile()
	if err != nil {
		return nil, err
	}
	config = config.DeepCopy()
	config.Architecture, config.OS, config.Created = s.arch, "linux", epoch
	config.Config = v1.Config{
		User:       s.user,
		Entrypoint: []string{s.files[0].path},
		WorkingDir: "/",
		Labels: map[string]string{
			"org.opencontainers.image.title":   s.title,
			"org.opencontainers.image.version": s.tag,
		},
	}
	return mutate.ConfigFile(image, config)
}

// download returns how many bytes a node that has nothing yet gets for an image.
func download(image v1.Image) (int64, error) {
	manifest, err := image.Manifest()
	if err != nil {
		return 0, err
	}
	size := manifest.Config.Size
	for _, layer := range manifest.Layers {
		size += layer.Size
	}
	return size, nil
}

// layer returns the files as a tar archive, sorted, with the folders that they are in
// and without a time.
func (s spec) layer() ([]byte, error) {
	files := slices.Clone(s.files)
	seen := make(map[string]bool)
	for _, f := range s.files {
		if !path.IsAbs(f.path) || path.Clean(f.path) != f.path {
			return nil, fmt.Errorf("%q is no place in an image", f.path)
		}
		for above := path.Dir(f.path); above != "/"; above = path.Dir(above) {
			if !seen[above] {
				seen[above] = true
				files = append(files, file{path: above + "/", mode: 0o755})
			}
		}
	}
	slices.SortFunc(files, func(a, b file) int { return strings.Compare(a.path, b.path) })

	var content bytes.Buffer
	w := tar.NewWriter(&content)
	for _, f := range files {
		header := &tar.Header{
			Typeflag: tar.TypeReg, Name: strings.TrimPrefix(f.path, "/"), Mode: f.mode,
			Size: int64(len(f.content)), ModTime: time.Unix(0, 0), Format: tar.FormatUSTAR,
		}
		if strings.HasSuffix(f.path, "/") {
			header.Typeflag = tar.TypeDir
		}
		if err := w.WriteHeader(header); err != nil {
			return nil, err
		}
		if _, err := w.Write(f.content); err != nil {
			return nil, err
		}
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	return content.Bytes(), nil
}

// replace puts what write writes into the place of path. Whoever reads path sees the
// old content or the new one, whole.
func replace(path string, write func(io.Writer) error) (err error) {
	f, err := os.CreateTemp(filepath.Dir(path), ".image-")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.Remove(f.Name()))
		}
	}()
	if err := errors.Join(write(f), f.Chmod(0o644), f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}
