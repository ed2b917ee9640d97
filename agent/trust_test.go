package agent

import (
	"crypto/x509"
	"encoding/binary"
	"fmt"
	"maps"
	"math/big"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"troth.dev/troth/agent/workload"
	trothv1 "troth.dev/troth/api/troth/v1"
	"troth.dev/troth/ca"
	"troth.dev/troth/internal/place"
)

// sent is the bundle as the control plane sends it.
func sent(b ca.Bundle) *trothv1.Bundle {
	out := &trothv1.Bundle{TrustDomain: b.TrustDomain.Name(), Revision: b.Revision}
	for _, a := range b.Authorities {
		one := &trothv1.Authority{Id: a.ID, Certificate: a.Certificate.Raw}
		if !a.ReissueBy.IsZero() {
			one.ReissueFrom, one.ReissueBy = timestamppb.New(a.ReissueFrom), timestamppb.New(a.ReissueBy)
		}
		out.X509Authorities = append(out.X509Authorities, one)
	}
	return out
}

func trustOf(t *testing.T, b ca.Bundle) *trust {
	t.Helper()
	parsed, err := parseTrust(td, sent(b), time.Now())
	if err != nil {
		t.Fatal(err)
	}
	return parsed
}

// order is of an operator who knows better than the gates.
var order = ca.Order{Actor: "test", Reason: "test", Force: true}

// rotate prepares another authority, activates it, and returns both.
func rotate(t *testing.T, issuer *ca.Issuer) (old, next string) {
	t.Helper()
	set, _ := issuer.Authorities().Load()
	active, _ := set.Active()
	prepared, err := issuer.Prepare(t.Context(), order)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := issuer.Activate(t.Context(), prepared.ID, order); err != nil {
		t.Fatal(err)
	}
	return active.ID, prepared.ID
}

func TestParseTrustRefuses(t *testing.T) {
	issuer := newIssuer(t)
	rotate(t, issuer)
	bundle, _ := issuer.Bundle().Load()
	good := sent(bundle)
	if parsed, err := parseTrust(td, good, time.Now()); err != nil || parsed.revision != 3 || len(parsed.windows) != 2 {
		t.Fatalf("parseTrust() = %+v, %v, want revision 3 with two authorities", parsed, err)
	}
	var old int
	for n, a := range good.GetX509Authorities() {
		if a.GetReissueBy() != nil {
			old = n
		}
	}
	for name, test := range map[string]struct {
		change func(*trothv1.Bundle)
		want   string
	}{
		"another trust domain": {func(b *trothv1.Bundle) { b.TrustDomain = "example.com" }, `of trust domain "example.com"`},
		"none":                 {func(b *trothv1.Bundle) { b.X509Authorities = nil }, "with 0 authorities"},
		"too many": {func(b *trothv1.Bundle) {
			for range maxAuthorities {
				b.X509Authorities = append(b.X509Authorities, b.GetX509Authorities()[0])
			}
		}, "with 66 authorities"},
		"twice":       {func(b *trothv1.Bundle) { b.X509Authorities[1] = b.GetX509Authorities()[0] }, "is there twice"},
		"too large":   {func(b *trothv1.Bundle) { b.X509Authorities[0].Certificate = make([]byte, maxCertificate+1) }, "16385 bytes"},
		"no DER":      {func(b *trothv1.Bundle) { b.X509Authorities[0].Certificate = []byte("x") }, "malformed certificate"},
		"no id":       {func(b *trothv1.Bundle) { b.X509Authorities[0].Id = "" }, "no key identifier"},
		"another id":  {func(b *trothv1.Bundle) { b.X509Authorities[0].Id = "the first" }, "no key identifier"},
		"a long id":   {func(b *trothv1.Bundle) { b.X509Authorities[0].Id = strings.Repeat("ab", maxKeyIdentifier+1) }, "no key identifier"},
		"two of one":  {func(b *trothv1.Bundle) { b.X509Authorities[0].Id = b.GetX509Authorities()[1].GetId() }, "is there twice"},
		"half window": {func(b *trothv1.Bundle) { b.X509Authorities[old].ReissueBy = nil }, "half a reissue window"},
		"other half":  {func(b *trothv1.Bundle) { b.X509Authorities[old].ReissueFrom = nil }, "half a reissue window"},
		"no time":     {func(b *trothv1.Bundle) { b.X509Authorities[old].ReissueBy.Nanos = -1 }, "none of this world"},
		"backwards": {func(b *trothv1.Bundle) {
			a := b.GetX509Authorities()[old]
			a.ReissueFrom, a.ReissueBy = a.GetReissueBy(), a.GetReissueFrom()
		}, "ends before it begins"},
	} {
		t.Run(name, func(t *testing.T) {
			bad := proto.CloneOf(good)
			test.change(bad)
			if _, err := parseTrust(td, bad, time.Now()); err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("parseTrust() = %v, want %q", err, test.want)
			}
		})
	}
}

