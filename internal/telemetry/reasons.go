package telemetry

// Reason says what went wrong, in the reason attribute of opampgateway.faults.
type Reason string

// The reasons; Reasons says what each means.
const (
	ReasonBadFrame         Reason = "bad_frame"
	ReasonBadUID           Reason = "bad_uid"
	ReasonTooLarge         Reason = "too_large"
	ReasonForeignConnect   Reason = "foreign_connect"
	ReasonBadConnect       Reason = "bad_connect"
	ReasonTooManyUIDs      Reason = "too_many_uids"
	ReasonUIDConflict      Reason = "uid_conflict"
	ReasonUIDTaken         Reason = "uid_taken"
	ReasonAgentSlow        Reason = "agent_slow"
	ReasonAgentSilent      Reason = "agent_silent"
	ReasonAgentMute        Reason = "agent_mute"
	ReasonAgentMissedPolls Reason = "agent_missed_polls"
	ReasonAgentRefused     Reason = "agent_refused"
	ReasonAgentFloods      Reason = "agent_floods"
	ReasonServerEndsLink   Reason = "server_ends_link"
	ReasonAgentTurnedDown  Reason = "agent_turned_down"
	ReasonServerLimit      Reason = "server_limit"
	ReasonServerTurnsDown  Reason = "server_turns_down"
	ReasonMemoryFull       Reason = "memory_full"
	ReasonGraceOver        Reason = "grace_over"
	ReasonFrameLost        Reason = "frame_lost"
	ReasonLinkLost         Reason = "link_lost"
	ReasonLinkSilent       Reason = "link_silent"
	ReasonServerBadFrame   Reason = "server_bad_frame"
	ReasonServerTooLarge   Reason = "server_too_large"
	ReasonServerNoUID      Reason = "server_no_uid"
	ReasonServerUnknownUID Reason = "server_unknown_uid"
	ReasonServerStray      Reason = "server_stray"
	ReasonServerFrameLost  Reason = "server_frame_lost"
	ReasonPanic            Reason = "panic"
)

// Reasons describes every Reason, for docs/metrics.md: what happened, and what the gateway does but
// for ending a connection, which the causes of internal/ending say.
var Reasons = []struct {
	Reason     Reason
	What, Then string
}{
	{ReasonBadFrame, "an agent's message cannot be read", "skips it, tells the agent; ten in a row, or what is no WebSocket frame, end the connection"},
	{ReasonBadUID, "an agent's message has no instance UID of 16 or 26 bytes", "the same"},
	{ReasonTooLarge, "an agent's message is above `max_message_size`", "a gateway's is skipped, and its agent told"},
	{ReasonForeignConnect, "what is no gateway asks about agents, or a gateway does where all agents are accepted", ""},
	{ReasonBadConnect, "a gateway's question has no `request_uid` of 1 to 128 bytes, one that is in use, or is too large", "skips it, tells the gateway"},
	{ReasonTooManyUIDs, "one connection uses more instance UIDs than it may", "skips the message, tells the agent"},
	{ReasonUIDConflict, "two connections with the same credentials use one instance UID", "the one that spoke last gets the replies; both stay"},
	{ReasonUIDTaken, "an agent uses the instance UID of another one, which has other credentials and is there", "skips the message, tells the agent"},
	{ReasonAgentSlow, "more waits for an agent than may, or a write to it makes no progress", ""},
	{ReasonAgentSilent, "an agent gives no sign of life", ""},
	{ReasonAgentMute, "an agent was let in and has said nothing for a minute", ""},
	{ReasonAgentMissedPolls, "an agent over plain HTTP has missed three polls", ""},
	{ReasonAgentRefused, "the server refused an agent that had been let in", ""},
	{ReasonAgentFloods, "an agent says more than the server takes for a second or longer", "reads it no faster than that, and nobody else slower; named in the log when it lasts"},
	{ReasonServerEndsLink, "the server ended links because of this agent's message", "skips it, tells the agent, and turns down whatever it says for 10 minutes, 2 if the server did not say why it ended them, and longer each time"},
	{ReasonAgentTurnedDown, "an agent says something while it is turned down for that", "skips it, tells the agent"},
	{ReasonServerLimit, "an agent's message is no smaller than one for which the server has ended a link with 1009", "skips it, tells the agent"},
	{ReasonServerTurnsDown, "a server over plain HTTP answers an agent's message with 400, 413, 415 or 422, or fails at it again and again, and not at others", "skips it, tells the agent"},
	{ReasonMemoryFull, "what is sent takes all the memory that it may", "an agent with a large message waits, new instance UIDs are turned down, and who makes no progress while others wait is closed"},
	{ReasonGraceOver, "no link came back in time", ""},
	{ReasonFrameLost, "an agent's message could not be delivered before its connection, or the last link, ended", ""},
	{ReasonLinkLost, "a link ended", "connects again; its agents move"},
	{ReasonLinkSilent, "a link gives no sign of life", "replaces it"},
	{ReasonServerBadFrame, "a server's message cannot be read", "skips it"},
	{ReasonServerTooLarge, "a server's message is above `max_message_size`, or its custom capabilities above 64 KiB", "skips it, logs whom it was for"},
	{ReasonServerNoUID, "a server's message names no agent", "drops it, logs the first of each link"},
	{ReasonServerUnknownUID, "a server's message is for an agent that is not here", "drops it"},
	{ReasonServerStray, "the server answers a question that nobody waits for", "drops it"},
	{ReasonServerFrameLost, "a server's message could not be delivered before its agent's connection ended", ""},
	{ReasonPanic, "answering a request failed by a fault of this program", "ends that connection; please report the log line"},
}

