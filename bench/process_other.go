//go:build !linux

package main

import (
	"errors"
	"syscall"
	"time"
)

var errLinuxOnly = errors.New("CPU time and memory of another process are read on Linux only")

func withParent() *syscall.SysProcAttr { return nil }

func cpuTime(int) (time.Duration, error) { return 0, errLinuxOnly }

func maxFiles() int { return 1024 }

func resident(int) (float64, error) { return 0, errLinuxOnly }
