package e2e

import (
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
	"go.yaml.in/yaml/v3"
)

// site is a gateway that runs from the files of deploy/, and what its environment says.
type site struct {
	server                  *Server
	listen, health, metrics string
	environment             []string
}

func newSite(t *testing.T) *site {
	t.Helper()
	s := &site{server: startServer(t, serverOptions{}), listen: freeAddress(t), health: freeAddress(t), metrics: freeAddress(t)}
	_, port, err := net.SplitHostPort(s.metrics)
	require.NoError(t, err)
	s.environment = []string{
		"OPAMP_ENDPOINT=" + s.server.url(), "OPAMP_SECRET_KEY=0123456789", "GATEWAY_NAME=site-a",
		"GATEWAY_LISTEN=" + s.listen, "HEALTH_LISTEN=" + s.health, "METRICS_HOST=127.0.0.1", "METRICS_PORT=" + port,
	}
	return s
}

// wantServed waits until everything that is promised of such a gateway is there.
func (s *site) wantServed(t *testing.T, url string, opts agentOptions) {
	t.Helper()
	links := []string{"site-a/upstream-0", "site-a/upstream-1", "site-a/upstream-2"}
	s.server.wantLinks(t, links...)
	require.Equal(t, "Secret-Key 0123456789", s.server.linkHeaders(links[0]).Get("Authorization"))
	alice := startAgent(t, "alice", url, opts)
	s.server.wantAgent(t, alice.id(), "is connected", isConnected)
	wantSamples(t, s.metrics, map[string]float64{`otelcol_opampgateway_connections{direction="downstream"}`: 1})
	s.wantHealth(t, http.StatusOK)
}

func (s *site) wantHealth(t *testing.T, code int) {
	t.Helper()
	eventually(t, func() string {
		if got, body := get(t, "http://"+s.health+"/status"); got != code {
			return fmt.Sprintf("the health page answers %d %s, want %d", got, body, code)
		}
		return ""
	})
}

const healthGate = "--feature-gates=+extension.healthcheck.useComponentStatus"

// deploy/config.yaml works as it is, its health page says when there is no link, and
// deploy/config-tls.yaml gives it TLS.
func TestDeployedConfig(t *testing.T) {
	t.Parallel()
	t.Run("plain", func(t *testing.T) {
		t.Parallel()
		s := newSite(t)
		startProcessIn(t, s.environment, "gateway", collectorProgram(t), "--config=../deploy/config.yaml", healthGate)
		s.wantServed(t, "ws://"+s.listen, agentOptions{})
		s.server.stop(t)
		s.wantHealth(t, http.StatusInternalServerError)
		s.server.start(t)
		s.wantHealth(t, http.StatusOK)
	})
	t.Run("TLS", func(t *testing.T) {
		t.Parallel()
		s := newSite(t)
		authority := newAuthority(t, "inside")
		id := authority.issue(t, "gateway")
		startProcessIn(t, append(s.environment, "GATEWAY_CERT="+id.certFile, "GATEWAY_KEY="+id.keyFile), "gateway",
			collectorProgram(t), "--config=../deploy/config.yaml", "--config=../deploy/config-tls.yaml", healthGate)
		s.wantServed(t, "wss://"+s.listen, agentOptions{tls: authority.mutual(nil)})
	})
}

// The container of deploy/kubernetes/ starts with the arguments and variables that its manifest gives it, and its
// readiness probe tells whether it has a link.
func TestKubernetesContainer(t *testing.T) {
	t.Parallel()
	var deployment struct {
		Spec struct {
			Template struct {
				Spec struct {
					Containers []struct {
						Args           []string
						Env            []struct{ Name, Value string }
						ReadinessProbe struct {
							HTTPGet struct{ Path string } `yaml:"httpGet"`
						} `yaml:"readinessProbe"`
					}
				}
			}
		}
	}
	require.NoError(t, yaml.Unmarshal([]byte(readText(t, "../deploy/kubernetes/deployment.yaml")), &deployment))
	c := deployment.Spec.Template.Spec.Containers[0]
	s := newSite(t)
	authority := newAuthority(t, "inside")
	id := authority.issue(t, "gateway")
	environment := []string{}
	for _, variable := range c.Env {
		environment = append(environment, variable.Name+"="+variable.Value)
	}
	environment = append(environment, s.environment...) // the last counts
	environment = append(environment, "GATEWAY_CERT="+id.certFile, "GATEWAY_KEY="+id.keyFile)
	args := slices.Clone(c.Args)
	for i := range args {
		args[i] = strings.Replace(args[i], "/etc/otelcol-opampgateway/", "../deploy/", 1)
	}
	startProcessIn(t, environment, "gateway", collectorProgram(t), args...)
	s.wantServed(t, "wss://"+s.listen, agentOptions{tls: authority.mutual(nil)})
	code, body := get(t, "http://"+s.health+c.ReadinessProbe.HTTPGet.Path)
	require.Equal(t, http.StatusOK, code, body)
}

