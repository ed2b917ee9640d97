package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"net/netip"
	"slices"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"troth.dev/troth/api"
	trothv1 "troth.dev/troth/api/troth/v1"
	"troth.dev/troth/identity"
	"troth.dev/troth/internal/manifest"
	"troth.dev/troth/kube"
	"troth.dev/troth/policy"
)

// peer is somebody who connected to a pod in plaintext.
type peer struct {
	From string    `json:"from"` // an address, or a name if one is known
	To   podName   `json:"to"`
	Port uint16    `json:"port"` // of the container
	Last time.Time `json:"last"`
}

type podName struct {
	Namespace string `json:"namespace"`
	Name      string `json:"name"`
}

func (n podName) String() string { return n.Namespace + "/" + n.Name }

// refused is a peer whose plaintext a change of policy will refuse.
type refused struct {
	peer
	FromPod *podName   `json:"fromPod,omitempty"` // that has the address From
	By      policy.Ref `json:"by"`
}

// from names the peer: by its pod if there is one.
func (r refused) from() string {
	if r.FromPod == nil {
		return r.From
	}
	return fmt.Sprintf("%s (%s)", r.FromPod, r.From)
}

func policyPeersCommand() *cobra.Command {
	var output string
	var o operatorFlags
	var c clusterFlags
	cmd := &cobra.Command{
		Use:   "peers --server HOST:PORT --trust-domain NAME --bundle FILE --token FILE",
		Short: "Show who came in plaintext of late",
		Long: `Show who came to pods in plaintext of late, by what the agents of their nodes have
reported to the control plane: whom STRICT would refuse. The JSON is what
"troth policy dry-run --peers" reads.`,
		Args: inputArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := checkOutput(output, "table", "json"); err != nil {
				return err
			}
			world, err := kube.Read(cmd.Context(), c.kubeconfig, c.context)
			if err != nil {
				return err
			}
			peers, agents, err := o.peers(cmd.Context(), world.Pods)
			if err != nil {
				return err
			}
			if output == "json" {
				return printJSON(cmd.OutOrStdout(), peers)
			}
			out := newPrinter(cmd.OutOrStdout())
			if len(peers) > 0 {
				rows := [][]string{{"FROM", "TO", "PORT", "LAST"}}
				for _, p := range peers {
					rows = append(rows, []string{p.From, p.To.String(), strconv.Itoa(int(p.Port)), p.Last.UTC().Format(time.RFC3339)})
				}
				out.grid(rows)
				out.line("")
			}
			out.line("%s, by the reports of %s.", count(len(peers), "peer"), count(agents, "agent"))
			return nil
		},
	}
	cmd.Flags().StringVarP(&output, "output", "o", "table", "table or json")
	o.flags(cmd)
	c.flags(cmd)
	return cmd
}

// peersPatience bounds the question to the control plane.
const peersPatience = 15 * time.Second

// peers asks the control plane who came in plaintext of late, and how many agents
// have said so. Peers of pods that are not among pods are left out.
func (o *operatorFlags) peers(ctx context.Context, pods []identity.Pod) (peers []peer, agents int, err error) {
	config, err := o.config()
	if err != nil {
		return nil, 0, err
	}
	conn, err := api.Dial(config)
	if err != nil {
		return nil, 0, err
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(ctx, peersPatience)
	defer cancel()
	told, err := trothv1.NewPolicyServiceClient(conn).ListPlaintextPeers(ctx, &trothv1.ListPlaintextPeersRequest{})
	if err != nil {
		return nil, 0, fmt.Errorf("ask the control plane for plaintext peers: %w", err)
	}
	names := make(map[string]podName, len(pods))
	for _, pod := range pods {
		names[pod.UID] = podName{pod.Namespace, pod.Name}
	}
	peers = []peer{}
	for _, p := range told.GetPeers() {
		if to, ok := names[p.GetPodUid()]; ok && p.GetPort() <= math.MaxUint16 {
			peers = append(peers, peer{From: p.GetSource(), To: to, Port: uint16(p.GetPort()), Last: p.GetLastSeen().AsTime()})
		}
	}
	slices.SortFunc(peers, func(a, b peer) int {
		return cmp.Or(cmp.Compare(a.To.Namespace, b.To.Namespace), cmp.Compare(a.To.Name, b.To.Name),
			cmp.Compare(a.Port, b.Port), cmp.Compare(a.From, b.From))
	})
	return peers, int(told.GetAgents()), nil
}

// readPeers reads a file of peers, or stdin for "-": a JSON array.
func readPeers(path string, stdin io.Reader) ([]peer, error) {
	files, err := manifest.Read([]string{path}, stdin)
	if err != nil {
		return nil, err
	}
	var all []peer
	for _, file := range files {
		peers, err := parsePeers(file.Content)
		if err != nil {
			return nil, inputErrorf("%s: %w", file.Name, err)
		}
		all = append(all, peers...)
	}
	return all, nil
}

func parsePeers(data []byte) ([]peer, error) {
	var peers []peer
	decoder := json.NewDecoder(bytes.NewReader(data))
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(&peers); err != nil {
		return nil, err
	}
	if _, err := decoder.Token(); !errors.Is(err, io.EOF) {
		return nil, errors.New("there is more than one JSON value")
	}
	for n, p := range peers {
		switch {
		case p.From == "":
			return nil, fmt.Errorf("[%d].from is missing", n)
		case p.To.Namespace == "" || p.To.Name == "":
			return nil, fmt.Errorf("[%d].to has to be namespace and name", n)
		case p.Port == 0:
			return nil, fmt.Errorf("[%d].port has to be from 1 to 65535", n)
		}
	}
	return peers, nil
}

// refusals returns the peers whose plaintext passes before and does not pass
// after, and how many went to pods that there are no more.
func refusals(pods []identity.Pod, before, after []*policy.Effective, peers []peer) (list []refused, gone int) {
	list = []refused{}
	places := make(map[podName]int, len(pods))
	owners := make(map[netip.Addr]*podName)
	for n, pod := range pods {
		name := podName{pod.Namespace, pod.Name}
		places[name] = n
		for _, address := range pod.Addresses {
			// Pods of the host's network share its address: then it names none.
			if _, shared := owners[address.Unmap()]; shared {
				owners[address.Unmap()] = nil
			} else {
				owners[address.Unmap()] = &name
			}
		}
	}
	for _, p := range peers {
		place, ok := places[p.To]
		if !ok {
			gone++
			continue
		}
		from, _ := before[place].At(p.Port)
		to, by := after[place].At(p.Port)
		if from == policy.Strict || to != policy.Strict {
			continue
		}
		r := refused{peer: p, By: by}
		if address, err := netip.ParseAddr(p.From); err == nil {
			r.FromPod = owners[address.Unmap()]
		}
		list = append(list, r)
	}
	return list, gone
}
