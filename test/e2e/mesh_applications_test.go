package e2e_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// What two applications do to each other goes through: an end as an end, a reset as
// a reset, whoever speaks first, and every byte.
func TestMeshApplications(t *testing.T) {
	t.Parallel()
	m := newMesh(t, meshConfig{})
	m.policy(t, "all", strict)
	a, b := m.two(t)
	for _, to := range b.at(echoPort) {
		must(t)(a.ns.greeted(t, to))
	}
	applications(t, a, b)
}

// applications lets those of two pods do all that they may do to each other.
func applications(t *testing.T, a, b *sandbox) {
	t.Run("nc ends its half and waits for the answer", func(t *testing.T) {
		for n, to := range b.at(9001) {
			listener := startNC(t, b, "the answer", []string{"-4", "-6"}[n], "-N", "-l", "9001")
			got, err := a.run(t, "the question", "nc", "-N", "-w", "20", to.Addr().String(), "9001")
			if err != nil || got != "the answer" {
				t.Errorf("the caller's nc read %q, %v", got, err)
			}
			if got := listener(); got != "the question" {
				t.Errorf("the callee's nc read %q", got)
			}
		}
	})

	t.Run("the callee speaks first", func(t *testing.T) {
		at := served(t, b, func(conn *net.TCPConn) {
			_, _ = io.WriteString(conn, "220 ready\r\n")
			_, _ = io.Copy(io.Discard, conn)
		})
		for _, to := range at {
			conn := must(t)(a.ns.dial(bounded(t), to))
			conn.SetDeadline(time.Now().Add(patience / 3))
			got := make([]byte, 11)
			if _, err := io.ReadFull(conn, got); err != nil || string(got) != "220 ready\r\n" {
				t.Errorf("read %q, %v", got, err)
			}
			conn.Close()
		}
	})

	t.Run("resets", func(t *testing.T) {
		heard := make(chan error, 2)
		at := served(t, b, func(conn *net.TCPConn) {
			first := make([]byte, 1)
			_, _ = io.ReadFull(conn, first)
			if first[0] == 'r' { // to reset it
				_ = conn.SetLinger(0)
				return
			}
			_, err := conn.Read(first)
			heard <- err
		})
		for _, to := range at {
			conn := must(t)(a.ns.dial(bounded(t), to))
			conn.SetDeadline(time.Now().Add(patience / 3))
			_, _ = io.WriteString(conn, "r")
			if _, err := conn.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("the callee's reset is %v to the caller", err)
			}
			conn.Close()

			conn = must(t)(a.ns.dial(bounded(t), to))
			_, _ = io.WriteString(conn, "q")
			_ = conn.SetLinger(0)
			conn.Close()
			select {
			case err := <-heard:
				if !errors.Is(err, syscall.ECONNRESET) {
					t.Errorf("the caller's reset is %v to the callee", err)
				}
			case <-time.After(patience / 3):
				t.Error("the caller's reset does not reach the callee")
			}
		}
	})

	t.Run("nobody listens", func(t *testing.T) {
		for _, to := range b.at(9999) {
			conn, err := a.ns.dial(bounded(t), to)
			if err == nil {
				conn.SetDeadline(time.Now().Add(patience / 3))
				_, err = conn.Read(make([]byte, 1))
				conn.Close()
			}
			if err == nil || errors.Is(err, io.EOF) || errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("a port at which nobody listens: %v, want a reset", err)
			}
		}
	})

	t.Run("100 MB each way", func(t *testing.T) {
		const size = 100 << 20
		sums := make(chan [32]byte, 2)
		at := served(t, b, func(conn *net.TCPConn) { sums <- exchange(conn, 2, size) })
		for n, to := range at {
			conn := must(t)(a.ns.dial(bounded(t), to))
			conn.SetDeadline(time.Now().Add(2 * patience))
			began := time.Now()
			got := exchange(conn, 1, size)
			t.Logf("%v: 100 MB each way at the same time in %v", []string{"IPv4", "IPv6"}[n], time.Since(began).Round(time.Millisecond))
			if got != sumOf(2, size) {
				t.Error("the caller has read something else than the callee has sent")
			}
			if <-sums != sumOf(1, size) {
				t.Error("the callee has read something else than the caller has sent")
			}
			conn.Close()
		}
	})

	t.Run("openssl, TLS of the application's own", func(t *testing.T) {
		dir := t.TempDir()
		key, certificate := filepath.Join(dir, "key.pem"), filepath.Join(dir, "certificate.pem")
		if output, err := exec.CommandContext(t.Context(), "openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes",
			"-keyout", key, "-out", certificate, "-subj", "/CN=application", "-days", "1").CombinedOutput(); err != nil {
			t.Fatalf("openssl req: %v\n%s", err, output)
		}
		cmd := b.ns.command(context.WithoutCancel(t.Context()), "openssl", "s_server", "-accept", "4433", "-cert", certificate, "-key", key, "-quiet", "-rev")
		input, err := cmd.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		defer input.Close()
		output, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		server := start(t, cmd, output)
		defer server.kill()
		eventually(t, "openssl s_server to listen", func() bool {
			conn, err := b.ns.dial(t.Context(), netip.MustParseAddrPort("127.0.0.1:4433"))
			if err == nil {
				conn.Close()
			}
			return err == nil
		})
		client := a.ns.command(bounded(t), "openssl", "s_client", "-connect", netip.AddrPortFrom(b.v4, 4433).String(), "-quiet", "-CAfile", certificate, "-verify_return_error")
		write, err := client.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		read, err := client.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		shown := start(t, client, read)
		defer shown.kill()
		if _, err := io.WriteString(write, "desrever\n"); err != nil {
			t.Error(err)
		}
		eventually(t, "the answer through two layers of TLS", func() bool {
			lines, _ := shown.lines.Load()
			return strings.Contains(strings.Join(lines, ""), "reversed")
		})
	})

	t.Run("many at once", func(t *testing.T) {
		const n = 300
		failed := make(chan error, n)
		for range n {
			go func() {
				conn, err := a.ns.dial(bounded(t), b.at(echoPort)[0])
				if err == nil {
					err = greetWithin(conn, patience/2)
					conn.Close()
				}
				failed <- err
			}()
		}
		for range n {
			if err := <-failed; err != nil {
				t.Error(err)
			}
		}
	})
}

