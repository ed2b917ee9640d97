package storagetest

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	gocmp "github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"troth.dev/troth/storage"
)

// TestLedger runs the contract of [storage.Ledger]. open returns a ledger in
// which nothing was recorded, and closes it when its test ends.
func TestLedger(t *testing.T, open func(t *testing.T) storage.Ledger) {
	tests := []struct {
		name string
		run  func(*testing.T, storage.Ledger)
	}{
		{"every selection", testSelections},
		{"order", testOrder},
		{"limit", testLimit},
		{"times", testTimes},
		{"texts", testTexts},
		{"nothing to record", testRecordNothing},
		{"what is refused", testRefused},
		{"duplicate serials", testDuplicates},
		{"racing duplicates", testRacingDuplicates},
		{"concurrent records", testConcurrentRecords},
		{"prune", testPrune},
		{"prune beside record", testPruneBesideRecord},
		{"ended context", testLedgerEndedContext},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) { test.run(t, open(t)) })
	}
}

// epoch is when the tests' certificates begin; whole in every resolution.
var epoch = time.Date(2031, 2, 3, 4, 5, 6, 0, time.UTC)

// issuance returns an issuance that differs from every other n in its serial
// number, and in nothing else.
func issuance(n int) storage.Issuance {
	return storage.Issuance{
		Serial:      fmt.Sprintf("%x", 0xa000_0000+n),
		ID:          spiffeid.RequireFromString("spiffe://example.org/ns/default/sa/web"),
		AuthorityID: "authority",
		NotBefore:   epoch,
		NotAfter:    epoch.Add(time.Hour),
		IssuedAt:    epoch.Add(10 * time.Second),
		Caller:      "spiffe://example.org/troth/agent/n/u/p/u",
		Node:        "node",
		PodUID:      "pod",
	}
}

// Every combination of fields to select by, each with values that are there,
// that are not, and that lie on and beside a boundary.
func testSelections(t *testing.T, l storage.Ledger) {
	var all []storage.Issuance
	for n := range 48 {
		i := issuance(n)
		i.ID = spiffeid.RequireFromPathf(i.ID.TrustDomain(), "/sa/%d", n%3)
		i.AuthorityID = strconv.Itoa(n % 2)
		i.NotBefore = epoch.Add(time.Duration(n%4) * time.Second)
		i.NotAfter = epoch.Add(time.Duration(4+n%5) * time.Second)
		i.IssuedAt = epoch.Add(time.Duration(n%6) * time.Millisecond)
		all = append(all, i)
	}
	record(t, l, all...)

	serials := []string{"", all[7].Serial, "0" + all[7].Serial, strings.ToUpper(all[7].Serial), all[7].Serial[1:], "nonsense"}
	ids := []spiffeid.ID{{}, all[1].ID, spiffeid.RequireFromString("spiffe://example.org/sa"), spiffeid.RequireFromString("spiffe://example.com/sa/1")}
	authorities := []string{"", "1", "2"}
	var validAts, issued []time.Time
	for _, d := range []time.Duration{0, time.Second, 1500 * time.Millisecond, 4 * time.Second, 4*time.Second + 1, 8 * time.Second, 8*time.Second + 1, 9 * time.Second} {
		validAts = append(validAts, epoch.Add(d))
	}
	for _, d := range []time.Duration{0, 2 * time.Millisecond, 2*time.Millisecond + 1, 5 * time.Millisecond, 6 * time.Millisecond} {
		issued = append(issued, epoch.Add(d))
	}
	validAts = append(validAts, time.Time{}, epoch.Add(-1))
	issued = append(issued, time.Time{}, epoch.Add(-1))

	// All pairs of times would be 2,000 queries per row of this loop: they rotate
	// through the combinations of the rest instead.
	turn := 0
	for _, serial := range serials {
		for _, id := range ids {
			for _, authority := range authorities {
				for range 4 {
					turn++
					checkQuery(t, l, all, storage.Query{
						Serial: serial, ID: id, AuthorityID: authority,
						ValidAt:     validAts[turn%len(validAts)],
						IssuedFrom:  issued[turn/3%len(issued)],
						IssuedUntil: issued[turn/5%len(issued)],
					})
				}
			}
		}
	}
	for _, at := range validAts {
		checkQuery(t, l, all, storage.Query{ValidAt: at})
	}
	for _, at := range issued {
		checkQuery(t, l, all, storage.Query{IssuedFrom: at})
		checkQuery(t, l, all, storage.Query{IssuedUntil: at})
	}
}

