package workload_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"golang.org/x/sys/unix"

	"troth.dev/troth/agent/workload"
)

// A child is another process, and another pod, than the test.
func TestCallerIsTheProcessThatConnected(t *testing.T) {
	ca := newAuthority(t, "example.org")
	source := &pods{}
	source.set("parent", ready(t, ca, 1))
	childState := ready(t, ca, 1)
	childState.Identities[0].SVID = ca.issue(t, "/ns/shop/sa/child", time.Hour)
	source.set("child", childState)
	peers := make(chan workload.Peer, 100) // more than the server asks
	_, path := start(t, workload.Config{Source: source, PodOf: func(p workload.Peer) (string, error) {
		if p.PID == int32(os.Getpid()) {
			return "parent", nil
		}
		peers <- p
		return "child", nil
	}})

	if got := recv(t, fetchSVID(t, dial(t, path))).Svids[0].SpiffeId; got != "spiffe://example.org/ns/shop/sa/web" {
		t.Errorf("the test is given the SVID of %q", got)
	}
	c := run(t, "fetch", nil, path, "65534", "65533")
	if got, want := c.line(t), "spiffe://example.org/ns/shop/sa/child"; got != want {
		t.Errorf("the child is given %q, want %q", got, want)
	}
	p := <-peers
	if p.PID != int32(c.Process.Pid) || p.UID != 65534 || p.GID != 65533 {
		t.Errorf("peer = %d, %d, %d, want the child, %d, 65534, 65533", p.PID, p.UID, p.GID, c.Process.Pid)
	}
}

// fetchHelper becomes a user and a group that own nothing, and prints the SPIFFE ID
// that the Workload API gives it.
func fetchHelper() {
	uid, _ := strconv.Atoi(os.Args[2])
	gid, _ := strconv.Atoi(os.Args[3])
	if err := errors.Join(syscall.Setgroups(nil), syscall.Setgid(gid), syscall.Setuid(uid)); err != nil {
		fmt.Println(err)
		return
	}
	svid, err := workloadapi.FetchX509SVID(context.Background(), workloadapi.WithAddr("unix://"+os.Args[1]))
	if err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println(svid.ID)
}

// An attacker lets a process connect, keeps the connection, lets the process end,
// and waits for its number to be given to a process of another pod. The connection
// must be worth nothing from the moment that the process has ended.
func TestCallerThatHasEnded(t *testing.T) {
	for name, end := range map[string]func(*testing.T, *child){
		"reaped": func(_ *testing.T, c *child) { c.end() },
		"zombie": func(t *testing.T, c *child) {
			if err := c.Process.Kill(); err != nil {
				t.Fatal(err)
			}
			// Waits for the end without reaping, so that the number stays taken and
			// /proc/PID stays there.
			if err := unix.Waitid(unix.P_PID, c.Process.Pid, nil, unix.WEXITED|unix.WNOWAIT, nil); err != nil {
				t.Fatal(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			ca := newAuthority(t, "example.org")
			source := &pods{}
			source.set(webPod, ready(t, ca, 1))
			log, logged := newLog()
			// The number is believed by PodOf, as if it had been given again.
			_, path := start(t, workload.Config{Source: source, Log: log})

			c, lent := lend(t, path)
			conn := dialWith(t, func(context.Context, string) (net.Conn, error) {
				if lent == nil {
					return nil, errors.New("there is only one")
				}
				defer func() { lent = nil }()
				return lent, nil
			})
			stream := fetchSVID(t, conn)
			recv(t, stream)

			end(t, c)
			source.set(webPod, ready(t, ca, 2))
			wantDenied(t, stream)
			wantDenied(t, fetchSVID(t, conn))
			wantDenied(t, fetchBundles(t, conn))
			want := fmt.Sprintf("process %d has ended", c.Process.Pid)
			for range 3 {
				if line := logged.next(t); !strings.Contains(line, want) {
					t.Errorf("log = %q, want %q", line, want)
				}
			}
		})
	}
}

// lend has a child connect to path and hand its connection to the test.
func lend(tb testing.TB, path string) (*child, net.Conn) {
	tb.Helper()
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		tb.Fatal(err)
	}
	defer unix.Close(pair[0])
	theirs := os.NewFile(uintptr(pair[1]), "theirs")
	defer theirs.Close()
	c := run(tb, "lend", func(cmd *exec.Cmd) { cmd.ExtraFiles = []*os.File{theirs} }, path)
	if line := c.line(tb); line != "lent" {
		tb.Fatalf("helper: %s", line)
	}
	control := make([]byte, 64)
	_, n, _, _, err := unix.Recvmsg(pair[0], make([]byte, 1), control, unix.MSG_CMSG_CLOEXEC)
	if err != nil {
		tb.Fatal(err)
	}
	messages, err := unix.ParseSocketControlMessage(control[:n])
	if err != nil || len(messages) != 1 {
		tb.Fatalf("%d control messages, %v", len(messages), err)
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil || len(fds) != 1 {
		tb.Fatalf("descriptors %v, %v", fds, err)
	}
	file := os.NewFile(uintptr(fds[0]), "lent")
	defer file.Close()
	conn, err := net.FileConn(file)
	if err != nil {
		tb.Fatal(err)
	}
	return c, conn
}

// lendHelper connects, sends the connection through descriptor 3, and lives until
// its standard input ends.
func lendHelper() {
	conn, err := net.Dial("unix", os.Args[1])
	if err != nil {
		fmt.Println(err)
		return
	}
	file, err := conn.(*net.UnixConn).File()
	if err != nil {
		fmt.Println(err)
		return
	}
	if err := unix.Sendmsg(3, []byte{0}, unix.UnixRights(int(file.Fd())), nil, 0); err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println("lent")
	io.Copy(io.Discard, os.Stdin)
}

// The server is alone in a new PID namespace, as an agent without hostPID is.
func TestCallerInAnotherPIDNamespace(t *testing.T) {
	path := socketPath(t)
	c := run(t, "serve", func(cmd *exec.Cmd) {
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID}
	}, path)
	if line := c.line(t); line != "serving" {
		t.Fatalf("helper: %s", line)
	}
	conn, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.SetReadDeadline(time.Now().Add(20 * time.Second))
	if n, err := conn.Read(make([]byte, 1)); n != 0 || !errors.Is(err, io.EOF) {
		t.Errorf("Read() = %d, %v, want a closed connection", n, err)
	}
	want := "the peer is in a PID namespace that this process cannot see: the agent's pod needs hostPID: true"
	if line := c.line(t); !strings.Contains(line, want) {
		t.Errorf("log = %q, want %q", line, want)
	}
}

