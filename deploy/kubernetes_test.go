package deploy

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"sigs.k8s.io/yaml"
)

// manifests are what is in kubernetes/.
type manifests struct {
	deployment appsv1.Deployment
	service    corev1.Service
	budget     policyv1.PodDisruptionBudget
}

// read reads all of kubernetes/, strictly: a key that Kubernetes does not know, or one twice, is an error.
func read(t *testing.T) *manifests {
	t.Helper()
	var m manifests
	known := map[string]any{"Deployment": &m.deployment, "Service": &m.service, "PodDisruptionBudget": &m.budget}
	files, err := filepath.Glob("kubernetes/*")
	require.NoError(t, err)
	for _, file := range files {
		text := readFile(t, file)
		var kind metav1.TypeMeta
		require.NoError(t, yaml.Unmarshal([]byte(text), &kind), file)
		require.Contains(t, known, kind.Kind, "one of each kind, in %s", file)
		require.NoError(t, yaml.UnmarshalStrict([]byte(text), known[kind.Kind]), file)
		delete(known, kind.Kind)
	}
	require.Empty(t, known, "kinds that are missing")
	return &m
}

func readFile(t *testing.T, path string) string {
	t.Helper()
	text, err := os.ReadFile(path)
	require.NoError(t, err)
	return string(text)
}

// The manifests are ones that Kubernetes takes, of the versions that they say, and are about the same pods.
func TestManifestsFit(t *testing.T) {
	m := read(t)
	require.Equal(t, appsv1.SchemeGroupVersion.String(), m.deployment.APIVersion)
	require.Equal(t, corev1.SchemeGroupVersion.String(), m.service.APIVersion)
	require.Equal(t, policyv1.SchemeGroupVersion.String(), m.budget.APIVersion)

	pods := labels.Set(m.deployment.Spec.Template.Labels)
	for name, selector := range map[string]*metav1.LabelSelector{
		"deployment": m.deployment.Spec.Selector, "budget": m.budget.Spec.Selector,
		"service": {MatchLabels: m.service.Spec.Selector},
		"spread":  m.deployment.Spec.Template.Spec.TopologySpreadConstraints[0].LabelSelector,
	} {
		chooses, err := metav1.LabelSelectorAsSelector(selector)
		require.NoError(t, err, name)
		require.False(t, chooses.Empty(), name)
		require.True(t, chooses.Matches(pods), "the selector of the %s does not find the pods", name)
	}

	c := container(t, m)
	ports := map[string]int32{}
	for _, port := range c.Ports {
		ports[port.Name] = port.ContainerPort
	}
	require.Equal(t, map[string]int32{"opamp": 4320, "metrics": 8888, "health": 13133}, ports)
	require.Contains(t, ports, m.service.Spec.Ports[0].TargetPort.String())
	require.Contains(t, ports, c.ReadinessProbe.HTTPGet.Port.String())
	require.Contains(t, ports, c.LivenessProbe.TCPSocket.Port.String())
	require.Equal(t, "8888", m.deployment.Spec.Template.Annotations["prometheus.io/port"])
	require.NotEqual(t, corev1.ClusterIPNone, m.service.Spec.ClusterIP, "not headless")

	volumes := map[string]bool{}
	for _, volume := range m.deployment.Spec.Template.Spec.Volumes {
		volumes[volume.Name] = true
	}
	for _, mount := range c.VolumeMounts {
		require.True(t, volumes[mount.Name], "the volume %s", mount.Name)
	}
}