// As texts, and as blobs of different lengths, these serial numbers would be in
// another order than as numbers.
func testOrder(t *testing.T, l storage.Ledger) {
	var all []storage.Issuance
	for n, serial := range []string{"9", "10", "f", "ff", "100", "1", "fffffffffffffffffffffffffffffffffffffff0", "2", "ffffffffffffffffffffffffffffffff"} {
		i := issuance(n)
		i.Serial = serial
		i.IssuedAt = epoch.Add(time.Duration(n%2) * time.Millisecond)
		all = append(all, i)
	}
	record(t, l, all...)
	checkQuery(t, l, all, storage.Query{})
	checkQuery(t, l, all, storage.Query{ID: all[0].ID})
	checkQuery(t, l, all, storage.Query{AuthorityID: all[0].AuthorityID})
}

func testLimit(t *testing.T, l storage.Ledger) {
	var all []storage.Issuance
	for n := range storage.MaxQuery + 5 {
		i := issuance(n)
		i.IssuedAt = epoch.Add(time.Duration(n/2) * time.Millisecond)
		all = append(all, i)
	}
	for batch := range slices.Chunk(all, 250) {
		record(t, l, batch...)
	}
	for _, limit := range []int{0, 1, 2, 3, storage.MaxQuery - 1, storage.MaxQuery, storage.MaxQuery + 1, -1} {
		checkQuery(t, l, all, storage.Query{Limit: limit})
	}
}

func testTimes(t *testing.T, l storage.Ledger) {
	given := issuance(1)
	elsewhere := time.FixedZone("elsewhere", 5*3600)
	given.NotBefore = epoch.Add(999_999_999).In(elsewhere)
	given.NotAfter = epoch.Add(time.Hour + 1).In(elsewhere)
	given.IssuedAt = epoch.Add(123_999_999).In(elsewhere)
	want := given
	want.NotBefore = epoch
	want.NotAfter = epoch.Add(time.Hour)
	want.IssuedAt = epoch.Add(123 * time.Millisecond)
	record(t, l, given)

	found := query(t, l, storage.Query{})
	if d := diff([]storage.Issuance{want}, found); d != "" {
		t.Fatalf("Query() after Record (-want +got):\n%s", d)
	}
	for _, at := range []time.Time{found[0].NotBefore, found[0].NotAfter, found[0].IssuedAt} {
		if at.Location() != time.UTC {
			t.Errorf("Query() returned the time %s, want it in UTC", at)
		}
	}
}

func testTexts(t *testing.T, l storage.Ledger) {
	var all []storage.Issuance
	for n, text := range []string{"'; DROP TABLE issuance; --", "ключ 鍵 🔑", " ", "%_*?", strings.Repeat("x", 2048)} {
		i := issuance(n)
		i.AuthorityID, i.Caller, i.Node, i.PodUID = text, text, text, ""
		all = append(all, i)
	}
	record(t, l, all...)
	for _, i := range all {
		checkQuery(t, l, all, storage.Query{AuthorityID: i.AuthorityID})
	}
	checkQuery(t, l, all, storage.Query{})
}

func testRecordNothing(t *testing.T, l storage.Ledger) {
	if err := l.Record(t.Context()); err != nil {
		t.Errorf("Record() = %v, want nil", err)
	}
	if found := query(t, l, storage.Query{}); len(found) != 0 {
		t.Errorf("Query() = %v, want nothing", found)
	}
}

// Whatever Check refuses, Record refuses, and with it the whole call.
func testRefused(t *testing.T, l storage.Ledger) {
	bad := issuance(1)
	bad.Serial = "00ff"
	for _, call := range [][]storage.Issuance{{bad}, {issuance(2), bad}, {bad, issuance(2)}, {{}}} {
		err := l.Record(t.Context(), call...)
		if err == nil || errors.Is(err, storage.ErrDuplicateSerial) {
			t.Errorf("Record(an issuance that Check refuses) = %v, want Check's error", err)
		}
	}
	if found := query(t, l, storage.Query{}); len(found) != 0 {
		t.Errorf("Query() = %v, want nothing", found)
	}
}

func testDuplicates(t *testing.T, l storage.Ledger) {
	var all []storage.Issuance
	for n := range 10 {
		all = append(all, issuance(n))
	}
	record(t, l, all[0], all[1], all[2])
	for _, call := range [][]storage.Issuance{
		{all[0]},
		{all[3], all[1]},
		{all[1], all[3]},
		{all[3], all[4], all[3]},
		{all[3], all[3]},
	} {
		if err := l.Record(t.Context(), call...); !errors.Is(err, storage.ErrDuplicateSerial) {
			t.Errorf("Record with a duplicate = %v, want ErrDuplicateSerial", err)
		}
		checkQuery(t, l, all[:3], storage.Query{})
	}
	// A row that differs in all but the serial number is a duplicate too.
	other := storage.Issuance{
		Serial: all[0].Serial, ID: spiffeid.RequireFromString("spiffe://example.com/other"), AuthorityID: "other",
		NotBefore: epoch.Add(time.Hour), NotAfter: epoch.Add(2 * time.Hour), IssuedAt: epoch.Add(time.Hour), Caller: "other",
	}
	if err := l.Record(t.Context(), other); !errors.Is(err, storage.ErrDuplicateSerial) {
		t.Errorf("Record(the same serial for another ID) = %v, want ErrDuplicateSerial", err)
	}
	record(t, l, all[3:]...) // what shared a failed call was not recorded
	checkQuery(t, l, all, storage.Query{})
}

