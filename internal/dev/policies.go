package dev

import (
	"context"
	"crypto/sha256"
	"errors"
	"log/slog"
	"time"

	"troth.dev/troth/internal/manifest"
)

// fingerprint tells one state of the policies' files from another.
type fingerprint [sha256.Size]byte

// policyFiles reads the configured files and folders.
func (p *Plane) policyFiles() ([]manifest.File, fingerprint, error) {
	var files []manifest.File
	hash := sha256.New()
	for _, path := range p.config.Policies {
		found, err := manifest.Read([]string{path}, nil)
		if err != nil && !errors.Is(err, manifest.ErrEmpty) { // which it may be for now
			return nil, fingerprint{}, err
		}
		files = append(files, found...)
	}
	for _, file := range files {
		name, content := sha256.Sum256([]byte(file.Name)), sha256.Sum256(file.Content)
		hash.Write(name[:])
		hash.Write(content[:])
	}
	return files, fingerprint(hash.Sum(nil)), nil
}

// usePolicies puts the policies in files in force, all or none.
func (p *Plane) usePolicies(ctx context.Context, files []manifest.File) error {
	policies, err := manifest.Policies(files, p.config.PolicyNamespace)
	if err != nil {
		return err
	}
	if err := policies.Invalid(); err != nil {
		p.config.Log.LogAttrs(ctx, slog.LevelWarn, "policies that are not valid are STRICT for what they select", slog.Any("err", err))
	}
	p.Cluster.SetPolicies(policies.List)
	return nil
}

// followPolicies keeps the policies in force that the files have, until ctx ends.
// While they cannot be read, the last good ones stay.
//
// It looks four times a second, which costs a millisecond for some files: editors,
// mounts and links all change files in ways of their own. What it finds has to be
// there twice: a file that is just being written is empty for a moment, and no
// policy is PERMISSIVE.
func (p *Plane) followPolicies(ctx context.Context, used fingerprint) error {
	ticker := time.NewTicker(250 * time.Millisecond)
	defer ticker.Stop()
	told := ""
	for before := used; ; {
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		}
		files, now, err := p.policyFiles()
		if err == nil && now != used && now == before {
			used = now
			err = p.usePolicies(ctx, files)
		}
		before = now
		switch {
		case err == nil && now == used:
			told = ""
		case err != nil && err.Error() != told:
			told = err.Error()
			p.config.Log.LogAttrs(ctx, slog.LevelWarn, "policies not read; the last good ones stay in force", slog.Any("err", err))
		}
	}
}
