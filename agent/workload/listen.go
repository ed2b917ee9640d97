package workload

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"time"
)

// Listen listens on a Unix socket at path, and makes the directory if there is none.
// A socket that is there already is replaced if nobody serves it. Otherwise Listen
// fails, with [syscall.EADDRINUSE] if somebody does, and what was there is still there.
//
// Closing the listener leaves the socket behind, for the next Listen to replace: to
// remove it would be to remove the successor's.
//
// Everybody may connect (mode 0777), because a pod's process may have any user, and
// because to connect is to have nothing yet: what a caller is given depends on what
// the kernel says of it. Nobody else may put a socket of their own there, which would
// feed workloads keys and bundles of their choice: a directory that others may write
// to is refused, unless it is sticky.
func Listen(path string) (net.Listener, error) {
	dir := filepath.Dir(path)
	if err := makeDirectory(dir); err != nil {
		return nil, fmt.Errorf("workload: %w", err)
	}
	// The socket is made under a name that nobody knows, and gets its own name when it
	// is ready: no caller finds it closed, and no second agent finds it not served yet.
	temporary := filepath.Join(dir, ".new-"+rand.Text()[:8])
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: temporary, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("workload: %w", err)
	}
	l.SetUnlinkOnClose(false)
	err = os.Chmod(temporary, 0o777)
	if err == nil {
		err = place(temporary, path)
	}
	// If place succeeded, this was the second of two names.
	if removeErr := os.Remove(temporary); err == nil {
		err = removeErr
	}
	if err != nil {
		l.Close()
		return nil, fmt.Errorf("workload: %w", err)
	}
	return named{l, &net.UnixAddr{Name: path, Net: "unix"}}, nil
}

func makeDirectory(dir string) error {
	info, err := os.Stat(dir)
	if errors.Is(err, fs.ErrNotExist) {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
		return os.Chmod(dir, 0o755) // whatever the umask is: pods have to pass
	}
	if err != nil {
		return err
	}
	if info.Mode().Perm()&0o022 != 0 && info.Mode()&fs.ModeSticky == 0 {
		return fmt.Errorf("others may write to %q and replace the socket: take that right away (chmod go-w)", dir)
	}
	return nil
}

// place gives the socket at temporary the name path. It does not take that name from
// a socket that is served: link fails if the name is taken, and what is to go is
// moved aside first, tried once more, and put back if it answers after all. So of
// two agents that start at once, one wins and the other fails.
func place(temporary, path string) error {
	aside := temporary + "-old"
	for range 3 {
		err := os.Link(temporary, path)
		if !errors.Is(err, fs.ErrExist) {
			return err
		}
		if err := checkStale(path); err != nil {
			return fmt.Errorf("%q is taken: %w", path, err)
		}
		if err := os.Rename(path, aside); errors.Is(err, fs.ErrNotExist) {
			continue
		} else if err != nil {
			return err
		}
		if err := checkStale(aside); err != nil {
			return errors.Join(fmt.Errorf("%q is taken: %w", path, err), os.Link(aside, path), os.Remove(aside))
		}
		if err := os.Remove(aside); err != nil {
			return err
		}
	}
	return fmt.Errorf("%q is taken again and again", path)
}

// checkStale returns nil if path is a socket that nobody serves, or nothing.
func checkStale(path string) error {
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if info.Mode().Type() != fs.ModeSocket {
		return errors.New("it is not a socket")
	}
	c, err := net.DialTimeout("unix", path, time.Second) //nolint:noctx // it ends within the second
	switch {
	case err == nil:
		c.Close()
		return fmt.Errorf("somebody else serves it: %w", syscall.EADDRINUSE)
	case errors.Is(err, syscall.ECONNREFUSED), errors.Is(err, fs.ErrNotExist):
		return nil
	default: // a full backlog, for one: that is served
		return err
	}
}

// named is a listener with the name that it was given in the end.
type named struct {
	*net.UnixListener

	addr *net.UnixAddr
}

func (n named) Addr() net.Addr { return n.addr }
