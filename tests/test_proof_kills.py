"""The campaigns that kill at every call, in small: a few points of each, and that their checks
notice what they are there for."""

from __future__ import annotations

import shutil
from collections.abc import Generator, Iterator
from pathlib import Path

import attrs
import pytest

import trio_gateway
from proof import kill_io, kill_syscalls
from proof._deaths import Look, Marked, check_kept
from proof._killed_lives import Outcome, Point
from proof._report import Enough, Job, Report, Size, Skip
from proof._sweeps import Sweeps, work_off


@pytest.fixture(scope="module")
def preloaded() -> Generator[Path]:
    """The library that kills."""
    try:
        with kill_io.library() as library:
            yield library
    except Skip as skip:
        pytest.skip(str(skip))


def tried(server: kill_io.Server, *calls: int) -> Iterator[Outcome]:
    for call in calls:
        yield server.attempt(Point(seed=0, round=0, moment="after", call=call))


# ----- kill-io


def test_p05_a_gateway_is_killed_at_a_few_calls(preloaded: Path) -> None:
    with kill_io.server(preloaded) as server:
        outcomes = list(tried(server, 60, 200, 340, 390))
    assert [outcome.failure for outcome in outcomes] == [""] * 4
    assert all(outcome.died_at and outcome.figures["points"] == 1 for outcome in outcomes)


def test_p05_a_life_that_makes_fewer_calls_ends_by_itself(preloaded: Path) -> None:
    with kill_io.server(preloaded) as server:
        (outcome,) = tried(server, 100_000)
    assert outcome.ended
    assert not outcome.failure


def test_p04_a_gateway_that_marks_only_some_of_its_turns_is_found_out(
    preloaded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(Path(trio_gateway.__file__).parent, tmp_path / "trio_gateway")
    queries = tmp_path / "trio_gateway" / "store" / "queries.sql"
    careful = "WHERE settled_at IS NULL AND state = 'RUNNING' AND epoch = ?;"
    text = queries.read_text()
    assert careful in text
    queries.write_text(text.replace(careful, careful.replace(";", " AND id % 2;")))
    monkeypatch.syspath_prepend(tmp_path)
    with kill_io.server(preloaded) as server:
        failures = "".join(outcome.failure for outcome in tried(server, *range(300, 480, 30)))
    assert "RUNNING on disk" in failures or "some are not" in failures


# ----- what a death may not take with it


LEFT = Look(
    made=True,
    epochs=1,
    turns={1: Marked("RESUME_PENDING", 1, 0, False), 2: Marked("COMPLETED", 1, 0, True)},
    open={"1": "shutdown"},
    messages=frozenset({"m1", "m2"}),
    finished=frozenset({"1 look"}),
    deliveries=frozenset({"k"}),
)
TOLD = ("accepted m1", "settled 2", "remembered 1 look", "marked 2")


def test_what_was_told_is_on_disk() -> None:
    check_kept(Look(), LEFT, TOLD, TOLD, {"k"})


@pytest.mark.parametrize(
    ("told", "complaint"),
    [
        ("accepted m3", "accepted, and not on disk"),
        ("settled 1", "told to be settled"),
        ("remembered 1 shoot", "told to be remembered"),
        ("bad news", "had trouble"),
    ],
)
def test_what_was_told_and_is_not_on_disk_is_found(told: str, complaint: str) -> None:
    with pytest.raises(AssertionError, match=complaint):
        check_kept(Look(), LEFT, [told], [told], set())


def test_p04_p07_markers_and_replies_are_held_against_the_disk() -> None:
    running = attrs.evolve(LEFT, turns={1: Marked("RUNNING", 1, 0, False)})
    for seen in ("marked 1", "draining 1"):
        with pytest.raises(AssertionError, match="RUNNING on disk"):
            check_kept(Look(), running, [], [seen], set())
    partly = attrs.evolve(LEFT, turns=LEFT.turns | running.turns | {3: LEFT.turns[1]})
    with pytest.raises(AssertionError, match="some are not"):
        check_kept(Look(), partly, [], [], set())
    with pytest.raises(AssertionError, match="not committed"):
        check_kept(Look(), LEFT, [], [], {"another key"})


@pytest.mark.parametrize(
    ("was", "became"),
    [
        (Marked("RUNNING", 1, 0, False), Marked("RUNNING", 2, 0, False)),  # not charged
        (Marked("RESUME_PENDING", 1, 0, False), Marked("RUNNING", 2, 1, False)),  # charged
        (Marked("RESUME_PENDING", 1, 0, False), Marked("RUNNING", 3, 0, False)),  # twice
        (Marked("COMPLETED", 1, 0, True), Marked("RUNNING", 2, 0, False)),  # after its end
    ],
)
def test_p05_p09_a_wrong_charge_and_a_wrong_attempt_are_found(was: Marked, became: Marked) -> None:
    before = attrs.evolve(LEFT, turns={1: was})
    now = attrs.evolve(LEFT, epochs=2, turns={1: became})
    with pytest.raises(AssertionError, match="turn 1"):
        check_kept(before, now, [], [], set())


def test_p09_suspects_beside_each_other_are_found() -> None:
    suspect = Marked("RUNNING", 2, 1, False)
    before = Look(made=True, epochs=2, turns={1: suspect, 2: suspect})
    ended = Marked("COMPLETED", 3, 2, True)
    now = Look(made=True, epochs=3, turns={1: ended, 2: ended})
    one_by_one = ["began 1 3 crash", "settled 1", "began 2 3 crash", "settled 2"]
    check_kept(before, now, one_by_one, one_by_one, set())
    with pytest.raises(AssertionError, match="beside each other"):
        check_kept(before, now, [], ["began 1 3 crash", "began 2 3 crash"], set())


# ----- kill-syscalls


def test_p05_the_command_is_killed_at_a_system_call_of_its_shutdown() -> None:
    report = Report(kill_syscalls.CAMPAIGN, Size.QUICK, 0)
    try:
        kill_syscalls.run(Job(report, Size.QUICK, only="0:writer:fdatasync:2"))
    except Skip as skip:
        pytest.skip(str(skip))
    assert report.ok, report.failures
    assert report.figures["kills"] == 1


# ----- sweeps


def test_a_sweep_goes_up_until_there_is_no_such_number() -> None:
    sweeps = Sweeps(("a", "b"))
    tried: list[tuple[str, int]] = []

    def tell(point: tuple[str, int], is_there: bool) -> None:
        tried.append(point)
        if not is_there:
            sweeps.ended(point[0])

    work_off(sweeps, ["hand"], lambda hand, point: point[1] <= 2, tell)
    assert tried == [(key, number) for key in "ab" for number in (1, 2, 3)]
    assert sweeps.done == 2


def test_sweeps_side_by_side_go_up_together() -> None:
    sweeps = Sweeps(("a", "b"))
    tried: list[tuple[str, int]] = []
    for key, number in sweeps.abreast():
        tried.append((key, number))
        if number == {"a": 1, "b": 3}[key]:
            sweeps.ended(key)
    assert tried == [("a", 1), ("b", 1), ("b", 2), ("b", 3)]


def test_who_has_had_enough_stops_all_hands() -> None:
    def tell(point: int, outcome: int) -> None:
        raise Enough

    with pytest.raises(Enough):
        work_off(iter(int, 1), ["one", "two"], lambda hand, point: point, tell)