// The container gets what the image and its configuration expect, and no variable that nobody reads.
func TestManifestsFitImage(t *testing.T) {
	m := read(t)
	c := container(t, m)
	image := readFile(t, "container/Containerfile")
	configuration := ""
	for _, arg := range c.Args {
		if path, found := strings.CutPrefix(arg, "--config=/etc/otelcol-opampgateway/"); found {
			require.Contains(t, image, "deploy/"+path+" ", "the image has %s", path)
			configuration += readFile(t, path)
		}
	}
	require.NotEmpty(t, configuration)
	set := map[string]string{}
	for _, variable := range c.Env {
		set[variable.Name] = variable.Value
		if variable.Name != "GOMEMLIMIT" {
			require.Contains(t, configuration, "${env:"+variable.Name, "who reads %s", variable.Name)
		}
	}
	for _, needed := range regexp.MustCompile(`\$\{env:([A-Z_]+)\}`).FindAllStringSubmatch(configuration, -1) {
		require.Contains(t, set, needed[1], "what has no default")
	}
	for _, file := range []string{set["GATEWAY_CERT"], set["GATEWAY_KEY"]} {
		require.Equal(t, c.VolumeMounts[0].MountPath, filepath.Dir(file))
	}
	require.Contains(t, image, "USER 65532:65532")
	security := m.deployment.Spec.Template.Spec.SecurityContext
	require.EqualValues(t, 65532, *security.RunAsUser)
	require.EqualValues(t, 65532, *security.FSGroup, "or the key cannot be read")
	require.True(t, *security.RunAsNonRoot)
	require.EqualValues(t, 0o440, *m.deployment.Spec.Template.Spec.Volumes[0].Secret.DefaultMode, "by the group, not by others")
}

// Memory is enough for the agents that the manifest promises, by the figures of docs/sizing.md, and Go is told.
func TestManifestsMemory(t *testing.T) {
	c := container(t, read(t))
	limit := c.Resources.Limits[corev1.ResourceMemory]
	request := c.Resources.Requests[corev1.ResourceMemory]
	require.Zero(t, limit.Cmp(request), "what is promised is there")

	promised := regexp.MustCompile(`for up to ([0-9]+),000 agents`).FindStringSubmatch(readFile(t, "kubernetes/deployment.yaml"))
	require.NotNil(t, promised)
	agents := resource.MustParse(promised[1] + "k")
	row := regexp.MustCompile(`(?m)^\| agents per GiB to plan with \| [0-9,]+ \| ([0-9]+),000 \|$`).
		FindStringSubmatch(readFile(t, "../docs/sizing.md"))
	require.NotNil(t, row, "docs/sizing.md, with TLS")
	perGiB := resource.MustParse(row[1] + "k")
	const mib = 1 << 20
	need := agents.Value()*(1<<30)/perGiB.Value() + 30*mib + 256*mib*3/2
	require.LessOrEqual(t, need, limit.Value())
	require.Greater(t, need, limit.Value()*8/10, "and not far more")

	for _, variable := range c.Env {
		if variable.Name == "GOMEMLIMIT" {
			soft := resource.MustParse(strings.TrimSuffix(variable.Value, "B"))
			require.Less(t, soft.Value(), limit.Value())
			require.Greater(t, soft.Value(), limit.Value()*8/10)
			return
		}
	}
	t.Fatal("no GOMEMLIMIT")
}

// The gateway has the time that it needs to stop, and a server that is away restarts nothing.
func TestManifestsProbes(t *testing.T) {
	m := read(t)
	c := container(t, m)
	require.Nil(t, c.LivenessProbe.HTTPGet)
	require.Contains(t, readFile(t, "config.yaml"), "path: "+c.ReadinessProbe.HTTPGet.Path+" ")
	grace := *m.deployment.Spec.Template.Spec.TerminationGracePeriodSeconds
	drain := time.Duration(0)
	for _, variable := range c.Env {
		if variable.Name == "GATEWAY_DRAIN" {
			var err error
			drain, err = time.ParseDuration(variable.Value)
			require.NoError(t, err)
		}
	}
	require.Positive(t, drain)
	require.GreaterOrEqual(t, grace, c.Lifecycle.PreStop.Sleep.Seconds+int64(drain.Seconds())+2*4)
	require.Positive(t, c.Lifecycle.PreStop.Sleep.Seconds)
	require.Zero(t, m.deployment.Spec.Strategy.RollingUpdate.MaxUnavailable.IntValue())
	require.Less(t, m.budget.Spec.MaxUnavailable.IntValue(), int(*m.deployment.Spec.Replicas))
}

func container(t *testing.T, m *manifests) *corev1.Container {
	t.Helper()
	require.Len(t, m.deployment.Spec.Template.Spec.Containers, 1)
	return &m.deployment.Spec.Template.Spec.Containers[0]
}
