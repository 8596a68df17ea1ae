package e2e

import (
	"debug/buildinfo"
	"encoding/json"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// Beside the packages is a bill of materials: each module in the collector is in it, by version and checksum, and so is
// Go's own library.
func TestBillOfMaterials(t *testing.T) {
	t.Parallel()
	var bom struct {
		Format   string `json:"bomFormat"`
		Metadata struct {
			Component struct{ Version string } `json:"component"`
		} `json:"metadata"`
		Components []struct {
			Name    string                          `json:"name"`
			Version string                          `json:"version"`
			URL     string                          `json:"purl"`
			Hashes  []struct{ Alg, Content string } `json:"hashes"`
		} `json:"components"`
	}
	path := builtPackage(t, "*_"+runtime.GOARCH+".cdx.json")
	require.NoError(t, json.Unmarshal([]byte(readText(t, path)), &bom))
	require.Equal(t, "CycloneDX", bom.Format)

	root := t.TempDir()
	deb := builtPackage(t, "*_"+runtime.GOARCH+".deb")
	if _, err := exec.LookPath("dpkg-deb"); err != nil {
		t.Skip("it takes dpkg-deb")
	}
	command(t, "dpkg-deb", "--extract", deb, root)
	linked, err := buildinfo.ReadFile(filepath.Join(root, "usr", "bin", "otelcol-opampgateway"))
	require.NoError(t, err)
	version := bom.Metadata.Component.Version
	require.Contains(t, deb, "_"+version+"_")
	want := map[string]string{"std": linked.GoVersion}
	for _, m := range linked.Deps {
		want[m.Path] = m.Version
		if m.Replace != nil {
			want[m.Path] = "v" + version // which only the gateway itself is
		}
	}
	got := map[string]string{}
	for _, c := range bom.Components {
		got[c.Name] = c.Version
		require.True(t, strings.HasPrefix(c.URL, "pkg:golang/"+c.Name+"@"+c.Version+"?"), c.URL)
		if c.Name != "std" && c.Name != "github.com/opampgateway/opampgateway" {
			require.NotEmpty(t, c.Hashes, c.Name)
		}
	}
	require.Equal(t, want, got)
	require.Contains(t, got, "github.com/opampgateway/opampgateway")
	require.Contains(t, readText(t, filepath.Join(filepath.Dir(path), "SHA256SUMS")), "  "+filepath.Base(path)+"\n")
}
