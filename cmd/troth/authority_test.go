package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/protoadapt"
	"google.golang.org/protobuf/types/known/timestamppb"

	trothv1 "troth.dev/troth/api/troth/v1"
	"troth.dev/troth/ca"
)

// known is the moment that the statuses of these tests are as of.
var known = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

const (
	prepared = trothv1.AuthorityState_AUTHORITY_STATE_PREPARED
	active   = trothv1.AuthorityState_AUTHORITY_STATE_ACTIVE
	old      = trothv1.AuthorityState_AUTHORITY_STATE_OLD
	tainted  = trothv1.AuthorityState_AUTHORITY_STATE_TAINTED
	revoked  = trothv1.AuthorityState_AUTHORITY_STATE_REVOKED
)

// idOf is the whole ID of the authority called by one digit.
func idOf(digit string) string { return strings.Repeat(digit, 40) }

func record(digit string, state trothv1.AuthorityState, obstacles ...ca.Obstacle) *trothv1.AuthorityRecord {
	a := &trothv1.AuthorityRecord{Id: idOf(digit), State: state}
	for _, o := range obstacles {
		if a.Blocked == nil {
			a.Blocked = &trothv1.Blocked{Operation: nextOperation(a), AuthorityId: a.GetId(), Forcible: true}
		}
		a.Blocked.Blockers = append(a.Blocked.Blockers, &trothv1.Blocker{Obstacle: string(o), Detail: "detail of " + string(o)})
	}
	return a
}

func statusOf(records ...*trothv1.AuthorityRecord) *trothv1.AuthorityStatus {
	return &trothv1.AuthorityStatus{
		TrustDomain: "example.org", Revision: 7, Authorities: records,
		Propagation: &trothv1.AuthorityPropagation{KnownAt: timestamppb.New(known)},
	}
}

func waiting(n int) []*trothv1.WaitingAgent {
	all := []*trothv1.WaitingAgent{
		{Node: "node-17", Lacks: "offline", Since: timestamppb.New(known.Add(-3*time.Minute - time.Second))},
		{Node: "node-88", Lacks: "at revision 41"},
	}
	for len(all) < n {
		all = append(all, &trothv1.WaitingAgent{Node: fmt.Sprintf("node-%d", 100+len(all)), Lacks: "offline", Since: timestamppb.New(known.Add(time.Minute))})
	}
	return all[:n]
}

func TestProvedText(t *testing.T) {
	at := timestamppb.New(known)
	for _, test := range []struct {
		what string
		p    *trothv1.AuthorityPropagation
		want string
	}{
		{"nothing known", &trothv1.AuthorityPropagation{}, "nothing is known of the agents yet"},
		{"nobody", &trothv1.AuthorityPropagation{KnownAt: at}, "no agent is expected"},
		{"another authority", &trothv1.AuthorityPropagation{KnownAt: at, Expected: 2000, Proved: 2000, AuthorityId: idOf("b")},
			"proved 0/2,000: nothing is known of it yet"},
		{"some", &trothv1.AuthorityPropagation{KnownAt: at, Expected: 2000, Proved: 1998, AuthorityId: idOf("a"), Waiting: waiting(2)},
			"proved 1,998/2,000 (99.90%), waiting: node-17 offline 3m, node-88 at revision 41"},
		{"more than are named", &trothv1.AuthorityPropagation{KnownAt: at, Expected: 12_345_678, Proved: 0, AuthorityId: idOf("a"), Waiting: waiting(20)},
			"proved 0/12,345,678 (0.00%), waiting: node-17 offline 3m, node-88 at revision 41, node-102 offline 0s and 12,345,675 more"},
		{"almost all is not all", &trothv1.AuthorityPropagation{KnownAt: at, Expected: 100_000, Proved: 99_999, AuthorityId: idOf("a")},
			"proved 99,999/100,000 (99.99%)"},
		{"all", &trothv1.AuthorityPropagation{KnownAt: at, Expected: 3, Proved: 3, AuthorityId: idOf("a"), Waiting: waiting(1)}, "proved 3/3 (100.00%)"},
		{"a hostile name", &trothv1.AuthorityPropagation{KnownAt: at, Expected: 1, AuthorityId: idOf("a"), Waiting: []*trothv1.WaitingAgent{{Node: "\x1b[2J", Lacks: "x"}}},
			`proved 0/1 (0.00%), waiting: "\x1b[2J x"`},
	} {
		if got := provedText(test.p, idOf("a"), known, 3); got != test.want {
			t.Errorf("%s: %q, want %q", test.what, got, test.want)
		}
	}
}

