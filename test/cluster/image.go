package cluster

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
)

// The images that every cluster has. They are only on its nodes: a pod that uses one
// says imagePullPolicy: Never.
const (
	PauseImage    = "images.test/troth-test-pause:1"
	AppImage      = "images.test/troth-test-app:1"      // /app, see the folder image/app
	WorkloadImage = "images.test/troth-test-workload:1" // /workload, see the folder image/workload
	dnsImage      = "images.test/coredns:test"          // /coredns
)

// images makes the images of a cluster, each of one static program, and returns their files.
func (c *Cluster) images(ctx context.Context) ([]string, error) {
	var files []string
	for _, each := range []struct{ image, name string }{
		{PauseImage, "pause"}, {AppImage, "app"}, {WorkloadImage, "workload"}, {dnsImage, "coredns"},
	} {
		program := filepath.Join(c.programs.coredns, each.name)
		if each.image != dnsImage {
			program = c.file(each.name)
			if err := buildProgram(ctx, program, "./test/cluster/image/"+each.name); err != nil {
				return nil, err
			}
		}
		file := c.file(each.name + ".tar")
		if err := writeImage(file, each.image, program); err != nil {
			return nil, fmt.Errorf("make image %s: %w", each.image, err)
		}
		files = append(files, file)
	}
	return files, nil
}

// buildProgram builds a program of ours.
func buildProgram(ctx context.Context, output, path string) error {
	root, err := exec.CommandContext(ctx, "go", "list", "-m", "-f", "{{.Dir}}", "troth.dev/troth").Output()
	if err != nil {
		return fmt.Errorf("find Troth's checkout: %w", err)
	}
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags", "-s -w", "-o", output, path)
	cmd.Dir = string(bytes.TrimSpace(root))
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if said, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("build %s: %w\n%s", path, err, said)
	}
	return nil
}

// writeImage writes an image of one program, which is its entry point, as docker save
// would: an archive of a configuration, one layer, and a manifest that names both.
func writeImage(file, name, program string) error {
	content, err := os.ReadFile(program)
	if err != nil {
		return err
	}
	base := filepath.Base(program)
	var layer bytes.Buffer
	if err := writeTar(&layer, []entry{{base, 0o755, content}}); err != nil {
		return err
	}
	digest := sha256.Sum256(layer.Bytes())
	config, err := json.Marshal(map[string]any{
		"architecture": runtime.GOARCH,
		"os":           "linux",
		"config":       map[string]any{"Entrypoint": []string{"/" + base}, "WorkingDir": "/"},
		"rootfs":       map[string]any{"type": "layers", "diff_ids": []string{"sha256:" + hex.EncodeToString(digest[:])}},
	})
	if err != nil {
		return err
	}
	manifest, err := json.Marshal([]any{map[string]any{
		"Config": "config.json", "RepoTags": []string{name}, "Layers": []string{"layer.tar"},
	}})
	if err != nil {
		return err
	}
	output, err := os.Create(file)
	if err != nil {
		return err
	}
	err = writeTar(output, []entry{
		{"config.json", 0o644, config}, {"layer.tar", 0o644, layer.Bytes()}, {"manifest.json", 0o644, manifest},
	})
	if err != nil {
		output.Close()
		return err
	}
	return output.Close()
}

type entry struct {
	name    string
	mode    int64
	content []byte
}

func writeTar(w io.Writer, entries []entry) error {
	archive := tar.NewWriter(w)
	for _, e := range entries {
		header := &tar.Header{Name: e.name, Mode: e.mode, Size: int64(len(e.content)), Typeflag: tar.TypeReg}
		if err := archive.WriteHeader(header); err != nil {
			return err
		}
		if _, err := archive.Write(e.content); err != nil {
			return err
		}
	}
	return archive.Close()
}
