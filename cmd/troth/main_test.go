package main

import (
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
)

// The scripts run the command itself, re-entering this binary.
func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"troth": main, "rehearsed": rehearsed})
}

func TestScripts(t *testing.T) {
	running := &planes{stop: make(map[string]func() error)}
	testscript.Run(t, testscript.Params{
		Dir: "testdata/script",
		Cmds: map[string]func(ts *testscript.TestScript, neg bool, args []string){
			"exits": exits, "plane": running.command, "ids": ids, "mask": mask, "until": until,
		},
		UpdateScripts: *update,
	})
}
