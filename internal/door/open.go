package door

// maxConnections is more than one process will ever have.
const maxConnections = 1_000_000

// DefaultConnections is how many connections the process's limit of open files allows, without some for
// links to the server, for strangers that are told that there are too many, and for the rest of the
// collector.
func DefaultConnections() int { return connectionsFor(openFiles()) }

func connectionsFor(files uint64) int {
	n := int(min(files, maxConnections))
	return n - min(n/2, max(256, n/8))
}
