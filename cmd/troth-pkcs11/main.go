// Command troth-pkcs11 is a key helper of troth-server: it has authority keys in a
// token behind PKCS#11, in a hardware security module for instance.
//
//	troth-server -key-helper "troth-pkcs11 -module /usr/lib/softhsm/libsofthsm2.so -token troth -pin-file /etc/troth/pin"
//
// It speaks the protocol of package ca/keyhelper on standard input and output, and
// ends when its input does. With the argument list it shows the keys in the token
// instead, with the authority that each belongs to.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"
	"text/tabwriter"

	"golang.org/x/sys/unix"

	"troth.dev/troth/ca/keyhelper"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "troth-pkcs11:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	var c tokenConfig
	f := flag.NewFlagSet("troth-pkcs11", flag.ContinueOnError)
	f.StringVar(&c.module, "module", "", "PKCS#11 library of the token; required")
	f.StringVar(&c.label, "token", "", "label of the token; required")
	f.StringVar(&c.pinFile, "pin-file", "", "file with the PIN of the token's user; required")
	f.StringVar(&c.keyLabel, "key-label", "troth", "what the labels of new keys begin with")
	if err := f.Parse(args); err != nil {
		return err
	}
	list := f.NArg() == 1 && f.Arg(0) == "list"
	switch {
	case f.NArg() > 0 && !list:
		return fmt.Errorf("unexpected argument %q: list is the only one", f.Arg(0))
	case c.module == "", c.label == "", c.pinFile == "":
		return errors.New("-module, -token and -pin-file are required")
	case c.keyLabel == "" || len(c.keyLabel) > 64:
		return errors.New("-key-label has to have 1 to 64 bytes")
	}
	t, err := newToken(c)
	if err != nil {
		return err
	}
	if list {
		return printKeys(os.Stdout, t)
	}
	out, err := ownStdout()
	if err != nil {
		return err
	}
	// Terminals and supervisors signal whole groups of processes. The server may sign
	// until it has ended: its end closes our standard input, and that is ours.
	signal.Ignore(os.Interrupt, syscall.SIGTERM)
	return keyhelper.Serve(context.Background(), os.Stdin, out, t)
}

// ownStdout returns standard output, and sends to standard error what anybody else
// in this process writes to it: some libraries greet.
func ownStdout() (*os.File, error) {
	fd, err := unix.FcntlInt(uintptr(unix.Stdout), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return nil, fmt.Errorf("standard output: %w", err)
	}
	if err := unix.Dup2(unix.Stderr, unix.Stdout); err != nil {
		return nil, fmt.Errorf("standard output: %w", err)
	}
	return os.NewFile(uintptr(fd), "stdout"), nil
}

func printKeys(w io.Writer, t *token) error {
	keys, err := t.list(context.Background())
	if err != nil {
		return err
	}
	table := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(table, "AUTHORITY\tCKA_ID\tCKA_LABEL")
	for _, k := range keys {
		fmt.Fprintf(table, "%s\t%x\t%s\n", k.authorityID, k.id, k.label)
	}
	return table.Flush()
}