// Outcome says how an agent's request to connect ended, in the outcome attribute of
// opampgateway.admissions.
type Outcome string

// The outcomes; Outcomes says what each means.
const (
	OutcomeAccepted      Outcome = "accepted"
	OutcomeRefused       Outcome = "refused"
	OutcomeNoLink        Outcome = "no_link"
	OutcomeNoAnswer      Outcome = "no_answer"
	OutcomeCannotAsk     Outcome = "cannot_ask"
	OutcomeCannotVerify  Outcome = "cannot_verify"
	OutcomeTooMany       Outcome = "too_many"
	OutcomeBadRequest    Outcome = "bad_request"
	OutcomeUnauthorized  Outcome = "unauthorized"
	OutcomeNoGateways    Outcome = "no_gateways"
	OutcomeCannotUpgrade Outcome = "cannot_upgrade"
	OutcomeAbandoned     Outcome = "abandoned"
	OutcomeReload        Outcome = "reload"
)

// Outcomes describes every Outcome, for docs/metrics.md.
var Outcomes = []struct {
	Outcome Outcome
	What    string
}{
	{OutcomeAccepted, "let in"},
	{OutcomeRefused, "refused by the server, asked or shown the agent's headers, with its status"},
	{OutcomeNoLink, "503: there is no link to ask the server on"},
	{OutcomeNoAnswer, "503: the server did not answer in time"},
	{OutcomeCannotAsk, "503: the server does not know the gateway capability; never with `auto`"},
	{OutcomeCannotVerify, "503: the server was tried with the agent's headers, and gave no verdict"},
	{OutcomeTooMany, "503: too many are connected, or wait, or what they sent takes too much memory"},
	{OutcomeBadRequest, "4xx: neither a WebSocket upgrade nor a poll, too large, unreadable, or from a web page"},
	{OutcomeUnauthorized, "turned away by `listener.auth` or a middleware, with its status"},
	{OutcomeNoGateways, "403: a gateway, and `agents.allow_gateways` is not set"},
	{OutcomeCannotUpgrade, "500: a middleware stands in the way of the upgrade"},
	{OutcomeAbandoned, "the agent left while it waited"},
	{OutcomeReload, "503: the gateway is being reloaded, or stops; to be tried again after 2 to 5 s"},
}

// Index returns the place of a Reason in Reasons; 0 if it is not there.
func Index(reason Reason) int { return indexes[reason] }

var indexes = func() map[Reason]int {
	indexes := map[Reason]int{}
	for i, r := range Reasons {
		indexes[r.Reason] = i
	}
	return indexes
}()
