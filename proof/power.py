"""The power goes: crash images of recorded runs of the real gateway.

A run is one or more lives of the real gateway in virtual time (`_day.py`), each of which may have
been killed; what its disk was told to do is recorded, with everything that was promised meanwhile.
Then, without running anything, disks are made that the power could have left: at each point of the
recording, any part of what was not synced may be there (`_recording.py`). SQLite itself opens each.
It must be sound, it must be a state that the store was in, to the last column, and one that keeps
every promise (`_chronicle.py`). On some of them the gateway boots, and everything must come to its
end: nothing lost, nothing doubled, exactly the interrupted resumed.

    RUN : ENTRIES : IMAGE       3:1417:5

is one image: of the third run, when so many entries had passed. `RUN` alone is all of a run.
"""

from __future__ import annotations

import os
import random
import tempfile
import zlib
from collections.abc import Generator, Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import Final

import attrs
import trio
import trio.testing

from trio_gateway.store import _writer
from trio_gateway.testing import GatewayOpener, World, live
from trio_gateway.testing._schedule import schedule_by

from ._chronicle import Chronicle, Unreadable, read_store
from ._day import Day, check_day
from ._disk import Disk
from ._faulty_life import good_life, need_schedules
from ._lockstep import SharedClock, in_step
from ._process import scratch_folder
from ._recording import (
    Files,
    Luck,
    Medium,
    Op,
    Outside,
    Promise,
    Recording,
    write_files,
)
from ._report import Campaign, Job
from ._spread import Tally, spread
from ._worlds import noted

CAMPAIGN: Final = Campaign(
    name="power",
    injects="a power cut at every point of recorded runs: unsynced writes lost, reordered, torn",
    short="power cuts (crash images)",
    promises=(1, 3, 4, 5, 6, 7, 8, 10, 12),
    counted="images",
    must_see=(
        "torn",
        "torn inside",
        "grown",
        "rubbish",
        "a hot journal",
        "the WAL written back",
        "the WAL begun anew",
        "the WAL deleted",
        "a commit undone",
        "a commit that was not promised yet, and there",
        "a killed life",
        "a batch",
        "resumed: crash",
        "resumed: shutdown",
        *(f"promised: {what}" for what in ("accepted", "marked", "settled", "step", "delivered")),
    ),
)

TIMEOUT: Final = 60.0
"""Seconds of real time that one boot may take."""

FAILURES: Final = 2
"""After so many failures, one run has said enough."""


def run(job: Job) -> None:
    """The campaign."""
    need_schedules()
    runs = job.amount(2, 40, 400)
    with scratch_folder() as folder:
        study = Study(
            folder,
            job.seed,
            images=job.amount(1_000, 5_000, 5_000),
            boots=job.amount(10, 16, 5),
        )
        points = [str(number) for number in range(runs)] if job.only is None else [job.only]
        spread(job.report, job.jobs, points, study.try_one)


# ----- recording


@attrs.frozen
class Run:
    """What was recorded: all entries, and what was noted outside."""

    number: int
    recording: Recording
    outside: Files

    @classmethod
    def record(cls, number: int, seed: int, world: World, tally: Tally) -> Run:
        """One to three lives, killed somewhere but for the last."""
        dice = random.Random(f"power {seed}:{number}")
        paths = tuple(world.folder / name for name in _OUTSIDE)
        recording = Recording(paths)
        lives = dice.randint(1, 3)
        for life in range(lives):
            before = len(recording.entries)
            schedule_by(zlib.crc32(f"{seed}:{number}:{life}".encode()))
            whole = life == 0 or dice.random() < 0.5
            if _live(world, recording, dice, whole=whole) > 1:
                tally.saw("a batch")
            if life < lives - 1:
                recording = recording.upto(dice.randint(before, len(recording.entries)))
                _rewind(world, recording)
                tally.saw("a killed life")
        outside = {path.name: path.read_bytes() for path in paths if path.exists()}
        return cls(number, recording, outside)

    def outside_at(self, passed: int) -> Files:
        """What was noted outside when so many entries had passed."""
        lengths: tuple[int, ...] = (0,) * len(_OUTSIDE)
        for entry in self.recording.entries[:passed]:
            if isinstance(entry, Outside):
                lengths = entry.lengths
        return {
            name: self.outside[name][:length]
            for name, length in zip(_OUTSIDE, lengths, strict=True)
            if length
        }


