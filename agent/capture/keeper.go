package capture

import (
	"errors"
	"fmt"
)

// Keeper is the client of a process that keeps network namespaces and listening
// sockets for an agent that crashes or is replaced, [ServeKeeper]. What arrives while
// no agent runs waits in the sockets for the next.
//
// The agent that starts takes what was kept, opens each namespace with it, and has
// the [Network.Files] kept under the pod's UID. The agent that leaves only calls
// [Network.Close]. Whoever ends a capture drops it. The keeper looks at nothing of
// what it keeps, and forgets it if it is itself restarted: an agent that has it
// keep everything again, now and then, makes up for that.
//
// Each method connects anew, and fails after 5 seconds. Keep and Drop have happened if
// they return nil, and may have if not; both may be repeated.
type Keeper struct {
	// Path is where ServeKeeper listens.
	Path string
}

// What a keeper takes.
const (
	maxKept     = 1024 // keys; a node has 110 pods, or 250
	maxFiles    = 8    // of one key: a namespace and four sockets
	maxKey      = 128  // bytes; a pod's UID has 36
	maxComplain = 512  // bytes of an answer that says why not
)

// A message is one packet: two bytes that say what it is, then a key or a complaint.
// The descriptors of its files come with it. A request has one answer, done or
// failed; only take has each key's files before that.
const (
	protocolVersion = 1

	requestKeep = 'K' // the key's files come with it, and replace those of before
	requestTake = 'T' // all of them; no key
	requestDrop = 'D' // the key's files

	answerFiles  = 'F' // a key, and its files with it
	answerDone   = 'O'
	answerFailed = 'E' // why
)

// message is what a packet says.
type message struct {
	kind byte
	text string
}

func (m message) bytes() []byte { return append([]byte{protocolVersion, m.kind}, m.text...) }

// parseMessage reads a packet, of either direction.
func parseMessage(b []byte) (message, error) {
	if len(b) < 2 {
		return message{}, fmt.Errorf("a message of %d bytes", len(b))
	}
	if b[0] != protocolVersion {
		return message{}, fmt.Errorf("version %d of the protocol, where %d is spoken", b[0], protocolVersion)
	}
	m := message{kind: b[1], text: string(b[2:])}
	switch m.kind {
	case requestKeep, requestDrop, answerFiles:
		return m, checkKey(m.text)
	case requestTake, answerDone:
		if m.text != "" {
			return message{}, fmt.Errorf("%d bytes too many", len(m.text))
		}
	case answerFailed:
		if len(m.text) > maxComplain {
			return message{}, fmt.Errorf("a complaint of %d bytes", len(m.text))
		}
	default:
		return message{}, fmt.Errorf("unknown message %q", m.kind)
	}
	return m, nil
}

// checkKey takes what is printable, and can be put in a log as it is.
func checkKey(key string) error {
	if key == "" || len(key) > maxKey {
		return fmt.Errorf("a key of %d bytes, want 1 to %d", len(key), maxKey)
	}
	for i := range len(key) {
		if key[i] <= ' ' || key[i] > '~' {
			return errors.New("a key that is not printable")
		}
	}
	return nil
}
