package ca_test

import (
	"testing"
	"time"

	"troth.dev/troth/ca"
)

func TestNewProfile(t *testing.T) {
	for _, test := range []struct {
		config ca.ProfileConfig
		want   string // the error
	}{
		{ca.ProfileConfig{}, ""},
		{ca.ProfileConfig{Life: 10 * time.Second}, ""},
		{ca.ProfileConfig{Life: 24 * time.Hour, Backdate: time.Hour}, ""},
		{ca.ProfileConfig{Life: 10*time.Second - 1}, "ca: SVIDs that live 9.999999999s: the life is from 10s to 24h"},
		{ca.ProfileConfig{Life: 24*time.Hour + 1}, "ca: SVIDs that live 24h0m0.000000001s: the life is from 10s to 24h"},
		{ca.ProfileConfig{Life: -time.Hour}, "ca: SVIDs that live -1h0m0s: the life is from 10s to 24h"},
		{ca.ProfileConfig{Backdate: time.Hour + 1}, "ca: SVIDs backdated by 1h0m0.000000001s: it is from 0 to 1h"},
		{ca.ProfileConfig{Backdate: -1}, "ca: SVIDs backdated by -1ns: it is from 0 to 1h"},
	} {
		profile, err := ca.NewProfile(test.config)
		got := ""
		if err != nil {
			got = err.Error()
		}
		if got != test.want || (profile == nil) != (err != nil) {
			t.Errorf("NewProfile(%+v) = %v, %q; want error %q", test.config, profile, got, test.want)
		}
	}
}

func TestStateText(t *testing.T) {
	names := map[ca.State]string{
		ca.Prepared: "prepared", ca.Active: "active", ca.Old: "old", ca.Tainted: "tainted", ca.Revoked: "revoked",
	}
	for state, name := range names {
		text, err := state.MarshalText()
		if err != nil || string(text) != name || state.String() != name {
			t.Errorf("%d.MarshalText() = %q, %v and String() = %q; want %q", int(state), text, err, state, name)
		}
		var back ca.State
		if err := back.UnmarshalText(text); err != nil || back != state {
			t.Errorf("UnmarshalText(%q) = %v, %v; want %v", text, back, err, state)
		}
	}
	for _, state := range []ca.State{0, -1, 6} {
		if text, err := state.MarshalText(); err == nil {
			t.Errorf("State(%d).MarshalText() = %q; want it refused", int(state), text)
		}
	}
	for _, text := range []string{"", "ACTIVE", "active ", "State(1)", "1"} {
		var state ca.State
		if err := state.UnmarshalText([]byte(text)); err == nil || state != 0 {
			t.Errorf("UnmarshalText(%q) = %v, %v; want it refused", text, state, err)
		}
	}
}
