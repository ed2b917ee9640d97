package hbone

import (
	"encoding/binary"
	"time"

	"golang.org/x/net/http2"
)

// turn is a mutex that a goroutine may unlock for another.
type turn chan struct{}

func (t turn) lock()   { t <- struct{}{} }
func (t turn) unlock() { <-t }
func (t turn) tryLock() bool {
	select {
	case t <- struct{}{}:
		return true
	default:
		return false
	}
}

// flush writes the control frames that wait. It waits for nobody: what the socket
// does not take now, and what somebody is writing already, others finish.
func (t *Tunnel) flush() {
	for t.pending() {
		if !t.sending.tryLock() {
			return // whoever holds it looks again when it has unlocked
		}
		if t.wire == nil {
			go func() {
				t.write(t.takeControl(), nil)
				t.sending.unlock()
				t.flush()
			}()
			return
		}
		t.wire.cork()
		// This waits for nobody: control fits into what the wire holds.
		_, err := t.conn.Write(t.takeControl())
		done := false
		if err == nil {
			done, err = t.wire.flush(false)
		}
		if err == nil && !done {
			go func() {
				t.begin()
				_, err := t.wire.flush(true)
				t.finish(err)
				t.sending.unlock()
				t.flush()
			}()
			return
		}
		if err != nil {
			t.broken(err)
		}
		t.sending.unlock()
	}
}

// pending reports whether control frames wait to be written.
func (t *Tunnel) pending() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return len(t.control) > 0 && t.err == nil
}

// maxControl is how much is written at a time. It fits into a wire.
const maxControl = 128 << 10

func (t *Tunnel) takeControl() []byte {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.takeControlLocked()
}

func (t *Tunnel) takeControlLocked() []byte {
	b := t.control
	if len(b) > maxControl {
		b, t.control = b[:maxControl:maxControl], b[maxControl:]
	} else {
		t.control = nil
	}
	t.provoked = 0
	return b
}

// begin and finish are around every write that may wait for the peer.
func (t *Tunnel) begin() { t.writes.Add(1) }

func (t *Tunnel) finish(err error) {
	t.writes.Add(1)
	if err != nil {
		t.broken(err)
	}
}

// broken makes the one that reads find out that nothing can be written any more.
func (t *Tunnel) broken(err error) {
	t.mu.Lock()
	if t.broke == nil {
		t.broke = err
	}
	t.mu.Unlock()
	// What the peer said before it broke the connection may not have been read yet: why
	// it did, perhaps.
	_ = t.below().SetReadDeadline(time.Now().Add(lastWords)) // fails only if it is closed, and then nothing is read
}

// lastWords is how long the reader of a connection that cannot be written any more may
// wait for what is left.
const lastWords = 100 * time.Millisecond

// write writes control frames, and then those in data. sending is held.
func (t *Tunnel) write(control []byte, data func() error) {
	t.begin()
	if t.wire != nil {
		t.wire.cork()
	}
	var err error
	if len(control) > 0 {
		_, err = t.conn.Write(control)
	}
	if err == nil && data != nil {
		err = data()
	}
	if err == nil && t.wire != nil {
		_, err = t.wire.flush(true)
	}
	t.finish(err)
}

// send writes n bytes as DATA of s. They begin at b[frameHeader]: what lies before
// them, and before the part of a frame, takes the frame's header. They were
// reserved. send blocks until the kernel has taken them.
func (t *Tunnel) send(s *Stream, b []byte, n int) error {
	t.sending.lock()
	return t.sendInTurn(s, b, n)
}

// sendInTurn is send for one who holds sending, and unlocks it.
func (t *Tunnel) sendInTurn(s *Stream, b []byte, n int) error {
	t.mu.Lock()
	if s.gone {
		t.sendWindow += int64(n)
		t.feed()
		t.mu.Unlock()
		t.sending.unlock()
		return s.cause()
	}
	control := t.takeControlLocked()
	most := framePayload(t.peer.maxFrame)
	t.mu.Unlock()
	t.write(control, func() error {
		for n > 0 {
			m := min(n, most)
			putDataHeader(b, s.id, m)
			if _, err := t.conn.Write(b[:frameHeader+m]); err != nil {
				return err
			}
			b = b[m:]
			n -= m
		}
		return nil
	})
	t.sending.unlock()
	t.flush()
	return nil
}

// framePayload returns how much goes into a frame: with the header, as many whole
// TLS records as the peer's limit allows.
func framePayload(limit int) int {
	return min((limit+frameHeader)/tlsRecord*tlsRecord, maxFrame) - frameHeader
}

const tlsRecord = 16 << 10

func putDataHeader(b []byte, id uint32, n int) {
	binary.BigEndian.PutUint32(b, uint32(n)<<8|uint32(http2.FrameData))
	b[4] = 0
	binary.BigEndian.PutUint32(b[5:], id)
}

// reserve takes up to n bytes from the windows of s and of the tunnel. If it returns
// 0, wake tells when to try again.
func (t *Tunnel) reserve(s *Stream, n int) int {
	t.mu.Lock()
	defer t.mu.Unlock()
	n = int(min(int64(n), s.sendWindow, t.sendWindow))
	if n > 0 {
		s.sendWindow -= int64(n)
		t.sendWindow -= int64(n)
		return n
	}
	if !s.blocked {
		s.blocked = true
		t.starving++
	}
	return 0
}

// restore gives back what was reserved in vain.
func (t *Tunnel) restore(s *Stream, n int) {
	if n == 0 {
		return
	}
	t.mu.Lock()
	s.sendWindow += int64(n)
	t.sendWindow += int64(n)
	if t.starving > 0 {
		t.feed()
	}
	t.mu.Unlock()
}

// feed wakes the streams that can send again. mu is held.
func (t *Tunnel) feed() {
	if t.starving == 0 || t.sendWindow <= 0 {
		return
	}
	for _, s := range t.streams {
		s.feed()
	}
}

// feed wakes s if it can send again. mu of the tunnel is held.
func (s *Stream) feed() {
	if s.blocked && s.sendWindow > 0 && s.t.sendWindow > 0 {
		s.blocked = false
		s.t.starving--
		if s.reading != nil {
			s.reading.SetReadDeadline(time.Unix(1, 0)) //nolint:errcheck // or it is closed, which wakes too
		} else {
			signal(s.wake)
		}
	}
}

// signal wakes whoever waits for c, now or later.
func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// endSending queues the end of what s sends.
func (t *Tunnel) endSending(s *Stream) {
	t.mu.Lock()
	if !s.gone && !s.sentEnd {
		s.sentEnd = true
		t.control = append(t.control, 0, 0, 0, byte(http2.FrameData), byte(http2.FlagDataEndStream))
		t.control = binary.BigEndian.AppendUint32(t.control, s.id)
		t.removeIfOver(s)
	}
	t.mu.Unlock()
	t.flush()
}

// removeIfOver forgets a stream that both ends have ended. mu is held.
func (t *Tunnel) removeIfOver(s *Stream) {
	if s.sentEnd && s.heardEnd {
		t.remove(s)
	}
}

// remove forgets a stream: nothing of it is sent any more. mu is held.
func (t *Tunnel) remove(s *Stream) {
	if s.gone {
		return
	}
	s.gone = true
	delete(t.streams, s.id)
	t.windows -= s.granted
	if s.blocked {
		s.blocked = false
		t.starving--
	}
	switch {
	case len(t.streams) > 0:
	case t.draining:
		close(t.empty)
	case t.goaway && t.callee == nil:
		go t.fail(errClosed) // it is of no more use, and the caller of this may hold locks
	}
}
