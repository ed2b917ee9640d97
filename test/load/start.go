package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/spiffe/go-spiffe/v2/workloadapi"
)

// startBar is how long troth dev may take from exec to its first SVID, in ms.
const startBar = 300

// measureStart runs troth dev in new folders, and asks for an SVID through
// go-spiffe as soon as it says where.
func measureStart(ctx context.Context, o options, r *report) (err error) {
	dir, err := os.MkdirTemp("", "troth-load-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	binary := filepath.Join(dir, "troth")
	build := exec.CommandContext(ctx, "go", "build", "-o", binary, "troth.dev/troth/cmd/troth")
	build.Stderr = os.Stderr
	if err := build.Run(); err != nil {
		return fmt.Errorf("build troth: %w", err)
	}
	var dev, version []float64
	for round := range o.rounds + 1 {
		began := time.Now()
		if err := exec.CommandContext(ctx, binary, "version").Run(); err != nil {
			return err
		}
		bare := time.Since(began)
		took, err := firstSVID(ctx, binary, filepath.Join(dir, fmt.Sprint(round)))
		if err != nil {
			return err
		}
		if round > 0 { // the first one reads the binary from disk
			version = append(version, bare.Seconds()*1e3)
			dev = append(dev, took.Seconds()*1e3)
		}
	}
	r.add(row{what: "start: ms from exec to the first SVID (floor: troth version)", troth: dev, floor: version, maxValue: startBar})
	return nil
}

func firstSVID(ctx context.Context, binary, dir string) (_ time.Duration, err error) {
	command := exec.CommandContext(ctx, binary, "dev", "--dir", dir)
	stdout, err := command.StdoutPipe() // what it tells people is dropped
	if err != nil {
		return 0, err
	}
	began := time.Now()
	if err := command.Start(); err != nil {
		return 0, err
	}
	defer func() {
		err = errors.Join(err, command.Process.Signal(syscall.SIGTERM), command.Wait())
	}()
	line, err := bufio.NewReader(stdout).ReadString('\n')
	if err != nil {
		return 0, err
	}
	_, address, ok := strings.Cut(strings.TrimSpace(line), "=")
	if !ok {
		return 0, fmt.Errorf("troth dev says %q", line)
	}
	svid, err := workloadapi.FetchX509SVID(ctx, workloadapi.WithAddr(address))
	if err != nil {
		return 0, err
	}
	took := time.Since(began)
	if svid.ID.Path() != "/ns/default/sa/default" {
		return 0, fmt.Errorf("an SVID of %q", svid.ID)
	}
	return took, nil
}
