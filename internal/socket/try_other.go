//go:build !unix

package socket

import "net"

// rawOf returns nothing: every write may wait, and who waits to read has a buffer.
func rawOf(net.Conn) (trier, waiter) { return nil, nil }

func (*lazyInput) read(uintptr) bool { panic("there are none") }
