package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	"github.com/containernetworking/cni/pkg/version"

	"troth.dev/troth/agent/cni"
)

// config is what the plugin's entry in a CNI configuration may have of its own.
type config struct {
	// Socket is the path of the agent's socket.
	Socket string `json:"socket,omitempty"`
	// ExcludeNamespaces are decided on here, without the agent: what the agent itself
	// cannot do without must start while it is away.
	ExcludeNamespaces []string `json:"excludeNamespaces,omitempty"`
	// Timeout is how long to wait for the agent, as "30s".
	Timeout string `json:"timeout,omitempty"`
	// Replaces is the file that the configuration was made from, if it was no list
	// before the plugin was installed.
	Replaces string `json:"replaces,omitempty"`

	timeout time.Duration
}

// input is what the runtime writes to the plugin's standard input.
type input struct {
	config

	CNIVersion  string               `json:"cniVersion"`
	PrevResult  json.RawMessage      `json:"prevResult"`
	Attachments []types.GCAttachment `json:"cni.dev/valid-attachments"`
}

const (
	defaultTimeout = 30 * time.Second
	minTimeout     = 100 * time.Millisecond
	// A kubelet gives up on a pod's network after four minutes.
	maxTimeout = 2 * time.Minute
	// politeTimeout is for what nobody should have to wait for.
	politeTimeout = 5 * time.Second
)

// check sets what is left out and refuses what makes no sense.
func (c *config) check() error {
	if c.Socket == "" {
		c.Socket = cni.Socket
	}
	c.timeout = defaultTimeout
	if c.Timeout == "" {
		return nil
	}
	d, err := time.ParseDuration(c.Timeout)
	if err != nil {
		return fmt.Errorf("timeout: %w", err)
	}
	if d < minTimeout || d > maxTimeout {
		return fmt.Errorf("timeout %v is not from %v to %v", d, minTimeout, maxTimeout)
	}
	c.timeout = d
	return nil
}

func parseInput(stdin []byte) (*input, error) {
	var in input
	if err := json.Unmarshal(stdin, &in); err != nil {
		return nil, types.NewError(types.ErrDecodingFailure, "read the plugin's configuration", err.Error())
	}
	if err := in.check(); err != nil {
		return nil, types.NewError(types.ErrInvalidNetworkConfig, "the plugin's configuration is wrong", err.Error())
	}
	return &in, nil
}

// chained returns the result of the plugins before this one, which it passes on as it is.
func (in *input) chained() (json.RawMessage, error) {
	if len(in.PrevResult) == 0 || bytes.Equal(in.PrevResult, []byte("null")) {
		return nil, types.NewError(types.ErrInvalidNetworkConfig, "troth-cni makes no network: put it after the plugin that does, in a list", "there is no prevResult")
	}
	if _, err := version.NewResult(in.CNIVersion, in.PrevResult); err != nil {
		return nil, types.NewError(types.ErrDecodingFailure, "read the result of the plugins before this one", err.Error())
	}
	return in.PrevResult, nil
}

// kubernetes is what a runtime says of a pod in CNI_ARGS.
type kubernetes struct {
	types.CommonArgs

	K8S_POD_NAMESPACE, K8S_POD_NAME, K8S_POD_UID, K8S_POD_INFRA_CONTAINER_ID types.UnmarshallableString //nolint:revive,staticcheck // the names are the specification's
}

// podOf returns the pod that the runtime is about, and whether this plugin is to do
// anything for it. It leaves alone what is not Kubernetes': a container without any of
// the arguments by which a pod is known. One with some of them and not all is an error,
// so that no pod starts uncaptured because its runtime leaves something out.
func podOf(args *skel.CmdArgs, in *input) (cni.Pod, bool, error) {
	k := kubernetes{CommonArgs: types.CommonArgs{IgnoreUnknown: true}}
	if err := types.LoadArgs(args.Args, &k); err != nil {
		return cni.Pod{}, false, types.NewError(types.ErrInvalidEnvironmentVariables, "read CNI_ARGS", err.Error())
	}
	pod := cni.Pod{
		Namespace: string(k.K8S_POD_NAMESPACE),
		Name:      string(k.K8S_POD_NAME),
		UID:       string(k.K8S_POD_UID),
		Sandbox:   args.ContainerID,
		Interface: args.IfName,
		Netns:     args.Netns,
	}
	infra := string(k.K8S_POD_INFRA_CONTAINER_ID)
	switch {
	case pod.Namespace == "" && pod.Name == "" && pod.UID == "" && infra == "":
		return pod, false, nil
	case pod.Namespace != "" && slices.Contains(in.ExcludeNamespaces, pod.Namespace):
		return pod, false, nil
	case pod.Namespace == "" || pod.Name == "" || pod.UID == "":
		return pod, true, types.NewError(types.ErrInvalidEnvironmentVariables,
			"CNI_ARGS must have all of K8S_POD_NAMESPACE, K8S_POD_NAME and K8S_POD_UID, or none: the container runtime is too old", fmt.Sprintf("CNI_ARGS is %q", args.Args))
	case infra != "" && infra != args.ContainerID:
		return pod, true, types.NewError(types.ErrInvalidEnvironmentVariables,
			"CNI_CONTAINERID and K8S_POD_INFRA_CONTAINER_ID differ", fmt.Sprintf("%q and %q", args.ContainerID, infra))
	}
	return pod, true, nil
}