func TestBegin(t *testing.T) {
	pending := record("a", active)
	pending.TaintPending = true
	for _, test := range []struct {
		what          string
		s             *trothv1.AuthorityStatus
		rotate, taint string // the operation and what it is done to
		target        string
	}{
		{"at rest", statusOf(record("a", active)), "prepare", "taint a", "a"},
		{"once revoked", statusOf(record("a", revoked), record("b", active)), "prepare", "taint b", "b"},
		{"prepared", statusOf(record("a", active), record("b", prepared)), "prepare", "taint a", "b"},
		{"taint pending", statusOf(pending, record("b", prepared)), "prepare", "", "b"},
		{"activated", statusOf(record("a", old), record("b", active)), "", "taint b", "b"},
		{"tainted", statusOf(record("a", tainted), record("b", active)), "", "", "b"},
		{"both", statusOf(record("a", old), record("b", active), record("c", prepared)), "prepare", "taint b", "c"},
		{"none active", statusOf(record("a", old)), "prepare", "prepare", ""},
	} {
		for _, mode := range []struct {
			taint bool
			want  string
		}{{false, test.rotate}, {true, test.taint}} {
			operation, id := begin(test.s, mode.taint)
			if got := strings.TrimSpace(operation + " " + id[:min(1, len(id))]); got != mode.want {
				t.Errorf("%s: begin(taint %v) = %q, want %q", test.what, mode.taint, got, mode.want)
			}
		}
		if got := target(test.s); got != strings.Repeat(test.target, 40) {
			t.Errorf("%s: target = %q, want %q", test.what, got, test.target)
		}
	}
	several := statusOf(record("a", active), record("b", prepared), record("c", prepared))
	several.Propagation.AuthorityId = idOf("b")
	if got := target(several); got != idOf("b") {
		t.Errorf("target of several = %q, want the one that agents prove", got)
	}
}

func TestNext(t *testing.T) {
	for _, test := range []struct {
		what string
		s    *trothv1.AuthorityStatus
		want string
	}{
		{"not proved", statusOf(record("a", active), record("b", prepared, ca.AgentsMissing)), "wait to activate b"},
		{"proved", statusOf(record("a", active), record("b", prepared)), "activate b"},
		{"an old one waits", statusOf(record("a", old, ca.SVIDsLive), record("b", active)), "wait to revoke a"},
		{"an old one may go", statusOf(record("a", old), record("b", active)), "revoke a"},
		{"the second may go", statusOf(record("a", old, ca.SVIDsLive), record("c", tainted), record("b", active)), "revoke c, 1 behind"},
		{"three wait", statusOf(record("a", old, ca.SVIDsLive), record("c", old, ca.SVIDsLive), record("d", old, ca.SVIDsLive), record("b", active)),
			"wait to revoke a, 2 behind"},
		{"the end", statusOf(record("a", revoked), record("b", active)), "done"},
		{"aborted", statusOf(record("a", active), record("b", revoked)), "error: bbbbbbbbbbbb was dropped under way: start again to go on from there"},
		{"replaced", statusOf(record("b", old), record("c", active)), "error: bbbbbbbbbbbb was replaced under way: start again to go on from there"},
		{"forgotten", statusOf(record("a", active)), "error: bbbbbbbbbbbb is gone, or in a state that this troth does not know"},
	} {
		s, err := next(test.s, idOf("b"))
		got := s.do + " " + s.id[:min(1, len(s.id))]
		switch {
		case err != nil:
			got = "error: " + err.Error()
		case s.done():
			got = "done"
		case s.waits != nil:
			got = "wait to " + got
		}
		if s.behind > 0 {
			got += fmt.Sprintf(", %d behind", s.behind)
		}
		if got != test.want {
			t.Errorf("%s: %q, want %q", test.what, got, test.want)
		}
	}
}

