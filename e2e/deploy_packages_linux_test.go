package e2e

import (
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
)

// builtPackage finds what "make packages" has made.
func builtPackage(t *testing.T, pattern string) string {
	t.Helper()
	found, err := filepath.Glob("../build/packages/" + pattern)
	require.NoError(t, err)
	require.Len(t, found, 1, "build it with \"make packages\"")
	path, err := filepath.Abs(found[0])
	require.NoError(t, err)
	return path
}

// command runs a program that has to succeed.
func command(t *testing.T, name string, args ...string) string {
	t.Helper()
	output, err := exec.Command(name, args...).CombinedOutput()
	require.NoError(t, err, "%s %v: %s", name, args, output)
	return string(output)
}

// filesIn returns what is below root but for what is a package manager's own, with modes.
func filesIn(t *testing.T, root string) map[string]fs.FileMode {
	t.Helper()
	files := map[string]fs.FileMode{}
	require.NoError(t, filepath.WalkDir(root, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() {
			return err
		}
		name := strings.TrimPrefix(path, root)
		if strings.HasPrefix(name, "/var/lib/") || strings.HasPrefix(name, "/var/log/") {
			return nil
		}
		info, err := entry.Info()
		if err == nil {
			files[name] = info.Mode()
		}
		return err
	}))
	return files
}

var packaged = map[string]fs.FileMode{
	"/usr/bin/otelcol-opampgateway":                             0o755,
	"/usr/lib/systemd/system/otelcol-opampgateway.service":      0o644,
	"/usr/lib/sysusers.d/otelcol-opampgateway.conf":             0o644,
	"/etc/otelcol-opampgateway/config.yaml":                     0o644,
	"/etc/otelcol-opampgateway/config-tls.yaml":                 0o644,
	"/etc/otelcol-opampgateway/environment":                     0o600, // keys are in it
	"/usr/share/doc/otelcol-opampgateway/copyright":             0o644,
	"/usr/share/doc/otelcol-opampgateway/CHANGELOG.md":          0o644,
	"/usr/share/doc/otelcol-opampgateway/operations.md":         0o644,
	"/usr/share/doc/otelcol-opampgateway/examples/alerts.yaml":  0o644,
	"/usr/share/doc/otelcol-opampgateway/examples/grafana.json": 0o644,
	"/usr/share/doc/otelcol-opampgateway/examples/haproxy.cfg":  0o644,
}

// The package for Debian is installed in a root of its own: there is a user, systemd takes the service, and what
// the service starts serves agents there. What an operator has changed outlasts an upgrade, and nothing a purge.
func TestDebPackage(t *testing.T) {
	t.Parallel()
	if _, err := exec.LookPath("dpkg"); err != nil || os.Geteuid() != 0 {
		t.Skip("it takes dpkg, and root")
	}
	deb := builtPackage(t, "*_"+runtime.GOARCH+".deb")
	root := t.TempDir()
	require.NoError(t, os.Chmod(root, 0o755))
	for _, empty := range []string{"status", "available"} {
		install(t, "", root+"/var/lib/dpkg/"+empty, 0o644)
	}
	for _, dir := range []string{"info", "updates", "parts"} {
		require.NoError(t, os.MkdirAll(root+"/var/lib/dpkg/"+dir, 0o755))
	}
	dpkg := func(args ...string) string {
		return command(t, "dpkg", append([]string{"--root=" + root, "--force-script-chrootless", "--log=/dev/null"}, args...)...)
	}

	dpkg("--install", deb)
	installed := filesIn(t, root)
	for name, mode := range packaged {
		require.Contains(t, installed, name)
		require.Equal(t, mode, installed[name], name)
	}
	uid := -1
	for line := range strings.Lines(readText(t, root+"/etc/passwd")) {
		if fields := strings.Split(line, ":"); fields[0] == "otelcol-opampgateway" {
			id, err := strconv.Atoi(fields[2])
			require.NoError(t, err)
			uid = id
			require.Contains(t, line, "nologin")
		}
	}
	require.Positive(t, uid, "there is a user")

	// As systemd would, with the environment of the package; but the server is the test's.
	unit := readText(t, root+"/usr/lib/systemd/system/otelcol-opampgateway.service")
	require.Contains(t, unit, "\nEnvironmentFile=/etc/otelcol-opampgateway/environment\n")
	environment := []string{}
	options := ""
	for line := range strings.Lines(readText(t, root+"/etc/otelcol-opampgateway/environment")) {
		line = strings.TrimSpace(line)
		if name, value, found := strings.Cut(line, "="); found && !strings.HasPrefix(line, "#") {
			value = strings.Trim(value, `"`)
			environment = append(environment, name+"="+value)
			if name == "OTELCOL_OPTIONS" {
				options = value
			}
		}
	}
	_, start, found := strings.Cut(unit, "\nExecStart=")
	require.True(t, found)
	start, _, _ = strings.Cut(start, "\n")
	words := strings.Fields(strings.Replace(start, "$OTELCOL_OPTIONS", options, 1))
	s := newSite(t)
	p := &Process{name: "gateway", cmd: exec.Command(words[0], words[1:]...), done: make(chan struct{})}
	p.cmd.Dir = "/"
	p.cmd.Env = append(environment, s.environment...) //nolint:gocritic // the last counts
	p.run(t, &syscall.SysProcAttr{
		Pdeathsig: syscall.SIGTERM, Chroot: root,
		Credential: &syscall.Credential{Uid: uint32(uid), Gid: uint32(uid)},
	})
	s.wantServed(t, "ws://"+s.listen, agentOptions{})
	p.end(t)

	mine := root + "/etc/otelcol-opampgateway/environment"
	install(t, "OPAMP_ENDPOINT=wss://opamp.example/\n", mine, 0o600)
	dpkg("--install", deb)
	require.Equal(t, "OPAMP_ENDPOINT=wss://opamp.example/\n", readText(t, mine), "an upgrade leaves it as it is")
	dpkg("--remove", "otelcol-opampgateway")
	left := filesIn(t, root)
	require.NotContains(t, left, "/usr/bin/otelcol-opampgateway")
	require.Contains(t, left, "/etc/otelcol-opampgateway/environment", "the configuration stays")
	dpkg("--purge", "otelcol-opampgateway")
	for name := range filesIn(t, root) {
		require.NotContains(t, name, "opampgateway", "what a purge leaves")
	}
}

