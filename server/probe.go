package server

import (
	"context"
	"errors"
	"log/slog"
	"time"

	trothv1 "troth.dev/troth/api/troth/v1"
	"troth.dev/troth/ca"
)

// keepProbe keeps the probe current that all agents get, until ctx ends: one for
// the prepared authority that is to be the next, made anew before it expires, and
// one without leaves after that authority was activated or aborted.
func (s *Server) keepProbe(ctx context.Context) error {
	const retry = 3 * time.Second
	proving := "" // the authority of the current probe
	var renew time.Time
	for {
		set, changed := s.Issuer.Authorities().Load()
		next, prepared := set.Successor()
		wait := time.Hour
		switch {
		case !prepared && proving != "":
			proving = ""
			s.probe.Set(&trothv1.Probe{Revision: set.Revision})
		case prepared && (next.ID != proving || !time.Now().Before(renew)):
			probe, err := s.Issuer.Probe(ctx)
			if err != nil {
				// That nothing is prepared any more is news that is on its way.
				if ctx.Err() == nil && !errors.Is(err, ca.ErrNothingPrepared) {
					s.Log.LogAttrs(ctx, slog.LevelError, "agents cannot prove yet that they trust the prepared authority",
						slog.String("authority_id", next.ID), slog.Any("err", err))
				}
				wait = retry
				break
			}
			proving, renew = probe.Authority, time.Now().Add(time.Until(probe.NotAfter)*3/4)
			s.probe.Set(&trothv1.Probe{
				Revision: probe.Revision, AuthorityId: probe.Authority, Trusted: probe.Trusted, Untrusted: probe.Untrusted,
			})
			wait = time.Until(renew)
		case prepared:
			wait = time.Until(renew)
		}
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
		case <-changed:
		case <-timer.C:
		}
		timer.Stop()
		if ctx.Err() != nil {
			return nil
		}
	}
}
