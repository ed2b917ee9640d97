package check

import (
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"slices"
	"strings"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	certificatesv1 "k8s.io/api/certificates/v1"
	coordinationv1 "k8s.io/api/coordination/v1"

	trothv1 "troth.dev/troth/api/troth/v1"
)

const (
	// soon is when the end of an authority is near, unless it lives for less than
	// four times that.
	soon = 7 * 24 * time.Hour
	// maxWait is how long what the server does by itself may take before somebody
	// should look.
	maxWait = 2 * time.Minute
)

// ErrNoServer is why nothing is known of the control plane when nobody said where it is.
var ErrNoServer = errors.New("the control plane was not asked: give --server, --trust-domain, --bundle and --token")

func trustChecks() []definition {
	return []definition{
		{Check{
			"bundle-published", "The trust bundle is published",
			"Agents verify the server by it at their first start, and pods that mount it verify each other.",
			"Look for \"trust bundle\" in the server's log, and compare -trust-bundle of the server with what the agents mount.",
		}, after, func(s *Snapshot) finding {
			return with(s.Published, func(all []Bundle) finding {
				if len(all) == 0 {
					return fail("neither a ClusterTrustBundle nor a ConfigMap of Troth's has a bundle")
				}
				var where []string
				for _, b := range all {
					if len(b.Authorities) == 0 {
						return fail("%s has no certificate", b.Where)
					}
					if !same(b.Authorities, all[0].Authorities) {
						return fail("%s and %s differ", all[0].Where, b.Where)
					}
					where = append(where, b.Where)
				}
				return pass("%s in %s, %s", count(len(all[0].Authorities), "authority"), strings.Join(where, " and "), digest(all[0].Authorities))
			})
		}},
		{Check{
			"bundle-expiry", "The published authorities are good for a while",
			"When the last one expires, nobody trusts anybody any more.",
			"troth authority rotate; then see that the new bundle is published.",
		}, after, func(s *Snapshot) finding {
			return with(s.Published, func(all []Bundle) finding {
				var last *x509.Certificate
				for _, b := range all {
					for _, c := range b.Authorities {
						if last == nil || c.NotAfter.After(last.NotAfter) {
							last = c
						}
					}
				}
				if last == nil {
					return unknown("nothing is published")
				}
				return lasts("the authority that lives longest", last, s.At, near(last))
			})
		}},
		{Check{
			"bundle-agreement", "What is published is what the server serves",
			"Who starts with another bundle does not trust the server, or trusts an authority that was dropped.",
			"Look for \"trust bundle\" in the server's log, and at the holder of the Lease troth-publisher.",
		}, after, func(s *Snapshot) finding {
			return with2(s.Published, s.Served, func(all []Bundle, served Served) finding {
				if len(all) == 0 {
					return fail("nothing is published")
				}
				for _, b := range all {
					if !same(b.Authorities, served.Authorities) {
						return fail("%s has %s, and the server serves %s", b.Where, digest(b.Authorities), digest(served.Authorities))
					}
				}
				return pass("both are %s", digest(served.Authorities))
			})
		}},
		{Check{
			"publisher", "A replica publishes the bundle",
			"If none holds the Lease, the next authority does not reach the published bundle.",
			"Look for \"troth-publisher\" in the server's log, and check server-rights.",
		}, after, func(s *Snapshot) finding {
			return with2(s.APIServer, s.Publisher, func(a APIServer, l *coordinationv1.Lease) finding {
				if l == nil {
					return fail("there is no Lease %s/%s", s.ServerNamespace, publisher)
				}
				if l.Spec.HolderIdentity == nil || *l.Spec.HolderIdentity == "" || l.Spec.RenewTime == nil {
					return fail("nobody holds the Lease %s", publisher)
				}
				// By the API server's clock, which is as near to the holder's as ours.
				if age := s.At.Add(a.Ahead).Sub(l.Spec.RenewTime.Time); age > maxWait {
					return fail("%s holds the Lease and has not renewed it for %s", *l.Spec.HolderIdentity, span(age))
				}
				return pass("%s publishes it", *l.Spec.HolderIdentity)
			})
		}},
		{Check{
			"server-reachable", "The server answers, and proves who it is",
			"Agents take the same way: what keeps you from the server may keep them from it.",
			"kubectl -n troth-system port-forward service/troth-server 8443 gives you an address; a bundle that is out of date does not verify the server.",
		}, after, func(s *Snapshot) finding {
			return with(s.Served, func(served Served) finding {
				if served.Certificate == nil {
					return unknown("the server's certificate was not seen")
				}
				return pass("revision %d of the bundle, from %s", served.Revision, uris(served.Certificate))
			})
		}},
		{Check{
			"server-certificate", "The server's own certificate is good for a while",
			"The server renews it by itself. One that is about to expire says that it cannot issue.",
			"Look for \"own SVID\" in the server's log, and at the store.",
		}, after, func(s *Snapshot) finding {
			return with(s.Served, func(served Served) finding {
				c := served.Certificate
				if c == nil {
					return unknown("the server's certificate was not seen")
				}
				// It is renewed when a quarter of its life is left, at the latest.
				return lasts("it", c, s.At, c.NotAfter.Sub(c.NotBefore)/5)
			})
		}},
		{Check{
			"clock-server", "The server's clock agrees with this one",
			"A server whose clock is wrong issues certificates that others take for expired or not yet valid.",
			"Run NTP on the nodes of the server.",
		}, after, func(s *Snapshot) finding {
			return withStatus(s, func(st *trothv1.AuthorityStatus) finding {
				at := st.GetPropagation().GetKnownAt()
				if at == nil {
					return unknown("the server has not counted its agents yet, and tells no time")
				}
				// The counts may be as old as the server's rounds: what is behind is
				// told from a wrong clock only when it is far.
				switch ahead := at.AsTime().Sub(s.At); {
				case ahead > maxSkew:
					return fail("the server's clock is %s", apart(ahead))
				case ahead < -maxWait:
					return fail("the server's clock is %s, or it has not counted its agents since", apart(ahead))
				}
				return pass("the server's clock is within %s of this one", span(maxWait))
			})
		}},
		{Check{
			"authority-active", "An authority signs, and will for a while",
			"The server rotates it by itself well before its end. One that is near its end says that a rotation is stuck.",
			"troth authority status says what is in the way (docs/rotate-a-root.md).",
		}, after, func(s *Snapshot) finding {
			return withStatus(s, func(st *trothv1.AuthorityStatus) finding {
				active := inState(st, trothv1.AuthorityState_AUTHORITY_STATE_ACTIVE)
				if len(active) != 1 {
					return fail("%d authorities are active, want one", len(active))
				}
				c, err := x509.ParseCertificate(active[0].GetCertificate())
				if err != nil {
					return unknown("the certificate of the active authority cannot be read: %v", err)
				}
				return lasts(short(active[0].GetId()), c, s.At, near(c))
			})
		}},
		{Check{
			"authority-tainted", "No authority is tainted",
			"What a tainted authority signed is not to be trusted for longer than it takes to replace it.",
			"troth authority status says what still depends on it; revoke it when nothing does.",
		}, after, func(s *Snapshot) finding {
			return withStatus(s, func(st *trothv1.AuthorityStatus) finding {
				var ids []string
				for _, a := range inState(st, trothv1.AuthorityState_AUTHORITY_STATE_TAINTED) {
					ids = append(ids, short(a.GetId()))
				}
				if len(ids) > 0 {
					return warn("tainted, and still trusted: %s", some(ids))
				}
				return pass("none is tainted")
			})
		}},
		{Check{
			"rotation-overdue", "No rotation is overdue",
			"The schedule does not get past what is in the way, and the authority that signs gets older.",
			"troth authority status says what is in the way, and docs/rotate-a-root.md what to do about each obstacle.",
		}, after, func(s *Snapshot) finding {
			return withStatus(s, func(st *trothv1.AuthorityStatus) finding {
				o := st.GetOverdue()
				if o == nil {
					return pass("nothing is overdue")
				}
				var obstacles []string
				for _, b := range o.GetBlockers() {
					obstacles = append(obstacles, b.GetObstacle())
				}
				return expires("%s of %s is overdue: %s", o.GetOperation(), short(o.GetAuthorityId()), some(obstacles))
			})
		}},
		{Check{
			"agents-reporting", "The server hears of every agent",
			"An agent that is not heard of holds every rotation up.",
			"Look at the agents of those nodes; delete a Node that is gone for good.",
		}, after, func(s *Snapshot) finding {
			return withPropagation(s, func(p *trothv1.AuthorityPropagation) finding {
				if n, all := p.GetReporting(), p.GetExpected(); n < all {
					return warn("%d of %s said what they hold%s", n, count(int(all), "agent"), waiting(p))
				}
				return pass("%s said what they hold", count(int(p.GetExpected()), "agent"))
			})
		}},
		{Check{
			"agents-applied", "Every agent uses the newest bundle",
			"The workloads of an agent that does not refuse what a new authority signs, or trust one that was dropped.",
			"Look at the agents of those nodes (docs/rotate-a-root.md#agents_missing).",
		}, after, func(s *Snapshot) finding {
			return withPropagation(s, func(p *trothv1.AuthorityPropagation) finding {
				if n, all := p.GetApplied(), p.GetExpected(); n < all {
					return warn("revision %d is received by %d and in use by %d of %s%s", p.GetRevision(), p.GetReceived(), n, count(int(all), "agent"), waiting(p))
				}
				return pass("revision %d is in use by %s", p.GetRevision(), count(int(p.GetExpected()), "agent"))
			})
		}},
		{Check{
			"agents-proved", "Every agent has proved that it trusts the next authority",
			"The next authority signs nothing until all of them have.",
			"An agent proves it by itself within seconds: look at the agents of those nodes (docs/rotate-a-root.md#agents_missing).",
		}, after, func(s *Snapshot) finding {
			return withPropagation(s, func(p *trothv1.AuthorityPropagation) finding {
				if p.GetAuthorityId() == "" {
					return pass("no authority is prepared")
				}
				if n, all := p.GetProved(), p.GetExpected(); n < all {
					return warn("%s is proved by %d of %s%s", short(p.GetAuthorityId()), n, count(int(all), "agent"), waiting(p))
				}
				return pass("%s is proved by %s", short(p.GetAuthorityId()), count(int(p.GetExpected()), "agent"))
			})
		}},
		{Check{
			"pod-certificates", "The certificates that kubelets ask for are issued",
			"A pod that mounts one does not start until it is.",
			"kubectl get podcertificaterequests -A, and the conditions of the ones that are refused.",
		}, after, func(s *Snapshot) finding {
			return with2(s.Deployment, s.Requests, func(d *appsv1.Deployment, all []certificatesv1.PodCertificateRequest) finding {
				if d == nil {
					return noDeployment(s)
				}
				if signer, _ := flagOf(container(d.Spec.Template.Spec.Containers, "server"), "signer"); signer != signerName {
					return pass("the server does not sign for %s", signerName)
				}
				return podCertificates(s, all)
			})
		}},
	}
}

