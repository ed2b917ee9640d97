package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"troth.dev/troth/check"
	"troth.dev/troth/test/apiserver"
)

// TestCheckOfCluster checks a real API server, in which there is nothing of Troth's.
func TestCheckOfCluster(t *testing.T) {
	cluster := apiserver.Start(t)
	cluster.CreateNode(t, "n1")
	kubeconfig := cluster.Kubeconfig(t, cluster.Admin())
	troth := func(args ...string) (stdout, stderr string, err error) {
		var out, progress bytes.Buffer
		err = run(t.Context(), append([]string{"check", "--kubeconfig", kubeconfig}, args...), strings.NewReader(""), &out, &progress)
		return out.String(), progress.String(), err
	}

	// Its node has no kubelet, which tells nobody its version.
	text, progress, err := troth("--pre")
	if !errors.Is(err, errNotAllChecks) || exitCode(err) != 5 || !hasTold(err) {
		t.Errorf("check --pre: %v, exit code %d", err, exitCode(err))
	}
	for _, want := range []string{
		"pass     node-restriction: a kubelet may not give its node a label of node-restriction.kubernetes.io\n",
		`warning  nodes-ready: 1 of 1 node not ready: n1
         All nodes are ready: What a node that is away has to prove holds a rotation up until the node is back or deleted.
         Do: kubectl describe node NAME; delete the Node if the machine is gone for good.
         docs/troubleshoot.md#nodes-ready
`,
		`unknown  clock-nodes: no kubelet has a lease
         No node's clock is ahead: A node whose clock is ahead takes certificates`,
		"\n22 checks: 17 passed, 2 warned, 0 failed, 3 unknown.\n",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("check --pre does not say\n%s\nbut\n%s", want, text)
		}
	}
	if !strings.HasPrefix(progress, "read 1 of 12: ") || strings.Contains(progress, "\x1b") {
		t.Errorf("progress:\n%s", progress)
	}

	text, progress, err = troth("-o", "json")
	if !errors.Is(err, errCheckFailed) || exitCode(err) != 3 || progress != "" {
		t.Errorf("check -o json: %v, exit code %d, and %q", err, exitCode(err), progress)
	}
	var report struct {
		Results []struct{ ID, Title, Level, Found, Why, Do, Docs string }
	}
	if err := json.Unmarshal([]byte(text), &report); err != nil {
		t.Fatal(err)
	}
	levels := make(map[string]string)
	for _, r := range report.Results {
		levels[r.ID] = r.Level + " " + r.Found + " " + r.Docs
	}
	want := map[string]string{
		"api-server-version": "pass the API server has version v1.37.2 docs/troubleshoot.md#api-server-version",
		"server-deployment":  "failure there is no Deployment troth-system/troth-server docs/troubleshoot.md#server-deployment",
		"server-reachable": "unknown not known: the control plane was not asked: give --server, --trust-domain, --bundle and --token " +
			"docs/troubleshoot.md#server-reachable",
	}
	got := make(map[string]string)
	for id := range want {
		got[id] = levels[id]
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("check -o json (- want, + got):\n%s", diff)
	}
}

// TestCheckInOneWord: the exit code is that of the worst that was found.
func TestCheckInOneWord(t *testing.T) {
	pass, warning := check.Result{Level: check.Pass}, check.Result{Level: check.Warning}
	expiring := check.Result{Level: check.Warning, Expiring: true}
	unknown, failure := check.Result{}, check.Result{Level: check.Failure}
	for _, test := range []struct {
		results []check.Result
		code    int
	}{
		{[]check.Result{pass, unknown, expiring, failure}, 3},
		{[]check.Result{pass, unknown, expiring}, 4},
		{[]check.Result{pass, warning, unknown}, 5},
	} {
		err := inOneWord(check.Report{Results: test.results})
		if exitCode(err) != test.code || !hasTold(err) {
			t.Errorf("%v: %v, exit code %d, want %d", test.results, err, exitCode(err), test.code)
		}
	}
	if err := inOneWord(check.Report{Results: []check.Result{pass, warning}}); err != nil {
		t.Errorf("a warning that can wait: %v", err)
	}
}
