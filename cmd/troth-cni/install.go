package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/fsnotify/fsnotify"
)

// installation puts the plugin on a node, into the configuration that the node's
// container runtime uses: the first in the folder, by name.
//
// Each file is written under another name, made durable and renamed into place. What is
// true if the process dies:
//
//	before the binary is in place        nothing has changed
//	before the configuration is          a binary lies there that nobody runs
//	after a list was made of a file      the runtime still uses the file; the next start
//	that is none, before that one is     goes on from there
//	moved aside
//	while uninstalling, in that order    the same, backwards: no configuration ever names
//	                                     a binary that is not there
type installation struct {
	binDir, confDir string
	config          config
	log             *slog.Logger
}

// What the files are called that belong to nobody else.
const (
	temporary = ".troth-cni-"
	// aside is added to the name of a file that a list was made of. No runtime reads a
	// file that is called so.
	aside = ".troth-replaced"
)

var errNoConfig = errors.New("there is no CNI configuration to be added to: another plugin has to make the network first")

// install brings the node to what it should be, and changes nothing that is so already.
func (i *installation) install() error {
	if err := i.installBinary(); err != nil {
		return fmt.Errorf("install: %w", err)
	}
	if err := i.insert(); err != nil {
		return fmt.Errorf("install: %w", err)
	}
	return nil
}

// keep installs and keeps the plugin installed until ctx ends: other CNI plugins write
// their configuration anew when they start or change. It looks whenever the folder of
// configurations changes, at most once in pause, and after interval anyway. What fails
// is logged and tried again. The plugin stays when keep ends, so that no pod starts
// uncaptured meanwhile.
func (i *installation) keep(ctx context.Context, pause, interval time.Duration) error {
	watcher, err := fsnotify.NewWatcher()
	if err != nil {
		return fmt.Errorf("install: %w", err)
	}
	defer watcher.Close()
	if err := watcher.Add(i.confDir); err != nil {
		return fmt.Errorf("install: watch %q: %w", i.confDir, err)
	}
	failing := ""
	for {
		switch err := i.install(); {
		case err != nil && err.Error() != failing:
			failing = err.Error()
			i.log.Error("plugin not installed", "err", err)
		case err == nil && failing != "":
			failing = ""
			i.log.Info("plugin installed")
		}
		if !wait(ctx, watcher, pause, interval) {
			return nil
		}
	}
}

// wait blocks until the folder has changed and pause is over, or interval is, and
// reports false if ctx has ended. What comes while it pauses counts as one change.
func wait(ctx context.Context, watcher *fsnotify.Watcher, pause, interval time.Duration) bool {
	over, due := time.After(pause), time.After(interval)
	changed := false
	for {
		select {
		case <-ctx.Done():
			return false
		case <-watcher.Events:
			changed = true
		case <-watcher.Errors: //nolint:errcheck // events were lost, which is to say that there were some
			changed = true
		case <-over:
			over = nil
		case <-due:
			return true
		}
		if changed && over == nil {
			return true
		}
	}
}

// installBinary copies this program to where the runtime looks for plugins.
func (i *installation) installBinary() error {
	self, err := os.Open("/proc/self/exe")
	if err != nil {
		return err
	}
	defer self.Close()
	target := filepath.Join(i.binDir, pluginType)
	if same, err := sameContent(self, target); err != nil || same {
		return err
	}
	if _, err := self.Seek(0, io.SeekStart); err != nil {
		return err
	}
	const executable = 0o755
	if err := replace(target, self, executable, nil); err != nil {
		return err
	}
	i.log.Info("plugin copied", "path", target)
	return nil
}

// sameContent reports whether the file at path has what f has from where it stands.
func sameContent(f *os.File, path string) (bool, error) {
	other, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer other.Close()
	mine, err := f.Stat()
	if err != nil {
		return false, err
	}
	theirs, err := other.Stat()
	if err != nil || mine.Size() != theirs.Size() || theirs.Mode().Perm()&0o111 == 0 {
		return false, err
	}
	const chunk = 64 << 10
	a, b := make([]byte, chunk), make([]byte, chunk)
	for {
		n, err := io.ReadFull(f, a)
		m, otherErr := io.ReadFull(other, b)
		if !bytes.Equal(a[:n], b[:m]) {
			return false, nil
		}
		if err == nil && otherErr == nil {
			continue
		}
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return true, nil
		}
		return false, errors.Join(err, otherErr)
	}
}

// insert adds our entry to the configuration that the runtime uses.
func (i *installation) insert() error {
	path, content, err := i.first()
	if err != nil {
		return err
	}
	if filepath.Ext(path) == ".conflist" {
		l, err := parseConflist(content)
		if err != nil {
			return fmt.Errorf("%q: %w", path, err)
		}
		entry, err := i.entry(replacedBy(l.entry()))
		if err != nil {
			return err
		}
		next, err := l.with(entry)
		if err != nil {
			return fmt.Errorf("%q: %w", path, err)
		}
		if bytes.Equal(next, content) {
			return nil
		}
		if err := i.write(path, next, content); err != nil {
			return err
		}
		i.log.Info("plugin added to the CNI configuration", "path", path)
		return nil
	}

	list, err := listOf(content)
	if err != nil {
		return fmt.Errorf("%q: %w", path, err)
	}
	l, err := parseConflist(list)
	if err != nil {
		return fmt.Errorf("%q: %w", path, err)
	}
	entry, err := i.entry(filepath.Base(path))
	if err != nil {
		return err
	}
	if list, err = l.with(entry); err != nil {
		return fmt.Errorf("%q: %w", path, err)
	}
	if err := i.write(listName(path), list, nil); err != nil {
		return err
	}
	if err := rename(path, path+aside); err != nil {
		return err
	}
	i.log.Info("plugin added to the CNI configuration", "path", listName(path), "replaces", path)
	return nil
}

