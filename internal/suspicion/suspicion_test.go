package suspicion

import (
	"encoding/binary"
	"math"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gorilla/websocket"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/opampgateway/opampgateway/internal/monotonic"
	"github.com/opampgateway/opampgateway/internal/wire"
)

// agent returns the UID of an agent.
func agent(n int) wire.UID {
	if n == own {
		return wire.UID{}
	}
	uid, err := wire.ParseUID(binary.BigEndian.AppendUint64(make([]byte, 8), uint64(n)))
	if err != nil {
		panic(err)
	}
	return uid
}

const (
	alice, bob, cathy = 1, 2, 3
	own               = 0 // the gateway itself
)

func says(n, size int) Message { return Message{UID: agent(n), Size: size, Came: Always} }

// ends tells that a link has ended while nobody was caught.
func ends(b *Book, code int, unacknowledged ...Message) End {
	e := End{Code: code, Unacknowledged: unacknowledged}
	if culprit, d := b.Ended(e); d != 0 || culprit != (Message{}) {
		panic("somebody was named though nothing was on trial")
	}
	return e
}

// wantNamed has a link end at the first of these, which is caught, and asserts that its agent is named.
func wantNamed(t *testing.T, b *Book, code int, lasts time.Duration, unacknowledged ...Message) {
	t.Helper()
	culprit, d := b.Ended(End{Code: code, Unacknowledged: unacknowledged, Caught: true})
	require.Equal(t, unacknowledged[0], culprit)
	require.Equal(t, lasts, d)
}

// forHowLong is how long an agent is turned down that is named for the first time.
func forHowLong(code int) time.Duration {
	if code == 0 {
		return unsureFor
	}
	return namedFor
}

// want asserts what is to be done with a message; Try is also TryAlone.
func want(t *testing.T, b *Book, j Judgement, m Message, why string) {
	t.Helper()
	got := b.Judge(m)
	if got == TryAlone && j == Try {
		return
	}
	require.Equal(t, j, got, why)
}

// wantNobody has a link end at the first of these, which is caught, and asserts that nobody is named.
func wantNobody(t *testing.T, b *Book, e End) {
	t.Helper()
	e.Caught = true
	culprit, d := b.Ended(e)
	require.Zero(t, culprit)
	require.Zero(t, d)
}

// wantNamedUnsure has links end for no reason that was told until the agent is named.
func wantNamedUnsure(t *testing.T, b *Book, lasts time.Duration, m Message) {
	t.Helper()
	ends(b, 0, m)
	ends(b, 0, m)
	wantNamed(t, b, 0, lasts, m)
}

func bubble(t *testing.T, test func(t *testing.T, b *Book)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) { test(t, NewBook()) })
}

// When the server says that it was for a message, it takes two links.
func TestAPoisonIsNamedAtTheSecondEnd(t *testing.T) {
	for _, code := range []int{
		websocket.CloseMessageTooBig, websocket.CloseProtocolError, websocket.CloseUnsupportedData,
		websocket.CloseInvalidFramePayloadData, websocket.ClosePolicyViolation,
	} {
		bubble(t, func(t *testing.T, b *Book) {
			poison, small := says(alice, 2<<20), says(bob, 30)
			b.Acknowledged(100)
			want(t, b, Pass, poison, "innocent")
			ends(b, code, small, poison)
			want(t, b, Try, poison, "suspect")
			want(t, b, Pass, says(cathy, 30), "was not there")
			if code == websocket.CloseMessageTooBig {
				want(t, b, Pass, small, "the server has taken one as large")
			} else {
				want(t, b, Try, small, "may have been it")
				b.Taken(small)
				want(t, b, Try, small, "for a while, since that costs little")
			}
			wantNamed(t, b, code, namedFor, poison, small)
			want(t, b, Named, poison, "")
			want(t, b, Named, says(alice, 1), "whatever else it says")
			time.Sleep(suspectFor)
			want(t, b, Pass, small, "was not caught")
		})
	}
}

