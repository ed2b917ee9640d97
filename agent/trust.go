package agent

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/protobuf/types/known/timestamppb"

	"troth.dev/troth/agent/workload"
	trothv1 "troth.dev/troth/api/troth/v1"
)

// trust is one revision of the own trust domain's bundle. It is never changed.
type trust struct {
	bundle   *x509bundle.Bundle
	revision uint64
	windows  map[string]window // of every authority of the bundle, by id
	content  [sha256.Size]byte // names all but the revision
	since    time.Time         // when it came, by the wall clock
}

// window is when SVIDs of an authority are to be replaced. The zero window is none.
type window struct{ from, by time.Time }

const (
	// maxAuthorities and maxCertificate bound a bundle: a rotation needs two or
	// three authorities, and a certificate of Troth's has less than a KiB.
	maxAuthorities = 64
	maxCertificate = 16 << 10
	// maxKeyIdentifier bounds a subject key identifier, in bytes: RFC 7093 knows of
	// none that is longer than a hash.
	maxKeyIdentifier = 64
)

// parseTrust reads a bundle of the trust domain that came at the time now.
func parseTrust(td spiffeid.TrustDomain, in *trothv1.Bundle, now time.Time) (*trust, error) {
	authorities := in.GetX509Authorities()
	switch {
	case in.GetTrustDomain() != td.Name():
		return nil, fmt.Errorf("agent: a bundle of trust domain %.300q", in.GetTrustDomain())
	case len(authorities) == 0, len(authorities) > maxAuthorities:
		return nil, fmt.Errorf("agent: a bundle with %d authorities: it has 1 to %d", len(authorities), maxAuthorities)
	}
	t := &trust{
		bundle: x509bundle.New(td), revision: in.GetRevision(), windows: make(map[string]window), since: wall(now),
	}
	lines := make([][]byte, 0, len(authorities))
	for _, authority := range authorities {
		if len(authority.GetCertificate()) > maxCertificate {
			return nil, fmt.Errorf("agent: an authority whose certificate has %d bytes", len(authority.GetCertificate()))
		}
		certificate, err := x509.ParseCertificate(authority.GetCertificate())
		if err != nil {
			return nil, fmt.Errorf("agent: authority %.100q: %w", authority.GetId(), err)
		}
		// Under an upstream root the certificate is the root's, and the ID that of the
		// intermediate: leaves name it as their issuer.
		id := authority.GetId()
		if key, err := hex.DecodeString(id); err != nil || len(key) == 0 || len(key) > maxKeyIdentifier {
			return nil, fmt.Errorf("agent: authority %.100q: that is no key identifier", id)
		}
		if _, twice := t.windows[id]; twice {
			return nil, fmt.Errorf("agent: authority %q is there twice", id)
		}
		if t.windows[id], err = parseWindow(authority.GetReissueFrom(), authority.GetReissueBy()); err != nil {
			return nil, fmt.Errorf("agent: authority %q: %w", id, err)
		}
		t.bundle.AddX509Authority(certificate)

		line := sha256.Sum256(authority.GetCertificate())
		lines = append(lines, fmt.Appendf(line[:], "%d %d", t.windows[id].from.UnixNano(), t.windows[id].by.UnixNano()))
	}
	slices.SortFunc(lines, bytes.Compare) // the order of the authorities has no meaning
	t.content = sha256.Sum256(bytes.Join(lines, []byte("\n")))
	return t, nil
}

func parseWindow(from, by *timestamppb.Timestamp) (window, error) {
	switch {
	case from == nil && by == nil:
		return window{}, nil
	case from.CheckValid() != nil, by.CheckValid() != nil:
		return window{}, errors.New("half a reissue window, or none of this world")
	case by.AsTime().Before(from.AsTime()):
		return window{}, errors.New("a reissue window that ends before it begins")
	}
	return window{from.AsTime(), by.AsTime()}, nil
}

// cause is why an SVID is replaced.
type cause string

const (
	refresh       cause = "refresh"        // it has lived for long enough
	reissue       cause = "reissue"        // its authority is to be replaced
	authorityGone cause = "authority_gone" // its authority is not trusted any more
)

// plan is what decides when one SVID is to be replaced.
type plan struct {
	leaf     workload.Leaf
	fraction float64   // the SVID's own place in every window, from 0 to below 1
	refresh  time.Time // when it is due whatever happens, by the wall clock
}

// newPlan places an SVID that came at the time now. Its place is the server's, which
// knows what else was issued; without one, chance has to do.
func newPlan(svid *x509svid.SVID, place *uint32, now time.Time) plan {
	lot := sha256.Sum256(svid.Certificates[0].SerialNumber.Bytes())
	p := plan{leaf: workload.LeafOf(svid), fraction: fraction(binary.BigEndian.Uint32(lot[:4]))}
	if place != nil {
		p.fraction = fraction(*place)
	}
	p.refresh = refreshAt(svid, p.fraction, fraction(binary.BigEndian.Uint32(lot[4:8])), now)
	return p
}

// rush is over how long those replacements are spread that all agents would make at
// the moment at which they hear of a bundle.
const rush = 3 * time.Second

// due returns when an SVID is to be replaced, by the wall clock, and why. The nil
// trust wants nothing replaced early.
func (t *trust) due(p plan) (at time.Time, why cause) {
	if t == nil {
		return p.refresh, refresh
	}
	w, trusted := t.windows[p.leaf.Authority]
	switch {
	case !trusted:
		at, why = t.since, authorityGone
	case !w.from.IsZero():
		at, why = w.from.Add(time.Duration(p.fraction*float64(w.by.Sub(w.from)))), reissue
	default:
		return p.refresh, refresh
	}
	if soonest := t.since.Add(time.Duration(p.fraction * float64(rush))); at.Before(soonest) {
		at = soonest
	}
	if p.refresh.Before(at) {
		return p.refresh, refresh
	}
	return at, why
}

// lag returns until when what was issued at the time now is to be kept, though it is
// due already; zero if it is not. A replica of the control plane that lags behind
// signs with an authority that is to be replaced for a minute or two, and asking
// again at once would bring the same.
func (t *trust) lag(p plan, now time.Time) time.Time {
	if at, _ := t.due(p); at.After(now) {
		return time.Time{}
	}
	return now.Add(min(5*time.Second+rand.N(5*time.Second), p.refresh.Sub(now)))
}

// refreshAt is when half to three quarters of what is left of the SVID's life at
// the time now has passed, at its own fraction: SVIDs that were issued together are
// not renewed together.
//
// To the fraction comes up to an eighth by lot. The even places of SVIDs that are
// renewed at an even rate are a lattice, which can fall in step with that rate: of
// 3,000 SVIDs by three servers, 48 were renewed in one second.
func refreshAt(svid *x509svid.SVID, fraction, lot float64, now time.Time) time.Time {
	_, at := math.Modf(fraction + lot/8)
	left := svid.Certificates[0].NotAfter.Sub(now)
	return wall(now).Add(left/2 + time.Duration(at*float64(left/4)))
}

// fraction is what place, in units of 2⁻³², is of the whole.
func fraction(place uint32) float64 { return float64(place) / (1 << 32) }

// wall is t by the wall clock alone. The other clock stands still while a machine
// sleeps, and certificates expire meanwhile: what is compared with the time of a
// certificate must not have a reading of it.
func wall(t time.Time) time.Time { return t.Round(0) }

// nap is how long a wait for a time of the wall clock may be, before that clock is
// looked at again: timers stand still while a machine sleeps.
const nap = 5 * time.Second

func napUntil(at time.Time) time.Duration {
	return min(time.Until(at), nap)
}
