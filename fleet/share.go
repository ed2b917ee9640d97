package fleet

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"slices"
	"time"

	"troth.dev/troth/ca"
	"troth.dev/troth/storage"
)

const (
	// publishEvery is what lies between two summaries of a replica at least, and
	// publishAnyway how long nothing has to change before there is another.
	publishEvery  = time.Second
	publishAnyway = 20 * time.Second
	// askEvery is how often the other replicas' summaries are read while authorities
	// change, and askIdly while they do not.
	askEvery = time.Second
	askIdly  = 10 * time.Second
	// forgetAfter is when a replica that published nothing is taken for gone, after
	// the last SVID has ended that its agents may have handed out.
	forgetAfter = 10 * time.Minute
	// storePatience bounds each call of the store.
	storePatience = 5 * time.Second
)

// materially is what of a record others have to know soon.
type materially struct {
	received, applied, proved uint64
	authority                 string
	failure                   ProbeFailure
	connected                 bool
	uses                      int // how many authorities
}

func (r record) materially() materially {
	return materially{
		received: r.report.Received, applied: r.report.Applied, proved: r.report.Proved, authority: r.report.ProvedAuthority,
		failure: r.report.Failure, connected: r.connected, uses: len(r.report.Uses),
	}
}

// resume takes up what a replica of this name heard before. That the store cannot
// be read is for share to say.
func (f *Fleet) resume(ctx context.Context) {
	summaries, err := f.summaries(ctx)
	if err != nil {
		return
	}
	for _, s := range summaries {
		if s.replica != f.config.Replica {
			continue
		}
		f.mu.Lock()
		for uid, r := range s.heard {
			if _, ok := f.own[uid]; ok {
				continue // it has reported again
			}
			if r.connected {
				r.connected, r.lost = false, s.at
			}
			f.own[uid] = r
		}
		f.mu.Unlock()
	}
}

