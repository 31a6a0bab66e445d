"""A life on a disk that fails at one point, and the good one after it; see `disk.py`."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any, Final

import attrs
import trio

from trio_gateway.testing import Life, World, die
from trio_gateway.testing._schedule import schedule_by

from ._day import Day
from ._disk import KINDS, Disk, Fault
from ._lockstep import SharedClock, in_step
from ._recording import Files, Luck, Medium, Op, Promise, Recording, read_files, write_files
from ._report import Skip

NEVER: Final = 1_000_000
"""The number of an operation that no life comes to."""

HASTE: Final = 10.0
"""How much faster time passes with real threads."""


def need_schedules() -> None:
    """Raise `Skip` where lives cannot be repeated."""
    try:
        schedule_by(0)
    except RuntimeError as error:
        raise Skip(str(error)) from error


@attrs.frozen
class Point:
    """One fault, and what becomes of the process; see `disk.py`. A wreck is made by the course
    "die": killed in the very operation."""

    place: str
    number: int
    kind: str
    at: int
    course: str

    @classmethod
    def parse(cls, text: str) -> Point:
        """Read `day 0:eio:17:on`. Raises `ValueError`."""
        where, kind, at, course = text.split(":")
        place, _, number = where.partition(" ")
        return cls(place, int(number), kind, int(at), course)

    def __str__(self) -> str:
        return f"{self.place} {self.number}:{self.kind}:{self.at}:{self.course}"

    @property
    def cut(self) -> int | None:
        """How many operations after the fault the power goes; 0: at the end."""
        word, _, count = self.course.partition(" ")
        return int(count) if word == "cut" else None

    @property
    def lasting(self) -> bool:
        """Whether the disk is of no use afterwards."""
        return KINDS[self.kind].lasts or KINDS[self.kind].dead


@attrs.define
class FaultyLife:
    """A life on a disk that fails at a point, as `live` wants it. It notes in the world what it has
    come through."""

    point: Point
    seed: int
    _before: Files = attrs.field(factory=dict[str, bytes])
    _failed: int = 0
    _in_commit: bool = False

    async def __call__(self, life: Life) -> None:
        note = life.world.note
        self._before = read_files(life.world.store)
        with Disk() as disk:
            disk.fault = fault = self._fault(disk, life.world)
            disk.record = Recording() if self.point.cut is not None else None
            over = await self._live(life)
            note(f"day {'over' if over else 'not over'}")
            note(f"operations {fault.seen}")
            note(f"failed {self._failed + self._in_commit}")
            if fault.reached and self.point.cut is not None:
                self._cut_power(disk, life.world)

    async def _live(self, life: Life) -> bool:
        opener = attrs.evolve(life.open_gateway, tap=self._tap)
        async with AsyncExitStack() as stack:
            turns = None
            if self.point.place == "thread":
                turns = await stack.enter_async_context(in_step(self._dice()))
            if self.point.place == "real":
                _let_time_pass()
            if self.point.place in ("thread", "real"):
                opener = attrs.evolve(opener, inline_store=False, clock=SharedClock())
            day = Day(
                life.world,
                opener,
                promised=partial(note_promise, life.world),
                on_trouble=self._hear(life.world),
            )
            if self.point.lasting:
                day.patience = 20.0
            over = await (day.next_day() if self.point.place == "wreck" else day.pass_by())
            if turns is not None and turns.largest_batch > 1:
                life.world.note("batch")
            return over

    def _dice(self) -> random.Random:
        # The schedule's, and not the point's: up to the fault, every life is the same.
        return random.Random(f"{self.seed}:{self.point.number}")

    def _fault(self, disk: Disk, world: World) -> Fault:
        def struck(operation: str, file: str) -> None:
            if self.point.course == "die":
                die()
            name = Path(file).name
            world.note(f"struck {operation} {_SHORT.get(name, name)}")

        def after(count: int) -> None:
            if count == self.point.cut:
                self._cut_power(disk, world)

        return Fault(self.point.kind, self.point.at, struck=struck, after=after)

    def _hear(self, world: World) -> Callable[[str], None]:
        def hear(what: str) -> None:
            world.note(f"trouble {what}")
            if self.point.course == "told":
                die()

        return hear

    def _tap(self, moment: str) -> None:
        """Count the commits that did not come back."""
        self._failed += moment == "before" and self._in_commit
        self._in_commit = moment == "before"

    def _cut_power(self, disk: Disk, world: World) -> None:
        """Put in the store's place what the power leaves of it, and be no more."""
        assert disk.record is not None
        medium = Medium.with_files(self._before)
        for entry in disk.record.entries:
            if isinstance(entry, Op):
                medium.do(entry)
        dice = random.Random(f"{self.seed}:{self.point}")
        luck = Luck(dice, dice.choice((0.0, 0.5, 1.0)), 0.1)
        write_files(world.store, medium.cut(luck))
        die()


_SHORT: Final = {
    "gateway.db": "db",
    "gateway.db-wal": "-wal",
    "gateway.db-journal": "-journal",
    "gateway.db.lock": "the lock file",
}


_PROMISES: Final = "promised.jsonl"


def note_promise(world: World, what: str, *about: Any) -> None:
    """Somebody was told that something is on disk."""
    with (world.folder / _PROMISES).open("a", encoding="utf-8") as file:
        file.write(json.dumps([what, *about]) + "\n")


def promises_in(world: World) -> Iterator[Promise]:
    """What was promised, in all lives."""
    path = world.folder / _PROMISES
    for line in path.read_text("utf-8").splitlines() if path.exists() else ():
        what, *about = json.loads(line)
        yield Promise(what, tuple(about))


def _let_time_pass() -> None:
    """Real time, only faster, instead of a clock that jumps when nobody has anything to do."""
    clock: Any = trio.lowlevel.current_clock()
    clock.autojump_threshold = math.inf
    clock.rate = HASTE


async def good_life(life: Life) -> None:
    """A life on a good disk: it brings everything to its end."""
    day = Day(life.world, life.open_gateway)
    assert await day.last_day(), "on a good disk, too, it does not come to its end"
    assert not day.troubles, f"trouble on a good disk: {day.troubles}"
