package directory

import "net/netip"

// Reader is the addresses that the agent of one node holds. [Index.Reader] makes it.
// Its methods may be called from many goroutines; of Next, one at a time.
type Reader struct {
	index *Index
	node  *node
	news  chan struct{} // has one element while there may be something to read

	held   map[netip.Addr]*held // nil once it is closed; guarded by index.mu, as is all below
	marked []*held              // those to answer again, each once, in the order in which they were marked
	gone   int                  // how many of marked were forgotten since
}

// held is one address that a reader holds.
type held struct {
	reader  *Reader
	at      *address
	spelled string
	sent    *Behind
	place   int  // in at.held
	marked  bool // whether it is among the reader's marked
	again   bool // whether it is answered even if nothing has changed
}

// Answer is what is behind an address that a reader holds.
type Answer struct {
	Address string // as it was spelled
	Behind  *Behind
}

// Reader returns a reader that holds nothing. The caller closes it.
func (i *Index) Reader(node string) *Reader {
	i.mu.Lock()
	defer i.mu.Unlock()
	r := &Reader{index: i, node: i.nodeOf(node), news: make(chan struct{}, 1), held: make(map[netip.Addr]*held)}
	r.node.readers[r] = true
	return r
}

// Hold has the address answered, and answered again after each change. One that is
// held already is answered again. spelled is how the answer names it.
func (r *Reader) Hold(a netip.Addr, spelled string) {
	r.index.mu.Lock()
	defer r.index.mu.Unlock()
	if r.held == nil {
		return
	}
	h := r.held[a]
	if h == nil {
		at := r.index.addressOf(a)
		if len(at.held) == 0 {
			at.outdated = true
		}
		h = &held{reader: r, at: at, place: len(at.held)}
		at.held = append(at.held, h)
		r.held[a] = h
	}
	h.spelled, h.again = spelled, true
	h.mark()
}

// Forget ends it. What Next has returned is not called back.
func (r *Reader) Forget(a netip.Addr) {
	r.index.mu.Lock()
	defer r.index.mu.Unlock()
	if h := r.held[a]; h != nil {
		delete(r.held, a)
		r.index.release(h)
		if h.marked {
			r.gone++
			r.sweep()
		}
	}
}

// sweep drops what was forgotten from marked before it is half of it: whoever holds
// and forgets without reading must not fill the memory.
func (r *Reader) sweep() {
	if r.gone <= len(r.marked)/2 {
		return
	}
	kept := make([]*held, 0, len(r.held))
	for _, h := range r.marked {
		if h.at != nil {
			kept = append(kept, h)
		}
	}
	r.marked, r.gone = kept, 0
}

// Held returns how many addresses are held.
func (r *Reader) Held() int {
	r.index.mu.Lock()
	defer r.index.mu.Unlock()
	return len(r.held)
}

// News returns a channel that has an element when there may be something for Next.
func (r *Reader) News() <-chan struct{} { return r.news }

// Next returns the newest answer of an address that was not answered yet or has
// another one since, and false if there is none. It does not wait. Each change is
// returned once, and none that was overtaken by another.
func (r *Reader) Next() (Answer, bool) {
	r.index.mu.Lock()
	defer r.index.mu.Unlock()
	for len(r.marked) > 0 {
		h := r.marked[0]
		r.marked[0] = nil
		if r.marked = r.marked[1:]; len(r.marked) == 0 {
			r.marked = nil
		}
		h.marked = false
		if h.at == nil {
			r.gone--
			continue // forgotten meanwhile
		}
		behind := r.index.behind(h.at, r.node)
		if !h.again && behind.equal(h.sent) {
			continue
		}
		h.sent, h.again = behind, false
		return Answer{Address: h.spelled, Behind: behind}, true
	}
	return Answer{}, false
}

// Close forgets all addresses. From then on there is nothing to read.
func (r *Reader) Close() {
	r.index.mu.Lock()
	defer r.index.mu.Unlock()
	for _, h := range r.held {
		r.index.release(h)
	}
	r.held, r.marked = nil, nil
	delete(r.node.readers, r)
	r.index.dropNode(r.node)
}

// release lets go of an address, and of what was kept for those who hold it.
func (i *Index) release(h *held) {
	at := h.at
	last := at.held[len(at.held)-1]
	at.held[h.place] = last
	last.place = h.place
	at.held[len(at.held)-1] = nil
	at.held = at.held[:len(at.held)-1]
	h.at, h.sent = nil, nil
	if len(at.held) > 0 {
		return
	}
	at.held, at.behind = nil, nil
	for _, s := range at.services {
		s.forget(i)
	}
	i.dropAddress(at)
}

// forget drops the views once nobody holds an address of the Service.
func (s *service) forget(i *Index) {
	for _, a := range s.object.Addresses {
		if len(i.addresses[a].held) > 0 {
			return
		}
	}
	s.views = nil
}

// mark has the reader answer again.
func (h *held) mark() {
	if h.marked {
		return
	}
	h.marked = true
	r := h.reader
	r.marked = append(r.marked, h)
	select {
	case r.news <- struct{}{}:
	default:
	}
}