// Which bundle takes the place of another. Those that do not are refused, but for the
// one that is here already.
func TestSetTrust(t *testing.T) {
	issuer := newIssuer(t)
	rotate(t, issuer)
	bundle, _ := issuer.Bundle().Load()
	first := sent(bundle)
	for name, test := range map[string]struct {
		change func(*trothv1.Bundle)
		want   string // in the error
		taken  bool
	}{
		"newer":               {change: func(b *trothv1.Bundle) { b.Revision++ }, taken: true},
		"the same":            {change: func(*trothv1.Bundle) {}},
		"in another order":    {change: func(b *trothv1.Bundle) { slices.Reverse(b.GetX509Authorities()) }},
		"older":               {change: func(b *trothv1.Bundle) { b.Revision-- }, want: "is older than 3"},
		"without a revision":  {change: func(b *trothv1.Bundle) { b.Revision = 0 }, want: "is older than 3"},
		"with one less":       {change: func(b *trothv1.Bundle) { b.X509Authorities = b.GetX509Authorities()[1:] }, want: "with another content"},
		"with another window": {change: func(b *trothv1.Bundle) { shift(b, time.Second) }, want: "with another content"},
		"without a window": {change: func(b *trothv1.Bundle) {
			for _, a := range b.GetX509Authorities() {
				a.ReissueFrom, a.ReissueBy = nil, nil
			}
		}, want: "with another content"},
	} {
		t.Run(name, func(t *testing.T) {
			i := newIdentities(td)
			before, err := parseTrust(td, first, time.Now())
			if err == nil {
				err = i.setTrust(before)
			}
			if err != nil {
				t.Fatal(err)
			}
			next := proto.CloneOf(first)
			test.change(next)
			after, err := parseTrust(td, next, time.Now())
			if err != nil {
				t.Fatal(err)
			}
			err = i.setTrust(after)
			if (err == nil) != (test.want == "") || err != nil && !strings.Contains(err.Error(), test.want) {
				t.Errorf("setTrust() = %v, want %q", err, test.want)
			}
			if taken := i.newestTrust() == after; taken != test.taken {
				t.Errorf("it was taken: %t, want %t", taken, test.taken)
			}
		})
	}
}

func shift(b *trothv1.Bundle, by time.Duration) {
	for _, a := range b.GetX509Authorities() {
		if a.GetReissueBy() != nil {
			a.ReissueBy = timestamppb.New(a.GetReissueBy().AsTime().Add(by))
		}
	}
}

// When an SVID is due, rule by rule. Minutes are counted from when the bundle came.
func TestDueByTrust(t *testing.T) {
	since := time.Date(2026, 11, 25, 12, 0, 0, 0, time.UTC)
	at := func(minutes float64) time.Time { return since.Add(time.Duration(minutes * float64(time.Minute))) }
	trusts := func(windows map[string]window) *trust { return &trust{windows: windows, since: since} }
	const rushed = 0.5 * 3 / 60 // half of the rush, in minutes
	for _, test := range []struct {
		name    string
		trust   *trust
		refresh float64
		due     float64
		why     cause
	}{
		{"before the first bundle", nil, 30, 30, refresh},
		{"no window", trusts(map[string]window{"a": {}}), 30, 30, refresh},
		{"another authority's window", trusts(map[string]window{"a": {}, "b": {at(0), at(20)}}), 30, 30, refresh},
		{"in the middle of the window", trusts(map[string]window{"a": {at(0), at(20)}}), 30, 10, reissue},
		{"a window to come", trusts(map[string]window{"a": {at(10), at(20)}}), 30, 15, reissue},
		{"a window of no length", trusts(map[string]window{"a": {at(10), at(10)}}), 30, 10, reissue},
		{"never later than the refresh", trusts(map[string]window{"a": {at(0), at(100)}}), 30, 30, refresh},
		{"the moment has passed, the window has not", trusts(map[string]window{"a": {at(-20), at(10)}}), 30, rushed, reissue},
		{"the window has passed", trusts(map[string]window{"a": {at(-20), at(-10)}}), 30, rushed, reissue},
		{"the authority is gone", trusts(map[string]window{"b": {}}), 30, rushed, authorityGone},
		{"gone, but due before", trusts(map[string]window{"b": {}}), -1, -1, refresh},
		{"passed, but due before", trusts(map[string]window{"a": {at(-20), at(-10)}}), -1, -1, refresh},
	} {
		due, why := test.trust.due(plan{leaf: workload.Leaf{Authority: "a"}, fraction: 0.5, refresh: at(test.refresh)})
		if !due.Equal(at(test.due)) || why != test.why {
			t.Errorf("%s: due %v after the bundle, by %s; want %v, by %s",
				test.name, due.Sub(since), why, at(test.due).Sub(since), test.why)
		}
	}
}

