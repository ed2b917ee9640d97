package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path"
	"path/filepath"
)

// build compiles programs of Troth and returns them as files of an image, by name.
//
// What could make the bytes depend on the machine is said here rather than taken from
// it: the flags, the environment that the compiler minds, and, with -trimpath, where the
// source lies.
func build(ctx context.Context, o options, stderr io.Writer, programs ...string) (_ map[string]file, err error) {
	folder, err := os.MkdirTemp("", "troth-image-")
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(folder)) }()

	// grpcnotrace leaves out grpc's debugging page, whose templates keep the linker from
	// dropping what nobody calls: 20 of 67 MB of the server.
	args := []string{
		"build", "-C", o.source, "-tags=grpcnotrace", "-trimpath", "-buildvcs=false", "-mod=readonly",
		"-ldflags", "-s -w -buildid= -X troth.dev/troth/internal/version.stamp=" + o.tag, "-o", folder + string(filepath.Separator),
	}
	for _, name := range programs {
		args = append(args, "./cmd/"+name)
	}
	compile := exec.CommandContext(ctx, "go", args...)
	compile.Stdout, compile.Stderr = stderr, stderr
	compile.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH="+o.arch, "GOFLAGS=", "GOEXPERIMENT=",
		"GOAMD64=v1", "GOARM64=v8.0", "GOFIPS140=off", "GOWORK=off")
	if err := compile.Run(); err != nil {
		return nil, fmt.Errorf("go build: %w", err)
	}
	files := make(map[string]file, len(programs))
	for _, name := range programs {
		content, err := readBounded(filepath.Join(folder, name), binaryLimit)
		if err != nil {
			return nil, err
		}
		files[name] = file{path: path.Join("/", name), mode: 0o755, content: content}
	}
	return files, nil
}
