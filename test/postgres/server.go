// Package postgrestest gives tests a real PostgreSQL: the one that Debian
// packages, in a folder of its own, on a Unix socket and no port. Only tests
// import it. It needs Linux.
//
// Start with [Start], a server for one test, or with [Run], one that a TestMain
// shares between the tests of a package, each of which takes a database of its own
// by [Server.Database]. A server is ready in about two seconds.
//
// The server is what it is in production, fsync and all; only sorting is by the
// rules of a language, which look at punctuation last, so that what relies on the
// order of bytes is found out. Its
// methods make the outages that stores have to bear: it is stopped, killed, frozen
// and started again.
package postgrestest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
)

// Superuser is the role that the URLs of a server name. It needs no password.
const Superuser = "postgres"

// Server is one PostgreSQL server. Its methods that stop and start it must not run
// at the same time as each other; all others may.
type Server struct {
	dir       string // data, socket and log; belongs to whom the server runs as
	program   string
	owner     *syscall.Credential // nil for the user of the test
	process   *process            // nil during an outage
	databases atomic.Uint32
}

// Start starts a server that ends with the test. If the test fails, the end of the
// server's log is in the test's.
func Start(t testing.TB) *Server {
	t.Helper()
	s, err := Run(t.Context())
	if err != nil {
		t.Fatalf("start PostgreSQL: %v", err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(s.Log())
		}
		s.Close()
	})
	return s
}

// Run makes a server with nothing in it, in a new temporary folder, and returns
// once it takes connections. ctx bounds the start, not the server's life: the
// caller calls [Server.Close].
func Run(ctx context.Context) (*Server, error) {
	programs, err := programs()
	if err != nil {
		return nil, err
	}
	owner, err := unprivileged()
	if err != nil {
		return nil, err
	}
	// A short path: a socket's has 107 bytes at most.
	dir, err := os.MkdirTemp("", "postgres-")
	if err != nil {
		return nil, err
	}
	s := &Server{dir: dir, program: filepath.Join(programs, "postgres"), owner: owner}
	if err := s.init(ctx, filepath.Join(programs, "initdb")); err != nil {
		s.Close()
		return nil, err
	}
	if err := s.start(ctx); err != nil {
		s.Close()
		return nil, err
	}
	return s, nil
}

// Close ends the server at once, whatever state it is in, and removes its folder.
func (s *Server) Close() {
	if s.process != nil {
		s.process.kill()
		s.process = nil
	}
	os.RemoveAll(s.dir)
}

// Database makes an empty database that nobody else has, and returns its URL.
func (s *Server) Database(t testing.TB) string {
	t.Helper()
	name := fmt.Sprintf("test_%d", s.databases.Add(1))
	s.Execute(t, s.url(maintenance), "CREATE DATABASE "+name)
	return s.url(name)
}

// Execute runs SQL, one or more statements, as whom url says. It fails the test
// if they fail.
func (s *Server) Execute(t testing.TB, url, statements string) {
	t.Helper()
	// Not the test's context: a cleanup, too, may have something to say.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), patience)
	defer cancel()
	if err := execute(ctx, url, statements); err != nil {
		t.Fatalf("execute %.200q: %v", statements, err)
	}
}

// Log returns the end of the server's log, for people.
func (s *Server) Log() string {
	const lines = 40
	content, err := os.ReadFile(s.logFile())
	if err != nil {
		return err.Error()
	}
	all := bytes.Split(bytes.TrimSpace(content), []byte("\n"))
	last := all[max(0, len(all)-lines):]
	return fmt.Sprintf("the last %d lines of PostgreSQL's log:\n%s", len(last), bytes.Join(last, []byte("\n")))
}

// Stop begins an outage as an operator would: the server cuts all connections,
// writes a checkpoint and ends.
func (s *Server) Stop(t testing.TB) {
	t.Helper()
	if s.process == nil {
		t.Fatal("stop PostgreSQL: it does not run")
	}
	if !s.process.stop() {
		t.Errorf("PostgreSQL did not stop in %s, and was killed\n%s", patience, s.Log())
	}
	s.process = nil
}

// Kill begins an outage by SIGKILL of all the server's processes: what they had
// not given to the kernel is lost.
func (s *Server) Kill(t testing.TB) {
	t.Helper()
	if s.process == nil {
		t.Fatal("kill PostgreSQL: it does not run")
	}
	s.process.kill()
	s.process = nil
}

// Start ends an outage, and returns once the server has recovered and takes
// connections.
func (s *Server) Start(t testing.TB) {
	t.Helper()
	if s.process != nil {
		t.Fatal("start PostgreSQL: it runs already")
	}
	if err := s.start(context.WithoutCancel(t.Context())); err != nil {
		t.Fatalf("start PostgreSQL: %v", err)
	}
}