// share publishes what this replica heard and reads what the others did, if it is
// time to.
func (f *Fleet) share(ctx context.Context) {
	at := now()
	if err := f.publish(ctx, at); err != nil && ctx.Err() == nil {
		f.config.Log.LogAttrs(ctx, slog.LevelWarn, "what agents reported is not shared", slog.Any("err", err))
	}
	every := askIdly
	if set, _ := f.config.Authorities.Load(); changing(set) {
		every = askEvery
	}
	f.mu.Lock()
	due := at.Sub(f.asked) >= every
	if due {
		f.asked = at // whatever comes of it: see publish
	}
	f.mu.Unlock()
	if !due {
		return
	}
	summaries, err := f.summaries(ctx)
	if err != nil {
		if ctx.Err() == nil {
			f.config.Log.LogAttrs(ctx, slog.LevelWarn, "what agents reported to other replicas is not known", slog.Any("err", err))
		}
		return
	}
	others := make(map[string]map[string]record)
	for _, s := range summaries {
		switch {
		case s.replica == f.config.Replica:
		case at.Sub(s.at) > f.config.SVIDLife+forgetAfter:
			if err := f.withdraw(ctx, s.replica); err != nil && ctx.Err() == nil {
				f.config.Log.LogAttrs(ctx, slog.LevelWarn, "the summary of a replica that is gone was not removed",
					slog.String("replica", s.replica), slog.Any("err", err))
			}
		default:
			others[s.replica] = s.heard
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.others, f.agreed = others, at
}

// changing says whether somebody may wait for agents.
func changing(set ca.Set) bool {
	return slices.ContainsFunc(set.Authorities, func(a ca.Authority) bool {
		return a.State == ca.Prepared || a.State == ca.Old || a.State == ca.Tainted
	})
}

// publish stores this replica's summary if others have to know, or have not heard
// for a while.
func (f *Fleet) publish(ctx context.Context, at time.Time) error {
	f.mu.Lock()
	due := f.due(at)
	if !due {
		f.mu.Unlock()
		return nil
	}
	heard := maps.Clone(f.own)
	// Not after the call: a store that fails is not to be asked 20 times a second.
	f.posted = at
	f.mu.Unlock()
	data, err := encode(summary{replica: f.config.Replica, at: at, heard: heard})
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, storePatience)
	defer cancel()
	if err := f.config.Store.Publish(ctx, f.config.Replica, data); err != nil {
		return fmt.Errorf("fleet: publish: %w", err)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.told = make(map[string]materially, len(heard))
	for uid, r := range heard {
		f.told[uid] = r.materially()
	}
	return nil
}

// due says whether there is news for the others, or none for so long that they have
// to know that nothing has changed. The caller holds mu.
func (f *Fleet) due(at time.Time) bool {
	switch age := at.Sub(f.posted); {
	case age < publishEvery:
		return false
	case age >= publishAnyway || len(f.told) != len(f.own):
		return true
	}
	for uid, r := range f.own {
		if told, ok := f.told[uid]; !ok || told != r.materially() {
			return true
		}
	}
	return false
}

func (f *Fleet) withdraw(ctx context.Context, replica string) error {
	ctx, cancel := context.WithTimeout(ctx, storePatience)
	defer cancel()
	return f.config.Store.Withdraw(ctx, replica)
}

// summaries reads what all replicas published. One that cannot be read is as good
// as none, and is named in the log.
func (f *Fleet) summaries(ctx context.Context) ([]summary, error) {
	ctx, cancel := context.WithTimeout(ctx, storePatience)
	defer cancel()
	stored, err := f.config.Store.Summaries(ctx)
	if err != nil {
		return nil, fmt.Errorf("fleet: read the summaries: %w", err)
	}
	var all []summary
	for _, one := range stored {
		s, err := decode(one.Data)
		if err != nil {
			f.config.Log.LogAttrs(ctx, slog.LevelError, "the summary of a replica cannot be read",
				slog.String("replica", one.Replica), slog.Any("err", err))
			continue
		}
		s.replica = one.Replica
		all = append(all, s)
	}
	return all, nil
}

// summary is what a replica has heard.
type summary struct {
	replica string
	at      time.Time
	heard   map[string]record
}

// The stored form, JSON in gzip: 10,000 agents take some 400 KB, most of them the
// random bits of UIDs.
const summaryFormat = 1

// maxSummary bounds what a summary may unpack to, in bytes: 400 for each agent.
const maxSummary = 400 * MaxAgents

type storedSummary struct {
	Format      int           `json:"format"`
	At          int64         `json:"at"` // in milliseconds since 1970
	Authorities []string      `json:"authorities,omitempty"`
	Agents      []storedAgent `json:"agents,omitempty"`
}

type storedAgent struct {
	UID       string   `json:"u"`
	Node      string   `json:"n"`
	Heard     int64    `json:"h"`           // milliseconds before At
	Lost      int64    `json:"l,omitempty"` // milliseconds before At, plus one; 0 while connected
	Received  uint64   `json:"r,omitempty"`
	Applied   uint64   `json:"a,omitempty"`
	Proved    uint64   `json:"p,omitempty"`
	Authority int      `json:"q,omitempty"` // from 1 on, in Authorities
	Failure   int      `json:"f,omitempty"`
	Running   int64    `json:"s,omitempty"` // in milliseconds
	Uses      [][3]int `json:"x,omitempty"` // authority from 1 on, SVIDs, connections
}

// encode spells a summary, of at most MaxAgents: those who reported last.
func encode(s summary) ([]byte, error) {
	stored := storedSummary{Format: summaryFormat, At: s.at.UnixMilli()}
	numbers := make(map[string]int)
	number := func(id string) int {
		if id == "" {
			return 0
		}
		if numbers[id] == 0 {
			stored.Authorities = append(stored.Authorities, id)
			numbers[id] = len(stored.Authorities)
		}
		return numbers[id]
	}
	uids := slices.SortedFunc(maps.Keys(s.heard), func(a, b string) int { return s.heard[b].heard.Compare(s.heard[a].heard) })
	for _, uid := range uids[:min(len(uids), MaxAgents)] {
		r := s.heard[uid]
		a := storedAgent{
			UID: uid, Node: r.node, Heard: max(0, s.at.Sub(r.heard).Milliseconds()),
			Received: r.report.Received, Applied: r.report.Applied, Proved: r.report.Proved,
			Authority: number(r.report.ProvedAuthority), Failure: int(r.report.Failure), Running: r.report.RunningFor.Milliseconds(),
		}
		if !r.connected {
			a.Lost = max(0, s.at.Sub(r.lost).Milliseconds()) + 1
		}
		for _, id := range slices.Sorted(maps.Keys(r.report.Uses)) {
			use := r.report.Uses[id]
			a.Uses = append(a.Uses, [3]int{number(id), use.SVIDs, use.Connections})
		}
		stored.Agents = append(stored.Agents, a)
	}
	var packed bytes.Buffer
	w := gzip.NewWriter(&packed)
	if err := errors.Join(json.NewEncoder(w).Encode(stored), w.Close()); err != nil {
		return nil, fmt.Errorf("fleet: encode a summary: %w", err)
	}
	return packed.Bytes(), nil
}

// decode reads what encode wrote, and refuses what it cannot have written.
func decode(data []byte) (summary, error) {
	if len(data) > storage.MaxDocument {
		return summary{}, storage.ErrDocumentSize
	}
	r, err := gzip.NewReader(bytes.NewReader(data))
	if err != nil {
		return summary{}, fmt.Errorf("fleet: a summary: %w", err)
	}
	text, err := io.ReadAll(io.LimitReader(r, maxSummary+1))
	if err != nil {
		return summary{}, fmt.Errorf("fleet: a summary: %w", err)
	}
	if len(text) > maxSummary {
		return summary{}, fmt.Errorf("fleet: a summary unpacks to more than %d bytes", maxSummary)
	}
	var stored storedSummary
	if err := json.Unmarshal(text, &stored); err != nil {
		return summary{}, fmt.Errorf("fleet: a summary: %w", err)
	}
	if stored.Format != summaryFormat {
		return summary{}, fmt.Errorf("fleet: a summary of format %d; this replica knows only %d", stored.Format, summaryFormat)
	}
	if len(stored.Agents) > MaxAgents {
		return summary{}, fmt.Errorf("fleet: a summary of %d agents", len(stored.Agents))
	}
	authority := func(n int) (string, error) {
		switch {
		case n == 0:
			return "", nil
		case n < 0 || n > len(stored.Authorities):
			return "", fmt.Errorf("fleet: a summary has no authority %d", n)
		}
		return stored.Authorities[n-1], nil
	}
	s := summary{at: time.UnixMilli(stored.At).UTC(), heard: make(map[string]record, len(stored.Agents))}
	const longest = int64(366 * 24 * time.Hour / time.Millisecond)
	for _, a := range stored.Agents {
		if a.Heard < 0 || a.Heard > longest || a.Lost < 0 || a.Lost > longest || a.Running < 0 || a.Running > 100*longest {
			return summary{}, fmt.Errorf("fleet: a summary has agent %.64q at an impossible time", a.UID)
		}
		one := record{node: a.Node, heard: s.at.Add(-time.Duration(a.Heard) * time.Millisecond), connected: a.Lost == 0}
		if !one.connected {
			one.lost = s.at.Add(-time.Duration(a.Lost-1) * time.Millisecond)
		}
		one.report = Report{
			Received: a.Received, Applied: a.Applied, Proved: a.Proved, Failure: ProbeFailure(a.Failure),
			RunningFor: time.Duration(a.Running) * time.Millisecond, Uses: make(map[string]ca.Use, len(a.Uses)),
		}
		if one.report.ProvedAuthority, err = authority(a.Authority); err != nil {
			return summary{}, err
		}
		for _, use := range a.Uses {
			id, err := authority(use[0])
			if err != nil || id == "" || use[1] < 0 || use[2] < 0 {
				return summary{}, fmt.Errorf("fleet: a summary has agent %.64q with an impossible use", a.UID)
			}
			one.report.Uses[id] = ca.Use{SVIDs: use[1], Connections: use[2]}
		}
		s.heard[a.UID] = one
	}
	return s, nil
}
