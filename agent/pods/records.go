package pods

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"troth.dev/troth/agent/cni"
)

// records is a folder with a file for each pod that is captured, or about to be. It says
// where the pod's network is, so that the next process finds it. The namespace's inode
// tells whether what is at the path is still that network; after a restart of the
// machine it never is, and so nothing here is made to outlive one.
//
// A file is written under another name and renamed: whoever dies leaves the old record
// or the new one, whole, and perhaps a file that prepare takes away.
type records string

// record is the content of a file. Its name is the pod's UID.
type record struct {
	Pod cni.Pod       `json:"pod"`
	ID  cni.Namespace `json:"id"`
}

const (
	maxRecord    = 16 << 10
	unfinished   = ".new-"
	recordsMode  = 0o700
	othersMayAct = 0o022
)

func recordOf(uid string, t target) record {
	pod := t.pod
	pod.UID = uid
	return record{Pod: pod, ID: t.id}
}

// prepare makes the folder if there is none, and clears away what was never finished.
func (r records) prepare() error {
	if err := os.MkdirAll(string(r), recordsMode); err != nil {
		return err
	}
	info, err := os.Stat(string(r))
	if err != nil {
		return err
	}
	if info.Mode().Perm()&othersMayAct != 0 {
		return fmt.Errorf("others may write to %q and have the agent capture what they like: take that right away (chmod go-w)", string(r))
	}
	left, err := filepath.Glob(filepath.Join(string(r), unfinished+"*"))
	if err != nil {
		return err
	}
	for _, path := range left {
		if err := os.Remove(path); err != nil {
			return err
		}
	}
	return nil
}

func (r records) write(rec record) error {
	content, err := json.Marshal(rec)
	if err != nil {
		return err
	}
	f, err := os.CreateTemp(string(r), unfinished)
	if err != nil {
		return fmt.Errorf("record of the pod: %w", err)
	}
	_, err = f.Write(content)
	if closeErr := f.Close(); err == nil {
		err = closeErr
	}
	if err == nil {
		err = os.Rename(f.Name(), filepath.Join(string(r), rec.Pod.UID))
	}
	if err != nil {
		return fmt.Errorf("record of the pod: %w", errors.Join(err, os.Remove(f.Name())))
	}
	return nil
}

func (r records) remove(uid string) error {
	err := os.Remove(filepath.Join(string(r), uid))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// read returns all records, and what is wrong with those that are none, which it
// removes: what they were about is found by its processes.
func (r records) read() (map[string]record, error) {
	entries, err := os.ReadDir(string(r))
	if err != nil {
		return nil, err
	}
	all, faults := make(map[string]record), []error(nil)
	for _, entry := range entries {
		if strings.HasPrefix(entry.Name(), unfinished) {
			continue
		}
		rec, err := readRecord(filepath.Join(string(r), entry.Name()))
		if err == nil && rec.Pod.UID != entry.Name() {
			err = fmt.Errorf("it is about pod %q", rec.Pod.UID)
		}
		if err != nil {
			faults = append(faults, fmt.Errorf("record %q: %w", entry.Name(), err), os.Remove(filepath.Join(string(r), entry.Name())))
			continue
		}
		all[entry.Name()] = rec
	}
	return all, errors.Join(faults...)
}

func readRecord(path string) (record, error) {
	content, err := readFile(path, maxRecord+1)
	if err != nil {
		return record{}, err
	}
	return parseRecord(content)
}

func parseRecord(content []byte) (record, error) {
	var rec record
	if len(content) > maxRecord {
		return rec, fmt.Errorf("more than %d bytes", maxRecord)
	}
	d := json.NewDecoder(bytes.NewReader(content))
	if err := d.Decode(&rec); err != nil {
		return rec, err
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return rec, errors.New("there is more after its end")
	}
	if rec.Pod.UID == "" || rec.ID == (cni.Namespace{}) {
		return rec, errors.New("it has no pod or no namespace")
	}
	return rec, nil
}

// restore makes an entry for each pod that was captured before, and lets go of those
// that are gone.
func (p *Pods) restore(found census) {
	var kept map[string][]*os.File
	if p.config.Keeper != nil {
		var err error
		if kept, err = p.config.Keeper.Take(); err != nil {
			p.config.Log.Error("what was kept is not there; connections to the node's pods may have been refused", "err", err)
		}
	}
	recorded, err := p.records.read()
	if err != nil {
		p.config.Log.Error("not all records of pods can be read; they are found by their processes", "err", err)
	}
	uids := make(map[string]bool)
	for uid := range kept {
		uids[uid] = true
	}
	for uid := range recorded {
		uids[uid] = true
	}
	for uid := range uids {
		t, err := p.recall(recorded[uid], kept[uid], found)
		if err != nil {
			p.config.Log.Info("pod of before is gone", "pod", uid, "err", err)
			closeAll(kept[uid])
			(&entry{pods: p, uid: uid}).forget()
			continue
		}
		t.pod.UID = uid
		if _, _, err := p.post(uid, t); err != nil {
			return
		}
	}
}

// recall makes a target of what is left of a pod. It takes the files if it succeeds.
func (p *Pods) recall(rec record, kept []*os.File, found census) (*target, error) {
	t := &target{pod: rec.Pod, held: true}
	t.sighting = sighting{id: rec.ID, sandbox: rec.Pod.Sandbox, netns: rec.Pod.Netns}
	if len(kept) > 0 {
		id, err := cni.NamespaceOf(kept[0])
		switch {
		case err != nil:
			return nil, fmt.Errorf("what was kept: %w", err)
		case rec.ID == (cni.Namespace{}):
			t.id = id
		case id != rec.ID:
			// The record is written first: a newer sandbox, whose sockets were not
			// kept yet.
			closeAll(kept)
			kept = nil
		}
	}
	if p.isHost(t.id) {
		return nil, errors.New("it is the node's own network")
	}
	if !p.alive(t.sighting, found) {
		return nil, errors.New("nobody is in its network")
	}
	if len(kept) > 0 {
		t.ns, t.kept = kept[0], kept[1:] // which Open tells apart by itself
		return t, nil
	}
	ns, err := p.openPath(t.netns, t.id)
	if err != nil {
		// By its process, then, which alive has found.
		process, ok := found.pods[rec.Pod.UID]
		if !ok || process.id != t.id {
			return nil, fmt.Errorf("open its network: %w", err)
		}
		if ns, err = process.open(rec.Pod.UID); err != nil {
			return nil, err
		}
	}
	t.ns = ns
	return t, nil
}

func readFile(path string, limit int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, limit))
}
