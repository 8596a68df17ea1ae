//go:build !linux && !darwin

package socket

import "net"

// LimitUnsent does nothing: the kernel cannot be told how much to take.
func LimitUnsent(net.Conn) {}
