// Package deploy has no code. It is a module of its own for the tests of the manifests in kubernetes/, so that
// the types of Kubernetes never reach those who import the extension.
package deploy
