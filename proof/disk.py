"""Every operation of the disk under a gateway's store, failing in each way.

A life is a day of the real gateway in virtual time (`_day.py`), on a disk (`_disk.py`) whose N-th
operation fails. N goes from 1 to the number of operations that a life without a fault asks for. A
point is written

    PLACE : KIND : N : COURSE       day 0:full for ever:17:on

    place    day K      the store writes in the loop, by the K-th schedule
             thread K   the store's own writer, in step with the loop: operations in batches
             wreck K    the boot that finds what the K-th wreck has left: faults in the recovery
             real K     real threads in real time; here alone the N-th operation may differ
             command K  the real command in a process of its own, and its exit codes
    kind     how it fails, see `KINDS`
    course   on         the process goes on, is stopped in the evening, boots again, leaves
             told       it is killed at the first word of trouble
             cut M      the power goes M operations after the fault (0: at the end of the day)

After each, a life on a good disk brings everything to its end, and the account must be right.
"""

from __future__ import annotations

import random
import shutil
import tempfile
import zlib
from collections import Counter
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import attrs

from trio_gateway.testing import Scenario, World, live
from trio_gateway.testing._schedule import schedule_by

from . import _faulty_command
from ._chronicle import broken_promises
from ._day import LETTERS, PHONE, check_day
from ._disk import KINDS
from ._faulty_life import NEVER, FaultyLife, Point, good_life, need_schedules, promises_in
from ._process import scratch_folder
from ._report import Campaign, Job, Size
from ._spread import Tally, spread
from ._worlds import noted, rows, sound_at_death

CAMPAIGN: Final = Campaign(
    name="disk",
    injects="an I/O error, a full disk, a torn or short write, a failed fsync, at every operation"
    " of the store",
    short="failing operations of the disk",
    promises=(1, 2, 5, 6, 7, 8, 10, 11, 12, 14),
    counted="faults",
    must_see=(
        "failed: open the lock file",
        "failed: write the lock file",
        "failed: write -journal",
        "failed: delete -journal",
        "failed: write -wal",
        "failed: sync -wal",
        "failed: read -wal",
        "failed: open -wal",
        "failed: delete -wal",
        "failed: write db",
        "failed: sync db",
        "failed: truncate db",
        "failed: lock db",
        "told: accept",
        "told: boot",
        "told: MarkingFailed",
        "told: SettleDelayed",
        "told: StoreTrouble",
        "told as failed, and on disk all the same",
        "resumed: crash",
        "resumed: shutdown",
        "in doubt",
        "a repeat that says so",
        "a batch",
        "the command went on",
        "the command left with 1, and said why",
        "a stop of the command could not mark",
    ),
)

TIMEOUT: Final = 60.0
"""Seconds of real time that one life may take."""

COURSES: Final[dict[str, dict[str, tuple[str, ...]]]] = {
    "day": {
        "eio": ("on", "told"),
        "eio for ever": ("on", "told"),
        "full for ever": ("on",),
        "short": ("on",),
        "torn": ("on",),
        "sync for ever": ("on", "told"),
        "lost": ("cut 2", "cut 12", "cut 0"),
        "power": ("on",),
        "read": ("on",),
        "read for ever": ("on",),
    },
    "thread": {
        "eio": ("on", "told"),
        "eio for ever": ("on",),
        "full": ("on",),
        "full for ever": ("told",),
        "sync for ever": ("on",),
        "lost": ("cut 5", "cut 0"),
    },
    "wreck": {
        "eio": ("on", "told"),
        "eio for ever": ("told",),
        "torn": ("on",),
        "sync for ever": ("on",),
        "lost": ("cut 3",),
        "read": ("on",),
        "read for ever": ("on",),
    },
}
"""The kinds of faults in each place, and what becomes of the process."""

REAL_KINDS: Final = ("eio", "eio for ever", "short", "sync for ever", "full for ever")

WORDS: Final = (
    "the disk failed",
    "the disk is full: make room; it is tried again",
    "the database file cannot be opened",
    "cannot be opened for writing",
    "cannot be locked",
)
"""What a trouble may be told as: each names its cause."""


def run(job: Job) -> None:
    """The campaign."""
    need_schedules()
    with scratch_folder() as folder:
        sweep = Sweep(folder, job.seed)
        if job.only is not None:
            points = [job.only]
        else:
            points = [str(point) for point in _points(sweep, job)]
        spread(job.report, job.jobs, points, sweep.try_one)


def _points(sweep: Sweep, job: Job) -> Iterator[Point]:
    """What is tried: everything, or of each group a few."""
    dice = random.Random(f"disk {job.seed}")
    for group in _groups(job):
        count = sweep.operations(group)
        numbers = list(range(1, count + 1))
        if job.size is Size.QUICK:
            numbers = sorted(dice.sample(numbers, min(count, 5)))
        yield from (attrs.evolve(group, at=at) for at in numbers)
    for number in range(job.amount(2, 100, 1000)):
        at = dice.randint(1, 400)
        yield Point("real", number, dice.choice(REAL_KINDS), at, dice.choice(("on", "told")))
    for number in range(job.amount(2, 24, 200)):
        yield _faulty_command.point(number, dice)