// When an authority is replaced, no second has more than twice as many reissues as the
// mean of the window, whatever the size of the fleet, and whenever it happens: among
// the first SVIDs of a fleet that began at one moment, while those are being renewed,
// or generations later.
//
// That is from 5.5 in a second on, which is 10,000 SVIDs in half an hour. With fewer,
// what is counted in whole SVIDs cannot be as even, and replicas hand out places that
// know nothing of each other: one more for each.
func TestReissuesAreSpread(t *testing.T) {
	busiest := make(map[string]float64) // of the mean, for the log
	for seed, replicas := range []int{1, 1, 2, 3} {
		for _, count := range []int{500, 1_000, 3_000, 10_000, 60_000} {
			began := 4 * time.Second
			if seed == 1 {
				began = 37 * time.Minute // agents come one after the other
			}
			moments := []int{40, 45, 75, 150}
			if count == 60_000 { // the more there are, the less is left to chance
				if seed > 0 {
					continue
				}
				moments = moments[:2]
			}
			f := newFleet(count, replicas, began, uint64(seed))
			for _, minutes := range moments {
				at := time.Duration(minutes) * time.Minute
				f.renew(at)
				for _, seconds := range []int{300, 1800} {
					most := slices.Max(f.reissues(t, at, seconds))
					mean := float64(count) / float64(seconds)
					name := fmt.Sprintf("%d by %d replicas in %d s", count, replicas, seconds)
					busiest[name] = max(busiest[name], float64(most)/mean)
					allowed := 2 * mean
					if mean < 5.5 {
						allowed += float64(replicas)
					}
					if float64(most) > allowed {
						t.Errorf("%s, %v after the first: %d are reissued in one second, want at most %.1f, the mean is %.2f",
							name, at, most, allowed, mean)
					}
				}
			}
		}
	}
	for _, name := range slices.Sorted(maps.Keys(busiest)) {
		t.Logf("%s: at most %.2f times the mean", name, busiest[name])
	}
}

// A server that gives no places leaves it to chance, which puts three times the mean
// into some second.
func TestReissuesWithoutPlaces(t *testing.T) {
	f := newFleet(10_000, 0, 4*time.Second, 0)
	f.renew(5 * time.Minute)
	for _, seconds := range []int{300, 1800} {
		mean := 10_000 / float64(seconds)
		if most := slices.Max(f.reissues(t, 5*time.Minute, seconds)); float64(most) > 4*mean {
			t.Errorf("%d are reissued in one of %d seconds, the mean is %.1f", most, seconds, mean)
		}
	}
}

// fleet is the SVIDs of many agents, each with one for ten identities, which ask one
// of several replicas. The agents start in an order of their own, and what an agent
// needs then it asks for at once.
type fleet struct {
	replicas []*place.Sequence // none to give no places
	lots     *rand.Rand
	began    time.Time
	plans    []plan
	at       int     // the second up to which they were renewed
	due      [][]int // by the second since it began, for six hours
}

func newFleet(count, replicas int, starts time.Duration, seed uint64) *fleet {
	f := &fleet{
		lots:  rand.New(rand.NewPCG(seed, uint64(count))),
		began: time.Date(2026, 11, 25, 12, 0, 0, 0, time.UTC),
		plans: make([]plan, count), due: make([][]int, 6*3600),
	}
	for range replicas {
		f.replicas = append(f.replicas, place.New())
	}
	for _, agent := range f.lots.Perm(count / 10) {
		second := f.lots.IntN(int(starts.Seconds()))
		for n := range 10 {
			f.due[second] = append(f.due[second], agent*10+n)
		}
	}
	return f
}