func podCertificates(s *Snapshot, all []certificatesv1.PodCertificateRequest) finding {
	var waiting, refused []string
	n := 0
	for _, r := range all {
		if r.Spec.SignerName != signerName {
			continue
		}
		n++
		name := r.Namespace + "/" + r.Spec.PodName
		switch {
		case len(r.Status.Conditions) == 0:
			if s.At.Sub(r.CreationTimestamp.Time) > maxWait {
				waiting = append(waiting, name)
			}
		case r.Status.Conditions[0].Type != certificatesv1.PodCertificateRequestConditionTypeIssued:
			refused = append(refused, name+" ("+r.Status.Conditions[0].Reason+")")
		}
	}
	switch {
	case len(waiting) > 0:
		return fail("not answered for more than %s: %s", span(maxWait), some(waiting))
	case len(refused) > 0:
		return warn("refused: %s", some(refused))
	}
	return pass("%s of late, none refused and none waiting", count(n, "request"))
}

func withStatus(s *Snapshot, judge func(*trothv1.AuthorityStatus) finding) finding {
	return with(s.Status, func(st *trothv1.AuthorityStatus) finding {
		if st == nil {
			return unknown("the server sent no status")
		}
		return judge(st)
	})
}

func withPropagation(s *Snapshot, judge func(*trothv1.AuthorityPropagation) finding) finding {
	return withStatus(s, func(st *trothv1.AuthorityStatus) finding {
		if st.GetPropagation().GetKnownAt() == nil {
			return unknown("the server has not counted its agents yet")
		}
		return judge(st.GetPropagation())
	})
}

