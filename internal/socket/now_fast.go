//go:build linux && (amd64 || arm64)

package socket

import (
	"syscall"
	"unsafe"
)

// writeNow and readNow are the calls that cost least on sockets that never wait: past the file layer
// of the kernel, and without telling Go's scheduler, which only calls that may take long are worth.
func writeNow(fd uintptr, b []byte) (int, error) {
	if len(b) == 0 || len(b) > batchSize {
		return syscall.Write(int(fd), b)
	}
	n, _, errno := syscall.RawSyscall6(syscall.SYS_SENDTO, fd, uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)), syscall.MSG_DONTWAIT|syscall.MSG_NOSIGNAL, 0, 0)
	if errno != 0 {
		return 0, errno
	}
	return int(n), nil
}

func readNow(fd uintptr, b *[inputSize]byte) (int, error) {
	n, _, errno := syscall.RawSyscall6(syscall.SYS_RECVFROM, fd, uintptr(unsafe.Pointer(b)), inputSize, syscall.MSG_DONTWAIT, 0, 0)
	if errno != 0 {
		return 0, errno
	}
	return int(n), nil
}