// openNamespace opens the pod's network namespace, which is never the one that this
// process and the agent are in: a pod with the node's network does not come to a
// plugin.
func openNamespace(path string) (*os.File, error) {
	ns, err := os.Open(path)
	if err == nil {
		if err = cni.CheckNamespace(ns); err == nil {
			return ns, nil
		}
		ns.Close()
	}
	return nil, types.NewError(types.ErrInvalidNetNS, fmt.Sprintf("CNI_NETNS %q", path), err.Error())
}

// add returns when the pod's traffic is captured, or is not to be. In all other cases
// it fails, and the pod does not start: capture is never just left out.
func add(args *skel.CmdArgs) error {
	in, err := parseInput(args.StdinData)
	if err != nil {
		return err
	}
	result, err := in.chained()
	if err != nil {
		return err
	}
	pod, ours, err := podOf(args, in)
	if err != nil {
		return err
	}
	if ours {
		ns, err := openNamespace(args.Netns)
		if err != nil {
			return err
		}
		defer ns.Close()
		err = in.ask(in.timeout, func(ctx context.Context, agent cni.Client) error { return agent.Add(ctx, pod, ns) })
		if err != nil {
			return refusal(fmt.Sprintf("pod %s/%s is not captured, and does not start without", pod.Namespace, pod.Name), err)
		}
	}
	_, err = os.Stdout.Write(result)
	return err
}

// check fails if what add did does not stand.
func check(args *skel.CmdArgs) error {
	in, err := parseInput(args.StdinData)
	if err != nil {
		return err
	}
	if _, err := in.chained(); err != nil {
		return err
	}
	pod, ours, err := podOf(args, in)
	if err != nil || !ours {
		return err
	}
	ns, err := openNamespace(args.Netns)
	if err != nil {
		return err
	}
	defer ns.Close()
	err = in.ask(in.timeout, func(ctx context.Context, agent cni.Client) error { return agent.Check(ctx, pod, ns) })
	if err != nil {
		return refusal(fmt.Sprintf("capture of pod %s/%s is not known to stand", pod.Namespace, pod.Name), err)
	}
	return nil
}

// del tells the agent and never fails: the namespace goes, and the rules with it, and
// an agent that was away finds out by itself. So it is for a configuration that is
// wrong by now and a pod that is not known any more.
func del(args *skel.CmdArgs) error {
	in, err := parseInput(args.StdinData)
	if err != nil {
		in = new(input)
		in.Socket = cni.Socket
	}
	pod, ours, err := podOf(args, in)
	if err == nil && !ours && pod.Namespace != "" {
		return nil
	}
	err = in.ask(politeTimeout, func(ctx context.Context, agent cni.Client) error { return agent.Delete(ctx, pod) })
	if err != nil {
		fmt.Fprintln(os.Stderr, "troth-cni: the agent was not told that the pod is gone, and will find out:", err)
	}
	return nil
}

// collect tells the agent what is still there.
func collect(args *skel.CmdArgs) error {
	in, err := parseInput(args.StdinData)
	if err != nil {
		return err
	}
	keep := make([]cni.Attachment, len(in.Attachments))
	for i, a := range in.Attachments {
		keep[i] = cni.Attachment{Sandbox: a.ContainerID, Interface: a.IfName}
	}
	err = in.ask(in.timeout, func(ctx context.Context, agent cni.Client) error { return agent.Collect(ctx, keep) })
	if err != nil {
		return refusal("what is left of pods that are gone is not collected", err)
	}
	return nil
}

// status fails if the agent is not there. A runtime may take that to mean that the node
// has no network, so that it is no question of the control plane: the agent runs in the
// node's network and starts all the same, and then the node is ready for the control
// plane's pods.
func status(args *skel.CmdArgs) error {
	in, err := parseInput(args.StdinData)
	if err != nil {
		return err
	}
	err = in.ask(politeTimeout, func(ctx context.Context, agent cni.Client) error { return agent.Status(ctx) })
	if err != nil {
		return types.NewError(types.ErrPluginNotAvailable, "troth-agent does not capture pods now: those outside the excluded namespaces cannot start", err.Error())
	}
	return nil
}

func (in *input) ask(timeout time.Duration, question func(context.Context, cni.Client) error) error {
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	return question(ctx, cni.Client{Socket: in.Socket})
}

// errRefused is the code for what the agent will not do however often it is asked.
// Codes from 100 on are a plugin's own.
const errRefused uint = 100

// refusal is the error for a request that the agent did not grant, or did not get.
func refusal(what string, err error) *types.Error {
	code := types.ErrTryAgainLater
	if refused, ok := errors.AsType[*cni.Error](err); ok && !refused.Retry {
		code = errRefused
		if refused.Reason == cni.ReasonNamespace {
			code = types.ErrInvalidNetNS
		}
	}
	return types.NewError(code, what, err.Error())
}
