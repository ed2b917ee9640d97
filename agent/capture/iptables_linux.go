package capture

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"strings"
	"time"
)

// iptables sets the rules by iptables-restore and ip6tables-restore, in chains whose
// names begin with TROTH_, for kernels without nftables. Each table is replaced at
// once, one after the other.
type iptables struct {
	v6 bool // the pod has IPv6: to fail at that is an error
}

// iptablesTimeout bounds a run, which takes milliseconds, or waits for others that
// change rules on the node.
const iptablesTimeout = 30 * time.Second

// iptablesChain is a chain of ours and where it is jumped to from.
type iptablesChain struct {
	table, hook, name string
	rules             []string
}

func iptablesChains() []iptablesChain {
	const (
		opens     = "-p tcp -m tcp --tcp-flags SYN,RST,ACK SYN"
		outside   = "! -i lo"
		elsewhere = "-m addrtype ! --dst-type LOCAL"
	)
	notOurs := fmt.Sprintf("-m mark ! --mark %#x", socketMark)
	ours := fmt.Sprintf("-m mark --mark %#x", socketMark)
	reset := "-j REJECT --reject-with tcp-reset"
	to := func(port int) string { return fmt.Sprintf("-m tcp --dport %d", port) }
	words := func(all ...string) string { return strings.Join(all, " ") }
	return []iptablesChain{
		{"raw", "PREROUTING", "TROTH_WIRE", []string{
			words(outside, fmt.Sprintf("-m mark --mark %#x/%#x -j MARK --set-xmark 0x0/0xffffffff", marks, marksMask)),
		}},
		{"raw", "OUTPUT", "TROTH_ZONE", []string{
			words(ours, fmt.Sprintf("-j CT --zone-orig %d", zone)),
		}},
		{"mangle", "OUTPUT", "TROTH_MARK", []string{
			fmt.Sprintf("-p tcp -m conntrack --ctdir REPLY -m connmark --mark %#x -j MARK --set-xmark %#x/0xffffffff", connectionMark, replyMark),
			words("-p tcp", ours, fmt.Sprintf("-j CONNMARK --set-xmark %#x/0xffffffff", connectionMark)),
		}},
		{"nat", "OUTPUT", "TROTH_OUTBOUND", []string{
			words(opens, notOurs, elsewhere, fmt.Sprintf("-j REDIRECT --to-ports %d", OutboundPort)),
		}},
		{"nat", "PREROUTING", "TROTH_INBOUND", []string{
			words(outside, opens, "-m addrtype --dst-type LOCAL",
				fmt.Sprintf("-m multiport ! --dports %d,%d,%d,%d", OutboundPort, PlaintextPort, HBONEPort, CallerFirstPort),
				fmt.Sprintf("-j REDIRECT --to-ports %d", PlaintextPort)),
		}},
		{"filter", "OUTPUT", "TROTH_GUARD_OUT", []string{
			words(opens, notOurs, elsewhere, reset),
		}},
		{"filter", "INPUT", "TROTH_GUARD_IN", []string{
			words(outside, opens, to(HBONEPort), "-j RETURN"),
			words(outside, opens, to(CallerFirstPort), "-j RETURN"),
			words(outside, opens, to(PlaintextPort), "-m conntrack --ctstate DNAT -j RETURN"),
			words(outside, opens, reset),
		}},
	}
}

func (i iptables) set() error {
	return i.each(func(family string) error { return i.restore(family, true) })
}
func (i iptables) remove() error {
	return i.each(func(family string) error { return i.restore(family, false) })
}

func (i iptables) dump() (string, error) {
	var dump strings.Builder
	err := i.each(func(family string) error {
		tables, err := iptablesSave(family)
		if err != nil {
			return err
		}
		var found int
		for _, c := range iptablesChains() {
			for _, line := range tables[c.table] {
				words := strings.Fields(line)
				if len(words) > 1 && words[0] == "-A" && words[1] == c.name || line == c.jump() {
					fmt.Fprintln(&dump, family, c.table, line)
					found++
				}
			}
		}
		if found == 0 {
			return fmt.Errorf("the chains of %s are missing", family)
		}
		return nil
	})
	return dump.String(), err
}

func (c iptablesChain) jump() string { return fmt.Sprintf("-A %s -j %s", c.hook, c.name) }

// each calls f for both families, and for IPv4 alone if the kernel has no other. A
// kernel that has IPv6, but no tables for it, will do for a pod that has none.
func (i iptables) each(f func(family string) error) error {
	if err := f("iptables"); err != nil {
		return err
	}
	if !hasIPv6() {
		return nil
	}
	if err := f("ip6tables"); i.v6 {
		return err
	}
	return nil
}

// restore sets the chains, or removes them.
func (i iptables) restore(family string, set bool) error {
	tables, err := iptablesSave(family)
	if err != nil {
		return err
	}
	var script bytes.Buffer
	table := ""
	for _, c := range iptablesChains() {
		present := false
		jumps := 0
		for _, line := range tables[c.table] {
			if strings.HasPrefix(line, ":"+c.name+" ") {
				present = true
			}
			if line == c.jump() {
				jumps++
			}
		}
		if !set && !present {
			continue
		}
		if c.table != table {
			if table != "" {
				script.WriteString("COMMIT\n")
			}
			table = c.table
			fmt.Fprintf(&script, "*%s\n", table)
		}
		// Declaring a chain makes it, and empties one that is there.
		fmt.Fprintf(&script, ":%s - [0:0]\n", c.name)
		for range jumps {
			fmt.Fprintf(&script, "-D %s -j %s\n", c.hook, c.name)
		}
		if !set {
			fmt.Fprintf(&script, "-X %s\n", c.name)
			continue
		}
		for _, rule := range c.rules {
			fmt.Fprintf(&script, "-A %s %s\n", c.name, rule)
		}
		fmt.Fprintf(&script, "-I %s 1 -j %s\n", c.hook, c.name)
	}
	if table == "" {
		return nil
	}
	script.WriteString("COMMIT\n")
	_, err = runIptables(family, "restore", &script, "--noflush", "-w", "10")
	return err
}

// iptablesSave returns the lines of each table.
func iptablesSave(family string) (map[string][]string, error) {
	output, err := runIptables(family, "save", nil)
	if err != nil {
		return nil, err
	}
	tables := make(map[string][]string)
	table := ""
	for line := range strings.Lines(output) {
		line = strings.TrimSpace(line)
		if name, ok := strings.CutPrefix(line, "*"); ok {
			table = name
			continue
		}
		tables[table] = append(tables[table], line)
	}
	return tables, nil
}

// runIptables runs the program that speaks with the kernel as it did before nftables
// or, where there is none, the one that has its name by default.
func runIptables(family, verb string, stdin *bytes.Buffer, args ...string) (string, error) {
	name := family + "-legacy-" + verb
	path, err := exec.LookPath(name)
	if errors.Is(err, exec.ErrNotFound) {
		name = family + "-" + verb
		path, err = exec.LookPath(name)
	}
	if err != nil {
		return "", fmt.Errorf("%w: install the package iptables", err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), iptablesTimeout)
	defer cancel()
	run := exec.CommandContext(ctx, path, args...)
	var complaint bytes.Buffer
	run.Stderr = &complaint
	if stdin != nil {
		run.Stdin = stdin
	}
	output, err := run.Output()
	if err != nil {
		return "", fmt.Errorf("%s: %w: %s", name, err, bytes.TrimSpace(complaint.Bytes()))
	}
	return string(output), nil
}