// renew replaces what is due by refresh, until the time given since the fleet began.
func (f *fleet) renew(until time.Duration) {
	for ; f.at < int(until.Seconds()); f.at++ {
		now := f.began.Add(time.Duration(f.at) * time.Second)
		for _, n := range f.due[f.at] {
			var given *uint32
			if len(f.replicas) > 0 {
				given = new(f.replicas[n/10%len(f.replicas)].Next())
			}
			// As the server makes them: made at one time, and random in the rest.
			serial := binary.BigEndian.AppendUint64([]byte{1, 2, 3, 4}, f.lots.Uint64())
			serial = binary.BigEndian.AppendUint64(serial, f.lots.Uint64())
			f.plans[n] = newPlan(&x509svid.SVID{Certificates: []*x509.Certificate{
				{SerialNumber: new(big.Int).SetBytes(serial), NotAfter: now.Add(time.Hour)},
			}}, given, now)
			f.plans[n].leaf.Authority = "a"
			next := int(f.plans[n].refresh.Sub(f.began).Seconds())
			f.due[next] = append(f.due[next], n)
		}
	}
}

// reissues returns how many SVIDs are reissued in each second of a window that begins
// at the time given since the fleet began. All are replaced within it.
func (f *fleet) reissues(t *testing.T, at time.Duration, seconds int) []int {
	t.Helper()
	from := f.began.Add(at)
	to := &trust{since: from, windows: map[string]window{"a": {from, from.Add(time.Duration(seconds) * time.Second)}}}
	busy := make([]int, seconds)
	for n, p := range f.plans {
		due, why := to.due(p)
		if second := int(due.Sub(from) / time.Second); second < 0 || second >= seconds {
			t.Fatalf("SVID %d is due %v after the window begins, by %s", n, due.Sub(from), why)
		} else if why == reissue {
			busy[second]++
		}
	}
	return busy
}

// What is compared with the times of certificates is of the wall clock alone. The
// other one stands still while the machine sleeps.
func TestDueByTheWallClock(t *testing.T) {
	issuer := newIssuer(t)
	bundle, _ := issuer.Bundle().Load()
	to := trustOf(t, bundle)
	p := newPlan(issue(t, issuer, spiffeid.RequireFromPath(td, "/ns/shop/sa/web")), nil, time.Now())
	to.windows[p.leaf.Authority] = window{time.Now().Round(0).Add(-time.Hour), time.Now().Round(0)}
	due, why := to.due(p)
	if why != reissue {
		t.Fatalf("due by %s", why)
	}
	for name, at := range map[string]time.Time{"refresh": p.refresh, "since": to.since, "due": due} {
		if at != at.Round(0) {
			t.Errorf("%s, %v, has a reading of the monotonic clock", name, at)
		}
	}
	if wait := napUntil(time.Now().Add(time.Hour)); wait > 5*time.Second {
		t.Errorf("a wait of an hour lasts %v before the clock is looked at again", wait)
	}
}

// A replica that lags behind signs with the authority that is to be replaced. It is
// asked again, and not in a hot loop.
func TestLaggingReplica(t *testing.T) {
	issuer := newIssuer(t)
	i := newIdentities(td)
	p := podOf(1, "web")
	i.setPods("1", []pod{p})
	now := time.Now()
	lagging, old := issue(t, issuer, p.id), issue(t, issuer, p.id)
	rotate(t, issuer)
	bundle, _ := issuer.Bundle().Load()
	over := sent(bundle)
	for _, a := range over.GetX509Authorities() {
		if a.GetReissueBy() != nil { // the window has passed
			a.ReissueFrom, a.ReissueBy = timestamppb.New(now.Add(-2*time.Hour)), timestamppb.New(now.Add(-time.Hour))
		}
	}
	to, err := parseTrust(td, over, now)
	if err != nil {
		t.Fatal(err)
	}

	if why := i.put(old, nil, now); why != "" {
		t.Errorf("the first SVID replaced one, by %s", why)
	}
	if due, _ := i.due(now); len(due) != 0 {
		t.Fatal("a new SVID is due at once")
	}
	if err := i.setTrust(to); err != nil {
		t.Fatal(err)
	}
	if due, _ := i.due(now.Add(rush)); len(due) != 1 {
		t.Fatal("an SVID whose moment has passed is not due")
	}
	later := now.Add(rush)
	if why := i.put(lagging, nil, later); why != reissue {
		t.Errorf("it was replaced by %q, want %q", why, reissue)
	}
	if due, next := i.due(later.Add(4 * time.Second)); len(due) != 0 || next.Before(later.Add(5*time.Second)) {
		t.Errorf("%d are due, and the next after %v, want none within seconds", len(due), next.Sub(later))
	}
	if due, _ := i.due(later.Add(10 * time.Second)); len(due) != 1 {
		t.Error("what a lagging replica signed is not replaced")
	}
	i.put(issue(t, issuer, p.id), nil, later)
	if due, _ := i.due(later.Add(20 * time.Minute)); len(due) != 0 {
		t.Error("what the next authority signed is replaced")
	}

	// The pause is no reason to go beyond the ordinary refresh.
	soon := newPlan(old, nil, now)
	soon.refresh = later.Add(time.Second)
	if until := to.lag(soon, later); until.After(soon.refresh) {
		t.Errorf("the pause ends %v after the SVID's refresh", until.Sub(soon.refresh))
	}
}

