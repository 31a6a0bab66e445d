"""`machine`: a few stories are played, one that breaks is made short, and the pumped run is what it
says."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final

import pytest
import trio

from proof import machine
from proof._guest import Guest, Stuck
from proof._moves import KINDS, SETTINGS, Move, PromiseBroken, Story
from proof._spread import Tally
from proof.machine import Broken, on_a_thread, pack, program, retell, shorten, unpack
from trio_gateway.store._ledger import Ledger

PLAIN: Final[dict[str, Any]] = {name: values[0] for name, values in SETTINGS.items()}


def made(name: str, **arguments: Any) -> Move:
    """A move; what is not said is the plainest."""
    plain = {key: values[0] for key, values in KINDS[name].choices.items()}
    return (name, {**plain, **arguments})


def story(*moves: Move, **settings: Any) -> list[Move]:
    """A story from its beginning."""
    return [("begin", {**PLAIN, **settings}), *moves]


# ----- stories


def test_p01_a_few_stories_hold() -> None:
    pytest.importorskip("hypothesis")
    tally = Tally()
    machine.play("0", tally, examples=3, moves=25)
    assert tally.failures == []
    assert tally.figures["examples"] >= 1
    assert tally.figures["moves_that_did_something"] > 5
    assert tally.figures["commits"] > 10


def test_the_same_seed_tells_the_same_stories() -> None:
    pytest.importorskip("hypothesis")
    tallies = [Tally(), Tally()]
    for tally in tallies:
        machine.play("1", tally, examples=2, moves=15)
    assert tallies[0].figures == tallies[1].figures


def test_p05_p08_what_a_death_cut_goes_on_and_a_step_is_in_doubt() -> None:
    """Told by hand: each move does what its name says."""
    told = on_a_thread(lambda: _play_to_the_end(_INTERRUPTED))
    seen = told.world.model.seen
    assert [name for name, _ in told.told] == [name for name, _ in _INTERRUPTED]
    assert seen["died with open turns"] == 1
    assert seen["resumed after a crash"] == 1
    assert seen["a step in doubt"] == 1
    assert seen["asked and answered"] == 1


_INTERRUPTED: Final = story(
    made("ask"),
    made("agent_charges"),
    made("die"),
    made("boot", pause=1.0),
    made("agent_charges"),
    made("in_one_breath", count=2),
    made("ask", session="bob"),
    made("agent_says_yes"),
    made("agent_fails", kind="an exit"),
    made("stop", how="leave"),
)


def _play_to_the_end(moves: list[Move]) -> Story:
    told = Story(moves[0][1])
    try:
        told.begin()
        for name, arguments in moves[1:]:
            told.play(name, arguments)
        told.end()
    finally:
        told.close()
    return told


def test_p14_bad_input_and_a_failing_disk_are_stories_like_any_other() -> None:
    assert retell(_TROUBLED) is None


_TROUBLED: Final = story(
    made("write", bad="no session"),
    made("disk_fails", commits=2),
    made("write_batch", texts=["hello", "/stop"]),
    made("write_again"),
    made("platform_trouble", channel="memory", trouble="fails late"),
    made("write", session="bob"),
    made("agent_says_yes"),
    made("pass_time", seconds=40.0),
    made("die", what="commit", moment="before", count=2),
    made("write"),
    made("write"),
    made("boot", late=["other"], wall_hours=-24, new_machine=True),
    made("stop", how="cancel"),
    knowing=[],
)


def test_a_story_is_one_word_and_can_be_read() -> None:
    word = pack(_INTERRUPTED)
    assert unpack(word) == _INTERRUPTED
    assert program(_INTERRUPTED).splitlines()[2] == "agent_charges(which=0)"
    assert not word.isdecimal()
    with pytest.raises(ValueError, match="no packed story"):
        unpack("AAAA")


# ----- stories that break


@pytest.fixture
def unmarked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gateway whose stops mark nothing."""

    def mark(self: Ledger, reason: object) -> int:
        return 0

    monkeypatch.setattr(Ledger, "mark_resume_pending", mark)