// When the server says nothing, or nothing of use, it takes three.
func TestAPoisonIsNamedAtTheThirdEndWithoutAReason(t *testing.T) {
	for _, code := range []int{
		0, websocket.CloseNormalClosure, websocket.CloseNoStatusReceived, websocket.CloseAbnormalClosure,
		websocket.CloseInternalServerErr, 4000,
	} {
		bubble(t, func(t *testing.T, b *Book) {
			poison := says(alice, 200)
			ends(b, code, poison, says(bob, 30))
			want(t, b, Pass, poison, "once is no reason")
			time.Sleep(30 * time.Second)
			ends(b, code, says(cathy, 10), poison)
			want(t, b, Try, poison, "both times")
			want(t, b, Pass, says(bob, 30), "only the first time")
			want(t, b, Pass, says(cathy, 30), "only the second time")
			wantNamed(t, b, code, unsureFor, poison)
			want(t, b, Named, poison, "")
		})
	}
}

func TestTheSecondEndCountsForAMinute(t *testing.T) {
	bubble(t, func(t *testing.T, b *Book) {
		ends(b, 0, says(alice, 200), says(alice, 20))
		want(t, b, Pass, says(alice, 200), "two messages of one end are one end")
		time.Sleep(suspectFor)
		ends(b, 0, says(alice, 200))
		want(t, b, Pass, says(alice, 200), "too long ago")
		time.Sleep(suspectFor - time.Nanosecond)
		ends(b, 0, says(alice, 200))
		want(t, b, Try, says(alice, 200), "the second in a minute")
		time.Sleep(suspectFor - time.Nanosecond)
		want(t, b, Try, says(alice, 1), "still")
		time.Sleep(time.Nanosecond)
		want(t, b, Pass, says(alice, 200), "nobody is a suspect for longer, unless it goes on")
	})
}

// A server that goes away, or wants to be left alone, says so of itself.
func TestCodesThatAccuseNobody(t *testing.T) {
	for _, code := range []int{websocket.CloseGoingAway, websocket.CloseServiceRestart, websocket.CloseTryAgainLater} {
		bubble(t, func(t *testing.T, b *Book) {
			for range 5 {
				ends(b, code, says(alice, 200))
				want(t, b, Pass, says(alice, 200), "")
			}
			wantNobody(t, b, End{Code: code, Unacknowledged: []Message{says(alice, 200)}})
			ends(b, 0, says(alice, 200))
			want(t, b, Pass, says(alice, 200), "those before do not count")
		})
	}
}

// A network that drops a link twice makes suspects, and names nobody.
func TestANetworkThatDropsALinkTwiceNamesNobody(t *testing.T) {
	bubble(t, func(t *testing.T, b *Book) {
		speakers := []Message{says(alice, 30), says(bob, 64<<10), says(cathy, 3000)}
		for range 2 {
			ends(b, 0, speakers...)
			time.Sleep(time.Second)
		}
		for _, m := range speakers {
			want(t, b, Try, m, "")
		}
		time.Sleep(suspectFor)
		b.Sweep()
		for _, m := range speakers {
			want(t, b, Pass, m, "")
		}
		require.True(t, b.clean.Load())
	})
}

// Who is suspected for the size of a message is not held up with all others.
func TestOnlyLargeMessagesAreTriedForTheirSize(t *testing.T) {
	bubble(t, func(t *testing.T, b *Book) {
		b.Acknowledged(500)
		ends(b, websocket.CloseMessageTooBig, says(alice, 8000))
		want(t, b, Pass, says(alice, 500), "the server has taken one as large")
		want(t, b, Try, says(alice, 501), "")
		ends(b, websocket.CloseProtocolError, says(alice, 20))
		want(t, b, Try, says(alice, 20), "it may be another reason")
		ends(b, websocket.CloseMessageTooBig, says(alice, 8000))
		want(t, b, Try, says(alice, 20), "that still stands")
	})
}

