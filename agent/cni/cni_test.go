package cni_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"troth.dev/troth/agent/cni"
)

func TestVerbs(t *testing.T) {
	ns := namespace(t)
	want, err := cni.NamespaceOf(ns)
	if err != nil {
		t.Fatal(err)
	}
	h := &handler{do: func(_ context.Context, verb string, got *os.File) error {
		if verb != "add" && verb != "check" {
			return nil
		}
		id, err := cni.NamespaceOf(got)
		if err == nil && id != want {
			err = fmt.Errorf("%s came with namespace %v, want %v", verb, id, want)
		}
		return err
	}}
	socket, _ := serve(t, h)
	client := cni.Client{Socket: socket}
	ctx := t.Context()

	many := make([]cni.Attachment, 2000)
	for i := range many {
		many[i] = cni.Attachment{Sandbox: fmt.Sprintf("%064x", i), Interface: "eth0"}
	}
	gone := cni.Pod{Sandbox: "s", Interface: "eth0"}
	for verb, err := range map[string]error{
		"Add":     client.Add(ctx, pod(), ns),
		"Check":   client.Check(ctx, pod(), ns),
		"Delete":  client.Delete(ctx, gone),
		"Collect": client.Collect(ctx, many),
		"Status":  client.Status(ctx),
	} {
		if err != nil {
			t.Errorf("%s = %v", verb, err)
		}
	}
	for _, want := range []string{
		fmt.Sprintf("add %v", pod()), fmt.Sprintf("check %v", pod()),
		fmt.Sprintf("delete %v", gone), fmt.Sprintf("collect %v", many), "status ",
	} {
		if !slices.Contains(h.called(), want) {
			t.Errorf("the handler was not called for %.80s", want)
		}
	}
}

func TestAnswers(t *testing.T) {
	tests := []struct {
		name string
		err  error
		want *cni.Error
	}{
		{"yes", nil, nil},
		{"a reason", &cni.Error{Reason: "POD_NOT_KNOWN", Message: "wait", Retry: true}, &cni.Error{Reason: "POD_NOT_KNOWN", Message: "wait", Retry: true}},
		{"a reason, wrapped", fmt.Errorf("add: %w", &cni.Error{Reason: "NEVER"}), &cni.Error{Reason: "NEVER"}},
		{"none", errors.New("broken"), &cni.Error{Reason: cni.ReasonInternal, Message: "broken", Retry: true}},
		{"one without a reason", &cni.Error{}, &cni.Error{Reason: cni.ReasonInternal, Message: ": ", Retry: true}},
		{"long", errors.New(strings.Repeat("\x01", 1<<20)), &cni.Error{Reason: cni.ReasonInternal, Message: strings.Repeat("\x01", 4<<10), Retry: true}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			socket, _ := serve(t, &handler{do: func(context.Context, string, *os.File) error { return test.err }})
			err := cni.Client{Socket: socket}.Status(t.Context())
			if test.want == nil {
				if err != nil {
					t.Errorf("Status() = %v", err)
				}
				return
			}
			if got, ok := errors.AsType[*cni.Error](err); !ok || *got != *test.want {
				t.Errorf("Status() = %v, want %v", err, test.want)
			}
		})
	}
}

// frame is a message as it is on the wire.
func frame(body string) []byte {
	return append(binary.BigEndian.AppendUint32(nil, uint32(len(body))), body...)
}