@pytest.mark.usefixtures("unmarked")
def test_p04_a_broken_promise_is_told_in_as_few_moves_as_it_takes() -> None:
    before = retell(story(*_LONG, busy="collect", text_limit=20))
    assert before is not None
    assert before.promise == "promise 4"
    after = shorten(before, math.inf)
    assert [name for name, _ in after.moves] == ["begin", "write", "stop"]
    assert dict(after.moves[0][1]) == PLAIN
    tally = Tally()
    machine.play(pack(after.moves), tally)
    ((point, what),) = tally.failures
    assert point == pack(after.moves)
    assert "are not marked" in what
    assert "write(where=0, session='ada', text='hello', bad=None)" in what
    assert "StopRequested" in what


_LONG: Final = [
    made("write", where=5, session="bob"),
    made("pass_time", seconds=3.0),
    made("write_again", which=3),
    made("agent_says"),
    made("stop", reason="restart", how="now"),
    made("boot", pause=60.0),
    made("write"),
]


@pytest.mark.usefixtures("unmarked")
def test_p04_a_break_is_found_by_chance() -> None:
    pytest.importorskip("hypothesis")
    tally = Tally()
    machine.play("0", tally, examples=30, moves=25, seconds=2.0)
    ((point, what),) = tally.failures
    assert "promise" in what
    assert retell(unpack(point)) is not None


def test_what_is_wrong_between_two_moves_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gateway's own figures are compared with the disk."""
    monkeypatch.setattr("trio_gateway._sessions.Sessions.vacate", lambda self, session: None)
    broken = retell(story(made("write"), made("agent_says_yes")))
    assert isinstance(broken, Broken)
    assert "slots_free" in broken.what


def test_a_move_that_is_not_possible_is_passed_over() -> None:
    def play() -> int:
        told = Story(PLAIN)
        try:
            told.begin()
            for name in sorted(KINDS.keys() - {"stop", "die"}):
                told.play(*made(name))
            told.world.kill()
            told.world.model.broken.append("promise 0: a test")
            with pytest.raises(PromiseBroken, match="a test"):
                told.play(*made("boot"))
            return told.moves
        finally:
            told.close()

    assert 5 < on_a_thread(play) <= len(KINDS) + 1


# ----- the pumped run


def pumped(test: Callable[[], None]) -> None:
    """On a thread of its own, which can have a Trio run."""
    on_a_thread(test)


def test_a_pumped_run_moves_only_when_it_is_told_to() -> None:
    heard: list[object] = []

    async def main() -> None:
        heard.append(trio.current_time())
        await trio.sleep(5)
        heard.append(trio.current_time())
        await trio.sleep(5)

    def test() -> None:
        guest = Guest(main, 100.0)
        assert heard == []
        guest.rest()
        assert heard == [100.0]
        guest.order(lambda: heard.append("a"), lambda: heard.append("b"), apart=3)
        guest.pass_time(7)
        assert heard == [100.0, "a", "b", 105.0]
        assert guest.clock.current_time() == 107.0
        guest.pass_time(600)
        assert guest.ended
        assert guest.clock.current_time() == 110.0

    pumped(test)


def test_what_is_halted_does_not_go_on_and_lets_go_of_its_thread() -> None:
    heard: list[str] = []
    guests: list[Guest] = []

    async def main() -> None:
        try:
            await trio.sleep(1)
            guests[0].halt()
            heard.append("the rest of its step")
            await trio.sleep(1)
            heard.append("more")
        finally:
            heard.append("unwound")

    def test() -> None:
        guests.append(Guest(main, 0.0))
        guests[0].pass_time(10)
        assert heard == ["the rest of its step"]
        guests[0].let_go()
        assert guests[0].ended
        assert heard == ["the rest of its step", "more", "unwound"]
        guests[0] = Guest(trio.lowlevel.checkpoint, 0.0)
        guests[0].rest()
        assert guests[0].ended

    pumped(test)


def test_a_pumped_run_that_never_rests_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("proof._guest.MOST_TICKS", 500)
    spins = True

    async def spin() -> None:
        while spins:
            await trio.lowlevel.checkpoint()

    def test() -> None:
        nonlocal spins
        guest = Guest(spin, 0.0)
        with pytest.raises(Stuck, match="no rest"):
            guest.rest()
        spins = False
        guest.rest()
        assert guest.ended

    pumped(test)