func TestTwoPoisonsAtOnce(t *testing.T) {
	bubble(t, func(t *testing.T, b *Book) {
		a, c, innocent := says(alice, 500), says(bob, 700), says(cathy, 600)
		ends(b, websocket.ClosePolicyViolation, a, innocent, c)
		wantNamed(t, b, websocket.ClosePolicyViolation, namedFor, a, innocent, c)
		want(t, b, Named, a, "")
		want(t, b, Try, c, "is next")
		wantNamed(t, b, websocket.ClosePolicyViolation, namedFor, c)
		want(t, b, Named, a, "")
		want(t, b, Named, c, "")
		want(t, b, Try, innocent, "")
	})
}

// Several poisons, each of which has ended a link before anybody was on trial, are caught in turn.
func TestManyPoisonsAtOnce(t *testing.T) {
	bubble(t, func(t *testing.T, b *Book) {
		const code = websocket.CloseInvalidFramePayloadData
		poisons := []Message{says(1, 1000), says(2, 1000), says(3, 1000), says(4, 2000)}
		for _, m := range poisons {
			ends(b, code, m, says(cathy+10, 30))
		}
		for _, m := range poisons {
			b.Taken(Message{m.UID, 30, Always}) // harmless
			wantNobody(t, b, End{Code: code, Unacknowledged: []Message{m}})
		}
		for _, m := range poisons {
			b.Taken(Message{m.UID, 800, Always}) // smaller
			wantNamed(t, b, code, namedFor, m)
		}
	})
}

// Somebody is caught again and again in place of another, but says the like in between.
func TestWhoIsCaughtAndPassesIsNotNamed(t *testing.T) {
	bubble(t, func(t *testing.T, b *Book) {
		const code = websocket.CloseInvalidFramePayloadData
		for n := range 5 {
			ends(b, code, says(100+n, 1))
		}
		for range 2 {
			wantNobody(t, b, End{Code: code, Unacknowledged: []Message{says(alice, 30)}})
			b.Taken(says(alice, 28))
		}
	})
}

// One of a thousand who spoke: all others are taken, and never named.
func TestAPoisonAmongAThousandSpeakers(t *testing.T) {
	for _, code := range []int{websocket.CloseInvalidFramePayloadData, 0} {
		bubble(t, func(t *testing.T, b *Book) {
			const poison = 617
			var all []Message
			for n := 1; n <= 1000; n++ {
				all = append(all, says(n, 20+n%300))
			}
			links := 1
			for ends(b, code, all...); b.Judge(all[0]) == Pass; links++ {
				ends(b, code, all...)
			}
			for _, m := range all { // each speaks in turn
				want(t, b, Try, m, "")
				time.Sleep(5 * time.Millisecond)
				if m.UID == agent(poison) {
					links++
					wantNamed(t, b, code, forHowLong(code), m)
					continue
				}
				b.Taken(m)
			}
			time.Sleep(suspectFor)
			for _, m := range all {
				if m.UID == agent(poison) {
					want(t, b, Named, m, "")
				} else {
					want(t, b, Pass, m, "")
				}
			}
			assert.LessOrEqual(t, links, 3)
			if code != 0 {
				assert.Equal(t, 2, links)
			}
		})
	}
}

func TestTheServersLimitIsLearned(t *testing.T) {
	bubble(t, func(t *testing.T, b *Book) {
		const tooLarge = 1 << 20
		require.Equal(t, int64(math.MaxInt64), b.Limit())
		b.Acknowledged(200 << 10)
		ends(b, websocket.CloseMessageTooBig, says(alice, tooLarge))
		require.Equal(t, int64(math.MaxInt64), b.Limit(), "it may have been another's")
		wantNamed(t, b, websocket.CloseMessageTooBig, namedFor, says(alice, tooLarge))
		require.EqualValues(t, tooLarge, b.Limit())
		want(t, b, TooLarge, says(bob, tooLarge), "as large")
		want(t, b, TooLarge, says(bob, tooLarge+1), "larger")
		want(t, b, Pass, says(bob, tooLarge-1), "smaller")
		want(t, b, Named, says(alice, 2*tooLarge), "is named anyway")

		time.Sleep(limitFor - time.Nanosecond)
		b.Sweep()
		want(t, b, TooLarge, says(bob, tooLarge), "still")
		time.Sleep(time.Nanosecond)
		want(t, b, Try, says(bob, tooLarge), "servers may be configured anew")
		want(t, b, Pass, says(bob, tooLarge-1), "")
		wantNamed(t, b, websocket.CloseMessageTooBig, namedFor, says(bob, tooLarge))
		want(t, b, TooLarge, says(cathy, tooLarge), "it was not")

		time.Sleep(limitFor)
		b.Acknowledged(tooLarge - 1)
		want(t, b, Try, says(cathy, tooLarge), "")
		b.Acknowledged(tooLarge)
		want(t, b, Pass, says(cathy, 10*tooLarge), "it was")
		require.Equal(t, int64(math.MaxInt64), b.Limit())
	})
}

