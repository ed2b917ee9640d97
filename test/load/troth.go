package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"troth.dev/troth/ca"
	"troth.dev/troth/identity"
	"troth.dev/troth/internal/dev"
	"troth.dev/troth/internal/heap"
	"troth.dev/troth/mint"
	"troth.dev/troth/server"
	"troth.dev/troth/storage"
	"troth.dev/troth/storage/sqlite"
	"troth.dev/troth/token"
)

// troth is the whole control plane as it runs in a cluster, but for the records of
// pods, which are made up: SQLite on disk, sealed keys, an audit line in JSON for
// each certificate, metrics.
type troth struct {
	dir    string
	audit  *os.File
	store  *sqlite.Store
	issuer *ca.Issuer
	tokens *token.Verifier
	jobs   *mint.Verifier // nil without CI
	server *server.Server
	fleet  []agent
}

func openTroth(ctx context.Context, s spec) (_ target, err error) {
	t := &troth{}
	defer func() {
		if err != nil {
			err = errors.Join(err, t.close())
		}
	}()
	if t.dir, err = os.MkdirTemp("", "troth-load-"); err != nil {
		return nil, err
	}
	if t.audit, err = os.Create(filepath.Join(t.dir, "audit.log")); err != nil {
		return nil, err
	}
	log := slog.New(slog.NewJSONHandler(t.audit, nil))
	if t.store, err = sqlite.Open(ctx, sqlite.Config{Path: filepath.Join(t.dir, "troth.db")}); err != nil {
		return nil, err
	}
	kek := make([]byte, ca.KeySize)
	rand.Read(kek)
	keys, err := ca.NewSealedKeys(kek)
	if err != nil {
		return nil, err
	}
	t.issuer, err = ca.Open(ctx, ca.Config{
		TrustDomain: trustDomain, Keys: keys, Authorities: t.store, Ledger: t.store, Audit: log,
	})
	if err != nil {
		return nil, err
	}
	// Nobody presents a token under this load.
	cluster, err := dev.NewCluster(identity.ServiceAccount{})
	if err != nil {
		return nil, err
	}
	t.tokens, err = token.New(token.Config{Issuers: []string{dev.Issuer}, Audience: trustDomain.IDString(), Keys: cluster.Keys})
	if err != nil {
		return nil, err
	}
	minting, err := t.openMint(ctx, s, keys, log)
	if err != nil {
		return nil, err
	}
	pods := newCluster(s.Nodes, s.PodsPerNode)
	t.server, err = server.New(server.Config{
		TrustDomain: trustDomain, Issuer: t.issuer, Tokens: t.tokens, Pods: pods, Agents: agentsAccount,
		Fleet: t.store, Replica: "load", Log: log, Metrics: prometheus.NewRegistry(),
		Limits: server.Limits{PerCaller: 1e6}, // one agent asks for all of them
		Mint:   minting,
	})
	if err != nil {
		return nil, err
	}
	t.fleet, err = pods.withSVIDs(func(id spiffeid.ID, key *ecdsa.PrivateKey) ([][]byte, error) {
		csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
		if err != nil {
			return nil, err
		}
		results, err := t.issuer.Issue(ctx, ca.Request{ID: id, CSR: csr, Caller: "load"})
		if err != nil {
			return nil, err
		}
		return results[0].SVID.Certificates, results[0].Err
	})
	if err != nil {
		return nil, err
	}
	return t, t.fillLedger(ctx, s.Ledger)
}

// fillLedger makes the ledger one that has been in use: its indexes are many
// pages.
func (t *troth) fillLedger(ctx context.Context, rows int) error {
	id := spiffeid.RequireFromPath(trustDomain, "/ns/shop/sa/service-0")
	bundle, _ := t.issuer.Bundle().Load()
	for rows > 0 {
		now := time.Now()
		batch := make([]storage.Issuance, min(rows, 1000))
		for n := range batch {
			batch[n] = storage.Issuance{
				Serial: fmt.Sprintf("%08x%032x", now.Unix(), randomSerial()), ID: id, AuthorityID: bundle.Authorities[0].ID,
				NotBefore: now, NotAfter: now.Add(time.Hour), IssuedAt: now, Caller: "load",
			}
		}
		if err := t.store.Record(ctx, batch...); err != nil {
			return err
		}
		rows -= len(batch)
	}
	return nil
}

func (t *troth) agents() []agent { return t.fleet }

func (t *troth) authorities() [][]byte {
	bundle, _ := t.issuer.Bundle().Load()
	var all [][]byte
	for _, a := range bundle.Authorities {
		all = append(all, a.Certificate.Raw)
	}
	return all
}

// push does what another replica does when it replaces authorities: it swaps the
// stored document. Three old authorities beside the active one make a bundle of
// about 2 KB, and nobody has to prove anything of them.
func (t *troth) push(ctx context.Context) error {
	doc, err := t.store.Load(ctx)
	if err != nil {
		return err
	}
	var set struct {
		Format      int               `json:"format"`
		TrustDomain string            `json:"trust_domain"`
		Revision    uint64            `json:"revision"`
		Authorities []json.RawMessage `json:"authorities"`
		History     json.RawMessage   `json:"history,omitempty"`
	}
	if err := json.Unmarshal(doc.Data, &set); err != nil {
		return err
	}
	if set.Format < 1 || set.Format > 3 || len(set.Authorities) == 0 {
		return fmt.Errorf("stored authorities of format %d: this command knows only 1 to 3", set.Format)
	}
	set.Revision++
	set.Authorities = set.Authorities[:1]
	for range 3 {
		a, err := newAuthority()
		if err != nil {
			return err
		}
		old, err := json.Marshal(map[string]any{
			"id": hex.EncodeToString(a.certificate.SubjectKeyId), "state": ca.Old.String(), "certificate": a.certificate.Raw,
		})
		if err != nil {
			return err
		}
		set.Authorities = append(set.Authorities, old)
	}
	data, err := json.Marshal(set)
	if err != nil {
		return err
	}
	_, err = t.store.Swap(ctx, doc.Version, data)
	return err
}

// prepare is what an operator does first who replaces an authority.
func (t *troth) prepare(ctx context.Context) error {
	_, err := t.issuer.Prepare(ctx, ca.Order{Actor: "load"})
	return err
}

// awaitProof returns when every agent is known to have proved what was prepared.
func (t *troth) awaitProof(ctx context.Context) error {
	for {
		set, _ := t.issuer.Authorities().Load()
		known, changed := t.server.Propagation().Load()
		if next, ok := set.Successor(); ok && known.Authority == next.ID && known.Expected > 0 && known.Proved == known.Expected {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// abort makes prepare one that can be measured again.
func (t *troth) abort(ctx context.Context) error {
	set, _ := t.issuer.Authorities().Load()
	next, _ := set.Successor()
	_, err := t.issuer.Abort(ctx, next.ID, ca.Order{Actor: "load"})
	return err
}

func (t *troth) serve(ctx context.Context, l net.Listener) error {
	go heap.KeepRoom(ctx)
	return t.server.Serve(ctx, l)
}

func (t *troth) close() error {
	var err error
	if t.tokens != nil {
		t.tokens.Close()
	}
	if t.jobs != nil {
		t.jobs.Close()
	}
	if t.store != nil {
		err = t.store.Close()
	}
	if t.audit != nil {
		err = errors.Join(err, t.audit.Close())
	}
	return errors.Join(err, os.RemoveAll(t.dir))
}
