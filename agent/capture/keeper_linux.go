package capture

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"runtime"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"troth.dev/troth/internal/proc"
)

// keeperTimeout bounds a call of a keeper, at both of its ends.
const keeperTimeout = 5 * time.Second

// keeperClients is how many calls a keeper serves at a time. There is one agent, and
// for a moment two.
const keeperClients = 16

// ListenKeeper listens on a Unix socket at path for [ServeKeeper]. Only the same user
// may connect. A socket that nobody serves any more is replaced; the directory must
// be there.
func ListenKeeper(path string) (net.Listener, error) {
	address := &net.UnixAddr{Name: path, Net: "unixpacket"}
	conn, err := net.DialUnix("unixpacket", nil, address)
	switch {
	case err == nil:
		conn.Close()
		return nil, fmt.Errorf("capture: another keeper serves %q", path)
	case errors.Is(err, unix.ECONNREFUSED):
		if err := os.Remove(path); err != nil {
			return nil, fmt.Errorf("capture: %w", err)
		}
	case !errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("capture: %w", err)
	}
	l, err := net.ListenUnix("unixpacket", address)
	if err != nil {
		return nil, fmt.Errorf("capture: %w", err)
	}
	// Until now others may connect, and are turned away for who they are.
	if err := os.Chmod(path, 0o600); err != nil {
		l.Close()
		return nil, fmt.Errorf("capture: %w", err)
	}
	return l, nil
}

// ServeKeeper keeps descriptors for whoever has the same user, until ctx ends. Then it
// closes l and all that it kept, and returns nil. It fails if l is not of
// [ListenKeeper], or is closed by somebody else. A client that says what makes no
// sense is told so and loses its connection, and what was kept is as it was.
func ServeKeeper(ctx context.Context, l net.Listener) error {
	listener, ok := l.(*net.UnixListener)
	if !ok || l.Addr().Network() != "unixpacket" {
		return fmt.Errorf("capture: a keeper needs a socket of packets, not of %q", l.Addr().Network())
	}
	k := &kept{files: make(map[string][]int)}
	defer k.close()
	var running sync.WaitGroup
	defer running.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	running.Go(func() {
		<-ctx.Done()
		l.Close()
	})
	free := make(chan struct{}, keeperClients)
	for {
		conn, err := listener.AcceptUnix()
		switch {
		case err == nil:
		case ctx.Err() != nil:
			return nil // l was closed because ctx ended
		case errors.Is(err, net.ErrClosed):
			return fmt.Errorf("capture: accept: %w", err)
		default: // out of descriptors, most likely
			select {
			case <-time.After(100 * time.Millisecond):
			case <-ctx.Done():
			}
			continue
		}
		select {
		case free <- struct{}{}:
		case <-ctx.Done():
			conn.Close()
			continue
		}
		running.Go(func() {
			defer func() { <-free }()
			defer conn.Close()
			if conn.SetDeadline(time.Now().Add(keeperTimeout)) != nil {
				return
			}
			// Whoever waits for it then does not any more.
			stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
			defer stop()
			k.serve(conn)
		})
	}
}

// kept is what a keeper keeps: descriptors as they are. An [os.File] would wait for
// something to happen to each.
type kept struct {
	mu    sync.Mutex
	files map[string][]int
}

func (k *kept) close() {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, files := range k.files {
		closeAll(files)
	}
	clear(k.files)
}

// serve answers one call.
func (k *kept) serve(conn *net.UnixConn) {
	err := k.answer(conn)
	reply := message{kind: answerDone}
	if err != nil {
		reply = message{kind: answerFailed, text: err.Error()[:min(len(err.Error()), maxComplain)]}
	}
	// Whoever does not hear it knows that it may not have happened.
	_ = send(conn, reply, nil)
}

func (k *kept) answer(conn *net.UnixConn) error {
	// What a client has sent is read whoever it is: it would not hear why it is
	// refused if there was something left.
	request, files, err := receive(conn)
	if err != nil {
		return err
	}
	if err := checkPeer(conn); err != nil {
		closeAll(files)
		return err
	}
	if request.kind != requestKeep && len(files) > 0 {
		closeAll(files)
		return errors.New("files that nobody asked for")
	}
	// A client that stops to read holds the others up until its time is over.
	k.mu.Lock()
	defer k.mu.Unlock()
	switch request.kind {
	case requestKeep:
		before, replaces := k.files[request.text]
		if !replaces && len(k.files) >= maxKept {
			closeAll(files)
			return fmt.Errorf("%d are kept already", maxKept)
		}
		k.files[request.text] = files
		closeAll(before)
	case requestDrop:
		closeAll(k.files[request.text])
		delete(k.files, request.text)
	case requestTake:
		for key, files := range k.files {
			if err := send(conn, message{kind: answerFiles, text: key}, files); err != nil {
				return err
			}
		}
	default:
		return fmt.Errorf("%q is no request", request.kind)
	}
	return nil
}

