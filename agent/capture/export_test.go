//go:build linux

package capture

var (
	OpenBy       = open
	Inside       = inside
	ParseMessage = parseMessage
)

const (
	SocketMark = socketMark
	ReplyMark  = replyMark
)

func (m message) Bytes() []byte { return m.bytes() }