_OUTSIDE: Final = ("notes.jsonl", "arrived-phone.jsonl", "arrived-letters.jsonl")


def _live(world: World, recording: Recording, dice: random.Random, *, whole: bool) -> int:
    """One life, on a disk that records; `whole`: a day with a stop, or else only the day after.
    Returns how many operations were committed together at the most."""
    in_thread = dice.random() < 0.5
    batches = random.Random(dice.random())

    async def life() -> int:
        opener = GatewayOpener(
            store=world.store, clock=SharedClock(), inline_store=not in_thread, tap=recording.tap
        )
        day = Day(world, opener, promised=recording.promise)
        async with AsyncExitStack() as stack:
            turns = await stack.enter_async_context(in_step(batches)) if in_thread else None
            over = await (day.pass_by() if whole else day.next_day())
            assert over, f"the day is not over: {day.troubles}"
            assert not day.troubles, day.troubles
        return turns.largest_batch if turns else 1

    pages = dice.choice((5, 15, 50, 2000))
    with Disk() as disk, _checkpoints_after(pages):
        disk.record = recording
        return trio.run(life, clock=trio.testing.MockClock(autojump_threshold=0))


@contextmanager
def _checkpoints_after(pages: int) -> Generator[None]:
    """Let the WAL be written back when it has so many pages."""
    before = _writer.CHECKPOINT_PAGES
    setattr(_writer, "CHECKPOINT_PAGES", pages)  # noqa: B010 - it is final for everybody else
    try:
        yield
    finally:
        setattr(_writer, "CHECKPOINT_PAGES", before)  # noqa: B010


def _rewind(world: World, recording: Recording) -> None:
    """Make the world what it was when the recording ends: its process was killed then."""
    medium = Medium()
    for entry in recording.entries:
        if isinstance(entry, Op):
            medium.do(entry)
    write_files(world.store, medium.kill())
    for path, length in zip(recording.outside, recording.lengths, strict=True):
        if path.exists():
            os.truncate(path, length)


# ----- images


@attrs.frozen
class Study:
    """Tries the runs of one seed: so many images of each, so many boots. Everything happens in
    folders of `folder`."""

    folder: Path
    seed: int
    images: int
    boots: int

    def try_one(self, point: str, tally: Tally) -> None:
        """All of a run, or one image of it."""
        number, *image = map(int, point.split(":"))
        with self._world() as world:
            run = Run.record(number, self.seed, world, tally)
        with self._world() as world:
            chronicle = Chronicle.of(run.recording, world.folder)
        tally.count(runs=1, states=len(chronicle.states), recorded=len(run.recording.entries))
        tally.saw(*_seen_in(run.recording))
        with self._world() as world:
            look = Look(run, chronicle, world, self.seed, tally)
            if image:
                look.at_one(*image)
            else:
                look.at_all(self.images, self.boots)

    @contextmanager
    def _world(self) -> Generator[World]:
        with tempfile.TemporaryDirectory(dir=self.folder) as where:
            yield World(Path(where))


