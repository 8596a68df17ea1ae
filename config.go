package opampgateway

import (
	"errors"
	"fmt"
	"net/url"
	"time"

	"go.opentelemetry.io/collector/component"
	"go.opentelemetry.io/collector/config/confighttp"
	"go.opentelemetry.io/collector/config/confignet"
	"go.opentelemetry.io/collector/config/configoptional"
	"go.opentelemetry.io/collector/config/configretry"
	"go.opentelemetry.io/collector/config/configtls"
	"golang.org/x/net/http/httpguts"

	"github.com/opampgateway/opampgateway/internal/connect"
	"github.com/opampgateway/opampgateway/internal/memory"
	"github.com/opampgateway/opampgateway/internal/socket"
)

// Config is what a user writes below extensions::opampgateway.
type Config struct {
	// Server is the OpAMP server that all agents are relayed to.
	Server ServerConfig `mapstructure:"server"`

	// Listener is where agents connect, on any path.
	Listener confighttp.ServerConfig `mapstructure:"listener"`

	// Agents says how the gateway treats the agents' connections.
	Agents AgentsConfig `mapstructure:"agents"`

	// MaxMessageSize is the largest OpAMP message relayed in either direction, in bytes.
	MaxMessageSize int `mapstructure:"max_message_size"`

	// MaxBufferedSize bounds the memory of messages on their way, over all connections, in bytes.
	MaxBufferedSize int `mapstructure:"max_buffered_size"`

	// ReloadGrace is how long agents and links are kept when the collector shuts the gateway down, so that the one
	// which it starts then, if this is a reload, goes on with them. 0 ends them at once.
	ReloadGrace time.Duration `mapstructure:"reload_grace"`

	// Status is where the gateway shows what it does, as a page and as JSON: nowhere unless it is given, and then
	// at localhost:4321 unless its endpoint says otherwise.
	Status configoptional.Optional[confighttp.ServerConfig] `mapstructure:"status"`

	// prevent unkeyed literal initialization
	_ struct{}
}

// ServerConfig says how to reach the server and how to ask it about agents.
type ServerConfig struct {
	// Endpoint is the server's URL: ws:// or wss://, or http:// or https:// for a server that is reached over plain HTTP
	// only, where each message is posted with the headers of its agent.
	Endpoint string `mapstructure:"endpoint"`

	// Headers are sent with the upgrade request of every link, to the endpoint's host only. Over plain HTTP they are lent
	// to agents, where these have none of that name, with agent_admission: accept only.
	Headers Headers `mapstructure:"headers,omitempty"`

	// TLS applies to a wss:// or https:// endpoint.
	TLS configtls.ClientConfig `mapstructure:"tls,omitempty"`

	// Connections is the number of links kept to the server; over plain HTTP, of connections at a time.
	Connections int `mapstructure:"connections"`

	// AgentID comes first in the name by which each link announces itself to the server. Without it the
	// collector's service.instance.id does.
	AgentID string `mapstructure:"agent_id,omitempty"`

	// Retry is the back-off between attempts to dial a link; the gateway never gives up.
	Retry configretry.BackOffConfig `mapstructure:"retry"`

	// KeepAlive finds links that died without a word.
	KeepAlive KeepAliveConfig `mapstructure:"keep_alive"`

	// AgentAdmission says who decides which agents may connect. Over plain HTTP the server does, by its answer to what an
	// agent says, whatever is set.
	AgentAdmission AgentAdmission `mapstructure:"agent_admission"`

	// VerifyConnections is how many agents are verified at a time.
	VerifyConnections int `mapstructure:"verify_connections"`

	// AdmissionTimeout bounds the time from an agent's request to its answer.
	AdmissionTimeout time.Duration `mapstructure:"admission_timeout"`

	// GracePeriod is how long agents are kept while the server cannot be reached.
	GracePeriod time.Duration `mapstructure:"grace_period"`

	// prevent unkeyed literal initialization
	_ struct{}
}

