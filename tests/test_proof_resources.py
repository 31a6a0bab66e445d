"""The campaigns `resources` and `soak`, small: they run, and notice what they are there for."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import apsw
import attrs
import pytest

from proof import resources, soak
from proof._limits import Group, small_disk, wall_clock
from proof._process import scratch_folder
from proof._reckoning import Reckoning
from proof._report import Job, Report, Size, Skip
from proof.soak import Growth, Plan, World, make_world


def small(campaign: str, point: str) -> Report:
    """What a campaign reports of one point, at its smallest."""
    module = {"resources": resources, "soak": soak}[campaign]
    report = Report(module.CAMPAIGN, Size.QUICK, 0, point)
    module.run(Job(report, Size.QUICK, 0, point, jobs=1))
    return report


# ----- resources


def test_p14_a_process_that_stands_still_loses_nothing() -> None:
    report = small("resources", "stopped/0")
    assert report.ok
    assert report.figures["scenarios"] == 1
    assert report.figures["messages"] > 10
    assert report.seen["a second gateway refused, naming the first"] == 1


def test_p04_p05_a_marking_without_room() -> None:
    try:
        report = small("resources", "full-at-marking/0")
    except Skip as skip:
        pytest.skip(str(skip))
    assert report.ok
    assert max(report.figures["resumed_crash"], report.figures["resumed_shutdown"]) >= 10


def test_what_a_machine_cannot_do_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Skip, match="there is no mount"), small_disk(tmp_path / "disk", 1):
        raise AssertionError("mounted")
    with pytest.raises(Skip, match="none of the scenarios"):
        small("resources", "full-at-boot/0")
    assert "SKIPPED resources full-at-boot/0: there is no mount" in capsys.readouterr().err


def test_the_wall_clock_is_set_in_one_piece(tmp_path: Path) -> None:
    try:
        clock = wall_clock(tmp_path)
    except Skip as skip:
        pytest.skip(str(skip))
    clock.set(-3600)
    assert clock.file.read_text() == "-3600\n"
    assert [file.name for file in tmp_path.iterdir()] == ["clock"]


@pytest.mark.parametrize("name", ["memory.events", "memory.oom_control"])
def test_kills_are_counted_in_both_kinds_of_groups(tmp_path: Path, name: str) -> None:
    assert Group(tmp_path).oom_kills == 0
    (tmp_path / name).write_text("low 0\noom 5\noom_kill 3\n")
    assert Group(tmp_path).oom_kills == 3


# ----- the soak's account


@pytest.fixture(scope="module", name="world")
def _world() -> Iterator[World]:
    """A world that has lived for a moment, and whose account is in order."""
    with scratch_folder() as folder:
        made = make_world(folder, 0, 1)
        made.whole(Plan(short_lives=1.5, warm_up=0, long_life=0.4))
        yield made


def test_a_small_soak_adds_up(world: World) -> None:
    assert world.figures["messages"] > 100
    assert world.figures["lives"] >= 3
    assert world.seen["a long life"] == 1
    reckoning(world).check()


def reckoning(world: World) -> Reckoning:
    """Its account, as it was before anybody tampered with it."""
    people = copy.copy(world.crowd)
    people.heard, people.taken = dict(people.heard), list(people.taken)
    people.sent, people.given_up = dict(people.sent), set(people.given_up)
    people.complaints = list(people.complaints)
    return Reckoning(people, dict(world.open_before), people.life)


def newest_final(account: Reckoning) -> str:
    return next(key for key in reversed(account.crowd.heard) if key.endswith("-end"))


def lose_a_reply(account: Reckoning) -> None:
    del account.crowd.heard[newest_final(account)]


def invent_a_reply(account: Reckoning) -> None:
    heard = account.crowd.heard
    heard["nobody-1-end"] = attrs.evolve(heard[newest_final(account)], about=())


def answer_twice(account: Reckoning) -> None:
    key = newest_final(account)
    heard = account.crowd.heard[key]
    account.finals[heard.about[0]].append(("another", heard))


def lose_a_message(account: Reckoning) -> None:
    del account.messages[account.crowd.taken[0]]


def accept_twice(account: Reckoning) -> None:
    account.crowd.taken.append(account.crowd.taken[0])


def store_what_was_refused(account: Reckoning) -> None:
    account.crowd.given_up.add(account.crowd.taken[0])


def swap_two(account: Reckoning) -> None:
    """The first two messages of a session change places."""
    by_session: dict[str, list[str]] = {}
    for id in account.crowd.taken:
        by_session.setdefault(account.messages[id].session, []).append(id)
    first, second = next(ids for ids in by_session.values() if len(ids) > 1)[:2]
    one, other = account.messages[first], account.messages[second]
    account.messages[first] = attrs.evolve(one, seq=other.seq)
    account.messages[second] = attrs.evolve(other, seq=one.seq)


def stop_what_nobody_stopped(account: Reckoning) -> None:
    id, message = next(
        (id, message) for id, message in account.messages.items() if message.state == "answered"
    )
    account.messages[id] = attrs.evolve(message, state="stopped")
    account.finals[id] = []


def settle_an_older_attempt(account: Reckoning) -> None:
    number, turn = next(
        (number, turn) for number, turn in account.turns.items() if turn.state == "COMPLETED"
    )
    account.turns[number] = attrs.evolve(turn, attempt=turn.attempt - 1)


def find_nothing_open(account: Reckoning) -> None:
    account.open_before = {life: {} for life in account.open_before}


def complain(account: Reckoning) -> None:
    account.crowd.complaints.append("doubled, and does not say so")


@pytest.mark.parametrize(
    "tamper",
    [
        lose_a_reply, invent_a_reply, answer_twice, lose_a_message, accept_twice,
        store_what_was_refused, swap_two, stop_what_nobody_stopped, settle_an_older_attempt,
        find_nothing_open, complain,
    ],
)  # fmt: skip
def test_the_account_notices(world: World, tamper: Callable[[Reckoning], None]) -> None:
    account = reckoning(world)
    tamper(account)
    with pytest.raises(AssertionError):
        account.check()


def test_the_account_notices_what_the_agent_did(world: World) -> None:
    """Attempts twice and beside each other, effects twice: as its notes have them."""
    notes = world.folder / "effects.txt"
    before = notes.read_text()
    began = next(line for line in before.splitlines() if line.startswith("began"))
    life, _, _, session, _ = began.split()[1:]
    for more in (began, f"began {life} 999999 1 {session} crash", "shot 1 m1\nshot 1 m1"):
        notes.write_text(f"{before}{more}\n")
        with pytest.raises(AssertionError):
            reckoning(world).check()
    notes.write_text(before)
    reckoning(world).check()


def test_the_account_notices_what_is_wrong_in_the_store(world: World, tmp_path: Path) -> None:
    account = reckoning(world)
    db = apsw.Connection(str(world.crowd.store))
    db.execute("BEGIN; UPDATE delivery SET text = 're: nobody' WHERE kind = 'answer'")
    db.execute("COMMIT")
    db.close()
    with pytest.raises(AssertionError):
        account.check()


# ----- growth


def samples(step_kb: int = 0, fds: tuple[int, ...] = (), files: int = 8) -> Growth:
    """A long life of 40 samples."""
    dice = random.Random(1)
    growth = Growth("queue", 10.0)
    for number in range(40):
        growth.taken.append(number * 500)
        growth.rss_kb.append(50_000 + step_kb * number + dice.randrange(300))
        growth.fds.append(fds[number * len(fds) // 40] if fds else 18)
        growth.threads.append(5)
        growth.files.append(8 if number == 0 else files)
        growth.wal_kb.append(8000)
    return growth


def test_a_life_that_does_not_grow() -> None:
    growth = samples(fds=(18, 19, 18, 18, 19, 18, 18, 18))  # one is open for a moment
    growth.check()
    assert abs(growth.figures()["grown_bytes_per_message"]) < 50


@pytest.mark.parametrize(
    ("growth", "what"),
    [
        (samples(step_kb=200), "memory grew"),
        (samples(fds=(18, 18, 19, 20)), "more descriptors"),
        (samples(files=9), "more files"),
    ],
)
def test_a_life_that_grows(growth: Growth, what: str) -> None:
    with pytest.raises(AssertionError, match=what):
        growth.check()