// TestRefusals sends what a plugin would not, and counts descriptors: none of what is
// refused stays open.
func TestRefusals(t *testing.T) {
	// Or the collector would close what was forgotten.
	defer debug.SetGCPercent(debug.SetGCPercent(-1))
	ns, second := namespace(t), namespace(t)
	ipc, err := unshare(unix.CLONE_NEWIPC, "ipc")
	if err != nil {
		t.Fatal(err)
	}
	defer ipc.Close()
	own, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	defer own.Close()
	file, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()

	encode := func(change func(map[string]any)) string {
		var m map[string]any
		body, err := json.Marshal(map[string]any{"version": 1, "verb": "add", "pod": pod()})
		if err == nil {
			err = json.Unmarshal(body, &m)
		}
		if err != nil {
			t.Fatal(err)
		}
		change(m)
		if body, err = json.Marshal(m); err != nil {
			t.Fatal(err)
		}
		return string(body)
	}
	inPod := func(key string, value any) string {
		return encode(func(m map[string]any) { m["pod"].(map[string]any)[key] = value })
	}
	add := encode(func(map[string]any) {})
	tests := []struct {
		name    string
		send    []byte
		files   []*os.File
		reason  string
		message string // a part of it
	}{
		{"no descriptor", frame(add), nil, cni.ReasonInvalid, "one descriptor"},
		{"two descriptors", frame(add), []*os.File{ns, second}, cni.ReasonInvalid, "more than one descriptor"},
		{"nine descriptors", frame(add), []*os.File{ns, ns, ns, ns, ns, ns, ns, ns, ns}, cni.ReasonInvalid, "more than one descriptor"},
		{"a status with a descriptor", frame(`{"version":1,"verb":"status"}`), []*os.File{ns}, cni.ReasonInvalid, "no descriptor"},
		{"not a namespace", frame(add), []*os.File{file}, cni.ReasonNamespace, "not a namespace"},
		{"a namespace of another kind", frame(add), []*os.File{ipc}, cni.ReasonNamespace, "not a network namespace"},
		{"the agent's own namespace", frame(add), []*os.File{own}, cni.ReasonNamespace, "the agent itself is in"},
		{"too long", binary.BigEndian.AppendUint32(nil, 1<<20+1), []*os.File{ns}, cni.ReasonInvalid, "more than 1048576"},
		{"no JSON", frame("add me"), []*os.File{ns}, cni.ReasonInvalid, "invalid character"},
		{"empty", frame(""), []*os.File{ns}, cni.ReasonInvalid, "EOF"},
		{"two values", frame(add + "{}"), []*os.File{ns}, cni.ReasonInvalid, "more after its end"},
		{"another version", frame(encode(func(m map[string]any) { m["version"] = 2 })), []*os.File{ns}, cni.ReasonInvalid, "version 2"},
		{"a field of another version", frame(encode(func(m map[string]any) { m["force"] = true })), []*os.File{ns}, cni.ReasonInvalid, "unknown field"},
		{"a verb of another version", frame(encode(func(m map[string]any) { m["verb"] = "move" })), []*os.File{ns}, cni.ReasonInvalid, `verb "move" is not known`},
		{"no pod", frame(encode(func(m map[string]any) { delete(m, "pod") })), []*os.File{ns}, cni.ReasonInvalid, "has a pod"},
		{"attachments", frame(encode(func(m map[string]any) { m["keep"] = []any{} })), []*os.File{ns}, cni.ReasonInvalid, "no attachments"},
		{"no UID", frame(inPod("uid", "")), []*os.File{ns}, cni.ReasonInvalid, `UID "" is malformed`},
		{"a UID that is a path", frame(inPod("uid", "../../etc/passwd")), []*os.File{ns}, cni.ReasonInvalid, "UID"},
		{"a namespace in capitals", frame(inPod("namespace", "Shop")), []*os.File{ns}, cni.ReasonInvalid, "namespace"},
		{"a long name", frame(inPod("name", strings.Repeat("a", 254))), []*os.File{ns}, cni.ReasonInvalid, "name"},
		{"a sandbox with a slash", frame(inPod("sandbox", "a/b")), []*os.File{ns}, cni.ReasonInvalid, "sandbox"},
		{"a long interface", frame(inPod("interface", "eth0123456789012")), []*os.File{ns}, cni.ReasonInvalid, "interface"},
		{"an interface with a space", frame(inPod("interface", "eth 0")), []*os.File{ns}, cni.ReasonInvalid, "interface"},
		{"no path", frame(inPod("netns", "")), []*os.File{ns}, cni.ReasonInvalid, "path"},
		{"a status with a pod", frame(encode(func(m map[string]any) { m["verb"] = "status" })), nil, cni.ReasonInvalid, "neither"},
		{"an attachment without a sandbox", frame(`{"version":1,"verb":"collect","keep":[{"interface":"eth0"}]}`), nil, cni.ReasonInvalid, "sandbox"},
		{"too many attachments", frame(`{"version":1,"verb":"collect","keep":[` + strings.Repeat(`{"sandbox":"a","interface":"b"},`, 8192) + `{"sandbox":"a","interface":"b"}]}`), nil, cni.ReasonInvalid, "at most 8192"},
	}
	h := &handler{}
	socket, _ := serve(t, h)
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			before := descriptors(t)
			answer := exchange(t, socket, test.send, test.files)
			if answer.OK || answer.Reason != test.reason || !strings.Contains(answer.Message, test.message) || answer.Retry {
				t.Errorf("answer = %+v, want reason %s and a message about %q", answer, test.reason, test.message)
			}
			eventually(t, fmt.Sprintf("as few descriptors as before, %d", before), func() bool { return descriptors(t) <= before })
		})
	}
	if called := h.called(); len(called) > 0 {
		t.Errorf("the handler was called: %v", called)
	}
}

type answer struct {
	OK              bool
	Reason, Message string
	Retry           bool
}