func TestProgressOf(t *testing.T) {
	proving := statusOf(record("a", active), record("b", prepared, ca.AgentsMissing))
	proving.Propagation = &trothv1.AuthorityPropagation{KnownAt: timestamppb.New(known), Expected: 4, Proved: 2, AuthorityId: idOf("b"), Waiting: waiting(2)}
	blind := statusOf(record("a", active), record("b", prepared, ca.EvidenceMissing))
	held := statusOf(record("a", old, ca.SVIDsLive, ca.HeldByAgents), record("b", active))
	held.Authorities[0].Svids, held.Authorities[0].Connections = 1204, 1
	held.Authorities[0].Blocked.Blockers[0].Detail = "SVIDs live until 2026-03-01T12:00:00Z"
	for _, test := range []struct {
		what      string
		s         *trothv1.AuthorityStatus
		text, key string
	}{
		{"agents", proving, "proved 2/4 (50.00%), waiting: node-17 offline 3m, node-88 at revision 41",
			"proved 2/4 (50.00%), waiting: node-17 offline, node-88 at revision 41"},
		{"no evidence", blind, "no agent is expected; detail of EVIDENCE_MISSING", "no agent is expected; detail of EVIDENCE_MISSING"},
		{"reissue", held, "1,204 SVIDs and 1 connection left under aaaaaaaaaaaa; SVIDs live until 2026-03-01T12:00:00Z",
			"1,204 SVIDs and 1 connection left under aaaaaaaaaaaa; SVIDs live until "},
		{"to be done", statusOf(record("b", prepared)), "activate bbbbbbbbbbbb", "activate bbbbbbbbbbbb"},
	} {
		now, err := next(test.s, idOf("b"))
		if err != nil {
			t.Fatal(err)
		}
		if got, want := progressOf(test.s, now), (progress{test.text, test.key}); got != want {
			t.Errorf("%s:\n%+v, want\n%+v", test.what, got, want)
		}
	}
}

func TestChangesBetween(t *testing.T) {
	pending := record("a", active)
	pending.TaintPending = true
	pending.LastChange = &trothv1.AuthorityChange{Actor: "uid:7"}
	gone := record("a", tainted)
	gone.ReissueBy = timestamppb.New(known)
	gone.LastChange = &trothv1.AuthorityChange{Actor: "schedule"}
	for _, test := range []struct {
		what          string
		before, after *trothv1.AuthorityStatus
		want          []string
	}{
		{"nothing", statusOf(record("a", active)), statusOf(record("a", active)), nil},
		{"tainted, to be", statusOf(record("a", active)), statusOf(pending, record("b", prepared)),
			[]string{"aaaaaaaaaaaa is to be tainted as soon as its successor is active (uid:7)",
				"bbbbbbbbbbbb is prepared, and signs nothing until every agent trusts it"}},
		{"activated", statusOf(pending, record("b", prepared)), statusOf(gone, record("b", active)),
			[]string{"aaaaaaaaaaaa is tainted, and what it signed is replaced by 2026-03-01T12:00:00Z (schedule)",
				"bbbbbbbbbbbb is active, and signs from now on"}},
		{"revoked", statusOf(gone, record("b", active)), statusOf(record("a", revoked), record("b", active)),
			[]string{"aaaaaaaaaaaa is revoked, and nobody trusts it any more"}},
	} {
		if diff := cmp.Diff(test.want, changesBetween(test.before, test.after)); diff != "" {
			t.Errorf("%s (- want, + got):\n%s", test.what, diff)
		}
	}
}

func TestStands(t *testing.T) {
	proving := statusOf(record("a", active), record("b", prepared, ca.AgentsMissing))
	pending := statusOf(record("a", active), record("b", prepared, ca.AgentsMissing))
	pending.Authorities[0].TaintPending = true
	for _, test := range []struct {
		s    *trothv1.AuthorityStatus
		want string
	}{
		{proving, "bbbbbbbbbbbb is prepared, and signs nothing: no agent is expected. To go on: troth authority rotate; to drop it: troth authority abort bbbbbbbbbbbb"},
		{pending, "bbbbbbbbbbbb is prepared: no agent is expected. The server goes on by itself; to watch: troth authority rotate --taint"},
		{statusOf(record("a", old, ca.HeldByAgents), record("b", active)),
			"bbbbbbbbbbbb signs; 0 SVIDs and 0 connections left under aaaaaaaaaaaa. The server goes on by itself; to watch: troth authority rotate"},
		{statusOf(record("b", active)), "bbbbbbbbbbbb signs, and what was before it is revoked"},
	} {
		if got := standsText(test.s, idOf("b")); got != test.want {
			t.Errorf("%q, want\n%q", got, test.want)
		}
	}
}

