package cni

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"regexp"
	"strings"

	"golang.org/x/sys/unix"
)

// A message is a length of 4 bytes, big-endian, and so many bytes of JSON. The
// descriptor comes with a request's first bytes. After its request the plugin sends
// nothing more and keeps its end open, so that the agent sees it hang up.

// wireVersion is the version of what is said. An agent refuses any other: the plugin
// and the agent are installed together, and what one does not know it must not guess.
const wireVersion = 1

// Bounds on what is read. A node has a few hundred pods, and an attachment takes
// about a hundred bytes.
const (
	maxRequest     = 1 << 20
	maxAnswer      = 64 << 10
	maxAttachments = 8192
	maxMessage     = 4 << 10 // of an error, before JSON escapes it
)

type request struct {
	Version int          `json:"version"`
	Verb    string       `json:"verb"`
	Pod     *Pod         `json:"pod,omitempty"`
	Keep    []Attachment `json:"keep,omitempty"`
}

type answer struct {
	OK      bool   `json:"ok"`
	Reason  string `json:"reason,omitempty"`
	Message string `json:"message,omitempty"`
	Retry   bool   `json:"retry,omitempty"`
}

const (
	verbAdd     = "add"
	verbCheck   = "check"
	verbDelete  = "delete"
	verbCollect = "collect"
	verbStatus  = "status"
)

// wantsNamespace reports whether a request of this verb comes with a namespace.
func wantsNamespace(verb string) bool { return verb == verbAdd || verb == verbCheck }

// parseRequest reads the JSON of a request. What it returns has been checked.
func parseRequest(body []byte) (*request, error) {
	var r request
	if err := decode(body, &r, true); err != nil {
		return nil, invalid("request: %v", err)
	}
	if r.Version != wireVersion {
		return nil, invalid("version %d of the request is not known, only %d is: the plugin and the agent are of different releases", r.Version, wireVersion)
	}
	switch r.Verb {
	case verbAdd, verbCheck, verbDelete:
		if r.Pod == nil || r.Keep != nil {
			return nil, invalid("%q has a pod and no attachments", r.Verb)
		}
		if err := r.Pod.check(r.Verb == verbDelete); err != nil {
			return nil, invalid("pod: %v", err)
		}
	case verbCollect:
		if r.Pod != nil || len(r.Keep) > maxAttachments {
			return nil, invalid("%q has no pod and at most %d attachments", r.Verb, maxAttachments)
		}
		for _, a := range r.Keep {
			if !sandboxForm.MatchString(a.Sandbox) {
				return nil, invalid("attachment: sandbox %q is malformed", a.Sandbox)
			}
			if err := checkInterface(a.Interface); err != nil {
				return nil, invalid("attachment: %v", err)
			}
		}
	case verbStatus:
		if r.Pod != nil || r.Keep != nil {
			return nil, invalid("%q has neither a pod nor attachments", r.Verb)
		}
	default:
		return nil, invalid("verb %q is not known", r.Verb)
	}
	return &r, nil
}

// The forms of what names a pod. They are stricter than Kubernetes and CNI where
// what follows the name would be misled: a UID becomes the name of a file.
var (
	nameForm    = regexp.MustCompile(`^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$`)
	uidForm     = regexp.MustCompile(`^[0-9a-zA-Z][0-9a-zA-Z-]{0,127}$`)
	sandboxForm = regexp.MustCompile(`^[0-9a-zA-Z][0-9a-zA-Z_.-]{0,127}$`)
)

const maxPath = 4096 // PATH_MAX

// check refuses a pod that nobody could have. Deletes are lenient: a runtime may
// have lost all but the sandbox.
func (p *Pod) check(deleted bool) error {
	optional := func(value string, form *regexp.Regexp) bool {
		return (deleted && value == "") || form.MatchString(value)
	}
	switch {
	case !optional(p.Namespace, nameForm):
		return fmt.Errorf("namespace %q is malformed", p.Namespace)
	case !optional(p.Name, nameForm):
		return fmt.Errorf("name %q is malformed", p.Name)
	case !optional(p.UID, uidForm):
		return fmt.Errorf("UID %q is malformed", p.UID)
	case !sandboxForm.MatchString(p.Sandbox):
		return fmt.Errorf("sandbox %q is malformed", p.Sandbox)
	case p.Netns == "" && !deleted, len(p.Netns) > maxPath, strings.ContainsRune(p.Netns, 0):
		return fmt.Errorf("path %.100q of the namespace is empty, too long or malformed", p.Netns)
	}
	return checkInterface(p.Interface)
}