// serveHelper serves and writes its log to standard output, until it is killed.
func serveHelper() {
	l, err := workload.Listen(os.Args[1])
	if err != nil {
		fmt.Println(err)
		return
	}
	s, err := workload.New(workload.Config{Source: &pods{}, Log: slog.New(slog.NewJSONHandler(os.Stdout, nil))})
	if err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println("serving")
	fmt.Println(s.Serve(context.Background(), l))
}

// What kernels before 6.5 have to do with, which this one would not need.
func TestPeerOfAnOlderKernel(t *testing.T) {
	c := run(t, "wait", nil)
	c.line(t)
	pid := int32(c.Process.Pid)
	p, err := workload.OpenPeer(pid)
	if err != nil {
		t.Fatalf("OpenPeer(child) = %v", err)
	}
	if err := p.Alive(); err != nil {
		t.Errorf("Alive() = %v, want nil for a child that waits", err)
	}
	c.end()
	want := fmt.Sprintf("process %d has ended", pid)
	if err := p.Alive(); err == nil || err.Error() != want {
		t.Errorf("Alive() = %v, want %q", err, want)
	}
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	want = fmt.Sprintf("process %d: use of closed file", pid)
	if err := p.Alive(); err == nil || err.Error() != want {
		t.Errorf("Alive() = %v, want %q after the connection was closed", err, want)
	}
	if _, err := workload.OpenPeer(pid); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("OpenPeer(child that has ended) = %v, want %v", err, os.ErrNotExist)
	}
}

// The handle on a process is closed with its connection.
func TestPeerOfClosedConnection(t *testing.T) {
	source := &pods{}
	source.set(webPod, ready(t, newAuthority(t, "example.org"), 1))
	peers := make(chan workload.Peer, 10) // more than the server asks
	server, path := newServer(t, workload.Config{Source: source, PodOf: func(p workload.Peer) (string, error) {
		peers <- p
		return webPod, nil
	}}), socketPath(t)
	stop := serve(t, server, path)
	recv(t, fetchSVID(t, dial(t, path)))
	p := <-peers
	if err := p.Alive(); err != nil {
		t.Errorf("Alive() = %v, want nil while the connection is open", err)
	}
	stop()
	want := fmt.Sprintf("process %d: use of closed file", os.Getpid())
	if err := p.Alive(); err == nil || err.Error() != want {
		t.Errorf("Alive() = %v, want %q", err, want)
	}
}

func TestZeroPeer(t *testing.T) {
	if err := (workload.Peer{PID: int32(os.Getpid())}).Alive(); err == nil {
		t.Error("a Peer without a handle on its process is alive")
	}
}

// lookHelper waits for a line, enters a cgroup namespace whose root is where it is
// then, and prints the pod of each process that it is told of.
func lookHelper() {
	runtime.LockOSThread() // a namespace belongs to a thread
	fmt.Println("ready")
	lines := bufio.NewScanner(os.Stdin)
	if !lines.Scan() {
		return
	}
	if err := unix.Unshare(unix.CLONE_NEWCGROUP); err != nil {
		fmt.Println(err)
		return
	}
	for lines.Scan() {
		pid, _ := strconv.Atoi(lines.Text())
		podUID, err := workload.CgroupPod(workload.Peer{PID: int32(pid)})
		if err != nil {
			podUID = err.Error()
		}
		fmt.Println(podUID)
	}
}