// TestAdvice: there is a sentence for every obstacle that package ca knows, and a
// heading to read on at.
func TestAdvice(t *testing.T) {
	page, err := os.ReadFile(filepath.Join("..", "..", filepath.FromSlash(rotationPage)))
	if err != nil {
		t.Fatal(err)
	}
	unknown := advice("activate", "NO_SUCH_OBSTACLE")
	if link := adviceLink("NO_SUCH_OBSTACLE"); link != rotationPage {
		t.Errorf("link of an unknown obstacle = %q", link)
	}
	for _, obstacle := range []ca.Obstacle{
		ca.WrongState, ca.LifeTooShort, ca.UpstreamUnchanged, ca.EvidenceMissing, ca.AgentsMissing,
		ca.BundleUnpublished, ca.ReplicasMaySign, ca.SVIDsLive, ca.HeldByAgents, ca.HeldElsewhere,
	} {
		for _, operation := range []string{"activate", "revoke"} {
			if got := advice(operation, string(obstacle)); got == unknown || strings.Contains(got, "\n") || !strings.HasSuffix(got, ".") {
				t.Errorf("advice(%q, %q) = %q", operation, obstacle, got)
			}
		}
		if !bytes.Contains(page, []byte("\n### "+string(obstacle)+"\n")) {
			t.Errorf("%s has no heading %s, which %s is the link to", rotationPage, obstacle, adviceLink(string(obstacle)))
		}
		if want := rotationPage + "#" + strings.ToLower(string(obstacle)); adviceLink(string(obstacle)) != want {
			t.Errorf("link of %s = %q, want %q", obstacle, adviceLink(string(obstacle)), want)
		}
		if want := obstacle != ca.WrongState && obstacle != ca.LifeTooShort; passes(record("a", old, obstacle).GetBlocked()) != want {
			t.Errorf("%s passes: %v, want %v", obstacle, !want, want)
		}
	}
}

func TestFind(t *testing.T) {
	s := statusOf(
		&trothv1.AuthorityRecord{Id: "abcd1" + strings.Repeat("0", 35)},
		&trothv1.AuthorityRecord{Id: "abcd2" + strings.Repeat("0", 35)})
	for _, test := range []struct{ text, want, problem string }{
		{"abcd1", "abcd1" + strings.Repeat("0", 35), ""},
		{"ABCD2000", "abcd2" + strings.Repeat("0", 35), ""},
		{idOf("f"), idOf("f"), ""}, // for the server to know
		{"abcd", "", `"abcd" may be one of several authorities: abcd1`},
		{"abcd3", "", `there is no authority "abcd3"`},
		{"abc", "", `"abc" is not the ID of an authority: 40 hexadecimal digits, or at least the first 4`},
		{"", "", `"" is not the ID`},
		{"wxyz", "", `"wxyz" is not the ID`},
		{idOf("f") + "0", "", "is not the ID"},
	} {
		got, err := find(s, test.text)
		switch {
		case test.problem == "" && (err != nil || got != test.want):
			t.Errorf("find(%q) = %q, %v, want %q", test.text, got, err, test.want)
		case test.problem != "" && (err == nil || !strings.Contains(err.Error(), test.problem) || exitCode(err) != 2):
			t.Errorf("find(%q) = %v, want %q and exit code 2", test.text, err, test.problem)
		}
	}
}

// refusal is an error as the server sends it.
func refusal(t *testing.T, code codes.Code, message string, details ...protoadapt.MessageV1) error {
	t.Helper()
	st, err := status.New(code, message).WithDetails(details...)
	if err != nil {
		t.Fatal(err)
	}
	return st.Err()
}