// exchange sends bytes with descriptors and reads the answer.
func exchange(t *testing.T, socket string, send []byte, files []*os.File) (a answer) {
	t.Helper()
	c, err := net.Dial("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	var fds []int
	for _, f := range files {
		fds = append(fds, int(f.Fd()))
	}
	n, _, err := c.(*net.UnixConn).WriteMsgUnix(send, unix.UnixRights(fds...), nil)
	if err == nil && n < len(send) {
		_, err = c.Write(send[n:])
	}
	if err != nil {
		t.Fatal(err)
	}
	var length [4]byte
	if _, err := io.ReadFull(c, length[:]); err != nil {
		t.Fatalf("read the answer: %v", err)
	}
	body := make([]byte, binary.BigEndian.Uint32(length[:]))
	if _, err := io.ReadFull(c, body); err != nil {
		t.Fatalf("read the answer: %v", err)
	}
	if err := json.Unmarshal(body, &a); err != nil {
		t.Fatal(err)
	}
	return a
}

// descriptors returns how many descriptors this process has open, the agent's end of
// every connection among them.
func descriptors(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

// TestHalfARequestIsClosed has a plugin stop in the middle.
func TestHalfARequestIsClosed(t *testing.T) {
	ns := namespace(t)
	socket, stop := serve(t, &handler{})
	before := descriptors(t)
	c, err := net.Dial("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, _, err := c.(*net.UnixConn).WriteMsgUnix([]byte{0, 0, 1}, unix.UnixRights(int(ns.Fd())), nil); err != nil {
		t.Fatal(err)
	}
	stop() // which ends a read that would wait for five seconds
	c.Close()
	if after := descriptors(t); after >= before {
		t.Errorf("%d descriptors, want fewer than the %d with a listener", after, before)
	}
}

func TestThePluginHangsUp(t *testing.T) {
	began, ended := make(chan struct{}), make(chan error, 1)
	h := &handler{do: func(ctx context.Context, _ string, _ *os.File) error {
		close(began)
		<-ctx.Done()
		ended <- ctx.Err()
		return ctx.Err()
	}}
	socket, _ := serve(t, h)
	before := descriptors(t)
	plugin := helper(t, "add", socket)
	if err := plugin.Start(); err != nil {
		t.Fatal(err)
	}
	<-began
	if err := plugin.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	plugin.Wait()
	select {
	case <-ended:
	case <-time.After(10 * time.Second):
		t.Fatal("the handler goes on for a plugin that was killed")
	}
	eventually(t, "as few descriptors as before", func() bool { return descriptors(t) <= before })
}

func TestTheAgentIsSlow(t *testing.T) {
	ended := make(chan struct{})
	h := &handler{do: func(ctx context.Context, _ string, _ *os.File) error {
		defer close(ended)
		<-ctx.Done()
		return nil // which the plugin must not take for an answer
	}}
	socket, _ := serve(t, h)
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	err := cni.Client{Socket: socket}.Add(ctx, pod(), namespace(t))
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Add() = %v, want %v", err, context.DeadlineExceeded)
	}
	<-ended
}

func TestTheAgentEnds(t *testing.T) {
	began := make(chan struct{})
	h := &handler{do: func(ctx context.Context, _ string, _ *os.File) error {
		close(began)
		<-ctx.Done()
		return ctx.Err()
	}}
	socket, stop := serve(t, h)
	answered := make(chan error)
	go func() { answered <- cni.Client{Socket: socket}.Status(context.Background()) }()
	<-began
	stop()
	err := <-answered
	if got, ok := errors.AsType[*cni.Error](err); !ok || got.Reason != cni.ReasonEnding || !got.Retry {
		t.Errorf("Status() = %v, want %s, to be tried again", err, cni.ReasonEnding)
	}
	if err := (cni.Client{Socket: socket}).Status(t.Context()); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("Status(nobody there) = %v, want %v", err, os.ErrNotExist)
	}
}

func TestTheAgentDies(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "cni.sock")
	agent := helper(t, "serve", socket)
	out, err := agent.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := agent.Start(); err != nil {
		t.Fatal(err)
	}
	if line, err := bufio.NewReader(out).ReadString('\n'); err != nil {
		t.Fatalf("helper said %q: %v", line, err)
	}
	err = cni.Client{Socket: socket}.Add(t.Context(), pod(), namespace(t))
	agent.Wait()
	if _, refused := errors.AsType[*cni.Error](err); err == nil || refused {
		t.Errorf("Add() = %v, want an error that is no answer", err)
	}
	// The socket is still there, and nobody behind it.
	err = cni.Client{Socket: socket}.Add(t.Context(), pod(), namespace(t))
	if !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("Add() = %v, want %v", err, syscall.ECONNREFUSED)
	}
}

