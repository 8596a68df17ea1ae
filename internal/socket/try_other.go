//go:build !unix

package socket

import "net"

// newTrier returns nothing: every write may wait.
func newTrier(net.Conn) trier { return nil }
