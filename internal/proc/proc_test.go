package proc_test

import (
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"troth.dev/troth/internal/proc"
)

func TestPeerIsWhoConnected(t *testing.T) {
	address := &net.UnixAddr{Name: filepath.Join(t.TempDir(), "s"), Net: "unix"}
	l, err := net.ListenUnix("unix", address)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	near, err := net.DialUnix("unix", nil, address)
	if err != nil {
		t.Fatal(err)
	}
	defer near.Close()
	far, err := l.AcceptUnix()
	if err != nil {
		t.Fatal(err)
	}
	want := proc.Credentials{PID: int32(os.Getpid()), UID: uint32(os.Getuid()), GID: uint32(os.Getgid())}
	for _, end := range []*net.UnixConn{near, far} {
		if got, err := proc.Peer(end); got != want || err != nil {
			t.Errorf("Peer() = %+v, %v, want %+v", got, err, want)
		}
	}
	far.Close()
	if got, err := proc.Peer(far); err == nil {
		t.Errorf("Peer() = %+v of a socket that is closed", got)
	}
}

// The name of a process is its own choice, and says nothing about where it ends.
func TestStatOfAProcessWithABadName(t *testing.T) {
	sleep, err := exec.LookPath("sleep")
	if err != nil {
		t.Fatal(err)
	}
	named := filepath.Join(t.TempDir(), ") 1 S (x")
	program, err := os.ReadFile(sleep)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(named, program, 0o755); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(named, "60")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	defer cmd.Process.Kill()
	own, err := proc.StatOf(int32(os.Getpid()))
	if err != nil || own.Parent != int32(os.Getppid()) {
		t.Fatalf("StatOf() = %+v, %v, want the parent %d", own, err, os.Getppid())
	}
	got, err := proc.StatOf(int32(cmd.Process.Pid))
	if err != nil || got.Parent != int32(os.Getpid()) || got.Started < own.Started {
		t.Errorf("StatOf() = %+v, %v, want the parent %d and to have begun after %d", got, err, os.Getpid(), own.Started)
	}
}
