package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
)

// runGatewayOnly runs the gateway collector against a server that exists. The collector's
// logs are what there is to see.
func runGatewayOnly(ctx, hurry context.Context, o options) (err error) {
	key := os.Getenv(secretKeyEnv)
	if err := checkServer(o.server, key); err != nil {
		return err
	}
	if err := findCollector(o.collector); err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "opampgateway-")
	if err != nil {
		return err
	}
	if !o.keep {
		defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	}
	ports, err := freePorts(2)
	if err != nil {
		return err
	}
	config, err := render(gatewayTemplate, gatewayConfig{Server: o.server, Listen: o.listen, Connections: connections, Metrics: ports[0], Status: ports[1]})
	if err != nil {
		return err
	}
	file := filepath.Join(dir, "gateway.yaml")
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		return err
	}

	fmt.Println(strings.Join(gatewayIntroduction(o, file, ports[0], ports[1]), "\n"))
	p, err := startCollector("the gateway", o.collector, file, "", key, os.Stderr)
	if err != nil {
		return err
	}
	select {
	case <-p.done:
		return fmt.Errorf("the gateway has ended unexpectedly: %s", p.obituary())
	case <-ctx.Done():
		return p.stop(hurry)
	}
}

// checkServer finds mistakes before a collector does, in words for who typed the command.
func checkServer(server, key string) error {
	u, err := url.Parse(server)
	switch {
	case err != nil, u.Scheme != "ws" && u.Scheme != "wss", u.Host == "":
		return errors.New("-server: must be a ws:// or wss:// URL, for example wss://app.bindplane.com/v1/opamp")
	case u.User != nil:
		return errors.New("-server: must not hold a user or password")
	case key == "":
		return fmt.Errorf("the environment variable %s must hold the server's secret key", secretKeyEnv)
	}
	return nil
}

func gatewayIntroduction(o options, file, metrics, status string) []string {
	lines := []string{
		"OpAMP gateway for " + o.server,
		"  listens for agents at  ws://" + o.listen,
		"  its configuration      " + file + " (the secret key stays in " + secretKeyEnv + ")",
		"  its metrics            http://" + metrics + "/metrics",
		"  its status page        http://" + status + "/",
		"",
		"An agent comes through the gateway when this is in its manager.yaml, the rest as before:",
		"",
		"  endpoint: ws://" + agentAddress(o.listen) + "/v1/opamp",
		"  secret_key: ${" + secretKeyEnv + "}   # the server's, the gateway only passes it on",
		"",
	}
	if isLoopback(o.listen) {
		lines = append(lines, "Only agents on this machine reach it there; -listen 0.0.0.0:4320 lets others in.", "")
	}
	return append(lines, "Ctrl-C stops the gateway. Its log:", "")
}

// agentAddress is the address an agent is told: a listener on all addresses has no one name.
func agentAddress(listen string) string {
	host, port, err := net.SplitHostPort(listen)
	if err != nil {
		return listen
	}
	if ip := net.ParseIP(host); host == "" || ip != nil && ip.IsUnspecified() {
		return "<this host>:" + port
	}
	return listen
}

func isLoopback(listen string) bool {
	host, _, err := net.SplitHostPort(listen)
	if err != nil {
		return false
	}
	ip := net.ParseIP(host)
	return host == "localhost" || ip != nil && ip.IsLoopback()
}