def _groups(job: Job) -> Iterator[Point]:
    """A point for each place, kind and course."""
    schedules = job.amount(1, 1, 5)
    places = {"day": schedules, "thread": schedules, "wreck": job.amount(1, 2, 12)}
    for place, count in places.items():
        for number in range(count):
            for kind, courses in COURSES[place].items():
                for course in courses:
                    yield Point(place, number, kind, NEVER, course)


# ----- one point


@attrs.frozen
class Sweep:
    """Tries points of one seed. Everything happens in folders of `folder`."""

    folder: Path
    seed: int
    _counted: dict[tuple[str, int, tuple[str, ...]], int] = attrs.field(
        factory=dict[tuple[str, int, "tuple[str, ...]"], int]
    )

    def try_one(self, text: str, tally: Tally) -> None:
        """One world: the faulty life, the good one, the account."""
        point = Point.parse(text)
        if point.place == "command":
            _faulty_command.try_one(point, tally)
            return
        with self._world(point) as world:
            killed = self._live(FaultyLife(point, self.seed), world, point)
            struck = noted(world, "struck")
            assert struck or point.place == "real", "the operation is not reached"
            tally.count(
                faults=int(bool(struck)), killed=int(killed), boots=len(noted(world, "boot"))
            )
            tally.saw(*(f"failed: {what}" for what in struck))
            if not killed:
                _check_words(world, point)
            sound_at_death(world)
            broken = broken_promises(world.store, promises_in(world))
            assert not broken, f"promised, and not on disk: {broken}"
            tally.saw(*_seen_at_death(world))
            assert not self._live(good_life, world, point, number=2)
            check_day(world, doubts=killed or point.lasting or point.place == "wreck")
            tally.saw(*_seen(world))

    def operations(self, point: Point) -> int:
        """How many operations can fail so, in a life in which nothing does."""
        key = (point.place, point.number, KINDS[point.kind].strikes)
        if key not in self._counted:
            with self._world(point) as world:
                life = FaultyLife(attrs.evolve(point, at=NEVER, course="on"), self.seed)
                assert not self._live(life, world, point)
                (self._counted[key],) = map(int, noted(world, "operations"))
        return self._counted[key]

    def _live(self, scenario: Scenario, world: World, point: Point, number: int = 1) -> bool:
        """One life; whether it was killed."""
        schedule_by(zlib.crc32(f"{self.seed}:{point.number}:{number}".encode()))
        return live(scenario, world, number=number, virtual_time=True, timeout=TIMEOUT)

    @contextmanager
    def _world(self, point: Point) -> Generator[World]:
        """A world of the point's own: empty, or a copy of a wreck."""
        with tempfile.TemporaryDirectory(dir=self.folder) as where:
            world = World(Path(where))
            if point.place == "wreck":
                shutil.copytree(self._wreck(point.number), where, dirs_exist_ok=True)
            yield world

    def _wreck(self, number: int) -> Path:
        """A world whose gateway has died somewhere in its day."""
        wreck = World(self.folder / f"wreck {number}")
        if not wreck.folder.exists():
            day = Point("day", number, "eio", NEVER, "die")
            # Wherever the golden ratio leads: far from each other.
            at = 1 + int(self.operations(day) * ((0.33 + number * 0.618) % 1))
            with self._world(day) as world:
                life = FaultyLife(attrs.evolve(day, at=at), self.seed)
                assert self._live(life, world, day)
                shutil.copytree(world.folder, wreck.folder)
        return wreck.folder


def _check_words(world: World, point: Point) -> None:
    """A process that went on has said what failed, in words, and got over what has passed."""
    troubles = noted(world, "trouble")
    late = ("not written within",) if point.place == "real" else ()
    for trouble in troubles:
        assert any(words in trouble for words in WORDS + late), f"unclear: {trouble}"
    if point.place in ("day", "wreck"):  # where a batch fails, it is tried again, one by one
        (failed,) = noted(world, "failed")
        assert int(failed) <= len(troubles), f"{failed} commits failed, told was {troubles}"
    assert point.lasting or noted(world, "day") == ["over"], f"not got over: {troubles}"


def _seen_at_death(world: World) -> Iterator[str]:
    """What is on disk although somebody was told that it could not be written."""
    if not any(trouble.startswith("accept") for trouble in noted(world, "trouble")):
        return
    found = {id for (id,) in rows(world.store, "SELECT id FROM message")}
    if found - set(noted(world, "accepted")):
        yield "told as failed, and on disk all the same"


def _seen(world: World) -> Iterator[str]:
    for trouble in noted(world, "trouble"):
        yield f"told: {trouble.partition(':')[0]}"
    reasons = Counter(began.split()[-1] for began in noted(world, "began"))
    for reason in reasons.keys() - {"fresh"}:
        yield f"resumed: {reason}"
    texts = [text for platform in (PHONE, LETTERS) for text in world.arrived(platform)]
    if any(text.text.startswith("in doubt") for text in texts):
        yield "in doubt"
    if any(text.repeat for text in texts):
        yield "a repeat that says so"
    if "batch" in world.notes:
        yield "a batch"