// startNC starts an nc that listens inside, with what it is to send, and returns what
// waits for its end and tells what it read.
func startNC(t *testing.T, s *sandbox, input string, args ...string) func() string {
	t.Helper()
	cmd := s.ns.command(bounded(t), "nc", args...)
	cmd.Stdin = strings.NewReader(input)
	var output, problems bytes.Buffer
	cmd.Stdout, cmd.Stderr = &output, &problems
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	table := map[string]string{"-4": "tcp", "-6": "tcp6"}[args[0]]
	eventually(t, "nc to listen", func() bool {
		var listening bool
		err := s.ns.within(func() error {
			// Of the namespace of the thread that reads it.
			content, err := os.ReadFile("/proc/thread-self/net/" + table)
			listening = strings.Contains(string(content), fmt.Sprintf(":%04X ", 9001))
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		return listening
	})
	return func() string {
		t.Helper()
		select {
		case err := <-ended:
			if err != nil {
				t.Errorf("nc: %v\n%s", err, problems.String())
			}
		case <-time.After(patience / 3):
			t.Error("nc does not end")
			if err := cmd.Process.Kill(); err != nil {
				t.Error(err)
			}
			<-ended
		}
		return output.String()
	}
}

// served serves connections inside, and returns where. Each is closed when handle
// returns.
func served(t *testing.T, s *sandbox, handle func(*net.TCPConn)) []netip.AddrPort {
	t.Helper()
	l := s.ns.listen(t, netip.AddrPortFrom(netip.IPv6Unspecified(), 0))
	go func() {
		for {
			conn, err := l.AcceptTCP()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				conn.SetDeadline(time.Now().Add(2 * patience))
				handle(conn)
			}()
		}
	}()
	return s.at(l.Addr().(*net.TCPAddr).AddrPort().Port())
}

// exchange sends what a seed gives, ends its half, and returns the sum of what it reads
// until the other half ends.
func exchange(conn *net.TCPConn, seed byte, size int64) (sum [32]byte) {
	var sending sync.WaitGroup
	sending.Go(func() {
		_, _ = io.CopyN(conn, rand.NewChaCha8([32]byte{seed}), size)
		_ = conn.CloseWrite()
	})
	h := sha256.New()
	_, _ = io.Copy(h, conn)
	sending.Wait() // or whoever closes it would cut that short
	return [32]byte(h.Sum(nil))
}

func sumOf(seed byte, size int64) [32]byte {
	h := sha256.New()
	_, _ = io.CopyN(h, rand.NewChaCha8([32]byte{seed}), size)
	return [32]byte(h.Sum(nil))
}
