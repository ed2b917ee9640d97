package server

import (
	"errors"
	"io"
	"net/netip"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/durationpb"

	trothv1 "troth.dev/troth/api/troth/v1"
	"troth.dev/troth/kube/directory"
)

const (
	// maxNamed bounds each list of a ResolveRequest, and maxHeld what one stream
	// holds.
	maxNamed = 1024
	maxHeld  = 1 << 16
	// maxSpelled is how many Services the server keeps as agents are told of them.
	// Each agent that holds a Service that changes is told the same; to spell 100
	// endpoints takes longer than to send them.
	maxSpelled = 256
)

type directoryService struct {
	trothv1.UnimplementedDirectoryServiceServer
	server *Server
}

// Resolve is specified in directory.proto. The agent who opened the stream is looked
// at again as in [nodeService.Watch], and before each answer.
func (d *directoryService) Resolve(stream grpc.BidiStreamingServer[trothv1.ResolveRequest, trothv1.ResolveResponse]) error {
	ctx := stream.Context()
	// Before all is known, somebody would seem to be nobody, and be called in
	// plaintext.
	agent, err := d.server.openAgentStream(ctx)
	if err != nil {
		return err
	}
	defer agent.close()
	reader := d.server.Pods.Directory(agent.caller.Agent.Node.Name)
	defer reader.Close()

	// It ends once this method has returned, when Recv fails; a reader that is closed
	// takes nothing more.
	heard := make(chan error, 1)
	go func() { heard <- hear(stream, reader) }()

	for {
		_, trustChanged := d.server.trust.Load()
		_, podsChanged := agent.pods.Load()
		if err := agent.stands(ctx); err != nil {
			return err
		}
		if answer, ok := reader.Next(); ok {
			out, err := d.spell(answer)
			if err != nil {
				return err
			}
			if err := stream.Send(out); err != nil {
				return err
			}
			select {
			case <-d.server.draining:
				return refusals.shuttingDown
			default:
				continue
			}
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-d.server.draining:
			return refusals.shuttingDown
		case <-agent.expired.C:
			return refusals.svidExpired
		case err := <-heard:
			if err != nil {
				return err
			}
			heard = nil // the agent names no more, and is kept current
		case <-trustChanged:
		case <-podsChanged:
		case <-reader.News():
		}
	}
}

// hear does what the agent asks for until it asks for no more, and then returns nil,
// or until it asks for what it may not.
func hear(stream grpc.BidiStreamingServer[trothv1.ResolveRequest, trothv1.ResolveResponse], reader *directory.Reader) error {
	for {
		in, err := stream.Recv()
		switch {
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return err
		case len(in.GetResolve()) > maxNamed || len(in.GetForget()) > maxNamed:
			return refusals.longRequest
		}
		for _, spelled := range in.GetForget() {
			a, err := parseAddress(spelled)
			if err != nil {
				return err
			}
			reader.Forget(a)
		}
		for _, spelled := range in.GetResolve() {
			a, err := parseAddress(spelled)
			if err != nil {
				return err
			}
			reader.Hold(a, spelled)
		}
		if reader.Held() > maxHeld {
			return refusals.tooManyAddresses
		}
	}
}

// parseAddress reads an address as an agent names it. One with a zone means something
// on the agent's node alone.
func parseAddress(spelled string) (netip.Addr, error) {
	a, err := netip.ParseAddr(spelled)
	if err != nil || a.Zone() != "" || a.Is4In6() {
		return netip.Addr{}, refusals.invalidAddress
	}
	return a, nil
}

// spell spells an answer as the agent gets it.
func (d *directoryService) spell(a directory.Answer) (*trothv1.ResolveResponse, error) {
	out := &trothv1.ResolveResponse{Address: a.Address}
	switch {
	case a.Behind == nil:
	case a.Behind.Service != nil:
		service, err := d.service(a.Behind)
		if err != nil {
			return nil, err
		}
		out.Behind = &trothv1.ResolveResponse_Service{Service: service}
	case a.Behind.Pod != nil:
		pod, err := d.endpoint(a.Behind.Pod)
		if err != nil {
			return nil, err
		}
		out.Behind = &trothv1.ResolveResponse_Pod{Pod: pod}
	}
	return out, nil
}

// service spells a Service, or finds it spelled. Nobody changes it.
func (d *directoryService) service(b *directory.Behind) (*trothv1.Service, error) {
	if known, ok := d.server.spelled.Get(b); ok {
		return known, nil
	}
	s := b.Service
	out := &trothv1.Service{Namespace: s.Namespace, Name: s.Name.Name, Ports: make([]*trothv1.ServicePort, 0, len(s.Ports))}
	if s.Affinity > 0 {
		out.Affinity = durationpb.New(s.Affinity)
	}
	for _, p := range s.Ports {
		port := &trothv1.ServicePort{Port: uint32(p.Port), Endpoints: make([]*trothv1.Endpoint, 0, len(p.Endpoints))}
		for n := range p.Endpoints {
			e, err := d.endpoint(&p.Endpoints[n])
			if err != nil {
				return nil, err
			}
			port.Endpoints = append(port.Endpoints, e)
		}
		out.Ports = append(out.Ports, port)
	}
	d.server.spelled.Add(b, out)
	return out, nil
}

func (d *directoryService) endpoint(e *directory.Endpoint) (*trothv1.Endpoint, error) {
	out := &trothv1.Endpoint{
		Address:  e.Address.Addr().String(),
		Port:     uint32(e.Address.Port()),
		PodUid:   e.Pod.UID,
		Protocol: protocolProto(e.Protocol),
	}
	if e.Pod.UID != "" {
		id, err := e.Account.ID(d.server.TrustDomain)
		if err != nil {
			return nil, err
		}
		out.Namespace, out.Name, out.SpiffeId = e.Pod.Namespace, e.Pod.Name, id.String()
	}
	if len(e.Ports) > 0 {
		out.PortProtocols = make(map[uint32]trothv1.Protocol, len(e.Ports))
		for _, p := range e.Ports {
			out.PortProtocols[uint32(p.Port)] = protocolProto(p.Protocol)
		}
	}
	return out, nil
}

// protocolProto spells a protocol. One that is none is unspecified, and every
// receiver refuses to call.
func protocolProto(p directory.Protocol) trothv1.Protocol {
	switch p {
	case directory.Plaintext:
		return trothv1.Protocol_PROTOCOL_PLAINTEXT
	case directory.HBONE:
		return trothv1.Protocol_PROTOCOL_HBONE
	case directory.Troth:
		return trothv1.Protocol_PROTOCOL_TROTH
	default:
		return trothv1.Protocol_PROTOCOL_UNSPECIFIED
	}
}
