package dev

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"troth.dev/troth/identity"
	"troth.dev/troth/internal/proc"
)

// assignment tells a plane which service account a process runs as.
type assignment struct {
	Namespace string `json:"namespace"`
	Name      string `json:"name"`
	PID       int32  `json:"pid"` // 0 means whoever asks
}

// Assigned is what a process needs to know to use its identity.
type Assigned struct {
	SPIFFEID string `json:"spiffe_id"`
	Socket   string `json:"socket"` // the Workload API's
}

// Assign asks the plane that runs in dir to give a process an identity; PID 0
// means the one that calls. It blocks for at most five seconds.
func Assign(ctx context.Context, dir string, account identity.ServiceAccount, pid int32) (Assigned, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	client := http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", filepath.Join(dir, adminSocket))
		},
	}}
	defer client.CloseIdleConnections()
	body, err := json.Marshal(assignment{Namespace: account.Namespace, Name: account.Name, PID: pid})
	if err != nil {
		return Assigned{}, err
	}
	request, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://troth/assign", bytes.NewReader(body))
	if err != nil {
		return Assigned{}, err
	}
	response, err := client.Do(request)
	if err != nil {
		return Assigned{}, fmt.Errorf("is `troth dev` running in %q? %w", dir, err)
	}
	defer response.Body.Close()
	answer, err := io.ReadAll(io.LimitReader(response.Body, 64<<10))
	if err != nil {
		return Assigned{}, err
	}
	if response.StatusCode != http.StatusOK {
		return Assigned{}, fmt.Errorf("troth dev: %s", bytes.TrimSpace(answer))
	}
	var assigned Assigned
	return assigned, json.Unmarshal(answer, &assigned)
}

// DialOperator connects to the plane that runs in dir as an operator of it, for
// AuthorityService and PolicyService. It fails if none runs there. The caller
// closes the connection.
func DialOperator(ctx context.Context, dir string) (*grpc.ClientConn, error) {
	dial := func(ctx context.Context, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", filepath.Join(dir, operatorSocket))
	}
	// gRPC connects on the first use, and speaks of transports when that fails.
	first, err := dial(ctx, "")
	if err != nil {
		return nil, fmt.Errorf("is `troth dev` running in %q? %w", dir, err)
	}
	first.Close()
	// The kernel says to each end who the other is: what TLS would add is nothing.
	return grpc.NewClient("passthrough:///troth-dev", grpc.WithContextDialer(dial), grpc.WithTransportCredentials(insecure.NewCredentials()))
}

// listenPrivate opens a Unix socket that only the user who runs the plane, and
// root, may connect to.
func listenPrivate(path string) (net.Listener, error) {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, err
	}
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return l, nil
}

type peerKey struct{}

func (p *Plane) serveAdmin(ctx context.Context) error {
	mux := http.NewServeMux()
	mux.HandleFunc("POST /assign", p.assign)
	s := &http.Server{
		Handler:           mux,
		ReadHeaderTimeout: 5 * time.Second,
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			peer, err := peerOf(c)
			if err != nil {
				return ctx // assign refuses whoever is not known
			}
			return context.WithValue(ctx, peerKey{}, peer)
		},
	}
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error {
		if err := s.Serve(p.admin); !errors.Is(err, http.ErrServerClosed) {
			return err
		}
		return nil
	})
	group.Go(func() error {
		<-ctx.Done()
		return s.Close()
	})
	return group.Wait()
}

// assign binds a process to a new pod of the account asked for.
func (p *Plane) assign(w http.ResponseWriter, r *http.Request) {
	peer, ok := r.Context().Value(peerKey{}).(proc.Credentials)
	if !ok {
		http.Error(w, "the kernel does not say who asks", http.StatusForbidden)
		return
	}
	var in assignment
	if err := json.NewDecoder(io.LimitReader(r.Body, 4<<10)).Decode(&in); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	account := identity.ServiceAccount{Namespace: in.Namespace, Name: in.Name}
	id, err := account.ID(p.config.TrustDomain)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	pid := in.PID
	if pid == 0 {
		pid = peer.PID
	}
	pod := p.Cluster.AddPod(account, fmt.Sprintf("process-%d", pid))
	if err := p.Cluster.Bind(pid, pod.UID); err != nil {
		p.Cluster.RemovePod(pod.UID)
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	if err := json.NewEncoder(w).Encode(Assigned{SPIFFEID: id.String(), Socket: p.Socket()}); err != nil {
		return // whoever asked has gone
	}
}

func peerOf(c net.Conn) (proc.Credentials, error) {
	u, ok := c.(*net.UnixConn)
	if !ok {
		return proc.Credentials{}, errors.New("not a Unix socket")
	}
	return proc.Peer(u)
}