func TestALimitIsLearnedOnlyFromWhatTheServerSaysOfSizes(t *testing.T) {
	bubble(t, func(t *testing.T, b *Book) {
		b.Acknowledged(1000)
		for n, code := range []int{websocket.CloseProtocolError, websocket.ClosePolicyViolation} {
			wantNamed(t, b, code, namedFor, says(10+n, 1<<20))
		}
		wantNamedUnsure(t, b, unsureFor, says(20, 1<<20))
		require.Equal(t, int64(math.MaxInt64), b.Limit())
		wantNamed(t, b, websocket.CloseMessageTooBig, namedFor, says(alice, 1000))
		require.Equal(t, int64(math.MaxInt64), b.Limit(), "it has taken one as large")
	})
}

// A server that comes back with a smaller limit has taken larger messages before.
func TestALimitThatBecameSmaller(t *testing.T) {
	bubble(t, func(t *testing.T, b *Book) {
		b.Acknowledged(4 << 20)
		ends(b, websocket.CloseMessageTooBig, says(bob, 30), says(alice, 2<<20))
		want(t, b, Try, says(alice, 2<<20), "suspect")
		b.Acknowledged(30)
		wantNamed(t, b, websocket.CloseMessageTooBig, namedFor, says(alice, 2<<20))
		want(t, b, TooLarge, says(cathy, 2<<20), "")
	})
	bubble(t, func(t *testing.T, b *Book) {
		b.Acknowledged(4 << 20)
		ends(b, websocket.CloseMessageTooBig, says(bob, 30), Message{Size: 5 << 20})
		want(t, b, Pass, says(bob, 30), "the gateway's own was too large")
	})
}

func TestTheGatewaysOwnIsNeverNamed(t *testing.T) {
	bubble(t, func(t *testing.T, b *Book) {
		for range 3 {
			ends(b, websocket.CloseProtocolError, says(own, 500))
		}
		want(t, b, Pass, says(own, 500), "")
		wantNobody(t, b, End{Unacknowledged: []Message{says(own, 500)}})
		ends(b, websocket.CloseProtocolError) // with nothing on its way
		require.Empty(t, b.suspects)
		require.Empty(t, b.named)
	})
}

func TestWhoIsNamedAgainIsTurnedDownForLonger(t *testing.T) {
	bubble(t, func(t *testing.T, b *Book) {
		m := says(alice, 100)
		for _, minutes := range []int{10, 20, 40, 60, 60} {
			lasts := time.Duration(minutes) * time.Minute
			wantNamed(t, b, websocket.ClosePolicyViolation, lasts, m)
			time.Sleep(lasts - time.Nanosecond)
			b.Sweep()
			want(t, b, Named, m, "")
			time.Sleep(time.Nanosecond)
			b.Sweep()
			want(t, b, Try, m, "on trial afterwards")
			b.Taken(says(alice, 1<<30))
			want(t, b, Try, m, "whatever it says")
		}
		time.Sleep(time.Hour - time.Nanosecond)
		want(t, b, Try, m, "for as long again")
		time.Sleep(time.Nanosecond)
		b.Sweep()
		want(t, b, Pass, m, "then it is forgotten")
		require.True(t, b.clean.Load())
		wantNamedUnsure(t, b, unsureFor, m)
		time.Sleep(unsureFor)
		want(t, b, Try, m, "")
		wantNamed(t, b, 0, 2*unsureFor, m)
	})
}

