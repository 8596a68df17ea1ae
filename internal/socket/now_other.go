//go:build unix && !(linux && (amd64 || arm64))

package socket

import "syscall"

func writeNow(fd uintptr, b []byte) (int, error) { return syscall.Write(int(fd), b) }

func readNow(fd uintptr, b *[inputSize]byte) (int, error) { return syscall.Read(int(fd), b[:]) }