// The package for Fedora and its like has the same in it.
func TestRPMPackage(t *testing.T) {
	t.Parallel()
	if _, err := exec.LookPath("rpm"); err != nil || os.Geteuid() != 0 {
		t.Skip("it takes rpm, and root")
	}
	machine := map[string]string{"amd64": "x86_64", "arm64": "aarch64"}[runtime.GOARCH]
	rpm := builtPackage(t, "*."+machine+".rpm")
	root := t.TempDir()
	// Its scripts are run in TestRPMScripts.
	command(t, "rpm", "--root="+root, "--noscripts", "--nosignature", "--install", rpm)
	installed := filesIn(t, root)
	for name, mode := range packaged {
		require.Contains(t, installed, name)
		require.Equal(t, mode, installed[name], name)
	}
	require.Contains(t, command(t, "rpm", "--nosignature", "--query", "--configfiles", "--package", rpm), "/etc/otelcol-opampgateway/environment")
	require.Contains(t, command(t, root+"/usr/bin/otelcol-opampgateway", "--version"), "otelcol-opampgateway version ")
	command(t, "rpm", "--root="+root, "--noscripts", "--erase", "otelcol-opampgateway")
	for name := range filesIn(t, root) {
		require.NotContains(t, name, "opampgateway", "what is left")
	}
}

// The scripts of the packages are ones that a plain shell takes, the checksums are those of the packages, and
// the version is that of the collector in them.
func TestPackages(t *testing.T) {
	t.Parallel()
	scripts, err := filepath.Glob("../deploy/package/*.sh")
	require.NoError(t, err)
	require.Len(t, scripts, 3)
	for _, script := range scripts {
		command(t, "sh", "-n", script)
		for _, arg := range []string{"remove", "configure", "0", "1"} { // in a root that is not the system's
			run := exec.Command("sh", script, arg)
			run.Env = []string{"PATH=/nowhere", "DPKG_ROOT=/nowhere"}
			output, err := run.CombinedOutput()
			require.NoError(t, err, "%s %s: %s", script, arg, output)
		}
	}
	packages := filepath.Dir(builtPackage(t, "*_"+runtime.GOARCH+".deb"))
	check := exec.Command("sha256sum", "--check", "--strict", "SHA256SUMS")
	check.Dir = packages
	output, err := check.CombinedOutput()
	require.NoError(t, err, string(output))
	version := strings.Fields(command(t, collectorProgram(t), "--version"))
	require.Contains(t, filepath.Base(builtPackage(t, "*_"+runtime.GOARCH+".deb")), fmt.Sprintf("_%s_", version[len(version)-1]))
}