// The service is one that systemd takes, and hardly anything is left to it that it does not need.
func TestSystemdUnit(t *testing.T) {
	t.Parallel()
	if _, err := exec.LookPath("systemd-analyze"); err != nil {
		t.Skip("there is no systemd-analyze")
	}
	// A system with systemd's own units, the collector and its user.
	root := t.TempDir()
	units := filepath.Join(root, "usr", "lib", "systemd", "system")
	require.NoError(t, os.MkdirAll(units, 0o755))
	for _, pattern := range []string{"/lib/systemd/system/*.target", "/lib/systemd/system/*.slice"} {
		own, err := filepath.Glob(pattern)
		require.NoError(t, err)
		for _, unit := range own {
			if text, err := os.ReadFile(unit); err == nil { // some lead nowhere
				install(t, string(text), filepath.Join(units, filepath.Base(unit)), 0o644)
			}
		}
	}
	unit := readText(t, "../deploy/systemd/otelcol-opampgateway.service")
	install(t, unit, filepath.Join(units, "otelcol-opampgateway.service"), 0o644)
	for _, program := range []string{"/usr/bin/otelcol-opampgateway", "/bin/kill"} {
		install(t, "", filepath.Join(root, program), 0o755)
	}
	install(t, "root:x:0:0::/:/bin/sh\notelcol-opampgateway:x:999:999::/:/bin/false\n", filepath.Join(root, "etc", "passwd"), 0o644)
	analyze := func(args ...string) string {
		output, err := exec.Command("systemd-analyze", append(args, "--root="+root, "otelcol-opampgateway.service")...).CombinedOutput()
		require.NoError(t, err, "systemd-analyze %v: %s", args, output)
		return string(output)
	}
	require.Empty(t, analyze("verify", "--man=no", "--recursive-errors=no"), "what systemd has to say")
	// 0 is the least exposure, 10 is none of it. Fails above 1.5.
	analyze("security", "--offline=yes", "--threshold=15", "--no-pager")
}

// The image's last stage, laid out as the container file says, runs as the user and with the command
// that it says, in a root that has nothing else. It needs to be root for that, and no container engine.
func TestContainerfile(t *testing.T) {
	t.Parallel()
	if os.Geteuid() != 0 {
		t.Skip("only root can change the root")
	}
	_, stage, found := strings.Cut(readText(t, "../deploy/container/Containerfile"), "\nFROM scratch\n")
	require.True(t, found, "the last stage is from scratch")
	root := t.TempDir()
	require.NoError(t, os.Chmod(root, 0o755))
	built := map[string]string{
		"/src/build/otelcol-opampgateway":    collectorProgram(t),
		"/etc/ssl/certs/ca-certificates.crt": "/etc/ssl/certs/ca-certificates.crt", // of this machine
	}
	var command []string
	var user, group uint32
	s := newSite(t)
	environment := []string{}
	for line := range strings.Lines(stage) {
		keyword, rest, _ := strings.Cut(strings.TrimSpace(line), " ")
		switch keyword {
		case "COPY":
			words := strings.Fields(rest)
			fromBuild := words[0] == "--from=build"
			if fromBuild {
				words = words[1:]
			}
			to := words[len(words)-1]
			for _, from := range words[:len(words)-1] {
				target := to
				if strings.HasSuffix(to, "/") {
					target += filepath.Base(from)
				}
				if fromBuild {
					require.Contains(t, built, from, "what the first stage has")
					from = built[from]
				} else {
					from = filepath.Join("..", from)
				}
				place(t, from, filepath.Join(root, target))
			}
		case "USER":
			_, err := fmt.Sscanf(rest, "%d:%d", &user, &group)
			require.NoError(t, err)
		case "ENV":
			environment = append(environment, rest)
		case "ENTRYPOINT", "CMD":
			var words []string
			require.NoError(t, json.Unmarshal([]byte(rest), &words))
			command = append(command, words...)
		case "EXPOSE":
			require.Equal(t, "4320 8888 13133", rest, "ports of deploy/config.yaml")
		case "", "#":
		default:
			t.Fatalf("%s is not known to this test", keyword)
		}
	}
	require.NotZero(t, user)
	require.NotZero(t, group)

	p := &Process{name: "container", cmd: exec.Command(command[0], command[1:]...), done: make(chan struct{})}
	p.cmd.Dir = "/"
	p.cmd.Env = slices.Concat(environment, s.environment) // the last counts
	p.run(t, &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM, Chroot: root, Credential: &syscall.Credential{Uid: user, Gid: group}})
	s.wantServed(t, "ws://"+s.listen, agentOptions{})
	status := readText(t, fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid))
	require.Regexp(t, fmt.Sprintf(`(?m)^Uid:\s%d\s`, user), status)
	require.Regexp(t, `(?m)^CapEff:\s0+$`, status)
}

// run is startProcess with attributes of its own.
func (p *Process) run(t *testing.T, attributes *syscall.SysProcAttr) {
	t.Helper()
	p.cmd.Stdout, p.cmd.Stderr = &p.log, &p.log
	p.cmd.SysProcAttr = attributes
	require.NoError(t, startOnLastingThread(p.cmd), "start %s", p.name)
	go p.wait()
	t.Cleanup(func() {
		p.end(t)
		if t.Failed() {
			t.Logf("the end of the log of %s:\n%s", p.name, p.log.tail(60))
		}
	})
}

// place puts a file where it is to be, readable by all.
func place(t *testing.T, from, to string) {
	t.Helper()
	text, err := os.ReadFile(from)
	require.NoError(t, err)
	info, err := os.Stat(from)
	require.NoError(t, err)
	install(t, string(text), to, 0o644|info.Mode().Perm()&0o111)
}

func install(t *testing.T, text, to string, mode os.FileMode) {
	t.Helper()
	require.NoError(t, os.MkdirAll(filepath.Dir(to), 0o755))
	require.NoError(t, os.WriteFile(to, []byte(text), mode))
}
