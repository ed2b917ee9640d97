package hbone

import "sync"

// Buffers are borrowed when there is something to put into them, and given back when
// it is gone. An idle stream has none, and an idle tunnel neither.
const (
	// largeBuffer takes a frame of maxFrame as TLS records, and a little beside it.
	largeBuffer = maxFrame + 32<<10
	// smallBuffer takes a frame that fills one TLS record, and the start of another.
	smallBuffer = 16<<10 + 512
)

var (
	largeBuffers = sync.Pool{New: func() any { return new([largeBuffer]byte) }} //nolint:gochecknoglobals // memory is of the process
	smallBuffers = sync.Pool{New: func() any { return new([smallBuffer]byte) }} //nolint:gochecknoglobals // memory is of the process
)

// borrow returns a buffer with room for n bytes if that is no more than a large
// buffer has. It is given back by give.
func borrow(n int) []byte {
	if n <= smallBuffer {
		return smallBuffers.Get().(*[smallBuffer]byte)[:]
	}
	return largeBuffers.Get().(*[largeBuffer]byte)[:]
}

// give takes the whole of a buffer.
func give(b []byte) {
	switch cap(b) {
	case smallBuffer:
		smallBuffers.Put((*[smallBuffer]byte)(b[:smallBuffer]))
	case largeBuffer:
		largeBuffers.Put((*[largeBuffer]byte)(b[:largeBuffer]))
	}
}

// queue holds what has arrived and was not delivered yet. Each of its buffers but
// the first and the last is full, so that it takes little more memory than it holds.
type queue struct {
	chunks []chunk
	size   int
}

type chunk struct {
	buffer     []byte
	begin, end int
}

func (q *queue) append(b []byte) {
	for len(b) > 0 {
		last := len(q.chunks) - 1
		if last < 0 || q.chunks[last].end == len(q.chunks[last].buffer) {
			q.chunks = append(q.chunks, chunk{buffer: borrow(len(b))})
			last++
		}
		c := &q.chunks[last]
		n := copy(c.buffer[c.end:], b)
		c.end += n
		q.size += n
		b = b[n:]
	}
}

// read moves bytes from the queue into p.
func (q *queue) read(p []byte) int {
	n := 0
	for n < len(p) && len(q.chunks) > 0 {
		c := &q.chunks[0]
		m := copy(p[n:], c.buffer[c.begin:c.end])
		c.begin += m
		n += m
		if c.begin == c.end {
			give(q.pop().buffer)
		}
	}
	q.size -= n
	return n
}

// take removes the first chunk, if there is one. It is the caller's to give back.
func (q *queue) take() (chunk, bool) {
	if len(q.chunks) == 0 {
		return chunk{}, false
	}
	c := q.pop()
	q.size -= c.end - c.begin
	return c, true
}

func (q *queue) pop() chunk {
	c := q.chunks[0]
	q.chunks[0] = chunk{}
	if q.chunks = q.chunks[1:]; len(q.chunks) == 0 {
		q.chunks = nil
	}
	return c
}

func (q *queue) drop() {
	for _, c := range q.chunks {
		give(c.buffer)
	}
	*q = queue{}
}