// An SVID serves until its replacement is here, though its authority is gone and the
// replacement does not come.
func TestNothingIsDroppedBeforeItsReplacement(t *testing.T) {
	issuer := newIssuer(t)
	bundle, _ := issuer.Bundle().Load()
	i := newIdentities(td)
	p := podOf(1, "web")
	i.setPods("1", []pod{p})
	if err := i.setTrust(trustOf(t, bundle)); err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	first := issue(t, issuer, p.id)
	i.put(first, nil, now)
	old, _ := rotate(t, issuer)
	if _, err := issuer.Revoke(t.Context(), old, order); err != nil {
		t.Fatal(err)
	}
	bundle, _ = issuer.Bundle().Load()
	if err := i.setTrust(trustOf(t, bundle)); err != nil {
		t.Fatal(err)
	}
	value, release := i.Workload(p.UID)
	defer release()
	for n := range 5 {
		now = now.Add(time.Minute)
		if due, _ := i.due(now); len(due) != 1 {
			t.Fatalf("attempt %d: an SVID of an authority that is gone is not due", n)
		}
		i.failed(p.id, now, 0)
		if state, _ := value.Load(); state.Status != workload.StatusReady || state.Identities[0].SVID != first {
			t.Fatalf("attempt %d: the old SVID is not served", n)
		}
	}
	second := issue(t, issuer, p.id)
	if why := i.put(second, nil, now); why != authorityGone {
		t.Errorf("it was replaced by %q, want %q", why, authorityGone)
	}
	if state, _ := value.Load(); state.Identities[0].SVID != second {
		t.Error("the new SVID is not served")
	}
}

// What the agent holds is counted by the authority that signed it, its own SVIDs
// too, and each once.
func TestSummary(t *testing.T) {
	issuer := newIssuer(t)
	i := newIdentities(td)
	var pods []pod
	for n := range 4 {
		pods = append(pods, podOf(n, fmt.Sprintf("account-%d", n%2)))
	}
	i.setPods("1", pods)
	own := []workload.Leaf{{Authority: "a", Serial: "1"}, {Authority: "a", Serial: "2"}}
	count := func() map[string]int {
		counts := make(map[string]int)
		for _, leaf := range i.summary().leaves {
			counts[leaf.Authority]++
		}
		return counts
	}
	i.setOwn(own[0], true)
	i.setOwn(own[1], true)
	old := issue(t, issuer, pods[0].id)
	i.put(old, nil, time.Now())
	oldID, nextID := rotate(t, issuer)
	i.put(issue(t, issuer, pods[1].id), nil, time.Now())
	if got := count(); got["a"] != 2 || got[oldID] != 1 || got[nextID] != 1 {
		t.Errorf("counts = %v, want 2 of its own and one under each authority", got)
	}
	i.setOwn(own[0], false)
	i.put(issue(t, issuer, pods[0].id), nil, time.Now())
	if got := count(); got["a"] != 1 || got[oldID] != 0 || got[nextID] != 2 {
		t.Errorf("counts = %v, want one of its own and two under the next authority", got)
	}
}

// The place that the server gives is the SVID's, and without one it has its own.
func TestTakePlace(t *testing.T) {
	issuer := newIssuer(t)
	bundle, _ := issuer.Bundle().Load()
	i := newIdentities(td)
	p := podOf(1, "web")
	i.setPods("1", []pod{p})
	if err := i.setTrust(trustOf(t, bundle)); err != nil {
		t.Fatal(err)
	}
	svid := issue(t, issuer, p.id)
	for _, test := range []struct {
		place *uint32
		want  float64
	}{
		{new(uint32(0)), 0},
		{new(uint32(3 << 30)), 0.75},
		{nil, newPlan(svid, nil, time.Now()).fraction},
	} {
		i.held[p.id].svid = nil
		err := (&Agent{identities: i}).take(svid.PrivateKey, p, &trothv1.X509SVID{
			Certificates: [][]byte{svid.Certificates[0].Raw}, Place: test.place,
		})
		if got := i.held[p.id].plan.fraction; err != nil || got != test.want {
			t.Errorf("take() = %v, the fraction is %v, want %v", err, got, test.want)
		}
	}
}