func inState(st *trothv1.AuthorityStatus, state trothv1.AuthorityState) []*trothv1.AuthorityRecord {
	return slices.DeleteFunc(slices.Clone(st.GetAuthorities()), func(a *trothv1.AuthorityRecord) bool { return a.GetState() != state })
}

// waiting names the nodes that are waited for.
func waiting(p *trothv1.AuthorityPropagation) string {
	var nodes []string
	for _, w := range p.GetWaiting() {
		nodes = append(nodes, w.GetNode()+" ("+w.GetLacks()+")")
	}
	if len(nodes) == 0 {
		return ""
	}
	return ", waiting for " + some(nodes)
}

// lasts is about how long a certificate is good for.
func lasts(who string, c *x509.Certificate, now time.Time, enough time.Duration) finding {
	left := c.NotAfter.Sub(now)
	switch {
	case now.Before(c.NotBefore):
		return fail("%s is not valid for another %s", who, span(c.NotBefore.Sub(now)))
	case left <= 0:
		return fail("%s expired %s ago", who, span(-left))
	case left < enough:
		return expires("%s expires in %s", who, span(left))
	}
	return pass("%s is good for %s", who, span(left))
}

// near is how much of an authority's life is too little.
func near(c *x509.Certificate) time.Duration { return min(soon, c.NotAfter.Sub(c.NotBefore)/4) }

// short is an ID as far as people read it.
func short(id string) string { return id[:min(len(id), 12)] }

// same reports whether two bundles have the same certificates, in whatever order.
func same(a, b []*x509.Certificate) bool { return digest(a) == digest(b) }

// digest names the content of a bundle, whatever its order.
func digest(authorities []*x509.Certificate) string {
	var sums []string
	for _, c := range authorities {
		sum := sha256.Sum256(c.Raw)
		sums = append(sums, string(sum[:]))
	}
	slices.Sort(sums)
	sum := sha256.Sum256([]byte(strings.Join(slices.Compact(sums), "")))
	return "sha256:" + hex.EncodeToString(sum[:6])
}

func uris(c *x509.Certificate) string {
	if len(c.URIs) == 0 {
		return "nobody"
	}
	return c.URIs[0].String()
}
