package main

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"troth.dev/troth/agent"
	"troth.dev/troth/agent/proxy"
)

func connectionsCommand() *cobra.Command {
	var address, output string
	var tunnels, workloads bool
	cmd := &cobra.Command{
		Use:   "connections [--tunnels | --workloads] [--agent URL]",
		Short: "Show what a node's agent carries at this moment",
		Long: `Show what a node's agent carries at this moment: connections, each with who talks to
whom, by which protocol and by whose policy; the tunnels that carry them; or the
node's workloads with the age of their SVIDs. It asks the agent's admin page, which is
on the node's loopback: run it there, or forward the port.`,
		Args: inputArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := checkOutput(output, "table", "json"); err != nil {
				return err
			}
			switch {
			case tunnels && workloads:
				return inputErrorf("--tunnels and --workloads exclude each other")
			case tunnels:
				return showNode(cmd, address, "tunnels", output, tunnelRows)
			case workloads:
				return showNode(cmd, address, "workloads", output, workloadRows)
			default:
				return showNode(cmd, address, "connections", output, connectionRows)
			}
		},
	}
	cmd.Flags().StringVar(&address, "agent", "http://127.0.0.1:15000", "`URL` of the agent's admin page")
	cmd.Flags().BoolVar(&tunnels, "tunnels", false, "show tunnels")
	cmd.Flags().BoolVar(&workloads, "workloads", false, "show workloads and their SVIDs")
	cmd.Flags().StringVarP(&output, "output", "o", "table", "table or json")
	return cmd
}

// showNode prints one list of the admin page.
func showNode[T any](cmd *cobra.Command, address, list, output string, rows func([]T, time.Time) [][]string) error {
	items, err := askNode[T](cmd.Context(), address, list)
	if err != nil {
		return err
	}
	if output == "json" {
		return printJSON(cmd.OutOrStdout(), items)
	}
	out := newPrinter(cmd.OutOrStdout())
	if len(items) == 0 {
		out.line("no %s", list)
		return nil
	}
	out.grid(rows(items, time.Now()))
	return nil
}

// maxNode bounds what an agent answers: 100,000 connections have 40 MB.
const maxNode = 256 << 20

func askNode[T any](ctx context.Context, address, list string) ([]T, error) {
	at, err := url.JoinPath(address, list)
	if err != nil {
		return nil, inputErrorf("--agent: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, at, http.NoBody)
	if err != nil {
		return nil, inputErrorf("--agent: %w", err)
	}
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		return nil, fmt.Errorf("ask the agent: %w", err)
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("the agent answers %s to %s", response.Status, at)
	}
	var items []T
	if err := json.NewDecoder(io.LimitReader(response.Body, maxNode)).Decode(&items); err != nil {
		return nil, fmt.Errorf("what the agent answers: %w", err)
	}
	return items, nil
}

func connectionRows(items []proxy.Connection, now time.Time) [][]string {
	rows := [][]string{{"DIRECTION", "PROTOCOL", "SOURCE", "DESTINATION", "PEER", "POLICY", "AGE", "IN", "OUT"}}
	for _, c := range items {
		to := c.Destination
		if c.Service != "" {
			to += " (" + c.Service + ")"
		}
		rows = append(rows, []string{
			string(c.Direction), c.Protocol, c.Source, to, cmp.Or(c.Peer, "-"), cmp.Or(c.Policy, "-"), age(c.Begun, now),
			strconv.FormatInt(c.In, 10), strconv.FormatInt(c.Out, 10),
		})
	}
	return rows
}

func tunnelRows(items []proxy.Tunnel, now time.Time) [][]string {
	rows := [][]string{{"DIRECTION", "ORDER", "REMOTE", "OWN", "PEER", "CONNECTIONS", "AGE", "PROVED FOR", "AUTHORITIES"}}
	for _, t := range items {
		rows = append(rows, []string{
			string(t.Direction), t.Order, t.Remote, t.Own, t.Peer, strconv.Itoa(t.Connections), age(t.Begun, now),
			age(now, t.Until), strings.Join(t.Authorities, ","),
		})
	}
	return rows
}

func workloadRows(items []agent.Workload, now time.Time) [][]string {
	rows := [][]string{{"POD", "CAPTURE", "MODE", "SPIFFE ID", "SVID AGE", "SVID LEFT"}}
	for _, w := range items {
		old, left := "-", "-"
		if !w.NotAfter.IsZero() {
			old, left = age(w.NotBefore, now), age(now, w.NotAfter)
		}
		rows = append(rows, []string{w.Namespace + "/" + w.Name, w.Capture, w.Mode, w.SPIFFEID, old, left})
	}
	return rows
}

// age is the time from one moment to another, in whole seconds.
func age(from, to time.Time) string { return to.Sub(from).Round(time.Second).String() }
