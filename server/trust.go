package server

import (
	"context"
	"errors"
	"log/slog"
	"time"

	trothv1 "troth.dev/troth/api/troth/v1"
	"troth.dev/troth/ca"
)

// trust is what every agent's stream says of whom to trust: the same two messages for
// all of them. It is never changed.
type trust struct {
	revision uint64
	bundles  *trothv1.WatchResponse
	probe    *trothv1.WatchResponse // nil before the first
}

func newTrust(b ca.Bundle, probe *trothv1.WatchResponse) *trust {
	return &trust{
		revision: b.Revision, probe: probe,
		bundles: &trothv1.WatchResponse{Part: &trothv1.WatchResponse_Bundles{
			Bundles: &trothv1.Bundles{Bundles: []*trothv1.Bundle{bundleProto(b)}},
		}},
	}
}

func newProbe(p *trothv1.Probe) *trothv1.WatchResponse {
	return &trothv1.WatchResponse{Part: &trothv1.WatchResponse_Probe{Probe: p}}
}

// keepTrust keeps the streams' trust current until ctx ends: the bundle, and with it
// the probe of the prepared authority that is to be the next, made anew before it
// expires. A new bundle waits a moment for its probe: an agent that gets both at once
// costs half of what it costs to tell it twice.
func (s *Server) keepTrust(ctx context.Context) error {
	const retry = 3 * time.Second
	now, _ := s.trust.Load()
	proving := "" // the authority of the probe
	var renew time.Time
	for {
		set, changed := s.Issuer.Authorities().Load()
		bundle, _ := s.Issuer.Bundle().Load() // of this set or of a later one
		next, prepared := set.Successor()
		probe, wait := now.probe, time.Hour
		switch {
		case !prepared && proving != "":
			proving, probe = "", newProbe(&trothv1.Probe{Revision: set.Revision})
		case prepared && (next.ID != proving || !time.Now().Before(renew)):
			made, err := s.makeProbe(ctx)
			if err != nil {
				// That nothing is prepared any more is news that is on its way.
				if ctx.Err() == nil && !errors.Is(err, ca.ErrNothingPrepared) {
					s.Log.LogAttrs(ctx, slog.LevelError, "agents cannot prove yet that they trust the prepared authority",
						slog.String("authority_id", next.ID), slog.Any("err", err))
				}
				wait = retry
				break
			}
			proving, renew = made.Authority, time.Now().Add(time.Until(made.NotAfter)*3/4)
			probe = newProbe(&trothv1.Probe{
				Revision: made.Revision, AuthorityId: made.Authority, Trusted: made.Trusted, Untrusted: made.Untrusted,
			})
			wait = time.Until(renew)
		case prepared:
			wait = time.Until(renew)
		}
		if bundle.Revision != now.revision || probe != now.probe {
			now = newTrust(bundle, probe)
			s.trust.Set(now)
		}
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
		case <-changed:
		case <-timer.C:
		}
		timer.Stop()
		if ctx.Err() != nil {
			return nil //nolint:nilerr // the end that was asked for is no error
		}
	}
}

// makeProbe does not hold a new bundle up for longer than a second.
func (s *Server) makeProbe(ctx context.Context) (ca.Probe, error) {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	return s.Issuer.Probe(ctx)
}
