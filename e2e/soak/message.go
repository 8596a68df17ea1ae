package main

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
)

// capability is the custom capability under which agents and server talk.
const capability = "io.opampgateway.soak"

// stamp says whose message this is, on which of its connections, and the how manyth it is.
// All that follows in the payload is derived from it, so that the receiver knows every byte.
type stamp struct {
	down   bool
	actor  uint32 // who says it; for the server's messages, whom they are for
	epoch  uint32 // the how manyth connection of the actor
	number uint32 // from 1; up, on this connection; down, of all for this agent
	size   uint32 // of what follows the stamp, in bytes
}

const stampSize = 1 + 4*4

func (s stamp) String() string {
	way := "up"
	if s.down {
		way = "down"
	}
	return fmt.Sprintf("%s %d of agent %d, connection %d, %d bytes", way, s.number, s.actor, s.epoch, s.size)
}

func (s stamp) payload() []byte {
	b := make([]byte, 1, stampSize+int(s.size)+8)
	if s.down {
		b[0] = 1
	}
	for _, v := range []uint32{s.actor, s.epoch, s.number, s.size} {
		b = binary.BigEndian.AppendUint32(b, v)
	}
	for state := s.seed(); len(b) < stampSize+int(s.size); {
		state = next(state)
		b = binary.LittleEndian.AppendUint64(b, state)
	}
	return b[:stampSize+int(s.size)]
}

// readStamp checks every byte of a payload.
func readStamp(b []byte) (stamp, error) {
	s, err := startOfStamp(b)
	if err != nil {
		return s, err
	}
	rest := b[stampSize:]
	if uint32(len(rest)) != s.size {
		return s, fmt.Errorf("%s: has %d bytes", s, len(rest))
	}
	state := s.seed()
	var want [8]byte
	for len(rest) > 0 {
		state = next(state)
		binary.LittleEndian.PutUint64(want[:], state)
		n := min(8, len(rest))
		if !bytes.Equal(rest[:n], want[:n]) {
			return s, fmt.Errorf("%s: other bytes than were sent", s)
		}
		rest = rest[n:]
	}
	return s, nil
}

// startOfStamp reads the stamp in the start of a payload.
func startOfStamp(b []byte) (stamp, error) {
	if len(b) < stampSize || b[0] > 1 {
		return stamp{}, errors.New("not a payload of ours")
	}
	u := func(i int) uint32 { return binary.BigEndian.Uint32(b[1+4*i:]) }
	return stamp{down: b[0] == 1, actor: u(0), epoch: u(1), number: u(2), size: u(3)}, nil
}

func (s stamp) seed() uint64 {
	state := uint64(s.actor)<<32 | uint64(s.epoch)
	state = next(state ^ 0x9e3779b97f4a7c15)
	state = next(state ^ (uint64(s.number)<<32 | uint64(s.size)))
	if s.down {
		state = ^state
	}
	return next(state) | 1
}

// next is xorshift64*.
func next(x uint64) uint64 {
	x ^= x >> 12
	x ^= x << 25
	x ^= x >> 27
	return x * 2685821657736338717
}