func TestCallError(t *testing.T) {
	blocked := record("b", prepared, ca.AgentsMissing).GetBlocked()
	blocked.Waiting = waiting(2)
	timed := record("a", old, ca.ReplicasMaySign).GetBlocked()
	timed.Blockers[0].Until = timestamppb.New(known)
	timed.Forcible = false
	for _, test := range []struct {
		what string
		err  error
		code int
		want string
	}{
		{"blocked", refusal(t, codes.FailedPrecondition, "m", &errdetails.ErrorInfo{Reason: "AGENTS_MISSING"}, blocked), 3,
			`activate bbbbbbbbbbbb: something is in the way
  AGENTS_MISSING: detail of AGENTS_MISSING
    Bring back the agents that are waited for, or delete the nodes that are gone: an agent proves it by itself within seconds. (docs/rotate-a-root.md#agents_missing)
  waiting for: node-17 offline, node-88 at revision 41
  troth authority activate bbbbbbbbbbbb --force --reason WHY does it all the same: workloads refuse what it signs wherever agents do not trust it yet`},
		{"blocked for a time", refusal(t, codes.FailedPrecondition, "m", timed), 3,
			`revoke aaaaaaaaaaaa: something is in the way
  REPLICAS_MAY_SIGN: detail of REPLICAS_MAY_SIGN
    gone by 2026-03-01T12:00:00Z, by waiting alone
    Wait: a replica that was stopped may still sign with it until then. (docs/rotate-a-root.md#replicas_may_sign)`},
		{"refused with no more", refusal(t, codes.FailedPrecondition, "the upstream has issued no other", &errdetails.ErrorInfo{Reason: "UPSTREAM_UNCHANGED"}), 3,
			"prepare: UPSTREAM_UNCHANGED: the upstream has issued no other"},
		{"a wrong order", refusal(t, codes.InvalidArgument, "no line", &errdetails.ErrorInfo{Reason: "ORDER_INVALID"}), 2, "prepare: ORDER_INVALID: no line"},
		{"unknown", refusal(t, codes.NotFound, "none", &errdetails.ErrorInfo{Reason: "UNKNOWN_AUTHORITY"}), 2, "prepare: UNKNOWN_AUTHORITY: none"},
		{"forbidden", refusal(t, codes.PermissionDenied, "no right", &errdetails.ErrorInfo{Reason: "OPERATOR_FORBIDDEN"}), 1, "prepare: OPERATOR_FORBIDDEN: no right"},
		{"the store", refusal(t, codes.Unavailable, "gone"), 1, "prepare: gone"},
		{"a hostile message", refusal(t, codes.Internal, "\x1b]0;x\a"), 1, `prepare: "\x1b]0;x\a"`},
	} {
		err := callError("prepare", test.err)
		if err.Error() != test.want || exitCode(err) != test.code || hasTold(err) {
			t.Errorf("%s: exit code %d, %v, want %d\n%s", test.what, exitCode(err), err, test.code, test.want)
		}
		if !errors.Is(err, test.err) {
			t.Errorf("%s: the status is not in the error", test.what)
		}
	}
}

func TestStatusText(t *testing.T) {
	proving := statusOf(record("a", active), record("b", prepared, ca.AgentsMissing), record("c", old), record("d", revoked))
	proving.Propagation = &trothv1.AuthorityPropagation{
		KnownAt: timestamppb.New(known), Expected: 2000, Received: 1999, Applied: 1998, Proved: 1998, Reporting: 7,
		Revision: 6, AuthorityId: idOf("b"), Waiting: waiting(2),
	}
	proving.Authorities[0].TaintPending = true
	proving.Authorities[0].Svids, proving.Authorities[0].Connections = 10_000, 7
	for n, a := range proving.GetAuthorities()[1:] {
		a.LastChange = &trothv1.AuthorityChange{
			At: timestamppb.New(known.Add(-time.Hour * time.Duration(20*n))), Actor: "uid:0", Reason: "key seen\n", Forced: n == 1,
		}
	}
	proving.Overdue = proving.Authorities[1].GetBlocked()
	var got bytes.Buffer
	newPrinter(&got).status(proving)
	const want = `trust domain example.org, revision 7

ID            STATE     AGE  EXPIRES  SVIDS   CONNECTIONS  CHANGED BY  WHY
aaaaaaaaaaaa  active    ?    ?        10,000  7
bbbbbbbbbbbb  prepared  0s   ?        0       0            uid:0       "key seen\n"
cccccccccccc  old       20h  ?        0       0            uid:0       "FORCED: key seen\n"
dddddddddddd  revoked   40h  ?        0       0            uid:0       "key seen\n"

Agents
2,000 agents expected, as of 2026-03-01T12:00:00Z: revision 6 is received by 1,999 and in use by 1,998; all that they hold is known of 7
bbbbbbbbbbbb: proved 1,998/2,000 (99.90%), waiting: node-17 offline 3m, node-88 at revision 41

Next
aaaaaaaaaaaa is tainted as soon as its successor is active
activate bbbbbbbbbbbb: blocked
  AGENTS_MISSING: detail of AGENTS_MISSING
    Bring back the agents that are waited for, or delete the nodes that are gone: an agent proves it by itself within seconds. (docs/rotate-a-root.md#agents_missing)
revoke cccccccccccc: nothing is in the way: troth authority revoke cccccccccccc

Overdue
activate bbbbbbbbbbbb should have been done by now, and is blocked
  AGENTS_MISSING: detail of AGENTS_MISSING
    Bring back the agents that are waited for, or delete the nodes that are gone: an agent proves it by itself within seconds. (docs/rotate-a-root.md#agents_missing)
`
	if diff := cmp.Diff(want, got.String()); diff != "" {
		t.Errorf("status (- want, + got):\n%s", diff)
	}
}