// checkPeer refuses whoever is another user, root among them.
func checkPeer(conn *net.UnixConn) error {
	peer, err := proc.Peer(conn)
	if err != nil {
		return err
	}
	if int(peer.UID) != os.Geteuid() {
		return fmt.Errorf("user %d is not the keeper's, %d", peer.UID, os.Geteuid())
	}
	return nil
}

// Keep has files kept under a key, in the place of what was kept there. The caller
// still has them, and closes them as it likes.
func (k Keeper) Keep(key string, files []*os.File) error {
	if len(files) > maxFiles {
		return fmt.Errorf("capture: %d files for key %q, of at most %d", len(files), key, maxFiles)
	}
	fds := make([]int, len(files))
	for i, file := range files {
		// Fd would make the socket, which others share, block.
		if err := control(file, func(fd int) error { fds[i] = fd; return nil }); err != nil {
			return fmt.Errorf("capture: %w", err)
		}
	}
	_, err := k.call(message{kind: requestKeep, text: key}, fds)
	for _, file := range files {
		runtime.KeepAlive(file)
	}
	return err
}

// Drop has what is kept under a key forgotten, if there is anything.
func (k Keeper) Drop(key string) error {
	_, err := k.call(message{kind: requestDrop, text: key}, nil)
	return err
}

// Take returns all that is kept, which the caller has to close. The keeper keeps it
// still.
func (k Keeper) Take() (map[string][]*os.File, error) {
	return k.call(message{kind: requestTake}, nil)
}

// call sends a request and returns the files that the answer has.
func (k Keeper) call(request message, fds []int) (files map[string][]*os.File, err error) {
	files = make(map[string][]*os.File)
	defer func() {
		if err != nil {
			for _, all := range files {
				for _, file := range all {
					file.Close()
				}
			}
			files = nil
			err = fmt.Errorf("capture: the keeper at %q: %w", k.Path, err)
		}
	}()
	if request.kind != requestTake {
		if err := checkKey(request.text); err != nil {
			return files, err
		}
	}
	conn, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: k.Path, Net: "unixpacket"})
	if err != nil {
		return files, err
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(keeperTimeout)); err != nil {
		return files, err
	}
	if err := send(conn, request, fds); err != nil {
		return files, err
	}
	for {
		answer, fds, err := receive(conn)
		if err != nil {
			return files, err
		}
		if answer.kind == answerFiles && request.kind == requestTake && files[answer.text] == nil && len(files) < maxKept {
			all := make([]*os.File, len(fds))
			for i, fd := range fds {
				all[i] = os.NewFile(uintptr(fd), "kept for "+answer.text)
			}
			files[answer.text] = all
			continue
		}
		closeAll(fds)
		switch answer.kind {
		case answerDone:
			return files, nil
		case answerFailed:
			return files, errors.New(strings.ToValidUTF8(answer.text, "?"))
		default:
			return files, fmt.Errorf("%q is not what it was asked", answer.kind)
		}
	}
}

func send(conn *net.UnixConn, m message, fds []int) error {
	var rights []byte
	if len(fds) > 0 {
		rights = unix.UnixRights(fds...)
	}
	_, _, err := conn.WriteMsgUnix(m.bytes(), rights, nil)
	return err
}

// receive reads one message and its descriptors. It returns none if it fails.
func receive(conn *net.UnixConn) (m message, fds []int, err error) {
	b := make([]byte, 2+maxComplain+1)
	rights := make([]byte, unix.CmsgSpace(maxFiles*4))
	n, rightsN, flags, _, err := conn.ReadMsgUnix(b, rights)
	if err != nil {
		return message{}, nil, err
	}
	defer func() {
		if err != nil {
			closeAll(fds)
			fds = nil
		}
	}()
	controls, err := unix.ParseSocketControlMessage(rights[:rightsN])
	if err != nil {
		return message{}, nil, err
	}
	for i := range controls {
		got, err := unix.ParseUnixRights(&controls[i])
		if err != nil {
			return message{}, fds, err
		}
		fds = append(fds, got...)
	}
	if flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0 {
		return message{}, fds, fmt.Errorf("a message of too many bytes, or of more than %d files", maxFiles)
	}
	m, err = parseMessage(b[:n])
	return m, fds, err
}

func closeAll(fds []int) {
	for _, fd := range fds {
		unix.Close(fd)
	}
}