// first returns the configuration that a runtime would use.
func (i *installation) first() (path string, content []byte, err error) {
	entries, err := os.ReadDir(i.confDir) // sorted by name
	if err != nil {
		return "", nil, err
	}
	for _, e := range entries {
		switch filepath.Ext(e.Name()) {
		case ".conflist", ".conf", ".json":
		default:
			continue
		}
		if e.IsDir() {
			continue
		}
		path := filepath.Join(i.confDir, e.Name())
		content, err := readConfig(path)
		return path, content, err
	}
	return "", nil, fmt.Errorf("%q: %w", i.confDir, errNoConfig)
}

func readConfig(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	content, err := io.ReadAll(io.LimitReader(f, maxConfig+1))
	if err == nil && len(content) > maxConfig {
		err = fmt.Errorf("%q has more than %d bytes", path, maxConfig)
	}
	return content, err
}

// entry returns our entry for a configuration.
func (i *installation) entry(replaces string) ([]byte, error) {
	c := i.config
	c.Replaces = replaces
	return json.Marshal(struct {
		Type string `json:"type"`
		config
	}{pluginType, c})
}

// replacedBy returns which file a list was made of, by the entry of ours in it.
func replacedBy(entry []byte) string {
	var c config
	if entry == nil || json.Unmarshal(entry, &c) != nil || c.Replaces != filepath.Base(c.Replaces) {
		return ""
	}
	return c.Replaces
}

// listName is what a list is called that is made of the file at path.
func listName(path string) string {
	return strings.TrimSuffix(path, filepath.Ext(path)) + ".conflist"
}

// write replaces the configuration at path, if it still has what was read; nil means
// that it may have anything. Whoever writes it after that will be seen to have.
func (i *installation) write(path string, content, read []byte) error {
	const readable = 0o644
	mode := fs.FileMode(readable)
	if info, err := os.Stat(path); err == nil {
		mode = info.Mode().Perm()
	}
	return replace(path, bytes.NewReader(content), mode, func() error {
		if read == nil {
			return nil
		}
		now, err := readConfig(path)
		if err == nil && !bytes.Equal(now, read) {
			err = fmt.Errorf("%q has just been changed by somebody else", path)
		}
		return err
	})
}

// uninstall takes our entry out of every configuration, puts back what was moved aside
// and removes the binary. What is not there is no error.
func (i *installation) uninstall() error {
	entries, err := os.ReadDir(i.confDir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("uninstall: %w", err)
	}
	for _, e := range entries {
		if e.IsDir() || filepath.Ext(e.Name()) != ".conflist" {
			continue
		}
		if err := i.takeOut(filepath.Join(i.confDir, e.Name())); err != nil {
			return fmt.Errorf("uninstall: %w", err)
		}
	}
	if err := os.Remove(filepath.Join(i.binDir, pluginType)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("uninstall: %w", err)
	}
	return nil
}

func (i *installation) takeOut(path string) error {
	content, err := readConfig(path)
	if err != nil {
		return err
	}
	l, err := parseConflist(content)
	if err != nil || len(l.ours) == 0 {
		// What nobody can read does not run our plugin either.
		return nil //nolint:nilerr // see above
	}
	if replaced := replacedBy(l.entry()); replaced != "" {
		original := filepath.Join(i.confDir, replaced)
		err := os.Rename(original+aside, original)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if _, err := os.Stat(original); err == nil {
			if err := syncFolder(i.confDir); err != nil {
				return err
			}
			return os.Remove(path)
		}
		// Somebody removed the original: what was made of it is all there is.
	}
	next := l.without()
	if next == nil {
		return os.Remove(path)
	}
	if err := i.write(path, next, content); err != nil {
		return err
	}
	i.log.Info("plugin taken out of the CNI configuration", "path", path)
	return nil
}

// replace writes a file so that there is the old one or the new one at path, whole, even
// after the machine lost its power. check is asked last, and may still stop it.
func replace(path string, content io.Reader, mode fs.FileMode, check func() error) error {
	folder := filepath.Dir(path)
	// Left over from one that died.
	left, err := filepath.Glob(filepath.Join(folder, temporary+"*"))
	if err != nil {
		return err
	}
	for _, file := range left {
		if err := os.Remove(file); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	f, err := os.CreateTemp(folder, temporary)
	if err != nil {
		return err
	}
	_, err = io.Copy(f, content)
	if err == nil {
		err = f.Chmod(mode)
	}
	if err == nil {
		err = f.Sync()
	}
	if closeErr := f.Close(); err == nil {
		err = closeErr
	}
	if err == nil && check != nil {
		err = check()
	}
	if err != nil {
		return errors.Join(err, os.Remove(f.Name()))
	}
	return rename(f.Name(), path)
}

func rename(from, to string) error {
	if err := os.Rename(from, to); err != nil {
		return err
	}
	return syncFolder(filepath.Dir(to))
}

func syncFolder(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	return f.Sync()
}