func TestIsNewer(t *testing.T) {
	at := func(revision uint64, seconds int) *trothv1.AuthorityStatus {
		return &trothv1.AuthorityStatus{Revision: revision, Propagation: &trothv1.AuthorityPropagation{
			KnownAt: timestamppb.New(known.Add(time.Duration(seconds) * time.Second))}}
	}
	now := at(5, 5)
	for _, test := range []struct {
		what string
		told *trothv1.AuthorityStatus
		want bool
	}{
		{"nothing", nil, false},
		{"the same", now, false},
		{"later", at(5, 6), true},
		{"as late", at(5, 5), true},
		{"earlier", at(5, 4), false},
		{"a replica that is behind", at(4, 9), false},
		{"a new revision of a slow clock", at(6, 1), true},
	} {
		if got := isNewer(now, test.told); got != test.want {
			t.Errorf("%s: %v, want %v", test.what, got, test.want)
		}
	}
}

func TestUntilGone(t *testing.T) {
	gone := func(left time.Duration) *trothv1.AuthorityStatus {
		a := record("a", old, ca.ReplicasMaySign)
		a.Blocked.Blockers[0].Until = timestamppb.New(known.Add(left))
		return statusOf(a)
	}
	for _, test := range []struct{ left, want time.Duration }{
		{-time.Second, 30 * time.Second}, {10 * time.Second, 11 * time.Second}, {time.Hour, 30 * time.Second},
	} {
		if got := untilGone(gone(test.left)); got != test.want {
			t.Errorf("untilGone, gone in %v = %v, want %v", test.left, got, test.want)
		}
	}
}

// TestReporterLines: no line comes twice, and none sooner than a second after the
// one before; what came in between is left out.
func TestReporterLines(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var out bytes.Buffer
		r := &reporter{w: &out, mode: lines}
		show := func(text, key string) time.Duration { return r.progress(progress{text, key}, nil) }
		for _, test := range []struct {
			text, key string
			again     time.Duration
		}{
			{"one 1s", "one", 0}, {"one 2s", "one", 0}, {"two", "two", time.Second},
		} {
			if got := show(test.text, test.key); got != test.again {
				t.Errorf("progress(%q) = %v, want %v", test.text, got, test.again)
			}
		}
		time.Sleep(400 * time.Millisecond)
		r.event("change", "event", nil)
		if got := show("three", "three"); got != 600*time.Millisecond {
			t.Errorf("progress = %v, want the rest of the second", got)
		}
		time.Sleep(600 * time.Millisecond)
		show("three", "three")
		r.connection(errors.New("cut"))
		r.connection(errors.New("cut again"))
		r.connection(nil)
		r.connection(nil)
		const want = "one 1s\nevent\nthree\ncut: trying again\nconnected again\n"
		if diff := cmp.Diff(want, out.String()); diff != "" {
			t.Errorf("- want, + got:\n%s", diff)
		}
	})
}

// TestReporterTerminal: a line is written over, never wraps, and leaves nothing.
func TestReporterTerminal(t *testing.T) {
	var out bytes.Buffer
	r := &reporter{w: &out, mode: terminal, width: func() int { return 10 }}
	r.progress(progress{"short", "short"}, nil)
	r.progress(progress{"short", "short"}, nil)
	r.progress(progress{"0123456789", ""}, nil)
	r.event("change", "an event as long as it is", nil)
	r.progress(progress{"0123456789", ""}, nil)
	r.clear()
	r.clear()
	const wipe = "\r\x1b[K"
	want := wipe + "short" + wipe + "01234567…" + wipe + "an event as long as it is\n" + wipe + "01234567…" + wipe
	if got := out.String(); got != want {
		t.Errorf("%q, want\n%q", got, want)
	}
}

func TestReporterObjects(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var out bytes.Buffer
		r := &reporter{w: &out, mode: objects}
		r.event("begin", "<begin>", nil)
		r.progress(progress{"text", "key"}, &trothv1.AuthorityStatus{TrustDomain: "example.org"})
		const want = `{"at":"2000-01-01T00:00:00Z","event":"begin","message":"<begin>"}
{"at":"2000-01-01T00:00:00Z","event":"progress","message":"text","status":{"trustDomain":"example.org","revision":"0","authorities":[]}}
`
		if diff := cmp.Diff(want, out.String()); diff != "" {
			t.Errorf("- want, + got:\n%s", diff)
		}
	})
}
