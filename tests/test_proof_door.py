"""The campaign `door`, small: it runs, and its account notices what it is there to notice."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from shutil import which

import apsw
import attrs
import pytest
import trio

from proof import _door_wrk, door
from proof._door_account import Account
from proof._door_followers import Log
from proof._door_openai import Streamed
from proof._door_people import Town
from proof._door_world import World, make_world
from proof._process import scratch_folder
from proof._report import Job, Report, Size, Skip

pytestmark = pytest.mark.timeout(300)


@attrs.frozen
class Lived:
    """One world after its last life, with everything that its people were told."""

    world: World
    logs: list[Log]
    streams: list[Streamed]

    def check(self) -> None:
        """The account, once more."""
        account = Account(self.world.town, self.world.store)
        account.check(self.logs, self.streams, self.world.folder)


@pytest.fixture(scope="module")
def lived() -> Iterator[Lived]:
    """A world in which each kind of end has happened once, whatever the seed."""
    with scratch_folder() as folder:
        world = make_world(folder, 0, 7, listens=True)
        crowd = door.Crowd(world)
        try:
            trio.run(crowd.whole, 0.0)
        finally:
            world.close()
        yield Lived(world, list(crowd.logs), list(crowd.streams))


def test_p01_p07_what_is_killed_under_load_loses_nothing_and_tells_nothing_twice(
    lived: Lived,
) -> None:
    lived.check()
    town = lived.world.town
    assert set(town.seen) >= set(door.ENDS)
    assert town.figures["kills"] >= 3
    assert town.figures["messages"] > 50
    assert town.seen["accepted in the drain, and told so"] == 1
    assert town.seen["a stream that ended in order"] > 0


def _lose(town: Town, store: apsw.Connection) -> None:
    store.execute("DELETE FROM message WHERE seq = 3")


def _forget_an_end(town: Town, store: apsw.Connection) -> None:
    store.execute(
        "DELETE FROM journal WHERE seq = (SELECT max(seq) FROM journal WHERE what = 'settled')"
    )


def _answer_twice(town: Town, store: apsw.Connection) -> None:
    store.execute(
        "INSERT INTO delivery (key, session, turn, n, part, parts, kind, about, text, attempt,"
        " final, state, epoch, created_at) SELECT key || 'x', session, turn, n, part, parts, kind,"
        " about, text, attempt, final, state, epoch, created_at FROM delivery WHERE final LIMIT 1"
    )


def _never_sent(town: Town, store: apsw.Connection) -> None:
    del town.sent[next(iter(town.sent))]


def _another_text(town: Town, store: apsw.Connection) -> None:
    next(iter(town.sent.values())).text = "another"


def _told_who_waited_otherwise(town: Town, store: apsw.Connection) -> None:
    sent = next(one for one in town.sent.values() if one.replies)
    sent.replies = ["something else"]


def _a_complaint(town: Town, store: apsw.Connection) -> None:
    town.complain("said what it must not say")


@pytest.mark.parametrize(
    ("harm", "why"),
    [
        (_lose, "lost|intact|belongs"),
        (_forget_an_end, "journal"),
        (_answer_twice, "one reply at the most"),
        (_never_sent, "nobody sent"),
        (_another_text, "for Sent"),
        (_told_who_waited_otherwise, "who waited was told"),
        (_a_complaint, "must not say"),
    ],
)
def test_an_account_that_does_not_add_up_is_noticed(
    lived: Lived, tmp_path: Path, harm: Callable[[Town, apsw.Connection], None], why: str
) -> None:
    store = tmp_path / "gateway.db"
    store.write_bytes(lived.world.store.read_bytes())
    town = copy.deepcopy(attrs.evolve(lived.world.town, just_sent=None))  # type: ignore[arg-type]
    db = apsw.Connection(str(store))
    harm(town, db)
    db.close()
    with pytest.raises(AssertionError, match=why):
        Account(town, store).check(lived.logs, lived.streams, lived.world.folder)


def test_a_follower_that_missed_something_is_noticed(lived: Lived) -> None:
    log = next(one for one in lived.logs if len(one.events) > 5)
    for events in (
        log.events[:-1],
        [*log.events[:2], *log.events[3:]],
        [*log.events, log.events[-1]],
        [log.events[1], log.events[0], *log.events[2:]],
    ):
        missed = Log(log.town, log.session, events)
        with pytest.raises(AssertionError, match=rf"{log.session}: told \d+ events"):
            Account(lived.world.town, lived.world.store)._followed(missed)


def test_a_response_that_does_not_add_up_is_noticed(lived: Lived) -> None:
    stream = next(one for one in lived.streams if len(one.events) > 8)
    account = Account(lived.world.town, lived.world.store)
    account._streamed(stream)
    for events in (stream.events[:-1], stream.events[1:], [*stream.events[:5], *stream.events[6:]]):
        with pytest.raises(AssertionError):
            account._streamed(attrs.evolve(stream, events=events))


def test_people_notice_what_they_must_not_be_told() -> None:
    town = Town(("127.0.0.1", 1), "t", b"s", random.Random(0))
    town.noted("m1", "ada", "plain m1")
    town.acknowledge("m1", "accepted")
    assert not town.complaints
    town.acknowledge("m1", "accepted")
    assert "is called new, and was known" in town.complaints[-1]
    town.noted("m2", "ada", "plain m2")
    town.acknowledge("m2", "duplicate")
    assert "was sent once" in town.complaints[-1]
    log = Log(town, "ada")
    log.take(3, "accepted", {"id": "m1"})
    log.take(3, "accepted", {"id": "m1"})
    assert "told accepted 3 after 3" in town.complaints[-1]
    log.goes_on(2)
    assert "goes on at 2" in town.complaints[-1]


# ----- a program of somebody else's


def test_p01_wrk_is_answered_while_the_process_is_killed() -> None:
    if which("wrk") is None:
        pytest.skip("wrk is not installed; apt install wrk")
    world, failure = _door_wrk.live(0, 2)
    assert failure is None, failure
    assert world.town.figures["wrk_answers"] > 0
    assert world.town.figures["wrk_messages"] >= world.town.figures["wrk_answers"]


def test_without_wrk_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Skip, match="apt install wrk"):
        _door_wrk.live(0, 1)
    report = Report(door.CAMPAIGN, Size.QUICK, 0, "wrk")
    door.run(Job(report, Size.QUICK, 0, "wrk", jobs=1))
    assert "SKIPPED door wrk: wrk is not installed" in capsys.readouterr().err