// checkInterface refuses what the kernel would not have as an interface's name.
func checkInterface(name string) error {
	const maxLength = 15 // IFNAMSIZ, less the zero at the end
	if name == "" || len(name) > maxLength || name == "." || name == ".." || strings.ContainsAny(name, "/: \t\n\v\f\r\x00") {
		return fmt.Errorf("interface %.100q is malformed", name)
	}
	return nil
}

// decode reads exactly one JSON value.
func decode(body []byte, into any, strict bool) error {
	d := json.NewDecoder(bytes.NewReader(body))
	if strict {
		d.DisallowUnknownFields()
	}
	if err := d.Decode(into); err != nil {
		return err
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return errors.New("there is more after its end")
	}
	return nil
}

// send writes one message, with a descriptor unless file is nil.
func send(c *net.UnixConn, message any, limit int, file *os.File) error {
	body, err := json.Marshal(message)
	if err != nil {
		return err
	}
	if len(body) > limit {
		return fmt.Errorf("a message of %d bytes is more than %d", len(body), limit)
	}
	frame := append(binary.BigEndian.AppendUint32(nil, uint32(len(body))), body...)
	if file != nil {
		var n int
		var sendErr error
		raw, err := file.SyscallConn()
		if err != nil {
			return err
		}
		// The descriptor must not be closed, and its number given to another, while
		// the kernel takes it.
		err = raw.Control(func(fd uintptr) {
			n, _, sendErr = c.WriteMsgUnix(frame, unix.UnixRights(int(fd)), nil)
		})
		if err := errors.Join(err, sendErr); err != nil {
			return err
		}
		frame = frame[n:]
	}
	if len(frame) == 0 {
		return nil // to write nothing is to ask whether the reader is still there
	}
	_, err = c.Write(frame)
	return err
}

// receive reads one message and the descriptors that came with it, which are the
// caller's to close, whether or not it fails.
func receive(c *net.UnixConn, limit int) (body []byte, files []*os.File, err error) {
	r := &receiver{conn: c}
	var length [4]byte
	if _, err := io.ReadFull(r, length[:]); err != nil {
		return nil, r.files, err
	}
	n := binary.BigEndian.Uint32(length[:])
	if int64(n) > int64(limit) {
		return nil, r.files, fmt.Errorf("a message of %d bytes is more than %d", n, limit)
	}
	// What a length promises is not allocated before it is there.
	body, err = io.ReadAll(io.LimitReader(r, int64(n)))
	if err == nil && len(body) < int(n) {
		err = io.ErrUnexpectedEOF
	}
	return body, r.files, err
}

// receiver reads a connection and collects the descriptors that it meets.
type receiver struct {
	conn  *net.UnixConn
	files []*os.File
}

// Read fails as soon as there are more descriptors than any message has.
func (r *receiver) Read(p []byte) (int, error) {
	// Room for one; by the alignment of control messages, two fit. More are closed
	// by the kernel, which says so by MSG_CTRUNC.
	var control [64]byte
	n, controlLength, flags, _, err := r.conn.ReadMsgUnix(p, control[:unix.CmsgSpace(4)])
	if controlLength > 0 {
		// Even of what is refused: they are open here already.
		r.files = append(r.files, filesOf(control[:controlLength])...)
	}
	switch {
	case err != nil:
		return n, err
	case flags&unix.MSG_CTRUNC != 0, len(r.files) > 1:
		return n, errors.New("more than one descriptor")
	case n == 0 && len(p) > 0:
		return 0, io.EOF
	}
	return n, nil
}

// filesOf returns the descriptors in control messages. There are no other kinds on
// a socket that has not asked for them.
func filesOf(control []byte) (files []*os.File) {
	messages, err := unix.ParseSocketControlMessage(control)
	if err != nil {
		return nil
	}
	for _, m := range messages {
		descriptors, err := unix.ParseUnixRights(&m)
		if err != nil {
			continue
		}
		for _, fd := range descriptors {
			files = append(files, os.NewFile(uintptr(fd), "received"))
		}
	}
	return files
}

func closeAll(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}
