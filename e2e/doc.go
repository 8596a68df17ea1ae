// Package e2e tests the gateway from outside: the built collector as a process, real agents
// before it, a real server behind it, real sockets on loopback between them.
//
//	make e2e                               builds what is needed and runs all of it
//	cd e2e && go test -run TestChain ./... runs one, on what was built before
//	make attack                            runs those of attacks, at their full length
//
// E2E_COLLECTOR and E2E_SUPERVISOR name other programs to test than those in build/.
//
// The cast, one file each:
//
//	process.go       any program that is started here, its log, its end
//	collector.go     the built collector, as gateway and as agent, and the supervisor
//	server.go        an OpAMP server on opamp-go's library, with or without the gateway capability
//	agent.go         agents on opamp-go's client library
//	stranger.go      whoever talks to the listener without being let in
//	raw.go           agents of bare WebSockets, for what a library hides or does not do
//	bare.go          a server of bare WebSockets, for the same
//	bystanders.go    agents that are to notice nothing of what happens to others
//	fleet.go         thousands of such agents, which number what they say and come back when closed
//	fleet_server.go  a server that bears those, and keeps a record of all that it hears
//	sharing.go       what agents on one link do to each other, and servers at it
//	frame_limit.go   peers and proxies that take WebSocket frames of some size only
//	long_way.go      a long way to the server
//	fault/           a line that does to TCP connections what networks do
//	certs.go         certificates
//	wait.go          waiting for what has to happen; no test sleeps
//
// The files *_test.go tell the stories. Package fault breaks connections on the way, and soak
// is a program that does so at random, for as long as one likes: make soak.
package e2e
