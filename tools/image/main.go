// Command image makes the container images of Troth, or of any static binary, without
// a container engine and without a base image: an image is one layer of a few files.
//
// Each image becomes two files: NAME.tar, an archive as "docker save" writes it, for
// "ctr -n k8s.io images import" and its like, and NAME.spdx.json, which says what is in
// it. The same source and the same Go give the same bytes, wherever they are built.
//
// build.go compiles the programs, image.go puts them into an image, sbom.go reads back
// from the programs what they were made of.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path"
	"path/filepath"
	"runtime"
	"syscall"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:], os.Stdout, os.Stderr); err != nil {
		fmt.Fprintln(os.Stderr, "image:", err)
		stop()
		os.Exit(1)
	}
}

// options are the command's flags.
type options struct {
	source, out, tag, arch string
	binary, name, user     string
	certificates           string
}

func parse(args []string, stderr io.Writer) (options, error) {
	var o options
	f := flag.NewFlagSet("image", flag.ContinueOnError)
	f.SetOutput(stderr)
	f.StringVar(&o.source, "source", "../..", "folder of the module troth.dev/troth")
	f.StringVar(&o.out, "o", "../../bin/images", "folder to write to")
	f.StringVar(&o.tag, "tag", "dev", "tag of the images, and the version that the programs tell")
	f.StringVar(&o.arch, "arch", runtime.GOARCH, "architecture, as Go calls it")
	f.StringVar(&o.binary, "binary", "", "make an image of this static binary instead, /NAME in it")
	f.StringVar(&o.name, "name", "", "name of that image; required with -binary")
	f.StringVar(&o.user, "user", nobody, "UID:GID that this binary runs as")
	f.StringVar(&o.certificates, "ca-certificates", "", "PEM file of the authorities that the server is to trust for OIDC issuers outside the cluster; none if empty")
	if err := f.Parse(args); err != nil {
		return o, err
	}
	if f.NArg() > 0 {
		return o, fmt.Errorf("unexpected argument %q", f.Arg(0))
	}
	if (o.binary == "") != (o.name == "") {
		return o, errors.New("-binary and -name go together")
	}
	if o.binary != "" && o.certificates != "" {
		return o, errors.New("-ca-certificates is for the image of troth-server")
	}
	return o, nil
}

const (
	nobody = "65532:65532"
	root   = "0:0"

	// Of an image, as it is downloaded.
	serverLimit = 60 << 20
	agentLimit  = 50 << 20
	// Of a program that is read, and of an image of somebody else's.
	binaryLimit = 512 << 20
)

// run is the whole command.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	o, err := parse(args, stderr)
	if err != nil {
		return err
	}
	var specs []spec
	if o.binary != "" {
		program, err := readBounded(o.binary, binaryLimit)
		if err != nil {
			return err
		}
		specs = []spec{{
			name: o.name, title: o.name, user: o.user, limit: binaryLimit,
			files: []file{{path: path.Join("/", o.name), mode: 0o755, content: program}},
		}}
	} else {
		if specs, err = ours(ctx, o, stderr); err != nil {
			return err
		}
	}
	if err := os.MkdirAll(o.out, 0o755); err != nil {
		return err
	}
	for _, s := range specs {
		s.tag, s.arch = o.tag, o.arch
		made, err := s.write(o.out)
		if err != nil {
			return fmt.Errorf("image %s: %w", s.name, err)
		}
		fmt.Fprintf(stdout, "%s:%s %s\n  %.1f MB in %s, %.1f MB unpacked; %d modules\n", s.name, s.tag, made.digest,
			megabytes(made.archived), filepath.Join(o.out, s.name+".tar"), megabytes(made.unpacked), made.modules)
	}
	return nil
}

func megabytes(n int64) float64 { return float64(n) / (1 << 20) }

// ours builds the programs of Troth and says what images they make.
func ours(ctx context.Context, o options, stderr io.Writer) ([]spec, error) {
	programs, err := build(ctx, o, stderr, "troth-server", "troth-agent", "troth-cni")
	if err != nil {
		return nil, err
	}
	server := spec{
		name: "troth-server", title: "Troth control plane", user: nobody, limit: serverLimit,
		files: []file{
			programs["troth-server"],
			{path: "/etc/passwd", mode: 0o644, content: []byte("root:x:0:0:root:/:/sbin/nologin\ntroth:x:65532:65532:troth:/:/sbin/nologin\n")},
			{path: "/etc/group", mode: 0o644, content: []byte("root:x:0:\ntroth:x:65532:\n")},
		},
	}
	if o.certificates != "" {
		const limit = 4 << 20
		content, err := readBounded(o.certificates, limit)
		if err != nil {
			return nil, err
		}
		// One of the places where crypto/x509 looks.
		server.files = append(server.files, file{path: "/etc/ssl/certs/ca-certificates.crt", mode: 0o644, content: content})
	}
	agent := spec{
		name: "troth-agent", title: "Troth node agent", user: root, limit: agentLimit,
		files: []file{programs["troth-agent"], programs["troth-cni"]},
	}
	return []spec{server, agent}, nil
}

// readBounded returns the content of a regular file of at most limit bytes.
func readBounded(path string, limit int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	content, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err != nil {
		return nil, err
	}
	if int64(len(content)) > limit {
		return nil, fmt.Errorf("%s has more than %d bytes", path, limit)
	}
	return content, nil
}