// All calls claim one serial number, and one of them gets it. Each brings one of
// its own too: those of the losers must not be there. Calls beside them, which a
// store may put into the same transaction, must not notice.
func testRacingDuplicates(t *testing.T, l storage.Ledger) {
	const rounds, racers = 4, 8
	var want []storage.Issuance
	for round := range rounds {
		contested := issuance(1000 * round)
		won := make(chan storage.Issuance, racers)
		var all sync.WaitGroup
		start := make(chan struct{})
		for n := range racers {
			own, bystander := issuance(1000*round+100+n), issuance(1000*round+200+n)
			want = append(want, bystander)
			all.Go(func() {
				<-start
				err := l.Record(t.Context(), own, contested)
				switch {
				case err == nil:
					won <- own
				case !errors.Is(err, storage.ErrDuplicateSerial):
					t.Errorf("Record(a contested serial) = %v, want nil or ErrDuplicateSerial", err)
				}
			})
			all.Go(func() {
				<-start
				if err := l.Record(t.Context(), bystander); err != nil {
					t.Errorf("Record beside a duplicate = %v, want nil", err)
				}
			})
		}
		close(start)
		all.Wait()
		if len(won) != 1 {
			t.Fatalf("%d of %d calls recorded the same serial, want 1", len(won), racers)
		}
		want = append(want, contested, <-won)
	}
	checkQuery(t, l, want, storage.Query{})
}

func testConcurrentRecords(t *testing.T, l storage.Ledger) {
	const writers, calls = 16, 10
	var all []storage.Issuance
	var running sync.WaitGroup
	for w := range writers {
		var own []storage.Issuance
		for c := range calls {
			i := issuance(w*calls + c)
			i.IssuedAt = i.IssuedAt.Add(time.Duration(c) * time.Millisecond)
			own = append(own, i)
		}
		all = append(all, own...)
		running.Go(func() {
			for n, i := range own {
				if err := l.Record(t.Context(), i); err != nil {
					t.Errorf("Record = %v", err)
					return
				}
				// Whoever was answered finds the row.
				found, err := l.Query(t.Context(), storage.Query{Serial: i.Serial})
				if err != nil || len(found) != 1 {
					t.Errorf("Query(call %d after Record had returned) = %d rows, %v, want 1", n, len(found), err)
					return
				}
			}
		})
	}
	running.Wait()
	checkQuery(t, l, all, storage.Query{})
}

func testPrune(t *testing.T, l storage.Ledger) {
	if n, err := l.Prune(t.Context(), epoch); n != 0 || err != nil {
		t.Fatalf("Prune(an empty ledger) = %d, %v, want 0, nil", n, err)
	}
	var all []storage.Issuance
	for n := range 900 { // several steps of any store that prunes in steps
		i := issuance(n)
		i.IssuedAt, i.NotAfter = epoch, epoch.Add(time.Duration(n%3)*time.Hour)
		all = append(all, i)
	}
	for batch := range slices.Chunk(all, 300) {
		record(t, l, batch...)
	}
	for _, step := range []struct {
		before time.Time
		pruned int
	}{
		{time.Time{}, 0},
		{epoch, 0}, // valid up to that very time
		{epoch.Add(1), 300},
		{epoch.Add(1), 0},
		{epoch.Add(time.Hour), 0},
		{epoch.Add(time.Hour + time.Second), 300},
		{epoch.Add(48 * time.Hour), 300},
	} {
		n, err := l.Prune(t.Context(), step.before)
		if n != step.pruned || err != nil {
			t.Fatalf("Prune(%s) = %d, %v, want %d, nil", step.before, n, err, step.pruned)
		}
		all = slices.DeleteFunc(all, func(i storage.Issuance) bool { return i.NotAfter.Before(step.before) })
		checkQuery(t, l, all, storage.Query{})
	}
	record(t, l, issuance(0)) // a pruned serial number is forgotten
}

