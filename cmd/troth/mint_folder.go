package main

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sys/unix"
)

// mintIndex is the file by which a folder is known to be one that mint made.
const mintIndex = "identities.tsv"

// mintFolder is a folder that comes into being whole. All is written into another
// one beside it, .NAME.unfinished-*, which takes its name at the end by one rename.
//
// If the process dies before the rename, the folder is as it was, and the next mint
// of the same folder deletes what is left of this one. If it dies after it, the new
// one is whole, and at most the one that it replaced is left to be deleted.
//
// Nothing is flushed to the disk: after a power cut the files may be empty. They
// live for minutes, and whoever survives that mints again.
type mintFolder struct {
	path  string
	force bool
	stage string   // beside path
	lock  *os.File // held as long as we live
}

// newMintFolder makes the folder that is written into. It refuses, unless it is
// forced, when there is something in path already; what mint did not make it refuses
// to replace in any case. The caller closes it.
func newMintFolder(path string, force bool) (*mintFolder, error) {
	whole, err := filepath.Abs(path)
	if err != nil {
		return nil, err
	}
	d := &mintFolder{path: whole, force: force}
	if _, err := d.replaces(); err != nil {
		return nil, err
	}
	parent, base := filepath.Split(whole)
	if base == "" {
		return nil, inputErrorf("--out %s: it is no folder to make", path)
	}
	if err := os.MkdirAll(parent, 0o755); err != nil {
		return nil, err
	}
	prefix := "." + base + ".unfinished-"
	if err := sweep(parent, prefix); err != nil {
		return nil, err
	}
	if d.stage, err = os.MkdirTemp(parent, prefix+"*"); err != nil {
		return nil, err
	}
	if d.lock, err = lockFolder(d.stage); err != nil {
		return nil, errors.Join(err, os.RemoveAll(d.stage))
	}
	return d, nil
}

// replaces reports whether there is a folder that is to be replaced.
func (d *mintFolder) replaces() (bool, error) {
	entries, err := os.ReadDir(d.path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return false, nil
	case errors.Is(err, unix.ENOTDIR):
		return false, inputErrorf("--out %s: it is not a folder", d.path)
	case err != nil:
		return false, err
	case len(entries) == 0:
		return false, nil
	case !d.force:
		return false, inputErrorf("--out %s: it is not empty; --force replaces it, if mint made it", d.path)
	}
	if _, err := os.Lstat(filepath.Join(d.path, mintIndex)); err != nil {
		return false, inputErrorf("--out %s: mint did not make it (it has no %s), and does not replace it", d.path, mintIndex)
	}
	return true, nil
}

// sweep deletes what processes left that are dead.
func sweep(parent, prefix string) error {
	entries, err := os.ReadDir(parent)
	if err != nil {
		return err
	}
	for _, entry := range entries {
		if !strings.HasPrefix(entry.Name(), prefix) || !entry.IsDir() {
			continue
		}
		left := filepath.Join(parent, entry.Name())
		lock, err := lockFolder(left)
		if err != nil {
			continue // somebody is at it, or it is not ours
		}
		err = os.RemoveAll(left)
		lock.Close()
		if err != nil {
			return err
		}
	}
	return nil
}

// lockFolder takes a lock that the kernel drops when the process dies.
func lockFolder(path string) (*os.File, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		return nil, fmt.Errorf("lock %s: %w", path, err)
	}
	return f, nil
}

// close deletes what is unfinished, or was replaced. What cannot be deleted the next
// mint of the same folder tries again.
func (d *mintFolder) close() {
	_ = os.RemoveAll(d.stage)
	d.lock.Close()
}

// write writes the identities.
func (d *mintFolder) write(all []minted, bundle *x509bundle.Bundle, format mintFormat) error {
	authorities, err := bundle.Marshal()
	if err != nil {
		return err
	}
	err = inParallel(len(all), func(n int) error {
		files, err := format.own(all[n], authorities)
		if err != nil {
			return fmt.Errorf("%q: %w", all[n].id, err)
		}
		return d.folder(folderName(all[n].id), files)
	})
	if err != nil {
		return err
	}

	top := []mintFile{{"bundle.pem", authorities}}
	if format.trust != nil {
		store, err := format.trust(bundle)
		if err != nil {
			return err
		}
		top = append(top, store)
	}
	if format.password != "" {
		top = append(top, mintFile{"password", []byte(format.password + "\n")})
	}
	var index bytes.Buffer
	for _, m := range all {
		fmt.Fprintf(&index, "%s\t%s\t%s\n", m.id, folderName(m.id), m.until.UTC().Format(time.RFC3339))
	}
	return d.folder(".", append(top, mintFile{mintIndex, index.Bytes()}))
}

// folder writes files into a folder below, which it makes.
func (d *mintFolder) folder(name string, files []mintFile) error {
	folder := filepath.Join(d.stage, name)
	if folder != d.stage {
		if err := os.Mkdir(folder, 0o700); err != nil {
			return err
		}
	}
	for _, f := range files {
		if err := os.WriteFile(filepath.Join(folder, f.name), f.content, 0o600); err != nil {
			return err
		}
	}
	return nil
}

// publish gives the folder its name.
func (d *mintFolder) publish() error {
	replaces, err := d.replaces()
	if err != nil {
		return err
	}
	if !replaces {
		// rename(2) takes the place of an empty folder, and of no other: what
		// somebody put there meanwhile stays. os.Rename refuses both.
		err = unix.Rename(d.stage, d.path)
	} else {
		// close deletes what was there before.
		err = unix.Renameat2(unix.AT_FDCWD, d.stage, unix.AT_FDCWD, d.path, unix.RENAME_EXCHANGE)
	}
	switch {
	case errors.Is(err, unix.EBUSY):
		return fmt.Errorf("--out %s is a mount point, which cannot be replaced: name a folder in it", d.path)
	case errors.Is(err, unix.EINVAL):
		return fmt.Errorf("--out %s: its file system cannot replace a folder in one step: remove it first", d.path)
	case err != nil:
		return fmt.Errorf("give %s its name: %w", d.path, err)
	}
	return nil
}

// folderName returns the name of an identity's folder: its path, with + for /, which
// no SPIFFE ID has. What is longer than file systems take is cut short and told apart
// by a hash; that is longer than any that is whole.
func folderName(id spiffeid.ID) string {
	const most = 150
	name := strings.ReplaceAll(strings.TrimPrefix(id.Path(), "/"), "/", "+")
	if len(name) <= most {
		return name
	}
	sum := sha256.Sum256([]byte(id.String()))
	return name[:most] + "+" + hex.EncodeToString(sum[:16])
}