// AgentsConfig says how the gateway treats the agents' connections.
type AgentsConfig struct {
	// KeepAlive finds agents that vanished without a word.
	KeepAlive KeepAliveConfig `mapstructure:"keep_alive"`

	// SendDisconnect has the gateway say agent_disconnect for an agent whose connection ended without it.
	SendDisconnect bool `mapstructure:"send_disconnect"`

	// SendDisconnectForGateways has it do so for the agents behind a gateway whose connection ended, too.
	// They may be connected elsewhere by then.
	SendDisconnectForGateways bool `mapstructure:"send_disconnect_for_gateways"`

	// AllowGateways lets other gateways connect, which may ask the server about agents of theirs.
	AllowGateways bool `mapstructure:"allow_gateways"`

	// MaxConnections is how many connections may be open at once, those not let in yet included; more are
	// answered 503. 0 stands for what the limit of open files allows.
	MaxConnections int `mapstructure:"max_connections"`

	// MaxInstanceUIDs is how many agents may speak on one connection that is no gateway's.
	MaxInstanceUIDs int `mapstructure:"max_instance_uids"`

	// MaxRequestHeaders is how many headers an upgrade request may have; more are answered 431.
	MaxRequestHeaders int `mapstructure:"max_request_headers"`

	// MaxRequestHeaderSize is how long these may be in all, in bytes; longer ones are answered 431.
	MaxRequestHeaderSize int `mapstructure:"max_request_header_size"`

	// MaxQueueSize bounds what waits for one agent, in bytes; one larger message fits, too.
	MaxQueueSize int `mapstructure:"max_queue_size"`

	// WriteTimeout is how long a write to an agent may go without progress.
	WriteTimeout time.Duration `mapstructure:"write_timeout"`

	// prevent unkeyed literal initialization
	_ struct{}
}

// KeepAliveConfig says when a quiet connection is pinged, and when it is given up.
type KeepAliveConfig struct {
	// Interval is the time without a byte from the peer after which it is pinged.
	Interval time.Duration `mapstructure:"interval"`

	// Timeout is the time without a byte from the peer after which the connection is closed.
	Timeout time.Duration `mapstructure:"timeout"`

	// prevent unkeyed literal initialization
	_ struct{}
}

// AgentAdmission says who decides which agents may connect.
type AgentAdmission string

const (
	// AdmissionAuto does as with ask, and where the server turns out not to know questions as with verify.
	AdmissionAuto AgentAdmission = "auto"
	// AdmissionVerify opens a WebSocket to the server with the agent's own headers, takes the answer to that for the
	// agent's, and ends it at once.
	AdmissionVerify AgentAdmission = "verify"
	// AdmissionAsk asks the server about each agent before its upgrade request is answered.
	AdmissionAsk AgentAdmission = "ask"
	// AdmissionAccept lets every agent in that the listener lets in.
	AdmissionAccept AgentAdmission = "accept"
)

const (
	// maxConnections is far above what one server needs and far below what would hurt it.
	maxConnections = 64

	// maxVerifyConnections is what a server may be asked for at a time on behalf of strangers.
	maxVerifyConnections = 256

	// connectionIDHeader is how a link names itself to the server, and how the gateway
	// knows another gateway among its agents.
	connectionIDHeader = "X-Opamp-Gateway-Connection-Id"

	// minMessageSize and maxMessageSize bound max_message_size: OpAMP's messages are far apart
	// from both.
	minMessageSize, maxMessageSize = 1 << 10, 1 << 30

	// minKeepAlive is the finest a keep-alive can be: all connections are looked at as often.
	minKeepAlive = time.Second

	// maxReloadGrace is far above what any reload takes.
	maxReloadGrace = 10 * time.Minute

	// admissionCeiling is the longest admission that makes sense: opamp-go agents give
	// their upgrade 45 s.
	admissionCeiling = 45 * time.Second
)

