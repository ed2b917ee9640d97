package main

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/rogpeppe/go-internal/testscript"
)

var update = flag.Bool("update", false, "write what the commands print into the scripts and docs/policy.md")

// exits is the script command "exits CODE PROGRAM [ARG]...", which is exec for a
// program that has to exit with CODE.
func exits(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: exits CODE PROGRAM [ARG]...")
	}
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	err = ts.Exec(args[1], args[2:]...)
	got := 0
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
		got = exit.ExitCode()
	} else {
		ts.Check(err)
	}
	if got != want {
		ts.Fatalf("exit code %d, want %d", got, want)
	}
}

// TestPolicyPage holds docs/policy.md to its word: the commands in it, run on the
// files in it, print what it says. With -update it is made to.
func TestPolicyPage(t *testing.T) {
	page, err := filepath.Abs(filepath.Join("..", "..", "docs", "policy.md"))
	if err != nil {
		t.Fatal(err)
	}
	content, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	t.Chdir(t.TempDir())

	files := regexp.MustCompile("(?s)```(?:yaml\n# |json )(\\S+)\n(.*?)```")
	for _, match := range files.FindAllSubmatch(content, -1) {
		if err := os.WriteFile(string(match[1]), match[2], 0o600); err != nil {
			t.Fatal(err)
		}
	}

	commands := 0
	consoles := regexp.MustCompile("(?s)```console\n(.*?)```")
	told := consoles.ReplaceAllFunc(content, func(block []byte) []byte {
		var printed bytes.Buffer
		printed.WriteString("```console\n")
		for line := range bytes.Lines(block) {
			command, ok := bytes.CutPrefix(line, []byte("$ troth "))
			if !ok {
				continue
			}
			commands++
			printed.Write(line)
			if err := run(t.Context(), strings.Fields(string(command)), nil, &printed, &printed); err != nil {
				fmt.Fprintln(&printed, "troth:", err)
			}
		}
		printed.WriteString("```")
		return printed.Bytes()
	})
	if commands == 0 {
		t.Fatal("there is no command on the page")
	}
	if diff := cmp.Diff(string(content), string(told)); diff != "" && !*update {
		t.Errorf("what the page says (-) and what the commands print (+); -update writes it:\n%s", diff)
	}
	if *update {
		if err := os.WriteFile(page, told, 0o644); err != nil {
			t.Fatal(err)
		}
	}
}
