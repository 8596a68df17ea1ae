package opampgateway

import (
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strings"
	"time"

	"go.opentelemetry.io/collector/component"
	"go.opentelemetry.io/collector/config/configauth"
	"go.opentelemetry.io/collector/config/confighttp"
	"go.opentelemetry.io/collector/config/confignet"
	"go.opentelemetry.io/collector/config/configopaque"
	"go.opentelemetry.io/collector/config/configoptional"
	"go.opentelemetry.io/collector/config/configretry"
	"go.opentelemetry.io/collector/config/configtls"
	"golang.org/x/net/http/httpguts"

	"github.com/opampgateway/opampgateway/internal/connect"
	"github.com/opampgateway/opampgateway/internal/forwarded"
	"github.com/opampgateway/opampgateway/internal/memory"
	"github.com/opampgateway/opampgateway/internal/polling"
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

	// FallbackEndpoints are further URLs of the server, tried in order when there was no link for 10 s. When the first
	// endpoint has answered again for a minute, links go back to it. Headers and tls hold for all.
	FallbackEndpoints []string `mapstructure:"fallback_endpoints,omitempty"`

	// Headers are sent with the upgrade request of every link, to the endpoint's host only. Over plain HTTP they are lent
	// to agents, where these have none of that name, with agent_admission: accept only.
	Headers Headers `mapstructure:"headers,omitempty"`

	// Auth names an extension of the collector that authenticates the gateway to the server: each time a link is
	// dialed it is asked what to add to the upgrade request, in place of headers of the same name.
	// Over plain HTTP that is lent as headers are.
	Auth configoptional.Optional[configauth.Config] `mapstructure:"auth,omitempty"`

	// ProxyURL is the proxy on the way to the server, with its user and password if it wants them: http://, https://,
	// socks5:// or socks5h://. Without it those of the environment are used.
	ProxyURL configopaque.String `mapstructure:"proxy_url,omitempty"`

	// TLS applies to a wss:// or https:// endpoint, and to an https:// proxy.
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

	// ConnectionOffers says what becomes of endpoints that the server offers agents in its connection settings, which
	// would lead them around the gateway.
	ConnectionOffers ConnectionOffers `mapstructure:"connection_offers"`

	// PublicEndpoint is the URL at which agents reach this gateway, for connection_offers: rewrite. An offer that leads
	// to the same host is no concern of connection_offers.
	PublicEndpoint string `mapstructure:"public_endpoint,omitempty"`

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

	// DrainTime is over how long agents are let go, one after the other, when the process is told to end; new ones are
	// refused meanwhile. 0 lets all of them go at once.
	DrainTime time.Duration `mapstructure:"drain_time"`

	// TrustedProxies are the networks, or addresses, of the load balancers and proxies whose word counts on from where an
	// agent connects, in the way of address_from; of all others it does not.
	TrustedProxies []string `mapstructure:"trusted_proxies,omitempty"`

	// AddressFrom says how trusted_proxies tell from where an agent connects.
	AddressFrom AddressFrom `mapstructure:"address_from"`

	// PollWait is how long a poll of an agent over plain HTTP waits for the server's answer. What comes later is the
	// answer to the next one.
	PollWait time.Duration `mapstructure:"poll_wait"`

	// PollInterval is how far apart the polls of an agent over plain HTTP may be at least. An agent that has shown
	// that it polls less often, or was offered so by the server, has that time. One that misses three polls is gone.
	PollInterval time.Duration `mapstructure:"poll_interval"`

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

// AddressFrom says how load balancers and proxies tell from where an agent connects.
type AddressFrom string

const (
	// AddressFromConnection has them not say it: it is where the connection comes from.
	AddressFromConnection AddressFrom = "connection"
	// AddressFromProxyProtocol takes it from the PROXY protocol, version 1 or 2, with which each of their connections begins.
	AddressFromProxyProtocol AddressFrom = "proxy_protocol"
	// AddressFromXForwardedFor takes the last address in the header X-Forwarded-For that is none of theirs.
	AddressFromXForwardedFor AddressFrom = "x_forwarded_for"
	// AddressFromForwarded does so in the header Forwarded.
	AddressFromForwarded AddressFrom = "forwarded"
)

// addressSources has every AddressFrom.
var addressSources = map[AddressFrom]forwarded.Source{
	AddressFromConnection: forwarded.SourceConnection, AddressFromProxyProtocol: forwarded.SourceProxyProtocol,
	AddressFromXForwardedFor: forwarded.SourceXForwardedFor, AddressFromForwarded: forwarded.SourceForwarded,
}

// ConnectionOffers says what becomes of endpoints that the server offers agents.
type ConnectionOffers string

const (
	// OffersRelay leaves the message as it is.
	OffersRelay ConnectionOffers = "relay"
	// OffersDrop takes the endpoint out; all other settings stay.
	OffersDrop ConnectionOffers = "drop"
	// OffersRewrite puts public_endpoint in its place, which has to be given.
	OffersRewrite ConnectionOffers = "rewrite"
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

	// maxDrainTime is longer than whoever stops a process waits for it as a rule.
	maxDrainTime = 5 * time.Minute

	// maxReloadGrace is far above what any reload takes.
	maxReloadGrace = 10 * time.Minute

	// maxPollWait is no longer than agents mostly are from one poll to the next.
	maxPollWait = 30 * time.Second

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
			ConnectionOffers:     OffersRelay,
			MaxInstanceUIDs:      64,
			MaxRequestHeaders:    100,
			MaxRequestHeaderSize: 16 << 10,
			MaxQueueSize:         4 << 20,
			WriteTimeout:         30 * time.Second,
			AddressFrom:          AddressFromConnection,
			PollWait:             2 * time.Second,
			PollInterval:         30 * time.Second,
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
	errs := []error{c.validateEndpoint(), c.validateFallbacks(), c.validateHeaders(), c.validateProxy()}
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
		// The error of url.Parse repeats the whole URL, and its reason a part of it, which may be of a password.
		urlErr, ok := errors.AsType[*url.Error](err)
		if !ok || strings.Contains(c.Endpoint, "@") {
			return errors.New("endpoint: is not a URL")
		}
		err = urlErr.Err
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

func (c *ServerConfig) validateFallbacks() error {
	var errs []error
	if len(c.FallbackEndpoints) > maxFallbacks {
		errs = append(errs, fmt.Errorf("fallback_endpoints: must be at most %d, are %d", maxFallbacks, len(c.FallbackEndpoints)))
	}
	for i, endpoint := range c.FallbackEndpoints {
		fallback := ServerConfig{Endpoint: endpoint}
		if err := fallback.validateEndpoint(); err != nil {
			errs = append(errs, fmt.Errorf("fallback_endpoints[%d]: %w", i, err))
		} else if endpoint == c.Endpoint || slices.Contains(c.FallbackEndpoints[:i], endpoint) {
			errs = append(errs, fmt.Errorf("fallback_endpoints[%d]: is there twice", i))
		} else if fallback.overHTTP() != c.overHTTP() {
			errs = append(errs, fmt.Errorf("fallback_endpoints[%d]: must be WebSocket, or plain HTTP, as endpoint is", i))
		}
	}
	return errors.Join(errs...)
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

func (c *ServerConfig) validateProxy() error {
	if _, err := parseProxy(c.ProxyURL); err != nil {
		return fmt.Errorf("proxy_url: %w", err)
	}
	return nil
}

// Validate reports every mistake below agents.
func (c *AgentsConfig) Validate() error {
	var errs []error
	switch c.ConnectionOffers {
	case OffersRelay, OffersDrop:
	case OffersRewrite:
		if c.PublicEndpoint == "" {
			errs = append(errs, fmt.Errorf("public_endpoint: must be given with connection_offers %q", OffersRewrite))
		}
	default:
		errs = append(errs, fmt.Errorf("connection_offers: must be %q, %q or %q, is %q", OffersRelay, OffersDrop, OffersRewrite, c.ConnectionOffers))
	}
	if c.PublicEndpoint != "" {
		errs = append(errs, c.validatePublicEndpoint())
	}
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
	if c.DrainTime < 0 || c.DrainTime > maxDrainTime {
		errs = append(errs, fmt.Errorf("drain_time: must be from 0 to %s, is %s", maxDrainTime, c.DrainTime))
	}
	if _, err := c.proxies(); err != nil {
		errs = append(errs, err)
	}
	if c.PollWait < 0 || c.PollWait > maxPollWait {
		errs = append(errs, fmt.Errorf("poll_wait: must be from 0 to %s, is %s", maxPollWait, c.PollWait))
	}
	if c.PollInterval < time.Second || c.PollInterval > polling.MaxInterval {
		errs = append(errs, fmt.Errorf("poll_interval: must be from 1s to %s, is %s", polling.MaxInterval, c.PollInterval))
	}
	return errors.Join(errs...)
}

// proxies returns whose word is taken on from where agents connect.
func (c *AgentsConfig) proxies() (p forwarded.Proxies, err error) {
	source, known := addressSources[c.AddressFrom]
	switch {
	case !known:
		return p, fmt.Errorf("address_from: must be %q, %q, %q or %q, is %q", AddressFromConnection, AddressFromProxyProtocol,
			AddressFromXForwardedFor, AddressFromForwarded, c.AddressFrom)
	case (source == forwarded.SourceConnection) != (len(c.TrustedProxies) == 0):
		return p, fmt.Errorf("address_from: is %q, and trusted_proxies has %d networks: one says how, the other who, so both are needed or neither",
			c.AddressFrom, len(c.TrustedProxies))
	}
	p.Source = source
	for _, text := range c.TrustedProxies {
		network, problem := forwarded.ParseNetwork(text)
		err = errors.Join(err, problem)
		p.Networks = append(p.Networks, network)
	}
	if err != nil {
		err = fmt.Errorf("trusted_proxies: %w", err)
	}
	return p, err
}

func (c *AgentsConfig) validatePublicEndpoint() error {
	u, err := url.Parse(c.PublicEndpoint)
	switch {
	case err != nil: // which repeats the whole URL
		return errors.New("public_endpoint: is not a URL")
	case !slices.Contains([]string{"ws", "wss", "http", "https"}, u.Scheme) || u.Hostname() == "":
		return fmt.Errorf("public_endpoint: must be a URL with ws://, wss://, http:// or https:// and a host, is %q", socket.Place(u))
	case u.User != nil:
		return errors.New("public_endpoint: must not hold a user or password, which all agents would get")
	}
	return nil
}

// Validate reports a keep-alive that could not work.
func (c *KeepAliveConfig) Validate() error {
	if c.Interval < minKeepAlive || c.Timeout < c.Interval+minKeepAlive {
		return fmt.Errorf("interval: must be at least %s, and as much below timeout; is %s with timeout %s", minKeepAlive, c.Interval, c.Timeout)
	}
	return nil
}
