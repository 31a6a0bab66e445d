"""The campaigns of failing disks and of power cuts, at a few points, and that they notice."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import outcome
import pytest

from proof import _chronicle, _day, disk, power
from proof._disk import KINDS
from proof._faulty_life import NEVER, Point, need_schedules
from proof._recording import Luck, Medium, Op
from proof._report import Skip
from proof._spread import Tally
from trio_gateway._clock import Clock
from trio_gateway.store import _sqlite, _writer
from trio_gateway.store._database import Database, translate
from trio_gateway.testing import World


@pytest.fixture(autouse=True)
def _same_each_time() -> Iterator[None]:
    state = random.getstate()
    try:
        need_schedules()
    except Skip as skip:
        pytest.skip(str(skip))
    yield
    random.setstate(state)


# ----- failing disks


@pytest.mark.parametrize(
    "point",
    [
        "day 0:eio:1:on",
        "day 0:eio:5:on",
        "day 0:eio for ever:150:told",
        "day 0:full for ever:300:on",
        "day 0:short:200:on",
        "day 0:torn:230:on",
        "day 0:lost:20:cut 2",
        "day 0:read:60:on",
        "thread 0:eio:201:told",
        "thread 0:sync for ever:15:on",
        "wreck 1:eio:40:told",
        "wreck 1:read for ever:10:on",
    ],
)
def test_p01_p05_p06_p14_a_disk_that_fails_loses_and_doubles_nothing(
    point: str, memory_path: Path
) -> None:
    tally = Tally()
    disk.Sweep(memory_path, 0).try_one(point, tally)
    assert tally.figures["faults"] == 1


def test_every_operation_of_a_life_is_counted_and_none_beyond(memory_path: Path) -> None:
    sweep = disk.Sweep(memory_path, 0)
    for kind in ("eio", "sync for ever"):
        point = Point("day", 0, kind, NEVER, "on")
        count = sweep.operations(point)
        assert count > 40
        sweep.try_one(f"day 0:{kind}:{count}:on", Tally())
        with pytest.raises(AssertionError, match="not reached"):
            sweep.try_one(f"day 0:{kind}:{count + 1}:on", Tally())


def test_every_kind_of_fault_is_in_the_campaign() -> None:
    assert {kind for courses in disk.COURSES.values() for kind in courses} == KINDS.keys()


def test_a_failed_commit_that_is_taken_for_done_is_noticed(
    memory_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def commit(self: Any, batch: list[Any]) -> None:
        try:
            self._commit_together(batch)
        except Exception as error:
            self._roll_back()
            for operation in batch:
                operation.outcome = operation.outcome or outcome.Error(translate(error))

    monkeypatch.setattr(_writer._Transactions, "commit", commit)
    with pytest.raises(AssertionError):
        disk.Sweep(memory_path, 0).try_one("day 0:sync for ever:20:on", Tally())


# ----- power cuts


def test_p01_p06_a_power_cut_leaves_what_was_promised(memory_path: Path) -> None:
    tally = Tally()
    power.Study(memory_path, 0, images=300, boots=3).try_one("1", tally)
    assert not tally.failures
    assert tally.figures["images"] > 150
    assert tally.figures["boots"]


def test_a_store_that_does_not_sync_its_commits_is_noticed(
    memory_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect = _sqlite.connect

    def hasty(path: Path, clock: Clock) -> Database:
        db = connect(path, clock)
        db.execute("PRAGMA synchronous = NORMAL")
        return db

    monkeypatch.setattr(_sqlite, "connect", hasty)
    tally = Tally()
    study = power.Study(memory_path, 0, images=300, boots=0)
    study.try_one("0", tally)
    (point, what), *_ = tally.failures
    assert "a commit that had returned is undone" in what or "broken" in what
    again = Tally()
    with pytest.raises(AssertionError):
        study.try_one(point, again)


def test_an_agent_that_begins_before_its_marker_is_on_disk_is_noticed(
    memory_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is promised too early is."""
    boast = _day.Day._hear

    def hear(self: Any, event: Any) -> None:
        if type(event).__name__ == "GatewayStarted":
            self.promised("begun", 3, 1)
        boast(self, event)

    monkeypatch.setattr(_day.Day, "_hear", hear)
    tally = Tally()
    power.Study(memory_path, 0, images=100, boots=0).try_one("0", tally)
    assert "begun (3, 1)" in tally.failures[0][1]


def test_a_state_that_breaks_a_rule_is_noticed(
    memory_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_chronicle, "violations", lambda store: ("two of them are open",))
    with pytest.raises(AssertionError, match="two of them are open"):
        power.Study(memory_path, 0, images=100, boots=0).try_one("0", Tally())


# ----- the disk that it is tried on


def a_disk() -> Medium:
    medium = Medium.with_files({"db": b"a" * 1024})
    medium.do(Op("write", "db", 0, b"b" * 1024))
    medium.do(Op("sync", "db"))
    medium.do(Op("write", "db", 512, b"c" * 1024))
    return medium


def test_what_was_synced_is_there_and_of_the_rest_any_part() -> None:
    medium = a_disk()
    assert medium.loose == 1
    assert medium.kill() == {"db": b"b" * 512 + b"c" * 1024}
    left = {medium.cut(Luck(random.Random(n), 0.5, torn=0.5))["db"] for n in range(200)}
    assert all(content[:512] == b"b" * 512 for content in left)
    assert {b"b" * 1024, b"b" * 512 + b"c" * 1024} < left
    assert b"b" * 1024 + b"c" * 512 in left  # the later sector alone
    sectors = [content[at : at + 512] for content in left for at in (0, 512, 1024)]
    assert any(len(set(sector)) > 1 for sector in sectors)  # torn inside


def test_a_name_is_safe_when_its_folder_is() -> None:
    medium = Medium.with_files({"db": b"x"})
    medium.do(Op("open", "wal"))
    medium.do(Op("write", "wal", 0, b"y"))
    assert medium.cut(Luck(random.Random(0), 0.0)) == {"db": b"x"}
    medium.do(Op("sync", "wal", True))
    assert medium.cut(Luck(random.Random(0), 0.0)) == {"db": b"x", "wal": b"y"}
    medium.do(Op("delete", "wal"))
    assert medium.kill() == {"db": b"x"}
    assert medium.cut(Luck(random.Random(0), 0.0)) == {"db": b"x", "wal": b"y"}
    assert medium.cut(Luck(random.Random(0), 1.0)) == {"db": b"x"}


def test_what_a_failed_sync_was_to_save_is_gone_without_power() -> None:
    medium = a_disk()
    medium.do(Op("lose", "db"))
    medium.do(Op("sync", "db"))
    assert medium.cut(Luck(random.Random(0), 1.0)) == {"db": b"b" * 1024}


def test_a_world_is_put_back_with_what_was_noted_outside(memory_path: Path) -> None:
    world = World(memory_path)
    run = power.Run.record(2, 0, world, Tally())
    assert run.outside_at(0) == {}
    half = run.outside_at(len(run.recording.entries) // 2)
    whole = run.outside_at(len(run.recording.entries))
    assert len(half["notes.jsonl"]) < len(whole["notes.jsonl"])
    assert whole["notes.jsonl"].startswith(half["notes.jsonl"])