func TestSweepForgetsAll(t *testing.T) {
	bubble(t, func(t *testing.T, b *Book) {
		for n := range 100 {
			ends(b, 0, says(10+n, 10))
			ends(b, websocket.CloseProtocolError, says(200+n, 10))
		}
		require.Len(t, b.ends, maxEnds)
		time.Sleep(suspectFor)
		wantNamed(t, b, websocket.CloseProtocolError, namedFor, says(alice, 10))
		require.False(t, b.clean.Load())
		time.Sleep(suspectFor)
		b.Sweep()
		require.Empty(t, b.traces)
		require.Empty(t, b.ends)
		require.Len(t, b.suspects, 1)
		time.Sleep(2 * namedFor)
		b.Sweep()
		require.Empty(t, b.suspects)
		require.Empty(t, b.named)
		require.True(t, b.clean.Load())
	})
}

func TestAnotherServerIsAskedAnew(t *testing.T) {
	bubble(t, func(t *testing.T, b *Book) {
		large := says(alice, 1000)
		ends(b, websocket.CloseMessageTooBig, large)
		wantNamed(t, b, websocket.CloseMessageTooBig, namedFor, large)
		ends(b, websocket.CloseProtocolError, says(bob, 10))
		b.Forget()
		require.True(t, b.clean.Load())
		for _, m := range []Message{large, says(bob, 1000), {UID: agent(cathy), Size: 1, Came: monotonic.Now()}} {
			want(t, b, Pass, m, "")
		}
		require.Equal(t, int64(math.MaxInt64), b.Limit())
		wantNamed(t, b, websocket.CloseProtocolError, namedFor, large)
	})
}

func TestABookIsBounded(t *testing.T) {
	bubble(t, func(t *testing.T, b *Book) {
		for n := range maxAgents + 100 {
			ends(b, 0, says(1+n, 10))
			ends(b, websocket.CloseProtocolError, says(1<<20+n, 10))
		}
		require.Len(t, b.traces, maxAgents)
		require.LessOrEqual(t, len(b.suspects), 2*maxAgents)
		require.Len(t, b.ends, maxEnds)
		for n := range maxAgents {
			time.Sleep(suspectFor)
			b.traces = map[wire.UID]trace{}
			b.Ended(End{Code: websocket.CloseProtocolError, Unacknowledged: []Message{says(1<<30+n, 10)}, Caught: true})
			b.named[agent(1<<30+n)] = name{remember: time.Now().Add(100_000 * time.Hour)}
		}
		require.Len(t, b.named, maxAgents)
		time.Sleep(suspectFor)
		b.Sweep()
		culprit, d := b.Ended(End{Code: websocket.CloseProtocolError, Unacknowledged: []Message{says(math.MaxInt32, 10)}, Caught: true})
		require.Equal(t, says(math.MaxInt32, 10), culprit)
		require.Zero(t, d, "there is no more room for names")
	})
}

func TestJudgeAllocatesNothing(t *testing.T) {
	b := NewBook()
	m := says(alice, 100)
	assert.Zero(t, testing.AllocsPerRun(1000, func() { b.Judge(m) }))
	b.Ended(End{Code: websocket.CloseProtocolError, Unacknowledged: []Message{says(bob, 100)}, Caught: true})
	assert.Zero(t, testing.AllocsPerRun(1000, func() { b.Judge(m) }))
}

// Judge takes no lock while nobody is suspected.
func TestJudgeWaitsForNobodyWhileAllAreInnocent(t *testing.T) {
	b := NewBook()
	b.mu.Lock()
	defer b.mu.Unlock()
	want(t, b, Pass, says(alice, 100), "")
}

