package ca

import (
	"context"
	"fmt"
	"log/slog"
	"strings"
)

// Reseal makes sure that the stored keys of all authorities are sealed under the
// current key-encryption key, so that the previous ones can go, and reports how
// many it sealed anew. Where all are, or where [Config].Keys seals none, it changes
// nothing.
//
// Authorities, bundle and certificates stay as they are; only the revision of the
// document grows. Replicas may Reseal at the same time: one of them stores the
// document, and the others see that it is done. One that does not know the current
// key of another signs on with the keys that it holds, but does not start again:
// so every replica has to know a key before the first one makes it current.
//
// A crash before the Swap leaves all handles as they were, a crash after it leaves
// all of them under the current key, and only the audit line is missing.
//
// A key that does not open fails it, unless it is one of an authority that signs
// no more: that one is logged and left.
func (i *Issuer) Reseal(ctx context.Context) (int, error) {
	keys, ok := i.config.Keys.(Resealer)
	if !ok {
		return 0, nil
	}
	var resealed []string
	_, err := i.change(ctx, "reseal", Order{Actor: "server"}, func(d *draft) (string, error) {
		resealed = nil
		for n, a := range d.set.Authorities {
			if len(a.Key) == 0 {
				continue // revoked
			}
			handle, changed, err := keys.Reseal(ctx, a.ID, a.Key)
			switch {
			case err != nil && (a.State == Prepared || a.State == Active):
				return "", fmt.Errorf("ca: seal the key of authority %s, which is %v, anew: %w", a.ID, a.State, err)
			case err != nil:
				i.config.Audit.LogAttrs(ctx, slog.LevelWarn, "the key of an authority that signs no more does not open, and is left as it is",
					slog.String("authority_id", a.ID), slog.String("state", a.State.String()), slog.Any("err", err))
			case changed:
				// Not edit: the authority is in the same state since the same moment,
				// and the proofs that agents gave of it hold.
				d.begin()
				d.next.Authorities[n].Key = handle
				resealed = append(resealed, a.ID)
			}
		}
		if len(resealed) == 0 {
			return "", nil
		}
		d.order.Reason = "the key-encryption key has changed; sealed anew: " + strings.Join(resealed[:min(len(resealed), 10)], ", ")
		return resealed[0], nil
	})
	if err != nil {
		return 0, err
	}
	return len(resealed), nil
}
