package questions

import "maps"

// list is a queue that leads through what is in it, so that it costs no memory of its own, and
// whatever is in the middle is taken out without a search.
type list[T any] struct {
	first, last *element[T]
	len         int
}

// element is the part of something by which it is in a list. It is in one at most.
type element[T any] struct {
	prev, next *element[T]
	value      T // what it is a part of
}

// push adds e at the end.
func (l *list[T]) push(e *element[T]) {
	if e.prev = l.last; e.prev == nil {
		l.first = e
	} else {
		e.prev.next = e
	}
	l.last = e
	l.len++
}

// remove takes e out, wherever it is.
func (l *list[T]) remove(e *element[T]) {
	if e.prev == nil {
		l.first = e.next
	} else {
		e.prev.next = e.next
	}
	if e.next == nil {
		l.last = e.prev
	} else {
		e.next.prev = e.prev
	}
	e.prev, e.next = nil, nil
	l.len--
}

// tableKept is for how many entries a table keeps memory.
const tableKept = 256

// table is a map that gives memory back: Go's keeps what it once needed.
type table[K comparable, V any] struct {
	entries map[K]V
	most    int // entries since the map was made
}

func (t *table[K, V]) get(key K) (V, bool) {
	value, ok := t.entries[key]
	return value, ok
}

func (t *table[K, V]) has(key K) bool {
	_, ok := t.entries[key]
	return ok
}

func (t *table[K, V]) set(key K, value V) {
	if t.entries == nil {
		t.entries = map[K]V{}
	}
	t.entries[key] = value
	t.most = max(t.most, len(t.entries))
}

// remove removes key. When few are left of many, they move to a smaller map: that costs less than
// removing the others did.
func (t *table[K, V]) remove(key K) {
	delete(t.entries, key)
	if t.most <= tableKept || len(t.entries) > t.most/8 {
		return
	}
	left := make(map[K]V, len(t.entries))
	maps.Copy(left, t.entries)
	t.entries, t.most = left, len(left)
}