func BenchmarkJudge(b *testing.B) {
	for name, accused := range map[string]int{"clean": 0, "one is named": 1} {
		b.Run(name, func(b *testing.B) {
			book, m := NewBook(), says(alice, 100)
			for range accused {
				book.Ended(End{Code: websocket.CloseProtocolError, Unacknowledged: []Message{says(bob, 100)}, Caught: true})
			}
			b.ReportAllocs()
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					if book.Judge(m) != Pass {
						b.Error("alice is innocent")
					}
				}
			})
		})
	}
}

// TestWhoMayBeNamedByMistakeIsReleased tells once whom to ask for what was turned down.
func TestWhoMayBeNamedByMistakeIsReleased(t *testing.T) {
	bubble(t, func(t *testing.T, b *Book) {
		wantNamedUnsure(t, b, unsureFor, says(alice, 100))
		wantNamed(t, b, websocket.CloseUnsupportedData, namedFor, says(bob, 100))
		require.Empty(t, b.Sweep())
		time.Sleep(unsureFor)
		require.Equal(t, []wire.UID{says(alice, 0).UID}, b.Sweep())
		want(t, b, Try, says(alice, 100), "may have been it after all")
		require.Empty(t, b.Sweep())
		time.Sleep(namedFor)
		require.Empty(t, b.Sweep(), "there was no doubt")
	})
}

// Where the server has said nothing, suspects are tried one at a time, but not for long.
func TestSuspectsAreTriedAloneWhereTheServerSaysNothing(t *testing.T) {
	bubble(t, func(t *testing.T, b *Book) {
		m := says(alice, 100)
		ends(b, 0, m)
		ends(b, 0, m)
		for range enoughAlone {
			require.Equal(t, TryAlone, b.Judge(m))
			b.Taken(says(alice, 1))
		}
		require.Equal(t, Try, b.Judge(m))
		ends(b, 0, m)
		require.Equal(t, TryAlone, b.Judge(m))
		ends(b, websocket.CloseProtocolError, m)
		require.Equal(t, Try, b.Judge(m))
	})
}

// A link ends for no reason that was told while somebody is on trial who says much: whatever it said before was taken, so
// it is only suspected again. What was smaller than what it is suspected for proves nothing.
func TestManyTrialsAreAnAlibiWhereTheServerSaysNothing(t *testing.T) {
	bubble(t, func(t *testing.T, b *Book) {
		flood := says(alice, 100)
		ends(b, 0, flood)
		ends(b, 0, flood)
		for range enoughTrials {
			want(t, b, Try, flood, "")
			b.Taken(says(alice, 90)) // said again, it may have changed a little
		}
		wantNobody(t, b, End{Unacknowledged: []Message{flood}})
		for range enoughTrials {
			b.Taken(says(alice, 80))
			b.Taken(says(bob, 100))
		}
		wantNamed(t, b, 0, unsureFor, flood)
	})
}

// A poison among much that is harmless is named where the server says that it was for a message.
func TestHarmlessMessagesAreNoAlibiWhereTheServerSaysWhy(t *testing.T) {
	bubble(t, func(t *testing.T, b *Book) {
		m := says(alice, 100)
		ends(b, websocket.ClosePolicyViolation, m)
		for range 100 {
			b.Taken(m)
		}
		wantNamed(t, b, websocket.ClosePolicyViolation, namedFor, m)
	})
}

// A network ends one link after the other: an agent that was there at few of these ends is not named when it is caught
// at one.
func TestEndsWithoutSomebodySpeakForIt(t *testing.T) {
	bubble(t, func(t *testing.T, b *Book) {
		m := says(alice, 100)
		for n := range 10 {
			ends(b, 0, says(10+n, 100))
			time.Sleep(2 * together)
		}
		ends(b, 0, m)
		time.Sleep(2 * together)
		ends(b, 0, m)
		time.Sleep(2 * together)
		wantNobody(t, b, End{Unacknowledged: []Message{m}}) // at 3 of 13
		time.Sleep(suspectFor)                              // those are forgotten
		for range 2 {
			ends(b, 0, m, says(bob, 1))
			ends(b, 0, says(cathy, 1)) // the same moment, on another link
			time.Sleep(2 * together)
		}
		wantNamed(t, b, 0, unsureFor, m)
	})
}