// TestOnlyRoot has another user at either end.
func TestOnlyRoot(t *testing.T) {
	// Where another user can get.
	dir, err := os.MkdirTemp("", "troth-cni-test")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	program := filepath.Join(dir, "helper")
	content, err := os.ReadFile(self)
	if err == nil {
		err = os.WriteFile(program, content, 0o755)
	}
	if err != nil {
		t.Fatal(err)
	}
	nobody := &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}

	h := &handler{}
	served, _ := serve(t, h)
	open := filepath.Join(dir, "open.sock")
	for _, folder := range []string{filepath.Dir(served), filepath.Dir(filepath.Dir(served))} {
		if err := os.Chmod(folder, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chmod(served, 0o777); err != nil {
		t.Fatal(err)
	}
	caller := helper(t, "ask", served)
	caller.Path, caller.SysProcAttr = program, nobody
	out, err := caller.Output()
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.HasPrefix(out, []byte("cni: ask the agent: ")) {
		t.Errorf("Status() of another user = %q, want a connection that is closed", out)
	}
	if called := h.called(); len(called) > 0 {
		t.Errorf("the handler was called: %v", called)
	}

	agent := helper(t, "serve", open)
	agent.Path, agent.SysProcAttr = program, nobody
	stdout, err := agent.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := agent.Start(); err != nil {
		t.Fatal(err)
	}
	defer agent.Wait()
	defer agent.Process.Kill()
	if line, err := bufio.NewReader(stdout).ReadString('\n'); err != nil {
		t.Fatalf("helper said %q: %v", line, err)
	}
	want := fmt.Sprintf("cni: %q is served by user 65534, not by root", open)
	if err := (cni.Client{Socket: open}).Status(t.Context()); err == nil || err.Error() != want {
		t.Errorf("Status() = %v, want %q", err, want)
	}
}

func TestAnswersThatAreNone(t *testing.T) {
	for _, body := range []string{``, `{}`, `{"ok":false}`, `{"ok":true,"reason":"NO"}`, `null`, `{"ok":true}{}`, `yes`} {
		if err := readAnswer(t, frame(body)); err == nil {
			t.Errorf("answer %q is taken for yes", body)
		} else if _, refused := errors.AsType[*cni.Error](err); refused {
			t.Errorf("answer %q is taken for no: %v", body, err)
		}
	}
	if err := readAnswer(t, frame(`{"ok":true,"later":1}`)); err != nil {
		t.Errorf("answer with a field of a later release: %v", err)
	}
}

// readAnswer has the client read bytes.
func readAnswer(tb testing.TB, answer []byte) error {
	tb.Helper()
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		tb.Fatal(err)
	}
	var ends [2]*net.UnixConn
	for i, fd := range pair {
		f := os.NewFile(uintptr(fd), "pair")
		c, err := net.FileConn(f)
		f.Close()
		if err != nil {
			tb.Fatal(err)
		}
		defer c.Close()
		ends[i] = c.(*net.UnixConn)
	}
	if _, err := ends[1].Write(answer); err != nil {
		tb.Fatal(err)
	}
	if err := ends[1].CloseWrite(); err != nil {
		tb.Fatal(err)
	}
	return cni.ReadAnswer(ends[0])
}

func FuzzRequest(f *testing.F) {
	body, err := json.Marshal(map[string]any{"version": 1, "verb": "add", "pod": pod()})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(body)
	f.Add([]byte(`{"version":1,"verb":"collect","keep":[{"sandbox":"a","interface":"eth0"}]}`))
	f.Add([]byte(`{"version":1,"verb":"status"}`))
	f.Fuzz(func(t *testing.T, body []byte) {
		verb, pod, keep, err := cni.ParseRequest(body)
		if err != nil {
			return
		}
		if len(keep) > 0 && verb != "collect" {
			t.Errorf("%q has attachments", verb)
		}
		if pod == nil {
			return
		}
		// The UID becomes a file's name.
		if verb != "delete" && (pod.UID == "" || pod.Netns == "") {
			t.Errorf("%q has pod %+v", verb, pod)
		}
		if strings.ContainsAny(pod.UID, "/.\x00") || len(pod.UID) > 128 || strings.ContainsAny(pod.Sandbox+pod.Interface, "/\x00") {
			t.Errorf("pod %+v", pod)
		}
	})
}

func FuzzAnswer(f *testing.F) {
	f.Add(frame(`{"ok":true}`))
	f.Add(frame(`{"reason":"CAPTURE_FAILED","message":"m","retry":true}`))
	f.Add([]byte{0, 0xff, 0xff, 0xff})
	f.Fuzz(func(t *testing.T, answer []byte) {
		if len(answer) > 32<<10 {
			return // more than the socket takes at once, and nobody reads yet
		}
		if err := readAnswer(t, answer); err == nil && !bytes.Contains(bytes.ToLower(answer), []byte("ok")) {
			t.Errorf("%q is taken for yes", answer)
		}
	})
}
