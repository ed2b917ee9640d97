package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"slices"

	"go.yaml.in/yaml/v3"

	"troth.dev/troth/identity"
	"troth.dev/troth/internal/manifest"
)

// maxFields is how many fields one object may have.
const maxFields = 5_000

// readPods reads the pods in files, in folders and, for "-", in stdin, as
// [parsePods] does. That there is none is an error.
func readPods(paths []string, stdin io.Reader, namespace string) ([]identity.Pod, error) {
	files, err := manifest.Read(paths, stdin)
	if err != nil {
		return nil, err
	}
	var all []identity.Pod
	var wrong manifest.Errors
	origin := make(map[[2]string]string)
	for _, file := range files {
		pods, err := parsePods(file.Content, namespace)
		if err != nil {
			wrong = append(wrong, fmt.Sprintf("%s: %v", file.Name, err))
			continue
		}
		for _, pod := range pods {
			key := [2]string{pod.Namespace, pod.Name}
			if before, twice := origin[key]; twice {
				wrong = append(wrong, fmt.Sprintf("%s: pod %q is there twice, first in %s", file.Name, pod.Namespace+"/"+pod.Name, before))
				continue
			}
			origin[key] = file.Name
			all = append(all, pod)
		}
	}
	if len(wrong) > 0 {
		return nil, wrong
	}
	if len(all) == 0 {
		return nil, inputErrorf("--workloads: there is no pod in the files")
	}
	return all, nil
}

// parsePods reads the pods in documents of YAML or JSON, single or in a list as
// kubectl prints it, and passes over all else. namespace stands in where a pod
// names none. Aliases are refused: kubectl prints none, and a few of them can
// stand for more than memory holds. Errors name the document, from 1.
func parsePods(data []byte, namespace string) ([]identity.Pod, error) {
	var pods []identity.Pod
	decoder := yaml.NewDecoder(bytes.NewReader(data))
	for document := 1; ; document++ {
		var node yaml.Node
		err := decoder.Decode(&node)
		if errors.Is(err, io.EOF) {
			return pods, nil
		}
		if err == nil {
			err = checkNode(&node)
		}
		// A document of comments alone has no object.
		if err == nil && node.Content[0].Kind == yaml.MappingNode {
			pods, err = appendPods(pods, node.Content[0], namespace)
		}
		if err != nil {
			return nil, fmt.Errorf("document %d: %w", document, err)
		}
	}
}

// checkNode refuses what takes package yaml more time or memory than its size:
// aliases, and objects with so many fields that to compare each with each is long.
func checkNode(node *yaml.Node) error {
	if node.Kind == yaml.AliasNode {
		return fmt.Errorf("line %d: an alias, which is not read here", node.Line)
	}
	if fields := len(node.Content) / 2; node.Kind == yaml.MappingNode && fields > maxFields {
		return fmt.Errorf("line %d: an object of %d fields; the limit is %d", node.Line, fields, maxFields)
	}
	for _, child := range node.Content {
		if err := checkNode(child); err != nil {
			return err
		}
	}
	return nil
}

// appendPods appends the pods that object is, or lists.
func appendPods(pods []identity.Pod, object *yaml.Node, namespace string) ([]identity.Pod, error) {
	var kind struct {
		APIVersion string `yaml:"apiVersion"`
		Kind       string `yaml:"kind"`
	}
	if err := object.Decode(&kind); err != nil {
		return nil, err
	}
	if kind.APIVersion != "v1" {
		return pods, nil
	}
	switch kind.Kind {
	case "Pod":
		pod, err := decodePod(object, namespace)
		if err != nil {
			return nil, err
		}
		return append(pods, pod), nil
	case "List", "PodList":
		var list struct {
			Items []yaml.Node `yaml:"items"`
		}
		if err := object.Decode(&list); err != nil {
			return nil, err
		}
		for n := range list.Items {
			item := &list.Items[n]
			if item.Kind != yaml.MappingNode {
				return nil, fmt.Errorf("line %d: item %d is not an object", item.Line, n+1)
			}
			var err error
			if kind.Kind == "List" {
				pods, err = appendPods(pods, item, namespace)
			} else { // whose items need not say again what they are
				var pod identity.Pod
				pod, err = decodePod(item, namespace)
				pods = append(pods, pod)
			}
			if err != nil {
				return nil, err
			}
		}
	}
	return pods, nil
}

// podObject is what of a Pod decides its mode.
type podObject struct {
	Metadata struct {
		Namespace string            `yaml:"namespace"`
		Name      string            `yaml:"name"`
		UID       string            `yaml:"uid"`
		Labels    map[string]string `yaml:"labels"`
	} `yaml:"metadata"`
	Spec struct {
		ServiceAccountName string            `yaml:"serviceAccountName"`
		Containers         []containerObject `yaml:"containers"`
		InitContainers     []containerObject `yaml:"initContainers"`
	} `yaml:"spec"`
	Status struct {
		Phase  string `yaml:"phase"`
		PodIPs []struct {
			IP string `yaml:"ip"`
		} `yaml:"podIPs"`
	} `yaml:"status"`
}

type containerObject struct {
	RestartPolicy string `yaml:"restartPolicy"`
	Ports         []struct {
		ContainerPort uint16 `yaml:"containerPort"`
		Protocol      string `yaml:"protocol"`
	} `yaml:"ports"`
}

func decodePod(object *yaml.Node, namespace string) (identity.Pod, error) {
	var o podObject
	if err := object.Decode(&o); err != nil {
		return identity.Pod{}, err
	}
	pod := identity.Pod{
		PodReference: identity.PodReference{
			Namespace: o.Metadata.Namespace, Name: o.Metadata.Name, UID: o.Metadata.UID,
		},
		ServiceAccount: o.Spec.ServiceAccountName,
		Labels:         o.Metadata.Labels,
	}
	if pod.Namespace == "" {
		pod.Namespace = namespace
	}
	switch {
	case pod.Name == "":
		return identity.Pod{}, fmt.Errorf("line %d: a pod without a name", object.Line)
	case pod.Namespace == "":
		return identity.Pod{}, fmt.Errorf("pod %q names no namespace: say which with --namespace", pod.Name)
	case pod.ServiceAccount == "":
		pod.ServiceAccount = "default" // as the API server fills in
	}
	switch o.Status.Phase {
	case "Succeeded", "Failed":
		pod.Phase = identity.PodFinished
	case "Running":
		pod.Phase = identity.PodRunning
	default: // a manifest has no status yet
		pod.Phase = identity.PodPending
	}
	for _, ip := range o.Status.PodIPs {
		address, err := netip.ParseAddr(ip.IP)
		if err != nil {
			return identity.Pod{}, fmt.Errorf("pod %q: %w", pod.Name, err)
		}
		pod.Addresses = append(pod.Addresses, address)
	}
	containers := o.Spec.Containers
	for _, c := range o.Spec.InitContainers {
		if c.RestartPolicy == "Always" { // a sidecar, which serves as long as the pod lives
			containers = append(containers, c)
		}
	}
	for _, c := range containers {
		for _, port := range c.Ports {
			switch {
			case port.ContainerPort == 0:
				return identity.Pod{}, fmt.Errorf("pod %q: a container port has to be from 1 to 65535", pod.Name)
			case port.Protocol == "", port.Protocol == "TCP":
				pod.ContainerPorts = append(pod.ContainerPorts, port.ContainerPort)
			}
		}
	}
	slices.Sort(pod.ContainerPorts)
	pod.ContainerPorts = slices.Compact(pod.ContainerPorts)
	return pod, nil
}