// Freeze stops all the server's processes in their tracks, until [Server.Thaw]:
// connections stay and new ones are taken by the kernel, but nobody answers, as
// when a network drops all packets.
func (s *Server) Freeze(t testing.TB) {
	t.Helper()
	if s.process == nil {
		t.Fatal("freeze PostgreSQL: it does not run")
	}
	s.process.freeze()
}

// Thaw lets the server go on.
func (s *Server) Thaw(t testing.TB) {
	t.Helper()
	if s.process == nil {
		t.Fatal("thaw PostgreSQL: it does not run")
	}
	s.process.thaw()
}

const (
	maintenance = "postgres" // the database that is always there
	patience    = time.Minute
)

func (s *Server) init(ctx context.Context, initdb string) error {
	if s.owner != nil {
		if err := os.Chown(s.dir, int(s.owner.Uid), int(s.owner.Gid)); err != nil {
			return err
		}
	}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, initdb,
		"--pgdata="+s.data(),
		"--username="+Superuser,
		"--auth=trust", // the folder is the owner's alone
		"--encoding=UTF8",
		"--locale=C", "--locale-provider=icu", "--icu-locale=en-u-ka-shifted",
		"--no-sync", // a test's machine does not crash between here and the start
		"--no-instructions",
	)
	cmd.Dir = s.dir
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: s.owner}
	if output, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("initdb: %w\n%s", err, output)
	}
	return nil
}

func (s *Server) start(ctx context.Context) error {
	p, err := startProcess(s.logFile(), s.dir, s.owner, s.program,
		"-D", s.data(),
		"-c", "listen_addresses=",
		"-c", "unix_socket_directories="+s.dir,
		// After a kill it flushes every file, of which each database has a
		// thousand: by file that takes 10 s.
		"-c", "recovery_init_sync_method=syncfs",
	)
	if err != nil {
		return err
	}
	if err := s.awaitReady(ctx, p); err != nil {
		p.kill()
		return err
	}
	s.process = p
	return nil
}

// awaitReady polls the server, which tells nobody when it has recovered.
func (s *Server) awaitReady(ctx context.Context, p *process) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	poll := time.NewTicker(20 * time.Millisecond)
	defer poll.Stop()
	for {
		err := execute(ctx, s.url(maintenance), "SELECT")
		if err == nil {
			return nil
		}
		select {
		case <-poll.C:
		case <-p.done:
			return fmt.Errorf("it ended: %s\n%s", p.cmd.ProcessState, s.Log())
		case <-ctx.Done():
			return fmt.Errorf("it takes no connections: %w\n%s", err, s.Log())
		}
	}
}

func (s *Server) data() string    { return filepath.Join(s.dir, "data") }
func (s *Server) logFile() string { return filepath.Join(s.dir, "log") }

func (s *Server) url(database string) string {
	u := url.URL{
		Scheme: "postgres", User: url.User(Superuser), Path: "/" + database,
		RawQuery: url.Values{"host": {s.dir}}.Encode(),
	}
	return u.String()
}

func execute(ctx context.Context, url, statements string) error {
	conn, err := pgx.Connect(ctx, url)
	if err != nil {
		return err
	}
	defer conn.Close(ctx)
	_, err = conn.PgConn().Exec(ctx, statements).ReadAll()
	return err
}

// programs returns the folder of the newest PostgreSQL on this machine.
func programs() (string, error) {
	found, err := filepath.Glob("/usr/lib/postgresql/*/bin/postgres")
	if err != nil {
		return "", err
	}
	version := func(path string) int {
		n, _ := strconv.Atoi(filepath.Base(filepath.Dir(filepath.Dir(path))))
		return n
	}
	if len(found) > 0 {
		return filepath.Dir(slices.MaxFunc(found, func(a, b string) int { return version(a) - version(b) })), nil
	}
	path, err := exec.LookPath("postgres")
	if err != nil {
		return "", errors.New("the tests need PostgreSQL, and there is neither /usr/lib/postgresql/*/bin/postgres nor postgres in PATH: apt-get install postgresql")
	}
	if path, err = filepath.EvalSymlinks(path); err != nil {
		return "", err
	}
	return filepath.Dir(path), nil
}

// unprivileged returns whom the server runs as: PostgreSQL refuses to run as root.
// It returns nil if the test's own user will do.
func unprivileged() (*syscall.Credential, error) {
	if os.Getuid() != 0 {
		return nil, nil
	}
	account, err := user.Lookup(Superuser)
	if err != nil {
		if account, err = user.Lookup("nobody"); err != nil {
			return nil, fmt.Errorf("PostgreSQL does not run as root: %w", err)
		}
	}
	uid, err := strconv.ParseUint(account.Uid, 10, 32)
	if err != nil {
		return nil, err
	}
	gid, err := strconv.ParseUint(account.Gid, 10, 32)
	if err != nil {
		return nil, err
	}
	return &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}, nil
}