func createDefaultConfig() component.Config {
	listener := confighttp.NewDefaultServerConfig()
	listener.NetAddr = confignet.NewDefaultAddrConfig()
	listener.NetAddr.Transport = confignet.TransportTypeTCP
	listener.NetAddr.Endpoint = "localhost:4320"
	listener.ReadHeaderTimeout = 30 * time.Second

	page := confighttp.NewDefaultServerConfig()
	page.NetAddr.Endpoint = "localhost:4321"
	page.ReadHeaderTimeout = 10 * time.Second

	retry := configretry.NewDefaultBackOffConfig()
	retry.InitialInterval = 500 * time.Millisecond
	retry.MaxInterval = 5 * time.Second
	retry.MaxElapsedTime = 0

	return &Config{
		Server: ServerConfig{
			TLS:               configtls.NewDefaultClientConfig(),
			Connections:       3,
			Retry:             retry,
			KeepAlive:         KeepAliveConfig{Interval: 10 * time.Second, Timeout: 20 * time.Second},
			AgentAdmission:    AdmissionAuto,
			VerifyConnections: 16,
			AdmissionTimeout:  40 * time.Second,
			GracePeriod:       time.Minute,
		},
		Listener: listener,
		Agents: AgentsConfig{
			KeepAlive:            KeepAliveConfig{Interval: 30 * time.Second, Timeout: time.Minute},
			SendDisconnect:       true,
			MaxInstanceUIDs:      64,
			MaxRequestHeaders:    100,
			MaxRequestHeaderSize: 16 << 10,
			MaxQueueSize:         4 << 20,
			WriteTimeout:         30 * time.Second,
		},
		MaxMessageSize:  64 << 20,
		MaxBufferedSize: 256 << 20,
		ReloadGrace:     30 * time.Second,
		Status:          configoptional.Default(page),
	}
}

// Validate reports every mistake at once, each under the key the user typed.
func (c *Config) Validate() error {
	var errs []error
	if c.MaxMessageSize < minMessageSize || c.MaxMessageSize > maxMessageSize {
		errs = append(errs, fmt.Errorf("max_message_size: must be from %d to %d bytes, is %d", minMessageSize, maxMessageSize, c.MaxMessageSize))
	} else if least := memory.MinSize(c.MaxMessageSize, max(1, c.Server.Connections)); int64(c.MaxBufferedSize) < least {
		errs = append(errs, fmt.Errorf("max_buffered_size: must be at least %d bytes with max_message_size %d and server::connections %d, is %d", least, c.MaxMessageSize, c.Server.Connections, c.MaxBufferedSize))
	}
	if c.ReloadGrace < 0 || c.ReloadGrace > maxReloadGrace {
		errs = append(errs, fmt.Errorf("reload_grace: must be from 0 to %s, is %s", maxReloadGrace, c.ReloadGrace))
	}
	if c.Listener.NetAddr.Endpoint == "" {
		errs = append(errs, errors.New("listener::endpoint: must not be empty"))
	}
	if page := c.Status.Get(); page != nil && page.NetAddr.Endpoint == "" {
		errs = append(errs, errors.New("status::endpoint: must not be empty"))
	}
	return errors.Join(errs...)
}

// Validate reports every mistake below server.
func (c *ServerConfig) Validate() error {
	errs := []error{c.validateEndpoint(), c.validateHeaders()}
	if c.Connections < 1 || c.Connections > maxConnections {
		errs = append(errs, fmt.Errorf("connections: must be from 1 to %d, is %d", maxConnections, c.Connections))
	}
	if !httpguts.ValidHeaderFieldValue(c.AgentID) {
		errs = append(errs, errors.New("agent_id: must be usable in an HTTP header"))
	}
	if !c.Retry.Enabled {
		errs = append(errs, errors.New("retry::enabled: must not be false, a gateway never gives up on its server"))
	}
	if c.Retry.MaxElapsedTime != 0 {
		errs = append(errs, fmt.Errorf("retry::max_elapsed_time: must be 0, a gateway never gives up on its server; is %s", c.Retry.MaxElapsedTime))
	}
	if c.Retry.InitialInterval <= 0 || c.Retry.MaxInterval < c.Retry.InitialInterval {
		errs = append(errs, fmt.Errorf("retry::initial_interval: must be above 0 and no more than max_interval, is %s with max_interval %s", c.Retry.InitialInterval, c.Retry.MaxInterval))
	}
	if c.Retry.Multiplier < 1 {
		errs = append(errs, fmt.Errorf("retry::multiplier: must be at least 1, is %v", c.Retry.Multiplier))
	}
	switch c.AgentAdmission {
	case AdmissionAuto, AdmissionVerify, AdmissionAsk, AdmissionAccept:
	default:
		errs = append(errs, fmt.Errorf("agent_admission: must be %q, %q, %q or %q, is %q",
			AdmissionAuto, AdmissionVerify, AdmissionAsk, AdmissionAccept, c.AgentAdmission))
	}
	if c.VerifyConnections < 1 || c.VerifyConnections > maxVerifyConnections {
		errs = append(errs, fmt.Errorf("verify_connections: must be from 1 to %d, is %d", maxVerifyConnections, c.VerifyConnections))
	}
	if c.AdmissionTimeout <= 0 || c.AdmissionTimeout > admissionCeiling {
		errs = append(errs, fmt.Errorf("admission_timeout: must be above 0 and at most %s, the time agents wait; is %s", admissionCeiling, c.AdmissionTimeout))
	}
	if c.GracePeriod <= 0 {
		errs = append(errs, fmt.Errorf("grace_period: must be above 0, is %s", c.GracePeriod))
	}
	return errors.Join(errs...)
}

