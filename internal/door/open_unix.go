//go:build unix

package door

import "syscall"

// openFiles returns how many files the process may have open.
func openFiles() uint64 {
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		return maxConnections
	}
	return uint64(limit.Cur) //nolint:unconvert // it is signed on some systems
}
