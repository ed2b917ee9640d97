package main

import (
	"bytes"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"troth.dev/troth/ca/keyhelper"
)

// The test program is the helper, too: "as-helper" and its arguments.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == "as-helper" {
		os.Args = append(os.Args[:1], os.Args[2:]...)
		main()
		os.Exit(0)
	}
	// Under the race detector a program sleeps for a second before it exits.
	os.Setenv("GORACE", "atexit_sleep_ms=0")
	os.Exit(m.Run())
}

const pin, officerPIN = "4711", "12345678"

// softHSM returns where a token of its own is configured, in SoftHSM 2. The
// environment says so to whatever the test starts.
func softHSM(t testing.TB) (config tokenConfig, dir string) {
	t.Helper()
	dir = t.TempDir()
	conf := filepath.Join(dir, "softhsm2.conf")
	t.Setenv("SOFTHSM2_CONF", conf)
	write(t, conf, "directories.tokendir = "+filepath.Join(dir, "tokens")+"\nobjectstore.backend = file\nlog.level = ERROR\n")
	config = tokenConfig{module: library(t), label: "troth", pinFile: filepath.Join(dir, "pin"), keyLabel: "troth"}
	write(t, config.pinFile, pin+"\n")
	initToken(t, dir, config.label)
	return config, dir
}

// library finds SoftHSM where distributions put it.
func library(t testing.TB) string {
	t.Helper()
	for _, pattern := range []string{"/usr/lib/softhsm/libsofthsm2.so", "/usr/lib/*/softhsm/libsofthsm2.so", "/usr/lib64/pkcs11/libsofthsm2.so"} {
		if found, err := filepath.Glob(pattern); err == nil && len(found) > 0 {
			return found[0]
		}
	}
	t.Fatal("SoftHSM 2 is missing: apt-get install softhsm2")
	return ""
}

func initToken(t testing.TB, dir, label string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Join(dir, "tokens"), 0o700); err != nil {
		t.Fatal(err)
	}
	out, err := exec.CommandContext(t.Context(), "softhsm2-util", "--init-token", "--free", "--label", label, "--pin", pin, "--so-pin", officerPIN).CombinedOutput()
	if err != nil {
		t.Fatalf("softhsm2-util (apt-get install softhsm2): %v\n%s", err, out)
	}
}

func write(t testing.TB, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// helperFor returns Keys of a troth-pkcs11 that runs until the end of the test.
func helperFor(t testing.TB, c tokenConfig, timeout time.Duration) *keyhelper.Keys {
	t.Helper()
	program, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	keys, err := keyhelper.New(keyhelper.Config{
		Command: []string{program, "as-helper", "-module", c.module, "-token", c.label, "-pin-file", c.pinFile, "-key-label", c.keyLabel},
		Timeout: timeout, Log: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := keys.Close(); err != nil {
			t.Error(err)
		}
	})
	return keys
}

// inProcess returns the token as this process sees it.
func inProcess(t testing.TB, c tokenConfig) *token {
	t.Helper()
	hsm, err := newToken(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = hsm.module.Finalize() // it is that of the process, and perhaps done
		hsm.module.Destroy()
	})
	return hsm
}

// helperPID returns the process ID of the one child of this process.
func helperPID(t testing.TB) (int, error) {
	t.Helper()
	stats, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		t.Fatal(err)
	}
	var found []int
	for _, path := range stats {
		text, err := os.ReadFile(path)
		if err != nil {
			continue // it has ended
		}
		// proc_pid_stat(5): pid (comm) state ppid ...; comm may have anything in it.
		after := strings.Fields(string(text[bytes.LastIndexByte(text, ')')+1:]))
		if after[0] == "Z" || after[1] != strconv.Itoa(os.Getpid()) {
			continue
		}
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(path)))
		if err != nil {
			t.Fatal(err)
		}
		found = append(found, pid)
	}
	if len(found) != 1 {
		return 0, fmt.Errorf("%d children", len(found))
	}
	return found[0], nil
}

// eventually waits until a condition holds.
func eventually(t testing.TB, what string, condition func() error) {
	t.Helper()
	deadline := time.Now().Add(40 * time.Second)
	for {
		err := condition()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: %v", what, err)
		}
		<-time.After(20 * time.Millisecond)
	}
}
