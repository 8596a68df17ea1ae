package main

import "syscall"

// child has the kernel end a process when the soak is killed. What the kernel takes for the
// parent is the thread that starts it: the main goroutine stays on the main thread.
func child() *syscall.SysProcAttr { return &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL} }
