package main

import (
	"os"
	"os/exec"
	"runtime"
)

// openPage shows a page in the browser where there is a desktop. Whoever has none has read the address.
func openPage(url string) {
	program := "xdg-open"
	switch {
	case runtime.GOOS == "darwin":
		program = "open"
	case os.Getenv("DISPLAY") == "" && os.Getenv("WAYLAND_DISPLAY") == "":
		return
	}
	cmd := exec.Command(program, url)
	if cmd.Start() == nil {
		go cmd.Wait() //nolint:errcheck // it ends with the process, at the latest
	}
}