// A poison that comes back within a moment is there at several ends, and not at one of several links.
func TestAFastPoisonIsNamedAtTheThirdEnd(t *testing.T) {
	bubble(t, func(t *testing.T, b *Book) {
		for range 2 {
			ends(b, 0, says(alice, 100))
			time.Sleep(together / 10)
		}
		wantNamed(t, b, 0, unsureFor, says(alice, 100))
	})
}

// When all links end at once, because the server has crashed at a message, one on each may be caught. Who it was shows
// the next time.
func TestWhoIsCaughtTogetherWithAnotherIsReleased(t *testing.T) {
	bubble(t, func(t *testing.T, b *Book) {
		poison, innocent := says(alice, 100), says(bob, 100)
		for range 2 {
			ends(b, 0, poison)
			ends(b, 0, innocent)
			time.Sleep(2 * together)
		}
		wantNamed(t, b, 0, unsureFor, innocent)
		wantNobody(t, b, End{Unacknowledged: []Message{poison}})
		require.Equal(t, []wire.UID{innocent.UID}, b.Sweep())
		want(t, b, Try, innocent, "")
		want(t, b, Try, poison, "")
		time.Sleep(2 * together)
		wantNamed(t, b, 0, unsureFor, poison)
	})
}

// Who comes while links end is on trial with its first message.
func TestNewcomersAreSuspectsWhileLinksEnd(t *testing.T) {
	for _, code := range []int{0, websocket.ClosePolicyViolation} {
		bubble(t, func(t *testing.T, b *Book) {
			before := Message{UID: agent(alice), Size: 100, Came: monotonic.Now()}
			time.Sleep(time.Second)
			ends(b, code, says(1000, 100))
			time.Sleep(time.Millisecond) // the monotonic clock of a bubble is not exact
			between := Message{UID: agent(bob), Size: 100, Came: monotonic.Now()}
			if code == 0 {
				want(t, b, Pass, between, "one end is no reason")
				time.Sleep(together)
				ends(b, code, says(1001, 100))
			}
			time.Sleep(suspectFor - together - 2*time.Millisecond)
			b.Sweep()
			want(t, b, Pass, before, "")
			want(t, b, Try, between, "")
			want(t, b, Try, Message{UID: agent(cathy), Size: 100, Came: monotonic.Now()}, "")
			time.Sleep(together + 2*time.Millisecond)
			b.Sweep()
			want(t, b, Pass, between, "it is over")
		})
	}
}

// Somebody comes as somebody new each time to a server that ends links some time after it has read a message, so that
// others are caught.
func TestOthersAreNotNamedForNewcomers(t *testing.T) {
	bubble(t, func(t *testing.T, b *Book) {
		const code = websocket.ClosePolicyViolation
		fresh := func(n int) Message { return Message{UID: agent(1000 + n), Size: 100, Came: monotonic.Now()} }
		ends(b, code, fresh(0))
		for n := range 20 {
			time.Sleep(time.Second)
			wantNobody(t, b, End{Code: code, Unacknowledged: []Message{says(1+n%8, 30)}, Before: []Message{fresh(1 + n)}})
			b.Taken(says(1+n%8, 30)) // said again
		}
	})
}

// A server ends links some time after it has read the message of one that is no newcomer, so that others are caught. One
// may be named for it, but not one after the other.
func TestNotAllAreNamedForAPoisonThatIsNotCaught(t *testing.T) {
	bubble(t, func(t *testing.T, b *Book) {
		const code = websocket.ClosePolicyViolation
		ends(b, code, says(100, 1))
		ends(b, code, says(101, 1))
		for n := range 20 {
			time.Sleep(time.Second)
			wantNobody(t, b, End{Code: code, Unacknowledged: []Message{says(1+n, 30)}})
		}
	})
}
