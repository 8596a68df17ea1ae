package e2e

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"testing"

	"github.com/stretchr/testify/require"
)

// layOut copies a program of this machine to root, with the libraries that it takes.
func layOut(t *testing.T, root, name string) {
	t.Helper()
	program, err := exec.LookPath(name)
	require.NoError(t, err)
	install(t, readText(t, program), filepath.Join(root, program), 0o755)
	for _, library := range regexp.MustCompile(`/[^ ]+`).FindAllString(command(t, "ldd", program), -1) {
		install(t, readText(t, library), filepath.Join(root, library), 0o755)
	}
}

// The scripts of the package for Fedora and its like, run by rpm in a root with a shell and systemd's programs: an
// installation makes the user and says what to do next, an upgrade restarts the service, and a removal stops it. What
// systemctl would do is only noted.
func TestRPMScripts(t *testing.T) {
	t.Parallel()
	for _, program := range []string{"rpm", "ldd", "systemd-sysusers"} {
		if _, err := exec.LookPath(program); err != nil || os.Geteuid() != 0 {
			t.Skip("it takes " + program + ", and root")
		}
	}
	machine := map[string]string{"amd64": "x86_64", "arm64": "aarch64"}[runtime.GOARCH]
	pkg := builtPackage(t, "*."+machine+".rpm")
	root := t.TempDir()
	require.NoError(t, os.Chmod(root, 0o755))
	layOut(t, root, "sh")
	shell := filepath.Join(root, "bin", "sh")
	if _, err := os.Stat(shell); err != nil { // where it is in /usr/bin
		install(t, readText(t, "/bin/sh"), shell, 0o755)
	}
	layOut(t, root, "systemd-sysusers")
	install(t, "#!/bin/sh\necho \"$*\" >>/called\n", filepath.Join(root, "usr", "bin", "systemctl"), 0o755)
	install(t, "", filepath.Join(root, "dev", "null"), 0o666)
	require.NoError(t, os.MkdirAll(filepath.Join(root, "run", "systemd", "system"), 0o755))
	rpm := func(args ...string) (said, called string) {
		said = command(t, "rpm", append([]string{"--root=" + root, "--nosignature", "--nodeps"}, args...)...)
		called = readText(t, filepath.Join(root, "called"))
		require.NoError(t, os.Remove(filepath.Join(root, "called")))
		return said, called
	}

	said, called := rpm("--install", pkg)
	require.Equal(t, "daemon-reload\n", called, "it is not started before it has a server")
	require.Contains(t, said, "Set the server and the key in /etc/otelcol-opampgateway/environment")
	require.Regexp(t, `(?m)^otelcol-opampgateway:.*nologin$`, readText(t, filepath.Join(root, "etc", "passwd")))

	said, called = rpm("--upgrade", "--replacepkgs", pkg)
	require.Equal(t, "daemon-reload\ntry-restart otelcol-opampgateway.service\ndaemon-reload\n", called, "the last of the package that was there")
	require.NotContains(t, said, "Set the server")

	_, called = rpm("--erase", "otelcol-opampgateway")
	require.Equal(t, "--no-reload disable --now otelcol-opampgateway.service\ndaemon-reload\n", called)
}
