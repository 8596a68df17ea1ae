package main

import (
	"errors"
	"fmt"
	"io"
	"net/rpc"
	"os"
	"os/exec"
	"strings"
)

// Server, agents and the naive relay run in processes of their own, so that each one's CPU time
// and memory can be told from the others'. They are this program again, started with -role; what
// they shall do is called over their standard input and output. They end when that does.

func playRole(name string) error {
	roles := map[string]any{"server": &server{}, "load": &load{}, "naive": &naive{}}
	role := roles[name]
	if role == nil {
		return fmt.Errorf("there is no role %q", name)
	}
	calls := rpc.NewServer()
	if err := calls.RegisterName("Role", role); err != nil {
		return err
	}
	calls.ServeConn(struct {
		io.Reader
		io.WriteCloser
	}{os.Stdin, os.Stdout})
	return nil
}

// role is such a process, seen from where it is started.
type role struct {
	*process
	calls *rpc.Client
}

func startRole(name, logFile string) (*role, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(self, "-role", name)
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	p, err := startProcess(name, cmd, logFile)
	if err != nil {
		return nil, err
	}
	return &role{p, rpc.NewClient(struct {
		io.Reader
		io.WriteCloser
	}{out, in})}, nil
}

// call calls a method of the role. The time that it may take is the method's own affair: each
// has its deadline.
func (r *role) call(method string, args, reply any) error {
	if args == nil {
		args = struct{}{}
	}
	if reply == nil {
		reply = &struct{}{}
	}
	err := r.calls.Call("Role."+method, args, reply)
	if errors.Is(err, rpc.ErrShutdown) || errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("the %s process has ended: %s", r.name, strings.TrimSpace(r.tail()))
	}
	if err != nil {
		return fmt.Errorf("%s: %w", strings.ToLower(method), err)
	}
	return nil
}