@attrs.define
class Look:
    """Looks at the images of one run."""

    run: Run
    chronicle: Chronicle
    world: World
    seed: int
    tally: Tally
    _known: set[int] = attrs.field(factory=set[int])

    def at_all(self, images: int, boots: int) -> None:
        """Draw about so many images, and boot about so many of them."""
        dice = random.Random(f"boots {self.seed}:{self.run.number}")
        for passed, index, medium in self._drawn(images):
            files, luck = self._draw(medium, passed, index)
            if not self._is_new(files, passed):
                continue
            try:
                self._look(files, luck, passed)
                if dice.random() < boots / images:
                    self._boot(files, passed)
            except AssertionError as error:
                self.tally.fail(f"{self.run.number}:{passed}:{index}", str(error))
                if len(self.tally.failures) >= FAILURES:
                    return

    def at_one(self, passed: int, index: int) -> None:
        """Look at one image, and boot it."""
        medium = Medium()
        for entry in self.run.recording.entries[:passed]:
            if isinstance(entry, Op):
                medium.do(entry)
        files, luck = self._draw(medium, passed, index)
        self._look(files, luck, passed)
        self._boot(files, passed)

    # ----- drawing

    def _drawn(self, images: int) -> Iterator[tuple[int, int, Medium]]:
        """How many entries have passed, which image is to be drawn, of what."""
        rate = images / max(1, self._loose_places())
        medium = Medium()
        for passed, entry in enumerate(self.run.recording.entries, 1):
            if isinstance(entry, Op):
                medium.do(entry)
            elif isinstance(entry, Outside):
                continue
            dice = random.Random(f"{self.seed}:{self.run.number}:{passed}")
            for index in range(int(rate + dice.random()) if medium.loose else 1):
                yield passed, index, medium

    def _loose_places(self) -> int:
        medium = Medium()
        places = 0
        for entry in self.run.recording.entries:
            if isinstance(entry, Op):
                medium.do(entry)
            places += medium.loose > 0
        return places

    def _draw(self, medium: Medium, passed: int, index: int) -> tuple[Files, Luck]:
        dice = random.Random(f"{self.seed}:{self.run.number}:{passed}:{index}")
        luck = _luck(dice, medium.loose)
        return medium.cut(luck), luck

    def _is_new(self, files: Files, passed: int) -> bool:
        bounds = self.chronicle.bounds(passed)
        known = hash((tuple(sorted(files.items())), bounds.least, bounds.most))
        if known in self._known:
            return False
        self._known.add(known)
        return True

    # ----- looking

    def _look(self, files: Files, luck: Luck, passed: int) -> None:
        """Let SQLite open it, and find out which state it is."""
        write_files(self.world.store, files)
        try:
            rows = read_store(self.world.store)
        except Unreadable as unreadable:
            raise AssertionError(f"no sound database: {unreadable}") from None
        bounds = self.chronicle.bounds(passed)
        number = self.chronicle.number_of(rows, bounds)
        assert number is not None, self.chronicle.describe(rows, passed)
        self.tally.count(images=1)
        self.tally.saw(*luck.kinds)
        if f"{self.world.store.name}-journal" in files:
            self.tally.saw("a hot journal")
        if bounds.least < bounds.most:
            least = number == bounds.least
            self.tally.saw(
                "a commit undone" if least else "a commit that was not promised yet, and there"
            )

    def _boot(self, files: Files, passed: int) -> None:
        """Let the real gateway boot on it, and bring everything to its end."""
        with tempfile.TemporaryDirectory(dir=self.world.folder) as where:
            world = World(Path(where))
            write_files(world.store, files)
            for name, content in self.run.outside_at(passed).items():
                (world.folder / name).write_bytes(content)
            before = len(noted(world, "began"))
            schedule_by(zlib.crc32(f"{self.seed}:{self.run.number}:{passed}".encode()))
            assert not live(good_life, world, virtual_time=True, timeout=TIMEOUT)
            check_day(world, doubts=True)
            reasons = {began.split()[-1] for began in noted(world, "began")[before:]}
        self.tally.count(boots=1)
        self.tally.saw(*(f"resumed: {reason}" for reason in reasons - {"fresh"}))


def _luck(dice: random.Random, loose: int) -> Luck:
    """All of it, nothing, all but one, one alone, or whatever the dice say."""
    kind = dice.random()
    if kind < 0.2:
        return Luck(dice, float(kind < 0.1))
    if kind < 0.5 and loose:
        return Luck(dice, float(kind < 0.35), odd=dice.randrange(loose))
    return Luck(dice, dice.choice((0.2, 0.5, 0.8, 0.95)), torn=dice.choice((0.05, 0.3, 0.8)))


def _seen_in(recording: Recording) -> Iterator[str]:
    """What a recording has come through."""
    made = False
    new_wal = False
    for entry in recording.entries:
        match entry:
            case Promise(what):
                yield f"promised: {what}"
            case Op("open", file) if file.endswith("-wal"):
                made = True
            case Op("delete", file) if file.endswith("-wal"):
                new_wal = False
                yield "the WAL deleted"
            case Op("write", file, at):
                if file.endswith("-wal") and at == 0:
                    if new_wal:
                        yield "the WAL begun anew"
                    new_wal = True
                elif made and file.endswith(".db"):
                    yield "the WAL written back"
            case _:
                pass
