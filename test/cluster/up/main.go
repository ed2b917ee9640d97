// Command up brings a cluster up for people, says how to use it, and takes it down when
// it is interrupted.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"

	"troth.dev/troth/test/cluster"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "up:", err)
		os.Exit(1)
	}
}

// run brings a cluster up, with the images in files, and waits for the end of ctx.
func run(ctx context.Context, files []string) error {
	dir, err := os.MkdirTemp("", "troth-cluster-")
	if err != nil {
		return err
	}
	c, err := cluster.Start(ctx, cluster.Config{Folder: dir, Progress: os.Stderr})
	if err != nil {
		return err
	}
	if err := use(ctx, c, dir, files); err != nil {
		return errors.Join(err, c.Close())
	}
	if err := c.Close(); err != nil {
		return err
	}
	return os.RemoveAll(dir)
}

func use(ctx context.Context, c *cluster.Cluster, dir string, files []string) error {
	for _, file := range files {
		if err := c.Import(ctx, file); err != nil {
			return err
		}
	}
	kubectl, helm := c.Programs()
	fmt.Printf(`A cluster of two nodes is up. In another terminal:

  export KUBECONFIG=%s
  export PATH=%s:%s:$PATH
  kubectl get nodes,pods --all-namespaces
  helm list --all-namespaces

Logs and the audit log are in %s. Interrupt to end it.
`, c.Kubeconfig(), filepath.Dir(kubectl), filepath.Dir(helm), dir)
	<-ctx.Done()
	return nil
}