func (c *ServerConfig) validateEndpoint() error {
	if c.Endpoint == "" {
		return errors.New("endpoint: is required, for example wss://app.bindplane.com/v1/opamp")
	}
	u, err := url.Parse(c.Endpoint)
	if err != nil {
		// The error of url.Parse repeats the whole URL, which may hold a password.
		if urlErr, ok := errors.AsType[*url.Error](err); ok {
			err = urlErr.Err
		}
		return fmt.Errorf("endpoint: is not a URL: %w", err)
	}
	switch {
	case u.Scheme != "ws" && u.Scheme != "wss" && !overHTTP(u.Scheme):
		return fmt.Errorf("endpoint: must start with ws://, wss://, http:// or https://, is %q", socket.Place(u))
	case u.Hostname() == "":
		return fmt.Errorf("endpoint: has no host: %q", socket.Place(u))
	case u.User != nil:
		return errors.New("endpoint: must not hold a user or password; use headers instead")
	}
	return nil
}

// overHTTP reports whether the server is reached over plain HTTP.
func (c *ServerConfig) overHTTP() bool {
	u, err := url.Parse(c.Endpoint)
	return err == nil && overHTTP(u.Scheme)
}

func (c *ServerConfig) validateHeaders() error {
	if err := c.Headers.validate(); err != nil {
		return fmt.Errorf("headers: %w", err)
	}
	return nil
}

// Validate reports every mistake below agents.
func (c *AgentsConfig) Validate() error {
	var errs []error
	if c.MaxConnections < 0 {
		errs = append(errs, fmt.Errorf("max_connections: must be above 0, or 0 for what the limit of open files allows; is %d", c.MaxConnections))
	}
	if c.MaxInstanceUIDs < 1 || c.MaxInstanceUIDs > maxGatewayUIDs {
		errs = append(errs, fmt.Errorf("max_instance_uids: must be from 1 to %d, is %d", maxGatewayUIDs, c.MaxInstanceUIDs))
	}
	if c.MaxRequestHeaders < 10 || c.MaxRequestHeaders > 1000 {
		errs = append(errs, fmt.Errorf("max_request_headers: must be from 10 to 1000, is %d", c.MaxRequestHeaders))
	}
	if c.MaxRequestHeaderSize < 1<<10 || c.MaxRequestHeaderSize > connect.MaxQuestion {
		errs = append(errs, fmt.Errorf("max_request_header_size: must be from 1024 to %d bytes, is %d", connect.MaxQuestion, c.MaxRequestHeaderSize))
	}
	if c.MaxQueueSize < 64<<10 {
		errs = append(errs, fmt.Errorf("max_queue_size: must be at least 65536 bytes, is %d", c.MaxQueueSize))
	}
	if c.WriteTimeout < time.Second {
		errs = append(errs, fmt.Errorf("write_timeout: must be at least 1s, is %s", c.WriteTimeout))
	}
	return errors.Join(errs...)
}

// Validate reports a keep-alive that could not work.
func (c *KeepAliveConfig) Validate() error {
	if c.Interval < minKeepAlive || c.Timeout < c.Interval+minKeepAlive {
		return fmt.Errorf("interval: must be at least %s, and as much below timeout; is %s with timeout %s", minKeepAlive, c.Interval, c.Timeout)
	}
	return nil
}
