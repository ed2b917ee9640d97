package main

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"troth.dev/troth/handshake"
)

// The services of the demonstration are processes of their own, which take their
// identities from the Workload API by an unmodified go-spiffe client. They read
// one line of JSON, and tell what they saw in lines of JSON.

// callerConfig is what service A is to do. Service B reads one and ignores it.
type callerConfig struct {
	Address string `json:"address"`
	Peer    string `json:"peer"`
	Fault   fault  `json:"fault"`

	foreign bool // whether A is at home in the other trust domain
}

// fault is what service A does wrong.
type fault string

const (
	noCertificate fault = "no-certificate"
	plaintext     fault = "plaintext"
)

// outcome is what one service saw of one connection, or, once, where B listens.
type outcome struct {
	Address  string  `json:"address,omitempty"`
	Events   []event `json:"events,omitempty"`
	Received string  `json:"received,omitempty"`
	Error    string  `json:"error,omitempty"`
}

// event is a handshake.Event on its way between processes.
type event struct {
	Step handshake.Step `json:"step"`
	Peer string         `json:"peer,omitempty"`
	Code handshake.Code `json:"code,omitempty"`
}

const greeting = "hello over mutual TLS"

func demoServiceCommand() *cobra.Command {
	return &cobra.Command{
		Use:    "demo-service caller|callee|application",
		Hidden: true,
		Args:   cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			in := bufio.NewReader(cmd.InOrStdin())
			line, err := in.ReadBytes('\n') // from here on this process has an identity
			if err != nil {
				return err
			}
			var config callerConfig
			if err := json.Unmarshal(line, &config); err != nil {
				return err
			}
			tell := json.NewEncoder(cmd.OutOrStdout())
			if args[0] == "application" {
				return application(in, tell)
			}
			source, err := workloadapi.NewX509Source(cmd.Context())
			if err != nil {
				return err
			}
			defer source.Close()
			switch args[0] {
			case "caller":
				return tell.Encode(call(cmd.Context(), source, config))
			case "callee":
				return answer(cmd.Context(), source, in, tell)
			default:
				return fmt.Errorf("a demo service is caller, callee or application, not %q", args[0])
			}
		},
	}
}

// recorder collects the events of one handshake.
type recorder struct {
	mu     sync.Mutex
	events []event
}

func (r *recorder) trace(e handshake.Event) {
	r.mu.Lock()
	defer r.mu.Unlock()
	seen := event{Step: e.Step, Peer: e.Peer.String()}
	if e.Err != nil {
		seen.Code = e.Err.Code
	}
	r.events = append(r.events, seen)
}

func configFor(source *workloadapi.X509Source, r *recorder) *handshake.Config {
	return &handshake.Config{Order: handshake.CallerFirst, SVID: source, Bundles: source, Trace: r.trace}
}

// call is service A: it connects, greets and reads what comes back.
func call(ctx context.Context, source *workloadapi.X509Source, config callerConfig) outcome {
	r := &recorder{}
	received, err := func() (string, error) {
		var d net.Dialer
		raw, err := d.DialContext(ctx, "tcp", config.Address)
		if err != nil {
			return "", err
		}
		defer raw.Close()
		switch config.Fault {
		case plaintext:
			if _, err := io.WriteString(raw, "GET / HTTP/1.1\r\nHost: payments\r\n\r\n"+greeting); err != nil {
				return "", err
			}
			return plain(raw)
		case noCertificate:
			// The caller is the TLS server of this order. One without a certificate:
			server := tls.Server(raw, &tls.Config{
				MinVersion: tls.VersionTLS13,
				NextProtos: []string{"troth/1"},
				GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
					return nil, errors.New("there is none")
				},
			})
			return "", server.HandshakeContext(ctx)
		}
		peer, err := spiffeid.FromString(config.Peer)
		if err != nil {
			return "", err
		}
		conn, err := handshake.Initiate(ctx, raw, configFor(source, r), peer)
		if err != nil {
			return "", err
		}
		return exchange(conn)
	}()
	return told(r, received, err)
}

// plain returns what comes back from a peer that was spoken to in plaintext.
// Bytes of TLS are no answer.
func plain(raw net.Conn) (string, error) {
	back, err := io.ReadAll(io.LimitReader(raw, 64<<10))
	const recordHandshake, recordAlert = 22, 21
	if len(back) > 0 && back[0] != recordHandshake && back[0] != recordAlert {
		return string(back), err
	}
	return "", err
}

// answer is service B: it tells where it listens, and then what it saw of each
// connection, until its input ends.
func answer(ctx context.Context, source *workloadapi.X509Source, in io.Reader, tell *json.Encoder) error {
	return serve(in, tell, func(raw net.Conn) error {
		r := &recorder{}
		var received string
		conn, err := handshake.Accept(ctx, raw, configFor(source, r), func(spiffeid.ID) error { return nil })
		if err == nil {
			received, err = exchange(conn)
		}
		return tell.Encode(told(r, received, err))
	})
}

// application is service C, which knows nothing of TLS: it tells where it listens,
// and sends back every line that it is sent, until its input ends.
func application(in io.Reader, tell *json.Encoder) error {
	return serve(in, tell, func(conn net.Conn) error {
		go func() {
			defer conn.Close()
			_, _ = io.Copy(conn, conn) // what goes wrong is between the client and its agent
		}()
		return nil
	})
}

// serve tells where it listens, and hands over each connection until in ends.
func serve(in io.Reader, tell *json.Encoder, handle func(net.Conn) error) error {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	defer l.Close()
	go func() {
		_, _ = io.Copy(io.Discard, in) // it ends with the demonstration, whatever the error
		l.Close()
	}()
	if err := tell.Encode(outcome{Address: l.Addr().String()}); err != nil {
		return err
	}
	for {
		conn, err := l.Accept()
		if errors.Is(err, net.ErrClosed) {
			return nil
		}
		if err != nil {
			return err
		}
		if err := handle(conn); err != nil {
			return err
		}
	}
}

// exchange sends the greeting, reads the other's, and closes.
func exchange(conn *handshake.Conn) (string, error) {
	defer conn.Close()
	if _, err := io.WriteString(conn, greeting); err != nil {
		return "", err
	}
	back := make([]byte, len(greeting))
	_, err := io.ReadFull(conn, back)
	return string(back), err
}

func told(r *recorder, received string, err error) outcome {
	r.mu.Lock()
	defer r.mu.Unlock()
	o := outcome{Events: r.events, Received: received}
	if err != nil {
		o.Error = err.Error()
	}
	return o
}