// Prune counts each row once, and takes none that is still valid, while both
// kinds are being recorded.
func testPruneBesideRecord(t *testing.T, l storage.Ledger) {
	const writers, calls = 4, 25
	now := epoch.Add(time.Minute)
	var live []storage.Issuance
	var recording, pruning sync.WaitGroup
	for w := range writers {
		var own []storage.Issuance
		for c := range calls {
			expired, valid := issuance(2*(w*calls+c)), issuance(2*(w*calls+c)+1)
			expired.NotAfter = now.Add(-time.Second)
			live = append(live, valid)
			own = append(own, expired, valid)
		}
		recording.Go(func() {
			for pair := range slices.Chunk(own, 2) {
				if err := l.Record(t.Context(), pair...); err != nil {
					t.Errorf("Record beside Prune = %v", err)
				}
			}
		})
	}
	recorded := make(chan struct{})
	pruned := make([]int, 2)
	for p := range pruned {
		pruning.Go(func() {
			for last := false; !last; {
				select {
				case <-recorded:
					last = true
				default:
				}
				n, err := l.Prune(t.Context(), now)
				if err != nil {
					t.Errorf("Prune beside Record = %v", err)
					return
				}
				pruned[p] += n
			}
		})
	}
	recording.Wait()
	close(recorded)
	pruning.Wait()
	if sum := pruned[0] + pruned[1]; sum != writers*calls {
		t.Errorf("two Prunes counted %d rows together, want each of %d once", sum, writers*calls)
	}
	checkQuery(t, l, live, storage.Query{})
}

func testLedgerEndedContext(t *testing.T, l storage.Ledger) {
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	for n := range 20 { // as often as a choice at random takes to go wrong
		if err := l.Record(ended, issuance(n)); !errors.Is(err, context.Canceled) {
			t.Errorf("Record(ended context) = %v, want context.Canceled", err)
		}
	}
	record(t, l, issuance(100))
	checkQuery(t, l, []storage.Issuance{issuance(100)}, storage.Query{})
	if _, err := l.Query(ended, storage.Query{}); !errors.Is(err, context.Canceled) {
		t.Errorf("Query(ended context) = %v, want context.Canceled", err)
	}
	if _, err := l.Prune(ended, epoch); !errors.Is(err, context.Canceled) {
		t.Errorf("Prune(ended context) = %v, want context.Canceled", err)
	}
}

func record(t *testing.T, l storage.Ledger, issuances ...storage.Issuance) {
	t.Helper()
	if err := l.Record(t.Context(), issuances...); err != nil {
		t.Fatalf("Record(%d issuances) = %v", len(issuances), err)
	}
}

func query(t *testing.T, l storage.Ledger, q storage.Query) []storage.Issuance {
	t.Helper()
	found, err := l.Query(t.Context(), q)
	if err != nil {
		t.Fatalf("Query(%+v) = %v", q, err)
	}
	return found
}

// checkQuery compares what the ledger finds with what is right if exactly all
// were recorded.
func checkQuery(t *testing.T, l storage.Ledger, all []storage.Issuance, q storage.Query) {
	t.Helper()
	var want []storage.Issuance
	for _, i := range all {
		if selected(q, i) {
			want = append(want, i)
		}
	}
	slices.SortFunc(want, func(a, b storage.Issuance) int {
		return cmp.Or(b.IssuedAt.Compare(a.IssuedAt), bySerial(a.Serial, b.Serial))
	})
	limit := storage.MaxQuery
	if q.Limit > 0 && q.Limit < limit {
		limit = q.Limit
	}
	want = want[:min(limit, len(want))]
	if d := diff(want, query(t, l, q)); d != "" {
		t.Fatalf("Query(%+v) (-want +got):\n%s", q, d)
	}
}

func diff(want, got []storage.Issuance) string {
	return gocmp.Diff(want, got, cmpopts.EquateComparable(spiffeid.ID{}), cmpopts.EquateEmpty())
}

// selected says the contract of storage.Query in a second way: each condition
// that would exclude i.
func selected(q storage.Query, i storage.Issuance) bool {
	switch {
	case q.Serial != "" && q.Serial != i.Serial,
		q.ID != spiffeid.ID{} && q.ID != i.ID,
		q.AuthorityID != "" && q.AuthorityID != i.AuthorityID,
		!q.ValidAt.IsZero() && i.NotBefore.After(q.ValidAt),
		!q.ValidAt.IsZero() && i.NotAfter.Before(q.ValidAt),
		!q.IssuedFrom.IsZero() && i.IssuedAt.Before(q.IssuedFrom),
		!q.IssuedUntil.IsZero() && i.IssuedAt.Compare(q.IssuedUntil) >= 0:
		return false
	}
	return true
}

// bySerial orders serial numbers as numbers.
func bySerial(a, b string) int {
	const digits = 40
	pad := func(s string) string { return strings.Repeat("0", digits-len(s)) + s }
	return cmp.Compare(pad(a), pad(b))
}
